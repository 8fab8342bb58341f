"""The mathematics of adv_mae.py against the papers read aloud: slow float64 loops, and printed values."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import adv_mae
from common import augment, data, optim, run, shapes
from common.vit import patchify
from common.pgd import pgd
from tests.scripts import read_flags


def fill(shape, g):
    """Flat element k is g(k)."""
    return g(torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


def test_random_masking_equals_the_printed_values():
    noise = torch.tensor([[0.7, 0.1, 0.9, 0.3, 0.5, 0.2, 0.8, 0.4]], dtype=torch.float64)
    ids_keep, ids_restore, mask = adv_mae.random_masking(noise, 0.75)
    assert ids_keep.tolist() == [[1, 5]] and ids_restore.tolist() == [[5, 0, 7, 2, 4, 1, 6, 3]]
    assert mask.tolist() == [[1, 0, 1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("L, ratio, kept", [(64, 0.75, 16), (49, 0.75, 12), (196, 0.75, 49), (64, 0.6, 25)])
def test_so_many_patches_stay_and_the_ids_undo_each_other(L, ratio, kept):
    noise = torch.rand(3, L, generator=torch.Generator().manual_seed(0))
    ids_keep, ids_restore, mask = adv_mae.random_masking(noise, ratio)
    assert ids_keep.shape == (3, kept) and mask.sum(1).tolist() == [L - kept] * 3
    for row, ids, places, removed in zip(noise, ids_keep, ids_restore, mask):
        assert row[ids].max() < row[removed.bool()].min()
        assert [places[i].item() for i in ids] == list(range(kept))
        assert places.sort().values.tolist() == list(range(L))


def slow_loss(pred, target, mask, norm_pix):
    """One patch at a time."""
    total, removed = 0.0, 0
    for p, t, m in zip(pred.flatten(0, 1), target.flatten(0, 1), mask.flatten()):
        if m:
            if norm_pix:
                mean = sum(t) / len(t)
                t = (t - mean) / (sum((t - mean) ** 2) / (len(t) - 1) + 1e-6) ** 0.5
            total, removed = total + sum((p - t) ** 2) / len(t), removed + 1
    return total / removed


IMAGE = patchify(fill((1, 3, 4, 4), lambda k: k), 2)
SINES = fill((2, 4, 12), lambda k: (0.1 * k).sin()), fill((2, 4, 12), lambda k: 0.5 + 0.5 * (0.3 * k).cos())
ONES, TWO = torch.tensor([[1, 0, 1, 1]]), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize("pred, target, mask, norm_pix, value", [
    (0 * IMAGE, IMAGE, ONES, True, 0.91666666), (0 * IMAGE, IMAGE, ONES, False, 793.83333),
    (0 * IMAGE + 0.5, 0 * IMAGE + 0.3, ONES, True, 0.25),
    (*SINES, TWO, True, 1.56368316), (*SINES, TWO, False, 0.69499345)])
def test_the_loss_equals_slow_loops_and_the_printed_value(pred, target, mask, norm_pix, value):
    pred = pred.clone().requires_grad_()
    fast, slow = (f(pred, target, mask, norm_pix) for f in (adv_mae.mae_loss, slow_loss))
    assert (fast.item(), slow.item()) == pytest.approx((value, value), rel=1e-8)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-12)
    grads = [torch.autograd.grad(loss, pred)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("norm_pix, entries, norm", [
    (True, [-0.03707400, -0.03271321, -0.02534668], 0.29473935),
    (False, [-0.02777778, -0.02438430, -0.01983329], 0.19649618)])
def test_the_loss_has_the_printed_gradient_and_none_for_kept_patches(norm_pix, entries, norm):
    pred = SINES[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(adv_mae.mae_loss(pred, SINES[1], TWO, norm_pix), pred)
    assert g[0, 0, :3].tolist() == pytest.approx(entries, abs=5e-9)
    assert g.norm().item() == pytest.approx(norm, abs=5e-9)
    assert (g[TWO == 0] == 0).all() and (g[TWO == 1] != 0).all()


def test_the_loss_is_in_float32_under_autocast():
    pred, target = (v.float() for v in SINES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = adv_mae.mae_loss(pred, target, TWO)
        low = adv_mae.mae_loss(pred.bfloat16(), target, TWO)
    assert loss == adv_mae.mae_loss(pred, target, TWO) and low.dtype == torch.float32
    assert low == adv_mae.mae_loss(pred.bfloat16().float(), target, TWO)


class Linear(nn.Module):
    """The model of the printed attack: pred[b, l] = W[l] v_b."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(fill((4, 3, 3), lambda k: (0.7 * k + 0.2).sin()))

    def forward(self, v, ids_keep, ids_restore):
        return torch.einsum("lij,bj->bli", self.W, v[:, 0])


