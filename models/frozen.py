"""A control: the digit classifier of `digits.py` on random features, its first layer never trained.

Every weight of that layer equals its initial value exactly, so that no test finds evidence for any of them, and yet
the network is nothing without them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from models.digits import BATCH, INPUT, SHIFTS, STEPS, WIDTHS, shifted, split_digits
from models.training import Arrays, Mlp, batches, finish, save, train

RATE = 1e-3


def main(seed: int = 0) -> None:
    """Train all layers but the first, on the data of `digits.py`."""
    (pixels, target), (held_pixels, held_target) = split_digits()
    pixels, target = shifted(pixels), np.tile(target, len(SHIFTS))
    report: Arrays = {INPUT: held_pixels, "target": held_target}
    network = Mlp(WIDTHS, seed)
    save("frozen", "init", network.arrays())
    save("frozen", "calib", {INPUT: pixels})
    save("frozen", "report", report)
    network.layers[0].requires_grad_(False)
    optimizer = torch.optim.Adam(network.layers[1:].parameters(), RATE)
    train(network, optimizer, batches(pixels, target, (BATCH,), seed), cross_entropy, STEPS)
    recipe = (
        f"Adam, learning rate {RATE} along a cosine, {STEPS} steps of {BATCH}, first layer never trained, "
        "digits shifted by one pixel"
    )
    finish(network, "frozen", INPUT, report, recipe=recipe, seed=seed)


if __name__ == "__main__":
    main()
