"""Results of evaluations as kept in eval.jsonl, and a Markdown table of them.

A line of eval.jsonl that is no such line (cut off by a crash, foreign, damaged) is left out everywhere;
`foreign` names it.
"""
import functools
import importlib
import json
import math
import os
import pathlib
import statistics
from typing import NamedTuple

from common import files
from evaluation.presets import name_of as name_of_result
from evaluation.published import GROUPS


def lines(path):
    """The objects of a .jsonl file, if it is there; what is none, as a last line cut off, is left
    out."""
    return [line for _, line in files.json_lines(path) if line is not None]


def results(line):
    """What a line of eval.jsonl holds, {attack: result}; nothing where it is no such line, or None."""
    if line is None or not isinstance(line.get("preset"), str) or not isinstance(line.get("results"), dict):
        return {}
    return {attack: found for attack, found in line["results"].items()
            if isinstance(found, dict) and is_number(found.get("accuracy"))}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def foreign(path):
    """The numbers, from 1, of the lines of eval.jsonl at `path` that hold no result."""
    return [number for number, line in files.json_lines(path) if not results(line)]


def file_of(line):
    """The name of the encoder's file that a line of eval.jsonl is about."""
    path = line.get("path")
    return pathlib.PurePath(path).name if isinstance(path, str) and path else "encoder.pt"


def find(path, key, attack, conditions, file="encoder.pt"):
    """The result for `attack` that eval.jsonl at `path` holds of the evaluation `key`, a dict that is
    part of its line, of the encoder in `file` beside it, under just these conditions: {name: value or
    None}. None if there is none."""
    for line in lines(path):
        found = results(line).get(attack)
        if not found or file_of(line) != file or not key.items() <= line.items():
            continue
        if all(found.get(name) == value for name, value in conditions.items()):
            return found
    return None


def column(preset, attack, test_data=None):
    """The name of a column: a pair; for results on another test set, given by --test-data, a triple."""
    return (preset, attack, test_data) if test_data else (preset, attack)


def evaluated(folder):
    """The names of the encoders' files of which eval.jsonl in `folder` holds results. Raises
    FileNotFoundError where there is none."""
    return list(dict.fromkeys(file_of(line) for line in measurements(folder)))


def measurements(folder):
    """The lines of eval.jsonl in `folder` that hold a result. Raises FileNotFoundError where there is
    no such file."""
    path = folder / "eval.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; nothing was measured there")
    return [line for line in lines(path) if results(line)]


def read_folder(folder, file="encoder.pt", accept=None, others=False, **wanted):
    """{(name, attack): result} that eval.jsonl in `folder` holds of the encoder in `file` there, names as
    `presets.name_of` has them: of lines and results that agree with `wanted` and for which accept(line,
    attack, result), if given, is true. What the line says of how it was judged ("bn", "image_size", "train")
    is in the result too. With `others` results on other test sets count too, as {(name, attack, test_data):
    result}.

    Raises FileNotFoundError where there is no eval.jsonl, and ValueError where something was measured
    twice in different ways."""
    chosen = {}
    conditions = {}
    for line in measurements(folder):
        if file_of(line) != file:
            continue
        for attack, result in results(line).items():
            if result.get("test_data") and not others:
                continue
            both = {**line, **result}
            if any(both.get(name) != value for name, value in wanted.items()):
                continue
            if accept and not accept(line, attack, result):
                continue
            condition = {name: both.get(name) for name in (
                "encoder", "network", "bn", "data", "image_size", "seed", "recipe", "train", "test", "images",
                "settings", "restarts", "source", "files", "batch_size")}
            called = name_of_result(line["preset"], line.get("recipe"), result.get("vote"))
            name = column(called, attack, result.get("test_data"))
            first = conditions.setdefault(name, condition)
            differ = [key for key in condition if condition[key] != first[key]]
            if differ:
                raise ValueError(f"{folder}: {' '.join(name)} was measured twice, with another "
                                 f"{', '.join(differ)}; choose by a flag, or take lines out of its "
                                 "eval.jsonl")
            judged = {part: line[part] for part in ("bn", "image_size", "train") if part in line}
            chosen[name] = {**judged, **result}
    return chosen


def with_epochs(results):
    """`results` {(name, attack): result}, and under (name, "epoch") the epoch that was picked, where one
    was."""
    epochs = {(column[0], "epoch"): {"epoch": result["picked_epoch"]} for column, result in results.items()
              if is_number(result.get("picked_epoch"))}
    return {**results, **epochs}


