"""Do the masks of ADIOS separate figure from ground? The data set `shapes` knows the truth.

    python -m tests.masks runs/adios ...     the masker of each run's last.pt, on 1000 images it has not seen

A pixel belongs to the largest of its N masks; a single mask is joined by its rest, what it does not remove. Of each
image's masks the best counts, by intersection over union with the true figure; the mean over images is printed. Its
rivals see no image: random masks (`adios.control`), and the one central square that is best over all images.
"""
import json
import pathlib
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import adios
from common import augment, data, run, shapes
from common.unet import UNet


def best_iou(masks, figure):
    """Mean over images of the largest IoU of one of the masks (B, N, H, W), made hard, with figure (B, H, W), bool."""
    if masks.shape[1] == 1:
        masks = torch.cat([masks, 1 - masks], 1)
    hard, figure = F.one_hot(masks.argmax(1), masks.shape[1]).movedim(3, 1).bool(), figure[:, None]
    both, either = (hard & figure).sum((2, 3)), (hard | figure).sum((2, 3))
    return (both / either).amax(1).mean().item()


def squares(size):
    """The central squares of an image, as (square, rest): (R, 2, size, size)."""
    at = (torch.arange(size) - (size - 1) / 2).abs()
    inside = torch.maximum(at[:, None], at) < torch.arange(1, size // 2 + 1)[:, None, None]
    return torch.stack([inside, ~inside], 1).float()


@torch.no_grad()
def measure(out, n=1000):
    """{"masker": IoU, "random": IoU, "square": IoU} of the run in `out`, a control's without a masker. Raises
    OSError where there is no run."""
    path = pathlib.Path(out) / "last.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; adios.py writes it")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    args = SimpleNamespace(**{**saved["flags"], "masker": "random"})
    size = args.image_size or 32
    x, _, covered = shapes.shapes(n, seed=2)
    x, figure = augment.resize(x, size), F.interpolate(covered[:, None], 2 * [size])[:, 0] > 0.5
    random = adios.control(data.Rng((args.seed,), n, slice(n)), size, args, "cpu")[:n]
    square = max(best_iou(m.expand(n, -1, -1, -1), figure) for m in squares(size))
    found = {"random": best_iou(random, figure), "square": square}
    if "masker" not in saved["state"]:
        return found
    masker = UNet(args.masks, args.mask_width, size, adios.MEAN, adios.STD)
    masker.load_state_dict(saved["state"]["masker"])
    return {"masker": best_iou(adios.propose(masker, x), figure), **found}


def main(paths):
    for out in paths:
        print(json.dumps({"run": out, **measure(out)}))


if __name__ == "__main__":
    run.cli(lambda: main(sys.argv[1:]))
