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
import functools
import math
import os
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import engine  # noqa: F401  sets variables that torch reads when it is imported
import vgg
from engine import console
from engine.checkpoints.contents import (
    BEST,
    LATEST,
    ModelInfo,
    TrainState,
    build_checkpoint,
    check_resumable,
    load_pretrained,
    load_weights,
    log_changes,
    model_weights,
    restore,
)
from engine.checkpoints.file import CheckpointWriter
from engine.checkpoints.start import read_start
from engine.console import run_script
from engine.data.augmentation import BatchMixer
from engine.data.datasets import EMBEDDED, ImageDataset, open_datasets
from engine.data.folder_index import track_check
from engine.data.images import decoder_name
from engine.data.loader import Batch, BatchLoader, Loader, ResumableBatchSampler, SyntheticLoader, watch_workers
from engine.device.compute import ComputeDevice
from engine.device.step import MixedPrecisionOptimizer, ModelEma
from engine.errors import EXIT_STOPPED, SaveError, UsageError
from engine.evaluation.files import write_evaluation
from engine.evaluation.views import ViewAverage
from engine.options import resolve
from engine.options.flags import parse_args
from engine.parallel.communicator import Communicator, StopVote, check_same_flags, check_same_parameters
from engine.parallel.launcher import launch
from engine.records.logger import Logger, ProgressMeter
from engine.records.metrics import AccuracyCounter, Predictions, Throughput, Totals, cross_entropy, zero_unless_finite
from engine.records.run_info import log_run_info, program_checksum, versions, write_args
from engine.signals import StopSignals

import torch


@dataclass
class Runtime:
    """The services that every part of a run uses."""

    group: Communicator
    accelerator: ComputeDevice
    logger: Logger
    stop: StopSignals


@dataclass
class Training:
    """Everything that training changes, and what saves it."""

    network: vgg.VGG
    model: torch.nn.Module  # the network as it is trained: wrapped by DDP, compiled
    normalize: Callable[[torch.Tensor], torch.Tensor]
    scaler: MixedPrecisionOptimizer
    ema: ModelEma | None
    info: ModelInfo
    state: TrainState
    counter: AccuracyCounter  # of the current epoch
    writer: CheckpointWriter
    mixer: BatchMixer | None = None
    profiler: Any = None


def predict_crops(network: torch.nn.Module, normalize: Callable[[Any], torch.Tensor], images: Any) -> torch.Tensor:
    """Return logits (N, classes) of (N, S, S, 3) uint8 images."""
    return network(normalize(images))


# --- data -------------------------------------------------------------------------------------------------------------


def build_datasets(args: argparse.Namespace, runtime: Runtime) -> tuple[ImageDataset | None, ImageDataset | None]:
    """Return (training, validation) datasets; no training dataset for --evaluate, none at all for --dummy.

    The local main process goes first: it lists the files of a folder, and the others find its cached index. Raises
    DataError, or UsageError if the processes see different files.
    """
    group = runtime.group
    check = track_check if args.bad_images == "skip" else None
    datasets: tuple[ImageDataset | None, ImageDataset | None] = (None, None)
    with group.local_main_first():
        if not args.dummy:
            datasets = open_datasets(args.data, evaluate=args.evaluate, check=check, val_split=args.val_split)
    fingerprints = [dataset.fingerprint for dataset in datasets if dataset is not None]
    if group.any(fingerprints != group.broadcast(fingerprints)):
        raise UsageError("the processes do not see the same data: every node needs the same files under --data")
    return datasets


