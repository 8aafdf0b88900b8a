"""Decoding on the CPU: Pillow's pixels, bad samples named, good neighbours untouched."""

import csv
import io
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from decode_samples import (
    MAX_PIXELS,
    assert_equal,
    by_pillow,
    decode,
    encode,
    jpegs,
    make_decoder,
    picture,
    pixels,
)
from PIL import Image, ImageOps, UnidentifiedImageError

from slipstream.decode import DecodeError
from slipstream.decode_dali import DaliPipeline, takes
from slipstream.decode_pillow import decode_with_pillow
from slipstream.header import read_header


@pytest.fixture(scope="module")
def shared():
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared files beside the checkout")
    return folder


def oversized():
    """A small JPEG whose frame header says 30000 x 30000."""
    data = bytearray(jpegs(1)[0])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (30000).to_bytes(2, "big") * 2
    return np.frombuffer(bytes(data), np.uint8)


def test_what_is_no_image_is_described_by_its_bytes():
    with pytest.raises(UnidentifiedImageError, match="no image that Pillow knows: 5 bytes, beginning b'hello'"):
        decode_with_pillow(np.frombuffer(b"hello", np.uint8))


def test_equals_pillow_on_real_photos(shared, decoder):
    files = sorted((shared / "photos").rglob("*.jpg"))
    assert len(files) > 100
    for start in range(0, len(files), 64):
        encoded = [np.fromfile(file, np.uint8) for file in files[start : start + 64]]
        expected = [by_pillow(data) for data in encoded]
        assert_equal(pixels(decode(decoder, encoded)), expected)
        assert_equal([decode_with_pillow(data) for data in encoded], expected)


def test_batches_of_any_size_give_the_same_pixels(decoder):
    encoded = jpegs(64)
    expected = [by_pillow(data) for data in encoded]
    for count in (64, 1, 7, 64, 0):
        batch = decode(decoder, encoded[:count])
        assert batch.device == torch.device("cpu")
        assert batch.ready is None
        assert batch.sizes.tolist() == [list(image.shape[:2]) for image in expected[:count]]
        assert_equal(pixels(batch), expected[:count])


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("JPEG", mode) for mode in ("L", "CMYK")),
        *(("PNG", mode) for mode in ("L", "1", "P", "LA", "RGBA")),
        *(("BMP", mode) for mode in ("L", "1", "P", "RGBA")),
        *(("WEBP", mode) for mode in ("L", "RGBA")),
        *(("TIFF", mode) for mode in ("L", "1", "P", "LA", "RGBA", "CMYK")),
        *(("JPEG2000", mode) for mode in ("L", "LA", "RGBA")),
    ],
)
def test_pixels_of_other_modes_come_as_rgb(decoder, format, mode):
    data = encode(picture().convert(mode), format)
    (got,) = pixels(decode(decoder, [data]))
    expected = by_pillow(data)
    np.testing.assert_array_equal(got, expected)


def test_16_bit_grey_is_scaled_not_clipped(decoder):
    values = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    data = encode(Image.fromarray(values), "PNG")
    expected = np.round(values / 257).astype(np.uint8)
    (got,) = pixels(decode(decoder, [data]))
    for channel in range(3):
        np.testing.assert_array_equal(got[:, :, channel], expected)
    np.testing.assert_array_equal(decode_with_pillow(data), got)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_comes_as_pillows_high_bytes(decoder, colour, channels):
    """Pillow reads such PNGs and writes none."""
    values = np.random.default_rng(0).integers(0, 65536, (60, 90, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 90, 60, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(data)) + kind + data for kind, data in chunks]
    file = b"\x89PNG\r\n\x1a\n" + b"".join(chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in packed)
    data = np.frombuffer(file, np.uint8)
    (got,) = pixels(decode(decoder, [data]))
    np.testing.assert_array_equal(got, by_pillow(data))
    np.testing.assert_array_equal(got[:, :, 0], values[:, :, 0] >> 8)


