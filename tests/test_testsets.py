"""Other test sets (--test-data): how they are read, which classes count, how their results are kept."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import eval as command
from common import data, files
from evaluation import attacks, corruptions, flags as flags_of, knn, sets as sets_of, table
from tests.test_eval_faults import PROBE, evaluate, export, no_training, pixels

NAMES = ["ant", "bee", "cat", "dog"]


def pictures(folder, counts, side=32, seed=0):
    """`counts` {class name: number} pictures, one folder a class."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def other_npz(path, n=12, classes=4, side=32, seed=5, **others):
    arrays = {"x_test": pixels(n, side, side, seed=seed), "y_test": np.arange(n) % classes, **others}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """An encoder, and a data set of four classes in folders."""
    folder = tmp_path_factory.mktemp("template")
    export(folder / "encoder.pt")
    pictures(folder / "animals" / "train", dict.fromkeys(NAMES, 8))
    pictures(folder / "animals" / "test", dict.fromkeys(NAMES, 3), seed=1)
    x = pixels(44, 32, 32)
    np.savez(folder / "tiny.npz", x_train=x, y_train=np.arange(44) % 4, x_test=x[:20], y_test=np.arange(20) % 4)
    return folder


@pytest.fixture
def exported(template, tmp_path):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


WORKERS = ["--workers", "0"]


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------
def test_labels_of_folders_are_places_among_the_classes_that_are_there(tmp_path):
    folder = pictures(tmp_path / "r", {"dog": 2, "bee": 3})
    images, present = data.load_test(folder, 4, NAMES, size=32, workers=0)
    assert present == [1, 3] and images.classes == 2 and images.size == 32
    for (path, label), y in zip(images.samples, images.y.tolist()):
        assert NAMES[present[y]] == path.split("/")[-2] and label == y
    x = torch.cat([x for x, _ in images.stream(torch.arange(5).split(2))])
    assert x.shape == (5, 3, 32, 32) and x.dtype == torch.uint8
    some, present = data.load_test(folder, 4, NAMES, limit=1, size=32, workers=0)
    assert len(some) == 1 and present == [1, 3]  # the limit takes images away, not classes


def test_folders_whose_names_are_all_numbers_are_labels_in_numeric_order(tmp_path):
    folder = pictures(tmp_path / "v2", {"10": 1, "2": 1})  # as ImageNet-V2 is published
    images, present = data.load_test(folder, 11, None, size=8, workers=0)
    assert present == [2, 10] and sorted((path.split("/")[-2], y) for path, y in images.samples) == [("10", 1), ("2", 0)]
    images, present = data.load_test(folder, 3, ["10", "2", "7"], size=8, workers=0)
    assert present == [0, 1]  # names of training win
    with pytest.raises(ValueError, match="class '10' is none of the 10 of training; they are numbers, 0 to 9"):
        data.load_test(folder, 10, None, size=8)


def test_arrays_are_read_as_they_lie_and_the_first_n_are_a_fair_sample(tmp_path):
    x = pixels(20, 8, 8)
    y = np.arange(20) % 4
    np.savez(tmp_path / "a.npz", x_test=x, y_test=y)
    (tmp_path / "CIFAR-10.1").mkdir()
    np.save(tmp_path / "CIFAR-10.1" / "cifar10.1_v6_data.npy", x)
    np.save(tmp_path / "CIFAR-10.1" / "cifar10.1_v6_labels.npy", y.astype(np.int32))
    for path in (tmp_path / "a.npz", tmp_path / "CIFAR-10.1", tmp_path / "CIFAR-10.1" / "cifar10.1_v6_data.npy"):
        for limit in (None, 7, 100):
            images, present = data.load_test(path, 4, None, limit=limit)
            rows = data.fixed_order(20)[:limit]
            assert present == [0, 1, 2, 3] and images.y.dtype == torch.int64 and images.classes == 4
            assert (images.x.permute(0, 2, 3, 1).numpy() == x[rows]).all() and (images.y.numpy() == y[rows]).all()


