from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Said

from llmtrain.compose import OURS, compose_jobs, config_folder, prepare
from llmtrain.inert import check_searchpath
from llmtrain.knobs import ConfigError

SECRET = "s3cr3t-of-the-environment"

# What a stranger's YAML may try, with the key and the reason that it is refused for. {marker} is a file that
# appears if anything of it has run, {package} a package whose import makes that file.
CODE = "never names code to import"
ENVIRONMENT = "set the environment in the shell instead"
READS = "could read the environment and is refused"
LOGGING = "logging set up by one can run code"
EVIL = {
    "callback": (
        "hydra: {callbacks: {x: {_target_: subprocess.call, args: [touch, {marker}]}}}",
        "hydra.callbacks.x._target_",
        "callbacks would run code",
    ),
    "callback in disguise": (
        "hydra: {callbacks: '${unless:{x:{_target_:{package}.run}}}'}",
        "hydra.callbacks",
        "callbacks would run code",
    ),
    "callback elsewhere": (
        "hydra: {callbacks: '${x}'}\nx: {a: {_target_: {package}.run}}",
        "hydra.callbacks",
        "callbacks would run code",
    ),
    "target": ("optim: {_target_: {package}.run}", "optim._target_", CODE),
    "target in a list": ("x: [1, {_target_: {package}.run}]", "x[1]._target_", CODE),
    "launcher": ("hydra: {launcher: {_target_: {package}.run}}", "hydra.launcher._target_", CODE),
    "sweeper": ("hydra: {sweeper: {params: {a: {_target_: {package}.run}}}}", "hydra.sweeper.params.a._target_", CODE),
    "sweeper in disguise": (
        "hydra: {sweeper: {params: '${unless:{a:{_target_:{package}.run}}}'}}",
        "hydra.sweeper.params",
        CODE,
    ),
    "hydra's logging": (
        "hydra: {hydra_logging: {root: {level: INFO}, handlers: {h: {'()': {package}.run}}}}",
        "hydra.hydra_logging",
        LOGGING,
    ),
    "the job's logging": (
        "hydra: {job_logging: {root: {level: INFO}, formatters: {f: {class: {package}.run}}}}",
        "hydra.job_logging",
        LOGGING,
    ),
    "set": ("hydra: {job: {env_set: {LLMTRAIN_MADE: '1'}}}", "hydra.job.env_set.LLMTRAIN_MADE", ENVIRONMENT),
    "copy": ("hydra: {job: {env_copy: [LLMTRAIN_SECRET]}}", "hydra.job.env_copy[0]", ENVIRONMENT),
    "copy of nothing": ("hydra: {job: {env_copy: [LLMTRAIN_NOTHING]}}", "hydra.job.env_copy", "copies no environment"),
    "read": ("run: {name: '${oc.env:LLMTRAIN_SECRET}'}", "run.name", READS),
    "read with a default": ("run: {name: 'a-${ oc.env :LLMTRAIN_SECRET,b}'}", "run.name", READS),
    "read within": ("run: {name: '${unless:${oc.env:LLMTRAIN_SECRET},${run.dir}}'}", "run.name", READS),
    "read by a composed name": (
        "run: {name: '${oc.${sample.prompt}:LLMTRAIN_SECRET}'}\nsample: {prompt: env}",
        "run.name",
        READS,
    ),
    "read by a composed text": (
        "run: {name: '$', dir: \"${oc.create:'a: ${run.name}{oc.env:LLMTRAIN_SECRET}'}\"}",
        "run.dir",
        READS,
    ),
    "read by decoding": ("run: {name: '${oc.decode:x}'}", "run.name", READS),
    "read for help": ("hydra: {help: {header: '${oc.env:LLMTRAIN_SECRET}'}}", "hydra.help.header", READS),
    "read for a folder": ("hydra: {sweep: {dir: '${oc.env:LLMTRAIN_SECRET}'}}", "hydra.sweep.dir", READS),
}
PRIMARY_ONLY = {
    "package": ("hydra: {searchpath: ['pkg://{package}']}", "hydra.searchpath", "no packages to import"),
    "package after a folder": (
        "hydra: {searchpath: ['file:///tmp', 'pkg://{package}.conf']}",
        "hydra.searchpath",
        "no packages to import",
    ),
    "package elsewhere": (
        "hydra: {searchpath: '${x}'}\nx: ['pkg://{package}']",
        "hydra.searchpath",
        "no packages to import",
    ),
    "package by the environment": (
        "hydra: {searchpath: ['pkg://${oc.env:LLMTRAIN_SECRET}']}",
        "config",
        "does not read the environment",
    ),
}
EVIL_DEFAULTS = {
    "option": "defaults: [config, {override optim: '${oc.env:LLMTRAIN_SECRET}'}, _self_]\n",
    "config": "defaults: [config, '${oc.env:LLMTRAIN_SECRET}', _self_]\n",
}
MINE, THEIRS = "mine.yaml", "experiment/theirs.yaml"
WAYS = [(), ("-m",), ("--cfg", "job"), ("--cfg", "all", "--resolve"), ("--info",), ("--help",), ("-sc", "query=bash")]


