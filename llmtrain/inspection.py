"""`llmtrain data inspect`: what there is to learn from, counted and shown, before anything is trained on it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtrain.augment.sheet import sheet, versions
from llmtrain.config import RunConfig
from llmtrain.counts import PASSAGE, Counts, Lengths, Quantity, counted, drawn, feature_names, names_of, sides_of
from llmtrain.display import page, printed, tabular
from llmtrain.knobs import ConfigError, UserError
from llmtrain.report import printable
from llmtrain.run import provisional, read_data, setup_for, task_of
from llmtrain.screen import Screen
from llmtrain.story import Origin
from llmtrain.tasks import with_baseline
from llmtrain.types import Augment, Batch, Data, Samples

_BAR = 24
_ROWS, _CLASSES = 12, 24
_SHOWN, _TEXT = 3, 260
_SIDE = 32
_VARIED = 2
_SHADES = " .:-=+*#%@"
_LEFT_OUT = {
    "broken": "broken: left out or mended, as data.errors says",
    "copies": "copies of others: left out",
    "left_out": "are also among those given to judge by: not learned from",
    "cut": "longer than the context: the end is cut off",
    "missing": "missing numbers: became the median of the training samples",
}
"""What becomes of samples that are not taken as they are, by the fact that counts them."""


@dataclass(frozen=True)
class Findings:
    """All that is told of some data.

    Attributes:
        option: The option of the group `data` that was chosen.
        left_out: The facts of `_LEFT_OUT` that are not 0.
        total: Samples in all.
        examples: Of each split: number, target and versions of samples.
    """

    config: RunConfig
    option: str
    data: Data
    augment: Augment | None
    counts: Counts
    left_out: dict[str, int]
    total: int
    examples: dict[str, list[dict[str, Any]]]

    @property
    def images(self) -> bool:
        """Whether samples can be drawn."""
        return len(self.data.spec.shape) == 3


def inspect(config: RunConfig, origin: Origin, as_json: bool, png: str | None = None) -> int:
    """Prints what is known of the data; returns the exit code.

    Args:
        config: Checked, as far as it is about data.
        origin: How it came about.
        as_json: Whether a program reads it.
        png: The file for a picture, if one is asked for: of samples that are images, else of the counts.

    Raises:
        UserError: If the data cannot be used, or the picture cannot be made.
    """
    found = _find(config, origin, as_json)
    if png is not None:
        (_draw_samples if found.images else _draw_counts)(found, Path(png).expanduser())
    if as_json:
        print(json.dumps(_plain(found), indent=2, ensure_ascii=False))
    else:
        printed(lambda console: _tell(found, console))
    return 0


# -- finding --------------------------------------------------------------------------------------------------


def _find(config: RunConfig, origin: Origin, quiet: bool) -> Findings:
    screen = Screen()
    try:
        asked = _has_task(config)
        data = read_data(config, None if quiet else screen.preparing, asked)
        data = _guessed(config, data) if asked else data
    finally:
        screen.prepared()
    seed, sides = config.train.seed, sides_of(data)
    augment = config.augment.build(data.spec, data.tokenizer)
    return Findings(
        config=config,
        option=origin.option("data", config.data.part.name),
        data=data,
        augment=augment,
        counts=counted(data, seed),
        left_out={fact: n for fact in _LEFT_OUT if (n := data.facts.get(fact, 0))},
        total=sum(map(len, sides.values())),
        examples={
            name: _examples(data, samples, augment if name == "train" else None, seed)
            for name, samples in sides.items()
        },
    )


def _has_task(config: RunConfig) -> bool:
    """Whether the task can be asked of this data; if not, that is for `train` to tell."""
    try:
        return config.task.build(provisional(config.data.build(setup_for(config)), config), None) is not None
    except (ConfigError, AttributeError):  # there may be none
        return False


def _guessed(config: RunConfig, data: Data) -> Data:
    """The data with the baseline of the task; where its labels or the metrics do not fit, `train` tells that."""
    try:
        return with_baseline(data, task_of(config, data))
    except (ConfigError, UserError):
        return data


def _examples(data: Data, samples: Samples, augment: Augment | None, seed: int) -> list[dict[str, Any]]:
    """Some samples, drawn by the seed: as a model gets them, and what becomes of them in the first epochs."""
    chosen = drawn(len(samples), _SHOWN, seed).tolist()
    found = versions(augment, samples, chosen, _VARIED if augment is not None else 0, seed)
    _, targets, masks = samples.take(chosen)
    scaling = data.record.get("targets", {})
    examples: list[dict[str, Any]] = []
    for index, seen, target, mask in zip(chosen, found, targets, masks, strict=True):
        if not data.spec.outputs:
            asked: Any = _text(data, target[mask].tolist()[-1:])
        elif targets.ndim == 1:
            asked = names_of(data, data.spec.outputs)[int(target)]
        else:
            values = target * scaling["std"] + scaling["mean"] if "std" in scaling else target
            asked = dict(zip(names_of(data, len(values)), map(float, values), strict=True))
        examples.append({"index": index, "target": asked, "versions": [_seen(data, one, mask) for one in seen]})
    return examples


def _seen(data: Data, inputs: np.ndarray, mask: np.ndarray) -> Any:
    """A sample for people: its text, its features by name, or its pixels."""
    if not data.spec.shape:
        kept = [token for token in (inputs[mask] if mask.ndim else inputs).tolist() if token != data.spec.pad]
        return _text(data, kept)
    if len(data.spec.shape) == 3:
        return inputs
    return dict(zip(feature_names(data), inputs.ravel().tolist(), strict=False))


def _text(data: Data, tokens: list[int]) -> str:
    """The text of tokens; their numbers where nobody knows it."""
    return str(data.tokenizer.decode(tokens)) if data.tokenizer is not None else " ".join(map(str, tokens))


# -- telling --------------------------------------------------------------------------------------------------


def _plain(found: Findings) -> dict[str, Any]:
    """The same for a program; of images no pixels."""
    data = found.data

    def shown(example: dict[str, Any]) -> dict[str, Any]:
        inputs, *varied = example["versions"]
        plain = {"index": example["index"], "target": example["target"]}
        if found.images:
            return plain
        return plain | {"inputs": inputs} | ({"varied": varied} if varied else {})

    return {
        "data": found.option,
        "about": data.words,
        "fingerprint": data.fingerprint,
        "facts": data.facts,
        "spec": asdict(data.spec),
        "bytes_per_token": found.counts.bytes_per_token,
        "splits": {name: asdict(split) for name, split in found.counts.splits.items()},
        "left_out": found.left_out,
        "copies": asdict(found.counts.copies),
        "features": [asdict(feature) for feature in found.counts.features],
        "baseline": data.baseline and {"by": data.baseline[0], **data.baseline[1]},
        "examples": {name: [shown(e) for e in some] for name, some in found.examples.items()},
    }


def _tell(found: Findings, console: Console) -> None:
    full = "█" if console.is_terminal else "#"
    page(console, f"data={found.option}", _about(found), "")
    page(console, "splits", *_split_table(found))
    page(console, "left out or changed", _left_out_table(found), "")
    page(console, "copies", *_copy_table(found))
    if found.counts.splits["train"].classes is not None:
        page(console, *_class_table(found, full))
    for name, split in found.counts.splits.items():
        for quantity in split.quantities or () if name == "train" else ():
            page(console, f"{_clean(quantity.name)}, in its own unit", *_quantity_table(found, quantity.name, full))
        if split.lengths is not None and name == "train":
            page(console, *_length_table(found, split.lengths, full))
    if found.counts.features:
        page(console, *_feature_table(found))
    for name, examples in found.examples.items():
        page(console, *_example_page(found, name, examples, console))


def _clean(text: str, most: int = 40) -> str:
    """Text on one line, what would steer the terminal shown instead of done, a long one shortened."""
    clean = printable(text)
    return clean if len(clean) <= most else clean[: most - 4] + " ..."


def _about(found: Findings) -> Table:
    data, spec, table = found.data, found.data.spec, tabular("", "")
    what = "class" if spec.numbers is False else "number"
    rows = [("what", data.facts.get("about", data.words)), ("fingerprint", data.fingerprint)]
    rows += [("files", f"SHA-256 {data.facts['sha256']}")] if "sha256" in data.facts else []
    kind = {0: f"{spec.context} tokens", 1: _many(math.prod(spec.shape), "feature")}.get(len(spec.shape), "")
    rows.append(("a sample", kind or " x ".join(map(str, spec.shape)) + " pixels (channels x height x width)"))
    rows.append(("its target", _many(spec.outputs, what) if spec.outputs else _asked(found)))
    if data.tokenizer is not None:
        rows.append(("vocabulary", f"{data.tokenizer.vocab:,}, tokenizer {found.config.tokenizer.part.name}"))
    if found.counts.bytes_per_token is not None:
        rows.append(("bytes per token", f"{found.counts.bytes_per_token:.2f}"))
    if data.baseline is not None:
        by, metrics = data.baseline
        rows.append(("to beat", f"guessing by {by}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())))
    for name, value in rows:
        table.add_row(name, Text(printable(str(value))))
    return table


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


def _asked(found: Findings) -> str:
    task = found.config.task.part.name if found.config.task is not None else "causal_lm"
    return "at each token the next one" if task == "causal_lm" else f"what task={task} asks of its tokens"


def _split_table(found: Findings) -> tuple[Table, str]:
    tokens = any(split.tokens is not None for split in found.counts.splits.values())
    table = tabular("", ">samples", ">share", *[">tokens"] * tokens)
    total = sum(split.samples for split in found.counts.splits.values())
    for name, split in found.counts.splits.items():
        more = [f"{split.tokens:,}" if split.tokens is not None else "not counted"] if tokens else []
        table.add_row(name, f"{split.samples:,}", f"{split.samples / total:.1%}", *more)
    return table, "" if "test" in found.counts.splits else "No samples are kept for a test."


def _left_out_table(found: Findings) -> Table:
    table = tabular("", "")
    for fact, count in found.left_out.items():
        table.add_row(f"{count:,}", f"{_LEFT_OUT[fact]}" + f" ({count / found.total:.1%})" * (fact == "cut"))
    kept = found.data.facts.get("bytes_kept", 1.0)
    if abs(kept - 1) >= 0.0005:
        table.add_row(f"{kept:.1%}", "of the bytes are what tokens give back; the tokenizer changes or drops the rest")
    if not table.row_count:
        table.add_row("nothing", "")
    return table


def _copy_table(found: Findings) -> tuple[Table, str]:
    copies, table = found.counts.copies, tabular("", ">", "")
    one = copies.of
    if sum(copies.looked.values()):
        for name, count in copies.within.items():
            table.add_row(f"within {name}", f"{count:,}", f"of {copies.looked[name]:,} {one}: copies of others there")
        for pair, count in copies.across.items():
            later, earlier = pair.split(" in ")
            what = f"of {copies.looked[later]:,} {one} of {later} are in {earlier} as well"
            table.add_row(pair, f"{count:,}", Text(what, style="bold red" if count else ""))
    if copies.conflicts is not None:
        table.add_row("conflicts", f"{copies.conflicts:,}", "different samples occur with more than one label")
    if copies.passages is not None:
        asked, there = copies.passages
        what = f"of {asked:,} passages of {PASSAGE} tokens of val stand in train, word for word"
        table.add_row("passages", f"{there:,}", f"{what} ({there / max(asked, 1):.1%})")
    notes = [] if copies.whole else [f"The data is large: this is of some {one}, drawn or in stretches of it."]
    if one == "samples" and not found.data.spec.shape:
        notes.append("Samples are compared as a model gets them: texts that begin alike and are cut are equal.")
    return table, "\n".join(notes)


def _bar(count: int, most: int, width: int, full: str) -> str:
    """A bar; what is there at all has at least one mark."""
    return full * max(round(width * count / max(most, 1)), count > 0)


def _class_table(found: Findings, full: str) -> tuple[str, Table, str]:
    sides = {name: split.classes for name, split in found.counts.splits.items() if split.classes is not None}
    width = _BAR // 2 if len(sides) > 2 else _BAR
    heads = [head for name in sides for head in (name, ">", ">")]
    table = tabular("class", *heads)
    names = sorted(sides["train"], key=lambda name: -sides["train"][name])
    omitted = len(names) - _CLASSES
    kept = set(names if omitted <= 0 else names[: _CLASSES // 2] + names[-(_CLASSES // 2) :])
    for name in [name for name in sides["train"] if name in kept]:
        cells: list[RenderableType] = []
        for side, counts in sides.items():
            count, most = counts[name], max(counts.values())
            share = count / found.counts.splits[side].samples
            cells += [_bar(count, most, width, full), f"{count:,}", f"{share:.1%}"]
        table.add_row(Text(_clean(name, 20)), *cells)
    note = f"{omitted} more classes in between are not shown; --json has them all." if omitted > 0 else ""
    return f"{len(names)} classes", table, note


def _quantity_table(found: Findings, name: str, full: str) -> tuple[RenderableType, str]:
    """A label's figures on each side, and how its values are spread."""
    table = tabular("", *(f">{head}" for head in ("mean", "deviation", "least", "25%", "median", "75%", "greatest")))
    sides = {side: q for side, split in found.counts.splits.items() for q in split.quantities or () if q.name == name}
    for side, quantity in sides.items():
        table.add_row(side, *(f"{value:.4g}" for value in (quantity.mean, quantity.std, *quantity.quantiles)))
    histograms = {side: q.histogram for side, q in sides.items() if q.histogram is not None}
    scaled = "std" in found.data.record.get("targets", {})
    note = "A model is asked for them standardized: mean 0 and deviation 1 in train." if scaled else ""
    bars = _histogram(_bins(sides["train"]), {side: h.counts for side, h in histograms.items()}, full)
    return Group(table, Text(), bars), note


