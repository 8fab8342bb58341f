"""Speed and memory, measured side by side: rivals take turns in one process; medians, after a warm-up.

    python -m tests.bench                         all sections, on the GPU if there is one
    python -m tests.bench --device cpu bank step  some sections
    python -m tests.bench step --scripts amoc acl the steps of some scripts
    python -m tests.bench --quick                 tiny sizes: shows that it works, measures nothing

    augment  two views of each image: amoc.augment against torchvision's PIL pipeline in worker processes
    attack   the attacks of amoc, rocl, acl and advcl against themselves with the clean views embedded anew at each step, and against
             the usual way, where moreover weight gradients are made
    bank     InfoNCE over a memory bank, forward and backward: bank_logsumexp as it is used, its plain form
             (BANK_OP=torch), logsumexp of the matrix, that compiled, MoCo's concatenation and cross-entropy
    step     one train_step of each variant; on a GPU also with --compile, with --graph and with both. Passes: its
             floating point operations over those of a forward pass of the batch. Operations: tensor operations
             that a GPU would launch as kernels, counted on the CPU under bfloat16 autocast (a bank of 2,048
             rows, in one chunk); and those left where the attack is one CUDA graph
    passes   no times: how many batches of a step pass through the encoder, forward and backward, as hooks count
             them on the CPU; in one table for all scripts, AdCo beside MoCo
    autoattack  the standard version against the PyPI package pyautoattack, where that is installed, on one
             classifier (trained here) and the same images; each runs once; on a CPU it is CPU time
"""
import argparse
import contextlib
import copy
import functools
import gc
import importlib
import os
import statistics
import time
import unittest.mock
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision import transforms

import acl
import adco
import adios
import adpe
import adv_mae
import advcl
import amoc
import byorl
import caco
import clae
import hardneg
import rocl
import pretext
import rotnet
import unified
from common import shapes
from evaluation import autoattack as aa
from common import data, encoders, optim, resnet, run, speed, vit
from common.augment import to_float
from common.bank import Bank
from common.log import header
from common.pgd import Kept, eval_mode, frozen_stats, pgd
from common.unet import UNet
from tests.scripts import named, named_by, scripts_with

SCRIPTS = {  # variants, the base first; made by <script>_step. Those of the masked autoencoders are flags
    "amoc": ("CCC", "ACC", "ACA", "AAC", "CAC"),
    "rocl": ("without regulariser", "with"),
    "acl": ("s2s", "a2s", "a2a", "ds"),
    "advcl": ("without pseudo-labels", "with"),
    "clae": ("--eps 4", "--random"),
    "adco": ("bank", "batch-negatives", "symmetric", "hybrid"),
    "caco": ("cooperative", "hybrid"),
    "hardneg": ("--negatives plain", "--negatives ifm", "--negatives hcl", "--negatives mochi",
                "--negatives plain --base simclr", "--negatives hcl --base simclr"),
    "adv_mae": ("--eps 0", "--steps 1", "--steps 2", "--steps 2 --norm l2 --eps 128"),
    "unified": ("--attack none", "--attack joint", "--con-weight 0", "--lam 0"),
    "adpe": ("--radius 0", "--adversary persistent", "--adversary pgd", "--position absolute --radius 0",
             "--position absolute"),
    "byorl": ("BYOL", "K = 2", "K = 5", "K = 10"),
    "adios": ("SimCLR", "ADIOS", "ADIOS-s"),
    "rotnet": ("--eps 0", "--steps 2", "--steps 2 --norm l2 --eps 128", "--target labels --loss trades"),
    "pretext": ("--tasks rotation --eps 0", "--tasks rotation", "--tasks jigsaw", "--tasks selfie", "--lam 0", "--lam 0.1"),
}
COMPILED = {  # on CUDA, once more with --compile
    "amoc": "ACC", "rocl": "with", "acl": "ds", "advcl": "with", "clae": "--eps 4", "adco": "bank", "caco": "cooperative",
    "hardneg": "--negatives mochi",
    "adv_mae": "--steps 2", "unified": "--attack joint", "adpe": "--adversary persistent", "byorl": "K = 5", "adios": "ADIOS",
    "rotnet": "--steps 2", "pretext": "--tasks rotation"}
VITS = {"slim": "vit_slim", "resnet18": "vit_tiny"}  # what the masked autoencoders have instead


class Setting(NamedTuple):
    device: torch.device
    arch: str
    batch: int
    bank: int
    quick: bool
    flush: torch.Tensor | None  # CUDA: larger than the L2 cache
    scripts: tuple = tuple(SCRIPTS)  # whose steps are timed


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
    x, y, _ = shapes.shapes(batch if s.quick else 4 * batch, seed=0)
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


