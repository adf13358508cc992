"""How training samples are varied: each operation against another implementation, and what must not change it."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from runs import llmtrain, outcome
from scipy import ndimage, stats
from torch import Tensor, nn
from toy import preset

from llmtrain.augment.draws import Draw, _mix
from llmtrain.augment.images import COLOURS, Images, image
from llmtrain.augment.mixing import Mixing, boxes
from llmtrain.augment.sheet import sheet, versions
from llmtrain.augment.tables import none, table
from llmtrain.augment.tokens import text
from llmtrain.build import choose
from llmtrain.data.loader import Loader
from llmtrain.data.rows import Rows
from llmtrain.knobs import ConfigError, UserError
from llmtrain.losses import bce, cross_entropy, mse
from llmtrain.run import summed
from llmtrain.topics import option_values, options
from llmtrain.types import Batch, DataSpec, Mixed

CPU = torch.device("cpu")
COLOUR = DataSpec(shape=(3, 32, 32), outputs=10)
GREY = DataSpec(shape=(1, 8, 8), outputs=10)
ROWS = DataSpec(shape=(6,), outputs=2)
LABELLED = DataSpec(vocab=50, context=12, outputs=3, pad=1)
STREAM = DataSpec(vocab=50, context=12)
PRESETS = [name for name in options("augment") if option_values("augment", name)["name"] == "image"]
REACHES = {"crop": 0.25, "rotate": 90.0, "scale": 0.5, "shear": 20.0, "blur": 1.0, "noise": 0.1, "erase": 0.3}
REACHES |= {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 120.0, "posterize": 3.0, "solarize": 0.5}
EVERYTHING = REACHES | {"flip": 0.5, "flip_vertical": 0.5, "mixup": 0.5, "cutmix": 0.5}


class Fixed(Draw):
    """Draws the numbers it is told, by name; everything else is drawn as ever."""

    def __init__(self, keys: Any, **told: Any):
        super().__init__(keys)
        self.told = {name.replace("_", " "): value for name, value in told.items()}

    def uniform(self, name: str, *shape: int) -> Tensor:
        drawn = super().uniform(name, *shape)
        return torch.as_tensor(self.told[name], dtype=torch.float32).expand_as(drawn) if name in self.told else drawn


def keys(count: int, seed: int = 0, epoch: int = 0) -> list[tuple[int, int, int]]:
    return [(seed, epoch, i) for i in range(count)]


def make(spec: DataSpec = COLOUR, option: str = "image", **knobs: Any) -> Images:
    return image(spec, **(preset(option, "augment") | knobs))


def pictures(count: int = 6, spec: DataSpec = COLOUR, dtype: torch.dtype = torch.float64) -> Tensor:
    """Smooth pictures, pixels from 0.1 to 0.9."""
    draw = np.random.default_rng(3)
    smooth = ndimage.gaussian_filter(draw.random((count, *spec.shape)), (0, 0, 1.5, 1.5), mode="wrap")
    low, high = smooth.min((1, 2, 3), keepdims=True), smooth.max((1, 2, 3), keepdims=True)
    return torch.from_numpy(0.1 + 0.8 * (smooth - low) / (high - low)).to(dtype)


def batch_of(inputs: Tensor, targets: Tensor | None = None) -> Batch:
    targets = torch.arange(len(inputs)) % 10 if targets is None else targets
    return Batch(inputs, targets, torch.ones(len(inputs), dtype=torch.bool))


def varied(spec: DataSpec, x: Tensor, told: dict[str, Any], **knobs: Any) -> Tensor:
    return make(spec, **knobs).vary(x, Fixed(keys(len(x)), **told))


# -- draws ----------------------------------------------------------------------------------------------------


def test_the_bits_are_those_of_splitmix64():
    state, gap = 1234567, 0x9E3779B97F4A7C15
    signed = [((state + n * gap) % 2**64 + 2**63) % 2**64 - 2**63 for n in (1, 2, 3)]
    found = [bits % 2**64 for bits in _mix(torch.tensor(signed)).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # its authors' test values


def test_numbers_are_spread_as_they_should_and_differ_by_key_and_name():
    draw = Draw(keys(200), CPU)
    numbers = draw.uniform("a", 100)
    assert numbers.shape == (200, 100) and numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 0.01
    assert stats.kstest(draw.normal("a", 50).flatten(), "norm").pvalue > 0.01
    others = [
        draw.uniform("b", 100),
        Draw(keys(200, seed=1)).uniform("a", 100),
        Draw(keys(200, 0, 1)).uniform("a", 100),
    ]
    for other in (*others, numbers.roll(1, 0), numbers.roll(1, 1)):
        assert abs(np.corrcoef(numbers.flatten(), other.flatten())[0, 1]) < 0.03
    assert torch.equal(Draw(keys(200)[50:60]).uniform("a", 100), numbers[50:60])  # of a sample, not of a batch
    assert torch.equal(draw.uniform("a", 7), numbers[:, :7])


# -- each operation against another implementation -------------------------------------------------------------


@pytest.mark.parametrize("spec", [COLOUR, GREY, DataSpec(shape=(2, 6, 9), outputs=2)])
def test_flips_are_those_of_torch(spec: DataSpec):
    x = pictures(spec=spec)
    for flips, dims in (
        ({"flip": 1.0}, (-1,)),
        ({"flip_vertical": 1.0}, (-2,)),
        ({"flip": 1.0, "flip_vertical": 1.0}, (-2, -1)),
    ):
        torch.testing.assert_close(varied(spec, x, {}, **flips), x.flip(dims), atol=1e-12, rtol=0)


@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_quarter_turns_are_those_of_torch(quarters: int):
    x = pictures()
    level = 0.0 if quarters < 0 else 1 - 2**-24
    found = varied(COLOUR, x, {"rotate": level}, rotate=90.0 * abs(quarters))
    torch.testing.assert_close(found, torch.rot90(x, quarters, (-2, -1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 10, 16)])
@pytest.mark.parametrize(
    "knobs", [{"rotate": 40.0}, {"scale": 0.5}, {"shear": 30.0}, {"rotate": 30.0, "shear": 10.0, "scale": 0.2}]
)
@pytest.mark.parametrize("level", [0.125, 0.8125])
def test_the_warp_is_that_of_scipy(shape: tuple[int, ...], knobs: dict[str, float], level: float):
    spec = DataSpec(shape=shape, outputs=2)
    x = pictures(2, spec)
    signed = 2 * level - 1
    turn, slant = np.radians(knobs.get("rotate", 0) * signed), np.tan(np.radians(knobs.get("shear", 0) * signed))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.array([[1, slant], [0, 1]]) / (1 + knobs.get("scale", 0)) ** signed
    matrix = matrix[::-1, ::-1]  # rows before columns
    middle = (np.array(shape[1:]) - 1) / 2
    offset = middle - matrix @ middle
    found = varied(spec, x, dict.fromkeys(knobs, level), **knobs)
    for picture, got in itertools.product(range(2), range(shape[0])):
        args = {"offset": offset, "order": 1, "mode": "grid-constant", "cval": 0.0}
        want = ndimage.affine_transform(x[picture, got].numpy(), matrix, **args)
        np.testing.assert_allclose(found[picture, got], want, atol=1e-5)


def test_a_crop_is_a_window_of_the_padded_image():
    x = pictures(400)
    found = make(crop=0.125).vary(x, Draw(keys(400)))
    padded = F.pad(x, (4, 4, 4, 4))
    windows = {(i, j): padded[:, :, i : i + 32, j : j + 32] for i in range(9) for j in range(9)}
    apart = torch.stack([(found - window).abs().amax((1, 2, 3)) for window in windows.values()])
    assert apart.amin(0).max() < 1e-6
    offsets = np.array(list(windows))[apart.argmin(0)]
    for axis in (0, 1):
        assert stats.chisquare(np.bincount(offsets[:, axis], minlength=9)).pvalue > 0.001  # each shift alike


def as_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


@pytest.mark.parametrize("level", [0.1, 0.31, 0.71, 0.95])
@pytest.mark.parametrize(
    ("name", "reach", "other"),
    [
        ("brightness", 0.9, lambda picture, by: ImageEnhance.Brightness(picture).enhance(1 + by)),
        ("contrast", 0.9, lambda picture, by: ImageEnhance.Contrast(picture).enhance(1 + by)),
        ("saturation", 0.9, lambda picture, by: ImageEnhance.Color(picture).enhance(1 + by)),
        ("posterize", 6.0, lambda picture, by: ImageOps.posterize(picture, 8 - round(abs(by)))),
        ("solarize", 1.0, lambda picture, by: ImageOps.solarize(picture, 255 * (1 - abs(by)))),
    ],
)
def test_colours_are_those_of_pillow(name: str, reach: float, other: Any, level: float):
    x = (pictures(3) * 255).round() / 255
    found = varied(COLOUR, x, {name: level}, **{name: reach})
    for picture, got in zip(x, found, strict=True):
        want = np.asarray(other(as_pil(picture), reach * (2 * level - 1))) / 255
        np.testing.assert_allclose(got.permute(1, 2, 0), want, atol=1.6 / 255)
    assert (found - x).abs().max() > 0.01


def test_hue_turns_colours_about_grey():
    x = pictures(2)
    torch.testing.assert_close(COLOURS["hue"](x, torch.tensor(120.0)), x.roll(1, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(COLOURS["hue"](x, torch.tensor(-120.0)), x.roll(-1, 1), atol=1e-6, rtol=0)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    turned = COLOURS["hue"](red, torch.tensor(30.0)).flatten()
    axis = torch.ones(3) / 3**0.5
    want = red.flatten() * np.cos(np.pi / 6) + torch.linalg.cross(axis, red.flatten()) * np.sin(np.pi / 6)
    torch.testing.assert_close(turned, want + axis * axis[0] * (1 - np.cos(np.pi / 6)))


def test_colours_of_other_pixels_are_refused():
    rows = Rows(pictures().numpy() * 4 - 2, np.arange(6))
    with pytest.raises(UserError, match=r"from -1.* to 1.*: brightness, hue$"):
        make(brightness=0.1, hue=10.0, crop=0.1).check(rows)
    make(crop=0.1).check(rows)
    make(brightness=0.1).check(Rows(pictures().numpy(), np.arange(6)))


@pytest.mark.parametrize("level", [0.0, 0.3, 0.9])
def test_blur_is_that_of_scipy(level: float):
    x, most = pictures(2), 1.5
    found = varied(COLOUR, x, {"blur": level, "blur comes": 0.0}, blur=most)
    want = ndimage.gaussian_filter(x.numpy(), most * abs(2 * level - 1), mode="nearest", axes=(2, 3), radius=5)
    np.testing.assert_allclose(found, want, atol=1e-7)


def test_noise_has_its_deviation():
    x = pictures(4)
    grain = varied(COLOUR, x, {"noise": 0.0, "noise comes": 0.0}, noise=0.2) - x
    assert stats.kstest(grain.flatten() / 0.2, "norm").pvalue > 0.01
    half = varied(COLOUR, x, {"noise": 0.25, "noise comes": 0.0}, noise=0.2) - x
    torch.testing.assert_close(half, grain / 2)


def test_a_rectangle_of_the_mean_is_erased():
    x = pictures(300)
    found = make(erase=0.25, erase_chance=1.0).vary(x, Draw(keys(300)))
    hidden = (found != x).all(1)
    for picture, got, gone in zip(x, found, hidden, strict=True):
        rows, columns = gone.any(1), gone.any(0)
        assert torch.equal(gone, rows[:, None] & columns[None])  # a rectangle
        assert all(line.int().diff().abs().sum() <= 2 for line in (rows, columns))
        want = picture.mean((1, 2))[:, None].expand(3, int(gone.sum()))
        torch.testing.assert_close(got[:, gone], want)
    assert hidden.float().mean((1, 2)).max() <= 0.25 * 1.1
    assert 0.05 < hidden.float().mean() < 0.125


def test_boxes_have_their_area():
    centre = torch.full((2, 2), 0.5)
    found = boxes(torch.tensor([0.25, 0.5]), torch.tensor([1.0, 2.0]), centre, 32, 32)
    assert found.sum((1, 2, 3)).tolist() == [256, 512]  # 16 x 16, and 16 rows of 32
    assert found[1, 0].any(1).sum() == 16
    edge = boxes(torch.tensor([0.25]), torch.tensor([1.0]), torch.zeros(1, 2), 32, 32)
    assert torch.equal(edge[0, 0].nonzero().amax(0), torch.tensor([7, 7]))


# -- chances and strength --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [COLOUR, GREY])
@pytest.mark.parametrize("option", PRESETS)
def test_presets_take_grey_and_coloured_images_and_stay_among_numbers(spec: DataSpec, option: str):
    x = pictures(64, spec, torch.float32)
    found = make(spec, option)(batch_of(x), keys(64))
    own = x[: len(found.inputs)]
    assert found.inputs.shape == own.shape and found.inputs.dtype == torch.float32
    assert found.inputs.isfinite().all() and found.inputs.min() > -0.5 and found.inputs.max() < 1.5
    changed = (found.inputs != own).flatten(1).any(1).float().mean()
    assert changed == 0 if option == "image" else changed > 0.4


@pytest.mark.parametrize("spec", [COLOUR, GREY])
@pytest.mark.parametrize("pick", [None, 3])
@pytest.mark.parametrize("amount", ["drawn", "full"])
def test_a_strength_of_nothing_changes_no_bit(spec: DataSpec, pick: int | None, amount: str):
    x = pictures(20, spec, torch.float32)
    made = make(spec, **EVERYTHING, strength=0.0, pick=pick, amount=amount)
    assert made(batch_of(x), keys(20)).inputs.equal(x)
    assert not make(spec, **EVERYTHING, pick=pick, amount=amount)(batch_of(x), keys(20)).inputs.equal(x[:-1])


def test_a_chance_of_nothing_changes_no_bit():
    x = pictures(50, dtype=torch.float32)
    chances = dict.fromkeys(
        [f"{n}_chance" for n in ("crop", "rotate", "affine", "colour", "blur", "noise", "erase")], 0.0
    )
    assert make(**REACHES, **chances).vary(x, Draw(keys(50))).equal(x)


@pytest.mark.parametrize("name", [*REACHES, "flip", "flip_vertical"])
def test_each_operation_comes_as_often_as_its_chance_and_leaves_the_others_as_they_are(name: str):
    chance = {"scale": "affine", "shear": "affine"} | dict.fromkeys(COLOURS, "colour")
    told = {name: 0.3} if name.startswith("flip") else {name: REACHES[name], f"{chance.get(name, name)}_chance": 0.3}
    x = pictures(1, dtype=torch.float32).expand(800, -1, -1, -1)
    comes = (make(**told).vary(x, Draw(keys(800))) != x).flatten(1).any(1)
    rare = {"crop": 80 / 81, "posterize": 5 / 6, "solarize": 0.8, "erase": 0.99}.get(name, 1.0)
    assert abs(comes.float().mean() - 0.3 * rare) < 0.06


def test_what_the_warp_passes_by_keeps_every_bit():
    spec = DataSpec(shape=(3, 7, 11), outputs=2)  # sides at which interpolation rounds
    x = pictures(400, spec, torch.float32)
    for chances in ({"rotate": 20.0, "rotate_chance": 0.3}, {"flip": 0.3}):
        same = (make(spec, **chances).vary(x, Draw(keys(400))) == x).flatten(1).all(1)
        assert abs(same.float().mean() - 0.7) < 0.08


def test_strength_multiplies_every_reach_and_what_has_none_by_its_chance():
    x = pictures(64)
    for name, reach in REACHES.items():
        half = make(**{name: reach / 2}).vary(x, Draw(keys(64)))
        torch.testing.assert_close(make(**{name: reach}, strength=0.5).vary(x, Draw(keys(64))), half)
    made = make(flip=0.4, flip_vertical=0.8, mixup=0.3, cutmix=0.2, strength=2.0)
    assert (made.flips, made.mixing.mixup) == ([0.8, 1.6], 0.6)
    assert made.mixing.cutmix == pytest.approx(0.4)
    assert make(mixup=0.6, cutmix=0.4, strength=5.0).mixing.cutmix == 0  # never more than all together


@pytest.mark.parametrize("pick", [1, 2, 13])
def test_as_many_operations_come_as_are_picked(pick: int):
    levels = make(**REACHES, pick=pick, amount="full").levels(Draw(keys(1300)))
    came = torch.stack([level[:, 0] for level in levels.values()])
    assert (came.abs().sum(0) == pick).all()
    assert stats.chisquare(came.abs().sum(1), np.full(13, 100 * pick)).pvalue > 0.001
    assert 0.4 < (came == 1).sum() / (came != 0).sum() < 0.6  # to either side
    drawn = make(**REACHES, pick=pick).levels(Draw(keys(1300)))["rotate"][:, 0]
    assert stats.kstest(drawn[drawn != 0], "uniform", (-1, 2)).pvalue > 0.001


def test_colours_do_not_count_among_the_operations_of_grey_images():
    assert {"saturation", "hue"} & make(GREY, **REACHES).operations.keys() == set()
    assert set(make(COLOUR, **REACHES).operations) == set(REACHES)


# -- mixing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha: float):
    x = torch.rand(3001, 1, 2, 2)
    found = Mixing(mixup=1.0, mixup_alpha=alpha)(batch_of(x), Draw(keys(3001)))
    assert isinstance(found, Mixed)
    assert stats.kstest(found.share, "beta", (alpha, alpha)).pvalue > 0.01
    some = Mixing(mixup=0.3)(batch_of(x), Draw(keys(3001)))
    assert isinstance(some, Mixed) and abs((some.share != 1).float().mean() - 0.3) < 0.03
    assert some.inputs[some.share == 1].equal(x[:-1][some.share == 1])


LOSSES = {
    "classes": partial(cross_entropy, temperature=1.0, label_smoothing=0.1, z_loss=0.0, class_weights=None),
    "answers": partial(bce, pos_weight=2.0),
    "numbers": partial(mse, output_weights=None),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_samples_and_losses_are_those_of_the_papers(kind: str, how: str):
    x, draw = pictures(9, GREY), torch.Generator().manual_seed(0)
    numbers = torch.rand(9, 10, generator=draw, dtype=torch.float64)
    targets = {"classes": torch.arange(9), "answers": (numbers > 0.5).double(), "numbers": numbers}[kind]
    found = make(GREY, **{how: 1.0})(Batch(x, targets, torch.arange(9) != 3), keys(9))
    assert isinstance(found, Mixed) and found.share.dtype == torch.float64
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    want = torch.zeros((), dtype=torch.float64)
    for i in range(8):
        share = found.share[i]
        if how == "mixup":
            torch.testing.assert_close(found.inputs[i], share * x[i] + (1 - share) * x[i + 1])
        else:
            own = found.inputs[i] == x[i]
            assert torch.where(own, x[i], x[i + 1]).equal(found.inputs[i])
            assert share == own.double().mean()
        outputs = model(found.inputs[i : i + 1])
        both = [LOSSES[kind](outputs, targets[j : j + 1])[0] for j in (i, i + 1)]
        want = want + (i != 3) * (share * both[0] + (1 - share) * both[1])
    assert (found.share < 1).sum() > 0
    parameters = list(model.parameters())
    got = summed(model, LOSSES[kind])(*found)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters))


def test_samples_that_are_not_mixed_are_summed_bit_for_bit_as_ever():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(7, 5), torch.arange(7) % 3
    mask = torch.arange(7) != 2
    loss = LOSSES["classes"]
    want = (loss(model(x), y) * mask).sum()
    assert summed(model, loss)(x, y, mask).equal(want)
    share = torch.ones(7)
    torch.testing.assert_close(summed(model, loss)(x, y, mask, y.roll(1), share), want)
    for given in ((x, y, mask), (x, y, mask, y.roll(1), share / 2)):  # one graph each, without a break
        compiled = torch.compile(summed(model, loss), fullgraph=True, dynamic=False, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), summed(model, loss)(*given))


# -- what does not matter -------------------------------------------------------------------------------------


def make_loader(augment: Any, **given: Any) -> Loader:
    draw = np.random.default_rng(0)
    rows = Rows(draw.random((37, 3, 8, 8)).astype(np.float32), draw.integers(0, 10, 37))
    plain: dict[str, Any] = {"batch_size": 12, "accumulate": 1, "seed": 4, "device": CPU}
    return Loader(rows, augment=augment, **(plain | given))


def joined(steps: list[Any]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*[micro for step in steps for micro in step.micro], strict=True)]


@pytest.mark.parametrize("mixes", [True, False])
def test_neither_micro_batches_nor_processes_nor_batch_size_nor_resuming_change_a_sample(mixes: bool):
    spec = DataSpec(shape=(3, 8, 8), outputs=10)
    made = make(spec, **(EVERYTHING if mixes else REACHES))
    whole = joined([make_loader(made).step(first) for first in range(0, 96, 12)])
    assert len(whole) == (5 if mixes else 3) and len(whole[0]) == 96
    ways = {
        "micro": [make_loader(made, accumulate=3).step(first) for first in range(0, 96, 12)],
        "processes": [make_loader(made, world=2, rank=r).step(first) for first in range(0, 96, 12) for r in (0, 1)],
        "size": [make_loader(made, batch_size=32).step(first) for first in range(0, 96, 32)],
        "pieces": [make_loader(made, batch_size=24, accumulate=4).step(first, 1) for first in range(0, 96, 6)],
    }
    for way, steps in ways.items():
        assert [a.equal(b) for a, b in zip(joined(steps), whole, strict=True)] == [True] * len(whole), way
        assert sum(step.targets for step in steps) == 96, way
    later = make_loader(made).step(60)  # by another loader, which saw nothing before
    assert joined([later])[0].equal(whole[0][60:72])
    plain = joined([make_loader(None).step(first) for first in range(0, 96, 12)])
    assert plain[1].equal(whole[1]) and plain[2].equal(whole[2])
    assert not joined([make_loader(made, seed=5).step(0)])[0].equal(whole[0][:12])


def test_samples_are_varied_anew_in_every_epoch():
    made = make(DataSpec(shape=(3, 8, 8), outputs=10), **REACHES)
    found = versions(made, make_loader(None).samples, [3, 5], 4, seed=4)
    assert len({some.tobytes() for some in found.reshape(-1, 3, 8, 8)}) == 2 * 5


def test_what_lies_beyond_the_limit_is_masked_and_not_counted():
    made = make(DataSpec(shape=(3, 8, 8), outputs=10), mixup=1.0)
    step = make_loader(made, limit=8).step(0)
    assert step.targets == int(step.micro[0][2].sum()) == 8
    assert make_loader(made, limit=12).step(0).targets == 12


# -- rows and texts -------------------------------------------------------------------------------------------


def test_rows_get_their_noise_and_partners():
    x = torch.randn(401, 6, dtype=torch.float64)
    batch = Batch(x, torch.randn(401, 2), torch.ones(401, dtype=torch.bool))
    knobs = preset("table", "augment")
    noisy = table(ROWS, **knobs | {"noise": 0.3})(batch, keys(401))
    assert stats.kstest((noisy.inputs - x).flatten() / 0.3, "norm").pvalue > 0.01
    assert table(ROWS, **knobs | {"strength": 0.0, "mixup": 1.0})(batch, keys(401)).inputs.equal(x)
    mixed = table(ROWS, **knobs | {"noise": 0.0, "mixup": 1.0})(batch, keys(401))
    assert isinstance(mixed, Mixed)
    share = mixed.share.unsqueeze(1)
    torch.testing.assert_close(mixed.inputs, share * x[:-1] + (1 - share) * x[1:])
    assert none(ROWS) is None


class WithMask:
    mask = 49


def texts(count: int = 500) -> Batch:
    """Pieces of 12 tokens from 2 to 48, the first a token to begin with, some filled up by token 1."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(2, 49, (count, 12))
    tokens[:, 0] = 0
    tokens[np.arange(12) >= draw.integers(4, 13, (count, 1))] = 1
    return Batch(torch.from_numpy(tokens), torch.arange(count) % 3, torch.ones(count, dtype=torch.bool))


