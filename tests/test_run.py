import argparse
import contextlib
import copy
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from common import data, dist, encoders, run
from common.log import Log, check_spread
from common.bank import Bank
from tests.processes import free_port, in_two_processes
from tests.recipes import A, X
from tests.scripts import ROOT, SCRIPTS, named


def objective(z):
    """Something that couples all rows, as in-batch negatives do."""
    return (z @ z.T / 0.5).logsumexp(1).mean() - z[:, 0].square().mean()


def gathered(rank, world):
    net = nn.Linear(6, 3).double()
    with torch.no_grad():
        net.weight.copy_(A(3, 6, 0)), net.bias.zero_()
    x = A(8, 6, 1).chunk(world)[rank]
    z = dist.gather(net(x).tanh())
    loss = objective(z)
    loss.backward()
    dist.average_grads(net.parameters())
    norm = nn.BatchNorm1d(2)
    norm.running_mean += rank
    dist.average_buffers(norm)
    return z.detach(), loss.detach(), net.weight.grad, norm.running_mean, norm.num_batches_tracked


def test_two_processes_equal_one_in_loss_and_gradient(tmp_path):
    net = nn.Linear(6, 3).double()
    with torch.no_grad():
        net.weight.copy_(A(3, 6, 0)), net.bias.zero_()
    z = net(A(8, 6, 1)).tanh()
    loss = objective(z)
    loss.backward()
    for got in in_two_processes(gathered, tmp_path):
        for a, b in zip(
            got, (z.detach(), loss.detach(), net.weight.grad, torch.full((2,), 0.5), torch.tensor(0))
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [3, 7, 24])
def test_buffers_that_all_ranks_have_alike_stay_bit_for_bit(world, monkeypatch):
    """The encoder's mean and std, which no checkpoint has, are as they were made in a run that is continued."""
    def all_reduce(tensor):
        mine = tensor.clone()
        for _ in range(world - 1):
            tensor += mine

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    net = encoders.make("slim")
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.copy_(torch.linspace(0.1, 3, len(norm.running_var)))
    before = copy.deepcopy(net)
    dist.average_buffers(net)
    for a, b in zip(net.buffers(), before.buffers(), strict=True):
        assert torch.equal(a, b)


def shared(rank, world):
    w = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    beside = w * 1  # its gradient is the very tensor that the gathered rows get
    z = dist.gather(A(2, 2, rank).requires_grad_())
    ((z + beside) * A(4, 2, 5)).sum().backward()
    return w.grad


def test_gather_leaves_a_gradient_that_others_get_too(tmp_path):
    for got in in_two_processes(shared, tmp_path):
        torch.testing.assert_close(got, A(4, 2, 5), rtol=0, atol=0)


def pushed(rank, world):
    torch.manual_seed(0)
    bank = Bank(10, 3)
    for p in range(3):
        bank.push(A(8, 3, p).float().chunk(world)[rank])
    return bank.rows, bank.pointer


def test_banks_are_bit_equal_on_all_ranks_and_equal_to_one_process(tmp_path):
    rows, pointer = pushed(0, 1)
    for got in in_two_processes(pushed, tmp_path):
        assert torch.equal(got[0], rows) and got[1] == pointer


def amoc_step(rank, world):
    """AMOC's first step on linear networks: (loss, gradient, bank) in float64."""
    import amoc
    from tests.test_amoc import Linear

    torch.manual_seed(0)
    net, target, banks = (
        Linear(),
        Linear().requires_grad_(False),
        (Bank(16, 6).double(), Bank(16, 6).double()),
    )
    settings = named(amoc.train_step, amoc, "--variant", "AAA", "--steps", "2", "--ema", "0.9")
    x = X(4, 3, 4, 4)
    x1, x2, noise = (v.chunk(world)[rank] for v in (x, x.flip(3), A(4, 96, 6).view(4, 2, 3, 4, 4)))
    losses = amoc.train_step(
        net, target, torch.optim.SGD(net.parameters(), lr=0.1), *banks, x1, x2, noise, **settings
    )
    return losses["loss"], net.W.grad, target.W.detach(), banks[1].rows


