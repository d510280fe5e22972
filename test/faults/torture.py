# SPDX-License-Identifier: BSD-3-Clause
"""The faults of torture.sh: each part breaks a run of main.py (small.py's network, where nothing else is said) and looks at
what is left. A part prints what it sees, and returns how many times it tried; a broken promise is an AssertionError.
"""
import argparse
import contextlib
import glob
import hashlib
import importlib.util
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [REPOSITORY, os.path.join(REPOSITORY, 'test', 'unit')]
import accelerator  # noqa: E402,F401  before torch
import torch  # noqa: E402

import checkpoint  # noqa: E402
import processes  # noqa: E402
import small  # noqa: E402

SMALL = small.__file__
TWO = ['--multiprocessing-distributed', '--device-list', '0,1']
ENDLESS = ['-b', '32', '--epochs', '100000', '--eval-freq', '100000', '-p', '1']
SECONDS_TO_END = 60
ONE_LINE = re.compile(r'^main\.py: error: .*$')


class Skipped(Exception):
    """A part that this machine cannot play; the text says what is missing."""


# --- runs and what is left of them ------------------------------------------------------------------------------------

class Job:
    """A command in a session of its own. All its processes carry a mark in their environment, by which those that are left
    behind are found."""

    def __init__(self, *command, folder, prefix=(), **options):
        self.mark = 'TORTURE={}.{}'.format(os.getpid(), time.monotonic())
        self.log = os.path.join(folder, 'log.{}'.format(time.monotonic()))
        name, _, value = self.mark.partition('=')
        with open(self.log, 'w') as out:
            self.child = subprocess.Popen([str(word) for word in list(prefix) + [sys.executable, '-u'] + list(command)],
                                          stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                                          env=dict(os.environ, **{name: value}), **options)

    def said(self):
        with open(self.log, errors='replace') as file:
            return file.read()

    def processes(self):
        """The numbers of all processes of the job that are alive."""
        found = []
        for path in glob.glob('/proc/[0-9]*/environ'):
            with contextlib.suppress(OSError):
                with open(path, 'rb') as file, open(os.path.join(os.path.dirname(path), 'stat')) as status:
                    if self.mark.encode() in file.read().split(b'\0') and status.read().rpartition(')')[2].split()[0] != 'Z':
                        found.append(int(path.split('/')[2]))
        return sorted(found)

    def children(self, parent):
        with contextlib.suppress(OSError):
            with open('/proc/{0}/task/{0}/children'.format(parent)) as file:
                return [int(word) for word in file.read().split()]
        return []

    def wait_for(self, text, seconds=90, times=1):
        deadline = time.monotonic() + seconds
        while self.said().count(text) < times:
            assert self.child.poll() is None, 'ended with {} before {!r}: {}'.format(
                self.child.returncode, text, self.said()[-2000:])
            assert time.monotonic() < deadline, 'no {!r} in {} s: {}'.format(text, seconds, self.said()[-2000:])
            time.sleep(0.02)

    def wait(self, seconds=SECONDS_TO_END):
        """The exit code, once every process of the job has gone."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(seconds)
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.processes()
        if left:
            said, names = self.said()[-3000:], [open('/proc/{}/stat'.format(pid)).read()[:40] for pid in left]
            self.kill()
            raise AssertionError('still there after {} s: {}: {}'.format(seconds, names, said))
        return self.child.returncode

    def kill(self):
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()


def run(*flags, folder, code=0, **options):
    """small.py FLAGS to its end, which must be `code`. Returns what it said."""
    job = train(*flags, folder=folder, **options)
    ended = job.wait(300)
    assert ended == code, 'exit code {} in place of {}: {}'.format(ended, code, job.said()[-3000:])
    return job.said()


def train(*flags, folder, **options):
    return Job(SMALL, '--arch', 'vgg11', '--device', 'cpu', '--output-dir', folder, *flags, folder=folder, **options)


def errors(said):
    """The error lines; anything that looks like a traceback is a broken promise."""
    assert 'Traceback' not in said and 'terminate called' not in said, said
    return [line for line in said.splitlines() if ONE_LINE.match(line)]


def digest(folder, name='checkpoint.pth.tar'):
    """Of everything that a checkpoint holds, tensors bit for bit."""
    total = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in value:
                total.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            total.update(str(value.dtype).encode() + value.contiguous().numpy().tobytes())
        else:
            total.update(repr(value).encode())

    add(checkpoint.load(os.path.join(folder, name)))
    return total.hexdigest()


def whole(folder):
    """The step of the checkpoint in a folder, which is verified on reading; no temporary file stands beside it."""
    assert not glob.glob(os.path.join(folder, '*.tmp*')), os.listdir(folder)
    return checkpoint.load(os.path.join(folder, 'checkpoint.pth.tar'))['step']


def need(condition, what):
    if not condition:
        raise Skipped(what)


@contextlib.contextmanager
def mounted(path, *options):
    need(ARGS.may_mount, 'needs root and mount namespaces')
    subprocess.run(['mount', '-t', 'tmpfs', *options, 'tmpfs', path], check=True)
    try:
        yield path
    finally:
        subprocess.run(['umount', '-l', path], check=True)


# --- a save that is killed --------------------------------------------------------------------------------------------

SAVE = '''
import os, sys
sys.path.insert(0, {repository!r})
import accelerator, torch, checkpoint
tensors = [torch.full((int(count),), float(sys.argv[2])) for count in sys.argv[3].split(',')]
writer = checkpoint.Writer()
writer.save({{'step': int(sys.argv[2]), 'tensors': tensors}}, sys.argv[1], also=sys.argv[1] + '.best')
error = writer.wait()
assert error is None, error
'''


def kill_each_call(folder, counts):
    """Kill a save over older files at its first, second, … write, fsync, link and rename, until none is left."""
    need(shutil.which('strace'), 'needs strace')
    code, first = SAVE.format(repository=REPOSITORY), os.path.join(folder, 'first')
    sizes, found, tries = ','.join(map(str, counts)), set(), 0
    for step in (1, 2):  # leaves `first`, `first.previous` and `first.best`
        subprocess.run([sys.executable, '-c', code, first, str(step), sizes], check=True)
    for call in ('write', 'fsync', 'link', 'rename'):
        for kill_at in range(1, 30):
            path = os.path.join(folder, 'x')
            for ending in ('', '.previous', '.best', '.tmp', '.previous.tmp', '.best.tmp'):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path + ending)
                if not ending.endswith('tmp'):
                    os.link(first + ending, path + ending)
            command = ['strace', '-qq', '-f', '-o', '/dev/null', '-e', 'trace=' + call,
                       '-e', 'inject={}:signal=KILL:when={}'.format(call, kill_at), '-P', folder]
            for base in ('', '.previous', '.best'):
                command += ['-P', path + base, '-P', path + base + '.tmp']
            finished = subprocess.run(command + [sys.executable, '-c', code, path, '3', sizes], stderr=subprocess.PIPE)
            steps = [checkpoint.load(path + ending)['step'] for ending in ('', '.previous', '.best')]
            print('  killed at {} {}: whole files of saves {}'.format(call, kill_at, steps), flush=True)
            assert steps[0] in (2, 3) and steps[1] in (1, 2) and steps[2] in (2, 3), steps
            found.add(steps[0])
            if finished.returncode == 0:
                assert steps == [3, 2, 3]
                break
            assert finished.returncode in (-9, 137), finished.stderr
            tries += 1
    assert found == {2, 3} and tries >= 9
    return tries


def save_small(folder):
    return kill_each_call(folder, [1000, 20])


def save_full(folder):
    """The 138,357,544 parameters of VGG16 and as many of momentum: 1.1 GB."""
    need(shutil.disk_usage(folder).free > 8e9, 'needs 8 GB of disk')
    return kill_each_call(folder, [138357544, 138357544])


# --- runs that are killed and continued -------------------------------------------------------------------------------

RUN = ['-b', '32', '--epochs', '3', '--save-freq', '1', '-p', '20', '--ema-decay', '0.9']  # 44 steps an epoch


class Fork:
    """small.py as a fork of this process, which has imported torch already: a hundred starts in minutes."""

    def __init__(self, flags, folder):
        sys.stdout.flush()
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            os.setsid()
            out = os.open(os.path.join(folder, 'log'), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            flags = ['--arch', 'vgg11', '--device', 'cpu', '--output-dir', folder] + [str(flag) for flag in flags]
            os._exit(small.main.main(flags))

    def ended(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = None if pid == 0 else os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        return self.code is not None

    def kill(self, rng):
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        with contextlib.suppress(ProcessLookupError):
            while True:  # until the loader workers have gone too
                os.killpg(self.pid, 0)
                time.sleep(0.005)


class OneOfTwo:
    """small.py on two processes; `kill` takes any one of the launcher, the ranks and their workers: the others must go."""

    def __init__(self, flags, folder):
        self.job = train(*flags, *TWO, folder=folder)
        self.code = None

    def ended(self):
        if self.code is None and self.job.child.poll() is not None:
            self.code = self.job.wait()
        return self.code is not None

    def kill(self, rng):
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rng.choice(self.job.processes()), signal.SIGKILL)
        self.job.wait()


def kill_and_continue(folder, times, start):
    """Kill at random moments, continue with 0, 1 or 3 workers, and begin anew where a run has come to its end."""
    def finish(attempt):
        while not attempt.ended():
            time.sleep(0.01)
        assert attempt.code == 0, attempt.code

    whole_run = os.path.join(folder, 'never killed')
    os.mkdir(whole_run)
    begin = time.monotonic()
    finish(start(RUN + ['-j', 0], whole_run))
    seconds, wanted = time.monotonic() - begin, digest(whole_run)
    kills = runs = 0
    rng = random.Random(6)
    while kills < times:
        parts = os.path.join(folder, 'killed {}'.format(runs))
        os.mkdir(parts)
        while True:
            attempt = start(RUN + ['-j', rng.choice((0, 1, 3)), '--auto-resume'], parts)
            deadline = time.monotonic() + rng.uniform(0, 1) * seconds
            while not attempt.ended() and (time.monotonic() < deadline or kills >= times):
                time.sleep(0.005)
            if attempt.ended():
                break
            attempt.kill(rng)
            kills += 1
            if kills % 10 == 0:
                print('  {} kills, {} runs to the end'.format(kills, runs), flush=True)
        assert attempt.code == 0, attempt.code
        assert digest(parts) == wanted, 'the killed run ended with other weights'
        runs += 1
        shutil.rmtree(parts)
    print('  {} kills, {} runs to the end, each with the digest of the run that was never killed'.format(kills, runs))
    return kills


def random_kills(folder):
    return kill_and_continue(folder, 100, Fork)


def random_kills_of_one(folder):
    return kill_and_continue(folder, 15, OneOfTwo)


def resumed_resumes(folder):
    """Stopped in the middle of an epoch, at its exact end, at the next one's first step, …, with other numbers of workers."""
    tries = 0
    for flags in ([], TWO):
        base = ['-b', 128, '--epochs', 4, '-p', 5, *flags]  # 11 steps an epoch
        one, many = (os.path.join(folder, '{} {}'.format(name, len(flags))) for name in ('whole', 'parts'))
        os.mkdir(one), os.mkdir(many)
        run(*base, folder=one)
        for stop, workers in ((5, 0), (11, 1), (12, 3), (22, 0), (30, 3), (1000, 1)):
            said = run(*base, '--auto-resume', '--stop-step-num', stop, '-j', workers, folder=many)
            assert ('resuming' in said) == (stop > 5)
            tries += 1
        assert digest(one) == digest(many)
        assert digest(one, 'model_best.pth.tar') == digest(many, 'model_best.pth.tar')
    # The last is of two processes; a step further on one, and back.
    base = ['-b', 128, '--epochs', 6, '-p', 5, '--auto-resume']
    said = run(*base, '--stop-step-num', 50, folder=many)
    assert '=> 1 processes in place of 2' in said, said
    said = run(*base, *TWO, folder=many)
    assert '=> 2 processes in place of 1' in said and whole(many) == 66, said
    return tries + 2


