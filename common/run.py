"""What no paper describes: housekeeping flags, device, ranks, log, checkpoints.

A run lives in one folder, `--out`: log.jsonl, last.pt, encoder.pt and pictures. The same command continues
it.
"""
import argparse
import contextlib
import datetime
import json
import linecache
import math
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torchvision.utils import save_image

from common import files


# ----------------------------------------------------------------------------------------------------------
# Flags and errors
# ----------------------------------------------------------------------------------------------------------
def parser(doc, name, arch):
    """A parser with the housekeeping flags, the same in every script; a paper's numbers are the script's."""
    p = Parser(f"{name}.py", doc)
    g = p.add_argument_group("housekeeping")
    g.add_argument("--data", type=path, default="cifar10",
                   help="cifar10, cifar100, stl10, shapes, an .npz, a folder")
    g.add_argument("--data-dir", type=path, default="data", help="where torchvision's files are, or go")
    g.add_argument("--limit", type=integer(1), help="use the first so many images of a fixed shuffle")
    g.add_argument("--arch", default=arch,
                   help="slim (for CPUs), resnet18, resnet34, resnet50; vit_slim (for CPUs), vit_tiny, ...")
    g.add_argument("--out", type=path, default=f"runs/{name}", help="the run's folder")
    g.add_argument("--seed", type=integer(0, 2**32 - 1), default=0)
    g.add_argument("--device", help="default: cuda if there is one, else cpu")
    g.add_argument("--workers", type=integer(0, 1000), default=4,
                   help="decoding processes, for an ImageFolder")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="torch.compile the networks")
    g.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=False,
                   help="BatchNorm over the images of all processes (torch's SyncBatchNorm, on CUDA); "
                   "without it each process has statistics of its own images")
    g.add_argument("--save-every", type=integer(1), default=1, help="epochs between checkpoints")
    return p


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a ValueError of one line: "--steps -1: must be ...", so that they read
    the same from `main(argv)` as from the shell. Flags cannot be abbreviated."""

    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value}: choose one of {', '.join(action.choices)}")

    def error(self, message):
        message = re.sub(r"^argument (\S+?)(/\S+)*: ", r"\1 ", message)
        raise ValueError(f"{message} (see {self.prog} --help)")


def integer(least, most=10**9):
    """An argparse type: whole numbers from `least` to `most`."""
    def read(text):
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from {least} to {most}")

    return read


def number(least=0.0, most=1e12, above=None):
    """An argparse type: finite numbers from `least` to `most`; with `above`, greater than it instead."""
    wanted = f"from {least:g} to {most:g}" if above is None else f"above {above:g}, at most {most:g}"

    def read(text):
        with contextlib.suppress(ValueError):
            value = float(text)
            if (value >= least if above is None else value > above) and value <= most:  # NaN is neither
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be a number {wanted}")

    return read


def path(text):
    """An argparse type: a path that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("'': must name a file or a folder")
    return text


def image_size(args, images):
    """The side of the square images that a run works on: --image-size, or else that of the data `images`."""
    if args.image_size:
        return args.image_size
    if images.size is None:
        raise ValueError(f"--data {args.data}: its images are not square; give their side by --image-size")
    return images.size


# These may differ when a run is continued: they change nothing, or (device, compile) only the rounding.
FREE = {"data_dir", "out", "device", "workers", "compile", "save_every"}


def cli(main):
    """Run `main()`. An error raised on purpose (by a `raise` statement of this project), and too little memory,
    are one line and exit status 1; anything else keeps its traceback."""
    try:
        main()
    except (ValueError, OSError) as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        here = pathlib.Path(__file__).resolve().parent
        ours = pathlib.Path(at.filename).resolve().parent in (here, here.parent)
        if not (ours and linecache.getline(at.filename, at.lineno).strip().startswith("raise ")):
            raise
        sys.exit(f"error: {e}")
    except (RuntimeError, MemoryError) as e:
        text = " ".join(str(e).split())
        words = ("out of memory", "allocate memory", "not enough memory", "invalid buffer size")
        if not isinstance(e, MemoryError) and not any(word in text.lower() for word in words):
            raise
        sys.exit(f"error: not enough memory ({text[:200]}); "
                 "a smaller --batch-size, --image-size or network needs less")
    if dist.is_initialized():  # not after an error: the other ranks may be waiting, and torchrun ends them
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------
# Device and ranks
# ----------------------------------------------------------------------------------------------------------
class Env(NamedTuple):
    device: torch.device
    rank: int
    world: int


_stop = []  # the number of the signal that asked this process to stop


def _note(number, _):
    _stop.append(number)
    signal.signal(number, signal.SIG_DFL)  # the second one kills


