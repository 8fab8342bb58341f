"""Where the attacks of all scripts start, and learnt tokens, and torch's own numbers; and that pictures, which rank 0 draws
alone, wait for no other."""
import functools
import importlib
from types import SimpleNamespace

import pytest
import torch

from common import data, dist, run
from common.bank import Bank
from common.pgd import pgd
from common.pictures import difference
from tests.scripts import SCRIPTS, TINY, tiny_npz
from tests.steps import first_step

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
    "unified": FGSM,
    "adpe": ["--adversary", "pgd", "--position", "absolute", "--no-random-start", "--steps", "1",
             "--radius", "0.5", "--step-size", "0.5"],
}
WITH_NORM = [script for script in ATTACKS if script != "adpe"  # it has no pixels
             and hasattr(importlib.import_module(script).parser().parse_args([]), "norm")]
L2 = ("--random-start", "--norm", "l2", "--eps", "200", "--step-size", "150")  # the steps as in ATTACKS: one
COLLECTIVES = ("gather", "average_grads", "average_buffers", "barrier")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A script's run of two steps with their pictures, with `more` flags, made once: `attacks`, what each call of `pgd` was
    given and gave, `differences` and `keys`, those of its pictures, and `alone`, the names of collective operations
    that rank 0 would have called alone."""
    folder = tmp_path_factory.mktemp("traced")
    npz = tiny_npz(folder / "tiny.npz", n=16)

    @functools.cache
    def trace(script, *more):
        module = importlib.import_module(script)
        record = SimpleNamespace(attacks=[], alone=[], differences=[], keys=set())
        pictures, drawing = module.pictures, []

        def spy(loss, x, eps, step_size, steps, norm="linf", **options):
            x_adv = pgd(loss, x, eps, step_size, steps, norm, **options)
            start = options["start"].detach().clone().requires_grad_()
            with torch.enable_grad():
                (g,) = torch.autograd.grad(loss(start), start)
            box = options.get("lo", 0.0), options.get("hi", 1.0)
            seen = SimpleNamespace(x=x, start=start.detach(), g=g, x_adv=x_adv, eps=eps, step_size=step_size,
                                   norm=norm, box=box)
            record.attacks.append(seen)
            return x_adv

        def draw(*args, **settings):
            drawing.append(1)
            rows = pictures(*args, **settings)
            drawing.clear()
            return rows

        def note_difference(*args):
            record.differences.append(difference(*args))
            return record.differences[-1]

        def note_key(path, rows, key):
            record.keys.add(key)

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
                if script != "adpe":
                    m.setattr(module, "difference", note_difference)
                    m.setattr(module, "save_rows", note_key)
            module.main([*TINY, *SCRIPTS[script], *ATTACKS.get(script, []), *more, "--data", npz,
                         "--out", str(folder / "-".join([script, *more]))])
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


@pytest.mark.parametrize("script", WITH_NORM)
def test_in_l2_every_view_of_every_image_has_a_ball_and_a_step_of_its_own(script, traced):
    """Eq. 4 of Qi & Shah 2022 (arXiv 2210.13463): begin in the ball, go a step along the gradient, as long as
    --step-size, rescale onto the ball, clip to the box; one view of one image at a time."""
    attacks = traced(script, *L2).attacks
    assert len(attacks) > 1
    for a in attacks:
        assert (a.norm, a.eps, a.step_size) == ("l2", pytest.approx(200 / 255), pytest.approx(150 / 255))
        for x, start, g, x_adv in zip(a.x, a.start, a.g, a.x_adv):
            length = (start - x).norm()  # less than eps where it is clipped
            at_the_image = script in ("adco", "caco") and length == 0  # in their pictures
            assert (0.8 * a.eps < length or at_the_image) and length <= a.eps * (1 + 1e-5)
            away = start + a.step_size * g / g.norm() - x
            away = away * min(1.0, a.eps / away.norm().item())
            torch.testing.assert_close(x_adv, (x + away).clamp(*a.box), rtol=0, atol=1e-5)
            assert 0.7 * a.eps < (x_adv - x).norm() <= a.eps * (1 + 1e-5)  # from the image: a step of 0.75 eps


@pytest.mark.parametrize("script", WITH_NORM)
def test_in_l2_white_or_black_is_the_largest_change_of_a_pixel(script, traced):
    """In the l2 ball a pixel moves by far less than the radius: on that scale all would be grey."""
    record = traced(script, *L2)
    assert record.differences and record.keys == {("largest decrease", "largest increase")}
    for seen in record.differences:
        assert (seen - 0.5).abs().max().item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("script, more", [
    ("amoc", ("--variant", "CCC")), ("amoc", ("--variant", "CCA")), ("acl", ("--variant", "s2s")), ("byorl", ("--eps", "0")),
    ("adco", ("--eps", "0")), ("caco", ("--eps", "0")), ("adv_mae", ("--eps", "0")), ("rocl", ("--eps", "0")),
    ("unified", ("--attack", "none")), ("unified", ("--eps", "0"))])
def test_a_picture_of_clean_images_has_no_key_to_the_colours_of_a_difference(script, more, traced):
    record = traced(script, *more)
    assert record.keys == {None} and not record.differences


@pytest.mark.parametrize("script", SCRIPTS)
def test_pictures_call_no_collective_operation(script, traced):
    assert traced(script).alone == []


@pytest.mark.parametrize("script", ["adpe", "adv_mae", "unified"])
def test_mask_tokens_start_as_small_as_maes(script, tmp_path, monkeypatch):
    """Normal, with the deviation .02."""
    torch.manual_seed(0)
    flags = [*SCRIPTS[script], "--decoder", "512", "1", "2"]
    net = first_step(importlib.import_module(script), monkeypatch, tmp_path, *flags)["net"]
    token = net.mask_token
    assert token.std().item() == pytest.approx(0.02, rel=0.2) and abs(token.mean()) < 0.005


@pytest.mark.parametrize("script", ["pretext", "rotnet"])
def test_what_torch_draws_is_seeded_anew_in_each_step_and_on_each_process(script, tmp_path, monkeypatch):
    """Else a run that is continued would have another dropout, or two processes the same. The second process is alone here,
    and has all images."""
    module = importlib.import_module(script)
    npz = tiny_npz(tmp_path / "tiny.npz")
    setup, batches, seeds = run.setup, data.batches, []

    def train_step(*given, **settings):
        seeds[-1].append(torch.initial_seed())
        return {"loss": torch.zeros(())}

    def all_of_them(images, batch_size, seed, epoch, rank=0, world=1, start=0):
        return batches(images, batch_size, seed, epoch, start=start)

    monkeypatch.setattr(module, "train_step", train_step)
    monkeypatch.setattr(data, "batches", all_of_them)
    for rank in (0, 1):
        seeds.append([])
        monkeypatch.setattr(run, "setup", lambda args: setup(args)._replace(rank=rank))
        module.main([*TINY, *SCRIPTS[script], "--data", npz, "--out", str(tmp_path / str(rank))])
    assert len(set(seeds[0])) == 6 and [b - a for a, b in zip(*seeds, strict=True)] == 6 * [1]
