import json
import sys

import pytest
import torch

import plot
from common import encoders


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


@pytest.mark.parametrize("flags, words", [(["losses", "x"], "'losses' .choose from 'loss', 'curve', 'features'")])
def test_unknown_pictures_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        plot.main(flags)


def test_without_matplotlib_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.main(["loss", str(tmp_path)])


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
