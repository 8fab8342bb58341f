"""k-means on the device: Lloyd's algorithm from k-means++ starts."""
import math

import torch


@torch.no_grad()
def kmeans(h, k, generator, restarts=3, iterations=100):
    """Labels (N,) int64, of k clusters of the rows of h (N, D), that the best of `restarts` runs found.

    A run starts from k rows drawn one after the other, each as probable as its squared distance to those
    before (k-means++, Arthur & Vassilvitskii 2007), and alternates assignment and means until no label
    changes, or `iterations` times. A cluster that comes out empty is given the row farthest from its centre.
    Random numbers come from `generator`, on the CPU; memory beyond h is about 2^24 numbers. Raises ValueError
    where k is not from 1 to N, a row is not finite, or restarts or iterations are below 1.
    """
    if not 1 <= k <= len(h):
        raise ValueError(f"{k} clusters of {len(h)} rows: must be from 1 to {len(h)}")
    for name, value in (("restarts", restarts), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    bad = (~h.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"row {bad[0].item()} of {len(h)} is not finite")
    best = None
    best_cost = math.inf
    for _ in range(restarts):
        centres = _start(h, k, generator)
        labels = None
        for _ in range(iterations):
            before = labels
            distance, labels = _nearest(h, centres)
            empty = (labels.bincount(minlength=k) == 0).nonzero()[:, 0]
            labels[distance.topk(len(empty)).indices] = empty
            centres = torch.zeros_like(centres).index_add_(0, labels, h)
            centres /= labels.bincount(minlength=k)[:, None]
            if before is not None and torch.equal(before, labels):
                break
        cost = (h - centres[labels]).square().sum().item()
        if cost < best_cost:
            best = labels
            best_cost = cost
    return best


def _start(h, k, generator):
    centres = h[torch.randint(len(h), (1,), generator=generator)]
    distance = (h - centres).square().sum(1)
    while len(centres) < k:
        at = torch.multinomial(distance.cpu().double() + 1e-12, 1, generator=generator)
        centres = torch.cat([centres, h[at]])
        distance = distance.minimum((h - centres[-1]).square().sum(1))
    return centres


def _nearest(h, centres):
    """Distance (N,) of each row to the nearest of `centres` (k, D), and which one it is."""
    parts = [torch.cdist(rows, centres).min(1) for rows in h.split(max(1, 2**24 // len(centres)))]
    return [torch.cat(v) for v in zip(*parts)]
