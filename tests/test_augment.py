"""The augmentations: what each script applies, in which order and how strongly, against tables typed by hand
from the papers and the authors' code; their pixels, as digests; how parameters are drawn, seen in the pixels.
"""
import importlib
import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import amoc
import byorl
from common import augment, data
from tests.scripts import SCRIPTS


def pictures(n=32, side=40):
    """Smooth coloured images, different ones: (n, 3, side, side) bytes."""
    column = torch.arange(side) / side
    row = column[:, None]
    i = torch.arange(n)[:, None, None, None]
    channel = torch.arange(3)[None, :, None, None]
    wave = torch.sin(0.9 * i + 2.1 * channel + 7 * row + (3 + 0.1 * i) * column)
    return (255 * (0.5 + 0.45 * wave)).byte()


def rng(n, *key):
    return data.Rng(key or (0, 0, 0), n, slice(None))


# ----------------------------------------------------------------------------------------------------------
# What the scripts apply
# ----------------------------------------------------------------------------------------------------------
def crop(low, high=1.0, filter="bilinear", size=32):
    """Torchvision's shapes of a crop, of low to high of the area; mirrored half of the time."""
    shape = dict(size=size, scale=(low, high), ratio=(3 / 4, 4 / 3))
    return ("random_resized_crop", dict(shape, flip=0.5, filter=filter))


