# SPDX-License-Identifier: BSD-3-Clause
"""main.py through its command line: training, evaluating, resuming, and the shapes of what it prints and writes."""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import accelerator
import checkpoint
import main
from conftest import MAIN, SMALL_MAIN, events, make_folder, run, run_main
from test_images import write_cifar10

SMALL = ['--arch', 'vgg11', '--image-size', '32', '--lr', '0.01']
EPOCH_LINE = re.compile(r'^Epoch: \[\d+\]\[ *\d+/\d+\]\tTime [ \d.]{6} \([ \d.]{6}\)\tData [ \d.]{6} \([ \d.]{6}\)\t'
                        r'Loss \d+\.\d{4} \(\d+\.\d{4}\)\tAcc@1 [ \d.]{6} \([ \d.]{6}\)\tAcc@5 [ \d.]{6} \([ \d.]{6}\)$')
TEST_LINE = re.compile(EPOCH_LINE.pattern.replace(r'Epoch: \[\d+\]', 'Test: '))
TWO = ['--multiprocessing-distributed', '--device-list', '0,1']


def weights(path):
    return checkpoint.load(str(path))['state_dict']


def assert_same_weights(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    """Two epochs on the folder of JPEGs: (output folder, result)."""
    output = tmp_path_factory.mktemp('out put')
    result = run_main(folder, *SMALL, '-b', 8, '--epochs', 2, '-p', 2, '--output-dir', output, '--label-smoothing', 0.1,
                      '--warmup-epochs', 1, '--clip-grad-norm', 1)
    assert result.code == 0, result.err
    return output, result


def test_the_recipes_are_the_papers_formulas():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(7, 10, generator=generator), torch.arange(7)
    smooth = torch.full((7, 10), 0.1 / 10).scatter_add(1, target.unsqueeze(1), torch.full((7, 1), 0.9))
    for smoothing, wanted in ((0.0, torch.eye(10)[:7]), (0.1, smooth)):
        expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
        assert torch.allclose(main.cross_entropy(logits, target, smoothing), expected, atol=1e-6)
    args = main.parse_args(['--epochs', '10', '--lr', '0.08', '--min-lr', '0.01', '--warmup-epochs', '3'])
    rates = [main.learning_rate(epoch, args) for epoch in range(10)]
    assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08]) and rates == rates[:3] + sorted(rates[3:], reverse=True)
    assert rates[9] == pytest.approx(0.01 + 0.07 * 0.5 * (1 + math.cos(math.pi * 6 / 7)))


def test_lines_have_the_shapes_that_others_parse(trained):
    lines = trained[1].out.splitlines()
    epoch_lines = [line for line in lines if line.startswith('Epoch')]
    test_lines = [line for line in lines if line.startswith('Test')]
    assert epoch_lines and all(EPOCH_LINE.match(line) for line in epoch_lines), epoch_lines
    assert test_lines and all(TEST_LINE.match(line) for line in test_lines), test_lines
    assert epoch_lines[-1].startswith('Epoch: [1][3/3]\t')
    assert len([line for line in lines if re.match(r'^\[npu id: 0 \] \* FPS@all \d+\.\d{3}$', line)]) == 2
    assert len([line for line in lines
                if re.match(r'^\[npu id: 0 \] \[AVG-ACC\] \* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}$', line)]) == 2


def test_output_folder_holds_everything(trained):
    output = trained[0]
    names = set(os.listdir(str(output)))
    assert {'checkpoint.pth.tar', 'checkpoint.pth.tar.previous', 'model_best.pth.tar', 'args.json', 'metrics.jsonl'} <= names
    record = json.loads((output / 'args.json').read_text())
    assert record['flags']['arch'] == 'vgg11' and record['torch'] == torch.__version__
    kinds = [event['event'] for event in events(output)]
    assert kinds[0] == 'start' and kinds[-1] == 'done' and kinds.count('epoch') == kinds.count('validate') == 2
    validated = events(output, 'validate')[-1]
    assert validated['samples'] == 15 and validated['acc1'] == pytest.approx(float(trained[1].accuracy()[0]), abs=5e-4)


