"""Initial weights: their statistics, what they do to signals in deep and wide nets, and patterns."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import make_gpt, preset

from llmtrain.build import parts
from llmtrain.compose import config_folder
from llmtrain.init import gpt2
from llmtrain.knobs import ConfigError

STD = 0.05
OPTIONS = sorted(parts("init"))
DRAWN = [name for name in OPTIONS if name not in ("default", "zeros")]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d)
LAYERS = ["tokens", "conv", "rnn", "body", "body.first", "body.inner", "body.inner.deep", "body.last", "head"]


def initialize(name, model, seed=3, **knobs):
    """Draws with the values of the option's YAML file, but for those given."""
    values = preset(name, "init") | knobs
    torch.manual_seed(seed)
    parts("init")[name].load()(model, **values)
    return model


class Zoo(nn.Module):
    """One of each layer, nested, with a parameter of its own."""

    def __init__(self, tied=False):
        super().__init__()
        self.tokens = nn.Embedding(40, 16, padding_idx=2)
        self.conv = nn.Conv1d(16, 12, 3)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.rnn = nn.LSTM(12, 10, num_layers=2, proj_size=8, bidirectional=True)
        self.cell = nn.GRUCell(6, 10)
        self.attention = nn.MultiheadAttention(16, 2, add_bias_kv=True)
        inner = nn.ModuleDict({"deep": nn.Linear(16, 16), "norm": nn.RMSNorm(16)})
        self.body = nn.ModuleDict({"first": nn.Linear(10, 16), "inner": inner, "last": nn.Linear(16, 16)})
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.GroupNorm(2, 16), nn.BatchNorm1d(16)])
        self.gate = nn.Parameter(torch.full((3, 3), 7.0))
        self.head = nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def weights_of_torch(model):
    return {name: p for name, p in model.named_parameters() if name != "gate"}


def near(tensor, std, rel=0.0):
    """Mean zero and this standard deviation, within five standard errors of normal numbers."""
    n = tensor.numel()
    assert abs(tensor.mean()) < 5 * std / math.sqrt(n)
    assert abs(tensor.std() - std) < 5 * std / math.sqrt(2 * n) + rel * std


# What every option shares


def test_each_option_has_its_file_and_each_file_its_option():
    assert sorted(path.stem for path in (config_folder() / "init").glob("*.yaml")) == OPTIONS
    assert len(OPTIONS) == 13


@pytest.mark.parametrize(("name", "tied"), [(n, t) for n in DRAWN for t in (False, True) if not (n == "mup" and t)])
def test_nothing_is_left_as_it_was_but_what_is_not_torchs_own(name, tied):
    model = Zoo(tied)
    with torch.no_grad():
        for p in weights_of_torch(model).values():
            p.fill_(math.nan)
    initialize(name, model)
    for key, p in weights_of_torch(model).items():
        module = model.get_submodule(key.rpartition(".")[0])
        if "bias" in key:
            assert torch.all(p == 0), key
        elif isinstance(module, NORMS):
            assert torch.all(p == 1), key
        elif (name, key) == ("mup", "head.weight"):
            assert torch.all(p == 0)
        else:
            assert torch.isfinite(p).all() and p.std() > 0, key
    assert torch.all(model.tokens.weight[2] == 0) and torch.all(model.tokens.weight[3] != 0)
    assert torch.all(model.gate == 7)


@pytest.mark.parametrize("name", DRAWN)
def test_the_seed_alone_decides(name):
    def drawn(seed):
        return torch.cat([p.detach().flatten() for p in initialize(name, Zoo(), seed).parameters()])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_default_leaves_every_bit():
    model = Zoo()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    before = deepcopy(model.state_dict())
    initialize("default", model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tied_weights_are_drawn_once():
    tied, alone = Zoo(tied=True), Zoo()
    alone.head = nn.Identity()
    initialize("normal", tied)
    after_tied = torch.rand(1)
    initialize("normal", alone)
    assert torch.equal(torch.rand(1), after_tied)
    assert all(torch.equal(p, dict(tied.named_parameters())[key]) for key, p in alone.named_parameters())


@pytest.mark.parametrize("name", [*DRAWN, "default"])
def test_on_the_meta_device_nothing_is_drawn_and_patterns_are_checked(name):
    with torch.device("meta"):
        model = Zoo()
    patterns = {"body": {"name": "orthogonal", "gain": 1.0}}
    before, written = torch.get_rng_state(), [p._version for p in model.parameters()]
    parts("init")[name].load()(model, **preset(name, "init") | {"patterns": patterns})
    assert torch.equal(torch.get_rng_state(), before)
    assert [p._version for p in model.parameters()] == written
    with pytest.raises(ConfigError, match="matches no layer"):
        initialize(name, model, patterns={"bodi": patterns["body"]})


@pytest.mark.parametrize("name", [n for n in OPTIONS if "embedding_std" in parts("init")[n].knobs])
def test_embeddings_can_be_treated_apart(name):
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.Linear(64, 500))
    near(initialize(name, model, embedding_std=0.3)[0].weight, 0.3)
    other = initialize(name, deepcopy(model), embedding_std=None)[0].weight
    assert abs(other.std().item() - 0.3) > 0.1


