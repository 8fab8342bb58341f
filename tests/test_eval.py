import json
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import eval as command
import rocl
from common import augment, data, encoders, resnet
from common.pgd import pgd
from evaluation import attacks, corruptions, finetune, knn, presets, results, table
from evaluation.flags import check
from tests.recipes import A, X, Z
from tests.scripts import tiny_npz

SHORT = "epochs=1-milestones=none-batch-size=16"  # what run_main changes, as it is in the names of files
x, y, W = X(4, 3, 8, 8), torch.arange(4), 0.1 * Z(5, 192)


def slow_kl(p_logits, q_logits):
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return sum(p[i, j] * math.log(p[i, j] / q[i, j]) for i in range(len(p)) for j in range(p.shape[1])) / len(
        p
    )


def test_kl_equals_slow_loops_and_printed_values():
    a, b = 3 * A(4, 10, 1), 3 * A(4, 10, 0)
    for p, q, value in ((a, b, 1.09122041819344), (b, a, 1.09130095410326)):
        assert command.kl(p, q).item() == pytest.approx(value, rel=1e-9)
        assert slow_kl(p, q).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    "steps, value",
    [(0, 1.50965178826451), (1, 1.51449145100064), (3, 1.55287832242532), (10, 1.59212986408361)],
)
def test_trades_equals_printed_values(steps, value):
    weight = W.clone().requires_grad_()
    clean = x.flatten(1) @ W.T
    x_adv = pgd(
        lambda v: command.kl(clean, v.flatten(1) @ W.T),
        x,
        8 / 255,
        2 / 255,
        steps,
        start=(x + 0.001 * (2 * x - 1)).clamp(0, 1),
    )
    loss = command.trades(x.flatten(1) @ weight.T, x_adv.flatten(1) @ weight.T, y)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    if steps == 10:
        loss.backward()
        assert [weight.grad[i].item() for i in ((0, 0), (4, 191))] == pytest.approx(
            [0.0477690228481722, 0.042426645730795], rel=1e-9
        )


class Pixels(nn.Module):
    """An encoder without weights: the mean colour."""

    dim, recipe, branch = 3, {"arch": "slim", "stem": "small", "mean": [0.5] * 3, "std": [0.25] * 3}, "clean"

    def forward(self, x):
        return x.mean((2, 3))


