import json
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import eval as evaluation
from common import corruptions, data, encoders, table
from common.pgd import pgd
from tests.recipes import A, X, Z
from tests.scripts import tiny_npz

x, y, W = X(4, 3, 8, 8), torch.arange(4), 0.1 * Z(5, 192)


def slow_kl(p_logits, q_logits):
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return sum(p[i, j] * math.log(p[i, j] / q[i, j]) for i in range(len(p)) for j in range(p.shape[1])) / len(
        p
    )


def test_kl_equals_slow_loops_and_printed_values():
    a, b = 3 * A(4, 10, 1), 3 * A(4, 10, 0)
    for p, q, value in ((a, b, 1.09122041819344), (b, a, 1.09130095410326)):
        assert evaluation.kl(p, q).item() == pytest.approx(value, rel=1e-9)
        assert slow_kl(p, q).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    "steps, value",
    [(0, 1.50965178826451), (1, 1.51449145100064), (3, 1.55287832242532), (10, 1.59212986408361)],
)
def test_trades_equals_printed_values(steps, value):
    weight = W.clone().requires_grad_()
    clean = x.flatten(1) @ W.T
    x_adv = pgd(
        lambda v: evaluation.kl(clean, v.flatten(1) @ W.T),
        x,
        8 / 255,
        2 / 255,
        steps,
        start=(x + 0.001 * (2 * x - 1)).clamp(0, 1),
    )
    loss = evaluation.trades(x.flatten(1) @ weight.T, x_adv.flatten(1) @ weight.T, y)
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
        assert evaluation.knn(encoder, train, test, k) == pytest.approx(100 * right / 12)


@pytest.mark.parametrize("name", ["amoc-slf", "amoc-alf", "amoc-alf-trades", "acl-probe"])
def test_a_probe_learns_what_can_be_learnt_and_leaves_the_encoder_alone(name):
    torch.manual_seed(0)
    net = evaluation.Classifier(Pixels(), 3)
    p = evaluation.PRESETS[name]._replace(epochs=6, milestones=(5,), batch_size=16, lr=1.0)
    evaluation.train(net, coloured(60), p, seed=0)
    assert evaluation.judge(net, coloured(30, 1))["accuracy"] == 100
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
    net = evaluation.Classifier(encoders.make("slim").eval(), 3)
    net.encoder.branch = None
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    p = evaluation.PRESETS[name]._replace(epochs=2, milestones=(1,), batch_size=16)
    evaluation.train(net, coloured(32), p, seed=0)
    same = [torch.equal(v, before[k]) for k, v in net.encoder.state_dict().items()]
    assert not any(same) if moves else all(same)
    steps = {int(v) for k, v in net.encoder.state_dict().items() if "num_batches" in k}
    if name == "amoc-aff":
        assert steps == {4}  # the attack's ten passes are in eval mode; one training pass a step


def test_training_follows_from_the_seed_alone():
    heads = []
    for seed, disturb in ((0, 0), (0, 9), (1, 0)):
        torch.manual_seed(0)
        net = evaluation.Classifier(Pixels(), 3)
        torch.manual_seed(seed)
        p = evaluation.PRESETS["amoc-alf"]._replace(epochs=2, batch_size=16)
        torch.rand(disturb)  # a zero classifier draws nothing: the global generator does not matter
        heads.append(evaluation.train(net, coloured(32), p, seed).head.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_epoch_that_is_best_on_held_out_training_images_is_taken(monkeypatch):
    scores, states, held, taught = iter([10, 60, 60, 20]), [], [], []
    batches = data.batches

    def judge(net, images, attack, seed):
        assert attack == evaluation.ATTACKS["pgd20"]
        held.append(images), states.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"accuracy": next(scores)}

    def watched(images, *rest):
        taught.append(images)
        return batches(images, *rest)

    monkeypatch.setattr(evaluation, "judge", judge)
    monkeypatch.setattr(data, "batches", watched)
    torch.manual_seed(0)
    net, p = evaluation.Classifier(encoders.make("slim"), 3), evaluation.PRESETS["acl-aff-25"]
    evaluation.train(net, coloured(50), p._replace(epochs=4, milestones=(3,), batch_size=16), seed=0)
    assert all(torch.equal(v, states[1][k]) for k, v in net.state_dict().items())
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"]) and not net.training
    assert sorted(held[0].rows.tolist() + taught[0].rows.tolist()) == list(range(50)) and len(held[0]) == 5
    x, y = next(held[0].stream(torch.arange(5)[None]))
    assert torch.equal(x, coloured(50).x[held[0].rows]) and torch.equal(y, held[0].y)


