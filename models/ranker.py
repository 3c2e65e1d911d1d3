"""A recommender on sparse features: most input rows get few gradients, and some get none at all.

A sample has up to 12 of 1,000 features, drawn from a Zipf-Mandelbrot distribution. Its label is the one of
eight interests that its features speak for most; a feature speaks for one or, half of them, for none.
Features that no training sample had keep exactly their initial weights.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from models.training import Arrays, Mlp, batches, finish, save, train

INPUT = "features"
FEATURES, INTERESTS, ACTIVE = 1_000, 8, 12
WIDTHS = (FEATURES, 128, 64, INTERESTS)
EXPONENT, OFFSET, NOISE = 2.8, 20, 0.1
TRAINED, CALIBRATED, HELD_BACK = 20_000, 10_000, 2_000
STEPS, BATCH, RATE = 3_000, 128, 0.5

Samples = tuple[NDArray[np.float32], NDArray[np.int64]]


def draw(
    count: int, rng: np.random.Generator, popularity: NDArray[np.float64], taste: NDArray[np.float64]
) -> Samples:
    """Multi-hot inputs [count, 1000] and labels [count], from popularity [1000] and taste [1000, 8]."""
    chosen = rng.choice(FEATURES, size=(count, ACTIVE), p=popularity)
    inputs = np.zeros((count, FEATURES), np.float32)
    np.put_along_axis(inputs, chosen, 1, axis=1)
    preference = inputs @ taste + rng.gumbel(scale=NOISE, size=(count, INTERESTS))
    return inputs, preference.argmax(axis=1).astype(np.int64)


def world(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Popularity [1000] of the features, and their taste [1000, 8]: what each adds to each interest."""
    popularity = rng.permutation(1 / (OFFSET + np.arange(1, FEATURES + 1)) ** EXPONENT)
    taste = np.zeros((FEATURES, INTERESTS))
    speaks = rng.random(FEATURES) < 0.5
    interest = rng.integers(INTERESTS, size=FEATURES)
    taste[np.arange(FEATURES), interest] = speaks * rng.lognormal(0, 0.5, FEATURES)
    return popularity / popularity.sum(), taste


def main(seed: int = 0) -> None:
    """Train by plain SGD without weight decay."""
    rng = np.random.default_rng(seed)
    popularity, taste = world(rng)
    inputs, target = draw(TRAINED, rng, popularity, taste)
    held_inputs, held_target = draw(HELD_BACK, rng, popularity, taste)
    report: Arrays = {INPUT: held_inputs, "target": held_target}
    network = Mlp(WIDTHS, seed)
    save("ranker", "init", network.arrays())
    save("ranker", "calib", {INPUT: inputs[:CALIBRATED]})
    save("ranker", "report", report)
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    train(network, optimizer, batches(inputs, target, (BATCH,), seed), cross_entropy, STEPS)
    never = np.flatnonzero(~inputs.any(axis=0)).tolist()
    recipe = f"SGD, learning rate {RATE} along a cosine, {STEPS} steps of {BATCH}"
    finish(network, "ranker", INPUT, report, recipe=recipe, seed=seed, never_active=never)


if __name__ == "__main__":
    main()