# How each option draws a matrix: bit for bit as torch's own functions do with the same seed

HE = {"fan": "in", "activation": "relu", "slope": 0.2}
SAME = {
    "normal": ({"std": 0.03}, lambda w: nn.init.normal_(w, std=0.03)),
    "truncated_normal": ({"std": 0.03, "bound": 1.5}, lambda w: nn.init.trunc_normal_(w, 0, 0.03, -0.045, 0.045)),
    "uniform": ({"bound": 0.4}, lambda w: nn.init.uniform_(w, -0.4, 0.4)),
    "xavier_uniform": ({"gain": 1.7}, lambda w: nn.init.xavier_uniform_(w, 1.7)),
    "xavier_normal": ({"gain": 1.7}, lambda w: nn.init.xavier_normal_(w, 1.7)),
    "he_uniform": (HE, lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu")),
    "he_normal": (HE, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
    "orthogonal": ({"gain": 0.7}, lambda w: nn.init.orthogonal_(w, 0.7)),
    "gpt2": ({"std": 0.03}, lambda w: nn.init.normal_(w, std=0.03)),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("layer", [nn.Linear(40, 30), nn.Conv2d(6, 8, (3, 2)), nn.Conv1d(5, 9, 4)], ids=str)
def test_matrices_and_kernels_equal_torchs_own(name, layer):
    knobs, function = SAME[name]
    expected = torch.empty_like(layer.weight)
    torch.manual_seed(3)
    function(expected)
    assert torch.equal(initialize(name, deepcopy(layer), **knobs).weight, expected)


@pytest.mark.parametrize("fan", ["in", "out"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", "linear"])
@pytest.mark.parametrize("form", ["uniform", "normal"])
def test_he_equals_torchs_own_for_each_activation(form, activation, fan):
    layer, expected = nn.Linear(40, 30), torch.empty(30, 40)
    torch.manual_seed(3)
    function = getattr(nn.init, f"kaiming_{form}_")
    if activation in ("tanh", "sigmoid"):
        gain = {"tanh": 5 / 3, "sigmoid": 1.0}[activation]
        function(expected, mode=f"fan_{fan}", nonlinearity="linear").mul_(gain)
    else:
        function(expected, a=0.2, mode=f"fan_{fan}", nonlinearity=activation)
    initialize(f"he_{form}", layer, fan=fan, activation=activation, slope=0.2)
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize(("activation", "function"), [("gelu", nn.functional.gelu), ("silu", nn.functional.silu)])
def test_the_gain_of_smooth_activations_gives_back_unit_mean_square(activation, function):
    points, shares = np.polynomial.hermite_e.hermegauss(180)  # integrates over N(0, 1)
    squares = function(torch.tensor(points)).square().numpy()
    expected = 1 / math.sqrt((squares * shares).sum() / shares.sum())
    smooth = initialize("he_normal", nn.Linear(50, 60), fan="in", activation=activation).weight
    linear = initialize("he_normal", nn.Linear(50, 60), fan="in", activation="linear").weight
    torch.testing.assert_close(smooth, expected * linear)


@settings(max_examples=15, deadline=None)
@given(bound=st.floats(0.2, 4.0), std=st.floats(0.001, 2.0))
def test_truncated_normal_has_the_std_of_the_closed_form_and_no_tails(bound, std):
    weight = initialize("truncated_normal", nn.Linear(300, 300), std=std, bound=bound).weight
    density = math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(bound / math.sqrt(2))
    near(weight, std * math.sqrt(1 - 2 * bound * density / inside), rel=1e-4)
    assert weight.abs().max() <= bound * std * (1 + 1e-6)
    assert weight.abs().max() > 0.98 * min(bound, 3.0) * std


def test_grouped_and_transposed_kernels_know_what_enters_them():
    x = torch.randn(64, 32, 40)
    grouped = initialize("he_normal", nn.Conv1d(32, 64, 5, groups=8), fan="in", activation="linear")
    assert grouped(x).var().item() == pytest.approx(1, rel=0.15)
    y = torch.randn(64, 64, 36)
    backward = initialize("he_normal", grouped, fan="out", activation="linear").weight
    inner = nn.functional.conv_transpose1d(y, backward, groups=8)[..., 4:-4]  # gradients of the input, off its rim
    assert inner.var().item() == pytest.approx(1, rel=0.15)
    transposed = initialize("he_normal", nn.ConvTranspose1d(32, 48, 5), fan="in", activation="linear")
    assert transposed(x)[..., 4:-4].var().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_each_gate_of_a_recurrent_layer_is_orthogonal(kind, gates):
    model = initialize("orthogonal", kind(20, 20, num_layers=2, bidirectional=True), gain=1.5)
    for name, p in model.named_parameters():
        if "weight" in name and p.size(1) == 20:
            assert len(p) == 20 * gates
            for gate in p.split(20):
                torch.testing.assert_close(gate @ gate.T, 2.25 * torch.eye(20), atol=1e-5, rtol=1e-5)


def test_a_gate_is_scaled_by_its_own_size_not_by_that_of_the_stack():
    layer = initialize("xavier_normal", nn.LSTM(100, 300), gain=1.0)
    near(layer.weight_ih_l0, math.sqrt(2 / 400))
    near(layer.weight_hh_l0, math.sqrt(2 / 600))


# GPT-2


def filled(**knobs):
    """A model whose every parameter was not a number before the initialization."""
    model = make_gpt(vocab=500, width=128, heads=4, layers=3, context=64, **knobs)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    torch.manual_seed(3)
    gpt2(model, std=STD, patterns={})
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
            near(p, std)
            excess = ((p / std) ** 4).mean() - 3  # a normal distribution has none
            assert abs(excess) < 5 * math.sqrt(24 / p.numel()), name


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_draws_in_the_order_of_the_modules(tied):
    model = filled(tied_embeddings=tied)
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = STD / math.sqrt(getattr(module, "residual_branches", 1))
            assert torch.equal(module.weight, torch.empty_like(module.weight).normal_(0, std))


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_branches_shrink_with_the_root_of_their_number(layers):
    model = make_gpt(width=256, heads=4, layers=layers)
    gpt2(model, std=STD, patterns={})
    for block in model.blocks:
        for last in (block.attention.out, block.ffn.down):
            assert last.weight.std().item() == pytest.approx(STD / math.sqrt(2 * layers), rel=0.02)


def test_a_fresh_model_guesses_evenly():
    """With small weights the loss begins at ln(vocabulary)."""
    model = make_gpt(vocab=1000, layers=4, width=64, context=32)
    tokens, targets = torch.randint(0, 1000, (2, 8, 32))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(1000), rel=0.01)


# What initialization is for: signals keep their size


def through_fifty(name, function, **knobs):
    """Mean square of the signal after each of 50 layers of width 256, relative to that after the first."""
    torch.manual_seed(0)
    layers = initialize(name, nn.ModuleList([nn.Linear(256, 256) for _ in range(50)]), **knobs)
    x, sizes = torch.randn(256, 256), []
    with torch.no_grad():
        for layer in layers:
            x = function(layer(x))
            sizes.append(x.square().mean().item())
    return [size / sizes[0] for size in sizes]


@pytest.mark.parametrize("form", ["uniform", "normal"])
@pytest.mark.parametrize(
    ("scheme", "function", "knobs"),
    [
        ("he", torch.relu, {"fan": "in", "activation": "relu"}),
        ("he", nn.LeakyReLU(0.3), {"fan": "out", "activation": "leaky_relu", "slope": 0.3}),
        ("xavier", torch.tanh, {"gain": 5 / 3}),
        ("xavier", nn.Identity(), {"gain": 1.0}),
    ],
)
def test_the_right_scheme_carries_a_signal_through_fifty_layers(scheme, function, knobs, form):
    sizes = through_fifty(f"{scheme}_{form}", function, **knobs)
    assert min(sizes) > 1 / 8 and max(sizes) < 8


def test_the_wrong_one_loses_it():
    assert through_fifty("normal", torch.relu, std=0.02)[-1] < 1e-30
    assert through_fifty("normal", torch.relu, std=0.2)[-1] > 1e30
    assert through_fifty("xavier_normal", torch.relu, gain=1.0)[-1] < 1e-10
    assert through_fifty("he_normal", nn.Identity(), fan="in", activation="relu")[-1] > 1e10


def test_orthogonal_linear_layers_keep_every_length():
    layers = initialize("orthogonal", nn.Sequential(*[nn.Linear(64, 64) for _ in range(50)]).double(), gain=1.0)
    x = torch.randn(20, 64, dtype=torch.float64)
    torch.testing.assert_close(layers(x).norm(dim=1), x.norm(dim=1))


class Branch(nn.Module):
    """x + last(gelu(first(norm(x))))."""

    def __init__(self, width, depth):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.last.residual_branches = depth

    def forward(self, x):
        return x + self.last(nn.functional.gelu(self.first(self.norm(x))))


class Net(nn.Module):
    """A language model of such branches."""

    def __init__(self, width, depth, vocab=500):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Branch(width, depth) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)


def residual_net(name, depth=50, width=128, **knobs):
    return initialize(name, nn.Sequential(*[Branch(width, depth) for _ in range(depth)]), **knobs)


def test_the_residual_stream_grows_with_depth_unless_branches_are_scaled():
    x = torch.randn(64, 128)
    with torch.no_grad():
        plain, scaled = (residual_net(name, std=0.1)(x).var().item() for name in ("normal", "gpt2"))
        shallow = residual_net("gpt2", depth=2, std=0.1)(x).var().item()
    assert plain > 15
    assert scaled < 2
    assert scaled == pytest.approx(shallow, rel=0.1)  # whatever the depth


def test_zero_residual_blocks_pass_on_what_they_get():
    net, x = residual_net("zero_residual", std=0.1), torch.randn(8, 128)
    assert torch.equal(net(x), x)
    for block in net:
        near(block.first.weight, 0.1)
    net(x).square().sum().backward()
    assert all(block.last.weight.grad.abs().max() > 0 for block in net)  # and they can leave it

    model = initialize("zero_residual", make_gpt(layers=2, width=16), std=STD)
    passed = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, result: passed.append((given[0], result[0])))
    model(torch.randint(0, 11, (2, 8)))
    assert len(passed) == 2
    assert all(torch.equal(given, result) and given.std() > 0 for given, result in passed)


def test_zeros_leave_norms_at_one_and_all_else_at_zero():
    model = initialize("default", Zoo(), patterns={"*": {"name": "zeros"}})
    for key, p in weights_of_torch(model).items():
        norm = isinstance(model.get_submodule(key.rpartition(".")[0]), NORMS) and "bias" not in key
        assert torch.all(p == float(norm)), key
    assert torch.all(model.gate == 7)


def test_zeros_begin_no_model_of_several_layers_which_would_never_move():
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
    for model in (nn.Sequential(*layers), make_gpt()):
        with pytest.raises(ConfigError, match="name=zeros: lets no gradient through a model of several layers"):
            initialize("zeros", model)
    net = initialize("default", nn.Sequential(*layers), patterns={"*": {"name": "zeros"}})
    net(torch.ones(1, 3)).sum().backward()
    assert not any(net[i].weight.grad.any() for i in (0, 2))  # the reason
    alone = initialize("zeros", nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    assert not alone[0].weight.any() and alone[1].weight.all()


def test_an_output_layer_of_zeros_guesses_evenly_and_learns():
    """As a pattern, for what it is meant; the other weights are drawn as without it."""
    model, plain = (make_gpt(tied_embeddings=False) for _ in range(2))
    initialize("zero_residual", model, patterns={"output": {"name": "zeros"}})
    initialize("zero_residual", plain)
    logits = model(torch.randint(0, 11, (2, 8)))
    assert torch.all(logits == 0)
    logits.logsumexp(-1).sum().backward()
    assert model.output.linear.weight.grad.abs().max() > 0
    other = dict(plain.named_parameters())
    for key, p in model.named_parameters():
        assert torch.equal(p, other[key]) == (key != "output.linear.weight"), key
    with pytest.raises(ConfigError, match="matches no layer or weight"):
        initialize("zero_residual", make_gpt(), patterns={"output": {"name": "zeros"}})


# Maximal update parametrization

WIDTHS = [64, 128, 256, 512, 1024]


def coordinates(name, width, **knobs):
    """Root mean squares: of each hidden layer's outputs, of the output at the start, and after Adam at 1 / width."""
    net = nn.Sequential(
        *(nn.Linear(16, width, bias=False), nn.ReLU()),
        *(nn.Linear(width, width, bias=False), nn.ReLU()),
        *(nn.Linear(width, width, bias=False), nn.ReLU()),
        nn.Linear(width, 32, bias=False),
    )
    initialize(name, net, std=math.sqrt(2 / 64), **knobs)
    torch.manual_seed(0)
    x, targets = torch.randn(64, 16), torch.randint(0, 32, (64,))
    hidden, h = [], x
    for layer in net:
        h = layer(h)
        if isinstance(layer, nn.Linear):
            hidden.append(h.square().mean().sqrt().item())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.2 / width)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), targets).backward()
        optimizer.step()
    return hidden[:-1], hidden[-1], net(x).square().mean().sqrt().item()


