import json
import pathlib

import pytest

from common import files
from evaluation import table

GROUPS = {"not pretrained": [(None, {"epochs": 0})], "nothing": [("amoc", {"variant": "CCC"})],
          "pixels": [("rocl", {}), ("amoc", {})]}
PUBLISHED = [("amoc", {"variant": "ACC", "seed": lambda seed: seed is None}, "70 in 200 epochs")]


def folder(path, script, **flags):
    path.mkdir()
    flags = {"out": str(path), "epochs": 5, "seed": 0, **flags}
    log = [{"command": f"python {script}.py --some", "flags": flags, "device": "a CPU, 2 threads"}]
    log += [{"epoch": i, "cpu_seconds": 10 * i + flags["seed"]} for i in range(flags["epochs"])]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return path


def found(accuracy, stderr=1.0):
    return {"accuracy": accuracy, "stderr": stderr}


def test_seeds_are_one_row_grouped_by_what_is_adversarial(tmp_path):
    runs = [(folder(tmp_path / f"acc-{seed}", "amoc", variant="ACC", seed=seed), {"clean": found(v)})
            for seed, v in enumerate((30, 34, 38))]
    runs.append((folder(tmp_path / "ccc", "amoc", variant="CCC"), {"clean": found(40.125, 1.5), "pgd": found(2)}))
    runs.append((folder(tmp_path / "init", "amoc", variant="ACC", epochs=0), {"clean": found(20)}))
    runs.append((tmp_path / "elsewhere", {"clean": found(50)}))
    runs.append((folder(tmp_path / "other", "rocl"), {"knn": found(60)}))  # it has none of the columns
    runs[1][1]["pgd"], runs[2][1]["pgd"] = found(10), found(20)
    runs[3][1]["pgd"] |= {"sanity": {"doubts": ["images stand at 8 eps"]}}
    columns = {"clean": "SA", "pgd": "RA", "aa": "AA"}  # none has the last
    rows = table.markdown(runs, columns, GROUPS, PUBLISHED, {"out"}).splitlines()
    assert rows[0] == "|  | seeds | pretraining | SA | RA | published |"
    assert rows[2:] == [
        "| **not pretrained** |  |  |  |  |  |",
        f"| [init]({runs[4][0].as_posix()}) | 1 |  | 20.00 (1.00) |  |  |",
        "| **nothing** |  |  |  |  |  |",
        f"| [ccc]({runs[3][0].as_posix()}) | 1 | 40 CPU-s | 40.12 (1.50) | 2.00 (1.00)† |  |",
        "| **pixels** |  |  |  |  |  |",
        f"| [acc]({runs[0][0].as_posix()}) | 3 | 41 CPU-s | 34.00 ± 4.00 | 15.00 ± 7.07 [2] | 70 in 200 epochs |",
        "| **other** |  |  |  |  |  |",
        f"| [elsewhere]({runs[5][0].as_posix()}) | 1 |  | 50.00 (1.00) |  |  |",
    ]


@pytest.mark.parametrize("differ, rows", [({"seed": 1}, 1), ({"seed": 1, "data_dir": "b"}, 1), ({"lr": 2}, 2)])
def test_runs_of_other_flags_are_other_rows(tmp_path, differ, rows):
    runs = [(folder(tmp_path / name, "rocl", **{"lr": 1, "data_dir": "a", **flags}), {"clean": found(1)})
            for name, flags in (("x", {}), ("y", differ))]
    text = table.markdown(runs, {"clean": "SA"}, GROUPS, PUBLISHED, {"out", "data_dir"})
    assert len(text.splitlines()) == 3 + rows and "[x]" in text  # no common prefix: the first one's name


def test_one_run_twice_is_not_two_seeds(tmp_path):
    runs = [(folder(tmp_path / name, "rocl"), {"clean": found(1)}) for name in ("x", "y")]
    with pytest.raises(ValueError, match="x and .*y are one run"):
        table.markdown(runs, {"clean": "SA"}, GROUPS, PUBLISHED, {"out"})