# --- signals ----------------------------------------------------------------------------------------------------------

def signals(folder):
    """SIGTERM, SIGINT and SIGUSR1 to the launcher, to a rank, to all; while training, saving, validating, starting."""
    base = ['-b', 32, '--epochs', 2, '--save-freq', 1, '-p', 1, *TWO]
    whole_run, parts = os.path.join(folder, 'whole'), os.path.join(folder, 'parts')
    os.mkdir(whole_run), os.mkdir(parts)
    run(*base, folder=whole_run)
    tries = 0
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    moments = [('Epoch: [0]', 3), ('Test:', 2), ('Epoch: [1]', 3)]
    for target in ('launcher', 'a rank', 'all'):
        for moment, (text, times) in enumerate(moments):
            number = numbers[(tries + moment) % 3]
            job = train(*base, '--auto-resume', folder=parts)
            job.wait_for(text, times=times)
            ranks = [pid for pid in job.children(job.child.pid) if pid in job.processes()][-2:]
            begin = time.monotonic()
            if target == 'all':
                os.killpg(job.child.pid, number)
            else:
                os.kill(job.child.pid if target == 'launcher' else ranks[1], number)
            code, took = job.wait(), time.monotonic() - begin
            print('  {} to {} at {!r}: {} after {:.1f} s'.format(number.name, target, text, code, took), flush=True)
            assert code == 75 and took < 10 and not errors(job.said()), job.said()[-2000:]
            whole(parts)
            tries += 1
        run(*base, '--auto-resume', folder=parts)
        assert digest(parts) == digest(whole_run)
        shutil.rmtree(parts)
        os.mkdir(parts)
    for delay in (0, 1, 2, 4, 8):  # from the start of the ranks, which takes some 4 s until their first step
        job = train(*base, '--epochs', 100000, folder=parts)
        while len(job.children(job.child.pid)) < 2:
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(job.child.pid, signal.SIGTERM)
        code = job.wait()
        print('  SIGTERM to all {} s after the ranks began: {}'.format(delay, code), flush=True)
        assert code == 75 and not errors(job.said()), (code, job.said())
        tries += 1
    return tries


