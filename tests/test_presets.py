"""What single presets do: the last stage alone, the epoch that is picked, warnings, names of results."""
import copy
import json

import pytest
import torch
import torch.nn.functional as F

import eval as command
from common import data, encoders
from common.pgd import pgd
from evaluation import attacks, finetune, presets, results, table
from evaluation.flags import check
from tests.recipes import A
from tests.scripts import tiny_npz

FLAGS = ["--device", "cpu", "--epochs", "2", "--milestones", "1", "--batch-size", "16"]


def small(n=40):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
    return data.Images(x, torch.arange(n) % 3, 3)


def classifier(arch="slim"):
    torch.manual_seed(0)
    net = finetune.Classifier(encoders.make(arch).eval(), 3)
    net.encoder.branch = None
    return net


def export(folder, arch="slim", **recipe):
    torch.manual_seed(0)
    encoder = encoders.make(arch)
    encoder.recipe |= recipe
    encoders.export(encoder, folder / "encoder.pt", image_size=32)
    tiny_npz(folder / "tiny.npz")


def lines(folder, *more):
    command.main([str(folder / "encoder.pt"), "--data", str(folder / "tiny.npz"), *FLAGS, *more])
    return [json.loads(line) for line in open(folder / "eval.jsonl")]


# ----------------------------------------------------------------------------------------------------------
# F1 to F4 of Chen et al.
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["slim", "preact_slim"])
@pytest.mark.parametrize("name", ["chen-f1", "chen-f2", "chen-f3", "chen-f4"])
def test_the_trunk_stays_bit_by_bit_or_moves_and_the_last_stage_is_started_anew(name, arch):
    net = classifier(arch)
    with torch.no_grad():  # as no initialisation would leave it
        for module in net.encoder.last_stage():
            for w in module.parameters():
                w.fill_(100)
    before = {key: value.clone() for key, value in net.encoder.state_dict().items()}
    p = presets.PRESETS[name]._replace(epochs=1, milestones=(), batch_size=18)
    command.train(net, small(), p, seed=0)
    last = {id(t) for m in net.encoder.last_stage() for t in [*m.parameters(), *m.buffers()]}
    for key, value in net.encoder.state_dict(keep_vars=True).items():
        if id(value) in last:
            assert not torch.equal(value, before[key]) and value.abs().max() < 50, key
            assert not key.endswith("num_batches_tracked") or value == 2  # updates; no attack, no judging
        else:
            assert torch.equal(value, before[key]) == (name in ("chen-f1", "chen-f2")), key
    assert not any(m.training for m in net.modules())


def test_the_last_stage_learns_by_its_own_statistics():
    """In train mode: the features of a batch that it makes do not depend on running statistics."""
    p = presets.PRESETS["chen-f1"]
    net, seen = classifier(), []
    net.encoder.layer4.register_forward_pre_hook(lambda m, x: seen.append((m.training, m[0].bn1.training)))
    net.encoder.layer3.register_forward_pre_hook(lambda m, x: seen.append((m.training, m[0].bn1.training)))
    command.train(net, small(16), p._replace(epochs=1, milestones=(), batch_size=16, pick=""), seed=0)
    assert seen == [(False, False), (True, True)]


@pytest.mark.parametrize("step, part", [(0, 0.1), (100, 0.55), (199, 0.9955), (200, 1), (5000, 1)])
def test_the_rate_rises_from_a_tenth_in_200_steps(step, part):
    assert finetune.lr_at(presets.PRESETS["chen-f4"], 0, 0.5, step) == pytest.approx(0.1 * part)


def test_each_step_of_training_has_the_rate_of_the_ramp(monkeypatch):
    asked = []
    lr_at = finetune.lr_at
    monkeypatch.setattr(finetune, "lr_at", lambda *args: asked.append(args[1:]) or lr_at(*args))
    p = presets.PRESETS["chen-f1"]._replace(epochs=2, milestones=(), batch_size=18, pick="")
    command.train(classifier(), small(36), p, seed=0)
    assert asked == [(0, 0, 0), (0, 0.5, 1), (1, 1, 2), (1, 1.5, 3)]


