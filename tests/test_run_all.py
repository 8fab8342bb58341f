"""results/run_all.py: the commands of its rows, the number of epochs, and what it keeps and takes up again."""
import importlib
import json
import pathlib
import re
import sys
import time

import pytest

from common import encoders
from tests.scripts import ROOT, read_flags

sys.path.insert(0, str(ROOT / "results"))
import run_all  # noqa: E402


@pytest.mark.parametrize("name", run_all.ROWS)
def test_the_commands_of_the_rows_are_accepted(name):
    row = run_all.ROWS[name]
    script, *flags = run_all.command_of(row, run_all.parse([]), 1, "runs/x", 3)
    args = read_flags(importlib.import_module(script.removesuffix(".py")), *flags)
    assert args.seed == 1 and args.limit is None and args.batch_size == row.batch_size
    assert args.epochs == (0 if name in ("random", "vit-random") else 3)


def test_the_kept_encoders_are_those_of_the_rows_and_few():
    kept = [name for name, row in run_all.ROWS.items() if row.seeds > 1 or row.encoder]
    encoders_there = list((ROOT / "results" / "encoders").glob("*.pt"))
    assert {path.stem for path in encoders_there} <= set(kept)
    assert sum(path.stat().st_size for path in encoders_there) < 20e6


def test_no_two_rows_are_the_same():
    assert len({row.command for row in run_all.ROWS.values()}) == len(run_all.ROWS)


def test_a_row_that_reads_an_encoder_names_its_row():
    for row in run_all.ROWS.values():
        reads = [word for word in row.command.split() if word.endswith("encoder.pt")]
        assert reads == (["{runs}/" + row.needs + "/encoder.pt"] if row.needs else [])


@pytest.mark.parametrize("flags", [*run_all.EVALUATIONS, *run_all.EVALUATIONS_OF_A_VIT])
def test_the_evaluations_are_accepted(flags):
    import eval as evaluation

    read_flags(evaluation, "runs/x/encoder.pt", *flags.split())


def test_epochs_fill_the_time():
    # 50 steps take 10 s and an epoch has 200 of them: 40 s. 400 s hold ten, without the 15 s once nine and a half.
    assert run_all.epochs_for(400, 200, 10, 10) == 10
    assert run_all.epochs_for(400, 200, 35, 10) == 9
    assert run_all.epochs_for(400, 200, 8, 10) == 10  # a first epoch that was faster by chance
    assert run_all.epochs_for(5, 200, 10, 10) == 1


def test_first_seeds_come_first():
    jobs = run_all.in_order(["random", "acc", "moco"])
    assert jobs == [("random", 0), ("acc", 0), ("moco", 0), ("acc", 1), ("moco", 1)]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """run_all with commands that are noted down rather than run: each leaves behind what it would."""
    commands = []

    def run(words):
        commands.append(words)
        if words[0] == "eval.py":
            folder = pathlib.Path(words[1]).parent
            preset = words[words.index("--preset") + 1:words.index("--attacks")]
            preset = [word for word in preset if not word.startswith("-") and not word.isdigit()]
            attacks = [word for word in words[words.index("--attacks") + 1:] if word[0] != "-" and not word.isdigit()]
            with open(folder / "eval.jsonl", "a") as file:
                for name in preset:
                    line = {"preset": name, "results": dict.fromkeys(["clean"] if name == "knn" else attacks, {})}
                    file.write(json.dumps(line) + "\n")
            return
        if "--teacher" in words:  # which a script would look for
            assert pathlib.Path(words[words.index("--teacher") + 1]).exists()
        folder = pathlib.Path(words[words.index("--out") + 1])
        folder.mkdir(parents=True)
        lines = [{}, {"cpu_seconds": 12.0}, {"cpu_seconds": 22.0}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        encoders.export(encoders.make("slim"), folder / "encoder.pt", image_size=32)

    monkeypatch.setattr(run_all, "run", run)
    data = tmp_path / "data.npz"
    data.touch()
    flags = ["--data", str(data), "--jobs", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "kept"),
             "--encoders", str(tmp_path / "encoders")]
    return tmp_path, commands, flags


def test_a_row_is_timed_trained_judged_and_kept_once(made):
    folder, commands, flags = made
    run_all.main(["moco", *flags])
    assert (folder / "encoders" / "moco.pt").exists() and not (folder / "encoders" / "moco-1.pt").exists()
    assert (folder / "kept" / "moco" / "log.jsonl").exists() and (folder / "kept" / "moco-1" / "eval.jsonl").exists()
    # 50 steps of 64 images take 10 s, 781 steps 156 s; once, 2 s. In 1,200 s that is eight epochs, for both seeds.
    runs = [words for words in commands if words[0] == "amoc.py"]
    assert [words[words.index("--epochs") + 1] for words in runs] == ["2", "8", "8"]
    assert [words[words.index("--seed") + 1] for words in runs] == ["0", "0", "1"]
    assert "--limit" in runs[0] and "--limit" not in runs[1]
    assert len(commands) == 3 + 2 * len(run_all.EVALUATIONS)

    commands.clear()
    run_all.main(["moco", *flags])
    assert not commands


