import json

import pytest

from common import files
import plot
from evaluation import published, series, table


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_and_curves_are_those_of_the_logs(tmp_path):
    write(tmp_path / "log.jsonl", {"flags": {}}, {"epoch": 0, "loss": 3.5}, {"epoch": 1, "loss": 2.5})
    assert series.of_log(tmp_path, "loss") == ((0, 1), (3.5, 2.5))
    assert series.of_log(tmp_path, "unique") is None
    results = [("slf", "pgd20", 20), ("slf", "clean", 50), ("slf", "pgd20-16", 5), ("slf", "pgd20-l2", 1), ("knn", "clean", 9)]
    write(tmp_path / "eval.jsonl", *({"preset": p, "results": {a: {"accuracy": v}}} for p, a, v in results))
    assert series.curves(series.results_of(tmp_path)) == {"slf": ((0, 8, 16), (50, 20, 5))}  # one point alone is no curve


def test_foreign_lines_cost_no_picture(tmp_path):
    foreign = b'5\n[1]\n\xff\n{"loss": 1}\n{"epoch": 1, "loss": "high"}\n{"epoch": 0, "loss": NaN}\n{"epo'
    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 0, "loss": 3.5}\n' + foreign)
    assert series.of_log(tmp_path, "loss") == ((0,), (3.5,))
    lines = [{"preset": "slf", "results": {a: {"accuracy": v}}} for a, v in (("clean", 50), ("pgd20", 20))]
    lines += [{**line, "path": "runs/b.pt"} for line in lines]
    (tmp_path / "eval.jsonl").write_bytes("\n".join(map(json.dumps, lines)).encode() + b"\n" + foreign)
    assert series.curves(series.results_of(tmp_path)) == {"slf": ((0, 8), (50, 20)), "b slf": ((0, 8), (50, 20))}


def test_snapshots_are_in_the_order_of_their_epochs(tmp_path):
    assert series.of_snapshots(tmp_path, "knn") is None
    lines = [("encoder-010.pt", "knn", "clean", 30.0), ("encoder-002.pt", "knn", "clean", 20.0),
             ("encoder.pt", "knn", "clean", 40.0), ("encoder-010.pt", "slf", "pgd20", 5.0), ("other-3.pt", "knn", "clean", 1.0)]
    write(tmp_path / "eval.jsonl", *({"preset": preset, "path": f"runs/a/{file}", "results": {attack: {"accuracy": accuracy}}}
                                     for file, preset, attack, accuracy in lines))
    assert series.of_snapshots(tmp_path, "knn") == ((2, 10), (20.0, 30.0))
    assert series.of_snapshots(tmp_path, "slf pgd20") == ((10,), (5.0,))
    assert series.of_snapshots(tmp_path, "slf") is None


def test_curves_leave_out_transferred_and_repeated_attacks(tmp_path):
    results = [("clean", {}, 50), ("pgd20", {}, 20), ("pgd20-4", {"restarts": 2}, 1),
               ("pgd20-2", {"source": "x"}, 2)]
    for attack, how, accuracy in results:
        found = {"preset": "slf", "results": {attack: {"accuracy": accuracy, **how}}}
        files.append_json_line(tmp_path / "eval.jsonl", found)
    assert series.curves(series.results_of(tmp_path)) == {"slf": ((0, 8), (50, 20))}


def test_the_tradeoff_is_of_clean_images_and_pgd20_of_one_preset(tmp_path):
    def line(preset, attack, accuracy):
        return json.dumps({"preset": preset, "results": {attack: {"accuracy": accuracy}}}) + "\n"

    run = tmp_path / "run"
    run.mkdir()
    (run / "eval.jsonl").write_text(
        line("amoc-slf", "clean", 50.0) + line("amoc-slf", "pgd20-4", 30.0) + line("amoc-alf", "pgd20", 20.0))
    assert series.tradeoff(run, "amoc-slf") == []
    with open(run / "eval.jsonl", "a") as file:
        file.write(line("amoc-slf", "pgd20", 10.0))
    (point,) = series.tradeoff(run, "amoc-slf")
    assert (point.clean, point.robust, point.name) == (50.0, 10.0, "run")
    assert series.tradeoff(run, "amoc-alf") == []


def pgd(eps, steps, step=None, norm="linf"):
    return {"norm": norm, "eps": eps, "step_size": step or eps / {"linf": 4, "l2": 5}[norm], "steps": steps}


def of_attacks(*found, preset="slf"):
    """Lines of eval.jsonl: of (attack, accuracy, settings or None)."""
    return [{"preset": preset, "results": {attack: {"accuracy": accuracy, "settings": settings}}}
            for attack, accuracy, settings in found]


