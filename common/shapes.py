"""Ten classes of drawings, made by a few formulas: a data set that needs no download."""
import math

import numpy as np
import torch
import torch.nn.functional as F


def _star(u, v):
    radius = torch.hypot(u, v)
    angle = torch.atan2(u, v)
    angle = (angle + math.pi / 5).remainder(2 * math.pi / 5) - math.pi / 5  # five-fold symmetric: tip at 0
    p = radius * angle.cos()
    q = radius * angle.sin().abs()
    return (1.05 - p) * 0.95 > 2.0 * q * 0.72


SHAPES = {  # where a point (u, v) of the square [-1.1, 1.1]^2 belongs to the shape
    "disc": lambda u, v: u**2 + v**2 < 0.75,
    "ring": lambda u, v: ((u**2 + v**2) - 0.65).abs() < 0.3,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.75,
    "triangle": lambda u, v: (v > -0.6) & (1.73 * u.abs() < 1.1 - v),
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.27) & (torch.maximum(u.abs(), v.abs()) < 0.95),
    "star": _star,
    "crescent": lambda u, v: (u**2 + v**2 < 0.95) & ((u - 0.5) ** 2 + v**2 > 0.55),
    "bar": lambda u, v: (u.abs() < 1.0) & (v.abs() < 0.36),
    "corner": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 0.85) & (torch.minimum(u, v) < -0.25),
    "pair": lambda u, v: (u.abs() - 0.6) ** 2 + v**2 < 0.17,
}


def shapes(n, seed):
    """`n` procedural images: x (n, 3, 32, 32) uint8, y (n,) int64, mask (n, 32, 32) float, the covered part
    of a pixel.

    The label is the shape (`SHAPES`, evenly, in random order). Position, size, rotation (by at most 43
    degrees), the two colours, the texture of figure and ground (gradients, stripes, blobs), and noise are
    drawn independently of it.
    """
    g = torch.Generator().manual_seed(_seed(seed, n))
    y = (torch.arange(n) % len(SHAPES))[torch.randperm(n, generator=g)]
    parts = [_draw_shapes(part, g) for part in y.split(1000)]
    return torch.cat([x for x, _ in parts]), y, torch.cat([mask for _, mask in parts])


def _draw_shapes(y, g):
    def rand(*shape, lo=0.0, hi=1.0):
        return lo + (hi - lo) * torch.rand(len(y), *shape, generator=g)

    # The figure, sampled twice per pixel each way, in the frame (u, v) of the shape.
    position = (torch.arange(64) + 0.5) / 32 - 1
    size = rand(1, 1, lo=0.6, hi=0.85)
    angle = 2 * math.pi * rand(1, 1, lo=-0.12, hi=0.12)
    centre_x = (1 - size) * rand(1, 1, lo=-1)
    centre_y = (1 - size) * rand(1, 1, lo=-1)
    dx = (position[None, None, :] - centre_x) / size
    dy = (position[None, :, None] - centre_y) / size
    u = angle.cos() * dx + angle.sin() * dy
    v = angle.cos() * dy - angle.sin() * dx
    inside = torch.empty(len(y), 64, 64)
    for label, shape in enumerate(SHAPES.values()):
        inside[y == label] = shape(u[y == label], v[y == label]).float()
    mask = F.avg_pool2d(inside[:, None], 2)

    def texture():  # (n, 3, 32, 32) about zero: a wave (a gradient to stripes) and blobs, each in a colour
        px = (torch.arange(32) + 0.5) / 16 - 1
        k = rand(2, 1, 1, lo=-9, hi=9) * rand(1, 1, 1)
        phase = rand(1, 1, hi=2 * math.pi)
        wave = torch.sin(k[:, 0] * px[None, None, :] + k[:, 1] * px[None, :, None] + phase)[:, None]
        blobs = F.interpolate(rand(3, 5, 5, lo=-1), size=32, mode="bicubic", align_corners=False)
        return 0.03 * rand(3, 1, 1, lo=-1) * wave + 0.05 * rand(1, 1, 1) * blobs

    # Colours that differ too much would tell images apart by themselves: nothing would be left to learn
    # from the figure.
    colour = rand(1, 1, 1, lo=0.3, hi=0.7) + rand(3, 1, 1, lo=-0.06, hi=0.06)
    side = torch.where(rand(1, 1, 1) < 0.5, -1.0, 1.0)  # the figure is darker or lighter than its ground
    figure = colour + side * (rand(1, 1, 1, lo=0.4, hi=0.65) + rand(3, 1, 1, lo=-0.045, hi=0.045)) + texture()
    ground = colour + texture()
    x = torch.lerp(ground, figure, mask)
    x = x + 0.06 * rand(1, 1, 1) * torch.randn(x.shape, generator=g)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8), mask[:, 0]


def _seed(seed, n):
    """A well-mixed 63-bit seed."""
    return int(np.random.SeedSequence([2, seed, n]).generate_state(1, np.uint64)[0] >> 1)
