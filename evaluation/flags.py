"""What the flags of eval.py ask for."""
import argparse
import pathlib

from common import run
from evaluation import table
from evaluation.attacks import ATTACKS, Attack, AutoAttack, Corruptions
from evaluation.names import CURVES, GRAMMAR, attack_named, canonical
from evaluation.presets import PRESETS, PROTOCOLS, VOTE_DRAWS, name_of, recipe_of


def attack(text):
    """An argparse type: the name of an attack, its canonical one, or of a curve."""
    if text in CURVES:
        return text
    try:
        return canonical(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def parser(doc):
    """The parser of eval.py, whose docstring is `doc`."""
    p = run.Parser("eval.py", doc)
    whole = run.integer(1)
    p.add_argument("paths", nargs="*", type=run.path, metavar="PATH",
                   help="exported encoders; with --kept the folders of runs, too")
    p.add_argument("--preset", nargs="+", choices=["knn", *PRESETS], metavar="NAME",
                   help="knn " + " ".join(PRESETS) + "; default: amoc-slf")
    p.add_argument("--protocol", nargs="+", default=[], choices=PROTOCOLS, metavar="NAME",
                   help="slf alf aff: the benchmark's, robustssl-...")
    p.add_argument("--attacks", nargs="+", default=["clean", "pgd20"], type=attack, metavar="NAME",
                   help="curve (pgd20 at 0 to 16/255) curve-l2 (0.25 to 4) curve-steps (1 to 100 steps, 8/255) "
                   "clean " + " ".join(ATTACKS) + f", or {GRAMMAR}")
    p.add_argument("--bn", help="the BatchNorm branch; default: the one that the method exported. With --encoder, of "
                   "checkpoints of ACL and AdvCL, its number")
    p.add_argument("--encoder", metavar="SPEC",
                   help="the network of weights from elsewhere: torchvision:resnet18, "
                   "timm:vit_tiny_patch16_224, my_file.py:function")
    p.add_argument("--prefix", default="",
                   help="with --encoder: what stands before the network's keys in the file, as module.backbone.")
    p.add_argument("--mean", type=run.number(-1e3, 1e3), nargs=3, metavar=("R", "G", "B"),
                   help="with --encoder: of its normalisation, for images in [0, 1]; default: none")
    p.add_argument("--std", type=run.number(above=0), nargs=3, metavar=("R", "G", "B"),
                   help="with --encoder: see --mean")
    p.add_argument("--data", default="cifar10", type=run.path,
                   help="cifar10, cifar100, stl10, shapes, an .npz, a folder")
    p.add_argument("--test-data", nargs="+", default=[], type=run.path, metavar="PATH",
                   help="other test sets, on which the classifier is judged too: .npz, *_data.npy, "
                   "folders of class folders")
    p.add_argument("--data-dir", default="data", type=run.path,
                   help="where torchvision's files are, or go, and CIFAR-10-C")
    p.add_argument("--limit", type=whole, help="train on the first so many images of a fixed shuffle")
    p.add_argument("--test-limit", type=whole, help="test on the first so many images of a fixed shuffle")
    p.add_argument("--aa-limit", type=whole, help="AutoAttack on the first so many of the test images")
    p.add_argument("--test-batch-size", type=whole, default=500,
                   help="of attacks; AutoAttack's is 250 at most")
    p.add_argument("--restarts", type=whole, default=1,
                   help="of each attack; the worst counts, image by image")
    p.add_argument("--source", type=run.path,
                   help="a classifier-*.pt: attacks are made on it, and transferred")
    p.add_argument("--vote", type=whole, metavar="N",
                   help="judge the mean softmax over N noisy copies of each image, attacked through the "
                   "expectation")
    p.add_argument("--vote-sigma", type=run.number(above=0), metavar="S",
                   help="with --vote: standard deviation of the Gaussian noise, for pixels in [0, 1]")
    p.add_argument("--vote-draws", type=whole, metavar="M",
                   help="with --vote: PGD averages its gradient over M votes, each with noise of its own; "
                   f"default: {VOTE_DRAWS}")
    p.add_argument("--image-size", type=run.integer(1, 10_000),
                   help="side to which images are brought; default: the encoder's own; where its file names "
                   "none, as they are, 32 for a folder")
    p.add_argument("--ensemble", nargs="+", type=run.path, metavar="FILE",
                   help="no encoders: judge the mean softmax of these classifier-*.pt, attacked as one, and each")
    p.add_argument("--matrix", nargs="+", type=run.path, metavar="FILE",
                   help="no encoders: make the attacks on each of these classifier-*.pt, and judge all")
    p.add_argument("--out", type=run.path,
                   help="with --ensemble or --matrix: the folder for their results; default: that of the first")
    p.add_argument("--pictures", action="store_true", help="of PGD and DeepFool: attacked-*.png")
    p.add_argument("--kept", action="store_true", help="measure nothing: the table of what was measured")
    p.add_argument("--published", action=argparse.BooleanOptionalAction, default=True,
                   help="with a column of published figures, where there are any")
    p.add_argument("--kinds", action="store_true",
                   help="measure nothing: print the kept accuracies of the corruptions among --attacks, kind by "
                   "kind")
    p.add_argument("--seed", type=run.integer(0, 2**32 - 1), default=0,
                   help="of the classifier's training and of the attacks")
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument("--workers", type=run.integer(0, 1000), default=4,
                   help="decoding processes, for an ImageFolder")
    g = p.add_argument_group("instead of the preset's")
    g.add_argument("--epochs", type=whole)
    g.add_argument("--steps", type=whole, help="of presets that have steps instead of epochs")
    g.add_argument("--ramp", type=run.integer(0), help="steps in which the rate rises, of presets with such")
    g.add_argument("--milestones", type=whole, nargs="*", help="epochs where the rate falls; without a number: a cosine")
    g.add_argument("--lr", type=run.number(above=0))
    g.add_argument("--weight-decay", type=run.number(0))
    g.add_argument("--batch-size", type=whole)
    g.add_argument("--warmup", type=run.integer(0), help="epochs")
    g.add_argument("--layer-decay", type=run.number(0, 1),
                   help="rate of a block over that of the next one")
    g.add_argument("--drop-path", type=run.number(0, 1), help="probability to skip the last block")
    g.add_argument("--smoothing", type=run.number(0, 0.99), help="of the labels")
    g.add_argument("--mixup", type=run.number(0), help="parameter of its Beta distribution; 0: off")
    g.add_argument("--cutmix", type=run.number(0), help="parameter of its Beta distribution; 0: off")
    return p


# What a flag may change of a preset.
OVER = ("epochs", "steps", "ramp", "milestones", "lr", "weight_decay", "batch_size",
        "warmup", "layer_decay", "drop_path", "smoothing", "mixup", "cutmix")


def named_flags(parser, argv):
    """The flags that stand on the command line, {name: value}; those that are left out are not in it.
    `parser` is a function that makes the parser."""
    absent = object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(parser().parse_args(argv)), absent))
    parser().parse_args(argv, namespace)  # a default does not replace what is there
    return {name: value for name, value in vars(namespace).items() if value is not absent}


