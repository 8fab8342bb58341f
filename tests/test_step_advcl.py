"""Whole steps of advcl.py against the paper: two in a row, and all that they leave behind, by an oracle."""
import math

import pytest
import torch
from torch import nn

import advcl
from tests import steps
from tests.scripts import named

B = 4  # images a step
EPS, STEP_SIZE, STEPS = 40 / 255, 25 / 255, 2
TEMPERATURE, LAM, WEIGHT_DECAY, CUTOFF = 0.4, 0.3, 0.01, 2
CLUSTERS = [2, 3]
FLAGS = ["--eps", "40", "--step-size", "25", "--steps", "2", "--temperature", "0.4", "--cutoff", "2",
         "--cluster-weight", "0.3"]
L2 = ["--norm", "l2", "--eps", "200", "--step-size", "110"]
HOW = {"linf": (EPS, STEP_SIZE, STEPS, "linf"), "l2": (200 / 255, 110 / 255, STEPS, "l2")}


def step_of_script(views, norm, clusters, net, opt, x1, x2, x, labels, noise):
    more = L2 if norm == "l2" else []
    settings = named(advcl.train_step, advcl, "--views", *views, *FLAGS, *more, clusters=clusters)
    return advcl.train_step(net, opt, x1, x2, x, labels, noise, **settings)


# The oracle: AdvCL as the paper has it ----------------------------------------------------------------------
def embed(w, images, branch, mode):
    """z of one batch; the encoder's BatchNorm has branches, the projector's is shared."""
    h = steps.encode(w, images, f"norm.branches.{branch}", mode)
    return steps.through_head(w, "projector", h, "norm", mode)


def contrastive_loss(views):
    """Eq. 5: every view of every image is an anchor, and each other view of the image a positive. A mean over
    positives and anchors, and the authors' factor T / 0.07."""
    rows = [(image, z / z.norm()) for view in views for image, z in enumerate(view)]
    total = 0.0
    for i, (image, u) in enumerate(rows):
        others = [(other, u @ v / TEMPERATURE) for j, (other, v) in enumerate(rows) if j != i]
        denominator = sum(score.exp() for _, score in others)
        positives = [score for other, score in others if other == image]
        for score in positives:
            total = total - (score.exp() / denominator).log() / len(positives)
    return total / len(rows) * TEMPERATURE / 0.07


def cluster_loss(w, x, labels, mode):
    """Mean over the K of the cross-entropy with the pseudo-labels, by a BatchNorm branch of its own."""
    logits = steps.linear(w, "classifier", steps.encode(w, x, "norm.branches.adv_ce", mode))
    total = 0.0
    for column, logits_of_K in enumerate(logits.split(CLUSTERS, dim=1)):
        for row, label in zip(logits_of_K, labels[:, column]):
            total = total - (row[label].exp() / row.exp().sum()).log()
    return total / len(x) / len(CLUSTERS)


