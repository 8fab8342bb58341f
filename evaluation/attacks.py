"""How a classifier is judged: the attacks by name, accuracy under them, and whether a figure means
something."""
import contextlib
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import data
from common.augment import resize, to_float
from common.pgd import eval_mode, pgd, pixels_only
from common.pictures import difference, save_rows
from evaluation import corruptions
from evaluation.autoattack import autoattack
from evaluation.deepfool import deepfool
from evaluation.vote import Vote, expected


class Attack(NamedTuple):
    """PGD on the cross-entropy from a uniform start."""

    norm: str
    eps: float
    step_size: float
    steps: int


class AutoAttack(NamedTuple):
    """evaluation.autoattack, on all images at once; with --aa-limit on the first of them."""

    norm: str
    eps: float
    version: str = "standard"


class DeepFool(NamedTuple):
    """evaluation.deepfool, cut to the linf ball."""

    eps: float


class Corruptions(NamedTuple):
    """No attack: the mean over these kinds of evaluation.corruptions, and over severities 1 to 5."""

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
    "c19": Corruptions(corruptions.MAIN + corruptions.EXTRA, True),
    "c17-like": Corruptions(tuple(corruptions.LIKE | corruptions.LIKE_MORE), False),
}

CURVE = ("clean", "pgd20-1", "pgd20-2", "pgd20-4", "pgd20-6", "pgd20", "pgd20-12", "pgd20-16")


def in_order(images, batch_size=500, limit=None):
    """Yield `(x, y)` over all images, or the first `limit`; x float in [0, 1]."""
    count = len(images) if limit is None else min(len(images), limit)
    for x, y in images.stream(torch.arange(count).split(batch_size)):
        yield to_float(x).contiguous(memory_format=torch.channels_last), y


def check_finite(values, net, what):
    """ValueError where one of the rows of `values`, what `net` gives for `what`, is not finite: argmax
    would take a NaN for class 0."""
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
    """x (B, 3, H, W) under `attack`, a row of ATTACKS (None: as it is), and what AutoAttack tells. `net` is
    to be in eval mode: AutoAttack alone sees to that."""
    if isinstance(attack, AutoAttack):
        return autoattack(net, x, y, attack.eps, attack.norm, attack.version, seed, min(250, batch_size),
                          log=lambda text: print("  " + text, flush=True))
    if isinstance(attack, DeepFool):
        with untuned():  # its batches shrink from step to step
            return deepfool(net, x, y, attack.eps), {}
    if attack:
        generator = torch.Generator(x.device).manual_seed(seed)

        def loss_of_images(x_adv):
            return cross_entropy(net(x_adv), y)

        if isinstance(net, Vote):
            loss_of_images = expected(loss_of_images, net.draws)
        x = pgd(loss_of_images, x, attack.eps, attack.step_size, attack.steps, attack.norm,
                generator=generator)
    return x, {}


@contextlib.contextmanager
def untuned():
    """cuDNN does not time its algorithms inside, as it does for each new shape of a batch where
    torch.backends.cudnn.benchmark is on."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cross_entropy(logits, y):
    """The sum over the batch, in float32 or finer: of a mean, in half precision, small gradients would be 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, y, reduction="sum")


def without_gradient(net, x, y):
    """(B,) whether at the images x (B, 3, H, W) the gradient of the cross-entropy with y (B,) is exactly 0,
    as where a softmax is saturated: an attack that follows it cannot move them."""
    z = x.detach().requires_grad_()
    with pixels_only(), torch.enable_grad():
        (g,) = torch.autograd.grad(cross_entropy(net(z), y), z)
    return (g.flatten(1) == 0).all(1)


def without_gradient_text(count):
    """The warning about so many images of `without_gradient` that are classified rightly."""
    return (f"{int(count)} images, classified rightly, have a gradient of exactly 0 in the network that is "
            "attacked: PGD tells nothing of them")


def start_seed(seed, batch, restart):
    """What seeds the start of the attack on batch number `batch`, in restart number `restart`."""
    return seed * 100_003 + batch + 1_000_003 * restart


def judge(net, images, attack=None, seed=0, limit=None, restarts=1, source=None, batch_size=500):
    """How many of `images` (of the first `limit`) `net`, in eval mode inside, classifies rightly, clean
    or under `attack`, made on `source` (None: on itself). Under several restarts the worst counts,
    image by image. Returns a dict: "accuracy" and its "stderr" in per cent, "images", of AutoAttack its
    "stages" and "warnings", and "warnings" where an attacked image, or its logits, are not finite: it
    counts as fooled; and where PGD, without any gradient, cannot move images that are classified rightly.
    Raises ValueError where the logits of a clean image are not finite, and, without an attack, for a label
    that is no class: labels are to be checked before an attack climbs their loss."""
    right = 0
    broken = 0
    blind = 0
    untouched = 0
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
            seen = torch.ones_like(standing)  # by the attack: else its gradient, and so the image, was NaN
            for r in range(restarts):
                start = start_seed(seed, i, r)
                x_adv, report = attacked(source or net, x, y, attack, start, batch_size)
                with torch.no_grad():
                    logits = torch.cat([net(part) for part in x_adv.split(batch_size)])
                finite &= logits.isfinite().all(1)
                seen &= x_adv.isfinite().flatten(1).all(1)
                if y.min() < 0 or y.max() >= logits.shape[1]:
                    raise ValueError(f"labels go from {int(y.min())} to {int(y.max())}, of {logits.shape[1]} classes")
                if not report:
                    standing &= logits.argmax(1) == y
                else:  # of AutoAttack: what fell within it has fallen
                    standing &= torch.tensor(report["standing"], device=y.device)
                    texts = more.get("warnings", []) + report["warnings"]
                    more["warnings"] = list(dict.fromkeys(texts))
                    if restarts == 1:
                        more["stages"] = report["stages"]
            standing &= finite & seen
            right = right + standing.sum()
            if isinstance(attack, Attack) and not isinstance(net, Vote) and standing.any():
                # Of the whole batch: each new shape would start the tuning of cuDNN again.
                untouched += (without_gradient(source or net, x_adv, y) & standing).sum()
            broken = broken + (~finite & seen).sum()
            blind = blind + (~seen).sum()
            total += len(y)
    if int(broken) or int(blind):
        check_clean(net, images, limit)
    for count, what in ((broken, "have logits that are not finite"),
                        (blind, "are NaN, as the gradient of the attack was")):
        if int(count):
            text = f"{int(count)} attacked images {what}, and count as fooled"
            more["warnings"] = more.get("warnings", []) + [text]
    if int(untouched):
        text = without_gradient_text(untouched)
        more["warnings"] = more.get("warnings", []) + [text]
    return score(100 * int(right) / total, total) | more


