# SPDX-License-Identifier: BSD-3-Clause
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections import OrderedDict

import pytest
import torch

import checkpoint
from conftest import REPOSITORY


def save(state, path):
    writer = checkpoint.Writer()
    writer.save(state, path)
    error = writer.wait()
    if error is not None:
        raise error


def state():
    torch.manual_seed(0)
    weights = OrderedDict(a=torch.randn(4, 3).t(), b=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                          c=torch.arange(5), d=torch.tensor(3.5), e=torch.zeros(0, 4), f=torch.ones(3, dtype=torch.bfloat16))
    weights['shared'] = weights['a']
    weights['part'] = torch.arange(10.)[3:7]
    return {'epoch': 3, 'state_dict': weights, 'best_acc1': 12.5, 'classes': ['a', '图'], 'none': None,
            'optimizer': {'state': {0: {'momentum_buffer': torch.ones(2)}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}}


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other)
    else:
        assert first == second


def test_what_is_saved_is_loaded(tmp_path):
    path = str(tmp_path / 'x.pth.tar')
    save(state(), path)
    assert_same(checkpoint.load(path), state())
    assert sorted(os.listdir(str(tmp_path))) == ['x.pth.tar']


def test_torch_load_reads_it_with_weights_only(tmp_path):
    path = str(tmp_path / 'x.pth.tar')
    save(state(), path)
    options = {'weights_only': True} if 'weights_only' in torch.load.__code__.co_varnames else {}
    assert_same(torch.load(path, **options), state())


@pytest.mark.parametrize('zip_format', [False, True])
def test_files_of_torch_save_are_read(tmp_path, zip_format):
    path = str(tmp_path / 'x.pth')
    torch.save(state(), path, _use_new_zipfile_serialization=zip_format)
    assert_same(checkpoint.load(path), state())