def test_curves_are_drawn_where_matplotlib_is_installed(trained):
    pytest.importorskip('matplotlib')
    assert (trained[0] / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_checkpoint_has_the_references_keys_and_loads_into_torchvision(folder, tmp_path):
    import torchvision
    assert run_main(folder, *SMALL, '-b', 8, '--epochs', 1, '--output-dir', tmp_path, program=MAIN).code == 0
    state = checkpoint.load(str(tmp_path / 'checkpoint.pth.tar'))
    assert {'epoch', 'state_dict', 'best_acc1', 'optimizer', 'amp'} <= set(state) and state['epoch'] == 1
    torchvision.models.vgg11(num_classes=3).load_state_dict(state['state_dict'])
    network = torchvision.models.vgg11(num_classes=3)
    torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).load_state_dict(state['optimizer'])


def test_validation_is_exact_for_any_processes_and_batch(folder37, tmp_path):
    """37 images: the counts of torchvision's own pipeline, from 1, 2 and 3 processes and several batch sizes."""
    import numpy as np
    import torchvision
    from torchvision import transforms
    torch.manual_seed(3)
    network = torchvision.models.vgg11(num_classes=2)
    torch.nn.init.normal_(network.classifier[6].weight, 0, 0.1)
    path = str(tmp_path / 'weights.pth')
    torch.save(network.state_dict(), path)
    data = torchvision.datasets.ImageFolder(os.path.join(folder37, 'val'), transforms.Compose([
        transforms.Resize(round(48 * 256 / 224)), transforms.CenterCrop(48), transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]))
    assert len(data) == 37
    with torch.no_grad():
        logits = network.eval()(torch.stack([image for image, _ in data]))
    right = int((logits.argmax(1).numpy() == np.array(data.targets)).sum())
    assert 0 < right < 37
    only_val = tmp_path / 'only val'
    only_val.mkdir()
    shutil.copytree(os.path.join(folder37, 'val'), str(only_val / 'val'))
    common = [only_val, '-e', '--arch', 'vgg11', '--pretrained', path, '--image-size', 48, '--output-dir', tmp_path / 'o']
    for flags in (['-b', 7], ['-b', 1], ['-b256', '-j', 2], ['-b', 8] + TWO,
                  ['-b', 9, '--multiprocessing-distributed', '--device-list', '0,1,2']):
        result = run_main(*common, *flags, program=MAIN)
        assert result.code == 0, result.err
        assert result.accuracy() == ('{:.3f}'.format(100 * right / 37), '100.000'), flags


@pytest.mark.parametrize('extra', [['--amp', '--ema-decay', '0.9'], TWO + ['--ema-decay', '0.9', '--arch', 'vgg11_bn'], TWO],
                         ids=['one process, amp, averages', 'two processes, averages', 'two processes'])
def test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit(folder, tmp_path, extra):
    if '--amp' in extra and not hasattr(torch, 'autocast'):
        pytest.skip('this torch has no mixed precision on a CPU')
    flags = [folder, *SMALL, '-b', 6, '--epochs', 2, *extra]  # 4 steps an epoch
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert run_main(*flags, '--output-dir', whole).code == 0
    for stop, workers in ((2, 0), (100, 2)):
        resume = ['--resume', parts / 'checkpoint.pth.tar'] if stop > 2 else []
        result = run_main(*flags, '--output-dir', parts, '--stop-step-num', stop, '-j', workers, *resume)
        assert result.code == 0, result.err
    first, second = (checkpoint.load(str(path / 'checkpoint.pth.tar')) for path in (whole, parts))
    assert_same_weights(first['state_dict'], second['state_dict'])
    assert ('state_dict_ema' in first) == ('--ema-decay' in extra)
    if '--ema-decay' in extra:
        assert_same_weights(first['state_dict_ema'], second['state_dict_ema'])
        assert not torch.equal(first['state_dict_ema']['classifier.6.bias'], first['state_dict']['classifier.6.bias'])
    for position, entry in first['optimizer']['state'].items():
        assert torch.equal(entry['momentum_buffer'], second['optimizer']['state'][position]['momentum_buffer'])
    assert (first['epoch'], first['step'], first['best_acc1']) == (second['epoch'], second['step'], second['best_acc1'])


