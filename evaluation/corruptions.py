"""Common corruptions of 32 x 32 images (Hendrycks & Dietterich 2019, arXiv 1903.12261).

`read` gives the public CIFAR-10-C or CIFAR-100-C (Zenodo 2535967, 3555552) where the user has them.
`corrupt` makes 17 of the 19 kinds anew, on whole batches on the device, with the constants of the
public files: call the result "-C-like", as those files are one unseeded run. Frost is missing, which
lays photographs over the image, and spatter, whose drops of water need OpenCV's edges and distances. On
images that are JPEG already, noise and JPEG are not comparable either.

The standard score is the mean accuracy over the 15 kinds of MAIN and the five severities.
"""
import io
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image  # torchvision needs it too

MAIN = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
        "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform",
        "pixelate", "jpeg_compression")
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def read(folder, name, severity):
    """Corruption `name` of the public files in `folder`: x (10000, 3, 32, 32) uint8 and y (10000,)
    int64.

    Raises ValueError for an unknown name or severity, or a file that is not one of them, and
    FileNotFoundError, with what would work.
    """
    _check(name, severity, MAIN + EXTRA)
    arrays = []
    for stem in (name, "labels"):
        path = pathlib.Path(folder) / f"{stem}.npy"
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; unpack CIFAR-10-C or CIFAR-100-C there") from None
        except Exception as e:
            raise ValueError(f"{path}: not a readable .npy file ({e})") from None
    x, y = arrays
    if y.dtype.kind not in "iu":
        raise ValueError(f"{folder}: labels.npy is {y.dtype}; labels must be integers")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) % 5 or y.shape != (len(x),):
        raise ValueError(f"{folder}: {name}.npy is {x.dtype} {x.shape}, labels.npy {y.shape}; they must be "
                         "uint8 (5 N, H, W, 3), one severity after the other, and (5 N,)")
    rows = slice((severity - 1) * (len(x) // 5), severity * (len(x) // 5))
    x = np.array(x[rows])
    y = np.array(y[rows]).astype(np.int64)
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y)


def corrupt(x, name, severity, generator=None):
    """x (B, 3, H, W) float in [0, 1] (not normalised), H = W, corrupted by `name`, a key of LIKE or
    LIKE_MORE, at `severity` 1 to 5.

    generator  on the device of x, for the kinds of RANDOM; None: the global one.

    Returns the like of x on 8-bit levels: cut down, not rounded, as in the public files. Raises
    ValueError for an unknown name or severity, or images that are no floats or do not lie in [0, 1];
    for the latter it waits for the device.
    """
    made = LIKE | LIKE_MORE
    _check(name, severity, made)
    _check_units(x)
    f, constants = made[name]
    c = constants[severity - 1]
    if name in RANDOM:
        x = f(x, c, generator)
    else:
        x = f(x, c)
    return _cut(x.clamp(0, 1))


def _check(name, severity, names):
    if name not in names:
        raise ValueError(f"corruption {name!r}: choose one of {', '.join(names)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity {severity}: must be 1, 2, 3, 4 or 5")


def _check_units(x):
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}: must be floats in [0, 1], as x.float() / 255 is")
    if len(x):
        least, most = torch.aminmax(x)
        if not (least >= -1e-3 and most <= 1 + 1e-3):  # what rounding leaves outside is clipped below
            raise ValueError(f"images from {least:.3g} to {most:.3g}: must be in [0, 1], not normalised")


# ----------------------------------------------------------------------------------------------------------
# Noise
# ----------------------------------------------------------------------------------------------------------
def _normal(x, generator):
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def gaussian_noise(x, c, generator):
    return x + c * _normal(x, generator)


def shot_noise(x, c, generator):
    return torch.poisson(x.clamp_min(0) * c, generator=generator) / c  # rounding may leave -1e-8


def impulse_noise(x, c, generator):
    """Each value becomes 0 or 1 with probability c / 2 each."""
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return torch.where(u < c, (u < c / 2).to(x), x)


