# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of decoding and of the transforms share."""

import re

from engine.data import decoding
from engine.data.datasets import FileList
from engine.data.loader import ImageBatches
from engine.data.transforms import Augmentation, Preprocessing
from engine.errors import ImageError

from helpers.images import photo

import numpy as np

PHOTO = photo(40, 30, 5)


def generator(seed):
    return np.random.RandomState([seed, 0, 0])


def read_rgb(path):
    return decoding.read_rgb(decoding.read_file(str(path)))


def assert_names_the_file(path, match):
    """In training and in validation."""
    for transform in (Augmentation(64), Preprocessing(64)):
        error = ImageBatches(FileList([str(path)]), transform)[0, np.array([0])]
        assert isinstance(error, ImageError) and re.search(match, str(error)), error
