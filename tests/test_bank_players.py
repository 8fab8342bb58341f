"""What adco.py and caco.py, whose bank is a player, have in common: the bank and its fill."""
import copy

import pytest
import torch

import adco
import caco
from common import augment, data, run, shapes
from tests.scripts import named_by

pytestmark = pytest.mark.parametrize("script", [adco, caco])


def setting(script, *flags):
    """Networks, optimizer, a bank made as a user would, images in batches of 16 and 12, flags."""
    args = script.parser().parse_args(["--batch-size", "16", *flags])
    torch.manual_seed(0)
    net = script.network("slim")
    target = copy.deepcopy(net).requires_grad_(False)
    opt = torch.optim.SGD(net.parameters(), 0.01)
    x, y, _ = shapes.shapes(28, seed=0)
    return net, target, opt, script.make_bank(args.bank_size, 128), data.Images(x, y, 10), args


def test_a_bank_made_for_a_step_is_all_that_the_step_needs(script):
    net, target, opt, bank, images, args = setting(script, "--bank-size", "8")
    assert bank.state_dict().keys() == {"rows", "velocity", "_extra_state"}
    assert bank.velocity.shape == (8, 128) and not bank.velocity.any()
    x = augment.to_float(images.x[:16])
    rest = ([x], [x], torch.arange(16), None) if script is adco else ([x, x], None)
    settings = named_by(script.train_step, script, args)
    script.train_step(net, target, opt, bank, *rest, **settings)
    assert bank.velocity.norm(dim=1).min() > 0


@pytest.mark.parametrize("size", [8, 28, 60])
def test_a_filled_bank_has_no_key_of_an_older_network(script, size, monkeypatch):
    """Also where the last batch of an epoch is short: 60 rows take five batches, of 16 and 12 in turns."""
    net, target, opt, bank, images, args = setting(script, "--bank-size", str(size), "--fill-steps", "3")
    pushed, push = [], bank.push
    monkeypatch.setattr(bank, "push", lambda keys: pushed.append(keys) or push(keys))
    script.fill(net, target, opt, bank, images, 32, args, run.Env(torch.device("cpu"), 0, 1))
    keys = torch.cat(pushed[3:])
    new = (bank.rows[:, None] == keys).all(2)
    assert new.any(1).all()
    assert len(keys) - len(pushed[-1]) < size  # and no batch more than that takes
