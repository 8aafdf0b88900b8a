"""Sizes that presets take, and the arguments that they refuse when they are called."""

from __future__ import annotations

import pytest

from slipstream import ColorJitter, Pipeline, presets


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("dinov2", dict(blur="written"), "blur must be one of 'as_written', 'as_trained', got 'written'"),
        ("dinov3", dict(blur=None), "blur must be one of"),
        ("supervised_train", dict(style="keras"), "style must be one of 'torchvision', 'torchvision_new', 'timm'"),
        ("supervised_val", dict(style="keras"), "style must be one of"),
        ("supervised_batch_stages", dict(style="keras"), "style must be one of"),
        ("dino", dict(local_crops=-1), "local_crops must be 0 or more"),
        ("multicrop", dict(global_crops=0), "global_crops must be 1 or more"),
        ("dino", dict(scale=(0.5, 2.0)), "scale must satisfy"),
        ("simclr", dict(size="224"), r"size must be an int or two ints \(h, w\), got '224'"),
        ("supervised_train", dict(size=0), "size must be 1 pixel or more, got 0"),
        ("supervised_train", dict(interpolation=""), "interpolation must be one of"),
        ("supervised_val", dict(resize=0), "resize must be 1 pixel or more, got 0"),
        ("supervised_val", dict(style="timm", size=(224, 224)), r"size must be an int, got \(224, 224\)"),
        ("dinov3", dict(subset_of_globals=True, local_size=300), r"local_size must be at most size \(224\)"),
        ("dinov3", dict(subset_of_globals=True, local_size=(96, 96)), "local_size must be an int"),
        ("multicrop", dict(stages=ColorJitter(0.4)), "stages must be a list of stages, got ColorJitter"),
    ],
)
def test_bad_arguments_are_refused(name, given, match) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        getattr(presets, name)(**given)


def test_sizes_of_two_sides() -> None:
    for name in ("simclr", "byol", "dinov2", "supervised_train", "supervised_val"):
        pipeline = Pipeline(getattr(presets, name)(size=[64, 48]))
        assert pipeline.formats_on_host[0].size == (64, 48)
    assert presets.simclr(size=(64, 48))[1].pipelines["view_0"][3].kernel_size == (7, 7)
