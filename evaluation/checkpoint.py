"""A classifier in training, on disk: a training that was stopped goes on after the last epoch that was saved."""
import contextlib
import copy
import pathlib
import time

import torch

from common import files

FORMAT = "classifier in training, version 1"


class Checkpoint:
    """The file `path`, for the training that the string `made` describes.

    With the weights and the optimizer it holds the best epoch so far and the state of PyTorch's generators, from
    which mixup and drop path draw: on a CPU a training that goes on ends in the same bits as one that was never
    stopped. It is written after an epoch, once in `interval` seconds at most: most probes are trained in less.
    """

    def __init__(self, path, made, interval=60.0):
        self.path = pathlib.Path(path)
        self.made = made
        self.interval = interval
        self.last = time.monotonic()  # when the file was written, or the training began

    def save(self, net, opt, epochs, best):
        """Keep the classifier `net` and its optimizer after so many `epochs`; `best` is None, or the accuracy and
        the weights of the best epoch so far. Raises OSError where the file cannot be written."""
        if time.monotonic() - self.last < self.interval:
            return
        files.save({"format": FORMAT, "made": self.made, "epochs": epochs, "best": best,
                    "net": net.state_dict(), "opt": opt.state_dict(),
                    "picked_epoch": net.picked_epoch, "history": net.history,
                    "generators": _generators(net.head.weight.device)}, self.path)
        self.last = time.monotonic()

    def resume(self, net, opt):
        """Put what the file holds into `net` and `opt`; returns (epochs, best) as `save` had them. (0, None) where
        there is no file, or one of another training; one that cannot be used is named."""
        try:
            saved = files.load(self.path)
            if not isinstance(saved, dict) or saved.get("format") != FORMAT:
                raise ValueError(f"{self.path}: not a {FORMAT}")
            if saved["made"] != self.made:
                return 0, None
            fresh = copy.deepcopy(opt.state_dict())
            opt.load_state_dict(saved["opt"])  # raises before it changes anything
            try:
                files.load_strict(net, saved["net"], self.path)
            except ValueError:
                opt.load_state_dict(fresh)
                raise
        except FileNotFoundError:
            return 0, None
        except (ValueError, KeyError) as e:
            print(f"{self.path}: cannot be used ({e}); the training begins anew")
            return 0, None
        net.picked_epoch = saved["picked_epoch"]
        net.history = saved["history"]
        _set_generators(saved["generators"], net.head.weight.device)
        print(f"{self.path}: continues after epoch {saved['epochs']}")
        return saved["epochs"], saved["best"]

    def remove(self):
        """The training has ended."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _generators(device):
    """The states of the generators that a training on `device` may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states, device):
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
