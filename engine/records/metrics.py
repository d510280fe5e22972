# SPDX-License-Identifier: BSD-3-Clause
"""Loss, exact accuracy counts, predictions and throughput."""

from __future__ import annotations

import contextlib
import time
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean loss in fp32. logits: (N, classes); target: (N,) int64, or (N, classes) probabilities of mixed images.

    Label smoothing as in Szegedy et al., arXiv:1512.00567, section 7; F.cross_entropy has it only since torch 1.10.
    class_weights: (classes,). The sum is divided by N, as F.cross_entropy does for probabilities, and not by the
    weights of the batch, so that the loss does not depend on how a step is shared out over batches and processes.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    if class_weights is not None:
        log_probabilities = log_probabilities * class_weights
    mixed = target.dim() == 2
    loss = -(target * log_probabilities).sum(1).mean() if mixed else F.nll_loss(log_probabilities, target)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean()
    return loss


class Totals(NamedTuple):
    """Sums over images. Plain floats, exact up to 2^53, so that sums over processes are exact too."""

    images: float = 0.0
    correct1: float = 0.0  # the target is the first prediction
    correct5: float = 0.0  # the target is among the first five
    loss_sum: float = 0.0

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.images, 1)

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100.0 * self.correct1 / max(self.images, 1)

    @property
    def acc5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100.0 * self.correct5 / max(self.images, 1)

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "acc1": self.acc1, "acc5": self.acc5}

    def since(self, earlier: Totals) -> Totals:
        """Return the totals of the images that came after `earlier`."""
        return Totals(*(now - before for now, before in zip(self, earlier)))


def class_scores(counts: np.ndarray) -> np.ndarray:
    """Return precision, recall and F1 of each class in percent, (3, classes); 0 where they are not defined.

    counts: (3, classes), the images of each class, those predicted as it, and those of both.
    """
    images, predicted, correct = np.asarray(counts, np.float64)
    return np.stack([100 * correct / np.maximum(1, total) for total in (predicted, images, (images + predicted) / 2)])


def macro_metrics(counts: np.ndarray) -> dict[str, float]:
    """Return the means over the classes, as scikit-learn computes them: of those that are a target or a prediction.

    Balanced accuracy is the mean recall of those that are a target.
    """
    scores, (images, predicted, _) = class_scores(counts), counts
    means = scores[:, images + predicted > 0].mean(1)
    names = ("macro_precision", "macro_recall", "macro_f1")
    return {**dict(zip(names, means.tolist())), "balanced_acc": scores[1, images > 0].mean().item()}


class Snapshot(NamedTuple):
    """What an AccuracyCounter held after a step; nothing of it was read yet."""

    counts: torch.Tensor
    loss_sum: torch.Tensor
    batches: list[tuple[torch.Tensor, int]]  # loss and images of each batch since the snapshot before


