"""The mathematics of advcl.py against the paper read aloud: slow float64 loops, and printed values."""
import cmath
import copy
import math
import os
import pickle
import re
import signal
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advcl
from common import data, encoders, run, shapes
from common.pgd import frozen_stats, pgd
from tests.recipes import X, Z, unit
from tests.scripts import named_by, read_flags


def slow_multiview_loss(views, T):
    """Eq. 5, one anchor and one positive at a time, averaged; times T / 0.07."""
    z = [(view, image, unit(row[None])[0]) for view, rows in enumerate(views) for image, row in enumerate(rows)]
    total = 0.0
    for a, (view, image, u) in enumerate(z):
        others = torch.log(sum(torch.exp(torch.dot(u, w) / T) for k, (_, _, w) in enumerate(z) if k != a))
        positives = [w for v, i, w in z if i == image and v != view]
        total = total - sum(torch.dot(u, w) / T - others for w in positives) / len(positives)
    return total / len(z) * T / 0.07


def columns(n, d, B, V):
    return Z(n, d).view(B, V, -1).unbind(1)


@pytest.mark.parametrize("views, T, value, mean, norm, entries", [
    (columns(16, 16, 4, 4), 0.5, 21.012900196663, 2.94180602753282, 1.268507382472993,
     {(0, 0, 0): -0.17197678376749}),
    (columns(16, 16, 4, 4), 0.1, 8.73297097321904, None, None, {}),
    (columns(8, 16, 4, 2), 0.5, 8.28091087599144, 1.1593275226388, 3.044384110645983,
     {(0, 0, 0): -0.348177551898836}),
    (columns(15, 7, 5, 3), 0.5, 17.2429886428006, 2.41401840999209, 2.800740579994871,
     {(1, 2, 3): 0.0211524549666752})])
