"""One training step of each script, as it is here and as it is in another checkout: how much faster is a change?

    git worktree add ../before HEAD~20
    python -m tests.versus ../before                        all scripts, on one CPU thread
    python -m tests.versus ../before amoc:ACC adco --bank 65536 --arch resnet18 --batch 32

Each checkout has a process of its own, and they take turns. Printed are the medians of their CPU times, and the
median and quartiles of the ratio over the turns: above 1, this one is faster. Steps are those of tests/bench.py
in either checkout, whose variants must have the same names. Processes differ by some per cent, by where their
memory lies; so each turn of four has new ones.
"""
import argparse
import pathlib
import statistics
import subprocess
import sys

from tests.bench import SCRIPTS

HERE = pathlib.Path(__file__).resolve().parents[1]
WORKER = """
import os, sys, time
sys.path.insert(0, os.getcwd())
import torch
torch.set_num_threads(1)
from tests import bench
name, variant, arch, batch, bank = sys.argv[1:]
s = bench.Setting(torch.device("cpu"), arch, int(batch), int(bank), False, None)
torch.manual_seed(0)
step = getattr(bench, name + "_step")(s, variant, False)
step()
for line in sys.stdin:
    began = time.process_time()
    for _ in range(int(line)):
        step()
    print((time.process_time() - began) / int(line), flush=True)
"""


class Worker:
    """A process in the checkout `tree` that makes steps when it is asked to."""

    def __init__(self, tree, *what):
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, *map(str, what)], cwd=tree, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def seconds(self, steps):
        """CPU seconds of a step, mean over `steps`."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"the steps of {self.process.args[3:]} failed in that checkout, as is said above")
        return float(answer)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def race(other, *what, turns):
    """Seconds of a step there, and here, of each turn."""
    pairs = []
    for _ in range(max(1, turns // 4)):
        there, here = Worker(other, *what), Worker(HERE, *what)
        once = min(there.seconds(1), there.seconds(1))
        here.seconds(2)
        steps = max(1, round(0.3 / once))
        pairs += [(there.seconds(steps), here.seconds(steps)) for _ in range(min(4, turns))]
        there.end()
        here.end()
    return pairs


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tests.versus", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("other", help="the folder of the other checkout")
    p.add_argument("scripts", nargs="*", default=[], help="amoc: all its variants; amoc:ACC: one; default: all")
    p.add_argument("--arch", default="slim", help="slim or resnet18")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--bank", type=int, default=4096)
    p.add_argument("--turns", type=int, default=12)
    args = p.parse_args(argv)
    if not (pathlib.Path(args.other) / "tests" / "bench.py").exists():
        p.error(f"{args.other}: no checkout of this project")
    chosen = []
    for word in args.scripts or SCRIPTS:
        name, _, variant = word.partition(":")
        if name not in SCRIPTS:
            p.error(f"{name}: choose from {', '.join(SCRIPTS)}")
        if variant and variant not in SCRIPTS[name]:
            p.error(f"{word}: choose from {', '.join(SCRIPTS[name])}")
        chosen += [(name, v) for v in ([variant] if variant else SCRIPTS[name])]
    print(f"{args.arch}, batch {args.batch}, bank {args.bank}, one CPU thread\n")
    print("| | there, ms | here, ms | there / here | quartiles |\n|---|---|---|---|---|")
    for name, variant in chosen:
        pairs = race(args.other, name, variant, args.arch, args.batch, args.bank, turns=args.turns)
        there, here = (1000 * statistics.median(times) for times in zip(*pairs))
        ratios = sorted(a / b for a, b in pairs)
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(f"| {name}, {variant} | {there:.0f} | {here:.0f} | {statistics.median(ratios):.2f} | "
              f"{low:.2f} to {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
