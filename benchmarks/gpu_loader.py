"""Images a second on a GPU: JPEG decoding alone, by its shares for the JPEG engines, and the whole loader with DINO-10.

Decoding is DALI's "mixed" through slipstream's decoder. Encoded images are in RAM, repeated to the epoch's length.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import photographs
import record
import torch
from gpu_batch import Shape

HW_LOADS = (0.65, 0.0, 0.4, 0.8, 0.9, 1.0)


def decode_rates(folder: Path, device: torch.device, batch_size: int, batches: int, threads: int) -> dict[str, Any]:
    """Images a second of decoding by the share of each batch that the JPEG engines get."""
    from slipstream import decode

    found = photographs.paths(folder)
    files = [np.fromfile(found[index % len(found)], np.uint8) for index in range(batch_size)]
    rates: dict[str, Any] = {}
    for load in HW_LOADS if device.type == "cuda" else HW_LOADS[:1]:
        with mock.patch.object(decode, "_HW_DECODER_LOAD", load):
            decoder = decode.Decoder(device=device, max_batch=batch_size, num_threads=threads, max_pixels=1 << 28)
        try:
            sizes = decoder.decode(files, range(batch_size), str).sizes.tolist()
            assert sizes == [[*photographs.decoded(found[index % len(found)]).shape[:2]] for index in range(batch_size)]
            rates[str(load)] = _decode_rate(decoder, files, batches)
        finally:
            decoder.close()
        print(f"  decode, hw_decoder_load {load}: {rates[str(load)]:.0f} images/s", flush=True)
    return rates


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


def _decode_rate(decoder: Any, files: list[np.ndarray], batches: int) -> float:
    held = decoder.decode(files, range(len(files)), str)
    begin = time.perf_counter()
    for _ in range(batches):
        made = decoder.decode(files, range(len(files)), str)
        if held.ready is not None:
            held.ready.synchronize()  # one batch ahead, as the loader is
        held = made
    if held.ready is not None:
        held.ready.synchronize()
    return len(files) * batches / (time.perf_counter() - begin)


def main() -> None:
    """Measure, print a table last, and save; a missing package is said, and is no failure."""
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
    with photographs.in_memory(None) as folder:
        parts: dict[str, Callable[[], Any]] = {
            "decode": lambda: decode_rates(folder, device, batch_size, batches, threads),
            "loader": lambda: loader_rates(folder, device, Shape(), batch_size, batches, threads),
        }
        for name, part in parts.items():
            try:
                result[name] = part()
            except ModuleNotFoundError as error:
                result[name] = {"error": f"not installed: {error}"}
            record.write(given.name, given.out, result)
    print(
        f"\n{(result['gpu'] or {}).get('name', 'CPU (dry run)')}, {threads} threads, batches of {batch_size}: images/s"
    )
    for load, rate in result["decode"].items():
        print(f"{'decode, engines ' + load:24} " + (f"{rate:8.0f}" if isinstance(rate, float) else rate))
    for name, rate in result["loader"].items():
        print(f"{'loader, ' + name:24} " + (f"{rate['median']:8.0f}" if isinstance(rate, dict) else rate))


if __name__ == "__main__":
    main()
