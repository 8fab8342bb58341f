"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690), the standard version, for linf and l2.

Four attacks in turn, each on the points that still stand: APGD on the cross-entropy; APGD-T on the targeted
DLR loss, nine targets; FAB-T (Croce & Hein 2020, arXiv 1907.02044), nine targets; Square (Andriushchenko et
al. 2020, arXiv 1912.00049), 5000 queries. No number is to be tuned.

It makes the decisions of the official code under the same seed and batches. To be faster than that, a point
stops at its first success and leaves the batch, and no gradient of a weight is made. Points do not influence
each other in eval mode, so this changes rounding only; `stop=False` in `apgd` and `fab` runs every point to
the end as the official code does. FAB asks once, not twice, for a point that it has just tried. A point that
stands to the end costs 8,900 passes, a backward one counted as one, of the official 10,700: where many stand,
little is saved.
"""
import contextlib
import math
import time
import warnings

import torch
import torch.nn.functional as F

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "apgd": ("apgd-ce", "apgd-t"),  # a fifth of the passes; say that it is not AutoAttack
}
TARGETS = 9


def autoattack(net, x, y, eps, norm="linf", version="standard", seed=0, batch_size=250, fast=False, log=None):
    """Attack the logits `net(x)` (N, C), C >= 2, of the images x (N, 3, H, W) in [0, 1] with labels y (N,).

    eps         radius in units of x, > 0; norm "linf" or "l2".
    version     a key of VERSIONS, or a tuple of stages.
    seed        of every (stage, batch). The batches matter too: their points share a Square's positions.
    batch_size  the surviving points are packed into batches of this size before each stage.
    fast        search under bf16 autocast. Only fp32 decides what counts, but what bf16 misses is lost: name
                it with the result. Otherwise autocast is off inside; TF32 is as the caller has set it.
    log         called with a line of text after each stage.

    Returns x_adv (N, 3, H, W) and a report. x_adv is misclassified, and within eps and [0, 1], wherever
    anything was found, and x elsewhere: each find is checked again, apart from the attack. The report holds
    plain types: accuracies in per cent (`clean`, `robust`, and `robust` after each of `stages`), images sent
    forward and backward, seconds, and `warnings`, which are also raised as Python warnings.

    Eval mode is forced inside; modes, gradients and the global random state are left as they were. The memory
    format of x is kept. Raises ValueError for an input that it cannot judge.
    """
    stages = VERSIONS.get(version, version) if isinstance(version, str) else tuple(version)
    if isinstance(stages, str) or any(s not in STAGES for s in stages):
        raise ValueError(f"version {version!r}: {', '.join(VERSIONS)}, or a tuple of {', '.join(STAGES)}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm {norm!r}: choose linf or l2")
    if not eps > 0 or not batch_size > 0:
        raise ValueError(f"eps and batch_size must be positive, got {eps} and {batch_size}")
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{len(x)} images and {len(y)} labels: as many of both, and at least one")
    if not x.is_floating_point() or x.dim() != 4 or x.shape[2] != x.shape[3] or x.shape[2] < 5:
        raise ValueError(f"images are {x.dtype} {tuple(x.shape)}; they must be float (N, C, H, H), H >= 5")
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError("images must be in [0, 1]; normalisation is the network's first layer")
    x, y = x.detach(), y.to(x.device)
    found, report = [], {"norm": norm, "eps": eps, "seed": seed, "batch_size": batch_size, "images": len(x),
                         "precision": "bf16 search, fp32 verified" if fast else "fp32"}
    sizes = [math.ceil(batch_size * part / 16) for part in (1, 2, 3, 4, 6, 8, 12, 16)]
    sizes = () if x.device.type == "cpu" else sizes
    with eval_mode(net):
        search, judge = Queries(net, sizes, fast), Queries(net, sizes)
        with torch.no_grad():
            logits = torch.cat([judge(part) for part in x.split(batch_size)])
        if logits.dim() != 2 or not logits.isfinite().all():
            raise ValueError("the network must give finite logits (N, C)")
        if y.min() < 0 or y.max() >= logits.shape[1]:
            raise ValueError(f"labels go from {y.min()} to {y.max()}, for {logits.shape[1]} classes")
        if logits.shape[1] < 4 and "apgd-t" in stages:
            found.append("fewer than 4 classes: the targeted DLR loss does not exist, apgd-t is left out")
            stages = tuple(s for s in stages if s != "apgd-t")
        standing = logits.argmax(1) == y
        found += misuse(judge, x[:batch_size], y[:batch_size], logits[:batch_size])
        x_adv, percent = x.clone(), 100 / len(x)
        report.update(clean=percent * int(standing.sum()), stages={})
        for name in stages:
            began, before, search.forwards, search.backwards = time.time(), int(standing.sum()), 0, 0
            for rows in standing.nonzero().squeeze(1).split(batch_size):
                generator = torch.Generator().manual_seed(seed)
                adv = STAGES[name](search, x[rows], y[rows], eps, norm, generator)
                with torch.no_grad():
                    fooled = (judge(adv).argmax(1) != y[rows]) & inside(adv, x[rows], eps, norm)
                x_adv[rows[fooled]] = adv[fooled]
                standing[rows[fooled]] = False
            after, seconds = int(standing.sum()), round(time.time() - began, 2)
            report["stages"][name] = {
                "points": before, "robust": percent * after, "forwards": search.forwards,
                "backwards": search.backwards, "seconds": seconds}
            if log:
                log(f"{name}: {after} of {len(x)} stand ({percent * after:.2f} %), {seconds:.1f} s")
            if name == "square" and name != stages[0] and percent * (before - after) > 0.2:
                found.append(f"Square, which sees no gradient, fooled {before - after} points that stood all "
                             "before it: the network masks its gradients")
    for text in found:
        warnings.warn(text, stacklevel=2)
    return x_adv, report | {"robust": percent * int(standing.sum()), "warnings": found}


def misuse(net, x, y, logits):
    """Why a figure for `net` may mean nothing: a list of sentences, from one batch and its logits."""
    found = []
    with torch.no_grad():
        unit = [F.normalize(net(x), dim=1) for _ in range(5)]
    if any((u - unit[0]).norm(dim=1).max() > 1e-4 for u in unit):
        found.append("the network is random: the same images give different logits; average over draws (EOT)")
    if logits.min() >= 0 and logits.max() <= 1 and (logits.sum(1) - 1).abs().max() < 1e-5:
        found.append("the network seems to give probabilities: give the logits before the softmax")
    right = logits.argmax(1) == y
    if logits.shape[1] >= 4 and right.any():
        t = logits[right].argsort(1)[:, -2]
        _, _, g = net.gradient(x[right], lambda z: dlr_targeted(z, y[right], t))
        zero = int((g.flatten(1).abs().amax(1) == 0).sum())
        if zero:
            found.append(f"the gradient is exactly zero for {zero} of {len(g)} images: it tells nothing")
    return found


class Queries:
    """`net` as an attack asks it: logits in float32 or finer, and passes of images counted.

    sizes  batches are filled up with zeros to the next of them (ascending). On an accelerator each new shape
           starts cuDNN's and a compiler's tuning again, and every point that falls makes a new shape.
    fast   under bf16 autocast.
    """

    def __init__(self, net, sizes=(), fast=False):
        self.net, self.sizes, self.fast, self.forwards, self.backwards = net, sizes, fast, 0, 0

    def __call__(self, x):
        self.forwards += len(x)
        size = next((s for s in self.sizes if s >= len(x)), len(x))
        padded = x if size == len(x) else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fast):
            logits = self.net(padded)[: len(x)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def gradient(self, x, loss):
        """Logits, loss(logits) (n,), and its gradient with respect to x."""
        self.backwards += len(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self(x)
            value = loss(logits)
            (g,) = torch.autograd.grad(value.sum(), x)
        return logits.detach(), value.detach(), g


# ----------------------------------------------------------------------------------------------------------
# Geometry and losses
# ----------------------------------------------------------------------------------------------------------
def length(d, norm):
    """The norm of each d (n, ...), as (n, 1, ...)."""
    flat = d.flatten(1)
    return column(flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt(), d)


def column(v, like):
    """(n,) -> (n, 1, ...), to broadcast against `like`."""
    return v.view(-1, *[1] * (like.dim() - 1))


def project(z, x, eps, norm):
    """z in the eps-ball around x (l2: by rescaling), then in [0, 1]."""
    if norm == "linf":
        return z.maximum(x - eps).minimum(x + eps).clamp(0, 1)
    far = length(z - x, norm)
    return (x + (z - x) / (far + 1e-12) * far.clamp_max(eps)).clamp(0, 1)


def inside(z, x, eps, norm):
    """(n,) whether z lies within eps of x, float32 rounding aside, and in [0, 1]."""
    near = length(z - x, norm).flatten() <= eps * (1 + 1e-5) + 1e-6
    return near & (z.flatten(1).amin(1) >= 0) & (z.flatten(1).amax(1) <= 1)


def cross_entropy(z, y, t=None):
    return F.cross_entropy(z, y, reduction="none")


def dlr_targeted(z, y, t):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), sorted descending: logits z (n, C) -> (n,). Eq. 7."""
    top = z.topk(4, dim=1).values
    gap = z.gather(1, y[:, None]) - z.gather(1, t[:, None])
    return -gap.squeeze(1) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def margin(z, y):
    """z_y less the largest other logit, (n,); not above 0 where misclassified."""
    z_y = z.gather(1, y[:, None])
    return (z_y - z.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1)


