"""What surrounds the losses: optimizers and their rates, momentum, noise, order, attacks, banks, the log.

Each `main` runs eight steps (four epochs of two) on 32 small images, with numbers of its flags that are
nobody's default, and its `train_step` is watched. What it is given is compared with tables typed by hand
from the papers and the authors' code, never with what the script itself computes.
"""
import contextlib
import copy
import functools
import importlib
import inspect
import io
import json
import math
import signal
import types

import numpy as np
import pytest
import torch
from torch import nn

from common import data, encoders, log, optim, run
from common.bank import Bank
from common.resnet import BranchNorm
from common.pgd import pgd
from common.vit import patchify
from tests.scripts import SCRIPTS
from tests.steps import first_step

N, BATCH, SIDE, EPOCHS, STEPS = 32, 16, 16, 4, 8
SMALL = "--arch slim --batch-size 16 --epochs 4 --save-every 3 --device cpu --seed 5"
AMOC = ("--lr 0.31 --weight-decay 0.002 --warmup 2 --ema 0.6 --bank-size 48 --lam 0.25 --temperature 0.3 "
        "--eps 6 --step-size 3 --steps 2")
ADCO = ("--lr 0.11 --lr-final 0.02 --warmup 2 --weight-decay 0.003 --ema 0.6 --bank-size 40 --fill-steps 3 "
        "--bank-lr 0.23 --bank-momentum 0.7 --bank-decay 0.004 --temperature 0.3 --bank-temperature 0.2")
CACO = ("--lr 0.11 --lr-final 0.02 --warmup 1 --weight-decay 0.003 --ema 0.6 --bank-size 40 --fill-steps 3 "
        "--bank-lr 0.23 --bank-warmup 2 --bank-momentum 0.7 --temperature 0.1 --fill-temperature 0.3 "
        "--dim 24 --cooperation -0.25")
HARDNEG = ("--lr 0.11 --lr-final 0.02 --warmup 2 --weight-decay 0.003 --ema 0.6 --bank-size 40 --hardest 8 --mix 6 --mix-query 4 "
           "--mix-from 1 --shift 0.15 --alpha 0.7 --beta 0.8 --tau 0.2")
BYORL = "--lr 0.9 --weight-decay 0.003 --warmup 2 --ema 0.6 --hidden 40"
ADV_MAE = "--arch vit_slim --decoder 16 1 2 --lr 0.004 --weight-decay 0.03 --warmup 2"
ADPE = ADV_MAE + " --adv-lr 0.006 --radius 0.4"
ROTNET = "--lr 0.004 --weight-decay 0.03 --warmup 2 --eps 6 --steps 2"
ADIOS = "--lr 0.4 --mask-lr 0.05 --weight-decay 0.003 --warmup 2 --masks 2 --mask-width 8 --ema 0.6"

CASES = {  # the script, and flags besides SMALL
    "amoc": ("amoc", AMOC),
    "amoc CCC": ("amoc", AMOC + " --variant CCC"),
    "amoc CCA": ("amoc", AMOC + " --variant CCA"),
    "amoc CAA": ("amoc", AMOC + " --variant CAA"),
    "amoc AAC": ("amoc", AMOC + " --variant AAC"),
    "amoc l2": ("amoc", AMOC + " --variant AAC --norm l2 --eps 90 --step-size 40"),
    "clae": ("clae", "--lr 0.02 --lr-final 0.005 --weight-decay 0.003 --temperature 0.3 --alpha 0.7 --eps 6"),
    "clae random": ("clae", "--lr 0.02 --lr-final 0.005 --eps 6 --random"),
    "rocl": ("rocl", "--lr 0.7 --weight-decay 0.003 --warmup 2 --eps 6 --step-size 3 --steps 2 --temperature 0.3 "
                     "--reg-weight 0.1 --regularize-to original"),
    "rocl l2": ("rocl", "--lr 0.7 --weight-decay 0.003 --warmup 2 --optimizer adamw --norm l2 --eps 90 --steps 2 "
                        "--attack-to original --asymmetry 0.3 --hard"),
    "acl": ("acl", "--lr 2.1 --weight-decay 0.003 --warmup 2 --eps 6 --step-size 3 --steps 2"),
    "acl l2": ("acl", "--lr 2.1 --weight-decay 0.003 --warmup 2 --norm l2 --eps 90 --steps 2"),
    "acl s2s": ("acl", "--variant s2s --lr 2.1 --weight-decay 0.003 --warmup 2 --temperature 0.3"),
    "advcl": ("advcl", "--lr 0.37 --weight-decay 0.002 --warmup 2 --eps 6 --step-size 3 --steps 2 --temperature 0.3"),
    "advcl l2": ("advcl", "--lr 0.37 --weight-decay 0.002 --warmup 2 --norm l2 --eps 90 --steps 2 "
                          "--views x1+d x+d xh"),
    "advcl teacher": ("advcl", "--lr 0.37 --weight-decay 0.002 --warmup 2 --eps 6 --step-size 3 --steps 2 "
                               "--clusters 2 5 --views x1+d x2+d xl --cutoff 3 --cluster-weight 0.4"),
    "adco": ("adco", ADCO + " --stem cifar"),
    "adco hybrid": ("adco", ADCO + " --eps 6 --step-size 3 --steps 2 --symmetric --batch-negatives --blur"),
    "adco multi-crop": ("adco", ADCO + " --multi-crop"),
    "adco both": ("adco", ADCO + " --eps 6 --step-size 3 --steps 2 --clean-weight 0.3"),
    "adco l2": ("adco", ADCO + " --norm l2 --eps 90 --steps 2 --optimizer adamw"),
    "caco": ("caco", CACO + " --stem cifar"),
    "caco lars": ("caco", CACO + " --optimizer lars --multi-crop"),
    "caco hybrid": ("caco", CACO + " --eps 6 --step-size 3 --steps 2 --optimizer adamw --blur"),
    "caco l2": ("caco", CACO + " --norm l2 --eps 90 --steps 2 --multi-crop"),
    "hardneg": ("hardneg", HARDNEG + " --stem cifar"),
    "hardneg ifm": ("hardneg", HARDNEG + " --negatives ifm --ifm-only --temperature 0.3"),
    "hardneg simclr": ("hardneg", HARDNEG + " --negatives hcl --base simclr --blur"),
    "byorl": ("byorl", BYORL + " --eps 6 --steps 2"),
    "byorl l2": ("byorl", BYORL + " --norm l2 --eps 90 --step-size 40 --steps 1"),
    "byorl clean": ("byorl", BYORL + " --eps 0"),
    "adv_mae": ("adv_mae", ADV_MAE + " --eps 6 --steps 2"),
    "adv_mae l2": ("adv_mae", ADV_MAE + " --norm l2 --eps 90 --step-size 40 --steps 2 --clean-weight 0.3 "
                               "--mask-ratio 0.5 --no-norm-pix"),
    "adv_mae fgsm": ("adv_mae", ADV_MAE + " --eps 6 --steps 1 --no-random-start"),
    "unified": ("unified", ADV_MAE + " --eps 6 --steps 2 --lam 0.7 --con-weight 1.3 --temperature 0.3"),
    "unified l2": ("unified", ADV_MAE + " --attack con --norm l2 --eps 90 --step-size 40 --steps 3 --mask-ratio 0.5 "
                              "--no-norm-pix"),
    "unified clean": ("unified", ADV_MAE + " --attack none --share"),
    "adpe": ("adpe", ADPE),
    "adpe pgd": ("adpe", ADPE + " --adversary pgd --steps 2 --crops 2 --mask-ratio 0.5"),
    "adpe pgd l2": ("adpe", ADPE + " --adversary pgd --norm l2 --step-size 0.3 --steps 1 --min-scale 0.5"),
    "adios": ("adios", ADIOS + " --temperature 0.3"),
    "adios byol": ("adios", ADIOS + " --objective byol"),
    "adios one mask": ("adios", ADIOS + " --masks 1 --mask-weight 0.4"),
    "adios random": ("adios", ADIOS + " --masker random"),
    "adios none": ("adios", ADIOS + " --masker none --single"),
    "rotnet": ("rotnet", ROTNET + " --smoothing 0.1 --drop-path 0.3"),
    "rotnet trades": ("rotnet", "--lr 0.004 --weight-decay 0.03 --warmup 2 --target labels --loss trades --beta 2 "
                                "--norm l2 --eps 90 --step-size 40 --steps 3 --optimizer sgd"),
    "rotnet clean": ("rotnet", ROTNET + " --eps 0 --no-random-start --jitter 0 --milestones 3 --crop resized"),
}
WHOLE_TARGETS = ("amoc", "adco", "caco", "hardneg")  # the target is a copy of the whole network
every_case = pytest.mark.parametrize("case", CASES)


def cases_of(*scripts):
    return pytest.mark.parametrize("case", [case for case, (script, _) in CASES.items() if script in scripts])


