"""Speed and memory, measured side by side: rivals take turns in one process; medians, after a warm-up.

    python -m tests.bench                         all sections, on the GPU if there is one
    python -m tests.bench --device cpu bank step  some sections
    python -m tests.bench --quick                 tiny sizes: shows that it works, measures nothing

    augment  two views of each image: amoc.augment against torchvision's PIL pipeline in worker processes
    attack   AMOC's attack against the usual way: weight gradients accumulate, the key is made anew each step
    bank     InfoNCE over a memory bank, forward and backward: bank_logsumexp against logsumexp and against
             MoCo's concatenation and cross-entropy, both under autograd
    step     one train_step of each variant
"""
import argparse
import copy
import gc
import os
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision import transforms

import adios
import amoc
import byorl
from common import data, optim, run
from common.bank import Bank
from common.pgd import eval_mode
from common.unet import UNet

SCRIPTS = {  # variants, the base first; made by <script>_step
    "amoc": ("CCC", "ACC", "ACA", "AAC", "CAC"),
    "byorl": ("BYOL", "K = 2", "K = 5", "K = 10"),
    "adios": ("SimCLR", "ADIOS", "ADIOS-s"),
}
COMPILED = {"amoc": "ACC", "byorl": "K = 5", "adios": "ADIOS"}  # on CUDA, once more with --compile


class Setting(NamedTuple):
    device: torch.device
    arch: str
    batch: int
    bank: int
    quick: bool
    flush: torch.Tensor | None  # CUDA: larger than the L2 cache


def seconds(s, f):
    if s.flush is None:
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    s.flush.zero_()
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def race(s, rivals, budget):
    """Median seconds of each of `rivals` {name: function}, in turns, for about `budget` seconds."""
    def turn():
        return {name: seconds(s, f) for name, f in rivals.items()}

    if s.quick:
        return turn()
    warm = [turn() for _ in range(10 if s.flush is not None else 2)]
    repeats = min(100, max(5, round(budget / sum(warm[-1].values()))))
    turns = [turn() for _ in range(repeats)]
    return {name: statistics.median(t[name] for t in turns) for name in rivals}


def allocated(s):
    """Bytes in use on the GPU, where a new peak begins; None on a CPU."""
    if s.flush is None:
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(s, f, above=None):
    """MiB by which `f` exceeds `above` bytes (default: those in use before it); None on a CPU."""
    before = allocated(s)
    if before is None:
        return None
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - (before if above is None else above)) / 2**20