@pytest.mark.parametrize("pick, best, limits", [("clean", 2, [500] * 3), ("pgd20", 3, [None] * 3), ("", None, [])])
def test_the_epoch_is_picked_by_what_the_preset_says_and_the_history_kept(pick, best, limits, monkeypatch):
    scores = {None: iter([40, 50, 50]), attacks.ATTACKS["pgd20"]: iter([30, 20, 45])}
    asked, states = [], []

    def judge(net, images, attack=None, seed=0, limit=None):
        assert len(images) == 4
        if attack:
            asked.append(limit)
            states.append(net.head.weight.detach().clone())
        return {"accuracy": next(scores[attack])}

    monkeypatch.setattr(attacks, "judge", judge)
    net = classifier()
    p = presets.PRESETS["chen-f1"]._replace(epochs=3, milestones=(), batch_size=18, pick=pick)
    command.train(net, small(), p, seed=0)
    assert net.picked_epoch == best and asked == limits
    if pick:
        assert net.history == [{"epoch": 1, "clean": 40, "pgd20": 30}, {"epoch": 2, "clean": 50, "pgd20": 20},
                               {"epoch": 3, "clean": 50, "pgd20": 45}]
        assert torch.equal(net.head.weight, states[best - 1])
    else:
        assert net.history == []


def test_the_picked_epoch_is_in_lines_table_and_file_and_known_when_judged_again(tmp_path, capsys, monkeypatch):
    export(tmp_path)
    first = lines(tmp_path, "--preset", "chen-f1", "amoc-slf", "--attacks", "clean")
    (printed,) = {line for line in capsys.readouterr().out.splitlines() if line.startswith("|  |")}
    titles = printed.strip("| ").split(" | ")
    assert "chen-f1" in titles[2] and "epoch" in titles[3] and len(titles) == 5  # amoc-slf picks none
    kept = command.load_classifier(next(tmp_path.glob("classifier-chen-f1*.pt")))
    assert kept.picked_epoch in (1, 2) and [row["epoch"] for row in kept.history] == [1, 2]
    assert first[0]["history"] == kept.history and first[0]["epoch"] == "best on held-out images"
    best = max(row["clean"] for row in kept.history)
    assert kept.history[kept.picked_epoch - 1]["clean"] == best
    assert "history" not in first[1] and "picked_epoch" not in first[1]["results"]["clean"]

    monkeypatch.setattr(command, "train", None)
    again = lines(tmp_path, "--preset", "chen-f1", "--attacks", "clean", "pgd20-1")[2]
    assert again["history"] == kept.history
    assert again["results"]["pgd20-1"]["picked_epoch"] == kept.picked_epoch
    capsys.readouterr()
    lines(tmp_path, "--preset", "chen-f1", "--attacks", "clean", "--kept")
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.endswith(f" | {kept.picked_epoch} |")


def test_epochs_are_averaged_over_seeds_like_accuracies():
    assert table.cell([{"epoch": 45}]) == "45"
    assert table.cell([{"epoch": 45}, {"epoch": 48}]) == "46.50 ± 2.12"
    assert table.with_epochs({("a", "clean"): {"accuracy": 1, "picked_epoch": 3}, ("b", "clean"): {"accuracy": 1}}) == {
        ("a", "clean"): {"accuracy": 1, "picked_epoch": 3}, ("b", "clean"): {"accuracy": 1}, ("a", "epoch"): {"epoch": 3}}


def test_a_network_without_a_last_stage_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "train", None)
    export(tmp_path, "vit_slim")
    with pytest.raises(ValueError, match="encoder.pt: --preset chen-f3 needs a ResNet of this project, and vit_slim is none"):
        lines(tmp_path, "--preset", "amoc-slf", "chen-f3")
    own = tmp_path / "own.py"
    own.write_text("from torch import nn\n\ndef make():\n"
                   "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))\n")
    export(tmp_path, f"{own}:make")
    with pytest.raises(ValueError, match="--preset chen-f1 needs a ResNet of this project, and .*own.py:make is none"):
        lines(tmp_path, "--preset", "chen-f1")
    assert not (tmp_path / "eval.jsonl").exists()


def test_what_was_never_trained_of_an_encoder_is_a_warning_of_linear_presets_and_knn(tmp_path):
    export(tmp_path, fresh="layer4")
    encoder = encoders.load_encoder(tmp_path / "encoder.pt")
    assert encoder.fresh == "layer4"
    encoders.export(encoder, tmp_path / "again.pt")
    assert encoders.load_encoder(tmp_path / "again.pt").fresh == "layer4"
    found = lines(tmp_path, "--preset", "knn", "amoc-slf", "amoc-full", "chen-f1", "--attacks", "clean")
    warned = [line["preset"] for line in found if line["results"]["clean"].get("warnings")]
    assert warned == ["knn", "amoc-slf"]
    assert found[0]["results"]["clean"]["warnings"] == ["layer4 of this encoder was never trained"]
    export(tmp_path)
    assert encoders.load_encoder(tmp_path / "encoder.pt").fresh is None


