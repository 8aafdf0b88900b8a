#!/usr/bin/env bash
# On a machine with a GPU: the gpu-marked tests, the crop launch, whole recipes, decoding, the loader and a short soak.
#
#   PARTS              some of "tests crop recipe options peers decode loader soak", run in this order (all). Each ends
#                      at its own limit, in seconds 240, 90, 190, 150, 150, 200, 170 and 150; expect 60 more for the first
#                      on a bare machine, where the CPU's kernels are compiled. peers wants DALI and Kornia; decode, loader
#                      and soak need DALI, soak litdata.
#   LIMIT              seconds for all of them together (1500)
#   OUT                folder for the JSON files and logs (benchmarks/results)
#   PYTHON             an interpreter with torch, Triton, numba and pytest (.venv's, else python3)
#   WORKERS            processes for the tests, where pytest-xdist is there (6)
#   SLIPSTREAM_PHOTOS  a folder with one folder of JPEGs for each class (else what lies beside the checkout, or
#                      photographs that ship in packages)
#   SLIPSTREAM_HOSTILE a folder of damaged JPEGs for the tests (else what lies beside the checkout)
#   SLIPSTREAM_COMMIT  the commit to record, where the tree came without its history
#
# Nothing need be installed: the two source roots go on the path. What needs a missing package says so and is left out.
# Arguments (--dry-run) go to the benchmarks. A part that fails or runs out of time keeps what it has saved until then,
# and the others run. What there is to know is printed last, in less than 12,000 characters.
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
summary=()

# has MODULE: whether it can be imported.
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

# part NAME LOG SECONDS COMMAND: run it, if it is asked for, for so long at most and for what is left of LIMIT. What it
# prints goes to LOG in OUT; how it ended is told at the end. SIGINT lets pytest tell what failed so far.
part() {
  local name=$1 log=$OUT/$2 most=$3 left=$((${LIMIT:-1500} - SECONDS)) begin=$SECONDS code=0
  shift 3
  [[ " ${PARTS:-tests crop recipe options peers decode loader soak} " == *" $name "* ]] || return 0
  if [ "$left" -le 0 ]; then
    summary+=("$name: no time was left")
    status=1
    return
  fi
  echo "$name ..."
  timeout -s INT -k 15 "$((most < left ? most : left))" "$@" >"$log" 2>&1 || code=$?
  summary+=("$name: status $code after $((SECONDS - begin)) s")
  [ "$code" = 0 ] && return
  status=1
  [ "$code" -ge 124 ] && summary+=("$name: ran out of time")
  case $log in *-tests.log | *-decode.log) ;; *) summary+=("$(tail -n 5 "$log" | cut -c1-200)") ;; esac
}

# Only the files with such tests: the others may import what is not there. Those of the second kind decode.
mapfile -t files < <(grep -lE 'mark\.gpu|import BACKENDS|^    BACKENDS,' tests/test_*.py)
mapfile -t decoding < <(grep -lE 'Decoder|SlipstreamLoader|slipstream\.cli' "${files[@]}")
mapfile -t kernels < <(printf '%s\n' "${files[@]}" | grep -vxFf <(printf '%s\n' "${decoding[@]}"))
pytest=("$PYTHON" -m pytest -m gpu --continue-on-collection-errors --show-capture=no --tb=short --durations=10 -vv)
has xdist && pytest+=(-n "${WORKERS:-6}")
# The interpreter, which a dry run asks for, would leave these tests out.
plain=(env -u TRITON_INTERPRET COLUMNS=180)

part tests gpu-tests.log 240 "${plain[@]}" "${pytest[@]}" "${kernels[@]}"
part crop gpu-crop.log 90 "$PYTHON" benchmarks/gpu_crop.py --only launch host "$@"
part recipe gpu-recipe.log 190 "$PYTHON" benchmarks/gpu_recipe.py --only dinov2 dinov2-as-trained dino simclr timm "$@"
part options gpu-options.log 150 "$PYTHON" benchmarks/gpu_crop.py --name gpu-options --only options "$@"
# Theirs and ours in one run, once all of them are there.
part peers gpu-crop-peers.log 60 "$PYTHON" benchmarks/gpu_crop.py --name gpu-crop-peers --only peers "$@"
part peers gpu-recipe-peers.log 90 "$PYTHON" benchmarks/gpu_recipe.py --name gpu-recipe-peers --only peers "$@"
if has nvidia.dali; then
  part decode gpu-decode.log 200 "${plain[@]}" "${pytest[@]}" "${decoding[@]}"
elif [[ " ${PARTS:-decode} " == *" decode "* ]]; then
  summary+=("decode: left out, for there is no DALI")
fi
part loader gpu-loader.log 170 "$PYTHON" benchmarks/gpu_loader.py "$@"
# In half a minute the allocator and DALI's pools still take their part, hence more room than a long run's 2 %.
part soak gpu-soak.log 150 env PYTHONPATH="$PWD/tests:$PYTHONPATH" "$PYTHON" tests/soak.py --device cuda --minutes 1.5 \
  --growth 0.1 --json "$OUT/gpu-soak.json"

tables=()
for name in gpu-crop gpu-options gpu-recipe gpu-crop-peers gpu-recipe-peers gpu-loader; do
  [ -f "$OUT/$name.json" ] && tables+=("$name")
done
[ "${#tables[@]}" -eq 0 ] || "$PYTHON" benchmarks/report.py --results "$OUT" "${tables[@]}" | cut -c1-220 | tail -c 7000
for log in "$OUT"/gpu-tests.log "$OUT"/gpu-decode.log; do
  [ -f "$log" ] || continue
  echo
  failed=$(grep -E '^(FAILED|ERROR) ' "$log" | cut -c1-180)
  [ -n "$failed" ] || failed=$(grep -oE 'FAILED tests.*|tests.* FAILED' "$log") # of a run that was ended, by -vv
  head -n 12 <<<"$failed"
  tail -n 1 "$log"
done
echo
printf '%s\n' "${summary[@]}"
exit "$status"