def test_a_vit_is_judged_by_less(made):
    folder, commands, flags = made
    run_all.main(["vit-random", *flags])
    judged = [words for words in commands if words[0] == "eval.py"]
    assert len(judged) == len(run_all.EVALUATIONS_OF_A_VIT) and judged[-1][-2:] == ["--test-limit", "1000"]
    assert not (folder / "encoders" / "vit-random.pt").exists()  # not one of the main rows
    assert not any("amoc-alf" in words or "aa" in words for words in judged)
    commands.clear()
    run_all.main(["vit-random", *flags])
    assert not commands


def test_what_an_evaluation_measures_is_read_off_its_flags():
    measured = [run_all.measured_by(flags) for flags in run_all.EVALUATIONS]
    assert measured[0] == {("knn", "clean"), *(("amoc-slf", attack) for attack in ("clean", "pgd20-4", "pgd20"))}
    assert measured[2:] == [{("amoc-slf", "aa")}, {("amoc-alf", "aa")}]


def test_a_row_whose_run_is_gone_goes_on_from_what_was_kept(made):
    folder, commands, flags = made
    run_all.main(["random", *flags])
    kept = folder / "kept" / "random" / "eval.jsonl"
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:-1]))  # the last evaluation is missing
    for file in (folder / "runs").rglob("*.*"):
        file.unlink()
    commands.clear()
    run_all.main(["random", *flags])
    assert {words[0] for words in commands} == {"eval.py"}
    assert run_all.is_complete("random", 0, run_all.parse(flags))


def test_what_a_row_needs_is_made_before_it(made):
    folder, commands, flags = made
    run_all.main(["advcl-labels", *flags])
    scripts = [words[0] for words in commands if words[0] != "eval.py"]
    assert scripts == ["acl.py", "acl.py", "advcl.py", "advcl.py"]  # each is timed first
    teachers = [words[words.index("--teacher") + 1] for words in commands if "--teacher" in words]
    assert teachers == 2 * [str(folder / "runs" / "simclr" / "encoder.pt")]  # the short run too reads the whole one's


def test_what_a_row_needs_is_made_once_and_waited_for_while_it_is_made(made, monkeypatch):
    _, commands, flags = made
    run = run_all.run

    def slow(words):
        if words[0] == "acl.py":
            time.sleep(0.1)
        run(words)

    monkeypatch.setattr(run_all, "run", slow)
    run_all.main(["simclr", "advcl-labels", *flags, "--jobs", "2"])
    scripts = [words[0] for words in commands if "--epochs" in words and words[0] != "eval.py"]
    assert scripts.count("acl.py") == 3  # timed once, and two seeds
    assert scripts.index("advcl.py") > scripts.index("acl.py", 1)


def test_a_row_that_fails_is_named_and_stops_no_other(made, monkeypatch, capsys):
    folder, _, flags = made
    run = run_all.run

    def failing(words):
        if words[0] == "acl.py":
            raise run_all.subprocess.CalledProcessError(1, ["nice", "-n", "19", "python", *words])
        run(words)

    monkeypatch.setattr(run_all, "run", failing)
    with pytest.raises(SystemExit, match="not all rows"):
        run_all.main(["acl", "random", *flags])
    assert "acl FAILED: python acl.py" in capsys.readouterr().out
    assert (folder / "encoders" / "random.pt").exists()
    with pytest.raises(SystemExit, match="not all rows"):
        run_all.main(["advcl-labels", *flags])
    assert re.search("advcl-labels FAILED: python acl.py .* --variant s2s", capsys.readouterr().out)


def test_an_unknown_row_is_refused():
    with pytest.raises(SystemExit, match="no row nonsense; there are random, "):
        run_all.main(["nonsense"])


def test_a_row_without_a_batch_size_is_refused_before_anything_is_run(made, monkeypatch):
    _, commands, flags = made
    monkeypatch.setitem(run_all.ROWS, "mine", run_all.Row("amoc.py --arch slim"))
    with pytest.raises(SystemExit, match=r"ROWS\['mine'\] has no --batch-size"):
        run_all.main(["random", "mine", *flags])
    assert not commands


def test_rows_of_other_data_have_folders_of_their_own_and_read_what_is_there():
    ours, others = run_all.parse([]), run_all.parse(["--data", "cifar10"])
    assert [str(ours.runs), str(ours.results), str(ours.encoders)] == ["runs/cpu-20", "results/cpu-20", "results/encoders"]
    assert all(str(folder).startswith("runs/cpu-20-cifar10") for folder in (others.runs, others.results, others.encoders))
    assert len({others.runs, others.results, others.encoders}) == 3
    row = run_all.ROWS["advcl-labels"]
    words = run_all.command_of(row, others, 0, others.runs / "advcl-labels", 3)
    assert words[words.index("--teacher") + 1] == "runs/cpu-20-cifar10/simclr/encoder.pt"
