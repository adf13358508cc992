"""How well the trainer does beside scikit-learn: small jobs with real data, each beside what is fitted to its samples.

Tables and images beside linear models, texts with a label beside TF-IDF and a linear support vector machine, language
models beside counts of tokens. Training and its rival see the same training samples and are judged once, by the same
test samples, or the same held-out tokens where a text has no test; what a rival has to choose it chooses by
cross-validation on the training samples, or by the validation samples. Each seed draws another split, too. A run that
does not come to its end is told in its row, and the jobs after it go on; a signal ends them all.

    python benchmarks/quality.py [--only digits ...] [--seeds 3] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from common import config_of, machine

from llmtrain.config import RunConfig
from llmtrain.run import prepare_data, task_of, train
from llmtrain.screen import Screen
from llmtrain.story import Origin
from llmtrain.types import Data, Result, Samples

SHARED = ("eval.batches=null", "sample.tokens=0", "log.tensorboard=false")
"""What every run has: whole evaluations, and nothing that is only for people."""
PATHS = {"$STDLIB": sysconfig.get_paths()["stdlib"]}
"""Words of the commands that stand for places of this machine."""


@dataclass(frozen=True)
class Job:
    """What is trained, and what it is held against.

    Attributes:
        words: Of the command line.
        metric: What is compared.
        rivals: The same metric, of what else can be fitted to the data, by name.
        seeds: How many; each draws its own split.
    """

    words: str
    metric: str
    rivals: Callable[[RunConfig, Data], dict[str, float]]
    seeds: int = 3


@dataclass(frozen=True)
class Found:
    """One run: what it reached, what its rivals did, and how long it took."""

    ours: float
    rivals: dict[str, float]
    seconds: float


class Unfinished(Exception):
    """A run has no figure: it was stopped, or it diverged."""

    def __init__(self, result: Result, seed: int):
        super().__init__(f"{result.status} at step {result.step}, seed {seed}")
        self.stopped = result.signal is not None


def main() -> None:
    """Trains, fits and prints a table; each run on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=JOBS)
    parser.add_argument("--seeds", type=int, help="of every job; otherwise each has its own number")
    parser.add_argument("overrides", nargs="*", help="for every job")
    options = parser.parse_intermixed_args()
    print(f"machine: {machine()}\n\n| job | `llmtrain train` | metric | ours | baseline | seconds | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.only or JOBS:
        job = JOBS[name]
        try:
            found = [run(job, seed, options.overrides) for seed in range(options.seeds or job.seeds)]
        except Unfinished as error:
            print(f"| {name} | `{job.words}` | {job.metric.replace('_', ' ')} | {error} | | | |", flush=True)
            if error.stopped:
                return
        else:
            print(row(name, job, found), flush=True)


def run(job: Job, seed: int, overrides: Sequence[str] = ()) -> Found:
    """Trains in a folder that is thrown away, and fits the rivals to the same samples.

    Raises:
        Unfinished: If the run did not come to its end.
    """
    words = job.words
    for word, path in PATHS.items():
        words = words.replace(word, path)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        drawn = (f"train.seed={seed}", f"eval.split_seed={seed}", f"run.dir={scratch}")
        config = config_of(*SHARED, *drawn, *words.split(), *overrides)
        begin = time.monotonic()
        result = train(config, Origin())
        seconds = time.monotonic() - begin
        if result.status != "finished":
            raise Unfinished(result, seed)
        found = Found(result.metrics[job.metric], job.rivals(config, prepare_data(config, Screen(quiet=True))), seconds)
    told = ", ".join(f"{rival} {value:.4f}" for rival, value in found.rivals.items())
    print(f"seed {seed}: ours {found.ours:.4f}, {told}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def row(name: str, job: Job, found: Sequence[Found]) -> str:
    """A job's row: means over the seeds, and their range. Level is where the seeds do not agree on who is ahead."""
    ours = [one.ours for one in found]
    rivals = {rival: [one.rivals[rival] for one in found] for rival in found[0].rivals}
    sign = -1 if job.metric.endswith("loss") else 1
    leads = [min(sign * (one.ours - value) for value in one.rivals.values()) for one in found]
    told = ", ".join(f"{rival} {spread(values, job.metric)}" for rival, values in rivals.items())
    verdict = "better" if min(leads) > 0 else "worse" if max(leads) < 0 else "level"
    seconds = statistics.mean(one.seconds for one in found)
    metric = job.metric.replace("_", " ")
    return f"| {name} | `{job.words}` | {metric} | {spread(ours, job.metric)} | {told} | {seconds:.0f} | {verdict} |"


def spread(values: Sequence[float], metric: str) -> str:
    """Mean, least and most of a metric over the seeds."""
    form = "{:.1%}" if metric.endswith("accuracy") else "{:.3f}"
    mean, least, most = (form.format(value) for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})" if len(values) > 1 else mean


# -- rivals ---------------------------------------------------------------------------------------------------


def logistic_regression(config: RunConfig, data: Data) -> dict[str, float]:
    """Test accuracy of logistic regression on standardized features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    search = GridSearchCV(model, {"logisticregression__C": [0.01, 0.03, 0.1, 0.3, 1, 3, 10]}, cv=5)
    return {"logistic regression": _tested(search, data)}


def ridge(config: RunConfig, data: Data) -> dict[str, float]:
    """Test R2 of linear regression with a penalty on its squared weights."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(Ridge(), {"alpha": [0.01, 0.1, 1, 3, 10, 30, 100]}, cv=5)
    return {"ridge regression": _tested(search, data)}


def _tested(search: object, data: Data) -> float:
    """What scikit-learn calls the score of a model, on the test samples: accuracy, or R2."""
    (inputs, targets), (asked, answers) = _all(data.train), _all(data.test)
    found = search.fit(inputs.reshape(len(inputs), -1), targets.squeeze())
    return float(found.score(asked.reshape(len(asked), -1), answers.squeeze()))


def tfidf(config: RunConfig, data: Data) -> dict[str, float]:
    """Test accuracy of a linear support vector machine on TF-IDF of words and pairs, of pieces of words, and of tokens.

    The last sees what the network sees, phrases of up to three of its tokens. The penalty is chosen by the validation
    samples; pieces of one file stand on both sides of a fold of the others.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    ways = {
        "words": (_texts, TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
        "characters": (_texts, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)),
        "tokens": (_numbers, TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 3), sublinear_tf=True)),
    }
    targets, answers, right = (_all(side)[1] for side in (data.train, data.val, data.test))
    found = {}
    for name, (read, vectorizer) in ways.items():
        known = vectorizer.fit_transform(read(data, data.train))
        asked, last = (vectorizer.transform(read(data, side)) for side in (data.val, data.test))
        models = [LinearSVC(C=c).fit(known, targets) for c in (0.1, 0.3, 1, 3)]
        best = max(models, key=lambda model: model.score(asked, answers))
        found[f"TF-IDF of {name}"] = float(best.score(last, right))
    return found


def counts(config: RunConfig, data: Data) -> dict[str, float]:
    """Loss on held-out text, nats/token, of guessing by how often tokens, and pairs of them, were seen."""
    known, asked = np.asarray(data.train.tokens), np.asarray(data.val.tokens)
    unigrams, after = _counted(known, data.spec.vocab)
    alone, paired = unigrams[asked[1:]], after(asked[:-1], asked[1:])
    return {"unigrams": float(-np.log(alone).mean()), "bigrams": float(-np.log(paired).mean())}


def masked_counts(config: RunConfig, data: Data) -> dict[str, float]:
    """Loss on hidden tokens, nats/token, of the same guesses, by what is seen on the left, or on both sides.

    The tokens that are hidden are those that a masked language model is asked for when it is judged.
    """
    task = task_of(config, data)
    samples = np.arange(len(data.val))
    hidden, targets, asked = task.vary(*data.val.take(samples.tolist()), [(0, 0, int(i)) for i in samples])
    known, mask = np.asarray(data.train.tokens), data.tokenizer.mask
    unigrams, after = _counted(known, data.spec.vocab)
    _, before = _counted(known[::-1], data.spec.vocab)
    rows, places = np.nonzero(asked)
    tokens = np.arange(data.spec.vocab)
    losses = []
    for row, place in zip(rows, places, strict=True):
        left = hidden[row, place - 1] if place else mask
        right = hidden[row, place + 1] if place + 1 < hidden.shape[1] else mask
        by_left = after(left, tokens) if left != mask else unigrams
        by_right = before(right, tokens) if right != mask else unigrams
        both = by_left * by_right / unigrams
        target = targets[row, place]
        losses.append((unigrams[target], by_left[target], both[target] / both.sum()))
    names = ("unigrams", "bigrams", "bigrams on both sides")
    return dict(zip(names, (float(loss) for loss in -np.log(losses).mean(0)), strict=True))


def _counted(tokens: np.ndarray, vocab: int) -> tuple[np.ndarray, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """Shares of tokens (vocab,), and a function of tokens and the next ones that gives how likely those are.

    Witten and Bell 1991: p(b|a) = (n(a, b) + k(a) p(b)) / (n(a) + k(a)), with k(a) different tokens seen after a.
    """
    shares = (np.bincount(tokens, minlength=vocab) + 1) / (len(tokens) + vocab)
    pairs = np.bincount(tokens[:-1].astype(np.int64) * vocab + tokens[1:], minlength=vocab**2).reshape(vocab, vocab)
    total, kinds = pairs.sum(1), (pairs > 0).sum(1)

    def after(first: np.ndarray, then: np.ndarray) -> np.ndarray:
        weight = np.maximum(kinds[first], 1)  # after what was never seen: by shares alone
        return (pairs[first, then] + weight * shares[then]) / (total[first] + weight)

    return shares, after


def _all(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets, _ = samples.take(range(len(samples)))
    return inputs, targets


def _texts(data: Data, samples: Samples) -> list[str]:
    """The texts of samples of tokens."""
    return [data.tokenizer.decode(row.tolist()) for row in _own(data, samples)]


def _numbers(data: Data, samples: Samples) -> list[str]:
    """Samples of tokens as words: the number of each token."""
    return [" ".join(map(str, row.tolist())) for row in _own(data, samples)]


def _own(data: Data, samples: Samples) -> list[np.ndarray]:
    """Samples without the tokens that are no text."""
    return [row[~np.isin(row, (data.tokenizer.begin, data.tokenizer.pad))] for row in _all(samples)[0]]


TUMOURS = "train.steps=300 train.batch_size=32 model.dropout=0.3 regularization.weight_decay=0.1"
WHOLE = "train.steps=500 train.batch_size=256 optim.lr=0.03 schedule.floor=0"
"""Chosen by cross-validation on the samples that are no test; 256 are nearly all that there are of these."""
JOBS = {
    "breast_cancer": Job(f"model=mlp data=breast_cancer {TUMOURS}", "test_accuracy", logistic_regression, 5),
    "diabetes": Job(f"model=linear data=diabetes loss=mse {WHOLE}", "test_r2", ridge, 5),
    "digits": Job("model=cnn data=digits", "test_accuracy", logistic_regression),
    "digits_light": Job("model=cnn data=digits augment=light", "test_accuracy", logistic_regression),
    "stdlib_modules": Job("experiment=textcnn_modules", "test_accuracy", tfidf),
    "docs": Job("experiment=bert_docs", "val_loss", masked_counts, 1),
    "text": Job("model=gpt_nano data=text data.path=$STDLIB/*.py", "val_loss", counts, 1),
}


if __name__ == "__main__":
    main()
