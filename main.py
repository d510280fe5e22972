# SPDX-License-Identifier: BSD-3-Clause
"""Train VGG on ImageNet, CIFAR-10 or a folder of images, on an NPU, a GPU or a CPU.

    python main.py                                              # the embedded digits, on the first device that works
    python main.py /data/imagenet --amp --device gpu            # one GPU, mixed precision
    python main.py /data/imagenet --amp --device npu --multiprocessing-distributed -b 2048 --lr 0.08   # all NPUs

Result: 97.49% to 98.89% Acc@1 on the digits, five seeds, two cores of an AMD EPYC in bf16 (bash test/quickstart.sh).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

from engine import console, options  # first of all: engine sets variables that torch reads when it is imported
from engine.checkpoints import Checkpointer, TrainState
from engine.data import (
    BatchMixer,
    ImageBatches,
    ImageDataset,
    Preprocessing,
    ResumableBatchSampler,
    open_datasets,
    read_batches,
    worker_options,
)
from engine.device import Amp, ComputeDevice, MixedPrecisionOptimizer, ModelEma
from engine.evaluation import ViewAverage, write_evaluation
from engine.parallel import Communicator, launch
from engine.records import (
    AccuracyCounter,
    LearningCheck,
    Logger,
    Predictions,
    ProgressMeter,
    Throughput,
    cross_entropy,
    run_info,
)
from engine.signals import StopSignals

import vgg

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

EMBEDDED = "the embedded digits"
Batch = Any  # (images, target, indices): (N, S, S, 3) uint8; (N,) int64; (N,) int64, their places in the dataset
Normalize = Callable[[Any], torch.Tensor]  # (N, S, S, 3) uint8 on the host to (N, 3, S, S) on the device
BuildNetwork = Callable[..., vgg.VGG]  # from architecture, number of classes and head; tests build a smaller one


@dataclass
class Job:
    """What every part of a run uses."""

    args: argparse.Namespace
    comm: Communicator
    device: ComputeDevice
    amp: Amp
    logger: Logger
    stop: StopSignals


@dataclass
class Data:
    """What a run trains and validates on: no training images for --evaluate, none at all for --dummy."""

    train: ImageDataset | None
    val: ImageDataset | None
    preprocessing: Preprocessing  # of validation images: size, crop, mean and standard deviation
    count: int  # training images, synthetic ones too


@dataclass
class Training:
    """Everything that training changes."""

    network: vgg.VGG
    model: torch.nn.Module  # the network as it is trained: wrapped by DDP, compiled
    normalize: Normalize
    optimizer: MixedPrecisionOptimizer
    ema: ModelEma | None
    mixer: BatchMixer | None
    class_weights: torch.Tensor | None  # of the loss
    counter: AccuracyCounter  # of the current epoch
    learning: LearningCheck
    state: TrainState
    checkpointer: Checkpointer
    profiler: Any = None


# --- data -------------------------------------------------------------------------------------------------------------


def build_data(job: Job, start: Any) -> Data:
    """Open the training and validation images, with the preprocessing of the checkpoint `start`, if there is one.

    The local main process goes first: it lists the files of a folder, and the others find its cached index. Raises
    DataError, or UsageError if the processes see different files.
    """
    args, train, val = job.args, None, None
    with job.comm.local_main_first():
        if not args.dummy:
            train, val = open_datasets(
                args.data,
                evaluate=args.evaluate,
                skip_unreadable=args.bad_images == "skip",
                val_split=args.val_split,
                saved_val_split=None if start is None else start.info.val_split,
            )
    job.comm.check_same({"the fingerprint of --data": [part.fingerprint for part in (train, val) if part is not None]})
    return Data(train, val, options.resolve_preprocessing(args, val, start), len(train) if train else args.dummy or 0)


def build_sampler(job: Job, count: int, *, training: bool, start: tuple[int, int] = (0, 0)) -> ResumableBatchSampler:
    """Return the batches of this process of `count` images.

    Training continues from `start` (epoch, images used of it) over all epochs without a pause; validation is one pass.
    """
    args = job.args
    return ResumableBatchSampler(
        count,
        args.batch_size // args.processes,
        rank=job.comm.rank,
        world_size=job.comm.world_size,
        shuffle=training,
        accum_steps=args.accum_steps if training else 1,
        seed=args.seed,
        epochs=args.epochs if training else 1,
        start=start,
        with_previous=training and bool(args.mixup or args.cutmix),  # BatchMixer mixes an image with the one before it
    )


def build_loader(
    job: Job, dataset: ImageDataset, transform: Any, sampler: ResumableBatchSampler, scales: Sequence[int] = ()
) -> DataLoader:
    """Return a DataLoader of uint8 batches; of whole images if `scales` are given. transform: of each image."""
    return DataLoader(
        ImageBatches(dataset, transform, seed=job.args.seed, scales=scales),  # type: ignore[arg-type]
        batch_size=None,  # the sampler gives whole batches
        sampler=sampler,  # type: ignore[arg-type]
        **job.device.loader_options(),
        **worker_options(-(-job.args.workers // job.args.processes)),
    )


def synthetic_batches(job: Job, sampler: ResumableBatchSampler, size: int) -> Iterator[Batch]:
    """Yield the same random batch without end, made on the device: for measuring the step and nothing else."""
    count = sampler.local_batch + sampler.with_previous
    images = torch.randint(0, 256, (count, size, size, 3), device=job.device.device).byte()
    return itertools.repeat((images, torch.randint(0, 1000, (count,), device=job.device.device), torch.arange(count)))


# --- model and optimizer ----------------------------------------------------------------------------------------------


def build_training(
    job: Job, network: vgg.VGG, normalize: Normalize, data: Data, checkpointer: Checkpointer
) -> Training:
    """Move a network to the device; build its optimizer, EMA, DDP and compiled form, as the flags say."""
    args, device, info = job.args, job.device, checkpointer.info
    device.place(network, one_shape=True)  # so that cuDNN may search for the fastest kernels
    weights = job.amp.convert(network)  # at O2 fp32 master weights, else the network's own
    groups = job.amp.parameter_groups(network, weights, features_lr=args.features_lr, no_bias_decay=args.no_bias_decay)
    sgd = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay, **device.sgd_options())
    limits = {"loss_scale": args.loss_scale_value, "clip_grad_norm": args.clip_grad_norm}
    optimizer = job.amp.optimizer(network, sgd, weights, **limits)
    ema = ModelEma(network, optimizer.weights, optimizer.master_weights) if args.ema_decay else None
    model: torch.nn.Module = network
    if job.comm.world_size > 1:
        model = DistributedDataParallel(network, **device.ddp_options())
        if args.grad_compress != "none":
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            model.register_comm_hook(None, getattr(default_hooks, f"{args.grad_compress}_compress_hook"))
    if args.compile:
        model = device.compile(model)
    mixer = BatchMixer(args.mixup, args.cutmix, len(info.classes), args.seed) if args.mixup or args.cutmix else None
    counter = AccuracyCounter(device.device, finite_only=True)
    state = TrainState(epoch=args.start_epoch, best_by=args.best)
    class_weights = None if info.class_weights is None else device.to_device(torch.tensor(info.class_weights))
    learning = LearningCheck(data.train, data.val, info.class_weights, args.label_smoothing)
    return Training(
        network, model, normalize, optimizer, ema, mixer, class_weights, counter, learning, state, checkpointer
    )


def learning_rate(epoch: int, share: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then --lr-schedule. share: of the epoch that is done, which the default schedule leaves out.

    The cosine is that of Loshchilov & Hutter, arXiv:1608.03983, onecycle is a triangle as in Smith & Topin,
    arXiv:1708.07120, step is that of pytorch/examples: a tenth every 30 epochs.
    """
    now = epoch + share if args.lr_schedule else epoch
    if now < args.warmup_epochs:
        return args.lr * (now + 1) / (args.warmup_epochs + 1)
    if args.lr_schedule == "step":
        return max(args.lr * 0.1 ** (now // args.lr_step_size), args.min_lr)
    progress = (now - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    left = 1 - progress if args.lr_schedule == "onecycle" else 0.5 * (1 + math.cos(math.pi * progress))
    return args.min_lr + (args.lr - args.min_lr) * left


# --- the loops --------------------------------------------------------------------------------------------------------


def train_one_epoch(job: Job, training: Training, batches: Iterator[Batch], steps: int) -> bool:
    """Train to the end of the epoch of `steps` steps. Returns whether to stop the run here."""
    args, state, counter = job.args, training.state, training.counter
    training.model.train()
    training.network.first_blocks(args.freeze_blocks).eval()  # frozen batch norm keeps its statistics too
    global_batch = args.batch_size * args.nodes * args.accum_steps
    throughput = Throughput(int(min(steps - state.step_in_epoch, (args.stop_step_num or math.inf) - state.step)))
    prefix, totals = f"Epoch: [{state.epoch}]", counter.read()
    meter = ProgressMeter(prefix, steps, args.print_freq, job.device.log_interval, state.step_in_epoch, totals)
    vote, stopping = job.comm.stop_vote(), False

    left = (steps - state.step_in_epoch) * global_batch
    with console.progress(state.images_in_epoch + left, state.images_in_epoch, f"Epoch {state.epoch}"):
        while state.step_in_epoch < steps and not stopping:
            lr = learning_rate(state.epoch, state.step_in_epoch / steps, args)
            training.optimizer.set_lr(lr)
            train_step(job, training, batches, meter)
            state.images_in_epoch += global_batch
            throughput.step(global_batch, job.device.synchronize)
            console.advance(global_batch)

            # A stop signal on any process stops all of them after the next step.
            done = state.step_in_epoch
            stopping = vote.vote(job.stop) or state.step == args.stop_step_num
            logged = meter.step(done, counter, stopping=stopping)
            if logged is not None:  # lines were printed: a synchronization, and so is the next line
                training.optimizer.check_finite(state.step)
                job.logger.event("train", samples=state.images_in_epoch, lr=lr, **logged.metrics(), **state.position())
            if args.save_freq and state.step % args.save_freq == 0 and done < steps and not stopping:
                job.device.synchronize()
                with throughput.paused():
                    save(job, training)

    stopping = vote.result() or stopping
    job.device.synchronize()
    totals = counter.read(job.comm.sum)
    rate = job.comm.broadcast(throughput.images_per_second())  # one value in the logs of all nodes
    console.line(f"[npu id: {job.device.index} ] * FPS@all {rate:.3f}")
    if state.step_in_epoch == steps:
        values = {"lr": lr, "images_per_second": rate, "seconds": throughput.seconds(), **totals.metrics()}
        job.logger.event("epoch", samples=state.images_in_epoch, **values, **state.position())
    return stopping


def train_step(job: Job, training: Training, batches: Iterator[Batch], meter: ProgressMeter) -> None:
    """Make one optimizer step, over args.accum_steps batches.

    It synchronizes once if the optimizer cannot skip on the device (NPU, MPS, torch before 2.4).
    """
    args, model, optimizer, state = job.args, training.model, training.optimizer, training.state
    # Dropout depends on (seed, step, rank) alone, so that a resumed run draws the same masks.
    job.device.seed(((args.seed * 1000003 + state.step) * 1000003 + job.comm.rank) % 2**63)
    for part in range(args.accum_steps):
        begin = time.perf_counter()
        images, target, _ = next(batches)
        meter.add_data_time(time.perf_counter() - begin)
        images, target = training.normalize(images), job.device.to_device(target)
        if training.mixer is not None:
            images, target = training.mixer(images, target, state.epoch, state.step_in_epoch * args.accum_steps + part)
        # DDP sends the gradients with the last batch only.
        is_last = part == args.accum_steps - 1 or job.comm.world_size == 1
        with contextlib.nullcontext() if is_last else model.no_sync():  # type: ignore[operator]
            with job.amp.autocast():
                logits = model(images)
                loss = cross_entropy(logits, target, args.label_smoothing, training.class_weights)
            optimizer.backward(loss / args.accum_steps)
        training.counter.update(loss, logits, target)
    optimizer.step()
    state.step += 1
    state.step_in_epoch += 1
    if training.ema is not None:
        training.ema.update(args.ema_decay, state.step, optimizer.skipped)
    if training.profiler is not None:
        training.profiler.step()


def validate(
    job: Job,
    network: torch.nn.Module,
    predict: Callable[[Any], torch.Tensor],
    loader: DataLoader,
    state: TrainState | None = None,
    predictions: Predictions | None = None,
) -> dict[str, float] | None:
    """Return the metrics over all processes, each validation image counted once; None if a signal stops the run.

    predict: from the images of a batch to logits. state: of the training that this validation belongs to, if any.
    predictions: filled with the images of this process.
    """
    network.eval()
    job.comm.broadcast_buffers(network)
    sampler: Any = loader.sampler
    classes = len(loader.dataset.dataset.classes)  # type: ignore[attr-defined]
    counter, steps = AccuracyCounter(job.device.device, classes=classes), sampler.steps_per_epoch
    meter = ProgressMeter("Test: ", steps, job.args.print_freq, job.device.log_interval, has_data=False)
    batches, vote, start = read_batches(loader), job.comm.stop_vote(), time.perf_counter()
    with torch.no_grad(), console.progress(sampler.count, 0, "Test"):
        for done in range(1, steps + 1):
            images, target, indices = next(batches)
            if len(target):  # the last batch of this process may be empty
                target = job.device.to_device(target)
                with job.amp.autocast():
                    logits = predict(images)
                counter.update(cross_entropy(logits, target), logits, target)
                if predictions is not None:
                    predictions.update(indices, logits)
            meter.step(done, counter)
            console.advance(sampler.global_batch)
            if vote.vote(job.stop):
                vote.result()
                return None
        next(batches, None)  # the end: workers exit now; torch 1.5 hangs if garbage collection ends them
    if vote.result():
        return None
    totals = counter.read(job.comm.sum)
    console.line(f"[npu id: {job.device.index} ] [AVG-ACC] * Acc@1 {totals.acc1:.3f} Acc@5 {totals.acc5:.3f}")
    timing = {"seconds": time.perf_counter() - start, **({} if state is None else state.position())}
    metrics = {**totals.metrics(), **counter.macro_metrics(job.comm.sum)}
    console.line(f"=> balanced accuracy {metrics['balanced_acc']:.3f}, macro F1 {metrics['macro_f1']:.3f}")
    job.logger.event("validate", samples=int(totals.images), **metrics, **timing)
    return metrics


# --- the run, from start to end ---------------------------------------------------------------------------------------


def train(
    job: Job, training: Training, sampler: ResumableBatchSampler, batches: Iterator[Batch], val: DataLoader | None
) -> int:
    """Train all epochs that are left. Returns the exit code."""
    args, state = job.args, training.state
    while not state.is_finished(args.epochs, args.stop_step_num, args.patience):
        steps = state.step_in_epoch + sampler.steps_left(state.images_in_epoch)
        stopping = state.step_in_epoch < steps and train_one_epoch(job, training, batches, steps)
        if stopping:
            save(job, training, final=True)
            return 0 if state.step == args.stop_step_num else job.stop.EXIT_CODE
        job.comm.check_same_parameters(training.network)
        done, best, metrics = state.epoch + 1, False, None
        validates = val is not None and (done == args.epochs or done % args.eval_freq == 0)
        if val is not None and validates:
            with training.ema.swapped_in() if training.ema is not None else contextlib.nullcontext():
                metrics = validate(job, training.network, predictor(training.network, training.normalize), val, state)
            if metrics is None:
                save(job, training, final=True)
                return job.stop.EXIT_CODE
            best = state.add_validation(metrics)
        training.learning.add_epoch(steps, training.counter.read(job.comm.sum), metrics)
        state.epoch, state.step_in_epoch, state.images_in_epoch = done, 0, 0
        training.counter = AccuracyCounter(job.device.device, finite_only=True)
        save(job, training, best=best, final=state.is_finished(args.epochs, None, args.patience))
        if validates:
            job.logger.curves()
    if state.epoch < args.epochs and state.has_lost_patience(args.patience):
        console.line(f"=> stopped by --patience: {state.since_best} validations without a better {args.best}")
    if val is not None and job.comm.rank == 0 and os.path.exists(training.checkpointer.best_path):
        best_by = f"{args.best.replace('acc1', 'Acc@1')} {state.best_value:.3f}"
        console.line(f"=> best {best_by}: {training.checkpointer.best_path}")
    return 0


def predictor(network: torch.nn.Module, normalize: Normalize) -> Callable[[Any], torch.Tensor]:
    """Return a function from (N, S, S, 3) uint8 images to logits (N, classes)."""
    return lambda images: network(normalize(images))


def save(job: Job, training: Training, *, best: bool = False, final: bool = False) -> None:
    """Save a checkpoint, while training continues; a failure of the final one raises SaveError.

    After a skipped step the weights may have diverged: no checkpoint is written, except the best and the final one.
    """
    begin, state, optimizer = time.perf_counter(), training.state, training.optimizer
    optimizer.check_finite(state.step)
    if optimizer.skipped_in_a_row.item() and not (best or final):  # a synchronization
        console.line(f"=> checkpoint at step {state.step} skipped: non-finite gradients")
        return
    totals = training.counter.read(job.comm.sum)
    training.checkpointer.save(state, totals, optimizer, training.ema, best=best, final=final)
    job.logger.event("checkpoint", seconds=time.perf_counter() - begin, **state.position())


def run_job(job: Job, build_network: BuildNetwork) -> int:
    """Find what to start from, open the data, build the network; then train or evaluate. Returns the exit code."""
    comm, args = job.comm, job.args
    comm.check_same({**options.shared_flags(args), "the program's SHA-256": run_info.program_checksum()})
    checkpointer = Checkpointer(args.output_dir, comm, evaluate=args.evaluate)
    checkpointer.find(args.resume, args.auto_resume, args.pretrained, args.arch)
    data = build_data(job, checkpointer.continued)
    size, memory = data.preprocessing.image_size, comm.min(job.device.memory())
    # batch: what a checkpoint keeps of -b and --accum-steps.
    args, batch = options.with_checkpoint(args, checkpointer.continued, data.count, size, memory, checkpointer.start)
    job = dataclasses.replace(job, args=args)
    info = options.describe_run(args, batch, data.preprocessing, data.train, data.val)
    checkpointer.check(info)
    device = f"{comm.world_size} × {args.device} ({job.device.name()})"
    console.line(f"=> {args.arch} on {device}, {args.precision}, torch {torch.__version__}")
    source = None if args.dummy else args.data or f"{EMBEDDED} (no --data given)"
    run_info.log_data(source, size, data.count, info.images_per_step, data.train, data.val, info.class_weights)
    if comm.rank == 0:
        run_info.write_bad_images(args.output_dir, data.train, data.val)

    job.device.seed(args.seed)
    network = build_network(args.arch, len(info.classes), head=args.head)
    checkpointer.load_weights(network)
    network.first_blocks(args.freeze_blocks).requires_grad_(False)
    normalize = job.device.normalizer(data.preprocessing.mean, data.preprocessing.std, job.amp.input_dtype)
    if args.evaluate:
        return evaluate(job, network, normalize, data, checkpointer)
    return fit(job, build_training(job, network, normalize, data, checkpointer), data)


def fit(job: Job, training: Training, data: Data) -> int:
    """Train from where the checkpoint has stopped to the end. Returns the exit code."""
    args, state, checkpointer, size = job.args, training.state, training.checkpointer, data.preprocessing.image_size
    job.comm.before_exit(checkpointer.finish)  # if another process is lost, the save in flight still ends
    checkpointer.restore(state, training.counter, training.optimizer, training.ema)
    sampler = build_sampler(job, data.count, training=True, start=(state.epoch, state.images_in_epoch))
    augmentation = None if data.train is None else options.resolve_augmentation(args, data.train, size)
    checkpointer.log_changes(state, training.ema, data.count)
    checkpointer.let_go()  # up to a gigabyte
    if data.train is None:
        batches = synthetic_batches(job, sampler, size)
    else:
        batches = read_batches(build_loader(job, data.train, augmentation, sampler))
    val_loader = None
    if data.val is not None:
        val_sampler = build_sampler(job, len(data.val), training=False)
        val_loader = build_loader(job, data.val, data.preprocessing, val_sampler)
    if state.is_finished(args.epochs, args.stop_step_num, args.patience):
        console.line(f"=> nothing left to train: epochs done: {state.epoch} of {args.epochs}, steps: {state.step}")
    else:
        record = {"flags": {**vars(args), "image_size": size}, "decoder": checkpointer.info.decoder}
        job.logger.write_args({**record, "processes": job.comm.world_size, **run_info.versions(job.device.name())})
    job.logger.event("start", **state.position())
    job.stop.training = True  # from here on a signal saves before it ends the run
    try:
        trace_path = os.path.join(args.output_dir, "trace.json") if args.profile and job.comm.rank == 0 else None
        with job.device.trace(trace_path) as training.profiler:
            code = train(job, training, sampler, batches, val_loader)
    finally:
        checkpointer.wait()  # a failure does not cost the checkpoint being written
    stopped = code == job.stop.EXIT_CODE
    if stopped:
        console.line(f"=> stopped on a signal after step {state.step}, checkpoint saved; continue with --auto-resume")
    job.logger.event("stop" if stopped else "done", acc1=state.best_acc1, **state.position())
    return code


def evaluate(job: Job, network: vgg.VGG, normalize: Normalize, data: Data, checkpointer: Checkpointer) -> int:
    """Validate the network; write metrics.json, --predictions and --report. Returns the exit code."""
    args, dataset, preprocessing = job.args, data.val, data.preprocessing
    assert dataset is not None  # --evaluate excludes --dummy
    if checkpointer.has_ema:
        console.line("=> evaluating the EMA weights (--ema-decay)")
    job.device.place(network)
    job.amp.convert(network)
    predict = predictor(network, normalize)
    scales, mirrored = options.resolve_views(args, preprocessing, dataset)
    if scales:
        predict = ViewAverage(network, normalize, view=args.eval_view, size=preprocessing.image_size, mirrored=mirrored)
    loader = build_loader(job, dataset, preprocessing, build_sampler(job, len(dataset), training=False), scales)
    job.logger.open()  # fails now, not when all is computed
    predictions = Predictions(len(dataset), len(dataset.classes)) if args.report or args.predictions else None
    metrics = validate(job, network, predict, loader, predictions=predictions)
    assert metrics is not None  # a signal ends the process, because nothing is being trained
    if predictions is not None:
        job.comm.max_(predictions.top5)  # -1 where an image was another process's
        job.comm.max_(predictions.probabilities)
    if job.comm.rank == 0:
        facts = {name: getattr(args, name) for name in ("arch", "eval_view", "eval_scales", "precision", "batch_size")}
        facts.update(image_size=preprocessing.image_size, val_split=dataset.val_split, data=args.data or EMBEDDED)
        facts.update(weights=args.resume or args.pretrained, **run_info.versions(job.device.name()))
        files = {"predictions_file": args.predictions, "report_folder": args.report}
        write_evaluation(args.output_dir, dataset, metrics, predictions, facts, preprocessing, **files)
    return 0


def main_worker(
    build_network: BuildNetwork, args: argparse.Namespace, ranks: Any, report: Callable[[str], None]
) -> int:
    """Run one process of the job, in the place that `ranks` gives it. Returns its exit code; raises UserError."""
    stop = StopSignals()
    ComputeDevice.load_runtime(args.device)
    comm = Communicator(ranks, args.dist_backend, args.dist_url, args.rendezvous_timeout, report)
    try:
        device = ComputeDevice(
            args.device,
            args.device_list[comm.local_rank % len(args.device_list)],
            local_world_size=comm.local_world_size,
            deterministic=args.deterministic,
        )
        amp = Amp(device, args.precision, args.opt_level)
        logger = Logger(args.output_dir, writes=comm.rank == 0)
        code = run_job(Job(args, comm, device, amp, logger, stop), build_network)
        logger.close()
        comm.close()
    except Exception as error:
        comm.fail(error)
        raise
    return code


def main(argv: list[str] | None = None, build_network: BuildNetwork = vgg.VGG) -> int:
    """Check everything that can be checked, then run. Returns the exit code; raises UserError."""
    args, topology = options.parse_flags(argv)
    return launch(functools.partial(main_worker, build_network, args), topology)


if __name__ == "__main__":
    console.run_script(main)
