# SPDX-License-Identifier: BSD-3-Clause
"""Which device, backend and precision is chosen, and what the step does with losses and gradients."""
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import accelerator
import main
from conftest import REPOSITORY

HERE = os.path.dirname(os.path.abspath(__file__))


def in_fresh_python(code, **env):
    """Run code in a process of its own, since a backend cannot be taken back. Returns its standard output."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([REPOSITORY, HERE]))
    environment.update(env)
    finished = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


CONTROL_PLANE = '''
    import npu_backend
    npu = npu_backend.register(bf16={bf16})
    import accelerator, main, torch
    args = main.parse_args({flags})
    accelerator.choose(args)
    main.settle_processes(args)
    print(args.device, args.device_list, args.dist_backend, args.precision, args.processes)
    index = args.device_list[-1]
    if hasattr(torch, 'accelerator'):
        device = accelerator.Accelerator(args, index, processes=args.processes)
        print(device.device, device.memory_format, npu.calls, npu.config.allow_internal_format, device.name())
        with device.autocast():
            print(torch.is_autocast_enabled('npu'), torch.get_autocast_dtype('npu'))
'''


@pytest.mark.skipif(not hasattr(torch, 'accelerator'), reason='torch before 2.6 registers no backend from Python')
def test_control_plane_of_a_registered_npu_that_computes_nothing():
    lines = in_fresh_python(CONTROL_PLANE.format(
        bf16=False, flags=['--amp', '--multiprocessing-distributed', '-b', '2048']))
    assert lines[0] == 'npu [0, 1, 2, 3, 4, 5, 6, 7] hccl fp16 8'
    assert lines[1] == "npu:7 torch.contiguous_format ['set_device 7', 'jit_compile False'] True no NPU, a recorder"
    assert lines[2] == 'True torch.float16'
    lines = in_fresh_python(CONTROL_PLANE.format(bf16=True, flags=['--amp', '--gpu', '1', '--device-list', '4,5']))
    assert lines[0] == 'npu [5] hccl bf16 1' and lines[1].startswith('npu:5 ') and lines[2] == 'True torch.bfloat16'


@pytest.mark.skipif(hasattr(torch, 'accelerator'), reason='this torch registers a backend, see the test above')
def test_choice_of_a_double_of_the_npu_module_on_old_torch():
    lines = in_fresh_python(CONTROL_PLANE.format(bf16=False, flags=['--multiprocessing-distributed', '-b', '2048']))
    assert lines[-1] == 'npu [0, 1, 2, 3, 4, 5, 6, 7] hccl fp32 8'


def test_a_double_of_apex_is_called_as_apex_documents_it(tmp_path):
    """A double of Ascend's apex.amp that scales for real: the calls, and the unscaled gradients it leaves."""
    (tmp_path / 'apex').mkdir()
    (tmp_path / 'apex' / '__init__.py').write_text('')
    (tmp_path / 'apex' / 'amp.py').write_text(textwrap.dedent('''
        import contextlib
        calls = []

        def initialize(model, optimizer, **options):
            calls.append(options)
            return model, optimizer

        def master_params(optimizer):
            return (parameter for group in optimizer.param_groups for parameter in group['params'])

        @contextlib.contextmanager
        def scale_loss(loss, optimizer):
            yield loss * 8
            for parameter in master_params(optimizer):
                parameter.grad.div_(8)
    '''))
    lines = in_fresh_python('''
        import types, torch, accelerator
        from apex import amp
        accelerator._has_autocast = lambda runtime: False
        flags = types.SimpleNamespace(device='cpu', precision='fp16', opt_level='O2', deterministic=False, lr=0.5,
                                      momentum=0.9, weight_decay=0.0, loss_scale_value=8.0, clip_grad_norm=None,
                                      ema_decay=0.0)
        device = accelerator.Accelerator(flags, 0, processes=1)
        model, scaler = device.prepare_training(torch.nn.Linear(2, 1, bias=False), flags)
        before = model.weight.detach().clone()
        with device.autocast():
            loss = model(torch.tensor([[1.0, 3.0]])).sum()
        scaler.backward(loss)
        scaler.step()
        print(amp.calls)
        print((before - model.weight.detach()).tolist())
    ''', PYTHONPATH=os.pathsep.join([REPOSITORY, str(tmp_path)]))
    assert lines[0] == "[{'opt_level': 'O2', 'loss_scale': 8.0, 'verbosity': 0}]"
    assert eval(lines[1]) == [[pytest.approx(0.5), pytest.approx(1.5)]]


# --- the step ---------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).mean((2, 3)))


