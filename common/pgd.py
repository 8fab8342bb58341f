"""Projected gradient descent on images, shown whole.

Madry et al. 2018 (arXiv 1706.06083): repeat { step uphill; project onto the ball; clip to the box }. Only the
gradient of the input is computed: no parameter gradient is made, and none has to be zeroed afterwards.
"""
import contextlib
import math

import torch
from torch import nn


def pgd(loss_fn, x, eps, step_size, steps, norm="linf", random_start=True, start=None, lo=0.0, hi=1.0,
        generator=None):
    """Maximise `loss_fn` over the `eps`-ball around `x`, inside the box [lo, hi].

    loss_fn    x_adv (B, ...) -> scalar. Whatever does not depend on x_adv is best computed once, outside.
               A network in it runs in the mode that it is in: in train mode every step uses the batch's
               statistics and updates the running ones. Put `with eval_mode(net):` or, for the batch's
               statistics without a trace, `with frozen_stats(net):` around the call. Under
               DistributedDataParallel attack `net.module`. Only the direction of the gradient counts: under
               fp16 autocast return a sum rather than a mean, lest small gradients become 0.
    x          images (B, ...), float32 (or float64) in [lo, hi] and not normalised: that is the network's
               first layer. They are neither changed nor given a gradient. There is one perturbation, and
               one ball, for each x[i]: under l2 and l1, V views of B images are to come as (V B, ...),
               not as (V, B, ...).
    eps        radius, in the units of x: where these are pixels in [0, 1], 8 / 255 for linf, 0.5 for l2, 12
               for l1. 0 gives x back.
    step_size  length of a step, in the same norm and units.
    steps      how many of them.
    norm       "linf": step sign(g), clip to the ball. "l2": step g / |g|_2, rescale into the ball.
               "l1": step along the sign of the top 1 % of coordinates, less those already at the edge of the
               box that they would be pushed over (SLIDE, Tramer & Boneh 2019, arXiv 1904.13000), project on
               ball and box jointly. "l1_dense": step g / |g|_1, rescale into the ball; weak, but what older
               papers report as l1.
    start      where to begin, taken as it is; else uniform noise in the ball (`random_start`), clipped, or x.
               From outside the ball the first step leads into it; without any step it comes back as it is.
    generator  for that noise.
    lo, hi     the box, in the units of x; -inf and inf: none.

    Returns x_adv, detached, with |x_adv - x| <= eps and lo <= x_adv <= hi, up to rounding; `start` with
    steps 0, and x with eps 0, come back unchanged. Where the gradient of the last step is NaN, so is
    x_adv, and what is computed from it: an attack that sees nothing does not pass for one that found
    nothing.

    Raises ValueError for an eps or step_size that is negative or not finite, for linf an eps above hi - lo,
    steps < 0, an unknown norm, a start shaped unlike x, images of another dtype or outside the box
    (`check_box`), or within `torch.inference_mode`, which forbids gradients (`torch.no_grad` does not).
    """
    check_norm(norm)
    for name, value in (("eps", eps), ("step_size", step_size), ("steps", steps)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value}: must be finite, and not negative")
    if not lo <= hi:
        raise ValueError(f"box [{lo}, {hi}]: its lower end must not be above the upper one")
    if norm == "linf" and eps > hi - lo:
        raise ValueError(f"eps {eps:g} is larger than the range [{lo:g}, {hi:g}]: eps is in the units of x; "
                         "of pixels in [0, 1], 8 / 255")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start {tuple(start.shape)}: must be shaped as x is, {tuple(x.shape)}")
    if torch.is_inference_mode_enabled():
        raise ValueError("pgd needs gradients, and torch.inference_mode forbids them: use torch.no_grad")
    check_box(x, lo, hi)
    x = x.detach()
    if eps == 0:
        return x.clone()
    if start is None:
        start = (x + uniform(x, eps, norm, generator)).clamp(lo, hi) if random_start else x
    x_adv = start.detach().clone()
    if norm == "linf":  # ball and box are one box
        least = (x - eps).clamp_min(lo)
        most = (x + eps).clamp_max(hi)
    with pixels_only(), _casts_kept(x.device.type):
        for _ in range(steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                (g,) = torch.autograd.grad(loss_fn(x_adv), x_adv)
            x_adv = x_adv.detach()
            moved = x_adv.add(direction(g, x_adv, norm, lo, hi), alpha=step_size)
            if norm == "linf":
                x_adv = moved.clamp(least, most)
            elif norm == "l1":  # jointly: clipping to the box afterwards would waste the budget that it frees
                x_adv = (x + project_l1_box(moved - x, eps, lo - x, hi - x)).clamp(lo, hi)
            else:
                x_adv = (x + project(moved - x, eps, norm)).clamp(lo, hi)
        if steps:  # sign(NaN) is 0: such a pixel has stayed where it was, and so will its gradient have
            x_adv.masked_fill_(g.isnan(), math.nan)
    return x_adv


def _casts_kept(device):
    """Autocast as it is, on or off. But where `loss_fn` turns it on, the weights that it casts are kept until
    this block ends, rather than cast at every step."""
    if not torch.amp.is_autocast_available(device):  # as for "meta"
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


NORMS = ("linf", "l2", "l1", "l1_dense")
ROUNDING = 1e-3  # images may lie so far outside the box: TensorFloat-32 products can resize white to 1.0005


def check_norm(norm, known=NORMS):
    """ValueError where `norm` is none of those `known`."""
    if norm not in known:
        raise ValueError(f"norm {norm!r}: choose one of {', '.join(known)}")


def check_box(x, lo, hi):
    """ValueError where images x (B, ...) are not float32 or float64, or not all in [lo, hi]: in half precision
    a step of 1/255 is lost in rounding, and normalised images would be clipped to that box, and so moved by far
    more than eps.

    On CUDA the host does not wait for the answer: the device checks it, and an error there ends the process.
    """
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}: must be floats in [{lo:g}, {hi:g}], as x.float() / 255 is")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are {x.dtype}: must be float32, as x.float() is; let autocast round inside the "
                         "network")
    if x.numel() == 0 or (lo == -math.inf and hi == math.inf):
        return
    message = (f"images must lie in [{lo:g}, {hi:g}]; normalisation belongs inside the network, as its first "
               "layer")
    least, most = torch.aminmax(x.detach())
    fine = (least >= lo - ROUNDING) & (most <= hi + ROUNDING)  # NaN is neither
    if x.is_cuda:
        torch._assert_async(fine, message)
    elif not fine:
        raise ValueError(f"{message} (these go from {least:.3g} to {most:.3g})")