# ----------------------------------------------------------------------------------------------------------
# The runs, watched
# ----------------------------------------------------------------------------------------------------------
def images():
    """32 noisy images of different brightness, in no order: (32, 16, 16, 3) bytes."""
    rng = np.random.default_rng(0)
    level = 30 + 3 * rng.permutation(N)
    return (level[:, None, None, None] + rng.integers(-25, 26, (N, SIDE, SIDE, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The record of a case's run, made once."""
    folder = tmp_path_factory.mktemp("wiring")
    x = images()
    y = np.arange(N)
    np.savez(folder / "images.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    torch.manual_seed(0)
    encoders.export(encoders.make("slim"), folder / "teacher.pt", image_size=SIDE)

    @functools.cache
    def record_of(case):
        script, flags = CASES[case]
        out = folder / case.replace(" ", "-")
        words = [*SMALL.split(), *flags.split(), "--data", str(folder / "images.npz"), "--out", str(out)]
        if case == "advcl teacher":
            words += ["--teacher", str(folder / "teacher.pt")]
        handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            record = watch(importlib.import_module(script), patch)
            importlib.import_module(script).main(words)
        for number, handler in handlers:
            signal.signal(number, handler)
        record.out, record.printed = out, printed.getvalue()
        record.lines = [json.loads(line) for line in open(out / "log.jsonl")]
        return record

    return record_of


def named(function, *args, **kwargs):
    """The arguments of a call, by name, defaults too."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return types.SimpleNamespace(**bound.arguments)


def kept(value):
    """Tensors, and lists of them, as they are now."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [kept(part) for part in value] if isinstance(value, list) else value


def flat(net):
    return torch.cat([w.detach().flatten() for w in net.parameters()])


def same_weights(a, b):
    """Two networks have equal parameters, in tensors of their own."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].data_ptr() != b[key].data_ptr() for key in a)


def modes(*nets):
    """How the BatchNorms of `nets` stand: a set of (training, track_running_stats)."""
    norms = [m for net in nets for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {(m.training, m.track_running_stats) for m in norms}


def watch(module, patch):
    """Let `module` leave a record of what its main does."""
    record = types.SimpleNamespace(steps=[], epochs=[], saves=[], pushes=[], spreads=[], fill=None)
    record.module = module
    record.first_weights = {}
    now = types.SimpleNamespace(step=None, fill=None, augmented=[])
    train_step, augment = module.train_step, module.augment
    batches, save, push = data.batches, run.save, Bank.push

    def note_first_weights(net):
        if not record.first_weights:
            found = {name.replace("encoder.", "0.", 1): kept(w) for name, w in net.named_parameters()}
            record.first_weights = found

    record.note_first_weights = note_first_weights

    def watched_step(*args, **kwargs):
        given = vars(named(train_step, *args, **kwargs))
        step = types.SimpleNamespace(given={name: kept(value) for name, value in given.items()}, attacks=[])
        step.nets = {name: value for name, value in given.items() if isinstance(value, nn.Module)}
        step.views, step.augmented = views_of(given), now.augmented
        now.augmented = []
        step.rates = {name: [group["lr"] for group in value.param_groups] for name, value in given.items()
                      if isinstance(value, torch.optim.Optimizer)}
        step.training = all(m.training for net in step.nets.values() for m in net.modules())
        note_first_weights(given["net"])
        step.before = {name: flat(net) for name, net in step.nets.items() if name in ("net", "target")}
        if not record.steps:
            step.groups = {name: [dict(group) for group in given[name].param_groups] for name in step.rates}
            if isinstance(given.get("target"), nn.Module):
                part = given["net"] if script_of(module) in WHOLE_TARGETS else given["net"][:2]
                step.target_is_a_copy = same_weights(given["target"], part)
                step.target_asks = any(w.requires_grad for w in given["target"].parameters())
            banks = {name: net for name, net in step.nets.items() if isinstance(net, Bank)}
            step.banks = copy.deepcopy(banks)
            step.velocities = [kept(bank.velocity) for bank in banks.values() if hasattr(bank, "velocity")]
        now.step = step
        losses = train_step(*args, **kwargs)
        now.step = None
        step.after = {name: flat(net) for name, net in step.nets.items() if name in ("net", "target")}
        step.loss = losses["loss"].item()
        record.steps.append(step)
        return losses

    def watched_augment(*args, **kwargs):
        call = named(augment, *args, **kwargs)
        if len(call.x) == BATCH and now.fill is None:  # not for a picture
            now.augmented.append(vars(call))
        return augment(*args, **kwargs)

    def watched_pgd(*args, **kwargs):
        call = named(pgd, *args, **kwargs)
        loss_fn, call.modes, call.calls = call.loss_fn, set(), 0

        def loss(x):
            nets = [net for name, net in now.step.nets.items() if name in ("net", "target")]
            call.modes |= modes(*(nets if script_of(module) == "amoc" else nets[:1]))
            call.calls += 1
            return loss_fn(x)

        if now.step is None:
            return pgd(*args, **kwargs)
        options = {name: getattr(call, name) for name in inspect.signature(pgd).parameters}
        found = pgd(**{**options, "loss_fn": loss})
        call.x, call.start, call.found = kept(call.x), kept(call.start), kept(found)
        now.step.attacks.append(call)
        return found

    def watched_batches(images, batch_size, seed, epoch, *more, **others):
        pass_ = types.SimpleNamespace(batch_size=batch_size, seed=seed, epoch=epoch, x=[])
        record.epochs.append(pass_)
        for x, y, rng in batches(images, batch_size, seed, epoch, *more, **others):
            pass_.x.append(x.clone())
            yield x, y, rng

    def watched_save(args, env, state, step):
        record.saves.append(step)
        save(args, env, state, step)

    def watched_push(bank, keys):
        settled = now.fill is not None and same_weights(now.fill.net, now.fill.target)
        in_fill = now.fill is not None
        record.pushes.append(types.SimpleNamespace(keys=kept(keys), in_fill=in_fill, settled=settled))
        push(bank, keys)

    patch.setattr(module, "train_step", watched_step)
    patch.setattr(module, "augment", watched_augment)
    patch.setattr(data, "batches", watched_batches)
    patch.setattr(run, "save", watched_save)
    patch.setattr(Bank, "push", watched_push)
    if hasattr(module, "pgd"):
        patch.setattr(module, "pgd", watched_pgd)
    if hasattr(module, "fill"):
        watch_banks(module, patch, record, now)
    watch_spread(module, patch, record)
    return record


def watch_banks(module, patch, record, now):
    fill, bank_step, ema, logsumexp = module.fill, module.bank_step, optim.ema, module.bank_logsumexp
    record.bank_steps = []

    def watched_fill(*args, **kwargs):
        call = named(fill, *args, **kwargs)
        call.rate = [group["lr"] for group in call.opt.param_groups]
        record.note_first_weights(call.net)
        call.noise, call.weights, call.ema, call.temperatures = kept(call.bank.rows), flat(call.net), [], []
        now.fill = call
        fill(*args, **kwargs)
        now.fill = None
        call.settled = same_weights(call.net, call.target)
        call.moved = (flat(call.net) - call.weights).norm()
        call.pointer, call.rows = call.bank.pointer, kept(call.bank.rows)
        call.momenta = len(call.opt.state_dict()["state"])
        record.fill = call

    def watched_bank_step(*args, **kwargs):
        record.bank_steps.append(named(bank_step, *args, **kwargs))
        return bank_step(*args, **kwargs)

    def watched_ema(target, net, m):
        if now.fill is not None:
            now.fill.ema.append(m)
        ema(target, net, m)

    def watched_logsumexp(q, bank, temperature):
        if now.fill is not None:
            now.fill.temperatures.append(temperature)
        return logsumexp(q, bank, temperature)

    patch.setattr(module, "fill", watched_fill)
    patch.setattr(module, "bank_step", watched_bank_step)
    patch.setattr(module, "bank_logsumexp", watched_logsumexp)
    patch.setattr(optim, "ema", watched_ema)


def watch_spread(module, patch, record):
    check_spread = log.check_spread

    def watched_spread(z, args):
        net = copy.deepcopy(record.steps[-1].nets["net"][:2]).eval()
        record.spreads.append((kept(z), net))
        return check_spread(z, args)

    patch.setattr(module, "check_spread", watched_spread, raising=False)


def script_of(module):
    return module.__name__


VIEWS = {  # the images that train_step is given
    "amoc": "x1 x2", "rocl": "x1 x2", "acl": "x1 x2", "advcl": "x1 x2 x", "clae": "x1 x2", "adco": "x_q x_k", "caco": "x",
    "hardneg": "x1 x2", "byorl": "x1 x2", "adv_mae": "x", "unified": "x1 x2", "adpe": "x", "adios": "x1 x2",
    "rotnet": "x"}


def views_of(given):
    """The views among the arguments, each object once: adco's two lists share theirs."""
    names = ["x1", "x2", "x", "x_q", "x_k"]
    found = []
    for name in names:
        value = given.get(name)
        for view in value if isinstance(value, list) else [value]:
            if view is not None and not any(view is other for other in found):
                found.append(view)
    return [view.detach().clone() for view in found]


# ----------------------------------------------------------------------------------------------------------
# Learning rates
# ----------------------------------------------------------------------------------------------------------
def fall(progress):
    """Half a cosine, from 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def by_epoch(*rates):
    return [rate for rate in rates for _ in range(STEPS // EPOCHS)]


def advcl_c(epochs):
    return 0.37 / 1000 + (0.37 - 0.37 / 1000) * fall(epochs / 4)


def mae_rates(peak):
    """MAE's: at the fractional epoch, from 0 over the warm-up, then a cosine to 0."""
    return [peak * min(s / 4, 1) * fall(max(0, s - 4) / 4) for s in range(STEPS)]


RATES = {  # of each of the eight steps; two epochs, or four steps, are warm-up (of CaCo's network one epoch)
    ("amoc", "opt"): by_epoch(0.31 * 0.001, 0.31 / 2, 0.31, 0.31 * fall(1 / 2)),
    ("rocl", "opt"): by_epoch(0.7 / 15 * (1 + 14 / 2), 0.7 / 15 * (1 + 14), 0.7, 0.7 * fall(1 / 4)),
    ("clae", "opt"): by_epoch(*(0.005 + (0.02 - 0.005) * fall(e / 4) for e in range(EPOCHS))),
    ("acl", "opt"): [2.1 * s / 4 for s in (1, 2, 3, 4)]
    + [1e-6 + (2.1 - 1e-6) * fall(s / 4) for s in (1, 2, 3, 4)],
    ("advcl", "opt"): [0.37 / 50 + (advcl_c(2) - 0.37 / 50) * s / 4 for s in (0, 1, 2, 3)]
    + [advcl_c(3), advcl_c(3), advcl_c(4), advcl_c(4)],
    ("adco", "opt"): by_epoch(0.11 / 2, 0.11, *(0.02 + (0.11 - 0.02) * fall(e / 2) for e in range(2))),
    ("caco", "opt"): by_epoch(0.11, *(0.02 + (0.11 - 0.02) * fall(e / 3) for e in range(3))),
    ("hardneg", "opt"): by_epoch(0.11 / 2, 0.11, *(0.02 + (0.11 - 0.02) * fall(e / 2) for e in range(2))),
    ("byorl", "opt"): [0, 0.9 / 4, 0.9 / 2, 0.9 * 3 / 4] + [0.9 * fall(s / 4) for s in range(4)],
    ("adv_mae", "opt"): mae_rates(0.004),
    ("unified", "opt"): mae_rates(0.004),
    ("adpe", "opt"): mae_rates(0.004),
    ("adpe", "opt_delta"): mae_rates(0.006),
    ("adios", "opt"): by_epoch(0.003, (0.003 + 0.4) / 2, 0.4, 0.4 * fall(1 / 2)),
    ("adios", "opt_mask"): by_epoch(0.003, (0.003 + 0.05) / 2, 0.05, 0.05 * fall(1 / 2)),
    ("rotnet", "opt"): mae_rates(0.004),
    ("rotnet clean", "opt"): [0.004 * min(s / 4, 1) for s in range(6)] + [0.0004] * 2,  # --milestones 3
}


def rates_of(case, name):
    """The rates of the optimizer `name` in each step of a case."""
    return RATES.get((case, name)) or RATES[CASES[case][0], name]


@every_case
def test_every_step_has_its_learning_rate(case, watched):
    script, _ = CASES[case]
    steps = watched(case).steps
    assert len(steps) == STEPS
    assert set(steps[0].rates) == {name for of, name in RATES if of == script} - ABSENT.get(case, set())
    for name in steps[0].rates:
        for step, rate in zip(steps, rates_of(case, name), strict=True):
            assert step.rates[name] == pytest.approx([rate] * len(step.rates[name]), rel=1e-9, abs=1e-12)


ABSENT = {"adios random": {"opt_mask"}, "adios none": {"opt_mask"}}  # nobody learns the masks
LOGGED = {"adpe": {"adv_lr": "opt_delta"}, "adios": {"mask_lr": "opt_mask"}}


@every_case
def test_the_log_has_each_epochs_mean_loss_and_last_rate_and_its_chance_value(case, watched):
    script, _ = CASES[case]
    record = watched(case)
    header, *lines = record.lines
    assert [line["epoch"] for line in lines] == list(range(EPOCHS))
    for epoch, line in enumerate(lines):
        steps = record.steps[2 * epoch : 2 * epoch + 2]
        assert line["loss"] == pytest.approx(sum(step.loss for step in steps) / 2, rel=1e-5)
        for key, name in {"lr": "opt", **LOGGED.get(script, {})}.items():
            assert line[key] == pytest.approx(rates_of(case, name)[2 * epoch + 1], rel=1e-9, abs=1e-12)
        if script in EMA and script != "amoc" and "ema" in line:
            assert line["ema"] == pytest.approx(EMA[script][1][2 * epoch + 1], abs=1e-9)
        if script == "caco":
            assert line["bank_lr"] == pytest.approx(BANK_RATES["caco"][2 * epoch])
            assert "ema" in line
    for value in CHANCE.get(case, CHANCE[script]):
        assert f"{value:.3f}" in header["note"]
    assert f"{record.out}: {N} images, {STEPS} steps on" in record.printed
    assert f"{record.out / 'encoder.pt'} holds the encoder" in record.printed


CHANCE = {  # the values in the log's first line
    "amoc": [math.log(48 + 1)],
    "rocl": [2 * math.log(3 * 16 - 1), math.log(2 * 16 - 1)],
    "rocl l2": [4 / 3 * math.log(3 * 16 - 2), math.log(2 * 16 - 1)],
    "acl": [math.log(2 * 16 - 1)], "clae": [math.log(2 * 16 - 1)], "advcl": [],
    "adco": [math.log(40 + 1)], "adco hybrid": [math.log(40 + 16)], "adco multi-crop": [5 * math.log(40 + 1)], "caco": [2 * math.log(40)],
    "hardneg": [],  # it depends on the case
    "byorl": [], "adv_mae": [1 - 1 / 48], "adv_mae l2": [],
    "unified": [math.log(2 * 16 - 1), 1 - 1 / 48], "unified l2": [math.log(2 * 16 - 1)],
    "adpe": [1 - 1 / 48], "adios": [],  # that of ADIOS: test_adios.py
    "rotnet": []}  # it depends on the case


NO_PLAIN_NUMBER = {"caco": {"ema", "bank_lr"}, "advcl": {"clusters"}, "adios": {"masker"}}


@every_case
def test_numbers_that_the_step_is_given_by_name_are_those_of_their_flags(case, watched):
    """Radii and steps of attacks on pixels in pixels, a variant as its row."""
    script, flags = CASES[case]
    module = watched(case).module
    args = vars(module.parser().parse_args(flags.split()))
    for step in watched(case).steps:
        for name in (step.given.keys() & args.keys()) - NO_PLAIN_NUMBER.get(script, set()):
            wanted = args[name]
            if name in ("eps", "step_size") and script != "adpe" and wanted is not None:
                wanted = wanted / 255
            if name == "variant":
                wanted = module.VARIANTS[wanted]
            if isinstance(wanted, float):
                wanted = pytest.approx(wanted)
            if wanted is not None:  # else it follows from others, as ATTACKS has it
                assert step.given[name] == wanted, name


OF_OTHER_NAMES = {  # arguments that are no flags, and where they are tested
    "hardest_rows": "test_mixtures_have_numbers_of_their_own_from_their_epoch_on",
    "loss_name": "ATTACKS, by the loss that climbs: test_rotnet.py",
    "climbs": "ATTACKS of unified.py: test_unified.py",
    "tau": "EMA",
}


@pytest.mark.parametrize("script", dict.fromkeys(script for script, _ in CASES.values()))
def test_every_number_that_a_step_is_given_differs_from_its_default_in_some_case(script):
    """So that the test before this one would notice a flag that goes nowhere."""
    module = importlib.import_module(script)
    defaults = vars(module.parser().parse_args([]))
    parameters = inspect.signature(module.train_step).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert names - defaults.keys() <= OF_OTHER_NAMES.keys()
    varied = set()
    for of, flags in CASES.values():
        if of == script:
            given = vars(module.parser().parse_args(flags.split()))
            varied |= {name for name in names & given.keys() if given[name] != defaults[name]}
    assert varied == names & defaults.keys()


def test_drop_path_reaches_the_network(watched):
    net = watched("rotnet").steps[0].nets["net"]
    *_, last = [module for module in net.modules() if isinstance(module, encoders.BLOCKS)]
    assert last.drop == 0.3


def test_rotnets_chance_value_is_that_of_its_targets(watched):
    for case, classes in (("rotnet", 4), ("rotnet trades", N)):
        assert f"ln {classes} = {math.log(classes):.3f}" in watched(case).lines[0]["note"]


def test_hardnegs_chance_value_is_that_of_its_negatives_and_its_shift(watched):
    mixed = f"chance loss = {math.log(40 + 1):.3f}, and from epoch 1 on, with mixtures, {math.log(40 + 6 + 4 + 1):.3f}"
    assert watched("hardneg").lines[0]["note"] == mixed
    for case, chance in (("hardneg simclr", math.log(2 * 16 - 1)),
                         ("hardneg ifm", math.log(1 + 40 * math.exp(2 * 0.15 / 0.3)))):
        assert watched(case).lines[0]["note"] == f"chance loss = {chance:.3f}"


def test_advcls_chance_value_counts_its_views(watched):
    for case, views, temperature in (("advcl", 4, 0.3), ("advcl teacher", 3, 0.5)):
        assert f"{math.log(views * 16 - 1) * temperature / 0.07:.3f}" in watched(case).lines[0]["note"]


@every_case
def test_checkpoints_come_every_so_many_epochs_and_at_the_end(case, watched):
    assert watched(case).saves == [6, 8]


# ----------------------------------------------------------------------------------------------------------
# Optimizers
# ----------------------------------------------------------------------------------------------------------
def sgd(weight_decay):
    plain = dict(momentum=0.9, weight_decay=weight_decay, dampening=0, nesterov=False, maximize=False)
    return torch.optim.SGD, [("all", plain)]


def lars(weight_decay, trust=0.001, clip=False, spares_vectors=True):
    """`spares_vectors`: BYOL's habit; biases and norms have neither decay nor scaling."""
    whole = dict(momentum=0.9, weight_decay=weight_decay, trust=trust, clip=clip)
    if not spares_vectors:
        return optim.LARS, [("all", whole)]
    return optim.LARS, [("tensors", whole), ("vectors", dict(whole, weight_decay=0, trust=None))]


def adamw(weight_decay):
    """MAE's; vectors (biases, norms) have no decay."""
    both = dict(betas=(0.9, 0.95), eps=1e-8, maximize=False, amsgrad=False)
    tensors, vectors = dict(both, weight_decay=weight_decay), dict(both, weight_decay=0)
    return torch.optim.AdamW, [("tensors", tensors), ("vectors", vectors)]


def adam(weight_decay):
    return torch.optim.Adam, [("all", dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, amsgrad=False))]


def torch_adamw(weight_decay):
    """PyTorch's; vectors have no decay."""
    kind, groups = adamw(weight_decay)
    return kind, [(what, dict(settings, betas=(0.9, 0.999))) for what, settings in groups]


ASCENT = torch.optim.AdamW, [
    ("all", dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0, maximize=True, amsgrad=False))]

OPTIMIZERS = {  # argument of train_step: class, and the groups by what they hold
    "amoc": {"opt": sgd(0.002)},
    "rocl": {"opt": lars(0.003, spares_vectors=False)},
    "rocl l2": {"opt": torch_adamw(0.003)},
    "acl": {"opt": lars(0.003, spares_vectors=False)},
    "clae": {"opt": adam(0.003)},
    "clae random": {"opt": adam(0)},
    "advcl": {"opt": sgd(0.002)},
    "adco": {"opt": sgd(0.003)},
    "caco": {"opt": sgd(0.003)},
    "caco lars": {"opt": lars(0.003)},
    "caco hybrid": {"opt": torch_adamw(0.003)},
    "adco l2": {"opt": torch_adamw(0.003)},
    "hardneg": {"opt": sgd(0.003)},
    "byorl": {"opt": lars(0.003)},
    "adv_mae": {"opt": adamw(0.03)},
    "unified": {"opt": adamw(0.03)},
    "adpe": {"opt": adamw(0.03), "opt_delta": ASCENT},
    "adios": {"opt": lars(0.003, trust=0.02, clip=True), "opt_mask": lars(0.003, trust=0.02, clip=True)},
    "rotnet": {"opt": adamw(0.03)},
    "rotnet trades": {"opt": sgd(0.03)},
}


def weights_for(step, name):
    """What the optimizer `name` is to train."""
    net = step.nets["masker" if name == "opt_mask" else "net"]
    if name == "opt_delta":
        return [net.delta]
    delta = getattr(net, "delta", None)
    return [w for w in net.parameters() if w.requires_grad and w is not delta]


@every_case
def test_optimizers_have_their_class_groups_momentum_and_decay(case, watched):
    script, _ = CASES[case]
    step = watched(case).steps[0]
    table = OPTIMIZERS.get(case, OPTIMIZERS[script])
    assert set(step.groups) == set(table) - ABSENT.get(case, set())
    for name, (kind, groups) in table.items():
        if name in ABSENT.get(case, set()):
            assert step.given[name] is None
            continue
        assert type(step.given[name]) is kind
        assert len(step.groups[name]) == len(groups)
        weights = weights_for(step, name)
        kinds = {"all": weights, "tensors": [w for w in weights if w.dim() > 1],
                 "vectors": [w for w in weights if w.dim() < 2]}
        for what, options in groups:
            found = [group for group in step.groups[name]
                     if {id(w) for w in group["params"]} == {id(w) for w in kinds[what]}]
            assert len(found) == 1 and len(found[0]["params"]) == len(kinds[what]) > 0, what
            assert {key: found[0][key] for key in options} == options


@every_case
def test_only_the_encoders_fixed_positions_are_left_untrained(case, watched):
    named_weights = watched(case).steps[0].nets["net"].named_parameters()
    untrained = [name for name, w in named_weights if not w.requires_grad]
    assert untrained == (["encoder.pos_embed"] if CASES[case][0] in ("adv_mae", "adpe", "unified") else [])


# ----------------------------------------------------------------------------------------------------------
# Momentum networks and banks
# ----------------------------------------------------------------------------------------------------------
EMA = {  # which network the target follows, that before or after the optimizer's step; the coefficients
    "amoc": ("after", [0.6] * STEPS),
    "adco": ("before", [0.6] * STEPS),
    "caco": ("before", by_epoch(*(1 - (1 - 0.6) * fall(e / 4) for e in range(EPOCHS)))),
    "hardneg": ("before", [0.6] * STEPS),
    "byorl": ("after", [1 - (1 - 0.6) * fall(s / 8) for s in range(STEPS)]),
    "adios": ("after", [1 - (1 - 0.6) * fall(s / 8) for s in range(STEPS)]),
}


@pytest.mark.parametrize("case", [case for case, (script, flags) in CASES.items()
                                  if script in EMA and (script != "adios" or "byol" in flags)
                                  and "simclr" not in flags])
def test_the_target_begins_as_a_copy_and_follows_with_its_momentum(case, watched):
    script, _ = CASES[case]
    steps = watched(case).steps
    assert steps[0].target_is_a_copy and not steps[0].target_asks
    when, coefficients = EMA[script]
    measured = set()
    for number, (step, m) in enumerate(zip(steps, coefficients, strict=True)):
        old, new = step.before["target"].double(), step.after["target"].double()
        net = {"before": step.before, "after": step.after}[when]["net"][: len(old)].double()
        away = old - net
        torch.testing.assert_close(new, m * old + (1 - m) * net, rtol=1e-4, atol=1e-6)
        if away.norm() > 1e-3:
            measured.add(number)
            assert ((new - net) @ away / (away @ away)).item() == pytest.approx(m, abs=2e-3)
    assert {2, 3, 4, 5, 6, 7} <= measured


BANK_RATES = {"adco": [0.23] * STEPS, "caco": by_epoch(0.23 / 2, 0.23, 0.23, 0.23)}


@cases_of("adco", "caco")
def test_the_bank_climbs_with_its_own_rate_momentum_and_decay(case, watched):
    script, _ = CASES[case]
    record = watched(case)
    for call, rate in zip(record.bank_steps, BANK_RATES[script], strict=True):
        assert call.lr == pytest.approx(rate, rel=1e-9) and call.momentum == 0.7
        assert getattr(call, "weight_decay", None) == (0.004 if script == "adco" else None)
        assert call.grad.norm() > 0


@cases_of("adco", "caco")
def test_the_bank_begins_with_keys_of_the_network_that_steps_of_moco_leave(case, watched):
    """Three steps of MoCo at the peak rate push 48 keys; then 48 more of the network that they leave, which
    both networks are; 40 rows hold the last of them."""
    script, _ = CASES[case]
    record = watched(case)
    fill = record.fill
    sums = 2 if case == "adco hybrid" else 1  # over the bank, and with --batch-negatives over the batch's keys
    assert fill.rate == [0.11] * len(fill.rate) and fill.ema == [0.6] * 3
    assert fill.temperatures == [0.3] * 3 * sums
    assert fill.moved > 0 and fill.momenta > 0
    assert fill.settled and record.steps[0].target_is_a_copy
    assert [len(push.keys) for push in record.pushes] == [16] * 6
    assert all(push.in_fill for push in record.pushes)
    assert [push.settled for push in record.pushes[3:]] == [True] * 3
    keys = torch.cat([push.keys for push in record.pushes])
    rows = torch.empty(40, keys.shape[1])
    for i, key in enumerate(keys):
        rows[i % 40] = key
    assert torch.equal(fill.rows, rows) and fill.pointer == 96 % 40
    torch.testing.assert_close(fill.rows.norm(dim=1), torch.ones(40))
    assert torch.equal(record.steps[0].banks["bank"].rows, rows) and not record.steps[0].velocities[0].any()
    passes = [pass_ for pass_ in record.epochs if pass_.batch_size == BATCH]
    assert [pass_.epoch for pass_ in passes[:3]] == [4, 5, 6]  # those that the run itself does not reach


@cases_of("amoc")
def test_two_banks_of_unit_noise_begin_and_differ(case, watched):
    clean, adv = (watched(case).steps[0].banks[name] for name in ("bank_clean", "bank_adv"))
    for bank in (clean, adv):
        assert bank.rows.shape == (48, 128) and bank.pointer == 0
        torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(48))
        assert bank.rows.mean().abs() < 0.01
    assert not torch.equal(clean.rows, adv.rows)
    keys = {"amoc": [16], "amoc CCC": [16], "amoc CCA": [16], "amoc CAA": [16, 16], "amoc AAC": [16, 16],
            "amoc l2": [16, 16]}[case]
    assert [len(push.keys) for push in watched(case).pushes] == keys * STEPS


@cases_of("hardneg")
def test_a_queue_of_unit_noise_begins_and_takes_all_keys(case, watched):
    record = watched(case)
    if case == "hardneg simclr":
        assert not record.steps[0].banks and not record.pushes
        assert all(step.given["target"] is None and step.given["bank"] is None for step in record.steps)
        return
    (bank,) = record.steps[0].banks.values()
    assert bank.rows.shape == (40, 128) and bank.pointer == 0
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(40))
    assert bank.rows.mean().abs() < 0.01
    assert [len(push.keys) for push in record.pushes] == [16] * STEPS


