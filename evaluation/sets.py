"""The images that encoders are shown, the source of transferred attacks, and all that must fit: what
would fail late is refused before anything is measured."""
import contextlib
import functools
import hashlib
import json
import pathlib
import sys
from typing import NamedTuple

import torch
from torch import nn

from common import data, encoders
from evaluation import attacks, corruptions, foreign
from evaluation.attacks import Attack, AutoAttack, DeepFool, check_finite, resized
from evaluation.finetune import hold_out
from evaluation.flags import asked, is_public, preset_of, vote_of
from evaluation.names import attack_named
from evaluation.presets import HELD_OUT
from evaluation.results import contents, digest, digest_of, load_classifier
from evaluation.vote import Vote


class Sets(NamedTuple):
    """The images that an encoder is shown."""

    train: object
    test: object
    train_digest: str
    test_digest: str
    size: object  # the side that they were brought to; None: they are as they were
    before: object  # (height, width) before that, None for a folder
    test_data: object = None  # where `test` is another test set, its path
    present: object = None  # if not all, the classes that its images can be of; its labels are places in it


def load_sets(args, device, size):
    """Training and test images at side `size`."""
    found = []
    for split, limit in (("labelled", args.limit), ("test", args.test_limit)):
        images, before = load_split(args, device, size, split, limit)
        found.append(images)
    train, test = found
    return Sets(train, test, contents(train), contents(test), size, before)


def load_split(args, device, size, split, limit):
    """The images of `split` at side `size`, and their (height, width) before that, None for a folder."""
    # test images shuffled, so that the first n are a fair sample
    shuffle = split == "test"
    images = data.load(args.data, args.data_dir, split, device, limit, size or 32, args.workers, shuffle)
    before = tuple(images.x.shape[2:]) if hasattr(images, "x") else None
    return resized(images, size), before


def load_others(args, device, sets):
    """The other test sets that the flags name, at the side of the test images of `sets`: copies of `sets`
    with another `test`. ValueError where one does not suit. Each is described in a line."""
    found = []
    side = side_of(sets.test)
    names = None
    for path in dict.fromkeys(args.test_data):
        if names is None and pathlib.Path(path).is_dir():
            names = data.class_names(args.data, args.data_dir)
        classes = sets.train.classes
        try:
            images, present = data.load_test(path, classes, names, device, args.test_limit, side,
                                             args.workers)
        except OSError as e:
            raise OSError(f"--test-data {e}") from None
        except ValueError as e:
            raise ValueError(f"--test-data {e}") from None
        if len(present) < 2:
            raise ValueError(f"--test-data {path}: its images are all of one class, of which no classifier "
                             "can miss one; an evaluation needs two")
        change = ""
        if hasattr(images, "x") and images.size != side:
            height, width = images.x.shape[2:]
            change = f", of {height} x {width} pixels, brought to side {side}"
        print(f"{path}: {len(images)} test images, {len(present)} of the {classes} classes{change}")
        images = resized(images, side)
        present = present if len(present) < classes else None
        own = digest(contents(images).encode(), json.dumps(present).encode())
        found.append(sets._replace(test=images, test_digest=own, test_data=path, present=present))
    return found


class Among(nn.Module):
    """The classifier `net` among the classes `present`, a list of labels: its logits of those, (B,
    len(present)), in that order."""

    def __init__(self, net, present):
        super().__init__()
        self.net = net
        self.present = present
        self.path = getattr(net, "path", "the network")

    def forward(self, x):
        return self.net(x)[:, self.present]


def describe(args, sets):
    """One line about the images."""
    return (f"{args.data}: {len(sets.train)} training and {len(sets.test)} test images of side "
            f"{side_of(sets.test)}, {sets.train.classes} classes")


def side_of(images):
    """The side of square images; None where they are not square."""
    if not hasattr(images, "x"):
        return images.size
    height, width = images.x.shape[2:]
    return height if height == width else None


def check_sets(args, sets):
    """ValueError where the images do not suit the flags: what would fail late fails now."""
    presets, _ = asked(args)
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
    taught = set(sets.train.y.unique().tolist())
    unknown = sorted(set(sets.test.y.unique().tolist()) - taught)
    if unknown:
        first = f"{', '.join(map(str, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}"
        print(f"{args.data}: test images have the labels {first}, of which there is no training image (classes count "
              "from 0; a small --limit may have left them out)", file=sys.stderr)
    check_attacks(args, sets.test)
    for name in presets:
        if name == "knn":
            continue
        p = preset_of(args, name)
        held, rest = hold_out(sets.train, p)
        if p.pick and not held:
            raise ValueError(f"--preset {name}: holds out a {HELD_OUT:g} of the training images, of "
                             f"{len(sets.train)} that is none")
        data.steps_per_epoch(len(rest), p.batch_size)
        if p.augment == "reflect" and side <= 4:
            raise ValueError(f"--preset {name}: reflects 4 pixels at the edges, for which images of side "
                             f"{side} are too small; --image-size 32")


def check_attacks(args, test):
    """ValueError where the square images `test` do not suit the attacks that are asked for."""
    names = asked(args)[1]
    side = side_of(test)
    for name in names:
        if name in ("c-like", "c17-like") and side != 32:
            raise ValueError(f"--attacks {name}: its constants are for side 32, not {side}; --image-size 32")
        if is_public(name):
            check_public(public_corruptions(args), test, attack_named(name).kinds)
    for name in names:
        if isinstance(attack_named(name), AutoAttack) and side < 5:
            raise ValueError(f"--attacks {name}: AutoAttack needs images of side 5, these have {side}; "
                             "--image-size 32")