def due(i, every):
    """Whether fallen points leave after iteration i: often at first, then seldom: it is a host sync."""
    return i < 10 or i % every == 0


def targeted(run, net, x, y):
    """`run(x, y, t) -> (x_adv, fooled)` with t the 2nd, 3rd, ... clean class, on what stands."""
    x_adv, rows = x.clone(), torch.arange(len(x), device=x.device)
    with torch.no_grad():
        order = net(x).argsort(1)
    for rank in range(2, min(TARGETS + 1, order.shape[1]) + 1):
        adv, fooled = run(x[rows], y[rows], order[rows, -rank])
        x_adv[rows[fooled]] = adv[fooled]
        rows = rows[~fooled]
        if not len(rows):
            break
    return x_adv


# ----------------------------------------------------------------------------------------------------------
# APGD
# ----------------------------------------------------------------------------------------------------------
def checkpoints(steps):
    """{iteration, from 1: distance to the one before}, where the step may be halved: 22, 19, ... %."""
    gap, at, gaps = max(int(0.22 * steps), 1), 0, {}
    while at + gap <= steps:
        at += gap
        gaps[at] = gap
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return gaps


@torch.no_grad()
def apgd(net, x, y, eps, norm, loss, generator, t=None, steps=100, stop=True):
    """Ascend loss(logits, y, t) with momentum and a step that halves itself (Alg. 1).

    Returns (x_adv, fooled): x_adv the first misclassified iterate, or the last one if not `stop`.
    """
    noise = torch.rand if norm == "linf" else torch.randn
    noise = noise(x.shape, generator=generator, dtype=x.dtype).to(x)
    noise = 2 * noise - 1 if norm == "linf" else noise
    z = (x + eps * (noise / (length(noise, norm) + 1e-12))).clamp(0, 1)
    logits, value, g = net.gradient(z, lambda z: loss(z, y, t))
    wrong = logits.argmax(1) != y
    out, fooled, rows = x.clone(), torch.zeros_like(wrong), torch.arange(len(x), device=x.device)
    t, adv, z_prev, gaps = y if t is None else t, z, z, checkpoints(steps)
    best, best_z, best_g, checked, halved = value, z, g, value, torch.ones_like(wrong)
    step, rises, last = torch.full_like(value, 2 * eps), torch.zeros_like(value), torch.zeros_like(value)
    # `last` starts at 0 as in the official code: a positive first loss counts as a rise.
    for i in range(steps):
        if stop and due(i, 5):
            out[rows[wrong]], fooled[rows[wrong]] = adv[wrong], True
            if wrong.all():
                break
            if wrong.any():
                (rows, x, y, t, z, z_prev, g, adv, best, best_z, best_g,
                 checked, halved, step, rises, last, wrong) = (v[~wrong] for v in (
                     rows, x, y, t, z, z_prev, g, adv, best, best_z, best_g,
                     checked, halved, step, rises, last, wrong))
        a = 0.75 if i else 1.0
        ascent = g.sign() if norm == "linf" else g / (length(g, norm) + 1e-12)
        w = project(z + column(step, z) * ascent, x, eps, norm)
        z, z_prev = project(z + (w - z) * a + (z - z_prev) * (1 - a), x, eps, norm), z
        logits, value, g = net.gradient(z, lambda z: loss(z, y, t))
        new = logits.argmax(1) != y
        adv = torch.where(column(new & ~wrong if stop else new, z), z, adv)
        wrong = wrong | new
        rises, last = rises + (value > last), value
        better = value > best
        best, best_z = best.maximum(value), torch.where(column(better, z), z, best_z)
        best_g = torch.where(column(better, z), g, best_g)
        if i + 1 in gaps:
            halve = (rises <= 0.75 * gaps[i + 1]) | (~halved & (checked >= best))
            step = torch.where(halve, step / 2, step)
            z, g = torch.where(column(halve, z), best_z, z), torch.where(column(halve, z), best_g, g)
            rises, checked, halved = torch.zeros_like(rises), best, halve
    out[rows[wrong]], fooled[rows[wrong]] = adv[wrong], True
    return out, fooled


