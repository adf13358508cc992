from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.listing import diff, runs


def made(name: str, value: float | None = 2.0, root: str = "runs", **more: Any) -> Path:
    """A run's folder; `more` are its knobs (`optim__lr`), its `choices`, `overrides`, `result`, `start` or `status`."""
    place = Path(root, name)
    place.mkdir(parents=True)
    knobs = {"optim__name": "adam", "optim__lr": 0.001, "train__seed": 1, "train__batch_size": 8, "run__name": name}
    knobs |= {key: told for key, told in more.items() if "__" in key}
    start = {"started": time.time() - 3600, "monitor": "val_loss", "rising": False, "steps": 1000}
    start |= {"config": {key.replace("__", "."): told for key, told in knobs.items()}}
    start |= {"choices": more.get("choices", {}), "overrides": more.get("overrides", []), **more.get("start", {})}
    (place / "run.json").write_text(json.dumps(start))
    if value is not None:
        best = {"step": 900, start["monitor"]: value}
        result = {"status": "finished", "step": 1000, "metrics": {"loss": value / 2, start["monitor"]: value + 0.5}}
        result |= {"best": best, "seconds": 185.0, "ended": time.time(), **more.get("result", {})}
        (place / "result.json").write_text(json.dumps(result))
    if "status" in more:
        (place / "status.json").write_text(json.dumps(more["status"]))
    return place


