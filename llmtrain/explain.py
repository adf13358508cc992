"""`llmtrain explain`: knobs as tables on the screen, or all of them as one Markdown page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.build import GROUPS
from llmtrain.compose import ALIASES, OF_ALL, config_folder
from llmtrain.config import COMMANDS, TOLD, knobs_of
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.synonyms import meant
from llmtrain.topics import (
    Knob,
    Topic,
    command_topic,
    comment,
    default_option,
    experiment_topic,
    in_words,
    option_topic,
    options,
    resume_knob,
    section_topic,
    with_default_model,
)

_OWN = ("cv", "bench")
"""Sections that are another command's than `train`, in whose words they may be left out."""
_USAGE = """usage: llmtrain explain [GROUP | SECTION | GROUP=OPTION | KEY]

  llmtrain explain               the groups, sections and experiments
  llmtrain explain optim         the options of a group
  llmtrain explain optim=adam    a table of an option's knobs
  llmtrain explain train         a table of a section's knobs
  llmtrain explain optim.beta2   one knob in full
  llmtrain explain experiment=gpt2     what an experiment sets
  llmtrain explain --markdown    everything, as one Markdown page
"""


def explain(argv: Sequence[str]) -> int:
    """Answers one question on the command line; returns the exit code."""
    console = _console()
    if "--markdown" in argv:
        print(reference(), end="")
        return 0
    words = [word for word in argv if not word.startswith("-")]
    if len(words) > 1 or any(flag in argv for flag in ("-h", "--help")):
        print(_USAGE, end="")
        return 0 if len(words) <= 1 else 2
    if not words:
        _show_all(console)
        return 0
    word = words[0]
    head = re.split(r"[.=]", word)[0]
    word = ALIASES.get(head, head) + word[len(head) :]
    if word in GROUPS:
        _show_group(console, word)
    elif word == "experiment":
        _show_experiments(console)
    elif word.startswith("experiment="):
        _show_experiment(console, word.partition("=")[2])
    elif "=" in word:
        group, option = word.split("=", 1)
        _show_topic(console, option_topic(group, option))
    elif word in TOLD:
        _show_topic(console, section_topic(word))
        if word in COMMANDS:
            console.print(f"\nThe settings of the command: llmtrain {word} --help")
    elif word in COMMANDS:
        show_command(word)
    else:
        _show_knob(console, word)
    return 0


def _console() -> Console:
    """Standard output; where there is no terminal, wide enough for a table."""
    console = Console(highlight=False)
    if console.width < 100 and not console.is_terminal:
        console.width = 120
    return console


def show_command(name: str) -> None:
    """Prints the settings of a command."""
    topic = command_topic(name)
    settings = {k: topic.values[k] for k in topic.knobs}
    words = [f"{k}=VALUE" if v == "???" else f"[{k}=VALUE]" for k, v in settings.items()]
    print(f"usage: llmtrain {name} {' '.join(sorted(words, key=lambda w: w.startswith('[')))}\n")
    _show_topic(_console(), topic)


def _show_all(console: Console) -> None:
    table = _titled("groups: choose with GROUP=OPTION", "group", "what it is", "options")
    for name, group in GROUPS.items():
        table.add_row(name, group.meaning, f"those of {group.folder}" if group.folder else ", ".join(options(name)))
    console.print(table)
    table = _titled("\nsections: change with SECTION.KNOB=VALUE", "section", "what it is", "knobs")
    for name, section in TOLD.items():
        table.add_row(name, section_topic(name).summary.split("\n")[0], ", ".join(knobs_of(section)))
    table.add_row("resume", "Whether to go on from a checkpoint.", "resume")
    console.print(table)
    console.print()
    _show_experiments(console)
    console.print(
        "\nllmtrain explain optim.lr tells one knob in full; optim=adam all of an option's; train a section's."
    )


