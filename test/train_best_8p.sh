#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Eight cards, the best published recipe for plain VGG16: MindCV's (its configs/vgg/vgg16_ascend.yaml), 74.61 % Acc@1 there.
# Not run here. Two differences: fp32 and biases without weight decay there, AMP O1 and one decay for all here.
# shellcheck source-path=SCRIPTDIR disable=SC2034
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
kind=acc cards=8 batch_size=256 learning_rate=0.01 epochs=200
recipe=(--warmup-epochs 2 --min-lr 1e-4 --label-smoothing 0.1 --wd 4e-5)
run_training "$@"
