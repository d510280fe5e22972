# SPDX-License-Identifier: BSD-3-Clause
"""Evaluation: the views of an image, and the files it writes. Import from here, not from the modules inside."""

from engine.evaluation.files import write_evaluation
from engine.evaluation.views import VIEWS, ViewAverage

__all__ = ["VIEWS", "ViewAverage", "write_evaluation"]
