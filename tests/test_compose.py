from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llmtrain.build import SCHEDULES
from llmtrain.compose import ALIASES, Composed, compose_jobs, config_folder, mend, prepare
from llmtrain.knobs import ConfigError
from llmtrain.topics import option_values, options

OPTIMS = ", ".join(options("optim"))

KEYS = st.from_regex(r"[a-z_]{1,8}(\.[a-z_0-9]{1,6}){0,2}", fullmatch=True)
VALUES = st.text(max_size=12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of YAML files of the user's own, not looked into any more afterwards."""
    yield tmp_path
    prepare(None)


def one(*overrides: str, folder: Path | None = None, name: str = "config") -> Composed:
    prepare(str(folder) if folder is not None else None)
    [job] = compose_jobs(name, overrides, multirun=False)
    return job


def grid(*overrides: str, folder: Path | None = None, name: str = "config") -> list[Composed]:
    prepare(str(folder) if folder is not None else None)
    return compose_jobs(name, overrides, multirun=True)


def told(job: Composed) -> dict[str, Any]:
    return {misfit.key: misfit.value for misfit in job.misfits}


# Spelling


@given(
    sign=st.sampled_from(["", "+", "++", "~"]), end=st.sampled_from([".lr=1", "=sgd", "@x=sgd", "", "=a=b", ".a.b=1"])
)
def test_another_word_for_a_group_is_mended_wherever_it_names_the_group(sign: str, end: str):
    for word, group in ALIASES.items():
        assert mend(f"{sign}{word}{end}") == f"{sign}{group}{end}"


@given(key=KEYS, value=VALUES)
def test_all_else_is_left_as_it_was_written(key: str, value: str):
    override = f"{key}={value}"
    named = key.split(".")[0] in ALIASES
    assert (mend(override) != override) == named
    assert mend(mend(override)) == mend(override)
    assert mend(override).partition("=")[2] == value


@pytest.mark.parametrize("group", SCHEDULES[1:])
def test_an_option_of_a_group_without_a_folder_is_spelled_as_hydra_wants_it(group: str):
    assert mend(f"{group}=linear,cosine") == f"schedule@{group}=linear,cosine"
    assert mend(f"++{group}=linear") == f"++schedule@{group}=linear"
    for word in (f"{group}.floor=0.5", f"schedule@{group}=linear", f"x.{group}=1", f"{group}s=1", "schedule=linear"):
        assert mend(word) == word
    assert mend(mend(f"{group}=linear")) == mend(f"{group}=linear")


@pytest.mark.parametrize("override", ["optimizers.lr=1", "my.optimizer.lr=1", "optimizer_lr=1", "x=optimizer=sgd"])
def test_a_word_that_only_looks_like_another_is_left_alone(override: str):
    assert mend(override) == override


# One run


def test_overrides_groups_and_defaults_come_together():
    job = one("optim=sgd", "optim.momentum=0.5", "train.steps=7")
    assert job.misfits == []
    assert job.choices["optim"] == "sgd"
    assert job.choices["loss"] == "cross_entropy"
    assert job.overrides == ["optim=sgd", "optim.momentum=0.5", "train.steps=7"]
    assert job.values is not None
    assert job.values["optim"] == {"name": "sgd", "lr": 0.1, "momentum": 0.5, "dampening": 0.0, "nesterov": False}
    assert job.values["train"]["steps"] == 7
    assert "hydra" not in job.values


def test_a_group_without_a_folder_is_chosen_beside_the_one_whose_options_it_has():
    job = one(mend("weight_decay_schedule=linear"), "weight_decay_schedule.floor=0.5", "schedule=constant")
    assert (job.misfits, job.values["schedule"]["name"]) == ([], "constant")
    assert job.values["weight_decay_schedule"] == {"name": "linear", "warmup": 0.05, "floor": 0.5}
    assert job.values["momentum_schedule"] == {"name": "constant", "warmup": 0.0}
    assert (job.choices["schedule"], job.choices["schedule@weight_decay_schedule"]) == ("constant", "linear")


def test_a_wrong_option_of_a_group_without_a_folder_is_told_as_its_own():
    job = one("schedule@weight_decay_schedule=linar", "schedule@batch_schedule=zzz")
    assert told(job) == {"weight_decay_schedule": "linar", "batch_schedule": "zzz"}
    assert [misfit.suggestion for misfit in job.misfits] == ["linear", None]
    assert job.values["weight_decay_schedule"]["name"] == "linear"  # taken for what was meant
    assert job.values["schedule"]["name"] == "cosine"
    assert job.spoiled == {"batch_schedule"}


def test_an_overlay_overrides_a_group_without_a_folder(folder: Path):
    (folder / "experiment").mkdir()
    overlay = (
        "# @package _global_\ndefaults: [{override /schedule@batch_schedule: step}]\nbatch_schedule: {gamma: 0.5}\n"
    )
    (folder / "experiment" / "mine.yaml").write_text(overlay)
    job = one("experiment=mine", folder=folder)
    assert job.misfits == []
    assert (job.values["batch_schedule"]["name"], job.values["batch_schedule"]["gamma"]) == ("step", 0.5)
    assert one("experiment=mine", "schedule@batch_schedule=none", folder=folder).choices["schedule@batch_schedule"] == (
        "none"
    )


def chosen(*overrides: str, **given: Any) -> tuple[str, str]:
    """The task and the loss that a run gets, as parts and as options."""
    job = one(*overrides, **given)
    assert job.misfits == [] and job.values is not None
    found = job.values["task"]["name"], job.values["loss"]["name"]
    assert found == (job.choices["task"], job.choices["loss"])
    return found


USUAL = {
    "causal_lm": "cross_entropy",
    "masked_lm": "cross_entropy",
    "classification": "cross_entropy",
    "multilabel": "bce",
    "regression": "mse",
    "probabilistic_regression": "gaussian_nll",
    "counts": "poisson_nll",
}


@pytest.mark.parametrize("task", options("task"))
def test_the_task_picks_its_usual_loss_until_one_is_named(task: str):
    assert chosen(f"task={task}") == (task, USUAL[task])
    assert chosen(f"task={task}", "data=diabetes") == (task, USUAL[task])
    assert chosen("model=bert_nano", f"task={task}", "data=digits") == (task, USUAL[task])
    assert chosen(f"task={task}", "loss=huber") == chosen("loss=huber", f"task={task}") == (task, "huber")
    assert chosen("experiment=bert", f"task={task}") == (task, USUAL[task])
    assert one(f"task={task}").values["loss"] == option_values("loss", USUAL[task])


def test_data_that_picks_a_task_picks_its_loss():
    assert chosen() == ("causal_lm", "cross_entropy")
    assert chosen("data=diabetes") == ("regression", "mse")
    assert chosen("data=diabetes", "loss=mae") == ("regression", "mae")
    assert chosen("data=digits") == ("classification", "cross_entropy")
    jobs = grid("task=regression,counts,classification")
    assert [job.values["loss"]["name"] for job in jobs if job.values] == ["mse", "poisson_nll", "cross_entropy"]


def test_files_pick_a_loss_through_a_task_or_by_name(folder: Path):
    overlays = {
        "task": "override /task: counts",
        "data": "override /data: diabetes",
        "loss": "override /loss: huber, override /task: regression",
    }
    (folder / "experiment").mkdir()
    for name, choices in overlays.items():
        listed = "".join(f"  - {choice}\n" for choice in choices.split(", "))
        (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\ndefaults:\n{listed}")
        own = "".join(f"  - {choice.replace('/', '')}\n" for choice in choices.split(", "))
        (folder / f"{name}_of_mine.yaml").write_text(f"defaults:\n  - config\n{own}  - _self_\n")
    expected = {"task": ("counts", "poisson_nll"), "data": ("regression", "mse"), "loss": ("regression", "huber")}
    for name, pair in expected.items():
        assert chosen(f"experiment={name}", folder=folder) == pair
        assert chosen(folder=folder, name=f"{name}_of_mine") == pair
        assert chosen(f"experiment={name}", "loss=mae", folder=folder) == (pair[0], "mae")
        assert chosen("loss=mae", folder=folder, name=f"{name}_of_mine") == (pair[0], "mae")
        assert chosen(f"experiment={name}", "task=multilabel", folder=folder)[1] == (
            "huber" if name == "loss" else "bce"
        )
    (folder / "task").mkdir()
    (folder / "task" / "other.yaml").write_text("name: other\n")  # a task that says nothing of a loss
    assert one("task=other", folder=folder).choices["loss"] == "cross_entropy"


def test_the_loss_that_the_task_picks_is_shown(call):
    said = call("train", "data=diabetes", "task=counts", "--cfg", "job")
    assert said.code == 0 and yaml.safe_load(said.out)["loss"] == option_values("loss", "poisson_nll")


def test_a_loss_called_auto_is_told_to_be_left_out():
    [misfit] = one("loss=auto", "task=regression").misfits
    assert misfit.rule.startswith("no such option; leave it out for the usual one; there are bce, ")
    [other] = one("loss=autos").misfits
    assert other.rule.startswith("no such option; there are bce, ")


def test_numbers_of_the_command_line_are_numbers():
    values = one("optim.lr=2e-5", "optim.eps=5e-4", "train.batch_size=1e6").values
    assert values is not None
    assert (values["optim"]["lr"], values["optim"]["eps"], values["train"]["batch_size"]) == (2e-5, 5e-4, 1e6)


def test_numbers_of_yaml_files_are_numbers(folder: Path):
    (folder / "mine.yaml").write_text("defaults: [config, _self_]\noptim: {lr: 2e-5, eps: 5e-4}\ntrain: {steps: 1e6}\n")
    values = one(folder=folder, name="mine").values
    assert values is not None
    assert (values["optim"]["lr"], values["optim"]["eps"], values["train"]["steps"]) == (2e-5, 5e-4, 1e6)


def test_unknown_keys_are_let_through_for_the_check_to_tell():
    values = one("optim.lrr=1", "+optim.extra=2", "seed=3", "++a.b=4").values
    assert values is not None
    assert (values["optim"]["lrr"], values["optim"]["extra"]) == (1, 2)
    assert (values["seed"], values["a"]) == (3, {"b": 4})


def test_what_has_no_value_is_left_out_for_the_check_to_tell():
    job = one("data=text", "model.context=32")
    assert job.misfits == []
    assert job.values is not None
    shipped = option_values("data", "text")
    assert job.values["data"] == {k: v for k, v in shipped.items() if k != "path"} | {"context": 32}


def test_every_override_that_cannot_stand_is_told_and_the_others_are_composed():
    job = one("optim=adamm", "model=gpt_nan", "train.steps=3,4", "oops", "=3", "loss=zzz", "train.seed=5")
    assert told(job) == {
        "train.steps": "3,4",
        "oops": "",
        "=3": "3",
        "optim": "adamm",
        "model": "gpt_nan",
        "loss": "zzz",
    }
    assert {m.key: m.suggestion for m in job.misfits if m.suggestion} == {"optim": "adam", "model": "gpt_nano"}
    assert job.spoiled == {"loss"}
    assert job.values is not None
    assert job.values["train"]["seed"] == 5
    assert job.choices["optim"] == "adam"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.width=${model.width}", "model.width"),
        ("model.width=${nowhere}", "model.width"),
        ("model.width=${nothing:3}", "model.width"),
        ("~nowhere", "config"),
        ("+experiment=gpt2", "experiment"),
        ("hydra.nope=1", "hydra.nope"),
        ("hydra/launcher=nope", "hydra/launcher"),
    ],
)
def test_what_hydra_stops_at_is_told(override: str, key: str):
    assert key in told(one(override))