def asked(args):
    """The names of the presets, and of the attacks, that the flags ask for."""
    presets = [f"robustssl-{name}" for name in args.protocol] + (args.preset or [])
    attacks = [a for name in args.attacks for a in CURVES.get(name, [name])]
    return list(dict.fromkeys(presets or ["amoc-slf"])), list(dict.fromkeys(attacks))


def attacks_on(args, preset, test_data=None):
    """The attacks that are asked for with `preset` on the data's own test images, or on the test set at
    `test_data`: k-NN is not attacked, and of no other test set there are public corruptions."""
    names = ["clean"] if preset == "knn" else asked(args)[1]
    return [name for name in names if not (test_data and is_public(name))]


def is_public(attack):
    """Whether `attack`, a name, is corruptions of public files."""
    row = ATTACKS.get(attack)
    return isinstance(row, Corruptions) and row.public


def test_names(args):
    """{path: name} of the other test sets: the last part of the path, or all of it where two agree in
    that."""
    names = {}
    for path in args.test_data:
        name = pathlib.PurePath(path).name
        names[path] = name.removesuffix(".npz").removesuffix("_data.npy") or path
    taken = list(names.values())
    return {path: name if taken.count(name) == 1 else path for path, name in names.items()}


def preset_of(args, name):
    """Preset `name` with what the flags change."""
    changes = {flag: getattr(args, flag) for flag in OVER if getattr(args, flag) is not None}
    if "milestones" in changes:
        changes["milestones"] = tuple(changes["milestones"])
    if args.bn:
        changes["dual"] = False
    return PRESETS[name]._replace(**changes)


def vote_of(args):
    """What the flags say of a vote: {"copies", "sigma", "draws"}; None where none is asked for."""
    if not args.vote:
        return None
    return {"copies": args.vote, "sigma": args.vote_sigma, "draws": args.vote_draws or VOTE_DRAWS}


def check_vote(args):
    """ValueError for flags that do not go with a vote."""
    if args.kept or args.kinds:
        return
    if not args.vote and (args.vote_sigma or args.vote_draws):
        raise ValueError("--vote-sigma and --vote-draws: go with --vote, as in --vote 10 --vote-sigma 0.25")
    if not args.vote:
        return
    if not args.vote_sigma:
        raise ValueError(f"--vote {args.vote}: needs the deviation of the noise, as in --vote-sigma 0.25")
    presets, attacks = asked(args)
    if "knn" in presets:
        raise ValueError("--vote: k-NN has no softmax to average; leave out --preset knn")
    if args.source:
        raise ValueError("--vote: is attacked through its own expectation; leave out --source")
    if args.pictures:
        raise ValueError("--vote: its attacks are not drawn; leave out --pictures")
    for name in attacks:
        row = attack_named(name)
        fits = isinstance(row, Attack) or (isinstance(row, AutoAttack) and row.version == "standard")
        if row and not fits:
            raise ValueError(f"--vote, --attacks {name}: is not made through an expectation; take clean, PGD "
                             "as pgd20, or aa, which is then AutoAttack's version rand")


