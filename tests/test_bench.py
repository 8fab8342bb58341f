import importlib
import re

import pytest
import torch
from torch import nn

from common.pgd import pgd
from tests import bench


def test_every_section_runs_and_its_rivals_agree(capsys, one_block):
    """Values are compared before anything is timed; here only that comparison matters."""
    bench.main(["--quick", "--device", "cpu", "attack", "autoattack", "bank", "step"])
    out = capsys.readouterr().out
    assert all(f"step: {script}" in out for script in bench.SCRIPTS)
    tables = ("attack: slim", *bench.ATTACKS, "autoattack: apgd-ce", "bank: InfoNCE")
    assert all(name in out for name in tables)


CLAIMS = {  # of a script's variant: what its docstring says of it, with the forward passes in brackets, and more of them
    ("amoc", "CCC"): (r"MoCo's costs (\d+)\.", 0), ("amoc", "ACC"): (r"an ACC step costs (\d+) forward passes", 0),
    ("amoc", "CAC"): (r"CAC (\d+) instead of", 0), ("amoc", "AAC"): (r"AAC (\d+) instead of", 0),
    ("rocl", "with"): (r"a step costs (\d+) forward passes", 0),
    ("acl", "ds"): (r"a DS step costs (\d+) forward passes", 0), ("acl", "s2s"): (r"SimCLR's costs (\d+)\.", 0),
    ("clae", "--eps 4"): (r"A step costs (\d+) forward passes", 0),
    ("advcl", "with"): (r"a step costs (\d+) forward passes", 0),
    ("advcl", "without pseudo-labels"): (r"without pseudo-labels (\d+)", 0),
    ("adco", "bank"): (r"A step costs (\d+) forward passes, as MoCo's does", 0),
    ("adco", "hybrid"): (r"the hybrid's costs (\d+) with 5 attack steps", 0),
    ("adco", "symmetric"): (r"With --symmetric a step costs (\d+),", 0),
    ("caco", "cooperative"): (r"A step costs (\d+) forward passes \(a whole", 0),
    ("byorl", "BYOL"): (r"BYOL's costs (\d+)\.", 0), ("byorl", "K = 5"): (r"a step costs (\d+) forward passes", 0),
    ("adios", "SimCLR"): (r"SimCLR's costs (\d+)\.", 0),
    ("adios", "ADIOS"): (r"a step of simclr with N = 4 costs (\d+) forward passes", 0),
    ("adios", "ADIOS-s"): (r"for the classifier\); with --single (\d+)\.", 0),
    ("rotnet", "--eps 0"): (r"RotNet's costs (\d+),", 0), ("rotnet", "--steps 2"): (r"(\d+) with K = 2", 0),
    ("rotnet", "--target labels --loss trades"): (r"TRADES' 2 K \+ (\d+)\.", 2 * 2),
    ("pretext", "--tasks rotation"): (r"A step on one task then costs 2 K \+ (\d+),", 2 * 2),
    ("pretext", "--tasks rotation --eps 0"): (r"and (\d+) with --eps 0", 0),
    ("adpe", "--adversary pgd"): (r"pgd with K steps costs 2 K \+ (\d+)\.", 2 * 2),
    ("adv_mae", "--eps 0"): (r"where MAE's costs (\d+):", 0),
    ("adv_mae", "--steps 2"): (r"a step costs 2 K \+ (\d+) forward passes", 2 * 2),
    ("adv_mae", "--steps 2 --clean-weight 0.5"): (r"and 2 K \+ (\d+) with --clean-weight", 2 * 2),
}


@pytest.mark.parametrize("script, variant", CLAIMS)
def test_a_step_costs_the_forward_passes_that_its_docstring_says(script, variant):
    pattern, more = CLAIMS[script, variant]
    text = " ".join(importlib.import_module(script).__doc__.split())
    (number,) = re.findall(pattern, text)
    assert bench.cost(*bench.count_passes(script, variant, batch=4)) == int(number) + more


def test_passes_are_counted_by_whither_their_gradient_goes():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.rand(4, 3)
    with bench.Passes(nn.Linear) as found:  # each layer counts, and each has its weight
        net(x).sum().backward()
        pgd(lambda x: net(x).sum(), x, 0.1, 0.01, 3)
        with torch.no_grad():
            net(x[:2])
        net(x[:3]).sum().backward()
    assert found.forwards == 2 * (4 + 3 * 4 + 2 + 3)
    assert (found.to_weights, found.to_pixels) == (2 * (4 + 3), 2 * 3 * 4)
    net(x)
    assert found.forwards == 42, "its hooks are gone"


def test_the_table_of_passes_has_the_banks_beside_moco(capsys, monkeypatch):
    monkeypatch.setattr(bench, "SCRIPTS", {name: bench.SCRIPTS[name][:1] for name in ("amoc", "rocl", "adco", "caco")})
    bench.main(["--device", "cpu", "passes"])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and "." not in line]
    assert [row for row in rows if row in bench.SCRIPTS] == ["amoc", "adco", "caco", "rocl"]