def test_learning_rate_steps_and_cosine():
    p = evaluation.PRESETS["amoc-slf"]
    assert [evaluation.lr_at(p, e, e) for e in (0, 14, 15, 20)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    p = evaluation.PRESETS["acl-probe"]
    assert [evaluation.lr_at(p, 0, t) for t in (0, 50, 100)] == pytest.approx([0.1, (0.1 + 1e-6) / 2, 1e-6])


@pytest.mark.parametrize("epoch, lr", [
    (0, 0), (2.5, 0.001), (5, 0.002), (28.75, 0.00170725), (52.5, 0.0010005), (100, 1e-6)])
def test_fine_tuning_rate_equals_printed_values(epoch, lr):
    assert evaluation.lr_at(evaluation.PRESETS["mae-tune"], int(epoch), epoch) == pytest.approx(lr, rel=1e-5)


def test_fine_tuning_groups_are_maes():
    net = evaluation.Classifier(encoders.make("vit_slim").requires_grad_(), 3)
    encoders.renew_norm(net.encoder)
    groups = evaluation.optimizer(net, evaluation.PRESETS["mae-tune"]).param_groups
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
    net = evaluation.Classifier(encoders.make(arch).eval(), 3)
    net.encoder.branch = None
    before = {k: v.clone() for k, v in net.named_parameters()}
    p = evaluation.PRESETS["mae-tune-cifar"]._replace(epochs=2, warmup=1, batch_size=16, lr=1e-2, weight_decay=0.0,
                                                      layer_decay=0.1)
    evaluation.train(net, coloured(32), p, seed=0)
    moved = {k: (v - before[k]).abs().max().item() for k, v in net.named_parameters() if k in before}
    blocks = ["encoder.blocks.{}.mlp.fc1.weight" if arch == "vit_slim" else "encoder.layer{}.0.conv2.weight"][0]
    sizes = [moved[blocks.format(i + (arch == "slim"))] for i in range(4)]
    assert all(b > 5 * a > 0 for a, b in zip(sizes, sizes[1:])) and moved["head.weight"] > 5 * sizes[-1]
    if arch == "vit_slim":
        assert moved["encoder.pos_embed"] > 0 and net.encoder.recipe["fc_norm"]
        assert "encoder.fc_norm.weight" in net.state_dict() and "encoder.norm.weight" not in net.state_dict()
    assert [m.drop for m in net.modules() if hasattr(m, "drop")] == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])


def test_labels_are_smoothed_and_mixed_as_written():
    net, p = evaluation.Classifier(Pixels(), 3), evaluation.PRESETS["mae-tune"]
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    log_p = net(x).log_softmax(1)
    slow = -sum((0.9 * (c == y[i]) + 0.1 / 3) * log_p[i, c] for i in range(8) for c in range(3)) / 8
    assert evaluation.classifier_loss(net, x, y, p, None).item() == pytest.approx(slow.item(), rel=1e-5)
    for kinds in (dict(mixup=0.0), dict(cutmix=0.0)):
        torch.manual_seed(0)
        mixed, soft = evaluation.mixer(p._replace(**kinds), 3)(x, y)
        assert soft.shape == (8, 3) and torch.allclose(soft.sum(1), torch.ones(8))
        lam = soft[1, 1].item()  # labels 0 and 1 are neighbours: each image meets the one before it
        assert 0 < lam < 1 and soft[1, 0].item() == pytest.approx(1 - lam, abs=1e-6)
        if kinds == dict(cutmix=0.0):
            torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.roll(1, 0))
        else:
            own, other = (mixed == x).all(1), (mixed == x.roll(1, 0)).all(1)
            assert (own | other).all() and own[0].float().mean().item() == pytest.approx(lam, abs=1e-6)
    same = evaluation.mixer(p._replace(mixup=0.0, cutmix=0.0), 3)(x, y)
    assert same[0] is x and same[1] is y


