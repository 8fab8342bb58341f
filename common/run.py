"""What no paper describes: housekeeping flags, device, ranks, log, checkpoints.

A run lives in one folder, `--out`: log.jsonl, last.pt, encoder.pt and pictures. The same command continues
it.
"""
import argparse
import contextlib
import ctypes
import functools
import linecache
import os
import pathlib
import re
import signal
import sys
import time
import traceback
from typing import NamedTuple

import torch
import torch.distributed as dist

from common import files, own
from common.dist import barrier, gather_objects, meet
from common.log import last_good
from common.speed import use_graphs


# ----------------------------------------------------------------------------------------------------------
# Flags and errors
# ----------------------------------------------------------------------------------------------------------
def parser(doc, name, arch, graph=False):
    """A parser with the housekeeping flags, the same in every script (--graph where its attack is `graphed`);
    a paper's numbers are the script's."""
    p = Parser(f"{name}.py", doc)
    g = p.add_argument_group("housekeeping")
    g.add_argument("--data", type=path, default="cifar10",
                   help="cifar10, cifar100, stl10, shapes, an .npz, a folder")
    g.add_argument("--data-dir", type=path, default="data", help="where torchvision's files are, or go")
    g.add_argument("--limit", type=integer(1), help="use the first so many images of a fixed shuffle")
    g.add_argument("--arch", default=arch,
                   help="slim, preact_slim (for CPUs), resnet18, resnet34, resnet50, preact_resnet18, "
                        "preact_resnet50, wrn34_10; vit_slim (for CPUs), vit_tiny, ...; or "
                        "my_file.py:function, which returns a network")
    g.add_argument("--out", type=path, default=f"runs/{name}", help="the run's folder")
    g.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="of all random numbers")
    g.add_argument("--device", help="default: cuda if there is one, else cpu")
    g.add_argument("--workers", type=integer(0, 1000), default=4,
                   help="decoding processes, for an ImageFolder")
    g.add_argument("--compile", nargs="?", const="default", choices=("default", "reduce-overhead"),
                   help="torch.compile the networks, in this mode; without a mode: default")
    if graph:
        g.add_argument("--graph", action=argparse.BooleanOptionalAction, default=False,
                       help="replay the attack as a CUDA graph: for batches too small to keep a GPU busy")
    g.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=False,
                   help="BatchNorm over the images of all processes (torch's SyncBatchNorm, on CUDA); "
                   "without it each process has statistics of its own images")
    g.add_argument("--save-every", type=integer(1), default=1, help="epochs between checkpoints")
    return p


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help texts with the defaults in them, before the brackets that say whose they are."""

    def _get_help_string(self, action):
        text = action.help or ""
        default = action.default
        nothing = default in (None, argparse.SUPPRESS, "", [], ())
        if nothing or isinstance(default, bool) or "default:" in text:
            return action.help
        values = default if isinstance(default, (list, tuple)) else [default]
        value = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        value = value.replace("%", "%%")
        text, whose = re.fullmatch(r"(.*?)(\([^()]*\))?", text, re.DOTALL).groups()
        text = text.rstrip(" ;").removesuffix("default").rstrip(" ;")
        return " ".join(filter(None, [text and f"{text};", f"default {value}", whose]))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a ValueError of one line: "--steps -1: must be ...", so that they
    read the same from `main(argv)` as from the shell. Flags cannot be abbreviated."""

    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=HelpFormatter)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value}: choose one of {', '.join(action.choices)}")

    def parse_args(self, args=None, namespace=None):
        """As argparse has it, but for three defaults. A default --warmup that a short run has no room for
        becomes a tenth of --epochs, which is said; one given by hand stays, and is refused by `setup`. A
        default --eps is a radius in linf: --norm l2 needs one of its own. A default --lr is for the default
        --optimizer: another one needs a rate of its own."""
        words = sys.argv[1:] if args is None else list(args)
        flags = super().parse_args(words, namespace)
        by_hand = {word.split("=")[0] for word in words}
        radius_of_linf = self.get_default("eps") is not None and "--eps" not in by_hand
        if getattr(flags, "norm", None) == "l2" and radius_of_linf:
            raise ValueError("--norm l2: give its radius by --eps, for example 128, which is 128/255; the "
                             "default is linf's")
        chosen = getattr(flags, "optimizer", None)
        usual = self.get_default("optimizer")
        if chosen != usual and "--lr" not in by_hand:
            example = ", for example 1e-3" if chosen == "adamw" else ""
            raise ValueError(f"--optimizer {chosen}: give its rate by --lr{example}; the default, "
                             f"{flags.lr:g}, is for {usual}")
        default = getattr(flags, "warmup", None)
        if isinstance(default, int) and 0 < (flags.epochs or 0) <= default and "--warmup" not in by_hand:
            flags.warmup = flags.epochs // 10
            if os.environ.get("RANK", "0") == "0":
                print(f"--warmup is {flags.warmup}, not {default}: the run has {flags.epochs} epochs only")
        return flags

    def error(self, message):
        message = re.sub(r"^argument (\S+?)(/\S+)*: ", r"\1 ", message)
        raise ValueError(f"{message} (see {self.prog} --help)")


