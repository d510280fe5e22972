# SPDX-License-Identifier: BSD-3-Clause
"""The rules of the house that a machine can check: imports run down and through faces, and main.py tells the story."""

from __future__ import annotations

import ast
import os
import re
import sys
from typing import Iterator

from engine.records import run_info

from helpers.program import REPOSITORY

import pytest

pytestmark = [pytest.mark.once, pytest.mark.skipif(sys.version_info < (3, 9), reason="ast.unparse requires Python 3.9")]

SCRIPTS = ["main", "predict", "export", "vgg"]
GROUND = ["errors", "versions", "console", "signals", "safe_pickle", "parser"]
WINGS = ["device", "data", "parallel", "records"]
ABOVE = {"checkpoints": WINGS, "evaluation": WINGS, "options": [*WINGS, "checkpoints", "evaluation"]}
PACKAGES = [*WINGS, *ABOVE]
MAX_NAMES = 12  # of a face
MAX_LINES = 350  # of a file: about 300, and none grows past this unnoticed


def python_files(*folders: str) -> list[str]:
    """The files below these folders, relative to the repository, with all of their sub-folders."""
    found = []
    for folder in folders:
        for path, _, names in os.walk(os.path.join(REPOSITORY, folder)):
            found += [os.path.relpath(os.path.join(path, name), REPOSITORY) for name in names if name.endswith(".py")]
    return sorted(found)


def parse(path: str) -> ast.Module:
    with open(os.path.join(REPOSITORY, path), encoding="utf-8") as file:
        return ast.parse(file.read())


ENGINE = python_files("engine")
PRODUCT = [*ENGINE, *(f"{name}.py" for name in SCRIPTS)]


def module_name(path: str) -> str:
    """engine/data/loader.py is engine.data.loader, engine/data/__init__.py is engine.data."""
    return path[:-3].replace(os.sep, ".").replace(".__init__", "")


MODULES = {module_name(path): path for path in [*ENGINE, *python_files("tools", "bench"), *PRODUCT[len(ENGINE) :]]}


