"""Common corruptions of 32 x 32 images (Hendrycks & Dietterich 2019, arXiv 1903.12261).

`read` gives the public CIFAR-10-C or CIFAR-100-C (Zenodo 2535967, 3555552) where the user has them.
`corrupt` makes 13 of the 19 kinds anew, on whole batches on the device, with the constants of the
public files: call the result "-C-like", as those files are one unseeded run, and glass and motion blur,
elastic transform, frost, snow and spatter are missing. On images that are JPEG already, noise and JPEG
are not comparable either.

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
    """x (B, 3, H, W) float in [0, 1] (not normalised), H = W, corrupted by `name`, a key of LIKE, at
    `severity` 1 to 5.

    generator  on the device of x, for the noises and fog; None: the global one.

    Returns the like of x on 8-bit levels: cut down, not rounded, as in the public files. Raises
    ValueError for an unknown name or severity, or images that are no floats or do not lie in [0, 1];
    for the latter it waits for the device.
    """
    _check(name, severity, LIKE)
    _check_units(x)
    f, constants = LIKE[name]
    c = constants[severity - 1]
    if name in RANDOM:
        x = f(x, c, generator)
    else:
        x = f(x, c)
    return (x.clamp(0, 1) * 255 + 1e-3).floor() / 255  # 1e-3: float32 rounding must not cost a level


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
    side, factors = x.shape[2], np.arange(1, c, 0.01)
    total = x
    for factor in factors:
        crop = math.ceil(side / factor)
        at = (side - crop) // 2
        big = F.interpolate(x[:, :, at : at + crop, at : at + crop], size=round(crop * factor),
                            mode="bilinear", align_corners=True)
        at = (big.shape[2] - side) // 2
        total = total + big[:, :, at : at + side, at : at + side]
    return total / (len(factors) + 1)


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
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "fog")
