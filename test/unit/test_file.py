# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoint files: what is saved is loaded, anything else is named, and an intact file exists at every moment."""

import errno
import io
import os
import pickle
import stat
import struct
import tarfile
import zipfile
from collections import OrderedDict

from engine.checkpoints.file import CheckpointWriter, link, load, lock_folder
from engine.errors import CheckpointError, UsageError

import pytest
import torch


def save(state, path, also=None):
    writer = CheckpointWriter()
    writer.save(state, path, also=also)
    error = writer.wait()
    if error is not None:
        raise error


def make_state():
    """Tensors of every layout, and plain values."""
    torch.manual_seed(0)
    weights = OrderedDict(
        a=torch.randn(4, 3).t(),
        b=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        c=torch.arange(5),
        d=torch.tensor(3.5),
        e=torch.zeros(0, 4),
        f=torch.ones(3, dtype=torch.bfloat16),
    )
    weights["shared"] = weights["a"]
    weights["part"] = torch.arange(10.0)[3:7]
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "epoch": 3,
        "state_dict": weights,
        "best_acc1": 12.5,
        "classes": ["a", "图"],
        "none": None,
        "optimizer": optimizer,
    }


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


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    path = str(tmp_path / "x.pth.tar")
    save(make_state(), path)
    assert_same(load(path), make_state())
    assert os.listdir(str(tmp_path)) == ["x.pth.tar"]


def test_torch_load_reads_it_with_weights_only(tmp_path):
    path = str(tmp_path / "x.pth.tar")
    save(make_state(), path)
    options = {"weights_only": True} if "weights_only" in torch.load.__code__.co_varnames else {}
    assert_same(torch.load(path, **options), make_state())


@pytest.mark.parametrize("zip_format", [False, True], ids=["legacy", "zip"])
def test_files_of_torch_save_are_read(tmp_path, zip_format):
    path = str(tmp_path / "x.pth")
    torch.save(make_state(), path, _use_new_zipfile_serialization=zip_format)
    assert_same(load(path), make_state())


