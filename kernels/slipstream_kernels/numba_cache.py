"""A place for Numba's compiled code where it finds none: its own answer is that no kernel can be made at all.

It looks into $NUMBA_CACHE_DIR, the package's folder and the user's cache folder; in a container whose user owns none of
them a folder of this process's own stands in, as Matplotlib does.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

import numba

_log = logging.getLogger(__name__)


def _probe() -> None:
    """What a place is asked for."""


def find_place() -> bool:
    """Tell whether compiled code stays on this machine; where it cannot, a folder takes it that goes with the process.

    Numba, and the processes that this one starts, are told of that folder. Raises OSError if none can be made.
    """
    try:
        numba.njit(cache=True)(_probe)
    except RuntimeError:
        folder = tempfile.mkdtemp(prefix="slipstream-numba-")
        atexit.register(_remove, folder, os.getpid())
        numba.config.CACHE_DIR = folder  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
        os.environ["NUMBA_CACHE_DIR"] = folder
        _log.warning(
            "Numba can write neither beside the package nor in the home folder: CPU kernels are compiled in every "
            "process (up to a minute); set NUMBA_CACHE_DIR to a folder that stays"
        )
        return False
    return True


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # and no forked child
        shutil.rmtree(folder, ignore_errors=True)


STAYS = find_place()
