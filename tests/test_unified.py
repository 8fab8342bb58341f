"""The mathematics of unified.py: slow float64 loops, printed values, and what it reduces to."""
import copy
import json
import math

import pytest
import torch
from torch import nn

import acl
import adv_mae
import unified
from common import data, run
from common.pgd import pgd
from common.vit import ViT, patchify
from tests import crossed
from tests import steps2 as plain
from tests.recipes import X, Z, unit
from tests.scripts import named, read_flags

SIDE = 2


def S(n, d, p):
    """sin(p + 1.3 i + .7 j + .31 i j), (n, d)."""
    i = torch.arange(n, dtype=torch.float64)[:, None]
    j = torch.arange(d, dtype=torch.float64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


def slow_nt_xent(z1, z2, temperature):
    u = [row / row.norm() for row in (*z1, *z2)]
    total = 0.0
    for i in range(len(u)):
        partner = (i + len(z1)) % len(u)
        others = sum((torch.dot(u[i], u[k]) / temperature).exp() for k in range(len(u)) if k != i)
        total = total - ((torch.dot(u[i], u[partner]) / temperature).exp() / others).log()
    return total / len(u)


def slow_mae_loss(pred, target, mask, norm_pix):
    total, removed = 0.0, 0
    for p, t, m in zip(pred.flatten(0, 1), target.flatten(0, 1), mask.flatten()):
        if m:
            if norm_pix:
                mean = sum(t) / len(t)
                t = (t - mean) / (sum((t - mean) ** 2) / (len(t) - 1) + 1e-6) ** 0.5
            total, removed = total + sum((p - t) ** 2) / len(t), removed + 1
    return total / removed


# ----------------------------------------------------------------------------------------------------------
# The printed values: images (3, 1, 4, 4), linear maps, two visible patches of four
# ----------------------------------------------------------------------------------------------------------
x = X(3, 1, 4, 4)
PATCHES = patchify(x, SIDE)  # (3, 4, 4)
W, DECODER = S(5, 16, 0.3), S(16, 8, 0.6)
Z2 = S(3, 5, 1.5)
IDS_KEEP = torch.tensor([[b % 4, (b + 2) % 4] for b in range(3)])
ORDER = torch.cat([IDS_KEEP, torch.tensor([[i for i in range(4) if i not in row] for row in IDS_KEEP.tolist()])], 1)
IDS_RESTORE = ORDER.argsort(1)
MASK = (IDS_RESTORE >= 2).double()


def flat(patches):
    """Patches (B, 4, 4) as the pixels of the image, row by row."""
    B = len(patches)
    return patches.view(B, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(B, 16)


class Linear(nn.Module):
    """z = W x of the image, pred = V of the visible patches."""

    def forward(self, patches, ids_keep=None, ids_restore=None, con=True, share=False):
        pred = None
        if ids_keep is not None:
            pred = (unified.take(patches, ids_keep).flatten(1) @ DECODER.T).view(-1, 4, 4)
        return flat(patches) @ W.T if con else None, pred


def joint(patches, temperature, lam, con_weight, norm_pix):
    z1, pred = Linear()(patches, IDS_KEEP, IDS_RESTORE)
    return unified.objective(z1, Z2, pred, PATCHES, MASK, temperature, lam, con_weight, norm_pix)


@pytest.mark.parametrize("settings, values, gradient, cosine", [
    ((0.2, 0.5, 1.0, True), (4.64120975, 3.81250599, 1.65740753), (3.71148498, -1.32748159, -0.144914589), -0.227582571),
    ((0.5, 2.0, 0.7, False), (3.76321879, 2.25526005, 1.09226837), (1.55233014, -0.149603743, -0.0403477461), -0.224190162)])
def test_the_objective_has_the_printed_values(settings, values, gradient, cosine):
    at = PATCHES.clone().requires_grad_()
    losses = joint(at, *settings)
    assert [loss.item() for loss in losses] == pytest.approx(values, rel=1e-8)
    g, g_con, g_mae = (torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in losses)
    g = flat(g)
    assert [g.norm().item(), g[0, 0].item(), g[2, 15].item()] == pytest.approx(gradient, rel=1e-8)
    assert unified.gradient_cosine(g_con, g_mae).item() == pytest.approx(cosine, rel=1e-8)
    temperature, lam, con_weight, norm_pix = settings
    z1, pred = Linear()(PATCHES, IDS_KEEP, IDS_RESTORE)
    slow = slow_nt_xent(z1, Z2, temperature), slow_mae_loss(pred, PATCHES, MASK, norm_pix)
    assert [v.item() for v in slow] == pytest.approx(values[1:], rel=1e-8)


FIRST = dict(temperature=0.2, lam=0.5, con_weight=1.0, norm_pix=True, norm="linf", eps=4 / 255, step_size=5 / 8 * 4 / 255)
SECOND = dict(temperature=0.5, lam=2.0, con_weight=0.7, norm_pix=False, norm="l2", eps=0.3, step_size=5 / 8 * 0.3)


@pytest.mark.parametrize("settings, kind, moved, after", [
    (FIRST, "joint", (0.0574875957, 0.568703601), (4.04364425, 1.66082499)),
    (FIRST, "con", (0.0571457517, 0.569555136), (4.05365868, 1.64101247)),
    (FIRST, "mae", (0.0393822709, 0.553537696), (3.77084786, 1.72191551)),
    (SECOND, "joint", (0.254763434, 2.60414653), (2.33143536, 1.40308497)),
    (SECOND, "con", (0.617023243, 2.65420875), (2.75071966, 1.0284069)),
    (SECOND, "mae", (0.231147569, 2.63847888), (2.14188275, 1.40397728))])
def test_the_attack_has_the_printed_values(settings, kind, moved, after):
    noise = S(3, 16, 0.7)
    if settings["norm"] == "l2":
        noise = 0.9 * unit(noise)
    noise = patchify(noise.view(3, 1, 4, 4), SIDE)
    attacked = unified.attack(Linear(), PATCHES, noise, Z2, IDS_KEEP, IDS_RESTORE, PATCHES, MASK,
                              climbs=unified.ATTACKS[kind], share=False, steps=2, **settings)
    d = flat(attacked - PATCHES)
    assert [(d * S(3, 16, 2)).sum().item(), d.abs().sum().item()] == pytest.approx(moved, rel=1e-8)
    names = ("temperature", "lam", "con_weight", "norm_pix")
    _, loss_con, loss_mae = joint(attacked, *(settings[name] for name in names))
    assert [loss_con.item(), loss_mae.item()] == pytest.approx(after, rel=1e-8)


def test_its_losses_are_those_of_acl_and_adv_mae():
    rows = Z(8, 16)
    assert torch.equal(unified.nt_xent(rows[::2], rows[1::2], 0.1), acl.nt_xent(rows[::2], rows[1::2], 0.1))
    for norm_pix in (True, False):
        pred = S(3, 16, 1).view(3, 4, 4)
        assert torch.equal(unified.mae_loss(pred, PATCHES, MASK, norm_pix), adv_mae.mae_loss(pred, PATCHES, MASK, norm_pix))
    same = torch.ones(6, 4, dtype=torch.float64)
    assert unified.nt_xent(same, same, 0.5).item() == pytest.approx(math.log(11), rel=1e-12)


def test_gradients_that_agree_disagree_and_are_zero():
    g = S(3, 16, 1).view(3, 4, 4)
    assert unified.gradient_cosine(g, 3 * g).item() == pytest.approx(1)
    assert unified.gradient_cosine(g, -g).item() == pytest.approx(-1)
    mixed = torch.stack([g[0], -g[1], torch.zeros_like(g[2])])
    assert unified.gradient_cosine(g, mixed).item() == pytest.approx(0, abs=1e-12)  # a mean over images


# ----------------------------------------------------------------------------------------------------------
# A whole network, and what it reduces to
# ----------------------------------------------------------------------------------------------------------
def toy():
    encoder = ViT("toy", SIDE, 8, 1, 2, 6, plain.MEAN, plain.STD, "sincos", False, False)
    return plain.randomised(unified.Unified(encoder, (12, 1, 2)), 1)


def as_mae(net):
    """adv_mae.py's network with the same weights."""
    mae = adv_mae.MAE(net.encoder, (12, 1, 2)).double()
    mae.decoder.load_state_dict(net.decoder.state_dict())
    mae.mask_token.data = net.mask_token.data.clone()
    return mae


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    x1, x2 = plain.images(6, 6, 10 + seed).chunk(2)
    return x1, x2, torch.rand(3, 9, generator=g, dtype=torch.float64)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1)


def noise_of(norm, whole, u, args):
    """The script's noise for images of nine patches."""
    rng = data.Rng((0, 0, 0), 3, slice(None))
    args.norm = norm
    return unified.start_noise(u, toy().encoder, args, rng).double()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("more", [[], ["--step-size", "0.5"]])
def test_its_attack_has_the_length_of_adversarial_maes_at_equal_flags(steps, more):
    flags = ["--eps", "3", "--steps", str(steps), *more]
    ours, theirs = (script.attack_settings(read_flags(script, *flags)) for script in (unified, adv_mae))
    assert all(ours[name] == theirs[name] for name in ("norm", "eps", "step_size", "steps", "norm_pix"))


@pytest.mark.parametrize("norm, eps", [("linf", 30), ("l2", 200)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_without_the_contrastive_loss_it_is_adversarial_mae(norm, eps, norm_pix):
    """Loss, attack and step, from equal noise at the visible patches: bit for bit but for the order of sums."""
    flags = ["--con-weight", "0", "--eps", str(eps), "--norm", norm, *([] if norm_pix else ["--no-norm-pix"])]
    args = read_flags(unified, "--arch", "vit_slim", *flags)
    net = toy()
    mae = as_mae(copy.deepcopy(net))
    x1, x2, u = inputs()
    noise = noise_of(norm, 9, u, args)
    ids_keep, ids_restore, mask = unified.random_masking(u, 0.75)
    removed = mask[:, :, None].bool().expand_as(noise)
    assert (noise[removed] == 0).all() and noise[~removed].abs().min() > 0
    visible = adv_mae.take(noise, ids_keep).flatten(1)
    if norm == "l2":
        assert 0.8 < visible.norm(dim=1).min() and visible.norm(dim=1).max() <= 1 + 1e-6

    found = unified.train_step(net, sgd(net), x1, x2, u, noise, mask_ratio=0.75, **unified.attack_settings(args))
    settings = dict(mask_ratio=0.75, norm_pix=norm_pix, norm=norm, eps=eps / 255, step_size=5 / 8 * eps / 255, steps=2)
    wanted = adv_mae.train_step(mae, sgd(mae), x1, u, visible, **settings)
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-12, atol=0)
    assert torch.equal(found["loss"], found["loss_mae"]) and "loss_con" not in found
    for name, value in mae.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-11, atol=1e-14)
    untouched = toy().projector.state_dict()
    assert all(torch.equal(net.projector.state_dict()[name], value) for name, value in untouched.items())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("flags", [["--con-weight", "0"], ["--attack", "mae"], ["--share"], ["--share", "--attack", "con"]])
def test_removed_patches_have_no_noise_where_no_gradient_moves_them(flags, norm):
    args = read_flags(unified, "--arch", "vit_slim", *flags)
    _, _, u = inputs()
    noise = noise_of(norm, 9, u, args)
    removed = unified.random_masking(u, 0.75)[2].bool()
    assert (noise[removed] == 0).all() and noise[~removed].abs().min() > 0
    if norm == "l2":  # a ball of the visible patches alone
        assert 0.8 < noise.flatten(1).norm(dim=1).min() and noise.flatten(1).norm(dim=1).max() <= 1 + 1e-6


@pytest.mark.parametrize("norm, eps", [("linf", 30), ("l2", 200)])
def test_without_the_reconstruction_it_is_adversarial_simclr(norm, eps):
    args = read_flags(unified, "--arch", "vit_slim", "--lam", "0", "--eps", str(eps), "--norm", norm)
    net = toy()
    x1, x2, u = inputs()
    noise = noise_of(norm, 9, u, args)
    assert noise.abs().min() > 0  # removed patches have noise, as the contrastive loss sees them

    def embed(images):
        return net.projector(net.encoder(images))

    z2 = embed(x2).detach()
    start = patchify(x1, SIDE) + eps / 255 * noise
    start = start.clamp(0, 1)

    def loss_of(patches):
        grid = patches.view(3, 3, 3, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 6, 6)
        return slow_nt_xent(embed(grid), z2, 0.2)

    attacked = pgd(loss_of, patchify(x1, SIDE), eps / 255, 5 / 8 * eps / 255, 2, norm, start=start)
    with torch.no_grad():
        wanted = slow_nt_xent(embed(attacked.view(3, 3, 3, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 6, 6)), z2, 0.2)
    before = copy.deepcopy(net.state_dict())
    found = unified.train_step(net, sgd(net), x1, x2, u, noise, mask_ratio=0.75, **unified.attack_settings(args))
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-9)
    assert "loss_mae" not in found and torch.equal(found["loss"], found["loss_con"])
    still = [name for name, value in net.state_dict().items() if torch.equal(value, before[name])]
    assert all(name.startswith(("decoder.", "mask_token")) or name == "encoder.pos_embed" for name in still)


