"""What Optuna knows of a search, in a file that outlives every end: `study.journal`, a line for each thing told."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmtrain.knobs import UserError
from llmtrain.sweep.searching import Searching
from llmtrain.sweep.space import Space

if TYPE_CHECKING:  # an extra, imported only where it is used
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study

_NAME = "search"
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError)
"""What Optuna raises of a journal that is none, or that somebody has changed."""
_PICKLED = {
    ("cmaes._cma", "CMA"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.random._mt19937", "MT19937"),
    ("numpy.random._pickle", "__bit_generator_ctor"),
    ("numpy.random._pickle", "__randomstate_ctor"),
}
"""All that the state of CMA-ES is made of. It is kept as a pickle, and a pickle of other things could run code."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps to ourselves what Optuna logs, and that parts of it are experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(place: Path, settings: Searching, spaces: Sequence[Space], aims: Sequence[tuple[str, str]]) -> Study:
    """The study in a folder that this process holds; begun, or as an earlier start has left it.

    Raises:
        UserError: If it is of another search, or cannot be read.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    path = place / "study.journal"
    told = {"spaces": {s.name: s.words() for s in spaces}, "objectives": [list(aim) for aim in aims]}
    try:
        _cut_torn(path)
        storage = JournalStorage(JournalFileBackend(str(path), cast(Any, _Alone())))
        study = optuna.create_study(
            storage=storage,
            study_name=_NAME,
            directions=cast(Any, [direction for _, direction in aims]),
            pruner=_pruner(settings),
            load_if_exists=True,
        )
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read: {error!r}; move it away to begin anew") from None
    before = study.user_attrs.get("search")
    if before is None:
        study.set_user_attr("search", told)
    elif before != told:
        raise UserError(f"{path}: {_difference(before, told)}; choose another sweep.name for another search")
    return study


def _difference(before: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """In what a study is another than the one asked for."""
    if before["objectives"] != told["objectives"]:
        return f"holds a search by {before['objectives']}, not {told['objectives']}"
    keys = [
        key for key in {**before["spaces"], **told["spaces"]} if before["spaces"].get(key) != told["spaces"].get(key)
    ]
    was, now = (spaces["spaces"].get(keys[0], "nothing") if keys else "" for spaces in (before, told))
    return f"holds a search that draws {keys[0] if keys else ''} from {was}, not {now}"


def _cut_torn(path: Path) -> None:
    """Cuts off a last line that was half written when the search was killed: nothing could be added after it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


class _Alone:
    """A lock for a file that no other process writes: the search holds the whole folder."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def sampler_for(settings: Searching, number: int, fixed: Mapping[str, Any] | None, at_once: int) -> BaseSampler:
    """The sampler of one trial. Its draws begin at the seed and the trial's number: a new start repeats none.

    Args:
        settings: Which sampler, and its knobs.
        number: The trial's.
        fixed: The point of the grid, where it is one.
        at_once: Trials that run at a time; with several tpe keeps away from those that still run.
    """
    from optuna import samplers

    seed = settings.seed + number
    chance = samplers.RandomSampler(seed=seed)
    if fixed is not None:
        return samplers.PartialFixedSampler(dict(fixed), chance)
    if settings.sampler == "tpe":
        return samplers.TPESampler(n_startup_trials=settings.startup_trials, seed=seed, constant_liar=at_once > 1)
    if settings.sampler == "qmc":  # one sequence for all trials
        return samplers.QMCSampler(
            scramble=True, seed=settings.seed, independent_sampler=chance, warn_independent_sampling=False
        )
    if settings.sampler == "cmaes":
        return _cmaes(settings.startup_trials, seed)
    return chance


def _cmaes(startup: int, seed: int) -> BaseSampler:
    from optuna.samplers import CmaEsSampler

    class Careful(CmaEsSampler):
        """Takes nothing from the journal but a state of CMA-ES."""

        def _restore_optimizer(self, completed_trials: list[Any]) -> Any:
            for trial in reversed(completed_trials):
                kept = {k: v for k, v in trial.system_attrs.items() if k.startswith(self._attr_key_optimizer)}
                if kept:
                    return _state(self._concat_optimizer_attrs(kept))
            return None

    return Careful(n_startup_trials=max(startup, 1), seed=seed, warn_independent_sampling=False)


def _state(text: str) -> Any:
    """A state of CMA-ES from a pickle, as hexadecimal digits."""
    try:
        return _Unpickler(io.BytesIO(bytes.fromhex(text))).load()
    except (ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"study.journal holds a broken state of CMA-ES: {error}; take another sampler") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise UserError(
                f"study.journal holds something that is no state of CMA-ES, {module}.{name}; it is not read"
            )
        return super().find_class(module, name)


def _pruner(settings: Searching) -> BasePruner:
    from optuna import pruners

    first = max(settings.warmup_steps, 1)
    if settings.pruner == "median":
        return pruners.MedianPruner(settings.startup_trials, settings.warmup_steps, settings.interval_steps)
    if settings.pruner == "successive_halving":
        return pruners.SuccessiveHalvingPruner(
            min_resource=first if settings.warmup_steps else "auto", reduction_factor=settings.reduction
        )
    if settings.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=first, reduction_factor=settings.reduction)
    return pruners.NopPruner()


def importances(study: Study) -> dict[str, float]:
    """How much of the good trials' being good each key accounts for, all of them 1 together; empty where unknown.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).
    """
    from optuna.importance import get_param_importances
    from optuna.trial import TrialState

    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < _ENOUGH:
        return {}
    try:
        return {key: float(value) for key, value in get_param_importances(study).items()}
    except (ValueError, RuntimeError):  # such as all values the same
        return {}


_ENOUGH = 10
"""Finished trials that it takes to say what matters."""
