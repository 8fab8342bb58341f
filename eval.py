"""Evaluation of an exported encoder: k-NN, linear probes, fine-tuning, and accuracy under attack; one row per
evaluation.

It knows nothing of how the encoder was pretrained. Names of the field:
    SLF  standard linear:      encoder frozen, clean cross-entropy
    ALF  adversarial linear:   encoder frozen, cross-entropy on PGD-10 images (or TRADES)
    AFF  adversarial full:     everything is trained, likewise
A preset is the recipe of a paper or of the RobustSSL benchmark (github.com/RobustSSL); a flag given by hand
wins over it. The last epoch is used, never one chosen on the test set. A frozen encoder is in eval mode
throughout; under full fine-tuning the attack sees eval mode and the update train mode. PGD alone flatters: on
frozen encoders it reads 4 to 11 points above AutoAttack (aa).

Masked-image models are judged by fine-tuning on clean images (mae-tune; it works for ResNets too): AdamW, a
lower rate for earlier blocks, and for a ViT a new LayerNorm after the mean of its tokens. MAE's recipe has
RandAugment and random erasing besides, which are not here.

    python eval.py runs/amoc/encoder.pt --preset knn amoc-slf amoc-alf
    python eval.py runs/amoc/encoder.pt --preset amoc-aff --attacks clean pgd20 pgd50-l2-amoc
    python eval.py runs/*/encoder.pt --preset robustssl-slf --attacks clean pgd20 aa --aa-limit 1000
    python eval.py runs/adv_mae/encoder.pt --preset mae-tune-cifar mae-slf-cifar

Each evaluation appends a line to eval.jsonl beside the encoder, and is not made a second time; each training
writes classifier-<preset>-<BN>.pt.
"""
import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from common import data, encoders, optim, run
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
    smoothing: float = 0.0  # of the labels, with loss "clean"; likewise
    mixup: float = 0.0  # parameter of its Beta distribution; 0: off. With both, each batch takes one
    cutmix: float = 0.0
    head_std: float = 0.0  # after `zero`, of the weights
    renew_norm: bool = False  # encoders.renew_norm
    batch_norm: bool = False  # a BatchNorm without affine before the classifier


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
    # Jiang et al. 2020 (2010.13337); the probe reads BN clean: --bn clean
    "acl-probe": Preset("linear", "clean", 100, (), 0.1, 0.0, 512, False, "none", nesterov=True),
    "acl-aff-100": Preset("all", "trades", 100, (40, 60), 0.1, 2e-4, 128, True, "constant", uniform=False),
    # Fan et al. 2021 (2111.01124)
    "advcl-slf": Preset("linear", "clean", 25, (15, 20), 0.01, 2e-4, 512, False, "constant"),
    # The RobustSSL benchmark
    "robustssl-slf": Preset("linear", "clean", 25, (15, 20), 0.01, 2e-4, 512, True, "constant"),
    "robustssl-alf": Preset("linear", "pgd", 25, (15, 20), 0.01, 2e-4, 512, True, "constant"),
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


ATTACKS = {
    "pgd20": Attack("linf", 8 / 255, 2 / 255, 20),  # ACL, AdvCL, RobustSSL
    "pgd20-4": Attack("linf", 4 / 255, 1 / 255, 20),
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
}


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
    with eval_mode(net):
        if p.loss == "pgd":
            def climb(x_adv):
                return F.cross_entropy(net(x_adv), y)
        else:
            with torch.no_grad():
                clean = net(x)  # eval mode: constant in the perturbation

            def climb(x_adv):
                return kl(clean, net(x_adv))

        x_adv = pgd(climb, x, eps, p.step_size, 10, start=start.clamp(0, 1))
    return F.cross_entropy(net(x_adv), y) if p.loss == "pgd" else trades(net(x), net(x_adv), y)


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
    print()
    return net.eval()


def save_classifier(net, path):
    """Write the classifier: how to build it, and its weights."""
    torch.save({"format": FORMAT, **net.encoder.recipe, "branch": net.encoder.branch,
                "classes": net.head.out_features, "state": net.state_dict(),
                "batch_norm": isinstance(net.norm, nn.BatchNorm1d)}, f"{path}.tmp")
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
    net.encoder.branch = saved["branch"]
    return net.eval()


# ----------------------------------------------------------------------------------------------------------
# Judging it
# ----------------------------------------------------------------------------------------------------------
def in_order(images, batch_size=500, limit=None):
    """Yield `(x, y)` over all images, or the first `limit`; x float in [0, 1]."""
    for x, y in images.stream(torch.arange(min(len(images), limit or len(images))).split(batch_size)):
        yield data.to_float(x).contiguous(memory_format=torch.channels_last), y