def test_classes_have_the_names_of_their_data(tmp_path, monkeypatch):
    assert data.class_names(pictures(tmp_path / "a" / "train", {"b": 1, "a": 1}).parent) == ["a", "b"]
    assert data.class_names("some.npz") is None and len(data.class_names("shapes")) == len(data.SHAPES)

    class Known:
        def __init__(self, root, **split):
            self.classes = ["plane", "car"]

    for name, kind in (("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("stl10", "STL10")):
        monkeypatch.setattr(data.datasets, kind, Known)
        assert data.class_names(name) == ["plane", "car"]


# ----------------------------------------------------------------------------------------------------------
# Classes that are not there
# ----------------------------------------------------------------------------------------------------------
class Channels(nn.Module):
    """Logits: the mean of each channel; of the third, one more."""

    def forward(self, x):
        return x.mean((2, 3)) + torch.tensor([0.0, 0.0, 1.0])


def judged(red, green, present, y):
    """Sets of flat images with these reds and greens."""
    x = torch.zeros(len(red), 3, 8, 8, dtype=torch.uint8)
    x[:, 0] = torch.tensor(red).view(-1, 1, 1)
    x[:, 1] = torch.tensor(green).view(-1, 1, 1)
    images = data.Images(x, torch.tensor(y), len(present or "abc"))
    return sets_of.Sets(None, images, "", "", None, None, "other", present)


@pytest.mark.parametrize("attack", ["clean", "pgd20", "deepfool", "apgd"])
def test_argmax_and_gradient_are_among_the_classes_that_are_there(attack):
    """Of classes 0 and 1: exactly the images whose red and green are within 2 eps change sides."""
    shown = judged([150, 104, 100, 90], [100, 100, 104, 110], [0, 1], [0, 0, 1, 1])
    args = command.parser().parse_args(["e.pt", "--data", "x.npz", "--attacks", attack])
    conditions = sets_of.conditions(attack, args, shown, None)
    found = sets_of.measure(Channels(), shown, attack, args, conditions, None)
    assert found["accuracy"] == {"clean": 100}.get(attack, 50)
    if attack == "clean":  # among all three, each is taken for the third
        shown = judged([150, 90], [100, 110], None, [0, 1])
        assert sets_of.measure(Channels(), shown, attack, args, conditions | {"images": 2}, None)["accuracy"] == 0


def test_the_source_of_a_transferred_attack_is_masked_too():
    """Among all its classes the source is sure of the third, and the gradient of the others would vanish: of
    red and green, 12 apart, an attack of 8 must move both."""

    class Sure(Channels):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0.0, 0.0, 1e4])

    shown = judged([112, 100], [100, 112], [0, 1], [0, 1])
    args = command.parser().parse_args(["e.pt", "--data", "x.npz"])
    source = sets_of.Source(Sure(), "digest", {})
    conditions = sets_of.conditions("pgd20", args, shown, source)
    assert sets_of.measure(Channels(), shown, "pgd20", args, conditions, source)["accuracy"] == 0
    logits = sets_of.Among(Channels(), [2, 0])(torch.zeros(5, 3, 8, 8))
    assert torch.equal(logits, torch.tensor([[1.0, 0.0]]).repeat(5, 1))


