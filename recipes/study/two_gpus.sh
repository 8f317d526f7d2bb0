#!/usr/bin/env bash
# One call of the study on a machine with GPUs, of a given time. What matters most comes first; each run is trained,
# measured and packed before the next one begins on its GPU.
#
#   recipes/study/two_gpus.sh extend runs/study 9 one.tgz
#   recipes/study/two_gpus.sh extend runs/study 9 two.tgz --before one.tgz     goes on, also on another machine
#   recipes/study/two_gpus.sh learn runs/learn 6.5 learn.tgz
#
# Arguments: the plan, the folder with its corpus (`prepare`, once, on any machine), minutes, the archive of tables to
# write, and more options of `run`. The archive holds neither corpus nor weights. ARMS may be set.
set -euo pipefail
plan=${1:?extend, pilot or learn} study=${2:?the folder of the study} minutes=${3:?minutes} results=${4:?the archive to write}
case $plan in
extend)
    # One run on each GPU at a time, so that speeds can be compared.
    arms=dense:0,recommended:0,frozen:0,paper-95:0,dense:1,recommended:1,coverage:0,dense-first:0,moba:0,xattention:0
    arms+=,paper-scaled:0,widen:0,dense-every:0,paper-90:0
    options=(--arm-seconds "${ARM_SECONDS:-170}")
    ;;
pilot)
    arms=dense:0,rate-1e-4:0,rate-4e-4:0,rate-8e-4:0,theta:0,linear:0
    options=(--arm-seconds "${ARM_SECONDS:-100}" --train-only)
    ;;
learn)
    # Eight small runs on each GPU at a time.
    arms=dense:0,recommended:0,coverage:0,frozen:0,window:0,dense-every:0,dense:1,recommended:1,coverage:1,frozen:1
    arms+=,dense-first:0,wide:0,dense:2,recommended:2,coverage:2,widen:0,dense-layer:0
    # Seeds that tell how often an arm fails.
    arms+=,dense-every:1,dense-every:2,dense-layer:1,dense-layer:2,recommended:3,coverage:3,dense:3
    arms+=,recommended:4,coverage:4,dense:4
    options=(--arm-seconds "${ARM_SECONDS:-150}" --processes 8)
    export OMP_NUM_THREADS=2
    ;;
*)
    echo "error: $plan is no plan; give extend, pilot or learn" >&2
    exit 2
    ;;
esac
status=0
"${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")" run "$study" --plan "$plan.yaml" --minutes "$minutes" --grace 20 \
    --results "$results" --arms "${ARMS:-$arms}" "${options[@]}" "${@:5}" || status=$?
# 75: time ran out, and what there is is saved.
if [ "$status" -ne 75 ]; then exit "$status"; fi
