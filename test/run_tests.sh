#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Runs linters and tests, and installs what they need: on this machine's torch, then on torch 1.8 and 1.5 if Python 3.8
# and 3.7 are found. Ends with the names of failed tests and a table of the parts, with their times (min:s). Arguments go
# to pytest: bash test/run_tests.sh -k checkpoint
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
repository=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
table=() failed=() code=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

add_row() { # what, since when, result
    local seconds=$((SECONDS - $2))
    table+=("$(printf '%-28s %3d:%02d  %s' "$1" $((seconds / 60)) $((seconds % 60)) "$3")")
}

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
    local begin=$SECONDS
    echo "=> $*"
    if "$@"; then add_row "$1 $2" "$begin" passed; else add_row "$1 $2" "$begin" FAILED && code=1; fi
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

# Sets `parts` to what pytest runs one after the other: the files that the arguments name, or both folders of tests.
choose_parts() { # arguments of pytest
    local word
    parts=(test/unit test/run)
    for word; do
        case $word in test/* | *.py | *.py::*) parts=('') ;; esac
    done
}

run_tests() { # python, arguments of pytest
    local name part begin status
    name=torch\ $("$1" -c 'import torch; print(torch.__version__.partition("+")[0])')
    echo "=> $name"
    choose_parts "${@:2}"
    for part in "${parts[@]}"; do
        begin=$SECONDS status=0
        # Four tests at a time, each on its share of the cores (conftest.py): many wait, for a lost process for example.
        "$1" -m pytest -q -rfEs -n 4 --dist worksteal --timeout 400 ${part:+"$part"} "${@:2}" 2>&1 | tee "$log" || status=$?
        if [ "$status" = 5 ]; then status=0; fi # no test was selected
        if [ "$status" != 0 ]; then code=1; fi
        mapfile -t -O "${#failed[@]}" failed < <(grep -E '^(FAILED|ERROR) ' "$log" | sed "s/\$/  ($name)/" || true)
        add_row "$name: ${part:-as given}" "$begin" "$(tail -n 1 "$log")"
    done
}

set_up_python 0 ''
cd "$repository"
add_dev_tools
run_linters
run_tests "$python" "$@"
set -- --skip-once "$@" # what is the same on any torch has run
for versions in '1.8 3.8' '1.5 3.7'; do
    read -r torch_version python_version <<<"$versions"
    venv=$repository/.venv-$torch_version
    if [ ! -x "$venv/bin/python" ]; then
        found=$(find_version "$python_version")
        if [ -z "$found" ]; then
            add_row "torch $torch_version" "$SECONDS" "skipped: no Python $python_version with venv was found"
            continue
        fi
        echo "=> installing ${torch_version}_requirements.txt into $venv"
        "$found" -m venv "$venv"
    fi
    pip_install "$venv/bin/python" -r "${torch_version}_requirements.txt" pytest pytest-xdist pytest-timeout
    run_tests "$venv/bin/python" "$@"
done

echo
if [ "${#failed[@]}" != 0 ]; then printf '%s\n' "${failed[@]}" ''; fi
add_row "all" 0 "$([ "$code" = 0 ] && echo passed || echo FAILED)"
printf '%s\n' "${table[@]}"
exit "$code"
