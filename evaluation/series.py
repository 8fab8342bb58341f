"""The numbers that plot.py draws of runs, read from log.jsonl and eval.jsonl; no picture is made here.

A column of results is a pair of names, as `table.read_folder` has it: that of the preset, which may go on
with what was changed ("mae-tune layer-decay=0.75"), and that of the attack. Which PGD an attack is, the
settings say that are kept with its result; names without settings are looked up in ATTACKS.
"""
import json
import os
import pathlib
import statistics
from typing import NamedTuple

from common import run
from evaluation import table
from evaluation.attacks import ATTACKS, Attack

# Step over radius of pgd20, pgd20-l2 and pgd20-l1. A curve of other steps says so in its name.
USUAL_STEP = {"linf": 0.25, "l2": 0.2, "l1": 0.1}


def of_log(folder, column):
    """(epochs, means) of a `column` of the log of the run in `folder`, as "loss"; None where the log has none."""
    points = [(line["epoch"], line[column]) for line in table.lines(folder / "log.jsonl")
              if table.is_number(line.get("epoch")) and table.is_number(line.get(column))]
    return tuple(zip(*points)) if points else None


def of_snapshots(folder, column, only=None):
    """(epochs, accuracies) of a `column` of results, as "knn" or "amoc-slf pgd20", of the encoders
    encoder-002.pt, ... in `folder`, kept after so many epochs (evaluation/snapshots.py); None where there
    are none."""
    if not (folder / "eval.jsonl").exists():
        return None
    preset, _, attack = column.rpartition(" ") if " " in column else (column, "", "clean")
    points = []
    for file in table.evaluated(folder):
        stem, _, epoch = pathlib.PurePath(file).stem.rpartition("-")
        if stem == "encoder" and epoch.isdigit():
            result = read(folder, file, preset, only).get((preset, attack))
            if result:
                points.append((int(epoch), result["accuracy"]))
    return tuple(zip(*sorted(points))) if points else None


# ----------------------------------------------------------------------------------------------------------
# Which results
# ----------------------------------------------------------------------------------------------------------
def is_of(name, preset):
    """Whether the column's `name` is that of `preset`, as it is or with something changed; None: of any."""
    return preset is None or name == preset or name.startswith(f"{preset} ")


def base(name):
    """The preset of a column's name, without what was changed."""
    return name.partition(" ")[0]


def recipe_of(line):
    """The recipe in a line of eval.jsonl; empty where it says none."""
    return line["recipe"] if isinstance(line.get("recipe"), dict) else {}


def recipes(folder, file):
    """The different recipes in `folder` by which the encoder in `file` was judged."""
    found = []
    for line in table.measurements(folder):
        if table.file_of(line) == file and recipe_of(line) not in found:
            found.append(recipe_of(line))
    return found


def fits(line, only):
    """Whether a line of eval.jsonl was measured under what `only` says, as {"data": "cifar10", "seed": 0}. What a
    line does not say fits all."""
    return all(line.get(name) in (None, value) for name, value in (only or {}).items())


def read(folder, file, preset=None, only=None, recipe=None):
    """{(preset, attack): result} of the encoder in `file` of `folder`, attacked directly and once.

    preset, only, recipe    None: any; `only` as in `fits`
    """
    def accept(line, attack, result):
        if preset is not None and base(line["preset"]) != base(preset):
            return False
        if not fits(line, only):
            return False
        return recipe is None or recipe_of(line) == recipe

    found = table.read_folder(folder, file, accept, source=None, restarts=None)
    return {column: result for column, result in found.items() if is_of(column[0], preset)}


def results_of(folder, preset=None, only=None):
    """As `read`, of all encoders in `folder`: the name of one that is not encoder.pt comes before the
    preset's. Raises ValueError where something was measured twice in different ways."""
    found = {}
    for file in table.evaluated(folder):
        before = "" if file == "encoder.pt" else f"{pathlib.PurePath(file).stem} "
        for (name, attack), result in read(folder, file, preset, only).items():
            found[before + name, attack] = result
    return found


