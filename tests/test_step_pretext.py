"""Whole steps of pretext.py against the method: two in a row, and all that they leave behind, by an oracle."""
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

import pretext
from tests import steps
from tests.scripts import TINY, named, tiny_npz

B = 3  # images a step
EPS, STEP_SIZE, STEPS = 40 / 255, 25 / 255, 3
WEIGHT_DECAY = 0.01
FLAGS = ["--eps", "40", "--step-size", "25", "--steps", "3"]
PERMUTATIONS = torch.tensor([[(5 * j + 3 * c) % 16 for j in range(16)] for c in (1, 2)])


class Tiny(nn.Module):
    """Pixel by pixel, so that rows will do for the oracle: linear, BatchNorm, tanh; then linear, BatchNorm."""

    trunk_dim, dim = 4, 5

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.layer4 = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 5, 1), norm=nn.BatchNorm2d(5)))

    def trunk(self, x):
        return torch.tanh(self.norm(self.conv1(x)))

    def last_stage(self):
        return [self.layer4]

    def forward(self, x):
        return self.layer4(self.trunk(x)).mean((2, 3))


# The oracle: Chen et al. 2020, Eqs. 1 to 4 --------------------------------------------------------------------
def pixels(w, name, h):
    """A 1x1 convolution of h (B, H, W, C)."""
    y = h @ w[f"{name}.weight"].flatten(1).T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(w, name, h, mode):
    return steps.batch_norm(w, name, h.reshape(-1, h.shape[-1]), mode).view(h.shape)


def trunk(w, x, mode):
    h = pixels(w, "encoder.conv1", x.permute(0, 2, 3, 1))
    return torch.tanh(norm(w, "encoder.norm", h, mode))


def stage(w, name, h, mode):
    return norm(w, f"{name}.norm", pixels(w, f"{name}.conv", h), mode).mean((1, 2))


def layer_norm(w, name, h):
    mean = h.mean(-1, keepdim=True)
    variance = ((h - mean) ** 2).mean(-1, keepdim=True)
    return (h - mean) / (variance + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]


