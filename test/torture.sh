#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Breaks training in every way that README's table "When something breaks" speaks of, and looks at what is left: half an hour.
# Ends with a table of what was tried; exit code 1 where a fault was not survived. Words pick parts of it by name:
# bash test/torture.sh disk network. --list names them. What needs root, strace or namespaces is skipped where there is none.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
if [ -n "${PYTHON:-}" ]; then python=$PYTHON; else set_up_python; fi
if [ "$(id -u)" = 0 ] && unshare -m true 2>/dev/null; then
    # Mounts are made in a namespace of their own, and go with it.
    exec unshare -m "$python" "$repository/test/torture/torture.py" --may-mount "$@"
fi
exec "$python" "$repository/test/torture/torture.py" "$@"