def test_votes_for_classes_that_are_not_there_do_not_count():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    def flat(colours, y):
        x = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 8, 8)
        return data.Images(x, torch.tensor(y), 3)

    train = flat([[250, 10, 10], [10, 250, 10], [10, 10, 250], [200, 200, 10]], [0, 1, 2, 2])
    test = flat([[250, 150, 10], [150, 250, 10]], [0, 1])  # nearest to the last, of class 2
    assert knn.knn(Mean(), train, test, k=1) == 0
    assert knn.knn(Mean(), train, test, k=4, present=[0, 1]) == 100
    test.y = 1 - test.y
    assert knn.knn(Mean(), train, test, k=4, present=[1, 0]) == 100  # labels are places in it


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------
def columns(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    titles = [re.sub(r" [a-z-]+=\S+", "", cell.strip()) for cell in lines[0].split("|")[1:-1]]  # not what flags change
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    return dict(zip(titles[3:], cells[3:], strict=True))


def test_each_test_set_has_columns_of_its_own_and_the_classifier_is_trained_once(exported, monkeypatch, capsys):
    flags = ["--preset", "knn", "amoc-slf", "--attacks", "clean", "pgd20-4"]
    first = evaluate(exported, *flags)
    own = columns(capsys)
    (path,) = exported.glob("classifier-amoc-slf-*.pt")
    classifier = path.read_bytes()
    no_training(monkeypatch)
    other = other_npz(exported / "other.npz")
    numbers = str(pictures(exported / "v2", {"0": 4, "3": 4}, side=40))
    more = [*flags, *WORKERS, "--test-data", other, numbers]
    lines = evaluate(exported, *more)
    assert lines[: len(first)] == first and len(lines) == len(first) + 6
    assert path.read_bytes() == classifier
    new = {(line["preset"], attack, result["test_data"])
           for line in lines[len(first):] for attack, result in line["results"].items()}
    assert new == {(preset, attack, path) for path in (other, numbers) for preset, attack in (
        ("knn", "clean"), ("amoc-slf", "clean"), ("amoc-slf", "pgd20-4"))}
    table_of = columns(capsys)
    assert own.items() <= table_of.items() and list(table_of) == [
        "k-NN", "k-NN, other", "k-NN, v2", "amoc-slf clean", "amoc-slf pgd20-4", "amoc-slf clean, other",
        "amoc-slf pgd20-4, other", "amoc-slf clean, v2", "amoc-slf pgd20-4, v2"]
    assert evaluate(exported, *more) == lines and columns(capsys) == table_of  # nothing is measured again
    assert evaluate(exported, *flags) == lines and columns(capsys) == own  # and not mixed with its own images

    net = command.load_classifier(path)
    images, present = data.load_test(numbers, 4, None, size=32, workers=0)
    logits = torch.cat([net(x / 255)[:, present] for x, _ in images.stream([torch.arange(8)])])
    share = 100 * (logits.argmax(1) == images.y).float().mean().item()
    assert table_of["amoc-slf clean, v2"].split()[0] == f"{share:.2f}"

    evaluate(exported, *more, "--kept")
    assert columns(capsys) == table_of
    evaluate(exported, *flags, "--kept")
    assert columns(capsys) == own
    evaluate(exported, *more, "--kept", "--test-limit", "12")
    assert list(columns(capsys)) == [title for title in table_of if "," in title]
    with pytest.raises(ValueError, match=f"nothing was measured .* amoc-slf [^,]*pgd20-4 {other}"):
        evaluate(exported, "--attacks", "clean", "--preset", "amoc-alf", "--kept")


def test_other_images_under_the_same_name_are_measured_again(exported, monkeypatch, capsys):
    other = other_npz(exported / "other.npz")
    flags = ["--attacks", "clean", *WORKERS, "--test-data", other]
    first = evaluate(exported, *flags)
    no_training(monkeypatch)
    other_npz(exported / "other.npz", seed=6)
    second = evaluate(exported, *flags)
    assert len(second) == len(first) + 1 and evaluate(exported, *flags) == second
    with pytest.raises(ValueError, match="was measured twice, with another test"):
        evaluate(exported, *flags, "--kept")


def test_the_same_images_among_other_classes_are_another_test_set(tmp_path):
    x = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    own = data.Images(x, torch.zeros(4).long(), 4)
    shown = sets_of.Sets(own, own, "", "", None, (32, 32))
    digests = []
    for last in ("1", "3"):
        folder = pictures(tmp_path / last, {"0": 3, last: 1})
        args = command.parser().parse_args(["e.pt", *WORKERS, "--data", "x.npz", "--test-limit", "1",
                                            "--test-data", str(folder)])
        (found,) = sets_of.load_others(args, "cpu", shown)
        assert found.present == [0, int(last)] and found.test.y.tolist() == [0]  # the same picture
        digests.append(found.test_digest)
    assert digests[0] != digests[1]
    kinds = ("contrast",)
    net = sets_of.Among(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), found.present)
    assert attacks.corrupted(net, found.test, kinds)["images"] == 1  # of pictures in files too


def test_the_classes_of_a_folder_go_by_their_names(exported, capsys):
    other = pictures(exported / "sketch", {"dog": 3, "ant": 2})
    lines = evaluate(exported, "--preset", "amoc-slf", "--attacks", "clean", *WORKERS, "--image-size", "32",
                     "--test-data", str(other), images="animals")
    assert lines[-1]["results"]["clean"]["images"] == 5
    assert "5 test images, 2 of the 4 classes" in capsys.readouterr().out