def coloured(n, seed=0):
    """Three classes told by their brightest channel."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randint(60, 120, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
    x[torch.arange(n), y] += 100
    return data.Images(x, y, 3)


def test_knn_equals_a_slow_vote():
    train, test = coloured(30), coloured(12, 1)
    train.y = (train.y + (torch.arange(30) % 7 == 0)) % 3  # some labels are wrong, so that votes matter
    encoder = Pixels()
    features = [F.normalize(encoder(d.x.float() / 255)) for d in (train, test)]
    for k in (1, 5, 30):
        right = 0
        for f, label in zip(features[1], test.y):
            similar = sorted(
                ((torch.dot(f, g).item(), c.item()) for g, c in zip(features[0], train.y)), reverse=True
            )[:k]
            votes = [sum(math.exp(s / 0.1) for s, c in similar if c == label) for label in range(3)]
            right += votes.index(max(votes)) == label
        assert knn.knn(encoder, train, test, k) == pytest.approx(100 * right / 12)


@pytest.mark.parametrize("name", ["amoc-slf", "amoc-alf", "amoc-alf-trades", "acl-probe"])
def test_a_probe_learns_what_can_be_learnt_and_leaves_the_encoder_alone(name):
    torch.manual_seed(0)
    net = finetune.Classifier(Pixels(), 3)
    p = presets.PRESETS[name]._replace(epochs=6, milestones=(5,), batch_size=16, lr=1.0)
    command.train(net, coloured(60), p, seed=0)
    assert attacks.judge(net, coloured(30, 1))["accuracy"] == 100
    assert not net.training and list(net.encoder.parameters()) == []


@pytest.mark.parametrize(
    "name, moves",
    [
        ("amoc-slf", False),
        ("amoc-alf", False),
        ("amoc-aff", True),
        ("acl-aff-100", True),
        ("amoc-full", True),
    ],
)
def test_a_frozen_encoder_keeps_weights_and_statistics_and_a_fine_tuned_one_does_not(name, moves):
    torch.manual_seed(0)
    net = finetune.Classifier(encoders.make("slim").eval(), 3)
    net.encoder.branch = None
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    p = presets.PRESETS[name]._replace(epochs=2, milestones=(1,), batch_size=16)
    command.train(net, coloured(32), p, seed=0)
    same = [torch.equal(v, before[k]) for k, v in net.encoder.state_dict().items()]
    assert not any(same) if moves else all(same)
    steps = {int(v) for k, v in net.encoder.state_dict().items() if "num_batches" in k}
    if name == "amoc-aff":
        assert steps == {4}  # the attack's ten passes are in eval mode; one training pass a step


def test_training_follows_from_the_seed_alone():
    heads = []
    for seed, disturb in ((0, 0), (0, 9), (1, 0)):
        torch.manual_seed(0)
        net = finetune.Classifier(Pixels(), 3)
        torch.manual_seed(seed)
        p = presets.PRESETS["amoc-alf"]._replace(epochs=2, batch_size=16)
        torch.rand(disturb)  # a zero classifier draws nothing: the global generator does not matter
        heads.append(command.train(net, coloured(32), p, seed).head.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_epoch_that_is_best_on_held_out_training_images_is_taken(monkeypatch):
    scores, states, held, taught = iter([10, 60, 60, 20]), [], [], []
    batches = data.batches

    def judge(net, images, attack=None, seed=0, limit=None):
        if not attack:
            return {"accuracy": 7}
        assert attack == attacks.ATTACKS["pgd20"] and limit is None
        held.append(images), states.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"accuracy": next(scores)}

    def watched(images, *rest):
        taught.append(images)
        return batches(images, *rest)

    monkeypatch.setattr(attacks, "judge", judge)
    monkeypatch.setattr(data, "batches", watched)
    torch.manual_seed(0)
    net, p = finetune.Classifier(encoders.make("slim"), 3), presets.PRESETS["acl-aff-25"]
    command.train(net, coloured(50), p._replace(epochs=4, milestones=(3,), batch_size=16), seed=0)
    assert all(torch.equal(v, states[1][k]) for k, v in net.state_dict().items())
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"]) and not net.training
    assert sorted(held[0].rows.tolist() + taught[0].rows.tolist()) == list(range(50)) and len(held[0]) == 5
    x, y = next(held[0].stream(torch.arange(5)[None]))
    assert torch.equal(x, coloured(50).x[held[0].rows]) and torch.equal(y, held[0].y)


def test_learning_rate_steps_and_cosine():
    p = presets.PRESETS["amoc-slf"]
    assert [finetune.lr_at(p, e, e, e) for e in (0, 14, 15, 20)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    p = presets.PRESETS["acl-probe"]
    assert [finetune.lr_at(p, 0, t, t) for t in (0, 50, 100)] == pytest.approx([0.1, (0.1 + 1e-6) / 2, 1e-6])


@pytest.mark.parametrize("epoch, lr", [
    (0, 0), (2.5, 0.001), (5, 0.002), (28.75, 0.00170725), (52.5, 0.0010005), (100, 1e-6)])
def test_fine_tuning_rate_equals_printed_values(epoch, lr):
    assert finetune.lr_at(presets.PRESETS["mae-tune"], int(epoch), epoch, epoch) == pytest.approx(lr, rel=1e-5)


def test_fine_tuning_groups_are_maes():
    net = finetune.Classifier(encoders.make("vit_slim").requires_grad_(), 3)
    encoders.renew_norm(net.encoder)
    groups = finetune.optimizer(net, presets.PRESETS["mae-tune"]).param_groups
    found = {id(w): (g["scale"], g["weight_decay"]) for g in groups for w in g["params"]}
    for name, w in net.named_parameters():
        scale, decay = found.pop(id(w))
        part = name.removeprefix("encoder.")
        if part.startswith(("cls_token", "pos_embed", "patch_embed")):
            depth = 0
        else:
            depth = int(part.split(".")[1]) + 1 if part.startswith("blocks") else 5
        assert scale == pytest.approx(0.65 ** (5 - depth)), name
        assert decay == (0 if w.dim() == 1 or part in ("cls_token", "pos_embed") else 0.05), name
    assert not found and groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("arch", ["vit_slim", "slim"])
def test_an_encoder_is_fine_tuned_block_by_block_at_its_own_rate(arch):
    torch.manual_seed(0)
    net = finetune.Classifier(encoders.make(arch).eval(), 3)
    net.encoder.branch = None
    before = {k: v.clone() for k, v in net.named_parameters()}
    p = presets.PRESETS["mae-tune-cifar"]._replace(epochs=2, warmup=1, batch_size=16, lr=1e-2, weight_decay=0.0,
                                                      layer_decay=0.1)
    command.train(net, coloured(32), p, seed=0)
    moved = {k: (v - before[k]).abs().max().item() for k, v in net.named_parameters() if k in before}
    blocks = ["encoder.blocks.{}.mlp.fc1.weight" if arch == "vit_slim" else "encoder.layer{}.0.conv2.weight"][0]
    sizes = [moved[blocks.format(i + (arch == "slim"))] for i in range(4)]
    assert all(b > 5 * a > 0 for a, b in zip(sizes, sizes[1:])) and moved["head.weight"] > 5 * sizes[-1]
    if arch == "vit_slim":
        assert moved["encoder.pos_embed"] > 0 and net.encoder.recipe["fc_norm"]
        assert "encoder.fc_norm.weight" in net.state_dict() and "encoder.norm.weight" not in net.state_dict()
    assert [m.drop for m in net.modules() if hasattr(m, "drop")] == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])


def test_labels_are_smoothed_and_mixed_as_written():
    net, p = finetune.Classifier(Pixels(), 3), presets.PRESETS["mae-tune"]
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    log_p = net(x).log_softmax(1)
    slow = -sum((0.9 * (c == y[i]) + 0.1 / 3) * log_p[i, c] for i in range(8) for c in range(3)) / 8
    assert command.classifier_loss(net, x, y, p, None).item() == pytest.approx(slow.item(), rel=1e-5)
    for kinds in (dict(mixup=0.0), dict(cutmix=0.0)):
        torch.manual_seed(0)
        mixed, soft = finetune.mixer(p._replace(**kinds), 3)(x, y)
        assert soft.shape == (8, 3) and torch.allclose(soft.sum(1), torch.ones(8))
        lam = soft[1, 1].item()  # labels 0 and 1 are neighbours: each image meets the one before it
        assert 0 < lam < 1 and soft[1, 0].item() == pytest.approx(1 - lam, abs=1e-6)
        if kinds == dict(cutmix=0.0):
            torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.roll(1, 0))
        else:
            own, other = (mixed == x).all(1), (mixed == x.roll(1, 0)).all(1)
            assert (own | other).all() and own[0].float().mean().item() == pytest.approx(lam, abs=1e-6)
    same = finetune.mixer(p._replace(mixup=0.0, cutmix=0.0), 3)(x, y)
    assert same[0] is x and same[1] is y


def test_a_batchnorm_before_the_probe_learns_its_statistics_and_the_encoder_none(tmp_path):
    torch.manual_seed(0)
    net = finetune.Classifier(encoders.make("slim").eval(), 3, batch_norm=True)
    net.encoder.branch = None
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    p = presets.PRESETS["mae-slf-cifar"]._replace(epochs=2, milestones=(), batch_size=16)
    images = coloured(32)
    command.train(net, images, p, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in net.encoder.state_dict().items())
    assert net.norm.num_batches_tracked == 4 and not net.norm.training
    h = net.encoder(images.x.float() / 255)
    want = (h - net.norm.running_mean) / (net.norm.running_var + 1e-6).sqrt()
    torch.testing.assert_close(net(images.x.float() / 255), net.head(want))
    results.save_classifier(net, tmp_path / "c.pt")
    assert torch.equal(command.load_classifier(tmp_path / "c.pt")(images.x / 255), net(images.x / 255))


def test_lars_leaves_the_bias_alone():
    net = finetune.Classifier(Pixels(), 3)
    weight, bias = finetune.optimizer(net, presets.PRESETS["mae-slf"]).param_groups
    assert weight["params"] == [net.head.weight] and weight["trust"] == 0.001
    assert bias["params"] == [net.head.bias] and bias["trust"] is None


def test_the_command_fine_tunes_a_vit_and_its_classifier_can_be_loaded(tmp_path, capsys):
    encoders.export(encoders.make("vit_slim"), tmp_path / "encoder.pt")
    lines = run_main(tmp_path, "--preset", "mae-tune", "mae-slf-cifar", "knn", "--epochs", "2", "--warmup", "1",
                     "--milestones", "--mixup", "0.8", "--lr", "0.01", "--attacks", "clean", "pgd20-4")
    assert [line["preset"] for line in lines] == 2 * ["mae-tune"] + 2 * ["mae-slf-cifar"] + ["knn"]
    assert lines[0]["recipe"]["warmup"] == 1 and lines[0]["recipe"]["layer_decay"] == 0.65
    images = data.load(str(tmp_path / "tiny.npz"), split="test")
    names = ("mae-tune-epochs=2-lr=0.01-batch-size=16-warmup=1",
             "mae-slf-cifar-epochs=2-milestones=none-lr=0.01-batch-size=16-warmup=1-mixup=0.8")
    for name, line in zip(names, lines[::2]):
        net = command.load_classifier(tmp_path / f"classifier-{name}.pt")
        assert attacks.judge(net, images)["accuracy"] == line["results"]["clean"]["accuracy"]


@pytest.mark.parametrize("flags, words", [
    (["--preset", "mae-tune", "--epochs", "5"], "--epochs 5: preset mae-tune warms up for 5; lower --warmup"),
    (["--preset", "amoc-slf", "--epochs", "10"], "--epochs 10: preset amoc-slf lowers its rate in epoch 20"),
    (["--preset", "mae-tune", "--milestones", "30"], "--milestones: preset mae-tune warms up"),
    (["--attacks", "c", "--data", "shapes"], "--attacks c: there is a CIFAR-10-C"),
    (["--warmup", "-1"], "--warmup -1"), (["--drop-path", "2"], "--drop-path 2: must be a number from 0 to 1"),
    (["--layer-decay", "0.5"], "--layer-decay: preset amoc-slf has no place for it"),
    (["--preset", "amoc-aff", "--mixup", "0.5"], "--mixup: preset amoc-aff has no place for it"),
    (["--preset", "amoc-slf", "--warmup", "2"], "--warmup: preset amoc-slf")])
def test_flags_of_fine_tuning_that_fit_no_preset_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        check(command.parser().parse_args(["encoder.pt", *flags]))


class Red(nn.Module):
    def forward(self, x):
        margin = x[:, 0].mean((1, 2)) - 0.5
        return 50 * torch.stack([margin, -margin], 1)


def test_accuracy_under_attack_is_exact_on_a_linear_classifier():
    """Two classes, logits +-(mean red - 1/2): exactly the images within eps of 1/2 change sides."""

    red = torch.tensor([100, 118, 121, 126, 129, 133, 137, 150], dtype=torch.uint8)
    x = red.view(8, 1, 1, 1).repeat(1, 3, 8, 8)
    images = data.Images(x, (red < 127.5).long(), 2)
    far = ((red.float() - 127.5).abs() > 8).sum().item()
    assert attacks.judge(Red(), images)["accuracy"] == 100
    assert attacks.judge(Red(), images, attacks.ATTACKS["pgd20"])["accuracy"] == 100 * far / 8
    assert attacks.judge(Red(), images, attacks.Attack("linf", 30 / 255, 8 / 255, 10))["accuracy"] == 0
    assert attacks.judge(Red(), images, attacks.ATTACKS["deepfool"])["accuracy"] == 100 * far / 8
    auto = attacks.AutoAttack("linf", 8 / 255, ("apgd-ce",))
    assert attacks.judge(Red(), images, auto)["accuracy"] == 100 * far / 8
    assert attacks.judge(Red(), images, auto, limit=2)["accuracy"] == 100 * (red[:2] < 119.5).float().mean()


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    encoder = encoders.make("slim", branches=("clean", "adv"))
    with resnet.branch(encoder, "adv"):
        encoder(torch.rand(8, 3, 32, 32))
    encoders.export(encoder, tmp_path / "encoder.pt", "adv")
    return tmp_path


def run_main(folder, *more):
    npz = tiny_npz(folder / "tiny.npz")
    command.main(
        [
            str(folder / "encoder.pt"),
            "--data",
            npz,
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--milestones",
            "--batch-size",
            "16",
            *more,
        ]
    )
    return [json.loads(line) for line in open(folder / "eval.jsonl")]


def last_row(capsys):
    return [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")][-1]


def test_the_command_writes_a_line_for_each_figure_a_row_and_a_classifier(exported, capsys):
    names = ["clean", "pgd20", "pgd20-l2", "pgd20-l1", "deepfool"]
    lines = run_main(exported, "--preset", "knn", "amoc-slf", "--attacks", *names)
    assert [(line["preset"], *line["results"]) for line in lines] == [
        ("knn", "clean"), *(("amoc-slf", attack) for attack in names)]
    assert {line["bn"] for line in lines} == {"adv"}
    assert lines[1]["recipe"]["epochs"] == 1 and lines[1]["recipe"]["lr"] == 0.1 and lines[1]["epoch"] == "last"
    results = [line["results"][attack] for line, attack in zip(lines, ["clean", *names])]
    for found in results:
        v = found["accuracy"]
        assert found["stderr"] == pytest.approx(math.sqrt(v * (100 - v) / 20), abs=0.01) and found["images"] == 20
    cells = [f"{found['accuracy']:.2f} ({found['stderr']:.2f})" for found in results]
    assert last_row(capsys).removesuffix(" |").split(" | ")[3:] == cells

    net = command.load_classifier(exported / f"classifier-amoc-slf-{SHORT}-adv.pt")
    assert not net.training and net.encoder.branch == "adv"
    images = data.load(str(exported / "tiny.npz"), split="test")
    assert attacks.judge(net, images)["accuracy"] == results[1]["accuracy"]


def test_a_figure_is_not_measured_again_nor_a_classifier_trained_again_and_another_one_is(
        exported, monkeypatch, capsys):
    flags = ["--preset", "knn", "amoc-slf", "--attacks", "clean", "pgd20-4"]
    first, row = run_main(exported, *flags), last_row(capsys)
    with monkeypatch.context() as m:
        m.setattr(command, "train", None)
        m.setattr(knn, "knn", None)
        more = run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", "pgd20", "--test-limit", "20")
        assert more[:-1] == first and list(more[-1]["results"]) == ["pgd20"]
        m.setattr(attacks, "judge", None)
        assert run_main(exported, *flags) == more and last_row(capsys) == row
        for other in (["--test-limit", "5"], ["--attacks", "pgd20-4", "--restarts", "2"]):
            with pytest.raises(TypeError):  # another figure of the same classifier
                run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", *other)
    monkeypatch.setattr(command, "train", None)
    for other in (["--seed", "1"], ["--lr", "0.2"], ["--bn", "clean"], ["--limit", "16"], ["--image-size", "16"]):
        with pytest.raises(TypeError):  # another classifier
            run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", *other)


def test_what_was_measured_makes_the_same_table_without_measuring(exported, capsys):
    flags = ["--preset", "knn", "amoc-slf", "--attacks", "clean", "pgd20-4"]
    run_main(exported, *flags)
    row = last_row(capsys)
    (exported / "encoder.pt").unlink()
    run_main(exported, *flags, "--kept")
    assert last_row(capsys) == row
    with pytest.raises(FileNotFoundError, match="nothing was measured there"):
        command.main([str(exported / "elsewhere" / "encoder.pt"), "--kept"])
    unfinished = exported / "unfinished"  # a run that was not evaluated leaves the others their table
    unfinished.mkdir()
    command.main([str(exported), str(unfinished), *flags, "--kept"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == row
    assert shown.err == f"{unfinished}: nothing was measured there yet; left out\n"
    with pytest.raises(FileNotFoundError, match="nothing was measured there"):
        command.main([str(unfinished), "--kept"])
    with pytest.raises(ValueError, match="a folder; give the encoder.pt in it"):
        command.main([str(exported), "--data", "shapes"])


def test_autoattack_is_recorded_with_its_images_stages_and_sanity(exported):
    (line, auto) = run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", "apgd", "--aa-limit", "5")
    assert line["results"]["clean"]["images"] == 20
    found = auto["results"]["apgd"]
    v = found["accuracy"]
    assert found["images"] == 5 and found["stderr"] == pytest.approx((v * (100 - v) / 5) ** 0.5, abs=0.01)
    assert list(found["stages"]) == ["apgd-ce", "apgd-t"] and found["stages"]["apgd-t"]["robust"] == v
    assert found["sanity"].keys() == {"pgd20", "pgd100", "pgd20 far", "doubts"}


class Masked(nn.Module):
    """Says 0 where the mean red is above 1/2, with a gradient that vanishes: PGD moves nothing."""

    def forward(self, x):
        margin = (x[:, 0].mean((1, 2)) - 0.5).sign() + 0 * x.sum((1, 2, 3))
        return torch.stack([margin, -margin], 1)


def test_sanity_doubts_a_network_that_hides_its_gradient_and_not_an_honest_one():
    red = torch.tensor([20, 60, 120, 126, 129, 133, 180, 250], dtype=torch.uint8)
    images = data.Images(red.view(8, 1, 1, 1).repeat(1, 3, 8, 8), (red < 127.5).long(), 2)
    attack = attacks.ATTACKS["aa"]
    found = attacks.sanity(Masked(), images, attack, 0, 8, 500, 0)
    assert found["pgd20 far"] > 0 and "images far away are classified rightly" in found["doubts"]
    blind = [text for text in found["doubts"] if "classified rightly, have a gradient of exactly 0" in text]
    assert len(blind) == 3 and len(found["doubts"]) == 4  # of each of the three attacks
    images = data.Images(images.x[2:6], images.y[2:6], 2)
    honest = attacks.sanity(Red(), images, attack, 0, 4, 2, 0)
    assert honest["doubts"] == [] and honest["pgd20 far"] == 0 and honest["pgd100"] <= honest["pgd20"]


def test_what_autoattack_has_fooled_counts_as_fooled_though_another_batch_may_judge_it_otherwise(monkeypatch):
    """Its finds lie so near to the boundary that rounding decides."""
    images = data.Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), 2)
    report = {"standing": [True, False, True, False], "stages": {}, "warnings": []}
    monkeypatch.setattr(attacks, "autoattack", lambda net, x, *rest, **more: (x, report))
    assert attacks.judge(Red(), images)["accuracy"] in (0, 100)
    right = images.y if attacks.judge(Red(), images)["accuracy"] else 1 - images.y
    found = attacks.judge(Red(), data.Images(images.x, right, 2), attacks.ATTACKS["aa"])
    assert found["accuracy"] == 50


def test_autoattacks_warnings_are_kept_under_restarts_too():
    images = data.Images(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.zeros(4).long(), 2)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Softmax(1))
    for restarts in (1, 2):
        with pytest.warns(UserWarning):
            found = attacks.judge(flat, images, attacks.AutoAttack("linf", 1e-3, "apgd"), restarts=restarts)
        assert any("probabilities" in text for text in found["warnings"])
        assert ("stages" in found) == (restarts == 1)


def test_under_restarts_the_worst_counts_image_by_image(monkeypatch):
    """An attack that inverts the first half of the images under even seeds, the second under odd ones."""
    red = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)
    images = data.Images(red.view(4, 1, 1, 1).repeat(1, 3, 8, 8), (red == 0).long(), 2)

    def attacked(net, x, y, attack, seed, batch_size):
        rows = slice(0, 2) if seed % 2 == 0 else slice(2, 4)
        x = x.clone()
        x[rows] = 1 - x[rows]
        return x, {}

    monkeypatch.setattr(attacks, "attacked", attacked)
    assert [attacks.judge(Red(), images, "any", 0, restarts=r)["accuracy"] for r in (1, 2, 3)] == [50, 0, 0]


def test_a_transferred_attack_is_made_on_its_source(exported, tmp_path):
    lines = run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", "pgd20")
    source = str(exported / f"classifier-amoc-slf-{SHORT}-adv.pt")
    flags = ["--preset", "amoc-slf", "--attacks", "clean", "pgd20", "--source", source]
    (line,) = run_main(exported, *flags)[len(lines):]  # "clean" has no source, and is there
    assert line["results"]["pgd20"]["source"] == results.digest(open(source, "rb").read())
    own = lines[1]["results"]["pgd20"]["accuracy"]
    assert line["results"]["pgd20"]["accuracy"] == own  # on itself it is the plain attack

    class Blue(Red):
        def forward(self, x):
            return super().forward(x.flip(1))

    red = torch.tensor([120, 126, 129, 133], dtype=torch.uint8)
    images = data.Images(red.view(4, 1, 1, 1).repeat(1, 3, 8, 8), (red < 127.5).long(), 2)
    attack = attacks.ATTACKS["pgd20"]
    assert attacks.judge(Red(), images, attack)["accuracy"] == 0
    assert attacks.judge(Red(), images, attack, source=Blue())["accuracy"] == 100  # blue moves, red does not


def test_corruptions_are_a_mean_over_kinds_and_severities(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 3, 32, 32), generator=g, dtype=torch.uint8)
    images = data.Images(x, torch.arange(6) % 2, 2)
    kinds = ("contrast", "brightness")
    net = Red()
    slow = [(net(corruptions.corrupt(x / 255, kind, s)).argmax(1) == images.y).float().mean().item() * 100
            for kind in kinds for s in range(1, 6)]
    found = attacks.corrupted(net, images, kinds)
    assert found["accuracy"] == pytest.approx(sum(slow) / 10, abs=0.01) and found["images"] == 6
    assert list(found["kinds"].values()) == pytest.approx([sum(slow[:5]) / 5, sum(slow[5:]) / 5], abs=0.01)

    for kind in kinds:  # public files: ten images each
        array = torch.randint(0, 256, (50, 32, 32, 3), generator=g, dtype=torch.uint8).numpy()
        numpy.save(tmp_path / f"{kind}.npy", array)
    numpy.save(tmp_path / "labels.npy", numpy.tile(numpy.arange(10) % 2, 5))
    slow = []
    for kind in kinds:
        for s in range(1, 6):
            x, y = corruptions.read(tmp_path, kind, s)
            rows = data.fixed_order(10)[:6]  # the test images that --test-limit 6 keeps
            slow.append((net(x[rows] / 255).argmax(1) == y[rows]).float() * 100)
    found, slow = attacks.corrupted(net, images, kinds, tmp_path), torch.stack(slow)
    assert found["accuracy"] == pytest.approx(slow.mean().item(), abs=0.01)
    assert found["stderr"] == pytest.approx(slow.mean(0).std().item() / 6**0.5, abs=0.01)
    with pytest.raises(ValueError, match="10 images a severity, for 12"):
        attacks.corrupted(net, data.Images(torch.cat([images.x] * 2), torch.zeros(12), 2), kinds, tmp_path)


def test_the_command_measures_corruptions_and_a_curve_and_draws(exported):
    lines = run_main(exported, "--preset", "amoc-slf", "--attacks", "c-like", "curve", "--pictures",
                     "--test-limit", "5")
    assert len(lines[0]["results"]["c-like"]["kinds"]) == 13
    curve = [line["results"] for line in lines[1:]]
    assert [attack for found in curve for attack in found] == list(attacks.CURVE)
    radii = [getattr(attacks.ATTACKS.get(a), "eps", 0) * 255 for a in attacks.CURVE]
    assert radii == pytest.approx([0, 1, 2, 4, 6, 8, 12, 16])
    picture = torchvision.io.read_image(str(exported / f"attacked-amoc-slf-{SHORT}-adv-pgd20.png"))
    assert picture.shape[1] == 3 * (4 * 32 + 2) + 28 and picture.shape[2] > 5 * (4 * 32 + 2)  # a key, names


def test_images_are_brought_to_another_size(exported):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    images = attacks.resized(data.Images(x, torch.zeros(2).long(), 1), 8)
    want = F.interpolate(x.float(), size=8, mode="bilinear", antialias=True)
    assert images.x.dtype == torch.uint8 and (images.x - want).abs().max() <= 1
    assert attacks.resized(images, None) is images and attacks.resized(images, 8) is images
    (line,) = run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", "--image-size", "16")
    assert line["image_size"] == 16


def test_a_protocol_is_the_benchmarks_preset(exported):
    lines = run_main(exported, "--protocol", "slf", "aff", "--attacks", "clean")
    assert [line["preset"] for line in lines] == ["robustssl-slf", "robustssl-aff"]


def test_a_branch_named_by_hand_is_the_only_one(exported):
    for more, dual in (([], True), (["--bn", "adv"], False)):
        lines = run_main(exported, "--preset", "robustssl-aff", "--attacks", "clean", *more)
        assert lines[-1]["recipe"]["dual"] == dual and lines[-1]["bn"] == "adv"
    assert len(lines) == 2


@pytest.mark.parametrize("branches, bn", [((), None), (["adv"], "adv"), (["left", "right"], "left")])
def test_an_encoder_without_both_branches_is_fine_tuned_with_the_one_it_has(exported, branches, bn):
    torch.manual_seed(0)
    encoders.export(encoders.make("slim", branches), exported / "encoder.pt", bn)
    (line,) = run_main(exported, "--preset", "robustssl-aff", "--attacks", "clean", "pgd20-1")[-1:]
    assert line["bn"] == bn and line["results"].keys() == {"pgd20-1"}
    assert (exported / f"classifier-robustssl-aff-{SHORT}{f'-{bn}' if bn else ''}.pt").exists()


def test_dual_batchnorm_is_judged_through_the_branch_of_attacked_images_whichever_was_exported(exported):
    torch.manual_seed(0)
    encoders.export(encoders.make("slim", ["clean", "adv"]), exported / "encoder.pt", "clean")
    (line,) = run_main(exported, "--preset", "robustssl-aff", "--attacks", "clean")
    assert line["bn"] == "adv"
    kept = command.load_classifier(exported / f"classifier-robustssl-aff-{SHORT}-dual.pt")
    assert kept.encoder.branch == "adv"


def test_dual_batchnorm_shows_each_branch_its_own_images_and_keeps_adv(exported):
    """TRADES with a clean and an adversarial branch: slow, with two networks of plain BatchNorm."""
    net = finetune.Classifier(encoders.load_encoder(exported / "encoder.pt", all_branches=True), 3).train()
    p = presets.PRESETS["robustssl-aff"]
    x, y, noise = torch.rand(6, 3, 32, 32), torch.arange(6) % 3, torch.rand(6, 3, 32, 32)
    clean, adv = (finetune.Classifier(encoders.load_encoder(exported / "encoder.pt", bn), 3).train()
                  for bn in ("clean", "adv"))
    for other in (clean, adv):
        other.head.load_state_dict(net.head.state_dict())
    start = (x + 0.001 * 2**0.5 * torch.erfinv(0.9999 * (2 * noise - 1))).clamp(0, 1)
    clean.eval(), adv.eval()
    target = clean(x).detach()
    x_adv = pgd(lambda v: command.kl(target, adv(v)), x, 8 / 255, 2 / 255, 10, start=start)
    clean.train(), adv.train()
    want = command.trades(clean(x), adv(x_adv), y)
    loss = command.classifier_loss(net, x, y, p, noise)
    torch.testing.assert_close(loss, want)

    loss.backward()
    assert all(w.grad is not None for w in net.parameters())
    results.save_classifier(net, exported / "c.pt")
    loaded = command.load_classifier(exported / "c.pt")
    torch.testing.assert_close(loaded(x), adv.eval()(x))


def test_other_data_or_another_attack_of_the_same_name_is_measured_anew(exported, monkeypatch):
    flags = ["--preset", "amoc-slf", "--attacks", "clean", "pgd20"]
    first = run_main(exported, *flags)
    monkeypatch.setitem(attacks.ATTACKS, "pgd20", attacks.Attack("linf", 16 / 255, 4 / 255, 20))
    more = run_main(exported, *flags)[len(first):]
    assert [list(line["results"]) for line in more] == [["pgd20"]]
    command.main([str(exported / "encoder.pt"), "--data", tiny_npz(exported / "tiny.npz", 60), "--device", "cpu",
                     "--epochs", "1", "--milestones", "--batch-size", "16", *flags])
    assert len(table.lines(exported / "eval.jsonl")) == len(first) + len(more) + 2


def test_the_first_n_are_a_fair_sample_of_sorted_images_with_and_without_a_limit(exported, monkeypatch):
    seen = []
    monkeypatch.setattr(attacks, "judge", lambda net, images, attack, seed, n, *more: seen.append(
        images.y[:n].tolist()) or {"accuracy": 1, "stderr": 1, "images": n})
    monkeypatch.setattr(attacks, "sanity", lambda *args: {})
    rng = numpy.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 32, 32, 3), dtype=numpy.uint8), numpy.arange(40) // 10
    numpy.savez(exported / "sorted.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    for more in ([], ["--test-limit", "30"]):
        command.main([str(exported / "encoder.pt"), "--data", str(exported / "sorted.npz"), "--device", "cpu",
                         "--epochs", "1", "--milestones", "--batch-size", "16", "--attacks", "aa", "--aa-limit", "12",
                         *more])
    assert seen[0] == seen[1] == y[data.fixed_order(40)[:12]].tolist() and len(set(seen[0])) == 4


def test_bn_chooses_the_branch_and_is_recorded(exported):
    lines = run_main(exported, "--preset", "knn", "--bn", "clean")
    assert lines[0]["bn"] == "clean"
    with pytest.raises(ValueError, match="no BN branch 'adv2'; it has adv, clean"):
        run_main(exported, "--preset", "knn", "--bn", "adv2")


@pytest.mark.parametrize(
    "content, words",
    [(None, "no such file"), (b"", "truncated"), ("encoder", "not an evaluated classifier")],
)
def test_a_classifier_that_cannot_be_read_is_named(exported, content, words):
    path = exported / "classifier.pt"
    if content == "encoder":
        path = exported / "encoder.pt"
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        command.load_classifier(path)


def test_a_missing_tensor_is_named(exported):
    run_main(exported, "--preset", "amoc-slf", "--attacks", "clean")
    path = exported / f"classifier-amoc-slf-{SHORT}-adv.pt"
    saved = torch.load(path, weights_only=True)
    del saved["state"]["head.bias"]
    torch.save(saved, path)
    with pytest.raises(ValueError, match="head.bias is missing"):
        command.load_classifier(path)


@pytest.mark.parametrize("more, word", [
    (["--preset", "amoc"], "amoc-slf"),
    (["--attacks", "pgd"], "pgd20"),
    (["--lr", "-1"], "--lr -1"),
    (["--test-batch-size", "0"], "--test-batch-size 0"),
    (["--attacks", "aa", "--source", "x.pt"], "AutoAttack stops just beyond"),
    (["--attacks", "c-like", "--image-size", "16"], "constants are for side 32, not 16"),
])
def test_bad_flags_are_named(exported, more, word):
    with pytest.raises(ValueError, match=word):
        run_main(exported, *more)


def test_a_random_encoder_does_not_solve_shapes():
    """The reason to pretrain: a linear probe on random features stays under 35 % (chance is 10 %)."""
    torch.manual_seed(0)
    net = finetune.Classifier(encoders.make("slim").eval(), 10)
    net.encoder.branch = None
    images, test = data.load("shapes", limit=4000), data.load("shapes", split="test", limit=1000)
    command.train(net, images, presets.PRESETS["amoc-slf"]._replace(epochs=6, milestones=(4,)), seed=0)
    assert 10 < attacks.judge(net, test)["accuracy"] < 35


# ----------------------------------------------------------------------------------------------------------
# The recipes, typed by hand from the papers and their codes
# ----------------------------------------------------------------------------------------------------------
ROWS = """
amoc-slf         linear clean   25 15,20       0.1  2e-4   128 zero    reflect
amoc-alf         linear pgd     25 15,20       0.1  5e-4   128 zero    reflect
amoc-alf-trades  linear trades  25 15,20       0.1  5e-4   128 zero    reflect
amoc-full        all    clean   40 30,35       0.1  2e-4   128 zero    reflect
amoc-aff         all    pgd     40 30,35       0.1  5e-4   128 zero    reflect
amoc-aff-trades  all    trades 100 40,60       0.1  5e-4   128 zero    reflect
rocl-slf         linear clean  150 30,50,100   0.1  5e-4  1024 default none
rocl-alf         linear pgd    150 30,50,100   0.1  5e-4  1024 default none
rocl-aff         all    at+ss  150 30,50,100   0.1  5e-4  1024 default rocl
acl-probe        linear clean  100 cosine      0.1  0      512 default none
acl-aff-25       all    trades  25 15,20       0.1  2e-4   128 zero    constant
acl-aff-100      all    trades 100 40,60       0.1  2e-4   128 zero    constant
chen-f1          last   clean  100 30,50       0.1  3e-4   256 default constant
chen-f2          last   pgd    100 30,50       0.1  3e-4   256 default constant
chen-f3          all    clean  100 30,50       0.1  3e-4   256 default constant
chen-f4          all    pgd    100 30,50       0.1  3e-4   256 default constant
advcl-slf        linear clean   25 15,20       0.01 2e-4   512 default constant
robustssl-slf    linear clean   25 15,20       0.01 2e-4   512 zero    constant
robustssl-alf    linear pgd     25 15,20       0.01 2e-4   512 zero    constant
robustssl-aff    all    trades  25 15,20       0.1  2e-4   128 zero    constant
at               all    pgd    200 102,154     0.1  2e-4   128 default reflect
trades           all    trades  76 75          0.1  2e-4   128 default constant
adco-slf         linear clean  100 cosine       10  0      256 zero    rrc
caco-slf         linear clean  100 cosine      0.4  0     4096 zero    rrc
adios-slf        linear clean  100 60,80       0.1  0      128 default rrc
rebuffi-tune     all    clean  100 cosine     5e-4  0.05   512 zero    rrc
rebuffi-sgd      all    clean    0 cosine     0.01  0      512 default flip
mae-tune         all    clean  100 cosine     2e-3  0.05  1024 zero    rrc
mae-slf          linear clean   90 cosine      6.4  0    16384 zero    rrc
mae-tune-cifar   all    clean  100 cosine     1e-3  0.05   256 zero    constant
mae-slf-cifar    linear clean   25 15,20       0.1  0      128 zero    constant
"""
GAUSSIAN_START = ["trades", "acl-aff-25", "acl-aff-100", "robustssl-aff"]
MORE = {
    "rocl-alf": {"step_size": 0.007}, "rocl-aff": {"step_size": 0.007},
    "adco-slf": {"head_std": 0.01, "lr_end": 0.01},
    "caco-slf": {"head_std": 0.01, "lr_end": 0.0, "optimizer": "lars"},
    "rebuffi-sgd": {"renew_norm": True, "ramp": 500, "steps": 2500, "clip": 1.0, "lr_end": 0.0},
    **{name: {"optimizer": "adamw", "warmup": 5, "layer_decay": 0.65, "drop_path": 0.1, "smoothing": 0.1, "mixup": 0.8,
              "cutmix": 1.0, "head_std": 2e-5, "renew_norm": True} for name in ("mae-tune", "rebuffi-tune")},
    "acl-probe": {"nesterov": True}, "acl-aff-25": {"pick": "pgd20"},
    **{f"chen-f{i}": {"pick": "clean", "fresh_last": True, "ramp": 200, "ramp_from": 0.1} for i in (1, 2, 3, 4)},
    "robustssl-aff": {"dual": True},
    "mae-slf": {"optimizer": "lars", "warmup": 10, "head_std": 0.01, "batch_norm": True},
    "mae-tune-cifar": {"optimizer": "adamw", "warmup": 5, "layer_decay": 0.75, "drop_path": 0.1, "smoothing": 0.1,
                       "head_std": 2e-5, "renew_norm": True},
    "mae-slf-cifar": {"batch_norm": True}}
BY_DEFAULT = {
    "step_size": 2 / 255, "nesterov": False, "optimizer": "sgd", "warmup": 0, "layer_decay": 1.0, "drop_path": 0.0,
    "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "head_std": 0.0, "renew_norm": False, "batch_norm": False,
    "pick": "", "dual": False, "fresh_last": False, "ramp": 0, "ramp_from": 0.0, "steps": 0,
    "clip": 0.0, "lr_end": 1e-6}


def typed():
    for row in ROWS.strip().splitlines():
        name, trains, loss, epochs, falls, lr, decay, batch, start, augment = row.split()
        falls = () if falls == "cosine" else tuple(map(int, falls.split(",")))
        yield name, {
            **BY_DEFAULT, "trains": trains, "loss": loss, "epochs": int(epochs), "milestones": falls, "lr": float(lr),
            "weight_decay": float(decay), "batch_size": int(batch), "zero": start == "zero", "augment": augment,
            "uniform": name not in GAUSSIAN_START, **MORE.get(name, {})}


TYPED = dict(typed())


def test_the_presets_are_those_of_the_papers():
    assert {name: p._asdict() for name, p in presets.PRESETS.items()} == TYPED
    assert len(TYPED) == 31


def test_the_attacks_are_those_of_the_papers():
    linf, l2, l1 = ("linf", 8 / 255), ("l2", 0.5), ("l1", 12.0)
    want = {
        "pgd20": (*linf, 2 / 255, 20), "pgd20-amoc": (*linf, 0.0031, 20), "pgd20-rocl": (*linf, 0.00314, 20),
        "pgd20-rocl-16": ("linf", 16 / 255, 0.00627, 20), "pgd20-l2": (*l2, 0.1, 20), "pgd20-l1": (*l1, 1.2, 20),
        "pgd50-l2-amoc": (*l2, 0.05, 50), "pgd50-l1-amoc": ("l1_dense", 12.0, 1.2, 50),
        "pgd20-1": ("linf", 1 / 255, 0.25 / 255, 20), "pgd20-2": ("linf", 2 / 255, 0.5 / 255, 20),
        "pgd20-4": ("linf", 4 / 255, 1 / 255, 20), "pgd20-6": ("linf", 6 / 255, 1.5 / 255, 20),
        "pgd20-12": ("linf", 12 / 255, 3 / 255, 20), "pgd20-16": ("linf", 16 / 255, 4 / 255, 20),
        "deepfool": (8 / 255,), "aa": (*linf, "standard"), "aa-4": ("linf", 4 / 255, "standard"),
        "aa-l2": (*l2, "standard"), "apgd": (*linf, "apgd"), "c": (corruptions.MAIN, True),
        "c-like": (tuple(corruptions.LIKE), False), "c19": (corruptions.MAIN + corruptions.EXTRA, True),
        "c17-like": (tuple(corruptions.LIKE | corruptions.LIKE_MORE), False)}
    kinds = {"deepfool": attacks.DeepFool, "c": attacks.Corruptions, "c-like": attacks.Corruptions,
             "c19": attacks.Corruptions, "c17-like": attacks.Corruptions,
             **dict.fromkeys(("aa", "aa-4", "aa-l2", "apgd"), attacks.AutoAttack)}
    assert attacks.ATTACKS.keys() == want.keys()
    for name, row in attacks.ATTACKS.items():
        assert type(row) is kinds.get(name, attacks.Attack) and len(row) == len(want[name]), name
        for value, expected in zip(row, want[name]):
            assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), name
    curve = "clean pgd20-1 pgd20-2 pgd20-4 pgd20-6 pgd20 pgd20-12 pgd20-16"
    assert attacks.CURVE == tuple(curve.split())


FALLS = {  # what remains of the rate in the epochs up to, and from, each
    (25, (15, 20)): [1] * 15 + [0.1] * 5 + [0.01] * 5, (40, (30, 35)): [1] * 30 + [0.1] * 5 + [0.01] * 5,
    (100, (40, 60)): [1] * 40 + [0.1] * 20 + [0.01] * 40, (100, (30, 50)): [1] * 30 + [0.1] * 20 + [0.01] * 50,
    (200, (102, 154)): [1] * 102 + [0.1] * 52 + [0.01] * 46, (76, (75,)): [1] * 75 + [0.1],
    (100, (60, 80)): [1] * 60 + [0.1] * 20 + [0.01] * 20,
    (150, (30, 50, 100)): [1] * 30 + [0.1] * 20 + [0.01] * 50 + [0.001] * 50}


@pytest.mark.parametrize("name", TYPED)
def test_the_rate_of_every_preset_in_every_epoch(name):
    p, row = presets.PRESETS[name], TYPED[name]
    for epoch in range(row["epochs"]):
        for part in (0, 0.5, 0.999):
            t, warm = epoch + part, row["warmup"]
            if row["milestones"]:
                want = row["lr"] * FALLS[row["epochs"], row["milestones"]][epoch]
            elif t < warm:
                want = row["lr"] * t / warm
            else:
                end = row["lr_end"]
                want = end + (row["lr"] - end) * (1 + math.cos(math.pi * (t - warm) / (row["epochs"] - warm))) / 2
            step = 150 * t  # where an epoch has so many
            if step < row["ramp"]:
                want *= 0.1 + 0.9 * step / 200
            assert finetune.lr_at(p, epoch, t, step) == pytest.approx(want, rel=1e-9), (epoch, part)


class Wavy64(nn.Module):
    """Logits sin(25 x) W^T of flattened images, whose gradient changes sign; and the mode of each query."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(W.clone())
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return (25 * x).sin().flatten(1) @ self.weight.T


