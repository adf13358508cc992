from __future__ import annotations

import csv
import importlib.util
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain import folder
from llmtrain.knobs import UserError
from llmtrain.reports import shapes
from llmtrain.reports.gather import Study, gather, knob

pytest.importorskip("plotly")
from llmtrain.reports import figures
from llmtrain.reports.page import page, reproduce

EVIL = '<script>document.title="hacked"</script><img src=x onerror=alert(1)>'
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


def write_run(
    place: Path, given: dict[str, str], value: float | None, monitor: str = "val_loss", state: str = "finished",
    steps: int = 40, rising: bool = False, error: str = "", overrides: list[str] | None = None, **metrics: float,
) -> Path:  # fmt: skip
    """What a run leaves in its folder."""
    place.mkdir(parents=True)
    started = {"started": 1.7e9, "monitor": monitor, "rising": rising, "steps": steps, "choices": {"data": "digits"}}
    overrides = overrides or [f"{key}={text}" for key, text in given.items()]
    folder.write_json(place / "run.json", started | {"overrides": overrides, "config": dict(given)})
    (place / "config.yaml").write_text("\n".join(f"{key}: {text}" for key, text in given.items()) + "\n")
    lines: list[dict[str, Any]] = [{"step": step, "loss": 3 / step + (value or 1)} for step in range(1, steps + 1)]
    if value is not None:
        lines += [{"step": steps // 2, monitor: value * 2}, {"step": steps, monitor: value}]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = {"loss": 0.1} | ({monitor: value} if value is not None else {}) | metrics
    ended = {"status": state, "step": steps, "metrics": told, "best": {"step": steps}, "seconds": 2.0, "ended": 1.8e9}
    if state == "failed":
        folder.write_json(place / "status.json", {"state": "failed", "error": error, "started": 1.7e9})
    else:
        folder.write_json(place / "result.json", ended | {"sample": metrics.get("sample", "")})
    return place


def write_plan(place: Path, jobs: list[tuple[str, dict[str, str]]], kind: str = "sweep", **more: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    told = [{"id": str(n), "folder": name, "given": given} for n, (name, given) in enumerate(jobs)]
    plan = {"kind": kind, "command": ["optim.lr=1e-4,1e-2"], "monitor": "val_loss", "rising": False, "jobs": told}
    folder.write_json(place / "plan.json", plan | more)
    return place


def grid(place: Path, seeds: int = 1, value: Callable[[float, float], float] | None = None) -> Path:
    """A sweep of a rate that matters much and a penalty that hardly does."""
    value = value or (lambda lr, l2: abs(math.log10(lr) + 2) + 0.01 * l2 + 0.2)
    jobs, chance = [], random.Random(0)
    for lr in ("0.0001", "0.001", "0.01"):
        for l2 in ("0", "0.001", "0.1"):
            for seed in range(seeds):
                given = {"optim.lr": lr, "regularization.l2": l2} | ({"train.seed": str(seed)} if seeds > 1 else {})
                name = f"{lr}-{l2}-{seed}"
                noise = chance.uniform(0, 0.02) if seeds > 1 else 0.0
                weights = {"sparsity": float(l2), "weight_l1": 10 - float(l2)}
                write_run(place / name, given, value(float(lr), float(l2)) + noise, **weights)
                jobs.append((name, given))
    return write_plan(place, jobs)


def only(place: Path) -> Study:
    (study,) = gather([place])
    return study


def traces(figure: Any, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def named(study: Study, name: str) -> figures.Drawing:
    return next(drawing for drawing in figures.drawings(study) if drawing.name == name)


def test_a_sweep_is_its_points_best_first(tmp_path: Path) -> None:
    study = only(grid(tmp_path / "sweep", seeds=3))
    assert (study.title, study.kind, len(study.trials), len(study.points)) == ("sweep", "sweep", 27, 9)
    best = study.best
    means: dict[str, list[float]] = {}
    for trial in study.trials:
        if trial.given["optim.lr"] == "0.01":
            means.setdefault(trial.given["regularization.l2"], []).append(trial.value)
    least = min(means, key=lambda l2: statistics.fmean(means[l2]))
    assert best is not None and best.given == {"optim.lr": "0.01", "regularization.l2": least}
    for point in study.points:
        values = [
            json.loads((t.record.folder / "result.json").read_text())["metrics"]["val_loss"] for t in point.trials
        ]
        assert point.mean == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert point.deviation == pytest.approx(statistics.stdev(values), rel=1e-12)
        assert point.error == pytest.approx(statistics.stdev(values) / math.sqrt(3), rel=1e-12)
    assert [p.mean for p in study.points] == sorted(p.mean for p in study.points)


def test_what_has_failed_diverged_or_waits_counts_for_nothing(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    write_run(place / "a", {"optim.lr": "1"}, 0.5)
    write_run(place / "b", {"optim.lr": "2"}, None, state="failed", error="no memory")
    write_run(place / "c", {"optim.lr": "3"}, 0.1, state="diverged")
    write_plan(place, [(name, {"optim.lr": lr}) for name, lr in zip("abcd", "1234", strict=True)])
    study = only(place)
    assert dict(study.states) == {"finished": 1, "failed": 1, "diverged": 1, "waiting": 1}
    assert study.best is not None and study.best.given == {"optim.lr": "1"}
    assert [t.value for t in study.trials if t.ended_well] == [0.5]
    assert "no memory" in page([study]) and "2 failed" in page([study])


def test_more_is_better_where_it_is(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    for name, value in (("a", 0.1), ("b", 0.9)):
        write_run(place / name, {"optim.lr": value.hex()}, value, monitor="val_accuracy", rising=True)
    jobs = [(name, {"optim.lr": name}) for name in "ab"]
    study = only(write_plan(place, jobs, monitor="val_accuracy", rising=True))
    assert study.best is not None and study.best.given == {"optim.lr": "b"}
    assert study.champion is not None and study.champion.value == 0.9


def test_folders_are_taken_apart_into_sweeps_and_runs_that_compare(tmp_path: Path) -> None:
    grid(tmp_path / "one")
    grid(tmp_path / "deep" / "two")
    for number, lr in enumerate(("0.1", "0.2")):
        write_run(tmp_path / f"run{number}", {"optim.lr": lr, "train.steps": "40"}, float(lr))
    studies = gather([tmp_path])
    assert sorted(study.title for study in studies) == ["2 runs on digits", "one", "two"]
    runs = next(study for study in studies if study.kind == "runs")
    assert [k.key for k in runs.knobs] == ["optim.lr"]
    (alone,) = gather([tmp_path / "one" / "0.01-0-0"])
    assert (alone.kind, len(alone.trials)) == ("runs", 1)
    with pytest.raises(UserError, match="no such folder"):
        gather([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no runs"):
        gather([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("texts", "scale"),
    [
        (["1e-4", "1e-3"], "log"),
        (["0", "1e-4", "1e-2"], "log"),
        (["1", "2", "9"], "linear"),
        (["-1", "0.1", "100"], "linear"),
        (["0", "0.5"], "linear"),
        (["relu", "gelu"], "category"),
        (["null", "0.1"], "category"),
    ],
)
def test_axes_suit_their_values(texts: list[str], scale: str) -> None:
    found = knob("a.b", "b", texts)
    assert found.scale == scale
    places = [found.at(text) for text in texts]
    assert all(math.isfinite(found.place(text)) for text in texts)
    assert len({*places}) == len(texts)
    if scale == "log":
        assert min(places) > 0
    assert [text for _, text in found.ticks] == [
        text if scale == "category" else f"{float(text):g}" for text in sorted(texts, key=found.at)
    ]


def test_zero_lies_a_decade_below_what_is_above_it() -> None:
    found = knob("regularization.l1", "l1", ["0", "1e-4", "1e-2"])
    assert found.at("0") == pytest.approx(1e-5)
    assert found.ticks[0] == (pytest.approx(1e-5), "0")
    assert found.at("1e-2") == 0.01


def test_curves_are_what_the_files_say(tmp_path: Path) -> None:
    study = only(grid(tmp_path / "sweep"))
    figure = named(study, "curve-val_loss").figure
    for trial in study.trials:
        trace = traces(figure, trial.name)
        assert list(trace.x) == [20, 40] and list(trace.y) == [trial.value * 2, trial.value]
    assert figure.data[-1].name == study.champion.name and figure.data[-1].line.color == figures.BEST
    assert {trace.line.color for trace in figure.data[:-1]} == {figures.FAINT}
    assert figure.layout.yaxis.type == "linear"


def test_curves_over_decades_are_drawn_by_their_logarithm(tmp_path: Path) -> None:
    study = only(grid(tmp_path / "sweep", value=lambda lr, l2: lr**2))
    assert named(study, "curve-val_loss").figure.layout.yaxis.type == "log"
    assert named(study, "knob-optim.lr").figure.layout.yaxis.type == "log"
    assert not shapes.decades([0.0, 1.0, 1e5]) and not shapes.decades([-1, 1e5]) and not shapes.decades([1, 30])
    assert shapes.decades([1, 40, math.nan])


def test_curves_are_thinned_with_their_ends() -> None:
    steps, values = shapes.thinned(range(10_001), [float(i) for i in range(10_001)], 300)
    assert len(steps) == 300 and (steps[0], steps[-1]) == (0, 10_000) and [float(s) for s in steps] == values
    assert shapes.thinned([1, 2], [3.0, 4.0], 300) == ([1, 2], [3.0, 4.0])


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    values = [random.Random(1).gauss(0, 1) for _ in range(50)]
    for reach in (1, 4):
        found = shapes.smoothed(values, reach)
        assert found == pytest.approx([statistics.fmean(values[max(i - reach, 0) : i + reach + 1]) for i in range(50)])
    assert shapes.smoothed(values, 0) == values
    holed = shapes.smoothed([1.0, math.nan, 3.0, 5.0], 1)
    assert holed[0] == 1 and math.isnan(holed[1]) and holed[2:] == [4, 4]


def test_points_lie_at_their_knob_and_value(tmp_path: Path) -> None:
    study = only(grid(tmp_path / "sweep"))
    figure = named(study, "knob-optim.lr").figure
    runs, best, mean = (traces(figure, name) for name in ("run", "best point", "mean"))
    drawn = {*zip(runs.x, runs.y, strict=True), *zip(best.x, best.y, strict=True)}
    assert drawn == {(float(t.given["optim.lr"]), t.value) for t in study.trials}
    assert (list(best.x), list(best.y)) == ([0.01], [study.champion.value])
    at = [statistics.fmean(t.value for t in study.trials if float(t.given["optim.lr"]) == lr) for lr in mean.x]
    assert list(mean.y) == pytest.approx(at)
    assert figure.layout.xaxis.type == "log"


def test_the_map_has_the_means_of_the_others(tmp_path: Path) -> None:
    study = only(grid(tmp_path / "sweep", seeds=2))
    drawing = named(study, "map")
    (heat,) = drawing.figure.data
    assert (list(heat.x), list(heat.y)) == (["0.0001", "0.001", "0.01"], ["0", "0.001", "0.1"])
    for row, l2 in enumerate(heat.y):
        for column, lr in enumerate(heat.x):
            some = [t.value for t in study.trials if (t.given["optim.lr"], t.given["regularization.l2"]) == (lr, l2)]
            assert heat.z[row][column] == pytest.approx(statistics.fmean(some))


def test_parallel_lines_are_the_points(tmp_path: Path) -> None:
    study = only(grid(tmp_path / "sweep", seeds=2))
    (lines,) = named(study, "parallel").figure.data
    rate, penalty, metric = lines.dimensions
    assert list(rate["values"]) == pytest.approx([math.log10(float(p.given["optim.lr"])) for p in study.points])
    assert list(metric["values"]) == list(lines.line.color) == [p.mean for p in study.points]
    assert list(penalty.ticktext) == ["0", "0.001", "0.1"]


def test_the_knob_that_matters_is_told(tmp_path: Path) -> None:
    study = only(grid(tmp_path / "sweep"))
    assert [k.key for k in shapes.ranked(study)] == ["optim.lr", "regularization.l2"]
    other = only(grid(tmp_path / "other", value=lambda lr, l2: lr + 5 * l2))
    assert [k.key for k in shapes.ranked(other)] == ["regularization.l2", "optim.lr"]
    pytest.importorskip("optuna")
    for one, first in ((study, "optim.lr"), (other, "regularization.l2")):
        found = shapes.importance(one)
        assert found is not None and sum(found.shares.values()) == pytest.approx(1)
        assert next(iter(found.shares)) == first and found.shares[first] > 0.9


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "optuna"] + ["optuna"]:
        monkeypatch.setitem(sys.modules, name, None)
    drawing = named(only(grid(tmp_path / "sweep")), "importance")
    assert drawing.figure is None and "llmtrain[search]" in drawing.note


def test_a_penalty_has_a_path(tmp_path: Path) -> None:
    place, jobs = tmp_path / "cv", []
    values = {"0": [1.0, 1.4], "0.01": [0.8, 1.0], "1": [0.9, 1.06]}
    for l1, found in values.items():
        for fold, value in enumerate(found):
            given = {"regularization.l1": l1, "eval.fold": str(fold)}
            write_run(place / f"{l1}-{fold}", given, value, sparsity=float(l1) / 2, weight_l1=9 - float(l1))
            jobs.append((f"{l1}-{fold}", given))
    write_plan(place, jobs, kind="cv")
    best, plain = {"regularization.l1": "0.01"}, {"regularization.l1": "1"}
    choice = {"best": best, "one_standard_error": plain, "points": []}
    folder.write_json(place / "results.json", {"choices": [choice], "tests": [0.95]})
    study = only(place)
    (path,) = shapes.paths(study)
    assert [step.at for step in path.steps] == [pytest.approx(1e-3), 0.01, 1]
    assert [step.spread for step in path.steps] == pytest.approx([0.2, 0.1, 0.08])
    assert [(name, step.point.given) for name, step in path.marks] == [("best", best), ("one standard error", plain)]
    figure = named(study, "path-regularization.l1").figure
    line, star, diamond, norm, sparse = figure.data
    assert list(line.y) == pytest.approx([1.2, 0.9, 0.98]) and list(line.error_y.array) == pytest.approx(
        [0.2, 0.1, 0.08]
    )
    assert (list(star.x), list(diamond.x)) == ([0.01], [1]) and star.marker.symbol == "star"
    assert list(norm.y) == pytest.approx([9, 8.99, 8]) and list(sparse.y) == pytest.approx([0, 0.005, 0.5])
    assert figure.layout.xaxis.type == "log"
    assert "which no choice has seen" in page([study])


def test_confusions_are_counted(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", {"optim.lr": "1"}, 0.5)
    rows = [("cat", "cat"), ("cat", "dog"), ("dog", "dog"), ("dog", "dog")]
    (place / "eval").mkdir()
    with (place / "eval" / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [("sample", "target", "prediction", "probability"), *((i, *row, 0.5) for i, row in enumerate(rows))]
        )
    (drawing,) = [d for d in figures.drawings(only(place)) if d.name.startswith("confusion")]
    (heat,) = drawing.figure.data
    assert [list(row) for row in heat.customdata] == [[1, 1], [0, 2]]
    assert [list(row) for row in heat.z] == [[0.5, 0.5], [0, 1]]
    assert "3 of 4 right" in drawing.note


def test_the_command_that_trains_the_best_again(tmp_path: Path) -> None:
    place = grid(tmp_path / "my sweep")
    (place / "best.yaml").write_text("a: 1\n")
    told = dict(reproduce(only(place)))
    assert told["the best run"] == "llmtrain train optim.lr=0.01 regularization.l2=0"
    assert told["the best, as kept"] == f"llmtrain train --config-dir '{place}' --config-name best"
    assert told["sweep"] == "llmtrain train -m optim.lr=1e-4,1e-2"


class _Elements:
    """What a browser would take for elements of a page, our own code left out."""

    def __init__(self, text: str):
        self.text = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", text, flags=re.S)
        self.text = re.sub(r"<style>.*?</style>", "", self.text, flags=re.S)


def evil(tmp_path: Path) -> Path:
    place = tmp_path / "evil"
    for name, word in (("a", EVIL), ("b", "</script><b>")):
        given = {"model.name": word, "optim.lr": str(ord(name))}
        write_run(place / name, given, float(ord(name)), sample=EVIL, overrides=[f"model={EVIL}"])  # type: ignore[arg-type]
    write_run(place / "c", {"model.name": "c"}, None, state="failed", error=EVIL)
    jobs = [
        ("a", {"model": EVIL, "optim.lr": "1"}),
        ("b", {"model": "</script><b>", "optim.lr": "2"}),
        ("c", {"model": "c", "optim.lr": "3"}),
    ]
    return write_plan(place, jobs, command=[EVIL])


def test_what_is_given_stays_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    text = page([only(evil(tmp_path))])
    left = _Elements(text).text
    assert "<img" not in left and "onerror=alert(1)&gt;" in left
    scripts = re.findall(r"<script[^>]*>", text.replace(EVIL, ""))
    assert text.count(EVIL) == 0
    ours = [tag for tag in scripts if "nonce" in tag or "application/json" in tag]
    assert len(re.findall(r"<script", left)) == len(re.findall(r"</script>", left)) == len(ours)
    assert not re.findall(r"""<[^>]+\b(?:src|href)\s*=\s*["']?(?:https?:)?//""", left)
    assert not re.findall(r"""url\(\s*["']?(?:https?:)?//|@import""", text.partition("</style>")[0])
    assert "default-src 'none'" in text


def test_the_command_writes_a_page_and_pictures(tmp_path: Path, call: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib")
    place = grid(tmp_path / "sweep", seeds=2)
    said = call("report", str(place), "--png", str(tmp_path / "png"))
    assert said.code == 0, said.err
    assert "9 more" not in said.out and "sweep: 18 finished" in said.out and str(place / "report.html") in said.out
    assert (place / "report.html").read_text().startswith("<!doctype html>")
    pictures = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert pictures == ["curves.png", "heatmap.png", "knobs.png", "path-l2.png"]
    assert all((tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    said = call("report", str(place), str(place / "0.01-0-0"), "--out", str(tmp_path / "two.html"))
    assert said.code == 0 and (tmp_path / "two.html").is_file()
    assert call("report", str(place), "--out", str(tmp_path)).code == 2
    assert call("report", str(tmp_path / "nowhere")).code == 2


def test_without_plotly_the_extra_is_named(
    tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "plotly"] + ["plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    said = call("report", str(grid(tmp_path / "sweep")))
    assert said.code == 2 and "llmtrain[report]" in said.err


def test_torch_is_not_needed(tmp_path: Path) -> None:
    code = "import sys; from llmtrain.reports.gather import gather; gather(sys.argv[1:])"
    code += "; from llmtrain.reports import shapes; print({'torch', 'plotly', 'matplotlib'} & {*sys.modules})"
    command = [sys.executable, "-c", code, str(grid(tmp_path / "sweep"))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_words_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.reports.command import complete

    monkeypatch.chdir(tmp_path)
    grid(Path("runs/sweep-a"))
    assert complete("runs/sw") == 0
    assert "runs/sweep-a" in capsys.readouterr().out.split()
    complete("--")
    assert {"--out", "--png"} <= {*capsys.readouterr().out.split()}


def many(place: Path, number: int) -> Path:
    chance, jobs = random.Random(0), []
    for i in range(number):
        given = {f"optim.knob{n}": f"{10 ** chance.uniform(-4, -1):.4g}" for n in range(3)} | {"model": "ab"[i % 2]}
        write_run(place / f"{i}", given, sum(float(given[f"optim.knob{n}"]) * 10**n for n in range(3)), steps=500)
        jobs.append((f"{i}", given))
    return write_plan(place, jobs, kind="search")


@pytest.mark.slow
def test_two_hundred_runs_are_told_in_twenty_seconds(tmp_path: Path) -> None:
    place = many(tmp_path / "many", 200)
    start = time.monotonic()
    study = only(place)
    text = page([study])
    assert time.monotonic() - start < 20
    curve = named(study, "curve-loss").figure
    assert len(curve.data) == 200 and max(len(trace.x) for trace in curve.data) <= 300
    assert len(text) < 12e6


# In a browser


def opened(file: Path, script: str = "", size: str = "1000,1600", dark: bool = False) -> tuple[str, list[str]]:
    """The page as a browser has it after its scripts and this one, and what the console says."""
    text = file.read_text(encoding="utf-8")
    nonce = re.search(r'script nonce="([^"]+)"', text)
    assert BROWSER is not None and nonce is not None
    own = file.with_name("driven.html")
    own.write_text(text.replace("</body>", f'<script nonce="{nonce[1]}">{script}</script></body>'), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--enable-logging=stderr"]
    flags += ["--blink-settings=preferredColorScheme=0"] * dark
    command = [BROWSER, *flags, f"--window-size={size}", "--virtual-time-budget=20000", "--dump-dom", own.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line and "GL Driver" not in line]


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("browsed")
    study = [only(grid(place / "sweep", seeds=2)), only(evil(place)), only(many(place / "many", 30))]
    file = place / "report.html"
    file.write_text(page(study), encoding="utf-8")
    yield file


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_every_figure(browsed: Path, dark: bool) -> None:
    script = """
    setTimeout(() => {
      const divs = [...document.querySelectorAll(".plotly-graph-div")];
      const empty = divs.filter((div) => !div.querySelector("svg.main-svg *"));
      const lines = divs.map((div) => div._fullData.length);
      document.body.dataset.told = JSON.stringify([divs.length, empty.length, lines, document.title,
        document.querySelectorAll("img, [data-title*=Share]").length,
        matchMedia("(prefers-color-scheme: dark)").matches]);
    }, 15000);
    """
    dom, console = opened(browsed, script, dark=dark)
    assert console == []
    told = re.search(r'data-told="([^"]*)"', dom)
    assert told is not None
    divs, empty, lines, title, images, is_dark = json.loads(told[1].replace("&quot;", '"'))
    assert divs > 15 and empty == 0 and min(lines) > 0
    assert (title, images, is_dark) == ("3 studies", 0, dark)
    assert f'data-drawn="{divs}"' in dom


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_sorts_the_table(browsed: Path) -> None:
    script = """
    const table = document.querySelector("#s2 table"), heads = [...table.querySelectorAll("th")];
    const at = heads.findIndex((head) => head.textContent === "val_loss");
    const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[at].dataset.value));
    const seen = [];
    for (let i = 0; i < 2; i++) { heads[at].querySelector("button").click(); seen.push(values()); }
    document.body.dataset.told = JSON.stringify(seen);
    """
    dom, _ = opened(browsed, script)
    told = re.search(r'data-told="([^"]*)"', dom)
    assert told is not None
    up, down = json.loads(told[1])
    assert up == sorted(up) and down == sorted(up, reverse=True) and len({*up}) > 10


def test_the_page_is_shipped() -> None:
    spec = importlib.util.find_spec("llmtrain.reports")
    assert spec is not None and spec.origin is not None
    assert {"page.html", "page.css", "page.js"} <= {path.name for path in Path(spec.origin).parent.iterdir()}