def jitter(brightness, contrast, saturation, hue):
    factors = dict(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    return ("random_color_jitter", dict(factors, p=0.8))


def blur(p):
    return ("random_gaussian_blur", dict(sigma=(0.1, 2.0), p=p, kernel_size=13))


def solarize(p):
    return ("random_solarize", dict(p=p, threshold=0.5))


GREY = ("random_grayscale", dict(p=0.2))
FLIP = ("random_flip", dict(p=0.5))
PAD_CROP = ("random_pad_crop", dict(padding=4, mode="constant"))
MOCO = jitter(0.4, 0.4, 0.4, 0.1)
STRONG = [crop(0.2), MOCO, GREY]
WEAK = [PAD_CROP, FLIP]


def plain(script, *names, **flags):
    """How the views of a script are made; `flags` are named arguments of its `views`."""
    module = importlib.import_module(script)
    return lambda x, rng: {
        "amoc": lambda: [module.augment(x, rng, 32)],
        "rocl": lambda: [module.augment(x, rng, 32)],
        "acl": lambda: [module.augment(x, rng, 32)],
        "advcl": lambda: list(module.augment(x, rng, 32)),
        "clae": lambda: [module.augment(x, rng, 32)],
        "adco": lambda: in_order(*module.views(x, rng, 32, **flags)),
        "caco": lambda: module.views(x, rng, 32, **flags),
        "hardneg": lambda: [module.augment(x, rng, 32, **flags) for _ in range(2)],
        "byorl": lambda: [module.augment(x, rng, 32, p) for p in (0, 0.2)],
        "adv_mae": lambda: [module.augment(x, rng, 32)],
        "unified": lambda: [module.augment(x, rng, 32)],
        "adpe": lambda: list(module.augment(x, rng, 32, 0.3, 2).split(len(x))),
        "adios": lambda: [module.augment(x, rng, 32)],
        "rotnet": lambda: [module.augment(x, rng, 32, crop, 0.2) for crop in ("padded", "resized")],
        "pretext": lambda: [module.augment(x, rng, 32, 4, True)],
    }[script]()


def in_order(queries, keys):
    """The views of AdCo, each once, as they were made."""
    return [*queries, *(key for key in keys if not any(key is query for query in queries))]


SMALL_CROPS = [  # of AdCo's multi-crop: 224 192 160 128 96 pixels where the image has 224
    (round(32 * side / 224), low, high) for side, low, high in [
        (224, 0.2, 1.0), (192, 0.172, 0.86), (160, 0.143, 0.715), (128, 0.114, 0.571), (96, 0.086, 0.429)]]

AUGMENTATIONS = {  # the calls of each view in turn
    "amoc": (plain("amoc"), [[crop(0.2), MOCO, GREY, blur(0.5)]]),
    "rocl": (plain("rocl"), [[MOCO, GREY, crop(0.08)]]),  # the crop is last
    "acl": (plain("acl"), [[crop(0.1, filter="bicubic"), MOCO, GREY]]),
    "advcl": (plain("advcl"), [STRONG, STRONG, WEAK]),
    "clae": (plain("clae"), [[crop(0.08), jitter(0.8, 0.8, 0.8, 0.2), GREY]]),
    "adco": (plain("adco", symmetric=False, multi_crop=False, blur=False), 2 * [STRONG + [blur(0)]]),
    "adco, blurred": (plain("adco", symmetric=True, multi_crop=False, blur=True), 2 * [STRONG + [blur(0.5)]]),
    "adco, multi-crop": (
        plain("adco", symmetric=False, multi_crop=True, blur=True),
        [[crop(low, high, size=side), MOCO, GREY, blur(0.5)]
         for side, low, high in [*SMALL_CROPS, SMALL_CROPS[0]]]),
    "caco": (
        plain("caco", multi_crop=False, blur=False),
        [[crop(0.2), jitter(0.4, 0.4, 0.2, 0.1), GREY, blur(0), solarize(p)] for p in (0.0, 0.2)]),
    "caco, blurred": (
        plain("caco", multi_crop=False, blur=True),
        [[crop(0.2), jitter(0.4, 0.4, 0.2, 0.1), GREY, blur(b), solarize(p)]
         for b, p in ((1.0, 0.0), (0.1, 0.2))]),
    "caco, multi-crop": (
        plain("caco", multi_crop=True, blur=True),
        2 * [[crop(0.14), MOCO, GREY, blur(0.5), solarize(0)]]
        + 6 * [[crop(0.05, 0.14, size=round(32 * 96 / 224)), MOCO, GREY, blur(0.5), solarize(0)]]),
    "hardneg": (plain("hardneg", blur=False), 2 * [STRONG + [blur(0)]]),
    "hardneg, blurred": (plain("hardneg", blur=True), 2 * [STRONG + [blur(0.5)]]),
    "byorl": (
        plain("byorl"), [[crop(0.08), jitter(0.4, 0.4, 0.2, 0.1), GREY, solarize(p)] for p in (0, 0.2)]),
    "adv_mae": (plain("adv_mae"), [[crop(0.2, filter="bicubic")]]),
    "unified": (plain("unified"), [[crop(0.2, filter="bicubic"), MOCO, GREY]]),
    "adpe": (plain("adpe"), 2 * [[crop(0.3, filter="bicubic")]]),  # --crops 2 --min-scale 0.3
    "adios": (plain("adios"), [[crop(0.08), jitter(0.8, 0.8, 0.8, 0.2), GREY]]),
    "pretext": (plain("pretext"), [WEAK]),
    "rotnet": (plain("rotnet"), [[*WEAK, jitter(0.2, 0.2, 0.2, 0.05)], [crop(0.2), jitter(0.2, 0.2, 0.2, 0.05)]]),
}
every_augmentation = pytest.mark.parametrize("which", AUGMENTATIONS)


def same_numbers(given, wanted):
    """Equal up to rounding, number by number; some are pairs of numbers, or words."""
    return given.keys() == wanted.keys() and all(
        given[name] == (value if isinstance(value, str) else pytest.approx(value)) for name, value in wanted.items())


@pytest.fixture
def calls(monkeypatch):
    """The scripts' calls of augment.random_*: their name, the numbers they got, the pixels that came in and went out."""
    found = []

    def watch(name, function):
        def called(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            numbers = dict(bound.arguments)
            x = numbers.pop("x").clone()
            numbers.pop("rng")
            out = function(*args, **kwargs)
            found.append((name, numbers, x, out.clone()))
            return out

        for script in SCRIPTS:
            monkeypatch.setattr(importlib.import_module(script), name, called, raising=False)

    for name, function in list(vars(augment).items()):
        if name.startswith("random_") and callable(function):
            watch(name, function)
    return found


@every_augmentation
def test_a_view_is_made_by_these_calls_in_this_order(which, calls):
    make, table = AUGMENTATIONS[which]
    x = pictures()
    views = make(x, rng(len(x)))
    assert [name for name, *_ in calls] == [name for view in table for name, _ in view]
    assert len(views) == len(table)
    for view, wanted in zip(views, table):
        before = augment.resize(x, 32) if wanted[0] == PAD_CROP else x
        for name, numbers in wanted:
            _, given, came_in, went_out = calls.pop(0)
            assert same_numbers(given, numbers) if name != "random_resized_crop" else same_crop(given, numbers)
            assert torch.equal(augment.to_float(came_in), augment.to_float(before))
            before = went_out
        assert torch.equal(view, before)
        assert view.dtype == torch.float32 and view.min() >= -1e-6 and view.max() <= 1 + 1e-6


def same_crop(given, wanted):
    assert given["scale"] == pytest.approx(wanted["scale"])
    assert given["ratio"] == pytest.approx(wanted["ratio"])
    return all(given[name] == wanted[name] for name in ("size", "flip", "filter"))


@every_augmentation
def test_the_views_of_an_image_differ_and_have_numbers_of_their_own(which):
    """The same image 32 times: views differ between places in the batch, between draws, and between keys."""
    make, table = AUGMENTATIONS[which]
    x = pictures(1).expand(32, -1, -1, -1).contiguous()
    r = rng(32, 0, 0, 1)
    views = make(x, r) + make(x, r) + make(x, rng(32, 0, 0, 2))
    for side in {view.shape[-1] for view in views}:
        rows = torch.cat([view.flatten(1) for view in views if view.shape[-1] == side])
        share = 0.6 if which == "pretext" else 0.8  # of pad-4 crops, mirrored or not, there are 162
        assert len(rows.unique(dim=0)) > share * len(rows)


DIGESTS = {  # of the numbers that Rng((7, 3, 5)) draws
    "amoc": [0.503640, 0.342379, -0.039873],
    "rocl": [0.488105, 0.328718, 0.040406],
    "clae": [0.493339, 0.34244, -0.085813],
    "acl": [0.503568, 0.344025, -0.072870],
    "advcl": [0.479004, 0.325788, -0.014123],
    "adco": [0.498582, 0.333524, -0.049751],
    "adco, blurred": [0.498576, 0.331415, -0.014801],
    "adco, multi-crop": [0.480015, 0.313745, 0.052480],
    "caco": [0.459852, 0.296818, -0.084856],
    "caco, blurred": [0.460094, 0.294080, -0.070456],
    "caco, multi-crop": [0.491186, 0.325098, -0.051289],
    "hardneg": [0.498582, 0.333524, -0.049751],
    "hardneg, blurred": [0.498576, 0.331415, -0.014801],
    "byorl": [0.464694, 0.308221, 0.021565],
    "unified": [0.503499, 0.343959, -0.061492],
    "adv_mae": [0.498057, 0.349328, 0.007123],
    "adpe": [0.498075, 0.349348, 0.002343],
    "adios": [0.493339, 0.342440, -0.085813],
    "rotnet": [0.465810, 0.325967, 0.040189],
    "pretext": [0.437833, 0.306081, -0.004631],
}


def digest(views):
    """Of all views together: the mean pixel, the mean square, and a sum that knows places."""
    rows = torch.cat([view.double().flatten() for view in views])
    weight = torch.sin(torch.arange(len(rows), dtype=torch.float64))
    return [rows.mean().item(), rows.square().mean().item(), (rows * weight).sum().item() / len(rows) ** 0.5]


@every_augmentation
def test_the_pixels_of_given_numbers_are_always_the_same(which):
    make, _ = AUGMENTATIONS[which]
    x = pictures()
    assert digest(make(x, rng(len(x), 7, 3, 5))) == pytest.approx(DIGESTS[which], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------
# How parameters are drawn, seen in the pixels
# ----------------------------------------------------------------------------------------------------------
def even(values, low, high):
    """The numbers `values` are uniform in [low, high], by the greatest distance of their distribution."""
    u = ((values.double().sort().values - low) / (high - low)).flatten()
    n = len(u)
    assert u.min() > -1e-3 and u.max() < 1 + 1e-3
    assert u.min() < 20 / n and u.max() > 1 - 20 / n
    steps = (torch.arange(n) + 0.5) / n
    assert (u - steps).abs().max() < 2 / n**0.5  # passed by chance in all but 7 of 10,000 keys


@pytest.mark.parametrize("padding", [1, 2, 4])
@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_all_offsets_of_a_padded_crop_occur_equally_often(padding, mode):
    """A white pixel amid black ones tells where the window lay."""
    count = 2 * padding + 1
    n, side, middle = 200 * count**2, 13, 6
    x = torch.zeros(n, 1, side, side, dtype=torch.uint8)
    x[:, :, middle, middle] = 255
    out = augment.random_pad_crop(x, rng(n), padding, mode)
    assert out.shape == x.shape and out.dtype == torch.float32
    at = out[:, 0].flatten(1).argmax(1)
    assert (out.sum((1, 2, 3)) == 1).all()
    top = middle + padding - at // side
    left = middle + padding - at % side
    counts = (top * count + left).bincount(minlength=count**2)
    assert len(counts) == count**2 and (counts - 200).abs().max() < 5 * 200**0.5


def test_blur_has_a_sigma_of_its_own_for_each_image_throughout_its_range():
    """Of a blurred point the ratio of neighbours, exp(-1 / 2 sigma^2), tells sigma."""
    n = 4000
    x = torch.zeros(n, 3, 15, 15)
    x[:, :, 7, 7] = 1
    out = augment.random_gaussian_blur(x, rng(n), sigma=(0.3, 2.0), p=0.75, kernel_size=13)
    ratio = out[:, :, 7, 8] / out[:, :, 7, 7]
    blurred = ratio[:, 0] > 0
    assert abs(blurred.double().mean() - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5
    sigma = (-0.5 / ratio[blurred].log()) ** 0.5
    torch.testing.assert_close(sigma, sigma[:, :1].expand(-1, 3), rtol=1e-3, atol=0)
    vertical = (out[:, 0, 8, 7] / out[:, 0, 7, 7])[blurred]
    torch.testing.assert_close(vertical, ratio[blurred, 0], rtol=1e-3, atol=1e-7)
    even(sigma[:, 0], 0.3, 2.0)
    torch.testing.assert_close(out[~blurred], x[~blurred], rtol=0, atol=0)


@pytest.mark.parametrize("kernel_size", [1, 5, 13])
def test_blur_reaches_as_far_as_its_kernel_and_loses_no_light(kernel_size):
    x = torch.zeros(8, 3, 31, 31)
    x[:, :, 15, 15] = 1
    out = augment.random_gaussian_blur(x, rng(8), sigma=(5, 6), p=1, kernel_size=kernel_size)
    lit = (out[:, 0] > 0).any(0)
    assert lit.any(0).sum() == lit.any(1).sum() == kernel_size and lit.sum() == kernel_size**2
    torch.testing.assert_close(out.sum((2, 3)), torch.ones(8, 3))


def jittered(x, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, p=1.0):
    return augment.random_color_jitter(x, rng(len(x)), brightness, contrast, saturation, hue, p)


def test_brightness_multiplies_by_what_is_uniform_about_one():
    x = torch.full((4000, 3, 2, 2), 0.4)
    even(jittered(x, brightness=0.4)[:, 0, 0, 0] / 0.4, 0.6, 1.4)


def test_contrast_stretches_about_the_mean_grey_by_what_is_uniform_about_one():
    x = torch.full((4000, 3, 2, 2), 0.4)
    x[:, :, 0] = 0.6
    out = jittered(x, contrast=0.3)
    torch.testing.assert_close(out.mean((2, 3)), torch.full((4000, 3), 0.5), rtol=0, atol=1e-3)
    even((out[:, 0, 0, 0] - out[:, 0, 1, 0]) / 0.2, 0.7, 1.3)


def test_saturation_stretches_about_grey_by_what_is_uniform_about_one():
    x = torch.tensor([0.6, 0.4, 0.5]).view(1, 3, 1, 1).expand(4000, 3, 2, 2)
    out = jittered(x, saturation=0.2)
    even((out[:, 0, 0, 0] - out[:, 1, 0, 0]) / 0.2, 0.8, 1.2)


def test_hue_turns_by_what_is_uniform_about_nought():
    """Of 0.8 red the channel that appears tells the turn: a sixth of it to yellow, or to magenta."""
    x = torch.tensor([0.8, 0.0, 0.0]).view(1, 3, 1, 1).expand(4000, 3, 2, 2)
    _, green, blue = jittered(x, hue=0.1)[:, :, 0, 0].unbind(1)
    assert torch.minimum(green, blue).max() < 1e-6
    even((green - blue) / 0.8 / 6, -0.1, 0.1)


def test_jitter_of_probability_p_leaves_the_other_images_as_they_are():
    x = torch.full((4000, 3, 2, 2), 0.4)
    changed = (jittered(x, 0.4, 0.4, 0.4, 0.1, p=0.8) != x).flatten(1).any(1)
    assert abs(changed.double().mean() - 0.8) < 4 * (0.8 * 0.2 / 4000) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_a_flip_mirrors_a_share_p_left_to_right_and_nothing_else(p):
    n = 4000
    x = torch.randint(256, (n, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    out = augment.random_flip(augment.to_float(x), rng(n), p)
    mirrored = (out == augment.to_float(x.flip(3))).flatten(1).all(1)
    same = (out == augment.to_float(x)).flatten(1).all(1)
    assert (mirrored | same).all() and not (mirrored & same).any()
    assert abs(mirrored.double().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-9


def test_a_flip_is_of_half_of_the_images_unless_told_otherwise():
    x = augment.to_float(pictures(1000, 6))
    out = augment.random_flip(x, rng(1000))
    assert 0.43 < (out != x).flatten(1).any(1).double().mean() < 0.57


def test_solarize_inverts_from_half_up_and_grayscale_weighs_the_channels():
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(2000, 3, 2, 2)
    out = augment.random_solarize(x, rng(2000), 0.2)
    changed = (out != x).flatten(1).any(1)
    assert abs(changed.double().mean() - 0.2) < 4 * (0.2 * 0.8 / 2000) ** 0.5
    torch.testing.assert_close(out[changed][0, :, 0, 0], torch.tensor([0.2, 0.5, 0.1]))
    out = augment.random_grayscale(x, rng(2000), 0.3)
    changed = (out != x).flatten(1).any(1)
    assert abs(changed.double().mean() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    grey = 0.2989 * 0.2 + 0.587 * 0.5 + 0.114 * 0.9
    torch.testing.assert_close(out[changed][0, :, 0, 0], torch.full((3,), grey))


def test_two_draws_of_one_rng_differ_and_a_draw_of_an_equal_one_does_not():
    x = pictures()
    first, second = rng(len(x)), rng(len(x))
    a, b = (augment.random_resized_crop(x, first, 16, scale=(0.2, 1.0)) for _ in range(2))
    assert (a != b).flatten(1).any(1).all()
    assert torch.equal(a, augment.random_resized_crop(x, second, 16, scale=(0.2, 1.0)))


# ----------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------
SHAPES = [(50, 37), (37, 50), (20, 64), (64, 20), (24, 24), (23, 25), (90, 31), (16, 16), (101, 17), (12, 40)]


@pytest.mark.parametrize("side", [24, 16])
def test_a_folders_images_are_pils_bilinear_ones_and_of_them_the_central_square(side, tmp_path):
    """The shorter side becomes `side`, the longer follows; then as much is cut off left as right, or above as
    below; of an odd rest one more on the right, or below."""
    g = np.random.default_rng(0)
    (tmp_path / "train" / "a").mkdir(parents=True)
    wanted = []
    for number, (height, width) in enumerate(SHAPES):
        image = Image.fromarray(g.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / "train" / "a" / f"{number}.png")
        scale = side / min(height, width)
        scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        left = (scaled.width - side) // 2
        top = (scaled.height - side) // 2
        wanted.append(np.asarray(scaled)[top : top + side, left : left + side])
    found = data.load(str(tmp_path), size=side, workers=0)
    (x, y), = found.stream([torch.arange(len(SHAPES))])
    assert x.dtype == torch.uint8 and x.shape == (len(SHAPES), 3, side, side) and not y.any()
    for image, want in zip(x, wanted):
        assert (image.permute(1, 2, 0).numpy() == want).all()


class ToDevice(TorchDispatchMode):
    """The shapes of what is copied from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" != out.device.type:
            self.shapes.append(tuple(out.shape))
        return out


def test_the_parameters_of_an_augmentation_reach_the_device_in_one_copy():
    """Of each: crop and flip; jitter; grey; blur; solarize. The device is "meta", which computes nothing."""
    x = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="meta")
    rng = data.Rng((0, 0, 0), 64, slice(None))
    with ToDevice() as copies:
        view = byorl.augment(amoc.augment(x, rng, 24), rng, 24, 0.5)
    assert view.shape == (64, 3, 24, 24)
    assert [len(shape) for shape in copies.shapes] == [2] * (4 + 4)
    assert all(rows <= 12 and 0 < images <= 64 for rows, images in copies.shapes)


def test_whole_numbers_and_halves_are_the_same_on_the_device():
    columns = [torch.arange(5), torch.tensor([2**24 - 1] * 5), torch.rand(5), torch.tensor([True, False] * 2 + [True])]
    for given, there in zip(columns, augment.on_device("cpu", *columns), strict=True):
        assert there.dtype == torch.float32 and torch.equal(there, given.float())
        assert torch.equal(there.to(given.dtype), given)


@pytest.mark.parametrize("box", [
    (-1, 0, 4, 4), (0, -1, 4, 4), (5, 0, 4, 4), (0, 5, 4, 4), (0, 0, 0, 4), (0, 0, 4, 0), (0, 0, float("nan"), 4)])
def test_a_crop_that_leaves_its_image_or_is_empty_is_refused(box):
    x = torch.rand(2, 3, 8, 8)
    inside = torch.tensor([0.0, 0.0, 8.0, 8.0])
    top, left, height, width = torch.stack([inside, torch.tensor(box)], 1)
    with pytest.raises(ValueError, match="resized_crop: boxes must lie within the images, 8 x 8"):
        augment.resized_crop(x, top, left, height, width, 4)
    assert augment.resized_crop(x, *inside[:, None].expand(4, 2), 4).isfinite().all()


@pytest.mark.parametrize("top, left", [(-1, 0), (0, -1), (5, 0), (0, 5)])
def test_a_padded_crop_beyond_the_padding_is_refused(top, left):
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="top and left must be from 0 to 4"):
        augment.pad_crop(x, torch.tensor([0, top]), torch.tensor([0, left]), 2)
    assert augment.pad_crop(x, torch.tensor([0, 4]), torch.tensor([4, 0]), 2).shape == x.shape
