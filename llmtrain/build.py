"""From a name in a config to a part that can be called: find it, read its schema, check values, load it.

A part is one public function in its group's package. What the run passes is positional and the same for
the whole group; what YAML passes is keyword-only. So the signature is the schema, and it is read from the
source without importing it: neither `llmtrain explain` nor a misspelt knob waits for torch, and nothing
that a config names runs before the config has been checked.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llmtrain import knobs as knob_types
from llmtrain.knobs import ConfigError, Misfit, describe, nearest, unique
from llmtrain.synonyms import meant

_MANY = 20
"""Knobs that are named one by one where a misspelt one has a near neighbour."""


@dataclass(frozen=True)
class Group:
    """A kind of part: where its functions live, what the run gives each of them, and what it is for.

    Attributes:
        module: The package or module of its functions.
        given: What the run gives each of them.
        meaning: What it is for.
        more: What the run gives beside that to those that take it.
        folder: The group whose options it has, where it has none of its own.
    """

    module: str
    given: tuple[str, ...]
    meaning: str
    more: tuple[str, ...] = ()
    folder: str | None = None


def _schedule(meaning: str, folder: str | None = None) -> Group:
    return Group("llmtrain.schedules", ("step", "steps"), meaning, ("losses",), folder)


GROUPS = {
    "model": Group("llmtrain.models", ("data",), "the architecture"),
    "optim": Group("llmtrain.optim", ("params",), "how gradients become steps"),
    "loss": Group("llmtrain.losses", ("outputs", "targets"), "what is minimized; the task picks one until you name it"),
    "regularization": Group("llmtrain.regularization", ("model", "params"), "what keeps weights small"),
    "schedule": _schedule("how the learning rate moves over the run"),
    "momentum_schedule": _schedule("what multiplies the optimizer's momentum over the run", "schedule"),
    "weight_decay_schedule": _schedule("what multiplies the decay of weights over the run", "schedule"),
    "batch_schedule": _schedule("what multiplies the samples of a step over the run", "schedule"),
    "precision": Group("llmtrain.precision", ("device",), "number formats of the arithmetic"),
    "data": Group("llmtrain.data", ("setup",), "what is learned from"),
    "augment": Group("llmtrain.augment", ("data",), "how training samples are varied", ("tokenizer",)),
    "tokenizer": Group("llmtrain.tokenizer", ("texts",), "how text becomes numbers"),
    "task": Group("llmtrain.tasks", ("spec", "tokenizer"), "what is asked of the model"),
    "init": Group("llmtrain.init", ("model",), "the weights before the first step"),
}
SCHEDULES = tuple(name for name, group in GROUPS.items() if group.module == GROUPS["schedule"].module)
"""The groups of what moves over a run, the learning rate first."""


@dataclass(frozen=True)
class Part:
    """What is known of a part from its source alone.

    Attributes:
        group: The config group, such as `optim`.
        name: What `name:` in its YAML says: a function of the group's package, or `package.module:function`.
        module: The dotted name of the module that defines it.
        knobs: Its keyword-only arguments and their types, in the order of the signature.
        doc: Its docstring.
        given: Its positional arguments: what the run gives it.
    """

    group: str
    name: str
    module: str
    knobs: Mapping[str, Any]
    doc: str
    given: tuple[str, ...]

    def load(self) -> Callable[..., Any]:
        """Imports the part's module and returns its function."""
        return getattr(importlib.import_module(self.module), self.name.rsplit(":", 1)[-1])


@dataclass(frozen=True)
class Choice:
    """A part together with the checked values of its knobs."""

    part: Part
    values: Mapping[str, Any]

    def build(self, *given: Any) -> Any:
        """Calls the part with what the run gives, as far as it takes that, and what the config says."""
        return self.bind()(*given)

    def bind(self) -> Callable[..., Any]:
        """The part as a function of what the run gives alone: `bind()(*given) == build(*given)`."""
        function, values, taken = self.part.load(), dict(self.values), len(self.part.given)
        return lambda *given: function(*given[:taken], **values)


def parts(group: str) -> dict[str, Part]:
    """Every part of a group, by name."""
    return {part.name: part for part in _parts_in(GROUPS[group].module, group)}


def find(group: str, name: Any, trust: Sequence[str] = ()) -> Part:
    """The part that a config's `name` stands for.

    Args:
        group: The config group.
        name: A function of the group's package, or `package.module:function` of a trusted package.
        trust: The packages outside llmtrain whose code may run.

    Raises:
        ConfigError: If there is none of that name, or it lies in a package that is not trusted.
    """
    key = f"{group}.name"
    if not isinstance(name, str):
        raise ConfigError([Misfit(key, name, "must name a part: " + ", ".join(parts(group)))])
    for part in _parts_in(GROUPS[group].module, group, name):
        return part
    if ":" not in name:
        known = parts(group)
        rule = f"no such part in {GROUPS[group].module}; there are " + ", ".join(known)
        raise ConfigError([Misfit(key, name, rule, nearest(name, known))])
    module, function = name.split(":", 1)
    package = module.split(".", 1)[0]
    if package not in trust:
        raise ConfigError([Misfit(key, name, f"is code from outside; it runs only with --trust {package}")])
    try:
        found = {part.name: part for part in _parts_in(module, group)}
    except (ImportError, ValueError, SyntaxError, TypeError) as error:
        raise ConfigError([Misfit(key, name, f"cannot be read: {error}")]) from None
    if function not in found:
        given = ", ".join(GROUPS[group].given)
        rule = f"{module} has no public function {function}({given}, *, ...)"
        raise ConfigError([Misfit(key, name, rule, nearest(function, found))])
    return replace(found[function], name=name)


