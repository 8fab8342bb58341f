"""What flags mean that some of the scripts have: the same in each of them."""
import importlib
import re

import pytest

from tests.scripts import SCRIPTS, TINY, scripts_with, tiny_npz


def parser(script):
    return importlib.import_module(script).parser()


WITH_WARMUP = scripts_with("warmup")
WARMING_UP = [script for script in WITH_WARMUP if parser(script).get_default("warmup")]
WITH_A_RADIUS = [script for script in scripts_with("norm") if script in scripts_with("eps")]  # AdPE's is in patches
OPTIMIZERS = []  # (script, one that is not its default)
for name in scripts_with("optimizer"):
    for action in parser(name)._actions:
        if action.dest == "optimizer":
            OPTIMIZERS += [(name, choice) for choice in action.choices if choice != action.default]


def test_no_flag_is_without_a_script():
    for scripts in (WITH_WARMUP, WARMING_UP, WITH_A_RADIUS, OPTIMIZERS):
        assert len(scripts) > 5


@pytest.mark.parametrize("script", WITH_WARMUP)
def test_a_warmup_as_long_as_the_run_is_refused(script, tmp_path):
    files = ["--data", tiny_npz(tmp_path / "tiny.npz"), "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--warmup 2: must be less than --epochs 2"):
        importlib.import_module(script).main([*TINY, *SCRIPTS[script], *files, "--warmup", "2"])


@pytest.mark.parametrize("script", WARMING_UP)
def test_a_default_warmup_is_shortened_to_fit_a_short_run_and_says_so(script, capsys):
    default = parser(script).get_default("warmup")
    assert parser(script).parse_args(["--epochs", str(default + 1)]).warmup == default
    assert capsys.readouterr().out == ""
    for epochs in (default, 5, 1):
        assert parser(script).parse_args(["--epochs", str(epochs)]).warmup == epochs // 10
        assert f"--warmup is {epochs // 10}, not {default}" in capsys.readouterr().out
    for by_hand in (["--warmup", str(default)], [f"--warmup={default}"]):
        assert parser(script).parse_args(["--epochs", "5", *by_hand]).warmup == default
    assert parser(script).parse_args(["--epochs", "0"]).warmup == default


@pytest.mark.parametrize("script", WITH_A_RADIUS)
def test_in_l2_the_radius_of_linf_is_not_taken(script):
    """8/255, a usual radius in linf, hardly moves an image in l2: an attack would be there in name only."""
    for flags in (["--norm", "l2"], ["--norm=l2", "--steps", "3"]):
        with pytest.raises(ValueError, match="--norm l2: give its radius by --eps.*128"):
            parser(script).parse_args(flags)
    for radius in (["--eps", "128"], ["--eps=128"], ["--eps", "0"]):
        assert parser(script).parse_args(["--norm", "l2", *radius]).eps == float(radius[-1].split("=")[-1])
    assert parser(script).parse_args(["--norm", "linf"]).eps == parser(script).get_default("eps")


@pytest.mark.parametrize("script, name", OPTIMIZERS)
def test_another_optimizer_does_not_take_the_rate_of_the_default_one(script, name):
    """A rate for LARS, such as BYORL's 2, is a thousand times AdamW's."""
    usual = parser(script).get_default("optimizer")
    rate = parser(script).get_default("lr")
    assert parser(script).parse_args(["--optimizer", usual]).lr == rate
    example = ", for example 1e-3" if name == "adamw" else ""
    says = f"--optimizer {name}: give its rate by --lr{example}; the default, {rate:g}, is for {usual}"
    for words in (["--optimizer", name], [f"--optimizer={name}", "--weight-decay", "0.05"]):
        with pytest.raises(ValueError, match=re.escape(says)):
            parser(script).parse_args(words)
    for given in (["--lr", "0.01"], ["--lr=0.01"]):
        assert parser(script).parse_args(["--optimizer", name, *given]).lr == 0.01
