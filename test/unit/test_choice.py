# SPDX-License-Identifier: BSD-3-Clause
"""Which device and backend the flags mean, and what is refused."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import SimpleNamespace
from typing import Any

from engine.device import choice as device
from engine.errors import DeviceUnavailableError, UsageError
from engine.options import resolve
from engine.options.flags import parse_args
from engine.options.resolve import resolve_flags
from engine.versions import TORCH

from helpers.program import TWO

import pytest
import torch

# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, gpu, one_device, expected",
    [
        (None, None, False, [0, 1, 2, 3]),
        ([3, 1], None, False, [3, 1]),
        (None, 2, True, [2]),
        ([3, 1], 1, True, [1]),
        ([3, 1], None, True, [3]),
    ],
)
def test_device_list_names_devices_and_gpu_one_of_them(
    given: list[int] | None, gpu: int | None, one_device: bool, expected: list[int]
) -> None:
    assert device.resolve_device_list(given, gpu, "gpu", 4, one_device=one_device) == expected


@pytest.mark.parametrize(
    "given, gpu, message",
    [
        (None, 4, "gpu 4 does not exist, the highest number is 3"),
        ([9], None, "gpu 9 does not exist"),
        ([3, 1], 2, "--gpu 2 is an index into --device-list, which names 2 devices"),
    ],
)
def test_a_device_that_does_not_exist_is_named(given: list[int] | None, gpu: int | None, message: str) -> None:
    with pytest.raises(DeviceUnavailableError, match=message) as raised:
        device.resolve_device_list(given, gpu, "gpu", 4, one_device=True)
    if given is None:  # as predict.py does, which has no such flag
        assert "--device-list" not in raised.value.args[0]


def test_a_cpu_takes_any_number_of_processes() -> None:
    args = parse_args(["--device", "cpu", "--multiprocessing-distributed", "--device-list", "0,1,2", "-b", "6"])
    args, topology = resolve_flags(args)
    assert (args.device, args.device_list, args.dist_backend, args.precision) == ("cpu", [0, 1, 2], "gloo", "fp32")
    assert args.processes == topology.processes == 3
    assert topology.spawn


def test_each_device_has_its_backend_and_gloo_supports_all() -> None:
    backends = {name: device.resolve_backend(None, name) for name in ("npu", "gpu", "mps", "cpu")}
    assert backends == {"npu": "hccl", "gpu": "nccl", "mps": "gloo", "cpu": "gloo"}
    assert {device.resolve_backend("gloo", name) for name in backends} == {"gloo"}
    with pytest.raises(DeviceUnavailableError, match="--dist-backend nccl does not support npu: leave it out for hccl"):
        device.resolve_backend("nccl", "npu")


@pytest.mark.parametrize("version", [(1, 13), (2, 0), (2, 1), (2, 2), (2, 14)])
@pytest.mark.parametrize("processes", [[], TWO, ["--world-size", "2", "--rank", "0", "--dist-url", "tcp://h:1234"]])
@pytest.mark.parametrize("flags", [["--opt-level", "O2"], ["--opt-level", "O3"], ["--grad-compress", "bf16"], []])
def test_gloo_of_torch_before_2_2_is_not_asked_to_send_bf16(
    monkeypatch: Any, version: tuple[int, int], processes: list[str], flags: list[str]
) -> None:
    monkeypatch.setattr(device, "TORCH", version)
    args = parse_args(["--device", "cpu", "--amp", "--amp-dtype", "bf16", *processes, *flags])
    if version < (2, 0) and flags[:1] == ["--grad-compress"]:
        message = "^--grad-compress requires torch 2.0"
    elif version < (2, 2) and processes and flags:
        message = f"^{' '.join(flags)}( in bf16)? over gloo requires torch 2.2 or later"
    else:
        assert resolve_flags(args)[0].dist_backend == "gloo"
        return
    with pytest.raises(DeviceUnavailableError, match=message):
        resolve_flags(args)


def test_missing_hardware_is_refused_in_one_line() -> None:
    has_npu = hasattr(torch, "npu") or importlib.util.find_spec("torch_npu") is not None
    for name, may_work in (("npu", has_npu), ("gpu", torch.cuda.is_available())):
        if not may_work:
            with pytest.raises(DeviceUnavailableError, match=f"no {name.upper()}") as refusal:
                resolve_flags(parse_args(["--device", name]))
            assert len(str(refusal.value).splitlines()) == 1
            assert "another --device" in str(refusal.value)


@pytest.mark.parametrize("has_metal", [False, True])
@pytest.mark.parametrize("has_runtime", [False, True])
def test_an_apple_gpu_requires_torch_mps(monkeypatch: Any, has_metal: bool, has_runtime: bool) -> None:
    """torch 1.12 and 1.13 find the GPU, but have no torch.mps to synchronize with."""
    monkeypatch.setattr(torch.backends, "mps", SimpleNamespace(is_available=lambda: has_metal), raising=False)
    monkeypatch.setattr(torch, "mps", SimpleNamespace(), raising=False)
    if not has_runtime:
        monkeypatch.delattr(torch, "mps")
    if has_metal and has_runtime:
        assert device.resolve_device("mps") == ("mps", 1)
        return
    with pytest.raises(DeviceUnavailableError, match=r"^no MPS.*: it requires an Apple GPU and torch 2\.0 or later"):
        device.resolve_device("mps")


def test_auto_is_the_first_device_that_works(monkeypatch: Any) -> None:
    there = {"gpu": 2, "mps": 1}

    def count_devices(name: str) -> int:
        if name not in there:
            raise DeviceUnavailableError("none")
        return there[name]

    monkeypatch.setattr(device, "count_devices", count_devices)
    assert device.resolve_device("auto") == ("gpu", 2)
    del there["gpu"]
    assert device.resolve_device("auto") == ("mps", 1)
    del there["mps"]
    assert device.resolve_device("auto") == ("cpu", None)


@pytest.mark.parametrize("gpu", [0, 3])
def test_a_gpu_that_was_asked_for_is_not_silently_a_cpu(monkeypatch: Any, gpu: int, capsys: Any) -> None:
    monkeypatch.setattr(device, "REQUIREMENTS", {})  # auto looks for no device
    assert resolve_flags(parse_args(["--gpu", str(gpu)]))[0].device == "cpu"
    assert f"warning: --gpu {gpu}: " in capsys.readouterr().err
    resolve_flags(parse_args(["--gpu", str(gpu), "--device", "cpu"]))  # as the scripts do
    assert capsys.readouterr().err == ""


# --- the node's cores -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: Any, tmp_path: Any) -> Any:
    """A machine of 16 cores without limits; tmp_path stands for the root of its file system."""
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(device, "CGROUPS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(device, "OWN_CGROUP", str(tmp_path / "own"))
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "own").write_text("0::/\n")
    return tmp_path


def write(path: Any, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "quota, cores", [("400000 100000", 4), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", 16)]
)
@pytest.mark.parametrize("path", ["", "system.slice/job", "kubepods/pod1/box"])
def test_the_quota_of_a_container_limits_the_cores(machine: Any, quota: str, cores: int, path: str) -> None:
    """cgroup v2, in a container (its own group is the root), in a service, and two levels above the process."""
    (machine / "own").write_text(f"0::/{path}\n")
    write(machine / "cgroup" / path.partition("/")[0] / "cpu.max", quota + "\n")
    assert device.available_cores() == cores


@pytest.mark.parametrize("quota, cores", [(400000, 4), (-1, 16)])
@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
def test_the_older_kind_of_quota_counts_too(machine: Any, quota: int, cores: int, mounted: str) -> None:
    (machine / "own").write_text(f"3:memory:/\n2:{mounted}:/docker/ab\n")
    for folder in ("docker/ab", ""):  # as on the host, or as in the container
        write(machine / "cgroup" / mounted / folder / "cpu.cfs_quota_us", f"{quota}\n")
        write(machine / "cgroup" / mounted / folder / "cpu.cfs_period_us", "100000\n")
    assert device.available_cores() == cores


@pytest.mark.parametrize("version, mounted", [("memory.max", ""), ("memory.limit_in_bytes", "memory")])
@pytest.mark.parametrize("limit, expected", [("4096", 4096), ("max", 9216), ("99999", 9216), (None, 9216)])
@pytest.mark.parametrize("folder", ["docker/ab", ""])  # as on the host, or as in the container
def test_the_memory_is_the_machines_or_the_containers_and_not_what_is_free(
    machine: Any, monkeypatch: Any, version: str, mounted: str, limit: Any, expected: int, folder: str
) -> None:
    monkeypatch.setattr(device, "MEMORY", str(machine / "meminfo"))
    assert device.total_memory() == math.inf
    (machine / "own").write_text(f"3:{mounted}:/docker/ab\n")
    if limit is not None:
        write(machine / "cgroup" / mounted / folder / version, f"{limit}\n")
    for free in (1, 9):  # the same whenever it is asked
        (machine / "meminfo").write_text(f"MemTotal:       9 kB\nMemFree: {free} kB\nMemAvailable:   {free} kB\n")
        assert device.total_memory() == expected


def test_threads_and_workers_follow_the_users_own_limit(machine: Any, monkeypatch: Any) -> None:
    assert (device.default_threads(2), device.default_workers("gpu", 2)) == (8, 14)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (device.default_threads(2), device.default_workers("gpu", 2)) == (3, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device.default_threads(2) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # then 1 is torchrun's own
    assert device.default_threads(2) == 8


# --- options of newer torch versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, version, message",
    [
        (["--amp"], (1, 10), "--amp on a CPU requires torch 1.10"),
        (["--deterministic"], (1, 8), "--deterministic requires torch 1.8"),
        (["--profile"], (1, 8), "--profile requires torch 1.8.1"),
        (["--compile"], (2, 0), "--compile requires torch 2.0"),
        (["--grad-compress", "bf16"], (2, 0), "--grad-compress requires torch 2.0"),
    ],
)
def test_a_flag_that_needs_a_newer_torch_is_refused(flags: list[str], version: tuple[int, int], message: str) -> None:
    args = parse_args(["--device", "cpu", *flags])
    if version > TORCH:
        with pytest.raises(DeviceUnavailableError, match=message):
            resolve_flags(args)
        return
    try:
        resolve_flags(args)
    except DeviceUnavailableError as refusal:  # a compiler may be missing
        assert "requires torch" not in str(refusal)


@pytest.mark.parametrize("flag", ["--auto-augment=ra", "--random-erasing=0.1", "--mixup=0.2", "--cutmix=1"])
def test_flags_that_use_torchvision_name_what_is_missing(monkeypatch: Any, flag: str) -> None:
    args = parse_args(["--device", "cpu", flag])
    monkeypatch.setattr(device, "TORCH", (2, 1))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DeviceUnavailableError, match=f"{flag.partition('=')[0]} requires torchvision"):
        resolve_flags(args)
    monkeypatch.setattr(device, "TORCH", (1, 8))
    with pytest.raises(DeviceUnavailableError, match=f"{flag.partition('=')[0]} requires torch 2.1 or later"):
        resolve_flags(args)


@pytest.mark.skipif(TORCH < (2, 0), reason="--compile requires torch 2.0")
@pytest.mark.parametrize("name, compiler", [("cpu", "g++"), ("gpu", "gcc")])
def test_compile_names_the_compiler_that_is_missing(monkeypatch: Any, tmp_path: Any, name: str, compiler: str) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = {"deterministic": False, "profile": False, "grad_compress": "none"}
    with pytest.raises(DeviceUnavailableError, match=f"apt-get install {compiler.replace('+', '[+]')}"):
        device.check_torch_options(name, compile_model=True, **options)


def test_workers_are_the_cores_beside_the_processes(monkeypatch: Any) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "available_cores", lambda: 96)
    assert device.default_workers("npu", 8) == 88
    assert device.default_workers("cpu", 8) == 0
    monkeypatch.setattr(device, "available_cores", lambda: 8)
    assert device.default_workers("gpu", 8) == 8


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(TORCH < (1, 10), reason="mixed precision on a CPU requires torch 1.10")
def test_amp_on_a_cpu_is_bf16_if_the_cpu_has_instructions_for_it(monkeypatch: Any, capsys: Any) -> None:
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device, "cpu_info", lambda _, found=has_bf16 or None: found)
        assert device.resolve_precision("cpu", [0], amp=True, opt_level="O1", amp_dtype="auto") == expected
        assert ("--amp changes nothing here" in capsys.readouterr().out) == (not has_bf16)
        assert device.resolve_precision("cpu", [0], amp=True, opt_level="O1", amp_dtype="bf16") == "bf16"
    with pytest.raises(DeviceUnavailableError, match="--amp-dtype fp16 is not supported on a CPU"):
        device.resolve_precision("cpu", [0], amp=True, opt_level="O1", amp_dtype="fp16")


def test_bf16_on_gpus_requires_that_each_of_them_has_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(device, "needs_apex", lambda device: False)
    monkeypatch.setattr(device.torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    options: dict[str, Any] = {"amp": True, "opt_level": "O1", "amp_dtype": "auto"}
    expected = {(0,): "bf16" if TORCH >= (1, 10) else "fp16", (1,): "fp16", (0, 1): "fp16"}
    assert {devices: device.resolve_precision("gpu", list(devices), **options) for devices in expected} == expected


def test_apex_takes_no_dynamic_loss_scale(monkeypatch: Any) -> None:
    monkeypatch.setattr(resolve, "needs_apex", lambda device: True)
    monkeypatch.setattr(resolve, "resolve_precision", lambda *_, **__: "fp16")
    with pytest.raises(UsageError, match="dynamic is not supported with apex: give a number"):
        resolve_flags(parse_args(["--device", "cpu", "--amp", "--loss-scale-value", "dynamic"]))


def test_fp16_without_autocast_names_apex(monkeypatch: Any) -> None:
    monkeypatch.setattr(device, "needs_apex", lambda device: True)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(DeviceUnavailableError, match="requires Ascend's or NVIDIA's apex with apex.amp"):
        device.resolve_precision("gpu", [0], amp=True, opt_level="O1", amp_dtype="auto")
