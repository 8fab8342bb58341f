"""Encoders of one's own (--arch my_file.py:make), and the pre-activation and wide ResNets."""
import contextlib
import hashlib
import sys
import warnings

import pytest
import torch
from torch import nn

import amoc
import rocl
from common import encoders, resnet
from common import own as own_networks
from common.resnet import BranchNorm, branch
from evaluation import finetune, results, sets
from tests.scripts import ROOT, TINY, tiny_npz

OWN = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def rows():
    return nn.Conv2d(3, 8, 3)

def number():
    return 7

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 7))

def odd():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 50 * 50, 7))

def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    # As in a process of its own: the folders of other tests may hold modules of the same names.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if "pytest-of" not in folder])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def test_an_own_network_is_an_encoder_of_normalised_images(own):
    encoder = encoders.make(f"{own}:make", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = torch.rand(4, 3, 32, 32)
    normalised = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    encoder.eval()
    assert encoder.dim == 8
    torch.testing.assert_close(encoder(x), encoder.net(normalised))


def test_a_network_for_images_of_another_side_is_tried_at_it(own):
    encoder = encoders.make(f"{own}:large")
    assert encoder.dim == 7 and encoder(torch.rand(2, 3, 96, 96)).shape == (2, 7)
    with pytest.raises(ValueError, match="odd: takes no images of the sides tried; of side 32: "):
        encoders.make(f"{own}:odd")


def test_rocl_starts_resnets_anew_and_leaves_weights_of_ones_own_and_of_a_vit(own):
    for arch, kept in ((f"{own}:make", True), ("vit_slim", True), ("slim", False)):
        torch.manual_seed(0)
        as_made = encoders.make(arch, mean=(0, 0, 0), std=(1, 1, 1)).state_dict()
        torch.manual_seed(0)
        found = rocl.network(arch)[0].state_dict()
        same = [torch.equal(value, found[name]) for name, value in as_made.items() if value.ndim == 4]
        assert same and all(s is kept for s in same), arch


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
    ("rows", r"must map images .* of 2 images it made \(2, 8, 30, 30\)"), ("number", "returned a int"),
    ("none", "has no function 'none'")])
def test_what_is_no_encoder_is_named(own, name, words):
    with pytest.raises(ValueError, match=words):
        encoders.make(f"{own}:{name}")


def test_a_file_that_is_not_there_is_named(own):
    with pytest.raises(ValueError, match="there is no file nowhere.py"):
        encoders.make("nowhere.py:make")
    assert encoders.make(f"{own}:bare").dim == 5


def test_without_batchnorm_clean_and_attacked_images_share_the_network_as_in_a_vit(own):
    encoder = encoders.make(f"{own}:bare", ("clean", "adv"))
    x = torch.rand(2, 3, 32, 32)
    with branch(encoder, "clean"):
        clean = encoder(x)
    with branch(encoder, "adv"):
        assert torch.equal(encoder(x), clean)
    assert encoders.branch_of(encoder, "adv") is None
    with pytest.raises(ValueError, match="no BatchNorm"):
        own_networks.branch_norms(encoder.net, ("clean", "adv"))


