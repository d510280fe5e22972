#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Injects faults into training runs and checks that the runs survive them. Takes half an hour; prints a table of the
# faults at the end and exits with code 1 if one was not survived. Arguments select parts; --list prints their names:
#   bash test/faults/torture.sh disk network
# Parts that need root, strace or network namespaces are skipped if these are not available.
set -euo pipefail
faults_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$(dirname "$faults_dir")")
# shellcheck source-path=SCRIPTDIR source=../setup.sh
source "$repository/test/setup.sh"
set_up_python 3 "the fault tests"
if [ "$(id -u)" = 0 ] && unshare -m true 2>/dev/null; then
    # File systems are mounted in a separate mount namespace, which disappears with its last process.
    TORTURE_MAY_MOUNT=1 exec unshare -m "$python" "$faults_dir/torture.py" "$@"
fi
exec "$python" "$faults_dir/torture.py" "$@"
