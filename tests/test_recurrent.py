"""Recurrent networks: against cells stepped one token at a time, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import preset

from llmtrain.config import Sample
from llmtrain.generate import tokens as generated
from llmtrain.knobs import ConfigError
from llmtrain.models.recurrent import Bidirectional, Recurrent, rnn
from llmtrain.types import DataSpec

KNOBS: dict[str, Any] = {
    "cell": "lstm",
    "nonlinearity": "tanh",
    "layers": 2,
    "width": 6,
    "embedding_width": 5,
    "context": 8,
    "bidirectional": False,
    "bias": True,
    "dropout": 0.0,
    "tied_embeddings": False,
    "pooling": "last",
}
CELLS = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
VOCAB = 11
TEXTS = [[3], [1, 2], [4, 0, 2, 5, 8, 9, 1], [7, 7, 7, 6]]


def make(outputs: int = 0, pad: int | None = None, **knobs: Any) -> Recurrent:
    """A small model in float64, its parameters large enough to matter."""
    torch.manual_seed(0)
    model = rnn(DataSpec(vocab=VOCAB, context=8, outputs=outputs, pad=pad), **KNOBS | knobs).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.6)
    return model


def padded(texts: list[list[int]], length: int, pad: int = 0) -> Tensor:
    return torch.tensor([text + [pad] * (length - len(text)) for text in texts])


def stepped(model: Recurrent, x: Tensor) -> Tensor:
    """States (T, directions * width) of one text's embeddings (T, C), cell by cell."""
    for directions in model.cells.layers if isinstance(model.cells, Bidirectional) else [[model.cells]]:
        for layer in range(directions[0].num_layers):
            both = [one_way(cells, layer, x.flip(0) if i else x) for i, cells in enumerate(directions)]
            x = torch.cat([states.flip(0) if i else states for i, states in enumerate(both)], 1)
    return x


def one_way(cells: nn.RNNBase, layer: int, x: Tensor) -> Tensor:
    kind = cells.mode.split("_")[0].lower()
    more = {"nonlinearity": cells.mode[4:].lower()} if kind == "rnn" else {}
    cell = CELLS[kind](x.size(1), cells.hidden_size, bias=cells.bias, dtype=x.dtype, **more)
    given = {name: getattr(cells, f"{name}_l{layer}") for name, _ in cell.named_parameters()}
    state, states = None, []
    for row in x:
        state = torch.func.functional_call(cell, given, (row[None], state))
        states.append(state[0] if kind == "lstm" else state)
    return torch.cat(states)


def torchs_own(model: Recurrent) -> nn.RNNBase:
    """torch's bidirectional layers with the weights of ours."""
    first, more = model.cells.layers[0][0], {}
    if first.mode.startswith("RNN"):
        more = {"nonlinearity": first.nonlinearity}
    own = type(first)(5, 6, len(model.cells.layers), batch_first=True, bidirectional=True, **more).double()
    own.load_state_dict(
        {
            f"{name[:-1]}{layer}{'_reverse' if back else ''}": weight
            for layer, pair in enumerate(model.cells.layers)
            for back, cells in enumerate(pair)
            for name, weight in cells.named_parameters()
        }
    )
    return own


def pooled(states: Tensor, pooling: str, width: int = 6) -> Tensor:
    if pooling == "last":
        return torch.cat((states[-1, :width], states[0, width:]))
    return states.mean(0) if pooling == "mean" else states.amax(0)


