"""Influence on the function: measured as theory has it, and independent parts found where there are any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import models
from onnx_decomp.passes.independence import Independent, co_cluster, needed, p_value
from onnx_decomp.passes.influence import (
    ROWS,
    Influence,
    derangement,
    fields_of,
    measure,
    measure_grouped,
    off_influence,
)
from onnx_decomp.passes.partitions import elbow, shuffled
from onnx_decomp.program import DROPPED, Labels
from onnx_decomp.runtime import open_session

Batch = NDArray[np.float32]
TOWERS = ("dense", "dense-1", "deep-0", "shrunk", "untouched", "vanished")


class Network:
    """y = relu(x W1) W2, counting the rows that it is run on."""

    def __init__(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        # Hidden units of unit variance, so that parts move their outputs alike whatever their size.
        self.first = (first / np.sqrt((first**2).sum(0))).astype(np.float32)
        self.second = second.astype(np.float32)
        self.rows = 0
        self.most = 0

    def __call__(self, x: Batch) -> Batch:
        rows = x.size // x.shape[-1]
        self.rows += rows
        self.most = max(self.most, rows)
        y: Batch = np.maximum(x @ self.first, 0) @ self.second
        return y


def towers(
    inputs: list[int], outputs: list[int], seed: int, leak: float = 0.0, shared: int = 0, width: int = 16
) -> tuple[Network, Labels, Labels]:
    """A network of parts with so many inputs and outputs each, and the parts of its inputs and outputs.

    The last `shared` inputs feed every part (DROPPED); others feed foreign parts `leak` times as much as their own.
    """
    rng = np.random.default_rng(seed)
    parts = np.arange(len(inputs), dtype=np.int32)
    rows = np.concatenate([np.repeat(parts, inputs), np.full(shared, DROPPED, np.int32)])
    hidden, cols = np.repeat(parts, width), np.repeat(parts, outputs)
    joined = np.where((rows[:, None] == hidden) | (rows[:, None] == DROPPED), 1.0, leak)
    first = rng.standard_normal((len(rows), len(hidden))) * joined
    second = rng.standard_normal((len(hidden), len(cols))) * (hidden[:, None] == cols)
    return Network(first, second), rows, cols


def normal(samples: int, inputs: int, seed: int = 0) -> Batch:
    return np.random.default_rng(seed).standard_normal((samples, inputs), np.float32)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def same_blocks(a: Labels, b: Labels) -> bool:
    """The same partition under other names (adjusted Rand index 1)."""
    pairs = np.unique(np.stack([a, b]), axis=1)
    return bool(len(np.unique(a)) == len(np.unique(b)) == pairs.shape[1])


def found_in(network: Network, x: Batch, **options: Any) -> Independent:
    found = co_cluster(measure(network, x, generator()), generator(), **options)
    assert found is not None
    return found


# Measuring


def test_energy_of_a_linear_map_is_twice_the_share_of_variance() -> None:
    weight = np.array([[3.0, 0], [1, 2], [0, 1], [5, 5]], np.float32)
    x = normal(4000, 4)
    x[:, 3] = 7
    found = measure(lambda x: x @ weight, x, generator())
    expected = 2 * weight[:3] ** 2 / (weight[:3] ** 2).sum(0)
    np.testing.assert_allclose(found.energy[:3], expected, atol=0.08)
    assert found.constant.tolist() == [False, False, False, True]
    assert not found.energy[3].any()
    assert (np.abs(found.energy[:3] - expected) <= 4 * found.error[:3] + 1e-12).all()


def test_a_constant_output_has_no_influence() -> None:
    found = measure(
        lambda x: np.stack([x[:, 0], np.full(len(x), 0.1, np.float32)], 1), normal(50, 2), generator()
    )
    assert found.energy[0, 0] > 1
    assert not found.energy[:, 1].any()


def test_the_standard_error_is_that_of_repeated_measurement() -> None:
    network, *_ = towers([4, 4], [2, 2], seed=1, leak=0.3)
    found = [measure(network, normal(200, 8, seed), generator(seed)) for seed in range(60)]
    spread = np.std([each.energy for each in found], axis=0)
    claimed = np.mean([each.error for each in found], axis=0)
    assert 0.9 < np.median(claimed / spread) < 2


def test_repeats_only_sharpen() -> None:
    network, *_ = towers([4, 4], [2, 2], seed=1, leak=0.3)
    x = normal(100, 8)
    once = np.std([measure(network, x, generator(s)).energy for s in range(30)], axis=0)
    often = np.std([measure(network, x, generator(s), repeats=4).energy for s in range(30)], axis=0)
    assert np.median(often / once) < 0.7


def test_middle_axes_are_moved_between_samples_at_their_position() -> None:
    """What differs between positions only is constant; what differs between samples counts at each position."""
    x = np.random.default_rng(0).standard_normal((500, 3, 2)).astype(np.float32)
    x[..., 1] = [1, 2, 3]
    found = measure(lambda x: x.sum(-1, keepdims=True), x, generator())
    assert found.constant.tolist() == [False, True]
    np.testing.assert_allclose(found.energy[:, 0], [2, 0], atol=0.15)


def test_fields_move_together() -> None:
    x = np.repeat(normal(1000, 1), 2, axis=1)
    alone = measure(lambda x: x[:, :1] - x[:, 1:], x + normal(1000, 2, 1), generator())
    joint = measure(lambda x: x[:, :1] - x[:, 1:], x + normal(1000, 2, 1), generator(), np.zeros(2, np.int32))
    assert joint.energy.shape == (1, 1)
    assert joint.energy[0, 0] == pytest.approx(2, rel=0.15)
    assert alone.energy[:, 0] == pytest.approx(
        2, rel=0.15
    )  # each moves as much as both: they cancel elsewhere
    ignored = measure(lambda x: x, x, generator(), np.array([0, DROPPED], np.int32))
    assert ignored.energy.shape == (1, 2)
    assert not ignored.energy[0, 1]


def test_runs_are_bounded_and_sparse_inputs_cheap() -> None:
    network, *_ = towers([200, 200], [2, 2], seed=0)
    measure(network, normal(300, 400), generator())
    assert network.most <= ROWS
    assert network.rows == 300 * 401
    sparse, *_ = towers([200, 200], [2, 2], seed=0)
    x = (np.random.default_rng(0).random((300, 400)) < 0.01).astype(np.float32)
    measure(sparse, x, generator())
    assert sparse.rows < 0.03 * network.rows


@pytest.mark.parametrize("size", [2, 3, 17, 1000])
def test_no_sample_keeps_its_own_value(size: int) -> None:
    donor = derangement(size, generator())
    assert (donor != np.arange(size)).all()
    assert sorted(donor) == list(range(size))


def test_measuring_is_deterministic() -> None:
    network, *_ = towers([8, 8], [2, 2], seed=0)
    a, b = (measure(network, normal(64, 16), generator(3)) for _ in range(2))
    assert (a.energy == b.energy).all()
    assert (a.error == b.error).all()


# Fields


def one_hot(values: NDArray[np.integer[Any]], size: int) -> Batch:
    return np.asarray(values[:, None] == np.arange(size), np.float32)


def test_one_hot_codes_are_fields() -> None:
    rng = np.random.default_rng(0)
    number = rng.standard_normal((200, 1)).astype(np.float32)
    flag = (rng.random((200, 1)) < 0.5).astype(np.float32)
    codes = [one_hot(rng.integers(size, size=200), size) for size in (5, 2, 3)]
    x = np.concatenate([codes[0], number, codes[1], codes[2], flag, np.ones((200, 1), np.float32)], axis=1)
    assert fields_of(x).tolist() == [0] * 5 + [1] + [2] * 2 + [3] * 3 + [4, 5]
    assert fields_of(x[:, None]).tolist() == fields_of(x).tolist()


def test_categories_that_never_occur_do_no_harm() -> None:
    values = np.random.default_rng(0).integers(1, 4, size=100)  # 0 and 4 are missing
    x = np.concatenate([one_hot(values, 5), one_hot(values % 2, 2)], axis=1)
    labels = fields_of(x)
    assert len(set(labels[1:4])) == 1
    assert len(set(labels[5:])) == 1
    assert labels[1] != labels[5]


def test_several_ones_are_no_code() -> None:
    several = (np.random.default_rng(0).random((300, 50)) < 0.05).astype(np.float32)
    assert fields_of(several).tolist() == list(range(50))
    numbers = normal(50, 7)
    assert fields_of(numbers).tolist() == list(range(7))


def test_one_hot_fields_join_blocks_whole() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([one_hot(rng.integers(6, size=256), 6) for _ in range(8)], axis=1)
    network, rows, cols = towers([24, 24], [4, 4], seed=2)
    influence = measure(network, x, generator(), fields_of(x))
    assert influence.energy.shape == (8, 8)
    found = co_cluster(influence, generator(), level=1.0)  # eight fields are too few for a p-value of 0.01
    assert found is not None
    assert same_blocks(found.outputs, cols)
    assert same_blocks(found.inputs, rows)
    assert found.members.shape == (2, 48)
    assert (found.members.sum(0) == 1).all()


# Independent parts


@pytest.mark.parametrize("leak", [0.0, 0.02])
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([32] * 4, [10] * 4),
        ([10, 100], [5, 5]),
        ([64, 64], [2, 12]),
        ([16] * 4, [1] * 4),
        ([8] * 12, [4] * 12),
    ],
)
def test_planted_parts_are_found(inputs: list[int], outputs: list[int], leak: float) -> None:
    network, rows, cols = towers(inputs, outputs, seed=1, leak=leak)
    found = found_in(network, normal(64, len(rows)))
    assert same_blocks(found.outputs, cols)
    assert same_blocks(found.inputs, rows)
    assert found.blocks == len(inputs)
    assert found.p < 0.01
    assert (found.upper <= 0.05).all()
    assert (found.members.sum(0) == 1).all()
    members_of = {
        int(found.inputs[k]): set(np.flatnonzero(found.inputs == found.inputs[k])) for k in range(len(rows))
    }
    assert all(set(np.flatnonzero(found.members[g])) == mine for g, mine in members_of.items())


def test_equal_outputs_stay_together() -> None:
    network, rows, cols = towers([32] * 3, [1] * 3, seed=1)
    network.second = np.repeat(network.second, 5, axis=1)
    found = found_in(network, normal(64, len(rows)))
    assert same_blocks(found.outputs, np.repeat(cols, 5))


def test_more_outputs_than_are_searched_one_by_one() -> None:
    network, rows, cols = towers([32, 32, 8], [300, 290, 10], seed=0, leak=0.02)
    found = found_in(network, normal(64, len(rows)))
    assert same_blocks(found.outputs, cols)
    assert same_blocks(found.inputs, rows)


def test_shared_inputs_belong_to_every_block_that_needs_them() -> None:
    network, rows, cols = towers([24] * 3, [6] * 3, seed=0, leak=0.03, shared=16)
    found = found_in(network, normal(256, len(rows)))
    assert same_blocks(found.outputs, cols)
    assert found.members[:, rows == DROPPED].mean() > 0.95
    assert (found.members[:, rows >= 0].sum(0) == 1).all()


def test_an_input_that_two_of_three_blocks_need_is_in_two() -> None:
    network, rows, cols = towers([24] * 3, [6] * 3, seed=0, shared=8)
    hidden = np.repeat(np.arange(3), 16)
    network.first[np.ix_(rows == DROPPED, hidden == 2)] = 0
    found = found_in(network, normal(256, len(rows)))
    assert same_blocks(found.outputs, cols)
    assert (found.members[:, rows == DROPPED].sum(1) == [8, 8, 0]).all()


def test_constant_inputs_are_in_no_block_and_constant_outputs_neither() -> None:
    network, rows, cols = towers([32] * 4, [5] * 4, seed=0)
    x = normal(64, len(rows))
    dead = np.arange(0, len(rows), 5)
    x[:, dead] = 0.5
    network.second[:, 7] = 0
    found = found_in(network, x)
    assert not found.members[:, dead].any()
    assert (found.inputs[dead] == DROPPED).all()
    live = np.setdiff1d(np.arange(len(rows)), dead)
    assert same_blocks(found.inputs[live], rows[live])
    assert found.outputs[7] == DROPPED
    assert same_blocks(np.delete(found.outputs, 7), np.delete(cols, 7))


def test_order_of_inputs_and_outputs_does_not_matter() -> None:
    network, rows, cols = towers([32] * 4, [5] * 4, seed=0, leak=0.05)
    rng = np.random.default_rng(1)
    i, o = rng.permutation(len(rows)), rng.permutation(len(cols))
    mixed = Network(network.first[i], network.second[:, o])
    found = found_in(mixed, normal(64, len(rows))[:, i])
    assert same_blocks(found.outputs, cols[o])
    assert same_blocks(found.inputs, rows[i])


def test_finding_is_deterministic() -> None:
    network, rows, _ = towers([32] * 4, [5] * 4, seed=0, leak=0.05)
    a, b = (found_in(network, normal(64, len(rows))) for _ in range(2))
    assert (a.members == b.members).all()
    assert a.curve == b.curve
    assert a.p == b.p


def test_what_is_left_out_stays_within_the_budget() -> None:
    """With more leakage than the budget allows, blocks keep the foreign inputs that matter most."""
    network, rows, _ = towers([32] * 4, [5] * 4, seed=0, leak=0.1)
    influence = measure(network, normal(512, len(rows)), generator())
    reads = []
    for budget in (0.02, 0.05, 0.5):
        found = co_cluster(influence, generator(), budget)
        assert found is not None
        assert (found.dropped <= found.upper).all()
        assert (found.upper <= budget).all()
        reads.append(int(found.members.sum()))
    assert reads[0] > reads[1] > reads[2] == len(rows)


def test_needed_keeps_the_strongest() -> None:
    share = np.array([[0.5, 0.01], [0.3, 0.02], [0.02, 0.5], [0.03, 0.4], [0.0, 0.0]])
    home = np.array([0, 0, 1, 1, DROPPED], np.int32)
    tight = needed(share, share, home, budget=0.025)
    assert tight.tolist() == [[True, False], [True, True], [False, True], [True, True], [False, False]]
    assert (needed(share, share, home, budget=0.1)[:4] == [[1, 0], [1, 0], [0, 1], [0, 1]]).all()


# Where there is nothing to find


def test_one_task_is_not_split() -> None:
    network, rows, _ = towers([64], [10], seed=0, width=64)
    for budget in (0.05, 0.3):
        assert co_cluster(measure(network, normal(256, len(rows)), generator()), generator(), budget) is None


def test_coupled_tasks_are_not_split() -> None:
    """Outputs of both tasks depend on all inputs."""
    network, rows, _ = towers([0, 0], [8, 8], seed=0, shared=64, width=64)
    for budget in (0.05, 0.3):
        assert co_cluster(measure(network, normal(256, len(rows)), generator()), generator(), budget) is None


def test_random_dense_networks_are_not_split() -> None:
    wrong = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        inputs, outputs = int(rng.integers(10, 60)), int(rng.integers(2, 20))
        network = Network(rng.standard_normal((inputs, 48)), rng.standard_normal((48, outputs)))
        influence = measure(network, normal(64, inputs, seed), rng)
        wrong += any(co_cluster(influence, rng, budget) is not None for budget in (0.05, 0.3))
    assert wrong <= 1


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_noise_has_p_values_at_their_level(spread: float) -> None:
    """Whatever the tails: p below 0.1 at most so often, and hardly ever below 0.01."""
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        energy = rng.lognormal(0, spread, (60, 8)) * rng.lognormal(0, 1, (60, 1))
        found = elbow(energy)
        p.append(p_value(energy, found, rng) if found.blocks > 1 else 1.0)
    assert np.mean(np.array(p) <= 0.1) <= 0.2
    assert np.mean(np.array(p) < 0.01) <= 0.05


@pytest.mark.parametrize("within", ["all", "outputs", "null"])
def test_shuffled_influence_is_refused(within: str) -> None:
    network, rows, _ = towers([32] * 4, [5] * 4, seed=0, leak=0.05)
    influence = measure(network, normal(64, len(rows)), generator())
    wrong = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        if within == "null":
            energy = shuffled(influence.energy, rng)
        else:
            energy = rng.permuted(influence.energy, axis=0 if within == "outputs" else None)
        wrong += co_cluster(replace(influence, energy=energy), rng) is not None
    assert wrong <= 1


def test_degenerate_influence() -> None:
    fields = np.arange(5, dtype=np.int32)
    nothing = Influence(np.zeros((5, 3)), np.zeros((5, 3)), np.ones(5, bool), fields)
    assert co_cluster(nothing, generator()) is None
    single = Influence(np.ones((5, 1)), np.zeros((5, 1)), np.zeros(5, bool), fields)
    assert co_cluster(single, generator()) is None
    one_input = Influence(np.eye(5, 3) * [1, 0, 0], np.zeros((5, 3)), np.zeros(5, bool), fields)
    assert co_cluster(one_input, generator()) is None


# Measuring in groups


@pytest.mark.parametrize("leak", [0.0, 0.02])
def test_grouped_measurement_finds_the_same_at_a_fraction_of_the_cost(leak: float) -> None:
    """4,096 inputs in parts that start and end anywhere."""
    sizes = [700, 333, 1021, 517, 129, 600, 396, 400]
    network, rows, cols = towers(sizes, [6] * 8, seed=0, leak=leak)
    x = normal(32, 4096)
    found = co_cluster(measure_grouped(network, x, generator()), generator())
    assert found is not None
    assert network.rows < 0.15 * 4096 * 32
    assert same_blocks(found.outputs, cols)
    assert same_blocks(found.inputs, rows)
    assert (found.members.sum(0) == 1).all()


def test_grouped_measurement_agrees_with_the_full_one() -> None:
    network, rows, _ = towers([300, 133, 421, 170], [6] * 4, seed=1, leak=0.02)
    x = normal(48, len(rows))
    grouped, full = (
        co_cluster(how(network, x, generator()), generator()) for how in (measure_grouped, measure)
    )
    assert grouped is not None
    assert full is not None
    assert (grouped.members == full.members).all()
    assert (grouped.outputs == full.outputs).all()


def test_grouped_measurement_of_mixed_inputs_is_exact_too() -> None:
    network, rows, cols = towers([128] * 4, [6] * 4, seed=0)
    order = np.random.default_rng(0).permutation(512)
    mixed = Network(network.first[order], network.second)
    found = co_cluster(measure_grouped(mixed, normal(32, 512), generator()), generator())
    assert found is not None
    assert same_blocks(found.outputs, cols)
    assert same_blocks(found.inputs, rows[order])
    assert mixed.rows < 1.3 * 512 * 32


def test_grouped_measurement_leaves_shared_groups_alone() -> None:
    network, rows, cols = towers([512] * 4, [6] * 4, seed=0, shared=512)
    found = co_cluster(measure_grouped(network, normal(32, 2560), generator()), generator())
    assert found is not None
    assert network.rows < 0.35 * 2560 * 32
    assert same_blocks(found.outputs, cols)
    assert found.members[:, rows == DROPPED].mean() > 0.9
    assert (found.members[:, rows >= 0].sum(0) == 1).mean() > 0.99


def test_grouped_measurement_stops_early_where_nothing_is_to_be_found() -> None:
    network, *_ = towers([2048], [20], seed=0, width=64)
    influence = measure_grouped(network, normal(32, 2048), generator())
    assert network.rows < 0.1 * 2048 * 32
    assert co_cluster(influence, generator()) is None


def test_grouped_measurement_keeps_totals_and_constants() -> None:
    network, rows, _ = towers([300, 300], [4, 4], seed=0)
    x = normal(64, 600)
    x[:, ::7] = 0
    grouped, full = (how(network, x, generator()) for how in (measure_grouped, measure))
    assert (grouped.constant == full.constant).all()
    assert not grouped.energy[grouped.constant].any()
    for part in (0, 1):
        own = rows == part
        ratio = grouped.energy[own].sum() / full.energy[own].sum()
        assert 0.5 < ratio < 1.5


# The equivalence test


def linear(own: float, foreign: float) -> Callable[[Batch], Batch]:
    """Two outputs, each of its own input and a little of the other's."""
    weight = np.array([[own, foreign], [foreign, own]], np.float32)
    return lambda x: x @ weight


