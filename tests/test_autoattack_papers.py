"""AutoAttack against its papers read aloud: one image at a time, in plain loops, in float64, without a
function of the module. Every image that the network is asked about is compared, not the outcome alone."""
import functools
import itertools
import math

import pytest
import torch

from evaluation import autoattack as aa
from tests.recipes import A, X, Z

NORMS = ("linf", "l2")
CLASSES = 6


class Curved:
    """Logits W2 sin(W1 x), far from linear, and each batch of images that they were asked for."""

    def __init__(self, side, slope=0.3, channels=3):
        self.asked = []
        self.W1 = slope * Z(20, channels * side * side)
        self.W2 = A(CLASSES, 20, 0.3)

    def __call__(self, x):
        self.asked.append(x.detach().clone())
        return self.logits(x)

    def logits(self, x):
        return torch.sin((x.flatten(1) - 0.5) @ self.W1.T) @ self.W2.T

    def label(self, x):
        return self.logits(x).argmax(1)


class Steep(Curved):
    """The same classes. In each score the logits are concave, so that the linearised boundary is nearer than
    the true one: a step that goes there falls short."""

    def logits(self, x):
        return -(-2 * super().logits(x)).exp()


def seeded():
    return torch.Generator().manual_seed(0)


def norm_of(d, norm):
    """Of one perturbation, a tensor of any shape."""
    if norm == "linf":
        return d.abs().max().item()
    return math.sqrt((d * d).sum().item())


# ----------------------------------------------------------------------------------------------------------
# APGD
# ----------------------------------------------------------------------------------------------------------
def cross_entropy_by_hand(z, y, t):
    return z.exp().sum().log() - z[y]


def targeted_dlr_by_hand(z, y, t):
    first, _, third, fourth = z.sort(descending=True).values[:4]
    return -(z[y] - z[t]) / (first - (third + fourth) / 2 + 1e-12)


def into_ball_and_box(z, x, eps, norm):
    if norm == "linf":
        z = torch.minimum(torch.maximum(z, x - eps), x + eps)
    else:
        far = norm_of(z - x, norm)
        z = x + (z - x) / (far + 1e-12) * min(far, eps)
    return z.clamp(0, 1)


def asking(net, loss, y, t):
    """z (1, ...) -> loss, its gradient, whether z is misclassified."""

    def ask(z):
        z = z.clone().requires_grad_()
        logits = net.logits(z)[0]
        value = loss(logits, y, t)
        (g,) = torch.autograd.grad(value, z)
        return value.item(), g, logits.argmax().item() != y

    return ask


def apgd_by_hand(ask, x, eps, norm, noise):
    """100 steps of algorithm 1 for one image x (1, ...), with momentum 0.75. Returns all iterates, whether
    each is misclassified, and for each checkpoint its conditions 1 and 2, and whether the best point is
    another."""
    checkpoints = {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}  # for 100 steps, printed
    z = (x + eps * noise / (norm_of(noise, norm) + 1e-12)).clamp(0, 1)
    value, g, wrong = ask(z)
    iterates = [z]
    fooled = [wrong]
    conditions = {}
    step = 2 * eps
    best_value = best_at_last_checkpoint = value
    best_z = z
    best_g = g
    z_before = z
    halved_last_time = True  # so that the first checkpoint is not one for condition 2
    record = [0.0]  # the official code compares the first loss with zero
    for i in range(1, 101):
        if norm == "linf":
            direction = g.sign()
        else:
            direction = g / (norm_of(g, norm) + 1e-12)
        w = into_ball_and_box(z + step * direction, x, eps, norm)
        if i == 1:
            z_new = w
        else:
            z_new = into_ball_and_box(z + 0.75 * (w - z) + 0.25 * (z - z_before), x, eps, norm)
        z_before = z
        z = z_new
        value, g, wrong = ask(z)
        iterates.append(z)
        fooled.append(wrong)
        record.append(value)
        if value > best_value:
            best_value = value
            best_z = z
            best_g = g
        if i in checkpoints:
            since = checkpoints[i]
            rises = 0
            for j in range(i - since + 1, i + 1):
                rises += record[j] > record[j - 1]
            seldom = rises <= 0.75 * since
            stuck = not halved_last_time and best_value <= best_at_last_checkpoint
            conditions[i] = seldom, stuck, not torch.equal(z, best_z)
            if seldom or stuck:
                step = step / 2
                z = best_z
                g = best_g
            halved_last_time = seldom or stuck
            best_at_last_checkpoint = best_value
    return iterates, fooled, conditions


LOSSES = {"cross-entropy": (aa.cross_entropy, cross_entropy_by_hand),
          "targeted DLR": (aa.dlr_targeted, targeted_dlr_by_hand)}
