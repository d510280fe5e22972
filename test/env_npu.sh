# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
# Sets the environment of Ascend NPUs; loads CANN's set_env.sh if CANN is installed. To be sourced.

set -euo pipefail
for cann in "${ASCEND_TOOLKIT_HOME:-}" "${ASCEND_HOME_PATH:-}" /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/nnae \
    "${HOME:-}/Ascend/ascend-toolkit"; do
    if [ -n "$cann" ] && [ -f "$cann/set_env.sh" ]; then
        set +eu # CANN's script uses unset variables
        # shellcheck source=/dev/null
        source "$cann/set_env.sh"
        set -eu
        break
    fi
done
unset cann

export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0} # logs go to files, not to the terminal
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}         # errors only
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}                     # launch kernels from a separate thread
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}                         # merge non-contiguous copies (torch 1.x)
export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}           # require no list of allowed peers
