"""Decoding on the GPU: close to the CPU's pixels, in order without waiting, memory kept as long as it is held."""

import gc
import io

import numpy as np
import pytest
import torch
from PIL import Image

from slipstream.decode import DecodeError, Decoder
from slipstream.decode_pillow import decode_with_pillow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# The JPEG engines, nvJPEG's CUDA kernels and libjpeg each round the inverse DCT, the chroma upsampling and the colour
# conversion in their own way. Rounding alone is 48 dB or more; sharp chroma edges in 4:2:0 files take the rest.
MIN_PSNR = 35.0
MAX_MEAN_DIFFERENCE = 1.0
# Where chroma jumps, two ways of upsampling differ by a good part of the jump.
MAX_DIFFERENCE = 64


def make_decoder(device="cuda", **options):
    options = {"max_batch": 64, "num_threads": 4, "max_pixels": 178_956_970} | options
    return Decoder(device=torch.device(device), **options)


@pytest.fixture
def decoder():
    decoder = make_decoder()
    yield decoder
    decoder.close()


def picture(seed=0, size=(90, 60)):
    """Smooth noise, so that JPEG keeps its detail."""
    small = np.random.default_rng(seed).integers(0, 256, (size[1] // 12 + 2, size[0] // 12 + 2, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encode(image, format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


def jpegs(count, first=0):
    return [encode(picture(first + i, (200 + 5 * (i % 9), 130 + 7 * (i % 5))), quality=92) for i in range(count)]


def decode(decoder, encoded):
    return decoder.decode(encoded, range(len(encoded)), lambda i: f"file-{i}.jpg")


def pixels(batch):
    """Copies on the host, read on the current stream once it has waited for `ready`."""
    assert batch.device.type == "cuda"
    torch.cuda.current_stream().wait_event(batch.ready)
    return [batch.image(i).permute(1, 2, 0).cpu().numpy() for i in range(len(batch))]


def assert_close(got, expected, name=""):
    assert got.shape == expected.shape, name
    difference = np.abs(got.astype(np.int64) - expected)
    psnr = 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9))
    assert psnr >= MIN_PSNR, (name, psnr)
    assert difference.mean() <= MAX_MEAN_DIFFERENCE, (name, difference.mean())
    assert difference.max() <= MAX_DIFFERENCE, (name, difference.max())


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_close_to_pillow(decoder, mode, options):
    encoded = [encode(picture(i, (300, 200 + i)).convert(mode), quality=92, **options) for i in range(16)]
    for got, data in zip(pixels(decode(decoder, encoded)), encoded, strict=True):
        assert_close(got, decode_with_pillow(data))


def test_close_to_pillow_where_components_are_red_green_and_blue(decoder):
    """Adobe's marker says that there is no YCbCr."""
    encoded = [encode(picture(i, (300, 200 + i)), quality=92, keep_rgb=True) for i in range(8)]
    for got, data in zip(pixels(decode(decoder, encoded)), encoded, strict=True):
        assert_close(got, decode_with_pillow(data))


def test_close_to_pillow_on_real_photos(decoder, photos):
    for start in range(0, len(photos), 64):
        encoded = [np.fromfile(file, np.uint8) for file in photos[start : start + 64]]
        for got, data, file in zip(pixels(decode(decoder, encoded)), encoded, photos[start:], strict=False):
            assert_close(got, decode_with_pillow(data), file)


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF", "GIF", "JPEG2000"])
def test_other_formats_are_exact(decoder, format):
    image = picture().convert("P") if format == "GIF" else picture()
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(image, format, **options)
    (got, _) = pixels(decode(decoder, [data, *jpegs(1)]))
    np.testing.assert_array_equal(got, decode_with_pillow(data))


def test_pixels_do_not_depend_on_the_batch(decoder):
    """The engines and the CUDA decoder may share a batch: the same image must come out alike wherever it lies."""
    encoded = jpegs(64)
    expected = pixels(decode(decoder, encoded))
    assert_equal(pixels(decode(decoder, encoded[::-1])), expected[::-1])
    for count in (1, 7, 33):
        assert_equal(pixels(decode(decoder, encoded[:count])), expected[:count])


def test_steady_state_does_not_wait_for_the_device(decoder):
    encoded = jpegs(32)
    held = [decode(decoder, encoded) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            batch = decode(decoder, encoded)
            torch.cuda.current_stream().wait_event(batch.ready)
            held.append(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = pixels(held[0])
    for batch in held[1:]:
        assert_equal(pixels(batch), expected)


def test_any_stream_can_wait_for_the_pixels(decoder):
    encoded = jpegs(32)
    expected = pixels(decode(decoder, encoded))
    for _ in range(20):
        side = torch.cuda.Stream()
        batch = decode(decoder, encoded)
        with torch.cuda.stream(side):
            side.wait_event(batch.ready)
            copies = [batch.image(i).clone() for i in range(len(batch))]
        side.synchronize()
        assert_equal([copy.permute(1, 2, 0).cpu().numpy() for copy in copies], expected)


def test_held_pixels_outlive_later_batches_and_the_decoder():
    decoder = make_decoder()
    held = decode(decoder, jpegs(32))
    expected = pixels(held)
    for i in range(20):
        decode(decoder, jpegs(32, first=100 + i))
    assert_equal(pixels(held), expected)
    decoder.close()
    del decoder
    gc.collect()
    another = make_decoder()
    for i in range(5):
        decode(another, jpegs(32, first=300 + i))
    assert_equal(pixels(held), expected)
    another.close()


def test_owners_dropped_after_the_readers_event_are_safe(decoder):
    """What the docstring asks of the reader, under pressure: slow reads, dropped as soon as their event has passed."""
    encoded = jpegs(32)
    expected = pixels(decode(decoder, encoded))
    waiting = []
    for _ in range(30):
        batch = decode(decoder, encoded)
        torch.cuda.current_stream().wait_event(batch.ready)
        torch.cuda._sleep(2_000_000)
        copies = [batch.image(i).clone() for i in range(len(batch))]
        done = torch.cuda.Event()
        done.record()
        waiting.append((done, batch))
        waiting = [(event, held) for event, held in waiting if not event.query()]
        assert_equal([copy.permute(1, 2, 0).cpu().numpy() for copy in copies], expected)


def test_a_bad_sample_is_named_and_the_decoder_goes_on(decoder):
    good = jpegs(8)
    expected = pixels(decode(decoder, good))
    bad = {2: good[2][: len(good[2]) // 2], 5: np.frombuffer(b"no image at all", np.uint8)}
    with pytest.raises(DecodeError) as caught:
        decode(decoder, [bad.get(i, data) for i, data in enumerate(good)])
    assert [(sample_id, path) for sample_id, path, _ in caught.value.failures] == [
        (2, "file-2.jpg"),
        (5, "file-5.jpg"),
    ]
    assert_equal(pixels(decode(decoder, good)), expected)


def test_what_dali_refuses_pillow_decodes(decoder):
    good = jpegs(4)
    expected = pixels(decode(decoder, good))
    odd = encode(picture().convert("LA"), "JPEG2000")
    got = pixels(decode(decoder, [*good[:2], odd, *good[2:]]))
    np.testing.assert_array_equal(got[2], decode_with_pillow(odd))
    assert_equal([*got[:2], *got[3:]], expected)


def test_exif_orientation_on_request_only():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(size=(200, 130)), exif=exif, quality=92)
    for apply_exif in (False, True):
        decoder = make_decoder(apply_exif=apply_exif)
        (got,) = pixels(decode(decoder, [data]))
        assert_close(got, decode_with_pillow(data, apply_exif=apply_exif))
        decoder.close()
