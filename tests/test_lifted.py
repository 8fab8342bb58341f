"""Modules that are lifted out whole: each works alone in an empty folder, with torch and torchvision."""
import pathlib
import subprocess
import sys

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
