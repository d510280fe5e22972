#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Runs the tests, setting up what they need: on this machine's torch, then on torch 1.8 and 1.5 where Python 3.8 and 3.7
# are found. Ends with a table of what ran. Further words go to pytest: bash test/run_tests.sh -k checkpoint
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
cd "$repository"
table=() code=0

add_pytest() { # python, folder of a virtual environment to put it into where this python may not be touched
    if "$1" -c 'import pytest, xdist' 2>/dev/null; then python=$1; return; fi
    python=$1
    case $1 in
        "$2"/*) ;;
        *) "$1" -m venv --system-site-packages "$2"; python=$2/bin/python ;;
    esac
    "$python" -m pip install --quiet --disable-pip-version-check pytest pytest-xdist
}

# A python of that version: on the PATH, or pyenv's.
find_version() { # 3.8
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$1".*/bin/python; do
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then echo "$candidate"; return; fi
    done
}

run_tests() { # python, words for pytest
    local name log
    name=$("$1" -c 'import platform, torch; print("torch", torch.__version__, " Python", platform.python_version())')
    echo "=> $name"
    log=$(mktemp)
    # Two tests at a time, each on its half of the cores (conftest.py): most of a test is one thread that imports torch.
    "$1" -m pytest -q -rs -n 2 --dist worksteal "${@:2}" test/unit 2>&1 | tee "$log" || code=1
    table+=("$name: $(tail -n 1 "$log")")
    rm -f "$log"
}

set_up_python
add_pytest "$python" "$repository/.venv"
run_tests "$python" "$@"
for versions in '1.8 3.8' '1.5 3.7'; do
    read -r torch_version python_version <<<"$versions"
    venv=$repository/.venv-$torch_version
    if [ ! -x "$venv/bin/python" ]; then
        found=$(find_version "$python_version")
        if [ -z "$found" ]; then
            table+=("torch $torch_version: skipped, there is no Python $python_version with venv")
            continue
        fi
        echo "=> installing ${torch_version}_requirements.txt into $venv"
        "$found" -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "${torch_version}_requirements.txt" pytest pytest-xdist
    run_tests "$venv/bin/python" "$@"
done

echo
printf '%s\n' "${table[@]}"
exit $code
