# SPDX-License-Identifier: BSD-3-Clause
"""Builds backend.cpp for the installed torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess

import torch

FOLDER = os.path.dirname(os.path.abspath(__file__))


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(cache: str) -> str:
    """Return the path of the library in the folder `cache`, built unless this torch and this source have built it."""
    from torch.utils.cpp_extension import include_paths, library_paths

    source = os.path.join(FOLDER, "backend.cpp")
    command = [str(find_compiler()), "-std=c++20", "-O0", "-w", "-fPIC", "-shared", source]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    with open(source, "rb") as file:
        what = f"{torch.__version__} {torch.version.git_version} {command}".encode() + file.read()
    library = os.path.join(cache, f"backend-{hashlib.sha256(what).hexdigest()[:16]}.so")
    if not os.path.exists(library):
        temporary = f"{library}.{os.getpid()}"
        subprocess.run([*command, "-o", temporary], check=True, timeout=600)
        os.replace(temporary, library)
    return library
