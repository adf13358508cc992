"""Initial weights: their statistics, and that nothing is left as it was."""

import math

import pytest
import torch
from torch import nn
from toy import make_gpt

from llmtrain.init import gpt2

STD = 0.05


def filled(**knobs):
    """A model whose every parameter was not a number before the initialization."""
    model = make_gpt(vocab=500, width=128, heads=4, layers=3, context=64, **knobs)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    torch.manual_seed(3)
    gpt2(model, std=STD)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_each_parameter_is_drawn_as_gpt2_draws_it(tied, position, norm):
    model = filled(tied_embeddings=tied, position=position, norm=norm)
    residual = STD / math.sqrt(2 * 3)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(p == 0), name
        elif "norm" in name:
            assert torch.all(p == 1), name
        else:
            std = residual if name.endswith(("attention.out.weight", "ffn.down.weight")) else STD
            n = p.numel()
            assert abs(p.mean()) < 5 * std / math.sqrt(n), name  # five standard errors
            assert abs(p.std() - std) < 5 * std / math.sqrt(2 * n), name
            excess = ((p / std) ** 4).mean() - 3  # a normal distribution has none
            assert abs(excess) < 5 * math.sqrt(24 / n), name


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_branches_shrink_with_the_root_of_their_number(layers):
    model = make_gpt(width=256, heads=4, layers=layers)
    gpt2(model, std=STD)
    for block in model.blocks:
        for last in (block.attention.out, block.ffn.down):
            assert last.weight.std().item() == pytest.approx(STD / math.sqrt(2 * layers), rel=0.02)


def test_layers_of_other_models_are_drawn_too():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 300, bias=False), nn.RMSNorm(300))
    gpt2(model, std=STD)
    assert model[0].weight.std().item() == pytest.approx(STD, rel=0.1)
    assert model[1].weight.std().item() == pytest.approx(STD, rel=0.05)
    assert torch.all(model[2].weight == 1)


def test_the_seed_alone_decides():
    def weights(seed):
        torch.manual_seed(seed)
        model = make_gpt(seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_fresh_model_guesses_evenly():
    """With small weights the loss begins at ln(vocabulary)."""
    model = make_gpt(vocab=1000, layers=4, width=64, context=32)
    tokens, targets = torch.randint(0, 1000, (2, 8, 32))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(1000), rel=0.01)
