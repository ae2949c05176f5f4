#!/usr/bin/env bash
# Every measurement that needs a GPU, within 10 minutes and without downloads.
#
#   benchmarks/gpu.sh [PART] [OUT] [WHEELS]
#
# PART: all (default) | step | train | golden. A single part has all of the time.
#   step    the table of benchmarks/step.py, most important rows first -> OUT/step.json
#   train   a short run of the VOC recipe on generated JPEGs: the share of time it waits for data -> OUT/train.jsonl
#           as a single part also the speed of strong views and input pipeline -> OUT/augment.json, OUT/input.json
#   golden  the golden numbers, in float64 on the GPU -> OUT/golden.txt
# OUT: folder of the results (default: the variable OUT, else /tmp/dssn_gpu).
# WHEELS: folder of wheels to install first, where packages of requirements.txt are missing and no index can be reached.
#   Made on another machine by: pip download --no-deps --only-binary=:all: --python-version 3.12 -d WHEELS grain \
#     array-record ml-collections tensorboardX simplejpeg tabulate  (with --platform if its platform differs)
# PYTHON: the interpreter (default: .venv/bin/python if it exists, else python3).
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-all} out=${2:-${OUT:-/tmp/dssn_gpu}} wheels=${3:-}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
started=$(date +%s)
limit=570 # Seconds for everything.
left() { echo $((limit - $(date +%s) + started)); }

mkdir -p "$out"
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/dssn_wheels "$wheels"/*.whl || exit
    export PYTHONPATH=/tmp/dssn_wheels
fi
export PYTHONUNBUFFERED=1
"$python" -c 'import jax; print(jax.__version__, jax.devices()); assert jax.default_backend() == "gpu"' || exit

if [ "$part" = golden ] || [ "$part" = all ]; then
    # Short cases first; those for which no time is left are skipped.
    budget=$([ "$part" = all ] && echo 60 || left)
    JAX_PLATFORMS=cuda timeout "$budget" "$python" -m tests.golden tests/data/golden 2>&1 | tee "$out/golden.txt"
fi
if [ "$part" = train ] || [ "$part" = all ]; then
    budget=$([ "$part" = all ] && echo 170 || echo $(($(left) - 150)))
    "$python" -m experiments.folder /tmp/dssn_gpu_data || exit
    timeout "$budget" "$python" main.py --config=configs/pascal.py:split=183 --config.data.root=/tmp/dssn_gpu_data \
        --config.model.dtype=bfloat16 --config.ema.batch_stats_epochs=0 --config.train.log_every=20 \
        --config.train.steps=400 --config.train.eval_every=400 --config.train.checkpoint_every=400 \
        --config.train.pictures=0 --workdir=/tmp/dssn_gpu_run 2>&1 | tee "$out/train.txt"
    cp /tmp/dssn_gpu_run/metrics.jsonl "$out/train.jsonl"
fi
if [ "$part" = train ]; then
    timeout 60 "$python" -m benchmarks.augment --json="$out/augment.json"
    timeout $(($(left) > 10 ? $(left) : 10)) "$python" -m benchmarks.input --seconds=4 --json="$out/input.json"
fi
if [ "$part" = step ] || [ "$part" = all ]; then
    "$python" -m benchmarks.step --seconds="$(($(left) - 10))" --measure=3 --json="$out/step.json" | tee "$out/step.txt"
fi
