"""python -m tests.versus: this checkout against itself."""
import re

import pytest

from tests import versus
from tests.scripts import ROOT


def test_a_checkout_is_about_as_fast_as_itself(capsys):
    """The table has a row for the variant; nothing is asked of the ratio but that it is one."""
    versus.main([str(ROOT), "amoc:CCC", "--batch", "8", "--bank", "64", "--turns", "1"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| amoc, CCC")]
    there, here, ratio = (float(v) for v in re.findall(r"[\d.]+", row)[:3])
    assert there > 0 and here > 0 and ratio > 0


@pytest.mark.parametrize("words, says", [
    (["nowhere"], "nowhere: no checkout of this project"), ([str(ROOT), "moco"], "moco: choose from amoc"),
    ([str(ROOT), "amoc:ACE"], "amoc:ACE: choose from CCC, ACC")])
def test_what_it_does_not_know_is_named(words, says, capsys):
    with pytest.raises(SystemExit):
        versus.main(words)
    assert says in capsys.readouterr().err
