"""Several classifiers that eval.py trained, judged together: their ensemble, and attacks on each of them
judged by all.

    --ensemble   the mean of their softmax, attacked through all of them at once; ensemble.jsonl
    --matrix     an attack is made on each, and all are judged on its images; matrix.jsonl

An ensemble has no folder of its own: what is measured becomes a line of these files at once, in --out or
beside the first classifier, and is not measured a second time while the classifiers (by contents), the
test images, the seed, and the attack with its settings are the same.
"""
import math
import pathlib
import time

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from common import data, files, run
from common.log import header
from common.pgd import eval_mode
from evaluation import attacks, sets, table
from evaluation.flags import asked, is_public
from evaluation.names import attack_named

FLAGS = {"ensemble", "matrix", "out", "attacks", "data", "data_dir", "test_limit", "aa_limit",
         "test_batch_size", "restarts", "image_size", "seed", "device", "workers"}  # that have a meaning here


# Flags and files
def check(args, named):
    """ValueError for flags that do not go with --ensemble or --matrix; `named`: those that stand on the
    command line (flags.named_flags)."""
    if args.ensemble and args.matrix:
        raise ValueError("--ensemble and --matrix: give one of them")
    flag, paths = flag_and_paths(args)
    if args.paths:
        raise ValueError(f"{args.paths[0]}: {flag} takes all its classifiers itself, and no encoder beside them")
    if args.kept:
        raise ValueError(f"--kept: leave it out; with {flag} the same command measures nothing again")
    for name in named:
        if name not in FLAGS | {"paths"}:
            raise ValueError(f"--{name.replace('_', '-')}: has no place with {flag}, whose classifiers are "
                             "trained already")
    if len(paths) < 2:
        raise ValueError(f"{flag} {paths[0]}: give two classifiers or more")
    names = asked(args)[1]
    for name in names:
        if is_public(name) and args.data not in ("cifar10", "cifar100"):
            raise ValueError(f"--attacks {name}: there is a CIFAR-10-C and a CIFAR-100-C, but none of "
                             f"{args.data}; c-like works for all of side 32")
    if args.matrix:
        for name in names:
            row = attack_named(name)
            if isinstance(row, attacks.AutoAttack):
                raise ValueError(f"--matrix, --attacks {name}: AutoAttack stops just beyond the boundary of "
                                 "what it attacks, and so transfers badly; take pgd20")
            if isinstance(row, attacks.Corruptions):
                raise ValueError(f"--matrix, --attacks {name}: corruptions are made on no classifier; take "
                                 "pgd20")
        if names == ["clean"]:
            raise ValueError("--matrix, --attacks clean: give an attack, as pgd20; clean images are always "
                             "judged")


def flag_and_paths(args):
    if args.ensemble:
        return "--ensemble", args.ensemble
    return "--matrix", args.matrix


def load(args, device):
    """The classifiers that the flags name, as `sets.Source`. ValueError where they do not go together, or
    not with the flags."""
    flag, paths = flag_and_paths(args)
    members = [sets.source_of(path, device) for path in paths]
    seen = {}
    for member in members:
        path = member.net.path
        if member.digest in seen:
            raise ValueError(f"{flag}: {seen[member.digest]} and {path} are one classifier, given twice")
        seen[member.digest] = path
    first = members[0].net
    for member in members[1:]:
        here = first.head.out_features
        there = member.net.head.out_features
        if here != there:
            raise ValueError(f"{flag}: {first.path} has {here} classes and {member.net.path} has {there}; they "
                             "must have the same")
    sided = [member.net for member in members if member.net.image_size]
    for net in sided:
        if net.image_size != sided[0].image_size:
            raise ValueError(f"{flag}: {sided[0].path} was trained on images of side {sided[0].image_size} and "
                             f"{net.path} of side {net.image_size}; they must be of one side")
        if args.image_size not in (None, net.image_size):
            raise ValueError(f"--image-size {args.image_size}: {net.path} was trained on images of side "
                             f"{net.image_size}; leave the flag out")
    for member in members:
        name = member.made.get("data")
        if name != args.data and name in data.NAMES and args.data in data.NAMES:
            raise ValueError(f"--data {args.data}: {member.net.path} was trained on {name}; --data {name}")
    return members


