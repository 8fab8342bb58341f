"""The vote over noisy copies, attacked through the expectation: evaluation/vote.py, AutoAttack's version rand, and
--vote of eval.py."""
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval as command
from common import data, encoders
from evaluation import attacks, presets, sets, together
from evaluation import autoattack as aa
from evaluation.attacks import Attack, AutoAttack
from evaluation.vote import ROWS, Vote, expected, vote
from tests.recipes import X
from tests.scripts import tiny_npz


def S(n, d, p):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


# ----------------------------------------------------------------------------------------------------------
# The vote
# ----------------------------------------------------------------------------------------------------------
def test_the_vote_equals_printed_values_and_its_gradient():
    logits = 2 * S(6, 4, 0.3).view(3, 2, 4)
    logits.requires_grad_()
    found = vote(logits)
    wanted = [-1.89357855, -0.971539171, -1.62665688, -1.29323346, -1.12411078, -1.77370262, -1.36342693, -1.38800575]
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-8)
    loss = F.cross_entropy(found, torch.tensor([0, 1]))
    (g,) = torch.autograd.grad(loss, logits)
    values = [loss.item(), g.norm().item(), g.flatten()[0].item(), g.flatten()[-1].item()]
    assert values == pytest.approx([1.83364059, 0.476197604, -0.0984039987, 0.103756826], abs=1e-8)
    torch.testing.assert_close(found.exp(), logits.softmax(2).mean(0))
    torch.testing.assert_close(vote(logits[:1]), logits[0].log_softmax(1))


def test_the_vote_of_sure_networks_is_finite():
    logits = torch.tensor([[[1000.0, 0, -1000]], [[999.0, 0, -1000]]])
    assert vote(logits).isfinite().all()
    assert vote(logits).tolist()[0] == pytest.approx([0, -999 - 1 / 2, -1999 - 1 / 2], abs=0.3)


class Spy(nn.Module):
    """A linear classifier that keeps what it is shown."""

    def __init__(self, pixels=48, classes=4):
        super().__init__()
        self.weight = S(classes, pixels, 0.7)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x.flatten(1) @ self.weight.T.to(x.dtype)


def voting(copies=3, sigma=0.25, draws=2, seed=0, **size):
    return Vote(Spy(**size), copies, sigma, draws, seed, torch.device("cpu"))


def test_each_copy_of_each_image_has_noise_of_its_own_anew_in_each_query():
    x = torch.full((5, 3, 16, 16), 0.5)
    net = voting(copies=4, sigma=0.5, pixels=768)
    for _ in range(3):
        net(x)
    noise = torch.cat(net.net.seen) - 0.5
    assert noise.shape == (3 * 4 * 5, 3, 16, 16) and len(noise.flatten(1).unique(dim=0)) == 60
    assert noise.std().item() == pytest.approx(0.5, abs=0.01) and abs(noise.mean()) < 0.01
    assert noise.abs().max() > 1.5  # not clipped to [0, 1]
    together = torch.corrcoef(noise.flatten(1)) - torch.eye(60)
    assert together.abs().max() < 0.2
    again, other = voting(copies=4, sigma=0.5, pixels=768), voting(copies=4, sigma=0.5, seed=1, pixels=768)
    again(x), other(x)
    assert torch.equal(again.net.seen[0], net.net.seen[0]) and not torch.equal(other.net.seen[0], net.net.seen[0])


