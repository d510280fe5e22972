# SPDX-License-Identifier: BSD-3-Clause
"""Loss, accuracy, predictions and throughput."""

from __future__ import annotations

import math
from typing import Any

from engine.records import metrics
from engine.records.metrics import AccuracyCounter, Predictions, Throughput, Totals, cross_entropy
from engine.versions import TORCH

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")


def batch(count: int = 7, classes: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, target)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator), torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_smoothed_labels(smoothing: float) -> None:
    logits, target = batch()
    wanted = torch.full((7, 10), smoothing / 10)
    wanted.scatter_add_(1, target.unsqueeze(1), torch.full((7, 1), 1 - smoothing))
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(cross_entropy(logits, target, smoothing), expected, atol=1e-6)


def test_the_loss_of_half_precision_logits_is_computed_in_fp32() -> None:
    logits, target = batch()
    half = logits.half()
    assert cross_entropy(half, target).dtype == torch.float32
    assert torch.equal(cross_entropy(half, target), cross_entropy(half.float(), target))


# --- class weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_weigh_the_loss_as_torch_does_for_probabilities(smoothing: float) -> None:
    logits, target = batch()
    weights = torch.rand(10, generator=torch.Generator().manual_seed(3))
    one_hot = torch.zeros(7, 10).scatter_(1, target.unsqueeze(1), 1.0)
    soft = one_hot * (1 - smoothing) + smoothing / 10
    expected = -(soft * weights * logits.log_softmax(1)).sum() / 7
    for given in (target, one_hot):
        assert torch.allclose(cross_entropy(logits, given, smoothing, weights), expected, atol=1e-6)
    if TORCH >= (1, 10):
        theirs = torch.nn.functional.cross_entropy(logits, one_hot, weights, label_smoothing=smoothing)
        assert torch.allclose(expected, theirs, atol=1e-6)
    parts = [cross_entropy(logits[i:j], target[i:j], smoothing, weights) * (j - i) for i, j in ((0, 2), (2, 7))]
    assert torch.allclose(sum(parts) / 7, expected, atol=1e-6)  # type: ignore[arg-type]


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 10])
def test_accuracy_is_counted_image_by_image(classes: int) -> None:
    """Over batches of several sizes; with fewer than five classes every top-5 prediction is correct."""
    counter = AccuracyCounter(CPU)
    correct1 = correct5 = 0
    loss_sum = 0.0
    for seed, count in enumerate([8, 8, 3]):
        logits, target = batch(count, classes, seed)
        loss = cross_entropy(logits, target)
        counter.update(loss, logits, target)
        loss_sum += (loss * count).item()
        for row, label in zip(logits.tolist(), target.tolist()):
            rank = sorted(row, reverse=True).index(row[label])
            correct1 += rank == 0
            correct5 += rank < 5
    totals = counter.read()
    assert totals[:3] == (19, correct1, correct5)
    assert totals.loss_sum == pytest.approx(loss_sum, rel=1e-6)
    assert totals.metrics() == {
        "loss": pytest.approx(loss_sum / 19, rel=1e-6),
        "acc1": pytest.approx(100 * correct1 / 19),
        "acc5": pytest.approx(100 * correct5 / 19),
    }
    assert (correct5 == 19) == (classes == 3)


def test_a_non_finite_loss_is_counted_unless_its_step_is_skipped() -> None:
    training, validation = AccuracyCounter(CPU, finite_only=True), AccuracyCounter(CPU)
    logits, target = batch()
    for loss in (torch.tensor(value) for value in (1.0, math.nan, math.inf)):
        training.update(loss, logits, target)
        validation.update(loss, logits, target)
    assert training.read().loss_sum == 7.0
    assert math.isnan(validation.read().loss)


def test_a_counter_continues_from_earlier_totals() -> None:
    logits, target = batch()
    whole, first, second = AccuracyCounter(CPU), AccuracyCounter(CPU), AccuracyCounter(CPU)
    for counter in (whole, first):
        counter.update(torch.tensor(3.0), logits, target)
    second.load(list(first.read()))
    for counter in (whole, second):
        counter.update(torch.tensor(5.0), logits, target)
    assert second.read() == whole.read()
    assert second.read().since(first.read()) == first.read()._replace(loss_sum=35.0)


def test_totals_are_summed_over_processes_on_request() -> None:
    logits, target = batch()
    counter = AccuracyCounter(CPU)
    counter.update(torch.tensor(2.0), logits, target)
    alone = counter.read()
    assert counter.read(lambda values: [2 * value for value in values]) == tuple(2 * value for value in alone)


# precision, recall, F1 of precision_recall_fscore_support(average="macro", zero_division=0), balanced_accuracy_score
SCIKIT_LEARN = [  # 1.9.1
    ([0, 0, 0, 1, 2, 0, 1, 1, 0, 2, 1], [0.6, 0.611111111111111, 0.5995670995670995, 0.611111111111111]),
    (
        [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1],
        [0.47222222222222215, 0.5555555555555555, 0.5079365079365079, 0.5555555555555555],
    ),
    ([0, 0, 0, 1, 2, 0, 1, 1, 0], [0.48888888888888893, 0.4444444444444444, 0.4646464646464647, 0.6666666666666666]),
]


