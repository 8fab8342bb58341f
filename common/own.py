"""Networks of one's own, "my_file.py:function": made, given branches of BatchNorm, and tried on noise before
anything is trained, so that what cannot be trained, attacked or exported is refused at once.
"""
import contextlib
import copy
import hashlib
import importlib.machinery
import importlib.util
import inspect
import modulefinder
import pathlib
import sys
import traceback

import torch
from torch import nn

from common import files, resnet
from common.pgd import eval_mode


class OwnEncoder(nn.Module):
    """A network of your own: what the function named by `source`, "my_file.py:function", returns.

    The function takes no arguments and returns a new module, images (B, 3, H, W) -> features (B, dim), which
    gets normalised images. With `branches`, every BatchNorm in it is replaced by a BranchNorm; where there
    is none, clean and attacked images share the whole network, as in a ViT. An exported encoder holds its
    weights and `source`, not the code: the file must be there when it is loaded.

    What could not be trained, attacked or exported is refused at once (`try_own`).
    """

    def __init__(self, source, branches, mean, std):
        super().__init__()
        self.recipe = {"arch": source, "mean": list(mean), "std": list(std), "code": code_of(source)}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.net = from_file(source)
        for name, module in self.net.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(f"arch {source}: its BatchNorm {name} keeps no running statistics, so features "
                                 "would depend on the batch; leave track_running_stats=False out")
        self.dim, side = feature_length(self.net, source)
        add_branches(self.net, branches)
        this = (source, self.recipe["code"], branches)
        if this not in tried:
            with torch.random.fork_rng(devices=[]):
                try_own(self.net, source, branches, side)
            tried.add(this)

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


