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


def kept(path, what, attack, how):
    """The result for `attack` that eval.jsonl at `path` holds of the evaluation `what`, a dict that is part
    of its line, under just the conditions `how`: {condition: value or None}. None if there is none."""
    for line in lines(path):
        found = line["results"].get(attack)
        if found and what.items() <= line.items() and all(found.get(k) == v for k, v in how.items()):
            return found


def markdown(runs, columns, groups, published, free):
    """The table of `runs`, pairs of a folder and its results {column: {"accuracy", "stderr"}}.

    Each run's script, flags and time are in the folder's log.jsonl. Runs that differ in their seed, or in
    flags of the set `free`, are one row: mean ± standard deviation. One alone has its standard error in
    brackets.

    columns    {column: title}; those that some run has
    groups     {title: scripts}: rows stand together under the title of their script
    published  (script, flags, text): the text of the first that agrees with a row's script and flags
    """
    columns = {c: title for c, title in columns.items() if any(c in results for _, results in runs)}
    rows, spent = {}, {}
    for folder, results in runs:
        if not results.keys() & columns.keys():
            continue
        log, *epochs = lines(folder / "log.jsonl") or [{"command": "? ?", "flags": {"folder": str(folder)}}]
        if epochs:
            cpu = log["device"].endswith("threads")
            spent[folder] = round(epochs[-1]["cpu_seconds" if cpu else "seconds"]), "CPU-s" if cpu else "s"
        script = pathlib.Path(log["command"].split()[1]).stem
        group = next((title for title, scripts in groups.items() if script in scripts), "other")
        if log["flags"].get("epochs") == 0:
            group = "not pretrained"
        flags = {k: v for k, v in log["flags"].items() if k not in free | {"seed"}}
        rows.setdefault(group, {}).setdefault(json.dumps([script, flags]), []).append((folder, results))
    out = [["", "seeds", "pretraining", *columns.values(), "published"], ["---"] * (len(columns) + 4)]
    for group in ["not pretrained", *groups, "other"]:
        out += [[f"**{group}**"] + [""] * (len(columns) + 3)] if group in rows else []
        for key, members in rows.get(group, {}).items():
            script, flags = json.loads(key)
            paper = next((text for s, want, text in published
                          if s == script and flags["epochs"] and want.items() <= flags.items()), "")
            name = os.path.commonprefix([folder.name for folder, _ in members]).rstrip("-_")
            link = f"[{name}]({members[0][0].as_posix()})"
            times = [spent[folder] for folder, _ in members if folder in spent]
            time = f"{statistics.mean(t for t, _ in times):.0f} {times[0][1]}" if times else ""
            cells = [cell([results[c] for _, results in members if c in results]) for c in columns]
            out.append([link, str(len(members)), time, *cells, paper])
    return "\n".join("| " + " | ".join(row) + " |" for row in out)


def cell(results):
    values = [found["accuracy"] for found in results]
    if len(values) > 1:
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    return f"{values[0]:.2f} ({results[0]['stderr']:.2f})" if values else ""