@cases_of("hardneg")
def test_mixtures_have_numbers_of_their_own_from_their_epoch_on(case, watched):
    numbers = [step.given["numbers"] for step in watched(case).steps]
    assert all(step.given["hardest_rows"] == 8 for step in watched(case).steps) or case != "hardneg"
    if case != "hardneg":
        assert numbers == [None] * STEPS
        return
    assert numbers[:2] == [None] * 2  # --mix-from 1
    for place, shape in ((0, (16, 6, 3)), (1, (16, 4, 2))):
        values = torch.stack([pair[place] for pair in numbers[2:]])
        assert values.shape == (6, *shape)
        assert len(values.flatten(0, 1).flatten(1).unique(dim=0)) == 6 * 16
        unit(values.flatten(), values.numel())


@cases_of("hardneg")
def test_the_rule_of_the_flags_and_its_temperature_reach_the_step(case, watched):
    rule, temperature = {"hardneg": ("mochi", 0.2), "hardneg ifm": ("ifm", 0.3), "hardneg simclr": ("hcl", 0.5)}[case]
    for step in watched(case).steps:
        assert (step.given["negatives"], step.given["temperature"]) == (rule, temperature)


@cases_of("caco")
def test_the_rows_of_cacos_bank_are_as_long_as_its_flag_says(case, watched):
    assert watched(case).steps[0].banks["bank"].rows.shape == (40, 24)