def build(*flags, precision='fp32', **changes):
    """(device, model, scaler) of a small network on the CPU."""
    args = main.parse_args(['--device', 'cpu', *flags])
    args.precision = precision
    vars(args).update(changes)
    device = accelerator.Accelerator(args, 0, processes=1)
    torch.manual_seed(0)
    return (device,) + device.prepare_training(Net(), args)


def batch():
    return torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def step(device, model, scaler, factor=1.0):
    images = batch() * factor
    with device.autocast():
        logits = model(images.to(device.half) if device.half_weights else images)
    loss = logits.float().pow(2).mean()
    scaler.backward(loss)
    scaler.step()
    return loss.item()


def parameters(model):
    return [value.detach().clone() for value in model.state_dict().values()]


def test_a_step_is_torchs_own_sgd():
    device, model, scaler = build('--lr', '0.1', '--wd', '0.01')
    torch.manual_seed(0)
    other = Net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        step(device, model, scaler)
        optimizer.zero_grad()
        other(batch()).pow(2).mean().backward()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), other.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize('scale', [8.0, 'dynamic'])
def test_a_loss_scale_changes_nothing_but_rounding(scale):
    plain, scaled = build('--lr', '0.1'), build('--lr', '0.1')
    device, model, _ = scaled
    masters = [parameter for parameter in model.parameters()]
    scaler = accelerator.Scaler(model, masters, device._build_sgd(masters, lr=0.1, momentum=0.9, weight_decay=1e-4),
                                device.device, loss_scale=scale)
    for _ in range(3):
        assert step(*plain) == pytest.approx(step(device, model, scaler), abs=1e-6)
    for mine, theirs in zip(plain[1].parameters(), model.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('first', [True, False], ids=['first step', 'later step'])
def test_a_step_that_is_not_finite_changes_nothing(bad, first):
    device, model, scaler = build('--lr', '0.1')
    if not first:
        step(device, model, scaler)
    before, momentum = parameters(model), scaler.optimizer_state_dict()['state']
    momentum = {key: value['momentum_buffer'].clone() for key, value in momentum.items()}
    step(device, model, scaler, factor=bad)
    for mine, old, name in zip(parameters(model), before, model.state_dict()):
        assert torch.equal(mine, old), name
    for key, value in scaler.optimizer_state_dict()['state'].items():
        assert torch.equal(value['momentum_buffer'], momentum.get(key, torch.zeros_like(value['momentum_buffer'])))
    assert scaler.read_longest_skip() == 1
    step(device, model, scaler)
    assert not torch.equal(parameters(model)[0], before[0])
    assert scaler.read_longest_skip() <= 1 and scaler.read_longest_skip() == 0


def test_the_dynamic_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    device, model, _ = build()
    masters = list(model.parameters())
    scaler = accelerator.Scaler(model, masters, device._build_sgd(masters, lr=0.0, momentum=0.9, weight_decay=0.0),
                                device.device, loss_scale='dynamic')
    step(device, model, scaler, factor=float('inf'))
    assert scaler.state_dict()['loss_scale'] == 32768
    scaler.good_steps.fill_(1999)
    step(device, model, scaler)
    assert scaler.state_dict()['loss_scale'] == 65536 and scaler.state_dict()['good_steps'] == 0


def test_the_dynamic_scale_goes_on_from_a_checkpoint_bit_for_bit():
    """An overflow before the checkpoint and a growth after it: scale, counts, momentum and weights of the whole run."""
    def fresh():
        device, model, _ = build()
        masters = list(model.parameters())
        scaler = accelerator.Scaler(model, masters, device._build_sgd(masters, lr=0.1, momentum=0.9, weight_decay=1e-4),
                                    device.device, loss_scale='dynamic', clip_grad_norm=1.0)
        scaler.GROWTH_INTERVAL = 3
        return device, model, scaler

    factors = [1, float('inf'), 1, 1, 1, 1, float('nan'), float('nan'), 1, 1]
    whole, part = fresh(), fresh()
    for factor in factors:
        step(*whole, factor=factor)
    for number, factor in enumerate(factors):
        step(*part, factor=factor)
        state = part[1].state_dict(), part[2].optimizer_state_dict(), part[2].state_dict()
        if number in (3, 6):  # in the middle of growing, and of a run of skips
            part = fresh()
            part[1].load_state_dict(state[0])
            part[2].load_optimizer_state(state[1])
            part[2].load_state_dict(state[2])
    assert whole[2].state_dict() == part[2].state_dict() and whole[2].state_dict()['loss_scale'] == 65536 / 2 * 2 / 4
    for mine, theirs in zip(whole[1].parameters(), part[1].parameters()):
        assert torch.equal(mine, theirs)


def test_clipping_limits_the_norm_of_the_change():
    device, model, scaler = build('--lr', '1', '--wd', '0', '--momentum', '0', '--clip-grad-norm', '0.001')
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(device, model, scaler)
    change = sum((mine.detach() - old).pow(2).sum() for mine, old in zip(model.parameters(), before)).sqrt()
    assert change.item() == pytest.approx(0.001, rel=1e-3)


needs_bf16 = pytest.mark.skipif(accelerator.TORCH < (2, 1), reason='bf16 on a CPU as tested here needs torch 2.1')


@needs_bf16
@pytest.mark.parametrize('level, tolerance', [('O1', 2e-2), ('O2', 2e-2), ('O3', 6e-2)])
def test_bf16_follows_fp32(level, tolerance):
    """Weights after five steps, relative to how far fp32 moved them."""
    exact = build('--lr', '0.1')
    half = build('--lr', '0.1', '--opt-level', level, precision='bf16')
    start = [parameter.detach().clone() for parameter in exact[1].parameters()]
    for _ in range(5):
        step(*exact), step(*half)
    moved = sum((mine.detach() - old).pow(2).sum() for mine, old in zip(exact[1].parameters(), start)).sqrt()
    saved = half[2].model_state_dict(half[1])
    apart = sum((saved[name].float() - mine.detach()).pow(2).sum() for name, mine in exact[1].named_parameters()).sqrt()
    assert apart / moved < tolerance * 5, (apart, moved)
    assert all(value.dtype in (torch.float32, torch.int64) for value in saved.values())


@needs_bf16
def test_o2_holds_half_weights_fp32_batch_norm_and_fp32_masters():
    device, model, scaler = build('--opt-level', 'O2', '--lr', '1e-5', precision='bf16')
    assert model.conv.weight.dtype == torch.bfloat16 and model.norm.weight.dtype == torch.float32
    before = scaler.model_state_dict(model)['conv.weight'].clone()
    step(device, model, scaler)
    after = scaler.model_state_dict(model)['conv.weight']
    # A change too small for bf16 is kept in the masters.
    assert after.dtype == torch.float32 and not torch.equal(before, after)
    device, model, scaler = build('--opt-level', 'O3', precision='bf16')
    assert model.norm.weight.dtype == torch.bfloat16


def test_every_flag_that_old_torch_cannot_honour_is_refused_in_one_line():
    args = main.parse_args(['--device', 'cpu', '--amp'])
    if accelerator.TORCH < (1, 10):
        with pytest.raises(accelerator.Unavailable, match='--amp on a CPU needs torch 1.10'):
            accelerator.choose(args)
    else:
        accelerator.choose(args)
        assert args.precision in ('bf16', 'fp32')
    args = main.parse_args(['--device', 'cpu', '--deterministic'])
    if accelerator.TORCH < (1, 8):
        with pytest.raises(accelerator.Unavailable, match='--deterministic needs torch 1.8'):
            accelerator.choose(args)
    else:
        accelerator.choose(args)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_batches_copied_beside_a_busy_gpu_arrive_whole():
    """Each batch is used behind a matrix product that takes longer than its copy, and dropped at once."""
    args = main.parse_args(['--device', 'gpu'])
    accelerator.choose(args)
    device = accelerator.Accelerator(args, 0, processes=1)
    busy, sums = torch.randn(4096, 4096, device=device.device), []
    for number in range(40):
        pictures = device.to_device(torch.full((64, 224, 224, 3), number, dtype=torch.uint8).pin_memory())
        busy = (busy @ busy).clamp(-1, 1)
        sums.append(pictures.sum())
        del pictures
    assert [total.item() for total in sums] == [number * 64 * 224 * 224 * 3 for number in range(40)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@pytest.mark.parametrize('dtype', ['fp16', 'bf16'])
@pytest.mark.parametrize('level', ['O0', 'O1', 'O2', 'O3'])
def test_training_and_resuming_on_a_gpu(tmp_path, level, dtype):
    from conftest import run
    flags = ['--device', 'gpu', '--arch', 'vgg11', '-b', 32, '--lr', 0.01, '--amp', '--opt-level', level, '--amp-dtype', dtype,
             '--output-dir', tmp_path]
    command = [sys.executable, os.path.join(REPOSITORY, 'main.py')]
    assert run(*command, *flags, '--stop-step-num', 5).code == 0
    result = run(*command, *flags, '--stop-step-num', 20, '--resume', tmp_path / 'checkpoint.pth.tar')
    assert result.code == 0, result.err
    loss = float([line for line in result.out.splitlines() if line.startswith('Epoch')][-1].split('(')[3].split(')')[0])
    assert loss < 2.5
