"""Pictures of runs, by matplotlib (an extra: pip install matplotlib).

    python plot.py loss results/shapes/*                 the loss of each run over its epochs
    python plot.py curve runs/*                          accuracy over eps, after eval.py --attacks curve
    python plot.py tradeoff results/cifar10-jpeg/*       clean accuracy over that under PGD-20
    python plot.py features runs/amoc --data shapes      test images in the first two principal components
"""
import pathlib

import torch

from common import data, encoders, files, run
from common.augment import resize
from evaluation import names, table


def losses(folder):
    """{"": (epochs, mean losses)} of the log of the run in `folder`."""
    points = [(line["epoch"], line["loss"]) for line in table.lines(folder / "log.jsonl")
              if table.is_number(line.get("epoch")) and table.is_number(line.get("loss"))]
    return {"": tuple(zip(*points))} if points else {}


def curves(folder):
    """{preset: (eps in 1/255, accuracies)} of what eval.jsonl in `folder` holds under clean and pgd20 at any
    linf radius. The name of an encoder that is not encoder.pt comes before the preset's."""
    found = {}
    for file in table.evaluated(folder):
        before = "" if file == "encoder.pt" else f"{pathlib.PurePath(file).stem} "
        results = table.read_folder(folder, file, source=None, restarts=None)
        for (preset, attack), result in results.items():
            row = names.plain_pgd(attack)
            if attack == "clean":
                found.setdefault(before + preset, {})[0] = result["accuracy"]
            elif row and row.norm == "linf" and row.steps == 20:
                found.setdefault(before + preset, {})[round(255 * row.eps, 6)] = result["accuracy"]
    return {preset: tuple(zip(*sorted(points.items()))) for preset, points in found.items()
            if len(points) > 1}


def tradeoff(folder, preset):
    """(accuracy on clean images, under pgd20) of the encoder in `folder` by `preset`; None where either was
    not measured."""
    results = table.read_folder(folder, source=None, restarts=None)
    clean = results.get((preset, "clean"))
    robust = results.get((preset, "pgd20"))
    if not clean or not robust:
        return None
    return clean["accuracy"], robust["accuracy"]


def principal(h):
    """Rows h (N, D) in their first two principal components: (N, 2)."""
    h = h - h.mean(0)
    return h @ torch.linalg.svd(h, full_matrices=False).Vh[:2].T


def parser():
    p = run.Parser("plot.py", __doc__)
    p.add_argument("what", choices=("loss", "curve", "tradeoff", "features"),
                   help="what is drawn; see above")
    p.add_argument("folders", nargs="+", type=run.path, metavar="FOLDER",
                   help="of runs; for features an encoder, too")
    p.add_argument("--preset", default="amoc-slf", help="for tradeoff: the preset whose results count")
    p.add_argument("--out", type=run.path, help="the picture, .png, .pdf or .svg; default: <what>.png")
    p.add_argument("--data", default="cifar10", type=run.path,
                   help="for features: as in eval.py; so are the next three")
    p.add_argument("--data-dir", default="data", type=run.path)
    p.add_argument("--test-limit", type=run.integer(2), default=1000, help="at most so many images")
    p.add_argument("--image-size", type=run.integer(1, 10_000), help="default: the encoder's own, else 32")
    return p


def check(args):
    """ValueError for flags that do not go together."""
    if args.out and pathlib.Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out {args.out}: must end in .png, .pdf or .svg")


@torch.no_grad()
def features(path, args):
    """Features (N, dim) of the encoder at `path` for the first test images of a fixed shuffle, their labels
    (N,), and the number of classes."""
    encoder = encoders.load_encoder(path)
    size = args.image_size or encoder.image_size or 32
    images = data.load(args.data, args.data_dir, "test", size=size, shuffle=True)
    rows = torch.arange(min(args.test_limit, len(images)))
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


def draw_features(axes, folder, args):
    path = folder if folder.suffix == ".pt" else folder / "encoder.pt"
    h, y, classes = features(path, args)
    axes.scatter(*principal(h).T, c=y, s=4, cmap="tab10" if classes <= 10 else "viridis")
    axes.set(title=folder.stem if folder.suffix == ".pt" else folder.name, xticks=[], yticks=[])


def draw_lines(axes, folders, what):
    for folder in folders:
        lines = losses(folder) if what == "loss" else curves(folder)
        if not lines:
            raise ValueError(f"{folder}: no {what} was measured there")
        for name, (x, y) in lines.items():
            axes.plot(x, y, marker=".", label=f"{folder.name} {name}")
    if what == "loss":
        axes.set(xlabel="epoch", ylabel="loss")
    else:
        axes.set(xlabel="eps of PGD-20, 1/255", ylabel="accuracy, %")
    axes.legend()


def draw_tradeoff(axes, folders, preset):
    points = {folder.name: tradeoff(folder, preset) for folder in folders}
    points = {name: point for name, point in points.items() if point}
    if not points:
        raise ValueError(f"no clean accuracy and pgd20 were measured by preset {preset}")
    for name, (clean, robust) in points.items():
        axes.scatter(robust, clean, s=14, color="tab:blue")
        axes.annotate(name, (robust, clean), fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes.set(xlabel="accuracy under PGD-20 at 8/255, %", ylabel="accuracy on clean images, %", title=preset)
    axes.margins(x=0.12)  # room for the names


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot.py needs matplotlib: pip install matplotlib") from None
    folders = [pathlib.Path(folder) for folder in args.folders]
    across = len(folders) if args.what == "features" else 1
    figure = Figure((4 * across + 2 * (across == 1), 4), layout="constrained")
    axes = figure.subplots(1, across, squeeze=False)[0]
    if args.what == "features":
        for ax, folder in zip(axes, folders):
            draw_features(ax, folder, args)
    elif args.what == "tradeoff":
        draw_tradeoff(axes[0], folders, args.preset)
    else:
        draw_lines(axes[0], folders, args.what)
    out = pathlib.Path(args.out or f"{args.what}.png")
    with files.replacing(out) as temporary:
        figure.savefig(temporary, dpi=150, format=out.suffix[1:])
    print(out)


if __name__ == "__main__":
    run.cli(main)
