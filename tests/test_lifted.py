"""What is lifted out of the project: modules, each alone in an empty folder with torch and torchvision, and
methods, by README's recipe."""
import ast
import builtins
import pathlib
import re
import subprocess
import symtable
import sys

from tests.scripts import SCRIPTS

ROOT = pathlib.Path(__file__).parents[1]
USE = {  # module -> what somebody who copied it does with it
    "pgd": """
x = torch.rand(2, 3, 8, 8)
x_adv = m.pgd(lambda x: (x * x).sum(), x, 8 / 255, 2 / 255, 3)
assert 0 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6
""",
    "optim": """
net = torch.nn.Linear(2, 2)
opt = m.LARS(m.lars_groups(net), lr=m.warmup_cosine(5, 10, 5, 0.1))
before = net.weight.clone()
opt.step(lambda: net(torch.ones(1, 2)).sum().backward())
assert not torch.equal(net.weight, before)
""",
    "bank": """
bank = m.Bank(8, 4)
bank.push(torch.eye(4))
assert m.bank_argmax(torch.eye(4), bank.rows[:4]).tolist() == [0, 1, 2, 3]
q = torch.eye(4).requires_grad_()
m.bank_logsumexp(q, bank.rows, 0.2).sum().backward()
assert q.grad.isfinite().all()
""",
    "dist": """
z = torch.eye(3, requires_grad=True)
assert m.gather(z) is z
m.average_grads([z])
m.average_buffers(torch.nn.BatchNorm1d(3))
""",
    "kmeans": """
labels = m.kmeans(torch.eye(3).repeat(4, 1), 3, torch.Generator().manual_seed(0))
assert labels.bincount().tolist() == [4, 4, 4]
""",
    "augment": """
assert m.grayscale(torch.rand(2, 3, 8, 8), torch.tensor([True, False])).shape == (2, 3, 8, 8)
assert m.resize(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 4).shape == (2, 3, 4, 4)
""",
    "resnet": """
depths, widths, bottleneck, stem = m.ARCHS["slim"]
net = m.ResNet("slim", depths, widths, bottleneck, stem, ("clean", "adv"), (0.5,) * 3, (0.25,) * 3)
with m.branch(net, "adv"):
    assert net(torch.rand(2, 3, 16, 16)).shape == (2, net.dim)
""",
    "vit": """
*shape, side = m.VITS["vit_slim"]
net = m.ViT("vit_slim", *shape, side, (0.5,) * 3, (0.25,) * 3, "sincos", False, False)
assert net(torch.rand(2, 3, 32, 32)).shape == (2, net.dim)
""",
    "unet": """
assert m.UNet(2, 8, 16)(torch.rand(2, 3, 16, 16)).shape == (2, 2, 16, 16)
""",
}
ALONE = """
import importlib.util, pathlib, sys
import torch

class Refuse:  # the siblings, and what is not among the requirements
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("common", "scipy", "timm"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
for folder in map(pathlib.Path, sys.argv[1:]):
    name = folder.name
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    exec((folder / "use.txt").read_text(), {"m": m, "torch": torch})
    print(name)
"""


def test_each_module_works_alone_in_an_empty_folder(tmp_path):
    for name, use in USE.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text((ROOT / "common" / f"{name}.py").read_text())
        (folder / "use.txt").write_text(use)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *(str(tmp_path / name) for name in USE)], cwd=tmp_path,
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(USE)


REPLACED = """
import contextlib

class run:
    @staticmethod
    def autocast(device):
        return contextlib.nullcontext()
"""
STEP = """
import copy, torch
from torch import nn
from common.resnet import ARCHS, ResNet
from amoc import VARIANTS, Bank, optim, train_step

depths, widths, bottleneck, stem = ARCHS["slim"]
net = ResNet("slim", depths, widths, bottleneck, stem, ("clean", "adv"), (0.5,) * 3, (0.25,) * 3)
net = nn.Sequential(net, nn.Linear(net.dim, 8))
target = copy.deepcopy(net).requires_grad_(False)
opt = torch.optim.SGD(net.parameters(), 0.1)
x1, x2 = torch.rand(2, 4, 3, 16, 16)
noise = 2 * torch.rand(4, 2, 3, 16, 16) - 1
before = net[1].weight.clone()
losses = train_step(net, target, opt, Bank(16, 8), Bank(16, 8), x1, x2, noise, variant=VARIANTS["ACC"], lam=0.5,
                    temperature=0.2, ema=0.9, norm="linf", eps=8 / 255, step_size=2 / 255, steps=2)
assert losses["loss"].isfinite() and not torch.equal(net[1].weight, before)
"""


def pasted(script):
    """The method of `script` as README has it pasted: what stands between its imports and "# The run", with the
    imports that still exist; and what it takes from `encoders`."""
    text = (ROOT / f"{script}.py").read_text()
    lines = text.splitlines()
    end = lines.index("# The run") - 1
    imports = []
    body = []
    for node in ast.parse(text).body:
        source = "\n".join(lines[node.lineno - 1 - len(getattr(node, "decorator_list", [])) : node.end_lineno])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common"):
            if node.module == "common":
                names = [alias.name for alias in node.names if alias.name in USE]
                imports += [f"from common import {', '.join(names)}"] if names else []
            elif node.module.removeprefix("common.") in USE:
                imports.append(source)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(source)
        elif node.end_lineno <= end and not isinstance(node, ast.Expr):  # the docstring stays behind
            body.append(source)
    text = "\n".join([*imports, REPLACED, *body]) + "\n"
    return re.sub(r"@graphed.*\n", "", text)


def test_a_method_is_pasted_as_readme_says(tmp_path):
    """With the modules that stand alone and README's replacements every name is there; AMOC makes a step on a
    network of one's own."""
    (tmp_path / "common").mkdir()
    for name in USE:
        (tmp_path / "common" / f"{name}.py").write_text((ROOT / "common" / f"{name}.py").read_text())
    readme = (ROOT / "README.md").read_text().split("## In your own code")[1].split("\n## ")[0]
    assert all(f"`{name}`" in readme for name in [*USE, "run.autocast(device)", "@graphed"])
    of_encoders = {"encoders", "last_stage"}  # and what is imported from there
    for script in SCRIPTS:
        text = pasted(script)
        (tmp_path / f"{script}.py").write_text(text)
        missing = names_without_a_home(text)
        assert missing <= of_encoders, (script, missing)
    (tmp_path / "step.py").write_text(STEP)
    lines = [f"import {script}" for script in SCRIPTS] + ["import step", "print(\"done\")"]
    (tmp_path / "all.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "all.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


def names_without_a_home(text):
    """The global names that the functions of `text` read and that neither it nor Python defines."""
    table = symtable.symtable(text, "pasted", "exec")
    known = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()
             or symbol.is_namespace()}
    found = set()
    todo = [table]
    while todo:
        scope = todo.pop()
        todo += scope.get_children()
        found |= {symbol.get_name() for symbol in scope.get_symbols()
                  if symbol.is_global() and symbol.is_referenced()}
    return {name for name in found - known if not hasattr(builtins, name)}
