#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Runs the tests, setting up what they need. Further words go to pytest: bash test/run_tests.sh -k checkpoint
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
set_up_python

if ! "$python" -c 'import pytest' 2>/dev/null; then
    if [ "$python" != "$repository/.venv/bin/python" ]; then # leave the active python as it is
        "$python" -m venv --system-site-packages "$repository/.venv"
        python=$repository/.venv/bin/python
    fi
    "$python" -m pip install --quiet --disable-pip-version-check pytest
fi
cd "$repository"
exec "$python" -m pytest -q "$@" test/unit
