"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690), the standard version, for linf and l2.

Four attacks in turn, each on the points that still stand: APGD on the cross-entropy; APGD-T on the
targeted DLR loss, nine targets; FAB-T (Croce & Hein 2020, arXiv 1907.02044), nine targets; Square
(Andriushchenko et al. 2020, arXiv 1912.00049), 5000 queries. No number is to be tuned.

It makes the decisions of the official code under the same seed and batches, faster. A point stops
at its first success and leaves the batch; no gradient of a weight is made; where few points stand,
several targets (FAB) or queries (Square) of each fill the batch. Points do not influence each other
in eval mode, so all this changes rounding only; `stop=False` in `apgd` and `fab` runs every point
to the end as the official code does. A point that stands to the end costs 10,000 passes, a backward
one counted as one, of the official 10,700.

For a random network there is version `rand`: APGD on the cross-entropy and on the DLR loss, with gradients
averaged over 20 draws (EOT). Here, as in the official code, every point runs to the end and its last
misclassified iterate counts, if another draw misclassifies it too.

Logits of an attacked image that are not all finite speak for no class: they count as misclassified.
"""
import math
import numbers
import time
import warnings

import torch
import torch.nn.functional as F

from common.pgd import direction, eval_mode, pixels_only

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "apgd": ("apgd-ce", "apgd-t"),  # a fifth of the passes; say that it is not AutoAttack
    "rand": ("apgd-ce", "apgd-dlr"),  # for random networks
}
TARGETS = 9
DRAWS = 20  # of which version rand averages the gradient


def autoattack(net, x, y, eps, norm="linf", version="standard", seed=0, batch_size=250, fast=False, log=None):
    """Attack the logits `net(x)` (N, C), C >= 2, of the images x (N, 3, H, H) in [0, 1] with labels y
    (N,).

    net         a module or a function; it gives the logits alone, finite ones for x.
    x           float32 or float64; what lies outside of [0, 1] by rounding (1e-6) is clipped.
    y           integers of any type: a tensor, an array or a list.
    eps         radius in units of x, > 0, for linf at most 1; norm "linf" or "l2".
    version     a key of VERSIONS, or a tuple of stages.
    seed        of every (stage, batch). The batches matter too: their points share a Square's positions.
    batch_size  the surviving points are packed into batches of this size before each stage.
    fast        search under bf16 autocast. Only fp32 decides what counts, but what bf16 misses is lost: name
                it with the result. Otherwise autocast is off inside; TF32 is as the caller has set it.
    log         called with a line of text after each stage.

    Returns x_adv (N, 3, H, H) and a report. x_adv is misclassified, and within eps and [0, 1], wherever
    anything was found, and x elsewhere: each find is checked again, apart from the attack. Finds lie
    just beyond the boundary of `net`, and say little about another network. The report holds plain
    types: accuracies in per cent (`clean`, `robust`, and `robust` after each of `stages`), images sent
    forward and backward, seconds, and `warnings`, which are also raised as Python warnings; and `standing`, a
    list of bool: which images nothing was found for. Finds lie so near to the boundary that rounding in
    another batch, or another draw of a random network, may judge them otherwise.

    Of a module, eval mode is forced inside, and its modes are left as they were; a function runs in the
    mode that you set. Gradients and the global random state are left as they were. The memory format of
    x is kept. Raises ValueError for an input that it cannot judge.
    """
    if isinstance(version, str):
        stages = VERSIONS.get(version, ())
    else:
        stages = tuple(version) if hasattr(version, "__iter__") else ()
    if not stages or any(s not in STAGES for s in stages) or len(set(stages)) < len(stages):
        raise ValueError(f"version {version!r}: {', '.join(VERSIONS)}, or a tuple of {', '.join(STAGES)}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm {norm!r}: choose linf or l2")
    for name, number in (("batch_size", batch_size), ("seed", seed)):
        if not isinstance(number, numbers.Integral):
            raise ValueError(f"{name} must be an integer, got {number!r}")
    if not isinstance(eps, numbers.Real) or not 0 < eps < math.inf or not batch_size > 0:
        raise ValueError(f"eps and batch_size must be positive and finite, got {eps!r} and {batch_size}")
    eps = float(eps)
    seed = int(seed)
    batch_size = int(batch_size)
    check_radius(eps, norm)
    x, y = images_and_labels(x, y)
    if x.dim() != 4 or x.shape[2] != x.shape[3] or x.shape[2] < 5:
        raise ValueError(f"images are {x.dtype} {tuple(x.shape)}; they must be float (N, C, H, H), H >= 5")
    found, report = [], {"norm": norm, "eps": eps, "seed": seed, "batch_size": batch_size, "images": len(x),
                         "precision": "bf16 search, fp32 verified" if fast else "fp32"}
    sizes = [math.ceil(batch_size * part / 16) for part in (1, 2, 3, 4, 6, 8, 12, 16)]
    sizes = () if x.device.type == "cpu" else sizes
    with eval_mode(*[net] if isinstance(net, torch.nn.Module) else []):
        judge = Queries(net, sizes)
        with torch.no_grad():
            logits = torch.cat([judge(part) for part in x.split(batch_size)])
        check_clean(logits, y, batch_size)
        draws = DRAWS if version == "rand" else 1
        search = Queries(net, sizes, fast, batch_size, draws)
        if logits.shape[1] < 3 and "apgd-dlr" in stages:
            found.append("fewer than 3 classes: the DLR loss does not exist, apgd-dlr is left out")
            stages = tuple(s for s in stages if s != "apgd-dlr")
        if logits.shape[1] < 4 and "apgd-t" in stages:
            found.append("fewer than 4 classes: the targeted DLR loss does not exist, apgd-t is left out")
            stages = tuple(s for s in stages if s != "apgd-t")
        standing = ~mistaken(logits, y)
        not_finite = torch.zeros_like(standing)  # points fooled by an image whose logits are not
        found += misuse(judge, x[:batch_size], y[:batch_size], logits[:batch_size], version == "rand")
        x_adv = x.clone()
        x = x.contiguous()
        percent = 100 / len(x)
        report.update(clean=percent * int(standing.sum()), stages={})

        def run(stage, query, points):
            """Attack x[points]. Returns the points that `query` thinks fooled, and `net` is not."""
            denied = [points[:0]]
            for rows in points.split(batch_size) if len(points) else ():
                adv = stage(query, x[rows], y[rows], eps, norm, torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    z = judge(adv)
                fooled = mistaken(z, y[rows]) & inside(adv, x[rows], eps, norm)
                not_finite[rows] = fooled & ~finite(z)
                x_adv[rows[fooled]] = adv[fooled]
                standing[rows[fooled]] = False
                denied.append(rows[(adv != x[rows]).flatten(1).any(1) & ~fooled])
            return torch.cat(denied)

        for name in stages:
            began = time.time()
            before = int(standing.sum())
            exact = Queries(net, sizes, fill=batch_size)
            search.forwards = search.backwards = 0
            denied = run(STAGES[name], search, standing.nonzero().squeeze(1))
            if version != "rand":  # whose points are denied by another draw, not by the precision
                run(STAGES[name], exact, denied)
            after = int(standing.sum())
            seconds = round(time.time() - began, 2)
            report["stages"][name] = {
                "points": before, "robust": percent * after, "forwards": search.forwards + exact.forwards,
                "backwards": search.backwards + exact.backwards, "seconds": seconds}
            if log:
                log(f"{name}: {after} of {len(x)} stand ({percent * after:.2f} %), {seconds:.1f} s")
            if name == "square" and name != stages[0] and percent * (before - after) > 0.2:
                found.append(f"Square, which sees no gradient, fooled {before - after} of {len(x)} points that "
                             "stood all before it: the network may mask its gradients")
    count = int(not_finite.sum())
    if count:
        found.append(f"{count} attacked images gave logits that are not finite: they count as misclassified")
    for text in found:
        warnings.warn(text, stacklevel=2)
    return x_adv, report | {"robust": percent * int(standing.sum()), "warnings": found, "standing": standing.tolist()}


def check_radius(eps, norm):
    """Raises ValueError for an `eps` that was meant in units of 1/255."""
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps is {eps:g} for images in [0, 1], which lets any image become any other; "
                         "it is in their units, such as 8 / 255")


def images_and_labels(x, y):
    """Images x (N, ...) as a float tensor in [0, 1], and labels y as an int64 tensor (N,) beside it;
    both may come as tensors, arrays or lists. Raises ValueError that names what would work."""
    x = as_tensor(x, "images")
    if x.dtype not in (torch.float32, torch.float64):
        hint = "x.float()" if x.is_floating_point() else "they must be float in [0, 1]: x.float() / 255"
        raise ValueError(f"images are {x.dtype} {tuple(x.shape)}, and float32 or float64 is needed; {hint}")
    y = as_tensor(y, "labels")
    hint = None
    if y.dim() == 2 and y.shape[1] > 1:
        hint = "of one-hot labels y.argmax(1)"
    elif y.dim() != 1:
        hint = "y.flatten()"
    elif len(y) and (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        hint = "y.long()"
    if hint:
        raise ValueError(f"labels are {y.dtype} {tuple(y.shape)}; integers (N,) are needed: {hint}")
    if x.dim() < 2:
        raise ValueError(f"images are {x.dtype} {tuple(x.shape)}; they must be (N, ...)")
    if len(x) != len(y) or not x.numel():
        raise ValueError(f"{len(x)} images and {len(y)} labels: as many of both, and at least one")
    low = x.min()
    high = x.max()
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(f"images go from {low:g} to {high:g}, and must be in [0, 1]; "
                         "normalisation is the network's first layer")
    if low < 0 or high > 1:
        x = x.clamp(0, 1)
    return x, y.to(x.device, torch.long)


def as_tensor(v, name):
    """`v` as a tensor without a gradient: a tensor itself, a copy of an array or a list."""
    if isinstance(v, torch.Tensor):
        return v.detach()
    try:
        return torch.tensor(v)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor, an array or a list of numbers: {error}") from error


def check_clean(logits, y, batch_size):
    """Raises ValueError where the clean `logits` (N, C), made in batches, are not finite or lack a
    class of y."""
    bad = (~finite(logits)).nonzero()
    if len(bad):
        image = int(bad[0])
        batch = image // batch_size
        last = min((batch + 1) * batch_size, len(logits)) - 1
        raise ValueError("the network must give finite logits for the clean images; it does not in "
                         f"batch {batch} (images {batch * batch_size} to {last}), first for image {image}")
    if y.min() < 0 or y.max() >= logits.shape[1]:
        raise ValueError(f"labels go from {y.min()} to {y.max()}, for {logits.shape[1]} classes")


def checked(logits, images):
    """What a network returned for so many images, if it is logits (images, C), C >= 2. Raises
    ValueError that says what to return instead."""
    if not isinstance(logits, torch.Tensor):
        hint = ""
        if isinstance(logits, dict) and logits:
            key = "logits" if "logits" in logits else next(iter(logits))
            hint = f", by a module that gives net(x)[{key!r}]"
        elif isinstance(logits, (tuple, list)):
            hint = ", by a module that gives net(x)[0]"
        raise ValueError(f"the network returns a {type(logits).__name__}; "
                         f"it must return the logits (N, C) alone{hint}")
    if logits.dim() != 2 or len(logits) != images:
        raise ValueError(f"the network gives {tuple(logits.shape)} for {images} images; "
                         "it must give logits (N, C)")
    if logits.shape[1] < 2:
        raise ValueError(f"the network gives logits {tuple(logits.shape)}: "
                         "an attack needs two classes or more")
    return logits


def finite(logits):
    """(n,) whether all logits of an image, (n, C), are finite."""
    return logits.isfinite().all(1)


def mistaken(logits, y):
    """(n,) whether the logits (n, C) do not speak for the class y: another is highest, or one is not
    finite (argmax would read NaN as the class that it stands at, 0 where it stands at all)."""
    return (logits.argmax(1) != y) | ~finite(logits)


def misuse(net, x, y, logits, may_be_random=False):
    """Why a figure for `net` may mean nothing: a list of sentences, from one batch and its logits."""
    found = []
    with torch.no_grad():
        unit = [F.normalize(net(x), dim=1) for _ in range(5)]
    if not may_be_random and any((u - unit[0]).norm(dim=1).max() > 1e-4 for u in unit):
        found.append("the network is random: the same images give different logits; average over draws (EOT)")
    if logits.min() >= 0 and logits.max() <= 1 and (logits.sum(1) - 1).abs().max() < 1e-5:
        found.append("the network seems to give probabilities: give the logits before the softmax")
    right = logits.argmax(1) == y
    if right.any():
        _, _, g = net.gradient(x[right], lambda z: margin(z, y[right]))
        zero = (g.flatten(1) == 0).all(1)
        if zero.any():
            found.append(f"the gradient is exactly zero or not finite for {int(zero.sum())} of {len(g)} images: "
                         "it tells nothing")
        _, _, g = net.gradient(x[right], lambda z: F.cross_entropy(z, y[right], reduction="none"))
        saturated = (g.flatten(1) == 0).all(1) & ~zero
        if saturated.any():
            found.append(f"the cross-entropy has no gradient for {int(saturated.sum())} of {len(g)} images, where the "
                         "softmax is saturated: apgd-ce tells nothing of them")
    return found


class Queries:
    """`net` as an attack asks it: logits in float32 or finer, and passes of images counted.

    sizes  batches are filled up with zeros to the next of them (ascending). On an accelerator each new shape
           starts cuDNN's and a compiler's tuning again, and every point that falls makes a new shape.
    fast   under bf16 autocast.
    fill   attacks that have fewer points fill a batch up to so many images: a small one costs more an image.
    draws  a gradient is the mean of that of so many queries; logits and loss are those of the last.
    """

    def __init__(self, net, sizes=(), fast=False, fill=250, draws=1):
        self.net, self.sizes, self.fast, self.fill, self.draws = net, sizes, fast, fill, draws
        self.forwards = self.backwards = 0

    def __call__(self, x):
        self.forwards += len(x)
        size = next((s for s in self.sizes if s >= len(x)), len(x))
        padded = x if size == len(x) else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fast):
            logits = checked(self.net(padded), size)[: len(x)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def gradient(self, x, loss):
        """Logits, loss(logits) (n,), and its gradient with respect to x, 0 where it is not finite: one
        such pixel would make NaN of its length, and so of the next image."""
        mean = torch.zeros_like(x)
        for _ in range(self.draws):
            self.backwards += len(x)
            with torch.enable_grad(), pixels_only():
                x = x.detach().requires_grad_()
                logits = self(x)
                value = loss(logits)
                (g,) = torch.autograd.grad(value.sum(), x)
            mean = mean + g.nan_to_num(0, 0, 0) / self.draws
        return logits.detach(), value.detach(), mean


# ----------------------------------------------------------------------------------------------------------
# Geometry and losses
# ----------------------------------------------------------------------------------------------------------
def length(d, norm):
    """The norm of each d (n, ...), as (n, 1, ...)."""
    flat = d.flatten(1)
    return column(flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt(), d)


def window(corner, side):
    """The index of a square window of images (..., H, W) whose upper left pixel is `corner`."""
    top, left = corner
    return ..., slice(top, top + side), slice(left, left + side)


def keep(mask, *tensors):
    """Of each tensor (N, ...) the entries where `mask` (N,) is true."""
    return [tensor[mask] for tensor in tensors]


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


def dlr(z, y, t=None):
    """-(z_y - max_i!=y z_i) / (z_(1) - z_(3)), sorted descending: logits z (n, C) -> (n,). Eq. 6."""
    top = z.topk(3, dim=1).values
    z_y = z.gather(1, y[:, None]).squeeze(1)
    other = z.scatter(1, y[:, None], -torch.inf).amax(1)
    return -(z_y - other) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(z, y, t):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), sorted descending: logits z (n, C) -> (n,). Eq.
    7."""
    top = z.topk(4, dim=1).values
    gap = z.gather(1, y[:, None]) - z.gather(1, t[:, None])
    return -gap.squeeze(1) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def margin(z, y):
    """z_y less the largest other logit, (n,); not above 0 where misclassified: -inf where not
    finite."""
    z_y = z.gather(1, y[:, None])
    gap = (z_y - z.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1)
    return gap.masked_fill(~finite(z), -torch.inf)


