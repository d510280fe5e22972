# SPDX-License-Identifier: BSD-3-Clause
"""The scripts in test/, run as a user runs them: most with a stub in place of python, two with the real program."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

from helpers.images import write_cifar
from helpers.program import REPOSITORY, events, run

import pytest

SCRIPTS = [
    "train_full_1p",
    "train_full_8p",
    "train_performance_1p",
    "train_performance_8p",
    "train_eval_8p",
    "train_performance_multinodes",
    "train_full_multinodes",
]
# A Python script whose interpreter may have a space in its path, which a #! line cannot: sh starts it.
SHEBANG = """#!/bin/sh
''''exec "{python}" "$0" "$@" # '''
"""
STUB = (
    SHEBANG
    + """
import os, sys
if sys.argv[1] == '-c':
    sys.exit({autocast})
print('ARGS', sys.argv[2:])
if os.environ.get('STUB_FAILS'):
    print(os.environ.get('STUB_SAYS', 'something broke')); sys.exit(int(os.environ['STUB_FAILS']))
evaluates = '--evaluate' in sys.argv
for step, loss in ((1, '1.10410000'), (10, '1.20000000')) if evaluates else ((1, '6.89210000'), (10, '5.50000000')):
    print(('Test: [%2d/20]' if evaluates else 'Epoch: [0][%2d/20]') % step + '\\tTime  0.251 ( 0.249)\\t'
          + ('' if evaluates else 'Data  0.001 ( 0.002)\\t') + 'Loss %s (6.90120000)\\t' % loss
          + 'Acc@1   0.39 (  0.21)\\tAcc@5   1.17 (  0.86)')
if not evaluates:
    print('[npu id: 0 ] * FPS@all 1024.020')
    output = sys.argv[sys.argv.index('--output-dir') + 1]
    for name in ('checkpoint.pth.tar', 'model_best.pth.tar'):
        open(os.path.join(output, name), 'w').write('weights')
    if not os.environ.get('STUB_IS_NOT_RANK_0'):
        open(os.path.join(output, 'metrics.jsonl'), 'w').write('{{"event": "done", "step": 2}}\\n')
if '--stop-step-num' not in sys.argv:
    print('[npu id: 0 ] [AVG-ACC] * Acc@1 73.385 Acc@5 91.337')
"""
)


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository under a path with a space."""
    root = tmp_path / "a clone"
    shutil.copytree(
        REPOSITORY, str(root), ignore=shutil.ignore_patterns(".git", ".venv*", "output", "*.tar*", "__pycache__")
    )
    return root


def stub(tmp_path, autocast=0):
    path = tmp_path / "stub python"
    path.write_text(STUB.format(python=sys.executable, autocast=autocast))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def bash(clone, name, *options, python=sys.executable, cwd=None, **env):
    return run(
        "bash",
        os.path.join(str(clone), "test", name + ".sh"),
        *options,
        cwd=str(cwd or clone),
        env=dict(env, PYTHON=python),
        timeout=600,
    )


@pytest.mark.once
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_prints_and_writes_the_references_metrics(clone, tmp_path, name):
    (clone / "model_best.pth.tar").write_text("x")
    (tmp_path / "my data").mkdir()
    result = bash(clone, name, "--data_path=my data", "--device_list=0,1", python=stub(tmp_path), cwd=tmp_path)
    assert result.code == 0, result.err
    last = result.out.splitlines()[
        result.out.splitlines().index("------------------ Final result ------------------") :
    ]
    performance, evaluation = "performance" in name, "eval" in name
    printed = ["Final Performance images/sec : 1024.020", "Final Train Accuracy : 73.385"][evaluation:]
    assert last[1:-1] == printed and last[-1].startswith("E2E Training Duration sec : ")
    output = clone / "test" / "output" / "0"
    kind = "perf" if performance else "eval" if evaluation else "acc"
    size, cards = ("256", "1p") if name.endswith("1p") else ("2048", "8p")
    case = f"Vgg16_ID1630_for_PyTorch_bs{size}_{cards}_{kind}"
    metrics = dict(line.split(" = ") for line in (output / (case + ".log")).read_text().splitlines())
    expected = {
        "Network": "Vgg16_ID1630_for_PyTorch",
        "RankSize": "1" if cards == "1p" else "2",
        "BatchSize": size,
        "CaseName": case,
        "TrainAccuracy": "73.385",
        "ActualLoss": "1.20000000" if evaluation else "5.50000000",
    }
    if not evaluation:
        expected.update(ActualFPS="1024.020", TrainingTime="250.00" if size == "256" else "1999.96")
    if name == "train_performance_1p":
        expected["CompileTime"] = "0.502"  # the first two log lines' Time
    assert metrics.keys() == {*expected, "E2ETrainingTime", "DeviceType"}
    assert all(metrics[key] == value for key, value in expected.items()), metrics
    losses = output / f"train_{case}_loss.txt"
    assert not losses.exists() if evaluation else losses.read_text() == "6.89210000\n5.50000000\n"
    flags = (output / "train_0.log").read_text()
    assert "'--data', '{}'".format(tmp_path / "my data") in flags and "'--amp', '--opt-level', 'O1'" in flags
    assert (
        "'--seed', '49', '--print-freq', '1'" in flags
        and "'--lr', '{}'".format("0.01" if cards == "1p" else "0.08") in flags
    )
    assert ("'--loss-scale-value', '1024'" in flags) == (name in ("train_full_8p", "train_full_multinodes"))
    if performance:  # --stop-step-num ends without a validation
        measured, validated = flags.split("ARGS")[1:]
        assert "'--stop-step-num', '200'" in measured and "'--evaluate'" in validated
        assert "'--resume', '{}'".format(output / "checkpoint.pth.tar") in validated
    if evaluation:
        assert "'--resume', '{}'".format(clone / "model_best.pth.tar") in flags


@pytest.mark.once
def test_train_best_8p_uses_mindcvs_recipe(clone, tmp_path):
    result = bash(clone, "train_best_8p", "--data_path=.", python=stub(tmp_path))
    assert result.code == 0, result.err
    flags = (clone / "test" / "output" / "0" / "train_0.log").read_text().replace("'", "").replace(",", "")
    for words in (
        "--epochs 200",
        "-b 256",
        "--lr 0.01",
        "--warmup-epochs 2",
        "--min-lr 1e-4",
        "--label-smoothing 0.1",
        "--wd 4e-5",
        "--no-bias-decay",
    ):
        assert words in flags, words


