"""Models that others have trained: folders as transformers and the Hugging Face hub have them.

The architecture is read from `config.json` and built as a Transformer of our own; its weights are read from
safetensors, bit by bit, when a run starts. Nothing in such a folder is ever run, and pickle is not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.build import find, validate
from llmtrain.knobs import ConfigError, Count, Misfit, UserError, require
from llmtrain.models.families import Family, Unreadable, from_config, links
from llmtrain.models.transformer import Transformer, transformer
from llmtrain.types import DataSpec

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # of the first BERTs


def hf(data: DataSpec, *, path: str, context: Count | None) -> Transformer:
    """A model from a folder in the form of transformers: GPT-2, Llama, Mistral, Qwen 2 and 3, BERT, RoBERTa.

    It starts from the weights in the folder, which init does not touch. An output layer that the folder lacks,
    or has for other classes, starts from init; the run says so.

    Args:
        path: The folder: config.json, and model.safetensors or its parts with their index.
        context: Most tokens that the model can see at once. Raise: longer memory, more time; learned positions
            end where those of the folder end. Lower: faster; later learned positions are left out. null takes
            all that the folder says.

    Raises:
        ConfigError: If the folder cannot be used, or asks for what no knob says.
    """
    folder = Path(path).expanduser()
    family, knobs, vocab = _read_knobs(_read_config(folder, path), path)
    require(
        context=(
            context is None or knobs["position"] != "learned" or context <= knobs["context"],
            context,
            f"is more than the {knobs['context']} positions that {path} has learned",
        )
    )
    knobs["context"] = context or knobs["context"]
    model = transformer(replace(data, vocab=vocab), **knobs)
    setattr(model, "knobs", knobs)  # noqa: B010
    setattr(model, "load_pretrained", partial(_load, model, family, folder, data, vocab))  # noqa: B010
    return model


def _refused(path: str, rule: str) -> ConfigError:
    return ConfigError([Misfit("path", path, rule)])


def _read_config(folder: Path, path: str) -> dict[str, Any]:
    """What `config.json` says; that there are weights beside it is looked at, not read."""
    if not folder.is_dir():
        raise _refused(path, "no such folder; nothing is downloaded, so fetch it first")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(path, f"has no config.json that can be read: {error}") from None
    if not isinstance(config, dict):
        raise _refused(path, "has a config.json that holds no config")
    if not (folder / _WHOLE).is_file() and not (folder / _INDEX).is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        rule = f"has no {_WHOLE} and no {_INDEX}"
        if pickles:
            rule = (
                f"holds its weights as pickle ({', '.join(pickles)}), which can run code when it is read; "
                "save them as safetensors: model.save_pretrained(FOLDER) in transformers does"
            )
        raise _refused(path, rule)
    return config


def _read_knobs(config: Mapping[str, Any], path: str) -> tuple[Family, dict[str, Any], int]:
    """What a config means here, its values held against our own schema; and the size of its vocabulary."""
    try:
        family, knobs = from_config(config)
    except Unreadable as error:
        raise _refused(path, str(error)) from None
    except (TypeError, ValueError) as error:
        raise _refused(path, f"has a config.json with values of the wrong kind: {error}") from None
    vocab = {"vocab_size": config["vocab_size"]}
    values, misfits = validate({**find("model", "transformer").knobs, "vocab_size": Count}, {**knobs, **vocab})
    if misfits:
        told = "; ".join(f"{misfit.key}={misfit.value} {misfit.rule}" for misfit in misfits)
        raise _refused(path, f"has a config.json that means no model here: {told}")
    return family, {knob: values[knob] for knob in knobs}, values["vocab_size"]


def _load(model: Transformer, family: Family, folder: Path, data: DataSpec, vocab: int) -> None:
    """Reads the weights of a folder into its model, and notes which layers of the output the folder has not.

    Raises:
        UserError: If a tensor is missing, has another shape or cannot be read, or the data has more tokens.
    """
    if data.vocab > vocab:
        raise UserError(
            f"model.path={folder}: knows {vocab} tokens and the data has {data.vocab}; "
            "tokenizer=model takes the tokenizer that the model was trained with (tokens that a task adds count too)"
        )
    try:
        tensors = _open(folder)
        fresh, wrong = _fill(model, family, tensors, replace(data, vocab=vocab))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"model.path={folder}: its weights cannot be read: {error}") from None
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"model.path={folder}: holds another model: {'; '.join(wrong[:3])}{more}")
    told = f"weights from {folder}" + (f"; not in it, so from init: {', '.join(fresh)}" if fresh else "")
    setattr(model, "notes", [told])  # noqa: B010


@torch.no_grad()
def _fill(
    model: Transformer, family: Family, tensors: Mapping[str, Callable[[], Tensor]], data: DataSpec
) -> tuple[list[str], list[str]]:
    """Copies what there is; returns the tensors of the output that stay as they are, and what is wrong."""
    fresh: list[str] = []
    wrong: list[str] = []
    state = model.state_dict()
    for link in links(family, model, data):
        found = [_find(name, family, tensors) for name in link.theirs]
        if link.ours.startswith("output.") and None in found:
            fresh.append(link.theirs[0])
            continue
        wrong += [f"{name} is missing" for name, read in zip(link.theirs, found, strict=True) if read is None]
        if None in found:
            continue
        given = link.join([read() for read in found if read is not None])
        if link.ours == "embedding.positions.weight":
            given = given[: len(state[link.ours])]
        if given.shape == state[link.ours].shape:
            state[link.ours].copy_(given)
        elif data.outputs and link.ours.startswith("output.linear."):
            fresh.append(f"{link.theirs[0]} ({len(given)} classes there, {data.outputs} here)")
        else:
            shape = tuple(given.shape)
            wrong.append(f"{' and '.join(link.theirs)} is {shape}, not {tuple(state[link.ours].shape)}")
    return fresh, wrong


def _find(name: str, family: Family, tensors: Mapping[str, Callable[[], Tensor]]) -> Callable[[], Tensor] | None:
    """A tensor by its names: the second, the first, without prefix (models saved without a head), the old one."""
    for known in (family.twins.get(name, name), name, name.removeprefix(family.prefix + ".")):
        for new, old in (("", ""), *_OLD_NAMES.items()):
            if known.endswith(new) and (given := known.removesuffix(new) + old) in tensors:
                return tensors[given]
    return None


def _open(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """For each tensor of a folder a function that reads it."""
    if (folder / _WHOLE).is_file():
        shards = {_WHOLE}
    else:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        shards = {Path(name).name for name in index["weight_map"].values()}
    files = [safe_open(folder / shard, framework="pt") for shard in sorted(shards)]
    return {name: partial(file.get_tensor, name) for file in files for name in file.keys()}  # noqa: SIM118
