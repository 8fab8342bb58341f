"""k-means on the device: Lloyd's algorithm from k-means++ starts."""
import math

import torch


@torch.no_grad()
def kmeans(h, k, generator, restarts=3, iterations=100):
    """Labels (N,) int64, of k clusters of the rows of h (N, D), floats, that the best of `restarts` runs
    found. No cluster is empty.

    A run starts from k rows drawn one after the other, each as probable as its squared distance to those
    before (k-means++, Arthur & Vassilvitskii 2007), and alternates assignment and means until no label
    changes, or `iterations` times. A cluster that comes out empty is given the row farthest from its centre,
    of those that are not alone in theirs. Random numbers come from `generator`, on the CPU; memory beyond h
    is about 2 N D + 2^24 numbers. Rows in half precision are computed with in float32.

    Raises ValueError where h is not (N, D) or no floats, k is not from 1 to N, a row is not finite, fewer
    than k rows differ, or restarts or iterations are below 1.
    """
    if h.dim() != 2 or not h.is_floating_point():
        raise ValueError(f"rows to cluster are {tuple(h.shape)} {h.dtype}: must be (N, D), floats")
    if not 1 <= k <= len(h):
        raise ValueError(f"{k} clusters of {len(h)} rows: must be from 1 to {len(h)}")
    for name, value in (("restarts", restarts), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    bad = (~h.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"row {bad[0].item()} of {len(h)} is not finite")
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    h = h - h.mean(0)  # distances are made of products, in which a large offset would drown them
    best = None
    best_cost = math.inf
    for _ in range(restarts):
        centres = _start(h, k, generator)
        labels = None
        for _ in range(iterations):
            before = labels
            distance, labels = _nearest(h, centres)
            _fill_empty(labels, distance, k)
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
    """k rows of h (N, D), all different, as centres (k, D)."""
    centres = h[torch.randint(len(h), (1,), generator=generator)]
    distance = (h - centres).square().sum(1)
    while len(centres) < k:
        weight = distance.cpu().double()
        if not weight.any():
            raise ValueError(f"{k} clusters of {len(h)} rows, of which only {len(centres)} differ: there "
                             "must be as many different rows as clusters")
        at = torch.multinomial(torch.where(weight > 0, weight + 1e-12, 0.0), 1, generator=generator)
        centres = torch.cat([centres, h[at]])
        distance = distance.minimum((h - centres[-1]).square().sum(1))
    return centres


def _fill_empty(labels, distance, k):
    """Move rows into the empty ones of k clusters, in place: the farthest ones, by `distance` (N,), whose
    clusters do not become empty thereby."""
    counts = labels.bincount(minlength=k)
    for c in (counts == 0).nonzero()[:, 0].tolist():
        at = distance.masked_fill(counts[labels] == 1, -1).argmax()
        counts[labels[at]] -= 1
        counts[c] = 1
        labels[at] = c


def _nearest(h, centres):
    """Distance (N,) of each row to the nearest of `centres` (k, D), and which one it is."""
    parts = [torch.cdist(rows, centres).min(1) for rows in h.split(max(1, 2**24 // len(centres)))]
    return [torch.cat(v) for v in zip(*parts)]
