from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import yaml

from llmtrain.build import GROUPS
from llmtrain.compose import config_folder
from llmtrain.config import LENGTHS, SECTIONS, Evaluation, Generation, check, check_command, knobs_of, read
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.topics import option_values


def whole() -> dict[str, Any]:
    """A config as composing gives it, without Hydra."""
    folder = config_folder()
    values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    chosen = {k: v for entry in values["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    config = {k: v for k, v in values.items() if k not in ("defaults", "hydra")}
    for entry, option in chosen.items():
        group = entry.rpartition("@")[2]
        if option is not None and group in (*GROUPS, "sample"):
            config[group] = option_values(group, option)
    config["train"]["steps"], config["optim"]["lr"], config["data"]["context"] = 600, 1e-3, 128
    return config


def changed(**knobs: Any) -> dict[str, Any]:
    """The whole config with some knobs set: `changed(train__steps=3)`."""
    config = deepcopy(whole())
    for key, value in knobs.items():
        section, _, knob = key.partition("__")
        config[section] = {**config[section], knob: value} if knob else value
    return config


def misfits(config: dict[str, Any]) -> list[Misfit]:
    with pytest.raises(ConfigError) as caught:
        check(config)
    return caught.value.misfits


def test_a_good_config_is_taken_as_it_is():
    config = check(whole())
    assert config.plain() == whole()
    assert config.train.batch_size == whole()["train"]["batch_size"]
    assert config.optim.part.name == "adam"
    assert config.optim.values["beta1"] == 0.9


def test_everything_that_is_wrong_comes_together():
    config = changed(train__steps=-1, train__sseed=3, optim__lr="fast", model__layers=0, log=5, resume=None)
    del config["schedule"], config["loss"]["temperature"]
    config["optimm"] = {"lr": 3}
    told = misfits(config)
    assert {m.key: (m.value, m.suggestion) for m in told} == {
        "schedule": ("(missing)", None),
        "train.steps": (-1, None),
        "train.sseed": (3, "seed"),
        "optim.lr": ("fast", None),
        "model.layers": (0, None),
        "log": (5, None),
        "resume": (None, None),
        "loss.temperature": ("(missing)", None),
        "optimm.lr": (3, "optim.lr"),
    }
    assert all(m.rule for m in told)


@pytest.mark.parametrize(("key", "suggestion"), [("train__lr", "optim.lr"), ("optim__steps", "train.steps")])
def test_a_knob_in_a_wrong_section_is_pointed_to_its_own(key: str, suggestion: str):
    [misfit] = misfits(changed(**{key: 1}))
    assert misfit.key == key.replace("__", ".")
    assert misfit.suggestion == suggestion


def test_a_knob_of_no_section_is_suggested_nothing():
    assert [m.suggestion for m in misfits(changed(train__quux=1))] == [None]


def test_a_knob_that_is_known_is_not_pointed_elsewhere():
    assert [(m.key, m.suggestion) for m in misfits(changed(sample__seed=-1))] == [("sample.seed", None)]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_run_has_exactly_one_length(length: str):
    only = {f"train__{name}": None for name in LENGTHS} | {f"train__{length}": 3}
    assert getattr(check(changed(**only)).train, length) == 3


def test_no_length_and_two_lengths_are_told():
    rule = "a run has exactly one length; give one of train.steps, train.epochs, train.tokens, train.minutes"
    assert misfits(changed(train__steps=None)) == [Misfit("train", "none", rule)]
    assert misfits(changed(train__epochs=0.5)) == [Misfit("train", "steps=600, epochs=0.5", rule)]


def test_what_is_good_can_be_used_beside_what_is_not():
    config, told = read(changed(train__batch_size=0, optim__beta1=1, model__stray=1))
    assert {m.key for m in told} == {"train.batch_size", "optim.beta1", "model.stray"}
    assert config.train.batch_size is None
    assert config.train.steps == 600
    assert config.optim is None
    assert config.model.values["width"] == whole()["model"]["width"]
    assert config.log == check(whole()).log


def test_numbers_are_converted_and_booleans_are_no_numbers():
    config = check(changed(train__steps=1e6, optim__lr="2e-5", run__name=7))
    assert (config.train.steps, config.optim.values["lr"], config.run.name) == (1000000, 2e-5, "7")
    assert isinstance(config.train.steps, int)
    assert {m.key for m in misfits(changed(train__seed=True, checkpoint__keep=False))} == {
        "train.seed",
        "checkpoint.keep",
    }


@pytest.mark.parametrize("name", ["os.system", "mypkg.parts:sophia", "llmtrain.optim.sgd:sgd"])
def test_a_name_from_outside_is_refused_unless_trusted(name: str):
    assert [m.key for m in misfits(changed(optim__name=name))] == ["optim.name"]


def test_the_check_trusts_what_it_is_told_to_trust():
    sgd = {"name": "llmtrain.optim.sgd:sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False}
    config = check(changed(optim=sgd), trust=["llmtrain"])
    assert config.optim.part.name == sgd["name"]
    assert config.plain()["optim"] == sgd


def test_the_settings_of_commands_are_checked_alike():
    evaluation = {"run": "r", "checkpoint": 300, "batches": None, "batch_size": 4, "split": "test", "metrics": ["mae"]}
    evaluation["device"] = "cpu"
    assert check_command("eval", evaluation) == Evaluation("r", "300", None, 4, "test", ["mae"], "cpu")
    with pytest.raises(ConfigError) as caught:
        check_command("eval", {**evaluation, "batches": 0, "device": "gpu", "rum": 1})
    assert {m.key: m.suggestion for m in caught.value.misfits} == {"batches": None, "device": "cpu", "rum": "run"}


def test_generate_takes_all_that_sample_takes():
    assert set(knobs_of(Generation)) > set(knobs_of(SECTIONS["sample"]))
