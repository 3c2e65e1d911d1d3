"""The descent over several knobs against brute force, and the sizes to choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_decomp.passes.tradeoff import Descent, Key, Knob, Work, size_levels

UNITS, OTHER, RANK, NO_RANK = (
    Key("r", "units", 0),
    Key("s", "units", 0),
    Key("r", "rank", 0),
    Key("", "rank", 9),
)
K = 10


def price(rows: int, k: int, n: int, rank: int | None) -> float:
    return float(rows * (k * n if rank is None else min(k * n, rank * (k + n))))


def knob(key: Key, sizes: Sequence[int], harm: Sequence[float], toll: Sequence[float] = ()) -> Knob:
    paid = np.array(toll or [0.0] * len(sizes))
    return Knob(key, np.array(sizes)[:, None], np.array(harm), paid)


def apart(*knobs: Knob) -> Descent:
    """Every knob is the columns of a site of its own."""
    works = [Work((K,), each.key, NO_RANK, 1, 1) for each in knobs]
    return Descent({each.key: each for each in knobs}, works, price)


def everywhere(descent: Descent) -> Iterator[tuple[float, float]]:
    """Cost and harm of every combination of levels."""
    held = dict(descent.levels)
    for levels in product(*(range(len(each.harm)) for each in descent.knobs.values())):
        descent.levels.update(zip(descent.knobs, levels, strict=True))
        yield descent.cost, descent.harm
    descent.levels.update(held)


@st.composite
def curves(draw: st.DrawFn, convex: bool) -> tuple[Knob, Knob]:
    """Two knobs whose harm rises with every level; convex: each unit less costs no less than the one before."""
    made = []
    for key in (UNITS, OTHER):
        sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=2, max_size=7)), reverse=True)
        count = len(sizes) - 1
        slopes = draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
        steps = np.array(sorted(slopes) if convex else slopes) * -np.diff(sizes)
        made.append(knob(key, sizes, np.concatenate([[0.0], np.cumsum(steps)])))
    return made[0], made[1]


@settings(max_examples=150, deadline=None)
@given(curves(convex=True), st.floats(0, 1))
def test_on_convex_curves_nothing_of_that_cost_harms_less(pair: tuple[Knob, Knob], share: float) -> None:
    descent = apart(*pair)
    descent.run(np.inf, share * descent.cost)
    cost, harm = descent.cost, descent.harm
    assert harm <= min(other for paid, other in everywhere(descent) if paid <= cost) * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(curves(convex=True), st.floats(0, 1))
def test_what_is_allowed_is_used_up_to_the_next_level(pair: tuple[Knob, Knob], share: float) -> None:
    descent = apart(*pair)
    allowed = share * sum(float(each.harm[-1]) for each in pair)
    descent.run(allowed, 0.0)
    assert descent.harm <= allowed * (1 + 1e-12)
    for each in pair:
        level = descent.levels[each.key]
        assert level == len(each.harm) - 1 or descent.harm - each.harm[level] + each.harm[
            level + 1
        ] > allowed * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(curves(convex=False), st.floats(0, 1), st.floats(0, 1))
def test_no_further_than_asked_whatever_the_curves(
    pair: tuple[Knob, Knob], most: float, share: float
) -> None:
    descent = apart(*pair)
    allowed, least = most * sum(float(each.harm[-1]) for each in pair), share * descent.cost
    descent.run(allowed, least)
    assert descent.harm <= allowed * (1 + 1e-12)
    if descent.cost >= least:
        return
    back = []
    for key, level in list(descent.levels.items()):
        if level:
            descent.levels[key] = level - 1
            back.append(descent.cost)
            descent.levels[key] = level
    assert max(back) > least


def test_a_valley_is_crossed_in_one_turn() -> None:
    """The first level saves next to nothing for its harm, the second a lot for hardly more."""
    descent = apart(knob(UNITS, [40, 39, 10], [0, 1.0, 1.1]), knob(OTHER, [40, 30, 20], [0, 0.6, 1.2]))
    descent.run(1.1, 0.0)
    assert descent.levels == {UNITS: 2, OTHER: 0}


def test_tolls_count() -> None:
    free = apart(knob(UNITS, [40, 30, 10], [0, 1, 2]))
    free.run(1.0, 0.0)
    assert free.levels[UNITS] == 1
    for toll, level, cost in ((99.0, 1, 399.0), (100.0, 0, 400.0)):
        paid = apart(knob(UNITS, [40, 30, 10], [0, 1, 2], [0, toll, toll]))
        paid.run(1.0, 0.0)
        assert (paid.levels[UNITS], paid.cost) == (level, cost)
    both = apart(knob(UNITS, [40, 30, 10], [0, 1, 2], [0, 150, 150]))
    both.run(2.0, 0.0)
    assert (both.levels[UNITS], both.cost) == (2, 250.0)


def test_units_and_rank_are_priced_together() -> None:
    """A rank that saved something stops doing so once the units are gone."""
    works = [Work((32,), UNITS, RANK, 3, 1), Work(UNITS, (5,), NO_RANK, 3, 1)]
    rank = knob(RANK, [32, 12], [0, 1])
    alone = Descent({RANK: rank, UNITS: knob(UNITS, [32], [0])}, works, price)
    alone.run(10.0, 0.0)
    assert (alone.levels[RANK], alone.cost) == (1, 3 * (12 * 64 + 32 * 5))
    joint = Descent({RANK: rank, UNITS: knob(UNITS, [32, 8], [0, 1])}, works, price)
    assert joint.cost == 3 * (32 * 32 + 32 * 5)
    joint.run(10.0, 0.0)
    assert joint.levels == {RANK: 0, UNITS: 1}
    assert joint.cost == 3 * (32 * 8 + 8 * 5)


def test_blocks_are_priced_one_by_one_and_a_dense_layer_beside_them_by_their_sum() -> None:
    sizes = np.array([[6, 4], [2, 3]])
    works = [Work((7, 5), UNITS, RANK, 1, 2), Work(UNITS, (9,), NO_RANK, 1, 1)]
    knobs = {
        UNITS: Knob(UNITS, sizes, np.array([0.0, 1.0]), np.zeros(2)),
        RANK: Knob(RANK, np.array([[6, 4], [1, 2]]), np.array([0.0, 1e-3]), np.zeros(2)),
    }
    descent = Descent(knobs, works, price)
    assert descent.cost == 7 * 6 + 5 * 4 + 10 * 9
    descent.run(1e-3, 0.0)
    assert descent.cost == 1 * (7 + 6) + 2 * (5 + 4) + 10 * 9
    descent.run(2.0, 0.0)
    assert descent.cost == 1 * (7 + 2) + min(2 * (5 + 3), 15) + 5 * 9


def test_the_cost_that_is_asked_for_is_met_with_shared_knobs() -> None:
    """One knob is the columns of one site and the rows of the next; what a turn saves changes with the other."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        knobs = [
            knob(key, sorted(rng.choice(np.arange(1, 64), 12, replace=False))[::-1], np.sort(rng.random(12)))
            for key in (UNITS, OTHER)
        ]
        works = [
            Work((9,), UNITS, NO_RANK, 1, 1),
            Work(UNITS, OTHER, NO_RANK, 1, 1),
            Work(OTHER, (5,), NO_RANK, 1, 1),
        ]
        descent = Descent({each.key: each for each in knobs}, works, price)
        least = float(rng.uniform(0.1, 0.9)) * descent.cost
        descent.run(np.inf, least)
        reachable = min(cost for cost, _ in everywhere(descent))
        assert descent.cost <= max(least, reachable)