def views(s):
    """x1, x2"""
    x = torch.rand(2, s.batch, 3, 32, 32, device=s.device)
    return [v.contiguous(memory_format=torch.channels_last) for v in x]


def inputs(s):
    """net, target, x1, x2 of AMOC"""
    net, target = amoc.network(s.arch).to(s.device), amoc.network(s.arch).to(s.device).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    return net, target, *views(s)


class Attacked(NamedTuple):
    """What one script's attack needs, to run it and its rivals."""

    ours: object  # () -> x_adv
    again: object  # x -> loss, all of it made anew, as the authors' codes do at each step
    x: torch.Tensor
    start: torch.Tensor
    eps: float
    step_size: float
    steps: int
    nets: tuple
    mode: object  # eval_mode or frozen_stats


def amoc_attack(s, dtype):
    args = amoc.parser().parse_args([])
    net, target, x1, x2 = (t.to(dtype) for t in inputs(s))
    (start, noise), rows = start_of(x1, args.eps / 255), Bank(s.bank, 128).to(s.device).rows.to(dtype)

    def again(x):
        k = amoc.embed(target, x2, "clean").detach()
        return amoc.info_nce(amoc.embed(net, x, "adv"), k, rows, args.temperature)

    noise = torch.stack([noise, noise], 1)
    settings = named(amoc.attack, amoc)
    return Attacked(lambda: amoc.attack(net, target, x1, x2, noise, rows, **settings)[0], again,
                    x1, start, settings["eps"], settings["step_size"], settings["steps"], (net, target), eval_mode)


def rocl_attack(s, dtype):
    args, net = rocl.parser().parse_args([]), rocl.network(s.arch).to(s.device, dtype)
    x1, x2 = (x.to(dtype) for x in views(s))
    settings = named(rocl.attack, rocl)
    eps, step_size = settings["eps"], settings["step_size"]
    start, noise = start_of(x1, eps)
    return Attacked(lambda: rocl.attack(net, x1, x2, noise, **settings),
                    lambda x: rocl.nt_xent([*rocl.embed(net, x), *rocl.embed(net, x2)], args.temperature),
                    x1, start, eps, step_size, args.steps, (net,), eval_mode)


def acl_attack(s, dtype):
    args, net = acl.parser().parse_args([]), acl.network(s.arch, "a2s").to(s.device, dtype)
    x1, x2 = (x.to(dtype) for x in views(s))
    start, noise = start_of(x1, args.eps / 255)
    kinds, noise = acl.VARIANTS["a2s"][0], torch.stack([noise, noise], 1)
    settings = named(acl.attack, acl)
    return Attacked(lambda: acl.attack(net, x1, x2, noise, kinds, **settings)[0],
                    lambda x: acl.nt_xent(*acl.embed_pair(net, x, x2, kinds), args.temperature),
                    x1, start, settings["eps"], settings["step_size"], settings["steps"], (net,), eval_mode)


def advcl_attack(s, dtype):
    args, net = advcl.parser().parse_args([]), advcl.network(s.arch, []).to(s.device, dtype)
    x1, x2, x = (x.to(dtype) for x in (*views(s), views(s)[0]))
    start, noise = start_of(x, args.eps / 255)
    clean, to_attack = advcl.choose(args.views, x1, x2, x, args.cutoff)
    settings = advcl.attack_settings(args)

    def embed_clean():
        return [advcl.embed(net, view, "clean") for view in clean]

    def ours():
        with frozen_stats(net):
            z = [v.detach() for v in embed_clean()]
        return advcl.attack(net, lambda x: advcl.contrast(net, x, z, args.temperature),
                            to_attack, noise[None], **settings)[0]

    return Attacked(ours, lambda x: advcl.contrast(net, x[None], embed_clean(), args.temperature),
                    x, start, settings["eps"], settings["step_size"], settings["steps"], (net,), frozen_stats)


def start_of(x, eps):
    noise = 2 * torch.rand_like(x) - 1
    return (x + eps * noise).clamp(0, 1), noise


def constants_again(a):
    with a.mode(*a.nets):
        return pgd(a.again, a.x, a.eps, a.step_size, a.steps, start=a.start)


def weight_gradients_too(a):
    with a.mode(*a.nets):
        x_adv = a.start
        for _ in range(a.steps):
            x_adv = x_adv.detach().requires_grad_()
            a.again(x_adv).backward()
            x_adv = x_adv.detach() + a.step_size * x_adv.grad.sign()
            x_adv = (a.x + (x_adv - a.x).clamp(-a.eps, a.eps)).clamp(0, 1)
    for net in a.nets:
        net.zero_grad()
    return x_adv


