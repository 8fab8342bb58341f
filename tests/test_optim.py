import math

import pytest
import torch
from torch import nn

from common import optim
from tests.recipes import A


def test_cosine_starts_halves_and_ends():
    assert (
        optim.cosine(0, 3.0) == 3.0
        and optim.cosine(0.5, 3.0, 1.0) == 2.0
        and optim.cosine(1, 3.0, 1.0) == 1.0
    )
    assert optim.cosine(0.25, 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert optim.cosine(2, 1.0) == 0.0


def test_warmup_is_linear_then_cosine():
    values = [optim.warmup_cosine(s, 20, 5, 1.0) for s in range(21)]
    assert values[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]) and values[20] == 0
    assert all(a > b for a, b in zip(values[5:], values[6:]))


def test_ema_moves_parameters_and_leaves_buffers():
    target, net = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    nn.init.constant_(net.weight, 3.0)
    net.running_mean += 5
    net.num_batches_tracked += 7
    before = {name: buffer.clone() for name, buffer in target.named_buffers()}
    kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optim.ema(target, net, 0.9)
    torch.testing.assert_close(target.weight, torch.full((4,), 1.2))
    assert all(torch.equal(buffer, before[name]) for name, buffer in target.named_buffers())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in net.state_dict().items())
    assert target.weight.requires_grad and target.weight.grad is None


@pytest.mark.parametrize("m, want", [(0.0, 3.0), (1.0, 1.0)])
def test_ema_at_its_ends_copies_or_stays(m, want):
    target, net = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    nn.init.constant_(net.weight, 3.0)
    optim.ema(target, net, m)
    assert torch.equal(target.weight, torch.full((4,), want))


@pytest.mark.parametrize("m", [-0.1, 1.1, math.nan, math.inf])
def test_an_ema_that_is_no_mean_is_refused_and_changes_nothing(m):
    target, net = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.clone()
    with pytest.raises(ValueError, match=f"m {m}: must be from 0 to 1"):
        optim.ema(target, net, m)
    assert torch.equal(target.weight, before)


def test_an_ema_of_networks_of_two_kinds_is_refused():
    """(2, 3) and (2, 1) would be broadcast."""
    with pytest.raises(ValueError, match="parameters of other shapes"):
        optim.ema(nn.Linear(3, 2), nn.Linear(1, 2), 0.9)


def test_ema_printed_value():
    target, net = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        target.weight.copy_(A(4, 4, 0)), net.weight.copy_(0.1 * A(4, 4, 1))
    optim.ema(target, net, 0.999)
    assert target.weight[1, 1].item() == pytest.approx(-0.3505301974736967, rel=1e-9)


def slow_lars(w, grads, lr, momentum, decay, trust):
    v = [0.0] * len(w)
    for g in grads:
        w_norm, g_norm = math.sqrt(sum(a * a for a in w)), math.sqrt(sum(a * a for a in g))
        q = trust * w_norm / (g_norm + decay * w_norm) if w_norm and g_norm else 1.0
        v = [momentum * a + lr * q * (b + decay * c) for a, b, c in zip(v, g, w)]
        w = [c - a for a, c in zip(v, w)]
    return w


