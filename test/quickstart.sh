#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# The first five minutes: set up, train VGG16 on the embedded digits, evaluate it, say what to do next.
# Arguments go to main.py: bash test/quickstart.sh --seed 7
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
repository=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
# shellcheck source=test/env_npu.sh
source "$repository/test/env_npu.sh"
evaluation=()
for word in "$@"; do
    case $word in
        -h | --help) sed -n '3,4s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --output-dir* | --stop-step-num*)
            fail "$word is for main.py alone: the quick start evaluates the whole run" ;;
        --auto-resume) ;;
        *) evaluation+=("$word") ;;
    esac
done

output=$repository/test/output/quickstart
mkdir -p "$output"
# Of VGG16's weights and momentum: the latest checkpoint, the one before it, the best, and one that is being written.
# Those of an earlier quick start are replaced.
earlier=$(du -sk "$output" | awk '{ print int($1 * 1024 / 1e9) }')
set_up_python $((5 > earlier ? 5 - earlier : 0)) "checkpoints of 1.07 GB each in $output"

# Keeps the lines of a log, and shows them. A progress bar that is on the terminal too is erased before each line.
keep_lines() { # file
    trap '' INT # Ctrl-C stops the training, which saves, and not the log
    if [ -t 1 ] && [ -t 2 ]; then
        tee "$1" | sed -u $'s/^/\r\e[K/'
    else
        tee "$1"
    fi
}

train() {
    if [ -t 2 ]; then # stderr stays on the terminal: main.py shows a progress bar there
        "$python" -u "$repository/main.py" "$@" | keep_lines "$output/train.log" || return "${PIPESTATUS[0]}"
    else
        "$python" -u "$repository/main.py" "$@" 2>&1 | keep_lines "$output/train.log" || return "${PIPESTATUS[0]}"
    fi
}

stop_with() { # exit code of main.py
    if [ "$1" = 1 ] && { grep -qsi 'no space left\|quota exceeded' "$output/train.log" ||
        LC_ALL=C awk -v free="$(free_gb)" 'BEGIN { exit !(free != "" && free < 1.2) }'; }; then
        echo "quickstart.sh: the disk is full: free some space (a checkpoint takes 1.07 GB), then continue with" \
            "bash test/quickstart.sh --auto-resume" >&2
    fi
    exit "$1"
}

amp=(--amp)
if ! python_can "$python" 'import torch; torch.autocast'; then amp=(); fi # torch before 1.10 has none on a CPU
report=(--report "$output/page")
if ! python_can "$python" 'import matplotlib'; then
    report=()
    echo "=> matplotlib is not installed: no curves and no evaluation page"
fi
if ! python_can "$python" 'import jinja2'; then
    report=()
    echo "=> jinja2 is not installed: no evaluation page"
fi
if ! python_can "$python" 'import tqdm'; then echo "=> tqdm is not installed: no progress bar"; fi
train ${amp[@]+"${amp[@]}"} --output-dir "$output" "$@" || stop_with $?

"$python" "$repository/main.py" ${amp[@]+"${amp[@]}"} ${evaluation[@]+"${evaluation[@]}"} --evaluate \
    --resume "$output/model_best.pth.tar" ${report[@]+"${report[@]}"} --output-dir "$output" >"$output/evaluate.log" ||
    stop_with $?
accuracy=$(sed -n 's/.*\[AVG-ACC\] \* Acc@1 \([0-9.]*\).*/\1/p' "$output/evaluate.log" | tail -n 1)
[ -n "$accuracy" ] || fail "main.py validated nothing, see $output/evaluate.log" 1
echo
LC_ALL=C printf 'Validation accuracy: %.2f%%\n' "$accuracy"
echo "Next, in $repository:"
output=${output#"$repository"/}
if [ ${#report[@]} -gt 0 ]; then echo "  open $output/page/index.html in a browser"; fi
echo "  ${python#"$repository"/} predict.py IMAGE --checkpoint $output/model_best.pth.tar"