MEMBERS, OUTPUTS = np.eye(2, dtype=bool), np.array([0, 1], np.int32)


def test_off_influence_is_the_share_of_variance() -> None:
    found = off_influence(linear(1, 0.5), normal(4000, 2), MEMBERS, OUTPUTS, generator())
    for estimate, upper in ((found.estimate, found.upper), (found.clamped, found.clamped_upper)):
        np.testing.assert_allclose(estimate, 0.2, atol=0.02)
        assert ((estimate < upper) & (upper < estimate + 0.03)).all()


def test_its_upper_bound_covers() -> None:
    covered = [
        off_influence(linear(1, 0.5), normal(60, 2, seed), MEMBERS, OUTPUTS, generator(seed))
        for seed in range(200)
    ]
    assert np.mean([found.upper >= 0.2 for found in covered]) > 0.9
    assert np.mean([found.clamped_upper >= 0.2 for found in covered]) > 0.9


def test_a_block_that_reads_everything_loses_nothing() -> None:
    both = np.array([[True, True], [False, True]])
    found = off_influence(linear(1, 0.5), normal(500, 2), both, OUTPUTS, generator())
    assert found.upper[0] == 0
    assert found.estimate[1] > 0.1


def test_off_influence_sees_what_single_inputs_do_not() -> None:
    """Copies of one input hide each other only if they move alone; they are moved together."""
    x = np.repeat(normal(1000, 1), 9, axis=1)
    x[:, 0] = normal(1000, 1, 1)[:, 0]
    members = np.zeros((1, 9), bool)
    members[0, 0] = True
    found = off_influence(
        lambda x: x[:, :1] + x[:, 1:].mean(1, keepdims=True), x, members, np.zeros(1, np.int32), generator()
    )
    assert found.estimate[0] == pytest.approx(0.5, abs=0.06)