def build_loader(
    dataset: ImageDataset | None,
    args: argparse.Namespace,
    runtime: Runtime,
    *,
    training: bool,
    start: tuple[int, int] = (0, 0),
    scales: Sequence[int] = (),
) -> Loader:
    """Return the batches of this process; synthetic ones if there is no dataset.

    Training continues from `start` (epoch, images used of it) over all epochs without a pause; validation is one pass,
    over whole images if `scales` are given.
    """
    group, accelerator = runtime.group, runtime.accelerator
    sampler = ResumableBatchSampler(
        args.dummy if dataset is None else len(dataset),
        args.batch_size // args.processes,
        rank=group.rank,
        world_size=group.world_size,
        shuffle=training,
        accum_steps=args.accum_steps if training else 1,
        seed=args.seed,
        epochs=args.epochs if training else 1,
        start=start,
        with_previous=training and bool(args.mixup or args.cutmix),
    )
    if sampler.steps_per_epoch == 0:
        raise UsageError(
            f"{sampler.count} images are fewer than the {sampler.step_images} of one step: use a smaller --batch-size"
            + (" or --val-split" if args.val_split else "")
        )
    if dataset is None:
        return SyntheticLoader(sampler, args.image_size, accelerator.device)
    options = accelerator.loader_options(-(-args.workers // args.processes))
    augmentation = resolve.resolve_augmentation(args, dataset) if training else None
    size, seed = args.image_size, args.seed
    return BatchLoader(dataset, sampler, size, augmentation=augmentation, scales=scales, seed=seed, options=options)


# --- model and optimizer ----------------------------------------------------------------------------------------------


def build_training(
    network: vgg.VGG, info: ModelInfo, normalize: Any, args: argparse.Namespace, runtime: Runtime
) -> Training:
    """Move a network to the device; build its optimizer, EMA, DDP and compiled form, as the flags say."""
    accelerator = runtime.accelerator
    scaler = accelerator.prepare_training(
        network,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        no_bias_decay=args.no_bias_decay,
        loss_scale=args.loss_scale_value,
        clip_grad_norm=args.clip_grad_norm,
    )
    ema = ModelEma(network, scaler.weights, scaler.master_weights) if args.ema_decay else None
    model: torch.nn.Module = network
    if runtime.group.world_size > 1:
        model = accelerator.wrap_ddp(model, args.grad_compress)
    if args.compile:
        model = accelerator.compile(model)
    counter = AccuracyCounter(accelerator.device)
    state = TrainState(epoch=args.start_epoch)
    mixer = None
    if args.mixup or args.cutmix:
        mixer = BatchMixer(args.mixup, args.cutmix, len(info.classes), args.seed)
    return Training(network, model, normalize, scaler, ema, info, state, counter, CheckpointWriter(), mixer)


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from --lr to --min-lr (Loshchilov & Hutter, arXiv:1608.03983), by epoch."""
    if epoch < args.warmup_epochs:
        return args.lr * (epoch + 1) / (args.warmup_epochs + 1)
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# --- the loops --------------------------------------------------------------------------------------------------------


def train_one_epoch(
    args: argparse.Namespace, runtime: Runtime, training: Training, batches: Iterator[Batch], steps: int
) -> bool:
    """Train to the end of the epoch of `steps` steps. Returns whether to stop the run here."""
    group, accelerator, logger = runtime.group, runtime.accelerator, runtime.logger
    state, counter, optimizer = training.state, training.counter, training.scaler.optimizer
    training.model.train()
    if args.freeze_features:
        training.network.features.eval()  # batch norm keeps its statistics too
    lr = learning_rate(state.epoch, args)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    global_batch = args.batch_size * args.nodes * args.accum_steps
    throughput = Throughput(int(min(steps - state.step_in_epoch, (args.stop_step_num or math.inf) - state.step)))
    meter = ProgressMeter(f"Epoch: [{state.epoch}]", steps, state.step_in_epoch, counter.read())
    vote, stopping = StopVote(group), False

    left = (steps - state.step_in_epoch) * global_batch
    with console.progress(state.images_in_epoch + left, state.images_in_epoch, f"Epoch {state.epoch}"):
        while state.step_in_epoch < steps and not stopping:
            train_step(args, runtime, training, batches, meter)
            state.images_in_epoch += global_batch
            throughput.step(global_batch, accelerator.synchronize)
            console.advance(global_batch)

            # A stop signal on any process stops all of them after the next step.
            done = state.step_in_epoch
            stopping = vote.vote(runtime.stop) or state.step == args.stop_step_num
            if done == 1 or done % args.print_freq == 0 or done == steps or stopping:
                totals = counter.read()  # a synchronization, and so is the next line
                training.scaler.check_finite(state.step)
                console.line(meter.line(done, totals))
                logger.event("train", samples=state.images_in_epoch, lr=lr, **totals.metrics(), **state.position())
            if args.save_freq and state.step % args.save_freq == 0 and done < steps and not stopping:
                accelerator.synchronize()
                throughput.pause()
                save(args, runtime, training)
                throughput.resume()

    stopping = vote.result() or stopping
    accelerator.synchronize()
    totals = Totals(*group.sum(counter.read()))
    rate = group.broadcast(throughput.images_per_second())  # one value in the logs of all nodes
    console.line(f"[npu id: 0 ] * FPS@all {rate:.3f}")
    if state.step_in_epoch == steps:
        timing = {"images_per_second": rate, "seconds": throughput.seconds()}
        logger.event("epoch", samples=state.images_in_epoch, lr=lr, **timing, **totals.metrics(), **state.position())
    return stopping


def train_step(
    args: argparse.Namespace, runtime: Runtime, training: Training, batches: Iterator[Batch], meter: ProgressMeter
) -> None:
    """Make one optimizer step, over args.accum_steps batches.

    It synchronizes once if the optimizer cannot skip on the device (NPU, MPS, torch before 2.4).
    """
    accelerator, model, scaler, state = runtime.accelerator, training.model, training.scaler, training.state
    # Dropout depends on (seed, step, rank) alone, so that a resumed run draws the same masks.
    accelerator.seed(((args.seed * 1000003 + state.step) * 1000003 + runtime.group.rank) % 2**63)
    for part in range(args.accum_steps):
        begin = time.perf_counter()
        images, target, _ = next(batches)
        meter.add_data_time(time.perf_counter() - begin)
        images, target = training.normalize(images), accelerator.to_device(target)
        if training.mixer is not None:
            images, target = training.mixer(images, target, state.epoch, state.step_in_epoch * args.accum_steps + part)
        with accelerator.accumulate(model, last=part == args.accum_steps - 1):
            with accelerator.autocast():
                logits = model(images)
                loss = cross_entropy(logits, target, args.label_smoothing)
            scaler.backward(loss / args.accum_steps)
        training.counter.update(zero_unless_finite(loss.detach()) * len(target), logits, target)
    scaler.step()
    state.step += 1
    state.step_in_epoch += 1
    if training.ema is not None:
        training.ema.update(args.ema_decay, state.step, scaler.skipped)
    if training.profiler is not None:
        training.profiler.step()


def validate(
    args: argparse.Namespace,
    runtime: Runtime,
    network: torch.nn.Module,
    predict: Callable[[Any], torch.Tensor],
    loader: Loader,
    state: TrainState | None = None,
    predictions: Predictions | None = None,
) -> Totals | None:
    """Return the totals over all processes, each validation image counted once; None if a signal stops the run.

    predict: maps the images of a batch to logits. state: of the training that this validation belongs to, if any.
    predictions: filled with the images of this process.
    """
    group, accelerator, logger = runtime.group, runtime.accelerator, runtime.logger
    network.eval()
    group.broadcast_buffers(network)
    counter, steps = AccuracyCounter(accelerator.device), loader.sampler.steps_per_epoch
    meter, start = ProgressMeter("Test: ", steps), time.perf_counter()
    batches, vote = iter(loader), StopVote(group)
    with torch.no_grad(), console.progress(loader.sampler.count, 0, "Test"):
        for done in range(1, steps + 1):
            begin = time.perf_counter()
            images, target, indices = next(batches)
            meter.add_data_time(time.perf_counter() - begin)
            if len(target):  # the last batch of this process may be empty
                target = accelerator.to_device(target)
                with accelerator.autocast():
                    logits = predict(images)
                counter.update(cross_entropy(logits, target) * len(target), logits, target)
                if predictions is not None:
                    predictions.update(indices, logits)
            if done == 1 or done % args.print_freq == 0 or done == steps:
                console.line(meter.line(done, counter.read()))  # a synchronization
            console.advance(loader.sampler.global_batch)
            if vote.vote(runtime.stop):
                vote.result()
                return None
    if vote.result():
        return None
    totals = Totals(*group.sum(counter.read()))
    console.line(f"[npu id: 0 ] [AVG-ACC] * Acc@1 {totals.acc1:.3f} Acc@5 {totals.acc5:.3f}")
    seconds = time.perf_counter() - start
    position = {} if state is None else state.position()
    logger.event("validate", samples=int(totals.images), seconds=seconds, **totals.metrics(), **position)
    return totals


# --- the run, from start to end ---------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, runtime: Runtime, training: Training, loader: Loader, val_loader: Loader | None
) -> int:
    """Train all epochs that are left. Returns the exit code."""
    group, state = runtime.group, training.state
    batches = iter(loader)
    while not state.is_finished(args.epochs, args.stop_step_num):
        steps = state.step_in_epoch + loader.sampler.steps_left(state.images_in_epoch)
        stopping = state.step_in_epoch < steps and train_one_epoch(args, runtime, training, batches, steps)
        if stopping:
            save(args, runtime, training, final=True)
            return 0 if state.step == args.stop_step_num else EXIT_STOPPED
        if group.world_size > 1:
            check_same_parameters(group, training.network)
        best, last = False, state.epoch + 1 == args.epochs
        validates = val_loader is not None and (last or (state.epoch + 1) % args.eval_freq == 0)
        if val_loader is not None and validates:
            predict = functools.partial(predict_crops, training.network, training.normalize)
            with training.ema.swapped_in() if training.ema is not None else contextlib.nullcontext():
                totals = validate(args, runtime, training.network, predict, val_loader, state)
            if totals is None:
                save(args, runtime, training, final=True)
                return EXIT_STOPPED
            best = totals.acc1 >= state.best_acc1
            state.best_acc1 = max(totals.acc1, state.best_acc1)
        state.epoch, state.step_in_epoch, state.images_in_epoch = state.epoch + 1, 0, 0
        training.counter = AccuracyCounter(runtime.accelerator.device)
        save(args, runtime, training, best=best, final=last)
        if validates:
            runtime.logger.curves()
    if val_loader is not None and group.rank == 0:
        console.line(f"=> best Acc@1 {state.best_acc1:.3f}: {os.path.join(args.output_dir, BEST)}")
    return 0


def save(
    args: argparse.Namespace, runtime: Runtime, training: Training, *, best: bool = False, final: bool = False
) -> None:
    """Save a checkpoint on rank 0, and link it to model_best.pth.tar if it is the best.

    Training continues while the file is written. If a save fails, the old file stays and a warning says so; the final
    save is waited for, and its failure raises SaveError. After a skipped step the weights may have diverged: no
    checkpoint is written, except the best and the final one.
    """
    begin, state, logger = time.perf_counter(), training.state, runtime.logger
    training.scaler.check_finite(state.step)
    if training.scaler.skipped_in_a_row.item() and not (best or final):  # a synchronization
        console.line(f"=> checkpoint at step {state.step} skipped: non-finite gradients")
        return
    totals = Totals(*runtime.group.sum(training.counter.read()))
    if runtime.group.rank == 0:
        checkpoint = build_checkpoint(state, totals, training.info, training.scaler, training.ema)
        training.writer.wait_or_warn(console.warning)
        path, best_path = os.path.join(args.output_dir, LATEST), os.path.join(args.output_dir, BEST)
        training.writer.save(checkpoint, path, also=best_path if best else None)
        if final:
            error = training.writer.wait()
            if error is not None:
                intact = "; the one before it is intact" if os.path.exists(path) else ""
                raise SaveError(f"{path}: could not write the last checkpoint ({error}){intact}")
    logger.event("checkpoint", seconds=time.perf_counter() - begin, **state.position())


def run_job(args: argparse.Namespace, runtime: Runtime, build_network: Callable[[str, int], vgg.VGG]) -> int:
    """Build everything, then train and validate, or only evaluate. Returns the exit code."""
    group, accelerator, logger = runtime.group, runtime.accelerator, runtime.logger
    others = {"the JPEG decoder": decoder_name(), "the program's SHA-256": program_checksum()}
    check_same_flags(group, {**resolve.shared_flags(args), **others})
    checkpoint, pretrained = read_start(args, group, logger)
    resolve.resolve_from_checkpoint(args, checkpoint)
    train_set, val_set = build_datasets(args, runtime)
    classes = val_set.classes if val_set is not None else [str(number) for number in range(1000)]
    preprocessing = resolve.resolve_preprocessing(args, val_set, checkpoint)
    log_run_info(args, group, accelerator, logger, train_set, val_set)
    # Before resolve_identity: it may change args.accum_steps, or args.lr and args.min_lr.
    batch = resolve.keep_images_per_step(args, checkpoint, console.line)
    identity = resolve.resolve_identity(args, train_set)
    info = ModelInfo(args.arch, classes, preprocessing, group.world_size, args.val_split, identity, batch)
    accelerator.seed(args.seed)
    network = build_network(args.arch, len(classes))
    if checkpoint is not None:
        check_resumable(checkpoint, info, evaluate=args.evaluate)
        path = resolve.checkpoint_name(args)
        load_weights(network, model_weights(checkpoint, path, ema=args.evaluate), path)
    elif pretrained is not None:
        load_pretrained(network, pretrained, args.pretrained, logger)
    if args.freeze_features:
        network.features.requires_grad_(False)
    normalize = accelerator.normalizer(preprocessing["mean"], preprocessing["std"])
    if args.evaluate:
        assert val_set is not None and checkpoint is not None, "see _check_combinations in engine/options/flags.py"
        return evaluate(args, runtime, network, normalize, val_set, checkpoint)

    training = build_training(network, info, normalize, args, runtime)
    group.before_exit(training.writer.finish)
    state = training.state
    if checkpoint is not None:
        restore(checkpoint, state, training.counter, training.scaler, training.ema, group.rank)
    loader = build_loader(train_set, args, runtime, training=True, start=(state.epoch, state.images_in_epoch))
    log_changes(checkpoint, info, state, training.ema, loader.sampler.count, logger)
    del checkpoint, pretrained  # up to a gigabyte
    val_loader = None if val_set is None else build_loader(val_set, args, runtime, training=False)
    if state.is_finished(args.epochs, args.stop_step_num):
        console.line(f"=> nothing left to train: {state.epoch} of {args.epochs} epochs and {state.step} steps are done")
    else:
        write_args(args, accelerator, logger)
    logger.event("start", **state.position())
    runtime.stop.training = True
    trace_path = os.path.join(args.output_dir, "trace.json") if args.profile and group.rank == 0 else None
    try:
        with accelerator.trace(trace_path, console.line) as training.profiler, watch_workers(loader, val_loader):
            code = train(args, runtime, training, loader, val_loader)
    finally:
        training.writer.wait_or_warn(console.warning)  # a failure does not cost the checkpoint being written
    if code == EXIT_STOPPED:
        console.line(f"=> stopped on a signal after step {state.step}, checkpoint saved; continue with --auto-resume")
    logger.event("stop" if code == EXIT_STOPPED else "done", acc1=state.best_acc1, **state.position())
    return code


def evaluate(
    args: argparse.Namespace,
    runtime: Runtime,
    network: vgg.VGG,
    normalize: Any,
    dataset: ImageDataset,
    checkpoint: dict[str, Any],
) -> int:
    """Validate the network; write metrics.json, --predictions and --report. Returns the exit code."""
    group, accelerator = runtime.group, runtime.accelerator
    if "state_dict_ema" in checkpoint:
        console.line("=> evaluating the EMA weights (--ema-decay)")
    accelerator.place(network)
    scales = resolve.resolve_scales(args, dataset)
    predict: Callable[[Any], torch.Tensor] = functools.partial(predict_crops, network, normalize)
    if scales:
        mirrored = resolve.resolve_hflip(args, dataset) > 0
        predict = ViewAverage(network, normalize, view=args.eval_view, size=args.image_size, mirrored=mirrored)
    loader = build_loader(dataset, args, runtime, training=False, scales=scales)
    runtime.logger.open()  # fails now, not when all is computed
    predictions = Predictions(len(dataset), len(dataset.classes)) if args.report or args.predictions else None
    with watch_workers(loader):
        totals = validate(args, runtime, network, predict, loader, predictions=predictions)
    assert totals is not None, "a signal during an evaluation ends the process: see StopSignals"
    if predictions is not None:
        group.max_(predictions.top5)  # -1 where an image was another process's
        group.max_(predictions.probabilities)
    if group.rank == 0:
        facts = {**versions(accelerator), "weights": args.resume or args.pretrained, "data": args.data or EMBEDDED}
        write_evaluation(args, dataset, totals, predictions, facts, console.line)
    return 0


def main_worker(
    build_network: Callable[[str, int], vgg.VGG], args: argparse.Namespace, report: Callable[[str], None]
) -> int:
    """Run one process of the job. Returns its exit code; raises UserError."""
    stop = StopSignals()
    group = Communicator(args.dist_backend, args.dist_url, args.rendezvous_timeout, report)
    try:
        accelerator = ComputeDevice(
            args.device,
            args.device_list[group.local_rank % len(args.device_list)],
            precision=args.precision,
            opt_level=args.opt_level,
            local_world_size=group.local_world_size,
            deterministic=args.deterministic,
        )
        logger = Logger(args.output_dir, writes=group.rank == 0)
        code = run_job(args, Runtime(group, accelerator, logger, stop), build_network)
        logger.close()
        group.close()
    except Exception as error:
        group.fail(error)
        raise
    return code


def main(argv: list[str] | None = None, build_network: Callable[[str, int], vgg.VGG] = vgg.VGG) -> int:
    """Check everything that can be checked, then run. Returns the exit code; raises UserError.

    build_network: from (architecture, number of classes) to the network.
    """
    args = parse_args(argv)
    topology = resolve.resolve_flags(args)
    resolve.make_output_folders(args)
    return launch(functools.partial(main_worker, build_network), args, topology)


if __name__ == "__main__":
    run_script(main)
