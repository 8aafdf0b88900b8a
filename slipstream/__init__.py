"""Slipstream: JPEG bytes to named, deterministic, byte-exact random crops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .batch_stage import CutMix as CutMix
    from .batch_stage import MixUp as MixUp
    from .batch_stage import RandomBatchChoice as RandomBatchChoice
    from .crop import CenterCrop as CenterCrop
    from .crop import MultiCropRandomResizedCrop as MultiCropRandomResizedCrop
    from .crop import MultiRandomResizedCrop as MultiRandomResizedCrop
    from .crop import RandomResizedCrop as RandomResizedCrop
    from .dataset import SlipstreamDataset as SlipstreamDataset
    from .decode import DecodeError as DecodeError
    from .loader import SlipstreamLoader as SlipstreamLoader
    from .pipeline import Pipeline as Pipeline
    from .plan import Plan as Plan
    from .plot import plot_crops as plot_crops
    from .plot import show_batch as show_batch
    from .source import ReadError as ReadError
    from .source_fields import PickleRefusedError as PickleRefusedError
    from .stage import MultiCropPipeline as MultiCropPipeline
    from .stage import Normalize as Normalize
    from .stage import ToDtype as ToDtype
    from .stage_color import ColorJitter as ColorJitter
    from .stage_color import RandomGrayscale as RandomGrayscale
    from .stage_color import RandomInvert as RandomInvert
    from .stage_color import RandomPosterize as RandomPosterize
    from .stage_color import RandomSolarize as RandomSolarize
    from .stage_flip import RandomHorizontalFlip as RandomHorizontalFlip
    from .stage_flip import RandomVerticalFlip as RandomVerticalFlip
    from .stage_own import NamedCopies as NamedCopies

# Where each public name lives: it is imported when it is first used, so that one piece does not pull in the others.
_HOMES = {
    "CutMix": "batch_stage",
    "MixUp": "batch_stage",
    "RandomBatchChoice": "batch_stage",
    "CenterCrop": "crop",
    "MultiCropRandomResizedCrop": "crop",
    "MultiRandomResizedCrop": "crop",
    "RandomResizedCrop": "crop",
    "SlipstreamDataset": "dataset",
    "DecodeError": "decode",
    "SlipstreamLoader": "loader",
    "plot_crops": "plot",
    "show_batch": "plot",
    "ReadError": "source",
    "PickleRefusedError": "source_fields",
    "MultiCropPipeline": "stage",
    "Normalize": "stage",
    "ToDtype": "stage",
    "Pipeline": "pipeline",
    "Plan": "plan",
    "ColorJitter": "stage_color",
    "RandomGrayscale": "stage_color",
    "RandomInvert": "stage_color",
    "RandomPosterize": "stage_color",
    "RandomSolarize": "stage_color",
    "RandomHorizontalFlip": "stage_flip",
    "RandomVerticalFlip": "stage_flip",
    "NamedCopies": "stage_own",
}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
