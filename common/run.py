"""What no paper describes: housekeeping flags, device, ranks, log, checkpoints.

A run lives in one folder, `--out`: log.jsonl, last.pt, encoder.pt and pictures. The same command continues
it.
"""
import argparse
import contextlib
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


# ----------------------------------------------------------------------------------------------------------
# Flags and errors
# ----------------------------------------------------------------------------------------------------------
def parser(doc, name, arch):
    """A parser with the housekeeping flags, the same in every script; a paper's numbers are the script's."""
    p = argparse.ArgumentParser(
        prog=f"{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    g = p.add_argument_group("housekeeping")
    g.add_argument("--data", default="cifar10", help="cifar10, cifar100, stl10, shapes, an .npz, a folder")
    g.add_argument("--data-dir", default="data", help="where torchvision's files are, or go")
    g.add_argument("--limit", type=int, help="use the first so many images of a fixed shuffle")
    g.add_argument("--arch", default=arch,
                   help="slim (for CPUs), resnet18, resnet34, resnet50; vit_slim (for CPUs), vit_tiny, ...")
    g.add_argument("--out", default=f"runs/{name}", help="the run's folder")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", help="default: cuda if there is one, else cpu")
    g.add_argument("--workers", type=int, default=4, help="decoding processes, for an ImageFolder")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="torch.compile the networks")
    g.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints")
    return p


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a ValueError of one line: "--steps -1: must be ...", so that they read
    the same from `main(argv)` as from the shell. Flags cannot be abbreviated."""

    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

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


def number(least=0.0, most=1e6, above=None):
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


def positive(args, *flags):
    """ValueError that names the first of `flags` which is not above 0."""
    for flag in flags:
        if not getattr(args, flag) > 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must be positive")


def not_negative(args, *flags):
    """ValueError that names the first of `flags` which is not 0 or more."""
    for flag in flags:
        if not getattr(args, flag) >= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: must not be negative")


# These may differ when a run is continued: they change nothing, or (device, compile) only the rounding.
FREE = {"data_dir", "out", "device", "workers", "compile", "save_every"}


def cli(main):
    """Run `main()`. An error raised on purpose (by a `raise` statement of this project) is one line and exit
    status 1; anything else keeps its traceback."""
    try:
        main()
    except (ValueError, OSError) as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        here = pathlib.Path(__file__).resolve().parent
        ours = pathlib.Path(at.filename).resolve().parent in (here, here.parent)
        if not (ours and linecache.getline(at.filename, at.lineno).strip().startswith("raise ")):
            raise
        sys.exit(f"error: {e}")
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
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {kind} cannot be used: {str(e).splitlines()[0]}") from None
    if found.type == "cuda":
        if found.index != int(os.environ.get("LOCAL_RANK", found.index)):
            raise ValueError(f"--device {kind}: under torchrun leave it out, each process takes its own")
        torch.cuda.set_device(found)
        torch.backends.cudnn.benchmark = True
    return found


def setup(args):
    """Seed, folder, signals, process group (torchrun's RANK, WORLD_SIZE, LOCAL_RANK); returns an `Env`."""
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    if 0 < args.epochs <= getattr(args, "warmup", 0):
        raise ValueError(f"--warmup {args.warmup}: must be less than --epochs {args.epochs}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    env = Env(device(args), rank, world)
    out = pathlib.Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f".rank{rank}").touch()
        (out / f".rank{rank}").unlink()
    except OSError as e:
        raise OSError(f"--out {out} cannot be written: {e.strerror}") from None
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    _stop.clear()
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, _note)
    return env


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
    """Rank 0 writes `state` (objects with state_dict) to last.pt, under a temporary name, then renames."""
    if env.rank == 0:
        path = pathlib.Path(args.out) / "last.pt"
        for name, part in state.items():
            if isinstance(part, torch.nn.Module) and not all(t.isfinite().all() for t in part.parameters()):
                raise ValueError(f"weights of {name} are not finite after {step} steps; {_last_good(args)}")
        tensors = {name: part.state_dict() for name, part in state.items()}
        with open(f"{path}.tmp", "wb") as f:
            torch.save({"flags": vars(args), "world": env.world, "step": step, "state": tensors}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)


