"""Principal components: of an encoder's features, and of the filters of its first layer."""
import torch
import torch.nn.functional as F
from torch import nn


def principal(rows, k):
    """The first k principal components of rows (N, D), by falling variance: orthonormal (k, D), or as many
    as min(N, D), and their variances (k,). Of each the entry that is largest in size is positive."""
    centred = rows - rows.mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    components = components[:k]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * torch.where(largest < 0, -1, 1), singular[:k] ** 2 / max(1, len(rows) - 1)


def project(h, k=2):
    """Rows h (N, D) in their first k principal components: (N, k)."""
    components, _ = principal(h, k)
    return (h - h.mean(0)) @ components.T


def standardised(rows):
    """Rows (N, D), each of the D columns with mean 0 and standard deviation 1; a constant one is 0."""
    centred = rows - rows.mean(0)
    spread = centred.square().mean(0).sqrt()
    return centred / spread.clamp_min(1e-12)


def first_filters(encoder):
    """The filters (N, 3, P, P) that images meet first: the patch embedding of a ViT, the first convolution
    of a ResNet. Raises ValueError where a network has none."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape[1] == 3:
            return module.weight.detach()
    raise ValueError("this network has no convolution of images with three channels")


def filter_components(filters, k=28):
    """The first k principal components of standardised `filters` (N, 3, P, P), as Rebuffi et al. 2023,
    Fig. 4, draw them (that each weight is standardised over the filters is our reading): (k, 3, P, P), or as
    many as there are, and the share of the variance that each has (k,)."""
    rows = standardised(filters.flatten(1).double())
    count = min(k, len(rows) - 1, rows.shape[1])  # centred, N rows span N - 1 dimensions
    components, variances = principal(rows, count)
    total = rows.var(0).sum().clamp_min(1e-12)
    return components.view(-1, *filters.shape[1:]), variances / total


def mosaic(pictures, columns=7):
    """Components (k, 3, P, P), `columns` in a row, as one picture (3, H, W) in [0, 1]: each is scaled by
    itself, zero is grey; white lines between."""
    size = pictures.flatten(1).abs().amax(1).clamp_min(1e-12)
    pictures = 0.5 + pictures / (2 * size.view(-1, 1, 1, 1))
    pictures = F.pad(pictures, (0, 1, 0, 1), value=1.0)
    missing = -len(pictures) % columns
    pictures = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, missing), value=1.0)
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    return torch.cat(rows, dim=1)