@pytest.fixture
def stranger(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `llmtrain train` with a stranger's config; proves that it ran nothing, read nothing and wrote nothing."""
    marker, configs = tmp_path / "marker", tmp_path / "configs"
    (configs / "experiment").mkdir(parents=True)
    (tmp_path / "evil_package").mkdir()
    touch = f"open({str(marker)!r}, 'w').close()\n"
    (tmp_path / "evil_package" / "__init__.py").write_text(touch + f"def run(**knobs): {touch}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LLMTRAIN_SECRET", SECRET)
    monkeypatch.setattr("llmtrain.run.train", lambda *args: pytest.fail("a run was started"))

    def run(files: dict[str, str], *args: str) -> Said:
        for file, text in files.items():
            (configs / file).write_text(text.replace("{marker}", str(marker)).replace("{package}", "evil_package"))
        said = call("train", "--config-dir", str(configs), *args)
        assert not marker.exists()
        assert "LLMTRAIN_MADE" not in os.environ
        assert SECRET not in said.out + said.err
        assert "Traceback" not in said.err
        assert list(said.cwd.iterdir()) == []
        return said

    return run


def is_refused(said: Said, key: str, reason: str) -> None:
    assert said.code == 2
    assert said.out == ""
    lines = said.err.splitlines()
    [line] = [i for i, text in enumerate(lines) if text.startswith(f"  {key} = ")]
    assert reason in lines[line + 1]


@pytest.mark.parametrize("evil", EVIL)
def test_a_strangers_experiment_is_refused_with_the_reason(stranger, evil: str):
    text, key, reason = EVIL[evil]
    is_refused(stranger({THEIRS: f"# @package _global_\n{text}\n"}, "experiment=theirs"), key, reason)


@pytest.mark.parametrize("evil", EVIL | PRIMARY_ONLY)
def test_a_strangers_primary_config_is_refused_with_the_reason(stranger, evil: str):
    text, key, reason = (EVIL | PRIMARY_ONLY)[evil]
    is_refused(stranger({MINE: f"defaults: [config, _self_]\n{text}\n"}, "--config-name", "mine"), key, reason)


@pytest.mark.parametrize("evil", ["callback", "hydra's logging", "read for help", "package"])
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_it_is_refused_whichever_way_it_is_looked_at(stranger, evil: str, way: tuple[str, ...]):
    text, key, reason = (EVIL | PRIMARY_ONLY)[evil]
    said = stranger({MINE: f"defaults: [config, _self_]\n{text}\n"}, "--config-name", "mine", *way)
    if "-sc" in way:  # a report has no place in a line that is being typed
        assert said.out == ""
    else:
        is_refused(said, key, reason)


@pytest.mark.parametrize("evil", EVIL_DEFAULTS)
def test_a_defaults_list_does_not_read_the_environment_either(stranger, evil: str):
    said = stranger({MINE: EVIL_DEFAULTS[evil]}, "--config-name", "mine")
    assert said.code == 2
    assert "${oc.env:LLMTRAIN_SECRET}" in said.err


def test_an_experiment_cannot_add_a_search_path(stranger):
    said = stranger({THEIRS: f"# @package _global_\n{PRIMARY_ONLY['package'][0]}\n"}, "experiment=theirs")
    is_refused(said, "config", "Overriding hydra.searchpath is only supported from the primary config")


def test_a_default_that_the_grid_replaces_is_refused_as_well(stranger):
    files = {
        THEIRS: "# @package _global_\nhydra: {callbacks: {x: {_target_: os.getcwd}}}\n",
        "experiment/harmless.yaml": "# @package _global_\ntrain: {steps: 1}\n",
        MINE: "defaults: [config, {override experiment: theirs}, _self_]\n",
    }
    said = stranger(files, "--config-name", "mine", "-m", "experiment=harmless,null")
    is_refused(said, "hydra.callbacks.x._target_", "callbacks would run code")


def test_a_grid_that_a_config_asks_for_is_looked_through(stranger):
    files = {
        THEIRS: "# @package _global_\nhydra: {job: {env_set: {LLMTRAIN_MADE: '1'}}}\n",
        MINE: "defaults: [config, _self_]\nhydra: {sweeper: {params: {experiment: 'null,theirs'}}}\n",
    }
    is_refused(stranger(files, "--config-name", "mine", "-m"), "hydra.job.env_set.LLMTRAIN_MADE", ENVIRONMENT)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.searchpath=[pkg://evil_package]",
        "+hydra.callbacks.x._target_=evil_package.run",
        "+optim._target_=evil_package.run",
        "run.name=${oc.env:LLMTRAIN_SECRET}",
        "+hydra.job.env_set.LLMTRAIN_MADE=1",
    ],
)
def test_the_command_line_is_held_to_the_same(stranger, override: str):
    said = stranger({}, override)
    assert said.code == 2
    assert "one thing is wrong" in said.err  # not told again where Hydra repeats the command line


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {searchpath: ['file://{marker}.d']}",
        "run: {name: 'a-${train.seed}-${model.width}'}",
        "run: {name: 'a-${now:%Y}'}",
        "train: {steps: '${unless:5,${.epochs}}'}",
        "sample: {prompt: 'costs $5, {really}: env'}",
        "hydra: {sweep: {dir: '${run.dir}/here'}, sweeper: {params: {train.seed: '1,2'}}}",
    ],
)
def test_what_is_data_is_not_refused(tmp_path: Path, text: str):
    (tmp_path / "x.d").mkdir()
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\n" + text.replace("{marker}", str(tmp_path / "x")))
    prepare(str(tmp_path))
    try:
        [job] = compose_jobs("mine", [], multirun=False)
    finally:
        prepare(None)
    assert job.misfits == []
    assert job.values is not None


@pytest.mark.parametrize("choice", ["default", "disabled", "none", "stdout"])
def test_the_ways_of_logging_that_come_with_hydra_may_be_chosen(choice: str):
    prepare(None)
    [job] = compose_jobs("config", [f"hydra/job_logging={choice}"], multirun=False)
    assert job.misfits == []


def test_our_own_config_names_no_places_to_search():
    """So composing need not read it first to look for them."""
    assert "searchpath" not in (config_folder() / f"{OURS}.yaml").read_text()


def test_folders_may_be_searched_and_nothing_else():
    check_searchpath(["file:///a", "/b", "c"])
    for place in ("pkg://a", "structured://", "http://a"):
        with pytest.raises(ConfigError) as caught:
            check_searchpath(["file:///a", place])
        assert [m.key for m in caught.value.misfits] == ["hydra.searchpath"]