def load_images(args, members, device):
    """The test images, as `sets.Sets` without training images. ValueError where they do not suit the
    classifiers or the flags."""
    sides = [member.net.image_size for member in members if member.net.image_size]
    size = args.image_size or next(iter(sides), None)
    test, before = sets.load_split(args, device, size, "test", args.test_limit)
    shown = sets.Sets(None, test, None, sets.contents(test), size, before)
    side = sets.side_of(test)
    if (test.y < 0).any():
        raise ValueError(f"{args.data}: some images have no label; an evaluation needs them all")
    if side is None:
        raise ValueError(f"{args.data}: its test images are not square; give an --image-size to bring them to, "
                         "as 32")
    net = members[0].net
    if net.head.out_features != test.classes:
        raise ValueError(f"--data {args.data}: has {test.classes} classes, {net.path} has "
                         f"{net.head.out_features}")
    sets.check_attacks(args, test)
    with torch.no_grad():
        grey = torch.full((1, 3, side, side), 0.5, device=device)
        for member in members:
            attacks.check_finite(member.net(grey), member.net, "a grey image")
    return shown


def make_folder(args):
    """The folder where results are kept, there and locked."""
    folder = pathlib.Path(args.out or pathlib.Path(flag_and_paths(args)[1][0]).parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"--out {folder} cannot be made: {e.strerror}") from None
    files.lock(folder)
    return folder


def key_of(members, attack, args, shown):
    """What tells a result for `attack` from others: plain types."""
    conditions = sets.conditions(attack, args, shown, None)
    del conditions["vote"]  # which has no place here, and is not in older lines
    return {"classifiers": [member.digest for member in members], "attack": attack, "seed": args.seed,
            "data": args.data, **conditions}


def results_of(path, key):
    """The results in the file at `path` of just this `key`."""
    found = [line.get("result") for line in table.lines(path) if key.items() <= line.items()]
    return [result for result in found if isinstance(result, dict)]


def keep(path, key, result, members, began, args, env):
    """Write `result`, whose measuring `began` at that time, to the file at `path`."""
    line = key | {"result": result, "paths": [str(member.net.path) for member in members],
                  "seconds": round(time.time() - began, 1), **header(args, env)}
    files.append_json_line(path, line)


def measured(args):
    """Measure what is missing; the tables of it all."""
    env = run.Env(run.device(args), 0, 1)
    members = load(args, env.device)
    folder = make_folder(args)
    shown = load_images(args, members, env.device)
    print(f"{args.data}: {len(shown.test)} test images of side {sets.side_of(shown.test)}, "
          f"{shown.test.classes} classes")
    if args.ensemble:
        path = folder / "ensemble.jsonl"
        text = ensemble_table(path, members, args, env, shown)
    else:
        path = folder / "matrix.jsonl"
        text = matrix_tables(path, members, args, env, shown)
    return f"{text}\n\nkept in {path}"


