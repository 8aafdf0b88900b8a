"""The loader on a GPU: the CPU kernel's bytes from the same pixels, and no wait of the host in the steady state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream_kernels.ragged import RaggedBatch

from slipstream import (
    CutMix,
    FiveCrop,
    GaussianBlur,
    MixUp,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    NamedCopies,
    Normalize,
    RandomBatchChoice,
    RandomHorizontalFlip,
    RandomResizedCrop,
    presets,
)
from slipstream.batch_stage import apply_batch_stages, batch_stage_keys
from slipstream.dataset import SlipstreamDataset

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

CROPS = {
    "global": dict(size=224, scale=(0.4, 1.0), interpolation="bicubic"),
    "local": dict(size=96, scale=(0.05, 0.4)),
}
STAGES = {"global": [RandomHorizontalFlip(), Normalize(dtype=torch.bfloat16)]}
PIPELINE = [MultiRandomResizedCrop(CROPS, return_boxes=True), MultiCropPipeline(STAGES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SlipstreamDataset:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(96):
        height, width = rng.integers(100, 400, 2)
        blocks = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)[:height, :width]).save(root / f"{index:03}.jpg", quality=92)
    return SlipstreamDataset(local_dir=root)


@pytest.fixture(scope="module")
def labelled(data: SlipstreamDataset, tmp_path_factory: pytest.TempPathFactory) -> SlipstreamDataset:
    root = tmp_path_factory.mktemp("classes")
    for index in range(64):
        path = root / f"class_{index % 4}" / f"{index:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data[index]["image"])
    return SlipstreamDataset(local_dir=root)


def loader_of(data: SlipstreamDataset, pipeline=None, **options):
    pytest.importorskip("nvidia.dali")
    from slipstream import SlipstreamLoader

    pipelines = {} if pipeline is None else {"image": pipeline}
    return SlipstreamLoader(data, 16, pipelines=pipelines, **{"device": DEVICE, "verbose": False, **options})


def test_crops_are_the_cpu_kernels_on_the_same_pixels(data: SlipstreamDataset) -> None:
    with loader_of(data, seed=3) as plain, loader_of(data, PIPELINE, seed=3) as cropping:
        for decoded, batch in zip(plain, cropping, strict=True):
            ids = batch["_indices"]
            assert torch.equal(decoded["_indices"], ids)
            on_cpu = [image.cpu() for image in decoded["image"]]
            crops = MultiRandomResizedCrop(CROPS, seed=3)(on_cpu, sample_ids=ids)
            crops = MultiCropPipeline(STAGES, seed=3)(crops, sample_ids=ids)
            for name in ("global", "local"):
                assert batch[name].is_cuda and torch.equal(batch[name].cpu(), crops[name]), name


MIXING = {"batch_stages": [RandomBatchChoice([MixUp(num_classes=1000), CutMix(num_classes=1000)])]}
STEADY = {
    "flips": (PIPELINE, {}),
    "dinov2": (presets.dinov2(dtype=torch.bfloat16), {"on_error": "replace"}),
    "dino": (presets.dino(), {"return_plan": True}),
    "timm": (presets.supervised_train(style="timm"), {}),
    "copies": ([RandomResizedCrop(64), NamedCopies(["a", "b"]), MultiCropPipeline({"b": [GaussianBlur(9)]})], {}),
    "list": (FiveCrop(64), {"tail": "pad", "rank": 1, "world_size": 2}),
}


@pytest.mark.parametrize("name", STEADY)
def test_the_host_never_waits_in_the_steady_state(data: SlipstreamDataset, name: str) -> None:
    """torch's own waits are errors here; DALI's are not seen (profile for cudaStreamSynchronize)."""
    pipeline, options = STEADY[name]
    with loader_of(data, pipeline, **options) as loader:
        list(loader)
        iterator = iter(loader)
        for _ in range(2):
            next(iterator)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = list(iterator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(batches) == len(loader) - 2


def test_mixing_does_not_wait_and_is_the_cpus(labelled: SlipstreamDataset) -> None:
    stages = [RandomResizedCrop(64), Normalize()]
    with loader_of(labelled, stages, seed=2, **MIXING) as loader, loader_of(labelled, stages, seed=2) as plain:
        list(loader)
        loader.set_epoch(0)
        iterator = iter(loader)
        first = next(iterator)
        torch.cuda.set_sync_debug_mode("error")
        try:
            rest = list(iterator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(rest) == len(loader) - 1
        unmixed = next(iter(plain))
        (stage,), ids = MIXING["batch_stages"], unmixed["_indices"].numpy()
        on_cpu = {"image": unmixed["image"].cpu(), "label": unmixed["label"].cpu()}
        expected, _ = apply_batch_stages([stage], batch_stage_keys([stage], 2), on_cpu, ids, 0)
        assert torch.allclose(first["image"].cpu(), expected["image"], atol=1e-6)
        assert torch.allclose(first["label"].cpu(), expected["label"], atol=1e-6)


@pytest.mark.parametrize("policy", ["replace", "skip", "resample"])
def test_bad_samples_leave_their_neighbours_alone(tmp_path: Path, data: SlipstreamDataset, policy: str) -> None:
    for index in range(20):
        encoded = data[index]["image"]
        (tmp_path / f"{index:02}.jpg").write_bytes(encoded[: len(encoded) // 2] if index % 5 == 3 else encoded)
    some = SlipstreamDataset(local_dir=tmp_path)
    with loader_of(some, PIPELINE, seed=3, on_error=policy) as loader, loader_of(data, PIPELINE, seed=3) as whole:
        good = {n: crop for batch in whole for n, crop in zip(batch["_indices"].tolist(), batch["global"], strict=True)}
        for batch in loader:
            for row, number in enumerate(batch["_indices"].tolist()):
                if policy == "replace" and number % 5 == 3:
                    assert not batch["_valid"][row]
                else:
                    assert number % 5 != 3 and torch.equal(batch["global"][row], good[number])
        assert [number for number, _, _ in loader.report().bad] == [3, 8, 13, 18]


def test_a_run_goes_on_with_the_same_bytes(data: SlipstreamDataset) -> None:
    stages = presets.dino(local_crops=2)
    with loader_of(data, stages, shuffle=True, seed=4) as loader:
        iterator = iter(loader)
        next(iterator), next(iterator)
        state = loader.state_dict()
        rest = list(iterator)
    with loader_of(data, stages, shuffle=True, seed=4) as other:
        other.load_state_dict(state)
        for batch, again in zip(rest, other, strict=True):
            assert torch.equal(batch["_indices"], again["_indices"])
            assert all(torch.equal(batch[name], again[name]) for name in ("global_0", "global_1", "local_0"))


def test_crops_wait_for_pixels_that_another_stream_still_writes() -> None:
    """A side stream sleeps, then writes: without the wait for `ready` the crop would be of what lay there before."""
    final = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8, device="cuda")
    pixels = torch.zeros_like(final)
    crop = RandomResizedCrop(32)
    crop(final, sample_ids=[0])  # compiled, so that the launch below comes while the side stream sleeps
    torch.cuda.synchronize()
    side, ready = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)
        pixels.copy_(final)
        ready.record(side)
    batch = dataclasses.replace(RaggedBatch.from_images(pixels), ready=ready)
    assert bool((crop(batch, sample_ids=[0]) == 200).all())


def test_images_without_a_pipeline_are_the_users_to_keep(data: SlipstreamDataset) -> None:
    """DALI reuses its memory; these are read after it had every reason to."""
    with loader_of(data) as loader:
        kept = [image for batch in loader for image in batch["image"]]
        loader.set_epoch(0)
        copies = [image.cpu() for batch in loader for image in batch["image"]]
    assert all(torch.equal(image.cpu(), copy) for image, copy in zip(kept, copies, strict=True))


def test_an_iterator_dropped_in_flight_keeps_what_the_stream_still_reads(data: SlipstreamDataset) -> None:
    with loader_of(data, PIPELINE) as loader:
        expected = next(iter(loader))["global"].clone()
        for _ in range(5):
            loader.set_epoch(0)
            torch.cuda._sleep(20_000_000)
            batch = next(iter(loader))  # the iterator goes at once, its kernels have not begun
            assert torch.equal(batch["global"], expected)
