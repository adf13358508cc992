"""How far a run is and what was measured of it last, as numbers and in words."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llmtrain.words import short


@dataclass
class Standing:
    """How far a run is.

    Attributes:
        steps: Optimizer steps that it will take.
        step: Those taken, at the last line of metrics.
        begun: When it began, by the monotonic clock, in seconds.
        line: The last training metrics.
        losses: Training losses of all lines.
        val: The last validation metrics, and after which step.
        flops_per_step: FLOPs of a step.
        peak: What the device can do, in FLOP/s; None where that is not known.
    """

    steps: int = 0
    step: int = 0
    begun: float = field(default_factory=time.monotonic)
    line: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    val: tuple[int, dict[str, float]] | None = None
    flops_per_step: float = 0.0
    peak: float | None = None

    def left(self) -> float:
        """Seconds that the rest will take."""
        return (self.steps - self.step) * self.line.get("step_seconds", 0.0)

    def speed(self) -> str:
        """What is processed per second, in the data's own unit."""
        key = next(name for name in self.line if name.endswith("_per_second"))
        return f"{short(self.line[key])} {key.removesuffix('_per_second')}/s"

    def utilization(self) -> str:
        """The share of what the device can do; nothing where that is not known."""
        if self.peak is None or "step_seconds" not in self.line:
            return ""
        return f"MFU {self.flops_per_step / self.line['step_seconds'] / self.peak:.1%}  "