# ----------------------------------------------------------------------------------------------------------
# Results of the past
# ----------------------------------------------------------------------------------------------------------
OF_BEFORE = ["trains", "loss", "epochs", "milestones", "lr", "weight_decay", "batch_size", "zero", "augment",
             "step_size", "nesterov", "uniform", "optimizer", "warmup", "layer_decay", "drop_path", "smoothing",
             "mixup", "cutmix", "head_std", "renew_norm", "batch_norm", "validation", "dual"]


@pytest.mark.parametrize("name", ["amoc-slf", "acl-aff-25", "acl-aff-100", "mae-tune", "robustssl-aff"])
def test_the_recipes_of_results_before_are_what_they_were(name):
    """In their order, too: a classifier's file knows its recipe as text."""
    recipe = presets.recipe_of(presets.PRESETS[name])
    assert list(recipe) == OF_BEFORE
    assert recipe["validation"] == (0.1 if name == "acl-aff-25" else 0.0)
    assert type(recipe["milestones"]) is list


def test_recipes_of_presets_that_train_in_another_way_differ():
    found = [json.dumps(presets.recipe_of(p)) for p in presets.PRESETS.values()]
    assert len(set(found)) == len(found)
    p = presets.PRESETS["chen-f1"]
    for change in ({"pick": ""}, {"pick": "pgd20"}, {"fresh_last": False}, {"ramp": 0}, {"ramp_from": 0.0}):
        assert presets.recipe_of(p._replace(**change)) != presets.recipe_of(p)


def test_a_result_of_acls_fine_tuning_from_before_is_found_again(tmp_path, monkeypatch):
    export(tmp_path)
    flags = ["--preset", "acl-aff-25", "--attacks", "clean", "--epochs", "1", "--milestones"]
    lines(tmp_path, *flags)
    (line,) = [json.loads(text) for text in open(tmp_path / "eval.jsonl")]
    del line["history"], line["results"]["clean"]["picked_epoch"]  # as it was written
    assert list(line["recipe"]) == OF_BEFORE
    (tmp_path / "eval.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(command, "train", None)
    assert lines(tmp_path, *flags) == [line]


# ----------------------------------------------------------------------------------------------------------
# What results are called
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, change, name", [
    ("mae-tune", {}, "mae-tune"), ("mae-tune", {"layer_decay": 0.75}, "mae-tune layer-decay=0.75"),
    ("amoc-alf", {"milestones": (3, 4), "epochs": 5}, "amoc-alf epochs=5 milestones=3,4"),
    ("amoc-slf", {"milestones": (), "lr": 2.0}, "amoc-slf milestones=none lr=2"),
    ("amoc-slf", {"weight_decay": 1e-6}, "amoc-slf weight-decay=1e-06"),
    ("amoc-slf", {"lr": 0.123456789}, "amoc-slf lr=0.123456789"),
    ("robustssl-aff", {"dual": False}, "robustssl-aff dual=no"), ("chen-f1", {"ramp": 0}, "chen-f1 ramp=0"),
    ("chen-f1", {"pick": "pgd20"}, "chen-f1 pick=pgd20"), ("acl-aff-25", {"pick": ""}, "acl-aff-25 pick=none")])
def test_a_result_is_called_by_its_preset_and_what_was_changed(preset, change, name):
    recipe = presets.recipe_of(presets.PRESETS[preset]._replace(**change))
    assert presets.name_of(preset, recipe) == name


def test_names_of_results_from_before_and_of_others():
    """A field that a recipe lacks is younger than the result."""
    old = presets.recipe_of(presets.PRESETS["amoc-slf"]._replace(epochs=5))
    for field in ("dual", "validation", "optimizer", "mixup"):
        del old[field]
    assert presets.name_of("amoc-slf", old) == "amoc-slf epochs=5"
    plain = presets.recipe_of(presets.PRESETS["robustssl-aff"])
    del plain["dual"]
    assert presets.name_of("robustssl-aff", plain) == "robustssl-aff dual=no"
    assert presets.name_of("knn", {"k": 200}) == "knn"
    for recipe in (None, 5, {}):
        assert presets.name_of("elsewhere", recipe) == "elsewhere"
    assert presets.name_of("amoc-slf", None) == "amoc-slf"


def test_variants_stand_in_the_order_of_their_values():
    names = ["a lr=10", "a lr=9", "a", "a lr=0.5"]
    assert presets.in_order(names) == ["a", "a lr=0.5", "a lr=9", "a lr=10"]


