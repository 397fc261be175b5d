#!/usr/bin/env bash
# Measures a table of a GPU's speeds, then trains the long runs, as far as time allows. The same command continues.
#
#   MINUTES=9 scripts/gpu_suite.sh data.root=DIR         the arguments are passed to every run
#   scripts/gpu_suite.sh PLAN data.root=DIR              runs a plan instead: check (scripts/gpu_check.py), or teacher,
#                                                        screen, long, curve or published (scripts/gpu_plan.py)
#
# Environment variables:
# MINUTES=60               time limit; with a PLAN, the default is the plan's own
# BATCHES="256 512 1024"   batch sizes in the table; "": no table
# EPOCHS="200 500"         numbers of epochs of the long runs
# OUT=results/gpu          the folder for the table or the plan's results; the runs are in multirun/
# PYTHON=.venv/bin/python  the Python interpreter
#
# If mlflow is not installed, runs log only to metrics.jsonl. Exit status 75: the time is up.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
minutes=${MINUTES:-60}
out=${OUT:-results/gpu}
started=$SECONDS

plan=
case ${1-} in check | teacher | screen | long | curve | published) plan=$1 && shift ;; esac

set -- compile=true "$@"
"$python" -c "from importlib import util; exit(not util.find_spec('mlflow'))" || set -- tracking=jsonl "$@"

arguments=(--out "$out" ${MINUTES:+--minutes "$MINUTES"} -- "$@")
case $plan in
"") ;;
check) exec "$python" -m scripts.gpu_check "${arguments[@]}" ;;
*) exec "$python" -m scripts.gpu_plan --plan "$plan" "${arguments[@]}" ;;
esac

left() { # minutes until the time is up; ends the suite when too few are left to begin anything
    local seconds=$((minutes * 60 - (SECONDS - started)))
    [ "$seconds" -gt 20 ] || { echo "the time is up; the same command continues" >&2; exit 75; }
    awk "BEGIN { print $seconds / 60 }"
}

batches=${BATCHES-256 512 1024}
if [ -n "$batches" ]; then
    time_left=$(left)
    # shellcheck disable=SC2086  # each batch size is one word
    "$python" -m scripts.gpu_speed --out "$out" --batches $batches --minutes "$time_left" -- "$@" || exit $?
fi

for epochs in ${EPOCHS-200 500}; do
    for method in "method=kmclr k=400" "method=nnclr queue_size=98304" method=simclr; do
        time_left=$(left)
        # shellcheck disable=SC2086  # a method and its size are two words
        "$python" -m src.train $method epochs="$epochs" "$@" max_minutes="$time_left"
    done
done
