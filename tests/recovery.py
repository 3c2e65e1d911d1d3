"""How well planted blocks are found: the tables of docs/statistics.md, and the helpers of its tests.

python -m tests.recovery            every table (about 15 minutes on one core)
python -m tests.recovery curve      one of: snapshot, curve, controls, rates, cost
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from models.planted import Planted, PlantedModel, build, oracle_misplacements, shuffled
from onnx_decomp.init_stats import Law
from onnx_decomp.passes.annealing import Finding, find_structure
from onnx_decomp.passes.criterion import distribution_evidence, snapshot_evidence
from onnx_decomp.passes.significance import block_pair_tests, entry_p_values, holm, set_tests, supported
from onnx_decomp.program import Evidence


def law_of(spec: Planted, layer: int = 0) -> Law:
    """What the layer's weights were drawn from."""
    scale = spec.sigma(layer)
    return Law("uniform", 0.0, scale * 3**0.5) if spec.family == "uniform" else Law("normal", 0.0, scale)


def evidence_of(planted: PlantedModel, null: str = "snapshot") -> list[Evidence]:
    """Evidence of every layer, against its snapshot or its distribution."""
    if null == "snapshot":
        return [snapshot_evidence(w, w0) for w, w0 in zip(planted.weights, planted.initial, strict=True)]
    laws = [law_of(planted.spec, layer) for layer in range(len(planted.weights))]
    return [
        distribution_evidence(w, law.normal_scores, law.std())
        for w, law in zip(planted.weights, laws, strict=True)
    ]


def recovered(planted: PlantedModel, found: Finding) -> bool:
    """One structure over the whole run, with exactly the planted blocks on every axis (adjusted Rand index 1)."""
    if len(found.structures) != 1 or found.structures[0].blocks != planted.spec.blocks:
        return False
    labels = np.concatenate(found.structures[0].grouping)
    pairs = np.unique(np.stack([labels, np.concatenate(planted.labels)]), axis=1)
    return bool((labels >= 0).all() and pairs.shape[1] == planted.spec.blocks)


def oracle_recovers(planted: PlantedModel) -> bool:
    """Whether maximum likelihood puts every element right, told the true densities and the neighbouring axes."""
    spec = planted.spec
    if not spec.jitter:
        return True
    kept = {"zero": 0.0, "shrunk": spec.decay, "untouched": 1.0}[spec.off]
    scores = []
    for layer, (w, w0) in enumerate(zip(planted.weights, planted.initial, strict=True)):
        change, exact = spec.change(layer), 1e-6 * spec.sigma(layer)
        moved = w.astype(np.float64) - spec.decay * w0
        off = stats.norm.logpdf(w - kept * w0.astype(np.float64), scale=spec.jitter * change)
        inside = np.logaddexp(
            np.log1p(-spec.unchanged) + stats.norm.logpdf(moved, scale=change),
            np.log(spec.unchanged + 1e-300) + stats.norm.logpdf(moved, scale=exact),
        )
        scores.append(np.clip(inside - off, -50, 50))
    for axis, labels in enumerate(planted.labels):
        total = np.zeros((len(labels), spec.blocks))
        if axis < len(scores):
            total += scores[axis] @ np.eye(spec.blocks)[planted.labels[axis + 1]]
        if axis:
            total += scores[axis - 1].T @ np.eye(spec.blocks)[planted.labels[axis - 1]]
        if (total.argmax(1) != labels).any():
            return False
    return True


def threshold_gain(n: int, G: int, margin: float) -> float:
    """κ at which (n/G)(κ² - 1) is `margin` times its noise 2√(n(2κ⁴/G + 2(G-1)/G)): docs/statistics.md."""
    squares = np.linspace(1.001, 60, 200_000)
    enough = n / G * (squares - 1) > margin * 2 * np.sqrt(n * (2 * squares**2 / G + 2 * (G - 1) / G))
    return float(np.sqrt(squares[enough.argmax()])) if enough.any() else float("inf")


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def snapshot_table(seeds: int = 3) -> None:
    """Planted, snapshot null: exact recovery among those the oracle gets right, and all those it does not."""
    print(f"Snapshot null: exactly recovered / oracle exact / planted ({seeds} seeds)\n")
    grids = {
        "256x384": ((256, 384), (2, 5, 16)),
        "256x512x256": ((256, 512, 256), (2, 5, 16)),
        "1024x768": ((1024, 768), (2, 8, 16)),
        "768x3072x768": ((768, 3072, 768), (4, 16)),
    }
    rows = []
    for name, (widths, blocks) in grids.items():
        row = [name]
        for jitter in (0.0, 0.1, 0.3, 0.6):
            count: Counter[str] = Counter()
            options = product(blocks, (False, True), ("zero", "shrunk", "untouched"), (1.0, 0.1, 0.01))
            for G, uneven, off, decay in options:
                for seed in range(seeds if max(widths) < 3000 else 1):
                    spec = Planted(
                        widths=widths, blocks=G, uneven=uneven, off=off, decay=decay, jitter=jitter, seed=seed
                    )
                    planted = build(spec)
                    evidence = evidence_of(planted)
                    count["all"] += 1
                    if not oracle_recovers(planted):
                        continue
                    count["oracle"] += 1
                    good = recovered(planted, find_structure(evidence))
                    count["found"] += good
                    if not good:
                        why = "misfit" if not all(e.fits for e in evidence) else "missed"
                        count[why] += 1
                        print(f"  {why}: {spec}", file=sys.stderr, flush=True)
            row.append(f"{count['found']} / {count['oracle']} / {count['all']}")
        rows.append(row)
    table(["widths", "jitter 0", "0.1", "0.3", "0.6"], rows)


