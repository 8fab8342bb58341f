"""Encoders from elsewhere, by files made here: strict, named faults, the features of the network itself."""
import argparse
import json

import pytest
import torch
import torchvision
from torch import nn

import eval as command
from common import data, encoders
from common.resnet import branch
from evaluation import finetune, foreign, results
from evaluation.flags import check
from tests.scripts import tiny_npz

PROBE = ["--device", "cpu", "--epochs", "1", "--milestones", "--batch-size", "16", "--preset", "amoc-slf"]


def flags(*words):
    return command.parser().parse_args(["weights.pth", *words])


def resnet(cifar=False):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    if cifar:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    with torch.no_grad():
        net(torch.rand(8, 3, 32, 32))  # running statistics
    return net.eval()


@pytest.mark.parametrize("cifar", [False, True])
@pytest.mark.parametrize("wrapped, prefix", [
    (lambda state: state, ""),
    (lambda state: {f"module.{key}": value for key, value in state.items()}, ""),
    (lambda state: {"state_dict": {**{f"module.encoder_q.{key}": value for key, value in state.items()},
                                   "module.queue": torch.zeros(3)}, "epoch": 3}, "module.encoder_q."),
    (lambda state: {"model": {key.replace(".downsample.", ".shortcut.").replace("fc.", "linear."): value
                              for key, value in state.items()}}, "")],
    ids=["plain", "DataParallel", "MoCo", "shortcut"])
def test_features_are_those_of_the_network_itself(cifar, wrapped, prefix, tmp_path, capsys):
    net = resnet(cifar)
    torch.save(wrapped(net.state_dict()), tmp_path / "weights.pth")
    words = ["--encoder", "torchvision:resnet18", "--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.6", "0.7"]
    encoder = foreign.load(tmp_path / "weights.pth", flags(*words, "--prefix", prefix))
    assert ".weight, " in capsys.readouterr().out  # the classifier, which is left out, is named
    net.fc = nn.Identity()
    x = torch.rand(4, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(encoder(x), net((x - mean) / std))
    assert encoder.dim == 512 and not encoder.training and encoder.branch is None


NETWORKS = {"convnext_tiny": 768, "mobilenet_v3_small": 1024, "mnasnet0_5": 1280, "googlenet": 1024}


@pytest.mark.parametrize("name", NETWORKS)
def test_of_a_classifier_with_several_layers_only_the_last_one_goes(name, tmp_path, capsys):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    net = torchvision.models.get_model(name, weights=None, **options).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    encoder = foreign.load(tmp_path / "weights.pth", flags("--encoder", f"torchvision:{name}"))
    assert "left out: features are judged, not logits" in capsys.readouterr().out
    seen = []
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        net(x)
        torch.testing.assert_close(encoder(x), seen[0])
    assert encoder.dim == NETWORKS[name] and encoder.train()(x).shape == (2, encoder.dim)
    several = name in ("convnext_tiny", "mobilenet_v3_small")
    assert encoder.recipe["head"] is several
    if name != "convnext_tiny":  # which is large
        classifier = finetune.Classifier(encoder, 3).eval()
        results.save_classifier(classifier, tmp_path / "classifier.pt")
        with torch.no_grad():
            assert torch.equal(results.load_classifier(tmp_path / "classifier.pt")(x), classifier(x))

    args = argparse.Namespace(encoder="torchvision:x", prefix="", bn=None, mean=None, std=None, seed=0, data="x")
    shown = argparse.Namespace(size=64, train_digest="t")
    key = results.key_of(tmp_path / "weights.pth", encoder, "knn", None, args, shown)
    assert key.get("head") == (True if several else None)  # older results were of other features


def test_weights_without_a_classifier_give_what_precedes_it(tmp_path, capsys):
    net = torchvision.models.mobilenet_v3_small().eval()
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("classifier.")}
    torch.save(state, tmp_path / "weights.pth")
    encoder = foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:mobilenet_v3_small"))
    assert "features are what precedes them" in capsys.readouterr().out
    net.classifier = nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(x), net(x))
    assert encoder.recipe["head"] is False