def second_signal(folder):
    """Rank 1 is stopped, so that rank 0 cannot finish its step: the first signal waits, one 2 s later ends it at once."""
    jobs = nodes(folder, 2)
    jobs[0].wait_for('Epoch', times=3)
    os.kill(jobs[1].child.pid, signal.SIGSTOP)
    try:
        time.sleep(1)
        os.kill(jobs[0].child.pid, signal.SIGTERM)
        time.sleep(1)
        os.kill(jobs[0].child.pid, signal.SIGTERM)  # too early: a Ctrl-C reaches a process twice
        time.sleep(1.5)
        assert jobs[0].child.poll() is None, jobs[0].said()
        begin = time.monotonic()
        os.kill(jobs[0].child.pid, signal.SIGTERM)
        assert jobs[0].wait(10) == 128 + signal.SIGTERM and time.monotonic() - begin < 5
    finally:
        jobs[1].kill()
    return 1


# --- ranks ------------------------------------------------------------------------------------------------------------

def nodes(folder, count, addresses=None, prefixes=None):
    """A job of `count` nodes, each with its own launcher, as on as many machines."""
    port = processes.free_port()
    jobs = []
    for rank in range(count):
        own = os.path.join(folder, 'node {} {}'.format(rank, port))
        os.mkdir(own)
        master = 'tcp://{}:{}'.format('127.0.0.1' if addresses is None else addresses[0], port)
        jobs.append(train(*ENDLESS, '-j', 1, '--world-size', count, '--rank', rank, '--dist-url', master, folder=own,
                          prefix=[] if prefixes is None else prefixes[rank]))
    return jobs


