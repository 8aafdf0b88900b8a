"""Stages of the user's own, and the crops that share one cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from . import checks
from .device import to_device
from .draws import Draws


@runtime_checkable
class OwnStage(Protocol):
    """A stage that a user writes as a class: what is drawn for each sample, and what is done with it.

    It is drawn as every stage is: by seed, crop, class name, sample id and epoch, whatever the batch. A `seed` of its
    own (an attribute) is used as those of the library's stages are. A loader's state knows it by its name and by those
    attributes that are numbers, texts or lists of them: with others it is another pipeline's.
    """

    def sample_params(self, draws: Draws) -> Any:
        """The parameters of each image: an array, or a dict of arrays, whose first axis is the batch.

        draws.uniform(first, count) gives float64 [B, count, 4] in [0, 1), always the same ones for the same sample.
        """
        ...

    def apply(self, images: torch.Tensor, params: Any) -> torch.Tensor:
        """images [B, 3, h, w] in the dtype of its place in the chain, params as tensors on their device -> [B, ...].

        Bytes until a Normalize or ToDtype, float after it. Give the same dtype back: what follows takes floats as
        values in [0, 1], so bytes made float must be divided by 255. Keep the size where a stage that moves pixels or
        erases a box follows: it is drawn for the crop's.
        """
        ...


def is_own(stage: Any) -> bool:
    """Whether a stage is of the user's own: an OwnStage, or a plain function on images [B, 3, h, w]."""
    if isinstance(stage, type) or type(stage).__module__.split(".")[0] == "slipstream":
        return False  # a class for its object, or an object of ours that stands elsewhere (a crop, a batch stage)
    return isinstance(stage, OwnStage) or callable(stage)


def sample_own(stage: Any, draws: Draws) -> Any:
    """What is drawn for it: an array, a dict of arrays, or None for a function. TypeError for anything else."""
    if not isinstance(stage, OwnStage):
        return None
    params = stage.sample_params(draws)
    parts = params.values() if isinstance(params, Mapping) else [params]
    for part in parts:
        if not isinstance(part, np.ndarray) or len(part) != len(draws):
            got = f"{part.dtype} {list(part.shape)}" if isinstance(part, np.ndarray) else repr(part)
            raise TypeError(
                f"{type(stage).__name__}.sample_params must give an array with one row for each of the {len(draws)} "
                f"samples, or a dict of them, got {got}"
            )
    return params


def apply_own(stage: Any, images: torch.Tensor, params: Any) -> torch.Tensor:
    """Run it, on what images there are; TypeError or ValueError for what is no batch of as many images."""
    name = getattr(stage, "__name__", type(stage).__name__)
    if not isinstance(stage, OwnStage):
        result = stage(images)
    elif isinstance(params, Mapping):
        result = stage.apply(images, {key: to_device(part, images.device) for key, part in params.items()})
    else:
        result = stage.apply(images, to_device(params, images.device))
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{name} must give a tensor [{len(images)}, ...], got {type(result).__name__}")
    if not result.ndim or len(result) != len(images):
        raise ValueError(f"{name} must give a tensor [{len(images)}, ...], got shape {list(result.shape)}")
    return result


@dataclass(frozen=True, slots=True)
class NamedCopies:
    """Several names for one crop: it is cut once, and each name goes through its own pipeline.

    names: of the outputs, one or more, unlike. It stands after a crop stage that gives one crop, and after the
    stages that all copies share; a MultiCropPipeline after it names the copies. Raises ValueError or TypeError.
    """

    names: Sequence[str]

    def __post_init__(self) -> None:
        names = self.names
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"names must be a list of strings, got {names!r}")
        if not names or "" in names or len(set(names)) < len(names):
            raise ValueError(f"names must be unlike and not empty, got {names!r}")
        checks.settle(self, names=tuple(names))
