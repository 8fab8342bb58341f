"""The methods' functions as other programs call them: with what the scripts themselves never give."""
import copy

import pytest
import torch
from torch import nn

import acl
import adco
import adios
import adpe
import adv_mae
import advcl
import caco
import clae
import hardneg
import rocl
import rotnet
import unified
from common.pgd import frozen_stats
from tests.scripts import named

SETTINGS = dict(temperature=0.5, norm="linf", eps=0.1, step_size=0.05, steps=2)


def images(n=4, seed=0):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_kinds_of_views_may_be_a_list_and_unknown_ones_are_refused():
    net = acl.network("slim", "ds")
    x1, x2 = images(), images(seed=1)
    by_list = acl.attack(net, x1, x2, None, ["adv", "adv"], **SETTINGS)
    by_tuple = acl.attack(net, x1, x2, None, ("adv", "adv"), **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(by_list, by_tuple)) and (by_list[0] - x1).abs().max() > 0.05
    with pytest.raises(ValueError, match="kinds .*adv2.*: each must be clean or adv"):
        acl.attack(net, x1, x2, None, ("adv2", "adv"), **SETTINGS)


def test_words_that_choose_nothing_are_refused():
    net = rocl.network("slim")
    x1, x2 = images(), images(seed=1)
    with pytest.raises(KeyError, match="originl"):
        rocl.attack(net, x1, x2, None, attack_to="originl", **SETTINGS)
    settings = named(rocl.train_step, rocl, regularize_to="originl", **SETTINGS)
    with pytest.raises(KeyError, match="originl"):
        rocl.train_step(net, None, x1, x2, None, **settings)
    how = {name: value for name, value in SETTINGS.items() if name != "temperature"}
    with pytest.raises(ValueError, match="loss_name 'TRADES': choose ce or trades"):
        rotnet.attack(nn.Flatten(), x1, torch.zeros(4, dtype=torch.long), None, loss_name="TRADES", **how)


def test_a_rule_for_negatives_that_is_none_is_refused_and_only_mochi_mixes():
    q, k, bank = (nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 16))
    how = dict(temperature=0.2, shift=0.1, alpha=1.0, ifm_only=False, beta=1.0, tau=0.1)
    with pytest.raises(ValueError, match="negatives 'HCL': choose one of plain, ifm, hcl, debiased, mochi"):
        hardneg.objective(q, k, bank, None, negatives="HCL", **how)
    with pytest.raises(ValueError, match="one image: it has no negatives"):
        hardneg.hcl_loss(q[:1], k[:1], None, 0.2, 1.0, 0.1)
    assert torch.equal(hardneg.hardest(q.double(), bank, 3), hardneg.hardest(q.double(), bank.double(), 3))


@pytest.mark.parametrize("negatives", ["plain", "ifm", "hcl", "debiased"])
def test_numbers_to_mix_by_are_of_mochi_alone(negatives):
    x1, x2 = images(), images(seed=1)
    numbers = torch.rand(4, 6, 3), torch.rand(4, 3, 2)
    found = []
    for given in (None, numbers):
        torch.manual_seed(0)
        net = hardneg.network("slim")
        bank = hardneg.Bank(16, 128)
        settings = named(hardneg.train_step, hardneg, "--negatives", negatives, hardest_rows=8)
        settings |= hardneg.loss_settings(hardneg.parser().parse_args(["--negatives", negatives]))
        opt = torch.optim.SGD(net.parameters(), 0.0)
        found.append(hardneg.train_step(net, copy.deepcopy(net).requires_grad_(False), opt, bank, x1, x2,
                                        torch.arange(4), given, **settings))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_an_adversary_of_positions_that_is_none_is_refused():
    with pytest.raises(ValueError, match="adversary 'PGD': choose persistent or pgd"):
        adpe.train_step(None, None, None, None, None, None, mask_ratio=0.5, adversary="PGD", norm="linf", radius=1.0,
                        step_size=0.1, steps=1)


