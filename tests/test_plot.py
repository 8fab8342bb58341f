import json
import re
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import plot
from common import augment, data, encoders, files
from evaluation import finetune, landscape, results, series
from evaluation.attacks import Attack


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("flags, words", [(["losses", "x"], "losses: choose one of loss, curve, tradeoff, features")])
def test_unknown_pictures_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        plot.main(flags)


def test_without_matplotlib_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.main(["loss", str(tmp_path)])


@pytest.mark.outside
def test_the_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no loss was measured there"):
        plot.main(["loss", str(tmp_path), "--out", str(tmp_path / "a.png")])
    write(tmp_path / "log.jsonl", {"flags": {}}, {"epoch": 0, "loss": 3.5}, {"epoch": 1, "loss": 2.5})
    write(tmp_path / "eval.jsonl", *({"preset": "slf", "results": {a: {"accuracy": 1}}} for a in ("clean", "pgd20")))
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt")
    for what in ("loss", "curve", "features"):
        out = tmp_path / f"{what}.png"
        plot.main([what, str(tmp_path), "--data", "shapes", "--test-limit", "50", "--out", str(out)])
        assert out.stat().st_size > 1000
        assert_drawn(out)
    write(tmp_path / "eval.jsonl", *({"preset": "knn", "path": f"encoder-{n}.pt", "results": {"clean": {"accuracy": n}}}
                                     for n in (2, 4)))
    plot.main(["loss", str(tmp_path), "--column", "loss", "knn", "--out", str(out)])
    assert_drawn(out)


def test_runs_that_differ_in_their_seed_alone_have_one_colour_and_one_name(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    made = {"a": (0, 8), "a-1": (1, 8), "b": (0, 4), "again": (1, 8)}
    for name, (seed, eps) in made.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "log.jsonl", {"flags": {"eps": eps, "seed": seed}, "command": "python x.py"},
              {"epoch": 0, "loss": 3.5}, {"epoch": 1, "loss": 2.5})
    (tmp_path / "no-log").mkdir()
    folders = [tmp_path / name for name in made]
    assert plot.first_of_seeds([*folders, tmp_path / "no-log"]) == {
        folders[0]: folders[0], folders[1]: folders[0], folders[2]: folders[2], folders[3]: folders[3],
        tmp_path / "no-log": tmp_path / "no-log"}  # one seed twice is not another seed
    ax = figure.subplots()
    plot.draw_loss([ax], folders, plot.parser().parse_args(["loss", *map(str, folders)]))
    a, a1, b, again = ax.get_lines()
    assert a.get_color() == a1.get_color() and len({line.get_color() for line in (a, b, again)}) == 3
    assert [line.get_linestyle() for line in (a, a1, b, again)] == ["-", ":", "-", "-"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "again"]


def npz(path, n, side=32):
    x = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(n) % 2, x_test=x, y_test=np.arange(n) % 2)
    return str(path)


def flags(*more):
    return plot.parser().parse_args(["features", "x", *more])


@pytest.mark.parametrize("n, limit, want", [(7, [], 7), (1200, [], 1000), (7, ["--test-limit", "5"], 5),
                                            (7, ["--test-limit", "50"], 7)])
def test_features_are_of_as_many_images_as_there_are_up_to_the_limit(tmp_path, n, limit, want):
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt")
    args = flags("--data", npz(tmp_path / "x.npz", n), *limit)
    h, y, classes = plot.features(tmp_path / "encoder.pt", args)
    assert h.shape == (want, 128) and y.shape == (want,) and classes == 2
    images = data.load(args.data, split="test", limit=want)  # the first of the fixed shuffle
    encoder = encoders.load_encoder(tmp_path / "encoder.pt")
    torch.testing.assert_close(h, encoder(images.x / 255), rtol=1e-4, atol=1e-4)
    assert torch.equal(y, images.y)


@pytest.mark.parametrize("own, given, want", [(64, [], 64), (None, [], 32), (64, ["--image-size", "48"], 48)])
def test_features_are_of_images_of_the_encoders_own_side(tmp_path, monkeypatch, own, given, want):
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt", image_size=own)
    sides = []
    resize = augment.resize
    monkeypatch.setattr(plot, "resize", lambda x, size: sides.append(size) or resize(x, size))
    plot.features(tmp_path / "encoder.pt", flags("--data", npz(tmp_path / "x.npz", 3, 40), *given))
    assert sides == [want]


def test_what_has_no_picture_of_features_is_named(tmp_path):
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="x.npz: one test image; features need two"):
        plot.features(tmp_path / "encoder.pt", flags("--data", npz(tmp_path / "x.npz", 1)))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="module.pt.*state_dict"):
        plot.features(tmp_path / "module.pt", flags())
    saved = files.load(tmp_path / "encoder.pt")
    saved["state"]["bn1.weight"][0] = float("nan")
    files.save(saved, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="encoder.pt.*finite"):
        plot.features(tmp_path / "encoder.pt", flags("--data", npz(tmp_path / "x.npz", 3)))


