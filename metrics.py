# SPDX-License-Identifier: BSD-3-Clause
"""Counting and telling: exact accuracy counts, throughput, log lines, metrics.jsonl, curves."""
import contextlib
import json
import math
import os
import sys
import time

import torch


class Counts:
    """Loss and hits, summed on the device until somebody asks: `update` never synchronises, `read` does."""

    def __init__(self, device):
        self.hits = torch.zeros(3, dtype=torch.int64, device=device)  # images, right at first, among the first five
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, loss_sum, logits, target):
        """loss_sum: () sum over the images; logits: (N, classes); target: (N,) int64."""
        top = logits.detach().topk(min(5, logits.shape[1]), dim=1)[1]
        right = top.eq(target.unsqueeze(1))
        images = torch.full_like(self.hits[0], len(target))
        self.hits += torch.stack([images, right[:, 0].sum(), right.sum()])
        loss_sum = loss_sum.detach().float()  # a step that is not finite is skipped; so is its loss
        self.loss_sum += torch.where(torch.isfinite(loss_sum), loss_sum, torch.zeros_like(loss_sum))

    def read(self):
        """[images, right at first, among the first five, loss sum] as floats. A synchronisation."""
        return self.hits.tolist() + [self.loss_sum.item()]

    def load(self, values):
        self.hits.copy_(torch.tensor(values[:3], dtype=torch.int64))
        self.loss_sum.fill_(values[3])


def averages(values):
    """(loss, acc1, acc5), accuracies in percent, of what `Counts.read` gave, or of sums of it."""
    images, first, five, loss_sum = values
    images = max(images, 1)
    return loss_sum / images, 100.0 * first / images, 100.0 * five / images


class Throughput:
    """Images a second over the steps of an epoch after the first five, or over all where there are ten or fewer.

    `pause` and `go_on` take out what is no training (a checkpoint, say). The device must be idle where the clock is
    read: the caller synchronises.
    """

    WARM_UP = 5  # steps

    def __init__(self, steps):
        self.skip = self.WARM_UP if steps > 10 else 0
        self.steps, self.images = 0, 0
        self.begin = time.perf_counter()
        self.warm = self.begin, 0  # when the clock began to count, and the images before that
        self.paused = self.pauses = 0.0

    def step(self, images, synchronize):
        """images: of this step, over all processes."""
        self.steps += 1
        self.images += images
        if self.steps == self.skip:
            synchronize()  # once an epoch
            self.warm = time.perf_counter(), self.images

    def pause(self):
        self.paused = time.perf_counter()

    def go_on(self):
        self.pauses += time.perf_counter() - self.paused

    def seconds(self):
        return max(time.perf_counter() - self.warm[0] - self.pauses, 1e-9)

    def images_per_second(self):
        """Where the run was stopped in the first five steps: over those."""
        if self.steps <= self.skip:
            self.warm = self.begin, 0
        return (self.images - self.warm[1]) / self.seconds()


class StepLine:
    """The parsed log line of a loop: `Epoch: [0][  10/5004]	Time …`. Time and Data are of the steps since the last."""

    def __init__(self, prefix, steps, done=0, values=(0, 0, 0, 0.0)):
        """done, values: steps and counts that an earlier run left, where an epoch is continued."""
        self.prefix, self.steps, self.digits = prefix, steps, len(str(steps))
        self.begin = self.last = time.perf_counter()
        self.waited = self.waited_before = 0.0  # seconds for data
        self.done_first = self.done_before = done
        self.values_before = values

    def wait(self, seconds):
        self.waited += seconds

    def text(self, done, values):
        """done: steps so far; values: of Counts.read."""
        now = time.perf_counter()
        new, all_ = max(1, done - self.done_before), max(1, done - self.done_first)
        loss, acc1, acc5 = averages([value - old for value, old in zip(values, self.values_before)])
        mean_loss, mean_acc1, mean_acc5 = averages(values)
        text = '\t'.join([
            '{}[{:{}d}/{}]'.format(self.prefix, done, self.digits, self.steps),
            'Time {:6.3f} ({:6.3f})'.format((now - self.last) / new, (now - self.begin) / all_),
            'Data {:6.3f} ({:6.3f})'.format((self.waited - self.waited_before) / new, self.waited / all_),
            'Loss {:6.4f} ({:6.4f})'.format(loss, mean_loss),
            'Acc@1 {:6.2f} ({:6.2f})'.format(acc1, mean_acc1),
            'Acc@5 {:6.2f} ({:6.2f})'.format(acc5, mean_acc5)])
        self.last, self.waited_before, self.done_before, self.values_before = now, self.waited, done, values
        return text