def make_text(spec: DataSpec = LABELLED, **knobs: Any) -> Any:
    return text(spec, WithMask(), **(preset("text", "augment") | {"dropout": 0.0} | knobs))


def test_nothing_asked_nothing_changed():
    batch = texts()
    assert make_text()(batch, keys(500)).inputs.equal(batch.inputs)
    off = make_text(dropout=0.5, span=0.5, crop=0.5, strength=0.0)
    assert off(batch, keys(500)).inputs.equal(batch.inputs) and off.special_tokens == ()


@pytest.mark.parametrize("spec", [LABELLED, STREAM])
def test_dropped_tokens_are_hidden_as_often_as_they_should(spec: DataSpec):
    batch = texts() if spec is LABELLED else texts()._replace(inputs=torch.randint(0, 49, (500, 12)))
    made = make_text(spec, dropout=0.2, strength=1.5)
    found = made(batch, keys(500)).inputs
    may = (batch.inputs > 1) if spec is LABELLED else torch.ones_like(batch.inputs, dtype=torch.bool)
    assert made.special_tokens == ("mask",)
    assert found[~may].equal(batch.inputs[~may])
    assert abs((found[may] == 49).float().mean() - 0.3) < 0.03
    assert ((found == 49) | (found == batch.inputs)).all()
    other = make_text(spec, dropout=0.3, dropped="random")
    assert other.special_tokens == ()
    changed = other(batch, keys(500)).inputs
    assert (changed != batch.inputs)[found != 49].sum() == 0 and changed.max() < 50
    assert len(changed[(changed != batch.inputs)].unique()) > 40


