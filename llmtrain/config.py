"""The config of one run: its closed sections, its chosen parts, and the check of both.

`check` turns plain nested dicts (what YAML and overrides compose to) into a `RunConfig`, or raises one
`ConfigError` with everything that is wrong. The meaning of every knob of a closed section is written here,
its value in `conf/config.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Le

from llmtrain.build import GROUPS, Choice, choose, validate
from llmtrain.knobs import ConfigError, Count, Fraction, Misfit, Natural, NonNegative, Positive, Share
from llmtrain.synonyms import meant


@dataclass(frozen=True)
class Run:
    """Where a run lives.

    Args:
        name: Name of the run's folder under `run.dir`. null makes one from the date, the model and the
            optimizer, so that no two runs share a folder.
        dir: Folder that holds the folders of all runs.
        cache: Folder of prepared data (tokens, tokenizers), shared by all runs. `~` is your home.
    """

    name: str | None
    dir: str
    cache: str


@dataclass(frozen=True)
class Train:
    """How long and how to train.

    Args:
        steps: Length of the run in optimizer steps. Raise: lower loss, longer run, and later decay of the
            learning rate. Lower: the opposite. Give exactly one of steps, epochs, tokens and minutes.
        epochs: Length in passes over the training data. Raise: lower training loss, and overfitting once
            the data has been seen too often. Lower: a shorter run.
        tokens: Length in training tokens. Raise: lower loss, longer run. Lower: a shorter run; about 20
            tokens per parameter is compute-optimal for a decoder (Hoffmann et al. 2022, arXiv:2203.15556).
        minutes: Length in minutes of training, evaluation and saving included. Raise: lower loss, longer run.
            Lower: a shorter run. Such a run depends on the machine's speed and cannot be repeated bit by bit.
        batch_size: Samples per optimizer step over all devices. Raise: less noisy gradients and better use of
            the device, more memory, fewer steps per token. Lower: noisier steps, more of them per token.
        accumulate: Micro-batches that one batch is split into; gradients are added up before the step. Raise:
            less memory, somewhat slower. Lower: more memory, faster. Never changes the mathematics, but for batch norm,
            which goes by micro-batches. auto: as few as are foreseen to fit into the memory that the device has free.
            When a step runs out of memory at the start of a run, there are more of them than that.
        packing: How the documents of a text become samples. stream: they follow one another, and every `context` tokens
            are a sample. best_fit: each sample begins with a document, and documents are put together so that as few
            as can be are cut (Ding et al. 2024, arXiv:2404.10830). single: each document begins a sample of its own,
            the rest of which is left out. model.document_mask keeps documents of one sample apart.
        balance: How evenly classes are drawn: one with n of the samples gets a share of each epoch in proportion to
            n^(1 - balance). Raise: rare classes come more often, their samples repeated; at 1 all come equally often.
            Lower: nearer to the data as it is; at 0 each sample comes once in an epoch. Beside a loss with
            class_weights=balanced, which makes up for the same, rare classes would count twice.
        buckets: Lengths that padded samples are cut to, in even steps up to the context: samples of like length come
            together, and each micro-batch takes the least length that holds it. Raise: less time is spent on padding,
            but like comes with like, and train.compile compiles each length. Lower: samples mix more freely; 1 cuts
            nothing. Above 1 the order of samples depends on how many make a micro-batch, on train.accumulate too.
        grad_clip: Where gradients are cut, in the measure of clip_by. Raise: clips less often, spikes pass. Lower:
            clips more often, calmer and slower. null never clips.
        clip_by: norm: the whole gradient is scaled down to an L2 norm of grad_clip (Pascanu et al. 2013,
            arXiv:1211.5063). value: each number is cut to grad_clip. adaptive: the gradient of each unit, a row or a
            kernel, is scaled down to grad_clip times the norm of its weights (Brock et al. 2021, arXiv:2102.06171);
            0.01 is usual.
        head_chunk: Tokens whose logits are held at a time, in training and evaluation; the head takes a micro-batch
            chunk by chunk, each with its gradients. Raise: faster, more memory. Lower: less memory, which is much for
            large vocabularies; somewhat slower. null holds all. Results change by rounding only.
        recompute: Share of the blocks of a model whose activations are computed again in the backward pass instead of
            being kept (Chen et al. 2016, arXiv:1604.06174), the first blocks; with train.compile=model the compiler
            chooses what is, up to that share. Raise: less memory; at 1 a step takes about a third longer. Lower:
            faster; 0 keeps all. Results are the same bit by bit, and when compiled but for rounding.
        compile: off: plain PyTorch. block: compiles each block of the model, which starts sooner. model:
            compiles the whole model with its loss, which is fastest per step. Both need a C++ compiler on CPU. auto:
            model for a model that can be and a run long enough to pay for it, else off.
        compile_mode: What torch.compile goes for, by torch's own names. default: kernels without trials.
            reduce-overhead: a step is recorded and replayed as CUDA graphs, which pays where the GPU waits for the
            host, as it does for small models; it needs memory of its own. max-autotune-no-cudagraphs: tries several
            kernels for each product, minutes of compiling for some percent of a step. max-autotune: both.
        profile: true: up to three of the first steps are written down, operation by operation, to
            profile/trace.json.gz in the run's folder, which https://ui.perfetto.dev shows; the closing table names
            what took longest. These steps are slower. false: nothing is.
        attention: auto: where a mask or a cap keeps the fastest kernels away (documents apart, a window, padding,
            alibi, a softcap), a GPU in bf16 or fp16 goes by blocks of 128 tokens and leaves out those that nobody sees,
            with torch's flex_attention, which is compiled at the first step; this takes samples of whole blocks, no
            attention dropout and train.buckets=1. sdpa: torch's scaled_dot_product_attention everywhere, with a mask
            for every pair of tokens. Results change by rounding only.
        kernels: What computes norms, swiglu and the rotation of rope on a GPU. torch: several kernels each, or those
            that train.compile makes. liger: one each, of Liger (Hsu et al. 2024, arXiv:2410.10989;
            pip install 'llmtrain[liger]'), for train.compile=off: fewer waits for the host, and swiglu keeps a third
            less. Its head and loss in one is train.head_chunk. Results change by rounding only.
        seed: Start of every random number (weights, data order, dropout). Raise or lower: another draw; the
            same seed on the same machine gives the same run, bit by bit on CPU.
        device: auto: the GPU if there is one, else the CPU. cpu: the CPU. cuda: the GPU.
        threads: CPU threads of one operation. Raise: faster until there are as many as cores. Lower: leaves
            cores to others. null takes as many as there are cores. Other numbers of threads round differently.
    """

    steps: Count | None
    epochs: Positive | None
    tokens: Count | None
    minutes: Positive | None
    batch_size: Count
    accumulate: Count | Literal["auto"]
    packing: Literal["stream", "best_fit", "single"]
    balance: Annotated[float, Ge(0), Le(1)]
    buckets: Count
    grad_clip: Positive | None
    clip_by: Literal["norm", "value", "adaptive"]
    head_chunk: Count | None
    recompute: Annotated[float, Ge(0), Le(1)]
    compile: Literal["auto", "off", "block", "model"]
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]
    profile: bool
    attention: Literal["auto", "sdpa"]
    kernels: Literal["torch", "liger"]
    seed: Natural
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Ge(1), Le(1024)] | None

    @property
    def pieces(self) -> int:
        """Micro-batches in a batch; 1 where that is still to be picked."""
        return 1 if self.accumulate == "auto" else self.accumulate


@dataclass(frozen=True)
class Params:
    """Which parameters are treated apart, with any optimizer.

    Keys are globs over names of parameters and of what they are in (`head` fits `head.weight`); the last match counts,
    and a glob without a match is an error. `llmtrain show optim=adam` lists the groups that come of it.

    Args:
        lr_scale: Multipliers of the learning rate: params.lr_scale={embedding:0.1}. Raise: that part learns faster.
            Lower: it learns slower.
        decay_scale: Multipliers of weight decay, L1 and L2, which are 1 for matrices and kernels and 0 for biases,
            norms and embeddings: params.decay_scale={head:0}. Raise: smaller weights there. Lower: that part is left
            alone.
        layer_decay: Rate of each block over that of the block after it (Howard & Ruder 2018, arXiv:1801.06146; Bao et
            al. 2022, arXiv:2106.08254). Raise: all learn alike; 1 is off. Lower: early blocks and embeddings keep
            what they have; 0.65 to 0.95 is usual when a trained model is trained on.
        freeze: Globs over the parameters that are not trained: params.freeze=[embedding].
    """

    lr_scale: dict[str, NonNegative]
    decay_scale: dict[str, NonNegative]
    layer_decay: Share
    freeze: list[str]


@dataclass(frozen=True)
class Eval:
    """When and how to measure on held-out data.

    Args:
        every: Optimizer steps between evaluations; there is always one at the end. Raise: less time spent,
            coarser curve, a later best checkpoint. Lower: finer curve, more time spent.
        batches: Batches per evaluation, spread evenly over the held-out data, always the same ones. Raise:
            a surer number, slower. Lower: noisier, faster. null takes all of the held-out data.
        metrics: Metrics to measure, beside the loss: eval.metrics=[accuracy,f1_macro,roc_auc]. Each task has its own,
            and a wrong name lists them. roc_auc and pr_auc keep every probability, others only sums. null measures
            the usual ones of the task.
        monitor: The metric that says which evaluation is the best one, whose checkpoint is kept; it is measured too.
        mode: auto: lower is better for losses and errors, higher for shares and areas. min: lower is better. max:
            higher is better.
        patience: Evaluations in a row without improvement of `monitor` after which the run ends; schedules go on as
            if it did not. Raise: waits longer, and noise ends nothing. Lower: ends sooner. null goes to the end.
        min_delta: What `monitor` must be better by to count as an improvement, in its own units. Raise: small gains
            no longer count, so patience ends sooner. Lower: smaller gains count; 0 takes any.
        val_fraction: Share of the data, the test aside, that is held out. Raise: a surer estimate, less to learn
            from. Lower: more to learn from, a noisier estimate; 0 learns from all of it and judges by that too, as is
            done once everything is chosen.
        test_fraction: Share of the samples that is kept for one test after training. Raise: a surer test, less to
            learn from. Lower: more to learn from. null keeps 0.2 of samples with labels, and none of a text.
        test_fold: Which stretch of that size is the test; the first is 0. Raise or lower: another one, so that each
            sample is in the test of one run (nested cross-validation). null: the first.
        split_seed: Start of the draw of who is held out, apart from `train.seed`: the same samples in every run. Raise
            or lower: another draw.
        stratify: true: each side gets its share of each class. false: the draw does not look at classes.
        folds: Parts of equal size that the data, the test aside, is cut into for cross-validation; one of them is
            held out in the place of `val_fraction`. Raise: more to learn from, more runs to make. Lower: fewer runs.
            null: no folds.
        fold: The fold that is held out; the first is 0. Raise or lower: another one. null: no folds.
    """

    every: Count
    batches: Count | None
    metrics: list[str] | None
    monitor: str
    mode: Literal["auto", "min", "max"]
    patience: Count | None
    min_delta: NonNegative
    val_fraction: Fraction
    test_fraction: Fraction | None
    test_fold: Natural | None
    split_seed: Natural
    stratify: bool
    folds: Annotated[int, Ge(2)] | None
    fold: Natural | None


@dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep.

    Args:
        every: Optimizer steps between checkpoints; there is always one at the end. Raise: less writing, more
            work lost when a run is killed. Lower: less lost, more writing. null saves only at the end and
            when a signal asks.
        keep: Newest checkpoints that stay; the best by eval.monitor stays as well. Raise: more disk, more
            to fall back on. Lower: less disk.
        best: true: saves whenever an evaluation is the best so far. false: the best of those that were saved
            anyway is kept.
        other_data: refuse: a run goes on only with the data and the tokenizer that its checkpoint was trained on.
            allow: also with others, as when files have come; the vocabulary must be as large.
    """

    every: Count | None
    keep: Count
    best: bool
    other_data: Literal["refuse", "allow"]