TROUBLE = """
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2)
        self.bn = nn.BatchNorm2d(6)

    def features(self, x):
        return self.bn(self.conv(x)).relu()

    def forward(self, x):
        return self.features(x).mean((2, 3))

class Listed(Net):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(6, 6, 1)]

    def features(self, x):
        return self.layers[0](super().features(x))

class Unregistered(Net):
    def __init__(self):
        super().__init__()
        self.scale = torch.rand(6, 1, 1)

    def features(self, x):
        return self.scale * super().features(x)

class Moving(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(6), persistent=False)

    def forward(self, x):
        h = super().forward(x)
        if self.training:
            self.seen = 0.5 * self.seen + 0.5 * h.detach().mean(0)
        return h - self.seen

class OfTheBatch(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 6))

    def forward(self, x):
        h = super().forward(x)
        self.last = h.detach()
        return h

class Masked(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((6,), -torch.inf))

class Forgets(Net):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()

    def state_dict(self, *args, **kwargs):
        kept = super().state_dict(*args, **kwargs)
        return {key: value for key, value in kept.items() if "conv" not in key}

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)

class TwoInTraining(Net):
    def forward(self, x):
        h = super().forward(x)
        return (h, h) if self.training else h

class LargerInTraining(Net):
    def forward(self, x):
        h = super().forward(x)
        if self.training:
            F.max_pool2d(x, 80)
        return h

class FailsInTraining(Net):
    def forward(self, x):
        h = super().forward(x)
        return h @ torch.ones(7, 2) if self.training else h

class ReadsWeight(Net):
    def features(self, x):
        return super().features(x) * self.bn.weight.mean()

class AlwaysDrops(Net):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)

class Centred(Net):
    def forward(self, x):
        h = super().forward(x)
        return h - h.mean(0)

class Detached(Net):
    def forward(self, x):
        return super().forward(x.detach())

class Good(Net):
    def __init__(self):
        super().__init__()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1))
        self.lazy = nn.LazyLinear(5)
        self.register_buffer("mask", torch.full((5,), -torch.inf), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        h = self.lazy(F.dropout(self.spectral(self.features(x)).mean((2, 3)), 0.5, self.training))
        return h.where(self.mask < 0, self.mask)

class ListedAndSeeded(Listed):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
"""
NOT_EXPORTED = "the exported encoder would not be the trained one"


@pytest.fixture
def trouble(tmp_path):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    return str(tmp_path / "trouble.py")


@pytest.mark.parametrize("name, words", [
    ("Listed", r"weight of shape \(6(, 6, 1, 1)?,?\) is none of its parameters, .* not in a plain list"),
    ("ListedAndSeeded", "is none of its parameters"),
    ("Unregistered", f"{NOT_EXPORTED}: its state_dict does not hold all .* in register_buffer"),
    ("Moving", f"{NOT_EXPORTED}: its state_dict does not hold all"),
    ("Forgets", f"{NOT_EXPORTED}: its state_dict does not hold all"),
    ("OfTheBatch", rf"{NOT_EXPORTED}: last is \(3, 6\), expected .* persistent=False"),
    ("Masked", f"{NOT_EXPORTED}: mask is not finite; .* or is infinite"),
    ("TwoInTraining", r"to features \(B, D\); in train mode of 3 images it made a tuple"),
    ("FailsInTraining", r"fails in train mode in line 87 on images of side 32 \(RuntimeError: mat1 and mat2"),
    ("AlwaysDrops", "the same images have other features at each pass; .* self.training"),
    ("Centred", "the features of an image depend on the other images of its batch"),
    ("Detached", "no gradient reaches the images")])
@pytest.mark.parametrize("branches", [(), ("clean", "adv")], ids=["plain", "branches"])
def test_what_could_not_be_trained_attacked_or_exported_is_refused_at_once(name, words, branches, trouble):
    with pytest.raises(ValueError, match=f"trouble.py:{name}: .*{words}"):
        encoders.make(f"{trouble}:{name}", branches)


def test_a_network_may_need_larger_images_in_training(trouble):
    assert encoders.make(f"{trouble}:LargerInTraining", ("clean", "adv")).dim == 6


def test_what_was_tried_in_this_process_is_not_tried_again(trouble, monkeypatch):
    calls = []
    monkeypatch.setattr(own_networks, "try_own", lambda net, *about: calls.append(about))
    for branches in ((), (), ("clean", "adv"), ("clean", "adv")):
        encoders.make(f"{trouble}:Good", branches)
    assert [branches for _, branches, _ in calls] == [(), ("clean", "adv")]


def test_a_batchnorm_that_is_read_cannot_have_branches(trouble):
    assert encoders.make(f"{trouble}:ReadsWeight").dim == 6
    with pytest.raises(ValueError, match="no attribute 'weight'.*BranchNorms here, which can only be called"):
        encoders.make(f"{trouble}:ReadsWeight", ("clean", "adv"))


