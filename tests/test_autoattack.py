import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import augment, shapes
from evaluation import autoattack as aa
from evaluation.autoattack import autoattack
from tests.recipes import X, Z

NORMS = ("linf", "l2")
ORDER = {"linf": torch.inf, "l2": 2}
EPS = {"linf": 2 / 255, "l2": 0.15}  # where about half of the images fall
N = 24


def pale(x):
    """uint8 drawings (B, 3, 32, 32) at side 16 and 0.25 of their contrast, so that small steps matter."""
    return 0.5 + 0.25 * (F.avg_pool2d(augment.to_float(x), 2) - 0.5)


@functools.cache
def trained():
    """A tiny network that has learnt shapes of 16 x 16 against weak attacks, for seconds; and 24 test images
    that it gets right."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    x, y, _ = shapes.shapes(3000, seed=0)
    x = pale(x)
    opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for i in range(300):
        rows = torch.randint(3000, (64,), generator=torch.Generator().manual_seed(i))
        v, w = x[rows].requires_grad_(), y[rows]
        (g,) = torch.autograd.grad(F.cross_entropy(net(v), w), v)
        opt.zero_grad()
        F.cross_entropy(net((v + 2 / 255 * g.sign()).clamp(0, 1).detach()), w).backward()
        opt.step()
    net.eval().zero_grad()
    x, y, _ = shapes.shapes(100, seed=1)
    x = pale(x)
    rows = (~fooled(net, x, y)).nonzero().squeeze(1)[:N]
    assert len(rows) == N
    return net, x[rows], y[rows]


def seeded():
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def fooled(net, x, y):
    return net(x).argmax(1) != y


def linear(classes=5, side=8):
    W = 0.1 * Z(classes, 3 * side * side)
    return lambda x: x.flatten(1) @ W.to(x).T, W


# ----------------------------------------------------------------------------------------------------------
# The pieces
# ----------------------------------------------------------------------------------------------------------
def test_checkpoints_equal_printed_values():
    assert list(aa.checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(aa.checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(aa.checkpoints(20)) == [4, 7, 9, *range(10, 21)]


def test_dlr_equals_printed_values_and_its_formula():
    logits = torch.tensor([[3, 1, 2, 0, -1], [1, 3, 2, 0, -1], [5, 5, 5, 5, 5]], dtype=torch.float64)
    assert aa.dlr(logits, torch.zeros(3, dtype=torch.long)).tolist() == pytest.approx([-0.5, 1, 0], rel=1e-9)
    z = torch.randn(40, 6, generator=seeded(), dtype=torch.float64)
    y = torch.arange(40) % 6
    for row, label, found in zip(z.tolist(), y.tolist(), aa.dlr(z, y).tolist()):
        ranked = sorted(row, reverse=True)
        others = [value for k, value in enumerate(row) if k != label]
        assert found == pytest.approx(-(row[label] - max(others)) / (ranked[0] - ranked[2]), rel=1e-9)


def test_targeted_dlr_equals_printed_values():
    z = torch.tensor([[3.0, 1, 2, 0, -1], [1, 3, 2, 0, -1], [1, 1, 1, 1, 1]], dtype=torch.float64)
    y, t = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    for logits in (z, 7 * z - 3):  # no scale and no shift matters
        assert aa.dlr_targeted(logits, y, t).tolist() == pytest.approx([-0.8, 0.8, 0], rel=1e-9)


def test_margin_leaves_the_logits_alone():
    z = Z(6, 5)
    before, y = z.clone(), torch.tensor([0, 1, 2, 3, 4, 0])
    for i, m in enumerate(aa.margin(z, y).tolist()):
        others = [v for k, v in enumerate(z[i].tolist()) if k != y[i]]
        assert m == pytest.approx(z[i, y[i]].item() - max(others))
    assert torch.equal(z, before)


def test_sides_of_squares_equal_printed_values():
    sides = {i: round(aa.share(i) ** 0.5 * 32) for i in range(5000)}
    assert list(dict.fromkeys(sides.values())) == [29, 20, 14, 10, 7, 5, 4, 3]
    for at, before, after in ((10, 29, 20), (50, 20, 14), (200, 14, 10), (500, 10, 7), (1000, 7, 5),
                              (2000, 5, 4), (4000, 4, 3)):
        assert (sides[at], sides[at + 1]) == (before, after)


def test_apgd_equals_the_paper_read_aloud():
    """One image at a time, the whole loss record kept; its row -1 is still zero at the first checkpoint."""
    net, W = linear()
    x, y, t = X(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4])
    for norm, loss in ((n, l) for n in NORMS for l in (aa.cross_entropy, aa.dlr_targeted)):
        eps, steps = {"linf": 0.1, "l2": 1.5}[norm], 40  # large: the ascent overshoots, steps are halved
        query = aa.Queries(lambda x: torch.sin(3 * net(x)))
        out, found = aa.apgd(query, x, y, eps, norm, loss, seeded(), t, steps, stop=False)
        noise = (torch.rand if norm == "linf" else torch.randn)(x.shape, generator=seeded(), dtype=x.dtype)
        noise = 2 * noise - 1 if norm == "linf" else noise
        halvings = 0
        for n in range(4):
            x0 = x[n : n + 1]

            def project(z):
                if norm == "linf":
                    return torch.stack([z, x0 - eps]).amax(0).minimum(x0 + eps).clamp(0, 1)
                far = (z - x0).norm()
                return (x0 + (z - x0) / (far + 1e-12) * min(far, eps)).clamp(0, 1)

            def ask(z):
                z = z.clone().requires_grad_()
                logits = torch.sin(3 * net(z))
                value = loss(logits, y[n : n + 1], t[n : n + 1])
                return logits.argmax() != y[n], value.item(), torch.autograd.grad(value.sum(), z)[0]

            u = noise[n : n + 1]
            z = (x0 + eps * u / (u.flatten().norm(ORDER[norm]) + 1e-12)).clamp(0, 1)
            wrong, value, g = ask(z)
            adv = z if wrong else None
            best, best_z, best_g, z_prev, step = value, z, g, z, 2 * eps
            record, k, last_check, halved, checked = [0.0] * steps, int(0.22 * steps), 0, True, value
            for i in range(steps):
                a = 0.75 if i else 1
                w = project(z + step * (g.sign() if norm == "linf" else g / (g.norm() + 1e-12)))
                z, z_prev = project(z + a * (w - z) + (1 - a) * (z - z_prev)), z
                wrong, record[i], g = ask(z)
                adv = z if wrong else adv
                if record[i] > best:
                    best, best_z, best_g = record[i], z, g
                if i + 1 == last_check + k:
                    rose = sum(record[j] > record[j - 1] for j in range(i - k + 1, i + 1))
                    halve = rose <= 0.75 * k or (not halved and best <= checked)
                    if halve:
                        step, z, g, halvings = step / 2, best_z, best_g, halvings + 1
                    halved, checked, last_check = halve, best, i + 1
                    k = max(k - int(0.03 * steps), int(0.06 * steps))
            torch.testing.assert_close(out[n : n + 1], x0 if adv is None else adv, rtol=0, atol=1e-9)
            assert found[n] == (adv is not None)
        assert halvings > 4


def test_apgd_starts_on_the_sphere_and_counts_its_start():
    x, y = torch.full((5, 3, 8, 8), 0.5), torch.zeros(5, dtype=torch.long)
    for norm in NORMS:
        query = aa.Queries(lambda x: x.flatten(1)[:, :5] * 0 + torch.arange(5.0))
        out, found = aa.apgd(query, x, y, 0.1, norm, lambda z, y, t: z.sum(1) * 0, seeded(), steps=0)
        assert found.all()
        torch.testing.assert_close((out - x).flatten(1).norm(ORDER[norm], dim=1), torch.full((5,), 0.1))


@pytest.mark.parametrize("norm", NORMS)
def test_move_to_a_plane_equals_bisection(norm):
    x, w = X(6, 3, 4, 4).flatten(1), Z(6, 48)
    w[0, :5] = 0
    reach = [w.clamp_min(0).sum(1), w.clamp_max(0).sum(1)]  # the extremes of <w, x> in the box
    for part in (0.02, 0.4, 0.9, 0.999):
        for end in reach:
            b = part * end + (1 - part) * (w * x).sum(1)
            d = aa.to_plane(x, w, b[:, None], norm)
            for n in range(6):
                to = (b[n] - w[n] @ x[n]).sign() * w[n].sign()

                def move(s):
                    d = s * to * (1 if norm == "linf" else w[n].abs())
                    return (x[n] + d).clamp(0, 1) - x[n]

                low, high = 0.0, 1e6
                for _ in range(200):
                    mid = (low + high) / 2
                    short = (w[n] @ move(mid)).abs() < (b[n] - w[n] @ x[n]).abs()
                    low, high = (mid, high) if short else (low, mid)
                torch.testing.assert_close(d[n], move(high), rtol=0, atol=1e-9)
                assert w[n] @ (x[n] + d[n]) == pytest.approx(b[n].item(), abs=1e-9)
    for side in (0, 1):  # out of reach: the corner nearest to the plane
        d = aa.to_plane(x, w, 3 * reach[side][:, None], norm)
        toward = (w if side == 0 else -w).sign()
        corner = torch.where(toward > 0, 1.0, torch.where(toward < 0, 0.0, x))
        torch.testing.assert_close(x + d, corner, rtol=0, atol=1e-12)
    assert torch.equal(aa.to_plane(x, 0 * w, torch.ones(6, 1).double(), norm), 0 * x)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_nearest_boundary_of_a_linear_model(norm):
    net, W = linear()
    x = 0.25 + 0.5 * X(6, 3, 8, 8)  # away from the box
    order = net(x).argsort(1)
    y, t = order[:, -1], order[:, -2]
    w = W[t] - W[y]
    dual = w.norm(1 if norm == "linf" else 2, dim=1)
    nearest = -(x.flatten(1) * w).sum(1) / dual
    query = aa.Queries(net)
    out, found = aa.fab(query, x, y, t, 10.0, norm, stop=False)
    far = (out - x).flatten(1).norm(ORDER[norm], dim=1)
    assert found.all() and (far >= nearest - 1e-9).all() and (far <= 1.06 * nearest).all()
    eps = nearest.median() * 1.06  # those beyond it do not count
    out, found = aa.fab(query, x, y, t, eps.item(), norm)
    assert (found == (nearest <= eps)).all() and 0 < found.sum() < 6
    assert torch.equal(out[~found], x[~found])


def test_pyramids_equal_the_sum_of_the_paper():
    """Eq. 2: nested squares, the k-th of weight 1 / k^2 and side 2 k - 1, about the middle."""
    for s in (3, 5, 9):
        a, b = aa.eta(s, torch.Generator().manual_seed(1)), None
        for seed in range(20):  # either way round
            v = aa.eta(s, torch.Generator().manual_seed(seed))
            b = v if not torch.equal(v, a) else b
        torch.testing.assert_close(a, b.T)
        rows = a if (a[0] > 0).all() else b  # positive above, negative below
        begin = 0
        for h, sign in ((s // 2, 1), (s - s // 2, -1)):
            part = torch.zeros(h, s)
            for k in range(1, max(h, s) // 2 + 2):
                for i in range(h):
                    for j in range(s):
                        part[i, j] += (max(abs(i - h // 2), abs(j - s // 2)) < k) / k**2
            torch.testing.assert_close(rows[begin : begin + h], sign * part / part.norm() / 2**0.5)
            begin += h


@pytest.mark.parametrize("norm", NORMS)
def test_square_lowers_the_margin_inside_the_ball(norm):
    net, x, y = trained()
    x, y = x[:8], y[:8]
    queries = []

    def spy(v):
        queries.append(v.clone())
        return net(v)

    eps = EPS[norm] / 6
    aa.square(aa.Queries(spy), x, y, eps, norm, seeded(), queries=60)
    stands = [len(q) == len(x) for q in queries]
    assert len(queries) == 61 and all(stands)
    with torch.no_grad():
        best = torch.stack([aa.margin(net(q), y) for q in queries])
    assert (best.amin(0) < best[0]).all()
    for q in queries:
        assert aa.inside(q, x, eps, norm).all()
    assert (queries[0] - x).flatten(1).norm(ORDER[norm], dim=1).max() == pytest.approx(eps, rel=1e-4)
    if norm == "linf":  # a query changes one square, the same for all images
        same = (queries[1] == queries[0]).all(1).all(0)
        assert 0 < (~same).sum() <= 14 * 14


def test_square_ahead_walks_as_one_query_at_a_time():
    """What a filled batch changes is how many queries are asked at once, and so how many for nothing."""
    net, x, y = trained()
    eps, asked, found = EPS["linf"] / 2, [], []
    for fill in (N, 3 * N, 9 * N):
        query = aa.Queries(net, fill=fill)
        found.append(aa.square(query, x, y, eps, "linf", seeded(), queries=900))
        asked.append(query.forwards)
    assert asked[0] < asked[1] < asked[2] < 1.5 * asked[0] and 2 < fooled(net, found[0], y).sum() < N
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_targets_in_one_run_give_what_they_give_in_turn():
    """Each point's first success counts, and what a run gets is what still stands."""
    x, y, sizes = X(5, 3, 8, 8), torch.arange(5), []
    net, _ = linear()

    def run(x, y, t):
        sizes.append(len(x))
        return x + t[:, None, None, None], (t == 2) | (t == 3)

    alone, sizes = aa.targeted(run, net, x, y), []
    for fill, most in ((10, 2), (1000, 4)):
        assert torch.equal(aa.targeted(run, net, x, y, fill), alone)
        assert max(sizes) == most * 5
        sizes.clear()
    order = net(x.float()).argsort(1, descending=True)[:, 1:]
    first = [next((t for t in row.tolist() if t in (2, 3)), 0) for row in order]
    assert (alone - x)[:, 0, 0, 0].tolist() == pytest.approx(first)


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_at_the_first_success_changes_no_decision(norm):
    net, x, y = trained()
    query, eps = aa.Queries(net), EPS[norm]
    with torch.no_grad():
        t = net(x).argsort(1)[:, -2]
    early = aa.apgd(query, x, y, eps, norm, aa.cross_entropy, seeded())
    used, query.backwards = query.backwards, 0
    late = aa.apgd(query, x, y, eps, norm, aa.cross_entropy, seeded(), stop=False)
    assert torch.equal(early[1], late[1]) and 2 < early[1].sum() < N - 2
    assert query.backwards == 101 * N and used < 101 * N - 50 * early[1].sum()
    early, late = (aa.fab(query, x, y, t, eps, norm, stop=stop) for stop in (True, False))
    assert torch.equal(early[1], late[1]) and early[1].any()
    close = [(out - x).flatten(1).norm(ORDER[norm], dim=1) for out, _ in (early, late)]
    assert (close[1] <= close[0] + 1e-6).all()