def speckle_noise(x, c, generator):
    return x + x * c * _normal(x, generator)


# ----------------------------------------------------------------------------------------------------------
# Blur
# ----------------------------------------------------------------------------------------------------------
def _filter(x, kernel, mode):
    """Every channel of x correlated with `kernel` (k, l), k and l odd."""
    h, w = kernel.shape
    kernel = kernel.to(x).expand(x.shape[1], 1, h, w)
    return F.conv2d(F.pad(x, (w // 2, w // 2, h // 2, h // 2), mode), kernel, groups=x.shape[1])


def _gaussian(sigma, radius):
    g = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma**2))
    return g / g.sum()


def gaussian_blur(x, c):
    """To four standard deviations; beyond the edge, its own value."""
    g = _gaussian(c, int(4 * c + 0.5))
    return _filter(_filter(x, g[:, None], "replicate"), g[None], "replicate")


def defocus_blur(x, c):
    """A disc of radius c[0], softened by a 3 x 3 Gaussian of deviation c[1]."""
    radius, alias = c
    at = torch.arange(-3, 4.0)
    disc = (at[:, None].square() + at.square() <= radius**2).float()
    g = _gaussian(alias, 1)
    return _filter(x, _filter((disc / disc.sum())[None, None], g[:, None] * g, "constant")[0, 0], "reflect")


def zoom_blur(x, c):
    """The mean of x and its central crops, enlarged by 1, 1.01, ... up to c."""
    factors = np.arange(1, c, 0.01)
    total = x
    for factor in factors:
        total = total + _enlarged(x, factor)
    return total / (len(factors) + 1)


def _enlarged(x, factor):
    """The central crop of x, enlarged by `factor` to its size."""
    side = x.shape[2]
    crop = math.ceil(side / factor)
    at = (side - crop) // 2
    big = F.interpolate(x[:, :, at : at + crop, at : at + crop], size=round(crop * factor),
                        mode="bilinear", align_corners=True)
    at = (big.shape[2] - side) // 2
    return big[:, :, at : at + side, at : at + side]


def glass_blur(x, c, generator):
    """A blur of deviation c[0]; c[1] times, each pixel takes the value of a neighbour, itself or one above,
    left, or both; the blur again.

    The official code means to swap the two pixels. But both names of its swap are views of one array, so
    that the first takes the other's value and the other keeps its own. It goes from the lower right to the
    upper left, and so never reads a pixel that has been written: all pixels can move at once. The first two
    rows and columns stay.
    """
    sigma, times = c
    x = _cut(gaussian_blur(x, sigma))
    side = x.shape[2]
    places = torch.arange(side, device=x.device)
    for _ in range(times):
        up, left = torch.randint(2, (2, len(x), side, side), generator=generator, device=x.device)
        inside = (places >= 2) & (places >= 2)[:, None]
        x = _picked(x, places[:, None] - up * inside, places - left * inside)
    return gaussian_blur(x, sigma)


def _cut(x):
    """x in [0, 1] on 8-bit levels, cut down."""
    return (x * 255 + 1e-3).floor() / 255  # 1e-3: float32 rounding must not cost a level


def _picked(x, rows, columns):
    """x (B, C, H, W) with at each place the value at that row and column of its image, both (B, H, W)."""
    index = rows * x.shape[3] + columns
    return x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def motion_blur(x, c, generator):
    """Half a Gaussian along a line at an angle within 45 degrees of the horizontal, one for each image."""
    degrees = _uniform(len(x), -45, 45, x, generator)
    return _smeared(x, c, degrees)


def _uniform(n, low, high, x, generator):
    u = torch.rand(n, generator=generator, device=x.device, dtype=x.dtype)
    return low + (high - low) * u


def _smeared(x, c, degrees):
    """ImageMagick's motion blur: the weighted mean of x at 0, 1, ..., 2 c[0] pixels along the direction
    `degrees` (B,), clockwise from the right; weights are Gaussian of deviation c[1], and beyond the edge
    is its own value."""
    radius, sigma = c
    angle = degrees * (math.pi / 180)
    side = x.shape[2]
    places = torch.arange(side, device=x.device)
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    total = 0
    for i, weight in enumerate(weights):
        right = (i * angle.cos() - 0.5).ceil().long()[:, None, None]
        down = (i * angle.sin() - 0.5).ceil().long()[:, None, None]
        rows = (places[:, None] + down).clamp(0, side - 1).expand(-1, side, side)
        columns = (places + right).clamp(0, side - 1).expand(-1, side, side)
        total = total + weight / sum(weights) * _picked(x, rows, columns)
    return total


# ----------------------------------------------------------------------------------------------------------
# Weather and warps
# ----------------------------------------------------------------------------------------------------------
def snow(x, c, generator):
    """Flakes: Gaussian noise (mean c[0], deviation c[1]), enlarged by c[2], of which what is below c[3] is
    taken away, smeared downwards. They are added to x, which is whitened, once as they are and once turned
    by 180 degrees."""
    mean, deviation, zoom, least, radius, sigma, keep = c
    flakes = mean + deviation * _normal(x[:, :1], generator)
    flakes = _enlarged(flakes, zoom)
    flakes = _cut(torch.where(flakes < least, 0, flakes).clamp(0, 1))
    flakes = _levels(_smeared(flakes, (radius, sigma), _uniform(len(x), -135, -45, x, generator)))
    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    white = torch.maximum(x, grey * 1.5 + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.flip(2, 3)


def elastic_transform(x, c, generator):
    """A random affine map, by which three points 20 pixels apart move by up to c[2] sides each way, then
    displacements of c[0] sides times uniform noise, blurred with a deviation of c[1] sides."""
    amount, sigma, shift = [part * x.shape[2] for part in c]
    x = _affine(x, shift, generator)
    if not amount:
        return x
    noise = 2 * torch.rand(len(x), 2, *x.shape[2:], generator=generator, device=x.device, dtype=x.dtype) - 1
    radius = int(3 * sigma + 0.5)
    g = _gaussian(sigma, radius).to(x)
    at = _mirrored(torch.arange(-radius, x.shape[2] + radius, device=x.device), x.shape[2])
    noise = noise[:, :, at][:, :, :, at]
    kernel = g.expand(2, 1, -1)
    noise = F.conv2d(noise, kernel[..., None], groups=2)
    noise = F.conv2d(noise, kernel[:, :, None], groups=2)
    right, down = (amount * noise).unbind(1)
    places = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
    return _sampled(x, places[:, None] + down, places + right, align_corners=False)


def _affine(x, shift, generator):
    """x under the affine map that moves three points, at a third of the side from the centre, by uniform
    numbers within +- shift; outside, mirrored."""
    side = x.shape[2]
    centre = side // 2
    arm = side // 3
    corners = [[centre + arm, centre + arm], [centre + arm, centre - arm], [centre - arm, centre - arm]]
    source = x.new_tensor(corners)  # (right, down)
    moved = source + _uniform(6 * len(x), -shift, shift, x, generator).view(-1, 3, 2)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1.0), source.expand_as(moved))  # (B, 3, 2)
    places = torch.arange(side, device=x.device, dtype=x.dtype)
    down, right = torch.meshgrid(places, places, indexing="ij")
    grid = torch.stack([right, down, torch.ones_like(right)], 2).view(-1, 3)
    right, down = (grid @ back).view(-1, side, side, 2).unbind(3)
    return _sampled(x, down, right, align_corners=True)


