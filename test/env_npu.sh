# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
# Sets the environment of Ascend NPUs; loads CANN's set_env.sh if CANN is installed. To be sourced by a script, or by
# hand in front of main.py: so it changes no option of the shell. A variable that is set already stays as it is.

# Prints the folders that CANN may be in. The file is the installer's: a line Install_Path=DIR.
cann_folders() {
    local root
    printf '%s\n' "${ASCEND_TOOLKIT_HOME:-}" "${ASCEND_HOME_PATH:-}"
    for root in "$(sed -n 's/^ *Install_Path *= *//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null | head -n 1)" \
        /usr/local/Ascend "${HOME:-}/Ascend"; do
        printf '%s\n' "$root/ascend-toolkit" "$root/nnae" "$root/cann"
    done
}

source_cann() {
    local folder options=$-
    while read -r folder; do
        if [ -f "$folder/set_env.sh" ]; then
            set +eu # CANN's script uses unset variables
            # shellcheck source=/dev/null
            source "$folder/set_env.sh"
            case $options in *e*) set -e ;; esac
            case $options in *u*) set -u ;; esac
            return
        fi
    done < <(cann_folders)
}

# The devices, too, log errors only.
quiet_devices() {
    local device tool
    tool=$(command -v msnpureport || command -v /usr/local/Ascend/driver/tools/msnpureport || true)
    for device in /dev/davinci[0-9]*; do
        if [ -n "$tool" ] && [ -e "$device" ]; then
            "$tool" -g error -d "${device#/dev/davinci}" >/dev/null 2>&1 </dev/null || true
        fi
    done
}

source_cann
quiet_devices
export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0} # logs go to files, not to the terminal
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}         # errors only
export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}   # no events
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}                     # launch kernels from a separate thread
export PTCOPY_ENABLE=${PTCOPY_ENABLE:-1}                             # copy on the device (torch 1.x)
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}                         # merge non-contiguous copies (torch 1.x)
export DYNAMIC_OP=${DYNAMIC_OP:-ADD#MUL}                             # compile these once for all shapes (torch 1.x)
export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}           # require no list of allowed peers
# The address that HCCL uses. It would win over an interface that the user has chosen.
if [ -z "${HCCL_IF_IP:-}${HCCL_SOCKET_IFNAME:-}" ]; then
    HCCL_IF_IP=$(hostname -I 2>/dev/null | awk '{ print $1 }' || true)
    if [ -n "$HCCL_IF_IP" ]; then export HCCL_IF_IP; else unset HCCL_IF_IP; fi
fi
unset -f cann_folders source_cann quiet_devices
