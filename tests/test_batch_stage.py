"""Batch stages: torchvision's MixUp and CutMix at the same numbers, the law of the numbers, keys, labels, dtypes."""

# A spec takes more than the settled types that its fields declare, and scipy declares none.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import _augment

from slipstream.batch_stage import (
    CutMix,
    MixUp,
    RandomBatchChoice,
    apply_batch_stages,
    batch_stage_keys,
    check_batch_stages,
    check_labels,
    describe_batch_params,
)
from slipstream.distributions import symmetric_beta
from slipstream.draws import Draws, stream_key

CLASSES = 10
SIZE = (24, 36)


def batch_of(count: int, *sizes: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    crops = {f"crop{i}": torch.rand(count, 3, *size, generator=generator) for i, size in enumerate(sizes or [SIZE])}
    return {**crops, "label": torch.randint(CLASSES, (count,), generator=generator), "_indices": torch.arange(count)}


def params_of(stage, sizes=(SIZE,), ids=None, seed: int = 0, epoch: int = 0) -> dict[str, np.ndarray]:
    ids = np.arange(40) if ids is None else ids
    return stage.sample_params(Draws(batch_stage_keys([stage], seed)[0], ids, epoch), list(sizes))


def run(stages, batch, *, ids=None, seed: int = 0, epoch: int = 0) -> dict[str, Any]:
    ids = np.arange(len(batch["label"])) if ids is None else ids
    return apply_batch_stages(stages, batch_stage_keys(stages, seed), batch, ids, epoch)[0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_is_torchvisions_at_the_same_number(alpha: float) -> None:
    """Bit for bit: torchvision mixes a batch by one number, so it mixes each pair by itself."""
    batch, stage = batch_of(8), MixUp(CLASSES, alpha)
    lam = params_of(stage, ids=np.arange(8))["lam"]
    result = run([stage], batch)
    for i in range(8):
        theirs = v2.MixUp(alpha=alpha, num_classes=CLASSES)
        theirs.make_params = lambda flat_inputs, i=i: dict(lam=float(lam[i]))
        pair = [i - 1, i]
        images, labels = theirs(batch["crop0"][pair], batch["label"][pair])
        assert torch.equal(result["crop0"][i], images[1])
        assert torch.equal(result["label"][i], labels[1])


def test_cutmix_is_torchvisions_at_the_same_number_and_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    """The box from torchvision's own make_params, fed our number and centre."""
    count = 60
    batch, stage = batch_of(count), CutMix(CLASSES)
    draws = Draws(batch_stage_keys([stage], 0)[0], np.arange(count), 0)
    numbers = symmetric_beta(draws.words(1)[:, 0], 1.0).astype(np.float32)
    centres = draws.uniform(0)[:, 0, 1:3] * [SIZE[1], SIZE[0]]
    result, params = run([stage], batch), stage.sample_params(draws, [SIZE])
    for i in range(count):
        theirs = v2.CutMix(num_classes=CLASSES)
        monkeypatch.setattr(theirs._dist, "sample", lambda _, i=i: torch.tensor(numbers[i]))
        drawn = iter(centres[i].astype(int))
        monkeypatch.setattr(_augment.torch, "randint", lambda *_, drawn=drawn, **__: torch.tensor([next(drawn)]))
        pair = [i - 1, i]
        images, labels = theirs(batch["crop0"][pair], batch["label"][pair])
        monkeypatch.undo()
        assert torch.equal(result["crop0"][i], images[1])
        torch.testing.assert_close(result["label"][i], labels[1], atol=1e-7, rtol=0)
    area = params["box"][:, 0, 2] * params["box"][:, 0, 3]
    assert np.array_equal(params["lam"], (1 - area / (SIZE[0] * SIZE[1])).astype(np.float32))
    assert area.min() < 30 and area.max() > 600


@pytest.mark.parametrize(
    "stage", [MixUp(CLASSES, 1.0), CutMix(CLASSES), RandomBatchChoice([MixUp(CLASSES), CutMix(CLASSES)])]
)
def test_labels_sum_to_one_and_name_both_partners(stage) -> None:
    batch = batch_of(40)
    label = run([stage], batch)["label"]
    assert label.dtype == torch.float32 and label.shape == (40, CLASSES)
    torch.testing.assert_close(label.sum(1), torch.ones(40), atol=1e-6, rtol=0)
    lam = torch.from_numpy(params_of(stage)["lam"])
    own, other = batch["label"], batch["label"].roll(1)
    alike = own == other
    assert torch.equal(label[range(40), own][~alike], lam[~alike])
    torch.testing.assert_close(label[range(40), other][~alike], (1 - lam)[~alike])
    torch.testing.assert_close(label[range(40), own][alike], torch.ones(int(alike.sum())))


@pytest.mark.parametrize(
    "stage",
    [
        MixUp(CLASSES, 1.0),
        CutMix(CLASSES),
        RandomBatchChoice([MixUp(CLASSES, 1.0)]),
        RandomBatchChoice([CutMix(CLASSES)]),
    ],
)
def test_the_numbers_are_the_samples_own(stage) -> None:
    """Whatever the batch, its length and order; another epoch or seed gives others."""
    sizes = [SIZE, (8, 8)]
    whole = params_of(stage, sizes)
    for ids in (np.arange(7, 12), np.arange(39, -1, -1), np.array([5])):
        for name, part in params_of(stage, sizes, ids).items():
            assert np.array_equal(part, whole[name][ids])
    batch = batch_of(40, *sizes)
    again, (drawn,) = apply_batch_stages([stage], batch_stage_keys([stage], 0), batch, np.arange(40), 1)
    later = params_of(stage, sizes, epoch=1)
    assert all(np.array_equal(drawn[name], later[name]) for name in later)
    assert torch.equal(again["crop1"], stage.apply(batch, later)["crop1"])
    for other in (params_of(stage, sizes, seed=1), params_of(stage, sizes, epoch=1)):
        assert (other["lam"] != whole["lam"]).mean() > 0.9


def test_the_partner_is_the_sample_before() -> None:
    """In a full batch and in a short last one, where the last sample comes before the first."""
    stage = CutMix(CLASSES, alpha=1.0)
    for count in (6, 3, 2):
        batch = {
            "image": torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, 32, 32).float(),
            "label": torch.arange(count),
        }
        result = run([stage], batch, ids=np.arange(100, 100 + count))
        for i in range(count):
            assert set(result["image"][i].unique().tolist()) <= {float(i), float((i - 1) % count)}
            outside = (result["image"][i, 0] == i).float().mean()
            assert result["label"][i, i] == pytest.approx(outside.item(), abs=1e-6)


@pytest.mark.parametrize("stage", [MixUp(CLASSES, 1.0), CutMix(CLASSES)])
def test_a_batch_of_one_is_its_own_partner(stage) -> None:
    batch = batch_of(1)
    result = run([stage], batch)
    torch.testing.assert_close(result["crop0"], batch["crop0"], atol=1e-6, rtol=0)
    expected = torch.nn.functional.one_hot(batch["label"], CLASSES).float()
    torch.testing.assert_close(result["label"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_p_is_the_share_of_samples_mixed(kind) -> None:
    ids = np.arange(20_000)
    lam = params_of(kind(CLASSES, 1.0, p=0.3), ids=ids)["lam"]
    always = params_of(kind(CLASSES, 1.0), ids=ids)["lam"]
    assert abs((lam < 1).mean() / (always < 1).mean() - 0.3) < 0.015
    assert np.array_equal(lam[lam < 1], always[lam < 1])
    batch = batch_of(12)
    never = run([kind(CLASSES, p=0.0)], batch)
    assert torch.equal(never["crop0"], batch["crop0"])
    assert torch.equal(never["label"], torch.nn.functional.one_hot(batch["label"], CLASSES).float())


def test_all_crops_share_one_number_and_one_box_in_unit_coordinates() -> None:
    batch = batch_of(30, (64, 64), (64, 64), (16, 48))
    params = params_of(CutMix(CLASSES), [(64, 64), (64, 64), (16, 48)], np.arange(30))
    box = params["box"]
    assert np.array_equal(box[:, 0], box[:, 1])
    # the centre and half a side are each cut to whole pixels: two pixels at an edge
    assert (abs(box[:, 0, [0, 2]] / 64 - box[:, 2, [0, 2]] / 16) <= 2 / 16 + 2 / 64).all()
    assert (abs(box[:, 0, [1, 3]] / 64 - box[:, 2, [1, 3]] / 48) <= 2 / 48 + 2 / 64).all()
    shares = box[..., 2] * box[..., 3] / np.array([64 * 64, 64 * 64, 16 * 48])
    np.testing.assert_allclose(params["lam"], 1 - shares.mean(1), atol=1e-7)

    result = run([MixUp(CLASSES, 1.0)], batch)
    lam = torch.from_numpy(params_of(MixUp(CLASSES, 1.0), ids=np.arange(30))["lam"]).view(-1, 1, 1, 1)
    for name in ("crop0", "crop1", "crop2"):
        torch.testing.assert_close(result[name], lam * batch[name] + (1 - lam) * batch[name].roll(1, 0))


def test_only_the_crops_named_are_mixed() -> None:
    batch = batch_of(6, SIZE, SIZE)
    result = run([MixUp(CLASSES, 1.0, crops=["crop1"])], batch)
    assert result["crop0"] is batch["crop0"] and not torch.equal(result["crop1"], batch["crop1"])
    assert torch.equal(result["_indices"], batch["_indices"])
    with pytest.raises(ValueError, match=r"crops names 'crop9'.*\['crop0', 'crop1'\]"):
        run([MixUp(CLASSES, crops=["crop9"])], batch)


def test_a_list_of_crops_is_mixed_as_the_crops_themselves() -> None:
    named = batch_of(6, SIZE, (8, 8))
    listed = {"image": [named["crop0"], named["crop1"]], "label": named["label"]}
    before = [crop.clone() for crop in listed["image"]]
    for stage in (CutMix(CLASSES), MixUp(CLASSES, 1.0), CutMix(CLASSES, crops=["image"])):
        expected = run([stage if stage.crops is None else CutMix(CLASSES)], named)
        result = run([stage], listed)
        assert isinstance(result["image"], list) and len(result["image"]) == 2
        assert torch.equal(result["image"][0], expected["crop0"]) and torch.equal(result["image"][1], expected["crop1"])
        assert torch.equal(result["label"], expected["label"])
    assert all(torch.equal(crop, old) for crop, old in zip(listed["image"], before, strict=True))


def test_the_given_batch_is_left_as_it_is() -> None:
    batch = batch_of(6)
    before = {name: value.clone() for name, value in batch.items()}
    run([MixUp(CLASSES, 1.0), CutMix(CLASSES)], batch)
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_stages_after_one_another_take_the_labels_of_the_first() -> None:
    batch = batch_of(6)
    both = [MixUp(CLASSES, 1.0), CutMix(CLASSES)]
    keys = batch_stage_keys(both, 0)
    first, _ = apply_batch_stages(both[:1], keys[:1], batch, np.arange(6), 0)
    expected, _ = apply_batch_stages(both[1:], keys[1:], first, np.arange(6), 0)
    result, _ = apply_batch_stages(both, keys, batch, np.arange(6), 0)
    assert torch.equal(result["crop0"], expected["crop0"]) and torch.equal(result["label"], expected["label"])
    torch.testing.assert_close(result["label"].sum(1), torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "stage", [MixUp(CLASSES, 1.0), CutMix(CLASSES), RandomBatchChoice([MixUp(CLASSES), CutMix(CLASSES)])]
)
def test_dtype_and_memory_format_stay(dtype, memory_format, stage) -> None:
    batch = batch_of(6)
    batch["crop0"] = batch["crop0"].to(dtype).contiguous(memory_format=memory_format)
    result = run([stage], batch)["crop0"]
    assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)
    exact = run([stage], batch | {"crop0": batch["crop0"].float()})["crop0"]
    assert torch.equal(result, exact.to(dtype))


def test_uint8_pixels_are_refused() -> None:
    batch = batch_of(4)
    batch["crop0"] = (batch["crop0"] * 255).to(torch.uint8)
    for stage in (MixUp(CLASSES), CutMix(CLASSES)):
        with pytest.raises(TypeError, match=r"uint8 for 'crop0': put Normalize or ToDtype"):
            run([stage], batch)


@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_a_label_outside_the_classes_is_named(wrong: int) -> None:
    batch = batch_of(4)
    batch["label"][2] = wrong
    with pytest.raises(ValueError, match=rf"label must be in \[0, {CLASSES}\), got {wrong} at batch index 2"):
        run([MixUp(CLASSES)], batch)
    check_labels("label", np.array([0, CLASSES - 1]), CLASSES)


@pytest.mark.parametrize(
    ("label", "error", "match"),
    [
        (None, ValueError, "label must name a field of the batch, got 'label'"),
        ([1, 2, 3, 4], TypeError, "got a list"),
        (torch.zeros(4), TypeError, "float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \[4\], got \[3\]"),
        (torch.zeros(4, CLASSES + 1), ValueError, rf"shape \[4, {CLASSES}\], got \[4, {CLASSES + 1}\]"),
    ],
)
def test_what_is_no_label_is_refused(label, error, match) -> None:
    batch = batch_of(4) | {"label": label}
    if label is None:
        del batch["label"]
    with pytest.raises(error, match=match):
        run([MixUp(CLASSES)], batch, ids=np.arange(4))


def test_a_batch_without_crops_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no crop \[B, 3, h, w\] in the batch, which has \['label'\]"):
        run([MixUp(CLASSES)], {"label": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="same samples, got 4 and 3"):
        run([MixUp(CLASSES)], batch_of(4) | {"other": torch.zeros(3, 3, 8, 8)})
    with pytest.raises(ValueError, match="params must be of the batch's 4 samples, got 40"):
        MixUp(CLASSES).apply(batch_of(4), params_of(MixUp(CLASSES)))


def test_the_choice_is_each_samples_own() -> None:
    """Each sample gets what the stage picked for it gives, from the unmixed partner."""
    ids = np.arange(3000)
    stages = [MixUp(CLASSES, 1.0, seed=1), CutMix(CLASSES, seed=2)]
    params = params_of(RandomBatchChoice(stages, p=[3, 1]), ids=ids)
    blended = (params["blend"] < 1) & ~params["box"].any((1, 2))
    assert abs(blended.mean() - 0.75) < 0.03
    keys = [stream_key(1, "MixUp"), stream_key(2, "CutMix")]
    mixup, cutmix = (s.sample_params(Draws(k, ids, 0), [SIZE]) for s, k in zip(stages, keys, strict=True))
    assert np.array_equal(params["lam"], np.where(blended, mixup["lam"], cutmix["lam"]))
    assert np.array_equal(params["box"][~blended], cutmix["box"][~blended])

    batch = batch_of(30, (8, 8))
    choice = RandomBatchChoice(stages)
    picked = torch.from_numpy(params_of(choice, [(8, 8)], np.arange(30))["blend"] < 1).view(-1, 1, 1, 1)
    expected = torch.where(picked, run(stages[:1], batch)["crop0"], run(stages[1:], batch)["crop0"])
    assert 5 < picked.sum() < 25
    assert torch.equal(run([choice], batch)["crop0"], expected)
    assert (params_of(RandomBatchChoice(stages, p=[0, 1]), ids=ids)["blend"] == 1).all()


def test_seeds_decide_the_streams() -> None:
    """An explicit seed is the stage's own; two of a kind without one draw apart; a choice's parts do too."""
    a, b = MixUp(CLASSES, 1.0, seed=5), MixUp(CLASSES, 1.0, seed=5)
    assert np.array_equal(params_of(a, seed=0)["lam"], params_of(b, seed=9)["lam"])
    keys = batch_stage_keys([MixUp(), MixUp(), CutMix(), MixUp(seed=5)], 0)
    assert len(set(keys)) == 4 and keys[3] == batch_stage_keys([a], 3)[0]
    choices = [RandomBatchChoice([MixUp(CLASSES), MixUp(CLASSES)], seed=seed) for seed in (1, 1, 2)]
    first, same, other = (params_of(choice)["lam"] for choice in choices)
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_a_stage_called_by_itself() -> None:
    batch = batch_of(8)
    for stage in (MixUp(CLASSES, 1.0), CutMix(CLASSES, seed=4)):
        ids = torch.arange(8)
        assert torch.equal(stage(batch, sample_ids=ids)["crop0"], run([stage], batch)["crop0"])
        assert not torch.equal(stage(batch, sample_ids=ids, epoch=1)["label"], run([stage], batch)["label"])
        torch.manual_seed(0)
        first = stage(batch)["crop0"]
        torch.manual_seed(0)
        assert torch.equal(first, stage(batch)["crop0"])
        assert not torch.equal(first, stage(batch)["crop0"])


def test_the_parameters_in_words() -> None:
    mixup, cutmix = params_of(MixUp(CLASSES, 1.0)), params_of(CutMix(CLASSES))
    lam = f"{mixup['lam'][3]:.4g}"
    assert describe_batch_params(mixup, 3) == f"blended with the sample before, {lam} its own, label {lam} its own"
    top, left, height, width = cutmix["box"][3, 0]
    words = f"box {height} x {width} at ({top}, {left}) from the sample before, label {cutmix['lam'][3]:.4g} its own"
    assert describe_batch_params(cutmix, 3) == words
    assert describe_batch_params(params_of(CutMix(CLASSES, p=0.0)), 3) == "not mixed"


@pytest.mark.parametrize("kind", [MixUp, CutMix])
@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (dict(alpha=0), ValueError, "alpha must be above 0, got 0"),
        (dict(alpha="1"), TypeError, "alpha must be a finite number"),
        (dict(num_classes=0), ValueError, "num_classes must be 1 or more"),
        (dict(num_classes=2.5), TypeError, "num_classes must be an int"),
        (dict(p=1.5), ValueError, r"p must be in \[0, 1\]"),
        (dict(label=""), TypeError, "label must be the name of a field"),
        (dict(crops="image"), TypeError, "crops must be a list of crop names"),
        (dict(crops=[]), ValueError, "crops must name at least one crop"),
        (dict(crops=["a", "a"]), ValueError, "each once"),
        (dict(seed=1.5), TypeError, "seed must be an int or None"),
    ],
)
def test_bad_parameters_are_refused(kind, given, error, match) -> None:
    with pytest.raises(error, match=match):
        kind(**given)


def test_a_bad_choice_is_refused() -> None:
    for stages, error, match in (
        ([], TypeError, "stages must be a list"),
        ([MixUp(), "cutmix"], TypeError, r"stages\[1\] must be a MixUp or a CutMix"),
        ([MixUp(10), CutMix(20)], ValueError, "agree in num_classes, got 10 and 20"),
        ([MixUp(label="a"), CutMix(label="b")], ValueError, "agree in label"),
        ([MixUp(crops=["a"]), CutMix()], ValueError, "agree in crops"),
    ):
        with pytest.raises(error, match=match):
            RandomBatchChoice(stages)
    for p in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="p must be"):
            RandomBatchChoice([MixUp(), CutMix()], p)
    with pytest.raises(TypeError, match=r"batch_stages\[1\] must be a MixUp, CutMix or RandomBatchChoice"):
        check_batch_stages("batch_stages", [MixUp(), v2.CutMix(num_classes=3)])
    assert check_batch_stages("batch_stages", [MixUp()]) == (MixUp(),)


@pytest.mark.gpu
def test_on_a_gpu_the_same_and_without_waiting() -> None:
    """The same bytes as on the CPU, in float32; labels stay on the host until they are checked."""
    batch, stages = batch_of(6), [MixUp(CLASSES, 1.0), CutMix(CLASSES)]
    there = batch | {"crop0": batch["crop0"].cuda()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run(stages, there, ids=np.arange(6))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = run(stages, batch)
    assert torch.equal(result["crop0"].cpu(), expected["crop0"]) and torch.equal(
        result["label"].cpu(), expected["label"]
    )
