"""Decoding on the CPU: Pillow's pixels, bad samples named, good neighbours untouched, nothing left behind."""

import csv
import gc
import io
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from slipstream.decode import DecodeError, Decoder, decode_with_pillow

MAX_PIXELS = 178_956_970


@pytest.fixture(scope="module")
def shared():
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared files beside the checkout")
    return folder


def make_decoder(**options):
    return Decoder(
        **({"device": torch.device("cpu"), "max_batch": 64, "num_threads": 2, "max_pixels": MAX_PIXELS} | options)
    )


@pytest.fixture
def decoder():
    decoder = make_decoder()
    yield decoder
    decoder.close()


def picture(seed=0, size=(90, 60)):
    """Smooth noise, so that JPEG keeps its detail."""
    small = np.random.default_rng(seed).integers(0, 256, (size[1] // 6 + 1, size[0] // 6 + 1, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encode(image, format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


def jpegs(count, first=0):
    return [encode(picture(first + i, (40 + 5 * (i % 9), 30 + 7 * (i % 5)))) for i in range(count)]


def decode(decoder, encoded, first_id=0):
    return decoder.decode(encoded, range(first_id, first_id + len(encoded)), lambda i: f"file-{i}.jpg")


def pixels(batch):
    """Copies, so that they outlive the batch."""
    return [batch.image(i).permute(1, 2, 0).numpy().copy() for i in range(len(batch))]


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def oversized():
    """A small JPEG whose frame header says 30000 x 30000."""
    data = bytearray(jpegs(1)[0])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (30000).to_bytes(2, "big") * 2
    return np.frombuffer(bytes(data), np.uint8)


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
    assert got.shape == expected.shape
    assert abs(got.astype(int) - expected).max() <= (1 if mode == "CMYK" else 0)


def test_16_bit_grey_is_scaled_not_clipped(decoder):
    values = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    data = encode(Image.fromarray(values), "PNG")
    expected = np.round(values / 257).astype(np.uint8)
    (got,) = pixels(decode(decoder, [data]))
    for channel in range(3):
        np.testing.assert_array_equal(got[:, :, channel], expected)
    np.testing.assert_array_equal(decode_with_pillow(data), got)


@pytest.mark.parametrize("limit", [1, 15, 100])
def test_pnm_values_are_scaled_by_their_maximum(decoder, limit):
    values = np.asarray(picture()).astype(int) * limit // 255
    data = np.frombuffer(b"P6 90 60 %d\n" % limit + values.astype(np.uint8).tobytes(), np.uint8)
    (got,) = pixels(decode(decoder, [data]))
    np.testing.assert_allclose(got, values * 255 / limit, atol=0.5)


def test_float_pixels_are_refused_by_name(decoder):
    with pytest.raises(DecodeError, match="mode 'F'"):
        decode(decoder, [encode(picture().convert("F"), "TIFF")])


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


def test_what_dali_refuses_pillow_decodes(decoder):
    gif = encode(picture().convert("P"), "GIF")
    encoded = [*jpegs(3), gif, *jpegs(2, first=9)]
    assert_equal(pixels(decode(decoder, encoded)), [by_pillow(data) for data in encoded])


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


def test_held_pixels_outlive_later_batches_and_the_decoder():
    decoder = make_decoder(max_batch=8)
    encoded = jpegs(8)
    expected = [by_pillow(data) for data in encoded]
    held = [decode(decoder, encoded), decode(decoder, [*encoded[:3], encode(picture(4).convert("P"), "GIF")])]
    single = decode(decoder, encoded[:1]).image(0)  # the view alone keeps its memory
    for i in range(10):
        decode(decoder, jpegs(8, first=20 + 8 * i))
    with pytest.raises(DecodeError):
        decode(decoder, [encoded[0], encoded[1][:200]])
    decoder.close()
    del decoder
    gc.collect()
    another = make_decoder(max_batch=8)
    decode(another, jpegs(8, first=200))
    assert_equal(pixels(held[0]), expected)
    assert_equal(pixels(held[1])[:3], expected[:3])
    np.testing.assert_array_equal(single.permute(1, 2, 0).numpy(), expected[0])
    another.close()


def test_encoded_bytes_are_let_go_when_the_call_returns(tmp_path, decoder):
    encoded = jpegs(6)
    (tmp_path / "data.bin").write_bytes(b"".join(bytes(data) for data in encoded))
    with open(tmp_path / "data.bin", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    whole = np.frombuffer(mapped, np.uint8)
    ends = np.cumsum([len(data) for data in encoded])
    views = [whole[end - len(data) : end] for data, end in zip(encoded, ends, strict=True)]
    batch = decode(decoder, views)
    with pytest.raises(DecodeError):
        decode(decoder, [views[0], views[1][:300]])
    del whole, views
    gc.collect()
    mapped.close()  # raises BufferError while anyone holds a view; afterwards DALI would crash if it read one
    assert_equal(pixels(batch), [by_pillow(data) for data in encoded])
    assert_equal(pixels(decode(decoder, encoded)), pixels(batch))


def test_other_threads_run_while_a_batch_is_decoded(decoder):
    encoded = [encode(picture(i, (700, 500))) for i in range(32)]
    decode(decoder, encoded)
    ticks = 0
    thread = threading.Thread(target=decode, args=(decoder, encoded))
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks >= 10  # with the GIL held it would be one or two


def test_threads_may_share_a_decoder(decoder):
    results = {}

    def work(number):
        for i in range(5):
            encoded = jpegs(4 + number, first=number)
            results[number, i] = (pixels(decode(decoder, encoded)), [by_pillow(data) for data in encoded])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for got, expected in results.values():
        assert_equal(got, expected)


def held_by_process():
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["close", "drop"])
def test_nothing_stays_after_close_or_drop(how):
    def use():
        decoder = make_decoder()
        decode(decoder, jpegs(5))
        with pytest.raises(DecodeError):
            decode(decoder, [np.zeros(9, np.uint8), *jpegs(2), jpegs(1)[0][:100]])
        if how == "close":
            decoder.close()
            decoder.close()

    use()
    use()
    before = held_by_process()
    for _ in range(5):
        use()
    assert held_by_process() == before


def test_a_closed_decoder_says_so(decoder):
    decoder.close()
    with pytest.raises(RuntimeError, match="closed"):
        decode(decoder, jpegs(1))


def in_forked_child(work):
    """Run `work` in a forked child and return its exit status; a hang ends it with SIGALRM."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_refused_and_does_not_hang():
    decoder = make_decoder()
    encoded = jpegs(3)
    expected = pixels(decode(decoder, encoded))

    def child():
        nonlocal decoder
        with pytest.raises(RuntimeError, match="fork"):
            decode(decoder, encoded)
        decoder.close()
        decoder = None
        gc.collect()
        own = make_decoder()
        assert_equal(pixels(decode(own, encoded)), expected)
        own.close()

    assert in_forked_child(child) == 0
    assert_equal(pixels(decode(decoder, encoded)), expected)  # the parent's goes on
    decoder.close()


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
    with pytest.raises(ValueError, match="max_batch=2, got 3 and 3"):
        decode(decoder, jpegs(3))
    with pytest.raises(ValueError, match="got 2 and 1"):
        decoder.decode(jpegs(2), [0], str)
    decoder.close()


def test_importing_does_not_load_dali():
    code = "import sys, slipstream.decode; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
