"""The published figures, as data: what is printed of them, and where they stand beside ours."""
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from evaluation import published, table
from tests.scripts import ROOT


def shown(script, **flags):
    """The text beside a row of these flags."""
    fitting = (text for *kind, text in published.PUBLISHED if table.fits(script, flags, *kind))
    return next(fitting, "")


def test_the_page_is_what_the_command_prints():
    command = [sys.executable, "-m", "evaluation.published"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout == (ROOT / "docs" / "published.md").read_text()
    assert printed.stdout.count("\n## ") >= 9


def test_all_rows_of_a_table_have_its_columns():
    for block in re.findall(r"(?:^\|.*\n)+", published.markdown() + "\n", re.M):
        head, rule, *rows = [line.strip("|").count("|") for line in block.splitlines()]
        assert rows and {head, rule, *rows} == {head}


def test_a_figure_is_in_percent_and_a_stronger_attack_leaves_less():
    settings = [row[:4] for row in published.ROWS]
    assert len(set(settings)) == len(settings) >= 60
    for row in published.ROWS:
        assert {row.slf, row.alf, row.aff} != {published.NOTHING}
        for values in (row.slf, row.alf, row.aff):
            known = [value for value in values if value is not None]
            assert len(values) == 3 and known == sorted(known, reverse=True), row
            assert all(0 <= value <= 100 for value in known)


@pytest.mark.parametrize("method, source, data, epochs, want", [
    ("ACA", published.AMOC, "CIFAR-10", 1000,
     "86.09 / 46.09 / – | 83.98 / 51.35 / – | 83.13 / 53.05 / 47.85"),
    ("adversarial training", published.AMOC, "CIFAR-10", None, " |  | 84.91 / 45.12 / 41.33"),
    ("TRADES", published.AMOC, "CIFAR-10", None, " |  | 80.68 / 51.64 / 47.30"),
    ("AdvCL", published.FAN, "CIFAR-10", 1000,
     "80.85 / 50.45 / 42.57 | 79.39 / 52.01 / – | 83.62 / 52.77 / 49.77"),
    ("ACL", published.FAN, "CIFAR-100 to STL-10", 1000, "45.91 / 26.32 / 21.75 |  | 57.16 / 32.41 / 28.68"),
    ("RoCL", published.ROBUSTSSL, "CIFAR-10", 1000,
     "77.90 / – / 26.12 | 75.62 / – / 29.69 | 78.51 / – / 45.02")])
def test_rows_known_by_heart(method, source, data, epochs, want):
    row = published.find(method, source, data, epochs)
    assert " | ".join(published.three(values) for values in (row.slf, row.alf, row.aff)) == want
    assert f"| {method} | {source} | {data} | {epochs or '–'} | {want} |" in published.markdown()


def test_what_stands_beside_a_row_is_of_its_data_and_says_its_setting():
    assert shown("acl", data="cifar10", variant="ds") == (
        "RobustSSL benchmark, CIFAR-10, ResNet-18, 1000 epochs: SLF 78.22 / – / 39.17, ALF 75.53 / – / 40.60")
    assert "CIFAR-100, ResNet-18" in shown("acl", data="data/cifar100.npz", variant="ds")
    assert shown("acl", data="stl10", variant="ds") == shown("acl", data="cifar10", variant="a2a") == ""
    assert shown("amoc", data="cifar100", variant="ACC") == ""
    assert "77.73 / 48.89" in shown("advcl", data="cifar10")
    for flags in (dict(teacher="t.pt"), dict(labels="l.npz"), dict(teacher=None, labels="l.npz")):
        assert "ImageNet's labels: SLF 82.36" in shown("advcl", data="cifar10", **flags)
    assert shown("amoc", data="cifar10", variant="CAC").endswith("SLF 78.46 / 0.00 / –, ALF 12.39 / 8.69 / –")
    assert shown("amoc", data="cifar10", variant="CCA") == ""
    for script, flags in (("rocl", {}), ("acl", {"variant": "ds"}), ("advcl", {}), ("amoc", {"variant": "ACC"})):
        assert shown(script, data="cifar10", **flags) == shown(script, data="cifar10", norm="linf", **flags) != ""
        assert shown(script, data="cifar10", norm="l2", **flags) == ""
    assert shown("rocl", data="cifar10", asymmetry=0.2) == ""


def test_the_table_of_reproducing_has_these_figures():
    page = (ROOT / "docs" / "reproducing.md").read_text()
    found = re.findall(r"\d\d\.\d\d / (?:[\d.]+|–) / (?:[\d.]+|–)", page)
    known = {published.three(values) for row in published.ROWS for values in (row.slf, row.alf, row.aff)}
    assert len(found) > 15 and set(found) <= known


@pytest.mark.parametrize("script, flags, group", [
    ("adco", {"eps": 0.0}, "bank"), ("adco", {"eps": 8.0}, "pixels and bank"),
    ("caco", {"positives": "adversarial"}, "bank"),  # a log of before it had --eps
    ("caco", {"eps": 8.0}, "pixels and bank"), ("adco", {"eps": 8.0, "epochs": 0}, "not pretrained"),
    ("amoc", {"variant": "ACC", "eps": 8.0}, "pixels"), ("amoc", {"variant": "CCC", "eps": 8.0}, "nothing adversarial")])
def test_a_row_stands_under_what_is_adversarial_in_it(script, flags, group):
    run = SimpleNamespace(script=script, flags=flags)
    assert table.group_of(run, published.GROUPS) == group