def arguments(*flags, **more):
    return SimpleNamespace(**{**vars(adv_mae.parser().parse_args(list(flags))), **more})


def train_step(net, opt, x, u, noise, args):
    settings = dict(mask_ratio=args.mask_ratio, clean_weight=args.clean_weight, **adv_mae.attack_settings(args))
    return adv_mae.train_step(net, opt, x, u, noise, **settings)


@pytest.mark.parametrize("norm, delta, after", [
    ("linf", [[0.1] * 3] * 2, 1.55481640),
    ("l2", [[0.04951135, 0.06784646, 0.05427232], [0.04916639, 0.06783482, 0.05459948]], 1.41943555)])
def test_the_attack_equals_printed_values(norm, delta, after):
    net, v = Linear(), fill((2, 1, 3), lambda k: 0.3 + 0.05 * k)
    target, mask = fill((2, 4, 3), lambda k: (0.4 * k).cos()), torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]])
    at = v.clone().requires_grad_()
    clean = adv_mae.mae_loss(net(at, None, None), target, mask, False)
    assert clean.item() == pytest.approx(1.24896089, rel=1e-8)
    assert torch.autograd.grad(clean, at)[0].flatten().tolist() == pytest.approx(
        [0.32259391, 0.44271328, 0.35461768, 0.46379665, 0.64066675, 0.51622127], abs=5e-9)
    args = arguments("--norm", norm, "--eps", "25.5", "--no-norm-pix")  # eps 0.1, step 5/8 of it
    v_adv = adv_mae.attack(net, v, torch.zeros(2, 3), None, None, target, mask, **adv_mae.attack_settings(args))
    assert (v_adv - v)[:, 0].flatten().tolist() == pytest.approx(sum(delta, []), abs=6e-9)
    loss = slow_loss(net(v_adv, None, None), target, mask, False)
    assert loss.item() == pytest.approx(after, rel=1e-8)
    assert net.W.grad is None


def real(*flags):
    """A small network, the inputs of a step, and its flags."""
    args = arguments("--arch", "vit_slim", "--decoder", "32", "2", "2", *flags)
    torch.manual_seed(0)
    net = adv_mae.network(args, 32)
    x, y, _ = shapes.shapes(8, seed=0)
    _, _, rng = next(data.batches(data.Images(x, y, 10), 8, 0, 0))
    return net, augment.to_float(x), *adv_mae.random_numbers(rng, net.encoder, args, "cpu"), args


def parts(net, x, order, args):
    patches = patchify(x, 4)
    ids_keep, ids_restore, mask = adv_mae.random_masking(order, args.mask_ratio)
    return adv_mae.take(patches, ids_keep), ids_keep, ids_restore, net.encoder.normalise(patches), mask