def device(args):
    """The torch.device of `args.device`, tried; None takes this process's GPU if there is one."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        local = int(os.environ.get("LOCAL_RANK", 0))
        found = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        torch.zeros(1, device=found).item()  # also refuses "meta", which holds no numbers
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {kind} cannot be used: {str(e).splitlines()[0]}") from None
    if found.type == "cuda":
        if found.index != int(os.environ.get("LOCAL_RANK", found.index)):
            raise ValueError(f"--device {kind}: under torchrun leave it out, each process takes its own")
        torch.cuda.set_device(found)
        torch.backends.cudnn.benchmark = True
    return found


def setup(args):
    """Folder, device, signals, process group (torchrun's RANK, WORLD_SIZE, LOCAL_RANK), seed; returns an `Env`.

    `args`: of `parser`, with or without a script's own flags. The folder is locked until the process ends.
    """
    epochs, warmup = getattr(args, "epochs", 0), getattr(args, "warmup", 0)
    if 0 < epochs <= warmup:
        raise ValueError(f"--warmup {warmup}: must be less than --epochs {epochs}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    env = Env(device(args), rank, world)
    if args.sync_bn and env.device.type != "cuda":
        raise ValueError(f"--sync-bn: PyTorch's SyncBatchNorm needs CUDA, and this is {env.device.type}")
    out = pathlib.Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"--out {out} cannot be written: {e.strerror}") from None
    if rank == 0:
        files.lock(out)
    if world > 1 and not dist.is_initialized():
        _meet("cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo", rank, world)
    torch.manual_seed(args.seed)
    _stop.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    return env


MEETING = datetime.timedelta(minutes=1)  # how long a process waits for the others to start


def _meet(backend, rank, world):
    """Start the process group. Collectives keep torch's own, longer, time limit."""
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as e:  # torch.distributed's errors are RuntimeErrors
        raise ValueError(f"process {rank} of {world}: the others could not be met within "
                         f"{MEETING.total_seconds():.0f} s ({str(e).splitlines()[0]})") from None


def to_device(net, args, env):
    """`net` on this process's device; with --sync-bn and several processes, with SyncBatchNorm."""
    if args.sync_bn:
        if not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules()):
            raise ValueError("--sync-bn: this network has no BatchNorm")
        if env.world > 1:
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net.to(env.device)


def autocast(device):
    """bf16 autocast on CUDA; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g)
        return g.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z):
    """Rows (B, D) of every rank -> (world B, D) in rank order, with gradient: a row receives the sum of what
    all ranks' losses ask of it, so that, with `average_grads`, the gradient is that of the mean over ranks of
    their losses."""
    return _Gather.apply(z) if dist.is_initialized() and dist.get_world_size() > 1 else z


def barrier():
    """Wait here until all ranks are."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # through the host: gloo


def average_grads(params):
    """Average gradients over ranks: the one line of data parallel between `backward` and `step`."""
    _average([p.grad for p in params if p.grad is not None])


def average_buffers(*nets):
    """Average floating-point buffers (running statistics) over ranks, so that all ranks keep one network."""
    _average([b for net in nets for b in net.buffers() if b.is_floating_point()])


@torch.no_grad()
def _average(tensors):
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for t, new in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(new.view_as(t))


# ----------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------
def save(args, env, state, step):
    """Write `state` (a dict of objects with state_dict) to last.pt. Called by all ranks; rank 0 writes.

    Raises ValueError where a number in it is not finite, OSError where the file cannot be written. What
    last.pt held before then stays.
    """
    if "log" in state:
        state["log"].gather_sums(env)
    if env.rank == 0:
        tensors = {name: part.state_dict() for name, part in state.items()}
        bad = files.not_finite(tensors)
        if bad:
            raise ValueError(f"{bad} is not finite after {step} steps; {_last_good(args)}")
        files.save({"flags": vars(args), "world": env.world, "step": step, "state": tensors},
                   pathlib.Path(args.out) / "last.pt")


