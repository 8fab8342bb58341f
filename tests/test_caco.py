"""The mathematics of caco.py against the paper read aloud: slow float64 loops, and printed values."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch

import caco
from common import data, optim, shapes
from tests.processes import in_two_processes
from tests.recipes import X, unit
from tests.test_adco import S, W, Linear, imagenet_commands, memory, run_on_jpegs
from tests.scripts import named_by, read_flags

q1, q2, k1, k2 = (unit(S(4, 6, p)) for p in (0, 0.4, 0.1, 0.5))
POSITIVE = torch.tensor([2, 0, 1, 2])
SHARED = torch.tensor([3, 3, 3, 0])


def slow_loss(q, positive, bank, T, positives=None):
    """One query and one row at a time; the rows as positives may be other variables than those as negatives."""
    total = 0.0
    for i in range(len(q)):
        scores = []
        for j in range(len(bank)):
            w = positives[j] if positives is not None and j == positive[i] else bank[j]
            scores.append(torch.dot(q[i], w / w.norm()) / T)
        total = total - scores[positive[i]] + torch.stack(scores).logsumexp(0)
    return total / len(q)


def slow_ascent(q, positive, bank, T, c=1.0):
    """H: what the negatives' role climbs, less c times what the positives' role climbs."""
    w, v = bank.clone().requires_grad_(), bank.clone().requires_grad_()
    g_w, g_v = torch.autograd.grad(slow_loss(q, positive, w, T, v), (w, v))
    return g_w - c * g_v


def of_rows(loss_of, *more):
    """`loss_of` for rows of any length, as train_step reads them; `more` are its last arguments."""
    return lambda q, positive, bank, T: loss_of(q, positive, unit(bank), T, *more)


contrastive_loss, cooperative_loss = of_rows(caco.contrastive_loss), of_rows(caco.cooperative_loss)


def gradients(loss_of, q, positive, T):
    a, w = q.clone().requires_grad_(), W.clone().requires_grad_()
    loss = loss_of(a, positive, w, T)
    return loss.item(), *torch.autograd.grad(loss, (a, w))


def test_positives_are_the_nearest_rows_by_cosine():
    assert caco.positives(k1, unit(W)).tolist() == caco.positives(k2, unit(W)).tolist() == [2, 0, 1, 2]
    assert (k2 @ W.T).argmax(1).tolist() == [2, 3, 4, 2]  # without normalising
    assert caco.positives(k1, unit(torch.cat([W, W]))).tolist() == [2, 0, 1, 2]  # the first of equals


@pytest.mark.parametrize("y, T, value, dq, dW, H", [
    (POSITIVE, 0.5, 0.9528473848894897, (0.6517838275330853, 0.18490311202227072),
     (0.2934258404314947, -0.02996206041249644, -0.038681871831328714),
     (0.26435388549422867, 0.03910713262527274, -0.038681871831328714)),
    (SHARED, 0.2, 4.479078277134175, (3.440481038140651, -1.1324553635865018),
     (1.9438110396960004, 0.6018526357953549, -0.04962222908649049),
     (1.3717591931186883, -0.3370302448747137, -0.04962222908649049))])
def test_both_losses_equal_slow_loops_and_the_printed_values_and_gradients(y, T, value, dq, dW, H):
    loss, a, w = gradients(contrastive_loss, q1, y, T)
    same_loss, same_a, h = gradients(cooperative_loss, q1, y, T)
    slow, slow_a, slow_w = gradients(slow_loss, q1, y, T)
    assert (loss, same_loss, slow) == pytest.approx((value,) * 3, rel=1e-9)
    for got, want in ((a, slow_a), (same_a, slow_a), (w, slow_w), (h, slow_ascent(q1, y, W, T))):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert (a.norm().item(), a[2, 1].item()) == pytest.approx(dq, rel=1e-9)
    for g, values in ((w, dW), (h, H)):
        assert (g.norm().item(), g[0, 0].item(), g[8, 5].item()) == pytest.approx(values, rel=1e-9)


VALUES = {  # (positives, temperature): of each c the norm of the bank's gradient and three of its entries
    (POSITIVE, 0.5): ((2, 3), {
        1: (0.264353885, 0.0391071326, 0.0681216472, -0.0386818718),
        0: (0.13014504, 0.00457253611, 0.000872561969, -0.0386818718),
        -0.25: (0.150932169, -0.00406111302, -0.0159397093, -0.0386818718),
        -1: (0.29342584, -0.0299620604, -0.0663765233, -0.0386818718)}),
    (SHARED, 0.2): ((3, 2), {
        1: (1.37175919, -0.337030245, 0.0151856514, -0.0496222291),
        0: (0.79488754, 0.132411195, 0.000413126714, -0.0496222291),
        -0.25: (1.00315476, 0.249771556, -0.00328000447, -0.0496222291),
        -1: (1.94381104, 0.601852636, -0.014359398, -0.0496222291)})}


@pytest.mark.parametrize("c", [1, 0, -0.25, -1])
@pytest.mark.parametrize("setting", VALUES, ids=["own", "shared"])
def test_every_cooperation_has_the_printed_gradients_and_those_of_two_roles(setting, c):
    (y, T), (place, table) = setting, VALUES[setting]
    loss, a, w = gradients(of_rows(caco.cooperative_loss, c), q1, y, T)
    value, dq = {0.5: (0.952847385, 0.651783828), 0.2: (4.47907828, 3.44048104)}[T]
    assert (loss, a.norm().item()) == pytest.approx((value, dq), rel=1e-8)
    found = (w.norm().item(), w[0, 0].item(), w[place].item(), w[8, 5].item())
    assert found == pytest.approx(table[c], rel=1e-8, abs=1e-10)
    torch.testing.assert_close(w, slow_ascent(q1, y, W, T, c), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a, gradients(slow_loss, q1, y, T)[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cooperation_minus_one_is_the_contrastive_loss_and_one_the_default_bit_for_bit(dtype):
    def results(loss_of, *more):
        a, n = (t.detach().to(dtype, copy=True).requires_grad_() for t in (q1, unit(W)))
        loss = loss_of(a, SHARED, n, 0.08, *more)
        return loss, *torch.autograd.grad(loss, (a, n))

    for found, wanted in ((results(caco.cooperative_loss, -1.0), results(caco.contrastive_loss)),
                          (results(caco.cooperative_loss, 1.0), results(caco.cooperative_loss))):
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("c, values", [
    (0, (7.72692085, 0.515604751, 4.99048824)), (-0.25, (7.73134266, 0.566594698, 5.2407713))])
def test_three_bank_steps_of_other_cooperations_equal_printed_values(c, values):
    w, v = W.clone(), torch.zeros_like(W)
    for _ in range(3):
        a = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(of_rows(caco.cooperative_loss, c)(q1, SHARED, a, 0.2), a)
        caco.bank_step(w, v, g, 0.1, 0.9)
    after = contrastive_loss(q1, SHARED, w, 0.2).item()
    assert (w.norm().item(), w[0, 0].item(), after) == pytest.approx(values, rel=1e-8)


def closed(y, T, sign):
    """Eq. 7 for the negatives, and for the positives Eq. 12 (sign 1) or Eq. 13 (sign -1), through the cosine."""
    n = W / W.norm(dim=1, keepdim=True)
    P = (q1 @ n.T / T).softmax(1)
    A = P.clone()
    for i in range(4):
        A[i, y[i]] = sign * (1 - P[i, y[i]])
    G = A.T @ q1 / 4 / T
    return (G - (n * G).sum(1, keepdim=True) * n) / W.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("y, T", [(POSITIVE, 0.5), (SHARED, 0.2), (SHARED, 0.08)])
def test_survey_eq_12_and_eq_13_are_the_banks_gradients_through_the_cosine(y, T):
    torch.testing.assert_close(gradients(cooperative_loss, q1, y, T)[2], closed(y, T, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(contrastive_loss, q1, y, T)[2], closed(y, T, -1), rtol=1e-12, atol=1e-12)


def test_survey_eq_12_sets_the_weights_of_both_roles_equal():
    n = W / W.norm(dim=1, keepdim=True)
    P = (q1 @ n.T / 0.2).softmax(1)
    own = torch.nn.functional.one_hot(SHARED, 9).bool()
    torch.testing.assert_close(P.masked_fill(own, 0).sum(), (1 - P[own]).sum(), rtol=1e-12, atol=0)


def test_the_contrastive_gradient_equals_finite_differences_and_the_cooperative_one_that_of_two_roles():
    assert torch.autograd.gradcheck(lambda w: contrastive_loss(q1, SHARED, w, 0.5), W.clone().requires_grad_())
    h = gradients(cooperative_loss, q1, SHARED, 0.5)[2]
    for j, d in ((0, 0), (3, 2), (8, 5)):
        e = torch.zeros_like(W)
        e[j, d] = 1e-6
        role = [(slow_loss(q1, SHARED, W + s * e, 0.5, W) - slow_loss(q1, SHARED, W, 0.5, W + s * e)) for s in (1, -1)]
        assert h[j, d].item() == pytest.approx(((role[0] - role[1]) / 2e-6).item(), abs=1e-8)


def test_closed_forms():
    same = unit(torch.ones(4, 8, dtype=torch.float64))
    assert contrastive_loss(same, POSITIVE, 3 * same[:1].expand(16, 8), 0.08).item() == pytest.approx(math.log(16))
    e = torch.eye(16, dtype=torch.float64)
    value = contrastive_loss(e[:3], torch.arange(3), 2 * e, 0.08).item()
    assert value == pytest.approx(math.log(1 + 15 * math.exp(-1 / 0.08)), rel=1e-10)


@pytest.mark.parametrize("loss_of", [caco.contrastive_loss, caco.cooperative_loss])
def test_the_losses_are_the_same_under_autocast_and_finite_at_any_temperature(loss_of):
    a, w = q1.float().requires_grad_(), W.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast, low = of_rows(loss_of)(a, SHARED, w, 0.08), of_rows(loss_of)(a, SHARED, w, 0.001)
    assert cast == of_rows(loss_of)(a, SHARED, w, 0.08)
    low.backward()
    assert low.isfinite() and a.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("both, T, lr, cooperative, adversarial", [
    (True, 0.08, 0.02, (7.7187389772961, 0.46099884111399336, 0.0789934020807268), (0.10471557476214732,)),
    (False, 0.2, 0.1, (7.742569881712578, 0.25920211916754565, 3.631116699009784),
     (7.761875868441428, 0.6885644140495555, 5.644950601768929))])
def test_three_bank_steps_equal_printed_values(both, T, lr, cooperative, adversarial):
    pairs = [(q1, POSITIVE), (q2, POSITIVE)] if both else [(q1, SHARED)]
    for loss_of, want in ((cooperative_loss, cooperative), (contrastive_loss, adversarial)):
        w, v = W.clone(), torch.zeros_like(W)
        for _ in range(3):
            a = w.clone().requires_grad_()
            (g,) = torch.autograd.grad(sum(loss_of(q, y, a, T) for q, y in pairs), a)
            caco.bank_step(w, v, g, lr, 0.9)
        after = sum(contrastive_loss(q, y, w, T).item() for q, y in pairs)
        assert [w.norm().item(), w[0, 0].item(), after][-len(want):] == pytest.approx(list(want), rel=1e-9)
    before = sum(contrastive_loss(q, y, W, T).item() for q, y in pairs)
    assert cooperative[2] < before < adversarial[-1]
    if both:
        assert before == pytest.approx(0.08201179322160579, rel=1e-9)


def arguments(**flags):
    return SimpleNamespace(**{**vars(caco.parser().parse_args([])), **flags})


x1 = X(4, 3, 4, 4)
x2 = x1.flip(3)


def step(net, target, x, bank=None, ema=0.0, bank_lr=0.3, noise=None, **flags):
    """A real train_step. The network's optimizer only records."""
    bank = bank or memory(W)
    opt = torch.optim.SGD(net.parameters(), 0.0)
    settings = named_by(caco.train_step, caco, arguments(**flags), ema=ema, bank_lr=bank_lr)
    return caco.train_step(net, target, opt, bank, x, noise, **settings), bank


