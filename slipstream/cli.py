"""The `slipstream` command. What a command needs is imported when it runs, so that --help comes at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

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
Write a folder of images (one folder a class, as torchvision's ImageFolder wants
them, or a flat folder) as LitData chunks. Files are stored as they are; a
sample has the fields image, label (not in a flat folder) and path.
"""
_PACK_EXAMPLE = """\
example:
  slipstream pack imagenet/val imagenet-chunks/val
"""
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
    except KeyboardInterrupt:
        return 130
    except Exception as error:
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
    demo.add_argument(
        "--data", metavar="PATH-or-S3", help="LitData chunks (a folder or s3:// URL) or a folder of images"
    )
    demo.add_argument("--device", help="cpu, cuda or cuda:N (default: SLIPSTREAM_DEVICE, else CUDA if there is one)")
    demo.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images a batch (default: 32)")
    demo.add_argument("--steps", type=_positive, default=20, metavar="N", help="batches to time (default: 20)")
    demo.add_argument("--out", default="out/demo", metavar="DIR", help="where the files go (default: out/demo)")

    pack = _command(commands, "pack", "write a folder of images as LitData chunks", _PACK, _PACK_EXAMPLE)
    pack.add_argument("src", metavar="SRC", help="the folder of images")
    pack.add_argument("dst", metavar="DST", help="the folder to write: a new one, or an empty one")

    inspect = _command(
        commands, "inspect", "say what a set holds and what cannot be decoded", _INSPECT, _INSPECT_EXAMPLE
    )
    inspect.add_argument(
        "source", metavar="SOURCE", help="LitData chunks (a folder or s3:// URL) or a folder of images"
    )
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
    if data is not None and "://" not in data and not os.path.isdir(os.path.expanduser(data)):
        raise ValueError(f"--data must be a folder or an s3:// URL, got {data!r}")
    from .demo import run_demo

    run_demo(data, device=device, batch_size=batch_size, steps=steps, out=out)


def _pack(src: str, dst: str) -> None:
    from .pack import pack

    print(f"{pack(src, dst):,} images in {dst}")


def _inspect(source: str, limit: int | None, seed: int, field: str | None, decode: bool, as_json: bool) -> None:
    if "://" not in source and not os.path.isdir(os.path.expanduser(source)):
        raise ValueError(f"SOURCE must be a folder or an s3:// URL, got {source!r}")
    from .dataset import SlipstreamDataset
    from .inspection import inspect_source

    opened = SlipstreamDataset(source).source
    try:
        found = inspect_source(opened, field=field, limit=limit, decode=decode, seed=seed, progress=True)
    finally:
        opened.close()
    print(json.dumps({"source": source, **found.as_dict()}, indent=2) if as_json else f"{source}: {found.text()}")


def _is_users(error: Exception) -> bool:
    if isinstance(error, (OSError, ValueError)):
        return True
    from .decode import DecodeError
    from .demo import MissingPackagesError
    from .source import ReadError

    return isinstance(error, (MissingPackagesError, ReadError, DecodeError))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())