def test_a_compiled_run_continues_bit_for_bit(tmp_path):
    if accelerator.TORCH < (2, 0):
        pytest.skip('torch.compile came with torch 2')
    flags = ['--arch', 'vgg11', '-b', 64, '--compile']
    environment = {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'compiled')}
    probe = run_main(*flags, '--stop-step-num', 4, '--output-dir', tmp_path / 'whole', env=environment)
    if 'leave it out' in probe.err:
        pytest.skip(probe.err)  # no C++ compiler, or no headers of Python
    assert probe.code == 0, probe.err
    for stop, resume in ((2, []), (4, ['--resume', tmp_path / 'parts' / 'checkpoint.pth.tar'])):
        result = run_main(*flags, '--stop-step-num', stop, '--output-dir', tmp_path / 'parts', *resume, env=environment)
        assert result.code == 0, result.err
    assert_same_weights(*(checkpoint.load(str(tmp_path / name / 'checkpoint.pth.tar'))['state_dict']
                          for name in ('whole', 'parts')))


def test_loader_workers_overwrite_no_batch_that_is_still_needed(tmp_path):
    states = []
    for workers in (0, 1):
        output = tmp_path / str(workers)
        result = run_main('-b', 64, '--epochs', 1, '-j', workers, '--output-dir', output)  # 22 steps, 6 batches to validate
        assert result.code == 0, result.err
        states.append(checkpoint.load(str(output / 'checkpoint.pth.tar')))
    assert_same_weights(states[0]['state_dict'], states[1]['state_dict'])
    assert states[0]['best_acc1'] == states[1]['best_acc1']


def test_stop_step_num_ends_cleanly_without_validation(folder, tmp_path):
    result = run_main(folder, *SMALL, '-b', 6, '--stop-step-num', 3, '--output-dir', tmp_path)
    assert result.code == 0 and 'FPS@all' in result.out and 'AVG-ACC' not in result.out
    state = checkpoint.load(str(tmp_path / 'checkpoint.pth.tar'))
    assert (state['epoch'], state['step_in_epoch'], state['step']) == (0, 3, 3)


@pytest.mark.parametrize('target', ['launcher', 'alone'])
def test_a_signal_saves_and_ends_with_75(folder, tmp_path, target):
    processes = TWO if target == 'launcher' else []
    command = [sys.executable, '-u', SMALL_MAIN, '--device', 'cpu', folder, *SMALL, '-b', '6',
               '--epochs', '1000', '--eval-freq', '1000', '-p', '1', *processes, '--output-dir', str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    for line in child.stdout:
        if line.startswith('Epoch'):
            break
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=120)
    assert child.returncode == 75
    state = checkpoint.load(str(tmp_path / 'checkpoint.pth.tar'))
    assert state['step'] >= 1
    result = run_main(folder, *SMALL, '-b', 6, *processes, '--epochs', 1000, '--auto-resume', '--stop-step-num',
                      state['step'] + 1, '--output-dir', tmp_path)
    assert result.code == 0 and 'resuming' in result.out
    assert checkpoint.load(str(tmp_path / 'checkpoint.pth.tar'))['step'] == state['step'] + 1


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stalls_ends_the_others_in_time(folder, tmp_path, number):
    """Two nodes by hand, each its own launcher, so that only the network tells of the death."""
    command = [sys.executable, '-u', SMALL_MAIN, '--device', 'cpu', folder, *SMALL, '-b', '3',
               '--epochs', '1000', '--eval-freq', '1000', '-p', '1', '--world-size', '2', '--dist-url',
               'tcp://127.0.0.1:{}'.format(free_port())]
    children = [subprocess.Popen(command + ['--rank', str(rank), '--output-dir', str(tmp_path / str(rank))],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True) for rank in (0, 1)]
    try:
        for line in children[0].stdout:
            if line.startswith('Epoch'):
                break
        children[1].send_signal(number)
        begin = time.monotonic()
        said = children[0].communicate(timeout=60)[1]
        assert children[0].returncode not in (0, 75) and time.monotonic() - begin < 60
        assert said.startswith('main.py: error: rank 1 has ended, is stopped or cut off') and len(said.splitlines()) == 1, said
    finally:
        children[1].kill()
        children[1].communicate()


