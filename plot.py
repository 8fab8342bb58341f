"""Pictures of runs, by matplotlib (an extra: pip install matplotlib).

    python plot.py loss results/shapes/*                 the loss of each run over its epochs
    python plot.py curve runs/*                          accuracy over eps, after eval.py --attacks curve
    python plot.py features runs/amoc --data shapes      test images in the first two principal components
"""
import argparse
import pathlib
import re

import torch

from common import data, encoders, run, table


def losses(folder):
    """{"": (epochs, mean losses)} of the log of the run in `folder`."""
    points = [(line["epoch"], line["loss"]) for line in table.lines(folder / "log.jsonl") if "loss" in line]
    return {"": tuple(zip(*points))} if points else {}


def curves(folder):
    """{preset: (eps in 1/255, accuracies)} of what eval.jsonl in `folder` holds under clean and pgd20-*."""
    found = {}
    for (preset, attack), result in table.measured(folder, source=None, restarts=None).items():
        name = re.fullmatch(r"clean|pgd20(?:-(\d+))?", attack)
        if name:
            eps = 0 if attack == "clean" else int(name[1] or 8)
            found.setdefault(preset, {})[eps] = result["accuracy"]
    return {preset: tuple(zip(*sorted(points.items()))) for preset, points in found.items()
            if len(points) > 1}


def principal(h):
    """Rows h (N, D) in their first two principal components: (N, 2)."""
    h = h - h.mean(0)
    return h @ torch.linalg.svd(h, full_matrices=False).Vh[:2].T


def parser():
    p = argparse.ArgumentParser(prog="plot.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", help="loss, curve or features")
    p.add_argument("folders", nargs="+", help="of runs")
    p.add_argument("--out", help="the picture; default: <what>.png")
    p.add_argument("--data", default="cifar10", help="for features: as in eval.py; so are the next three")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--test-limit", type=int, default=1000)
    p.add_argument("--image-size", type=int, default=32)
    return p


def check(args):
    if args.what not in ("loss", "curve", "features"):
        raise ValueError(f"{args.what}: choose loss, curve or features")


@torch.no_grad()
def draw_features(axes, folder, args):
    encoder = encoders.load_encoder(folder / "encoder.pt")
    images = data.load(args.data, args.data_dir, "test", limit=args.test_limit, size=args.image_size)
    parts = images.stream(torch.arange(len(images)).split(500))
    h, y = (torch.cat(v) for v in zip(*((encoder(data.resize(x, args.image_size)), y) for x, y in parts)))
    axes.scatter(*principal(h).T, c=y, s=4, cmap="tab10" if images.classes <= 10 else "viridis")
    axes.set(title=folder.name, xticks=[], yticks=[])


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
    else:
        lines = losses if args.what == "loss" else curves
        for folder in folders:
            if not lines(folder):
                raise ValueError(f"{folder}: no {args.what} was measured there")
            for name, (x, y) in lines(folder).items():
                axes[0].plot(x, y, marker=".", label=f"{folder.name} {name}")
        axes[0].set(xlabel="epoch" if args.what == "loss" else "eps of PGD-20, 1/255",
                    ylabel="loss" if args.what == "loss" else "accuracy, %")
        axes[0].legend()
    out = args.out or f"{args.what}.png"
    figure.savefig(out, dpi=150)
    print(out)


if __name__ == "__main__":
    run.cli(main)