def with_prefix(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("wrapped, prefix", [
    (lambda state: {"model": {"state_dict": state}, "epoch": 3}, ""),
    (lambda state: {"model": {"backbone": state, "projector": {"0.weight": torch.zeros(2)}}}, "backbone."),
    (lambda state: {"backbone": state, "step": 3}, "backbone."),
    (lambda state: {**state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, ""),
    (lambda state: {"model": with_prefix(state, "model.")}, "model."),
    (lambda state: {"teacher": with_prefix(state, "backbone."), "student": with_prefix(state, "module.backbone."),
                    "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "backbone."),
    (lambda state: {"teacher": {"w": torch.zeros(2)}, "student": with_prefix(state, "module.backbone.")},
     "student.module.backbone."),
    (lambda state: {**with_prefix(state, "module."), "queue": torch.zeros(2), 7: torch.zeros(2)}, "module.")])
def test_weights_are_found_in_dicts_within_dicts(wrapped, prefix, tmp_path):
    """And where they are not, the message says by which prefix they would be."""
    net = resnet()
    torch.save(wrapped(net.state_dict()), tmp_path / "weights.pth")
    words = ["--encoder", "torchvision:resnet18"]
    encoder = foreign.load(tmp_path / "weights.pth", flags(*words, "--prefix", prefix))
    net.fc = nn.Identity()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), net(x))
    if prefix and not prefix.startswith("student."):
        with pytest.raises(ValueError, match=f"100 missing .*; what would fit: --prefix {prefix}$"):
            foreign.load(tmp_path / "weights.pth", flags(*words))


def of_lists(state, branches):
    """A ResNet's weights as ACL's and AdvCL's programs write them: every BatchNorm a list, here of copies that grow."""
    written = {"normalize.mean": torch.zeros(3), "head_proj.0.weight": torch.zeros(2, 2)}
    for key, value in state.items():
        if key.startswith("fc."):
            written[key.replace("fc.", "fc_010.")] = value
            continue
        module, leaf = key.rsplit(".", 1)
        norm = f"{module}.running_mean" in state
        module = module.replace(".downsample.0", ".downsample.conv").replace(".downsample.1", ".downsample.bn")
        for branch in range(branches if norm else 1):
            grown = value if leaf == "num_batches_tracked" else value * (1 + branch)
            written[f"{module}.bn_list.{branch}.{leaf}" if norm else f"{module}.{leaf}"] = grown
    return written


def test_a_branch_of_acls_and_advcls_checkpoints_is_chosen_by_its_number(tmp_path):
    net = resnet(cifar=True)
    torch.save({"state_dict": of_lists(net.state_dict(), 2)}, tmp_path / "weights.pth")
    words = ["--encoder", "torchvision:resnet18", "--bn"]
    first, second = (foreign.load(tmp_path / "weights.pth", flags(*words, bn)) for bn in "01")
    net.fc = nn.Identity()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(first(x), net(x))
    torch.testing.assert_close(second.net.bn1.weight, 2 * net.bn1.weight)
    for bad in (words[:-1], [*words, "2"]):
        with pytest.raises(ValueError, match="its BatchNorms have the branches 0, 1; choose one by --bn"):
            foreign.load(tmp_path / "weights.pth", flags(*bad))
    torch.save(resnet().state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="--bn 0: its BatchNorms have no branches"):
        foreign.load(tmp_path / "plain.pth", flags(*words, "0"))


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("layer1.0.conv1.weight"), r"1 missing \(layer1.0.conv1.weight\)"),
    (lambda state: state.update({"layer9.conv1.weight": torch.zeros(2)}), r"1 extra \(layer9.conv1.weight\)"),
    (lambda state: state.update({"bn1.weight": torch.zeros(3)}), r"bn1.weight is \(3,\), expected \(64,\)"),
    (lambda state: [state.pop(key) for key in list(state) if "layer4" in key], "missing .*, \\.\\.\\.")])
def test_every_key_that_does_not_fit_is_named(change, words, tmp_path):
    state = resnet().state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=words):
        foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18"))


@pytest.mark.parametrize("words, text", [
    (["--encoder", "torchvision:resnet18", "--prefix", "backbone."], "no key begins so; the first are conv1.weight"),
    (["--encoder", "torchvision:resnet19"], "torchvision has no such model"),
    (["--encoder", "torchvision:fcn_resnet50"], "torchvision has no such model of whole images"),
    (["--encoder", "resnet18"], "torchvision:name, timm:name or my_file.py:function")])
def test_a_wrong_prefix_or_network_is_named(words, text, tmp_path):
    torch.save(resnet().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=text):
        foreign.load(tmp_path / "weights.pth", flags(*words))


