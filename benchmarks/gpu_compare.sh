#!/usr/bin/env bash
# Compares the methods on CamVid (experiments/compare.py) on a GPU, in pieces of 10 minutes and without downloads:
# ResNet-50, bfloat16, splits 1_16 and 1_8, the same steps for all methods. Repeat the command for the next piece.
#
#   benchmarks/gpu_compare.sh DATA [OUT] [WHEELS]
#
# DATA: folder of CamVid (images, masks, splits).
# OUT: folder of the results (default: the variable OUT, else /tmp/dssn_gpu_compare): results.json, .md, .png, .svg, and
#   runs.tar.gz, the runs without checkpoints and programs. A piece on another machine continues from it if it is there,
#   or in the folder RESUME.
# WHEELS: folder of wheels to install first, as in benchmarks/gpu.sh (for the plot also matplotlib and what it needs; or
#   draw it elsewhere: unpack runs.tar.gz in OUT, then python -m experiments.compare --out=OUT --table-only).
# Variables:
#   WORK      folder of the runs with checkpoints and compiled programs: up to 1 GB for a run in progress, half of that
#             for a finished one (default: /tmp/dssn_gpu_compare_work)
#   MINUTES   of this piece (9); the last step, evaluation and save come on top
#   STEPS     per run (2000)     SEEDS  (3)     SPLITS  (1_16 1_8)     CROP  (321)
#   METHODS   (supervised dssn unimatch fixmatch, then all)     KEEP  checkpoints of finished runs (best; all, none)
#   SETTINGS  further KEY=VALUE for all runs (none)
#   PYTHON    the interpreter (default: .venv/bin/python if it exists, else python3)
set -uo pipefail
started=$(date +%s)
data=$(realpath "${1:?the folder of CamVid is missing: benchmarks/gpu_compare.sh DATA [OUT] [WHEELS]}") || exit
cd "$(dirname "$0")/.."
out=${2:-${OUT:-/tmp/dssn_gpu_compare}} wheels=${3:-} work=${WORK:-/tmp/dssn_gpu_compare_work} minutes=${MINUTES:-9}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

mkdir -p "$out" "$work"
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/dssn_wheels "$wheels"/*.whl \
        || exit
    export PYTHONPATH=/tmp/dssn_wheels
fi
export PYTHONUNBUFFERED=1
"$python" -c 'import jax; print(jax.__version__, jax.devices()); assert jax.default_backend() == "gpu"' || exit

finished=${RESUME:-$out}/runs.tar.gz
if [ ! -d "$work/runs" ] && [ -f "$finished" ]; then
    tar -xzf "$finished" -C "$work" || exit
fi
compare() { # METHOD ...: in the time left of the piece.
    "$python" -m experiments.compare --config="configs/camvid.py:encoder=resnet50,crop=${CROP:-321}" --methods "$@" \
        --splits ${SPLITS:-1_16 1_8} --seeds "${SEEDS:-3}" --keep="${KEEP:-best}" --out="$work" \
        --minutes="$(awk "BEGIN {print $minutes - ($(date +%s) - $started) / 60}")" \
        --set data.root="$data" model.dtype=bfloat16 train.steps="${STEPS:-2000}" train.eval_every=200 \
              train.checkpoint_every=200 ${SETTINGS:-}
}
status=0
if [ -n "${METHODS:-}" ]; then
    compare $METHODS || status=$?
else # The main question first, for all seeds; then the ablations of DSSN.
    compare supervised dssn unimatch fixmatch && compare all || status=$?
fi
cp "$work"/results.* "$out"
tar -czf "$out/runs.tar.gz" -C "$work" --exclude=checkpoints --exclude=tensorboard comparison.json runs || status=$?
exit "$status"
