"""Pictures of runs, by matplotlib (an extra: pip install matplotlib).

All commands have one form: what is drawn, the folders of runs, and flags. --out names the picture, .png,
.pdf or .svg; without it, it is <what>.png.

From the logs, and from what eval.py has measured and kept in eval.jsonl:

    python plot.py loss results/shapes/*                 loss over the epochs; other seeds dotted
    python plot.py loss runs/* --column loss cosine unique    other columns of the log, a panel each
    python plot.py loss runs/* --column knn "amoc-slf pgd20"    accuracies, after evaluation/snapshots.py
    python plot.py tradeoff results/cifar10-jpeg/*       clean accuracy over that under PGD-20, seeds in one point
    python plot.py tradeoff runs/* --along eps           lines join runs that differ in --eps alone
    python plot.py tradeoff runs/* --along eps step-size    or in --step-size besides, which follows from it
    python plot.py tradeoff runs/* --preset mae-tune --along preset.layer-decay --attack aa
    python plot.py curve runs/*                          accuracy over eps, after eval.py --attacks curve
    python plot.py curve runs/* --norm l2                the same in l2
    python plot.py curve-steps runs/*                    accuracy at 8/255 over the number of PGD's steps
    python plot.py corruptions runs/amoc runs/rocl      accuracy for each kind of corruption, in bars
    python plot.py history runs/* --preset chen-f1       accuracies over the epochs of fine-tuning

From encoders (a folder, or an encoder.pt) and from the classifiers that eval.py keeps:

    python plot.py features runs/amoc --data shapes      test images in the first two principal components
    python plot.py features runs/amoc runs/rocl --tsne   by t-SNE (an extra: pip install scikit-learn)
    python plot.py filters runs/adv_mae runs/amoc        principal components of the first layer's filters
    python plot.py landscape runs/amoc/classifier-amoc-slf-adv.pt    the adversarial loss around its weights

A landscape is 121 attacks of 20 steps on 500 images; --grid, --steps and --test-limit make it cheaper.
--eps 0 is that of clean images. Pictures of views, masks and reconstructions are not made here: each script
writes them to its --out while it trains, and eval.py --pictures has the attacked test images.
"""
import pathlib
import re
import sys

import torch

from common import data, encoders, files, run
from common.augment import resize
from evaluation import components, landscape, series, table
from evaluation.attacks import Attack, resized
from evaluation.flags import named_flags
from evaluation.published import GROUPS
from evaluation.results import load_classifier

USES = {  # the flags that have no meaning for other pictures
    "preset": ("tradeoff", "curve", "curve-steps", "corruptions", "history"),
    "attack": ("tradeoff", "corruptions"),
    "along": ("tradeoff",),
    "norm": ("curve",),
    "steps": ("curve", "landscape"),
    "eps": ("curve-steps", "landscape"),
    "tsne": ("features",),
    "column": ("loss",),
    "grid": ("landscape",),
    "span": ("landscape",),
    "seed": ("landscape", "loss", "tradeoff", "curve", "curve-steps", "corruptions", "history"),
    "device": ("landscape",),
}


# ----------------------------------------------------------------------------------------------------------
# Of what was measured
# ----------------------------------------------------------------------------------------------------------
def with_any(of_folder, measured):
    """What is there of {folder: what was measured}; a folder without, as of a run that was interrupted, is a
    line on stderr. Raises ValueError where all are without."""
    found = {folder: lines for folder, lines in of_folder.items() if lines}
    for folder in of_folder:
        if not found:
            raise ValueError(f"{folder}: no {measured}")
        if folder not in found:
            print(f"{folder}: no {measured}; left out", file=sys.stderr)
    return found


def draw_lines(axes, folders, args, lines_of, measured):
    """A line for each of lines_of(folder), {name: (xs, ys)}. Raises ValueError where no folder has any."""
    of_folder = {folder: lines_of(folder, args) for folder in folders}
    for folder, lines in with_any(of_folder, f"{measured} was measured there").items():
        for name, (x, y) in lines.items():
            axes.plot(x, y, marker=".", label=f"{folder.name} {name}")
    axes.legend(fontsize=7)