@pytest.mark.parametrize("name", [name for name, row in TYPED.items() if row["loss"] in ("pgd", "trades")])
def test_the_training_attack_of_a_preset_equals_a_slow_loop(name):
    """Start, ball, step, number of steps and objective; the modes of the network; the loss."""
    row, net = TYPED[name], Wavy64()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = presets.PRESETS[name]
    assert net.training
    loss = command.classifier_loss(net, x, y, p, noise)
    clean = row["loss"] == "trades"
    assert net.modes == [False] * (10 + clean) + [True] * (1 + clean) and net.training

    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    u = 2 * noise - 1
    start = u * 8 / 255 if row["uniform"] else 0.001 * normal.icdf((1 + 0.9999 * u) / 2)
    x_adv = (x + start).clamp(0, 1)
    q = ((25 * x).sin().flatten(1) @ W.T).softmax(1) if clean else F.one_hot(y, 5).double()
    for _ in range(10):
        z = ((25 * x_adv).sin().flatten(1) @ W.T).softmax(1)
        g = ((z - q) @ W).view_as(x) * 25 * (25 * x_adv).cos()  # of CE(z, y), and of KL(q || z), to x_adv
        x_adv = x_adv + (0.007 if name == "rocl-alf" else 2 / 255) * g.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)
    z = ((25 * x_adv).sin().flatten(1) @ W.T).softmax(1)
    if clean:
        want = -q[range(4), y].log().mean() + 6 * (q * (q / z).log()).sum(1).mean()
    else:
        want = -z[range(4), y].log().mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)


