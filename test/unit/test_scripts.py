# SPDX-License-Identifier: BSD-3-Clause
"""The scripts in test/, run as a user runs them: most with a stub in place of python, two with the real program."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys

from helpers.images import write_cifar10
from helpers.program import REPOSITORY, run

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
for step, loss in ((1, '6.8921'), (10, '5.5000')):
    print('Epoch: [0][%2d/20]\\tTime  0.251 ( 0.249)\\tData  0.001 ( 0.002)\\tLoss %s (6.9012)\\t' % (step, loss)
          + 'Acc@1   0.39 (  0.21)\\tAcc@5   1.17 (  0.86)')
print('[npu id: 0 ] * FPS@all 1024.020')
if '--stop-step-num' not in sys.argv:
    print('[npu id: 0 ] [AVG-ACC] * Acc@1 73.385 Acc@5 91.337')
output = sys.argv[sys.argv.index('--output-dir') + 1]
open(os.path.join(output, 'model_best.pth.tar'), 'w').write('weights')
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_prints_and_writes_the_references_metrics(clone, tmp_path, name):
    (clone / "model_best.pth.tar").write_text("x")
    (tmp_path / "my data").mkdir()
    result = bash(clone, name, "--data_path=my data", "--device_list=0,1", python=stub(tmp_path), cwd=tmp_path)
    assert result.code == 0, result.err
    last = result.out.splitlines()[
        result.out.splitlines().index("------------------ Final result ------------------") :
    ]
    assert last[1] == "Final Performance images/sec : 1024.020" and last[-1].startswith("E2E Training Duration sec : ")
    performance = "performance" in name
    assert (len(last) == 3) if performance else (last[2] == "Final Train Accuracy : 73.385")
    output = clone / "test" / "output" / "0"
    kind = "perf" if performance else "eval" if "eval" in name else "acc"
    size, cards = ("256", "1p") if name.endswith("1p") else ("2048", "8p")
    case = f"Vgg16_ID1630_for_PyTorch_bs{size}_{cards}_{kind}"
    metrics = dict(line.split(" = ") for line in (output / (case + ".log")).read_text().splitlines())
    expected = {
        "Network": "Vgg16_ID1630_for_PyTorch",
        "RankSize": "1" if cards == "1p" else "2",
        "BatchSize": size,
        "CaseName": case,
        "ActualFPS": "1024.020",
        "ActualLoss": "5.5000",
        "TrainingTime": "250.00" if size == "256" else "1999.96",
    }
    assert all(metrics[key] == value for key, value in expected.items()), metrics
    assert (
        ("TrainAccuracy" in metrics) == (not performance) and "E2ETrainingTime" in metrics and "DeviceType" in metrics
    )
    assert (output / f"train_{case}_loss.txt").read_text() == "6.8921\n5.5000\n"
    flags = (output / "train_0.log").read_text()
    assert "'--data', '{}'".format(tmp_path / "my data") in flags and "'--amp', '--opt-level', 'O1'" in flags
    assert "'--seed', '49'" in flags and "'--lr', '{}'".format("0.01" if cards == "1p" else "0.08") in flags
    assert ("'--loss-scale-value', '1024'" in flags) == (name in ("train_full_8p", "train_full_multinodes"))
    if name == "train_eval_8p":
        assert "'--resume', '{}'".format(clone / "model_best.pth.tar") in flags


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


def test_a_failure_shows_the_log_and_keeps_the_exit_code(clone, tmp_path):
    result = bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path), STUB_FAILS="75")
    assert result.code == 75 and "something broke" in result.err and "Final" not in result.out
    assert "stopped before there was anything to save" in result.err
    says = "=> stopped on a signal after step 3, checkpoint saved"
    result = bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path), STUB_FAILS="75", STUB_SAYS=says)
    assert result.code == 75 and "to continue, add --resume=" in result.err


@pytest.mark.parametrize("option", ["--output-dir=x", "--stop-step-num"])
def test_the_quick_start_refuses_what_would_have_it_evaluate_an_older_run(clone, tmp_path, option):
    result = bash(clone, "quickstart", option, "3", python=stub(tmp_path))
    assert result.code == 2 and len(result.err.splitlines()) == 1 and option in result.err


def test_earlier_output_is_moved_aside_and_its_checkpoint_is_found(clone, tmp_path):
    for _ in range(2):
        assert bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path)).code == 0
    outputs = sorted(os.listdir(str(clone / "test" / "output")))
    assert len(outputs) == 2 and outputs[0] == "0"
    assert (clone / "model_best.pth.tar").read_text() == "weights"
    resume = "test/output/0/model_best.pth.tar"
    assert bash(clone, "train_full_1p", "--data_path=.", "--resume=" + resume, python=stub(tmp_path)).code == 0
    flags = (clone / "test" / "output" / "0" / "train_0.log").read_text()
    moved = flags.split("'--resume', '")[1].split("'")[0]
    assert os.path.exists(moved) and moved.startswith(str(clone / "test" / "output" / "0."))


@pytest.mark.parametrize("used", ["repository", "data", "folder"])
def test_an_output_folder_that_holds_what_is_in_use_is_refused(clone, tmp_path, used):
    data, folder = tmp_path / "data" / "set", tmp_path / "folder" / "below"
    data.mkdir(parents=True)
    folder.mkdir(parents=True)
    output = {"repository": clone, "data": data.parent, "folder": folder.parent}[used]
    result = bash(
        clone, "train_full_1p", f"--data_path={data}", f"--output={output}", python=stub(tmp_path), cwd=folder
    )
    assert result.code == 2 and "must not contain" in result.err and len(result.err.splitlines()) == 1, result.err
    assert clone.exists() and data.exists() and folder.exists()


def test_a_run_that_is_refused_leaves_the_earlier_output_where_it_was(clone, tmp_path):
    python, checkpoint = stub(tmp_path), clone / "test" / "output" / "0" / "model_best.pth.tar"
    assert bash(clone, "train_full_1p", "--data_path=.", python=python).code == 0
    options = ["--data_path=.", f"--resume={checkpoint}"]
    refused = bash(clone, "train_full_1p", *options, python=python, STUB_FAILS="2", STUB_SAYS="main.py: error: wrong")
    assert refused.code == 2 and refused.err.endswith("main.py: error: wrong\n"), refused.err
    assert checkpoint.exists() and os.listdir(str(clone / "test" / "output")) == ["0"]
    assert bash(clone, "train_full_1p", *options, python=python).code == 0


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


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--data_path="],
        ["--data_path=.", "--no_such=1"],
        ["--data_path=.", "--resume="],
        ["--data_path=/no/such"],
        ["--data_path=.", "--nnodes=2"],
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(clone, tmp_path, options):
    result = bash(clone, "train_full_8p", *options, python=stub(tmp_path))
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "error" in result.err


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
        "'is_host=false'",
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


def test_ascend_device_id_picks_the_card(clone, tmp_path):
    assert bash(clone, "train_full_1p", "--data_path=.", python=stub(tmp_path), ASCEND_DEVICE_ID="3").code == 0
    assert "'--gpu', '3'" in (clone / "test" / "output" / "3" / "train_3.log").read_text()


def test_a_signal_to_the_script_reaches_main_py(clone, tmp_path):
    waiting = tmp_path / "waiting python"
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\nwhile True: time.sleep(0.05)\n"
    )
    waiting.write_text(SHEBANG.format(python=sys.executable) + code)
    waiting.chmod(0o755)
    child = subprocess.Popen(
        ["bash", str(clone / "test" / "train_full_1p.sh"), "--data_path=."],
        cwd=str(clone),
        env=dict(os.environ, PYTHON=str(waiting)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "up").exists():
        assert child.poll() is None
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 75


def test_training_and_evaluation_with_the_real_program(clone, tmp_path):
    """train_full_8p.sh and train_eval_8p.sh on two CPU processes: the evaluation repeats the training's accuracy."""
    write_cifar10(tmp_path / "some data", binary=True, count=2)
    common = ["--data_path=some data", "--device=cpu", "--device_list=0,1", "--batch_size=2", "--workers=2"]
    trained = bash(clone, "train_full_8p", *common, "--epochs=1", cwd=tmp_path)
    assert trained.code == 0, trained.err
    evaluated = bash(clone, "train_eval_8p", *common, cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err

    def accuracy(result):
        return [line for line in result.out.splitlines() if "Accuracy" in line]

    assert accuracy(trained) == accuracy(evaluated) != []
