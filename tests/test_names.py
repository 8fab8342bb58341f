"""The grammar of attack names: what a name means, its one spelling, and every place that looks a name up."""
import json

import pytest
import torch

import eval as command
from common import encoders
from evaluation import attacks, names, sets, table
from tests.scripts import tiny_npz


@pytest.mark.parametrize("name, row", [
    ("pgd50-8/0.8", ("linf", 8 / 255, 0.8 / 255, 50)), ("pgd20-3", ("linf", 3 / 255, 0.75 / 255, 20)),
    ("pgd7-2.5", ("linf", 2.5 / 255, 0.625 / 255, 7)), ("pgd20-1-l2", ("l2", 1.0, 0.2, 20)),
    ("pgd20-1-l2/.05", ("l2", 1.0, 0.05, 20)), ("pgd9-6-l1", ("l1", 6.0, 0.6, 9)),
    ("pgd9-6-l1/2", ("l1", 6.0, 2.0, 9)), ("pgd1-8/8", ("linf", 8 / 255, 8 / 255, 1)),
    ("aa-2", ("linf", 2 / 255, "standard")), ("aa-0.25-l2", ("l2", 0.25, "standard"))])
def test_a_name_means_what_the_grammar_says(name, row):
    found = names.attack_named(name)
    assert type(found) is (attacks.AutoAttack if name.startswith("aa") else attacks.Attack)
    assert [v if isinstance(v, float) else (v,) for v in found] == [
        pytest.approx(v, rel=1e-12) if isinstance(v, float) else (v,) for v in row]


def test_names_of_the_table_keep_their_rows_and_grammar_names_among_them_agree():
    for name, row in attacks.ATTACKS.items():
        assert names.attack_named(name) is row and names.canonical(name) == name
        if names.PGD.fullmatch(name) or names.AUTOATTACK.fullmatch(name):
            with pytest.MonkeyPatch.context() as m:
                m.setattr(names, "ATTACKS", {})
                assert names.same(names.attack_named(name), row), name
    assert names.attack_named("clean") is None and names.canonical("clean") == "clean"


@pytest.mark.parametrize("spelling, name", [
    ("pgd20-8", "pgd20"), ("pgd020-8.0/2", "pgd20"), ("pgd20-4/1", "pgd20-4"), ("pgd20-0.5-l2", "pgd20-l2"),
    ("pgd20-.50-l2/0.1", "pgd20-l2"), ("pgd20-12-l1", "pgd20-l1"), ("pgd50-.5-l2/.05", "pgd50-l2-amoc"),
    ("pgd20-8/.7905", "pgd20-amoc"), ("aa-8", "aa"), ("aa-04", "aa-4"), ("aa-0.50-l2", "aa-l2"),
    ("pgd50-08.00/2.0", "pgd50-8"), ("pgd50-8/00.80", "pgd50-8/0.8"), ("pgd50-100/10", "pgd50-100/10"),
    ("pgd20-1-l2/.2", "pgd20-1-l2"), ("pgd50-12-l1", "pgd50-12-l1"), ("aa-1.50", "aa-1.5"), ("aa-1.0-l2", "aa-1-l2"),
    ("pgd20-0.0000012", "pgd20-0.0000012")])
def test_two_spellings_of_one_attack_are_one_name(spelling, name):
    assert names.canonical(spelling) == name == names.canonical(name)
    assert names.same(names.attack_named(spelling), names.attack_named(name))
    assert command.parser().parse_args(["x", "--attacks", spelling]).attacks == [name]


@pytest.mark.parametrize("name", [
    "pgd", "pgd20-", "pgd-8", "pgd0-8", "pgd100000-8", "pgd20-8-l3", "pgd20-8/", "pgd20-8/-1", "pgd20--8", "pgd20-8e1",
    "pgd20-8.", "pgd2.5-8", "pgd20-8/2-l2", "aa-1-l1", "aa-", "aa-8/2", "AA", "pgd20-nan", " pgd20", "pgd20-٤",
    "pgd20-8\n", "", "curves"])
def test_what_is_no_name_gets_one_line_with_the_grammar_and_an_example(name):
    with pytest.raises(ValueError) as raised:
        command.main(["x", "--attacks", name])
    text = str(raised.value)
    assert text.startswith("--attacks ") and "no attack" in text and "aa-<eps>[-l2]" in text
    assert "pgd<steps>-<eps>[-l2|-l1][/<step>] as pgd50-8/0.8" in text
    assert text.strip() == text and len(text.replace(name, "").splitlines()) == 1


