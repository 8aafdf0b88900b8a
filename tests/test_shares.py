"""Who takes which position: every world size, tail and start, by their laws and not by the formula."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.shares import Shares, choose_ranks, choose_tail

GRID = [
    (length, batch, world, start)
    for length in (0, 1, 7, 24, 25, 61)
    for batch in (1, 3, 4)
    for world in (1, 2, 3, 8)
    for start in (0, 5, 24)
]


def steps_of(length: int, batch: int, world: int, tail: str, start: int = 0):
    """For each rank a list of (positions, valid)."""
    ranks = [
        Shares(length=length, batch_size=batch, rank=rank, world_size=world, tail=tail, start=start)
        for rank in range(world)
    ]
    return [[shares.positions(step) for step in range(len(shares))] for shares in ranks]


@pytest.mark.parametrize("tail", ["pad", "uneven", "drop"])
def test_each_position_is_taken_once(tail: str) -> None:
    for length, batch, world, start in GRID:
        ranks = steps_of(length, batch, world, tail, start)
        taken = np.concatenate([np.zeros(0, int), *(p[v] for steps in ranks for p, v in steps)])
        left = max(length - start, 0)
        count = left // (batch * world) * batch * world if tail == "drop" else left
        assert sorted(taken) == list(range(start, start + count)), (length, batch, world, start)


def test_padding_gives_every_rank_the_same_full_steps() -> None:
    for length, batch, world, start in GRID:
        ranks = steps_of(length, batch, world, "pad", start)
        assert len({len(steps) for steps in ranks}) == 1
        for positions, valid in (step for steps in ranks for step in steps):
            assert len(positions) == len(valid) == batch
            assert ((positions >= 0) & (positions < length)).all()
        invalid = sum(int((~valid).sum()) for steps in ranks for _, valid in steps)
        assert invalid < batch * world


def test_uneven_ranks_differ_by_a_sample() -> None:
    for length, batch, world, start in GRID:
        ranks = steps_of(length, batch, world, "uneven", start)
        counts = [sum(len(positions) for positions, _ in steps) for steps in ranks]
        assert max(counts) - min(counts) <= 1
        assert all(len(positions) for steps in ranks for positions, _ in steps)


def test_a_step_is_the_same_samples_whatever_the_world_size() -> None:
    for tail in ("pad", "drop", "uneven"):
        whole = steps_of(61, 12, 1, tail)[0]
        for world in (2, 3, 4, 6, 12):
            ranks = steps_of(61, 12 // world, world, tail)
            for step, (positions, valid) in enumerate(whole):
                parts = [steps[step] for steps in ranks if step < len(steps)]
                together = np.concatenate([part[0][part[1]] for part in parts])
                assert sorted(together) == sorted(positions[valid])


def test_from_a_start_it_goes_on_where_it_stopped() -> None:
    for world, batch in ((1, 4), (2, 3), (4, 1)):
        shares = Shares(length=61, batch_size=batch, rank=0, world_size=world, tail="pad")
        for steps in (0, 1, 5, len(shares)):
            start = shares.handed_out(steps)
            assert start == min(steps * batch * world, 61)
            rest = steps_of(61, 5, 3, "uneven", start)
            taken = sorted(np.concatenate([np.zeros(0, int), *(p for each in rest for p, _ in each)]))
            assert taken == list(range(start, 61))


def test_a_rank_keeps_its_short_batch() -> None:
    shares = Shares(length=10, batch_size=4, rank=0, world_size=1, tail="keep")
    assert [len(shares.positions(step)[0]) for step in range(len(shares))] == [4, 4, 2]


def test_ranks_are_given_or_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert choose_ranks(None, None) == (0, 1)
    assert choose_ranks(2, 5) == (2, 5)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert choose_ranks(None, None) == (3, 4)
    assert choose_ranks(0, 1) == (0, 1)
    for rank, world, message in (
        (1, None, "together"),
        (4, 4, "below world_size 4"),
        (-1, 4, "rank must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_ranks(rank, world)


def test_tails_that_cannot_be() -> None:
    assert choose_tail(None, False, 1) == "keep" and choose_tail(None, False, 2) == "pad"
    assert choose_tail(None, True, 2) == "drop" and choose_tail("uneven", False, 2) == "uneven"
    for tail, drop_last, world, message in (
        ("pad", True, 2, 'drop_last=True is tail="drop"'),
        ("keep", False, 2, 'tail="keep" is for one rank'),
        ("short", False, 1, "tail must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_tail(tail, drop_last, world)