def pooled(w, features):
    """One image: visible features (12, 4) -> (4,). One layer of one head."""
    tokens = torch.cat([w["pool.token"][0], features])
    q, k, v = steps.linear(w, "pool.layers.0.qkv", tokens).split(4, 1)
    mixed = []
    for i in range(len(tokens)):
        weights = torch.stack([(q[i] @ k[j] / 4**0.5).exp() for j in range(len(tokens))])
        mixed.append(sum(weights[j] / weights.sum() * v[j] for j in range(len(tokens))))
    h = layer_norm(w, "pool.layers.0.norm1", tokens + steps.linear(w, "pool.layers.0.out", torch.stack(mixed)))
    inner = steps.linear(w, "pool.layers.0.mlp.0", h)
    inner = 0.5 * inner * (1 + torch.tanh((2 / math.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    return layer_norm(w, "pool.layers.0.norm2", h + steps.linear(w, "pool.layers.0.mlp.2", inner))[0]


def cross_entropy(logits, y):
    return -(logits[y].exp() / logits.exp().sum()).log()


def selfie(w, x, order, mode, double):
    patches = [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(4) for j in range(4)]
    h = trunk(w, torch.cat(patches), mode).mean((1, 2)).view(16, len(x), 4)  # each patch alone
    masked, visible = order[:4].tolist(), order[4:].tolist()
    total = 0.0
    for b in range(len(x)):
        u = pooled(w, torch.stack([h[place, b] for place in visible]))
        for i, place in enumerate(masked):
            query = u + w["pool.rows"][place // 4] + w["pool.columns"][place % 4]
            logits = torch.stack([query @ h[other, b] for other in masked])
            if double:
                logits = logits.exp() / logits.exp().sum()
            total = total + cross_entropy(logits, i) / len(x)
    return total


def task_loss(w, task, x, target, mode, double, alone):
    if task == "selfie":
        return selfie(w, x, target, mode, double)
    name = "jigsaw_stage.0" if task == "jigsaw" and not alone else "encoder.layer4"
    logits = steps.linear(w, f"{task}_head", stage(w, name, trunk(w, x, mode), mode))
    return sum(cross_entropy(row, y) for row, y in zip(logits, target.tolist())) / len(x)


def diversity(losses, views):
    """g, image by image; each view's gradient is of its own task's loss."""
    gradients = [torch.autograd.grad(loss, view, create_graph=True)[0] for loss, view in zip(losses, views)]
    total = 0.0
    m = len(views)
    for b in range(B):
        columns = [g[b].flatten() / ((g[b] ** 2).sum() ** 0.5 + 1e-10) for g in gradients]
        M = [[(columns[i] * columns[j]).sum() + (1e-5 if i == j else 0) for j in range(m)] for i in range(m)]
        if m == 2:
            det = M[0][0] * M[1][1] - M[0][1] * M[1][0]
        else:
            det = sum(M[0][i] * (M[1][(i + 1) % 3] * M[2][(i + 2) % 3] - M[1][(i + 2) % 3] * M[2][(i + 1) % 3])
                      for i in range(3))
        total = total + det.log() / B
    return total


def step_of_paper(w, momentum, tasks, views, targets, noises, lr, lam, clean_weight, double):
    m = len(tasks)

    def losses(views, mode):
        alone = "rotation" not in tasks
        return [task_loss(w, *triple, mode, double, alone) for triple in zip(tasks, views, targets)]

    def inner(*views):
        values = losses(views, "frozen")
        g = diversity(values, views) if m > 1 and lam else 0.0
        return sum(values) + lam * g

    adversarial = steps.attack(inner, views, noises, EPS, STEP_SIZE, STEPS)
    clean = losses(views, "train") if clean_weight else None
    adversarial = [view.detach().requires_grad_() for view in adversarial]
    attacked = losses(adversarial, "train")
    value = sum((1 - clean_weight) * loss / m for loss in attacked)
    if clean_weight:
        value = value + sum(clean_weight * loss / m for loss in clean)
    logged = {f"loss_{task}": loss for task, loss in zip(tasks, attacked)}
    if m > 1:
        logged["log_det"] = diversity(attacked, adversarial)
        value = value + lam * logged["log_det"]
    steps.sgd(w, value, momentum, lr, WEIGHT_DECAY)
    return {"loss": value, **logged}


# The comparison ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tasks, lam, clean_weight, double", [
    (["rotation"], 0.3, 0.0, False), (["jigsaw"], 0.3, 0.5, False), (["selfie"], 0.3, 0.5, True),
    (["rotation", "jigsaw"], -0.4, 0.0, False), (["selfie", "rotation", "jigsaw"], 0.3, 0.4, False),
    (["jigsaw", "selfie", "rotation"], 0.0, 0.0, True)])
def test_two_steps_are_those_of_the_method(tasks, lam, clean_weight, double):
    net = pretext.Tasks(Tiny(), tasks, PERMUTATIONS.clone(), 1)
    net.register_buffer("permutations", None)  # which `scrambled` would change; the images are made already
    steps.scrambled(net, 1)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY)
    w, momentum = steps.plain(net), {}
    flags = [*FLAGS, "--tasks", *tasks, "--lam", str(lam), "--clean-weight", str(clean_weight)]
    flags += ["--double-softmax"] if double else []
    settings = {**named(pretext.train_step, pretext, *flags), "sigma": None}

    for number, lr in enumerate([0.3, 0.2]):
        views = [steps.images((B, 3, 8, 8), 10 * i + number) for i in range(len(tasks))]
        noises = [steps.noise((B, 3, 8, 8), 100 + 10 * i + number) for i in range(len(tasks))]
        kinds = {"rotation": [0, 3, 1], "jigsaw": [2, 0, 1], "selfie": [(7 * j + number) % 16 for j in range(16)]}
        targets = [torch.tensor(kinds[task]) for task in tasks]
        x, noise = torch.cat(views), torch.cat(noises).flatten(1)
        inputs = [t.clone() for t in (x, noise)]
        steps.set_lr(opt, lr)
        found = pretext.train_step(net, opt, x, targets, noise, **settings)
        wanted = step_of_paper(w, momentum, tasks, views, targets, noises, lr, lam, clean_weight, double)

        steps.assert_same(found, wanted, f"step {number}, logged")
        steps.assert_same(net.state_dict(), w, f"step {number}, network")
        steps.assert_same(steps.momenta(net, opt), momentum, f"step {number}, momentum")
        steps.assert_whole(net)
        assert torch.equal(x, inputs[0]) and torch.equal(noise, inputs[1]), "inputs are not changed"


@pytest.mark.parametrize("tasks, nesterov", [(["rotation"], False), (["selfie", "jigsaw"], True)])
def test_a_run_hands_the_step_what_the_method_starts_with(monkeypatch, tmp_path, tasks, nesterov):
    flags = ["--weight-decay", "0.02", "--lr", "0.7", "--ramp", "0", "--held-out", "0", "--tasks", *tasks]
    seen = steps.first_step(pretext, monkeypatch, tmp_path, *flags)
    net, opt = seen["net"], seen["opt"]
    steps.assert_optimizer(opt, net, torch.optim.SGD, lr=0.7, momentum=0.9, weight_decay=0.02, nesterov=nesterov)
    x = seen["x"].chunk(len(tasks))
    steps.assert_views(*x)
    steps.assert_noise(seen["noise"], (16 * len(tasks), 3 * 32 * 32))
    assert len(seen["targets"]) == len(tasks) and seen["tasks"] == tasks
    if tasks == ["rotation"]:
        assert seen["targets"][0].bincount().tolist() == [4, 4, 4, 4]


def test_without_a_random_start_the_attack_begins_at_the_image_and_noise_of_its_own_stays(monkeypatch, tmp_path):
    flags = ["--tasks", "rotation", "--ramp", "0", "--held-out", "0"]
    found = []
    for i, more in enumerate((["--no-random-start"], [], ["--no-random-start", "--noise", "8"])):
        (tmp_path / str(i)).mkdir()
        with monkeypatch.context() as m:
            found.append(steps.first_step(pretext, m, tmp_path / str(i), *flags, *more))
    at_the_image, at_random, noisy = found
    assert at_the_image["noise"] is None
    assert at_random["noise"].abs().max() <= 1 and at_random["noise"].std() > 0.5
    assert noisy["noise"].abs().max() > 1  # Gaussian noise is no start
    assert torch.equal(at_the_image["x"], at_random["x"])


def test_every_step_of_a_run_has_its_rate_and_images_targets_and_noise_of_its_own(monkeypatch, tmp_path):
    seen = []
    step = pretext.train_step

    def train_step(net, opt, x, targets, noise, **settings):
        rates = {group["lr"] for group in opt.param_groups}
        seen.append((rates, x.clone(), [target.clone() for target in targets], noise.clone(), settings))
        return step(net, opt, x, targets, noise, **settings)

    monkeypatch.setattr(pretext, "train_step", train_step)
    flags = ["--lr", "0.02", "--final-lr", "0.004", "--ramp", "2", "--lam", "-0.2", "--clean-weight", "0.3", "--eps", "6",
             "--step-size", "3", "--steps", "1", "--pool-layers", "1", "--held-out", "0", "--image-size", "16"]
    pretext.main([*TINY, *flags, "--data", tiny_npz(tmp_path / "d.npz"), "--out", str(tmp_path / "run")])
    cosine = [0.004 + 0.016 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert [rate for rates, *_ in seen for rate in rates] == pytest.approx([0.002, 0.011, *cosine[2:]])
    for i, (_, x, targets, noise, settings) in enumerate(seen):
        assert len(x) == 3 * (16 if i % 3 < 2 else 12) and noise.shape == (len(x), 3 * 16 * 16)
        assert settings == dict(tasks=["selfie", "rotation", "jigsaw"], lam=-0.2, clean_weight=0.3, double_softmax=False,
                                eps=6 / 255, step_size=3 / 255, steps=1, sigma=None)
        for _, other_x, other_targets, other_noise, _ in seen[:i]:
            assert not torch.equal(noise[0], other_noise[0]) and not torch.equal(x[:8], other_x[:8])
            assert not torch.equal(targets[0], other_targets[0])
        assert len(noise.unique(dim=0)) == len(noise)  # each image of each task has its own
