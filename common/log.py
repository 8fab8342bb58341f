"""The log of a run: log.jsonl, and a progress line on the screen."""
import contextlib
import json
import math
import pathlib
import platform
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

from common import files, own
from common.data import Folder
from common.dist import average


def last_good(args):
    """What to say of the checkpoint in --out when a run cannot go on."""
    path = pathlib.Path(args.out) / "last.pt"
    if not path.exists():
        return "no checkpoint was saved yet"
    return f"the last good checkpoint is {path}; try a lower --lr"


class Log:
    """log.jsonl: a first line with all flags, versions and the device, then one object per epoch; and a
    progress line.

    Sums stay on the device within an epoch. They and the clock are in the state dict, so a resumed run logs
    the same. Each rank makes one. `epoch`, `check` and `gather_sums` are collective: all ranks call them. Rank 0
    alone writes and prints.
    """

    def __init__(self, args, env, steps, images):
        self.args, self.env, self.steps = args, env, steps  # steps of the whole run
        self.path = pathlib.Path(args.out) / "log.jsonl"
        self.data = {"images": len(images), "checksum": images.checksum()}
        self.listing = None  # of a folder, whose checksum all ranks have from the first one: what this one sees
        self.of_what = f"{len(images):,} images"
        if isinstance(images, Folder):
            self.listing = images.listing()
            self.of_what = f"{len(images):,} pictures, of each the central square at {images.size} x {images.size}"
        if ".py:" in (getattr(args, "arch", None) or ""):  # a network of one's own, whose code may change
            self.data["network"] = own.code_of(args.arch)
        self.sums, self.count, self.images, self.bad = {}, 0, 0, torch.tensor(-1, device=env.device)
        self.sums_of_ranks = {}  # made by gather_sums, for a checkpoint
        self.epochs, self.seconds = 0, 0.0  # written so far, and how long they took
        self.elapsed, self.cpu_elapsed = 0.0, 0.0  # before this process took over

    def start(self, step, note=""):
        """Call once, after `resume`: writes the first line, or drops the lines that the checkpoint does not
        know of. `note` joins that line, and the screen."""
        if self.env.rank == 0:
            first = {**header(self.args, self.env), "data": self.data, "note": note}
            lines = [line for _, line in files.json_lines(self.path) if line] if step else []
            kept = {line.get("epoch"): line for line in lines}
            missing = [epoch for epoch in range(self.epochs) if epoch not in kept]
            if missing:
                print(f"{self.path}: the lines of these epochs are damaged or missing: {missing}")
                first["missing_epochs"] = missing
            if lines and "flags" in lines[0] and not missing:
                first = lines[0]
            lines = [first, *(kept[epoch] for epoch in range(self.epochs) if epoch in kept)]
            with files.replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            print(f"{self.args.out}: {self.of_what}, {self.steps} steps on {first['device']}; {note}")
        self.first, self.began, self.shown = step, time.time(), 0.0
        self.clock, self.cpu_clock = time.time() - self.elapsed, time.process_time() - self.cpu_elapsed

    @torch.no_grad()
    def step(self, step, images, **values):
        """After step number `step` over `images` images: add `values` (0-dim tensors) to the epoch's sums."""
        values = {k: v.detach() for k, v in values.items()}
        fine = torch.stack([v.isfinite() for v in values.values()]).all()
        self.bad = self.bad.masked_fill((self.bad < 0) & ~fine, step)
        self.sums = {k: v + self.sums.get(k, 0.0) for k, v in values.items()}
        self.count, self.images = self.count + 1, self.images + images
        if self.env.rank == 0 and time.time() - self.shown > 1 and sys.stdout.isatty():
            self.shown = time.time()
            rate = (step + 1 - self.first) / (self.shown - self.began)
            left = (self.steps - step - 1) / rate
            print(f"\r  step {step + 1}/{self.steps}  {rate * images:,.0f} images/s  {_clock(left)} left ",
                  end="", flush=True)

    def check(self):
        """ValueError if a value has not been finite on any rank (waits for the device). Called by all
        ranks."""
        bad = self.bad.clone()
        if self.env.world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        bad = bad.item()
        if bad >= 0:
            raise ValueError(f"the loss is not finite in epoch {self.epochs}, step {bad}; "
                             f"{last_good(self.args)}")

    def mean(self, name):
        """The mean of the step value `name` over the steps of this epoch so far, on this rank (waits for the
        device)."""
        return (self.sums[name] / self.count).item()

    def epoch(self, epoch, step, **values):
        """Write the line of `epoch` (0-based): means of the step values over steps and ranks, then `values`,
        speed and time. Called by all ranks. Raises as `check` does, and OSError where the line cannot be
        written."""
        self.check()
        means = [v / self.count for v in self.sums.values()]
        average(means)
        means = {k: v.item() for k, v in zip(self.sums, means)}
        now, cpu_now = time.time() - self.clock, time.process_time() - self.cpu_clock
        line = {"epoch": epoch, **means, **values,
                "images_per_second": round(self.images / (now - self.seconds), 1),
                "seconds": round(now, 2), "cpu_seconds": round(cpu_now, 2)}
        if self.env.device.type == "cuda":
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.sums, self.count, self.images, self.epochs, self.seconds = {}, 0, 0, epoch + 1, now
        if self.env.rank == 0:
            files.append_json_line(self.path, line)
            left = (time.time() - self.began) * (self.steps - step) / max(1, step - self.first)
            hidden = ("epoch", "seconds", "cpu_seconds")
            shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k not in hidden)
            begin = "\r" if sys.stdout.isatty() else ""  # over the progress line
            print(f"{begin}epoch {epoch}  {shown}  {_clock(left)} left", flush=True)

    def gather_sums(self, env):
        """Let the state dict hold the sums of all ranks. Called by all of them."""
        names = list(self.sums)
        if names and env.world > 1:
            mine = torch.stack([self.sums[name] for name in names])
            parts = [torch.empty_like(mine) for _ in range(env.world)]
            dist.all_gather(parts, mine)
            self.sums_of_ranks = dict(zip(names, torch.stack(parts, 1)))  # each (world,)
        else:
            self.sums_of_ranks = {name: self.sums[name].reshape(1) for name in names}

    def state_dict(self):
        return {"data": self.data, "sums": self.sums_of_ranks, "count": self.count, "images": self.images,
                "epochs": self.epochs, "seconds": self.seconds,
                "elapsed": time.time() - self.clock, "cpu_elapsed": time.process_time() - self.cpu_clock}

    def load_state_dict(self, state):
        self.sums = {k: v[self.env.rank].to(self.env.device) for k, v in state["sums"].items()}
        self.count, self.images = state["count"], state["images"]
        self.epochs, self.seconds = state["epochs"], state["seconds"]
        self.elapsed, self.cpu_elapsed = state["elapsed"], state["cpu_elapsed"]