def test_removed_tokens_leave_no_gap():
    batch = texts()
    hidden = make_text(dropout=0.4)(batch, keys(500)).inputs
    found = make_text(dropout=0.4, dropped="removed")(batch, keys(500)).inputs
    for before, after in zip(hidden.tolist(), found.tolist(), strict=True):
        left = [token for token in before if token not in (49, 1)]
        assert after == left + [1] * (12 - len(left))


def test_a_crop_is_a_window_of_the_sample():
    batch, lengths = texts(), []
    found = make_text(crop=0.5)(batch, keys(500)).inputs
    for before, after in zip(batch.inputs.tolist(), found.tolist(), strict=True):
        own, left = [[token for token in some if token > 1] for some in (before, after)]
        assert after == [0, *left] + [1] * (11 - len(left))
        assert any(own[i : i + len(left)] == left for i in range(len(own) + 1))
        lengths.append((len(own), len(own) - len(left)))
    cut = [gone for length, gone in lengths if length == 10]
    assert set(cut) == set(range(6))
    ends = [a[1] == b[1] for a, b in zip(batch.inputs.tolist(), found.tolist(), strict=True)]
    assert 0.2 < np.mean(ends) < 0.7  # from both ends


@pytest.mark.parametrize("length", [1, 4])
def test_spans_hide_their_share(length: int):
    batch = texts(2000)._replace(inputs=torch.randint(0, 49, (2000, 12)))
    hidden = make_text(STREAM, span=0.3, span_length=length)(batch, keys(2000)).inputs == 49
    assert (hidden.float().mean(0) - 0.3).abs().max() < 0.05  # at the ends as in the middle
    together = (hidden[:, 1:] & hidden[:, :-1]).sum() / hidden[:, :-1].sum()
    assert (
        abs(together - (2 * 0.3 - 1 + 0.7 ** ((length + 1) / length)) / 0.3) < 0.03
    )  # neither: 1 + length free starts