def test_a_batchnorm_before_the_probe_learns_its_statistics_and_the_encoder_none(tmp_path):
    torch.manual_seed(0)
    net = evaluation.Classifier(encoders.make("slim").eval(), 3, batch_norm=True)
    net.encoder.branch = None
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    p = evaluation.PRESETS["mae-slf-cifar"]._replace(epochs=2, milestones=(), batch_size=16)
    images = coloured(32)
    evaluation.train(net, images, p, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in net.encoder.state_dict().items())
    assert net.norm.num_batches_tracked == 4 and not net.norm.training
    h = net.encoder(images.x.float() / 255)
    want = (h - net.norm.running_mean) / (net.norm.running_var + 1e-6).sqrt()
    torch.testing.assert_close(net(images.x.float() / 255), net.head(want))
    evaluation.save_classifier(net, tmp_path / "c.pt")
    assert torch.equal(evaluation.load_classifier(tmp_path / "c.pt")(images.x / 255), net(images.x / 255))


def test_lars_leaves_the_bias_alone():
    net = evaluation.Classifier(Pixels(), 3)
    weight, bias = evaluation.optimizer(net, evaluation.PRESETS["mae-slf"]).param_groups
    assert weight["params"] == [net.head.weight] and weight["trust"] == 0.001
    assert bias["params"] == [net.head.bias] and bias["trust"] is None


def test_the_command_fine_tunes_a_vit_and_its_classifier_can_be_loaded(tmp_path, capsys):
    encoders.export(encoders.make("vit_slim"), tmp_path / "encoder.pt")
    lines = run_main(tmp_path, "--preset", "mae-tune", "mae-slf-cifar", "knn", "--epochs", "2", "--warmup", "1",
                     "--milestones", "--mixup", "0.8", "--lr", "0.01", "--attacks", "clean", "pgd20-4")
    assert [line["preset"] for line in lines] == 2 * ["mae-tune"] + 2 * ["mae-slf-cifar"] + ["knn"]
    assert lines[0]["recipe"]["warmup"] == 1 and lines[0]["recipe"]["layer_decay"] == 0.65
    images = data.load(str(tmp_path / "tiny.npz"), split="test")
    for name, line in zip(("mae-tune", "mae-slf-cifar"), lines[::2]):
        net = evaluation.load_classifier(tmp_path / f"classifier-{name}.pt")
        assert evaluation.judge(net, images)["accuracy"] == line["results"]["clean"]["accuracy"]


@pytest.mark.parametrize("flags, words", [
    (["--preset", "mae-tune", "--epochs", "5"], "--epochs 5: preset mae-tune warms up for 5; lower --warmup"),
    (["--preset", "amoc-slf", "--epochs", "10"], "--epochs 10: preset amoc-slf lowers its rate in epoch 20"),
    (["--preset", "mae-tune", "--milestones", "30"], "--milestones: preset mae-tune warms up"),
    (["--attacks", "c", "--data", "shapes"], "--attacks c: there is a CIFAR-10-C"),
    (["--warmup", "-1"], "--warmup -1"), (["--drop-path", "2"], "--drop-path 2: must be from 0 to 1"),
    (["--layer-decay", "0.5"], "--layer-decay: preset amoc-slf has no place for it"),
    (["--preset", "amoc-aff", "--mixup", "0.5"], "--mixup: preset amoc-aff has no place for it"),
    (["--preset", "amoc-slf", "--warmup", "2"], "--warmup: preset amoc-slf")])
def test_flags_of_fine_tuning_that_fit_no_preset_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        evaluation.check(evaluation.parser().parse_args(["encoder.pt", *flags]))


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
    assert evaluation.judge(Red(), images)["accuracy"] == 100
    assert evaluation.judge(Red(), images, evaluation.ATTACKS["pgd20"])["accuracy"] == 100 * far / 8
    assert evaluation.judge(Red(), images, evaluation.Attack("linf", 30 / 255, 8 / 255, 10))["accuracy"] == 0
    assert evaluation.judge(Red(), images, evaluation.ATTACKS["deepfool"])["accuracy"] == 100 * far / 8
    auto = evaluation.AutoAttack("linf", 8 / 255, ("apgd-ce",))
    assert evaluation.judge(Red(), images, auto)["accuracy"] == 100 * far / 8
    assert evaluation.judge(Red(), images, auto, limit=2)["accuracy"] == 100 * (red[:2] < 119.5).float().mean()


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    encoder = encoders.make("slim", branches=("clean", "adv"))
    with encoders.branch(encoder, "adv"):
        encoder(torch.rand(8, 3, 32, 32))
    encoders.export(encoder, tmp_path / "encoder.pt", "adv")
    return tmp_path


