"""evaluation/ranks.py: our ranks of the methods against the published ones."""
import itertools
import json
import math

import pytest

from evaluation import ranks
from evaluation.published import COMPARED


def slow_ranks(values):
    """One at a time: the mean place of all that are equal."""
    in_order = sorted(values, reverse=True)
    found = []
    for value in values:
        places = [place for place, other in enumerate(in_order, 1) if other == value]
        found.append(sum(places) / len(places))
    return found


def slow_spearman(a, b):
    """Pearson's correlation of the ranks, by sums."""
    a, b = slow_ranks(a), slow_ranks(b)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


@pytest.mark.parametrize("a, b", [
    ([3.0, 1.0, 2.0], [30.0, 20.0, 10.0]), ([5.0, 5.0, 1.0, 0.5, 5.0], [1.0, 2.0, 2.0, 0.0, 7.0]),
    ([91.25, 82.01, 80.85, 79.9], [47.0, 42.8, 41.8, 43.7])])
def test_the_correlation_equals_slow_sums_ties_included(a, b):
    assert list(ranks.ranks(a)) == slow_ranks(a)
    assert ranks.spearman(a, b) == pytest.approx(slow_spearman(a, b), rel=1e-12)


def test_without_ties_it_is_the_formula_of_squared_differences():
    a, b = [9.0, 7.0, 5.0, 3.0, 1.0], [8.0, 9.0, 1.0, 4.0, 3.0]
    differences = [x - y for x, y in zip(slow_ranks(a), slow_ranks(b))]
    assert ranks.spearman(a, b) == pytest.approx(1 - 6 * sum(d * d for d in differences) / (5 * 24), rel=1e-12)
    assert math.isnan(ranks.spearman([1.0, 1.0], [2.0, 3.0]))  # nothing to rank


def test_chance_is_counted_over_all_orders_of_a_few_and_drawn_for_more():
    a, b = [4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 3.0, 1.0]
    orders = list(itertools.permutations(b))
    wanted = sum(slow_spearman(a, order) >= slow_spearman(a, b) - 1e-9 for order in orders) / len(orders)
    assert ranks.chance_of(a, b) == pytest.approx(wanted) == 4 / 24
    ten = list(range(10))
    assert ranks.chance_of(ten, ten) < 0.001 and 0.3 < ranks.chance_of(ten, [5, 0, 9, 2, 7, 4, 1, 8, 3, 6]) < 0.7


def test_the_interval_holds_the_correlation_and_widens_with_the_errors(monkeypatch):
    monkeypatch.setattr(ranks, "DRAWS", 1000)
    published = [float(v) for v in range(12)]
    low, high = ranks.interval(published, published, [0.0] * 12)
    assert low == high == pytest.approx(1.0)  # every resample is in order
    wide, _ = ranks.interval(published, published, [5.0] * 12)
    assert wide < 0.8


def kept(folder, script, flags, clean, pgd20, seed=0, **judged):
    """A run's folder as pretraining and eval.py leave it."""
    folder.mkdir()
    flags = {"data": "data/cifar10.npz", "seed": seed, "epochs": 3, **flags}
    header = {"flags": flags, "command": f"python {script}.py"}
    found = {"clean": {"accuracy": clean, "stderr": 0.5}, "pgd20": {"accuracy": pgd20, "stderr": 0.25}}
    (folder / "log.jsonl").write_text(json.dumps(header) + "\n")
    (folder / "eval.jsonl").write_text(json.dumps({"preset": "amoc-slf", "results": found, **judged}) + "\n")
    return str(folder)


def test_the_table_has_the_methods_that_both_have_and_the_mean_of_their_runs(tmp_path, capsys):
    folders = [
        kept(tmp_path / "moco", "amoc", {"variant": "CCC"}, 50.0, 1.0),
        kept(tmp_path / "acc", "amoc", {"variant": "ACC", "norm": "linf"}, 40.0, 20.0),
        kept(tmp_path / "acc-1", "amoc", {"variant": "ACC", "norm": "linf"}, 42.0, 22.0, seed=1),
        kept(tmp_path / "rocl", "rocl", {"asymmetry": None}, 45.0, 15.0, data="data/cifar10.npz"),
        kept(tmp_path / "transfer", "rocl", {"asymmetry": None, "seed": 7}, 1.0, 1.0, data="stl10"),
        kept(tmp_path / "l2", "rocl", {"norm": "l2"}, 1.0, 1.0),  # no published figure
        kept(tmp_path / "random", "rocl", {"epochs": 0}, 1.0, 1.0),
        kept(tmp_path / "other", "rocl", {"data": "shapes"}, 1.0, 1.0)]
    ranks.main(folders)
    clean, below, pgd20, _ = capsys.readouterr().out.split("\n\n")
    rows = [line.split(" | ") for line in clean.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [
        "CCC (MoCo) (Xu & Yang 2020)", "RoCL (Fan et al. 2021)", "ACC (Xu & Yang 2020)"]
    assert [row[2] for row in rows] == ["50.00 (0.50)", "45.00 (0.50)", "41.00 (1.00)"]
    assert below.startswith("Spearman's correlation 1.00") and "p 0.167, 3 methods" in below
    assert [line.split(" | ")[4].strip(" |") for line in pgd20.splitlines()[2:]] == ["2", "1", "3"]


def test_too_few_methods_are_said_and_none_is_an_error(tmp_path, capsys):
    folder = kept(tmp_path / "moco", "amoc", {"variant": "CCC"}, 50.0, 1.0)
    ranks.main([folder])
    assert "amoc-slf clean: 1 methods have both figures; ranks need three" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of these folders was evaluated by amoc-slf"):
        ranks.main([str(tmp_path)])


def test_every_compared_figure_is_a_published_linear_probe_on_cifar10():
    assert len({row for *_, row in COMPARED}) == len(COMPARED)
    assert all(row.data == "CIFAR-10" and row.slf[0] is not None for *_, row in COMPARED)


@pytest.mark.parametrize("n", [5, 10])
def test_where_there_is_no_correlation_it_has_no_chance(n):
    assert math.isnan(ranks.chance_of(list(range(n)), [1.0] * n))