@pytest.mark.once
def test_a_failure_shows_the_log_and_keeps_the_exit_code(clone, tmp_path):
    result = bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path), STUB_FAILS="75")
    assert result.code == 75 and "something broke" in result.err and "Final" not in result.out
    assert "stopped before there was anything to save" in result.err
    says = "=> stopped on a signal after step 3, checkpoint saved"
    result = bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path), STUB_FAILS="75", STUB_SAYS=says)
    assert result.code == 75 and "to continue, add --resume=" in result.err


@pytest.mark.once
@pytest.mark.parametrize("option", ["--output-dir=x", "--stop-step-num"])
def test_the_quick_start_refuses_what_would_have_it_evaluate_an_older_run(clone, tmp_path, option):
    result = bash(clone, "quickstart", option, "3", python=stub(tmp_path))
    assert result.code == 2 and len(result.err.splitlines()) == 1 and option in result.err


@pytest.mark.once
def test_earlier_output_is_moved_aside_and_its_checkpoint_is_found(clone, tmp_path):
    for _ in range(2):
        assert bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path)).code == 0
    said = bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path)).out
    assert re.search(r"earlier output is in .*/output/0\.\S+; all earlier ones \(2\) take \d", said), said
    outputs = sorted(os.listdir(str(clone / "test" / "output")))
    assert len(outputs) == 3 and outputs[0] == "0"
    assert (clone / "model_best.pth.tar").read_text() == "weights"
    resume = "test/output/0/model_best.pth.tar"
    assert bash(clone, "train_full_1p", "--data_path=.", "--resume=" + resume, python=stub(tmp_path)).code == 0
    flags = (clone / "test" / "output" / "0" / "train_0.log").read_text()
    moved = flags.split("'--resume', '")[1].split("'")[0]
    assert os.path.exists(moved) and moved.startswith(str(clone / "test" / "output" / "0."))


WAITING = """
import os, sys, time
if sys.argv[1] == '-c':
    sys.exit(0)
print('training', flush=True)
while not os.path.exists({end!r}):
    time.sleep(0.05)
print('[npu id: 0 ] [AVG-ACC] * Acc@1 73.385 Acc@5 91.337')
"""


@contextlib.contextmanager
def training(clone, tmp_path):
    """train_full_8p.sh while main.py trains, until the file `end` is there."""
    python = tmp_path / "waiting python"
    python.write_text(SHEBANG.format(python=sys.executable) + WAITING.format(end=str(tmp_path / "end")))
    python.chmod(0o755)
    log = clone / "test" / "output" / "0" / "train_0.log"
    command = ["bash", clone / "test" / "train_full_8p.sh", "--data_path=."]
    with started("nohup", *command, cwd=clone, PYTHON=str(python)) as (process, _):
        try:
            while not (log.exists() and "training" in log.read_text()):
                assert process.poll() is None
                time.sleep(0.01)
            yield process
        finally:
            (tmp_path / "end").write_text("")


def wait_one_second(clone):
    """Instead of half a minute, for the run in a folder to end."""
    script = clone / "test" / "common.sh"
    assert "lock_output 30" in script.read_text()
    script.write_text(script.read_text().replace("lock_output 30", "lock_output 1"))


@pytest.mark.once
@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
def test_the_folder_of_a_running_script_is_not_moved_aside(clone, tmp_path):
    wait_one_second(clone)
    (clone / "model_best.pth.tar").write_text("x")
    (clone / "link").symlink_to(clone / "test" / "output")
    output, python = clone / "test" / "output", stub(tmp_path)
    with training(clone, tmp_path) as process:
        for name, *options in (
            ("train_eval_8p",),
            ("train_full_8p", "--device_list=4,5"),
            ("train_full_1p", "--output=link/0"),
            ("train_full_multinodes", "--launcher=torchrun"),
        ):
            second = bash(clone, name, "--data_path=.", *options, python=python)
            assert second.code == 2 and len(second.err.splitlines()) == 1, second.err
            assert f"--output={output}/0: another run writes there" in second.err
        assert os.listdir(str(output)) == ["0"] and os.listdir(str(output / "0")) == ["train_0.log"]
        assert bash(clone, "train_full_8p", "--data_path=.", "--output=other", python=python).code == 0
        (tmp_path / "end").write_text("")
        assert process.wait(60) == 0
    assert next((output / "0").glob("*_acc.log")).exists()
    assert bash(clone, "train_eval_8p", "--data_path=.", python=python).code == 0
    assert len(os.listdir(str(output))) == 2


@pytest.mark.once
@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
def test_a_folder_is_free_again_once_main_py_has_ended_however_the_script_ended(clone, tmp_path):
    wait_one_second(clone)
    python = stub(tmp_path)
    with training(clone, tmp_path) as process:
        process.kill()
        process.wait()
        assert bash(clone, "train_full_8p", "--data_path=.", python=python).code == 2  # main.py still trains
        script = clone / "test" / "common.sh"
        script.write_text(script.read_text().replace("lock_output 1", "lock_output 60"))
        waiting = subprocess.Popen(
            ["bash", str(clone / "test" / "train_full_8p.sh"), "--data_path=."],
            cwd=str(clone),
            env={**os.environ, "PYTHON": python},
        )
        (tmp_path / "end").write_text("")
        assert waiting.wait(60) == 0


@pytest.mark.once
def test_scripts_run_on_a_file_system_without_locks(clone, tmp_path):
    path = commands(tmp_path, flock="echo 'flock: 9: No locks available' >&2; exit 71")
    for _ in range(2):
        result = bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path), PATH=path)
        assert result.code == 0 and result.err == "", result.err
    assert len(os.listdir(str(clone / "test" / "output"))) == 2


@pytest.mark.once
def test_of_scripts_that_start_at_once_a_folder_holds_the_output_of_one(clone, tmp_path):
    """Each output, in place or moved aside, is that of one run."""
    python, jobs = stub(tmp_path), []
    for number in range(6):
        command = ["bash", str(clone / "test" / "train_full_1p.sh"), "--data_path=.", f"--epochs={number}"]
        jobs.append(subprocess.Popen(command, cwd=str(clone), env={**os.environ, "PYTHON": python}))
    codes = [job.wait(60) for job in jobs]
    assert 0 in codes and set(codes) <= {0, 2}
    logs = list((clone / "test" / "output").glob("0*/train_0.log"))
    assert len(logs) == codes.count(0) and all(log.read_text().count("ARGS") == 1 for log in logs)


@pytest.mark.once
def test_an_empty_output_folder_stays_and_one_that_cannot_be_moved_is_refused(clone, tmp_path):
    """As a folder that is mounted into a container: it cannot be renamed."""
    path = commands(tmp_path, mv="echo 'mv: Device or resource busy' >&2; exit 1")
    (tmp_path / "out").mkdir()
    for output, code in (("out", 0), ("out", 2), ("out/second", 0)):
        options = ["--data_path=.", f"--output={tmp_path / output}"]
        result = bash(clone, "train_performance_1p", *options, python=stub(tmp_path), PATH=path)
        assert result.code == code, result.err
        assert len(result.err.splitlines()) == (1 if code else 0), result.err
        assert ("name a folder in it" in result.err) == (code == 2)
    assert (tmp_path / "out" / "train_0.log").exists() and os.listdir(str(tmp_path)).count("out") == 1