def run_main(folder, *more):
    npz = tiny_npz(folder / "tiny.npz")
    evaluation.main(
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
    attacks = ["clean", "pgd20", "pgd20-l2", "pgd20-l1", "deepfool"]
    lines = run_main(exported, "--preset", "knn", "amoc-slf", "--attacks", *attacks)
    assert [(line["preset"], *line["results"]) for line in lines] == [
        ("knn", "clean"), *(("amoc-slf", attack) for attack in attacks)]
    assert {line["bn"] for line in lines} == {"adv"}
    assert lines[1]["recipe"]["epochs"] == 1 and lines[1]["recipe"]["lr"] == 0.1 and lines[1]["epoch"] == "last"
    results = [line["results"][attack] for line, attack in zip(lines, ["clean", *attacks])]
    for found in results:
        v = found["accuracy"]
        assert found["stderr"] == pytest.approx(math.sqrt(v * (100 - v) / 20), abs=0.01) and found["images"] == 20
    cells = [f"{found['accuracy']:.2f} ({found['stderr']:.2f})" for found in results]
    assert last_row(capsys).removesuffix(" |").split(" | ")[3:] == cells

    net = evaluation.load_classifier(exported / "classifier-amoc-slf-adv.pt")
    assert not net.training and net.encoder.branch == "adv"
    images = data.load(str(exported / "tiny.npz"), split="test")
    assert evaluation.judge(net, images)["accuracy"] == results[1]["accuracy"]


def test_a_figure_is_not_measured_again_nor_a_classifier_trained_again_and_another_one_is(
        exported, monkeypatch, capsys):
    flags = ["--preset", "knn", "amoc-slf", "--attacks", "clean", "pgd20-4"]
    first, row = run_main(exported, *flags), last_row(capsys)
    with monkeypatch.context() as m:
        m.setattr(evaluation, "train", None)
        m.setattr(evaluation, "knn", None)
        more = run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", "pgd20", "--test-limit", "20")
        assert more[:-1] == first and list(more[-1]["results"]) == ["pgd20"]
        m.setattr(evaluation, "judge", None)
        assert run_main(exported, *flags) == more and last_row(capsys) == row
        for other in (["--test-limit", "5"], ["--attacks", "pgd20-4", "--restarts", "2"]):
            with pytest.raises(TypeError):  # another figure of the same classifier
                run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", *other)
    monkeypatch.setattr(evaluation, "train", None)
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
        evaluation.main([str(exported / "elsewhere" / "encoder.pt"), "--kept"])
    with pytest.raises(ValueError, match="a folder; give the encoder.pt in it"):
        evaluation.main([str(exported), "--data", "shapes"])


def test_autoattack_is_recorded_with_its_images_stages_and_sanity(exported):
    (line, auto) = run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", "apgd", "--aa-limit", "5")
    assert line["results"]["clean"]["images"] == 20
    found = auto["results"]["apgd"]
    v = found["accuracy"]
    assert found["images"] == 5 and found["stderr"] == pytest.approx((v * (100 - v) / 5) ** 0.5, abs=0.01)
    assert list(found["stages"]) == ["apgd-ce", "apgd-t"] and found["stages"]["apgd-t"]["robust"] == v
    assert found["sanity"].keys() == {"pgd20", "pgd100", "pgd20 at 8 eps", "doubts"}


class Masked(nn.Module):
    """Says 0 where the mean red is above 1/2, with a gradient that vanishes: PGD moves nothing."""

    def forward(self, x):
        margin = (x[:, 0].mean((1, 2)) - 0.5).sign() + 0 * x.sum((1, 2, 3))
        return torch.stack([margin, -margin], 1)


def test_sanity_doubts_a_network_that_hides_its_gradient_and_not_an_honest_one():
    red = torch.tensor([20, 60, 120, 126, 129, 133, 180, 250], dtype=torch.uint8)
    images = data.Images(red.view(8, 1, 1, 1).repeat(1, 3, 8, 8), (red < 127.5).long(), 2)
    attack = evaluation.ATTACKS["aa"]
    found = evaluation.sanity(Masked(), images, attack, 0, 8, 500)
    assert found["pgd20 at 8 eps"] > 0 and found["doubts"] == ["images stand at 8 eps"]
    images = data.Images(images.x[2:6], images.y[2:6], 2)
    honest = evaluation.sanity(Red(), images, attack, 0, 4, 2)
    assert honest["doubts"] == [] and honest["pgd20 at 8 eps"] == 0 and honest["pgd100"] <= honest["pgd20"]


def test_autoattacks_warnings_are_kept_under_restarts_too():
    images = data.Images(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.zeros(4).long(), 2)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Softmax(1))
    for restarts in (1, 2):
        with pytest.warns(UserWarning):
            found = evaluation.judge(flat, images, evaluation.AutoAttack("linf", 1e-3, "apgd"), restarts=restarts)
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

    monkeypatch.setattr(evaluation, "attacked", attacked)
    assert [evaluation.judge(Red(), images, "any", 0, restarts=r)["accuracy"] for r in (1, 2, 3)] == [50, 0, 0]


