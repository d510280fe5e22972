# SPDX-License-Identifier: BSD-3-Clause
"""export.py: a checkpoint in, an ONNX file out."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

from engine.checkpoints.contents import load_checkpoint, save_safetensors
from engine.checkpoints.file import load
from engine.data import Preprocessing, open_datasets
from engine.errors import CheckpointError, UsageError

import export
import vgg
from helpers.program import Result, assert_same_weights, run_main, run_script
from helpers.trained import CLASSES, FLAGS, PRETRAINED, expected_predictions, train_classifier

import numpy as np
import pytest
import torch

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


@pytest.fixture(scope="module")
def root(folder: str, tmp_path_factory: Any) -> Any:
    """A folder with model_best.pth.tar of three classes and pretrained.pth of five."""
    root = tmp_path_factory.mktemp("exported")
    train_classifier(folder, root)
    return root


@pytest.fixture(scope="module")
def exported(root: Any) -> tuple[str, Result]:
    """(ONNX file, result) of model_best.pth.tar."""
    path = str(root / "model.onnx")
    result = run_script("export.py", "--checkpoint", root / "model_best.pth.tar", "--output", path)
    assert result.code == 0, result.err
    return path, result


def session_of(path: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@needs_onnx
def test_the_file_predicts_what_validation_predicts(exported: Any, root: Any, folder: str) -> None:
    """From bytes of images, any number of them, with the EMA weights."""
    _, dataset = open_datasets(folder, evaluate=True, skip_unreadable=False)
    images = np.stack([Preprocessing(32)(dataset.read(index)) for index in (5, 0, 14)])
    session = session_of(exported[0])
    logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert classes == dataset.classes
    for image, row in zip(images, probabilities):
        expected = dict(expected_predictions(root / "model_best.pth.tar", image))
        assert dict(zip(classes, row.tolist())) == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(session.run(["logits"], {"images": images[:1]})[0].shape, (1, 3))
    assert np.allclose(torch.from_numpy(logits).softmax(1).numpy(), probabilities, atol=1e-6)


@needs_onnx
def test_the_file_says_how_to_prepare_images(exported: Any) -> None:
    session = session_of(exported[0])
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 32, 32, 3])
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["image_size"], metadata["crop"]) == ("32", "1")


@needs_onnx
def test_the_output_says_how_far_onnxruntime_is_from_torch(exported: Any) -> None:
    path, result = exported
    assert result.out.startswith(f"{path}: 3 classes, 32 pixels per side, differs from torch by at most ")
    assert float(result.out.partition("at most ")[2].split()[0]) <= export.TOLERANCE
    assert not os.path.exists(f"{path}.tmp")


@needs_onnx
def test_weights_of_torchvision_are_exported_with_given_class_names(root: Any, tmp_path: Any) -> None:
    flags = ["--checkpoint", root / PRETRAINED, "--classes", root / "names.txt", "--output", tmp_path / "five.onnx"]
    result = run_script("export.py", *flags)
    assert result.code == 0, result.err
    session = session_of(str(tmp_path / "five.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == CLASSES
    assert metadata["image_size"] == "224"


@needs_onnx
def test_an_output_folder_that_does_not_exist_is_named(root: Any, tmp_path: Any) -> None:
    path = tmp_path / "nowhere" / "x.onnx"
    result = run_script("export.py", "--checkpoint", root / "model_best.pth.tar", "--output", path)
    assert result.code == 2
    assert result.err.startswith(f"export.py: error: --output {path}: ")
    assert len(result.err.splitlines()) == 1


def test_an_output_of_another_kind_is_refused(tmp_path: Any) -> None:
    result = run_script("export.py", "--checkpoint", "x.pth", "--output", tmp_path / "vgg16.pt")
    assert result.code == 2 and "the name must end in .onnx or .safetensors" in result.err, result.err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> str:
    """Weights of a whole VGG, for export.py in this process."""
    path = str(tmp_path_factory.mktemp("weights") / "vgg11.pth")
    state = {"state_dict": vgg.VGG("vgg11", 3).state_dict(), "preprocessing": {"image_size": 32}}
    torch.save(state, path)
    return path


def test_onnx_is_asked_for_if_it_is_missing(checkpoint: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match="pip install onnx onnxruntime"):
        export.main(["--checkpoint", checkpoint, "--output", str(tmp_path / "x.onnx")])
    assert os.listdir(str(tmp_path)) == []


@needs_onnx
def test_a_file_that_differs_from_torch_is_not_kept(checkpoint: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(export.ExportMismatchError, match="is not written"):
        export.main(["--checkpoint", checkpoint, "--output", str(tmp_path / "x.onnx")])
    assert os.listdir(str(tmp_path)) == []


@needs_onnx
def test_a_corrupt_checkpoint_is_named(tmp_path: Any) -> None:
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="x.pth"):
        export.main(["--checkpoint", str(tmp_path / "x.pth"), "--output", str(tmp_path / "x.onnx")])


def narrow_model(arch: str, classes: int = 5) -> export.FromBytes:
    torch.manual_seed(0)
    network = vgg.VGG(arch, classes, (8, 8, 16, 16, 16), 32).requires_grad_(False)
    return export.FromBytes(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()


def difference_of_export(model: export.FromBytes, size: int, folder: Any) -> float:
    """Between onnxruntime and torch, for one image and for five, of a file traced with two."""
    images = torch.randint(0, 256, (5, size, size, 3)).byte()
    path = str(folder / "x.onnx")
    export.trace(model, images[:2], path)
    session = session_of(path)
    return max(export.largest_difference(session, model, batch) for batch in (images, images[:1]))


@needs_onnx
@pytest.mark.parametrize("opset", [11, 17])
def test_every_image_size_is_exported_right(tmp_path: Any, monkeypatch: Any, opset: int) -> None:
    monkeypatch.setattr(export, "OPSET", opset)
    model = narrow_model("vgg11")
    differences = {size: difference_of_export(model, size, tmp_path) for size in [*range(32, 513, 32), 33, 100, 331]}
    assert {size: value for size, value in differences.items() if not value < 1e-5} == {}


@needs_onnx
@pytest.mark.parametrize("arch", vgg.ARCHITECTURES)
def test_every_architecture_is_exported_right(tmp_path: Any, arch: str) -> None:
    assert difference_of_export(narrow_model(arch), 100, tmp_path) < 1e-5


def save_narrow(path: Any, scale: float = 1, size: int = 96) -> list[str]:
    """Write a checkpoint whose logits are `scale` times as large; return export.py's flags for it."""
    weights = narrow_model("vgg11").network.state_dict()
    for name in ("classifier.6.weight", "classifier.6.bias"):
        weights[name] = weights[name] * scale
    torch.save({"state_dict": weights, "preprocessing": {"image_size": size}}, str(path / "narrow.pth"))
    return ["--checkpoint", str(path / "narrow.pth"), "--output", str(path / "narrow.onnx")]


