"""Samples that cannot be read, decoded or cropped: the policies, and the record of which there were."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .draws import Draws, stream_key

POLICIES = ("raise", "replace", "skip", "resample")
PARTIAL, DIFFERING = "partial", "differing"
TRIES = 100  # of resampling one position: a set where all fail is no set
GREY = 128

_log = logging.getLogger("slipstream")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a loader has met so far, in batches made for its consumer or ahead of it.

    bad: (sample id, path, reason) of every bad sample, each once, in the order of their ids; also of one that was
    handed out as a GPU decoded it, and that the CPU decodes otherwise. replaced, skipped, resampled: how often each was
    done, which is once for every time that a bad sample came. partial: likewise the samples that are there in part, the
    rest grey (truncated="grey"), which are valid; greyed: how often they came.
    """

    bad: tuple[tuple[int, str, str], ...] = ()
    replaced: int = 0
    skipped: int = 0
    resampled: int = 0
    partial: tuple[tuple[int, str, str], ...] = ()
    greyed: int = 0

    def __str__(self) -> str:
        head = (
            f"{len(self.bad)} bad samples; {self.replaced} times replaced, {self.skipped} times skipped, "
            f"{self.resampled} times resampled"
        )
        lines = [head, *(f"  sample {number} ({path}): {reason}" for number, path, reason in self.bad)]
        if self.partial:
            lines.append(f"{len(self.partial)} samples there in part; {self.greyed} times the rest made grey")
            lines += (f"  sample {number} ({path}): {reason}" for number, path, reason in self.partial)
        return "\n".join(lines)


@dataclass(slots=True)
class Record:
    """The report in the making; any thread may add to it."""

    _bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    _partial: dict[int, tuple[str, str]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*POLICIES, PARTIAL, DIFFERING), 0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, policy: str, failures: Sequence[tuple[int, str, str]]) -> None:
        """Note failures, (sample id, path, reason), and what is done; log each sample the first time.

        `policy` is one of POLICIES, or PARTIAL for samples of which a part is there, or DIFFERING for those that a
        GPU decoded otherwise than the CPU does.
        """
        noted = self._partial if policy == PARTIAL else self._bad
        for sample_id, path, reason in failures:
            with self._lock:
                known = sample_id in noted
                noted.setdefault(sample_id, (path, reason))
                self._counts[policy] += 1
            if not known and policy != "raise":
                _log.warning("sample %d (%s): %s: %s", sample_id, path, reason, _DONE[policy])

    def report(self) -> Report:
        with self._lock:
            bad = tuple((number, *why) for number, why in sorted(self._bad.items()))
            partial = tuple((number, *why) for number, why in sorted(self._partial.items()))
            counts = dict(self._counts)
        return Report(
            bad=bad,
            replaced=counts["replace"],
            skipped=counts["skip"],
            resampled=counts["resample"],
            partial=partial,
            greyed=counts[PARTIAL],
        )


_DONE = {
    "replace": "replaced by grey",
    "skip": "left out",
    "resample": "another sample stands in",
    PARTIAL: "the rest is grey",
    DIFFERING: "so it was handed out; from now on the CPU decodes it",
}


def resampled_positions(seed: int, epoch: int, positions: np.ndarray, attempt: int, length: int) -> np.ndarray:
    """Positions to take in place of bad ones: int64 [n] in [0, length), pure in (seed, epoch, position, attempt)."""
    words = Draws(stream_key(seed, "resample"), positions, epoch).words(attempt)[:, 0]
    wide = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1].astype(np.uint64)
    # the remainder of 64 bits: at 10**10 positions its bias is below 10**-9
    return (wide % np.uint64(length)).astype(np.int64)
