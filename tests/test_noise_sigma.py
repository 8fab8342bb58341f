"""--noise-sigma: Gaussian noise on the second view in place of an attack (RUSH, Sec. 4.3 of Qi & Shah 2022)."""
import importlib
import statistics

import pytest
import torch

from common import data
from tests import steps
from tests.scripts import SCRIPTS, TINY, tiny_npz

SIGMA = 0.25
CLEAN = {"acl": ["--variant", "s2s"], "byorl": ["--eps", "0"]}  # what attacks nothing
every_script = pytest.mark.parametrize("script", CLEAN)


def first_step(script, monkeypatch, tmp_path, *more):
    module = importlib.import_module(script)
    tmp_path.mkdir()
    with monkeypatch.context() as patch:
        return steps.first_step(module, patch, tmp_path, *SCRIPTS[script], *CLEAN[script], *more)


class Numbers:
    """An rng that gives the uniform numbers it was made with."""

    def __init__(self, u):
        self.u = u

    def uniform(self, *shape, device):
        assert shape == self.u.shape[1:]
        return self.u


@every_script
def test_the_noise_is_the_inverse_of_the_normal_distribution(script):
    u = torch.linspace(0.001, 0.999, 2 * 3 * 5 * 5, dtype=torch.float64).view(2, 3, 5, 5)
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = importlib.import_module(script).add_noise(x, SIGMA, Numbers(u))
    normal = statistics.NormalDist(sigma=SIGMA)
    wanted = [pixel + normal.inv_cdf(number) for pixel, number in zip(x.flatten().tolist(), u.flatten().tolist())]
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-9)
    assert found.min() < 0 and found.max() > 1  # not clipped
    zero = importlib.import_module(script).add_noise(x, SIGMA, Numbers(0 * u))
    assert zero.isfinite().all() and (zero < x - 4 * SIGMA).all()


@every_script
def test_the_second_view_of_a_step_has_noise_and_nothing_else_changes(script, monkeypatch, tmp_path):
    plain = first_step(script, monkeypatch, tmp_path / "a")
    seen = first_step(script, monkeypatch, tmp_path / "b", "--noise-sigma", str(SIGMA))
    assert torch.equal(seen["x1"], plain["x1"])
    noise = (seen["x2"] - plain["x2"]) / SIGMA
    n = noise.numel()
    assert noise.mean().abs() < 4 / n**0.5 and (noise.std() - 1).abs() < 4 / (2 * n) ** 0.5
    assert (noise**4).mean().item() == pytest.approx(3, abs=4 * 96**0.5 / n**0.5)
    together = torch.corrcoef(noise.flatten(0, 1).flatten(1))  # of each channel of each image with each other
    assert (together - torch.eye(len(together))).abs().max() < 6 / 1024**0.5
    assert seen["x2"].min() < -SIGMA and seen["x2"].max() > 1 + SIGMA


@every_script
def test_the_noise_of_an_image_does_not_depend_on_the_number_of_processes(script):
    add_noise = importlib.import_module(script).add_noise
    x = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = add_noise(x, SIGMA, data.Rng((1, 2, 3), 6, slice(0, 6)))
    parts = [add_noise(x[rows], SIGMA, data.Rng((1, 2, 3), 6, rows)) for rows in (slice(0, 3), slice(3, 6))]
    assert torch.equal(torch.cat(parts), whole)


@every_script
def test_a_run_with_noise_attacks_nothing_and_ends(script, monkeypatch, tmp_path):
    module = importlib.import_module(script)
    handed, rows = [], []
    train_step, pictures = module.train_step, module.pictures

    def watched(*given, **settings):
        handed.append([value for value in given if isinstance(value, torch.Tensor) and value.dim() == 4])
        return train_step(*given, **settings)

    def drawn(*given):
        rows.append(dict(pictures(*given)))
        return pictures(*given)

    def no_attack(*given, **settings):
        raise AssertionError

    monkeypatch.setattr(module, "train_step", watched)
    monkeypatch.setattr(module, "pictures", drawn)
    monkeypatch.setattr(module, "pgd", no_attack)
    npz = tiny_npz(tmp_path / "tiny.npz", n=16)
    module.main([*TINY, *SCRIPTS[script], *CLEAN[script], "--noise-sigma", str(SIGMA), "--data", npz,
                 "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "encoder.pt").exists() and len(handed) == 2
    noisy = [views[1] for views in handed]
    assert not torch.equal(*noisy) and all(view.min() < -SIGMA for view in noisy)
    assert rows[0]["x1"].min() >= 0 and rows[0]["x2"].min() < -SIGMA


@pytest.mark.parametrize("script, flags, words", [
    ("acl", [], "--noise-sigma 0.25: is for --variant s2s, and --variant ds attacks views; give one or the other"),
    ("acl", ["--variant", "a2s"], "--noise-sigma 0.25: is for --variant s2s, and --variant a2s attacks"),
    ("byorl", [], "--noise-sigma 0.25: is for --eps 0, and --eps 8 attacks the views; give one or the other")])
def test_noise_beside_an_attack_is_refused_before_anything_is_made(script, flags, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        importlib.import_module(script).main([*flags, "--noise-sigma", "0.25", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@every_script
@pytest.mark.parametrize("value", ["-0.1", "nan", "much"])
def test_a_deviation_that_is_none_is_named(script, value):
    with pytest.raises(ValueError, match=f"--noise-sigma {value}: must be a number from 0"):
        importlib.import_module(script).parser().parse_args(["--noise-sigma", value])


def test_with_eps_0_byorls_attack_leaves_noisy_views_as_they_are():
    byorl = importlib.import_module("byorl")
    net = byorl.network("slim", 16)
    x = 2 * torch.rand(4, 3, 16, 16) - 0.5
    z = torch.rand(4, 256)
    for noise in (None, torch.rand(4, 768)):
        found = byorl.attack(net, x, z, noise, norm="linf", eps=0.0, step_size=0.1, steps=3)
        assert torch.equal(found, x)