def test_with_eps_0_whatever_the_attack_it_is_the_clean_joint_loss():
    found = []
    for flags in (["--eps", "0"], ["--eps", "0", "--attack", "con"], ["--attack", "none"]):
        args = read_flags(unified, "--arch", "vit_slim", *flags)
        net = toy()
        x1, x2, u = inputs()
        losses = unified.train_step(net, sgd(net), x1, x2, u, None, mask_ratio=0.75, **unified.attack_settings(args))
        found.append([losses["loss"], *net.state_dict().values()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_shared_the_contrastive_loss_sees_the_visible_patches_of_the_first_view_alone():
    net = toy()
    x1, _, u = inputs()
    ids_keep, ids_restore, mask = unified.random_masking(u, 0.75)
    patches = patchify(x1, SIDE).requires_grad_()
    z, pred = net(patches, ids_keep, ids_restore, share=True)
    (g,) = torch.autograd.grad(z.sum(), patches, retain_graph=True)
    assert ((g == 0).all(2) == mask.bool()).all()
    z_whole, pred_whole = net(patches, ids_keep, ids_restore)
    (g,) = torch.autograd.grad(z_whole.sum(), patches)
    assert (g != 0).any(2).all() and torch.equal(pred, pred_whole)
    torch.testing.assert_close(z_whole, net.projector(net.encoder(x1)))


def test_pixels_are_embedded_in_float32_under_autocast(monkeypatch):
    """bf16 would blur a perturbation of 1/255."""
    monkeypatch.setattr(run, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    net = toy().float()
    embed, found, inner = net.encoder.embed, [], []
    monkeypatch.setattr(net.encoder, "embed", lambda patches: found.append(embed(patches)) or found[-1])
    net.encoder.blocks[0].attn.register_forward_hook(lambda module, given, out: inner.append(out.dtype))
    x1, _, u = inputs()
    ids_keep, ids_restore, _ = unified.random_masking(u, 0.75)
    z, pred = net(patchify(x1.float(), SIDE), ids_keep, ids_restore)
    assert [tokens.dtype for tokens in found] == [torch.float32] and set(inner) == {torch.bfloat16}
    assert z.dtype == pred.dtype == torch.float32


def test_what_has_no_weight_is_not_computed():
    net = toy()
    calls, rebuilt = [], []
    net.encoder.blocks[0].register_forward_hook(lambda module, given, out: calls.append(given[0].shape[1]))
    net.decoder.register_forward_hook(lambda *call: rebuilt.append(1))
    x1, x2, u = inputs()
    for flags, tokens, decoders in (
            (["--con-weight", "0"], 3 * [3], 3), (["--lam", "0"], 4 * [10], 0),
            ([], [10, 3, 10, 3, 10, 3, 10], 3), (["--attack", "con"], [10, 10, 10, 3, 10], 1),
            (["--share"], [10, 3, 3, 3], 3), (["--attack", "none"], [10, 3, 10], 1),
            (["--share", "--lam", "0"], [10, 3, 3, 3], 0), (["--share", "--attack", "con"], [10, 3, 3, 3], 1)):
        args = read_flags(unified, "--arch", "vit_slim", *flags)
        calls.clear()
        rebuilt.clear()
        unified.train_step(net, sgd(net), x1, x2, u, None, mask_ratio=0.75, **unified.attack_settings(args))
        assert calls == tokens and len(rebuilt) == decoders, flags


@pytest.mark.parametrize("flags, wanted", [
    ([], dict(climbs=(True, True), eps=4 / 255, step_size=5 / 8 * 4 / 255, norm="linf", steps=2)),
    (["--attack", "mae", "--norm", "l2", "--eps", "300", "--step-size", "51", "--steps", "3"],
     dict(climbs=(False, True), eps=300 / 255, step_size=0.2, norm="l2", steps=3))])
def test_flags_reach_the_attack(flags, wanted):
    found = named(unified.attack, unified, *flags)
    assert found["climbs"] == wanted.pop("climbs")
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("flags, words", [
    (["--lam", "0", "--con-weight", "0"], "--lam 0, --con-weight 0: nothing is left to train on"),
    (["--lam", "0", "--attack", "mae"], "--attack mae: that loss has no weight"),
    (["--con-weight", "0", "--attack", "con"], "--attack con: that loss has no weight"),
    (["--eps", "300"], "--eps 300: with --norm linf at most 255"),
    (["--attack", "both"], "--attack both: choose one of joint, con, mae, none")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(unified, *flags)


def cosine_of(net, loaded, args):
    """Mean over the images of the cosine of the losses' gradients in the pixels of the clean first view."""
    x1, _, _, (z2, ids_keep, ids_restore, target, mask) = unified.sample(net, loaded, 64, 32, args)
    patches = patchify(x1, 4).requires_grad_()
    z1, pred = net(patches, ids_keep, ids_restore)
    losses = slow_nt_xent(z1, z2.detach(), args.temperature), unified.mae_loss(pred, target, mask)
    g, other = (torch.autograd.grad(loss, patches, retain_graph=True)[0].flatten(1) for loss in losses)
    return ((g * other).sum(1) / g.norm(dim=1) / other.norm(dim=1)).mean().item()


def test_the_log_says_what_the_attack_adds_and_whether_gradients_agree():
    torch.manual_seed(0)
    pixels = (255 * X(16, 3, 32, 32)).to(torch.uint8)
    loaded = data.Images(pixels, torch.zeros(16, dtype=torch.long), 2)
    for flags, names in (([], {"gain_con", "gain_mae", "agreement"}), (["--lam", "0"], {"gain_con"}),
                         (["--con-weight", "0"], {"gain_mae"})):
        args = read_flags(unified, "--arch", "vit_slim", "--decoder", "16", "1", "2", "--eps", "16", *flags)
        net = unified.network(args, 32)
        found = unified.gains(net, loaded, 32, args)
        assert found.keys() == names and abs(found.get("agreement", 0)) <= 1
        assert all(found[name] > 0 for name in names - {"agreement"})
        if "agreement" in found:
            assert found["agreement"] == pytest.approx(cosine_of(net, loaded, args), abs=1e-6)
        args.steps = 0  # the attack is its own start
        at_its_start = unified.gains(net, loaded, 32, args)
        assert all(at_its_start[name] == 0 for name in names - {"agreement"})


def test_losses_are_crossed_with_attacks_on_the_test_images(tmp_path, capsys):
    """Without an attack they are the objective's; the attack on a loss raises it, most of all attacks; a loss that was
    not trained is left out."""
    flags = ["--data", "shapes", "--limit", "64", "--arch", "vit_slim", "--decoder", "16", "1", "2", "--batch-size", "32",
             "--warmup", "0", "--epochs", "1", "--device", "cpu"]
    unified.main([*flags, "--out", str(tmp_path / "joint")])
    unified.main([*flags, "--lam", "0", "--out", str(tmp_path / "con")])
    capsys.readouterr()
    crossed.main([str(tmp_path / "joint"), str(tmp_path / "con"), "--images", "64", "--eps", "8", "--steps", "4"])
    joint, con = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for loss, own in (("loss_con", "con"), ("loss_mae", "mae")):
        values = {attack: joint[attack][loss] for attack in ("none", "noise", "con", "mae", "joint")}
        assert max(values, key=values.get) == own and values["joint"] > values["noise"]
    assert con["con"].keys() == {"loss_con"} and not {"mae", "joint"} & con.keys()

    net, flags = crossed.network_of(tmp_path / "joint")
    images = data.load("shapes", "data", "test", torch.device("cpu"), 64, 32, 0)
    x, _, rng = next(data.batches(images, 64, 0, 0))
    views = [patchify(unified.augment(x, rng, 32), net.encoder.patch) for _ in range(2)]
    ids_keep, ids_restore, mask = unified.random_masking(rng.uniform(views[0].shape[1]), 0.75)
    z1, pred = net(views[0], ids_keep, ids_restore)
    z2, _ = net(views[1])
    target = net.encoder.normalise(views[0])
    wanted = unified.nt_xent(z1, z2, 0.2), unified.mae_loss(pred, target, mask)
    assert list(joint["none"].values()) == [round(loss.item(), 4) for loss in wanted]


def test_crossing_names_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="last.pt: no such file; unified.py writes it"):
        crossed.network_of(tmp_path)
