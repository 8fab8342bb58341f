"""Whole steps of byorl.py against the paper: two in a row, and all that they leave behind, by an oracle."""
import copy

import pytest
import torch

import byorl
from common import optim
from tests import steps

B = 4  # images a step
TAUS = [0.9, 0.95]
WEIGHT_DECAY, TRUST = 0.01, 0.02


def step_of_script(flags, net, target, opt, x1, x2, noise, tau):
    settings = byorl.attack_settings(byorl.parser().parse_args(flags))
    return byorl.train_step(net, target, opt, x1, x2, noise, tau=tau, **settings)


# The oracle: BYORL as the paper has it ----------------------------------------------------------------------
def project(w, images, mode):
    """z of one batch: encoder and projector. There is one BatchNorm of a kind."""
    return steps.through_head(w, "projector", steps.encode(w, images, "norm", mode), "norm", mode)


def predict(w, images, mode):
    """The predictor's guess at the target's z."""
    return steps.through_head(w, "predictor", project(w, images, mode), "norm", mode)


def disagreement(p, z):
    """Eq. 4, one image at a time."""
    total = 0.0
    for i in range(len(p)):
        total = total + 2 - 2 * (p[i] @ z[i]) / (p[i].norm() * z[i].norm())
    return total / len(p)


def attack(w, x, z, noise, norm, eps, step_size, attack_steps):
    """Eq. 5: the view moved, within the ball, to where the prediction is furthest from z; by the statistics
    of the batch."""
    if norm == "linf" and eps > 0:
        (x_adv,) = steps.attack(lambda view: disagreement(predict(w, view, "frozen"), z),
                                [x], [noise.view(x.shape)], eps, step_size, attack_steps)
        return x_adv
    x_adv = (x + eps * noise.view(x.shape)).clamp(0, 1)
    for _ in range(attack_steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(disagreement(predict(w, x_adv, "frozen"), z), x_adv)
        moved = []
        for image, g, clean in zip(x_adv.detach(), gradient, x):
            delta = image + step_size * g / g.norm() - clean
            if delta.norm() > eps:
                delta = delta * eps / delta.norm()
            moved.append((clean + delta).clamp(0, 1))
        x_adv = torch.stack(moved)
    return x_adv


def step_of_paper(online, target, momentum, x1, x2, noise, lr, tau, how):
    """One iteration. The target sees clean views, and is a constant; the online network sees attacked
    ones."""
    z1 = project(target, x1, "train").detach()
    z2 = project(target, x2, "train").detach()
    x1_adv = attack(online, x1, z2, noise[:, 0], *how)
    x2_adv = attack(online, x2, z1, noise[:, 1], *how)
    loss = disagreement(predict(online, x1_adv, "train"), z2)
    loss = loss + disagreement(predict(online, x2_adv, "train"), z1)  # Eq. 7
    steps.lars(online, loss, momentum, lr, WEIGHT_DECAY, TRUST, spare_vectors=True)
    steps.moving_average(target, online, tau)

    constant = 0.0  # the loss of the best prediction that is the same for all images, along the mean unit z
    for z in (z1, z2):
        best = sum(row / row.norm() for row in z)
        constant = constant + disagreement(best.expand_as(z), z)
    return {"loss": loss, "constant_loss": constant}


# The comparison ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, how", [
    (["--eps", "40", "--steps", "3"], ("linf", 40 / 255, 1.25 * 40 / 255 / 3, 3)),
    (["--eps", "40", "--steps", "2", "--step-size", "25"], ("linf", 40 / 255, 25 / 255, 2)),
    (["--norm", "l2", "--eps", "200", "--steps", "3"], ("l2", 200 / 255, 1.25 * 200 / 255 / 3, 3)),
    (["--norm", "l2", "--eps", "200", "--steps", "2", "--step-size", "150"], ("l2", 200 / 255, 150 / 255, 2)),
    (["--eps", "0"], ("linf", 0.0, 0.0, 0))])
def test_two_steps_are_those_of_the_paper(flags, how):
    net = steps.sequential(encoder=steps.encoder(48, 6), projector=steps.head(6, 8, 5),
                      predictor=steps.head(5, 7, 5))
    steps.scrambled(net, 1)
    target = steps.scrambled(copy.deepcopy(net[:2]), 2).requires_grad_(False)
    opt = optim.LARS(optim.lars_groups(net), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY)
    opt.param_groups[0]["trust"] = TRUST
    online, slow_target, momentum = steps.plain(net), steps.plain(target), {}

    for number, (lr, tau) in enumerate(zip([3.0, 2.0], TAUS)):
        x1, x2 = steps.images((2, B, 3, 4, 4), 10 + number)
        noise = steps.noise((B, 2, 48), 20 + number)
        if how[0] == "l2":  # two inside the ball, two on its edge
            noise = noise / noise.norm(dim=2, keepdim=True) * torch.tensor([0.3, 1, 0.6, 1])[:, None, None]
        inputs = [t.clone() for t in (x1, x2, noise)]
        steps.set_lr(opt, lr)
        found = step_of_script(flags, net, target, opt, *inputs, tau)
        wanted = step_of_paper(online, slow_target, momentum, x1, x2, noise, lr, tau, how)

        what = f"{flags}, step {number}"
        steps.assert_same(found, wanted, f"{what}, losses")
        steps.assert_same(net.state_dict(), online, f"{what}, online network")
        steps.assert_same(target.state_dict(), slow_target, f"{what}, target")
        steps.assert_same(steps.momenta(net, opt), momentum, f"{what}, momentum")
        steps.assert_whole(net)
        steps.assert_whole(target)
        assert all(torch.equal(a, b) for a, b in zip(inputs, (x1, x2, noise))), "inputs are not changed"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_run_hands_the_step_what_the_paper_starts_with(norm, monkeypatch, tmp_path):
    seen = steps.first_step(byorl, monkeypatch, tmp_path, "--hidden", "16", "--weight-decay", "0.02",
                            "--lr", "0.7", "--warmup", "0", "--ema", "0.9", "--norm", norm, "--eps", "8")
    steps.assert_optimizer(seen["opt"], seen["net"], optim.LARS, lr=0.7, momentum=0.9, clip=False)
    for group in seen["opt"].param_groups:
        for parameter in group["params"]:
            wanted = (None, 0.0) if parameter.dim() < 2 else (0.001, 0.02)
            assert (group["trust"], group["weight_decay"]) == wanted
    steps.assert_copy(seen["target"], seen["net"][:2])
    assert seen["tau"] == pytest.approx(0.9)
    steps.assert_views(seen["x1"], seen["x2"])
    if norm == "linf":
        steps.assert_noise(seen["noise"], (16, 2, 3 * 32 * 32))
    else:
        length = seen["noise"].norm(dim=2)  # uniform in a ball of so many dimensions: just below 1
        assert 0.99 < length.min() and length.max() < 1 + 1e-6 and len(length.unique()) > 16