@pytest.mark.parametrize("predicted, expected", SCIKIT_LEARN, ids=["usual", "never predicted", "never a target"])
@pytest.mark.parametrize("classes", [3, 5], ids=["all classes occur", "two do not"])
def test_macro_metrics_are_those_of_scikit_learn(predicted: list[int], expected: list[float], classes: int) -> None:
    """Over two processes and batches of several sizes."""
    target = torch.tensor(([0] * 6 + [1] * 3 + [2] * 2)[: len(predicted)])
    logits = torch.eye(classes)[torch.tensor(predicted)]
    counters = [AccuracyCounter(CPU, classes=classes) for _ in range(2)]
    for counter, begin, end in ((counters[0], 0, 5), (counters[1], 5, 8), (counters[1], 8, 11)):
        counter.update(torch.tensor(1.0), logits[begin:end], target[begin:end])
    found = counters[0].macro_metrics(lambda own: (counters[1].by_class.flatten() + torch.tensor(own)).tolist())
    assert list(found) == ["macro_precision", "macro_recall", "macro_f1", "balanced_acc"]
    assert [value / 100 for value in found.values()] == pytest.approx(expected, rel=1e-12)


def test_no_images_are_zero_percent() -> None:
    assert Totals().metrics() == {"loss": 0.0, "acc1": 0.0, "acc5": 0.0}


def test_predictions_are_the_ones_that_accuracy_counts() -> None:
    """Ties included: of equal logits, the counter and the predictions take the same class."""
    logits = batch(40, 6)[0].round()
    target = batch(40, 6, seed=1)[1]
    indices = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    predictions, counter = Predictions(50, 10), AccuracyCounter(CPU)
    for part in torch.arange(40).split(16):
        predictions.update(indices[part], logits[part])
        counter.update(torch.tensor(0.0), logits[part], target[part])
    predicted = predictions.predicted[indices.numpy()]
    assert (predicted == target.numpy()).sum() == counter.read().correct1
    confidence = logits.softmax(1)[torch.arange(40), torch.from_numpy(predicted)]
    assert np.array_equal(predictions.confidence[indices.numpy()], confidence.numpy())
    assert set(predictions.predicted[40:]) == {-1}  # images of another process


def test_the_mean_loss_of_a_few_steps_is_exact_late_in_an_epoch() -> None:
    counter = AccuracyCounter(torch.device("cpu"))
    counter.load([1280000, 0, 0, 1280000 * 6.9])
    earlier = counter.read()
    for _ in range(10):
        counter.update(torch.tensor(6.9), torch.zeros(256, 10), torch.zeros(256, dtype=torch.int64))
    assert counter.read().since(earlier).loss == pytest.approx(6.9, abs=1e-6)


@pytest.fixture
def clock(monkeypatch: Any) -> list[float]:
    """A clock to set: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("steps, rate", [(20, 80.0), (10, 8 * 10 / (5 * 1.0 + 5 * 0.1))])
def test_throughput_leaves_out_five_warm_up_steps_of_a_long_epoch(clock: list[float], steps: int, rate: float) -> None:
    """The first five steps take 1 s each, the others 0.1 s."""
    waits = []
    throughput = Throughput(steps)
    for number in range(steps):
        clock[0] += 1.0 if number < 5 else 0.1
        throughput.step(8, lambda: waits.append(clock[0]))
    assert throughput.images_per_second() == pytest.approx(rate)
    assert waits == ([105.0] if steps > 10 else [])


def test_throughput_excludes_checkpoints(clock: list[float]) -> None:
    throughput = Throughput(20)
    for number in range(20):
        clock[0] += 0.1
        throughput.step(8, lambda: None)
        if number == 10:
            with throughput.paused():
                clock[0] += 30
    assert throughput.images_per_second() == pytest.approx(80.0)
    assert throughput.seconds() == pytest.approx(1.5)


def test_throughput_of_a_run_stopped_within_its_warm_up_counts_all_steps(clock: list[float]) -> None:
    throughput = Throughput(20)
    for _ in range(5):
        clock[0] += 0.5
        throughput.step(8, lambda: None)
    assert throughput.images_per_second() == pytest.approx(16.0)


@pytest.mark.parametrize("stop, rate", [(20, 80.0), (5, 80.0)], ids=["long epoch", "stopped within the warm-up"])
def test_throughput_excludes_checkpoints_of_the_warm_up_too(clock: list[float], stop: int, rate: float) -> None:
    throughput = Throughput(20)
    for number in range(stop):
        clock[0] += 0.1
        throughput.step(8, lambda: None)
        if number in (1, 3):
            with throughput.paused():
                clock[0] += 30
    assert throughput.images_per_second() == pytest.approx(rate)
    assert throughput.images_per_second() == pytest.approx(rate)  # reading it changes nothing
