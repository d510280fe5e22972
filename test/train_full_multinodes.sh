#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Several nodes, the same command on each: full training with the recipe of train_full_8p.sh, 2048 images per node.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
kind=acc cards=8 batch_size=2048 learning_rate=0.08 epochs=90
recipe=(--loss-scale-value 1024)
nodes=many
run_training "$@"
