"""Images a second on a GPU: JPEG decoding alone, by its shares for the JPEG engines, and the whole loader with DINO-10;
and how far apart the pixels of the engines, of the CUDA decoder and of Pillow are.

Decoding is DALI's "mixed" through slipstream's decoder. Encoded images are in RAM, repeated to the epoch's length.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import photographs
import record
import torch
from gpu_batch import Shape

HW_LOADS = (1.0, 0.0, 0.4, 0.65, 0.8, 0.9)
DIFFERENT_BATCHES = 8


def decoder_of(load: float, device: torch.device, batch_size: int, threads: int, verify: bool) -> Any:
    """Slipstream's decoder with this share of a batch for the JPEG engines."""
    from slipstream import decode_dali
    from slipstream.decode import Decoder

    with mock.patch.object(decode_dali, "_HW_DECODER_LOAD", load):  # read when the pipeline is built, which is now
        return Decoder(device=device, max_batch=batch_size, num_threads=threads, max_pixels=1 << 28, verify=verify)


def decode_rates(folder: Path, device: torch.device, batch_size: int, batches: int, threads: int) -> dict[str, Any]:
    """Images a second of decoding by the share of each batch that the JPEG engines get, and with its check."""
    found = photographs.paths(folder)
    chosen = np.random.default_rng(0).integers(len(found), size=(DIFFERENT_BATCHES, batch_size))
    files = [[np.fromfile(found[index], np.uint8) for index in row] for row in chosen.tolist()]
    expected = [[*photographs.decoded(found[index]).shape[:2]] for index in chosen[0].tolist()]
    runs = [(str(load), load, False) for load in (HW_LOADS if device.type == "cuda" else HW_LOADS[:1])]
    rates: dict[str, Any] = {}
    for name, load, verify in [*runs, (f"{HW_LOADS[0]}, checked", HW_LOADS[0], True)]:
        decoder = decoder_of(load, device, batch_size, threads, verify)
        try:
            assert decoder.decode(files[0], range(batch_size), str).sizes.tolist() == expected
            rates[name] = _decode_rate(decoder, files, batches)
        finally:
            decoder.close()
        print(f"  decode, hw_decoder_load {name}: {rates[name]:.0f} images/s", flush=True)
    return rates


def decode_differences(folder: Path, device: torch.device, batch_size: int, threads: int) -> dict[str, Any]:
    """How far apart the pixels are, of 255: the JPEG engines', the CUDA decoder's, Pillow's, and a reversed batch's.

    Where engines and CUDA differ, an image's pixels depend on which of them its batch gave it to.
    """
    found = photographs.paths(folder)[:batch_size]
    files = [np.fromfile(path, np.uint8) for path in found]
    pixels = {"Pillow": [photographs.decoded(path) for path in found]}
    for name, load, step in (("engines", 1.0, 1), ("CUDA", 0.0, 1), ("shared", 0.65, 1), ("reversed", 0.65, -1)):
        decoder = decoder_of(load, device, batch_size, threads, False)
        try:
            batch = decoder.decode(files[::step], range(len(files)), str)
            batch.wait_on_current_stream()
            pixels[name] = [batch.image(row).permute(1, 2, 0).cpu().numpy().copy() for row in range(len(files))][::step]
        finally:
            decoder.close()
    pairs = ("engines", "CUDA"), ("engines", "Pillow"), ("CUDA", "Pillow"), ("shared", "reversed")
    return {f"{one} - {other}": _differences(pixels[one], pixels[other]) for one, other in pairs}


def _differences(images: list[np.ndarray], others: list[np.ndarray]) -> dict[str, float]:
    # Images that differ at all, their greatest difference, and the greatest mean of one.
    each = [np.abs(one.astype(np.int16) - other) for one, other in zip(images, others, strict=True)]
    return {
        "images": len(each),
        "unlike": sum(bool(difference.any()) for difference in each),
        "max": max(int(difference.max()) for difference in each),
        "mean": max(float(difference.mean()) for difference in each),
    }


