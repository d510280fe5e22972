#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# The first five minutes: set up, train VGG16 on the embedded digits, validate, say where everything is.
# Further flags go to main.py: bash test/quickstart.sh --seed 7
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=test/setup.sh
source "$repository/test/setup.sh"
# shellcheck source=test/env_npu.sh
source "$repository/test/env_npu.sh"
set_up_python

output=$repository/test/output/quickstart
mkdir -p "$output"
amp=(--amp)
if ! python_can "$python" 'import torch; torch.autocast'; then amp=(); fi # torch before 1.10 has none on a CPU
# tee -i: Ctrl-C stops the training, which saves, and not the log.
"$python" -u "$repository/main.py" "${amp[@]}" -b 64 --epochs 16 --lr 0.05 --warmup-epochs 2 --clip-grad-norm 1 --eval-freq 4 \
    --output-dir "$output" "$@" 2>&1 | tee -i "$output/train.log"
accuracy=$(sed -n 's/.*\[AVG-ACC\] \* Acc@1 \([0-9.]*\).*/\1/p' "$output/train.log" | tail -n 1)

echo
echo "VGG16 reads ${accuracy:-?} % of the handwritten digits it has never seen. In $output:"
for file in model_best.pth.tar checkpoint.pth.tar train.log metrics.jsonl curves.png; do
    if [ -e "$output/$file" ]; then echo "  $file"; fi
done