# -- misfits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "spec", "knobs", "misfits"),
    [
        ("light", ROWS, {}, {"name"}),
        ("light", STREAM, {}, {"name"}),
        ("text", GREY, {}, {"name"}),
        ("table", GREY, {}, {"name"}),
        ("table", STREAM, {}, {"name"}),
        ("image", GREY, {"flip": 1.1, "crop_chance": 2.0, "mixup": 3.0}, {"flip", "crop_chance", "mixup"}),
        ("image", GREY, {"mixup": 0.6, "cutmix": 0.6}, {"cutmix"}),
        ("image", GREY, {"shear": 50.0, "erase": 0.6, "strength": 2.0}, {"shear", "erase"}),
        ("image", GREY, {"crop": 0.1, "pick": 2}, {"pick"}),
        ("text", STREAM, {"dropped": "removed"}, {"dropped"}),
        ("text", STREAM, {"crop": 0.1}, {"crop"}),
        ("text", LABELLED, {"dropout": 0.4, "strength": 3.0}, {"dropout"}),
    ],
)
def test_what_does_not_fit_is_told(option: str, spec: DataSpec, knobs: dict[str, Any], misfits: set[str]):
    choice, wrong = choose("augment", option_values("augment", option) | knobs)
    assert choice is not None and wrong == []
    with pytest.raises(ConfigError) as told:
        choice.build(spec, None)
    assert {misfit.key for misfit in told.value.misfits} == misfits


