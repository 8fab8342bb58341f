"""Convolution and BatchNorm as one convolution (`conv_norm`): against the two, one after the other."""
import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adco
from common import encoders, resnet
from common.pgd import eval_mode, pgd, pixels_only
from common.resnet import BranchNorm, branch, conv_norm

NETWORKS = {
    "bottlenecks": lambda: encoders.make("resnet50"),
    "blocks": lambda: encoders.make("slim", ("clean", "adv")),
    "preactivation": lambda: resnet.PreActResNet("p", 4, (1, 2), (4, 8), False, (), (0.5,) * 3, (0.25,) * 3),
    "preactivated bottlenecks": lambda: resnet.PreActResNet("p", 4, (1, 2), (2, 4), True, (), (0.5,) * 3, (0.25,) * 3),
    "groups": lambda: adco.network("slim")[0],
}


def network(name):
    """In float64 and eval mode, with weights, biases and running statistics that are all different."""
    net = NETWORKS[name]()
    if name == "bottlenecks":  # two stages are enough
        net.layer3, net.layer4 = nn.Identity(), nn.Identity()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t, least in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5), (m.running_var, 0.5)):
                    t.copy_(least + torch.rand(t.shape, generator=g))
    return net.double().eval()


def pictures(n=2):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def everything(net, x):
    """The features, and the gradients of a function of them in the images and in all weights."""
    x = x.clone().requires_grad_()
    z = net(x)
    weights = [w for w in net.parameters() if w.requires_grad]
    return [z, *torch.autograd.grad((z.sin()).sum(), [x, *weights], allow_unused=True)]


def test_a_network_may_be_given_twice():
    net = resnet.Block(3, 4, 1, False, nn.BatchNorm2d)
    with eval_mode(net, net.bn1, net):
        assert not net.training and not net.bn1.training
    assert net.training and net.bn1.training and "kept" not in net.bn1.__dict__


def of_pixels(net, x):
    x = x.clone().requires_grad_()
    z = net(x)
    return z, *torch.autograd.grad(z.sin().sum(), x)


def in_two_steps(conv, norm, x):
    return norm(conv(x))


