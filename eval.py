"""Evaluation of exported encoders: k-NN, linear probes, fine-tuning, accuracy under attack; one table.

It knows nothing of how an encoder was pretrained. Names of the field:
    SLF  standard linear:      encoder frozen, clean cross-entropy
    ALF  adversarial linear:   encoder frozen, cross-entropy on PGD-10 images (or TRADES)
    AFF  adversarial full:     everything is trained, likewise
A preset is the recipe of a paper or of the RobustSSL benchmark (github.com/RobustSSL); --protocol slf is
short for --preset robustssl-slf, and so on. A flag given by hand wins over the preset. The last epoch is
used (by acl-aff-25 the best on training images that it holds out), never one chosen on the test set. A frozen
encoder is in eval mode throughout; under full fine-tuning the attack sees eval mode and the update train
mode. PGD alone flatters: on the papers' frozen encoders it reads 4 to 11 points above AutoAttack (aa). With
each AutoAttack comes a check that its figure means something (`sanity`). Everything is float32, without TF32.

Masked-image models are judged by fine-tuning on clean images (mae-tune; it works for ResNets too): AdamW, a
lower rate for earlier blocks, and for a ViT a new LayerNorm after the mean of its tokens. MAE's recipe has
RandAugment and random erasing besides, which are not here.

    python eval.py runs/amoc/encoder.pt --preset knn amoc-slf amoc-alf
    python eval.py runs/*/encoder.pt --protocol slf alf aff --attacks clean pgd20 aa --aa-limit 1000
    python eval.py runs/amoc/encoder.pt --preset amoc-aff --attacks clean pgd20 pgd50-l2-amoc
    python eval.py runs/adv_mae/encoder.pt --preset mae-tune-cifar mae-slf-cifar
    python eval.py runs/amoc/encoder.pt --data stl10 --image-size 32     another data set than its own
    python eval.py runs/amoc/encoder.pt --attacks curve c-like --pictures
    python eval.py runs/amoc/encoder.pt --attacks pgd20 --source runs/rocl/classifier-amoc-slf.pt    transfer
    python eval.py results/cifar10-jpeg/* --kept --preset amoc-slf       the table of what was measured

Each result, as soon as it is there, becomes a line of eval.jsonl beside the encoder, and is not measured a
second time while encoder, data, recipe and attack are the same; the last classifier of each preset is kept
there too, as classifier-<preset>-<BN>.pt.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.utils import save_image

from common import corruptions, data, encoders, optim, run, table
from common.autoattack import autoattack
from common.deepfool import deepfool
from common.pgd import eval_mode, pgd


class Preset(NamedTuple):
    """How a classifier is trained: rate x0.1 at `milestones`; or linear over `warmup`, then a cosine."""

    trains: str  # "linear" (encoder frozen) or "all"
    loss: str  # "clean", "pgd" or "trades"
    epochs: int
    milestones: tuple  # empty: cosine to 1e-6
    lr: float
    weight_decay: float
    batch_size: int
    zero: bool  # the classifier starts at zero, else at PyTorch's default
    augment: str  # "reflect" or "constant" (pad 4, crop, flip), "rrc" (resized crop, flip), or "none"
    step_size: float = 2 / 255  # of the training attack: linf 8/255, 10 steps
    nesterov: bool = False
    uniform: bool = True  # start of the training attack: uniform in the ball, else TRADES' Gaussian of 0.001
    optimizer: str = "sgd"  # momentum 0.9; "lars", which leaves biases alone; "adamw", betas 0.9 and 0.999
    warmup: int = 0  # epochs
    layer_decay: float = 1.0  # adamw: rate of a block over that of the next
    drop_path: float = 0.0  # of the last block (encoders.drop_path)
    smoothing: float = 0.0  # of the labels; this and the next two with loss "clean"
    mixup: float = 0.0  # parameter of its Beta distribution; 0: off. With both, each batch takes one
    cutmix: float = 0.0
    head_std: float = 0.0  # after `zero`, of the weights
    renew_norm: bool = False  # encoders.renew_norm
    batch_norm: bool = False  # a BatchNorm without affine before the classifier
    validation: float = 0.0  # share of the training images, on which the best epoch under PGD-20 is chosen
    dual: bool = False  # clean images go through BN branch "clean", attacked ones through "adv", if there are


PRESETS = {
    # Xu & Yang 2020 (2012.13154) and its code
    "amoc-slf": Preset("linear", "clean", 25, (15, 20), 0.1, 2e-4, 128, True, "reflect"),
    "amoc-alf": Preset("linear", "pgd", 25, (15, 20), 0.1, 5e-4, 128, True, "reflect"),
    "amoc-alf-trades": Preset("linear", "trades", 25, (15, 20), 0.1, 5e-4, 128, True, "reflect"),
    "amoc-full": Preset("all", "clean", 40, (30, 35), 0.1, 2e-4, 128, True, "reflect"),
    "amoc-aff": Preset("all", "pgd", 40, (30, 35), 0.1, 5e-4, 128, True, "reflect"),
    "amoc-aff-trades": Preset("all", "trades", 100, (40, 60), 0.1, 5e-4, 128, True, "reflect"),
    # Kim et al. 2020 (2006.07589); that the adversarial probe is un-augmented too is inferred
    "rocl-slf": Preset("linear", "clean", 150, (30, 50, 100), 0.1, 5e-4, 1024, False, "none"),
    "rocl-alf": Preset("linear", "pgd", 150, (30, 50, 100), 0.1, 5e-4, 1024, False, "none", step_size=0.007),
    # Jiang et al. 2020 (2010.13337); the probe reads BN clean: --bn clean. That the best epoch is best under
    # attack is inferred
    "acl-probe": Preset("linear", "clean", 100, (), 0.1, 0.0, 512, False, "none", nesterov=True),
    "acl-aff-25": Preset("all", "trades", 25, (15, 20), 0.1, 2e-4, 128, True, "constant", uniform=False,
                         validation=0.1),
    "acl-aff-100": Preset("all", "trades", 100, (40, 60), 0.1, 2e-4, 128, True, "constant", uniform=False),
    # Fan et al. 2021 (2111.01124)
    "advcl-slf": Preset("linear", "clean", 25, (15, 20), 0.01, 2e-4, 512, False, "constant"),
    # The RobustSSL benchmark, CIFAR-10. To be given by hand: for ACL and DynACL its milestones are (10, 20),
    # for ACL's AFF 100 epochs (40, 60), for AdvCL's one branch (--bn adv), for other data sets other rates
    "robustssl-slf": Preset("linear", "clean", 25, (15, 20), 0.01, 2e-4, 512, True, "constant"),
    "robustssl-alf": Preset("linear", "pgd", 25, (15, 20), 0.01, 2e-4, 512, True, "constant"),
    "robustssl-aff": Preset("all", "trades", 25, (15, 20), 0.1, 2e-4, 128, True, "constant", uniform=False,
                            dual=True),
    # He et al. 2021 (2111.06377) and its code, ViT-B; the probe reads our features, not the cls token
    "mae-tune": Preset("all", "clean", 100, (), 2e-3, 0.05, 1024, True, "rrc", optimizer="adamw", warmup=5,
                       layer_decay=0.65, drop_path=0.1, smoothing=0.1, mixup=0.8, cutmix=1.0,
                       head_std=2e-5, renew_norm=True),
    "mae-slf": Preset("linear", "clean", 90, (), 6.4, 0.0, 16384, True, "rrc", optimizer="lars", warmup=10,
                      head_std=0.01, batch_norm=True),
    # Ours, for CIFAR-10; not tuned
    "mae-tune-cifar": Preset("all", "clean", 100, (), 1e-3, 0.05, 256, True, "constant", optimizer="adamw",
                             warmup=5, layer_decay=0.75, drop_path=0.1, smoothing=0.1,
                             head_std=2e-5, renew_norm=True),
    "mae-slf-cifar": Preset("linear", "clean", 25, (15, 20), 0.1, 0.0, 128, True, "constant",
                            batch_norm=True),
}


class Attack(NamedTuple):
    """PGD on the cross-entropy from a uniform start."""

    norm: str
    eps: float
    step_size: float
    steps: int


class AutoAttack(NamedTuple):
    """common.autoattack, on all images at once; with --aa-limit on the first of them."""

    norm: str
    eps: float
    version: str = "standard"


class DeepFool(NamedTuple):
    """common.deepfool, cut to the linf ball."""

    eps: float


class Corruptions(NamedTuple):
    """No attack: the mean over these kinds of common.corruptions, and over severities 1 to 5."""

    kinds: tuple
    public: bool  # of the files CIFAR-10-C or CIFAR-100-C in --data-dir; else made anew


ATTACKS = {
    "pgd20": Attack("linf", 8 / 255, 2 / 255, 20),  # ACL, AdvCL, RobustSSL
    **{f"pgd20-{e}": Attack("linf", e / 255, e / 4 / 255, 20) for e in (1, 2, 4, 6, 12, 16)},
    "pgd20-amoc": Attack("linf", 8 / 255, 0.0031, 20),  # AMOC, Tables 2 and 6
    "pgd20-rocl": Attack("linf", 8 / 255, 0.00314, 20),
    "pgd20-rocl-16": Attack("linf", 16 / 255, 0.00627, 20),
    "pgd20-l2": Attack("l2", 0.5, 0.1, 20),
    "pgd20-l1": Attack("l1", 12.0, 1.2, 20),
    "pgd50-l2-amoc": Attack("l2", 0.5, 0.05, 50),
    "pgd50-l1-amoc": Attack("l1_dense", 12.0, 1.2, 50),  # the code's step; the paper has 0.05
    "deepfool": DeepFool(8 / 255),  # AMOC, Table 2
    "aa": AutoAttack("linf", 8 / 255),
    "aa-4": AutoAttack("linf", 4 / 255),
    "aa-l2": AutoAttack("l2", 0.5),
    "apgd": AutoAttack("linf", 8 / 255, "apgd"),  # its first two stages: not AutoAttack, and said so
    "c": Corruptions(corruptions.MAIN, True),
    "c-like": Corruptions(tuple(corruptions.LIKE), False),
}
CURVE = ("clean", "pgd20-1", "pgd20-2", "pgd20-4", "pgd20-6", "pgd20", "pgd20-12", "pgd20-16")
PROTOCOLS = ("slf", "alf", "aff")  # robustssl-slf, ...

GROUPS = {  # what is adversarial: scripts, with the flags that make them so
    "not pretrained": [(None, {"epochs": 0})],
    "nothing adversarial": [
        ("amoc", {"variant": "CCC"}), ("acl", {"variant": "s2s"}), ("byorl", {"eps": 0.0}),
        ("adv_mae", {"eps": 0.0}), ("adpe", {"radius": 0.0}),
        ("adios", {"masker": "none"}), ("adios", {"masker": "random"})],
    "pixels": [(script, {}) for script in ("rocl", "acl", "advcl", "amoc", "byorl", "adv_mae")],
    "bank": [(script, {}) for script in ("adco", "caco")],
    "masks and positions": [(script, {}) for script in ("adpe", "adios")],
}


def cifar10(name):
    return "cifar10" in str(name)


PUBLISHED = [  # (script, flags, accuracy / PGD-20 / AutoAttack at linf 8/255)
    ("rocl", {"data": cifar10},
     "RobustSSL benchmark, CIFAR-10, ResNet-18, 1000 epochs: SLF 77.90 / – / 26.12, ALF 75.62 / – / 29.69"),
    ("acl", {"data": cifar10, "variant": "ds"},
     "RobustSSL benchmark, CIFAR-10, ResNet-18, 1000 epochs: SLF 78.22 / – / 39.17, ALF 75.53 / – / 40.60"),
    ("advcl", {"data": cifar10, "teacher": None},
     "its paper, CIFAR-10, ResNet-18, 1000 epochs: SLF 77.73 / 48.89 / –"),
    ("advcl", {"data": cifar10}, "RobustSSL benchmark, CIFAR-10, ResNet-18, 1000 epochs, ImageNet's labels: "
                                 "SLF 82.36 / – / 43.18, ALF 80.04 / – / 44.05"),
    ("amoc", {"data": cifar10, "variant": "CCC"},
     "AMOC's paper, CIFAR-10, ResNet-18, 200 epochs: SLF 82.01 / 0.14 / –, ALF 15.44 / 8.04 / –"),
    ("amoc", {"data": cifar10, "variant": "ACC"},
     "its paper, CIFAR-10, ResNet-18, 200 epochs: SLF 78.74 / 36.87 / –, ALF 74.84 / 44.16 / –"),
    ("amoc", {"data": cifar10, "variant": "ACA"},
     "its paper, CIFAR-10, ResNet-18, 200 epochs: SLF 77.52 / 37.01 / –, ALF 73.33 / 44.50 / –"),
]


# ----------------------------------------------------------------------------------------------------------
# Training a classifier
# ----------------------------------------------------------------------------------------------------------
class Classifier(nn.Module):
    """Images in [0, 1] (B, 3, H, W) -> logits (B, classes)."""

    def __init__(self, encoder, classes, batch_norm=False):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.dim, classes)
        self.norm = nn.BatchNorm1d(encoder.dim, eps=1e-6, affine=False) if batch_norm else nn.Identity()

    def forward(self, x):
        return self.head(self.norm(self.encoder(x)))


def trades(logits, logits_adv, y, beta=6.0):
    """CE(p(x), y) + beta KL(p(x) || p(x_adv)), gradient through both (TRADES, arXiv 1901.08573)."""
    return F.cross_entropy(logits, y) + beta * kl(logits, logits_adv)


def kl(logits, logits_adv):
    return F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="batchmean")


def classifier_loss(net, x, y, p, noise):
    """The loss of preset `p` on a batch; `noise` (B, 3, H, W) is uniform in [0, 1) and starts its attack. y
    (B,) or, mixed, (B, classes)."""
    if p.loss == "clean":
        return F.cross_entropy(net(x), y, label_smoothing=p.smoothing)
    eps = 8 / 255
    noise = 2 * noise - 1
    start = x + (noise * eps if p.uniform else 0.001 * 2**0.5 * torch.erfinv(0.9999 * noise))

    def logits(x, bn):
        with encoders.branch(net, bn) if p.dual else contextlib.nullcontext():
            return net(x)

    with eval_mode(net):
        if p.loss == "pgd":
            def climb(x_adv):
                return F.cross_entropy(net(x_adv), y)
        else:
            with torch.no_grad():
                clean = logits(x, "clean")  # eval mode: constant in the perturbation

            def climb(x_adv):
                return kl(clean, logits(x_adv, "adv"))

        x_adv = pgd(climb, x, eps, p.step_size, 10, start=start.clamp(0, 1))
    if p.loss == "pgd":
        return F.cross_entropy(net(x_adv), y)
    return trades(logits(x, "clean"), logits(x_adv, "adv"), y)


def lr_at(p, epoch, progress):
    """The learning rate of preset `p` in `epoch`, `progress` epochs into the run."""
    if p.milestones:
        return p.lr * 0.1 ** sum(epoch >= m for m in p.milestones)
    return optim.warmup_cosine(progress, p.epochs, p.warmup, p.lr, 1e-6)


def optimizer(net, p):
    """That of preset `p` for the classifier; every group has a `scale` for its rate."""
    named = [(name, w) for name, w in net.named_parameters() if w.requires_grad]
    if p.optimizer == "adamw":
        stages = [[f"encoder.{part}" for part in parts] for parts in encoders.stages(net.encoder)]
        exempt = "encoder.cls_token", "encoder.pos_embed"
        return torch.optim.AdamW(optim.groups(named, p.weight_decay, exempt, stages, p.layer_decay), p.lr)
    if p.optimizer == "lars":
        groups = [{"params": [w], "scale": 1.0, "trust": None if w.dim() < 2 else 0.001} for _, w in named]
        return optim.LARS(groups, p.lr, momentum=0.9, weight_decay=p.weight_decay)
    group = {"params": [w for _, w in named], "scale": 1.0}
    return torch.optim.SGD([group], p.lr, momentum=0.9, weight_decay=p.weight_decay, nesterov=p.nesterov)


def augment(x, y, rng, p, mix):
    """A training batch of preset `p` from uint8 images: x (B, 3, H, W) in [0, 1], y as `mix` leaves it."""
    if p.augment == "rrc":
        x = data.random_resized_crop(x, rng, x.shape[2], scale=(0.08, 1.0), flip=0.5, filter="bicubic")
    elif p.augment != "none":
        x = data.random_flip(data.random_pad_crop(data.to_float(x), rng, 4, p.augment), rng)
    x, y = mix(data.to_float(x), y)
    return x.contiguous(memory_format=torch.channels_last), y


def mixer(p, classes):
    """Mixup or cutmix, at random, as a function of (x, y); of nothing where the preset has neither. Random
    numbers are the global generator's."""
    kinds = [kind(alpha=alpha, num_classes=classes)
             for kind, alpha in ((v2.MixUp, p.mixup), (v2.CutMix, p.cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else lambda x, y: (x, y)


def train(net, images, p, seed):
    """Train the classifier `net` on `images` by preset `p`, in place; all random numbers from `seed`."""
    torch.manual_seed(seed)
    net.head.reset_parameters()
    if p.zero:
        nn.init.zeros_(net.head.weight), nn.init.zeros_(net.head.bias)
    if p.head_std:
        nn.init.normal_(net.head.weight, std=p.head_std)
    if p.renew_norm:
        encoders.renew_norm(net.encoder)
    encoders.drop_path(net.encoder, p.drop_path)
    net.encoder.requires_grad_(p.trains == "all")
    net.train().encoder.train(p.trains == "all")
    opt, mix = optimizer(net, p), mixer(p, net.head.out_features)
    best, n = None, held_out(images, p)
    if n:
        rows = data.fixed_order(len(images))
        held, images = data.Part(images, rows[:n]), data.Part(images, rows[n:])
    steps = data.steps_per_epoch(len(images), p.batch_size)
    for epoch in range(p.epochs):
        total = 0.0
        for i, (x, y, rng) in enumerate(data.batches(images, p.batch_size, seed, epoch)):
            lr = lr_at(p, epoch, epoch + i / steps)
            for group in opt.param_groups:
                group["lr"] = lr * group["scale"]
            x, y = augment(x, y, rng, p, mix)
            noise = None if p.loss == "clean" else rng.uniform(*x.shape[1:], device=x.device)
            loss = classifier_loss(net, x, y, p, noise)
            opt.zero_grad()
            loss.backward()
            opt.step()
            total = total + loss.detach()
        loss = float(total) / steps
        if not loss < float("inf"):
            raise ValueError(f"the classifier's loss is not finite in epoch {epoch}; try a lower --lr")
        print(f"\r  epoch {epoch + 1}/{p.epochs}  lr {lr:.2g}  loss {loss:.4f} ", end="", flush=True)
        if n:
            robust = judge(net, held, ATTACKS["pgd20"], seed)["accuracy"]
            if not best or robust > best[0]:
                best = robust, {k: v.clone() for k, v in net.state_dict().items()}
    print()
    if best:
        net.load_state_dict(best[1])
    return net.eval()


def held_out(images, p):
    """How many of the training images are kept for the choice of the epoch."""
    return round(p.validation * len(images))


def save_classifier(net, path, made=None):
    """Write the classifier: how to build it, its weights, and of what it was `made`."""
    torch.save({"format": FORMAT, **net.encoder.recipe, "branch": net.encoder.branch, "made": made,
                "classes": net.head.out_features, "batch_norm": isinstance(net.norm, nn.BatchNorm1d),
                "state": encoders.one_branch(net.state_dict(), net.encoder.branch)}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


FORMAT = "evaluated classifier, version 1"


def load_classifier(path):
    """The classifier that an evaluation wrote to `path`: a plain nn.Module in eval mode, images in [0, 1] ->
    logits, which any attack library can call. Raises FileNotFoundError, or ValueError that names what is
    wrong."""
    saved = encoders.read(path, FORMAT, "eval.py writes classifier-<preset>-<BN>.pt")
    encoder = encoders.rebuild(saved)
    net = Classifier(encoder, saved["classes"], saved.get("batch_norm", False))
    encoders.load_strict(net, saved["state"], path)
    net.encoder.branch, net.made = saved["branch"], saved.get("made")
    return net.eval()


# ----------------------------------------------------------------------------------------------------------
# Judging it
# ----------------------------------------------------------------------------------------------------------
def in_order(images, batch_size=500, limit=None):
    """Yield `(x, y)` over all images, or the first `limit`; x float in [0, 1]."""
    for x, y in images.stream(torch.arange(min(len(images), limit or len(images))).split(batch_size)):
        yield data.to_float(x).contiguous(memory_format=torch.channels_last), y


def attacked(net, x, y, attack, seed, batch_size=500):
    """x (B, 3, H, W) under `attack`, a row of ATTACKS (None: as it is), and what AutoAttack tells."""
    if isinstance(attack, AutoAttack):
        return autoattack(net, x, y, attack.eps, attack.norm, attack.version, seed, min(250, batch_size),
                          log=lambda text: print("  " + text, flush=True))
    if isinstance(attack, DeepFool):
        return deepfool(net, x, y, attack.eps), {}
    if attack:
        generator = torch.Generator(x.device).manual_seed(seed)
        x = pgd(lambda x: F.cross_entropy(net(x), y), x,
                attack.eps, attack.step_size, attack.steps, attack.norm, generator=generator)
    return x, {}


def judge(net, images, attack=None, seed=0, limit=None, restarts=1, source=None, batch_size=500):
    """How many of `images` (of the first `limit`) `net`, in eval mode inside, classifies rightly, clean or
    under `attack`, made on `source` (None: on itself). Under several restarts the worst counts, image by
    image. Returns a dict: "accuracy" and its "stderr" in per cent, "images", and of AutoAttack its "stages"
    and "warnings"."""
    right, total, more, batches = 0, 0, {}, in_order(images, batch_size, limit)
    if isinstance(attack, AutoAttack):  # which fills its batches anew with what stands
        batches = [[torch.cat(parts) for parts in zip(*batches)]]
    with eval_mode(net), eval_mode(source or net):
        for i, (x, y) in enumerate(batches):
            standing = torch.ones_like(y, dtype=torch.bool)
            for r in range(restarts):
                x_adv, report = attacked(
                    source or net, x, y, attack, seed * 100_003 + i + 1_000_003 * r, batch_size)
                with torch.no_grad():
                    standing &= torch.cat([net(part).argmax(1) for part in x_adv.split(batch_size)]) == y
            right, total = right + standing.sum(), total + len(y)
            if report:
                more = {k: report[k] for k in ("warnings", *["stages"] * (restarts == 1))}
    return score(100 * int(right) / total, total) | more


def score(accuracy, images):
    stderr = (accuracy * (100 - accuracy) / images) ** 0.5
    return {"accuracy": accuracy, "stderr": round(stderr, 2), "images": images}


def sanity(net, images, attack, seed, limit, batch_size):
    """Accuracies that show whether a robust one means something: PGD of 100 steps must not be weaker than PGD
    of 20, and at eight times the radius nothing may stand. In per cent; "doubts" says what is wrong by more
    than a point."""
    def under(eps, steps):
        pgd_of = Attack(attack.norm, eps, eps / 4, steps)
        return judge(net, images, pgd_of, seed, limit, batch_size=batch_size)["accuracy"]

    pgd20, pgd100, at_8_eps = under(attack.eps, 20), under(attack.eps, 100), under(8 * attack.eps, 20)
    doubts = ["PGD-100 is weaker than PGD-20"] if pgd100 > pgd20 + 1 else []
    doubts += ["images stand at 8 eps"] if at_8_eps > 1 else []
    return {"pgd20": pgd20, "pgd100": pgd100, "pgd20 at 8 eps": at_8_eps, "doubts": doubts}


@torch.no_grad()
def corrupted(net, images, kinds, folder=None, seed=0):
    """The mean accuracy over `kinds` and severities, as `judge` returns it, with that of each of the "kinds".
    `folder`: of the public files, of which the same test images count as in `images`; None: made of those."""
    rights = torch.zeros(len(kinds), 5, len(images))
    for (k, kind), severity in itertools.product(enumerate(kinds), range(1, 6)):
        there, generator = images, None
        if folder:
            x, y = corruptions.read(folder, kind, severity)
            if len(images) > len(y):
                raise ValueError(f"{folder}: {len(y)} images a severity, for {len(images)} to be judged")
            rows = data.fixed_order(len(y))[: len(images)]
            x, y = (v[rows].to(images.y.device) for v in (x, y))
            there = resized(data.Images(x, y, images.classes), images.x.shape[2])
        with eval_mode(net):
            found = []
            for x, y in in_order(there):
                if not folder:
                    generator = generator or torch.Generator(x.device).manual_seed(
                        seed * 100_003 + 10 * k + severity)
                    x = corruptions.corrupt(x, kind, severity, generator)
                found.append(net(x).argmax(1) == y)
        rights[k, severity - 1] = 100 * torch.cat(found).float().cpu()
    each, n = rights.mean((0, 1)), len(images)  # image by image
    return {"accuracy": round(each.mean().item(), 2), "stderr": round((each.std() / n**0.5).item(), 2),
            "images": n, "kinds": {k: round(v.mean().item(), 2) for k, v in zip(kinds, rights)}}


@torch.no_grad()
def knn(encoder, train_images, test_images, k=200, temperature=0.1):
    """Weighted k-nearest-neighbour accuracy in per cent on un-augmented images (Wu et al. 2018, arXiv
    1805.01978): each of the k most similar training images votes for its class with weight
    exp(cosine / temperature). Temperature 0.1 as in MoCo's CIFAR-10 demo."""
    with eval_mode(encoder):
        known = [(F.normalize(encoder(x)), y) for x, y in in_order(train_images)]
        bank, labels = (torch.cat(parts) for parts in zip(*known))
        right = 0
        for x, y in in_order(test_images):
            similar, index = (F.normalize(encoder(x)) @ bank.T).topk(min(k, len(bank)), dim=1)
            votes = torch.zeros(len(x), train_images.classes, device=x.device)
            votes.scatter_add_(1, labels[index], (similar / temperature).exp())
            right += (votes.argmax(1) == y).sum()
    return 100 * int(right) / len(test_images)


@torch.no_grad()
def pictures(path, net, images, attack, seed, source=None):
    """Rows of up to eight test images: clean, attacked, and the difference (grey is none, full scale is the
    largest)."""
    x, y = next(in_order(images, 8))
    with eval_mode(source or net):
        x_adv, _ = attacked(source or net, x, y, attack, seed)
    far = (x_adv - x).abs().max().clamp_min(1e-8)
    save_image(torch.cat([x, x_adv, 0.5 + (x_adv - x) / (2 * far)]), path, nrow=len(x))


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = argparse.ArgumentParser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    p.add_argument("paths", nargs="+", help="exported encoders; with --kept the folders of runs")
    p.add_argument("--preset", nargs="+", help="knn " + " ".join(PRESETS) + "; default: amoc-slf")
    p.add_argument("--protocol", nargs="+", default=[], help="slf alf aff: the benchmark's, robustssl-...")
    p.add_argument("--attacks", nargs="+", default=["clean", "pgd20"],
                   help="curve (pgd20 at 0 to 16/255) clean " + " ".join(ATTACKS))
    p.add_argument("--bn", help="BN branch, and no other; default: the one the encoder was exported with")
    p.add_argument("--data", default="cifar10", help="cifar10, cifar100, stl10, shapes, an .npz, a folder")
    p.add_argument("--data-dir", default="data", help="where torchvision's files are, or go, and CIFAR-10-C")
    p.add_argument("--limit", type=int, help="train on the first so many images of a fixed shuffle")
    p.add_argument("--test-limit", type=int, help="test on the first so many images of a fixed shuffle")
    p.add_argument("--aa-limit", type=int, help="AutoAttack on the first so many of these")
    p.add_argument("--test-batch-size", type=int, default=500, help="of attacks; AutoAttack's is 250 at most")
    p.add_argument("--restarts", type=int, default=1, help="of each attack; the worst counts, image by image")
    p.add_argument("--source", help="a classifier-*.pt: attacks are made on it, and transferred")
    p.add_argument("--image-size", type=int, help="side to which images are brought; default: as they are, "
                   "32 for a folder")
    p.add_argument("--pictures", action="store_true", help="of PGD and DeepFool: attacked-*.png")
    p.add_argument("--kept", action="store_true", help="measure nothing: the table of what was measured")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument("--workers", type=int, default=4, help="decoding processes, for an ImageFolder")
    g = p.add_argument_group("over the preset")
    g.add_argument("--epochs", type=int)
    g.add_argument("--milestones", type=int, nargs="*", help="epochs where the rate falls; none: cosine")
    g.add_argument("--lr", type=float)
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--batch-size", type=int)
    g.add_argument("--warmup", type=int, help="epochs")
    g.add_argument("--layer-decay", type=float)
    g.add_argument("--drop-path", type=float)
    g.add_argument("--smoothing", type=float)
    g.add_argument("--mixup", type=float)
    g.add_argument("--cutmix", type=float)
    return p


OVER = ("epochs", "milestones", "lr", "weight_decay", "batch_size",
        "warmup", "layer_decay", "drop_path", "smoothing", "mixup", "cutmix")


def asked(args):
    """The names of the presets, and of the attacks, that the flags ask for."""
    presets = [f"robustssl-{name}" for name in args.protocol] + (args.preset or [])
    attacks = [a for name in args.attacks for a in (CURVE if name == "curve" else [name])]
    return list(dict.fromkeys(presets or ["amoc-slf"])), list(dict.fromkeys(attacks))


def check(args):
    for flag, known in (("preset", ["knn", *PRESETS]), ("protocol", PROTOCOLS),
                        ("attacks", ["clean", "curve", *ATTACKS])):
        for name in getattr(args, flag) or ():
            if name not in known:
                raise ValueError(f"--{flag} {name}: choose from {', '.join(known)}")
    presets, attacks = asked(args)
    if "c" in attacks and args.data not in ("cifar10", "cifar100"):
        raise ValueError(f"--attacks c: there is a CIFAR-10-C and a CIFAR-100-C, but none of {args.data}; "
                         "c-like works for all of side 32")
    for name in attacks if args.source else ():
        if isinstance(ATTACKS.get(name), AutoAttack):
            raise ValueError(f"--source, --attacks {name}: AutoAttack stops just beyond the boundary of the "
                             "source, and so transfers badly; take pgd20")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    for flag in ("weight_decay", "warmup", "mixup", "cutmix"):
        if (getattr(args, flag) or 0) < 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must not be negative")
    for flag in ("layer_decay", "drop_path", "smoothing"):
        if not 0 <= (getattr(args, flag) or 0) <= 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must be from 0 to 1")
    for flag in ("epochs", "lr", "batch_size", "test_batch_size", "image_size", "aa_limit", "restarts"):
        if getattr(args, flag) is not None and getattr(args, flag) <= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must be positive")
    for name in presets:
        if name == "knn":
            continue
        p = chosen(args, name)
        if max(p.milestones, default=0) >= p.epochs:
            raise ValueError(f"--epochs {p.epochs}: preset {name} lowers its rate in epoch "
                             f"{max(p.milestones)}; give other --milestones, or none: a cosine")
        if args.milestones and PRESETS[name].warmup:
            raise ValueError(f"--milestones: preset {name} warms up and follows a cosine")
        if p.warmup >= p.epochs:
            raise ValueError(f"--epochs {p.epochs}: preset {name} warms up for {p.warmup}; lower --warmup")
        clean = p.loss == "clean"
        place = dict(warmup=not p.milestones, layer_decay=p.optimizer == "adamw",
                     drop_path=p.trains == "all", smoothing=clean, mixup=clean, cutmix=clean)
        for flag in place:
            if getattr(args, flag) is not None and not place[flag]:
                raise ValueError(f"--{flag.replace('_', '-')}: preset {name} has no place for it")


def chosen(args, name):
    """Preset `name` with what the flags change."""
    given = {f: getattr(args, f) for f in OVER} | {"dual": False if args.bn else None}
    given = {f: tuple(v) if f == "milestones" else v for f, v in given.items() if v is not None}
    return PRESETS[name]._replace(**given)


def public_corruptions(args):
    return pathlib.Path(args.data_dir) / ("CIFAR-10-C" if args.data == "cifar10" else "CIFAR-100-C")


def digest(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def contents(images):
    """A digest of images and labels."""
    return digest(images.checksum().encode(), images.y.cpu().numpy().tobytes())


def heads(folder):
    """Name, size and beginning of each of the files in `folder`."""
    for path in sorted(folder.glob("*.npy")):
        with open(path, "rb") as f:
            yield f"{path.name} {path.stat().st_size}".encode() + f.read(2**16)


def conditions(attack, args, test_images, source):
    """What, besides the classifier, decides the result for `attack`: plain types, None where it does not."""
    row, n = ATTACKS.get(attack), len(test_images)
    random, moves = isinstance(row, (Attack, AutoAttack)), isinstance(row, (Attack, DeepFool))
    return {"images": min(n, args.aa_limit or n) if isinstance(row, AutoAttack) else n,
            "test": contents(test_images),
            "settings": row and json.loads(json.dumps(row._asdict())),
            "restarts": args.restarts if random and args.restarts > 1 else None,
            "batch_size": args.test_batch_size if random and args.test_batch_size != 500 else None,
            "source": digest(pathlib.Path(args.source).read_bytes()) if source and moves else None,
            "files": digest(*heads(public_corruptions(args))) if attack == "c" else None}


def measure(net, test_images, attack, args, conditions, source):
    """The result for `attack`."""
    row, seed = ATTACKS.get(attack), args.seed
    if isinstance(row, Corruptions):
        return corrupted(net, test_images, row.kinds, public_corruptions(args) if row.public else None, seed)
    source = source if conditions["source"] else None
    n, batch_size = conditions["images"], args.test_batch_size
    found = judge(net, test_images, row, seed, n, conditions["restarts"] or 1, source, batch_size)
    if isinstance(row, AutoAttack):
        found["sanity"] = sanity(net, test_images, row, seed, n, batch_size)
        print("  sanity:", ", ".join(f"{k} {v}" for k, v in found["sanity"].items()))
    return found


def classifier(encoder, file, key, p, images):
    """The classifier of the evaluation `key` by preset `p`: the one kept in `file`, or one trained now."""
    device = next(encoder.parameters()).device
    with contextlib.suppress(FileNotFoundError):
        net = load_classifier(file).to(device, memory_format=torch.channels_last)
        if net.made == json.dumps(key):
            return net
    net = Classifier(encoder, images.classes, p.batch_norm).to(device)
    save_classifier(train(net, images, p, key["seed"]), file, json.dumps(key))
    return net


def evaluate(path, name, args, env, train_images, test_images, source=None):
    """Every attack that is asked for on the encoder at `path` by preset `name`: {(name, attack): result}.
    What eval.jsonl holds is not measured again; what is measured goes there at once."""
    p = None if name == "knn" else chosen(args, name)
    encoder = encoders.load_encoder(path, args.bn, all_branches=p is not None and p.dual)
    encoder = encoder.to(env.device, memory_format=torch.channels_last)
    key = {"encoder": digest(path.read_bytes()), "preset": name, "bn": encoder.branch, "seed": args.seed,
           "data": args.data, "image_size": args.image_size, "train": contents(train_images),
           "recipe": json.loads(json.dumps(p._asdict() if p else {"k": 200, "temperature": 0.1}))}
    stem = "-".join(filter(None, (name, encoder.branch)))
    net, results = None, {}
    for attack in asked(args)[1] if p else ["clean"]:
        began, how = time.time(), conditions(attack, args, test_images, source)
        found = table.kept(path.parent / "eval.jsonl", key, attack, how)
        picture = p and args.pictures and isinstance(ATTACKS.get(attack), (Attack, DeepFool))
        if p and not net and (picture or not found):
            net = classifier(encoder, path.parent / f"classifier-{stem}.pt", key, p, train_images)
        if not found:
            found = (measure(net, test_images, attack, args, how, source) if p else
                     score(knn(encoder, train_images, test_images, **key["recipe"]), len(test_images)))
            found |= {k: v for k, v in how.items() if v is not None}
            line = key | {"results": {attack: found}, "train_images": len(train_images), "path": str(path),
                          "epoch": "best on held-out images" if p and p.validation else "last",
                          "seconds": round(time.time() - began, 1), **run.header(args, env)}
            table.append(path.parent / "eval.jsonl", line)
        results[name, attack] = found
        print(f"{path} {name} {attack}: {table.cell([found])}", flush=True)
        if picture:
            there = path.parent / f"attacked-{stem}-{attack}.png"
            pictures(there, net, test_images, ATTACKS[attack], args.seed, source)
    return results


def resized(images, size):
    """The data set `images`, on the device, at side `size`."""
    if size is None or not hasattr(images, "x") or images.x.shape[2:] == (size, size):
        return images
    parts = [(data.resize(x, size) * 255).round().to(torch.uint8) for x in images.x.split(1000)]
    return data.Images(torch.cat(parts), images.y, images.classes)


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    paths, (presets, attacks) = [pathlib.Path(path) for path in args.paths], asked(args)
    titles = {(p, a): "k-NN" if p == "knn" else f"{p} {a}" for p in presets
              for a in (["clean"] if p == "knn" else attacks)}
    runs = [(path if path.is_dir() else path.parent, {}) for path in paths]
    if args.kept:
        bn = {"bn": args.bn} if args.bn else {}
        for folder, results in runs:
            results |= table.measured(folder, source=None, restarts=None, **bn)
        return print(table.markdown(runs, titles, GROUPS, PUBLISHED, run.FREE))

    env, size = run.Env(run.device(args), 0, 1), args.image_size
    torch.backends.cudnn.allow_tf32 = False  # it moves points that lie close to a boundary
    for path in paths:  # what would fail late fails now
        if path.is_dir():
            raise ValueError(f"{path}: a folder; give the encoder.pt in it, or --kept")
        encoders.load_encoder(path, args.bn)
        if not os.access(path.parent, os.W_OK):
            raise OSError(f"{path.parent} cannot be written")
    train_images, test_images = (  # test images shuffled, so that the first n are a fair sample
        resized(data.load(args.data, args.data_dir, split, env.device, limit, size or 32, args.workers,
                          split == "test"), size)
        for split, limit in (("labelled", args.limit), ("test", args.test_limit)))
    for name in presets:
        if name != "knn":
            p = chosen(args, name)
            data.steps_per_epoch(len(train_images) - held_out(train_images, p), p.batch_size)
    for images in (train_images, test_images):
        if (images.y < 0).any():
            raise ValueError(f"{args.data}: some images have no label; an evaluation needs them all")
    side = test_images.size if isinstance(test_images, data.Folder) else test_images.x.shape[2]
    if "c-like" in attacks and side != 32:
        raise ValueError(f"--attacks c-like: its constants are for side 32, not {side}; --image-size 32")
    source = load_classifier(args.source).to(env.device) if args.source else None
    if source and source.head.out_features != train_images.classes:
        raise ValueError(f"--source {args.source}: {source.head.out_features} classes, {args.data} has "
                         f"{train_images.classes}")
    for kind in corruptions.MAIN if "c" in attacks else ():
        corruptions.read(public_corruptions(args), kind, 1)
    for path, (_, results) in zip(paths, runs):
        for name in presets:
            results |= evaluate(path, name, args, env, train_images, test_images, source)
    print("\n" + table.markdown(runs, titles, GROUPS, PUBLISHED, run.FREE))


if __name__ == "__main__":
    run.cli(main)
