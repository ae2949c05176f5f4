#!/usr/bin/env bash
# The methods compared on CamVid (experiments/compare.py) on a GPU, in pieces of 10 minutes and without a download:
# ResNet-50, bfloat16, splits 1_16 and 1_8, the same steps for all methods. The same command does the next piece.
#
#   benchmarks/gpu_compare.sh DATA [OUT] [WHEELS]
#
# DATA: folder of CamVid (images, masks, splits).
# OUT: folder of the results (default: the variable OUT, else /tmp/dssn_gpu_compare): results.json, .md, .png, .svg, and
#   runs.tar.gz, the runs without checkpoints and programs. A piece on another machine that finds it there, or in the
#   folder that RESUME names, goes on after the runs that were finished.
# WHEELS: folder of wheels to install first, as in benchmarks/gpu.sh (matplotlib and what it needs, for the plot; it can
#   be drawn elsewhere too: unpack runs.tar.gz in OUT, then python -m experiments.compare --out=OUT --table-only).
# Variables:
#   WORK      where the runs, their checkpoints and compiled programs lie: up to 1 GB for a run in progress, half for a
#             finished one (default: /tmp/dssn_gpu_compare_work)
#   MINUTES   of this piece (9); the last step, evaluation and save come after
#   STEPS     of each run (2000)     SEEDS  (3)     SPLITS  (1_16 1_8)     CROP  (321)
#   METHODS   (supervised dssn unimatch fixmatch, then all)     KEEP  checkpoints of finished runs (best; all, none)
#   SETTINGS  more KEY=VALUE for all runs (none)
#   PYTHON    the interpreter (default: .venv/bin/python if there is one, else python3)
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
compare() { # METHOD ...: within what is left of the piece.
    "$python" -m experiments.compare --config="configs/camvid.py:encoder=resnet50,crop=${CROP:-321}" --methods "$@" \
        --splits ${SPLITS:-1_16 1_8} --seeds "${SEEDS:-3}" --keep="${KEEP:-best}" --out="$work" \
        --minutes="$(awk "BEGIN {print $minutes - ($(date +%s) - $started) / 60}")" \
        --set data.root="$data" model.dtype=bfloat16 train.steps="${STEPS:-2000}" train.eval_every=200 \
              train.checkpoint_every=200 ${SETTINGS:-}
}
status=0
if [ -n "${METHODS:-}" ]; then
    compare $METHODS || status=$?
else # The main question first, for all seeds; then the parts of DSSN.
    compare supervised dssn unimatch fixmatch && compare all || status=$?
fi
cp "$work"/results.* "$out"
tar -czf "$out/runs.tar.gz" -C "$work" --exclude=checkpoints --exclude=tensorboard comparison.json runs || status=$?
exit "$status"
