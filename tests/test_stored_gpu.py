"""Stored YUV images on a GPU: one copy, no wait of the host, the CPU's bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_samples import encode, picture
from stored_samples import BAD, Memory, damaged, scene, stored

from slipstream import MultiCropPipeline, MultiRandomResizedCrop, Normalize, SlipstreamDataset, SlipstreamLoader, yuv420
from slipstream.decode import Decoder

pytestmark = pytest.mark.gpu

ENCODED = [stored(scene(index, 60 + 7 * (index % 5), 90 + index)) for index in range(32)]
PIPELINE = [
    MultiRandomResizedCrop({"a": dict(size=48, interpolation="bicubic"), "b": dict(size=24)}),
    MultiCropPipeline({"a": [Normalize(dtype=torch.bfloat16)]}),
]


@pytest.fixture
def decoder():
    pytest.importorskip("nvidia.dali")
    decoder = Decoder(device=torch.device("cuda"), max_batch=64, num_threads=2, max_pixels=10**7)
    yield decoder
    decoder.close()


def decode(decoder: Decoder, encoded: list[np.ndarray]):
    return decoder.decode(encoded, range(len(encoded)), str)


def on_host(batch) -> list[np.ndarray]:
    batch.wait_on_current_stream()
    return [batch.image(index).permute(1, 2, 0).cpu().numpy() for index in range(len(batch))]


def test_pixels_are_the_laws_and_the_host_does_not_wait(decoder) -> None:
    batches = [decode(decoder, ENCODED) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches += [decode(decoder, ENCODED[::-1]) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for index, batch in enumerate(batches):
        found = on_host(batch) if index < 3 else on_host(batch)[::-1]
        assert all(np.array_equal(one, yuv420.decode(data)) for one, data in zip(found, ENCODED, strict=True))


def test_bytes_may_change_once_the_call_returned(decoder) -> None:
    expected = [yuv420.decode(data) for data in ENCODED]
    for _ in range(10):
        copies = [data.copy() for data in ENCODED]
        batch = decode(decoder, copies)
        for data in copies:
            data[16:] = 77
        assert all(np.array_equal(*pair) for pair in zip(on_host(batch), expected, strict=True))


def test_jpegs_and_bad_ones_share_the_batch(decoder) -> None:
    wrong = [np.frombuffer(damaged(kind, bytes(ENCODED[0])), np.uint8) for kind in BAD]
    jpeg = encode(picture())
    grey = np.full((64, 64, 3), 128, np.uint8)
    batch, reasons = decoder.decode_or_stand_in(
        [ENCODED[0], jpeg, *wrong, ENCODED[1]], range(3 + len(wrong)), str, stand_in=grey
    )
    assert sorted(reasons) == list(range(2, 2 + len(wrong)))
    found = on_host(batch)
    assert np.array_equal(found[0], yuv420.decode(ENCODED[0])) and np.array_equal(found[-1], yuv420.decode(ENCODED[1]))
    assert np.array_equal(found[1], on_host(decode(decoder, [jpeg]))[0])
    assert all(np.array_equal(image, grey) for image in found[2:-1])


def test_the_loaders_crops_are_the_cpus() -> None:
    def batches(device: str) -> list[dict]:
        options = {"pipelines": {"image": PIPELINE}, "seed": 3, "shuffle": True, "verbose": False}
        with SlipstreamLoader(SlipstreamDataset(Memory(ENCODED)), 8, device=device, **options) as loader:
            return list(loader)

    pytest.importorskip("nvidia.dali")
    for one, other in zip(batches("cuda"), batches("cpu"), strict=True):
        assert one["a"].is_cuda and all(torch.equal(one[name].cpu(), other[name]) for name in one)