def from_file(source):
    """The module that the function named by `source`, "my_file.py:function", returns. Raises
    ValueError."""
    file, _, name = source.rpartition(":")
    if not pathlib.Path(file).is_file():
        raise ValueError(f"arch {source}: there is no file {file}")
    folder = str(pathlib.Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: what lies beside the file may be imported by it
    spec = importlib.util.spec_from_file_location(f"arch_{pathlib.Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise ValueError(f"arch {source}: {e.filename}, line {e.lineno}: {e.msg}") from None
    except ImportError as e:
        raise ValueError(f"arch {source}: cannot be imported{line_of(e, file)}: {e}{taken_name(e, folder)}") from None
    for imported, place in imported_by(pathlib.Path(file)).items():
        used = getattr(sys.modules.get(imported), "__file__", None)
        if used and pathlib.Path(used).resolve() != place.resolve():
            raise ValueError(f"arch {source}: imports {imported}, and another module of this name, {used}, came "
                             "first; rename yours, or use this network in a process of its own")
    function = getattr(module, name, None)
    if isinstance(function, nn.Module):
        raise ValueError(f"arch {source}: {name} is a network; it must be a function that returns a new one")
    if not callable(function):
        raise ValueError(f"arch {source}: {file} has no function {name!r}")
    try:
        inspect.signature(function).bind()
    except TypeError as e:
        raise ValueError(f"arch {source}: {name}() must work without arguments: {e}") from None
    net = function()
    if not isinstance(net, nn.Module):
        raise ValueError(f"arch {source}: {name}() returned a {type(net).__name__}, not an nn.Module")
    return net


def taken_name(error, folder):
    """What to say of an ImportError where a module in `folder` has the name of one of this project, which is found
    first."""
    ours = pathlib.Path(__file__).resolve().parents[1]
    name = (error.name or "").split(".")[0]

    def lies_in(where):
        return (where / name).exists() or (where / f"{name}.py").exists()

    if name and folder != str(ours) and lies_in(ours) and lies_in(pathlib.Path(folder)):
        return f"; {name} is the name of a module of this project, so rename yours"
    return ""


class Finder(modulefinder.ModuleFinder):
    """Finds what is imported from folders without __init__.py, too, where that of Python 3.11 fails."""

    def find_module(self, name, path, parent=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path or self.path)
        if spec and spec.origin is None and spec.submodule_search_locations:
            return None, list(spec.submodule_search_locations)[0], ("", "", modulefinder._PKG_DIRECTORY)
        return super().find_module(name, path, parent)

    def load_package(self, fqname, pathname):
        if (pathlib.Path(pathname) / "__init__.py").exists():
            return super().load_package(fqname, pathname)
        package = self.add_module(fqname)
        package.__path__ = [pathname]
        return package


def imported_by(file):
    """{name: path} of what the Python file `file` imports from its own folder and below, and what that imports, as
    far as it can be read; nothing is run."""
    finder = Finder(path=[str(file.resolve().parent)])
    finder.run_script(str(file))
    found = {name: module.__file__ for name, module in finder.modules.items() if name != "__main__"}
    return {name: pathlib.Path(path) for name, path in found.items() if path}


def code_of(source):
    """A digest of the code of "my_file.py:function": the file, and whatever lies in its folder and below that it
    imports, but for this package. Raises ValueError where the file is missing or is not Python."""
    file = pathlib.Path(source.rpartition(":")[0])
    if not file.is_file():
        raise ValueError(f"arch {source}: there is no file {file}")
    try:
        beside = sorted(imported_by(file).values())
    except SyntaxError as e:
        raise ValueError(f"arch {source}: {e.filename}, line {e.lineno}: {e.msg}") from None
    ours = pathlib.Path(__file__).resolve().parent  # of which the log has the commit
    found = [file, *(path for path in beside if path.resolve().parent != ours)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:16]


def add_branches(net, branches):
    """`branch_norms`, where `net` has BatchNorms and there are `branches`."""
    if branches and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
        branch_norms(net, branches)


tried = set()  # (source, digest of its code, branches) of what `try_own` has found good in this process


def try_own(net, source, branches, side):
    """Try what a run will do with `net`, a network from `source` with its `branches`, on noise of `side`: a
    pass in train mode, gradients, and whether a second network that loads the weights of a first one makes the
    same features. That is done with two networks made anew; `net` stays as it is.

    Raises ValueError that says what fails, where nothing has been trained yet.
    """
    used = from_file(source)
    if used is net:
        raise ValueError(f"arch {source}: returns one and the same network at each call; it must make a new one")
    feature_length(used, source, side)
    add_branches(used, branches)
    with torch.no_grad():
        for w in used.parameters():
            if w.is_floating_point():
                w.add_(0.01 * torch.randn_like(w))  # no longer what the function makes
    names = branches if has_branches(used) else (None,)
    for name in names:
        x = try_training(used, source, side, name)

    loaded = from_file(source)
    feature_length(loaded, source, side)
    add_branches(loaded, branches)
    lost = f"arch {source}: the exported encoder would not be the trained one"
    try:
        files.load_strict(loaded, used.state_dict(), lost)
    except ValueError as e:
        raise ValueError(f"{e}; what depends on the batch, or is infinite, must stay out of the state_dict, as by "
                         "register_buffer(name, tensor, persistent=False)") from None
    for name in names:
        features = features_of(used, x, name)
        if differ(features[:2], features_of(used, x[:2], name)):
            if differ(features, features_of(used, x, name)):
                raise ValueError(f"arch {source}: in eval mode the same images have other features at each pass; "
                                 "switch off what is random by self.training, as F.dropout(x, p, self.training)")
            raise ValueError(f"arch {source}: in eval mode the features of an image depend on the other images "
                             "of its batch; they must be of the image alone")
        if differ(features, features_of(loaded, x, name)):
            raise ValueError(f"{lost}: its state_dict does not hold all that the features depend on; keep every "
                             "layer in a module or nn.ModuleList, every other tensor in register_buffer")


def try_training(net, source, side, name):
    """A pass through `net` in train mode and branch `name` (None: it has none), and its gradients. Returns its
    images, noise (3, 3, S, S), S the first of SIDES from `side` on that it takes. Raises ValueError that says
    what fails."""
    fault = None
    features = None
    for larger in (s for s in SIDES if s >= side):  # some need a larger one in train mode
        x = torch.randn(3, 3, larger, larger, device=device_of(net)).requires_grad_()
        try:
            with in_branch(net, name):
                features = net.train()(x)
            break
        except Exception as e:
            fault = fault or e
    if features is None and fault:
        where = line_of(fault, source.rpartition(":")[0])
        replaced = ""
        if "BranchNorm" in str(fault):
            replaced = "; its BatchNorms are BranchNorms here, which can only be called, as self.bn(x)"
        raise ValueError(f"arch {source}: fails in train mode{where} on images of side {side} "
                         f"({type(fault).__name__}: {' '.join(str(fault).split())[:200]}){replaced}")
    check_features(features, source, x, "in train mode ")
    gradient = None
    if features.requires_grad:
        gradient, = torch.autograd.grad(features.sum(), x, allow_unused=True, retain_graph=True)
    if not any(w.requires_grad for w in net.parameters()):
        raise ValueError(f"arch {source}: all of its weights are frozen, and nothing would be trained; leave out "
                         "requires_grad_(False)")
    if gradient is None:
        raise ValueError(f"arch {source}: no gradient reaches the images, so that it cannot be attacked; leave out "
                         "torch.no_grad() and detach()")
    known = {id(w) for w in net.parameters()}
    for w in leaves(features):
        if id(w) not in known and w is not x:
            raise ValueError(f"arch {source}: a weight of shape {tuple(w.shape)} is none of its parameters, and "
                             "would be neither trained nor exported; keep every layer in a module or an "
                             "nn.ModuleList, not in a plain list")
    return x.detach()


def line_of(error, file):
    """Where in `file` the `error` came from, in words; nothing where it did not pass by there."""
    lines = [place.lineno for place in traceback.extract_tb(error.__traceback__)
             if pathlib.Path(place.filename).resolve() == pathlib.Path(file).resolve()]
    return f" in line {lines[-1]}" if lines else ""


def leaves(y):
    """The tensors that a gradient of `y` would be kept for: the leaves of its graph."""
    found = []
    seen = set()
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [before for before, _ in node.next_functions]
    return found


def has_branches(net):
    """Whether `net` has BatchNorms with branches."""
    return any(isinstance(m, resnet.BranchNorm) for m in net.modules())


def in_branch(net, name):
    """A context in which the BatchNorms of `net` use the branch `name`; None: it changes nothing."""
    return resnet.branch(net, name) if name else contextlib.nullcontext()


@torch.no_grad()
def features_of(net, x, name):
    """The features of images x (B, 3, H, W) in eval mode and branch `name`."""
    with eval_mode(net), in_branch(net, name):
        return net(x)


def differ(features, others):
    """Whether two tensors of features differ by more than rounding, which depends on the size of a batch."""
    scale = features.abs().max().item()
    return not torch.allclose(features, others, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def device_of(net):
    """The device of the weights of `net`; the CPU where it has none."""
    return next((w.device for w in net.parameters()), torch.device("cpu"))


SIDES = (32, 64, 96, 224, 384)  # of usual images; some networks take one of them only


@torch.no_grad()
def feature_length(net, source, side=None):
    """The D of net's features (B, D) and the side of the images, found on two black images of that `side`, or
    of the first of SIDES that it takes; no running statistic changes. Raises ValueError where it takes none,
    or where they are no such features."""
    device = device_of(net)
    features = None
    faults = []
    for side in (side,) if side else SIDES:
        x = torch.zeros(2, 3, side, side, device=device)
        try:
            with eval_mode(net):
                features = net(x)
            break
        except (RuntimeError, AssertionError, ValueError) as e:
            faults.append(f"of side {side}: {' '.join(str(e).split())[:200]}")
    if features is None:
        raise ValueError(f"arch {source}: takes no images of the sides tried; {faults[0]}")
    check_features(features, source, x)
    return features.shape[1], side


def check_side(source, side):
    """ValueError where the network of `source` takes no images of that `side`."""
    with torch.random.fork_rng(devices=[]):
        net = from_file(source)
        try:
            feature_length(net, source, side)
        except ValueError as e:
            _, other = feature_length(net, source)
            raise ValueError(f"{e}; it takes those of side {other}: --image-size {other}") from None


def check_features(features, source, x, where=""):
    """ValueError where `features` are not (B, D), those of images x (B, 3, H, W); `where`: in which mode."""
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != len(x):
        what = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise ValueError(f"arch {source}: must map images (B, 3, H, W) to features (B, D); {where}of "
                         f"{len(x)} images it made {what}")


def branch_norms(net, branches):
    """Replace every BatchNorm in `net` by a BranchNorm with these `branches`, all of them starting as it
    was.

    Raises ValueError where there is none.
    """
    norms = [(name, m) for name, m in net.named_modules(remove_duplicate=False)
             if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError("this network has no BatchNorm, so that it cannot have the branches "
                         f"{', '.join(branches)}")
    of_norm = {}  # one that has several names stays one
    for name, norm in norms:
        parent, _, leaf = name.rpartition(".")
        if norm not in of_norm:
            of_norm[norm] = resnet.BranchNorm(norm.num_features, branches, lambda _: copy.deepcopy(norm))
        setattr(net.get_submodule(parent), leaf, of_norm[norm])