@pytest.mark.once
@pytest.mark.parametrize("used", ["repository", "data", "folder", "link"])
def test_an_output_folder_that_holds_what_is_in_use_is_refused(clone, tmp_path, used):
    data, folder = tmp_path / "data" / "set", tmp_path / "folder" / "below"
    data.mkdir(parents=True)
    folder.mkdir(parents=True)
    output = {"repository": clone, "data": data.parent, "folder": folder.parent, "link": "."}[used]
    (tmp_path / "link").symlink_to(folder)
    script = clone / "test" / "train_full_1p.sh"
    command = 'cd -- "$1"; shift; exec bash "$@"'  # a shell that changes the folder sets PWD, to the link's name
    words = [tmp_path / "link" if used == "link" else folder, script, f"--data_path={data}", f"--output={output}"]
    result = run("bash", "-c", command, "-", *words, env={"PYTHON": stub(tmp_path)})
    assert result.code == 2 and "must not contain" in result.err and len(result.err.splitlines()) == 1, result.err
    assert clone.exists() and data.exists() and folder.exists()


@pytest.mark.once
def test_a_run_that_is_refused_leaves_the_earlier_output_where_it_was(clone, tmp_path):
    python, checkpoint = stub(tmp_path), clone / "test" / "output" / "0" / "model_best.pth.tar"
    assert bash(clone, "train_full_1p", "--data_path=.", python=python).code == 0
    options = ["--data_path=.", f"--resume={checkpoint}"]
    refused = bash(clone, "train_full_1p", *options, python=python, STUB_FAILS="2", STUB_SAYS="main.py: error: wrong")
    assert refused.code == 2 and refused.err.endswith("main.py: error: wrong\n"), refused.err
    assert checkpoint.exists() and os.listdir(str(clone / "test" / "output")) == ["0"]
    assert bash(clone, "train_full_1p", *options, python=python).code == 0


@pytest.mark.once
def test_a_training_is_no_failure_if_its_checkpoints_cannot_be_copied(clone, tmp_path):
    (clone / "model_best.pth.tar").write_text("of an earlier training")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mv").write_text("#!/bin/sh\necho 'mv: read-only file system' >&2; exit 1\n")
    (tmp_path / "bin" / "mv").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    result = bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path), PATH=path)
    assert result.code == 0 and "Final Train Accuracy : 73.385" in result.out, result.err
    assert "warning: cannot write" in result.err
    assert (clone / "model_best.pth.tar").read_text() == "of an earlier training"


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--data_path="],
        ["--data_path=.", "--no_such=1"],
        ["--data_path=.", "--resume="],
        ["--data_path=/no/such"],
        ["--data_path=.", "--nnodes=2"],
        ["--data_path=.", "--device_id="],
        ["--data_path=.", "--device_id=.."],
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(clone, tmp_path, options):
    result = bash(clone, "train_full_8p", *options, python=stub(tmp_path))
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "error" in result.err


@pytest.mark.once
@pytest.mark.parametrize("name", ["train_full_multinodes", "train_performance_multinodes"])
@pytest.mark.parametrize("option", ["--node_rank", "--master_port", "--rendezvous_timeout", "--device_id"])
@pytest.mark.parametrize("value", ["", "x", "1x", "-1", "1.5"])
def test_a_number_that_is_none_is_named(clone, tmp_path, name, option, value):
    result = bash(clone, name, "--data_path=.", f"{option}={value}", python=stub(tmp_path))
    assert result.code == 2 and result.err == f"{name}.sh: error: {option} must be a number, got '{value}'\n"


@pytest.mark.once
@pytest.mark.parametrize("name", ["train_full_1p", "train_eval_8p", "train_full_multinodes"])
@pytest.mark.parametrize("option", ["--data_path", "--resume", "--output"])
def test_an_option_without_its_equals_sign_is_told_how_to_write_it(clone, tmp_path, name, option):
    result = bash(clone, name, option, "value", python=stub(tmp_path))
    assert result.code == 2 and result.err == f"{name}.sh: error: write {option}=VALUE\n"


@pytest.mark.once
def test_a_tilde_is_the_home_folder_and_a_list_of_images_is_data(clone, tmp_path):
    home = tmp_path / "my & home"
    (home / "data").mkdir(parents=True)
    (home / "list.csv").write_text("image,label\n")
    for data, output in (("~/data", "~/out"), ("~/list.csv", "~/~/~out"), ("~", "relative/~")):
        options = [f"--data_path={data}", f"--output={output}", "--resume=~/x.tar"]
        result = bash(clone, "train_full_1p", *options, python=stub(tmp_path), HOME=str(home))
        assert result.code == 0, result.err
        folder = home / output[2:] if output.startswith("~/") else clone / output
        flags = (folder / "train_0.log").read_text()
        for flag, path in (("--data", data.replace("~", str(home))), ("--resume", home / "x.tar")):
            assert f"'{flag}', '{path}'" in flags, flags
    assert not (clone / "~").exists()


@pytest.mark.once
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("venv", [True, False, None])
@pytest.mark.parametrize("named", [True, False])
def test_a_script_takes_the_first_python_whose_torch_works(clone, tmp_path, named, active, venv):
    """PYTHON is taken as it is, then the active one, then that of .venv, which may be half-made or missing."""
    path = commands(tmp_path, python3="")
    pythons = {"named": tmp_path / "named", "active": tmp_path / "commands" / "python3"}
    if venv is not None:
        pythons["venv"] = clone / ".venv" / "bin" / "python"
        pythons["venv"].parent.mkdir(parents=True)
    works = {"named": named, "active": active, "venv": venv}
    for name, python in pythons.items():
        text = STUB.format(python=sys.executable, autocast=int(not works[name]))
        python.write_text(text.replace("'ARGS'", "'ARGS', sys.argv[0]"))
        python.chmod(0o755)
    result = bash(clone, "train_full_1p", "--data_path=.", python=str(pythons["named"]) if named else "", PATH=path)
    expected = next((name for name, can in works.items() if can), None)
    if expected:
        assert result.code == 0, result.err
        assert f"ARGS {pythons[expected]} " in (clone / "test" / "output" / "0" / "train_0.log").read_text()
    else:
        assert result.code == 2 and len(result.err.splitlines()) == 1 and "PYTHON" in result.err, result.err
        assert not (clone / "test" / "output").exists()


