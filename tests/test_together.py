"""Classifiers judged together: the ensemble's logits and gradient, the matrix of transferred attacks, what is kept,
and what is refused."""
import json

import pytest
import torch
from torch import nn

import eval as command
from common import data, encoders, files
from evaluation import attacks, finetune, names, results, sets, together
from tests.scripts import tiny_npz


class Tiny(nn.Module):
    """Images (B, 3, 8, 8) -> logits (B, 3), curved, of its own seed."""

    def __init__(self, seed, scale=20.0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(192, 16, generator=g) / 14)
        self.second = nn.Parameter(torch.randn(16, 3, generator=g) * scale / 4)
        self.path = f"tiny {seed}"

    def forward(self, x):
        return ((x.flatten(1) - 0.5) @ self.first.to(x)).tanh() @ self.second.to(x)


def tiny_images(n=60):
    """Labels that the first network finds likely, with every third image's changed."""
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
    y = sum(Tiny(seed)(x / 255).softmax(1) for seed in range(3)).argmax(1)
    y[::3] = (y[::3] + 1) % 3
    return data.Images(x, y, 3)


NETS = [Tiny(seed) for seed in range(3)]
STRONG = attacks.Attack("linf", 8 / 255, 2 / 255, 20)
WEAK = attacks.Attack("linf", 0.5 / 255, 0.125 / 255, 20)


# The ensemble -----------------------------------------------------------------------------------------------
def test_the_ensembles_logits_and_their_gradient_equal_a_slow_mean_of_probabilities():
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def slow(image):
        mean = torch.zeros(3, dtype=torch.float64)
        for net in NETS:
            logits = net(image[None])[0]
            mean = mean + logits.exp() / logits.exp().sum() / len(NETS)
        return mean.log()

    x.requires_grad_()
    want = torch.stack([slow(image) for image in x])
    (want_g,) = torch.autograd.grad((want * weights).sum(), x)
    net = together.Ensemble(NETS)
    found = net(x)
    (g,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(g, want_g, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5), check_dtype=False)


