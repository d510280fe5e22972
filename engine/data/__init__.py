# SPDX-License-Identifier: BSD-3-Clause
"""Datasets, what is done to each image, and batches of them."""

from engine.data.datasets import FileList, ImageDataset, check_same_classes, open_datasets
from engine.data.folder_index import describe_left_out
from engine.data.loader import ImageBatches, ResumableBatchSampler
from engine.data.mixing import BatchMixer
from engine.data.transforms import Augmentation, Preprocessing
from engine.data.workers import read_batches, worker_options

__all__ = [
    "Augmentation",
    "BatchMixer",
    "FileList",
    "ImageBatches",
    "ImageDataset",
    "Preprocessing",
    "ResumableBatchSampler",
    "check_same_classes",
    "describe_left_out",
    "open_datasets",
    "read_batches",
    "worker_options",
]
