#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# One card, for its speed: one epoch, at most 200 steps.
# shellcheck source-path=SCRIPTDIR disable=SC2034
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
kind=perf cards=1 batch_size=256 learning_rate=0.01 epochs=1
recipe=(--loss-scale-value 8 --stop-step-num 200)
run_training "$@"
