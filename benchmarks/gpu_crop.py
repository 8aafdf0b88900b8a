"""The crop launch on a GPU against the bytes it must move: 256 ragged images, DINO 2x224 + 8x96, bicubic, bfloat16 out.

Measured in one run: a large copy on the device (the ceiling, bytes read plus bytes written), the launcher and each of
its launches alone, a table over launch options, and the peers. Every crop is checked before it is timed, on poisoned
outputs, with the CPU kernel's bytes. Events give device times, over several input sets in turn; against the peers it is
the host's clock, because DALI has streams of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_peers
import photographs
import record
import timing
import torch
from gpu_batch import Batch, Shape, make_batch
from slipstream_kernels import resized_crop as launcher

# (BLOCK_W, BLOCK_H, num_warps, most registers a thread or 0), the first as launched
OPTION_NAMES = ("BLOCK_W", "BLOCK_H", "num_warps", "maxnreg")
OPTIONS: tuple[tuple[int, int, int, int], ...] = (
    (32, 16, 4, 0),
    (32, 32, 4, 0),
    (32, 32, 8, 0),
    (32, 8, 2, 0),
    (32, 16, 2, 0),
    (32, 8, 4, 0),
    (32, 16, 8, 0),
    (64, 16, 4, 0),
    (64, 16, 8, 0),
    (64, 8, 4, 0),
    (32, 16, 4, 64),
    (32, 64, 8, 0),
)
PARTS = ("launch", "host", "peers", "options")  # the last one takes longest
TINY = Shape(images=2, long_side=40, global_side=12, local_side=8)
SEEDS = (0, 1, 2)  # one input set each: a set's bytes are several times a GPU's L2 cache, and the next call has another


def main() -> None:
    """Measure, print a table last, and save after each part; status 1 if one failed or was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", record.RESULTS)), help="folder for JSON")
    parser.add_argument("--name", default="gpu-crop", help="the file's name without .json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts beside the copy (all)")
    parser.add_argument(
        "--dry-run", action="store_true", help="every path on tiny sizes, on the CPU if there is no GPU"
    )
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (given.dry_run and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("no CUDA device; for a dry run on the CPU set TRITON_INTERPRET=1 and give --dry-run")
    shape = TINY if given.dry_run else Shape()
    with photographs.in_memory(None) as folder:
        batches = [make_batch(folder, shape, device, seed) for seed in (SEEDS[:1] if given.dry_run else SEEDS)]
    result: dict[str, Any] = {"benchmark": "gpu-crop", **record.circumstances(), "dry_run": given.dry_run}
    result["settings"] = {"images": shape.images, "crops": shape.crops(), "dtype": "bfloat16", "seeds": [*SEEDS]}
    result["moved_bytes"] = batches[0].moved_bytes()

    def options() -> list[Any]:
        result["options"] = []
        for row in measure_options(batches, OPTIONS[:2] if given.dry_run else OPTIONS, result["copy"]):
            result["options"].append(row)
            record.write(given.name, given.out, result)
        return result["options"]

    parts: dict[str, Callable[[], Any]] = {
        "copy": lambda: copy_bandwidth(device, 1 << (16 if given.dry_run else 31)),
        "launch": lambda: measure_launches(batches, launcher.launch_options(), result["copy"]["bytes_per_second"]),
        "host": lambda: timing.by_host(lambda: launcher.resized_crop(*_arguments(batches[0])), device, calls=20),
        "peers": lambda: measure_peers(batches[0], 1 if given.dry_run else 10),
        "options": options,
    }
    failed = False
    for name, part in parts.items():
        if name not in ("copy", *given.only):
            continue
        print(f"{name} ...", flush=True)
        try:
            result[name] = part()
        except Exception as error:  # the other parts need not suffer it
            traceback.print_exc()
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            failed = True
        record.write(given.name, given.out, result)
    _print_table(result)
    raise SystemExit(failed)


def copy_bandwidth(device: torch.device, count: int) -> dict[str, float]:
    """The rate of a device-to-device copy of `count` bytes, those read and those written counted."""
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = timing.by_events(lambda: target.copy_(source), device)
    return {"bytes": 2 * count, **times, "bytes_per_second": 2 * count / times["median"] * 1e3}


@contextlib.contextmanager
def recorded_launches(options: dict[str, Any]) -> Iterator[dict[str, Callable[[], Any]]]:
    """Let the launcher use these options, and keep each launch that it makes by its kernel's name, to be repeated."""
    kept: dict[str, Callable[[], Any]] = {}
    kind = type(launcher.resized_crop_kernel)
    launch_on = kind.__getitem__

    def keep(kernel: Any, grid: Any) -> Callable[..., Any]:
        launch = launch_on(kernel, grid)

        def run(*args: Any, **settings: Any) -> Any:
            kept[kernel.fn.__name__] = functools.partial(launch, *args, **settings)
            return launch(*args, **settings)

        return run

    with (
        mock.patch.object(kind, "__getitem__", keep),
        mock.patch.object(launcher, "launch_options", return_value=options),
    ):
        yield kept


def checked_launches(batches: Sequence[Batch], options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each launch by its kernel's name, once every batch's crops were found right; a call takes the next batch in turn.

    Raises AssertionError for a wrong or unwritten byte.
    """
    kept: dict[str, list[tuple[Callable[[], Any], list[torch.Tensor]]]] = {}  # a launch knows its outputs by address
    for batch in batches:
        outputs = batch.poisoned()
        with recorded_launches(options) as launches:
            launcher.resized_crop(*_arguments(batch), out=outputs)
        for index, (output, expected) in enumerate(zip(outputs, batch.expected, strict=True)):
            wrong = int((output != expected).sum())
            assert not wrong, f"crop {index}: {wrong} of {output.numel()} values are not the CPU kernel's"
        for name, launch in launches.items():
            kept.setdefault(name, []).append((launch, outputs))
    turns = {name: itertools.cycle(launches) for name, launches in kept.items()}
    return {name: (lambda turn=turn: next(turn)[0]()) for name, turn in turns.items()}


def measure_launches(batches: Sequence[Batch], options: Any, copy_rate: float) -> dict[str, Any]:
    """Milliseconds of the launcher as it is called and of each launch alone; the rate over the bytes to be moved."""
    device = batches[0].images.device
    launches = checked_launches(batches, dict(options))
    turn = itertools.cycle(batches)
    times = {name: timing.by_events(launch, device) for name, launch in launches.items()}
    times["launcher, the host's packing in it"] = timing.by_events(
        lambda: launcher.resized_crop(*_arguments(next(turn))), device
    )
    together = sum(times[name]["median"] for name in launches)
    rate = batches[0].moved_bytes() / together * 1e3
    return {
        "options": dict(options),
        "milliseconds": times,
        "launches_milliseconds": together,
        "bytes_per_second": rate,
        "fraction_of_copy": rate / copy_rate,
    }


def measure_options(
    batches: Sequence[Batch], table: Sequence[tuple[int, ...]], copy: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """measure_launches for each row of launch options; a row that does not compile or is wrong says so."""
    for row in table:
        options: dict[str, Any] = {**launcher.launch_options(), **dict(zip(OPTION_NAMES, row, strict=True))}
        if not options["maxnreg"]:
            del options["maxnreg"]
        try:
            measured = measure_launches(batches, options, copy["bytes_per_second"])
        except Exception as error:  # a shape may want more than the chip has: the next one may not
            measured = {"options": options, "error": f"{type(error).__name__}: {error}"[:200]}
        print(" ", *row, measured.get("error") or f"{measured['launches_milliseconds']:.3f} ms", flush=True)
        yield measured


def measure_peers(batch: Batch, calls: int) -> dict[str, Any]:
    """Each provider's milliseconds by the host's clock, or why it did not run."""
    results: dict[str, Any] = {}
    for name, prepare in gpu_peers.PROVIDERS.items():
        try:
            call = prepare(batch)
            gpu_peers.check_peer(name, call(), batch)
            results[name] = timing.by_host(call, batch.images.device, calls)
        except ModuleNotFoundError as error:
            results[name] = {"error": f"not installed: {error}"}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(f"  {name}: {results[name]}", flush=True)
    return results


def _arguments(batch: Batch) -> tuple[Any, ...]:
    return batch.images, batch.jobs, batch.formats


def _print_table(result: dict[str, Any]) -> None:
    where = (result["gpu"] or {}).get("name", "CPU (dry run)")
    print(f"\n{where}, {result['commit']}, {result['settings']['images']} images, DINO 2x224 + 8x96, bicubic, bfloat16")
    failed = [name for name in ("copy", *PARTS) if isinstance(result.get(name), dict) and "error" in result[name]]
    for name in failed:
        print(f"{name:24} {result[name]['error']}")
    found = {name: part for name, part in result.items() if name not in failed}
    if "copy" in found:
        print(
            f"copy {found['copy']['bytes_per_second'] / 1e9:.0f} GB/s; must move {result['moved_bytes'] / 1e6:.0f} MB"
        )
    if launch := found.get("launch"):
        for name, times in launch["milliseconds"].items():
            print(f"{name:36} {times['median']:8.3f} ms ({times['min']:.3f} - {times['max']:.3f})")
        print(f"{'both launches':24} {launch['launches_milliseconds']:8.3f} ms", end="")
        print(f" = {launch['bytes_per_second'] / 1e9:.0f} GB/s, {launch['fraction_of_copy']:.1%} of the copy")
    if host := found.get("host"):
        print(f"{'host, until done':24} {host['median']:8.3f} ms")
    good = [row for row in found.get("options", ()) if "error" not in row]
    for row in sorted(good, key=lambda row: row["launches_milliseconds"]):
        options = row["options"]
        shape = " x ".join(str(options[f"BLOCK_{axis}"]) for axis in "WH") + f", {options['num_warps']} warps"
        shape += f", {options['maxnreg']} registers" if "maxnreg" in options else ""
        print(f"{shape:38} {row['launches_milliseconds']:8.3f} ms = {row['fraction_of_copy']:.1%} of the copy")
    for name, times in found.get("peers", {}).items():
        print(f"{name:24} " + (times.get("error") or f"{times['median']:8.2f} ms by the host's clock"))


if __name__ == "__main__":
    main()
