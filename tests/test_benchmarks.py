"""The benchmarks run; what they measure is looked at by people."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import check
from llmtrain.misfits import part_misfits
from llmtrain.types import Result

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.vocab_size, config.n_layer, config.bias, config.dropout) == (512, 2, True, 0.0)
        self.rows = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        logits = self.rows(idx) @ self.rows.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def _run(script: str, *words: str, cwd: Path) -> str:
    environment = os.environ | {"HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _rows(told: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]


def _text(folder: Path) -> list[str]:
    file = folder / "text.txt"
    file.write_text("some text to learn from, again and again\n" * 300)
    return ["data=text", f"data.path={file}", f"run.cache={folder / 'cache'}"]


def test_the_loop_is_timed_beside_a_bare_step(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text to learn from, again and again\n" * 300)
    words = ["--shape", "4x128", "--nano", "--rounds", "1", "--steps", "10", "data=text", f"data.path={text}"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "step.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "4x128: llmtrain" in done.stdout and "overhead" in done.stdout
    assert re.search(r"nano [\d.]+ .* ms/step, speed ratio [\d.]+ .*, goal 1.1: (met|missed)", done.stdout)


def test_the_head_is_measured_with_all_logits_and_by_chunks(tmp_path: Path) -> None:
    words = ["--tokens", "2048", "--precision", "fp32", "--part", "model", "--way", "plain", "--chunk", "16"]
    words += ["--rounds", "1", "model.width=16", "model.heads=2"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "head_memory.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| model, fp32")]
    assert [row[1].strip() for row in rows] == ["plain", "16"]
    plain, chunked = (float(row[2].replace(",", "")) for row in rows)
    assert chunked < plain / 4  # beyond what is there before: of so small a model maybe nothing


def test_regularizers_are_timed_beside_none(tmp_path: Path) -> None:
    words = ["--rounds", "1", "--steps", "10", "--only", "l2", "model.layers=1", "model.width=16", "model.heads=2"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "regularization.py"), *words, "model.context=16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.endswith(") |")] == ["l2"]


def test_tokenizers_are_timed_beside_the_library(tmp_path: Path) -> None:
    words = ["--megabytes", "0.2", "--vocab", "700", "--only", "bpe", "--only", "wordpiece", "--ways"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "encoding.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    measured = [row for row in rows if len(row) == 5 and row[0] in ("bpe", "wordpiece")]
    assert len(measured) == 2 and all(float(cell) >= 0 for row in measured for cell in row[1:])
    assert float(measured[0][3]) > float(measured[0][4])  # ours beside the library's
    assert [row[1] for row in rows if len(row) == 4][2:] == 2 * ["one thread", "threads", "processes"]


def test_quality_is_shown_beside_what_scikit_learn_reaches_on_the_same_samples(tmp_path: Path) -> None:
    words = ["--only", "diabetes", "--seeds", "1", "train.threads=1", f"run.cache={tmp_path}"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "quality.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    [(_, command_line, metric, ours, rival, _, verdict)] = [row for row in rows if row[:1] == ["diabetes"]]
    assert "data=diabetes" in command_line and metric == "test r2" and rival.startswith("ridge regression ")
    reached, fitted = float(ours), float(rival.split()[-1])
    assert abs(reached - fitted) < 0.05 and fitted > 0.2  # both are linear, fitted to the same patients
    assert reached == fitted or verdict == ("better" if reached > fitted else "worse")


def test_a_run_without_an_end_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import quality

    def end(config: Any, origin: Any) -> Result:
        """The first job's second run diverges, a signal stops the last."""
        names = {"tabular": "finished" if config.train.seed == 0 else "diverged", "ridge": "stopped"}
        status = names.get(config.run.name, "finished")
        return Result(tmp_path, status, 7, {"val_r2": 0.5}, signal=15 if status == "stopped" else None)

    jobs = {
        name: quality.Job(f"model=linear data=diabetes loss=mse run.name={name}", "val_r2", lambda *_: {"zero": 0.0}, 2)
        for name in ("tabular", "plain", "ridge", "never")
    }
    monkeypatch.setattr(quality, "train", end)
    monkeypatch.setattr(quality, "JOBS", jobs)
    monkeypatch.setattr(sys, "argv", ["quality.py", f"run.cache={tmp_path}"])
    quality.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    told = {row[0]: (row[3], row[-1]) for row in rows if row and row[0] in jobs}
    assert told == {
        "tabular": ("diverged at step 7, seed 1", ""),
        "plain": ("0.500 (0.500 to 0.500)", "better"),
        "ridge": ("stopped at step 7, seed 0", ""),
    }