def lose(jobs, missing, what):
    """Each node of `missing` (rank: the one it misses) ends inside a minute, with code 1 and one line that names that one."""
    begin = time.monotonic()
    for rank, lost in missing.items():
        code, lines = jobs[rank].wait(begin + SECONDS_TO_END - time.monotonic()), errors(jobs[rank].said())
        print('  {}: rank {} ended with {} after {:.0f} s: {}'.format(what, rank, code, time.monotonic() - begin, lines),
              flush=True)
        assert code == 1 and len(lines) == 1 and 'rank {} '.format(lost) in lines[0], jobs[rank].said()[-3000:]


def lost_ranks(folder):
    tries = 0
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for count, lost in ((3, 1), (2, 0)):
            jobs = nodes(folder, count)
            try:
                jobs[0].wait_for('Epoch', times=3)
                os.kill(jobs[lost].child.pid, number)
                lose(jobs, {rank: lost for rank in range(count) if rank != lost}, number.name)
                tries += 1
            finally:
                for job in jobs:
                    job.kill()
    return tries


def network(folder):
    """Two network namespaces, joined by a bridge in a third; the bridge drops one of them."""
    need(ARGS.may_mount and shutil.which('ip'), 'needs root and ip')
    names = ['torture{}{}'.format(os.getpid(), letter) for letter in 'abm']
    made = []

    def ip(*words):
        subprocess.run(['ip', *words], check=True)

    jobs = []
    try:
        for name in names:
            ip('netns', 'add', name)
            made.append(name)
        middle = names[2]
        ip('-n', middle, 'link', 'add', 'bridge', 'type', 'bridge')
        ip('-n', middle, 'link', 'set', 'bridge', 'up')
        for number, name in enumerate(names[:2]):
            ip('-n', middle, 'link', 'add', 'port{}'.format(number), 'type', 'veth', 'peer', 'name', 'eth0', 'netns', name)
            ip('-n', middle, 'link', 'set', 'port{}'.format(number), 'master', 'bridge', 'up')
            ip('-n', name, 'addr', 'add', '10.77.0.{}/24'.format(number + 1), 'dev', 'eth0')
            ip('-n', name, 'link', 'set', 'eth0', 'up')
            ip('-n', name, 'link', 'set', 'lo', 'up')
        prefixes = [['ip', 'netns', 'exec', name, 'env', 'GLOO_SOCKET_IFNAME=eth0'] for name in names[:2]]
        jobs = nodes(folder, 2, ['10.77.0.1', '10.77.0.2'], prefixes)
        jobs[0].wait_for('Epoch', times=3)
        ip('-n', middle, 'link', 'set', 'port1', 'nomaster')  # carrier and routes stay, every packet is lost
        lose(jobs, {0: 1, 1: 0}, 'cut off')
    finally:
        for job in jobs:
            job.kill()
        for name in made:
            ip('netns', 'del', name)
    return 1