# ----------------------------------------------------------------------------------------------------------
# The whole
# ----------------------------------------------------------------------------------------------------------
def test_every_find_is_misclassified_and_inside_and_the_rest_is_untouched():
    net, x, y = trained()
    x, y = x.contiguous(memory_format=torch.channels_last), y.clone()
    y[:3] = (y[:3] + 1) % 10  # wrong already: not attacked
    lines = []
    for norm in NORMS:
        x_adv, report = autoattack(net, x, y, EPS[norm], norm, "apgd", batch_size=10, log=lines.append)
        moved = (x_adv != x).flatten(1).any(1)
        right, stands = ~fooled(net, x, y), ~fooled(net, x_adv, y)
        assert torch.equal(moved, right & ~stands) and not moved[:3].any() and 2 < moved.sum() < N - 2
        assert aa.inside(x_adv, x, EPS[norm], norm).all()
        assert report["clean"] == pytest.approx(100 * right.sum().item() / N)
        assert report["robust"] == pytest.approx(100 * stands.sum().item() / N)
        stages = list(report["stages"].values())
        assert stages[0]["points"] == right.sum() and stages[1]["robust"] == report["robust"]
        assert stages[1]["points"] == pytest.approx(stages[0]["robust"] * N / 100)
        assert stages[0]["backwards"] == stages[0]["forwards"] > 0 and not report["warnings"]
    assert len(lines) == 4