@pytest.mark.once
def test_the_evaluation_ignores_unknown_options_as_the_references_does(clone, tmp_path):
    (clone / "model_best.pth.tar").write_text("x")
    options = ["--data_path=.", "--world_size=8", "--no_such=1", "--nnodes=2"]
    result = bash(clone, "train_eval_8p", *options, python=stub(tmp_path))
    assert result.code == 0 and "Final Train Accuracy : 73.385" in result.out, result.err
    warnings = result.err.splitlines()
    assert len(warnings) == 3 and all(option in line for option, line in zip(options[1:], warnings)), warnings


def commands(tmp_path, **scripts):
    """A PATH with these shell scripts in front."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text("#!/bin/sh\n" + text)
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


@pytest.mark.once
@pytest.mark.parametrize("addresses, master", [("10.0.0.7 172.17.0.1", "10.0.0.7"), ("", "127.0.0.1")])
def test_node_0_is_the_master_at_its_first_address_and_other_nodes_must_name_it(clone, tmp_path, addresses, master):
    path = commands(tmp_path, hostname=f'[ "$1" = -I ] && echo "{addresses}"')
    options = ["--data_path=.", "--nnodes=2"]
    result = bash(clone, "train_full_multinodes", *options, python=stub(tmp_path), PATH=path)
    assert result.code == 0, result.err
    flags = (clone / "test" / "output" / "0" / "train_0.log").read_text()
    assert f"'--addr', '{master}'" in flags and f"'tcp://{master}:59629'" in flags
    assert "RankSize = 8\n" in next((clone / "test" / "output" / "0").glob("*_acc.log")).read_text()
    refused = bash(clone, "train_full_multinodes", *options, "--node_rank=1", python=stub(tmp_path), PATH=path)
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and "--master_addr=" in refused.err


@pytest.mark.once
def test_options_reach_main_py(clone, tmp_path):
    result = bash(
        clone,
        "train_performance_multinodes",
        "--data_path=.",
        "--nnodes=2",
        "--node_rank=1",
        "--batch_size=512",
        "--master_addr=10.0.0.1",
        "--local_addr=127.0.0.1",
        "--workers=3",
        "--epochs=7",
        "--device=cpu",
        "--learning_rate=0.5",
        "--output=out put",
        python=stub(tmp_path, autocast=1),
    )
    assert result.code == 0, result.err
    flags = (clone / "out put" / "train_0.log").read_text()
    for part in (
        "'--world-size', '2', '--rank', '1', '--dist-url', 'tcp://10.0.0.1:59629'",
        "'-b', '512'",
        "'--workers', '3'",
        "'--epochs', '7'",
        "'--lr', '0.5'",
        "'--device', 'cpu'",
        "'--opt-level', 'O0'",
    ):  # no autocast on this cpu
        assert part in flags, flags


@pytest.mark.once
def test_torchrun_is_started_and_continues_an_unfinished_output(clone, tmp_path):
    """The stub stands in for torchrun, so what it ends with says how the script reads torchrun's report."""
    options = [
        "--data_path=.",
        "--launcher=torchrun",
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=10.0.0.1",
        "--local_addr=127.0.0.1",
        "--device_list=0,1",
        "--rendezvous_timeout=90",
    ]
    python = stub(tmp_path)
    output = clone / "test" / "output" / "0_node1"  # nodes may share the file system
    stopped = bash(
        clone, "train_full_multinodes", *options, python=python, STUB_FAILS="1", STUB_SAYS="=> stopped on a signal"
    )
    assert stopped.code == 75 and "the same command" in stopped.err, stopped.err
    failed = bash(
        clone, "train_full_multinodes", *options, python=python, STUB_FAILS="1", STUB_SAYS="exitcode  : 2 (pid: 9)"
    )
    assert failed.code == 2, failed.err
    assert bash(clone, "train_full_multinodes", *options, python=python).code == 0
    log = (output / "train_0.log").read_text()
    assert log.count("ARGS") == 3  # the same folder each time
    for part in (
        "'--nnodes', '2', '--nproc_per_node', '2'",
        "'--rdzv_endpoint', '10.0.0.1:59629'",
        "'is_host=false,join_timeout=90,read_timeout=90'",
        "'--local_addr', '127.0.0.1'",
        "'--auto-resume', '--save-freq', '100'",
        "'--device-list', '0,1'",
    ):
        assert part in log, log
    assert "'--dist-url'" not in log and "'--world-size'" not in log
    assert bash(clone, "train_full_multinodes", *options, python=python).code == 0
    assert (output / "train_0.log").read_text().count("ARGS") == 1  # a finished run is moved aside
    refused = bash(clone, "train_full_multinodes", *options, "--resume=x", python=python)
    assert refused.code == 2 and len(refused.err.splitlines()) == 1


@pytest.mark.once
@pytest.mark.parametrize("nodes, node_rank", [("1", 0), ("2", 0), ("2", 1), ("1:4", 3)])
def test_a_measurement_under_torchrun_ends_with_a_validation_on_the_node_of_rank_0(clone, tmp_path, nodes, node_rank):
    options = ["--data_path=.", "--launcher=torchrun", "--master_addr=10.0.0.1", "--device_list=0,1"]
    options += [f"--nnodes={nodes}", f"--node_rank={node_rank}"]
    output = clone / "test" / "output" / ("0" if node_rank == 0 else f"0_node{node_rank}")
    result = bash(clone, "train_performance_multinodes", *options, python=stub(tmp_path))
    assert result.code == 0 and "Final Train Accuracy : 73.385" in result.out, result.err
    measured, validated = [line for line in (output / "train_0.log").read_text().splitlines() if "ARGS" in line]
    assert "torch.distributed.run" in measured and "--stop-step-num" in measured and "--evaluate" not in measured
    for part in (
        "'--evaluate'",
        "'--resume', ",
        "'--world-size', '1'",
        "'--device-list', '0,1'",
        "'--addr', '127.0.0.1'",
    ):
        assert part in validated, validated
    assert "--auto-resume" not in validated and "--dist-url" not in validated
    (case,) = output.glob("*_perf.log")
    batch, most = 2048, int(nodes.split(":")[-1])  # of the measurement, not of the validation
    assert f"TrainingTime = {batch * most * 1000 / 1024.02:.2f}" in case.read_text()


