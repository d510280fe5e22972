# SPDX-License-Identifier: BSD-3-Clause
"""small.py with the stand-in for torch_npu that computes. NPU_STANDIN is the path of its library."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "npu_standin"))

from helpers import small

if __name__ == "__main__":
    small.run()