@pytest.mark.parametrize("output", ["zero", "scaled"])
def test_mup_keeps_coordinates_at_their_size_for_all_widths(output):
    told = [coordinates("mup", width, base_width=64, output=output) for width in WIDTHS]
    for sizes in zip(*(hidden for hidden, _, _ in told), strict=True):
        assert max(sizes) < 1.5 * min(sizes)
    starts = [start for _, start, _ in told]
    if output == "zero":
        assert starts == [0] * len(WIDTHS)
    else:
        assert starts[0] / starts[-1] == pytest.approx(math.sqrt(1024 / 64), rel=0.3)
    ends = [end for _, _, end in told]
    assert max(ends) < 2 * min(ends)
    assert min(ends) > 0.1


def test_plain_normal_weights_do_not():
    told = [coordinates("normal", width) for width in WIDTHS]
    assert told[-1][0][-1] > 10 * told[0][0][-1]
    assert told[-1][2] > 10 * told[0][2]


def test_mup_scales_by_what_enters_a_layer():
    model = Net(width=64, depth=2)
    model.blocks[1].last = nn.Linear(256, 64)
    initialize("mup", model, std=STD, base_width=256, output="scaled")
    near(model.tokens.weight, STD)
    near(model.blocks[0].first.weight, STD * 2)
    near(model.blocks[0].last.weight, STD * 2)
    near(model.blocks[1].last.weight, STD)
    near(model.head.weight, STD * 4)


