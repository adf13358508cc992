"""`llmtrain train -m hydra/sweeper=optuna`: a search for good values of knobs, with Optuna's samplers and pruners.

Optuna is asked for a trial's values, they become a job like any other of a sweep, and Optuna is told what it came to.
Everything it knows lies in `study.journal` in the sweep's folder, a line for each thing that happens. So the same
command goes on after whatever end: trials that were told are kept, and one that was not (it ran, it was stopped, it
failed) is taken up again with the same values, its run from its checkpoint. `n_trials` is a total over all starts.

For Optuna a trial that does not fit, that diverges or that is pruned has the state PRUNED, so that samplers keep away
from there; one that failed stays RUNNING until it succeeds at a later start.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmtrain import folder
from llmtrain.compose import Composed, Draw
from llmtrain.config import RunConfig, Sweep
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.stop import Stop
from llmtrain.sweep.findings import SearchBoard, conclude_search, show_search
from llmtrain.sweep.journal import open_study, quiet, sampler_for
from llmtrain.sweep.plan import Job, Plan, make_plan, status_of
from llmtrain.sweep.pool import Outcome, Pool, outcome_of, slots
from llmtrain.sweep.searching import Searching, aims_of, check_together, read_settings
from llmtrain.sweep.space import Space, point, read_spaces, size

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

Ready = Callable[[Sequence[Sequence[str]], bool], list[tuple[Composed, RunConfig]]]
"""Composes and checks what the fixed overrides come to with some more, once for each list of them; the second argument
says whether the parts are asked as well. Raises ConfigError with all that is wrong."""
_NOT_THE_SEARCH = ("hydra.sweeper.n_trials=", "hydra.sweeper.timeout_minutes=")
"""Overrides that say how long to search, and leave it the same search."""


@dataclass(frozen=True)
class Over(Outcome):
    """What became of a trial that has not run to its end and never will: `pruned`, or `unfit` to run at all."""

    @property
    def done(self) -> bool:
        """There is nothing left to do."""
        return True


def search(draw: Draw, ready: Ready, command: Sequence[str], trust: Sequence[str], dry: bool) -> int:
    """Searches, shows it meanwhile and tells what was found; returns the exit code.

    Args:
        draw: What is searched, and how.
        ready: Composes and checks a trial's config.
        command: The words that it was all made from.
        trust: Packages whose parts may run.
        dry: Only shows what would be searched.

    Raises:
        ConfigError: With all that is wrong with the settings, the spaces, the fixed part and the first trial's config.
        UserError: If the folder cannot be used, or holds another search.
    """
    settings, spaces, (composed, config) = _checked(draw, ready)
    words = [word for word in command if not word.startswith(_NOT_THE_SEARCH)]
    plan = make_plan([composed], [config], words, "search", trust)
    aims = aims_of(settings, plan)
    monitor, direction = aims[0]
    plan = replace(plan, command=[*command], monitor=monitor, rising=direction == "maximize")
    if dry:
        show_search(plan, spaces, settings)
        return 0
    at_once, stop = len(slots(config.sweep.jobs)), Stop()
    with folder.hold(plan.folder), quiet():
        study = open_study(plan.folder, settings, spaces, aims)
        runner = _Processes(config, trust, monitor)
        with stop.listening(), closing(SearchBoard(plan, at_once, _total(settings, spaces))) as board:
            make = lambda number, given: _job(number, given, spaces, ready, words, trust)
            empty = replace(plan, jobs=[])
            hunt = Search(
                study, spaces, settings, replace(config.sweep, jobs=at_once), empty, aims, make, runner, board, stop
            )
            hunt.run()
        conclude_search(hunt.plan, hunt.results(), study, aims)
    return _exit_code(hunt, stop)


def _exit_code(hunt: Search, stop: Stop) -> int:
    """128 + a signal's number, 1 where a trial failed or none has finished, else 0."""
    if stop.signal is not None:
        return 128 + stop.signal
    outcomes = hunt.outcomes.values()
    return 0 if any(o.state == "finished" for o in outcomes) and all(o.done for o in outcomes) else 1


def _total(settings: Searching, spaces: Sequence[Space]) -> int | None:
    """Trials in all; None where only the clock ends it."""
    grid = size(spaces) if settings.sampler == "grid" else None
    return min((n for n in (settings.n_trials, grid) if n is not None), default=None)


# -- before anything starts -----------------------------------------------------------------------------------


