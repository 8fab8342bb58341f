import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import encoders
from common.pgd import (NORMS, check_box, direction, eval_mode, frozen_stats, frozen_weights, ball_point, pgd, project,
                        project_l1_box, uniform)
from tests.recipes import A, X, Z

W = 0.1 * Z(5, 192)
x0, y0 = X(4, 3, 8, 8), torch.arange(4)
EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0, "l1_dense": 3.0}
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1, "l1_dense": 1}


def ce(x):
    return F.cross_entropy(x.flatten(1) @ W.T, y0)


@pytest.mark.parametrize(
    "norm, eps, step, steps, total, weighted, after",
    [
        ("linf", 8 / 255, 2 / 255, 1, -0.0395379806660405, 0.00795511749079728, 1.59087433889259),
        ("linf", 8 / 255, 2 / 255, 3, -0.128714566166521, 0.0360640432452307, 1.75000355411127),
        ("linf", 8 / 255, 2 / 255, 20, -0.0596200505472952, -0.00419496623435279, 1.82884659450811),
        ("l2", 0.5, 0.1, 7, -0.190340781055095, 0.120490744031363, 1.95911639074606),
        ("l1_dense", 12.0, 1.2, 15, -0.630016587597567, 0.345256090151802, 2.48320044559410),
    ],
)
def test_attack_equals_printed_values(norm, eps, step, steps, total, weighted, after):
    assert ce(x0).item() == pytest.approx(1.50965150575339, rel=1e-12)
    x = pgd(ce, x0, eps, step, steps, norm, start=x0)
    d = (x - x0).flatten(1)
    assert d.sum().item() == pytest.approx(total, rel=1e-9)
    assert (d * A(4, 192, 3)).sum().item() == pytest.approx(weighted, rel=1e-9)
    assert ce(x).item() == pytest.approx(after, rel=1e-9)


def test_linf_attack_equals_a_loop_over_pixels():
    """Step by the sign, back to the ball, back to the box: pixel by pixel, with the closed-form gradient."""
    eps, step = 8 / 255, 3 / 255
    x = x0.flatten(1).clone()
    for _ in range(4):
        p = (x @ W.T).softmax(1) - F.one_hot(y0, 5)
        g = p @ W / 4
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                moved = x[i, j] + step * ((g[i, j] > 0) * 1.0 - (g[i, j] < 0) * 1.0)
                moved = min(max(moved, x0.flatten(1)[i, j] - eps), x0.flatten(1)[i, j] + eps)
                x[i, j] = min(max(moved, 0.0), 1.0)
    torch.testing.assert_close(pgd(ce, x0, eps, step, 4, start=x0).flatten(1), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_attack_climbs_and_stays_in_ball_and_box(norm):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, 8, 8, generator=g).round(decimals=1)  # some pixels sit on the box
    y = torch.arange(6) % 5

    def loss(x):
        return F.cross_entropy(x.flatten(1) @ W.float().T, y)

    for random_start in (False, True):
        x_adv = pgd(loss, x, EPS[norm], EPS[norm] / 4, 10, norm, random_start, generator=g)
        assert loss(x_adv) > loss(x) + 0.05
        assert ((x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= EPS[norm] * (1 + 1e-5)).all()
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


def test_sparse_l1_attack_beats_the_dense_one():
    strong, weak = (ce(pgd(ce, x0, 12.0, 1.2, 20, norm, start=x0)) for norm in ("l1", "l1_dense"))
    assert strong > weak + 0.1


@pytest.mark.parametrize("norm", NORMS)
def test_eps_zero_is_the_identity(norm):
    assert torch.equal(pgd(ce, x0, 0, 1.0, 3, norm), x0)


def test_zero_steps_return_the_start():
    start = (x0 + 0.01).clamp(0, 1)
    x_adv = pgd(ce, x0, 0.1, 0.1, 0, start=start)
    assert torch.equal(x_adv, start) and x_adv is not start


def test_zero_gradient_moves_nothing():
    x = pgd(lambda x: 0 * x.sum(), x0, 0.1, 0.1, 3, start=x0)
    assert torch.equal(x, x0)


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (4,)])
def test_random_start_is_uniform_in_the_ball(shape):
    x = torch.full((4000, *shape), 0.5, dtype=torch.float64)
    for norm in NORMS:
        noise = uniform(x, 0.4, norm, torch.Generator().manual_seed(0)).flatten(1)
        assert noise.mean().abs() < 0.01
        r = noise.norm(ORDER[norm], dim=1) / 0.4
        assert r.max() <= 1 + 1e-12
        assert abs((r**4).mean().item() - 0.5) < 0.02  # in d dimensions r^d is uniform