def accuracy(net, images, attack=None, seed=0, limit=None):
    """Per cent of `images` (AutoAttack: of the first `limit`) that `net`, in eval mode inside, classifies
    rightly, clean or under `attack`."""
    if isinstance(attack, AutoAttack):
        x, y = (torch.cat(v) for v in zip(*in_order(images, limit=limit)))
        return autoattack(net, x, y, attack.eps, attack.norm, attack.version, seed,
                          log=lambda text: print("  " + text, flush=True))[1]["robust"]
    right = 0
    with eval_mode(net):
        for i, (x, y) in enumerate(in_order(images)):
            if isinstance(attack, DeepFool):
                x = deepfool(net, x, y, attack.eps)
            elif attack:
                generator = torch.Generator(x.device).manual_seed(seed * 100_003 + i)
                x = pgd(lambda x: F.cross_entropy(net(x), y), x,
                        attack.eps, attack.step_size, attack.steps, attack.norm, generator=generator)
            with torch.no_grad():
                right += (net(x).argmax(1) == y).sum()
    return 100 * int(right) / len(images)


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


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = argparse.ArgumentParser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    p.add_argument("paths", nargs="+", help="exported encoders")
    p.add_argument("--preset", nargs="+", default=["amoc-slf"], help="knn " + " ".join(PRESETS))
    p.add_argument("--attacks", nargs="+", default=["clean", "pgd20"], help="clean " + " ".join(ATTACKS))
    p.add_argument("--bn", help="BN branch; default: the one the encoder was exported with")
    p.add_argument("--data", default="cifar10", help="cifar10, cifar100, stl10, shapes, an .npz, a folder")
    p.add_argument("--data-dir", default="data", help="where torchvision's files are, or go")
    p.add_argument("--limit", type=int, help="train on the first so many images of a fixed shuffle")
    p.add_argument("--test-limit", type=int, help="test on the first so many images of a fixed shuffle")
    p.add_argument("--aa-limit", type=int, help="AutoAttack on the first so many of these")
    p.add_argument("--image-size", type=int, default=32, help="for a folder: side of the decoded square")
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


def check(args):
    for flag, known in (("preset", ["knn", *PRESETS]), ("attacks", ["clean", *ATTACKS])):
        for name in getattr(args, flag):
            if name not in known:
                raise ValueError(f"--{flag} {name}: choose from {', '.join(known)}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    for flag in ("weight_decay", "warmup", "mixup", "cutmix"):
        if (getattr(args, flag) or 0) < 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must not be negative")
    for flag in ("layer_decay", "drop_path", "smoothing"):
        if not 0 <= (getattr(args, flag) or 0) <= 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must be from 0 to 1")
    for flag in ("epochs", "lr", "batch_size", "image_size", "aa_limit"):
        if getattr(args, flag) is not None and getattr(args, flag) <= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must be positive")
    for name in args.preset:
        if name == "knn":
            continue
        p = chosen(args, name)
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
    given = {f: getattr(args, f) for f in OVER}
    given = {f: tuple(v) if f == "milestones" else v for f, v in given.items() if v is not None}
    return PRESETS[name]._replace(**given)


def finished(path, line, attacks):
    """What eval.jsonl beside `path` holds of the evaluation that begins as `line` does, with all `attacks`;
    else None."""
    for text in open(pathlib.Path(path).parent / "eval.jsonl"):
        with contextlib.suppress(json.JSONDecodeError):
            known = json.loads(text)
            same = json.loads(json.dumps(line)).items() <= known.items()
            if same and set(attacks) <= set(known["results"]):
                return known


def evaluate(path, name, args, env, train_images, test_images):
    """One evaluation: returns the object for eval.jsonl, which it extends, and writes the classifier. What
    was evaluated before is not evaluated again."""
    began = time.time()
    encoder = encoders.load_encoder(path, args.bn).to(env.device, memory_format=torch.channels_last)
    line = {"encoder": hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16],
            "preset": name, "bn": encoder.branch, "data": args.data, "seed": args.seed,
            "train_images": len(train_images), "test_images": len(test_images), "aa_limit": args.aa_limit}
    if name != "knn":
        p = chosen(args, name)
        line["recipe"] = p._asdict()
    known = finished(path, line, args.attacks if name != "knn" else ["clean"])
    if known:
        return known
    if name == "knn":
        results = {"clean": knn(encoder, train_images, test_images)}
    else:
        net = Classifier(encoder, train_images.classes, p.batch_norm).to(env.device)
        train(net, train_images, p, args.seed)
        suffix = f"-{encoder.branch}" if encoder.branch else ""
        save_classifier(net, pathlib.Path(path).parent / f"classifier-{name}{suffix}.pt")
        results = {attack: accuracy(net, test_images, ATTACKS.get(attack), args.seed, args.aa_limit)
                   for attack in args.attacks}
    line["results"] = {}
    for attack, v in results.items():
        auto = isinstance(ATTACKS.get(attack), AutoAttack)
        n = min(len(test_images), args.aa_limit or len(test_images)) if auto else len(test_images)
        line["results"][attack] = {"accuracy": v, "stderr": round((v * (100 - v) / n) ** 0.5, 2), "images": n}
    line |= {"path": str(path), "epoch": "last", "seconds": round(time.time() - began, 1),
             **run.header(args, env)}
    with open(pathlib.Path(path).parent / "eval.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    return line


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    env = run.Env(run.device(args), 0, 1)
    train_images, test_images = (
        data.load(args.data, args.data_dir, split, env.device, limit, args.image_size, args.workers)
        for split, limit in (("labelled", args.limit), ("test", args.test_limit)))
    for path in args.paths:  # what would fail late fails now
        encoders.load_encoder(path, args.bn)
        open(pathlib.Path(path).parent / "eval.jsonl", "a").close()
    for name in args.preset:
        if name != "knn":
            data.steps_per_epoch(len(train_images), chosen(args, name).batch_size)
    for images in (train_images, test_images):
        if (images.y < 0).any():
            raise ValueError(f"{args.data}: some images have no label; an evaluation needs them all")
    rows = [f"| encoder | preset | BN | {' | '.join(args.attacks)} |", "|---" * (3 + len(args.attacks)) + "|"]
    for path in args.paths:
        for name in args.preset:
            line = evaluate(path, name, args, env, train_images, test_images)
            found = [line["results"].get(attack) for attack in args.attacks]
            found = [f"{v['accuracy']:.2f}" if v else "" for v in found]
            rows.append(f"| {path} | {line['preset']} | {line['bn']} | {' | '.join(found)} |")
            print(rows[-1], flush=True)
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    run.cli(main)