@pytest.mark.parametrize("allowed", [-1.0, 0.0])
def test_nothing_turns_where_nothing_is_allowed(allowed: float) -> None:
    descent = apart(knob(UNITS, [40, 30], [0, 1e-9]))
    descent.run(allowed, 0.0)
    assert descent.levels == {UNITS: 0}


def test_what_harms_nothing_goes_without_any_room() -> None:
    descent = apart(knob(UNITS, [40, 30, 20], [0, 0, 1]))
    descent.run(0.0, 0.0)
    assert descent.levels == {UNITS: 1}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([1, 4, 16]), st.integers(1, 3000), st.integers(2, 96))
def test_sizes_go_down_from_what_there_is(size: int, multiple: int, least: int, count: int) -> None:
    levels = size_levels(size, multiple, least, count)
    assert levels[0] == size
    assert (np.diff(levels) < 0).all()
    assert levels[-1] >= min(least, size)
    inner = levels[1:-1]
    assert (inner[inner > multiple] % multiple == 0).all()


def test_sizes_reach_the_least_in_steps_that_grow() -> None:
    levels = size_levels(512, 4)
    assert levels[-1] == 1
    assert {1, 2, 3, 4, 8, 12, 16} <= set(levels.tolist())
    assert (levels[:-1] / levels[1:])[:40].max() < 1.2
