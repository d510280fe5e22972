# SPDX-License-Identifier: BSD-3-Clause
"""What a trained network is for: averaged and frozen weights, predict.py, export.py, report.py, and the README's commands."""

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys

import pytest
import torch
from PIL import Image

import checkpoint
import export
import images
import main
import predict
from conftest import REPOSITORY, run
from test_accelerator import build, needs_bf16, parameters, step
from test_main import TWO, weights
from test_readme import READMES, commands, text


# --- averaged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["O0", pytest.param("O2", marks=needs_bf16)])
def test_averages_are_of_the_exact_weights_and_leave_a_skipped_step_out(level):
    device, model, scaler = build(
        "--lr", "0.1", "--ema-decay", "0.9", "--opt-level", level, precision="bf16" if level == "O2" else "fp32"
    )
    expected = scaler.model_state_dict(model)
    expected = {name: value.clone() for name, value in expected.items()}
    for factor in (1.0, 2.0, float("nan"), 1.0):
        step(device, model, scaler, factor)
        scaler.average(0.9)
        if factor == factor:
            for name, value in scaler.model_state_dict(model).items():
                if value.is_floating_point():
                    expected[name].mul_(0.9).add_(value * 0.1)
    averaged, plain = scaler.model_state_dict(model, averaged=True), parameters(model)
    for name in expected:
        if expected[name].is_floating_point():
            assert averaged[name].dtype == torch.float32 and torch.allclose(
                averaged[name], expected[name], atol=1e-7
            ), name
    with scaler.averages_in_place():
        for name, value in model.state_dict().items():
            assert torch.equal(value, averaged[name].to(value.dtype)) or not value.is_floating_point(), name
    for mine, old in zip(parameters(model), plain):
        assert torch.equal(mine, old)


# --- the README's commands, run as they stand -------------------------------------------------------------------------

SMALLER = ["--arch", "vgg11_bn", "--image-size", "32", "--device", "cpu", "--epochs", "1", "-b", "6"]
HAS_ONNX = importlib.util.find_spec("onnx") is not None and importlib.util.find_spec("onnxruntime") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

# Every command of the README, by how it begins, and what runs it: `followed` runs it as it stands (main.py smaller), a test
# runs it with other values, or nothing does, for the reason given.
RUN_BY = {
    "python main.py /data/flowers": "followed",
    "python predict.py": "followed",
    "python export.py": "followed",
    "python tools/sort_imagenet_val.py": "test_tools.test_the_validation_images_are_sorted",
    "python tools/shrink.py": "test_tools.test_shrink_makes_images_smaller_and_continues_after_an_interruption",
    "python main.py /data/imagenet --device cpu --multi": "test_main.test_validation_is_exact_for_any_processes_and_batch",
    "python main.py /data/imagenet -e --resume": "test_scripts.test_training_then_evaluation_for_real",
    "python main.py /data/imagenet --resume": "test_main.test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit",
    "python main.py /data/imagenet --auto-resume": "test_main.test_auto_resume_falls_back_to_the_checkpoint_before_and_says_so",
    "torchrun": "test_main.test_torchrun_runs_the_same_program",
    "bash ./test/train_full_1p.sh": "test_scripts.test_each_script_prints_and_writes_the_references_figures",
    "bash ./test/train_full_8p.sh": "test_scripts.test_each_script_prints_and_writes_the_references_figures",
    "bash ./test/train_best_8p.sh": "test_scripts.test_the_best_recipe_is_mindcvs",
    "bash ./test/train_performance_1p.sh": "test_scripts.test_each_script_prints_and_writes_the_references_figures",
    "bash ./test/train_performance_8p.sh": "test_scripts.test_each_script_prints_and_writes_the_references_figures",
    "bash ./test/train_eval_8p.sh": "test_scripts.test_each_script_prints_and_writes_the_references_figures",
    "bash ./test/train_performance_multinodes.sh": "test_scripts.test_each_script_prints_and_writes_the_references_figures",
    "bash ./test/train_full_multinodes.sh": "test_scripts.test_each_script_prints_and_writes_the_references_figures",
    "bash test/cluster.sh": "nothing: it needs root and minutes; it tries the multi-node commands",
    "bash test/torture.sh": "nothing: it takes half an hour",
    "bash test/quickstart.sh": "nothing: it takes four minutes",
    "bash test/run_tests.sh": "nothing: it runs the tests",
    "python main.py": "nothing: 90 epochs; the same with fewer is in test_main",
    "python main.py /data/imagenet --device gpu": "nothing: it needs a GPU; test_accelerator has a test for one",
    "python main.py /data/imagenet --device npu": "nothing: it needs NPUs",
    "python bench/": "nothing: measurements of minutes",
    "pip install": "nothing: it changes the machine",
    "atc": "nothing: it needs Ascend CANN",
}