def test_mup_asks_for_an_output_layer_of_its_own():
    with pytest.raises(ConfigError, match="output layer of its own"):
        initialize("mup", make_gpt(tied_embeddings=True))
    with pytest.raises(ConfigError, match="output layer of its own"):
        initialize("mup", Zoo(tied=True))
    with pytest.raises(ConfigError, match="output layer of its own"):
        initialize("mup", nn.Sequential(nn.Embedding(5, 8), Branch(8, depth=1)))
    initialize("mup", make_gpt(tied_embeddings=False))


# Patterns

ORTHOGONAL = {"name": "orthogonal", "gain": 0.5}


def is_orthogonal(layer):
    weight = layer.weight
    return torch.allclose(weight @ weight.T, 0.25 * torch.eye(len(weight)), atol=1e-6)


def test_a_pattern_gives_layers_an_initialization_of_their_own():
    model = Net(width=16, depth=3)
    head = {"name": "uniform", "bound": 0.3}
    initialize("normal", model, patterns={"blocks.*.last": ORTHOGONAL, "head": head})
    for block in model.blocks:
        assert is_orthogonal(block.last)
        near(block.first.weight, 0.02)
    assert 0.25 < model.head.weight.abs().max() <= 0.3
    near(model.tokens.weight, 0.02)