def test_a_config_name_that_is_not_there_is_told():
    assert told(one(name="confg")) == {"config": "confg"}


# The user's folder


def test_the_users_options_come_before_ours_and_beside_them(folder: Path):
    (folder / "optim").mkdir()
    (folder / "optim" / "adam.yaml").write_text("name: adam\nlr: 7.0\n")
    (folder / "optim" / "mine.yaml").write_text("name: sgd\nlr: 8.0\n")
    assert one("optim=adam", folder=folder).values["optim"] == {"name": "adam", "lr": 7.0}
    assert one("optim=mine", folder=folder).values["optim"] == {"name": "sgd", "lr": 8.0}
    assert one("optim=sgd", folder=folder).values["optim"]["momentum"] == 0.9
    assert one("optim=adam").values["optim"]["beta1"] == 0.9  # the folder is forgotten with its run
    assert told(one("optim=mine")) == {"optim": "mine"}


def test_the_users_config_may_be_the_primary_one(folder: Path):
    (folder / "mine.yaml").write_text("defaults: [config, _self_]\ntrain: {steps: 9}\n")
    for name in ("mine", "mine.yaml"):
        assert one(folder=folder, name=name).values["train"]["steps"] == 9


def test_the_config_that_a_run_wrote_can_be_composed_again(folder: Path):
    values = one("train.steps=3", "optim=sgd").values
    OmegaConf.save(OmegaConf.create(values), folder / "config.yaml")
    again = one("train.steps=4", folder=folder)
    assert again.misfits == []
    assert again.values == values | {"train": values["train"] | {"steps": 4}}
    [misfit] = one("optim=adam", folder=folder).misfits
    assert misfit.key == "optim"
    assert "no groups to choose from; override optim.KNOB instead" in misfit.rule


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("optim:\n  lr: [1\nx: 2\n", "3:2", "expected ',' or ']', but got ':'"),
        ("optim: {lr: 1\n", "2:1", "expected ',' or '}', but got '<stream end>'"),
        ("a: 1\n\tb: 2\n", "2:1", "found character '\\t' that cannot start any token"),
        ("a: 1\nb: 2\na: 3\n", "3:1", "found duplicate key a"),
        ("a: !!python/name:os.system\n", "1:4", "could not determine a constructor for the tag"),
    ],
)
def test_broken_yaml_is_told_with_file_and_line(folder: Path, text: str, where: str, what: str):
    for name, file in (("config", "optim/mine.yaml"), ("mine", "mine.yaml")):
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        [misfit] = one(*(["optim=mine"] if name == "config" else []), folder=folder, name=name).misfits
        assert misfit.key.startswith(f"{path}:{where}")
        assert what in misfit.value
        assert misfit.rule == "is not valid YAML"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"\xff\xfea\x00:\x00 \x001\x00", "is not UTF-8"),
        (b"- a\n", "must be a DictConfig"),
        (b"5\n", "Invalid loaded object type: int"),
        (b"defaults: 5\n", "defaults must be a list"),
        (b"defaults: [config, _self_]\nhydra: 5\n", "int is not a subclass of HydraConf"),
        (b"defaults: [config, _self_]\noptim: [1]\n", "Cannot merge DictConfig with ListConfig"),
        (b"defaults: [config, _self_]\nnull: 1\n", "Incompatible key type"),
        (b"defaults: [config, {optim: nope}, _self_]\n", f"there are {OPTIMS}"),
        (b"defaults: [confg, _self_]\n", "no such config"),
    ],
)
def test_a_file_that_is_no_config_is_told(folder: Path, content: bytes, rule: str):
    (folder / "mine.yaml").write_bytes(content)
    [misfit] = one(folder=folder, name="mine").misfits
    assert misfit.key == "config"
    assert rule in misfit.rule