def commands_of_text(name):
    """The commands of the code blocks, and those between backticks."""
    return commands(name) + re.findall(r"`((?:python|bash|pip|atc|torchrun) [^`]+)`", text(name))


@pytest.mark.parametrize("name", READMES)
def test_every_command_of_the_readme_is_run_or_said_not_to_be(name):
    begun = set()
    for command in commands_of_text(name):
        matching = [begin for begin in RUN_BY if command.startswith(begin)]
        assert matching, command
        begun.add(max(matching, key=len))
    assert begun == set(RUN_BY)
    for what in set(RUN_BY.values()) - {"followed"}:
        if not what.startswith("nothing: "):
            module, test = what.split(".")
            with open(os.path.join(REPOSITORY, "test", "unit", module + ".py")) as file:
                assert "def {}(".format(test) in file.read(), what


@pytest.fixture(scope="module")
def followed(folder, tmp_path_factory):
    """(working folder, {command: Result}) of a user who follows the README with three classes of pictures of their own."""
    if not hasattr(torch, "compile"):
        pytest.skip("the README is followed on torch 2")
    root = tmp_path_factory.mktemp("a user")
    torch.manual_seed(0)
    torch.save(main.vgg.VGG("vgg11_bn", 5).state_dict(), str(root / "vgg16-397923af.pth"))
    (root / "imagenet_classes.txt").write_text(
        'tench\ngoldfish\n"great white" shark\nhammerhead\n图\n', encoding="utf-8"
    )
    shutil.copytree(os.path.join(folder, "val", "class 1"), str(root / "holiday"))
    (root / "holiday" / "bad.png").write_bytes(b"no picture")
    shutil.copy(str(root / "holiday" / "图 000.JPEG"), str(root / "dog.jpg"))
    (root / "val").mkdir()
    results = {}
    for command in commands("README.md"):
        words = shlex.split(command.partition(" > ")[0].replace("/data/flowers", shlex.quote(folder)))
        if (
            RUN_BY[max((begin for begin in RUN_BY if command.startswith(begin)), key=len)] != "followed"
            or "onnx" in command
            and not HAS_ONNX
            or "--heatmap" in command
            and not HAS_MATPLOTLIB
        ):
            continue
        if words[1] == "main.py":
            words += SMALLER + (TWO if "-e" in words else [])
            if "--freeze-features" in words:
                words += ["--ema-decay", "0.9"]
        results[command] = run(sys.executable, os.path.join(REPOSITORY, words[1]), *words[2:], cwd=str(root))
        assert results[command].code == (2 if "holiday" in words else 0), results[command].err
        if "--freeze-features" in words:
            shutil.copy(str(root / "flowers" / "model_best.pth.tar"), str(root))
    return root, results


def result_of(followed, part):
    return next(result for command, result in followed[1].items() if part in command)


def test_frozen_features_stay_and_have_no_optimizer_state(followed):
    before = weights_of_file(followed[0] / "vgg16-397923af.pth")
    state = checkpoint.load(str(followed[0] / "model_best.pth.tar"))
    for name, tensor in before.items():
        if name.startswith("features"):
            assert torch.equal(state["state_dict"][name], tensor) and torch.equal(
                state["state_dict_ema"][name], tensor
            ), name
    for key in ("state_dict", "state_dict_ema"):
        assert not torch.equal(state[key]["classifier.0.weight"], before["classifier.0.weight"])
    assert len(state["optimizer"]["state"]) == 6
    after = weights(followed[0] / "flowers-all" / "checkpoint.pth.tar")
    assert not torch.equal(after["features.0.weight"], before["features.0.weight"])
    assert "loaded the averaged weights" in result_of(followed, "flowers-all").out