def is_folder(path):
    """Whether `path` is the folder of a run, and not the file of an encoder; either may be gone."""
    return path.is_dir() or not (path.is_file() or path.suffix == ".pt")


class Run(NamedTuple):
    """What the log of a run says, without one what its path does."""

    path: pathlib.Path  # its folder; or, of an encoder that is not encoder.pt, that file
    script: str
    flags: dict  # that tell methods apart
    seed: object
    spent: float
    unit: str  # of `spent`: CPU-s or s; empty where nothing is known


RENAMED = {"advcl": {"radius": "cutoff"}}  # flags of a script that older logs have under another name


def read_run(path, free):
    """The `Run` at `path`. Flags of the set `free` tell no methods apart."""
    single = not is_folder(path)
    found = lines((path.parent if single else path) / "log.jsonl")
    header = next((line for line in found if isinstance(line.get("flags"), dict)), None)
    if header is None:
        return Run(path, "?", {"folder": str(path)}, None, 0, "")
    # The script itself is the first that ends so; "-m evaluation.snapshots" may stand before it.
    named = [word for word in str(header.get("command")).split() if word.endswith(".py")]
    script = pathlib.Path(named[0]).stem if named else "?"
    names = RENAMED.get(script, {})
    flags = {names.get(name, name): value for name, value in header["flags"].items() if name not in free}
    seed = flags.pop("seed", None)
    if single:
        flags["file"] = path.name
    on_cpu = str(header.get("device")).endswith("threads")
    clock = "cpu_seconds" if on_cpu else "seconds"
    times = [line[clock] for line in found if is_number(line.get(clock))]
    if not times:
        return Run(path, script, flags, seed, 0, "")
    return Run(path, script, flags, seed, times[-1], "CPU-s" if on_cpu else "s")


@functools.cache
def defaults(script):
    """{flag: default} of a script of this project; of another nothing is known."""
    if script not in {name for kinds in GROUPS.values() for name, _ in kinds}:
        return {}
    return {action.dest: action.default for action in importlib.import_module(script).parser()._actions}


def method_of(run):
    """What tells the method of a `Run` from others, as one string. Flags at their defaults do not count: an
    older log may not have them yet."""
    known = defaults(run.script)
    flags = {name: value for name, value in run.flags.items() if name not in known or value != known[name]}
    return json.dumps([run.script, flags], sort_keys=True)


def rows(paths, free):
    """The runs at `paths`, those that differ only in their seed or in flags of the set `free` together:
    lists of `Run`. Raises ValueError where two of one row have the same seed: one was copied."""
    found = {}
    for path in paths:
        run = read_run(path, free)
        row = found.setdefault(method_of(run), {})
        seed = json.dumps(run.seed)
        if seed in row:
            raise ValueError(f"{row[seed].path} and {path} are one run: the same flags, the same seed")
        row[seed] = run
    return [list(row.values()) for row in found.values()]


def markdown(runs, columns, groups, published, free):
    """The table of `runs`, pairs of a path (see `Run`) and its results {column: {"accuracy",
    "stderr"}}, or {"epoch"}.

    Each run's script, flags and time are in the folder's log.jsonl. Runs that differ in their seed, or
    in flags of the set `free`, are one row: mean ± standard deviation. One alone has its standard error
    in brackets.

    A dagger marks a result that has doubts or warnings of its own; [n], one of fewer seeds than the
    row.

    columns    {column: title}; those that some run has
    groups     {title: (script, flags) pairs}: rows stand together under the first title of which a pair fits
               the row's script and flags
    published  (script, flags, text): the text of the first that fits, unless there was no epoch
    In both, a flag's value may be a function that says whether it fits. Raises ValueError where two runs of one
    row have the same seed, or were judged on other images, by another attack, through another BatchNorm
    branch, or after other training.
    """
    columns = {c: title for c, title in columns.items() if any(c in results for _, results in runs)}
    runs = [(path, results) for path, results in runs if results.keys() & columns.keys()]
    grouped = {}
    for row in rows([path for path, _ in runs], free):
        grouped.setdefault(group_of(row[0], groups), []).append(row)
    of_path = dict(runs)
    out = [["", "seeds", "pretraining", *columns.values(), "published"], ["---"] * (len(columns) + 4)]
    for group in [*groups, "other"]:
        if group in grouped:
            out.append([f"**{group}**"] + [""] * (len(columns) + 3))
        for row in grouped.get(group, []):
            found = [of_path[run.path] for run in row]
            for c, title in columns.items():
                check_alike([(run.path, results[c]) for run, results in zip(row, found) if c in results], title)
            cells = [cell([results[c] for results in found if c in results], len(found)) for c in columns]
            time = ""
            if {run.unit for run in row} in ({"s"}, {"CPU-s"}):
                time = f"{statistics.mean(run.spent for run in row):.0f} {row[0].unit}"
            paper = next((text for *kind, text in published if row[0].flags.get("epochs") != 0
                          and fits(row[0].script, row[0].flags, *kind)), "")
            link = f"[{name_of(row)}]({row[0].path.as_posix()})"
            out.append([link, str(len(found)), time, *cells, paper])
    if not any(row[-1] for row in out[2:]):
        out = [row[:-1] for row in out]
    return "\n".join("| " + " | ".join(row) + " |" for row in out)