def due(i, every):
    """Whether fallen points leave after iteration i: often at first, then seldom: it is a host sync."""
    return i < 10 or i % every == 0


def targeted(run, net, x, y, fill=0):
    """`run(x, y, t) -> (x_adv, fooled)` with t the 2nd, 3rd, ... clean class, on what stands. As many
    targets go into one run as fit into `fill` images, and at least one."""
    x_adv = x.clone()
    rows = torch.arange(len(x), device=x.device)
    rank = 2
    with torch.no_grad():
        logits = net(x)
        own = logits.gather(1, y[:, None])
        own = torch.where(own == logits.amax(1, keepdim=True), torch.inf, own)  # last, also where another ties
        order = logits.scatter(1, y[:, None], own).argsort(1)
    last = min(TARGETS + 1, order.shape[1])
    while rank <= last and len(rows):
        n = len(rows)
        k = min(max(1, fill // len(rows)), last - rank + 1)
        t = torch.cat([order[rows, -r] for r in range(rank, rank + k)])
        adv, fooled = run(x[rows].repeat(k, 1, 1, 1), y[rows].repeat(k), t)
        found, first = fooled.view(k, n).max(0)
        adv = adv.view(k, *x[rows].shape)[first, torch.arange(n, device=x.device)]
        x_adv[rows[found]] = adv[found]
        rows, rank = rows[~found], rank + k
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

    Returns (x_adv, fooled): x_adv the first misclassified iterate, or the last one if not `stop`. Where a
    gradient is the mean of several draws no point stops: its first success may be luck.
    """
    stop = stop and net.draws == 1
    noise = torch.rand if norm == "linf" else torch.randn
    noise = noise(x.shape, generator=generator, dtype=x.dtype).to(x)
    noise = 2 * noise - 1 if norm == "linf" else noise
    z = (x + eps * (noise / (length(noise, norm) + 1e-12))).clamp(0, 1)
    logits, value, g = net.gradient(z, lambda z: loss(z, y, t))
    wrong = mistaken(logits, y)
    out = x.clone()
    fooled = torch.zeros_like(wrong)
    rows = torch.arange(len(x), device=x.device)
    t, adv, z_prev, gaps = y if t is None else t, z, z, checkpoints(steps)
    best, best_z, best_g, checked, halved = value, z, g, value, torch.ones_like(wrong)
    step = torch.full_like(value, 2 * eps)
    rises = torch.zeros_like(value)
    last = torch.zeros_like(value)
    # `last` starts at 0 as in the official code: a positive first loss counts as a rise.
    for i in range(steps):
        if stop and due(i, 5):
            out[rows[wrong]], fooled[rows[wrong]] = adv[wrong], True
            if wrong.all():
                break
            if wrong.any():
                rows, x, y, t, z, z_prev, g, adv = keep(~wrong, rows, x, y, t, z, z_prev, g, adv)
                best, best_z, best_g = keep(~wrong, best, best_z, best_g)
                checked, halved, step, rises, last = keep(~wrong, checked, halved, step, rises, last)
                wrong = wrong[~wrong]
        a = 0.75 if i else 1.0
        ascent = g.sign() if norm == "linf" else g / (length(g, norm) + 1e-12)
        if norm == "l2":  # of a nearly saturated softmax; there the official code's steps have no length
            ascent = torch.where(length(g, norm) < 1e-6, direction(g, z, norm), ascent)
        w = project(z + column(step, z) * ascent, x, eps, norm)
        moved = project(z + (w - z) * a + (z - z_prev) * (1 - a), x, eps, norm)
        z_prev = z
        z = moved
        logits, value, g = net.gradient(z, lambda z: loss(z, y, t))
        new = mistaken(logits, y)
        adv = torch.where(column(new & ~wrong if stop else new, z), z, adv)
        wrong = wrong | new
        rises = rises + (value > last)
        last = value
        better = value > best
        best = torch.where(better, value, best)
        best_z = torch.where(column(better, z), z, best_z)
        best_g = torch.where(column(better, z), g, best_g)
        if i + 1 in gaps:
            halve = (rises <= 0.75 * gaps[i + 1]) | (~halved & (checked >= best))
            step = torch.where(halve, step / 2, step)
            g = torch.where(column(halve, z), best_g, g)
            z = torch.where(column(halve, z), best_z, z)
            rises, checked, halved = torch.zeros_like(rises), best, halve
    out[rows[wrong]], fooled[rows[wrong]] = adv[wrong], True
    return out, fooled


def apgd_ce(net, x, y, eps, norm, generator, stop=True):
    return apgd(net, x, y, eps, norm, cross_entropy, generator, stop=stop)[0]


def apgd_dlr(net, x, y, eps, norm, generator, stop=True):
    return apgd(net, x, y, eps, norm, dlr, generator, stop=stop)[0]


def apgd_t(net, x, y, eps, norm, generator, stop=True):
    def run(x, y, t):
        return apgd(net, x, y, eps, norm, dlr_targeted, generator, t, stop=stop)

    return targeted(run, net, x, y)


# ----------------------------------------------------------------------------------------------------------
# FAB
# ----------------------------------------------------------------------------------------------------------
def to_plane(x, w, b, norm):
    """The least move d, in `norm`, with x + d in [0, 1]^D and on the plane <w, x + d> = b; where no
    such d exists, the one that comes nearest. x, w (n, D), b (n, 1) -> d (n, D).

    Coordinate i moves min(s u_i, room_i) towards the plane, u_i = 1 (linf) or |w_i| (l2). The gain sum
    |w_i| min(s u_i, room_i) is concave in s, so Newton's method from s = 0 rises to the root without
    passing it, and is there once no further coordinate reaches its room.
    """
    off = (w * x).sum(1, keepdim=True) - b
    to = -off.sign() * w.sign()
    room = to * ((1 + to) / 2 - x)  # to the face on that side
    a = w.abs()
    off = off.abs()
    u = torch.ones_like(off) if norm == "linf" else a
    gain, slope, s = a * room, a * u, torch.zeros_like(off)
    while True:
        stuck = (room <= s * u).to(x)
        rest = off - (gain * stuck).sum(1, keepdim=True)
        rate = (slope * (1 - stuck)).sum(1, keepdim=True)
        new = torch.where(rate > 0, rest / rate, s).maximum(s)
        if not (new > s).any():
            break
        s = new
    move = torch.where(rate > 0, (s * u).minimum(room), room)
    return to * move


@torch.no_grad()
def fab(net, x, y, t, eps, norm, steps=100, stop=True):
    """Walk to the linearised boundary between the classes y and t, staying near x (Alg. 1, targeted).

    Returns (x_adv, fooled): x_adv the first misclassified iterate within eps, or the closest if not
    `stop`.
    """
    out = x.clone()
    fooled = torch.zeros_like(y, dtype=torch.bool)
    rows, z, adv = torch.arange(len(x), device=x.device), x, x
    best = torch.full_like(x[:, 0, 0, 0], torch.inf)
    for i in range(steps):
        near = best <= eps
        if stop and due(i, 5):
            out[rows[near]], fooled[rows[near]] = adv[near], True
            if near.all():
                break
            if near.any():
                rows, x, y, t, z, adv, best, near = keep(~near, rows, x, y, t, z, adv, best, near)
        _, f, g = net.gradient(z, lambda q: (q.gather(1, t[:, None]) - q.gather(1, y[:, None])).squeeze(1))
        f = f.nan_to_num(0, 0, 0)  # of logits that are not finite; with the gradient 0, a step towards x
        w = g.flatten(1)
        b = (w * z.flatten(1)).sum(1, keepdim=True) - f[:, None]
        d1 = to_plane(z.flatten(1), w, b, norm).view_as(z)
        d2 = to_plane(x.flatten(1), w, b, norm).view_as(x)
        l1 = length(d1, norm).clamp_min(1e-8)
        l2 = length(d2, norm).clamp_min(1e-8)
        alpha = (l1 / (l1 + l2)).clamp_max(0.1)
        z = ((1 - alpha) * (z + 1.05 * d1) + alpha * (x + 1.05 * d2)).clamp(0, 1)
        wrong = mistaken(net(z), y)
        far = length(z - x, norm).flatten()
        closer = wrong & (far < best) & ~(near & stop)
        adv = torch.where(column(closer, z), z, adv)
        best = torch.where(closer, far, best)
        z = torch.where(column(wrong, z), x + 0.9 * (z - x), z)
    near = best <= eps
    out[rows[near]], fooled[rows[near]] = adv[near], True
    return out, fooled


def fab_t(net, x, y, eps, norm, generator, stop=True):
    return targeted(lambda x, y, t: fab(net, x, y, t, eps, norm, stop=stop), net, x, y, net.fill)


# ----------------------------------------------------------------------------------------------------------
# Square
# ----------------------------------------------------------------------------------------------------------
def share(i):
    """The part of the image that query i changes: 0.8, halved at seven moments of the 5000 queries."""
    return 0.8 / 2 ** sum(i > at for at in (10, 50, 200, 500, 1000, 2000, 4000))


@torch.no_grad()
def square(net, x, y, eps, norm, generator, queries=5000):
    """Random search by squares (Alg. 1 with Alg. 2 or 3): keep what lowers the margin. Stops at the
    first success. Position and size are those of the whole batch."""
    search = square_linf if norm == "linf" else square_l2
    return search(net, x, y, eps, generator, queries)


def signs(shape, generator):
    return (2 * torch.rand(shape, generator=generator) - 1).sign()


def position(side, s, generator):
    return [int((side - s) * torch.rand([], generator=generator)) for _ in range(2)]


def square_linf(net, x, y, eps, generator, queries):
    """Start with vertical stripes, one pixel wide; a query gives each channel of a square one sign
    (Alg. 2).

    Few queries are kept. So each point asks several at once, all from where it stands, takes the first
    that is better, and goes on behind that one: the same walk, in larger batches, which cost less an
    image.
    """
    n, c, side, _ = x.shape
    out = x.clone()
    rows = torch.arange(len(x), device=x.device)
    z = (x + eps * signs((n, c, 1, side), generator).to(x)).clamp(0, 1)
    sizes = [max(round(math.sqrt(share(i)) * side), 1) for i in range(queries)]
    draws = [(*position(side, s, generator), signs((c, 1, 1), generator)) for s in sizes]
    corner = torch.tensor([d[:2] for d in draws]).to(x.device)
    step = (2 * eps * torch.stack([d[2] for d in draws])).to(x)
    size = torch.tensor(sizes, device=x.device)
    low = (x - eps).clamp_min(0)
    high = (x + eps).clamp_max(1)
    pixel = torch.arange(side, device=x.device)
    best = margin(net(z), y)
    i = torch.zeros_like(y)  # each point's next query
    turn = 0
    while True:
        if due(turn, 10):
            down, stay = best <= 0, (best > 0) & (i < queries)
            out[rows[down]] = z[down]
            if not stay.any():
                return out
            if not stay.all():
                rows, low, high, y, z, best, i = keep(stay, rows, low, high, y, z, best, i)
        ahead = max(1, min(8, net.fill // len(y), turn // 50))  # at first many are kept
        ask = (i[:, None] + torch.arange(ahead, device=x.device)).clamp_max(queries - 1)  # (n, ahead)
        across = (pixel >= corner[ask, :, None]) & (pixel < corner[ask, :, None] + size[ask, None, None])
        within = across[:, :, 0, :, None] & across[:, :, 1, None, :]
        moved = z[:, None] + step[ask] * within[:, :, None].to(x)  # (n, ahead, c, side, side)
        moved = moved.clamp(low[:, None], high[:, None])
        new = margin(net(moved.flatten(0, 1)), y.repeat_interleave(ahead)).view(-1, ahead)
        better = ((new < best[:, None]) | (new <= 0)) & (best[:, None] > 0)
        found, first = better.max(1)
        at = torch.arange(len(y), device=x.device), first
        i = i + torch.where(found, first + 1, ahead)
        z = torch.where(column(found, z), moved[at], z)
        best = torch.where(found, new[at], best)
        turn += 1


def square_l2(net, x, y, eps, generator, queries):
    """Start with 5 x 5 tiles of `eta`, rescaled to length eps; a query moves the mass of one window
    into another, in a new pattern (Alg. 3)."""
    n, c, side, _ = x.shape
    out = x.clone()
    rows = torch.arange(len(x), device=x.device)
    d = torch.zeros_like(x)
    s = side // 5
    edge = (side - 5 * s) // 2
    for top in range(edge, edge + 5 * s, s):
        for left in range(edge, edge + 5 * s, s):
            tile = eta(s, generator) * signs((n, c, 1, 1), generator)
            d[:, :, top : top + s, left : left + s] = tile.to(x)
    z = (x + eps * d / (length(d, "l2") + 1e-12)).clamp(0, 1)
    best = margin(net(z), y)
    for i in range(queries):
        down = best <= 0
        out[rows[down]] = z[down]
        if down.all():
            break
        if down.any():  # at once: a query draws as many numbers as points stand
            rows, x, y, z, best = keep(~down, rows, x, y, z, best)
        d = z - x
        s = max(round(math.sqrt(share(i)) * side), 3) | 1
        to = window(position(side, s, generator), s)
        source = window(position(side, s, generator), s)
        moved = torch.zeros_like(d)
        moved[to], moved[source] = d[to], d[source]
        available = moved.square().sum((2, 3), keepdim=True)
        unused = (eps**2 - length(d, "l2").square()).clamp_min(0)
        pattern = (eta(s, generator) * signs((len(x), c, 1, 1), generator)).to(x) + unit(d[to])
        pattern = unit(pattern) * (unused / c + available).sqrt()
        d[source] = 0
        d[to] = pattern
        moved = (x + eps * d / (length(d, "l2") + 1e-12)).clamp(0, 1)
        new = margin(net(moved), y)
        better = (new < best) | (new <= 0)
        z = torch.where(column(better, z), moved, z)
        best = torch.where(better, new, best)
    down = best <= 0
    out[rows[down]] = z[down]
    return out


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


STAGES = {"apgd-ce": apgd_ce, "apgd-dlr": apgd_dlr, "apgd-t": apgd_t, "fab-t": fab_t, "square": square}
