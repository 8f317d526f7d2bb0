#!/usr/bin/env bash
# A first reading of the study on two GPUs within minutes: dense on one, the sparse arms on the other, from one seed.
#
#   python recipes/study prepare runs/study --novels FOLDER      once, on any machine (25 MB)
#   recipes/study/two_gpus.sh runs/study 5.5 results.tgz         on the machine with the GPUs
#
# Arguments: the study, minutes, the archive of everything but corpus and checkpoints, and options of `run`. The same
# command goes on where time ran out, as long as the folder is there. STEPS and ARMS may be set.
set -euo pipefail
study=${1:?the folder of the study} minutes=${2:?minutes} results=${3:?the archive to write}
here=$(dirname "${BASH_SOURCE[0]}")
status=0
# The rate is constant, so arms that end early are compared at every evaluation that both have.
"${PYTHON:-python3}" "$here" run "$study" --minutes "$minutes" --seeds 1 \
    --arms "${ARMS:-dense,recommended,paper-scaled,frozen}" \
    --set config.train.steps="${STEPS:-20}" --set config.evaluate.every=10 --set config.checkpoint.every=0 \
    --set measure.tasks="[needle_numbers, niah_single_1, niah_multikey_1, vt]" \
    --set measure.lengths="[8192, 32768, 65536]" --set measure.samples=5 --set measure.batch=20 \
    --set measure.copy.samples=3 "${@:4}" || status=$?
tar czf "$results" --exclude=checkpoints --exclude=corpus -C "$study" .
# 75: time ran out, and what there is is saved.
if [ "$status" -ne 75 ]; then exit "$status"; fi
