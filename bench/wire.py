# SPDX-License-Identifier: BSD-3-Clause
"""Bytes and seconds a step on the wire: main.py in two processes that only a link of a given speed joins.

    sudo python bench/wire.py                                   # the bare link, 10 Gbit/s and 1 Gbit/s
    sudo python bench/wire.py --rates 1 -- --grad-compress bf16 # what follows -- goes to main.py, after the plain run

Two network namespaces and a veth pair between them, held to the rate in both directions by tc's token bucket (tbf). The
model is real VGG16, its pictures so small and few that the wire dominates; the pictures are synthetic (--dummy). Bytes are
the kernel's count of what left machine 0, headers included. The first steps are left out.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MAIN = os.path.join(os.path.dirname(HERE), 'main.py')
WARM_UP = 3  # steps


def ip(*words):
    subprocess.run(['ip', *words], check=True)


@contextlib.contextmanager
def two_machines():
    """Names of two network namespaces, 10.78.0.1 and 10.78.0.2 on their eth0."""
    names = ['wire{}-{}'.format(os.getpid(), number) for number in range(2)]
    try:
        for name in names:
            ip('netns', 'add', name)
        ip('link', 'add', 'eth0', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'eth0', 'netns', names[1])
        for number, name in enumerate(names):
            ip('-n', name, 'address', 'add', '10.78.0.{}/24'.format(number + 1), 'dev', 'eth0')
            ip('-n', name, 'link', 'set', 'eth0', 'up')
            ip('-n', name, 'link', 'set', 'lo', 'up')
        yield names
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], stderr=subprocess.DEVNULL)


def hold_to(names, gigabits):
    """Limit both directions to that many Gbit/s; 0 takes the limit away."""
    for name in names:
        subprocess.run(['tc', '-n', name, 'qdisc', 'del', 'dev', 'eth0', 'root'], stderr=subprocess.DEVNULL)
        if gigabits:
            # The bucket holds two milliseconds, and no less than a few of the 64 KiB packets that a veth passes whole.
            bucket = max(int(gigabits * 1e9 / 8 * 0.002), 512 * 1024)
            subprocess.run(['tc', '-n', name, 'qdisc', 'add', 'dev', 'eth0', 'root', 'tbf', 'rate',
                            '{}mbit'.format(int(gigabits * 1000)), 'burst', str(bucket), 'limit', str(4 * bucket)], check=True)


def sent(name):
    """Bytes that have left the machine by eth0."""
    return int(subprocess.run(['ip', 'netns', 'exec', name, 'cat', '/sys/class/net/eth0/statistics/tx_bytes'], check=True,
                              stdout=subprocess.PIPE).stdout)


def measure(names, steps, flags):
    """(bytes, seconds) of each step after the first ones, seen from machine 0; raises RuntimeError where main.py fails."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank, name in enumerate(names):
            command = ['ip', 'netns', 'exec', name, 'taskset', '-c', str(rank % os.cpu_count()), sys.executable, '-u', MAIN,
                       '--device', 'cpu', '--dummy', '100000', '--image-size', '32', '-b', '2', '-p', '1',
                       '--stop-step-num', str(steps), '--multiprocessing-distributed', '--device-list', '0',
                       '--world-size', '2', '--rank', str(rank), '--addr', '10.78.0.1',
                       '--output-dir', os.path.join(folder, str(rank)), *flags]
            children.append(subprocess.Popen(command, env=dict(os.environ, GLOO_SOCKET_IFNAME='eth0'), universal_newlines=True,
                                             stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL))
        marks = []  # (bytes, time) as the line of each step is printed: the next step has sent nothing yet
        for text in children[0].stdout:
            if text.startswith('Epoch:'):
                marks.append((sent(names[0]), time.perf_counter()))
        if any([child.wait() for child in children]):
            raise RuntimeError('main.py failed')
    marks = marks[WARM_UP:]
    return [(after[0] - before[0], after[1] - before[1]) for before, after in zip(marks, marks[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rates', type=float, nargs='+', default=[0, 10, 1], metavar='GBIT', help='0: the bare link')
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('flags', nargs='*', help='of main.py, after --, measured beside the plain run')
    args = parser.parse_args()
    with two_machines() as names:
        for rate in args.rates:
            hold_to(names, rate)
            for flags in [[]] + [args.flags] * bool(args.flags):
                steps = measure(names, args.steps, flags)
                seconds = sorted(seconds for _, seconds in steps)
                print(json.dumps({'gigabits': rate or 'bare', 'flags': ' '.join(flags), 'steps': len(steps),
                                  'megabytes_a_step': round(statistics.median(count for count, _ in steps) / 1e6, 1),
                                  'seconds_a_step': round(statistics.median(seconds), 3),
                                  'fastest': round(seconds[0], 3), 'slowest': round(seconds[-1], 3)}), flush=True)


if __name__ == '__main__':
    main()
