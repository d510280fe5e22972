#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Eight cards: full training with the reference's recipe.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
kind=acc cards=8 batch_size=2048 learning_rate=0.08 epochs=90
recipe=(--loss-scale-value 1024)
run_training "$@"
