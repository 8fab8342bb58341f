"""Results and classifiers on disk: by what they are known again, and what is kept of them.

A result is a line of eval.jsonl beside the encoder. Its key is the encoder's contents, the preset with
all its numbers, the BatchNorm branch, the seed, and the contents of the data; `conditions` of the
attack are in the result itself. Where key and conditions are the same, nothing is measured again.
"""
import hashlib
import pathlib
import sys

from torch import nn

from common import encoders, files, own, run
from evaluation import foreign, table
from evaluation.attacks import Attack, AutoAttack, DeepFool
from evaluation.finetune import Classifier
from evaluation.flags import OVER, asked, attacks_on, titles_of
from evaluation.names import attack_named
from evaluation.presets import PRESETS, filled, in_order, name_of, recipe_of
from evaluation.published import GROUPS, PUBLISHED


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


# Classifiers
FORMAT = "evaluated classifier, version 1"


def save_classifier(net, path, made=None, image_size=None):
    """Write the classifier: how to build it, its weights, the side of the images that it was trained
    on, of what it was `made`, the epoch that was picked, and the accuracies it was picked by."""
    files.save({"format": FORMAT, **net.encoder.recipe, "branch": net.encoder.branch, "made": made,
                "image_size": image_size, "classes": net.head.out_features,
                "batch_norm": isinstance(net.norm, nn.BatchNorm1d),
                "picked_epoch": net.picked_epoch, "history": net.history,
                "state": encoders.one_branch(net.state_dict(), net.encoder.branch)}, path)


def load_classifier(path):
    """The classifier that an evaluation wrote to `path`: a plain nn.Module in eval mode, images in [0,
    1] -> logits, which any attack library can call. Its attribute `image_size` is the side of the
    images that it was trained on (None where the file does not say). Raises FileNotFoundError, or
    ValueError that names what is wrong."""
    saved = encoders.read(path, FORMAT, "eval.py writes classifier-<preset>-<BN>.pt")
    encoder = foreign.rebuild(saved) if foreign.is_foreign(saved["arch"]) else encoders.rebuild(saved)
    net = Classifier(encoder, saved["classes"], saved.get("batch_norm", False))
    files.load_strict(net, saved["state"], path)
    bad = files.not_finite(saved["state"])
    if bad:
        raise ValueError(f"{path}: {bad} is not finite")
    net.encoder.branch = saved["branch"]
    net.made = saved.get("made")
    net.picked_epoch = saved.get("picked_epoch")
    net.history = saved.get("history", [])
    net.image_size = saved.get("image_size")
    net.path = path
    return net.eval()


def key_of(path, encoder, name, preset, args, shown):
    """What tells the evaluation of the encoder at `path` by preset `name` from others, but for the
    attack; plain types. `preset` is None for k-NN; `shown` are the images (sets.Sets)."""
    recipe = recipe_of(preset) if preset else {"k": 200, "temperature": 0.1}
    origin = {}
    if args.encoder and not encoders.is_exported(path):  # an exported one is what it is, wherever its code lies
        code = own.code_of(args.encoder) if ".py:" in args.encoder else None
        origin = {"network": [args.encoder, code, args.prefix, args.bn, args.mean, args.std]}
        if encoder.recipe.get("head"):  # older results were of features before the whole of it
            origin["head"] = True
    elif ".py:" in encoder.recipe["arch"]:
        origin = {"network": encoder.recipe["code"]}
    return {"encoder": digest_of(path), **origin, "preset": name, "bn": encoder.branch, "seed": args.seed,
            "data": args.data, "image_size": shown.size, "train": shown.train_digest,
            "recipe": recipe}


def classifier_stem(path, encoder, name, preset):
    """What the names of the classifier's file and pictures say: [encoder's file-]preset[-changes][-BN]."""
    bn = "dual" if own.has_branches(encoder) else encoder.branch
    file = "" if path.name == "encoder.pt" else path.stem
    if preset:
        # What is changed of BatchNorm's branches is said by `bn`.
        name = name_of(name, recipe_of(preset._replace(dual=PRESETS[name].dual))).replace(" ", "-")
    if len(name) > 150:  # a file's may have 255
        name = f"{name[:130]}-{digest(name.encode())}"
    return "-".join(filter(None, (file, name, bn)))


def encoder_paths(args):
    """The paths of the flags, without the classifiers that an evaluation left among `*.pt`.
    ValueError where one is there twice."""
    paths = [pathlib.Path(path) for path in args.paths]
    others = [path for path in paths if not path.name.startswith(("classifier-", "training-"))]
    if others and len(others) < len(paths):
        left_out = len(paths) - len(others)
        print(f"{left_out} classifier-*.pt and training-*.pt are no encoders, and left out", file=sys.stderr)
        paths = others
    seen = {}
    for path in paths:
        place = path.resolve() / "encoder.pt" if table.is_folder(path) else path.resolve()
        if place in seen:
            raise ValueError(f"{seen[place]} and {path} are one encoder, given twice")
        seen[place] = path
    return paths


def row_path(path):
    """What stands for the encoder at `path` in the table: its folder, or, where the file has a name of
    its own, the file."""
    return path.parent if path.name == "encoder.pt" else path