def weights_of_file(path):
    return main.weights_of(checkpoint.load(str(path)), str(path))


def test_a_frozen_run_continues_on_two_processes(followed, folder, tmp_path):
    result = run(
        sys.executable,
        os.path.join(REPOSITORY, "main.py"),
        folder,
        *SMALLER,
        *TWO,
        "--freeze-features",
        "--resume",
        followed[0] / "model_best.pth.tar",
        "--epochs",
        2,
        "--stop-step-num",
        6,
        "--output-dir",
        tmp_path,
    )
    assert result.code == 0 and "the averaged weights of the checkpoint are left behind" in result.out, result.err
    state = checkpoint.load(str(tmp_path / "checkpoint.pth.tar"))
    assert state["step"] == 6 and len(state["optimizer"]["state"]) == 6 and "state_dict_ema" not in state
    before = weights_of_file(followed[0] / "vgg16-397923af.pth")
    assert all(torch.equal(state["state_dict"][name], before[name]) for name in before if name.startswith("features"))


def test_the_page_of_an_evaluation_counts_each_image_once(followed):
    content = (followed[0] / "flowers" / "page" / "index.html").read_text(encoding="utf-8")
    result = result_of(followed, "--report")
    assert "evaluating the averaged weights" in result.out
    assert result.accuracy() == result_of(followed, "--freeze-features").accuracy()
    acc1 = float(result.accuracy()[0])
    wrong = round(15 * (100 - acc1) / 100)
    assert "<b>{:.2f} %</b>Acc@1".format(acc1) in content and "<b>{}</b>wrong of 15".format(wrong) in content
    assert content.count("<figure>") == content.count("data:image/png") == wrong
    numbers = [int(number) for number in re.findall(r"answered as class \d: (\d+)</title>", content)]
    assert [sum(numbers[row : row + 3]) for row in (0, 3, 6)] == [5, 5, 5] and sum(numbers[::4]) == 15 - wrong
    assert "<circle" in content and "http" not in content


