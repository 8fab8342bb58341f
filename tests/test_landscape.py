import pytest
import torch
import torch.nn.functional as F

from common import data, encoders
from common.pgd import eval_mode, pgd
from evaluation import landscape
from evaluation.attacks import Attack
from evaluation.finetune import Classifier

ATTACK = Attack("linf", 8 / 255, 2 / 255, 2)


def classifier(arch="slim"):
    torch.manual_seed(0)
    encoder = encoders.make(arch)
    with torch.no_grad():
        encoder(torch.rand(16, 3, 32, 32))  # statistics
    return Classifier(encoder, 4, batch_norm=True)


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    return data.Images(torch.randint(0, 256, (12, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(12) % 4, 4)


@pytest.mark.parametrize("arch", ["slim", "vit_slim"])
def test_filters_of_a_direction_have_the_networks_norms_and_biases_and_norms_are_zero(arch):
    net = classifier(arch)
    generator = torch.Generator().manual_seed(0)
    first = landscape.direction(net, generator)
    second = landscape.direction(net, generator)
    moving = 0
    norms = {name for name, m in net.named_modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.LayerNorm))}
    for name, w in net.named_parameters():
        d = first[name]
        assert d.shape == w.shape and not d.requires_grad
        if name.endswith("bias") or name.rpartition(".")[0] in norms:
            assert not d.any(), name
            continue
        for of_network, of_first, of_second in zip(w, d, second[name]):
            torch.testing.assert_close(of_first.norm(), of_network.norm(), rtol=1e-5, atol=1e-7)
            if of_first.numel() > 10:
                assert F.cosine_similarity(of_first.flatten(), of_second.flatten(), dim=0).abs() < 0.9
                moving += 1
    assert moving > 30
    again = landscape.direction(net, torch.Generator().manual_seed(0))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_directions_are_gaussian_and_independent_of_the_weights_signs():
    net = torch.nn.Linear(4000, 3)
    d = landscape.direction(net, torch.Generator().manual_seed(0))["weight"]
    z = d / d.std(1, keepdim=True)
    assert abs(z.pow(4).mean() - 3) < 0.3 and z.mean().abs() < 0.05
    assert F.cosine_similarity(d, net.weight, dim=1).abs().max() < 0.06


def test_the_middle_is_the_networks_own_adversarial_loss_and_the_network_stays(images):
    net = classifier().train()
    net.encoder.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    at = landscape.places(1.0, 3)
    losses = landscape.landscape(net, images, ATTACK, at)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and not net.encoder.training and all(w.grad is None for w in net.parameters())
    x = images.x / 255
    with eval_mode(net):
        x_adv = pgd(lambda x: F.cross_entropy(net(x), images.y), x, *ATTACK[1:], generator=torch.Generator().manual_seed(0))
        own = F.cross_entropy(net(x_adv), images.y)
        clean = F.cross_entropy(net(x), images.y)
    torch.testing.assert_close(losses[1, 1], own.detach(), rtol=1e-4, atol=1e-5)
    assert own > clean + 1e-3
    assert losses.isfinite().all() and (losses != losses[1, 1]).sum() == 8


def test_rows_are_of_the_second_direction_and_columns_of_the_first(images):
    net = classifier()
    at = landscape.places(0.5, 3)
    losses = landscape.landscape(net, images, None, at, seed=3)
    generator = torch.Generator().manual_seed(3)
    first = landscape.direction(net, generator)
    second = landscape.direction(net, generator)
    moved = classifier()
    with torch.no_grad():
        for name, w in moved.named_parameters():
            w += 0.5 * first[name] - 0.5 * second[name]
        want = F.cross_entropy(moved.eval()(images.x / 255), images.y)
    torch.testing.assert_close(losses[0, 2], want, rtol=1e-4, atol=1e-5)


def test_weights_are_put_back_also_after_an_exception():
    net = classifier()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    d = landscape.direction(net, torch.Generator().manual_seed(0))
    with pytest.raises(KeyError), landscape.moved(net, d, d, 1.0, -0.5):
        assert not torch.equal(net.head.weight, before["head.weight"])
        assert torch.equal(net.head.bias, before["head.bias"])
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_mean_is_over_images_whatever_their_batches(images):
    net = classifier()
    many = data.Images(images.x.repeat(43, 1, 1, 1)[:509], images.y.repeat(43)[:509], 4)  # batches of 500 and 9
    with torch.no_grad():
        want = F.cross_entropy(net.eval()(many.x / 255), many.y)
    assert landscape.loss_of(net, many, None) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("span, count", [(1.0, 11), (0.3, 7), (2.5, 99)])
def test_places_are_even_and_their_middle_is_zero(span, count):
    at = landscape.places(span, count)
    assert len(at) == count and at[count // 2] == 0 and at[0] == -span and at[-1] == span
    torch.testing.assert_close(torch.tensor(at).diff(), torch.full((count - 1,), 2 * span / (count - 1)))