def test_pairs_of_tokens_are_counted_as_witten_and_bell_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from quality import _counted

    shares, after = _counted(np.array([0, 1, 0, 1, 0, 2]), 4)
    assert shares.tolist() == [0.4, 0.3, 0.2, 0.1]
    tokens = np.arange(4)
    assert after(0, tokens) == pytest.approx([2 * 0.4 / 5, (2 + 2 * 0.3) / 5, (1 + 2 * 0.2) / 5, 2 * 0.1 / 5])
    assert after(3, tokens) == pytest.approx(shares)  # nothing was ever seen after it


def test_listing_runs_is_timed(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "runs.py"), "--runs", "12", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^llmtrain runs.*, 12 runs: [\d.]+ .* s, CPU [\d.]+ ", done.stdout, re.M)) == 4
    assert list(tmp_path.iterdir()) == []


def test_sides_on_a_gpu_take_turns_and_one_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(NANOGPT)
    words = ["--tiny", "--sides", "llmtrain", "bare", "--nanogpt", str(tmp_path), "--optim", "none_such"]
    words += ["--rounds", "2", "--json", "found.json", "train.threads=1", "train.grad_clip=0.5"]
    told = _run("gpu.py", *words, cwd=tmp_path)
    rows = {row[0]: row for row in _rows(told)}
    assert "none_such" in rows["optim"][1]
    assert all(float(rows[side][2].replace(",", "")) > 0 for side in ("llmtrain", "bare", "nano"))
    assert rows["speed by that of bare"][3] in ("met", "missed")
    [tiny] = json.loads((tmp_path / "found.json").read_text())["models"].values()
    sides = tiny["sides"]
    assert sides["nano"]["parameters"] == 512 * 32 and sides["llmtrain"]["parameters"] == sides["bare"]["parameters"]
    assert [len(side["turns"]) for side in sides.values() if "turns" in side] == [2, 2, 2]
    assert all(side["micro"] == 4 for side in sides.values() if "turns" in side)
    assert "train.grad_clip=0.5" in sides["llmtrain"]["overrides"]


def test_micro_batches_become_smaller_until_one_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--micro", "8", "4", "2", "--sides", "bare"])
    bench = gpu.Bench(gpu._options(), "tiny", str(tmp_path), 0.0, 0.0)
    [rival] = bench.rivals
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(gpu.Rival, "start", lambda self, setting: asked.append(("start", self.sizes[0])))
    monkeypatch.setattr(gpu.Rival, "ask", lambda self, command, count=0: asked.append((command, self.sizes[0])))

    def answer(self: Any, until: float) -> tuple[str, Any]:
        if asked[-1][0] == "begin" and self.sizes[0] > fits:
            return "full", "OutOfMemoryError"
        return "done", {"first_seconds": 1.0, "attention": "flash", "parameters": 1}

    monkeypatch.setattr(gpu.Rival, "answer", answer)
    fits = 2
    bench._fit(rival, tried=False)
    assert rival.found["micro"] == 2 and not rival.failure
    assert asked == [(what, size) for size in (8, 4, 2) for what in ("start", "begin")]
    fits, rival.sizes = 1, [4, 2]
    bench._fit(rival, tried=True)
    assert rival.failure == "out of memory with micro-batches of 2" and not bench.going


def test_goals_are_told_beside_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--models", "gpt_small"])
    bench = gpu.Bench(gpu._options(), "gpt_small", str(tmp_path), 0.0, 0.0)
    for rival, seconds in zip(bench.rivals, ([1.0, 0.5], [0.99, 0.5], [1.4, 0.8]), strict=True):
        rival.turns = [[s] * 3 for s in seconds]
        size = {"llmtrain": 30, "trainer": 60}.get(rival.name, 0)
        rival.found |= {"micro": 64, "allocated": size * 2**30, "first_seconds": 1.0, "attention": "", "warmup": 1}
    found = {goal["what"]: (goal["found"], goal["met"]) for goal in bench.goals()}
    assert found["tokens/s"] == (524288 * 1.5, True)
    assert found["speed by that of bare"] == (pytest.approx((0.99 + 1) / 2), True)
    assert found["speed by that of trainer"] == (pytest.approx(1.5), True)
    assert found["peak memory by that of trainer"] == (0.5, True)
    bench.rivals[2].found["micro"] = 32
    assert not any("memory" in goal["what"] for goal in bench.goals())


