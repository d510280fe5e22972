# SPDX-License-Identifier: BSD-3-Clause
"""Everything that differs between npu, gpu, mps and cpu, and between PyTorch 1.5, 1.8 and 2.x.

`choose` settles the device once, before any process starts; every process then makes one `Accelerator` of it.
"""
import contextlib
import ctypes
import importlib.util
import inspect
import os
import re
import shutil
import sys
import sysconfig

# torch >= 2.5 loads torch_npu by itself and then dies where CANN is missing; it is imported below, when it is wanted.
os.environ.setdefault('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')
# Where a peer dies, torch's store logs a C++ backtrace; processes.py says it in one line.
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

import torch  # noqa: E402
from torch import nn  # noqa: E402

TORCH = tuple(int(number) for number in re.findall(r'\d+', torch.__version__)[:2])
BACKENDS = {'npu': 'hccl', 'gpu': 'nccl', 'mps': 'gloo', 'cpu': 'gloo'}
TORCH_TYPES = {'npu': 'npu', 'gpu': 'cuda', 'mps': 'mps', 'cpu': 'cpu'}


class Unavailable(Exception):
    """What the user asked for is not there; the text says what, and what to do."""


# --- which device -----------------------------------------------------------------------------------------------------

def _count_npus():
    if TORCH >= (1, 8) and not hasattr(torch, 'npu'):
        if importlib.util.find_spec('torch_npu') is None:
            raise Unavailable('no NPU: the package torch_npu is not installed; install the one for torch {}.{}, '
                              'or choose another --device'.format(*TORCH))
        try:
            importlib.import_module('torch_npu')
        except (ImportError, OSError, RuntimeError) as error:
            raise Unavailable('no NPU: torch_npu does not load ({}); run `source /usr/local/Ascend/ascend-toolkit/'
                              'set_env.sh` (where CANN is installed), or choose another --device'
                              .format(str(error).splitlines()[0]))
    if not hasattr(torch, 'npu') or not torch.npu.is_available():
        raise Unavailable('no NPU answers: check `npu-smi info`, run `source /usr/local/Ascend/ascend-toolkit/'
                          'set_env.sh`, or choose another --device')
    return torch.npu.device_count()


def _count_gpus():
    if not torch.cuda.is_available():
        raise Unavailable('no GPU: torch {} finds none; check `nvidia-smi` and that this torch has CUDA, or choose '
                          'another --device'.format(torch.__version__))
    return torch.cuda.device_count()


def _count_mps():
    mps = getattr(torch.backends, 'mps', None)
    if mps is None or not mps.is_available():
        raise Unavailable('no MPS: it needs an Apple GPU and torch 1.12 or later; choose another --device')
    return 1


DEVICE_COUNTS = {'npu': _count_npus, 'gpu': _count_gpus, 'mps': _count_mps, 'cpu': lambda: None}  # None: no limit


def choose(args):
    """Settle `args.device`, `args.device_list`, `args.dist_backend` and `args.precision` before any process starts.

    Raises Unavailable where the installed torch or the machine cannot do what the flags say.
    """
    if args.device == 'auto':
        args.device, count = _first_that_works()
    else:
        count = DEVICE_COUNTS[args.device]()
    _choose_list(args, count)
    beyond = [index for index in args.device_list if count is not None and index >= count]
    if beyond:
        raise Unavailable('{} {} was asked for, but there are {} (0 to {}): see --gpu and --device-list'.format(
            args.device, beyond[0], count, count - 1))
    args.dist_backend = args.dist_backend or BACKENDS[args.device]
    if args.dist_backend not in (BACKENDS[args.device], 'gloo'):
        raise Unavailable('--dist-backend {} does not serve a {}: leave it out for {}'.format(
            args.dist_backend, args.device, BACKENDS[args.device]))
    args.precision = _precision(args)
    if args.loss_scale_value is not None and args.precision == 'bf16':
        _notice('--loss-scale-value is ignored: bf16 has the range of fp32 and needs no scale')
    if args.deterministic and TORCH < (1, 8):
        raise Unavailable('--deterministic needs torch 1.8 or later, this is {}'.format(torch.__version__))
    _check_options_of_torch_2(args)