def test_auto_resume_falls_back_to_the_checkpoint_before_and_says_so(folder, tmp_path):
    flags = [folder, *SMALL, '-b', 6, '--epochs', 3, '--output-dir', tmp_path, '--auto-resume', '--eval-freq', 9]
    assert run_main(*flags, '--stop-step-num', 4).code == 0
    assert run_main(*flags, '--stop-step-num', 5).code == 0
    path = tmp_path / 'checkpoint.pth.tar'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    result = run_main(*flags, '--stop-step-num', 5)
    assert result.code == 0 and 'SHA-256' in result.err and "resuming from '{}.previous'".format(path) in result.out
    assert checkpoint.load(str(path))['step'] == 5


def test_cifar10_trains_and_is_evaluated_on_two_processes(tmp_path):
    write_cifar10(tmp_path / 'cifar', binary=False, count=20)
    flags = [tmp_path / 'cifar', '--arch', 'vgg11', *TWO, '--output-dir', tmp_path / 'o']
    result = run_main(*flags, '-b', 50, '--epochs', 1, '--stop-step-num', 2)
    assert result.code == 0, result.err
    result = run_main(*flags, '-e', '--resume', tmp_path / 'o' / 'checkpoint.pth.tar')
    assert result.code == 0, result.err
    assert events(tmp_path / 'o', 'validate')[-1]['samples'] == 20


def test_a_checkpoint_of_the_reference_resumes(folder, tmp_path):
    """Names with module. and fc1…, momentum by position, apex's state under amp, the format of torch < 1.6."""
    import vgg
    torch.manual_seed(5)
    network = vgg.VGG('vgg11', 3)
    names = {'classifier.0': 'fc1', 'classifier.3': 'fc2', 'classifier.6': 'fc3'}
    renamed = {}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition('.')
        renamed['module.{}.{}'.format(names.get(layer, layer), kind)] = value
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    path = str(tmp_path / 'reference.pth.tar')
    torch.save({'epoch': 1, 'arch': 'vgg11', 'state_dict': renamed, 'best_acc1': torch.tensor(12.5),
                'optimizer': optimizer.state_dict(), 'amp': {'loss_scaler0': {'loss_scale': 8.0, 'unskipped': 3}}},
               path, _use_new_zipfile_serialization=False)
    result = run_main(folder, *SMALL, '-b', 8, '--epochs', 2, '--resume', path, '--output-dir', tmp_path, program=MAIN)
    assert result.code == 0, result.err
    assert 'Epoch: [1]' in result.out and 'Epoch: [0]' not in result.out
    assert checkpoint.load(str(tmp_path / 'checkpoint.pth.tar'))['best_acc1'] >= 12.5


def test_pretrained_weights_of_other_classes_get_a_new_last_layer(trained, tmp_path):
    result = run_main('--arch', 'vgg11', '--pretrained', trained[0] / 'model_best.pth.tar', '-b', 64, '--stop-step-num', 1,
                      '--output-dir', tmp_path)
    assert result.code == 0, result.err
    assert 'classifier.6.weight: 3 classes' in result.out and '10 here: initialised anew' in result.out
    new, old = weights(tmp_path / 'checkpoint.pth.tar'), weights(trained[0] / 'model_best.pth.tar')
    assert new['classifier.6.weight'].shape[0] == 10
    assert torch.allclose(new['features.0.weight'], old['features.0.weight'], atol=0.02)


def test_torchrun_runs_the_same_program(folder, tmp_path):
    pytest.importorskip('torch.distributed.run')
    result = run(sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', 2, '--master-port', free_port(),
                 SMALL_MAIN, folder, '--device', 'cpu', *SMALL, '-b', 6, '--epochs', 1,
                 '--output-dir', tmp_path)
    assert result.code == 0, result.err
    assert result.out.count('FPS@all') == 1
    state = checkpoint.load(str(tmp_path / 'checkpoint.pth.tar'))
    other = tmp_path / 'spawned'
    assert run_main(folder, *SMALL, '-b', 6, '--epochs', 1, *TWO, '--output-dir', other).code == 0
    assert_same_weights(state['state_dict'], weights(other / 'checkpoint.pth.tar'))