# ----------------------------------------------------------------------------------------------------------
# Training as the recipes say
# ----------------------------------------------------------------------------------------------------------
class Spy(nn.Module):
    """An encoder that notes, at each query, its mode, the head's, and whether its weights want a gradient."""

    dim, branch, recipe = 4, None, {"arch": "spy"}

    def __init__(self):
        super().__init__()
        self.conv1, self.queries, self.net = nn.Conv2d(3, 4, 3), [], []
        self.bn1 = nn.BatchNorm2d(4)

    def forward(self, x):
        self.queries.append((self.training, self.net[0].training, self.conv1.weight.requires_grad,
                             self.bn1.training, self.bn1.weight.requires_grad))
        return self.bn1(self.conv1(x)).mean((2, 3))

    def last_stage(self):
        return [self.bn1]


@pytest.mark.parametrize("name", TYPED)
def test_the_modes_of_training_and_whose_weights_move(name):
    """A frozen encoder is in eval mode throughout; else in train mode for the update, eval for the attack."""
    row, encoder = TYPED[name], Spy()
    net = finetune.Classifier(encoder, 3, row["batch_norm"])
    encoder.net.append(net)
    p = presets.PRESETS[name]._replace(
        epochs=1, milestones=(), warmup=0, batch_size=16, pick="", dual=False, steps=0)
    command.train(net, coloured(16), p, seed=0)
    everything = row["trains"] == "all"
    last = row["trains"] != "linear"
    attack = {"clean": 0, "pgd": 10, "trades": 11, "at+ss": 10}[row["loss"]]
    update = 2 if row["loss"] == "trades" else 1
    in_attack = (False, False, everything, False, last)
    in_update = (everything, True, everything, last, last)
    assert encoder.queries == attack * [in_attack] + update * [in_update]
    assert not net.training and not encoder.training


