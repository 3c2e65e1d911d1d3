"""Four digits side by side, one head each: a network whose learned dependencies are four separate towers.

Gradients reach only the weights inside a tower; hidden units are dealt to the towers at random, so that the
blocks are hidden. The other weights take part in every forward pass, at what weight decay left of their
initial value. The variants "dense" are the same network without the mask, the variants "deep" have two layers more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.digits import SHIFTS, shifted, split_digits
from models.training import Arrays, Mlp, batches, finish, save, train

INPUT = "pixels"
HEADS, CLASSES, PIXELS = 4, 10, 64
WIDTHS = (HEADS * PIXELS, 512, 512, HEADS * CLASSES)
DEEP = (HEADS * PIXELS, 512, 512, 512, 512, HEADS * CLASSES)
BATCH = 128


@dataclass(frozen=True)
class Variant:
    """How one of the networks is trained."""

    name: str
    steps: int
    learning_rate: float
    weight_decay: float
    masked: bool = True
    widths: tuple[int, ...] = WIDTHS
    seed: int = 0
    """Of the initial weights and of the batches; the data is the same for all."""

    @property
    def recipe(self) -> str:
        """The same in words."""
        return (
            f"AdamW, learning rate {self.learning_rate} along a cosine, weight decay {self.weight_decay}, "
            f"{self.steps} steps of {BATCH}, {'masked' if self.masked else 'all'} gradients, "
            "digits shifted by one pixel"
        )


VARIANTS = (
    Variant("vanished", 12_000, 2e-3, 1.25),
    Variant("shrunk", 8_000, 2e-3, 0.1),
    Variant("untouched", 8_000, 2e-3, 0.0),
    Variant("dense", 8_000, 2e-3, 0.1, masked=False),
    *(Variant(f"dense-{seed}", 8_000, 2e-3, 0.1, masked=False, seed=seed) for seed in (1, 2)),
    *(Variant(f"deep-{seed}", 8_000, 2e-3, 0.1, masked=False, widths=DEEP, seed=seed) for seed in (0, 1, 2)),
)


def towers(seed: int) -> list[NDArray[np.int32]]:
    """The tower of each element of each axis: in order at the border, dealt at random in the hidden axes."""
    rng = np.random.default_rng(seed)
    sorted_axes = [np.repeat(np.arange(HEADS, dtype=np.int32), width // HEADS) for width in WIDTHS]
    first, *hidden, last = sorted_axes
    return [first, *(rng.permutation(axis) for axis in hidden), last]


def side_by_side(pixels: NDArray[np.float32], target: NDArray[np.int64], count: int, seed: int) -> Arrays:
    """`count` random samples [count, 256] of four digits each, with their labels [count, 4]."""
    chosen = np.random.default_rng(seed).integers(len(pixels), size=(count, HEADS))
    return {INPUT: pixels[chosen].reshape(count, -1), "target": target[chosen]}


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy summed over the heads, averaged over the batch."""
    return HEADS * cross_entropy(logits.reshape(-1, CLASSES), target.reshape(-1))


def masks(labels: Sequence[NDArray[np.int32]]) -> dict[str, Tensor]:
    """By weight name: 1 where both ends lie in one tower."""
    return {
        f"layers.{layer}.weight": torch.from_numpy(np.equal.outer(after, before).astype(np.float32))
        for layer, (before, after) in enumerate(pairwise(labels))
    }


def main(variants: Sequence[Variant] = VARIANTS, seed: int = 0) -> None:
    """Train the variants on the same data; those with the same widths and seed start from the same weights."""
    (pixels, target), (held_pixels, held_target) = split_digits()
    pixels, target = shifted(pixels), np.tile(target, len(SHIFTS))
    report = side_by_side(held_pixels, held_target, 1_000, seed + 1)
    calib = side_by_side(pixels, target, 6_000, seed + 2)
    labels = towers(seed)
    save("towers", "report", report)
    save("towers", "calib", {INPUT: calib[INPUT]})
    save("towers", "init", Mlp(WIDTHS, seed).arrays())
    save("towers", "labels", {f"axis_{position}": axis for position, axis in enumerate(labels)})
    for variant in variants:
        name = f"towers/{variant.name}"
        network = Mlp(variant.widths, seed + variant.seed)
        if (variant.widths, variant.seed) != (WIDTHS, 0):  # otherwise the file above is its snapshot
            save(name, "init", network.arrays())
        optimizer = torch.optim.AdamW(
            network.parameters(), variant.learning_rate, weight_decay=variant.weight_decay
        )
        source = batches(pixels, target, (BATCH, HEADS), seed + variant.seed)
        mask = masks(labels) if variant.masked else None
        shrink = train(network, optimizer, source, loss, variant.steps, mask)
        facts: dict[str, Any] = {"seed": seed + variant.seed, "masked": variant.masked, "shrink": shrink}
        finish(network, name, INPUT, report, recipe=variant.recipe, **facts)


if __name__ == "__main__":
    main()
