from __future__ import annotations

import inspect
import subprocess
import sys
import typing
import uuid
from pathlib import Path
from textwrap import dedent
from typing import Literal

import pytest

from llmtrain.build import GROUPS, SCHEDULES, Choice, Part, choose, find, parts, validate
from llmtrain.knobs import ConfigError, Count, Fraction, Misfit, NonNegative, Positive

OPTIMS = ", ".join(parts("optim"))

EVERY_PART = [part for group in GROUPS for part in parts(group).values()]


def differences(part: Part) -> list[str]:
    """Where what is read from a part's source is not what its function really takes."""
    function = part.load()
    arguments = inspect.signature(function).parameters.values()
    hints = typing.get_type_hints(function, include_extras=True)
    given = tuple(a.name for a in arguments if a.kind is a.POSITIONAL_OR_KEYWORD)
    knobs = {a.name: hints.get(a.name) for a in arguments if a.kind is a.KEYWORD_ONLY}
    about = GROUPS[part.group]
    found = [] if given == part.given and given in (about.given, about.given + about.more) else [f"is given {given}"]
    found += [] if len(given) + len(knobs) == len(arguments) else ["takes more than its signature names"]
    found += [] if list(knobs) == list(part.knobs) else [f"has {list(knobs)}, read {list(part.knobs)}"]
    found += [f"{k}: is {t}, read {part.knobs.get(k)}" for k, t in knobs.items() if part.knobs.get(k) != t]
    found += [f"{a.name}: its default belongs into YAML" for a in arguments if a.default is not a.empty]
    found += [] if (inspect.getdoc(function) or "") == inspect.cleandoc(part.doc) else ["another docstring"]
    return found


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an importable package of the user's own, as yet empty; its name is new in every test."""
    folder = tmp_path / f"own_{uuid.uuid4().hex}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def write(package: Path, source: str) -> str:
    """Writes `parts.py` into the package; returns its module's name."""
    (package / "parts.py").write_text(dedent(source))
    return f"{package.name}.parts"


SIGNUM = '''
    from typing import Literal
    from llmtrain.knobs import Fraction, Positive

    def signum(params, *, lr: Positive, momentum: Fraction, how: Literal["soft", "hard"], wide: bool | None):
        """Steps of one size."""
        return params, lr, momentum, how, wide
'''


@pytest.mark.parametrize("part", EVERY_PART, ids=lambda part: f"{part.group}={part.name}")
def test_what_is_read_from_the_source_is_what_the_function_takes(part: Part):
    assert differences(part) == []


def test_every_group_has_parts():
    assert {part.group for part in EVERY_PART} == set(GROUPS)


def test_a_part_that_reads_otherwise_than_it_is_gets_caught(package: Path):
    module = write(
        package,
        """
        from llmtrain.knobs import NonNegative as Positive

        def sly(params, *, lr: Positive, eps: float = 1.0):
            return params
        """,
    )
    found = differences(find("optim", f"{module}:sly", [package.name]))
    assert found == [f"lr: is {NonNegative}, read {Positive}", "eps: its default belongs into YAML"]


def test_parts_are_read_without_importing_anything_heavy():
    code = "import sys; from llmtrain.build import GROUPS, parts; [parts(g) for g in GROUPS]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "llmtrain.build" in loaded
    assert not {"torch", "numpy", "hydra", "pydantic", "llmtrain.optim.adaptive"}.intersection(loaded)


def test_a_part_of_ones_own_runs_only_when_trusted(package: Path):
    module = write(package, f"open({str(package / 'ran')!r}, 'w').close()\n" + dedent(SIGNUM))
    for trust in ([], ["other"], [module], [f"{package.name}.other"]):
        with pytest.raises(ConfigError) as caught:
            find("optim", f"{module}:signum", trust)
        rule = f"is code from outside; it runs only with --trust {package.name}"
        assert caught.value.misfits == [Misfit("optim.name", f"{module}:signum", rule)]
    part = find("optim", f"{module}:signum", [package.name])
    assert dict(part.knobs) == {
        "lr": Positive,
        "momentum": Fraction,
        "how": Literal["soft", "hard"],
        "wide": bool | None,
    }
    assert part.name == f"{module}:signum"
    assert not (package / "ran").exists()  # finding it has run nothing
    choice = Choice(part, {"lr": 1.0, "momentum": 0.5, "how": "soft", "wide": None})
    assert choice.build("p") == choice.bind()("p") == ("p", 1.0, 0.5, "soft", None)
    assert (package / "ran").exists()


