"""What all jobs import, loaded and frozen in the process that they are forked from: each is spared two seconds."""

from __future__ import annotations

import contextlib
import gc
import importlib

from llmtrain.build import GROUPS, parts

_SLOW = ("torch.utils.tensorboard", "sklearn.datasets")
"""TensorBoard's files import the first, small data sets the second. Neither looks for GPUs, which would settle those of
every job."""

importlib.import_module("llmtrain.sweep.worker")
for name in (*_SLOW, *{part.module: 0 for group in GROUPS for part in parts(group).values()}):
    with contextlib.suppress(Exception):  # a job that needs it will tell
        importlib.import_module(name)
gc.collect()
gc.freeze()  # not looked through again by any job, nor copied for that
