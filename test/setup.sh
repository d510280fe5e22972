# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
# shellcheck disable=SC2154
# Sets `python` to one that runs this project, for quickstart.sh and run_tests.sh. Sourced; fit to be run again.

# Whether `python` runs a line without an error. (torch 2.5 and later would load torch_npu by itself, and fail without CANN.)
python_can() { # python, line
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$1" -c "$2" 2>/dev/null
}

# A python whose torch and torchvision work: both load, and torchvision's own operators fit this torch.
torch_works() { # python
    python_can "$1" 'import torch, torchvision, PIL, numpy; torch.ones(2).sum()'
}

# The active python where its torch works (an Ascend or CUDA image: nothing of it is replaced), else .venv and
# requirements.txt.
set_up_python() {
    local active candidate
    active=$(command -v python3 || command -v python || true)
    if [ -n "$active" ] && torch_works "$active"; then
        python=$active
        return
    fi
    python=$repository/.venv/bin/python
    if [ -x "$python" ] && torch_works "$python"; then return; fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; then
            echo "=> installing torch and the rest of requirements.txt into $repository/.venv (a few minutes)"
            "$candidate" -m venv "$repository/.venv"
            "$python" -m pip install --quiet --disable-pip-version-check -r "$repository/requirements.txt"
            torch_works "$python" || { echo "error: torch in $repository/.venv does not load" >&2; exit 1; }
            return
        fi
    done
    echo "error: Python 3.10 or later with its venv module is needed (on Debian: apt-get install python3-venv)" >&2
    exit 1
}