def test_an_empty_config_is_one_without_values(folder: Path):
    (folder / "mine.yaml").write_text("")
    assert one(folder=folder, name="mine").values == {}


def test_keys_that_are_no_text_are_told_as_text(folder: Path):
    (folder / "mine.yaml").write_text("defaults: [config, _self_]\n3: {4: 5}\n")
    assert one(folder=folder, name="mine").values["3"] == {"4": 5}


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_a_folder_that_is_none_is_told(folder: Path, place: str):
    (folder / "file").touch()
    with pytest.raises(ConfigError) as caught:
        prepare(str(folder / place))
    assert [m.key for m in caught.value.misfits] == ["--config-dir"]


def test_the_configs_lie_beside_the_package():
    assert (config_folder() / "config.yaml").is_file()


# Grids


def test_a_grid_has_a_job_for_each_combination():
    jobs = grid("optim.lr=1e-3,1e-4", "optim=adam,sgd", "train.seed=range(1,3)", "train.steps=2")
    assert [job.misfits for job in jobs] == [[]] * 8
    points = {(j.choices["optim"], j.values["optim"]["lr"], j.values["train"]["seed"]) for j in jobs}
    assert points == {(o, lr, seed) for o in ("adam", "sgd") for lr in (1e-3, 1e-4) for seed in (1, 2)}
    assert {job.values["train"]["steps"] for job in jobs} == {2}
    assert sorted(jobs[0].overrides) == ["optim.lr=0.001", "optim=adam", "train.seed=1", "train.steps=2"]