@pytest.mark.parametrize("limit", [1, 15, 100])
def test_pnm_values_are_scaled_by_their_maximum(decoder, limit):
    values = np.asarray(picture()).astype(int) * limit // 255
    data = np.frombuffer(b"P6 90 60 %d\n" % limit + values.astype(np.uint8).tobytes(), np.uint8)
    (got,) = pixels(decode(decoder, [data]))
    np.testing.assert_allclose(got, values * 255 / limit, atol=0.5)


def test_float_pixels_are_refused_by_name(decoder):
    with pytest.raises(DecodeError, match="mode 'F'"):
        decode(decoder, [encode(picture().convert("F"), "TIFF")])


def test_a_jpeg2000_that_ends_dalis_process_never_reaches_it(decoder, monkeypatch):
    """Cut, it crashes DALI 2.4; what DALI is given must not depend on the damage."""
    seen = []
    run = decoder._pipeline.run
    monkeypatch.setattr(decoder._pipeline, "run", lambda encoded, stream: seen.extend(encoded) or run(encoded, stream))
    whole = encode(picture(), "JPEG2000")
    bare = whole[whole.tobytes().index(b"\xff\x4f\xff\x51") :]  # the code stream without its boxes
    good = jpegs(1)[0]
    for data in (whole, bare):
        assert_equal(pixels(decode(decoder, [good, data]))[1:], [by_pillow(data)])
        with pytest.raises(DecodeError):
            decode(decoder, [good, data[: len(data) // 2]])
    assert seen and all(data is good for data in seen)


@pytest.mark.parametrize("change", [b"junk", b"\0" * 7, -1, -2, -30])
def test_webps_that_are_not_as_long_as_they_say_are_pillows(decoder, change):
    for options in ({}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*" + bytes(20)}):
        whole = encode(picture().convert("RGBA"), "WEBP", **options)
        assert takes(read_header(whole), whole)
        data = whole[:change] if isinstance(change, int) else np.concatenate([whole, np.frombuffer(change, np.uint8)])
        assert not takes(read_header(data), data)
        try:
            expected = by_pillow(data)
        except OSError:
            with pytest.raises(DecodeError):
                decode(decoder, [data])
        else:
            assert_equal(pixels(decode(decoder, [data])), [expected])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_on_request_only(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # The last goes to Pillow, which turns a TIFF whether asked or not.
    encoded = [encode(picture(), format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF")]
    for apply_exif in (False, True):
        decoder = make_decoder(apply_exif=apply_exif)
        expected = [Image.open(io.BytesIO(data)) for data in encoded]
        if apply_exif:
            expected = [ImageOps.exif_transpose(image) for image in expected]
        expected = [np.asarray(image.convert("RGB")) for image in expected]
        assert_equal(pixels(decode(decoder, encoded)), expected)
        assert_equal([decode_with_pillow(data, apply_exif=apply_exif) for data in encoded], expected)
        decoder.close()


def test_what_dali_refuses_pillow_decodes(decoder, monkeypatch):
    run = DaliPipeline.run
    refused = encode(picture(7))

    def refuse(self, encoded, stream):
        if any(data is refused for data in encoded):
            raise RuntimeError("not this one")
        return run(self, encoded, stream)

    monkeypatch.setattr(DaliPipeline, "run", refuse)
    gif = encode(picture().convert("P"), "GIF")  # goes to Pillow at once
    encoded = [*jpegs(3), gif, refused, *jpegs(2, first=9)]
    assert_equal(pixels(decode(decoder, encoded)), [by_pillow(data) for data in encoded])


def test_what_dali_refused_once_does_not_fail_its_batch_again(decoder, monkeypatch):
    run, calls = DaliPipeline.run, []
    refused = encode(picture(7))

    def refuse(self, encoded, stream):
        calls.append(len(encoded))
        if any(data is refused for data in encoded):
            raise RuntimeError("not this one")
        return run(self, encoded, stream)

    monkeypatch.setattr(DaliPipeline, "run", refuse)
    encoded = [*jpegs(3), refused]
    expected = [by_pillow(data) for data in encoded]
    for _ in range(3):
        assert_equal(pixels(decode(decoder, encoded, first_id=50)), expected)
    assert calls == [4, 1, 1, 1, 1, 3, 3]
    decode(decoder, encoded, first_id=60)  # others, who knows
    assert calls[7:] == [4, 1, 1, 1, 1]


def test_a_want_of_memory_is_not_taken_for_a_refusal(decoder, monkeypatch):
    """All images fail, and alone too: Pillow decodes them, this time."""
    encoded = jpegs(4)
    expected = [by_pillow(data) for data in encoded]
    calls, run = [], DaliPipeline.run

    def run_out_of_memory(self, encoded, stream):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(DaliPipeline, "run", run_out_of_memory)
        with pytest.warns(RuntimeWarning, match=r"each of its images, which Pillow decoded: out of memory"):
            assert_equal(pixels(decode(decoder, encoded)), expected)
    monkeypatch.setattr(DaliPipeline, "run", lambda self, *args: calls.append(len(args[0])) or run(self, *args))
    assert_equal(pixels(decode(decoder, encoded)), expected)
    assert calls == [4]


def test_a_gpus_pipeline_begins_with_a_full_batch_of_which_all_is_the_engines(monkeypatch):
    """How many images the JPEG engines get at most is settled by the first; the rest is decoded by other means."""
    from nvidia.dali import fn

    made = []

    class Fake:
        def __init__(self, **options):
            self.options, self.fed, self.ran = options, [], []
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def set_outputs(self, outputs):
            self.outputs = outputs

        def build(self):
            pass

        def feed_input(self, name, encoded):
            self.fed.append([by_pillow(data).shape for data in encoded])

        def run(self, stream):
            self.ran.append(stream)
            return (None,)

    monkeypatch.setattr("nvidia.dali.pipeline.Pipeline", Fake)
    monkeypatch.setattr(fn, "external_source", lambda **options: None)
    monkeypatch.setattr(fn.decoders, "image", lambda data, **options: options)
    pipeline = DaliPipeline(torch.device("cuda", 1), max_batch=5, num_threads=3, apply_exif=False)
    pipeline.run([jpegs(1)[0]], "a stream")
    pipeline.run([jpegs(1)[0]], "a stream")
    (fake,) = made
    assert fake.options["device_id"] == 1
    assert fake.outputs["device"] == "mixed"
    assert fake.outputs["hw_decoder_load"] == 1.0
    assert [len(batch) for batch in fake.fed] == [5, 1, 1]
    assert fake.ran == [None, "a stream", "a stream"]
    DaliPipeline(torch.device("cuda", 1), max_batch=1, num_threads=3, apply_exif=False).build()
    assert made[1].fed == []


def test_a_bad_sample_is_named_and_its_neighbours_stay_as_they_were(decoder):
    good = jpegs(10)
    expected = [by_pillow(data) for data in good]
    bad = {
        2: good[2][: len(good[2]) // 2],
        5: np.frombuffer(b"no image at all", np.uint8),
        7: np.empty(0, np.uint8),
        8: oversized(),
    }
    encoded = [bad.get(i, data) for i, data in enumerate(good)]
    with pytest.raises(DecodeError) as caught:
        decode(decoder, encoded, first_id=100)
    error = caught.value
    assert [(sample_id, path) for sample_id, path, _ in error.failures] == [
        (100 + row, f"file-{100 + row}.jpg") for row in bad
    ]
    for sample_id, path, reason in error.failures:
        assert f"sample {sample_id} ({path}): {reason}" in str(error)
        assert reason
    assert "height 30000 and width 30000" in error.failures[3][2]
    assert str(MAX_PIXELS) in error.failures[3][2]
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.failures, str(copy)) == (error.failures, str(error))
    assert_equal(pixels(decode(decoder, good)), expected)  # and it goes on


def test_a_batch_that_fails_without_a_bad_image_is_decoded_with_a_warning(decoder, monkeypatch):
    encoded = jpegs(5)
    run = DaliPipeline.run

    def run_out_of_memory(self, encoded, stream):
        if len(encoded) > 1:
            raise RuntimeError("out of memory")
        return run(self, encoded, stream)

    with monkeypatch.context() as patched:
        patched.setattr(DaliPipeline, "run", run_out_of_memory)
        with pytest.warns(RuntimeWarning, match="out of memory"):
            got = pixels(decode(decoder, encoded))
    assert_equal(got, [by_pillow(data) for data in encoded])
    assert_equal(pixels(decode(decoder, encoded)), got)


def test_refuses_many_pixels_before_any_decoder_sees_them():
    decoder = make_decoder(max_pixels=90 * 60)
    decode(decoder, [encode(picture())])
    begin = time.perf_counter()
    for data in (oversized(), encode(picture(size=(91, 60))), encode(picture(size=(91, 60)), "PNG")):
        with pytest.raises(DecodeError, match="max_pixels is 5400"):
            decode(decoder, [data])
    with pytest.raises(DecodeError, match="max_pixels is 5400"):  # in a format that only Pillow knows
        decode(decoder, [encode(picture(size=(91, 60)), "GIF")])
    assert time.perf_counter() - begin < 2
    decoder.close()


@pytest.mark.filterwarnings("error")
def test_pillows_warnings_do_not_fail_a_sample(decoder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 60 - 1)
    gif = encode(picture().convert("P"), "GIF")
    np.testing.assert_array_equal(pixels(decode(decoder, [gif]))[0], decode_with_pillow(gif))


def test_hostile_files_never_harm_good_neighbours(shared, decoder):
    folder = shared / "hostile"
    good = jpegs(2)
    expected = [by_pillow(data) for data in good]
    begin = time.perf_counter()
    decoded = 0
    with open(folder / "MANIFEST.csv", newline="") as manifest:
        for entry in csv.DictReader(manifest):
            data = np.fromfile(folder / entry["file"], np.uint8)
            opens = entry["expect"] in ("ok", "ok_not_jpeg")
            failures = ()
            try:
                got = pixels(decode(decoder, [good[0], data, good[1]]))
            except DecodeError as error:
                failures = error.failures
            if failures:
                assert [sample_id for sample_id, _, _ in failures] == [1], entry["file"]
                assert not (opens and entry["rgb_mean"]), entry["file"]
                continue
            assert_equal([got[0], got[2]], expected)
            if opens and entry["rgb_mean"]:
                mean = [float(value) for value in entry["rgb_mean"].split("/")]
                # The manifest's means are whole numbers; CMYK decoders differ by 1.
                np.testing.assert_allclose(got[1].mean((0, 1)), mean, atol=1.6, err_msg=entry["file"])
                decoded += 1
    assert decoded > 150
    assert time.perf_counter() - begin < 30


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_batch": 0}, "max_batch must be >= 1, got 0"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be >= 1, got 0"),
        ({"device": torch.device("meta")}, "device must be a CPU or CUDA device, got meta"),
    ],
)
def test_bad_arguments_are_named(options, reason):
    with pytest.raises(ValueError, match=reason):
        make_decoder(**options)


def test_too_many_images_or_ids_are_named():
    decoder = make_decoder(max_batch=2)
    with pytest.raises(ValueError, match="max_batch=2 images, got 3"):
        decode(decoder, jpegs(3))
    with pytest.raises(ValueError, match="got 2 and 1"):
        decoder.decode(jpegs(2), [0], str)
    decoder.close()
