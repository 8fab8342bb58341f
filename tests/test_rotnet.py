"""rotnet.py: the printed values of its restatement, rotations, bad input."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval as judge
import rotnet
from common import data, encoders
from tests.recipes import X
from tests.scripts import SCRIPTS, TINY, tiny_npz


def S(n, d, p):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


def wsum(t):
    return sum(v.item() * math.cos(0.01 * k) for k, v in enumerate(t.flatten()))


# Rotations --------------------------------------------------------------------------------------------------
def test_rotations_equal_printed_values():
    x = torch.arange(16.0).view(4, 1, 2, 2)
    turned = rotnet.rotate(x, torch.tensor([0, 1, 2, 3]))
    assert turned.flatten(1).tolist() == [[0, 1, 2, 3], [5, 7, 4, 6], [11, 10, 9, 8], [14, 12, 15, 13]]
    assert wsum(rotnet.rotate(X(3, 2, 4, 4), torch.tensor([3, 1, 2]))) == pytest.approx(45.2170936, rel=1e-8)


def test_rotations_equal_a_loop_and_four_quarters_are_none():
    x = torch.rand(16, 3, 6, 6)
    y = torch.arange(16) % 4
    turned = rotnet.rotate(x, y)
    assert torch.equal(turned, torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(x, y)]))
    assert torch.equal(rotnet.rotate(turned, (4 - y) % 4), x)
    assert torch.equal(rotnet.rotate(x, torch.full((16,), 2)), x.flip(2).flip(3))


def test_targets_are_uniform_and_follow_from_seed_epoch_and_position():
    args = rotnet.parser().parse_args([])
    x = torch.randint(0, 256, (400, 3, 16, 16), dtype=torch.uint8)

    def targets(epoch, rows=slice(None)):
        rng = data.Rng((7, epoch, 0), 400, rows)
        return rotnet.task(x[rows], None, rng, 16, args)[1]

    assert torch.equal(targets(0), targets(0)) and not torch.equal(targets(0), targets(1))
    assert torch.equal(targets(0, slice(200, 400)), targets(0)[200:])
    counts = torch.cat([targets(epoch) for epoch in range(10)]).bincount(minlength=4)
    assert len(counts) == 4 and (counts - 1000).abs().max() < 5 * (1000 * 0.75) ** 0.5


# Losses and the attack --------------------------------------------------------------------------------------
@pytest.mark.parametrize("smoothing, value, norm, first, last", [
    (0.0, 2.87897673, 0.528132331, -0.176374492, 0.00401981953),
    (0.1, 2.80211523, 0.493221118, -0.161374492, -0.000980180472),
    (0.4, 2.57153072, 0.392806579, -0.116374492, -0.0159801805)])
def test_cross_entropy_equals_printed_values(smoothing, value, norm, first, last):
    z = (2 * S(5, 4, 0.4)).requires_grad_()
    loss = rotnet.cross_entropy(z, torch.tensor([0, 3, 2, 1, 2]), smoothing)
    (g,) = torch.autograd.grad(loss, z)
    assert [loss.item(), g.norm().item(), g[0, 0].item(), g[4, 3].item()] == pytest.approx(
        [value, norm, first, last], rel=1e-8)


def test_trades_equals_printed_values_and_the_evaluations():
    z, z_adv = S(5, 4, 0.4).requires_grad_(), (2 * S(5, 4, 1.1)).requires_grad_()
    y = torch.tensor([0, 3, 2, 1, 2])
    loss = rotnet.trades(z, z_adv, y)
    grads = torch.autograd.grad(loss, (z, z_adv))
    assert [loss.item(), *(g.norm().item() for g in grads)] == pytest.approx(
        [3.85042914, 1.331109, 0.894370933], rel=1e-8)
    assert loss.item() == pytest.approx(judge.trades(z, z_adv, y).item(), rel=1e-12)


NET = nn.Sequential(nn.Flatten(), nn.Linear(32, 4, bias=False)).double()
NET[1].weight.data = S(4, 32, 0.2)
x, y, v = X(3, 2, 4, 4), torch.tensor([1, 0, 3]), S(3, 32, 2)


def settings(*flags):
    return rotnet.attack_settings(rotnet.parser().parse_args(flags))


@pytest.mark.parametrize("flags, noise, dv, size, after, lengths", [
    (["--eps", "6"], S(3, 32, 0.9), -0.125988042, 1.80614156, 3.07242211, (0.114651762, 0.117146439, 0.11059091)),
    (["--eps", "3", "--steps", "5", "--step-size", "1"], S(3, 32, 0.9), -0.102666424, 1.010717, 2.90344193,
     (0.0615248111, 0.0619158916, 0.0611630991)),
    (["--eps", "8", "--steps", "1", "--step-size", "8"], None, -0.298530075, 2.69849485, 3.24630655,
     (0.169099209, 0.166342465, 0.163396842)),
    (["--eps", "153", "--norm", "l2"], 0.8 * F.normalize(S(3, 32, 0.9), dim=1), 0.350237277, 7.81566534, 4.90916556,
     (0.577726164, 0.587046758, 0.570166263))])
def test_the_attack_equals_printed_values(flags, noise, dv, size, after, lengths):
    assert F.cross_entropy(NET(x), y).item() == pytest.approx(2.70300387, rel=1e-8)
    x_adv = rotnet.attack(NET, x, y, noise, **settings(*flags))
    d = (x_adv - x).flatten(1)
    found = [(d * v).sum().item(), d.abs().sum().item(), F.cross_entropy(NET(x_adv), y).item(), *d.norm(dim=1).tolist()]
    assert found == pytest.approx([dv, size, after, *lengths], rel=1e-8)


def test_without_eps_no_bit_changes():
    noise = S(3, 32, 0.9)
    for loss in ("ce", "trades"):
        assert torch.equal(rotnet.attack(NET, x, y, noise, **{**settings("--eps", "0"), "loss_name": loss}), x)


@pytest.mark.parametrize("norm, eps", [("linf", "8"), ("l2", "128")])
@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_the_attack_climbs_and_stays_in_ball_and_box_and_leaves_no_trace(norm, eps, loss):
    torch.manual_seed(0)
    net = rotnet.network("slim", 16, 4)
    images = torch.rand(6, 3, 16, 16)
    labels = torch.arange(6) % 4
    before = {key: value.clone() for key, value in net.state_dict().items()}
    noise = rotnet.ball_point(torch.rand(6, 1 + 768), norm)
    x_adv = rotnet.attack(net, images, labels, noise, **{**settings("--norm", norm, "--eps", eps), "loss_name": loss})
    d = (x_adv - images).flatten(1)
    radius = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
    assert radius.max() <= int(eps) / 255 + 1e-5 and 0 <= x_adv.min() and x_adv.max() <= 1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.eval()
    clean, attacked = net(images), net(x_adv)
    value = {"ce": F.cross_entropy(attacked, labels) - F.cross_entropy(clean, labels),
             "trades": rotnet.divergence(clean, attacked)}[loss]
    assert value > 1e-3


def test_the_logged_accuracy_is_that_of_a_loop_in_eval_mode_and_leaves_the_network_alone():
    """Of the first 256 images of a fixed order."""
    args = rotnet.parser().parse_args(["--arch", "slim"])
    torch.manual_seed(0)
    net = rotnet.network("slim", 16, 4)
    images = data.Images(torch.randint(0, 256, (260, 3, 16, 16), dtype=torch.uint8), torch.zeros(260), 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = rotnet.clean_accuracy(net, images, 16, args)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    pixels, labels, rng = next(data.batches(images, 256, args.seed, 0))
    turned, turns = rotnet.task(pixels, labels, rng, 16, args)
    net.eval()
    right = 0
    for answers, turn in zip(net(turned).tolist(), turns.tolist(), strict=True):
        right += answers.index(max(answers)) == turn
    assert found == pytest.approx(right / 256)


def test_the_rate_is_a_cosine_or_falls_at_milestones():
    assert rotnet.lr_at(5, 40, 0.4, 10, []) == pytest.approx(0.2)
    assert rotnet.lr_at(25, 40, 0.4, 10, []) == pytest.approx(0.2)
    rates = [rotnet.lr_at(epoch, 40, 0.4, 2, [20, 30]) for epoch in (1, 2, 19.9, 20, 29.9, 30, 39)]
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004])


# The run ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    (["--loss", "trades"], "--loss trades: is for --target labels"),
    (["--target", "labels", "--loss", "trades", "--no-random-start"], "--loss trades: its attack cannot start"),
    (["--target", "labels", "--loss", "trades", "--smoothing", "0.1"], "--smoothing: is for --loss ce"),
    (["--warmup", "20", "--milestones", "10", "30"], "--milestones 10: lies within the 20 epochs of --warmup"),
    (["--target", "classes"], "--target classes: choose one of rotation, labels"),
    (["--eps", "300"], "--eps 300: with --norm linf at most 255, the range of a pixel"),
    (["--drop-path", "2"], "--drop-path 2: must be a number from 0 to 1")])
def test_flags_that_do_not_go_together_are_one_line(tmp_path, flags, says):
    with pytest.raises(ValueError, match=says) as error:
        rotnet.main([*TINY, "--warmup", "1", "--data", tiny_npz(tmp_path / "d.npz"), "--out", str(tmp_path / "r"), *flags])
    assert "\n" not in str(error.value)


def test_labels_that_are_missing_are_named(tmp_path):
    pixels = np.zeros((40, 32, 32, 3), np.uint8)
    files = {"none.npz": {}, "some.npz": {"y_train": np.arange(40) % 3 - 1}}
    for name, labels in files.items():
        path = str(tmp_path / name)
        np.savez(path, x_train=pixels, **labels)
        with pytest.raises(ValueError, match="label") as error:
            rotnet.main([*TINY, "--warmup", "1", "--data", path, "--out", str(tmp_path / "r"), "--target", "labels"])
        assert path in str(error.value) and "\n" not in str(error.value)


def test_drop_path_is_refused_where_it_would_have_no_effect(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("from torch import nn\n\n\ndef make():\n"
                    "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n")
    with pytest.raises(ValueError, match="--drop-path: needs a network of this project, and .*own.py:make is none"):
        rotnet.network(f"{file}:make", 32, 4, 0.1)
    assert rotnet.network(f"{file}:make", 32, 4)[0].dim == 4


def test_drop_path_reaches_the_encoder():
    net = rotnet.network("vit_slim", 32, 4, 0.3)
    drops = [block.drop for block in net[0].blocks]
    assert drops[0] == 0 and drops[-1] == pytest.approx(0.3) and drops == sorted(drops)


def lit_from_above(path):
    """128 images of noise, bright at the top: whoever looks can tell how they are turned."""
    light = np.linspace(155, 0, 16)[:, None, None]
    noise = np.random.default_rng(0).integers(0, 101, (128, 16, 16, 3))
    pixels = (light + noise).astype(np.uint8)
    np.savez(path, x_train=pixels, y_train=np.zeros(128, int), x_test=pixels[:8], y_test=np.zeros(8, int))
    return str(path)


def losses_of_a_run(folder, *flags):
    rotnet.main(["--batch-size", "32", "--epochs", "6", "--warmup", "1", "--lr", "3e-3", "--eps", "1", "--steps", "1",
                 "--jitter", "0", "--device", "cpu", "--out", str(folder / "run"), *flags])
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("flags", [["--arch", "vit_slim"], ["--arch", "slim"], ["--arch", "slim", "--norm", "l2", "--eps", "100"]])
def test_it_learns_to_tell_rotations(tmp_path, flags):
    """Better than by chance, which is ln 4 = 1.39, within six epochs of four steps."""
    losses = losses_of_a_run(tmp_path, "--data", lit_from_above(tmp_path / "images.npz"), *flags)
    assert losses[-1] < min(losses[0], 1.0)


def test_it_learns_to_tell_classes(tmp_path):
    """In a few epochs of 256 drawings, and so not well; but the loss falls below that of chance, ln 10."""
    losses = losses_of_a_run(tmp_path, "--data", "shapes", "--limit", "256", "--arch", "slim", "--target", "labels",
                             "--loss", "trades")
    assert sum(losses[-2:]) / 2 < min(losses[0], math.log(10) - 0.2)


def test_a_vit_has_its_features_as_in_maes_fine_tuning_and_exports_them(tmp_path):
    """The mean of the patches' tokens, and then LayerNorm."""
    net = rotnet.network("vit_slim", 32, 4)
    encoder = net[0].eval()
    encoders.export(encoder, tmp_path / "encoder.pt", image_size=32)
    z = encoder(torch.rand(3, 3, 32, 32))
    torch.testing.assert_close(z.mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(3), rtol=1e-3, atol=0)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoders.load_encoder(tmp_path / "encoder.pt")(images), encoder(images))


def test_a_supervised_run_goes_on_with_its_own_labels_only(tmp_path):
    images = tmp_path / "images.npz"
    tiny_npz(images)
    arrays = dict(np.load(images))
    flags = ["--data", str(images), *TINY, *SCRIPTS["rotnet"]]

    def run(target, y, epochs):
        np.savez(images, **{**arrays, "y_train": y})
        rotnet.main([*flags, "--epochs", epochs, "--target", target, "--out", str(tmp_path / target)])

    for target in ("labels", "rotation"):
        run(target, arrays["y_train"], "2")
        (tmp_path / target / "encoder.pt").unlink()
    run("rotation", 3 - arrays["y_train"], "2")  # which does not read them
    with pytest.raises(ValueError, match="the images are the same, but not their labels"):
        run("labels", 3 - arrays["y_train"], "2")