def test_the_loss_equals_slow_loops_and_the_printed_value_and_gradient(views, T, value, mean, norm, entries):
    grads = []
    for loss_of in (advcl.multiview_loss, slow_multiview_loss):
        inputs = [v.clone().requires_grad_() for v in views]
        loss = loss_of(inputs, T)
        assert loss.item() == pytest.approx(value, rel=1e-9)
        if mean:
            assert loss.item() * 0.07 / T == pytest.approx(mean, rel=1e-9)
        grads.append(torch.stack(torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    if norm:
        assert grads[0].norm().item() == pytest.approx(norm, rel=1e-9)
    for at, want in entries.items():
        assert grads[0][at].item() == pytest.approx(want, rel=1e-9)


def test_equal_rows_give_the_chance_value():
    row = torch.ones(512, 4, dtype=torch.float64)
    assert advcl.multiview_loss([row] * 4, 0.5).item() == pytest.approx(54.4580756118664, rel=1e-12)
    assert 54.4580756118664 == pytest.approx(math.log(2047) * 0.5 / 0.07)


def test_the_loss_is_finite_at_any_temperature_in_float32():
    views = [v.float().requires_grad_() for v in columns(16, 16, 4, 4)]
    loss = advcl.multiview_loss(views, 0.001)
    loss.backward()
    assert loss.isfinite() and all(v.grad.isfinite().all() for v in views)


# The high-frequency view ------------------------------------------------------------------------------------
@pytest.mark.parametrize("radius, dropped", [(4, 45), (8, 193), (12, 437), (16, 793)])
def test_as_many_frequencies_are_dropped_as_lie_within_the_radius(radius, dropped):
    impulse = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    impulse[0, 0, 0, 0] = 1  # all frequencies, each of amplitude 1 / 1024
    kept = torch.fft.fft2(advcl.high_frequency(impulse, radius)).abs()
    assert (kept < 1e-9).sum() == dropped and (kept > 1 - 1e-9).sum() == 1024 - dropped
    assert dropped == sum(a * a + b * b < radius**2 for a in range(-16, 16) for b in range(-16, 16))


def test_high_frequencies_have_the_printed_values_and_are_those_of_a_direct_dft():
    x = X(2, 3, 32, 32)
    h = advcl.high_frequency(x)
    assert [h.abs().sum().item(), h.square().sum().item(), h.min().item(), h.max().item()] == pytest.approx(
        [203.841074534368, 20.8856479122429, -0.414734702628636, 0.418975137833818], rel=1e-9)
    assert [h[0, 0, 0, 0].item(), h[0, 1, 5, 7].item(), h[1, 0, 16, 16].item()] == pytest.approx(
        [0.0814737744953743, 0.0495060776504995, -0.0168658776928924], rel=1e-9)
    torch.testing.assert_close(advcl.high_frequency(h), h, rtol=0, atol=1e-12)
    assert h.mean((2, 3)).abs().max() < 1e-12

    small, slow = X(1, 1, 8, 6), torch.zeros(8, 6, dtype=torch.float64)
    for a in range(-4, 4):
        for b in range(-3, 3):
            if math.hypot(a, b) >= 2.5:
                wave = [[cmath.exp(2j * math.pi * (a * i / 8 + b * j / 6)) for j in range(6)] for i in range(8)]
                c = sum(small[0, 0, i, j].item() * wave[i][j].conjugate() for i in range(8) for j in range(6)) / 48
                slow += torch.tensor([[(c * v).real for v in row] for row in wave], dtype=torch.float64)
    torch.testing.assert_close(advcl.high_frequency(small, 2.5)[0, 0], slow, rtol=0, atol=1e-12)


# The attacks and the step -----------------------------------------------------------------------------------
CLUSTERS = [2, 10, 50]


class Printed(nn.ModuleDict):
    """The network of the printed values: z = flat(x) W^T, logits 0.1 cos(Z(K, 3072)) flat(x)."""

    def __init__(self):
        classifier = nn.Linear(3072, 62, bias=False, dtype=torch.float64)
        projector = nn.Linear(3072, 6, bias=False, dtype=torch.float64)
        classifier.weight.data = 0.1 * torch.cat([Z(k, 3072).cos() for k in CLUSTERS])
        projector.weight.data = 0.1 * Z(6, 3072)
        super().__init__({"encoder": nn.Flatten(), "projector": projector, "classifier": classifier})


x = X(4, 3, 32, 32)
n = torch.arange(x.numel(), dtype=torch.float64).view(x.shape)
noise = torch.stack([(0.37 * n + 2).sin(), (0.37 * n + 1).sin()])  # x_ce, x_cl
labels = torch.stack([torch.arange(4) % k for k in CLUSTERS], 1)


def arguments(*flags, **others):
    return SimpleNamespace(**{**vars(advcl.parser().parse_args(flags)), **others})


def lengths(args):
    return advcl.attack_settings(args)


def slow_objective(net, x_cl, x_ce):
    """Eq. 9 at given perturbations: L_con, CE, L."""
    z = [net["projector"](v.flatten(1)) for v in (x_cl, x.flip(3), x.flip(2), advcl.high_frequency(x))]
    L_con, weight, ce = slow_multiview_loss(z, 0.5), net["classifier"].weight.split(CLUSTERS), 0.0
    for w, y in zip(weight, labels.T):
        for row, label in zip(x_ce.flatten(1), y):
            ce = ce - ((w @ row)[label] - torch.log((w @ row).exp().sum())) / len(x) / len(CLUSTERS)
    return L_con, ce, L_con + 0.2 * ce


@pytest.mark.parametrize("steps, moved_cl, moved_ce, L_con, CE, L", [
    (0, 0.0885053392891, 0.0348388236246, 16.7350540218801, 4.0276600634723, 17.5405860345745),
    (1, 0.0982088200018, 0.0295580105891, 17.9488585089714, 4.2503861819788, 18.7989357453672),
    (5, 0.6595920640532, 1.1245630333005, 19.1579815250539, 4.8717509341123, 20.1323317118764)])
def test_attacks_and_step_equal_printed_values_and_slow_loops(steps, moved_cl, moved_ce, L_con, CE, L):
    net, args = Printed(), arguments(steps=steps)
    constants = [net["projector"](v.flatten(1)) for v in (x.flip(3), x.flip(2), advcl.high_frequency(x))]
    (x_cl,) = advcl.attack(net, lambda v: advcl.contrast(net, v, constants, 0.5), x[None], noise[1:], **lengths(args))
    x_ce = advcl.attack(net, lambda v: advcl.cluster_loss(net, v, labels, CLUSTERS), x, noise[0], **lengths(args))
    assert [(x_cl - x).sum().item(), (x_ce - x).sum().item()] == pytest.approx([moved_cl, moved_ce], rel=1e-9)
    assert [v.item() for v in slow_objective(net, x_cl, x_ce)] == pytest.approx([L_con, CE, L], rel=1e-9)
    opt = torch.optim.SGD(net.parameters(), 0.0)
    losses = advcl.train_step(net, opt, x.flip(3), x.flip(2), x, labels, noise,
                              **named_by(advcl.train_step, advcl, args, clusters=CLUSTERS))
    assert [losses[k].item() for k in ("loss_con", "loss_ce", "loss")] == pytest.approx([L_con, CE, L], rel=1e-9)
    slow = Printed()
    slow_objective(slow, x_cl, x_ce)[2].backward()
    for ours, want in zip(net.parameters(), slow.parameters()):
        torch.testing.assert_close(ours.grad, want.grad, rtol=1e-9, atol=1e-12)


def real(*flags, clusters=CLUSTERS):
    torch.manual_seed(0)
    g, args = torch.Generator().manual_seed(1), arguments("--steps", "2", *flags)
    x = torch.rand(3, 8, 3, 32, 32, generator=g)
    noise = 2 * torch.rand(1 + sum("+d" in v for v in args.views), 8, 3, 32, 32, generator=g) - 1
    y = torch.stack([torch.arange(8) % k for k in CLUSTERS], 1)
    return advcl.network("slim", clusters), x, y, noise, args


def one_step(net, x, y, noise, args, clusters=CLUSTERS):
    return advcl.train_step(net, torch.optim.SGD(net.parameters(), 0.1), *x, y, noise,
                            **named_by(advcl.train_step, advcl, args, clusters=clusters))


def test_clean_views_embedded_once_change_no_bit():
    """Batch statistics depend on a view's own batch, so its embedding is the same at every step."""
    net, (x1, x2, x), y, noise, args = real()
    x_h = advcl.high_frequency(x)

    def again(v):
        z = [advcl.embed(net, clean, "clean") for clean in (x1, x2, x_h)]
        return advcl.multiview_loss([advcl.embed(net, v, "adv"), *z], 0.5)

    with frozen_stats(net):
        z = [advcl.embed(net, clean, "clean").detach() for clean in (x1, x2, x_h)]
        eps = 8 / 255
        want = pgd(again, x, eps, 2 / 255, 5, start=(x + eps * noise[1]).clamp(0, 1))
    args.steps = 5
    (found,) = advcl.attack(net, lambda v: advcl.contrast(net, v, z, 0.5), x[None], noise[1:], **lengths(args))
    assert torch.equal(found, want)
    with frozen_stats(net):
        assert again(want) > again(x) + 1e-3


def test_each_pass_moves_its_own_branch_once_and_the_attacks_leave_no_trace():
    net, x, y, noise, args = real()
    one_step(net, x, y, noise, args)
    norm = net["encoder"].bn1.branches
    assert [norm[b].num_batches_tracked.item() for b in ("clean", "adv", "adv_ce")] == [3, 1, 1]
    assert net["projector"][1].num_batches_tracked == 4
    assert all(m.training for m in net.modules())
    before = copy.deepcopy(net.state_dict())
    advcl.attack(net, lambda v: advcl.cluster_loss(net, v, y, CLUSTERS), x[2], noise[0], **lengths(args))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("flags", [[], ["--views", "x1+d", "x2+d", "xh"]])
def test_a_norm_is_of_one_view_of_one_image(flags):
    """In l2 every view of every image moves by the radius, not all images of a view by it."""
    net, (x1, x2, x), y, _, args = real("--norm", "l2", "--eps", "8", *flags)
    x1, x2, x = (0.3 + 0.4 * v for v in (x1, x2, x))  # far from the box
    args.steps, args.step_size, args.eps = 1, 8.0, 8.0
    clean, attacked = advcl.choose(args.views, x1, x2, x, 8)
    z = [advcl.embed(net, v, "clean").detach() for v in clean]
    for start, objective in ((attacked, lambda v: advcl.contrast(net, v, z, 0.5)),
                             (x, lambda v: advcl.cluster_loss(net, v, y, CLUSTERS))):
        x_adv = advcl.attack(net, objective, start, None, **lengths(args))
        length = (x_adv - start).flatten(-3).norm(dim=-1)
        torch.testing.assert_close(length, torch.full_like(length, 8 / 255), rtol=1e-4, atol=0)


ROWS = ["x1+d x2", "x1+d x2+d", "x1+d x2+d x1 x2", "x+d x1 x2", "x+d x1 x2 xl", "x+d x1 x2 xl xh",
        "x+d x1 x2 xh"]


@pytest.mark.parametrize("row", ROWS)
def test_views_select_the_rows_of_table_4(row):
    """The loss is that of the named views; every attacked one stays in its own ball and climbs."""
    net, x, y, noise, args = real("--views", *row.split())
    advcl.check(args)
    kept = copy.deepcopy(net)
    losses = one_step(net, x, y, noise, args, clusters=[])
    assert losses["loss"] == losses["loss_con"] and "loss_ce" not in losses
    low = x[2] - advcl.high_frequency(x[2])
    images = {"x1": x[0], "x2": x[1], "x": x[2], "xh": x[2] - low, "xl": low}
    z = [advcl.embed(kept, images[v], "clean").detach() for v in row.split() if "+d" not in v]
    attacked = torch.stack([images[v[:-2]] for v in row.split() if "+d" in v])
    x_adv = advcl.attack(kept, lambda v: advcl.contrast(kept, v, z, 0.5), attacked, noise[1:], **lengths(args))
    assert (x_adv - attacked).abs().max() <= 8 / 255 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
    z += [advcl.embed(kept, v, "adv") for v in x_adv]
    assert len(z) == len(row.split())
    assert losses["loss"].item() == pytest.approx(slow_multiview_loss([v.double() for v in z], 0.5).item(), rel=1e-5)


@pytest.mark.parametrize("epoch, step, lr", [
    (0, 0, 0.01), (0, 97, 0.0584878020967), (4, 49, 0.2304445435531), (9, 97, 0.4993768892029),
    (10, 0, 0.4998508863517), (500, 0, 0.2494653885254), (999, 0, 0.0005)])
def test_learning_rate_equals_printed_values(epoch, step, lr):
    assert advcl.lr_at(epoch * 98 + step, 98, 1000, 0.5, 10) == pytest.approx(lr, rel=1e-9)


# Pseudo-labels ----------------------------------------------------------------------------------------------
def setting(tmp_path, *flags, limit=None):
    """A teacher on `shapes`-like noise, and a run that uses it."""
    torch.manual_seed(3)
    encoders.export(encoders.make("slim"), tmp_path / "teacher.pt")
    args = arguments("--teacher", str(tmp_path / "teacher.pt"), "--clusters", "2", "5", "--out", str(tmp_path), *flags)
    x, y, _ = shapes.shapes(60, seed=4)
    return args, run.Env(torch.device("cpu"), 0, 1), data.Images(x[:limit], y[:limit], 10)


def test_pseudo_labels_are_clusters_of_the_teachers_features_made_once(tmp_path, monkeypatch):
    args, env, images = setting(tmp_path)
    labels = advcl.pseudo_labels(args, env, images, 32)
    assert labels.shape == (60, 2)
    assert [sorted(set(column)) for column in labels.T.tolist()] == [[0, 1], [0, 1, 2, 3, 4]]
    with torch.no_grad():
        h = F.normalize(encoders.load_encoder(args.teacher)(images.x / 255), dim=1)
    for column, k in zip(labels.T, (2, 5)):  # Lloyd's fixed point
        centres = torch.stack([h[column == c].mean(0) for c in range(k)])
        assert torch.equal(torch.cdist(h, centres).argmin(1), column)
    monkeypatch.setattr(advcl, "kmeans", None)  # from here on: kept, not made
    assert torch.equal(advcl.pseudo_labels(args, env, images, 32), labels)
    for change in (dict(clusters=[2, 6]), dict(seed=1), "size", "data", "teacher"):
        other, others, size = copy.copy(args), images, 32
        if isinstance(change, dict):
            vars(other).update(change)
        elif change == "size":
            size = 16
        elif change == "data":
            others = setting(tmp_path, limit=50)[2]
        else:
            encoders.export(encoders.make("slim"), args.teacher)
        with pytest.raises(TypeError):  # made anew
            advcl.pseudo_labels(other, env, others, size)


def test_a_run_with_a_teacher_uses_the_labels_of_its_images_and_says_so(tmp_path, monkeypatch):
    args, env, images = setting(tmp_path)
    seen, step = [], advcl.train_step
    monkeypatch.setattr(data, "load", lambda *_: data.Images(images.x, images.y, 10))
    monkeypatch.setattr(advcl, "train_step", lambda *a, **named: seen.append((a[4], a[5], named["clusters"])) or step(*a, **named))
    flags = ["--arch", "slim", "--batch-size", "20", "--steps", "1", "--warmup", "0", "--device", "cpu"]
    teacher = ["--teacher", args.teacher, "--clusters", "2", "5"]
    advcl.main([*flags, *teacher, "--epochs", "1", "--out", str(tmp_path / "with")])
    assert all(y.shape == (20, 2) and clusters == [2, 5] for _, y, clusters in seen)
    want = advcl.pseudo_labels(args, env, images, 32)
    assert torch.equal(torch.cat([y for _, y, _ in seen]).sum(0), want.sum(0))
    advcl.main([*flags, "--epochs", "1", "--out", str(tmp_path / "without")])
    heads = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("with", "without")]
    assert "pseudo-labels, K = [2, 5]" in heads[0][0] and '"loss_ce"' in heads[0][1]
    assert "no --teacher or --labels, so no pseudo-labels" in heads[1][0] and '"loss_ce"' not in heads[1][1]
    more = [*flags, "--teacher", args.teacher, "--epochs", "1", "--out", str(tmp_path / "more")]
    with pytest.raises(ValueError, match="--clusters 70: there are 60 images"):
        advcl.main([*more, "--clusters", "2", "70"])
    torch.manual_seed(5)
    encoders.export(encoders.make("slim"), args.teacher)  # another one, at the same place
    with pytest.raises(ValueError, match="the images are the same, but not their labels"):
        advcl.main([*flags, *teacher, "--epochs", "1", "--out", str(tmp_path / "with")])


def test_a_spoilt_label_file_is_named(tmp_path):
    args, env, images = setting(tmp_path)
    (tmp_path / "pseudo_labels.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"pseudo_labels\.pt.*made again"):
        advcl.pseudo_labels(args, env, images, 32)


# Pseudo-labels from a file ----------------------------------------------------------------------------------
N = 40
SMALL = ["--arch", "slim", "--batch-size", "16", "--steps", "1", "--warmup", "0", "--device", "cpu", "--clusters", "2", "5",
         "--save-every", "1"]


@pytest.fixture
def npz(tmp_path):
    """`N` images in a file, and their checksum."""
    x, y, _ = shapes.shapes(N, seed=4)
    path = str(tmp_path / "images.npz")
    x = x.permute(0, 2, 3, 1).numpy()
    np.savez(path, x_train=x, y_train=y.numpy(), x_test=x, y_test=y.numpy())
    return path


def labels_of(n=N):
    """Which tell the images apart: (2, n) with clusters 2 and 5; every seventh image has no label."""
    labels = np.stack([np.arange(n) % 2, np.arange(n) // 2 % 5])
    labels[:, ::7] = -1
    return labels


def read_labels(path, *flags, **arrays):
    """The run's images, and what `labels_of_file` makes of the arrays."""
    np.savez(path, **arrays)
    args = read_flags(advcl, *SMALL, "--labels", str(path), *flags)
    images = data.load(args.data, args.data_dir, "train", "cpu", args.limit)
    return images, advcl.labels_of_file(args, images)


def test_labels_of_a_file_follow_their_images_whatever_the_limit(npz, tmp_path):
    whole = data.load(npz)
    number = {image.numpy().tobytes(): i for i, image in enumerate(whole.x)}
    part = data.load(npz, limit=23)
    for limit in ([], ["--limit", "23"], ["--limit", str(N)]):
        images, found = read_labels(tmp_path / "l.npz", "--data", npz, *limit, labels=labels_of(),
                                    checksum=whole.checksum())
        order = [number[image.numpy().tobytes()] for image in images.x]
        assert torch.equal(found, torch.from_numpy(labels_of().T[order])) and found.dtype == torch.int64
        assert len(found) == len(images) and (order == list(range(N))) == (limit == [])
    images, found = read_labels(tmp_path / "l.npz", "--data", npz, "--limit", "23", checksum=part.checksum(),
                                labels=labels_of(23).astype(np.int8))
    assert torch.equal(found, torch.from_numpy(labels_of(23).T))


def test_without_a_checksum_labels_are_in_the_order_of_a_named_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "shapes", lambda n, seed: shapes.shapes(60, seed=seed))
    labels = labels_of(60)
    _, found = read_labels(tmp_path / "l.npz", "--data", "shapes", labels=labels)
    assert torch.equal(found, torch.from_numpy(labels.T))
    images, found = read_labels(tmp_path / "l.npz", "--data", "shapes", "--limit", "50", labels=labels)
    assert torch.equal(found, torch.from_numpy(labels.T[data.fixed_order(60)[:50]]))


@pytest.mark.parametrize("change, words", [
    (dict(labels=None), "labels is not in it"),
    (dict(labels=labels_of().astype(float)), r"labels is float64 \(2, 40\); it must be integers"),
    (dict(labels=labels_of()[0]), r"labels is int64 \(40,\); it must be"),
    (dict(labels=labels_of()[[0, 0, 1]]), "has 3 clusterings, and --clusters 2 numbers"),
    (dict(labels=labels_of()[:1]), "has 1 clusterings, and --clusters 2 numbers"),
    (dict(labels=labels_of(N - 1)), "has labels of 39 images; --data .* has 40"),
    (dict(labels=labels_of()[::-1]), "labels go from -1 to 4 where --clusters has 2; they must be from 0 to 1, or -1"),
    (dict(labels=labels_of() + 1), "labels go from 0 to 2 where --clusters has 2"),
    (dict(labels=labels_of() - 1), "labels go from -2 to 0 where"),
    (dict(labels=np.full((2, N), -1)), "all labels are -1 where --clusters has 2"),
    (dict(checksum="of others"), "its labels are of other images than --data"),
    (dict(checksum=None), "has no checksum, so nobody knows"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_of_labels_that_cannot_be_meant_is_named_before_anything_is_trained(npz, tmp_path, change, words):
    arrays = {"labels": labels_of(), "checksum": data.load(npz).checksum(), **change}
    np.savez(tmp_path / "l.npz", **{name: array for name, array in arrays.items() if array is not None})
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=f"l\\.npz: .*{words}"):
        advcl.main([*SMALL, "--data", npz, "--labels", str(tmp_path / "l.npz"), "--epochs", "1", "--out", str(out)])
    assert not list(out.glob("*.*t*"))  # no log, no checkpoint


def test_a_file_of_labels_that_is_none_is_named(npz, tmp_path):
    flags = [*SMALL, "--data", npz, "--epochs", "1", "--out", str(tmp_path / "run"), "--labels"]
    with pytest.raises(FileNotFoundError, match="l.npz: no such file"):
        advcl.main([*flags, str(tmp_path / "l.npz")])
    (tmp_path / "l.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="l.npz: not a readable .npz file"):
        advcl.main([*flags, str(tmp_path / "l.npz")])


def test_an_image_without_a_label_has_no_part_in_the_loss_or_its_gradient():
    net = Printed()
    some = labels.clone()
    some[1] = -1
    some[2, 0] = -1
    inputs = x.clone().requires_grad_()
    loss = advcl.cluster_loss(net, inputs, some, CLUSTERS)
    logits = net["classifier"](inputs.flatten(1)).split(CLUSTERS, dim=1)
    want = sum(F.cross_entropy(part[y >= 0], y[y >= 0]) for part, y in zip(logits, some.T)) / 3
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss, inputs)
    assert not grad[1].any() and all(grad[i].any() for i in (0, 2, 3))
    assert advcl.cluster_loss(net, x, torch.full_like(labels, -1), CLUSTERS) == 0

    some[:, 1] = -1  # of one K no image has a label
    loss = advcl.cluster_loss(net, x, some, CLUSTERS)
    loss.backward()
    grad = net["classifier"].weight.grad.split(CLUSTERS)
    assert loss.isfinite() and grad[0].any() and not grad[1].any() and grad[2].any()


def test_a_run_takes_its_labels_from_the_file_and_continues_with_the_same_alone(npz, tmp_path, monkeypatch):
    path = tmp_path / "l.npz"
    checksum = data.load(npz).checksum()
    np.savez(path, labels=labels_of(), checksum=checksum)
    flags = [*SMALL, "--data", npz, "--limit", "32", "--labels", str(path), "--epochs", "2"]
    advcl.main([*flags, "--out", str(tmp_path / "whole")])
    head, epoch, _ = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert "pseudo-labels, K = [2, 5]; 1" in head and "% of them are -1" in head and '"loss_ce"' in epoch

    seen = []
    step = advcl.train_step

    def stopped(*given, **more):
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(given[5])
        return step(*given, **more)

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(advcl, "train_step", lambda *a, **more: stopped(*a, **more))
        advcl.main([*flags, "--out", str(tmp_path / "part")])
    rows = sorted(torch.cat(seen[:2]).tolist())
    assert rows == sorted(labels_of().T[data.fixed_order(N)[:32]].tolist())  # those of an epoch

    np.savez(path, labels=labels_of()[:, ::-1], checksum=checksum)
    with pytest.raises(ValueError, match="the images are the same, but not their labels"):
        advcl.main([*flags, "--out", str(tmp_path / "part")])
    np.savez_compressed(path, labels=labels_of().astype(np.int8), checksum=checksum)
    advcl.main([*flags, "--out", str(tmp_path / "part")])
    for number, handler in handlers:
        signal.signal(number, handler)
    ended = [torch.load(tmp_path / name / "last.pt", weights_only=True)["state"] for name in ("whole", "part")]
    for part in ("net", "opt"):
        assert str(ended[0][part].keys()) == str(ended[1][part].keys())
    assert all(torch.equal(value, ended[1]["net"][name]) for name, value in ended[0]["net"].items())
    assert ended[0]["log"]["data"] == ended[1]["log"]["data"] and len(ended[0]["log"]["data"]["labels"]) == 64


def test_the_docstrings_lines_make_files_of_labels(tmp_path, monkeypatch):
    """Of the authors' pickle, whose values may be lists, arrays or tensors, and of a teacher's labels."""
    monkeypatch.chdir(tmp_path)
    theirs, ours = [textwrap.dedent(block) for block in re.findall(
        r"\n\n(    saved = .*?)\n\n", advcl.__doc__, re.S)]
    kinds = [list, np.array, torch.tensor, np.int32, np.array]
    wanted = [[i % k for i in range(600)] for k in (2, 10, 50, 100, 500)]
    pickled = {f"pseudo_train_{max(row) + 1}": kind(row) for kind, row in zip(kinds, wanted)}
    (tmp_path / "imagenet_clPretrain_pseudo_labels.pkl").write_bytes(pickle.dumps(pickled))
    exec(theirs, {"np": np, "pickle": pickle})
    found = np.load("labels.npz")
    assert found["labels"].tolist() == wanted and found["labels"].dtype == np.int64

    args, env, images = setting(tmp_path)
    args.out = str(tmp_path / "runs/advcl")
    (tmp_path / "runs/advcl").mkdir(parents=True)
    made = advcl.pseudo_labels(args, env, images, 32)
    exec(ours, {"np": np, "torch": torch})
    args.labels = "labels.npz"
    assert torch.equal(advcl.labels_of_file(args, images), made)


def test_network_sizes_and_that_pixels_are_not_normalised():
    def size(net):
        return sum(p.numel() for p in net.parameters())

    net = advcl.network("resnet18", [2, 10, 50, 100, 500])
    assert size(net["encoder"]) == 11_168_832 + 2 * 9_600
    assert size(net["projector"]) == 329_344 and size(net["classifier"]) == 513 * 662
    assert net["encoder"].recipe["mean"] == [0, 0, 0] and net["encoder"].recipe["std"] == [1, 1, 1]


def test_defaults_are_the_papers_run():
    want = dict(views=["x+d", "x1", "x2", "xh"], clusters=[2, 10, 50, 100, 500], cluster_weight=0.2, cutoff=8,
                epochs=1000, batch_size=512, lr=0.5, warmup=10, weight_decay=1e-4, temperature=0.5, eps=8,
                norm="linf", step_size=None, steps=5, arch="resnet18", data="cifar10", teacher=None, labels=None)
    args = vars(advcl.parser().parse_args([]))
    assert {k: args[k] for k in want} == want


@pytest.mark.parametrize("flags, words", [
    (["--views", "x1", "x3"], "--views x3: choose one of x1, x2, x1.d"),
    (["--views", "x1+d", "x1+d"], "--views.*each view once"),
    (["--views", "x1", "x2"], "--views x1 x2: needs two views, one of them attacked"),
    (["--teacher", "a.pt", "--labels", "b.npz"], "--teacher and --labels: .*give one of them"),
    (["--labels", ""], "--labels '': must name a file"),
    (["--views", "x+d"], "needs two views"), (["--clusters", "1"], "--clusters 1: must be"),
    (["--cluster-weight", "0"], "--cluster-weight 0: must be"),
    (["--eps", "-8"], "--eps -8: must be"), (["--temperature", "0"], "--temperature 0")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(advcl, *flags)
