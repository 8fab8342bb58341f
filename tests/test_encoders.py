import pytest
import torch
from torch import nn
from torchvision import models

from common import encoders
from common.encoders import branch, export, load_encoder, make

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
                with branch(net, name):
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
    assert size(encoders.resnet18()) == size(torchvisions)
    assert size(encoders.resnet18(branches=BRANCHES)) == size(torchvisions) + norms == 11_178_432
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


def test_a_network_without_branches_is_left_alone():
    net, x = trained(branches=()), pictures()
    before = net(x)
    with branch(net, "adv"):
        assert torch.equal(net(x), before)


def test_a_state_dict_carries_every_branch():
    net, copy, x = trained(), make("slim", BRANCHES).eval(), pictures()
    copy.load_state_dict(net.state_dict())
    for name in BRANCHES:
        with branch(net, name), branch(copy, name):
            assert torch.equal(net(x), copy(x))


# Exported encoders ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_an_exported_encoder_is_torchvisions_resnet_without_fc(tmp_path, arch):
    net, x = trained(arch, side=64, stem="imagenet"), pictures(2, 64, seed=2)
    export(net, "adv", tmp_path / "encoder.pt")
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    theirs = getattr(models, arch)(num_classes=1)
    keys = theirs.load_state_dict(saved["state"], strict=False)
    assert set(keys.missing_keys) == {"fc.weight", "fc.bias"} and keys.unexpected_keys == []
    theirs.fc = nn.Identity()
    mean, std = (torch.tensor(saved[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad(), branch(net, "adv"):
        ours, theirs = net(x), theirs.eval()((x - mean) / std)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("branches", [(), BRANCHES])
@pytest.mark.parametrize("stem", ["small", "cifar"])
def test_a_loaded_encoder_gives_the_exported_features_to_the_bit(tmp_path, branches, stem):
    path, x = tmp_path / "encoder.pt", pictures(seed=2)
    net = trained(branches=branches, stem=stem, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    for exported in branches or [None]:
        export(net, exported, path)
        for name in (None, *branches):
            encoder = load_encoder(path, name)
            with branch(net, name or exported):
                assert torch.equal(encoder(x), net(x))
            assert encoder.branch == (name or exported)
            assert not any(m.training or isinstance(m, encoders.BranchNorm) for m in encoder.modules())


def test_exporting_an_unknown_branch_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="'attacked'.*adv, clean"):
        export(make("slim", BRANCHES), "attacked", tmp_path / "encoder.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil, error, says", [
    (lambda path: path.unlink(), FileNotFoundError, "no such file"),
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), ValueError, "truncated"),
    (lambda path: torch.save({"state_dict": {}}, path), ValueError, "not an exported encoder"),
    (lambda path: torch.save(torch.zeros(3), path), ValueError, "not an exported encoder")])
def test_what_is_no_exported_encoder_is_refused_with_its_path(tmp_path, spoil, error, says):
    path = tmp_path / "encoder.pt"
    export(make("slim", BRANCHES), "adv", path)
    spoil(path)
    with pytest.raises(error, match=says) as e:
        load_encoder(path)
    assert str(path) in str(e.value)


def test_loading_an_unknown_branch_is_refused_with_the_known_ones(tmp_path):
    export(make("slim", BRANCHES), "adv", tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="encoder.pt.*'attacked'.*adv, clean"):
        load_encoder(tmp_path / "encoder.pt", "attacked")


@pytest.mark.parametrize("spoil, says", [
    (lambda state: state.pop("layer2.0.bn1.weight"), "layer2.0.bn1.weight is missing"),
    (lambda state: state.update(head=torch.zeros(2)), "head is unexpected"),
    (lambda state: state.update({"conv1.weight": torch.zeros(9, 3)}), r"conv1.weight is \(9, 3\), expected")])
def test_a_missing_unexpected_or_misshaped_tensor_is_named(tmp_path, spoil, says):
    path = tmp_path / "encoder.pt"
    export(make("slim", BRANCHES), "adv", path)
    saved = torch.load(path, weights_only=True)
    spoil(saved["state"])
    torch.save(saved, path)
    with pytest.raises(ValueError, match=f"encoder.pt: {says}"):
        load_encoder(path)