class Log:
    """Where everything is said: lines on local rank 0 of each node, files in `folder` on global rank 0 alone.

    metrics.jsonl gets one object an event, flushed; TensorBoard and curves.png come where their packages are installed.
    """

    def __init__(self, folder, *, speaks, writes):
        self.folder, self.speaks, self.writes = folder, speaks, writes
        self.bar = self.tensorboard = self.jsonl = None
        self.warned = False
        if writes:
            self.jsonl = open(os.path.join(folder, 'metrics.jsonl'), 'a')
            with contextlib.suppress(ImportError):  # the same figures are in metrics.jsonl
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(os.path.join(folder, 'tensorboard'))

    def line(self, text):
        if not self.speaks:
            return
        if self.bar is not None:
            self.bar.clear()
        with self._survive():
            print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    @contextlib.contextmanager
    def _survive(self):
        """A full disk, or a reader of our output that has gone (`| tee` at Ctrl-C), must not end the training."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                self.warned = True
                with contextlib.suppress(OSError):
                    print('main.py: warning: a line or figure is lost ({})'.format(error), file=sys.stderr)

    def progress(self, total, done, label):
        """A bar with ETA and images a second on a terminal, where tqdm is installed. Returns a context for `tick`s.

        total, done: images of all processes.
        """
        self.bar = None
        if self.speaks and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm
                self.bar = tqdm(total=total, initial=done, desc=label, unit=' images', leave=False,
                                dynamic_ncols=True)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def tick(self, images):
        if self.bar is not None:
            self.bar.update(min(images, self.bar.total - self.bar.n))  # the last batch of a validation is a shorter one

    def track(self, items, total, label):
        """Pass on an iterator of `total` items with a progress bar."""
        with self.progress(total, 0, label):
            for item in items:
                self.tick(1)
                yield item

    def event(self, event, **fields):
        """One line of metrics.jsonl: event is start, train, epoch, validate, checkpoint, stop or done."""
        if not self.writes:
            return
        finite = {key: value if not isinstance(value, float) or math.isfinite(value) else None
                  for key, value in fields.items()}  # JSON has no NaN
        with self._survive():
            self.jsonl.write(json.dumps(dict(event=event, **finite)) + '\n')
            self.jsonl.flush()
        if self.tensorboard is not None and 'step' in fields:
            with self._survive():
                for key in ('loss', 'acc1', 'acc5', 'lr', 'images_per_second'):
                    if key in fields:
                        self.tensorboard.add_scalar('{}/{}'.format(event, key), fields[key], fields['step'])

    def curves(self):
        """Redraw curves.png from metrics.jsonl."""
        if not self.writes:
            return
        with self._survive(), contextlib.suppress(ImportError):  # matplotlib may be absent: metrics.jsonl has the figures
            draw_curves(self.folder)

    def close(self):
        if self.jsonl is not None:
            with self._survive():
                self.jsonl.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_events(folder):
    """The `epoch` and the `validate` events of metrics.jsonl, each a list in order of epochs.

    A run that starts at a step replaces what an earlier run in this folder said of later ones.
    """
    train, validate = {}, {}
    with open(os.path.join(folder, 'metrics.jsonl')) as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # a line torn by a kill
                continue
            if record['event'] == 'start':
                for records in (train, validate):
                    for epoch in [epoch for epoch in records if records[epoch]['step'] > record['step']]:
                        del records[epoch]
            elif record['event'] in ('epoch', 'validate'):
                (train if record['event'] == 'epoch' else validate)[record['epoch']] = record
    return [[records[epoch] for epoch in sorted(records)] for records in (train, validate)]


def draw_curves(folder):
    """curves.png: loss, accuracy, learning rate and images a second over the epochs. Raises ImportError."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot, ticker
    train, validate = read_events(folder)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    panels = [('Loss', 'loss', True), ('Acc@1 (%)', 'acc1', True), ('Learning rate', 'lr', False),
              ('Images per second', 'images_per_second', False)]
    for axis, (title, key, both) in zip(axes.flat, panels):
        for records, label, colour in ((train, 'training', '#1f77b4'), (validate if both else [], 'validation', '#d62728')):
            points = [(record['epoch'] + 1, record[key]) for record in records if record.get(key) is not None]
            if points:
                axis.plot(*zip(*points), marker='o', markersize=3, label=label, color=colour)
        axis.set_title(title, loc='left', fontsize=11)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.set_xlabel('epoch')
        axis.grid(alpha=0.3)
        if both and (train or validate):
            axis.legend(frameon=False)
        if not both:
            axis.set_ylim(bottom=0)
    temporary = os.path.join(folder, 'curves.tmp.png')
    try:
        figure.savefig(temporary, dpi=110)
        os.replace(temporary, os.path.join(folder, 'curves.png'))
    finally:
        pyplot.close(figure)
        with contextlib.suppress(FileNotFoundError):  # a full disk
            os.remove(temporary)
