"""What there is to say of every knob, read from its one declaration.

Meaning and range come from signatures and docstrings, values from YAML. Nothing is imported that is
described, so nobody waits for torch.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from llmtrain.build import GROUPS, Part, find
from llmtrain.compose import add_resolvers, config_folder
from llmtrain.config import COMMANDS, TOLD, RunConfig, knobs_of
from llmtrain.folder import flat
from llmtrain.knobs import ConfigError, Misfit, describe, nearest


@dataclass(frozen=True)
class Knob:
    """One knob, as people are told of it.

    Attributes:
        key: Such as `optim.lr`.
        kind: Its type and range in words.
        meaning: What it is.
        raised: What raising it does, or the meaning of each choice.
        lowered: What lowering it does.
        rest: What else there is to say.
    """

    key: str
    kind: str
    meaning: str
    raised: str
    lowered: str
    rest: str


@dataclass(frozen=True)
class Topic:
    """An option of a group, or a closed section: its knobs, their values, and where they are written."""

    title: str
    summary: str
    knobs: Mapping[str, Knob]
    values: Mapping[str, Any]
    file: Path
    declared: str


@dataclass(frozen=True)
class Experiment:
    """An overlay on a whole config: what its comment says, the options it chooses and the values it gives, by key."""

    about: str
    options: Mapping[str, str]
    values: Mapping[str, Any]
    file: Path


def options(group: str) -> list[str]:
    """The options of a group, or of `experiment`: its YAML files."""
    return sorted(path.stem for path in _folder(group).glob("*.yaml"))


def _folder(group: str) -> Path:
    """Where the options of a group lie."""
    return config_folder() / ((group in GROUPS and GROUPS[group].folder) or group)


def option_values(group: str, option: str) -> dict[str, Any]:
    """The values that an option's YAML file gives, those of the options it inherits from among them."""
    own = _read(_folder(group) / f"{option}.yaml")
    parents = [entry for entry in own.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    inherited: dict[str, Any] = {}
    for parent in parents:
        inherited |= option_values(group, parent)
    return inherited | own


def option_topic(group: str, option: str) -> Topic:
    """What there is to say of `group=option`.

    Raises:
        ConfigError: If there is no such group or option.
    """
    if group not in GROUPS:
        raise ConfigError(
            [Misfit(group, option, "no such group; there are " + ", ".join(GROUPS), nearest(group, GROUPS))]
        )
    file = _folder(group) / f"{option}.yaml"
    if option not in (known := options(group)):
        raise ConfigError(
            [Misfit(group, option, "no such option; there are " + ", ".join(known), nearest(option, known))]
        )
    values = option_values(group, option)
    part = find(group, values["name"])
    summary = re.split(r"\n\s*(?:Args|Returns|Raises):", part.doc)[0].strip()
    return Topic(f"{group}={option}", summary, part_knobs(part), values, file, f"{part.module}.{part.name}")


def default_option(group: str) -> str | None:
    """The option that a run takes where none of a group is named; None where that is no group of every run."""
    entries = [entry for entry in _read(config_folder() / "config.yaml")["defaults"] if isinstance(entry, dict)]
    chosen = {key.rpartition("@")[2]: option for entry in entries for key, option in entry.items()}
    return chosen.get(group)


def in_words(value: Any) -> str:
    """A value of a YAML file as people write it: `${over:1,${oc.select:model.width,8}}` is 1 / (model.width or 8)."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text, before = str(value), ""
    while text != before:
        before, text = text, re.sub(r"\$\{([^${}]*)\}", _said, text)
    return str(value) if "\0" in text else text


def with_default_model(group: str, option: str, name: str) -> Any:
    """What a value that follows the model comes to with the one that a run takes by itself; None where it does not."""
    values = option_values(group, option)
    if "model." not in str(values.get(name)) or "${" not in str(values[name]):
        return None
    add_resolvers()
    model = option_values("model", default_option("model") or "")
    try:
        return OmegaConf.select(OmegaConf.create({"model": model, group: values}), f"{group}.{name}")
    except InterpolationResolutionError:  # that model has no such knob
        return None


def _said(found: re.Match[str]) -> str:
    """One interpolation without others in it, in words; a text with `\\0` in it if there are none."""
    resolver, colon, rest = found[1].partition(":")
    given = [word.strip().lstrip(".") for word in rest.split(",")]
    if not colon:
        return resolver.lstrip(".")
    if resolver == "oc.select" and len(given) == 2:
        return f"{given[0]} or {given[1]}"
    if resolver == "over" and len(given) == 2:
        return " / ".join(f"({word})" if " " in word else word for word in given)
    if resolver == "unless":
        return f"{given[0]}, unless {' or '.join(given[1:])} is given"
    return "\0"


def experiment_topic(name: str) -> Experiment:
    """What there is to say of `experiment=name`.

    Raises:
        ConfigError: If there is no such experiment.
    """
    known = options("experiment")
    if name not in known:
        rule = "no such experiment; there are " + ", ".join(known)
        raise ConfigError([Misfit("experiment", name, rule, nearest(name, known))])
    file = _folder("experiment") / f"{name}.yaml"
    values = _read(file)
    entries = [entry for entry in values.pop("defaults", []) if isinstance(entry, dict)]
    chosen = {key.rpartition("/")[2].rpartition("@")[2]: option for entry in entries for key, option in entry.items()}
    return Experiment(comment(file), chosen, flat(values), file)


def comment(file: Path) -> str:
    """What a YAML file's comment at its top says, but for Hydra's own line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines if not line.startswith("# @package"))