def first_of_seeds(folders):
    """{folder: the first of `folders` whose run differs from its own in the seed alone, or itself}."""
    found = {}
    of_method = {}
    for folder in folders:
        made = table.read_run(folder, run.FREE)
        of_seed = of_method.setdefault(table.method_of(made), {})
        found[folder] = folder if made.seed in of_seed else next(iter(of_seed.values()), folder)
        of_seed.setdefault(made.seed, folder)
    return found


def draw_loss(axes, folders, args):
    first = first_of_seeds(folders)
    for ax, column in zip(axes, args.column):
        of_folder = {
            folder: series.of_log(folder, column) or series.of_snapshots(folder, column, args.only)
            for folder in folders}
        colours = {}
        for folder, points in with_any(of_folder, f"{column} was measured there over the epochs").items():
            if first[folder] in colours:  # another seed
                ax.plot(*points, marker=".", linestyle=":", color=colours[first[folder]])
            else:
                colours[folder] = f"C{len(colours)}"
                ax.plot(*points, marker=".", label=folder.name, color=colours[folder])
        ax.set(xlabel="epoch", ylabel=column)
    axes[0].legend(fontsize=7)


def curves(folder, args):
    return series.curves(series.results_of(folder, args.preset, args.only), args.norm, args.steps or 20)


def draw_curve(axes, folders, args):
    draw_lines(axes[0], folders, args, curves, "curve")
    unit = "linf, 1/255" if args.norm == "linf" else args.norm
    axes[0].set(xlabel=f"eps of PGD-{args.steps or 20}, {unit}", ylabel="accuracy, %")


def step_curves(folder, args):
    return series.step_curves(series.results_of(folder, args.preset, args.only), "linf", radius(args))


def draw_curve_steps(axes, folders, args):
    draw_lines(axes[0], folders, args, step_curves, "curve-steps")
    axes[0].set(xlabel=f"steps of PGD, linf {radius(args):g}/255", ylabel="accuracy, %", xscale="log")


def histories(folder, args):
    return series.histories(folder, args.preset, args.only)


def draw_history(axes, folders, args):
    draw_lines(axes[0], folders, args, histories, "history")
    axes[0].set(xlabel="epoch of fine-tuning", ylabel="accuracy, %")


def common_name(points):
    """What the names of the points of a line have in common, word by word; hyphens part words too."""
    words = [re.split(r"([ -])", point.name) for point in points]
    common = [word for word in words[0] if all(word in others for others in words)]
    return re.sub(r"([ -])[ -]+", r"\1", "".join(common)).strip(" -") or points[0].name


def draw_tradeoff(axes, folders, args):
    (ax,) = axes
    preset = args.preset or "amoc-slf"
    attack = args.attack or "pgd20"
    points = []
    for folder in folders:
        points += series.tradeoff(folder, preset, attack, args.only)
    if not points:
        raise ValueError(f"no clean accuracy and {attack} were measured by preset {preset}")
    points = series.over_seeds(points)
    for point in points:
        if point.clean_spread or point.robust_spread:
            ax.errorbar(point.robust, point.clean, point.clean_spread, point.robust_spread, color="lightgrey",
                        zorder=1)
    colours = {group: f"C{i}" for i, group in enumerate([*GROUPS, "other"])}
    joined = []
    if args.along:
        for row in series.along(points, *args.along):
            of_row = [point for _, point in row]
            ax.plot([p.robust for p in of_row], [p.clean for p in of_row], marker="o", markersize=4,
                    label=common_name(of_row))
            for value, point in row:
                ax.annotate(f"{value:g}", (point.robust, point.clean), fontsize=6, xytext=(3, -8),
                            textcoords="offset points", color="grey")
            joined += of_row
    points = [point for point in points if point not in joined]
    of_group = {}
    for point in points:
        of_group.setdefault(table.group_of(point.run, GROUPS), []).append(point)
    for group in (group for group in colours if group in of_group):
        x = [point.robust for point in of_group[group]]
        y = [point.clean for point in of_group[group]]
        ax.scatter(x, y, s=14, color=colours[group], label=group, zorder=2)
    for point, height in zip(points, heights_of_names(points)):
        ax.annotate(point.name, (point.robust, height), fontsize=6, xytext=(3, 2),
                    textcoords="offset points")
    ax.legend(fontsize=6)
    under = "PGD-20 at 8/255" if attack == "pgd20" else attack
    ax.set(xlabel=f"accuracy under {under}, %", ylabel="accuracy on clean images, %", title=preset)
    ax.margins(x=0.15)  # room for the names