def loader_rates(
    folder: Path, device: torch.device, shape: Shape, batch_size: int, batches: int, threads: int
) -> dict[str, Any]:
    """Images a second of the loader, for DINO-10 normalised to bfloat16 and for one crop, each epoch of three."""
    from slipstream import (
        MultiCropPipeline,
        MultiRandomResizedCrop,
        Normalize,
        RandomHorizontalFlip,
        SlipstreamDataset,
        SlipstreamLoader,
    )

    crops = shape.crops()
    works: dict[str, dict[str, Any]] = {"DINO-10": crops, "1x224": {"crop": {"size": shape.global_side}}}
    indices = np.arange(batch_size * batches) % len(photographs.paths(folder))
    rates: dict[str, Any] = {}
    for name, work in works.items():
        stages = {crop: [RandomHorizontalFlip(), Normalize(dtype=torch.bfloat16)] for crop in work}
        with SlipstreamLoader(
            SlipstreamDataset(local_dir=folder, indices=indices),
            batch_size,
            shuffle=True,
            pipelines={"image": [MultiRandomResizedCrop(work), MultiCropPipeline(stages)]},
            exclude_fields=["path"],
            device=device,
            num_threads=threads,
            verbose=False,
        ) as loader:
            samples = []
            for epoch in range(4):
                begin = time.perf_counter()
                for batch in loader:
                    for crop in work:
                        assert batch[crop].dtype == torch.bfloat16, crop
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if epoch:  # the first one compiles
                    samples.append(len(indices) / (time.perf_counter() - begin))
        rates[name] = {"samples": samples, **record.summary(samples)}
        print(f"  loader, {name}: {rates[name]['median']:.0f} images/s", flush=True)
    return rates


def _decode_rate(decoder: Any, files: list[list[np.ndarray]], batches: int) -> float:
    held = decoder.decode(files[0], range(len(files[0])), str)
    begin = time.perf_counter()
    for number in range(1, batches + 1):
        made = decoder.decode(files[number % len(files)], range(len(files[0])), str)
        if held.ready is not None:
            held.ready.synchronize()  # one batch ahead, as the loader is
        held = made
    if held.ready is not None:
        held.ready.synchronize()
    return len(files[0]) * batches / (time.perf_counter() - begin)


def main() -> None:
    """Measure, print a table last, and save after each part; a missing package is said, and is no failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", record.RESULTS)), help="folder for JSON")
    parser.add_argument("--name", default="gpu-loader", help="the file's name without .json")
    parser.add_argument(
        "--dry-run", action="store_true", help="every path on few images, on the CPU if there is no GPU"
    )
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.dry_run:
        parser.error("no CUDA device; for a dry run on the CPU give --dry-run")
    batch_size, batches = (4, 2) if given.dry_run else (256, 40)
    threads = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"benchmark": "gpu-loader", **record.circumstances(), "dry_run": given.dry_run}
    result["settings"] = {"batch_size": batch_size, "batches": batches, "threads": threads}
    failed = False
    with photographs.in_memory(None) as folder:
        parts: dict[str, Callable[[], Any]] = {
            "decode": lambda: decode_rates(folder, device, batch_size, batches, threads),
            "differences": lambda: decode_differences(folder, device, batch_size, threads),
            "loader": lambda: loader_rates(folder, device, Shape(), batch_size, batches, threads),
        }
        for name, part in parts.items():
            try:
                result[name] = part()
            except ModuleNotFoundError as error:
                result[name] = {"error": f"not installed: {error}"}
            except Exception as error:  # the other parts need not suffer it
                traceback.print_exc()
                result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
                failed = True
            record.write(given.name, given.out, result)
    print(
        f"\n{(result['gpu'] or {}).get('name', 'CPU (dry run)')}, {threads} threads, batches of {batch_size}: images/s"
    )
    for load, rate in result["decode"].items():
        print(f"{'decode, engines ' + load:24} " + (f"{rate:8.0f}" if isinstance(rate, float) else rate))
    for pair, told in result["differences"].items():
        print(f"{'pixels, ' + pair:24} " + (_told(told) if isinstance(told, dict) else told))
    for name, rate in result["loader"].items():
        print(f"{'loader, ' + name:24} " + (f"{rate['median']:8.0f}" if isinstance(rate, dict) else rate))
    raise SystemExit(failed)


def _told(found: dict[str, float]) -> str:
    unlike = f"{found['unlike']} of {found['images']} images differ"
    return f"{unlike}, by {found['max']} at most, {found['mean']:.2f} on average"


if __name__ == "__main__":
    main()