def assert_same(model: nn.Module, got: Tensor, expected: Tensor) -> None:
    """Equal numbers and equal gradients for all parameters."""
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    parameters = list(model.parameters())
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), parameters)
    for g, e in zip(ours, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        assert e.abs().max() > 1e-6
        torch.testing.assert_close(g, e, atol=1e-10, rtol=1e-9)


# The same numbers as cells stepped by hand


@pytest.mark.parametrize(
    ("cell", "nonlinearity"), [("rnn", "tanh"), ("rnn", "relu"), ("lstm", "tanh"), ("gru", "tanh")]
)
@pytest.mark.parametrize(("bidirectional", "bias"), [(False, True), (True, True), (False, False)])
def test_logits_at_each_token_equal_stepped_cells(cell: str, nonlinearity: str, bidirectional: bool, bias: bool):
    model = make(cell=cell, nonlinearity=nonlinearity, bidirectional=bidirectional, bias=bias)
    tokens = torch.randint(0, VOCAB, (3, 8))
    expected = torch.stack([stepped(model, model.tokens.weight[row]) @ model.head.weight.T for row in tokens])
    assert_same(model, model(tokens), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_both_directions_are_those_of_torch(cell: str):
    model = make(cell=cell, bidirectional=True)
    tokens = torch.randint(0, VOCAB, (3, 8))
    torch.testing.assert_close(model.states(tokens), torchs_own(model)(model.tokens(tokens))[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lower_precision_is_computed_by_any_processor(dtype: torch.dtype, bidirectional: bool):
    """Not each has an LSTM of it; there those cells compute in float32."""
    model = make(cell="lstm", bidirectional=bidirectional).float()
    tokens = torch.randint(0, VOCAB, (3, 8))
    expected = model(tokens)
    with torch.autocast("cpu", dtype):
        got = model(tokens)
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(got.float().square().sum(), parameters)
    for g, e in zip(ours, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(g, e, atol=0.02 * float(e.abs().max()), rtol=0.05)


def test_a_state_is_gone_on_from_in_lower_precision():
    model = make(cell="lstm").float()
    tokens = torch.randint(0, VOCAB, (2, 6))
    caches = model.make_caches(2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        whole, first, second = model(tokens), model(tokens[:, :4], caches), model(tokens[:, 4:], caches)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=0.02, rtol=0.02)


def test_tied_logits_are_products_with_the_embedding():
    model = make(tied_embeddings=True, embedding_width=None)
    assert model.head is None
    tokens = torch.randint(0, VOCAB, (3, 8))
    expected = torch.stack([stepped(model, model.tokens.weight[row]) @ model.tokens.weight.T for row in tokens])
    assert_same(model, model(tokens), expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("length", [7, 8])
def test_answers_equal_stepped_cells_and_padding_changes_nothing(
    cell: str, bidirectional: bool, pooling: str, length: int
):
    model = make(outputs=3, pad=0, cell=cell, bidirectional=bidirectional, pooling=pooling)
    tokens = padded(TEXTS, length)
    states = [stepped(model, model.tokens.weight[text]) for text in TEXTS]
    expected = torch.stack([model.head.weight @ pooled(s, pooling) + model.head.bias for s in states])
    assert_same(model, model(tokens), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_no_token_of_a_text(bidirectional: bool):
    model = make(pad=0, bidirectional=bidirectional)
    logits = model(padded(TEXTS, 8))
    for row, text in zip(logits, TEXTS, strict=True):
        torch.testing.assert_close(row[: len(text)], model(torch.tensor([text]))[0], atol=1e-12, rtol=1e-10)


def test_without_a_pad_token_all_tokens_count():
    model = make(outputs=3, pooling="mean")
    assert (model(padded(TEXTS, 7)) - model(padded(TEXTS, 8))).abs().max() > 1e-3


def test_an_empty_text_gets_an_answer():
    model = make(outputs=3, pad=0, bidirectional=True)
    assert model(padded([[], [1, 2]], 8)).isfinite().all()


# Time


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_causal_says_whether_a_token_sees_what_comes_after(cell: str, bidirectional: bool):
    model = make(cell=cell, bidirectional=bidirectional)
    tokens = torch.randint(0, VOCAB, (2, 8))
    logits = model(tokens)
    assert model.causal is not bidirectional
    for t in range(8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        moved = (model(changed) - logits).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [bidirectional or i >= t for i in range(8)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("pieces", [(8,), (1,) * 8, (3, 1, 4)])
def test_caches_change_nothing(cell: str, pieces: tuple[int, ...]):
    model = make(cell=cell)
    tokens = torch.randint(0, VOCAB, (2, 8))
    caches = model.make_caches(batch=2)
    got = torch.cat([model(piece, caches) for piece in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(got, model(tokens), atol=1e-12, rtol=1e-10)
    assert caches[0].length == 8


def test_text_is_generated_as_without_caches():
    model = make().eval()
    settings = Sample(prompt="", tokens=6, temperature=0.0, top_k=None, top_p=1.0, seed=0)
    seen = [1, 2]
    for token in generated(model, [1, 2], settings):
        assert token == int(model(torch.tensor([seen]))[0, -1].argmax())
        seen.append(token)
    assert len(seen) == 8


@pytest.mark.parametrize("given", [{"bidirectional": True}, {"outputs": 3}])
def test_only_what_predicts_the_next_token_can_generate(given: dict[str, Any]):
    assert hasattr(make(), "make_caches")
    assert not hasattr(make(**given), "make_caches")


# Knobs


def test_dropout_is_in_training_alone():
    model = make(dropout=0.4)
    tokens = torch.randint(0, VOCAB, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
    torch.testing.assert_close(model(tokens), make().eval()(tokens))


@pytest.mark.parametrize(
    ("data", "changed", "keys"),
    [
        (DataSpec(vocab=9, context=9), {}, ["context"]),
        (DataSpec(shape=(1, 8, 8), outputs=2), {}, ["name"]),
        (DataSpec(vocab=9), {"tied_embeddings": True}, ["tied_embeddings"]),
        (
            DataSpec(vocab=9),
            {"tied_embeddings": True, "embedding_width": 6, "bidirectional": True},
            ["tied_embeddings"],
        ),
        (DataSpec(shape=(4,)), {"tied_embeddings": True, "context": 0}, ["name", "tied_embeddings", "context"]),
    ],
)
def test_knobs_that_do_not_fit_are_refused(data: DataSpec, changed: dict[str, Any], keys: list[str]):
    with pytest.raises(ConfigError) as caught:
        rnn(data, **KNOBS | changed)
    assert [m.key for m in caught.value.misfits] == keys


def test_embeddings_are_tied_for_logits_alone():
    rnn(DataSpec(vocab=9, outputs=2), **KNOBS | {"tied_embeddings": True})
    twice = KNOBS | {"tied_embeddings": True, "bidirectional": True, "embedding_width": 12}
    assert rnn(DataSpec(vocab=9), **twice)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 9)


@pytest.mark.parametrize(("name", "outputs"), list(itertools.product(CELLS, (0, 4))))
def test_presets_build_on_the_meta_device(name: str, outputs: int):
    knobs = preset(name)
    assert (knobs["cell"], knobs["context"]) == (name, 128)
    with torch.device("meta"):
        model = rnn(
            DataSpec(vocab=512, context=128, outputs=outputs, pad=0), **knobs | {"bidirectional": bool(outputs)}
        )
        shape = model(torch.zeros(2, 128, dtype=torch.long)).shape
        plain = rnn(DataSpec(vocab=512, context=128), **knobs)
    assert shape == ((2, 4) if outputs else (2, 128, 512))
    assert 0.8e6 < sum(p.numel() for p in plain.parameters()) < 1.2e6


@pytest.mark.parametrize("cell", CELLS)
def test_it_learns_to_say_what_it_heard(cell: str):
    torch.manual_seed(0)
    model = rnn(DataSpec(vocab=5, context=8), **KNOBS | {"cell": cell, "width": 24})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        tokens = torch.randint(0, 5, (32, 8))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # the token before: needs a memory
