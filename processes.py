# SPDX-License-Identifier: BSD-3-Clause
"""One process or many: starting them, finding each other, agreeing, and ending together.

Spawned processes and those of torchrun differ only in who sets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; all of
them then make a `World`.
"""
import contextlib
import ctypes
import datetime
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

RENDEZVOUS_SECONDS = 45
STOPPED = 75  # exit code: stopped on a signal after saving, run again to continue (EX_TEMPFAIL)
WRONG_USE = 2
GRACE_SECONDS = 10  # what the others get to end by themselves after one process has failed
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT] + ([signal.SIGUSR1] if hasattr(signal, 'SIGUSR1') else [])


class LaunchError(Exception):
    """The processes cannot be brought together; the text says what to do."""


class Lost(Exception):
    """A process that this one cannot go on without has ended; the text says which. Exit code 1."""
    exit_code = 1


# --- the launcher -----------------------------------------------------------------------------------------------------

def under_torchrun():
    return 'LOCAL_RANK' in os.environ and 'WORLD_SIZE' in os.environ


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def spawn(worker, args, user_errors, *, count, first_rank, world_size):
    """Run `worker(args)` in `count` processes of ranks first_rank, first_rank + 1, …; return the job's exit code.

    The code is 0 or 75 where all ended so, else that of the first process that failed; what that one had to say is said
    once. Signals that ask to stop are passed on. No process outlives this one.

    user_errors: the exceptions that are told in one line and not as a traceback.
    """
    context = multiprocessing.get_context('spawn')
    children, reports = [], []
    for local_rank in range(count):
        environment = {'RANK': str(first_rank + local_rank), 'LOCAL_RANK': str(local_rank),
                       'WORLD_SIZE': str(world_size), 'LOCAL_WORLD_SIZE': str(count)}
        # A pipe each: the lock of a shared queue would stay with a process that is killed as it reports.
        receiver, sender = context.Pipe(duplex=False)
        children.append(context.Process(target=_child, args=(worker, args, user_errors, environment, sender, os.getpid())))
        reports.append((receiver, sender))

    asked = []

    def pass_on(number, _):
        asked.append(number)
        for child in children:
            if child.pid and child.is_alive():
                os.kill(child.pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    context.Lock()  # starts multiprocessing's tracker of resources, which would unblock signals at the first child
    # A child inherits this, so that a signal waits until it can answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for child, (_, sender) in zip(children, reports):
        child.start()
        sender.close()  # the child's copy is then the last, and its end the end of the pipe
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in asked[:1]:  # came to a thread that does not block it, before all had started
        pass_on(number, None)
    running, code, deadline, killed, said = list(children), 0, None, False, []
    while running:
        left = None if deadline is None or killed else max(0.0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait([child.sentinel for child in running], timeout=left)
        if not ended:
            for child in running:
                child.kill()
            killed = True  # what they end with now is ours
        for child in [child for child in running if child.sentinel in ended]:
            child.join()
            running.remove(child)
            receiver, _ = reports[children.index(child)]
            with contextlib.suppress(EOFError, OSError):  # it had nothing to say, or was killed as it said it
                if receiver.poll():
                    said.append(receiver.recv())
            if child.exitcode not in (0, STOPPED) and deadline is None and code in (0, STOPPED):
                code = child.exitcode if child.exitcode > 0 else 128 - child.exitcode
                if child.exitcode < 0:
                    said.insert(0, (code, 'main.py: error: the process of rank {} was ended by signal {}\n'.format(
                        first_rank + children.index(child), -child.exitcode)))
                deadline = time.monotonic() + GRACE_SECONDS
            elif child.exitcode == STOPPED and code == 0:
                code, deadline = STOPPED, time.monotonic() + GRACE_SECONDS
    if said:  # the others' failures follow from the first, and from a user's error before all
        users_code, text = next((report for report in said if report[0] is not None), said[0])
        sys.stderr.write(text)
        code = users_code or code
    return code


def _child(worker, args, user_errors, environment, report, parent):
    """Sends (exit code where it is a user's error, else None; text) through the pipe `report` where it fails."""
    die_with(parent)
    os.environ.update(environment)
    Heartbeat.say = staticmethod(lambda text: report.send((None, text)))
    try:
        code = worker(args)
    except user_errors as error:
        code = exit_code(error)
        report.send((code, 'main.py: error: {}\n'.format(error)))
    except Exception:
        code = 1
        report.send((None, traceback.format_exc()[-30000:]))  # a pipe holds 64 KiB, and is read after this process's end
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads of a broken process group


def exit_code(error):
    return getattr(error, 'exit_code', WRONG_USE)


def die_with(parent):
    """Have the kernel kill this process when its parent dies, however that happens (Linux)."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def begin_loader_worker(parent, _):
    """A signal may reach every process of a terminal or job; loader workers go on until their parent ends them.

    multiprocessing asks them by SIGTERM and waits, so whoever has them leaves by os._exit.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)
    # What fails here comes back with a batch. Left is the thread that hands over memory: it would complain of a parent that
    # has gone.
    sys.excepthook = lambda *_: None


def loader_lost(error):
    """What to say where a batch did not come because a loader worker has ended."""
    return Lost('a loader worker has ended ({}): killed, out of memory, or /dev/shm is too small (docker run --shm-size=8g; '
                '--workers 0 needs none); the last checkpoint is whole'.format(str(error).strip().splitlines()[-1]))


# --- inside a process -------------------------------------------------------------------------------------------------

class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 set a flag. A second one, more than two seconds later, ends the process at once.

    So does the first, with code 75, before `training` is set: there is nothing to save then.
    """

    def __init__(self):
        self.first = None  # time.monotonic()
        self.training = False
        # Python runs its handlers between two steps of the interpreter, so not while a collective or a backward pass
        # hangs. The number of a signal, though, is written to this socket at once, and a thread reads it.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(receiver, sender), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `spawn` has blocked them

    def _listen(self, receiver, _sender_kept_open):
        while True:
            number = receiver.recv(1)[0]
            if number not in STOP_SIGNALS:
                continue
            if not self.training:
                os._exit(STOPPED)
            if self.first is None:
                self.first = time.monotonic()
            elif time.monotonic() - self.first > 2:
                os._exit(128 + number)

    def __bool__(self):
        return self.first is not None


class Heartbeat:
    """Ends this process when another of the job dies, is stopped or cut off, and says which.

    A thread writes a beat to the job's key-value store, so a slow step, a compile or a scan is no death: they do not hold
    the thread up. Rank 0 watches the beats of all and publishes who is missing; the others watch that and rank 0. A second
    thread watches the first, which hangs where rank 0's machine, that of the store, is the one that has gone.

    job: tells this job's keys from those of the one before, which torchrun's store still holds after a restart.
    """

    INTERVAL, PATIENCE = 3, 30  # seconds
    say = staticmethod(lambda text: print(text, end='', file=sys.stderr, flush=True))  # `spawn` says one line for all

    def __init__(self, host, port, rank, world_size, job):
        # A connection of its own: one operation that waits holds up all others on the same.
        patience = datetime.timedelta(seconds=RENDEZVOUS_SECONDS)
        self.store = dist.PrefixStore(job, dist.TCPStore(host, port, world_size, False, patience))
        self.rank, self.world_size, self.patience = rank, world_size, self.PATIENCE
        self.answered, self.failed = time.monotonic(), False
        self.stopped, self.urgent = threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch)]
        for thread in self.threads:
            thread.start()

    def _beat(self):
        seen = {}  # rank -> (count, when it changed)
        try:
            while not self.stopped.is_set():
                if self.failed:
                    self._publish(self.rank)
                    return
                self.store.add('beat/{}'.format(self.rank), 1)
                for other in range(1, self.world_size) if self.rank == 0 else [0]:
                    count = self.store.add('beat/{}'.format(other), 0)
                    if seen.get(other, (None,))[0] != count:
                        seen[other] = count, time.monotonic()
                    elif time.monotonic() - seen[other][1] > self.patience:
                        self._publish(other)
                        self.stopped.wait(2 * self.INTERVAL)  # rank 0 may hold the store: the others read it first
                        self._end(other)
                missing = self.store.add('missing', 0)
                if missing:
                    self.stopped.wait(2)  # what made that one fail may be about to be found here too
                    self._end(missing - 1)
                self.answered = time.monotonic()
                if self.urgent.wait(self.INTERVAL):
                    self.stopped.wait(0.2)
        except RuntimeError:  # rank 0 has gone: after a job's end, or before it
            self.stopped.wait(self.INTERVAL)
            self._end(0)

    def _publish(self, missing):
        if self.store.add('claims', 1) == 1:  # the first to go is the cause
            self.store.add('missing', missing + 1)

    def _watch(self):
        while time.monotonic() - self.answered < self.PATIENCE + 5 * self.INTERVAL:
            if self.stopped.wait(self.INTERVAL):
                return
        self._end(0)

    def await_verdict(self):
        """A connection has broken: wait until the threads know who is missing, say it and end this process. Returns where
        all still beat after 40 s."""
        self.patience = 3 * self.INTERVAL
        self.urgent.set()
        self.threads[0].join(timeout=self.PATIENCE + 10)

    def leave(self):
        """This process has failed by itself: the others need not wait to miss it."""
        self.failed = True
        self.urgent.set()
        self.threads[0].join(timeout=1)

    def stop(self):
        """At the end of a job: who is missing from now on has gone home. Waits for the threads, since one that is inside
        the store when Python ends takes the process down with an abort."""
        self.stopped.set()
        self.urgent.set()
        for thread in self.threads:
            thread.join(timeout=5)

    def _end(self, missing):
        if not self.stopped.is_set() and not self.failed:
            self.say('main.py: error: rank {} has ended, is stopped or cut off, so rank {} ends; the last checkpoint is '
                     'whole\n'.format(missing, self.rank))
            os._exit(1)


class World:
    """Who this process is among how many, and how they agree.

    Control goes over gloo between the hosts, whatever the gradients use: a decision then never waits for a device.

    Raises LaunchError where the others cannot be reached inside a minute.
    """

    def __init__(self, backend, url):
        self.rank, self.world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        self.control = self.heartbeat = None
        if self.world_size > 1:
            self._join(backend, url)

    def _join(self, backend, url):
        deadline = time.monotonic() + RENDEZVOUS_SECONDS
        where, master = url, None
        if url == 'env://':
            where = 'tcp://{}:{}'.format(os.environ.get('MASTER_ADDR'), os.environ.get('MASTER_PORT'))
        try:
            if where.startswith('tcp://'):
                host, _, port = where[len('tcp://'):].rstrip('/').rpartition(':')
                master = host.strip('[]'), int(port)
                if self.rank != 0:
                    self._await(master, deadline)
            patience = datetime.timedelta(seconds=max(1, deadline - time.monotonic()))
            store, _, _ = next(dist.rendezvous(url, self.rank, self.world_size, timeout=patience))
            # torchrun's own store outlives a restart, and with it what the processes that have died wrote. Where rank 0
            # holds the store it is new each time, and the count differs on a node that has joined later.
            job = 'attempt {}'.format(os.environ['TORCHELASTIC_RESTART_COUNT']
                                      if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' else 0)
            store = dist.PrefixStore(job, store)
            self._check_in(store, where, deadline)
            if master is not None:  # before the groups, which wait half an hour for who has gone meanwhile
                self.heartbeat = Heartbeat(*master, self.rank, self.world_size, job)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
            self.control = dist.group.WORLD if backend == 'gloo' else dist.new_group(backend='gloo')
            self.barrier()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if 'ddress already in use' in str(error) or 'EADDRINUSE' in str(error):
                raise LaunchError('{}: the port is in use; name a free one with --dist-url tcp://HOST:PORT'.format(where))
            raise LaunchError('{}: rank {} cannot meet the {} processes there ({}); check --addr, --dist-url, --rank and '
                              '--world-size, and that every node runs'.format(where, self.rank, self.world_size, reason))

    def fail(self, error):
        """An error in the middle of a job: tell the other processes; return what to raise, a Lost where the error only says
        that another process has ended. Where that is one of another rank, the heartbeat names it and ends this process."""
        # torch raises the death of a loader worker out of this signal, here perhaps a second time.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Kept until os._exit: who lets go of the traceback lets go of the loader in it, and that ends its workers with much
        # talk and, where one was killed inside a lock, never.
        World.failure = error
        text = str(error)
        if 'DataLoader worker' in text and 'Caught' not in text or 'shared memory' in text:
            error = loader_lost(error)
        elif self.world_size > 1 and re.search('gloo|NCCL|HCCL|[Cc]onnection', text) and isinstance(error, RuntimeError):
            if self.heartbeat is not None:
                self.heartbeat.await_verdict()
            error = Lost('the connection to another process is broken ({}); the last checkpoint is whole'.format(
                text.strip().splitlines()[0]))
        if self.heartbeat is not None:
            self.heartbeat.leave()
        return error

    @staticmethod
    def _await(master, deadline):
        """Wait until `master` (host, port) answers. Raises OSError. Torch would overrun the time, and write pages on stderr."""
        while True:
            try:
                socket.create_connection(master, timeout=max(1, deadline - time.monotonic())).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _check_in(self, store, where, deadline):
        """Wait until all have claimed their ranks. Raises LaunchError where some stay away or two claim the same one: the
        groups of torch would wait for the missing rank without a word."""
        if store.add('rank {}'.format(self.rank), 1) > 1:
            store.set('double', str(self.rank))
            store.add('doubles', 1)
        here = 'processes of {}'.format(self.world_size)  # who counts on another world size waits elsewhere
        store.add(here, 1)
        while store.add(here, 0) < self.world_size:
            if time.monotonic() > deadline:
                raise LaunchError('{}: only {} of {} processes came in {} s; check that every node runs, with the same '
                                  '--world-size and as many devices'.format(
                                      where, store.add(here, 0), self.world_size, RENDEZVOUS_SECONDS))
            time.sleep(0.1)
        if store.add('doubles', 0):
            double = store.get('double').decode()
            if self.rank == 0:
                time.sleep(1)  # the store lives in this process: let the others read it
            raise LaunchError('{}: two processes are rank {}: give each node its own --rank'.format(where, double))

    def barrier(self):
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1), group=self.control)

    def any(self, flag):
        """Whether the flag is set on any process; the same answer on all."""
        if self.world_size == 1:
            return bool(flag)
        count = torch.tensor([int(bool(flag))])
        dist.all_reduce(count, group=self.control)
        return bool(count.item())

    def sum(self, values):
        """The sum over all processes of a list of numbers, as floats; whole numbers are exact up to 2^53."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def broadcast_buffers(self, model):
        """Give every process rank 0's buffers (batch norm's running figures)."""
        if self.world_size > 1:
            for buffer in model.buffers():
                value = buffer.detach().cpu()
                dist.broadcast(value, 0, group=self.control)
                buffer.copy_(value)

    def broadcast(self, state):
        """Rank 0's nested dicts, lists and CPU tensors, on every process."""
        if self.world_size == 1:
            return state
        pickler = _TensorPickler()
        if self.rank == 0:
            pickler.dump(state)
        layouts = [(tensor.dtype, tensor.shape) for tensor in pickler.tensors]
        plain, layouts = self._broadcast_plain((pickler.file.getvalue(), layouts))
        tensors = [tensor.contiguous() for tensor in pickler.tensors] \
            or [torch.empty(shape, dtype=dtype) for dtype, shape in layouts]
        for tensor in tensors:
            dist.broadcast(tensor, 0, group=self.control)
        unpickler = pickle.Unpickler(io.BytesIO(plain))
        unpickler.persistent_load = lambda position: tensors[position]
        return unpickler.load()

    def _broadcast_plain(self, value):
        content = pickle.dumps(value)  # between our own processes: nothing foreign is read
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0, group=self.control)
        buffer = torch.tensor(list(content) if self.rank == 0 else [0] * int(size.item()), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self.control)
        return pickle.loads(bytes(buffer.tolist()))

    def close(self):
        """End together; only after success, since it waits for the others."""
        if self.world_size > 1:
            self.barrier()
            if self.heartbeat is not None:
                self.heartbeat.stop()
            dist.destroy_process_group()


class _TensorPickler(pickle.Pickler):
    """Pickles all but the tensors, and collects those."""

    def __init__(self):
        self.file, self.tensors = io.BytesIO(), []
        super().__init__(self.file)

    def persistent_id(self, value):
        if isinstance(value, torch.Tensor):
            # gloo of old torch sends neither bool nor bfloat16
            self.tensors.append(value.float() if value.is_floating_point() else value.long())
            return len(self.tensors) - 1
        return None
