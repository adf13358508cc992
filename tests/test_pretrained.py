"""Models from folders of transformers: the same numbers, bit by bit the same weights, and clear refusals."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from made import byte
from runs import llmtrain, tiny, write_text
from safetensors.torch import load_file, save_file

from llmtrain.knobs import ConfigError, UserError
from llmtrain.models.families import FAMILIES, links
from llmtrain.models.pretrained import hf
from llmtrain.models.transformer import Transformer, count_parameters
from llmtrain.types import DataSpec

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

VOCAB, CONTEXT = 31, 12
GPT2 = {"n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": CONTEXT, "vocab_size": VOCAB}
OTHERS = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": CONTEXT,
    "vocab_size": VOCAB,
}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}
CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    ),
    "llama": ("llama", OTHERS | {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "llama biased": ("llama", OTHERS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama scaled": ("llama", OTHERS | {"head_dim": 10, "hidden_act": "gelu", "rope_parameters": LINEAR}),
    "mistral": ("mistral", OTHERS | {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": ("qwen2", OTHERS | {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", OTHERS | {"num_key_value_heads": 2, "head_dim": 6}),
    "bert": ("bert", OTHERS | {"pad_token_id": 0}),
    "bert untied": ("bert", OTHERS | {"tie_word_embeddings": False, "layer_norm_eps": 0.1, "type_vocab_size": 3}),
    "roberta": ("roberta", OTHERS | {"max_position_embeddings": CONTEXT + 2, "pad_token_id": 1, "type_vocab_size": 1}),
}
NO_DROPOUT = dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
)
SPEC = DataSpec(vocab=VOCAB, context=CONTEXT)
CLASSES = DataSpec(vocab=VOCAB, context=CONTEXT, outputs=3, pad=1)


def theirs_of(case: str, outputs: int = 0, **more):
    """A random model of transformers, in float32."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        **(settings | NO_DROPOUT | more),
        attn_implementation="sdpa",
        **({"num_labels": outputs} if outputs else {}),
    )
    masked = kind in ("bert", "roberta")
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = (transformers.AutoModelForSequenceClassification if outputs else auto).from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return model.eval()


def ours_of(folder: Path, spec: DataSpec = SPEC, context: int | None = None) -> Transformer:
    torch.manual_seed(1)
    model = hf(spec, path=str(folder), context=context)
    model.load_pretrained()
    return model.eval()


def some_tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(3))  # no padding


def their_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def in_float64(ours: Transformer, theirs: torch.nn.Module) -> None:
    """Both, where theirs falls back to float32: in RMS norms, and in angles, which once near are set to the same."""
    ours.double()
    theirs.double()
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            shape, eps = module.weight.shape, module.variance_epsilon
            module.forward = lambda x, m=module, s=shape, e=eps: F.rms_norm(x, s, m.weight, e)
    if not ours.rotates:
        return
    cos, sin = theirs.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(CONTEXT)[None])
    for name, angles in (("cos", cos), ("sin", sin)):
        half = angles[0, :, : angles.size(-1) // 2]
        torch.testing.assert_close(getattr(ours, name), half, atol=1e-5, rtol=1e-5)
        setattr(ours, name, half)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case: str, tmp_path: Path):
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path)
    ours, family = ours_of(tmp_path), FAMILIES[CASES[case][0]]
    in_float64(ours, theirs)
    tokens = some_tokens()
    got, expected = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    for logits in (got, expected):
        F.cross_entropy(logits.flatten(0, 1), some_tokens().flip(0).flatten()).backward()
    gradients = {name: p.grad for name, p in their_tensors(theirs).items()}
    untied = not theirs.config.tie_word_embeddings
    for link in links(family, ours, SPEC):
        names = [family.twins.get(name, name) if untied else name for name in link.theirs]
        expected = link.join([gradients[name] for name in names])
        torch.testing.assert_close(ours.get_parameter(link.ours).grad, expected, atol=1e-9, rtol=1e-9, msg=link.ours)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_read_bit_by_bit_and_all_of_them(case: str, tmp_path: Path):
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path)
    ours, family = ours_of(tmp_path), FAMILIES[CASES[case][0]]
    found = load_file(tmp_path / "model.safetensors")
    state = ours.state_dict()
    used = set()
    for link in links(family, ours, SPEC):
        names = [family.twins.get(n, n) if family.twins.get(n, n) in found else n for n in link.theirs]
        assert torch.equal(link.join([found[name] for name in names]), state[link.ours]), link.ours
        used |= {*names, *link.theirs}
    assert set(found) <= used
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters()) - (
        VOCAB if case == "bert untied" else 0  # a bias that nothing reads
    )