def imports(path: str) -> Iterator[tuple[str, str]]:
    """(module, name) of what a file imports anywhere in it; of a module as a whole: (module, "")."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in MODULES else (node.module, alias.name)


def package_of(module: str) -> str:
    """data of engine.data.loader and of engine.data; errors of engine.errors; main of main."""
    parts = module.split(".")
    return parts[1] if parts[0] == "engine" and len(parts) > 1 else parts[0]


# --- which way imports go ---------------------------------------------------------------------------------------------


def test_the_files_of_all_packages_are_found():
    assert {package_of(module_name(path)) for path in ENGINE} == {"engine", *GROUND, *PACKAGES}
    assert len(ENGINE) > 25


@pytest.mark.parametrize("path", PRODUCT)
def test_imports_run_down(path):
    package = package_of(module_name(path))
    allowed = set(GROUND) | {package}
    if package == "vgg":
        allowed = {"vgg"}
    elif package in ABOVE:
        allowed |= {*ABOVE[package], "vgg"}
    elif package in ("main", "predict", "export"):
        allowed |= {*PACKAGES, "vgg"}
    used = {package_of(module) for module, _ in imports(path) if module.split(".")[0] in ("engine", *SCRIPTS)}
    assert used - {"engine"} <= allowed, used - allowed


# Two tools need single parts: shrink.py the decoder, docs_figures.py the digits.
@pytest.mark.parametrize("path", [*PRODUCT, *python_files("bench"), os.path.join("tools", "sort_imagenet_val.py")])
def test_a_package_is_used_through_its_face(path):
    own = package_of(module_name(path))
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] == "engine" and len(parts) > 2 and parts[1] != own:
            face = parse(os.path.join("engine", parts[1], "__init__.py"))
            modules = {
                alias.name for node in ast.walk(face) if isinstance(node, ast.ImportFrom) for alias in node.names
            }
            assert name == "" and parts[2] in modules, f"{module} {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_face_hands_few_names_on_and_holds_no_code(package):
    face = parse(os.path.join("engine", package, "__init__.py"))
    (names,) = [node.value for node in face.body if isinstance(node, ast.Assign)]
    exported = ast.literal_eval(names)
    imported = [alias.name for node in ast.walk(face) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(exported) == exported == sorted(imported)
    assert 1 <= len(exported) <= MAX_NAMES
    assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)) for node in face.body)


def test_there_are_no_circular_imports():
    arrows = {
        name: {module for module, _ in imports(path) if module in MODULES and module != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


NOUNS = "images|steps|nodes|devices|epochs|files|cores|workers|classes|processes|batches"
PLURAL = re.compile(rf" (?:\w+ )?(?:{NOUNS})\b(?!/)")


@pytest.mark.parametrize("path", [*ENGINE, "main.py"])
def test_no_line_can_say_1_images(path):
    for text in ast.walk(parse(path)):
        if isinstance(text, ast.JoinedStr):
            for number, words in zip(text.values, text.values[1:]):
                if isinstance(number, ast.FormattedValue) and isinstance(words, ast.Constant):
                    is_fixed = ast.unparse(number.value).split(".")[-1].isupper()  # a constant, above 1
                    assert is_fixed or not PLURAL.match(words.value), f"use counted() of engine.errors: {words.value}"


def test_tools_and_benchmarks_do_not_use_the_training_script_as_a_library():
    for path in python_files("tools", "bench"):
        assert "main" not in {module for module, _ in imports(path)}, path


def test_no_test_file_imports_another():
    for path in python_files(os.path.join("test", "unit"), os.path.join("test", "run")):
        names = {module for module, _ in imports(path)}
        assert not [name for name in names if name.startswith("test_") or name == "conftest"], path


@pytest.mark.parametrize("path", [path for path in ENGINE if not path.endswith("__init__.py")])
def test_every_module_of_the_engine_has_a_test_file_of_its_name(path):
    name = f"test_{os.path.basename(path)}"
    assert any(os.path.exists(os.path.join(REPOSITORY, "test", kind, name)) for kind in ("unit", "run"))


STARTING = {"run", "run_main", "run_python", "run_script", "start_main", "train_classifier", "strace", "namespaces"}


def test_unit_tests_start_no_program():
    for path in python_files(os.path.join("test", "unit")):
        used = [name for module, name in imports(path) if module == "subprocess" or module.startswith("helpers")]
        assert not STARTING.intersection(used), path
        assert "subprocess" not in {module for module, _ in imports(path)}, path


# --- main.py tells the story ------------------------------------------------------------------------------------------


def test_main_imports_few_names_from_few_modules():
    ours = [(module, name) for module, name in imports("main.py") if module.split(".")[0] in ("engine", "vgg")]
    assert len(ours) <= 30, ours
    assert len({module for module, _ in ours}) <= 11, ours


def test_main_calls_what_a_user_of_pytorch_looks_for():
    called = {ast.unparse(node.func) for node in ast.walk(parse("main.py")) if isinstance(node, ast.Call)}
    expected = {"DataLoader", "torch.optim.SGD", "DistributedDataParallel", "open_datasets", "learning_rate"}
    assert expected <= called and any(name.endswith("autocast") for name in called)


COMMAND_LINE = (os.path.join("engine", "options"), os.path.join("engine", "parser.py"))  # where args come from


@pytest.mark.parametrize("path", [path for path in ENGINE if not path.startswith(COMMAND_LINE)])
def test_functions_take_the_values_they_use(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            names = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
            assert "args" not in names, f"{path}:{node.lineno}"


# --- size, and what stands in one place -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PRODUCT, *python_files("tools", "bench")])
def test_files_stay_small(path):
    with open(os.path.join(REPOSITORY, path), encoding="utf-8") as file:
        assert len(file.readlines()) <= (530 if path == "main.py" else MAX_LINES)


@pytest.mark.parametrize("path", PRODUCT)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            last = max(getattr(child, "lineno", 0) for child in ast.walk(node))
            assert last - node.lineno < 65, f"{path}: {node.name}"


def test_one_module_prints_and_ends_processes():
    for path in PRODUCT:
        for node in ast.walk(parse(path)):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            if name in ("print", "os._exit", "sys.stderr.write", "sys.stdout.write"):
                assert path == os.path.join("engine", "console.py"), f"{path}:{node.lineno} {name}"


def test_the_program_checksum_covers_every_file():
    root = os.path.dirname(os.path.abspath(run_info.__file__))
    files = {os.path.relpath(path, os.path.join(root, "..", "..")) for path in run_info.program_files()}
    assert {path for path in PRODUCT if path.endswith(".py")} <= files