def test_a_glob_takes_every_option():
    assert [job.choices["optim"] for job in grid("optim=glob(*)")] == options("optim")
    jobs = grid(mend("momentum_schedule=linear,cosine"))
    assert [job.values["momentum_schedule"]["name"] for job in jobs] == ["linear", "cosine"]
    assert [job.choices["optim"] for job in grid("optim=glob(adam*)")] == ["adam", "adamax", "adamw"]


def test_a_grid_of_one_is_one_job():
    assert [job.values["train"]["steps"] for job in grid("train.steps=3")] == [3]


def test_the_misfits_of_a_grid_stand_at_the_jobs_that_have_them():
    assert [told(job) for job in grid("optim=adam,adamm")] == [{}, {"optim": "adamm"}]


def test_a_range_without_steps_is_told():
    assert [told(job) for job in grid("optim.lr=interval(1,2)", "train.steps=3")] == [{"optim.lr": "interval(1,2)"}]


def test_several_values_of_one_run_are_told_to_be_a_sweep():
    for value in ("1,2", "choice(1,2)", "range(1,3)", "interval(1,2)", "glob(*)"):
        [misfit] = one(f"train.steps={value}").misfits
        assert (misfit.key, misfit.value) == ("train.steps", value)
        assert "add -m" in misfit.rule