# ----------------------------------------------------------------------------------------------------------
# Order, views, noise
# ----------------------------------------------------------------------------------------------------------
def numbers_of(batches):
    """The images of uint8 `batches` by their number in the data."""
    known = {x.transpose(2, 0, 1).tobytes(): number for number, x in enumerate(images())}
    return [known[x.numpy().tobytes()] for batch in batches for x in batch]


def epochs_of(record):
    return [pass_ for pass_ in record.epochs if pass_.batch_size == BATCH and pass_.epoch < EPOCHS]


@every_case
def test_each_epoch_visits_every_image_once_in_an_order_of_its_own(case, watched):
    passes = epochs_of(watched(case))
    orders = [numbers_of(pass_.x) for pass_ in passes]
    assert [pass_.epoch for pass_ in passes] == [0, 1, 2, 3] and {pass_.seed for pass_ in passes} == {5}
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS


SIDES = {"adco multi-crop": [16, 14, 11, 9, 7, 16], "caco lars": [16, 16] + 6 * [7], "advcl": [16] * 3, "advcl l2": [16] * 3,
         "caco l2": [16, 16] + 6 * [7],
         "advcl teacher": [16] * 3, "adv_mae": [16], "adv_mae l2": [16], "adv_mae fgsm": [16], "adpe": [16],
         "adpe pgd": [16], "adpe pgd l2": [16], "rotnet": [16], "rotnet trades": [16], "rotnet clean": [16]}