def test_the_four_stages_run_and_none_undoes_another():
    net, x, y = trained()
    _, report = autoattack(net, x[:6], y[:6], 2 / 255)
    robust = [stage["robust"] for stage in report["stages"].values()]
    assert list(report["stages"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert robust == sorted(robust, reverse=True) and report["robust"] == robust[-1] < report["clean"] == 100
    _, everything = autoattack(net, x[:6], y[:6], 100 / 255)
    assert everything["robust"] == 0


def test_accuracy_falls_with_the_radius():
    net, x, y = trained()
    robust = [autoattack(net, x, y, eps / 255, version=("apgd-ce",))[1]["robust"] for eps in (0.3, 2, 5, 60)]
    assert robust == sorted(robust, reverse=True) and robust[0] > robust[1] > robust[2] > robust[3] == 0


def test_no_trace_is_left():
    net, x, y = trained()
    net.train()
    net[2].eval()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    before, random = x.clone(), torch.get_rng_state()
    first = autoattack(net, x[:4], y[:4], 2 / 255, version=("apgd-ce", "fab-t"))[0]
    assert [m.training for m in net.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(x, before) and not first.requires_grad
    with pytest.raises(RuntimeError), torch.no_grad():
        autoattack(nn.Sequential(net, nn.Linear(3, 3)), x, y, 2 / 255)
    assert [m.training for m in net.modules()] == modes
    net.eval()
    assert torch.equal(first, autoattack(net, x[:4], y[:4], 2 / 255, version=("apgd-ce", "fab-t"))[0])


def test_a_network_that_reuses_its_output_is_not_disturbed():
    net, x, y = trained()
    kept = []

    def reuses(v):
        kept.append(net(v))
        return kept[-1]

    for stage in ("apgd-t", "square"):
        kept.clear()
        kind = {"queries": 30} if stage == "square" else {}
        aa.STAGES[stage](aa.Queries(reuses), x[:5], y[:5], 1 / 255, "linf", seeded(), **kind)
        assert all(z.isfinite().all() for z in kept)


def test_what_an_attack_claims_is_checked(monkeypatch):
    def net(x):
        m = x.mean((1, 2, 3))
        return torch.stack([0 * m, m * (0.5 - m)], 1)

    liars = {
        "too far": lambda net, x, y, eps, *_: 1 - x,
        "out of the box": lambda net, x, y, eps, *_: x - eps,
        "not a number": lambda net, x, y, eps, *_: x * torch.nan,
        "nothing": lambda net, x, y, eps, *_: x,
    }
    monkeypatch.setattr(aa, "STAGES", liars)
    x, y = torch.full((3, 3, 8, 8), 0.01), torch.ones(3, dtype=torch.long)
    for name, liar in liars.items():
        assert fooled(net, liar(net, x, y, 0.2), y).all() == (name != "nothing")
        x_adv, report = autoattack(net, x, y, 0.2, version=(name,))
        assert report["robust"] == 100 and torch.equal(x_adv, x)


def test_what_the_search_claims_wrongly_is_attacked_again(monkeypatch):
    """The search errs, as in bfloat16 it may: it takes all points for fooled at once."""
    net, x, y = trained()
    want = autoattack(net, x, y, EPS["linf"], version=("apgd-ce",))[1]
    wrong = nn.Sequential(net, nn.Linear(10, 10))
    wrong[1].weight.data, wrong[1].bias.data = -torch.eye(10), torch.zeros(10)
    made, queries = [], aa.Queries

    def second_is_wrong(net, *rest, **more):
        made.append(net)
        return queries(wrong if len(made) == 2 else net, *rest, **more)

    monkeypatch.setattr(aa, "Queries", second_is_wrong)
    got = autoattack(net, x, y, EPS["linf"], version=("apgd-ce",))[1]
    assert got["robust"] == want["robust"]
    assert got["stages"]["apgd-ce"]["forwards"] > want["stages"]["apgd-ce"]["forwards"]


def test_a_network_is_never_asked_about_no_image():
    class Fussy(nn.Module):
        def forward(self, x):
            assert len(x)
            return net(x)

    net, x, y = trained()
    report = autoattack(Fussy(), x, y, 0.5)[1]
    assert report["robust"] == 0 and report["stages"]["square"]["points"] == 0


@pytest.mark.parametrize("side", [8, 12, 19, 24])
def test_square_runs_at_any_side(side):
    net, x, y = trained()
    x = F.interpolate(x[:2], 2 * [side])
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(16), net)
    with torch.no_grad():
        y = pooled(x).argmax(1)
    for norm in NORMS:
        query = aa.Queries(lambda v: pooled(v) + 100 * F.one_hot(y, 10))  # both stand to the end
        out = aa.square(query, x, y, 0.01, norm, seeded(), queries=20)
        assert torch.equal(out, x) and query.forwards == 42


def test_filling_up_to_few_batch_shapes_changes_nothing():
    net, x, y = trained()
    shapes = []

    def spy(v):
        shapes.append(len(v))
        return net(v)

    query = aa.Queries(spy, [4, 8, 16, 32, 64])
    x = x.contiguous(memory_format=torch.channels_last)
    plain = aa.apgd(aa.Queries(net), x, y, 2 / 255, "linf", aa.cross_entropy, seeded())
    padded = aa.apgd(query, x, y, 2 / 255, "linf", aa.cross_entropy, seeded())
    assert torch.equal(plain[1], padded[1]) and set(shapes) <= set(query.sizes) and len(set(shapes)) > 1
    assert query.forwards < sum(shapes)  # padding is not counted


def test_fast_search_is_verified_in_float32():
    net, x, y = trained()
    x_adv, report = autoattack(net, x, y, 2 / 255, version=("apgd-ce",), fast=True)
    exact = autoattack(net, x, y, 2 / 255, version=("apgd-ce",))[1]
    assert report["precision"] == "bf16 search, fp32 verified" and exact["precision"] == "fp32"
    assert report["robust"] == pytest.approx(100 * (~fooled(net, x_adv, y)).sum().item() / N)
    assert abs(report["robust"] - exact["robust"]) <= 5
    with torch.autocast("cpu", torch.bfloat16):  # of the caller: not inside
        assert autoattack(net, x, y, 2 / 255, version=("apgd-ce",))[1]["robust"] == exact["robust"]


def test_misuse_is_named():
    net, x, y = trained()
    x, y = x[:5], y[:5]

    def report(net, **options):
        with pytest.warns(UserWarning) as caught:
            text = autoattack(net, x, y, 1e-3, version=options.pop("version", ("apgd-ce",)))[1]["warnings"]
        assert sorted(text) == sorted(str(w.message) for w in caught)
        return " ".join(text)

    assert "probabilities" in report(lambda v: net(v).softmax(1))
    assert "random" in report(lambda v: net(v) + 0.1 * torch.randn(len(v), 10))
    assert "exactly zero" in report(lambda v: (net(v) * 10).round() + 0 * v.sum((1, 2, 3))[:, None])
    y = y * 0
    three = torch.tensor([9.0, 0, 0])
    assert "fewer than 4 classes" in report(lambda v: net(v)[:, :3] + three, version="apgd")
    assert "exactly zero" in report(lambda v: three[:2] + 0 * net(v)[:, :2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoattack(net, x, y, 1e-3, version=("apgd-ce",))


def test_masked_gradients_show_in_square():
    net, x, y = trained()
    hidden = nn.Sequential(net, nn.Identity())
    hidden.forward = lambda v: (net((v * 64).round() / 64)) + 0 * v.sum((1, 2, 3))[:, None]
    x = (x * 64).round() / 64
    with torch.no_grad():
        y = hidden(x).argmax(1)
    with warnings.catch_warnings(record=True):
        text = autoattack(hidden, x[:6], y[:6], 6 / 255, version=("apgd-ce", "square"))[1]["warnings"]
    assert any("Square" in t for t in text) and any("exactly zero" in t for t in text)


@pytest.mark.parametrize("change, message", [
    (dict(norm="l1"), "norm 'l1': choose linf or l2"), (dict(version="plus"), "version 'plus'"),
    (dict(version=("fgsm",)), "fgsm"), (dict(eps=0), "eps and batch_size must be positive"),
    (dict(eps=float("nan")), "must be positive"), (dict(batch_size=0), "must be positive"),
    (dict(x=torch.rand(4, 3, 8, 8) * 255), r"in \[0, 1\]"),
    (dict(x=torch.rand(4, 3, 8, 8) * torch.nan), r"in \[0, 1\]"),
    (dict(x=torch.rand(4, 3, 8, 9)), "must be float"),
    (dict(x=torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), "uint8"),
    (dict(y=torch.arange(3)), "4 images and 3 labels"),
    (dict(y=torch.full((4,), 5)), "labels go from 5 to 5"),
    (dict(net=lambda x: x.flatten(1) * torch.nan), "finite logits"),
    (dict(net=lambda x: x.flatten(1)[:, :1]), r"logits \(4, 1\): an attack needs two classes or more"),
    (dict(net=lambda x: x.flatten(1)[:, :0]), r"logits \(4, 0\): an attack needs two classes or more"),
    (dict(net=lambda x: x), r"\(4, 3, 8, 8\) for 4 images; it must give logits \(N, C\)"),
    (dict(net=lambda x: x.flatten(1)[:1]), r"\(1, 192\) for 4 images; it must give logits \(N, C\)"),
    (dict(net=lambda x: x.sum()), r"the network gives \(\) for 4 images; it must give logits \(N, C\)"),
    (dict(net=lambda x: (x.flatten(1), x)), r"returns a tuple; .*net\(x\)\[0\]"),
    (dict(net=lambda x: [x.flatten(1), x]), r"returns a list; .*net\(x\)\[0\]"),
    (dict(net=lambda x: {"logits": x.flatten(1)}), r"returns a dict; .*net\(x\)\['logits'\]"),
    (dict(net=lambda x: {"out": x.flatten(1)}), r"returns a dict; .*net\(x\)\['out'\]"),
    (dict(net=lambda x: None), "returns a NoneType; it must return the logits"),
    (dict(x=torch.rand(4, 3, 8, 8).half()), r"torch.float16 .*x.float\(\)"),
    (dict(x=torch.rand(4, 3, 8, 8).bfloat16()), r"torch.bfloat16 .*x.float\(\)"),
    (dict(x=torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), r"x.float\(\) / 255"),
    (dict(x="images"), "images"),
    (dict(x=torch.rand(0, 3, 8, 8), y=torch.arange(0)), "at least one"),
    (dict(x=torch.rand(4, 3, 4, 4)), "H >= 5"),
    (dict(y=torch.eye(4)), r"labels are torch.float32 \(4, 4\).*y.argmax\(1\)"),
    (dict(y=torch.eye(4).long()), r"labels are torch.int64 \(4, 4\).*y.argmax\(1\)"),
    (dict(y=torch.arange(4)[:, None]), r"labels are torch.int64 \(4, 1\).*y.flatten\(\)"),
    (dict(y=torch.arange(4.0)), r"labels are torch.float32 \(4,\).*y.long\(\)"),
    (dict(y=[0.0, 1.0, 2.0, 3.0]), r"labels are torch.float32 \(4,\).*y.long\(\)"),
    (dict(y=torch.ones(4, dtype=torch.bool)), r"labels are torch.bool \(4,\).*y.long\(\)"),
    (dict(y=["cat", "dog", "cat", "dog"]), "labels"),
    (dict(y=3), r"labels are torch.int64 \(\)"),
    (dict(y=torch.full((4,), -1)), "labels go from -1 to -1"),
    (dict(eps=float("inf")), "must be positive and finite"),
    (dict(eps=float("inf"), norm="l2"), "must be positive and finite"),
    (dict(eps=float("nan"), norm="l2"), "must be positive and finite"),
    (dict(eps=-0.1), "must be positive and finite"), (dict(eps="8/255"), "must be positive and finite"),
    (dict(eps=8), "eps is 8 .*8 / 255"), (dict(eps=1.001), "eps is 1.001 .*8 / 255"),
    (dict(batch_size=2.5), "batch_size must be an integer"), (dict(seed=0.5), "seed must be an integer"),
    (dict(version=()), "version"), (dict(version=("square", "square")), "version"),
    (dict(version=3), "version"),
])
def test_bad_input_is_named(change, message):
    arguments = dict(net=linear()[0], x=torch.rand(4, 3, 8, 8), y=torch.arange(4), eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        autoattack(**arguments)


# ----------------------------------------------------------------------------------------------------------
# Logits and gradients that are not finite
# ----------------------------------------------------------------------------------------------------------
def leaves_the_finite(columns, value):
    """A network of 5 classes that says 0, with a gradient, on grey images; off them, these columns of its
    logits are `value`. Of NaN everywhere argmax makes class 0."""
    weights = 0.01 * Z(5, 3 * 8 * 8)
    ahead = torch.tensor([3.0, 0, 0, 0, 0])

    def net(x):
        logits = x.flatten(1) @ weights.to(x).T + ahead.to(x)
        moved = (x - 0.5).abs().flatten(1).amax(1) > 1e-6
        broken = torch.zeros_like(logits, dtype=torch.bool)
        broken[moved, columns] = True
        return logits.masked_fill(broken, value)

    return net


@pytest.mark.parametrize("columns, value", [
    (slice(0, 5), torch.nan), (4, torch.nan), (0, torch.inf), (4, torch.inf), (4, -torch.inf)])
@pytest.mark.parametrize("stage", aa.STAGES)
@pytest.mark.parametrize("norm", NORMS)
def test_logits_that_are_not_finite_count_as_misclassified(norm, stage, columns, value):
    """Off the clean image they speak for no class; to read them as class 0 would call the points robust."""
    net = leaves_the_finite(columns, value)
    x, y = torch.full((3, 3, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    eps = {"linf": 0.1, "l2": 1.0}[norm]
    with pytest.warns(UserWarning, match="3 attacked images gave logits that are not finite"):
        x_adv, report = autoattack(net, x, y, eps, norm, version=(stage,))
    assert report["clean"] == 100 and report["robust"] == 0
    (text,) = report["warnings"]
    assert text == "3 attacked images gave logits that are not finite: they count as misclassified"
    assert aa.inside(x_adv, x, eps, norm).all() and (x_adv != x).flatten(1).any(1).all()
    options = {"queries": 3} if stage == "square" else {"stop": False}
    out = aa.STAGES[stage](aa.Queries(net), x, y, eps, norm, seeded(), **options)
    assert aa.inside(out, x, eps, norm).all() and (out != x).flatten(1).any(1).all()


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("call", [1, 2, 9])
@pytest.mark.parametrize("norm", NORMS)
def test_apgd_counts_logits_that_are_not_finite_at_its_start_and_at_any_step(norm, call, stop):
    asked = []

    def net(x):
        asked.append(x.detach().clone())
        logits = x.flatten(1)[:, :5] + torch.tensor([9.0, 0, 0, 0, 0])
        return logits * torch.nan if len(asked) == call else logits

    x, y = X(3, 3, 8, 8).float(), torch.zeros(3, dtype=torch.long)
    out, found = aa.apgd(aa.Queries(net), x, y, 0.1, norm, aa.cross_entropy, seeded(), stop=stop)
    assert found.all() and torch.equal(out, asked[call - 1])
    assert all(z.isfinite().all() for z in asked)


def test_points_whose_logits_are_not_finite_do_not_disturb_the_others():
    net, x, y = trained()
    x = x.clone()
    x[:3, 0, 0, 0] = 0.25 / 255  # the mark of an image that the network cannot bear to see moved

    def breaks(v):
        top = v[:, 0, 0, 0]
        return net(v).masked_fill(((top > 0) & (top < 0.2 / 255))[:, None], torch.nan)

    with torch.no_grad():
        y = net(x).argmax(1)
    want, _ = autoattack(net, x, y, 0.1 / 255, version=("apgd-ce",))
    with pytest.warns(UserWarning, match="attacked images gave logits that are not finite"):
        got, _ = autoattack(breaks, x, y, 0.1 / 255, version=("apgd-ce",))
    assert (got[:3] != x[:3]).any()
    torch.testing.assert_close(got[3:], want[3:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["apgd-ce", "apgd-t", "fab-t"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_not_finite_in_one_pixel_does_not_stop_the_attack(norm, stage):
    """The root of 0 has an infinite slope, and infinity times 0 is NaN, as is the length of that gradient."""
    plain, _ = linear()
    x = 0.25 + 0.5 * X(6, 3, 8, 8)
    y = plain(x).argmax(1)

    def net(x):
        nothing = (0 * x[:, 0, 0, :1]).sqrt()
        return plain(x) + nothing

    v = x.clone().requires_grad_()
    assert torch.autograd.grad(net(v)[:, 0].sum(), v)[0].isnan().flatten(1).sum(1).tolist() == [1] * 6
    x_adv, report = autoattack(net, x, y, {"linf": 0.2, "l2": 3.0}[norm], norm, version=(stage,))
    assert report["robust"] == 0 and x_adv.isfinite().all()


def test_a_gradient_that_is_nowhere_finite_is_named():
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)

    def net(x):
        return torch.tensor([2.0, 1, 0, 0]) + (0 * x.sum((1, 2, 3), keepdim=True)).sqrt().flatten(1)

    with pytest.warns(UserWarning, match="exactly zero or not finite for 4 of 4 images"):
        x_adv, report = autoattack(net, x, y, 0.1, version=("apgd-ce", "fab-t"))
    assert report["robust"] == 100 and torch.equal(x_adv, x)


def test_clean_logits_that_are_not_finite_are_refused_by_their_batch():
    x, y = torch.rand(7, 3, 8, 8), torch.zeros(7, dtype=torch.long)

    def net(v):
        clean = (v[:, None] == x[5]).flatten(1).all(1)
        grey = v.mean((1, 2, 3)).masked_fill(clean, torch.inf)
        return torch.tensor([2.0, 1, 0, 0, 0]) + grey[:, None]

    with pytest.raises(ValueError, match=r"finite logits.* batch 1 \(images 3 to 5\), first for image 5"):
        autoattack(net, x, y, 0.1, batch_size=3)


# ----------------------------------------------------------------------------------------------------------
# As a library
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [
    "uint8", "int8", "int16", "int32", "int64", "uint16", "list", "tuple", "numpy uint8", "numpy int32",
    "numpy uint16", "numpy int64"])
def test_integer_labels_of_any_kind_are_taken(kind):
    net, x, y = trained()
    x, y = x[:6], y[:6]
    want, report = autoattack(net, x, y, EPS["linf"], version=("apgd-ce",))
    if kind.startswith("numpy"):
        labels = y.numpy().astype(kind.split()[1])
    elif kind in ("list", "tuple"):
        labels = {"list": list, "tuple": tuple}[kind](y.tolist())
    else:
        labels = y.to(getattr(torch, kind))
    got, same = autoattack(net, x, labels, EPS["linf"], version=("apgd-ce",))
    assert torch.equal(got, want) and same["robust"] == report["robust"] < 100


def test_images_are_taken_from_numpy_and_lists():
    net, x, y = trained()
    x, y = x[:4], y[:4]
    want, _ = autoattack(net, x, y, EPS["linf"], version=("apgd-ce",))
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    for images in (x.numpy(), read_only, x.tolist()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got, _ = autoattack(net, images, y, EPS["linf"], version=("apgd-ce",))
        assert torch.equal(got, want)


def test_images_a_rounding_outside_the_box_are_clipped():
    net, x, y = trained()
    x = x[:4].clone()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0, 1
    with torch.no_grad():
        y = net(x).argmax(1)
    outside = x.clone()
    outside[0, 0, 0, 0], outside[1, 0, 0, 0] = -9e-7, 1 + 9e-7
    before = outside.clone()
    want, _ = autoattack(net, x, y, EPS["linf"], version=("apgd-ce",))
    got, _ = autoattack(net, outside, y, EPS["linf"], version=("apgd-ce",))
    assert torch.equal(got, want) and torch.equal(outside, before) and got.min() >= 0 and got.max() <= 1
    for value in (-2e-6, 1 + 2e-6):
        outside[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            autoattack(net, outside, y, EPS["linf"], version=("apgd-ce",))


def test_numbers_of_numpy_are_taken_and_the_report_is_plain():
    import json

    import numpy
    net, x, y = trained()
    _, report = autoattack(net, x[:2], y[:2], numpy.float32(0.01), version=["apgd-ce"], seed=numpy.int64(3),
                           batch_size=numpy.int32(2))
    assert json.loads(json.dumps(report))["batch_size"] == 2


@pytest.mark.outside
@pytest.mark.parametrize("norm", NORMS)
def test_agrees_with_the_reference_image_by_image(norm):
    """Same seed, same batches. With `stop=False` the images are the same too. FAB's 100 steps magnify
    rounding: for a few images it is the length of the perturbation that agrees."""
    reference = pytest.importorskip("pyautoattack")
    net, x, y = trained()
    eps, queries = EPS[norm], 400
    for stage, run in aa.STAGES.items():
        name = {"linf": "Linf", "l2": "L2"}[norm]
        them = reference.AutoAttack(net, norm=name, eps=eps, seed=0, device="cpu")
        them.attacks_to_run, them.square.n_queries = [stage], queries
        theirs = them.run_standard_evaluation(x, y, batch_size=100)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        net.zero_grad(set_to_none=True)  # which FAB leaves
        options = dict(queries=queries) if stage == "square" else dict(stop=False)
        ours = run(aa.Queries(net), x, y, eps, norm, seeded(), **options)
        assert torch.equal(fooled(net, ours, y), fooled(net, theirs, y)) and fooled(net, ours, y).any()
        apart = (ours - theirs).flatten(1).abs().amax(1)
        if stage == "fab-t":
            length = [(v - x).flatten(1).norm(ORDER[norm], dim=1) for v in (ours, theirs)]
            torch.testing.assert_close(*length, rtol=0.02, atol=1e-6)
            assert (apart <= 5e-5).float().mean() >= 0.75
        else:
            assert apart.max() <= 1e-6, stage


def test_apgd_walks_whole_steps_in_l2_where_a_softmax_is_nearly_saturated():
    """Its gradients are so small that their squares are 0 in float32; apgd-ce is all that two classes have."""
    net, _ = linear(classes=2)
    x = X(6, 3, 8, 8).float()
    y = net(x).argmax(1)
    margins = (net(x)[:, 0] - net(x)[:, 1]).abs()
    robust = []
    for scale in (1.0, 60.0):

        def scaled(v, scale=scale):
            return scale / margins.max() * net(v)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            robust.append(autoattack(scaled, x, y, 3.0, "l2", ("apgd-ce",))[1]["robust"])
    assert robust[0] == robust[1]


def test_the_own_class_is_never_a_target_also_where_another_one_ties():
    asked = []

    def run(x, y, t):
        asked.extend(t.tolist())
        return x, torch.zeros(len(x), dtype=torch.bool)

    def net(x):
        return torch.tensor([[1.0, 1.0, 0.0, -1.0]]).expand(len(x), 4)  # 0 and 1 tie

    for y in (0, 1):
        asked.clear()
        aa.targeted(run, net, torch.zeros(2, 3, 4, 4), torch.full((2,), y))
        assert sorted(set(asked)) == sorted({0, 1, 2, 3} - {y})


def test_a_saturated_softmax_is_named():
    def net(x):
        margin = 1e4 * (x[:, 0] - x[:, 2]).mean((1, 2))
        return torch.stack([margin, -margin], 1)

    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] /= 2
    x[:, 2] = 1 - x[:, 2] / 2
    found = aa.misuse(aa.Queries(net), x, net(x).argmax(1), net(x))
    assert len(found) == 1 and "the cross-entropy has no gradient for 4 of 4 images" in found[0]