def direction(g, x, norm, lo=0.0, hi=1.0):
    """The step of unit length in `norm` (see `pgd`) for the gradient `g` at `x`, both (B, ...); for l1 inside
    the box [lo, hi], in the units of x. For linf and l1 a NaN in `g` counts as 0."""
    check_norm(norm)
    if norm == "linf":
        return g.sign()
    if norm != "l1":
        # Scaled first: a network that is sure of its answer has gradients whose squares, in float32, are 0.
        largest = torch.linalg.vector_norm(g.flatten(1), math.inf, dim=1)
        g = g / _per_image(largest, g).clamp_min(torch.finfo(g.dtype).tiny)
        return g / _per_image(g.flatten(1).norm(2 if norm == "l2" else 1, dim=1), g).clamp_min(1e-12)
    stuck = ((x <= lo) & (g < 0)) | ((x >= hi) & (g > 0))
    g = g.masked_fill(stuck, 0.0).flatten(1)
    top = g.abs().topk(max(1, round(0.01 * g.shape[1])), dim=1)
    step = torch.zeros_like(g).scatter_(1, top.indices, g.gather(1, top.indices).sign())
    return (step / step.abs().sum(1, keepdim=True).clamp_min(1)).view_as(x)


def project(delta, eps, norm):
    """Each `delta` (B, ...) into the ball of radius `eps`, in the units of delta: its nearest point, or
    (l1_dense) a mere rescaling."""
    check_norm(norm)
    if norm == "linf":
        return delta.clamp(-eps, eps)
    if norm == "l1":
        far = torch.full_like(delta, torch.inf)
        return project_l1_box(delta, eps, -far, far)
    length = _per_image(delta.flatten(1).norm(2 if norm == "l2" else 1, dim=1), delta)
    return delta * (eps / length.clamp_min(max(eps, 1e-12)))


def project_l1_box(delta, eps, lo, hi):
    """The nearest point to `delta` (B, ...) in {d: |d|_1 <= eps and lo <= d <= hi}, for tensors lo <= 0 <=
    hi; all of them in the same units.

    It is clamp(sign(delta) * max(|delta| - t, 0), lo, hi) with the smallest t >= 0 that fits the ball (Croce
    & Hein 2021, arXiv 2103.01208, Prop. 2.1). |d|_1 falls piecewise linearly in t, with a kink where a
    coordinate leaves its bound (t = |delta| - bound) and one where it reaches zero (t = |delta|): sort the
    kinks, find the piece, solve it.
    """
    a = delta.flatten(1).abs()
    bound = torch.where(delta < 0, -lo, hi).flatten(1)  # the furthest that coordinate may go, >= 0
    if a.numel() == 0:
        return delta.clamp(lo, hi)
    leave = (a - bound).clamp_min(0)
    zero = torch.zeros_like(a[:, :1])
    one = torch.ones_like(a)
    kinks, order = torch.cat([zero, leave, a], 1).sort(1)  # a piece begins at its kink
    slope = torch.cat([zero, -one, one], 1).gather(1, order)
    slope = slope.cumsum(1)  # -(number of coordinates between bound and zero)
    drop = slope[:, :-1] * kinks.diff(dim=1)
    length = a.minimum(bound).sum(1, keepdim=True) + torch.cat([zero, drop.cumsum(1)], 1)
    piece = ((length > eps).sum(1, keepdim=True) - 1).clamp_min(0)  # the last kink whose length is above eps
    at = kinks.gather(1, piece)
    top = length.gather(1, piece)
    rate = slope.gather(1, piece)
    t = torch.where(top > eps, at + (top - eps) / -rate.clamp_max(-1), torch.zeros_like(at))
    return (delta.sign() * (a - t).clamp_min(0).view_as(delta)).clamp(lo, hi)


