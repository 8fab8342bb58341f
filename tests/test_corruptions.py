import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image

from common import augment, shapes
from evaluation import corruptions
from evaluation.corruptions import LIKE, corrupt, plasma, read

x0 = augment.to_float(shapes.shapes(24, seed=0)[0])
flat = torch.full((64, 3, 32, 32), 0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def levels(x):
    """(B, H, W, 3) integers from 0 to 255."""
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", LIKE)
def test_images_stay_on_8_bit_levels_and_are_not_changed_in_place(name):
    before = x0.clone()
    for severity in (1, 5):
        x = corrupt(x0, name, severity, seeded())
        assert x.shape == x0.shape and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        torch.testing.assert_close(x * 255, (x * 255).round(), rtol=0, atol=1e-4)
        assert not torch.equal(x, x0)
        assert torch.equal(x, corrupt(x0, name, severity, seeded()))
        if name not in corruptions.RANDOM:
            assert torch.equal(x[3:5], corrupt(x0[3:5], name, severity))  # no image depends on its batch
    assert torch.equal(x0, before)


@pytest.mark.parametrize("name", [name for name in LIKE if name != "saturate"])
def test_severity_grows(name):
    off = [(corrupt(x0, name, s, seeded()) - x0).square().mean().item() for s in range(1, 6)]
    assert off == sorted(off) and off[4] > 1.2 * off[0]


def test_noises_have_their_moments():
    for severity in range(1, 6):
        c = {name: LIKE[name][1][severity - 1] for name in corruptions.RANDOM}
        g = corruptions.gaussian_noise(flat, c["gaussian_noise"], seeded()) - flat
        assert g.std().item() == pytest.approx(c["gaussian_noise"], rel=0.02) and abs(g.mean()) < 1e-3
        g = corruptions.speckle_noise(flat, c["speckle_noise"], seeded()) - flat
        assert g.std().item() == pytest.approx(c["speckle_noise"] / 2, rel=0.02)
        g = corruptions.shot_noise(flat, c["shot_noise"], seeded())
        assert g.mean().item() == pytest.approx(0.5, abs=2e-3)
        assert g.var().item() == pytest.approx(0.5 / c["shot_noise"], rel=0.03)  # a Poisson's is its mean
        g = corruptions.impulse_noise(flat, c["impulse_noise"], seeded())
        for value in (0.0, 1.0):
            share = (g == value).float().mean().item()
            assert share == pytest.approx(c["impulse_noise"] / 2, rel=0.13)  # four standard errors
        assert (g == 0.5).float().mean().item() == pytest.approx(1 - c["impulse_noise"], abs=2e-3)


def test_light_equals_colorsys():
    x = x0[:2].double().clone()
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 0.4  # black, grey
    for severity in range(5):
        c, (gain, offset) = LIKE["brightness"][1][severity], LIKE["saturate"][1][severity]
        bright, vivid = corruptions.brightness(x, c), corruptions.saturate(x, (gain, offset))
        for b, i, j in [(0, 0, 0), (0, 0, 1), (0, 9, 9), (1, 5, 20), (1, 16, 16)]:
            h, s, v = colorsys.rgb_to_hsv(*x[b, :, i, j].tolist())
            expected = colorsys.hsv_to_rgb(h, s, min(v + c, 1))
            assert bright[b, :, i, j].tolist() == pytest.approx(expected, abs=1e-9)
            expected = colorsys.hsv_to_rgb(h, min(max(s * gain + offset, 0), 1), v)
            assert vivid[b, :, i, j].tolist() == pytest.approx(expected, abs=1e-9)


def test_contrast_keeps_the_mean_of_a_channel():
    x = corruptions.contrast(x0, 0.3)
    torch.testing.assert_close(x.mean((2, 3)), x0.mean((2, 3)))
    torch.testing.assert_close(x.std((2, 3)), 0.3 * x0.std((2, 3)))


@pytest.mark.parametrize("severity", range(1, 6))
def test_digital_kinds_equal_pil(severity):
    small, quality = int(32 * LIKE["pixelate"][1][severity - 1]), LIKE["jpeg_compression"][1][severity - 1]
    ours = [levels(corrupt(x0, name, severity)) for name in ("pixelate", "jpeg_compression")]
    for image, pixelated, compressed in zip(levels(x0), *ours):
        image = Image.fromarray(image)
        expected = image.resize((small, small), Image.BOX).resize((32, 32), Image.BOX)
        assert (np.array(expected) == pixelated).all()
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        assert (np.array(Image.open(file)) == compressed).all()


def test_blurs_keep_a_constant_and_spread_a_point():
    point = torch.zeros(1, 3, 33, 33, dtype=torch.float64)
    point[:, :, 16, 16] = 1
    at = torch.arange(-16, 17.0, dtype=torch.float64)
    for sigma in LIKE["gaussian_blur"][1]:
        spread = corruptions.gaussian_blur(point, sigma)[0, 0]
        g = torch.exp(-at**2 / (2 * sigma**2)) * (at.abs() <= int(4 * sigma + 0.5))
        torch.testing.assert_close(spread, g[:, None] * g / g.sum() ** 2, rtol=0, atol=1e-6)
    for c in LIKE["defocus_blur"][1]:
        spread = corruptions.defocus_blur(point, c)[0, 0]
        assert spread.sum().item() == pytest.approx(1, abs=1e-6) and torch.equal(spread, spread.T)
    for radius, pixels in ((0.5, 1), (1, 5), (1.5, 9)):  # a hard disc
        spread = corruptions.defocus_blur(point, (radius, 0.01))
        assert (spread[0, 0] > 1e-3).sum() == pixels and spread.max() == pytest.approx(1 / pixels, rel=1e-6)
    for name in ("gaussian_blur", "defocus_blur", "zoom_blur"):
        f, constants = LIKE[name]
        torch.testing.assert_close(f(flat[:1], constants[4]), flat[:1])


@pytest.mark.outside
def test_zoom_blur_equals_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = x0[0].double().permute(1, 2, 0).numpy()
    for c in LIKE["zoom_blur"][1]:
        factors, total = np.arange(1, c, 0.01), x
        for factor in factors:
            crop = int(np.ceil(32 / factor))
            at = (32 - crop) // 2
            big = ndimage.zoom(x[at : at + crop, at : at + crop], (factor, factor, 1), order=1)
            at = (big.shape[0] - 32) // 2
            total = total + big[at : at + 32, at : at + 32]
        ours = corruptions.zoom_blur(x0[:1].double(), c)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(ours, total / (len(factors) + 1), rtol=0, atol=1e-12)


def test_plasma_equals_diamond_and_square_by_loops():
    """Each new point is the mean of its four neighbours on the torus, plus noise that falls by decay^2."""
    size, decay, generator = 8, 1.75, seeded()
    a, step, amount = np.zeros((size, size)), size, 1.0
    while step >= 2:
        half = step // 2

        def fill(first, second, neighbours):
            u = torch.rand(1, size // step, size // step, generator=generator, dtype=torch.float64)[0]
            for p, i in enumerate(range(first, size, step)):
                for q, j in enumerate(range(second, size, step)):
                    mean = sum(a[(i + di) % size, (j + dj) % size] for di, dj in neighbours) / 4
                    a[i, j] = mean + amount * (2 * u[p, q].item() - 1)

        fill(half, half, [(s * half, t * half) for s in (-1, 1) for t in (-1, 1)])
        beside = [(half, 0), (-half, 0), (0, half), (0, -half)]
        fill(0, half, beside)
        fill(half, 0, beside)
        step, amount = half, amount / decay**2
    ours = plasma(torch.zeros(1, 3, 8, 8, dtype=torch.float64), decay, seeded())
    np.testing.assert_allclose(ours[0, 0].numpy(), (a - a.min()) / (a - a.min()).max(), rtol=0, atol=1e-12)


def test_fog_keeps_the_brightest_value_as_bound():
    f, constants = LIKE["fog"]
    x = f(x0, constants[2], seeded())
    top = x0.amax((1, 2, 3), keepdim=True)
    assert (x <= top + 1e-6).all() and x.std((2, 3)).mean() < x0.std((2, 3)).mean() + 0.2
    each = plasma(x0, 2.0, seeded())
    assert each.shape == (24, 1, 32, 32) and not torch.equal(each[0], each[1])
    assert (each.amin((1, 2, 3)) == 0).all() and (each.amax((1, 2, 3)) == 1).all()


def test_public_files_are_cut_by_severity(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20) % 10
    np.save(tmp_path / "fog.npy", x), np.save(tmp_path / "labels.npy", y)
    for severity in range(1, 6):
        rows = slice(4 * (severity - 1), 4 * severity)
        images, labels = read(tmp_path, "fog", severity)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert (images.permute(0, 2, 3, 1).numpy() == x[rows]).all() and (labels.numpy() == y[rows]).all()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="snow.npy: no such file; unpack CIFAR-10-C"):
        read(tmp_path, "snow", 1)
    np.save(tmp_path / "fog.npy", np.zeros((20, 32, 32, 3))), np.save(tmp_path / "labels.npy", np.arange(20))
    with pytest.raises(ValueError, match="float64"):
        read(tmp_path, "fog", 1)
    (tmp_path / "frost.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="frost.npy: not a readable"):
        read(tmp_path, "frost", 1)
    with pytest.raises(ValueError, match="corruption 'rain': choose one of"):
        read(tmp_path, "rain", 1)
    with pytest.raises(ValueError, match="'snow': choose one of gaussian_noise"):
        corrupt(x0, "snow", 1)
    with pytest.raises(ValueError, match="severity 6"):
        corrupt(x0, "fog", 6)


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("x, words", [
    ((255 * x0).to(torch.uint8), "images are torch.uint8: must be floats in \\[0, 1\\]"),
    (255 * x0, "images from 0 to 255: must be in \\[0, 1\\]"),
    ((x0 - 0.5) / 0.25, "images from -2 to 2: must be in \\[0, 1\\]"),
    (x0.masked_fill(x0 == 1, np.nan), "images from nan to nan")], ids=["uint8", "0-255", "normalised", "NaN"])
def test_images_in_other_units_are_refused(name, x, words):
    with pytest.raises(ValueError, match=words):
        corrupt(x, name, 1)


@pytest.mark.parametrize("name", LIKE)
def test_rounding_and_an_empty_batch_are_no_other_units(name):
    x = corrupt((x0 * (1 + 1e-3) - 5e-4).double(), name, 1)
    assert x.shape == x0.shape and x.min() >= 0 and x.max() <= 1
    if name != "jpeg_compression":  # which stacks its images
        assert corrupt(x0[:0], name, 1).shape == (0, 3, 32, 32)


def test_nineteen_kinds_are_named_thirteen_are_made():
    assert len(corruptions.MAIN) == 15 and len({*corruptions.MAIN, *corruptions.EXTRA}) == 19
    assert len(LIKE) == 13 and set(LIKE) < {*corruptions.MAIN, *corruptions.EXTRA}
    assert all(len(constants) == 5 for _, constants in LIKE.values())