@settings(max_examples=25, deadline=None)
@given(chosen=st.sets(st.sampled_from(LAYERS)))
def test_a_pattern_holds_for_all_inside_and_for_nothing_else(chosen):
    model = initialize("normal", Zoo(), std=1e-3, patterns={name: {"name": "uniform", "bound": 5.0} for name in chosen})
    for name, p in weights_of_torch(model).items():
        inside = any(name.startswith(place + ".") for place in chosen)
        if "weight" in name and p.dim() > 1:
            assert (p.abs().max() > 1) == inside, name
        else:
            assert torch.all((p == 0) | (p == 1) | (p.abs() < 0.01)), name


def test_the_last_match_counts():
    plain = {"name": "normal", "std": 1e-3}
    model = initialize("uniform", Zoo(), bound=9.0, patterns={"body.*": plain, "body.inner.deep": ORTHOGONAL})
    assert is_orthogonal(model.body["inner"]["deep"])
    near(model.body["last"].weight, 1e-3)
    model = initialize("uniform", Zoo(), bound=9.0, patterns={"body.inner.deep": ORTHOGONAL, "body": plain})
    near(model.body["inner"]["deep"].weight, 1e-3)


def test_a_pattern_can_name_weights_and_tied_layers():
    model = initialize("normal", nn.ModuleDict({"rnn": nn.GRU(8, 8)}), patterns={"rnn.weight_hh*": ORTHOGONAL})
    for gate in model["rnn"].weight_hh_l0.split(8):
        torch.testing.assert_close(gate @ gate.T, 0.25 * torch.eye(8))
    assert model["rnn"].weight_ih_l0.abs().max() < 0.1
    tied = initialize("normal", Zoo(tied=True), patterns={"head": {"name": "normal", "std": 3.0}})
    assert tied.tokens.weight.std() > 2