def try_encoder(path, args, env, sets):
    """Say on images of which side the encoder at `path` is judged, if that may surprise, and show it
    one: what it cannot take, or makes no finite feature of, is a ValueError now."""
    encoder = foreign.load(path, args)
    for name in asked(args)[0]:
        if name != "knn" and preset_of(args, name).fresh_last:
            encoders.last_stage(encoder, f"{path}: --preset {name}")
        for flag in ("layer_decay", "drop_path"):
            if getattr(args, flag) and not encoders.has_blocks(encoder):
                raise ValueError(f"{path}: --{flag.replace('_', '-')} needs a network of this project; of this "
                                 "one, which the blocks are is not known")
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
        try:
            features = encoder(grey)
        except (RuntimeError, AssertionError) as e:
            if "memory" in str(e):
                raise
            raise ValueError(f"{path}: takes no images of side {side} ({' '.join(str(e).split())[:200]}); give "
                             "the side that it is for by --image-size") from None
        check_finite(features, encoder, "a grey image")


@functools.lru_cache(maxsize=None)
def _hash(path, *stamp):
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            found.update(block)
    return found.digest()


def public_corruptions(args):
    return pathlib.Path(args.data_dir) / ("CIFAR-10-C" if args.data == "cifar10" else "CIFAR-100-C")


def public_contents(args, kinds=corruptions.MAIN):
    """A digest of the public corruptions that count, `kinds`. Each file is read whole, once as long as its
    size and its times stay."""
    parts = []
    for name in (*kinds, "labels"):
        path = public_corruptions(args) / f"{name}.npy"
        about = path.stat()
        times = about.st_mtime_ns, about.st_ctime_ns
        parts.append(name.encode() + _hash(path.resolve(), about.st_size, *times))
    return digest(*parts)


def check_public(folder, images, kinds=corruptions.MAIN):
    """ValueError where the public corruptions in `folder` cannot be those of the test images `images`:
    their labels are not, in the same order."""
    for kind in kinds:  # every file is there, and as long as the labels
        corruptions.read(folder, kind, 1)
    for severity in range(1, 6):
        _, y = corruptions.read(folder, corruptions.MAIN[0], severity)
        if len(images) > len(y):
            raise ValueError(f"{folder}: {len(y)} images a severity, for {len(images)} to be judged")
        rows = data.fixed_order(len(y))[: len(images)]
        if not torch.equal(y[rows], images.y.cpu()):
            raise ValueError(f"{folder / 'labels.npy'}: the labels of severity {severity} are not those of "
                             "the test images in their order; the files are of other data, or damaged")


class Source(NamedTuple):
    """A classifier that attacks are made on."""

    net: nn.Module
    digest: str  # of its file, and of the code of a network of one's own
    made: dict  # of what: the key of its evaluation, empty where the file does not say


def load_source(args, device):
    """The `Source` that the flags name, or None."""
    return source_of(args.source, device) if args.source else None


def source_of(path, device):
    """The `Source` that is the classifier at `path`."""
    net = load_classifier(path).to(device)
    found = digest_of(path)
    code = net.encoder.recipe.get("code")  # of a network of one's own: what it is today
    if code:
        found = digest(found.encode(), code.encode())
    made = {}
    with contextlib.suppress(TypeError, ValueError):
        made = json.loads(net.made)
    return Source(net, found, made if isinstance(made, dict) else {})


def doubts_of(source, args, sets):
    """What is not known of the source of transferred attacks: a list of sentences. ValueError where it
    was trained for other data."""
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


def row_of(attack, args):
    """The row of the attack called `attack`; of AutoAttack on a vote, version rand."""
    row = attack_named(attack)
    return row._replace(version="rand") if args.vote and isinstance(row, AutoAttack) else row


def conditions(attack, args, sets, source):
    """What, besides the classifier, decides the result for `attack`: plain types, None where it does
    not."""
    row = row_of(attack, args)
    n = len(sets.test)
    random = isinstance(row, (Attack, AutoAttack))
    moves = isinstance(row, (Attack, DeepFool))
    return {"images": min(n, args.aa_limit or n) if isinstance(row, AutoAttack) else n,
            "test": sets.test_digest,
            "settings": row and json.loads(json.dumps(row._asdict())),
            "restarts": args.restarts if random and args.restarts > 1 else None,
            "batch_size": args.test_batch_size if random and args.test_batch_size != 500 else None,
            "source": source.digest if source and moves else None,
            "files": public_contents(args, row.kinds) if is_public(attack) else None,
            "test_data": sets.test_data,
            "vote": vote_of(args)}


def measure(net, sets, attack, args, conditions, source):
    """Judge the classifier `net` on the test images of `sets` under `attack`, a name: the result for
    eval.jsonl."""
    row = row_of(attack, args)
    test_images = sets.test
    if sets.present:
        net = Among(net, sets.present)
    size = args.test_batch_size
    if args.vote:
        net = Vote(net, **vote_of(args), seed=args.seed, device=test_images.y.device)
        size = max(1, size // args.vote)  # images, of which each is so many copies
    if isinstance(row, attacks.Corruptions):
        folder = public_corruptions(args) if row.public else None
        return attacks.corrupted(net, test_images, row.kinds, folder, args.seed)
    source = source.net if conditions["source"] else None
    if source and sets.present:
        source = Among(source, sets.present)
    n = conditions["images"]
    result = attacks.judge(net, test_images, row, args.seed, n, conditions["restarts"] or 1, source, size)
    if isinstance(row, attacks.AutoAttack):
        result["sanity"] = attacks.sanity(net, test_images, row, args.seed, n, size, result["accuracy"])
        print("  sanity:", ", ".join(f"{name} {value}" for name, value in result["sanity"].items()))
    return result
