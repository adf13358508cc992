"""Text from a model: against uncached logits, and the distributions that tokens are drawn from."""

import collections
import itertools
import math

import pytest
import torch
from made import byte, char
from toy import make_gpt

from llmtrain.config import Sample
from llmtrain.generate import generate, pick, tokens
from llmtrain.knobs import UserError
from llmtrain.tokenizer import Tokenizer

GREEDY = {"prompt": "", "tokens": 10, "temperature": 0.0, "top_k": None, "top_p": 1.0, "seed": 0}


def sample(**given):
    return Sample(**(GREEDY | given))


def likeliest(model, prompt, count):
    """Greedy tokens without a cache: all that is seen, run anew for each token; half of it kept when it is full."""
    window, made = list(prompt)[-model.context :], []
    for _ in range(count):
        if len(window) > model.context:
            window = window[-(model.context // 2) :]
        with torch.no_grad():
            made.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window.append(made[-1])
    return made


# Greedy


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4], list(range(8)), [5, 1] * 9])
def test_greedy_takes_the_likeliest_token_of_uncached_logits(position, prompt):
    """Within the context, at its very end, and past it."""
    model = make_gpt(std=0.6, position=position, context=8, tied_embeddings=False).double().eval()
    made = list(tokens(model, prompt, sample(tokens=40)))
    assert made == likeliest(model, prompt, 40)
    assert len(set(made)) > 2  # not stuck at one token, which any mistake would give as well


def test_odd_and_tiny_contexts_go_on_too():
    for context in (1, 2, 3, 5):
        model = make_gpt(std=0.6, context=context).double().eval()
        made = list(tokens(model, [1], sample(tokens=12)))
        window = [1]
        for token in made:
            if len(window) > context:
                window = window[-max(context // 2, 1) :]
            with torch.no_grad():
                assert token == int(model(torch.tensor([window]))[0, -1].argmax())
            window.append(token)
        assert len(made) == 12


def test_each_token_is_computed_once(monkeypatch):
    """With the cache only the new token passes through the model, until the context is full."""
    model = make_gpt(context=8).eval()
    sizes = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(given[0].size(1)))
    list(tokens(model, [1, 2, 3], sample(tokens=12)))
    assert sizes == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]


def test_no_tokens_are_made_where_none_are_wanted():
    assert list(tokens(make_gpt(), [1], sample(tokens=0))) == []


def test_making_text_builds_no_graph():
    model = make_gpt().eval()
    with torch.enable_grad():
        list(tokens(model, [1], sample(tokens=3)))
        assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


# Drawing


def draw_many(logits, count=4000, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    settings = sample(**{"temperature": 1.0} | settings)
    return [pick(logits, settings, generator) for _ in range(count)]


def assert_drawn_from(made, probabilities):
    """Pearson's test at a chance of less than one in a million of being wrong; and nothing outside."""
    counts = collections.Counter(made)
    inside = [i for i, p in enumerate(probabilities) if p > 0]
    assert set(counts) <= set(inside)
    expected = {i: probabilities[i] * len(made) for i in inside}
    assert min(expected.values()) > 5
    statistic = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    freedom = len(inside) - 1
    bound = freedom * (1 - 2 / (9 * max(freedom, 1)) + 4.75 * math.sqrt(2 / (9 * max(freedom, 1)))) ** 3
    assert statistic < bound + 1e-9  # Wilson & Hilferty's quantile at 4.75 standard deviations


LOGITS = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.9, -1.5])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature):
    expected = (LOGITS.double() / temperature).softmax(0).tolist()
    assert_drawn_from(draw_many(LOGITS, temperature=temperature), expected)


def test_the_bound_tells_distributions_apart():
    with pytest.raises(AssertionError):
        assert_drawn_from(draw_many(LOGITS, temperature=1.0), (LOGITS.double() / 1.3).softmax(0).tolist())


def test_temperature_zero_is_the_likeliest_and_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    assert [pick(LOGITS, sample(temperature=0.0), generator) for _ in range(5)] == [3] * 5
    assert torch.equal(generator.get_state(), state)


def test_top_k_keeps_the_likeliest():
    for k, kept in ((1, [3]), (2, [3, 0]), (4, [3, 0, 4, 1])):
        weights = [math.exp(LOGITS[i]) if i in kept else 0.0 for i in range(6)]
        assert_drawn_from(draw_many(LOGITS, top_k=k), [w / sum(weights) for w in weights])
    for k in (6, 7, 1000):
        assert_drawn_from(draw_many(LOGITS, top_k=k), LOGITS.double().softmax(0).tolist())


def test_top_k_of_one_is_greedy():
    model = make_gpt(std=0.6).eval()
    greedy = list(tokens(model, [1, 2], sample(tokens=20)))
    assert list(tokens(model, [1, 2], sample(tokens=20, temperature=1.0, top_k=1))) == greedy