def test_a_function_that_gives_one_network_again_and_again_is_refused(own, tmp_path):
    (tmp_path / "shared_net.py").write_text("from mine import make\n\nNET = make()\n")
    (tmp_path / "again.py").write_text("import shared_net\n\ndef make():\n    return shared_net.NET\n")
    with pytest.raises(ValueError, match="returns one and the same network at each call"):
        encoders.make(f"{tmp_path / 'again.py'}:make")


@pytest.mark.parametrize("branches", [(), ("clean", "adv")], ids=["plain", "branches"])
def test_trying_a_network_leaves_it_and_the_random_numbers_alone(branches, trouble, tmp_path):
    """And what passes gives the same features once it was trained, exported and loaded."""
    torch.manual_seed(3)
    encoder = encoders.make(f"{trouble}:Good", branches)
    after = torch.rand(2)
    torch.manual_seed(3)
    net = own_networks.from_file(f"{trouble}:Good")
    own_networks.feature_length(net, "this test")
    assert torch.equal(torch.rand(2), after)
    fresh = encoders.one_branch(encoder.net.state_dict(), "adv")
    assert fresh.keys() == net.state_dict().keys()
    assert all(torch.equal(value, fresh[key]) for key, value in net.state_dict().items())
    x = torch.rand(4, 3, 32, 32)
    with branch(encoder, "adv") if branches else contextlib.nullcontext():
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        encoder.train()(x).square().sum().backward()
        optimizer.step()
        encoders.export(encoder, tmp_path / "encoder.pt", "adv" if branches else None)
        torch.testing.assert_close(encoders.load_encoder(tmp_path / "encoder.pt")(x), encoder.eval()(x))


@pytest.mark.parametrize("script, flags", [(amoc, ["--bank-size", "48"]), (rocl, [])], ids=["amoc", "rocl"])
@pytest.mark.parametrize("function, dim", [("make", 8), ("bare", 5)])
def test_scripts_train_it(script, flags, function, dim, own, tmp_path):
    flags = [*TINY, *flags, "--steps", "1", "--warmup", "0", "--epochs", "1", "--arch", f"{own}:{function}"]
    script.main([*flags, "--data", tiny_npz(tmp_path / "a.npz", n=32), "--out", str(tmp_path / "run")])
    assert encoders.load_encoder(tmp_path / "run" / "encoder.pt").dim == dim


def plain_preact_block(block, x):
    """He et al. 2016: BatchNorm, ReLU, convolution, twice; a changed shape is projected after the first ReLU."""
    activated = torch.relu(block.bn1(x))
    y = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
    return y + (x if block.downsample is None else block.downsample(activated))


@pytest.mark.parametrize("arch, parameters, dim", [("wrn34_10", 46_160_474 - 6_410, 640),
                                                   ("preact_resnet18", 11_167_040, 512),
                                                   ("preact_resnet50", 23_516_874 - 20_490, 2048)])
def test_pre_activation_networks_have_the_published_size(arch, parameters, dim):
    """With their classifiers of ten classes, WideResNet-34-10 has 46,160,474 parameters and Chen et al.'s ResNet-50
    23,516,874."""
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


def plain_preact_bottleneck(block, x):
    activated = torch.relu(block.bn1(x))
    y = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
    y = block.conv3(torch.relu(block.bn3(y)))
    return y + (x if block.downsample is None else block.downsample[1](block.downsample[0](activated)))


def test_chens_resnet_50_is_its_stem_and_its_blocks():
    """A BatchNorm and a ReLU after the first convolution, and none after the last block (Chen et al. 2020)."""
    torch.manual_seed(0)
    encoder = encoders.make("preact_resnet50").eval()
    for m in encoder.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2)
            m.running_var.uniform_(0.5, 2)
    assert sum(w.numel() for name, w in encoder.named_parameters() if not name.startswith("layer4")) == 8_533_696
    x = torch.rand(2, 3, 16, 16)
    y = torch.relu(encoder.bn1(encoder.conv1((x - 0.5) / 0.25)))
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        if stage is encoder.layer4:
            torch.testing.assert_close(encoder.trunk(x), y)
            assert y.shape == (2, encoder.trunk_dim, 4, 4)
        for block in stage:
            y = plain_preact_bottleneck(block, y)
    torch.testing.assert_close(encoder(x), y.mean((2, 3)))