RADII = {"linf": (0.03, 0.1), "l2": (0.1, 0.3)}


@functools.cache
def apgd_case(norm, loss, eps):
    """Images, labels, targets, and of each image what APGD is by hand."""
    net = Curved(6)
    x = X(5, 3, 6, 6)
    order = net.logits(x).argsort(1, descending=True)
    y = order[:, 0]
    t = torch.stack([order[n, 1 + n % 3] for n in range(5)])
    draw = torch.rand if norm == "linf" else torch.randn
    noise = draw(x.shape, generator=seeded(), dtype=x.dtype)
    if norm == "linf":
        noise = 2 * noise - 1
    by_hand = []
    for n in range(5):
        one = slice(n, n + 1)
        ask = asking(net, LOSSES[loss][1], y[n].item(), t[n].item())
        by_hand.append(apgd_by_hand(ask, x[one], eps, norm, noise[one]))
    return x, y, t, by_hand


@pytest.mark.parametrize("norm, size", list(itertools.product(NORMS, (0, 1))))
@pytest.mark.parametrize("loss", LOSSES)
def test_all_100_iterates_of_apgd_are_those_of_algorithm_1(norm, size, loss):
    """Step, momentum, halving of the step, restart from the best point: each moves all the later iterates."""
    eps = RADII[norm][size]
    x, y, t, by_hand = apgd_case(norm, loss, eps)
    net = Curved(6)
    out, found = aa.apgd(aa.Queries(net), x, y, eps, norm, LOSSES[loss][0], seeded(), t, stop=False)
    asked = torch.stack(net.asked)
    assert len(asked) == 101
    for n, (iterates, fooled, _) in enumerate(by_hand):
        torch.testing.assert_close(asked[:, n], torch.cat(iterates), rtol=0, atol=1e-8)
        wrong = [z for z, w in zip(iterates, fooled) if w]
        assert found[n] == bool(wrong)
        torch.testing.assert_close(out[n : n + 1], wrong[-1] if wrong else x[n : n + 1], rtol=0, atol=1e-8)


def test_the_iterates_above_meet_each_reason_to_halve_the_step():
    seen = set()
    restarts = 0
    for norm, loss in itertools.product(NORMS, LOSSES):
        for eps in RADII[norm]:
            for _, _, conditions in apgd_case(norm, loss, eps)[-1]:
                for seldom, stuck, away in conditions.values():
                    seen.add((seldom, stuck))
                    restarts += away and (seldom or stuck)
    assert seen == {(False, False), (False, True), (True, False), (True, True)} and restarts > 20


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("norm", NORMS)
def test_apgd_halves_its_step_and_restarts_as_algorithm_1_for_any_course_of_the_loss(norm, sign):
    """Losses that rise about three times in four, above zero or below it, and directions, all made up: so
    many numbers of rises are met, at each checkpoint, and no rounding can grow."""
    n = 25
    size = 3 * 5 * 5
    random = torch.Generator().manual_seed(5)
    walks = torch.rand(101, n, generator=random, dtype=torch.float64) - 0.25
    values = sign * 100 + walks.cumsum(0) * torch.linspace(-0.2, 1, n)
    values[1:, ::5] -= 50  # a start that stays the best, however often the loss rises after it
    slopes = torch.randn(101, n, size, generator=random, dtype=torch.float64)
    x = X(n, 3, 5, 5)
    y = torch.zeros(n, dtype=torch.long)
    noise = torch.rand if norm == "linf" else torch.randn
    noise = noise(x.shape, generator=seeded(), dtype=x.dtype)
    noise = 2 * noise - 1 if norm == "linf" else noise
    asked = []
    eps = {"linf": 0.1, "l2": 1.0}[norm]

    def net(z):
        asked.append(z.detach().clone())
        return z.flatten(1)

    def loss(logits, y, t):
        course = values[len(asked) - 1]
        return course + ((logits - logits.detach()) * slopes[len(asked) - 1]).sum(1)

    aa.apgd(aa.Queries(net), x, y, eps, norm, loss, seeded(), stop=False)
    asked = torch.stack(asked)
    rises = set()
    for k in range(n):
        times = iter(range(101))

        def ask(z):
            i = next(times)
            return values[i, k].item(), slopes[i, k].view_as(z), False

        iterates, _, _ = apgd_by_hand(ask, x[k : k + 1], eps, norm, noise[k : k + 1])
        torch.testing.assert_close(asked[:, k], torch.cat(iterates), rtol=0, atol=1e-9)
        rises.add(int((values[2:23, k] > values[1:22, k]).sum()))
    assert {15, 16, 17} <= rises  # beside the first comparison, with 0; 16.5 of 22 is the limit


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_stops_a_point_at_its_first_misclassified_iterate(norm):
    eps = RADII[norm][1]
    x, y, t, by_hand = apgd_case(norm, "cross-entropy", eps)
    net = Curved(6)
    out, found = aa.apgd(aa.Queries(net), x, y, eps, norm, aa.cross_entropy, seeded(), t)
    passes = 0
    for n, (iterates, fooled, _) in enumerate(by_hand):
        assert found[n] == any(fooled)
        first = fooled.index(True) if any(fooled) else None
        want = x[n : n + 1] if first is None else iterates[first]
        torch.testing.assert_close(out[n : n + 1], want, rtol=0, atol=1e-8)
        passes += 101 if first is None else first + 1
    assert found.any()
    total = sum(len(z) for z in net.asked)
    assert passes <= total <= passes + 5 * len(x)  # fallen points leave within five iterations


