# SPDX-License-Identifier: BSD-3-Clause
"""What a checkpoint holds, and what is read from files of others."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import pickle
from typing import Any

from engine.checkpoints.contents import CONTAINERS, TrainState, load_checkpoint, load_weights
from engine.errors import CheckpointError, UsageError

import vgg
from helpers.program import assert_same_weights
from helpers.saved import COUNTS, Run, SmallNet, save

import numpy as np
import pytest
import torch


def test_a_checkpoint_holds_plain_values_and_fp32_tensors_on_the_cpu(tmp_path: Any) -> None:
    content = Run().train(1).content()
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "amp"} <= set(content)  # the reference's
    assert content["counts"] == list(COUNTS) and content["decoder"] == "simplejpeg"
    assert content["preprocessing"] == {"image_size": 8} and content["classes"] == ["a", "b", "c", "d"]
    assert content["identity"] == {"seed": 7, "global batch": 12}
    for name, tensor in content["state_dict"].items():
        assert tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64), name
    save(content, tmp_path / "x")
    options = {"weights_only": True} if "weights_only" in torch.load.__code__.co_varnames else {}
    assert torch.load(str(tmp_path / "x"), **options)["step"] == 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("arch", 5),
        ("arch", "vgg16_bn.tv_in1k"),
        ("model", "vgg16"),
        ("state_dict_ema", None),
        ("classes", "abc"),
        ("classes", [0, 1]),
        ("classes", ["a", None]),
        ("preprocessing", [224]),
        ("preprocessing", {"image_size": "abc"}),
        ("preprocessing", {"image_size": -5}),
        ("preprocessing", {"mean": None}),
        ("preprocessing", {"mean": [0.5] * 3, "std": [0.5]}),
        ("val_split", "0.1"),
        ("identity", [1]),
        ("identity", {"global batch": "abc"}),
        ("world_size", "2"),
        ("decoder", 5),
        ("batch", 256),
        ("batch", {"batch_size": 8, "accum_steps": 1}),
        ("batch", {"batch_size": 8, "accum_steps": 1, "images_per_step": 0}),
    ],
)
def test_an_entry_that_cannot_be_ours_is_left_out(tmp_path: Any, key: str, value: Any) -> None:
    weights = {"model_state_dict": {"a": torch.ones(1)}}
    found = load_checkpoint(save({**weights, key: value}, tmp_path / "x"))
    assert found == dataclasses.replace(load_checkpoint(save(weights, tmp_path / "y")), path=found.path)


def test_a_file_of_something_else_is_no_checkpoint(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match="x: holds a list, not a checkpoint"):
        load_checkpoint(save([1, 2], tmp_path / "x"))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_found_in_a_checkpoint_and_in_a_plain_state_dict(tmp_path: Any) -> None:
    content = Run().train(2).content()
    checkpoint = load_checkpoint(save(content, tmp_path / "x"))
    assert_same_weights(checkpoint.weights, content["state_dict"])
    assert_same_weights(checkpoint.best_weights, content["state_dict_ema"])
    plain = load_checkpoint(save(content["state_dict"], tmp_path / "y"))
    assert_same_weights(plain.best_weights, content["state_dict"])
    own = vgg.VGG("vgg11", 3, [4] * 5, 8).state_dict()
    theirs = {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "fc3"}
    of_the_reference = {}
    for name, tensor in own.items():
        layer, _, kind = name.rpartition(".")
        of_the_reference[f"module.{theirs.get(layer, layer)}.{kind}"] = tensor
    for container in CONTAINERS:
        beside = {"epoch": 3, "args": argparse.Namespace(lr=0.1, data="/imagenet")}  # as torchvision's references write
        path = save({container: of_the_reference, **beside}, tmp_path / container)
        assert_same_weights(load_checkpoint(path).weights, own)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "beside",
    [
        torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.ones(1)], 0.1), [30, 60]).state_dict(),
        {"best_acc": np.float64(0.5), "epoch": np.int64(3)},
        {"losses": np.arange(3.0), "random": np.random.RandomState(1).get_state()},
        {"args": argparse.Namespace(data=pathlib.Path("/data"), device=torch.device("cpu"))},
        {"frozen": {"features.0.weight"}},
    ],
    ids=["MultiStepLR", "numbers of NumPy", "arrays", "flags", "set"],
)
def test_what_others_save_beside_the_weights_is_dropped(tmp_path: Any, beside: Any, protocol: int) -> None:
    own, path = vgg.VGG("vgg11", 3, [4] * 5, 8).state_dict(), str(tmp_path / "x.pth")
    for zip_format in (True, False):
        content = {"model_state_dict": own, **beside, "scheduler": beside}
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
        assert_same_weights(load_checkpoint(path).weights, own)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 1},
        {"state_dict": {}},
        {"state_dict": {"a": 1}},
        {"state_dict": [1]},
        {"net": torch.ones(2)},
        {"a": np.ones(1)},
    ],
)
def test_a_file_without_weights_is_named(tmp_path: Any, content: Any) -> None:
    with pytest.raises(UsageError, match="x.pth: holds no weights"):
        load_checkpoint(save(content, tmp_path / "x.pth"))


def test_weights_that_do_not_fit_are_named() -> None:
    network: Any = SmallNet()
    weights = dict(network.state_dict())
    weights["features.0.weight"] = torch.zeros(5, 3, 3, 3)
    message = r"x.pth: features.0.weight: expected shape \(4, 3, 3, 3\), got \(5, 3, 3, 3\)"
    with pytest.raises(UsageError, match=message):
        load_weights(network, weights, "x.pth")


# --- the best validation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure, best", [("acc1", [1, 0, 1, 0]), ("macro_f1", [1, 1, 0, 1])])
def test_the_measure_decides_which_validation_is_the_best(measure: str, best: list[int]) -> None:
    state = TrainState(best_by=measure)
    values = [(60.0, 30.0), (50.0, 40.0), (60.0, 35.0), (59.0, 40.0)]
    assert [state.add_validation({"acc1": acc1, "macro_f1": f1}) for acc1, f1 in values] == best  # as good is the best
    assert state.best_acc1 == 60.0 and state.best_value == max(value[measure != "acc1"] for value in values)


def test_patience_ends_after_validations_that_are_not_better() -> None:
    state, lost = TrainState(), []
    for acc1 in (50.0, 50.0, 51.0, 40.0, 51.0):
        state.add_validation({"acc1": acc1})
        lost.append(state.has_lost_patience(2))
    assert lost == [False, False, False, False, True] and not state.has_lost_patience(None)
    assert state.is_finished(9, None, 2) and not state.is_finished(9, None, 3)
