#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Several machines, tried on one: each is a network namespace with an address of its own, on a bridge between them. Needs
# root; the part on Slurm needs Debian's slurm-wlm or the like. What cannot be tried here is skipped by name. Ends with a
# table, after some minutes.
#   bash test/cluster.sh [nodes | torchrun | faults | slurm]...
# The model is VGG16 with fully connected layers 64 wide; WIDTH=4096 tries the real one, at 4 GB of memory a process.
set -euo pipefail
test_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$test_dir")
# shellcheck source=test/setup.sh
source "$test_dir/setup.sh"
if [ -n "${PYTHON:-}" ]; then python=$PYTHON; else set_up_python; fi
export PYTHON=$python
scratch=$(mktemp -d)
clone=$scratch/clone # a whole training leaves its checkpoints in the repository's folder
net=vgg$$ table=() code=0 daemons=()

# --- the machines -----------------------------------------------------------------------------------------------------

make_machines() { # count
    local number
    ip netns add "${net}switch"
    ip -n "${net}switch" link add bridge0 type bridge
    ip -n "${net}switch" link set bridge0 up
    for ((number = 0; number < $1; number++)); do
        ip netns add "$net$number"
        ip -n "${net}switch" link add "port$number" type veth peer name eth0 netns "$net$number"
        ip -n "${net}switch" link set "port$number" master bridge0 up
        ip -n "$net$number" address add "$(address "$number")/24" dev eth0
        ip -n "$net$number" link set eth0 up
        ip -n "$net$number" link set lo up
    done
}

address() { # machine
    echo "10.77.0.$(($1 + 1))"
}

switch_off() { # machine: as a power cut, for its processes
    local pids
    pids=$(ip netns pids "$net$1")
    if [ -n "$pids" ]; then kill -KILL $pids 2>/dev/null || true; fi
}