@pytest.mark.parametrize("c", [1.0, 0.0, -0.25, -1.0])
@pytest.mark.parametrize("small", [0, 3])
def test_a_step_moves_both_players_from_one_point(c, small):
    net, target, slow = Linear(), Linear().requires_grad_(False), Linear()
    x = [x1, x2, *(x1.flip(2).roll(s, 0) for s in range(small))]
    losses, bank = step(net, target, x, cooperation=c, temperature=0.2)
    q, k = [unit(slow(v)) for v in x], [unit(Linear()(v)).detach() for v in x[:2]]
    y = [(key @ unit(W).T).argmax(1) for key in k]
    pairs = [(0, 1), (1, 0)] if not small else [(i, j) for i in range(len(x)) for j in range(2) if i != j]
    loss, H = 0.0, torch.zeros_like(W)
    for i, j in pairs:
        share = 1.0 if not small else 1 / 2 if i < 2 else 1 / (2 * small)
        loss = loss + share * slow_loss(q[i], y[j], W, 0.2)
        H += share * slow_ascent(q[i].detach(), y[j], W, 0.2, c)
    loss.backward()
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(net.W.grad, slow.W.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(bank.velocity, -H, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bank.rows, W + 0.3 * H, rtol=1e-9, atol=1e-12)
    assert target.W.grad is None


def test_the_alarms_are_what_they_are_called():
    net = Linear()
    losses, bank = step(net, Linear().requires_grad_(False), [x1, x2], temperature=0.2, bank_lr=0.05)
    q = [unit(net(x)).detach() for x in (x1, x2)]
    y = [caco.positives(unit(Linear()(x)), unit(W)) for x in (x2, x1)]
    before, after = (sum(slow_loss(*pair, rows, 0.2) for pair in zip(q, y)) / 2 for rows in (W, bank.rows))
    assert losses["bank_change"].item() == pytest.approx((after - before).item(), rel=1e-9) and after < before
    s = torch.cat(q) @ unit(bank.rows).T
    p = (s / 0.2).softmax(1).gather(1, torch.cat(y)[:, None])
    assert losses["p"].item() == pytest.approx(p.mean().item(), rel=1e-9)
    assert losses["cosine"].item() == pytest.approx(s.amax(1).mean().item(), rel=1e-9)
    assert losses["unique"].item() == len(y[0].unique())
    angle = 2 * torch.asin((unit(bank.rows) - unit(W)).norm(dim=1) / 2)
    assert losses["rotation"].item() == pytest.approx(angle.mean().item(), rel=1e-2)
    assert losses["norm"].item() == pytest.approx(bank.rows.norm(dim=1).mean().item(), rel=1e-12)


def test_cooperation_draws_the_bank_near_and_eq_13_drives_it_away():
    """The bank alone, against standing queries: what the ablation must show."""
    cosine = {}
    for c in (1.0, 0.0, -1.0):
        bank = memory(W)
        for _ in range(30):
            losses, _ = step(Linear(), Linear().requires_grad_(False), [x1, x2], bank, bank_lr=0.05,
                             cooperation=c, temperature=0.2)
        cosine[c] = losses["cosine"].item()
    first = (torch.cat([unit(Linear()(x)) for x in (x1, x2)]) @ unit(W).T).amax(1).mean().item()
    assert cosine[-1.0] < cosine[0.0] < cosine[1.0] and cosine[1.0] > first


def real():
    torch.manual_seed(0)
    net = caco.network("slim")
    g = torch.Generator().manual_seed(1)
    x1, x2 = torch.rand(2, 8, 3, 32, 32, generator=g)
    return net, copy.deepcopy(net).requires_grad_(False), memory(torch.randn(32, 128, generator=g)), [x1, x2]


def test_each_network_sees_each_view_once_and_the_keys_come_after_the_momentum_update():
    net, target, bank, x = real()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.01
    want = [m * 0.9 + p * 0.1 for m, p in zip(target.parameters(), net.parameters())]
    step(net, target, x, bank, ema=0.9)
    for got, expected in zip(target.parameters(), want):
        torch.testing.assert_close(got, expected)
    assert net[0].bn1.num_batches_tracked == target[0].bn1.num_batches_tracked == 2
    assert all(p.grad is None for p in target.parameters())


def on_ranks(rank, world):
    """Three steps on this process's share of eight images, linear networks and a bank."""
    x = X(8, 3, 4, 4).chunk(world)[rank]
    net, target, bank = Linear(), Linear().requires_grad_(False), memory(W)
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        losses = caco.train_step(net, target, opt, bank, [x, x.flip(3)], None, **named_by(
            caco.train_step, caco, arguments(temperature=0.2), ema=0.9, bank_lr=0.3))
    return losses["loss"].detach(), net.W.detach(), bank.rows, bank.velocity


def test_two_ranks_keep_equal_banks_and_take_the_steps_of_one(tmp_path):
    loss, *want = on_ranks(0, 1)
    both = in_two_processes(on_ranks, tmp_path)
    torch.testing.assert_close((both[0][0] + both[1][0]) / 2, loss, rtol=1e-10, atol=1e-12)
    for a, b, c in zip(both[0][1:], both[1][1:], want):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cosine, unique, cooperation, size, lines", [
    (0.1, 16.0, 1, 16, 1), (0.8, 3.0, 1, 16, 1), (0.8, 4.0, 1, 16, 0), (0.8, 3.0, 0, 16, 1),
    (0.8, 3.0, 1, 8, 0),  # of 8 rows
    (0.1, 3.0, -0.25, 16, 0)])  # fleeing positives are few, and that is no fault of the fill