def test_votes_are_those_of_each_images_copies_however_many_pass_at_a_time(monkeypatch):
    x = X(6, 3, 4, 4)
    net = voting(copies=5)
    found = net(x)
    copies = torch.cat(net.net.seen).view(5, 6, 3, 4, 4)
    for i in range(6):
        softmax = [(net.net.weight @ copy.flatten()).softmax(0) for copy in copies[:, i]]
        torch.testing.assert_close(found[i].double().exp(), sum(softmax) / 5, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("evaluation.vote.ROWS", 7)
    torch.testing.assert_close(voting(copies=5)(x), found)
    assert ROWS == 1000


# ----------------------------------------------------------------------------------------------------------
# Attacks through the expectation
# ----------------------------------------------------------------------------------------------------------
def mean_gradient(weight, x, y, generator, copies, sigma, draws):
    """Over fresh draws of all copies, the mean gradient of -ln of the mean softmax of y, by hand."""
    total = torch.zeros_like(x)
    for _ in range(draws):
        noise = torch.randn((copies, *x.shape), generator=generator, dtype=x.dtype)
        for i in range(len(x)):
            p = [(weight @ (x[i] + sigma * noise[c, i]).flatten()).softmax(0) for c in range(copies)]
            mean = sum(row[y[i]] for row in p)
            for row in p:  # d p_y / d x = p_y (w_y - sum_k p_k w_k)
                total[i] -= (row[y[i]] / mean * (weight[y[i]] - row @ weight)).view(x[i].shape)
    return total / draws / len(x)


def test_the_gradient_is_the_mean_over_fresh_draws_of_that_of_the_votes_loss():
    x = X(4, 3, 4, 4)
    y = torch.tensor([0, 1, 2, 3])
    net = voting(copies=3, sigma=0.3, draws=5)
    loss = expected(lambda x: F.cross_entropy(net(x), y), 5)
    v = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(v), v)
    generator = torch.Generator().manual_seed(0)
    wanted = mean_gradient(net.net.weight, x, y, generator, 3, 0.3, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert len(net.net.seen) == 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_on_a_vote_climbs_its_mean_gradient(norm):
    """A step from the start that the seed gives, and the draws of each step are new."""
    x = X(4, 3, 4, 4)
    y = torch.tensor([0, 1, 2, 3])
    row = Attack(norm, 0.1, 0.02, 2)
    net = voting(copies=3, sigma=0.3, draws=4)
    found, _ = attacks.attacked(net, x, y, row, seed=7)
    assert len(net.net.seen) == 2 * 4
    plain = attacks.attacked(net.net, x, y, row._replace(steps=0), seed=7)[0]
    generator = torch.Generator().manual_seed(0)
    wanted = plain
    for _ in range(2):
        g = mean_gradient(net.net.weight, wanted, y, generator, 3, 0.3, 4)
        unit = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1)[:, None, None, None]
        delta = wanted + 0.02 * unit - x
        if norm == "linf":
            delta = delta.clamp(-0.1, 0.1)
        else:
            delta = delta * (0.1 / delta.flatten(1).norm(dim=1).clamp_min(0.1))[:, None, None, None]
        wanted = (x + delta).clamp(0, 1)
    assert (found - wanted).abs().max() < 1e-4


def test_a_plain_network_is_attacked_as_ever():
    x = X(4, 3, 4, 4)
    net = Spy()
    attacks.attacked(net, x, torch.tensor([0, 1, 2, 3]), Attack("linf", 0.1, 0.02, 3), seed=7)
    assert len(net.seen) == 3