def test_a_part_is_given_what_it_takes_and_no_more(package: Path):
    module = write(
        package,
        """
        def short(step, steps, *, top: float): return step, steps, top
        def long(step, steps, losses, *, top: float): return step, steps, losses, top
        def other(step, steps, gains, *, top: float): return None
        """,
    )
    for group in SCHEDULES:
        part = {name: find(group, f"{module}:{name}", [package.name]) for name in ("short", "long")}
        assert [part[name].given for name in part] == [("step", "steps"), ("step", "steps", "losses")]
        choice = {name: Choice(part[name], {"top": 1.0}) for name in part}
        assert choice["short"].build(1, 2, [3.0]) == choice["short"].bind()(1, 2, [3.0]) == (1, 2, 1.0)
        assert choice["short"].bind()(1, 2) == (1, 2, 1.0)
        assert choice["long"].build(1, 2, [3.0]) == choice["long"].bind()(1, 2, [3.0]) == (1, 2, [3.0], 1.0)
        with pytest.raises(ConfigError, match=r"has no public function other\(step, steps, \*, \.\.\.\)"):
            find(group, f"{module}:other", [package.name])


def test_groups_without_a_folder_share_the_parts_of_the_one_they_name():
    for group in SCHEDULES[1:]:
        assert GROUPS[group].folder == SCHEDULES[0] == "schedule"
        assert parts(group).keys() == parts("schedule").keys()
        assert {part.group for part in parts(group).values()} == {group}


@pytest.mark.parametrize(
    ("name", "rule", "suggestion"),
    [
        ("adamm", f"no such part in llmtrain.optim; there are {OPTIMS}", "adam"),
        ("os.system", f"no such part in llmtrain.optim; there are {OPTIMS}", None),
        ("groups", f"no such part in llmtrain.optim; there are {OPTIMS}", None),
        ("llmtrain.optim.sgd:sgd", "is code from outside; it runs only with --trust llmtrain", None),
        ("os:system", "is code from outside; it runs only with --trust os", None),
        (":system", "is code from outside; it runs only with --trust ", None),
        (None, f"must name a part: {OPTIMS}", None),
        (["adam"], f"must name a part: {OPTIMS}", None),
    ],
)
def test_a_name_that_is_no_part_is_told(name: object, rule: str, suggestion: str | None):
    with pytest.raises(ConfigError) as caught:
        find("optim", name)
    assert caught.value.misfits == [Misfit("optim.name", name, rule, suggestion)]


@pytest.mark.parametrize(
    ("source", "function", "rule"),
    [
        ("def step(params, *, lr: float): pass", "stepp", "has no public function stepp(params, *, ...)"),
        ("def step(weights, *, lr: float): pass", "step", "has no public function step(params, *, ...)"),
        ("def _step(params, *, lr: float): pass", "_step", "has no public function _step(params, *, ...)"),
        ("def step(params, *, lr): pass", "step", "cannot be read: lr has no type; a knob's type is its schema"),
        (
            "def step(params, *, lr: Strange): pass",
            "step",
            "cannot be read: lr: Strange: name 'Strange' is not defined",
        ),
        (
            "def step(params, *, lr: open('ran', 'w')): pass",
            "step",
            "cannot be read: lr: open('ran', 'w'): name 'open'",
        ),
        ("def step(params, *, lr:", "step", "cannot be read: "),
    ],
)
def test_a_part_of_ones_own_that_cannot_be_used_is_told(package: Path, source: str, function: str, rule: str):
    name = f"{write(package, source)}:{function}"
    with pytest.raises(ConfigError) as caught:
        find("optim", name, [package.name])
    [misfit] = caught.value.misfits
    assert (misfit.key, misfit.value) == ("optim.name", name)
    assert rule in misfit.rule
    assert misfit.suggestion == ("step" if function == "stepp" else None)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["no_such_package:step", "no_such_package.parts:step", "json.nothing:step"])
