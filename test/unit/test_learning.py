# SPDX-License-Identifier: BSD-3-Clause
"""The warning about a run that does not learn: on runs that do not, once, and never on one that does."""

from __future__ import annotations

import math
from argparse import Namespace

from engine.records.learning import LearningCheck
from engine.records.metrics import Totals, cross_entropy, macro_metrics

import numpy as np
import pytest
import torch

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
    assert len(warnings(capsys, [epoch] * 4, UNBALANCED, steps=60, class_weights=[1] * 10)) == 1


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
            check.add_epoch(100, totals(0.7, 50.0), {"loss": 0.1, "acc1": acc1, **macro_metrics(counts)})
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


@pytest.mark.parametrize("smoothing", [0, 0.1, 0.5])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0, 1.0], [0.1, 1.0, 2.0, 9.0], [0.0, 1.0, 1.0, 1.0]])
def test_the_loss_of_guessing_is_that_of_the_best_logits_that_ignore_the_images(capsys, weights, smoothing):
    labels = np.repeat(np.arange(4), [60, 25, 10, 5])
    check = LearningCheck(Namespace(labels=labels), None, weights, smoothing)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss_of_guessing():
        optimizer.zero_grad()
        given = None if weights is None else torch.tensor(weights)
        loss = cross_entropy(logits.expand(len(labels), 4), torch.as_tensor(labels), smoothing, given)
        loss.backward()
        return loss

    optimizer.step(loss_of_guessing)
    chance = loss_of_guessing().item()
    assert check.train_chance == pytest.approx(chance, rel=2e-3)
    lines = warnings(capsys, [(chance, 60.0, None)] * 3, labels, class_weights=weights, label_smoothing=smoothing)
    assert len(lines) == 1 and "guessing" in lines[0]


@pytest.mark.parametrize("smoothing", [0, 0.1, 0.3])
@pytest.mark.parametrize("largest", [50, 80, 90, 95, 99])
def test_a_run_with_a_frequent_class_that_learns_hears_nothing(capsys, largest, smoothing):
    """It predicts that class alone at first, and ends near the lowest loss that label smoothing leaves."""
    labels = np.repeat([0, 1], [4 * largest, 4 * (100 - largest)])
    right = 1 - smoothing / 2
    lowest = -sum(q * math.log(q) for q in (right, 1 - right) if q)
    chance = LearningCheck(Namespace(labels=labels), None, None, smoothing).train_chance
    single = validation(1.5 * chance, largest, 50.0, largest / 2)
    losses = [chance * factor for factor in (1.5, 1.3, 1.1, 1.05)]
    epochs = [(loss, largest, single) for loss in losses] + [(0.9 * chance + 0.1 * lowest, largest, single)]
    epochs += [(1.01 * lowest, 100.0, validation(0.01, 100.0, 100.0))] * 8
    assert warnings(capsys, epochs, labels, steps=60, label_smoothing=smoothing) == []


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_class_without_training_images_may_have_a_weight(capsys, missing):
    labels = np.repeat(np.setdiff1d(np.arange(4), [missing]), [50, 30, 20])
    healthy = [(1.4, 40.0, None), (0.8, 70.0, None), (0.3, 90.0, None)]
    assert warnings(capsys, healthy, labels, class_weights=[1.0, 2.0, 0.5, 1.0], label_smoothing=0.1) == []


def test_synthetic_images_are_left_alone(capsys):
    check = LearningCheck(None, None)
    for _ in range(5):
        check.add_epoch(1000, totals(9.0, 0.0), None)
    assert capsys.readouterr().err == ""