def uniform(x, eps, norm, generator=None):
    """Noise shaped as `x` (B, ...), uniform in the ball of radius `eps`, in whose units it is (l2, l1:
    Gaussian, Laplace direction)."""
    check_norm(norm)

    def rand(*shape):
        return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
    if norm == "linf":
        return (2 * rand(*x.shape) - 1) * eps
    if norm == "l2":
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        length = noise.flatten(1).norm(dim=1)
    else:
        noise = (2 * rand(*x.shape) - 1).sign() * -rand(*x.shape).clamp_min(1e-12).log()
        length = noise.flatten(1).abs().sum(1)
    radius = rand(len(x)) ** (1 / max(1, math.prod(x.shape[1:])))
    return noise * _per_image(eps * radius / length.clamp_min(1e-12), x)


def ball_point(u, norm):
    """Points (..., n) of the ball of radius 1, uniform in it, from numbers u (..., 1 + n) uniform in [0, 1):
    where the noise is to be a function of each image's own numbers. norm "linf" or "l2"."""
    check_norm(norm, ("linf", "l2"))
    radius = u[..., :1]
    u = 2 * u[..., 1:] - 1
    if norm == "linf":
        return u
    gaussian = torch.erfinv(u.clamp(-0.999999, 0.999999))
    return gaussian / gaussian.norm(dim=-1, keepdim=True).clamp_min(1e-12) * radius ** (1 / u.shape[-1])


@contextlib.contextmanager
def eval_mode(*nets):
    """Eval mode for all modules of `nets` inside the block; each gets its own back, exception or not.

    Until the block ends, BatchNorms may keep what follows from their weights (`Kept`; see conv_norm of
    common/resnet.py). Weights that an optimizer, `load_state_dict` or another operation in place changes
    meanwhile are noticed. What is written through `w.data` is not: end the block first, and open another.
    """
    modules = list(dict.fromkeys(m for net in nets for m in net.modules()))  # each once
    modes = [m.training for m in modules]
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [m.__dict__.get("kept") for m in norms]
    try:
        for m in modules:
            _set_training(m, False)
        for m in norms:
            m.__dict__["kept"] = Kept()
        yield
    finally:
        for m, mode in zip(modules, modes):
            _set_training(m, mode)
        for m, outer in zip(norms, kept):
            if outer is None:
                del m.__dict__["kept"]
            else:
                m.__dict__["kept"] = outer


def _set_training(m, mode):
    if "training" in m.__dict__:
        m.__dict__["training"] = mode  # nn.Module's own way to set it takes twenty times as long
    else:  # a module of TorchScript
        m.training = mode


class Kept(dict):
    """What a module keeps for the time of an `eval_mode`; a copy of the module begins with nothing."""

    pixels_only = False  # of all of them, see there

    def __deepcopy__(self, memo):
        return Kept()

    def __reduce__(self):
        return Kept, ()


@contextlib.contextmanager
def pixels_only():
    """Inside, weights are constants: the caller asks for gradients of the images alone."""
    outer = Kept.pixels_only
    try:
        Kept.pixels_only = True
        yield
    finally:
        Kept.pixels_only = outer


@contextlib.contextmanager
def frozen_stats(*nets):
    """No BatchNorm of `nets` changes its running statistics inside; training ones use the batch's."""
    norms = [m for net in nets for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [m.track_running_stats for m in norms]
    try:
        for m in norms:
            m.track_running_stats = False
        yield
    finally:
        for m, track in zip(norms, kept):
            m.track_running_stats = track


@contextlib.contextmanager
def frozen_weights(*nets):
    """Inside, the weights of `nets` are constants, of which no gradient is made."""
    weights = [w for net in nets for w in net.parameters() if w.requires_grad]
    try:
        for w in weights:
            w.requires_grad_(False)
        yield
    finally:
        for w in weights:
            w.requires_grad_(True)


def _per_image(v, like):
    """(B,) -> (B, 1, ..., 1), to broadcast against `like`."""
    return v.view(-1, *[1] * (like.dim() - 1))
