#!/usr/bin/env bash
# Lays out .gpu/ (ignored by git) for a GPU machine without a package registry that takes 64 MiB with the tree a call: one folder
# for each call, with a part of the wheels that it lacks (Python 3.12, CUDA 13; it has torch, Triton, numba, pytest), photographs
# and damaged files.
#
#   gpu_carry.sh PHOTOS HOSTILE      PHOTOS: a folder with one folder of JPEGs for each class; HOSTILE: of damaged JPEGs
#
# Then each call carries its folder, keeps what it brought, and runs the parts that are possible by then; calls follow each other
# at once, for an idle machine is given back bare. In all of them
#   export PYTHONPATH=/tmp/site SLIPSTREAM_PHOTOS=/tmp/gpu/photos SLIPSTREAM_HOSTILE=/tmp/gpu/hostile SLIPSTREAM_COMMIT=...
#   .gpu/1  bash .gpu/1/take.sh 1; PARTS="tests crop" LIMIT=440 bash benchmarks/gpu.sh         wrong bytes here: mend these first
#   .gpu/2  bash .gpu/2/take.sh 2; PARTS=recipe LIMIT=230 bash benchmarks/gpu.sh
#   .gpu/3  bash .gpu/3/take.sh 3; PARTS=options LIMIT=180 bash benchmarks/gpu.sh
#   .gpu/4  bash .gpu/4/take.sh 4; PARTS="peers decode" LIMIT=370 bash benchmarks/gpu.sh
#   .gpu/5  bash .gpu/5/take.sh 5; PARTS="loader soak" LIMIT=340 bash benchmarks/gpu.sh
#
# What the loader's part decides: with decode_dali's _HW_DECODER_LOAD of 1.0 all that the JPEG engines can decode is theirs, so that
# an image's bytes depend on no other. Are "pixels, engines - CUDA" and "shared - reversed" equal, it may be the share of the
# highest rate; else 1.0, or 0.0 where that is faster. Is a mean from Pillow near decode_check's BOUND, the check will call good
# images wrong: raise it, with the number for its reason.
set -euo pipefail
photos=${1:?usage: gpu_carry.sh PHOTOS HOSTILE}; hostile=${2:?usage: gpu_carry.sh PHOTOS HOSTILE}
repository=$(cd "$(dirname "$0")/.." && pwd)
gpu=$repository/.gpu; tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
rm -rf "$gpu"; mkdir -p "$gpu"/{1,2,3,4,5} "$tmp"/{dali,litdata}
platforms=(); for n in 17 24 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
get() {
  local to=$1; shift
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$to" "$@"
}
# Not what DALI needs for other work only: nvcomp, nvTIFF, nvJPEG2000 (slipstream decodes those formats with Pillow).
get "$tmp/dali" nvidia-dali-cuda130 nvidia-nvimgcodec-cu13 nvidia-nvjpeg 'astunparse<=1.6.3' 'gast<=0.7.0' optree makefun \
  'libcst~=1.8' nvtx zstandard
# What the tests want of pytest: processes beside each other, and a mark that they use; and a peer.
get "$gpu/1/tools" pytest-xdist execnet pytest-timeout hypothesis sortedcontainers kornia kornia_rs
get "$tmp/litdata" litdata lightning-utilities obstore boto3 botocore s3transfer jmespath
(cd "$tmp/dali" && for w in nvidia_*.whl; do
  zip -q -d "$w" '*cpython-39-*' '*cpython-310-*' '*cpython-311-*' '*cpython-313*' '*cpython-314*' '*cpython-315*' '*/include/*' || true
done)
tar -C "$tmp/dali" -cf - . | split -b 58m -d -a 1 - "$tmp/part-"
mv "$tmp/part-3" "$gpu/1/"; mv "$tmp/part-0" "$gpu/2/"; mv "$tmp/part-1" "$gpu/3/"; mv "$tmp/part-2" "$gpu/4/"
[ -z "$(ls "$tmp"/part-* 2>/dev/null)" ] || { echo "more than four parts: change the sizes"; exit 1; }
tar -C "$tmp/litdata" -cf "$gpu/5/litdata.tar" .
cp -r "$photos" "$gpu/1/photos"; cp -r "$hostile" "$gpu/1/hostile"
cat > "$gpu/1/take.sh" <<'U'
#!/usr/bin/env bash
# take.sh N: keep what call N brought, and unpack what is whole
keep=/tmp/gpu; mkdir -p $keep /tmp/site
cp -r ".gpu/$1/." $keep/
unpack() { for w in "$1"/*.whl; do python3 -m zipfile -e "$w" /tmp/site; done; }
[ "$1" != 1 ] || unpack $keep/tools
if [ ! -d $keep/dali ] && [ -f $keep/part-0 ] && [ -f $keep/part-1 ] && [ -f $keep/part-2 ] && [ -f $keep/part-3 ]; then
  mkdir $keep/dali && cat $keep/part-[0-3] | tar -C $keep/dali -xf - && unpack $keep/dali
  PYTHONPATH=/tmp/site python3 -c 'import nvidia.dali as d; print("DALI", d.__version__)'
fi
if [ ! -d $keep/litdata ] && [ -f $keep/litdata.tar ]; then
  mkdir $keep/litdata && tar -C $keep/litdata -xf $keep/litdata.tar && unpack $keep/litdata
fi
U
for n in 2 3 4 5; do cp "$gpu/1/take.sh" "$gpu/$n/"; done
tree=$(git -C "$repository" ls-files -z | (cd "$repository" && xargs -0 du -cb) | tail -1 | cut -f1)
for n in 1 2 3 4 5; do
  bytes=$(($(du -sb "$gpu/$n" | cut -f1) + tree))
  echo ".gpu/$n with the tree: $((bytes / 1000000)) MB of 67"; [ "$bytes" -lt 66500000 ] || { echo "too much"; exit 1; }
done
