#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Tests multi-node training on one host: each node is a network namespace with its own address. Takes some minutes and
# needs root. The Slurm part also needs Slurm's daemons (on Debian: slurm-wlm). Parts that cannot run here are skipped.
# Prints a table at the end and exits with code 1 if something failed.
#   bash test/faults/cluster.sh [nodes | torchrun | elastic | faults | slurm]...
# The model is VGG16 with fully connected layers of width 64; WIDTH=4096 is the real one, at 4 GB of memory per process.
set -euo pipefail
test_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
repository=$(dirname "$test_dir")
# shellcheck source-path=SCRIPTDIR source=../setup.sh
source "$test_dir/setup.sh"
scratch=$(mktemp -d)
clone=$scratch/clone # a copy of the program: full training leaves its checkpoints in the repository's folder
net=vgg$$ addresses=() table=() code=0 daemons=()

# --- nodes ------------------------------------------------------------------------------------------------------------

namespaces() { # arguments of namespaces.py, which needs no more than the standard library
    "${PYTHON:-python3}" "$test_dir/helpers/namespaces.py" "$@"
}

clean_up() {
    namespaces down "$net" || true
    if [ "${#daemons[@]}" -gt 0 ]; then
        scancel --user="$(id -un)" 2>/dev/null || true
        kill "${daemons[@]}" 2>/dev/null || true
    fi
    wait
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 1' INT TERM

# --- results ----------------------------------------------------------------------------------------------------------

check() { # what is expected, command that succeeds if it is so
    local result=passed
    if ! "${@:2}"; then
        result=FAILED
        code=1
    fi
    echo "=> $1: $result"
    table+=("$result  $1")
}

skip() { # what, why
    echo "=> $1: skipped, $2"
    table+=("skipped  $1: $2")
}

# --- running ----------------------------------------------------------------------------------------------------------

# Runs a script of test/ on one node, pinned to one core so that each process computes with one thread on any number of
# nodes. Writes to the folder NAME: out.NODE with the script's output folder, printed.NODE with what it printed, and
# code.NODE with its exit code.
run_on_node() { # name, node, script, options
    local folder=$scratch/$1 code=0
    mkdir -p "$folder"
    namespaces run "$net" "$2" taskset -c "$(($2 % $(nproc)))" bash "$clone/test/$3.sh" --data_path="$scratch/data" \
        --device=cpu --workers=0 --output="$folder/out.$2" "${@:4}" >"$folder/printed.$2" 2>&1 || code=$?
    echo "$code" >"$folder/code.$2"
}

# One process on a node of a job.
run_node_of_job() { # name, node, number of nodes, script, options
    run_on_node "$1" "$2" "$4" --device_list=0 --nnodes="$3" --node_rank="$2" --local_addr="${addresses[$2]}" \
        --master_addr="${addresses[0]}" "${@:5}"
}

start_job() { # name, number of nodes, script, options: the same command on each node, in the background
    local node
    for ((node = 0; node < $2; node++)); do
        run_node_of_job "$1" "$node" "${@:2}" &
    done
}

exited_with() { # name, expected exit code on every node
    local file
    for file in "$scratch/$1"/code.*; do
        if [ "$(cat "$file")" != "$2" ]; then
            echo "$1: exit code $(cat "$file") in $file, expected $2" >&2
            tail -n 20 "${file/code./printed.}" >&2
            return 1
        fi
    done
}

log_of() { # name, node
    echo "$scratch/$1/out.$2/train_0.log"
}

case_log_value() { # name, node, key of CASE.log
    sed -n "s/^$3 = //p" "$scratch/$1/out.$2"/Vgg16_*.log
}

accuracies() { # name, node: one line per validation
    sed -n 's/.*\[AVG-ACC\] \* //p' "$(log_of "$1" "$2")"
}

# The SHA-256 of all weights and momentum buffers in a checkpoint.
checksum_weights() { # name
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$python" - "$scratch/$1/out.0/checkpoint.pth.tar" <<'PYTHON'
import hashlib
import sys

import torch

checksum = hashlib.sha256()


def add(value):
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            checksum.update(str(key).encode())
            add(value[key])
    elif isinstance(value, torch.Tensor):
        checksum.update(value.contiguous().view(-1).numpy().tobytes())
    elif isinstance(value, list):
        for item in value:
            add(item)


checkpoint = torch.load(sys.argv[1], map_location="cpu")
add([checkpoint["state_dict"], checkpoint["optimizer"]])
print(checksum.hexdigest())
PYTHON
}

same_weights() { # name, name
    local first second
    first=$(checksum_weights "$1")
    second=$(checksum_weights "$2")
    [ "$first" = "$second" ]
}

same_accuracies() { # name, name
    [ -n "$(accuracies "$1" 0)" ] && [ "$(accuracies "$1" 0)" = "$(accuracies "$2" 0)" ]
}

wait_for() { # seconds, command: until it succeeds
    local deadline=$((SECONDS + $1))
    until "${@:2}" 2>/dev/null; do
        if [ "$SECONDS" -ge "$deadline" ]; then return 1; fi
        sleep 0.2
    done
}

remove_checkpoints() { # name; those of the real VGG16 take 3 GB per run
    rm -f "$scratch/$1"/out.*/*.pth.tar* "$clone"/*.pth.tar*
}

# Copies the program and makes a dataset in the format of CIFAR-10, with 12 training and 37 validation images.
prepare() {
    mkdir -p "$scratch/data" "$clone/test"
    cp -r "$repository"/{main,vgg,predict,export}.py "$repository/engine" "$repository/data" "$clone"
    sed -i "s/4096/${WIDTH:-64}/g" "$clone/vgg.py"
    cp -r "$test_dir"/*.sh "$test_dir/slurm" "$clone/test"
    "$python" - "$scratch/data" <<'PYTHON'
import os
import sys

import numpy as np

counts = {f"data_batch_{number}.bin": (number + 8) // 4 for number in range(1, 6)}
rng = np.random.RandomState(0)
for name, count in {**counts, "test_batch.bin": 37}.items():
    labels = rng.randint(0, 10, (count, 1)).astype(np.uint8)
    pixels = rng.randint(0, 256, (count, 3072)).astype(np.uint8)
    np.concatenate([labels, pixels], 1).tofile(os.path.join(sys.argv[1], name))
PYTHON
}

# --- parts ------------------------------------------------------------------------------------------------------------

try_nodes() {
    run_on_node one 0 train_full_8p --device_list=0,1 --batch_size=4 --epochs=6
    start_job two 2 train_full_multinodes --batch_size=2 --epochs=6
    wait
    check "two nodes exit with code 0, as one node does" both_exit_with_0
    check "two nodes: Acc@1 of every epoch equals that of one node with two processes" same_accuracies one two
    check "two nodes: weights and momentum are bitwise those of one node with two processes" same_weights one two
    check "two nodes: CASE.log on each, with the same metrics of the whole job" same_metrics
    check "two nodes: checkpoints on node 0 alone" checkpoints_on_node_0
    run_on_node evaluated 0 train_eval_8p --device_list=0 --batch_size=7 \
        --resume="$scratch/two/out.0/checkpoint.pth.tar"
    check "two nodes: the evaluation of their checkpoint by one process gives the same Acc@1" same_final_accuracy
    remove_checkpoints two

    run_on_node one3 0 train_performance_8p --device_list=0,1,2 --batch_size=6
    start_job three 3 train_performance_multinodes --batch_size=2
    wait
    check "three nodes exit with code 0" exited_with three 0
    check "three nodes: weights and momentum are bitwise those of one node with three processes" same_three
    remove_checkpoints one3
    remove_checkpoints three
}

both_exit_with_0() { exited_with one 0 && exited_with two 0; }

same_metrics() {
    local node
    for node in 0 1; do
        [ "$(case_log_value two "$node" ActualFPS)" = "$(case_log_value two 0 ActualFPS)" ] || return 1
        [ "$(case_log_value two "$node" RankSize)" = 1 ] || return 1
        [ "$(case_log_value two "$node" TrainAccuracy)" = "$(case_log_value one 0 TrainAccuracy)" ] || return 1
        [ "$(grep -c 'FPS@all' "$(log_of two "$node")")" = 6 ] || return 1
    done
}

checkpoints_on_node_0() {
    [ -f "$scratch/two/out.0/model_best.pth.tar" ] && ! compgen -G "$scratch/two/out.1/*.pth.tar*" >/dev/null
}

same_final_accuracy() {
    exited_with evaluated 0 && [ "$(accuracies evaluated 0)" = "$(accuracies two 0 | tail -n 1)" ]
}

same_three() { exited_with one3 0 && same_accuracies one3 three && same_weights one3 three; }

try_torchrun() {
    local options=(train_full_multinodes --batch_size=2 --epochs=6 --launcher=torchrun)
    if [ ! -f "$scratch/one/out.0/checkpoint.pth.tar" ]; then
        run_on_node one 0 train_full_8p --device_list=0,1 --batch_size=4 --epochs=6
    fi
    start_job elastic 2 "${options[@]}"
    if wait_for 180 [ -f "$scratch/elastic/out.0/checkpoint.pth.tar" ]; then
        namespaces kill "$net" 1
        run_node_of_job elastic 1 2 "${options[@]}" &
    fi
    wait
    check "torchrun: one node is killed and started again, and both exit with code 0" exited_with elastic 0
    check "torchrun: they resume from the checkpoint" grep -q 'resuming from' "$(log_of elastic 0)"
    check "torchrun: weights and momentum are bitwise those of an undisturbed run" same_weights one elastic
    remove_checkpoints elastic
    remove_checkpoints one
}

# A job of two or three nodes: one is disconnected, two go on, it returns, three go on.
try_elastic() {
    local options=(train_full_multinodes --batch_size=2 --epochs=200 --launcher=torchrun --nnodes=2:3) log begin
    log=$(log_of resized 0)
    start_job resized 3 "${options[@]}"
    wait_for 180 grep -q '^Epoch: \[5\]' "$log" || true
    begin=$SECONDS
    namespaces disconnect "$net" 2
    wait_for 240 grep -q 'resized to 2 nodes' "$log" || true
    check "elastic: two nodes go on without the third, after $((SECONDS - begin)) s" grep -q 'resized to 2 nodes' "$log"
    wait_for 60 goes_on_after 'resized to 2 nodes' || true
    namespaces kill "$net" 2
    namespaces connect "$net" 2
    begin=$SECONDS
    run_node_of_job resized 2 3 "${options[@]}" &
    wait_for 240 returned || true
    check "elastic: the third returns and three go on, after $((SECONDS - begin)) s" returned
    wait
    check "elastic: all nodes exit with code 0" exited_with resized 0
    check "elastic: every epoch is there, each validation image counted once" every_epoch_counted
    remove_checkpoints resized
}

goes_on_after() { # text of a line of the log: a validation comes after it
    sed "1,/$1/d" "$(log_of resized 0)" | grep -q 'AVG-ACC'
}

returned() { sed '1,/resized to 2 nodes/d' "$(log_of resized 0)" | grep -q '=> vgg16 on 3 × cpu'; }

every_epoch_counted() {
    "$python" - "$scratch/resized/out.0/metrics.jsonl" <<'PYTHON'
import json
import sys

validations, epochs = {}, {}
for line in open(sys.argv[1]):
    record = json.loads(line)
    if record["event"] == "validate":
        validations[record["epoch"]] = record
    elif record["event"] == "epoch":
        epochs[record["epoch"]] = record
print("   loss by epoch:", " ".join(f"{epochs[epoch]['loss']:.3f}" for epoch in sorted(epochs)[::20]))
assert sorted(validations) == list(range(200)), sorted(validations)
assert len(epochs) >= 198, sorted(epochs)  # an epoch may end at a resize: fewer images are left than a step takes
assert all(record["samples"] == 37 for record in validations.values())
PYTHON
}

try_faults() {
    local begin=$SECONDS node
    run_on_node alone 2 train_full_multinodes --device_list=0 --batch_size=2 --nnodes=2 --node_rank=1 \
        --local_addr="${addresses[2]}" --master_addr=10.77.0.99 --rendezvous_timeout=20 &
    start_job cut 2 train_full_multinodes --batch_size=2
    wait_for 90 [ -f "$scratch/alone/code.2" ] || true
    check "no node 0: exit code 2 and one line, after $((SECONDS - begin)) s" refused_in_time "$((SECONDS - begin))"
    wait_for 180 grep -q '^Epoch' "$(log_of cut 0)" || true
    begin=$SECONDS
    namespaces disconnect "$net" 1
    wait_for 90 both_exited || true
    check "a node is disconnected: both exit with code 1, after $((SECONDS - begin)) s" \
        lost_in_time "$((SECONDS - begin))"
    namespaces kill "$net" 0
    namespaces kill "$net" 1
    wait
    namespaces connect "$net" 1

    begin=$SECONDS
    run_node_of_job wrong 1 2 train_full_multinodes --batch_size=2 --node_rank=2
    check "a rank that is too high: exit code 2 and one line, after $((SECONDS - begin)) s" \
        refused wrong 1 '--rank 2 does not fit --world-size 2'
    begin=$SECONDS
    for node in 0 1; do
        run_node_of_job double "$node" 2 train_full_multinodes --batch_size=2 --node_rank=0 &
    done
    wait
    check "two nodes of the same rank: exit code 2 and one line on each, after $((SECONDS - begin)) s" both_refused
}

both_exited() { [ -f "$scratch/cut/code.0" ] && [ -f "$scratch/cut/code.1" ]; }

lost_in_time() { # seconds
    [ "$1" -lt 60 ] && both_exited && exited_with cut 1 && one_error cut 0 'rank 1 is unreachable' &&
        one_error cut 1 'rank 0 is unreachable'
}

one_error() { # name, node, text of the only error line
    [ "$(grep -c 'error' "$(log_of "$1" "$2")")" = 1 ] && grep -q "main.py: error: .*$3" "$(log_of "$1" "$2")"
}

refused() { # name, node, text of the only error line
    [ "$(cat "$scratch/$1/code.$2")" = 2 ] && one_error "$@"
}

refused_in_time() { [ "$1" -lt 60 ] && refused alone 2 'rendezvous failed'; } # seconds

both_refused() { refused double 0 'two processes are rank 0' && refused double 1 'two processes are rank 0'; }

# Starts munged, slurmctld and slurmd as a cluster of this host alone, without systemd.
start_slurm() {
    local folder=$scratch/slurm ports
    mkdir -p "$folder/state" "$folder/spool"
    chmod 755 "$scratch"
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 400 "$folder/munge.key"
    read -r -a ports <<<"$(free_ports)"
    export SLURM_CONF=$folder/slurm.conf
    cat >"$SLURM_CONF" <<CONF
ClusterName=try
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket=$folder/munge.socket
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SchedulerParameters=bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
CONF
    munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" \
        >"$folder/munged" 2>&1 &
    daemons+=($!)
    wait_for 20 [ -S "$folder/munge.socket" ]
    slurmctld -D >"$folder/slurmctld" 2>&1 &
    daemons+=($!)
    slurmd -D >"$folder/slurmd" 2>&1 &
    daemons+=($!)
    wait_for 30 node_is_idle
}

# Two free TCP ports, separated by a space.
free_ports() {
    "$python" - <<'PYTHON'
import socket

sockets = [socket.socket() for _ in range(2)]
for each in sockets:
    each.bind(("", 0))
print(*[each.getsockname()[1] for each in sockets])
PYTHON
}

node_is_idle() { [ "$(sinfo -h -o %T -p low)" = idle ]; }

try_slurm() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        if ! command -v "$program" >/dev/null; then
            skip slurm "requires $program (on Debian: apt-get install slurm-wlm)"
            return
        fi
    done
    if [ "$(id -u)" != 0 ] || [ "$(nproc)" -lt 2 ]; then
        skip slurm "requires root and two cores"
        return
    fi
    if ! start_slurm; then
        skip slurm "its daemons do not start"
        return
    fi
    local log=$scratch/slurm/log job
    local flags=(--device cpu --device-list '0,1' --arch vgg11 -b 8 --epochs 1 --lr 0.01 --warmup-epochs 0
        --stop-step-num 90 -p 1)
    cd "$clone"
    job=$(sbatch --parsable --partition=low --ntasks-per-node=2 --output="$log" test/slurm/train.sbatch "${flags[@]}" \
        --output-dir "$scratch/slurm/job")
    wait_for 120 grep -q '^Epoch' "$log" || true
    sbatch --partition=high --ntasks="$(nproc)" --output="$scratch/slurm/high" --wrap 'echo ran' >/dev/null
    wait_for 240 job_ended "$job" || true
    check "Slurm: a job is preempted, saves, is requeued, resumes and completes" preempted_and_completed "$job"
    # shellcheck disable=SC2016 # the task expands the variable
    printf '#!/bin/sh\nif [ "$SLURM_PROCID" = 1 ]; then sleep 40; fi\nexec "%s" "$@"\n' "$python" >"$scratch/late python"
    chmod +x "$scratch/late python"
    job=$(PYTHON="$scratch/late python" sbatch --parsable --partition=low --ntasks-per-node=2 --output="$log.late" \
        test/slurm/train.sbatch "${flags[@]}" --stop-step-num 5 --output-dir "$scratch/slurm/late")
    wait_for 240 job_ended "$job" || true
    check "Slurm: a task that is 40 s late is waited for" late_and_completed "$job"
    job=$(sbatch --parsable --partition=low --ntasks-per-node=2 --output="$log.cancelled" test/slurm/train.sbatch \
        "${flags[@]}" --stop-step-num 900 --output-dir "$scratch/slurm/cancelled")
    wait_for 120 grep -q '^Epoch' "$log.cancelled" || true
    scancel "$job"
    wait_for 60 grep -q 'checkpoint saved' "$log.cancelled" || true
    sleep 10
    check "Slurm: a job that is cancelled saves and is not requeued" cancelled "$job"
    if [ "$code" != 0 ]; then
        scontrol show job "$job" >&2
        tail -n 20 "$log" "$log.late" "$log.cancelled" >&2
    fi
}

late_and_completed() { # job
    scontrol show job "$1" | grep -q 'JobState=COMPLETED' && grep -q '=> waiting for .*rank 1 of node .* has not joined' "$scratch/slurm/log.late" &&
        grep -q '^Epoch: \[0\]\[ *5/' "$scratch/slurm/log.late"
}

cancelled() { # job
    scontrol show job "$1" | grep -q 'JobState=CANCELLED' && scontrol show job "$1" | grep -q 'Restarts=0' &&
        grep -q 'checkpoint saved' "$scratch/slurm/log.cancelled"
}

job_ended() { scontrol show job "$1" | grep -q 'JobState=\(COMPLETED\|FAILED\|CANCELLED\)'; } # job

preempted_and_completed() { # job
    local log=$scratch/slurm/log
    scontrol show job "$1" | grep -q 'JobState=COMPLETED' && scontrol show job "$1" | grep -q 'Restarts=1' &&
        [ "$(cat "$scratch/slurm/high")" = ran ] && grep -q 'Exited with exit code 75' "$log" &&
        grep -q 'resuming from' "$log" && [ "$(grep -c '^Epoch: \[0\]\[ 90/' "$log")" = 1 ]
}

# --- from start to end ------------------------------------------------------------------------------------------------

parts=("$@")
if [ "${#parts[@]}" = 0 ]; then parts=(nodes torchrun elastic faults slurm); fi
for part in "${parts[@]}"; do
    case $part in
        nodes | torchrun | elastic | faults | slurm) ;;
        *)
            echo "cluster.sh: error: unknown part $part; expected nodes, torchrun, elastic, faults or slurm" >&2
            exit 2
            ;;
    esac
done

possible=("${parts[@]}")
if [ "${parts[*]}" != slurm ]; then
    if printed=$(namespaces up "$net" 3 2>&1); then
        mapfile -t addresses <<<"$printed"
    else
        possible=()
        for part in "${parts[@]}"; do
            if [ "$part" = slurm ]; then
                possible+=(slurm)
            else
                skip "$part" "network namespaces are not available (${printed#namespaces.py: error: })"
            fi
        done
    fi
fi
if [ "${#possible[@]}" -gt 0 ]; then
    set_up_python 3 "the fault tests"
    export PYTHON=$python
    prepare
    for part in "${possible[@]}"; do "try_$part"; done
fi

echo
printf '%s\n' "${table[@]}"
[ "$code" = 0 ]
