# SPDX-License-Identifier: BSD-3-Clause
"""Finds the checkpoint that a run starts from, checks and restores it, and saves new ones."""

from __future__ import annotations

import errno
import os
from typing import Any, Iterator

from engine import console
from engine.checkpoints.contents import Checkpoint, RunInfo, TrainState, load_checkpoint, load_weights, to_file
from engine.checkpoints.file import CheckpointWriter, link, lock_folder
from engine.checkpoints.model import imagenet_weights
from engine.data import check_same_classes
from engine.device import MixedPrecisionOptimizer, ModelEma
from engine.errors import CheckpointError, CheckpointReadError, SaveError, UsageError, counted
from engine.parallel import Communicator
from engine.records import AccuracyCounter, Totals

import vgg

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
PREVIOUS = f"{LATEST}.previous"


class Checkpointer:
    """The checkpoints of a run. Rank 0 reads and writes the files, and gives the others what it has read.

    Call `find`, `check`, `load_weights` in this order; to train also `restore`, `log_changes` and `let_go`.

    Args:
        folder: where checkpoints are saved.
        evaluate: whether the run evaluates weights and trains nothing.

    Attributes:
        start: what the run starts from: None for nothing, or up to a gigabyte.
        continued: the same if the run continues or evaluates it; None if it takes the weights alone (--pretrained).
        info: of this run.
    """

    def __init__(self, folder: str, comm: Communicator, *, evaluate: bool) -> None:
        self.folder, self.comm, self.evaluate = folder, comm, evaluate
        self.path, self.best_path = os.path.join(folder, LATEST), os.path.join(folder, BEST)
        self.start: Checkpoint | None = None
        self.continued: Checkpoint | None = None
        self.info: RunInfo
        self._writer = CheckpointWriter()

    @property
    def has_ema(self) -> bool:
        return self.start is not None and self.start.ema_weights is not None

    # --- starting from a checkpoint ---

    def find(self, resume: str | None, auto_resume: bool, pretrained: str | None, arch: str | None) -> None:
        """Read what the run starts from. Raises CheckpointError or UsageError.

        resume: a file. auto_resume: take the newest intact checkpoint in the folder. pretrained: a file, or `imagenet`
        for torchvision's weights of arch, used if there is no checkpoint.
        """
        continues = self.evaluate
        if self.comm.rank == 0:
            if not self.evaluate:
                lock_folder(self.folder)
            self.start = load_checkpoint(resume) if resume else self._find_newest() if auto_resume else None
            continues = self.start is not None or self.evaluate
            if self.start is None and pretrained:
                self.start = load_checkpoint(imagenet_weights(arch) if pretrained == "imagenet" else pretrained)
            if self.start is not None and continues:
                console.line(f"=> {'evaluating' if self.evaluate else 'resuming from'} '{self.start.path}'")
        self.start, continues = self.comm.broadcast((self.start, continues))
        self.continued = self.start if continues else None
        given = resume or pretrained or (auto_resume and LATEST in os.listdir(self.folder))
        if self.start is None and self.comm.any(given):  # never a silent fresh start
            raise UsageError(
                "a process has a checkpoint to start from (--resume, --pretrained, or one in --output-dir), but rank "
                "0, which reads it, has none: give it to rank 0"
            )

    def _find_newest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint in the folder, None if there is none at all. Raises CheckpointError."""
        there = os.listdir(self.folder)  # unlike os.path.exists, it raises an error if the file system fails
        paths = [os.path.join(self.folder, name) for name in (LATEST, PREVIOUS) if name in there]
        for path in paths:
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointReadError as error:  # it may be intact: falling back would lose its last steps
                other = f"; if this stays so, rename it to continue from {paths[-1]}" if path != paths[-1] else ""
                raise CheckpointReadError(f"{error}{other}") from error
            except CheckpointError as error:
                if path == paths[-1]:
                    raise  # never a silent fresh start
                console.warning(f"{error}; trying the one before it")
            else:
                if path != paths[0]:  # else the next save would keep the corrupt one in place of the intact one
                    os.replace(paths[0], f"{paths[0]}.corrupt")
                return checkpoint
        return None

    def check(self, info: RunInfo) -> None:
        """Raise UsageError, with both values, if the checkpoint does not fit this run. Keeps info, which is saved.

        Training and evaluation: classes and --val-split. Training only: the architecture, and within an epoch what
        decides its images.
        """
        self.info = info
        if self.continued is None:
            return
        saved = self.continued.info
        if saved.arch not in (None, info.arch) and not self.evaluate:
            raise UsageError(f"the checkpoint holds {saved.arch}, this run uses {info.arch}: use --arch {saved.arch}")
        if saved.classes:
            try:
                check_same_classes(saved.classes, info.classes, "the checkpoint", "the data")
            except UsageError as error:
                if self.evaluate:
                    raise
                raise UsageError(f"{error}; --pretrained starts from these weights") from None
        if None not in (saved.val_split, info.val_split) and saved.val_split != info.val_split:
            raise UsageError(
                f"the checkpoint was trained with --val-split {saved.val_split}, this run has {info.val_split}, so it "
                f"would validate on images that the model was trained on: use --val-split {saved.val_split}"
            )
        if self.continued.progress.get("step_in_epoch") and not self.evaluate:
            for name, (before, now) in _changed_identity(saved, info).items():
                raise UsageError(
                    f"the checkpoint was saved within an epoch with {name} {before}, this run has {now}: finish the "
                    "epoch with the same flags and data, or take its weights alone with --pretrained"
                )

    def load_weights(self, network: vgg.VGG) -> None:
        """Load the weights to continue from, to evaluate or to start from; keep the network's own if there are none.

        If the weights are pretrained, a last layer for another number of classes stays as it was initialized, and so
        does another head. Raises UsageError if they do not fit.
        """
        start = self.start
        if start is None:
            return
        if self.continued is not None:
            load_weights(network, start.best_weights if self.evaluate else start.weights, start.path)
            return
        weights, own = dict(start.best_weights), network.state_dict()
        heads = vgg.head_of(weights), vgg.head_of(own)
        if None not in heads and heads[0] != heads[1]:
            console.line(f"=> the {heads[0]} head in {start.path}, the {heads[1]} head here: re-initialized")
            weights = {name: weights[name] for name in weights if not name.startswith("classifier.")}
            weights.update({name: own[name] for name in own if name.startswith("classifier.")})
        for name in (f"{vgg.last_layer(own)}.weight", f"{vgg.last_layer(own)}.bias"):
            given = weights.get(name)
            if given is not None and given.shape[1:] == own[name].shape[1:] and len(given) != len(own[name]):
                found = f"{counted(len(given), 'class')} in {start.path}"
                console.line(f"=> {name}: {found}, {len(own[name])} here: re-initialized")
                weights[name] = own[name]
        load_weights(network, weights, start.path)
        console.line(f"=> loaded the {'weights' if start.ema_weights is None else 'EMA weights'} of '{start.path}'")

    def restore(
        self, state: TrainState, counter: AccuracyCounter, optimizer: MixedPrecisionOptimizer, ema: ModelEma | None
    ) -> None:
        """Load everything but the weights of a run that is continued, ours or the reference's. Raises UsageError."""
        if self.continued is None:
            return
        progress = self.continued.progress
        try:
            optimizer.load_optimizer_state_dict(progress["optimizer"])
            optimizer.load_state_dict(progress.get("amp") or {})
            if ema is not None and self.continued.ema_weights is not None:
                ema.load_state_dict(self.continued.ema_weights)
            state.epoch, state.step_in_epoch = int(progress["epoch"]), int(progress.get("step_in_epoch", 0))
            images = state.step_in_epoch * self.continued.info.images_per_step  # older checkpoints do not say it
            state.images_in_epoch = int(progress.get("images_in_epoch", images))
            state.step, state.best_acc1 = int(progress.get("step", 0)), float(progress.get("best_acc1", 0.0))
            if progress.get("best_by", "acc1") == state.best_by:  # older checkpoints, and the reference's, know Acc@1
                state.best_value = float(progress.get("best_value", state.best_acc1))
                state.since_best = int(progress.get("since_best", 0))
            if min(state.epoch, state.step_in_epoch, state.images_in_epoch, state.step) < 0:
                raise ValueError("its progress is negative")
            if state.step_in_epoch and self.comm.rank == 0:  # the counts are sums over all processes
                counter.load(progress["counts"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            raise UsageError(
                f"training cannot continue from this checkpoint ({type(error).__name__}: {error}); --pretrained "
                "takes its weights alone"
            ) from error
        # In another folder the best model is still that of the run that is continued.
        best = os.path.join(os.path.dirname(self.continued.path), BEST)
        if self.comm.rank == 0 and os.path.exists(best) and not os.path.exists(self.best_path):
            try:
                link(best, self.best_path)
            except OSError as error:
                console.warning(f"{self.best_path}: the best model so far stays in {best} ({error}){_advice(error)}")

    def log_changes(self, state: TrainState, ema: ModelEma | None, count: int) -> None:
        """Log how this run differs from the one that it continues, or that it replaces one. count: training images."""
        if self.continued is not None:
            for line in _changes(self.continued, self.info, state, ema, count):
                console.line(f"=> {line}")
        elif self.comm.rank == 0:
            hints = {self.path: "--auto-resume would continue that run", self.best_path: "--output-dir DIR keeps it"}
            path = next(filter(os.path.exists, hints), None)
            if path is not None:
                console.warning(f"this run replaces {path}, the checkpoint of an earlier run; {hints[path]}")

    def let_go(self) -> None:
        """Free the memory of the checkpoint that the run started from."""
        self.start = self.continued = None

    # --- saving ---

    def save(
        self,
        state: TrainState,
        totals: Totals,
        optimizer: MixedPrecisionOptimizer,
        ema: ModelEma | None,
        *,
        best: bool = False,
        final: bool = False,
    ) -> None:
        """Save a checkpoint on rank 0, and link it to model_best.pth.tar if it is the best.

        Training continues while the file is written. If a save fails, the old file stays and a warning says so; the
        final save is waited for, and its failure raises SaveError.
        """
        if self.comm.rank != 0:
            return
        content = to_file(state, totals, self.info, optimizer, ema)
        self.wait()
        self._writer.save(content, self.path, also=self.best_path if best else None)
        error = self._writer.wait() if final else None
        if error is not None:
            intact = "; the one before it is intact" if os.path.exists(self.path) else ""
            raise SaveError(f"{self.path}: could not write the last checkpoint ({error}){intact}{_advice(error)}")

    def wait(self) -> None:
        """Wait until the last save is on the disk; warn if it failed."""
        error = self._writer.wait()
        if error is not None:
            console.warning(f"{self.path}: checkpoint not saved ({error}){_advice(error)}")

    def finish(self) -> None:
        """Give the last save some seconds to reach the disk, before this process ends."""
        self._writer.finish()


def _advice(error: BaseException) -> str:
    """Return what to do about a save that failed, if it is known."""
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return "; free some space, and if the run ends, continue it with --auto-resume"


def _changed_identity(saved: RunInfo, info: RunInfo) -> dict[str, tuple[Any, Any]]:
    """Return {name: (saved, now)} of what decides the training images and differs."""
    before, now, default = saved.identity, info.identity, "the default"
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return {name: (before.get(name, default), now.get(name, default)) for name in names}


def _changes(start: Checkpoint, info: RunInfo, state: TrainState, ema: ModelEma | None, count: int) -> Iterator[str]:
    """Yield how a run differs from the one that saved a checkpoint, a sentence each. count: training images."""
    saved = start.info
    if ema is not None and start.ema_weights is None:
        yield "the checkpoint has no EMA weights: the EMA starts from the current weights"
    if ema is None and start.ema_weights is not None:
        yield "the EMA weights of the checkpoint are dropped: use --ema-decay to continue them"
    saved_by = start.progress.get("best_by", "acc1")
    if saved_by != state.best_by:
        yield f"resumed with --best {state.best_by}, saved with {saved_by}: the next validation is the best so far"
    # Between epochs, see Checkpointer.check. A checkpoint of the reference has no identity.
    for name, (before, now) in _changed_identity(saved, info).items() if saved.identity else []:
        if name != "data":
            yield f"resumed with {name} {now}, saved with {before}"
        else:
            trained_on = "the model may have been trained on some of the current validation images"
            yield f"resumed with different training images: {trained_on}"
    if saved.world_size not in (0, info.world_size):
        where = f"resumed on {counted(info.world_size, 'process')}, saved on {saved.world_size}"
        yield f"{where}: the same images in the same order, but dropout and rounding differ"
    if not state.step_in_epoch:
        return
    if saved.images_per_step != info.images_per_step:
        how = f"resumed with {counted(info.images_per_step, 'image')} per step, saved with {saved.images_per_step}"
        left_out = (count - state.images_in_epoch) % info.images_per_step
        end = f", without its last {left_out:,}" if left_out else ""
        yield f"{how}: this epoch continues after its first {counted(state.images_in_epoch, 'image')}{end}"
    if saved.decoder not in (None, info.decoder):
        how = f"resumed with {info.decoder}, saved with {saved.decoder}"
        yield f"{how}: the rest of this epoch's JPEGs may differ by a gray level"