ALIKE = ("train", "image_size", "bn", "images", "test", "settings", "files")  # old results lack some
UNLESS_DEFAULT = ("restarts", "batch_size", "source")  # which results hold only where they are not the default


def check_alike(results, what):
    """ValueError where `results`, pairs of a path and a result, which are to be averaged, differ in the images,
    the BatchNorm branch or the attack. What older programs did not write is not compared."""
    for name in (*ALIKE, *UNLESS_DEFAULT):
        known = [(path, result.get(name)) for path, result in results if name in result or name in UNLESS_DEFAULT]
        for path, value in known[1:]:
            first, wanted = known[0]
            if value != wanted:
                raise ValueError(f"{what}: {first} and {path} would be averaged, but {name} of the first is {wanted}, "
                                 f"of the second {value}; choose by a flag, or evaluate both alike")


def kinds(runs, column, title):
    """The table of `runs` (see `markdown`) kind by kind of the corruptions in `column`: accuracy over the
    five severities, and the mean over all kinds. A row for each run that has them."""
    runs = [(path, results[column]) for path, results in runs if "kinds" in results.get(column, {})]
    names = list(dict.fromkeys(kind for _, found in runs for kind in found["kinds"]))
    out = [[title, "mean", *(name.replace("_", " ") for name in names)], ["---"] * (len(names) + 2)]
    for path, found in runs:
        cells = [cell([found]).split()[0]]
        for name in names:
            value = found["kinds"].get(name)
            cells.append(f"{value:.2f}" if is_number(value) else "")
        out.append([f"[{own_name(path)}]({path.as_posix()})", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in out)


def own_name(path):
    """What a folder, or the file of an encoder, is called, without what lies above it; "." is called by its
    name too."""
    return pathlib.Path(os.path.abspath(path)).name if is_folder(path) else path.stem


def name_of(row):
    """What the names of a row's folders have in common; for encoders that are files of their own, the
    file's, after that of the folder if it is a run's."""
    if "folder" in row[0].flags and row[0].script == "?":
        return own_name(row[0].path)
    file = row[0].flags.get("file")
    folders = [own_name(run.path.parent if file else run.path) for run in row]
    name = os.path.commonprefix(folders).rstrip("-_") or folders[0]
    return f"{name}/{row[0].path.stem}" if file else name


def fits(script, flags, wanted_script, wanted):
    return wanted_script in (script, None) and all(
        v(flags.get(k)) if callable(v) else flags.get(k) == v for k, v in wanted.items())


def group_of(run, groups):
    """The first title of `groups`, see `markdown`, of which a pair fits the `Run`; else "other"."""
    for title, kinds in groups.items():
        if any(fits(run.script, run.flags, *kind) for kind in kinds):
            return title
    return "other"


def cell(results, seeds=1):
    values = [found["epoch"] if "epoch" in found else found["accuracy"] for found in results]
    if not values:
        return ""
    if len(values) > 1:
        text = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    else:
        text = str(values[0]) if "epoch" in results[0] else f"{values[0]:.2f}"
        if is_number(results[0].get("stderr")):
            text += f" ({results[0]['stderr']:.2f})"
    return text + "†" * any(doubtful(found) for found in results) + (
        f" [{len(values)}]" if len(values) < seeds else "")


def doubtful(found):
    """Whether a result has warnings, or its sanity check doubts, of its own."""
    sanity = found.get("sanity")
    return bool(found.get("warnings") or (isinstance(sanity, dict) and sanity.get("doubts")))
