"""What others read is what was trained: transformers, ONNX and torch.export give the same numbers."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import byte
from runs import llmtrain, tiny, train
from safetensors.torch import load_file
from toy import preset

from llmtrain.build import choose
from llmtrain.config import COMMANDS, Sample, knobs_of
from llmtrain.export import Trained, export
from llmtrain.generate import tokens as generated
from llmtrain.knobs import ConfigError, UserError
from llmtrain.models.families import gpt2_knobs
from llmtrain.models.pretrained import hf
from llmtrain.models.transformer import count_parameters, transformer
from llmtrain.tokenizer import Tokenizer
from llmtrain.topics import option_values
from llmtrain.types import DataSpec

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

VOCAB, CONTEXT, PAD = 37, 12, 1
SMALL: dict[str, Any] = {"layers": 2, "width": 24, "heads": 4, "context": CONTEXT, "vocab_multiple": 16}
TEXT = DataSpec(vocab=VOCAB, context=CONTEXT)
CLASSES = DataSpec(vocab=VOCAB, context=CONTEXT, outputs=3, pad=PAD)
GREEDY = Sample(prompt="", tokens=7, temperature=0.0, top_k=None, top_p=1.0, seed=0)


def trained(name: str, data: DataSpec = TEXT, tokenizer: Tokenizer | None = None, **changed: Any) -> Trained:
    """A random model in place of a trained one."""
    knobs = preset(name) | SMALL | changed
    torch.manual_seed(0)
    model = transformer(data, **knobs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return Trained(model, "transformer", knobs, data, tokenizer)


def loaded(folder: Path) -> Any:
    """The model as transformers loads it, nothing missing and nothing left over."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    kinds = {"ForSequenceClassification": "SequenceClassification", "ForMaskedLM": "MaskedLM"}
    kind = next((auto for end, auto in kinds.items() if name.endswith(end)), "CausalLM")
    model, told = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == name
    assert not any(told.values()), told
    return model.eval()


def some_tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same(ours: torch.nn.Module, theirs: Any, tokens: torch.Tensor, **given: Any) -> None:
    expected, got = ours(tokens), theirs(tokens, **given).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


MODELS = {
    "gpt_nano": ("GPT2LMHeadModel", [
        {},
        {"activation": "gelu_tanh", "tied_embeddings": False, "ffn_width": 40, "norm_eps": 0.1},
        {"activation": "relu", "bias": False, "position_offset": 3},
        {"activation": "silu", "qkv_bias": False, "head_dim": 6},
        {"activation": "relu2", "heads": 1, "dropout": 0.1, "stochastic_depth": 0.2},
        {"activation": "tanh"},
        {"activation": "sigmoid", "bias": False, "qkv_bias": True},
    ]),
    "llama_nano": ("LlamaForCausalLM", [
        {},
        {"kv_heads": 1, "head_dim": 10, "tied_embeddings": False, "rope_base": 300.0, "norm_eps": 0.1},
        {"kv_heads": None, "rope_scaling": 2.5, "ffn_width": None, "activation": "geglu"},
        {"bias": True, "activation": "reglu", "value_dim": 6},
    ]),
    "mistral": ("MistralForCausalLM", [{"window": 4}, {"window": 3, "heads": 5, "kv_heads": 1, "head_dim": 8}]),
    "qwen2": ("Qwen2ForCausalLM", [{"qkv_bias": True}, {"heads": 5, "kv_heads": 5, "head_dim": 4, "qkv_bias": True}]),
    "qwen3": ("Qwen3ForCausalLM", [{"qk_norm": True}, {"qk_norm": True, "heads": 5, "kv_heads": 1, "head_dim": 8}]),
    "bert_base": ("BertForMaskedLM", [
        {},
        {"activation": "relu", "bias": False, "tied_embeddings": False, "segment_types": 3},
        {"activation": "gelu_tanh", "qkv_bias": False, "ffn_width": 40, "norm_eps": 0.1, "position_offset": 2},
    ]),
    "roberta_base": ("RobertaForMaskedLM", [{}, {"tied_embeddings": False, "bias": False}]),
}  # fmt: skip
EVERY_MODEL = [(name, changed) for name, (_, changes) in MODELS.items() for changed in changes]


def of_preset(name: str, data: DataSpec = TEXT, **changed: Any) -> Trained:
    return trained("llama_nano" if name in ("mistral", "qwen2", "qwen3") else name, data, **changed)


