# SPDX-License-Identifier: BSD-3-Clause
"""What a trained network is for: averaged and frozen weights, predict.py, export.py, report.py, and the README's commands."""
import importlib.util
import json
import os
import re
import shutil
import sys

import pytest
import torch
from PIL import Image

import checkpoint
import images
import main
import predict
from conftest import REPOSITORY, run, run_main
from test_accelerator import build, needs_bf16, parameters, step
from test_main import SMALL, TWO, weights
from test_readme import commands, text


# --- averaged weights -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('level', ['O0', pytest.param('O2', marks=needs_bf16)])
def test_averages_are_of_the_exact_weights_and_leave_a_skipped_step_out(level):
    device, model, scaler = build('--lr', '0.1', '--ema-decay', '0.9', '--opt-level', level,
                                  precision='bf16' if level == 'O2' else 'fp32')
    expected = scaler.model_state_dict(model)
    expected = {name: value.clone() for name, value in expected.items()}
    for factor in (1.0, 2.0, float('nan'), 1.0):
        step(device, model, scaler, factor)
        scaler.average(0.9)
        if factor == factor:
            for name, value in scaler.model_state_dict(model).items():
                if value.is_floating_point():
                    expected[name].mul_(0.9).add_(value * 0.1)
    averaged, plain = scaler.model_state_dict(model, averaged=True), parameters(model)
    for name in expected:
        if expected[name].is_floating_point():
            assert averaged[name].dtype == torch.float32 and torch.allclose(averaged[name], expected[name], atol=1e-7), name
    with scaler.averages_in_place():
        for name, value in model.state_dict().items():
            assert torch.equal(value, averaged[name].to(value.dtype)) or not value.is_floating_point(), name
    for mine, old in zip(parameters(model), plain):
        assert torch.equal(mine, old)


# --- frozen features --------------------------------------------------------------------------------------------------

def test_frozen_features_stay_and_have_no_optimizer_state(folder, tmp_path):
    flags = [folder, *SMALL, '--arch', 'vgg11_bn', '-b', 6, '--epochs', 2, '--output-dir', tmp_path, '--freeze-features', *TWO]
    network = main.vgg.VGG('vgg11_bn', 5)
    torch.save(network.state_dict(), str(tmp_path / 'weights.pth'), _use_new_zipfile_serialization=True)
    result = run_main(*flags, '--pretrained', tmp_path / 'weights.pth', '--stop-step-num', 3, '--ema-decay', 0.9)
    assert result.code == 0 and '5 classes in' in result.out, result.err
    result = run_main(*flags, '--resume', tmp_path / 'checkpoint.pth.tar', '--stop-step-num', 6, '--ema-decay', 0.9)
    assert result.code == 0, result.err
    state = checkpoint.load(str(tmp_path / 'checkpoint.pth.tar'))
    for name, before in network.state_dict().items():
        if name.startswith('features'):
            assert torch.equal(state['state_dict'][name], before), name
            assert torch.equal(state['state_dict_ema'][name], before), name
    assert not torch.equal(state['state_dict']['classifier.0.weight'], network.state_dict()['classifier.0.weight'])
    assert len(state['optimizer']['state']) == 6