class Given(nn.Module):
    """Logits (classes,) times what the first pixel is."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return x.flatten(1)[:, :1] * self.logits


@pytest.mark.parametrize("size", [1e3, 1e10, 1e30, 1e38])
def test_extreme_logits_stay_finite_gradient_included(size):
    x = torch.ones(2, 3, 1, 1, requires_grad=True)
    for others in ((size, 0.0, -size), (-size, size, 0.0)):
        found = together.Ensemble([Given(size, -size, 0.0), Given(*others)])(x)
        (g,) = torch.autograd.grad(found[:, 0].sum(), x)
        assert found.isfinite().all() and g.isfinite().all()
    assert found[0, 0].item() == pytest.approx(-0.6931, abs=1e-3) == found[0, 1].item()  # each is sure of its own


def test_an_attack_through_the_ensemble_is_at_least_as_good_as_one_from_a_member():
    images = tiny_images()
    net = together.Ensemble(NETS)
    clean = attacks.judge(net, images)["accuracy"]
    own = attacks.judge(net, images, STRONG)["accuracy"]
    transferred = [attacks.judge(net, images, STRONG, source=member)["accuracy"] for member in NETS]
    assert own <= min(transferred) and own < max(transferred) < clean
    blocked = together.Ensemble([NETS[0], nn.Sequential(NETS[1])])
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    for member in NETS[:2]:
        member.zero_grad()
    blocked(x)[:, 0].sum().backward()
    assert all(member.first.grad.abs().max() > 0 for member in NETS[:2])  # through every member
    for member in NETS:
        member.zero_grad()


# The matrix -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("restarts", [1, 2])
def test_each_row_of_the_matrix_equals_judge_with_that_source_and_the_diagonal_the_plain_attack(restarts):
    images = tiny_images(50)
    for i, source in enumerate(NETS):
        right, broken, unmoved = together.judged_by_all(NETS, images, STRONG, source, 3, restarts, 20)
        assert right.shape == (3, 50) and not broken.any() and not unmoved.any()
        for j, net in enumerate(NETS):
            want = attacks.judge(net, images, STRONG, 3, None, restarts, source, 20)["accuracy"]
            assert 100 * int(right[j].sum()) / 50 == want
        assert 100 * int(right[i].sum()) / 50 == attacks.judge(
            source, images, STRONG, 3, None, restarts, None, 20)["accuracy"]
    right, _, _ = together.judged_by_all(NETS, images, None, NETS[0], 3, 1, 20)
    assert [100 * int(row.sum()) / 50 for row in right] == [attacks.judge(net, images)["accuracy"] for net in NETS]


def test_under_restarts_the_worst_counts_for_every_column(monkeypatch):
    images = tiny_images(4)
    asked = []

    def attacked(source, x, y, attack, seed, batch_size):
        asked.append(seed)
        return (1 - x if len(asked) == 1 else x), {}

    monkeypatch.setattr(attacks, "attacked", attacked)
    right, _, _ = together.judged_by_all(NETS, images, STRONG, NETS[0], 0, 2, 500)
    x = images.x / 255
    want = [(net(x).argmax(1) == images.y) & (net(1 - x).argmax(1) == images.y) for net in NETS]
    last = [net(x).argmax(1) == images.y for net in NETS]
    assert torch.equal(right, torch.stack(want)) and not torch.equal(right, torch.stack(last))
    assert len(set(asked)) == 2


def test_what_all_miss_is_counted_as_in_a_loop():
    right = torch.rand(4, 101, generator=torch.Generator().manual_seed(0)) < 0.5
    slow = 0
    for image in range(101):
        if not any(bool(right[k, image]) for k in range(4)):
            slow += 1
    assert together.missed_by_all(right) == slow > 0


@pytest.mark.parametrize("n", [1, 8, 13, 64])
def test_what_is_right_can_be_kept_as_text(n):
    right = torch.rand(3, n, generator=torch.Generator().manual_seed(0)) < 0.5
    texts = json.loads(json.dumps(together.to_text(right)))
    assert torch.equal(together.from_text(texts, 3, n), right)
    for bad in (None, texts[:2], [1, 2, 3], ["zz"] * 3, [text + "00" for text in texts], "abc"):
        assert together.from_text(bad, 3, n) is None


def test_logits_that_are_not_finite_count_as_fooled():
    class Broken(Tiny):
        def forward(self, x):
            logits = super().forward(x)
            moved = (x * 255 - (x * 255).round()).abs().flatten(1).max(1).values > 1e-3
            return logits.masked_fill(moved[:, None], torch.nan)

    images = tiny_images(10)
    right, broken, _ = together.judged_by_all([NETS[0], Broken(1)], images, WEAK, NETS[0], 0, 1, 500)
    assert broken.tolist() == [0, 10] and not right[1].any() and right[0].any()


def test_images_that_an_attack_made_on_a_network_without_a_gradient_cannot_move_are_counted():
    class Saturated(nn.Module):
        def forward(self, x):
            return 1e6 * NETS[0](x)

    images = tiny_images(10)
    saturated = Saturated()
    nets = [NETS[1], saturated]
    right, _, unmoved = together.judged_by_all(nets, images, WEAK, saturated, 0, 1, 500)
    assert unmoved[1] == right[1].sum() > 0  # where the saturated network errs, it has a gradient
    assert 0 < unmoved[0] <= right[0].sum()
    _, _, unmoved = together.judged_by_all(nets, images, WEAK, NETS[1], 0, 1, 500)
    assert not unmoved.any()
    _, _, unmoved = together.judged_by_all(nets, images, None, saturated, 0, 1, 500)
    assert not unmoved.any()  # clean images are not attacked


# The command ------------------------------------------------------------------------------------------------
def classifier(path, seed=0, classes=4, side=16, made=None):
    torch.manual_seed(seed)
    encoder = encoders.make("slim")
    encoder.branch = None
    net = finetune.Classifier(encoder, classes)
    path.parent.mkdir(exist_ok=True)
    results.save_classifier(net, path, json.dumps(made) if made else None, side)
    return str(path)


@pytest.fixture
def two(tmp_path):
    paths = [classifier(tmp_path / name / "classifier-amoc-slf.pt", seed) for seed, name in enumerate("ab")]
    return [*paths, "--data", tiny_npz(tmp_path / "tiny.npz"), "--device", "cpu"]


def printed(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|") or line.startswith("kept")]


def test_the_command_judges_an_ensemble_and_its_members_and_measures_nothing_twice(two, tmp_path, monkeypatch, capsys):
    names_asked = ["clean", "pgd2-8", "aa-2"]
    asked = []

    def autoattack(net, x, y, *settings, **more):
        asked.append((net, len(x)))
        return x, {"warnings": [], "stages": {}, "standing": (net(x).argmax(1) == y).tolist()}

    monkeypatch.setattr(attacks, "autoattack", autoattack)
    monkeypatch.setattr(attacks, "sanity", lambda net, *rest: {})
    words = ["--ensemble", *two, "--attacks", *names_asked, "--aa-limit", "3"]
    command.main(words)
    first = printed(capsys)
    kept = tmp_path / "a" / "ensemble.jsonl"
    assert first[-1] == f"kept in {kept}" and len(first) == 6
    assert [line.split(" | ")[0].strip("| ") for line in first[2:5]] == [*two[:2], "**mean softmax of the 2**"]
    lines = [json.loads(line) for line in open(kept)]
    assert len(lines) == 9 and [len(line["classifiers"]) for line in lines] == [1] * 6 + [2] * 3
    nets = [results.load_classifier(path) for path in two[:2]]
    test = attacks.resized(data.load(str(tmp_path / "tiny.npz"), split="test", shuffle=True), 16)
    for k, net in enumerate([*nets, together.Ensemble(nets)]):
        found = [line["result"] for line in lines[3 * k : 3 * k + 3]]
        assert found[0]["accuracy"] == attacks.judge(net, test)["accuracy"]
        assert found[1]["accuracy"] == attacks.judge(net, test, names.attack_named("pgd2-8"))["accuracy"]
        assert found[2]["images"] == 3
        cells = [f"{result['accuracy']:.2f} ({result['stderr']:.2f})" for result in found]
        assert [cell.rstrip("†") for cell in first[2 + k].removesuffix(" |").split(" | ")[1:]] == cells

    assert [size for _, size in asked] == [3] * 3 and type(asked[2][0]) is together.Ensemble  # attacked itself

    with monkeypatch.context() as m:
        m.setattr(sets, "measure", None)
        command.main(words)
        assert printed(capsys) == first
        for other in (["--seed", "1"], ["--test-limit", "5"], ["--out", str(tmp_path / "elsewhere")]):
            with pytest.raises(TypeError):
                command.main([*words, *other])
    capsys.readouterr()
    files.append_json_line(kept, {"classifiers": 5, "result": 7})
    with open(kept, "a") as file:
        file.write('{"cut')
    command.main([*words, "--attacks", "clean", "--out", str(tmp_path / "new" / "folder")])
    assert printed(capsys)[-1] == f"kept in {tmp_path / 'new' / 'folder' / 'ensemble.jsonl'}"
    command.main(words)
    assert printed(capsys) == first


def test_the_command_makes_a_matrix_and_measures_nothing_twice(two, tmp_path, monkeypatch, capsys):
    words = ["--matrix", *two, "--attacks", "pgd2-8", "pgd1-16"]
    command.main(words)
    first = printed(capsys)
    lines = [json.loads(line) for line in open(tmp_path / "a" / "matrix.jsonl")]
    assert [line["attack"] for line in lines] == ["clean", "pgd2-8", "pgd2-8", "pgd1-16", "pgd1-16"]
    nets = [results.load_classifier(path) for path in two[:2]]
    test = attacks.resized(data.load(str(tmp_path / "tiny.npz"), split="test", shuffle=True), 16)

    def row(text):
        return [cell.strip() for cell in text.strip("|").split("|")]

    for name, block in (("pgd2-8", first[:6]), ("pgd1-16", first[6:12])):
        attack = names.attack_named(name)
        assert row(block[0]) == [f"{name} made on", "1", "2", "all miss, of 20"]
        assert [row(text)[0] for text in block[2:]] == ["none: clean", f"1: {two[0]}", f"2: {two[1]}", "each on itself"]
        want = [[attacks.judge(net, test, attack, source=source)["accuracy"] for net in nets] for source in nets]
        figures = [[float(cell.split()[0]) for cell in row(text)[1:3]] for text in block[2:]]
        assert figures == [[attacks.judge(net, test)["accuracy"] for net in nets], *want, [want[0][0], want[1][1]]]
        right = [together.judged_by_all(nets, test, attack, source, 0, 1, 500)[0] for source in nets]
        clean, _, _ = together.judged_by_all(nets, test, None, nets[0], 0, 1, 500)
        misses = [together.missed_by_all(found) for found in (clean, *right, torch.stack([right[0][0], right[1][1]]))]
        assert [int(row(text)[3]) for text in block[2:]] == misses
    with monkeypatch.context() as m:
        m.setattr(together, "judged_by_all", None)
        command.main(words)
        assert printed(capsys) == first
        with pytest.raises(TypeError):
            command.main([*words, "--restarts", "2"])
    damaged = [line | {"result": {**line["result"], "right": ["zz", "zz"]}} for line in lines]
    (tmp_path / "a" / "matrix.jsonl").write_text("".join(json.dumps(line) + "\n" for line in damaged))
    capsys.readouterr()
    command.main(words)
    assert printed(capsys) == first  # measured again


@pytest.mark.parametrize("flags, words", [
    ([], "PATH is missing: give encoders, or classifiers by --ensemble or --matrix"),
    (["e.pt", "--out", "x"], "--out goes with --ensemble or --matrix"),
    (["--ensemble", "a.pt"], "--ensemble a.pt: give two classifiers or more"),
    (["--matrix", "a.pt"], "--matrix a.pt: give two classifiers or more"),
    (["--matrix", "a.pt", "b.pt", "--ensemble", "a.pt", "b.pt"], "--ensemble and --matrix: give one of them"),
    (["e.pt", "--ensemble", "a.pt", "b.pt"], "e.pt: --ensemble takes all its classifiers itself"),
    (["--ensemble", "a.pt", "b.pt", "--kept"], "--kept: leave it out"),
    (["--ensemble", "a.pt", "b.pt", "--lr", "1"], "--lr: has no place with --ensemble"),
    (["--matrix", "a.pt", "b.pt", "--protocol", "slf"], "--protocol: has no place with --matrix"),
    (["--matrix", "a.pt", "b.pt", "--source", "c.pt"], "--source: has no place with --matrix"),
    (["--matrix", "a.pt", "b.pt", "--attacks", "aa-2"], "--matrix, --attacks aa-2: AutoAttack stops just beyond"),
    (["--matrix", "a.pt", "b.pt", "--attacks", "c-like"], "--matrix, --attacks c-like: corruptions are made on no"),
    (["--matrix", "a.pt", "b.pt", "--attacks", "clean"], "--matrix, --attacks clean: give an attack, as pgd20"),
    (["--ensemble", "a.pt", "b.pt", "--attacks", "c", "--data", "stl10"], "none of stl10; c-like works"),
    (["--ensemble", "a.pt", "b.pt"], "a.pt: no such file"),
])
def test_flags_that_make_no_sense_together_are_one_line(flags, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        command.main(flags)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--ensemble", "--matrix"])
def test_classifiers_that_do_not_go_together_or_with_the_images_are_one_line(flag, two, tmp_path):
    path, *rest = two
    rest = rest[1:]
    others = {
        "five.pt": (dict(classes=5), f"{flag}: .*a/classifier-amoc-slf.pt has 4 classes and .*five.pt has 5"),
        "side.pt": (dict(side=64), f"{flag}: .* trained on images of side 16 and .*side.pt of side 64; they must"),
    }
    for name, (how, words) in others.items():
        with pytest.raises(ValueError, match=words) as raised:
            command.main([flag, path, classifier(tmp_path / name, **how), *rest])
        assert "\n" not in str(raised.value)
    (tmp_path / "same.pt").write_bytes(open(path, "rb").read())
    for same in (path, str(tmp_path / "same.pt")):
        with pytest.raises(ValueError, match=f"{flag}: .*amoc-slf.pt and {same} are one classifier, given twice"):
            command.main([flag, path, same, *rest])
    with pytest.raises(ValueError, match="--image-size 32: .*a/classifier.* was trained on images of side 16"):
        command.main([flag, *two, "--image-size", "32"])
    fives = [classifier(tmp_path / f"{seed}.pt", seed, classes=5) for seed in (1, 2)]
    with pytest.raises(ValueError, match="tiny.npz: has 4 classes, .*1.pt has 5"):
        command.main([flag, *fives, *rest])
    other = classifier(tmp_path / "cifar.pt", 3, made={"data": "cifar10"})
    with pytest.raises(ValueError, match="--data shapes: .*cifar.pt was trained on cifar10; --data cifar10"):
        command.main([flag, path, other, *rest, "--data", "shapes"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--out .*file cannot be made: File exists"):
        command.main([flag, *two, "--out", str(tmp_path / "file")])
    assert not list(tmp_path.glob("**/*.jsonl"))


def test_the_folder_of_the_results_is_locked(two, monkeypatch, tmp_path):
    locked = []
    monkeypatch.setattr(files, "lock", locked.append)
    monkeypatch.setattr(together, "load_images", None)
    with pytest.raises(TypeError):
        command.main(["--matrix", *two])
    assert locked == [tmp_path / "a"]


def test_images_are_brought_to_the_side_that_the_classifiers_were_trained_on(tmp_path, two, capsys):
    unsaid = classifier(tmp_path / "unsaid.pt", 5, side=None)
    small = classifier(tmp_path / "small.pt", 6, side=16)
    command.main(["--ensemble", unsaid, small, *two[2:], "--attacks", "clean"])
    assert "20 test images of side 16, 4 classes" in capsys.readouterr().out
