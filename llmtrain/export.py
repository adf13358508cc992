"""A trained model in the forms that others read: transformers, ONNX, torch.export, plain safetensors.

Each writer fills a folder that gets its name when it is whole. Nothing is left behind where one fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from llmtrain.folder import write_json
from llmtrain.knobs import ConfigError, Misfit, UserError
from llmtrain.models.families import FAMILIES, Family, in_the_way, links, to_config
from llmtrain.models.transformer import Transformer
from llmtrain.tokenizer import Tokenizer
from llmtrain.types import DataSpec


class Trained(NamedTuple):
    """What there is to export.

    Attributes:
        model: With its trained weights.
        name: The part that made it.
        knobs: What that part was given.
        data: What the model was made for.
        tokenizer: The run's, or None where there is no text.
    """

    model: nn.Module
    name: str
    knobs: Mapping[str, Any]
    data: DataSpec
    tokenizer: Tokenizer | None


def export(trained: Trained, form: str, out: Path) -> list[tuple[str, str]]:
    """Writes a folder.

    Args:
        trained: What to write.
        form: `hf`, `safetensors`, `onnx` or `torch`.
        out: The folder, which must not be there yet, or be empty.

    Returns:
        What was written, as rows of a table.

    Raises:
        ConfigError: If the form cannot say what the model is.
        UserError: If it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError([Misfit("out", str(out), "is there already, and not empty; name another folder")])
    write = _WRITERS[form](trained)
    out = out.absolute()
    work = out.with_name(f".writing-{out.name}")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rows = write(work)
        if trained.tokenizer is not None:
            _with_begin(trained).save(str(work / "tokenizer.json"))
        work.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [*rows, ("folder", str(out))]


Writer = Callable[[Path], list[tuple[str, str]]]


def _hf(trained: Trained) -> Writer:
    """The family that computes the same, checked before anything is written."""
    model, knobs, data = trained.model, getattr(trained.model, "knobs", trained.knobs), trained.data
    if not isinstance(model, Transformer):
        rule = "is no Transformer, and format=hf knows no other; format=safetensors, onnx and torch do"
        raise ConfigError([Misfit("model.name", trained.name, rule)])
    family = nearest_family(knobs, data, _roles(trained).get("pad"))

    def write(folder: Path) -> list[tuple[str, str]]:
        tokens = _token_names(trained)
        config = to_config(family, model, knobs, data) | _token_ids(family, trained, knobs)
        write_json(folder / "config.json", config)
        save_file(hf_tensors(family, model, data, knobs), folder / "model.safetensors", {"format": "pt"})
        if trained.tokenizer is not None:
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": knobs["context"]}
            write_json(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False, **tokens})
        return [("format", f"hf: {config['architectures'][0]} of transformers")]

    return write


def nearest_family(knobs: Mapping[str, Any], data: DataSpec, pad: int | None) -> Family:
    """The first family of transformers that computes the same.

    Args:
        knobs: Those of `llmtrain.models.transformer.transformer`.
        data: What the model was made for.
        pad: The token that stands for no text, if there is one.

    Raises:
        ConfigError: If there is none, with what keeps it from being the one that comes nearest.
    """
    found = {family.name: in_the_way(family, knobs, data, pad) for family in FAMILIES.values()}
    name = min(found, key=lambda name: len(found[name]))
    if found[name]:
        rule = f"says no such model; {FAMILIES[name].words} comes nearest, and these keep it from being one"
        raise ConfigError([Misfit("format", "hf", rule), *found[name]])
    return FAMILIES[name]