def _titled(title: str, *columns: str) -> Table:
    """A table without lines, its title above and its first column in colour."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for column in columns:
        table.add_column(column, style="cyan" if column == columns[0] else "", overflow="fold")
    return table


def _show_experiments(console: Console) -> None:
    table = _titled("experiments, overlays on all of it: choose with experiment=NAME", "experiment", "what it is")
    for name in options("experiment"):
        table.add_row(name, Text(re.split(r"(?<=\.)\s", experiment_topic(name).about)[0]))
    console.print(table)


def _show_experiment(console: Console, name: str) -> None:
    """What an experiment says of itself, and all that it sets."""
    topic = experiment_topic(name)
    console.print(Text(f"experiment={name}", style="bold"), Text(topic.about), Text(), sep="\n")
    table = _titled("", "sets", "to")
    for key in topic.options:
        table.add_row(key, Text(topic.options[key]))
    for key in topic.values:
        table.add_row(key, Text(_value(topic.values, key)))
    console.print(table)
    console.print(Text(f"values: {_where(topic.file)}", style="dim"))


def _show_group(console: Console, group: str) -> None:
    table = _titled(f"{group}: {GROUPS[group].meaning}", "option", "what it is", "knobs")
    for option in options(group):
        topic = option_topic(group, option)
        note = comment(topic.file)
        told = Text(note or topic.summary.split("\n\n")[0])
        table.add_row(f"{group}={option}", told, ", ".join(topic.knobs) or "none")
    console.print(table)


def _show_topic(console: Console, topic: Topic) -> None:
    console.print(Text(topic.title, style="bold"), Text(topic.summary), Text(), sep="\n")
    if topic.knobs:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
        for column, style, width in (
            ("knob", "cyan", None),
            ("value", "yellow", None),
            ("type and range", "", 18),
            ("meaning", "", None),
            ("raise", "", None),
            ("lower", "", None),
        ):
            table.add_column(column, style=style, max_width=width, overflow="fold" if column != "knob" else "ellipsis")
        for name, knob in topic.knobs.items():
            meaning = " ".join(filter(None, (knob.meaning, knob.rest)))
            table.add_row(name, _value(topic.values, name), knob.kind, meaning, knob.raised, knob.lowered)
        console.print(table)
    console.print(Text(f"values: {_where(topic.file)}   declared: {topic.declared}", style="dim"))


def _value(values: Mapping[str, Any], name: str) -> str:
    return in_words(values[name]) if name in values else ""


def _where(file: Path) -> str:
    """A YAML file as its place under `conf`."""
    return "conf/" + file.relative_to(config_folder()).as_posix()


def _show_knob(console: Console, key: str) -> None:
    """One knob in full, with its value in every option that has it."""
    section = next((name for name in TOLD if key.startswith(f"{name}.")), key.partition(".")[0])
    group, name = section, key[len(section) + 1 :]
    if key == "resume":
        knob = resume_knob()
        console.print(Text(knob.key, style="bold cyan"), Text(knob.meaning), sep="\n")
        return
    if group in GROUPS:
        topics = [option_topic(group, option) for option in options(group)]
    elif group in TOLD:
        topics = [section_topic(group), *([command_topic(group)] if group in COMMANDS else [])]
    elif group in COMMANDS:
        topics = [command_topic(group)]
    else:
        known = [*GROUPS, *TOLD, *COMMANDS, "resume", "experiment", *_all_keys()]
        option = " or ".join(choice for choice in _choices() if choice.partition("=")[2] == key)
        raise ConfigError([Misfit("explain", key, "no such group, section or knob", option or meant(key, known))])
    having = [topic for topic in topics if name in topic.knobs]
    if not having:
        known = sorted({k for topic in topics for k in topic.knobs})
        raise ConfigError([Misfit("explain", key, f"no such knob; {group} has {', '.join(known)}", meant(name, known))])
    if group not in GROUPS:
        for topic in having:
            _show_full(console, topic.knobs[name], topic)
        return
    usual = f"{group}={default_option(group)}"
    having.sort(key=lambda topic: topic.title != usual)
    _show_full(console, having[0].knobs[name], having[0])
    if having[1:]:
        _show_others(console, name, having)


def _show_others(console: Console, name: str, topics: Sequence[Topic]) -> None:
    """The value of a knob in all options but the first, and what is said of it there that is not said of the first."""
    table = _titled("in the other options", "option", "value", "where it differs")
    known = _told_of(topics[0].knobs[name])
    for topic in topics[1:]:
        told = [text for text in _told_of(topic.knobs[name]) if text not in known]
        words, number = _value(topic.values, name), _with_default_model(topic, name)
        table.add_row(topic.title, Text(f"{words} = {number}" if number else words), Text(" ".join(told)))
    console.print(table)


def _told_of(knob: Knob) -> list[str]:
    """All that is said of a knob, piece by piece."""
    pieces = (("", knob.meaning), ("Raise: ", knob.raised), ("Lower: ", knob.lowered), ("", knob.rest))
    return [f"{knob.kind[:1].upper()}{knob.kind[1:]}.", *(title + text for title, text in pieces if text)]


def _with_default_model(topic: Topic, name: str) -> str:
    """What a value that follows the model comes to with the usual one; nothing where it does not."""
    group, _, option = topic.title.partition("=")
    found = with_default_model(group, option, name) if option else None
    return "" if found is None else f"{found:.6g}"


def _show_full(console: Console, knob: Knob, topic: Topic) -> None:
    console.print(Text.assemble((knob.key, "bold cyan"), "  ", knob.kind))
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for title, text in (
        ("meaning", knob.meaning),
        ("raise", knob.raised),
        ("lower", knob.lowered),
        ("note", knob.rest),
    ):
        if text:
            table.add_row(title, Text(text))
    name = knob.key.rpartition(".")[2]
    value = _value(topic.values, name)
    if number := _with_default_model(topic, name):
        value += f" = {number} with model={default_option('model')}"
    table.add_row("value", Text(f"{value} ({topic.title}, {_where(topic.file)})"))
    table.add_row("declared", Text(topic.declared))
    sources = dict.fromkeys(re.findall(r"\([^()]*\b(?:19|20)\d\d[^()]*\)", topic.summary))
    if sources:
        table.add_row("source", Text(" ".join(sources)))
    table.add_row("change it", Text(_change(knob.key, topic)))
    console.print(table)
    console.print()


def _change(key: str, topic: Topic) -> str:
    """The words that change a knob: those of `train`, or of the command whose own it is."""
    section, _, name = key.rpartition(".")
    if section in _OWN or (section in COMMANDS and topic == command_topic(section)):
        return f"llmtrain {section} {name}=VALUE"
    swept = "" if key.startswith(OF_ALL) else f"     sweep it: -m {key}=VALUE,VALUE"
    return f"llmtrain train {key}=VALUE{swept}"


def complete(word: str) -> int:
    """Prints what there is to ask that begins like this, for tab completion."""
    known = [*GROUPS, *TOLD, *COMMANDS, "resume", "experiment", *_choices(), *_all_keys()]
    print("\n".join(question for question in dict.fromkeys(known) if question.startswith(word)))
    return 0


def _choices() -> list[str]:
    return [f"{group}={option}" for group in (*GROUPS, "experiment") for option in options(group)]


def _all_keys() -> list[str]:
    keys = [knob.key for name in TOLD for knob in section_topic(name).knobs.values()]
    for group in GROUPS:
        for option in options(group):
            keys += [knob.key for knob in option_topic(group, option).knobs.values()]
    return list(dict.fromkeys(keys))


def reference() -> str:
    """Every knob on one Markdown page: `docs/knobs.md`."""
    lines = [
        "# Every knob",
        "",
        "Made by `llmtrain explain --markdown` from the signatures, docstrings and YAML files; do not edit.",
    ]
    for name in TOLD:
        topic = section_topic(name)
        lines += ["", f"## Section `{name}`", "", topic.summary, *_markdown_table([topic])]
    lines += ["", "## `resume`", "", resume_knob().meaning]
    for group, about in GROUPS.items():
        lines += ["", f"## Group `{group}`: {about.meaning}"]
        if about.folder:
            lines += ["", f"Options and knobs are those of `{about.folder}`."]
            continue
        by_part: dict[str, list[Topic]] = {}
        for option in options(group):
            topic = option_topic(group, option)
            by_part.setdefault(topic.declared, []).append(topic)
        for topics in by_part.values():
            names = ", ".join(f"`{topic.title}`" for topic in topics)
            lines += ["", f"### {names}", "", topics[0].summary, *_markdown_table(topics)]
    for name in COMMANDS:
        topic = command_topic(name)
        lines += ["", f"## Command `llmtrain {name}`", "", topic.summary, *_markdown_table([topic])]
    return "\n".join(lines) + "\n"


def _markdown_table(topics: Sequence[Topic]) -> list[str]:
    """A table of the knobs that some options share, with the value in each where they differ."""
    if not topics[0].knobs:
        return []
    rows = ["", "| knob | value | type and range | meaning | raise | lower |", "| --- | --- | --- | --- | --- | --- |"]
    for name, knob in topics[0].knobs.items():
        values: dict[str, list[str]] = {}
        for topic in topics:
            values.setdefault(_value(topic.values, name), []).append(topic.title.split("=")[-1])
        several = len(values) > 1
        told = ", ".join(f"`{v}`" + (f" ({', '.join(names)})" if several else "") for v, names in values.items() if v)
        meaning = " ".join(filter(None, (knob.meaning, knob.rest)))
        cells = (f"`{name}`", told, knob.kind, meaning, knob.raised, knob.lowered)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows
