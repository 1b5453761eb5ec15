"""The picture of `index_share.py`: times of a step, their ratio, and growth beside other engines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from _common import RESULTS

_DECODE = re.compile(r"small bf16 (decode|transformers)@(\d+)")


def peers_growth() -> dict[str, dict[int, float]]:
    """Decode time by context relative to the shortest one, of other engines, as the newest kept results have it.

    Reads the results of `engine_vs_llamacpp.py`: the model `small` in bf16, one request. An engine that was measured at
    one context only has no growth, and is left out.
    """
    times: dict[str, dict[int, float]] = {}
    for path in sorted(RESULTS.glob("engine_vs_llamacpp*.json"), key=lambda path: path.stem[-10:]):  # ends in its date
        for name, sample in json.loads(path.read_text())["samples"].items():
            if (match := _DECODE.fullmatch(name)) is None:
                continue
            llama = match[1] == "decode"
            engine, seconds = ("llama.cpp", sample["llamacpp_s"]) if llama else ("transformers", sample["decode_s"])
            times.setdefault(engine, {})[int(match[2])] = median(seconds)
    found = {}
    for engine, by_context in times.items():
        shortest = by_context[min(by_context)]
        if len(by_context) > 1:
            found[engine] = {context: by_context[context] / shortest for context in sorted(by_context)}
    if not found:
        print("no kept result has decode times of other engines at several contexts, so the plot shows ours alone")
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