def choose(group: str, section: Any, trust: Sequence[str] = ()) -> tuple[Choice | None, list[Misfit]]:
    """Checks one group's section of a config: its `name` and its knobs, all misfits together.

    Returns:
        The choice, or None if the part is not known or one of its knobs has no good value; and the misfits.
    """
    if not isinstance(section, dict):
        return None, [Misfit(group, section, f"must be a section; choose one with {group}=NAME")]
    try:
        part = find(group, section.get("name"), trust)
    except ConfigError as error:
        return None, error.misfits
    given = {key: value for key, value in section.items() if key != "name"}
    values, misfits = validate(part.knobs, given)
    usable = not any(misfit.key in part.knobs for misfit in misfits)  # unknown knobs aside
    choice = Choice(part, {k: v for k, v in values.items() if k in part.knobs}) if usable else None
    return choice, [misfit.under(group) for misfit in misfits]


def validate(schema: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Misfit]]:
    """Holds values against the types of a signature.

    Args:
        schema: The type of each knob, its range within (`Annotated[float, Gt(0)]`).
        given: The values, by knob.

    Returns:
        The values, converted where nothing is lost (`1e6` for an integer), and every misfit. With misfits,
        the values are as they were given.
    """
    from pydantic import ValidationError  # 0.1 s, and not needed to print help

    misfits = [
        Misfit(key, value, "must be " + describe(schema[key]) + rule)
        for rule, wrong in (("", _odd_bool), (" and fit in 64 bits", _too_large))
        for key, value in given.items()
        if key in schema and wrong(value, schema[key])
    ]
    checked: dict[str, Any] = {}
    for key, kind in schema.items():
        try:
            checked[key] = _validator(kind).validate_python(given[key])
        except (KeyError, ValidationError):
            misfits.append(_misfit(key, schema, given))
    misfits += [_misfit(key, schema, given) for key in given if key not in schema]
    return (dict(given), unique(misfits)) if misfits else (checked, [])


@cache
def _validator(kind: Any) -> Any:
    """Pydantic's of one type."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True))


def _misfit(key: str, schema: Mapping[str, Any], given: Mapping[str, Any]) -> Misfit:
    if key not in schema:
        near = meant(key, schema)
        known = "there are " + ", ".join(schema) if schema else "it has none"
        if near is not None and len(schema) > _MANY:
            known = f"there are {len(schema)}, told by llmtrain explain"
        return Misfit(key, given[key], f"no such knob; {known}", near)
    rule = "must be " + describe(schema[key])
    if key not in given:
        return Misfit(key, "(missing)", "has no value; it " + rule)
    kinds = [kind for kind in (schema[key], *get_args(schema[key])) if get_origin(kind) is Literal]
    choices = [choice for kind in kinds for choice in get_args(kind) if isinstance(choice, str)]
    return Misfit(key, given[key], rule, nearest(str(given[key]), choices))


def _odd_bool(value: Any, annotation: Any) -> bool:
    """True where a number is wanted, which pydantic would take for 1."""
    return isinstance(value, bool) and not takes(bool, annotation)


def _too_large(value: Any, annotation: Any) -> bool:
    """An integer that nothing can count to: torch stops at it with an error of its own."""
    return isinstance(value, int) and takes(int, annotation) and abs(value) >= 2**63


def takes(kind: Any, annotation: Any) -> bool:
    """Whether a knob of this type may have a value of that kind."""
    return annotation is kind or any(takes(kind, choice) for choice in get_args(annotation))


def _parts_in(module: str, group: str, only: str | None = None) -> Iterator[Part]:
    """The functions of a module, or of a package's modules, that take what the group is given; or that of one name."""
    for name, path in _sources(module):
        for node in _tree(path, only).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or only not in (None, node.name):
                continue
            given, about = tuple(arg.arg for arg in node.args.args), GROUPS[group]
            if given in (about.given, about.given + about.more):
                doc = ast.get_docstring(node) or ""
                yield Part(group, node.name, name, {a.arg: _type(a) for a in node.args.kwonlyargs}, doc, given)


def _sources(module: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"no module {module} can be found")
    if spec.submodule_search_locations is None:
        yield module, Path(spec.origin)
        return
    for path in sorted(Path(spec.origin).parent.glob("*.py")):
        yield (module if path.stem == "__init__" else f"{module}.{path.stem}"), path


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _tree(path: Path, only: str | None) -> ast.Module:
    """A file, or what of it may be a function: parsing is what costs time."""
    text = _text(path)
    if only is not None:
        begin = text.find(f"\ndef {only}(")
        end = re.compile(r"^(def|class|@)", re.M).search(text, begin + 2)
        text = text[begin : end and end.start()] if begin >= 0 else ""
    return ast.parse(text, str(path))


def _type(argument: ast.arg) -> Any:
    """Evaluates an annotation with the names of `llmtrain.knobs` alone: a type, and nothing else runs.

    Raises:
        TypeError: If there is none, or it says something else.
    """
    if argument.annotation is None:
        raise TypeError(f"{argument.arg} has no type; a knob's type is its schema")
    node = argument.annotation
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)
    names = {name: getattr(knob_types, name) for name in knob_types.__all__} | {"Literal": Literal}
    builtins = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
    try:
        return eval(text, {"__builtins__": builtins}, names)
    except Exception as error:
        rule = "a knob's type is built from those of llmtrain.knobs, int, float, str, bool, list, dict and Literal"
        raise TypeError(f"{argument.arg}: {text}: {error}; {rule}") from None