def attack(s):
    """Three ways to one perturbation: the script's; "again", the clean views embedded at each step;
    "weights", and with the gradients of the weights that nobody asked for."""
    rivals = {"ours": lambda a: a.ours(), "again": constants_again, "weights": weight_gradients_too}
    lines = []
    for name, make in ATTACKS.items():
        exact = make(s._replace(batch=16), torch.float64)
        moved = {rival: f(exact) - exact.x for rival, f in rivals.items()}
        for rival in moved:  # in double precision: no gradient's sign hangs on the order of a sum
            agree(f"attack: {name}, {rival}", moved["ours"], moved[rival], 1e-6)
        a = make(s, torch.float32)

        t = race(s, {rival: lambda f=f, a=a: f(a) for rival, f in rivals.items()}, budget=10)
        ratios = [t[rival] / t["ours"] for rival in ("again", "weights")]
        lines.append([name, *(1e3 * t[rival] for rival in rivals), *ratios])
    table(f"attack: {s.arch}, batch {s.batch}, bank {s.bank}",
          ["", *(f"{rival} ms" for rival in rivals), "again/ours", "weights/ours"], lines)


ATTACKS = {"amoc ACC": amoc_attack, "rocl": rocl_attack, "acl a2s": acl_attack, "advcl": advcl_attack}


def eager(q, k, bank, T):
    scores = q @ bank.to(q.dtype).T / T
    return F.softplus(scores.float().logsumexp(1) - (q * k).sum(1).float() / T).mean()


def moco(q, k, bank, T):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.to(q.dtype).T], 1) / T
    return F.cross_entropy(logits.float(), torch.zeros(len(q), dtype=torch.long, device=q.device))


def plain(q, k, bank, T):
    with unittest.mock.patch.dict(os.environ, BANK_OP="torch"):
        return amoc.info_nce(q, k, bank, T)


def floor(n, size, products):
    """Milliseconds below which no H200 gets, at 790 TFLOP/s, 3.7e12 exponentials and 4.3 TB a second."""
    return 1e3 * max(2 * n * size * 128 * products / 790e12, 2 * n * size / 3.7e12,
                     4 * size * 128 * (products - 1) / 4.3e12)


def bank(s):
    """A table for each number of rows, so that the smaller ones are there even if the larger ones take too long."""
    cuda = s.flush is not None
    sizes, types = {4096: [128], 32768: [256]}, [torch.float32]  # rows of the bank: queries
    losses = {"ours": amoc.info_nce, "plain": plain, "eager": eager, "MoCo": moco}
    if cuda:
        sizes = {size: [256, 512, 1024] for size in (4096, 65536, 1048576)}
        types.append(torch.bfloat16)
        losses["compiled"] = torch.compile(eager, dynamic=False)
        torch._dynamo.config.cache_size_limit = 64
    if s.quick:
        sizes = {256: [32]}
    names = tuple(losses)
    for size, queries in sizes.items():
        lines = []
        for dtype in types:
            for n in queries:
                lines += bank_lines(s, losses, n, size, dtype)
        table("bank: InfoNCE, forward and backward, N x K, D 128; MiB: peak above the inputs; floor: of an H200",
              ["", "grad of", *(f"{v} ms" for v in names), *(f"{v}/ours" for v in names[1:]),
               *(f"{v} MiB" for v in names), "floor/ours"], lines)


def bank_lines(s, losses, n, size, dtype):
    """Of the table: `n` queries and `size` rows, where the queries alone get a gradient, and where both do."""
    cuda, names, lines = s.flush is not None, tuple(losses), []
    q, k, rows = (F.normalize(torch.randn(m, 128, device=s.device), dim=1) for m in (n, n, size))
    q, k = q.to(dtype), k.to(dtype)
    rivals = dict(losses)
    if cuda:
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 6 * 4 * n * size:  # they hold about four (N, K) matrices
            rivals = {name: losses[name] for name in ("ours", "plain")}
    for asked in ([q], [q, rows]):
        q.requires_grad_(), rows.requires_grad_(len(asked) == 2)

        def work(name):
            loss = losses[name](q, k, rows, 0.2)
            return [loss.detach(), *torch.autograd.grad(loss, asked)]

        for name in rivals:
            for what, a, b in zip(("loss", "dq", "dbank"), work("ours"), work(name)):
                tolerance = 1e-4 if dtype == torch.float32 else 0.03  # theirs rounds the scores
                agree(f"bank: {what}, {name}", a.float(), b.float(), tolerance)
        t = race(s, {name: lambda name=name: work(name) for name in rivals}, budget=5)
        ms = [1e3 * t[name] if name in t else None for name in names]
        mib = [peak(s, lambda: work(name)) if name in t else None for name in names]
        asks = "q" if len(asked) == 1 else "q, bank"
        share = floor(n, size, 2 + len(asked)) / ms[0] if cuda and dtype == torch.bfloat16 else None
        ratios = [m / ms[0] if m else None for m in ms[1:]]
        lines.append([f"{n} x {size}, {str(dtype)[6:]}", asks, *ms, *ratios, *mib, share])
    return lines