@pytest.mark.parametrize("content", ["text", 7, {"epoch": 3}])
def test_a_file_without_weights_is_named(content, tmp_path):
    if content == "text":
        (tmp_path / "weights.pth").write_text("no weights")
    else:
        torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth: (cannot be read|holds)"):
        foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18"))


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n",
                                     b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": {}}'])
def test_what_torch_did_not_write_is_not_said_to_hold_more_than_tensors(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights; it is not what torch.save writes"):
        foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18"))


def test_a_checkpoint_with_more_than_weights_names_what_is_in_the_way(tmp_path):
    torch.save({"model": resnet().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="plain types, as argparse.Namespace. .*save the state_dict in it"):
        foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18"))
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be read as weights \(EOFError\), perhaps truncated"):
        foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18"))


@pytest.mark.parametrize("words, text", [
    (["--prefix", "a."], "go with --encoder"), (["--encoder", "a.py:b", "--mean", "0", "0", "0"], "give both"),
    (["--encoder", "timm:vit", "--bn", "adv"], "no BN branches")])
def test_flags_that_do_not_go_together_are_named(words, text):
    with pytest.raises(ValueError, match=text):
        check(flags(*words))


def test_timm_is_asked_for_where_it_is_not_there(monkeypatch, tmp_path):
    import sys
    monkeypatch.setitem(sys.modules, "timm", None)
    torch.save(resnet().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="needs timm: pip install timm"):
        foreign.load(tmp_path / "weights.pth", flags("--encoder", "timm:vit_tiny_patch16_224"))


@pytest.mark.outside
def test_timms_networks_load_strictly(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    encoder = foreign.load(tmp_path / "weights.pth", flags("--encoder", "timm:vit_tiny_patch16_224"))
    net.reset_classifier(0)
    x = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(encoder(x), net(x))


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "own"])
def test_the_command_judges_it_and_its_classifier_loads(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = tiny_npz(tmp_path / "tiny.npz")
    if spec == "own":
        (tmp_path / "mine.py").write_text(
            "from torch import nn\n\ndef make():\n"
            "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n")
        spec = "mine.py:make"
        torch.save({"0.weight": torch.rand(4, 3, 3, 3), "0.bias": torch.zeros(4)}, "weights.pth")
    else:
        torch.save(resnet(cifar=True).state_dict(), "weights.pth")
    command.main(["weights.pth", "--encoder", spec, "--data", images, "--attacks", "clean", "pgd2-1", *PROBE])
    shown = capsys.readouterr().out
    assert f"encoder {spec}; images in [0, 1] are not normalised" in shown
    lines = [json.loads(line) for line in open("eval.jsonl")]
    code = results.digest_of("mine.py") if spec == "mine.py:make" else None
    assert len(lines) == 2 and lines[0]["network"] == [spec, code, "", None, None, None]
    net = results.load_classifier("classifier-weights-amoc-slf-epochs=1-milestones=none-batch-size=16.pt")
    kept = results.load_classifier("classifier-weights-amoc-slf-epochs=1-milestones=none-batch-size=16.pt")
    x = data.load(images, split="test").x[:4] / 255
    assert isinstance(net, finetune.Classifier) and torch.equal(net(x), kept(x))
    command.main(["weights.pth", "--encoder", spec, "--data", images, "--attacks", "clean", "pgd2-1", *PROBE])
    assert len(open("eval.jsonl").readlines()) == 2  # nothing is measured again
    other = ["--mean", "0.1", "0.1", "0.1", "--std", "1", "1", "1"]
    command.main(["weights.pth", "--encoder", spec, "--data", images, "--attacks", "clean", *other, *PROBE])
    assert len(open("eval.jsonl").readlines()) == 3  # with another normalisation it is
    with pytest.raises(ValueError, match="measured twice, with another network"):
        command.main(["weights.pth", "--kept", "--attacks", "clean", "--preset", "amoc-slf"])


def test_the_prefix_that_is_proposed_for_dataparallel_is_the_one_that_fits(tmp_path):
    state = resnet().state_dict()
    for inner in ("backbone.", "_orig_mod.", "module."):
        torch.save({"state_dict": {f"module.{inner}{key}": value for key, value in state.items()}}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=f"what would fit: --prefix {inner}$"):
            foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18"))
        for prefix in (inner, f"module.{inner}", f"state_dict.module.{inner}"):
            encoder = foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18", "--prefix", prefix))
            assert torch.equal(encoder.net.conv1.weight, state["conv1.weight"]), prefix


def test_many_misshaped_weights_are_counted_and_the_first_named_in_order(tmp_path):
    torch.save(resnet().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError) as error:
        foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet50"))
    said = str(error.value)
    assert said.count(", expected (") == 5 and "more are of another shape" in said and len(said) < 900
    places = [said.index(f"{name} is (") for name in ("layer1.0.conv1.weight", "layer1.1.conv1.weight")]
    assert places == sorted(places)


def test_an_exported_network_of_ones_own_may_have_moved(tmp_path, monkeypatch, capsys):
    code = ("from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), "
            "nn.AdaptiveAvgPool2d(1), nn.Flatten())\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "net.py").write_text(code)
    encoder = encoders.make(f"{tmp_path}/here/net.py:make", ("clean", "adv"), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    with branch(encoder, "adv"):
        encoder(torch.rand(8, 3, 32, 32))
    encoders.export(encoder, tmp_path / "encoder.pt", "adv", image_size=24)
    wanted = encoders.load_encoder(tmp_path / "encoder.pt")
    (tmp_path / "here" / "net.py").rename(tmp_path / "there" / "net.py")
    with pytest.raises(ValueError, match="there is no file .*here/net.py"):
        encoders.load_encoder(tmp_path / "encoder.pt")
    there = f"{tmp_path}/there/net.py:make"
    found = foreign.load(tmp_path / "encoder.pt", flags("--encoder", there))
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(found(x), wanted(x)) and found.branch == "adv" and found.image_size == 24
    of_clean = flags("--encoder", there, "--bn", "clean")
    check(of_clean)
    assert foreign.load(tmp_path / "encoder.pt", of_clean).branch == "clean"
    shown = argparse.Namespace(size=32, train_digest="t")
    of_place = [results.key_of(tmp_path / "encoder.pt", found, "knn", None, argparse.Namespace(encoder=place, seed=0, data="x"),
                               shown) for place in (None, there)]
    assert of_place[0] == of_place[1]  # it is the same network, and nothing is measured again
    encoders.export(encoders.make("slim"), tmp_path / "slim.pt")
    with pytest.raises(ValueError, match="holds a slim, which needs no code of yours; leave --encoder out"):
        foreign.load(tmp_path / "slim.pt", flags("--encoder", there))
    torch.save(found.net.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="--bn: .* has no BN branches"):
        foreign.load(tmp_path / "plain.pth", of_clean)
    for more, words in ((["--encoder", "torchvision:resnet18"], "names its network itself; leave --encoder out"),
                        (["--encoder", there, "--prefix", "state."], "has its own normalisation; leave --prefix")):
        with pytest.raises(ValueError, match=words):
            foreign.load(tmp_path / "encoder.pt", flags(*more))
    command.main([str(tmp_path / "encoder.pt"), "--encoder", there, "--data", tiny_npz(tmp_path / "x.npz"), *PROBE,
                  "--attacks", "clean"])
    assert f"encoder {there}, with the normalisation that the file names" in capsys.readouterr().out


def test_of_several_networks_in_a_file_the_one_taken_is_named_once(tmp_path, capsys):
    state = resnet().state_dict()
    torch.save({"teacher": {key: value + 1 for key, value in state.items()}, "model": state}, tmp_path / "weights.pth")
    for _ in range(2):
        encoder = foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18"))
    assert torch.equal(encoder.net.conv1.weight, state["conv1.weight"])
    said = capsys.readouterr().out
    assert said.count("the weights in model are taken; there are others in teacher (--prefix)") == 1
    assert said.count("left out: features are judged") == 1
    foreign.said.clear()
    teacher = foreign.load(tmp_path / "weights.pth", flags("--encoder", "torchvision:resnet18", "--prefix", "teacher."))
    assert "are taken" not in capsys.readouterr().out
    assert torch.equal(teacher.net.conv1.weight, state["conv1.weight"] + 1)


def test_a_normalisation_of_0_to_255_is_refused():
    words = "weights.pth --encoder torchvision:resnet18 --mean 125 122 113 --std 63 62 66".split()
    with pytest.raises(ValueError, match=r"are of pixels in \[0, 1\]; divide those of 0 to 255 by 255"):
        check(command.parser().parse_args(words))
