"""Optimizers (config group `optim`)."""

import torch
from torch.optim import Optimizer

from llmtrain.compiler import never_compiled


def _leave_the_compiler_out() -> None:
    """Optimizers of torch are made, and step, without its compiler: only model and loss are ever compiled.

    Around `step`, torch imports the compiler to break graphs; without one, `no_grad` is all that remains of that.
    """
    for method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
        never_compiled(method)
    for made in vars(torch.optim).values():
        step = vars(made).get("step") if isinstance(made, type) and issubclass(made, Optimizer) else None
        if step is not None and hasattr(step, "__wrapped__") and not hasattr(step, "hooked"):
            made.step = torch.no_grad()(step.__wrapped__)


_leave_the_compiler_out()
