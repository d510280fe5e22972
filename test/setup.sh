# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
# Finds or installs a Python that can run this project. To be sourced.

set -euo pipefail
set +o posix # sh may be bash

# Bash cannot trap a signal that was ignored when it started, as SIGINT is in a background job of another script.
if [ "$(trap -p INT)" = "trap -- '' SIGINT" ] && env --default-signal=INT true 2>/dev/null; then
    exec env --default-signal=INT bash "$0" "$@"
fi

fail() { # message, exit code (2)
    echo "$(basename "$0"): error: $1" >&2
    exit "${2:-2}"
}

# LC_ALL=C: with a German locale, say, awk and printf would expect and print 4,5 instead of 4.5.

# Prints the GB (10^9 bytes) that are free for the repository; nothing if df cannot tell.
free_gb() {
    df -Pk "${repository:?}" 2>/dev/null | LC_ALL=C awk 'NR > 1 { printf "%.1f", $4 * 1024 / 1e9 }' || true
}

# Says what is going to be written, and exits with code 2 if it does not fit.
require_space() { # GB, what for
    local free
    free=$(free_gb)
    echo "=> up to $1 GB of disk for $2; ${free:-?} GB are free"
    if LC_ALL=C awk -v free="${free:-$1}" -v needed="$1" 'BEGIN { exit !(free < needed) }'; then
        fail "$repository: $free GB are free, $1 GB are needed: free some space, or move the repository to a larger disk"
    fi
}

# Whether a Python runs this code without an error. Without the variable, torch 2.5 and later load torch_npu on import,
# which fails if CANN is not installed.
python_can() { # python, code
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$1" -c "$2" 2>/dev/null
}

# Importing torchvision fails if its operators were built for another torch.
torch_works() { # python
    python_can "$1" 'import torch, torchvision, PIL; torch.ones(2).sum().numpy()'
}

# Sets `python`: PYTHON if it is set, else the active one if its torch works, as in an Ascend or CUDA image, where
# nothing must be replaced, else that of .venv. Returns 1 if no torch works.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$(realpath -s -- "$(command -v "$PYTHON")" 2>/dev/null) || fail "PYTHON=$PYTHON: no such program"
        return
    fi
    for python in "$(command -v python3 || command -v python)" "${repository:?}/.venv/bin/python"; do
        if torch_works "$python"; then return; fi
    done
    return 1
}

# Sets `python`, and installs requirements.txt into .venv if no torch works. Exits with code 2 if the disk is too small.
set_up_python() { # GB that the caller is going to write, what for
    local candidate venv=$repository/.venv
    if find_python; then
        if [ "$1" != 0 ]; then require_space "$1" "$2"; fi
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            # 6 GB stay. While pip installs, the archives are there too, 3 GB.
            require_space $(($1 > 3 ? 6 + $1 : 9)) "torch with CUDA in $venv${2:+, and for $2}"
            echo "=> installing requirements.txt into $venv: about 3 GB to download, a few minutes"
            if ! command -v nvidia-smi >/dev/null; then
                echo "=> no NVIDIA GPU is found: docs/troubleshooting.md shows how to install torch without CUDA, a few hundred MB"
            fi
            "$candidate" -m venv "$venv"
            "$python" -m pip install --disable-pip-version-check -r "$repository/requirements.txt" ||
                fail "pip failed, see above; the same command tries again" 1
            torch_works "$python" || fail "torch in $venv cannot be imported" 1
            return
        fi
    done
    fail "requires Python 3.10 or later with the venv module (on Debian: apt-get install python3-venv)" 1
}
