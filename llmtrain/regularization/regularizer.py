"""When in a step a regularizer acts. This one does nothing; each of its methods can be replaced alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from llmtrain.pace import Moment
from llmtrain.regularization.average import Average


class Regularizer:
    """What happens to weights and gradients beside the loss.

    Attributes:
        average: Averages the weights; None: the newest are judged and saved.
        uphill: None: the gradient is taken where the weights are. Else a context in which they are elsewhere; on
            entering it gradients are there and are taken away, and within it they are made anew.
    """

    average: Average | None = None
    uphill: Callable[[], AbstractContextManager] | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Scalars on the device, for the log."""
        return {}

    def add_gradients(self) -> Mapping[Tensor, Tensor]:
        """Adds to the gradients, once per step and before they are clipped.

        Returns:
            By parameter, the norm of its gradient as it now is, where that was cheap to take on the way.
        """
        return {}

    def before_update(self, now: Moment) -> None:
        """Acts after clipping, before the optimizer moves the weights."""

    def after_update(self, now: Moment) -> None:
        """Acts after the optimizer has moved the weights."""
