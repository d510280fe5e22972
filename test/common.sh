# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
# What the training scripts share: options, the call of main.py, and the figures read off its log. Sourced, never run.
# shellcheck disable=SC2154
# A script sets `kind` (acc, perf, eval), `cards`, `batch_size`, `learning_rate` and its own flags of main.py in `recipe`,
# then calls `run_training "$@"`.

set -euo pipefail
network=Vgg16_ID1630_for_PyTorch
test_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$test_dir")
# shellcheck source=test/setup.sh
source "$test_dir/setup.sh"

fail() { # message
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

usage() {
    cat <<USAGE
usage: bash test/$(basename "$0") --data_path=DIR [options]
  --data_path=DIR        folder with train/ and val/, or CIFAR-10
  --batch_size=N         images a step on this machine            ($batch_size)
  --workers=N            loader workers of this machine           (the cores left)
  --epochs=N             epochs                                   ($epochs)
  --device=NAME          npu, gpu or cpu                          (the first that works)
  --device_id=N          the card of a one-card run               (ASCEND_DEVICE_ID, else 0)
  --device_list=0,1,…    the cards of a run on several            (0 to 7)
  --learning_rate=RATE   peak learning rate                       ($learning_rate)
  --opt_level=O0…O3      mixed precision                          (O1)
  --resume=PATH          checkpoint to continue or evaluate
  --output=DIR           logs, checkpoints, figures               ($(output_folder))
USAGE
    if [ "$nodes" = many ]; then
        cat <<USAGE
  --nnodes=N             number of machines                       (1)
  --node_rank=N          this machine's number, from 0            (0)
  --local_addr=IP        this machine's address
  --master_addr=IP       the address of machine 0                 (127.0.0.1)
  --master_port=N        its port                                 (59629)
  --launcher=NAME        spawn or torchrun, which restarts        (spawn)
USAGE
    fi
}

# Absolute form of a path that the caller gave relative to where they stand.
absolute() { # path
    realpath -m -- "$1"
}

data_path='' workers='' device='' device_id=${ASCEND_DEVICE_ID:-0} device_list='' opt_level='' resume=''
output='' nnodes=1 node_rank=0 local_addr='' master_addr=127.0.0.1 master_port=59629 launcher=spawn
epochs=90 nodes=one recipe=()

parse_options() { # the caller's words
    local option value
    for option in "$@"; do
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
            --resume=*) resume=$value ;;
            --output=*) output=$value ;;
            -h | --help) usage; exit 0 ;;
            --nnodes=* | --node_rank=* | --local_addr=* | --master_addr=* | --master_port=* | --launcher=*)
                [ "$nodes" = many ] || fail "$option belongs to the multi-node scripts; --help lists the options here"
                printf -v "$(sed 's/^--//; s/=.*//' <<<"$option")" '%s' "$value" ;;
            *) fail "unknown option $option; --help lists them" ;;
        esac
    done
    [ -n "$data_path" ] || fail "no data: pass --data_path=DIR, a folder with train/ and val/ (or CIFAR-10)"
    data_path=$(absolute "$data_path")
    [ -d "$data_path" ] || fail "--data_path=$data_path: no such folder"
    if [ -n "$resume" ]; then resume=$(absolute "$resume"); fi
    case $launcher in
        spawn) ;;
        torchrun) [ -z "$resume" ] || fail "--launcher=torchrun continues what is in --output by itself: put the checkpoint \
there as checkpoint.pth.tar, or leave --launcher out" ;;
        *) fail "--launcher=$launcher: spawn or torchrun" ;;
    esac
}

# The python to use: PYTHON, the .venv that quickstart.sh made, or the active one.
find_python() {
    if [ -n "${PYTHON:-}" ]; then python=$PYTHON
    elif [ -x "$repository/.venv/bin/python" ]; then python=$repository/.venv/bin/python
    else python=$(command -v python3 || command -v python || fail "no python3 found"); fi
}