@every_case
def test_views_are_of_the_steps_images_and_never_the_same_twice(case, watched):
    """Between views, images, epochs; but AdvCL's image has only 162 weak views, and a crop may be whole."""
    script, _ = CASES[case]
    record = watched(case)
    copies = 2 if case == "adpe pgd" else 1  # --crops
    by_side = {}
    for step in record.steps:
        assert set(VIEWS[script].split()) <= set(step.given)
        assert [view.shape[-1] for view in step.views] == SIDES.get(case, [16, 16])
        for view in step.views:
            side = view.shape[-1]
            assert view.shape == (copies * BATCH, 3, side, side) and view.dtype == torch.float32
            assert view.min() >= 0 and view.max() <= 1 + 1e-6
            by_side.setdefault(side, []).append(view.flatten(1))
    for views in by_side.values():
        views = torch.cat(views)
        least = 0.9 * len(views) if script == "advcl" else 0.98 * len(views)
        assert len(views.unique(dim=0)) >= least
    given = torch.cat([x.float().mean((1, 2, 3)) for pass_ in epochs_of(record) for x in pass_.x])
    for i in range(len(record.steps[0].views)):
        if i or case != "byorl":
            shown = [step.views[i].unflatten(0, (copies, BATCH)).mean((0, 2, 3, 4)) for step in record.steps]
            assert torch.corrcoef(torch.stack([given, torch.cat(shown)]))[0, 1] > 0.35


CACO_1 = (224, (0.2, 1.0), 0.2, 1.0, 0.0)
CACO_2 = (224, (0.2, 1.0), 0.2, 0.1, 0.2)
MULTI_CROP = 2 * [dict(view=(224, (0.14, 1.0), 0.4, 0.5, 0.0))] + 6 * [dict(view=(96, (0.05, 0.14), 0.4, 0.5, 0.0))]
AUGMENTED = {  # what augment is told for the views of a step, in turn, besides the side
    "amoc": [{}, {}], "rocl": [{}, {}], "acl": [{}, {}], "adios": [{}, {}], "adv_mae": [{}], "unified": [{}, {}],
    "advcl": [{}], "clae": [{}, {}],
    "adco": 2 * [dict(side=224, blur=False)], "adco hybrid": 2 * [dict(side=224, blur=True)],
    "adco multi-crop": [dict(side=side, blur=False) for side in (224, 192, 160, 128, 96, 224)],
    "caco": [dict(view=CACO_1, blur=False), dict(view=CACO_2, blur=False)],
    "caco hybrid": [dict(view=CACO_1, blur=True), dict(view=CACO_2, blur=True)],
    "caco lars": MULTI_CROP, "caco l2": MULTI_CROP,
    "hardneg": 2 * [dict(blur=False)], "hardneg simclr": 2 * [dict(blur=True)],
    "byorl": [dict(solarize=0), dict(solarize=0.2)],  # of the second view now and then
    "adpe": [dict(min_scale=0.2, crops=1)], "adpe pgd": [dict(min_scale=0.2, crops=2)],
    "adpe pgd l2": [dict(min_scale=0.5, crops=1)],
    "rotnet": [dict(crop="padded", jitter=0.2)], "rotnet clean": [dict(crop="resized", jitter=0.0)],
}


@every_case
def test_flags_and_each_views_own_numbers_reach_augment(case, watched):
    script, _ = CASES[case]
    table = AUGMENTED.get(case, AUGMENTED[script])
    for step in watched(case).steps:
        assert [call["size"] for call in step.augmented] == [SIDE] * len(table)
        assert [{name: call[name] for name in told} for call, told in zip(step.augmented, table)] == table


def box(values, n):
    assert -1 <= values.min() < -1 + 20 / n and 1 - 20 / n < values.max() <= 1
    assert values.mean().abs() < 4 / (3 * n) ** 0.5
    assert (values.square().mean() - 1 / 3).abs() < 4 * (4 / 45 / n) ** 0.5


def unit(values, n):
    box(2 * values - 1, n)
    assert values.max() < 1


def ball(values, n):
    """The n rows of (n, D) are uniform in the unit ball: so is their length to the power D."""
    length, D = values.double().norm(dim=1), values.shape[1]
    assert length.max() <= 1 + 1e-5
    unit((length.clamp_max(1 - 1e-6) ** D), n)
    assert values.mean().abs() < 4 / (len(values) * D * (D + 2)) ** 0.5
    assert (values > 0).double().mean() == pytest.approx(0.5, abs=2 / values.numel() ** 0.5)


NOISE = {  # argument: its shape, the kind of its numbers, and how many of its axes separate independent draws
    "amoc": {"noise": ((16, 2, 3, 16, 16), box, 2)},
    "amoc CCC": {},
    "amoc CCA": {},
    "rocl": {"noise": ((16, 3, 16, 16), box, 1)},
    "rocl l2": {"noise": ((16, 3, 16, 16), ball, 1)},
    "acl": {"noise": ((16, 2, 3, 16, 16), box, 2)},
    "acl s2s": {},
    "clae": {},
    "clae random": {"noise": ((16, 3, 16, 16), box, 1)},
    "acl l2": {"noise": ((16, 2, 3, 16, 16), ball, 2)},
    "amoc l2": {"noise": ((16, 2, 3, 16, 16), ball, 2)},
    "advcl": {"noise": ((2, 16, 3, 16, 16), box, 2)},
    "advcl l2": {"noise": ((3, 16, 3, 16, 16), ball, 2)},
    "advcl teacher": {"noise": ((3, 16, 3, 16, 16), box, 2)},
    "adco": {},
    "adco hybrid": {"noise": ((2, 16, 3, 16, 16), box, 2)},
    "adco both": {"noise": ((1, 16, 3, 16, 16), box, 2)},
    "adco l2": {"noise": ((1, 16, 3, 16, 16), ball, 2)},
    "caco": {},
    "caco hybrid": {"noise": ((2, 16, 3, 16, 16), box, 2)},
    "caco l2": {"noise": ((2, 16, 3, 16, 16), ball, 2)},  # and six of the small views
    "hardneg": {},
    "byorl": {"noise": ((16, 2, 768), box, 2)},
    "byorl l2": {"noise": ((16, 2, 768), ball, 2)},
    "byorl clean": {},
    "adv_mae": {"u": ((16, 16), unit, 1), "noise": ((16, 4 * 48), box, 1)},
    "adv_mae l2": {"u": ((16, 16), unit, 1), "noise": ((16, 8 * 48), ball, 1)},
    "adv_mae fgsm": {"u": ((16, 16), unit, 1)},
    "unified": {"u": ((16, 16), unit, 1), "noise": ((16, 16, 48), box, 1)},
    "unified l2": {"u": ((16, 16), unit, 1), "noise": ((16, 16, 48), ball, 1)},
    "unified clean": {"u": ((16, 16), unit, 1)},
    "adpe": {"u": ((16, 16), unit, 1)},
    "adpe pgd": {"u": ((32, 16), unit, 1), "noise": ((5, 2), box, 1)},  # five blocks, (row, column)
    "adpe pgd l2": {"u": ((16, 16), unit, 1), "noise": ((5, 2), ball, 1)},
    "adios": {"pick": ((16, 2), unit, 0)},
    "rotnet": {"noise": ((16, 768), box, 1)},
    "rotnet trades": {"noise": ((16, 768), ball, 1)},
    "rotnet clean": {},
}