@dataclass(frozen=True)
class Log:
    """What is told during a run.

    Args:
        every: Optimizer steps per line of metrics. Loss and gradient norm are means over them. Raise: smoother
            and cheaper. Lower: finer; each line waits for the device once.
        tensorboard: true: also writes TensorBoard events into the run's folder. false: metrics.jsonl alone.
        picture: Path of an SVG picture of the screen, written at the end. null writes none.
    """

    every: Count
    tensorboard: bool
    picture: str | None


@dataclass(frozen=True)
class Sample:
    """How text is made from a trained model.

    Args:
        prompt: Text to go on from.
        tokens: Tokens to make. Raise: longer text, more time. Lower: shorter.
        temperature: Divides the logits. Raise: more surprising, then nonsense. Lower: more predictable, then
            repetition; 0 always takes the likeliest token.
        top_k: Draw among this many likeliest tokens only. Raise: more variety. Lower: safer. null: no limit.
        top_p: Draw among the likeliest tokens that together have this probability (nucleus sampling, Holtzman
            et al. 2020, arXiv:1904.09751). Raise: more variety. Lower: safer. 1 is no limit.
        seed: Start of the random draws. Raise or lower: another text; the same seed gives the same text.
    """

    prompt: str
    tokens: Natural
    temperature: NonNegative
    top_k: Count | None
    top_p: Share
    seed: Natural


