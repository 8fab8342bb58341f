"""Do our runs rank the methods as the papers do?

    python -m evaluation.ranks results/cifar10-jpeg/*

For each method of which both have a figure, the accuracy of our linear probe (amoc-slf), on clean images and
under PGD-20 at 8/255, stands beside the published one, each with its rank. Below is Spearman's correlation
of the ranks, with

    its interval     95 %, by the bootstrap: methods are drawn with replacement, and our figures moved by
                     their standard errors; of few methods it is wide. Where a method has one run, its error is
                     that of the test images alone: what another seed would change is not in it
    p                how often ranks without any relation would correlate as much, or more

A method's figure is the mean of all its runs. The published ones come from several papers, with settings of
their own: see evaluation/published.py.
"""
import argparse
import itertools
import math
import pathlib
import statistics

import numpy

from common import run
from evaluation import table
from evaluation.published import COMPARED, cifar10

PRESET = "amoc-slf"
ATTACKS = ("clean", "pgd20")  # the first two figures of a published triple
DRAWS = 10000
EXACT = 8  # up to so many methods all orders are tried


def ranks(values):
    """The rank of each value, 1 for the largest; equal ones share the mean of theirs."""
    values = numpy.asarray(values, dtype=float)
    larger = (values[None, :] > values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)  # with itself
    return larger + (equal + 1) / 2


def spearman(a, b):
    """Spearman's rank correlation of two lists, ties sharing their ranks; nan where one list has one value
    only."""
    a = ranks(a) - (len(a) + 1) / 2
    b = ranks(b) - (len(b) + 1) / 2
    norm = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else math.nan


def chance_of(a, b, seed=0):
    """How often an order drawn at random correlates with `a` as much as `b` does, or more: over all orders of
    up to EXACT values, else over DRAWS of them, `b` among these; nan where there is no correlation."""
    found = spearman(a, b) - 1e-9
    if math.isnan(found):
        return math.nan
    b = numpy.asarray(b)
    if len(b) <= EXACT:
        hits = [spearman(a, b[list(order)]) >= found for order in itertools.permutations(range(len(b)))]
        return statistics.mean(hits)
    rng = numpy.random.default_rng(seed)
    hits = sum(spearman(a, rng.permutation(b)) >= found for _ in range(DRAWS))
    return (hits + 1) / (DRAWS + 1)


def interval(published, ours, errors, seed=0):
    """The 2.5th and the 97.5th percentile of Spearman's correlation over DRAWS resamples of the methods,
    `ours` moved by normal numbers of standard deviation `errors`."""
    published = numpy.asarray(published, dtype=float)
    ours = numpy.asarray(ours, dtype=float)
    errors = numpy.asarray(errors, dtype=float)
    rng = numpy.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(ours), size=len(ours))
        moved = ours + errors * rng.standard_normal(len(ours))
        found.append(spearman(published[chosen], moved[chosen]))
    low, high = numpy.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def is_on_cifar10(line, attack, result):
    """Whether a line of eval.jsonl is of a classifier for CIFAR-10, as all of COMPARED are. Older lines do not
    say on which data."""
    return cifar10(line.get("data", "cifar10"))


def ours_of(paths):
    """{published row: {attack: [result of each run]}} of the folders that were evaluated by PRESET."""
    found = {}
    for path in paths:
        if not (path / "eval.jsonl").exists():
            continue
        made = table.read_run(path, run.FREE)
        fitting = [row for *kind, row in COMPARED if table.fits(made.script, made.flags, *kind)]
        if not fitting or made.flags.get("epochs") == 0:
            continue
        measured = table.read_folder(path, accept=is_on_cifar10)
        for attack in ATTACKS:
            if (PRESET, attack) in measured:
                found.setdefault(fitting[0], {}).setdefault(attack, []).append(measured[PRESET, attack])
    return found


def mean_and_error(results):
    """The mean of the runs' accuracies and its standard error: from the runs where there are several, else
    that of the test images."""
    values = [result["accuracy"] for result in results]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    return values[0], results[0].get("stderr") or 0.0


def compare(found, attack):
    """(method, published figure, ours, its standard error) of all methods that have both, the best
    published one first."""
    lines = []
    for row, measured in found.items():
        published = row.slf[ATTACKS.index(attack)]
        if published is not None and attack in measured:
            lines.append((f"{row.method} ({row.source})", published, *mean_and_error(measured[attack])))
    return sorted(lines, key=lambda line: -line[1])


def report(found, attack):
    """The Markdown table of `compare`, and the line below it."""
    lines = compare(found, attack)
    if len(lines) < 3:
        return f"{PRESET} {attack}: {len(lines)} methods have both figures; ranks need three"
    _, published, ours, errors = zip(*lines)
    out = [["method", f"published SLF, {attack}", "ours", "rank there", "rank here"], ["---"] * 5]
    places = zip(ranks(published), ranks(ours))
    for (name, theirs, value, error), (there, here) in zip(lines, places):
        out.append([name, f"{theirs:.2f}", f"{value:.2f} ({error:.2f})", f"{there:g}", f"{here:g}"])
    low, high = interval(published, ours, errors)
    below = (f"Spearman's correlation {spearman(published, ours):.2f}, interval {low:.2f} to {high:.2f}, "
             f"p {chance_of(published, ours):.3f}, {len(lines)} methods")
    return "\n".join(["| " + " | ".join(line) + " |" for line in out] + ["", below])


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m evaluation.ranks", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=pathlib.Path, metavar="run",
                   help="folders with log.jsonl and eval.jsonl")
    found = ours_of(p.parse_args(argv).runs)
    if not found:
        raise ValueError(f"none of these folders was evaluated by {PRESET} and has a published figure")
    print("\n\n".join(report(found, attack) for attack in ATTACKS))


if __name__ == "__main__":
    run.cli(main)