@pytest.mark.parametrize(("name", "changed"), EVERY_MODEL)
def test_transformers_gives_the_same_logits_and_texts(name: str, changed: dict, tmp_path: Path):
    data = DataSpec(vocab=VOCAB, context=CONTEXT, pad=PAD if name == "roberta_base" else None)
    given = of_preset(name, data, **changed)
    [*_, (_, told), _] = [("", "")], *export(given, "hf", tmp_path / "out")
    assert MODELS[name][0] in told
    theirs = loaded(tmp_path / "out")
    rows = load_file(tmp_path / "out/model.safetensors")
    assert given.model.embedding.tokens.weight.size(0) == 48  # rows that pad the vocabulary stay at home
    assert {len(t) for n, t in rows.items() if "word_emb" in n or "wte" in n or "embed_tokens" in n} == {VOCAB}
    assert_same(given.model, theirs, some_tokens())
    if given.knobs["causal"]:
        prompt = some_tokens(1)[:, :4]
        expected = list(generated(given.model, prompt[0].tolist(), GREEDY))
        mask = torch.ones_like(prompt)
        got = theirs.generate(prompt, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert got[0, 4:].tolist() == expected


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_classes_of_padded_samples(name: str, tmp_path: Path):
    changed = MODELS[name][1][0]
    given = of_preset(name, CLASSES, **changed)
    export(given, "hf", tmp_path / "out")
    tokens = some_tokens()
    tokens[0, 5:] = tokens[1, 9:] = PAD
    assert_same(given.model, loaded(tmp_path / "out"), tokens, attention_mask=(tokens != PAD).long())


def test_a_roberta_whose_padding_is_a_word_becomes_a_bert(tmp_path: Path):
    """RoBERTa counts its positions past the padding token; here any token may stand anywhere."""
    given = trained("roberta_base")
    tokens = torch.arange(36).view(3, 12)
    assert "BertForMaskedLM" in str(export(given, "hf", tmp_path / "out"))
    assert_same(given.model, loaded(tmp_path / "out"), tokens)


def test_a_roberta_with_another_activation_becomes_a_bert(tmp_path: Path):
    """RoBERTa's head for tokens knows GELU alone; that for classes knows none."""
    padded = DataSpec(vocab=VOCAB, context=CONTEXT, pad=PAD)
    for data, name in ((padded, "BertForMaskedLM"), (CLASSES, "RobertaForSequenceClassification")):
        given = trained("roberta_base", data, activation="relu")
        assert name in str(export(given, "hf", tmp_path / name))
        assert_same(given.model, loaded(tmp_path / name), some_tokens())


# Every knob is said or refused

OTHER_VALUES: dict[str, list[Any]] = {
    "layers": [3], "width": [48], "heads": [2, 3], "kv_heads": [1, 2], "head_dim": [8], "value_dim": [4],
    "ffn_width": [20], "context": [16], "causal": [True, False], "window": [3], "document_mask": [False],
    "activation": ["sigmoid", "tanh", "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "reglu"],
    "norm": ["layernorm", "rmsnorm", "batchnorm", "none"], "norm_eps": [0.2], "norm_momentum": [0.3],
    "norm_place": ["pre", "post", "sandwich"], "qk_norm": [True], "parallel_block": [True], "residual_scale": [0.5],
    "position": ["learned", "sinusoidal", "rope", "alibi", "none"], "position_dim": [8], "position_offset": [3],
    "rope_base": [200.0], "rope_fraction": [1 / 3], "rope_scaling": [3.0], "embedding_scale": [2.0],
    "embedding_norm": [True, False], "segment_types": [0, 1, 2], "dropout": [0.3], "embedding_dropout": [0.3],
    "attention_dropout": [0.3], "stochastic_depth": [0.3], "bias": [True, False], "qkv_bias": [True, False],
    "value_residual": ["fixed", "learned"], "embedding_shortcut": [True],
    "attention_softcap": [2.0], "logit_softcap": [2.0], "head": ["linear", "transform"], "head_bias": [True, False],
    "pooling": ["first", "last", "mean"], "tied_embeddings": [True, False], "vocab_multiple": [1],
    "published_vocab": [99],
}  # fmt: skip


def test_every_knob_is_tried():
    assert set(OTHER_VALUES) == {
        p.name for p in inspect.signature(transformer).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    assert set(gpt2_knobs()) == set(OTHER_VALUES)


@pytest.mark.parametrize("name", ["gpt_nano", "llama_nano", "bert_base"])
@pytest.mark.parametrize("data", [TEXT, CLASSES], ids=["text", "classes"])
def test_each_value_of_each_knob_is_said_or_refused(name: str, data: DataSpec, tmp_path: Path):
    refused = {}
    for knob, values in OTHER_VALUES.items():
        for number, value in enumerate(values):
            try:
                given = trained(name, data, **{"layers": 1, knob: value})
            except ConfigError:
                continue  # no model at all
            out = tmp_path / f"{knob}{number}"
            try:
                export(given, "hf", out)
            except ConfigError as error:
                assert not out.exists()
                refused[f"{knob}={value}"] = {misfit.key for misfit in error.misfits}
                continue
            theirs, tokens = loaded(out), some_tokens(2)
            assert_same(given.model, theirs, tokens)
    assert all(f"model.{knob.partition('=')[0]}" in keys for knob, keys in refused.items()), refused
    for always in ("norm=batchnorm", "position=alibi", "residual_scale=0.5", "value_dim=", "causal="):
        assert any(knob.startswith(always) for knob in refused)
    for never in ("ffn_width", "norm_eps", "tied_embeddings", "dropout", "layers", "context"):
        assert not any(knob.startswith(f"{never}=") for knob in refused)


def test_everything_in_the_way_is_told_at_once(tmp_path: Path):
    given = trained("gpt_nano", position="alibi", window=5, kv_heads=2, logit_softcap=3.0)
    with pytest.raises(ConfigError) as caught:
        export(given, "hf", tmp_path / "out")
    first, *others = caught.value.misfits
    assert (first.key, first.value) == ("format", "hf") and "a GPT-2 comes nearest" in first.rule
    assert {(m.key, m.value, m.rule) for m in others} == {
        ("model.position", "alibi", "must be learned for a GPT-2"),
        ("model.window", "5", "must be null for a GPT-2"),
        ("model.kv_heads", "2", "must be 4 for a GPT-2"),
        ("model.logit_softcap", "3.0", "must be null for a GPT-2"),
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "changed", "nearest"),
    [
        ("llama_nano", {"position": "alibi"}, "a Llama"),
        ("bert_base", {"causal": True}, "a BERT"),
        ("bert_base", {"norm_place": "pre"}, "a BERT"),
        ("gpt_nano", {"causal": False}, "a GPT-2"),
    ],
)
def test_the_family_that_comes_nearest_is_named(name: str, changed: dict, nearest: str, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        export(trained(name, **changed), "hf", tmp_path / "out")
    first, second = caught.value.misfits
    assert f"; {nearest} comes nearest" in first.rule
    assert second.key == f"model.{next(iter(changed))}"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export(trained("gpt_nano"), "hf", tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="is there already"):
        export(trained("gpt_nano"), "hf", tmp_path / "file")


def test_what_is_no_transformer_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model.name=linear: is no Transformer"):
        export(Trained(torch.nn.Linear(2, 2), "linear", {}, DataSpec(shape=(2,)), None), "hf", tmp_path / "out")


# There and back

THEIRS = {
    "gpt2": {"n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": CONTEXT, "vocab_size": VOCAB, "pad_token_id": 1},
    **{
        name: {
            "num_hidden_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "max_position_embeddings": CONTEXT + (2 if name == "roberta" else 0),
            "vocab_size": VOCAB,
            "pad_token_id": 1,
            **({"num_key_value_heads": 2, "head_dim": 6} if name not in ("bert", "roberta") else {}),
        }
        for name in ("llama", "mistral", "qwen2", "qwen3", "bert", "roberta")
    },
}


@pytest.mark.parametrize("outputs", [0, 3])
@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_that_was_read_is_written_bit_by_bit(name: str, outputs: int, tmp_path: Path):
    config = transformers.AutoConfig.for_model(name, **THEIRS[name], **({"num_labels": outputs} if outputs else {}))
    kind = "SequenceClassification" if outputs else "MaskedLM" if name in ("bert", "roberta") else "CausalLM"
    torch.manual_seed(0)
    getattr(transformers, f"AutoModelFor{kind}").from_config(config).save_pretrained(tmp_path / "theirs")
    data = DataSpec(vocab=VOCAB, context=CONTEXT, outputs=outputs, pad=1)
    model = hf(data, path=str(tmp_path / "theirs"), context=None)
    model.load_pretrained()
    export(Trained(model, "hf", {"path": "theirs", "context": None}, data, None), "hf", tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    assert {k: old[k] for k in THEIRS[name]} == {k: new[k] for k in THEIRS[name]}
    assert old["architectures"] == new["architectures"]


# The other forms


def test_safetensors_hold_all_that_builds_the_model_again(tmp_path: Path):
    given = trained("llama_nano", tokenizer=byte([]))
    export(given, "safetensors", tmp_path / "out")
    said = json.loads((tmp_path / "out/model.json").read_text())
    choice, misfits = choose("model", said["model"])
    assert choice is not None and not misfits
    again = choice.build(DataSpec(**said["data"])).eval()
    again.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    assert torch.equal(again(some_tokens()), given.model(some_tokens()))
    assert Tokenizer.read(tmp_path / "out/tokenizer.json").vocab == 257


PROGRAMS = {
    "causal": lambda: trained("llama_nano", layers=1, kv_heads=2),
    "padded": lambda: trained("gpt_nano", CLASSES, layers=1),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_of_torch_export_gives_the_same(kind: str, tmp_path: Path):
    given = PROGRAMS[kind]()
    expected = [given.model(tokens) for tokens in shapes_of_tokens()]
    export(given, "torch", tmp_path / "out")
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    for tokens, wanted in zip(shapes_of_tokens(), expected, strict=True):
        torch.testing.assert_close(program(tokens), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_an_onnx_graph_gives_the_same(kind: str, tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    given = PROGRAMS[kind]()
    expected = [given.model(tokens) for tokens in shapes_of_tokens()]
    export(given, "onnx", tmp_path / "out")
    session = runtime.InferenceSession(tmp_path / "out/model.onnx")
    for tokens, wanted in zip(shapes_of_tokens(), expected, strict=True):
        [got] = session.run(["outputs"], {"inputs": tokens.numpy()})
        np.testing.assert_allclose(got, wanted.detach().numpy(), atol=2e-5, rtol=1e-4)


def shapes_of_tokens() -> list[torch.Tensor]:
    """Batches of several sizes and lengths, some of them padded."""
    batches = [some_tokens(5)[:rows, :length] for rows, length in ((1, 1), (2, 5), (5, CONTEXT))]
    batches[1][0, 3:] = PAD
    return batches


def test_images_are_exported_too(tmp_path: Path):
    choice, _ = choose("model", option_values("model", "mlp"))
    data = DataSpec(shape=(1, 8, 8), outputs=10)
    model = choice.build(data).eval()
    images = torch.randn(4, 1, 8, 8)
    export(Trained(model, "mlp", choice.values, data, None), "torch", tmp_path / "out")
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    torch.testing.assert_close(program(images), model(images), atol=1e-5, rtol=1e-5)


def test_recurrent_models_are_refused_where_they_cannot_be_traced(tmp_path: Path):
    choice, _ = choose("model", option_values("model", "lstm"))
    given = Trained(choice.build(TEXT).eval(), "lstm", choice.values, TEXT, None)
    with pytest.raises(UserError, match="format=torch: torch traces recurrent layers for one number of tokens only"):
        export(given, "torch", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export(given, "safetensors", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    return train(place, *[w for w in tiny(place)[1:] if w.startswith("model.")], "model=llama_nano", "run.name=run")


def test_a_run_becomes_a_folder_that_transformers_loads(run: Path, tmp_path: Path):
    code, text = llmtrain(["export", f"run={run}", f"out={tmp_path / 'out'}"], tmp_path)
    assert code == 0, text
    assert "LlamaForCausalLM" in text and str(tmp_path / "out") in text
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.read(run / "tokenizer.json")
    prompt = "the man said"
    assert theirs(prompt)["input_ids"] == ours.encode(prompt).tolist()
    assert theirs.eos_token_id == ours.end and len(theirs) == ours.vocab
    given = theirs(prompt, return_tensors="pt")
    model = loaded(tmp_path / "out")
    assert model.config.eos_token_id == ours.end
    made = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)
    words = ["generate", f"run={run}", "device=cpu", f"prompt={prompt}", "tokens=12", "temperature=0"]
    code, text = llmtrain(words, tmp_path)
    assert code == 0 and text.rstrip("\n") == theirs.decode(made[0], skip_special_tokens=True).rstrip("\n")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    code, text = llmtrain(["export", f"run={run}", f"out={tmp_path / 'out'}"], tmp_path)
    assert code == 2 and "is there already, and not empty" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_the_names_of_special_tokens_are_told(tmp_path: Path):
    tokenizer = byte([]).with_tokens(("mask", "pad", "begin"))
    data = DataSpec(vocab=tokenizer.vocab, context=CONTEXT)
    export(trained("bert_base", data, tokenizer), "hf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    told = (theirs.eos_token_id, theirs.mask_token_id, theirs.pad_token_id, theirs.cls_token_id)
    assert told == (tokenizer.end, tokenizer.mask, tokenizer.pad, tokenizer.begin)
    assert len(set(told)) == 4 and None not in told


def test_a_text_to_be_classified_begins_as_in_training(tmp_path: Path):
    tokenizer = byte([]).with_tokens(("begin", "pad"))
    data = DataSpec(vocab=tokenizer.vocab, context=CONTEXT, outputs=3, pad=tokenizer.pad)
    export(trained("bert_base", data, tokenizer), "hf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    given = theirs(["ab", "cde"], padding=True)
    a, b, c, d, e = (ord(letter) - ord("!") for letter in "abcde")
    assert given["input_ids"] == [[tokenizer.begin, a, b, tokenizer.pad], [tokenizer.begin, c, d, e]]
    assert given["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert tokenizer.encode("ab").tolist() == [a, b]  # the run's own is as it was


def test_the_command_gives_exactly_its_knobs():
    assert set(option_values(".", "export")) == set(knobs_of(COMMANDS["export"]))


def test_misfits_of_a_run_end_the_command_and_nothing_is_written(run: Path, tmp_path: Path):
    other = train(tmp_path, "model.position=alibi", "run.name=other")
    for words, told in (
        ([f"run={other}"], "must be learned for a GPT-2"),
        ([f"run={tmp_path / 'none'}"], "no such folder"),
        ([f"run={run}", "format=pickle"], "must be one of hf, safetensors, onnx, torch"),
    ):
        code, text = llmtrain(["export", *words, f"out={tmp_path / 'out'}"], tmp_path)
        assert code == 2 and told in text, text
    assert not (tmp_path / "out").exists()


# Sizes of the published models, by transformers' own count

SIZES = {
    "gpt_small": ("gpt2", {"n_layer": 12, "n_embd": 768, "n_head": 12}),
    "gpt_medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "gpt_large": ("gpt2", {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "gpt_xl": ("gpt2", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
    "bert_base": ("bert", {}),
    "bert_tiny": ("bert", {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2,
                           "intermediate_size": 512}),
    "bert_large": ("bert", {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
                            "intermediate_size": 4096}),
    "roberta_base": ("roberta", {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "roberta_large": ("roberta", {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
                                  "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "llama_160m": ("llama", {"vocab_size": 32000, "num_hidden_layers": 12, "hidden_size": 768,
                             "num_attention_heads": 12, "intermediate_size": 3072}),
    "llama_1b": ("llama", {"vocab_size": 32000, "num_hidden_layers": 22, "hidden_size": 2048, "num_attention_heads": 32,
                           "num_key_value_heads": 4, "intermediate_size": 5632}),
    "llama_8b": ("llama", {"vocab_size": 128256, "num_hidden_layers": 32, "hidden_size": 4096,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_presets_count_as_transformers_does(name: str):
    """The models with logits for each token. Neither counts a pooler: theirs has none there, ours only for classes."""
    kind, settings = SIZES[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    auto = transformers.AutoModelForMaskedLM if kind in ("bert", "roberta") else transformers.AutoModelForCausalLM
    knobs = preset(name)
    with torch.device("meta"):
        theirs = auto.from_config(config)
        ours = transformer(DataSpec(vocab=knobs["published_vocab"], context=2), **knobs)
    assert not any("pooler" in key for key, _ in theirs.named_parameters())
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", ["bert_base", "roberta_base"])
def test_with_classes_the_pooler_counts_on_both_sides(name: str):
    kind, settings = SIZES[name]
    config = transformers.AutoConfig.for_model(kind, **settings, num_labels=5)
    knobs = preset(name)
    with torch.device("meta"):
        theirs = transformers.AutoModelForSequenceClassification.from_config(config)
        ours = transformer(DataSpec(vocab=knobs["published_vocab"], context=2, outputs=5), **knobs)
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters())
