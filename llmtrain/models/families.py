"""What the model families of transformers call what a Transformer here has, in both directions.

A family is a table: which knob each key of its `config.json` is, which knobs it fixes, and what it calls each
layer. The same table writes a trained model for others and reads theirs; nothing of transformers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from llmtrain.compose import config_folder
from llmtrain.knobs import Misfit
from llmtrain.models.transformer import Transformer
from llmtrain.types import DataSpec

_PLAIN = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
_WITHOUT_EFFECT = {
    "vocab_multiple",
    "published_vocab",
    "norm_momentum",
    "dropout",
    "embedding_dropout",
    "attention_dropout",
    "stochastic_depth",
}
"""Knobs that change no output of a trained model, once the rows that pad its vocabulary are cut off."""
_ROPE = ("rope_base", "rope_fraction", "rope_scaling")


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        name: Its `model_type`.
        words: What to call one, in a sentence.
        token_class: Its class with logits for each token.
        sample_class: Its class with logits for each sample.
        prefix: What the names of its tensors begin with; the heads' do not.
        keys: The knob that each key of its config is.
        activations: The activation that each of its names is; of several, the first is written.
        fixed: Knobs that it has at one value, where this is not GPT-2's.
        demands: Values of keys without which it computes something else.
        absent: What a key means that is not there.
        layers: Its names of the layers. A block's number stands for `*`; several names are the parts of one
            matrix, in order.
        token_head: Names of the layers behind `token_class`.
        sample_head: Names of the layers behind `sample_class`.
        twins: Tensors that it also has under a second name; of an untied model that is the one which counts.
        biased: It has a bias in every layer of its blocks; those that a model lacks are zeros.
        transposed: Its blocks keep matrices as (inputs, outputs).
    """

    name: str
    words: str
    token_class: str
    sample_class: str
    prefix: str
    keys: Mapping[str, str]
    activations: Mapping[str, str]
    fixed: Mapping[str, Any]
    layers: Mapping[str, tuple[str, ...]]
    token_head: Mapping[str, str]
    sample_head: Mapping[str, str]
    demands: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)
    biased: bool = False
    transposed: bool = False