def compile_(s, compiled, *nets):
    args = SimpleNamespace(compile="default" if compiled else None, batch_size=s.batch)
    speed.compile_networks(args, SimpleNamespace(world=1), *nets)


def amoc_step(s, variant, compiled):
    """A function that makes one step, with networks, banks, optimizer and views of its own."""
    args = amoc.parser().parse_args(["--variant", variant])
    settings = named(amoc.train_step, amoc, "--variant", variant)
    net, target, x1, x2 = inputs(s)
    banks = [Bank(s.bank, 128).to(s.device) for _ in range(2)]
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=args.weight_decay)
    noise = 2 * torch.rand(s.batch, 2, 3, 32, 32, device=s.device) - 1
    compile_(s, compiled, net, target)

    def one():
        amoc.train_step(net, target, opt, *banks, x1, x2, noise, **settings)

    return one


def rocl_step(s, variant, compiled):
    settings = named(rocl.train_step, rocl, *([] if variant == "with" else ["--reg-weight", "0"]))
    net = rocl.network(s.arch).to(s.device)
    opt, (x1, x2) = optim.LARS(net.parameters(), 0.0), views(s)
    noise = 2 * torch.rand_like(x1) - 1
    compile_(s, compiled, net)

    def one():
        rocl.train_step(net, opt, x1, x2, noise, **settings)

    return one


def acl_step(s, variant, compiled):
    settings = named(acl.train_step, acl, "--variant", variant)
    net = acl.network(s.arch, variant).to(s.device)
    opt, (x1, x2) = optim.LARS(net.parameters(), 0.0), views(s)
    noise = 2 * torch.rand(s.batch, 2, 3, 32, 32, device=s.device) - 1
    compile_(s, compiled, net)

    def one():
        acl.train_step(net, opt, x1, x2, noise, **settings)

    return one


def clae_step(s, variant, compiled):
    settings = named(clae.train_step, clae, *variant.split())
    net = clae.network(s.arch).to(s.device)
    opt, (x1, x2) = torch.optim.Adam(net.parameters(), 0.0), views(s)
    noise = 2 * torch.rand_like(x1) - 1
    compile_(s, compiled, net)

    def one():
        clae.train_step(net, opt, x1, x2, noise, **settings)

    return one


def advcl_step(s, variant, compiled):
    args = advcl.parser().parse_args([])
    clusters = args.clusters if variant == "with" else []
    net = advcl.network(s.arch, clusters).to(s.device)
    opt, (x1, x2), (x, _) = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9), views(s), views(s)
    noise = 2 * torch.rand(2, s.batch, 3, 32, 32, device=s.device) - 1
    y = torch.stack([torch.arange(s.batch, device=s.device) % k for k in args.clusters], 1)
    settings = named(advcl.train_step, advcl, clusters=clusters)
    compile_(s, compiled, net["encoder"])

    def one():
        advcl.train_step(net, opt, x1, x2, x, y, noise, **settings)

    return one


def adco_step(s, variant, compiled):
    """The same for AdCo."""
    flags = {"bank": [], "hybrid": ["--eps", "8"]}.get(variant, [f"--{variant}"])
    return bank_step(s, adco, adco.parser().parse_args(flags), compiled)


def caco_step(s, variant, compiled):
    """The same for CaCo."""
    flags = {"cooperative": [], "hybrid": ["--eps", "8"]}[variant]
    return bank_step(s, caco, caco.parser().parse_args(flags), compiled)


def bank_step(s, script, args, compiled):
    net, target = (script.network(s.arch).to(s.device) for _ in range(2))
    target.requires_grad_(False).load_state_dict(net.state_dict())
    bank = script.make_bank(s.bank, 128).to(s.device)
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=args.weight_decay)
    x1, x2 = inputs(s)[2:]
    compile_(s, compiled, net, target)
    settings = named_by(script.train_step, script, args)
    if script is caco:
        inputs_of_step = [x1, x2], [2 * torch.rand_like(x) - 1 for x in (x1, x2)]
    else:
        x_q, x_k = ([x1, x2], [x2, x1]) if args.symmetric else ([x1], [x2])
        order = torch.randperm(s.batch, device=s.device)
        inputs_of_step = x_q, x_k, order, [2 * torch.rand_like(x) - 1 for x in x_q]

    def one():
        script.train_step(net, target, opt, bank, *inputs_of_step, **settings)

    return one


