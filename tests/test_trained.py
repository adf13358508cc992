from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made import byte
from runs import llmtrain, steps, tiny, train, write_text
from sklearn import metrics as theirs

from llmtrain.build import SCHEDULES

SETTINGS = ["train.steps=12", "checkpoint.every=4", "checkpoint.keep=9", "eval.every=4", "eval.batches=null"]
PROMPT = ["sample.prompt='the '", "sample.tokens=40", "sample.seed=3", "sample.temperature=1.3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return train(place, *SETTINGS, *PROMPT, "model.dropout=0.1", "run.name=run")


def evaluated(run: Path, place: Path, *more: str) -> dict[str, Any]:
    code, text = llmtrain(["eval", f"run={run}", "device=cpu", *more], place)
    assert code == 0, text
    folder = run if (run / "config.yaml").exists() else run.parent.parent
    record = json.loads((folder / "eval/metrics.json").read_text())
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert f"{record[f'val_{name}']:.6g}" in text
    return record


def generated(run: Path, place: Path, *more: str) -> str:
    words = [word.removeprefix("sample.") for word in PROMPT]
    given = {word.split("=")[0] for word in more}
    words = [word for word in words if word.split("=")[0] not in given]
    code, text = llmtrain(["generate", f"run={run}", "device=cpu", *words, *more], place)
    assert code == 0, text
    return text


def validation(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of each evaluation, by step."""
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): line for line in told if "val_loss" in line}


# -- eval -----------------------------------------------------------------------------------------------------


def test_eval_gives_the_metrics_of_training(run: Path, place: Path) -> None:
    told = validation(run)
    best = min(told, key=lambda step: told[step]["val_loss"])
    for which, step in (("last", 12), ("best", best), ("4", 4), ("8", 8)):
        record = evaluated(run, place, f"checkpoint={which}")
        assert record.pop("checkpoint") == f"step-{step:08d}"
        assert record.pop("batches") is None
        assert record == pytest.approx(told[step], rel=1e-6)
    assert evaluated(run, place)["checkpoint"] == f"step-{best:08d}"
    assert evaluated(run / "checkpoints/step-00000008", place)["checkpoint"] == "step-00000008"


def test_eval_of_any_architecture_and_tokenizer(place: Path) -> None:
    """What no checkpoint holds, such as the angles of rope, must be made anew."""
    for number, words in enumerate(
        [
            ["model.position=rope", "tokenizer=char"],
            ["model.tied_embeddings=false", "model.norm=rmsnorm", "tokenizer=bpe", "tokenizer.vocab_size=300"],
            ["precision=bf16", "model.vocab_multiple=64"],
        ]
    ):
        run = train(place, *SETTINGS, *PROMPT, *words, f"run.name=kind{number}")
        record = evaluated(run, place, "checkpoint=last")
        for name, value in validation(run)[12].items():
            assert record[name] == pytest.approx(value, rel=1e-6)
        sample = json.loads((run / "result.json").read_text())["sample"]
        assert len(sample) > 10
        assert generated(run, place, "checkpoint=last") == f"the {sample}\n"


def test_eval_by_fewer_batches_and_of_another_size(run: Path, place: Path) -> None:
    everything = validation(run)[12]
    assert evaluated(run, place, "checkpoint=last", "batch_size=3")["val_loss"] == pytest.approx(
        everything["val_loss"], rel=1e-6
    )
    few = evaluated(run, place, "checkpoint=last", "batches=2")
    assert few["batches"] == 2
    assert few["val_loss"] != pytest.approx(everything["val_loss"], rel=1e-6)
    assert few == evaluated(run, place, "checkpoint=last", "batches=2")


def test_eval_of_changed_data_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path, "run.name=run")
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("the", "thy"))
    code, told = llmtrain(["eval", f"run={run}"], tmp_path)
    assert code == 2
    assert f"{run}: the data or the tokenizer has changed since this run" in told
    (tmp_path / "text.txt").unlink()
    code, told = llmtrain(["eval", f"run={run}"], tmp_path)
    assert code == 2
    assert "Traceback" not in told
    assert f"{run}/config.yaml: data.path = {tmp_path / 'text.txt'}: is no such file" in told
    assert not (run / "eval").exists()
    generated(run, tmp_path)  # needs no data


# -- generate -------------------------------------------------------------------------------------------------


def test_generate_gives_the_sample_of_training_and_nothing_else(run: Path, place: Path) -> None:
    sample = json.loads((run / "result.json").read_text())["sample"]
    for stream in ("true", "false"):
        assert generated(run, place, "checkpoint=last", f"stream={stream}") == f"the {sample}\n"
    assert generated(run / "checkpoints/step-00000012", place) == f"the {sample}\n"
    assert generated(run, place, "checkpoint=4") != f"the {sample}\n"


def test_generate_takes_the_knobs_of_sample(run: Path, place: Path) -> None:
    assert generated(run, place, "tokens=0") == "the \n"
    assert len(generated(run, place, "tokens=5", "prompt=a b").encode()) >= len("a b\n")
    greedy = [generated(run, place, "temperature=0", f"seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1] == generated(run, place, "top_k=1", "seed=5")
    assert len({generated(run, place, f"seed={seed}") for seed in (1, 2, 3)}) == 3
    assert generated(run, place, "prompt=''", "tokens=3").endswith("\n")


# -- which run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_what_is_no_run_is_told(command: str, run: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints/step-00000012/model.safetensors").write_bytes(b"short")
    bare = shutil.copytree(run, tmp_path / "bare")
    (bare / "config.yaml").unlink()
    odd = shutil.copytree(run, tmp_path / "odd")
    (odd / "config.yaml").write_text((odd / "config.yaml").read_text().replace("layers: 1", "layers: none"))
    other = shutil.copytree(run, tmp_path / "other")
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("layers: 1", "layers: 2"))
    for words, told in (
        ([f"run={tmp_path / 'none'}"], "no such folder"),
        ([f"run={tmp_path / 'empty'}"], "holds no checkpoint"),
        ([f"run={run}", "checkpoint=5"], "has no checkpoint 5; there are best, last, 4, 8, 12"),
        ([f"run={copy}", "checkpoint=last"], "model.safetensors is not what was written"),
        ([f"run={bare}"], "is not the folder of a run"),
        ([f"run={odd}"], "model.layers = none: must be integer >= 1"),
        ([f"run={other}"], "holds another model: blocks.1.norm1.weight is missing"),
    ):
        code, text = llmtrain([command, *words], place)
        assert code == 2, text
        assert told in text
        assert len(text.splitlines()) == 1, text
    assert evaluated(copy, place, "checkpoint=8")["checkpoint"] == "step-00000008"


def test_a_run_is_named_from_any_folder(run: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = json.loads((run / "result.json").read_text())["sample"]
    words = [word.removeprefix("sample.") for word in PROMPT]
    for cwd, name in ((place, "runs/run"), (run, "."), (run / "checkpoints", "step-00000012")):
        code, text = llmtrain(["generate", f"run={name}", "checkpoint=last", *words], place, cwd=cwd)
        assert (code, text) == (0, f"the {sample}\n")
        code, text = llmtrain(["eval", f"run={name}", "checkpoint=last"], place, cwd=cwd)
        assert code == 0, text
    assert steps(run) == [4, 8, 12]


def test_own_parts_need_trust_here_too(place: Path) -> None:
    """A stranger's run names code; it does not run by being looked at."""
    run = shutil.copytree(train(place, "run.name=plain"), place / "runs/own")
    config = (run / "config.yaml").read_text()
    assert (
        "name: cross_entropy\n  temperature: 1.0\n  label_smoothing: 0.0\n  z_loss: 0.0\n  class_weights: null\n"
        in config
    )
    own = config.replace(
        "name: cross_entropy\n  temperature: 1.0\n  label_smoothing: 0.0\n  z_loss: 0.0\n  class_weights: null\n",
        "name: noisy_parts:noisy\n  scale: 1.0\n",
    )
    (run / "config.yaml").write_text(own)
    for command in ("eval", "generate"):
        code, text = llmtrain([command, f"run={run}"], place)
        assert code == 2
        assert "is code from outside; it runs only with --trust noisy_parts" in text
        assert llmtrain([command, f"run={run}", "--trust", "noisy_parts"], place)[0] == 0


def test_a_run_can_be_judged_from_another_folder(place: Path, tmp_path: Path) -> None:
    """Its data was named relative to where it was started."""
    write_text(tmp_path)
    words = tiny(tmp_path, "data.path=text.txt", "run.name=here")
    assert llmtrain(words, tmp_path, cwd=tmp_path)[0] == 0
    code, text = llmtrain(["eval", f"run={tmp_path / 'runs/here'}", "device=cpu"], place, cwd=place)
    assert code == 0, text


OF_FILES = {
    "labelled_text": ["model=textcnn", "data.context=16", "tokenizer=file", "tokenizer.path=own/tokenizer.json"],
    "table": ["model=linear", "data.label_column=label", "data.columns=[x]"],
}


@pytest.mark.parametrize("data", OF_FILES)
def test_every_path_of_a_run_is_right_from_another_folder(tmp_path: Path, data: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    for name, first, last in (("train", 0, 40), ("val", 40, 50), ("test", 50, 60)):
        rows = [f"number {i},{i},{'ab'[i % 2]}" for i in range(first, last)]
        (here / "own" / name).mkdir(parents=True)
        (here / "own" / name / "rows.csv").write_text("\n".join(["text,x,label", *rows]) + "\n")
    byte([]).save(here / "own/tokenizer.json")
    files = ["data.path=own/train/*.csv", "data.val_path=own/val", "data.test_path=own/test/rows.csv"]
    common = ["run.dir=runs", "run.name=x", "run.cache=cache", "train.steps=2", "train.threads=1"]
    words = ["train", f"data={data}", *files, *common, "train.device=cpu", "precision=fp32", *OF_FILES[data]]
    code, text = llmtrain(words, tmp_path, cwd=here)
    assert code == 0, text
    told = json.loads((here / "runs/x/result.json").read_text())["metrics"]
    for split in ("val", "test"):
        code, text = llmtrain(["eval", "run=../here/runs/x", "device=cpu", f"split={split}"], tmp_path, cwd=there)
        assert code == 0, text
        again = json.loads((here / "runs/x/eval/metrics.json").read_text())
        assert again[f"{split}_loss"] == pytest.approx(told[f"{split}_loss"], rel=1e-6)
    assert not list(there.iterdir())


def test_labelled_data_has_a_test_that_can_be_looked_at_again(place: Path) -> None:
    given = [
        "data=digits",
        "model=linear",
        "optim.lr=0.02",
        "train.steps=60",
        "train.batch_size=64",
        f"run.dir={place / 'runs'}",
    ]
    code, text = llmtrain(["train", *given, "run.name=digits", "precision=fp32"], place)
    assert code == 0, text
    metrics = json.loads((place / "runs/digits/result.json").read_text())["metrics"]
    assert f"accuracy {metrics['test_accuracy']:.2%}" in text and metrics["test_accuracy"] > 0.5
    for split in ("test", "val"):
        words = ["eval", f"run={place / 'runs/digits'}", f"split={split}", "checkpoint=last", "device=cpu"]
        code, text = llmtrain(words, place)
        assert code == 0, text
        record = json.loads((place / "runs/digits/eval/metrics.json").read_text())
        for name in ("loss", "accuracy", "f1_macro"):
            assert record[f"{split}_{name}"] == pytest.approx(metrics[f"{split}_{name}"], rel=1e-6)
    code, text = llmtrain(["generate", f"run={place / 'runs/digits'}", "device=cpu"], place)
    assert code == 2 and "was trained for classification" in text


def labels(place: Path, name: str, *words: str) -> Path:
    """A short run on labelled data, judged after every ten steps."""
    given = ["model=linear", "train.batch_size=64", "eval.every=10", "eval.batches=null", "train.threads=1"]
    given += ["log.tensorboard=false", "precision=fp32", f"run.dir={place / 'runs'}", f"run.name={name}"]
    code, text = llmtrain(["train", *given, *words], place)
    assert code == 0, text
    return place / "runs" / name


def table(run: Path) -> list[dict[str, str]]:
    with (run / "eval/predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_eval_of_classes_writes_what_was_said_of_each_sample(place: Path) -> None:
    run = labels(place, "classes", "data=digits", "train.steps=30", "optim.lr=0.02")
    (run / "eval").mkdir()
    (run / "eval/confusion.png").write_bytes(b"old")
    code, text = llmtrain(["eval", f"run={run}", "split=test", "checkpoint=last", "device=cpu", "batch_size=50"], place)
    assert code == 0, text
    record = json.loads((run / "eval/metrics.json").read_text())
    rows = table(run)
    targets, said = ([int(row[name]) for row in rows] for name in ("target", "prediction"))
    assert [int(row["sample"]) for row in rows] == list(range(len(rows)))
    assert record["test_accuracy"] == pytest.approx(np.mean(np.equal(targets, said)))
    assert record["test_f1_macro"] == pytest.approx(theirs.f1_score(targets, said, average="macro"))
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    by_class = np.stack(theirs.precision_recall_fscore_support(targets, said, labels=range(10), zero_division=0), -1)
    assert [list(row.values()) for row in record["classes"].values()] == pytest.approx(by_class)
    for name, row in zip(record["classes"], by_class, strict=True):
        assert re.search(
            rf"^  {name} +precision {row[0]:.3f}  recall {row[1]:.3f}  f1 {row[2]:.3f}  of {row[3]:.0f}$", text, re.M
        )
    picture = (run / "eval/confusion.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


SCARCE = """
import torch
from llmtrain import trained
whole, taken = trained.with_outputs, []
def scarce(*given):
    compute = whole(*given)
    def refusing(inputs, *others):
        if taken and len(inputs) > 16:  # the first batch goes through
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        taken.append(len(inputs))
        return compute(inputs, *others)
    return refusing
trained.with_outputs = scarce
"""


@pytest.mark.parametrize("words", [[], ["batches=2"]], ids=["all", "some"])
def test_eval_that_runs_out_of_memory_measures_the_same_in_smaller_pieces(place: Path, words: list[str]) -> None:
    run, found = labels(place, f"full{len(words)}", "data=digits", "train.steps=10"), []
    for before in ("", SCARCE):
        code, text = llmtrain(["eval", f"run={run}", "device=cpu", "batch_size=50", *words], place, before=before)
        assert code == 0, text
        found.append((json.loads((run / "eval/metrics.json").read_text()), table(run)))
    told = "memory ran out at 50 samples a batch; measured 10 at a time, the same samples"
    assert told in " ".join(text.split())
    (record, rows), (other, others) = found
    assert other.pop("classes") == record.pop("classes")
    assert other == pytest.approx(record, abs=1e-6)
    assert [(r["sample"], r["prediction"]) for r in rows] == [(r["sample"], r["prediction"]) for r in others]


def test_eval_of_few_samples_names_those_it_took(place: Path) -> None:
    run = labels(place, "few", "data=digits", "train.steps=10")
    for words in (["batches=2", "batch_size=3"], ["batch_size=50", "metrics=[roc_auc]"]):
        code, text = llmtrain(["eval", f"run={run}", "device=cpu", *words], place)
        assert code == 0, text
        rows, record = table(run), json.loads((run / "eval/metrics.json").read_text())
        if "batches=2" in words:
            last = int(rows[-1]["sample"])
            assert [int(row["sample"]) for row in rows] == np.linspace(0, last, 6).round().tolist() and last > 50
            assert sum(row["support"] for row in record["classes"].values()) == 6
        else:
            assert set(record) == {"checkpoint", "batches", "classes", "val_loss", "val_roc_auc"}
    code, text = llmtrain(["eval", f"run={run}", "metrics=[roc_auk]"], place)
    assert code == 2 and "Did you mean roc_auc?" in text and "metrics = roc_auk" in text


def test_eval_of_numbers_and_of_answers(place: Path) -> None:
    words = ["data=diabetes", "train.steps=10", "eval.val_fraction=0.2"]
    run = labels(place, "numbers", *words)
    assert llmtrain(["eval", f"run={run}", "device=cpu"], place)[0] == 0
    record, rows = json.loads((run / "eval/metrics.json").read_text()), table(run)
    targets, said = ([float(row[name]) for row in rows] for name in ("target", "prediction"))
    assert record["val_r2"] == pytest.approx(theirs.r2_score(targets, said), rel=1e-5)
    assert "classes" not in record and not (run / "eval/confusion.png").exists()
    run = labels(place, "answers", "data=digits", "task=multilabel", "train.steps=10")
    assert llmtrain(["eval", f"run={run}", "device=cpu"], place)[0] == 0
    record, rows = json.loads((run / "eval/metrics.json").read_text()), table(run)
    right = [
        (float(row[f"probability_{c}"]) > 0.5) == (float(row[f"target_{c}"]) > 0.5) for row in rows for c in range(10)
    ]
    assert record["val_accuracy"] == pytest.approx(np.mean(right))
    assert record["classes"].keys() == {str(c) for c in range(10)} and not (run / "eval/confusion.png").exists()


def test_without_matplotlib_the_rest_is_there(place: Path) -> None:
    run = labels(place, "unpainted", "data=digits", "train.steps=10")
    away = "import sys; sys.modules['matplotlib.figure'] = None"
    code, text = llmtrain(["eval", f"run={run}", "device=cpu"], place, before=away)
    assert code == 0, text
    assert "confusion.png: not drawn: that needs matplotlib: pip install 'llmtrain[plots]'" in text
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["metrics.json", "predictions.csv"]


def test_the_best_follows_what_is_monitored_and_ends_a_run_early(place: Path) -> None:
    words = ["data=digits", "train.steps=400", "optim.lr=0.05", "eval.monitor=recall_macro"]
    run = labels(place, "early", *words, "eval.patience=3", "eval.min_delta=0.01")
    result, log = json.loads((run / "result.json").read_text()), (run / "log.txt").read_text()
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val_recall_macro"] for line in told if "val_recall_macro" in line}
    assert result["status"] == "finished" and result["step"] == max(scores) < 400
    assert "eval.patience: val_recall_macro has not improved by more than 0.01 in the last 3 evaluations" in log
    assert result["best"]["step"] == min(step for step in scores if scores[step] == max(scores.values()))
    code, text = llmtrain(["eval", f"run={run}", "device=cpu"], place)
    assert code == 0, text
    record = json.loads((run / "eval/metrics.json").read_text())
    assert record["checkpoint"] == f"step-{result['best']['step']:08d}"
    assert record["val_recall_macro"] == pytest.approx(max(scores.values()))


def test_text_has_no_test(run: Path, place: Path) -> None:
    code, text = llmtrain(["eval", f"run={run}", "split=test", "device=cpu"], place)
    assert code == 2 and "keeps no test samples" in text


def test_a_run_of_before_a_knob_was_there_still_opens(run: Path, place: Path) -> None:
    old = shutil.copytree(run, place / "runs/old")
    config = (old / "config.yaml").read_text()
    assert "  z_loss: 0.0\n" in config and "  qk_norm: false\n" in config
    (old / "config.yaml").write_text(config.replace("  z_loss: 0.0\n", "").replace("  qk_norm: false\n", ""))
    assert evaluated(old, place)["val_loss"] == evaluated(run, place)["val_loss"]
    before = yaml.safe_load((old / "config.yaml").read_text())
    kept = {k: v for k, v in before.items() if k not in SCHEDULES[1:]}
    (old / "config.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
    assert evaluated(old, place)["val_loss"] == evaluated(run, place)["val_loss"]
    (old / "overrides.yaml").unlink()
    code, text = llmtrain(["eval", f"run={old}", "device=cpu"], place)
    assert code == 2
    assert "model.qk_norm = (missing)" in text
