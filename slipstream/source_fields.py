"""From a leaf's bytes in a LitData chunk to a Python value, without running code that the data names."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

_KINDS = {
    "str": "str",
    "text": "str",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "numpy": "array",
    "no_header_numpy": "array",
    "tensor": "tensor",
    "no_header_tensor": "tensor",
    "json": "json",
    "pickle": "pickle",
    "graph": "pickle",
}
# Leaves that hold a file's bytes as they were: images or not, only the bytes can tell.
_ENCODED = ("bytes", "jpeg", "image", "file", "tifffile", "pil", "video", "audio", "nifti", "mesh", "pdf", "jpeg_array")

_INT, _FLOAT, _BOOL = struct.Struct("<q"), struct.Struct("<d"), struct.Struct("<?")

# What a number, a bool or a text that an Arrow row lacks is unpacked to: the bytes of none.
MISSING = b"\xffnone"


class PickleRefusedError(ValueError):
    """A pickled field holds more than plain values, and reading it could run any code."""


def declared_kind(data_format: str) -> str | None:
    """The kind of field that litdata's `data_format` says, "unknown" for a serializer of the user's own.

    None where only the bytes can tell an image from other bytes.
    """
    name = data_format.split(":")[0]
    return None if name in _ENCODED else _KINDS.get(name, "unknown")


def decoder_of(data_format: str, *, field: str, allow_pickle: bool) -> Callable[[np.ndarray], Any]:
    """Give the function from a leaf's bytes (uint8 [n_bytes]) to its value.

    Numbers, text and encoded files are read here, arrays and JSON by litdata's own serializers. A pickle is read by
    `plain_unpickle` unless `allow_pickle`. The function raises ValueError (or struct.error) for bytes that do not fit,
    PickleRefusedError for a pickle; `field` is named in it.
    """
    name, _, detail = data_format.partition(":")
    simple: dict[str, Callable[[np.ndarray], Any]] = {
        "str": lambda data: data.tobytes().decode(),
        "text": lambda data: data.tobytes().decode(),
        "bool": lambda data: _BOOL.unpack(data.data)[0],
        "int": lambda data: _INT.unpack(data.data)[0],
        "float": lambda data: _FLOAT.unpack(data.data)[0],
    }
    if name in simple:
        return _or_none(simple[name])
    if name in _ENCODED:
        return np.ndarray.tobytes
    if name in ("numpy", "no_header_numpy", "tensor", "no_header_tensor", "json"):
        return _litdata_decoder(name, data_format)
    if name == "pickle":
        if allow_pickle:
            return lambda data: pickle.loads(data.data)
        return lambda data: plain_unpickle(data.tobytes(), field)
    if name == "graph" and allow_pickle:
        return _litdata_decoder(name, detail)

    def refuse(data: np.ndarray) -> Any:
        if name == "graph":
            raise PickleRefusedError(_refusal(field, "it is a litdata graph, which holds a pickle"))
        raise ValueError(
            f"field {field!r} was written by a serializer that Slipstream does not know ({data_format!r}); "
            f"leave it out with exclude_fields=[{field!r}]"
        )

    return refuse


def _or_none(decode: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    def value(data: np.ndarray) -> Any:
        try:
            return decode(data)
        except (struct.error, UnicodeDecodeError):
            if data.tobytes() == MISSING:
                return None
            raise

    return value


def _litdata_decoder(name: str, setup: str) -> Callable[[np.ndarray], Any]:
    from litdata.streaming import serializers

    classes = {
        "numpy": "NumpySerializer",
        "no_header_numpy": "NoHeaderNumpySerializer",
        "tensor": "TensorSerializer",
        "no_header_tensor": "NoHeaderTensorSerializer",
        "json": "JsonSerializer",
        "graph": "GraphSerializer",
    }
    serializer = getattr(serializers, classes[name])()
    serializer.setup(setup)
    # A copy that may be written to: a tensor over a read-only map would let its owner write to it and crash.
    return lambda data: serializer.deserialize(bytearray(data))


def _refusal(field: str, reason: str) -> str:
    return (
        f"field {field!r} is stored as a pickle and {reason}: reading it could run any code. Leave it out with "
        f"exclude_fields=[{field!r}], or give SlipstreamDataset allow_pickle=True if you trust whoever wrote the data"
    )


class _Dtype:
    """Stands in for numpy.dtype while unpickling, whose own state setter is not made for hostile bytes."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _JsonLeaf:
    """Stands in for what litdata wraps a None in, below a first sample with a number of numpy's."""

    value: Any = None

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        self.value = state[1]["value"]


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    kind = np.dtype(dtype.code)
    if kind.kind not in "biufcSU" or not isinstance(data, bytes) or len(data) != kind.itemsize:
        raise pickle.UnpicklingError(f"a numpy scalar of type {dtype.code!r}")
    if dtype.order in ("<", ">"):
        kind = kind.newbyteorder(dtype.order)
    return np.frombuffer(data, kind)[0].item()


# Pickle protocols below 3 store bytes as a call of one of these two.
def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _empty() -> bytes:
    return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("litdata.streaming.serializers", "JsonLeaf"): _JsonLeaf,
    ("_codecs", "encode"): _encode,
    ("builtins", "complex"): complex,
    ("builtins", "bytes"): _empty,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # The module's name before Python 3, which old protocols keep.
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return _ALLOWED[module, name]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def plain_unpickle(data: bytes, field: str) -> Any:
    """Read a pickle of numbers, numpy scalars, str, bytes, None, and lists, tuples and dicts of them.

    numpy scalars come back as Python's. Anything else raises PickleRefusedError, which names `field`, before any code
    that the pickle names has run.
    """
    try:
        value = _PlainUnpickler(io.BytesIO(data)).load()
        value = value.value if isinstance(value, _JsonLeaf) else value
        plain = _is_plain(value)
    except Exception as error:
        raise PickleRefusedError(_refusal(field, str(error) or type(error).__name__)) from None
    if not plain:
        raise PickleRefusedError(_refusal(field, f"it holds a {type(value).__name__}"))
    return value