def _checked(draw: Draw, ready: Ready) -> tuple[Searching, list[Space], tuple[Composed, RunConfig]]:
    """The settings, the spaces, and the first corner of them, composed and checked.

    The config has to fit as a whole where every space has its first value. Beside that each end of a range and each
    choice has to be right by itself; which of them go together, the trials will tell.
    """
    settings, misfits = read_settings(draw.settings)
    spaces, wrong = read_spaces(draw.varied)
    misfits += [*draw.misfits, *wrong]
    corner = {space: space.ends()[0] for space in spaces}
    others = [corner | {space: end} for space in spaces for end in space.ends()[1:]]
    found: list[tuple[Composed, RunConfig]] = []
    for lines, parts in (([_lines(corner)], True), ([_lines(values) for values in others], False)):
        try:
            found += ready(lines, parts)
        except ConfigError as error:
            misfits += error.misfits
    if settings is not None:
        misfits += check_together(settings, spaces, found[0][1] if found else None)
    names = Counter(config.run.name for _, config in found if config.run.name is not None)
    rule = "is the same in several trials; leave it out"
    misfits += [Misfit("run.name", name, rule) for name, count in names.items() if count > 1]
    if misfits or settings is None:
        raise ConfigError(misfits)
    composed, config = found[0]
    return settings, spaces, (replace(composed, given={s.name: text for s, text in corner.items()}), config)


def _lines(values: Mapping[Space, str]) -> list[str]:
    return [f"{space.key}={text}" for space, text in values.items()]


def _job(
    number: int,
    given: dict[str, str],
    spaces: Sequence[Space],
    ready: Ready,
    words: Sequence[str],
    trust: Sequence[str],
) -> Job:
    """A trial's job.

    Raises:
        ConfigError: If its values do not fit.
    """
    [(composed, config)] = ready([_lines({space: given[space.name] for space in spaces})], True)
    plan = make_plan([replace(composed, given=given)], [config], words, "search", trust)
    return replace(plan.jobs[0], number=number)


# -- the search -----------------------------------------------------------------------------------------------


class Runner(Protocol):
    """Whoever runs jobs."""

    @property
    def free(self) -> bool:
        """Whether another job can be started."""
        ...

    def before(self, job: Job) -> Outcome:
        """What a job has come to already."""
        ...

    def start(self, job: Job) -> None:
        """Starts a job."""
        ...

    def ended(self) -> list[Outcome]:
        """Waits a moment; what became of the jobs that have ended since."""
        ...

    def progress(self, job: Job) -> list[tuple[int, float]]:
        """Steps of evaluations, and what the job was judged by there: those since the last call."""
        ...

    def end(self, job: Job) -> None:
        """Asks a job to save and end."""
        ...

    def terminate(self) -> None:
        """Asks all of them."""
        ...


class Watcher(Protocol):
    """Whoever is told what happens."""

    plan: Plan

    def started(self, job: Job) -> None:
        """A trial begins."""
        ...

    def ended(self, outcome: Outcome) -> None:
        """A trial has ended, or had before."""
        ...

    def failed(self, outcome: Outcome) -> None:
        """A job has failed, and is tried again."""
        ...

    def look(self) -> None:
        """Time goes by."""
        ...


@dataclass
class _Running:
    """A job that runs, and the trials that it runs for: others may have drawn the same values.

    Attributes:
        job: The job.
        trials: The trials.
        reported: Steps of which the pruner knows.
        pruned: Whether it was asked to end because of that.
    """

    job: Job
    trials: list[Trial]
    reported: set[int] = field(default_factory=set)
    pruned: bool = False