@pytest.mark.parametrize("name, words", [
    ("pgd20-0", "eps must be above 0 and at most 255 in 1/255"), ("pgd20-256", "at most 255 in 1/255"),
    ("pgd20-8/0.0", "step must be above 0"), ("pgd20-8/256", "step must"), ("aa-0-l2", "eps must be above 0"),
    ("aa-255.5", "at most 255"), ("pgd20-1000001-l2", "at most 1e"), ("pgd20-" + "9" * 400 + "-l1", "at most 1e")])
def test_radii_that_make_no_sense_are_named_when_flags_are_read(name, words):
    with pytest.raises(ValueError, match=f"^--attacks {name}: its .*{words}"):
        command.parser().parse_args(["x", "--attacks", name])


def test_curves_are_the_radii_and_steps_they_say():
    l2 = [names.attack_named(name) for name in names.CURVES["curve-l2"]]
    assert l2[0] is None and [row.eps for row in l2[1:]] == [0.25, 0.5, 1, 2, 4]
    assert all(row.norm == "l2" and row.steps == 20 and row.step_size == pytest.approx(row.eps / 5) for row in l2[1:])
    steps = [names.attack_named(name) for name in names.CURVES["curve-steps"]]
    assert [row.steps for row in steps] == [1, 5, 10, 20, 50, 100]
    for row in steps:
        assert row.norm == "linf" and (row.eps, row.step_size) == pytest.approx((8 / 255, 2 / 255))
    assert names.CURVES["curve"] == attacks.CURVE
    for curve in names.CURVES.values():
        assert [names.canonical(name) for name in curve] == list(curve)
    args = command.parser().parse_args(["x", "--attacks", "curve-steps", "pgd20-8", "curve-l2"])
    asked = command.flags.asked(args)[1]
    assert asked == [*names.CURVES["curve-steps"], *names.CURVES["curve-l2"]]


def test_the_sanity_of_autoattack_at_a_large_radius_stays_within_the_range_of_pixels(monkeypatch):
    asked = []

    def judge(net, images, attack, *rest, **named):
        asked.append(attack.eps)
        return {"accuracy": 0}

    monkeypatch.setattr(attacks, "judge", judge)
    attacks.sanity(None, None, names.attack_named("aa-64"), 0, 5, 500, 0)
    assert asked[2] == 1
    attacks.sanity(None, None, names.attack_named("aa-2-l2"), 0, 5, 500, 0)
    assert asked[5] == 16


def test_the_command_takes_grammar_names_everywhere(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt")
    words = [str(tmp_path / "encoder.pt"), "--data", tiny_npz(tmp_path / "tiny.npz"), "--device", "cpu", "--epochs", "1",
             "--milestones", "--batch-size", "16", "--test-limit", "4", "--attacks"]
    asked = ["pgd2-6.50/3", "pgd3-1-l2", "pgd20-8"]
    kept = ["pgd2-6.5/3", "pgd3-1-l2", "pgd20"]
    command.main([*words, *asked, "--pictures", "--restarts", "2"])
    lines = table.lines(tmp_path / "eval.jsonl")
    assert [list(line["results"]) for line in lines] == [[name] for name in kept]
    for line, name in zip(lines, kept):
        found = line["results"][name]
        assert found["settings"] == json.loads(json.dumps(names.attack_named(name)._asdict()))
        assert found["restarts"] == 2
    assert list(tmp_path.glob("attacked-amoc-slf-*-pgd2-6.5_3.png"))
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    name = "amoc-slf epochs=1 milestones=none batch-size=16"
    assert f"| {name} pgd2-6.5/3 | {name} pgd3-1-l2 | {name} pgd20 |" in rows[0]
    monkeypatch.setattr(sets, "measure", None)
    command.main([*words, *kept, "--restarts", "2"])
    command.main([*words, *asked, "--restarts", "2", "--kept"])
    again = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert again == [*rows, *rows]
    with pytest.raises(ValueError, match="--source, --attacks aa-2: AutoAttack stops just beyond"):
        command.main([*words, "aa-2", "--source", "x.pt"])