FAR = {"linf": 64 / 255, "l2": 4.0}  # at eight times a small radius a robust network may still be right


def score(accuracy, images):
    """The standard error is that of the test images; 0 where all or none are right, which is too little."""
    stderr = (accuracy * (100 - accuracy) / images) ** 0.5
    return {"accuracy": accuracy, "stderr": round(stderr, 2), "images": images}


def sanity(net, images, attack, seed, limit, batch_size, accuracy):
    """Accuracies that show whether the `accuracy` under AutoAttack means something: PGD must not be stronger
    than AutoAttack, nor PGD of 20 steps than PGD of 100; and far away, at eight times the radius and at least
    FAR, no image may be classified rightly. In per cent; "doubts" says what is wrong by more than a point, and
    repeats the warnings of these attacks."""
    found = {}
    doubts = []
    far = max(8 * attack.eps, FAR[attack.norm])
    if attack.norm == "linf":
        far = min(far, 1.0)  # the whole range of pixels
    for name, eps, steps in (("pgd20", attack.eps, 20), ("pgd100", attack.eps, 100),
                             ("pgd20 far", far, 20)):
        pgd_of = Attack(attack.norm, eps, eps / 4, steps)
        under = judge(net, images, pgd_of, seed, limit, batch_size=batch_size)
        found[name] = under["accuracy"]
        doubts += [f"{name}: {text}" for text in under.get("warnings", [])]
    if found["pgd100"] > found["pgd20"] + 1:
        doubts.append("PGD-100 is weaker than PGD-20")
    if accuracy > min(found["pgd20"], found["pgd100"]) + 1:
        doubts.append("AutoAttack is weaker than PGD")
    if found["pgd20 far"] > 1:
        doubts.append("images far away are classified rightly")
    return {**found, "doubts": doubts}


@torch.no_grad()
def corrupted(net, images, kinds, folder=None, seed=0):
    """The mean accuracy over `kinds` and severities, as `judge` returns it, with that of each of the
    "kinds". `folder`: of the public files, of which the same test images count as in `images`; None:
    made of those. Raises ValueError where logits are not finite."""
    rights = torch.zeros(len(kinds), 5, len(images))
    for (k, kind), severity in itertools.product(enumerate(kinds), range(1, 6)):
        judged = images
        generator = None
        if folder:
            x, y = corruptions.read(folder, kind, severity)
            if len(images) > len(y):
                raise ValueError(f"{folder}: {len(y)} images a severity, for {len(images)} to be judged")
            rows = data.fixed_order(len(y))[: len(images)]
            x = x[rows].to(images.y.device)
            y = y[rows].to(images.y.device)
            judged = resized(data.Images(x, y, images.classes), images.x.shape[2])
        with eval_mode(net):
            right = []
            outputs = []
            for x, y in in_order(judged):
                if not folder:
                    generator = generator or torch.Generator(x.device).manual_seed(
                        seed * 100_003 + 10 * k + severity)
                    x = corruptions.corrupt(x, kind, severity, generator)
                outputs.append(net(x))
                right.append(outputs[-1].argmax(1) == y)
        check_finite(torch.cat(outputs), net, f"images under {kind}, severity {severity},")
        rights[k, severity - 1] = 100 * torch.cat(right).float().cpu()
    each = rights.mean((0, 1))  # image by image
    n = len(images)
    stderr = round((each.std() / n**0.5).item(), 2) if n > 1 else None
    return {"accuracy": round(each.mean().item(), 2), "stderr": stderr, "images": n,
            "kinds": {kind: round(of_kind.mean().item(), 2) for kind, of_kind in zip(kinds, rights)}}


def resized(images, size):
    """The data set `images`, on the device, at side `size`."""
    if size is None or not hasattr(images, "x") or images.x.shape[2:] == (size, size):
        return images
    parts = [(resize(x, size) * 255).round().to(torch.uint8) for x in images.x.split(1000)]
    return data.Images(torch.cat(parts), images.y, images.classes)


@torch.no_grad()
def pictures(path, net, images, attack, seed, source=None):
    """Write rows of up to eight test images to `path`: clean, attacked, and what the attack added, of
    which white and black are the largest change."""
    x, y = next(in_order(images, 8, limit=8))
    with eval_mode(source or net):
        x_adv, _ = attacked(source or net, x, y, attack, start_seed(seed, 0, 0))
    rows = [("clean", x), ("attacked", x_adv), ("added", difference(x_adv, x, (x_adv - x).abs().max()))]
    save_rows(path, rows, key=("largest decrease", "largest increase"))
