from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from llmtrain import inspection

OWN = ("run.cache=cache", "tokenizer=byte")


def asked(call: Callable[..., Any], *overrides: str) -> dict[str, Any]:
    said = call("data", "inspect", "--json", *overrides)
    assert (said.code, said.err) == (0, "")
    return json.loads(said.out)


def told(call: Callable[..., Any], *overrides: str) -> str:
    """What it prints without a terminal, held to its form."""
    said = call("data", "inspect", *overrides)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert "\x1b" not in said.out and max(map(len, lines)) <= 100
    assert [line for line in lines if line != line.rstrip()] == []
    return said.out


def missing(patterns: list[str], out: str) -> list[str]:
    return [pattern for pattern in patterns if not re.search(f"^{pattern}$", out, re.M)]


@pytest.fixture
def mails(tmp_path: Path) -> tuple[str, ...]:
    """Texts with labels: 6 of ham and 2 of spam to learn from; some twice, some cut alike, one with two labels."""
    train = [("red", "ham"), ("red", "ham"), ("blue", "ham"), ("blue", "spam"), ("a\tb", "ham"), ("green", "ham")]
    train += [("abcdefghij", "ham"), ("[bold]x", "spam")]
    sides = {
        "train": train,
        "val": [("abcdefgxyz", "ham"), ("new", "spam")],
        "test": [("other", "ham"), ("some", "spam")],
    }
    for name, rows in sides.items():
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [f"data.{knob}={tmp_path / name}.jsonl" for knob, name in (("path", "train"), ("val_path", "val"))]
    given = (*paths, f"data.test_path={tmp_path / 'test'}.jsonl", "data.context=8")
    return ("data=labelled_text", *given, *OWN)


def test_labelled_text_for_a_program(call, mails: tuple[str, ...]):
    found = asked(call, *mails)
    splits = found["splits"]
    assert {name: split["classes"] for name, split in splits.items()} == {
        "train": {"ham": 6, "spam": 2},
        "val": {"ham": 1, "spam": 1},
        "test": {"ham": 1, "spam": 1},
    }
    lengths = [
        1 + min(len(text), 7) for text in ("red", "red", "blue", "blue", "a\tb", "green", "abcdefghij", "[bold]x")
    ]
    assert splits["train"]["tokens"] == sum(lengths)
    assert splits["train"]["lengths"]["long"] == 2 and splits["train"]["lengths"]["longest"] == 8
    assert splits["train"]["lengths"]["histogram"]["counts"] == [lengths.count(length) for length in range(1, 9)]
    assert (found["bytes_per_token"], found["spec"]["vocab"]) == (1.0, 259)
    assert found["left_out"] == {"cut": 2}
    assert found["copies"]["within"] == {"train": 2, "val": 0, "test": 0}
    assert found["copies"]["across"] == {"val in train": 1, "test in train": 0, "test in val": 0}
    assert found["copies"]["conflicts"] == 1
    nats = -(math.log(0.7) + math.log(0.3)) / 2
    beaten = {"by": "class frequencies", "loss": pytest.approx(nats), "accuracy": 0.5, "f1_macro": pytest.approx(1 / 3)}
    assert found["baseline"] == beaten
    examples = found["examples"]["test"]
    assert [(e["target"], e["inputs"].endswith(text)) for e, text in zip(examples, ("other", "some"), strict=True)] == [
        ("ham", True),
        ("spam", True),
    ]


def test_labelled_text_for_people(call, mails: tuple[str, ...]):
    out = told(call, *mails, "augment=text", "augment.dropout=0.5")
    expected = [
        r"data=labelled_text",
        r"its target +2 classes",
        r"vocabulary +260, tokenizer byte",  # text needs a mask token
        r"bytes per token +1.00",
        r"to beat +guessing by class frequencies: loss 0.7803, accuracy 0.5, f1_macro 0.3333",
        r"train +8 +66.7% +44",
        r"2 +longer than the context: the end is cut off \(16.7%\)",
        r"within train +2 +of 8 samples: copies of others there",
        r"val in train +1 +of 2 samples of val are in train as well",
        r"conflicts +1 +different samples occur with more than one label",
        r"ham +#{12} +6 +75.0% +#{12} +1 +50.0% +#{12} +1 +50.0%",
        r"spam +#{4} +2 +25.0% +#{12} +1 +50.0% +#{12} +1 +50.0%",
        r"train +8 +5.5 +5 +8 +25.0%",
        r"8 +#{8} +2 +#{12} +1 +0",
        r"samples of train, and what becomes of them in the first epochs",
        r" +epoch 2 +<\|begin\|>.*",
        r"0 +input +<\|begin\|>other",
    ]
    assert missing(expected, out) == []