@pytest.mark.parametrize("words", [
    ["features", "x", "--test-limit", "0"], ["features", "x", "--test-limit", "nan"],
    ["features", "x", "--test-limit", "1"],
    ["features", "x", "--image-size", "-1"], ["features", "x", "--data", ""], ["loss", "x", "--out", "a.jpg"],
    ["loss", "x", "--out", "a"], ["loss", "x", "--workers", "1"], ["loss"]])
def test_flags_outside_their_range_are_one_line(words):
    with pytest.raises(ValueError) as raised:
        plot.main(words)
    assert "\n" not in str(raised.value)


class Figure:
    """Stands for matplotlib's."""

    def __init__(self, *size, **how):
        pass

    def subplots(self, rows, columns, squeeze):
        return [[mock.MagicMock() for _ in range(columns)]]

    def savefig(self, path, dpi, format):
        path.write_bytes(f"a {format}".encode())


@pytest.mark.parametrize("what", ["loss", "curve", "features"])
def test_a_picture_is_written_whole_or_the_reason_told(tmp_path, monkeypatch, what, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=Figure))
    write(tmp_path / "log.jsonl", {"flags": {}}, {"epoch": 0, "loss": 3.5}, {"epoch": 1, "loss": 2.5})
    write(tmp_path / "eval.jsonl", *({"preset": "slf", "results": {a: {"accuracy": 1}}} for a in ("clean", "pgd20")))
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt")
    words = [what, str(tmp_path), "--data", npz(tmp_path / "x.npz", 5)]
    plot.main([*words, "--out", str(tmp_path / "a.pdf")])
    assert (tmp_path / "a.pdf").read_text() == "a pdf" and capsys.readouterr().out == f"{tmp_path / 'a.pdf'}\n"
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "absent" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(OSError, match=f"{out} cannot be written: "):
            plot.main([*words, "--out", str(out)])
    assert not list(tmp_path.glob("*.tmp"))
    if what != "features":
        with pytest.raises(FileNotFoundError, match="absent: is not there, so nothing was measured there"):
            plot.main([what, str(tmp_path / "absent"), "--out", str(tmp_path / "b.png")])


def a_run(folder, clean=60, classes=2):
    """A folder with all that can be drawn of a run."""
    folder.mkdir()
    write(folder / "log.jsonl", {"flags": {"eps": clean / 10, "seed": 0}, "command": "python amoc.py"},
          {"epoch": 0, "loss": 3.5}, {"epoch": 1, "loss": 2.5})
    found = {"clean": {"accuracy": clean}, "pgd20": {"accuracy": 20}, "pgd20-4": {"accuracy": 40}, "aa": {"accuracy": 10},
             "c-like": {"accuracy": 50, "kinds": {"fog": 40, "gaussian_noise": 60}}}
    for norm, steps, eps in (("l2", 20, 0.5), ("l2", 20, 1.0), ("linf", 1, 8 / 255), ("linf", 50, 8 / 255)):
        share = 4 if norm == "linf" else 5
        found[f"{norm} {steps} {eps}"] = {"accuracy": 30, "settings": {"norm": norm, "eps": eps, "step_size": eps / share,
                                                                         "steps": steps}}
    history = [{"epoch": 0, "clean": 10, "pgd20": 5}, {"epoch": 1, "clean": 20, "pgd20": 15}]
    for attack, result in found.items():
        files.append_json_line(folder / "eval.jsonl", {"preset": "amoc-slf", "history": history, "results": {attack: result}})
    torch.manual_seed(0)
    encoders.export(encoders.make("slim"), folder / "encoder.pt", image_size=32)
    net = finetune.Classifier(encoders.load_encoder(folder / "encoder.pt"), classes)
    results.save_classifier(net, folder / "classifier-amoc-slf.pt", image_size=32)
    return folder


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [str(a_run(folder / "a")), str(a_run(folder / "b", 80))]


@pytest.mark.outside
@pytest.mark.parametrize("what", ["tradeoff", "curve-steps", "corruptions", "history", "filters"])
def test_a_picture_of_two_runs_is_not_blank(tmp_path, what, two_runs):
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.png"
    plot.main([what, *two_runs, "--out", str(out)])
    assert_drawn(out)


def assert_drawn(out):
    """Between the edges there are other colours than the frame's and the letters' few."""
    shown = np.asarray(Image.open(out).convert("RGB"))[60:-120, 120:-60].reshape(-1, 3)
    colours = (shown.max(1).astype(int) - shown.min(1)) > 60
    assert colours.mean() > 1e-4 and len(np.unique(shown, axis=0)) > 10