@dataclass(frozen=True)
class Evaluation:
    """What `llmtrain eval` does.

    Args:
        run: A run's folder, or one of its checkpoints.
        checkpoint: best: the best by eval.monitor. last: the newest. A number: that step.
        batches: Batches to judge by, spread evenly over the held-out data. Raise: a surer number, slower.
            Lower: noisier, faster. null takes all of the held-out data.
        batch_size: Samples per forward pass. Raise: faster on a GPU, more memory. Lower: less memory. null
            takes that of training.
        split: val: the samples held out for validation. test: those kept for the test, where there are any.
        metrics: Metrics to measure, as eval.metrics of training. null measures those of the run.
        device: auto: the GPU if there is one, else the CPU. cpu: the CPU. cuda: the GPU.
    """

    run: str
    checkpoint: str
    batches: Count | None
    batch_size: Count | None
    split: Literal["val", "test"]
    metrics: list[str] | None
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Generation(Sample):
    """What `llmtrain generate` does, beside the knobs of `sample`.

    Args:
        run: A run's folder, or one of its checkpoints.
        checkpoint: best: the best by eval.monitor. last: the newest. A number: that step.
        stream: true: shows each piece of text as it is made. false: shows the whole at the end.
        device: auto: the GPU if there is one, else the CPU. cpu: the CPU. cuda: the GPU.
    """

    run: str
    checkpoint: str
    stream: bool
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Export:
    """What `llmtrain export` does.

    Args:
        run: A run's folder, or one of its checkpoints.
        checkpoint: best: the best by eval.monitor. last: the newest. A number: that step.
        format: hf: what transformers loads: config.json, model.safetensors and the tokenizer. safetensors: weights
            by our own names, and the knobs as JSON. onnx: a graph for ONNX runtimes. torch: a program for
            torch.export.load.
        out: The folder to write, which is not there yet.
    """

    run: str
    checkpoint: str
    format: Literal["hf", "safetensors", "onnx", "torch"]
    out: str