def test_a_grid_may_stand_in_a_config(folder: Path):
    (folder / "experiment").mkdir()
    (folder / "experiment" / "rates.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      optim.lr: 0.5,-1\n      train.seed: range(1,3)\n"
    )
    jobs = grid("experiment=rates", "train.seed=7", folder=folder)
    assert [job.misfits for job in jobs] == [[], []]
    assert [(j.values["optim"]["lr"], j.values["train"]["seed"]) for j in jobs] == [(0.5, 7), (-1, 7)]


@pytest.mark.parametrize(
    "text", ["def ", " x", "f(a, b='c", "a,b", "[1", "back\\slash\\n", "ends in \\", "{", "x=y", "it's \\' so"]
)
def test_a_prompt_is_taken_as_it_is_typed(text):
    job = compose_jobs("config", [mend(f"sample.prompt={text}")], False)[0]
    assert job.misfits == []
    assert job.values["sample"]["prompt"] == text


def points(jobs: list[Composed]) -> list[dict[str, str]]:
    assert [job.misfits for job in jobs] == [[]] * len(jobs)
    return [job.given for job in jobs]


def test_values_that_are_zipped_go_together():
    words = ("train.seed=1,2", "optim.lr=1e-3,1e-2", "optim=adam,sgd", "train.batch_size=4,8")
    found = points(grid(*words, "sweep.zip=[train.batch_size,optimizer.lr]"))
    assert len(found) == 8
    assert {(p["optim.lr"], p["train.batch_size"]) for p in found} == {("0.001", "4"), ("0.01", "8")}
    assert [p["train.seed"] for p in found] == ["1"] * 4 + ["2"] * 4
    jobs = grid(*(mend(f"{group}=linear,cosine") for group in ("momentum_schedule", "schedule")), "optim=sgd",
                "sweep.zip=[momentum_schedule,schedule]")  # fmt: skip
    both = [(j.values["momentum_schedule"]["name"], j.values["schedule"]["name"]) for j in jobs]
    assert both == [("linear", "linear"), ("cosine", "cosine")]
    assert points(jobs)[0] == {"schedule@momentum_schedule": "linear", "schedule": "linear"}