@pytest.mark.outside
def test_a_landscape_is_not_blank(tmp_path, two_runs):
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.png"
    plot.main(["landscape", f"{two_runs[0]}/classifier-amoc-slf.pt", "--data", npz(tmp_path / "x.npz", 4), "--grid", "3",
               "--eps", "0", "--device", "cpu", "--out", str(out)])
    assert_drawn(out)


@pytest.mark.parametrize("eps", ["8", "0"])
def test_the_middle_of_a_landscape_is_told(tmp_path, eps, capsys, monkeypatch):
    drawn(monkeypatch)
    path = a_run(tmp_path / "a") / "classifier-amoc-slf.pt"
    out = tmp_path / "x.png"
    words = ["--data", npz(tmp_path / "x.npz", 9), "--grid", "3", "--steps", "1", "--eps", eps, "--device", "cpu"]
    plot.main(["landscape", str(path), *words, "--out", str(out)])
    net = results.load_classifier(path)
    attack = Attack("linf", 8 / 255, 2 / 255, 1) if eps == "8" else None
    own = landscape.loss_of(net, data.load(str(tmp_path / "x.npz"), split="test", limit=9), attack)
    said = float(re.search(r"loss ([\d.]+) at the centre", capsys.readouterr().out)[1])
    assert said == pytest.approx(own, abs=2e-4)


def drawn(monkeypatch):
    """The axes that the next picture is drawn on."""
    axes = []

    class Kept(Figure):
        def subplots(self, rows, columns, squeeze):
            axes[:] = [mock.MagicMock() for _ in range(columns)]
            return [axes]

    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=Kept))
    return axes


