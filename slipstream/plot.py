"""Pictures of batches for people: a grid of images, and a contact sheet with one row a crop (needs matplotlib)."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Distinct beside each other, and readable as text on white as well as as lines on photographs.
_COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#e377c2", "#8c564b", "#17becf", "#bcbd22", "#4d4d4d")
_GAP = 0.06  # inches between neighbours
_MAX_SHOWN = 1600  # pixels of the longer side: more cannot be seen, and costs seconds


def show_batch(
    images: torch.Tensor | Sequence[torch.Tensor],
    title: str = "",
    nrow: int = 8,
    figsize: tuple[float, float] | None = None,
    *,
    normalized: tuple[Sequence[float], Sequence[float]] = _IMAGENET,
) -> Figure:
    """A grid of images, `nrow` in a row, as a matplotlib Figure.

    images: [B, C, H, W] or a sequence of [C, H, W] of any sizes, C 1 or 3, any dtype and device. Whole numbers are
    bytes. Floats are judged together: within [0, 1] they are shown as they are; with no negative and one above 3, as
    bytes; else as normalised by the (mean, std) of `normalized`, which is undone. The rest is clipped; NaN is black.
    figsize: inches (width, height); by default what the images need.

    In a notebook the figure shows at once. Elsewhere save it: `show_batch(...).savefig("batch.png")`. The figure is
    unknown to pyplot, so that nothing is kept when a loop drops it. ImportError without matplotlib; ValueError or
    TypeError names bad images or a bad nrow.
    """
    nrow = checks.whole("nrow", nrow, 1)
    if isinstance(images, Mapping):
        raise TypeError(f"images must be those of one field, got a dict of {list(images)}: plot_crops takes a batch")
    pictures = _pictures(_as_images("images", images), normalized)
    columns = min(nrow, len(pictures))
    width = min(2.4, max(1.2, 14 / columns))
    height = width * min(1.5, max(0.5, float(np.mean([p.shape[0] / p.shape[1] for p in pictures]))))
    rows = -(-len(pictures) // columns)
    top = _GAP + (0.35 if title else 0.0)
    sheet = _Sheet(_GAP + columns * (width + _GAP), top + rows * (height + _GAP), figsize)
    sheet.title(title)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        cell = (_GAP + column * (width + _GAP), top + row * (height + _GAP), width, height)
        sheet.picture(picture, cell)
    return _shown(sheet.figure)


def plot_crops(
    batch: Mapping[str, Any] | Sequence[torch.Tensor] | torch.Tensor,
    *,
    crops: Sequence[str] | None = None,
    sources: torch.Tensor | Sequence[torch.Tensor] | None = None,
    samples: int | Sequence[int] = 6,
    title: str = "",
    figsize: tuple[float, float] | None = None,
    normalized: tuple[Sequence[float], Sequence[float]] = _IMAGENET,
) -> Figure:
    """A contact sheet: one row a crop, one column a sample, and above them the sources with every crop's box.

    batch: a loader's dict; or named crops [B, C, H, W]; or a list of them, named crop_0, crop_1, ... A list of crops in
    a dict's field `image` becomes image_0, image_1, ... `<crop>_box` int32 [B, 4] (top, left, height, width) is drawn
    on the source, `<crop>_flip` bool [B] marks mirrored crops, and `_indices` names the columns.
    crops: which rows, in which order; all by default. sources: the decoded images of the batch, in its order, such as
    `[dataset[i]["image"] for i in batch["_indices"]]` of a dataset with decode_images=True. samples: how many of the
    batch, or which. Values, showing, figsize and errors are those of `show_batch`; each row counts as one batch.
    """
    named = _named_crops(batch)
    rows = _chosen(named, crops)
    extras = batch if isinstance(batch, Mapping) else {}
    shown = _sample_numbers(samples, min(len(named[name]) for name in rows))
    pictures = {name: _pictures(_take(name, named[name], shown), normalized) for name in rows}
    labels = [_Label(name, _describe(named[name], shown), _COLORS[i % len(_COLORS)]) for i, name in enumerate(rows)]
    above = [] if sources is None else _pictures(_take("sources", sources, shown), normalized)
    layout = _Layout.of(pictures, labels, above, with_title=bool(title))
    sheet = _Sheet(layout.width(len(shown)), layout.height, figsize)
    sheet.title(title)
    ids = extras.get("_indices")
    for column, sample in enumerate(shown):
        head = f"sample {int(ids[sample])}" if ids is not None else f"image {sample}"
        sheet.text(
            head, layout.left(column) + layout.cell / 2, layout.top - 0.1, size=8.5, ha="center", color="#555555"
        )
    if above:
        sheet.label(_Label("source", "each crop's box", "#222222"), layout.label_at, layout.source_row)
    for column, (sample, picture) in enumerate(zip(shown, above, strict=bool(above))):
        place = sheet.picture(picture, (layout.left(column), layout.top, layout.cell, layout.source_height))
        for label in labels:
            if f"{label.name}_box" in extras:
                box = [float(number) for number in extras[f"{label.name}_box"][sample]]
                sheet.box(box, picture.shape[:2], place, label.color)
    for label, row in zip(labels, layout.rows, strict=True):
        sheet.label(label, layout.label_at, row)
        flips = extras.get(f"{label.name}_flip")
        for column, (sample, picture) in enumerate(zip(shown, pictures[label.name], strict=True)):
            place = sheet.picture(picture, (layout.left(column), row[0], layout.cell, row[1]), frame=label.color)
            if flips is not None and bool(flips[sample]):
                sheet.badge("flip", place)
    return _shown(sheet.figure)


@dataclass(frozen=True, slots=True)
class _Label:
    name: str
    detail: str
    color: str


@dataclass(slots=True)
class _Layout:
    """Where the rows and columns of a contact sheet lie, in inches from the top left corner."""

    label_at: float
    cell: float
    top: float
    source_height: float
    rows: list[tuple[float, float]] = field(default_factory=list)
    height: float = 0.0

    @classmethod
    def of(
        cls, pictures: dict[str, list[np.ndarray]], labels: list[_Label], above: list[np.ndarray], *, with_title: bool
    ) -> _Layout:
        columns = len(next(iter(pictures.values())))
        cell = min(2.6, max(1.5, 12.5 / columns))
        letters = max(max(len(label.name), 0.85 * len(label.detail)) for label in labels)
        layout = cls(
            label_at=min(2.6, max(1.05, 0.3 + 0.085 * letters)),
            cell=cell,
            top=0.3 + (0.38 if with_title else 0.0),
            source_height=cell * min(1.0, max((p.shape[0] / p.shape[1] for p in above), default=0.0)),
        )
        y = layout.top + (layout.source_height + 2 * _GAP if above else 0.0)
        # Rows keep the crops' relative sizes, so that a local crop looks local, down to a size that can be judged.
        longest = max(max(p.shape[:2]) for row in pictures.values() for p in row)
        for row in pictures.values():
            scale = max(0.5, max(max(p.shape[:2]) for p in row) / longest)
            height = cell * scale * max(p.shape[0] / max(p.shape[:2]) for p in row)
            layout.rows.append((y, height))
            y += height + _GAP
        layout.height = y
        return layout

    @property
    def source_row(self) -> tuple[float, float]:
        return self.top, self.source_height

    def left(self, column: int) -> float:
        return self.label_at + 0.1 + column * (self.cell + _GAP)

    def width(self, columns: int) -> float:
        return self.left(columns)


class _Sheet:
    """A figure whose single axes measure inches from the top left corner, so that everything has a known place."""

    def __init__(self, width: float, height: float, figsize: tuple[float, float] | None) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plotting needs matplotlib: pip install matplotlib") from error
        wanted = figsize or (width, height)
        self.figure = Figure(figsize=wanted, facecolor="white")
        self.axes: Axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set(xlim=(0.0, width), ylim=(height, 0.0), aspect="equal")
        self.axes.set_axis_off()
        self._scale = min(wanted[0] / width, wanted[1] / height)

    def text(self, text: str, x: float, y: float, *, size: float, **style: Any) -> None:
        style = {"va": "center", "parse_math": False, **style}
        self.axes.text(x, y, text, fontsize=max(4.0, size * self._scale), **style)

    def title(self, title: str) -> None:
        if title:
            self.text(title, 2 * _GAP, 0.22, size=13, weight="bold", color="#222222")

    def label(self, label: _Label, right: float, row: tuple[float, float]) -> None:
        middle = row[0] + row[1] / 2
        self.text(label.name, right, middle - 0.08, size=10, ha="right", weight="bold", color=label.color)
        self.text(label.detail, right, middle + 0.11, size=8, ha="right", color="#555555")

    def picture(
        self, picture: np.ndarray, cell: tuple[float, float, float, float], frame: str | None = None
    ) -> tuple[float, float, float, float]:
        """Fits the picture into the middle of the cell (x, y, width, height); returns its place, likewise."""
        x, y, width, height = cell
        scale = min(width / picture.shape[1], height / picture.shape[0])
        w, h = picture.shape[1] * scale, picture.shape[0] * scale
        x, y = x + (width - w) / 2, y + (height - h) / 2
        step = max(1, max(picture.shape[:2]) // _MAX_SHOWN)
        # Without these limits and this aspect imshow would set the axes' own to the picture's.
        limits = (self.axes.get_xlim(), self.axes.get_ylim())
        self.axes.imshow(picture[::step, ::step], extent=(x, x + w, y + h, y), aspect="equal")
        self.axes.set(xlim=limits[0], ylim=limits[1])
        if frame is not None:
            self._rectangle((x, y, w, h), frame, 1.5)
        return x, y, w, h

    def box(
        self,
        box: Sequence[float],
        size: tuple[int, ...],
        place: tuple[float, float, float, float],
        color: str,
    ) -> None:
        """Draws a box (top, left, height, width) in pixels of an image of this size that lies at this place."""
        top, left, height, width = box
        x, y = place[0] + left * place[2] / size[1], place[1] + top * place[3] / size[0]
        rectangle = (x, y, width * place[2] / size[1], height * place[3] / size[0])
        # White below the colour keeps the line visible on a photograph of that colour.
        self._rectangle(rectangle, "white", 2.8)
        self._rectangle(rectangle, color, 1.6)

    def badge(self, text: str, place: tuple[float, float, float, float]) -> None:
        backing = {"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.6, "linewidth": 0}
        x, y = place[0] + place[2] - 0.05, place[1] + 0.06
        self.text(text, x, y, size=6.5, color="white", ha="right", va="top", bbox=backing)

    def _rectangle(self, place: tuple[float, float, float, float], color: str, width: float) -> None:
        from matplotlib.patches import Rectangle

        line = width * self._scale
        self.axes.add_patch(Rectangle(place[:2], place[2], place[3], fill=False, edgecolor=color, linewidth=line))


def _as_images(name: str, images: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(images, (torch.Tensor, np.ndarray)) and images.ndim == 3:
        images = images[None]
    if not isinstance(images, Iterable):
        raise TypeError(f"{name} must be images [C, H, W], got {type(images).__name__}")
    tensors = []
    for image in images:
        if not isinstance(image, (torch.Tensor, np.ndarray)):
            raise TypeError(f"{name} must be decoded images [C, H, W] (decode_images=True), got {type(image).__name__}")
        # A copy of an array: torch takes none with negative strides, and warns of one that is read-only.
        tensors.append(image.detach() if isinstance(image, torch.Tensor) else torch.from_numpy(image.copy()))
    if not tensors:
        raise ValueError(f"{name} must hold at least one image, got none")
    for tensor in tensors:
        if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or 0 in tensor.shape:
            raise ValueError(
                f"{name} must be [C, H, W] with C 1 or 3 and no empty side, got shape {list(tensor.shape)}"
            )
    return tensors


def _pictures(images: list[torch.Tensor], normalized: tuple[Sequence[float], Sequence[float]]) -> list[np.ndarray]:
    """uint8 [H, W, 3] arrays; the range of the values is judged over all the images together."""
    values = [image.cpu() if image.dtype == torch.uint8 else image.cpu().float() for image in images]
    whole = all(not image.is_floating_point() and image.dtype != torch.bool for image in images)
    finite = [v[v.isfinite()] for v in values if v.is_floating_point()]
    finite = [v for v in finite if v.numel()]
    low = min((float(v.min()) for v in finite), default=0.0)
    high = max((float(v.max()) for v in finite), default=0.0)
    mean, std = (torch.tensor(list(numbers)).view(-1, 1, 1) for numbers in normalized)
    # Resampling and colour arithmetic may leave [0, 1] by a little; normalised photographs leave it by much.
    slack = 0.02
    pictures = []
    for value in values:
        if value.is_floating_point():
            if not whole and low >= -slack and high <= 1 + slack:
                value = value * 255
            elif not whole and (low < -slack or high <= 3):
                value = (value * std + mean) * 255
            value = value.nan_to_num(0.0, 255.0, 0.0).clamp(0, 255).round().to(torch.uint8)
        pictures.append(value.expand(3, -1, -1).permute(1, 2, 0).numpy())
    return pictures


def _is_crop(value: object) -> bool:
    """Whether a field's value is a batch of images: [B, C, H, W], or a list of [C, H, W]."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 4 and value.shape[1] in (1, 3)
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(v, torch.Tensor) and v.ndim == 3 and v.shape[0] in (1, 3) for v in value)