_GPT2 = Family(
    name="gpt2",
    words="a GPT-2",
    token_class="GPT2LMHeadModel",
    sample_class="GPT2ForSequenceClassification",
    prefix="transformer",
    keys={
        "n_layer": "layers",
        "n_embd": "width",
        "n_head": "heads",
        "n_inner": "ffn_width",
        "n_positions": "context",
        "activation_function": "activation",
        "layer_norm_epsilon": "norm_eps",
        "resid_pdrop": "dropout",
        "embd_pdrop": "embedding_dropout",
        "attn_pdrop": "attention_dropout",
        "tie_word_embeddings": "tied_embeddings",
    },
    activations=_PLAIN,
    fixed={},
    demands={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    absent={
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "tie_word_embeddings": True,
    },
    layers={
        "embedding.tokens": ("wte",),
        "embedding.positions": ("wpe",),
        "norm": ("ln_f",),
        "blocks.*.norm1": ("h.*.ln_1",),
        "blocks.*.attention.qkv": ("h.*.attn.c_attn",),
        "blocks.*.attention.out": ("h.*.attn.c_proj",),
        "blocks.*.norm2": ("h.*.ln_2",),
        "blocks.*.ffn.up": ("h.*.mlp.c_fc",),
        "blocks.*.ffn.down": ("h.*.mlp.c_proj",),
    },
    token_head={"output.linear": "lm_head"},
    sample_head={"output.linear": "score"},
    biased=True,
    transposed=True,
)


def _like_llama(
    name: str,
    words: str,
    keys: Mapping[str, str],
    fixed: Mapping[str, Any],
    demands: Mapping[str, Any],
    absent: Mapping[str, Any],
) -> Family:
    """Llama (Touvron et al. 2023, arXiv:2302.13971) and those that differ from it in little."""
    title = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[name]
    return Family(
        name=name,
        words=words,
        token_class=f"{title}ForCausalLM",
        sample_class=f"{title}ForSequenceClassification",
        prefix="model",
        keys={
            "num_hidden_layers": "layers",
            "hidden_size": "width",
            "num_attention_heads": "heads",
            "num_key_value_heads": "kv_heads",
            "head_dim": "head_dim",
            "intermediate_size": "ffn_width",
            "max_position_embeddings": "context",
            "hidden_act": "activation",
            "rms_norm_eps": "norm_eps",
            "attention_dropout": "attention_dropout",
            "tie_word_embeddings": "tied_embeddings",
            **keys,
        },
        activations=_GATED,
        fixed={"norm": "rmsnorm", "position": "rope", **fixed},
        demands=demands,
        absent={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            **absent,
        },
        layers={
            "embedding.tokens": ("embed_tokens",),
            "norm": ("norm",),
            "blocks.*.norm1": ("layers.*.input_layernorm",),
            "blocks.*.attention.qkv": tuple(f"layers.*.self_attn.{part}_proj" for part in "qkv"),
            "blocks.*.attention.q_norm": ("layers.*.self_attn.q_norm",),
            "blocks.*.attention.k_norm": ("layers.*.self_attn.k_norm",),
            "blocks.*.attention.out": ("layers.*.self_attn.o_proj",),
            "blocks.*.norm2": ("layers.*.post_attention_layernorm",),
            "blocks.*.ffn.up": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
            "blocks.*.ffn.down": ("layers.*.mlp.down_proj",),
        },
        token_head={"output.linear": "lm_head"},
        sample_head={"output.linear": "score"},
    )


_NO_BIAS = {"bias": False, "qkv_bias": False}
_LLAMA = _like_llama(
    "llama",
    "a Llama",
    {"attention_bias": "qkv_bias", "mlp_bias": "bias"},
    {},
    {},
    {"attention_bias": False, "mlp_bias": False},
)
_MISTRAL = _like_llama(
    "mistral",
    "a Mistral",
    {"sliding_window": "window"},
    _NO_BIAS,
    {},
    {"sliding_window": 4096, "num_key_value_heads": 8},
)
_QWEN2 = _like_llama("qwen2", "a Qwen2", {}, {"bias": False, "qkv_bias": True}, {"use_sliding_window": False}, {})
_QWEN3 = _like_llama(
    "qwen3",
    "a Qwen3",
    {},
    {**_NO_BIAS, "qk_norm": True},
    {"use_sliding_window": False, "attention_bias": False},
    {"head_dim": 128},
)


def _like_bert(
    name: str, words: str, title: str, token_head: Mapping[str, str], sample_head: Mapping[str, str]
) -> Family:
    """BERT (Devlin et al. 2019, arXiv:1810.04805), and RoBERTa, which only counts positions in another way."""
    layer = "encoder.layer.*"
    return Family(
        name=name,
        words=words,
        token_class=f"{title}ForMaskedLM",
        sample_class=f"{title}ForSequenceClassification",
        prefix=name,
        keys={
            "num_hidden_layers": "layers",
            "hidden_size": "width",
            "num_attention_heads": "heads",
            "intermediate_size": "ffn_width",
            "max_position_embeddings": "context",
            "type_vocab_size": "segment_types",
            "hidden_act": "activation",
            "layer_norm_eps": "norm_eps",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "tie_word_embeddings": "tied_embeddings",
        },
        activations=_PLAIN,
        fixed={
            "causal": False,
            "norm_place": "post",
            "embedding_norm": True,
            "head": "transform",
            "head_bias": True,
            "pooling": "first",
        },
        demands={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
        absent={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "type_vocab_size": 2,
            "tie_word_embeddings": True,
        },
        layers={
            "embedding.tokens": ("embeddings.word_embeddings",),
            "embedding.positions": ("embeddings.position_embeddings",),
            "embedding.segments": ("embeddings.token_type_embeddings",),
            "embedding.norm": ("embeddings.LayerNorm",),
            "blocks.*.attention.qkv": tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")),
            "blocks.*.attention.out": (f"{layer}.attention.output.dense",),
            "blocks.*.norm1": (f"{layer}.attention.output.LayerNorm",),
            "blocks.*.ffn.up": (f"{layer}.intermediate.dense",),
            "blocks.*.ffn.down": (f"{layer}.output.dense",),
            "blocks.*.norm2": (f"{layer}.output.LayerNorm",),
        },
        token_head=token_head,
        sample_head=sample_head,
        twins={f"{token_head['output']}.bias": f"{token_head['output.linear']}.bias"},
        biased=True,
    )


_BERT = _like_bert(
    "bert",
    "a BERT",
    "Bert",
    {
        "output.transform.0": "cls.predictions.transform.dense",
        "output.transform.2": "cls.predictions.transform.LayerNorm",
        "output.linear": "cls.predictions.decoder",
        "output": "cls.predictions",
    },
    {"output.dense.0": "bert.pooler.dense", "output.linear": "classifier"},
)
_ROBERTA = _like_bert(
    "roberta",
    "a RoBERTa",
    "Roberta",
    {
        "output.transform.0": "lm_head.dense",
        "output.transform.2": "lm_head.layer_norm",
        "output.linear": "lm_head.decoder",
        "output": "lm_head",
    },
    {"output.dense.0": "classifier.dense", "output.linear": "classifier.out_proj"},
)

FAMILIES: dict[str, Family] = {
    family.name: family for family in (_GPT2, _LLAMA, _MISTRAL, _QWEN2, _QWEN3, _ROBERTA, _BERT)
}


@cache
def gpt2_knobs() -> Mapping[str, Any]:
    """Every knob of a Transformer at GPT-2's value, as `conf/model/transformer.yaml` has them."""
    text = (config_folder() / "model" / "transformer.yaml").read_text(encoding="utf-8")
    return {key: value for key, value in yaml.safe_load(text).items() if key != "name"}


def resolved(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs with null replaced by what it stands for, and those that take no part at GPT-2's value."""
    full, plain = dict(knobs), gpt2_knobs()
    width, heads = full["width"], full["heads"]
    full["kv_heads"] = full["kv_heads"] or heads
    full["head_dim"] = full["head_dim"] or width // heads
    full["value_dim"] = full["value_dim"] or full["head_dim"]
    full["position_dim"] = full["position_dim"] or width
    for knob, source in (("qkv_bias", "bias"), ("embedding_dropout", "dropout"), ("attention_dropout", "dropout")):
        full[knob] = full[source] if full[knob] is None else full[knob]
    if full["position"] != "rope":
        full |= {knob: plain[knob] for knob in _ROPE}
    if full["position"] != "learned":
        full["position_offset"] = plain["position_offset"]
    return full


def in_the_way(family: Family, knobs: Mapping[str, Any], data: DataSpec, pad: int | None) -> list[Misfit]:
    """The knobs that keep a model from being one of a family, each with the value that it must have.

    Args:
        family: The family.
        knobs: Those of `llmtrain.models.transformer.transformer`.
        data: What the model was made for.
        pad: The token that stands for no text, if there is one.
    """
    full = resolved(knobs)
    wanted: dict[str, tuple[Any, ...]] = {
        knob: (resolved({**knobs, knob: family.fixed.get(knob, plain)})[knob],) for knob, plain in gpt2_knobs().items()
    }
    free = {*family.keys.values(), *_WITHOUT_EFFECT, *(("logit_softcap",) if data.outputs else ("pooling",))}
    free |= {"rope_base", "rope_scaling"} if "position" in family.fixed else {*_ROPE}
    free |= {"bias", "qkv_bias", "position_offset"} if family.biased else set()  # zeros, and rows that are cut off
    wanted |= {knob: (full[knob],) for knob in free}
    wanted["activation"] = tuple(dict.fromkeys(family.activations.values()))
    wanted |= _special(family, full, data, pad)
    return [
        Misfit(f"model.{knob}", _yaml(knobs[knob]), f"must be {' or '.join(map(_yaml, values))} for {family.words}")
        for knob, values in wanted.items()
        if full[knob] not in values
    ]


def _special(family: Family, full: Mapping[str, Any], data: DataSpec, pad: int | None) -> dict[str, tuple[Any, ...]]:
    """What a family wants of knobs beside its table."""
    wanted: dict[str, tuple[Any, ...]] = {}
    if family.name == "llama":
        wanted["qkv_bias"] = (full["bias"],)
        wanted["heads"] = (full["heads"] if full["width"] % full["heads"] == 0 else "a divisor of width",)
    if family.name == "mistral" and full["window"] is None:
        wanted["window"] = ("a number",)
    if family.prefix in ("bert", "roberta") and not full["segment_types"]:
        wanted["segment_types"] = (1, 2)
    if family.name == "roberta":
        wanted["position_offset"] = ("the padding token's id + 1" if pad is None else pad + 1,)  # it counts no padding
        wanted["activation"] = ("gelu",) if not data.outputs else tuple(dict.fromkeys(_PLAIN.values()))
    return wanted


def _yaml(value: Any) -> str:
    """A value as YAML has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def to_config(family: Family, model: Transformer, knobs: Mapping[str, Any], data: DataSpec) -> dict[str, Any]:
    """What `config.json` says of a model, without its token ids."""
    full = resolved(knobs)
    full["ffn_width"] = next(block.ffn.down.in_features for block in model.blocks)  # type: ignore[union-attr]
    names = {ours: theirs for theirs, ours in reversed([*family.activations.items()])}
    config = {key: full[knob] for key, knob in family.keys.items() if knob != "activation"}
    config |= {key: names[full[knob]] for key, knob in family.keys.items() if knob == "activation"}
    config |= family.demands
    if full["position"] == "rope":
        scaling = {"rope_type": "linear", "factor": full["rope_scaling"]}
        config |= {"rope_theta": full["rope_base"], "rope_scaling": scaling if full["rope_scaling"] != 1 else None}
    if family.name == "roberta":
        config["max_position_embeddings"] += full["position_offset"]
    labels = {f"LABEL_{i}": i for i in range(data.outputs)}
    return {
        "model_type": family.name,
        "architectures": [family.sample_class if data.outputs else family.token_class],
        "vocab_size": data.vocab,
        "dtype": "float32",
        **config,
        **({"label2id": labels, "id2label": {i: name for name, i in labels.items()}} if labels else {}),
    }


class Unreadable(ValueError):
    """A config of transformers that means no knobs here; says what is in the way."""


def from_config(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family and the knobs that a `config.json` means.

    Raises:
        Unreadable: If it is of another family, lacks something, or asks for what no knob says.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise Unreadable(f"is a model of type {kind}; there are {', '.join(FAMILIES)}")
    wrong = [f"{k}={config[k]}, not {v}" for k, v in family.demands.items() if config.get(k, v) not in (v, None)]
    if wrong:
        raise Unreadable(f"is {family.words} with {' and '.join(wrong)}, for which there is no knob")
    missing = [key for key in ("vocab_size", *family.keys) if key not in config and key not in family.absent]
    if missing:
        raise Unreadable(f"has no {', '.join(missing)} in its config.json")
    knobs = {**gpt2_knobs(), **family.fixed}
    knobs |= {knob: config.get(key, family.absent.get(key)) for key, knob in family.keys.items()}
    if knobs["activation"] not in family.activations:
        raise Unreadable(f"has the activation {knobs['activation']}; there are {', '.join(family.activations)}")
    knobs["activation"] = family.activations[knobs["activation"]]
    knobs |= {"vocab_multiple": 1, "published_vocab": config["vocab_size"]}
    if knobs["position"] == "rope":
        knobs |= _rope_knobs(config)
    if family.name == "llama" and knobs["qkv_bias"] != knobs["bias"]:
        raise Unreadable("has attention_bias and mlp_bias of two kinds, for which there is no knob")
    if family.name == "roberta":
        knobs["position_offset"] = (1 if config.get("pad_token_id") is None else config["pad_token_id"]) + 1
        knobs["context"] -= knobs["position_offset"]
    return family, knobs


def _rope_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of rotary positions, as transformers 4 or 5 writes them."""
    said = {"rope_theta": config.get("rope_theta", 10000.0)}
    said |= config.get("rope_scaling") or {}
    said |= config.get("rope_parameters") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    partial = said.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if any(isinstance(value, dict) for value in said.values()):
        raise Unreadable("has rotary positions that differ from layer to layer, for which there is no knob")
    if kind not in ("default", "linear") or partial != 1.0:
        raise Unreadable(f"has rotary positions of type {kind}, share {partial}; there are default and linear, 1.0")
    return {"rope_base": float(said["rope_theta"]), "rope_scaling": float(said.get("factor") or 1.0)}


class Link(NamedTuple):
    """One tensor of ours and the tensors of theirs that hold the same numbers.

    Attributes:
        ours: Its name in our model.
        theirs: Names of its parts, in the order of its rows.
        sizes: Rows of each part.
        transposed: Theirs is (inputs, outputs).
        rows: The rows that a family has; the others pad the vocabulary, or stand before the first position.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...]
    transposed: bool
    rows: slice

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Theirs from ours."""
        for name, part in zip(self.theirs, tensor[self.rows].split(self.sizes), strict=True):
            yield name, (part.T if self.transposed else part).contiguous()

    def join(self, parts: list[Tensor]) -> Tensor:
        """Ours, without the rows that the family has not, from theirs."""
        return torch.cat([part.T if self.transposed else part for part in parts])


def links(family: Family, model: Transformer, data: DataSpec, offset: int = 0) -> Iterator[Link]:
    """For each tensor that a family has, what it is in a model.

    Args:
        family: The family, which nothing of the model stands in the way of.
        model: The model.
        data: What it was made for.
        offset: Its rows of positions before the first that is used; a RoBERTa has them too.
    """
    heads = family.sample_head if data.outputs else family.token_head
    of_words = {"embedding.tokens"} if data.outputs else {"embedding.tokens", "output.linear", "output"}
    of_positions = set() if family.name == "roberta" else {"embedding.positions"}
    shapes = {name: len(tensor) for name, tensor in model.state_dict().items()}
    for ours, count in (shapes | dict(_missing_biases(family, model))).items():
        layer, kind = ours.rsplit(".", 1)
        number = "".join(re.findall(r"^blocks\.(\d+)", layer))
        key = re.sub(r"^blocks\.\d+", "blocks.*", layer)
        names = (heads[key],) if key in heads else tuple(f"{family.prefix}.{name}" for name in family.layers[key])
        rows = slice(data.vocab) if key in of_words else slice(offset if key in of_positions else 0, None)
        yield Link(
            ours,
            tuple(f"{name}.{kind}".replace("*", number) for name in names),
            _sizes(model, layer, len(range(count)[rows]), len(names)),
            family.transposed and kind == "weight" and key.startswith(("blocks.*.attention", "blocks.*.ffn")),
            rows,
        )


def _sizes(model: Transformer, layer: str, rows: int, parts: int) -> tuple[int, ...]:
    """Rows of the parts that a family has for one matrix: queries, keys, values; gate, up; or the whole."""
    if parts < 3:
        return (rows // parts,) * parts
    attention: Any = model.get_submodule(layer.removesuffix(".qkv"))
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return queries, keys, rows - queries - keys


def _missing_biases(family: Family, model: Transformer) -> Iterator[tuple[str, int]]:
    """Names and sizes of the biases that a family has and the model has not: there they are zeros."""
    for name, layer in model.named_modules():
        lacks = isinstance(layer, nn.Linear | nn.LayerNorm) and layer.bias is None
        if family.biased and lacks and name != "output.linear":
            yield f"{name}.bias", len(layer.weight)
