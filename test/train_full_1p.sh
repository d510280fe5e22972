#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# One card, whole training: the reference's recipe.
# shellcheck source-path=SCRIPTDIR disable=SC2034
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
kind=acc cards=1 batch_size=256 learning_rate=0.01 epochs=90
recipe=(--loss-scale-value 8)
run_training "$@"