class Flops(TorchDispatchMode):
    """Counts like FlopCounterMode, whose module hooks do not allow autograd.grad of a network's input."""

    total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op._overloadpacket in flop_registry:
            self.total += flop_registry[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def agree(what, a, b, tolerance):
    error = ((a - b).norm() / b.norm()).item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative difference {error:.1e}, at most {tolerance:.0e} expected")


def table(title, heads, rows):
    """`rows` of strings and numbers; None is printed as -."""
    def cell(v):
        if v is None or isinstance(v, str):
            return v or "-"
        return f"{v:,.0f}" if v >= 1000 else f"{v:.3g}"

    lines = [heads, *([cell(v) for v in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for first, *rest in lines:
        print(f"  {first:{widths[0]}}", *(v.rjust(w) for v, w in zip(rest, widths[1:])), sep="  ", flush=True)


class TwoViews(torch.utils.data.Dataset):
    """torchvision's pipeline on PIL images: two views (3, 32, 32) of each of the uint8 images x."""

    def __init__(self, x):
        self.images = [transforms.functional.to_pil_image(image) for image in x]
        self.view = transforms.Compose([
            transforms.RandomResizedCrop(32, (0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.view(self.images[i]), self.view(self.images[i])


def augment(s):
    """An epoch of each: by worker processes that live already, and by `data.batches` in this process."""
    workers, batch = 2 if s.flush is None else os.cpu_count(), 32 if s.quick else 256
    x, y, _ = data.shapes(batch if s.quick else 4 * batch, seed=0)
    x, y = x.repeat(workers, 1, 1, 1), y.repeat(workers)
    images = data.Images(x.to(s.device), y.to(s.device), 10)
    loader = torch.utils.data.DataLoader(TwoViews(x), batch, num_workers=workers, persistent_workers=True)

    def pil():
        return (v.to(s.device) for views in loader for v in views)

    def ours():
        return (amoc.augment(x, rng, 32) for x, _, rng in data.batches(images, batch, 0, 0) for _ in range(2))

    def moments(views):  # the last one sees the blur
        v = [torch.stack([v.mean(), v.std(), v.diff(dim=3).abs().mean()]) for v in views]
        return torch.stack(v).mean(0)

    threads = torch.get_num_threads()
    if s.flush is None:
        torch.set_num_threads(workers)  # as many as the other has processes
    agree("augment: mean, deviation, roughness", moments(ours()), moments(pil()), 0.1)
    t = race(s, {"ours": lambda: sum(1 for _ in ours()), "pil": lambda: sum(1 for _ in pil())}, budget=10)
    torch.set_num_threads(threads)
    where = f"{workers} threads" if s.flush is None else "GPU"
    table(f"augment: two views of {len(x)} images, batches of {batch}", ["", "images/s", "speed-up"],
          [[f"PIL, {workers} workers", len(x) / t["pil"], 1.0],
           [f"amoc.augment, {where}", len(x) / t["ours"], t["pil"] / t["ours"]]])


def inputs(s):
    """net, target, x1, x2 of AMOC"""
    net, target = amoc.network(s.arch).to(s.device), amoc.network(s.arch).to(s.device).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    x1, x2 = torch.rand(2, s.batch, 3, 32, 32, device=s.device)
    return net, target, *(x.contiguous(memory_format=torch.channels_last) for x in (x1, x2))


def naive_attack(net, target, x1, x2, start, bank, temperature, eps, step_size, steps):
    with eval_mode(net, target):
        x_adv = start
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            with torch.no_grad():
                k = amoc.embed(target, x2, "clean")
            amoc.info_nce(amoc.embed(net, x_adv, "adv"), k, bank, temperature).backward()
            x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
            x_adv = (x1 + (x_adv - x1).clamp(-eps, eps)).clamp(0, 1)
    net.zero_grad()
    return x_adv


def attack(s):
    T, eps, step_size, steps = 0.2, 8 / 255, 2 / 255, 5
    net, target, x1, x2 = inputs(s)
    start, rows = (x1 + eps * (2 * torch.rand_like(x1) - 1)).clamp(0, 1), Bank(s.bank, 128).to(s.device).rows

    def ours(net, target, x1, x2, start, rows):
        v = amoc.VARIANTS["ACC"]
        return amoc.attack(net, target, x1, x2, start, x2, rows, v, T, eps, step_size, steps)[0]

    def naive(*tensors):
        return naive_attack(*tensors, T, eps, step_size, steps)

    def cast(f):
        with run.autocast(s.device):
            f(net, target, x1, x2, start, rows)

    # In double precision no gradient is so near zero that its sign hangs on the order of a sum.
    exact = [copy.deepcopy(net).double(), copy.deepcopy(target).double(),
             *(x[:16].double() for x in (x1, x2, start)), rows.double()]
    agree("attack", ours(*exact) - exact[2], naive(*exact) - exact[2], 1e-6)
    t = race(s, {"ours": lambda: cast(ours), "naive": lambda: cast(naive)}, budget=10)
    table(f"attack: ACC, {steps} steps, {s.arch}, batch {s.batch}, bank {s.bank}", ["", "ms", "speed-up"],
          [["weight gradients, key each step", 1e3 * t["naive"], 1.0],
           ["amoc.attack", 1e3 * t["ours"], t["naive"] / t["ours"]]])


def eager(q, k, bank, T):
    return F.softplus((q @ bank.T / T).logsumexp(1) - (q * k).sum(1) / T).mean()


def moco(q, k, bank, T):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.T], 1) / T
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def bank(s):
    sizes, names, lines = [(128, 4096), (256, 32768)], ("ours", "eager", "MoCo"), []
    if s.flush is not None:
        sizes += [(256, 65536), (1024, 65536), (1024, 1048576)]
    for n, size in [(32, 256)] if s.quick else sizes:
        q, k, rows = (F.normalize(torch.randn(m, 128, device=s.device), dim=1) for m in (n, n, size))
        losses = {"ours": amoc.info_nce, "eager": eager, "MoCo": moco}
        if s.flush is not None:
            torch.cuda.empty_cache()
            if torch.cuda.mem_get_info()[0] < 6 * 4 * n * size:  # the others hold about four (N, K) matrices
                losses = {"ours": amoc.info_nce}
        for asked in ([q], [q, rows]):
            q.requires_grad_(), rows.requires_grad_(len(asked) == 2)

            def work(name):
                loss = losses[name](q, k, rows, 0.2)
                return [loss.detach(), *torch.autograd.grad(loss, asked)]

            for name in losses:
                for what, a, b in zip(("loss", "dq", "dbank"), work("ours"), work(name)):
                    agree(f"bank: {what}, {name}", a, b, 1e-4)
            t = race(s, {name: lambda name=name: work(name) for name in losses}, budget=5)
            ms = [1e3 * t[name] if name in t else None for name in names]
            mib = [peak(s, lambda: work(name)) if name in t else None for name in names]
            lines.append([f"{n} x {size}", "q" if len(asked) == 1 else "q, bank", *ms,
                          *(m / ms[0] if m else None for m in ms[1:]), *mib])
    table("bank: InfoNCE, forward and backward, N x K, D 128, fp32; MiB: peak above the inputs",
          ["", "grad of", *(f"{v} ms" for v in names), *(f"{v}/ours" for v in names[1:]),
           *(f"{v} MiB" for v in names)], lines)


def amoc_step(s, variant, compiled):
    """A function that makes one step, with networks, banks, optimizer and views of its own."""
    args = amoc.parser().parse_args(["--variant", variant])
    net, target, x1, x2 = inputs(s)
    banks = [Bank(s.bank, 128).to(s.device) for _ in range(2)]
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=args.weight_decay)
    noise = 2 * torch.rand(s.batch, 2, 3, 32, 32, device=s.device) - 1
    if compiled:
        net.compile(), target.compile()

    def one():
        with run.autocast(s.device):
            amoc.train_step(net, target, opt, *banks, x1, x2, noise, args)

    return one


def byorl_step(s, variant, compiled):
    args = byorl.parser().parse_args(["--eps", "0"] if variant == "BYOL" else ["--steps", variant.split()[-1]])
    net = byorl.network(s.arch, args.hidden).to(s.device)
    target = copy.deepcopy(net[:2]).requires_grad_(False)
    x1, x2 = inputs(s)[2:]
    opt = optim.LARS(optim.lars_groups(net), 0.0, weight_decay=args.weight_decay)
    noise = 2 * torch.rand(s.batch, 2, 3 * 32 * 32, device=s.device) - 1
    if compiled:
        net.compile(), target.compile()

    def one():
        with run.autocast(s.device):
            byorl.train_step(net, target, opt, x1, x2, noise, 1.0, args)

    return one


def adios_step(s, variant, compiled):
    flags = {"SimCLR": ["--masker", "none"], "ADIOS": [], "ADIOS-s": ["--single"]}[variant]
    args = adios.parser().parse_args(flags)
    net = adios.network(s.arch, args.objective, 32).to(s.device)
    masker = UNet(args.masks, args.mask_width, 32).to(s.device)
    x1, x2 = inputs(s)[2:]
    opts = [optim.LARS(optim.lars_groups(part), 0.0, trust=0.02, clip=True) for part in (net, masker)]
    pick = torch.rand(s.batch, 2, device=s.device)
    given = x2.new_zeros(s.batch, 1, 32, 32) if variant == "SimCLR" else None
    if compiled:
        net[0].compile(), masker.compile()

    def one():
        with run.autocast(s.device):
            adios.train_step(net, None, masker, *opts, x1, x2, given, pick, 1.0, args)

    return one


def step(s):
    for script, variants in SCRIPTS.items():
        steps, flops, mib = {}, {}, {}
        compiled = f"{COMPILED[script]}, compiled"
        for name in variants if s.flush is None or s.quick else (*variants, compiled):
            variant, before = name.split(",")[0], allocated(s)
            steps[name] = one = globals()[f"{script}_step"](s, variant, name == compiled)
            if name != compiled:
                with Flops() as counter:
                    one()
            flops[name] = flops[variant] if name == compiled else counter.total
            if s.flush is not None:
                one(), one()  # the optimizer's state, cuDNN's choices
            mib[name] = peak(s, one, above=before)
        t, base = race(s, steps, budget=30), variants[0]
        table(f"step: {script}, {s.arch}, batch {s.batch}" + (f", bank {s.bank}" if script == "amoc" else ""),
              ["", "ms", "images/s", "GFLOP", "TFLOP/s", "peak MiB", f"time / {base}"],
              [[name, 1e3 * t[name], s.batch / t[name], flops[name] / 1e9, flops[name] / 1e12 / t[name],
                mib[name], t[name] / t[base]] for name in steps])


SECTIONS = {"augment": augment, "attack": attack, "bank": bank, "step": step}


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sections", nargs="*", help=f"of {' '.join(SECTIONS)}; default: all")
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument("--quick", action="store_true", help="tiny sizes")
    args = p.parse_args(argv)
    for name in args.sections:
        if name not in SECTIONS:
            p.error(f"{name}: choose from {', '.join(SECTIONS)}")
    device = run.device(args)
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    size = ("slim", 8, 64) if args.quick else ("resnet18", 256, 32768) if cuda else ("slim", 128, 4096)
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if cuda else None
    s = Setting(device, *size, args.quick, flush)
    threads = f", {torch.get_num_threads()} CPU threads" if cuda else ""
    print(f"{run.header(args, run.Env(device, 0, 1))['device']}{threads}; torch {torch.__version__}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](s)


if __name__ == "__main__":
    run.cli(main)