def hardneg_step(s, variant, compiled):
    """The same for hard negatives by rule."""
    args = hardneg.parser().parse_args(variant.split())
    args.hardest = min(args.hardest, s.bank)
    net, target, bank = hardneg.network(s.arch).to(s.device), None, None
    x1, x2 = views(s)
    if args.base == "moco":
        target = copy.deepcopy(net).requires_grad_(False)
        bank = Bank(s.bank, 128).to(s.device)
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=args.weight_decay)
    rng = data.Rng((0, 0, 0), s.batch, slice(None))
    order, numbers = hardneg.random_order(x1, rng), hardneg.mixing_numbers(x1, rng, args, args.mix_from)
    compile_(s, compiled, *([net] if target is None else [net, target]))
    settings = dict(ema=args.ema, hardest_rows=args.hardest, **hardneg.loss_settings(args))

    def one():
        hardneg.train_step(net, target, opt, bank, x1, x2, order, numbers, **settings)

    return one


def flags_of(variant):
    """The flags that `variant` names; in l2 with a radius, which costs nothing."""
    return [*variant.split(), *(["--eps", "128"] if "--norm l2" in variant else [])]


def adv_mae_step(s, variant, compiled):
    args = adv_mae.parser().parse_args(["--arch", VITS[s.arch], *flags_of(variant)])
    net = adv_mae.network(args, 32).to(s.device)
    opt = torch.optim.AdamW(optim.groups(net.named_parameters(), args.weight_decay), 0.0, betas=(0.9, 0.95))
    x, rng = torch.rand(s.batch, 3, 32, 32, device=s.device), data.Rng((0, 0, 0), s.batch, slice(None))
    order, noise = adv_mae.random_numbers(rng, net.encoder, args, s.device)
    compile_(s, compiled, net)

    def one():
        adv_mae.train_step(net, opt, x, order, noise, **named_by(adv_mae.train_step, adv_mae, args))

    return one


def unified_step(s, variant, compiled):
    args = unified.parser().parse_args(["--arch", VITS[s.arch], *variant.split()])
    net = unified.network(args, 32).to(s.device)
    opt = torch.optim.AdamW(optim.groups(net.named_parameters(), args.weight_decay), 0.0, betas=(0.9, 0.95))
    x1, x2 = views(s)
    rng = data.Rng((0, 0, 0), s.batch, slice(None))
    u, noise = unified.random_numbers(rng, net.encoder, args, s.device)
    compile_(s, compiled, net)

    def one():
        unified.train_step(net, opt, x1, x2, u, noise, **named_by(unified.train_step, unified, args))

    return one


def adpe_step(s, variant, compiled):
    args = adpe.parser().parse_args(["--arch", VITS[s.arch], *variant.split()])
    net = adpe.network(args, 32).to(s.device)
    opt = torch.optim.AdamW([p for p in net.parameters() if p is not net.delta], 0.0)
    opt_delta = torch.optim.AdamW([net.delta], 0.0, maximize=True)
    x, rng = torch.rand(s.batch, 3, 32, 32, device=s.device), data.Rng((0, 0, 0), s.batch, slice(None))
    order, start = adpe.random_numbers(rng, net, args, s.device)
    compile_(s, compiled, net)

    def one():
        adpe.train_step(net, opt, opt_delta, x, order, start, **named_by(adpe.train_step, adpe, args))

    return one


def byorl_step(s, variant, compiled):
    args = byorl.parser().parse_args(["--eps", "0"] if variant == "BYOL" else ["--steps", variant.split()[-1]])
    net = byorl.network(s.arch, args.hidden).to(s.device)
    target = copy.deepcopy(net[:2]).requires_grad_(False)
    x1, x2 = inputs(s)[2:]
    opt = optim.LARS(optim.lars_groups(net), 0.0, weight_decay=args.weight_decay)
    noise = 2 * torch.rand(s.batch, 2, 3 * 32 * 32, device=s.device) - 1
    compile_(s, compiled, net, target)

    def one():
        byorl.train_step(net, target, opt, x1, x2, noise, tau=1.0, **byorl.attack_settings(args))

    return one