def test_seeds_repeat_each_point():
    jobs = grid("optim.lr=1e-3,1e-2", "sweep.seeds=3", "train.seed=7")
    assert [(p["optim.lr"], p["train.seed"]) for p in points(jobs)] == [
        (lr, str(seed)) for lr in ("0.001", "0.01") for seed in (7, 8, 9)
    ]
    assert [job.values["train"]["seed"] for job in jobs] == [7, 8, 9] * 2
    assert points(grid("sweep.seeds=2")) == [{"train.seed": "1337"}, {"train.seed": "1338"}]


@pytest.mark.parametrize(
    ("words", "wrong", "rule"),
    [
        (("optim.lr=1,2", "sweep.zip=[optim.lr,optim.eps]"), {"sweep.zip": "optim.eps"}, "has no list"),
        (("optim.lr=1,2", "train.seed=1,2,3", "sweep.zip=[optim.lr,train.seed]"), None, "lr has 2, train.seed has 3"),
        (("train.seed=1,2", "sweep.seeds=3"), {"sweep.seeds": 3}, "train.seed is swept too"),
        (("run.dir=a,b",), {"run.dir": "a,b"}, "cannot be swept"),
        (("sweep.seeds=1,2",), {"sweep.seeds": "1,2"}, "cannot be swept"),
    ],
)  # fmt: skip
def test_grids_that_make_no_sense_are_told(words, wrong, rule):
    [job] = grid(*words)
    assert [misfit.rule for misfit in job.misfits if rule in misfit.rule]
    assert wrong is None or told(job) == wrong


def test_jobs_that_share_a_base_are_what_they_would_be_alone(folder: Path):
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nmodel:\n  width: 64\nparams:\n  lr_scale: {embedding: 0.5}\n"
    )
    words = (
        "experiment=mine",
        "train.epochs=2,null",
        "+params.lr_scale.head=1,2",
        "optim=sgd,adam",
        "eval.metrics=[accuracy],null",
    )
    words += ("run.name=${hydra.job.override_dirname}", "train.batch_size=${model.heads}")
    jobs = grid(*words, folder=folder)
    assert len(jobs) == 16
    for job in jobs:
        alone = one(*job.overrides, folder=folder)
        assert (job.values, job.choices, job.misfits) == (alone.values, alone.choices, alone.misfits)


def test_what_is_wrong_in_one_job_of_a_grid_is_told_there():
    jobs = grid("train.seed=range(40)", "optim.lr=1e-3,oops,'${nowhere}'")
    assert len(jobs) == 120
    assert [told(job) for job in jobs[:3]] == [{}, {}, {"optim.lr": "${nowhere}"}]
    assert told(grid("optim.lr=1,'${oc.env:HOME}'")[1]) == {"optim.lr": "${oc.env:HOME}"}


def test_a_mistyped_setting_of_a_search_is_guessed():
    prepare(None)
    words = ["hydra/sweeper=optuna", "optim.lr=1e-3", "hydra.sweeper.n_trialz=3"]
    [misfit] = compose_jobs("config", words, multirun=False)[0].misfits
    assert (misfit.key, misfit.suggestion) == ("hydra.sweeper.n_trialz", "hydra.sweeper.n_trials")
