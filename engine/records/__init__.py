# SPDX-License-Identifier: BSD-3-Clause
"""Counts, log lines and the files that a run writes about itself."""

from engine.records import feature_file, run_info
from engine.records.curves import svg_curves
from engine.records.learning import LearningCheck
from engine.records.logger import Logger, ProgressMeter
from engine.records.metrics import AccuracyCounter, Predictions, Throughput, Totals, class_scores, cross_entropy

__all__ = [
    "AccuracyCounter",
    "LearningCheck",
    "Logger",
    "Predictions",
    "ProgressMeter",
    "Throughput",
    "Totals",
    "class_scores",
    "cross_entropy",
    "feature_file",
    "run_info",
    "svg_curves",
]