def section_topic(name: str) -> Topic:
    """What there is to say of a closed section of a config."""
    own = {"sample": "sample/default.yaml", "hydra.sweeper": "hydra/sweeper/optuna.yaml"}
    if name in own:
        file = config_folder() / own[name]
        return _topic_of(name, TOLD[name], file, _read(file))
    file = config_folder() / "config.yaml"
    return _topic_of(name, TOLD[name], file, _read(file)[name])


def command_topic(name: str) -> Topic:
    """What there is to say of the settings of `llmtrain eval` or `llmtrain generate`."""
    file = config_folder() / f"{name}.yaml"
    sample = _read(config_folder() / "sample" / "default.yaml")
    return _topic_of(name, COMMANDS[name], file, sample | _read(file))


def _topic_of(name: str, section: type, file: Path, values: Mapping[str, Any]) -> Topic:
    doc = inspect.getdoc(section) or ""
    every = "\n\n".join(inspect.getdoc(c) or "" for c in section.__mro__[:-1])
    knobs = _knobs(name, knobs_of(section), every)
    return Topic(name, doc.split("\n\n")[0], knobs, values, file, f"llmtrain.config.{section.__name__}")


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def part_knobs(part: Part) -> dict[str, Knob]:
    """The knobs of a part."""
    return _knobs(part.group, part.knobs, part.doc)


def resume_knob() -> Knob:
    """The one knob that stands in no section."""
    return _knobs("", {"resume": str}, inspect.getdoc(RunConfig) or "")["resume"]


def _knobs(prefix: str, schema: Mapping[str, Any], doc: str) -> dict[str, Knob]:
    from docstring_parser import google

    described: dict[str, str] = {}
    for text in re.split(r"(?=^Args:)", doc, flags=re.M)[1:] or [""]:
        described |= {p.arg_name: p.description or "" for p in google.parse("x\n\n" + text).params}
    return {name: _knob(f"{prefix}.{name}".lstrip("."), kind, described.get(name, "")) for name, kind in schema.items()}


def _knob(key: str, annotation: Any, text: str) -> Knob:
    """Splits `Meaning. Raise: this. Lower: that.` into its parts."""
    text = " ".join(text.split())
    raised, lowered = r"Raise: (?P<raised>.*?(?<! al)\.)", r"(?:\s*Lower: (?P<lowered>.*?(?<! al)\.))?"
    pattern = rf"^(?P<meaning>.*?){raised}{lowered}(?=\s+[A-Z0-9n]|$)(?P<rest>.*)$"
    match = re.match(pattern, text)
    if match is None:
        return Knob(key, describe(annotation), text, "", "", "")
    found = {name: (value or "").strip() for name, value in match.groupdict().items()}
    return Knob(key, describe(annotation), found["meaning"], found["raised"], found["lowered"], found["rest"])
