"""The mathematics of adpe.py against the paper read aloud: slow float64 loops, and printed values."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import adpe
from common import data, encoders, shapes, vit
from adpe import lookup, relative_index
from tests.processes import in_two_processes
from tests.scripts import named_by, read_flags

FORMS = [(position, mode) for position in ("absolute", "relative") for mode in ("embedding", "coordinate")]
PLAIN = torch.arange(49, dtype=torch.float64).view(1, 7, 7)
SINES = torch.arange(98, dtype=torch.float64).mul(0.3).sin().view(2, 7, 7)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# Relative positions -----------------------------------------------------------------------------------------
def slow_index(o):
    if abs(o) <= 1.9:
        return o
    return math.copysign(min(3.8, 1.9 + 1.9 * math.log(abs(o) / 1.9) / math.log(8)), o)


def slow_lookup(table, row, column):
    """The mean of the four entries around, one channel at a time."""
    def clamp(v):
        return min(max(v, -3.0), 3.0) + 3

    row, column, out = clamp(row), clamp(column), []
    for channel in table.tolist():
        i, j = min(int(row), 5), min(int(column), 5)
        a, b = row - i, column - j
        out.append((1 - a) * (1 - b) * channel[i][j] + a * (1 - b) * channel[i + 1][j]
                   + (1 - a) * b * channel[i][j + 1] + a * b * channel[i + 1][j + 1])
    return out


def test_the_index_equals_printed_values_and_slopes():
    o = tensor(0.5, 1.9, 2, 2.5, 3, 4, 7, 15, 40, -4.3)
    want = [0.5, 1.9, 1.946867, 2.1507548, 2.3173433, 2.5802004, 3.0915252, 3.7878977, 3.8, -2.6462803]
    assert relative_index(o).tolist() == pytest.approx(want, abs=6e-8)
    assert relative_index(o).tolist() == pytest.approx([slow_index(v) for v in o.tolist()], rel=1e-12)
    o = tensor(1.5, 2, 3, -5, 20, 0).requires_grad_()
    (slope,) = torch.autograd.grad(relative_index(o).sum(), o)
    assert slope.tolist() == pytest.approx([1, 0.45685343, 0.30456895, 0.18274137, 0, 1], abs=6e-9)


def test_the_rounded_index_is_irpes():
    assert relative_index(torch.arange(8.0)).round().clamp(-3, 3).tolist() == [0, 1, 2, 2, 3, 3, 3, 3]


def test_integers_hit_entries_exactly_and_far_offsets_the_last():
    at = tensor([0, 0], [1, 0], [0, 1], [0.5, -0.25], [4, 0], [-5, 5])
    assert lookup(PLAIN, at)[0].tolist() == [24, 31, 25, 27.25, 45, 6]
    for i in range(-3, 4):
        for j in range(-3, 4):
            assert torch.equal(lookup(SINES, tensor(i, j)), SINES[:, 3 + i, 3 + j])


def test_the_lookup_equals_printed_values_and_slow_loops_with_its_gradients():
    at = tensor([0.3, -1.2], [-2.75, 2.9], [3.5, 0.5]).requires_grad_()
    table = SINES.clone().requires_grad_()
    found = lookup(table, at)
    assert found[0, :2].tolist() == pytest.approx([0.50622865, 0.56634888], abs=6e-9)
    assert found[1, :2].tolist() == pytest.approx([0.00580798, -0.58451354], abs=6e-9)
    g_at, g_table = torch.autograd.grad((found[0] + 2 * found[1]).sum(), (at, table))
    want = [-2.90728433, -0.24920927, -0.81277025, -0.30042452, 0, -0.45613093]
    assert g_at.flatten().tolist() == pytest.approx(want, abs=6e-9)
    random = 8 * torch.rand(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 4
    slow = tensor(*(slow_lookup(SINES, *o) for o in random.tolist()))
    torch.testing.assert_close(lookup(SINES, random), slow.T, rtol=1e-12, atol=1e-14)
    base = slow_lookup(SINES, 0.3, -1.2)[1] + slow_lookup(SINES, -2.75, 2.9)[1] + slow_lookup(SINES, 3.5, 0.5)[1]
    moved = SINES.clone()
    moved[1, 3, 1] += 1
    more = sum(slow_lookup(moved, *o)[1] for o in at.tolist())
    assert g_table[1, 3, 1].item() == pytest.approx(2 * (more - base), rel=1e-9)


def centre(table, delta=(0.0, 0.0)):
    at = vit.coordinates(3, 3)
    return lookup(table, relative_index(at[4] - at + delta if isinstance(delta, torch.Tensor)
                                        else at[4] - at + tensor(*delta)))


def test_a_query_reads_the_table_as_printed():
    assert centre(PLAIN)[0].tolist() == [32, 31, 30, 25, 24, 23, 18, 17, 16]
    assert centre(PLAIN, (1, 0))[0].tolist() == pytest.approx(
        [38.62806924, 37.62806924, 36.62806924, 32, 31, 30, 25, 24, 23], abs=6e-9)
    at = vit.coordinates(8, 8)
    everything = lookup(PLAIN, relative_index(at[:, None] - at))
    assert everything.sum().item() == pytest.approx(98304, rel=1e-12)
    assert everything.square().sum().item() == pytest.approx(3209781.174, rel=1e-9)
    delta = tensor(0.3, -0.4).requires_grad_()
    value = (torch.arange(9.0).double().cos() * centre(SINES, delta)).sum()
    assert value.item() == pytest.approx(-0.73931056, abs=6e-9)
    assert torch.autograd.grad(value, delta)[0].tolist() == pytest.approx([4.83895024, 0.46049214], abs=6e-9)


# The persistent adversary -----------------------------------------------------------------------------------
def adversary(start, lr):
    delta = nn.Parameter(tensor(start))
    return delta, torch.optim.AdamW([delta], lr, betas=(0.9, 0.95), weight_decay=0, maximize=True)


def slow_ascent(delta, gradients, lr, eps, norm):
    """Adam uphill, then the projection, a number at a time."""
    m, v = [0.0] * len(delta), [0.0] * len(delta)
    for t, g in enumerate(gradients, 1):
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g)]
        v = [0.95 * a + 0.05 * b * b for a, b in zip(v, g)]
        delta = [d + lr * (a / (1 - 0.9**t)) / ((b / (1 - 0.95**t)) ** 0.5 + 1e-8) for d, a, b in zip(delta, m, v)]
        if norm == "l2":
            n = sum(d * d for d in delta) ** 0.5
            delta = [d * min(1, eps / max(n, 1e-12)) for d in delta]
        else:
            delta = [min(max(d, -eps), eps) for d in delta]
    return delta


@pytest.mark.parametrize("norm, want", [("l2", [0.60223853, 0.79831620]), ("linf", [1, 1])])
def test_the_first_ascent_equals_printed_values(norm, want):
    delta, opt = adversary([3.0, 4.0], 0.01)
    delta.grad = tensor([1.0, -2.0])
    adpe.ascend(delta, opt, 1.0, norm)
    assert delta[0].tolist() == pytest.approx(want, abs=6e-9)


@pytest.mark.parametrize("norm, want", [
    ("l2", {2: [0.35355340, -0.35355338], 3: [0.49608900, -0.06241559], 5: [0.19993707, 0.45828503]}),
    ("linf", {3: [0.5, -0.19203145], 5: [0.33201647, 0.5]})])
def test_ascents_equal_printed_values_and_slow_loops(norm, want):
    gradients = [(0, 0), (0.2, -0.1), (0.1, 0.3), (-0.4, 0.3), (0.05, 0.2)]
    delta, opt = adversary([0.0, 0.0], 0.6)
    for t, g in enumerate(gradients, 1):
        delta.grad = tensor(g)
        adpe.ascend(delta, opt, 0.5, norm)
        assert delta.isfinite().all()
        assert delta[0].tolist() == pytest.approx(slow_ascent([0, 0], gradients[:t], 0.6, 0.5, norm), rel=1e-9)
        if t in want:
            assert delta[0].tolist() == pytest.approx(want[t], abs=6e-9)


# The network ------------------------------------------------------------------------------------------------
def arguments(*flags):
    return SimpleNamespace(**vars(adpe.parser().parse_args(
        ["--arch", "vit_slim", "--decoder", "32", "2", "2", "--image-size", "16", "--batch-size", "4", *flags])))


def real(*flags, trained=True, step=0):
    """A small network, random tables included, and the inputs of a step."""
    args = arguments(*flags)
    torch.manual_seed(0)
    net = adpe.network(args, args.image_size)
    if trained:
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "relative" in name:
                    p.normal_(std=0.3)
    x, y, _ = shapes.shapes(4, seed=0)
    x, _, rng = next(data.batches(data.Images(x, y, 10), 4, 0, step))
    x = adpe.augment(x, rng, 16, 0.2, args.crops)
    return net, x, *adpe.random_numbers(rng, net, args, "cpu"), args


def train_step(net, opt, opt_delta, x, u, noise, args):
    settings = named_by(adpe.train_step, adpe, args)
    return adpe.train_step(net, opt, opt_delta, x, u, noise, **settings)


def test_noise_of_delta_is_uniform_in_the_ball_of_what_each_block_has_in_use():
    """A decoder's narrower heads have narrower rows: all radii are as in a ball of so many dimensions, |noise|^n
    uniform in [0, 1]."""
    lengths = []
    for step in range(60):
        net, _, _, noise, _ = real(*form("relative", "embedding"), "--adversary", "pgd", "--norm", "l2", trained=False,
                                   step=step)
        assert (noise[net.in_use == 0] == 0).all() and (noise != 0).sum() == net.in_use.sum()
        in_use = net.in_use.flatten(1).sum(1)
        assert in_use.min() < in_use.max()
        lengths.append(noise.flatten(1).norm(dim=1) ** in_use)
    lengths = torch.stack(lengths)  # (steps, blocks)
    assert lengths.max() <= 1 + 1e-3 and lengths.mean(0).tolist() == pytest.approx([0.5] * lengths.shape[1], abs=0.15)


def test_noise_of_delta_is_the_same_on_all_processes():
    args = arguments("--adversary", "pgd")
    net = adpe.network(args, args.image_size)
    first, second = (adpe.random_numbers(data.Rng((7,), 4, rows), net, args, "cpu") for rows in (slice(0, 2), slice(2, 4)))
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])


def parts(net, x, order, args):
    patches = vit.patchify(x, 4)
    return net.tokens(patches), net.vectors(), adpe.random_mask(order, args.mask_ratio), net.encoder.normalise(patches)


def form(position, mode):
    return ["--position", position, "--mode", mode]


def random_delta(net):
    g = torch.Generator().manual_seed(5)
    return net.in_use * torch.randn(net.delta.shape, generator=g)


def slow_block(block, h, masked, at, delta, mode):
    """A block on one image (1 + L, dim), a query at a time."""
    attn, n = block.attn, len(h)
    q, k, v = (p.view(n, attn.heads, attn.d) for p in attn.qkv(block.norm1(h)).chunk(3, 1))
    out = torch.empty(n, attn.heads, attn.d, dtype=h.dtype)
    for i in range(n):
        moved = i > 0 and masked[i - 1] and delta is not None
        r = []
        for j in range(n):
            if not hasattr(attn, "relative"):
                r.append(torch.zeros(attn.d, dtype=h.dtype))
            elif i == 0 or j == 0:
                r.append(attn.relative.cls)
            else:
                table = attn.relative.table
                offset = at[i - 1] - at[j - 1]
                if moved and mode == "embedding":
                    table = table + delta[:attn.d]
                elif moved:
                    offset = offset + delta
                r.append(tensor(*slow_lookup(table, *(slow_index(o) for o in offset.tolist()))))
        for a in range(attn.heads):
            logits = torch.stack([q[i, a] @ (k[j, a] + r[j]) / attn.d**0.5 for j in range(n)])
            out[i, a] = logits.softmax(0) @ v[:, a]
    h = h + attn.proj(out.flatten(1))
    return h + block.mlp(block.norm2(h))


@torch.no_grad()
@pytest.mark.parametrize("position, mode", FORMS)
def test_delta_enters_at_masked_tokens_only_as_in_slow_loops(position, mode):
    net, x, order, _, args = real(*form(position, mode))
    net, x, delta = net.double(), x[:1].double(), random_delta(net).double()
    tokens, rows, masked, _ = parts(net, x, order[:1], args)
    D, L, at = 96, 16, vit.coordinates(4, 4)
    clean, h = vit.sincos_2d(D, 4), [net.encoder.cls_token[0, 0]]
    for i in range(L):
        if not masked[0, i]:
            h.append(tokens[0, i])
        elif position == "relative":
            h.append(net.mask_token[0, 0] + clean[i])
        elif mode == "embedding":
            h.append(net.mask_token[0, 0] + clean[i] + delta[0])
        else:
            h.append(net.mask_token[0, 0] + vit.sincos_at(at[i] + delta[0], D))
    h = torch.stack(h)
    for n, block in enumerate(net.blocks):
        if n == 4:
            h = net.decoder.embed(net.encoder.norm(h)) + net.decoder.positions
        h = slow_block(block, h, masked[0], at, delta[n] if position == "relative" else None, mode)
    want = net.decoder.pred(net.decoder.norm(h))[1:]
    torch.testing.assert_close(net(tokens, rows, masked, delta)[0], want, rtol=1e-5, atol=1e-6)  # pos: float32
    assert not torch.allclose(net(tokens, rows, masked)[0], want, atol=1e-3)


@pytest.mark.parametrize("position, mode", FORMS)
def test_no_delta_is_a_zero_delta(position, mode):
    net, x, order, _, args = real(*form(position, mode))
    inputs = parts(net, x, order, args)[:3]
    torch.testing.assert_close(net(*inputs), net(*inputs, torch.zeros_like(net.delta)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position, mode", FORMS)
def test_delta_has_a_gradient_through_masked_rows_only_and_in_what_is_used(position, mode):
    net, x, order, _, args = real(*form(position, mode))
    tokens, rows, masked, target = parts(net, x, order, args)
    delta = random_delta(net).requires_grad_()
    (g,) = torch.autograd.grad(adpe.mae_loss(net(tokens, rows, masked, delta), target, masked), delta)
    assert (g[net.in_use == 0] == 0).all() and all(row.abs().sum() > 0 for row in g)
    (g,) = torch.autograd.grad(net(tokens, rows, torch.zeros_like(masked), delta).square().sum(), delta)
    assert (g == 0).all()


def test_a_table_of_zeros_gives_a_shift_no_gradient_and_the_adversary_survives_it():
    net, x, order, start, args = real("--norm", "l2", trained=False)
    opt = torch.optim.AdamW([p for p in net.parameters() if p is not net.delta], 1e-3)
    opt_delta = torch.optim.AdamW([net.delta], 0.1, betas=(0.9, 0.95), weight_decay=0, maximize=True)
    train_step(net, opt, opt_delta, x, order, start, args)
    assert (net.delta == 0).all()
    for _ in range(3):
        train_step(net, opt, opt_delta, x, order, start, args)
    assert net.delta.isfinite().all() and (net.delta.norm(dim=1) > 0).all()
    assert (net.delta.norm(dim=1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("flags", [[], ["--radius", "0"]])
def test_a_step_is_one_backward_at_one_point_for_weights_and_delta(flags):
    net, x, order, start, args = real(*flags)
    net.delta.data = random_delta(net) / 3
    other = copy.deepcopy(net)
    tokens, rows, masked, target = parts(other, x, order, args)
    loss = adpe.mae_loss(other(tokens, rows, masked, other.delta if args.radius else None), target, masked)
    loss.backward()
    opt = torch.optim.SGD([p for p in net.parameters() if p is not net.delta], 0.1)
    losses = train_step(net, opt, torch.optim.SGD([net.delta], 0.1, maximize=True), x, order, start, args)
    assert torch.equal(losses["loss"], loss)
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        if name == "delta" and not args.radius:
            assert p.grad is None and torch.equal(p, q)
        elif name == "delta":
            torch.testing.assert_close(p, (q + 0.1 * q.grad).clamp(-1, 1))
        elif q.grad is not None:
            torch.testing.assert_close(p, q - 0.1 * q.grad)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("position, mode", FORMS)
def test_pgd_climbs_within_its_ball_and_leaves_no_trace(position, mode, norm):
    net, x, order, start, args = real(*form(position, mode), "--adversary", "pgd", "--norm", norm, "--radius", "0.5",
                                      "--step-size", "0.1", "--steps", "4")
    before = copy.deepcopy(net.state_dict())
    tokens, rows, masked, target = parts(net, x, order, args)
    delta = adpe.attack(net, tokens, rows, masked, target, start, **adpe.attack_settings(args))
    length = delta.flatten(1).norm(dim=1) if norm == "l2" else delta.flatten(1).abs().amax(1)
    assert length.max() <= 0.5 + 1e-6 and delta.shape == net.delta.shape
    assert (start.flatten(1).norm(dim=1) if norm == "l2" else start.abs()).max() <= 1 + 1e-6
    assert (delta[net.in_use == 0] == 0).all()

    def loss(delta):
        return adpe.mae_loss(net(tokens, rows, masked, delta), target, masked)

    assert loss(delta) > loss(0.5 * start)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())


def test_constants_of_the_attack_change_no_bit():
    net, x, order, start, args = real("--adversary", "pgd")
    tokens, rows, masked, target = parts(net, x, order, args)
    fast = adpe.attack(net, tokens, rows, masked, target, start, **adpe.attack_settings(args))

    def again(delta):
        return adpe.mae_loss(net(net.tokens(vit.patchify(x, 4)), net.vectors(), masked, delta), target, masked)

    slow = adpe.pgd(again, torch.zeros_like(start), 1.0, 0.625, 2, start=start, lo=-math.inf, hi=math.inf)
    assert torch.equal(fast, slow)


def attack_of_half(rank, world):
    net, x, order, start, args = real("--adversary", "pgd")
    cut = slice(2 * rank, 2 * rank + 2) if world > 1 else slice(0, 4)
    start = start if rank == 0 else -start  # only the first process's counts
    tokens, rows, masked, target = parts(net, x[cut], order[cut], args)
    return adpe.attack(net, tokens, rows, masked, target, start, **adpe.attack_settings(args))


def test_two_processes_share_the_delta_of_one(tmp_path):
    want = attack_of_half(0, 1)
    for delta in in_two_processes(attack_of_half, tmp_path):
        torch.testing.assert_close(delta, want)


def test_the_loss_is_of_masked_patches_standardised():
    g = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 2, 4, 12, generator=g, dtype=torch.float64)
    masked, want = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1]]).bool(), []
    for i in range(2):
        for j in range(4):
            t = (target[i, j] - target[i, j].mean()) / (target[i, j].var() + 1e-6) ** 0.5
            want += [((pred[i, j] - t) ** 2).mean()] if masked[i, j] else []
    assert adpe.mae_loss(pred, target, masked).item() == pytest.approx((sum(want) / 5).item(), rel=1e-12)


def test_crops_are_images_of_their_own():
    net, x, order, _, args = real("--crops", "3")
    assert x.shape == (12, 3, 16, 16) and order.shape == (12, 16)
    assert not torch.equal(x[:4], x[4:8]) and not torch.equal(order[:4], order[4:8])


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_the_exported_encoder_is_the_clean_one(position, tmp_path):
    net, *_ = real("--position", position)
    net.delta.data = random_delta(net)
    encoders.export(net.encoder, tmp_path / "encoder.pt")
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)["state"]
    assert any("relative" in key for key in saved) == (position == "relative") and "delta" not in saved
    x = torch.rand(2, 3, 16, 16)
    tokens, rows = net.tokens(vit.patchify(x, 4)), net.vectors()
    biases = [vit.relative_bias(r) for r in rows]
    want = net.encoder.encode(tokens, biases)[:, 1:].mean(1)
    torch.testing.assert_close(encoders.load_encoder(tmp_path / "encoder.pt")(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position, mode", FORMS)
def test_every_form_has_its_picture(position, mode):
    net, *_, args = real(*form(position, mode))
    x, y, _ = shapes.shapes(4, seed=0)
    drawn = []
    for _ in range(2):
        rows = adpe.pictures(net, data.Images(x, y, 10), args.image_size, args)
        assert len(rows) == len(net.delta) and len({name for name, _ in rows}) == len(rows)
        drawn.append(torch.cat([panel for _, panel in rows]))
        net.delta.data = random_delta(net)
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("epoch, lr", [(0, 0), (20, 0.5), (40, 1), (220, 0.5), (400, 0)])
def test_learning_rate_equals_printed_values(epoch, lr):
    assert adpe.lr_at(epoch, 400, 1.0, 40) == pytest.approx(lr, rel=1e-9, abs=1e-12)


def test_defaults():
    want = dict(arch="vit_tiny", decoder=[128, 4, 4], mask_ratio=0.75, epochs=400, batch_size=512, lr=1e-3, warmup=20,
                weight_decay=0.05, position="relative", mode="coordinate", adversary="persistent", norm="linf",
                radius=1, adv_lr=1e-3, steps=2, step_size=None, crops=1, min_scale=0.2, image_size=None)
    args = vars(adpe.parser().parse_args([]))
    assert {k: args[k] for k in want} == want


@pytest.mark.parametrize("flags, words", [
    (["--position", "both"], "--position both: choose one of relative, absolute"), (["--mode", "x"], "--mode x: choose"),
    (["--adversary", "x"], "--adversary x: choose one of persistent, pgd"), (["--norm", "l1"], "--norm l1: choose"),
    (["--arch", "slim"], "--arch slim: choose one of vit_slim"), (["--radius", "-1"], "--radius -1"),
    (["--adv-lr", "-1"], "--adv-lr -1"), (["--crops", "0"], "--crops 0: must be"),
    (["--min-scale", "2"], "--min-scale 2"), (["--image-size", "30"], "--image-size 30"),
    (["--decoder", "30", "1", "4"], "--decoder 30 1 4"), (["--mask-ratio", "1"], "--mask-ratio 1")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(adpe, *flags)
