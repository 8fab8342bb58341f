from tests import bench


def test_every_section_runs_and_its_rivals_agree(capsys):
    """Values are compared before anything is timed; here only that comparison matters."""
    bench.main(["--quick", "--device", "cpu", "attack", "bank", "step"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("attack: ACC", "bank: InfoNCE", "step: amoc", "step: byorl", "step: adios"))