def _check_options_of_torch_2(args):
    if args.profile and not hasattr(torch, 'profiler'):
        raise Unavailable('--profile needs torch 1.8.1 or later, this is {}'.format(torch.__version__))
    for flag, wanted in (('--compile', args.compile), ('--grad-compress', args.grad_compress != 'none')):
        if wanted and TORCH < (2, 0):
            raise Unavailable('{} needs torch 2.0 or later, this is {}: leave it out'.format(flag, torch.__version__))
    if args.compile:
        _check_compiler(args.device)


def _check_compiler(device):
    """torch.compile builds C++ for a CPU; for a GPU Triton makes the kernels and builds a C launcher for each."""
    if device not in ('gpu', 'cpu'):
        raise Unavailable('--compile serves gpu and cpu, this is {}: leave it out'.format(device))
    names = [os.environ.get('CXX', 'g++')] if device == 'cpu' else [os.environ.get('CC', 'gcc'), 'clang']
    if not any(map(shutil.which, names)):
        raise Unavailable('--compile needs a compiler, and {} is not there: install it (Debian: apt-get install {}), or '
                          'leave --compile out'.format(names[0], 'g++' if device == 'cpu' else 'gcc'))
    if not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')):
        raise Unavailable('--compile needs the headers of Python, and {} has no Python.h: install them (Debian: apt-get '
                          'install python3-dev), or leave --compile out'.format(sysconfig.get_path('include')))
    if device == 'gpu' and importlib.util.find_spec('triton') is None:
        raise Unavailable('--compile on a GPU needs the package triton: install it, or leave --compile out')


def _choose_list(args, count):
    """Settle `args.device_list`: as given, all devices, or the one of a one-device run."""
    given = args.device_list
    everything = list(range(count or 1))
    args.device_list = given or everything
    if args.multiprocessing_distributed or 'LOCAL_RANK' in os.environ:
        return
    if args.gpu is not None:
        if given and args.gpu >= len(given):
            raise Unavailable('--gpu {} is an index into --device-list, which has {} entries'.format(args.gpu, len(given)))
        args.device_list = [given[args.gpu] if given else args.gpu]
    elif len(args.device_list) > 1:
        _notice('{} devices, and this is a one-device run: taking number {}; --multiprocessing-distributed uses all, '
                '--gpu N another'.format(len(args.device_list), args.device_list[0]))
        args.device_list = args.device_list[:1]


def _notice(text):
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print('=> ' + text, flush=True)


def _first_that_works():
    for name, count_devices in DEVICE_COUNTS.items():
        try:
            return name, count_devices()
        except Unavailable:
            continue
    raise AssertionError('the cpu always works')


def _precision(args):
    """The number format of the step: 'fp32', 'fp16' or 'bf16'."""
    if not args.amp or args.opt_level == 'O0':
        return 'fp32'
    wanted = args.amp_dtype
    if args.device == 'cpu':
        if TORCH < (1, 10):
            raise Unavailable('--amp on a CPU needs torch 1.10 or later, this is {}; leave --amp out or use '
                              '--opt-level O0'.format(torch.__version__))
        if wanted == 'fp16':
            raise Unavailable('--amp-dtype fp16 is 15 times slower than bf16 on a CPU and not supported there; '
                              'use --amp-dtype bf16')
        if wanted == 'auto' and not _cpu_has_bf16():
            _notice('this CPU has no bf16 instructions, and without them bf16 is slower than fp32: --amp changes nothing '
                    'here (--amp-dtype bf16 insists)')
            return 'fp32'
        return 'bf16'
    if args.device == 'mps' and TORCH < (2, 5):
        raise Unavailable('--amp on MPS needs torch 2.5 or later, this is {}'.format(torch.__version__))
    runtime = getattr(torch, TORCH_TYPES[args.device])
    if not _has_autocast(runtime):
        _load_apex()
        if wanted == 'bf16':
            raise Unavailable('--amp-dtype bf16 needs torch 1.10 or later, this is {}; use fp16'.format(torch.__version__))
        return 'fp16'
    has_bf16 = TORCH >= (1, 10) and getattr(runtime, 'is_bf16_supported', lambda: False)()
    if args.device == 'gpu' and has_bf16:  # torch also counts GPUs that emulate it; Ampere is the first that does not
        has_bf16 = torch.cuda.get_device_capability()[0] >= 8
    if wanted == 'bf16' and not has_bf16:
        raise Unavailable('--amp-dtype bf16: this {} has no bf16; use --amp-dtype fp16'.format(args.device))
    return wanted if wanted != 'auto' else 'bf16' if has_bf16 else 'fp16'


