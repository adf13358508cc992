"""The report of everything that is wrong with a config."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from llmtrain.knobs import Misfit


def print_misfits(misfits: Sequence[Misfit], command: str) -> None:
    """Prints each misfit with its key, the value given, the rule and the nearest right thing, to standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    number = f"{len(misfits)} things are" if len(misfits) > 1 else "one thing is"
    rest = "wrong with the config; nothing was started" if command == "train" else "wrong"
    console.print(f"[bold red]llmtrain {command}[/]: {number} {rest}\n")
    for misfit in misfits:
        value = "null" if misfit.value is None else printable(str(misfit.value))
        guess = f"  Did you mean {misfit.suggestion}?" if misfit.suggestion else ""
        console.print(Text.assemble("  ", (printable(misfit.key), "bold cyan"), " = ", (value, "yellow")))
        console.print(Text.assemble("      ", printable(misfit.rule), (guess, "bold green")))


def printable(text: str) -> str:
    """The text with what would steer the terminal shown instead of done."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