@pytest.mark.parametrize("draw", [adv_mae.random_masking, unified.random_masking, adpe.random_mask])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_mask_of_nothing_or_of_all_is_refused_for_its_loss_would_be_nan(draw, ratio):
    with pytest.raises(ValueError, match=f"mask ratio {ratio}: leaves"):
        draw(torch.rand(2, 16), ratio)


def test_each_query_has_a_key_and_each_start_a_view():
    net = adco.network("slim")
    bank = adco.make_bank(16, 128)
    x = images()
    settings = named(adco.train_step, adco, "--eps", "8", "--steps", "1")
    opt = torch.optim.SGD(net.parameters(), 0.0)
    order = torch.arange(len(x))
    with pytest.raises(ValueError, match="3 queries and 2 keys: must be as many, or a multiple"):
        adco.train_step(net, copy.deepcopy(net), opt, bank, [x] * 3, [x] * 2, order, None, **settings)
    with pytest.raises(ValueError, match="zip"):
        adco.train_step(net, copy.deepcopy(net), opt, bank, [x] * 2, [x] * 2, order, [torch.zeros_like(x)], **settings)


def test_keys_hold_no_graph(monkeypatch):
    net = caco.network("slim")
    target = copy.deepcopy(net)  # which asks for gradients
    seen = []
    embed = caco.embed

    def watched(network, x):
        z = embed(network, x)
        seen.append((network is target, z.requires_grad))
        return z

    monkeypatch.setattr(caco, "embed", watched)
    opt = torch.optim.SGD(net.parameters(), 0.0)
    caco.train_step(net, target, opt, caco.make_bank(16, 128), [images(), images(seed=1)], None,
                    **named(caco.train_step, caco))
    assert {(True, False), (False, True)} == set(seen)


def test_labels_of_more_or_fewer_clusterings_are_refused():
    net = advcl.network("slim", [2, 3])
    for columns in (1, 3):
        with pytest.raises(ValueError, match="zip"):
            advcl.cluster_loss(net, images(), torch.zeros(4, columns, dtype=torch.long), [2, 3])
    with pytest.raises(ValueError, match="one at least must be attacked"):
        advcl.choose(["x1", "x2"], images(), images(), images(), 8)


@pytest.mark.parametrize("norm", [adco.GroupedNorm, hardneg.GroupedNorm])
def test_normalising_by_groups_leaves_statistics_alone_where_they_are_frozen_and_takes_one_image(norm):
    layer = norm(4)
    before = layer.running_mean.clone()
    with frozen_stats(layer):
        frozen = layer(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(layer.running_mean, before)
    moving = layer(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(frozen, moving) and not torch.equal(layer.running_mean, before)
    plain = nn.BatchNorm2d(4)
    one = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(norm(4)(one), plain(one))


def test_random_directions_are_as_pgd_a_constant_within_the_box():
    x = images().requires_grad_()
    assert not clae.attack(None, x, torch.randn(x.shape), eps=0.1, temperature=0.5, random=True).requires_grad
    with pytest.raises(ValueError, match="must lie in"):
        clae.attack(None, 3 * x, torch.randn(x.shape), eps=0.1, temperature=0.5, random=True)


def test_a_frozen_weight_of_the_masker_stays():
    args = ["--masks", "2", "--mask-width", "8"]
    net = adios.network("slim", "simclr", 16)
    masker = adios.UNet(2, 8, 16)
    frozen = next(masker.parameters())
    frozen.requires_grad_(False)
    before = frozen.clone()
    opts = [torch.optim.SGD([w for w in part.parameters() if w.requires_grad], 0.1) for part in (net, masker)]
    losses = adios.train_step(net, None, masker, *opts, images(), images(seed=1), None, torch.rand(4, 2),
                              **named(adios.train_step, adios, *args, tau=1.0))
    assert torch.equal(frozen, before)
    assert losses["loss_mask"].isfinite()