class Search:
    """Asks, runs and tells, until there are as many trials as wanted.

    Args:
        study: What Optuna knows.
        spaces: What is drawn from.
        settings: How.
        sweep: How many run at once, and what is done about those that fail.
        plan: The search; trials are added to it.
        aims: Each objective and its direction. The first is the one that trials are pruned and listed by.
        make: Makes a trial's job from its number and values; raises ConfigError where they do not fit.
        runner: Runs jobs.
        board: Is told what happens.
        stop: When it becomes true, what runs saves and ends, and no more is started.

    Attributes:
        outcomes: What became of each job, by its id, and of each trial that did not fit.
    """

    def __init__(
        self,
        study: Study,
        spaces: Sequence[Space],
        settings: Searching,
        sweep: Sweep,
        plan: Plan,
        aims: Sequence[tuple[str, str]],
        make: Callable[[int, dict[str, str]], Job],
        runner: Runner,
        board: Watcher,
        stop: Callable[[], bool],
    ):
        self.study, self.plan, self.outcomes = study, plan, dict[str, Outcome]()
        self._spaces, self._settings, self._sweep, self._aims = spaces, settings, sweep, aims
        self._make, self._runner, self._board, self._stop = make, runner, board, stop
        self._running: dict[str, _Running] = {}
        self._waiting: deque[Any] = deque()
        self._total = _total(settings, spaces)
        self._end = math.inf if settings.timeout_minutes is None else time.monotonic() + 60 * settings.timeout_minutes
        self._tries: Counter[str] = Counter()
        self._halted = False
        self._take_up()

    def run(self) -> None:
        """Searches to the end, or until it is stopped."""
        try:
            while self._running or self._more():
                self._go_on()
        finally:
            self._runner.terminate()  # whatever has happened, no job goes on alone

    def _go_on(self) -> None:
        """Starts what can be started, and hears what has ended."""
        while self._runner.free and self._more():
            self._start()
        if self._halted or self._stop():
            self._halted = True
            self._runner.terminate()
        for outcome in self._runner.ended():
            self._ended(outcome)
        self._watch()
        self._board.look()

    def results(self) -> list[Outcome]:
        """What became of each job, in the order in which they were drawn; the best with all of its config."""
        outcomes = sorted(self.outcomes.values(), key=lambda outcome: outcome.job.number)
        finished = [o for o in outcomes if o.state == "finished"]
        if not finished:
            return outcomes
        sign = -1 if self.plan.rising else 1
        best = min(finished, key=lambda outcome: sign * outcome.value(self.plan.monitor))
        if not best.job.values:  # of an earlier start, of which only the journal tells
            made = self._make(best.job.number, best.job.given)
            whole = replace(best, job=replace(made, id=best.job.id, folder=best.job.folder))
            outcomes[outcomes.index(best)] = whole
        return outcomes

    # -- what was before

    def _take_up(self) -> None:
        """Reads from the study which trials are over, and which are to go on."""
        for trial in self.study.get_trials(deepcopy=False):
            if not trial.state.is_finished():
                self._waiting.append(trial)
            elif (told := trial.user_attrs.get("told")) is not None:
                self._keep(_outcome_from(told, trial.number, self.plan.folder))

    def _keep(self, outcome: Outcome) -> None:
        """Keeps and shows what became of a job."""
        if outcome.state != "unfit":
            self._add(outcome.job)
        if (known := self.outcomes.get(outcome.job.id)) is None or not known.done:
            self.outcomes[outcome.job.id] = outcome
        self._board.ended(outcome)

    def _add(self, job: Job) -> None:
        if all(job.id != other.id for other in self.plan.jobs):
            self.plan = self._board.plan = replace(self.plan, jobs=[*self.plan.jobs, job])

    # -- a trial

    def _more(self) -> bool:
        """Whether another trial is to be started."""
        if self._halted or self._stop() or time.monotonic() >= self._end:
            return False
        asked = len(self.study.get_trials(deepcopy=False))
        return bool(self._waiting) or self._total is None or asked < self._total

    def _start(self) -> None:
        """Asks for a trial, or takes up one that was asked for, and starts its job."""
        before = self._waiting.popleft() if self._waiting else None
        trial = self._ask(before)
        given = {space.name: space.text(space.suggest(trial)) for space in self._spaces}
        try:
            job = self._make(trial.number, given)
        except ConfigError as error:
            job = Job(trial.number, f"trial-{trial.number}", given, {}, {}, [], self.plan.folder / "unfit")
            self._tell([trial], Over(job, "unfit", error=str(error)))
            return
        if (same := self._running.get(job.id)) is not None:
            same.trials.append(trial)
            return
        if (known := self.outcomes.get(job.id)) is not None and known.done:
            self._tell([trial], known)
            return
        reported = set(before.intermediate_values) if before is not None else set[int]()
        self._begin(_Running(job, [trial], reported))

    def _ask(self, before: Any | None) -> Trial:
        """A new trial, or the one that an earlier start has asked for."""
        number = len(self.study.get_trials(deepcopy=False)) if before is None else before.number
        fixed = point(self._spaces, number) if self._settings.sampler == "grid" else None
        self.study.sampler = sampler_for(self._settings, number, fixed, self._sweep.jobs or 1)
        if before is None:
            return self.study.ask()
        from optuna.trial import Trial

        return Trial(self.study, before._trial_id)

    def _begin(self, running: _Running) -> None:
        """Starts a job, unless it is done already: the search may have been killed before it was told."""
        self._add(running.job)
        self.plan.write()
        before = self._runner.before(running.job)
        if before.done:
            self._tell(running.trials, before)
            return
        self._running[running.job.id] = running
        self._board.started(running.job)
        self._runner.start(running.job)

    def _watch(self) -> None:
        """Lets the pruner look at what runs."""
        if self._settings.pruner == "none":
            return
        for running in self._running.values():
            trial = running.trials[0]
            for step, value in self._runner.progress(running.job):
                if step not in running.reported:
                    running.reported.add(step)
                    trial.report(value, step)
                    running.pruned = running.pruned or trial.should_prune()
            if running.pruned:
                self._runner.end(running.job)

    def _ended(self, outcome: Outcome) -> None:
        """Tells what a job has come to, or tries it again."""
        running = self._running.pop(outcome.job.id)
        if outcome.done:
            self._tell(running.trials, outcome)
        elif running.pruned and not self._halted:
            self._tell(running.trials, Over(outcome.job, "pruned", seconds=outcome.seconds))
        elif outcome.state == "failed" and not self._halted and self._tries[outcome.job.id] < self._sweep.retries:
            self._tries[outcome.job.id] += 1
            self._board.failed(outcome)
            self._begin(running)
        else:
            self._keep(outcome)  # and is not told: the next start takes it up
            self._halted = self._halted or (outcome.state == "failed" and self._sweep.on_failure == "stop")

    def _tell(self, trials: Sequence[Trial], outcome: Outcome) -> None:
        """Tells Optuna what trials have come to."""
        from optuna.trial import TrialState

        if any(metric == "seconds" for metric, _ in self._aims):
            outcome = replace(outcome, metrics=outcome.metrics | {"seconds": outcome.seconds})
        values = {metric: outcome.value(metric) for metric, _ in self._aims}
        lacking = [metric for metric, value in values.items() if math.isnan(value)]
        if outcome.state == "finished" and lacking:
            error = f"there is no {lacking[0]} to judge it by; there are {', '.join(outcome.metrics)}"
            self._keep(replace(outcome, state="failed", error=error))
            return
        for trial in trials:
            self._keep(replace(outcome, job=replace(outcome.job, number=trial.number)))
            trial.set_user_attr("told", _told_of(outcome))
            if outcome.state == "finished":
                self.study.tell(trial, [*values.values()])
            else:
                self.study.tell(trial, state=TrialState.PRUNED)