# ----------------------------------------------------------------------------------------------------------
# FAB
# ----------------------------------------------------------------------------------------------------------
def onto_plane_by_hand(x, w, b, norm):
    """The least move of x to the plane <w, x> = b within [0, 1], all lists: coordinate i moves min(s u_i,
    room_i) towards the plane, u = 1 (linf) or |w| (l2), for the s that reaches it; all the way to the faces
    where none does."""
    off = sum(p * q for p, q in zip(w, x)) - b
    signs = []
    rooms = []
    for p, q in zip(w, x):
        toward = 0.0
        if p != 0 and off != 0:
            toward = -1.0 if (off > 0) == (p > 0) else 1.0
        signs.append(toward)
        rooms.append(1 - q if toward > 0 else q if toward < 0 else 0.0)
    speeds = [1.0 if norm == "linf" else abs(p) for p in w]

    def gain(s):
        return sum(abs(p) * min(s * u, room) for p, u, room in zip(w, speeds, rooms))

    kinks = sorted({room / u for u, room in zip(speeds, rooms) if u > 0} | {0.0})
    s = kinks[-1]
    for low, high in zip(kinks, kinks[1:]):
        if gain(high) >= abs(off):
            s = low + (high - low) * (abs(off) - gain(low)) / (gain(high) - gain(low))
            break
    return [toward * min(s * u, room) for toward, u, room in zip(signs, speeds, rooms)]


def length_by_hand(d, norm):
    return max(abs(p) for p in d) if norm == "linf" else math.sqrt(sum(p * p for p in d))


def fab_by_hand(net, image, y, t, norm, steps):
    """The targeted algorithm 1 for one image (1, ...). Returns each step's new point, whether it is
    misclassified, its distance, and alpha before the cap."""
    x = image.flatten().tolist()
    z = x
    points = []
    for _ in range(steps):
        v = torch.tensor(z, dtype=torch.float64).view_as(image).requires_grad_()
        logits = net.logits(v)[0]
        f = logits[t] - logits[y]
        (g,) = torch.autograd.grad(f, v)
        w = g.flatten().tolist()
        b = sum(p * q for p, q in zip(w, z)) - f.item()
        d1 = onto_plane_by_hand(z, w, b, norm)
        d2 = onto_plane_by_hand(x, w, b, norm)
        l1 = max(length_by_hand(d1, norm), 1e-8)
        l2 = max(length_by_hand(d2, norm), 1e-8)
        share = l1 / (l1 + l2)
        alpha = min(share, 0.1)
        new = []
        for i in range(len(x)):
            value = (1 - alpha) * (z[i] + 1.05 * d1[i]) + alpha * (x[i] + 1.05 * d2[i])
            new.append(min(max(value, 0.0), 1.0))
        point = torch.tensor(new, dtype=torch.float64).view_as(image)
        wrong = net.logits(point)[0].argmax().item() != y
        far = length_by_hand([p - q for p, q in zip(new, x)], norm)
        points.append((point, wrong, far, share))
        z = [q + 0.9 * (p - q) for p, q in zip(new, x)] if wrong else new
    return points


@functools.cache
def fab_case(norm):
    """Images, labels, targets, and of each image what FAB is by hand."""
    net = Steep(4, slope=0.5)
    x = (1.4 * X(6, 3, 4, 4) - 0.2).clamp(0, 1)  # a fifth of the pixels at a face of the box
    order = net.logits(x).argsort(1, descending=True)
    y = order[:, 0]
    t = torch.stack([order[n, 1 + n % 2] for n in range(6)])
    by_hand = [fab_by_hand(net, x[n : n + 1], y[n].item(), t[n].item(), norm, 25) for n in range(6)]
    return x, y, t, by_hand