def _named_crops(batch: Mapping[str, Any] | Sequence[torch.Tensor] | torch.Tensor) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        batch = {"crop": batch}
    named = {}
    for name, value in batch.items():
        if _is_crop(value):
            named[name] = value
        elif isinstance(value, (list, tuple)) and value and all(map(_is_crop, value)):
            named.update({f"{name}_{i}": crop for i, crop in enumerate(value)})
    if not named:
        raise ValueError(f"batch must hold a crop [B, C, H, W] with C 1 or 3, got the fields {list(batch)}")
    return named


def _chosen(named: dict[str, Any], crops: Sequence[str] | None) -> list[str]:
    if crops is None:
        return list(named)
    chosen = [crops] if isinstance(crops, str) else list(crops)
    unknown = [name for name in chosen if name not in named]
    if unknown or not chosen:
        raise ValueError(f"crops must name some of {list(named)}, got {unknown or chosen}")
    return chosen


def _sample_numbers(samples: Any, count: int) -> list[int]:
    if isinstance(samples, Iterable) and not isinstance(samples, str) and getattr(samples, "shape", True):
        chosen = [int(i) for i in samples]
    else:
        chosen = list(range(min(checks.whole("samples", samples), count)))
    if not chosen or not all(0 <= i < count for i in chosen):
        raise ValueError(f"samples must be a number of samples >= 1, or some of [0, {count}), got {samples!r}")
    return chosen