def test_a_transferred_attack_is_made_on_its_source(exported, tmp_path):
    lines = run_main(exported, "--preset", "amoc-slf", "--attacks", "clean", "pgd20")
    source = str(exported / "classifier-amoc-slf-adv.pt")
    flags = ["--preset", "amoc-slf", "--attacks", "clean", "pgd20", "--source", source]
    (line,) = run_main(exported, *flags)[len(lines):]  # "clean" has no source, and is there
    assert line["results"]["pgd20"]["source"] == evaluation.digest(open(source, "rb").read())
    own = lines[1]["results"]["pgd20"]["accuracy"]
    assert line["results"]["pgd20"]["accuracy"] == own  # on itself it is the plain attack

    class Blue(Red):
        def forward(self, x):
            return super().forward(x.flip(1))

    red = torch.tensor([120, 126, 129, 133], dtype=torch.uint8)
    images = data.Images(red.view(4, 1, 1, 1).repeat(1, 3, 8, 8), (red < 127.5).long(), 2)
    attack = evaluation.ATTACKS["pgd20"]
    assert evaluation.judge(Red(), images, attack)["accuracy"] == 0
    assert evaluation.judge(Red(), images, attack, source=Blue())["accuracy"] == 100  # blue moves, red does not


def test_corruptions_are_a_mean_over_kinds_and_severities(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 3, 32, 32), generator=g, dtype=torch.uint8)
    images = data.Images(x, torch.arange(6) % 2, 2)
    kinds = ("contrast", "brightness")
    net = Red()
    slow = [(net(corruptions.corrupt(x / 255, kind, s)).argmax(1) == images.y).float().mean().item() * 100
            for kind in kinds for s in range(1, 6)]
    found = evaluation.corrupted(net, images, kinds)
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
    found, slow = evaluation.corrupted(net, images, kinds, tmp_path), torch.stack(slow)
    assert found["accuracy"] == pytest.approx(slow.mean().item(), abs=0.01)
    assert found["stderr"] == pytest.approx(slow.mean(0).std().item() / 6**0.5, abs=0.01)
    with pytest.raises(ValueError, match="10 images a severity, for 12"):
        evaluation.corrupted(net, data.Images(torch.cat([images.x] * 2), torch.zeros(12), 2), kinds, tmp_path)


def test_the_command_measures_corruptions_and_a_curve_and_draws(exported):
    lines = run_main(exported, "--preset", "amoc-slf", "--attacks", "c-like", "curve", "--pictures",
                     "--test-limit", "5")
    assert len(lines[0]["results"]["c-like"]["kinds"]) == 13
    curve = [line["results"] for line in lines[1:]]
    assert [attack for found in curve for attack in found] == list(evaluation.CURVE)
    radii = [getattr(evaluation.ATTACKS.get(a), "eps", 0) * 255 for a in evaluation.CURVE]
    assert radii == pytest.approx([0, 1, 2, 4, 6, 8, 12, 16])
    picture = torchvision.io.read_image(str(exported / "attacked-amoc-slf-adv-pgd20.png"))
    assert picture.shape[1:] == (3 * 34 + 2, 5 * 34 + 2)


