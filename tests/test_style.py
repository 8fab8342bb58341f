"""What makes a script readable and pasteable, as far as a machine sees it."""
import argparse
import ast
import builtins
import dis
import importlib
import inspect
import re
import types

import pytest

from tests.scripts import ROOT, SCRIPTS

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py"), *(ROOT / "evaluation").glob("*.py")])
SAYS_WHOSE = r"\((paper|authors' code|ours|BYOL's|MAE's|paper has both|paper; [^()]*)\)$"
HOUSEKEEPING = {"data", "data_dir", "limit", "arch", "out", "seed", "device", "workers", "compile", "graph",
                "sync_bn", "save_every", "help"}


def calls(node):
    return sum(isinstance(value, ast.Call) for value in node.elts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_one_statement_stands_on_a_line(path):
    """No pairs as statements, no generators unpacked, no two calls in one assignment."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)), where
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert not isinstance(node.value, ast.GeneratorExp), where
            assert not (isinstance(node.value, ast.Tuple) and calls(node.value) > 1), where


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_whatever_is_imported_is_used(path):
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {(name.asname or name.name).split(".")[0] for node in imports for name in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names - used, f"{path.name} imports {sorted(names - used)} and uses it nowhere"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_no_lambdas_and_one_order(script):
    source = (ROOT / f"{script}.py").read_text()
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Lambda)]
    order = ["def augment(", "def embed(", "def attack(", "def train_step(", "def lr_at(", "# The run\n",
             "def parser(", "def network(", "def attack_settings(", "def pictures(", "def main("]
    places = [source.index(part) for part in order if part in source]
    assert places == sorted(places) and len(places) >= 7


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_default_says_whose_it_is(script):
    parser = importlib.import_module(script).parser()
    for action in parser._actions:
        if action.dest in HOUSEKEEPING | {"image_size", "stem", "teacher", "random_start"}:
            continue
        assert action.help and re.search(SAYS_WHOSE, action.help), f"--{action.dest}: {action.help}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_every_default_that_is_a_number_or_a_word(script):
    parser = importlib.import_module(script).parser()
    shown = "".join(parser.format_help().split())
    for action in parser._actions:
        value = action.default
        if isinstance(value, bool) or value in (None, argparse.SUPPRESS, []):
            continue
        value = " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else value
        (line,) = parser._get_formatter()._expand_help(action).splitlines()
        assert line.count("default") == 1 and f"default {value}" in line.replace("default: ", "default "), line
        assert "".join(line.split()) in shown


OWNERS = r"\((?:paper|authors' code|ours|BYOL's|MAE's)[^()]*\)"


@pytest.mark.parametrize("script", SCRIPTS)
def test_where_a_help_names_several_owners_the_last_is_that_of_the_default(script):
    """It is printed before the last bracket: what has another owner is named before that, and the default's name
    after it. A rate without a name is that of the default optimizer."""
    parser = importlib.import_module(script).parser()
    optimizers = [action for action in parser._actions if action.dest == "optimizer"]
    for action in parser._actions:
        *others, own = re.split(OWNERS, action.help or "")[:-1] or [""]
        if not others or action.default is None or isinstance(action.default, bool):
            continue
        (named,) = optimizers if action.dest == "lr" else [action]
        assert named.choices, (f"--{action.dest}: two owners in brackets, though it has no choices; name the other "
                               f"one without brackets: {action.help}")
        for name in named.choices:
            there = re.search(rf"\b{name}\b", own) is not None
            before = re.search(rf"\b{name}\b", " ".join(others)) is not None
            assert (there, before) == (name == named.default, name != named.default), f"--{action.dest} {name}: {action.help}"


@pytest.mark.parametrize("program", ["eval", "plot"])
def test_help_names_no_default_that_is_empty(program):
    parser = importlib.import_module(program).parser()
    shown = [parser._get_formatter()._expand_help(action) for action in parser._actions if action.help]
    assert not [text for text in shown if text.rstrip().endswith("default")]


def method_of(script):
    """The names that a script's method defines: all up to the banner of the run, executed alone."""
    source = (ROOT / f"{script}.py").read_text()
    banner = source.index("# " + "-" * 106 + "\n# The run\n")
    space = {"__name__": "pasted"}
    exec(compile(source[:banner], f"{script}.py", "exec"), space)
    return space


def names_of(code):
    """Global names that a function's code, and that of functions in it, reads."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_of(constant)
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_method_runs_cut_out_of_its_script_and_takes_what_it_uses_by_name(script):
    """From the first import to the last schedule it needs nothing that stands below, and no args object."""
    space = method_of(script)
    functions = [inspect.unwrap(value) for value in space.values() if inspect.isfunction(value)]
    functions = [value for value in functions
                 if inspect.isfunction(value) and value.__code__.co_filename == f"{script}.py"]
    assert {"train_step", "lr_at"} <= {function.__name__ for function in functions}
    for function in functions:
        missing = names_of(function.__code__) - space.keys() - set(dir(builtins))
        assert not missing, f"{function.__name__} needs {missing}"
        assert "args" not in inspect.signature(function).parameters, function.__name__