def test_text_to_go_on_with(call, tmp_path: Path):
    documents = ["abcd" * 10, "same", "hello \x1b[31mworld", *(f"{i}" * 20 for i in range(10, 40))]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "notes.jsonl").write_text(lines + json.dumps({"text": "same"}) + "\nbroken\n")
    given = (
        "data=text",
        f"data.path={tmp_path}/*.jsonl",
        "data.context=16",
        "eval.val_fraction=0.2",
        "data.errors=skip",
        *OWN,
    )
    found = asked(call, *given)
    splits, copies = found["splits"], found["copies"]
    assert sum(copies["looked"].values()) == 34 and sum(copies["within"].values()) == 1
    assert copies["across"] == {"val in train": 0}  # equal ones are on one side
    assert splits["train"]["tokens"] + splits["val"]["tokens"] == 34 + sum(map(len, [*documents, "same"]))
    assert found["baseline"]["by"] == "unigram frequencies"
    assert found["left_out"] == {"broken": 1} and found["bytes_per_token"] == pytest.approx(1, rel=0.1)
    out = told(call, *given)
    expected = [
        r"files +SHA-256 [0-9a-f]{64}",
        r"its target +at each token the next one",
        r"1 +broken: left out or mended, as data.errors says",
        r"passages +0 +of \d+ passages of 32 tokens of val stand in train, word for word \(0.0%\)",
        r"4 to 7 .*#+ +2.*",
        r"Nothing is cut: what is longer than a sample goes on in the next one.",
        r" +target +the same, one token on; the last is .+",
    ]
    assert missing(expected, out) == []


@pytest.fixture
def houses(tmp_path: Path) -> str:
    draw = np.random.default_rng(0)
    rows = [
        f"{area:.1f},{place},{price:.0f}"
        for area, place, price in zip(
            range(50, 110), draw.choice(["[red]", "b"], 60), draw.uniform(1e3, 9e3, 60), strict=True
        )
    ]
    file = tmp_path / "houses.csv"
    file.write_text("\n".join(["area,place,price", *rows, rows[0], rows[0]]) + "\n")
    return str(file)  # fmt: skip


def test_tables_with_quantities(call, houses: str):
    given = ("data=table", f"data.path={houses}", "data.label_column=price", "data.kind=regression", *OWN)
    found = asked(call, *given)  # the usual task asks for classes: that is for train to tell
    assert [feature["name"] for feature in found["features"]] == ["area", "place = [red]", "place = b"]
    assert found["baseline"] is None
    assert found["features"][0]["mean"] == pytest.approx(0, abs=1e-6)
    assert sum(found["copies"]["within"].values()) == 2
    price = found["splits"]["train"]["quantities"][0]
    assert price["name"] == "price" and 1e3 < price["quantiles"][0] < price["mean"] < price["quantiles"][-1] < 9e3
    out = told(call, *given, "task=regression")
    expected = [
        r"a sample +3 features",
        r"its target +1 number",
        r"to beat +guessing by the mean: loss \d.\d+, rmse .*, mae .*, r2 .*",
        r"price, in its own unit",
        r"area +0.000 +1.000 +-\d.\d{3} +\d.\d{3}",
        r"place = \[red\] .*",
        r" +target +price \d+",
    ]
    assert missing(expected, out) == []
    assert call("train", *given).code == 2


