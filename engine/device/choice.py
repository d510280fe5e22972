# SPDX-License-Identifier: BSD-3-Clause
"""Which device, which of them, which backend, which precision: resolved once, before any process starts.

Each function raises DeviceUnavailableError if the machine or the installed torch lacks what the flags ask for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import shutil
import sysconfig
from pathlib import PurePath
from typing import Any, Iterator, Sequence

from engine import console
from engine.errors import DeviceUnavailableError, counted, first_line
from engine.versions import TORCH, check_numpy

import torch

BACKENDS = {"npu": "hccl", "gpu": "nccl", "mps": "gloo", "cpu": "gloo"}
TORCH_DEVICES = {"npu": "npu", "gpu": "cuda", "mps": "mps", "cpu": "cpu"}
REQUIREMENTS = {  # of the devices that auto looks for, the first that works first
    "npu": "install CANN and the torch_npu for this torch, run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`, "
    "check `npu-smi info`",
    "gpu": "check `nvidia-smi`, and that this torch has CUDA",
    "mps": "it requires an Apple GPU and torch 2.0 or later",
}
CGROUPS, OWN_CGROUP, MEMORY = "/sys/fs/cgroup", "/proc/self/cgroup", "/proc/meminfo"


def _require_torch(version: str, flag: str, advice: str = "leave it out") -> None:
    if tuple(map(int, version.split(".")))[:2] > TORCH:
        raise DeviceUnavailableError(f"{flag} requires torch {version} or later, this is {torch.__version__}: {advice}")


# --- which device -----------------------------------------------------------------------------------------------------


def load_runtime(device: str) -> None:
    """Import torch_npu, which adds torch.npu and the backend hccl, if this process has not done so."""
    if device == "npu" and TORCH >= (1, 8) and not hasattr(torch, "npu"):
        importlib.import_module("torch_npu")


def count_devices(device: str) -> int:
    """Return how many NPUs, GPUs or MPS devices there are, at least one."""
    try:
        load_runtime(device)
        runtime: Any = getattr(torch, TORCH_DEVICES[device])  # torch.mps came after torch.backends.mps
        found, reason = (torch.backends.mps if device == "mps" else runtime).is_available(), ""
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        found, reason = False, f" ({first_line(error)})"
    if not found:
        requirements = REQUIREMENTS[device]
        raise DeviceUnavailableError(f"no {device.upper()}{reason}: {requirements}, or choose another --device")
    return 1 if device == "mps" else runtime.device_count()


def resolve_device(name: str) -> tuple[str, int | None]:
    """Return (npu, gpu, mps or cpu; how many of them there are, None for a CPU: any number of processes).

    name: one of these, or auto: the first that works. Raises DeviceUnavailableError, or UsageError if torch cannot use
    the NumPy that is installed.
    """
    check_numpy()
    for candidate in REQUIREMENTS if name == "auto" else ():
        with contextlib.suppress(DeviceUnavailableError):
            return candidate, count_devices(candidate)
    return (name, count_devices(name)) if name in REQUIREMENTS else ("cpu", None)


def resolve_device_list(
    given: list[int] | None, gpu: int | None, device: str, count: int | None, *, one_device: bool
) -> list[int]:
    """Return the device numbers to use: --device-list, else all; a single one for a one-device run (--gpu)."""
    devices = given or list(range(count or 1))
    if one_device and gpu is not None:
        if given and gpu >= len(given):
            named = counted(len(given), "device")
            raise DeviceUnavailableError(f"--gpu {gpu} is an index into --device-list, which names {named}")
        devices = [given[gpu] if given else gpu]
    elif one_device and len(devices) > 1:
        console.line(
            f"=> {counted(len(devices), 'device')}, and this is a one-device run: using number {devices[0]}; "
            "--multiprocessing-distributed uses all of them, --gpu N another one"
        )
        devices = devices[:1]
    if count is not None and max(devices) >= count:
        problem = f"{device} {max(devices)} does not exist, the highest number is {count - 1}"
        raise DeviceUnavailableError(f"{problem}: see --gpu", " and --device-list")
    return devices


def resolve_backend(given: str | None, device: str, sends_bf16: str = "") -> str:
    """Return the backend of torch.distributed: hccl, nccl or gloo.

    sends_bf16: the flag by which processes send each other gradients in bf16, if they do.
    """
    own = BACKENDS[device]
    if given not in (None, own, "gloo"):
        raise DeviceUnavailableError(f"--dist-backend {given} does not support {device}: leave it out for {own}")
    if sends_bf16 and (given or own) == "gloo":
        _require_torch("2.2", f"{sends_bf16} over gloo")  # pytorch#113557
    return given or own


# --- options of newer torch versions ----------------------------------------------------------------------------------


def check_torch_options(
    device: str,
    *,
    deterministic: bool,
    profile: bool,
    compile_model: bool,
    grad_compress: str,
    transforms: Sequence[str] = (),
) -> None:
    """Refuse flags that need a newer torch, --compile without what it builds with, and flags without torchvision.

    transforms: the flags that are set of those that use torchvision.transforms.v2.
    """
    if deterministic:
        _require_torch("1.8", "--deterministic")
    if profile:
        _require_torch("1.8.1", "--profile")
    if grad_compress != "none":
        _require_torch("2.0", "--grad-compress")
    for flag in transforms:
        _require_torch("2.1", flag)
        if importlib.util.find_spec("torchvision") is None:
            raise DeviceUnavailableError(f"{flag} requires torchvision: pip install torchvision")
    if not compile_model:
        return
    _require_torch("2.0", "--compile")
    if device not in ("gpu", "cpu"):
        raise DeviceUnavailableError(f"--compile supports gpu and cpu, this is {device}: leave it out")
    # torch.compile builds C++ for a CPU; for a GPU Triton makes the kernels and builds a C launcher for each.
    headers = os.path.join(sysconfig.get_path("include"), "Python.h")
    requirements = {f"{headers} (Debian: apt-get install python3-dev)": os.path.exists(headers)}
    if device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        requirements[f"{compiler} (Debian: apt-get install g++)"] = shutil.which(compiler) is not None
    else:
        compiler = os.environ.get("CC", "gcc")
        requirements[f"{compiler} (Debian: apt-get install gcc)"] = any(map(shutil.which, (compiler, "clang")))
        requirements["the package triton"] = importlib.util.find_spec("triton") is not None
    missing = [name for name, found in requirements.items() if not found]
    if missing:
        raise DeviceUnavailableError(f"--compile requires {' and '.join(missing)}: install it, or leave it out")


# --- the node's cores -------------------------------------------------------------------------------------------------


def available_cores() -> int:
    """Return how many cores this process may use: the smallest of its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *_cgroup_quotas()])))


