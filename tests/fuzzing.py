"""Mutates images, chunks, indexes and tars by a seeded generator, and checks what is read from them; run in a child.

    python fuzzing.py FOLDER --seconds 10 [--seed 0] [--only KIND:NUMBER]

Mutation NUMBER of a KIND is a pure function of the seed, so that one can be done again alone. What is under way is
always in FOLDER/now, for a run that crashes; one that hangs is ended with a traceback in FOLDER/hang.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fuzz_images import Images
from fuzz_sources import Chunks, Indexes, PackedChunks, TarIndexes, Tars
from process_memory import peak

HANG = 60.0
KINDS: dict[str, Callable[[Path], object]] = {
    "images": Images,
    "chunks": Chunks,
    "index.json": Indexes,
    "packed chunks": PackedChunks,
    "tars": Tars,
    "tar indexes": TarIndexes,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["SLIPSTREAM_CACHE"] = str(folder / "cache")
    made = {name: kind(folder / name.replace(" ", "-")) for name, kind in KINDS.items()}
    counts, found = dict.fromkeys(KINDS, 0), []
    now = os.open(folder / "now", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    with open(folder / "hang", "w") as hang:
        faulthandler.enable(hang)
        end = time.monotonic() + options.seconds
        for name, number in _order(options.only):
            if time.monotonic() > end and not options.only:
                break
            os.pwrite(now, f"{name}:{number}".ljust(60).encode(), 0)
            faulthandler.dump_traceback_later(HANG, exit=True, file=hang)
            rng = np.random.default_rng([options.seed, list(KINDS).index(name), number])
            try:
                counts[name] += made[name].check(rng)  # pyright: ignore[reportAttributeAccessIssue]
            except Exception as error:
                # An AssertionError is what is wrong; any other is one that nobody named.
                found.append(f"{name}:{number}: {type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}")
                if len(found) >= 10:
                    break
        faulthandler.cancel_dump_traceback_later()
    print("FUZZ", json.dumps({"counts": counts, "found": found, "peak": peak()}), flush=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return 0


def _order(only: str | None) -> Iterator[tuple[str, int]]:
    if only is not None:
        name, _, number = only.rpartition(":")
        yield name, int(number)
        return
    # Half of them images.
    others = [name for name in KINDS if name != "images"]
    for number in itertools.count():
        for each, name in enumerate(others):
            yield "images", number * len(others) + each
            yield name, number


if __name__ == "__main__":
    sys.exit(main())