def test_digits_are_drawn_in_characters_with_what_becomes_of_them(call):
    found = asked(call, "data=digits", "eval.val_fraction=0.1")
    assert sum(sum(split["classes"].values()) for split in found["splits"].values()) == 1797
    assert "inputs" not in found["examples"]["train"][0]
    plain, varied = told(call, "data=digits"), told(call, "data=digits", "augment=light")
    assert len(re.findall(r"epoch 1 +epoch 2", varied)) == 3 and "epoch" not in plain
    page = plain.split("samples of train\n")[1].split("samples of val")[0].splitlines()
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    number = page[0].split()[1]
    drawn = ["".join(" .:-=+*#%@"[int(v / 16 * 9 + 0.5)] * 2 for v in row) for row in pixels.reshape(-1, 8)]
    shown = [line[:16].ljust(16) for line in page[1:9]]
    at = [i for i in range(1797) if drawn[8 * i : 8 * i + 8] == shown]
    assert len(at) == 1 and str(classes[at[0]]) == number


@pytest.mark.parametrize(("colours", "blocks"), [("truecolor", True), ("standard", False), (None, False)])
def test_a_terminal_of_many_colours_gets_half_blocks(colours: str | None, blocks: bool):
    console = Console(file=io.StringIO(), force_terminal=colours is not None, color_system=colours)
    image = np.zeros((3, 40, 20))
    image[0, :2], image[2, 2:4] = 1, 1  # a red row above a blue one, once it is half as large
    text = inspection._picture(image, console)
    lines = text.plain.splitlines()
    assert ("▀" in text.plain) == blocks
    assert (len(lines), len(lines[0])) == (20, 20)
    if blocks:
        assert "rgb(255,0,0)" in str(text.spans[0].style) or "rgb(255,0,0)" in str(text.spans[1].style)


@pytest.mark.parametrize("more", [("data=digits",), ("data=digits", "augment=light"), ("data=diabetes",)], ids=" ".join)
def test_a_picture_is_written_and_nothing_else(call, more: tuple[str, ...]):
    from PIL import Image

    call("data", "inspect", *more, "--png", "shown.png", *OWN)
    assert [path.name for path in Path.cwd().iterdir()] == ["shown.png"]
    with Image.open("shown.png") as picture:
        assert picture.format == "PNG" and picture.width > 400
        colours = picture.convert("L").getcolors(1 << 20)
        assert colours is not None and len(colours) > 5
    said = call("data", "inspect", *more, "--png", "nowhere/shown.png", *OWN)
    assert said.code == 2 and "cannot be written" in said.err


def test_pictures_of_counts_need_matplotlib(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = call("data", "inspect", "data=wine", "--png", "x.png")
    assert (said.code, said.err) == (2, "llmtrain data: --png needs matplotlib: pip install 'llmtrain[plots]'\n")


def test_what_has_nothing_to_do_with_data_may_be_wrong(call):
    assert asked(call, "data=wine", "optim.lr=-1", "model=cnn", "train.batch_size=7", "train.accumulate=2")
    said = call("data", "inspect", "data=table", "data.delimiter=ab", "eval.val_fraction=2", "optim.lr=-1")
    assert (said.code, said.out) == (2, "")
    assert re.findall(r"^  (\S+) = ", said.err, re.M) == ["data.path", "data.label_column", "eval.val_fraction"]
    said = call("data", "inspect", "data=wine", "augment=light", "dta=x")
    assert said.code == 2 and "augment" in said.err and "dta" in said.err


def test_what_there_is(call):
    usage = call("data")
    assert usage.code == 0 and usage.out.startswith("usage: llmtrain data inspect ")
    assert usage.out == call("data", "--help").out == call("data", "inspect", "--help").out
    said = call("data", "inspct")
    assert (said.code, said.out) == (2, "") and "there is inspect" in said.err
    assert "goes with train" in call("data", "inspect", "-m", "data=wine").err
    assert call("data", "inspect", "data=wine", "--cfg", "job", "-p", "data").out.endswith("name: wine\n")


def test_the_library_of_python_is_looked_at(call):
    out = told(call, "data=docs", "tokenizer=byte", "run.cache=cache", "model.context=64")
    assert missing([r"a sample +64 tokens", r"val +[\d,]+ +\d.\d% +[\d,]+", r"val in train +0 .*"], out) == []
