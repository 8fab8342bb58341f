"""What a GPU would refuse, or wait for, found without one: each script runs an epoch on the device "meta", whose
tensors hold no numbers, in place of "cuda".

There the host cannot ask a tensor for a number, for which on a GPU it would have to wait; a mode looks at each
operation for what else a GPU does not do, or does not do at once."""
import contextlib
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import amoc
from common import data, encoders, run
from tests.scripts import SCRIPTS, TINY

META = torch.device("meta")
VARIANTS = [
    *(("amoc", f"--variant {variant}") for variant in ("ACA", "AAC", "CAC")),
    ("amoc", "--norm l2 --eps 128"),
    ("rocl", "--asymmetry 0.2 --hard"),
    ("clae", "--random"),
    ("adco", "--symmetric --eps 8 --clean-weight 0.5"),
    ("adco", "--multi-crop"),
    ("caco", "--eps 8 --cooperation -1"),
    ("hardneg", "--negatives ifm"),
    ("hardneg", "--negatives hcl --base simclr"),
    ("adpe", "--position absolute"),
    ("unified", "--share"),
    ("adios", "--single --objective byol"),
    ("rotnet", "--target labels --loss trades"),
    ("pretext", "--lam 0.1"),
]
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
SIZED_BY_NUMBERS = ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount")


class Watched(TorchDispatchMode):
    """Raises where tensors of two devices meet in an operation, and, within a step, where the host waits: where
    it asks a tensor for a number, or copies one in a way that waits. Elsewhere it gets numbers of ours."""

    in_step = False

    def step(self, args, env, state, step):
        """In place of `run.stop_if_signalled`. The first step of an epoch may set things up."""
        self.in_step = step % 3 > 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op._overloadpacket.__name__
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        places = {v.device for v in tensors if v.dim()}
        if name in SIZED_BY_NUMBERS or name in INDEXING and any(v.dtype == torch.bool for v in tensors[1:]):
            if META in places:
                self.wait(f"the shape of what {name} gives depends on numbers")
                return args[0]  # what "meta" refuses
        if name == "_local_scalar_dense" and META in places | {tensors[0].device}:
            self.wait("the host asks for a number")
            return False if tensors[0].dtype == torch.bool else 1
        if name in COPIES:
            source, target = copied(name, args, kwargs)
            if META in (source, target) and source != target:
                if target != META or not kwargs.get("non_blocking", False):
                    self.wait(f"a copy from {source} to {target}")
                if target != META:
                    return torch.rand(args[0].shape).to(kwargs.get("dtype") or args[0].dtype)
        elif len(places) > 1:
            raise RuntimeError(f"{name} of tensors on two devices: {[(v.shape, v.device) for v in tensors]}")
        return op(*args, **kwargs)

    def wait(self, what):
        if self.in_step:
            raise RuntimeError(f"a step waits: {what}")


def copied(name, args, kwargs):
    """From which device, and to which."""
    if name == "copy_":
        return args[1].device, args[0].device
    return args[0].device, torch.device(kwargs.get("device") or args[0].device)


class NoLog:
    """In place of `log.Log`, which waits for numbers at the end of an epoch, as it should."""

    def __init__(self, watched):
        self.watched, self.steps, self.data = watched, [], {}

    def check(self):
        pass

    def mean(self, name):
        return 0.5

    def start(self, *_):
        pass

    def step(self, step, images, **losses):
        self.steps.append(losses)
        if step % 3 == 2:  # what is measured after the last step may wait
            self.watched.in_step = False

    def epoch(self, *_, **__):
        pass


@pytest.fixture
def on_meta(monkeypatch):
    """Runs a script on "meta", watched; gives back the losses of its steps."""
    watched = Watched()

    def main(script, flags):
        module, log = importlib.import_module(script), NoLog(watched)
        monkeypatch.setattr(module, "Log", lambda *_: log)
        monkeypatch.setattr(module, "save_rows", lambda *_, **__: None)
        with watched:
            module.main([*TINY, *SCRIPTS[script], *flags.split()])
        return log.steps

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # "meta" has none
    monkeypatch.setattr(run, "stop_if_signalled", watched.step)

    step = data.Rng._on
    for name in ("resume", "save"):
        monkeypatch.setattr(run, name, lambda *_, **__: 0)
    monkeypatch.setattr(run, "setup", lambda args: run.Env(META, 0, 1))
    monkeypatch.setattr(encoders, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device == META), raising=False)
    monkeypatch.setattr(data.Rng, "_on", lambda rng, device: step(rng, device) if device == "cpu" else None)
    images = data.Images(torch.empty(44, 3, 32, 32, dtype=torch.uint8, device=META),
                         torch.empty(44, dtype=torch.long, device=META), 4)
    monkeypatch.setattr(data, "load", lambda *_, **__: images)
    monkeypatch.setenv("BANK_OP", "torch")
    return main


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_epoch_stays_on_the_device_and_its_steps_wait_for_nothing(script, on_meta):
    losses = on_meta(script, "--epochs 1")
    assert len(losses) == 3
    assert all(loss.device == META for step in losses for loss in step.values())


@pytest.mark.parametrize("script, flags", VARIANTS)
def test_a_step_of_a_variant_stays_there_too(script, flags, on_meta, monkeypatch):
    class Enough(Exception):
        pass

    def step(log, number, images, **losses):
        if number == 1:
            raise Enough

    monkeypatch.setattr(NoLog, "step", step)
    with pytest.raises(Enough):
        on_meta(script, flags)


@pytest.mark.parametrize("fault, message", [
    ("x1 = x1 + torch.zeros(len(x1), 1, 1, 1)", "two devices"),
    ("x1 = x1 * torch.ones(len(x1)).to(x1.device)[:, None, None, None]", "waits: a copy from cpu to meta"),
    ("if x1.mean() > 2: x1 = x2", "waits: the host asks for a number"),
    ("x1 = x1[x1.mean((1, 2, 3)) > -1]", "waits: the shape of what index gives"),
    ("x1 = x1 + x2.mean().cpu()", "waits: a copy from meta to cpu"),
])
def test_what_a_gpu_refuses_or_waits_for_is_found(fault, message, on_meta, monkeypatch):
    def step(net, target, opt, bank_clean, bank_adv, x1, x2, noise, **settings):
        scope = dict(x1=x1, x2=x2, torch=torch)
        exec(fault, scope)
        return {"loss": scope["x1"].mean()}

    monkeypatch.setattr(amoc, "train_step", step)
    with pytest.raises(RuntimeError, match=message):
        on_meta("amoc", "")