def test_a_dead_bank_is_named_in_one_line_an_epoch(
        tmp_path, capsys, monkeypatch, cosine, unique, cooperation, size, lines):
    monkeypatch.setattr(caco, "alarms", lambda *_: {"cosine": torch.tensor(cosine), "unique": torch.tensor(unique)})
    caco.main(["--data", "shapes", "--limit", "32", "--arch", "slim", "--batch-size", "16", "--epochs", "1",
               "--bank-size", str(size), "--fill-steps", "1", "--device", "cpu", "--out", str(tmp_path),
               "--cooperation", str(cooperation)])
    assert capsys.readouterr().out.count("the bank is dead: cosine") == lines


@pytest.mark.parametrize("epoch, lr", [
    (0, 0.12), (4, 0.6), (9, 1.2), (10, 1.2), (100, 0.6550521312105655), (199, 0.012081196834473411)])
def test_learning_rate_equals_printed_values(epoch, lr):
    assert caco.lr_at(epoch, 200, 1.2, 10, 0.012) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize("epoch, lr", [(0, 0.3), (4, 1.5), (9, 3), (10, 3), (199, 3)])
def test_the_banks_rate_warms_up_and_stays(epoch, lr):
    assert caco.lr_at(epoch, 200, 3, 10, 3) == pytest.approx(lr)
    assert caco.lr_at(epoch, 200, 3, 0, 3) == 3