def test_same_generator_gives_the_same_attack():
    a, b = (pgd(ce, x0, 0.1, 0.02, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


def test_attack_leaves_no_trace_on_a_network():
    net = nn.Sequential(encoders.make("slim"), nn.Linear(128, 5)).train()
    net[0].layer2.eval()  # a mode of its own, to be put back
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    x = torch.rand(4, 3, 16, 16)
    with eval_mode(net):
        assert not any(m.training for m in net.modules())
        x_adv = pgd(lambda x: F.cross_entropy(net(x), y0), x, 0.1, 0.05, 2)
    assert not torch.equal(x, x_adv) and x.grad is None and not x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes


def test_modes_are_put_back_after_an_exception():
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    for mode in (eval_mode, frozen_stats):
        with pytest.raises(RuntimeError), mode(net):
            raise RuntimeError
        assert net.training and net[0].training and net[0].track_running_stats


def test_frozen_stats_uses_the_batch_and_writes_nothing():
    bn, x = nn.BatchNorm1d(3).train(), torch.randn(8, 3) * 5 + 2
    free = nn.BatchNorm1d(3).train()
    with frozen_stats(bn):
        assert torch.equal(bn(x), free(x))
    assert torch.equal(bn.running_mean, torch.zeros(3)) and bn.num_batches_tracked == 0
    bn(x)
    assert torch.equal(bn.running_mean, free.running_mean)


def test_frozen_weights_get_no_gradient_and_each_is_put_back_as_it_was():
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    with frozen_weights(net):
        net(x).sum().backward()
    assert net.weight.grad is None and x.grad is not None
    with pytest.raises(RuntimeError), frozen_weights(net):
        raise RuntimeError
    assert net.weight.requires_grad and not net.bias.requires_grad


@pytest.mark.parametrize("free", [True, False])
def test_l1_projection_equals_bisection(free):
    g = torch.Generator().manual_seed(int(free))
    for trial in range(40):
        delta = torch.randn(3, 20, generator=g, dtype=torch.float64) * (0.1, 1, 5)[trial % 3]
        lo, hi = (
            -torch.rand(3, 20, generator=g, dtype=torch.float64),
            torch.rand(3, 20, generator=g, dtype=torch.float64),
        )
        lo[:, :4], hi[:, 3:7] = 0, 0
        if free:
            lo, hi = torch.full_like(lo, -torch.inf), torch.full_like(hi, torch.inf)
        eps = (0.1, 1.0, 4.0, 30.0)[trial % 4]
        got = project(delta, eps, "l1") if free else project_l1_box(delta, eps, lo, hi)
        for i in range(3):
            low, high = 0.0, 100.0  # the threshold: the smallest that fits

            def at(t):
                return (delta[i].sign() * (delta[i].abs() - t).clamp_min(0)).clamp(lo[i], hi[i])

            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if at(middle).abs().sum() > eps else (low, middle)
            want = at(0.0) if at(0.0).abs().sum() <= eps else at(high)
            torch.testing.assert_close(got[i], want, rtol=0, atol=1e-12)


def test_l1_projection_printed_value():
    d = torch.tensor([[0.4, -0.3, 0.2, 0.1]], dtype=torch.float64)
    got = project_l1_box(d, 0.5, torch.full_like(d, -0.5), torch.full_like(d, 0.5))
    torch.testing.assert_close(
        got, torch.tensor([[0.8, -0.5, 0.2, 0.0]], dtype=torch.float64) / 3, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_idempotent_and_keeps_what_is_inside(norm):
    d = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    once = project(d, 1.5, norm)
    torch.testing.assert_close(project(once, 1.5, norm), once)
    assert torch.equal(project(1e-3 * d, 1.5, norm), 1e-3 * d) and torch.equal(
        project(0 * d, 1.5, norm), 0 * d
    )


@pytest.mark.parametrize("bad, words", [
    ({"eps": -1}, "eps -1: .*not negative"),
    ({"eps": math.nan}, "eps nan: must be finite"),
    ({"eps": math.inf}, "eps inf: must be finite"),
    ({"step_size": -0.1}, "step_size -0.1: .*not negative"),
    ({"step_size": math.nan}, "step_size nan: must be finite"),
    ({"step_size": math.inf}, "step_size inf: must be finite"),
    ({"steps": -1}, "steps -1: .*not negative"),
    ({"norm": "l7"}, "'l7': choose one of linf"),
    ({"lo": 1.0, "hi": 0.0}, r"box \[1.0, 0.0\]"),
    ({"lo": math.nan}, r"box \[nan, 1.0\]"),
    ({"start": x0[:2]}, r"start \(2, 3, 8, 8\).*\(4, 3, 8, 8\)")])
def test_bad_arguments_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        pgd(ce, x0, **{"eps": 0.1, "step_size": 0.1, "steps": 1, **bad})


# Units ------------------------------------------------------------------------------------------------------
def test_a_linf_radius_in_other_units_than_the_images_is_named():
    with pytest.raises(ValueError, match=r"eps 8 is larger than the range \[0, 1\].*units of x.*8 / 255"):
        pgd(ce, x0, 8, 2, 1)
    pgd(ce, x0, 1.0, 0.1, 1)  # all of the range is allowed
    pgd(lambda x: ce(x / 255), 255 * x0, 8, 2, 1, hi=255.0)  # as are images of another range
    pgd(ce, x0, 8, 2, 1, lo=-math.inf, hi=math.inf)
    for norm in ("l2", "l1", "l1_dense"):  # whose radius may be larger than the range of a pixel
        pgd(ce, x0, 8, 2, 1, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("x", [
    (x0 - 0.5) / 0.25, 255 * x0, x0.masked_fill(x0 == x0.max(), 1.01), x0.masked_fill(x0 == x0.min(), -0.01),
    x0.masked_fill(x0 == x0.max(), math.nan)], ids=["normalised", "0-255", "above", "below", "NaN"])
@pytest.mark.parametrize("eps", [0, 8 / 255])
def test_images_outside_the_box_are_refused(norm, x, eps):
    """Clipping them to [0, 1] would move them by far more than eps."""
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\].*normalis.*inside the network") as e:
        pgd(ce, x, eps, 2 / 255, 1, norm)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("lo, hi", [(-2.0, 2.0), (-math.inf, math.inf), (-2.0, math.inf), (-math.inf, 2.0)])
def test_another_box_is_for_images_of_its_own_range(lo, hi):
    x = 4 * x0 - 2
    x_adv = pgd(ce, x, 0.1, 0.1, 2, lo=lo, hi=hi)
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-12 and x_adv.min() >= lo and x_adv.max() <= hi
    outside = 2 * x if math.isfinite(lo) or math.isfinite(hi) else x
    if outside is not x:
        with pytest.raises(ValueError, match="images must lie in"):
            pgd(ce, outside, 0.1, 0.1, 2, lo=lo, hi=hi)


def test_what_rounding_leaves_outside_the_box_is_taken():
    """Products of matrices that resize a white image exceed 1: by 5e-7 in float32, 5e-4 in TensorFloat-32."""
    x = x0.masked_fill(x0 > 0.9, 1 + 5e-4).masked_fill(x0 < 0.1, -5e-4)
    x_adv = pgd(ce, x, 8 / 255, 2 / 255, 2)
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_are_refused(dtype):
    with pytest.raises(ValueError, match=f"images are {dtype}: .*float.*255"):
        pgd(ce, torch.ones(2, 3, 8, 8, dtype=dtype), 0.1, 0.1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_refused_for_their_steps_would_be_rounded_away(dtype):
    with pytest.raises(ValueError, match=f"images are {dtype}: must be float32"):
        pgd(ce, torch.ones(2, 3, 8, 8, dtype=dtype), 0.1, 0.1, 1)


@pytest.mark.parametrize("norm", ["l2", "l1_dense"])
@pytest.mark.parametrize("scale", [1e-15, 1e-30])
def test_a_gradient_however_small_gives_a_whole_step(norm, scale):
    """As that of a network that is sure of its answer: its squares are 0 in float32."""
    g = A(3, 12, 5).view(3, 3, 2, 2).float()
    step = direction(scale * g, x0[:3, :, :2, :2].float(), norm)
    torch.testing.assert_close(step, direction(g, x0[:3, :, :2, :2].float(), norm))
    assert step.flatten(1).norm(ORDER[norm], dim=1).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_is_projected_into_a_ball_of_no_radius_as_nothing(norm):
    assert torch.equal(project(torch.zeros(2, 3, 2, 2), 0.0, norm), torch.zeros(2, 3, 2, 2))
    assert project(torch.ones(2, 3, 2, 2), 0.0, norm).abs().max() < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_batch_stays_empty(norm):
    assert pgd(lambda x: x.sum(), x0[:0], 0.5, 0.1, 1, norm).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("norm", ["l2", "l1", "l1_dense"])
def test_the_ball_is_of_each_first_index_not_of_what_it_holds(norm):
    """(V, B, ...) has V perturbations; as (V B, ...) each image has one of its own."""
    views, eps = 0.25 + 0.5 * X(6, 3, 8, 8).view(2, 3, 3, 8, 8), 0.4

    def climb(x):
        return (x.flatten() * torch.linspace(1, 2, x.numel(), dtype=x.dtype)).sum()

    def lengths(x, like):
        return (x - like).flatten(1).norm(ORDER[norm], dim=1)

    def moved(x):
        return lengths(pgd(climb, x, eps, eps, 3, norm, random_start=False), x)

    joint = moved(views)
    each = moved(views.flatten(0, 1))
    assert joint.shape == (2,) and (joint <= eps * (1 + 1e-9)).all()
    assert each.shape == (6,) and (each > 0.8 * eps).all() and (each <= eps * (1 + 1e-9)).all()


def test_on_cuda_the_box_is_checked_without_waiting(monkeypatch):
    """There `torch._assert_async` is asked, and no value comes to the host."""
    asked = []
    monkeypatch.setattr(torch, "_assert_async", lambda fine, message: asked.append((fine, message)))

    class OnGPU(torch.Tensor):
        is_cuda = True

    check_box((x0 - 1).as_subclass(OnGPU), 0.0, 1.0)
    check_box(x0.as_subclass(OnGPU), 0.0, 1.0)
    assert [bool(fine) for fine, _ in asked] == [False, True]
    assert all("images must lie in [0, 1]" in message for _, message in asked)


@pytest.mark.parametrize("call", [
    lambda norm: direction(x0, x0, norm), lambda norm: project(x0, 0.1, norm),
    lambda norm: uniform(x0, 0.1, norm), lambda norm: ball_point(x0, norm),
    lambda norm: pgd(ce, x0, 0.1, 0.1, 1, norm)],
    ids=["direction", "project", "uniform", "ball_point", "pgd"])
def test_an_unknown_norm_is_named_by_each_function(call):
    with pytest.raises(ValueError, match="norm 'l3': choose one of linf, l2"):
        call("l3")


def test_points_of_the_unit_ball_are_of_linf_and_l2_only():
    with pytest.raises(ValueError, match="norm 'l1': choose one of linf, l2$"):
        ball_point(x0, "l1")


# What an attack cannot see --------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("random_start", [False, True])
def test_a_gradient_that_is_nan_does_not_pass_for_an_image_that_cannot_be_moved(norm, steps, random_start):
    """sign(NaN) is 0: under linf and l1 the image would stay where it is."""
    net = nn.Linear(192, 5).double()
    with torch.no_grad():
        net.weight[2, 3] = math.nan
    x_adv = pgd(lambda x: F.cross_entropy(net(x.flatten(1)), y0), x0, 0.3, 0.1, steps, norm, random_start)
    assert x_adv.isnan().flatten(1).any(1).all()
    assert x0.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_images_whose_gradient_is_nan_are_nan(norm):
    """|x|^(1/2) is finite at 0, and its gradient is not; the other images go where they go alone."""
    x = x0.masked_fill(torch.arange(4).view(4, 1, 1, 1) == 1, 0.0)

    def loss(x):
        return (x - 0.0).abs().sqrt().sum()

    x_adv = pgd(loss, x, 0.3, 0.1, 2, norm, random_start=False)
    assert x_adv[1].isnan().any() and loss(x).isfinite() and loss(x_adv).isnan()
    others = [0, 2, 3]
    assert torch.equal(x_adv[others], pgd(loss, x[others], 0.3, 0.1, 2, norm, random_start=False))


def test_an_infinite_gradient_has_a_sign_and_is_followed():
    x_adv = pgd(lambda x: (x * torch.tensor(math.inf)).sum(), x0, 0.1, 0.1, 1, start=x0)
    torch.testing.assert_close(x_adv, (x0 + 0.1).clamp_max(1), rtol=0, atol=0)


def test_the_memory_format_of_the_images_is_kept():
    x = x0.contiguous(memory_format=torch.channels_last)
    assert pgd(ce, x, 0.1, 0.1, 2).is_contiguous(memory_format=torch.channels_last)


def test_within_inference_mode_one_line_says_what_would_work_and_without_gradients_it_works():
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode forbids.*use torch.no_grad$"):
        pgd(ce, x0, 0.1, 0.05, 2, start=x0)
    with torch.no_grad():
        x_adv = pgd(ce, x0, 0.1, 0.05, 2, start=x0)
    assert torch.equal(x_adv, pgd(ce, x0, 0.1, 0.05, 2, start=x0)) and not torch.equal(x_adv, x0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_outside_the_ball_is_taken_as_it_is_and_the_first_step_leads_into_the_ball(norm):
    start = (x0 + 0.5).clamp(0, 1)
    for steps in (0, 1):
        x_adv = pgd(ce, x0, 0.1, 0.01, steps, norm, start=start)
        inside = ((x_adv - x0).flatten(1).norm(ORDER[norm], dim=1) <= 0.1 * (1 + 1e-9)).all()
        assert inside == (steps == 1) and (steps == 1 or torch.equal(x_adv, start))


@pytest.mark.parametrize("mode, changes", [(eval_mode, False), (frozen_stats, False), (None, True)])
def test_the_network_runs_in_the_mode_that_it_is_in(mode, changes):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 5)).double().train()
    with mode(net) if mode else torch.enable_grad():
        pgd(lambda x: F.cross_entropy(net(x), y0), x0, 0.1, 0.05, 2)
    assert (net[0].num_batches_tracked == 2) == changes


@pytest.mark.outside
@pytest.mark.parametrize("norm, eps, step", [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.1), ("l1_dense", 12.0, 1.2)])
def test_it_takes_foolbox_steps(norm, eps, step):
    """From the same start, without randomness, the PyPI package foolbox moves every image to the same place."""
    foolbox = pytest.importorskip("foolbox")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(),
                              torch.nn.Linear(8 * 7 * 7, 5)).eval()
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6) % 5
    attacks = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD, "l1_dense": foolbox.attacks.L1PGD}
    theirs = attacks[norm](abs_stepsize=step, steps=7, random_start=False)
    _, want, _ = theirs(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=eps)
    ours = pgd(lambda v: F.cross_entropy(net(v), y, reduction="sum"), x, eps, step, 7, norm, random_start=False)
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)
    assert (ours - x).abs().max() > 1e-3