def _bins(of: Quantity | Lengths) -> list[str]:
    """What the bins of a histogram are called."""
    edges = of.histogram.edges if of.histogram is not None else []
    if isinstance(of, Lengths):
        return [f"{low:,} to {high - 1:,}" if high - low > 1 else f"{low:,}" for low, high in pairwise(edges)]
    return [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]


def _histogram(bins: Sequence[str], sides: dict[str, list[int]], full: str) -> Table:
    width = _BAR // 2 if len(sides) > 2 else _BAR
    table = tabular("", *(head for side in sides for head in (side, ">")))
    for i, name in enumerate(bins):
        cells = [(_bar(counts[i], max(counts), width, full), f"{counts[i]:,}") for counts in sides.values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    return table


def _length_table(found: Findings, train: Lengths, full: str) -> tuple[str, RenderableType, str]:
    sides = {name: split.lengths for name, split in found.counts.splits.items() if split.lengths is not None}
    context = found.data.spec.context
    documents = train.of == "documents"
    table = tabular("", f">{train.of}", ">mean", ">median", ">longest", f">{'over' if documents else 'fill'} {context}")
    for name, lengths in sides.items():
        numbers = (f"{lengths.looked:,}", f"{lengths.mean:.1f}", f"{lengths.median:g}", f"{lengths.longest:,}")
        table.add_row(name, *numbers, f"{lengths.long / lengths.looked:.1%}")
    histogram = _histogram(_bins(train), {name: lengths.histogram.counts for name, lengths in sides.items()}, full)
    note = "Nothing is cut: what is longer than a sample goes on in the next one."
    if not documents:
        cut = found.left_out.get("cut", 0)
        note = f"With the token that each begins with, without padding; {cut:,} were longer and are cut."
    if not all(lengths.whole for lengths in sides.values()):
        note += f" Of {train.of} looked at: there are more."
    return f"lengths of {train.of} in tokens", Group(table, Text(), histogram), note


def _feature_table(found: Findings) -> tuple[str, Table, str]:
    images = found.images
    table = tabular("channel" if images else "feature", ">mean", ">deviation", ">least", ">greatest")
    for feature in found.counts.features[:_ROWS]:
        numbers = (feature.mean, feature.std, *feature.quantiles)
        table.add_row(Text(_clean(feature.name)), *(f"{round(value, 3) + 0.0:.3f}" for value in numbers))
    omitted = len(found.counts.features) - _ROWS
    note = f"{omitted} more features are not shown; --json has them all." if omitted > 0 else ""
    return f"{'pixels' if images else 'features'} of train, as a model gets them", table, note


def _example_page(
    found: Findings, name: str, examples: Sequence[dict[str, Any]], console: Console
) -> tuple[str, RenderableType, str]:
    varied = found.augment is not None and name == "train"
    title = f"samples of {name}" + ", and what becomes of them in the first epochs" * varied
    if found.images:
        rows = [[example] for example in examples] if varied else [examples]
        return title, Group(*(_image_row(row, console) for row in rows)), ""
    table = tabular("", "", "")
    for example in examples:
        for i, seen in enumerate(example["versions"]):
            head = ("", f"epoch {i}") if i else (f"{example['index']:,}", "input")
            table.add_row(*head, Text(_clean(_told(seen), _TEXT)))
        then = "" if found.data.spec.outputs else "the same, one token on; the last is "
        table.add_row("", "target", Text(then + _clean(_told(example["target"]))))
    return title, table, ""


def _told(value: Any) -> str:
    """A text as it is, named numbers in a row."""
    return ", ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _image_row(examples: Sequence[dict[str, Any]], console: Console) -> Table:
    """Samples and their versions side by side, each under its number and label or its epoch."""
    table = Table.grid(padding=(0, 2))
    heads: list[Text] = []
    pictures: list[Text] = []
    for example in examples:
        head = f"{example['index']:,}: {_clean(_told(example['target']), 24)}"
        heads += [Text(head, style="cyan"), *(Text(f"epoch {i}") for i in range(1, len(example["versions"])))]
        pictures += [_picture(pixels, console) for pixels in example["versions"]]
    table.add_row(*heads)
    table.add_row(*pictures)
    return table


def _picture(pixels: np.ndarray, console: Console) -> Text:
    """An image (channels, height, width) in characters: half blocks where there are many colours, else shades."""
    times = -(-max(pixels.shape[1:]) // _SIDE)
    pixels = _shrunk(pixels, times, times)
    low, high = min(float(pixels.min()), 0.0), max(float(pixels.max()), 1.0)
    pixels = (pixels - low) / (high - low)
    if pixels.shape[2] <= _SIDE // 2:
        pixels = pixels.repeat(2, 1).repeat(2, 2)
    if console.color_system not in ("256", "truecolor"):
        shades = _shrunk(pixels, 2, 1).mean(0)
        rows = ("".join(_SHADES[int(v * (len(_SHADES) - 1) + 0.5)] for v in row) for row in shades)
        return Text("\n".join(rows) + "\n")
    colours = (pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, 0)) * 255
    colours = np.pad(colours, ((0, 0), (0, colours.shape[1] % 2), (0, 0))).round().astype(int)
    text = Text()
    for y in range(0, colours.shape[1], 2):
        for top, bottom in zip(colours[:, y].T.tolist(), colours[:, y + 1].T.tolist(), strict=True):
            text.append("▀", f"rgb({','.join(map(str, top))}) on rgb({','.join(map(str, bottom))})")
        text.append("\n")
    return text


def _shrunk(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The means of so many rows and columns; the last ones repeat where they do not fill up."""
    more = [(0, -size % times) for size, times in zip(pixels.shape[1:], (rows, columns), strict=True)]
    padded = np.pad(pixels, ((0, 0), *more), mode="edge")
    c, h, w = padded.shape
    return padded.reshape(c, h // rows, rows, w // columns, columns).mean((2, 4))


# -- pictures -------------------------------------------------------------------------------------------------


class _Others:
    """Stands for an augmentation in a picture of many samples: in each epoch there is another one in the place."""

    partners = 0
    special_tokens: tuple[str, ...] = ()

    def __init__(self, samples: Samples, rows: Sequence[Sequence[int]]):
        self._samples, self._others = samples, {row[0]: row[1:] for row in rows}

    def __call__(self, batch: Batch, keys: Sequence[Sequence[int]]) -> Batch:
        inputs, _, _ = self._samples.take([self._others[first][epoch] for _, epoch, first in keys])
        return batch._replace(inputs=torch.from_numpy(np.ascontiguousarray(inputs)))


def _draw_samples(found: Findings, file: Path) -> None:
    """Writes a PNG of training samples: each with what becomes of it, or as many as fit."""
    samples, seed = found.data.train, found.config.train.seed
    side = min(8, max(math.isqrt(len(samples)), 1))
    if found.augment is not None:
        sheet(found.augment, samples, drawn(len(samples), 8, seed).tolist(), file, count=7, seed=seed)
        return
    rows = drawn(len(samples), side * side, seed)[: side * side].reshape(side, side).tolist()
    sheet(_Others(samples, rows), samples, [row[0] for row in rows], file, count=side - 1, seed=seed)


def _draw_counts(found: Findings, file: Path) -> None:
    """Writes a PNG of what the terminal shows as bars.

    Raises:
        UserError: If there is nothing to draw, matplotlib is not there, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'llmtrain[plots]'") from None
    charts = _charts(found)
    if not charts:
        raise UserError("--png: there are no classes, quantities or lengths to draw")
    figure = Figure(figsize=(8, 3.2 * len(charts)), dpi=150, layout="constrained")
    for place, (title, bins, sides) in enumerate(charts, start=1):
        axes, width = figure.add_subplot(len(charts), 1, place), 0.8 / len(sides)
        for i, (name, counts) in enumerate(sides.items()):
            at = [x + (i - (len(sides) - 1) / 2) * width for x in range(len(counts))]
            axes.bar(at, [count / max(sum(counts), 1) for count in counts], width, label=name)
        axes.set_xticks(range(len(bins)), bins, rotation=45, ha="right", parse_math=False)
        axes.set(title=title, ylabel="share")
        axes.legend()
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from None


def _charts(found: Findings) -> list[tuple[str, list[str], dict[str, list[int]]]]:
    """Title, names of the bars, and counts by split of each chart."""
    charts: list[tuple[str, list[str], dict[str, list[int]]]] = []
    splits = found.counts.splits
    if (classes := splits["train"].classes) is not None:
        names = sorted(classes, key=lambda name: -classes[name])[: 2 * _CLASSES]
        sides = {name: [(s.classes or {})[c] for c in names] for name, s in splits.items()}
        charts.append(("classes", [_clean(name, 20) for name in names], sides))
    for i, quantity in enumerate(splits["train"].quantities or ()):
        known = {name: (s.quantities or [])[i].histogram for name, s in splits.items()}
        sides = {name: histogram.counts for name, histogram in known.items() if histogram is not None}
        charts.append((_clean(quantity.name), _bins(quantity), sides))
    if (lengths := splits["train"].lengths) is not None:
        sides = {name: s.lengths.histogram.counts for name, s in splits.items() if s.lengths is not None}
        charts.append((f"tokens in {lengths.of}", _bins(lengths), sides))
    return charts
