"""Deterministic float64 inputs for tests against printed values: any language can make them."""
import torch


def A(n, d, p):
    """sin(0.7 (i d + j) + p), (n, d)."""
    return torch.sin(0.7 * torch.arange(n * d, dtype=torch.float64).view(n, d) + p)


def Z(n, d):
    """sin(1 + .7 i + .3 j + .05 i j), (n, d)."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(1 + 0.7 * i + 0.3 * j + 0.05 * i * j)


def X(b, c, h, w):
    """Images .5 + .5 sin(.9 b + 1.7 c + .31 h + .53 w + .011 h w), (b, c, h, w)."""
    b, c, h, w = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (b, c, h, w)), indexing="ij")
    return 0.5 + 0.5 * torch.sin(0.9 * b + 1.7 * c + 0.31 * h + 0.53 * w + 0.011 * h * w)


def unit(x):
    """Rows of length 1."""
    return x / x.norm(dim=1, keepdim=True)
