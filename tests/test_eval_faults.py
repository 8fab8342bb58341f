"""What an evaluation must notice, refuse or survive: damaged, foreign and changed files, data that do not
suit, numbers that are not finite, other processes, signals."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import eval as command
from common import data, encoders, files, resnet
from evaluation import attacks, corruptions, finetune, flags as flags_of, knn, presets, results, sets as sets_of, table
from tests.scripts import tiny_npz

SHORT = "epochs=1-milestones=none-batch-size=16"  # what it changes, as it is in the names of files
PROBE = ["--device", "cpu", "--epochs", "1", "--milestones", "--batch-size", "16"]


def export(path, image_size=None, branches=("clean", "adv")):
    torch.manual_seed(0)
    encoder = encoders.make("slim", branches=branches)
    with resnet.branch(encoder, "adv"):
        encoder(torch.rand(8, 3, 32, 32))
    encoders.export(encoder, path, "adv", image_size)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    export(folder / "encoder.pt")
    tiny_npz(folder / "tiny.npz")
    return folder


@pytest.fixture
def exported(template, tmp_path):
    """A folder with encoder.pt and tiny.npz."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


def npz(path, x, y, x_test=None, y_test=None):
    x_test = x[:20] if x_test is None else x_test
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y[: len(x_test)] if y_test is None else y_test)
    return str(path)


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape, 3), dtype=np.uint8)


def evaluate(folder, *more, encoder="encoder.pt", images="tiny.npz"):
    """The lines of eval.jsonl after `eval.py encoder more`."""
    command.main([str(folder / encoder), "--data", str(folder / images), *PROBE, *more])
    return table.lines(folder / "eval.jsonl")


def no_training(monkeypatch):
    def fail(*args):
        raise AssertionError("it trains a classifier")

    monkeypatch.setattr(command, "train", fail)


# ----------------------------------------------------------------------------------------------------------
# Public corruptions: whole contents, labels
# ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def public(exported, monkeypatch):
    """CIFAR-10 is tiny.npz, and there are corruptions of it."""
    load = data.load

    def stand_in(name, *rest):
        return load(str(exported / "tiny.npz") if name == "cifar10" else name, *rest)

    monkeypatch.setattr(data, "load", stand_in)
    folder = exported / "CIFAR-10-C"
    folder.mkdir()
    for i, kind in enumerate(corruptions.MAIN):
        np.save(folder / f"{kind}.npy", pixels(100, 32, 32, seed=i))
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 4, 5))
    return exported


def corrupted(folder, *more):
    command.main([str(folder / "encoder.pt"), *PROBE, "--data-dir", str(folder), "--attacks", "c", *more])
    return table.lines(folder / "eval.jsonl")


def test_public_corruptions_are_measured_again_when_any_byte_of_them_is_another(public, capsys):
    first = corrupted(public)
    assert corrupted(public) == first and len(first) == 1
    for kind in (corruptions.MAIN[0], corruptions.MAIN[-1]):
        path = public / "CIFAR-10-C" / f"{kind}.npy"
        time = path.stat().st_mtime_ns
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 255  # beyond the first 64 KiB, of equal size and date
        path.write_bytes(whole)
        os.utime(path, ns=(time, time))
        assert len(corrupted(public)) == len(first) + 1
        first = table.lines(public / "eval.jsonl")
    assert len({line["results"]["c"]["files"] for line in first}) == 3


def test_public_corruptions_are_read_once_a_process(public, monkeypatch):
    args = command.parser().parse_args(["e.pt", "--data-dir", str(public)])
    first = sets_of.public_contents(args)
    monkeypatch.setattr("builtins.open", None)
    assert sets_of.public_contents(args) == first


ORDER = np.arange(20) % 4
WRONG = {
    "another order": np.tile(ORDER[::-1], 5),
    "shuffled as the images are": np.tile(ORDER[data.fixed_order(20)], 5),
    "beyond the classes": np.tile(ORDER + 4, 5), "floats": np.tile(ORDER, 5).astype(np.float32),
    "one severity alone": np.concatenate([np.tile(ORDER, 4), ORDER[::-1]]), "all one": np.zeros(100, int)}


@pytest.mark.parametrize("labels", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("more", [[], ["--test-limit", "7"]], ids=["all", "limit"])
def test_labels_that_are_not_the_test_sets_are_refused_before_training(public, monkeypatch, labels, more):
    np.save(public / "CIFAR-10-C" / "labels.npy", labels)
    no_training(monkeypatch)
    with pytest.raises(ValueError, match="labels"):
        corrupted(public, *more)


def test_labels_that_are_the_test_sets_pass_with_a_limit_too(public):
    lines = corrupted(public, "--test-limit", "7")
    assert lines[0]["results"]["c"]["images"] == 7


@pytest.mark.parametrize("kind", [corruptions.MAIN[0], corruptions.MAIN[-1]])
def test_a_missing_or_cut_file_of_corruptions_is_named_before_training(public, monkeypatch, kind):
    path = public / "CIFAR-10-C" / f"{kind}.npy"
    no_training(monkeypatch)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{kind}.npy: not a readable"):
        corrupted(public)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{kind}.npy: no such file"):
        corrupted(public)


def test_public_corruptions_are_read_as_they_lie(tmp_path):
    array = pixels(20, 8, 8)
    np.save(tmp_path / "fog.npy", array)
    np.save(tmp_path / "labels.npy", np.arange(20))
    for severity in range(1, 6):
        x, y = corruptions.read(tmp_path, "fog", severity)
        for i in range(4):
            n = 4 * (severity - 1) + i
            assert y[i] == n and x[i, 2, 5, 1] == array[n, 5, 1, 2] and x[i, 0, 0, 7] == array[n, 0, 7, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool])