@dataclass(frozen=True)
class Sweep:
    """How the jobs of a grid (-m), of `llmtrain cv` and of a search are run.

    Args:
        name: Name of the sweep's folder under `run.dir`. null makes one from the command line, so that the same command
            goes on with the same sweep: finished jobs are kept, half-finished ones resumed.
        jobs: Jobs that run at once, each a process of its own; CPU threads are divided among them, and each has a GPU
            to itself where there are as many. Raise: done sooner, until devices and memory are full. Lower: each is
            faster. null: one for each GPU, or one. With hydra/launcher=submitit_slurm it is how many the cluster runs.
        seeds: Runs of each point, with train.seed and the numbers after it; points are compared by their means. Raise:
            surer, longer. Lower: faster; 1 says nothing of chance.
        zip: Keys whose values go together instead of crossing: sweep.zip=[optim.lr,train.batch_size].
        on_failure: continue: a job that fails stops no other. stop: it stops those that run, and no more are started.
        retries: Times that a job which failed is tried again. Raise: chance failures are outlived. Lower: told sooner.
    """

    name: str | None
    jobs: Count | None
    seeds: Count
    zip: list[str]
    on_failure: Literal["continue", "stop"]
    retries: Natural


@dataclass(frozen=True)
class CrossValidation:
    """How `llmtrain cv` chooses.

    Args:
        folds: Parts of equal size that all but the test is cut into; each is held out once. Raise: more to learn
            from in each, more runs. Lower: fewer runs; 5 and 10 are usual.
        choose: best: the point with the best mean. one_se: the most regularized one that is within a standard error of
            it (Breiman et al. 1984).
        refit: true: the chosen point is trained on all but the test, and tested once. false: it is only named.
        nested: true: all of it is done beside each of as many tests as there are folds, and the mean over them is an
            estimate that no choice has seen (Varma & Simon 2006). false: beside one test.
    """

    folds: Annotated[int, Ge(2)]
    choose: Literal["best", "one_se"]
    refit: bool
    nested: bool


