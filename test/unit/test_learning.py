# SPDX-License-Identifier: BSD-3-Clause
"""The warning about a run that does not learn: on runs that do not, once, and never on one that does."""

from __future__ import annotations

import math
from argparse import Namespace

from engine.records.learning import LearningCheck
from engine.records.metrics import Totals, macro_metrics

import numpy as np
import pytest

TEN = math.log(10)
UNBALANCED = np.repeat(np.arange(10), [795, 500, 400, 300, 300, 250, 200, 150, 112, 61])


def totals(loss, acc1, images=1000):
    return Totals(images, acc1 / 100 * images, images, loss * images)


def validation(loss, acc1, balanced, precision=None):
    macro = {"macro_precision": balanced if precision is None else precision, "macro_recall": balanced}
    return {"loss": loss, "acc1": acc1, "balanced_acc": balanced, **macro}


def warnings(capsys, epochs, labels=None, steps=390, **options):
    """epochs: (training loss, training accuracy, validation or None)."""
    labels = np.arange(50000) % 10 if labels is None else labels
    check = LearningCheck(Namespace(labels=labels), Namespace(labels=labels[::7]), **options)
    for loss, acc1, metrics in epochs:
        check.add_epoch(steps, totals(loss, acc1), metrics)
    return capsys.readouterr().err.splitlines()


# The first epochs of recipes/cifar10.txt, and those of a run that overfits.
HEALTHY = [(1.72, 42.6, validation(1.13, 61.6, 61.6)), (1.43, 58.5, validation(0.9, 72.0, 72.0))]
HEALTHY += [(1.0, 70.0, validation(0.9, 75.0, 75.0)), (0.01, 100.0, validation(9.0, 75.0, 75.0))]


@pytest.mark.parametrize("steps", [1, 22, 390, 5004])
@pytest.mark.parametrize("order", [HEALTHY, [(2.301, 11.0, None)] + HEALTHY, [(5.0, 10.0, None)] + HEALTHY])
def test_a_run_that_learns_hears_nothing(capsys, order, steps):
    assert warnings(capsys, order, steps=steps) == []


@pytest.mark.parametrize("loss", [TEN, 2.29, 2.31, 3.0])
def test_a_loss_that_stays_at_chance_is_said_once(capsys, loss):
    lines = warnings(capsys, [(loss, 10.2, validation(TEN, 10.0, 10.1))] * 5)
    assert len(lines) == 1 and "guessing" in lines[0] and "--pretrained imagenet" in lines[0]


def test_a_short_time_at_chance_is_no_fault(capsys):
    assert warnings(capsys, [(TEN, 10.2, None)] * 9, steps=22) == []
    assert len(warnings(capsys, [(TEN, 10.2, None)] * 10, steps=22)) == 1
    assert warnings(capsys, [(TEN, 10.2, None)], steps=100000) == []


def test_chance_is_that_of_the_shares_of_the_classes(capsys):
    shares = np.bincount(UNBALANCED) / len(UNBALANCED)
    entropy = -(shares * np.log(shares)).sum()
    assert entropy < 0.95 * TEN
    assert len(warnings(capsys, [(entropy, 25.0, None)] * 3, UNBALANCED)) == 1
    assert warnings(capsys, [(0.97 * entropy, 25.0, None)] * 3, UNBALANCED) == []
    assert warnings(capsys, [(entropy, 45.0, None)] * 3, UNBALANCED) == []  # mixed images: a high loss, and it learns


def test_one_class_for_all_images_is_said_after_two_validations(capsys):
    """As photos of clothing with ImageNet's defaults: the accuracy is the share of the largest class."""
    epoch = (2.2, 26.0, validation(2.1, 26.0, 100 / 10, 26.0 / 10))
    assert warnings(capsys, [epoch], UNBALANCED, steps=60) == []
    lines = warnings(capsys, [epoch] * 4, UNBALANCED, steps=60)
    assert len(lines) == 1 and "same class" in lines[0]
    between = (1.9, 32.0, validation(1.9, 32.0, 15.0))
    assert warnings(capsys, [epoch, between] * 4, UNBALANCED, steps=60) == []
    assert len(warnings(capsys, [epoch] * 4, UNBALANCED, steps=60, weighted=True)) == 1


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 100])
def test_the_same_class_for_all_images_is_said_only_if_it_is_so(capsys, classes):
    """For random confusion matrices, of few images so that coincidences are frequent; some classes have none."""
    rng, said = np.random.RandomState(classes), 0
    cases = [np.array([[7, 3], [7, 3]]), np.array([[10, 0], [9, 1]])] * (classes == 2)
    while len(cases) < 2000:
        matrix = rng.randint(0, rng.choice([2, 3, 20]), (classes, classes)) * (rng.rand(classes, 1) < 0.8)
        if rng.rand() < 0.5:  # few predicted classes
            matrix = np.repeat(matrix.sum(1)[:, None], classes, 1) * (np.arange(classes) == rng.randint(classes))
            moved = matrix.any(1) & (rng.rand(classes) < rng.choice([0, 0.1, 0.5]))
            matrix[moved] = np.roll(matrix[moved], 1, 1)
        if matrix.any():
            cases.append(matrix)
    for matrix in cases:
        counts = np.stack([matrix.sum(1), matrix.sum(0), np.diag(matrix)])
        check = LearningCheck(Namespace(labels=[0, 1]), Namespace(labels=np.flatnonzero(counts[0])))
        acc1 = 100 * counts[2].sum() / matrix.sum()
        for _ in range(2):
            check.add_epoch(100, totals(0.1, 90.0), {"loss": 0.1, "acc1": acc1, **macro_metrics(counts)})
        several, same = (counts[0] > 0).sum() > 1, (counts[1] > 0).sum() == 1
        expected = several and same and acc1 > 0  # else it is a class that no image has
        said += expected
        assert ("same class" in capsys.readouterr().err) == expected, matrix
    assert (said > 50) == (classes > 1)


@pytest.mark.parametrize("losses", [[9.0, 11.0], [2.5, 40.0, 300.0], [3.0, 2.2, 8.0]])
def test_a_loss_that_rises_is_said(capsys, losses):
    lines = warnings(capsys, [(loss, 10.0, None) for loss in losses])
    assert len(lines) == 1 and "risen" in lines[0]


def test_a_validation_that_diverges_is_said(capsys):
    lines = warnings(capsys, [(2.2, 20.0, validation(4242.0, 10.0, 10.3))] * 2)
    assert len(lines) == 1 and "4242" in lines[0]


def test_weighted_losses_and_synthetic_images_are_left_alone(capsys):
    assert warnings(capsys, [(3.0, 10.2, None)] * 5, weighted=True) == []
    check = LearningCheck(None, None)
    for _ in range(5):
        check.add_epoch(1000, totals(9.0, 0.0), None)
    assert capsys.readouterr().err == ""
