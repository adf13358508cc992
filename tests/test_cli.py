from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from conftest import Said

from llmtrain import __version__, cli
from llmtrain.build import GROUPS, parts
from llmtrain.cli import COMMANDS
from llmtrain.config import SECTIONS
from llmtrain.topics import options

OPTIMS = ", ".join(options("optim"))

# A run that takes no time, on text and in folders of its own.
TINY = (
    "data=text",
    "data.path=text.txt",
    "tokenizer=byte",
    "run.cache=cache",
    "model.layers=1",
    "model.width=8",
    "model.heads=1",
    "model.context=8",
    "train.steps=1",
    "train.batch_size=2",
    "train.threads=1",
    "sample.tokens=0",
    "log.tensorboard=false",
)


@pytest.fixture
def refused(call, monkeypatch: pytest.MonkeyPatch):
    """Runs `llmtrain ARGS`, which must end in one report of misfits with nothing started, written or shown."""
    monkeypatch.setattr("llmtrain.run.train", lambda *args: pytest.fail("a run was started"))

    def run(*args: str) -> dict[str, tuple[str, str]]:
        before = list(Path.cwd().rglob("*"))
        said = call(*args)
        assert (said.code, said.out) == (2, "")
        assert list(Path.cwd().rglob("*")) == before
        return misfits(said)

    return run


def misfits(said: Said) -> dict[str, tuple[str, str]]:
    """Key, value and rule of each misfit in a report, held to its form."""
    head, blank, *lines = said.err.splitlines()
    count = re.fullmatch(
        r"llmtrain \w+: (one thing is|(\d+) things are) wrong(?: with the config; nothing was started)?", head
    )
    assert count is not None, said.err
    assert blank == ""
    pairs = zip(lines[::2], lines[1::2], strict=True)
    found = [
        (*re.fullmatch(r"  (\S.*?) = (.*)", first).groups(), second.removeprefix("      ")) for first, second in pairs
    ]
    assert len(found) == int(count[2] or 1)
    assert all(rule.strip() for _, _, rule in found)
    told = {key: (value, rule) for key, value, rule in found}
    assert len(told) == len(found)
    return told


