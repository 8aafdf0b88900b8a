#!/usr/bin/env bash
# On a machine with a GPU: the gpu-marked tests, then the crop launch, whole recipes and the loader, in under 10 minutes.
#
#   PARTS              some of "tests crop recipe loader" (all; expect 180, 200, 150 and 90 seconds, and 60 more for the
#                      first one on a bare machine, where the CPU's kernels are compiled too: two runs are safer)
#   OUT                folder for the JSON files and the tests' log (benchmarks/results)
#   PYTHON             an interpreter with torch, Triton, numba and pytest (.venv's, else python3)
#   SLIPSTREAM_PHOTOS  a folder with one folder of JPEGs for each class (else photographs that ship in packages)
#   SLIPSTREAM_HOSTILE a folder of damaged JPEGs for the tests (else what lies beside the checkout)
#   SLIPSTREAM_COMMIT  the commit to record, where the tree came without its history
#
# Nothing need be installed: the two source roots go on the path. What needs a missing package says so and is left out.
# Arguments (--dry-run) go to the benchmarks. A part that runs out of time keeps what it has saved until then.
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

# asked PART: whether it is to run. within SECONDS COMMAND: run it for so long at most, and for what is left of 590.
asked() { [[ " ${PARTS:-tests crop recipe loader} " == *" $1 "* ]]; }
within() {
  local left=$((590 - SECONDS)) most=$1
  shift
  if [ "$left" -le 0 ]; then
    echo "no time left for: $*"
    return 1
  fi
  timeout "$((most < left ? most : left))" "$@"
}

if asked tests; then
  # Only the files with such tests: the others may import what is not there.
  mapfile -t files < <(grep -lE 'mark\.gpu|import BACKENDS|^    BACKENDS,' tests/test_*.py)
  # The interpreter, which a dry run asks for, would leave them out.
  within 220 env -u TRITON_INTERPRET "$PYTHON" -m pytest -m gpu --continue-on-collection-errors "${files[@]}" 2>&1 |
    tee "$OUT/gpu-tests.log" || status=1
fi
reports=()
for part in crop recipe loader; do
  asked "$part" || continue
  reports+=("gpu-$part")
  within 260 "$PYTHON" "benchmarks/gpu_$part.py" "$@" || status=1
done

echo
asked tests && tail -n 3 "$OUT/gpu-tests.log"
[ "${#reports[@]}" -eq 0 ] || "$PYTHON" benchmarks/report.py --results "$OUT" "${reports[@]}" || status=1
exit "$status"