def test_curves_are_told_apart_by_norm_steps_and_the_length_of_a_step_whatever_the_names_say(tmp_path):
    write(tmp_path / "eval.jsonl", *of_attacks(
        ("clean", 90, None), ("a", 60, pgd(2 / 255, 20)), ("pgd20-1", 30, pgd(10 / 255, 20)), ("b", 7, pgd(8 / 255, 50)),
        ("c", 55, pgd(0.25, 20, norm="l2")), ("d", 25, pgd(1.0, 20, norm="l2")),
        ("e", 50, pgd(2 / 255, 20, 0.2 / 255)), ("f", 40, pgd(4 / 255, 20, 0.4 / 255)),
        ("aa", 3, {"norm": "linf", "eps": 8 / 255, "version": "standard"}), ("deepfool", 5, {"eps": 8 / 255})))
    results = series.results_of(tmp_path)
    assert series.curves(results) == {"slf": ((0, 2, 10), (90, 60, 30)), "slf, step 0.1 eps": ((0, 2, 4), (90, 50, 40))}
    assert series.curves(results, "l2") == {"slf": ((0, 0.25, 1), (90, 55, 25))}
    assert series.curves(results, steps=50) == {"slf": ((0, 8), (90, 7))}
    assert series.curves(results, "l2", 50) == {}


def test_curves_over_steps_are_of_one_radius(tmp_path):
    write(tmp_path / "eval.jsonl", *of_attacks(
        ("clean", 90, None), ("pgd100-8", 30, pgd(8 / 255, 100)), ("pgd1-8", 60, pgd(8 / 255, 1)), ("pgd20", 40, None),
        ("pgd5-4", 70, pgd(4 / 255, 5)), ("pgd50-l2-amoc", 20, None), ("pgd20-amoc", 41, None)))
    results = series.results_of(tmp_path)
    assert series.step_curves(results) == {"slf": ((1, 20, 100), (60, 40, 30))}
    assert series.step_curves(results, radius=4) == {}


@pytest.mark.parametrize("settings", [{}, {"norm": "linf"}, pgd(8 / 255, 20) | {"eps": "8"}, pgd(8 / 255, 20) | {"eps": 0.0}])
def test_settings_that_are_no_pgd_are_no_point(settings):
    assert series.pgd_of("pgd20", {"settings": settings}) is None
    assert series.pgd_of("pgd20", {"settings": None}).steps == 20 and series.pgd_of("aa", {}) is None


def test_only_one_preset_and_one_data_set_count_where_they_are_named(tmp_path):
    lines = of_attacks(("clean", 90, None), preset="mae") + of_attacks(("clean", 80, None), preset="mae lr=1")
    lines += of_attacks(("clean", 70, None), preset="mae-b")
    write(tmp_path / "eval.jsonl", *[line | {"data": "x"} for line in lines],
          {"preset": "mae", "data": "y", "results": {"clean": {"accuracy": 1}}})
    assert set(series.results_of(tmp_path, "mae", {"data": "x"})) == {("mae", "clean"), ("mae lr=1", "clean")}
    assert set(series.results_of(tmp_path, "mae lr=1", {"data": "x"})) == {("mae lr=1", "clean")}
    assert series.results_of(tmp_path, "mae", {"data": "y"})["mae", "clean"]["accuracy"] == 1
    with pytest.raises(ValueError, match="measured twice, with another data"):
        series.results_of(tmp_path)


def test_a_seed_of_the_evaluation_can_be_chosen(tmp_path):
    of_seed = [of_attacks(("pgd20", accuracy, pgd(8 / 255, 20)), ("clean", 90, None)) for accuracy in (20, 30)]
    write(tmp_path / "eval.jsonl", *[line | {"seed": seed} for seed, lines in enumerate(of_seed) for line in lines])
    with pytest.raises(ValueError, match="measured twice, with another seed; choose by a flag"):
        series.results_of(tmp_path)
    for seed, accuracy in enumerate((20, 30)):
        assert series.curves(series.results_of(tmp_path, only={"seed": seed})) == {"slf": ((0, 8), (90, accuracy))}
    pytest.importorskip("matplotlib")
    plot.main(["curve", str(tmp_path), "--seed", "1", "--out", str(tmp_path / "a.png")])
    with pytest.raises(ValueError, match="measured twice"):
        plot.main(["curve", str(tmp_path), "--out", str(tmp_path / "a.png")])


def test_kinds_of_corruptions_are_those_kept(tmp_path):
    write(tmp_path / "eval.jsonl",
          {"preset": "slf", "results": {"c": {"accuracy": 2, "kinds": {"fog": 1, "snow": 3}}, "pgd20": {"accuracy": 1}}},
          {"preset": "slf", "results": {"c-like": {"accuracy": 2, "kinds": {"fog": "high"}}}},
          {"preset": "alf", "path": "runs/b.pt", "results": {"c19": {"accuracy": 2, "kinds": {"fog": 9}}}})
    assert series.kinds(tmp_path) == {("slf", "c"): {"fog": 1, "snow": 3}, ("b alf", "c19"): {"fog": 9}}
    assert series.kinds(tmp_path, "slf") == {("slf", "c"): {"fog": 1, "snow": 3}}