def test_variants_of_a_preset_have_files_and_columns_of_their_own_and_flags_choose(tmp_path, capsys, monkeypatch):
    export(tmp_path)
    flags = ["--preset", "mae-tune-cifar", "--attacks", "clean", "--epochs", "1", "--warmup", "0"]
    base = [str(tmp_path / "encoder.pt"), "--data", str(tmp_path / "tiny.npz"), "--device", "cpu", "--batch-size", "16"]
    for gamma in ([], ["--layer-decay", "0.95"], ["--layer-decay", "0.65"]):
        command.main([*base, *flags, *gamma])
    usual = "mae-tune-cifar-epochs=1-batch-size=16-warmup=0"
    names = {path.name for path in tmp_path.glob("classifier-*.pt")}
    assert names == {f"classifier-{usual}{gamma}.pt" for gamma in ("", "-layer-decay=0.65", "-layer-decay=0.95")}
    printed = capsys.readouterr().out
    assert "mae-tune-cifar epochs=1 batch-size=16 warmup=0 layer-decay=0.65 clean" in printed

    def titles(*more):
        command.main([str(tmp_path / "encoder.pt"), "--kept", "--preset", "mae-tune-cifar", "--attacks", "clean", *more])
        return capsys.readouterr().out.splitlines()[0].strip("| ").split(" | ")[2:]

    name = usual.replace("-epochs", " epochs").replace("-batch", " batch").replace("-warmup", " warmup")
    assert titles() == [f"{name} clean", f"{name} layer-decay=0.65 clean", f"{name} layer-decay=0.95 clean"]
    assert titles("--layer-decay", "0.95") == [f"{name} layer-decay=0.95 clean"]
    monkeypatch.setattr(command, "train", None)
    for gamma in ([], ["--layer-decay", "0.95"], ["--layer-decay", "0.65"]):  # none was overwritten
        command.main([*base, *flags, *gamma, "--attacks", "clean", "pgd20-1"])
    with pytest.raises(ValueError, match="there is mae-tune-cifar epochs=1 batch-size=16 warmup=0 clean, "):
        titles("--lr", "7")


def test_the_name_of_a_file_stays_short(tmp_path):
    encoder = encoders.make("slim")
    encoder.branch = None
    stems = [results.classifier_stem(tmp_path / "encoder.pt", encoder, "amoc-slf", presets.PRESETS[
        "amoc-slf"]._replace(epochs=200, milestones=(*range(150), last))) for last in (160, 170)]
    assert stems[0] != stems[1] and all(len(stem) < 200 for stem in stems)
    assert all(character.isalnum() or character in "-=,." for character in "".join(stems))


# ----------------------------------------------------------------------------------------------------------
# Steps instead of epochs, a clipped gradient, another end of the cosine
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step, lr", [
    (0, 0), (250, 0.005), (499, 0.00998), (500, 0.01), (1000, 0.01 * (2 + 2**0.5) / 4), (1500, 0.005), (2500, 0)])
def test_the_rate_of_steps_rises_and_follows_a_cosine(step, lr):
    assert finetune.lr_at(presets.PRESETS["rebuffi-sgd"], 3, 3.5, step) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("name, end", [("adco-slf", 0.01), ("caco-slf", 0.0), ("mae-tune", 1e-6)])
def test_the_cosine_ends_where_the_preset_says(name, end):
    assert finetune.lr_at(presets.PRESETS[name], 100, 100, 10**6) == pytest.approx(end)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_training_takes_just_so_many_steps(steps, monkeypatch):
    asked = []
    lr_at = finetune.lr_at
    monkeypatch.setattr(finetune, "lr_at", lambda *args: asked.append(args[3]) or lr_at(*args))
    p = presets.PRESETS["rebuffi-sgd"]._replace(steps=steps, ramp=0, batch_size=18)
    net = classifier()
    command.train(net, small(36), p, seed=0)  # two steps per epoch
    assert asked == list(range(steps)) and net.encoder.bn1.num_batches_tracked == steps


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_the_gradient_of_all_weights_together_is_clipped(clip):
    """The first step of SGD moves the weights by rate times gradient."""
    p = presets.PRESETS["rebuffi-sgd"]._replace(steps=1, ramp=0, batch_size=16, lr=0.5, clip=clip, head_std=0.1, zero=True)
    net = classifier()
    before = {key: w.detach().clone() for key, w in net.named_parameters() if key.startswith("encoder")}
    command.train(net, small(16), p, seed=0)
    moved = torch.cat([(w - before[key]).flatten() for key, w in net.named_parameters() if key in before])
    if clip == 1e-3:
        assert 0.1 * 0.5 * clip < moved.norm() <= 0.5 * clip * 1.001
        assert net.head.weight.grad is None or torch.cat(
            [w.grad.flatten() for w in net.parameters()]).norm().item() == pytest.approx(clip, rel=1e-3)
    else:
        assert moved.norm() > 0.5 * 1e-2


