# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
# What the training scripts share: the options, the call of main.py, and the metrics read from its log. To be sourced.
#
# A script sources this file, then sets `kind` (acc, perf, eval), `cards` (1 or 8), `batch_size`, `learning_rate`,
# `epochs` and its own flags of main.py in `recipe`, and calls `run_training "$@"`.

set -euo pipefail
network=Vgg16_ID1630_for_PyTorch
nodes=one
test_dir=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repository=$(dirname "$test_dir")
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$test_dir/setup.sh"

warn() { # message
    echo "$(basename "$0"): warning: $1" >&2
}

usage() {
    cat <<USAGE
usage: bash test/$(basename "$0") --data_path=DIR [options]
  --data_path=DIR        folder with train/ and val/, or CIFAR
  --batch_size=N         images per step on this node             ($batch_size)
  --workers=N            DataLoader workers on this node          (the cores that the processes leave)
  --epochs=N             epochs                                   ($epochs)
  --device=NAME          npu, gpu or cpu                          (the first that works)
  --device_id=N          the card of a one-card run               (ASCEND_DEVICE_ID wins; else 0)
  --device_list=0,1,…    the cards of a run on several            (0 to 7)
  --learning_rate=RATE   peak learning rate                       ($learning_rate)
  --opt_level=O0…O3      mixed precision                          (O1)
  --resume=PATH          checkpoint to continue or evaluate
  --output=DIR           logs, checkpoints, metrics               ($(output_folder))
USAGE
    if [ "$nodes" = many ]; then
        cat <<USAGE
  --nnodes=N             number of nodes; with torchrun also MIN:MAX  (1)
  --node_rank=N          rank of this node, from 0                (0)
  --local_addr=IP        address of this node
  --master_addr=IP       address of node 0                        (this node's first)
  --master_port=N        port of node 0                           (59629)
  --rendezvous_timeout=S seconds to wait for other nodes          (600)
  --launcher=NAME        spawn, or torchrun, which restarts       (spawn)
USAGE
    fi
}

absolute() { # path, relative to the caller's folder; the shell does not expand the ~ of --output=~/x
    case $1 in \~ | \~/*) set -- "${HOME:-}${1#\~}" ;; esac
    realpath -m -- "$1"
}

data_path='' workers='' device='' device_id=0 device_list='' opt_level='' resume='' output='' moved='' stopped=''
nnodes=1 node_rank=0 local_addr='' master_addr='' master_port=59629 rendezvous_timeout=600 launcher=spawn

# The evaluation ignores it, as the reference's does, whose users pass --world_size=.
unknown_option() { # message
    if [ "${kind:?}" != eval ]; then fail "$1; --help lists the options"; fi
    warn "$1, which is ignored; --help lists the options"
}

parse_options() { # the script's arguments
    local option name value
    for option in "$@"; do
        name=${option%%=*}
        value=${option#*=}
        case $option in
            --data_path=*) data_path=$value ;;
            --batch_size=*) batch_size=$value ;;
            --workers=*) workers=$value ;;
            --epochs=*) epochs=$value ;;
            --device=*) device=$value ;;
            --device_id=*) device_id=$value ;;
            --device_list=*) device_list=$value ;;
            --learning_rate=*) learning_rate=$value ;;
            --opt_level=*) opt_level=$value ;;
            --resume=) fail "--resume= is empty; leave it out to start from the beginning" ;;
            --resume=*) resume=$value ;;
            --output=*) output=$value ;;
            -h | --help) usage; exit 0 ;;
            --nnodes=* | --node_rank=* | --local_addr=* | --master_addr=* | --master_port=* | \
                --rendezvous_timeout=* | --launcher=*)
                if [ "$nodes" = many ]; then printf -v "${name#--}" '%s' "$value"
                else unknown_option "$option requires a multi-node script"; fi ;;
            *)
                if [[ $(usage) = *"  $option="* ]]; then fail "write $option=VALUE"; fi
                unknown_option "unknown option $option" ;;
        esac
    done
    [ -n "$data_path" ] || fail "--data_path=DIR is required: a folder with train/ and val/, or CIFAR"
    data_path=$(absolute "$data_path")
    [ -e "$data_path" ] || fail "--data_path=$data_path: no such folder"
    if [ -n "$resume" ]; then resume=$(absolute "$resume"); fi
    if [ "${cards:?}" = 1 ] && [ -n "${ASCEND_DEVICE_ID:-}" ]; then device_id=$ASCEND_DEVICE_ID; fi # as in the reference
    for name in device_id node_rank master_port rendezvous_timeout; do
        [[ ${!name} =~ ^[0-9]+$ ]] || fail "--$name must be a number, got '${!name}'"
    done
    case $launcher in
        spawn) ;;
        torchrun)
            [ -z "$resume" ] || fail "--launcher=torchrun cannot be combined with --resume: it resumes from \
checkpoint.pth.tar in --output; copy the checkpoint there" ;;
        *) fail "--launcher must be spawn or torchrun, got $launcher" ;;
    esac
    if ! [[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then fail "--nnodes: expected N or MIN:MAX, got $nnodes"; fi
    if [ "$nnodes" != "${nnodes#*:}" ]; then
        [ "$launcher" = torchrun ] || fail "--nnodes=$nnodes requires --launcher=torchrun"
        [ "${nnodes%:*}" -le "${nnodes#*:}" ] || fail "--nnodes=$nnodes: MIN must be at most MAX"
    fi
    choose_master
}

# Without --master_addr=, node 0 takes its own first address, as the reference's scripts do.
choose_master() {
    if [ -n "$master_addr" ]; then return; fi
    [ "$node_rank" = 0 ] || fail "--master_addr=IP of node 0 is required on node $node_rank"
    if [ "$nodes" = many ]; then master_addr=$(hostname -I 2>/dev/null | awk '{ print $1 }' || true); fi
    master_addr=${master_addr:-127.0.0.1}
}

# The collective libraries use the network interface that has the address --local_addr.
choose_interface() {
    if [ -z "$local_addr" ]; then return; fi
    export HCCL_IF_IP=$local_addr
    local interface
    command -v ip >/dev/null || fail "--local_addr requires the command ip (on Debian: apt-get install iproute2)"
    interface=$(ip -o addr show 2>/dev/null |
        awk -v address="$local_addr" '{ split($4, part, "/"); if (part[1] == address) print $2 }' | head -n 1) || true
    [ -n "$interface" ] ||
        fail "--local_addr=$local_addr: no network interface of this node has this address (see ip addr)"
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface HCCL_SOCKET_IFNAME=$interface
}

# Earlier output is moved aside, never deleted. Prints its new name.
move_aside() { # path
    if [ ! -e "$1" ]; then return; fi
    local stamp number=1
    stamp=$(date +%Y%m%d-%H%M%S)
    while [ -e "$1.$stamp.$number" ]; do number=$((number + 1)); done
    mv "$1" "$1.$stamp.$number" || return 1
    printf '%s' "$1.$stamp.$number"
}

# Nodes may share a file system, so each has its own folder.
output_folder() {
    echo "test/output/ID$([ "$node_rank" = 0 ] || echo "_node$node_rank")"
}

# Makes the output folder and locks it until this script and main.py have ended, if there is a command flock. The folder
# itself is locked, so no file is left. A run that is just ending is waited for, as in main.py.
lock_output() { # seconds to wait
    local status=0
    mkdir -p "$output" 2>/dev/null || fail "--output=$output: cannot write there"
    if ! { exec 9<"$output"; } 2>/dev/null || ! command -v flock >/dev/null; then return; fi
    flock -w "$1" 9 2>/dev/null || status=$?
    # Code 1: another script holds the lock; other codes: this file system has no locks. If the locked folder has another
    # name by now, another script has moved it aside.
    if [ "$status" = 1 ] || ! [ "$output" -ef /dev/fd/9 ]; then
        fail "--output=$output: another run writes there; wait until it ends, or name another folder"
    fi
}

make_output() {
    local default
    default=$(output_folder)
    output=$(absolute "${output:-$repository/${default/ID/$device_id}}")
    local used
    for used in "$(pwd -P)" "$repository" "$data_path"; do # it is moved aside as a whole
        case $used/ in "$output"/*) fail "--output=$output must not contain $used" ;; esac
    done
    lock_output 30
    # A node that rejoins a torchrun job continues in its folder. CASE.log exists only if the run has finished.
    if [ "$launcher" = torchrun ] && [ ! -e "$output/$case_name.log" ]; then return; fi
    if [ -z "$(ls -A "$output")" ]; then return; fi
    moved=$(move_aside "$output" 2>/dev/null) ||
        fail "--output=$output cannot be moved aside (a mount?): name a folder in it"
    lock_output 0
    case $resume in "$output"/*) resume=$moved/${resume#"$output"/} ;; esac # it was moved with the folder
    local earlier=("$output".[0-9]*)
    echo "=> the earlier output is in $moved; all earlier ones (${#earlier[@]}) take $(du -shc "${earlier[@]}" |
        tail -n 1 | cut -f 1): delete what you do not need"
}

# The reference leaves its checkpoints in the repository's folder. train_eval_8p.sh looks for them there.
publish_checkpoints() {
    local name
    for name in checkpoint.pth.tar model_best.pth.tar; do
        if [ ! -f "$output/$name" ]; then continue; fi
        if ! { move_aside "$repository/$name" >/dev/null &&
            { ln "$output/$name" "$repository/$name" 2>/dev/null || cp "$output/$name" "$repository/$name"; }; }; then
            warn "cannot write $repository/$name; the checkpoint is in $output"
        fi
    done
}

# Prints the matches of the pattern's group in the log.
matches() { # pattern
    sed -n "s|.*$1.*|\1|p" "$log"
}

count_cards() {
    tr ',' '\n' <<<"$device_list" | wc -l
}

# Runs main.py under torchrun: if a process or a node fails, all processes restart from the last checkpoint once every
# node is back.
use_torchrun() {
    python_can "$python" 'import torch.distributed.run' ||
        fail "--launcher=torchrun requires torch 1.10 or later in $python"
    local host=false
    if [ "$node_rank" = 0 ]; then host=true; fi
    launch+=(-m torch.distributed.run --nnodes "$nnodes" --nproc_per_node "$(count_cards)" --max_restarts 5
        --rdzv_backend c10d --rdzv_endpoint "$master_addr:$master_port" --rdzv_id "$master_port"
        --rdzv_conf "is_host=$host,join_timeout=$rendezvous_timeout,read_timeout=$rendezvous_timeout")
    if [ -n "$local_addr" ]; then launch+=(--local_addr "$local_addr"); fi
    # With the shared store, a node that rejoins waits for an address that was announced before (dynamic_rendezvous.py).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    flags+=(--auto-resume --save-freq 100)
}

# torchrun always exits with code 1. Its report names the exit code of main.py, and main.py logs a stop on a signal.
code_under_torchrun() { # number of lines that the log had before this run
    local code
    code=$(tail -n "+$(($1 + 1))" "$log" |
        sed -n 's/^=> stopped on a signal.*/75/p; s/.*exitcode *: \([0-9]*\) .*/\1/p' | tail -n 1)
    echo "${code:-1}"
}

# Sets `launch`, the command in front of main.py, and `flags`, those of main.py.
build_command() {
    launch=("$python" -u)
    flags=(--data "$data_path" --seed 49 --print-freq 1 --epochs "$epochs" -b "$batch_size" --lr "$learning_rate"
        --amp --opt-level "$opt_level" --addr "$master_addr" --output-dir "$output" "${recipe[@]}")
    if [ -n "$workers" ]; then flags+=(--workers "$workers"); fi
    if [ -n "$device" ]; then flags+=(--device "$device"); fi
    if [ -n "$resume" ]; then flags+=(--resume "$resume"); fi
    if [ "$cards" = 1 ]; then
        flags+=(--gpu "$device_id")
        if [ -n "$device_list" ]; then flags+=(--device-list "$device_list"); fi # --device_id is an index into it
        return
    fi
    device_list=${device_list:-0,1,2,3,4,5,6,7}
    flags+=(--device-list "$device_list")
    if [ "$launcher" = torchrun ]; then
        use_torchrun
    else
        flags+=(--multiprocessing-distributed --world-size "$nnodes" --rank "$node_rank")
        if [ "$nnodes" -gt 1 ]; then
            flags+=(--dist-url "tcp://$master_addr:$master_port" --rendezvous-timeout "$rendezvous_timeout")
        fi
    fi
}

# Runs main.py and sets `code`. A signal to the script is passed on to main.py, which saves and exits with code 75.
run_main() {
    local child='' lines
    lines=$(wc -l <"$log")
    trap 'stopped=yes; if [ -n "${child:-}" ]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM INT USR1
    "${launch[@]}" "$repository/main.py" "${flags[@]}" >>"$log" 2>&1 &
    child=$!
    if [ -n "$stopped" ]; then kill -TERM "$child" 2>/dev/null || true; fi # the signal came before there was a child
    code=0
    wait "$child" || code=$?
    while [ -n "$stopped" ]; do # the signal interrupted `wait`; main.py is still running
        stopped=''
        code=0
        wait "$child" || code=$?
    done
    if [ "$launcher" = torchrun ] && [ "$code" -eq 1 ]; then code=$(code_under_torchrun "$lines"); fi
}

exit_with_end_of_log() {
    tail -n 20 "$log" >&2
    if [ "$code" -eq 2 ] && [ -n "$moved" ] && [ "$(ls -A "$output")" = "$(basename "$log")" ]; then
        rm -r "$output" # nothing has run: the earlier output returns, for a command that names a checkpoint in it
        mv "$moved" "$output"
        exit 2
    fi
    echo "$(basename "$0"): main.py exited with code $code; the whole log is $log" >&2
    if [ "$code" -eq 75 ] && ! grep -q '^=> stopped on a signal' "$log"; then
        echo "stopped before there was anything to save" >&2
    elif [ "$code" -eq 75 ] && [ "$launcher" = torchrun ]; then
        echo "stopped after saving a checkpoint; the same command continues the run" >&2
    elif [ "$code" -eq 75 ]; then
        printf 'stopped after saving a checkpoint; to continue, add --resume=%q\n' "$output/checkpoint.pth.tar" >&2
    fi
    exit "$code"
}

run_training() { # the script's arguments
    parse_options "$@"
    choose_interface
    # shellcheck source-path=SCRIPTDIR source=env_npu.sh
    if [ "${etp_running_flag:-}" != true ]; then source "$test_dir/env_npu.sh"; fi
    find_python || fail "python3 cannot import torch and torchvision: set PYTHON, or bash test/quickstart.sh installs them"
    local case_name=${network}_bs${batch_size}_${cards}p_$kind launch flags code begin
    make_output
    if [ -z "$opt_level" ]; then
        opt_level=O1
        if [ "$device" = cpu ] && ! python_can "$python" 'import torch; torch.autocast'; then
            opt_level=O0 # torch before 1.10 has no mixed precision on the CPU
        fi
    fi
    log=$output/train_$device_id.log
    build_command
    echo "$(basename "$0"): running, see $log"
    touch "$log"
    begin=$SECONDS
    run_main
    if [ "$code" -ne 0 ]; then exit_with_end_of_log; fi
    if [ "$kind" = perf ]; then validate_measured; fi
    if [ "$kind" = acc ]; then publish_checkpoints; fi
    report $((SECONDS - begin))
}

# As in the reference, a measurement ends with a validation. --stop-step-num ends without one, so this is a second run.
# Under torchrun the node of rank 0, which has the checkpoint and metrics.jsonl, validates alone: others may have left.
validate_measured() {
    if ! grep -q 'FPS@all' "$log" || grep -q '\[AVG-ACC\]' "$log"; then return; fi
    local launcher=$launcher nnodes=$nnodes master_addr=$master_addr # the report has those of the measurement
    if [ "$launcher" = torchrun ]; then
        if ! tail -n 1 "$output/metrics.jsonl" 2>/dev/null | grep -q '"event": "done"'; then return; fi
        launcher=spawn nnodes=1 master_addr=127.0.0.1
    fi
    recipe=(--evaluate)
    resume=$output/checkpoint.pth.tar
    build_command
    run_main
    if [ "$code" -ne 0 ]; then exit_with_end_of_log; fi
}

# Prints the metrics and writes them to CASE.log. Other people's parsers read both: the lines are frozen.
report() { # duration in seconds
    local ranks=1 images_per_second accuracy loss losses=$output/train_${case_name}_loss.txt
    if [ "$cards" != 1 ]; then ranks=$(count_cards); fi # of this node, as in the reference
    images_per_second=$(matches '\* FPS@all \([0-9.]*\)' | tail -n 1)
    accuracy=$(matches '\[AVG-ACC\] \* Acc@1 \([0-9.]*\)' | tail -n 1)
    if [ "$kind" = eval ]; then
        loss=$(matches 'Test:.*Loss *\([0-9.naif]*\) ' | tail -n 1)
    else
        matches 'Epoch:.*Loss *\([0-9.naif]*\) ' >"$losses"
        loss=$(tail -n 1 "$losses")
    fi

    echo "------------------ Final result ------------------"
    if [ -n "$images_per_second" ]; then echo "Final Performance images/sec : $images_per_second"; fi
    if [ -n "$accuracy" ]; then echo "Final Train Accuracy : $accuracy"; fi
    echo "E2E Training Duration sec : $1"
    {
        echo "Network = $network"
        echo "RankSize = $ranks"
        echo "BatchSize = $batch_size"
        echo "DeviceType = $(uname -m)"
        echo "CaseName = $case_name"
        if [ -n "$images_per_second" ]; then
            echo "ActualFPS = $images_per_second"
            echo "TrainingTime = $(LC_ALL=C awk -v b="$batch_size" -v n="${nnodes#*:}" -v f="$images_per_second" \
                'BEGIN { printf "%.2f", (f > 0) ? b * n * 1000 / f : 0 }')"
        fi
        if [ -n "$accuracy" ]; then echo "TrainAccuracy = $accuracy"; fi
        if [ -n "$loss" ]; then echo "ActualLoss = $loss"; fi
        echo "E2ETrainingTime = $1"
        if [ "$kind$cards" = perf1 ]; then
            echo "CompileTime = $(matches 'Epoch:.*Time *\([0-9.]*\) ' |
                LC_ALL=C awk 'NR <= 2 { seconds += $1 } END { printf "%.3f", seconds }')"
        fi
    } >"$output/$case_name.log"
}
