"""pretext.py: the printed values of its restatement, the tasks, the joint attack, what is exported, bad input."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pretext
from common import data, encoders
from tests.recipes import X
from tests.scripts import TINY, tiny_npz


def S(n, d, p):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


def wsum(t):
    return sum(v.item() * math.cos(0.01 * k) for k, v in enumerate(t.flatten()))


def near(found, wanted, rel=1e-8):
    assert [float(torch.as_tensor(v).detach()) for v in found] == pytest.approx([float(v) for v in wanted], rel=rel)


# The tasks --------------------------------------------------------------------------------------------------
PERMUTATIONS = torch.tensor([[((2 * c + 1) * j + 3 * c) % 16 for j in range(16)] for c in range(1, 31)])


def test_jigsaws_equal_printed_values():
    x = torch.arange(3.0 * 64).view(3, 1, 8, 8)
    shuffled = pretext.jigsaw(x, torch.tensor([0, 1, 30]), PERMUTATIONS)
    assert torch.equal(shuffled[0], x[0])
    assert shuffled[1, 0, 0].tolist() == [70, 71, 84, 85, 98, 99, 112, 113]
    assert shuffled[2, 0, 0].tolist() == [164, 165, 150, 151, 144, 145, 130, 131]
    assert shuffled[2, 0, 7].tolist() == [156, 157, 142, 143, 136, 137, 186, 187]
    assert wsum(shuffled) == pytest.approx(5031.90825, rel=1e-8)


def test_jigsaws_equal_a_loop_and_the_inverse_permutation_undoes_them():
    x = torch.rand(5, 3, 12, 12)
    permutations = torch.stack([torch.randperm(9) for _ in range(4)])
    y = torch.tensor([4, 0, 2, 1, 3])
    shuffled = pretext.jigsaw(x, y, permutations)
    for b in range(5):
        for j in range(9):
            patch = j if y[b] == 0 else int(permutations[y[b] - 1, j])
            there = x[b, :, 4 * (patch // 3) : 4 * (patch // 3) + 4, 4 * (patch % 3) : 4 * (patch % 3) + 4]
            here = shuffled[b, :, 4 * (j // 3) : 4 * (j // 3) + 4, 4 * (j % 3) : 4 * (j % 3) + 4]
            assert torch.equal(here, there)
    assert torch.equal(pretext.jigsaw(shuffled, y, permutations.argsort(1)), x)


def test_classes_of_jigsaw_equal_printed_values_and_the_identity_comes_more_often():
    u = torch.tensor([[0.5, 0.5], [0.99, 0.09], [0.999, 0.95], [0, 0.5], [0.4, 0.1]], dtype=torch.float64)
    assert pretext.jigsaw_labels(u).tolist() == [15, 0, 30, 0, 12]
    n = 200_000
    y = pretext.jigsaw_labels(torch.rand(n, 2, generator=torch.Generator().manual_seed(0)))
    counts = y.bincount(minlength=31) / n
    assert len(counts) == 31
    for share, wanted in ((counts[0], 0.1 + 0.9 / 31), (counts[1:].min(), 0.9 / 31), (counts[1:].max(), 0.9 / 31)):
        assert abs(share - wanted) < 5 * (wanted / n) ** 0.5


def batch_of(tasks, total=16, rows=slice(None), epoch=0, side=16):
    """What a process with these `rows` of a global batch learns: images of each task, targets."""
    args = pretext.parser().parse_args(["--tasks", *tasks])
    net = pretext.network("slim", tasks, 30, 1, 0)
    x = torch.randint(0, 256, (total, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images, targets = pretext.batch_of_tasks(net, x[rows], data.Rng((7, epoch, 0), total, rows), side, args, 4, True)
    return images.chunk(len(tasks)), targets


def test_rotations_are_balanced_over_the_batch_and_equal_printed_values():
    assert wsum(pretext.rotate(X(3, 2, 4, 4), torch.tensor([3, 1, 2]))) == pytest.approx(45.2170936, rel=1e-8)
    (y,) = batch_of(["rotation"], total=18)[1]
    assert sorted(y.bincount(minlength=4).tolist()) == [4, 4, 5, 5]
    (other,) = batch_of(["rotation"], total=18, epoch=1)[1]
    assert not torch.equal(y, other)


def test_two_processes_have_the_tasks_of_one():
    tasks = ["selfie", "rotation", "jigsaw"]
    images, targets = batch_of(tasks)
    for rows in (slice(0, 8), slice(8, 16)):
        own_images, own_targets = batch_of(tasks, rows=rows)
        for i, task in enumerate(tasks):
            assert torch.equal(own_images[i], images[i][rows])
            assert torch.equal(own_targets[i], targets[i] if task == "selfie" else targets[i][rows])
    assert targets[0].sort().values.tolist() == list(range(16))  # an order of the patches, one for all


def test_permutations_of_jigsaw_come_from_the_seed_alone():
    def drawn(seed, before):
        torch.manual_seed(before)
        return pretext.network("slim", ["jigsaw"], 30, 1, seed).permutations

    assert torch.equal(drawn(0, 1), drawn(0, 2)) and not torch.equal(drawn(0, 1), drawn(1, 1))
    assert drawn(0, 1).shape == (30, 16) and (drawn(0, 1).sort(1).values == torch.arange(16)).all()


def test_rotation_and_jigsaw_have_last_stages_of_their_own_that_start_differently():
    net = pretext.network("slim", ["rotation", "jigsaw"], 30, 1, 0)
    own = dict(net.jigsaw_stage.named_parameters())
    for name, w in net.encoder.layer4.named_parameters():
        other = own[f"0.{name}"]
        assert other is not w and (w.dim() == 1 or not torch.equal(other, w)), name
    assert not hasattr(pretext.network("slim", ["selfie"], 30, 1, 0), "rotation_head")


# Selfie -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("double, value, of_queries, of_features", [
    (False, 2.50776173, (1.87092949, -0.283358841, 0.649669385), (1.15926532, -0.220554843, -0.340980153)),
    (True, 4.16759467, (0.75813066, -0.178855277, 0.082879992), (0.524764887, -0.105485508, 0.0138249349))])
def test_selfies_loss_equals_printed_values(double, value, of_queries, of_features):
    queries = S(8, 5, 0.3).view(2, 4, 5).requires_grad_()
    features = (1.5 * S(8, 5, 1.1)).view(2, 4, 5).requires_grad_()
    loss = pretext.selfie_loss(queries, features, double)
    g, h = torch.autograd.grad(loss, (queries, features))
    near([loss, g.norm(), g[0, 0, 0], g[1, 3, 2]], [value, *of_queries])
    near([h.norm(), h[0, 1, 0], h[1, 3, 4]], of_features)


@pytest.mark.parametrize("double", [False, True])
def test_selfies_loss_is_a_sum_of_four_choices(double):
    queries, features = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 6).double()
    total = 0.0
    for b in range(3):
        for i in range(4):
            logits = torch.stack([queries[b, i] @ features[b, j] for j in range(4)])
            if double:
                logits = logits.exp() / logits.exp().sum()
            term = -(logits[i].exp() / logits.exp().sum()).log()
            assert not double or 0.74367 <= term <= 1.74367
            total += term / 3
    near([pretext.selfie_loss(queries, features, double)], [total], 1e-10)
    near([pretext.selfie_loss(queries, torch.ones(3, 4, 6).double(), double)], [4 * math.log(4)], 1e-12)


def test_double_softmax_bounds_a_choice():
    right = 50 * torch.eye(4).double()[None]
    near([pretext.selfie_loss(right, right, True) / 4, pretext.selfie_loss(right, right.roll(1, 1), True) / 4],
         [0.74367, 1.74367], 1e-5)


def test_the_pooling_has_the_codes_size_and_does_not_know_where_patches_were():
    with torch.device("meta"):
        pool = pretext.AttentionPool(1024, 13)
    layers = 13 * (4 * (1024**2 + 1024) + 2 * 1024 * 2048 + 2048 + 1024 + 4 * 1024)
    assert sum(w.numel() for w in pool.parameters()) == layers + 1024 + 8 * 1024 and pool.layers[0].heads == 16
    assert layers / 1e6 == pytest.approx(109.2, abs=0.05)
    pool = pretext.AttentionPool(8, 2).double().eval()
    features = torch.randn(2, 12, 8).double()
    places = torch.tensor([0, 5, 10, 15])
    torch.testing.assert_close(pool(features.flip(1), places), pool(features, places))
    queries = pool(features, places)
    torch.testing.assert_close(queries - queries[:, :1], (pool.rows - pool.rows[0]).expand(2, 4, 8))


def test_the_pooling_equals_a_loop_over_heads_and_has_second_derivatives():
    layer = pretext.PoolLayer(6, 2, 5, 0.0).double()
    x = torch.randn(2, 4, 6).double()
    q, k, v = layer.qkv(x).chunk(3, 2)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5).softmax(2)
        heads.append(weights @ v[..., part])
    y = F.layer_norm(x + layer.out(torch.cat(heads, 2)), (6,))
    y = F.layer_norm(y + layer.mlp[2](F.gelu(layer.mlp[0](y), approximate="tanh")), (6,))
    torch.testing.assert_close(layer(x), y)
    assert torch.autograd.gradgradcheck(layer, x[:1].clone().requires_grad_())


def test_the_pooling_starts_with_the_codes_numbers():
    """Rows of the grid differ from the start, columns and the token only once they have learnt."""
    torch.manual_seed(0)
    pool = pretext.AttentionPool(512, 2)
    assert pool.rows.mean().item() == pytest.approx(0, abs=0.1) and pool.rows.std().item() == pytest.approx(1, abs=0.1)
    assert not pool.columns.any() and not pool.token.any()
    assert [module.p for module in pool.modules() if isinstance(module, nn.Dropout)] == [0.1, 0.1]


# The diversity of gradients ---------------------------------------------------------------------------------
def test_log_det_equals_printed_values():
    a, b, c = (S(2, 6, p).requires_grad_() for p in (0.2, 1.4, 2.9))
    near([pretext.log_det([a])], [9.99982889e-06], 1e-7)
    two = pretext.log_det([a, b])
    (g,) = torch.autograd.grad(two, a)
    near([two, g.norm(), g[0, 0]], [-0.164365337, 0.369329912, -0.159070429], 1e-7)
    three = pretext.log_det([a, b, c])
    g, _, h = torch.autograd.grad(three, (a, b, c))
    near([three, g.norm(), g[0, 0], h.norm(), h[1, 5]],
         [-10.7885764, 0.0256361422, 0.00716789947, 0.137042682, 0.0440067874], 1e-7)


def test_log_det_is_largest_for_orthogonal_gradients():
    e = torch.eye(3, 5).double()
    one, two, three = 2 * e[:1], 3 * e[1:2], 0.1 * e[2:]
    near([pretext.log_det([one, two, three])], [2.99999e-5], 1e-4)
    near([pretext.log_det([one, one, three]), pretext.log_det([one, one, one])], [-10.819763, -21.927235], 1e-7)


x1 = X(2, 1, 3, 4)
IMAGES = torch.cat([x1, 1 - x1, x1.flip(3)])
WEIGHTS = [S(4, 12, 0.5), S(5, 12, 1.2), S(3, 12, 2.1)]
TARGETS = [torch.tensor([0, 3]), torch.tensor([4, 1]), torch.tensor([2, 2])]


def linear_task(W, y):
    def loss(x):
        return F.cross_entropy(x.flatten(1) @ W.T, y)
    return loss


LOSSES = [linear_task(W, y) for W, y in zip(WEIGHTS, TARGETS)]


@pytest.mark.parametrize("lam, total, in_x, in_w", [
    (0.1, 5.18973402, (2.92196016, -0.140774481, -0.103641551), (1.3561738, 0.275029871, -0.139392715)),
    (1.0, 5.01545638, (2.93076348, -0.103853368, -0.180312161), (1.37165024, 0.24945581, -0.233130769)),
    (-0.1, 5.22846238, (2.92644457, -0.148979172, -0.0866036374), (1.35990163, 0.280712996, -0.118562036))])
def test_the_joint_loss_equals_printed_values(lam, total, in_x, in_w):
    x = IMAGES.clone().requires_grad_()
    W = WEIGHTS[0].clone().requires_grad_()
    losses, g = pretext.joint([linear_task(W, TARGETS[0]), *LOSSES[1:]], x)
    near([*losses, g], [1.42773255, 1.31461709, 2.46674856, -0.193641822], 1e-7)
    value = sum(losses) + lam * g
    of_x, of_w = torch.autograd.grad(value, (x, W))
    near([value, of_x.norm(), of_x.flatten()[0], of_x.flatten()[-1], of_w.norm(), of_w[0, 0], of_w[3, 11]],
         [total, *in_x, *in_w], 1e-7)


def test_the_joint_loss_of_two_tasks_equals_printed_values():
    x = IMAGES[:4].clone().requires_grad_()
    W = WEIGHTS[0].clone().requires_grad_()
    losses, g = pretext.joint([linear_task(W, TARGETS[0]), LOSSES[1]], x)
    value = sum(losses) + g
    of_x, of_w = torch.autograd.grad(value, (x, W))
    near([g, value, of_x.norm(), of_x.flatten()[0], of_x.flatten()[-1], of_w.norm(), of_w[0, 0], of_w[3, 11]],
         [-0.0821867259, 2.66016292, 2.08264241, -0.120673931, -0.316962439, 1.37164083, 0.300606771, -0.18436826],
         1e-7)


def attacked(losses, x, lam, eps, steps, noise):
    return pretext.attack(nn.Identity(), losses, x, noise, lam=lam, eps=eps / 255, step_size=2 / 255, steps=steps)


@pytest.mark.parametrize("lam, moved, size, after", [
    (0.1, (0.056784349, 0.0402445079, 0.00938345646), 1.32985911, (5.51120868, -0.180681079)),
    (1.0, (0.056784349, 0.0840339828, 0.0945748227), 1.38678065, (5.50268139, -0.166956364)),
    (-0.1, (0.056784349, 0.0314489881, 0.00938345646), 1.31297549, (5.51144156, -0.181904049))])
def test_the_joint_attack_equals_printed_values(lam, moved, size, after):
    x_adv = attacked(LOSSES, IMAGES, lam, 8, 3, S(6, 12, 0.7))
    d = (x_adv - IMAGES).flatten(1)
    near([*((d * S(6, 12, 2)).view(3, -1).sum(1)), d.abs().sum()], [*moved, size], 1e-7)
    losses, g = pretext.joint(LOSSES, x_adv.requires_grad_())
    near([sum(losses), g], after, 1e-7)


def test_the_joint_attack_on_two_tasks_equals_printed_values():
    x_adv = attacked(LOSSES[:2], IMAGES[:4], 1.0, 4, 2, S(4, 12, 0.7))
    d = (x_adv - IMAGES[:4]).flatten(1)
    near([*((d * S(4, 12, 2)).view(2, -1).sum(1)), d.abs().sum()], [0.0231935815, 0.0343792455, 0.488686314], 1e-7)
    losses, g = pretext.joint(LOSSES[:2], x_adv.requires_grad_())
    near([sum(losses), g], [2.85363575, -0.0780159035], 1e-7)


def test_without_lambda_the_joint_attack_is_each_tasks_own():
    noise = S(6, 12, 0.7)
    together = attacked(LOSSES, IMAGES, 0.0, 8, 3, noise)
    for i, loss in enumerate(LOSSES):
        rows = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(attacked([loss], IMAGES[rows], 0.5, 8, 3, noise[rows]), together[rows],
                                   rtol=0, atol=1e-15)


def test_the_objective_equals_printed_values_and_the_papers_sum():
    losses, clean = torch.tensor([1.0, 2, 4]), torch.tensor([0.5, 1.5, 2.5])
    g = torch.tensor(-3.0)
    near([pretext.objective(list(losses), list(clean), g, 0.1, 0.5), pretext.objective(list(losses), None, g, 0.1, 0)],
         [1.61666667, 2.03333333], 1e-6)
    near([3 * pretext.objective(list(losses), None, g, 0.3 / 3, 0)], [(losses.sum() + 0.3 * g).item()], 1e-6)


# The attack on the network ----------------------------------------------------------------------------------
@pytest.mark.parametrize("tasks", [["rotation"], ["selfie"], ["selfie", "rotation", "jigsaw"]])
def test_the_attack_climbs_and_stays_in_ball_and_box_and_leaves_no_trace(tasks):
    torch.manual_seed(0)
    args = pretext.parser().parse_args(["--tasks", *tasks])
    net = pretext.network("slim", tasks, 30, 1, 0)
    x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    x, targets = pretext.batch_of_tasks(net, x, data.Rng((0, 0, 0), 6, slice(None)), 16, args, 4, True)
    losses = [pretext.functools.partial(pretext.task_loss, net, *pair, False) for pair in zip(tasks, targets)]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(3)
    settings = dict(lam=0.1, eps=8 / 255, step_size=2 / 255, steps=4)
    noise = 2 * torch.rand(len(x), 768) - 1
    x_adv = pretext.attack(net, losses, x, noise, **settings)
    torch.manual_seed(4)  # no dropout in the attack
    assert torch.equal(pretext.attack(net, losses, x, noise, **settings), x_adv)
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(w.grad is None for w in net.parameters()) and all(m.training for m in net.modules())
    with pretext.frozen_stats(net), pretext.eval_mode(*[m for m in net.modules() if isinstance(m, nn.Dropout)]):
        assert sum(pretext.losses_at(losses, x_adv)) > sum(pretext.losses_at(losses, x)) + 1e-3
    assert torch.equal(pretext.attack(net, losses, x, noise, **{**settings, "eps": 0.0}), x)


def test_dropout_is_live_in_the_update():
    net = pretext.network("slim", ["selfie"], 30, 1, 0)
    loss = pretext.functools.partial(pretext.task_loss, net, "selfie", torch.arange(16), False)
    x = torch.rand(4, 3, 16, 16)
    with pretext.frozen_stats(net):
        assert loss(x) != loss(x)


def test_the_rate_is_a_ramp_and_then_a_cosine_to_its_end():
    rates = [pretext.lr_at(step, 1000, 0.1, 1e-6, 200) for step in (0, 100, 200, 500, 1000)]
    end = 1e-6
    early = end + (0.1 - end) * (1 + math.cos(math.pi * 0.2)) / 2
    assert rates == pytest.approx([0.01, 0.055, early, (0.1 + end) / 2, end])
    assert pretext.lr_at(0, 1000, 0.025, 1e-6, 0) == pytest.approx(0.025)


# The run ----------------------------------------------------------------------------------------------------
def main(tmp_path, *flags):
    small = ["--steps", "1", "--pool-layers", "1", "--data", tiny_npz(tmp_path / "d.npz"), "--out", str(tmp_path / "r")]
    pretext.main([*TINY, *small, *flags])


def run(tmp_path, *flags):
    main(tmp_path, *flags)
    saved = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["state"]["net"]
    return encoders.load_encoder(tmp_path / "r" / "encoder.pt"), saved


def test_the_exported_encoder_normalises_by_the_colours_of_cifar_10(tmp_path):
    main(tmp_path, "--epochs", "0")
    encoder = encoders.load_encoder(tmp_path / "r" / "encoder.pt")
    assert encoder.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert encoder.std.flatten().tolist() == pytest.approx([0.2470, 0.2435, 0.2616])


def test_the_log_begins_with_the_losses_of_uniform_answers(tmp_path):
    """ln 4 of the rotations, ln 31 of the identity and 30 permutations, and of Selfie four choices: 4 ln 4."""
    main(tmp_path, "--epochs", "0", "--tasks", "rotation", "jigsaw", "selfie")
    first = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[0])
    assert "loss of uniform answers: rotation 1.386, jigsaw 3.434, selfie 5.545;" in first["note"]


def test_the_logged_accuracies_are_those_of_a_loop_in_eval_mode_and_leave_the_network_alone():
    """Of the first 256 images of a fixed order."""
    tasks = ["selfie", "rotation", "jigsaw"]
    args = pretext.parser().parse_args(["--tasks", *tasks, "--permutations", "3"])
    torch.manual_seed(0)
    net = pretext.network("slim", tasks, 3, 1, 0)
    pixels = torch.randint(0, 256, (260, 3, 16, 16), dtype=torch.uint8)
    images = data.Images(pixels, torch.zeros(260), 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = pretext.clean_accuracy(net, images, 16, args)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    x, _, rng = next(data.batches(images, 256, args.seed, 0))
    x, (order, turns, shuffles) = pretext.batch_of_tasks(net, x, rng, 16, args, 4, True)
    selfie, rotation, jigsaw = x.chunk(3)
    net.eval()
    with torch.no_grad():
        queries, features = net(selfie, "selfie", order)
        turned = net(rotation, "rotation", None).tolist()
        shuffled = net(jigsaw, "jigsaw", None).tolist()
    right = dict.fromkeys(["accuracy_selfie", "accuracy_rotation", "accuracy_jigsaw"], 0)
    for b in range(256):
        for place in range(4):
            dots = [float(queries[b, place] @ feature) for feature in features[b]]
            right["accuracy_selfie"] += (dots.index(max(dots)) == place) / 4
        right["accuracy_rotation"] += turned[b].index(max(turned[b])) == turns[b]
        right["accuracy_jigsaw"] += shuffled[b].index(max(shuffled[b])) == shuffles[b]
    assert found == pytest.approx({name: float(count) / 256 for name, count in right.items()})


@pytest.mark.parametrize("tasks, trained", [
    (["selfie"], False), (["jigsaw"], True), (["jigsaw", "rotation"], True)])
def test_the_exported_encoder_is_the_trained_trunk_with_rotations_last_stage(tmp_path, tasks, trained):
    encoder, saved = run(tmp_path, "--tasks", *tasks)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"]), name
    moved = saved["encoder.layer4.0.bn1.num_batches_tracked"] > 0
    assert bool(moved) == trained and saved["encoder.layer1.0.bn1.num_batches_tracked"] > 0
    assert ("jigsaw_stage.0.0.conv1.weight" in saved) == (len(tasks) == 2)
    exported = torch.load(tmp_path / "r" / "encoder.pt", weights_only=True)
    assert exported.get("fresh") == (None if trained else "the last stage")


def test_images_that_are_held_out_are_those_of_fine_tuning_and_not_seen(tmp_path, monkeypatch):
    seen = []

    def batches(images, *rest):
        seen.append(images.rows.tolist())
        raise ValueError("seen")

    monkeypatch.setattr(pretext.data, "batches", batches)
    with pytest.raises(ValueError, match="seen"):
        run(tmp_path, "--held-out", "0.25")
    rows = list(data.fixed_order(44))
    assert seen == [rows[11:]]


@pytest.mark.parametrize("tasks, wanted", [
    (["rotation"], (100, 0.1, 1e-6, 3e-4, False, 200, 4, True)), (["jigsaw"], (100, 0.1, 1e-6, 3e-4, False, 200, 4, True)),
    (["selfie"], (200, 0.025, 1e-6, 1e-4, True, 0, 2, False)),
    (["jigsaw", "selfie"], (150, 0.001, 1e-8, 1e-4, True, 0, 4, True))])
def test_each_task_has_its_recipe_and_flags_change_it(tasks, wanted):
    assert pretext.recipe(pretext.parser().parse_args(["--tasks", *tasks])) == wanted
    flags = ["--tasks", *tasks, "--epochs", "0", "--lr", "0.5", "--no-nesterov", "--no-flip"]
    changed = pretext.recipe(pretext.parser().parse_args(flags))
    assert changed == wanted[:0] + (0, 0.5, *wanted[2:4], False, *wanted[5:7], False)


@pytest.mark.parametrize("flags, says", [
    (["--tasks", "rotation", "rotation"], "--tasks rotation rotation: rotation is there twice"),
    (["--tasks", "colour"], "--tasks colour: choose one of selfie, rotation, jigsaw"),
    (["--image-size", "30"], "--image-size 30: images are cut into 4 x 4 patches"),
    (["--arch", "vit_slim"], "pretext.py needs a ResNet of this project, and vit_slim is none"),
    (["--compile"], "--compile: has no second derivative, which log_det needs"),
    (["--sync-bn"], "--sync-bn: has no second derivative, which log_det needs"),
    (["--held-out", "0.9"], "batch size 16 is larger than the data: 4 images"),
    (["--noise", "nan"], "--noise nan: must be a number")])
def test_bad_input_is_one_line(tmp_path, flags, says):
    with pytest.raises(ValueError, match=says) as error:
        run(tmp_path, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [
    ["--tasks", "rotation"], ["--tasks", "jigsaw", "--permutations", "3"], ["--tasks", "selfie", "--lr", "0.002"],
    ["--lr", "0.003", "--permutations", "3"]])
def test_it_learns(tmp_path, flags):
    """In a few epochs of 128 drawings, and so not well; but the loss falls."""
    pretext.main(["--data", "shapes", "--limit", "128", "--arch", "slim", "--batch-size", "32", "--epochs", "5",
                  "--image-size", "16", "--lr", "0.02", "--ramp", "0", "--eps", "1", "--steps", "1", "--step-size", "1",
                  "--pool-layers", "1", "--device", "cpu", "--held-out", "0", "--save-every", "5", "--out", str(tmp_path), *flags])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_gaussian_noise_takes_the_place_of_the_attack(monkeypatch, tmp_path):
    monkeypatch.setattr(pretext, "attack", None)
    args = pretext.parser().parse_args(["--noise", "8", "--tasks", "rotation"])
    x = torch.full((4, 3, 64, 64), 0.5)
    noise = pretext.start_noise(x, data.Rng((0, 0, 0), 4, slice(None)), args)
    assert noise.std().item() == pytest.approx(1, abs=0.02) and noise.abs().max() > 3
    net = pretext.network("slim", ["rotation"], 30, 1, 0)
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    settings = pretext.step_settings(args)
    assert settings["sigma"] == 8 / 255
    opt = torch.optim.SGD(net.parameters(), 0.1)
    pretext.train_step(net, opt, x, [torch.zeros(4).long()], noise, **settings)
    torch.testing.assert_close(seen, [x + 8 / 255 * noise.view(x.shape)])


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_gaussian_noise_leaves_no_pixel_below_0_or_above_1(pixel):
    args = pretext.parser().parse_args(["--noise", "8", "--tasks", "rotation"])
    x = torch.full((4, 3, 16, 16), pixel)
    noise = pretext.start_noise(x, data.Rng((0, 0, 0), 4, slice(None)), args)
    net = pretext.network("slim", ["rotation"], 30, 1, 0)
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    opt = torch.optim.SGD(net.parameters(), 0.1)
    pretext.train_step(net, opt, x, [torch.zeros(4).long()], noise, **pretext.step_settings(args))
    wanted = torch.tensor([min(max(pixel + 8 / 255 * number, 0.0), 1.0) for number in noise.flatten().tolist()])
    torch.testing.assert_close(seen, [wanted.view(x.shape)])