def rows(text: str) -> list[list[str]]:
    """The cells of a table, its titles first."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def names(text: str) -> list[str]:
    """The first cell of each line of a table but the titles, and what did not fit is told after it."""
    return [row[0] for row in rows(text)[1:] if not row[0].startswith("also differ")]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


# -- the list -------------------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_with_the_knobs_that_differ(call, wide) -> None:
    now = time.time()
    made("one", 2.5, optim__lr=0.1, choices={"optim": "adam"}, start={"started": now - 60})
    made("two", 2.25, optim__lr=0.2, optim__name="sgd", optim__momentum=0.9, choices={"optim": "sgd"},
         start={"started": now - 120}, result={"status": "diverged", "step": 70})  # fmt: skip
    made("group/three", None, optim__lr=0.1, choices={"optim": "adam"}, start={"started": 86400.0 * 365})
    (Path("runs/group/three/metrics.jsonl")).write_text('{"step": 7, "loss": 5.0}\n')
    said = call("runs")
    assert (said.code, said.err) == (0, "")
    told = rows(said.out)
    assert told[0] == ["name", "state", "when", "time", "step", "val_loss", "optim", "lr"]
    day = time.strftime("%m-%d %H:%M", time.localtime(now - 60))
    assert told[1] == ["one", "finished", day, "3 min 05 s", "1000", "2.5000", "adam", "0.1"]
    assert told[2][:2] + told[2][4:] == ["two", "diverged", "70/1000", "2.2500", "sgd", "0.2"]
    assert told[3][:3] == ["group/three", "killed", time.strftime("%Y-%m-%d", time.localtime(86400 * 365))]
    assert told[3][4:] == ["7/1000", "adam", "0.1"]
    assert len(told) == 4


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20])
def test_each_run_is_a_line_however_narrow(call, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    knobs = {f"regularization__knob_{n}": 0 for n in range(12)}
    for number in range(5):
        name = f"a-long-name-that-tells-of-{'x' * 30}-{number}"
        made(name, 2.0 + number, **{key: number * 1.5 for key in knobs}, data__path=f"/folder/{'y' * 50}/{number}")
    monkeypatch.setenv("COLUMNS", str(width))
    said = call("runs", "--sort", "name")
    lines = said.out.splitlines()
    assert (said.code, said.err) == (0, "") and said.out.isascii()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]
    assert len(lines) == 7 and lines[-1].startswith("also differ: ")
    if width >= 40:
        assert [re.search(r"-(\d) ", line)[1] for line in lines[1:6]] == list("01234")
        assert all(f"{2.0 + n:.4f}" in line for n, line in enumerate(lines[1:6]))


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        ([], "abcd"),
        (["state=finished"], "abc"),
        (["state!=finished"], "d"),
        (["optim.lr=1e-3"], "a"),
        (["optim.lr=.001"], "a"),
        (["optim.lr<0.1"], "ab"),
        (["optim.lr <= 0.1", "optim.lr>0.001"], "bc"),
        (["lr>=0.1"], "cd"),
        (["val_loss<3"], "ab"),
        (["metric<3", "state=finished"], "ab"),
        (["val_loss!=2"], "bcd"),
        (["optim=sgd"], "d"),
        (["loss=focal"], "d"),
        (["loss=1"], "a"),
        (["optim.name=s*"], "d"),
        (["optim.momentum=null"], "abc"),
        (["model.tied=true"], "a"),
        (["model.sizes=[1,2]"], "b"),
        (["name=?", "train.seed=1"], "abcd"),
        (["when>2020-01-01"], "bcd"),
        (["sweep=null", "step<1000"], "d"),
        (["optim.lr>100"], ""),
    ],
)
def test_runs_are_chosen_by_what_they_are(call, conditions: list[str], left: str) -> None:
    adam, sgd = {"optim": "adam", "loss": "cross_entropy"}, {"optim": "sgd", "loss": "focal"}
    made("a", 2.0, choices=adam, optim__lr=0.001, model__tied=True, start={"started": 1000.0})
    made("b", 2.75, choices=adam, optim__lr=0.01, model__sizes=[1, 2])
    made("c", 3.0, choices=adam, optim__lr=0.1)
    made("d", None, choices=sgd, optim__name="sgd", optim__lr=1, optim__momentum=0.9)
    said = call("runs", "--sort", "name", *(["--where", *conditions] if conditions else []))
    assert (said.code, said.err) == (0, "")
    if left:
        assert "".join(names(said.out)) == left
    else:
        assert said.out == f"no runs in runs where {conditions[0]}\n"


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        ([], "cbda"),
        (["--sort", "when", "--reverse"], "adbc"),
        (["--sort", "metric"], "bacd"),
        (["--sort", "metric", "--limit", "2"], "ba"),
        (["--sort", "metric", "--reverse"], "cabd"),
        (["--sort", "name"], "abcd"),
        (["--sort", "time"], "cabd"),
        (["--sort", "optim.lr"], "dbca"),
        (["--sort", "lr", "--limit", "0"], "dbca"),
        (["--sort", "loss"], "bacd"),
    ],
)
def test_runs_are_sorted_and_those_without_come_last(call, wide, flags: list[str], order: str) -> None:
    made("a", 3.0, optim__lr=10, start={"started": 1.0})
    made("b", 2.0, optim__lr=0.2, start={"started": 3.0})
    made("c", 4.0, optim__lr=1.5, start={"started": 4.0}, result={"seconds": 1.0})
    made("d", None, optim__lr=0.1, start={"started": 2.0})
    said = call("runs", *flags)
    assert "".join(name for name in names(said.out) if len(name) == 1) == order
    assert ("2 more; --limit 0 shows all 4" in said.out) == (flags[-1:] == ["2"])


def test_more_is_better_for_some_metrics(call, wide) -> None:
    for name, value in (("a", 0.5), ("b", 0.75)):
        made(name, value, start={"monitor": "val_accuracy", "rising": True})
    assert names(call("runs", "--sort", "metric").out) == ["b", "a"]
    assert rows(call("runs").out)[0][-1] == "val_accuracy"
    made("c", 1.5)
    told = rows(call("runs", "--sort", "name").out)
    assert [row[5] for row in told] == ["metric", "val_accuracy 0.5000", "val_accuracy 0.7500", "val_loss 1.5000"]


def test_columns_are_shown_that_are_asked_for(call) -> None:
    made("a", optim__lr=1, model__bias=True)
    made("b", optim__lr=2, model__bias=True)
    told = rows(call("runs", "--show", "bias", "train.seed", "loss", "--sort", "name").out)
    assert told[0][6:] == ["bias", "seed", "loss", "lr"]
    assert told[1][6:] == ["true", "1", "1", "1"]


def test_a_sweep_is_a_line_unless_its_jobs_are_asked_for(call, wide) -> None:
    made("alone", 2.0, start={"started": 1.0})
    for number in range(3):
        made(f"job-{number}", None if number == 2 else 3.0 - number, root="runs/s", optim__lr=number)
    Path("runs/s/plan.json").write_text(json.dumps({"jobs": [{}] * 5}))
    told = rows(call("runs").out)
    assert [row[:2] for row in told] == [["name", "state"], ["s/", "2/5 done"], ["alone", "finished"]]
    assert told[1][3:] == ["6 min 10 s", "2.0000"]
    everything = call("runs", "--all").out
    assert sorted(names(everything)) == ["alone", "s/job-0", "s/job-1", "s/job-2"]
    own = rows(call("runs", "runs/s", "--sort", "lr").out)
    assert own[0][-1] == "lr" and [(row[0], row[-1]) for row in own[1:]] == [(f"job-{n}", str(n)) for n in range(3)]
    assert names(call("runs", "runs", "runs/s", "--sort", "name").out) == [
        "runs/alone", "runs/s/job-0", "runs/s/job-1", "runs/s/job-2"
    ]  # fmt: skip
    assert names(call("runs", "--where", "lr=1").out) == ["s/"]
    assert {run["sweep"] for run in json.loads(call("runs", "--json").out)} == {None, "s"}


def test_programs_get_all_of_it(call) -> None:
    made("a", 2.0, optim__lr=1, overrides=["optim.lr=1"], choices={"optim": "adam"})
    made("b", None, optim__lr=2, status={"state": "failed", "error": "no room"})
    Path("runs/b/metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    told = json.loads(call("runs", "--json", "--sort", "name", "--show", "train.seed").out)
    assert [run["name"] for run in told] == ["a", "b"]
    a, b = told
    assert (a["state"], a["judged"], a["best"], a["seconds"]) == (
        "finished",
        2.0,
        {"step": 900, "val_loss": 2.0},
        185.0,
    )
    assert (a["folder"], a["overrides"], a["choices"]) == ("runs/a", ["optim.lr=1"], {"optim": "adam"})
    assert a["knobs"] == {"train.seed": 1, "optim.lr": 1}
    assert (b["state"], b["error"], b["metrics"], b["judged"]) == ("failed", "no room", {"loss": None}, None)
    assert len(json.loads(call("runs", "--json", "--limit", "1").out)) == 1


def test_where_nothing_is_that_is_told(call) -> None:
    assert (call("runs").out, call("runs").code) == ("no runs in runs\n", 0)
    assert json.loads(call("runs", "--json", "--sort", "nonsense").out) == []
    Path("runs").mkdir()
    assert call("runs", "--where", "a=1").out == "no runs in runs where a=1\n"
    gone = call("runs", "nowhere")
    assert (gone.code, gone.out, gone.err) == (2, "", "llmtrain runs: nowhere: no such folder\n")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ["--sort", "optim.lrr"],
            "--sort = optim.lrr\n      no such thing is known of these runs  Did you mean optim.lr?",
        ),
        (["--show", "sed"], "--show = sed\n      no such thing is known of these runs  Did you mean seed?"),
        (["--show", "name", "train.sed"], "Did you mean train.seed?"),
        (["--where", "stat=x"], "--where = stat\n      no such thing is known of these runs  Did you mean state?"),
        (["--where", "state=finishd"], "state is one of running, finished, .*Did you mean finished?"),
        (["--where", "runs"], "--where = runs\n      cannot be read as KEY=VALUE, .* folders come before it"),
        (["--where", "lr<much"], "must have a number after <"),
        (["--where", "of=1"], "may be any of a.of, b.of"),
        (["--limit", "-1"], "is no number of lines"),
        (["--limit", "many"], "is no number of lines"),
        (["--som"], "unrecognized arguments: --som"),
    ],
)
def test_what_cannot_be_answered_is_told(call, args: list[str], told: str) -> None:
    made("a", seed=1, a__of=1, b__of=2, start={"choices": {"seed": "x"}})
    said = call("runs", *args)
    assert (said.code, said.out) == (2, "")
    assert re.search(told.replace("?", r"\?"), said.err), said.err


# -- side by side ---------------------------------------------------------------------------------------------


@pytest.fixture
def three(call) -> None:
    """Runs with curves that fall from 5 to 2, 3 and 4."""
    for number, name in enumerate("xyz"):
        place = made(name, 2.0 + number, optim__lr=10.0**-number, overrides=[f"optim.lr={number}"])
        lines = [{"step": s, "val_loss": 5 - (3 - number) * s / 100, "loss": 1.0} for s in range(0, 101, 5)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_stand_side_by_side(call, three) -> None:
    said = call("diff", "runs/x", "y", "z")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert said.out.isascii() and max(map(len, lines)) <= 100
    head, knobs, metrics, title, chart = said.out.split("\n\n")
    assert [row[:3] for row in rows(head)[1:]] == [
        [c, f"runs/{n}", "finished"] for c, n in zip("ABC", "xyz", strict=True)
    ]
    assert rows(knobs) == [["knobs that differ"], ["A", "B", "C"], ["optim.lr", "1", "0.1", "0.01"]]
    assert rows(metrics) == [
        ["metrics, the best of each with *"],
        ["A", "B", "C"],
        ["val_loss", "2.5000*", "3.5000", "4.5000"],
        ["val_loss, best", "2.0000*", "3.0000", "4.0000"],
        ["loss", "1.0000*", "1.5000", "2.0000"],
    ]
    assert title == "val_loss"
    drawn = chart.splitlines()
    assert drawn[0].startswith("        5 |A") and drawn[-3].startswith("        2 |") and drawn[-3].endswith("A")
    assert drawn[-1].split() == ["step", "0", "100"] and drawn[-1].endswith("100")
    ends = {line[-1]: number for number, line in enumerate(drawn[:-2]) if len(line) == len(drawn[-2])}
    assert ends == {"C": 4, "B": 8, "A": 12}
    assert all("".join(drawn[:-2]).count(letter) > 20 for letter in "ABC")


def test_no_knob_may_differ_and_nothing_be_drawn(call, three) -> None:
    made("w", None, optim__lr=1.0)
    said = call("diff", "x", "w")
    assert "No knobs differ." in said.out and "val_loss\n" in said.out and said.code == 0
    made("v", None, optim__lr=1.0)
    assert call("diff", "v", "w").out.endswith("val_loss: nothing to draw yet\n")


def test_many_runs_stand_below_each_other(call, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        made(f"run-{number}", number / 7 + 2, optim__lr=number / 7)
    monkeypatch.setenv("COLUMNS", "60")
    said = call("diff", *(f"run-{number}" for number in range(12)))
    assert max(map(len, said.out.splitlines())) <= 60
    cells = [cell for row in rows(said.out) if row[0] == "optim.lr" for cell in row[1:]]
    assert cells == [f"{number / 7:.6g}" for number in range(12)]
    assert len([line for line in said.out.splitlines() if line.startswith("optim.lr")]) > 1


def test_programs_get_what_differs_and_the_curves(call, three) -> None:
    told = json.loads(call("diff", "x", "y", "--json").out)
    assert [run["folder"] for run in told["runs"]] == ["runs/x", "runs/y"]
    assert told["knobs"] == {"optim.lr": [1.0, 0.1]}
    assert told["metrics"] == {"val_loss": [2.5, 3.5], "loss": [1.0, 1.5]}
    assert told["best"] == {"val_loss": [2.0, 3.0], "step": [900, 900]}
    [(steps, values), _] = told["curves"]["val_loss"]
    assert (steps[-1], values[-1]) == (100, 2.0)
    assert list(json.loads(call("diff", "x", "y", "--json", "--metric", "loss").out)["curves"]) == ["loss"]


def test_curves_are_painted(call, three, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    assert call("diff", "x", "z", "--png", "curves.png").code == 0
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    [axes] = figures[0].axes
    assert [list(line.get_ydata())[-1] for line in axes.lines] == [2.0, 4.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["A  runs/x", "B  runs/z"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "val_loss")
    nowhere = call("diff", "x", "z", "--png", "nowhere/curves.png")
    assert (nowhere.code, nowhere.out) == (2, "") and "nowhere/curves.png: cannot be written" in nowhere.err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--png needs matplotlib" in call("diff", "x", "z", "--png", "curves.png").err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["x"], "takes 2 to 52 runs"),
        (["x", "yy"], "llmtrain diff: yy: no such run. Did you mean y?"),
        (["x", "quux"], "llmtrain diff: quux: no such run"),
        (["runs", "x"], "llmtrain diff: runs: is not the folder of a run; it holds 3: llmtrain runs runs"),
        (["x", "y", "--metric", "val_los"], "--metric = val_los"),
        (["x", "y", "--metric", "val_los"], "Did you mean val_loss?"),
    ],
)
def test_what_cannot_be_compared_is_told(call, three, args: list[str], told: str) -> None:
    said = call("diff", *args)
    assert (said.code, said.out) == (2, "")
    assert told in said.err


# -- on the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["runs", "diff"])
def test_help_is_told(call, command: str) -> None:
    said = call(command, "--help")
    assert said.code == 0 and f"usage: llmtrain {command}" in said.out and f"\n  llmtrain {command} " in said.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("llmtrain runs --so", {"--sort"}),
        ("llmtrain diff --m", {"--metric"}),
        ("llmtrain runs --sort optim.l", {"optim.lr"}),
        ("llmtrain runs --where stat", {"state="}),
        ("llmtrain runs ", {"runs", "runs/group"}),
        ("llmtrain diff runs/", {"runs/a", "runs/group/b"}),
        ("llmtrain diff runs/a runs/g", {"runs/group/b"}),
    ],
)
def test_tab_completes(call, monkeypatch: pytest.MonkeyPatch, shell: str, line: str, offered: set[str]) -> None:
    made("a")
    made("group/b")
    monkeypatch.setenv("COMP_LINE", line)
    said = call("-sc", f"query={shell}")
    assert (said.code, said.err, set(said.out.split())) == (0, "", offered)


def test_thousands_of_runs_are_listed_in_no_time_and_without_torch(tmp_path: Path) -> None:
    conf = {f"group.knob_{n}": n for n in range(130)}
    for number in range(2000):
        place = tmp_path / f"runs/run-{number}"
        place.mkdir(parents=True)
        start = {
            "started": 1e9 + number,
            "monitor": "val_loss",
            "rising": False,
            "steps": 9,
            "overrides": ["group.x=1"],
        }
        start |= {"config": conf | {"group.knob_1": number % 7}, "choices": {"model": "gpt"}}
        result = {"status": "finished", "step": 9, "metrics": {"val_loss": 2.0}, "best": {"val_loss": 2.0, "step": 1}}
        (place / "run.json").write_text(json.dumps(start, indent=2))
        (place / "result.json").write_text(json.dumps(result | {"seconds": 5, "ended": 2e9}))
    code = "import sys; from llmtrain.cli import main; main(['runs', 'runs']); print(*sys.modules, file=sys.stderr)"

    def once() -> float:
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=out, stderr=err)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert min(once() for _ in range(2)) < 1.5
    assert len((tmp_path / "out").read_text().splitlines()) == 2001
    assert not {"torch", "numpy", "hydra", "pydantic", "matplotlib"} & set((tmp_path / "err").read_text().split())


def test_on_a_terminal_the_first_lines_are_shown(monkeypatch: pytest.MonkeyPatch, call, capsys) -> None:
    for number in range(45):
        made(f"run-{number:02}", start={"started": 1e9 - number})
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert runs([]) == 0
    text = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert len(plain) == 42 and plain[1].startswith("run-00") and plain[-1] == "5 more; --limit 0 shows all 45"
    assert diff(["run-00", "run-01"]) == 0
