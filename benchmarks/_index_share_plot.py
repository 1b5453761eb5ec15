"""The picture of `index_share.py`: times of a step, their ratio, and growth beside other engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _common import RESULTS

_PEERS = "decode_by_context"


def peers_growth() -> dict[str, dict[int, float]]:
    """Decode time by context relative to the shortest one, of other engines, as the newest results have it.

    Looks in `benchmarks/results/*.json` for samples["decode_by_context"] = {engine: {context: seconds a token}}.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem[-10:]):  # the date ends the name
        for name, times in json.loads(path.read_text()).get("samples", {}).get(_PEERS, {}).items():
            by_context = {int(context): float(seconds) for context, seconds in times.items()}
            shortest = by_context[min(by_context)]
            found[name] = {context: by_context[context] / shortest for context in sorted(by_context)}
    if not found:
        print("no kept result has decode times of other engines by context, so the plot shows ours alone")
    return found


def draw(data: dict[str, Any], peers: dict[str, dict[int, float]], path: Path | None) -> None:
    """Write the plot as PNG; without matplotlib, say so: the results file has every figure."""
    path = path or RESULTS / "index_share.png"
    try:
        import matplotlib
    except ImportError:
        print("no plot was drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = data["rows"]
    contexts = [row["context"] for row in rows]
    figure, (times, ratio, growth) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for i, (label, colour) in enumerate((("every layer full", "tab:red"), ("IndexShare", "tab:blue"))):
        times.plot(contexts, [1e3 * row["measured"][i] for row in rows], "o-", color=colour, label=f"{label}, measured")
        times.plot(contexts, [1e3 * row["calibrated"][i] for row in rows], "--", color=colour, label="calibrated")
        times.plot(contexts, [1e3 * row["bytes"][i] for row in rows], ":", color=colour, label="bytes alone")
        values = [row["measured"][i] / rows[0]["measured"][i] for row in rows]
        growth.plot(contexts, values, "o-", color=colour, label=f"Freehold, {label}")
    for key, style in (("measured", "o-"), ("calibrated", "--"), ("bytes", ":")):
        ratio.plot(contexts, [row[key][0] / row[key][1] for row in rows], style, label=f"this model, {key}")
    ratio.plot(contexts, [row["glm52_flops_ratio"] for row in rows], "k-.", label="GLM-5.2, FLOPs (closed form)")
    for name, values_by_context in peers.items():
        growth.plot(list(values_by_context), list(values_by_context.values()), "s--", label=name)
    times.set_ylabel("time of a decode step, ms")
    ratio.set_ylabel("without IndexShare : with it")
    growth.set_ylabel("decode time, of that at the shortest context")
    for axes in (times, ratio, growth):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in (times, growth):
        axes.set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")