def any_process(folder):
    """kill -9 of the launcher, of a rank, of a loader worker: no other process is left, and one line tells."""
    tries = 0
    for victim, code in (('launcher', -9), ('rank 0', 137), ('rank 1', 137), ('worker', 1)):
        job = train(*ENDLESS, *TWO, '-j', 4, folder=folder)
        job.wait_for('Epoch', times=3)
        time.sleep(0.5)
        ranks = [pid for pid in job.children(job.child.pid) if len(job.children(pid)) == 2]
        assert len(ranks) == 2, (ranks, job.processes())
        pid = {'launcher': job.child.pid, 'rank 0': ranks[0], 'rank 1': ranks[1], 'worker': job.children(ranks[1])[0]}[victim]
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        ended, lines = job.wait(), errors(job.said())
        print('  {}: {} after {:.0f} s: {}'.format(victim, ended, time.monotonic() - begin, lines), flush=True)
        assert ended == code and len(lines) == int(victim != 'launcher'), (ended, job.said()[-3000:])
        if victim.startswith('rank'):
            assert any(victim in line for line in lines), lines
        if victim == 'worker':
            assert any('a loader worker has ended' in line for line in lines), lines
        tries += 1
    return tries


def torchrun(folder):
    """--max-restarts: a worker is killed, the job goes on by itself; then torchrun itself is killed."""
    need(importlib.util.find_spec('torch.distributed.run'), 'needs torch 1.9')
    tries = 0
    for rendezvous in (['--master-port', 'PORT'], ['--rdzv-backend', 'c10d', '--rdzv-endpoint', '127.0.0.1:PORT']):
        own = os.path.join(folder, 'run {}'.format(tries))
        os.mkdir(own)
        words = [word.replace('PORT', str(processes.free_port())) for word in rendezvous]
        job = Job('-m', 'torch.distributed.run', '--nproc-per-node', 2, '--max-restarts', 3, *words, SMALL, '--arch', 'vgg11',
                  '--device', 'cpu', *ENDLESS, '--save-freq', 5, '--auto-resume', '--output-dir', own, folder=own)
        for lost in (1, 0):
            job.wait_for('Epoch', times=12 + job.said().count('Epoch'))
            begin = time.monotonic()
            os.kill(job.children(job.child.pid)[lost], signal.SIGKILL)
            job.wait_for('=> resuming', times=2 - lost)
            print('  rank {} killed: resumed by itself after {:.0f} s'.format(lost, time.monotonic() - begin), flush=True)
            tries += 1
        job.wait_for('Epoch', times=2 + job.said().count('Epoch'))
        assert 'cannot meet' not in job.said() and 'Traceback' not in job.said(), job.said()[-5000:]
        job.child.kill()
        job.wait()
        tries += 1
    return tries


# --- disk and memory --------------------------------------------------------------------------------------------------