def adios_step(s, variant, compiled):
    flags = {"SimCLR": ["--masker", "none"], "ADIOS": [], "ADIOS-s": ["--single"]}[variant]
    args = adios.parser().parse_args(flags)
    settings = named_by(adios.train_step, adios, args, tau=1.0)
    net = adios.network(s.arch, args.objective, 32).to(s.device)
    masker = adios.MeanColour() if variant == "SimCLR" else UNet(args.masks, args.mask_width, 32)
    masker = masker.to(s.device)
    x1, x2 = inputs(s)[2:]
    learning = [net] if variant == "SimCLR" else [net, masker]
    opts = [optim.LARS(optim.lars_groups(part), 0.0, trust=0.02, clip=True) for part in learning]
    if variant == "SimCLR":
        opts.append(None)
    pick = torch.rand(s.batch, 2, device=s.device)
    given = x2.new_zeros(s.batch, 1, 32, 32) if variant == "SimCLR" else None
    compile_(s, compiled, net[0], *([] if variant == "SimCLR" else [masker]))

    def one():
        adios.train_step(net, None, masker, *opts, x1, x2, given, pick, **settings)

    return one


def rotnet_step(s, variant, compiled):
    """The same for RotNet; on a ResNet here, as the others."""
    args = rotnet.parser().parse_args(flags_of(variant))
    net = rotnet.network(s.arch, 32, 10 if args.target == "labels" else 4).to(s.device)
    opt = torch.optim.AdamW(optim.groups(net.named_parameters(), args.weight_decay), 0.0, betas=(0.9, 0.95))
    x, _ = views(s)
    y = torch.arange(s.batch, device=s.device) % 4
    noise = rotnet.start_noise(x, args.norm, data.Rng((0, 0, 0), s.batch, slice(None)))
    settings = named_by(rotnet.train_step, rotnet, args)
    compile_(s, compiled, net)

    def one():
        rotnet.train_step(net, opt, x, y, noise, **settings)

    return one


def pretext_step(s, variant, compiled):
    """The same for the pretext tasks, with K = 2."""
    args = pretext.parser().parse_args(["--steps", "2", *variant.split()])
    net = pretext.network(s.arch, args.tasks, args.permutations, args.pool_layers, 0).to(s.device)
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=1e-4)
    rng = data.Rng((0, 0, 0), s.batch, slice(None))
    x = torch.randint(0, 256, (s.batch, 3, 32, 32), dtype=torch.uint8, device=s.device)
    x, targets = pretext.batch_of_tasks(net, x, rng, 32, args, 4, True)
    noise = pretext.start_noise(x, rng, args)
    settings = pretext.step_settings(args)
    compile_(s, compiled, net)

    def one():
        pretext.train_step(net, opt, x, targets, noise, **settings)

    return one


VIEWS = {  # which launch nothing
    "view", "_unsafe_view", "_reshape_alias", "reshape", "expand", "permute", "transpose", "t", "select", "slice", "split",
    "split_with_sizes", "unbind", "unsqueeze", "squeeze", "alias", "detach", "as_strided", "diagonal", "lift_fresh",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types",
    "_local_scalar_dense",  # of AdamW's step number, which lies on the CPU
}


class Operations(TorchDispatchMode):
    """Counts tensor operations, and those outside of `pgd`."""

    total = outside = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._overloadpacket.__name__ not in VIEWS:
            self.total += 1
            self.outside += not Kept.pixels_only
        return op(*args, **(kwargs or {}))


def operations(s, script, variant):
    """Of one step, by optimizers that treat all tensors at once, as on a GPU: all, and those outside the attack."""
    small = s._replace(device=torch.device("cpu"), batch=8, bank=min(s.bank, 2048), flush=None)
    autocast = unittest.mock.patch.object(run, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    with contextlib.ExitStack() as stack, autocast:
        for name in ("sgd", "adam"):  # AdamW's step is Adam's
            module = importlib.import_module(f"torch.optim.{name}")
            stack.enter_context(unittest.mock.patch.object(
                module, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)))
        one = globals()[f"{script}_step"](small, variant, False)
        if not s.quick:
            one()  # the optimizer's state
        with Operations() as counter:
            one()
    return counter.total, counter.outside


