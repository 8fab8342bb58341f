"""What the .md files and docstrings say: commands that the programs accept, tables that they print, figures that logs
hold, code that runs."""

import contextlib
import glob
import importlib
import pathlib
import re
import shlex
import subprocess
import textwrap

import pytest
import torch

from common import encoders, resnet, vit
from evaluation import finetune, ranks, results
from tests import tables
from tests.scripts import ROOT, SCRIPTS, read_flags

README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in (
    "README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))), "results/README.md")}


def shell(text):
    """What the shell runs of a page: its blocks, with variables put in; and commands within lines, as in tables."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*?)"$', blocks, re.M):
        blocks = blocks.replace(f"${name}", value)
    inline = re.findall(r"`(python \w+\.py [^`]*)`", text)
    return "\n".join([blocks, *inline])


BLOCKS = "\n".join(shell(text) for text in PAGES.values())


def commands(text):
    """(script, flags) of every `... script.py flags` in `text`; what follows two spaces is a comment."""
    for line in re.split(r"\n|&&|;|&$", text, flags=re.M):
        found = re.search(r"(?:python|torchrun)\b[^|]*?\b(\w+)\.py\b(.*)", line)
        if found and found[1] in (*SCRIPTS, "eval", "plot"):
            yield found[1], shlex.split(re.split(r"\s#|\s{3,}", found[2])[0])


def all_commands():
    for name in (*SCRIPTS, "eval", "plot"):
        yield from commands(importlib.import_module(name).__doc__)
    yield from commands(BLOCKS)


@pytest.mark.parametrize(
    "script, flags", list(all_commands()), ids=lambda v: " ".join(v) if isinstance(v, list) else v
)
def test_command_lines_are_accepted(script, flags):
    read_flags(importlib.import_module(script), *flags)


def test_there_are_commands_for_every_script():
    missing = {*SCRIPTS, "eval", "plot"} - {script for script, _ in commands(BLOCKS)}
    assert not missing, f"no command for {sorted(missing)} in the pages; all methods are in docs/reproducing.md"


def test_ci_runs_the_readmes_test_commands():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "-m tests" in line or "pytest" in line]
    assert len(commands) == 2 and all(command in README for command in commands)


@pytest.mark.parametrize("name", PAGES)
def test_whatever_a_page_links_to_is_there(name):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]) if not link.startswith("http")]
    for link in links:
        file, _, section = link.partition("#")
        page = (ROOT / name).parent / file if file else ROOT / name
        assert page.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
            assert section in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles], link


def test_the_readme_is_one_screen_or_a_few():
    assert len(README.splitlines()) <= 180


TABLES = [(name, *table) for name, text in PAGES.items() for table in re.findall(
    r"```sh\n(python eval\.py [^`]*--kept[^`]*?)\n```\n\n((?:\|.*\n)+)", text)]


@pytest.mark.parametrize("page, command, printed", TABLES)
def test_each_table_of_results_is_what_its_command_prints(page, command, printed, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("\\\n", " "))[2:]
    # As the shell does: what a pattern finds, or the word itself where it finds nothing.
    words = [path for word in words for path in sorted(glob.glob(word)) or [word]]
    importlib.import_module("eval").main(words)
    assert capsys.readouterr().out == re.sub(r"\]\((\.\./)?(results/)?", "](results/", printed)


def test_every_result_on_a_page_is_in_such_a_table():
    for name, text in PAGES.items():
        rows = re.findall(r"^\| \[[\w-]+\]\((?:\.\./)?(?:results/)?(?:shapes|cifar10).*$", text, re.M)
        assert all(any(row in printed for page, _, printed in TABLES if page == name) for row in rows)
    assert len(TABLES) >= 5


def test_the_figures_beside_the_methods_are_those_of_the_tables():
    """Rounded to a digit: linear probe, clean / PGD-20 / AutoAttack where it was run."""
    figures = re.findall(r"\[([\d./ ]+)\]\((results/[\w/-]+)\) \|", README)
    section = README.split("## Results at a glance")[1].split("\n## ")[0]
    assert len(figures) == len(re.findall(r"\]\(results/[\w-]+/", section)) >= 26, "a figure is written in another way"
    for text, folder in figures:
        (page,) = [printed for page, _, printed in TABLES
                   if page == "results/README.md" and f"({folder.removeprefix('results/')})" in printed
                   and "-slf" in printed]
        head, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines()]
        (row,) = [row for row in rows if f"({folder.removeprefix('results/')})" in row[0]]
        of = dict(zip(head, row))
        columns = [column for column in ("amoc-slf clean", "amoc-slf pgd20", "amoc-slf aa") if of[column]]
        assert 15 < float(of["pretraining"].split()[0]) / 60 < 25, folder  # "twenty CPU minutes"
        for figure, column in zip(text.split(" / "), columns, strict=True):
            assert abs(float(figure) - float(re.match(r"[\d.]+", of[column])[0])) <= 0.051, (folder, column)


@pytest.mark.parametrize("folder", ["cifar10-jpeg", "cpu-20"])
def test_the_rank_correlations_are_those_that_the_command_prints(folder, capsys):
    ranks.main(sorted(str(path) for path in (ROOT / "results" / folder).iterdir()))
    printed = re.findall(r"Spearman's correlation ([\d.-]+), interval ([\d.-]+) to ([\d.-]+),", capsys.readouterr().out)
    assert len(printed) == 2  # on clean images and under PGD-20
    text = PAGES["results/README.md"].split(f"`python -m evaluation.ranks results/{folder}/*`")[1].split("\n\n")[0]
    for correlation, low, high in printed:
        assert f" {correlation} " in text and f"{low} to {high}" in text


def test_every_published_figure_beside_a_method_is_on_the_page_of_all():
    published = re.findall(r"\| (\d\d\.\d / [\d.–]+ / [\d.–]+) \|", README)
    whole = re.findall(r"\d\d\.\d\d / (?:[\d.]+|–) / (?:[\d.]+|–)", PAGES["docs/published.md"])
    rounded = {" / ".join(v if v == "–" else f"{float(v):.1f}" for v in row.split(" / ")) for row in whole}
    assert len(published) == 7 and set(published) <= rounded


def test_the_tables_of_presets_and_attacks_are_the_codes():
    assert tables.presets() in PAGES["docs/evaluation.md"]
    assert tables.attacks() in PAGES["docs/evaluation.md"]


def test_the_page_of_architectures_has_all_with_their_parameters_and_features():
    """And with their stem and blocks, or their patch, blocks, heads and size."""
    page = PAGES["docs/architectures.md"]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) M \| (.*) \|$", page, re.M)
    assert [row[0] for row in rows] == [*resnet.ARCHS, *resnet.PREACT_ARCHS, *vit.VITS]
    for arch, millions, rest in rows:
        with torch.device("meta"):
            encoder = encoders.make(arch)
        assert float(millions) == round(sum(w.numel() for w in encoder.parameters()) / 1e6, 1)
        cells = [cell.strip("` ") for cell in rest.split("|")]
        if arch in vit.VITS:
            head = encoder.blocks[0].attn.heads
            assert cells == [str(n) for n in (encoder.patch, encoder.dim, len(encoder.blocks), head, vit.VITS[arch][-1])]
        else:
            depths = resnet.ARCHS[arch][0] if arch in resnet.ARCHS else resnet.PREACT_ARCHS[arch][1]
            stem = resnet.ARCHS[arch][-1] if arch in resnet.ARCHS else "cifar"
            features, its_stem, blocks = cells
            assert (int(features), its_stem) == (encoder.dim, stem)
            assert blocks.removesuffix(", with bottlenecks") == ", ".join(map(str, depths))
            assert blocks.endswith("bottlenecks") == arch.endswith("50")


def test_the_bench_logs_hold_what_performance_says():
    """Every block of the page is in a log, and every ratio of its table of steps, rounded to a digit."""
    logs = "\n".join(log.read_text() for log in (ROOT / "results").glob("bench-*.txt"))
    blocks = re.findall(r"```text\n(.*?)```", PAGES["docs/performance.md"], re.S)
    assert blocks and all(block in logs for block in blocks)
    steps = (ROOT / "results" / "bench-step-cpu.txt").read_text()
    measured = [float(line.split()[-1]) for line in steps.splitlines() if re.search(r" [\d.]+$", line)]
    table = PAGES["docs/performance.md"].split("| | time | base |")[1].split("\n\n")[0]
    ratios = [float(value) for value in re.findall(r"\d\.\d", table)]
    assert len(ratios) == 12
    assert all(any(abs(ratio - value) <= 0.051 for value in measured) for ratio in ratios)


def test_the_table_of_speed_is_its_logs():
    """Row by row: passes, GFLOP, operations, those outside the attack, and images a second, of each variant."""
    found = []
    for line in (ROOT / "results" / "bench-step-cpu.txt").read_text().splitlines():
        if line.startswith("step: "):
            script, network = line.removeprefix("step: ").split(", ")[:2]
        elif re.search(r" - +[\d.]+$", line):
            variant, _, images, *rest = re.split(r"  +", line.strip())
            found.append([f"{script}, {variant}", network, *rest[:2], *rest[3:5], images])
    table = (ROOT / "results" / "speed.md").read_text().split("|---|---|---|---|---|---|---|\n")[1].split("\n\n")[0]
    assert [row.strip("| ").split(" | ") for row in table.splitlines()] == found and len(found) > 30


# Python blocks ----------------------------------------------------------------------------------------------
def markdown_files():
    """Those of the repository, by git where there is one: a checkout may have other things in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    with contextlib.suppress(OSError):
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout:
            return sorted(ROOT / name for name in set(listed.stdout.splitlines()) if (ROOT / name).exists())
    patterns = ("*.md", "docs/**/*.md", "results/**/*.md")
    return [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]


def python_blocks(text):
    """(number of its first line, code) of every Python block."""
    for found in re.finditer(r"^( *)```(?:python|py)\b[^\n]*\n(.*?)^\1```", text, re.S | re.M):
        yield text[: found.start(2)].count("\n") + 1, textwrap.dedent(found[2])


def make_files(code, folder):
    """The .pt files that `code` names, in `folder`: a tiny encoder (a ResNet-18 where it names that class), or
    a tiny classifier."""
    for name in sorted(set(re.findall(r"""["']([\w./-]+\.pt)["']""", code))):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        arch = "resnet18" if "resnet18" in code else "slim"
        encoder = encoders.make(arch, ("clean", "adv"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        with torch.no_grad(), resnet.branch(encoder, "adv"):
            encoder(torch.rand(4, 3, 32, 32))  # statistics
        encoders.export(encoder, folder / "made.pt", "adv", image_size=32)
        if "classifier" in path.name:
            encoder = encoders.load_encoder(folder / "made.pt")
            results.save_classifier(finetune.Classifier(encoder, 4), path)
        else:
            (folder / "made.pt").rename(path)


def run_blocks(file):
    """Run the Python blocks of `file` one after the other, as a reader would, in the current folder. Returns
    the names that they leave behind."""
    left = {"__name__": "__main__"}
    blocks = list(python_blocks(file.read_text()))
    for line, code in blocks:
        make_files(code, pathlib.Path.cwd())
        exec(compile("\n" * (line - 1) + code, str(file), "exec"), left)
    return left


def with_blocks():
    return [str(file.relative_to(ROOT)) for file in markdown_files() if any(python_blocks(file.read_text()))]


@pytest.mark.parametrize("name", with_blocks())
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / name)


def test_python_blocks_are_all_found():
    assert "docs/evaluation.md" in with_blocks()
    for text in PAGES.values():
        assert len(list(python_blocks(text))) == len(re.findall(r"^ *```(?:python|py)\b", text, re.M))


def test_an_encoder_loads_without_this_repository(tmp_path, monkeypatch):
    """The lines of docs/evaluation.md, run: features as `load_encoder` has them, of any batch."""
    monkeypatch.chdir(tmp_path)
    here = run_blocks(ROOT / "docs" / "evaluation.md")
    net, mean, std, x = here["net"], here["mean"], here["std"], torch.rand(5, 3, 32, 32)
    encoder = encoders.load_encoder("runs/amoc/encoder.pt")
    with torch.no_grad():
        torch.testing.assert_close(net((x - mean) / std), encoder(x))
        torch.testing.assert_close(here["features"], encoder(here["x"]))


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update({"layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}), "Unexpected key"),
    (lambda state: state.pop("layer4.1.bn2.running_var"), "Missing key")], ids=["ResNet-34", "incomplete"])
def test_the_readmes_lines_refuse_another_architecture(change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for _, code in python_blocks(PAGES["docs/evaluation.md"]) if "torchvision" in code]
    make_files(code, tmp_path)
    (path,) = tmp_path.glob("**/*.pt")
    saved = torch.load(path, weights_only=True)
    change(saved["state"])
    torch.save(saved, path)
    with pytest.raises(RuntimeError, match=words):
        exec(code, {})
