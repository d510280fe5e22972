# SPDX-License-Identifier: BSD-3-Clause
"""The command line: flags, their errors, and what they mean on this machine and for this data."""

from engine.options.flags import DEVICE_FLAG
from engine.options.resolve import (
    describe_run,
    parse_flags,
    resolve_augmentation,
    resolve_preprocessing,
    resolve_views,
    shared_flags,
    with_checkpoint,
)

__all__ = [
    "DEVICE_FLAG",
    "describe_run",
    "parse_flags",
    "resolve_augmentation",
    "resolve_preprocessing",
    "resolve_views",
    "shared_flags",
    "with_checkpoint",
]
