"""Results of evaluations as kept in eval.jsonl, and a Markdown table of them."""
import contextlib
import json
import os
import pathlib
import statistics


def lines(path):
    """The objects of a .jsonl file, if it is there; what is not JSON, as a last line cut off, is left out."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def append(path, line):
    """Add an object to a .jsonl file, on a line of its own even where the one before was cut off."""
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a") as f:
        f.write("\n" * cut + json.dumps(line) + "\n")


def kept(path, key, attack, conditions):
    """The result for `attack` that eval.jsonl at `path` holds of the evaluation `key`, a dict that is part of
    its line, under just these conditions: {name: value or None}. None if there is none."""
    for line in lines(path):
        found = line["results"].get(attack)
        if found and key.items() <= line.items() and all(found.get(k) == v for k, v in conditions.items()):
            return found


def measured(folder, **wanted):
    """{(preset, attack): result} of eval.jsonl in `folder`, of lines and results that agree with `wanted`.
    Raises FileNotFoundError where there is none, and ValueError where something was measured twice in
    different ways."""
    if not (folder / "eval.jsonl").exists():
        raise FileNotFoundError(f"{folder / 'eval.jsonl'}: no such file; nothing was measured there")
    found, hows = {}, {}
    for line in lines(folder / "eval.jsonl"):
        for attack, result in line["results"].items():
            if any({**line, **result}.get(k) != v for k, v in wanted.items()):
                continue
            how = {k: {**line, **result}.get(k) for k in (
                "encoder", "bn", "data", "image_size", "seed", "recipe", "train", "test", "images",
                "settings", "files", "batch_size")}
            name = line["preset"], attack
            differ = [k for k, v in how.items() if v != hows.setdefault(name, how)[k]]
            if differ:
                raise ValueError(f"{folder}: {' '.join(name)} was measured twice, with another "
                                 f"{', '.join(differ)}; take lines out of its eval.jsonl")
            found[name] = result
    return found


def markdown(runs, columns, groups, published, free):
    """The table of `runs`, pairs of a folder and its results {column: {"accuracy", "stderr"}}.

    Each run's script, flags and time are in the folder's log.jsonl. Runs that differ in their seed, or in
    flags of the set `free`, are one row: mean ± standard deviation. One alone has its standard error in
    brackets.

    A dagger marks a result that has doubts or warnings of its own; [n], one of fewer seeds than the row.

    columns    {column: title}; those that some run has
    groups     {title: (script, flags) pairs}: rows stand together under the first title of which a pair fits
               the row's script and flags
    published  (script, flags, text): the text of the first that fits, unless there was no epoch. In both, a
               flag's value may be a function that says whether it fits
    Raises ValueError where two runs of one row have the same seed.
    """
    columns = {c: title for c, title in columns.items() if any(c in results for _, results in runs)}
    rows, spent = {}, {}
    for folder, results in runs:
        if not results.keys() & columns.keys():
            continue
        log, *epochs = lines(folder / "log.jsonl") or [{"command": "? ?", "flags": {"folder": str(folder)}}]
        if epochs:
            cpu = log["device"].endswith("threads")
            spent[folder] = epochs[-1]["cpu_seconds" if cpu else "seconds"], "CPU-s" if cpu else "s"
        script = pathlib.Path(log["command"].split()[1]).stem
        flags = {k: v for k, v in log["flags"].items() if k not in free}
        group = next((title for title, kinds in groups.items()
                      if any(fits(script, flags, *kind) for kind in kinds)), "other")
        seed = flags.pop("seed", None)
        row = rows.setdefault(group, {}).setdefault(json.dumps([script, flags]), {})
        if seed in row:
            raise ValueError(f"{row[seed][0]} and {folder} are one run: the same flags, the same seed")
        row[seed] = folder, results
    out = [["", "seeds", "pretraining", *columns.values(), "published"], ["---"] * (len(columns) + 4)]
    for group in [*groups, "other"]:
        out += [[f"**{group}**"] + [""] * (len(columns) + 3)] if group in rows else []
        for key, row in rows.get(group, {}).items():
            folders, found = zip(*row.values())
            script, flags = json.loads(key)
            paper = next((text for *kind, text in published
                          if flags.get("epochs") != 0 and fits(script, flags, *kind)), "")
            name = os.path.commonprefix([folder.name for folder in folders]).rstrip("-_") or folders[0].name
            times, units = zip(*(spent.get(folder, (0, "")) for folder in folders))
            time = f"{statistics.mean(times):.0f} {units[0]}" if set(units) in ({"s"}, {"CPU-s"}) else ""
            cells = [cell([results[c] for results in found if c in results], len(found)) for c in columns]
            out.append([f"[{name}]({folders[0].as_posix()})", str(len(found)), time, *cells, paper])
    if not any(row[-1] for row in out[2:]):
        out = [row[:-1] for row in out]
    return "\n".join("| " + " | ".join(row) + " |" for row in out)


def fits(script, flags, wanted_script, wanted):
    return wanted_script in (script, None) and all(
        v(flags.get(k)) if callable(v) else flags.get(k) == v for k, v in wanted.items())


def cell(results, seeds=1):
    values = [found["accuracy"] for found in results]
    if not values:
        return ""
    doubtful = any(found.get("warnings") or found.get("sanity", {}).get("doubts") for found in results)
    if len(values) > 1:
        text = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    else:
        text = f"{values[0]:.2f} ({results[0]['stderr']:.2f})"
    return text + "†" * doubtful + (f" [{len(values)}]" if len(values) < seeds else "")