@pytest.mark.parametrize("start", [A(1, 6, 0)[0], torch.zeros(6, dtype=torch.float64)])
def test_lars_equals_a_slow_loop(start):
    w = nn.Parameter(start.clone())
    opt = optim.LARS([w], lr=0.3, momentum=0.8, weight_decay=1e-2, trust=0.05)
    grads = [A(1, 6, p)[0] for p in (1, 2, 3)]
    for g in grads:
        w.grad = g.clone()
        opt.step()
    want = slow_lars(start.tolist(), [g.tolist() for g in grads], 0.3, 0.8, 1e-2, 0.05)
    torch.testing.assert_close(w.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_lars_printed_value():
    w = nn.Parameter(A(4, 4, 0))
    w.grad = 0.1 * A(4, 4, 1)
    optim.LARS([w], lr=0.24, weight_decay=1e-6).step()
    assert w[0, 0].item() == pytest.approx(-0.00018860074348829, rel=1e-9)


def test_lars_without_trust_is_sgd():
    a, b = nn.Parameter(A(3, 3, 0)), nn.Parameter(A(3, 3, 0))
    ours, sgd = optim.LARS([a], 0.1, weight_decay=0, trust=None), torch.optim.SGD([b], 0.1, momentum=0.9)
    for p in range(3):
        a.grad, b.grad = A(3, 3, p), A(3, 3, p)
        ours.step(), sgd.step()
    torch.testing.assert_close(a, b)


def test_lars_takes_a_closure_as_torchs_optimizers_do():
    """It is called once, with gradients on, before the step; its loss is returned. Without one: None."""
    w, v = nn.Parameter(A(3, 2, 0)), nn.Parameter(A(3, 2, 0))
    a, b = optim.LARS([w], 0.5), optim.LARS([v], 0.5)
    seen = []

    def closure():
        assert torch.is_grad_enabled()
        a.zero_grad()
        loss = w.square().sum()
        loss.backward()
        seen.append(w.detach().clone())
        return loss

    for _ in range(2):
        loss = a.step(closure)
        v.grad = 2 * v.detach()
        assert b.step() is None
        assert loss.requires_grad and loss.item() == seen[-1].square().sum().item()
        assert torch.equal(w, v) and not torch.equal(w, seen[-1])
    assert len(seen) == 2
    with torch.no_grad():
        a.step(closure)


@pytest.mark.parametrize("name, value", [
    (name, value) for name in ("lr", "momentum", "weight_decay", "trust")
    for value in (-1.0, math.nan, math.inf)] + [("trust", 0.0)])
@pytest.mark.parametrize("in_group", [False, True])
def test_lars_refuses_numbers_that_make_no_step(name, value, in_group):
    w = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=f"LARS: {name} {value}: must be finite and"):
        if in_group:
            optim.LARS([{"params": [w], name: value}], 0.1)
        else:
            optim.LARS([w], **{"lr": 0.1, name: value})


def test_lars_allows_zeros_and_no_trust():
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.ones(2, 2)
    optim.LARS([{"params": [w], "trust": None}], lr=0.0, momentum=0.0, weight_decay=0.0).step()
    assert torch.equal(w, torch.ones(2, 2))


def names_of(depth):
    stages = [["cls_token", "pos_embed", "patch_embed"], *([f"blocks.{i}"] for i in range(depth))]
    named = {"cls_token": (1, 1, 4), "pos_embed": (1, 5, 4), "patch_embed.proj.weight": (4, 3, 2, 2),
             "patch_embed.proj.bias": (4,), "fc_norm.weight": (4,), "head.weight": (3, 4), "head.bias": (3,),
             **{f"blocks.{i}.mlp.fc1.weight": (8, 4) for i in range(depth)}}
    return stages, {name: nn.Parameter(torch.zeros(shape)) for name, shape in named.items()}


@pytest.mark.parametrize("gamma, want", [
    (0.65, {0: 0.003697, 1: 0.005688, 2: 0.008751, 3: 0.013463, 4: 0.020712, 5: 0.031864, 6: 0.049022, 7: 0.075419,
            8: 0.116029, 9: 0.178506, 10: 0.274625, 11: 0.4225, 12: 0.65, 13: 1}),
    (0.75, {0: 0.023757, 1: 0.031676, 6: 0.133484, 12: 0.75, 13: 1})])
