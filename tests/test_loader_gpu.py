"""The loader on a GPU: the CPU kernel's bytes from the same pixels, and no wait of the host in the steady state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream_kernels.ragged import RaggedBatch

from slipstream import MultiCropPipeline, MultiRandomResizedCrop, Normalize, RandomHorizontalFlip, RandomResizedCrop
from slipstream.dataset import SlipstreamDataset

pytestmark = pytest.mark.gpu

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


def loader_of(data: SlipstreamDataset, pipeline=None, **options):
    pytest.importorskip("nvidia.dali")
    from slipstream import SlipstreamLoader

    pipelines = {} if pipeline is None else {"image": pipeline}
    return SlipstreamLoader(data, 16, pipelines=pipelines, **{"device": "cuda", "verbose": False, **options})


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


def test_the_host_never_waits_in_the_steady_state(data: SlipstreamDataset) -> None:
    """torch's own waits are errors here; DALI's are not seen (profile for cudaStreamSynchronize)."""
    with loader_of(data, PIPELINE) as loader:
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
