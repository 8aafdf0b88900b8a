"""Whole recipes on a GPU, of 256 ragged images that are decoded: DINOv2 (2x224 + 8x96, bicubic, bfloat16), and others.

Measured in one run: a large copy on the device (the ceiling, bytes read plus bytes written); for each recipe all of
`Pipeline.run` by the device's time and by the host's clock, a call with its draws, and each launch alone with its bytes
beside what explain says; then DINOv2's peers by the host's clock. Crops are checked before they are timed, against the
CPU backend on the same plans and on poisoned memory.

--only runs some parts: expect 10 s for the copy and the images, 30 s for the first recipe (compilation is in it), 15 s
for each other one, 40 s for the peers. What has run is saved at once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import traceback
from pathlib import Path
from typing import Any

import gpu_recipe_peers
import numpy as np
import photographs
import record
import timing
import torch
from gpu_batch import Batch, Shape, make_batch
from gpu_crop import TINY, copy_bandwidth
from gpu_launches import by_queue, count_bytes, run_recorded
from slipstream_kernels.ragged import RaggedBatch

from slipstream import Pipeline, presets
from slipstream.explain import launches as explained_launches

BFLOAT16 = torch.bfloat16
TINY_FOR_PEERS = Shape(images=24, long_side=80, global_side=32, local_side=16)  # enough for their statistics
EPOCHS = (0, 1, 2)  # one plan of the same images each; what they write is several times a GPU's L2 cache


def recipes(shape: Shape) -> dict[str, list[Any]]:
    """The pipelines by name, at the batch's sides."""
    sides: dict[str, Any] = {"size": shape.global_side, "local_size": shape.local_side, "dtype": BFLOAT16}
    return {
        "dinov2": presets.dinov2(blur="as_written", **sides),
        "dinov2-as-trained": presets.dinov2(blur="as_trained", **sides),
        "dino": presets.dino(**sides),
        "simclr": presets.simclr(size=shape.global_side, dtype=BFLOAT16),
        "timm": presets.supervised_train("timm", size=shape.global_side, dtype=BFLOAT16),
    }