def _take(name: str, images: torch.Tensor | Sequence[torch.Tensor], shown: list[int]) -> list[torch.Tensor]:
    if len(images) <= max(shown):
        raise ValueError(f"{name} must hold an image for sample {max(shown)}, got {len(images)} images")
    return _as_images(name, [images[i] for i in shown])


def _describe(crop: torch.Tensor | Sequence[torch.Tensor], shown: list[int]) -> str:
    sizes = {tuple(crop[i].shape[1:]) for i in shown}
    size = "{} x {}".format(*sizes.pop()) if len(sizes) == 1 else "many sizes"
    return f"{size} {str(crop[shown[0]].dtype).removeprefix('torch.')}"


def _shown(figure: Figure) -> Figure:
    """Shows the figure if this is a notebook, and keeps it from showing again as its cell's result."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and hasattr(shell, "kernel"):
        _display(figure)
        setattr(figure, "_ipython_display_", partial(_display_again, figure, shell.execution_count))  # noqa: B010
    return figure


def _display(figure: Figure) -> None:
    from IPython.display import Image, display

    # Bytes, because IPython draws Figures only after somebody has imported pyplot.
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        display(Image(file.getvalue()))


def _display_again(figure: Figure, cell: int) -> None:
    shell = sys.modules["IPython"].get_ipython()
    if shell is None or shell.execution_count != cell:
        _display(figure)