def step(s):
    for script in s.scripts:
        variants = SCRIPTS[script]
        steps, flops, mib, count = {}, {}, {}, {}
        more = [f"{COMPILED[script]}, {how}" for how in ("compiled", "graph", "compiled, graph")]
        if script not in scripts_with("graph"):
            more = more[:1]
        for name in variants if s.flush is None or s.quick else (*variants, *more):
            variant, before = name.split(",")[0], allocated(s)
            how = name.split(",")[1:]
            one = globals()[f"{script}_step"](s, variant, " compiled" in how)
            steps[name] = one = functools.partial(with_graphs, s, " graph" in how, one)
            if not how:
                with Flops() as counter:
                    one()
                count[name] = operations(s, script, variant)
            flops[name] = flops[variant] if how else counter.total
            if s.flush is not None:
                one(), one()  # the optimizer's state, cuDNN's choices
            mib[name] = peak(s, one, above=before)
        budget = 30 if s.flush is None else 10  # a GPU's times vary less
        t, base = race(s, steps, budget), variants[0]
        flags = globals()[script].parser().parse_args([])
        arch = VITS[s.arch] if flags.arch.startswith("vit") and script != "rotnet" else s.arch
        bank = f", bank {s.bank}" if hasattr(flags, "bank_size") else ""
        once = forward_flops(s, arch)
        table(f"step: {script}, {arch}, batch {s.batch}{bank}",
              ["", "ms", "images/s", "passes", "GFLOP", "TFLOP/s", "operations", "outside attack", "peak MiB",
               f"time / {base}"],
              [[name, 1e3 * t[name], s.batch / t[name], flops[name] / once, flops[name] / 1e9,
                flops[name] / 1e12 / t[name], *count.get(name, (None, None)), mib[name], t[name] / t[base]]
               for name in steps])


class Passes:
    """Counts images that pass through the encoder of a step, forward and backward. The masked autoencoders, whose
    decoder sees what their encoder does, count as a whole.

    A backward pass goes to the pixels alone, or, where the first weight of the encoder gets a gradient, to the
    weights.
    """

    def __init__(self, kinds):
        self.kinds = kinds
        self.forwards = self.to_pixels = self.to_weights = 0
        self.pending = 0  # of the backward pass that goes on, or was the last
        self.hooks = []
        self.known = set()

    def __enter__(self):
        self.hooks.append(torch.nn.modules.module.register_module_forward_hook(self.note_forward))
        return self

    def __exit__(self, *_):
        self.settle()
        for hook in self.hooks:
            hook.remove()

    def settle(self):
        """A backward pass that has not reached the weights by now went to the pixels."""
        self.to_pixels += self.pending
        self.pending = 0

    def note_forward(self, module, inputs, output):
        if not isinstance(module, self.kinds):
            return
        self.settle()
        self.forwards += len(inputs[0])
        first = next((w for w in module.parameters() if w.requires_grad and w.dim() > 1), None)
        if first is not None and id(first) not in self.known:
            self.known.add(id(first))
            self.hooks.append(first.register_hook(self.note_weights))
        if output.requires_grad:
            output.register_hook(self.note_backward)

    def note_backward(self, g):
        self.pending += len(g)

    def note_weights(self, g):
        self.to_weights += self.pending
        self.pending = 0


KINDS = (resnet.ResNet, resnet.PreActResNet, vit.ViT, adv_mae.MAE, adpe.MAEPlus)


def count_passes(script, variant, batch=8):
    """The batches that pass through the encoder in one step: forward, backward to the pixels, and to the
    weights."""
    small = Setting(torch.device("cpu"), "slim", batch, 64, True, None)
    one = globals()[f"{script}_step"](small, variant, False)
    with Passes(KINDS) as found:
        one()
    return found.forwards / batch, found.to_pixels / batch, found.to_weights / batch


def cost(forwards, to_pixels, to_weights):
    """In forward passes, as the scripts count: a backward pass to the pixels as one, a whole one as two."""
    return forwards + to_pixels + 2 * to_weights


# Selfie's patches, and the views of unified.py, pass through parts of the encoder.
UNCOUNTED = ("--tasks selfie", "--lam 0", "--lam 0.1", "--attack none", "--attack joint", "--con-weight 0")


def passes(s):
    lines = []
    for script in dict.fromkeys(["amoc", "adco", "caco", *SCRIPTS]):  # the banks beside MoCo, amoc CCC
        counts = {v: count_passes(script, v) for v in SCRIPTS[script] if v not in UNCOUNTED}
        for variant, found in counts.items():
            base = cost(*counts[SCRIPTS[script][0]])
            numbers = [f"{v:g}" for v in (*found, cost(*found))]
            lines.append([f"{script} {variant}", *numbers, cost(*found) / base])
    table("passes: batches through the encoder per step; a backward pass to the weights counts two",
          ["", "forward", "to pixels", "to weights", "in forward passes", "over the first"], lines)


def with_graphs(s, on, one):
    """A step with or without --graph. Steps of both kinds take turns, so it is switched by hand."""
    speed._share, before = s.batch if on else None, speed._share
    one()
    speed._share = before


