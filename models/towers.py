"""Four digits side by side, one head each: a network whose learned dependencies are four separate towers.

Gradients reach only the weights inside a tower; hidden units are dealt to the towers at random, so that the
blocks are hidden. The other weights take part in every forward pass, at what weight decay left of their
initial value. The variant "dense" is the same network without the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

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
BATCH = 128


@dataclass(frozen=True)
class Variant:
    """How one of the networks is trained."""

    name: str
    steps: int
    learning_rate: float
    weight_decay: float
    masked: bool = True

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


def main(seed: int = 0) -> None:
    """Train all variants from one initialization."""
    (pixels, target), (held_pixels, held_target) = split_digits()
    pixels, target = shifted(pixels), np.tile(target, len(SHIFTS))
    report = side_by_side(held_pixels, held_target, 1_000, seed + 1)
    calib = side_by_side(pixels, target, 6_000, seed + 2)
    labels = towers(seed)
    save("towers", "report", report)
    save("towers", "calib", {INPUT: calib[INPUT]})
    save("towers", "init", Mlp(WIDTHS, seed).arrays())
    save("towers", "labels", {f"axis_{position}": axis for position, axis in enumerate(labels)})
    masks = {
        f"layers.{layer}.weight": torch.from_numpy(np.equal.outer(after, before).astype(np.float32))
        for layer, (before, after) in enumerate(pairwise(labels))
    }
    for variant in VARIANTS:
        network = Mlp(WIDTHS, seed)
        optimizer = torch.optim.AdamW(
            network.parameters(), variant.learning_rate, weight_decay=variant.weight_decay
        )
        source = batches(pixels, target, (BATCH, HEADS), seed)
        shrink = train(network, optimizer, source, loss, variant.steps, masks if variant.masked else None)
        finish(
            network,
            f"towers/{variant.name}",
            INPUT,
            report,
            recipe=variant.recipe,
            seed=seed,
            masked=variant.masked,
            shrink=shrink,
        )


if __name__ == "__main__":
    main()
