"""A config is data: what in one would run code, set the environment or read it, and is refused for that.

Hydra imports packages for the sake of their YAML, calls what `_target_` names, sets up logging from any class
and copies the environment. Here a stranger's config can be composed, checked and trained without being read
first; code runs only from packages that the command line trusts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from llmtrain.knobs import ConfigError, Misfit

_RESOLVERS = {"unless", "over", "home", "oc.select", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "now", "hydra"}
"""None of these turns text into structure: whatever they lead to stands in the config for all to see."""
_RESOLVER = r"\$\{\s*([^${}:]*(?:\$\{[^{}]*\}[^${}:]*)*?)\s*:"
"""The name of a resolver, put together by other interpolations or not."""
_PLUGINS = ("hydra.launcher._target_", "hydra.sweeper._target_")
"""These two name a plugin of Hydra's that is installed."""
_OF_THE_COMMAND = ("setup", "additional_parameters", "ray", "redis")
"""What a launcher runs in a shell, or whom it lets run code."""
_ECHOES = ("hydra.overrides.", "hydra.job.override_dirname")
"""Where Hydra repeats the command line."""
_LOGGING = ("job_logging", "hydra_logging")


def close_environment() -> None:
    """Takes `${oc.env:...}` away, wherever it is resolved: a defaults list is before we see it."""
    OmegaConf.register_new_resolver("oc.env", _closed, replace=True)


def _closed(*words: Any) -> None:
    raise ValueError("a config is data and does not read the environment: ${oc.env:...} is refused")


def check_searchpath(places: Sequence[Any]) -> None:
    """Lets a config name folders of YAML files, but no packages: Hydra would import them.

    Raises:
        ConfigError: If it names anything else.
    """
    if any("://" in str(place) and not str(place).startswith("file://") for place in places):
        rule = "a config is data; it may name folders (file://...) but no packages to import"
        raise ConfigError([Misfit("hydra.searchpath", [str(place) for place in places], rule)])


def not_data(config: DictConfig) -> list[Misfit]:
    """Everything in a composed config that would run code or touch the environment."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    misfits = [misfit for key, value in _leaves(plain) if (misfit := _refused(key, value)) is not None]
    for name in _LOGGING:
        if plain["hydra"][name] not in _hydras_logging(name):
            rule = f"a config is data; logging set up by one can run code; take hydra/{name}=none"
            misfits.append(Misfit(f"hydra.{name}", "changed", rule))
    return misfits


def not_of_a_config(launcher: Any, overrides: Sequence[str]) -> list[Misfit]:
    """What of `hydra.launcher` must not come from a config, and is not on the command line.

    Batch scripts are made of its values, so all text must be one line.
    """
    misfits = []
    for key, value in _leaves(launcher, "hydra.launcher"):
        knob = re.split(r"[.\[]", key.removeprefix("hydra.launcher."))[0]
        given = any(o.lstrip("+").startswith(f"hydra.launcher.{knob}") for o in overrides)
        if value not in ([], {}) and knob in _OF_THE_COMMAND and not given:
            rule = "a config is data; this would run commands, and is to be given on the command line"
            misfits.append(Misfit(key, value, rule))
        elif isinstance(value, str) and not value.isprintable():
            misfits.append(Misfit(key, value, "must be one line: batch scripts are made of it"))
    return misfits


def _refused(key: str, value: Any) -> Misfit | None:
    if key.startswith(_ECHOES):
        return None
    if key.startswith("hydra.callbacks"):
        return Misfit(key, value, "a config is data; callbacks would run code")
    if key.startswith("hydra.job.env_"):  # the value may have been copied from the environment
        return Misfit(key, "(not shown)", "a config is data; set the environment in the shell instead")
    plugin = key in _PLUGINS and value in Plugins.instance().class_name_to_class
    if "_target_" in f"{key}={value}" and not plugin:
        rule = "a config is data and never names code to import; choose a part with name: and --trust"
        return Misfit(key, value, rule)
    strange = [name for name in re.findall(_RESOLVER, str(value)) if name not in _RESOLVERS]
    if strange:
        rule = f"a config is data; ${{{strange[0]}:...}} could read the environment and is refused"
        return Misfit(key, value, rule)
    return None


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Whatever is no filled dict or list, with its key from the root."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}[{index}]")
    elif node is not None:
        yield key, node


@cache
def _hydras_logging(name: str) -> list[Any]:
    """The ways of logging that come with Hydra."""
    folder = Path(hydra.__file__).parent / "conf" / "hydra" / name
    return [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))]