@dataclass(frozen=True)
class Benching:
    """How `llmtrain bench` measures.

    Args:
        warmup: Steps before those that count, the first of which compile and take memory; fewer, one at least, where
            they last longer than `seconds`. Raise: surer that all is settled. Lower: done sooner.
        seconds: How long whole steps are measured, three at least; steps taken apart get half of it. Raise: surer,
            also of rare slow steps. Lower: done sooner.
        steps: Whole steps to measure, and as many taken apart. Raise: surer. Lower: done sooner. null: as many as fit
            into `seconds`.
        start: true: also starts the run in a process of its own, to tell what starting takes. A run that compiles is
            started twice: with an empty cache, then with what the first start left there. false: does not.
    """

    warmup: Count
    seconds: Positive
    steps: Count | None
    start: bool


@dataclass(frozen=True)
class Searching:
    """How values are searched for, with `llmtrain train -m hydra/sweeper=optuna`.

    Args:
        name: optuna: which sweeper this is.
        sampler: tpe: draws where good trials are denser than bad ones (Bergstra et al. 2011; Watanabe 2023,
            arXiv:2304.11127). random: anywhere. grid: every point once; ranges with steps and lists alone. cmaes: from
            a normal distribution that follows the good trials (Hansen 2016, arXiv:1604.00772); numbers alone gain by
            it. qmc: from a Sobol sequence, which covers a space more evenly than chance does.
        n_trials: Trials in all, those of earlier starts among them. Raise: a better find, longer. Lower: done sooner.
            null: every point of the grid, or as many as `timeout_minutes` allows.
        timeout_minutes: Minutes of one start after which no trial is begun; those that run go on to their end.
            Raise: more trials. Lower: fewer. null: no limit.
        startup_trials: Trials that are drawn at random before tpe or cmaes learns from them, and finished before
            median prunes. Raise: surer of the whole space. Lower: sooner at what looks good.
        seed: Start of the draws. Raise or lower: another search. Draws of several jobs at once also depend on which
            ends first.
        objectives: Metrics of the validation such as val_loss, and seconds, which is what a trial took. Of several,
            those trials are shown that no other beats in all of them. null: what `eval.monitor` says.
        directions: minimize or maximize, for each of the objectives. null: as each metric is known.
        pruner: none: every trial runs to its end. median: ends those that are worse than the median of the finished
            ones at the same step. successive_halving: of those that get to a step, one of `reduction` goes on (Li et
            al. 2020, arXiv:1810.05934). hyperband: the same from several first steps (Li et al. 2018,
            arXiv:1603.06560).
        warmup_steps: Optimizer steps before which no trial is pruned. Raise: slow starters get a chance. Lower: bad
            trials cost less; 0 leaves it to the pruner.
        interval_steps: Optimizer steps between two looks of median. Raise: fewer. Lower: more, down to one at each
            evaluation.
        reduction: Of so many trials one goes on, at each step that successive_halving and hyperband look at. Raise:
            harder choice, faster. Lower: milder.
    """

    name: Literal["optuna"]
    sampler: Literal["tpe", "random", "grid", "cmaes", "qmc"]
    n_trials: Count | None
    timeout_minutes: Positive | None
    startup_trials: Natural
    seed: Natural
    objectives: list[str] | None
    directions: list[Literal["minimize", "maximize"]] | None
    pruner: Literal["none", "median", "hyperband", "successive_halving"]
    warmup_steps: Natural
    interval_steps: Count
    reduction: Annotated[int, Ge(2)]


