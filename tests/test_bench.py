from tests import bench


def test_every_section_runs_and_its_rivals_agree(capsys, one_block):
    """Values are compared before anything is timed; here only that comparison matters."""
    bench.main(["--quick", "--device", "cpu", "attack", "autoattack", "bank", "step"])
    out = capsys.readouterr().out
    assert all(f"step: {script}" in out for script in bench.SCRIPTS)
    tables = ("attack: slim", *bench.ATTACKS, "autoattack: apgd-ce", "bank: InfoNCE")
    assert all(name in out for name in tables)
