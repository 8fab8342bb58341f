"""Where the attacks of all scripts start; and that pictures, which rank 0 draws alone, wait for no other."""
import functools
import importlib
from types import SimpleNamespace

import pytest
import torch

from common import dist
from common.bank import Bank
from common.pgd import pgd
from tests.scripts import SCRIPTS, TINY, tiny_npz

FGSM = ["--no-random-start", "--steps", "1", "--eps", "8", "--step-size", "8"]
ATTACKS = {  # one step of the whole radius from the image itself: FGSM
    "rocl": FGSM,
    "acl": FGSM,
    "advcl": [*FGSM, "--views", "x+d", "x1+d", "x2", "xh"],
    "amoc": [*FGSM, "--variant", "AAC"],
    "byorl": FGSM,
    "adco": [*FGSM, "--batch-negatives"],
    "caco": FGSM,
    "adv_mae": FGSM,
    "adpe": ["--adversary", "pgd", "--position", "absolute", "--no-random-start", "--steps", "1",
             "--radius", "0.5", "--step-size", "0.5"],
}
COLLECTIVES = ("gather", "average_grads", "average_buffers", "barrier")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A script's run of two steps with their pictures, made once: `attacks`, what each call of `pgd` was
    given and gave, and `alone`, the names of collective operations that rank 0 would have called alone."""
    folder = tmp_path_factory.mktemp("traced")
    npz = tiny_npz(folder / "tiny.npz", n=16)

    @functools.cache
    def trace(script):
        module = importlib.import_module(script)
        record, pictures, drawing = SimpleNamespace(attacks=[], alone=[]), module.pictures, []

        def spy(loss, x, eps, step_size, steps, norm="linf", **options):
            x_adv = pgd(loss, x, eps, step_size, steps, norm, **options)
            start = options["start"].detach().clone().requires_grad_()
            with torch.enable_grad():
                (g,) = torch.autograd.grad(loss(start), start)
            box = options.get("lo", 0.0), options.get("hi", 1.0)
            seen = SimpleNamespace(x=x, start=start.detach(), g=g, x_adv=x_adv, eps=eps, box=box)
            record.attacks.append(seen)
            return x_adv

        def draw(*args, **settings):
            drawing.append(1)
            rows = pictures(*args, **settings)
            drawing.clear()
            return rows

        def watch(name, f):
            def watched(*args, **options):
                if drawing:
                    record.alone.append(name)
                return f(*args, **options)

            return watched

        with pytest.MonkeyPatch.context() as m:
            m.setattr(module, "pictures", draw)
            m.setattr(Bank, "push", watch("push", Bank.push))
            for name in COLLECTIVES:
                m.setattr(dist, name, watch(name, getattr(dist, name)))
            if script in ATTACKS:
                m.setattr(module, "pgd", spy)
            module.main([*TINY, *SCRIPTS[script], *ATTACKS.get(script, []), "--data", npz,
                         "--out", str(folder / script)])
        return record

    return trace


@pytest.mark.parametrize("script", ATTACKS)
def test_without_a_random_start_every_attack_starts_at_the_image(script, traced):
    """That of the step and those of the pictures."""
    attacks = traced(script).attacks
    assert len(attacks) > (script != "adpe")  # whose picture shows what the step found
    assert all(torch.equal(a.start, a.x) for a in attacks)


@pytest.mark.parametrize("script", ATTACKS)
def test_fgsm_moves_every_pixel_by_exactly_eps(script, traced):
    """Eq. 5 of Qi & Shah 2022 (arXiv 2210.13463); clipped pixels excepted, and those without gradient, but for
    the rounding of BatchNorms that are folded in the attack and not here."""
    for a in traced(script).attacks:
        free = (a.g.abs() > 1e-5 * a.g.abs().max()) & (a.x_adv > a.box[0]) & (a.x_adv < a.box[1])
        moved = a.x_adv - a.x
        assert free.float().mean() > 0.5
        torch.testing.assert_close(moved[free], a.eps * a.g[free].sign(), rtol=0, atol=1e-6)
        assert (moved[a.g == 0] == 0).all()


@pytest.mark.parametrize("script", ATTACKS)
def test_each_image_is_an_image_to_pgd(script, traced):
    """Its norms are of one entry of the first dimension: that must be one view of one image (AdPE: delta)."""
    pixels = {"adv_mae": 16 * 48}.get(script, 3 * 32 * 32)  # adv_mae: the visible patches
    for a in traced(script).attacks:
        assert script == "adpe" or a.x[0].numel() == pixels


@pytest.mark.parametrize("script", SCRIPTS)
def test_pictures_call_no_collective_operation(script, traced):
    assert traced(script).alone == []
