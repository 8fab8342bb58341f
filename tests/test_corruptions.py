import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from common import augment, shapes
from evaluation import corruptions
from evaluation.corruptions import LIKE, LIKE_MORE, corrupt, plasma, read

x0 = augment.to_float(shapes.shapes(24, seed=0)[0])
flat = torch.full((64, 3, 32, 32), 0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def levels(x):
    """(B, H, W, 3) integers from 0 to 255."""
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", LIKE | LIKE_MORE)
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


UNORDERED = ("saturate", "glass_blur", "elastic_transform")


@pytest.mark.parametrize("name", [name for name in LIKE | LIKE_MORE if name not in UNORDERED])
def test_severity_grows(name):
    off = [(corrupt(x0, name, s, seeded()) - x0).square().mean().item() for s in range(1, 6)]
    assert off == sorted(off) and off[4] > 1.2 * off[0]


def test_noises_have_their_moments():
    for severity in range(1, 6):
        c = {name: LIKE[name][1][severity - 1] for name in LIKE if name.endswith("noise")}
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
    with pytest.raises(ValueError, match="'frost': choose one of gaussian_noise"):
        corrupt(x0, "frost", 1)
    with pytest.raises(ValueError, match="severity 6"):
        corrupt(x0, "fog", 6)


@pytest.mark.parametrize("name", LIKE | LIKE_MORE)
@pytest.mark.parametrize("x, words", [
    ((255 * x0).to(torch.uint8), "images are torch.uint8: must be floats in \\[0, 1\\]"),
    (255 * x0, "images from 0 to 255: must be in \\[0, 1\\]"),
    ((x0 - 0.5) / 0.25, "images from -2 to 2: must be in \\[0, 1\\]"),
    (x0.masked_fill(x0 == 1, np.nan), "images from nan to nan")], ids=["uint8", "0-255", "normalised", "NaN"])
def test_images_in_other_units_are_refused(name, x, words):
    with pytest.raises(ValueError, match=words):
        corrupt(x, name, 1)


@pytest.mark.parametrize("name", LIKE | LIKE_MORE)
def test_rounding_and_an_empty_batch_are_no_other_units(name):
    x = corrupt((x0 * (1 + 1e-3) - 5e-4).double(), name, 1)
    assert x.shape == x0.shape and x.min() >= 0 and x.max() <= 1
    if name != "jpeg_compression":  # which stacks its images
        assert corrupt(x0[:0], name, 1).shape == (0, 3, 32, 32)


def test_glass_moves_each_pixel_by_one_at_most_up_and_left_as_a_loop_over_the_pixels_does():
    x = torch.randint(256, (2, 3, 9, 9), generator=seeded(1)).double() / 255
    ours = corruptions.glass_blur(x, (0.05, 2), seeded())  # this blur is none
    levels, generator = (x * 255).round().numpy(), seeded()
    for _ in range(2):
        up, left = torch.randint(2, (2, 2, 9, 9), generator=generator).numpy()
        for b in range(2):
            for h in range(8, 1, -1):
                for w in range(8, 1, -1):
                    levels[b, :, h, w] = levels[b, :, h - up[b, h, w], w - left[b, h, w]]
    np.testing.assert_allclose(ours * 255, levels, atol=1e-9)
    torch.testing.assert_close(x[:, :, :2], ours[:, :, :2])
    assert up.std() > 0 and not (up == left).all()


def test_a_swap_of_two_pixels_of_one_array_is_a_copy():
    """Why glass blur is what its docstring says: of the two views, the first is written before it is read."""
    x = np.array([[1, 2], [3, 4]])
    x[0], x[1] = x[1], x[0]
    assert x.tolist() == [[3, 4], [3, 4]]


def test_motion_blur_is_half_a_gaussian_along_a_line_of_its_own_angle():
    x = torch.rand(3, 3, 16, 16, generator=seeded(1), dtype=torch.float64)
    degrees, (radius, sigma) = [0.0, 30.0, -45.0], (3, 1.5)
    ours = corruptions._smeared(x, (radius, sigma), torch.tensor(degrees, dtype=torch.float64))
    weights = np.exp(-np.arange(7) ** 2 / (2 * sigma**2))
    weights /= weights.sum()
    for b, h, w in ((0, 5, 3), (0, 0, 15), (1, 2, 4), (1, 15, 15), (2, 9, 9), (2, 1, 2)):
        angle, value = math.radians(degrees[b]), 0
        for i, weight in enumerate(weights):
            down, right = math.ceil(i * math.sin(angle) - 0.5), math.ceil(i * math.cos(angle) - 0.5)
            value += weight * x[b, 0, min(max(h + down, 0), 15), min(max(w + right, 0), 15)].item()
        assert ours[b, 0, h, w].item() == pytest.approx(value, abs=1e-9)
    same = corruptions.motion_blur(x[:1].repeat(8, 1, 1, 1), (6, 2), seeded())
    assert len({image.sum().item() for image in same}) == 8  # each has an angle
    u = corruptions._uniform(2000, -45, 45, x, seeded())
    assert -45 <= u.min() < -44 and 44 < u.max() <= 45
    torch.testing.assert_close(corruptions.motion_blur(flat[:2], (9, 2.5), seeded()), flat[:2])


def test_snow_brightens_and_falls_on_both_halves_alike():
    for severity in range(5):
        c = LIKE_MORE["snow"][1][severity]
        black = corruptions.snow(torch.zeros(8, 3, 32, 32), c, seeded())
        torch.testing.assert_close(black, black.flip(2, 3))  # flakes, and flakes turned
        assert black.min().item() == pytest.approx((1 - c[-1]) / 2)
        assert torch.equal(black[:, 0], black[:, 2]) and (black - black.min() > 0.02).float().mean() > 0.02
        x = corruptions.snow(x0, c, seeded())
        assert (x >= x0 - 1e-6).all() and x.mean() > x0.mean()
    c = (0.5, 0, 1, 0.4, 8, 3, 0.95)  # flakes without deviation: grey everywhere
    x = corruptions.snow(x0, c, seeded())
    grey = (0.299 * x0[:, 0] + 0.587 * x0[:, 1] + 0.114 * x0[:, 2])[:, None]
    expected = 0.95 * x0 + 0.05 * torch.maximum(x0, 1.5 * grey + 0.5) + 2 * 127 / 255
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_an_elastic_transform_is_affine_and_then_smooth():
    at = torch.arange(32, dtype=torch.float64) / 31
    ramps = torch.stack([at.expand(32, 32), at[:, None].expand(32, 32)])[None].repeat(50, 1, 1, 1)
    moved = corruptions._affine(ramps, 2.0, seeded())[:, :, 10:22, 10:22] * 31  # where each pixel comes from
    for second in (moved.diff(n=2, dim=2), moved.diff(n=2, dim=3), moved.diff(dim=2).diff(dim=3)):
        assert second.abs().max() < 1e-9
    off = moved - ramps[:, :, 10:22, 10:22] * 31
    assert 0.5 < off.abs().max() < 5 and off.std() > 0.2
    torch.testing.assert_close(corruptions._affine(ramps, 0.0, seeded()), ramps)
    # a corner goes where it is sent
    middle = corruptions._affine(ramps, 2.0, seeded())[0] * 31
    sent = torch.tensor([[26.0, 26], [26, 6], [6, 6]], dtype=torch.float64) + corruptions._uniform(
        300, -2, 2, ramps, seeded()).view(-1, 3, 2)[0]
    right, down = sent[2]
    corner = middle[:, int(down) : int(down) + 2, int(right) : int(right) + 2]
    weight = torch.tensor([[1 - down % 1], [down % 1]]) * torch.tensor([1 - right % 1, right % 1])
    assert (corner * weight).sum((1, 2)).tolist() == pytest.approx([6, 6], abs=1e-6)

    c = (0.1, 0.04, 0.0)
    moved = corruptions.elastic_transform(ramps, c, seeded()) * 31 - ramps * 31
    expected = 3.2 / math.sqrt(3) * (corruptions._gaussian(1.28, 4).square().sum().item())  # deviation of the blurred noise
    assert moved[:, :, 6:26, 6:26].std().item() == pytest.approx(expected, rel=0.05)
    torch.testing.assert_close(corruptions.elastic_transform(flat[:4], (0.1, 0.03, 0.03), seeded()), flat[:4])


@pytest.mark.parametrize("align_corners, places", [(True, [2, 1, 0, 1, 2, 3, 2]), (False, [1, 0, 0, 1, 2, 3, 3])])
def test_outside_an_image_is_mirrored(align_corners, places):
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    at = torch.arange(-2, 5, dtype=torch.float64).expand(1, 7, 7)
    ours = corruptions._sampled(x, at.mT, at, align_corners)
    torch.testing.assert_close(ours, x[:, :, places][:, :, :, places])
    if not align_corners:
        assert corruptions._mirrored(torch.arange(-2, 5), 4).tolist() == places


def test_nineteen_kinds_are_named_seventeen_are_made():
    assert {*corruptions.MAIN, *corruptions.EXTRA} - {*LIKE, *LIKE_MORE} == {"frost", "spatter"}
    assert not LIKE.keys() & LIKE_MORE.keys() and len(LIKE_MORE) == 4
    assert all(len(constants) == 5 for _, constants in LIKE_MORE.values())


def test_nineteen_kinds_are_named_thirteen_are_made():
    assert len(corruptions.MAIN) == 15 and len({*corruptions.MAIN, *corruptions.EXTRA}) == 19
    assert len(LIKE) == 13 and set(LIKE) < {*corruptions.MAIN, *corruptions.EXTRA}
    assert all(len(constants) == 5 for _, constants in LIKE.values())
