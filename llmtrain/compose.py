"""From YAML files and overrides to plain values, with Hydra; and the refusal of what is not data.

Hydra stops at the first mistake. Here every override is looked at by itself first and those that cannot
stand are set aside, so that all mistakes, Hydra's and ours, come in one report. A config is data: one that
would run code, set the environment or read it is refused as soon as it is composed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtrain.build import GROUPS
from llmtrain.knobs import ConfigError, Misfit, nearest

ALIASES = {"optimizer": "optim"}
"""Other words in use for a group."""
_RESOLVERS = {
    "unless",
    "over",
    "oc.select",
    "oc.deprecated",
    "oc.create",
    "oc.dict.keys",
    "oc.dict.values",
    "now",
    "hydra",
}
_HYDRAS_OWN = ("hydra._internal.", "hydra_plugins.")


def config_folder() -> Path:
    """The folder of YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


@dataclass
class Composed:
    """What one job's YAML files and overrides come to.

    Attributes:
        values: Nested dicts of plain values, interpolations resolved.
        choices: For each config group the option that was taken.
        overrides: The overrides that were given, with their spelling mended.
        misfits: What could not be composed.
        spoiled: Groups whose option could not be found or guessed: what is said of their knobs is not to be trusted.
    """

    values: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)


def mend(override: str) -> str:
    """Takes the other words in use for a group: `optimizer.lr=1` becomes `optim.lr=1`."""
    for word, group in ALIASES.items():
        override = re.sub(rf"^([+~]*){word}(?=[.=@]|$)", rf"\1{group}", override)
    return override


def prepare(config_dir: str | None) -> None:
    """Makes Hydra look into the user's folder before ours, and know our resolvers. Call it once a process."""
    OmegaConf.register_new_resolver("unless", _unless, replace=True)
    OmegaConf.register_new_resolver("over", lambda a, b: float(a) / float(b), replace=True)
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError([Misfit("--config-dir", config_dir, "no such folder")])
        _UserFolder.path = folder
        Plugins.instance().register(_UserFolder)


class _UserFolder(SearchPathPlugin):
    path: Path

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend(provider="user", path=f"file://{self.path}")


def _unless(default: Any, *others: Any) -> Any:
    """`${unless:600,${.epochs}}`: 600 unless one of the others is set. So a default yields to its rivals."""
    return default if all(other is None for other in others) else None


def compose_jobs(config_name: str, overrides: Sequence[str], multirun: bool) -> list[Composed]:
    """Composes one run, or every job of a grid.

    Args:
        config_name: The primary config.
        overrides: Hydra overrides, mended.
        multirun: Whether comma-separated values and ranges are a grid.

    Returns:
        One `Composed` for each job; its misfits are told, not raised.
    """
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3", job_name="llmtrain"):
        loader = GlobalHydra.instance().config_loader()
        _refuse_code_paths(config_name)
        parser = OverridesParser.create(config_loader=loader)
        parsed, misfits = _parse(parser, overrides, multirun)
        jobs = [[_line(p) for p in parsed]]
        if multirun:
            grid = [p for p in parsed if not p.is_hydra_override() and not _is_interval(p)]
            jobs = BasicSweeper.split_arguments(grid, None)[0]
        composed = [_compose_one(config_name, loader, parser.parse_overrides(job)) for job in jobs]
    for job in composed:
        job.misfits = misfits + job.misfits
        job.overrides = [o for o in overrides] if not multirun else job.overrides
    return composed


def _line(override: Override) -> str:
    """An override as it was written."""
    assert override.input_line is not None
    return override.input_line


def _is_interval(override: Override) -> bool:
    """A continuous range, which only an optimizing sweeper can draw from."""
    return override.is_sweep_override() and not override.is_discrete_sweep()


def _parse(parser: OverridesParser, overrides: Sequence[str], multirun: bool) -> tuple[list[Override], list[Misfit]]:
    parsed, misfits = [], []
    for line in overrides:
        key, _, value = line.partition("=")
        try:
            override = parser.parse_override(line)
        except OverrideParseException:
            rule = "cannot be read as KEY=VALUE; quote a value with spaces or brackets: 'KEY=\"...\"'"
            misfits.append(Misfit(key, value, rule))
            continue
        if override.is_sweep_override() and not multirun:
            rule = "several values are a sweep: add -m; for one list write [a,b], for one text quote it"
            misfits.append(Misfit(key, value, rule))
        else:
            parsed.append(override)
    return parsed, misfits


def _compose_one(config_name: str, loader: ConfigLoader, overrides: list[Override]) -> Composed:
    """Composes what can be composed; what cannot is told in `misfits`."""
    job = Composed(overrides=[_line(override) for override in overrides])
    lines = []
    for override in overrides:
        line, misfit = _settle(override, loader)
        if misfit is not None:
            job.misfits.append(misfit)
            if line is None:
                job.spoiled.add(override.key_or_group)
        if line is not None:
            lines.append(line)
    try:
        config = compose(config_name, lines, return_hydra_config=True)
    except yaml.YAMLError as error:
        job.misfits.append(_broken_yaml(error))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        job.misfits.append(_from_hydra(error, config_name))
    else:
        job.choices = {k: v for k, v in config.hydra.runtime.choices.items() if not k.startswith("hydra/")}
        refused = _not_data(config)
        job.misfits += refused
        if not refused:  # else nothing of it is resolved: what must not be read is not read
            job.values = _plain({k: config._get_node(k) for k in config if k != "hydra"}, "", job.misfits)
    return job