def test_a_step_of_amoc_on_two_processes_equals_one(tmp_path):
    loss, *want = amoc_step(0, 1)
    both = in_two_processes(amoc_step, tmp_path)
    torch.testing.assert_close((both[0][0] + both[1][0]) / 2, loss, rtol=1e-12, atol=0)
    for got in both:
        for a, b in zip(got[1:], want):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gather_without_a_group_is_the_identity():
    z = torch.randn(3, 2, requires_grad=True)
    assert dist.gather(z) is z


def test_once_they_have_met_processes_wait_as_long_as_torch_has_it(monkeypatch):
    """NCCL's communicators are made later, at the first collective of each kind, and meet in the same store."""
    here = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    dist.meet("gloo", 0, 1)
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        assert store.timeout == torch.distributed.constants.default_pg_timeout > dist.MEETING
    finally:
        torch.distributed.destroy_process_group()


def resumed_apart(rank, world):
    """What resume says where each process has a folder of its own, and where their data differ alone."""
    said = []
    with tempfile.TemporaryDirectory() as folder:
        env = run.Env(torch.device("cpu"), rank, world)
        picture = pathlib.Path(folder) / f"{rank}.png"
        picture.write_bytes(b"")  # it is not decoded
        pictures = data.Folder(folder, [(str(picture), 0)], 1, 32, "cpu", 0)
        for images, saves in ((IMAGES, True), (IMAGES if rank else OTHERS, False), (pictures, False)):
            out = pathlib.Path(folder) / f"{len(said)}"
            out.mkdir()
            log = Log(arguments(out), env, 4, images)
            log.start(0)
            if saves:
                run.save(arguments(out), env, {"log": log}, 2)
            elif rank == 0:
                (out / "log.jsonl").unlink()
            try:
                said.append(run.resume(arguments(out), env, {"log": log}))
            except ValueError as e:
                said.append(str(e))
    return said


def test_processes_that_see_other_folders_or_other_data_all_stop(tmp_path):
    """As on two hosts that do not share them. Else one would begin anew, and the other go on."""
    for folders, images, pictures in in_two_processes(resumed_apart, tmp_path):
        assert re.fullmatch("the processes do not see the same files in --out .*; .* that all hosts share", folders)
        assert re.fullmatch("the processes do not have the same data .*", images)
        assert pictures == images  # of a folder one process tells all others its checksum


def test_errors_raised_on_purpose_are_a_line_and_bugs_keep_their_traceback():
    with pytest.raises(SystemExit, match="error: bank size 0"):
        run.cli(lambda: Bank(0, 3))
    with pytest.raises(ValueError, match="invalid literal"):
        run.cli(lambda: int("not a number"))
    with pytest.raises(ValueError, match="num_samples|positive"):  # of a library's, though it stands in .venv
        run.cli(lambda: torch.utils.data.RandomSampler([], num_samples=-1))