@needs_onnx
@pytest.mark.parametrize("scale", [1, 1e6, 1e8], ids="{:.0e} times the logits".format)
def test_large_logits_are_no_reason_to_refuse(tmp_path: Any, scale: float) -> None:
    assert export.main(save_narrow(tmp_path, scale)) == 0


@needs_onnx
def test_small_logits_do_not_hide_a_difference(tmp_path: Any, monkeypatch: Any) -> None:
    right = export.trace

    def wrong(model: export.FromBytes, example: torch.Tensor, path: str) -> None:
        right(narrow_model("vgg13"), example, path)

    monkeypatch.setattr(export, "trace", wrong)
    with pytest.raises(export.ExportMismatchError, match="is not written"):
        export.main(save_narrow(tmp_path, 1e-3))


# --- safetensors ------------------------------------------------------------------------------------------------------


def test_safetensors_go_out_and_come_in_with_all_that_predictions_need(root: Any, folder: str, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path, image = tmp_path / "图.safetensors", os.path.join(folder, "val", "class 0", "图 000.JPEG")
    result = run_script("export.py", "--checkpoint", root / "model_best.pth.tar", "--output", path)
    assert result.code == 0 and "3 classes" in result.out, result.err
    weights = safetensors.load_file(str(path))
    expected = load(str(root / "model_best.pth.tar"))["state_dict_ema"]
    assert_same_weights({name: weights[name] for name in expected}, expected)
    outputs = [
        run_script("predict.py", image, "--checkpoint", file, "--json", "--device", "cpu")
        for file in (root / "model_best.pth.tar", path)
    ]
    assert outputs[0].code == 0 and outputs[0].out == outputs[1].out, outputs[1].err
    flags = [folder, *FLAGS, "-e", "--pretrained", path, "--output-dir", tmp_path]
    assert run_main(*flags).code == 0
    assert path.stat().st_mode & 0o077 == (root / "model_best.pth.tar").stat().st_mode & 0o077
    safetensors.save_file(weights, str(tmp_path / "foreign.safetensors"), metadata={"arch": "vgg11", "classes": "3"})
    foreign = load_checkpoint(str(tmp_path / "foreign.safetensors"))
    assert foreign.info.classes == [] and foreign.weights.keys() == weights.keys()
    save_safetensors(weights, str(tmp_path / "split.safetensors"), val_split=0.4)
    assert load_checkpoint(str(tmp_path / "split.safetensors")).info.val_split == 0.4
    missing = run_script(
        "export.py", "--checkpoint", root / "model_best.pth.tar", "--output", tmp_path / "no" / "x.safetensors"
    )
    assert missing.code == 2 and len(missing.err.splitlines()) == 1, missing.err
    path.write_bytes(path.read_bytes()[:-50])
    result = run_main(*flags)
    assert result.code == 2 and "corrupt, or not a safetensors file" in result.err, result.err