def _mirrored(index, n):
    """Integers as places of 0 to n - 1, mirrored at the edges, whose pixels come twice."""
    index = index.remainder(2 * n)
    return torch.minimum(index, 2 * n - 1 - index)


def _sampled(x, rows, columns, align_corners):
    """x at fractional rows and columns (B, H, W), bilinear; outside, mirrored at the centres of the outer
    pixels (align_corners) or at their edges."""
    n = x.shape[2]
    if align_corners:
        grid = torch.stack([columns, rows], 3) * (2 / (n - 1)) - 1
    else:
        grid = (torch.stack([columns, rows], 3) * 2 + 1) / n - 1
    return F.grid_sample(x, grid, "bilinear", "reflection", align_corners)


# ----------------------------------------------------------------------------------------------------------
# Light
# ----------------------------------------------------------------------------------------------------------
def fog(x, c, generator):
    """x + c[0] times a plasma fractal, rescaled to the image's old maximum."""
    amount, decay = c
    top = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma(x, decay, generator)) * top / (top + amount)


def plasma(x, decay, generator):
    """(B, 1, H, W): diamond-square fractals in [0, 1] on a torus; the noise falls by decay^2 a scale
    (the official code multiplies its wibble by a number uniform within +- wibble)."""
    size = 2 ** math.ceil(math.log2(x.shape[2]))
    a, step, wibble = x.new_zeros(len(x), size, size), size, 1.0

    def noisy(total):
        u = torch.rand(total.shape, generator=generator, device=x.device, dtype=x.dtype)
        return total / 4 + wibble * (2 * u - 1)

    while step >= 2:
        half = step // 2
        corners = a[:, ::step, ::step]
        below = corners + corners.roll(-1, 1)
        centre = a[:, half::step, half::step] = noisy(below + below.roll(-1, 2))
        a[:, ::step, half::step] = noisy(centre + centre.roll(1, 1) + corners + corners.roll(-1, 2))
        a[:, half::step, ::step] = noisy(centre + centre.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wibble = half, wibble / decay**2
    a = a - a.amin((1, 2), keepdim=True)
    return (a / a.amax((1, 2), keepdim=True))[:, None, : x.shape[2], : x.shape[3]]


def contrast(x, c):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def brightness(x, c):
    """V + c in HSV: the colour is scaled by the growth of its largest channel."""
    v = x.amax(1, keepdim=True)
    return torch.where(v > 0, x / v.clamp_min(1e-12), 1.0) * (v + c).clamp(0, 1)


def saturate(x, c):
    """S c[0] + c[1] in HSV; the hue of a grey is red."""
    v = x.amax(1, keepdim=True)
    chroma = v - x.amin(1, keepdim=True)
    s = chroma / v.clamp_min(1e-12)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    away = torch.where(chroma > 0, (v - x) / chroma.clamp_min(1e-12), red)
    return v * (1 - (s * c[0] + c[1]).clamp(0, 1) * away)


# ----------------------------------------------------------------------------------------------------------
# Digital
# ----------------------------------------------------------------------------------------------------------
def _box(n_in, n_out):
    """(n_out, n_in): PIL's box filter."""
    scale = n_in / n_out
    centre = (torch.arange(n_out)[:, None] + 0.5) * scale
    offset = (torch.arange(n_in) + 0.5 - centre) / max(scale, 1)
    w = ((offset > -0.5) & (offset <= 0.5)).float()
    return w / w.sum(1, keepdim=True)


def pixelate(x, c):
    """Down to that part of the side and up again, on 8-bit levels after each pass."""
    side = x.shape[2]
    small = int(side * c)
    for m in (_box(side, small).to(x), _box(small, side).to(x)):
        x = _levels(x @ m.T)
        x = _levels(m @ x)
    return x


def _levels(x):
    """x in [0, 1] on 8-bit levels; halves go up."""
    return (x * 255 + 0.501).floor() / 255


def jpeg_compression(x, c):
    """By PIL, on the CPU, image by image: the one slow corruption."""
    def through(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=c)
        return np.array(Image.open(file))

    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.from_numpy(np.stack([through(image) for image in images])).permute(0, 3, 1, 2).to(x) / 255


LIKE = {  # the constants of the public files, severity 1 to 5
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "saturate": (saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
LIKE_MORE = {  # those that came later: c-like goes on to be the mean over LIKE
    "glass_blur": (glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "snow": (snow, ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    "elastic_transform": (elastic_transform, ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06),
                                              (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
}
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "fog", *LIKE_MORE)
