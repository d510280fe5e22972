# SPDX-License-Identifier: BSD-3-Clause
"""export.py: a checkpoint in, an ONNX file out."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import sys
from typing import Any

from engine.checkpoints import load_model
from engine.checkpoints.contents import load_checkpoint, save_safetensors
from engine.checkpoints.file import load
from engine.data import Preprocessing, open_datasets
from engine.errors import CheckpointError, DataError, UsageError, UserError
from engine.evaluation import read_images
from engine.versions import TORCH

import export
import vgg
from helpers.images import make_folder, write_cifar
from helpers.program import Result, assert_same_weights, run_main, run_script
from helpers.small import small_vgg
from helpers.trained import CLASSES, FLAGS, PRETRAINED, TorchvisionVGG, expected_predictions, train_classifier

import numpy as np
import pytest
import torch

COLORS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of ImageNet
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


def skip_without_fp16(form: list[str]) -> None:
    if "fp16" in form and "int8" not in form:
        try:
            importlib.import_module(*export.FP16_ONNX)
        except ImportError:
            pytest.skip("this onnxruntime is too old for --dtype fp16")


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
    assert [metadata[name] for name in ("image_size", "crop", "exif_rotate")] == ["32", "1", "0"]


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


@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "model_best.pth.tar", PRETRAINED, "link.pth", "hard.pth.tar"])
@pytest.mark.parametrize("source", ["model_best.pth.tar", PRETRAINED])
def test_no_checkpoint_of_a_training_and_not_the_one_given_is_overwritten(
    root: Any, tmp_path: Any, name: str, source: str
) -> None:
    for file in ("checkpoint.pth.tar", "model_best.pth.tar", PRETRAINED):
        shutil.copyfile(str(root / file), str(tmp_path / file))
    (tmp_path / "link.pth").symlink_to("checkpoint.pth.tar")
    os.link(str(tmp_path / "model_best.pth.tar"), str(tmp_path / "hard.pth.tar"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flags = ["--checkpoint", str(tmp_path / source), "--output", str(tmp_path / name)]
    if name == PRETRAINED != source:  # weights alone
        assert export.main(flags) == 0
        return
    with pytest.raises(UsageError, match=f"--output .*{name}: would overwrite a checkpoint: choose another name$"):
        export.main(flags)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint", bytes(100)])
def test_an_older_export_and_what_is_no_checkpoint_are_replaced(root: Any, tmp_path: Any, content: bytes) -> None:
    (tmp_path / "x.pth.tar").write_bytes(content)
    for _ in range(2):
        flags = ["--checkpoint", str(root / "model_best.pth.tar"), "--output", str(tmp_path / "x.pth.tar")]
        assert export.main(flags) == 0
        assert load(str(tmp_path / "x.pth.tar"))["classes"] == ["class 0", "class 1", "class 2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> str:
    """A small checkpoint, for export.py in this process."""
    path = str(tmp_path_factory.mktemp("weights") / "vgg11.pth")
    state = {"state_dict": small_vgg("vgg11", 3).state_dict(), "preprocessing": {"image_size": 32}}
    torch.save(state, path)
    return path


def test_onnx_is_asked_for_if_it_is_missing(checkpoint: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match="pip install onnx onnxruntime"):
        export.main(["--checkpoint", checkpoint, "--output", str(tmp_path / "x.onnx")])
    assert os.listdir(str(tmp_path)) == []


@needs_onnx
def test_an_onnxruntime_too_old_for_fp16_is_named(checkpoint: str, tmp_path: Any, monkeypatch: Any) -> None:
    right = importlib.import_module

    def without_transformers(name: str) -> Any:
        if name in export.FP16_ONNX:
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return right(name)

    monkeypatch.setattr(export.importlib, "import_module", without_transformers)
    flags = ["--checkpoint", checkpoint, "--output", str(tmp_path / "x.onnx")]
    with pytest.raises(UsageError, match="--dtype fp16: this onnxruntime is too old: use Python 3.8 or later"):
        export.main([*flags, "--dtype", "fp16"])
    assert os.listdir(str(tmp_path)) == []
    assert export.main(flags) == 0


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
    network = small_vgg(arch, classes).requires_grad_(False)
    return export.FromBytes(network, *COLORS).eval()


def difference_of_export(model: export.FromBytes, size: int, folder: Any) -> float:
    """Between onnxruntime and torch, for one image and for five, of a file traced with two."""
    images = torch.randint(0, 256, (5, size, size, 3)).byte()
    path = str(folder / "x.onnx")
    export.trace(model, images[:2], path)
    session = session_of(path)
    return max(export.largest_difference(session, model, batch) for batch in (images, images[:1]))


@needs_onnx
@pytest.mark.parametrize("opset", [11, 17] if TORCH >= (2, 0) else [11])
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


# --- smaller files, compared with the checkpoint ----------------------------------------------------------------------

NAMES = ["class 0", "class 1", "class 2"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: Any, folder: str) -> str:
    """A checkpoint whose last layer tells the folder's classes apart, by the nearest mean of fc7."""
    torch.manual_seed(0)
    network = small_vgg("vgg11_bn", len(NAMES)).eval()
    network.load_state_dict(TorchvisionVGG(len(NAMES)).state_dict())
    _, val = open_datasets(folder, evaluate=True, skip_unreadable=False)
    ((images, labels),) = read_images(val, Preprocessing(64), np.arange(len(val)), len(val))
    with torch.no_grad():
        inputs = export.FromBytes(network, *COLORS).eval()._normalize(images)
        fc7 = network.forward_features(inputs, ["fc7"])["fc7"]
        means = torch.stack([fc7[labels == label].mean(0) for label in range(len(NAMES))])
        network.classifier[6].weight.copy_(means)
        network.classifier[6].bias.copy_(-0.5 * means.pow(2).sum(1))
    path = str(tmp_path_factory.mktemp("learned") / "model.pth")
    info = {"classes": NAMES, "preprocessing": {"image_size": 64, "exif_rotate": True}}
    torch.save({"state_dict": network.state_dict(), **info}, path)
    return path


