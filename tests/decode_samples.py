"""Small encoded pictures, and a CPU decoder for them: shared by the tests of decoding."""

import io

import numpy as np
import torch
from PIL import Image

from slipstream.decode import Decoder

MAX_PIXELS = 178_956_970


def make_decoder(**options):
    return Decoder(
        **({"device": torch.device("cpu"), "max_batch": 64, "num_threads": 2, "max_pixels": MAX_PIXELS} | options)
    )


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