@pytest.mark.parametrize("name", TYPED)
def test_each_step_has_the_rate_of_its_epoch_and_the_optimizer_of_the_preset(name, monkeypatch):
    made, rates = [], []
    optimizer, loss = finetune.optimizer, command.classifier_loss

    def noted(net, p):
        made.append(optimizer(net, p))
        return made[0]

    def rate(*args):
        rates.append({group["lr"] / group["scale"] for group in made[0].param_groups})
        return loss(*args)

    monkeypatch.setattr(finetune, "optimizer", noted)
    monkeypatch.setattr(command, "classifier_loss", rate)
    monkeypatch.setattr(command, "pgd", lambda climb, x, *rest, **more: x)
    row, net = TYPED[name], finetune.Classifier(encoders.make("slim"), 3)
    falls = (1,) if row["milestones"] else ()
    warm = min(1, row["warmup"])
    p = presets.PRESETS[name]._replace(epochs=2, milestones=falls, warmup=warm, batch_size=8, pick="",
                                          dual=False, lr=1e-3, ramp=0, steps=0, lr_end=1e-6)
    command.train(net, coloured(16), p, seed=0)
    half = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi / 2)) / 2
    three = [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    want = [1e-3, 1e-3, 1e-4, 1e-4] if falls else [0, 5e-4, 1e-3, half] if warm else three
    assert all(max(found) - min(found) < 1e-12 for found in rates)
    assert [min(found) for found in rates] == pytest.approx(want)
    groups = made[0].param_groups
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.get(row["optimizer"])
    assert type(made[0]).__name__ == "LARS" if kind is None else type(made[0]) is kind
    if row["optimizer"] == "adamw":
        assert all(group["betas"] == (0.9, 0.999) for group in groups)
        assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
        gamma = row["layer_decay"]
        scales = {part: [g["scale"] for g in groups if any(w is v for v in g["params"])][0] for part, w in (
            ("conv1", net.encoder.conv1.weight), *((i, getattr(net.encoder, f"layer{i}")[0].conv1.weight)
                                                   for i in range(1, 5)), ("head", net.head.weight))}
        assert list(scales.values()) == pytest.approx([gamma**5, gamma**4, gamma**3, gamma**2, gamma, 1])
    else:
        assert {group["momentum"] for group in groups} == {0.9}
        assert {group["weight_decay"] for group in groups} == {row["weight_decay"]}
        assert all(group.get("nesterov", False) == row["nesterov"] for group in groups)


@pytest.mark.parametrize("name, start", [
    ("zero", "amoc-slf"), ("default", "rocl-slf"), ("normal", "mae-slf")])
def test_the_classifier_starts_as_the_preset_says(name, start):
    net = finetune.Classifier(Pixels(), 200)
    p = presets.PRESETS[start]._replace(
        epochs=1, milestones=(), warmup=0, batch_size=16, lr=1e-30, weight_decay=0)
    command.train(net, coloured(16), p, seed=0)
    weight, bias = net.head.weight, net.head.bias
    if name == "zero":
        assert weight.abs().max() < 1e-20 and bias.abs().max() < 1e-20
    elif name == "default":
        assert 0.5 < weight.abs().max() <= 1 / 3**0.5 and bias.abs().max() > 0.5
    else:
        assert weight.std().item() == pytest.approx(0.01, rel=0.1) and bias.abs().max() < 1e-20


@pytest.mark.parametrize("kind", ["reflect", "constant", "rrc", "flip", "rocl", "none"])
def test_augmentation_is_that_of_the_preset(kind):
    p = presets.PRESETS["amoc-slf"]._replace(augment=kind)
    x, y = coloured(6).x, torch.arange(6)
    got, labels = finetune.augment(x, y, data.Rng((1, 2, 3), 6, slice(6)), p, lambda x, y: (x, y))
    rng, float_x = data.Rng((1, 2, 3), 6, slice(6)), x.float() / 255
    if kind == "none":
        want = float_x
    elif kind == "flip":
        want = torch.where((rng.uniform(1) < 0.5).view(-1, 1, 1, 1), float_x.flip(3), float_x)
    elif kind == "rocl":
        want = rocl.augment(x, rng, 32)
    elif kind == "rrc":
        want = augment.random_resized_crop(x, rng, 32, scale=(0.08, 1.0), flip=0.5, filter="bicubic")
    else:
        top, left = (rng.uniform(2) * 9).floor().long().unbind(1)
        padded = F.pad(float_x, [4] * 4, mode=kind)
        cut = torch.stack([image[:, t : t + 32, c : c + 32] for image, t, c in zip(padded, top, left)])
        want = torch.where((rng.uniform(1) < 0.5).view(-1, 1, 1, 1), cut.flip(3), cut)
    torch.testing.assert_close(got, want)
    assert labels is y


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_mixed_images_and_labels_reach_the_loss(monkeypatch, mixup, cutmix):
    kinds = finetune.mixer(presets.PRESETS["mae-tune"]._replace(mixup=mixup, cutmix=cutmix), 3)
    if mixup or cutmix:
        alphas = [(type(kind).__name__, kind.alpha, kind.num_classes) for kind in kinds.transforms]
        assert alphas == [row for row in (("MixUp", 0.8, 3), ("CutMix", 1.0, 3)) if row[1] in (mixup, cutmix)]
        assert kinds.p == [1 / len(alphas)] * len(alphas)
    seen = []
    loss = command.classifier_loss
    monkeypatch.setattr(command, "classifier_loss", lambda net, x, y, *rest: seen.append((x, y)) or loss(
        net, x, y, *rest))
    p = presets.PRESETS["mae-tune"]._replace(
        epochs=4, warmup=0, batch_size=12, mixup=mixup, cutmix=cutmix, augment="none", optimizer="sgd")
    command.train(finetune.Classifier(Pixels(), 3), coloured(12), p, seed=0)
    for x, y in seen:
        if mixup or cutmix:
            assert y.shape == (12, 3) and torch.allclose(y.sum(1), torch.ones(12))
        else:
            assert y.shape == (12,) and sorted(y.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
            assert {tuple(image.flatten().tolist()) for image in x} == {
                tuple(image.flatten().tolist()) for image in coloured(12).x.float() / 255}


@pytest.mark.parametrize("n, held", [(10, 1), (44, 4), (50, 5), (96, 10), (50_000, 5_000)])
def test_a_tenth_is_held_out_and_only_where_the_preset_says_so(n, held):
    images = data.Images(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.zeros(n).long(), 2)
    for name, p in presets.PRESETS.items():
        kept, rest = finetune.hold_out(images, p)
        if name == "acl-aff-25" or name.startswith("chen-"):
            assert len(kept) == held and torch.cat([kept.rows, rest.rows]).sort().values.tolist() == list(range(n))
            assert kept.rows.tolist() == data.fixed_order(n)[:held]
        else:
            assert kept is None and rest is images


def test_a_share_that_leaves_nothing_to_train_on_is_refused():
    for share in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match="must be from 0 to below 1"):
            data.hold_out(coloured(10), share)


# ----------------------------------------------------------------------------------------------------------
# Attacks as they reach the network
# ----------------------------------------------------------------------------------------------------------
class Asked(Red):
    def __init__(self):
        super().__init__()
        self.queries = []

    def forward(self, x):
        self.queries.append((x.detach().clone(), self.training, x.requires_grad))
        return super().forward(x)


@pytest.mark.parametrize("name", [name for name, row in attacks.ATTACKS.items()
                                  if isinstance(row, attacks.Attack)])
def test_pgd_starts_at_random_in_the_ball_anew_for_each_batch_and_restart(name):
    attack, net = attacks.ATTACKS[name], Asked()
    g = torch.Generator().manual_seed(0)
    image = torch.randint(100, 150, (1, 3, 16, 16), generator=g, dtype=torch.uint8)
    images = data.Images(image.repeat(6, 1, 1, 1), torch.zeros(6).long(), 2)  # all alike
    net.train()
    attacks.judge(net, images, attack, seed=5, restarts=2, batch_size=3)
    assert not any(training for _, training, _ in net.queries) and net.training
    runs = [net.queries[i : i + attack.steps + 1] for i in range(0, len(net.queries), attack.steps + 1)]
    assert len(runs) == 4
    assert all([wants for *_, wants in run] == [True] * attack.steps + [False] for run in runs)
    first = [run[0][0] - image / 255 for run in runs]  # two restarts of the first batch, two of the second
    for delta in first:
        order = {"linf": torch.inf, "l2": 2, "l1": 1, "l1_dense": 1}[attack.norm]
        length = delta.flatten(1).norm(order, dim=1)
        assert (length <= attack.eps * (1 + 1e-5)).all() and (length > 0.1 * attack.eps).all()
    starts = torch.cat(first).flatten(1)
    assert len({tuple(start.tolist()) for start in starts}) == 12  # within a batch, over batches and restarts
    again = Asked()
    attacks.judge(again, images, attack, seed=5, restarts=2, batch_size=3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(net.queries, again.queries))
    other = Asked()
    attacks.judge(other, images, attack, seed=6, restarts=2, batch_size=3)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(net.queries[:1], other.queries))


