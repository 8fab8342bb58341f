"""--compile and --graph: what they may change is rounding. CUDA graphs themselves need CUDA; on a CPU a stand-in
that computes again, into the same memory, shows what surrounds them."""
import contextlib
import copy
import functools
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import amoc
from common import encoders, speed
from common.bank import Bank
from common.pgd import eval_mode, pgd
from common.resnet import branch
from tests.scripts import SCRIPTS, TINY, named, scripts_with, tiny_npz

Recording = speed.Recording
GRAPHED = scripts_with("graph")


# --compile --------------------------------------------------------------------------------------------------
class Compilations:
    """In place of TorchInductor: notes the size of the batch and the weights with gradient of what is compiled."""

    def __init__(self, monkeypatch):
        self.sizes = []
        self.trained = []
        self.modes = []
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, mode, **how: (
            self.modes.append(mode) or compiler(f, backend=self.backend, **how)))

    def backend(self, graph, inputs):
        self.sizes.append(max(len(v) for v in inputs if v.dim() == 4 and v.shape[1:] == (3, 16, 16)))
        self.trained.append(sum(isinstance(v, nn.Parameter) and v.requires_grad for v in inputs))
        return graph.forward


@pytest.fixture
def compilations(monkeypatch, one_block):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # Torch's own, whatever ran before
        yield Compilations(monkeypatch)
    torch._dynamo.reset()


def compiled(batch_size=4, world=1, mode="default"):
    torch.manual_seed(0)
    net = nn.Sequential(encoders.make("slim", ("clean", "adv")), nn.Linear(128, 5))
    plain = copy.deepcopy(net)
    speed.compile_networks(SimpleNamespace(compile=mode, batch_size=batch_size), SimpleNamespace(world=world), net)
    return net, plain


def images(n):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_full_batches_are_compiled_and_others_are_not(compilations, mode):
    net, plain = compiled(8, world=2, mode=mode)
    for n in (3, 4, 4, 8, 2, 5, 4):  # a run that is continued may meet the short batch first
        torch.testing.assert_close(net(images(n)), plain(images(n)))
    assert compilations.sizes == [4, 8] and compilations.modes == [mode]


def test_every_way_through_a_network_is_compiled_whatever_torchs_limit(compilations):
    net, plain = compiled(2)
    sizes = range(2, 26, 2)
    for n in sizes:
        torch.testing.assert_close(net(images(n)), plain(images(n)))
    assert compilations.sizes == [*sizes]  # 12, beyond the 8


def test_an_attack_on_a_compiled_network_makes_no_gradient_of_a_weight(compilations):
    net, plain = compiled(4)

    def attacked(net):
        with eval_mode(net), branch(net, "adv"):
            return pgd(lambda x: net(x).square().sum(), images(4), 0.1, 0.05, 2, random_start=False)

    torch.testing.assert_close(attacked(net), attacked(plain))
    assert compilations.trained == [0]
    assert all(w.requires_grad for w in net.parameters())
    for f in (net, plain):
        f(images(4)).square().sum().backward()
    assert compilations.trained[1:] == [len(list(encoders.make("slim").parameters())) + 2]
    for a, b in zip(net.parameters(), plain.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_weights_have_their_gradient_again_after_an_error(compilations):
    net, _ = compiled(4)
    with pytest.raises(RuntimeError), eval_mode(net):
        pgd(lambda x: net(x[:, :2].repeat(1, 2, 1, 1)).sum(), images(4), 0.1, 0.05, 1)
    assert all(w.requires_grad for w in net.parameters())


def test_a_copy_of_a_compiled_network_stands_for_itself(compilations):
    net, _ = compiled(4)
    net(images(4))
    other = copy.deepcopy(net)
    with torch.no_grad():
        for w in other.parameters():
            w.zero_()
    assert other(images(4)).abs().max() == 0 and net(images(4)).abs().max() > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_with_compile_takes_the_same_steps(script, tmp_path, monkeypatch, one_block):
    """By a compiler that changes nothing; two epochs with a short last batch."""
    torch._dynamo.reset()
    compiler = torch.compile
    used = []

    def backend(graph, inputs):
        used.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, mode, **how: compiler(f, backend=backend, **how))
    module = importlib.import_module(script)
    states = {}
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        out = tmp_path / name
        words = [*TINY, *SCRIPTS[script], "--data", tiny_npz(tmp_path / "data.npz"), "--out", str(out), *flags]
        if script == "rotnet":  # AdamW makes much of gradients that are nothing but rounding
            words += ["--optimizer", "sgd", "--lr", "0.001"]
        if script == "acl":  # its rate of 5 makes much of a pixel whose gradient's sign is rounding
            words += ["--lr", "0.5"]
        if script == "pretext":
            words += ["--tasks", "rotation"]
        module.main(words)
        states[name] = torch.load(out / "encoder.pt")["state"]
    assert used
    for key, value in states["plain"].items():
        torch.testing.assert_close(states["compiled"][key], value, rtol=1e-3, atol=1e-4)


# --graph ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_on_a_cpu_graph_is_refused_in_one_line(script, tmp_path):
    module = importlib.import_module(script)
    says = "--graph: CUDA graphs need CUDA, and this is cpu" if script in GRAPHED else "unrecognized .*--graph"
    with pytest.raises(ValueError, match=says) as error:
        module.main([*TINY, "--data", "shapes", "--limit", "32", "--out", str(tmp_path), "--graph"])
    assert "\n" not in str(error.value)
    assert hasattr(getattr(module, "attack", None), "__wrapped__") == (script in GRAPHED)


