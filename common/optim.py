"""LARS, and schedules as functions of progress: nothing to save, replay or mis-order."""
import math

import torch


def cosine(progress, start, end=0.0):
    """From `start` at progress 0 to `end` at 1 along half a cosine (arXiv 1608.03983)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warmup_cosine(step, steps, warmup, peak, end=0.0):
    """Linear from 0 to `peak` over `warmup` steps, then `cosine` to `end` at step `steps`."""
    if step < warmup:
        return peak * step / warmup
    return cosine((step - warmup) / max(1, steps - warmup), peak, end)


@torch.no_grad()
def ema(target, net, m):
    """target <- m target + (1 - m) net, over the parameters; buffers (running statistics) are left alone.
    Raises ValueError for an m that is not from 0 to 1, and for networks with other parameters."""
    if not 0 <= m <= 1:
        raise ValueError(f"m {m}: must be from 0 to 1")
    slow = list(target.parameters())
    fast = list(net.parameters())
    if [w.shape for w in slow] != [w.shape for w in fast]:
        raise ValueError("the two networks have parameters of other shapes: must be two of a kind")
    torch._foreach_lerp_(slow, fast, 1 - m)


def groups(named, weight_decay, exempt=(), stages=(), gamma=1.0):
    """Parameter groups for AdamW from (name, parameter) pairs `named`.

    No weight decay for vectors (biases, norms) and for names in `exempt`. `stages` lists names by depth,
    input first; a parameter of, or under, one of stages[i] gets scale gamma^(len(stages) - i), any other 1.
    The scale is only noted, and has its effect through `set_lr`, or where the rate of a group is set to
    lr * group["scale"]. Raises ValueError where names matter (there are `exempt` ones, or stages and a gamma
    other than 1) and are those of a wrapped network.
    """
    found = {}
    wrapped = []
    for name, w in named:
        if name.startswith(("module.", "_orig_mod.")):
            wrapped.append(name)
        if w.requires_grad:
            at = [i for i, parts in enumerate(stages) if any(f"{name}.".startswith(f"{p}.") for p in parts)]
            scale = gamma ** (len(stages) - at[0]) if at else 1.0
            decay = 0.0 if w.dim() < 2 or name in exempt else weight_decay
            group = dict(params=[], weight_decay=decay, scale=scale)
            found.setdefault((scale, decay), group)["params"].append(w)
    if wrapped and (exempt or stages and gamma != 1):
        raise ValueError(f"{wrapped[0]}: names must be those of the bare network, without module. "
                         "(DistributedDataParallel) or _orig_mod. (torch.compile), to be found in `exempt` "
                         "and the stages")
    return list(found.values())


def set_lr(opt, lr):
    """Let all parameter groups of the optimizer `opt` have the learning rate `lr`, times their "scale" where
    they have one (`groups`)."""
    for group in opt.param_groups:
        group["lr"] = lr * group.get("scale", 1)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888) around SGD with momentum.

    For each tensor w with gradient g:
        ratio = trust |w| / (|g| + weight_decay |w|), or 1 where |w| or |g| is 0
        v <- momentum v + lr ratio (g + weight_decay w)
        w <- w - v
    With `clip` the ratio is divided by lr and then at most 1: no tensor steps faster than plain SGD.
    Biases and BatchNorm count as tensors too; a group with `trust=None, weight_decay=0` leaves them out.

    Raises ValueError for an lr, momentum or weight_decay that is negative or not finite, or a trust that is
    not positive, of all or of one group.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust=0.001, clip=False):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, clip=clip))
        for group in [self.defaults, *self.param_groups]:
            for name in ("lr", "momentum", "weight_decay"):
                if not 0 <= group[name] < math.inf:
                    raise ValueError(f"LARS: {name} {group[name]}: must be finite and not negative")
            if group["trust"] is not None and not 0 < group["trust"] < math.inf:
                raise ValueError(f"LARS: trust {group['trust']}: must be finite and positive, or None")

    @torch.no_grad()
    def step(self, closure=None):
        """One step by the gradients there are; those of `closure`, if given, which is called first and whose
        loss is returned, as by torch's own optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = group["lr"]
            decay = group["weight_decay"]
            trust = group["trust"]
            ws = [w for w in group["params"] if w.grad is not None]
            if not ws:
                continue
            gs = [w.grad for w in ws]
            updates = torch._foreach_add(gs, ws, alpha=decay)  # all tensors at once: few, long kernels
            torch._foreach_mul_(updates, lr)
            if trust is not None:
                w_norm = torch.stack(torch._foreach_norm(ws))  # (tensors,)
                g_norm = torch.stack(torch._foreach_norm(gs))
                ratio = trust * w_norm / (g_norm + decay * w_norm)
                if group["clip"]:
                    ratio = (ratio / lr).clamp_max(1)
                torch._foreach_mul_(updates, torch.where((w_norm > 0) & (g_norm > 0), ratio, 1.0).unbind())
            for w in ws:
                if not self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
            momenta = [self.state[w]["momentum"] for w in ws]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_sub_(ws, momenta)
        return loss


def lars_groups(net):
    """Parameter groups for LARS: all tensors of `net`; and its vectors (biases, norms), which are neither
    scaled nor decayed (BYOL, Grill et al. 2020, arXiv 2006.07733). A "scale" that is added to a group
    multiplies the rate that `set_lr` gives it."""
    tensors = [w for w in net.parameters() if w.dim() >= 2]
    vectors = [w for w in net.parameters() if w.dim() < 2]
    return [{"params": tensors}, {"params": vectors, "trust": None, "weight_decay": 0.0}]
