# SPDX-License-Identifier: BSD-3-Clause
"""The rules of the house that a machine can check: imports run down, files stay small, tests stand alone."""

from __future__ import annotations

import ast
import os

from helpers.program import REPOSITORY

SCRIPTS = ["main", "predict", "export"]
ENGINE = os.path.join(REPOSITORY, "engine")
MAX_LINES = 350  # of an engine file: about 300, and none grows past this unnoticed


def parse(path: str) -> ast.Module:
    with open(path, encoding="utf-8") as file:
        return ast.parse(file.read())


def python_files(*folders: str) -> list[str]:
    found = []
    for folder in folders:
        for name in sorted(os.listdir(os.path.join(REPOSITORY, folder))):
            if name.endswith(".py"):
                found.append(os.path.join(REPOSITORY, folder, name))
    return found


def imports(path: str) -> set[str]:
    """The modules that a file imports anywhere in it, as full names."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = {f"engine.{os.path.basename(path)[:-3]}": path for path in python_files("engine")}
ARROWS = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}


def test_engine_imports_no_script():
    for name, path in MODULES.items():
        roots = {module.partition(".")[0] for module in imports(path)}
        assert not roots & {*SCRIPTS, "tools", "bench", "helpers"}, name


def test_scripts_tools_and_benchmarks_do_not_use_the_training_script_as_a_library():
    for path in [os.path.join(REPOSITORY, f"{name}.py") for name in ("predict", "export", "vgg")]:
        assert not set(SCRIPTS) & imports(path), path
    for path in python_files("tools", "bench"):
        assert "main" not in imports(path), path


def test_engine_has_no_circular_imports():
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(ARROWS[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_files_stay_small():
    sizes = {}
    for path in [*python_files("engine", "."), *python_files("tools", "bench")]:
        with open(path, encoding="utf-8") as file:
            sizes[os.path.relpath(path, REPOSITORY)] = len(file.readlines())
    assert sizes["main.py"] <= 520, sizes["main.py"]
    for path, lines in sizes.items():
        if path not in ("main.py", os.path.join("engine", "flags.py")):  # flags.py is a plain list
            assert lines <= MAX_LINES, (path, lines)


def test_a_process_is_ended_in_one_place():
    callers = []
    for path in python_files("engine", ".", "tools", "bench"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr == "_exit":
                callers.append(os.path.relpath(path, REPOSITORY))
    assert callers == [os.path.join("engine", "errors.py")]


def test_no_test_file_imports_another():
    for path in python_files("test/unit"):
        assert not [name for name in imports(path) if name.startswith("test_") or name == "conftest"], path