@pytest.mark.parametrize("epoch, ema", [(0, 0.99), (50, 0.9914644660940672), (100, 0.995), (199, 0.9999993831624083)])
def test_momentum_of_the_key_network_equals_printed_values(epoch, ema):
    assert caco.ema_at(epoch, 200, 0.99) == pytest.approx(ema, rel=1e-12)


def test_network_sizes_are_the_authors():
    def size(net):
        return sum(p.numel() for p in net.parameters())

    assert size(caco.network("resnet18")[1]) == 591_872
    assert size(caco.network("resnet50", "imagenet", 256)) == pytest.approx(32.43e6, rel=1e-3)


def test_lars_leaves_tensors_of_one_dimension_without_decay_and_scaling():
    net = caco.network("slim")
    opt = caco.optimizer(net, arguments(optimizer="lars", weight_decay=0.1))
    assert isinstance(opt, optim.LARS)
    (matrices, vectors) = opt.param_groups
    assert all(p.dim() > 1 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(net.parameters()))
    assert (matrices["weight_decay"], matrices["trust"], matrices["momentum"]) == (0.1, 0.001, 0.9)
    assert (vectors["weight_decay"], vectors["trust"], vectors["momentum"]) == (0.0, None, 0.9)


def test_lars_takes_the_rate_of_each_epoch_in_both_groups(tmp_path, monkeypatch):
    seen, train_step = [], caco.train_step

    def spy(net, target, opt, *rest, **settings):
        seen.append([group["lr"] for group in opt.param_groups])
        return train_step(net, target, opt, *rest, **settings)

    monkeypatch.setattr(caco, "train_step", spy)
    caco.main(["--data", "shapes", "--limit", "16", "--arch", "slim", "--batch-size", "16", "--epochs", "2",
               "--bank-size", "8", "--fill-steps", "1", "--device", "cpu", "--optimizer", "lars", "--lr", "0.2",
               "--out", str(tmp_path)])
    assert seen == [[0.2, 0.2], [0.1, 0.1]]