# ----------------------------------------------------------------------------------------------------------
# Curves
# ----------------------------------------------------------------------------------------------------------
def pgd_of(attack, result):
    """The `Attack` that the result for the name `attack` was measured under; None where it was no PGD."""
    settings = result.get("settings")
    if not isinstance(settings, dict):
        row = ATTACKS.get(attack)
        settings = row._asdict() if isinstance(row, Attack) else {}
    if not set(Attack._fields) <= settings.keys():
        return None
    found = Attack(*[settings[field] for field in Attack._fields])
    if not all(table.is_number(value) and value > 0 for value in (found.eps, found.step_size, found.steps)):
        return None
    return found


def radius_of(pgd):
    """The radius as it is written: in 1/255 for linf, else in the units of images in [0, 1]."""
    return round(pgd.eps * 255, 4) if pgd.norm == "linf" else round(pgd.eps, 6)


def lines_of(points, norm):
    """{(name, step over radius): {x: accuracy}} -> {name: (xs, accuracies)}, without what is one point."""
    found = {}
    for (name, step), of_x in points.items():
        unusual = step != USUAL_STEP.get(norm)
        if len([x for x in of_x if x > 0]) > 1 or (len(of_x) > 1 and not unusual):
            found[f"{name}, step {step:g} eps" if unusual else name] = tuple(zip(*sorted(of_x.items())))
    return found


def curves(results, norm="linf", steps=20):
    """{name: (radii, accuracies)} of `results`, {(preset, attack): result}, under PGD of so many `steps`
    in `norm`; radius 0 are clean images. Steps of another length are another curve."""
    points = {}
    for (name, attack), result in results.items():
        pgd = pgd_of(attack, result)
        if pgd and pgd.norm == norm and pgd.steps == steps:
            step = round(pgd.step_size / pgd.eps, 3)
            points.setdefault((name, step), {})[radius_of(pgd)] = result["accuracy"]
    for name, step in points:
        if (name, "clean") in results:
            points[name, step][0] = results[name, "clean"]["accuracy"]
    return lines_of(points, norm)


def step_curves(results, norm="linf", radius=8):
    """{name: (numbers of steps, accuracies)} of `results` under PGD of one `radius`, see `radius_of`."""
    points = {}
    for (name, attack), result in results.items():
        pgd = pgd_of(attack, result)
        if pgd and pgd.norm == norm and radius_of(pgd) == radius:
            step = round(pgd.step_size / pgd.eps, 3)
            points.setdefault((name, step), {})[pgd.steps] = result["accuracy"]
    return lines_of(points, norm)


def histories(folder, preset=None, only=None):
    """{name: (epochs, accuracies)} of the "history" that eval.jsonl keeps of a classifier's training, a
    list of {"epoch", "clean", "pgd20", ...}: a line for each of these."""
    found = {}
    for file in table.evaluated(folder):
        before = "" if file == "encoder.pt" else f"{pathlib.PurePath(file).stem} "
        for recipe in recipes(folder, file):
            names = {base(name): name for name, _ in read(folder, file, preset, only, recipe)}
            for line in table.measurements(folder):
                name = names.get(base(line["preset"]))
                if name is None or table.file_of(line) != file or recipe_of(line) != recipe:
                    continue
                if fits(line, only):
                    found |= {f"{before}{name} {what}": points for what, points in history_of(line).items()}
    return found


def history_of(line):
    """{what: (epochs, accuracies)} of the history in a line of eval.jsonl, or in a result of it."""
    histories = [held.get("history") for held in (line, *table.results(line).values())]
    points = next((history for history in histories if isinstance(history, list)), [])
    points = [point for point in points if isinstance(point, dict) and table.is_number(point.get("epoch"))]
    found = {}
    for what in dict.fromkeys(name for point in points for name in point if name != "epoch"):
        of_epoch = {point["epoch"]: point[what] for point in points if table.is_number(point.get(what))}
        if of_epoch:
            found[what] = tuple(zip(*sorted(of_epoch.items())))
    return found