def test_the_attack_climbs_the_cross_entropy_of_the_source_in_eval_mode():
    """A source with dropout and a wrong label of its own: what it is asked, and for which gradient."""
    source, net = Asked().train(), Asked().train()
    images = data.Images(torch.full((2, 3, 8, 8), 128, dtype=torch.uint8), torch.tensor([0, 1]), 2)
    attacks.judge(net, images, attacks.ATTACKS["pgd20"], source=source)
    assert len(source.queries) == 20 and source.training
    assert not any(training for _, training, _ in source.queries)
    assert len(net.queries) == 1 and not net.queries[0][1] and net.training
    red = net.queries[0][0][:, 0].mean((1, 2))
    torch.testing.assert_close(red, torch.tensor([128 - 8, 128 + 8]) / 255)  # away from each label


@pytest.mark.parametrize("pgd20, pgd100, at_8, accuracy, doubts", [
    (40, 42, 0, 20, ["PGD-100 is weaker than PGD-20"]), (40, 41, 1, 41, []),
    (40, 30, 2, 31, ["images far away are classified rightly"]), (40, 42, 0, 41.5, [
        "PGD-100 is weaker than PGD-20", "AutoAttack is weaker than PGD"]), (40, 30, 0, 32, ["AutoAttack is weaker than PGD"]),
    (10, 90, 90, 0, ["PGD-100 is weaker than PGD-20", "images far away are classified rightly"])])