@pytest.mark.parametrize("flags, words", [
    (["--epochs", "5"], "--epochs: preset rebuffi-sgd has no place for it"),
    (["--warmup", "1"], "--warmup: preset rebuffi-sgd has no place for it"),
    (["--steps", "100"], "--steps 100: preset rebuffi-sgd raises its rate in 500; lower --ramp"),
    (["--steps", "500"], "--steps 500: preset rebuffi-sgd raises its rate in 500; lower --ramp"),
    (["--milestones", "3"], "--milestones: preset rebuffi-sgd has steps"),
    (["--preset", "amoc-slf", "--steps", "5"], "--steps: preset amoc-slf has no place for it"),
    (["--preset", "amoc-slf", "--ramp", "5"], "--ramp: preset amoc-slf has no place for it")])
def test_flags_of_steps_that_do_not_fit_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        check(command.parser().parse_args(["encoder.pt", "--preset", "rebuffi-sgd", *flags]))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_passes_the_check_of_flags(name):
    check(command.parser().parse_args(["encoder.pt", "--preset", name]))


# ----------------------------------------------------------------------------------------------------------
# RoCL's joint fine-tuning
# ----------------------------------------------------------------------------------------------------------
def test_nt_xent_equals_printed_values_and_a_slow_loop():
    z1, z2 = (A(8, 8, 0)[:4].clone().requires_grad_(), A(8, 8, 0)[4:].clone().requires_grad_())
    loss = command.nt_xent(z1, z2)
    assert loss.item() == pytest.approx(4.255083800077276, rel=1e-9)
    grads = torch.autograd.grad(loss, (z1, z2))
    assert torch.cat(grads).norm().item() == pytest.approx(0.2471084263370869, rel=1e-9)
    rows = [row / row.norm() for row in (*z1.detach(), *z2.detach())]
    slow = 0
    for i in range(8):
        others = sum((rows[i] @ rows[k] / 0.3).exp() for k in range(8) if k != i)
        slow -= ((rows[i] @ rows[(i + 4) % 8] / 0.3).exp() / others).log() / 8
    assert command.nt_xent(z1, z2, 0.3).item() == pytest.approx(slow.item(), rel=1e-9)


def test_joint_fine_tuning_is_cross_entropy_on_three_images_and_contrast_of_two_views():
    p = presets.PRESETS["rocl-aff"]
    net = classifier()
    finetune.start(net, p)
    assert [tuple(m.weight.shape) for m in net.projector if hasattr(m, "weight")] == [(2048, 128), (128, 2048)]
    net.train()
    x, x2, noise = torch.rand(3, 6, 3, 16, 16)
    y = torch.arange(6) % 3
    loss = command.classifier_loss(copy.deepcopy(net), x, y, p, noise, x2)

    net.eval()
    start = (x + 8 / 255 * (2 * noise - 1)).clamp(0, 1)
    x_adv = pgd(lambda v: F.cross_entropy(net(v), y), x, 8 / 255, 0.007, 10, start=start)
    net.train()
    h = net.encoder(torch.cat([x, x2, x_adv]))  # one pass: common statistics
    parts = [F.cross_entropy(net.head(part), y) for part in h.chunk(3)]
    want = sum(parts) / 3 + command.nt_xent(net.projector(h[:6]), net.projector(h[6:12]))
    torch.testing.assert_close(loss, want)


def test_two_views_differ_and_the_projector_is_trained_and_left(monkeypatch, tmp_path):
    seen, projected = [], []
    loss_of = command.classifier_loss

    def loss(net, x, y, p, noise, x2):
        seen.append((x, x2))
        projected.append(net.projector[0].weight.detach().clone())
        return loss_of(net, x, y, p, noise, x2)

    monkeypatch.setattr(command, "classifier_loss", loss)
    p = presets.PRESETS["rocl-aff"]._replace(epochs=1, milestones=(), batch_size=18)
    net = classifier()
    command.train(net, small(36), p, seed=0)
    assert all(x.shape == x2.shape and not torch.equal(x, x2) for x, x2 in seen)
    assert not torch.equal(*projected) and net.projector is None
    results.save_classifier(net, tmp_path / "c.pt")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(command.load_classifier(tmp_path / "c.pt")(x), net(x))