def curve_table(seeds: int = 5) -> None:
    """Distribution null: exact recovery against how far the detection threshold is exceeded."""
    print(
        f"Distribution null (normal), exact recovery over {seeds} seeds by multiple of the threshold; (o): the"
    )
    print("oracle expects more than 1e-4 misplacements there\n")
    margins = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
    rows = []
    for n, G in ((256, 2), (256, 4), (256, 8), (512, 4), (512, 16), (1024, 8), (2048, 8), (2048, 16)):
        row = [f"{n}, {G} blocks"]
        for margin in margins:
            kappa = threshold_gain(n, G, margin)
            if not np.isfinite(kappa):
                row.append("-")
                continue
            good = 0
            for seed in range(seeds):
                planted = build(
                    Planted(widths=(n, n), blocks=G, gain=kappa, unchanged=0.0, family="normal", seed=seed)
                )
                good += recovered(planted, find_structure(evidence_of(planted, "distribution")))
            easy = oracle_misplacements(n, n, G, kappa, n // G) < 1e-4
            row.append(f"{good}/{seeds}" + ("" if easy else " (o)"))
        rows.append(row)
    table(["n", *(f"{margin:g}" for margin in margins)], rows)


def control_specs(seed: int) -> list[tuple[str, PlantedModel]]:
    """Models without structure."""
    base = Planted(widths=(192, 256), blocks=4, seed=seed, family="normal")
    planted = build(base)
    return [
        ("shuffled", shuffled(planted, np.random.default_rng(seed))),
        ("shuffled, jitter 0.3", shuffled(build(replace(base, jitter=0.3)), np.random.default_rng(seed))),
        ("all changed alike", build(replace(base, structured=False))),
        ("nothing changed", build(replace(base, structured=False, gain=1.0))),
        ("chain, all changed", build(replace(base, widths=(96, 192, 96), structured=False))),
    ]


def control_table(seeds: int = 200) -> None:
    """Structures found where there are none."""
    count: Counter[tuple[str, str]] = Counter()
    for seed in range(seeds):
        for name, planted in control_specs(seed):
            for null in ("snapshot", "distribution"):
                count[name, null] += bool(find_structure(evidence_of(planted, null)).structures)
    names = dict.fromkeys(name for name, _ in count)
    print(f"Structures found in {seeds} controls without any\n")
    table(
        ["control", "snapshot", "distribution"],
        [[n, *(str(count[n, k]) for k in ("snapshot", "distribution"))] for n in names],
    )


def null_rates(seed: int, pairs: int = 4) -> dict[str, NDArray[np.float64]]:
    """p-values of one matrix of pure noise, by kind of test."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((96, 128), np.float32)
    rows, cols = (rng.integers(0, pairs, n).astype(np.int32) for n in z.shape)
    tests = set_tests(z)
    off = ~np.eye(pairs, dtype=bool)
    return {
        "entries": entry_p_values(z.ravel()),
        "rows": tests.rows,
        "columns": tests.cols,
        "tiles": tests.tiles.ravel(),
        "block pairs": block_pair_tests(z, rows, cols, pairs).p[off],
    }


def false_discovery_proportion(seed: int, n: int = 200, share: float = 0.1) -> tuple[float, float]:
    """Of Benjamini-Hochberg at 5 % where a share of entries has changed by four sigma: false share and power."""
    rng = np.random.default_rng(seed)
    changed = rng.random((n, n)) < share
    z = rng.standard_normal((n, n)) * np.where(changed, np.sqrt(17), 1)
    found = supported(entry_p_values(z.ravel())).reshape(n, n)
    return float((found & ~changed).sum() / max(found.sum(), 1)), float(found[changed].mean())


def rates_table(seeds: int = 200) -> None:
    """Uniformity and error rates."""
    runs = [null_rates(seed) for seed in range(seeds)]
    rows = []
    for kind in runs[0]:
        p = np.concatenate([run[kind] for run in runs])
        family = np.mean([holm(run[kind]).min() < 0.05 for run in runs])
        rows.append([kind, f"{np.mean(p < 0.05):.4f}", f"{np.mean(p < 0.01):.4f}", f"{family:.3f}"])
    print(f"Pure noise over {seeds} seeds: share below 5 % and 1 %; family-wise error of Holm at 5 %\n")
    table(["p-values of", "5 %", "1 %", "Holm"], rows)
    false, power = np.mean([false_discovery_proportion(seed) for seed in range(seeds)], axis=0)
    print(f"Benjamini-Hochberg at 5 %: false discovery rate {false:.4f}, power {power:.3f} at four sigma\n")


def cost_table() -> None:
    """Seconds and memory of a 4096 x 4096 matrix with 8 blocks."""
    rows = []
    for jitter in (0.0, 0.3, 0.6):
        planted = build(Planted(widths=(4096, 4096), blocks=8, jitter=jitter))
        start = time.perf_counter()
        evidence = evidence_of(planted)
        middle = time.perf_counter()
        found = find_structure(evidence)
        end = time.perf_counter()
        exact = "yes" if recovered(planted, found) else "no"
        rows.append([f"{jitter:g}", f"{middle - start:.1f} s", f"{end - middle:.1f} s", exact])
    table(["4096x4096, jitter", "criterion", "annealing", "exact"], rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"Peak of the whole process, generator included: {peak:.0f} MiB\n")


TABLES = {
    "snapshot": snapshot_table,
    "curve": curve_table,
    "controls": control_table,
    "rates": rates_table,
    "cost": cost_table,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()
