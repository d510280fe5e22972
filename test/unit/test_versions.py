# SPDX-License-Identifier: BSD-3-Clause
"""What an older torch lacks is refused by name."""

from __future__ import annotations

from typing import Any

from engine import versions
from engine.errors import UsageError

import pytest


def test_an_older_torch_is_refused_by_name(monkeypatch: Any) -> None:
    monkeypatch.setattr(versions, "TORCH", (1, 8))
    with pytest.raises(UsageError, match="--mixup requires torch 2.1 or later"):
        versions.require_torchvision("--mixup")