@functools.cache
def integer(least, most=10**9):
    """An argparse type: whole numbers from `least` to `most`."""
    def read(text):
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from {least} to {most}")

    return read


@functools.cache
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
    """The side of the square images that a run works on: --image-size, or else that of the data
    `images`. ValueError where there is none, or where a network of one's own does not take it."""
    side = args.image_size or images.size
    if side is None:
        raise ValueError(f"--data {args.data}: its images are not square; give their side by --image-size")
    if ".py:" in args.arch:
        own.check_side(args.arch, side)
    return side


# These may differ when a run is continued: they change nothing, or (device, compile, graph) rounding only.
FREE = {"data_dir", "out", "device", "workers", "compile", "graph", "save_every"}


def cli(main):
    """Run `main()`. An error raised on purpose (by a `raise` statement of this project), and too little
    memory, are one line and exit status 1; anything else keeps its traceback. What a console cannot show
    (the ± of tables) is a ? there."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError) as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        project = pathlib.Path(__file__).resolve().parents[1]
        folders = (project, project / "common", project / "evaluation")
        ours = pathlib.Path(place.filename).resolve().parent in folders
        if not (ours and linecache.getline(place.filename, place.lineno).strip().startswith("raise ")):
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
    """Where this process works: its device, its number `rank` among `world` processes."""

    device: torch.device
    rank: int
    world: int


_stop = {}  # the signals that asked this process to stop, and when each came first, in seconds


def _note(number, _):
    """The handler. A signal that comes more than five seconds after the first one kills. Signals within these
    five seconds count as one request: a job manager may signal every process, and torchrun then signals its
    own again."""
    now = time.monotonic()
    if _stop and now - min(_stop.values()) > 5:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _stop.setdefault(number, now)


def device(args):
    """The torch.device of `args.device`, tried; None takes this process's GPU if there is one. ValueError
    where it cannot be used. On a CPU freed memory is kept from here on (`_keep_freed_memory`)."""
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
    if found.type == "cpu":
        _keep_freed_memory()
    return found


def _keep_freed_memory():
    """Have glibc keep the memory of freed tensors for the next ones. By default it gives large blocks back to
    the system at once or keeps them, as chance has it, and each page that comes anew costs a fault: in half
    of the processes augmentation took twice as long. Other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    raised = mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, before glibc 2.35 at most 32 MiB
    if raised:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def setup(args):
    """Folder, device, signals, process group (torchrun's RANK, WORLD_SIZE, LOCAL_RANK), seed; returns an
    `Env`. Called by all ranks, which meet here.

    `args`: of `parser`, with or without a script's own flags. The folder is locked until the process ends.

    Raises ValueError where flags do not suit each other or the device (--warmup, --device, --sync-bn,
    --graph), where another process is at work in the folder, and where the other ranks cannot be met; OSError
    where the folder cannot be written.
    """
    epochs = getattr(args, "epochs", 0) or 0
    warmup = getattr(args, "warmup", 0)
    if 0 < epochs <= warmup:
        raise ValueError(f"--warmup {warmup}: must be less than --epochs {epochs}")
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    env = Env(device(args), rank, world)
    if args.sync_bn and env.device.type != "cuda":
        raise ValueError(f"--sync-bn: PyTorch's SyncBatchNorm needs CUDA, and this is {env.device.type}")
    use_graphs(args, env)
    out = pathlib.Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"--out {out} cannot be written: {e.strerror}") from None
    if rank == 0:
        files.lock(out)
    if world > 1 and not dist.is_initialized():
        meet("cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo", rank, world)
    torch.manual_seed(args.seed)
    _stop.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    return env


def to_device(net, args, env):
    """`net` on this process's device; with --sync-bn and several processes, with SyncBatchNorm.

    Raises ValueError where there is no BatchNorm to be replaced, or one of a class of its own, whose way
    to normalise would be lost without a word (GroupedNorm of adco.py and hardneg.py).
    """
    if args.sync_bn:
        norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        if not norms:
            raise ValueError("--sync-bn: this network has no BatchNorm")
        for norm in norms:
            if type(norm).__module__ != "torch.nn.modules.batchnorm":
                raise ValueError(f"--sync-bn: this network has a {type(norm).__name__}, which normalises in "
                                 "its own way, and SyncBatchNorm would replace it; leave --sync-bn out")
        if env.world > 1:
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net.to(env.device)


def autocast(device):
    """bf16 autocast on CUDA; nothing on a CPU, nor on a GPU before Ampere (T4, V100), which has no bf16 units
    and would emulate it, slower than float32."""
    if device.type == "cuda" and _has_bf16(device):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


