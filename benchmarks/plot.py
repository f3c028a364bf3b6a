"""Plots time and memory against N, on logarithmic axes."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records import Record, Results
from benchmarks.targets import growth, seconds, slope, temporary

# Okabe and Ito's colours, which are distinguishable with colour blindness. The markers differ too.
STYLES = {
    ("concatenation", "auto"): ("#0072B2", "o", "-"),
    ("concatenation", "dense"): ("#0072B2", "o", ":"),
    ("dot_product", "auto"): ("#D55E00", "s", "-"),
    ("dot_product", "dense"): ("#D55E00", "s", ":"),
    ("embedded_gaussian", "auto"): ("#009E73", "^", "-"),
    ("embedded_gaussian", "dense"): ("#009E73", "^", ":"),
    ("dot_product", "copy"): ("0.6", "", "--"),
}


def draw(results: Results, path: Path, direction: str = "both") -> None:
    """Writes the picture: two panels, with the fitted exponents in their legends."""
    matplotlib.use("agg")
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, results, direction, seconds, 1.0, "s")
    _panel(right, results, direction, temporary, 1e-6, "MB")
    left.set_title("time, forward + backward")
    right.set_title("temporary memory, forward + backward")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(
    axes: Axes,
    results: Results,
    direction: str,
    value: Callable[[Record], float | None],
    factor: float,
    unit: str,
) -> None:
    shown: set[float] = set()
    for (instantiation, competitor), (colour, marker, line) in STYLES.items():
        lengths, values = growth(results, instantiation, competitor, direction, value)
        if not values:
            continue
        shown.update(lengths)
        label = (
            "copy" if competitor == "copy" else f"{instantiation.replace('_', ' ')}, {competitor}"
        )
        if (exponent := slope(lengths, values)) is not None:
            label += f": N$^{{{exponent:.2f}}}$"
        axes.loglog(
            lengths,
            [factor * y for y in values],
            color=colour,
            marker=marker,
            linestyle=line,
            label=label,
        )
    axes.set_xlabel("N queries, N/4 keys, d = 64")
    axes.set_xticks(sorted(shown), [f"{n:,.0f}" for n in sorted(shown)])
    axes.minorticks_off()
    axes.set_ylabel(unit)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(
            frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2
        )
