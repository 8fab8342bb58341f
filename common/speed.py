"""For speed on GPUs: compiled networks (--compile), and attacks that are replayed as CUDA graphs (--graph).

Neither changes more than rounding. Both serve full batches and multiples of them (`--batch-size` over
the number of processes). Other batches, as mostly the last one of an epoch and those of pictures, go the
ordinary way, for each new shape would have to be compiled, or recorded, anew.
"""
import functools

import torch

from common.pgd import Kept


# ----------------------------------------------------------------------------------------------------------
# torch.compile
# ----------------------------------------------------------------------------------------------------------
def compile_networks(args, env, *nets):
    """With --compile, let each of the modules `nets` run compiled where the batch of its first argument is
    one of this process's full batches, or several of them. Under `pixels_only` no gradient of a weight is
    made, which a compiled backward pass would otherwise do unasked."""
    if not args.compile:
        return
    # Train and eval mode, the branches of BatchNorm, attack and training, one view or two: each is compiled
    # by itself. Torch's own limit is 8, and what comes beyond it stays eager.
    torch._dynamo.config.recompile_limit = 64
    share = args.batch_size // env.world
    for net in nets:
        net.compile(mode=args.compile, dynamic=False)
        net._compiled_call_impl = functools.partial(_call, net, net._compiled_call_impl, share)


def _call(net, compiled, share, x, /, *rest, **named):
    if len(x) % share:
        return net._call_impl(x, *rest, **named)
    frozen = [w for w in net.parameters() if w.requires_grad] if Kept.pixels_only else []
    try:
        for w in frozen:
            w.requires_grad_(False)
        return compiled(x, *rest, **named)
    finally:
        for w in frozen:
            w.requires_grad_(True)


# ----------------------------------------------------------------------------------------------------------
# CUDA graphs
# ----------------------------------------------------------------------------------------------------------
_share = None  # images in a full batch of this process; None: no graphs
_recordings = []  # of each function that is `graphed`, a dict


@functools.cache
def _pool():
    """The memory that all recordings share. They can, for none reads what another one left there: inputs lie
    elsewhere, and outputs are copied at once."""
    return torch.cuda.graph_pool_handle()


def use_graphs(args, env):
    """From here on `graphed` functions record and replay, with --graph; without it they do not. Raises
    ValueError where that cannot be."""
    global _share
    for of_function in _recordings:
        of_function.clear()
    _pool.cache_clear()  # torch refuses a pool whose recordings are all gone
    _share = None
    if not getattr(args, "graph", False):
        return
    if env.device.type != "cuda":
        raise ValueError(f"--graph: CUDA graphs need CUDA, and this is {env.device.type}")
    if args.compile == "reduce-overhead":
        raise ValueError("--graph: --compile reduce-overhead makes CUDA graphs of its own; use --compile "
                         "default")
    _share = args.batch_size // env.world


def graphed(attack):
    """A decorator for attack(*inputs, **settings), which is called at every step, has no side effect, and
    returns a tensor or a tuple of tensors. With --graph its kernels are recorded at the first full batch, and
    from then on launched all at once: some thousand launches cost the host more than small batches cost the
    GPU. A recording is kept for each kind of inputs: shapes, networks, settings. Networks are read where they
    are, and so must be changed in place, as optimizers and `optim.ema` do."""
    recordings = {}
    _recordings.append(recordings)

    @functools.wraps(attack)
    def call(*inputs, **settings):
        tensors = [v for v in inputs if isinstance(v, torch.Tensor)]
        if _share is None or len(tensors[0]) % _share:
            return attack(*inputs, **settings)
        kind = (*map(_kind, inputs), *sorted(settings.items()))
        if kind not in recordings:
            recordings[kind] = Recording(attack, inputs, settings)
        return recordings[kind].replay(tensors)

    return call


def _kind(v):
    if isinstance(v, torch.Tensor):
        return v.shape, v.stride(), v.dtype
    return id(v) if isinstance(v, torch.nn.Module) else v


class Recording:
    """The kernels of one call, which read their inputs from, and write their outputs to, fixed places."""

    def __init__(self, function, inputs, settings):
        # `inputs` holds the networks, too, so that no other one gets their id while the recording lives.
        self.inputs = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in inputs]
        self.tensors = [v for v in self.inputs if isinstance(v, torch.Tensor)]
        work = functools.partial(function, *self.inputs, **settings)
        aside = torch.cuda.Stream()  # recording forbids what first calls do: choosing kernels, allocating
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # By default a call to CUDA from any thread spoils the recording, as of the one that pins the next
        # pictures of a folder, or of NCCL's watchdog.
        with torch.cuda.graph(self.graph, pool=_pool(), capture_error_mode="thread_local"):
            self.outputs = work()

    def replay(self, tensors):
        """What the function returns for other `tensors`, in the order of its inputs."""
        for ours, given in zip(self.tensors, tensors):
            ours.copy_(given)
        self.graph.replay()
        if isinstance(self.outputs, torch.Tensor):
            return self.outputs.clone()
        return tuple(v.clone() for v in self.outputs)