def test_top_p_keeps_the_smallest_set_that_is_likely_enough():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25])
    order = [1, 4, 2, 0, 3]  # the likeliest first: 0.4, 0.65, 0.85, 0.95, 1
    for top_p, size in (
        (0.01, 1),
        (0.39, 1),
        (0.41, 2),
        (0.64, 2),
        (0.66, 3),
        (0.84, 3),
        (0.86, 4),
        (0.96, 5),
        (1.0, 5),
    ):
        kept = order[:size]
        weights = [probabilities[i].item() if i in kept else 0.0 for i in range(5)]
        assert_drawn_from(draw_many(probabilities.log(), top_p=top_p, count=1500), [w / sum(weights) for w in weights])


def test_top_k_comes_before_top_p_and_temperature_before_both():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of the two likeliest 4/7 and 3/7 remain: 0.5 takes the first alone, 0.6 both
    assert set(draw_many(logits, top_k=2, top_p=0.5, count=300)) == {0}
    assert set(draw_many(logits, top_k=2, top_p=0.6, count=300)) == {0, 1}
    assert set(draw_many(logits, temperature=0.2, top_p=0.5, count=300)) == {0}  # 0.4^5 outweighs the others


def test_the_seed_decides():
    model = make_gpt(std=0.3).eval()

    def made(seed):
        return list(tokens(model, [1], sample(tokens=30, temperature=1.0, seed=seed)))

    assert made(1) == made(1)
    assert len({tuple(made(seed)) for seed in range(5)}) == 5


def test_drawing_leaves_the_random_numbers_of_training_alone():
    model = make_gpt(std=0.3).eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    list(tokens(model, [1], sample(tokens=5, temperature=1.0)))
    assert torch.equal(torch.rand(3), expected)


# Text


class Scripted(torch.nn.Module):
    """Says one token after the other, whatever it hears."""

    def __init__(self, vocab, script):
        super().__init__()
        self.vocab, self.script, self.context = vocab, script, 100
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.heard = []

    def make_caches(self, batch):
        self.heard = []
        return [type("Cache", (), {"length": 0})()]

    def forward(self, tokens, caches):
        self.heard += tokens[0].tolist()
        caches[0].length += tokens.size(1)
        logits = torch.zeros(1, tokens.size(1), self.vocab)
        logits[0, -1, self.script.pop(0)] = 1.0
        return logits


def test_text_comes_in_whole_characters():
    tokenizer = byte([])
    text = "aé漢🙂z"
    script = tokenizer.encode(text).tolist()
    assert len(script) == 1 + 2 + 3 + 4 + 1
    pieces = list(generate(Scripted(257, script), tokenizer, sample(prompt="x", tokens=11)))
    assert pieces == list(text)


def test_spaces_are_kept_between_pieces():
    tokenizer = char(["ab \n"])
    script = tokenizer.encode("a b\n a").tolist()
    assert "".join(generate(Scripted(tokenizer.vocab, script), tokenizer, sample(prompt="b", tokens=6))) == "a b\n a"


def test_the_prompt_is_heard_and_not_repeated():
    tokenizer = byte([])
    model = Scripted(257, tokenizer.encode("ok").tolist())
    assert "".join(generate(model, tokenizer, sample(prompt="Say: ", tokens=2))) == "ok"
    assert model.heard[:5] == tokenizer.encode("Say: ").tolist()


def test_it_stops_at_the_end_of_a_text():
    tokenizer = byte([])
    script = [*tokenizer.encode("ab").tolist(), tokenizer.end, *tokenizer.encode("cd").tolist()]
    assert "".join(generate(Scripted(257, script), tokenizer, sample(prompt="x", tokens=5))) == "ab"


def test_an_empty_prompt_begins_a_new_text():
    tokenizer = byte([])
    model = Scripted(257, tokenizer.encode("a").tolist())
    assert list(generate(model, tokenizer, sample(tokens=1))) == ["a"]
    assert model.heard == [tokenizer.end]


def test_an_empty_prompt_without_a_token_to_begin_with_is_refused():
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(UserError, match="prompt is empty"):
        list(generate(make_gpt(vocab=2), Tokenizer(library), sample()))


def test_text_of_a_real_model_is_that_of_its_tokens():
    tokenizer = char(["abcdefgh"])
    model = make_gpt(vocab=tokenizer.vocab).eval()
    unknown, total = tokenizer.library.token_to_id("<|unknown|>"), 0
    for seed in range(10):
        settings = sample(prompt="abc", tokens=30, temperature=1.0, top_k=8, seed=seed)
        made = tokens(model, tokenizer.encode("abc").tolist(), settings)
        visible = [t for t in itertools.takewhile(lambda token: token != tokenizer.end, made) if t != unknown]
        assert "".join(generate(model, tokenizer, settings)) == tokenizer.decode(visible)
        total += len(visible)
    assert total > 30


@pytest.mark.slow
def test_a_model_with_compiled_blocks_makes_the_same_text():
    """Its caches grow with each token; nothing may be compiled for each of their lengths."""
    from torch._dynamo.utils import counters

    settings = sample(tokens=20)
    model = make_gpt(std=0.6, context=32)
    expected = list(tokens(model.eval(), [1, 2, 3], settings))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True)
    batch = torch.randint(0, 11, (2, 32))
    model.train()(batch).sum().backward()
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    assert list(tokens(model.eval(), [1, 2, 3], settings)) == expected
    assert counters["stats"]["unique_graphs"] == compiled
    torch._dynamo.reset()