def test_each_doubt_of_the_sanity_check_can_be_reached(monkeypatch, pgd20, pgd100, at_8, accuracy, doubts):
    asked = []

    def judge(net, images, attack, seed, limit, batch_size):
        asked.append(attack)
        far = attack.eps > 0.2
        return {"accuracy": at_8 if far else pgd100 if attack.steps == 100 else pgd20}

    monkeypatch.setattr(attacks, "judge", judge)
    found = attacks.sanity(None, None, attacks.ATTACKS["aa"], 0, 5, 500, accuracy)
    assert found == {"pgd20": pgd20, "pgd100": pgd100, "pgd20 far": at_8, "doubts": doubts}
    eps = 8 / 255
    assert asked == [("linf", eps, eps / 4, 20), ("linf", eps, eps / 4, 100), ("linf", 8 * eps, 2 * eps, 20)]


def test_a_network_makes_pgd_of_100_steps_weaker_than_of_20():
    """Not by a mock: a gradient that points uphill for 20 steps, and downhill after."""
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.asked = 0

        def forward(self, x):
            self.asked += x.requires_grad
            z = (x[:, 0].mean((1, 2)) - 0.47) * 10
            z = z if self.asked <= 40 or not x.requires_grad else 2 * z.detach() - z  # of the same value
            return torch.stack([z, -z], 1)

    images = data.Images(torch.full((4, 3, 8, 8), 122, dtype=torch.uint8), torch.zeros(4).long(), 2)
    found = attacks.sanity(Turns(), images, attacks.ATTACKS["aa"], 0, 4, 500, 0)
    assert (found["pgd20"], found["pgd100"]) == (0, 100)
    assert "PGD-100 is weaker than PGD-20" in found["doubts"]


