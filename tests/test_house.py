"""The house: which room may import which, and how much of what made the first house hard to change is left."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("core", "kernels", "planning", "passes", "routes", "quality", "report", "engines", "")
"""Lower floors know nothing of higher ones; ``""`` is the front door. Besides, passes and kernels do not meet."""


@dataclass(frozen=True)
class Import:
    """One module of ours that another one imports; ``function`` is where, if not at the top."""

    importer: str
    imported: str
    line: int
    function: str | None


def modules() -> dict[str, Path]:
    """The name of every module of ours, below express_compile, and its file."""
    found = {}
    for top in ("express_compile", "kernels", "passes"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT / top if top == "express_compile" else ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def statements(path: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, str | None]]:
    """Every import statement with the function that it is in; those for type checkers alone are left out."""

    def walk(node: ast.AST, function: str | None) -> Iterator[tuple[ast.Import | ast.ImportFrom, str | None]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield child, function
            elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield from walk(child, child.name if is_function else function)

    return walk(ast.parse(path.read_text(encoding="utf-8")), None)


def imports() -> Iterator[Import]:
    for name, path in MODULES.items():
        package = ["express_compile", *filter(None, name.split("."))]
        if path.name != "__init__.py":
            package.pop()
        for node, function in statements(path):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
                module = ".".join(filter(None, (base, node.module)))
                inner = [f"{module}.{alias.name}" for alias in node.names]
                targets = [x if x.removeprefix("express_compile.") in MODULES else module for x in inner]
            for target in dict.fromkeys(targets):
                if target == "express_compile" or target.startswith("express_compile."):
                    yield Import(name, target.removeprefix("express_compile").lstrip("."), node.lineno, function)


IMPORTS = tuple(imports())


def room(module: str) -> str:
    top = module.split(".")[0]
    return top if top in FLOORS else ""


def test_imports_go_down() -> None:
    up = [x for x in IMPORTS if FLOORS.index(room(x.imported)) > FLOORS.index(room(x.importer))]
    assert not [x for x in up if x.importer]


def test_passes_and_kernels_do_not_import_each_other() -> None:
    assert not [x for x in IMPORTS if {room(x.importer), room(x.imported)} == {"passes", "kernels"}]


def test_kernels_and_planning_do_not_import_each_other() -> None:
    assert not [x for x in IMPORTS if {room(x.importer), room(x.imported)} == {"planning", "kernels"}]


def test_no_circle_of_modules_not_even_through_functions() -> None:
    graph = {name: {x.imported for x in IMPORTS if x.importer == name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_imports_inside_of_functions_are_few_and_have_a_reason() -> None:
    found, silent = [], []
    for name, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node, function in statements(path):
            if function is not None:
                found.append(f"{name}:{node.lineno} {function}")
                if not any("#" in line for line in lines[max(0, node.lineno - 2) : node.end_lineno]):
                    silent.append(found[-1])
    assert not silent
    assert len(found) <= 12, found


def test_few_functions_take_more_than_eight_arguments() -> None:
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                if len(arguments) > 8:
                    found.append(f"{name}.{node.name}: {len(arguments)}")
    assert len(found) <= 10, found


def test_the_checks_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Import("core.spec", "routes.compile", 1, None)
    monkeypatch.setitem(globals(), "IMPORTS", (*IMPORTS, wrong, Import("routes.compile", "core.spec", 1, "f")))
    for check in (test_imports_go_down, test_no_circle_of_modules_not_even_through_functions):
        with pytest.raises(AssertionError):
            check()