@pytest.mark.once
def test_a_measurement_under_torchrun_is_not_validated_on_other_nodes(clone, tmp_path):
    options = ["--data_path=.", "--launcher=torchrun", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1"]
    python = stub(tmp_path)
    result = bash(clone, "train_performance_multinodes", *options, python=python, STUB_IS_NOT_RANK_0="1")
    assert result.code == 0 and "Final Performance" in result.out and "Accuracy" not in result.out, result.err


@pytest.mark.once
def test_ascend_device_id_picks_the_card(clone, tmp_path):
    """Of a run on one card; it beats --device_id. A run on several writes to output/0, as the reference does."""
    python = stub(tmp_path)
    options = ["--data_path=.", "--device_id=1"]
    assert bash(clone, "train_full_1p", *options, python=python, ASCEND_DEVICE_ID="3").code == 0
    assert "'--gpu', '3'" in (clone / "test" / "output" / "3" / "train_3.log").read_text()
    assert bash(clone, "train_full_8p", "--data_path=.", python=python, ASCEND_DEVICE_ID="3").code == 0
    assert sorted(os.listdir(str(clone / "test" / "output"))) == ["0", "3"]


# --- how a script or the program is started ---------------------------------------------------------------------------


def ignore(*numbers):
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


# Options of Popen. A shell without job control starts a background job with SIGINT and SIGQUIT ignored.
SURROUNDINGS = {
    "terminal": {},
    "background": {"preexec_fn": lambda: ignore(signal.SIGINT, signal.SIGQUIT), "stdin": subprocess.DEVNULL},
    "nohup": {"preexec_fn": lambda: ignore(signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)},
    "cron": {"env": {"PATH": "/usr/bin:/bin"}, "start_new_session": True, "stdin": subprocess.DEVNULL},
    "no stdin": {"preexec_fn": lambda: os.close(0), "start_new_session": True},
}


@contextlib.contextmanager
def started(surroundings, *command, cwd, **env):
    """A process in such surroundings, with both ends of its output: a terminal's, or pipes'."""
    options = {"env": dict(os.environ), **SURROUNDINGS[surroundings]}
    options["env"] = {**options["env"], **env}
    if surroundings == "terminal":
        reader, writer = pty.openpty()
        options.update(stdin=writer, stdout=writer, stderr=writer, start_new_session=True)
    else:
        reader, writer = os.pipe()
        options.update(stdout=writer, stderr=writer)
    process = subprocess.Popen([str(word) for word in command], cwd=str(cwd), **options)
    os.close(writer)
    try:
        yield process, reader
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def read_all(reader):
    data = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while True:
            part = os.read(reader, 65536)
            if not part:
                break
            data += part
    return data.decode()


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_program_stops_on_sigint_however_it_was_started(surroundings):
    code = "import os, signal, time; from engine.console import run_script; "
    code += "run_script(lambda: [os.kill(os.getpid(), signal.SIGINT), time.sleep(60)])"
    with started(surroundings, sys.executable, "-c", code, cwd=REPOSITORY) as (process, reader):
        assert read_all(reader) == "" and process.wait(60) == 128 + signal.SIGINT


def has_default_signal():
    return run("env", "--default-signal=INT", "true").code == 0


@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_signal_to_the_script_reaches_main_py(clone, tmp_path, surroundings, number):
    if number == signal.SIGINT and surroundings in ("background", "nohup") and not has_default_signal():
        pytest.skip("coreutils before 8.31 cannot undo an ignored signal")
    waiting = tmp_path / "waiting python"
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\nwhile True: time.sleep(0.05)\n"
    )
    waiting.write_text(SHEBANG.format(python=sys.executable) + code)
    waiting.chmod(0o755)
    command = ["bash", clone / "test" / "train_full_1p.sh", "--data_path=."]
    with started(surroundings, *command, cwd=clone, PYTHON=str(waiting)) as (process, reader):
        while not (tmp_path / "up").exists():
            assert process.poll() is None
        process.send_signal(number)
        said = read_all(reader)
        assert process.wait(60) == 75, said


@pytest.mark.once
@pytest.mark.parametrize("shell", ["sh", "dash", "bash --posix"])
@pytest.mark.parametrize("linked", [False, True])
def test_scripts_run_under_sh_and_through_a_link(clone, tmp_path, shell, linked):
    if shutil.which(shell.split()[0]) is None:
        pytest.skip(f"no {shell}")
    script = clone / "test" / "train_full_1p.sh"
    if linked:
        (tmp_path / "train").symlink_to(script)
        script = tmp_path / "train"
    result = run(*shell.split(), script, "--data_path=.", cwd=str(tmp_path), env={"PYTHON": stub(tmp_path)})
    assert result.code == 0 and "Final Train Accuracy : 73.385" in result.out and result.err == "", result.err
    assert (clone / "test" / "output" / "0").is_dir()


@pytest.mark.once
@pytest.mark.parametrize("name", sorted(os.listdir(os.path.join(REPOSITORY, "test"))))
def test_every_script_starts_under_sh(name):
    """The line comes before anything that only bash knows."""
    if not name.endswith(".sh") or name in ("common.sh", "setup.sh", "env_npu.sh"):
        return
    with open(os.path.join(REPOSITORY, "test", name)) as file:
        lines = [line for line in file if not line.startswith("#")]
    assert lines[0] == '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"\n'