# Trained networks


@cache
def trained(name: str) -> tuple[Callable[[Batch], Batch], Batch]:
    """A model of models/ as a function, and its calibration data in random order."""
    model = models.load(name)
    session = open_session(model.model, threads=1)
    port = session.inputs[0].name
    with np.load(model.calib) as file:
        x: Batch = np.random.default_rng(0).permutation(file[port])
    return lambda x: next(iter(session.run({port: x}).values())), x


@pytest.mark.parametrize("variant", TOWERS)
def test_four_digits_are_four_parts(variant: str) -> None:
    """From 64 samples, to the pixel; the bound on held-back samples allows the split."""
    run, x = trained(f"towers/{variant}")
    found = co_cluster(measure(run, x[:64], generator()), generator())
    assert found is not None
    assert same_blocks(found.outputs, np.repeat(np.arange(4, dtype=np.int32), 10))
    moving = found.inputs >= 0
    assert moving.sum() > 240
    assert same_blocks(found.inputs[moving], np.repeat(np.arange(4, dtype=np.int32), 64)[moving])
    assert (found.members.sum(0) == moving).mean() > 0.98
    assert found.off < 0.05
    assert found.curve[4] > 0.12
    assert (off_influence(run, x[64:1064], found.members, found.outputs, generator()).upper < 0.02).all()