def name_foreign_lines(folders):
    """One line on stderr for each eval.jsonl that has lines which hold no result."""
    for folder in dict.fromkeys(folders):
        numbers = table.foreign(folder / "eval.jsonl")
        if numbers:
            which = ", ".join(map(str, numbers))
            print(f"{folder / 'eval.jsonl'}: line {which} holds no result, and is left out", file=sys.stderr)


def kept_table(args, named):
    """The table of what was measured and is what the flags `named` (see `named_flags`) say. ValueError
    where that is nothing."""
    runs = kept_runs(args, named)
    published = PUBLISHED if args.published else ()
    return table.markdown(runs, kept_columns(args, runs), GROUPS, published, run.FREE)


def kinds_tables(args, named):
    """Of the corruptions among those results, a table for each column: kind by kind, a row for each
    encoder. ValueError where there are none."""
    runs = kept_runs(args, named)
    columns = {column: title for column, title in kept_columns(args, runs).items()
               if any("kinds" in results.get(column, {}) for _, results in runs)}
    if not columns:
        raise ValueError("--kinds: of none of these results the kinds were kept")
    return "\n\n".join(table.kinds(runs, column, title) for column, title in columns.items())


def with_results(paths):
    """Those of `paths` beside which something was measured; each run that is left out, as one that has not
    been evaluated yet, is a line on stderr. All of them where that is none, or where one is not there."""
    found = []
    missing = []
    for path in paths:
        folder = path if table.is_folder(path) else path.parent
        unmeasured = folder.is_dir() and not (folder / "eval.jsonl").exists()
        (missing if unmeasured else found).append(path)
    if not found:
        return paths
    for path in missing:
        print(f"{path}: nothing was measured there yet; left out", file=sys.stderr)
    return found


def kept_runs(args, named):
    """What was measured and is what the flags `named` say: pairs of a path and its results {column:
    result}. ValueError where that is nothing."""
    wanted = {name: named[name] for name in ("bn", "image_size") if name in named}
    source = digest_of(args.source) if args.source else None  # digest of the classifier
    presets = asked(args)[0]

    def accept(line, attack, result):
        if line["preset"] not in presets or attack not in attacks_on(args, line["preset"]):
            return False
        if result.get("test_data") and result["test_data"] not in args.test_data:
            return False
        return is_named(line, attack, result, named, source)

    runs = []
    paths = with_results(encoder_paths(args))
    folders = [path if table.is_folder(path) else path.parent for path in paths]
    name_foreign_lines(folders)
    for path, folder in zip(paths, folders):
        for file in table.evaluated(folder) if path == folder else [path.name]:
            found = table.read_folder(folder, file, accept, others=True, **wanted)
            found = table.with_epochs(found)
            runs.append((row_path(folder / file), found))
    if not any(results for _, results in runs):
        lines = [line for folder in folders for line in table.measurements(folder)]
        measured = dict.fromkeys(
            " ".join(table.column(name_of(line["preset"], line.get("recipe"), result.get("vote")), attack,
                                  result.get("test_data")))
            for line in lines for attack, result in table.results(line).items())
        raise ValueError("nothing was measured of what these flags name; there is "
                         f"{', '.join(measured) or 'nothing'}")
    return runs


def kept_columns(args, runs):
    """{column: title} of what `kept_runs` found, all variants of a preset beside each other."""
    found = dict.fromkeys(column[0] for _, results in runs for column in results)
    names = [name for preset in asked(args)[0] for name in in_order(n for n in found if n.split()[0] == preset)]
    return titles_of(names, args)


def is_named(line, attack, result, named, source):
    """Whether the `result` for `attack`, of `line`, is what the flags `named` say. `source`: the digest
    of that flag's file."""
    row = attack_named(attack)
    flags = line.get("flags") if isinstance(line.get("flags"), dict) else {}  # old lines say more there
    recipe = line.get("recipe") if isinstance(line.get("recipe"), dict) else {}
    if "trains" in recipe:  # not of k-NN
        recipe = filled(recipe)
    random = isinstance(row, (Attack, AutoAttack))
    moves = isinstance(row, (Attack, DeepFool))
    restarts = named.get("restarts", 1)
    if result.get("restarts") != (restarts if random and restarts > 1 else None):
        return False
    if result.get("source") != (source if moves else None):
        return False
    vote = result.get("vote") or {}
    for name, part in (("vote", "copies"), ("vote_sigma", "sigma"), ("vote_draws", "draws")):
        if name in named and vote.get(part) != named[name]:
            return False
    for name in ("data", "seed"):
        if name in named and line.get(name, flags.get(name)) != named[name]:
            return False
    if "limit" in named and line.get("train_images") != named["limit"]:
        return False
    images = result.get("images", line.get("test_images"))
    limits = [named[name] for name in ("test_limit", "aa_limit") if name in named]
    if result.get("test_data"):  # which may have fewer images than the limit
        if limits and not (table.is_number(images) and images <= limits[0]):
            return False
    elif not isinstance(row, AutoAttack):
        if "test_limit" in named and images != named["test_limit"]:
            return False
    elif "aa_limit" in named:
        if images != min(limits):
            return False
    elif limits and not (table.is_number(images) and images <= limits[0]):
        return False
    size = named.get("test_batch_size")
    if size and random and (result.get("batch_size") or 500) != size:
        return False
    if "bn" in named and recipe.get("dual"):
        return False
    return all(recipe[name] == named[name] for name in OVER if name in named and name in recipe)