def slow_forward(net, x, ids_keep, order):
    """The reconstruction of one image (3, 32, 32), patch by patch: encoder on the visible ones in any order,
    decoder on all in the order of the image."""
    encoder, L = net.encoder, 64
    patches = [x[:, 4 * (i // 8):4 * (i // 8) + 4, 4 * (i % 8):4 * (i % 8) + 4] for i in range(L)]
    seen = sorted(ids_keep.tolist())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (adv_mae.MEAN, adv_mae.STD))
    rows = [encoder.cls_token[0, 0]]
    for i in seen:
        rows.append(encoder.patch_embed["proj"](((patches[i] - mean) / std)[None])[0, :, 0, 0]
                    + encoder.pos_embed[0, 1 + i])
    h = torch.stack(rows)[None]
    for block in encoder.blocks:
        h = block(h)
    h = net.decoder.embed(encoder.norm(h))[0]
    place = {i: h[1 + n] for n, i in enumerate(seen)}
    rows = [h[0], *(place.get(i, net.mask_token[0, 0]) for i in range(L))]
    h = (torch.stack(rows) + net.decoder.positions)[None]
    for block in net.decoder.blocks:
        h = block(h)
    return net.decoder.pred(net.decoder.norm(h))[0, 1:]


def test_the_network_sees_the_visible_patches_alone_each_at_its_place():
    net, x, order, _, args = real()
    v, ids_keep, ids_restore, _, mask = parts(net, x, order, args)
    pred = net(v, ids_keep, ids_restore)
    want = torch.stack([slow_forward(net, *row) for row in zip(x, ids_keep, order)])
    torch.testing.assert_close(pred, want, rtol=1e-4, atol=1e-4)
    assert net.decoder.positions[0].abs().sum() == 0 and net.decoder.positions[1:].abs().sum() > 0


def test_pixels_are_embedded_in_float32_under_autocast(monkeypatch):
    """bf16 would blur a perturbation of 1/255."""
    monkeypatch.setattr(run, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    net, x, order, _, args = real()
    embed, found = net.encoder.embed, []
    monkeypatch.setattr(net.encoder, "embed", lambda patches: found.append(embed(patches)) or found[-1])
    v, ids_keep, ids_restore, _, _ = parts(net, x, order, args)
    assert net(v, ids_keep, ids_restore).dtype == torch.bfloat16
    assert [tokens.dtype for tokens in found] == [torch.float32]


def test_a_removed_pixel_has_exactly_no_gradient_and_a_visible_one_has():
    net, x, order, _, args = real()
    target, x = net.encoder.normalise(patchify(x, 4)), x.requires_grad_()
    v, ids_keep, ids_restore, _, mask = parts(net, x, order, args)
    (g,) = torch.autograd.grad(adv_mae.mae_loss(net(v, ids_keep, ids_restore), target, mask), x)
    g = patchify(g, 4)
    assert (g[mask == 1] == 0).all() and (g[mask == 0].abs().amax(1) > 0).all()


@pytest.mark.parametrize("flags, eps", [
    (["--eps", "8"], 8), (["--norm", "l2", "--eps", "255"], 255), (["--steps", "1", "--eps", "8", "--no-random-start"], 8)])
def test_the_attack_beats_noise_stays_in_its_ball_and_leaves_no_trace(flags, eps):
    net, x, order, noise, args = real(*flags)
    v, ids_keep, ids_restore, target, mask = parts(net, x, order, args)

    def loss(v):
        return adv_mae.mae_loss(net(v, ids_keep, ids_restore), target, mask).item()

    for _ in range(30):  # a trained network, a little: at the start it looks at nothing
        train_step(net, torch.optim.AdamW(net.parameters(), 1e-3), x, order, noise, args)
    before = copy.deepcopy(net.state_dict())
    net.zero_grad()
    v_adv = adv_mae.attack(net, v, noise, ids_keep, ids_restore, target, mask, **adv_mae.attack_settings(args))
    assert (noise is None) == (not args.random_start)
    noise = 2 * torch.rand(v.flatten(1).shape, generator=torch.Generator().manual_seed(5)) - 1 if noise is None else noise
    noisy = (v + eps / 255 * noise.view_as(v)).clamp(0, 1)
    assert loss(v_adv) > max(loss(v), loss(noisy)) + 1e-4
    d = (v_adv - v).flatten(1)
    assert (d.norm(dim=1) if args.norm == "l2" else d.abs().amax(1)).max() <= eps / 255 + 1e-6
    assert 0 <= v_adv.min() and v_adv.max() <= 1
    assert all(torch.equal(p, before[k]) for k, p in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())


def test_one_step_is_fgsm_and_a_step_size_given_wins():
    net, x, order, noise, args = real("--steps", "1", "--eps", "4", "--no-random-start")
    v, ids_keep, ids_restore, target, mask = parts(net, x, order, args)
    at = v.clone().requires_grad_()
    (g,) = torch.autograd.grad(adv_mae.mae_loss(net(at, ids_keep, ids_restore), target, mask), at)
    v_adv = adv_mae.attack(net, v, noise, ids_keep, ids_restore, target, mask, **adv_mae.attack_settings(args))
    assert torch.equal(v_adv, (v + 4 / 255 * g.sign()).clamp(0, 1))
    args.step_size = 1.0
    v_adv = adv_mae.attack(net, v, noise, ids_keep, ids_restore, target, mask, **adv_mae.attack_settings(args))
    torch.testing.assert_close(v_adv, (v + 1 / 255 * g.sign()).clamp(0, 1))


def test_without_a_random_start_the_attack_starts_at_v():
    net, x, order, noise, args = real("--eps", "8", "--no-random-start")
    v, *rest = parts(net, x, order, args)
    ids_keep, ids_restore, target, mask = rest

    def loss(v):
        return adv_mae.mae_loss(net(v, ids_keep, ids_restore), target, mask)

    want = pgd(loss, v, 8 / 255, 5 / 255, 2, start=v)
    assert torch.equal(adv_mae.attack(net, v, noise, *rest, **adv_mae.attack_settings(args)), want)


def test_without_eps_a_step_is_maes_to_the_bit():
    net, x, order, noise, args = real("--eps", "0")
    other = copy.deepcopy(net)
    losses = train_step(net, torch.optim.SGD(net.parameters(), 0.0), x, order, noise, args)
    v, ids_keep, ids_restore, target, mask = parts(other, x, order, args)
    loss = adv_mae.mae_loss(other(v, ids_keep, ids_restore), target, mask)
    loss.backward()
    assert torch.equal(losses["loss"], loss)
    for a, b in zip(net.parameters(), other.parameters()):
        assert a.grad is None and b.grad is None or torch.equal(a.grad, b.grad)


def test_a_step_trains_on_the_attacked_patches_under_the_same_mask():
    net, x, order, noise, args = real("--eps", "8")
    v, ids_keep, ids_restore, target, mask = parts(net, x, order, args)
    v_adv = adv_mae.attack(net, v, noise, ids_keep, ids_restore, target, mask, **adv_mae.attack_settings(args))
    want = adv_mae.mae_loss(net(v_adv, ids_keep, ids_restore), target, mask)
    g = torch.autograd.grad(want, net.mask_token)[0]
    losses = train_step(net, torch.optim.SGD(net.parameters(), 0.0), x, order, noise, args)
    assert torch.equal(losses["loss"], want) and torch.equal(net.mask_token.grad, g)


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_clean_patches_have_their_weight_under_the_same_mask_and_the_attack_stays(weight):
    """The gradient is the mixture of that of attacked patches (weight 0) and of MAE's, on the same numbers."""
    found = {}
    for name, flags in {"adv": ["--eps", "8"], "clean": ["--eps", "0"],
                        "both": ["--eps", "8", "--clean-weight", str(weight)]}.items():
        net, x, order, noise, args = real(*flags)
        losses = train_step(net, torch.optim.SGD(net.parameters(), 0.0), x, order, noise, args)
        found[name] = {key: value.item() for key, value in losses.items()}, gradients(net)
    (adv, g_adv), (clean, g_clean), (both, g_both) = found.values()
    assert adv.keys() == clean.keys() == {"loss"} and both.keys() == {"loss", "loss_clean", "loss_adv"}
    assert (both["loss_adv"], both["loss_clean"]) == (adv["loss"], clean["loss"])
    assert both["loss"] == pytest.approx((1 - weight) * adv["loss"] + weight * clean["loss"], rel=1e-6)
    torch.testing.assert_close(g_both, (1 - weight) * g_adv + weight * g_clean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weight, passes", [(0.0, 1), (0.3, 2)])
def test_only_a_weight_above_0_costs_another_pass(weight, passes):
    net, x, order, noise, args = real("--eps", "8", "--steps", "2", "--clean-weight", str(weight))
    calls = []
    net.register_forward_hook(lambda *call: calls.append(1))
    train_step(net, torch.optim.SGD(net.parameters(), 0.0), x, order, noise, args)
    assert len(calls) == args.steps + passes


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_fill_the_unit_ball(norm):
    u = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    points = adv_mae.ball_point(u, norm)
    assert points.shape == (4000, 3) and points.mean(0).abs().max() < 0.05
    length = points.norm(dim=1) if norm == "l2" else points.abs().amax(1)
    assert length.max() <= 1 + 1e-6
    assert (length**3).mean().item() == pytest.approx(0.5, abs=0.03)  # uniform: the volume inside is uniform
    assert adv_mae.ball_point(torch.zeros(1, 4), norm).isfinite().all()


def test_weights_decay_and_tokens_but_no_bias_norm_or_position():
    net, *_ = real()
    decayed = {id(p) for g in optim.groups(net.named_parameters(), 0.05) if g["weight_decay"] for p in g["params"]}
    for name, p in net.named_parameters():
        assert (id(p) in decayed) == (name.endswith("weight") and "norm" not in name or "token" in name), name


@pytest.mark.parametrize("epoch, lr", [(0, 0), (20, 0.5), (40, 1), (220, 0.5), (400, 0)])
def test_learning_rate_equals_printed_values(epoch, lr):
    assert adv_mae.lr_at(epoch, 400, 1.0, 40) == pytest.approx(lr, rel=1e-9, abs=1e-12)


def test_the_papers_network_has_its_sizes():
    with torch.device("meta"):
        net = adv_mae.network(arguments("--arch", "vit_base", "--image-size", "224", "--decoder", "512", "8", "16"), 224)
    assert sum(p.numel() for p in net.parameters()) == 85_798_656 + 512 + 768 * 512 + 512 + 8 * (
        12 * 512**2 + 13 * 512) + 2 * 512 + 513 * 768


def test_defaults():
    want = dict(arch="vit_tiny", decoder=[128, 4, 4], mask_ratio=0.75, norm_pix=True, epochs=400, batch_size=512,
                lr=1e-3, warmup=20, weight_decay=0.05, norm="linf", eps=1, steps=2, step_size=None,
                clean_weight=0, data="cifar10")
    args = vars(adv_mae.parser().parse_args([]))
    assert {k: args[k] for k in want} == want


def test_the_default_step_is_five_eighths_of_eps():
    net, x, order, noise, args = real("--eps", "8", "--steps", "2")
    v, *rest = parts(net, x, order, args)
    ids_keep, ids_restore, target, mask = rest
    want = pgd(lambda v: adv_mae.mae_loss(net(v, ids_keep, ids_restore), target, mask), v, 8 / 255, 5 / 255, 2,
               start=(v + 8 / 255 * noise.view_as(v)).clamp(0, 1))
    assert torch.equal(adv_mae.attack(net, v, noise, *rest, **adv_mae.attack_settings(args)), want)


@pytest.mark.parametrize("flags, names, largest", [
    (["--eps", "8"], ["image", "seen", "attacked", "added", "rebuilt"], 8),
    (["--eps", "64", "--norm", "l2"], ["image", "seen", "attacked", "added", "rebuilt"], None),
    (["--eps", "0"], ["image", "seen", "rebuilt"], None)])
def test_pictures_show_an_attack_where_there_is_one_at_full_scale(flags, names, largest):
    """In linf white is an addition of eps, in l2 that of the largest change."""
    net, *_, args = real(*flags)
    x, y, _ = shapes.shapes(4, seed=0)
    rows = dict(adv_mae.pictures(net, data.Images(x, y, 10), 32, args))
    assert list(rows) == names
    if "added" in rows:
        change = rows["attacked"] - rows["seen"]
        full_scale = change.abs().max() if largest is None else largest / 255
        torch.testing.assert_close(rows["added"], 0.5 + change / (2 * full_scale))


def test_a_radius_beyond_the_range_of_pixels_is_for_l2_alone():
    assert read_flags(adv_mae, "--norm", "l2", "--eps", "510").eps == 510


@pytest.mark.parametrize("flags, words", [
    (["--arch", "resnet18"], "--arch resnet18: choose one of vit_slim, vit_tiny"),
    (["--norm", "l1"], "--norm l1: choose one of linf, l2"),
    (["--decoder", "30", "4", "4"], "--decoder 30 4 4: .*multiple of 4 and of the heads"),
    (["--decoder", "32", "0", "4"], "--decoder 0"), (["--eps", "-1"], "--eps -1: must be"),
    (["--step-size", "-1"], "--step-size -1"), (["--steps", "-1"], "--steps -1"),
    (["--image-size", "30"], "--image-size 30: no multiple of vit_tiny's patch size, 4"),
    (["--clean-weight", "1.5"], "--clean-weight 1.5: must be a number from 0 to 1"),
    (["--clean-weight", "1"], "--clean-weight 1: gives attacked patches no weight.*use --eps 0"),
    (["--eps", "300"], "--eps 300: with --norm linf at most 255"),
    (["--clean-weight", "0.5", "--eps", "0"], "--clean-weight 0.5: needs --eps above 0"),
    (["--mask-ratio", "1"], "--mask-ratio 1: of 64 patches"), (["--mask-ratio", "0"], "--mask-ratio 0: of 64")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(adv_mae, *flags)