def disk(folder):
    """A full disk while an epoch is saved, and at the last save; ENOSPC and a file size limit; a folder that is read-only."""
    small = os.path.join(folder, 'small')
    os.mkdir(small)
    tries = 0
    with mounted(small, '-o', 'size=3m'):
        for last in (False, True):
            flags = ['-b', 64, '--epochs', 3 if last else 6, '--save-freq', 1, '-p', 1]
            run(*flags, '--stop-step-num', 3, folder=folder, code=0)
            for name in ('checkpoint.pth.tar', 'checkpoint.pth.tar.previous'):
                shutil.copy(os.path.join(folder, name), small)
            job = train(*flags, '--auto-resume', '--output-dir', small, folder=folder)  # the later --output-dir holds
            job.wait_for('Epoch')
            filler = os.path.join(small, 'filler')
            with contextlib.suppress(OSError), open(filler, 'wb', 0) as file:
                while True:
                    file.write(bytes(4096))
            if last:
                code, said = job.wait(), job.said()
                assert code == 1 and 'the checkpoint was not saved' in said, said
                assert len(errors(said)) == 1 and 'the last checkpoint could not be written' in said, said
                os.remove(filler)
                assert whole(small) >= 3
            else:
                job.wait_for('the checkpoint was not saved')
                step = whole(small)
                os.remove(filler)
                assert job.wait(200) == 0, job.said()
                assert step < whole(small) == 6 * 22
            print('  full {}: exit code {}, the checkpoint whole'.format(*(('to the end', 1) if last else ('for a while', 0))),
                  flush=True)
            tries += 1
            for name in os.listdir(small):
                path = os.path.join(small, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    limited = os.path.join(folder, 'limited')
    os.mkdir(limited)
    said = run('-b', 64, '--epochs', 1, '-p', 10, '--save-freq', 10, folder=limited, code=1,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000)))
    assert 'the checkpoint was not saved' in said and len(errors(said)) == 1, said
    assert not glob.glob(os.path.join(limited, '*.pth*'))
    tries += 1
    if shutil.which('strace'):
        for call in ('write', 'fsync', 'rename'):
            traced = os.path.join(folder, call)
            os.mkdir(traced)
            run('-b', 64, '--stop-step-num', 10, folder=traced)
            said = run('-b', 64, '--epochs', 2, '-p', 10, '--auto-resume', folder=traced, code=1, prefix=[
                'strace', '-qq', '-f', '-o', '/dev/null', '-e', 'trace=' + call, '-e', 'inject={}:error=ENOSPC'.format(call),
                '-P', os.path.join(traced, 'checkpoint.pth.tar.tmp')])
            assert said.count('the checkpoint was not saved') == 1 and len(errors(said)) == 1 and whole(traced) == 10, said
            tries += 1
    readonly = os.path.join(folder, 'read only')
    os.mkdir(readonly)
    with mounted(readonly, '-o', 'ro'):
        job = train('--output-dir', readonly, folder=folder)
        assert job.wait() == 2 and len(errors(job.said())) == 1 and 'Read-only' in job.said(), job.said()
    return tries + 1


def shared_memory(folder):
    """/dev/shm of 1 MB, on one process and on two."""
    tries = 0
    with mounted('/dev/shm', '-o', 'size=1m'):
        for flags in ([], TWO):
            begin = time.monotonic()
            said = run('-b', 512, '-j', 2, *flags, folder=folder, code=1)
            lines = errors(said)
            print('  {:.0f} s: {}'.format(time.monotonic() - begin, lines), flush=True)
            assert any('--shm-size' in line and '--workers 0' in line for line in lines), said
            tries += 1
    return tries


# --- files and figures ------------------------------------------------------------------------------------------------

def damage(folder):
    """Each byte of a small checkpoint flipped in its lowest and its highest bit, and each length short of the whole."""
    path = os.path.join(folder, 'x')
    writer = checkpoint.Writer()
    writer.save({'weights': torch.arange(50.), 'epoch': 3}, path)
    assert writer.wait() is None
    with open(path, 'rb') as file:
        content = file.read()
    variants = [content[:length] for length in range(len(content))]
    for position in range(len(content)):
        for bit in (1, 128):
            variants.append(content[:position] + bytes([content[position] ^ bit]) + content[position + 1:])
    for variant in variants:
        with open(path, 'wb') as file:
            file.write(variant)
        try:
            loaded = checkpoint.load(path)
        except checkpoint.BadCheckpoint:
            continue
        # Without the mark of its digest a file is another program's: then the checksums of its parts hold.
        assert torch.equal(loaded['weights'], torch.arange(50.)) and loaded['epoch'] == 3
    return len(variants)