@pytest.mark.parametrize("arch", ["slim", "resnet50", "preact_slim", "preact_resnet50", "wrn34_10"])
def test_trunk_and_last_stage_are_the_encoder(arch):
    torch.manual_seed(0)
    encoder = encoders.make(arch, ("clean", "adv") if arch == "slim" else ()).eval()
    x = torch.rand(2, 3, 16, 16)
    y = encoder.trunk(x)
    assert y.shape[1] == encoder.trunk_dim
    for module in encoders.last_stage(encoder, "this test"):
        y = module(y)
    torch.testing.assert_close(y.mean((2, 3)), encoder(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="this test needs a ResNet of this project, and vit_slim is none"):
        encoders.last_stage(encoders.make("vit_slim"), "this test")


def test_a_renewed_last_stage_is_random_again_and_the_trunk_stays():
    encoder = encoders.make("preact_slim", ("clean", "adv"))
    with torch.no_grad():
        for w in encoder.state_dict().values():
            w.copy_(torch.full_like(w, 2))
    encoders.renew_last_stage(encoder, "this test")
    for name, w in encoder.state_dict().items():
        if not name.startswith(("layer4.", "bn.")):
            assert (w == 2).all(), name
        elif name.endswith("running_mean") or name.endswith(".bias"):
            assert (w == 0).all(), name
        elif name.endswith("running_var") or ".branches." in name and name.endswith("weight"):
            assert (w == 1).all(), name
        elif "conv" in name:
            wanted = (2 / (w.shape[0] * w[0, 0].numel())) ** 0.5
            assert w.std().item() == pytest.approx(wanted, rel=0.1), name


@pytest.mark.parametrize("block", [resnet.PreActBlock(4, 4, 1, nn.BatchNorm2d), resnet.PreActBottleneck(4, 1, 1, nn.BatchNorm2d)])
def test_a_block_is_skipped_in_training_alone(block):
    block.drop = 1.0
    x = torch.rand(3, 4, 5, 5)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("arch, blocks", [("preact_resnet18", 8), ("preact_resnet50", 16)])
def test_depth_is_counted_and_dropped_in_pre_activation_networks_too(arch, blocks):
    encoder = encoders.make(arch)
    assert len(encoders.stages(encoder)) == 1 + blocks
    encoders.drop_path(encoder, 0.7)
    drops = [m.drop for m in encoder.modules() if hasattr(m, "drop")]
    assert drops[0] == 0 and drops[-1] == pytest.approx(0.7) and drops == sorted(drops)


def test_every_convolution_starts_as_kaiming_says():
    torch.manual_seed(0)
    conv = encoders.make("preact_resnet18").layer4[1].conv2
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


def test_the_digest_of_its_code_has_all_that_the_file_imports_from_its_folder(tmp_path):
    own_file = tmp_path / "one.py"
    source = f"{own_file}:make"
    own_file.write_text("import torch\nfrom layers import ACT\n\ndef make():\n    from blocks.deep import D\n    return D\n")
    (tmp_path / "layers.py").write_text("ACT = 1\n")
    (tmp_path / "unused.py").write_text("A = 1\n")
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "__init__.py").write_text("")
    (tmp_path / "blocks" / "deep.py").write_text("from .deeper import D\n")
    (tmp_path / "blocks" / "deeper.py").write_text("D = 1\n")
    before = own_networks.code_of(source)
    (tmp_path / "unused.py").write_text("A = 2\n")
    assert own_networks.code_of(source) == before
    for file in ("one.py", "layers.py", "blocks/__init__.py", "blocks/deep.py", "blocks/deeper.py"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text + "# other\n")
        assert own_networks.code_of(source) != before, file
        (tmp_path / file).write_text(text)
    assert own_networks.code_of(source) == before
    # Folders without __init__.py, and one that only has the name of a module that is imported from elsewhere.
    (tmp_path / "plain" / "deep").mkdir(parents=True)
    (tmp_path / "numpy").mkdir()
    (tmp_path / "plain" / "deep" / "er.py").write_text("D = 1\n")
    own_file.write_text("import numpy\nfrom plain.deep.er import D\n")
    before = own_networks.code_of(source)
    (tmp_path / "plain" / "deep" / "er.py").write_text("D = 2\n")
    assert own_networks.code_of(source) != before
    (tmp_path / "common").symlink_to(ROOT / "common")
    own_file.write_text("x = 1\nfrom common import resnet\n")
    assert own_networks.code_of(source) == hashlib.sha256(own_file.read_bytes()).hexdigest()[:16]
    own_file.write_text("x = 1\n")  # alone it is the file's, as in logs and results of earlier versions
    assert own_networks.code_of(source) == hashlib.sha256(b"x = 1\n").hexdigest()[:16]