def check(args):
    """ValueError for flags that do not go together."""
    presets, attacks = asked(args)
    check_vote(args)
    if not args.paths:
        raise ValueError("PATH is missing: give encoders, or classifiers by --ensemble or --matrix")
    if args.out:
        raise ValueError("--out goes with --ensemble or --matrix; the results of an encoder are kept beside it")
    if args.kinds and not any(isinstance(attack_named(name), Corruptions) for name in attacks):
        names = [name for name, row in ATTACKS.items() if isinstance(row, Corruptions)]
        raise ValueError(f"--kinds: name corruptions by --attacks: {', '.join(names)}")
    if args.kept or args.kinds:
        return
    for name in attacks:
        if is_public(name) and args.data not in ("cifar10", "cifar100"):
            raise ValueError(f"--attacks {name}: there is a CIFAR-10-C and a CIFAR-100-C, but none of "
                             f"{args.data}; c-like works for all of side 32")
    if args.test_data and all(is_public(name) for name in attacks) and "knn" not in presets:
        raise ValueError(f"--test-data: of other test sets there are no public corruptions, --attacks "
                         f"{' '.join(attacks)}; take c-like")
    if not args.encoder and (args.prefix or args.mean or args.std):
        raise ValueError("--prefix, --mean and --std go with --encoder")
    if (args.mean is None) != (args.std is None):
        raise ValueError("--mean and --std: give both, or neither")
    if args.mean and max(*args.mean, *args.std) > 1:
        raise ValueError("--mean and --std: are of pixels in [0, 1]; divide those of 0 to 255 by 255")
    moved = ".py:" in (args.encoder or "")  # perhaps: of an exported network, --encoder says where its code is
    if args.encoder and args.bn and not moved and not args.encoder.startswith("torchvision:resnet"):
        raise ValueError(f"--bn: {args.encoder} has no BN branches")
    for name in attacks:
        if args.source and isinstance(attack_named(name), AutoAttack):
            raise ValueError(f"--source, --attacks {name}: AutoAttack stops just beyond the boundary of the "
                             "source, and so transfers badly; take pgd20")
    for name in presets:
        if name == "knn":
            continue
        p = preset_of(args, name)
        if args.milestones and p.steps:
            raise ValueError(f"--milestones: preset {name} has steps, no epochs, and follows a cosine")
        if p.ramp >= p.steps > 0:
            raise ValueError(f"--steps {p.steps}: preset {name} raises its rate in {p.ramp}; lower --ramp")
        if max(p.milestones, default=-1) >= p.epochs:
            raise ValueError(f"--epochs {p.epochs}: preset {name} lowers its rate in epoch "
                             f"{max(p.milestones)}; give other --milestones, or no number after it, for a "
                             "cosine")
        if args.milestones and PRESETS[name].warmup:
            raise ValueError(f"--milestones: preset {name} warms up and follows a cosine")
        if p.warmup and p.warmup >= p.epochs and not p.steps:
            raise ValueError(f"--epochs {p.epochs}: preset {name} warms up for {p.warmup}; lower --warmup")
        has_place = dict(
            epochs=not PRESETS[name].steps,
            steps=PRESETS[name].steps,
            ramp=PRESETS[name].ramp,
            warmup=not p.milestones and not p.steps,
            layer_decay=p.optimizer == "adamw",
            drop_path=p.trains == "all",
            smoothing=p.loss == "clean",
            mixup=p.loss == "clean",
            cutmix=p.loss == "clean",
        )
        for flag in has_place:
            if getattr(args, flag) is not None and not has_place[flag]:
                raise ValueError(f"--{flag.replace('_', '-')}: preset {name} has no place for it")


def titles(args):
    """{column: title} of the columns that the flags ask for, under names as `name_of` has them."""
    names = [name if name == "knn" else name_of(name, recipe_of(preset_of(args, name)), vote_of(args))
             for name in asked(args)[0]]
    return titles_of(names, args)


def titles_of(names, args):
    """{column: title} of the columns (table.column) of results that are called so, under the attacks and on
    the test sets that the flags ask for."""
    columns = {}
    for name in names:
        for test_data, short in {None: None, **test_names(args)}.items():
            todo = attacks_on(args, name, test_data)
            if name != "knn" and not test_data:
                todo = [*todo, "epoch"]
            for attack in todo:
                title = "k-NN" if name == "knn" else f"{name} {attack}"
                columns[table.column(name, attack, test_data)] = f"{title}, {short}" if short else title
    return columns