def apgd_ce(net, x, y, eps, norm, generator, stop=True):
    return apgd(net, x, y, eps, norm, cross_entropy, generator, stop=stop)[0]


def apgd_t(net, x, y, eps, norm, generator, stop=True):
    def run(x, y, t):
        return apgd(net, x, y, eps, norm, dlr_targeted, generator, t, stop=stop)

    return targeted(run, net, x, y)


# ----------------------------------------------------------------------------------------------------------
# FAB
# ----------------------------------------------------------------------------------------------------------
def to_plane(x, w, b, norm):
    """The least move d, in `norm`, with x + d in [0, 1]^D and on the plane <w, x + d> = b; where no such d
    exists, the one that comes nearest. x, w (n, D), b (n, 1) -> d (n, D).

    Coordinate i moves min(s u_i, room_i) towards the plane, u_i = 1 (linf) or |w_i| (l2). The gain
    sum |w_i| min(s u_i, room_i) is concave in s, so Newton's method from s = 0 rises to the root without
    passing it, and is there once no further coordinate reaches its room.
    """
    off = (w * x).sum(1, keepdim=True) - b
    to = -off.sign() * w.sign()
    room = torch.where(to > 0, 1 - x, torch.where(to < 0, x, 0.0))
    a, off = w.abs(), off.abs()
    u = torch.ones_like(a) if norm == "linf" else a
    s = torch.zeros_like(off)
    while True:
        free = room > s * u
        rest = off - torch.where(free, 0.0, a * room).sum(1, keepdim=True)
        rate = torch.where(free, a * u, 0.0).sum(1, keepdim=True)
        new = torch.where(rate > 0, rest / rate, s).maximum(s)
        if not (new > s).any():
            break
        s = new
    move = torch.where(rate > 0, (s * u).minimum(room), room)
    return to * move


