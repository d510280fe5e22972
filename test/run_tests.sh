#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Runs linters and tests, and installs what they need: on this machine's torch, then on torch 1.8 and 1.5 if Python 3.8
# and 3.7 are found. Ends with a table of the results. Arguments go to pytest: bash test/run_tests.sh -k checkpoint
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
repository=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
cd "$repository"
table=() code=0

pip_install() { # python, arguments of pip install
    "$1" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

# Sets `python` to one that has requirements-dev.txt too: an active one is not touched, .venv builds on it instead.
add_dev_tools() {
    case $python in
        "$repository"/.venv/*) ;;
        *)
            "$python" -m venv --system-site-packages "$repository/.venv"
            python=$repository/.venv/bin/python
            ;;
    esac
    pip_install "$python" -r requirements-dev.txt
}

find_version() { # 3.8: prints a Python of that version, on the PATH or pyenv's
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$1".*/bin/python; do
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

lint() { # command
    echo "=> $*"
    if "$@"; then table+=("$1 $2: passed"); else table+=("$1 $2: FAILED") code=1; fi
}

run_linters() {
    local bin scripts
    bin=$(dirname "$python")
    PATH=$bin:$PATH
    mapfile -t scripts < <(find test .ci -name '*.sh' -o -path .ci/run -o -name '*.sbatch')
    lint ruff check .
    lint ruff format --check .
    lint mypy --no-error-summary
    lint shellcheck -x "${scripts[@]}"
}

run_tests() { # python, arguments of pytest
    local name log
    name=$("$1" -c 'import platform, torch; print("torch", torch.__version__, " Python", platform.python_version())')
    echo "=> $name"
    log=$(mktemp)
    # Two tests at a time, each on half of the cores (conftest.py): a test is mostly one thread that imports torch.
    "$1" -m pytest -q -rs -n 2 --dist worksteal "${@:2}" 2>&1 | tee "$log" || code=1
    table+=("$name: $(tail -n 1 "$log")")
    rm -f "$log"
}

set_up_python 0 ''
add_dev_tools
run_linters
run_tests "$python" "$@"
for versions in '1.8 3.8' '1.5 3.7'; do
    read -r torch_version python_version <<<"$versions"
    venv=$repository/.venv-$torch_version
    if [ ! -x "$venv/bin/python" ]; then
        found=$(find_version "$python_version")
        if [ -z "$found" ]; then
            table+=("torch $torch_version: skipped, no Python $python_version with venv was found")
            continue
        fi
        echo "=> installing ${torch_version}_requirements.txt into $venv"
        "$found" -m venv "$venv"
    fi
    pip_install "$venv/bin/python" -r "${torch_version}_requirements.txt" pytest pytest-xdist
    run_tests "$venv/bin/python" "$@"
done

echo
printf '%s\n' "${table[@]}"
exit "$code"