def resume(args, env, state):
    """Put what last.pt holds back into `state`; returns the number of steps done, 0 in a fresh folder.

    Raises ValueError where the folder belongs to a run with other flags (it names them), or the file cannot
    be used.
    """
    path, log = pathlib.Path(args.out) / "last.pt", pathlib.Path(args.out) / "log.jsonl"
    if not path.exists():
        if log.exists():
            with contextlib.suppress(json.JSONDecodeError, KeyError):
                _refuse_other(args, json.loads(log.read_text().split("\n", 1)[0])["flags"])
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        flags, world, step, tensors = saved["flags"], saved["world"], saved["step"], saved["state"]
    except Exception as e:
        raise ValueError(f"{path}: not a checkpoint that can be read ({type(e).__name__}); "
                         "move it away, or choose another --out") from None
    _refuse_other(args, flags)
    if world != env.world:
        raise ValueError(f"{args.out} holds a run of {world} processes, this is one of {env.world}")
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


def _refuse_other(args, flags):
    now = vars(args)
    differ = [f"--{k.replace('_', '-')} {flags.get(k)} there, {now.get(k)} here"
              for k in sorted(flags.keys() | now.keys()) if k not in FREE and flags.get(k) != now.get(k)]
    if differ:
        raise ValueError(f"{args.out} holds a run with other flags ({'; '.join(differ)}); use another --out")


def interrupted(args, env, state, step):
    """Once SIGTERM or SIGINT has reached any rank: save, and exit with 128 + the signal's number. Call it
    before each step.

    The ranks agree through the host (gloo): the device is not waited for."""
    number = max(_stop, default=0)
    if env.world > 1:
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        number = flag.item()
    if number:
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

    def __init__(self, args, env, steps):
        self.args, self.env, self.steps = args, env, steps  # steps of the whole run
        self.path = pathlib.Path(args.out) / "log.jsonl"
        self.sums, self.count, self.images, self.bad = {}, 0, 0, torch.tensor(-1, device=env.device)
        self.epochs, self.seconds = 0, 0.0  # written so far, and how long they took
        self.elapsed, self.cpu_elapsed = 0.0, 0.0  # before this process took over

    def start(self, step, note=""):
        """Call once, after `resume`: writes the first line, or drops the lines that the checkpoint does not
        know of. `note` joins that line, and the screen."""
        if self.env.rank == 0:
            lines = self.path.read_text().splitlines() if self.path.exists() and step else []
            lines = lines[: 1 + self.epochs] or [json.dumps({**header(self.args, self.env), "note": note})]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("\n".join(lines) + "\n")
            os.replace(temporary, self.path)
            print(f"{self.args.out}: {self.steps} steps on {header(self.args, self.env)['device']}; {note}")
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
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
            left = (time.time() - self.began) * (self.steps - step) / max(1, step - self.first)
            hidden = ("epoch", "seconds", "cpu_seconds")
            shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k not in hidden)
            print(f"\repoch {epoch}  {shown}  {_clock(left)} left", flush=True)

    def state_dict(self):
        return {"sums": self.sums, "count": self.count, "images": self.images,
                "epochs": self.epochs, "seconds": self.seconds,
                "elapsed": time.time() - self.clock, "cpu_elapsed": time.process_time() - self.cpu_clock}

    def load_state_dict(self, state):
        self.sums = {k: v.to(self.env.device) for k, v in state["sums"].items()}
        self.count, self.images = state["count"], state["images"]
        self.epochs, self.seconds = state["epochs"], state["seconds"]
        self.elapsed, self.cpu_elapsed = state["elapsed"], state["cpu_elapsed"]


@torch.no_grad()
def spread(z, args):
    """How the embeddings z (B, D) lie, to be logged: "std", the deviation of the unit rows from their mean,
    from 0 (all equal) to 1; "rank", e to the entropy of the singular values of these deviations (Roy &
    Vetterli 2007), at most B - 1 and D. Waits for the device. Raises ValueError where std is below 0.01."""
    u = F.normalize(z.double(), dim=1)
    u = u - u.mean(0)
    std = u.square().sum(1).mean().sqrt().item()
    if std < 0.01:
        raise ValueError(f"the embeddings have collapsed: their deviation is {std:.1g} of at most 1; "
                         f"{_last_good(args)}")
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
