"""The mathematics of adios.py against slow float64 loops, and printed values (eight digits)."""
import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adios
from common import data, optim, run
from common.unet import UNet
from tests import masks as figure_ground
from tests import steps2
from tests.processes import in_two_processes
from tests.recipes import A, X, Z
from tests.scripts import named_by, read_flags

Z1 = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
Z2 = torch.tensor([[1, 0.5], [-0.5, 1], [0.2, 1]], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------
# Masks
# ----------------------------------------------------------------------------------------------------------
def slow_penalty(masks):
    total = 0.0
    for image in masks:
        for mask in image:
            area = sum(v for row in mask for v in row) / mask.numel()
            total = total + 1 / torch.sin(math.pi * area).clamp_min(1e-4)
    return total / len(masks)


def hard(*counts):
    """One 4 x 4 image whose masks have so many pixels."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return F.one_hot(owner, len(counts)).T.reshape(1, -1, 4, 4).double()


@pytest.mark.parametrize("N, value", [(2, 2), (3, 3.46410162), (4, 5.65685425), (6, 12), (8, 20.90500744)])
def test_equal_areas_give_the_least_penalty(N, value):
    masks = torch.full((2, N, 3, 3), 1 / N, dtype=torch.float64)
    assert adios.mask_penalty(masks).item() == pytest.approx(value, abs=5e-9)
    assert value == pytest.approx(N / math.sin(math.pi / N), abs=5e-9)
    other = (masks + 0.1 * torch.arange(N)[:, None, None]).softmax(1)
    assert adios.mask_penalty(other) > 1.001 * value


def test_the_penalty_and_its_gradient_equal_slow_loops_and_printed_values():
    masks = torch.cat([hard(8, 4, 4), hard(2, 6, 8)])
    found = []
    for penalty in (adios.mask_penalty, slow_penalty):
        m = masks.clone().requires_grad_()
        value = penalty(m)
        found.append([value, *torch.autograd.grad(value, m)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert found[0][0].item() == pytest.approx(4.26197263, abs=5e-9)
    want = masks.new_tensor([[0, -0.13884009, -0.13884009], [-0.61934968, -0.04401583, 0]])
    torch.testing.assert_close(found[0][1], want[:, :, None, None].expand_as(masks), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("area, value", [(0.9, 6.47213595), (1.0, 20000), (0.0, 20000), (0.5, 2)])
def test_the_penalty_is_finite_everywhere(dtype, area, value):
    m = torch.stack([torch.full((4, 4), area), torch.full((4, 4), 1 - area)])[None].to(dtype).requires_grad_()
    penalty = adios.mask_penalty(m)
    assert penalty.item() == pytest.approx(value, rel=1e-6)
    assert torch.autograd.grad(penalty, m)[0].isfinite().all()


def test_occlude_equals_printed_values():
    x = torch.arange(12, dtype=torch.float64).view(1, 3, 2, 2) / 10
    mask = x.new_tensor([[[0, 0.25], [0.5, 1]]])
    found = adios.occlude(x, mask, x.new_tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1))[0].flatten(1)
    assert found[0].tolist() == pytest.approx([0, 0.19785, 0.3457, 0.4914], abs=1e-12)
    assert found[2].tolist() == pytest.approx([0.8, 0.786625, 0.72325, 0.4465], abs=1e-12)


def test_a_removed_pixel_is_zero_to_the_encoder():
    net, masker = adios.network("slim", "simclr", 32), UNet(2, 8, 32, adios.MEAN, adios.STD)
    x = adios.occlude(torch.rand(1, 3, 32, 32), torch.ones(1, 32, 32), masker.mean)
    torch.testing.assert_close((x - net[0].mean) / net[0].std, torch.zeros_like(x), rtol=0, atol=1e-6)


@pytest.fixture
def bfloat16(monkeypatch):
    """What CUDA has, on a CPU."""
    monkeypatch.setattr(run, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))


def test_masks_sum_to_one_in_float32_whatever_the_autocast(bfloat16):
    masks = adios.propose(UNet(4, 8, 32), torch.rand(2, 3, 32, 32))
    assert masks.dtype == torch.float32 and masks.shape == (2, 4, 32, 32) and masks.min() > 0
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 32, 32))


class Given(nn.Module):
    """A masker whose logits are its parameter, whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits


def test_one_mask_is_a_sigmoid_with_its_value_and_gradient():
    logits = torch.linspace(-6, 6, 2 * 4 * 4, dtype=torch.float64).view(2, 1, 4, 4)
    masker = Given(logits)
    mask = adios.propose(masker, logits)
    weight = X(2, 1, 4, 4)
    (mask * weight).sum().backward()
    for value, v in zip(mask.flatten().tolist(), logits.flatten().tolist()):
        assert value == pytest.approx(1 / (1 + math.exp(-v)), rel=1e-12)
    for value, v, w in zip(masker.logits.grad.flatten(), logits.flatten().tolist(), weight.flatten().tolist()):
        assert value.item() == pytest.approx(w / (2 + math.exp(v) + math.exp(-v)), rel=1e-9)


def test_two_masks_of_which_one_is_constant_are_the_one_mask_and_its_rest():
    """A sigmoid is a softmax with 0; the penalty then has two equal terms."""
    logits = 2 * X(3, 1, 4, 4) - 0.6
    one = adios.propose(Given(logits), logits)
    two = adios.propose(Given(torch.cat([logits, 0 * logits], 1)), logits)
    torch.testing.assert_close(two, torch.cat([one, 1 - one], 1), rtol=1e-12, atol=0)
    assert 2 * adios.mask_penalty(one).item() == pytest.approx(adios.mask_penalty(two).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_penalty_of_one_mask_is_least_at_a_half_and_forbids_all_and_nothing(dtype):
    areas = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    found = [adios.mask_penalty(torch.full((2, 1, 4, 4), area, dtype=dtype)).item() for area in areas]
    assert found == pytest.approx([10000, 3.23606798, 1.23606798, 1, 1.23606798, 3.23606798, 10000], rel=1e-6)


def test_a_single_random_mask_removes_half_and_is_the_first_of_two():
    numbers = [data.Rng((0,), 500, slice(500)) for _ in range(2)]
    one, two = (adios.control(rng, 32, arguments(masker="random", masks=n), "cpu") for rng, n in zip(numbers, (1, 2)))
    assert one.shape == (500, 1, 32, 32) and torch.equal(one, two[:, :1])
    assert one.mean().item() == pytest.approx(0.5, abs=0.02)


def test_random_masks_are_hard_and_smooth_and_have_equal_areas():
    masks = adios.control(data.Rng((0,), 500, slice(500)), 32, arguments(masker="random", masks=3), "cpu")
    assert set(masks.unique().tolist()) == {0, 1} and torch.equal(masks.sum(1), torch.ones(500, 32, 32))
    torch.testing.assert_close(masks.mean((0, 2, 3)), torch.full((3,), 1 / 3), rtol=0, atol=0.02)
    assert masks.diff(dim=3).abs().mean() < 0.1  # of independent pixels: 4/9
    none = adios.control(data.Rng((0,), 5, slice(5)), 32, arguments(masker="none", objective="simsiam"), "cpu")
    assert none.shape == (10, 1, 32, 32) and none.abs().sum() == 0
    assert adios.control(data.Rng((0,), 5, slice(5)), 32, arguments(), "cpu") is None


# ----------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------
def cos(a, b):
    return torch.dot(a, b) / (torch.dot(a, a).sqrt() * torch.dot(b, b).sqrt())


def slow_simclr(z1, z2, T):
    """One anchor at a time."""
    z, total = [*z1, *z2], 0.0
    for i in range(len(z)):
        others = sum(torch.exp(cos(z[i], z[k]) / T) for k in range(len(z)) if k != i)
        total = total - torch.log(torch.exp(cos(z[i], z[(i + len(z1)) % len(z)]) / T) / others)
    return total / len(z)


def slow_simsiam(p, z):
    return sum(-cos(a, b) for a, b in zip(p, z.detach())) / len(p)


def slow_byol(p, z):
    return sum(2 - 2 * cos(a, b) for a, b in zip(p, z.detach())) / len(p)


@pytest.mark.parametrize("z1, z2, T, value", [
    (Z1, Z2, 0.1, 1.02051882), (Z1, Z2, 0.2, 0.96551028), (Z1, Z2, 0.5, 1.15287626),
    (A(5, 8, 0), Z(5, 8), 0.2, None)])
def test_simclr_equals_slow_loops_and_printed_values(z1, z2, T, value):
    found = []
    for loss_of in (adios.simclr_loss, slow_simclr):
        a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
        loss = loss_of(a, b, T)
        found.append([loss, *torch.autograd.grad(loss, (a, b))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    if value:
        assert found[0][0].item() == pytest.approx(value, abs=5e-9)
    if value and T == 0.2:
        want = ([[0, -0.06912987], [0.78264915, 0], [0.49593371, -0.49593371]],
                [[-0.30906808, 0.61813615], [-0.05414747, -0.02707374], [-0.96470376, 0.19294075]])
        for g, printed in zip(found[0][1:], want):
            torch.testing.assert_close(g, g.new_tensor(printed), rtol=0, atol=1e-8)


def test_equal_rows_give_the_chance_value():
    z = torch.ones(6, 4, dtype=torch.float64)
    assert adios.simclr_loss(z, z, 0.2).item() == pytest.approx(math.log(11), rel=1e-12)


@pytest.mark.parametrize("loss_of, slow, value", [
    (adios.byol_loss, slow_byol, 0.25273022), (adios.simsiam_loss, slow_simsiam, -0.87363489)])
def test_cosine_losses_equal_slow_loops_and_printed_values(loss_of, slow, value):
    p, z = Z1.clone().requires_grad_(), Z2.clone().requires_grad_()
    loss = loss_of(p, z)
    assert loss.item() == pytest.approx(value, abs=5e-9)
    found = torch.autograd.grad(loss, (p, z), allow_unused=True)
    torch.testing.assert_close(found[0], torch.autograd.grad(slow(p, z), p)[0], rtol=1e-9, atol=1e-12)
    assert found[1] is None  # the second argument is a constant


# ----------------------------------------------------------------------------------------------------------
# The step
# ----------------------------------------------------------------------------------------------------------
def arguments(**flags):
    return SimpleNamespace(**{**vars(adios.parser().parse_args([])), **flags})


def train_step(net, target, masker, opt, opt_mask, x1, x2, control_masks, pick, tau, args):
    settings = named_by(adios.train_step, adios, args, tau=tau)
    return adios.train_step(net, target, masker, opt, opt_mask, x1, x2, control_masks, pick, **settings)


def disagreement(net, target, x1, x2, z1_target, occluded, for_masker, args):
    return adios.disagreement(net, target, x1, x2, z1_target, occluded, objective=args.objective,
                              temperature=args.temperature, for_masker=for_masker)


def matrices(objective):
    """Encoder, projector and, but for simclr, predictor as plain matrices on images of side 16."""
    sizes = [(768, 8), (8, 6), (6, 6)][: 2 if objective == "simclr" else 3]
    parts = [nn.Linear(n, m, bias=False).double() for n, m in sizes]
    for i, part in enumerate(parts):
        part.weight.data = A(*part.weight.shape, i) / (20 if i == 0 else 1)
    return nn.Sequential(nn.Sequential(nn.Flatten(), parts[0]), *parts[1:])


def pieces(objective, masks=3):
    torch.manual_seed(0)
    net, masker = matrices(objective), UNet(masks, 8, 16, adios.MEAN, adios.STD).double()
    with torch.no_grad():
        masker.head.weight.mul_(20)  # masks that differ
    target = None
    if objective == "byol":
        target = copy.deepcopy(net[:2]).requires_grad_(False)
        with torch.no_grad():
            target[1].weight.mul_(0.5).add_(0.1)
    return net, target, masker


x1 = X(4, 3, 16, 16)
x2 = x1.flip(2) ** 2
pick = torch.tensor([[0.1, 0.9], [0.5, 0.0], [0.99, 0.4], [0.34, 0.32]], dtype=torch.float64)
PICKED = [[0, 2], [1, 0], [2, 1], [1, 0]]  # of three masks


def slow_sum(objective, net, target, masker, m1, m2):
    """Every term of the objective, with nothing shared, summed over the masks m1, m2: lists of (B, S, S)."""
    def hide(x, m):
        return x * (1 - m[:, None]) + masker.mean * m[:, None]

    total = 0.0
    for a, b in zip(m1, m2):
        y1, y2 = hide(x1, a), hide(x2, b)
        if objective == "simclr":
            total = total + slow_simclr(net(x1), net(y2), 0.2)
        elif objective == "byol":
            total = total + slow_byol(net(x1), target(y2)) + slow_byol(net(y2), target(x1))
        else:
            f = net[:2]
            for left, right in ((y1, x2), (y2, x1), (x2, y1), (x1, y2), (x1, x2), (x2, x1), (y1, y2), (y2, y1)):
                total = total + slow_simsiam(net(left), f(right)) / 8
    return total


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("objective", ["simclr", "byol", "simsiam"])
def test_train_step_is_the_algorithm_read_aloud(objective, single):
    net, target, masker = pieces(objective)
    slow, old, slow_masker = copy.deepcopy(net), copy.deepcopy(target), copy.deepcopy(masker)
    args = arguments(objective=objective, single=single, mask_weight=0.3)
    opts = [torch.optim.SGD(part.parameters(), 0.05) for part in (net, masker)]
    losses = train_step(net, target, masker, *opts, x1, x2, None, pick, 0.9, args)

    def masks_of(x, phase):
        masks = slow_masker(x).softmax(1)
        if single:
            return masks, [torch.stack([image[i[phase]] for image, i in zip(masks, PICKED)])]
        return masks, list(masks.unbind(1))

    with torch.no_grad():
        (_, m1), (_, m2) = masks_of(x1, 0), masks_of(x2, 0)
    loss = slow_sum(objective, slow, old, masker, m1, m2)
    loss.backward()
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    for w, v in zip(net.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(w.grad, v.grad, rtol=1e-8, atol=1e-12)
        v.data -= 0.05 * v.grad
        torch.testing.assert_close(w, v, rtol=1e-9, atol=1e-12)
    (all1, m1), (all2, m2) = masks_of(x1, 1), masks_of(x2, 1)
    penalty = slow_penalty(all2) + (slow_penalty(all1) if objective == "simsiam" else 0)
    J = slow_sum(objective, slow, old, masker, m1, m2) - 0.3 * penalty  # by the new encoder
    wanted = torch.autograd.grad(-J, list(slow_masker.parameters()))
    assert losses["penalty"].item() == pytest.approx(penalty.item(), rel=1e-9)
    for w, was, g in zip(masker.parameters(), slow_masker.parameters(), wanted, strict=True):
        torch.testing.assert_close(w.grad, g, rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(w, was - 0.05 * g, rtol=1e-9, atol=1e-11)
    if target:
        for xi, was, theta in zip(target.parameters(), old.parameters(), net.parameters()):
            torch.testing.assert_close(xi, was + 0.1 * (theta - was), rtol=1e-9, atol=1e-12)


def real(objective="simclr"):
    torch.manual_seed(0)
    net = adios.network("slim", objective, 32)
    target = copy.deepcopy(net[:2]).requires_grad_(False) if objective == "byol" else None
    masker = UNet(3, 8, 32, adios.MEAN, adios.STD)
    x1, x2 = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    opts = [torch.optim.SGD(part.parameters(), 0.01) for part in (net, masker)]
    return net, target, masker, *opts, x1, x2


@pytest.mark.parametrize("objective", ["simclr", "byol", "simsiam"])
def test_each_step_leaves_the_other_network_alone(objective):
    """Without the masker's step the encoder ends with the same weights, gradients and statistics, bit for bit;
    and the encoder's step gives the masker no gradient."""
    found = []
    for masker_steps in (True, False):
        net, target, masker, opt, opt_mask, x1, x2 = real(objective)
        views = torch.cat([x1, x2]) if objective == "simsiam" else x2
        given = None if masker_steps else adios.propose(masker, views).detach()
        train_step(net, target, masker, opt, opt_mask, x1, x2, given, torch.rand(8, 2), 0.9,
                         arguments(objective=objective))
        found.append([*net.state_dict().values(), *(p.grad for p in net.parameters())])
        assert all((p.grad is not None) == masker_steps for p in masker.parameters())
        assert all(m.training for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("objective", ["simclr", "byol", "simsiam"])
def test_the_maskers_loss_makes_gradients_of_the_masker_alone(objective, monkeypatch):
    """The graph of its loss ends in the masker's weights, all of them and no others; in the encoder's step, in
    the encoder's."""
    net, target, masker, opt, opt_mask, x1, x2 = real(objective)
    ends = {}

    def traced(*given, for_masker, **named):
        loss = whole(*given, for_masker=for_masker, **named)
        ends[for_masker] = leaves(loss)
        return loss

    whole = adios.disagreement
    monkeypatch.setattr(adios, "disagreement", traced)
    train_step(net, target, masker, opt, opt_mask, x1, x2, None, torch.rand(8, 2), 0.9,
               arguments(objective=objective))
    assert ends == {False: set(net.parameters()), True: set(masker.parameters())}
    assert all(w.requires_grad for w in net.parameters())


def leaves(loss):
    """The tensors that a backward pass from `loss` gives a gradient."""
    found = set()
    seen = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("objective, single, passes", [
    ("simclr", False, 4), ("simclr", True, 2), ("byol", False, 4), ("simsiam", False, 8)])
def test_running_statistics_move_once_an_input_of_the_encoders_step(objective, single, passes):
    net, target, masker, *rest = real(objective)
    train_step(net, target, masker, *rest, None, torch.rand(8, 2), 0.9,
                     arguments(objective=objective, single=single))
    assert net[0].bn1.num_batches_tracked == passes


def test_the_maskers_step_climbs():
    net, _, masker, opt, opt_mask, x1, x2 = real()
    opt.param_groups[0]["lr"], args, J = 0.0, arguments(), []
    for _ in range(4):
        losses = train_step(net, None, masker, opt, opt_mask, x1, x2, None, torch.rand(8, 2), 0.9, args)
        J.append((losses["loss_mask"] - 0.9 * losses["penalty"]).item())
    assert J == sorted(J) and J[-1] > J[0]


def test_under_autocast_the_masker_meets_the_updated_encoder(bfloat16):
    net, _, masker, opt, opt_mask, x1, x2 = real()
    opt.param_groups[0]["lr"], u = 1.0, torch.rand(8, 2)
    with torch.no_grad():
        masks = adios.propose(masker, x2)
    losses = train_step(net, None, masker, opt, opt_mask, x1, x2, None, u, 0.9, arguments())
    occluded = [adios.occlude(x2, m, masker.mean) for m in masks.unbind(1)]
    with torch.no_grad():
        want = disagreement(net, None, x1, x2, None, occluded, True, arguments())
    assert losses["loss_mask"].item() == pytest.approx(want.item(), rel=1e-6)
    assert abs(losses["loss_mask"] - losses["loss"]) > 1e-3 * losses["loss"]


def test_without_a_mask_it_is_simclr():
    net, _, masker, opt, opt_mask, x1, x2 = real()
    want = adios.simclr_loss(net(x1), net(x2), 0.2)
    losses = train_step(net, None, masker, opt, opt_mask, x1, x2, torch.zeros(8, 1, 32, 32),
                              torch.rand(8, 2), 0.9, arguments())
    assert losses.keys() == {"loss"} and losses["loss"].item() == pytest.approx(want.item(), rel=1e-6)


def weights(rank, world):
    """All weights after one step of simclr on this process's share of the images; no BatchNorm."""
    net, _, masker = pieces("simclr")
    args, opts = arguments(), [torch.optim.SGD(part.parameters(), 0.05) for part in (net, masker)]
    train_step(net, None, masker, *opts, *(v.chunk(world)[rank] for v in (x1, x2)), None,
                     pick.chunk(world)[rank], 0.9, args)
    return [w.detach() for part in (net, masker) for w in part.parameters()]


def test_two_processes_equal_one(tmp_path):
    one = weights(0, 1)
    for found in in_two_processes(weights, tmp_path):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12)


def test_mae_is_the_mean_over_pixels_and_moves_both_networks():
    torch.manual_seed(0)
    net, masker, x = adios.network("vit_slim", "mae", 32), UNet(3, 8, 32), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        masks = adios.propose(masker, x)
        want = 0.0
        for n in range(3):
            rebuilt = adios.rebuild(net, adios.occlude(x, masks[:, n], masker.mean))
            want += sum((a - b) ** 2 for a, b in zip(rebuilt.flatten(), x.flatten())) / x.numel()
    before = [copy.deepcopy(part.state_dict()) for part in (net, masker)]
    opts = [torch.optim.SGD(part.parameters(), 0.01) for part in (net, masker)]
    losses = train_step(net, None, masker, *opts, x, x, None, torch.rand(4, 2), 0.9, arguments(objective="mae"))
    assert losses["loss"].item() == pytest.approx(want.item(), rel=1e-4)
    for part, old in zip((net, masker), before):
        assert any(not torch.equal(v, old[k]) for k, v in part.state_dict().items())


def test_one_mask_hides_most_of_the_image_without_the_penalty_and_about_half_with_it(monkeypatch):
    """Of Eq. 11, by a network that copies what it sees and stands still, so that the error is the mean of
    ((x - colour) m)^2. In both cases the mask goes where the pixels differ most from the colour."""
    monkeypatch.setattr(adios, "rebuild", copied)
    ends = {}
    for weight in (0.0, 0.1):
        net = nn.Linear(1, 1).double()
        masker = Given(torch.full((4, 1, 16, 16), math.log(3), dtype=torch.float64))  # 3/4
        masker.mean = torch.tensor(adios.MEAN, dtype=torch.float64).view(3, 1, 1)
        opts = [torch.optim.SGD(net.parameters(), 0.0), torch.optim.SGD(masker.parameters(), 1000.0)]
        args = arguments(objective="mae", masks=1, mask_weight=weight)
        losses = []
        for _ in range(100):
            losses.append(train_step(net, None, masker, *opts, x1, x2, None, pick, None, args))
        mask = masker.logits.detach().sigmoid()[:, 0]
        away = (x1 - masker.mean).square().sum(1)
        assert torch.corrcoef(torch.stack([mask.flatten(), away.flatten()]))[0, 1] > 0.5
        ends[weight] = mask.mean().item()
    assert ends[0.0] > 0.9 and 0.4 < ends[0.1] < 0.7
    assert losses[-1]["penalty"] < losses[0]["penalty"]


def copied(net, x):
    return x + 0 * net(x[..., :1])


class Fixed(nn.Module):
    """A network that gives the same `rows` (B, D) whatever it sees."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        return self.rows[: len(x)]


@pytest.mark.parametrize("more, terms", [({}, 4), ({"single": True}, 1), ({"masker": "none"}, 1), ({"masks": 3}, 3), ({"masks": 1}, 1)])
@pytest.mark.parametrize("objective", ["simclr", "byol", "simsiam"])
def test_the_chance_loss_that_is_printed_is_that_of_an_encoder_that_knows_nothing(objective, more, terms):
    """All projections alike (simclr); predictions orthogonal to all targets (byol, simsiam)."""
    args = arguments(objective=objective, batch_size=4, **more)
    occluded = [x2.repeat(len(adios.MASKED[objective]), 1, 1, 1)] * terms
    one, other = (torch.eye(6, dtype=torch.float64)[i].expand(8, 6) for i in (0, 1))
    z, p = Fixed(one), Fixed(other)
    net = nn.Sequential(nn.Identity(), z, p) if objective != "simclr" else z
    loss = disagreement(net, z, x1, x2, one[:4], occluded, False, args)
    printed = re.search(r"chance loss (?:\d ln.* = )?([\d.]+)", adios.chance(args))[1]
    assert loss.item() == pytest.approx(float(printed), abs=5e-4)
    assert "best" not in adios.chance(args) or f"{0 if objective == 'byol' else -terms} at best" in adios.chance(args)


# ----------------------------------------------------------------------------------------------------------
# Schedules, flags, figure and ground
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("progress, tau", [
    (0, 0.99), (0.1, 0.99024472), (0.25, 0.99146447), (0.5, 0.995), (0.75, 0.99853553), (1, 1)])
def test_tau_equals_printed_values(progress, tau):
    assert optim.cosine(progress, 0.99, 1.0) == pytest.approx(tau, abs=5e-9)


@pytest.mark.parametrize("epoch, lr", [(0, 0.003), (5, 0.1015), (10, 0.2), (105, 0.1), (200, 0)])
def test_learning_rate_by_epoch(epoch, lr):
    assert adios.lr_at(epoch, 200, 0.2, 10) == pytest.approx(lr, abs=1e-12)


def test_a_rate_below_the_warm_ups_start_is_never_exceeded():
    assert [adios.lr_at(e, 20, 0.001, 10) for e in (0, 5, 10)] == pytest.approx([0.001] * 3)


@pytest.mark.parametrize("objective, sizes", [
    ("simclr", [512 * 2048 + 2048 + 2048 * 128 + 128]),
    ("byol", [512 * 4096 + 3 * 4096 + 4096 * 256 + 256, 256 * 8192 + 3 * 8192 + 8192 * 256 + 256]),
    ("simsiam", [512 * 2048 + 2 * 2048**2 + 7 * 2048, 2048 * 512 + 3 * 512 + 512 * 2048 + 2048])])
def test_network_sizes_and_heads(objective, sizes):
    net = adios.network("resnet18", objective, 32)
    assert [sum(p.numel() for p in part.parameters()) for part in net] == [11_168_832, *sizes]


def test_defaults():
    want = dict(objective="simclr", masker="learned", masks=4, single=False, mask_weight=None, mask_width=16,
                mask_lr=0.03, epochs=200, batch_size=256, lr=0.2, warmup=10, weight_decay=None, temperature=0.2,
                ema=0.99, arch="resnet18", data="cifar10")
    args = vars(adios.parser().parse_args([]))
    assert {k: args[k] for k in want} == want


@pytest.mark.parametrize("objective, weight, decay", [
    ("simclr", 0.9, 1e-4), ("byol", 0.4, 1e-5), ("simsiam", 0.2, 1e-5), ("mae", 0.9, 1e-4)])
@pytest.mark.parametrize("given", [[], ["--mask-weight", "0.7", "--weight-decay", "0.003"], ["--mask-weight", "0", "--weight-decay", "0"]])
def test_weight_of_the_penalty_and_decay_are_those_of_the_objective(objective, weight, decay, given, tmp_path, monkeypatch):
    flags = ["--objective", objective, "--arch", "vit_slim", "--mask-width", "8", "--warmup", "0", *given]
    seen = {}

    def settings(args):
        seen.update(attack_settings(args))
        return attack_settings(args)

    attack_settings = adios.attack_settings
    monkeypatch.setattr(adios, "attack_settings", settings)
    _, opts = steps2.optimizers_of_main(adios, flags, tmp_path, monkeypatch)
    if given:
        weight, decay = float(given[1]), float(given[3])
    assert seen["mask_weight"] == weight and seen["objective"] == objective
    assert [opt.param_groups[0]["weight_decay"] for opt in opts] == [decay, decay]


def test_a_control_has_no_masker_and_so_runs_at_sizes_that_a_u_net_refuses(tmp_path):
    flags = ["--data", "shapes", "--limit", "8", "--arch", "slim", "--batch-size", "4", "--epochs", "1", "--warmup", "0",
             "--image-size", "36", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="image size 36 of a U-Net"):
        adios.main(flags)
    for kind in ("random", "none"):
        adios.main([*flags, "--out", str(tmp_path / kind), "--masker", kind])
        saved = torch.load(tmp_path / kind / "last.pt", weights_only=True)["state"]
        assert set(saved) == {"net", "opt", "log"}


@pytest.mark.parametrize("flags, words", [
    (["--objective", "moco"], "--objective moco: choose one of simclr, byol, simsiam, mae"),
    (["--masker", "best"], "--masker best: choose one of learned, random, none"),
    (["--masks", "0"], "--masks 0: must be"), (["--ema", "2"], "--ema 2: must be a number from 0 to 1"),
    (["--mask-weight", "-1"], "--mask-weight -1: must be"),
    (["--temperature", "0"], "--temperature 0: must be"),
    (["--objective", "mae"], "--arch resnet18: --objective mae needs one of vit")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(adios, *flags)


@pytest.mark.parametrize("more", [
    ["--objective", "byol", "--single"], ["--objective", "simsiam"], ["--masks", "1"],
    ["--masker", "random"], ["--masker", "none"], ["--objective", "mae", "--arch", "vit_slim"]])
def test_every_kind_of_run_ends_and_its_masks_can_be_measured(more, tmp_path):
    flags = ["--data", "shapes", "--limit", "16", "--arch", "slim", "--batch-size", "8", "--epochs", "1",
             "--warmup", "0"]
    adios.main([*flags, "--mask-width", "8", "--device", "cpu", "--out", str(tmp_path), *more])
    assert (tmp_path / "masks.png").stat().st_size > 1000 and (tmp_path / "encoder.pt").exists()
    found = figure_ground.measure(tmp_path, n=50)
    assert all(0 < v < 1 for v in found.values()) and ("masker" in found) == ("--masker" not in more)


def test_iou_is_one_for_the_truth_and_known_for_halves():
    figure = torch.zeros(2, 4, 4, dtype=torch.bool)
    figure[0, :2], figure[1, :, :1] = True, True
    truth = torch.stack([figure, ~figure], 1).float()
    assert figure_ground.best_iou(truth, figure) == 1
    halves = torch.zeros(2, 2, 4, 4)
    halves[:, 0, :, :2], halves[:, 1, :, 2:] = 1, 1
    assert figure_ground.best_iou(halves, figure) == pytest.approx((1 / 3 + 1 / 2) / 2)
