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
from typing import Any, Iterator

from engine import console
from engine.errors import DeviceUnavailableError, first_line
from engine.versions import TORCH

import torch

BACKENDS = {"npu": "hccl", "gpu": "nccl", "mps": "gloo", "cpu": "gloo"}
TORCH_DEVICES = {"npu": "npu", "gpu": "cuda", "mps": "mps", "cpu": "cpu"}
CGROUPS, OWN_CGROUP, MEMORY = "/sys/fs/cgroup", "/proc/self/cgroup", "/proc/meminfo"
SOURCE_CANN = "run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`"


# --- which device -----------------------------------------------------------------------------------------------------


def _count_npus() -> int:
    if TORCH >= (1, 8) and not hasattr(torch, "npu"):
        if importlib.util.find_spec("torch_npu") is None:
            version = ".".join(map(str, TORCH))
            raise DeviceUnavailableError(
                f"no NPU: the package torch_npu is not installed; install the one for torch {version}, or choose "
                "another --device"
            )
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            raise DeviceUnavailableError(
                f"no NPU: torch_npu does not load ({first_line(error)}); {SOURCE_CANN} (where CANN is "
                "installed), or choose another --device"
            ) from error
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        raise DeviceUnavailableError(
            f"no NPU is available: check `npu-smi info`, {SOURCE_CANN}, or choose another --device"
        )
    return npu.device_count()


def _count_gpus() -> int:
    if not torch.cuda.is_available():
        raise DeviceUnavailableError(
            f"no GPU: torch {torch.__version__} finds none; check `nvidia-smi` and that this torch has CUDA, or choose "
            "another --device"
        )
    return torch.cuda.device_count()


def _count_mps() -> int:
    mps = getattr(torch.backends, "mps", None)
    if mps is None or not mps.is_available():
        raise DeviceUnavailableError(
            "no MPS: it requires an Apple GPU and torch 1.12 or later; choose another --device"
        )
    return 1


DEVICE_COUNTS = {"npu": _count_npus, "gpu": _count_gpus, "mps": _count_mps}


def resolve_device(name: str) -> tuple[str, int | None]:
    """Return (npu, gpu, mps or cpu; how many of them there are, None for a CPU: any number of processes).

    name: one of these, or auto: the first that works.
    """
    if name == "auto":
        for candidate, count_devices in DEVICE_COUNTS.items():
            try:
                return candidate, count_devices()
            except DeviceUnavailableError:
                continue
        return "cpu", None
    return name, DEVICE_COUNTS[name]() if name in DEVICE_COUNTS else None


def resolve_device_list(
    given: list[int] | None, gpu: int | None, device: str, count: int | None, *, one_device: bool
) -> list[int]:
    """Return the device numbers to use: --device-list, else all; a single one for a one-device run (--gpu)."""
    devices = given or list(range(count or 1))
    if one_device and gpu is not None:
        if given and gpu >= len(given):
            raise DeviceUnavailableError(f"--gpu {gpu} is an index into --device-list, which has {len(given)} entries")
        devices = [given[gpu] if given else gpu]
    elif one_device and len(devices) > 1:
        console.line(
            f"=> {len(devices)} devices, and this is a one-device run: using number {devices[0]}; "
            "--multiprocessing-distributed uses all of them, --gpu N another one"
        )
        devices = devices[:1]
    for index in devices:
        if count is not None and index >= count:
            raise DeviceUnavailableError(
                f"{device} {index} does not exist, there are {count} (0 to {count - 1}): see --gpu and --device-list"
            )
    return devices


def resolve_backend(given: str | None, device: str) -> str:
    """Return the backend of torch.distributed: hccl, nccl or gloo."""
    backend = given or BACKENDS[device]
    if backend not in (BACKENDS[device], "gloo"):
        raise DeviceUnavailableError(
            f"--dist-backend {backend} does not support {device}: leave it out for {BACKENDS[device]}"
        )
    return backend


# --- options of newer torch versions ----------------------------------------------------------------------------------


def check_torch_options(
    device: str, *, deterministic: bool, profile: bool, compile_model: bool, grad_compress: str
) -> None:
    """Refuse flags that need a newer torch, and --compile without a compiler."""
    this = f"this is {torch.__version__}"
    if deterministic and TORCH < (1, 8):
        raise DeviceUnavailableError(f"--deterministic requires torch 1.8 or later, {this}")
    if profile and not hasattr(torch, "profiler"):
        raise DeviceUnavailableError(f"--profile requires torch 1.8.1 or later, {this}")
    for flag, wanted in (("--compile", compile_model), ("--grad-compress", grad_compress != "none")):
        if wanted and TORCH < (2, 0):
            raise DeviceUnavailableError(f"{flag} requires torch 2.0 or later, {this}: leave it out")
    if compile_model:
        _check_compiler(device)