@pytest.mark.once
def test_git_checks_scripts_out_with_unix_line_ends(tmp_path):
    """Also where Git is set to convert them, as on Windows."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    shutil.copy(os.path.join(REPOSITORY, ".gitattributes"), str(tmp_path))
    names = ["a.sh", "a.py", "a.txt", "a.md", "a.sbatch", "run"]
    for name in names:
        (tmp_path / name).write_bytes(b"one\ntwo\n")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    identity = ["-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["rm", "-rq", "."], ["reset", "-q", "--hard"]):
        assert run("git", *identity, *words, cwd=str(tmp_path)).code == 0
    assert all((tmp_path / name).read_bytes() == b"one\ntwo\n" for name in names)
    assert (tmp_path / "a.png").read_bytes() == b"\x89PNG\r\n\x1a\n"


# --- the NPU's environment --------------------------------------------------------------------------------------------

VARIABLES = {
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "ASCEND_GLOBAL_LOG_LEVEL": "3",
    "ASCEND_GLOBAL_EVENT_ENABLE": "0",
    "TASK_QUEUE_ENABLE": "1",
    "PTCOPY_ENABLE": "1",
    "COMBINED_ENABLE": "1",
    "DYNAMIC_OP": "ADD#MUL",
    "HCCL_WHITELIST_DISABLE": "1",
    "HCCL_IF_IP": "10.0.0.7",
}


@pytest.fixture
def npu(tmp_path):
    """(env_npu.sh that looks for everything below a folder, the folder, run it and return the environment)."""
    with open(os.path.join(REPOSITORY, "test", "env_npu.sh")) as file:
        text = file.read()
    for path in ("/etc/Ascend", "/dev/davinci", "/usr/local/Ascend"):
        assert path in text
        text = text.replace(path, f"{tmp_path}{path}")
    script = tmp_path / "env_npu.sh"
    script.write_text(text)
    path = commands(
        tmp_path, hostname="echo 10.0.0.7 10.0.0.8", msnpureport=f'echo "$@" >>"{tmp_path}/reported"; exit 1'
    )

    def environment_of(options="-euo pipefail", **env):
        code = f'set {options}; before=$-; source "$1"; [ "$before" = "$-" ] || echo OPTIONS=$-; env'
        clean = {"PATH": path, "HOME": str(tmp_path), **env}
        done = subprocess.run(["bash", "-c", code, "-", str(script)], stdout=subprocess.PIPE, env=clean, timeout=60)
        assert done.returncode == 0
        return dict(line.split("=", 1) for line in done.stdout.decode().splitlines())

    return environment_of


def install_cann(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "set_env.sh").write_text(f'export CANN="{name}$no_such_variable"\n')


@pytest.mark.once
@pytest.mark.parametrize("options", ["-euo pipefail", "+eu"])
def test_the_npu_environment_is_the_references_and_keeps_what_the_user_set(npu, options):
    found = npu(options)
    assert {name: found.get(name) for name in VARIABLES} == VARIABLES and "OPTIONS" not in found
    mine = dict.fromkeys(VARIABLES, "mine")
    assert npu(options, **mine).items() >= mine.items()
    assert "HCCL_IF_IP" not in npu(HCCL_SOCKET_IFNAME="eth1")  # it would win over the interface


@pytest.mark.once
def test_cann_is_found_where_its_installer_says_and_nnae_without_a_toolkit(npu, tmp_path):
    assert "CANN" not in npu()
    (tmp_path / "etc" / "Ascend").mkdir(parents=True)
    info = tmp_path / "etc" / "Ascend" / "ascend_cann_install.info"
    info.write_text(f"Version=1\nInstall_Path={tmp_path}/opt/cann here\n")
    install_cann(tmp_path / "usr" / "local" / "Ascend", "ascend-toolkit")
    assert npu()["CANN"] == "ascend-toolkit"
    install_cann(tmp_path / "opt" / "cann here", "nnae")
    for options in ("-euo pipefail", "+eu"):
        found = npu(options)
        assert found["CANN"] == "nnae" and "OPTIONS" not in found
    install_cann(tmp_path / "opt" / "cann here", "ascend-toolkit")
    assert npu()["CANN"] == "ascend-toolkit"


@pytest.mark.once
def test_each_device_logs_errors_only(npu, tmp_path):
    npu()
    assert not (tmp_path / "reported").exists()
    (tmp_path / "dev").mkdir()
    for name in ("davinci0", "davinci12", "davinci_manager"):
        (tmp_path / "dev" / name).write_text("")
    npu()
    assert (tmp_path / "reported").read_text() == "-g error -d 0\n-g error -d 12\n"


# --- the quick start --------------------------------------------------------------------------------------------------

TRAINER = (
    SHEBANG
    + """
import os, sys
if sys.argv[1] == '-c':
    sys.exit(sys.argv[2].split()[-1] in os.environ.get('STUB_MISSES', '').split())
output = sys.argv[sys.argv.index('--output-dir') + 1]
print('ARGS', os.getcwd(), sys.argv[1:])
if os.environ.get('STUB_SAYS'):
    sys.exit('main.py: error: ' + os.environ['STUB_SAYS'])
for step in range(2):
    sys.stderr.write('\\rBAR %d' % step if sys.stderr.isatty() else '')
    print('line', step, flush=True)
if not os.environ.get('STUB_IS_SILENT'):
    print('[npu id: 0 ] [AVG-ACC] * Acc@1 98.889 Acc@5 100.000')
print('warning', file=sys.stderr)
"""
)


def quick_start(clone, tmp_path, surroundings, *flags, free_gb=(100.0, 100.0), python=TRAINER, **env):
    """Run it with a Python whose main.py is a stub, and this much free space: at first, and later.

    Returns (exit code, what it says, its log).
    """
    blocks = [int(gb * 1e9 / 1024) for gb in free_gb]
    path = commands(
        tmp_path,
        df=f"echo header; echo disk 9 9 $([ -e '{tmp_path}/later' ] && echo {blocks[1]} || echo {blocks[0]}) 9% /; "
        f"touch '{tmp_path}/later'",
        python3=python.format(python=sys.executable).replace("#!/bin/sh\n", "", 1),
    )
    command = ["bash", clone / "test" / "quickstart.sh", *flags]
    with started(surroundings, *command, cwd=tmp_path, **{"PATH": path, "PYTHON": "", **env}) as (process, reader):
        said = read_all(reader)
        code = process.wait(60)
    log = clone / "test" / "output" / "quickstart" / "train.log"
    return code, said, log.read_text() if log.exists() else None


@pytest.mark.once
def test_the_quick_start_shows_the_progress_bar_on_a_terminal_and_keeps_the_lines(clone, tmp_path):
    code, said, log = quick_start(clone, tmp_path, "terminal")
    assert code == 0 and "Validation accuracy: 98.89%" in said, said
    output, program = "test/output/quickstart", tmp_path / "commands" / "python3"
    assert said.replace("\r", "").splitlines()[-3:] == [
        f"Next, in {clone}:",
        f"  open {output}/page/index.html in a browser",
        f"  {program} predict.py IMAGE --checkpoint {output}/model_best.pth.tar",
    ]
    assert "BAR 0" in said and "\r\x1b[Kline 0\r\n" in said and "\r\x1b[Kline 1\r\n" in said  # the bar is erased first
    assert log.splitlines()[1:3] == ["line 0", "line 1"] and "BAR" not in log


@pytest.mark.once
def test_the_quick_start_without_a_terminal_writes_plain_lines_and_all_of_them_to_the_log(clone, tmp_path):
    code, said, log = quick_start(clone, tmp_path, "nohup")
    assert code == 0 and "BAR" not in said + log and "\x1b" not in said + log
    assert all(line in text.splitlines() for line in ("line 0", "line 1", "warning") for text in (said, log))
    assert "1.07 GB" in said and "100.0 GB are free" in said  # what it takes, before it starts


@pytest.mark.once
def test_the_quick_start_does_not_start_on_a_disk_that_is_too_small(clone, tmp_path):
    code, said, log = quick_start(clone, tmp_path, "nohup", free_gb=(4.5, 4.5))
    assert code == 2 and log is None and "4.5 GB are free, 5 GB are needed" in said, said


@pytest.mark.once
@pytest.mark.parametrize("surroundings, later", [("terminal", 0.3), ("nohup", 100.0)])
def test_a_quick_start_that_filled_the_disk_says_how_to_continue(clone, tmp_path, surroundings, later):
    """On a terminal stderr is not in the log, but the free space tells; with a quota the log tells."""
    full = "could not write the last checkpoint ([Errno 28] No space left on device)"
    code, said, _ = quick_start(clone, tmp_path, surroundings, free_gb=(100.0, later), STUB_SAYS=full)
    assert code == 1 and full in said and "quickstart.sh --auto-resume" in said and "1.07 GB" in said, said


@pytest.mark.once
def test_a_quick_start_that_failed_otherwise_does_not_blame_the_disk(clone, tmp_path):
    code, said, _ = quick_start(clone, tmp_path, "nohup", STUB_SAYS="something broke")
    assert code == 1 and "something broke" in said and "--auto-resume" not in said


@pytest.mark.once
def test_the_quick_start_leaves_relative_paths_to_the_callers_folder(clone, tmp_path):
    code, said, log = quick_start(clone, tmp_path, "nohup", "my data")
    assert code == 0 and f"ARGS {tmp_path} " in log and "'my data'" in log, said
    evaluated = (clone / "test" / "output" / "quickstart" / "evaluate.log").read_text()
    assert f"ARGS {tmp_path} " in evaluated and f"'{clone}/test/output/quickstart/model_best.pth.tar'" in evaluated


@pytest.mark.once
@pytest.mark.parametrize("missing", ["matplotlib", "jinja2", "matplotlib jinja2"])
def test_the_quick_start_without_what_the_page_needs_names_it_and_leaves_the_page_out(clone, tmp_path, missing):
    code, said, _ = quick_start(clone, tmp_path, "nohup", STUB_MISSES=missing)
    assert code == 0 and "index.html" not in said, said
    assert all((f"=> {name} is not installed" in said) == (name in missing) for name in ("matplotlib", "jinja2"))
    assert "--report" not in (clone / "test" / "output" / "quickstart" / "evaluate.log").read_text()


@pytest.mark.once
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_of_the_quick_start_starts_nothing(clone, tmp_path, flag):
    code, said, log = quick_start(clone, tmp_path, "nohup", "--seed", "7", flag)
    assert code == 0 and log is None and len(said.splitlines()) == 2 and "go to main.py" in said, said


@pytest.mark.once
def test_a_quick_start_that_validated_nothing_has_failed(clone, tmp_path):
    code, said, _ = quick_start(clone, tmp_path, "nohup", STUB_IS_SILENT="1")
    assert code == 1 and "accuracy" not in said and said.splitlines()[-1].endswith("quickstart/evaluate.log"), said


# A Python without torch, whose venv has one after pip.
BARE = (
    SHEBANG
    + """