def test_a_model_state_dict_with_its_metadata_is_read(tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save({'model': model.state_dict(), 'parameter': model.weight}, str(tmp_path / 'x.pth'))
    loaded = checkpoint.load(str(tmp_path / 'x.pth'))
    assert torch.equal(loaded['model']['weight'], model.weight) and torch.equal(loaded['parameter'], model.weight)


def test_the_file_before_is_kept(tmp_path):
    path = str(tmp_path / 'x.pth.tar')
    for epoch in range(3):
        save({'epoch': epoch}, path)
    assert checkpoint.load(path) == {'epoch': 2}
    assert checkpoint.load(path + '.previous') == {'epoch': 1}


def test_a_link_is_not_changed_by_the_next_save(tmp_path):
    path, best = str(tmp_path / 'x.pth.tar'), str(tmp_path / 'best.pth.tar')
    for epoch in range(3):
        save({'epoch': epoch}, path)
        if epoch < 2:
            checkpoint.link(path, best)
    assert checkpoint.load(best) == {'epoch': 1}


@pytest.mark.parametrize('format', ['ours', 'torch', 'legacy'])
def test_every_truncation_is_named(tmp_path, format):
    path = str(tmp_path / 'x')
    if format == 'ours':
        save(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=format == 'torch')
    content = open(path, 'rb').read()
    for part in range(100):
        with open(path, 'wb') as file:
            file.write(content[:len(content) * part // 100])
        with pytest.raises(checkpoint.BadCheckpoint, match=path):
            checkpoint.load(path)


def test_every_flipped_byte_is_named(tmp_path):
    path = str(tmp_path / 'x')
    save({'weights': torch.arange(50.)}, path)
    content = open(path, 'rb').read()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        with open(path, 'wb') as file:
            file.write(damaged)
        try:
            loaded = checkpoint.load(path)
        except checkpoint.BadCheckpoint:
            continue
        # A flip in the comment's own length or mark takes the digest away: then the parts' checksums must hold.
        assert position > len(content) - 100 and torch.equal(loaded['weights'], torch.arange(50.)), position


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


class WithState:
    """Code by way of __setstate__."""

    def __init__(self, canary):
        self.canary = canary

    def __setstate__(self, state):
        os.mkdir(state['canary'])


@pytest.mark.parametrize('kind', [Hostile, WithState])
@pytest.mark.parametrize('zip_format', [False, True])
def test_a_pickle_that_carries_code_runs_nothing(tmp_path, kind, zip_format):
    canary, path = str(tmp_path / 'canary'), str(tmp_path / 'x')
    torch.save({'state_dict': kind(canary)}, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(checkpoint.BadCheckpoint, match='refused, it carries code'):
        checkpoint.load(path)
    assert not os.path.exists(canary)


def test_a_torchscript_archive_is_refused(tmp_path):
    path = str(tmp_path / 'x.pt')
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(checkpoint.BadCheckpoint, match='TorchScript'):
        checkpoint.load(path)


def test_a_legacy_tar_is_refused(tmp_path):
    path, canary = str(tmp_path / 'x.tar'), str(tmp_path / 'canary')
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as archive:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            content = pickle.dumps(Hostile(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(checkpoint.BadCheckpoint, match='refused, it carries code.*tar'):
        checkpoint.load(path)
    assert not os.path.exists(canary)


@pytest.mark.parametrize('content', [b'', b'hello', b'\x80', b'\x80\x02}.', b'PK\x03\x04', b'PK\x05\x06' + bytes(18)])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / 'x'
    path.write_bytes(content)
    with pytest.raises(checkpoint.BadCheckpoint, match='x'):
        checkpoint.load(str(path))


def test_a_tensor_that_reaches_outside_its_storage_is_refused():
    storages = checkpoint._Storages(1000, lambda key, flat: None)
    flat = storages.get(torch.float32, '0', 10)
    for offset, size, stride in ((0, (11,), (1,)), (-1, (2,), (1,)), (0, (2, 2), (9, 1)), (0, (3,), (-1,)), (0, (-1,), (1,))):
        with pytest.raises(ValueError):
            checkpoint._tensor(flat, offset, size, stride)
    with pytest.raises(ValueError, match='more data'):
        storages.get(torch.float32, '1', 1 << 40)


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = str(tmp_path / 'x')
    save({'epoch': 1}, path)

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError):
        save({'epoch': 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {'epoch': 1}
    assert os.listdir(str(tmp_path)) == ['x']


def test_a_rename_that_fails_leaves_no_temporary_then_or_at_the_next_save(tmp_path, monkeypatch):
    """The first failure leaves `previous` as a second name of the file itself, over which rename does nothing."""
    path, rename = str(tmp_path / 'x'), os.replace
    save({'epoch': 1}, path)

    def full(source, target):
        if target == path:
            raise OSError(28, 'No space left on device')
        rename(source, target)

    monkeypatch.setattr(os, 'replace', full)
    for _ in range(2):
        with pytest.raises(OSError):
            save({'epoch': 2}, path)
        assert sorted(os.listdir(str(tmp_path))) == ['x', 'x.previous']
    monkeypatch.undo()
    save({'epoch': 3}, path)
    assert (checkpoint.load(path), checkpoint.load(path + '.previous')) == ({'epoch': 3}, {'epoch': 1})
    assert sorted(os.listdir(str(tmp_path))) == ['x', 'x.previous']


@pytest.mark.skipif(shutil.which('strace') is None, reason='strace is not installed')
def test_a_kill_at_every_system_call_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """A save over an older checkpoint is killed at its first, second, … write, fsync, link and rename, until none is left."""
    code = '''if True:
        import sys, torch, checkpoint
        writer = checkpoint.Writer()
        writer.save({"epoch": 2, "weights": torch.full((1000,), 2.0)}, sys.argv[1], also=sys.argv[1] + ".best")
        assert writer.wait() is None
    '''
    found = {}  # (system call, how many times until the kill) -> epoch of what was then there
    for call in ('write', 'fsync', 'link', 'rename'):
        for kill_at in range(1, 20):
            folder = tmp_path / '{} {}'.format(call, kill_at)
            folder.mkdir()
            path = str(folder / 'x')
            for epoch in (0, 1):
                save({'epoch': epoch}, path)
            checkpoint.link(path, path + '.best')
            command = ['strace', '-qq', '-f', '-o', '/dev/null', '-e', 'trace=' + call,
                       '-e', 'inject={}:signal=KILL:when={}'.format(call, kill_at), '-P', str(folder)]
            for base in (path, path + '.best', path + '.previous'):
                command += ['-P', base, '-P', base + '.tmp']
            finished = subprocess.run(command + [sys.executable, '-c', code, path], stderr=subprocess.PIPE,
                                      env=dict(os.environ, PYTHONPATH=REPOSITORY))
            found[call, kill_at] = checkpoint.load(path)['epoch']
            assert checkpoint.load(path + '.best')['epoch'] in (1, 2)
            assert checkpoint.load(path + '.previous')['epoch'] in (0, 1)
            if finished.returncode == 0:
                assert found[call, kill_at] == 2
                break
    assert set(found.values()) == {1, 2} and len(found) >= 10, found
