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

An encoder is shown images of the side that it was pretrained at, which its file holds, unless --image-size
says otherwise.

Each result, as soon as it is there, becomes a line of eval.jsonl beside the encoder, and is not measured a
second time while encoder, data, recipe and attack are the same; the last classifier of each preset is kept
there too, as classifier-<preset>-<BN>.pt (BN "dual" where both branches were trained; of another file than
encoder.pt, its name comes before the preset's). One process at a time works in a folder.

--kept takes of what was measured that which the flags name; a flag that is left out chooses nothing, except
--preset and --attacks.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import signal
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.utils import save_image

from common import corruptions, data, encoders, files, optim, run, table
from common.augment import random_flip, random_pad_crop, random_resized_crop, resize, to_float
from common.autoattack import autoattack
from common.deepfool import deepfool
from common.log import header
from common.pgd import eval_mode, pgd
from common.resnet import branch


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
    def logits(x, bn):
        with branch(net, bn) if p.dual else contextlib.nullcontext():
            return net(x)

    if p.loss == "clean":
        return F.cross_entropy(logits(x, "clean"), y, label_smoothing=p.smoothing)
    eps = 8 / 255
    noise = 2 * noise - 1
    start = x + (noise * eps if p.uniform else 0.001 * 2**0.5 * torch.erfinv(0.9999 * noise))
    with eval_mode(net):
        if p.loss == "pgd":
            def climb(x_adv):
                return F.cross_entropy(logits(x_adv, "adv"), y)
        else:
            with torch.no_grad():
                clean = logits(x, "clean")  # eval mode: constant in the perturbation

            def climb(x_adv):
                return kl(clean, logits(x_adv, "adv"))

        x_adv = pgd(climb, x, eps, p.step_size, 10, start=start.clamp(0, 1))
    if p.loss == "pgd":
        return F.cross_entropy(logits(x_adv, "adv"), y)
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
        x = random_resized_crop(x, rng, x.shape[2], scale=(0.08, 1.0), flip=0.5, filter="bicubic")
    elif p.augment != "none":
        x = random_flip(random_pad_crop(to_float(x), rng, 4, p.augment), rng)
    x, y = mix(to_float(x), y)
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
    bad = files.not_finite(net.state_dict())
    if bad:  # after the last step, whose loss was
        raise ValueError(f"the classifier's {bad} is not finite after training; try a lower --lr")
    return net.eval()


def held_out(images, p):
    """How many of the training images are kept for the choice of the epoch."""
    return round(p.validation * len(images))


def save_classifier(net, path, made=None, image_size=None):
    """Write the classifier: how to build it, its weights, the side of the images that it was trained on, and
    of what it was `made`."""
    files.save({"format": FORMAT, **net.encoder.recipe, "branch": net.encoder.branch, "made": made,
                "image_size": image_size, "classes": net.head.out_features,
                "batch_norm": isinstance(net.norm, nn.BatchNorm1d),
                "state": encoders.one_branch(net.state_dict(), net.encoder.branch)}, path)


FORMAT = "evaluated classifier, version 1"


def load_classifier(path):
    """The classifier that an evaluation wrote to `path`: a plain nn.Module in eval mode, images in [0, 1] ->
    logits, which any attack library can call. Its attribute `image_size` is the side of the images that it
    was trained on (None where the file does not say). Raises FileNotFoundError, or ValueError that names what
    is wrong."""
    saved = encoders.read(path, FORMAT, "eval.py writes classifier-<preset>-<BN>.pt")
    encoder = encoders.rebuild(saved)
    net = Classifier(encoder, saved["classes"], saved.get("batch_norm", False))
    encoders.load_strict(net, saved["state"], path)
    bad = files.not_finite(saved["state"])
    if bad:
        raise ValueError(f"{path}: {bad} is not finite")
    net.encoder.branch = saved["branch"]
    net.made = saved.get("made")
    net.image_size = saved.get("image_size")
    net.path = path
    return net.eval()


# ----------------------------------------------------------------------------------------------------------
# Judging it
# ----------------------------------------------------------------------------------------------------------
def in_order(images, batch_size=500, limit=None):
    """Yield `(x, y)` over all images, or the first `limit`; x float in [0, 1]."""
    for x, y in images.stream(torch.arange(min(len(images), limit or len(images))).split(batch_size)):
        yield to_float(x).contiguous(memory_format=torch.channels_last), y


def check_finite(values, net, what):
    """ValueError where one of the rows of `values`, what `net` gives for `what`, is not finite: argmax would
    take a NaN for class 0."""
    bad = (~values.isfinite().all(1)).nonzero()
    if len(bad):
        image = int(bad[0])
        raise ValueError(f"{getattr(net, 'path', 'the network')}: its output for {what} is not finite, first "
                         f"of image {image}, batch {image // 500}")


@torch.no_grad()
def check_clean(net, images, limit=None):
    """ValueError where the logits of one of `images` (of the first `limit`) are not finite."""
    with eval_mode(net):
        check_finite(torch.cat([net(x) for x, _ in in_order(images, limit=limit)]), net, "clean images")


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
    image. Returns a dict: "accuracy" and its "stderr" in per cent, "images", of AutoAttack its "stages" and
    "warnings", and "warnings" where an attacked image had logits that are not finite: it counts as fooled.
    Raises ValueError where those of a clean image are not."""
    right = 0
    broken = 0
    total = 0
    more = {}
    batches = in_order(images, batch_size, limit)
    if isinstance(attack, (AutoAttack, DeepFool)):  # which would not name the file
        check_clean(net, images, limit)
    if isinstance(attack, AutoAttack):  # which fills its batches anew with what stands
        batches = [[torch.cat(parts) for parts in zip(*batches)]]
    with eval_mode(net), eval_mode(source or net):
        for i, (x, y) in enumerate(batches):
            standing = torch.ones_like(y, dtype=torch.bool)
            finite = torch.ones_like(standing)
            for r in range(restarts):
                x_adv, report = attacked(
                    source or net, x, y, attack, seed * 100_003 + i + 1_000_003 * r, batch_size)
                with torch.no_grad():
                    logits = torch.cat([net(part) for part in x_adv.split(batch_size)])
                finite &= logits.isfinite().all(1)
                standing &= logits.argmax(1) == y
                if report:
                    texts = more.get("warnings", []) + report["warnings"]
                    more["warnings"] = list(dict.fromkeys(texts))
                    if restarts == 1:
                        more["stages"] = report["stages"]
            right = right + (standing & finite).sum()
            broken = broken + (~finite).sum()
            total += len(y)
    if int(broken):
        check_clean(net, images, limit)
        text = f"{int(broken)} attacked images have logits that are not finite, and count as fooled"
        more["warnings"] = more.get("warnings", []) + [text]
    return score(100 * int(right) / total, total) | more


def score(accuracy, images):
    stderr = (accuracy * (100 - accuracy) / images) ** 0.5
    return {"accuracy": accuracy, "stderr": round(stderr, 2), "images": images}


def sanity(net, images, attack, seed, limit, batch_size):
    """Accuracies that show whether a robust one means something: PGD of 100 steps must not be weaker than PGD
    of 20, and at eight times the radius nothing may stand. In per cent; "doubts" says what is wrong by more
    than a point, and repeats the warnings of these attacks."""
    found = {}
    doubts = []
    for name, eps, steps in (("pgd20", attack.eps, 20), ("pgd100", attack.eps, 100),
                             ("pgd20 at 8 eps", 8 * attack.eps, 20)):
        pgd_of = Attack(attack.norm, eps, eps / 4, steps)
        under = judge(net, images, pgd_of, seed, limit, batch_size=batch_size)
        found[name] = under["accuracy"]
        doubts += [f"{name}: {text}" for text in under.get("warnings", [])]
    if found["pgd100"] > found["pgd20"] + 1:
        doubts.append("PGD-100 is weaker than PGD-20")
    if found["pgd20 at 8 eps"] > 1:
        doubts.append("images stand at 8 eps")
    return {**found, "doubts": doubts}


@torch.no_grad()
def corrupted(net, images, kinds, folder=None, seed=0):
    """The mean accuracy over `kinds` and severities, as `judge` returns it, with that of each of the "kinds".
    `folder`: of the public files, of which the same test images count as in `images`; None: made of those.
    Raises ValueError where logits are not finite."""
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
            outputs = []
            for x, y in in_order(there):
                if not folder:
                    generator = generator or torch.Generator(x.device).manual_seed(
                        seed * 100_003 + 10 * k + severity)
                    x = corruptions.corrupt(x, kind, severity, generator)
                outputs.append(net(x))
                found.append(outputs[-1].argmax(1) == y)
        check_finite(torch.cat(outputs), net, f"images under {kind}, severity {severity},")
        rights[k, severity - 1] = 100 * torch.cat(found).float().cpu()
    each, n = rights.mean((0, 1)), len(images)  # image by image
    return {"accuracy": round(each.mean().item(), 2), "stderr": round((each.std() / n**0.5).item(), 2),
            "images": n, "kinds": {k: round(v.mean().item(), 2) for k, v in zip(kinds, rights)}}


@torch.no_grad()
def knn(encoder, train_images, test_images, k=200, temperature=0.1):
    """Weighted k-nearest-neighbour accuracy in per cent on un-augmented images (Wu et al. 2018, arXiv
    1805.01978): each of the k most similar training images votes for its class with weight
    exp(cosine / temperature). Temperature 0.1 as in MoCo's CIFAR-10 demo. Raises ValueError where a feature
    is not finite."""
    with eval_mode(encoder):
        bank, labels = features(encoder, train_images, "training images")
        queries, wanted = features(encoder, test_images, "test images")
    right = 0
    for h, y in zip(queries.split(500), wanted.split(500)):
        similar, index = (h @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(h), train_images.classes, device=h.device)
        votes.scatter_add_(1, labels[index], (similar / temperature).exp())
        right += (votes.argmax(1) == y).sum()
    return 100 * int(right) / len(test_images)


def features(encoder, images, what):
    """The features of `images`, divided by their length, (N, dim), and the labels (N,)."""
    parts = []
    labels = []
    for x, y in in_order(images):
        parts.append(F.normalize(encoder(x)))
        labels.append(y)
    h = torch.cat(parts)
    check_finite(h, encoder, what)
    return h, torch.cat(labels)


@torch.no_grad()
def pictures(path, net, images, attack, seed, source=None):
    """Rows of up to eight test images: clean, attacked, and the difference (grey is none, full scale is the
    largest)."""
    x, y = next(in_order(images, 8))
    with eval_mode(source or net):
        x_adv, _ = attacked(source or net, x, y, attack, seed)
    far = (x_adv - x).abs().max().clamp_min(1e-8)
    with files.replacing(path) as temporary:
        rows = torch.cat([x, x_adv, 0.5 + (x_adv - x) / (2 * far)])
        save_image(rows, temporary, nrow=len(x), format="png")


# ----------------------------------------------------------------------------------------------------------
# The command: flags
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.Parser("eval.py", __doc__)
    whole = run.integer(1)
    p.add_argument("paths", nargs="+", type=run.path, metavar="PATH",
                   help="exported encoders; with --kept the folders of runs, too")
    p.add_argument("--preset", nargs="+", choices=["knn", *PRESETS], metavar="NAME",
                   help="knn " + " ".join(PRESETS) + "; default: amoc-slf")
    p.add_argument("--protocol", nargs="+", default=[], choices=PROTOCOLS, metavar="NAME",
                   help="slf alf aff: the benchmark's, robustssl-...")
    p.add_argument("--attacks", nargs="+", default=["clean", "pgd20"], choices=["clean", "curve", *ATTACKS],
                   metavar="NAME", help="curve (pgd20 at 0 to 16/255) clean " + " ".join(ATTACKS))
    p.add_argument("--bn", help="BN branch, and no other; default: the one the encoder was exported with")
    p.add_argument("--data", default="cifar10", type=run.path,
                   help="cifar10, cifar100, stl10, shapes, an .npz, a folder")
    p.add_argument("--data-dir", default="data", type=run.path,
                   help="where torchvision's files are, or go, and CIFAR-10-C")
    p.add_argument("--limit", type=whole, help="train on the first so many images of a fixed shuffle")
    p.add_argument("--test-limit", type=whole, help="test on the first so many images of a fixed shuffle")
    p.add_argument("--aa-limit", type=whole, help="AutoAttack on the first so many of these")
    p.add_argument("--test-batch-size", type=whole, default=500,
                   help="of attacks; AutoAttack's is 250 at most")
    p.add_argument("--restarts", type=whole, default=1,
                   help="of each attack; the worst counts, image by image")
    p.add_argument("--source", type=run.path,
                   help="a classifier-*.pt: attacks are made on it, and transferred")
    p.add_argument("--image-size", type=run.integer(1, 10_000),
                   help="side to which images are brought; default: the encoder's own; where its file names "
                   "none, as they are, 32 for a folder")
    p.add_argument("--pictures", action="store_true", help="of PGD and DeepFool: attacked-*.png")
    p.add_argument("--kept", action="store_true", help="measure nothing: the table of what was measured")
    p.add_argument("--seed", type=run.integer(0, 2**32 - 1), default=0)
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument("--workers", type=run.integer(0, 1000), default=4,
                   help="decoding processes, for an ImageFolder")
    g = p.add_argument_group("over the preset")
    g.add_argument("--epochs", type=whole)
    g.add_argument("--milestones", type=whole, nargs="*", help="epochs where the rate falls; none: cosine")
    g.add_argument("--lr", type=run.number(above=0))
    g.add_argument("--weight-decay", type=run.number(0))
    g.add_argument("--batch-size", type=whole)
    g.add_argument("--warmup", type=run.integer(0), help="epochs")
    g.add_argument("--layer-decay", type=run.number(0, 1))
    g.add_argument("--drop-path", type=run.number(0, 1))
    g.add_argument("--smoothing", type=run.number(0, 0.99))
    g.add_argument("--mixup", type=run.number(0))
    g.add_argument("--cutmix", type=run.number(0))
    return p


OVER = ("epochs", "milestones", "lr", "weight_decay", "batch_size",
        "warmup", "layer_decay", "drop_path", "smoothing", "mixup", "cutmix")


def given(argv):
    """The flags that stand on the command line, {name: value}: those that are left out are not there."""
    absent = object()
    found = argparse.Namespace(**dict.fromkeys(vars(parser().parse_args(argv)), absent))
    parser().parse_args(argv, found)  # a default does not replace what is there
    return {name: value for name, value in vars(found).items() if value is not absent}


def asked(args):
    """The names of the presets, and of the attacks, that the flags ask for."""
    presets = [f"robustssl-{name}" for name in args.protocol] + (args.preset or [])
    attacks = [a for name in args.attacks for a in (CURVE if name == "curve" else [name])]
    return list(dict.fromkeys(presets or ["amoc-slf"])), list(dict.fromkeys(attacks))


def check(args):
    """ValueError for flags that do not go together."""
    presets, attacks = asked(args)
    if args.kept:
        return
    if "c" in attacks and args.data not in ("cifar10", "cifar100"):
        raise ValueError(f"--attacks c: there is a CIFAR-10-C and a CIFAR-100-C, but none of {args.data}; "
                         "c-like works for all of side 32")
    for name in attacks if args.source else ():
        if isinstance(ATTACKS.get(name), AutoAttack):
            raise ValueError(f"--source, --attacks {name}: AutoAttack stops just beyond the boundary of the "
                             "source, and so transfers badly; take pgd20")
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
    over = {f: getattr(args, f) for f in OVER} | {"dual": False if args.bn else None}
    over = {f: tuple(v) if f == "milestones" else v for f, v in over.items() if v is not None}
    return PRESETS[name]._replace(**over)


def titles(args):
    """{(preset, attack): title} of the columns that the flags ask for."""
    presets, attacks = asked(args)
    found = {}
    for preset in presets:
        for attack in ["clean"] if preset == "knn" else attacks:
            found[preset, attack] = "k-NN" if preset == "knn" else f"{preset} {attack}"
    return found


def encoder_paths(args):
    """The paths of the flags, without the classifiers that an earlier evaluation left among `*.pt`.
    ValueError where one is there twice."""
    paths = [pathlib.Path(path) for path in args.paths]
    others = [path for path in paths if not path.name.startswith("classifier-")]
    if others and len(others) < len(paths):
        print(f"{len(paths) - len(others)} classifier-*.pt are no encoders, and left out", file=sys.stderr)
        paths = others
    seen = {}
    for path in paths:
        place = path.resolve() / "encoder.pt" if table.is_folder(path) else path.resolve()
        if place in seen:
            raise ValueError(f"{seen[place]} and {path} are one encoder, given twice")
        seen[place] = path
    return paths


def row_path(path):
    """What stands for the encoder at `path` in the table: its folder, or, where the file has a name of its
    own, the file."""
    return path.parent if path.name == "encoder.pt" else path


def name_foreign_lines(folders):
    """One line on stderr for each eval.jsonl that has lines which hold no result."""
    for folder in dict.fromkeys(folders):
        numbers = table.foreign(folder / "eval.jsonl")
        if numbers:
            which = ", ".join(map(str, numbers))
            print(f"{folder / 'eval.jsonl'}: line {which} holds no result, and is left out", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------
# The command: what was measured
# ----------------------------------------------------------------------------------------------------------
def kept_table(args, named):
    """The table of what was measured and is what the flags `named` (see `given`) say. ValueError where that
    is nothing."""
    wanted = {name: named[name] for name in ("bn", "image_size") if name in named}
    source = digest_of(args.source) if args.source else None
    columns = titles(args)

    def accept(line, attack, found):
        return (line["preset"], attack) in columns and is_named(line, attack, found, named, source)

    runs = []
    paths = encoder_paths(args)
    folders = [path if table.is_folder(path) else path.parent for path in paths]
    name_foreign_lines(folders)
    for path, folder in zip(paths, folders):
        for file in table.evaluated(folder) if path == folder else [path.name]:
            runs.append((row_path(folder / file), table.measured(folder, file, accept, **wanted)))
    if not any(results for _, results in runs):
        lines = [line for folder in folders for line in table.measurements(folder)]
        there = dict.fromkeys(
            f"{line['preset']} {attack}" for line in lines for attack in table.results(line))
        raise ValueError("nothing was measured of what these flags name; there is "
                         f"{', '.join(there) or 'nothing'}")
    return table.markdown(runs, columns, GROUPS, PUBLISHED, run.FREE)


def is_named(line, attack, found, named, source):
    """Whether the result `found` for `attack`, of `line`, is what the flags `named` say. `source`: the digest
    of that flag's file."""
    row = ATTACKS.get(attack)
    flags = line.get("flags") if isinstance(line.get("flags"), dict) else {}  # old lines say more there
    recipe = line.get("recipe") if isinstance(line.get("recipe"), dict) else {}
    random = isinstance(row, (Attack, AutoAttack))
    moves = isinstance(row, (Attack, DeepFool))
    restarts = named.get("restarts", 1)
    if found.get("restarts") != (restarts if random and restarts > 1 else None):
        return False
    if found.get("source") != (source if moves else None):
        return False
    for name in ("data", "seed"):
        if name in named and line.get(name, flags.get(name)) != named[name]:
            return False
    if "limit" in named and line.get("train_images") != named["limit"]:
        return False
    images = found.get("images", line.get("test_images"))
    limits = [named[name] for name in ("test_limit", "aa_limit") if name in named]
    if not isinstance(row, AutoAttack):
        if "test_limit" in named and images != named["test_limit"]:
            return False
    elif "aa_limit" in named:
        if images != min(limits):
            return False
    elif limits and not (table.is_number(images) and images <= limits[0]):
        return False
    size = named.get("test_batch_size")
    if size and random and (found.get("batch_size") or 500) != size:
        return False
    if "bn" in named and recipe.get("dual"):
        return False
    return all(recipe[name] == named[name] for name in OVER if name in named and name in recipe)


# ----------------------------------------------------------------------------------------------------------
# The command: measuring
# ----------------------------------------------------------------------------------------------------------
def digest(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def digest_of(path):
    """The digest of a file. OSError that names it and the reason where it cannot be read."""
    try:
        return digest(pathlib.Path(path).read_bytes())
    except OSError as e:
        raise OSError(f"{path} cannot be read: {e.strerror}") from None


def contents(images):
    """A digest of images and labels."""
    return digest(images.checksum().encode(), images.y.cpu().numpy().tobytes())


@functools.lru_cache(maxsize=None)
def _hash(path, *stamp):
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            found.update(block)
    return found.digest()


def public_corruptions(args):
    return pathlib.Path(args.data_dir) / ("CIFAR-10-C" if args.data == "cifar10" else "CIFAR-100-C")


def public_contents(args):
    """A digest of the public corruptions that count. Each file is read whole, once as long as its size and
    its times stay."""
    parts = []
    for name in (*corruptions.MAIN, "labels"):
        path = public_corruptions(args) / f"{name}.npy"
        about = path.stat()
        times = about.st_mtime_ns, about.st_ctime_ns
        parts.append(name.encode() + _hash(path.resolve(), about.st_size, *times))
    return digest(*parts)


def check_public(folder, images):
    """ValueError where the public corruptions in `folder` cannot be those of the test images `images`: their
    labels are not, in the same order."""
    for kind in corruptions.MAIN:  # every file is there, and as long as the labels
        corruptions.read(folder, kind, 1)
    for severity in range(1, 6):
        _, y = corruptions.read(folder, corruptions.MAIN[0], severity)
        if len(images) > len(y):
            raise ValueError(f"{folder}: {len(y)} images a severity, for {len(images)} to be judged")
        rows = data.fixed_order(len(y))[: len(images)]
        if not torch.equal(y[rows], images.y.cpu()):
            raise ValueError(f"{folder / 'labels.npy'}: the labels of severity {severity} are not those of "
                             "the test images in their order; the files are of other data, or damaged")


class Sets(NamedTuple):
    """The images that an encoder is shown."""

    train: object
    test: object
    train_digest: str
    test_digest: str
    size: object  # the side that they were brought to; None: they are as they were
    before: object  # (height, width) before that, None for a folder


def load_sets(args, device, size):
    """Training and test images at side `size`."""
    found = []
    for split, limit in (("labelled", args.limit), ("test", args.test_limit)):
        # test images shuffled, so that the first n are a fair sample
        shuffle = split == "test"
        images = data.load(args.data, args.data_dir, split, device, limit, size or 32, args.workers, shuffle)
        before = tuple(images.x.shape[2:]) if hasattr(images, "x") else None
        found.append(resized(images, size))
    train, test = found
    return Sets(train, test, contents(train), contents(test), size, before)


def resized(images, size):
    """The data set `images`, on the device, at side `size`."""
    if size is None or not hasattr(images, "x") or images.x.shape[2:] == (size, size):
        return images
    parts = [(resize(x, size) * 255).round().to(torch.uint8) for x in images.x.split(1000)]
    return data.Images(torch.cat(parts), images.y, images.classes)


def side_of(images):
    """The side of square images; None where they are not square."""
    if not hasattr(images, "x"):
        return images.size
    height, width = images.x.shape[2:]
    return height if height == width else None


def check_sets(args, sets):
    """ValueError where the images do not suit the flags: what would fail late fails now."""
    presets, attacks = asked(args)
    side = side_of(sets.test)
    for images in (sets.train, sets.test):
        if (images.y < 0).any():
            raise ValueError(f"{args.data}: some images have no label; an evaluation needs them all")
        if side is None or side_of(images) != side:
            shapes = " and ".join("{} x {}".format(*some.x.shape[2:]) for some in (sets.train, sets.test))
            raise ValueError(f"{args.data}: training and test images are of {shapes} pixels, and must be "
                             "square and of one size; give an --image-size to bring them to, as 32")
    if len(sets.train.y.unique()) < 2:
        raise ValueError(f"{args.data}: the training images are all of one class; an evaluation needs two")
    if "c-like" in attacks and side != 32:
        raise ValueError(f"--attacks c-like: its constants are for side 32, not {side}; --image-size 32")
    if "c" in attacks:
        check_public(public_corruptions(args), sets.test)
    for name in attacks:
        if isinstance(ATTACKS.get(name), AutoAttack) and side < 5:
            raise ValueError(f"--attacks {name}: AutoAttack needs images of side 5, these have {side}; "
                             "--image-size 32")
    for name in presets:
        if name == "knn":
            continue
        p = chosen(args, name)
        held = held_out(sets.train, p)
        if p.validation and not held:
            raise ValueError(f"--preset {name}: holds out a {p.validation:g} of the training images, of "
                             f"{len(sets.train)} that is none")
        data.steps_per_epoch(len(sets.train) - held, p.batch_size)
        if p.augment == "reflect" and side <= 4:
            raise ValueError(f"--preset {name}: reflects 4 pixels at the edges, for which images of side "
                             f"{side} are too small; --image-size 32")


def try_encoder(path, args, env, sets):
    """Say on images of which side the encoder at `path` is judged, if that may surprise, and show it one:
    what it cannot take, or makes no finite feature of, is a ValueError now."""
    encoder = encoders.load_encoder(path, args.bn)
    side = side_of(sets.test)
    if encoder.image_size:
        past = f"was pretrained at {encoder.image_size}"
    else:
        past = "does not say at which side it was pretrained"
    if encoder.image_size not in (None, side):
        print(f"{path} {past}; it is judged on images of side {side}")
    elif sets.before not in (None, (side, side)):
        height, width = sets.before
        size = f"side {height}" if height == width else f"{height} x {width}"
        print(f"{path} {past}; the images, of {size}, are brought to {side}")
    encoder = encoder.to(env.device, memory_format=torch.channels_last)
    encoder.path = path
    with torch.no_grad():
        grey = torch.full((1, 3, side, side), 0.5, device=env.device)
        check_finite(encoder(grey), encoder, "a grey image")


class Source(NamedTuple):
    """The classifier that a transferred attack is made on."""

    net: nn.Module
    digest: str
    made: dict  # of what: the key of its evaluation, empty where the file does not say


def load_source(args, device):
    """The `Source` that the flags name, or None."""
    if not args.source:
        return None
    net = load_classifier(args.source).to(device)
    made = {}
    with contextlib.suppress(TypeError, ValueError):
        made = json.loads(net.made)
    return Source(net, digest_of(args.source), made if isinstance(made, dict) else {})


def doubts_of(source, args, sets):
    """What is not known of the source of transferred attacks: a list of sentences. ValueError where it was
    trained for other data."""
    if not source:
        return []
    classes = source.net.head.out_features
    if classes != sets.train.classes:
        raise ValueError(f"--source {args.source}: {classes} classes, {args.data} has {sets.train.classes}")
    side = side_of(sets.test)
    if source.net.image_size not in (None, side):
        own = source.net.image_size
        raise ValueError(f"--source {args.source}: was trained on images of side {own}, the attacked are of "
                         f"{side}; --image-size {own}")
    if source.made.get("train") == sets.train_digest:
        return []
    name = source.made.get("data")
    if name is None:
        return ["the source of the attack does not say on which data it was trained"]
    if name != args.data:
        raise ValueError(f"--source {args.source}: was trained on {name}, not on {args.data}")
    if name in data.NAMES:  # another --limit
        return []
    return [f"the source of the attack was trained on other images of {name}"]


def conditions(attack, args, sets, source):
    """What, besides the classifier, decides the result for `attack`: plain types, None where it does not."""
    row = ATTACKS.get(attack)
    n = len(sets.test)
    random = isinstance(row, (Attack, AutoAttack))
    moves = isinstance(row, (Attack, DeepFool))
    return {"images": min(n, args.aa_limit or n) if isinstance(row, AutoAttack) else n,
            "test": sets.test_digest,
            "settings": row and json.loads(json.dumps(row._asdict())),
            "restarts": args.restarts if random and args.restarts > 1 else None,
            "batch_size": args.test_batch_size if random and args.test_batch_size != 500 else None,
            "source": source.digest if source and moves else None,
            "files": public_contents(args) if attack == "c" else None}


def measure(net, test_images, attack, args, conditions, source):
    """The result for `attack`."""
    row = ATTACKS.get(attack)
    if isinstance(row, Corruptions):
        folder = public_corruptions(args) if row.public else None
        return corrupted(net, test_images, row.kinds, folder, args.seed)
    source = source.net if conditions["source"] else None
    n = conditions["images"]
    size = args.test_batch_size
    found = judge(net, test_images, row, args.seed, n, conditions["restarts"] or 1, source, size)
    if isinstance(row, AutoAttack):
        found["sanity"] = sanity(net, test_images, row, args.seed, n, size)
        print("  sanity:", ", ".join(f"{k} {v}" for k, v in found["sanity"].items()))
    return found


def classifier(encoder, file, key, p, images):
    """The classifier of the evaluation `key` by preset `p`: the one kept in `file`, or one trained now."""
    device = next(encoder.parameters()).device
    if file.exists():
        try:
            net = load_classifier(file).to(device, memory_format=torch.channels_last)
            if net.made == json.dumps(key):
                return net
        except ValueError as e:
            print(f"{e}; it is trained again")
    net = Classifier(encoder, images.classes, p.batch_norm).to(device)
    net.path = file
    train(net, images, p, key["seed"])
    save_classifier(net, file, json.dumps(key), side_of(images))
    return net


def evaluate(path, name, args, env, sets, source=None):
    """Every attack that is asked for on the encoder at `path` by preset `name`: {(name, attack): result}.
    What eval.jsonl holds is not measured again; what is measured goes there at once."""
    p = None if name == "knn" else chosen(args, name)
    encoder = encoders.load_encoder(path, args.bn, all_branches=p is not None and p.dual)
    encoder = encoder.to(env.device, memory_format=torch.channels_last)
    encoder.path = path
    key = {"encoder": digest_of(path), "preset": name, "bn": encoder.branch, "seed": args.seed,
           "data": args.data, "image_size": sets.size, "train": sets.train_digest,
           "recipe": json.loads(json.dumps(p._asdict() if p else {"k": 200, "temperature": 0.1}))}
    bn = "dual" if encoder.branch and p and p.dual else encoder.branch
    stem = "-".join(filter(None, ("" if path.name == "encoder.pt" else path.stem, name, bn)))
    net = None
    results = {}
    for attack in asked(args)[1] if p else ["clean"]:
        began = time.time()
        how = conditions(attack, args, sets, source)
        found = table.kept(path.parent / "eval.jsonl", key, attack, how, path.name)
        picture = p and args.pictures and isinstance(ATTACKS.get(attack), (Attack, DeepFool))
        if p and not net and (picture or not found):
            net = classifier(encoder, path.parent / f"classifier-{stem}.pt", key, p, sets.train)
        if not found:
            if p:
                found = measure(net, sets.test, attack, args, how, source)
            else:
                found = score(knn(encoder, sets.train, sets.test, **key["recipe"]), len(sets.test))
            texts = found.get("warnings", []) + (doubts_of(source, args, sets) if how["source"] else [])
            if texts:
                found["warnings"] = texts
                print("  warnings:", "; ".join(texts))
            found |= {k: v for k, v in how.items() if v is not None}
            line = key | {"results": {attack: found}, "train_images": len(sets.train), "path": str(path),
                          "epoch": "best on held-out images" if p and p.validation else "last",
                          "seconds": round(time.time() - began, 1), **header(args, env)}
            files.append_json_line(path.parent / "eval.jsonl", line)
        results[name, attack] = found
        print(f"{path} {name} {attack}: {table.cell([found])}", flush=True)
        if picture:
            there = path.parent / f"attacked-{stem}-{attack}.png"
            pictures(there, net, sets.test, ATTACKS[attack], args.seed, source and source.net)
    return results


@contextlib.contextmanager
def stoppable():
    """Ctrl-C and SIGTERM inside end the program in one line, with exit status 128 + the signal's number."""
    def stop(number, _):
        signal.signal(number, signal.SIG_DFL)  # the second one kills
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as e:
        print("\nstopped; what was measured is in eval.jsonl, the same command goes on", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def measured_table(args, named):
    """Measure what is missing; the table of it all."""
    presets, attacks = asked(args)
    env = run.Env(run.device(args), 0, 1)
    torch.backends.cudnn.allow_tf32 = False  # it moves points that lie close to a boundary
    torch.backends.cuda.matmul.allow_tf32 = False
    # What would fail late fails now.
    paths = encoder_paths(args)
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path}: a folder; give the encoder.pt in it, or --kept")
    table.rows([row_path(path) for path in paths], run.FREE)
    sizes = {path: args.image_size or encoders.load_encoder(path, args.bn).image_size for path in paths}
    for path in paths:
        if not os.access(path.parent, os.W_OK):
            raise OSError(f"{path.parent} cannot be written")
        files.lock(path.parent)
    name_foreign_lines(path.parent for path in paths)
    source = load_source(args, env.device)
    sets = {}
    for path, size in sizes.items():
        if size not in sets:
            found = load_sets(args, env.device, size)
            check_sets(args, found)
            doubts_of(source, args, found)
            print(f"{args.data}: {len(found.train)} training and {len(found.test)} test images of side "
                  f"{side_of(found.test)}, {found.train.classes} classes")
            sets[size] = found
        try_encoder(path, args, env, sets[size])
    if "knn" in presets and "attacks" in named and attacks != ["clean"]:
        print("k-NN is not attacked: it is judged on clean images")
    runs = []
    for path, size in sizes.items():
        results = {}
        for name in presets:
            results |= evaluate(path, name, args, env, sets[size], source)
        runs.append((row_path(path), results))
    return "\n" + table.markdown(runs, titles(args), GROUPS, PUBLISHED, run.FREE)


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    if args.kept:
        print(kept_table(args, given(argv)))
    else:
        with stoppable():
            print(measured_table(args, given(argv)))


if __name__ == "__main__":
    run.cli(main)
