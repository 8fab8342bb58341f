"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599) in linf, by foolbox' rule, which AMOC used.

A weak attack next to PGD on most models: report it beside PGD, never alone.
"""
import math
import numbers

import torch

from evaluation.autoattack import check_clean, check_radius, checked, images_and_labels, mistaken


def deepfool(net, x, y, eps=None, steps=50, overshoot=0.02, candidates=10):
    """Walk to the nearest linearised boundary until misclassified.

    net         x (B, ...) -> logits (B, C), C >= 2, in eval mode; they must be finite for x.
    x, y        float images in [0, 1], integer labels (B,), as for autoattack. What is misclassified already
                comes back as it is.
    eps         radius of the linf ball that the result is cut to, in units of x, 0 to 1; None: not cut.
    candidates  classes considered: the highest of the clean logits, among them the first, i0.

    Each step takes, over the classes k, the nearest of the boundaries at |f_k - f_i0| / (|g_k|_1 + 1e-8),
    as in foolbox (so that gradients of 1e-8 or less are walked too short), f the logits and g_k the
    gradient of f_k - f_i0, and adds that distance (+ 1e-4) along sign(g_k) to a total; the image is x +
    (1 + overshoot) total, clipped to [0, 1]. A step is 1 forward and `candidates` - 1 backward passes.

    Logits that are not finite count as misclassified: the walk ends there.

    Returns x_adv (B, ...), detached; with eps, it must be classified again: the cut may undo the
    success. Raises ValueError for an input that it cannot attack.
    """
    if eps is not None:
        if not isinstance(eps, numbers.Real) or not 0 <= eps < math.inf:
            raise ValueError(f"eps must be finite and not negative, or None, got {eps!r}")
        check_radius(eps, "linf")
    if not isinstance(overshoot, numbers.Real) or not 0 <= overshoot < math.inf:
        raise ValueError(f"overshoot must be finite and not negative, got {overshoot!r}")
    for name, number, least in (("steps", steps, 0), ("candidates", candidates, 2)):
        if not isinstance(number, numbers.Integral) or number < least:
            raise ValueError(f"{name} must be an integer, at least {least}, got {number!r}")
    x, y = images_and_labels(x, y)
    rows = torch.arange(len(x), device=x.device)
    order = None
    x_adv = x.clone()
    total = torch.zeros_like(x)
    for step in range(steps + 1):
        with torch.enable_grad():
            z = x_adv[rows].requires_grad_()
            f = checked(net(z), len(z))  # (b, C)
            if order is None:
                check_clean(f.detach(), y, len(f))
                # y first, also where another ties with it; of others nothing moves.
                order = f.detach().scatter(1, y[:, None], torch.inf).argsort(1, descending=True)[:, :candidates]
            standing = ~mistaken(f, y[rows])
            if step == steps or not standing.any():
                break
            gaps = f.gather(1, order[rows, 1:]) - f.gather(1, order[rows, :1])  # (b, candidates - 1)
            last = gaps.shape[1] - 1
            g = [torch.autograd.grad(gaps[:, k].sum(), z, retain_graph=k < last)[0] for k in range(last + 1)]
        g = torch.stack(g, 1).flatten(2).nan_to_num(0, 0, 0)  # (b, candidates - 1, D)
        distance = gaps.detach().abs() / (g.abs().sum(2) + 1e-8)
        near, k = distance.min(1)
        move = (near + 1e-4)[:, None] * g[torch.arange(len(g), device=g.device), k].sign()
        rows, move = rows[standing], move[standing]
        total[rows] += move.view_as(x[rows])
        x_adv[rows] = (x[rows] + (1 + overshoot) * total[rows]).clamp(0, 1)
    return x_adv if eps is None else x + (x_adv - x).clamp(-eps, eps)
