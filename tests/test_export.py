"""encoder.pt holds the network that was trained, through the BatchNorm branch that the method documents."""
import contextlib
import functools
import importlib
import inspect
import signal
import types

import numpy as np
import pytest
import torch
from torch import nn

from common import encoders
from common.resnet import branch

SIDE = 24  # of the views; the data's images are 32 wide
SMALL = "--arch slim --batch-size 16 --epochs 1 --device cpu"
AMOC = "--warmup 0 --ema 0.5 --bank-size 48 --steps 1"
ADCO = "--ema 0.5 --bank-size 48 --fill-steps 3"
CACO = ADCO + " --dim 24"
HARDNEG = "--ema 0.5 --bank-size 48 --hardest 8 --mix 6 --mix-query 4 --mix-from 0"
BYORL = "--warmup 0 --ema 0.5 --steps 1 --hidden 40"
VIT = "--arch vit_slim --decoder 16 1 2 --warmup 0"
ADIOS = "--warmup 0 --ema 0.5 --masks 2 --mask-width 8"

CASES = {  # script, flags, the BN branch that is exported (None: it has none), the other branches
    "amoc CCC": ("amoc", AMOC, "clean", {"adv"}),
    "amoc CCA": ("amoc", AMOC, "clean", {"adv"}),
    "amoc CAC": ("amoc", AMOC, "clean", {"adv"}),
    "amoc CAA": ("amoc", AMOC, "clean", {"adv"}),
    "amoc ACC": ("amoc", AMOC, "adv", {"clean"}),
    "amoc ACA": ("amoc", AMOC, "adv", {"clean"}),
    "amoc AAC": ("amoc", AMOC, "adv", {"clean"}),
    "amoc AAA": ("amoc", AMOC, "adv", {"clean"}),
    "amoc ACA_PLUS": ("amoc", AMOC, "adv", {"clean"}),
    "rocl": ("rocl", "--warmup 0 --steps 1", None, set()),
    "clae": ("clae", "", "clean", {"adv"}),
    "acl s2s": ("acl", "--warmup 0 --steps 1", "clean", set()),
    "acl a2a": ("acl", "--warmup 0 --steps 1", "adv", set()),
    "acl a2s": ("acl", "--warmup 0 --steps 1", "adv", {"clean"}),
    "acl ds": ("acl", "--warmup 0 --steps 1", "adv", {"clean"}),
    "advcl": ("advcl", "--warmup 0 --steps 1", "adv", {"clean"}),
    "advcl teacher": ("advcl", "--warmup 0 --steps 1 --clusters 2 5", "adv", {"clean", "adv_ce"}),
    "adco": ("adco", ADCO + " --stem cifar", None, set()),
    "adco symmetric": ("adco", ADCO + " --symmetric", None, set()),
    "adco hybrid": ("adco", ADCO + " --eps 8 --steps 1", None, set()),
    "adco both": ("adco", ADCO + " --eps 8 --steps 1 --clean-weight 0.5", "adv", {"clean"}),
    "caco": ("caco", CACO + " --stem cifar", None, set()),
    "caco hybrid": ("caco", CACO + " --eps 8 --steps 1", None, set()),
    "hardneg": ("hardneg", HARDNEG + " --stem cifar", None, set()),
    "hardneg simclr": ("hardneg", "--base simclr --negatives hcl", None, set()),
    "byorl": ("byorl", BYORL, None, set()),
    "byorl clean": ("byorl", BYORL + " --eps 0", None, set()),
    "adv_mae": ("adv_mae", VIT, None, set()),
    "unified": ("unified", VIT + " --steps 1", None, set()),
    "adpe relative coordinate": ("adpe", VIT + " --position relative --mode coordinate", None, set()),
    "adpe relative embedding": ("adpe", VIT + " --position relative --mode embedding", None, set()),
    "adpe absolute coordinate": ("adpe", VIT + " --position absolute --mode coordinate", None, set()),
    "adpe absolute embedding": ("adpe", VIT + " --position absolute --mode embedding --adversary pgd", None,
                                set()),
    "adios simclr": ("adios", ADIOS, None, set()),
    "adios byol": ("adios", ADIOS + " --objective byol", None, set()),
    "adios simsiam": ("adios", ADIOS + " --objective simsiam --masker none", None, set()),
    "adios mae": ("adios", ADIOS + " --objective mae --arch vit_slim", None, set()),
}
every_case = pytest.mark.parametrize("case", CASES)
one_of_each_kind = pytest.mark.parametrize("case", [
    "amoc CAC", "amoc ACC", "rocl", "acl s2s", "acl ds", "advcl", "clae", "adco", "adco both", "caco", "hardneg", "byorl", "adv_mae",
    "unified", "adpe relative coordinate", "adios byol", "adios mae"])