@every_case
def test_noise_fills_its_range_and_is_new_for_each_image_view_and_step(case, watched):
    script, _ = CASES[case]
    table = NOISE.get(case, NOISE[script])
    steps = watched(case).steps
    if "noise" not in table:
        assert all(step.given.get("noise") is None for step in steps)
    for name, (shape, kind, axes) in table.items():
        values = [step.given[name] for step in steps]
        values = [torch.stack(value[:shape[0]]) if isinstance(value, list) else value for value in values]
        assert {tuple(value.shape) for value in values} == {shape}
        rows = torch.stack(values).flatten(0, axes).flatten(1)
        assert len(rows.unique(dim=0)) == len(rows)
        together = torch.corrcoef(rows) - torch.eye(len(rows))
        assert rows.shape[1] < 100 or together.abs().max() < 6 / rows.shape[1] ** 0.5  # nor opposite ones
        kind(rows if kind is ball else rows.flatten(), len(rows) if kind is ball else rows.numel())


@cases_of("adco", "hardneg")
def test_keys_have_a_new_order_each_step(case, watched):
    orders = [step.given["order"].tolist() for step in watched(case).steps]
    assert all(sorted(order) == list(range(BATCH)) for order in orders)
    assert len({tuple(order) for order in orders}) == STEPS and list(range(BATCH)) not in orders


@cases_of("adco")
def test_queries_and_keys_are_the_views_of_their_kind_of_run(case, watched):
    counts = {"adco": (1, 1), "adco hybrid": (2, 2), "adco multi-crop": (5, 1), "adco l2": (1, 1),
              "adco both": (1, 1)}[case]
    for step in watched(case).steps:
        queries, keys = step.given["x_q"], step.given["x_k"]
        assert (len(queries), len(keys)) == counts
        for query, key in zip(queries, keys):
            assert not torch.equal(query, key)
        if len(keys) == 2:
            assert torch.equal(queries[0], keys[1]) and torch.equal(queries[1], keys[0])


@cases_of("adios")
def test_masks_that_nobody_learns_are_given_and_fresh(case, watched):
    given = [step.given["control_masks"] for step in watched(case).steps]
    picks = [step.given["pick"] for step in watched(case).steps]
    assert all((pick[:, 0] != pick[:, 1]).all() for pick in picks)
    if case in ("adios", "adios byol", "adios one mask"):
        assert given == [None] * STEPS
    elif case == "adios random":
        assert {masks.shape for masks in given} == {(BATCH, 2, SIDE, SIDE)}
        masks = torch.cat(given)
        assert set(masks.unique().tolist()) == {0, 1} and (masks.sum(1) == 1).all()
        assert len(masks.flatten(1).unique(dim=0)) > 0.95 * len(masks)
        assert masks.mean((0, 2, 3)).tolist() == pytest.approx([1 / 2] * 2, abs=0.05)
    else:
        assert all(not masks.any() and masks.shape == (BATCH, 1, SIDE, SIDE) for masks in given)


def test_advcls_pseudo_labels_are_those_of_the_steps_images(watched):
    record = watched("advcl teacher")
    table = torch.load(record.out / "pseudo_labels.pt", weights_only=True)["labels"]
    order = [number for pass_ in epochs_of(record) for number in numbers_of(pass_.x)]
    given = torch.cat([step.given["labels"] for step in record.steps])
    assert torch.equal(given, table[order]) and table.max(0).values.tolist() == [1, 4]
    assert all(step.given["clusters"] == [2, 5] for step in record.steps)
    assert all(step.given["clusters"] == [] for step in watched("advcl").steps)


# ----------------------------------------------------------------------------------------------------------
# Attacks
# ----------------------------------------------------------------------------------------------------------
EVAL = {(False, True)}  # what BatchNorms are: not training, statistics tracked
FROZEN = {(True, False)}  # batch statistics, and no running one moves
NO_NORM = set()
LINF = dict(eps=6 / 255, step_size=3 / 255, steps=2, norm="linf", lo=0, hi=1)
BYORL_LINF = dict(LINF, step_size=1.25 * 6 / 2 / 255)  # the default, 1.25 eps / steps
BYORL_L2 = dict(eps=90 / 255, step_size=40 / 255, steps=1, norm="l2", lo=0, hi=1)
ROCL_L2 = dict(eps=90 / 255, step_size=1.25 * 90 / 2 / 255, steps=2, norm="l2", lo=0, hi=1)
MAE_LINF = dict(LINF, step_size=5 / 8 * 6 / 255)  # the default, 5/8 eps
MAE_L2 = dict(eps=90 / 255, step_size=40 / 255, steps=2, norm="l2", lo=0, hi=1)
ROTNET_L2 = dict(eps=90 / 255, step_size=40 / 255, steps=2, norm="l2", lo=0, hi=1)
L2_DEFAULT = dict(ROTNET_L2, step_size=1.25 * 90 / 2 / 255)  # the default, 1.25 eps / steps
FGSM = dict(LINF, step_size=6 / 255, steps=1)
ADPE_LINF = dict(eps=0.4, step_size=5 / 8 * 0.4, steps=2, norm="linf", lo=-math.inf, hi=math.inf)
ADPE_L2 = dict(eps=0.4, step_size=0.3, steps=1, norm="l2", lo=-math.inf, hi=math.inf)

ATTACKS = {  # options of pgd, how BatchNorms stand, and what is attacked, in turn
    "amoc": (LINF, EVAL, lambda x: [x["x1"]]),
    "amoc CAA": (LINF, EVAL, lambda x: [x["x2"]]),
    "amoc AAC": (LINF, EVAL, lambda x: [torch.cat([x["x1"], x["x2"]])]),
    "amoc l2": (ROTNET_L2, EVAL, lambda x: [torch.cat([x["x1"], x["x2"]])]),
    "rocl": (LINF, EVAL, lambda x: [x["x1"]]),
    "rocl l2": (ROCL_L2, EVAL, lambda x: [x["x1"]]),
    "acl": (LINF, EVAL, lambda x: [torch.cat([x["x1"], x["x2"]])]),
    "clae": (FGSM, FROZEN, lambda x: [x["x1"]]),
    "acl l2": (L2_DEFAULT, EVAL, lambda x: [torch.cat([x["x1"], x["x2"]])]),
    "advcl": (LINF, FROZEN, lambda x: [x["x"]]),
    "advcl l2": (L2_DEFAULT, FROZEN, lambda x: [torch.cat([x["x1"], x["x"]])]),
    "advcl teacher": (LINF, FROZEN, lambda x: [torch.cat([x["x1"], x["x2"]]), x["x"]]),
    "adco hybrid": (LINF, EVAL, lambda x: x["x_q"]),
    "adco both": (LINF, EVAL, lambda x: x["x_q"]),
    "adco l2": (L2_DEFAULT, EVAL, lambda x: x["x_q"]),
    "caco hybrid": (LINF, EVAL, lambda x: x["x"]),
    "caco l2": (L2_DEFAULT, EVAL, lambda x: x["x"]),
    "byorl": (BYORL_LINF, FROZEN, lambda x: [x["x1"], x["x2"]]),
    "byorl l2": (BYORL_L2, FROZEN, lambda x: [x["x1"], x["x2"]]),
    "adv_mae": (MAE_LINF, NO_NORM, lambda x: [visible(x["x"], x["u"])]),
    "adv_mae l2": (MAE_L2, NO_NORM, lambda x: [visible(x["x"], x["u"], 8)]),
    "adv_mae fgsm": (FGSM, NO_NORM, lambda x: [visible(x["x"], x["u"])]),
    "unified": (MAE_LINF, NO_NORM, lambda x: [patchify(x["x1"], 4)]),
    "unified l2": (dict(MAE_L2, steps=3), NO_NORM, lambda x: [patchify(x["x1"], 4)]),
    "adpe pgd": (ADPE_LINF, NO_NORM, lambda x: [torch.zeros(5, 2)]),
    "adpe pgd l2": (ADPE_L2, NO_NORM, lambda x: [torch.zeros(5, 2)]),
    "rotnet": (MAE_LINF, EVAL, lambda x: [x["x"]]),
    "rotnet trades": (dict(ROTNET_L2, steps=3), EVAL, lambda x: [x["x"]]),
}


