import json
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import plot
from common import augment, data, encoders, files


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_and_curves_are_those_of_the_logs(tmp_path):
    write(tmp_path / "log.jsonl", {"flags": {}}, {"epoch": 0, "loss": 3.5}, {"epoch": 1, "loss": 2.5})
    assert plot.losses(tmp_path) == {"": ((0, 1), (3.5, 2.5))}
    results = [("slf", "pgd20", 20), ("slf", "clean", 50), ("slf", "pgd20-16", 5), ("slf", "pgd20-l2", 1), ("knn", "clean", 9)]
    write(tmp_path / "eval.jsonl", *({"preset": p, "results": {a: {"accuracy": v}}} for p, a, v in results))
    assert plot.curves(tmp_path) == {"slf": ((0, 8, 16), (50, 20, 5))}  # one point alone is no curve


def test_principal_components_hold_the_largest_variances():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(500, 6, generator=g) * torch.tensor([1, 5, 0.1, 1, 3, 1]) + 7
    z = plot.principal(h)
    variances = torch.linalg.eigvalsh(torch.cov(h.T)).flip(0)
    torch.testing.assert_close(torch.cov(z.T), torch.diag(variances[:2]), atol=1e-3, rtol=1e-4)
    assert z.mean(0).abs().max() < 1e-5


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


def test_foreign_lines_cost_no_picture(tmp_path):
    foreign = b'5\n[1]\n\xff\n{"loss": 1}\n{"epoch": 1, "loss": "high"}\n{"epoch": 0, "loss": NaN}\n{"epo'
    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 0, "loss": 3.5}\n' + foreign)
    assert plot.losses(tmp_path) == {"": ((0,), (3.5,))}
    lines = [{"preset": "slf", "results": {a: {"accuracy": v}}} for a, v in (("clean", 50), ("pgd20", 20))]
    lines += [{**line, "path": "runs/b.pt"} for line in lines]
    (tmp_path / "eval.jsonl").write_bytes("\n".join(map(json.dumps, lines)).encode() + b"\n" + foreign)
    assert plot.curves(tmp_path) == {"slf": ((0, 8), (50, 20)), "b slf": ((0, 8), (50, 20))}


def test_curves_leave_out_transferred_and_repeated_attacks(tmp_path):
    results = [("clean", {}, 50), ("pgd20", {}, 20), ("pgd20-4", {"restarts": 2}, 1),
               ("pgd20-2", {"source": "x"}, 2)]
    for attack, how, accuracy in results:
        found = {"preset": "slf", "results": {attack: {"accuracy": accuracy, **how}}}
        files.append_json_line(tmp_path / "eval.jsonl", found)
    assert plot.curves(tmp_path) == {"slf": ((0, 8), (50, 20))}


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
        with pytest.raises((ValueError, OSError), match="was measured there"):
            plot.main([what, str(tmp_path / "absent"), "--out", str(tmp_path / "b.png")])


def test_the_tradeoff_is_of_clean_images_and_pgd20_of_one_preset(tmp_path):
    def line(preset, attack, accuracy):
        return json.dumps({"preset": preset, "results": {attack: {"accuracy": accuracy}}}) + "\n"

    run = tmp_path / "run"
    run.mkdir()
    (run / "eval.jsonl").write_text(
        line("amoc-slf", "clean", 50.0) + line("amoc-slf", "pgd20-4", 30.0) + line("amoc-alf", "pgd20", 20.0))
    assert plot.tradeoff(run, "amoc-slf") is None
    with open(run / "eval.jsonl", "a") as file:
        file.write(line("amoc-slf", "pgd20", 10.0))
    assert plot.tradeoff(run, "amoc-slf") == (50.0, 10.0)
    assert plot.tradeoff(run, "amoc-alf") is None
