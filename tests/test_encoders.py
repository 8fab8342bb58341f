import contextlib
import copy
import inspect
import io
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

import adpe
from common import encoders, files, resnet, unet, vit
from common.encoders import export, load_encoder, make
from common.resnet import BranchNorm, branch

BRANCHES = ("clean", "adv")


def pictures(n=4, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def trained(arch="slim", branches=BRANCHES, side=32, **options):
    """An encoder in eval mode whose BatchNorms have statistics and affines of their own, branch by branch."""
    torch.manual_seed(0)
    net = make(arch, branches, **options)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.uniform_(m.bias, -0.5, 0.5)
            m.momentum = 0.7
    with torch.no_grad():
        for i, name in enumerate(branches or [None]):
            for seed in (0, 1):
                with branch(net, name) if name else contextlib.nullcontext():
                    net.train()(pictures(8, side, seed) ** (i + 1))
    return net.eval()


def buffers(net, name):
    return {k: v.clone() for k, v in net.named_buffers() if f".branches.{name}." in k}


# Networks ---------------------------------------------------------------------------------------------------
def size(net):
    return sum(p.numel() for p in net.parameters())


def test_parameters_are_those_of_the_papers_network_with_a_batchnorm_more():
    torchvisions = models.resnet18(num_classes=1)
    torchvisions.conv1, torchvisions.fc = nn.Conv2d(3, 64, 3, bias=False), nn.Identity()
    norms = sum(size(m) for m in torchvisions.modules() if isinstance(m, nn.BatchNorm2d))
    assert size(make("resnet18")) == size(torchvisions)
    assert size(make("resnet18", BRANCHES)) == size(torchvisions) + norms == 11_178_432
    assert 300_000 < size(make("slim", BRANCHES)) < 700_000


@pytest.mark.parametrize("arch, dim", [("slim", 128), ("resnet18", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("stem", ["cifar", "imagenet", "small"])
def test_features_are_a_row_of_dim_numbers_an_image(arch, dim, stem):
    net = make(arch, stem=stem).eval()
    assert net.dim == dim and net(pictures(2, 24)).shape == (2, dim)


def test_normalisation_is_the_first_layer():
    mean, std, x = (0.49, 0.48, 0.45), (0.2, 0.25, 0.3), pictures()
    net, plain = trained(mean=mean, std=std), make("slim", BRANCHES, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    plain.load_state_dict(net.state_dict())
    normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(net(x), plain(normalised)) and not torch.allclose(net(x), plain(x), atol=1e-2)


def test_an_mlp_has_relu_and_norm_between_its_layers_only():
    def kinds(net):
        return [(m.in_features, m.out_features) if isinstance(m, nn.Linear) else type(m) for m in net]

    norm, relu = nn.BatchNorm1d, nn.ReLU
    assert kinds(encoders.mlp(5, 7)) == [(5, 7)]
    assert kinds(encoders.mlp(5, 7, 2, 3)) == [(5, 7), relu, (7, 2), relu, (2, 3)]
    with_norm = encoders.mlp(5, 7, 2, 3, norm=norm)
    assert kinds(with_norm) == [(5, 7), norm, relu, (7, 2), norm, relu, (2, 3)]
    assert with_norm[1].num_features == 7 and with_norm[4].num_features == 2
    assert with_norm(torch.rand(6, 5)).shape == (6, 3)


# Vision transformer -----------------------------------------------------------------------------------------
def fill(*shape):
    """0, 1, 2, ... in row-major order, float64."""
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def test_patchify_has_the_printed_order_and_unpatchify_inverts_it():
    patches = vit.patchify(fill(1, 3, 4, 4), 2)
    assert patches[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert patches[0, 3, :4].tolist() == [10, 26, 42, 11]
    for x, patch in ((fill(1, 3, 4, 4), 2), (fill(2, 3, 12, 12), 4), (fill(2, 1, 6, 6), 3)):
        assert torch.equal(vit.unpatchify(vit.patchify(x, patch), patch), x)


def test_patchify_takes_oblong_images_and_refuses_what_does_not_divide():
    x = fill(2, 3, 4, 6)
    patches = vit.patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    for token in range(6):
        i, j = divmod(token, 3)
        want = [x[1, c, 2 * i + a, 2 * j + b].item() for a in range(2) for b in range(2) for c in range(3)]
        assert patches[1, token].tolist() == want
    with pytest.raises(ValueError, match="4 x 6.*patch size 4; choose another size .--image-size.$"):
        vit.patchify(x, 4)


def test_unpatchify_puts_an_oblong_image_together_where_its_grid_is_given():
    x = fill(2, 3, 8, 32)
    patches = vit.patchify(x, 4)
    assert torch.equal(vit.unpatchify(patches, 4, (2, 8)), x)
    assert vit.unpatchify(patches, 4).shape == (2, 3, 16, 16)  # sixteen of them are a square, too
    with pytest.raises(ValueError, match="^15 patches: they are not a square; give `grid`"):
        vit.unpatchify(patches[:, :15], 4)
    with pytest.raises(ValueError, match="^16 patches: they are not 2 x 4; give `grid`"):
        vit.unpatchify(patches, 4, (2, 4))


@pytest.mark.parametrize("heads", [5, 0, 32])
def test_a_width_that_the_heads_do_not_divide_is_named(heads):
    for make in (lambda: vit.ViT("tiny", 8, 16, 2, heads, 32, *NORMALISE, "learned", False, False),
                 lambda: vit.PatchDecoder(encoders.make("vit_slim"), 16, 1, heads)):
        with pytest.raises(ValueError, match=f"^width 16 of a transformer: .*multiple of its {heads} heads$"):
            make()


@pytest.mark.parametrize("tokens", [1, 64, 17])
def test_a_decoder_refuses_another_grid(tokens):
    """One token would be spread over all places."""
    decoder = vit.PatchDecoder(encoders.make("vit_slim"), 16, 1, 2)
    assert decoder(torch.rand(2, 65, 16)).shape == (2, 64, 48)
    with pytest.raises(ValueError, match=f"^{tokens} tokens: this decoder is for 65, "):
        decoder(torch.rand(2, tokens, 16))


@pytest.mark.parametrize("depths, widths, words", [
    ((1, 1, 1), (8, 8, 8), "a ResNet has four stages"), ((1,) * 5, (8,) * 5, "a ResNet has four stages"),
    ((1, 1, 1, 1), (8, 8, 8), "as many of each"), ((1, 1, 1, 0), (8,) * 4, "as many of each, and positive"),
    ((1, -1, 1, 1), (8,) * 4, "and positive"),
    ((), (), "as many of each"), ((1,) * 4, (8, 8, 0, 8), "and positive")])
def test_stages_that_cannot_be_are_named(depths, widths, words):
    with pytest.raises(ValueError, match=words):
        resnet.ResNet("tiny", depths, widths, False, "small", (), *NORMALISE)
    if "four" in words:
        net = resnet.PreActResNet("tiny", 8, depths, widths, False, (), *NORMALISE)
        assert net(torch.rand(2, 3, 16, 16)).shape == (2, 8)
    else:
        with pytest.raises(ValueError, match=words):
            resnet.PreActResNet("tiny", 8, depths, widths, False, (), *NORMALISE)


@pytest.mark.parametrize("module, name", [
    (resnet, "ResNet"), (resnet, "PreActResNet"), (vit, "ViT"), (unet, "UNet")])
def test_the_example_of_a_docstring_makes_a_network_of_every_argument(module, name):
    made = getattr(module, name)
    (example,) = re.findall(r"For example\s+`([^`]*)`", made.__doc__)
    with torch.device("meta"):
        net = eval(" ".join(example.split()), vars(module))
        shape = net(torch.zeros(2, 3, 32, 32)).shape
    assert shape == ((2, 4, 32, 32) if name == "UNet" else (2, net.dim))
    for argument in inspect.signature(made).parameters:
        if name != "PreActResNet" or argument in ("stem_width", "depths", "widths", "bottleneck"):
            assert re.search(rf"\b{argument}\b", made.__doc__), argument


def test_sine_cosine_positions_equal_the_printed_values_and_a_slow_loop():
    table = vit.sincos_2d(8, 2)
    assert table[1].tolist() == pytest.approx(
        [0.84147098, 0.00999983, 0.54030231, 0.99995, 0, 0, 1, 1], abs=5e-9)
    table = vit.sincos_2d(192, 8)
    assert table.sum().item() == pytest.approx(5979.796474, rel=1e-9)
    assert table.square().sum().item() == pytest.approx(6144, rel=1e-12)
    assert table[21, [0, 48, 96, 144]].tolist() == pytest.approx(
        [-0.95892427, 0.28366219, 0.90929743, -0.41614684], abs=5e-9)
    at = torch.tensor([0.5, -0.25], dtype=torch.float64)
    assert vit.sincos_at(at, 8).tolist() == pytest.approx(
        [-0.24740396, -0.0025, 0.96891242, 0.99999688, 0.47942554, 0.00499998, 0.87758256, 0.9999875], abs=5e-9)
    for dim, height, width in ((8, 2, 2), (12, 3, 5)):
        q, want = dim // 4, []
        for i in range(height):
            for j in range(width):
                angles = [[at / 10000 ** (k / q) for k in range(q)] for at in (j, i)]
                want.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
        got = vit.sincos_2d(dim, height, width)
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="width 6"):
        vit.sincos_2d(6, 2)


@pytest.mark.parametrize("arch, patch, side, parameters", [  # of timm's ViTs without head, or by counting
    ("vit_tiny", 4, 32, None), ("vit_small", 4, 32, None),
    ("vit_base", 16, 224, 85_798_656), ("vit_large", 16, 224, 303_301_632)])
def test_a_vits_sizes(arch, patch, side, parameters):
    with torch.device("meta"):
        net = make(arch)
    d, n, L = net.dim, len(net.blocks), (side // patch) ** 2
    want = (d + (1 + L) * d) + (3 * patch**2 + 1) * d + n * (12 * d * d + 13 * d) + 2 * d
    assert size(net) == want == (parameters or want) and net.patch == patch and net.recipe["size"] == side


def slow_vit(net, x):
    """One image and one head at a time, from the state dict."""
    s, heads = net.state_dict(), net.blocks[0].attn.heads
    x, (C, H, W), p = (x - s_mean(net)) / s_std(net), x.shape, net.patch

    def norm(t, name):
        t = (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return t * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(t, name):
        return t @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    tokens = [s["cls_token"][0, 0]]
    for i in range(H // p):
        for j in range(W // p):
            cut = x[:, i * p:(i + 1) * p, j * p:(j + 1) * p]
            tokens.append((s["patch_embed.proj.weight"] * cut).sum((1, 2, 3)) + s["patch_embed.proj.bias"])
    t = torch.stack(tokens) + s["pos_embed"][0]
    for b in range(len(net.blocks)):
        n = f"blocks.{b}"
        q, k, v = linear(norm(t, f"{n}.norm1"), f"{n}.attn.qkv").chunk(3, 1)
        out = []
        for h in range(heads):
            d = q.shape[1] // heads
            at = slice(h * d, (h + 1) * d)
            out.append((q[:, at] @ k[:, at].T / d**0.5).softmax(1) @ v[:, at])
        t = t + linear(torch.cat(out, 1), f"{n}.attn.proj")
        t = t + linear(F.gelu(linear(norm(t, f"{n}.norm2"), f"{n}.mlp.fc1")), f"{n}.mlp.fc2")
    if net.recipe["fc_norm"]:
        return norm(t[1:].mean(0, keepdim=True), "fc_norm")[0]
    return norm(t, "norm")[1:].mean(0)


def s_mean(net):
    return torch.tensor(net.recipe["mean"], dtype=torch.float64).view(3, 1, 1)


def s_std(net):
    return torch.tensor(net.recipe["std"], dtype=torch.float64).view(3, 1, 1)


def random_vit(arch="vit_slim", **options):
    """All weights random, those too that start at 0 or 1."""
    torch.manual_seed(0)
    net = make(arch, **options)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net.eval()


@pytest.mark.parametrize("options", [{}, {"fc_norm": True}, {"positions": "learned", "size": 16}])
def test_a_vit_equals_slow_loops(options):
    net = random_vit(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), **options).double()
    x = pictures(2, options.get("size", 32)).double()
    want = torch.stack([slow_vit(net, image) for image in x])
    torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-6)  # mean and std are float32


def vit_with_offsets(**options):
    """A ViT with relative positions that read their tables as AdPE's do."""
    net = make("vit_slim", relative=True, **options).eval()
    net.offset_weights.copy_(adpe.clean_weights())
    return net


def test_relative_positions_enter_the_logits_as_printed_in_their_definition():
    """q_i . (k_j + r_ij), r from the rounded index where the offset is an index, and its own vector for cls."""
    torch.manual_seed(0)
    block = vit.TransformerBlock(8, 2, relative=True).double()
    nn.init.normal_(block.attn.relative.table), nn.init.normal_(block.attn.relative.cls)
    x, seen = torch.randn(2, 5, 8, dtype=torch.float64), []
    r = block.attn.relative.read(vit_with_offsets().double().pair_weights(2, 2))

    def bias(q):
        seen.append(q)
        return vit.relative_logits(q, r)

    out = block.attn(x, bias)
    q, k, v = block.attn.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    table, cls = block.attn.relative.table, block.attn.relative.cls
    logits = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            if i and j:  # offsets of a 2 x 2 grid are integers below 1.9
                (a, b), (c, d) = divmod(i - 1, 2), divmod(j - 1, 2)
                r_ij = table[:, 3 + a - c, 3 + b - d]
            else:
                r_ij = cls
            logits[:, :, i, j] = (q[:, :, i] * (k[:, :, j] + r_ij)).sum(-1) / 2
    want = block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    assert torch.equal(seen[0], q / 2)


def test_relative_tables_start_without_effect_and_then_matter_at_any_size():
    net, x = random_vit(), pictures()
    relative = vit_with_offsets()
    missing = relative.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert len(missing) == 9 and all("relative" in key or key == "offset_weights" for key in missing)
    torch.testing.assert_close(relative(x), net(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        relative.blocks[1].attn.relative.table.normal_()
    assert not torch.allclose(relative(x), net(x), atol=1e-3)
    assert relative(pictures(2, 48)).shape == (2, 96)


def test_every_pair_of_a_grid_reads_the_table_at_its_offset():
    """By the continuous lookup of adpe.py, also where offsets are farther than the weights reach."""
    relative = vit_with_offsets().blocks[0].attn.relative
    nn.init.normal_(relative.table)
    for height, width in ((3, 3), (2, 11)):
        at = vit.coordinates(height, width, dtype=torch.float32)
        want = adpe.lookup(relative.table, adpe.relative_index(at[:, None] - at)).permute(1, 2, 0)
        r = relative.read(vit_with_offsets().pair_weights(height, width))
        torch.testing.assert_close(r[1:, 1:], want, rtol=1e-6, atol=1e-6)


def test_another_size_gets_the_positions_of_its_own_grid_unless_they_were_learned():
    small, large = random_vit(), make("vit_slim", size=64).eval()
    state = small.state_dict()
    large.load_state_dict({**state, "pos_embed": large.pos_embed})
    with torch.no_grad():  # sine positions, but for the row of cls
        large.pos_embed[:, :1] = small.pos_embed[:, :1]
    x = pictures(2, 64)
    assert torch.equal(small(x), large(x))
    with pytest.raises(ValueError, match=r"64 x 64.*learned for 32 x 32 \(--image-size 32\)"):
        make("vit_slim", positions="learned")(x)


def test_on_cuda_the_positions_of_another_grid_are_made_there():
    """A copy from the host would wait, and no CUDA graph can record it. By tensors that hold no numbers."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
                copies.append((args[0].device.type, out.device.type))
            return out

    with FakeTensorMode():
        with torch.device("cuda"):
            net = make("vit_slim")
            x = torch.empty(2, 3, 64, 64)
        with Copies():
            assert net(x).shape == (2, 96)
    assert ("cpu", "cuda") not in copies and ("cuda", "cuda") in copies


def test_sine_positions_are_fixed_until_all_is_trained_and_learned_ones_are_not():
    assert not make("vit_slim").pos_embed.requires_grad
    assert make("vit_slim").requires_grad_().pos_embed.requires_grad
    assert make("vit_slim", positions="learned").pos_embed.requires_grad


def test_a_vit_starts_as_mae_does():
    torch.manual_seed(0)
    net = make("vit_tiny")
    assert all((m.bias == 0).all() for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    for weight, fans in ((net.patch_embed["proj"].weight, 48 + 192), (net.blocks[3].attn.qkv.weight, 4 * 192)):
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
    assert 0.015 < net.cls_token.std() < 0.025
    assert torch.equal(net.pos_embed[0, 0], torch.zeros(192))


@pytest.mark.parametrize("flags, words", [
    (dict(arch="vit"), "'vit': choose one of slim, resnet18, .*vit_slim, vit_tiny"),
    (dict(arch="slim", stem="big"), "'big': choose one of cifar, imagenet, small"),
    (dict(arch="vit_tiny", size=30), "image size 30.*patch size 4 of vit_tiny; choose another size .--image-size.$"),
    (dict(arch="vit_tiny", positions="none"), "'none': choose sincos or learned"),
    *((dict(arch=arch, **how), words) for arch in ("slim", "vit_slim") for how, words in (
        (dict(std=(0.2, 0.0, 0.2)), r"std \[0.2, 0.0, 0.2\]"), (dict(std=(0.2, 0.2, -0.2)), "std .*positive"),
        (dict(mean=(0.2, math.nan, 0.2)), r"mean \[0.2, nan, 0.2\]"),
        (dict(std=(0.2, 0.2, math.inf)), "inf.*finite"),
        (dict(mean=(0.5,)), "three")))])
def test_a_network_that_cannot_be_made_is_named(flags, words):
    with pytest.raises(ValueError, match=words):
        make(**flags)


@pytest.mark.parametrize("how, words", [
    (dict(arch="slim"), "--arch slim: choose one of vit_slim, vit_tiny"),
    (dict(image_size=30), "--image-size 30: no multiple of vit_slim's patch size, 4"),
    (dict(decoder=(16, 0, 2)), "--decoder 16 0 2: all must be positive"),
    (dict(decoder=(16, 1, 0)), "--decoder 16 1 0"),
    (dict(decoder=(18, 1, 2)), "--decoder 18 1 2.*multiple of 4"),
    (dict(decoder=(16, 1, 3)), "--decoder 16 1 3.*heads"),
    (dict(mask_ratio=1.0), "--mask-ratio 1: of 64 patches"), (dict(mask_ratio=0.0), "--mask-ratio 0"),
    (dict(mask_ratio=math.nan), "--mask-ratio nan"), (dict(mask_ratio=0.01), None),
    (dict(image_size=4), "--mask-ratio 0.75: of 1 patches .*some must stay, some go"),
    (dict(mask_ratio=0.99), "--mask-ratio 0.99: of 64 patches .*some must stay"), (dict(), None)])
def test_a_masked_autoencoder_that_cannot_be_made_is_named_by_its_flag(how, words):
    flags = {"arch": "vit_slim", "image_size": 32, "decoder": (16, 1, 2), "mask_ratio": 0.75, **how}
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        vit.check_masked(**flags)


# For fine-tuning --------------------------------------------------------------------------------------------
def test_stages_name_every_parameter_but_the_last_norm_in_order():
    for arch in ("vit_slim", "resnet18", "resnet50"):
        net = make(arch)
        stages, seen = encoders.stages(net), []
        for name, _ in net.named_parameters():
            at = [i for i, parts in enumerate(stages) if any(f"{name}.".startswith(f"{p}.") for p in parts)]
            assert len(at) == (0 if name.startswith("norm.") else 1), name
            seen += at
        assert seen == sorted(seen) and set(seen) == set(range(len(stages)))
        assert len(stages) == 1 + {"vit_slim": 4, "resnet18": 8, "resnet50": 16}[arch]


@pytest.mark.parametrize("arch", ["vit_slim", "slim"])
def test_drop_path_skips_branches_of_single_images_in_train_mode_only(arch):
    torch.manual_seed(0)
    net, x = random_vit() if arch == "vit_slim" else make("slim").eval(), pictures()
    want = net(x)
    encoders.drop_path(net, 0.3)
    rates = [m.drop for m in net.modules() if hasattr(m, "drop")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert torch.equal(net(x), want)
    block = next(m for m in reversed(list(net.modules())) if hasattr(m, "drop")).train()
    h = torch.randn(1, 17, 96) if arch == "vit_slim" else torch.rand(1, 64, 4, 4)
    for m in block.modules():
        m.training = m is block  # BatchNorm as in eval mode
    block.drop = 0.0
    whole = block(h)
    block.drop = 1.0
    skipped = block(h)
    torch.testing.assert_close(skipped, h if arch == "vit_slim" else block.downsample(h).relu())
    block.drop = 0.4
    many = block(h.expand(1000, *h.shape[1:]))
    like = [(many - one).abs().flatten(1).amax(1).lt(1e-4).float().mean().item() for one in (skipped, whole)]
    assert like == pytest.approx([0.16, 0] if arch == "vit_slim" else [0.4, 0], abs=0.05)  # the kept grow


def test_a_renewed_norm_follows_the_mean_and_is_exported(tmp_path):
    net, x = random_vit(), pictures()
    tokens = []
    net.blocks[-1].register_forward_hook(lambda _, __, out: tokens.append(out))
    before = net(x)
    encoders.renew_norm(net)
    want = F.layer_norm(tokens[0][:, 1:].mean(1), (96,), eps=1e-6)
    torch.testing.assert_close(net(x), want)
    assert not torch.allclose(net(x), before, atol=1e-2)
    assert [k for k in net.state_dict() if "norm." in k and "blocks" not in k] == ["fc_norm.weight", "fc_norm.bias"]
    export(net, tmp_path / "encoder.pt")
    assert torch.equal(load_encoder(tmp_path / "encoder.pt")(x), net(x))
    other = make("slim").eval()
    state = dict(other.state_dict())
    encoders.renew_norm(other)
    assert state.keys() == other.state_dict().keys()


# BatchNorm branches -----------------------------------------------------------------------------------------
def test_a_branch_uses_and_updates_its_own_statistics_only():
    net, x = trained(), pictures(seed=2)
    clean, adv, features = buffers(net, "clean"), buffers(net, "adv"), net(x)
    assert len(clean) == len(adv) > 0
    with branch(net, "adv"):
        assert not torch.allclose(net(x), features, atol=1e-2)
        net.train()(x)
    assert all(torch.equal(v, clean[k]) for k, v in buffers(net, "clean").items())
    assert not any(torch.equal(v, adv[k]) for k, v in buffers(net, "adv").items())
    assert torch.equal(net.eval()(x), features)  # the first branch is back


def test_a_branch_is_put_back_after_an_inner_one_and_after_an_exception():
    net, x = trained(), pictures()
    clean = net(x)
    with branch(net, "adv"):
        adv = net(x)
        with branch(net, "clean"):
            assert torch.equal(net(x), clean)
        assert torch.equal(net(x), adv)
    with pytest.raises(KeyError), branch(net, "adv"):
        raise KeyError
    assert torch.equal(net(x), clean)


def test_an_unknown_branch_is_refused_with_the_known_ones_and_changes_nothing():
    net, x = trained(), pictures()
    before = net(x)
    with pytest.raises(ValueError, match="'attacked'.*clean, adv"), branch(net, "attacked"):
        pass
    assert torch.equal(net(x), before)


PLAIN = {  # networks that have BatchNorms, and no branches
    "ours": lambda: nn.Sequential(make("slim"), encoders.mlp(128, 128, 16)),
    "torchvision's": lambda: models.resnet18(num_classes=4),
    "its projector's": lambda: nn.Sequential(make("vit_slim"), encoders.mlp(96, 16, 16, norm=nn.BatchNorm1d)),
    "synchronised": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(make("slim")),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_batchnorms_without_branches_are_refused_with_the_remedy(kind):
    """Else clean and attacked images would share their statistics, and the losses look plausible."""
    net, words = PLAIN[kind](), "BN branch 'adv': .*plain BatchNorm.*norm_layer=lambda c: BranchNorm"
    with pytest.raises(ValueError, match=words) as e:
        with branch(net, "adv"):
            pass
    assert "\n" not in str(e.value)


def test_the_remedy_works_for_torchvisions_resnet18():
    """As the message has it: a forward pass in each branch, with statistics and affines of its own."""
    with pytest.raises(ValueError) as e, branch(models.resnet18(), "adv"):
        pass
    norm_layer = str(e.value).split("norm_layer=")[1]
    torch.manual_seed(0)
    net = models.resnet18(num_classes=4, norm_layer=eval(norm_layer, {"BranchNorm": BranchNorm}))
    assert not any(type(m) is nn.BatchNorm2d for m in net.children())
    x = pictures(2)
    for name, images in (("clean", x), ("adv", 1 - x)):
        with branch(net, name):
            net.train()(images).sum().backward()
    norms = [m.branches for m in net.modules() if isinstance(m, BranchNorm)]
    assert len(norms) == 20
    for clean, adv in [(m["clean"], m["adv"]) for m in norms]:
        assert clean.num_batches_tracked == adv.num_batches_tracked == 1
        assert not torch.equal(clean.running_mean, adv.running_mean)
        assert clean.weight.grad is not None and adv.weight.grad is not None
    net.eval()
    with branch(net, "clean"):
        clean = net(x)
    with branch(net, "adv"):
        assert not torch.allclose(net(x), clean, atol=1e-2)


@pytest.mark.parametrize("net", [
    nn.Linear(3, 3), make("vit_slim"), encoders.mlp(3, 4, 3),
    nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)),
    nn.ModuleDict({"encoder": make("slim", BRANCHES), "head": encoders.mlp(128, 8, 8, norm=nn.BatchNorm1d)})],
    ids=["linear", "ViT", "MLP", "other norms", "a head without branches"])
def test_a_network_without_batchnorm_or_with_some_branches_is_fine(net):
    with branch(net, "adv"):
        pass


def test_choosing_a_branch_is_cheap(monkeypatch):
    """Every embedding does it: it goes once over the modules, without what makes nn.Module's own ways slow."""
    net, slow, modules, set_attribute = trained(), [], nn.Module.named_modules, nn.Module.__setattr__
    monkeypatch.setattr(nn.Module, "named_modules", lambda self, *args: slow.append(self) or modules(self, *args))
    monkeypatch.setattr(nn.Module, "__setattr__", lambda self, *pair: slow.append(pair) or set_attribute(self, *pair))
    with branch(net, "adv"):
        pass
    assert slow == []


def test_a_state_dict_carries_every_branch():
    net, copy, x = trained(), make("slim", BRANCHES).eval(), pictures()
    copy.load_state_dict(net.state_dict())
    for name in BRANCHES:
        with branch(net, name), branch(copy, name):
            assert torch.equal(net(x), copy(x))


# Other programs ---------------------------------------------------------------------------------------------
NORMALISE = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def tiny_resnet(branches=(), bottleneck=False):
    return resnet.ResNet("tiny", (1, 1, 2, 1), (8, 8, 16, 16), bottleneck, "imagenet", branches, *NORMALISE)


def tiny_vit(positions="sincos", relative=False, fc_norm=False):
    return vit.ViT("tiny", 8, 16, 2, 2, 32, *NORMALISE, positions, relative, fc_norm)


NETWORKS = {
    "ResNet": tiny_resnet,
    "bottlenecks": lambda: tiny_resnet(bottleneck=True),
    "branches": lambda: tiny_resnet(BRANCHES),
    "ViT": tiny_vit,
    "relative": lambda: tiny_vit(relative=True),
    "learned": lambda: tiny_vit("learned", fc_norm=True),
}


def named(name):
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


@pytest.mark.parametrize("name", ["ResNet", "bottlenecks"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_compiles_a_resnet_with_its_names_and_features(name):
    net, x = named(name), pictures(2)
    scripted = torch.jit.script(net)
    assert torch.equal(scripted(x), net(x))
    assert {*scripted.state_dict()} - {"mean", "std"} == {*net.state_dict()}  # it keeps every buffer
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), net(x))
    net.train(), scripted.train()
    torch.testing.assert_close(scripted(x), net(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_takes_batches_of_other_sizes(name):
    net, x = named(name), pictures(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation, and of the size of the images, which is fixed
        traced = torch.jit.trace(net, x[:2])
    torch.testing.assert_close(traced(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_and_pickles_are_whole_and_apart(name, again):
    net, x = named(name), pictures(2)
    other = again(net)
    assert torch.equal(other(x), net(x)) and other.recipe == net.recipe
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert next(net.parameters()).abs().sum() > 0


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """A device without float64, as Apple's: the "meta" device stands for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, f"{function} makes float64 on the device"
        return out


@pytest.mark.parametrize("name, side", [*((name, 32) for name in NETWORKS), ("ViT", 48), ("relative", 48)])
def test_no_float64_is_made_on_the_device(name, side, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **how: contextlib.nullcontext())  # "meta" has none
    net = named(name).to("meta")
    with NoFloat64():
        net(torch.rand(2, 3, side, side, device="meta"))
        with torch.device("meta"):
            made = nn.ModuleList([named(name)])
            if isinstance(made[0], vit.ViT):
                made.append(vit.PatchDecoder(made[0], 16, 1, 2))
    assert {t.device.type for t in [*made.parameters(), *made.buffers()]} == {"meta"}


def test_coordinates_are_float64_on_the_cpu_and_exact_in_the_type_asked_for():
    at = vit.coordinates(3, 5)
    assert at.dtype == torch.float64 and at.device.type == "cpu" and at.tolist() == [
        [i, j] for i in range(3) for j in range(5)]
    assert torch.equal(vit.coordinates(3, 5, dtype=torch.float32), at.float())
    assert vit.coordinates(3, 5, "meta", torch.float32).device.type == "meta"


def test_positions_that_are_not_finite_stay_so_and_do_not_crash():
    """So that the run's own line on a loss that is not finite stops it."""
    offsets = torch.tensor([[0.5, -1.0], [math.nan, 2.0], [1.0, math.nan], [math.inf, -math.inf], [9.0, 2.5]])
    index = adpe.relative_index(offsets)
    bad = torch.tensor([False, True, True, False, False])
    assert torch.equal(index.isnan().any(1), bad)
    weights = adpe.lookup_weights(index, 3)
    assert weights.shape == (5, 49) and torch.equal(weights.isnan().any(1), bad)
    table = torch.arange(49.0).view(1, 7, 7).requires_grad_()
    found = adpe.lookup(table, index.requires_grad_())
    assert torch.equal(found[0].isnan(), bad)
    found[0, ~bad].sum().backward()
    kept = adpe.lookup(table, adpe.relative_index(offsets[~bad]))
    assert torch.equal(found[0, ~bad], kept[0])
    encoder = vit.ViT("tiny", 16, 16, 1, 2, 32, *NORMALISE, "sincos", True, False)
    net = adpe.MAEPlus(encoder, (16, 1, 2), "relative", "coordinate")
    with torch.no_grad():
        r = net.moved_vectors(net.blocks[0], torch.tensor([math.nan, 0.0]))
    assert r[1:, 1:].isnan().all() and r[0].isfinite().all()


# Exported encoders ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_an_exported_encoder_is_torchvisions_resnet_without_fc(tmp_path, arch):
    net, x = trained(arch, side=64, stem="imagenet"), pictures(2, 64, seed=2)
    export(net, tmp_path / "encoder.pt", "adv")
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    theirs = getattr(models, arch)(num_classes=1)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(saved["state"])
    mean, std = (torch.tensor(saved[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad(), branch(net, "adv"):
        ours, theirs = net(x), theirs.eval()((x - mean) / std)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def in_torchvisions_names(state):
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj",
             "encoder.ln": "norm"}
    for i in range(12):
        layer, block = f"encoder.layers.encoder_layer_{i}", f"blocks.{i}"
        for theirs, ours in (("ln_1", "norm1"), ("ln_2", "norm2"), ("self_attention.out_proj", "attn.proj"),
                             ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")):
            names[f"{layer}.{theirs}"] = f"{block}.{ours}"
        names[f"{layer}.self_attention.in_proj_"] = f"{block}.attn.qkv."
    found = {}
    for key, tensor in state.items():
        theirs = next(t for t, o in names.items() if key == o or key.startswith(o if o[-1] == "." else f"{o}."))
        found[theirs + key[len(names[theirs]):]] = tensor
    return found


def exported_vit(path, **options):
    net = random_vit("vit_tiny", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), **options)
    export(net, path)
    saved = torch.load(path, weights_only=True)
    x = pictures(2)
    normalised = (x - torch.tensor(saved["mean"]).view(3, 1, 1)) / torch.tensor(saved["std"]).view(3, 1, 1)
    return net(x), saved["state"], normalised


def test_an_exported_vit_gives_the_features_of_torchvisions(tmp_path):
    ours, state, x = exported_vit(tmp_path / "encoder.pt")
    theirs = models.VisionTransformer(32, 4, 12, 3, 192, 768).eval()
    theirs.heads = nn.Identity()
    theirs.load_state_dict(in_torchvisions_names(state))
    tokens = torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(x)], 1)
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs.encoder(tokens)[:, 1:].mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.outside
@pytest.mark.parametrize("fc_norm", [False, True])
def test_an_exported_vit_loads_into_timms_and_gives_the_same_features(tmp_path, fc_norm):
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours, state, x = exported_vit(tmp_path / "encoder.pt", fc_norm=fc_norm)
    theirs = timm.VisionTransformer(32, 4, embed_dim=192, depth=12, num_heads=3, num_classes=0,
                                    global_pool="avg", fc_norm=fc_norm).eval()
    theirs.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [
    {}, {"size": 16, "positions": "learned"}, {"relative": True, "fc_norm": True}])
def test_a_loaded_vit_gives_the_exported_features_to_the_bit(tmp_path, options):
    net, path = random_vit(**options, mean=(0.4, 0.5, 0.6)), tmp_path / "encoder.pt"
    export(net, path)
    encoder, x = load_encoder(path), pictures(4, options.get("size", 32))
    assert torch.equal(encoder(x), net(x)) and encoder.recipe == net.recipe and encoder.branch is None


@pytest.mark.parametrize("branches", [(), BRANCHES])
@pytest.mark.parametrize("stem", ["small", "cifar"])
def test_a_loaded_encoder_gives_the_exported_features_to_the_bit(tmp_path, branches, stem):
    path, x = tmp_path / "encoder.pt", pictures(seed=2)
    net = trained(branches=branches, stem=stem, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    for exported in branches or [None]:
        export(net, path, exported)
        for name in (None, *branches):
            encoder = load_encoder(path, name)
            with branch(net, name or exported) if branches else contextlib.nullcontext():
                assert torch.equal(encoder(x), net(x))
            assert encoder.branch == (name or exported)
            assert not any(m.training or isinstance(m, resnet.BranchNorm) for m in encoder.modules())


@pytest.mark.parametrize("net, chosen, words", [
    (lambda: make("slim", BRANCHES), "attacked", "'attacked'.*adv, clean"),
    (lambda: make("slim", BRANCHES), None, "None.*adv, clean"),
    (lambda: make("slim"), "adv", "BN branch 'adv': this encoder has none"),
    (lambda: make("vit_slim"), "adv", "BN branch 'adv': this encoder has none"),
    (models.resnet18, None, "ResNet is not an encoder of `make`"),
    (lambda: nn.Linear(2, 2), None, "Linear is not an encoder")])
def test_what_cannot_be_exported_is_refused_and_writes_nothing(tmp_path, net, chosen, words):
    with pytest.raises(ValueError, match=words):
        export(net(), tmp_path / "encoder.pt", chosen)
    assert list(tmp_path.iterdir()) == []


def some_tensors():
    norm = "layer2.0.bn1.branches"
    for name in ("conv1.weight", f"{norm}.adv.weight", f"{norm}.clean.running_var"):
        for value in (math.nan, math.inf):
            yield "slim", name, value
    yield "vit_slim", "blocks.1.attn.qkv.bias", -math.inf


@pytest.mark.parametrize("arch, name, value", list(some_tensors()))
def test_a_tensor_that_is_not_finite_is_not_exported_nor_is_the_old_file_touched(tmp_path, arch, name, value):
    net, path = make(arch, () if arch == "vit_slim" else BRANCHES), tmp_path / "encoder.pt"
    chosen = None if arch == "vit_slim" else "adv"
    export(net, path, chosen)
    before = path.read_bytes()
    net.state_dict()[name].view(-1)[-1] = value
    for target in (path, tmp_path / "other.pt"):
        with pytest.raises(ValueError, match=f"{target}: not written.* {name} is not finite"):
            export(net, target, chosen)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part, name", [
    ("state", "layer2.0.conv1.weight"), ("state", "bn1.running_var"), ("others", "bn1.running_mean")])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_tensor_that_is_not_finite_is_not_loaded(tmp_path, part, name, value):
    path = tmp_path / "encoder.pt"
    export(make("slim", BRANCHES), path, "adv")
    saved = torch.load(path, weights_only=True)
    tensors = saved["state"] if part == "state" else saved["others"]["clean"]
    tensors[name].view(-1)[0] = value
    torch.save(saved, path)
    with pytest.raises(ValueError, match=f"encoder.pt: .*{name} is not finite"):
        load_encoder(path)


def test_weights_of_a_classifier_that_are_not_finite_are_not_loaded():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for name in ("0.bias", "1.running_var"):
        state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        state[name][1] = math.nan
        with pytest.raises(ValueError, match=f"^file.pt: {name} is not finite"):
            files.load_strict(net, state, "file.pt")
    with pytest.raises(ValueError, match="^file.pt: 0.bias is a list, not a tensor"):
        files.load_strict(net, {**net.state_dict(), "0.bias": [0.0, 0.0]}, "file.pt")
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


def plain(path):
    torch.save(make("slim").state_dict(), path)


def whole_module(path):
    torch.save(make("slim"), path)


def changed(**parts):
    def spoil(path):
        saved = torch.load(path, weights_only=True)
        saved.update(parts)
        torch.save({key: value for key, value in saved.items() if value is not None}, path)
    return spoil


def folder(path):
    path.unlink(), path.mkdir()


FOREIGN = {
    "absent": (lambda path: path.unlink(), FileNotFoundError, "no such file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:2000]), ValueError, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), ValueError, "cannot be read"),
    "text": (lambda path: path.write_text("hello"), ValueError, "cannot be read"),
    "folder": (folder, ValueError, "is a folder"),
    "plain": (plain, ValueError, "not an exported encoder.* but a plain state_dict of 72 tensors"),
    "torchvision": (lambda path: torch.save(models.resnet18().state_dict(), path), ValueError,
                    "not an exported encoder.* but a plain state_dict of 122 tensors"),
    "lightning": (lambda path: torch.save({"state_dict": {}, "epoch": 1}, path), ValueError,
                  "not an exported encoder.* but a dict of state_dict, epoch;"),
    "checkpoint": (lambda path: torch.save({"flags": {}, "world": 1, "step": 2, "state": {}}, path),
                   ValueError, "not an exported encoder.* but the checkpoint of a run;"),
    "nothing": (lambda path: torch.save({}, path), ValueError, "not an exported encoder.* but an empty dict;"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), ValueError,
               "not an exported encoder.* but a Tensor;"),
    "list": (lambda path: torch.save([1, 2], path), ValueError, "not an exported encoder.* but a list;"),
    "module": (whole_module, ValueError, "state_dict"),
    "another format": (changed(format="evaluated classifier, version 1"), ValueError,
                       "not an exported encoder.* but an evaluated classifier, version 1;"),
    "another version": (changed(format="exported encoder, version 9"), ValueError,
                        "but an exported encoder, version 9;"),
    "no state": (changed(state=None), ValueError, "'state' is missing"),
    "no others": (changed(others=None), ValueError, "'others' is missing"),
    "no arch": (changed(arch=None), ValueError, "'arch' is missing"),
    "unknown arch": (changed(arch="resnet9"), ValueError, "arch 'resnet9': choose one of slim"),
    "bad normalisation": (changed(std=[0.0, 0.2, 0.2]), ValueError, "std .*positive"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_exported_encoder_is_refused_in_one_line_with_its_path(tmp_path, kind):
    spoil, error, says = FOREIGN[kind]
    path = tmp_path / "encoder.pt"
    export(make("slim", BRANCHES), path, "adv")
    spoil(path)
    with pytest.raises(error, match=says) as e:
        load_encoder(path)
    message = str(e.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    if kind not in ("unknown arch", "bad normalisation"):
        assert message.endswith("; pretraining writes encoder.pt when it ends")
    assert str(e.traceback[-1].statement).strip().startswith("raise ")  # so run.cli prints it as one line


def test_loading_an_unknown_branch_is_refused_with_the_known_ones(tmp_path):
    export(make("slim", BRANCHES), tmp_path / "encoder.pt", "adv")
    with pytest.raises(ValueError, match="encoder.pt.*'attacked'.*adv, clean"):
        load_encoder(tmp_path / "encoder.pt", "attacked")


@pytest.mark.parametrize("spoil, says", [
    (lambda state: state.pop("layer2.0.bn1.weight"), "layer2.0.bn1.weight is missing"),
    (lambda state: state.update(head=torch.zeros(2)), "head is unexpected"),
    (lambda state: state.update({"conv1.weight": torch.zeros(9, 3)}), r"conv1.weight is \(9, 3\), expected")])
def test_a_missing_unexpected_or_misshaped_tensor_is_named(tmp_path, spoil, says):
    path = tmp_path / "encoder.pt"
    export(make("slim", BRANCHES), path, "adv")
    saved = torch.load(path, weights_only=True)
    spoil(saved["state"])
    torch.save(saved, path)
    with pytest.raises(ValueError, match=f"encoder.pt: {says}"):
        load_encoder(path)


def test_a_network_without_branches_says_so(tmp_path):
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="no BN branch 'adv'; it has no branches"):
        encoders.load_encoder(tmp_path / "encoder.pt", "adv")


@pytest.mark.parametrize("arch", ["slim", "preact_slim", "vit_slim"])
def test_integer_images_are_refused_by_the_networks(arch):
    with pytest.raises(ValueError, match="images are integers: must be floats in .0, 1., as x.float"):
        make(arch)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("arch", ["preact_slim", "vit_slim"])
def test_a_stem_is_for_resnets(arch):
    with pytest.raises(ValueError, match=f"stem 'imagenet': is for slim, .*, and not for {arch}"):
        make(arch, stem="imagenet")


def test_a_forgotten_comma_makes_no_branches_of_letters():
    with pytest.raises(ValueError, match="branches 'adv': must be a list of names"):
        BranchNorm(4, "adv")
