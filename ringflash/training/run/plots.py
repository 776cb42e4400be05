"""One picture of a run: the loss over the steps beside n-gram models, and loss by length of context.

plot_run(folder / "training.png", train=[(1, 5.9), ...], validation=[(300, 2.3)], baselines={"bigram": 3.5},
         positions=position_loss.bins())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringflash.training.run.position_loss import PositionBin

Curve = Sequence[tuple[int, float]]
"""(step, loss) pairs."""

TRAIN, VALIDATION, BASELINE = "#7f9cc0", "#c0392b", "#666666"


def plot_run(
    path: str | Path,
    train: Curve,
    validation: Curve,
    baselines: Mapping[str, float],
    positions: Sequence[PositionBin],
    title: str = "",
    unit: str = "bits per byte",
) -> None:
    """Write a PNG; it is complete or not there.

    Args:
        path: where to.
        train: bits per byte of training steps.
        validation: bits per byte on the validation part.
        baselines: bits per byte of other models on the validation part, drawn as lines.
        positions: validation loss by length of context.
        title: of the whole picture.
        unit: of all but the positions' losses.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_curves(left, train, validation, baselines, unit)
    _draw_positions(right, positions)
    if title:
        figure.suptitle(title)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _draw_curves(axes: Axes, train: Curve, validation: Curve, baselines: Mapping[str, float], unit: str) -> None:
    axes.set(xlabel="optimizer step", ylabel=unit, title="Loss while training")
    if train:
        steps, values = np.array(train, float).T
        axes.plot(steps, values, color=TRAIN, alpha=0.4, linewidth=1)
        axes.plot(steps, _smooth(values), color=TRAIN, linewidth=2, label="training (smoothed)")
    if validation:
        steps, values = np.array(validation, float).T
        axes.plot(steps, values, "o-", color=VALIDATION, label=f"validation (last {values[-1]:.2f})")
    heights = [value for _, value in (*train, *validation) if np.isfinite(value)]
    axes.set_ylim(0, 1.08 * max([*heights, *baselines.values()], default=1.0))
    _draw_baselines(axes, baselines)
    axes.grid(alpha=0.25)
    if train or validation:
        axes.legend(loc="lower left")


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    above = np.inf
    for name, value in sorted(baselines.items(), key=lambda item: -item[1]):
        # Where a line is close to the one above it, its label stands below it.
        crowded = above - value < 0.05 * axes.get_ylim()[1]
        above = value
        axes.axhline(value, color=BASELINE, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {value:.2f}",
            xy=(1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -12 if crowded else 3),
            textcoords="offset points",
            ha="right",
            color=BASELINE,
            fontsize=9,
        )


def _draw_positions(axes: Axes, positions: Sequence[PositionBin]) -> None:
    axes.set(
        xlabel="tokens of context before the predicted one", ylabel="nats per token", title="Validation loss by context"
    )
    axes.grid(alpha=0.25)
    if not positions:
        axes.text(0.5, 0.5, "no validation tokens", transform=axes.transAxes, ha="center")
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    middle = [np.sqrt(bin_.first * bin_.last) for bin_ in positions]
    axes.plot(middle, [bin_.loss for bin_ in positions], "o-", color=VALIDATION)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a thirtieth of the curve, unbiased at its start; gaps (nan) are carried over."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    total = weight = 0.0
    out = []
    for value in values:
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight else np.nan)
    return np.array(out)
