# SPDX-License-Identifier: BSD-3-Clause
"""Stands in for an NPU where there is none, and computes nothing: for tests of which device, backend, precision and
memory format main.py chooses, and of what it asks the runtime for.

On torch 2.x `register` gives torch a real backend named npu (torch.device('npu:0'), autocast('npu')) whose module is a
Recorder; on torch 1.x `torch.npu` is only the Recorder, a double.
"""
import contextlib
import sys
import types

import torch


class Recorder(types.ModuleType):
    """A torch.npu that answers what is asked of it and keeps a list of the calls."""

    def __init__(self, count=8, bf16=False):
        super().__init__('torch.npu')
        self.count, self.bf16, self.calls, self.current = count, bf16, [], 0
        self.config = types.SimpleNamespace(allow_internal_format=None)
        self.amp = types.SimpleNamespace(autocast=contextlib.nullcontext)

    def is_available(self):
        return self.count > 0

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return self.count

    def current_device(self):
        return self.current

    def is_bf16_supported(self):
        return self.bf16

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def set_device(self, device):
        self.current = getattr(device, 'index', device)
        self.calls.append('set_device {}'.format(self.current))

    def set_compile_mode(self, jit_compile):
        self.calls.append('jit_compile {}'.format(jit_compile))

    def synchronize(self):
        self.calls.append('synchronize')

    def manual_seed(self, seed):
        self.calls.append('manual_seed')

    def manual_seed_all(self, seed):
        pass

    def get_device_name(self, device):
        return 'no NPU, a recorder'


def register(**options):
    """Make torch.npu a Recorder, behind a registered backend where torch can have one in Python. Returns it."""
    recorder = Recorder(**options)
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as set_up
    except ImportError:
        torch.npu = sys.modules['torch.npu'] = recorder
    else:
        set_up('npu', backend_module=recorder)
    return recorder