def validation_counts(folder):
    """1 to 40 validation images on 1 to 4 processes, with batches that divide nothing: main.validate's own counts."""
    for count in range(1, 5):
        url = 'tcp://127.0.0.1:{}'.format(processes.free_port())
        jobs = []
        for rank in range(count):
            environment = {'RANK': rank, 'WORLD_SIZE': count, 'LOCAL_RANK': rank, 'LOCAL_WORLD_SIZE': count,
                           'PYTHONPATH': REPOSITORY}
            prefix = ['env'] + ['{}={}'.format(name, value) for name, value in environment.items()]
            jobs.append(Job(os.path.join(HERE, 'counts.py'), url, folder=folder, prefix=prefix))
        for job in jobs:
            assert job.wait(200) == 0, job.said()
    return 160


PARTS = [
    (save_small, 'a save is killed', 'strace: SIGKILL at each write, fsync, link and rename'),
    (save_full, 'a save of VGG16 (1.1 GB) is killed', 'the same'),
    (random_kills, 'a run is killed', 'SIGKILL to all its processes at random moments, 0, 1 or 3 workers'),
    (random_kills_of_one, 'one of two processes, their launcher or workers is killed', 'SIGKILL to any at random moments'),
    (resumed_resumes, 'a resumed run is resumed', 'in mid-epoch and at its exact end, 0, 1, 3 workers, 1 and 2 processes'),
    (signals, 'a signal', 'SIGTERM, SIGINT, SIGUSR1 to the launcher, a rank, all; training, saving, validating, starting'),
    (second_signal, 'a second signal', 'while the step cannot end'),
    (lost_ranks, 'a rank dies or stalls', 'SIGKILL, SIGSTOP to rank 0 and rank 1'),
    (network, 'the network is cut', 'two network namespaces, their bridge drops every packet'),
    (any_process, 'any process dies', 'SIGKILL to the launcher, rank 0, rank 1, a loader worker'),
    (torchrun, 'a worker of torchrun --max-restarts dies', 'SIGKILL to rank 1, to rank 0, to torchrun; static and c10d'),
    (disk, 'the disk is full or read-only', 'small tmpfs, ENOSPC by strace, RLIMIT_FSIZE, a read-only mount'),
    (shared_memory, '/dev/shm is full', '1 MB of it'),
    (damage, 'a checkpoint is damaged', 'each byte flipped, each length cut'),
    (validation_counts, 'validation images that divide by nothing', '1 to 40 of them on 1 to 4 processes'),
]


def main():
    names = [part.__name__ for part, _, _ in PARTS]
    if ARGS.list:
        print('\n'.join(names))
        return 0
    rows, failed = [], False
    for part, fault, how in PARTS:
        if ARGS.parts and part.__name__ not in ARGS.parts:
            continue
        print('=> {}: {} ({})'.format(part.__name__, fault, how), flush=True)
        folder = tempfile.mkdtemp(prefix='torture ', dir=ARGS.scratch)
        begin, tries = time.monotonic(), ''
        try:
            tries = part(folder)
            result = 'survived'
        except Skipped as reason:
            result = 'skipped: {}'.format(reason)
        except AssertionError as error:
            print(error, flush=True)
            result, failed = 'NOT SURVIVED', True
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows.append('| {} | {} | {} | {} |'.format(fault, how, tries, result))
        print('   {} after {:.0f} s'.format(result, time.monotonic() - begin), flush=True)
    print('\ntorch {}, Python {}, {}'.format(torch.__version__, sys.version.split()[0], time.strftime('%Y-%m-%d')))
    print('| fault | how | times | result |\n|:--|:--|--:|:--|\n' + '\n'.join(rows))
    return int(failed)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='the parts of torture.sh')
    parser.add_argument('parts', nargs='*', choices=[part.__name__ for part, _, _ in PARTS] + [[]], metavar='PART')
    parser.add_argument('--list', action='store_true', help='name the parts')
    parser.add_argument('--may-mount', action='store_true', help='this is a mount namespace of our own')
    parser.add_argument('--scratch', metavar='DIR', help='where to work (default: the system\'s folder for temporary files)')
    ARGS = parser.parse_args()
    sys.exit(main())
