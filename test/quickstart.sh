#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# The first five minutes: set up, train VGG16 on the embedded digits, evaluate it, say what to do next.
# Arguments go to main.py: bash test/quickstart.sh --seed 7
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
# shellcheck source=test/env_npu.sh
source "$repository/test/env_npu.sh"
evaluation=()
for word in "$@"; do
    case $word in
        --output-dir* | --stop-step-num*)
            echo "quickstart.sh: error: $word is for main.py alone: the quick start evaluates the whole run" >&2
            exit 2 ;;
        --auto-resume) ;;
        *) evaluation+=("$word") ;;
    esac
done
set_up_python

cd "$repository"
output=test/output/quickstart
mkdir -p "$output"
amp=(--amp)
if ! python_can "$python" 'import torch; torch.autocast'; then amp=(); fi # torch before 1.10 has none on a CPU
report=(--report "$output/page")
if ! python_can "$python" 'import matplotlib'; then
    report=()
    echo "=> matplotlib is not installed: no curves and no evaluation page"
fi
# tee -i: Ctrl-C stops the training, which saves, and not the log.
"$python" -u main.py ${amp[@]+"${amp[@]}"} --output-dir "$output" "$@" 2>&1 | tee -i "$output/train.log"

"$python" main.py ${amp[@]+"${amp[@]}"} ${evaluation[@]+"${evaluation[@]}"} --evaluate \
    --resume "$output/model_best.pth.tar" ${report[@]+"${report[@]}"} --output-dir "$output" >"$output/evaluate.log"
accuracy=$(sed -n 's/.*\[AVG-ACC\] \* Acc@1 \([0-9.]*\).*/\1/p' "$output/evaluate.log" | tail -n 1)
echo
printf 'Validation accuracy: %.2f%%\n' "$accuracy"
echo "Next, in $repository:"
if [ ${#report[@]} -gt 0 ]; then echo "  open $output/page/index.html in a browser"; fi
echo "  ${python#"$repository"/} predict.py IMAGE --checkpoint $output/model_best.pth.tar"