@torch.no_grad()
def check_spread(z, args):
    """How the embeddings z (B, D) lie, to be logged: "std", the deviation of the unit rows from their mean,
    from 0 (all equal) to 1; "rank", e to the entropy of the singular values of these deviations (Roy &
    Vetterli 2007), at most B - 1 and D. Waits for the device. Raises ValueError where std is below 0.01, or
    not a number."""
    u = F.normalize(z.cpu().double(), dim=1)
    u = u - u.mean(0)
    std = u.square().sum(1).mean().sqrt().item()
    if not std >= 0.01:
        raise ValueError(f"the embeddings have collapsed: their deviation is {std:.1g} of at most 1; "
                         f"{last_good(args)}")
    s = torch.linalg.svdvals(u)
    return {"std": std, "rank": torch.special.entr(s / s.sum()).sum().exp().item()}


def header(args, env):
    """The first line of a log: flags, command, versions, commit, hardware."""
    commit = None
    with contextlib.suppress(OSError):  # no git
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"],
                             capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
        commit = git.stdout.strip() or None
    cuda = env.device.type == "cuda"
    return {
        "flags": vars(args),
        "command": command(),
        "commit": commit,
        "torch": torch.__version__, "torchvision": torchvision.__version__,
        "python": platform.python_version(), "world": env.world,
        "device": (torch.cuda.get_device_name(env.device) if cuda
                   else f"{_cpu_name()}, {torch.get_num_threads()} threads"),
    }


def command():
    """How this program was started, as one would type it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None where a file was named
    started = ["-m", module.name.removesuffix(".__main__")] if module else [pathlib.Path(sys.argv[0]).name]
    return " ".join(["python", *started, *sys.argv[1:]])


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _clock(seconds):
    seconds = math.ceil(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