def _told_of(outcome: Outcome) -> dict[str, Any]:
    job = outcome.job
    named = {"id": job.id, "folder": job.folder.name, "given": job.given}
    return named | {key: getattr(outcome, key) for key in ("state", "metrics", "error", "seconds")}


def _outcome_from(told: Mapping[str, Any], number: int, place: Path) -> Outcome:
    job = Job(number, told["id"], told["given"], {}, {}, [], place / told["folder"])
    kind = Over if told["state"] in ("pruned", "unfit") else Outcome
    return kind(job, told["state"], told["metrics"], told["error"], told["seconds"])


class _Processes:
    """Runs jobs in processes of their own."""

    def __init__(self, config: RunConfig, trust: Sequence[str], monitor: str):
        self._pruned: set[str] = set()
        self._pool, self._monitor, self._read = Pool(slots(config.sweep.jobs), trust), monitor, dict[str, int]()

    @property
    def free(self) -> bool:
        return bool(self._pool.free)

    def before(self, job: Job) -> Outcome:
        return outcome_of(job)

    def start(self, job: Job) -> None:
        self._pool.start(job)

    def ended(self) -> list[Outcome]:
        found = [outcome_of(job) for job in self._pool.ended()]
        for job in (o.job for o in found if o.state == "stopped" and o.job.id in self._pruned):
            folder.write_json(job.folder / "status.json", status_of(job.folder) | {"state": "pruned"})
        return found

    def progress(self, job: Job) -> list[tuple[int, float]]:
        return [*self._new_values(job)]

    def end(self, job: Job) -> None:
        self._pruned.add(job.id)
        self._pool.end(job)

    def terminate(self) -> None:
        self._pool.terminate()

    def _new_values(self, job: Job) -> Iterator[tuple[int, float]]:
        """From the whole lines that the job has written since the last look; all, where it has begun anew."""
        try:
            with (job.folder / "metrics.jsonl").open("rb") as file:
                before = self._read.get(job.id, 0)
                file.seek(before if before <= file.seek(0, 2) else 0)
                *lines, rest = file.read().split(b"\n")
                self._read[job.id] = file.tell() - len(rest)
        except OSError:
            return
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and isinstance(value := found.get(self._monitor), int | float):
                yield int(found["step"]), float(value)