COMMANDS: dict[str, type] = {"eval": Evaluation, "generate": Generation, "export": Export}
SECTIONS: dict[str, type] = {
    "run": Run,
    "train": Train,
    "params": Params,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "log": Log,
    "sample": Sample,
    "sweep": Sweep,
    "cv": CrossValidation,
    "bench": Benching,
}
TOLD = SECTIONS | {"hydra.sweeper": Searching}
"""The closed sections that `llmtrain explain` tells of."""
LENGTHS = ("steps", "epochs", "tokens", "minutes")


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is made from. The parts are choices, the sections plain values.

    Args:
        resume: never: refuses a folder that holds a run. auto: goes on from the newest good checkpoint of the
            run named `run.name`, or starts it. Any other text is the path of a run or a checkpoint to start
            from in a new folder.
    """

    run: Run
    train: Train
    params: Params
    eval: Eval
    checkpoint: Checkpoint
    log: Log
    sample: Sample
    sweep: Sweep
    cv: CrossValidation
    bench: Benching
    model: Choice
    optim: Choice
    loss: Choice
    regularization: Choice
    schedule: Choice
    momentum_schedule: Choice
    weight_decay_schedule: Choice
    batch_schedule: Choice
    precision: Choice
    data: Choice
    augment: Choice
    tokenizer: Choice
    task: Choice
    init: Choice
    resume: str

    def plain(self) -> dict[str, Any]:
        """The config as nested dicts of plain values, as it is written to a run's `config.yaml`."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return {"name": value.part.name, **value.values}
    return dict(vars(value)) if type(value) in SECTIONS.values() else value


def knobs_of(section: type) -> dict[str, Any]:
    """The knobs of a closed section and their types."""
    return get_type_hints(section, include_extras=True)


def check(given: Mapping[str, Any], trust: Sequence[str] = ()) -> RunConfig:
    """Checks a composed config against its schema, all of it before any of it is used.

    Args:
        given: Nested dicts of plain values, every interpolation resolved.
        trust: Packages outside llmtrain that parts may come from.

    Raises:
        ConfigError: With every unknown key, wrong type, value out of range, missing value and misfit of
            sections with each other.
    """
    config, misfits = read(given, trust)
    if misfits:
        raise ConfigError(misfits)
    return config


def read(given: Mapping[str, Any], trust: Sequence[str] = ()) -> tuple[RunConfig, list[Misfit]]:
    """Like `check`, but tells the misfits beside what can be used.

    Returns:
        The config, None in the place of every section, part and knob that has no good value; the misfits.
    """
    misfits: list[Misfit] = []
    checked: dict[str, Any] = {}
    for key in [*SECTIONS, *GROUPS, "resume"]:
        if key not in given:
            misfits.append(Misfit(key, "(missing)", "has no value"))
    for key in [*SECTIONS, *GROUPS, "resume"]:
        checked[key] = None
    for key, value in given.items():
        if key in SECTIONS:
            found, wrong = read_section(key, value)
        elif key in GROUPS:
            found, wrong = choose(key, value, trust)
        elif key == "resume":
            values, wrong = validate({"resume": str}, {"resume": value})
            found = None if wrong else values["resume"]
        else:
            misfits.append(_unknown(key, value, given))
            continue
        checked[key] = found
        misfits += wrong
    if checked["train"] is not None:
        misfits += _lengths(given["train"])
    if checked["eval"] is not None:
        misfits += _folds(checked["eval"])
    return RunConfig(**checked), [_elsewhere(misfit, checked) for misfit in misfits]