def test_images_are_brought_to_another_size(exported):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    images = evaluation.resized(data.Images(x, torch.zeros(2).long(), 1), 8)
    want = F.interpolate(x.float(), size=8, mode="bilinear", antialias=True)
    assert images.x.dtype == torch.uint8 and (images.x - want).abs().max() <= 1
    assert evaluation.resized(images, None) is images and evaluation.resized(images, 8) is images
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


def test_dual_batchnorm_shows_each_branch_its_own_images_and_keeps_adv(exported):
    """TRADES with a clean and an adversarial branch: slow, with two networks of plain BatchNorm."""
    net = evaluation.Classifier(encoders.load_encoder(exported / "encoder.pt", all_branches=True), 3).train()
    p = evaluation.PRESETS["robustssl-aff"]
    x, y, noise = torch.rand(6, 3, 32, 32), torch.arange(6) % 3, torch.rand(6, 3, 32, 32)
    clean, adv = (evaluation.Classifier(encoders.load_encoder(exported / "encoder.pt", bn), 3).train()
                  for bn in ("clean", "adv"))
    for other in (clean, adv):
        other.head.load_state_dict(net.head.state_dict())
    start = (x + 0.001 * 2**0.5 * torch.erfinv(0.9999 * (2 * noise - 1))).clamp(0, 1)
    clean.eval(), adv.eval()
    target = clean(x).detach()
    x_adv = pgd(lambda v: evaluation.kl(target, adv(v)), x, 8 / 255, 2 / 255, 10, start=start)
    clean.train(), adv.train()
    want = evaluation.trades(clean(x), adv(x_adv), y)
    loss = evaluation.classifier_loss(net, x, y, p, noise)
    torch.testing.assert_close(loss, want)

    loss.backward()
    assert all(w.grad is not None for w in net.parameters())
    evaluation.save_classifier(net, exported / "c.pt")
    loaded = evaluation.load_classifier(exported / "c.pt")
    torch.testing.assert_close(loaded(x), adv.eval()(x))


def test_other_data_or_another_attack_of_the_same_name_is_measured_anew(exported, monkeypatch):
    flags = ["--preset", "amoc-slf", "--attacks", "clean", "pgd20"]
    first = run_main(exported, *flags)
    monkeypatch.setitem(evaluation.ATTACKS, "pgd20", evaluation.Attack("linf", 16 / 255, 4 / 255, 20))
    more = run_main(exported, *flags)[len(first):]
    assert [list(line["results"]) for line in more] == [["pgd20"]]
    evaluation.main([str(exported / "encoder.pt"), "--data", tiny_npz(exported / "tiny.npz", 60), "--device", "cpu",
                     "--epochs", "1", "--milestones", "--batch-size", "16", *flags])
    assert len(table.lines(exported / "eval.jsonl")) == len(first) + len(more) + 2


def test_the_first_n_are_a_fair_sample_of_sorted_images_with_and_without_a_limit(exported, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "judge", lambda net, images, attack, seed, n, *more: seen.append(
        images.y[:n].tolist()) or {"accuracy": 1, "stderr": 1, "images": n})
    monkeypatch.setattr(evaluation, "sanity", lambda *args: {})
    rng = numpy.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 32, 32, 3), dtype=numpy.uint8), numpy.arange(40) // 10
    numpy.savez(exported / "sorted.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    for more in ([], ["--test-limit", "30"]):
        evaluation.main([str(exported / "encoder.pt"), "--data", str(exported / "sorted.npz"), "--device", "cpu",
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
        evaluation.load_classifier(path)


def test_a_missing_tensor_is_named(exported):
    run_main(exported, "--preset", "amoc-slf", "--attacks", "clean")
    path = exported / "classifier-amoc-slf-adv.pt"
    saved = torch.load(path, weights_only=True)
    del saved["state"]["head.bias"]
    torch.save(saved, path)
    with pytest.raises(ValueError, match="head.bias is missing"):
        evaluation.load_classifier(path)


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
    net = evaluation.Classifier(encoders.make("slim").eval(), 10)
    net.encoder.branch = None
    images, test = data.load("shapes", limit=4000), data.load("shapes", split="test", limit=1000)
    evaluation.train(net, images, evaluation.PRESETS["amoc-slf"]._replace(epochs=6, milestones=(4,)), seed=0)
    assert 10 < evaluation.judge(net, test)["accuracy"] < 35