NORMALISATION = {
    "amoc": ([0.4914, 0.4824, 0.4467], [0.2471, 0.2435, 0.2617]),
    "rocl": ([0, 0, 0], [1, 1, 1]), "advcl": ([0, 0, 0], [1, 1, 1]),
    "clae": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "byorl": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "adios": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    **{script: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
       for script in ("acl", "adco", "caco", "hardneg", "adv_mae", "unified", "adpe")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    y = np.arange(32) % 4
    np.savez(folder / "images.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    torch.manual_seed(0)
    encoders.export(encoders.make("slim"), folder / "teacher.pt", image_size=SIDE)
    return folder


def run_of(case, folder, *more, side=SIDE):
    """The main of `case`, with `more` flags, in a folder of its own. Of its networks: those it ends with, and
    the encoder's tensors before the first step, of the fill too."""
    if side is not None:
        more = [*more, "--image-size", str(side)]
    script, flags, *_ = CASES[case]
    module = importlib.import_module(script)
    out = folder / "-".join([*case.split(), *more])
    words = [*SMALL.split(), *flags.split(), "--data", str(folder / "images.npz"), "--out", str(out), *more]
    if script in ("amoc", "acl"):
        words += ["--variant", case.split()[1]]
    if case == "advcl teacher":
        words += ["--teacher", str(folder / "teacher.pt")]
    found = types.SimpleNamespace(nets={}, first=None, path=out / "encoder.pt", last=out / "last.pt")
    train_step = module.train_step

    def note(function, *args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        found.nets = {name: net for name, net in given.items() if isinstance(net, nn.Module)}
        if found.first is None:
            state = encoder_of(script, found.nets["net"]).state_dict()
            found.first = {name: tensor.clone() for name, tensor in state.items()}
        return function(*args, **kwargs)

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_step", functools.partial(note, train_step))
        if hasattr(module, "fill"):
            patch.setattr(module, "fill", functools.partial(note, module.fill))
        module.main(words)
    for number, handler in handlers:
        signal.signal(number, handler)
    return found


@pytest.fixture(scope="module")
def ran(folder):
    """The run of a case, made once."""
    return functools.cache(lambda case: run_of(case, folder))


def encoder_of(script, net):
    if script == "advcl":
        return net["encoder"]
    return net.encoder if script in ("adv_mae", "adpe", "unified") else net[0]


def tensors_of(script, state):
    """The encoder's tensors among those of a whole network."""
    prefix = "encoder." if script in ("advcl", "adv_mae", "adpe", "unified") else "0."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def through(tensors, name):
    """The tensors of an encoder with branch `name` in the place of its BatchNorms' branches."""
    kept = {}
    for key, tensor in tensors.items():
        before, _, after = key.partition(".branches.")
        if not after:
            kept[key] = tensor
        elif after.startswith(f"{name}."):
            kept[f"{before}.{after.removeprefix(f'{name}.')}"] = tensor
    return kept


def norms_through(tensors, name):
    return {key: tensor for key, tensor in through(tensors, name).items() if key not in tensors}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@every_case
def test_the_exported_tensors_are_those_of_the_trained_networks_encoder(case, ran):
    script, _, name, _ = CASES[case]
    exported = torch.load(ran(case).path, weights_only=True)
    state = torch.load(ran(case).last, weights_only=True)["state"]
    trained = tensors_of(script, state["net"])
    assert len(trained) > 20 and same(exported["state"], through(trained, name))
    moved = [key for key in trained if not torch.equal(trained[key], ran(case).first[key])]
    assert any("weight" in key for key in moved)  # else nothing were told from a network that has not learnt
    if "target" in state:
        target = through(tensors_of(script, state["target"]), name)
        assert target.keys() == exported["state"].keys()
        assert not torch.equal(target["conv1.weight"], exported["state"]["conv1.weight"])
        assert not torch.equal(target["bn1.running_mean"], exported["state"]["bn1.running_mean"])


@every_case
def test_the_branch_is_the_documented_one_and_the_others_come_along(case, ran):
    script, _, name, others = CASES[case]
    exported = torch.load(ran(case).path, weights_only=True)
    assert exported["branch"] == name and exported["others"].keys() == others
    trained = tensors_of(script, torch.load(ran(case).last, weights_only=True)["state"]["net"])
    for other in others:
        norms = exported["others"][other]
        assert len(norms) > 20 and same(norms, norms_through(trained, other))
        assert not torch.equal(norms["bn1.running_mean"], exported["state"]["bn1.running_mean"])


@every_case
def test_the_file_says_how_wide_its_images_were_and_how_they_are_normalised(case, ran):
    script, *_ = CASES[case]
    exported = torch.load(ran(case).path, weights_only=True)
    mean, std = NORMALISATION[script]
    assert exported["image_size"] == SIDE
    assert exported["mean"] == pytest.approx(mean) and exported["std"] == pytest.approx(std)
    a_vit = script in ("adv_mae", "adpe", "unified") or case == "adios mae"
    assert exported["arch"] == ("vit_slim" if a_vit else "slim")
    if exported["arch"] == "slim":
        assert exported["stem"] == ("cifar" if case in ("adco", "caco", "hardneg") else "small")
    else:
        assert exported["size"] == SIDE and exported["positions"] == "sincos" and not exported["fc_norm"]
        assert exported["relative"] == case.startswith("adpe relative")


@every_case
def test_a_loaded_encoder_gives_the_features_of_the_network_in_memory(case, ran):
    script, _, name, others = CASES[case]
    net = encoder_of(script, ran(case).nets["net"]).eval()
    x = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = {}
    with torch.no_grad():
        for chosen in [name, *others]:
            with branch(net, chosen) if chosen else contextlib.nullcontext():
                found[chosen] = net(x)
            loaded = encoders.load_encoder(ran(case).path, None if chosen == name else chosen)
            torch.testing.assert_close(loaded(x), found[chosen], rtol=1e-5, atol=1e-6)
            assert loaded.branch == chosen and loaded.image_size == SIDE
        whole = encoders.load_encoder(ran(case).path, all_branches=True)
        torch.testing.assert_close(whole(x), found[name], rtol=1e-5, atol=1e-6)
        assert encoders.load_encoder(ran(case).path).branch == name
    for other in others:
        assert not torch.allclose(found[other], found[name], rtol=1e-3)


@one_of_each_kind
def test_without_an_epoch_the_untrained_encoder_is_exported(case, folder, ran):
    _, _, name, others = CASES[case]
    untrained = run_of(case, folder, "--epochs", "0")
    assert not untrained.nets and not untrained.last.exists()
    exported = torch.load(untrained.path, weights_only=True)
    assert exported["branch"] == name and exported["others"].keys() == others
    assert exported["image_size"] == SIDE
    assert same(exported["state"], through(ran(case).first, name))


@one_of_each_kind
def test_the_side_of_the_datas_images_is_exported_where_none_is_given(case, folder):
    untrained = run_of(case, folder, "--epochs", "0", side=None)
    assert torch.load(untrained.path, weights_only=True)["image_size"] == 32


@pytest.mark.parametrize("script, more", [
    ("acl", "--variant ds"), ("acl", "--variant s2s"), ("clae", ""), ("amoc", ""), ("amoc", "--variant CCC"), ("advcl", ""),
    ("advcl", "--teacher"), ("rocl", ""), ("byorl", "")])
def test_a_vit_has_no_batchnorm_branch_that_were_exported_or_named(script, more, folder, tmp_path, capsys):
    """It is trained, and exported, without one: whatever the method's branches are."""
    case = "advcl teacher" if more == "--teacher" else next(case for case in CASES if CASES[case][0] == script)
    words = [*SMALL.split(), *CASES[case][1].split(), *more.split()]
    if more == "--teacher":
        words.append(str(folder / "teacher.pt"))
    module = importlib.import_module(script)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    module.main([*words, "--arch", "vit_slim", "--data", str(folder / "images.npz"), "--out", str(tmp_path)])
    for number, handler in handlers:
        signal.signal(number, handler)
    printed = capsys.readouterr().out
    assert "holds the encoder" in printed and "branch" not in printed
    exported = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert exported["branch"] is None and exported["others"] == {} and exported["arch"] == "vit_slim"
    trained = tensors_of(script, torch.load(tmp_path / "last.pt", weights_only=True)["state"]["net"])
    assert len(trained) > 20 and same(exported["state"], trained)
    assert encoders.load_encoder(tmp_path / "encoder.pt").branch is None
