#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Several nodes, the same command on each: measures throughput; one epoch, at most 200 steps.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
kind=perf cards=8 batch_size=2048 learning_rate=0.08 epochs=1
recipe=(--loss-scale-value 8 --stop-step-num 200)
nodes=many
run_training "$@"