def heights_of_names(points):
    """Where, in clean accuracy, the name of each point stands: at its point, or below another name that is
    there. What a name takes is a share of the range of all points, for letters of this size."""
    wide = 0.12 * (max((p.robust for p in points), default=0) - min((p.robust for p in points), default=0))
    high = 0.025 * (max((p.clean for p in points), default=0) - min((p.clean for p in points), default=0))
    heights = {}
    for i in sorted(range(len(points)), key=lambda i: -points[i].clean):
        height = points[i].clean
        taken = sorted((heights[j] for j in heights if abs(points[j].robust - points[i].robust) <= wide), reverse=True)
        for other in taken:  # from the top, so that what is freed below one name is looked at for the next
            if abs(other - height) < high:
                height = other - high
        heights[i] = height
    return [heights[i] for i in range(len(points))]


def draw_corruptions(axes, folders, args):
    (ax,) = axes
    preset = args.preset or "amoc-slf"
    found = {}
    for folder in folders:
        of_folder = {(f"{folder.name} {name}", attack): of_kind
                     for (name, attack), of_kind in series.kinds(folder, preset, args.only).items()
                     if args.attack in (None, attack)}
        if not of_folder:
            what = args.attack or "c-like"
            raise ValueError(f"{folder}: no corruptions were measured there by preset {preset}; "
                             f"eval.py --preset {preset} --attacks {what}")
        found |= of_folder
    attacks = list(dict.fromkeys(attack for _, attack in found))
    if len(attacks) > 1:
        raise ValueError(f"{' and '.join(attacks)} were measured, and are other images; choose by --attack")
    kinds = list(dict.fromkeys(kind for of_kind in found.values() for kind in of_kind))
    width = 0.8 / len(found)
    for i, ((name, _), of_kind) in enumerate(found.items()):
        at = [k + width * (i - (len(found) - 1) / 2) for k, kind in enumerate(kinds) if kind in of_kind]
        ax.bar(at, [of_kind[kind] for kind in kinds if kind in of_kind], width, label=name)
    names = [kind.replace("_", " ") for kind in kinds]
    ax.set_xticks(range(len(kinds)), names, rotation=50, ha="right", fontsize=7)
    ax.set(ylabel="accuracy, %", title=f"{attacks[0]}: mean over severities 1 to 5")
    ax.legend(fontsize=7)


# ----------------------------------------------------------------------------------------------------------
# Of networks
# ----------------------------------------------------------------------------------------------------------
def encoder_path(folder):
    return folder if folder.suffix == ".pt" else folder / "encoder.pt"


def title_of(folder):
    return folder.stem if folder.suffix == ".pt" else folder.name


@torch.no_grad()
def features(path, args):
    """Features (N, dim) of the encoder at `path` for the first test images of a fixed shuffle, their labels
    (N,), and the number of classes."""
    encoder = encoders.load_encoder(path)
    size = args.image_size or encoder.image_size or 32
    images = data.load(args.data, args.data_dir, "test", size=size, shuffle=True)
    rows = torch.arange(min(args.test_limit or 1000, len(images)))
    if len(rows) < 2:
        raise ValueError(f"{args.data}: one test image; features need two")
    h = []
    labels = []
    for x, y in images.stream(rows.split(500)):
        h.append(encoder(resize(x, size)))
        labels.append(y)
    h = torch.cat(h)
    if not h.isfinite().all():
        raise ValueError(f"{path}: its features are not finite")
    return h, torch.cat(labels), images.classes


