from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error

from llmtrain.knobs import ConfigError
from llmtrain.tasks import blank_targets, causal_lm, classification, masked_lm, regression
from llmtrain.tokenizer import bpe, byte, char
from llmtrain.types import DataSpec

TEXT = DataSpec(vocab=257, context=8)


def test_loss_perplexity_and_bits_per_byte() -> None:
    task = causal_lm(TEXT, byte([]))
    assert task.name == "causal_lm"
    got = task.metrics([30.0], 20, 15.0)
    assert got == {
        "loss": 1.5,
        "perplexity": pytest.approx(math.exp(1.5), rel=1e-15),
        "bits_per_byte": pytest.approx(30 / math.log(2) / 15, rel=1e-15),
    }


def test_bytes_are_those_of_the_targets_that_count() -> None:
    tokenizer = char(["aé漢🙂"])
    task = causal_lm(TEXT, tokenizer)
    targets = np.array([tokenizer.encode("aé漢🙂x"), [tokenizer.end, *tokenizer.encode("aaaa").tolist()]])
    everything = np.ones_like(targets, dtype=bool)
    assert task.weigh(targets, everything) == 1 + 2 + 3 + 4 + 0 + 0 + 4  # the unknown and the end have no bytes
    some = everything.copy()
    some[0, 1] = some[1, 4] = False
    assert task.weigh(targets, some) == 14 - 2 - 1


def test_metrics_of_nothing_and_of_too_much_are_numbers_all_the_same() -> None:
    task = causal_lm(TEXT, byte([]))
    nothing = task.metrics([0.0], 0, 0.0)
    assert (nothing["loss"], nothing["perplexity"]) == (0.0, 1.0)
    assert math.isnan(nothing["bits_per_byte"])
    assert task.metrics([1e6], 1, 1.0)["perplexity"] == math.exp(700)  # not an OverflowError
    assert math.isnan(task.metrics([math.nan], 2, 3.0)["loss"])


# -- masked language modelling --------------------------------------------------------------------------------


KNOBS = {"mask_rate": 0.15, "mask_share": 0.8, "random_share": 0.1, "whole_words": False}


def masked(tokenizer: Any = None, **knobs: Any) -> Any:
    tokenizer = tokenizer or byte([]).with_tokens(("mask",))
    return masked_lm(DataSpec(vocab=tokenizer.vocab, context=64), tokenizer, **(KNOBS | knobs)), tokenizer


def ask(task: Any, tokens: np.ndarray, keys: Any = None, mask: np.ndarray | None = None) -> Any:
    mask = np.ones_like(tokens, dtype=bool) if mask is None else mask
    return task.vary(tokens, np.zeros_like(tokens), mask, keys or [(1, 0, i) for i in range(len(tokens))])


def test_the_mask_follows_from_seed_epoch_and_sample_alone() -> None:
    task, _ = masked()
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    first = ask(task, tokens)
    for again, once in zip(ask(task, tokens), first, strict=True):
        assert np.array_equal(again, once)
    alone = ask(task, tokens[2:3], [(1, 0, 2)])
    assert np.array_equal(alone[0][0], first[0][2])  # whoever it shares a batch with
    for other in ([(1, 1, i) for i in range(4)], [(2, 0, i) for i in range(4)], [(1, 0, i + 9) for i in range(4)]):
        assert not np.array_equal(ask(task, tokens, other)[2], first[2])


def test_the_shares_are_those_of_the_knobs() -> None:
    task, tokenizer = masked(mask_rate=0.3, mask_share=0.5, random_share=0.2)
    tokens = np.random.default_rng(0).integers(0, 256, (2000, 64))
    kept = tokens.copy()
    hidden, targets, asked = ask(task, tokens)
    assert np.array_equal(tokens, kept)  # the data itself is left alone
    assert np.array_equal(targets, tokens)
    assert asked.mean() == pytest.approx(0.3, abs=0.005)
    assert np.array_equal(hidden[~asked], tokens[~asked])
    fates = hidden[asked]
    assert (fates == tokenizer.mask).mean() == pytest.approx(0.5 + 0.2 / tokenizer.vocab, abs=0.01)
    assert (fates == tokens[asked]).mean() == pytest.approx(0.3, abs=0.01)
    changed = fates[(fates != tokenizer.mask) & (fates != tokens[asked])]
    assert len(np.unique(changed)) > 250  # random ones come from the whole vocabulary


def test_special_tokens_and_what_does_not_count_are_never_asked_for() -> None:
    task, tokenizer = masked(mask_rate=0.9)
    tokens = np.full((50, 64), 7)
    tokens[:, ::2] = tokenizer.end
    mask = np.ones_like(tokens, dtype=bool)
    mask[:, 40:] = False
    _, _, asked = ask(task, tokens, mask=mask)
    assert not asked[:, ::2].any() and not asked[:, 40:].any()
    assert asked[:, 1:40:2].mean() > 0.8


