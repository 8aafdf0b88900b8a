#!/usr/bin/env bash
# On a machine with a GPU: the gpu-marked tests, then the crop launch, decoding and the loader. Takes under 10 minutes.
#
#   OUT                folder for the JSON files and the tests' log (benchmarks/results)
#   PYTHON             an interpreter with torch, Triton, numba and pytest (.venv's, else python3)
#   SLIPSTREAM_PHOTOS  a folder with one folder of JPEGs for each class (else photographs that ship in packages)
#   SLIPSTREAM_COMMIT  the commit to record, where the tree came without its history
#
# Nothing need be installed: the two source roots go on the path. What needs a missing package says so and is left out.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OUT=${OUT:-$PWD/benchmarks/results}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
mkdir -p "$OUT"
status=0

# Only the files with such tests: the others may import what is not there.
mapfile -t files < <(grep -lE 'mark\.gpu' tests/test_*.py)
# The interpreter, which a dry run asks for, would leave them out.
timeout 200 env -u TRITON_INTERPRET "$PYTHON" -m pytest -m gpu --continue-on-collection-errors "${files[@]}" 2>&1 | tee "$OUT/gpu-tests.log" || status=1
timeout 260 "$PYTHON" benchmarks/gpu_crop.py "$@" || status=1
timeout 120 "$PYTHON" benchmarks/gpu_loader.py "$@" || status=1

echo
tail -n 3 "$OUT/gpu-tests.log"
"$PYTHON" benchmarks/report.py --results "$OUT" gpu-crop gpu-loader || status=1
exit "$status"