# ----------------------------------------------------------------------------------------------------------
# Corruptions
# ----------------------------------------------------------------------------------------------------------
def kinds(folder, preset=None, only=None):
    """{(name, attack): {kind of corruption: accuracy}} of the results in `folder` that have such kinds."""
    found = {}
    for column, result in results_of(folder, preset, only).items():
        of_kind = result.get("kinds")
        if isinstance(of_kind, dict) and of_kind and all(map(table.is_number, of_kind.values())):
            found[column] = of_kind
    return found


# ----------------------------------------------------------------------------------------------------------
# Clean accuracy over robust accuracy
# ----------------------------------------------------------------------------------------------------------
class Point(NamedTuple):
    """A run judged by one recipe; or several that differ in their seed alone."""

    name: str  # of the folder, of the encoder if it is not encoder.pt, and what was changed of the preset
    run: table.Run
    preset: str  # the column's
    recipe: dict
    clean: float  # accuracies in per cent, the mean over seeds
    robust: float
    clean_spread: float = 0.0  # their standard deviation over seeds; 0 of one alone
    robust_spread: float = 0.0


def tradeoff(folder, preset, attack="pgd20", only=None):
    """The points, a list of `Point`, of what eval.jsonl in `folder` holds for `preset` both on clean images
    and under `attack`."""
    found = []
    for file in table.evaluated(folder):
        path = folder if file == "encoder.pt" else folder / file
        for recipe in recipes(folder, file):
            results = read(folder, file, preset, only, recipe)
            for name, of_attack in results:
                if of_attack != "clean" or (name, attack) not in results:
                    continue
                words = [folder.name, "" if file == "encoder.pt" else path.stem, name[len(preset):].strip()]
                found.append(Point(
                    " ".join(filter(None, words)), table.read_run(path, run.FREE), name, recipe,
                    results[name, "clean"]["accuracy"], results[name, attack]["accuracy"]))
    return found


def over_seeds(points):
    """Points of runs that differ in their seed alone as one, of their means and standard deviations."""
    rows = {}
    for point in points:
        rows.setdefault((table.method_of(point.run), point.preset), []).append(point)
    found = []
    for row in rows.values():
        if len({json.dumps(point.run.seed) for point in row}) < len(row):
            found += row  # the same seed twice: not of one row
        elif len(row) == 1:
            found += row
        else:
            found.append(row[0]._replace(
                name=os.path.commonprefix([point.name for point in row]).rstrip("-_ ") or row[0].name,
                clean=statistics.mean(point.clean for point in row),
                robust=statistics.mean(point.robust for point in row),
                clean_spread=statistics.stdev(point.clean for point in row),
                robust_spread=statistics.stdev(point.robust for point in row)))
    return found


def along(points, what, *free):
    """Points that differ in `what` alone, as lists of (value, Point) by its value: `what` is a flag of the
    runs, as "eps", or a field of the preset, as "preset.layer-decay". They may also differ in the flags
    `free`, which follow from it, as "step-size". What stands alone is no list.

    Raises ValueError where no point has it, or a value is no number.
    """
    of_preset = what.startswith("preset.")
    field = what.removeprefix("preset.").replace("-", "_")
    rows = {}
    for point in points:
        flags = dict(point.run.flags)
        recipe = dict(point.recipe)
        value = (recipe if of_preset else flags).pop(field, None)
        if value is None:
            continue
        if not table.is_number(value):
            raise ValueError(f"--along {what}: is {json.dumps(value)} in {point.run.path}; only numbers have "
                             "an order")
        for name in free:
            flags.pop(name.replace("-", "_"), None)
        rest = json.dumps([point.run.script, flags, point.run.seed, recipe], sort_keys=True)
        rows.setdefault(rest, []).append((value, point))
    if not rows:
        names = {f"preset.{name}" if of_preset else name for point in points
                 for name in (point.recipe if of_preset else point.run.flags)}
        known = ", ".join(sorted(name.replace("_", "-") for name in names))
        raise ValueError(f"--along {what}: no run has it; there is {known or 'nothing'}")
    return [sorted(row, key=first) for row in rows.values() if len(row) > 1]


def first(pair):
    return pair[0]
