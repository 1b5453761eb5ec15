"""The log of a run as a picture: losses, and below them the learning rate and the norm of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from freehold.errors import InvalidRequest
from freehold.train.log import FIRST_COLUMNS, read_log

_SMOOTH = 0.98  # of the exponential mean that is drawn over the losses of single steps


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw the logs of runs one after another, by million tokens seen. Raises CheckpointError for a missing log."""
    if not runs:
        raise InvalidRequest("there is no run to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    before = 0.0
    colours: dict[str, str] = {}
    for run in runs:
        log = read_log(run)
        million = [before + tokens / 1e6 for tokens in log["tokens"]]
        for name in (name for name in log if name not in FIRST_COLUMNS):
            colour = colours.get(name, f"C{len(colours)}")
            label = None if name in colours else name.replace("_", " ")
            colours[name] = colour
            if name == "held_out":
                points = [(x, y) for x, y in zip(million, log[name], strict=True) if y == y]  # nan: not measured
                losses.plot(
                    [x for x, _ in points], [y for _, y in points], "o", color=colour, markersize=3, label=label
                )
            else:
                losses.plot(million, log[name], color=colour, alpha=0.2, linewidth=0.6)
                losses.plot(million, smooth(log[name]), color=colour, linewidth=1.4, label=label)
        rates.plot(million, log["lr_factor"], color="C0", label=None if before else "learning rate (share of peak)")
        rates.plot(
            million, log["norm"], color="C1", alpha=0.5, linewidth=0.6, label=None if before else "gradients' norm"
        )
        if before:
            losses.axvline(before, color="grey", linewidth=0.6)
        losses.annotate(run.name, (before, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
        before = million[-1]
    losses.set_ylabel("loss (nats a token)")
    losses.set_ylim(bottom=0)
    losses.grid(alpha=0.3)
    losses.legend(fontsize=8, loc="upper right")  # "best" searches, which takes long in a long log
    rates.set_xlabel("million tokens of training")
    rates.set_yscale("log")
    rates.grid(alpha=0.3)
    rates.legend(fontsize=8, loc="upper right")
    figure.savefig(out, dpi=120, format="png")


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential means, without the bias of the beginning; a nan is passed over."""
    made: list[float] = []
    total = weight = 0.0
    for value in values:
        if value == value:
            total, weight = _SMOOTH * total + (1 - _SMOOTH) * value, _SMOOTH * weight + (1 - _SMOOTH)
        made.append(total / weight if weight else float("nan"))
    return made