def test_a_line_after_one_that_was_cut_off_is_not_lost(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b')
    files.append_json_line(path, {"a": 3})
    files.append_json_line(path, {"a": 4})
    assert table.lines(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_what_was_measured_in_two_ways_is_refused_and_a_wish_chooses(tmp_path):
    def line(attack, bn, **result):
        return {"preset": "slf", "bn": bn, "train": "x", "results": {attack: {"accuracy": 1, **result}}}

    for text in (line("clean", "adv"), line("pgd", "adv"), line("pgd", "adv", source="other"), line("pgd", "clean")):
        files.append_json_line(tmp_path / "eval.jsonl", text)
    with pytest.raises(ValueError, match="slf pgd was measured twice, with another bn"):
        table.read_folder(tmp_path, source=None)
    assert table.read_folder(tmp_path, source=None, bn="adv").keys() == {("slf", "clean"), ("slf", "pgd")}
    with pytest.raises(FileNotFoundError, match="nothing was measured there"):
        table.read_folder(tmp_path / "elsewhere")


def test_a_result_is_kept_under_its_own_conditions_and_a_cut_line_is_none(tmp_path):
    path = tmp_path / "eval.jsonl"
    results = [{"preset": "a", "seed": s, "results": {"pgd": {"accuracy": a, **how}}} for s, a, how in (
        (0, 1, {"images": 9}), (0, 2, {"images": 5}), (1, 3, {"images": 9}), (0, 4, {"images": 9, "restarts": 2}))]
    path.write_text("\n".join(map(json.dumps, results)) + "\n" + '{"preset": "a", "se')

    def kept(seed, images, restarts=None):
        line = table.find(path, {"preset": "a", "seed": seed}, "pgd", {"images": images, "restarts": restarts})
        return line and line["accuracy"]

    assert [kept(0, 9), kept(0, 5), kept(1, 9), kept(0, 9, 2), kept(1, 5), kept(1, 9, 2)] == [1, 2, 3, 4, None, None]
    assert table.find(tmp_path / "none.jsonl", {}, "pgd", {}) is None


def test_an_encoder_that_is_a_file_of_its_own_is_a_row_of_its_own(tmp_path):
    """With a log beside it, it is of that run, and seeds are one row; without, it has its own name alone."""
    runs = []
    for seed in (0, 1):
        run = folder(tmp_path / f"acc-{seed}", "amoc", variant="ACC", seed=seed)
        runs += [(run, {"clean": found(30 + seed)}), (run / "epoch5.pt", {"clean": found(20 + seed)})]
    many = tmp_path / "encoders"
    many.mkdir()
    runs += [(many / f"{name}.pt", {"clean": found(10)}) for name in "ab"]
    rows = table.markdown(runs, {"clean": "SA"}, GROUPS, PUBLISHED, {"out"}).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| **pixels**", f"| [acc]({runs[0][0]})", f"| [acc/epoch5]({runs[1][0]})",
        "| **other**", f"| [a]({many}/a.pt)", f"| [b]({many}/b.pt)"]
    assert [row.split(" | ")[1] for row in rows if "](" in row] == ["2", "2", "1", "1"]


def test_a_run_that_one_stands_in_has_its_name(tmp_path, monkeypatch):
    folder(tmp_path / "acc", "amoc")
    (tmp_path / "bare").mkdir()
    for place, path, name in (("acc", ".", "acc"), ("acc", "epoch5.pt", "acc/epoch5"), ("bare", ".", "bare")):
        monkeypatch.chdir(tmp_path / place)
        text = table.markdown([(pathlib.Path(path), {"clean": found(1)})], {"clean": "SA"}, GROUPS, PUBLISHED, set())
        assert f"| [{name}]({path}) |" in text


def test_results_of_two_files_of_a_folder_are_told_apart(tmp_path):
    for i, path in enumerate(("runs/x/encoder.pt", "runs/x/b.pt", None, "elsewhere/b.pt")):
        line = {"preset": "slf", "encoder": str(i), "results": {f"pgd{i}": {"accuracy": i}}}
        files.append_json_line(tmp_path / "eval.jsonl", line | ({"path": path} if path else {}))
    assert table.evaluated(tmp_path) == ["encoder.pt", "b.pt"]
    assert table.read_folder(tmp_path).keys() == {("slf", "pgd0"), ("slf", "pgd2")}
    assert table.read_folder(tmp_path, "b.pt").keys() == {("slf", "pgd1"), ("slf", "pgd3")}
    assert table.find(tmp_path / "eval.jsonl", {"preset": "slf"}, "pgd1", {}) is None
    assert table.find(tmp_path / "eval.jsonl", {"preset": "slf"}, "pgd1", {}, "b.pt") == {"accuracy": 1}


def test_measured_again_in_the_same_way_the_last_counts_and_accept_chooses(tmp_path):
    for accuracy in (1, 2):
        line = {"preset": "slf", "results": {"pgd": {"accuracy": accuracy}}}
        files.append_json_line(tmp_path / "eval.jsonl", line)
    assert table.read_folder(tmp_path) == {("slf", "pgd"): {"accuracy": 2}}
    assert table.read_folder(tmp_path, accept=lambda line, attack, result: result["accuracy"] == 1) == {
        ("slf", "pgd"): {"accuracy": 1}}
    assert table.read_folder(tmp_path, preset="knn") == {}


@pytest.mark.parametrize("differ", ["encoder", "bn", "data", "image_size", "seed", "recipe", "train"])
def test_lines_that_differ_in_what_decides_are_not_mixed(tmp_path, differ):
    for value in (1, 2):
        files.append_json_line(tmp_path / "eval.jsonl", {
            "preset": "slf", differ: value, "results": {"pgd": {"accuracy": 1}}})
    with pytest.raises(ValueError, match=f"measured twice, with another {differ}; choose by a flag"):
        table.read_folder(tmp_path)


@pytest.mark.parametrize("differ", ["test", "images", "settings", "restarts", "source", "files", "batch_size"])
def test_results_that_differ_in_what_decides_are_not_mixed(tmp_path, differ):
    for value in (1, 2):
        files.append_json_line(tmp_path / "eval.jsonl", {
            "preset": "slf", "results": {"pgd": {"accuracy": 1, differ: value}}})
    with pytest.raises(ValueError, match=f"measured twice, with another {differ}"):
        table.read_folder(tmp_path)


def test_cells():
    assert table.cell([]) == ""
    assert table.cell([found(12.346, 0.5)]) == "12.35 (0.50)"
    assert table.cell([{"accuracy": 3}]) == "3.00"
    assert table.cell([found(1), found(3)]) == "2.00 ± 1.41"
    assert table.cell([found(1), found(3)], 3) == "2.00 ± 1.41 [2]"
    for doubtful in ({"warnings": ["w"]}, {"sanity": {"doubts": ["d"]}}):
        assert table.cell([found(1) | doubtful]) == "1.00 (1.00)†"
        assert table.cell([found(1), found(1) | doubtful]) == "1.00 ± 0.00†"
    for fine in ({"warnings": []}, {"sanity": {"doubts": []}}, {"sanity": {}}, {"sanity": 5}):
        assert table.cell([found(1) | fine]) == "1.00 (1.00)"


@pytest.mark.parametrize("device, want", [("a CPU, 2 threads", "8 CPU-s"), ("NVIDIA H100", "3 s")])
def test_the_time_is_that_of_the_device(tmp_path, device, want):
    log = [{"command": "python amoc.py", "device": device, "flags": {"seed": 0}},
           {"epoch": 0, "seconds": 1, "cpu_seconds": 2}, {"epoch": 1, "seconds": 3, "cpu_seconds": 8}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    text = table.markdown([(tmp_path, {"a": found(1)})], {"a": "A"}, {}, [], set())
    assert text.splitlines()[-1].split(" | ")[2] == want


def test_a_flag_that_an_older_log_does_not_have_counts_as_its_default(tmp_path):
    old = folder(tmp_path / "rocl", "rocl", eps=8.0)
    new = folder(tmp_path / "rocl-1", "rocl", eps=8.0, norm="linf", asymmetry=None, seed=1)
    other = folder(tmp_path / "l2", "rocl", eps=8.0, norm="l2", seed=1)
    assert [len(row) for row in table.rows([old, new, other], {"out"})] == [2, 1]
    older = folder(tmp_path / "advcl", "advcl", radius=8.0)
    newer = folder(tmp_path / "advcl-1", "advcl", cutoff=8.0, seed=1)
    third = folder(tmp_path / "advcl-4", "advcl", radius=4.0, seed=1)
    assert [len(row) for row in table.rows([older, newer, third], {"out"})] == [2, 1]  # a flag that was renamed
    foreign = [folder(tmp_path / name, "elsewhere", **flags) for name, flags in (("a", {}), ("b", {"norm": "linf", "seed": 1}))]
    assert [len(row) for row in table.rows(foreign, {"out"})] == [1, 1]  # its defaults are not known


@pytest.mark.parametrize("name, values", [
    ("images", (100, 10000)), ("test", ("a", "b")), ("settings", ({"steps": 20}, {"steps": 50})), ("train", ("a", "b")), ("image_size", (32, 64)), ("bn", ("clean", "adv")), ("files", ("a", "b"))])
def test_seeds_that_were_judged_otherwise_are_not_averaged(tmp_path, name, values):
    runs = [(folder(tmp_path / f"a{seed}", "rocl", seed=seed), {"clean": {**found(1), name: value}})
            for seed, value in enumerate(values)]
    with pytest.raises(ValueError, match=f"SA: .*a0 and .*a1 would be averaged, but {name} of the first is"):
        table.markdown(runs, {"clean": "SA"}, GROUPS, PUBLISHED, {"out"})
    del runs[1][1]["clean"][name]  # of an older program
    table.markdown(runs, {"clean": "SA"}, GROUPS, PUBLISHED, {"out"})


@pytest.mark.parametrize("name, value", [("restarts", 5), ("batch_size", 100), ("source", "a")])
def test_seeds_that_were_judged_by_default_and_otherwise_are_not_averaged(tmp_path, name, value):
    runs = [(folder(tmp_path / "a0", "rocl", seed=0), {"clean": found(1)}),
            (folder(tmp_path / "a1", "rocl", seed=1), {"clean": {**found(1), name: value}})]
    with pytest.raises(ValueError, match=f"SA: .*a0 and .*a1 would be averaged, but {name} of the first is None"):
        table.markdown(runs, {"clean": "SA"}, GROUPS, PUBLISHED, {"out"})


def test_seeds_that_were_judged_through_other_branches_or_after_other_training_are_not_averaged(tmp_path):
    """What tells them apart stands in the line of eval.jsonl, not in the result."""
    for other in ({"bn": "clean"}, {"train": "few"}, {"image_size": 64}):
        runs = []
        for seed, line in enumerate(({}, other)):
            path = folder(tmp_path / f"{'-'.join(other)}{seed}", "rocl", seed=seed)
            line = {"preset": "slf", "bn": "adv", "train": "all", "data": "a", "image_size": 32, **line}
            (path / "eval.jsonl").write_text(json.dumps({**line, "results": {"clean": found(1)}}))
            runs.append((path, table.read_folder(path)))
        with pytest.raises(ValueError, match=f"would be averaged, but {next(iter(other))} of the first is"):
            table.markdown(runs, {("slf", "clean"): "SA"}, GROUPS, PUBLISHED, {"out"})