class AccuracyCounter:
    """Loss and correct predictions, summed on the device: `update` and `snapshot` never synchronize, `read` does.

    finite_only: count a loss that is not finite as 0, for training, which skips the step of such a loss.
    classes: also count by class.
    """

    def __init__(self, device: torch.device, *, finite_only: bool = False, classes: int = 0) -> None:
        self.finite_only, self.classes = finite_only, torch.arange(classes, device=device)
        self.by_class = torch.zeros(3, classes, dtype=torch.int64, device=device)  # see class_scores
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, top-1 correct, top-5 correct
        # The mean of a few steps is a difference of two sums, so they need more digits than fp32 has.
        dtype = torch.float32 if device.type in ("npu", "mps") else torch.float64
        self.loss_sum = torch.zeros((), dtype=dtype, device=device)
        self.batches: list[tuple[torch.Tensor, int]] = []

    def update(self, loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Count a batch. loss: () mean over its images; logits: (N, classes); target: (N,) int64.

        The target of mixed images, (N, classes), counts as its largest part.
        """
        target = target.argmax(1) if target.dim() == 2 else target
        top5 = logits.detach().topk(min(5, logits.shape[1]), dim=1)[1]
        correct = top5.eq(target.unsqueeze(1))
        images = torch.full_like(self.counts[0], len(target))
        # Not in place: a snapshot may hold the tensor.
        self.counts = self.counts + torch.stack([images, correct[:, 0].sum(), correct.sum()])
        if len(self.classes):  # compared, not scattered: every device can, and repeats it bit for bit
            actual, predicted = (labels.unsqueeze(1).eq(self.classes) for labels in (target, top5[:, 0]))
            self.by_class += torch.stack([part.sum(0) for part in (actual, predicted, actual & predicted)])
        loss = loss.detach()
        self.batches.append((loss, len(target)))
        if self.finite_only:
            loss = torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))
        self.loss_sum = self.loss_sum + (loss * len(target)).float()

    def snapshot(self) -> Snapshot:
        """Return what `read_snapshots` reads later."""
        batches, self.batches = self.batches, []
        return Snapshot(self.counts, self.loss_sum, batches)

    def read(self, sum: Callable[[list[float]], Sequence[float]] | None = None) -> Totals:
        """Return the totals so far. A synchronization. sum: adds up lists of numbers over all processes."""
        totals = [*self.counts.tolist(), self.loss_sum.item()]
        return Totals(*(totals if sum is None else sum(totals)))

    def macro_metrics(self, sum: Callable[[list[float]], Sequence[float]]) -> dict[str, float]:
        """Return the metrics that count every class alike, see macro_metrics. A synchronization. sum: as in read."""
        return macro_metrics(np.array(sum(self.by_class.flatten().tolist())).reshape(self.by_class.shape))

    def load(self, totals: Sequence[float]) -> None:
        """Continue from earlier totals."""
        self.counts.copy_(torch.tensor([int(total) for total in totals[:3]]))
        self.loss_sum.fill_(totals[3])


def read_snapshots(snapshots: Sequence[Snapshot]) -> list[tuple[Totals, float]]:
    """Return the totals at each snapshot, and the mean loss of its own batches. One synchronization for all of them."""
    counts = torch.stack([one.counts for one in snapshots]).tolist()
    sums = torch.stack([one.loss_sum for one in snapshots]).tolist()
    batches = [batch for one in snapshots for batch in one.batches]
    losses = iter(torch.stack([loss for loss, _ in batches]).tolist() if batches else [])
    result = []
    for (_, _, own), count, loss_sum in zip(snapshots, counts, sums):
        mean = sum(next(losses) * images for _, images in own) / max(1, sum(images for _, images in own))
        result.append((Totals(*[*count, loss_sum]), mean))
    return result


class Predictions:
    """The top-5 predicted classes of each image of a dataset, and their probabilities.

    Attributes:
        top5: (count, 5) int64, or fewer columns if there are fewer classes; -1 where an image was not evaluated, or by
            another process.
        probabilities: float32, of the same shape.
    """

    def __init__(self, count: int, classes: int) -> None:
        self.top5 = np.full((count, min(5, classes)), -1, np.int64)
        self.probabilities = np.zeros((count, min(5, classes)), np.float32)

    @property
    def predicted(self) -> np.ndarray:
        return self.top5[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        return self.probabilities[:, 0]

    def update(self, indices: torch.Tensor, logits: torch.Tensor) -> None:
        """Record a batch. indices: (N,) int64 into the dataset; logits: (N, classes). A synchronization."""
        top5 = logits.topk(self.top5.shape[1], dim=1)[1]  # by topk of the logits, as AccuracyCounter counts
        self.top5[indices.numpy()] = top5.cpu().numpy()
        self.probabilities[indices.numpy()] = logits.float().softmax(1).gather(1, top5).cpu().numpy()


class Throughput:
    """Images per second over the steps of an epoch after the first five, or over all if there are ten or fewer.

    The caller synchronizes with the device before the clock is read.
    """

    WARM_UP = 5  # steps

    def __init__(self, steps: int) -> None:
        self.skip = self.WARM_UP if steps > 10 else 0
        self.steps = self.images = self.warm_images = 0  # warm_images: counted before warm_begin
        self.begin = self.warm_begin = time.perf_counter()

    def step(self, images: int, synchronize: Callable[[], None]) -> None:
        """Count a step. images: of all processes."""
        self.steps += 1
        self.images += images
        if self.steps == self.skip:
            synchronize()  # once per epoch
            self.warm_begin, self.warm_images = time.perf_counter(), self.images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the clock stands still, for instance for a checkpoint."""
        begin = time.perf_counter()
        yield
        pause = time.perf_counter() - begin
        self.begin += pause
        self.warm_begin += pause

    def seconds(self) -> float:
        """Return the seconds that images_per_second divides by."""
        begin = self.warm_begin if self.steps > self.skip else self.begin  # the warm-up counts if the run ends in it
        return max(time.perf_counter() - begin, 1e-9)

    def images_per_second(self) -> float:
        return (self.images - (self.warm_images if self.steps > self.skip else 0)) / self.seconds()