def _check_compiler(device: str) -> None:
    """torch.compile builds C++ for a CPU; for a GPU Triton makes the kernels and builds a C launcher for each."""
    if device not in ("gpu", "cpu"):
        raise DeviceUnavailableError(f"--compile supports gpu and cpu, this is {device}: leave it out")
    package = "g++" if device == "cpu" else "gcc"
    names = [os.environ.get("CXX", "g++")] if device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, names)):
        raise DeviceUnavailableError(
            f"--compile requires a compiler, and {names[0]} is not installed: install it (Debian: apt-get install "
            f"{package}), or leave it out"
        )
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        raise DeviceUnavailableError(
            f"--compile requires Python's headers, and {include} has no Python.h: install them (Debian: apt-get "
            "install python3-dev), or leave it out"
        )
    if device == "gpu" and importlib.util.find_spec("triton") is None:
        raise DeviceUnavailableError("--compile on a GPU requires the package triton: install it, or leave it out")


# --- the node's cores -------------------------------------------------------------------------------------------------


def available_cores() -> int:
    """Return how many cores this process may use: the smallest of its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cgroup_quota())))


def _cgroup_quota() -> float:
    """Return the CPU quota of this process's control group (docker run --cpus), in cores; infinite if it has none."""
    quotas = [quota for folder in _cgroup_folders("cpu", "cpu,cpuacct") for quota in _read_quota(folder)]
    return min([math.inf, *quotas])


def _cgroup_folders(*controllers: str) -> Iterator[str]:
    """Yield the folders of this process's control group and of those around it, whose limits it has too.

    controllers: their names in cgroup v1.
    """
    with contextlib.suppress(OSError, ValueError):
        with open(OWN_CGROUP) as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        for _, names, path in groups:
            if names not in ("", *controllers):
                continue
            root = os.path.join(CGROUPS, names)
            while path:
                yield from (root + path, root)  # inside a container, its own group is the root
                path = path.rpartition("/")[0]


def _read_quota(folder: str) -> list[float]:
    """Return the CPU quota that a control group's folder sets, in cores: cgroup v2 or v1; none if it sets none."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            words = []
            for name in names:
                with open(os.path.join(folder, name)) as file:
                    words += file.read().split()
            quota, period = words
            return [int(quota) / int(period)] if quota not in ("max", "-1") else []
    return []


def available_memory() -> float:
    """Return the bytes that processes can take: what is free, or the limit of a container if that is less."""
    limits = [math.inf]
    with contextlib.suppress(OSError), open(MEMORY) as file:
        limits += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroup v2 and v1
            with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, name)) as file:  # or "max"
                limits.append(int(file.read()))
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


# --- precision --------------------------------------------------------------------------------------------------------


def resolve_precision(device: str, devices: list[int], *, amp: bool, opt_level: str, amp_dtype: str) -> str:
    """Return the number format of the step: fp32, fp16 or bf16.

    bf16 if the device supports it natively (NPUs from the A2 on, Ampere and later, CPUs with bf16 instructions), else
    fp16. amp_dtype fp16 or bf16 forces it. devices: the numbers of those that will be used.
    """
    if not amp or opt_level == "O0":
        return "fp32"
    if device == "cpu":
        return _cpu_precision(amp_dtype)
    if device == "mps" and TORCH < (2, 5):
        raise DeviceUnavailableError(f"--amp on MPS requires torch 2.5 or later, this is {torch.__version__}")
    if needs_apex(device):
        load_apex()
        if amp_dtype == "bf16":
            raise DeviceUnavailableError(
                f"--amp-dtype bf16 requires torch 1.10 or later, this is {torch.__version__}; use fp16"
            )
        return "fp16"
    if device == "gpu":  # not torch.cuda.is_bf16_supported, which asks GPU 0 and counts emulation
        ampere = all(torch.cuda.get_device_capability(index)[0] >= 8 for index in devices)
        has_bf16 = TORCH >= (1, 10) and ampere
    else:
        runtime = getattr(torch, TORCH_DEVICES[device])
        has_bf16 = TORCH >= (1, 10) and getattr(runtime, "is_bf16_supported", lambda: False)()
    if amp_dtype == "bf16" and not has_bf16:
        raise DeviceUnavailableError(f"--amp-dtype bf16: this {device} has no bf16; use --amp-dtype fp16")
    if amp_dtype != "auto":
        return amp_dtype
    return "bf16" if has_bf16 else "fp16"


def _cpu_precision(amp_dtype: str) -> str:
    if TORCH < (1, 10):
        raise DeviceUnavailableError(
            f"--amp on a CPU requires torch 1.10 or later, this is {torch.__version__}; leave --amp out or use "
            "--opt-level O0"
        )
    if amp_dtype == "fp16":
        raise DeviceUnavailableError(
            "--amp-dtype fp16 is not supported on a CPU, where it is 15 times slower than bf16; use --amp-dtype bf16"
        )
    if amp_dtype == "auto" and not _cpu_has_bf16():
        console.line(
            "=> this CPU has no bf16 instructions, and without them bf16 is slower than fp32: --amp changes nothing "
            "here (--amp-dtype bf16 forces it)"
        )
        return "fp32"
    return "bf16"


def _cpu_has_bf16() -> bool:
    """Whether the processor has instructions to multiply bf16 (x86: avx512_bf16, amx_bf16; Arm: bf16)."""
    if not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo") as file:
        pattern = r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b"
        return re.search(pattern, file.read(), re.MULTILINE) is not None


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

        return amp
    except ImportError as error:
        raise DeviceUnavailableError(
            f"--amp with torch {torch.__version__} on this device requires Ascend's or NVIDIA's apex with apex.amp "
            f"({error}); install it or leave --amp out"
        ) from error