def hf_tensors(family: Family, model: Transformer, data: DataSpec, knobs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights by the names of transformers, without the rows that pad the vocabulary; on the CPU."""
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for link in links(family, model, data, knobs["position_offset"]):
        ours = state.get(link.ours)
        tensors |= link.split(torch.zeros(sum(link.sizes)) if ours is None else ours.cpu())
    if not knobs["tied_embeddings"]:
        tensors |= {second: tensors[first].clone() for first, second in family.twins.items() if first in tensors}
    return tensors


def _roles(trained: Trained) -> dict[str, int]:
    """The token ids that transformers asks for, by what it calls them."""
    names = {"eos": "end", "mask": "mask", "pad": "pad", "cls": "begin"}
    ids = {role: getattr(trained.tokenizer, name, None) for role, name in names.items()}
    ids["pad"] = ids["pad"] if trained.data.pad is None else trained.data.pad
    return {role: index for role, index in ids.items() if index is not None}


def _token_ids(family: Family, trained: Trained, knobs: Mapping[str, Any]) -> dict[str, int | None]:
    """Token ids for `config.json`; theirs of the published models would be wrong."""
    roles = _roles(trained)
    pad = knobs["position_offset"] - 1 if family.name == "roberta" else roles.get("pad")
    return {"bos_token_id": roles.get("eos"), "eos_token_id": roles.get("eos"), "pad_token_id": pad}


def _token_names(trained: Trained) -> dict[str, str]:
    """Tokens for `tokenizer_config.json`."""
    if trained.tokenizer is None:
        return {}
    names = {role: trained.tokenizer.library.id_to_token(index) for role, index in _roles(trained).items()}
    return {f"{role}_token": name for role, name in names.items() if name is not None}


def _with_begin(trained: Trained) -> tokenizers.Tokenizer:
    """The tokenizer, beginning a sample as the model has seen them: data with classes puts a token before each."""
    assert trained.tokenizer is not None
    library = tokenizers.Tokenizer.from_str(trained.tokenizer.library.to_str())
    begin = trained.tokenizer.begin
    if trained.data.outputs and begin is not None:
        name = library.id_to_token(begin)
        library.post_processor = TemplateProcessing(single=[name, "$A"], special_tokens=[(name, begin)])
    return library


def _safetensors(trained: Trained) -> Writer:
    """The weights by our own names, and all that it takes to build the model again."""
    own = getattr(trained.model, "knobs", None)
    name, knobs = ("transformer", own) if own is not None else (trained.name, trained.knobs)

    def write(folder: Path) -> list[tuple[str, str]]:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        write_json(folder / "model.json", {"model": {"name": name, **knobs}, "data": asdict(trained.data)})
        return [("format", f"safetensors: {len(tensors)} tensors by our names, knobs in model.json")]

    return write


def _torch(trained: Trained) -> Writer:
    """A program of torch.export, which runs without llmtrain."""

    def write(folder: Path) -> list[tuple[str, str]]:
        torch.export.save(_traced("torch", trained), folder / "model.pt2")
        return [("format", "torch: model.pt2 for torch.export.load")]

    return write


def _onnx(trained: Trained) -> Writer:
    """A graph of ONNX operators, from `inputs` to `outputs`."""
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError("format=onnx needs onnx and onnxscript: pip install 'llmtrain[onnx]'")

    def write(folder: Path) -> list[tuple[str, str]]:
        program = _traced("onnx", trained)
        names: dict[str, Any] = {"input_names": ["inputs"], "output_names": ["outputs"]}
        with _quietly("onnx"):
            graph = torch.onnx.export(program, dynamo=True, verbose=False, **names)
            assert graph is not None
            graph.save(folder / "model.onnx")
        return [("format", "onnx: model.onnx, from inputs to outputs")]

    return write


def _traced(form: str, trained: Trained) -> torch.export.ExportedProgram:
    """The model as a program for any number of samples, and of tokens up to its context.

    Raises:
        UserError: If it cannot be traced.
    """
    model, data = trained.model.cpu().eval(), trained.data
    dims: dict[int, Any] = {0: torch.export.Dim("samples", min=1, max=1 << 16)}
    example = torch.zeros(3, *data.shape)
    if not data.shape:
        longest = getattr(model, "context", data.context)
        example = torch.zeros(3, max(longest - 1, 2), dtype=torch.int64)
        dims[1] = torch.export.Dim("tokens", min=1, max=longest)
        if any(isinstance(layer, nn.RNNBase) for layer in model.modules()):
            raise UserError(f"format={form}: torch traces recurrent layers for one number of tokens only")
        if isinstance(model, Transformer) and model.sight.window is None:  # a mask, where torch would ask whether T > 1
            model.sight = model.sight._replace(window=longest)
    with _quietly(form), torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=(dims,), strict=True)


@contextlib.contextmanager
def _quietly(form: str) -> Iterator[None]:
    """Without torch's talk of what it does; with what it cannot do told in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except OSError:  # a disk that is full is told by the caller
        raise
    except Exception as error:  # whatever in a model cannot be traced, torch tells in many classes of its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"format={form}: this model cannot be traced: {lines[0]}") from None
    finally:
        logging.disable(before)


_WRITERS: dict[str, Callable[[Trained], Writer]] = {
    "hf": _hf,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch": _torch,
}