def test_graphs_and_the_compilers_own_graphs_exclude_each_other():
    args = SimpleNamespace(graph=True, compile="reduce-overhead", batch_size=4)
    with pytest.raises(ValueError, match="--graph: --compile reduce-overhead.*use --compile default"):
        speed.use_graphs(args, SimpleNamespace(device=torch.device("cuda"), world=1))


class Again:
    """In place of a Recording: computes at each replay from what stands in its own inputs, into the same outputs."""

    made = []

    def __init__(self, function, inputs, settings):
        self.inputs = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in inputs]
        self.tensors = [v for v in self.inputs if isinstance(v, torch.Tensor)]
        self.work = functools.partial(function, *self.inputs, **settings)
        self.outputs = self.work()
        self.graph = self
        Again.made.append(self)

    def replay(self, tensors=None):
        if tensors is not None:
            return Recording.replay(SimpleNamespace(
                tensors=self.tensors, graph=self, outputs=self.outputs), tensors)
        new = self.work()
        for ours, now in zip([self.outputs] if isinstance(new, torch.Tensor) else self.outputs,
                             [new] if isinstance(new, torch.Tensor) else new):
            ours.copy_(now)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs are on, for full batches of four."""
    monkeypatch.setattr(speed, "Recording", Again)
    Again.made.clear()
    speed.use_graphs(SimpleNamespace(graph=True, compile=None, batch_size=4),
                     SimpleNamespace(device=torch.device("cuda"), world=1))
    yield Again.made
    speed.use_graphs(SimpleNamespace(), None)


def amocs_attack(variant="ACC"):
    torch.manual_seed(0)
    net = amoc.network("slim")
    target = copy.deepcopy(net).requires_grad_(False)
    bank = Bank(16, 128)
    return net, target, bank, named(amoc.attack, amoc, "--variant", variant, "--steps", "2")


def two_views(n, seed):
    x = torch.rand(2, n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    noise = 2 * torch.rand(n, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed + 1)) - 1
    return *x, noise


@pytest.mark.parametrize("variant", ["ACC", "AAC"])
def test_a_replay_sees_new_images_new_weights_and_a_new_bank(graphs, variant):
    net, target, bank, settings = amocs_attack(variant)
    found = []
    for seed in (1, 2, 3):
        x1, x2, noise = two_views(4, seed)
        inputs = (net, target, x1, x2, noise, bank.rows)
        found.append((amoc.attack(*inputs, **settings), amoc.attack.__wrapped__(*inputs, **settings)))
        with torch.no_grad():
            for w in net.parameters():
                w.add_(0.01 * torch.randn(w.shape))
        bank.push(torch.randn(5, 128))
    for ours, want in found:  # all of them, at the end: no replay overwrites what another one returned
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert len(graphs) == 1


def test_each_kind_of_inputs_has_a_recording_and_short_batches_have_none(graphs):
    net, target, bank, settings = amocs_attack()
    other = copy.deepcopy(net)

    def attack(net, n, noise=True, **more):
        x1, x2, start = two_views(n, 1)
        return amoc.attack(net, target, x1, x2, start if noise else None, bank.rows, **{**settings, **more})

    counts = []
    for case in (dict(net=net, n=4), dict(net=net, n=4), dict(net=net, n=3), dict(net=net, n=8), dict(net=other, n=4),
                 dict(net=net, n=4, noise=False), dict(net=net, n=4, steps=3), dict(net=net, n=4, eps=0.1)):
        attack(**case)
        counts.append(len(graphs))
    assert counts == [1, 1, 1, 2, 3, 4, 5, 6]
    speed.use_graphs(SimpleNamespace(), None)
    attack(net, 4)
    assert len(graphs) == 6


def test_a_recording_bears_the_calls_to_cuda_of_other_threads(monkeypatch):
    """As of the one that pins the pictures of a folder for the next steps. All recordings share one pool of memory,
    for none is read once another one is replayed."""
    modes, calls, pools = [], [], []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None, capture_error_mode="global": (
        pools.append(pool) or modes.append(capture_error_mode) or contextlib.nullcontext()))
    speed._pool.cache_clear()
    recording = Recording(lambda x: calls.append("call") or x + 1, [torch.ones(2)], {})
    assert modes == ["thread_local"] and calls == 4 * ["call"]
    assert recording.replay([torch.ones(2)]).tolist() == [2, 2] and calls[4:] == ["replay"]
    Recording(lambda x: x, [torch.ones(2)], {})
    speed._pool.cache_clear()
    assert pools[0] is pools[1] is not None


def test_a_decorated_attack_keeps_its_name_its_words_and_its_arguments():
    assert amoc.attack.__name__ == "attack" and "Eq. 3.3" in amoc.attack.__doc__
    assert "bank" in inspect.signature(amoc.attack).parameters


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("script", GRAPHED)
def test_on_cuda_a_run_with_graphs_takes_the_same_steps(script, tmp_path):
    module = importlib.import_module(script)
    flags = [flag for flag in (*TINY, *SCRIPTS[script])]
    flags[flags.index("--device") + 1] = "cuda"
    more = {"adco": ["--eps", "8"], "caco": ["--eps", "8"], "rotnet": ["--optimizer", "sgd", "--lr", "0.001"]}.get(script, [])
    states = {}
    for name, graph in (("plain", []), ("graph", ["--graph"])):
        out = tmp_path / name
        module.main([*flags, *more, "--data", tiny_npz(tmp_path / "data.npz"), "--out", str(out), *graph])
        states[name] = torch.load(out / "encoder.pt")["state"]
    for key, value in states["plain"].items():
        assert (states["graph"][key] - value).double().norm() <= 0.05 * value.double().norm() + 1e-3, key