AT_THE_IMAGE = ("adv_mae fgsm", "clae")  # where the attack starts


def visible(x, u, n=4):
    """The n patches of least u of each image, in that order, pixels row by row, channel fastest."""
    found = []
    for image, numbers in zip(x, u):
        patches = [image[:, i : i + 4, j : j + 4].permute(1, 2, 0).flatten()
                   for i in range(0, SIDE, 4) for j in range(0, SIDE, 4)]
        found.append(torch.stack([patches[k] for k in numbers.argsort()[:n]]))
    return torch.stack(found)


@pytest.mark.parametrize("case", ATTACKS)
def test_flags_reach_the_attack_which_starts_within_ball_and_box(case, watched):
    options, norms, attacked = ATTACKS[case]
    reach = []
    for step in watched(case).steps:
        assert step.training
        wanted = attacked(step.given)
        assert len(step.attacks) == len(wanted)
        for call, x in zip(step.attacks, wanted):
            assert {name: getattr(call, name) for name in options} == pytest.approx(options)
            assert call.modes == norms and call.calls == options["steps"]
            assert torch.equal(call.x, x)
            p = math.inf if options["norm"] == "linf" else 2
            axes = 3 if call.x.dim() > 3 else call.x.dim() - 1  # of an image, of its patches, or of a row
            away = (call.start - call.x).flatten(-axes).norm(p, dim=-1).flatten() / options["eps"]
            reach.append(away)
            assert away.max() <= 1 + 1e-5
            assert call.start.min() >= options["lo"] and call.start.max() <= options["hi"]
            assert torch.equal(call.start, call.x) == (case in AT_THE_IMAGE)
    reach = torch.cat(reach)
    if case.startswith("adpe"):  # a row of delta has two numbers only
        assert reach.max() > 0.8
    elif case not in AT_THE_IMAGE:
        assert reach.min() > 0.8  # nearly as far as is allowed, in every image


@pytest.mark.parametrize("case", [case for case in CASES if case not in ATTACKS])
def test_where_no_attack_is_asked_for_none_moves_a_pixel(case, watched):
    for step in watched(case).steps:
        assert step.training
        for call in step.attacks:
            assert call.eps == 0 and call.calls == 0 and torch.equal(call.found, call.x)


# ----------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------
def layers(net):
    """The layers of a head in words: "512-128" for a Linear, "+" where it has a bias, BatchNorm with (BN) or
    without (bn) affine."""
    words = []
    for m in net.modules():
        if isinstance(m, nn.Linear):
            words.append(f"{m.in_features}-{m.out_features}" + ("+" if m.bias is not None else ""))
        elif isinstance(m, BranchNorm):
            words.append("/".join(m.branches))
        elif isinstance(m, nn.BatchNorm1d):
            words.append("BN" if m.affine else "bn")
        elif isinstance(m, nn.ReLU):
            words.append("relu")
    return " ".join(word for i, word in enumerate(words) if word != "BN" or i == 0 or "/" not in words[i - 1])


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CIFAR = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
NETWORKS = {  # the heads of the network as it is trained; mean and std of the first layer
    "amoc": (["128-128+ relu 128-128+"], ([0.4914, 0.4824, 0.4467], [0.2471, 0.2435, 0.2617])),
    "rocl": (["128-512+ relu 512-128+"], ([0, 0, 0], [1, 1, 1])),
    "acl s2s": (["128-128+ clean BN relu 128-128 clean BN relu 128-128 clean BN"], IMAGENET),
    "acl": (["128-128+ adv/clean BN relu 128-128 adv/clean BN relu 128-128 adv/clean BN"], IMAGENET),
    "advcl": (["128-128+ BN relu 128-128+"], ([0, 0, 0], [1, 1, 1])),
    "clae": (["128-128+ relu 128-64+"], ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])),
    "advcl teacher": (["128-128+ BN relu 128-128+", "128-7+"], ([0, 0, 0], [1, 1, 1])),
    "adco": (["128-128+ relu 128-128+"], IMAGENET),
    "caco": (["128-128 BN relu 128-128 BN relu 128-24"], IMAGENET),
    "hardneg": (["128-128+ relu 128-128+"], IMAGENET),
    "byorl": (["128-40+ BN relu 40-256+", "256-40+ BN relu 40-256+"], CIFAR),
    "adios": (["128-2048+ relu 2048-128+"], CIFAR),
    "adios byol": (["128-4096+ BN relu 4096-256+", "256-8192+ BN relu 8192-256+"], CIFAR),
    "rotnet": (["128-4+"], IMAGENET),
    "rotnet trades": ([f"128-{N}+"], IMAGENET),
}


def parts_of(net):
    return list(net.values()) if isinstance(net, nn.ModuleDict) else list(net)


@cases_of("amoc", "rocl", "acl", "advcl", "clae", "adco", "caco", "hardneg", "byorl", "adios", "rotnet")
def test_heads_and_normalisation_are_the_papers(case, watched):
    script, _ = CASES[case]
    heads, (mean, std) = NETWORKS.get(case, NETWORKS[script])
    for name in ("net", "target"):
        net = watched(case).steps[0].nets.get(name)
        if net is not None:
            encoder, *found = parts_of(net)
            assert encoder.mean.flatten().tolist() == pytest.approx(mean)
            assert encoder.std.flatten().tolist() == pytest.approx(std)
            whole = heads if name == "net" or script in WHOLE_TARGETS else heads[:1]
            assert [layers(head) for head in found] == whole


def test_adios_simsiam_projector_ends_in_a_norm_without_affine():
    _, *heads = importlib.import_module("adios").network("slim", "simsiam", SIDE)
    assert [layers(head) for head in heads] == [
        "128-2048+ BN relu 2048-2048+ BN relu 2048-2048+ bn", "2048-512+ BN relu 512-2048+"]


@cases_of("amoc", "rocl", "acl", "advcl", "clae", "adco", "caco", "hardneg", "byorl", "adios", "rotnet")
def test_convolutions_start_as_kaimings_but_rocls_as_pytorchs(case, watched):
    """He's normal distribution by the fan out, or a uniform one up to the root of 1 / fan in."""
    weight = watched(case).first_weights["0.layer4.0.conv2.weight"]
    fan = 9 * 128
    if CASES[case][0] == "rocl":
        assert 0.99 * fan**-0.5 < weight.abs().max() <= fan**-0.5
    else:
        assert weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.02)
        assert weight.abs().max() > 3 * weight.std()


@pytest.mark.parametrize("n", [32, 64, 256])
def test_adcos_groups_move_the_running_statistics_about_as_far_as_one_batch_does(n):
    x = 5 + torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    whole, groups = nn.BatchNorm2d(4), importlib.import_module("adco").GroupedNorm(4)
    whole(x), groups(x)
    torch.testing.assert_close(groups.running_mean, whole.running_mean, rtol=0.06, atol=0)
    torch.testing.assert_close(groups.running_var - 0.9, whole.running_var - 0.9, rtol=0.1, atol=0.01)


@cases_of("adv_mae", "adpe", "unified")
def test_masked_autoencoders_have_the_decoder_of_their_flag_and_imagenets_colours(case, watched):
    net = watched(case).steps[0].nets["net"]
    assert net.encoder.recipe["mean"] == pytest.approx(IMAGENET[0])
    assert net.encoder.recipe["std"] == pytest.approx(IMAGENET[1])
    assert net.encoder.recipe["size"] == SIDE and net.encoder.grid == (4, 4)
    assert net.decoder.embed.out_features == 16 and len(net.decoder.blocks) == 1
    assert net.decoder.blocks[0].attn.heads == 2
    if CASES[case][0] == "adpe":
        assert net.encoder.relative and net.delta.shape == (5, 2)


@cases_of("adco", "caco", "hardneg")
def test_the_stem_is_that_of_the_flag(case, watched):
    for name in ("net", "target"):
        net = watched(case).steps[0].nets.get(name)
        if net is not None:
            assert net[0].recipe["stem"] == ("cifar" if case in ("adco", "caco", "hardneg") else "small")


@cases_of("adios")
def test_the_masker_has_the_masks_and_width_of_its_flags(case, watched):
    masker = watched(case).steps[0].nets["masker"]
    assert masker.mean.flatten().tolist() == pytest.approx(CIFAR[0])
    if case in ABSENT:
        assert not list(masker.parameters())
        return
    assert masker.head.in_channels == 8 and masker.head.out_channels == (1 if case == "adios one mask" else 2)
    assert masker.std.flatten().tolist() == pytest.approx(CIFAR[1])


@cases_of("byorl", "adios")
def test_the_spread_is_that_of_the_projections_of_whole_images_in_eval_mode(case, watched):
    record = watched(case)
    assert len(record.spreads) == EPOCHS
    sample, _, _ = data.sample(data.load(str(record.out.parent / "images.npz"), split="train"), N, 5)
    for z, net in record.spreads:
        with torch.no_grad():
            torch.testing.assert_close(z, net(sample.float() / 255))
    assert all({"std", "rank"} <= set(line) for line in record.lines[1:])


