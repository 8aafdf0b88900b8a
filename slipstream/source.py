"""Where encoded bytes come from: what every source gives, and the bounded file maps that the sources share.

A source knows neither order nor decoding. Its arrays are views over memory maps: a map lives as long as any view of it,
whatever the cache that made it has forgotten since, and holds no descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

# vm.max_map_count is 65,530 by default: a few sources at once must stay well below it.
MAX_MAPS = 4096

K = TypeVar("K")
V = TypeVar("V")

_PROT_READ, _MAP_SHARED, _MAP_FAILED = 1, 1, ctypes.c_void_p(-1).value


class ReadError(RuntimeError):
    """Samples that could not be read; `failures` holds a (sample_id, path, reason) for each of them."""

    def __init__(self, failures: Sequence[tuple[int, str, str]]) -> None:
        super().__init__(tuple(failures))

    @property
    def failures(self) -> tuple[tuple[int, str, str], ...]:
        return self.args[0]

    def __str__(self) -> str:
        lines = [f"sample {sample_id} ({path}): {reason}" for sample_id, path, reason in self.failures]
        return f"{len(lines)} sample(s) could not be read\n  " + "\n  ".join(lines)


class UnavailableError(OSError):
    """The store or this machine fails, and not a sample: S3 does not answer, or the cache folder cannot be written.

    No policy for bad samples takes it: it ends `next()`, and the next `next()` reads the same batch again. A source of
    the user's own may raise it too.
    """


@runtime_checkable
class Source(Protocol):
    """Encoded samples under the ids 0 to len(source) - 1. All methods may be called from several threads at once."""

    @property
    def fields(self) -> Mapping[str, str]:
        """Each field's kind: "image", "bytes", "int", "float", "bool", "str", "array", "tensor", "json", "pickle"."""
        ...

    def __len__(self) -> int: ...

    def read(self, ids: Sequence[int] | np.ndarray, field: str = "image") -> list[np.ndarray]:
        """Give the field's encoded bytes as read-only uint8 views [n_bytes] over memory maps.

        Raises IndexError for an id that does not exist, KeyError for a field, ReadError for samples that cannot be
        read, UnavailableError where that is no fault of theirs.
        """
        ...

    def values(self, ids: Sequence[int] | np.ndarray, field: str) -> list[Any]:
        """Give the field as Python values (numbers, str, arrays); the bytes where its kind is "image" or "bytes"."""
        ...

    def describe(self, sample_id: int) -> str:
        """Say where a sample came from, for error messages; never raises."""
        ...

    def close(self) -> None:
        """Forget maps and connections; the views given out stay valid, and the next read opens anew."""
        ...


def as_ids(ids: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Check sample ids and give them as int64 [n]: IndexError names the first outside 0 to `length` - 1."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"ids must be a flat sequence of ints, got {array.dtype} of shape {array.shape}")
    # Compared before the cast, so that a uint64 beyond int64 cannot come round as a valid id.
    outside = (array < 0) | (array >= length)
    if outside.any():
        raise IndexError(f"sample id {array[outside][0]} is out of range: the source has ids 0 to {length - 1}")
    return array.astype(np.int64, copy=False)


def check_field(field: str, fields: Mapping[str, Any]) -> None:
    """Raise KeyError, naming the fields there are, if `field` is none of them."""
    if field not in fields:
        raise KeyError(f"field {field!r} does not exist; the source has {', '.join(map(repr, fields))}")


class ProcessLock:
    """A lock that a forked child starts afresh: a thread of the parent may have held it at the fork."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._pid = os.getpid()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ProcessLock], tuple[()]]:
        return ProcessLock, ()


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    word, void = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.argtypes = [void, word, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = void
    libc.munmap.argtypes = [void, word]
    return libc


_LIBC = _load_libc()


class _Mapping:
    """One read-only map of a whole file, unmapped when the last array over it goes.

    Python's own mmap keeps a descriptor for as long as the map lives, so a batch of a thousand image files would use up
    the usual 1,024.
    """

    __slots__ = ("_address", "_size")

    def __init__(self, path: str) -> None:
        self._address = None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(descriptor).st_size
            if self._size == 0:
                return
            address = _LIBC.mmap(None, self._size, _PROT_READ, _MAP_SHARED, descriptor, 0)
            if address == _MAP_FAILED:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot map: {os.strerror(code)}", path)
            self._address = address
        finally:
            os.close(descriptor)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (self._size,), "typestr": "|u1", "data": (self._address, True)}

    # Bound as a default, because module globals may be gone when the interpreter ends.
    def __del__(self, munmap: Any = _LIBC.munmap) -> None:
        if self._address is not None:
            munmap(self._address, self._size)

    def array(self) -> np.ndarray:
        if self._address is None:
            empty = np.empty(0, np.uint8)
            empty.flags.writeable = False
            return empty
        return np.asarray(self)


def map_file(path: str) -> np.ndarray:
    """Map a whole file as a read-only uint8 array [n_bytes], unmapped with its last view. Raises OSError."""
    try:
        return _Mapping(path).array()
    except OSError as error:
        raise_if_ours(error, path)
        raise


OURS = {
    errno.EMFILE: "this process has too many files open (ulimit -n)",
    errno.ENFILE: "this machine has too many files open",
    errno.ENOMEM: "this process has no memory, or too many maps, left (vm.max_map_count)",
}


def raise_if_ours(error: Exception, path: str) -> None:
    """Raise UnavailableError where the error is this machine's, and would be the same with any other file."""
    code = getattr(error, "errno", None)
    if code in OURS:
        raise UnavailableError(code, f"cannot open {path}: {OURS[code]}") from None


class Kept(Generic[K, V]):
    """The last `capacity` opened things by key, least recently used out first; thread-safe, and pickled empty."""

    def __init__(self, capacity: int = MAX_MAPS) -> None:
        self._capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = ProcessLock()

    def get(self, keys: Iterable[K], open_one: Callable[[K], V]) -> list[V | OSError | ValueError]:
        """Give each key's value, opened where it is not kept; an OSError or ValueError of `open_one` is its value.

        But an UnavailableError, which says nothing of the key, is raised.
        """
        with self._lock:
            return [self._get(key, open_one) for key in keys]

    def _get(self, key: K, open_one: Callable[[K], V]) -> V | OSError | ValueError:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
            return value
        try:
            value = self._values[key] = open_one(key)
        except UnavailableError:
            raise
        except (OSError, ValueError) as error:
            return error
        if len(self._values) > self._capacity:
            self._values.popitem(last=False)
        return value

    def drop(self, key: K) -> None:
        """Forget one."""
        with self._lock:
            self._values.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def close(self) -> None:
        """Forget everything; what views still need lives on until the last of them goes."""
        with self._lock:
            self._values.clear()

    def __reduce__(self) -> tuple[type[Kept[K, V]], tuple[int]]:
        return type(self), (self._capacity,)
