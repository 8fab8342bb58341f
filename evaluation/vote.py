"""A vote over noisy copies: the mean of a classifier's softmax over copies of an image with Gaussian noise,
as in randomised smoothing (Cohen et al. 2019, arXiv 1902.02918), attacked through the expectation (EOT,
Athalye et al. 2018, arXiv 1802.00420).

Every query has noise of its own. An attack that met the same noise again would fit it, and one that follows
the gradient of a single draw is led astray by it: both make a vote look more robust than it is.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

ROWS = 1000  # noisy copies that pass through the network at a time


def vote(logits):
    """The log of the mean over n of the softmax of `logits` (n, B, classes), one slice per noisy copy: (B,
    classes). Logits whose softmax is that mean."""
    return F.log_softmax(logits, 2).logsumexp(0) - math.log(len(logits))


class Vote(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> the `vote` (B, classes) of `net` over `copies` of each image with
    Gaussian noise of standard deviation `sigma`, in units of x; it is not clipped to [0, 1].

    draws   over how many votes the attacks average a gradient (`expected`).
    seed    of the noise: the same queries in the same order meet the same noise.
    """

    def __init__(self, net, copies, sigma, draws, seed, device):
        super().__init__()
        self.net = net
        self.copies = copies
        self.sigma = sigma
        self.draws = draws
        self.generator = torch.Generator(device).manual_seed(seed)
        self.path = getattr(net, "path", "the network")

    def forward(self, x):
        shape = (self.copies, *x.shape)
        noise = torch.randn(shape, generator=self.generator, device=x.device, dtype=x.dtype)
        noisy = (x + self.sigma * noise).flatten(0, 1)  # (copies B, 3, H, W)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        logits = torch.cat([self.net(part) for part in noisy.split(ROWS)]).float()
        return vote(logits.view(self.copies, len(x), -1))


def expected(loss_fn, draws):
    """A function of images whose gradient is the mean over `draws` of the gradient of `loss_fn`, images (B,
    ...) -> scalar, which is random. Its value means nothing.

    One graph at a time is kept, so that `draws` costs time and no memory.
    """

    def surrogate(x):
        total = torch.zeros_like(x)
        for _ in range(draws):
            once = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(loss_fn(once), once)
            total = total + g
        return (total / draws * x).sum()

    return surrogate