@torch.no_grad()
def fab(net, x, y, t, eps, norm, steps=100, stop=True):
    """Walk to the linearised boundary between the classes y and t, staying near x (Alg. 1, targeted).

    Returns (x_adv, fooled): x_adv the first misclassified iterate within eps, or the closest if not `stop`.
    """
    def ask(z, y, t):
        return net.gradient(z, lambda q: (q.gather(1, t[:, None]) - q.gather(1, y[:, None])).squeeze(1))

    out, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    rows, z, adv = torch.arange(len(x), device=x.device), x, x
    best = torch.full_like(x[:, 0, 0, 0], torch.inf)
    _, f, g = ask(z, y, t)
    for i in range(steps):
        near = best <= eps
        if stop and due(i, 5):
            out[rows[near]], fooled[rows[near]] = adv[near], True
            if near.all():
                break
            if near.any():
                rows, x, y, t, z, f, g, adv, best, near = (
                    v[~near] for v in (rows, x, y, t, z, f, g, adv, best, near))
        w = g.flatten(1)
        b = (w * z.flatten(1)).sum(1, keepdim=True) - f[:, None]
        d1, d2 = (to_plane(v.flatten(1), w, b, norm).view_as(v) for v in (z, x))
        l1, l2 = (length(d, norm).clamp_min(1e-8) for d in (d1, d2))
        alpha = (l1 / (l1 + l2)).clamp_max(0.1)
        z = ((1 - alpha) * (z + 1.05 * d1) + alpha * (x + 1.05 * d2)).clamp(0, 1)
        logits, f, g = ask(z, y, t)  # the next step's too, but where z steps back
        wrong, far = logits.argmax(1) != y, length(z - x, norm).flatten()
        closer = wrong & (far < best) & ~(near & stop)
        adv, best = torch.where(column(closer, z), z, adv), torch.where(closer, far, best)
        z = torch.where(column(wrong, z), x + 0.9 * (z - x), z)
        if wrong.any():
            _, f[wrong], g[wrong] = ask(z[wrong], y[wrong], t[wrong])
    near = best <= eps
    out[rows[near]], fooled[rows[near]] = adv[near], True
    return out, fooled


def fab_t(net, x, y, eps, norm, generator, stop=True):
    return targeted(lambda x, y, t: fab(net, x, y, t, eps, norm, stop=stop), net, x, y)


# ----------------------------------------------------------------------------------------------------------
# Square
# ----------------------------------------------------------------------------------------------------------
def share(i):
    """The part of the image that query i changes: 0.8, halved at seven moments of the 5000 queries."""
    return 0.8 / 2 ** sum(i > at for at in (10, 50, 200, 500, 1000, 2000, 4000))