@pytest.mark.slow
def test_growth_is_shown_beside_what_flops_foresee(tmp_path: Path) -> None:
    words = ["--contexts", "16", "64", "--sizes", "gpt_nano", "--tokens", "256", "model.width=16", "model.heads=2"]
    told = _run("growth.py", *words, "--minutes", "0.5", "train.threads=1", *_text(tmp_path), cwd=tmp_path)
    rows = {row[0]: row for row in _rows(told)}
    few, many = rows["context 16"], rows["context 64"]
    assert few[7:] == ["1.00", "1.00"] and float(many[8]) > 1  # attention's share
    assert float(rows["gpt_nano"][3]) > 0


@pytest.mark.slow
def test_a_start_is_timed_stage_by_stage(tmp_path: Path) -> None:
    told = _run("startup.py", "--rounds", "1", "model.layers=1", *_text(tmp_path), cwd=tmp_path)
    assert re.search(r"^wall: llmtrain .* s, bare .* s, ratio .*, goal 1.3: (met|missed)$", told, re.M)
    stages = [row[0] for row in _rows(told)]
    assert stages.count("import torch") == 2 and "data, from the cache" in stages and stages[-1] == "model"


@pytest.mark.slow
def test_a_sweep_is_measured_with_all_of_its_processes(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "sweep.py"), "--jobs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    composing, whole = (float(found) for found in re.findall(r"4 jobs: .*?CPU ([\d.]+) s;", done.stdout))
    assert 0 < composing < whole < 60


def test_each_recipe_of_the_speedrun_lacks_one_ingredient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import speedrun

    rates = {"gpt2": 0.003, "speedrun": 0.02}
    made = speedrun.recipes(500, rates) | speedrun.lacking(500, rates, list(speedrun.WITHOUT))
    speedrun.write(tmp_path, made)
    prepare(str(tmp_path / "conf"))
    jobs = compose_jobs("config", [f"experiment={','.join(made)}", *speedrun.SHARED], multirun=True)
    prepare(None)
    assert [misfit for job in jobs for misfit in job.misfits] == []
    values = {job.choices["experiment"]: job.values for job in jobs}
    assert {name: part_misfits(check(each)) for name, each in values.items()} == {name: [] for name in made}
    whole = values["speedrun_best"]
    changed = {name: {key for key in whole if each[key] != whole[key]} for name, each in values.items()}
    assert changed["without_rope"] == {"model"} and changed["without_momentum_warmup"] == {"momentum_schedule"}
    assert changed["without_muon"] == {"optim", "momentum_schedule"} and changed["without_zero_init"] == {"init"}
    assert all(changed[f"without_{name}"] for name in speedrun.WITHOUT)
    assert (values["gpt2_best"]["optim"]["lr"], values["without_muon"]["optim"]["lr"]) == (0.003, 0.003)
    assert (whole["optim"]["lr"], values["speedrun_sooner"]["train"]["steps"]) == (0.02, 300)


def test_the_speedrun_is_told_by_its_best_rate_beside_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import speedrun

    losses = {"lr=0.006": 4.0, "lr=0.02": 3.5, "experiment=speedrun_best": 3.0, "experiment=without_rope": 3.25}

    def train(command: list[str], **_: Any) -> None:
        """Leaves what the jobs of a sweep would leave."""
        words = dict(word.split("=", 1) for word in command if "=" in word)
        keys = {"lr": words.get("optim.lr", ""), "seed": words["train.seed"], "experiment": words["experiment"]}
        axes = [[f"{key}={value}" for value in text.split(",")] for key, text in keys.items() if "," in text]
        for number, given in enumerate(itertools.product(*axes)):
            place = tmp_path / words["sweep.name"] / f"{','.join(given)}-{number:08x}"
            place.mkdir(parents=True)
            loss = losses.get(given[-1], 5.0) + 0.1 * ("seed=2" in given)
            told = {"status": "finished", "step": 10, "seconds": 2.0, "metrics": {"val_loss": loss}}
            (place / "result.json").write_text(json.dumps(told))

    monkeypatch.setattr(speedrun.subprocess, "run", train)
    monkeypatch.setattr(
        sys, "argv", ["speedrun.py", str(tmp_path), "--seeds", "2", "--only", "rope", "--only", "qk_norm"]
    )
    speedrun.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    told = {row[0]: row[1:] for row in rows if row}
    assert told["speedrun best"] == ["3.0500 (3.0000 to 3.1000)", "2", "+0.0000", "200"]
    assert told["without rope"] == ["3.3000 (3.2500 to 3.3500)", "2", "+0.2500", "200"]
    assert {"gpt2 best", "gpt2 untied", "speedrun sooner", "without qk norm"} < set(told)
    assert [speedrun.told_rates(tmp_path, recipe) for recipe in ("gpt2", "speedrun")] == [0.006, 0.02]