def test_a_module_that_is_not_there_is_told(name: str):
    with pytest.raises(ConfigError) as caught:
        find("optim", name, [name.split(":")[0].split(".")[0]])
    [misfit] = caught.value.misfits
    assert (misfit.key, misfit.value) == ("optim.name", name)
    assert misfit.rule.startswith("cannot be read: ")


def test_a_type_may_be_quoted(package: Path):
    module = write(package, "def step(params, *, lr: 'Positive | None'): pass")
    assert dict(find("optim", f"{module}:step", [package.name]).knobs) == {"lr": Positive | None}


SCHEMA = {
    "count": Count,
    "share": Fraction,
    "mode": Literal["off", "block"],
    "flag": bool,
    "text": str,
    "maybe": Count | None,
    "picked": Count | Literal["auto"] | None,
}
GOOD = {"count": 1, "share": 0.5, "mode": "off", "flag": True, "text": "a", "maybe": None, "picked": "auto"}


@pytest.mark.parametrize(
    ("knob", "value", "taken"),
    [
        ("count", 1e6, 1000000),
        ("count", "7", 7),
        ("share", 0, 0.0),
        ("share", "5e-4", 5e-4),
        ("share", "2e-5", 2e-5),
        ("text", 3, "3"),
        ("text", "", ""),
        ("maybe", 2.0, 2),
        ("picked", "4", 4),
        ("flag", "false", False),
    ],
)
def test_a_value_is_converted_where_nothing_is_lost(knob: str, value: object, taken: object):
    values, misfits = validate(SCHEMA, GOOD | {knob: value})
    assert misfits == []
    assert values == GOOD | {knob: taken}
    assert type(values[knob]) is type(taken)


@pytest.mark.parametrize(
    ("knob", "value", "rule", "suggestion"),
    [
        ("count", 1.5, "must be integer >= 1", None),
        ("count", True, "must be integer >= 1", None),
        ("count", None, "must be integer >= 1", None),
        ("count", 2**63, "must be integer >= 1 and fit in 64 bits", None),
        ("share", False, "must be number >= 0 and < 1", None),
        ("maybe", True, "must be integer >= 1 or null", None),
        ("mode", "blok", "must be one of off, block", "block"),
        ("picked", "atuo", "must be integer >= 1 or auto or null", "auto"),
        ("picked", 0, "must be integer >= 1 or auto or null", None),
        ("mode", None, "must be one of off, block", None),
        ("flag", "maybe", "must be true or false", None),
        ("text", True, "must be text", None),
        ("text", None, "must be text", None),
        ("text", ["a"], "must be text", None),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_its_rule(knob: str, value: object, rule: str, suggestion: str | None):
    assert validate(SCHEMA, GOOD | {knob: value})[1] == [Misfit(knob, value, rule, suggestion)]


def test_all_misfits_come_together_unknown_and_missing_ones_too():
    given = GOOD | {"count": 0, "share": 1, "cuont": 3}
    del given["text"]
    values, misfits = validate(SCHEMA, given)
    assert {m.key: (m.value, m.suggestion) for m in misfits} == {
        "count": (0, None),
        "share": (1, None),
        "text": ("(missing)", None),
        "cuont": (3, "count"),
    }
    assert values == given


def test_a_part_with_a_stray_knob_can_still_be_asked_for_its_own_rules():
    section = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False}
    choice, misfits = choose("optim", section | {"momentun": 0.9})
    assert choice is not None
    assert [(m.key, m.suggestion) for m in misfits] == [("optim.momentun", "momentum")]
    assert choice.values == {k: v for k, v in section.items() if k != "name"}
    choice, misfits = choose("optim", section | {"momentum": 1})
    assert choice is None
    assert [m.key for m in misfits] == ["optim.momentum"]
    assert choose("optim", 5) == (None, [Misfit("optim", 5, "must be a section; choose one with optim=NAME")])