@torch.no_grad()
def square(net, x, y, eps, norm, generator, queries=5000):
    """Random search by squares (Alg. 1 with Alg. 2 or 3): keep what lowers the margin. Stops at the first
    success. Position and size are those of the whole batch."""
    side = x.shape[2]

    def sign(*shape):
        return (2 * torch.rand(shape, generator=generator) - 1).sign().to(x, non_blocking=True)

    def position(s):
        return [int((side - s) * torch.rand([], generator=generator)) for _ in range(2)]

    out, rows = x.clone(), torch.arange(len(x), device=x.device)
    z = square_start(x, eps, norm, sign, generator)
    best = margin(net(z), y)
    for i in range(queries):
        # In l2 a query draws as many numbers as points stand, so there they must be counted each time.
        if due(i, 50 if norm == "linf" else 1):
            down = best <= 0
            out[rows[down]] = z[down]
            if down.all():
                break
            if down.any():
                rows, x, y, z, best = (v[~down] for v in (rows, x, y, z, best))
        s = round(math.sqrt(share(i)) * side)
        if norm == "linf":
            s = max(s, 1)
            (top, left), signs = position(s), sign(x.shape[1], 1, 1)
            at = (..., slice(top, top + s), slice(left, left + s))
            old = z[at].clone()
            z[at] = project(old + 2 * eps * signs, x[at], eps, norm)
        else:
            s = max(s, 3) | 1
            at, old = ..., z
            z = square_l2(z, x, eps, s, position, sign, generator)
        new = margin(net(z), y)
        better = ((new < best) | (new <= 0)) & (best > 0)
        z[at] = torch.where(column(better, z), z[at], old)
        best = torch.where(better, new, best)
    down = best <= 0
    out[rows[down]] = z[down]
    return out


def square_start(x, eps, norm, sign, generator):
    """linf: vertical stripes, one pixel wide. l2: 5 x 5 tiles of `eta`, rescaled to length eps."""
    n, c, h, w = x.shape
    if norm == "linf":
        return (x + eps * sign(n, c, 1, w)).clamp(0, 1)
    d, s = torch.zeros_like(x), h // 5
    begin = (h - 5 * s) // 2
    for top in range(begin, begin + s * (h // s), s):
        for left in range(begin, begin + s * (w // s), s):
            d[:, :, top : top + s, left : left + s] = eta(s, generator).to(x) * sign(n, c, 1, 1)
    return (x + eps * d / (length(d, "l2") + 1e-12)).clamp(0, 1)


def square_l2(z, x, eps, s, position, sign, generator):
    """Move the perturbation's mass of one window into another, in a new pattern (Alg. 3)."""
    n, c = x.shape[:2]
    d = z - x
    to, source = ((..., slice(a, a + s), slice(b, b + s)) for a, b in (position(s), position(s)))
    moved = torch.zeros_like(d)
    moved[to], moved[source] = d[to], d[source]
    available = moved.square().sum((2, 3), keepdim=True)
    unused = (eps**2 - length(d, "l2").square()).clamp_min(0)
    pattern = eta(s, generator).to(x) * sign(n, c, 1, 1) + unit(d[to])
    pattern = unit(pattern) * (unused / c + available).sqrt()
    d[source] = 0
    d[to] = pattern
    return (x + eps * d / (length(d, "l2") + 1e-12)).clamp(0, 1)


def unit(d):
    """Each channel of d (n, c, s, s), divided by its l2 norm."""
    return d / (1e-12 + d.square().sum((2, 3), keepdim=True).sqrt())


def eta(s, generator):
    """(s, s) of unit length: a positive pyramid beside a negative one, flipped by chance (Eq. 2)."""
    def pyramid(h, w):
        far = torch.maximum((torch.arange(h) - h // 2).abs()[:, None], (torch.arange(w) - w // 2).abs())
        steps = 1 / torch.arange(1.0, max(h, w) // 2 + 2).square()
        steps = steps.flip(0).cumsum(0).flip(0)[far]
        return steps / steps.norm()

    both = torch.cat([pyramid(s // 2, s), -pyramid(s - s // 2, s)])
    both = both / both.norm()
    return both.T if torch.rand([], generator=generator) > 0.5 else both


STAGES = {"apgd-ce": apgd_ce, "apgd-t": apgd_t, "fab-t": fab_t, "square": square}


@contextlib.contextmanager
def eval_mode(net):
    """Eval mode for all modules of `net` inside the block (none, if it is a mere function)."""
    modes = [(m, m.training) for m in net.modules()] if isinstance(net, torch.nn.Module) else []
    try:
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for m, mode in modes:
            m.training = mode