def _cgroup_folders(*controllers: str) -> Iterator[str]:
    """Yield the folders of this process's control group and of those around it, whose limits it has too.

    controllers: their names in cgroup v1.
    """
    with contextlib.suppress(OSError), open(OWN_CGROUP) as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            if names in ("", *controllers):
                for group in (PurePath(path), *PurePath(path).parents):  # inside a container, its own group is the root
                    yield f"{CGROUPS}/{names}{group}"


def _cgroup_quotas() -> Iterator[float]:
    """Yield the CPU quotas of this process, in cores (docker run --cpus)."""
    for folder in _cgroup_folders("cpu", "cpu,cpuacct"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # cgroup v2, v1
            with contextlib.suppress(OSError, ValueError):  # no such file, or its quota is "max"
                quota, period = map(int, " ".join(_read(f"{folder}/{name}") for name in names).split())
                if quota > 0:  # v1 has -1 for none
                    yield quota / period


def total_memory() -> float:
    """Return the bytes of this node's memory, or the limit of a container if that is less.

    Not what is free: the same command then chooses the same batch size whenever it runs.
    """
    limits = [math.inf]
    with contextlib.suppress(OSError), open(MEMORY) as file:
        limits += [1024 * int(line.split()[1]) for line in file if line.startswith("MemTotal:")]
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroup v2 and v1
            with contextlib.suppress(OSError, ValueError):  # no such file, or its limit is "max"
                limits.append(int(_read(f"{folder}/{name}")))
    return min(limits)


def _omp_num_threads() -> float:
    """Return the user's OMP_NUM_THREADS; infinite if it is not set, or if it is torchrun's own 1."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    is_torchrun = text == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    return int(text) if text.isdigit() and int(text) and not is_torchrun else math.inf


def default_threads(processes: int) -> int:
    """Return the threads of each of the processes that train on this node's cores."""
    return int(max(1, min(available_cores() // processes, _omp_num_threads())))


def default_workers(device: str, processes: int) -> int:
    """DataLoader workers for a node: the cores that its processes leave; none on a CPU, which trains on every core."""
    cores = int(min(available_cores(), _omp_num_threads() * processes))
    return 0 if device == "cpu" else max(processes, cores - processes)


def cpu_info(pattern: str) -> re.Match[str] | None:
    """Search a line of /proc/cpuinfo; None on a system that has no such file too."""
    with contextlib.suppress(OSError):
        return re.search(f"^{pattern}$", _read("/proc/cpuinfo"), re.MULTILINE)
    return None


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


# --- precision --------------------------------------------------------------------------------------------------------


def resolve_precision(device: str, devices: list[int], *, amp: bool, opt_level: str, amp_dtype: str) -> str:
    """Return the number format of the step: fp32, fp16 or bf16.

    bf16 if the device supports it natively (NPUs from the A2 on, Ampere and later, CPUs with bf16 instructions), else
    fp16, or fp32 on a CPU. amp_dtype fp16 or bf16 forces it. devices: the numbers of those that will be used.
    """
    if not amp or opt_level == "O0":
        return "fp32"
    if device == "cpu":
        _require_torch("1.10", "--amp on a CPU", "use --opt-level O0")
    if device == "mps":
        _require_torch("2.5", "--amp on MPS")
    if amp_dtype == "bf16":
        _require_torch("1.10", "--amp-dtype bf16")
    if needs_apex(device):
        load_apex()
    has_bf16 = TORCH >= (1, 10) and _has_bf16(device, devices)
    if device == "cpu":
        if amp_dtype == "fp16":
            raise DeviceUnavailableError(
                "--amp-dtype fp16 is not supported on a CPU, where bf16 is 15 times faster: use bf16"
            )
        if amp_dtype == "auto" and not has_bf16:
            console.line(
                "=> this CPU has no bf16 instructions, and without them bf16 is slower than fp32: --amp changes "
                "nothing here (--amp-dtype bf16 forces it)"
            )
            return "fp32"
    elif amp_dtype == "bf16" and not has_bf16:
        raise DeviceUnavailableError(f"--amp-dtype bf16: this {device} has no bf16; use --amp-dtype fp16")
    return ("bf16" if has_bf16 else "fp16") if amp_dtype == "auto" else amp_dtype


def _has_bf16(device: str, devices: list[int]) -> bool:
    """Whether all these devices multiply bf16 natively."""
    if device == "cpu":  # x86: avx512_bf16, amx_bf16; Arm: bf16
        return cpu_info(r"(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b.*") is not None
    if device == "gpu":  # not torch.cuda.is_bf16_supported, which asks GPU 0 and counts emulation
        return all(torch.cuda.get_device_capability(index)[0] >= 8 for index in devices)
    return getattr(getattr(torch, TORCH_DEVICES[device]), "is_bf16_supported", lambda: False)()


def needs_apex(device: str) -> bool:
    """Whether this torch has no mixed precision of its own for a device: npu, gpu, mps or cpu."""
    runtime = getattr(torch, TORCH_DEVICES[device], None)  # torch.cuda, torch.npu, …
    return TORCH < (1, 10) and not hasattr(getattr(runtime, "amp", None), "autocast")


def load_apex() -> Any:
    """Return apex.amp: mixed precision before torch 1.6, and on NPUs with torch 1.8 too (Ascend's apex).

    The `apex` on PyPI is another project, and NVIDIA's has had no amp since 2025.
    """
    try:
        from apex import amp
    except ImportError as error:
        raise DeviceUnavailableError(
            f"--amp with torch {torch.__version__} on this device requires Ascend's or NVIDIA's apex with apex.amp "
            f"({error}); install it or leave --amp out"
        ) from error
    return amp