# A constant to the compiler, which looks through a cache, and cannot ask torch.cuda within a graph.
@torch.compiler.assume_constant_result
def _has_bf16(device):
    return _says_bf16(device)


@functools.cache
def _says_bf16(device):
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


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
            raise ValueError(f"{bad} is not finite after {step} steps; {last_good(args)}")
        files.save({"flags": vars(args), "world": env.world, "step": step, "state": tensors},
                   pathlib.Path(args.out) / "last.pt")


def resume(args, env, state):
    """Put what last.pt holds back into `state`; returns the number of steps done, 0 in a fresh folder. Called
    by all ranks.

    Raises ValueError where the folder belongs to a run with other flags or on other data (it says which),
    or to another program, where the file cannot be used, and where the ranks do not see the same.
    """
    path = pathlib.Path(args.out) / "last.pt"
    data = state["log"].data if "log" in state else None
    _agree(args, (data, state["log"].listing if "log" in state else None))
    if not path.exists():
        # Without a step there was nothing to lose: what --epochs 0 exports is made again at once.
        trains = state["log"].steps if "log" in state else getattr(args, "epochs", 0)
        finished = path.with_name("encoder.pt").exists() and trains
        lines = files.json_lines(path.with_name("log.jsonl"))
        if lines:
            header = lines[0][1] or {}
            if not {"flags", "command"} <= header.keys():
                raise ValueError(f"{path.with_name('log.jsonl')}: not a log of this program; move it away, "
                                 "or use another --out")
            if finished or len(lines) > 1:  # a first line alone is of a run that came to nothing
                _refuse_other(args, header["flags"], header.get("data"), data)
        if finished:
            raise ValueError(f"{args.out} holds the encoder.pt of a run that has ended, but no last.pt, and "
                             "would be written over; use another --out, or move encoder.pt away")
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
    steps = state["log"].steps if "log" in state else "unknown"
    if not isinstance(step, int) or steps != "unknown" and step > steps:
        raise ValueError(f"{path}: says that it is after {step} steps, and the run has {steps}; move it "
                         "away, or choose another --out")
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


def _agree(args, data):
    """ValueError on all ranks where they see other files in --out, or have other `data` (any value that says
    which), as on hosts that do not share them."""
    out = pathlib.Path(args.out)
    seen = [files.end_of(out / name) for name in ("last.pt", "log.jsonl", "encoder.pt")]
    everyone = gather_objects((seen, data))
    if any(theirs[0] != everyone[0][0] for theirs in everyone):
        raise ValueError(f"the processes do not see the same files in --out {out}; it must be on a file "
                         "system that all hosts share")
    if any(theirs[1] != everyone[0][1] for theirs in everyone):
        raise ValueError("the processes do not have the same data (--data, --data-dir), or the same code of "
                         "--arch; all hosts must see the same files")


def _refuse_other(args, flags, data_there, data_here):
    now = vars(args)
    free = FREE
    if data_there and data_here and data_there.get("checksum") == data_here.get("checksum"):
        free = FREE | {"data"}  # the same images, at another place
    differ = [f"--{k.replace('_', '-')} {flags.get(k)} there, {now.get(k)} here"
              for k in sorted(flags.keys() | now.keys()) if k not in free and flags.get(k) != now.get(k)
              and (k in flags or now[k])]  # one that came later was off, or 0
    if differ:
        raise ValueError(f"{args.out} holds a run with other flags ({'; '.join(differ)}); use another --out")
    known = (data_there or {}).keys() & (data_here or {}).keys()
    if any(data_there[name] != data_here[name] for name in known):
        there, here = data_there["images"], data_here["images"]
        what = f"{there} images there, {here} here" if there != here else f"{here} images, which have changed"
        if data_there.get("checksum") == data_here.get("checksum"):
            what = "the images are the same, but not their labels"
        if data_there.get("network") != data_here.get("network"):
            file = args.arch.rpartition(":")[0]
            raise ValueError(f"{args.out} holds a run of another network: {file}, or what it imports, has "
                             "changed since; use another --out")
        raise ValueError(f"{args.out} holds a run on other data ({what}); use another --out")


def stop_if_signalled(args, env, state, step):
    """Once SIGTERM or SIGINT has reached any rank: save `state` (None: there is nothing to save yet), and
    exit with 128 + the signal's number. Call it before each step, on all ranks.

    The ranks agree through the host (gloo): the device is not waited for. Raises as `Log.check` and `save`
    do.
    """
    number = max(_stop, default=0)
    if env.world > 1:
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        number = flag.item()
    if getattr(args, "compile", None) == "reduce-overhead":  # whose graphs reuse their memory from here on
        torch.compiler.cudagraph_mark_step_begin()
    if number:
        if state is not None:
            if "log" in state:
                state["log"].check()
            save(args, env, state, step)
            barrier()  # who leaves first might have the first process, which writes, ended
        if env.rank == 0:
            name = signal.Signals(number).name
            print(f"\nstopped by {name} after {step} steps; the same command continues")
        sys.exit(128 + number)