def cpu_seconds(*args: str) -> float:
    """CPU time, user and system, of `python ARGS`: the best of three."""

    def once() -> float:
        process = subprocess.Popen([sys.executable, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    return min(once() for _ in range(3))


def imported_by(*args: str) -> set[str]:
    """The modules that `llmtrain ARGS` has loaded when it ends."""
    code = "import sys; from llmtrain.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


# Help, and what it costs


@pytest.mark.parametrize("args", [("--help",), ("-h",), ("help",), ()], ids=" ".join)
def test_help_lists_each_command_on_a_line(call, args: tuple[str, ...]):
    said = call(*args)
    assert (said.code, said.err) == (0, "")
    lines = re.findall(r"^  (\w+) +(\S.*)$", said.out, re.M)
    assert [name for name, _ in lines] == list(COMMANDS)
    for name, text in lines:
        _, purpose, words = COMMANDS[name]
        assert re.fullmatch(rf"{re.escape(purpose)}: +llmtrain {name} {re.escape(words)}", text)


def test_version(call):
    assert call("--version").out == f"llmtrain {__version__}\n"


def test_libraries_are_told_what_the_user_has_not(monkeypatch: pytest.MonkeyPatch):
    names = ("GOMP_SPINCOUNT", "PYDANTIC_DISABLE_PLUGINS")
    for name in (*names, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "of the user")  # so that all is put back
        monkeypatch.delenv(name)
    cli.tell_libraries()
    assert [os.environ[name] for name in names] == ["10000", "__all__"]
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "")
    cli.tell_libraries()
    assert os.environ["PYDANTIC_DISABLE_PLUGINS"] == ""


def test_a_misspelt_command_gets_a_hint(call):
    said = call("trian", "optim=sgd")
    assert (said.code, said.out) == (2, "")
    assert said.err == f"llmtrain: no command 'trian'; there are {', '.join(COMMANDS)}. Did you mean train?\n"


def test_help_and_config_are_cheap():
    assert cpu_seconds("-m", "llmtrain", "--help") < cpu_seconds("-c", "import hydra")
    assert cpu_seconds("-m", "llmtrain", "train", "--cfg", "job") < cpu_seconds("-c", "import torch")


@pytest.mark.parametrize(
    ("args", "loads"),
    [
        (("--help",), set()),
        (("train", "--cfg", "job"), {"hydra", "pydantic"}),
        (("train", "--help"), {"hydra"}),
        (("train", "--info", "searchpath"), {"hydra"}),
        (("train", "optim.lr=-1", "--cfg", "job"), {"hydra"}),
        (("explain",), {"rich"}),
        (("explain", "optim.lr"), {"rich"}),
        (("explain", "model=gpt_nano"), {"rich"}),
        (("explain", "experiment=gpt2"), {"rich"}),
        (("eval", "--help"), {"rich"}),
        (("generate", "run=nowhere", "--cfg", "job"), {"hydra"}),
        (("train", "run.name=../x"), {"hydra", "torch"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_only_what_computes_waits_for_torch(args: tuple[str, ...], loads: set[str]):
    modules = imported_by(*args)
    assert loads <= modules
    assert ("torch" in modules) == ("torch" in loads)
    assert loads or not {"hydra", "pydantic", "rich", "yaml", "numpy"}.intersection(modules)


# What Hydra gives


def test_cfg_shows_the_config_with_flags_anywhere_among_overrides(call):
    for args in (
        ("--cfg", "job", "train.seed=3", "optim.lr=4"),
        ("train.seed=3", "--cfg", "job", "optim.lr=4"),
        ("train.seed=3", "optim.lr=4", "--cfg", "job"),
        ("-c", "job", "train.seed=3", "optim.lr=4"),
        ("train.seed=3", "--cfg=job", "optimizer.lr=4"),
    ):
        said = call("train", *args)
        assert (said.code, said.err) == (0, "")
        assert "  seed: 3\n" in said.out
        assert "  lr: 4\n" in said.out
        assert [key for key in (*GROUPS, *SECTIONS, "resume") if not re.search(rf"^{key}:", said.out, re.M)] == []
        assert not re.search("^hydra:", said.out, re.M)
        assert list(said.cwd.iterdir()) == []


def test_cfg_shows_hydra_all_a_package_and_resolved_values(call):
    assert call("train", "--cfg", "hydra").out.startswith("hydra:\n  run:\n")
    everything = call("train", "--cfg", "all").out
    assert re.search("^hydra:", everything, re.M)
    assert re.search("^optim:", everything, re.M)
    package = call("train", "--cfg", "job", "--package", "optim", "model.width=768", "--resolve")
    assert package.out.startswith("# @package optim\nname: adam\nlr: 0.0005\n")
    nothing = call("train", "--cfg", "job", "-p", "nothing")
    assert (nothing.code, nothing.out) == (2, "")
    assert "'nothing' not found" in nothing.err


def test_optimizer_is_taken_for_optim(call):
    said = call("train", "optimizer=sgd", "optimizer.lr=0.25", "--cfg", "job", "-p", "optim")
    assert said.out == "# @package optim\nname: sgd\nlr: 0.25\nmomentum: 0.9\ndampening: 0.0\nnesterov: false\n"


def test_experiment_config_name_and_config_dir_are_taken(call, tmp_path: Path):
    assert "name: adamw" in call("train", "experiment=gpt2", "--cfg", "job", "-p", "optim").out
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\ntrain: {steps: 77}\n")
    for flags in (("--config-dir", str(tmp_path), "--config-name", "mine"), ("-cd", str(tmp_path), "-cn", "mine")):
        assert "  steps: 77\n" in call("train", *flags, "--cfg", "job").out
    assert "  steps: 77\n" in call("train", f"--config-dir={tmp_path}", "--config-name=mine", "--cfg", "job").out


def test_info_tells_what_is_asked_for(run_cli):
    everything = run_cli("train", "--info")
    assert everything.returncode == 0
    assert "Installed Hydra Plugins" in everything.stdout
    defaults = run_cli("train", "--info", "defaults", "optim=sgd")
    assert defaults.returncode == 0
    assert "optim/sgd" in defaults.stdout
    assert "Installed Hydra Plugins" not in defaults.stdout


def test_help_of_train_shows_groups_config_and_flags(call):
    said = call("train", "--help", "optim=sgd")
    assert said.code == 0
    assert re.search(rf"^optim: {OPTIMS}$", said.out, re.M)
    assert "momentum: 0.9" in said.out
    assert "--trust" in said.out
    assert call("train", "--hydra-help").code == 0


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path):
    for args in (["explain", "--markdown"], ["train", "--info"]):
        command = [sys.executable, "-m", "llmtrain", *args]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=60)
        assert b"Traceback" not in err


def test_a_grid_trains_each_of_its_jobs(call):
    Path("text.txt").write_text("abc\n" * 100)
    said = call("train", *TINY, "-m", "optimizer=adam,sgd", "train.seed=1,2", "run.dir=out")
    assert said.code == 0, said.err
    [sweep] = Path("out").iterdir()
    jobs = {}
    for place in (path.parent for path in sweep.glob("*/result.json")):
        assert json.loads((place / "result.json").read_text())["status"] == "finished"
        came = (place / "overrides.yaml").read_text()
        jobs[re.sub("-[0-9a-f]{8}$", "", place.name)] = (
            re.search(r"optim: (\w+)", came)[1],
            re.search(r"train\.seed=(\d)", came)[1],
        )
    assert jobs == {f"optim={o},seed={s}": (o, s) for o in ("adam", "sgd") for s in "12"}
    assert {path.name for path in said.cwd.iterdir()} == {"text.txt", "cache", "out"}


def test_grids_of_a_config_that_a_run_wrote_share_no_folder(call):
    Path("text.txt").write_text("abc\n" * 100)
    assert call("train", *TINY, "run.name=mine").code == 0
    for name in ("first", "second"):
        words = ("run.name=null", "-m", "train.seed=1,2", f"sweep.name={name}")
        said = call("train", "--config-dir", "runs/mine", "--config-name", "config", *words)
        assert said.code == 0, said.err
    found = [path.parent.relative_to("runs").as_posix() for path in Path("runs").rglob("result.json")]
    assert {name.rpartition("-")[0] or name for name in found} == {
        "mine",
        *(f"{sweep}/seed={seed}" for sweep in ("first", "second") for seed in (1, 2)),
    }


def test_a_grid_lies_where_its_runs_lie_also_at_home(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("text.txt").write_text("abc\n" * 100)
    said = call("train", *TINY, "-m", 'run.dir="~/out"')
    assert said.code == 0, said.err
    [sweep] = (tmp_path / "home" / "out").iterdir()
    assert len([*sweep.glob("*/result.json")]) == 1
    assert {path.name for path in said.cwd.iterdir()} == {"text.txt", "cache"}


# Every way to get the config wrong


def test_everything_that_is_wrong_is_in_one_report(refused):
    found = refused(
        "train", "optimizer=adamm", "optim.lrr=1", "optim.beta1=1", "optim.eps=nan", "+zap.x=2", "data=text", "oops",
        "train.batch_size=many", "train.epochs=2", "train.steps=3", "train.compile=blok", "model.width=128",
        "model.heads=7", "precision=fp16", "precision.growth_factor=1", "run.name=../x", "log.every=1,2",
        "schedule.floor=inf",
    )  # fmt: skip
    assert found == {
        "log.every": ("1,2", "several values are a sweep: add -m; for one list write [a,b], for one text quote it"),
        "oops": ("", "cannot be read as KEY=VALUE; quote a value with spaces or brackets: 'KEY=\"...\"'"),
        "optim": ("adamm", f"no such option; there are {OPTIMS}  Did you mean adam?"),
        "optim.lrr": ("1", "no such knob; there are lr, beta1, beta2, eps, amsgrad  Did you mean lr?"),
        "optim.beta1": ("1", "must be number >= 0 and < 1"),
        "optim.eps": ("nan", "must be number > 0"),
        "zap.x": ("2", "no such knob"),
        "train.batch_size": ("many", "must be integer >= 1"),
        "train.compile": ("blok", "must be one of auto, off, block, model  Did you mean block?"),
        "train": (
            "steps=3, epochs=2",
            "a run has exactly one length; give one of train.steps, train.epochs, train.tokens, train.minutes",
        ),
        "data.path": ("(missing)", "has no value; it must be text"),
        "model.heads": ("7", "must divide width=128, or head_dim must be given"),
        "precision.growth_factor": ("1.0", "must be above 1, or the scale never grows"),
        "schedule.floor": ("inf", "must be number >= 0 and < 1"),
        "run.name": (
            "../x",
            "must be a file name: letters, digits and . _ + = , @ -, folders separated by /, none of them ..",
        ),
    }


WRONG = {
    "option": (("optim=adamm",), "optim", "adamm", "Did you mean adam?"),
    "option like no other": (("optim=quux",), "optim", "quux", f"there are {OPTIMS}"),
    "option of another group": (("optim=cosine",), "optim", "cosine", "no such option"),
    "knob": (("optim.beta3=1",), "optim.beta3", "1", "Did you mean beta"),
    "knob added": (("+optim.wd=0.1",), "optim.wd", "0.1", "no such knob"),
    "knob forced": (("++optim.wd=0.1",), "optim.wd", "0.1", "no such knob"),
    "knob of another section": (("train.lr=1",), "train.lr", "1", "Did you mean optim.lr?"),
    "knob of no section": (("lr=1",), "lr", "1", "Did you mean optim.lr?"),
    "section": (("trian.steps=1",), "trian.steps", "1", "Did you mean train.steps?"),
    "section for a value": (("train=5",), "train", "5", "must be a section with"),
    "group in another place": (("optim@x=adam",), "optim@x", "adam", "Did you mean optim?"),
    "deleted knob": (("~optim.lr",), "optim.lr", "(missing)", "has no value; it must be number > 0"),
    "deleted group": (("~optim",), "optim", "(missing)", "has no value"),
    "text for a number": (("optim.lr=fast",), "optim.lr", "fast", "must be number > 0"),
    "nothing for a number": (("optim.lr=",), "optim.lr", "", "must be number > 0"),
    "null for a number": (("optim.lr=null",), "optim.lr", "null", "must be number > 0"),
    "list for a number": (("optim.lr=[1,2]",), "optim.lr", "[1, 2]", "must be number > 0"),
    "dict for a number": (("optim.lr={a:1}",), "optim.lr", "{'a': 1}", "must be number > 0"),
    "true for a number": (("train.seed=true",), "train.seed", "True", "must be integer >= 0"),
    "true for a rate": (("optim.beta1=false",), "optim.beta1", "False", "must be number >= 0 and < 1"),
    "fraction for a count": (("train.steps=1.5",), "train.steps", "1.5", "must be integer >= 1"),
    "text for a bool": (("model.bias=perhaps",), "model.bias", "perhaps", "must be true or false"),
    "choice": (("model.activation=gelu_tan",), "model.activation", "gelu_tan", "Did you mean gelu_tanh?"),
    "negative": (("optim.lr=-1",), "optim.lr", "-1", "must be number > 0"),
    "zero": (("optim.lr=0",), "optim.lr", "0", "must be number > 0"),
    "nan": (("optim.lr=nan",), "optim.lr", "nan", "must be number > 0"),
    "inf": (("optim.lr=inf",), "optim.lr", "inf", "must be number > 0"),
    "minus inf": (("regularization.l1=-inf",), "regularization.l1", "-inf", "must be number >= 0"),
    "beta of 1": (("optim.beta1=1",), "optim.beta1", "1", "must be number >= 0 and < 1"),
    "huge": (("train.seed=99999999999999999999",), "train.seed", "99999999999999999999", "fit in 64 bits"),
    "missing": (("data=text",), "data.path", "(missing)", "has no value; it must be text"),
    "no file": (("data=text", "data.path=nowhere"), "data.path", "nowhere", "no such file, folder or glob"),
    "no tokenizer": (("tokenizer=file", "tokenizer.path=nowhere"), "tokenizer.path", "nowhere", "holds no tokenizer"),
    "heads": (("model.width=100", "model.heads=3"), "model.heads", "3", "must divide width=100"),
    "context": (("model.context=128", "data.context=256"), "model.context", "128", "is shorter than the samples"),
    "two lengths": (("train.steps=3", "train.tokens=4"), "train", "steps=3, tokens=4", "exactly one length"),
    "no length": (("train.steps=null",), "train", "none", "exactly one length"),
    "batch": (("train.batch_size=16", "train.accumulate=3"), "train.batch_size", "16", "must be a multiple of"),
    "decays": (("optim=adamw", "regularization=weight_decay"), "optim.weight_decay", "0.1", "set one of them to 0"),
    "nesterov": (("optim=sgd", "optim.nesterov=true", "optim.momentum=0"), "optim.nesterov", "True", "momentum > 0"),
    "vocabulary": (("tokenizer.vocab_size=100",), "tokenizer.vocab_size", "100", "must be >= 257"),
    "name upwards": (("run.name=../x",), "run.name", "../x", "must be a file name"),
    "name upwards inside": (("run.name=a/../../x",), "run.name", "a/../../x", "must be a file name"),
    "name from the root": (("run.name=/abs",), "run.name", "/abs", "must be a file name"),
    "name of home": (("run.name='~'",), "run.name", "~", "must be a file name"),
    "name of a dot": (("run.name=.",), "run.name", ".", "must be a file name"),
    "no name": (("run.name=''",), "run.name", "", "must be a file name"),
    "name with a line": (("run.name='a\nb'",), "run.name", "a\\nb", "must be a file name"),
    "name that is long": (("run.name=" + "x" * 300,), "run.name", "x" * 300, "is too long"),
    "folder that is long": (("run.dir=" + "x" * 300, "run.name=x"), "run.dir", "x" * 300, "File name too long"),
    "resume without a name": (("resume=auto",), "resume", "auto", "needs run.name"),
    "resume from nowhere": (("resume=nowhere",), "resume", "nowhere", "must be never, auto, or the path"),
    "sweep": (("optim.lr=1e-3,1e-4",), "optim.lr", "1e-3,1e-4", "add -m"),
    "no value": (("optim.lr",), "optim.lr", "", "cannot be read as KEY=VALUE"),
    "no key": (("=3",), "=3", "3", "has no key"),
    "loop": (("model.layers=${model.layers}",), "model.layers", "${model.layers}", "cannot be resolved"),
    "reference": (("model.layers=${model.depth}",), "model.layers", "${model.depth}", "cannot be resolved"),
    "part from outside": (("optim.name=os.system",), "optim.name", "os.system", "no such part in llmtrain.optim"),
    "code from outside": (("optim.name='os:system'",), "optim.name", "os:system", "runs only with --trust os"),
    "no config": (("--config-name", "confg"), "config", "confg", "no such config"),
    "no config folder": (("--config-dir", "nowhere"), "--config-dir", "nowhere", "no such folder"),
    "a rerun": (("--experimental-rerun", "x.pickle"), "--experimental-rerun", "x.pickle", "can run code"),
    "another config path": (("--config-path", "x"), "--config-path", "x", "add a folder of your own with --config-dir"),
    "two ways": (("-m", "--cfg", "job"), "--multirun", "--cfg", "only one of them at a time"),
    "two other ways": (("--run", "-m"), "--run", "--multirun", "only one of them at a time"),
    "resolve nothing": (("--resolve",), "--resolve", "true", "goes with --cfg or --help"),
    "of a grid": (("-m", "optim.lr=1,-1"), "optim.lr", "-1", "must be number > 0"),
    "of a grid of options": (("-m", "optim=sgd,adamm"), "optim", "adamm", "Did you mean adam?"),
    "of a grid of models": (("-m", "model.width=128", "model.heads=2,3"), "model.heads", "3", "must divide width=128"),
    "of a grid without steps": (("-m", "optim.lr=interval(1,2)"), "optim.lr", "interval(1,2)", "write range(A,B,STEP)"),
    "one name for a grid": (("-m", "train.seed=1,2", "run.name=x"), "run.name", "x", "is the same in several jobs"),
}  # fmt: skip
NO_TF32 = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_is_told_with_key_value_and_rule(refused, wrong: str):
    args, key, value, rule = WRONG[wrong]
    found = refused("train", *args)
    assert list(found) == [key]
    assert found[key][0] == value
    assert rule in found[key][1]


@pytest.mark.skipif(not NO_TF32, reason="this machine has tf32")
def test_a_precision_that_the_device_lacks_is_told(refused):
    found = refused("train", "precision=tf32")
    assert list(found) == ["precision.name"]
    assert "NVIDIA GPU from Ampere on" in found["precision.name"][1]


def test_the_report_of_a_grid_covers_every_job(refused):
    found = refused(
        "train", "-m", "optim.lr=-1,1", "model.width=128", "model.heads=3,4", "loss.temperature=0,1", "log.every=0"
    )
    assert set(found) == {"optim.lr", "model.heads", "loss.temperature", "log.every"}


def test_a_name_that_holds_a_run_or_leads_away_is_told(refused, tmp_path: Path):
    (tmp_path / "cwd" / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "cwd" / "runs" / "mine" / "config.yaml").touch()
    (tmp_path / "away").mkdir()
    (tmp_path / "cwd" / "runs" / "link").symlink_to(tmp_path / "away")
    assert "holds a run already; resume=auto goes on with it" in refused("train", "run.name=mine")["run.name"][1]
    for name in ("link", "link/x"):
        assert "leads out of runs through a link" in refused("train", f"run.name={name}")["run.name"][1]
    assert list((tmp_path / "away").iterdir()) == []


@pytest.mark.parametrize(
    ("yaml", "key", "value"),
    [
        ('run: {name: "a\\0b"}', "run.name", "a\\x00b"),
        ('run: {name: "a\\e[2Jb"}', "run.name", "a\\x1b[2Jb"),
        ('run: {name: x, dir: "a\\0b"}', "run.dir", "a\\x00b"),
        ('resume: "a\\0b"', "resume", "a\\x00b"),
        ("run: {dir: mine.yaml, name: x}", "run.dir", "mine.yaml"),
        ("3: 4", "3", "4"),
        ("optim: null", "optim", "null"),
        ('"\\e[2J": 1', "\\x1b[2J", "1"),
    ],
)
def test_odd_values_of_yaml_files_are_told_without_steering_the_terminal(refused, yaml: str, key: str, value: str):
    Path("mine.yaml").write_text(f"defaults: [config, _self_]\n{yaml}\n")
    found = refused("train", "--config-dir", ".", "--config-name", "mine")
    assert list(found) == [key]
    assert found[key][0] == value


def test_broken_yaml_is_told_with_file_and_line(refused):
    Path("optim").mkdir()
    Path("optim/mine.yaml").write_text("name: sgd\nlr: {1\n")
    [(key, (value, rule))] = refused("train", "--config-dir", ".", "optim=mine").items()
    assert key == f"{Path.cwd()}/optim/mine.yaml:3:1"
    assert "but got '<stream end>'" in value
    assert rule == "is not valid YAML"


@pytest.mark.parametrize("way", [("--cfg", "job"), ("--cfg", "all"), ("--info",)], ids=" ".join)
def test_a_config_is_shown_only_when_it_could_be_trained(refused, way: tuple[str, ...]):
    assert set(refused("train", "seed=3", *way, "x=4", "optim.lr=-1")) == {"seed", "x", "optim.lr"}


def test_an_unknown_flag_shows_the_known_ones(call):
    said = call("train", "--nonsense")
    assert said.code == 2
    assert "unrecognized arguments: --nonsense" in said.err
    assert "Traceback" not in said.err


def test_a_mistake_in_the_data_is_not_held_against_the_model(tmp_path, refused):
    (tmp_path / "t.csv").write_text("a,y\n1,x\n2,z\n")
    words = (
        "data=table",
        f"data.path={tmp_path / 't.csv'}",
        "data.label_column=yy",
        "model=mlp",
        "task=classification",
    )
    assert set(refused("train", *words)) == {"data.label_column"}
    assert set(refused("train", "model=mlp", "task=causal_lm")) == {"model.name"}


def test_the_other_commands_report_alike(refused):
    assert refused("eval") == {"run": ("(missing)", "has no value; it must be text")}
    assert refused("eval", "rum=x", "batches=0", "checkpoint=null") == {
        "run": ("(missing)", "has no value; it must be text"),
        "rum": (
            "x",
            "no such knob; there are run, checkpoint, batches, batch_size, split, metrics, device  Did you mean run?",
        ),
        "batches": ("0", "must be integer >= 1 or null"),
        "checkpoint": ("null", "must be text"),
    }
    assert set(refused("generate", "run=x", "temperature=-1", "top_p=0", "tokens=1,2")) == {
        "temperature", "top_p", "tokens",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_run_that_is_not_there_is_told(call, command: str):
    said = call(command, "run=nowhere")
    assert (said.code, said.out) == (2, "")
    assert said.err == f"llmtrain {command}: run=nowhere: no such folder\n"
    assert list(said.cwd.iterdir()) == []


def test_a_mistake_ends_a_real_process_cleanly(run_cli, tmp_path: Path):
    done = run_cli("generate", "temperature=-1", "rum=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert set(misfits(Said(2, "", done.stderr, tmp_path))) == {"temperature", "rum", "run"}
    assert list(tmp_path.iterdir()) == []


# Code of one's own


@pytest.fixture
def package(call) -> str:
    """A package in the working directory with an optimizer of its own, and its YAML in `conf`; its name."""
    name = f"own_{uuid.uuid4().hex}"
    Path(name).mkdir()
    Path(name, "__init__.py").touch()
    source = f"""
        import pathlib
        import torch
        from llmtrain.knobs import Fraction, Positive

        pathlib.Path("{name}", "ran").touch()

        def sophia(params, *, lr: Positive, rho: Fraction):
            '''Steps of my own.

            Args:
                lr: Step size. Raise: faster. Lower: slower.
                rho: Share that goes on. Raise: smoother. Lower: rougher.
            '''
            return torch.optim.SGD(params, lr=lr, momentum=rho)
    """
    Path(name, "parts.py").write_text(dedent(source))
    Path("conf/optim").mkdir(parents=True)
    Path("conf/optim/sophia.yaml").write_text(f"name: {name}.parts:sophia\nlr: 0.1\nrho: 0.9\n")
    Path("text.txt").write_text("abc\n" * 100)
    return name


def test_a_part_of_ones_own_is_refused_until_it_is_trusted(call, package: str):
    for flags in ((), ("--trust", "other"), ("-m",), ("--cfg", "job")):
        said = call("train", *TINY, "--config-dir", "conf", "optim=sophia", *flags)
        assert said.code == 2
        rule = f"is code from outside; it runs only with --trust {package}"
        assert misfits(said) == {"optim.name": (f"{package}.parts:sophia", rule)}
    assert not Path(package, "ran").exists()
    assert package not in sys.modules


@pytest.mark.parametrize("grid", [False, True])
def test_a_part_of_ones_own_trains_once_it_is_trusted(call, package: str, grid: bool):
    more = ("-m", "optimizer.rho=0.1,0.2") if grid else ("optim.rho=0.1", "run.name=mine")
    said = call("train", *TINY, "--config-dir", "conf", f"--trust={package}", "optim=sophia", *more)
    assert said.code == 0, said.err
    results = sorted(Path("runs").rglob("result.json"))
    assert [json.loads(path.read_text())["status"] for path in results] == ["finished"] * (2 if grid else 1)
    assert f"name: {package}.parts:sophia" in (results[0].parent / "config.yaml").read_text()


def test_the_knobs_of_a_trusted_part_are_checked_like_all_others(call, package: str):
    given = ("--config-dir", "conf", "--trust", package, "optim=sophia", "optim.rho=1", "optim.row=2")
    said = call("train", *TINY, *given)
    assert misfits(said) == {
        "optim.rho": ("1", "must be number >= 0 and < 1"),
        "optim.row": ("2", "no such knob; there are lr, rho  Did you mean rho?"),
    }


def test_the_working_directory_holds_no_code_unless_something_is_trusted(call, package: str):
    call("train", "--cfg", "job")
    assert str(Path.cwd()) not in sys.path
    call("train", "--cfg", "job", "--trust", package)
    assert sys.path[0] == str(Path.cwd())


# Tab completion


@pytest.fixture
def complete(call, monkeypatch: pytest.MonkeyPatch):
    """What the shell is offered for a line."""

    def ask(line: str, shell: str = "bash", *args: str) -> set[str]:
        monkeypatch.setenv("COMP_LINE", line)
        said = call("-sc", f"query={shell}", *args)
        assert (said.code, said.err) == (0, "")
        return set(said.out.split("\n") if shell == "fish" else said.out.split()) - {""}

    return ask


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("llmtrain ", set(COMMANDS)),
        ("llmtrain tr", {"train"}),
        ("llmtrain train optim.l", {"optim.lr="}),
        ("llmtrain train optimizer.l", {"optimizer.lr="}),
        ("llmtrain train optimizer=sgd optimizer.mom", {"optimizer.momentum="}),
        ("llmtrain  train  optim=sgd  optim.mom", {"optim.momentum="}),
        ("llmtrain train weight_decay_schedule=li", {"weight_decay_schedule=linear"}),
        ("llmtrain train batch_schedule=step batch_schedule.ga", {"batch_schedule.gamma="}),
        ("llmtrain train -m optim=ad", {f"optim={name}" for name in options("optim") if name.startswith("ad")}),
        ("llmtrain train --trust own optim.l", {"optim.lr="}),
        (
            "llmtrain train experiment=",
            {f"experiment={name}" for name in options("experiment")},
        ),
        ("llmtrain eval check", {"checkpoint="}),
        ("llmtrain generate temp", {"temperature="}),
        ("llmtrain explain optim.beta", {"optim.beta1", "optim.beta2"}),
        ("llmtrain explain experiment=s", {f"experiment={name}" for name in options("experiment") if name[0] == "s"}),
        ("llmtrain data ", {"inspect"}),
        ("llmtrain data inspect data=dig", {"data=digits"}),
        ("llmtrain data nothing data=dig", set()),
        ("llmtrain train optim=adamm optim.l", set()),
        ("llmtrain train --confi", set()),
        ("llmtrain train --config-dir ", set()),
        ("llmtrain nothing opt", set()),
    ],
)
def test_tab_completes(complete, line: str, offered: set[str]):
    assert complete(line) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("start", ["llmtrain ", "llmtrain train optimizer=", "llmtrain explain optim="])
def test_tab_completes_in_every_shell(complete, shell: str, start: str):
    options = {f"{start.split()[-1]}{name}" for name in parts("optim")} if "=" in start else set(COMMANDS)
    assert complete(start, shell) == options


def test_tab_completes_the_users_own_options(complete):
    Path("conf/optim").mkdir(parents=True)
    Path("conf/optim/mine.yaml").write_text("name: sgd\nlr: 1\nmomentum: 0\ndampening: 0\nnesterov: false\n")
    assert "optim=mine" in complete("llmtrain train --config-dir conf optim=")
    assert complete("llmtrain train --config-dir conf optim=mine optim.mom") == {"optim.momentum="}
    assert complete("llmtrain train --config-dir nowhere optim=") == set()


@pytest.mark.parametrize(
    ("shell", "script"),
    [
        ("bash", "complete -o nospace -o default -F hydra_bash_completion llmtrain"),
        ("zsh", "complete -o nospace -o default -F hydra_bash_completion llmtrain"),
        ("fish", "complete -c llmtrain -x -a '(hydra_fish_completion)'"),
    ],
)
def test_the_install_script_is_for_llmtrain(call, shell: str, script: str):
    for args in (("train", "-sc", f"install={shell}"), ("-sc", f"install={shell}")):
        said = call(*args)
        assert (said.code, said.err) == (0, "")
        assert script in said.out


def test_a_shell_that_there_is_not_is_told(refused):
    assert "available : bash fish zsh" in refused("train", "-sc", "install=sh")["config"][1]


def test_bash_completes_once_the_script_is_sourced(tmp_path: Path):
    program = tmp_path / "bin" / "llmtrain"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmtrain "$@"\n')
    program.chmod(0o755)
    script = r"""
        eval "$(llmtrain train -sc install=bash)"
        complete -p llmtrain
        tab() {
            COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($COMP_LINE)
            COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=()
            hydra_bash_completion
            echo "$1 -> ${COMPREPLY[*]}"
        }
        tab "llmtrain gen"
        tab "llmtrain train optim.l"
        tab "llmtrain train optimizer=sg"
    """
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "-F hydra_bash_completion llmtrain" in lines[0]
    assert lines[1:] == [
        "llmtrain gen -> generate",
        "llmtrain train optim.l -> optim.lr=",
        "llmtrain train optimizer=sg -> optimizer=sgd",
    ]