# -- pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_samples_and_what_becomes_of_them(tmp_path: Path, channels: int):
    spec = DataSpec(shape=(channels, 8, 8), outputs=10)
    rows = Rows(pictures(10, spec, torch.float32).numpy(), np.arange(10))
    path = tmp_path / "sheet.png"
    found = sheet(make(spec, "light"), rows, [2, 7, 4], path, count=5, seed=9)
    assert found.shape == (3, 6, channels, 8, 8)
    assert np.array_equal(found[:, 0], rows.inputs[[2, 7, 4]])
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (6 * 68 - 4, 3 * 68 - 4)
        pixels = np.asarray(picture)
    for row, column in itertools.product(range(3), range(6)):
        shown = pixels[row * 68 : row * 68 + 64 : 8, column * 68 : column * 68 + 64 : 8].transpose(2, 0, 1)
        assert np.abs(shown - 255 * found[row, column].clip(0, 1)).max() <= 0.51
    mixed = versions(make(spec, "mixup"), rows, [2, 7], 1, seed=9)
    assert mixed.shape == (2, 2, channels, 8, 8)
    assert np.array_equal(versions(None, rows, [2], 2, seed=9)[0, 2], rows.inputs[2])


def test_a_sheet_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = Rows(np.zeros((4, 6), dtype=np.float32), np.arange(4))
    with pytest.raises(UserError, match="goes with images"):
        sheet(None, rows, [0], tmp_path / "a.png", count=1, seed=0)
    images = Rows(np.zeros((4, 1, 8, 8), dtype=np.float32), np.arange(4))
    with pytest.raises(UserError, match="cannot be written"):
        sheet(None, images, [0], tmp_path / "none" / "a.png", count=1, seed=0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"pip install 'llmtrain\[images\]'"):
        sheet(None, images, [0], tmp_path / "a.png", count=1, seed=0)