def test_layer_wise_rates_equal_printed_values(gamma, want):
    stages, named = names_of(12)
    groups = optim.groups(named.items(), 0.05, ("cls_token", "pos_embed"), stages, gamma)
    scale = {n: g["scale"] for g in groups for n, w in named.items() if any(w is p for p in g["params"])}
    assert scale.keys() == named.keys()
    depth = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "fc_norm": 13, "head": 13}
    for name, found in scale.items():
        i = int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth[name.split(".")[0]]
        if i in want:
            assert found == pytest.approx(want[i], abs=5e-7), name


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("what", [dict(stages=[["0"], ["1"]], gamma=0.5), dict(exempt=("0.weight",))])
def test_names_of_a_wrapped_network_are_refused_where_names_matter(wrapper, what):
    """There what is meant by a name would be lost without a word."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    named = [(f"{wrapper}{name}", w) for name, w in net.named_parameters()]
    with pytest.raises(ValueError, match="must be those of the bare network, without module"):
        optim.groups(named, 0.1, **what)
    optim.groups(net.named_parameters(), 0.1, **what)
    assert len(optim.groups(named, 0.1)) == len(optim.groups(named, 0.1, stages=[["0"], ["1"]], gamma=1.0)) == 2


def test_groups_hold_each_trained_parameter_once_and_decay_no_vector():
    stages, named = names_of(3)
    named["pos_embed"].requires_grad_(False)
    groups = optim.groups(named.items(), 0.05, ("cls_token",))
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(named) - 1
    for g in groups:
        for p in g["params"]:
            assert g["weight_decay"] == (0 if p.dim() < 2 or p is named["cls_token"] else 0.05)
    assert {g["scale"] for g in groups} == {1.0} and len(groups) == 2


@pytest.mark.parametrize("options, grads, values", [
    (dict(lr=2.0, weight_decay=5e-4, trust=1e-3), [(0.6, 0.8), (-0.3, 0.4)],
     [(2.994, 3.992), (2.99452854, 3.97681600)]),
    (dict(lr=0.5, weight_decay=0.01, trust=0.02, clip=True), [(0.6, 0.8), (-0.3, 0.4)],
     [(2.94, 3.92), (2.93430383, 3.76960000)])])
def test_lars_equals_printed_values(options, grads, values):
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    opt = optim.LARS([w], **options)
    for g, want in zip(grads, values):
        w.grad = w.new_tensor([g])
        opt.step()
        assert w[0].tolist() == pytest.approx(want, abs=5e-9)


def test_clipped_lars_never_steps_faster_than_sgd():
    w, v = (nn.Parameter(50 * A(3, 2, 0)) for _ in range(2))  # a large tensor, a small gradient
    a, b = optim.LARS([w], 0.5, weight_decay=1e-5, clip=True), torch.optim.SGD([v], 0.5, 0.9, weight_decay=1e-5)
    for p in (1, 2, 3):
        w.grad, v.grad = 1e-3 * A(3, 2, p), 1e-3 * A(3, 2, p)
        a.step(), b.step()
    torch.testing.assert_close(w, v, rtol=1e-12, atol=0)
    w.grad = A(3, 2, 1)
    a.param_groups[0]["lr"] = 0.0
    before = w - 0.9 * a.state[w]["momentum"]
    a.step()
    torch.testing.assert_close(w, before)  # no 0 / 0


def test_groups_of_lars_leave_vectors_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).double()
    opt = optim.LARS(optim.lars_groups(net), 0.5, weight_decay=0.1)
    nn.init.constant_(net[1].weight, 1.0)
    for w in net.parameters():
        w.grad = torch.ones_like(w)
    opt.step()
    assert net[1].weight.tolist() == [0.5] * 4  # a step of lr g: neither scaled nor decayed
    assert [w.dim() for w in opt.param_groups[0]["params"]] == [4, 2]
    assert sum(len(g["params"]) for g in opt.param_groups) == 6


def test_the_rate_of_a_group_is_the_common_one_times_its_scale():
    """Of groups that have one; layer decay works through `set_lr` alone, without another line."""
    stages, named = names_of(2)
    for opt in (torch.optim.AdamW(optim.groups(named.items(), 0.05, (), stages, 0.5), 1.0),
                torch.optim.SGD(list(named.values()), 1.0)):
        optim.set_lr(opt, 0.3)
        rates = {name: group["lr"] for group in opt.param_groups for name, w in named.items()
                 if any(w is p for p in group["params"])}
        scales = {"cls_token": 0.125, "blocks.0.mlp.fc1.weight": 0.25, "blocks.1.mlp.fc1.weight": 0.5,
                  "head.weight": 1}
        for name, scale in scales.items():
            assert rates[name] == 0.3 * (scale if isinstance(opt, torch.optim.AdamW) else 1)