# --local_addr picks the network interface that the collective libraries use.
choose_interface() {
    if [ -z "$local_addr" ]; then return; fi
    export HCCL_IF_IP=$local_addr
    local interface
    interface=$(ip -o addr show 2>/dev/null |
        awk -v address="$local_addr" '{ split($4, part, "/"); if (part[1] == address) print $2 }' | head -n 1)
    [ -n "$interface" ] || fail "--local_addr=$local_addr: no network interface of this machine has that address"
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface HCCL_SOCKET_IFNAME=$interface
}

# Earlier output is moved aside, never deleted. Prints its new name.
move_aside() { # path
    if [ ! -e "$1" ]; then return; fi
    local stamp number=1
    stamp=$(date +%Y%m%d-%H%M%S)
    while [ -e "$1.$stamp.$number" ]; do number=$((number + 1)); done
    mv "$1" "$1.$stamp.$number"
    printf '%s' "$1.$stamp.$number"
}

# Machines may share the file system, so each has a folder of its own.
output_folder() {
    echo "test/output/ID$([ "$node_rank" = 0 ] || echo "_node$node_rank")"
}

make_output() {
    local default
    default=$(output_folder)
    output=$(absolute "${output:-$repository/${default/ID/$device_id}}")
    case $PWD/ in "$output"/*) fail "--output=$output: name a folder below this one" ;; esac
    # Brought back, a machine of a torchrun job continues; CASE.log is there only when the run has finished.
    if [ "$launcher" = torchrun ] && [ -d "$output" ] && [ ! -e "$output/$case_name.log" ]; then return; fi
    local moved
    moved=$(move_aside "$output")
    # A checkpoint in there is found where it is now.
    case $resume in "$output"/*) resume=$moved/${resume#"$output"/} ;; esac
    mkdir -p "$output"
}

# The weights stand in the repository's folder, as the reference leaves them; train_eval_8p.sh looks for them there.
publish_checkpoints() {
    local name
    for name in checkpoint.pth.tar model_best.pth.tar; do
        if [ -f "$output/$name" ] && [ "$output" != "$repository" ]; then
            move_aside "$repository/$name" >/dev/null
            ln "$output/$name" "$repository/$name" 2>/dev/null || cp "$output/$name" "$repository/$name"
        fi
    done
}

# The last value that `sed -n 's/PATTERN/\1/p'` finds in the log; nothing where there is none.
last_of() { # pattern
    sed -n "s|.*$1.*|\1|p" "$log" | tail -n 1
}

count_cards() {
    tr ',' '\n' <<<"$device_list" | wc -l
}

# Torch's elastic launcher in front of main.py: where a process or another machine fails, all start again from the last
# checkpoint, as soon as every machine is there.
use_torchrun() {
    python_can "$python" 'import torch.distributed.run' ||
        fail "--launcher=torchrun: the torch of $python has none; 1.10 and later do"
    local host=false
    if [ "$node_rank" = 0 ]; then host=true; fi
    launch+=(-m torch.distributed.run --nnodes "$nnodes" --nproc_per_node "$(count_cards)" --max_restarts 5 --rdzv_backend c10d
        --rdzv_endpoint "$master_addr:$master_port" --rdzv_id "$master_port" --rdzv_conf "is_host=$host")
    if [ -n "$local_addr" ]; then launch+=(--local_addr "$local_addr"); fi
    # Else a machine that comes back waits for an address announced before it came (torch 2.15, dynamic_rendezvous.py).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    flags+=(--auto-resume --save-freq 100)
}

# torchrun ends with 1 whatever main.py ended with: its report names the code, and a stop main.py tells itself.
code_under_torchrun() { # lines of the log that were there before
    local code
    code=$(tail -n "+$(($1 + 1))" "$log" |
        sed -n 's/^=> stopped on a signal.*/75/p; s/.*exitcode *: \([0-9]*\) .*/\1/p' | tail -n 1)
    echo "${code:-1}"
}

