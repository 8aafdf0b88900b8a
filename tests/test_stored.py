"""Stored YUV images through the decoder and the loader: the crops of their RGB, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_samples import assert_equal, decode, encode, make_decoder, picture, pixels
from stored_samples import BAD, Memory, damaged, png, scene, stored

from slipstream import (
    CenterCrop,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    RandomHorizontalFlip,
    SlipstreamDataset,
    SlipstreamLoader,
    yuv420,
)
from slipstream.decode import DecodeError
from slipstream.decode_rows import copy_together
from slipstream.inspection import inspect_source

CROPS = [
    MultiRandomResizedCrop({"a": dict(size=24, interpolation="bicubic"), "b": CenterCrop(32)}, return_boxes=True),
    MultiCropPipeline({"a": [RandomHorizontalFlip(), Normalize()]}),
]
# Of all parities, one below CenterCrop's size.
SIZES = [(40, 61), (41, 60), (33, 33), (90, 50), (64, 201), (40, 40), (20, 70), (47, 38)]
ENCODED = [stored(scene(index, *size)) for index, size in enumerate(SIZES)]
DECODED = [yuv420.decode(data) for data in ENCODED]
JPEG = encode(picture())
GREY = np.full((64, 64, 3), 128, np.uint8)


def test_planes_are_read_in_place(decoder) -> None:
    batch = decode(decoder, ENCODED)
    assert batch.has_planes
    assert_equal(pixels(batch), DECODED)
    assert (batch.addresses == [data.ctypes.data + 16 for data in ENCODED]).all()
    assert all(any(owner is data for owner in batch.owners) for data in ENCODED)


def test_any_others_share_the_batch(decoder) -> None:
    gif = encode(picture(1), "GIF")
    files = [JPEG, ENCODED[0], gif, ENCODED[1], png(DECODED[2])]
    (alone,), (other,) = pixels(decode(decoder, [JPEG])), pixels(decode(decoder, [gif]))
    assert_equal(pixels(decode(decoder, files)), [alone, DECODED[0], other, DECODED[1], DECODED[2]])
    assert not decode(decoder, files[::2]).has_planes


def test_bad_ones_are_named_and_harm_no_neighbour(decoder) -> None:
    files = [ENCODED[0], *(np.frombuffer(damaged(kind, bytes(ENCODED[0])), np.uint8) for kind in BAD), ENCODED[1], JPEG]
    with pytest.raises(DecodeError) as raised:
        decode(decoder, files, first_id=100)
    assert [(number, path) for number, path, _ in raised.value.failures] == [
        (101 + index, f"file-{101 + index}.jpg") for index in range(len(BAD))
    ]
    batch, reasons = decoder.decode_or_stand_in(files, range(len(files)), str, stand_in=GREY)
    for index, message in enumerate(BAD.values(), 1):
        assert message in reasons[index]
        assert np.array_equal(pixels(batch)[index], GREY)
    assert len(reasons) == len(BAD)
    found = pixels(batch)
    assert_equal([found[0], found[-2], found[-1]], [DECODED[0], DECODED[1], *pixels(decode(decoder, [JPEG]))])


def test_more_than_max_pixels_are_refused() -> None:
    decoder = make_decoder(max_pixels=40 * 61 - 1)
    with pytest.raises(DecodeError, match="2440 pixels, max_pixels is 2439"):
        decode(decoder, ENCODED[:1])
    decoder.close()


def test_one_copy_holds_all_samples_at_aligned_places() -> None:
    """What a device gets, with the CPU as the device."""
    begins, copy = copy_together(ENCODED, torch.device("cpu"), None)
    offsets = begins - copy.data_ptr()
    assert (offsets % 16 == 0).all()
    for data, offset in zip(ENCODED, offsets.tolist(), strict=True):
        assert np.array_equal(copy.numpy()[offset : offset + len(data)], data)


def make(files, **options) -> SlipstreamLoader:
    options = {"batch_size": 3, "pipelines": {"image": CROPS}, "device": "cpu", "verbose": False, "seed": 5} | options
    source = files if isinstance(files, Memory) else Memory(files)
    return SlipstreamLoader(SlipstreamDataset(source), **options)


def crops_of(loader: SlipstreamLoader) -> list[dict]:
    with loader:
        return list(loader)


def assert_same_batches(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_crops_are_those_of_the_rgb() -> None:
    large = [index for index, size in enumerate(SIZES) if min(size) >= 32]
    for files, others in (
        ([ENCODED[i] for i in large], [png(DECODED[i]) for i in large]),
        ([ENCODED[i] if i % 2 else png(DECODED[i]) for i in large], [png(DECODED[i]) for i in large]),
    ):
        assert_same_batches(crops_of(make(files, shuffle=True)), crops_of(make(others, shuffle=True)))


@pytest.mark.interpret
def test_crops_of_the_triton_kernel_are_those_of_the_cpus() -> None:
    from slipstream import RandomResizedCrop

    files = [ENCODED[0], ENCODED[2], png(DECODED[1])]
    found, expected = (
        crops_of(make(files, pipelines={"image": RandomResizedCrop(16, backend=backend)}))
        for backend in ("triton", "cpu")
    )
    assert_same_batches(found, expected)


@pytest.mark.parametrize("policy", ["replace", "skip", "resample"])
def test_bad_samples_follow_the_policy(policy: str) -> None:
    """As they do among PNGs of the same pixels: some cannot be read, decoded or cropped (SIZES[6] is below 32)."""

    def files(encode_one):
        good = [encode_one(DECODED[index % 8]) for index in range(16)]
        return [
            np.frombuffer(damaged(list(BAD)[index % len(BAD)], bytes(ENCODED[0])), np.uint8) if index % 3 == 1 else data
            for index, data in enumerate(good)
        ]

    by_pixels = {decoded.tobytes(): data for decoded, data in zip(DECODED, ENCODED, strict=True)}
    batches, reports = [], []
    for encode_one in (lambda image: by_pixels[image.tobytes()], png):
        loader = make(Memory(files(encode_one), unreadable=(3,)), on_error=policy)
        with loader:
            batches.append(list(loader))
            reports.append(loader.report())
    assert_same_batches(*batches)
    bad = [1, 3, 4, 6, 7, 10, 13, 14]
    for report in reports:
        assert [number for number, _, _ in report.bad] == bad
        reasons = {number: reason for number, _, reason in report.bad}
        assert list(BAD.values())[1] in reasons[1] and reasons[3] == "no bytes" and "CenterCrop" in reasons[6]
    numbers = [number for batch in batches[0] for number in batch["_indices"].tolist()]
    if policy == "replace":
        assert numbers == list(range(16))
        grey = [batch["b"][row] for batch in batches[0] for row in range(len(batch["b"])) if not batch["_valid"][row]]
        assert len(grey) == len(bad) and all((crop == 128).all() for crop in grey)
    else:
        assert set(numbers) <= set(range(16)) - set(bad)
        assert len(numbers) == (16 if policy == "resample" else 8)


def test_without_a_pipeline_images_are_rgb() -> None:
    for files in (ENCODED, [png(DECODED[0]), *ENCODED[1:]]):
        for options in ({}, {"batch_size": 1, "num_threads": 3}):
            images = [image for batch in crops_of(make(files, pipelines={}, **options)) for image in batch["image"]]
            assert_equal([image.permute(1, 2, 0).numpy() for image in images], DECODED)


def test_a_dataset_decodes_them() -> None:
    dataset = SlipstreamDataset(Memory(ENCODED), decode_images=True)
    assert np.array_equal(dataset[3]["image"].permute(1, 2, 0).numpy(), DECODED[3])
    files = [np.frombuffer(damaged("long", bytes(ENCODED[0])), np.uint8)]
    with pytest.raises(DecodeError, match=r"sample 0 \(memory:0\): yuv420 header says height 40 and width 61"):
        SlipstreamDataset(Memory(files), decode_images=True)[0]
    with pytest.raises(DecodeError, match="max_pixels is 10"):
        SlipstreamDataset(Memory(ENCODED), decode_images=True, max_pixels=10)[0]


def test_inspection_knows_them() -> None:
    files = [*ENCODED, np.frombuffer(damaged("short", bytes(ENCODED[0])), np.uint8)]
    found = inspect_source(Memory([*files, JPEG]), decode=True)
    assert found.formats == {"yuv420": 9, "jpeg": 1} and found.channels == {3: 10}
    assert found.undecodable is not None
    assert [(number, BAD["short"] in reason) for number, _, reason in found.undecodable] == [(8, True)]