def _settle(override: Override, loader: ConfigLoader) -> tuple[str | None, Misfit | None]:
    """What to hand to Hydra for one override: unknown keys are let through, for our own check to tell."""
    group, line = override.key_or_group, _line(override)
    if override.is_hydra_override() and "/" not in group:
        return line, None
    options = loader.get_group_options(group, ObjectType.CONFIG)
    if not options:
        return (line if override.is_delete() else "++" + line.lstrip("+")), None
    value = override.value()
    for option in value if isinstance(value, list) else [value]:
        if option is not None and str(option) not in options:
            guess = nearest(str(option), options)
            rule = "no such option; there are " + ", ".join(options)
            mended = f"{group}={guess}" if guess and not isinstance(value, list) else None
            return mended, Misfit(group, option, rule, guess)
    return line, None


def _plain(node: Any, key: str, misfits: list[Misfit]) -> Any:
    """Resolves a config into plain dicts and lists; what cannot be resolved is told, not raised."""
    if isinstance(node, dict):
        return {k: _plain(v, k, misfits) for k, v in node.items()}
    try:
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            return {str(k): _plain(node._get_node(k), f"{key}.{k!s}", misfits) for k in node}
        if isinstance(node, ListConfig) and not node._is_interpolation() and not node._is_none():
            return [_plain(node._get_node(i), f"{key}[{i}]", misfits) for i in range(len(node))]
        if node._is_missing():
            misfits.append(Misfit(key, "???", "has no value; give one with KEY=VALUE"))
            return None
        value = node._dereference_node()
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value._value()
    except OmegaConfBaseException as error:
        misfits.append(Misfit(key, str(node._value()), "cannot be resolved: " + str(error).splitlines()[0]))
        return None


def _not_data(config: DictConfig) -> list[Misfit]:
    """Everything in a composed config that would run code or touch the environment."""
    misfits = []
    for key, value in _leaves(OmegaConf.to_container(config, resolve=False)):
        hydras = key.startswith("hydra.")
        if key.startswith("hydra.callbacks."):
            misfits.append(Misfit(key, value, "a config is data; callbacks would run code"))
        elif key.startswith(("hydra.job.env_set.", "hydra.job.env_copy[")):
            misfits.append(Misfit(key, value, "a config is data; set the environment in the shell instead"))
        elif key.rsplit(".", 1)[-1] == "_target_" and not (hydras and str(value).startswith(_HYDRAS_OWN)):
            rule = "a config is data and never names code to import; choose a part with name: and --trust"
            misfits.append(Misfit(key, value, rule))
        elif isinstance(value, str):
            for resolver in re.findall(r"\$\{\s*([\w.]+)\s*:", value):
                if resolver not in _RESOLVERS and not (hydras and resolver.startswith("oc.dict")):
                    rule = f"a config is data and does not read the environment: ${{{resolver}:...}} is refused"
                    misfits.append(Misfit(key, value, rule))
    return misfits


def _leaves(node: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [leaf for k, v in node.items() for leaf in _leaves(v, f"{key}.{k}" if key else str(k))]
    if isinstance(node, list) and node:
        return [leaf for i, v in enumerate(node) for leaf in _leaves(v, f"{key}[{i}]")]
    return [(key, node)] if node not in ({}, []) else []


def _refuse_code_paths(config_name: str) -> None:
    """A user's primary config may not make Hydra import a package for the sake of its YAML files."""
    path = getattr(_UserFolder, "path", None)
    file = path / f"{config_name.removesuffix('.yaml')}.yaml" if path is not None else None
    if file is None or not file.is_file():
        return
    try:
        places = OmegaConf.select(OmegaConf.load(file), "hydra.searchpath", default=None) or []
    except (yaml.YAMLError, OmegaConfBaseException):
        return  # told by the composition that follows
    if any(not str(place).startswith("file://") for place in places):
        rule = "a config is data; it may name folders (file://...) but no packages to import"
        raise ConfigError([Misfit("hydra.searchpath", list(places), rule)])


def _broken_yaml(error: yaml.YAMLError) -> Misfit:
    mark: Any = getattr(error, "problem_mark", None)
    where = ":".join([str(mark.name), str(mark.line + 1), str(mark.column + 1)]) if mark is not None else "YAML"
    return Misfit(where, getattr(error, "problem", None) or "broken", "is not valid YAML")


def _from_hydra(error: Exception, config_name: str) -> Misfit:
    """A composition error of Hydra's in our words."""
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file or config_name)
        options = list(error.options or [])
        rule = "no such config" + (f"; there are {', '.join(options)}" if options else "")
        return Misfit("config", missing, rule, nearest(missing.rsplit("/", 1)[-1], options))
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(line.strip() for line in (str(error) or str(cause)).splitlines())
    unlisted = re.match(r"Could not override '([^']+)'. No match in the defaults list", text)
    if unlisted:
        group = unlisted.group(1)
        rule = f"this config has its values written out and no groups to choose from; override {group}.KNOB instead"
        return Misfit(group, config_name, rule if group in GROUPS else "no such group in the defaults list")
    return Misfit(getattr(cause, "full_key", None) or "config", config_name, re.sub(r"\s*To append.*", "", text))


def hydra_main(config_name: str, argv: Sequence[str], task: Any) -> None:
    """Hands the command line to Hydra itself: grids, `--cfg`, `--info`, `--help`, completion."""
    import hydra

    sys.argv = [sys.argv[0], *argv]
    hydra.main(config_path=str(config_folder()), config_name=config_name, version_base="1.3")(task)()