def main() -> None:
    """Measure, print a table last, and save after each part; status 1 if a recipe failed or was wrong."""
    names = [*recipes(TINY), "peers"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", record.RESULTS)), help="folder for JSON")
    parser.add_argument("--name", default="gpu-recipe", help="the file's name without .json")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some parts (all)")
    parser.add_argument(
        "--dry-run", action="store_true", help="every path on tiny sizes, on the CPU if there is no GPU"
    )
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (given.dry_run and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("no CUDA device; for a dry run on the CPU set TRITON_INTERPRET=1 and give --dry-run")
    shape = TINY if given.dry_run else Shape()
    shape_for_peers = TINY_FOR_PEERS if given.dry_run else shape
    with photographs.in_memory(None) as folder:
        batch = make_batch(folder, shape, device, 0)
        for_peers = make_batch(folder, shape_for_peers, device, 0) if given.dry_run else batch
    result: dict[str, Any] = {"benchmark": "gpu-recipe", **record.circumstances(), "dry_run": given.dry_run}
    result["settings"] = {"images": shape.images, "dtype": "bfloat16", "epochs": [*EPOCHS]}
    result["copy"] = copy_bandwidth(device, 1 << (16 if given.dry_run else 31))
    result["recipes"], result["peers"] = {}, {}
    for name, stages in recipes(shape).items():
        if name not in given.only:
            continue
        print(f"{name} ...", flush=True)
        try:
            result["recipes"][name] = measure(stages, batch, result["copy"]["bytes_per_second"], given.dry_run)
        except Exception as error:  # the other recipes need not suffer it
            traceback.print_exc()
            result["recipes"][name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        record.write(given.name, given.out, result)
    if "peers" in given.only:
        print("peers ...", flush=True)
        result["peers"] = measure_peers(for_peers, shape_for_peers, 1 if given.dry_run else 5)
        record.write(given.name, given.out, result)
    _print_table(result)
    raise SystemExit(any("error" in measured for measured in result["recipes"].values()))


def measure(stages: list[Any], batch: Batch, copy_rate: float, dry_run: bool) -> dict[str, Any]:
    """One recipe's milliseconds, launches and bytes. Raises AssertionError for crops that are not the CPU backend's."""
    images, device = batch.images, batch.images.device
    pipeline = Pipeline(stages, seed=0)
    ids = np.arange(len(images))
    plans = [pipeline.plan(images, sample_ids=ids, epoch=epoch) for epoch in (EPOCHS[:1] if dry_run else EPOCHS)]
    on_host = RaggedBatch.from_images([array.cpu().permute(2, 0, 1) for array in batch.arrays])
    recordings, outputs = [], 0
    for plan in plans:
        expected = [*Pipeline(stages, seed=0)(on_host, plan=plan).values()]
        outputs = sum(crop.numel() * crop.element_size() for crop in expected)
        there = [crop.to(device) for crop in expected]
        recordings = [run_recorded(pipeline, images, plan, there)]
    moved = count_bytes(pipeline, plans[-1], images.sizes)
    explained = explained_launches(pipeline)
    kinds = recordings[0].kinds()
    assert len(kinds) <= len(explained), f"explain tells of {len(explained)} launches, these were made: {kinds}"

    turn = itertools.cycle(plans)
    prepared = [pipeline.prepare(images, plan, "triton") for plan in plans]
    again = itertools.cycle(prepared)  # each is free when the device has finished, which the host's clock waits for
    times = {
        "device": by_queue(
            lambda: pipeline.prepare(images, next(turn), "triton"),
            lambda ready: pipeline.run(images, ready, "triton"),
            device,
        ),
        "host": timing.by_host(lambda: pipeline.run(images, next(again), "triton"), device, 1 if dry_run else 10),
        "call": timing.by_host(lambda: pipeline(images), device, 1 if dry_run else 10),
    }
    alone = []
    for index, (kernel, launch) in enumerate(recordings[0].launches):
        row: dict[str, Any] = {"kernel": kernel, "kind": kinds[index], "milliseconds": timing.by_events(launch, device)}
        number = kinds[:index].count(kinds[index])
        same = [(read, written) for kind, read, written in moved if kind == kinds[index]]
        if len(same) == kinds.count(kinds[index]):
            row["read"], row["written"] = same[number]
            row["fraction_of_copy"] = sum(same[number]) / row["milliseconds"]["median"] * 1e3 / copy_rate
        alone.append(row)
    fewest = moved[0][1] + moved[1][1] + outputs
    return {
        "milliseconds": times,
        "launches": alone,
        "launches_milliseconds": sum(row["milliseconds"]["median"] for row in alone),
        "moved_bytes": sum(read + written for _, read, written in moved),
        "fewest_bytes": fewest,
        "fewest_fraction_of_copy": fewest / times["device"]["median"] * 1e3 / copy_rate,
        "explained": [{"kind": each.kind, "read": each.read, "written": each.written} for each in explained],
    }


def measure_peers(batch: Batch, shape: Shape, calls: int) -> dict[str, Any]:
    """Each provider's milliseconds by the host's clock and its number of images, or why it did not run."""
    torch.manual_seed(0)
    device = batch.images.device
    crops = gpu_recipe_peers.recipe(shape.global_side, shape.local_side)
    expected = gpu_recipe_peers.with_slipstream(batch.arrays, crops)()
    results: dict[str, Any] = {}
    for name, (prepare, most) in gpu_recipe_peers.PROVIDERS.items():
        arrays = batch.arrays[:most]
        try:
            call = prepare(arrays, crops)
            gpu_recipe_peers.check_peer(name, call(), [crop[:most] for crop in expected])
            results[name] = {"images": len(arrays), **timing.by_host(call, device, calls)}
        except ModuleNotFoundError as error:
            results[name] = {"error": f"not installed: {error}"}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(f"  {name}: {results[name]}", flush=True)
    return results


def _print_table(result: dict[str, Any]) -> None:
    where = (result["gpu"] or {}).get("name", "CPU (dry run)")
    print(f"\n{where}, {result['commit']}, {result['settings']['images']} images, bfloat16;", end=" ")
    print(f"copy {result['copy']['bytes_per_second'] / 1e9:.0f} GB/s")
    for name, measured in result["recipes"].items():
        if "error" in measured:
            print(f"{name:18} {measured['error']}")
            continue
        device, host, call = (measured["milliseconds"][clock]["median"] for clock in ("device", "host", "call"))
        print(f"{name:18} device {device:.3f} ms, host {host:.3f} ms, with draws {call:.3f} ms;", end=" ")
        print(f"{len(measured['launches'])} launches (explain: {len(measured['explained'])}),", end=" ")
        print(f"{measured['moved_bytes'] / 1e6:.0f} MB, {measured['fewest_bytes'] / 1e6:.0f} must move", end=" ")
        print(f"= {measured['fewest_fraction_of_copy']:.1%} of the copy")
        for row in measured["launches"]:
            share = f" = {row['fraction_of_copy']:.1%} of the copy" if "read" in row else ""
            print(f"    {row['kernel']:24} {row['milliseconds']['median']:8.3f} ms{share}")
    for name, times in result["peers"].items():
        told = times.get("error") or f"{times['median']:9.2f} ms for {times['images']} images by the host's clock"
        print(f"{name:24} {told}")


if __name__ == "__main__":
    main()
