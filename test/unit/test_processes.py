# SPDX-License-Identifier: BSD-3-Clause
"""What several processes agree on, in two real processes over gloo."""
import os
import subprocess
import sys
import textwrap

import pytest

from conftest import REPOSITORY


def two_processes(code, tmp_path, count=2):
    """Run `check(world)` of the code in processes of one job; return what each printed."""
    import processes
    script = tmp_path / 'check.py'
    script.write_text('import os, sys\nimport torch\nimport processes, main\n' + textwrap.dedent(code)
                      + '\nworld = processes.World("gloo", sys.argv[1])\ncheck(world)\nworld.close()\nsys.stdout.flush()\n'
                      + 'os._exit(0)\n')  # as main.py leaves: torch's own threads now and then abort where Python ends
    url = 'tcp://127.0.0.1:{}'.format(processes.free_port())
    children = []
    for rank in range(count):
        env = dict(os.environ, PYTHONPATH=REPOSITORY, RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
                   LOCAL_WORLD_SIZE=str(count))
        children.append(subprocess.Popen([sys.executable, str(script), url], env=env, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, universal_newlines=True))
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * count, said
    return [out for out, _ in said]


def test_a_state_reaches_every_process_unchanged(tmp_path):
    outputs = two_processes('''
        def check(world):
            state = {'a': torch.arange(6.).view(2, 3).t(), 'b': [1, 'x', None, {'c': torch.tensor(7)}], 'empty': torch.zeros(0)}
            got = world.broadcast(state if world.rank == 0 else None)
            assert torch.equal(got['a'], state['a']) and got['b'][:3] == [1, 'x', None], got
            assert int(got['b'][3]['c']) == 7 and got['empty'].numel() == 0
            assert world.any(world.rank == 1) and not world.any(False)
            assert world.sum([1, 2.5]) == [2.0, 5.0]
            main.check_same_flags(world, main.parse_args(['--rank', str(world.rank), '-b', '8']))
            try:
                main.check_same_flags(world, main.parse_args(['-b', str(8 + world.rank), '-j', str(world.rank)]))
            except main.WrongUse as error:
                assert ('--batch-size is 9 here and 8 on rank 0' in str(error)) == (world.rank == 1), error
                print('same')
    ''', tmp_path)
    assert outputs == ['same\n', 'same\n']


@pytest.mark.parametrize('altered', [False, True])
def test_replicas_that_differ_by_one_bit_are_noticed_on_both(tmp_path, altered):
    outputs = two_processes('''
        def check(world):
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(20, 5))
            if {} and world.rank == 1:
                with torch.no_grad():
                    network[1].bias[3] *= 1 + 2 ** -20
            try:
                main.check_replicas(world, network)
                print('alike')
            except main.Diverged as error:
                print('apart', 'rank 1 is one' in str(error))
    '''.format(altered), tmp_path)
    assert outputs == (['apart False\n', 'apart True\n'] if altered else ['alike\n', 'alike\n'])


def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_on_both(tmp_path):
    outputs = two_processes('''
        def check(world):
            import accelerator
            args = main.parse_args(['--device', 'cpu', '--lr', '0.1'])
            accelerator.choose(args)
            device = accelerator.Accelerator(args, 0, processes=2)
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
            network, scaler = device.prepare_training(network, args)
            model = device.wrap_ddp(network)
            changed = []
            for step in range(5):
                before = [value.clone() for value in network.state_dict().values()]
                bad = {1: float('nan'), 3: float('inf')}.get(step, 1.0) if world.rank == 1 else 1.0
                scaler.backward((model(torch.randn(6, 4) * bad) ** 2).mean())
                scaler.step()
                after = list(network.state_dict().values())
                changed.append(not all(torch.equal(old, new) for old, new in zip(before[:2], after[:2])))
                assert all(torch.isfinite(value.float()).all() for value in after)
            main.check_replicas(world, network)
            print(changed, scaler.read_longest_skip())
    ''', tmp_path)
    assert outputs == ['[True, False, True, False, True] 1\n'] * 2


def test_a_rank_taken_twice_and_ranks_that_do_not_come_are_told(tmp_path):
    """The groups of torch would wait half an hour for the missing rank."""
    import processes
    script = tmp_path / 'join.py'
    script.write_text('import sys, processes\nprocesses.RENDEZVOUS_SECONDS = float(sys.argv[2])\n'
                      'try:\n    processes.World("gloo", sys.argv[1])\n'
                      'except processes.LaunchError as error:\n    print(error)\n')

    def join(ranks, world_size, seconds):
        url = 'tcp://127.0.0.1:{}'.format(processes.free_port())
        children = [subprocess.Popen([sys.executable, str(script), url, str(seconds)], stdout=subprocess.PIPE,
                                     universal_newlines=True, env=dict(os.environ, PYTHONPATH=REPOSITORY, RANK=str(rank),
                                                                       WORLD_SIZE=str(world_size))) for rank in ranks]
        return [child.communicate(timeout=100)[0] for child in children]

    double = join([0, 1, 1], 3, 40)
    assert all('two processes are rank 1' in said for said in double), double
    alone, = join([1], 2, 2)
    assert 'rank 1 cannot meet the 2 processes there' in alone, alone


def test_a_port_in_use_and_a_master_that_is_not_there_are_told_in_time(tmp_path):
    import socket
    import time
    from conftest import run_main
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen(1)
        url = 'tcp://127.0.0.1:{}'.format(taken.getsockname()[1])
        begin = time.monotonic()
        result = run_main('--arch', 'vgg11', '--world-size', 2, '--rank', 0, '--dist-url', url, '--output-dir', tmp_path)
        assert result.code == 2 and 'in use' in result.err and url in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1 and time.monotonic() - begin < 60