def test_at_least_one_token_is_asked_for_wherever_there_is_one() -> None:
    task, tokenizer = masked(mask_rate=0.001)
    _, _, asked = ask(task, np.full((40, 64), 7))
    assert (asked.sum(1) >= 1).all() and asked.sum() < 60
    _, _, none = ask(task, np.full((2, 64), tokenizer.end))
    assert not none.any()


def test_whole_words_are_hidden_together() -> None:
    text = "def snake_case(words, more): return  'déjà vu' + words" * 4
    tokenizer = bpe([text], vocab_size=270, min_frequency=2, train_bytes=10**6).with_tokens(("mask",))
    task, _ = masked(tokenizer, whole_words=True, mask_rate=0.3)
    tokens = np.tile(tokenizer.encode(text), (200, 1))
    _, _, asked = ask(task, tokens)
    ends = np.cumsum([len(tokenizer.decode([t])) if tokenizer.decode([t]) != "�" else 0 for t in tokens[0]])
    word, parts = 0, {0: [0]}
    begins, closes = tokenizer.word_parts()
    for i in range(1, len(tokens[0])):
        word += bool(begins[tokens[0, i]] or closes[tokens[0, i - 1]])
        parts.setdefault(word, []).append(i)
    assert any(len(part) > 1 for part in parts.values()) and ends[-1] <= len(text)
    for part in parts.values():
        assert (asked[:, part].all(1) == asked[:, part].any(1)).all()
    assert asked.mean() == pytest.approx(0.3, abs=0.05)
    apart = ask(masked(tokenizer, mask_rate=0.3)[0], tokens)[2]
    assert any((apart[:, part].any(1) != apart[:, part].all(1)).any() for part in parts.values() if len(part) > 1)


def test_words_begin_and_end_where_a_reader_sees_it() -> None:
    tokenizer = bpe(["the cat, the_cat 123x"] * 5, vocab_size=290, min_frequency=2, train_bytes=10**6)
    tokenizer = tokenizer.with_tokens(("mask",))
    begins, ends = tokenizer.word_parts()

    def token(text: str) -> int:
        return int(tokenizer.library.token_to_id(text))

    assert begins[token("Ġthe")] and not ends[token("Ġthe")]
    assert not begins[token("a")] and not ends[token("a")]
    assert begins[token(",")] and ends[token(",")]
    assert not begins[token("_")]
    assert begins[tokenizer.mask] and ends[tokenizer.mask] and begins[tokenizer.end]


def test_the_shares_must_fit_into_one() -> None:
    with pytest.raises(ConfigError, match=r"random_share=0\.3: and mask_share=0\.8 add up to more than 1"):
        masked(random_share=0.3)


# -- labels and numbers ---------------------------------------------------------------------------------------


def test_accuracy_and_loss_of_classes() -> None:
    task = classification(DataSpec(shape=(2,), outputs=3), None)
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    scores = task.score(outputs, torch.tensor([0, 1, 1]))
    assert scores[:, 1].tolist() == [1, 0, 1]
    expected = torch.nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 1]), reduction="none")
    torch.testing.assert_close(scores[:, 0], expected)
    metrics = task.metrics(scores.sum(0).tolist(), 3, 3.0)
    assert metrics == {"loss": pytest.approx(expected.mean().item()), "accuracy": pytest.approx(2 / 3)}
    assert task.words(metrics).endswith("accuracy 66.67%")


def test_errors_of_numbers_equal_scikit_learns() -> None:
    task = regression(DataSpec(shape=(2,), outputs=2), None)
    outputs, targets = torch.randn(20, 2), torch.randn(20, 2)
    metrics = task.metrics(task.score(outputs, targets).double().sum(0).tolist(), 20, 20.0)
    mse = mean_squared_error(targets, outputs)
    assert metrics == {
        "loss": pytest.approx(mse, rel=1e-6),
        "rmse": pytest.approx(math.sqrt(mse), rel=1e-6),
        "mae": pytest.approx(mean_absolute_error(targets, outputs), rel=1e-6),
    }
    assert blank_targets(task, DataSpec(shape=(2,), outputs=2), 3).shape == (3, 2)


@pytest.mark.parametrize("part", [causal_lm, lambda spec, t: masked_lm(spec, t, **KNOBS)])
def test_text_is_not_asked_of_labels(part: Any) -> None:
    with pytest.raises(ConfigError, match="asks for tokens of a text"):
        part(DataSpec(shape=(1, 8, 8), outputs=10), None)


@pytest.mark.parametrize("part", [classification, regression])
def test_labels_are_not_asked_of_text(part: Any) -> None:
    with pytest.raises(ConfigError, match="this data has none"):
        part(TEXT, None)
