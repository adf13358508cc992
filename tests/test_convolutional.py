"""Convolutional networks: against transformers' ResNet and against plain functions, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy import preset

from llmtrain.knobs import ConfigError
from llmtrain.models.convolutional import cnn, textcnn
from llmtrain.types import DataSpec

SMALL: dict[str, Any] = {
    "channels": [4, 6],
    "blocks": [1, 2],
    "stride": [1, 2],
    "kernel": 3,
    "padding": None,
    "residual": False,
    "pooling": "none",
    "stem_channels": None,
    "stem_kernel": 5,
    "stem_stride": 2,
    "stem_pooling": "none",
    "norm": "none",
    "norm_eps": 0.1,
    "norm_momentum": 0.3,
    "norm_groups": 2,
    "activation": "relu",
    "final_pooling": 1,
    "dropout": 0.0,
}
DATA = DataSpec(shape=(3, 40, 33), outputs=5)
TEXT: dict[str, Any] = {
    "width": 6,
    "kernels": [1, 3, 4],
    "channels": 5,
    "activation": "tanh",
    "dropout": 0.0,
    "ngrams": [],
    "buckets": 1 << 20,
}


def normal(model: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """The model in float64, all its parameters drawn anew."""
    torch.manual_seed(0)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std)
    return model


def keys_of(call: Any, *args: Any, **knobs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **knobs)
    return [m.key for m in caught.value.misfits]


# ResNet


def test_resnet18_has_resnet18s_parameters():
    with torch.device("meta"):
        model = cnn(DataSpec(shape=(3, 224, 224), outputs=1000), **preset("resnet18"))
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512


def to_theirs(name: str) -> str:
    """Our name of a parameter or buffer of ResNet in the words of transformers."""
    if name.startswith("head."):
        return name.replace("head", "classifier.1")
    if name.startswith("stem."):
        layer = {"0": "convolution", "1": "normalization"}
        return f"resnet.embedder.embedder.{layer[name[5]]}.{name.split('.')[-1]}"
    _, stage, block, layer, *rest = name.split(".")
    place = f"resnet.encoder.stages.{stage}.layers.{block}"
    if layer == "shortcut":
        return f"{place}.shortcut.{('convolution', 'normalization')[int(rest[0])]}.{rest[1]}"
    kind = "convolution" if layer.startswith("conv") else "normalization"
    return f"{place}.layer.{int(layer[-1]) - 1}.{kind}.{rest[0]}"


def test_resnet_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[2, 2, 2, 2], layer_type="basic", num_labels=7
    )
    torch.manual_seed(0)
    theirs = transformers.ResNetForImageClassification(config).double()
    knobs = preset("resnet18") | {"stem_channels": 8, "channels": [8, 12, 16, 20]}
    ours = cnn(DataSpec(shape=(3, 48, 40), outputs=7), **knobs).double()
    state = theirs.state_dict()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    copied = {name: state[to_theirs(name)] for name in ours.state_dict()}
    assert len({to_theirs(name) for name in copied}) == len(state) == len(copied)
    ours.load_state_dict(copied)
    images = torch.randn(4, 3, 48, 40, dtype=torch.float64)
    got, expected = ours.train()(images), theirs.train()(images).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    got.square().sum().backward()
    expected.square().sum().backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, their_gradients[to_theirs(name)], atol=1e-8, rtol=1e-8, msg=name)
    with torch.no_grad():  # running averages, after that one step
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images).logits, atol=1e-9, rtol=1e-9)


# Plain networks


@pytest.mark.parametrize("norm", ["none", "batchnorm", "groupnorm"])
@pytest.mark.parametrize("pooling", ["none", "max", "avg"])
@pytest.mark.parametrize("stem", [None, 2])
def test_a_plain_network_equals_its_formula_and_gradients(norm: str, pooling: str, stem: int | None):
    pools = {"none": lambda x, *_, **__: x, "max": F.max_pool2d, "avg": F.avg_pool2d}
    knobs = {"norm": norm, "pooling": pooling, "stem_channels": stem, "stem_pooling": pooling, "activation": "silu"}
    model = normal(cnn(DATA, **SMALL | knobs | {"final_pooling": 2})).train()
    images = torch.randn(4, 3, 40, 33, dtype=torch.float64)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left = iter(weights)

    def block(x: torch.Tensor, stride: int, padding: int = 1) -> torch.Tensor:
        x = F.conv2d(x, next(left), next(left) if norm == "none" else None, stride, padding)
        if norm == "batchnorm":
            x = F.batch_norm(x, None, None, next(left), next(left), training=True, eps=0.1)
        elif norm == "groupnorm":
            x = F.group_norm(x, 2, next(left), next(left), eps=0.1)
        return F.silu(x)

    y = images
    if stem:
        y = pools[pooling](block(y, 2, 2), 3, stride=2, padding=1)
    y = pools[pooling](block(y, 1), 2)
    y = pools[pooling](block(block(y, 2), 1), 2)
    y = F.linear(F.adaptive_avg_pool2d(y, 2).flatten(1), next(left), next(left))
    got = model(images)
    torch.testing.assert_close(got, y, atol=1e-11, rtol=1e-10)
    got.square().sum().backward()
    y.square().sum().backward()
    for p, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.grad, expected.grad, atol=1e-9, rtol=1e-9)


def test_batchnorm_remembers_with_its_momentum():
    model = normal(cnn(DATA, **SMALL | {"norm": "batchnorm"}))
    images = torch.randn(4, 3, 40, 33, dtype=torch.float64)
    maps = model.blocks[0][0][0](images).transpose(0, 1).flatten(1)
    model(images)
    torch.testing.assert_close(model.blocks[0][0][1].running_mean, 0.3 * maps.mean(1))
    torch.testing.assert_close(model.blocks[0][0][1].running_var, 0.7 + 0.3 * maps.var(1))


def test_padding_grows_and_shrinks_the_maps():
    for padding, size in ((0, (38, 31)), (None, (40, 33)), (3, (44, 37))):
        model = cnn(DATA, **SMALL | {"padding": padding, "channels": [4], "blocks": [1], "stride": [1]})
        assert model.blocks[0](torch.zeros(1, 3, 40, 33)).shape[2:] == size


def test_dropout_is_before_the_head_and_in_training_alone():
    model = normal(cnn(DATA, **SMALL | {"dropout": 0.5}))
    images = torch.randn(4, 3, 40, 33, dtype=torch.float64)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        ({"blocks": [1], "stride": [1, 2, 3]}, ["blocks", "stride"]),
        ({"channels": [], "blocks": [], "stride": []}, ["channels"]),
        ({"residual": True, "kernel": 4}, ["padding"]),
        ({"residual": True, "padding": 0}, ["padding"]),
        ({"norm": "groupnorm", "norm_groups": 4}, ["norm_groups"]),
        ({"norm": "groupnorm", "stem_channels": 3}, ["norm_groups"]),
        ({"kernel": 35, "padding": 0}, ["kernel"]),
        ({"pooling": "max", "stride": [9, 9]}, ["pooling"]),
    ],
)
def test_knobs_that_do_not_fit_are_refused(changed: dict[str, Any], keys: list[str]):
    assert keys_of(cnn, DATA, **SMALL | changed) == keys


@pytest.mark.parametrize(
    "data", [DataSpec(vocab=9, outputs=2), DataSpec(shape=(4,), outputs=2), DataSpec(shape=(1, 8, 8))]
)
def test_only_images_with_an_answer_are_taken(data: DataSpec):
    assert keys_of(cnn, data, **SMALL) == ["name"]


def test_an_image_that_gets_too_small_is_told_with_its_shape():
    with pytest.raises(ConfigError, match="an image of 3 x 4 x 6 has shrunk to 1 x 1 there"):
        cnn(DataSpec(shape=(3, 4, 6), outputs=2), **preset("cnn_cifar"))


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("padding", [0, 1, None])
@pytest.mark.parametrize("size", [2, 5, 6])
def test_whatever_is_not_refused_runs(kernel: int, padding: int | None, size: int):
    """The sizes that are followed on paper are those of the maps."""
    knobs = SMALL | {"kernel": kernel, "padding": padding, "pooling": "max"}
    data = DataSpec(shape=(3, size, size), outputs=5)
    try:
        model = cnn(data, **knobs)
    except ConfigError:
        paper = cnn(DataSpec(shape=(3, 90, 90), outputs=5), **knobs)
        with pytest.raises(RuntimeError):
            paper(torch.zeros(1, 3, size, size))
    else:
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 5)


@pytest.mark.parametrize(("name", "shape"), [("cnn", (1, 8, 8)), ("cnn_cifar", (3, 32, 32)), ("resnet18", (1, 8, 8))])
def test_presets_build_on_the_meta_device(name: str, shape: tuple[int, ...]):
    with torch.device("meta"):
        assert cnn(DataSpec(shape=shape, outputs=10), **preset(name))(torch.zeros(2, *shape)).shape == (2, 10)


def test_the_small_preset_learns_where_a_bar_stands():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (128,), generator=draw)
    images = 0.3 * torch.randn(128, 1, 8, 8, generator=draw)
    images[torch.arange(128), 0, :, labels] += 1.0
    torch.manual_seed(0)
    model = cnn(DataSpec(shape=(1, 8, 8), outputs=8), **preset("cnn"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images[:96]), labels[:96]).backward()
        optimizer.step()
    right = model.eval()(images[96:]).argmax(1) == labels[96:]
    assert right.float().mean() > 0.9


# Windows of tokens


def by_hand(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """One text without padding, window by window; beyond its ends all is zero."""
    rows = [model.tokens.weight[t] for t in tokens]
    largest = []
    for conv in model.convs:
        size = conv.kernel_size[0]
        nothing = [torch.zeros(6, dtype=torch.float64)] * (size - 1)
        line = nothing + rows + nothing
        windows = [torch.stack(line[i : i + size], 1) for i in range(len(rows) + size - 1)]
        answers = [torch.tanh((conv.weight * window).sum((1, 2)) + conv.bias) for window in windows]
        largest.append(torch.stack(answers).amax(0))
    return model.head.weight @ torch.cat(largest) + model.head.bias


def row_of(phrase: tuple[int, ...], buckets: int) -> int:
    """Where the weights of a phrase stand."""
    found = 0
    for token in phrase:
        found = (found * 116049371 + token + 1) % (2**31 - 1)
    return found % buckets


def phrases_by_hand(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """One text without padding: the weights of its different phrases, added up."""
    table, (rows, outputs) = model.phrases.weights.weight, model.phrases.weights.weight.shape
    slices = (tokens[i : i + n] for n in model.phrases.lengths for i in range(len(tokens) - n + 1))
    found = {row_of(tuple(phrase), rows) for phrase in slices}
    return torch.stack([torch.zeros(outputs, dtype=table.dtype), *(table[row] for row in sorted(found))]).sum(0)


TEXTS = [[3], [1, 2], [4, 0, 2, 5, 8, 8, 1], [7, 7, 7, 6]]


@pytest.mark.parametrize("longest", [7, 12])
def test_textcnn_equals_its_formula_and_padding_changes_nothing(longest: int):
    model = normal(textcnn(DataSpec(vocab=9, context=longest, outputs=3, pad=0), **TEXT), std=1.0)
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    got, expected = model(tokens), torch.stack([by_hand(model, text) for text in TEXTS])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(got.square().sum(), parameters)
    for g, e in zip(ours, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(g, e, atol=1e-10, rtol=1e-9)


def test_textcnn_without_padding_takes_every_token():
    model = normal(textcnn(DataSpec(vocab=9, context=3, outputs=3), **TEXT), std=1.0)
    torch.testing.assert_close(model(torch.tensor([[2, 0, 0]]))[0], by_hand(model, [2, 0, 0]))


@pytest.mark.parametrize(("longest", "buckets"), [(7, 997), (12, 997), (7, 5)])
def test_phrases_count_once_each_and_end_with_their_text(longest: int, buckets: int):
    data = DataSpec(vocab=9, context=longest, outputs=3, pad=0)
    model = normal(textcnn(data, **TEXT | {"ngrams": [1, 2, 5], "buckets": buckets}), std=1.0)
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    got = model(tokens)
    expected = torch.stack([by_hand(model, text) + phrases_by_hand(model, text) for text in TEXTS])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    [ours] = torch.autograd.grad(got.square().sum(), [model.phrases.weights.weight])
    [theirs] = torch.autograd.grad(expected.square().sum(), [model.phrases.weights.weight])
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)
    assert ours.abs().sum() > 0


def test_phrases_of_a_text_without_padding_may_be_longer_than_it():
    data = DataSpec(vocab=9, context=3, outputs=3)
    model = normal(textcnn(data, **TEXT | {"ngrams": [2, 3, 4], "buckets": 997}), std=1.0)
    text = [2, 0, 2]
    expected = by_hand(model, text) + phrases_by_hand(model, text)
    torch.testing.assert_close(model(torch.tensor([text]))[0], expected)


def test_phrases_say_nothing_before_they_have_learned_and_different_ones_seldom_share_a_row():
    data = DataSpec(vocab=9, context=5, outputs=3, pad=0)
    torch.manual_seed(0)
    without = textcnn(data, **TEXT)
    torch.manual_seed(0)
    model = textcnn(data, **TEXT | {"ngrams": [1, 2, 3]})
    tokens = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 0, 0]])
    assert torch.equal(model(tokens), without(tokens))
    phrases = [(a, b, c) for a in range(20) for b in range(20) for c in range(20)]
    rows = {row_of(phrase, 1 << 20) for phrase in phrases}
    assert len(rows) > 0.985 * len(phrases)  # 8,000 drawn at random from 2^20 rows: 7,970 different ones


@pytest.mark.parametrize(
    ("data", "changed", "keys"),
    [
        (DataSpec(vocab=9), {}, ["name"]),
        (DataSpec(shape=(1, 8, 8), outputs=2), {"kernels": []}, ["name", "kernels"]),
    ],
)
def test_textcnn_refuses_what_does_not_fit(data: DataSpec, changed: dict[str, Any], keys: list[str]):
    assert keys_of(textcnn, data, **TEXT | changed) == keys


def test_textcnn_preset_builds_on_the_meta_device():
    with torch.device("meta"):
        model = textcnn(DataSpec(vocab=100, context=20, outputs=4, pad=0), **preset("textcnn"))
        assert model(torch.zeros(2, 20, dtype=torch.long)).shape == (2, 4)
