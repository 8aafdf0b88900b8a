"""From encoded files to stored YUV and on to crops: `pack(format="yuv420")` and what the loader makes of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from pack_sets import files_in, pack_and_die
from PIL import Image
from stored_samples import scene

from slipstream import (
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    RandomHorizontalFlip,
    SlipstreamDataset,
    SlipstreamLoader,
    yuv420,
)
from slipstream.cli import main
from slipstream.inspection import inspect_source
from slipstream.pack import pack
from slipstream.source import ReadError

OPTIONS = {"format": "yuv420", "short_side": 50, "chunk_bytes": 40_000, "progress": False}
CROPS = [
    MultiRandomResizedCrop({"a": dict(size=32, interpolation="bicubic"), "b": dict(size=20)}, return_boxes=True),
    MultiCropPipeline({"a": [RandomHorizontalFlip(), Normalize()]}),
]
COUNT = 30


def size_of(number: int) -> tuple[int, int]:
    return 41 + number * 3 % 47, 45 + number * 5 % 53


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        path = folder / f"class{number % 2}" / f"{number:03}.{'png' if number % 7 == 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[274] = 6 if number == 8 else 1
        Image.fromarray(scene(number, *size_of(number))).save(path, exif=exif)
    return folder


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    done = pack(photos, folder, **OPTIONS)
    assert done.whole and done.samples == COUNT and done.chunks > 3
    return folder


def expected_pixels(data: bytes) -> np.ndarray:
    """By hand: what Pillow decodes, its short side brought down to 50, through planes and back."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if min(image.size) > 50:
        short = min(image.size)
        image = image.resize(tuple(50 if side == short else side * 50 // short for side in image.size), Image.LANCZOS)
    return yuv420.decode(np.frombuffer(yuv420.encode(np.asarray(image)), np.uint8))


def loader_of(dataset: SlipstreamDataset, **options) -> SlipstreamLoader:
    options = {"batch_size": 8, "pipelines": {"image": CROPS}, "device": "cpu", "seed": 4, "shuffle": True} | options
    return SlipstreamLoader(dataset, verbose=False, **options)


def test_samples_keep_their_fields_and_images_are_planes(photos: Path, packed: Path) -> None:
    source, stored = SlipstreamDataset(photos), SlipstreamDataset(packed)
    decoding = SlipstreamDataset(packed, decode_images=True)
    assert stored.fields == source.fields
    for old, new, pixels in zip(source, stored, decoding, strict=True):
        assert (new["label"], new["path"]) == (old["label"], old["path"])
        expected = expected_pixels(old["image"])
        assert new["image"][:7] == b"\x93YUV420" and len(new["image"]) == len(yuv420.encode(expected))
        assert np.array_equal(pixels["image"].permute(1, 2, 0), expected)


def test_the_loaders_crops_are_those_of_the_rgb(photos: Path, packed: Path, tmp_path: Path) -> None:
    for sample in SlipstreamDataset(photos):
        path = tmp_path / sample["path"]
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(expected_pixels(sample["image"])).save(path.with_suffix(".png"))
    with loader_of(SlipstreamDataset(packed)) as found, loader_of(SlipstreamDataset(tmp_path)) as expected:
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("a", "b", "a_box", "label", "_indices"))


def test_a_set_packed_again_is_the_same_or_smaller(packed: Path, tmp_path: Path) -> None:
    pack(packed, tmp_path / "same", **OPTIONS)
    pack(packed, tmp_path / "small", **{**OPTIONS, "short_side": 45})
    old, same, small = (SlipstreamDataset(folder) for folder in (packed, tmp_path / "same", tmp_path / "small"))
    for one, other, less in zip(old, same, small, strict=True):
        assert one == other
        size = yuv420.stored_size(np.frombuffer(less["image"], np.uint8))
        assert min(size) == min(45, *yuv420.stored_size(np.frombuffer(one["image"], np.uint8)))


def test_orientation_is_applied_on_request(photos: Path, tmp_path: Path) -> None:
    turned = pack(photos, tmp_path / "set", **OPTIONS, apply_exif=True)
    sizes = [yuv420.stored_size(np.frombuffer(s["image"], np.uint8)) for s in SlipstreamDataset(turned.folder)]
    for sample, (height, width) in zip(SlipstreamDataset(photos), sizes, strict=True):
        plain = expected_pixels(sample["image"]).shape[:2]
        assert (height, width) == (plain[::-1] if sample["path"].startswith("class0/008") else plain)


def test_killed_it_goes_on_to_the_same_bytes(photos: Path, packed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    options = {name: value for name, value in OPTIONS.items() if name != "progress"}
    for trial, count in enumerate((10, 14, 19)):
        assert pack_and_die(count, photos, tmp_path / str(trial), **options, num_workers=1 + trial % 2)
        with pytest.raises(FileExistsError, match=r"short_side was 50 and is None"):
            pack(photos, tmp_path / str(trial), **{**OPTIONS, "short_side": None})
        with pytest.raises(FileExistsError, match=r"format was 'yuv420' and is 'same'"):
            pack(photos, tmp_path / str(trial), chunk_bytes=40_000, progress=False)
        pack(photos, tmp_path / str(trial), **OPTIONS)
        assert files_in(tmp_path / str(trial)) == files_in(packed)


def test_what_cannot_be_decoded_is_named_or_left_out(photos: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, sample in enumerate(SlipstreamDataset(photos)):
        path = images / sample["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["image"][:300] if number in (5, 20) else sample["image"])
    with pytest.raises(ReadError, match=r"'image': .*truncated"):
        pack(images, tmp_path / "set", **OPTIONS)
    done = pack(images, tmp_path / "set", **OPTIONS, on_error="skip")
    assert [number for number, _, _ in done.skipped] == [5, 20] and done.samples == COUNT - 2
    few = pack(SlipstreamDataset(photos, max_pixels=3_000), tmp_path / "few", **OPTIONS, on_error="skip")
    large = [number for number in range(COUNT) if np.prod(size_of(number)) > 3_000]
    assert len(few.skipped) == len(large) and all("max_pixels is 3000" in reason for _, _, reason in few.skipped)


def test_a_run_does_not_go_on_in_the_other_set(photos: Path, packed: Path) -> None:
    with loader_of(SlipstreamDataset(photos)) as loader:
        next(iter(loader))
        state = loader.state_dict()
    with loader_of(SlipstreamDataset(packed)) as loader, pytest.raises(ValueError, match="dataset"):
        loader.load_state_dict(state)


def test_a_run_goes_on_with_the_same_bytes(packed: Path) -> None:
    with loader_of(SlipstreamDataset(packed)) as loader:
        whole = list(loader)
    with loader_of(SlipstreamDataset(packed)) as loader:
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
    with loader_of(SlipstreamDataset(packed), batch_size=4) as loader:
        loader.load_state_dict(state)
        rest = torch.cat([batch["a"] for batch in loader])
    assert torch.equal(rest, torch.cat([batch["a"] for batch in whole[1:]]))


def test_the_command(photos: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pack", str(photos), str(tmp_path / "set"), "--chunk-size", "40KB"]
    assert main([*command, "--short-side", "50"]) == 2
    assert "short_side=50 needs format='yuv420'" in capsys.readouterr().err
    assert main([*command, "--format", "yuv420", "--short-side", "50"]) == 0
    assert files_in(tmp_path / "set") == files_in(packed)
    assert main(["inspect", str(tmp_path / "set"), "--decode"]) == 0
    assert "yuv420 30 (100.0%)" in capsys.readouterr().out
    assert inspect_source(SlipstreamDataset(packed).source).formats == {"yuv420": COUNT}
