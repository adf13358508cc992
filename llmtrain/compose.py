"""From YAML files and overrides to plain values, with Hydra.

Hydra stops at the first mistake. Here every override is looked at by itself first and those that cannot
stand are set aside, so that all mistakes, Hydra's and ours, come in one report.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
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
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtrain.build import GROUPS
from llmtrain.config import Searching, knobs_of
from llmtrain.inert import check_searchpath, close_environment, not_data, not_of_a_config
from llmtrain.knobs import ConfigError, Misfit, nearest
from llmtrain.synonyms import meant

OURS = "config"
"""The name of our own primary config."""
ALIASES = {"optimizer": "optim"}
"""Other words in use for a group."""
SHARED = {group: about.folder for group, about in GROUPS.items() if about.folder}
"""Groups whose options lie in another's folder, which Hydra wants to be named."""
FREE_TEXT = ("prompt", "sample.prompt")
"""Knobs whose value is taken as it is typed, with its spaces, commas and brackets."""
LAUNCHERS = {"submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
"""Launchers of `hydra/launcher`, which carry jobs elsewhere, and the extra that each comes with."""
SEARCH = "optuna"
"""The sweeper of `conf/hydra/sweeper` that searches."""
_BASIC_LAUNCHER = f"{BasicLauncher.__module__}.{BasicLauncher.__name__}"
_BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
OF_ALL = ("sweep.", "cv.", "bench.", "run.dir", "run.cache", "hydra")
"""What keys begin with whose values all jobs of a grid share."""
_ONE_FOR_ALL = "is one for all jobs, and cannot be swept"
UNREADABLE = (yaml.YAMLError, HydraException, OmegaConfBaseException, OSError, ValueError)
"""What is raised for YAML files that cannot be read or composed."""


def config_folder() -> Path:
    """The folder of YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


@dataclass
class Composed:
    """What one job's YAML files and overrides come to.

    Attributes:
        values: Nested dicts of plain values, interpolations resolved; None where nothing could be composed.
        choices: For each config group the option that was taken.
        overrides: The overrides that were given, with their spelling mended.
        misfits: What could not be composed.
        spoiled: Groups whose option could not be found or guessed: what is said of their knobs is not to be trusted.
        given: Of a job of a grid what it does not share with all others: each key, and its value as it was written.
        launcher: `hydra.launcher` where jobs are to be carried elsewhere by a plugin; None where they run here.
    """

    values: dict[str, Any] | None = None
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)
    given: dict[str, str] = field(default_factory=dict)
    launcher: dict[str, Any] | None = None


def mend(override: str) -> str:
    """Takes the other words in use for a group: `optimizer.lr=1` becomes `optim.lr=1`.

    The option of a group without a folder of its own is spelled as Hydra wants it:
    `batch_schedule=linear` becomes `schedule@batch_schedule=linear`.
    """
    for word, group in ALIASES.items():
        override = re.sub(rf"^([+~]*){word}(?=[.=@]|$)", rf"\1{group}", override)
    for group, folder in SHARED.items():
        override = re.sub(rf"^([+~]*){group}(?==|$)", rf"\1{folder}@{group}", override)
    key, _, text = override.partition("=")
    if key in FREE_TEXT and text and text[0] not in "\"'":
        override = f"{key}={quoted(text)}"
    return override


def quoted(text: str) -> str:
    """Text as the value of an override that means just that."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def prepare(config_dir: str | None) -> None:
    """Makes Hydra look into the user's folder before ours, and know our resolvers."""
    add_resolvers()
    close_environment()
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError([Misfit("--config-dir", config_dir, "no such folder")])
    _UserFolder.path = Path(config_dir).resolve() if config_dir is not None else None
    Plugins.instance().register(_UserFolder)


def add_resolvers() -> None:
    """Lets values be `${over:A,B}`, `${unless:DEFAULT,RIVAL,...}` and `${home:PATH}`."""
    OmegaConf.register_new_resolver("unless", _unless, replace=True)
    OmegaConf.register_new_resolver("over", lambda a, b: float(a) / float(b), replace=True)
    OmegaConf.register_new_resolver("home", lambda path: str(Path(path).expanduser()), replace=True)


class _UserFolder(SearchPathPlugin):
    path: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.path is not None:
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
        parser = OverridesParser.create(config_loader=loader)
        parsed, misfits = _parse(parser, overrides, multirun)
        check_searchpath(_searchpath(config_name, parsed, loader))
        if not multirun:
            composed = [_compose_one(config_name, loader, parsed, [], {})]
            composed[0].overrides = [*overrides]
        else:
            steady, points, wrong = _grid(config_name, loader, parser, parsed)
            misfits, bases = misfits + wrong, dict[tuple[str, ...], Any]()
            composed = [_compose_one(config_name, loader, steady, own, bases) for own in points]
    for job in composed:
        told = {(m.key, str(m.value)) for m in misfits}
        job.misfits = misfits + [m for m in job.misfits if (m.key, str(m.value)) not in told]
    return composed


@dataclass(frozen=True)
class Draw:
    """What a search draws from.

    Attributes:
        settings: `hydra.sweeper`, as plain values.
        fixed: The overrides that all trials share, as they were written.
        varied: Those that say what a key's values are drawn from.
        misfits: What is wrong with those that the config lists.
    """

    settings: dict[str, Any]
    fixed: list[str]
    varied: list[Override]
    misfits: list[Misfit]


def compose_draw(config_name: str, overrides: Sequence[str]) -> Draw | None:
    """What a search draws from; None where the sweeper is another, or the config cannot be composed.

    Args:
        config_name: The primary config.
        overrides: Hydra overrides, mended.
    """
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3", job_name="llmtrain"):
        loader = GlobalHydra.instance().config_loader()
        parser = OverridesParser.create(config_loader=loader)
        parsed, _ = _parse(parser, overrides, multirun=True)
        check_searchpath(_searchpath(config_name, parsed, loader))
        fixed = [override for override in parsed if not override.is_sweep_override()]
        config = _load(config_name, loader, fixed, Composed(), RunMode.MULTIRUN)
        if config is None or config.hydra.sweeper.get("name") != SEARCH:
            return None
        unresolved: list[Misfit] = []
        if config.hydra.launcher.get("_target_") != _BASIC_LAUNCHER:
            rule = "carries the jobs of grids and of cv; a search runs its trials here, sweep.jobs of them at once"
            unresolved.append(Misfit("hydra/launcher", config.hydra.runtime.choices["hydra/launcher"], rule, "basic"))
        settings = _plain(config.hydra.sweeper, "hydra.sweeper", unresolved)
        listed = settings.get("params") or {}
        if not isinstance(listed, dict):
            unresolved.append(Misfit("hydra.sweeper.params", listed, "must be a mapping from keys to their spaces"))
            listed = {}
        inner, misfits = _parse(parser, [f"{key}={value}" for key, value in listed.items()], multirun=True)
    last = {_key(override): override for override in [*inner, *parsed]}  # the command line comes after the config
    varied = [override for override in last.values() if override.is_sweep_override()]
    swept = {_line(o) for o in parsed if o.is_sweep_override()}
    shared = [_line(o) for o in inner if o is last[_key(o)] and o not in varied]
    lines = [*shared, *(line for line in overrides if line not in swept)]
    return Draw(settings, lines, varied, unresolved + misfits)


def _grid(
    config_name: str, loader: ConfigLoader, parser: OverridesParser, parsed: list[Override]
) -> tuple[list[Override], list[list[Override]], list[Misfit]]:
    """The overrides that all jobs of a grid share, those of each alone, and what is wrong with them."""
    fixed = [override for override in parsed if not override.is_sweep_override()]
    whole = Composed()
    config = _load(config_name, loader, fixed, whole, RunMode.MULTIRUN)
    if config is None:
        return fixed, [[]], whole.misfits
    if config.hydra.sweeper.get("_target_") == _BASIC_SWEEPER:
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        listed, wrong = _parse(parser, params, multirun=True)
        parsed = listed + parsed
        rule = "has no steps, so there is no grid of it; write range(A,B,STEP) or the values"
        wrong += [Misfit(o.key_or_group, _value(o), rule) for o in parsed if _is_interval(o)]
        whole.misfits += wrong
    last = {_key(o): o for o in parsed}  # what the command line says comes after what a config lists
    steady = [o for o in parsed if not o.is_sweep_override()]
    varied = [o for o in last.values() if o.is_sweep_override() and not _is_interval(o)]
    axes, wrong = _axes(varied, config)
    points = [[line for lines in point for line in lines] for point in itertools.product(*axes)]
    return steady, [parser.parse_overrides(own) for own in points], whole.misfits + wrong


def _axes(varied: Sequence[Override], config: DictConfig) -> tuple[list[list[list[str]]], list[Misfit]]:
    """What varies: of each axis of the grid its places, each some overrides. The last axis varies fastest.

    Keys of `sweep.zip` are one axis, which stands where the first of them does; `sweep.seeds` is another, the last.
    """
    values = {_key(o): [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] for o in varied}
    zipped, seeds = OmegaConf.select(config, "sweep.zip"), OmegaConf.select(config, "sweep.seeds")
    seed = OmegaConf.select(config, "train.seed")
    pairs = [mend(key) for key in zipped if isinstance(key, str)] if isinstance(zipped, ListConfig) else []
    repeated = isinstance(seeds, int) and seeds > 1 and isinstance(seed, int)  # what is neither, the check will tell
    misfits = [Misfit(_key(o), _value(o), _ONE_FOR_ALL) for o in varied if _key(o).startswith(OF_ALL)]
    lengths = {key: len(values.get(key, [])) for key in pairs}
    for key in [key for key, length in lengths.items() if not length]:
        misfits.append(Misfit("sweep.zip", key, "has no list of values to go with the others", nearest(key, values)))
    if len(set(lengths.values())) > 1 and not misfits:
        told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        misfits.append(Misfit("sweep.zip", pairs, f"must have as many values each: {told}"))
    if repeated and "train.seed" in values:
        misfits.append(Misfit("sweep.seeds", seeds, "repeats each point with other seeds, and train.seed is swept too"))
    if misfits:
        return [], misfits
    axes = [[[line] for line in lines] for key, lines in values.items() if key not in pairs]
    if pairs:
        first = min(list(values).index(key) for key in pairs)
        together = [list(point) for point in zip(*(values[key] for key in lengths), strict=True)]
        axes.insert(first, together)
    if repeated:
        axes.append([[f"train.seed={seed + i}"] for i in range(seeds)])
    return axes, []


def _key(override: Override) -> str:
    """The key of an override without the signs before it."""
    return str(override.get_key_element()).lstrip("+~")


def _searchpath(config_name: str, parsed: Sequence[Override], loader: Any) -> list[Any]:
    """Where Hydra is going to look for YAML: it reads this before anything else, so we do too."""
    places: Any = next((o.value() for o in parsed if o.get_key_element() == "hydra.searchpath"), None)
    if places is None and _UserFolder.path is None and config_name == OURS:
        return []  # it names no places
    if places is None:
        try:
            primary = loader.repository.load_config(config_path=config_name)
            places = OmegaConf.select(primary.config, "hydra.searchpath") if primary is not None else None
            return list(places) if isinstance(places, ListConfig) else []
        except UNREADABLE:
            pass  # told by the composition that follows
    return places if isinstance(places, list) else []


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
            override = parser.parse_overrides([line])[0]
        except OverrideParseException:
            rule = "cannot be read as KEY=VALUE; quote a value with spaces or brackets: 'KEY=\"...\"'"
            misfits.append(Misfit(key, value, rule))
            continue
        if override.is_sweep_override() and not multirun:
            rule = "several values are a sweep: add -m; for one list write [a,b], for one text quote it"
            misfits.append(Misfit(key, value, rule))
        elif not override.key_or_group:
            misfits.append(Misfit(line, value, "has no key; write KEY=VALUE"))
        else:
            parsed.append(override)
    return parsed, misfits


def _compose_one(
    config_name: str,
    loader: ConfigLoader,
    steady: Sequence[Override],
    own: Sequence[Override],
    bases: dict[tuple[str, ...], Any],
) -> Composed:
    """Composes what can be composed; what cannot is told in `misfits`.

    Jobs of a grid that choose the same options differ in values alone, and are made from one base: Hydra takes a tenth
    of a second to read and merge YAML files.

    Args:
        config_name: The primary config.
        loader: Hydra's.
        steady: Overrides that the job shares with all others.
        own: Those of this job.
        bases: What was composed before, by the options chosen.
    """
    job = Composed(overrides=[_line(o) for o in [*steady, *own]], given={_key(o): _value(o) for o in own})
    chosen = [o for o in own if o.is_hydra_override() or loader.get_group_options(o.key_or_group, ObjectType.CONFIG)]
    key = tuple(map(_line, chosen))
    if key not in bases:
        base = Composed()
        bases[key] = (_load(config_name, loader, [*steady, *chosen], base, RunMode.RUN), base)
    config, base = bases[key]
    job.misfits, job.spoiled = [*base.misfits], {*base.spoiled}
    values = [o for o in own if o not in chosen]
    if config is not None and values:
        config = _load(config_name, loader, values, job, RunMode.RUN, config)
    if config is not None:
        job.choices = {k: v for k, v in config.hydra.runtime.choices.items() if not k.startswith("hydra/")}
        nodes = {str(k): config._get_node(k) for k in config if k != "hydra" and not OmegaConf.is_missing(config, k)}
        job.values = {key: _plain(node, key, job.misfits) for key, node in nodes.items()}
        job.launcher = _launcher(config, job)
    return job


def _launcher(config: DictConfig, job: Composed) -> dict[str, Any] | None:
    """What carries jobs elsewhere, if they are not to run here; what of it must not stand in a config is told."""
    if config.hydra.launcher.get("_target_") == _BASIC_LAUNCHER:
        return None
    job.misfits += not_of_a_config(OmegaConf.to_container(config.hydra.launcher, resolve=False), job.overrides)
    found: dict[str, Any] = _plain(config.hydra.launcher, "hydra.launcher", job.misfits)
    return found


def _value(override: Override) -> str:
    """The value of an override as it was written."""
    return _line(override).partition("=")[2]


def _with_values(base: DictConfig, lines: Sequence[str]) -> DictConfig:
    """A composed config with other values, as if Hydra had composed it with them."""
    config, overrides = copy.deepcopy(base), OverridesParser.create().parse_overrides([*lines])
    ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
    config.hydra.overrides.task.extend(lines)
    written: Any = OmegaConf.to_container(config.hydra.overrides.task)
    given = OverridesParser.create().parse_overrides(written)
    config.hydra.job.override_dirname = get_overrides_dirname(given, **config.hydra.job.config.override_dirname)
    return config


def _load(
    config_name: str,
    loader: ConfigLoader,
    overrides: list[Override],
    job: Composed,
    mode: RunMode,
    base: DictConfig | None = None,
) -> DictConfig | None:
    """Lets Hydra compose, with what it would stop at set aside; None where the config is broken or not data.

    With a base nothing is read: the overrides are values to put into it.
    """
    lines = []
    for override in overrides:
        line, misfit = _settle(override, loader)
        if misfit is not None:
            job.misfits.append(misfit)
            if line is None:
                job.spoiled.add(override.package or override.key_or_group)
        if line is not None:
            lines.append(line)
    try:
        if base is not None:
            config = _with_values(base, lines)
        else:
            config = loader.load_configuration(config_name, lines, mode, from_shell=False)
    except yaml.YAMLError as error:
        job.misfits.append(_broken_yaml(error))
    except KeyError as error:  # Hydra copies the environment as it composes
        job.misfits.append(Misfit("hydra.job.env_copy", error.args[0], "a config is data; it copies no environment"))
    except UNREADABLE as error:
        job.misfits.append(from_hydra(error, config_name))
    else:
        refused = not_data(config)
        job.misfits += refused
        return config if not refused else None  # what must not be read is not resolved
    return None


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
            if group == "hydra/launcher" and str(option) in LAUNCHERS:
                extra = LAUNCHERS[str(option)]
                return None, Misfit(group, option, f"is not installed: pip install 'llmtrain[{extra}]'")
            guess = nearest(str(option), options)
            unnamed = "leave it out for the usual one; " if str(option) == "auto" else ""
            rule = f"no such option; {unnamed}there are " + ", ".join(options)
            mended = f"{override.get_key_element()}={guess}" if guess and not isinstance(value, list) else None
            return mended, Misfit(override.package or group, option, rule, guess)
    return line, None


def _plain(node: Any, key: str, misfits: list[Misfit]) -> Any:
    """Resolves a config into plain dicts and lists; what has no value is left out, what cannot be resolved is told."""
    try:
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            inner: dict[str, Any] = {str(k): node._get_node(k) for k in node}
            return {k: _plain(v, f"{key}.{k}", misfits) for k, v in inner.items() if not v._is_missing()}
        if isinstance(node, ListConfig) and not node._is_interpolation() and not node._is_none():
            return [_plain(node._get_node(i), f"{key}[{i}]", misfits) for i in range(len(node))]
        value = node._dereference_node()
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value._value()
    except OmegaConfBaseException as error:
        misfits.append(Misfit(key, str(node._value()), "cannot be resolved: " + str(error).splitlines()[0]))
        return None


def _broken_yaml(error: yaml.YAMLError) -> Misfit:
    mark: Any = getattr(error, "problem_mark", None)
    where = ":".join([str(mark.name), str(mark.line + 1), str(mark.column + 1)]) if mark is not None else "YAML"
    return Misfit(where, getattr(error, "problem", None) or "broken", "is not valid YAML")


def from_hydra(error: Exception, config_name: str) -> Misfit:
    """A composition error of Hydra's in our words."""
    if isinstance(error, UnicodeDecodeError):
        return Misfit("config", config_name, f"a YAML file of it is not UTF-8: {error.reason} at byte {error.start}")
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file or config_name)
        options = list(error.options or [])
        rule = "no such config" + (f"; there are {', '.join(options)}" if options else "")
        return Misfit("config", missing, rule, nearest(missing.rsplit("/", 1)[-1], options))
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(line.strip() for line in (str(error) or str(cause)).splitlines())
    if unlisted := re.match(r"Could not override '([^']+)'. No match in the defaults list", text):
        group = unlisted[1].rpartition("@")[2]
        rule = f"this config has its values written out and no groups to choose from; override {group}.KNOB instead"
        return Misfit(group, config_name, rule if group in GROUPS else "no such group in the defaults list")
    if twice := re.match(r"Multiple values for (\S+)\. To override", text):
        return Misfit(twice[1], config_name, f"is chosen twice; to choose another one write {twice[1]}=NAME")
    if unknown := re.search(
        r"(?:override (\S+)\? )?To append to your (?:config|default list) use \+([^=]+)=(.*)", text
    ):
        settings = [f"hydra.sweeper.{knob}" for knob in knobs_of(Searching)]
        return Misfit(unknown[2], unknown[3], "no such knob", unknown[1] or meant(unknown[2], settings))
    return Misfit("config", config_name, text)
