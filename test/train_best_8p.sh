#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Eight cards: the best published recipe for plain VGG16, MindCV's configs/vgg/vgg16_ascend.yaml (74.61% Acc@1 there).
# That is its run with O2; with O0 it has 74.53%. This script uses AMP O1. Not measured here.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
kind=acc cards=8 batch_size=256 learning_rate=0.01 epochs=200
recipe=(--warmup-epochs 2 --min-lr 1e-4 --label-smoothing 0.1 --wd 4e-5 --no-bias-decay)
run_training "$@"
