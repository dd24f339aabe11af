"""The rooms of the package import each other in one direction, without circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import captum_cw

PACKAGE = Path(captum_cw.__file__).parent
NAME = PACKAGE.name

#: For each room, the rooms that it may import.
ALLOWED = {
    "_utils": set(),
    "kernels": set(),
    "measures": set(),
    "weights": {"_utils"},
    "products": {"kernels", "weights"},
    "functional": {"products", "weights"},
    "rollout": {"functional", "products", "weights"},
    "capture": {"functional", "weights", "_utils"},
    "text": {"capture", "functional", "weights", "_utils"},
    "attr": {"capture", "text", "rollout", "functional", "_utils"},
    "removal": {"attr", "capture", "measures", "functional", "weights", "_utils"},
    "visualization": {"text", "_utils"},
    "explanation": {"attr", "capture", "data", "text", "measures", "functional", "_utils"},
    "metrics": {"removal", "attr", "capture", "measures", "functional", "_utils"},
    "models": {"capture", "functional", "_utils"},
    "data": {"text", "functional", "_utils"},
    "analysis": {
        *("metrics", "removal", "attr", "capture", "measures", "functional", "products"),
        *("weights", "visualization", "_utils"),
    },
    "reproduce": {
        *("analysis", "metrics", "removal", "attr", "capture", "measures", "functional"),
        *("data", "models", "visualization", "_utils"),
    },
}
#: The modules that a result may import inside a function, to draw itself.
FIGURES = {"visualization", "explanation.page", "analysis.figures"}
#: The module that needs Triton, which not every machine has.
OPTIONAL = {"kernels"}


def modules() -> dict[str, Path]:
    """Return the files of the package by module name, without the name of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the modules of the package that a file imports, and whether inside a function."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == NAME:
                module = (child.module or "").removeprefix(NAME).removeprefix(".")
                for alias in child.names:
                    whole = f"{module}.{alias.name}".removeprefix(".")
                    yield (whole if whole in modules() else module), inside
            yield from visit(child, inside or isinstance(child, ast.FunctionDef))

    return visit(ast.parse(path.read_text("utf-8")), inside=False)


def room(module: str) -> str:
    return module.partition(".")[0]


def test_rooms_import_only_rooms_below_them() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules().items()
        if room(module) in ALLOWED
        for name, inside in imports(path)
        if room(name) not in (ALLOWED[room(module)] | {room(module), "", "_version"})
        and not (inside and any(name.startswith(figure) for figure in FIGURES))
    ]
    assert wrong == []
    assert {room(module) for module in modules()} - ALLOWED.keys() == {
        *("", "__main__", "_version", "cli"),
    }


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in modules().items():
        if module:  # the package itself imports its names lazily
            targets = {name for name, inside in imports(path) if not inside and name}
            # Importing a module also imports the packages that contain it.
            around = {name.rpartition(".")[0] for name in targets if "." in name}
            around = {name for name in around if not module.startswith(name)}
            graph[module] = targets | around
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_figures_and_kernels_alone_are_imported_inside_functions() -> None:
    hidden = {
        f"{module} imports {name}"
        for module, path in modules().items()
        if room(module) != "cli"  # its help must not wait for torch
        for name, inside in imports(path)
        if inside and not any(name.startswith(later) for later in FIGURES | OPTIONAL)
    }
    assert hidden == set()


def test_functions_classes_and_modules_stay_small() -> None:
    large = {}
    for module, path in modules().items():
        text = path.read_text("utf-8")
        lines = len(text.splitlines())
        if lines > 600 and module != "functional":
            large[module] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                size = _lines(node)
                if size > (60 if isinstance(node, ast.FunctionDef) else 300):
                    large[f"{module}.{node.name}"] = size
    assert large == {}


def _lines(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Count the lines of a definition, without its docstring."""
    first = node.body[0]
    docstring = 0
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        docstring = (first.end_lineno or 0) - first.lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - docstring