def test_images_of_another_size_are_brought_to_the_side_of_the_data_and_that_is_said(exported, capsys):
    other = other_npz(exported / "large.npz", side=48)
    evaluate(exported, "--attacks", "clean", "--test-data", other)
    said = capsys.readouterr().out
    assert "12 test images, 4 of the 4 classes, of 48 x 48 pixels, brought to side 32" in said
    args = command.parser().parse_args(["e.pt", "--test-data", other])
    x = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    own = data.Images(x, torch.zeros(4).long(), 4)
    (shown,) = sets_of.load_others(args, "cpu", sets_of.Sets(own, own, "", "", None, (32, 32)))
    assert shown.test.size == 32 and shown.present is None and shown.train is own
    assert (shown.test.x - F.interpolate(data.load_test(other, 4)[0].x.float(), size=32, mode="bilinear",
                                         antialias=True)).abs().max() <= 1


def arrays(folder, **files):
    folder.mkdir()
    for name, array in files.items():
        np.save(folder / f"{name}.npy", array)
    return folder


X = pixels(4, 8, 8)
BAD = {
    "no such path": (lambda f: f / "none", "no such file or folder"),
    "no such npz": (lambda f: f / "none.npz", "none.npz: no such file"),
    "another kind": (lambda f: f / "encoder.pt", "must be an .npz, a <name>_data.npy, or a folder"),
    "a class that training has not": (lambda f: pictures(f / "o", {"ant": 1, "eel": 1}),
                                      "class 'eel' is none of the 4 of training; they are named ant, bee, cat"),
    "one class": (lambda f: pictures(f / "o", {"ant": 2}), "all of one class"),
    "an empty class": (lambda f: pictures(f / "o", {"ant": 2, "bee": 0}), "class 'bee' has no images"),
    "no labels": (lambda f: pictures(f / "o", {"ant": 2}) / "ant", "holds no class folders"),
    "npz without labels": (lambda f: other_npz(f / "o.npz", y_test=None), "y_test is not in it"),
    "npz without images": (lambda f: other_npz(f / "o.npz", x_test=None), "x_test is not in it"),
    "labels out of range": (lambda f: other_npz(f / "o.npz", classes=5),
                            "labels go from 0 to 4; training has classes 0 to 3"),
    "labels below zero": (lambda f: other_npz(f / "o.npz", y_test=np.arange(12) % 4 - 1), "labels go from -1 to 2"),
    "labels of another number": (lambda f: other_npz(f / "o.npz", y_test=np.arange(11) % 4), r"integers \(12,\)"),
    "labels that are floats": (lambda f: other_npz(f / "o.npz", y_test=np.zeros(12)), r"integers \(12,\)"),
    "images that are floats": (lambda f: other_npz(f / "o.npz", x_test=np.zeros((12, 8, 8, 3))), "must be uint8"),
    "an array without labels": (lambda f: arrays(f / "o", v6_data=X), "v6_labels.npy: no such file"),
    "two arrays": (lambda f: arrays(f / "o", v4_data=X, v6_data=X), "holds v4_data.npy and v6_data.npy; give one"),
    "an array of another shape": (lambda f: arrays(f / "o", v6_data=X[0], v6_labels=X[0, 0, 0]), "must be uint8"),
}