def _has_autocast(runtime):
    return TORCH >= (1, 10) or hasattr(getattr(runtime, 'amp', None), 'autocast')


def _load_apex():
    """apex.amp, which served mixed precision before torch 1.6 (Ascend's apex: on NPUs with torch 1.8 too).

    The `apex` of the Python package index is another project, and NVIDIA's has had no amp since 2025.
    """
    try:
        from apex import amp
        return amp
    except ImportError as error:
        raise Unavailable("--amp with torch {} here needs Ascend's or NVIDIA's apex with its amp ({}); install it or leave "
                          '--amp out'.format(torch.__version__, error))


def _cpu_has_bf16():
    """Whether the processor multiplies bf16 by itself (x86: avx512_bf16, amx_bf16; Arm: bf16)."""
    if not os.path.exists('/proc/cpuinfo'):
        return False
    with open('/proc/cpuinfo') as file:
        return re.search(r'^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b', file.read(), re.MULTILINE) is not None


def keep_freed_memory():
    """Stop glibc from handing freed memory back to the kernel; call before the first large tensor.

    Every large tensor of a CPU step is otherwise mapped and unmapped anew: 1.5 million page faults a step of VGG16.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # <malloc.h>
    libc = ctypes.CDLL(None)
    if sys.platform == 'linux' and hasattr(libc, 'mallopt'):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2 ** 31 - 1)
        libc.mallopt(m_arena_max, 1)


# --- one process's device ---------------------------------------------------------------------------------------------

class Accelerator:
    """The device of this process, and how the step runs on it.

    args: the flags after `choose`. index: the device's number. processes: how many share this node's cores.
    """

    def __init__(self, args, index, processes):
        self.type = args.device
        self.precision = args.precision
        self.half = {'fp16': torch.float16, 'bf16': torch.bfloat16}.get(args.precision)
        # O1 computes in half by autocast; O2 and O3 hold the weights themselves in half.
        self.half_weights = self.half is not None and args.opt_level in ('O2', 'O3')
        self.master_weights = self.half is not None and args.opt_level == 'O2'
        torch_type = TORCH_TYPES[self.type]
        self.device = torch.device(torch_type) if self.type in ('cpu', 'mps') else torch.device(torch_type, index)
        self._runtime = getattr(torch, torch_type, None)
        self.apex = None
        if self.half is not None and not _has_autocast(self._runtime):
            self.apex = _load_apex()
        # NPU kernels know no channels_last, torch before 1.7 half of it; elsewhere convolution wants it.
        self.memory_format = torch.contiguous_format if self.type == 'npu' or TORCH < (1, 7) else torch.channels_last
        self.pin_memory = self.type == 'gpu'
        if self.type == 'cpu':
            keep_freed_memory()
            torch.set_num_threads(max(1, available_cores() // processes))
        if self.type == 'gpu':
            torch.backends.cudnn.benchmark = not args.deterministic
        if self.type in ('gpu', 'npu'):
            self._runtime.set_device(self.device)
        self._copies = self._runtime.Stream(self.device) if self.type == 'gpu' else None
        if self.type == 'npu':
            _set_npu_options()
        if args.deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS is repeatable with a fixed workspace
            torch.use_deterministic_algorithms(True)

    def place(self, model):
        """Move an fp32 model here and give its weights the precision of the step.

        Returns (model, masters): the parameters that the optimizer is to step, fp32 copies at O2, else the model's own.
        """
        model = model.to(self.device, memory_format=self.memory_format)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.half_weights or self.apex is not None:
            return model, weights
        copies = [weight.detach().clone().requires_grad_() for weight in weights] if self.master_weights else weights
        for layer in model.modules():
            if not (self.master_weights and isinstance(layer, nn.BatchNorm2d)):  # O2 keeps batch norm in fp32
                for parameter in layer.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.half)
                for name, buffer in layer.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        setattr(layer, name, buffer.to(self.half))
        return model, copies

    def prepare_training(self, model, args):
        """Place a model here and build what steps it. Returns (model, Scaler)."""
        model, masters = self.place(model)
        optimizer = self._build_sgd(masters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
        scale = (args.loss_scale_value or 1024.0) if self.precision == 'fp16' else 1.0
        if self.apex is not None:
            exact = [master.detach().clone() for master in masters]
            options = {'combine_grad': True} if self.type == 'npu' else {}  # Ascend's: one buffer of all gradients
            model, optimizer = self.apex.initialize(model, optimizer, opt_level=args.opt_level, loss_scale=scale,
                                                    verbosity=0, **options)
            masters, scale = list(self.apex.master_params(optimizer)), 1.0
            for master, weight in zip(masters, exact):  # apex copies its masters from weights that are half already
                master.data.copy_(weight)
        return model, Scaler(model, masters, optimizer, self.device, loss_scale=scale, apex=self.apex,
                             clip_grad_norm=args.clip_grad_norm, average=bool(args.ema_decay))

    def autocast(self):
        """The context of the forward pass: autocast at O1, nothing else otherwise."""
        if self.half is None or self.half_weights or self.apex is not None:
            return contextlib.nullcontext()
        if TORCH >= (1, 10):
            return torch.autocast(self.device.type, dtype=self.half)
        return self._runtime.amp.autocast()

    def local_gradients(self, model, local):
        """A context in which gradients add up here and are not sent: all but the last batch of an accumulated step."""
        return model.no_sync() if local and hasattr(model, 'no_sync') else contextlib.nullcontext()

    def to_device(self, tensor):
        """A tensor of a batch on the device. On a GPU, where the loader pins its memory, a stream of its own copies it: beside
        the steps that are still being computed, not behind them."""
        if self._copies is None:
            return tensor.to(self.device)
        with self._runtime.stream(self._copies):
            tensor = tensor.to(self.device, non_blocking=True)
        computing = self._runtime.current_stream()
        computing.wait_stream(self._copies)
        tensor.record_stream(computing)  # its memory belongs to the copying stream, and is not free before the step ends
        return tensor

    def loader_options(self, workers):
        """What a DataLoader with that many workers is to be told here."""
        options = {'num_workers': workers, 'pin_memory': self.pin_memory}
        if workers and sys.platform == 'linux':
            # Python 3.14 would start workers anew, with all imports and a copy of the index each.
            options['multiprocessing_context'] = 'fork'
        if workers and TORCH >= (1, 7):
            options['persistent_workers'] = True
        return options

    def _build_sgd(self, params, *, lr, momentum, weight_decay):
        """Momentum SGD over a list of parameters, fused into one kernel where this torch and device have that."""
        options = {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay}
        if self.type == 'npu' and hasattr(sys.modules.get('torch_npu'), 'optim'):
            return sys.modules['torch_npu'].optim.NpuFusedSGD(params, **options)
        if self.type in ('gpu', 'cpu') and TORCH >= (2, 4):
            options['fused'] = True
        optimizer = torch.optim.SGD(params, **options)
        if momentum:  # torch's fused kernel leaves the buffers unset where the first of all steps is skipped
            for parameter in params:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        return optimizer

    def wrap_ddp(self, model, grad_compress='none'):
        """DistributedDataParallel; batch norm's figures are not sent at every step, `World.broadcast_buffers` does it.

        grad_compress: 'bf16' or 'fp16' sends the gradients in that format, by DDP's own hooks. No static_graph: it fails in
        a first step under no_sync, and gains nothing where every parameter gets a gradient (bench/RESULTS.md).
        """
        names = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
        options = {'forward_sync_buffers' if 'forward_sync_buffers' in names else 'broadcast_buffers': False}
        if TORCH >= (1, 8) and self.type != 'npu':  # the fused NPU optimizer keeps the gradients in a buffer of its own
            options['gradient_as_bucket_view'] = True
        if self.type in ('gpu', 'npu'):
            options['device_ids'] = [self.device.index]
        model = nn.parallel.DistributedDataParallel(model, **options)
        if grad_compress != 'none':
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
            model.register_comm_hook(None, getattr(default_hooks, grad_compress + '_compress_hook'))
        return model

    def compile(self, model):
        """The model with its forward and backward passes compiled, at the first step; to be called on what DDP has wrapped.

        DDP's buckets are then sent while the rest of the backward pass runs: Dynamo splits the graph between them. The
        model inside keeps its own forward pass and its parameters' names. Raises Unavailable.
        """
        try:
            return torch.compile(model, dynamic=False)  # batches of training are all of one size
        except RuntimeError as error:  # a Python newer than this torch knows, Windows
            raise Unavailable('--compile: {}; leave it out'.format(str(error).splitlines()[0]))

    @contextlib.contextmanager
    def trace(self, path, tell):
        """Profile ten steps after five of warm-up and write them to `path`, a Chrome trace (Perfetto, chrome://tracing).

        Yields a profiler: its `step()` is to be called after each step. tell: called with a line on where the file is.
        """
        library = getattr(sys.modules.get('torch_npu'), 'profiler', None) or torch.profiler
        schedule = library.schedule(wait=4, warmup=1, active=10, repeat=1)
        written = []

        def write(profiler):
            profiler.export_chrome_trace(path)
            written.append(path)
            tell('=> --profile: a trace of the steps after the first five is in {}'.format(path))
        with library.profile(schedule=schedule, on_trace_ready=write) as profiler:
            yield profiler
        if not written:
            tell('=> --profile: no trace, the run ended within the five steps of warm-up')

    def seed(self, seed):
        """Seed torch's generators, this device's included."""
        torch.manual_seed(seed)
        if self.type == 'npu':
            self._runtime.manual_seed(seed)

    def synchronize(self):
        if self.type != 'cpu':
            self._runtime.synchronize()

    def name(self):
        """The chip, for the records."""
        if self.type in ('gpu', 'npu') and hasattr(self._runtime, 'get_device_name'):
            return self._runtime.get_device_name(self.device)
        if self.type == 'cpu' and os.path.exists('/proc/cpuinfo'):
            with open('/proc/cpuinfo') as file:
                for line in file:
                    if line.startswith('model name'):
                        return line.partition(':')[2].strip()
        return self.type


def _set_npu_options():
    if hasattr(torch.npu, 'set_compile_mode'):
        torch.npu.set_compile_mode(jit_compile=False)  # compiled kernels from the package, none built at run time
    if hasattr(torch.npu, 'config'):
        torch.npu.config.allow_internal_format = True  # the chip's own 5-D layout for convolution


def _antialiased_resize(picture, box, size, flip):
    """A box (left, top, right, bottom) of a (H, W, 3) uint8 array, resized to (size, size, 3) as Pillow's BILINEAR does it,
    and mirrored if `flip`."""
    left, top, right, bottom = box
    # (1, 3, h, w), channels last in memory without a copy. The batch's axis comes first of all: by its stride torch knows
    # the layout, and makes the result in it too; made in planes, it would take 0.17 ms longer.
    crop = torch.from_numpy(picture).unsqueeze(0)[:, top:bottom, left:right].permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(crop, (size, size), mode='bilinear', antialias=True)[0].permute(1, 2, 0)
    return (resized.flip(1) if flip else resized).numpy()


antialiased_resize = _antialiased_resize if TORCH >= (2, 1) else None  # older ones resize no uint8


def tracing_exporter():
    """What makes torch.onnx.export trace the model: torch's other way, its default since 2.9, needs onnxscript too."""
    return {'dynamo': False} if 'dynamo' in inspect.signature(torch.onnx.export).parameters else {}


def devices_suffice(args):
    """Whether each of `args.processes` finds a device of its own; on a CPU any number does."""
    return args.device == 'cpu' or args.processes <= len(args.device_list)


def cores_left(device, processes):
    """The loader workers that a node has cores for beside its processes; none on a CPU, where training takes every core."""
    return 0 if device == 'cpu' else max(processes, available_cores() - processes)


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


# --- gradients to weights ---------------------------------------------------------------------------------------------

class Scaler:
    """From a loss to new weights: loss scale, fp32 masters, clipping, the skip of a step that is not finite, averages.

    Everything stays on the device: the flag that skips, the dynamic scale, the count of skips. One pass over the
    gradients gives their norm, which serves the check and the clipping alike; after an all-reduce it is the same on
    every process, so all of them skip alike. Where the optimizer takes no flag (torch before 2.4, NPU, mps) the flag is
    read on the host: one synchronisation a step.

    loss_scale: a number, or 'dynamic' (start at 65536, halve on overflow, double after 2000 good steps: the rule of
    Micikevicius et al., arXiv:1710.03740, with apex's constants).
    """

    GROWTH_INTERVAL = 2000  # steps

    def __init__(self, model, masters, optimizer, device, *, loss_scale=1.0, clip_grad_norm=None, apex=None, average=False):
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = masters
        self.apex = apex  # keeps masters and scale itself, and leaves unscaled gradients in the masters
        self.has_copies = masters[0] is not self.weights[0]
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm
        self.dynamic = loss_scale == 'dynamic'
        self.scale = torch.full((), 65536.0 if self.dynamic else float(loss_scale), device=device)
        self.scaled = self.dynamic or float(loss_scale) != 1
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int32, device=device)
        self.longest_skip = torch.zeros((), dtype=torch.int32, device=device)  # since it was last read
        self.skips_on_device = getattr(self.optimizer, '_step_supports_amp_scaling', False)
        # Batch norm's running figures, to be put back where a step is skipped.
        self.model, self.good_buffers = model, [buffer.clone() for buffer in model.buffers()]
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)  # whether the last step was
        # What is averaged (of weights: the masters), what the averages stand in for, and the averages themselves, fp32.
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()] if average else []
        self.averaged_from, self.averaged_for = (masters + buffers, self.weights + buffers) if average else ([], [])
        self.averages = [tensor.detach().to(torch.float32, copy=True) for tensor in self.averaged_from]

    def backward(self, loss):
        if self.apex is not None:
            with self.apex.scale_loss(loss, self.optimizer) as scaled:
                scaled.backward()
            return
        (loss * self.scale if self.scaled else loss).backward()

    def step(self):
        """Apply the gradients that backward left in the weights, or none of them where one is not finite."""
        if self.has_copies and self.apex is None:
            for master, weight in zip(self.masters, self.weights):
                if master.grad is None:
                    master.grad = torch.empty_like(master)
                master.grad.copy_(weight.grad)
                weight.grad = None
        gradients = [master.grad for master in self.masters]
        norm = _norm(gradients) / self.scale
        found_inf = (~torch.isfinite(norm)).float()  # () 1.0 or 0.0
        divisor = self.scale
        if self.clip_grad_norm:
            divisor = divisor * (norm / self.clip_grad_norm).clamp(min=1)
        if self.skips_on_device:
            self.optimizer.grad_scale, self.optimizer.found_inf = divisor, found_inf
            self.optimizer.step()
        elif not found_inf.item():  # a synchronisation
            if self.scaled or self.clip_grad_norm:
                for gradient in gradients:
                    gradient.copy_(gradient.float() / divisor)
            self.optimizer.step()
        self._after_step(found_inf > 0)

    def average(self, decay):
        """averages = decay · averages + (1 - decay) · weights, except after a skipped step. No synchronisation."""
        with torch.no_grad():
            share = (~self.skipped).float() * (1 - decay)
            for average, tensor in zip(self.averages, self.averaged_from):
                average.lerp_(tensor.float(), share)

    @contextlib.contextmanager
    def averages_in_place(self):
        """A context in which the model computes with the averages, where they are kept."""
        own = [tensor.data for tensor in self.averaged_for]
        for tensor, average in zip(self.averaged_for, self.averages):
            tensor.data = average.to(tensor.dtype)
        try:
            yield
        finally:
            for tensor, data in zip(self.averaged_for, own):
                tensor.data = data

    def _after_step(self, skipped):
        self.skipped = skipped
        with torch.no_grad():
            self._publish()
            for buffer, good in zip(self.model.buffers(), self.good_buffers):
                buffer.copy_(torch.where(skipped, good, buffer))
                good.copy_(buffer)
        zero = torch.zeros_like(self.good_steps)
        # A dynamic scale that is still coming down is no sign of divergence.
        counted = skipped & (self.scale <= 1) if self.dynamic else skipped
        self.skipped_in_a_row = torch.where(counted, self.skipped_in_a_row + 1, zero)
        self.longest_skip = torch.max(self.longest_skip, self.skipped_in_a_row)
        if self.dynamic:
            self.good_steps = torch.where(skipped, zero, self.good_steps + 1)
            grow = self.good_steps >= self.GROWTH_INTERVAL
            self.scale = torch.where(skipped, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
            self.good_steps = torch.where(grow, zero, self.good_steps)
        self.optimizer.zero_grad()

    def _publish(self):
        """Copy the masters into the half-precision weights that the model computes with."""
        if self.has_copies and self.apex is None:
            for master, weight in zip(self.masters, self.weights):
                weight.copy_(master)

    def read_longest_skip(self):
        """Steps skipped in a row at worst since the last call. A synchronisation."""
        longest = int(self.longest_skip.item())
        self.longest_skip = self.skipped_in_a_row.clone()
        return longest

    def state_dict(self):
        """Plain numbers. A synchronisation."""
        state = {'loss_scale': self.scale.item(), 'good_steps': self.good_steps.item(),
                 'skipped_in_a_row': self.skipped_in_a_row.item()}
        return dict(self.apex.state_dict(), **state) if self.apex is not None else state

    def load_state_dict(self, state):
        """Of `state_dict`, or of the reference, which keeps apex's state alone."""
        if self.apex is not None:
            self.apex.load_state_dict({key: value for key, value in state.items() if key.startswith('loss_scaler')})
        if 'good_steps' not in state:
            return
        if self.dynamic:
            self.scale.fill_(float(state['loss_scale']))
        self.good_steps.fill_(int(state['good_steps']))
        self.skipped_in_a_row.fill_(int(state['skipped_in_a_row']))

    def model_state_dict(self, model, averaged=False):
        """The model's state_dict in fp32 on the CPU: the masters in place of half-precision weights, or the averages."""
        state = model.state_dict()
        pairs = zip(self.averaged_for, self.averages) if averaged else zip(self.weights, self.masters)
        exact = {id(tensor): value for tensor, value in pairs}
        for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            state[name] = exact.get(id(tensor), state[name])
        for name, value in state.items():
            state[name] = value.detach().to('cpu', torch.float32 if value.is_floating_point() else value.dtype)
        return state

    def load_averages(self, model, state):
        """Take over what `model_state_dict` gave as averaged."""
        averages = {id(tensor): average for tensor, average in zip(self.averaged_for, self.averages)}
        for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            if id(tensor) in averages:
                averages[id(tensor)].copy_(state[name])

    def optimizer_state_dict(self):
        """What torch.optim.SGD.state_dict gives on current torch, in fp32, on any torch and device."""
        options = {key: value for key, value in self.optimizer.param_groups[0].items() if key != 'params'}
        momentum = {position: {'momentum_buffer': self.optimizer.state[parameter]['momentum_buffer'].to('cpu', torch.float32)}
                    for position, parameter in enumerate(self.masters)
                    if self.optimizer.state[parameter].get('momentum_buffer') is not None}
        return {'state': momentum, 'param_groups': [dict(options, params=list(range(len(self.masters))))]}

    def load_optimizer_state(self, state):
        """Take over a state_dict of torch's SGD, the momentum by the position of its parameter.

        Raises ValueError where positions or shapes do not match.
        """
        order = [key for group in state['param_groups'] for key in group['params']]  # torch 1.5 numbers them by id()
        if len(order) != len(self.masters):
            raise ValueError('it steps {} parameters, here {}'.format(len(order), len(self.masters)))
        for position, (key, parameter) in enumerate(zip(order, self.masters)):
            momentum = state['state'].get(key, {}).get('momentum_buffer')
            if momentum is None:  # never stepped
                continue
            if momentum.shape != parameter.shape:
                raise ValueError('the momentum of parameter {} is {}, here {}'.format(
                    position, tuple(momentum.shape), tuple(parameter.shape)))
            # Copied, not adopted: the fused kernels want the parameter's own memory format.
            self.optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter).copy_(momentum)


def parameter_digest(model):
    """A whole number that tells two sets of parameters apart by a single bit. One synchronisation."""
    total = 0
    for position, parameter in enumerate(model.parameters()):
        if TORCH >= (1, 7):
            bits = parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
            total = total + bits.sum(dtype=torch.int64) * (2 * position + 1)
        else:  # no view of the bits
            total = total + parameter.detach().double().sum() * (2 * position + 1)
    return total.item()


def _norm(gradients):
    """The 2-norm of all gradients together, summed in fp32 whatever their format: a () float32 on their device."""
    if hasattr(nn.utils, 'get_total_norm') and gradients[0].dtype == torch.float32:
        return nn.utils.get_total_norm(gradients)
    return torch.stack([gradient.norm(p=2, dtype=torch.float32) for gradient in gradients]).norm()
