# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
# Finds or installs a Python that can run this project. To be sourced.

set -euo pipefail

# Whether a Python runs this code without an error. Without the variable, torch 2.5 and later load torch_npu on import,
# which fails if CANN is not installed.
python_can() { # python, code
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$1" -c "$2" 2>/dev/null
}

# Importing torchvision fails if its operators were built for another torch.
torch_works() { # python
    python_can "$1" 'import torch, torchvision, PIL, numpy; torch.ones(2).sum()'
}

# Sets `python`: the active one if its torch works, as in an Ascend or CUDA image, where nothing must be replaced;
# else the one in .venv, where requirements.txt is installed if necessary.
set_up_python() {
    local active candidate venv=${repository:?}/.venv
    active=$(command -v python3 || command -v python || true)
    if [ -n "$active" ] && torch_works "$active"; then
        python=$active
        return
    fi
    python=$venv/bin/python
    if [ -x "$python" ] && torch_works "$python"; then return; fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "=> installing torch and the rest of requirements.txt into $venv (a few minutes)"
            "$candidate" -m venv "$venv"
            "$python" -m pip install --quiet --disable-pip-version-check -r "$repository/requirements.txt"
            torch_works "$python" || { echo "error: torch in $venv cannot be imported" >&2; exit 1; }
            return
        fi
    done
    echo "error: requires Python 3.10 or later with the venv module (on Debian: apt-get install python3-venv)" >&2
    exit 1
}