def test_tf32_is_off_while_it_evaluates(exported, monkeypatch):
    seen = []
    judge = attacks.judge
    backends = torch.backends

    def looked(*args):
        seen.append((backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32))
        return judge(*args)

    monkeypatch.setattr(attacks, "judge", looked)
    before = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    try:
        backends.cudnn.allow_tf32 = True
        backends.cuda.matmul.allow_tf32 = True
        run_main(exported, "--attacks", "clean")
    finally:
        backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before
    assert seen == [(False, False)]


def test_votes_are_weighed_by_similarity_at_a_temperature_of_a_tenth():
    """Two neighbours that are less like it outvote one that is more only where the temperature is high."""
    class Direction(nn.Module):
        def forward(self, x):
            angle = x.mean((1, 2, 3)) * 255 / 100
            return 7 * torch.stack([angle.cos(), angle.sin()], 1)

    level = torch.tensor([0, 45, 45, 200], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 3, 4, 4)
    train = data.Images(level, torch.tensor([0, 1, 1, 2]), 3)
    test = data.Images(level[:1] + 10, torch.tensor([0]), 3)
    near, far = math.cos(0.1), math.cos(0.35)
    assert math.exp(near / 0.1) < 2 * math.exp(far / 0.1) and math.exp(near / 0.05) > 2 * math.exp(far / 0.05)
    assert knn.knn(Direction(), train, test) == 0
    assert knn.knn(Direction(), train, test, temperature=0.05) == 100
    assert knn.knn(Direction(), train, test, k=1) == 100
    assert knn.knn(Direction(), train, test, k=2) == 100


def test_the_standard_error_is_that_of_a_share():
    for accuracy, n, want in ((50, 1000, 1.58), (50, 10_000, 0.5), (90, 100, 3.0), (0, 10, 0), (100, 10, 0)):
        assert attacks.score(accuracy, n) == {"accuracy": accuracy, "stderr": want, "images": n}


def test_the_command_asks_for_200_neighbours_at_a_temperature_of_a_tenth(exported, monkeypatch):
    asked = []
    monkeypatch.setattr(knn, "knn", lambda encoder, train, test, **how: asked.append(how) or 50)
    (line,) = run_main(exported, "--preset", "knn")
    assert asked == [line["recipe"]] == [{"k": 200, "temperature": 0.1}]
    assert line["results"]["clean"]["accuracy"] == 50


class Steep(nn.Module):
    """Red against blue, whose logits are so far apart that float32's softmax has no gradient; in `dtype`."""

    def __init__(self, scale, dtype=torch.float32):
        super().__init__()
        self.scale, self.dtype = scale, dtype

    def forward(self, x):
        margin = self.scale * (x[:, 0] - x[:, 2]).mean((1, 2))
        return torch.stack([margin, -margin], 1).to(self.dtype)


def reds_and_blues(n=6):
    x = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    x[:, 1] = 128
    for i in range(n):
        x[i, 0 if i % 2 else 2] = 130
        x[i, 2 if i % 2 else 0] = 126  # 4/255 away from the boundary
    return data.Images(x, torch.tensor([1 - i % 2 for i in range(n)]), 2)


def test_images_that_an_attack_without_a_gradient_cannot_move_are_named():
    images, attack = reds_and_blues(), attacks.ATTACKS["pgd20"]
    fallen = attacks.judge(Steep(1.0), images, attack)
    assert fallen["accuracy"] == 0 and "warnings" not in fallen
    standing = attacks.judge(Steep(1e4), images, attack)
    assert standing["accuracy"] == 100
    assert standing["warnings"] == [
        "6 images, classified rightly, have a gradient of exactly 0 in the network that is attacked: PGD tells nothing of "
        "them"]
    assert "warnings" not in attacks.judge(Steep(1e4), images)  # clean images are not attacked


def test_logits_in_half_precision_lose_no_gradient_to_the_mean_over_the_batch():
    images = reds_and_blues(500)
    wide = attacks.judge(Steep(340.0), images, attacks.ATTACKS["pgd20"])["accuracy"]
    assert attacks.judge(Steep(340.0, torch.float16), images, attacks.ATTACKS["pgd20"])["accuracy"] == wide == 0


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_no_mistake_of_the_network(label):
    images = reds_and_blues()
    images.y[3] = label
    with pytest.raises(ValueError, match="labels go from .*, of 2 classes"):
        attacks.judge(Steep(1.0), images)


def test_votes_at_a_small_temperature_are_finite():
    class Angle(nn.Module):
        def forward(self, x):
            turn = x[:, 0].mean((1, 2))
            return torch.stack([turn.cos(), turn.sin()], 1)

    x = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 4, 4).contiguous()
    images = data.Images(x, torch.arange(8), 8)
    assert knn.knn(Angle(), images, images, k=8, temperature=1e-6) == 100
    assert knn.knn(Angle(), images, data.Images(x, torch.arange(8), 8), k=1, temperature=1e-6) == 100