@pytest.mark.parametrize("make, words", BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_test_set_is_one_line_before_anything_is_trained(exported, monkeypatch, make, words):
    no_training(monkeypatch)
    path = str(make(exported))
    with pytest.raises((ValueError, OSError), match=words) as error:
        evaluate(exported, "--attacks", "clean", *WORKERS, "--image-size", "32", "--test-data", path, images="animals")
    assert str(error.value).startswith("--test-data") and "\n" not in str(error.value) and path in str(error.value)


def test_public_corruptions_are_of_no_other_test_set():
    args = command.parser().parse_args(["e.pt", "--test-data", "a/val", "b/val", "c.npz", "--attacks", "c", "clean"])
    assert flags_of.attacks_on(args, "amoc-slf") == ["c", "clean"]
    assert flags_of.attacks_on(args, "amoc-slf", "a/val") == ["clean"]
    assert list(flags_of.titles(args).values()) == [
        "amoc-slf c", "amoc-slf clean", "amoc-slf epoch",
        "amoc-slf clean, a/val", "amoc-slf clean, b/val", "amoc-slf clean, c"]
    args = command.parser().parse_args(["e.pt", "--test-data", "c.npz", "--attacks", "c"])
    with pytest.raises(ValueError, match="--test-data: .* no public corruptions"):
        flags_of.check(args)


def test_curves_and_other_readers_see_the_datas_own_images_alone(tmp_path):
    lines = [{"preset": "slf", "results": {"clean": {"accuracy": a, "stderr": 1, **more}}}
             for a, more in ((1, {}), (2, {"test_data": "o", "test": "b"}))]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert table.read_folder(tmp_path) == {("slf", "clean"): lines[0]["results"]["clean"]}
    assert table.read_folder(tmp_path, others=True).keys() == {("slf", "clean"), ("slf", "clean", "o")}
    key = {"preset": "slf"}
    path = tmp_path / "eval.jsonl"
    assert table.find(path, key, "clean", {"test_data": None})["accuracy"] == 1  # as lines of older versions
    assert table.find(path, key, "clean", {"test_data": "o", "test": "b"})["accuracy"] == 2
    assert table.find(path, key, "clean", {"test_data": "o", "test": "c"}) is None


# ----------------------------------------------------------------------------------------------------------
# Corruptions kind by kind
# ----------------------------------------------------------------------------------------------------------
def test_c19_reads_all_nineteen_files_and_is_not_c(exported, monkeypatch):
    load = data.load
    monkeypatch.setattr(data, "load", lambda name, *rest: load(
        str(exported / "tiny.npz") if name == "cifar10" else name, *rest))
    folder = exported / "CIFAR-10-C"
    folder.mkdir()
    for i, kind in enumerate(corruptions.MAIN + corruptions.EXTRA):
        np.save(folder / f"{kind}.npy", pixels(100, 32, 32, seed=i))
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 4, 5))
    args = [str(exported / "encoder.pt"), *PROBE, "--data-dir", str(exported), "--attacks", "c"]
    other = ["--test-data", other_npz(exported / "other.npz")]
    command.main([*args, "c19", "clean", *other])
    c, c19, *rest = table.lines(exported / "eval.jsonl")
    assert [list(line["results"]) for line in rest] == [["clean"], ["clean"]]  # of other sets there is no c
    c, c19 = c["results"]["c"], c19["results"]["c19"]
    assert len(c["kinds"]) == 15 and len(c19["kinds"]) == 19 and c["files"] != c19["files"]
    assert c["kinds"].items() <= c19["kinds"].items()
    assert c19["accuracy"] == pytest.approx(sum(c19["kinds"].values()) / 19, abs=0.02)
    assert c["files"] == sets_of.public_contents(command.parser().parse_args(args))  # as older versions have it
    path = folder / "spatter.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    command.main([*args, "c19"])
    lines = table.lines(exported / "eval.jsonl")
    assert len(lines) == 5 and list(lines[-1]["results"]) == ["c19"]  # c does not read it
    path.unlink()
    with pytest.raises(FileNotFoundError, match="spatter.npy: no such file"):
        command.main([*args, "c19"])
    command.main(args)
    with pytest.raises(ValueError, match="--attacks c: there is a CIFAR-10-C"):
        command.main([*args, "c19", "--data", "shapes"])


def test_kinds_are_a_table_with_a_row_for_each_encoder(tmp_path, capsys):
    for name, low in (("a", 10), ("b", 30)):
        (tmp_path / name).mkdir()
        found = {"accuracy": low + 1, "stderr": 1, "kinds": {"fog": low, "zoom_blur": low + 2}}
        files.append_json_line(tmp_path / name / "eval.jsonl", {"preset": "amoc-slf", "seed": 0, "results": {
            "c-like": found, "clean": {"accuracy": 99, "stderr": 1}}})
    folders = [str(tmp_path / name) for name in "ab"]
    command.main([*folders, "--kinds", "--attacks", "clean", "c-like"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["| amoc-slf c-like | mean | fog | zoom blur |", "| --- | --- | --- | --- |",
                    f"| [a]({folders[0]}) | 11.00 | 10.00 | 12.00 |", f"| [b]({folders[1]}) | 31.00 | 30.00 | 32.00 |"]
    with pytest.raises(ValueError, match="--kinds: name corruptions by --attacks: c, c-like, c19, c17-like"):
        command.main([*folders, "--kinds"])
    for flags in (["--attacks", "c19"], ["--attacks", "c-like", "--seed", "1"]):
        with pytest.raises(ValueError, match="nothing was measured"):
            command.main([*folders, "--kinds", *flags])