def forward_flops(s, arch):
    """Of a forward pass of the encoder on a batch."""
    x = torch.rand(s.batch, 3, 32, 32, device=s.device)
    net = encoders.make(arch).to(s.device)
    with Flops() as counter, torch.no_grad():
        net(x)
    return counter.total


class Counted(torch.nn.Module):
    """`net`, counting forward passes of images: a backward to the input counts as one, a backward to the
    weights as another."""

    def __init__(self, net):
        super().__init__()
        self.net, self.units = net, 0
        next(net.parameters()).register_hook(lambda g: self.add(self.images))

    def add(self, images):
        self.units += images

    def forward(self, x):
        self.images = len(x)
        self.add(len(x))
        if x.requires_grad:
            x.register_hook(lambda g: self.add(len(g)))
        return self.net(x)


def robust_classifier(s):
    """Eval mode, contiguous weights; trained on shapes against PGD-2 at 4/255 for two epochs."""
    encoder = encoders.make("slim" if s.flush is None else s.arch)
    net = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.dim, 10)).to(s.device)
    opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    images = data.load("shapes", device=s.device, limit=128 if s.quick else None)
    for epoch in range(1 if s.quick else 2):
        for x, y, _ in data.batches(images, 64, 0, epoch):
            x = to_float(x)
            with eval_mode(net):
                x = pgd(lambda v, y=y: F.cross_entropy(net(v), y), x, 4 / 255, 3 / 255, 2)
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
    return net.eval()


def autoattack(s):
    try:
        import pyautoattack
    except ImportError:
        pyautoattack = None
    net, eps = robust_classifier(s), 8 / 255
    n = 4 if s.quick else 64 if s.flush is None else 1000
    x = to_float(data.load("shapes", split="test", device=s.device, limit=n).x)
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        net(last)
        y = net(x).argmax(1)  # its own answers: every image is worth an attack
    stages = ("apgd-ce",) if s.quick else aa.VERSIONS["standard"]

    def ours(x, **options):
        adv, report = aa.autoattack(net, x, y, eps, version=stages, **options)
        return adv, sum(stage["forwards"] + stage["backwards"] for stage in report["stages"].values())

    def unfolded(x):
        with unittest.mock.patch.object(resnet, "conv_norm", lambda conv, norm, x: norm(conv(x))):
            return ours(x)

    def theirs(x):
        counted = Counted(net)
        attack = pyautoattack.AutoAttack(counted, norm="Linf", eps=eps, seed=0, device=str(s.device))
        attack.attacks_to_run = list(stages)
        out = attack.run_standard_evaluation(x, y, batch_size=250)
        net.zero_grad(set_to_none=True)
        return out[0] if isinstance(out, tuple) else out, counted.units

    rivals = {"ours": lambda: ours(x), "ours, not folded": lambda: unfolded(x),
              "ours, channels last": lambda: ours(last),
              "ours, channels last, bf16 search": lambda: ours(last, fast=True)}
    if pyautoattack:
        rivals = {"pyautoattack": lambda: theirs(x), **rivals}
    lines, standing = [], {}
    for name, f in rivals.items():
        out = []
        began = time.process_time()
        t = seconds(s, lambda f=f: out.append(f()))
        t = time.process_time() - began if s.flush is None else t  # minutes: others may want the CPU as well
        (adv, units), = out
        with torch.no_grad():
            standing[name] = net(adv).argmax(1) == y
        first = next(iter(standing))
        lines.append([name, str(int(standing[name].sum())), int((standing[name] != standing[first]).sum()), t,
                      units, lines[0][3] / t if lines else 1.0, lines[0][4] / units if lines else 1.0])
    table(f"autoattack: {'+'.join(stages)}, linf 8/255, {n} images, one reading",
          ["", "standing", "judged otherwise", "CPU s" if s.flush is None else "s", "forward units",
           "speed-up", "fewer units"], lines)


SECTIONS = {"autoattack": autoattack, "augment": augment, "attack": attack, "bank": bank, "step": step, "passes": passes}


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sections", nargs="*", help=f"of {' '.join(SECTIONS)}; default: all")
    p.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="script",
                   help="of which `step` times the steps; default: all")
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
    s = Setting(device, *size, args.quick, flush, tuple(args.scripts))
    threads = f", {torch.get_num_threads()} CPU threads" if cuda else ""
    print(f"{header(args, run.Env(device, 0, 1))['device']}{threads}; torch {torch.__version__}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](s)


if __name__ == "__main__":
    run.cli(main)
