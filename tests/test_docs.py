"""The documentation's worked example, run as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml
from runs import lines, llmtrain, write_text

from llmtrain.build import GROUPS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "adding-a-part.md").read_text(encoding="utf-8")


def test_the_worked_example_trains_and_its_mistake_is_told(tmp_path: Path) -> None:
    files = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S))
    assert set(files) == {"mypkg/parts.py", "myconf/model/gated_conv.yaml"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    good, bad = (shlex.split(line)[1:] for line in re.findall(r"```sh\n(.*?)\n```", PAGE))
    here = [f"data.path={write_text(tmp_path)}", "data=text", "tokenizer=byte", "run.name=example", "log.every=5"]
    code, text = llmtrain([*good, *here], tmp_path)
    assert code == 0, text
    losses = [line["loss"] for line in lines(tmp_path / "runs/example") if "loss" in line]
    assert losses[-1] < losses[0] - 1
    baseline = json.loads((tmp_path / "runs/example/result.json").read_text())["baseline"]
    assert losses[-1] < baseline["loss"]
    given = yaml.safe_load(files["myconf/model/gated_conv.yaml"])
    config = yaml.safe_load((tmp_path / "runs/example/config.yaml").read_text())
    assert config["model"] == given
    code, text = llmtrain(bad, tmp_path)
    assert code == 2
    assert "model.kernal" in text and "Did you mean" in text


def test_the_table_of_groups_is_whole() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.M)
    given = {group: tuple(re.findall(r"`(\w+)`", what)) for group, what in rows}
    for group, about in GROUPS.items():
        assert given[group][: len(about.given)] == about.given, group
    assert set(given) == set(GROUPS)
