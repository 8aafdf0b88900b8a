"""Stages made of stages: what is applied, picked and ordered, and where what is inside draws from."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (wrong parameters are given on purpose)

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from slipstream_kernels import ops

from slipstream.draws import Draws, stream_key
from slipstream.stage_blur import GaussianBlur
from slipstream.stage_color import ColorJitter, RandomGrayscale, RandomInvert, RandomPosterize, RandomSolarize
from slipstream.stage_compose import RandomApply, RandomChoice, RandomOrder
from slipstream.stage_program import most
from slipstream.stage_warp import RandomRotation

IDS = np.arange(20_000)
SIZE = (16, 24)
GREY, INVERT = RandomGrayscale(1.0), RandomInvert(1.0)
JITTER = ColorJitter(0.4, 0.4, order="fixed")


def draws_of(ids=IDS, seed: int = 0, name: str = "test") -> Draws:
    return Draws(stream_key(seed, name), ids, 0)


def program_of(stage, ids=IDS, **options) -> np.ndarray:
    return stage.sample_program(draws_of(ids, **options), SIZE)


def test_all_stages_are_applied_or_none() -> None:
    stage = RandomApply([JITTER, GREY], p=0.3)
    assert stage.slots() == ((ops.BRIGHTNESS,), (ops.CONTRAST,), (ops.GREY,))
    program = program_of(stage)
    some = (program != 0).any((1, 2))
    assert abs(some.mean() - 0.3) < 5 * np.sqrt(0.21 / len(IDS))
    inside = np.concatenate(
        [
            JITTER.sample_program(draws_of().child("ColorJitter\x1f0"), SIZE),
            GREY.sample_program(draws_of().child("RandomGrayscale\x1f1"), SIZE),
        ],
        axis=1,
    )
    assert np.array_equal(program[some], inside[some])


def test_a_stages_own_p_and_the_outer_one_are_independent() -> None:
    both = program_of(RandomApply([RandomInvert(0.4)], p=0.5))[:, 0, 0] != 0
    assert abs(both.mean() - 0.2) < 5 * np.sqrt(0.16 / len(IDS))


def test_places_of_one_kind_draw_independently() -> None:
    program = program_of(RandomApply([RandomInvert(0.5), RandomInvert(0.5), RandomGrayscale(0.5)], p=1.0))
    correlation = np.corrcoef((program[:, :, 0] != 0).T.astype(float))
    assert np.abs(correlation - np.eye(3)).max() < 5 / np.sqrt(len(IDS))


def test_an_explicit_seed_inside_is_the_seed_of_everywhere() -> None:
    shared = ColorJitter(0.4, 0.4, 0.2, 0.1, seed=5)
    alone = shared.sample_program(Draws(stream_key(5, "ColorJitter"), IDS[:50], 0), SIZE)
    for stage in (RandomApply([GREY, shared], 1.0), RandomApply([RandomApply([GREY, shared], 1.0)], 1.0)):
        assert np.array_equal(program_of(stage, IDS[:50], name="a")[:, 1:], alone)
        assert np.array_equal(program_of(stage, IDS[:50], name="b")[:, 1:], alone)


@pytest.mark.parametrize(("weights", "shares"), [(None, [1 / 3] * 3), ((1, 0, 3), [0.25, 0, 0.75])])
def test_one_stage_is_picked_by_weight(weights, shares) -> None:
    stage = RandomChoice([GREY, JITTER, RandomPosterize(4, 1.0)], p=weights)
    program = program_of(stage)
    assert program.shape[1] == JITTER.sample_program(draws_of(IDS[:1]), SIZE).shape[1]
    first = program[:, 0, 0]
    for code, share in zip([ops.GREY, ops.BRIGHTNESS, ops.POSTERIZE], shares, strict=True):
        assert abs((first == code).mean() - share) <= 5 * np.sqrt(share * (1 - share) / len(IDS))
    short = first != ops.BRIGHTNESS
    assert (program[short, 1:] == 0).all() and (program[~short, 1, 0] == ops.CONTRAST).all()
    assert (first != 0).all()


class ZeroDraws(Draws):
    """Draws whose every word is 0, the least."""

    def words(self, first, count=1):
        return np.zeros((len(self), count, 4), np.uint32)


def test_a_weight_of_zero_is_never_picked() -> None:
    stage = RandomChoice([GREY, INVERT, GREY], p=(0, 1, 0))
    assert (stage.sample_program(ZeroDraws(0, [1], 0), SIZE)[:, 0, 0] == ops.INVERT).all()
    assert (program_of(stage)[:, 0, 0] == ops.INVERT).all()


def test_slots_of_a_choice_say_what_may_stand_in_each_row() -> None:
    stage = RandomChoice([GREY, JITTER, RandomApply([GaussianBlur(3), ColorJitter(contrast=0.2)])])
    assert stage.slots() == ((ops.BRIGHTNESS, ops.GREY, ops.GAUSSIAN_BLUR), (ops.CONTRAST,))
    assert most(stage, [ops.CONTRAST]) == 1 and most(stage, [ops.GREY, ops.CONTRAST]) == 2


def test_orders_are_uniform_and_keep_a_stages_rows_together() -> None:
    stages = [GREY, JITTER, RandomSolarize(128, 1.0), RandomApply([RandomPosterize(4, 1.0), INVERT], 0.5)]
    program = program_of(RandomOrder(stages))
    lengths = [program_of(stage, IDS[:1]).shape[1] for stage in stages]
    parts = [
        stage.sample_program(draws_of().child(f"{type(stage).__name__}\x1f{i}"), SIZE) for i, stage in enumerate(stages)
    ]
    matches = np.stack(
        [
            (program == np.concatenate([parts[i] for i in order], axis=1)).all((1, 2))
            for order in permutations(range(4))
        ],
        axis=1,
    )
    assert program.shape[1] == sum(lengths)
    assert matches.any(1).all()
    counts = matches[(program[:, :, 0] == ops.INVERT).any(1)].sum(0)  # where no stage is NOTHING
    expected = counts.sum() / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 1e-3


def test_an_order_of_more_stages_than_a_block_has_words() -> None:
    stages = [RandomPosterize(bits, 1.0) for bits in range(9)]
    levels = program_of(RandomOrder(stages))[:, :, 1]
    assert (np.sort(levels, axis=1) == 2.0 ** np.arange(9)).all()
    place = np.argsort(levels, axis=1)
    assert np.abs(place.mean(0) - 4).max() < 5 * np.sqrt(60 / 9 / len(IDS))


def test_they_nest() -> None:
    stage = RandomOrder(
        [
            RandomChoice([RandomApply([GREY], 1.0), INVERT]),
            RandomApply([RandomOrder([JITTER, RandomRotation(20)])], 1.0),
        ]
    )
    codes = program_of(stage)[:, :, 0]
    assert {tuple(sorted(row)) for row in codes.tolist()} == {
        tuple(sorted([one, *(0.0,) * (codes.shape[1] - 4), ops.BRIGHTNESS, ops.CONTRAST, ops.WARP]))
        for one in (ops.GREY, ops.INVERT)
    }
    assert sorted(stage.slots()) == [(ops.BRIGHTNESS,), (ops.CONTRAST,), (ops.GREY, ops.INVERT), (ops.WARP,)]


class Flip:
    """What stands for a flip: no ProgramStage, but it has slots and samples programs."""

    def slots(self):
        return ((ops.WARP,),)

    def sample_program(self, draws, size):
        program = np.zeros((len(draws), 1, ops.OP_WIDTH), np.float32)
        program[:, 0, :7] = [ops.WARP, -1, 0, size[1], 0, 1, 0]
        return program


def test_anything_that_samples_programs_may_stand_inside() -> None:
    program = program_of(RandomApply([Flip(), GREY], 1.0))
    assert (program[:, :, 0] == [ops.WARP, ops.GREY]).all() and (program[:, 0, 3] == SIZE[1]).all()


STAGES = [
    RandomApply([JITTER, RandomInvert(0.5)]),
    RandomChoice([JITTER, RandomInvert(0.5)]),
    RandomOrder([JITTER, RandomInvert(0.5), GREY]),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_a_sample_does_not_depend_on_its_batch(stage) -> None:
    whole = program_of(stage, IDS[:50])
    alone = np.concatenate([program_of(stage, IDS[i : i + 1]) for i in range(50)])
    assert np.array_equal(whole, alone) and whole.dtype == np.float32
    assert not np.array_equal(whole, program_of(stage, IDS[:50], name="other"))
    assert program_of(stage, []).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomApply(GREY), TypeError, "stages must be a list of stages, got RandomGrayscale"),
        (lambda: RandomApply([]), ValueError, r"stages must hold one stage or more, got \[\]"),
        (lambda: RandomApply([GREY], p=1.2), ValueError, r"p must be in \[0, 1\], got 1.2"),
        (lambda: RandomApply([GREY, RandomInvert]), TypeError, r"stages\[1\] must be a stage that samples a program"),
        (
            lambda: RandomOrder([lambda x: x]),
            TypeError,
            r"stages\[0\] must be .* functions go into the crop's own list",
        ),
        (lambda: RandomOrder("ab"), TypeError, "stages must be a list of stages"),
        (lambda: RandomChoice([GREY, 3]), TypeError, r"stages\[1\] .*, got 3"),
        (lambda: RandomChoice([GREY, INVERT], p=(1, 2, 3)), ValueError, "p must be 2 weights, one a stage"),
        (lambda: RandomChoice([GREY, INVERT], p=(1, -1)), ValueError, "p must be weights of 0 or more"),
        (lambda: RandomChoice([GREY, INVERT], p=(0, 0)), ValueError, "p must be weights of 0 or more .* not all 0"),
        (lambda: RandomChoice([GREY, INVERT], p=0.5), TypeError, "p must be 2 weights"),
        (lambda: RandomChoice([GREY], seed="1"), TypeError, "seed must be an int or None"),
    ],
)
def test_bad_parameters_are_refused_when_made(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