def test_labels_of_corruptions_are_whole_numbers(tmp_path, dtype):
    np.save(tmp_path / "fog.npy", pixels(20, 32, 32))
    np.save(tmp_path / "labels.npy", (np.arange(20) % 2).astype(dtype))
    with pytest.raises(ValueError, match="labels"):
        corruptions.read(tmp_path, "fog", 1)


# ----------------------------------------------------------------------------------------------------------
# What is not finite
# ----------------------------------------------------------------------------------------------------------
class Constant(nn.Module):
    """Logits that say class 1, or `value` for images that are brighter than `above`."""

    dim = 2

    def __init__(self, value=float("nan"), above=-1.0):
        super().__init__()
        self.value = value
        self.above = above

    def forward(self, x):
        logits = torch.stack([0 * x.mean((1, 2, 3)), 1 + 0 * x.mean((1, 2, 3))], 1)
        broken = x.amax((1, 2, 3)) > self.above
        return torch.where(broken[:, None], torch.full_like(logits, self.value), logits)


def zeros(n, side=8, level=0):
    """Black images, of class 0."""
    return data.Images(torch.full((n, 3, side, side), level, dtype=torch.uint8), torch.zeros(n).long(), 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("attack", [None, "pgd20", "pgd20-l2", "pgd20-l1", "deepfool", "apgd"])
def test_clean_logits_that_are_not_finite_are_refused(value, attack):
    """They are not class 0."""
    net = Constant(value)
    net.path = "runs/x/classifier.pt"
    with pytest.raises(ValueError, match="runs/x/classifier.pt: its output for clean images is not finite"):
        attacks.judge(net, zeros(3), attacks.ATTACKS.get(attack))


def test_the_batch_that_is_not_finite_is_named():
    images = zeros(1200)
    images.x[1100] = 255
    with pytest.raises(ValueError, match="image 1100, batch 2"):
        attacks.judge(Constant(above=0.5), images)


@pytest.mark.parametrize("attack", ["pgd20", "pgd20-l2", "deepfool"])
def test_an_attacked_image_without_finite_logits_counts_as_fooled_and_is_told(attack, monkeypatch):
    """Its argmax is class 0, the right one."""
    monkeypatch.setattr(attacks, "attacked", lambda net, x, y, *rest: (x + 0.01, {}))
    images = zeros(5)
    images.x[4] = 128

    class Right(Constant):  # of class 0, until it fails
        def forward(self, x):
            slope = x.mean((1, 2, 3))[:, None] * torch.tensor([0.01, -0.01])  # else PGD would see no gradient
            return super().forward(x).flip(1) + slope

    found = attacks.judge(Right(above=0.505), images, attacks.ATTACKS[attack])
    assert found["accuracy"] == 80
    assert found["warnings"] == ["1 attacked images have logits that are not finite, and count as fooled"]
    healthy = attacks.judge(Right(above=2), images, attacks.ATTACKS[attack])
    assert healthy["accuracy"] == 100 and "warnings" not in healthy


def test_an_attack_without_finite_gradients_is_told_too(monkeypatch):
    """PGD goes where the logits are not finite, and its image is none any more."""
    class Root(nn.Module):
        def forward(self, x):
            z = (x.sum((1, 2, 3)) - 0.1).sqrt()  # of the clean image finite
            return torch.stack([z, 0 * z], 1)

    images = zeros(2, level=1)
    found = attacks.judge(Root(), images, attacks.ATTACKS["pgd20"])
    assert found["accuracy"] == 0 and "2 attacked images" in found["warnings"][0]


@pytest.mark.parametrize("attack", ["pgd20", "pgd20-l2", "pgd20-l1"])
def test_a_network_that_the_attack_cannot_see_through_is_not_called_robust(attack):
    """Its logits are right and finite, for NaN too; the gradient is not. PGD would leave each image where it is."""
    class Hidden(nn.Module):
        def forward(self, x):
            z = (0 * x.nan_to_num().abs().sum((1, 2, 3))).sqrt()
            return torch.stack([1 + z, z], 1)

    assert attacks.judge(Hidden(), zeros(3, level=9))["accuracy"] == 100
    found = attacks.judge(Hidden(), zeros(3, level=9), attacks.ATTACKS[attack])
    assert found["accuracy"] == 0
    assert found["warnings"] == ["3 attacked images are NaN, as the gradient of the attack was, and count as fooled"]


def test_features_that_are_not_finite_are_refused_in_knn():
    good = data.Images(torch.zeros(600, 3, 8, 8, dtype=torch.uint8), torch.arange(600) % 2, 2)
    bad = data.Images(good.x.clone(), good.y, 2)
    bad.x[550] = 255
    net = Constant(above=0.5)
    assert knn.knn(net, good, good, k=600) == 50  # all alike
    for sets, name in (((bad, good), "training"), ((good, bad), "test")):
        with pytest.raises(ValueError, match=f"{name} images is not finite, first of image 550, batch 1"):
            knn.knn(net, *sets)


@pytest.mark.parametrize("public_files", [False, True])
def test_corrupted_images_without_finite_logits_are_refused(tmp_path, public_files):
    np.save(tmp_path / "contrast.npy", np.full((20, 32, 32, 3), 200, np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(20, int))
    images = zeros(4, 32, 200)
    with pytest.raises(ValueError, match="images under contrast, severity 1, is not finite"):
        attacks.corrupted(Constant(above=0.5), images, ("contrast",), tmp_path if public_files else None)


def test_no_epoch_is_chosen_by_logits_that_are_not_finite():
    """In train mode all is well; in eval mode, in which the epoch is chosen, nothing is."""
    class Hidden(nn.Module):
        dim = 3

        def forward(self, x):
            h = x.mean((2, 3))
            return h if self.training else h * float("nan")

    net = finetune.Classifier(Hidden(), 2)
    p = presets.PRESETS["acl-aff-25"]._replace(epochs=2, milestones=(), batch_size=16, loss="clean")
    with pytest.raises(ValueError, match="not finite"):
        command.train(net, zeros(40), p, seed=0)


def test_a_classifier_that_breaks_in_its_last_step_is_refused():
    """Its loss was finite: that of the step before."""
    class Loud(Constant):
        def forward(self, x):
            return 1000 * super().forward(x)

    net = finetune.Classifier(Loud(above=2), 2)
    p = presets.PRESETS["amoc-slf"]._replace(epochs=1, milestones=(), batch_size=16, lr=1e38)
    with pytest.raises(ValueError, match="the classifier's head.* is not finite after training; try a lower --lr"):
        command.train(net, zeros(16), p, seed=0)


def test_the_sanity_check_doubts_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(attacks, "attacked", lambda net, x, *rest, batch_size=500: (x + 1, {}))
    found = attacks.sanity(Constant(above=0.5), zeros(2), attacks.ATTACKS["aa"], 0, 2, 500, 0)
    assert len(found["doubts"]) == 3 and all("not finite" in text for text in found["doubts"])


@pytest.mark.parametrize("preset", ["knn", "amoc-slf", "robustssl-aff"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_encoder_with_a_weight_that_is_not_finite_is_refused(exported, preset, value):
    path = exported / "encoder.pt"
    saved = files.load(path)
    saved["state"]["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    files.save(saved, path)
    with pytest.raises(ValueError, match="encoder.pt.*finite"):
        evaluate(exported, "--preset", preset, "--attacks", "clean")


def test_a_classifier_with_a_weight_that_is_not_finite_is_refused(exported):
    evaluate(exported, "--attacks", "clean")
    path = exported / f"classifier-amoc-slf-{SHORT}-adv.pt"
    saved = files.load(path)
    saved["state"]["head.bias"][1] = float("nan")
    files.save(saved, path)
    with pytest.raises(ValueError, match=f"classifier-amoc-slf-{SHORT}-adv.pt: .*head.bias is not finite"):
        command.load_classifier(path)
    with pytest.raises(ValueError, match="head.bias is not finite"):
        evaluate(exported, "--attacks", "pgd20", "--source", str(path))


# ----------------------------------------------------------------------------------------------------------
# Sizes
# ----------------------------------------------------------------------------------------------------------
def test_each_encoder_is_judged_at_its_own_side_and_the_data_loaded_once_for_each(
        tmp_path, monkeypatch, capsys):
    npz(tmp_path / "big.npz", pixels(44, 64, 64), np.arange(44) % 4)
    for name, size in (("a", 32), ("b", 64), ("c", 32), ("d", None)):
        (tmp_path / name).mkdir()
        export(tmp_path / name / "encoder.pt", size)
    loaded = []
    load = data.load
    monkeypatch.setattr(data, "load", lambda name, root, split, *rest: loaded.append(split) or load(
        name, root, split, *rest))
    seen = []
    judge = attacks.judge
    monkeypatch.setattr(attacks, "judge", lambda net, images, *rest, **more: seen.append(
        (images.x.shape[2], net.encoder.dim)) or judge(net, images, *rest, **more))
    paths = [str(tmp_path / name / "encoder.pt") for name in "abcd"]
    flags = ["--data", str(tmp_path / "big.npz"), *PROBE, "--attacks", "clean"]
    command.main([*paths, *flags])
    said = capsys.readouterr().out
    assert [side for side, _ in seen] == [32, 64, 32, 64]
    assert sorted(loaded) == 3 * ["labelled"] + 3 * ["test"]
    lines = {name: table.lines(tmp_path / name / "eval.jsonl")[0] for name in "abcd"}
    assert [line["image_size"] for line in lines.values()] == [32, 64, 32, None]
    assert lines["a"]["results"] == lines["c"]["results"] and lines["b"]["train"] == lines["d"]["train"]
    for name, told in (("a", True), ("b", False), ("c", True), ("d", False)):
        line = "was pretrained at 32; the images, of side 64, are brought to 32"
        assert (f"{tmp_path / name / 'encoder.pt'} {line}" in said) == told
    assert "44 training and 20 test images of side 64, 4 classes" in said
    files_of = [tmp_path / name / f"classifier-amoc-slf-{SHORT}-adv.pt" for name in "abcd"]
    assert [command.load_classifier(file).image_size for file in files_of] == [32, 64, 32, 64]

    command.main([paths[0], *flags, "--image-size", "48"])
    assert table.lines(tmp_path / "a" / "eval.jsonl")[-1]["image_size"] == 48
    assert "was pretrained at 32; it is judged on images of side 48" in capsys.readouterr().out


NOT_SQUARE = {"both": ((32, 48), (32, 48)), "test alone": ((32, 32), (32, 48)),
              "two sizes": ((32, 32), (48, 48))}


@pytest.mark.parametrize("shapes", NOT_SQUARE.values(), ids=NOT_SQUARE)
@pytest.mark.parametrize("flags", [["--preset", "knn"], ["--preset", "mae-slf-cifar", "--attacks", "clean"],
                                   ["--attacks", "c-like"], ["--attacks", "aa"]], ids=lambda v: v[1])
def test_images_that_are_not_square_or_of_two_sizes_are_refused_at_the_start(
        exported, monkeypatch, shapes, flags):
    train, test = shapes
    npz(exported / "x.npz", pixels(44, *train), np.arange(44) % 4, pixels(20, *test))
    no_training(monkeypatch)
    monkeypatch.setattr(knn, "knn", None)
    with pytest.raises(ValueError, match="--image-size"):
        evaluate(exported, *flags, images="x.npz")


def test_images_that_are_not_square_can_be_brought_to_a_side(exported):
    npz(exported / "x.npz", pixels(44, 32, 48), np.arange(44) % 4)
    flags = ["--preset", "mae-slf-cifar", "--attacks", "clean", "--image-size", "32"]
    lines = evaluate(exported, *flags, images="x.npz")
    assert lines[0]["image_size"] == 32


@pytest.mark.parametrize("flags, side, words", [
    (["--preset", "amoc-slf"], 4, "amoc-slf: reflects 4 pixels"),
    (["--preset", "knn", "amoc-aff"], 3, "amoc-aff: reflects 4 pixels"),
    (["--preset", "robustssl-slf", "--attacks", "aa"], 4, "--attacks aa: AutoAttack needs images of side 5"),
    (["--attacks", "c-like"], 16, "constants are for side 32, not 16")])
def test_images_that_are_too_small_are_refused_at_the_start(exported, monkeypatch, flags, side, words):
    npz(exported / "x.npz", pixels(44, side, side), np.arange(44) % 4)
    no_training(monkeypatch)
    monkeypatch.setattr(knn, "knn", None)
    with pytest.raises(ValueError, match=words):
        evaluate(exported, *flags, images="x.npz")


def test_small_images_are_trained_on_where_nothing_is_reflected(exported):
    npz(exported / "x.npz", pixels(44, 4, 4), np.arange(44) % 4)
    assert len(evaluate(exported, "--preset", "robustssl-slf", "--attacks", "clean", images="x.npz")) == 1


def test_what_the_encoder_cannot_take_is_refused_before_anything_is_measured(exported, monkeypatch):
    """The second of two: the patch does not divide the side."""
    (exported / "vit").mkdir()
    encoders.export(encoders.make("vit_slim"), exported / "vit" / "encoder.pt")
    npz(exported / "x.npz", pixels(44, 30, 30), np.arange(44) % 4)
    no_training(monkeypatch)
    with pytest.raises(ValueError, match="patch size 4"):
        command.main([str(exported / "encoder.pt"), str(exported / "vit" / "encoder.pt"), *PROBE,
                         "--data", str(exported / "x.npz")])


# ----------------------------------------------------------------------------------------------------------
# Data, classes, sources
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [0, 3])
@pytest.mark.parametrize("preset", ["knn", "amoc-slf"])
def test_an_evaluation_needs_two_classes(exported, label, preset):
    npz(exported / "x.npz", pixels(44, 32, 32), np.full(44, label))
    with pytest.raises(ValueError, match="x.npz: the training images are all of one class; an evaluation"):
        evaluate(exported, "--preset", preset, images="x.npz")


def test_too_few_images_to_hold_any_out_are_refused(exported):
    with pytest.raises(ValueError, match="acl-aff-25: holds out"):
        evaluate(exported, "--preset", "acl-aff-25", "--limit", "4", "--batch-size", "2")


@pytest.fixture
def other(exported):
    """A classifier of other data with as many classes, in a folder of its own."""
    (exported / "other").mkdir()
    shutil.copy(exported / "encoder.pt", exported / "other")
    npz(exported / "other" / "other.npz", pixels(44, 32, 32, seed=9), np.arange(44) % 4)
    evaluate(exported / "other", "--attacks", "clean", images="other.npz")
    return exported / "other" / f"classifier-amoc-slf-{SHORT}-adv.pt"


def test_a_source_of_other_data_is_refused(exported, other, monkeypatch):
    no_training(monkeypatch)
    with pytest.raises(ValueError, match=f"--source {other}: was trained on .*other.npz, not on .*tiny.npz"):
        evaluate(exported, "--attacks", "pgd20", "--source", str(other))


@pytest.mark.parametrize("made, words", [
    (None, "does not say on which data"), ("not JSON", "does not say on which data"),
    ("[1]", "does not say on which data"), ("same name", "other images of")])
def test_a_source_of_unknown_data_is_a_warning_in_the_result(exported, other, made, words, capsys):
    net = command.load_classifier(other)
    if made == "same name":
        made = json.dumps({**json.loads(net.made), "data": str(exported / "tiny.npz")})
    results.save_classifier(net, other, made)
    (line,) = evaluate(exported, "--attacks", "pgd20", "--source", str(other))
    assert len(line["results"]["pgd20"]["warnings"]) == 1 and words in line["results"]["pgd20"]["warnings"][0]
    assert words in capsys.readouterr().out
    lines = evaluate(exported, "--attacks", "clean", "--source", str(other))
    assert "warnings" not in lines[-1]["results"]["clean"]  # which is not transferred


def test_a_source_of_the_same_data_under_another_name_or_limit_is_taken(exported, monkeypatch):
    evaluate(exported, "--attacks", "clean")
    source = str(exported / f"classifier-amoc-slf-{SHORT}-adv.pt")
    shutil.move(source, exported / "s.pt")
    shutil.copy(exported / "tiny.npz", exported / "copy.npz")
    lines = evaluate(exported, "--attacks", "pgd20", "--source", str(exported / "s.pt"), images="copy.npz")
    assert "warnings" not in lines[-1]["results"]["pgd20"]
    args = command.parser().parse_args(["e.pt", "--data", "shapes", "--source", "s.pt"])
    sets = sets_of.Sets(zeros(4), zeros(4), "now", "test", None, (8, 8))
    net = command.load_classifier(exported / "s.pt")
    net.head, net.image_size = nn.Linear(2, 2), None
    source = sets_of.Source(net, "d", {"data": "shapes", "train": "then"})
    assert sets_of.doubts_of(source, args, sets) == []


def test_a_source_for_another_side_is_refused(exported):
    evaluate(exported, "--attacks", "clean")
    with pytest.raises(ValueError, match="--source .*: was trained on images of side 32, the attacked are of"):
        evaluate(exported, "--attacks", "pgd20", "--image-size", "16",
                 "--source", str(exported / f"classifier-amoc-slf-{SHORT}-adv.pt"))


# ----------------------------------------------------------------------------------------------------------
# Classifiers: names and branches
# ----------------------------------------------------------------------------------------------------------
def test_warnings_of_every_restart_are_kept_once(monkeypatch):
    texts = iter([["a", "b"], ["b", "c"], []])

    def attacked(net, x, y, *rest):
        return x, {"warnings": next(texts), "stages": {}, "standing": len(y) * [True]}

    monkeypatch.setattr(attacks, "attacked", attacked)
    found = attacks.judge(Constant(above=2), zeros(3), attacks.ATTACKS["apgd"], restarts=3)
    assert found["warnings"] == ["a", "b", "c"]


def test_both_branches_and_one_alone_have_classifiers_of_their_own(exported):
    evaluate(exported, "--preset", "robustssl-aff", "--attacks", "clean")
    evaluate(exported, "--preset", "robustssl-aff", "--attacks", "clean", "--bn", "adv")
    evaluate(exported, "--preset", "robustssl-aff", "--attacks", "clean", "--bn", "clean")
    names = sorted(path.name for path in exported.glob("classifier-*"))
    assert names == [f"classifier-robustssl-aff-{SHORT}-{bn}.pt" for bn in ("adv", "clean", "dual")]


@pytest.mark.parametrize("loss", ["pgd", "trades", "clean"])
def test_dual_batchnorm_shows_each_branch_its_own_images_whatever_the_loss(exported, loss):
    """Against two networks of plain BatchNorm: attacked images go through "adv", clean ones through "clean"."""
    from common.pgd import pgd
    F = nn.functional
    nets = [finetune.Classifier(encoders.load_encoder(exported / "encoder.pt", bn), 3).train()
            for bn in ("clean", "adv")]
    net = finetune.Classifier(encoders.load_encoder(exported / "encoder.pt", all_branches=True), 3).train()
    for part in nets:
        part.head.load_state_dict(net.head.state_dict())
    clean, adv = nets
    with torch.no_grad():  # so that it matters which branch is asked
        for norm in (m for m in adv.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.mul_(0.5)
        for norm in (m for m in net.modules() if isinstance(m, resnet.BranchNorm)):
            norm.branches["adv"].weight.mul_(0.5)
            norm.branch = "clean" if loss == "pgd" else "adv"  # not the one that is to be asked
    p = presets.PRESETS["robustssl-aff"]._replace(loss=loss, uniform=True)
    x, y, noise = torch.rand(6, 3, 32, 32), torch.arange(6) % 3, torch.rand(6, 3, 32, 32)
    clean.eval(), adv.eval()
    target = clean(x).detach()

    def climb(v):
        return F.cross_entropy(adv(v), y) if loss == "pgd" else command.kl(target, adv(v))

    x_adv = pgd(climb, x, 8 / 255, 2 / 255, 10, start=(x + (2 * noise - 1) * 8 / 255).clamp(0, 1))
    clean.train(), adv.train()
    want = {"pgd": lambda: F.cross_entropy(adv(x_adv), y), "clean": lambda: F.cross_entropy(clean(x), y),
            "trades": lambda: command.trades(clean(x), adv(x_adv), y)}[loss]()
    torch.testing.assert_close(command.classifier_loss(net, x, y, p, noise), want)


def test_a_damaged_classifier_is_seen_and_trained_again(exported, monkeypatch, capsys):
    first = evaluate(exported, "--attacks", "clean")
    path = exported / f"classifier-amoc-slf-{SHORT}-adv.pt"
    whole = bytearray(path.read_bytes())
    at = whole.find(np.float32(files.load(path)["state"]["head.weight"][0, 0]).tobytes())
    whole[at] ^= 64
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"classifier-amoc-slf-{SHORT}-adv.pt: is damaged"):
        command.load_classifier(path)
    with pytest.raises(ValueError, match=f"classifier-amoc-slf-{SHORT}-adv.pt: is damaged"):
        evaluate(exported, "--attacks", "pgd20-1", "--source", str(path))
    evaluate(exported, "--attacks", "pgd20-1")
    assert "is damaged" in capsys.readouterr().out
    net = command.load_classifier(path)
    images = data.load(str(exported / "tiny.npz"), split="test")
    assert attacks.judge(net, images)["accuracy"] == first[0]["results"]["clean"]["accuracy"]


# ----------------------------------------------------------------------------------------------------------
# eval.jsonl and log.jsonl that are damaged; several encoders in one folder
# ----------------------------------------------------------------------------------------------------------
FOREIGN = b"\n".join([
    b"5", b"[1, 2]", b'{"results": {}}', b'{"preset": "amoc-slf", "results": 7}',
    b'{"preset": "a", "results": {"clean": 1}}', b'{"preset": "amoc-slf", "results": {"clean": {"accuracy": NaN}}}',
    b"\xff\xfe", b'{"preset": 1, "results": {}}', b'{"results": {"clean": {"accuracy": 1.0}}}', b"null", b"\n"])


@pytest.mark.parametrize("where", ["before", "after", "torn"])
def test_foreign_lines_of_a_result_file_are_named_and_left_out(exported, where, capsys, monkeypatch):
    first = evaluate(exported, "--attacks", "clean")
    path = exported / "eval.jsonl"
    row = capsys.readouterr().out.splitlines()[-1]
    whole = path.read_bytes()
    path.write_bytes({"before": FOREIGN + whole, "after": whole + FOREIGN,
                      "torn": whole + whole[: len(whole) // 2]}[where])
    with monkeypatch.context() as m:
        no_training(m)
        evaluate(exported, "--attacks", "clean")
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == row
    numbers = {"before": range(1, 11), "after": range(2, 12), "torn": [2]}[where]
    assert f"eval.jsonl: line {', '.join(map(str, numbers))} holds no result, and is left out" in said.err
    command.main([str(exported), "--kept", "--attacks", "clean"])
    assert capsys.readouterr().out.splitlines()[-1] == row
    lines = evaluate(exported, "--attacks", "pgd20-1")
    good = [line for line in lines if table.results(line)]
    assert good[:1] == first and [list(line["results"]) for line in good] == [["clean"], ["pgd20-1"]]


LOGS = {"no object": b"5\n[1]\n", "not UTF-8": b"\xff\xfe", "no flags": b'{"command": "python amoc.py"}\n',
        "flags of no kind": b'{"flags": 5}', "torn": b'{"flags": {"seed": 0}, "comm',
        "only flags": b'{"flags": {"seed": 0}}\n{"epoch": 0}\n{"epoch": 1, "seconds": "long"}\n',
        "no words": b'{"flags": {"seed": [1]}, "command": "", "device": 5}\n',
        "one word": b'{"flags": {}, "command": "python ", "device": null}\n{"seconds": true}\n'}


@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
def test_a_damaged_log_costs_no_table(exported, log, capsys):
    (exported / "log.jsonl").write_bytes(log)
    evaluate(exported, "--attacks", "clean")
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(f"| [{exported.name}]({exported}) | 1 |  | ")


def test_encoders_in_one_folder_are_told_apart(exported, capsys, monkeypatch):
    folder = exported / "encoders"
    folder.mkdir()
    shutil.copy(exported / "encoder.pt", folder / "a.pt")
    torch.manual_seed(1)
    encoders.export(encoders.make("slim"), folder / "b.pt")
    flags = ["--data", str(exported / "tiny.npz"), *PROBE, "--attacks", "clean", "--preset", "knn", "amoc-slf"]
    command.main([*map(str, sorted(folder.glob("*.pt"))), *flags])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| [{n}]({folder / n}.pt)" for n in "ab"]
    names = {path.name for path in folder.glob("classifier-*")}
    assert names == {f"classifier-a-amoc-slf-{SHORT}-adv.pt", f"classifier-b-amoc-slf-{SHORT}.pt"}

    for paths in (sorted(folder.glob("*.pt")), [folder]):  # now there are classifiers among them
        command.main([*map(str, paths), *flags, "--kept"])
        assert capsys.readouterr().out.splitlines()[-2:] == rows
    command.main([str(folder / "b.pt"), *flags, "--kept"])
    assert capsys.readouterr().out.splitlines()[-1] == rows[1]
    with monkeypatch.context() as m:
        no_training(m)
        m.setattr(knn, "knn", None)
        command.main([*map(str, sorted(folder.glob("*.pt"))), *flags])
        assert capsys.readouterr().out.splitlines()[-2:] == rows
    shutil.copy(folder / "a.pt", folder / "c.pt")  # its twin has results of its own
    command.main([str(folder / "c.pt"), *flags])
    names = [table.file_of(line) for line in table.lines(folder / "eval.jsonl")]
    assert names == 2 * ["a.pt"] + 2 * ["b.pt"] + 2 * ["c.pt"]


def test_another_encoder_under_the_same_name_does_not_get_its_results(exported, capsys):
    first = evaluate(exported, "--attacks", "clean")
    torch.manual_seed(5)
    encoders.export(encoders.make("slim"), exported / "encoder.pt")
    assert len(evaluate(exported, "--attacks", "clean")) == 2 * len(first)


def log(folder, **flags):
    folder.mkdir(exist_ok=True)
    header = {"command": "python amoc.py", "device": "a CPU, 1 threads"}
    flags = {"out": str(folder), "seed": 0, **flags}
    files.append_json_line(folder / "log.jsonl", {**header, "flags": flags})


@pytest.mark.parametrize("kept", [[], ["--kept"]])
def test_an_encoder_given_twice_and_a_copied_run_are_named_before_measuring(exported, monkeypatch, kept):
    evaluate(exported, "--attacks", "clean")
    no_training(monkeypatch)
    log(exported)
    other = exported / "other"
    shutil.copytree(exported, other)
    paths = [str(exported / "encoder.pt"), str(other / "encoder.pt")]
    flags = ["--data", str(exported / "tiny.npz"), *PROBE, "--attacks", "clean", "pgd20", *kept]
    with pytest.raises(ValueError, match="are one run: the same flags, the same seed"):
        command.main([*paths, *flags])
    for twice in (paths[0], str(other / ".." / "encoder.pt")):
        with pytest.raises(ValueError, match="are one encoder, given twice"):
            command.main([paths[0], twice, *flags])


# ----------------------------------------------------------------------------------------------------------
# --kept
# ----------------------------------------------------------------------------------------------------------
def kept(folder, capsys, *flags):
    """The cells of the row that --kept prints."""
    capsys.readouterr()
    command.main([str(folder), "--kept", *flags])
    return [cell.split()[0] for cell in capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")[3:]]


def test_kept_takes_what_each_flag_names_and_nothing_else(tmp_path, capsys):
    base = {"preset": "amoc-slf", "bn": "adv", "data": "cifar10", "seed": 0, "image_size": None,
            "train_images": 100, "recipe": {"epochs": 25, "lr": 0.1, "milestones": [15, 20], "dual": False}}
    variants = {  # flags: what of the line, what of the result is another
        "": ({}, {}), "--seed 1": ({"seed": 1}, {}), "--data some.npz": ({"data": "some.npz"}, {}),
        "--bn clean": ({"bn": "clean"}, {}), "--image-size 64": ({"image_size": 64}, {}),
        "--limit 50": ({"train_images": 50}, {}), "--test-limit 7": ({}, {"images": 7}),
        "--test-batch-size 100": ({}, {"batch_size": 100}), "--restarts 3": ({}, {"restarts": 3}),
        "--epochs 5 --milestones 3 4": (
            {"recipe": {**base["recipe"], "epochs": 5, "milestones": [3, 4]}}, {}),
        "--lr 0.5": ({"recipe": {**base["recipe"], "lr": 0.5}}, {})}
    for i, (line, result) in enumerate(variants.values()):
        found = {"accuracy": i, "stderr": 1, "images": 20, **result}
        files.append_json_line(tmp_path / "eval.jsonl", {**base, **line, "results": {"pgd20": found}})
    with pytest.raises(ValueError, match="measured twice"):
        kept(tmp_path, capsys, "--attacks", "pgd20")
    everything = {"--seed": "0", "--data": "cifar10", "--bn": "adv", "--limit": "100", "--test-limit": "20",
                  "--test-batch-size": "500", "--restarts": "1", "--epochs": "25", "--lr": "0.1"}
    for i, (flags, (line, result)) in enumerate(variants.items()):
        words = flags.split()
        rest = [part for name, value in everything.items() if name not in words for part in (name, value)]
        if "image_size" in line or i == 0:
            continue  # None cannot be named: below
        path = tmp_path / str(i)
        path.mkdir()
        lines = [line for line in table.lines(tmp_path / "eval.jsonl") if line["image_size"] is None]
        (path / "eval.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert kept(path, capsys, "--attacks", "pgd20", *words, *rest) == [f"{i}.00"], flags
    assert kept(tmp_path, capsys, "--attacks", "pgd20", "--image-size", "64") == ["4.00"]


@pytest.mark.parametrize("flags, want", [
    ([], ["1.00", "2.00"]), (["--aa-limit", "5"], ["1.00", "2.00"]),
    (["--test-limit", "20"], ["1.00", "2.00"]),
    (["--test-limit", "20", "--aa-limit", "5"], ["1.00", "2.00"]), (["--aa-limit", "6"], ["1.00"]),
    (["--test-limit", "3"], None)])
def test_kept_knows_that_autoattack_sees_fewer_images(tmp_path, capsys, flags, want):
    for attack, accuracy, images in (("clean", 1, 20), ("aa", 2, 5)):
        files.append_json_line(tmp_path / "eval.jsonl", {
            "preset": "amoc-slf", "results": {attack: {"accuracy": accuracy, "stderr": 1, "images": images}}})
    if want is None:
        with pytest.raises(ValueError, match="nothing was measured"):
            kept(tmp_path, capsys, "--attacks", "clean", "aa", *flags)
    else:
        assert kept(tmp_path, capsys, "--attacks", "clean", "aa", *flags) == want


def test_kept_chooses_one_branch_and_a_source(exported, capsys):
    lines = evaluate(exported, "--preset", "robustssl-aff", "--attacks", "clean")
    lines = evaluate(exported, "--preset", "robustssl-aff", "--attacks", "clean", "--bn", "adv")
    flags = ["--preset", "robustssl-aff", "--attacks", "clean"]
    both, cell = (f"{line['results']['clean']['accuracy']:.2f}" for line in lines)
    assert kept(exported, capsys, *flags) == [both, cell]  # the second is another recipe: a column of its own
    assert kept(exported, capsys, *flags, "--bn", "adv") == [cell]
    source = exported / f"classifier-robustssl-aff-{SHORT}-adv.pt"
    for accuracy, digest in ((7, results.digest(source.read_bytes())), (8, None)):
        found = {"accuracy": accuracy, "stderr": 1, "source": digest}
        files.append_json_line(exported / "eval.jsonl", {"preset": "amoc-slf", "results": {"pgd20": found}})
    assert kept(exported, capsys, "--attacks", "pgd20", "--source", str(source)) == ["7.00"]
    assert kept(exported, capsys, "--attacks", "pgd20") == ["8.00"]


def test_kept_says_when_there_is_nothing_and_needs_no_data(exported, capsys):
    evaluate(exported, "--preset", "knn")
    for flags in (["--preset", "amoc-slf"], ["--preset", "knn", "--data", "stl10"],
                  ["--preset", "knn", "--seed", "3"]):
        with pytest.raises(ValueError, match="nothing was measured"):
            command.main([str(exported), "--kept", *flags])
    with pytest.raises(ValueError, match="there is knn clean"):
        command.main([str(exported), "--kept", "--preset", "amoc-slf"])
    assert kept(exported, capsys, "--preset", "knn", "amoc-slf", "--attacks", "c", "aa")
    assert not (exported / "CIFAR-10-C").exists()


def test_the_command_line_tells_what_was_given():
    assert flags_of.named_flags(command.parser, ["a", "b"]) == {"paths": ["a", "b"]}
    words = ["a", "--data", "cifar10", "--seed", "0", "--milestones", "--kept", "--restarts", "1"]
    assert flags_of.named_flags(command.parser, words) == {
        "paths": ["a"], "data": "cifar10", "seed": 0, "milestones": [], "kept": True, "restarts": 1}


def test_that_knn_is_not_attacked_is_said(exported, capsys):
    evaluate(exported, "--preset", "knn", "--attacks", "pgd20")
    assert "k-NN is not attacked" in capsys.readouterr().out
    for flags in ([], ["--attacks", "clean"]):
        evaluate(exported, "--preset", "knn", *flags)
        assert "not attacked" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------
WHOLE = ("--limit", "--test-limit", "--aa-limit", "--test-batch-size", "--restarts", "--image-size",
         "--epochs", "--batch-size", "--milestones")
SHARES = ("--layer-decay", "--drop-path", "--smoothing")


@pytest.mark.parametrize("flag, value", [
    *((flag, value) for flag in WHOLE for value in ("0", "-1", "1.5", "nan", "many", "99999999999")),
    *(("--seed", v) for v in ("-1", "4294967296", "x")), *(("--workers", v) for v in ("-1", "x", "99999")),
    ("--warmup", "-1"), *(("--lr", v) for v in ("0", "-1", "nan", "inf", "x")),
    *((flag, v) for flag in ("--weight-decay", "--mixup", "--cutmix") for v in ("-1", "nan", "inf")),
    *((flag, v) for flag in SHARES for v in ("-0.1", "1.1", "nan", "inf")),
    ("--smoothing", "1"), ("--preset", "amoc"), ("--protocol", "alff"), ("--attacks", "pgd"), ("--data", ""),
    ("--data-dir", " "), ("--source", ""), ("--presets", "knn")])
def test_flags_outside_their_range_are_one_line(flag, value):
    with pytest.raises(ValueError) as raised:
        command.main(["encoder.pt", flag, value])
    said = str(raised.value)
    assert "\n" not in said and flag in said and "eval.py --help" in said


def test_the_help_can_be_printed(capsys):
    for text in (command.parser().format_help(),):
        assert "--milestones" in text and "amoc-slf" in text


# ----------------------------------------------------------------------------------------------------------
# Disks, processes, signals
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", [
    f"classifier-amoc-slf-{SHORT}-adv.pt", "eval.jsonl", f"attacked-amoc-slf-{SHORT}-adv-pgd20.png"])
def test_a_full_disk_is_one_line_that_names_the_file(exported, monkeypatch, file):
    sync = os.fsync

    def fsync(number):
        if pathlib.Path(os.readlink(f"/proc/self/fd/{number}")).name.startswith(file):
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=f"{file} cannot be written: No space left on device") as raised:
        evaluate(exported, "--attacks", "pgd20", "--pictures")
    assert "\n" not in str(raised.value) and not list(exported.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_named_at_the_start(exported, monkeypatch):
    no_training(monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(OSError, match=f"{exported} cannot be written"):
        evaluate(exported)


def test_a_picture_is_whole_or_not_there(exported, monkeypatch):
    def half(picture, path, **how):
        pathlib.Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    net = finetune.Classifier(encoders.load_encoder(exported / "encoder.pt"), 4).eval()
    with pytest.raises(KeyboardInterrupt):
        attacks.pictures(exported / "a.png", net, data.load(str(exported / "tiny.npz")),
                         attacks.ATTACKS["pgd20-1"], 0)
    assert not list(exported.glob("*.png*"))


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(1, flush=True)
input()
"""


def test_two_evaluations_in_one_folder_are_refused_and_kept_reads_all_the_same(exported, capsys):
    evaluate(exported, "--preset", "knn")
    other = exported / "other"
    shutil.copytree(exported, other)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(other / ".lock")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline()
    with pytest.raises(ValueError, match=f"{other.resolve()}: another process is at work there"):
        evaluate(other, "--preset", "knn", images="tiny.npz")
    assert kept(other, capsys, "--preset", "knn")
    holder.communicate("\n")
    evaluate(other, "--preset", "knn")
    assert exported.resolve() in files._locks and other.resolve() in files._locks  # held to the end


@pytest.fixture
def handlers():
    """Those of a program in the foreground (in the background SIGINT is ignored), put back after."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_one_line_and_the_same_command_goes_on(
        exported, monkeypatch, capsys, handlers, stop, status):
    judge = attacks.judge

    def interrupted(net, images, attack, *rest, **more):
        if attack is not None:
            os.kill(os.getpid(), stop)
        return judge(net, images, attack, *rest, **more)

    with monkeypatch.context() as m:
        m.setattr(attacks, "judge", interrupted)
        with pytest.raises(SystemExit) as raised:
            evaluate(exported, "--attacks", "clean", "pgd20-1")
    assert raised.value.code == status
    said = capsys.readouterr().err
    assert said.strip() == ("stopped; what was measured is in eval.jsonl, the same command goes on (and takes up "
                            "a classifier's training after the last epoch that was saved)")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    no_training(monkeypatch)
    lines = evaluate(exported, "--attacks", "clean", "pgd20-1")
    assert [list(line["results"]) for line in lines] == [["clean"], ["pgd20-1"]]


def test_labels_that_no_training_image_has_are_said(exported, capsys):
    arrays = dict(np.load(tiny_npz(exported / "tiny.npz")))
    arrays["y_train"] = arrays["y_train"] + 1
    np.savez(exported / "tiny.npz", **arrays)
    command.main([str(exported / "encoder.pt"), "--data", str(exported / "tiny.npz"), "--device", "cpu", "--preset", "knn",
                  "--attacks", "clean"])
    said = capsys.readouterr().err
    assert "test images have the labels 0, of which there is no training image (classes count from 0; a small --limit" in said