clean_up() {
    local name
    for name in $(ip netns list 2>/dev/null | awk -v net="$net" 'index($1, net) == 1 { print $1 }'); do
        switch_off "${name#"$net"}"
        ip netns del "$name"
    done
    if [ ${#daemons[@]} -gt 0 ]; then
        scancel --user="$(id -un)" 2>/dev/null || true
        kill "${daemons[@]}" 2>/dev/null || true
    fi
    wait
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 1' INT TERM

# --- telling ----------------------------------------------------------------------------------------------------------

show() { # what, command that answers whether it is so
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

# A script of test/ on one machine, pinned to one core, so that each process computes with one thread wherever it runs.
# Its output goes to NAME/out.MACHINE and NAME/said.MACHINE, its exit code to NAME/code.MACHINE.
on_machine() { # name, machine, script, options
    local folder=$scratch/$1 code=0
    mkdir -p "$folder"
    ip netns exec "$net$2" taskset -c "$(($2 % $(nproc)))" bash "$clone/test/$3.sh" --data_path="$scratch/data" --device=cpu \
        --workers=0 --output="$folder/out.$2" "${@:4}" >"$folder/said.$2" 2>&1 || code=$?
    echo "$code" >"$folder/code.$2"
}

on_machines() { # name, count, script, options: the same command on each
    local number
    for ((number = 0; number < $2; number++)); do
        on_machine "$1" "$number" "$3" --device_list=0 --nnodes="$2" --node_rank="$number" \
            --local_addr="$(address "$number")" --master_addr="$(address 0)" "${@:4}" &
    done
}

ended() { # name, expected exit code on every machine
    local file
    for file in "$scratch/$1"/code.*; do
        if [ "$(cat "$file")" != "$2" ]; then
            echo "$1: exit code $(cat "$file") in $file, expected $2" >&2
            tail -n 20 "${file/code./said.}" >&2
            return 1
        fi
    done
}

log_of() { # name, machine
    echo "$scratch/$1/out.$2/train_0.log"
}

figure() { # name, machine, key of CASE.log
    sed -n "s/^$3 = //p" "$scratch/$1/out.$2"/Vgg16_*.log
}

accuracy() { # name, machine
    sed -n 's/.*\[AVG-ACC\] \* //p' "$(log_of "$1" "$2")"
}

# The digest of all weights and momenta of a checkpoint.
weights() { # name
    "$python" - "$scratch/$1/out.0/checkpoint.pth.tar" <<'PYTHON'
import hashlib, sys, torch
digest = hashlib.sha256()
def add(value):
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            add(value[key])
    elif isinstance(value, torch.Tensor):
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, list):
        for entry in value:
            add(entry)
state = torch.load(sys.argv[1], map_location='cpu')
add([state['state_dict'], state['optimizer']])
print(digest.hexdigest())
PYTHON
}

same_weights() { # name, name
    local first second
    first=$(weights "$1")
    second=$(weights "$2")
    [ "$first" = "$second" ]
}

same_accuracy() { # name, name: of every validation
    [ -n "$(accuracy "$1" 0)" ] && [ "$(accuracy "$1" 0)" = "$(accuracy "$2" 0)" ]
}

wait_for() { # seconds, command: until it succeeds
    local deadline=$((SECONDS + $1))
    until "${@:2}" 2>/dev/null; do
        if [ $SECONDS -ge $deadline ]; then return 1; fi
        sleep 0.2
    done
}

forget() { # name: the checkpoints, of the real VGG16 3 GB a run
    rm -f "$scratch/$1"/out.*/*.pth.tar* "$clone"/*.pth.tar*
}

# CIFAR-10's format, with 12 pictures to train on and 37 to validate on.
make_data() {
    mkdir -p "$scratch/data" "$clone/test"
    cp -r "$repository"/*.py "$repository/data" "$clone"
    sed -i "s/4096/${WIDTH:-64}/g" "$clone/vgg.py"
    cp -r "$test_dir"/*.sh "$test_dir/slurm" "$clone/test"
    "$python" - "$scratch/data" <<'PYTHON'
import os, sys, numpy as np
rng = np.random.RandomState(0)
for name, count in [('data_batch_{}.bin'.format(n), (n + 8) // 4) for n in range(1, 6)] + [('test_batch.bin', 37)]:
    labels = rng.randint(0, 10, (count, 1)).astype(np.uint8)
    pixels = rng.randint(0, 256, (count, 3072)).astype(np.uint8)
    np.concatenate([labels, pixels], 1).tofile(os.path.join(sys.argv[1], name))
PYTHON
}

# --- what is tried ----------------------------------------------------------------------------------------------------

try_nodes() {
    local one=(--batch_size=4 --epochs=6) each=(--batch_size=2 --epochs=6)
    on_machine one 0 train_full_8p --device_list=0,1 "${one[@]}"
    on_machines two 2 train_full_multinodes "${each[@]}"
    wait
    show "two machines end with 0, as one does" both_end_with_0
    show "two machines: Acc@1 of every epoch is that of one machine with two processes" same_accuracy one two
    show "two machines: weights and momenta are bitwise those of one machine with two processes" same_weights one two
    show "two machines: CASE.log on each, with the same figure of the whole job" same_figures
    show "two machines: checkpoints on machine 0 alone" checkpoints_on_machine_0
    on_machine evaluated 0 train_eval_8p --device_list=0 --batch_size=7 --resume="$scratch/two/out.0/checkpoint.pth.tar"
    show "two machines: one process that evaluates their checkpoint counts the same Acc@1" last_accuracy_again
    forget two

    on_machine one3 0 train_performance_8p --device_list=0,1,2 --batch_size=6
    on_machines three 3 train_performance_multinodes --batch_size=2
    wait
    show "three machines end with 0" ended three 0
    show "three machines: Acc@1, weights and momenta are bitwise those of one machine with three processes" same_three
    forget one3
    forget three
}

both_end_with_0() { ended one 0 && ended two 0; }

same_figures() {
    local machine
    for machine in 0 1; do
        [ "$(figure two $machine ActualFPS)" = "$(figure two 0 ActualFPS)" ] && [ "$(figure two $machine RankSize)" = 2 ] &&
            [ "$(figure two $machine TrainAccuracy)" = "$(figure one 0 TrainAccuracy)" ] || return 1
        [ "$(grep -c 'FPS@all' "$(log_of two $machine)")" = 6 ] || return 1
    done
}

checkpoints_on_machine_0() {
    [ -f "$scratch/two/out.0/model_best.pth.tar" ] && ! compgen -G "$scratch/two/out.1/*.pth.tar*" >/dev/null
}

last_accuracy_again() { ended evaluated 0 && [ "$(accuracy evaluated 0)" = "$(accuracy two 0 | tail -n 1)" ]; }

same_three() { same_accuracy one3 three && same_weights one3 three; }

try_torchrun() {
    local each=(--batch_size=2 --epochs=6 --launcher=torchrun)
    if [ ! -f "$scratch/one/out.0/checkpoint.pth.tar" ]; then
        on_machine one 0 train_full_8p --device_list=0,1 --batch_size=4 --epochs=6
    fi
    on_machines elastic 2 train_full_multinodes "${each[@]}"
    if wait_for 180 [ -f "$scratch/elastic/out.0/checkpoint.pth.tar" ]; then
        switch_off 1
        on_machine elastic 1 train_full_multinodes --device_list=0 --nnodes=2 --node_rank=1 --local_addr="$(address 1)" \
            --master_addr="$(address 0)" "${each[@]}" &
    fi
    wait
    show "torchrun: a machine is switched off and brought back, and both end with 0" ended elastic 0
    show "torchrun: they went on from the checkpoint" grep -q 'resuming from' "$(log_of elastic 0)"
    show "torchrun: weights and momenta are bitwise those of a run that was never disturbed" same_weights one elastic
    forget elastic
    forget one
}

try_faults() {
    local begin=$SECONDS
    on_machine alone 2 train_full_multinodes --device_list=0 --batch_size=2 --nnodes=2 --node_rank=1 \
        --local_addr="$(address 2)" --master_addr=10.77.0.99 &
    on_machines cut 2 train_full_multinodes --batch_size=2
    wait_for 90 [ -f "$scratch/alone/code.2" ] || true
    show "no master: exit code 2 and one line, after $((SECONDS - begin)) s" refused_in_time $((SECONDS - begin))
    wait_for 180 grep -q '^Epoch' "$(log_of cut 0)" || true
    begin=$SECONDS
    ip -n "${net}switch" link set port1 down
    wait_for 90 both_have_ended || true
    show "a machine is cut off: both end with 1, after $((SECONDS - begin)) s" ended_in_time cut 1 $((SECONDS - begin))
    switch_off 0
    switch_off 1
    wait
    ip -n "${net}switch" link set port1 up

    begin=$SECONDS
    on_machine wrong 1 train_full_multinodes --device_list=0 --batch_size=2 --nnodes=2 --node_rank=2 \
        --local_addr="$(address 1)" --master_addr="$(address 0)"
    show "a rank that does not fit: exit code 2 and one line, after $((SECONDS - begin)) s" refused wrong 1 'does not fit'
    begin=$SECONDS
    for number in 0 1; do
        on_machine double $number train_full_multinodes --device_list=0 --batch_size=2 --nnodes=2 --node_rank=0 \
            --local_addr="$(address $number)" --master_addr="$(address 0)" &
    done
    wait
    show "two machines of the same rank: exit code 2 and one line on each, after $((SECONDS - begin)) s" both_refused
}

both_have_ended() { [ -f "$scratch/cut/code.0" ] && [ -f "$scratch/cut/code.1" ]; }

ended_in_time() { [ "$3" -lt 60 ] && both_have_ended && ended "$1" "$2"; }

refused() { # name, machine, what main.py's line says
    [ "$(cat "$scratch/$1/code.$2")" = 2 ] && [ "$(grep -c 'error' "$(log_of "$1" "$2")")" = 1 ] &&
        grep -q "main.py: error: .*$3" "$(log_of "$1" "$2")"
}

refused_in_time() { [ "$1" -lt 60 ] && refused alone 2 'cannot meet'; } # seconds

both_refused() { refused double 0 'two processes are rank 0' && refused double 1 'two processes are rank 0'; }

# Debian's slurm-wlm as a cluster of this machine alone, without systemd: munged, slurmctld and slurmd of our own.
start_slurm() {
    local folder=$scratch/slurm ports
    mkdir -p "$folder/state" "$folder/spool"
    chmod 755 "$scratch"
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 400 "$folder/munge.key"
    read -r -a ports <<<"$("$python" -c 'import socket
sockets = [socket.socket() for _ in range(2)]
for each in sockets: each.bind(("", 0))
print(*[each.getsockname()[1] for each in sockets])')"
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
        --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" >"$folder/munged" 2>&1 &
    daemons+=($!)
    wait_for 20 [ -S "$folder/munge.socket" ]
    slurmctld -D >"$folder/slurmctld" 2>&1 &
    daemons+=($!)
    slurmd -D >"$folder/slurmd" 2>&1 &
    daemons+=($!)
    wait_for 30 node_is_idle
}

node_is_idle() { [ "$(sinfo -h -o %T -p low)" = idle ]; }

try_slurm() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        if ! command -v "$program" >/dev/null; then
            skip "Slurm" "there is no $program here (Debian: apt-get install slurm-wlm)"
            return
        fi
    done
    if [ "$(id -u)" != 0 ] || [ "$(nproc)" -lt 2 ]; then
        skip "Slurm" "its daemons need root here, and the job two cores"
        return
    fi
    if ! start_slurm; then
        skip "Slurm" "its daemons do not start here"
        return
    fi
    local log=$scratch/slurm/log job
    local flags=(--device cpu --device-list '0,1' --arch vgg11 -b 8 --epochs 1 --stop-step-num 90 -p 1)
    cd "$clone"
    job=$(sbatch --parsable --partition=low --ntasks-per-node=2 --output="$log" test/slurm/train.sbatch "${flags[@]}" \
        --output-dir "$scratch/slurm/job")
    wait_for 120 grep -q '^Epoch' "$log" || true
    sbatch --partition=high --ntasks="$(nproc)" --output="$scratch/slurm/high" --wrap 'echo ran' >/dev/null
    wait_for 240 job_is_over "$job" || true
    show "Slurm: a job is preempted, saves, is requeued, goes on and completes" preempted_and_completed "$job"
    if [ $code != 0 ]; then
        scontrol show job "$job" >&2
        tail -n 20 "$log" >&2
    fi
}

job_is_over() { scontrol show job "$1" | grep -q 'JobState=\(COMPLETED\|FAILED\|CANCELLED\)'; } # job

preempted_and_completed() { # job
    local log=$scratch/slurm/log
    scontrol show job "$1" | grep -q 'JobState=COMPLETED' && scontrol show job "$1" | grep -q 'Restarts=1' &&
        [ "$(cat "$scratch/slurm/high")" = ran ] && grep -q 'Exited with exit code 75' "$log" &&
        grep -q 'resuming from' "$log" && [ "$(grep -c '^Epoch: \[0\]\[ 90/' "$log")" = 1 ]
}

# --- from start to end ------------------------------------------------------------------------------------------------

parts=("$@")
if [ ${#parts[@]} = 0 ]; then parts=(nodes torchrun faults slurm); fi
make_data
if [[ " ${parts[*]} " =~ ' nodes '|' torchrun '|' faults ' ]] && ! make_machines 3 2>/dev/null; then
    skip "machines in network namespaces" "they cannot be made here (ip netns, as root)"
    clean_up_machines
    parts=(slurm)
fi
for part in "${parts[@]}"; do "try_$part"; done

echo
printf '%s\n' "${table[@]}"
exit $code
