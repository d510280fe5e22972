# SPDX-License-Identifier: BSD-3-Clause
"""Evaluation: views of an image, the files it writes, two models compared."""

from engine.evaluation.comparison import classify, open_images, read_images
from engine.evaluation.files import check_predictions, write_evaluation
from engine.evaluation.views import VIEWS, ViewAverage

__all__ = ["VIEWS", "ViewAverage", "check_predictions", "classify", "open_images", "read_images", "write_evaluation"]