COMPARED = re.compile(
    r"=> ([\d.]+) MB, top-1 accuracy ([\d.]+)% \(checkpoint ([\d.]+)%\), ([\d.]+)% of 15 predictions equal, "
    r"images/s [\d.]+ \(torch [\d.]+\)"
)
FORMS = [
    [],
    ["--dtype", "fp16"],
    ["--quantize", "int8"],
    ["--svd-rank", "8", "0.99"],
    ["--svd-rank", "0.9", "4", "--dtype", "fp16"],
    ["--svd-rank", "10", "10", "--quantize", "int8"],
    ["--svd-rank", "0.95", "0.95", "--quantize", "int8", "--dtype", "fp16"],
]


@needs_onnx
@pytest.mark.parametrize(
    "form, layout",
    [*((form, "nhwc") for form in FORMS), *((form, "nchw") for form in FORMS[2:5:2])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_each_form_is_compared_with_the_checkpoint(
    learned: str, folder: str, tmp_path: Any, capsys: Any, form: list[str], layout: str
) -> None:
    """The figures are those that onnxruntime and torch give for the validation images."""
    skip_without_fp16(form)
    path = tmp_path / "x.onnx"
    flags = ["--checkpoint", learned, "--output", str(path), "--calibrate", folder, "--max-drop", "100"]
    assert export.main([*flags, "--layout", layout, *form]) == 0
    size, accuracy, original, equal = map(float, COMPARED.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups())
    _, val = open_datasets(folder, evaluate=True, skip_unreadable=False)
    ((images, labels),) = read_images(val, Preprocessing(64, exif_rotate=True), np.arange(15), 15)
    model = export.FromBytes(load_model(learned).network, *COLORS, layout == "nchw").eval()
    with torch.no_grad():
        expected = model.predict(images)
    (outputs, *_) = export.run(session_of(str(path)), model, images)
    assert size == pytest.approx(path.stat().st_size / 1e6, abs=0.06)
    assert original == pytest.approx(100 * (expected.argmax(1) == labels).float().mean().item(), abs=0.01)
    assert accuracy == pytest.approx(100 * (outputs.argmax(1) == labels).float().mean().item(), abs=0.01)
    assert equal == pytest.approx(100 * (outputs.argmax(1) == expected.argmax(1)).float().mean().item(), abs=0.01)
    assert original > 60  # the classes are learned, so that the figures mean something
    if "--svd-rank" not in form:
        assert (outputs - expected).norm() / expected.norm() < (0.2 if form == ["--quantize", "int8"] else 0.01)


@needs_onnx
def test_int8_needs_no_opset_that_torch_1_5_lacks(learned: str, folder: str, tmp_path: Any, monkeypatch: Any) -> None:
    import onnx

    right = torch.onnx.export

    @functools.wraps(right)
    def of_torch_1_5(*args: Any, **options: Any) -> None:
        assert options["opset_version"] <= 12
        right(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", of_torch_1_5)
    flags = ["--checkpoint", learned, "--output", str(tmp_path / "x.onnx"), "--calibrate", folder]
    assert export.main([*flags, "--quantize", "int8", "--max-drop", "100"]) == 0
    assert onnx.load(str(tmp_path / "x.onnx")).opset_import[0].version == 13


@needs_onnx
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize(
    "arch, head, size", [("vgg11", "paper", 32), ("vgg16_bn", "linear", 100), ("vgg19", "paper", 161)]
)
def test_int8_keeps_the_predictions_at_any_size(
    folder: str, tmp_path: Any, capsys: Any, arch: str, head: str, size: int, layout: str
) -> None:
    torch.manual_seed(1)
    network = vgg.VGG(arch, len(NAMES), (8, 8, 16, 16, 16), 32, head)
    torch.save({"state_dict": network.state_dict(), "preprocessing": {"image_size": size}}, str(tmp_path / "x.pth"))
    flags = ["--checkpoint", str(tmp_path / "x.pth"), "--output", str(tmp_path / "x.onnx"), "--calibrate", folder]
    assert export.main([*flags, "--max-drop", "100", "--quantize", "int8", "--layout", layout]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert COMPARED.fullmatch(line) and float(COMPARED.fullmatch(line).group(4)) >= 80, line


@needs_onnx
def test_files_are_as_small_as_they_should_be(tmp_path: Any, folder: str) -> None:
    """For a network in which the weights of fc6 and fc7 are most of the file, as in a VGG."""
    skip_without_fp16(["fp16"])
    path = str(tmp_path / "wide.pth")
    state_dict = vgg.VGG("vgg11", 3, (8, 8, 16, 16, 16), 512).state_dict()
    torch.save({"state_dict": state_dict, "preprocessing": {"image_size": 32}}, path)
    flags = ["--checkpoint", path, "--output", str(tmp_path / "x.onnx"), "--calibrate", folder, "--max-drop", "100"]
    sizes = []
    for form in ([], ["--dtype", "fp16"], ["--quantize", "int8"], ["--svd-rank", "51", "25"]):
        assert export.main([*flags, *form]) == 0
        sizes.append(os.path.getsize(str(tmp_path / "x.onnx")))
    ratios = [size / sizes[0] for size in sizes]
    assert ratios[1] == pytest.approx(0.5, abs=0.03) and ratios[2] == pytest.approx(0.25, abs=0.05) and ratios[3] < 0.2


@needs_onnx
@pytest.mark.parametrize("form", [["--svd-rank", "1", "1"], ["--svd-rank", "1", "1", "--quantize", "int8"]])
def test_too_great_a_loss_leaves_no_file(learned: str, folder: str, tmp_path: Any, form: list[str]) -> None:
    flags = ["--checkpoint", learned, "--output", str(tmp_path / "x.onnx"), "--calibrate", folder, *form]
    with pytest.raises(export.ExportMismatchError, match="a loss above --max-drop 1,") as raised:
        export.main([*flags, "--layout", "nchw"])
    assert raised.value.exit_code == 1 and os.listdir(str(tmp_path)) == []


def refusal(flags: list[str], capsys: Any) -> str:
    """The one line with which export.py refuses flags, with exit code 2."""
    try:
        export.main(flags)
    except UserError as error:
        assert error.exit_code == 2
        return str(error)
    except SystemExit as end:
        assert end.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line
    raise AssertionError("accepted")


@needs_onnx
def test_a_form_that_is_not_compared_says_so(learned: str, tmp_path: Any, capsys: Any) -> None:
    flags = ["--checkpoint", learned, "--output", str(tmp_path / "x.onnx")]
    assert export.main([*flags, "--svd-rank", "4", "4"]) == 0
    assert "--calibrate DATA" in capsys.readouterr().out


@needs_onnx
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quantize", "int8"], "requires --calibrate"),
        (["--quantize", "int4"], "invalid choice"),
        (["--dtype", "bf16"], "invalid choice"),
        (["--svd-rank", "33", "4"], "fc6 has 32 singular values, got 33"),
        (["--svd-rank", "4", "0"], "must be at least 1"),
        (["--svd-rank", "1.0", "4"], "must be above 0 and below 1"),
        (["--svd-rank", "four", "4"], "expected an integer"),
        (["--svd-rank", "4"], "expected 2 arguments"),
        (["--max-drop", "-1"], "must be at least 0"),
        (["--max-drop", "0"], "--max-drop requires --calibrate DATA"),
        (["--reference-names"], "--reference-names requires an --output that ends in .pth.tar"),
        (["--calibrate", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense_are_one_line(
    learned: str, tmp_path: Any, capsys: Any, flags: list[str], message: str
) -> None:
    assert message in refusal(["--checkpoint", learned, "--output", str(tmp_path / "x.onnx"), *flags], capsys)
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("flag", [["--quantize", "int8"], ["--svd-rank", "4", "4"], ["--layout", "nchw"]], ids=" ".join)
def test_what_only_onnx_can_hold_is_refused_for_weights(tmp_path: Any, capsys: Any, flag: list[str]) -> None:
    error = refusal(["--checkpoint", "x.pth", "--output", "x.pth.tar", "--calibrate", str(tmp_path), *flag], capsys)
    assert f"{flag[0]} " in error and "requires an --output that ends in .onnx" in error


@needs_onnx
@pytest.mark.parametrize("part, error", [("train", DataError), ("classes", UsageError), ("count", UsageError)])
def test_data_that_does_not_fit_is_refused(learned: str, tmp_path: Any, part: str, error: Any) -> None:
    data = tmp_path / "data"
    make_folder(data, classes=2 if part == "count" else 3, train=1, val=1)
    if part == "train":
        shutil.rmtree(str(data / "train"))
    if part == "classes":
        for split in ("train", "val"):
            (data / split / "class 1").rename(data / split / "class 9")
    renamed = tmp_path / "names.txt"
    renamed.write_text("a\nb\nc\n")
    flags = ["--checkpoint", learned, "--output", str(tmp_path / "x.onnx"), "--calibrate", str(data)]
    flags += ["--classes", str(renamed)] if part == "count" else []
    with pytest.raises(error):
        export.main([*flags, "--quantize", "int8"])
    assert sorted(os.listdir(str(tmp_path))) == ["data", "names.txt"]


def spoil(data: Any, fault: str) -> Any:
    """Spoil a folder that make_folder made; return what to give as --calibrate."""
    if fault == "no val/":
        shutil.rmtree(str(data / "val"))
    elif fault == "one folder of classes":
        return data / "train"
    elif fault == "one level too high":
        return data.parent
    elif fault == "classes one level too low":
        (data / "train" / "in").mkdir()
        for name in NAMES:
            (data / "train" / name).rename(data / "train" / "in" / name)
    elif fault == "no column for the split":
        rows = "".join(f"train/{name}/图 000.JPEG,{name}\n" for name in NAMES)
        (data / "list.csv").write_text(rows, encoding="utf-8")
        return data / "list.csv"
    elif fault == "CIFAR-10 and CIFAR-100":
        for classes in (10, 100):
            write_cifar(data / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python"), False, 1, classes)
    elif fault == "cannot be read as an image":
        (data / "val" / "class 1" / "图 000.JPEG").write_bytes(b"not an image")
    return data


@needs_onnx
@pytest.mark.parametrize(
    "fault, words",
    [
        ("no val/", "no val/ in it"),
        ("one folder of classes", "no train/ and val/ in it, but beside it: use "),
        ("one level too high", "no train/ and val/ in it, but in "),
        ("classes one level too low", "if these are the classes, they must lie directly in "),
        ("no column for the split", "add train or val to each line"),
        ("CIFAR-10 and CIFAR-100", "are in it: use "),
        ("cannot be read as an image", "图 000.JPEG"),
    ],
)
def test_a_fault_of_the_data_is_said_without_flags_that_export_lacks(
    learned: str, tmp_path: Any, fault: str, words: str
) -> None:
    make_folder(tmp_path / "data", train=1, val=1)
    data = spoil(tmp_path / "data", fault)
    flags = ["--checkpoint", learned, "--output", tmp_path / "x.onnx", "--calibrate", data, "--quantize", "int8"]
    result = run_script("export.py", *flags)
    error = result.err.replace(str(tmp_path), "")
    assert result.code == 2 and len(error.splitlines()) == 1 and words in error, error
    assert re.findall("--[a-z-]+", error) == []


@needs_onnx
def test_a_head_of_one_layer_has_nothing_to_factorize_and_no_reference_names(tmp_path: Any) -> None:
    path = str(tmp_path / "linear.pth")
    torch.save({"state_dict": small_vgg("vgg11", 3, "linear").state_dict()}, path)
    with pytest.raises(UsageError, match="--head linear"):
        export.main(["--checkpoint", path, "--output", str(tmp_path / "x.onnx"), "--svd-rank", "4", "4"])
    with pytest.raises(UsageError, match="--head linear"):
        export.main(["--checkpoint", path, "--output", str(tmp_path / "x.pth.tar"), "--reference-names"])
    assert os.listdir(str(tmp_path)) == ["linear.pth"]


# --- ModelZoo's forms -------------------------------------------------------------------------------------------------


@needs_onnx
def test_nchw_is_what_modelzoo_exports_and_aipp_normalizes_as_we_do(learned: str, tmp_path: Any) -> None:
    import onnx

    path = str(tmp_path / "x.onnx")
    assert export.main(["--checkpoint", learned, "--output", path, "--layout", "nchw"]) == 0
    session, content = session_of(path), onnx.load(path)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("actual_input_1", "tensor(float)", [1, 3, 64, 64])
    assert (logits.name, logits.shape, content.opset_import[0].version) == ("output1", [1, 3], 11)
    metadata = session.get_modelmeta().custom_metadata_map
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == tuple(map(list, COLORS))
    assert metadata["exif_rotate"] == "1"
    config = (tmp_path / "x.aipp.cfg").read_text()
    values = dict(re.findall(r"(\w+): ([\w.]+)\n", config))
    assert (values["aipp_mode"], values["input_format"]) == ("static", "RGB888_U8")
    assert values["src_image_size_w"] == values["src_image_size_h"] == "64" and config.count("aipp_op {") == 1
    pixels = torch.randint(0, 256, (1, 64, 64, 3)).byte()
    mean, scale = (
        torch.tensor([float(values[f"{name}_{i}"]) for i in range(3)]) for name in ("min_chn", "var_reci_chn")
    )
    aipp = ((pixels.float() - mean) * scale).permute(0, 3, 1, 2)
    network = load_model(learned).network
    with torch.no_grad():
        expected = network(export.FromBytes(network, *COLORS, True).prepare(pixels))
    assert np.allclose(session.run(["output1"], {"actual_input_1": aipp.numpy()})[0], expected.numpy(), atol=1e-4)


class ModelZooVGG(torch.nn.Module):
    """small.py's vgg11_bn with the names of ModelZoo's VGG16, which has no pooling to 7×7."""

    def __init__(self, network: vgg.VGG) -> None:
        super().__init__()
        self.features = network.features
        self.fc1, self.fc2, self.fc3 = (network.classifier[position] for position in (0, 3, 6))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.fc2(self.fc1(self.features(images).flatten(1)).relu())
        return self.fc3(hidden.relu())


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_modelzoo_reads_a_file_with_reference_names(learned: str, tmp_path: Any, dtype: str) -> None:
    """As its demo.py and pthtar2onnx.py do: torch.load, `module.` removed, a strict load_state_dict."""
    path = str(tmp_path / "checkpoint.pth.tar")
    assert export.main(["--checkpoint", learned, "--output", path, "--reference-names", "--dtype", dtype]) == 0
    state = torch.load(path, map_location="cpu")["state_dict"]
    assert all(name.startswith(("module.features.", "module.fc")) for name in state)
    theirs, ours = ModelZooVGG(small_vgg("vgg11_bn", 3)).eval(), load_model(learned).network
    theirs.load_state_dict({name[len("module.") :]: tensor for name, tensor in state.items()})
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(theirs(images), ours(images), atol=1e-5 if dtype == "fp32" else 0.1)
    again = load_model(path)
    assert again.classes == NAMES and again.preprocessing == load_model(learned).preprocessing
    if dtype == "fp32":
        assert_same_weights(again.network.state_dict(), ours.state_dict())


# --- safetensors ------------------------------------------------------------------------------------------------------


def test_safetensors_go_out_and_come_in_with_all_that_predictions_need(root: Any, folder: str, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path, image = tmp_path / "图.safetensors", os.path.join(folder, "val", "class 0", "图 000.JPEG")
    result = run_script("export.py", "--checkpoint", root / "model_best.pth.tar", "--output", path)
    assert result.code == 0 and "3 classes" in result.out, result.err
    weights = safetensors.load_file(str(path))
    expected = load(str(root / "model_best.pth.tar"))["state_dict_ema"]
    assert_same_weights({name: torch.as_tensor(weights[name]) for name in expected}, expected)
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
    save_safetensors(expected, str(tmp_path / "split.safetensors"), val_split=0.4)
    assert load_checkpoint(str(tmp_path / "split.safetensors")).info.val_split == 0.4
    missing = run_script(
        "export.py", "--checkpoint", root / "model_best.pth.tar", "--output", tmp_path / "no" / "x.safetensors"
    )
    assert missing.code == 2 and len(missing.err.splitlines()) == 1, missing.err
    path.write_bytes(path.read_bytes()[:-50])
    result = run_main(*flags)
    assert result.code == 2 and "corrupt, or not a safetensors file" in result.err, result.err
