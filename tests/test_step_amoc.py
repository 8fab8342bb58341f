"""Whole steps of amoc.py against the paper: two in a row, and all that they leave behind, by an oracle."""
import pytest
import torch

import amoc
from common.bank import Bank
from tests import steps
from tests.scripts import named

B, K = 4, 7  # images a step, rows of a bank
EPS, STEP_SIZE, STEPS = 40 / 255, 25 / 255, 3
TEMPERATURE, LAM, EMA, WEIGHT_DECAY = 0.4, 0.2, 0.9, 0.01
FLAGS = ["--eps", "40", "--step-size", "25", "--steps", "3", "--temperature", "0.4", "--lam", "0.2",
         "--ema", "0.9"]
L2 = ["--norm", "l2", "--eps", "200", "--step-size", "110"]
HOW = {"linf": (EPS, STEP_SIZE, STEPS, "linf"), "l2": (200 / 255, 110 / 255, STEPS, "l2")}
VARIANTS = ["CCC", "CCA", "CAC", "CAA", "ACC", "ACA", "AAC", "AAA", "ACA_PLUS"]


def step_of_script(variant, norm, net, target, opt, bank_clean, bank_adv, x1, x2, noise):
    more = L2 if norm == "l2" else []
    settings = named(amoc.train_step, amoc, "--variant", variant, *FLAGS, *more)
    return amoc.train_step(net, target, opt, bank_clean, bank_adv, x1, x2, noise, **settings)


# The oracle: AMOC as the paper has it -----------------------------------------------------------------------
def embed(w, x, branch, mode):
    """Unit rows f(x) by one BatchNorm branch, "clean" or "adv"."""
    z = steps.linear(w, "projector", steps.encode(w, x, f"norm.branches.{branch}", mode))
    return z / z.norm(dim=1, keepdim=True)


def info_nce(q, k, bank):
    """Eq. 3.1, one image and one negative at a time."""
    total = 0.0
    for i in range(len(q)):
        positive = (q[i] @ k[i] / TEMPERATURE).exp()
        negative = sum((q[i] @ row / TEMPERATURE).exp() for row in bank)
        total = total - (positive / (positive + negative)).log()
    return total / len(q)


def enqueue(bank, keys):
    """Every key over the oldest row."""
    bank["rows"] = bank["rows"].clone()
    for key in keys:
        bank["rows"][bank["pointer"]] = key
        bank["pointer"] = (bank["pointer"] + 1) % K


def step_of_paper(variant, query, key, clean, adv, momentum, x1, x2, noise, lr, how):
    """One iteration. `query` and `key` are the networks, `clean` and `adv` the banks. The letters of a
    variant tell of query, key and bank of L_*: A is attacked, or adversarial, and C is clean."""
    branch = {"A": "adv", "C": "clean"}
    query_is, key_is, bank_is = variant[:3]
    negatives = adv["rows"] if bank_is == "A" else clean["rows"]

    # Eq. 3.3: the attacked views move, by the running statistics of the step before; the other is clean
    def l_star(view1, view2):
        q = embed(query, view1, branch[query_is], "eval")
        k = embed(key, view2, branch[key_is], "eval")
        return info_nce(q, k, negatives)

    x1_adv, x2_adv = x1, x2
    if query_is + key_is == "AC":
        (x1_adv,) = steps.attack(lambda view1: l_star(view1, x2), [x1], [noise[:, 0]], *how)
    if query_is + key_is == "CA":
        (x2_adv,) = steps.attack(lambda view2: l_star(x1, view2), [x2], [noise[:, 1]], *how)
    if query_is + key_is == "AA":
        x1_adv, x2_adv = steps.attack(l_star, [x1, x2], [noise[:, 0], noise[:, 1]], *how)

    # Eq. 3.4
    q = embed(query, x1, "clean", "train")
    k = embed(key, x2, "clean", "train").detach()
    loss = loss_clean = info_nce(q, k, clean["rows"])
    losses = {"loss": loss}
    if variant != "CCC":
        q_a = embed(query, x1_adv, "adv", "train") if query_is == "A" else q
        k_a = embed(key, x2_adv, "adv", "train").detach() if key_is == "A" else k
        pushed = embed(key, x1_adv, "adv", "train").detach() if variant == "ACA_PLUS" else k_a
        loss_adv = info_nce(q_a, k_a, negatives)
        loss = LAM * loss_clean + (1 - LAM) * loss_adv
        losses = {"loss": loss, "loss_clean": loss_clean, "loss_adv": loss_adv}
    steps.sgd(query, loss, momentum, lr, WEIGHT_DECAY)

    # Eq. 3.2, and the banks
    steps.moving_average(key, query, EMA)
    enqueue(clean, k)
    if key_is == "A" or variant == "ACA_PLUS":
        enqueue(adv, pushed)
    return losses


