"""A source of one's own, as far as most tests need it."""

from __future__ import annotations

from collections.abc import Mapping


class ImageSource:
    """A source of nothing but images: a subclass says how many there are, and reads them."""

    fields: Mapping[str, str] = {"image": "image"}

    def values(self, ids, field):
        raise KeyError(field)

    def describe(self, sample_id) -> str:
        return f"memory:{sample_id}"

    def close(self) -> None:
        pass