def tsne():
    """scikit-learn's t-SNE. Raises ValueError where it is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ValueError("--tsne needs scikit-learn: pip install scikit-learn; without --tsne it is "
                         "principal components") from None
    return TSNE


def draw_features(axes, folders, args):
    for ax, folder in zip(axes, folders):
        h, y, classes = features(encoder_path(folder), args)
        if args.tsne:
            perplexity = min(30, (len(h) - 1) / 3)
            places = tsne()(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(h.numpy())
        else:
            places = components.project(h)
        ax.scatter(*places.T, c=y, s=4, cmap="tab10" if classes <= 10 else "viridis")
        ax.set(title=title_of(folder), xticks=[], yticks=[])


def draw_filters(axes, folders, args):
    for ax, folder in zip(axes, folders):
        path = encoder_path(folder)
        try:
            filters = components.first_filters(encoders.load_encoder(path))
            pictures, shares = components.filter_components(filters)
        except ValueError as e:
            raise ValueError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
        ax.imshow(components.mosaic(pictures).permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=f"{title_of(folder)}: {len(pictures)} components of "
               f"{len(filters)} filters,\n{100 * float(shares.sum()):.0f} % of their variance")


def radius(args):
    """--eps in 1/255; its default is 8."""
    return 8.0 if args.eps is None else args.eps


def classifier_and_images(path, args):
    """The classifier at `path`, on the device, and the test images of its loss. Raises ValueError where they
    do not fit together."""
    device = run.device(args)
    net = load_classifier(path).to(device, memory_format=torch.channels_last)
    size = args.image_size or net.image_size or 32
    images = resized(data.load(args.data, args.data_dir, "test", device, size=size, shuffle=True), size)
    images = data.Part(images, torch.arange(min(args.test_limit or 500, len(images))))
    classes = net.head.out_features
    if images.classes != classes:
        raise ValueError(f"{path}: has {classes} classes, --data {args.data} has {images.classes}")
    if (images.y < 0).any():
        raise ValueError(f"{args.data}: some images have no label; a loss needs them all")
    return net, images


def draw_landscape(axes, folders, args):
    pairs = [classifier_and_images(folder, args) for folder in folders]
    eps = radius(args) / 255
    attack = Attack("linf", eps, eps / 4, args.steps or 20) if eps else None
    at = landscape.places(args.span, args.grid)
    found = []
    for folder, (net, images) in zip(folders, pairs):
        def show(rows):
            print(f"\r{folder}: {rows} of {args.grid} rows", end="\n" * (rows == args.grid), flush=True)

        found.append(landscape.landscape(net, images, attack, at, args.seed, show))
        print(f"{folder}: loss {float(found[-1][args.grid // 2, args.grid // 2]):.4f} at the centre")
    finite = torch.cat([losses[losses.isfinite()] for losses in found])
    if not len(finite):
        raise ValueError(f"{folders[0]}: no loss is finite; try a smaller --span")
    low = float(finite.min())
    high = max(float(finite.max()), low + 1e-3)
    levels = [low + (high - low) * i / 20 for i in range(21)]  # the same for all
    for ax, folder, losses in zip(axes, folders, found):
        ax.contourf(at, at, losses.numpy(), levels=levels)
        lines = ax.contour(at, at, losses.numpy(), levels=levels[::2], colors="white", linewidths=0.5)
        ax.clabel(lines, fontsize=6)
        ax.plot([0], [0], marker="+", color="red")
        under = f"under PGD-{attack.steps} at {radius(args):g}/255" if attack else "on clean images"
        ax.set(title=f"{title_of(folder)}:\ncross-entropy {under}", xlabel="first direction",
               ylabel="second direction")


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------
DRAW = {
    "loss": draw_loss,
    "curve": draw_curve,
    "tradeoff": draw_tradeoff,
    "features": draw_features,
    "curve-steps": draw_curve_steps,
    "corruptions": draw_corruptions,
    "history": draw_history,
    "filters": draw_filters,
    "landscape": draw_landscape,
}
PANELS = ("features", "filters", "landscape")  # one beside the other for each path; else all in one


def parser():
    p = run.Parser("plot.py", __doc__)
    p.add_argument("what", choices=tuple(DRAW), help="what is drawn; see above")
    p.add_argument("folders", nargs="+", type=run.path, metavar="FOLDER",
                   help="of runs; for features and filters an encoder, too; for landscape a classifier-*.pt")
    p.add_argument("--out", type=run.path, help="the picture, .png, .pdf or .svg; default: <what>.png")
    p.add_argument("--preset", help="the preset whose results count, as it is or with something changed; "
                   "default: amoc-slf for tradeoff and corruptions, all for curves and history")
    p.add_argument("--attack", help="for tradeoff, the name of the attack, default pgd20; for corruptions c or "
                   "c-like, where both were measured")
    p.add_argument("--along", metavar="FLAG", nargs="+",
                   help="for tradeoff: join runs that differ in this flag alone, as eps, or in this field "
                   "of the preset alone, as preset.layer-decay; in further flags they may differ as well")
    p.add_argument("--column", nargs="+", default=["loss"],
                   help="for loss: columns of the log, or of results of encoders kept over the epochs")
    p.add_argument("--norm", choices=("linf", "l2", "l1"), default="linf", help="for curve")
    p.add_argument("--steps", type=run.integer(1), help="of PGD, for curve and landscape; default: 20")
    p.add_argument("--eps", type=run.number(0, 255),
                   help="of PGD in 1/255, for curve-steps and landscape; default: 8")
    p.add_argument("--data", default="cifar10", type=run.path,
                   help="for features and landscape: as in eval.py; so are the next three. For results, "
                   "where it is given: only those measured on it")
    p.add_argument("--data-dir", default="data", type=run.path)
    p.add_argument("--test-limit", type=run.integer(2),
                   help="at most so many images; default: 1000 for features, 500 for landscape")
    p.add_argument("--image-size", type=run.integer(1, 10_000), help="default: the network's own, else 32")
    p.add_argument("--tsne", action="store_true", help="for features: t-SNE, by scikit-learn")
    p.add_argument("--grid", type=run.integer(3, 999), default=11,
                   help="for landscape: places along each direction, an odd number")
    p.add_argument("--span", type=run.number(above=0), default=1.0,
                   help="for landscape: they go from -span to span, in norms of the filters")
    p.add_argument("--seed", type=run.integer(0, 2**32 - 1), default=0,
                   help="landscape: of its directions. Of results, where it is given: only those of evaluations "
                        "with this seed")
    p.add_argument("--device", help="for landscape; default: cuda if there is one, else cpu")
    return p


def check(args):
    """ValueError for flags that do not go together."""
    if args.out and pathlib.Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out {args.out}: must end in .png, .pdf or .svg")
    defaults = parser()
    for flag, pictures in USES.items():
        if args.what not in pictures and getattr(args, flag) != defaults.get_default(flag):
            raise ValueError(f"--{flag}: goes with {', '.join(pictures)}, not with {args.what}")
    if args.grid % 2 == 0:
        raise ValueError(f"--grid {args.grid}: must be odd, so that the network itself is in the middle")
    if args.what == "curve-steps" and args.eps == 0:
        raise ValueError("--eps 0: is no attack; curve-steps needs one above 0")
    if args.what == "landscape":
        for path in map(pathlib.Path, args.folders):
            if path.suffix != ".pt":
                raise ValueError(f"{path}: a landscape is of a classifier, as {path / 'classifier-amoc-slf.pt'}")


def check_out(out):
    """OSError where the picture could not be written to the path `out`: before anything is computed."""
    if out.is_dir():
        raise OSError(f"{out} cannot be written: Is a directory")
    if not out.parent.is_dir():
        raise OSError(f"{out} cannot be written: No such file or directory")


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    named = named_flags(parser, argv)
    args.only = {name: named[name] for name in ("data", "seed") if name in named}  # other results do not count
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot.py needs matplotlib: pip install matplotlib") from None
    if args.tsne:
        tsne()  # before anything is computed
    out = pathlib.Path(args.out or f"{args.what}.png")
    check_out(out)
    folders = [pathlib.Path(folder) for folder in args.folders]
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: is not there, so nothing was measured there")
    across = len(folders) if args.what in PANELS else 1
    if args.what == "loss":
        across = len(args.column)
    width = 10 if args.what == "corruptions" else 4 * across + 2 * (across == 1)
    figure = Figure((width, 4), layout="constrained")
    axes = figure.subplots(1, across, squeeze=False)[0]
    DRAW[args.what](axes, folders, args)
    with files.replacing(out) as temporary:
        figure.savefig(temporary, dpi=150, format=out.suffix[1:])
    print(out)


if __name__ == "__main__":
    run.cli(main)