@pytest.mark.parametrize("text, words", [
    ("def make(:\n", "one.py, line 1: invalid syntax"),
    ("from broken import A\ndef make():\n    pass\n", "broken.py, line 1: invalid syntax"),
    ("import json\ndef make():\n    pass\n", "imports json, and another module of this name, .*, came first; rename yours"),
    ("import absent_thing\ndef make():\n    pass\n", "cannot be imported in line 1: No module named 'absent_thing'$"),
    ("from common.blocks import A\ndef make():\n    pass\n",
     "cannot be imported in line 1: .*; common is the name of a module of this project, so rename yours"),
    ("def make(width):\n    pass\n", r"make\(\) must work without arguments: missing a required argument: 'width'"),
    ("from torch import nn\nmake = nn.Flatten()\n", "make is a network; it must be a function that returns a new one"),
    ("from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)).requires_grad_(False)\n",
     "all of its weights are frozen, and nothing would be trained"),
])
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, text, words):
    (tmp_path / "one.py").write_text(text)
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("")
    (tmp_path / "common" / "blocks.py").write_text("A = 1\n")
    (tmp_path / "broken.py").write_text("A = = 1\n")
    (tmp_path / "json.py").write_text("A = 1\n")
    source = f"{tmp_path / 'one.py'}:make"
    with pytest.raises(ValueError, match=words):
        encoders.make(source)
    if "frozen" not in words:
        with pytest.raises(ValueError, match=words):  # as the scripts, whose images come first
            own_networks.check_side(source, 32)


def test_weights_of_other_code_are_loaded_with_a_warning(own, tmp_path):
    encoders.export(encoders.make(f"{own}:make"), tmp_path / "encoder.pt", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoders.load_encoder(tmp_path / "encoder.pt")
    with open(own, "a") as f:
        f.write("\n# other code\n")
    with pytest.warns(UserWarning, match="the code of .*mine.py:make has changed since these weights were saved"):
        encoders.load_encoder(tmp_path / "encoder.pt")


def test_a_classifier_is_another_one_once_the_code_of_its_network_has_changed(own, tmp_path):
    """Results of transferred attacks and of several classifiers together are known by this digest."""
    net = finetune.Classifier(encoders.make(f"{own}:make"), 3)
    net.encoder.branch = None
    results.save_classifier(net, tmp_path / "classifier.pt")
    first = sets.source_of(tmp_path / "classifier.pt", "cpu").digest
    assert sets.source_of(tmp_path / "classifier.pt", "cpu").digest == first
    with open(own, "a") as f:
        f.write("\n# other code\n")
    with pytest.warns(UserWarning, match="the code of .*mine.py:make has changed"):
        assert sets.source_of(tmp_path / "classifier.pt", "cpu").digest != first


def test_a_network_for_another_side_is_refused_before_the_first_step(own, tmp_path):
    npz = tiny_npz(tmp_path / "x.npz")
    words = ["--data", npz, *TINY, "--arch", f"{own}:large", "--epochs", "1", "--warmup", "0", "--steps", "1",
             "--bank-size", "48", "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="large: takes no images .*of side 32: .*; it takes those of side 96: --image-size 96$"):
        amoc.main(words)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    before = torch.get_rng_state()
    own_networks.check_side(f"{own}:large", 96)
    assert torch.equal(torch.get_rng_state(), before)