@contextlib.contextmanager
def folds():
    """The list of convolutions that are folded inside, one entry each time."""
    found, fold = [], resnet._fold
    try:
        resnet._fold = lambda conv, norm, dtype: found.append(conv) or fold(conv, norm, dtype)
        yield found
    finally:
        resnet._fold = fold


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_of_the_images_are_those_of_two_steps(name, monkeypatch):
    net, x = network(name), pictures()
    with folds() as folded, eval_mode(net), pixels_only():
        found = of_pixels(net, x)
    assert len(folded) >= 3
    monkeypatch.setattr(resnet, "conv_norm", in_two_steps)
    for a, b in zip(found, of_pixels(net, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_in_eval_mode_have_their_gradients(name, monkeypatch):
    net, x = network(name), pictures()
    with eval_mode(net):
        with torch.no_grad():
            net(x), net(x)
        found = [everything(net, x) for _ in range(2)][1]
    monkeypatch.setattr(resnet, "conv_norm", in_two_steps)
    for a, b in zip(found, everything(net, x), strict=True):
        assert (a is None) == (b is None)  # None: the weights of the other branch
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert sum(g is not None for g in found) > 10


@pytest.mark.parametrize("frozen", [True, False])
def test_an_attack_by_backward_may_have_many_steps(frozen, monkeypatch):
    """As other people write it: not by pgd, and with gradients of the weights that nobody asked for. Frozen
    weights are folded then, others are not."""
    net, x = network("blocks"), pictures()
    net.requires_grad_(not frozen)

    def steps():
        x_adv = x.clone()
        for _ in range(3):
            x_adv = x_adv.detach().requires_grad_()
            net(x_adv).sin().sum().backward()
            x_adv = x_adv + 0.1 * x_adv.grad
        return x_adv

    with folds() as folded, eval_mode(net):
        found = steps()
    assert bool(folded) == frozen
    monkeypatch.setattr(resnet, "conv_norm", in_two_steps)
    torch.testing.assert_close(found, steps(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "no running statistics"])
def test_statistics_of_the_batch_are_not_folded(mode):
    net = network("blocks")
    for m in net.modules() if mode != "train" else ():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = m.running_var = None
    with folds() as folded:
        with eval_mode(net), torch.no_grad():
            if mode == "train":
                net.train()
            net(pictures()), net(pictures())
    assert folded == []


def test_outside_of_an_attack_weights_that_are_seen_once_are_not_folded():
    net = network("blocks")
    with folds() as folded, eval_mode(net), torch.no_grad():
        net(pictures())
        assert folded == []
        net(pictures()), net(pictures())
    assert len(folded) == len(set(map(id, folded))) > 3


def test_outside_of_eval_mode_nothing_is_folded():
    net = network("blocks")
    with folds() as folded, pixels_only(), torch.no_grad():
        net(pictures()), net(pictures())
    assert folded == []


@pytest.mark.parametrize("affine, bias", [(False, False), (True, True), (False, True)])
def test_a_norm_without_weights_and_a_convolution_with_a_bias(affine, bias):
    conv, norm = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias).double(), nn.BatchNorm2d(4, affine=affine).double()
    norm(torch.randn(9, 4, 2, 2, dtype=torch.float64))
    norm.eval()
    with folds() as folded, eval_mode(norm), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(
                conv_norm(conv, norm, pictures()), norm(conv(pictures())), rtol=1e-12, atol=1e-12)
    assert len(folded) == 1


def test_another_kind_of_norm_is_called_as_it_is():
    conv, norm = nn.Conv2d(3, 4, 1).double(), nn.GroupNorm(2, 4).double().eval()

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    for other in (norm, nn.Identity(), Own(4).double().eval()):
        with folds() as folded, eval_mode(other), torch.no_grad():
            for _ in range(2):
                assert torch.equal(conv_norm(conv, other, pictures()), other(conv(pictures())))
        assert folded == []


@pytest.mark.parametrize("overridden", ["forward", "_conv_forward"])
def test_a_convolution_that_does_more_with_its_weights_is_called_as_it_is(overridden):
    class Standardised(nn.Conv2d):
        pass

    def standardised(self, x, *_):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    setattr(Standardised, overridden, standardised)
    conv, norm = Standardised(3, 4, 1, bias=False).double(), nn.BatchNorm2d(4).double().eval()
    with folds() as folded, eval_mode(norm), torch.no_grad():
        for _ in range(3):
            assert torch.equal(conv_norm(conv, norm, pictures()), norm(conv(pictures())))
    assert folded == []


@pytest.mark.parametrize("where", ["conv", "branches", "branch"])
def test_hooks_are_called_and_see_what_the_module_makes(where):
    conv, norm = nn.Conv2d(3, 4, 1).double(), BranchNorm(4, ("clean", "adv")).double().eval()
    seen = []
    module = {"conv": conv, "branches": norm, "branch": norm.branches["clean"]}[where]
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with folds() as folded, eval_mode(norm), torch.no_grad():
        for _ in range(3):
            out = conv_norm(conv, norm, pictures())
    assert folded == [] and len(seen) == 3 and torch.equal(seen[0], conv(pictures()) if where == "conv" else out)


# Within eval_mode -------------------------------------------------------------------------------------------
def test_an_attack_folds_each_pair_once_whatever_its_steps():
    net, x = network("blocks"), pictures()
    with folds() as folded, eval_mode(net), branch(net, "adv"):
        pgd(lambda x: net(x).sin().sum(), x, 0.1, 0.05, 4)
        norms = sum(isinstance(m, BranchNorm) for m in net.modules())
    assert len(folded) == norms and len(set(map(id, folded))) == norms


def change_weights(net):
    torch.optim.SGD(net.parameters(), 0.1).step()


def change_statistics(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean += 0.1
            m.running_var *= 2


def load(net):
    net.load_state_dict({key: v + 0.1 if v.is_floating_point() else v for key, v in net.state_dict().items()})


def replace(net):
    """By another tensor, which was written to as often as the old one."""
    old = net.conv1.weight
    new = nn.Parameter(old.detach() + 0.1)
    with torch.no_grad():
        while new._version < old._version:
            new.add_(0)
    assert new._version == old._version
    net.conv1.weight = new


@pytest.mark.parametrize("change", [change_weights, change_statistics, load, replace])
def test_what_changes_within_the_block_is_seen(change, monkeypatch):
    net, x = network("blocks"), pictures()
    net(x).square().sum().backward()
    with folds() as folded, eval_mode(net), pixels_only():
        before = [net(x) for _ in range(2)][1]
        assert folded
        change(net)
        after = [net(x) for _ in range(2)]
    monkeypatch.setattr(resnet, "conv_norm", in_two_steps)
    for z in after:
        torch.testing.assert_close(z, net(x), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(z, before, rtol=1e-3)


def test_weights_that_change_at_every_step_do_not_pile_up():
    net, x = network("blocks"), pictures()
    net(x).square().sum().backward()
    with eval_mode(net), pixels_only():
        for _ in range(9):
            net(x), net(x)
            change_weights(net)
        assert all(len(m.kept) <= 4 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_branches_are_folded_one_by_one(monkeypatch):
    net, x = network("blocks"), pictures()
    found = {}
    with eval_mode(net), pixels_only():
        for name in ("clean", "adv", "clean", "adv"):
            with branch(net, name):
                found[name] = net(x)
    monkeypatch.setattr(resnet, "conv_norm", in_two_steps)
    for name, z in found.items():
        with branch(net, name):
            torch.testing.assert_close(z, net(x), rtol=1e-10, atol=1e-12)


def test_nothing_is_kept_after_the_block_and_an_inner_one_ends_alone():
    net, x = network("blocks"), pictures()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with folds() as folded, torch.no_grad(), eval_mode(net):
        net(x), net(x)
        with eval_mode(net):
            net(x), net(x)
        twice = len(folded)
        net(x)
        assert len(folded) == twice > 0
        assert all("kept" in m.__dict__ for m in norms)
        torch.testing.assert_close(copy.deepcopy(net)(x), net(x), rtol=1e-12, atol=1e-12)
    assert not any("kept" in m.__dict__ for m in norms)
    with pytest.raises(RuntimeError, match="wrong"), eval_mode(net):
        raise RuntimeError("wrong")
    assert not any("kept" in m.__dict__ for m in norms)


# Autocast ---------------------------------------------------------------------------------------------------
class Casts(TorchDispatchMode):
    """Counts what is cast to bfloat16, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.shapes.append(tuple(out.shape))
        return out


def test_an_attack_casts_each_weight_once_whatever_the_number_of_its_steps():
    net = nn.Sequential(encoders.make("slim"), nn.Linear(128, 5)).eval()
    weights = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            z = net(x)
        assert (z.float() @ z.float().T).dtype == torch.float32  # it is off again
        return z.float().square().sum()

    with Casts() as casts, eval_mode(net):
        pgd(loss, pictures().float(), 0.1, 0.05, 5)
    found = [shape for shape in casts.shapes if shape in weights]
    assert sorted(found) == sorted(weights)
    x = pictures().float()
    loss(x).backward()  # after the attack weights have a gradient as ever
    assert all(w.grad is not None for w in net.parameters())


@pytest.mark.parametrize("enabled", [True, False])
def test_an_attack_leaves_autocast_as_the_caller_has_it(enabled):
    dtypes = []
    a = torch.ones(2, 2)

    def loss(x):
        dtypes.append((a @ a).dtype)
        return x.sum()

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        pgd(loss, pictures().float(), 0.1, 0.05, 2)
    assert dtypes == [torch.bfloat16 if enabled else torch.float32] * 2


def test_under_autocast_and_without_it_each_has_weights_of_its_own_type():
    net, x = network("blocks").float(), pictures().float()
    with eval_mode(net), pixels_only():
        net(x)
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            net(x)
            low = net(x)
        again = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            double = copy.deepcopy(net).double()(x.double())
    with eval_mode(net), pixels_only():  # the other way round
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(x), low)
        assert torch.equal(net(x), exact)
    assert exact.dtype == again.dtype == torch.float32 and torch.equal(exact, again)
    assert 0 < (low - exact).norm() / exact.norm() < 0.03
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), exact, rtol=1e-4, atol=1e-5)


# Other people's hooks ---------------------------------------------------------------------------------------
def test_backward_hooks_on_any_module_work_in_and_out_of_an_attack():
    """Nothing is done in place to what a hooked module has made: autograd would refuse it."""
    net, x = network("blocks"), pictures()
    seen = []
    handles = [m.register_full_backward_hook(lambda *_: seen.append(1)) for m in net.modules() if not list(m.children())]
    net(x.clone().requires_grad_()).square().sum().backward()
    outside = len(seen)
    with eval_mode(net):
        pgd(lambda x: net(x).square().sum(), x, 0.1, 0.05, 2)
    assert outside > 5 and len(seen) == 3 * outside
    for handle in handles:
        handle.remove()


def test_a_forward_hook_keeps_what_the_norm_has_made():
    net, x = network("blocks"), pictures()
    kept = []
    net.bn1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    net(x)
    assert kept[0].min() < 0  # not what ReLU makes of it