class Coin(nn.Module):
    """Two sums of pixels and a constant as logits, all with noise of its own in each query."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        self.generator = torch.Generator().manual_seed(3)
        self.asked = []

    def forward(self, x):
        z = torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2)), x[:, 2].mean((1, 2))], 1) * 10
        self.asked.append(x.detach().clone())
        return z + self.noise * torch.randn(z.shape, generator=self.generator)


def test_gradients_of_version_rand_are_means_over_20_draws_and_no_point_stops_early(monkeypatch):
    monkeypatch.setattr(aa, "apgd", functools.partial(aa.apgd, steps=5))
    asked = []
    gradient = aa.Queries.gradient

    def watched(query, x, loss):
        if query.draws > 1:
            asked.append((query.draws, len(x)))
        return gradient(query, x, loss)

    monkeypatch.setattr(aa.Queries, "gradient", watched)
    x = torch.full((3, 3, 5, 5), 0.5)
    x[:, 0] = 0.9
    net = Coin(0.3)
    _, report = aa.autoattack(net, x, torch.zeros(3, dtype=torch.long), 1e-3, version="rand")
    assert list(report["stages"]) == ["apgd-ce", "apgd-dlr"] and report["warnings"] == []
    assert asked == 2 * 6 * [(20, 3)]  # both stages, on all points to the end
    for stage in report["stages"].values():
        assert stage["backwards"] == 3 * 6 * 20
    assert report["standing"] == [True] * 3 and report["robust"] == 100


def test_a_point_that_a_draw_misclassifies_goes_on_to_the_end_of_its_stage(monkeypatch):
    """Its last misclassified iterate counts, not the first, which may be luck."""
    monkeypatch.setattr(aa, "apgd", functools.partial(aa.apgd, steps=5))
    asked = []
    gradient = aa.Queries.gradient
    monkeypatch.setattr(aa.Queries, "gradient", lambda query, x, loss: asked.append(len(x)) or gradient(query, x, loss))
    x = torch.full((40, 3, 5, 5), 0.5)
    x[:, 0] = 0.7
    _, report = aa.autoattack(Coin(1.0), x, torch.zeros(40, dtype=torch.long), 1e-3, version="rand")
    points = [stage["points"] for stage in report["stages"].values()]
    assert asked[-12:] == 6 * [points[0]] + 6 * [points[1]] and 40 > points[0] > points[1] > 0


def test_the_mean_gradient_is_that_of_the_draws_and_logits_and_loss_are_the_last_ones():
    x = X(2, 3, 5, 5).float()
    y = torch.tensor([0, 1])
    query = aa.Queries(Coin(1.0), draws=6)
    logits, value, found = query.gradient(x, lambda z: aa.cross_entropy(z, y))
    net, total = Coin(1.0), 0
    for _ in range(6):
        v = x.clone().requires_grad_()
        z = net(v)
        loss = F.cross_entropy(z, y, reduction="none")
        total = total + torch.autograd.grad(loss.sum(), v)[0]
    torch.testing.assert_close(found, total / 6)
    assert torch.equal(logits, z) and torch.equal(value, loss)
    assert (query.forwards, query.backwards) == (12, 12)


def test_a_random_network_is_a_doubt_for_the_standard_version_and_none_for_rand():
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4, dtype=torch.long)
    logits = Coin(1.0)(x)
    assert any("random" in text for text in aa.misuse(aa.Queries(Coin(1.0)), x, y, logits))
    assert aa.misuse(aa.Queries(Coin(1.0)), x, y, logits, may_be_random=True) == []


def test_points_that_another_draw_denies_are_not_tried_again_and_what_fell_counts_as_fallen(monkeypatch):
    """Of a random network the accuracy is what AutoAttack found, not another draw on images left as they were."""
    calls = []

    def stage(query, x, y, eps, norm, generator, stop=True):
        calls.append(len(x))
        return (x + 1e-4).clamp(0, 1)

    monkeypatch.setitem(aa.STAGES, "apgd-ce", stage)
    monkeypatch.setitem(aa.STAGES, "apgd-dlr", stage)
    x = torch.full((200, 3, 5, 5), 0.5)
    images = data.Images((x * 255).round().to(torch.uint8), torch.zeros(200, dtype=torch.long), 3)
    net = Coin(1.0)  # right in a third of the draws
    found = attacks.judge(net, images, AutoAttack("linf", 0.1, "rand"), batch_size=250)
    assert len(calls) == 2 and calls[1] < calls[0] < 100
    assert found["accuracy"] == found["stages"]["apgd-dlr"]["robust"] < 15


def test_the_stages_of_version_rand_climb_their_losses(monkeypatch):
    x = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(aa, "apgd", lambda *given, **_: seen.append(given[5]) or (x, None))
    for stage in aa.VERSIONS["rand"]:
        aa.STAGES[stage](None, x, [0, 1], 0.1, "linf", None)
    assert seen == [aa.cross_entropy, aa.dlr]


def test_two_classes_have_no_dlr_loss():
    x = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="fewer than 3 classes"):
        _, report = aa.autoattack(lambda v: Spy(75, 2)(v).float(), x, [0, 1], 1e-6, version="rand")
    assert list(report["stages"]) == ["apgd-ce"]


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt")
    return tmp_path


def evaluate(folder, *more):
    tiny_npz(folder / "tiny.npz")
    command.main([str(folder / "encoder.pt"), "--data", str(folder / "tiny.npz"), "--device", "cpu", "--epochs", "1",
                  "--milestones", "--batch-size", "16", "--test-limit", "6", *more])


VOTE = ["--vote", "3", "--vote-sigma", "0.25", "--vote-draws", "2"]
CALLED = "amoc-slf epochs=1 milestones=none batch-size=16 vote=3 vote-sigma=0.25 vote-draws=2"


def lines(folder):
    return [json.loads(line) for line in open(folder / "eval.jsonl")]


def test_a_vote_has_columns_of_its_own_and_is_measured_once_and_apart_from_the_plain_classifier(
        folder, monkeypatch, capsys):
    evaluate(folder, "--attacks", "clean", "pgd2-8", *VOTE)
    assert f"| {CALLED} clean | {CALLED} pgd2-8 |" in capsys.readouterr().out
    first = lines(folder)
    for line in first:
        (result,) = line["results"].values()
        assert result["vote"] == {"copies": 3, "sigma": 0.25, "draws": 2}
    plain = CALLED.partition(" vote")[0]
    monkeypatch.setattr(command, "train", None)  # the classifier is the same one
    evaluate(folder, "--attacks", "clean", "pgd2-8")
    out = capsys.readouterr().out
    assert f"| {plain} clean | {plain} pgd2-8 |" in out and "vote=" not in out
    assert len(lines(folder)) == 4 and "vote" not in lines(folder)[2]["results"]["clean"]

    other = folder / "other"
    other.mkdir()
    for file in (folder / "encoder.pt", *folder.glob("classifier-*.pt")):
        (other / file.name).write_bytes(file.read_bytes())
    alone = ["--attacks", "pgd2-8", *VOTE, "--data", str(folder / "tiny.npz")]
    evaluate(other, *alone)  # by the same noise as after `clean`
    assert lines(other)[0]["results"]["pgd2-8"] == first[1]["results"]["pgd2-8"]

    capsys.readouterr()
    monkeypatch.setattr(sets, "measure", None)
    evaluate(folder, "--attacks", "clean", "pgd2-8", *VOTE)
    kept = [str(folder), "--kept", "--attacks", "clean"]
    capsys.readouterr()
    command.main(kept)
    assert f"| {plain} clean | {CALLED} clean |" in capsys.readouterr().out
    command.main([*kept, "--vote", "3"])
    assert capsys.readouterr().out.count(" clean |") == 1
    with pytest.raises(ValueError, match="nothing was measured"):
        command.main([*kept, "--vote", "4"])


def test_autoattack_on_a_vote_is_its_version_rand_and_fewer_images_pass_at_a_time(folder, monkeypatch):
    judged = []

    def judge(net, images, attack, seed, limit, restarts=1, source=None, batch_size=500):
        judged.append((net.copies, net.sigma, net.draws, attack, batch_size))
        assert net.generator.initial_seed() == seed == 5
        return attacks.score(50.0, 6)

    monkeypatch.setattr(attacks, "judge", judge)
    evaluate(folder, "--attacks", "aa-4", "--vote", "7", "--vote-sigma", "0.1", "--seed", "5")
    row = AutoAttack("linf", 4 / 255, "rand")
    assert judged[0] == (7, 0.1, presets.VOTE_DRAWS, row, 500 // 7)
    (line,) = lines(folder)
    assert line["results"]["aa-4"]["settings"]["version"] == "rand" and len(judged) == 4  # with its sanity
    assert all(given[-1] == 500 // 7 for given in judged)


@pytest.mark.parametrize("flags, words", [
    (["--vote", "3"], "--vote 3: needs the deviation of the noise"),
    (["--vote-sigma", "0.1"], "--vote-sigma and --vote-draws: go with --vote"),
    (["--vote-draws", "5"], "--vote-sigma and --vote-draws: go with --vote"),
    ([*VOTE, "--attacks", "deepfool"], "--vote, --attacks deepfool: is not made through an expectation"),
    ([*VOTE, "--attacks", "apgd"], "--vote, --attacks apgd: is not made through an expectation"),
    ([*VOTE, "--attacks", "c-like"], "--vote, --attacks c-like: is not made"),
    ([*VOTE, "--preset", "knn"], "--vote: k-NN has no softmax"), ([*VOTE, "--source", "c.pt"], "--vote: .* --source"),
    ([*VOTE, "--pictures"], "--vote: .* --pictures"), (["--vote", "0"], "--vote 0: must be a whole number"),
    (["--vote", "2", "--vote-sigma", "0"], "--vote-sigma 0: must be a number above 0")])
def test_flags_that_do_not_go_with_a_vote_are_named(folder, flags, words):
    with pytest.raises(ValueError, match=words):
        evaluate(folder, *flags)
    assert not (folder / "eval.jsonl").exists()


def test_an_ensembles_results_from_before_there_were_votes_are_known_again():
    args = command.parser().parse_args(["--ensemble", "a", "b"])
    images = data.Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2), 2)
    shown = sets.Sets(None, images, None, sets.contents(images), 8, None)
    assert "vote" not in together.key_of([], "clean", args, shown)


def test_names_of_votes():
    recipe = presets.recipe_of(presets.PRESETS["amoc-slf"])
    vote = {"copies": 10, "sigma": 0.25, "draws": presets.VOTE_DRAWS}
    assert presets.name_of("amoc-slf", recipe, vote) == "amoc-slf vote=10 vote-sigma=0.25"
    assert presets.name_of("amoc-slf", recipe, {**vote, "draws": 3}) == "amoc-slf vote=10 vote-sigma=0.25 vote-draws=3"
    assert presets.name_of("amoc-slf", recipe, None) == "amoc-slf"
    names = ["a vote=10 vote-sigma=0.25", "a", "a vote=9 vote-sigma=0.25"]
    assert presets.in_order(names) == ["a", "a vote=9 vote-sigma=0.25", "a vote=10 vote-sigma=0.25"]