# --- predict.py, export.py, report.py ---------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint of VGG-11 after some steps on the digits, the page of its evaluation by two processes, its output."""
    output = tmp_path_factory.mktemp('show')
    result = run_main('--arch', 'vgg11', '--lr', '0.02', '-b', 64, '--epochs', 1, '--output-dir', output)
    assert result.code == 0, result.err
    evaluated = run_main('-e', '--arch', 'vgg11', '--resume', output / 'model_best.pth.tar', '-b', 50, *TWO,
                         '--report', output / 'page', '--output-dir', output)
    assert evaluated.code == 0, evaluated.err
    assert evaluated.accuracy() == result.accuracy()
    return output, result


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A folder of two validation digits as files, and a third that is none."""
    folder = tmp_path_factory.mktemp('some digits')
    source = images.read_digits(training=False)
    for index in (0, 1):
        Image.fromarray(source.images[index]).save(str(folder / '数字 {}.png'.format(index)))
    (folder / 'bad.png').write_bytes(b'no picture')
    return folder


def run_program(name, *words):
    return run(sys.executable, os.path.join(REPOSITORY, name), *words)


def test_predict_names_five_classes_with_validations_logits_and_goes_on_after_a_bad_picture(trained, digits):
    path = trained[0] / 'model_best.pth.tar'
    result = run_program('predict.py', digits, '--checkpoint', path, '--json', '--device', 'cpu')
    assert result.code == 2 and len(result.err.splitlines()) == 1 and 'bad.png: cannot be read' in result.err
    source = images.read_digits(training=False)
    network = main.vgg.VGG('vgg11', 10).eval()
    network.load_state_dict(weights(path))
    pictures = (torch.from_numpy(source.images[:2]).permute(0, 3, 1, 2).float() / 255 - source.mean[0]) / source.std[0]
    with torch.no_grad():
        expected = network(pictures).softmax(1)
    for index, line in enumerate(result.out.splitlines()):
        record = json.loads(line)
        assert record['picture'] == str(digits / '数字 {}.png'.format(index))
        assert [answer['class'] for answer in record['answers']] == [str(n) for n in expected[index].topk(5)[1].tolist()]
        for answer in record['answers']:
            assert answer['probability'] == pytest.approx(expected[index][int(answer['class'])].item(), abs=1e-5)


def test_predict_as_table_with_names_of_a_file_and_a_heatmap(trained, digits, tmp_path):
    (tmp_path / 'names.txt').write_text('\n'.join('zero one two three four five six seven eight nine'.split()) + '\n')
    heatmap = ['--heatmap', tmp_path / 'heat.png'] if importlib.util.find_spec('matplotlib') else []
    result = run_program('predict.py', digits / '数字 1.png', '--checkpoint', trained[0] / 'model_best.pth.tar', '--device', 'cpu',
                         '--classes', tmp_path / 'names.txt', *heatmap)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 6 and re.match(r'^  1 +\d+\.\d\d %  (zero|one|two|three|four|five|six|seven|eight|nine)$', lines[1])
    if heatmap:
        assert Image.open(str(tmp_path / 'heat.png')).size[0] > 500
    (tmp_path / 'names.txt').write_text('zero\none\n')
    result = run_program('predict.py', digits, '--checkpoint', trained[0] / 'model_best.pth.tar', '--classes',
                         tmp_path / 'names.txt')
    assert result.code == 2 and 'names.txt has 2 names of classes, the network 10' in result.err


def test_the_heatmap_is_grad_cam():
    """Against the definition, computed by finite differences of the logit of the likeliest class."""
    torch.manual_seed(0)
    network = main.vgg.VGG('vgg11', 4).eval().double()
    pictures = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    heat, logits = predict.grad_cam(network, pictures)
    assert torch.allclose(logits, network(pictures)) and heat.shape == (2, 4, 4)
    maps = torch.relu(network.features[:-2](pictures)).detach()

    def logit(maps, index):
        return network.classifier(main.vgg._average_pool_7x7(network.features[-2:](maps)).flatten(1))[index, logits[index].argmax()]

    with torch.no_grad():
        for index in range(2):
            weights_of_maps = []
            for channel in range(0, 512):
                change = torch.zeros_like(maps)
                change[index, channel] = 1e-6
                weights_of_maps.append((logit(maps + change, index) - logit(maps, index)) / 1e-6 / 16)
            expected = torch.relu((torch.stack(weights_of_maps).view(-1, 1, 1) * maps[index]).sum(0))
            assert torch.allclose(heat[index], expected / expected.max(), atol=1e-3)


def test_the_exported_file_computes_the_same_with_onnxruntime_and_names_the_classes(trained, digits, tmp_path):
    if not importlib.util.find_spec('onnx') or not importlib.util.find_spec('onnxruntime'):
        result = run_program('export.py', '--checkpoint', trained[0] / 'model_best.pth.tar')
        assert result.code == 2 and 'pip install onnx onnxruntime' in result.err
        pytest.skip('onnx or onnxruntime is not installed')
    shutil.copy(str(trained[0] / 'model_best.pth.tar'), str(tmp_path))
    shutil.copy(str(digits / '数字 0.png'), str(tmp_path / 'dog.jpg'))
    command = next(line for line in commands('README.md') if line.startswith('python export.py'))
    result = run(sys.executable, os.path.join(REPOSITORY, 'export.py'), *command.split()[2:], cwd=str(tmp_path))
    assert result.code == 0 and os.listdir(str(tmp_path)).count('vgg16.onnx') == 1, result.err
    example = re.search(r'```python\n(.*?)```', text('README.md'), re.DOTALL).group(1)
    shown = run(sys.executable, '-c', example, cwd=str(tmp_path))
    assert shown.code == 0, shown.err
    answers = run_program('predict.py', tmp_path / 'dog.jpg', '--checkpoint', trained[0] / 'model_best.pth.tar').out.splitlines()[1:]
    assert [line.split()[-1] for line in shown.out.splitlines()] == [line.split()[-1] for line in answers]


def test_the_page_of_an_evaluation_counts_each_image_once(trained):
    content = (trained[0] / 'page' / 'index.html').read_text(encoding='utf-8')
    acc1 = float(trained[1].accuracy()[0])
    assert '<b>{:.2f} %</b>Acc@1'.format(acc1) in content
    wrong = round(359 * (100 - acc1) / 100)
    assert '<b>{}</b>wrong of 359'.format(wrong) in content
    assert content.count('<figure>') == min(wrong, 24) and content.count('data:image/png') == min(wrong, 24)
    numbers = [int(number) for number in re.findall(r'answered as \d: (\d+)</title>', content)]
    assert len(numbers) == 100 and sum(numbers) == 359 and sum(numbers[::11]) == 359 - wrong
    assert '<polyline' in content and 'http' not in content
