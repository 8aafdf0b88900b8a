"""A folder that is packed into: what has been begun there, which blocks of samples are done, and the finished index.

    pack.json               the source's mark, the arguments and the number of blocks; it stays
    .pack/block-000012.json what became of a block: the index's entries of its chunks, and the samples left out
    .pack/*.part            files being written
    chunk-000012-0.bin      the chunks of that block
    skipped.json            the samples left out, if any; from here on only where all blocks are done
    index.json              what makes the folder a LitData set

Every file is the same whoever writes it, and comes by a rename: ranks need no lock, and may repeat one another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .dataset import PACKING
from .pack_chunks import published, sync_folder
from .pack_fields import Failure

_LAYOUT = 1
_MANIFEST, _INDEX, _SKIPPED = "pack.json", "index.json", "skipped.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What became of a block of samples: the index's entries of its chunks, and (id, path, reason) of the left out."""

    chunks: tuple[dict[str, Any], ...]
    skipped: tuple[Failure, ...]


class PackFolder:
    """The folder `dst`, made if need be. Raises FileExistsError for a file, or a folder with other things in it."""

    def __init__(self, dst: str | os.PathLike[str]) -> None:
        place = os.fspath(dst)
        if "://" in place:
            raise ValueError(f"dst must be a folder: pack into one, then `aws s3 sync FOLDER {place}`")
        self.path = os.path.abspath(os.path.expanduser(place))
        self.work = os.path.join(self.path, PACKING)
        self.blocks = 0
        # Another rank may be about to begin: its folder is there before its manifest, and that before all else.
        try:
            names = set(os.listdir(self.path))
        except FileNotFoundError:
            names = set()
        except NotADirectoryError:
            raise FileExistsError(f"dst {self.path!r} is not a folder; give a new one") from None
        if names - {PACKING} and not os.path.exists(self._at(_MANIFEST)):
            raise FileExistsError(f"dst {self.path!r} is not an empty folder; give a new one")

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name)

    def begin(self, settings: Mapping[str, Any], count_blocks: Callable[[], int]) -> None:
        """Begin a set, or go on with one: `settings` say what makes its bytes, `count_blocks` is called for a new one.

        Raises FileExistsError, saying what differs, where the folder holds a set of other settings.
        """
        manifest = self._manifest()
        if manifest is None:
            manifest = {"layout": _LAYOUT, **settings, "blocks": count_blocks()}
            manifest = self._establish(manifest)
        if manifest.get("layout") != _LAYOUT:
            raise FileExistsError(f"{self.path} was begun by another version of Slipstream; give an empty folder")
        different = [
            f"{name} was {manifest.get(name)!r:.200} and is {value!r:.200}"
            for name, value in settings.items()
            if manifest.get(name) != value
        ]
        if different:
            raise FileExistsError(
                f"{self.path} holds a set of another source or other arguments ({'; '.join(different)}); "
                "give the same to go on with it, or an empty folder"
            )
        self.blocks = manifest["blocks"]

    def _manifest(self) -> dict[str, Any] | None:
        try:
            with open(self._at(_MANIFEST), "rb") as file:
                manifest = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FileExistsError(f"{self._at(_MANIFEST)} is none that pack wrote ({error})") from None
        return manifest if isinstance(manifest, dict) else {}

    def _establish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest unless another rank was first; gives the one that is there."""
        try:
            os.makedirs(self.work, exist_ok=True)
            first = os.path.join(self.work, f"{uuid.uuid4().hex}.part")
            self._write(first, manifest)
            try:
                # Unlike a rename it leaves that of a rank that was first, whose arguments may be others.
                with contextlib.suppress(FileExistsError):
                    os.link(first, self._at(_MANIFEST))
                os.unlink(first)
            except FileNotFoundError:
                raise
            except OSError:
                # There are no hard links here.
                os.replace(first, self._at(_MANIFEST))
            sync_folder(self.path)
        except FileNotFoundError:
            # A rank that was faster in everything has removed what a set is made in.
            if not os.path.exists(self._at(_MANIFEST)):
                raise
        return self._manifest() or manifest

    def block(self, number: int) -> Block | None:
        """What became of a block, if it is done and its chunks are there."""
        try:
            with open(os.path.join(self.work, _block_name(number)), "rb") as file:
                record = json.load(file)
            for chunk in record["chunks"]:
                if os.stat(self._at(chunk["filename"])).st_size != chunk["chunk_bytes"]:
                    return None
        except (FileNotFoundError, ValueError):
            return None
        return Block(
            chunks=tuple(record["chunks"]),
            skipped=tuple((number, path, reason) for number, path, reason in record["skipped"]),
        )

    def put(self, number: int, block: Block) -> None:
        """Note that a block is done: its chunks are in place."""
        sync_folder(self.path)
        self._write(os.path.join(self.work, _block_name(number)), {"chunks": block.chunks, "skipped": block.skipped})

    def finish(self, config: Mapping[str, Any]) -> bool:
        """Make it a LitData set if all blocks are done; tells whether it is one now. ValueError for one of nothing."""
        try:
            return self._finish(config)
        except FileNotFoundError:
            if self.is_whole():
                return True
            raise

    def _finish(self, config: Mapping[str, Any]) -> bool:
        if self.is_whole():
            # Another call may have been killed just here.
            shutil.rmtree(self.work, ignore_errors=True)
            return True
        done = [self.block(number) for number in range(self.blocks)]
        if None in done:
            # Another rank may have finished meanwhile, and taken the records away.
            return self.is_whole()
        chunks = [chunk for block in done if block is not None for chunk in block.chunks]
        skipped = [failure for block in done if block is not None for failure in block.skipped]
        if not chunks:
            raise ValueError(f"none of the samples could be stored; the first: {skipped[0]}")
        index = {"chunks": chunks, "config": config}
        # litdata tells by it whether a cached copy is of this set; it writes the time there.
        mark = hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=8).hexdigest()
        if skipped:
            failures = [dict(zip(("sample_id", "path", "reason"), failure, strict=True)) for failure in skipped]
            self._write(self._at(_SKIPPED), failures)
        self._write(self._at(_INDEX), {**index, "updated_at": mark})
        sync_folder(self.path)
        shutil.rmtree(self.work, ignore_errors=True)
        return True

    def is_whole(self) -> bool:
        """Tell whether the folder is a finished set."""
        return os.path.exists(self._at(_INDEX))

    def contents(self) -> tuple[list[dict[str, Any]], list[Failure], int]:
        """The index's entries of the chunks there are, the samples left out, and how many blocks are not done."""
        if self.is_whole():
            with open(self._at(_INDEX), "rb") as file:
                chunks = json.load(file)["chunks"]
            skipped = []
            with contextlib.suppress(FileNotFoundError), open(self._at(_SKIPPED), "rb") as file:
                skipped = [(each["sample_id"], each["path"], each["reason"]) for each in json.load(file)]
            return chunks, skipped, 0
        done = [block for number in range(self.blocks) if (block := self.block(number)) is not None]
        chunks = [chunk for block in done for chunk in block.chunks]
        return chunks, [failure for block in done for failure in block.skipped], self.blocks - len(done)

    def _write(self, path: str, value: Any) -> None:
        with published(path, self.work) as file:
            file.write(json.dumps(value, sort_keys=True).encode())


def _block_name(number: int) -> str:
    return f"block-{number:06d}.json"


def chunk_prefix(number: int) -> str:
    """What the names of a block's chunks begin with."""
    return f"chunk-{number:06d}-"