import os, shutil, sys
pip = os.path.join(os.path.dirname(sys.argv[0]), 'pip was here')
if sys.argv[1:3] == ['-m', 'venv']:
    os.makedirs(sys.argv[3] + '/bin'); shutil.copy(sys.argv[0], sys.argv[3] + '/bin/python'); sys.exit(0)
if sys.argv[1:3] == ['-m', 'pip']:
    print('Downloading torch'); open(pip, 'w').close(); sys.exit(os.environ.get('PIP_FAILS'))
if sys.argv[1] == '-c' and 'torch' in sys.argv[2] and not os.path.exists(pip):
    sys.exit(1)
"""
    + TRAINER[len(SHEBANG) :]
)


@pytest.mark.once
def test_the_quick_start_says_what_installing_takes_and_shows_pips_progress(clone, tmp_path):
    code, said, _ = quick_start(clone, tmp_path, "nohup", python=BARE)
    assert code == 0 and said.index("up to 11 GB of disk") < said.index("Downloading torch"), said


@pytest.mark.once
@pytest.mark.parametrize("free, failure, expected", [(10.0, "", 2), (100.0, "no connection", 1)])
def test_the_quick_start_that_cannot_install_ends_with_one_line(clone, tmp_path, free, failure, expected):
    code, said, log = quick_start(clone, tmp_path, "nohup", python=BARE, free_gb=(free, free), PIP_FAILS=failure)
    assert code == expected and log is None and said.splitlines()[-1].startswith("quickstart.sh: error: "), said
    assert (clone / ".venv").exists() == (expected == 1)  # nothing is written before the check


@pytest.mark.once
@pytest.mark.parametrize("name", ["./named python", "{}/named python", "named python"])
def test_the_quick_start_takes_the_python_that_is_named(clone, tmp_path, name):
    (tmp_path / "named python").write_text(TRAINER.format(python=sys.executable))
    (tmp_path / "named python").chmod(0o755)
    code, said, _ = quick_start(clone, tmp_path, "nohup", PYTHON=name.format(tmp_path))
    if "/" in name:
        assert code == 0 and f"\n  {tmp_path}/named python predict.py" in said, said
    else:
        assert code == 2 and said == "quickstart.sh: error: PYTHON=named python: no such program\n"


# What the scripts of Ascend's model zoo make of a log: last throughput and accuracy, the loss of each training step,
# the last loss of a validation.
ASCEND_PARSERS = {
    "FPS": "grep -a FPS {log} | awk -F ' ' '{{print $NF}}' | awk 'END {{print}}'",
    "accuracy": "grep -a '* Acc@1' {log} | awk 'END {{print}}' | awk -F 'Acc@1' '{{print $NF}}' | awk '{{print $1}}'",
    "losses": "grep Epoch: {log} | grep -v Test | awk -F Loss '{{print $NF}}' | awk '{{print $1}}'",
    "validation loss": "grep Test {log} | awk -F Loss '{{print $NF}}' | awk '{{print $1}}' | awk 'END {{print}}'",
}


def parse_as_ascends_scripts(log):
    parsed = {}
    for name, parser in ASCEND_PARSERS.items():
        result = run("bash", "-c", parser.format(log=shlex.quote(str(log))))
        assert result.code == 0 and not result.err, result.err
        parsed[name] = result.out.split()
    return parsed


def test_training_and_evaluation_with_the_real_program(clone, tmp_path):
    """train_full_8p.sh and train_eval_8p.sh on two CPU processes: the evaluation repeats the training's accuracy.

    Both leave logs that the parsers of Ascend's scripts read, with the loss of each of the five steps.
    """
    write_cifar(tmp_path / "some data", binary=True, count=2)
    common = ["--data_path=some data", "--device=cpu", "--device_list=0,1", "--batch_size=2", "--workers=2"]
    trained = bash(clone, "train_full_8p", *common, "--epochs=1", cwd=tmp_path)
    assert trained.code == 0, trained.err
    output = clone / "test" / "output" / "0"
    parsed = parse_as_ascends_scripts(output / "train_0.log")
    assert len(parsed["losses"]) == 5 and all(re.fullmatch(r"\d+\.\d{8}", loss) for loss in parsed["losses"]), parsed
    (losses,) = output.glob("train_*_acc_loss.txt")
    assert losses.read_text().split() == parsed["losses"]
    means = [event["loss"] for event in events(output, "train")]  # of the epoch so far
    sums = [0.0, *(mean * step for step, mean in enumerate(means, 1))]
    own = [now - before for now, before in zip(sums[1:], sums)]
    assert [float(loss) for loss in parsed["losses"]] == pytest.approx(own, abs=1e-5)

    evaluated = bash(clone, "train_eval_8p", *common, cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    for result, text in ((trained, parsed), (evaluated, parse_as_ascends_scripts(output / "train_0.log"))):
        words = dict(line.split(" : ") for line in result.out.splitlines() if " : " in line)
        assert words["Final Train Accuracy"] == text["accuracy"][0] == parsed["accuracy"][0]
        assert words.get("Final Performance images/sec") == (text["FPS"] or [None])[0]
        assert float(text["validation loss"][0]) > 0
    (metrics,) = output.glob("*_eval.log")
    assert f"ActualLoss = {text['validation loss'][0]}\n" in metrics.read_text()


# --- the fault tests --------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_cluster_without_network_namespaces_is_skipped(tmp_path):
    """Each part is skipped by name if `ip` refuses; torch is not needed until then."""
    ip = tmp_path / "ip"
    ip.write_text("#!/bin/sh\necho refused >&2\nexit 1\n")
    ip.chmod(0o755)
    script = os.path.join(REPOSITORY, "test", "faults", "cluster.sh")
    result = run("bash", script, "nodes", env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}, timeout=60)
    assert result.code == 0, result.err
    assert "command not found" not in result.err
    assert result.out.splitlines()[-1].startswith("skipped  nodes: "), result.out


# --- run_tests.sh -----------------------------------------------------------------------------------------------------


# A Python of three versions of torch, whose pytest prints what it was asked for, and fails where it is told to.
TESTED = (
    SHEBANG
    + """