def test_default_within_a_pattern_keeps_and_within_default_patterns_draw():
    model = Zoo()
    before = model.head.weight.clone()
    initialize("normal", model, patterns={"head": {"name": "default"}})
    assert torch.equal(model.head.weight, before)
    model, kept = Zoo(), Zoo()
    kept.load_state_dict(model.state_dict())
    initialize("default", model, patterns={"body.last": {"name": "orthogonal", "gain": 0.5}})
    assert is_orthogonal(model.body["last"]) and torch.all(model.body["last"].bias == 0)
    for name, p in model.named_parameters():
        assert name.startswith("body.last") or torch.equal(p, dict(kept.named_parameters())[name]), name


def test_depth_and_output_are_known_within_a_pattern():
    model = Net(width=128, depth=16)
    mup = {"name": "mup", "std": STD, "base_width": 128, "output": "zero"}
    initialize("uniform", model, bound=1.0, patterns={"blocks": {"name": "gpt2", "std": STD}, "head": mup})
    near(model.blocks[3].last.weight, STD / 4)
    assert torch.all(model.head.weight == 0)
    initialize("uniform", model, bound=1.0, patterns={"blocks.*.first": mup | {"base_width": 512}})
    near(model.blocks[3].first.weight, STD * 2)


def told_of(patterns, model=None):
    with pytest.raises(ConfigError) as caught:
        initialize("normal", model or Zoo(), patterns=patterns)
    return {m.key: m for m in caught.value.misfits}


def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_names():
    model = make_gpt(layers=2)
    misfit = told_of({"blocks.*.ffn.dwon": ORTHOGONAL}, model)["patterns"]
    assert misfit.value == "blocks.*.ffn.dwon"
    assert "blocks.0.ffn.down" in misfit.rule and "blocks.1.ffn.down" in misfit.rule
    assert misfit.suggestion in ("blocks.0.ffn.down", "blocks.1.ffn.down")
    assert told_of({"": ORTHOGONAL}).keys() == told_of({7: ORTHOGONAL}).keys() == {"patterns"}


@pytest.mark.parametrize(
    ("section", "key", "rule"),
    [
        ({"name": "ortogonal", "gain": 0.5}, ".name", "no such part"),
        ({"gain": 0.5}, ".name", "must name a part"),
        ({"name": "orthogonal", "gain": -1.0}, ".gain", "number > 0"),
        ({"name": "orthogonal"}, ".gain", "has no value"),
        ({"name": "orthogonal", "gain": 1.0, "std": 0.1}, ".std", "no such knob"),
        ({"name": "os:system"}, ".name", "code from outside"),
        (0.5, "", "must be an initialization"),
    ],
)
def test_a_wrong_initialization_within_a_pattern_is_told(section, key, rule):
    model = Zoo()
    before = deepcopy(model.state_dict())
    key = "patterns.body.last" + key
    told = told_of({"head": ORTHOGONAL, "body.last": section}, model)
    assert told.keys() == {key}
    assert rule in told[key].rule
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # before anything


def test_all_that_is_wrong_with_patterns_is_told_together():
    told = told_of({"heda": ORTHOGONAL, "head": {"name": "normal", "std": 0}, "body": {"name": "he"}})
    assert told.keys() == {"patterns", "patterns.head.std", "patterns.body.name"}
