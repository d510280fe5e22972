# SPDX-License-Identifier: BSD-3-Clause
"""Counts, log lines and the files that a run writes about itself."""

from engine.records import run_info
from engine.records.curves import svg_curves
from engine.records.feature_file import feature_file, feature_files
from engine.records.logger import Logger, ProgressMeter
from engine.records.metrics import AccuracyCounter, Predictions, Throughput, Totals, class_scores, cross_entropy

__all__ = [
    "AccuracyCounter",
    "Logger",
    "Predictions",
    "ProgressMeter",
    "Throughput",
    "Totals",
    "class_scores",
    "cross_entropy",
    "feature_file",
    "feature_files",
    "run_info",
    "svg_curves",
]