def test_histories_are_read_from_lines_and_from_results_and_sorted(tmp_path):
    history = [{"epoch": 2, "clean": 60, "pgd20": 30}, {"epoch": 1, "clean": 50}, {"epoch": "x", "clean": 1}, 7]
    write(tmp_path / "eval.jsonl",
          {"preset": "f1", "recipe": {"lr": 1}, "history": history, "results": {"clean": {"accuracy": 60}}},
          {"preset": "f2", "recipe": {"lr": 2}, "results": {"clean": {"accuracy": 60, "history": history[:1]}}},
          {"preset": "f3", "history": "long", "results": {"clean": {"accuracy": 60}}})
    both = {"f1 clean": ((1, 2), (50, 60)), "f1 pgd20": ((2,), (30,))}
    assert series.histories(tmp_path) == both | {"f2 clean": ((2,), (60,)), "f2 pgd20": ((2,), (30,))}
    assert series.histories(tmp_path, "f1") == both


def run_of(folder, clean, robust, flags, recipe=None, script="amoc"):
    folder.mkdir(exist_ok=True)
    write(folder / "log.jsonl", {"flags": flags, "command": f"python {script}.py"})
    for attack, accuracy in (("clean", clean), ("pgd20", robust)):
        files.append_json_line(folder / "eval.jsonl",
                               {"preset": "tune", "recipe": recipe or {}, "results": {attack: {"accuracy": accuracy}}})
    return folder


def test_points_that_differ_in_one_flag_alone_are_joined_in_its_order(tmp_path):
    flags = [{"eps": 8.0, "steps": 3, "seed": 0, "out": "a"}, {"eps": 2.0, "steps": 3, "seed": 0, "out": "b"},
             {"eps": 4.0, "steps": 3, "seed": 1, "out": "c"}, {"eps": 4.0, "steps": 5, "seed": 0, "out": "d"}, {}]
    points = []
    for i, of_run in enumerate(flags):
        points += series.tradeoff(run_of(tmp_path / str(i), 90 - i, i, of_run), "tune")
    (row,) = series.along(points, "eps")
    assert [(value, point.name) for value, point in row] == [(2, "1"), (8, "0")]  # another seed, other steps: not
    for what, words in (("temperature", "no run has it; there is eps, out, steps|no run has it; there is eps, steps"),
                        ("preset.lr", "no run has it; there is nothing")):
        with pytest.raises(ValueError, match=f"--along {what}: {words}"):
            series.along(points, what)


def test_points_may_differ_in_flags_that_follow_from_the_first(tmp_path):
    points = []
    for eps in (2.0, 8.0, 4.0):
        points += series.tradeoff(run_of(tmp_path / f"{eps}", eps, eps, {"eps": eps, "step_size": eps / 4, "seed": 0}), "tune")
    assert series.along(points, "eps") == []
    (row,) = series.along(points, "eps", "step-size")
    assert [value for value, _ in row] == [2, 4, 8]


def test_runs_that_differ_in_their_seed_are_one_point_with_a_spread(tmp_path):
    points = []
    for name, clean, robust, flags in (("acc", 40, 10, {"seed": 0}), ("acc-1", 44, 13, {"seed": 1}),
                                       ("other", 50, 0, {"seed": 0, "eps": 1.0})):
        points += series.tradeoff(run_of(tmp_path / name, clean, robust, flags), "tune")
    both, other = series.over_seeds(points)
    assert (both.name, both.clean, both.robust) == ("acc", 42, 11.5)
    assert (both.clean_spread, both.robust_spread) == pytest.approx((2 * 2**0.5, 1.5 * 2**0.5))
    assert other == points[2] and other.clean_spread == 0
    twice = [points[0], points[0]._replace(name="copy")]
    assert series.over_seeds(twice) == twice  # one seed: no spread of seeds


def test_points_that_differ_in_one_field_of_the_preset_are_joined(tmp_path):
    for decay, accuracy in ((0.75, 60), (0.65, 50), (0.95, 40)):
        folder = run_of(tmp_path / "run", accuracy, accuracy / 2, {"seed": 0}, {"layer_decay": decay, "lr": 1})
    run_of(folder, 1, 1, {"seed": 0}, {"layer_decay": 0.85, "lr": 2})
    points = series.tradeoff(folder, "tune")
    assert len(points) == 4
    (row,) = series.along(points, "preset.layer-decay")
    assert [(value, point.clean, point.robust) for value, point in row] == [(0.65, 50, 25), (0.75, 60, 30), (0.95, 40, 20)]
    run_of(tmp_path / "own", 1, 1, {"variant": "ACC"})
    with pytest.raises(ValueError, match='--along variant: is "ACC" in .*own; only numbers'):
        series.along(series.tradeoff(tmp_path / "own", "tune"), "variant")


def test_a_point_has_the_group_of_its_run(tmp_path):
    for script, flags, group in (("amoc", {"variant": "CCC"}, "nothing adversarial"), ("amoc", {"variant": "ACC"}, "pixels"),
                                 ("amoc", {"epochs": 0}, "not pretrained"), ("own", {}, "other")):
        folder = tmp_path / f"{script}{len(list(tmp_path.iterdir()))}"
        (point,) = series.tradeoff(run_of(folder, 1, 1, flags, script=script), "tune")
        assert table.group_of(point.run, published.GROUPS) == group
