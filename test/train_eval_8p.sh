#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Eight cards: evaluates a checkpoint.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
kind=eval cards=8 batch_size=2048 learning_rate=0.08 epochs=90
recipe=(--evaluate)
resume=$repository/model_best.pth.tar
run_training "$@"