run_training() { # the caller's words
    parse_options "$@"
    find_python
    choose_interface
    # shellcheck source=test/env_npu.sh
    if [ "${etp_running_flag:-}" != true ]; then source "$test_dir/env_npu.sh"; fi
    local case_name=${network}_bs${batch_size}_${cards}p_$kind
    make_output
    if [ -z "$opt_level" ]; then
        opt_level=O1
        if [ "$device" = cpu ] && ! python_can "$python" 'import torch; torch.autocast'; then
            opt_level=O0 # torch before 1.10 has no mixed precision on a CPU
        fi
    fi
    log=$output/train_$device_id.log
    local launch=("$python" -u)
    local flags=(--data "$data_path" --seed 49 --epochs "$epochs" -b "$batch_size" --lr "$learning_rate"
        --amp --opt-level "$opt_level" --addr "$master_addr" --output-dir "$output" "${recipe[@]}")
    if [ -n "$workers" ]; then flags+=(--workers "$workers"); fi
    if [ -n "$device" ]; then flags+=(--device "$device"); fi
    if [ -n "$resume" ]; then flags+=(--resume "$resume"); fi
    if [ "$cards" = 1 ]; then
        flags+=(--gpu "$device_id")
        if [ -n "$device_list" ]; then flags+=(--device-list "$device_list"); fi # --device_id counts into it
    else
        device_list=${device_list:-0,1,2,3,4,5,6,7}
        flags+=(--device-list "$device_list")
        if [ "$launcher" = torchrun ]; then
            use_torchrun
        else
            flags+=(--multiprocessing-distributed --world-size "$nnodes" --rank "$node_rank")
            if [ "$nnodes" -gt 1 ]; then flags+=(--dist-url "tcp://$master_addr:$master_port"); fi
        fi
    fi

    echo "$(basename "$0"): running, see $log"
    touch "$log"
    local begin=$SECONDS code=0 child='' lines
    lines=$(wc -l <"$log")
    # Who stops the script stops the training, which saves and ends with 75.
    local stopped=''
    trap 'stopped=yes; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM INT USR1
    "${launch[@]}" "$repository/main.py" "${flags[@]}" >>"$log" 2>&1 &
    child=$!
    wait $child || code=$?
    while [ -n "$stopped" ]; do # the signal ended the wait, not the child
        stopped=''
        code=0
        wait $child || code=$?
    done
    if [ "$launcher" = torchrun ] && [ $code -eq 1 ]; then code=$(code_under_torchrun "$lines"); fi
    if [ "$code" -ne 0 ]; then
        tail -n 20 "$log" >&2
        echo "$(basename "$0"): main.py ended with $code; the whole log is $log" >&2
        if [ "$code" -eq 75 ] && [ "$launcher" = torchrun ]; then
            echo "stopped after saving; the same command goes on" >&2
        elif [ "$code" -eq 75 ]; then
            echo "stopped after saving; to go on, add --resume=$output/checkpoint.pth.tar" >&2
        fi
        exit "$code"
    fi
    if [ "$kind" = acc ]; then publish_checkpoints; fi
    report $((SECONDS - begin))
}

# The figures, on the terminal and in CASE.log.
report() { # seconds
    local ranks=1 images_per_second accuracy loss
    if [ "$cards" != 1 ]; then ranks=$(($(count_cards) * nnodes)); fi
    images_per_second=$(last_of '\* FPS@all \([0-9.]*\)')
    accuracy=$(last_of '\[AVG-ACC\] \* Acc@1 \([0-9.]*\)')
    sed -n 's|^Epoch:.*Loss *\([0-9.naif]*\) .*|\1|p' "$log" >"$output/train_${case_name}_loss.txt"
    loss=$(tail -n 1 "$output/train_${case_name}_loss.txt")

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
            echo "TrainingTime = $(awk -v b="$batch_size" -v n="$nnodes" -v f="$images_per_second" \
                'BEGIN { printf "%.2f", (f > 0) ? b * n * 1000 / f : 0 }')"
        fi
        if [ -n "$accuracy" ]; then echo "TrainAccuracy = $accuracy"; fi
        if [ -n "$loss" ]; then echo "ActualLoss = $loss"; fi
        echo "E2ETrainingTime = $1"
    } >"$output/$case_name.log"
}
