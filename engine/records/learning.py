# SPDX-License-Identifier: BSD-3-Clause
"""Says, once, that a run does not learn. It is VGG's best known fault, and easily overlooked in the figures."""

from __future__ import annotations

import math
from typing import Any, Sequence

from engine import console
from engine.records.metrics import Totals

import numpy as np

ADVICE = (
    "what helps: --pretrained imagenet, an --arch with _bn, --warmup-epochs, another --lr (ten times lower first), and "
    "a look at whether the images are in the right folders"
)


class LearningCheck:
    """Watches a run from its start, or from where it continues.

    Chance is what a network reaches that knows how frequent each class is, and nothing of the images. The spans are
    longer than a healthy run of ours needed: VGG16-BN had left the loss of chance on CIFAR-10 after 50 steps.

    Args:
        train, val: the datasets, of which labels are read: (N,) int64. None if there is none, as with --dummy.
        class_weights, label_smoothing: of the training loss.
    """

    EPOCHS, STEPS = 2, 200  # at the loss of chance
    SINGLE_CLASS_STEPS = 100  # and two validations in a row that predict one class for all

    def __init__(
        self, train: Any, val: Any, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        labels = [0] if train is None else train.labels
        shares = np.bincount(labels, minlength=len(class_weights or ())) / len(labels)
        smoothed = (1 - label_smoothing) * shares + label_smoothing / len(shares)
        self.val_chance = math.log(max(2, len(shares)))  # nats; without the shares, which a healthy run may exceed
        self.train_chance = _loss_of_guessing(smoothed * (1 if class_weights is None else np.array(class_weights)))
        self.largest = 100 * float(shares.max())
        self.val_classes = 0 if val is None else len(np.unique(val.labels))
        self.done = len(shares) < 2
        self.steps = self.single_class = 0
        self.losses: list[float] = []  # of the epochs

    def add_epoch(self, steps: int, totals: Totals, validation: dict[str, float] | None) -> None:
        """Print a warning if the run has not learned. totals: of training. validation: its metrics, if any."""
        self.steps += steps
        self.losses.append(totals.loss)
        if validation is not None:
            self.single_class = self.single_class + 1 if self._is_single_class(validation) else 0
        reason = self._reason(totals, validation)
        if reason is not None and not self.done:
            self.done = True
            console.warning_once_per_node(f"this run does not learn: {reason}; {ADVICE}")

    def _is_single_class(self, validation: dict[str, float]) -> bool:
        """Whether all predictions were the same class, one of those in validation, if there are several.

        Then its recall is 1, that of the others 0, and its precision is the accuracy. No other predictions have these
        three means.
        """
        count = max(1, self.val_classes)
        recall, precision = 100 / count, validation["acc1"] / count
        expected = {"balanced_acc": recall, "macro_recall": recall, "macro_precision": precision}
        return count > 1 and all(
            math.isclose(validation[name], value, rel_tol=1e-9) for name, value in expected.items()
        )

    def _reason(self, totals: Totals, validation: dict[str, float] | None) -> str | None:
        """Return what shows that the run does not learn, None if nothing does."""
        if len(self.losses) < self.EPOCHS:
            return None
        # If one class is frequent, a healthy run too begins by predicting it alone, while its loss falls.
        learns = totals.loss < max(0.95 * self.train_chance, 0.98 * self.losses[-2])
        if self.single_class >= 2 and self.steps >= self.SINGLE_CLASS_STEPS and not learns:
            return "it predicts the same class for all validation images"
        if validation is not None and validation["loss"] > 3 * self.val_chance and validation["acc1"] <= self.largest:
            return f"the validation loss is {validation['loss']:.4g}, that of guessing {self.val_chance:.4g}"
        if totals.loss > max(self.losses[0], 1.5 * self.train_chance):
            return f"the training loss has risen from {self.losses[0]:.4g} to {totals.loss:.4g}"
        stays = min(self.losses[-self.EPOCHS :]) >= 0.99 * self.train_chance and self.steps >= self.STEPS
        if stays and not learns and totals.acc1 <= min(1.2 * self.largest, self.largest + 0.2 * (100 - self.largest)):
            return f"the training loss is {totals.loss:.4g}, that of guessing {self.train_chance:.4g}"
        return None


def _loss_of_guessing(parts: np.ndarray) -> float:
    """Return the lowest loss of predictions that are the same for all images. parts: what each class adds to it."""
    return float(-sum(part * math.log(part / parts.sum()) for part in parts if part))