def low_frequencies(x):
    """The waves of x (B, 3, H, W), one at a time, of less than CUTOFF periods an image."""
    H, W = x.shape[2:]
    row = torch.arange(H, dtype=x.dtype)[:, None]
    column = torch.arange(W, dtype=x.dtype)
    low = torch.zeros_like(x)
    for a in range(-H // 2, H // 2):
        for b in range(-W // 2, W // 2):
            if math.hypot(a, b) < CUTOFF:
                phase = 2 * math.pi * (a * row / H + b * column / W)
                for wave in (phase.cos(), phase.sin()):
                    amplitude = (x * wave).sum((2, 3), keepdim=True) / (H * W)
                    low = low + amplitude * wave
    return low


def step_of_paper(names, labels, w, momentum, x1, x2, x, noise, lr, how):
    """One iteration, of the views in Table 4's `names`."""
    low = low_frequencies(x)
    images = {"x1": x1, "x2": x2, "x": x, "xl": low, "xh": x - low}

    # The clean views, each a batch to BatchNorm
    clean = [embed(w, images[name], "clean", "train") for name in names if not name.endswith("+d")]
    constants = [z.detach() for z in clean]

    # Eq. 9: the others move, each in its own ball and all at once, by the statistics of their batches
    def contrast(*views):
        return contrastive_loss([embed(w, view, "adv", "frozen") for view in views] + constants)

    to_attack = [images[name.removesuffix("+d")] for name in names if name.endswith("+d")]
    attacked = steps.attack(contrast, to_attack, noise[1:], *how)
    loss = contrastive_loss(clean + [embed(w, view, "adv", "train") for view in attacked])
    losses = {"loss_con": loss}

    # The same for the classifier
    if labels is not None:
        (x_ce,) = steps.attack(lambda view: cluster_loss(w, view, labels, "frozen"), [x], [noise[0]], *how)
        losses["loss_ce"] = cluster_loss(w, x_ce, labels, "train")
        loss = loss + LAM * losses["loss_ce"]
    steps.sgd(w, loss, momentum, lr, WEIGHT_DECAY)
    return {"loss": loss, **losses}


# The comparison ---------------------------------------------------------------------------------------------
def network(branches):
    parts = {"encoder": steps.encoder(72, 6, branches), "projector": steps.head(6, 7, 5),
             "classifier": nn.Linear(6, sum(CLUSTERS))}
    return steps.scrambled(nn.ModuleDict(parts), 1)


@pytest.mark.parametrize("norm, with_labels", [("linf", False), ("linf", True), ("l2", True)])
@pytest.mark.parametrize("names", [
    ["x+d", "x1", "x2", "xh"], ["x1+d", "x2+d", "x1", "x2"], ["x+d", "x1", "x2", "xl"]], ids=" ".join)
def test_two_steps_are_those_of_the_paper(names, norm, with_labels):
    net = network(("adv", "clean", "adv_ce"))
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY)
    w, momentum = steps.plain(net), {}
    attacked = sum(name.endswith("+d") for name in names)

    for number, lr in enumerate([0.05, 0.03]):
        x1, x2, x = steps.images((3, B, 3, 4, 6), 10 + number)
        noise = steps.noise((1 + attacked, B, 3, 4, 6), 20 + number)
        if norm == "l2":
            noise = steps.l2_noise(noise)
        labels = torch.tensor([[0, 2], [1, 1], [1, 0], [0, 1]]).roll(number, 0) if with_labels else None
        inputs = [t.clone() for t in (x1, x2, x, noise)]
        steps.set_lr(opt, lr)
        clusters = CLUSTERS if with_labels else []
        found = step_of_script(names, norm, clusters, net, opt, *inputs[:3], labels, inputs[3])
        wanted = step_of_paper(names, labels, w, momentum, x1, x2, x, noise, lr, HOW[norm])

        what = f"{names}, {norm}, step {number}"
        steps.assert_same(found, wanted, f"{what}, losses")
        steps.assert_same(net.state_dict(), w, f"{what}, network")
        steps.assert_same(steps.momenta(net, opt), momentum, f"{what}, momentum")
        steps.assert_whole(net, "adv")
        assert all(torch.equal(a, b) for a, b in zip(inputs, (x1, x2, x, noise))), "inputs are not changed"


def test_a_run_hands_the_step_what_the_paper_starts_with(monkeypatch, tmp_path):
    seen = steps.first_step(advcl, monkeypatch, tmp_path, "--weight-decay", "0.02", "--warmup", "0",
                            "--views", "x1+d", "x2+d", "x1", "x2")
    steps.assert_optimizer(seen["opt"], seen["net"], torch.optim.SGD, momentum=0.9, weight_decay=0.02,
                           dampening=0, nesterov=False)
    steps.assert_views(seen["x1"], seen["x2"], seen["x"])
    steps.assert_noise(seen["noise"], (3, 16, 3, 32, 32))