# -- whole runs -----------------------------------------------------------------------------------------------

RUN = ["model=mlp", "data=digits", "train.steps=6", "train.batch_size=32", "log.every=1", "log.tensorboard=false"]
RUN += ["checkpoint.every=3", "eval.every=3", "train.threads=1", "precision=fp32"]
MIXED = ["augment=light", "augment.mixup=0.5", "augment.cutmix=0.5", "augment.noise=0.1"]

DIES = """
import os, llmtrain.loop as loop
measure, seen = loop._measure, []
def dying(*given):
    seen.append(0)
    return os._exit(7) if len(seen) == 5 else measure(*given)
loop._measure = dying
"""


def go(folder: Path, name: str, *words: str, before: str = "") -> dict[str, Any]:
    given = [f"run.dir={folder / 'runs'}", f"run.cache={folder / 'cache'}", f"run.name={name}"]
    code, text = llmtrain(["train", *RUN, *given, *words], folder, before=before)
    assert code == (7 if before else 0), text
    found = outcome(folder / "runs" / name) if not before else {"metrics": []}
    told = ("step", "loss", "grad_norm", "val_loss", "weight_l2")  # not what a clock measures
    lines = [{key: line[key] for key in told if key in line} for line in found["metrics"]]
    return found | {"metrics": lines}


def test_a_run_that_was_cut_off_goes_on_bit_by_bit_and_its_evaluation_is_of_samples_as_they_are(tmp_path: Path):
    whole = go(tmp_path, "whole", *MIXED)
    go(tmp_path, "cut", *MIXED, before=DIES)
    cut = go(tmp_path, "cut", *MIXED, "resume=auto")
    assert cut["files"] == whole["files"] and cut["metrics"] == whole["metrics"]
    still = "optim.lr=1e-30"  # nothing is learned, so all that is measured on held-out data stays the same
    plain, calm = go(tmp_path, "plain", still), go(tmp_path, "calm", still, *MIXED)
    losses = [
        {key: [line[key] for line in run["metrics"] if key in line] for key in ("loss", "val_loss")}
        for run in (plain, calm)
    ]
    assert losses[0]["val_loss"] == losses[1]["val_loss"]
    assert not set(losses[0]["loss"]) & set(losses[1]["loss"])