def test_corruptions_are_bars_side_by_side(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    runs = [str(a_run(tmp_path / "a")), str(a_run(tmp_path / "b"))]
    files.append_json_line(tmp_path / "b" / "eval.jsonl",
                           {"preset": "amoc-slf", "results": {"c": {"accuracy": 50, "kinds": {"fog": 40}}}})
    with pytest.raises(ValueError, match="c-like and c were measured.*--attack"):
        plot.main(["corruptions", *runs, "--out", str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match="a: no corruptions were measured there by preset amoc-slf; eval.py --preset"):
        plot.main(["corruptions", *runs, "--attack", "c", "--out", str(tmp_path / "x.png")])
    plot.main(["corruptions", *runs, "--attack", "c-like", "--out", str(tmp_path / "x.png")])
    (at, height, width), (other, *_) = [call.args for call in axes[0].bar.call_args_list]
    assert height == [40, 60] and width == 0.4
    assert at == pytest.approx([-0.2, 0.8]) and other == pytest.approx([0.2, 1.2])


def test_points_have_the_colour_of_their_group_and_lines_their_order(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    runs = [str(a_run(tmp_path / name, clean)) for name, clean in (("a", 80), ("b", 60))]
    write(tmp_path / "a" / "log.jsonl", {"flags": {"eps": 8.0, "variant": "CCC", "seed": 0}, "command": "python amoc.py"})
    plot.main(["tradeoff", *runs, "--out", str(tmp_path / "x.png")])
    found = [(call.args, call.kwargs["label"], call.kwargs["color"]) for call in axes[0].scatter.call_args_list]
    assert [label for _, label, _ in found] == ["nothing adversarial", "pixels"]
    assert found[0][0] == ([20], [80]) and found[1][0] == ([20], [60]) and found[0][2] != found[1][2]
    write(tmp_path / "a" / "log.jsonl", {"flags": {"eps": 8.0, "seed": 0}, "command": "python amoc.py"})
    plot.main(["tradeoff", *runs, "--along", "eps", "--out", str(tmp_path / "x.png")])
    assert axes[0].plot.call_args.args == ([20, 20], [60, 80])
    assert not axes[0].errorbar.called
    write(tmp_path / "b" / "log.jsonl", {"flags": {"eps": 8.0, "seed": 1}, "command": "python amoc.py"})
    plot.main(["tradeoff", *runs, "--out", str(tmp_path / "x.png")])
    assert axes[0].errorbar.call_args.args == pytest.approx((20, 70, 200**0.5, 0))


def test_names_of_near_points_stand_below_one_another():
    """40 points of range are 1 high for a name. The first and the last stand at their points, those that are far
    along the other axis too."""
    at = [(0, 60), (0.1, 59.8), (0, 59.5), (20, 59.9), (0, 57.5), (0, 20)]
    heights = plot.heights_of_names([SimpleNamespace(robust=robust, clean=clean) for robust, clean in at])
    assert heights == pytest.approx([60, 59, 58, 59.9, 57, 20])
    assert plot.heights_of_names([SimpleNamespace(robust=1, clean=2)]) == [2] and plot.heights_of_names([]) == []


def test_a_line_is_named_by_what_its_points_have_in_common():
    def point(name):
        return series.Point(name, None, "tune", {}, 0, 0)

    for names, common in ((["queue-eps8-w0.5", "queue-eps4-w0.5"], "queue-w0.5"), (["a x=1", "a x=1 y=2"], "a x=1"),
                          (["p", "q"], "p")):
        assert plot.common_name([point(name) for name in names]) == common


def test_tsne_is_scikit_learns_or_one_clear_line(tmp_path, monkeypatch):
    drawn(monkeypatch)
    run = a_run(tmp_path / "a")
    words = ["features", str(run), "--tsne", "--data", npz(tmp_path / "x.npz", 7), "--out", str(tmp_path / "x.png")]
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ValueError, match="--tsne needs scikit-learn: pip install scikit-learn"):
        plot.main(words)
    tsne = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sklearn.manifold", SimpleNamespace(TSNE=tsne))
    plot.main(words)
    assert tsne.call_args.kwargs["perplexity"] == 2  # fewer than images
    assert tsne.return_value.fit_transform.call_args.args[0].shape == (7, 128)


@pytest.mark.parametrize("words, message", [
    (["loss", "x", "--tsne"], "--tsne: goes with features, not with loss"),
    (["curve", "x", "--along", "eps"], "--along: goes with tradeoff, not with curve"),
    (["tradeoff", "x", "--steps", "5"], "--steps: goes with curve, landscape, not with tradeoff"),
    (["landscape", "x.pt", "--grid", "10"], "--grid 10: must be odd"),
    (["landscape", "runs/amoc"], "runs/amoc: a landscape is of a classifier"),
    (["curve-steps", "x", "--eps", "0"], "--eps 0"), (["curve", "x", "--norm", "l3"], "--norm l3: choose one of"),
    (["landscape", "x.pt", "--span", "0"], "--span 0: must be a number above 0")])
def test_flags_that_do_not_suit_the_picture_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        plot.main(words)


def test_what_was_not_measured_is_named(tmp_path, monkeypatch):
    drawn(monkeypatch)
    run = str(a_run(tmp_path / "a"))
    out = ["--out", str(tmp_path / "x.png")]
    for words, message in ((["curve", "--norm", "l1"], "a: no curve was measured there"),
                           (["curve-steps", "--eps", "3"], "a: no curve-steps was measured there"),
                           (["history", "--preset", "amoc-alf"], "a: no history was measured there"),
                           (["tradeoff", "--attack", "pgd7-8"], "no clean accuracy and pgd7-8 were measured by preset amoc-slf"),
                           (["tradeoff", "--along", "epsilon"], "--along epsilon: no run has it; there is eps")):
        with pytest.raises(ValueError, match=message):
            plot.main([words[0], run, *words[1:], *out])
    assert not (tmp_path / "x.png").exists()


def test_a_run_without_figures_leaves_the_others_their_picture(tmp_path, monkeypatch, capsys):
    axes = drawn(monkeypatch)
    run = a_run(tmp_path / "a")
    short = tmp_path / "short"
    short.mkdir()
    write(short / "log.jsonl", {"flags": {"eps": 6.0, "seed": 0}, "command": "python amoc.py"})
    write(short / "eval.jsonl", {"preset": "slf", "results": {}})
    for what, measured in (("loss", "loss was measured there over the epochs"), ("curve", "curve was measured there")):
        plot.main([what, str(short), str(run), "--out", str(tmp_path / "x.png")])
        assert {call.kwargs["label"].split()[0] for call in axes[0].plot.call_args_list} == {"a"}
        assert capsys.readouterr().err == f"{short}: no {measured}; left out\n"
        with pytest.raises(ValueError, match=f"short: no {measured}"):
            plot.main([what, str(short), "--out", str(tmp_path / "x.png")])


def test_a_landscape_of_other_data_is_refused_before_it_is_computed(tmp_path, monkeypatch):
    drawn(monkeypatch)
    run = a_run(tmp_path / "a", classes=4)
    words = ["--data", npz(tmp_path / "x.npz", 9), "--device", "cpu"]
    with pytest.raises(ValueError, match=r"classifier-amoc-slf.pt: has 4 classes, --data .*x.npz has 2"):
        plot.main(["landscape", str(run / "classifier-amoc-slf.pt"), *words, "--out", str(tmp_path / "x.png")])
    monkeypatch.setattr(landscape, "landscape", None)
    with pytest.raises(OSError, match="cannot be written: No such file or directory"):
        plot.main(["landscape", str(run / "classifier-amoc-slf.pt"), *words, "--out", str(tmp_path / "no" / "x.png")])
    with pytest.raises(ValueError, match="encoder.pt"):
        plot.main(["landscape", str(run / "encoder.pt"), *words, "--out", str(tmp_path / "x.png")])