import os, shutil, sys
version = next((v for v in ('1.8', '1.5') if v in sys.argv[0]), '2.9')
if sys.argv[1] == '-c':
    print(version)
if sys.argv[1:3] == ['-m', 'venv']:
    os.makedirs(sys.argv[-1] + '/bin'); shutil.copy(sys.argv[0], sys.argv[-1] + '/bin/python')
if sys.argv[1:3] == ['-m', 'pytest']:
    print('PYTEST', version, *sys.argv[3:])
    fails = any(word in sys.argv for word in os.environ.get('STUB_FAILS', '').split())
    print('FAILED test/x.py::test_y - boom' if fails else '', '1 of 9 tests', sep='\\n')
    sys.exit(1 if fails else 5 if version == '1.8' else 0)
"""
)


def run_the_tests(clone, tmp_path, surroundings, *words, **env):
    """(exit code, what run_tests.sh says) with stubs of Python and of the linters."""
    python = TESTED.format(python=sys.executable).replace("#!/bin/sh\n", "", 1)
    linters = {"ruff": 'echo "$@"', "mypy": 'exit "${MYPY_FAILS:-0}"', "shellcheck": ""}
    path = commands(tmp_path, python3=python, **linters)
    for version in ("1.8", "1.5"):
        (clone / f".venv-{version}" / "bin").mkdir(parents=True)
        shutil.copy(str(tmp_path / "commands" / "python3"), str(clone / f".venv-{version}" / "bin" / "python"))
    command = ["bash", clone / "test" / "run_tests.sh", *words]
    with started(surroundings, *command, cwd=tmp_path, **{"PATH": path, "PYTHON": "", **env}) as (process, reader):
        said = read_all(reader).replace("\r\n", "\n")
        return process.wait(60), said


@pytest.mark.once
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_tests_end_with_a_table_of_their_parts_however_they_were_started(clone, tmp_path, surroundings):
    code, said = run_the_tests(clone, tmp_path, surroundings, "-k", "x y")
    assert code == 0, said
    runs = [line.split() for line in said.splitlines() if line.startswith("PYTEST")]
    expected = [(version, part) for version in ("2.9", "1.8", "1.5") for part in ("test/unit", "test/run")]
    assert [(words[1], next(word for word in words if word.startswith("test/"))) for words in runs] == expected
    assert ["--skip-once" in words for words in runs] == [False, False, True, True, True, True]
    assert all(line.endswith("-k x y") for line in said.splitlines() if line.startswith("PYTEST"))
    rows = [re.fullmatch(r"(.*?) +\d+:\d\d  (.*)", line) for line in said.splitlines()[-11:]]
    parts = [f"torch {version}: test/{part}" for version in ("2.9", "1.8", "1.5") for part in ("unit", "run")]
    linters = ["ruff check", "ruff format", "mypy --no-error-summary", "shellcheck -x"]
    assert [row and row[1] for row in rows] == [*linters, *parts, "all"], said
    assert [row[2] for row in rows] == ["passed"] * 4 + ["1 of 9 tests"] * 6 + ["passed"]


@pytest.mark.once
@pytest.mark.parametrize("name", ["./named", "{}/named"])
def test_the_tests_run_with_the_python_that_is_named(clone, tmp_path, name):
    (tmp_path / "named").write_text(TESTED.format(python=sys.executable).replace("2.9", "2.7"))
    (tmp_path / "named").chmod(0o755)
    code, said = run_the_tests(clone, tmp_path, "nohup", PYTHON=name.format(tmp_path))
    assert code == 0 and "PYTEST 2.7 " in said and "PYTEST 2.9 " not in said, said


@pytest.mark.once
@pytest.mark.parametrize("env, parts", [({"STUB_FAILS": "test/unit"}, 3), ({"MYPY_FAILS": "1"}, 0)])
def test_a_failure_of_one_part_is_named_at_the_end_and_the_others_run(clone, tmp_path, env, parts):
    code, said = run_the_tests(clone, tmp_path, "nohup", **env)
    end = said[said.rindex("1 of 9 tests\n\n") :]  # after the last part
    assert code == 1 and said.count("PYTEST") == 6
    assert len(re.findall(r"^FAILED test/x.py::test_y .*\(torch [\d.]+\)$", said, re.MULTILINE)) == parts, said
    assert re.search(r"^all +\d+:\d\d  FAILED$", end, re.MULTILINE), said


@pytest.mark.once
def test_files_that_are_named_are_the_only_part(clone, tmp_path):
    code, said = run_the_tests(clone, tmp_path, "nohup", "test/run/test_main.py::test_x")
    assert code == 0 and said.count("PYTEST") == 3 and "torch 2.9: as given" in said, said