def test_three_sums_share_a_digit() -> None:
    run, x = trained("shared")
    found = co_cluster(measure(run, x[:256], generator()), generator())
    assert found is not None
    assert same_blocks(found.outputs, np.repeat(np.arange(3, dtype=np.int32), 10))
    digit = np.arange(256) // 64
    assert found.members[:, digit == 3].mean() > 0.9
    for block in range(3):
        assert found.members[block, digit == block].mean() > 0.9
        assert found.members[block, (digit != block) & (digit != 3)].mean() < 0.05
    assert (off_influence(run, x[256:1256], found.members, found.outputs, generator()).upper < 0.05).all()


@pytest.mark.parametrize("name", ["digits", "coupled", "frozen"])
def test_controls_are_refused(name: str) -> None:
    run, x = trained(name)
    for samples in (64, 256):
        influence = measure(run, x[:samples], generator())
        for budget in (0.05, 0.3):
            assert co_cluster(influence, generator(), budget) is None


def test_the_ranker_is_left_to_the_equivalence_test() -> None:
    """Its interests share no inputs in groups, so shuffles come near; held-back data bounds what a split would lose."""
    run, x = trained("ranker")
    influence = measure(run, x[:1000], generator())
    found = co_cluster(influence, generator(), level=1.0)
    assert found is not None
    assert found.blocks >= 5
    assert found.saving > 0.5
    bound = off_influence(run, x[5000:], found.members, found.outputs, generator())
    assert (bound.upper < 0.1).all()