# The comparison ---------------------------------------------------------------------------------------------
def network(seed):
    branches = ("clean", "adv")
    net = steps.sequential(encoder=steps.encoder(48, 6, branches), projector=torch.nn.Linear(6, 5))
    return steps.scrambled(net, seed)


def filled_bank(seed, pointer):
    """Unit rows, and a pointer so near the end that one step wraps."""
    bank = Bank(K, 5).double()
    rows = steps.noise((K, 5), seed)
    bank.rows.copy_(rows / rows.norm(dim=1, keepdim=True))
    bank.pointer = pointer
    return bank


def test_all_variants_are_here():
    assert set(VARIANTS) == set(amoc.VARIANTS)


@pytest.mark.parametrize("variant, norm", [
    *((variant, "linf") for variant in VARIANTS), ("ACC", "l2"), ("CAA", "l2"), ("AAC", "l2")])
def test_two_steps_of_every_variant_are_those_of_the_paper(variant, norm):
    net, target = network(1), network(2).requires_grad_(False)
    bank_clean, bank_adv = filled_bank(3, 5), filled_bank(4, 4)
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY)

    query, key, momentum = steps.plain(net), steps.plain(target), {}
    clean, adv = ({"rows": bank.rows.clone(), "pointer": bank.pointer} for bank in (bank_clean, bank_adv))

    for number, lr in enumerate([0.5, 0.3]):
        x1, x2 = steps.images((2, B, 3, 4, 4), 10 + number)
        noise = steps.noise((B, 2, 3, 4, 4), 20 + number)
        if norm == "l2":
            noise = steps.l2_noise(noise)
        inputs = [t.clone() for t in (x1, x2, noise)]
        steps.set_lr(opt, lr)
        found = step_of_script(variant, norm, net, target, opt, bank_clean, bank_adv, *inputs)
        wanted = step_of_paper(
            variant, query, key, clean, adv, momentum, x1, x2, noise, lr, HOW[norm])

        what = f"{variant}, {norm}, step {number}"
        steps.assert_same(found, wanted, f"{what}, losses")
        steps.assert_same(net.state_dict(), query, f"{what}, query network")
        steps.assert_same(target.state_dict(), key, f"{what}, key network")
        steps.assert_same(steps.momenta(net, opt), momentum, f"{what}, momentum")
        steps.assert_same({"clean": bank_clean.rows, "adv": bank_adv.rows},
                          {"clean": clean["rows"], "adv": adv["rows"]}, f"{what}, banks")
        assert (bank_clean.pointer, bank_adv.pointer) == (clean["pointer"], adv["pointer"]), what
        steps.assert_whole(net, "clean")
        steps.assert_whole(target, "clean")
        assert all(torch.equal(a, b) for a, b in zip(inputs, (x1, x2, noise))), "inputs are not changed"


def test_a_run_hands_the_step_what_the_paper_starts_with(monkeypatch, tmp_path):
    seen = steps.first_step(amoc, monkeypatch, tmp_path, "--bank-size", "24", "--weight-decay", "0.02",
                            "--lr", "0.7", "--warmup", "0")
    steps.assert_optimizer(seen["opt"], seen["net"], torch.optim.SGD, lr=0.7, momentum=0.9, weight_decay=0.02,
                           dampening=0, nesterov=False)
    steps.assert_copy(seen["target"], seen["net"])
    steps.assert_views(seen["x1"], seen["x2"])
    steps.assert_noise(seen["noise"], (16, 2, 3, 32, 32))
    for bank in (seen["bank_clean"], seen["bank_adv"]):
        assert bank.rows.shape == (24, 128) and bank.pointer == 0
    assert not torch.allclose(seen["bank_clean"].rows, seen["bank_adv"].rows)