def test_a_model_state_dict_with_its_metadata_is_read(tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save({"model": model.state_dict(), "parameter": model.weight}, str(tmp_path / "x.pth"))
    loaded = load(str(tmp_path / "x.pth"))
    assert torch.equal(loaded["model"]["weight"], model.weight) and torch.equal(loaded["parameter"], model.weight)


def test_a_state_that_changes_after_the_call_is_saved_as_it_was(tmp_path):
    """Training continues while the file is written."""
    path, writer = str(tmp_path / "x"), CheckpointWriter()
    for epoch in range(3):
        weights = torch.full((1000 * (3 - epoch),), float(epoch))  # smaller each time: the writer's memory is reused
        writer.save({"weights": weights}, path)
        weights.zero_()
        assert writer.wait() is None
        assert torch.equal(load(path)["weights"], torch.full((1000 * (3 - epoch),), float(epoch)))


def test_the_previous_file_is_kept(tmp_path):
    path = str(tmp_path / "x.pth.tar")
    for epoch in range(3):
        save({"epoch": epoch}, path)
    assert load(path) == {"epoch": 2}
    assert load(f"{path}.previous") == {"epoch": 1}


def test_a_link_is_not_changed_by_the_next_save(tmp_path):
    path, best = str(tmp_path / "x.pth.tar"), str(tmp_path / "best.pth.tar")
    for epoch in range(3):
        save({"epoch": epoch}, path)
        if epoch < 2:
            link(path, best)
    assert load(best) == {"epoch": 1}


def test_where_there_are_no_hard_links_a_file_is_copied(tmp_path, monkeypatch):
    path, best = str(tmp_path / "x"), str(tmp_path / "best")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        save({"epoch": epoch}, path, also=best if epoch == 1 else None)
    assert (load(path), load(f"{path}.previous"), load(best)) == ({"epoch": 2}, {"epoch": 1}, {"epoch": 1})
    assert sorted(os.listdir(str(tmp_path))) == ["best", "x", "x.previous"]


# --- corrupt files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "zip", "legacy"])
def test_a_file_truncated_anywhere_is_named(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "ours":
        save(make_state(), str(path))
    else:
        torch.save(make_state(), str(path), _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for percent in range(100):
        path.write_bytes(content[: len(content) * percent // 100])
        with pytest.raises(CheckpointError, match=str(path)):
            load(str(path))


def test_a_flipped_bit_anywhere_is_named(tmp_path):
    path = tmp_path / "x"
    save({"weights": torch.arange(50.0)}, str(path))
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        corrupt = bytearray(content)
        corrupt[position] ^= 0x10
        path.write_bytes(bytes(corrupt))
        try:
            loaded = load(str(path))
        except CheckpointError:
            continue
        # A flip in the comment's own length or mark takes the checksum away: then the CRCs of the parts must hold.
        assert position > len(content) - 100 and torch.equal(loaded["weights"], torch.arange(50.0)), position


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80", b"\x80\x02}.", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: corrupt, or not a checkpoint"):
        load(str(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="x: No such file"):
        load(str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="directory"):
        load(str(tmp_path))


# --- files that carry code --------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


class HostileState:
    """Runs code by way of __setstate__."""

    def __init__(self, canary):
        self.canary = canary

    def __setstate__(self, state):
        os.mkdir(state["canary"])


@pytest.mark.parametrize("kind", [Hostile, HostileState])
@pytest.mark.parametrize("zip_format", [False, True], ids=["legacy", "zip"])
def test_a_file_that_carries_code_is_refused_and_runs_nothing(tmp_path, kind, zip_format):
    canary, path = str(tmp_path / "canary"), str(tmp_path / "x")
    torch.save({"state_dict": kind(canary)}, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(CheckpointError, match="refused, it carries code"):
        load(path)
    assert not os.path.exists(canary)


def test_a_torchscript_archive_is_refused(tmp_path):
    path = str(tmp_path / "x.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        load(path)


def test_a_tar_of_torch_0_1_is_refused(tmp_path):
    path, canary = str(tmp_path / "x.tar"), str(tmp_path / "canary")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Hostile(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(CheckpointError, match="refused, it carries code.*tar"):
        load(path)
    assert not os.path.exists(canary)


# --- saves that fail --------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = str(tmp_path / "x")
    save({"epoch": 1}, path)

    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        save({"epoch": 2}, path)
    monkeypatch.undo()
    assert load(path) == {"epoch": 1}
    assert os.listdir(str(tmp_path)) == ["x"]


def test_a_rename_that_fails_leaves_no_temporary_file_then_or_at_the_next_save(tmp_path, monkeypatch):
    """The first failure leaves `previous` as a second name of the file itself, over which rename does nothing."""
    path, rename = str(tmp_path / "x"), os.replace
    save({"epoch": 1}, path)

    def refuse(source, target):
        if target == path:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            save({"epoch": 2}, path)
        assert sorted(os.listdir(str(tmp_path))) == ["x", "x.previous"]
    monkeypatch.undo()
    save({"epoch": 3}, path)
    assert (load(path), load(f"{path}.previous")) == ({"epoch": 3}, {"epoch": 1})
    assert sorted(os.listdir(str(tmp_path))) == ["x", "x.previous"]


def test_a_best_file_that_cannot_be_written_does_not_cost_the_checkpoint(tmp_path):
    path, also = str(tmp_path / "x"), str(tmp_path / "no folder" / "best")
    writer = CheckpointWriter()
    writer.save({"epoch": 1}, path, also)
    assert isinstance(writer.wait(), FileNotFoundError)
    assert load(path) == {"epoch": 1}


@pytest.mark.parametrize("attempts", [1, 2])
def test_the_best_is_tried_once_more_when_the_disk_was_full(tmp_path, monkeypatch, attempts):
    """It is waited for an epoch later, when there may be space again; then no other save can take its place."""
    path, best, flush = str(tmp_path / "x"), str(tmp_path / "best"), os.fsync
    save({"epoch": 1}, path, best)
    full = attempts * [OSError(errno.ENOSPC, "No space left on device")]

    def refuse(file):
        if full:
            raise full.pop()
        flush(file)

    monkeypatch.setattr(os, "fsync", refuse)
    writer = CheckpointWriter()
    writer.save({"epoch": 2}, path, best)
    error = writer.wait()
    assert (error is None) == (attempts == 1)
    assert load(path)["epoch"] == load(best)["epoch"] == (2 if error is None else 1)
    writer.save({"epoch": 3}, path)
    assert writer.wait() is None and load(path)["epoch"] == 3 and load(best)["epoch"] == (2 if error is None else 1)


def test_a_file_system_that_cannot_flush_a_folder_keeps_every_save(tmp_path, monkeypatch):
    path, flush = str(tmp_path / "x"), os.fsync

    def refuse_folders(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(file)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    for epoch in (1, 2, 3):
        save({"epoch": epoch}, path, f"{path}.best")
    assert [load(path + ending)["epoch"] for ending in ("", ".previous", ".best")] == [3, 2, 3]


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UsageError, match=r"\.lock: Is a directory"):
        lock_folder(str(tmp_path))


def test_a_truncated_storage_in_a_foreign_archive_is_refused(tmp_path):
    """One byte would otherwise fill the whole tensor."""
    path, changed = str(tmp_path / "x.pth"), str(tmp_path / "changed.pth")
    torch.save({"weights": torch.ones(8)}, path, _use_new_zipfile_serialization=True)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(changed, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            copy.writestr(name, content[:1] if "/data/" in name else content)
    with pytest.raises(CheckpointError, match="expected 32 bytes, got 1"):
        load(changed)


@pytest.mark.parametrize("length", [1, 71, 500])
def test_a_foreign_archive_may_have_a_comment(tmp_path, length):
    path = str(tmp_path / "x.pth")
    torch.save({"weights": torch.ones(8)}, path, _use_new_zipfile_serialization=True)
    with open(path, "rb+") as file:  # a zip ends with the comment's length and the comment
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", length) + b"c" * length)
    assert load(path)["weights"].tolist() == [1.0] * 8
    with open(path, "rb+") as file:
        file.truncate(os.path.getsize(path) - 1)
    with pytest.raises(CheckpointError, match="it is truncated"):
        load(path)