def test_views_of_multi_crop_have_the_published_sides():
    class Half:
        def uniform(self, *shape, device="cpu"):
            return torch.full((2, *shape), 0.5)

    x = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    crops = caco.views(x, Half(), 224, multi_crop=True, blur=False)
    assert [v.shape[3] for v in crops] == [224, 224, *[96] * 6]
    assert [v.shape for v in caco.views(x, Half(), 32, multi_crop=False, blur=False)] == [(2, 3, 32, 32)] * 2


def test_defaults():
    want = dict(epochs=200, batch_size=256, lr=0.06, lr_final=0, warmup=0, weight_decay=5e-4, ema=0.99, dim=128,
                bank_size=4096, temperature=0.08, bank_lr=0.3, bank_warmup=10, bank_momentum=0.9, fill_steps=256,
                fill_temperature=0.2, cooperation=1, optimizer="sgd", multi_crop=False, blur=False,
                norm="linf", eps=0, step_size=None, steps=5, random_start=True,
                arch="resnet18", data="cifar10", image_size=None)
    args = vars(caco.parser().parse_args([]))
    assert {key: args[key] for key in want} == want


@pytest.mark.parametrize("flags, words", [
    (["--cooperation", "-1.5"], "--cooperation -1.5: must be a number from -1 to 1"),
    (["--positives", "adversarial"], r"unrecognized arguments: --positives adversarial \(see caco.py --help\)"),
    (["--optimizer", "adam"], "--optimizer adam: choose one of sgd, lars, adamw"),
    (["--eps", "300"], "--eps 300: with --norm linf at most 255, the range of a pixel"),
    (["--eps", "-8"], "--eps -8: must be"), (["--norm", "l1"], "--norm l1: choose one of linf, l2"),
    (["--fill-steps", "-1"], "--fill-steps -1: must be"),
    (["--temperature", "0"], "--temperature 0: must be"),
    (["--ema", "1.5"], "--ema 1.5: must be a number from 0 to 1"),
    (["--bank-lr", "-1"], "--bank-lr -1: must be")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(caco, *flags)


@pytest.mark.parametrize("more", [[], ["--multi-crop"]])
def test_the_imagenet_command_runs_on_jpegs(more, tmp_path):
    ((*flags,),) = imagenet_commands(caco)
    args = caco.parser().parse_args(flags)
    assert (args.bank_size, args.lr, args.fill_steps) == (65536, 0.3 * args.batch_size / 256, 65536 / args.batch_size)
    out = run_on_jpegs(caco, [*flags, *more, "--warmup", "0"], tmp_path)
    assert torch.load(out / "encoder.pt", weights_only=True)["stem"] == "imagenet"


def test_pictures_attack_a_view_with_the_positives_of_the_other_ones_key(monkeypatch):
    net, target, bank, _ = real()
    args = arguments(eps=8.0, steps=1)
    x, y, _ = shapes.shapes(8, seed=0)
    given = []

    def spy(net, view, positive, n, noise, **settings):
        given.append((view, positive))
        return view

    def embed(net, view):  # unlike a network without training, it tells images apart
        return unit(view.flatten(1)[:, 500:628] - 0.5)

    monkeypatch.setattr(caco, "attack", spy)
    monkeypatch.setattr(caco, "embed", embed)
    rows = caco.pictures(net, target, bank, data.Images(x, y, 4), 32, args)
    assert [name for name, _ in rows] == ["x1", "x2", "x1_adv", "x1_adv - x1", "x2_adv", "x2_adv - x2"]
    wanted = [(embed(target, view) @ unit(bank.rows).T).argmax(1) for _, view in rows[:2]]
    assert not torch.equal(*wanted)
    for (view, positive), (_, own), other in zip(given, rows, wanted[::-1]):
        assert torch.equal(view, own) and torch.equal(positive, other[None])
