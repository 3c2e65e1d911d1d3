"""A plain digit classifier, 64-512-512-10: over-parameterised, but with no independent parts to find."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from models.training import Arrays, Mlp, batches, finish, save, train

INPUT = "pixels"
WIDTHS = (64, 512, 512, 10)
STEPS, BATCH, HELD_BACK = 3_000, 128, 500
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))

Samples = tuple[NDArray[np.float32], NDArray[np.int64]]


def split_digits(seed: int = 0) -> tuple[Samples, Samples]:
    """(pixels [n, 64] in 0..1, labels [n]) of 1,297 training digits and of 500 held-back ones."""
    pixels, target = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    pixels, target = (pixels[order] / 16).astype(np.float32), target[order].astype(np.int64)
    return (pixels[HELD_BACK:], target[HELD_BACK:]), (pixels[:HELD_BACK], target[:HELD_BACK])


def shifted(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The digits [n, 64] as they are and moved by one pixel in each direction: [5 n, 64]."""
    padded = np.pad(pixels.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moved = [padded[:, 1 + down : 9 + down, 1 + right : 9 + right] for down, right in SHIFTS]
    return np.concatenate(moved).reshape(-1, 64)


def main(seed: int = 0) -> None:
    """Train on the shifted digits, report on unshifted ones."""
    (pixels, target), (held_pixels, held_target) = split_digits()
    pixels, target = shifted(pixels), np.tile(target, len(SHIFTS))
    report: Arrays = {INPUT: held_pixels, "target": held_target}
    network = Mlp(WIDTHS, seed)
    save("digits", "init", network.arrays())
    save("digits", "calib", {INPUT: pixels})
    save("digits", "report", report)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    train(network, optimizer, batches(pixels, target, (BATCH,), seed), cross_entropy, STEPS)
    recipe = (
        f"Adam, learning rate 0.001 along a cosine, {STEPS} steps of {BATCH}, digits shifted by one pixel"
    )
    finish(network, "digits", INPUT, report, recipe=recipe, seed=seed)


if __name__ == "__main__":
    main()