@pytest.mark.parametrize("norm", NORMS)
def test_the_steps_of_fab_are_those_of_algorithm_1(norm):
    """Projections, alpha and its cap of 0.1, extrapolation by 1.05, the step back by 0.9 if misclassified."""
    x, y, t, by_hand = fab_case(norm)
    net = Steep(4, slope=0.5)
    closest = [min([far for _, wrong, far, _ in points if wrong], default=math.inf) for points in by_hand]
    eps = 1.01 * sorted(closest)[2]  # half of them lie within
    out, found = aa.fab(aa.Queries(net), x, y, t, eps, norm, steps=25, stop=False)
    new_points = torch.stack(net.asked[1::2])  # each step asks for a gradient, then for the new point
    assert len(new_points) == 25 and 0 < found.sum() < 6
    later = [point for points in by_hand for point in points[1:]]  # at first d1 = d2, and alpha is nothing
    assert sum(share < 0.09 for *_, share in later) > 30 and sum(share > 0.2 for *_, share in later) > 3
    assert 10 < sum(not wrong for _, wrong, _, _ in later) < 100
    for n, points in enumerate(by_hand):
        want = torch.cat([point for point, *_ in points])
        torch.testing.assert_close(new_points[:, n], want, rtol=0, atol=1e-7)
        assert found[n] == (closest[n] <= eps)
        want = [point for point, wrong, far, _ in points if wrong and far == closest[n] and far <= eps]
        torch.testing.assert_close(out[n : n + 1], want[0] if want else x[n : n + 1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_stops_a_point_at_its_first_misclassified_iterate_within_eps(norm):
    x, y, t, by_hand = fab_case(norm)
    net = Steep(4, slope=0.5)
    closest = [min([far for _, wrong, far, _ in points if wrong], default=math.inf) for points in by_hand]
    eps = 1.01 * sorted(closest)[3]
    out, found = aa.fab(aa.Queries(net), x, y, t, eps, norm, steps=25)
    steps = 0
    for n, points in enumerate(by_hand):
        within = [i for i, (_, wrong, far, _) in enumerate(points) if wrong and far <= eps]
        assert found[n] == bool(within)
        want = points[within[0]][0] if within else x[n : n + 1]
        torch.testing.assert_close(out[n : n + 1], want, rtol=0, atol=1e-7)
        steps += within[0] + 1 if within else 25
    total = sum(len(z) for z in net.asked[1::2])
    assert 3 < found.sum() < 6 and steps <= total <= steps + 5 * len(x)


# ----------------------------------------------------------------------------------------------------------
# Square
# ----------------------------------------------------------------------------------------------------------
class Recorded:
    """Uniform numbers as the attack drew them, to be read again in the same order."""

    def __init__(self, monkeypatch):
        self.numbers = []
        rand = torch.rand

        def draw(*args, **options):
            u = rand(*args, **options)
            self.numbers.append(u.double())
            return u

        monkeypatch.setattr(torch, "rand", draw)

    def next(self, *shape):
        u = self.numbers.pop(0)
        assert tuple(u.shape) == shape
        return u

    def sign(self, *shape):
        return torch.where(self.next(*shape) > 0.5, 1.0, -1.0).double()

    def position(self, side, s):
        row = int((side - s) * self.next().item())
        return row, int((side - s) * self.next().item())


def margin_by_hand(net, z, y):
    logits = net.logits(z[None])[0].tolist()
    others = [v for k, v in enumerate(logits) if k != y]
    return logits[y] - max(others)


def share_by_hand(query):
    """The part p of the image that query number 0, 1, ... of 5,000 changes."""
    parts = {10: 0.8, 50: 0.4, 200: 0.2, 500: 0.1, 1000: 0.05, 2000: 0.025, 4000: 0.0125}
    for last, part in parts.items():
        if query <= last:
            return part
    return 0.00625


def test_the_share_of_5000_queries_is_halved_after_each_boundary_of_the_paper():
    for query in range(5000):
        assert aa.share(query) == pytest.approx(share_by_hand(query), rel=1e-12), query


def square_linf_by_hand(net, x, y, eps, queries, recorded, share=share_by_hand):
    """Algorithm 1 with algorithm 2. Returns the candidates of each query (the first is the start), by image,
    and the image of the first success, or the clean one."""
    n, channels, side, _ = x.shape
    stripes = recorded.sign(n, channels, 1, side)
    starts = []
    for k in range(n):
        z = x[k].clone()
        for c, i, j in itertools.product(range(channels), range(side), range(side)):
            z[c, i, j] = min(max(x[k, c, i, j].item() + eps * stripes[k, c, 0, j].item(), 0.0), 1.0)
        starts.append(z)
    candidates = [starts]
    current = list(starts)
    best = [margin_by_hand(net, z, y[k]) for k, z in enumerate(starts)]
    for query in range(queries):
        s = max(round(math.sqrt(share(query)) * side), 1)
        top, left = recorded.position(side, s)
        signs = recorded.sign(channels, 1, 1)
        new = []
        for k in range(n):
            z = current[k].clone()
            for c, i, j in itertools.product(range(channels), range(top, top + s), range(left, left + s)):
                moved = z[c, i, j].item() + 2 * eps * signs[c, 0, 0].item()
                moved = min(max(moved, x[k, c, i, j].item() - eps), x[k, c, i, j].item() + eps)
                z[c, i, j] = min(max(moved, 0.0), 1.0)
            new.append(z)
            value = margin_by_hand(net, z, y[k])
            if best[k] > 0 and value < best[k]:
                best[k] = value
                current[k] = z
        candidates.append(new)
    out = [current[k] if best[k] <= 0 else x[k] for k in range(n)]
    return candidates, torch.stack(out), best


def pattern_by_hand(s, flip):
    """Eq. 2: of a window s x s the upper half is a positive pyramid, the lower half a negative one of the
    same length, and the whole of length 1; or transposed."""
    half = s // 2
    window = torch.zeros(s, s, dtype=torch.float64)
    for begin, height, sign in ((0, half, 1), (half, s - half, -1)):
        pyramid = torch.zeros(height, s, dtype=torch.float64)
        for k in range(1, max(height, s) // 2 + 2):  # the k-th of nested squares has half the side k - 1
            for i, j in itertools.product(range(height), range(s)):
                if max(abs(i - height // 2), abs(j - s // 2)) <= k - 1:
                    pyramid[i, j] += 1 / k**2
        if height:
            window[begin : begin + height] = sign * pyramid / norm_of(pyramid, "l2")
    window = window / norm_of(window, "l2")
    return window.T if flip else window


def rescaled(x, d, eps):
    return (x + eps * d / norm_of(d, "l2")).clamp(0, 1)


def square_l2_by_hand(net, x, y, eps, queries, recorded, share=share_by_hand):
    """Algorithm 1 with algorithm 3. Returns the candidates of each query for the images that stand, and the
    images of the first success, or the clean ones."""
    n, channels, side, _ = x.shape
    s = side // 5
    begin = (side - 5 * s) // 2
    tiles = torch.zeros_like(x)
    for top, left in itertools.product(range(begin, begin + 5 * s, s), range(begin, begin + 5 * s, s)):
        pattern = pattern_by_hand(s, recorded.next().item() > 0.5)
        signs = recorded.sign(n, channels, 1, 1)
        for k, c, i, j in itertools.product(range(n), range(channels), range(s), range(s)):
            tiles[k, c, top + i, left + j] = pattern[i, j] * signs[k, c, 0, 0]
    current = {k: rescaled(x[k], tiles[k], eps) for k in range(n)}
    best = {k: margin_by_hand(net, current[k], y[k]) for k in range(n)}
    candidates = [[current[k] for k in range(n)]]
    for query in range(queries):
        standing = [k for k in range(n) if best[k] > 0]
        if not standing:
            break
        s = max(round(math.sqrt(share(query)) * side), 3)
        if s % 2 == 0:
            s += 1
        top, left = recorded.position(side, s)
        top_2, left_2 = recorded.position(side, s)
        pattern = pattern_by_hand(s, recorded.next().item() > 0.5)
        signs = recorded.sign(len(standing), channels, 1, 1)
        new = []
        for row, k in enumerate(standing):
            d = current[k] - x[k]
            moved = d.clone()
            moved[:, top_2 : top_2 + s, left_2 : left_2 + s] = 0
            unused = max(eps**2 - norm_of(d, "l2") ** 2, 0) / channels
            for c in range(channels):
                window = d[c, top : top + s, left : left + s]
                both = 0.0  # the squared length of what either window holds
                for i, j in itertools.product(range(side), range(side)):
                    first = top <= i < top + s and left <= j < left + s
                    second = top_2 <= i < top_2 + s and left_2 <= j < left_2 + s
                    if first or second:
                        both += d[c, i, j].item() ** 2
                fresh = pattern * signs[row, c, 0, 0]
                if norm_of(window, "l2") > 0:
                    fresh = fresh + window / norm_of(window, "l2")
                fresh = fresh / norm_of(fresh, "l2") * math.sqrt(unused + both)
                moved[c, top : top + s, left : left + s] = fresh
            z = rescaled(x[k], moved, eps)
            new.append(z)
            value = margin_by_hand(net, z, y[k])
            if value < best[k]:
                best[k] = value
                current[k] = z
        candidates.append(new)
    out = [current[k] if best[k] <= 0 else x[k] for k in range(n)]
    return candidates, torch.stack(out), [best[k] for k in range(n)]


def square_case(side, slope=0.3):
    net = Curved(side, slope)
    x = (1.4 * X(4, 3, side, side) - 0.2).clamp(0, 1)
    return net, x, net.label(x)


@pytest.mark.parametrize("side, eps", [(8, 0.004), (11, 0.002)])
def test_the_queries_of_square_in_linf_are_those_of_algorithm_2(monkeypatch, side, eps):
    """Vertical stripes at first; then squares of 2 eps, their sides, places and signs, and what is kept."""
    net, x, y = square_case(side)
    recorded = Recorded(monkeypatch)
    out = aa.square(aa.Queries(net), x, y, eps, "linf", seeded(), queries=20)
    candidates, want, best = square_linf_by_hand(net, x, y.tolist(), eps, 20, recorded)
    assert min(best) > 0 and len(net.asked) == 21 and not recorded.numbers
    for query, (asked, new) in enumerate(zip(net.asked, candidates)):
        torch.testing.assert_close(asked, torch.stack(new), rtol=0, atol=1e-8, msg=f"query {query}")
    assert torch.equal(out, x) and torch.equal(want, x)


@pytest.mark.parametrize("side, eps", [(8, 0.05), (11, 0.02)])
def test_square_in_linf_returns_the_first_success(monkeypatch, side, eps):
    net, x, y = square_case(side)
    recorded = Recorded(monkeypatch)
    out = aa.square(aa.Queries(net), x, y, eps, "linf", seeded(), queries=20)
    _, want, best = square_linf_by_hand(net, x, y.tolist(), eps, 20, recorded)
    assert min(best) <= 0 < max(best)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("side", [12, 17])
def test_the_queries_of_square_in_l2_are_those_of_algorithm_3(monkeypatch, side):
    """Tiles at first; then windows, the pattern in one, what the other gives up, and the length eps."""
    net, x, y = square_case(side)
    recorded = Recorded(monkeypatch)
    out = aa.square(aa.Queries(net), x, y, 0.3, "l2", seeded(), queries=16)
    candidates, want, best = square_l2_by_hand(net, x, y.tolist(), 0.3, 16, recorded)
    assert min(best) <= 0 < max(best) and len(net.asked) == len(candidates) == 17
    assert not recorded.numbers
    for query, (asked, new) in enumerate(zip(net.asked, candidates)):
        torch.testing.assert_close(asked, torch.stack(new), rtol=0, atol=1e-5, msg=f"query {query}")
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_the_smallest_squares_are_1_pixel_in_linf_and_3_in_l2(monkeypatch):
    """As they are at the end of the 5,000 queries."""
    net, x, y = square_case(9)
    monkeypatch.setattr(aa, "share", lambda i: 0.001)
    for norm, eps, by_hand in (("linf", 0.002, square_linf_by_hand), ("l2", 0.1, square_l2_by_hand)):
        with monkeypatch.context() as patch:
            recorded = Recorded(patch)
            aa.square(aa.Queries(net), x, y, eps, norm, seeded(), queries=20)
        candidates, _, _ = by_hand(net, x, y.tolist(), eps, 20, recorded, lambda query: 0.001)
        assert len(net.asked) == len(candidates) == 21
        for asked, new in zip(net.asked, candidates):
            torch.testing.assert_close(asked, torch.stack(new), rtol=0, atol=1e-5)
        net.asked.clear()


# ----------------------------------------------------------------------------------------------------------
# The standard version
# ----------------------------------------------------------------------------------------------------------
class Unfallen:
    """12 classes, of which 0 is far ahead; the others have scores of their own, and all a gradient."""

    def __init__(self, side):
        self.W = 0.01 * Z(12, 3 * side * side)
        self.ahead = torch.zeros(12, dtype=torch.float64)
        self.ahead[0] = 100

    def __call__(self, x):
        return x.flatten(1) @ self.W.to(x).T + self.ahead.to(x)


COST = {  # forward and backward passes of a point of 4 classes that stands to the end
    "apgd-ce": (101, 101),  # the start and 100 steps
    "apgd-t": (1 + 3 * 101, 3 * 101),  # the clean image, for its classes; three targets
    "fab-t": (1 + 3 * 200, 3 * 100),  # 100 steps, each of which looks at the old point and at the new
}


@pytest.mark.parametrize("stage", COST)
@pytest.mark.parametrize("norm", NORMS)
def test_a_point_that_stands_costs_100_steps_for_each_target(norm, stage):
    x = X(2, 3, 5, 5).float()
    query = aa.Queries(lambda x: Unfallen(5)(x)[:, :4], fill=1)
    out = aa.STAGES[stage](query, x, torch.zeros(2, dtype=torch.long), 0.01, norm, seeded())
    assert torch.equal(out, x)
    assert (query.forwards, query.backwards) == (2 * COST[stage][0], 2 * COST[stage][1])


@pytest.mark.parametrize("norm, search", [("linf", "square_linf"), ("l2", "square_l2")])
def test_square_asks_5000_queries_in_the_norm_given(monkeypatch, norm, search):
    x = X(2, 3, 5, 5)
    y = torch.zeros(2, dtype=torch.long)
    query = aa.Queries(Unfallen(5), fill=1)
    getattr(aa, search)(query, x, y, 0.01, seeded(), queries=20)
    assert query.forwards == 2 * (1 + 20) and query.backwards == 0  # the start comes on top
    asked = []
    monkeypatch.setattr(aa, search, lambda *args: asked.append(args[-1]))
    aa.STAGES["square"](query, x, y, 0.01, norm, seeded())
    assert asked == [5000]


@pytest.mark.parametrize("attack, stage", [("apgd", "apgd-t"), ("fab", "fab-t")])
@pytest.mark.parametrize("classes", [12, 5])
def test_the_targets_are_the_second_to_tenth_clean_class_in_that_order(monkeypatch, attack, stage, classes):
    x = X(4, 3, 5, 5)
    whole = Unfallen(5)
    targets = []

    def net(x):
        return whole(x)[:, :classes]

    def record(net, x, y, *args, **options):
        if attack == "apgd":  # net, x, y, eps, norm, loss, generator, t
            assert args[2] is aa.dlr_targeted
            t = args[4]
        else:  # net, x, y, t, ...
            t = args[0]
        targets.append(t)
        return x, torch.zeros(len(x), dtype=torch.bool)

    monkeypatch.setattr(aa, attack, record)
    aa.STAGES[stage](aa.Queries(net, fill=1), x, torch.zeros(4, dtype=torch.long), 0.01, "linf", seeded())
    ranked = net(x).argsort(1, descending=True)
    assert len({tuple(row.tolist()) for row in ranked}) > 1
    assert torch.equal(torch.stack(targets, 1), ranked[:, 1:10])


def test_the_first_stage_ascends_the_cross_entropy(monkeypatch):
    seen = []
    monkeypatch.setattr(aa, "apgd", lambda *args, **options: seen.append((args, options)) or (args[1], None))
    x = X(2, 3, 5, 5)
    aa.STAGES["apgd-ce"](aa.Queries(Unfallen(5)), x, torch.zeros(2).long(), 0.01, "l2", seeded())
    ((args, options),) = seen
    assert args[5] is aa.cross_entropy and args[3:5] == (0.01, "l2") and options == {"stop": True}
    z = A(3, 5, 0.2)
    y = torch.tensor([0, 3, 1])
    by_hand = [cross_entropy_by_hand(z[n], y[n], None) for n in range(3)]
    torch.testing.assert_close(aa.cross_entropy(z, y), torch.stack(by_hand))


class Marked:
    """Says 1 where the pixel (1, 1) of channel 0 is above 1/2, else 0. Pixel (0, 0) is the image's number."""

    def __call__(self, x):
        mark = 100 * (x[:, 0, 1, 1] - 0.5)
        return torch.stack([-mark, mark, -200 + mark, -300 - mark], 1)


def numbered(n):
    x = torch.full((n, 3, 5, 5), 0.49)
    x[:, 0, 0, 0] = torch.arange(n) / 1000
    return x, torch.zeros(n, dtype=torch.long)


def marking(stage_falls, calls):
    """Stages that mark the images of these numbers, by stage, and note what they are asked."""

    def make(name, falls):
        def stage(query, x, y, eps, norm, generator):
            numbers = (1000 * x[:, 0, 0, 0]).round().int().tolist()
            calls.append((name, numbers, eps, norm, generator.initial_seed()))
            out = x.clone()
            for row, number in enumerate(numbers):
                if number in falls:
                    out[row, 0, 1, 1] += eps
            return out

        return stage

    return {name: make(name, falls) for name, falls in stage_falls.items()}


def test_each_stage_attacks_what_still_stands_packed_into_batches_with_the_seed_anew(monkeypatch):
    calls = []
    falls = {"apgd-ce": [1, 4], "apgd-t": [0], "fab-t": [], "square": [7, 8]}
    monkeypatch.setattr(aa, "STAGES", marking(falls, calls))
    x, y = numbered(11)
    y[3] = 1  # misclassified already
    with pytest.warns(UserWarning, match="Square, which sees no gradient, fooled 2 of 11 points"):
        x_adv, report = aa.autoattack(Marked(), x, y, 0.05, norm="l2", seed=9, batch_size=4)
    assert calls == [
        ("apgd-ce", [0, 1, 2, 4], 0.05, "l2", 9), ("apgd-ce", [5, 6, 7, 8], 0.05, "l2", 9),
        ("apgd-ce", [9, 10], 0.05, "l2", 9),
        ("apgd-t", [0, 2, 5, 6], 0.05, "l2", 9), ("apgd-t", [7, 8, 9, 10], 0.05, "l2", 9),
        ("fab-t", [2, 5, 6, 7], 0.05, "l2", 9), ("fab-t", [8, 9, 10], 0.05, "l2", 9),
        ("square", [2, 5, 6, 7], 0.05, "l2", 9), ("square", [8, 9, 10], 0.05, "l2", 9)]
    assert (x_adv != x).flatten(1).any(1).nonzero().flatten().tolist() == [0, 1, 4, 7, 8]
    assert [stage["points"] for stage in report["stages"].values()] == [10, 8, 7, 7]
    standing = [8, 7, 7, 5]
    robust = [stage["robust"] for stage in report["stages"].values()]
    assert robust == pytest.approx([100 * n / 11 for n in standing])
    assert report["clean"] == pytest.approx(1000 / 11) and report["robust"] == pytest.approx(500 / 11)


def test_without_options_it_is_the_standard_version_in_linf_with_seed_0_and_batches_of_250(monkeypatch):
    calls = []
    falls = {"square": [], "fab-t": [], "apgd-t": [], "apgd-ce": []}  # the order of this table is nothing
    monkeypatch.setattr(aa, "STAGES", marking(falls, calls))
    x, y = numbered(251)
    aa.autoattack(Marked(), x, y, 0.05)
    order = ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [name for name, *_ in calls] == [name for name in order for _ in range(2)]
    assert [len(numbers) for _, numbers, *_ in calls] == 4 * [250, 1]
    assert {call[2:] for call in calls} == {(0.05, "linf", 0)}
    calls.clear()
    aa.autoattack(Marked(), x[:1], y[:1], 0.05, version="apgd")
    assert [name for name, *_ in calls] == ["apgd-ce", "apgd-t"]


@pytest.mark.parametrize("fallen, warned", [(1, False), (2, True)])
def test_more_than_a_fifth_of_a_point_for_square_means_masked_gradients(monkeypatch, recwarn, fallen, warned):
    monkeypatch.setattr(aa, "STAGES", marking({"apgd-ce": [5], "square": range(10, 10 + fallen)}, []))
    x, y = numbered(500)
    _, report = aa.autoattack(Marked(), x, y, 0.05, version=("apgd-ce", "square"))
    assert any("Square" in text for text in report["warnings"]) == warned == bool(len(recwarn))
    _, report = aa.autoattack(Marked(), x, y, 0.05, version=("square",))  # nothing before it
    assert not report["warnings"]


def test_fab_and_apgd_stay_where_there_is_no_gradient():
    asked = []

    def net(x):
        asked.append(x.detach())
        return 0 * x.flatten(1)[:, :5] + torch.tensor([2.0, 1, 0, 0, 0]).to(x)

    x = X(3, 3, 5, 5)
    y = torch.zeros(3, dtype=torch.long)
    for norm in NORMS:
        aa.fab(aa.Queries(net), x, y, y + 1, 0.1, norm, steps=5)
        assert len(asked) == 10
        for z in asked:
            torch.testing.assert_close(z, x, rtol=0, atol=1e-12)
        asked.clear()
        aa.apgd(aa.Queries(net), x, y, 0.1, norm, aa.dlr_targeted, seeded(), y + 1, steps=5)
        assert len(asked) == 6
        for z in asked:
            torch.testing.assert_close(z, asked[0], rtol=0, atol=1e-12)
        asked.clear()


@pytest.mark.parametrize("norm", NORMS)
def test_what_lies_beyond_eps_or_the_box_by_more_than_rounding_does_not_count(norm):
    x = torch.full((4, 3, 5, 5), 0.5)
    eps = 0.03
    d = torch.zeros_like(x)
    d[:, 0, 0, 0] = torch.tensor([eps, eps + 1e-6, eps + 1e-5, torch.nan])
    assert aa.inside(x + d, x, eps, norm).tolist() == [True, True, False, False]
    z = torch.zeros(4, 3, 5, 5)
    z[:, 0, 0, 0] = torch.tensor([0.0, -1e-6, 1.0, 1 + 1e-6])
    assert aa.inside(z, z.clamp(0, 1), eps, norm).tolist() == [True, False, True, False]


def test_repeated_passes_that_differ_by_a_thousandth_are_random_and_by_a_millionth_are_rounding():
    passes = []

    def net(x):
        passes.append(len(x))
        shift = torch.zeros(12, dtype=x.dtype)
        shift[1] = size * (len(passes) == at)
        return Unfallen(5)(x) + 100 * shift

    x = X(3, 3, 5, 5)
    y = torch.zeros(3, dtype=torch.long)
    for size, random in ((1e-3, True), (1e-6, False)):
        for at in (2, 3, 4, 5):  # any of five
            passes.clear()
            found = aa.misuse(aa.Queries(net), x, y, Unfallen(5)(x))
            assert any("random" in text for text in found) == random
