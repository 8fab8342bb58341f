"""Encoders of one's own (--arch my_file.py:make), and the pre-activation and wide ResNets."""
import pytest
import torch
from torch import nn

import amoc
import rocl
from common import encoders
from common.resnet import BranchNorm, branch
from tests.scripts import TINY, tiny_npz

OWN = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def rows():
    return nn.Conv2d(3, 8, 3)

def number():
    return 7

def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def test_an_own_network_is_an_encoder_of_normalised_images(own):
    encoder = encoders.make(f"{own}:make", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = torch.rand(4, 3, 32, 32)
    normalised = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    encoder.eval()
    assert encoder.dim == 8
    torch.testing.assert_close(encoder(x), encoder.net(normalised))


def test_its_batchnorms_get_branches_and_the_chosen_one_is_exported(own, tmp_path):
    encoder = encoders.make(f"{own}:make", ("clean", "adv"))
    assert [type(m) for m in encoder.modules()].count(BranchNorm) == 1
    with branch(encoder, "adv"):
        encoder(3 * torch.rand(16, 3, 32, 32))  # moves the running statistics of this branch alone
    encoders.export(encoder, tmp_path / "encoder.pt", "adv", image_size=32)
    x = torch.rand(4, 3, 32, 32)
    encoder.eval()
    for name in ("clean", "adv"):
        loaded = encoders.load_encoder(tmp_path / "encoder.pt", name)
        with branch(encoder, name):
            torch.testing.assert_close(loaded(x), encoder(x), rtol=0, atol=0)
    both = encoders.load_encoder(tmp_path / "encoder.pt", all_branches=True)
    with branch(both, "clean"), branch(encoder, "clean"):
        torch.testing.assert_close(both(x), encoder(x), rtol=0, atol=0)


@pytest.mark.parametrize("name, words", [
    ("rows", r"must map images .* of two images it made \(2, 8, 30, 30\)"), ("number", "returned a int"),
    ("none", "has no function 'none'")])
def test_what_is_no_encoder_is_named(own, name, words):
    with pytest.raises(ValueError, match=words):
        encoders.make(f"{own}:{name}")


def test_a_file_that_is_not_there_and_a_network_without_batchnorm_are_named(own):
    with pytest.raises(ValueError, match="there is no file nowhere.py"):
        encoders.make("nowhere.py:make")
    with pytest.raises(ValueError, match="no BatchNorm"):
        encoders.make(f"{own}:bare", ("clean", "adv"))
    assert encoders.make(f"{own}:bare").dim == 5


@pytest.mark.parametrize("script, flags", [(amoc, ["--bank-size", "48"]), (rocl, [])], ids=["amoc", "rocl"])
def test_scripts_train_it(script, flags, own, tmp_path):
    flags = [*TINY, *flags, "--steps", "1", "--warmup", "0", "--epochs", "1", "--arch", f"{own}:make"]
    script.main([*flags, "--data", tiny_npz(tmp_path / "a.npz", n=32), "--out", str(tmp_path / "run")])
    assert encoders.load_encoder(tmp_path / "run" / "encoder.pt").dim == 8


def plain_preact_block(block, x):
    """He et al. 2016: BatchNorm, ReLU, convolution, twice; a changed shape is projected after the first ReLU."""
    activated = torch.relu(block.bn1(x))
    y = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
    return y + (x if block.downsample is None else block.downsample(activated))


@pytest.mark.parametrize("arch, parameters, dim", [("wrn34_10", 46_160_474 - 6_410, 640),
                                                   ("preact_resnet18", 11_167_040, 512)])
def test_pre_activation_networks_have_the_published_size(arch, parameters, dim):
    """WideResNet-34-10 with its classifier of ten classes has 46,160,474 parameters."""
    encoder = encoders.make(arch)
    assert sum(w.numel() for w in encoder.parameters()) == parameters and encoder.dim == dim


def test_a_pre_activation_network_is_its_blocks_one_after_the_other(tmp_path):
    torch.manual_seed(0)
    encoder = encoders.make("preact_resnet18", ("clean", "adv"))
    encoder.eval()
    x = torch.rand(2, 3, 16, 16)
    y = encoder.conv1((x - 0.5) / 0.25)
    sides = []
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for block in stage:
            y = plain_preact_block(block, y)
        sides.append(y.shape[-1])
    assert sides == [16, 8, 4, 2]
    want = torch.relu(encoder.bn(y)).mean((2, 3))
    torch.testing.assert_close(encoder(x), want)
    encoders.export(encoder, tmp_path / "encoder.pt", "adv", image_size=16)
    torch.testing.assert_close(encoders.load_encoder(tmp_path / "encoder.pt")(x), want)
    assert isinstance(encoder.layer1[0].bn1, BranchNorm) and isinstance(encoder.bn, BranchNorm)


def test_depth_is_counted_and_dropped_in_pre_activation_networks_too():
    encoder = encoders.make("preact_resnet18")
    assert len(encoders.stages(encoder)) == 1 + 8
    encoders.drop_path(encoder, 0.7)
    drops = [m.drop for m in encoder.modules() if hasattr(m, "drop")]
    assert drops[0] == 0 and drops[-1] == pytest.approx(0.7) and drops == sorted(drops)


def test_every_convolution_starts_as_kaiming_says():
    torch.manual_seed(0)
    conv = encoders.make("preact_resnet18").layer4[1].conv2
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