# ----------------------------------------------------------------------------------------------------------
# Defaults
# ----------------------------------------------------------------------------------------------------------
DEFAULTS = {  # of each flag that a paper or its authors' code names
    "amoc": dict(
        variant="ACC", epochs=200, batch_size=256, lr=0.1, warmup=10, weight_decay=5e-4, temperature=0.2,
        ema=0.999, bank_size=32768, lam=0.5, norm="linf", eps=8, step_size=None, steps=5,
        arch="resnet18"),
    "rocl": dict(
        epochs=1000, batch_size=512, lr=1.5, warmup=10, weight_decay=1e-6, temperature=0.5,
        reg_weight=1 / 256, attack_to="other", regularize_to="other", asymmetry=None, hard=False, norm="linf",
        eps=8, step_size=None, steps=7, optimizer="lars", arch="resnet18"),
    "acl": dict(
        variant="ds", epochs=1000, batch_size=512, lr=5, warmup=10, weight_decay=1e-6, temperature=0.5,
        norm="linf", eps=8, step_size=None, steps=5, arch="resnet18"),
    "advcl": dict(
        views=["x+d", "x1", "x2", "xh"], teacher=None, clusters=[2, 10, 50, 100, 500], cluster_weight=0.2,
        cutoff=8, epochs=1000, batch_size=512, lr=0.5, warmup=10, weight_decay=1e-4, temperature=0.5,
        norm="linf", eps=8, step_size=None, steps=5, arch="resnet18"),
    "clae": dict(
        epochs=100, batch_size=256, lr=3e-4, lr_final=None, weight_decay=0, temperature=0.5, alpha=1, eps=4, random=False,
        arch="resnet18"),
    "adco": dict(
        stem=None, symmetric=False, multi_crop=False, batch_negatives=False, epochs=200, batch_size=256,
        lr=0.06, lr_final=0, weight_decay=5e-4, ema=0.99, temperature=0.12, bank_temperature=0.05,
        bank_size=4096, bank_lr=0.5, bank_momentum=0.9, bank_decay=1e-4, fill_steps=256, eps=0, step_size=None,
        steps=5, norm="linf", random_start=True, clean_weight=0, optimizer="sgd", blur=False, arch="resnet18"),
    "caco": dict(
        stem=None, cooperation=1, multi_crop=False, epochs=200, batch_size=256, optimizer="sgd",
        lr=0.06, lr_final=0, warmup=0, weight_decay=5e-4, ema=0.99, temperature=0.08, dim=128, bank_size=4096,
        bank_lr=0.3, bank_warmup=10, bank_momentum=0.9, fill_steps=256, fill_temperature=0.2, blur=False,
        norm="linf", eps=0, step_size=None, steps=5, random_start=True,
        arch="resnet18"),
    "hardneg": dict(
        negatives="mochi", base="moco", stem=None, epochs=200, batch_size=256, lr=0.06, lr_final=0, weight_decay=5e-4,
        ema=0.99, temperature=None, optimizer="sgd", bank_size=4096, shift=0.1, alpha=1, ifm_only=False, beta=1, tau=0.1, hardest=1024,
        mix=512, mix_query=256, mix_from=10, blur=False, arch="resnet18"),
    "byorl": dict(
        hidden=4096, epochs=200, batch_size=512, lr=2, warmup=10, weight_decay=5e-4, ema=0.996, norm="linf",
        eps=8, step_size=None, steps=5, arch="resnet18"),
    "adv_mae": dict(
        decoder=[128, 4, 4], mask_ratio=0.75, norm_pix=True, clean_weight=0, epochs=400, batch_size=512, lr=1e-3, warmup=20,
        weight_decay=0.05, norm="linf", eps=1, step_size=None, steps=2, arch="vit_tiny"),
    "unified": dict(
        attack="joint", lam=1, con_weight=1, share=False, decoder=[128, 4, 4], mask_ratio=0.75, norm_pix=True,
        temperature=0.2, epochs=400, batch_size=512, lr=1e-3, warmup=20, weight_decay=0.05, norm="linf", eps=4,
        step_size=None, steps=2, arch="vit_tiny"),
    "adpe": dict(
        position="relative", mode="coordinate", adversary="persistent", norm="linf", radius=1, adv_lr=1e-3,
        steps=2, step_size=None, decoder=[128, 4, 4], mask_ratio=0.75, epochs=400, batch_size=512, lr=1e-3,
        warmup=20, weight_decay=0.05, crops=1, min_scale=0.2, arch="vit_tiny"),
    "adios": dict(
        objective="simclr", masker="learned", masks=4, single=False, mask_weight=None, mask_width=16,
        mask_lr=0.03, epochs=200, batch_size=256, lr=0.2, warmup=10, weight_decay=None, temperature=0.2,
        ema=0.99, arch="resnet18"),
    "rotnet": dict(
        target="rotation", loss="ce", beta=6, smoothing=0, drop_path=0, crop="padded", jitter=0.2, epochs=400,
        batch_size=512, optimizer="adamw", lr=1e-3, warmup=20, milestones=[], weight_decay=0.05, norm="linf", eps=4,
        step_size=None, steps=2, arch="vit_tiny"),
    "pretext": dict(
        tasks=["selfie", "rotation", "jigsaw"], lam=0.1, clean_weight=0, double_softmax=False, permutations=30,
        pool_layers=13, batch_size=256, eps=8, step_size=2, steps=10, random_start=True, noise=None, held_out=0.1,
        epochs=None, lr=None, final_lr=None, ramp=None, weight_decay=None, nesterov=None, padding=None, flip=None,
        arch="preact_resnet50"),
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_a_flag_left_out_has_the_number_of_the_paper_or_of_its_authors_code(script):
    found = vars(importlib.import_module(script).parser().parse_args([]))
    for name, value in DEFAULTS[script].items():
        assert found[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert found["image_size"] is None and found["data"] == "cifar10" and found["seed"] == 0


@pytest.mark.parametrize("script, linf", [("acl", 2), ("amoc", 2), ("advcl", 2), ("byorl", 1.25 * 8 / 4)])
def test_the_length_of_a_step_follows_the_norm_where_no_flag_gives_it(script, linf):
    """In linf it is the paper's or its code's, in l2 it takes 5/4 of the radius in all steps; in 1/255."""
    module = importlib.import_module(script)

    def length(*flags):
        args = module.parser().parse_args(["--steps", "4", *flags])
        return 255 * module.attack_settings(args)["step_size"]

    assert length() == pytest.approx(linf)
    assert length("--norm", "l2", "--eps", "128") == pytest.approx(1.25 * 128 / 4)
    assert length("--norm", "l2", "--eps", "128", "--steps", "0") == pytest.approx(1.25 * 128)  # not an error
    given = ["--step-size", "3"]
    assert length(*given) == length("--norm", "l2", "--eps", "128", *given) == pytest.approx(3)


@pytest.mark.parametrize("script", ["acl", "amoc", "advcl", "byorl"])
def test_a_radius_beyond_the_range_of_pixels_is_for_l2_alone(script):
    module = importlib.import_module(script)
    args = module.parser().parse_args(["--norm", "l2", "--eps", "510"])
    module.check(args)
    assert module.attack_settings(args)["eps"] == 2
    with pytest.raises(ValueError, match="--eps 510: with --norm linf at most 255"):
        module.check(module.parser().parse_args(["--eps", "510"]))


def choices(script, flag):
    actions = importlib.import_module(script).parser()._actions
    return next((action.choices for action in actions if action.dest == flag), None) or ()


MAES_BETAS = {"rotnet": (0.9, 0.95)}


@pytest.mark.parametrize("arch", ["vit_slim", "slim"])
@pytest.mark.parametrize("script", [script for script in SCRIPTS if "adamw" in choices(script, "optimizer")])
def test_adamw_spares_biases_norms_and_fixed_positions(script, arch, monkeypatch, tmp_path):
    """As in adv_mae.py: what has two dimensions or more decays."""
    words = ["--optimizer", "adamw", "--weight-decay", "0.02", "--lr", "0.003", "--arch", arch]
    seen = first_step(importlib.import_module(script), monkeypatch, tmp_path, *SCRIPTS[script], *words)
    opt = seen["opt"]
    assert type(opt) is torch.optim.AdamW and len(opt.param_groups) == 2
    names = {w: name for name, w in seen["net"].named_parameters()}
    held = [(names[w], w, group) for group in opt.param_groups for w in group["params"]]
    assert sorted(name for name, _, _ in held) == sorted(name for w, name in names.items() if w.requires_grad)
    assert {name.split(".")[-1] for w, name in names.items() if not w.requires_grad} <= {"pos_embed"}
    for name, w, group in held:
        assert group["weight_decay"] == (0.02 if w.dim() > 1 else 0), name
        assert group["betas"] == MAES_BETAS.get(script, (0.9, 0.999)) and group["eps"] == 1e-8
    decayed = {name.split(".")[-1] for name, w, group in held if group["weight_decay"]}
    assert decayed <= {"weight", "cls_token"} and not any(
        "norm" in name or "bn" in name for name, w, group in held if group["weight_decay"])


@pytest.mark.parametrize("script", ["acl", "amoc", "advcl", "byorl"])
def test_without_the_flag_the_optimizer_is_the_papers(script):
    args = importlib.import_module(script).parser().parse_args([])
    assert args.optimizer == {"acl": "lars", "byorl": "lars", "amoc": "sgd", "advcl": "sgd"}[script]