# The ensemble
class Ensemble(nn.Module):
    """Images (B, 3, H, W) -> the log of the mean of the members' softmax, (B, classes): logits whose softmax
    is that mean. The gradient passes through all `members`, whose logits are (B, classes)."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.path = "the ensemble"

    def forward(self, x):
        each = []
        for member in self.members:
            logits = member(x)
            each.append(F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1))
        each = torch.stack(each)
        return each.logsumexp(0) - math.log(len(self.members))  # of (members, B, classes)


def ensemble_table(path, members, args, env, shown):
    """Every attack on the ensemble, and on each of its members alone, as Markdown."""
    judged = {str(member.net.path): (member.net, [member]) for member in members}
    title = f"**mean softmax of the {len(members)}**"
    judged[title] = Ensemble([member.net for member in members]).eval(), members
    names = asked(args)[1]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for name, (net, of) in judged.items():
        cells = []
        for attack in names:
            key = key_of(of, attack, args, shown)
            found = [result for result in results_of(path, key) if table.is_number(result.get("accuracy"))]
            if not found:
                began = time.time()
                conditions = sets.conditions(attack, args, shown, None)
                found = [sets.measure(net, shown, attack, args, conditions, None)]
                if found[0].get("warnings"):
                    print("  warnings:", "; ".join(found[0]["warnings"]))
                keep(path, key, found[0], of, began, args, env)
            cells.append(table.cell(found[:1]))
            print(f"{name.strip('*')} {attack}: {cells[-1]}", flush=True)
        rows.append([name, *cells])
    return "\n" + markdown(rows)


def markdown(rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# The matrix
def judged_by_all(nets, images, attack, source, seed, restarts, batch_size):
    """`attack` (a row of ATTACKS; None: clean images) made on the network `source`: which of the N `images`
    each of `nets` classifies rightly, bool (nets, N), each row as `attacks.judge` counts it; how often the
    logits of each were not finite, (nets,); and how many images each classifies rightly at which `source` has no
    gradient (`attacks.without_gradient`), so that PGD could not move them, (nets,)."""
    right = []
    broken = torch.zeros(len(nets), dtype=torch.long)
    unmoved = torch.zeros_like(broken)
    with eval_mode(*nets), eval_mode(source):
        for i, (x, y) in enumerate(attacks.in_order(images, batch_size)):
            standing = torch.ones(len(nets), len(y), dtype=torch.bool, device=y.device)
            finite = torch.ones_like(standing)
            for r in range(restarts):
                start = attacks.start_seed(seed, i, r)
                x_adv, _ = attacks.attacked(source, x, y, attack, start, batch_size)
                finite &= x_adv.isfinite().flatten(1).all(1)  # NaN where the attack's gradient was
                with torch.no_grad():
                    for j, net in enumerate(nets):
                        logits = net(x_adv)
                        finite[j] &= logits.isfinite().all(1)
                        standing[j] &= logits.argmax(1) == y
            standing &= finite
            if isinstance(attack, attacks.Attack):
                unmoved += (attacks.without_gradient(source, x_adv, y) & standing).sum(1).cpu()
            right.append(standing.cpu())
            broken += (~finite).sum(1).cpu()
    return torch.cat(right, 1), broken, unmoved


def missed_by_all(right):
    """Of right, bool (classifiers, N): how many of the N images no classifier has right."""
    return int((~right).all(0).sum())


def to_text(right):
    """Rows of bool (R, N) as text, to be kept: a bit per image in hexadecimal digits."""
    return [numpy.packbits(row.numpy()).tobytes().hex() for row in right]


def from_text(texts, rows, n):
    """What `to_text` made of bool (rows, n); None where `texts` cannot be that."""
    try:
        found = [numpy.frombuffer(bytes.fromhex(text), numpy.uint8) for text in texts]
    except (TypeError, ValueError):
        return None
    if len(found) != rows or any(len(row) != (n + 7) // 8 for row in found):
        return None
    bits = [torch.from_numpy(numpy.unpackbits(row)[:n]) for row in found]
    return torch.stack(bits).bool()


def matrix_row(path, members, source, attack, args, env, shown):
    """Right, bool (members, N), and the members' results on `attack`, a name, made on the member
    `source`."""
    nets = [member.net for member in members]
    n = len(shown.test)
    conditions = sets.conditions(attack, args, shown, None)
    key = key_of(members, attack, args, shown) | {"attacked": source.digest if attack != "clean" else None}
    for result in results_of(path, key):
        right = from_text(result.get("right"), len(nets), n)
        broken = result.get("not_finite")
        if right is not None and isinstance(broken, list) and len(broken) == len(nets):
            break
    else:
        began = time.time()
        if attack == "clean":
            for net in nets:
                attacks.check_clean(net, shown.test)
        right, broken, unmoved = judged_by_all(nets, shown.test, attack_named(attack), source.net, args.seed,
                                               conditions["restarts"] or 1, args.test_batch_size)
        broken = broken.tolist()
        unmoved = unmoved.tolist()
        accuracies = [100 * int(row.sum()) / n for row in right]
        result = {"accuracies": accuracies, "right": to_text(right), "not_finite": broken,
                  "without_gradient": unmoved}
        keep(path, key, result, members, began, args, env)
    found = []
    unmoved = result.get("without_gradient", len(nets) * [0])  # older lines do not say
    for row, count, still in zip(right, broken, unmoved):
        texts = []
        if count:
            texts.append(f"{count} attacked images have logits that are not finite, and count as fooled")
        if still:
            texts.append(attacks.without_gradient_text(still))
        found.append(attacks.score(100 * int(row.sum()) / n, n))
        if texts:
            found[-1]["warnings"] = texts
            print(f"  warnings: {attack} on {source.net.path}: {'; '.join(texts)}")
    on = "" if attack == "clean" else f" on {source.net.path}"
    print(f"{attack}{on}: {', '.join(table.cell([result]) for result in found)}", flush=True)
    return right, found


def matrix_tables(path, members, args, env, shown):
    """A table for each attack, as Markdown: a row for what it was made on, a column for who is judged."""
    n = len(shown.test)
    clean, on_clean = matrix_row(path, members, members[0], "clean", args, env, shown)
    texts = []
    for attack in asked(args)[1]:
        if attack == "clean":
            continue
        numbers = [str(number) for number, _ in enumerate(members, 1)]
        rows = [[f"{attack} made on", *numbers, f"all miss, of {n}"], ["---"] * (len(members) + 2)]
        rows.append(["none: clean", *cells(on_clean), str(missed_by_all(clean))])
        own = []
        on_own = []
        for i, source in enumerate(members):
            right, found = matrix_row(path, members, source, attack, args, env, shown)
            rows.append([f"{numbers[i]}: {source.net.path}", *cells(found), str(missed_by_all(right))])
            own.append(right[i])
            on_own.append(found[i])
        rows.append(["each on itself", *cells(on_own), str(missed_by_all(torch.stack(own)))])
        texts.append("\n" + markdown(rows))
    return "\n".join(texts)


def cells(found):
    return [table.cell([result]) for result in found]
