"""The `slipstream` command. What a command needs is imported when it runs, so that --help comes at once."""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__

_DEMO = """\
Stream images as DINO's crops: two of 224 and four of 96 pixels, flipped at
random, the large ones normalised. Print each crop's shape, dtype and range, and
images/s with decode only beside it, and write a contact sheet, DIR/crops.png:
every crop below its source image, on which its box is drawn.

Without --data the images are eight photographs that come inside scikit-learn
and scikit-image, written as LitData chunks into DIR/photographs. Nothing is
downloaded.
"""
_DEMO_EXAMPLE = """\
examples:
  slipstream demo
  slipstream demo --data s3://bucket/imagenet/val/ --batch-size 64 --steps 100

Endpoint and credentials of s3:// are those that boto3 finds: AWS_ENDPOINT_URL,
AWS_PROFILE, AWS_ACCESS_KEY_ID, ...
"""
_PACK = """\
Write any source as LitData chunks: a folder of images (one folder a class, as
torchvision's ImageFolder wants them, or a flat folder), WebDataset tars,
Parquet or Arrow files, or LitData chunks. Images are stored as they are, with
all other fields; a folder of images has image, label (not if it is flat) and
path.

With --format yuv420 images are stored decoded, as planar YUV 4:2:0, which the
crop kernels read: nothing is decoded in training. That is 1.5 bytes a pixel,
0.13 MB for 256 x 341; --short-side 256 makes larger images so small.

DST is new or empty, or holds what an interrupted run of the same command left:
what is done there is kept. It is a LitData set, with an index.json, once it is
whole. The files depend on SRC and the options only, not on --workers, the
number of ranks or interruptions.

Many machines: run the same command on each, DST in a shared folder. Each packs
its share, by --rank and --world-size, else by the numbers that torchrun, a
Slurm array or srun gives it. They need not run at the same time; whichever
finishes last writes the index.
"""
_PACK_EXAMPLE = """\
examples:
  slipstream pack imagenet/val imagenet-chunks/val
  slipstream pack 'shards/train-{0000..0146}.tar' chunks --on-error skip
  slipstream pack imagenet/train decoded/train --format yuv420 --short-side 256
  slipstream pack s3://bucket/train /mnt/shared/chunks --rank 0 --world-size 4
  torchrun --nproc-per-node 4 -m slipstream pack /data/train /data/chunks
  sbatch --array=0-63 --wrap 'slipstream pack /data/train /data/chunks'

S3: pack into a folder, then `aws s3 sync DST s3://bucket/prefix`. The exit code
is 0 for a finished share, whether the set is whole or not: the output tells.
"""
_ANY_SOURCE = "a folder of images, chunks, tars or tables; tars or tables as files or a glob; an s3:// URL"
_INSPECT = """\
Say what is in a set of images: how many samples and bytes, sizes of files and
images (smallest, 5 % .. 95 %, largest, mean), formats, channels, JPEG's chroma
subsampling and coding (baseline, progressive, ...), EXIF orientations other
than 1, and the samples whose bytes or header cannot be read. That takes the
headers alone; --decode also decodes every image, in batches on all CPU cores,
and names each that cannot be: sample id, path and reason.
"""
_INSPECT_EXAMPLE = """\
examples:
  slipstream inspect imagenet-chunks/val
  slipstream inspect imagenet/val --decode
  slipstream inspect s3://bucket/imagenet/train --limit 2000 --json

A chunk in S3 is fetched whole when one of its samples is looked at, and kept in
the cache folder ($SLIPSTREAM_CACHE, else ~/.cache/slipstream). The exit code is
0 whatever is found: scripts read --json.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that argv (default: the process's arguments) names; gives the exit code, 2 for a user's error."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        {"demo": _demo, "pack": _pack, "inspect": _inspect}[command](**arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 141
        if not _is_users(error):
            raise
        print(f"slipstream {command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="slipstream",
        description="JPEG bytes to named random crops for vision training.",
        epilog="See `slipstream COMMAND --help` for a command's options and an example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"slipstream {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = _command(
        commands, "demo", "stream images as six crops, with timings and a contact sheet", _DEMO, _DEMO_EXAMPLE
    )
    demo.add_argument("--data", metavar="SOURCE", help=_ANY_SOURCE)
    demo.add_argument("--device", help="cpu, cuda or cuda:N (default: SLIPSTREAM_DEVICE, else CUDA if there is one)")
    demo.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images a batch (default: 32)")
    demo.add_argument("--steps", type=_positive, default=20, metavar="N", help="batches to time (default: 20)")
    demo.add_argument("--out", default="out/demo", metavar="DIR", help="where the files go (default: out/demo)")

    pack = _command(commands, "pack", "write any source as LitData chunks", _PACK, _PACK_EXAMPLE)
    pack.add_argument("src", metavar="SRC", help=_ANY_SOURCE)
    pack.add_argument("dst", metavar="DST", help="the folder to write, or to go on with")
    pack.add_argument("--chunk-size", default="64MB", metavar="SIZE", help="of a chunk file (default: 64MB)")
    pack.add_argument("--workers", type=_positive, metavar="N", help="threads (default: one a core, at most 8)")
    pack.add_argument("--rank", type=int, metavar="R", help="which share this run packs, 0 to W - 1")
    pack.add_argument("--world-size", type=_positive, metavar="W", help="how many shares there are")
    pack.add_argument("--format", default="same", metavar="NAME", help="of images: same (default) or yuv420")
    pack.add_argument("--short-side", type=_positive, metavar="N", help="with yuv420: larger images are resized to it")
    pack.add_argument(
        "--apply-exif", action="store_true", help="with yuv420: turn images as their EXIF orientation says"
    )
    pack.add_argument("--field", metavar="NAME", help="the image field that --format is for (default: the only one)")
    pack.add_argument("--exclude-field", action="append", default=[], metavar="NAME", help="leave out; may be repeated")
    pack.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="a sample that cannot be read or stored ends the run (default), or is left out and listed",
    )

    inspect = _command(
        commands, "inspect", "say what a set holds and what cannot be decoded", _INSPECT, _INSPECT_EXAMPLE
    )
    inspect.add_argument("source", metavar="SOURCE", help=_ANY_SOURCE)
    inspect.add_argument("--limit", type=_positive, metavar="N", help="look at N samples, drawn at random by --seed")
    inspect.add_argument("--seed", type=int, default=0, metavar="N", help="which N those are (default: 0)")
    inspect.add_argument("--field", metavar="NAME", help="the image field (default: the first)")
    inspect.add_argument("--decode", action="store_true", help="decode every image, and name what cannot be")
    inspect.add_argument(
        "--json", action="store_true", dest="as_json", help="print one JSON object, with every failure"
    )
    return parser


def _command(commands: argparse._SubParsersAction, name: str, short: str, text: str, example: str) -> _Parser:
    layout = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(
        name, help=short, description=text, epilog=example, formatter_class=layout, allow_abbrev=False
    )


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return number


def _demo(data: str | None, device: str | None, batch_size: int, steps: int, out: str) -> None:
    from .demo import run_demo

    run_demo(data, device=device, batch_size=batch_size, steps=steps, out=out)


def _pack(src: str, dst: str, chunk_size: str, workers: int | None, exclude_field: list[str], **options: Any) -> None:
    from .pack import pack
    from .source import ReadError

    try:
        done = pack(src, dst, chunk_bytes=chunk_size, num_workers=workers, exclude_fields=exclude_field, **options)
    except ReadError as error:
        how = "mend or remove it, or give --on-error skip, and run it again: what is done is kept"
        raise ValueError(f"{error}; {how}") from None
    size = f"{done.samples:,} samples, {done.n_bytes / 1e6:,.0f} MB in {done.chunks:,} chunks in {dst}"
    share = f"rank {done.rank} of {done.world_size}: " if done.world_size > 1 else ""
    rates = f"{done.packed / done.seconds:,.0f} samples/s, {done.packed_bytes / done.seconds / 1e6:,.0f} MB/s"
    print(f"{share}packed {done.packed:,} samples in {done.seconds:,.1f} s ({rates})")
    if done.skipped:
        place = os.path.join(dst, "skipped.json") if done.whole else "skipped.json once it is whole"
        print(f"left out: {len(done.skipped):,} samples, listed in {place}; ids differ from the source's")
    if done.whole:
        print(size)
    else:
        print(f"not whole yet: {done.blocks_left:,} blocks are left to other ranks; so far {size}")


def _inspect(source: str, limit: int | None, seed: int, field: str | None, decode: bool, as_json: bool) -> None:
    from .dataset import SlipstreamDataset
    from .inspection import inspect_source

    opened = SlipstreamDataset(source).source
    try:
        found = inspect_source(opened, field=field, limit=limit, decode=decode, seed=seed, progress=True)
    finally:
        opened.close()
    print(json.dumps({"source": source, **found.as_dict()}, indent=2) if as_json else f"{source}: {found.text()}")


def _reader_is_gone() -> bool:
    # Whether what reads our output, such as `head`, has ended: no error of ours. Then the rest of it goes nowhere, for
    # Python would fail again where it flushes at its end.
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # an error is told without asking
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _is_users(error: Exception) -> bool:
    # One that Python raised has the name of the module; one of ours says what to install.
    if isinstance(error, (OSError, ValueError)) or (isinstance(error, ImportError) and error.name is None):
        return True
    from .decode import DecodeError
    from .source import ReadError

    return isinstance(error, (ReadError, DecodeError))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())