def _elsewhere(misfit: Misfit, checked: Mapping[str, Any]) -> Misfit:
    """For a knob that its section does not have: the one of that name in another section, if there is one."""
    schemas = {name: knobs_of(section) for name, section in SECTIONS.items()}
    schemas |= {group: choice.part.knobs for group in GROUPS if (choice := checked[group]) is not None}
    section, _, knob = misfit.key.partition(".")
    if section not in schemas or knob in schemas[section]:
        return misfit
    found = next((f"{other}.{knob}" for other, schema in schemas.items() if knob in schema), None)
    return replace(misfit, suggestion=found or misfit.suggestion)


def check_command(command: str, given: Mapping[str, Any]) -> Any:
    """The checked settings of `llmtrain eval`, `generate` or `export`.

    Raises:
        ConfigError: With everything that is wrong with them.
    """
    values, misfits = validate(knobs_of(COMMANDS[command]), given)
    if misfits:
        raise ConfigError(misfits)
    return COMMANDS[command](**values)


def read_section(key: str, value: Any) -> tuple[Any, list[Misfit]]:
    """A closed section from its plain values, None for each that is wrong, and what is wrong with them."""
    if not isinstance(value, dict):
        return None, [Misfit(key, value, "must be a section with " + ", ".join(knobs_of(SECTIONS[key])))]
    schema = knobs_of(SECTIONS[key])
    values, misfits = validate(schema, value)
    wrong = {misfit.key for misfit in misfits}
    usable = {knob: None if knob in wrong else values[knob] for knob in schema}
    return SECTIONS[key](**usable), [misfit.under(key) for misfit in misfits]


def _lengths(train: Mapping[str, Any]) -> list[Misfit]:
    """A run has exactly one length."""
    given = {name: train[name] for name in LENGTHS if train.get(name) is not None}
    if len(given) == 1:
        return []
    told = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
    rule = "a run has exactly one length; give one of " + ", ".join(f"train.{name}" for name in LENGTHS)
    return [Misfit("train", told, rule)]


def _folds(section: Eval) -> list[Misfit]:
    """A fold is one of so many."""
    fold, folds = section.fold, section.folds
    if (fold is None) != (folds is None):
        return [Misfit("eval.fold", fold, "goes with eval.folds: a fold is one of so many")]
    if fold is not None and folds is not None and fold >= folds:
        return [Misfit("eval.fold", fold, f"must be below eval.folds ({folds}): the first fold is 0", str(folds - 1))]
    return _test_fold(section)


def _test_fold(section: Eval) -> list[Misfit]:
    """The test is a whole stretch of the data."""
    fold, share = section.test_fold, section.test_fraction
    if not fold or (share and share * (fold + 1) <= 1 + 1e-9):
        return []
    rule = f"is no stretch of the size of eval.test_fraction={share}" if share else "goes with eval.test_fraction"
    return [Misfit("eval.test_fold", fold, rule)]


def _unknown(key: str, value: Any, given: Mapping[str, Any]) -> Misfit:
    """An unknown section, told with the knob that was given in it and the knob that may be meant."""
    while isinstance(value, dict) and len(value) == 1:
        inner, value = next(iter(value.items()))
        key = f"{key}.{inner}"
    known = [*SECTIONS, *GROUPS, "resume"]
    for section in known:
        if isinstance(given.get(section), dict):
            known = known + [f"{section}.{knob}" for knob in given[section]]
    return Misfit(key, value, "no such knob", meant(key, known))
