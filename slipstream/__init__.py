"""Slipstream: JPEG bytes to named, deterministic, byte-exact random crops, and each crop's augmentations, fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import presets as presets
    from .batch_stage import CutMix as CutMix
    from .batch_stage import MixUp as MixUp
    from .batch_stage import RandomBatchChoice as RandomBatchChoice
    from .crop import CenterCrop as CenterCrop
    from .crop import FiveCrop as FiveCrop
    from .crop import MultiCropRandomResizedCrop as MultiCropRandomResizedCrop
    from .crop import MultiRandomResizedCrop as MultiRandomResizedCrop
    from .crop import RandomResizedCrop as RandomResizedCrop
    from .crop import RandomResizeShortCropLong as RandomResizeShortCropLong
    from .crop import Resize as Resize
    from .crop import ResizedCrop as ResizedCrop
    from .crop import TenCrop as TenCrop
    from .dataset import SlipstreamDataset as SlipstreamDataset
    from .decode import DecodeError as DecodeError
    from .decode import WrongPixelsError as WrongPixelsError
    from .loader import SlipstreamLoader as SlipstreamLoader
    from .pipeline import Pipeline as Pipeline
    from .plan import Plan as Plan
    from .plot import plot_crops as plot_crops
    from .plot import show_batch as show_batch
    from .source import ReadError as ReadError
    from .source import UnavailableError as UnavailableError
    from .source_fields import PickleRefusedError as PickleRefusedError
    from .stage import MultiCropPipeline as MultiCropPipeline
    from .stage import Normalize as Normalize
    from .stage import ToDtype as ToDtype
    from .stage_auto import RandAugment as RandAugment
    from .stage_auto import TimmRandAugment as TimmRandAugment
    from .stage_auto import TrivialAugmentWide as TrivialAugmentWide
    from .stage_blur import GaussianBlur as GaussianBlur
    from .stage_blur import PILGaussianBlur as PILGaussianBlur
    from .stage_blur import RandomAdjustSharpness as RandomAdjustSharpness
    from .stage_color import ColorJitter as ColorJitter
    from .stage_color import RandomAutocontrast as RandomAutocontrast
    from .stage_color import RandomEqualize as RandomEqualize
    from .stage_color import RandomGrayscale as RandomGrayscale
    from .stage_color import RandomInvert as RandomInvert
    from .stage_color import RandomPosterize as RandomPosterize
    from .stage_color import RandomSolarize as RandomSolarize
    from .stage_compose import RandomApply as RandomApply
    from .stage_compose import RandomChoice as RandomChoice
    from .stage_compose import RandomOrder as RandomOrder
    from .stage_erase import RandomErasing as RandomErasing
    from .stage_flip import RandomHorizontalFlip as RandomHorizontalFlip
    from .stage_flip import RandomVerticalFlip as RandomVerticalFlip
    from .stage_own import NamedCopies as NamedCopies
    from .stage_warp import RandomAffine as RandomAffine
    from .stage_warp import RandomPerspective as RandomPerspective
    from .stage_warp import RandomRotation as RandomRotation

# Where each public name lives: it is imported when it is first used, so that one piece does not pull in the others.
_HOMES = {
    "CutMix": "batch_stage",
    "MixUp": "batch_stage",
    "RandomBatchChoice": "batch_stage",
    "CenterCrop": "crop",
    "FiveCrop": "crop",
    "MultiCropRandomResizedCrop": "crop",
    "MultiRandomResizedCrop": "crop",
    "RandomResizedCrop": "crop",
    "RandomResizeShortCropLong": "crop",
    "Resize": "crop",
    "ResizedCrop": "crop",
    "TenCrop": "crop",
    "SlipstreamDataset": "dataset",
    "DecodeError": "decode",
    "WrongPixelsError": "decode",
    "SlipstreamLoader": "loader",
    "Pipeline": "pipeline",
    "Plan": "plan",
    "plot_crops": "plot",
    "show_batch": "plot",
    "ReadError": "source",
    "UnavailableError": "source",
    "PickleRefusedError": "source_fields",
    "MultiCropPipeline": "stage",
    "Normalize": "stage",
    "ToDtype": "stage",
    "RandAugment": "stage_auto",
    "TimmRandAugment": "stage_auto",
    "TrivialAugmentWide": "stage_auto",
    "GaussianBlur": "stage_blur",
    "PILGaussianBlur": "stage_blur",
    "RandomAdjustSharpness": "stage_blur",
    "ColorJitter": "stage_color",
    "RandomAutocontrast": "stage_color",
    "RandomEqualize": "stage_color",
    "RandomGrayscale": "stage_color",
    "RandomInvert": "stage_color",
    "RandomPosterize": "stage_color",
    "RandomSolarize": "stage_color",
    "RandomApply": "stage_compose",
    "RandomChoice": "stage_compose",
    "RandomOrder": "stage_compose",
    "RandomErasing": "stage_erase",
    "RandomHorizontalFlip": "stage_flip",
    "RandomVerticalFlip": "stage_flip",
    "NamedCopies": "stage_own",
    "RandomAffine": "stage_warp",
    "RandomPerspective": "stage_warp",
    "RandomRotation": "stage_warp",
}
__all__ = ["__version__", "presets", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "presets":
        return importlib.import_module(".presets", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