def test_processes_started_by_hand_meet(folder, tmp_path):
    command = [sys.executable, SMALL_MAIN, '--device', 'cpu', folder, *SMALL, '-b', '3', '--epochs',
               '1', '--world-size', '2', '--dist-url', 'tcp://127.0.0.1:{}'.format(free_port())]
    children = [subprocess.Popen(command + ['--rank', str(rank), '--output-dir', str(tmp_path / str(rank))],
                                 stdout=subprocess.PIPE, universal_newlines=True) for rank in (0, 1)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert all('FPS@all' in output for output in outputs)
    assert (tmp_path / '0' / 'checkpoint.pth.tar').exists() and not (tmp_path / '1' / 'checkpoint.pth.tar').exists()


def free_port():
    from processes import free_port
    return str(free_port())


def test_dummy_measures_without_data(tmp_path):
    result = run_main('--dummy', 100, '--arch', 'vgg11', '--image-size', 32, '-b', 8, '--stop-step-num', 12,
                      '--output-dir', tmp_path)
    assert result.code == 0 and 'FPS@all' in result.out


def test_non_finite_steps_are_not_applied_and_ten_stop_the_run(folder, tmp_path):
    flags = [folder, *SMALL, '-b', 2, '--output-dir', tmp_path, '--epochs', 3]
    assert run_main(*flags, '--stop-step-num', 1).code == 0
    path = tmp_path / 'checkpoint.pth.tar'
    before = path.read_bytes()
    # Step 2 is finite and ruins the weights; the saves at 3, 6 and 9 must not follow it, nor wait for a log line.
    result = run_main(*flags, '--lr', '1e30', '--resume', path, '-p', 1000, '--save-freq', 3)
    assert result.code == 1 and 'not finite' in result.err and 'Traceback' not in result.err
    assert result.out.count('no checkpoint at step') == 3 and path.read_bytes() == before


def small(*flags):
    """main.py with a small network, started and not waited for."""
    return subprocess.Popen([sys.executable, '-u', SMALL_MAIN, '--arch', 'vgg11',
                             '--device', 'cpu', *(str(flag) for flag in flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True)


def children_of(pid):
    with open('/proc/{0}/task/{0}/children'.format(pid)) as file:
        return [int(word) for word in file.read().split()]


def alive(pid):
    with contextlib.suppress(OSError):
        with open('/proc/{}/stat'.format(pid)) as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    return False


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc tells who lives')
@pytest.mark.parametrize('victim', ['loader worker', 'parent'])
def test_a_killed_loader_worker_is_one_line_and_no_process_is_left(tmp_path, victim):
    """The workers ignore SIGTERM, so who waited for them as multiprocessing does would wait for ever."""
    parent = small('-b', 32, '-j', 2, '--epochs', 100000, '--eval-freq', 100000, '-p', 1, '--output-dir', tmp_path)
    for line in parent.stdout:
        if line.startswith('Epoch'):
            break
    workers = children_of(parent.pid)
    assert len(workers) == 2
    os.kill(parent.pid if victim == 'parent' else workers[1], signal.SIGKILL)
    said = parent.communicate(timeout=60)[1]
    if victim == 'loader worker':
        assert parent.returncode == 1 and said.startswith('main.py: error: a loader worker has ended'), said
        assert len(said.splitlines()) == 1
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, 'orphans'
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc tells who has been started')
def test_a_signal_to_a_job_that_is_starting_ends_it_with_75(tmp_path):
    """The processes of the ranks are still importing torch: they have nothing to save and nothing to say."""
    launcher = small('--output-dir', tmp_path, *TWO)
    try:
        while len(children_of(launcher.pid)) < 2:  # one of them is multiprocessing's own
            time.sleep(0.01)
        ranks = children_of(launcher.pid)[1:]
        launcher.send_signal(signal.SIGTERM)
        said = launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 75 and said == '' and not any(map(alive, ranks))
    assert not (tmp_path / 'checkpoint.pth.tar').exists()


# --- wrong use --------------------------------------------------------------------------------------------------------

WRONG = [
    (['--no-such-flag'], 'no-such-flag'), (['--epoch', '3'], '--epoch'), (['-b', '0'], 'out of range'),
    (['-b', 'many'], 'whole number'), (['--lr', 'nan'], 'out of range'), (['/no/such/folder'], '/no/such/folder'),
    (['--resume', '/no/such/file'], '/no/such/file'), (['-e'], '--resume PATH'), (['--device', 'npu'], 'NPU'),
    (['--device', 'gpu'], 'GPU'), (['-b', '7', *TWO], 'use 6 or 8'), (['--arch', 'resnet50'], 'resnet50'),
    (['--rank', '5', '--world-size', '2'], '--rank 5'), (['--warmup-epochs', '90'], '--warmup-epochs'),
    (['--amp', '--amp-dtype', 'fp16'], 'bf16' if hasattr(torch, 'autocast') else '1.10'), (['--device-list', '0,0'], 'twice'), (['--dist-url', 'nonsense'], 'tcp://'),
    (['-j', '-1'], 'out of range'), (['--grad-compress', 'int8'], 'int8'),
]
if accelerator.TORCH < (2, 0):
    WRONG += [(['--compile'], '--compile needs torch 2.0'), (['--grad-compress', 'bf16'], '--grad-compress needs torch 2.0')]
if not hasattr(torch, 'profiler'):
    WRONG += [(['--profile'], '--profile needs torch 1.8.1')]


@pytest.mark.parametrize('flags, word', WRONG, ids=[' '.join(flags) for flags, _ in WRONG])
def test_wrong_use_is_one_line_and_exit_2(tmp_path, capsys, flags, word):
    if flags == ['--device', 'gpu'] and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    try:
        code = main.main((['--device', 'cpu'] if '--device' not in flags else []) + flags + ['--output-dir', str(tmp_path)])
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr().err
    assert code == 2 and len(said.splitlines()) == 1 and word in said, said


def test_bad_data_and_bad_checkpoints_are_one_line_and_exit_2(folder, trained, tmp_path):
    other = tmp_path / 'other classes'
    shutil.copytree(folder, str(other))
    (other / 'val' / 'class 2').rename(other / 'val' / 'class 9')
    empty = tmp_path / 'empty class'
    shutil.copytree(folder, str(empty))
    (empty / 'train' / 'nothing').mkdir()
    broken = tmp_path / 'broken image'
    shutil.copytree(folder, str(broken))
    (broken / 'train' / 'class 0' / '图 000.JPEG').write_bytes(b'no picture')
    no_val = tmp_path / 'no val'
    (no_val / 'train').mkdir(parents=True)
    damaged = tmp_path / 'damaged.pth.tar'
    damaged.write_bytes((trained[0] / 'checkpoint.pth.tar').read_bytes()[:10000])
    good = trained[0] / 'checkpoint.pth.tar'
    for flags, word in ((['-b', 5000], 'smaller --batch-size'), ([other], "'class 2' in train/ and 'class 9' in val/"), ([empty], 'nothing'),
                        ([broken], '图 000.JPEG'), ([broken, *TWO], '图 000.JPEG'), ([no_val], 'no val'),
                        ([folder, '--resume', damaged], 'damaged.pth.tar'),
                        ([folder, '--resume', damaged, *TWO], 'damaged.pth.tar'),
                        ([folder, '--resume', good, '--arch', 'vgg13'], 'vgg13'),
                        (['--resume', good], "'class 0' in the checkpoint")):
        result = run_main('--arch', 'vgg11', '--image-size', 32, '-b', 6, '--epochs', 1, '--output-dir', tmp_path / 'o', *flags)
        assert result.code == 2, (flags, result.out, result.err)
        assert len(result.err.splitlines()) == 1 and word in result.err, result.err


def test_help_is_quick_and_complete():
    begin = time.time()
    result = run(sys.executable, SMALL_MAIN, '--help')
    assert result.code == 0 and time.time() - begin < 20
    for flag in '''--data -j --j --workers --epochs --start-epoch -b --batch-size --lr --learning-rate --momentum --wd
            --weight-decay -p --p --print-freq --resume -e --e --evaluate --seed --gpu --gup --world-size --rank --dist-url
            --dist-backend --addr --amp --opt-level --loss-scale-value --device --stop-step-num --eval-freq
            --multiprocessing-distributed --device-list --arch --image-size --pretrained --amp-dtype --output-dir
            --warmup-epochs --clip-grad-norm --dummy --deterministic --compile --grad-compress --profile'''.split():
        assert re.search(r'(^|[\s\[,]){}[\s,\]]'.format(re.escape(flag)), result.out), flag


# --- pictures that cannot be read -------------------------------------------------------------------------------------

def spoil(folder):
    """Put one of each kind of bad file into the training folder, and one into the validation folder. Returns their names."""
    good = os.path.join(folder, 'train', 'class 0', '图 000.JPEG')
    with open(good, 'rb') as file:
        content = file.read()
    huge = content.replace(content[content.index(b'\xff\xc0'):][:9], b'\xff\xc0\x00\x11\x08\xff\xff\xff\xff')
    bad = {'train/class 0/cut off.JPEG': content[:len(content) // 2], 'train/class 0/空.jpg': b'', 'train/class 1/a\nb.png': b'text',
           'train/class 1/gigapixels.jpg': huge, 'train/class 2/half.webp': content[:9], 'val/class 2/坏.JPEG': content[:700]}
    for name, content in bad.items():
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(content)
    os.symlink('nowhere', os.path.join(folder, 'train', 'class 2', 'broken link.jpg'))
    os.mkdir(os.path.join(folder, 'train', 'class 2', 'a folder.jpg'))
    return list(bad) + ['train/class 2/broken link.jpg']


@pytest.mark.parametrize('flags', [[], TWO], ids=['one process', 'two'])
def test_bad_images_stop_the_run_or_are_left_out_and_named(tmp_path, flags):
    clean, spoilt = make_folder(tmp_path / 'clean'), make_folder(tmp_path / 'spoilt')
    bad = spoil(spoilt)
    same = ['--arch', 'vgg11', '--image-size', 32, '-b', 6, '--epochs', 1, *flags]
    stopped = run_main(spoilt, *same, '--output-dir', tmp_path / 'o')
    assert stopped.code == 2 and len(stopped.err.splitlines()) == 1 and '--bad-images skip' in stopped.err, stopped.err
    assert sum(os.path.basename(name).replace('\n', '\\n') in stopped.err for name in bad) == 1
    skipped = run_main(spoilt, *same, '--output-dir', tmp_path / 'skip', '--bad-images', 'skip')
    assert skipped.code == 0, skipped.err
    assert '24 to train on, 15 to validate on' in skipped.out and '7 pictures cannot be read' in skipped.out
    named = (tmp_path / 'skip' / 'bad_images.txt').read_text(encoding='utf-8').splitlines()
    assert sorted(line.split('\t')[0] for line in named) == sorted(
        os.path.join(spoilt, name).replace('\n', '\\n') for name in bad)
    # What is left is trained on as if the bad files had never been there.
    reference = run_main(clean, *same, '--output-dir', tmp_path / 'clean out')
    assert reference.accuracy() == skipped.accuracy()
    assert [line['loss'] for line in events(tmp_path / 'clean out', 'epoch')] == [line['loss'] for line in events(tmp_path / 'skip', 'epoch')]


def test_a_class_without_a_readable_picture_is_named(tmp_path):
    root = make_folder(tmp_path)
    for name in os.listdir(os.path.join(root, 'val', 'class 1')):
        with open(os.path.join(root, 'val', 'class 1', name), 'wb') as file:
            file.write(b'no picture')
    result = run_main(root, '--bad-images', 'skip', '--arch', 'vgg11', '-b', 6, '--output-dir', tmp_path / 'o')
    assert result.code == 2 and 'class 1: no readable picture' in result.err and len(result.err.splitlines()) == 1