def answers_of(path, picture):
    """[(class, probability)] of one picture, the likeliest first, without predict.py."""
    state = checkpoint.load(str(path))
    network = main.vgg.VGG("vgg11_bn", 3).eval()
    network.load_state_dict(state["state_dict_ema"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        images_in = ((torch.from_numpy(picture.copy()).float() / 255 - mean) / std).permute(2, 0, 1).unsqueeze(0)
        probabilities, order = network(images_in).softmax(1)[0].sort(descending=True)
    return [
        (state["classes"][number], probability) for number, probability in zip(order.tolist(), probabilities.tolist())
    ]


def test_predict_answers_as_validation_would(followed, folder):
    source = images.Folder(os.path.join(folder, "val"))
    picture = source.validation_picture(5, 32)  # the first of class 1
    lines = result_of(followed, "dog.jpg").out.splitlines()
    assert lines[0] == "dog.jpg" and len(lines) == 4
    for line, (name, probability) in zip(lines[1:], answers_of(followed[0] / "model_best.pth.tar", picture)):
        assert line.endswith("  " + name) and float(line.split()[1]) == pytest.approx(100 * probability, abs=0.01)
    if HAS_MATPLOTLIB:
        assert Image.open(str(followed[0] / "dog_heatmap.png")).size[0] > 500


def test_predict_goes_on_after_a_bad_picture_and_reads_foreign_weights(followed):
    result = result_of(followed, "holiday")
    assert len(result.err.splitlines()) == 1 and "bad.png: cannot be read" in result.err
    rows = list(csv.reader(result.out.splitlines()))
    assert rows[0] == ["picture", "rank", "class", "probability"] and len(rows) == 1 + 5 * 5
    assert [row[1] for row in rows[1:6]] == list("12345") and {row[2] for row in rows[1:6]} == set(
        ["tench", "goldfish", '"great white" shark', "hammerhead", "图"]
    )
    assert sum(float(row[3]) for row in rows[1:6]) == pytest.approx(1, abs=1e-4)


def test_predict_prepares_digits_as_they_were_validated(tmp_path, capsys):
    source = images.read_digits(training=False)
    network = main.vgg.VGG("vgg11", 10)
    torch.save(
        {
            "state_dict": network.state_dict(),
            "classes": source.classes,
            "preprocessing": {
                "image_size": 48,
                "crop": source.crop,
                "mean": list(source.mean),
                "std": list(source.std),
            },
        },
        str(tmp_path / "x"),
    )
    Image.fromarray(source.images[7]).save(str(tmp_path / "7.png"))
    words = [str(tmp_path / "7.png"), "--checkpoint", str(tmp_path / "x"), "--device", "cpu"]
    assert predict.predict(predict.parse_args(words + ["--json"])) == 0
    record = json.loads(capsys.readouterr().out)
    picture = torch.from_numpy(source.validation_picture(7, 48).copy()).permute(2, 0, 1).unsqueeze(0)
    with torch.no_grad():
        expected = network.eval()((picture.float() / 255 - source.mean[0]) / source.std[0]).softmax(1)[0]
    assert record["picture"] == words[0] and len(record["answers"]) == 5
    for answer in record["answers"]:
        assert answer["probability"] == pytest.approx(expected[int(answer["class"])].item(), abs=1e-5)
    (tmp_path / "names").write_text("zero\none\n")
    with pytest.raises(main.WrongUse, match="names has 2 names of classes, the network 10"):
        predict.predict(predict.parse_args(words + ["--classes", str(tmp_path / "names")]))


def test_the_heatmap_is_grad_cam():
    """Against the definition, computed by finite differences of the logit of the likeliest class."""
    torch.manual_seed(0)
    network = main.vgg.VGG("vgg11", 4)
    network.classifier = torch.nn.Linear(512 * 7 * 7, 4)  # a thousand forward passes
    network.eval().double()
    pictures = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    heat, logits = predict.grad_cam(network, pictures)
    assert torch.allclose(logits, network(pictures)) and heat.shape == (2, 4, 4)
    maps = torch.relu(network.features[:-2](pictures)).detach()

    def logit(maps, index):
        return network.classify(network.features[-2](maps))[index, logits[index].argmax()]

    with torch.no_grad():
        for index in range(2):
            weights_of_maps = []
            for channel in range(0, 512):
                change = torch.zeros_like(maps)
                change[index, channel] = 1e-6
                weights_of_maps.append((logit(maps + change, index) - logit(maps, index)) / 1e-6 / 16)
            expected = torch.relu((torch.stack(weights_of_maps).view(-1, 1, 1) * maps[index]).sum(0))
            assert torch.allclose(heat[index], expected / expected.max(), atol=1e-3)


@pytest.mark.skipif(not HAS_ONNX, reason="onnx or onnxruntime is not installed")
def test_the_exported_file_answers_as_predict_does_in_the_readmes_example(followed):
    assert "from torch (onnxruntime" in result_of(followed, "export.py").out
    example = re.search(r"```python\n(.*?)```", text("README.md"), re.DOTALL).group(1)
    shown = run(sys.executable, "-c", example, cwd=str(followed[0]))
    assert shown.code == 0, shown.err
    answers = result_of(followed, "dog.jpg").out.splitlines()[1:]
    theirs = {line.split("  ")[-1]: float(line.split("%")[0]) for line in shown.out.splitlines()}
    ours = {line.split("  ")[-1]: float(line.split()[1]) for line in answers}
    assert theirs == pytest.approx(ours, abs=3)  # percent: it crops before it resizes, and validation resizes before


def test_export_says_what_is_missing_and_keeps_no_file_that_differs(followed, tmp_path, monkeypatch):
    words = ["--checkpoint", str(followed[0] / "model_best.pth.tar"), "--output", str(tmp_path / "x.onnx")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        with pytest.raises(main.WrongUse, match="pip install onnx onnxruntime"):
            export.export(export.parse_args(words))
    if HAS_ONNX:
        monkeypatch.setattr(export, "TOLERANCE", -1.0)
        with pytest.raises(export.Differs, match="is not written"):
            export.export(export.parse_args(words))
    assert os.listdir(str(tmp_path)) == []
