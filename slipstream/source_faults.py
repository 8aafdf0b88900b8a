"""Faults of the cache folder, told apart from those of the data."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from .source import OURS, UnavailableError, raise_if_ours

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

P = ParamSpec("P")
R = TypeVar("R")


class _HasFolder(Protocol):
    folder: str | None


F = TypeVar("F", bound=_HasFolder)


def tells_cache_faults(method: Callable[Concatenate[F, P], R]) -> Callable[Concatenate[F, P], R]:
    """Make an OSError of the cache below self.folder an UnavailableError; those of the data stay as they are."""

    @functools.wraps(method)
    def told(self: F, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except UnavailableError:
            raise
        except OSError as error:
            if self.folder is None or not _is_of(error, self.folder):
                raise
            where = error.filename if isinstance(error.filename, str) else self.folder
            raise_if_ours(error, where)
            failure = UnavailableError(
                error.errno, f"{error.strerror}: {where}, in the cache folder; mend that, or give another cache_dir"
            )
        raise failure

    return told


def _is_of(error: OSError, folder: str) -> bool:
    # What is only read gives no such errno, or it is this process's; any other error counts by its file.
    if error.errno in (*DISK_FULL, errno.EROFS, *OURS):
        return True
    path = error.filename
    if not isinstance(path, str):
        return False
    root, name = os.path.split(path)
    limits = os.path.dirname(folder) == root and (name == ".limit" or name.endswith(".room"))
    # A folder above is named where it cannot be made.
    return limits or path.startswith(folder + os.sep) or (folder + os.sep).startswith(path.rstrip(os.sep) + os.sep)