IMAGES, OTHERS = (data.Images(torch.full((3, 3, 2, 2), n, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 1)
                  for n in (0, 1))


def arguments(folder, **more):
    return argparse.Namespace(out=str(folder), seed=0, device="cpu", **more)


def test_log_means_are_over_steps_and_lines_unknown_to_the_checkpoint_are_dropped(tmp_path):
    args, env = arguments(tmp_path), run.Env(torch.device("cpu"), 0, 1)
    log = Log(args, env, 4, IMAGES)
    log.start(0)
    for step, value in enumerate((1.0, 2.0)):
        log.step(step, 8, loss=torch.tensor(value))
    log.epoch(0, 2, lr=0.1)
    kept = log.state_dict()
    for step in (2, 3):
        log.step(step, 8, loss=torch.tensor(5.0))
    log.epoch(1, 4, lr=0.1)
    path = tmp_path / "log.jsonl"
    assert [json.loads(line).get("loss") for line in open(path)] == [None, 1.5, 5.0]
    again = Log(args, env, 4, IMAGES)
    again.load_state_dict(kept)
    again.start(2)
    assert [json.loads(line).get("loss") for line in open(path)] == [None, 1.5]


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    args, env, net = arguments(tmp_path), run.Env(torch.device("cpu"), 0, 1), nn.Linear(2, 2)
    run.save(args, env, {"net": net}, 1)
    with torch.no_grad():
        net.bias[0] = float("nan")
    with pytest.raises(ValueError, match="net.bias is not finite after 2 steps; the last good"):
        run.save(args, env, {"net": net}, 2)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    args, env = arguments(tmp_path), run.Env(torch.device("cpu"), 0, 1)
    run.save(args, env, {"net": nn.Linear(2, 2)}, 1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.save(args, env, {"net": nn.Linear(2, 2)}, 2)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    args, env = arguments(tmp_path), run.Env(torch.device("cpu"), 0, 1)
    run.save(args, env, {"net": nn.Linear(2, 2)}, 1)
    with pytest.raises(ValueError, match="net does not fit"):
        run.resume(args, env, {"net": nn.Linear(3, 2)})


def test_spread_of_embeddings_is_known_in_closed_form():
    e = 7 * torch.eye(8)
    found = check_spread(e, None)
    assert found["std"] == pytest.approx((7 / 8) ** 0.5, rel=1e-6) and found["rank"] == pytest.approx(7, rel=1e-6)
    line = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    assert check_spread(line, None) == pytest.approx({"std": 1, "rank": 1})


def test_collapsed_embeddings_raise(tmp_path):
    z = torch.ones(16, 8) + 1e-3 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="collapsed: .*no checkpoint was saved yet"):
        check_spread(z, SimpleNamespace(out=tmp_path))


def test_importing_the_scripts_does_nothing():
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(SCRIPTS)}, eval"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr


FAULTS = """
import resource
from types import SimpleNamespace
import torch
from common import run
for way in ("theirs", "ours"):
    if way == "ours":
        run.device(SimpleNamespace(device="cpu"))
    for i in range(40):
        if i == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**21).fill_(1.0)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 30)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_memory_that_was_freed_is_used_again():
    """8 MiB are 2048 pages. Where malloc gives them back to the system, as it is told to here, each is a fault."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT,
                         env=environment).stdout
    theirs, ours = map(int, out.split())
    assert theirs > 200 and ours < 20


@pytest.mark.parametrize("most, want", [(2**31, 2**30), (2**25, 2**25), (2**20, None)])
def test_a_glibc_that_refuses_a_high_threshold_gets_what_it_takes_or_nothing(most, want, monkeypatch):
    """Before 2.35 it takes 32 MiB at most. The other option alone would only switch its own moving threshold off."""
    taken = {}

    def mallopt(option, value):
        if option == -3 and value > most:
            return 0
        taken[option] = value
        return 1

    monkeypatch.setattr(run.sys, "platform", "linux")
    monkeypatch.setattr(run.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    run._keep_freed_memory()
    assert taken == ({-3: want, -1: 2**31 - 1} if want else {})


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_used_where_the_gpu_has_units_for_it(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch, "autocast", lambda *what: what)
    run._says_bf16.cache_clear()
    found = run.autocast(torch.device("cuda", 0))
    run._says_bf16.cache_clear()
    assert found == ("cuda", torch.bfloat16) if native else isinstance(found, contextlib.nullcontext)
    assert isinstance(run.autocast(torch.device("cpu")), contextlib.nullcontext)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_forward_under_autocast_is_compiled_once(monkeypatch):
    """What torch.cuda says of a GPU cannot be traced: asked within the graph, it would break it, and what is left
    would be compiled anew at every call. torch.cuda.is_bf16_supported itself is asked here, on a CPU."""
    ask = torch.cuda.is_bf16_supported
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ask(including_emulation) or True)
    counter = CompileCounter()
    linear = nn.Linear(3, 2)

    @torch.compile(backend=counter)
    def forward(x):
        with run.autocast(torch.device("cuda", 0)):
            return linear(x)

    counts = []
    torch._dynamo.reset()
    run._says_bf16.cache_clear()
    for _ in range(4):
        forward(torch.ones(5, 3))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    run._says_bf16.cache_clear()
    assert counts == [1, 1, 1, 1]