def resume(args, env, state):
    """Put what last.pt holds back into `state`; returns the number of steps done, 0 in a fresh folder.

    Raises ValueError where the folder belongs to a run with other flags or on other data (it says which), or
    to another program, or where the file cannot be used.
    """
    path = pathlib.Path(args.out) / "last.pt"
    data = state["log"].data if "log" in state else None
    if not path.exists():
        lines = files.json_lines(path.with_name("log.jsonl"))
        if lines:
            header = lines[0][1] or {}
            if not {"flags", "command"} <= header.keys():
                raise ValueError(f"{path.with_name('log.jsonl')}: not a log of this program; move it away, or "
                                 "use another --out")
            _refuse_other(args, header["flags"], header.get("data"), data)
        return 0
    try:
        saved = files.load(path)
        flags, world, step, tensors = saved["flags"], saved["world"], saved["step"], saved["state"]
        data_there = tensors.get("log", {}).get("data")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = str(e).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a checkpoint that can be read ({reason}); "
                         "move it away, or choose another --out") from None
    _refuse_other(args, flags, data_there, data)
    if world != env.world:
        raise ValueError(f"{args.out} holds a run of {world} processes, this is one of {env.world}")
    bad = files.not_finite(tensors)
    if bad:
        raise ValueError(f"{path}: {bad} is not finite; move it away, or choose another --out")
    for name, part in state.items():
        try:
            part.load_state_dict(tensors[name])
        except Exception as e:
            raise ValueError(f"{path}: {name} does not fit ({' '.join(str(e).split())})") from None
    if env.rank == 0:
        print(f"{args.out}: continues after {step} steps")
    return step


def _last_good(args):
    path = pathlib.Path(args.out) / "last.pt"
    if not path.exists():
        return "no checkpoint was saved yet"
    return f"the last good checkpoint is {path}; try a lower --lr"


def _refuse_other(args, flags, data_there, data_here):
    now = vars(args)
    differ = [f"--{k.replace('_', '-')} {flags.get(k)} there, {now.get(k)} here"
              for k in sorted(flags.keys() | now.keys()) if k not in FREE and flags.get(k) != now.get(k)]
    if differ:
        raise ValueError(f"{args.out} holds a run with other flags ({'; '.join(differ)}); use another --out")
    if data_there and data_here and data_there != data_here:
        there, here = data_there["images"], data_here["images"]
        what = f"{there} images there, {here} here" if there != here else f"{here} images, which have changed"
        raise ValueError(f"{args.out} holds a run on other data ({what}); use another --out")


def stop_if_signalled(args, env, state, step):
    """Once SIGTERM or SIGINT has reached any rank: save `state` (None: there is nothing to save yet), and exit
    with 128 + the signal's number. Call it before each step.

    The ranks agree through the host (gloo): the device is not waited for.
    """
    number = max(_stop, default=0)
    if env.world > 1:
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        number = flag.item()
    if number:
        if state is not None:
            if "log" in state:
                state["log"].check()
            save(args, env, state, step)
        if env.rank == 0:
            name = signal.Signals(number).name
            print(f"\nstopped by {name} after {step} steps; the same command continues")
        sys.exit(128 + number)


# ----------------------------------------------------------------------------------------------------------
# The log
# ----------------------------------------------------------------------------------------------------------
class Log:
    """log.jsonl: a first line with all flags, versions and the device, then one object per epoch; and a
    progress line.

    Sums stay on the device within an epoch. They and the clock are in the state dict, so a resumed run logs
    the same.
    """

    def __init__(self, args, env, steps, images):
        self.args, self.env, self.steps = args, env, steps  # steps of the whole run
        self.path = pathlib.Path(args.out) / "log.jsonl"
        self.data = {"images": len(images), "checksum": images.checksum()}
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
            print(f"{self.args.out}: {self.steps} steps on {first['device']}; {note}")
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
        """Stop the run if a value has not been finite on any rank (waits for the device)."""
        bad = self.bad.clone()
        if self.env.world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        bad = bad.item()
        if bad >= 0:
            raise ValueError(f"the loss is not finite in epoch {self.epochs}, step {bad}; "
                             f"{_last_good(self.args)}")

    def mean(self, name):
        """The mean of the step value `name` over the steps of this epoch so far, on this rank (waits for the
        device)."""
        return (self.sums[name] / self.count).item()

    def epoch(self, epoch, step, **values):
        """Write the line of `epoch` (0-based): means of the step values, then `values`, speed and time."""
        self.check()
        means = [v / self.count for v in self.sums.values()]
        _average(means)
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
                         f"{_last_good(args)}")
    s = torch.linalg.svdvals(u)
    return {"std": std, "rank": torch.special.entr(s / s.sum()).sum().exp().item()}


def save_picture(images, path, columns):
    """Write images (N, 3, H, W) in [0, 1] as a grid of `columns` to the PNG file `path`, whole or not at all."""
    with files.replacing(path) as temporary:
        save_image(images, temporary, nrow=columns, format="png")


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
        "command": " ".join(["python", pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "torch": torch.__version__, "torchvision": torchvision.__version__,
        "python": platform.python_version(), "world": env.world,
        "device": (torch.cuda.get_device_name(env.device) if cuda
                   else f"{_cpu_name()}, {torch.get_num_threads()} threads"),
    }


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _clock(seconds):
    seconds = math.ceil(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