@pytest.mark.parametrize("case", ["gpt2", "llama", "mistral", "bert", "roberta"])
def test_classes_of_padded_samples_equal_those_of_transformers(case: str, tmp_path: Path):
    theirs = theirs_of(case, outputs=3, pad_token_id=1)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path, CLASSES)
    in_float64(ours, theirs)
    tokens = some_tokens()
    tokens[0, 5:] = tokens[1, 9:] = 1
    expected = theirs(tokens, attention_mask=(tokens != 1).long()).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(tokens), expected, atol=1e-9, rtol=1e-9)


def test_shards_are_read_like_one_file(tmp_path: Path):
    theirs = theirs_of("llama")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = ours_of(tmp_path / "one").state_dict(), ours_of(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_half_precision_is_read_without_loss(tmp_path: Path):
    theirs = theirs_of("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    weight = ours_of(tmp_path).blocks[1].ffn.down.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, theirs.model.layers[1].mlp.down_proj.weight.float())


def test_models_saved_without_a_head_and_with_old_names(tmp_path: Path):
    theirs = theirs_of("gpt2")
    theirs.transformer.save_pretrained(tmp_path / "gpt2")
    assert "wte.weight" in load_file(tmp_path / "gpt2/model.safetensors")
    ours, tokens = ours_of(tmp_path / "gpt2"), some_tokens()
    assert ours.notes == [f"weights from {tmp_path / 'gpt2'}"]
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    bert = theirs_of("bert")
    bert.save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert/model.safetensors"
    renamed = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in load_file(file).items()
    }
    assert any(name.endswith("gamma") for name in renamed)
    save_file(renamed, file)
    torch.testing.assert_close(ours_of(file.parent)(tokens), bert(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_there_starts_from_init_and_is_told(tmp_path: Path):
    theirs = theirs_of("bert")
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(1)
    fresh = hf(CLASSES, path=str(tmp_path), context=None).output.linear.weight
    ours = ours_of(tmp_path, CLASSES)
    assert torch.equal(ours.output.linear.weight, fresh)
    [note] = ours.notes
    for name in ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"):
        assert name in note
    assert torch.equal(ours.blocks[0].norm1.weight, theirs.bert.encoder.layer[0].attention.output.LayerNorm.weight)


def test_a_head_for_other_classes_starts_from_init_and_is_told(tmp_path: Path):
    theirs = theirs_of("bert", outputs=5)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path, CLASSES)
    assert ours.output.linear.weight.shape == (3, 24)
    assert torch.equal(ours.output.dense[0].weight, theirs.bert.pooler.dense.weight)
    assert "classifier.weight (5 classes there, 3 here)" in ours.notes[0]


def test_dropout_is_that_of_the_folder(tmp_path: Path):
    gpt2 = theirs_of("gpt2")
    gpt2.config.update({"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3})
    gpt2.save_pretrained(tmp_path / "gpt2")
    bert = theirs_of("bert")
    bert.config.update({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3})
    bert.save_pretrained(tmp_path / "bert")
    for name, after_embedding in (("gpt2", 0.2), ("bert", 0.1)):
        model = ours_of(tmp_path / name)
        block = model.blocks[0]
        assert (model.embedding.dropout.p, block.dropout.p, block.attention.dropout) == (after_embedding, 0.1, 0.3)


def test_a_check_reads_config_json_alone(tmp_path: Path):
    theirs_of("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing to read")
    with torch.device("meta"):
        model = hf(SPEC, path=str(tmp_path), context=None)
    assert next(model.parameters()).is_meta
    with pytest.raises(UserError, match="weights cannot be read"):
        hf(SPEC, path=str(tmp_path), context=None).load_pretrained()


def test_context_is_cut_and_only_learned_positions_end(tmp_path: Path):
    theirs = theirs_of("roberta")
    theirs.save_pretrained(tmp_path / "learned")
    theirs_of("llama").save_pretrained(tmp_path / "turned")
    short = DataSpec(vocab=VOCAB, context=7)
    ours = ours_of(tmp_path / "learned", short, context=7)
    assert ours.context == 7 and ours.embedding.positions.weight.shape == (9, 24)
    tokens = some_tokens()[:, :7]
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert ours_of(tmp_path / "turned", SPEC, context=40).context == 40
    with pytest.raises(ConfigError, match="context=13: is more than the 12 positions"):
        hf(SPEC, path=str(tmp_path / "learned"), context=13)


def test_old_rope_settings_mean_the_same(tmp_path: Path):
    theirs_of("llama scaled").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    before = ours_of(tmp_path)
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    file.write_text(json.dumps(config | {"rope_scaling": {"type": "linear", "factor": 2.5}}))
    assert torch.equal(ours_of(tmp_path).cos, before.cos)
    file.write_text(json.dumps(config | {"rope_scaling": None}))
    assert not torch.equal(ours_of(tmp_path).cos, before.cos)


@pytest.mark.parametrize(
    ("case", "change", "told"),
    [
        ("gpt2", {"model_type": "t5"}, "is a model of type t5; there are gpt2, llama"),
        ("gpt2", {"n_head": None}, "has no n_head in its config.json"),
        ("gpt2", {"activation_function": "mish"}, "has the activation mish"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, not False"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rotary positions of type llama3"),
        ("llama", {"attention_bias": True}, "attention_bias and mlp_bias of two kinds"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True, not False"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ from layer to layer"),
        ("gpt2", {"n_head": "three"}, "heads=three must be integer >= 1"),
        ("gpt2", {"vocab_size": 0}, "vocab_size=0 must be integer >= 1"),
        ("roberta", {"max_position_embeddings": [1]}, "values of the wrong kind"),
        ("bert", {"is_decoder": True}, "is_decoder=True, not False"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key, not absolute"),
    ],
)
def test_what_no_knob_says_is_refused(case: str, change: dict, told: str, tmp_path: Path):
    theirs_of(case).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = {k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        hf(SPEC, path=str(tmp_path), context=None)
    [misfit] = caught.value.misfits
    assert misfit.key == "path" and told in misfit.rule


def test_folders_that_cannot_be_used_are_told(tmp_path: Path):
    def told(folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            hf(SPEC, path=str(folder), context=None)
        return str(caught.value)

    assert "no such folder" in told(tmp_path / "none")
    assert "has no config.json that can be read" in told(tmp_path)
    theirs_of("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    assert "has no model.safetensors and no model.safetensors.index.json" in told(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickle (pytorch_model.bin), which can run code" in told(tmp_path)
    for change, message in (
        ({"transformer.h.1.ln_2.bias": None}, "holds another model: transformer.h.1.ln_2.bias is missing"),
        ({"transformer.h.0.attn.c_attn.weight": torch.zeros(24, 71)}, r"c_attn.weight is \(71, 24\), not \(72, 24\)"),
    ):
        save_file({k: v for k, v in (weights | change).items() if v is not None}, file)
        with pytest.raises(UserError, match=message):
            ours_of(tmp_path)
    save_file(weights, file)
    with pytest.raises(UserError, match="knows 31 tokens and the data has 32; tokenizer=model"):
        ours_of(tmp_path, DataSpec(vocab=32, context=CONTEXT))
    assert ours_of(tmp_path, DataSpec(vocab=20, context=CONTEXT))(some_tokens()).size(-1) == VOCAB


def test_a_run_starts_from_the_folder_and_takes_its_tokenizer(tmp_path: Path):
    source = tmp_path / "source"
    theirs_of("llama", vocab_size=257, max_position_embeddings=32).save_pretrained(source)
    byte([]).save(source / "tokenizer.json")
    write_text(tmp_path)
    words = [word for word in tiny(tmp_path) if not word.startswith(("model.", "tokenizer"))]
    words += ["model=hf", f"model.path={source}", "model.context=32", "optim.lr=1e-30", "run.name=run"]
    code, text = llmtrain(words, tmp_path)
    assert code == 0, text
    assert f"weights from {source}" in text
    run = tmp_path / "runs/run"
    [newest] = (run / "checkpoints").glob("step-*")
    trained = load_file(newest / "model.safetensors")
    expected = ours_of(source, DataSpec(vocab=257, context=32)).state_dict()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)  # a rate of 1e-30 changes nothing
    assert (run / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    code, text = llmtrain(["generate", f"run={run}", "device=cpu", "prompt=the", "tokens=3"], tmp_path)
    assert code == 0, text
    code, text = llmtrain([*words[:-1], f"model.path={tmp_path / 'none'}"], tmp_path)
    assert code == 2 and "no such folder" in text
