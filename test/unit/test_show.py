# SPDX-License-Identifier: BSD-3-Clause
"""What a trained network is for: averaged and frozen weights, predict.py, export.py, report.py, and the README's commands."""
import pytest
import torch

import accelerator
import checkpoint
import main
from conftest import run_main
from test_accelerator import build, needs_bf16, parameters, step
from test_main import SMALL, TWO, weights


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
