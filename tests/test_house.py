"""Which modules a module may import."""

import ast
from graphlib import TopologicalSorter

from helpers.models import ROOT

DIRECTORIES = {"store", "engine", "show"}
MODEL = {"gpt2", "sampling", "encoder", "utils", "backprop", "optimizer", "bigram"}
COMMANDS = {"train", "evaluate", "lens", "bench", "export"}
PATHS = [path for folder in (".", *DIRECTORIES) for path in sorted((ROOT / folder).glob("*.py"))]
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8") for path in PATHS}


def imports_of(node, in_main=False):
    """Yield each of the project's modules that is imported below `node`, and whether that is in the main part."""
    for child in ast.iter_child_nodes(node):
        test = ast.unparse(child.test) if isinstance(child, ast.If) else ""
        if "TYPE_CHECKING" in test:
            continue
        names = [alias.name for alias in child.names] if isinstance(child, (ast.Import, ast.ImportFrom)) else []
        if isinstance(child, ast.ImportFrom):
            names = [child.module, *(f"{child.module}.{name}" for name in names)]
        yield from ((name, in_main) for name in names if name in SOURCES)
        is_main = "__main__" in test or (isinstance(child, ast.FunctionDef) and child.name == "main")
        yield from imports_of(child, in_main or is_main)


IMPORTS = {name: set(imports_of(ast.parse(source))) for name, source in SOURCES.items()}


def test_imports_form_no_circle():
    assert {"gpt2", "store.models", "engine.int8"} <= IMPORTS.keys()
    list(TopologicalSorter({name: {other for other, _ in found} for name, found in IMPORTS.items()}).static_order())


def test_each_directory_imports_only_what_it_may():
    assert {name for name in SOURCES if "." not in name} == MODEL | COMMANDS
    allowed = {"store": {"store"}, "engine": {"engine", "store"}, "show": MODEL | DIRECTORIES}
    allowed |= dict.fromkeys(MODEL, MODEL | DIRECTORIES) | dict.fromkeys(COMMANDS, MODEL | DIRECTORIES | COMMANDS)
    for name, found in IMPORTS.items():
        top, others = name.split(".")[0], {(other.split(".")[0], in_main) for other, in_main in found}
        assert {other for other, _ in others} <= allowed[top], name
        assert top not in MODEL or ("show", False) not in others, f"{name} imports show before its main part"
