"""The loss around a classifier's weights, in two random directions (Li et al. 2017, arXiv 1712.09913)."""
import contextlib

import torch
import torch.nn.functional as F

from common.pgd import eval_mode
from evaluation import attacks


def direction(net, generator):
    """A Gaussian direction {name: tensor} in the weights of `net`, each filter rescaled to the norm of the
    network's (Li et al., Section 4: d_ij <- d_ij / |d_ij| |theta_ij|). A filter is what belongs to one
    output: w[i]. Biases and the parameters of BatchNorm and LayerNorm do not move: zero.

    The numbers are drawn on the CPU, from `generator`, and so are the same on every device.
    """
    found = {}
    for name, w in net.named_parameters():
        if w.dim() < 2:
            found[name] = torch.zeros_like(w)
            continue
        d = torch.randn(w.shape, generator=generator).to(w).flatten(1)
        wanted = w.detach().flatten(1).norm(dim=1, keepdim=True)
        d = d * (wanted / d.norm(dim=1, keepdim=True).clamp_min(1e-12))
        found[name] = d.view(w.shape)
    return found


@contextlib.contextmanager
def moved(net, first, second, a, b):
    """Within, the parameters of `net` are theta + a first + b second. They are put back, bit for bit, also
    after an exception. Running statistics stay what they are."""
    before = {name: w.detach().clone() for name, w in net.named_parameters()}
    try:
        with torch.no_grad():
            for name, w in net.named_parameters():
                w.copy_(before[name] + a * first[name] + b * second[name])
        yield
    finally:
        with torch.no_grad():
            for name, w in net.named_parameters():
                w.copy_(before[name])


def loss_of(net, images, attack, seed=0):
    """The mean cross-entropy of `net`, in eval mode inside, on `images` under `attack` (attacks.Attack;
    None: clean)."""
    total = 0.0
    with eval_mode(net):
        for i, (x, y) in enumerate(attacks.in_order(images)):
            x, _ = attacks.attacked(net, x, y, attack, seed * 100_003 + i)
            with torch.no_grad():
                total = total + F.cross_entropy(net(x).float(), y, reduction="sum")
    return float(total) / len(images)


def places(span, count):
    """`count` places, an odd number, from -span to span; the middle one is 0 exactly."""
    middle = count // 2
    return [span * (i - middle) / middle for i in range(count)]


def landscape(net, images, attack, at, seed=0, log=None):
    """The losses (len(at), len(at)) of `net` moved by at[column] in one random direction and by at[row] in
    another; not finite where the moved network's is not. The attack is made anew at each place.

    at      places, in units of the filters' norms
    log     if given, a function that is told how many rows are done
    """
    generator = torch.Generator().manual_seed(seed)
    first = direction(net, generator)
    second = direction(net, generator)
    losses = torch.zeros(len(at), len(at))
    for row, b in enumerate(at):
        for column, a in enumerate(at):
            with moved(net, first, second, a, b):
                losses[row, column] = loss_of(net, images, attack, seed)
        if log:
            log(row + 1)
    return losses
