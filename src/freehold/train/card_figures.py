"""What was measured, as tables and sentences of a model card. Torch-free.

results: the result file of `benchmarks/tiny_model.py`, or None if nothing was measured; sections that it lacks are left
out. Lines of Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def abilities(results: Mapping[str, Any] | None) -> Iterator[str]:
    """What it can do, and what was aimed at and not reached."""
    if results is None:
        yield "Nothing was measured yet: `python benchmarks/tiny_model.py` does it."
        return
    samples = results["samples"]
    yield (
        "Measured by `benchmarks/tiny_model.py` on held-out prompts: other seeds, and made-up words, names and numbers "
        "that training never shows. Greedy, through Freehold's engine; 95% intervals in brackets.\n"
    )
    rows = [
        (name.removeprefix("task "), _rate(found["rate"]), found["prompts"])
        for name, found in samples.get("rates", {}).items()
    ]
    if (thinking := samples.get("thinking")) is not None:
        rows.append(("tokens off < High < Max", _rate(thinking["in order"]), len(thinking["rows"])))
    yield from table(("task", "right", "prompts"), rows)
    if (held_out := samples.get("held-out")) is not None:
        yield from _perplexities(held_out)
    if (lora := samples.get("lora")) is not None:
        before, after = (sum(lora[key]) / len(lora[key]) for key in ("task_before", "task_after"))
        gained, lost = lora["gained"], lora["lost"]
        yield (
            f"Teaching it: a LoRA adapter on {lora['chats']} examples of a task it had not seen took "
            f"{lora['seconds'] / 60:.1f} minutes and moved it from {before:.0%} to {after:.0%} there "
            f"({gained[0]:+.0f} points, {gained[1]:+.0f} to {gained[2]:+.0f}), and by {-lost[0]:+.1f} points "
            f"({-lost[2]:+.1f} to {-lost[1]:+.1f}) on all else.\n"
        )
    yield from _missed(results)


def ablations(results: Mapping[str, Any] | None) -> Iterator[str]:
    """What its parts are worth: without them, or with others."""
    samples = {} if results is None else results["samples"]
    if (found := samples.get("ablations")) is None and "drafts" not in samples:
        yield "Nothing was measured yet."
        return
    if found is not None:
        yield from _variant_table(found)
    if (drafts := samples.get("drafts")) is not None:
        changed = sum(row["changed"] for row in drafts["rows"])
        same = f"{changed} answers differ from those without" if changed else "the answers are the same in all rows"
        yield (
            f"Drafting with the MTP layer, greedy, one prompt at a time; {same}. It was "
            "trained to share the selection and the cache entries of the last verified token between drafts:\n"
        )
        rows = ((row["sharing"], row["drafts"], f"{row['length']:.2f}") for row in drafts["rows"])
        yield from table(("drafts", "k", "tokens a step"), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """And an empty line behind it."""
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def _perplexities(held_out: Mapping[str, Any]) -> Iterator[str]:
    yield f"Perplexity on {held_out['documents']} held-out documents:\n"
    yield from _by_part(held_out["perplexity"], 2)
    if beside := held_out.get("beside"):
        yield "Ratios of perplexities on the same documents; below 1 where the first model predicts better:\n"
        yield from _by_part(beside, 3)


def _by_part(found: Mapping[str, Mapping[str, Sequence[float]]], digits: int) -> Iterator[str]:
    """found: [value, low, high] by row and column."""
    parts = list(next(iter(found.values())))
    yield from table(
        ("", *parts), ((name, *(_spread(row[part], digits) for part in parts)) for name, row in found.items())
    )


def _missed(results: Mapping[str, Any]) -> Iterator[str]:
    missed = [bar for bar in results["bars"] if not bar["pass"]]
    if missed:
        yield "What was aimed at and not reached:\n"
        for bar in missed:
            yield f"- {bar['name']}: {bar['value']:.4g}, where {bar['op']} {bar['limit']:g} was the aim"


def _variant_table(found: Mapping[str, Any]) -> Iterator[str]:
    rows = found["inference only"]
    lengths = list(rows[0]["retrieval"])
    yield "Changed at inference only, nothing trained:\n"
    cells = (
        (row["name"], *(_rate(_values(row["retrieval"][n])) for n in lengths), f"{_values(row['loss'])[0]:.3f}")
        for row in rows
    )
    yield from table(("", *(f"retrieval at {n} tokens" for n in lengths), "loss beyond index_topk"), cells)
    if found.get("retrained"):
        yield from _retrained_table(found["retrained"])
    if found.get("speed"):
        yield from _speed_table(found["speed"])


def _retrained_table(retrained: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Trained from nothing by the same recipe, to compare (index-share: this model's shape; every-layer: an indexer "
        "on every layer; dense: neither indexers nor experts, of equal active size). Minutes are the clock's, whatever "
        "else the machine did:\n"
    )
    names = list(next(iter(retrained.values()))["rates"])
    rows = (
        (
            arm,
            f"{row['tokens']:,}",
            f"{row['seconds'] / 60:.0f}",
            _spread(row["perplexity"], 2),
            *(_rate(row["rates"][name]) for name in names),
        )
        for arm, row in retrained.items()
    )
    yield from table(("", "tokens", "minutes", "perplexity", *names), rows)


def _speed_table(speed: Mapping[str, Any]) -> Iterator[str]:
    """speed: tokens a second, [prefill, decode], of each arm at each context."""
    contexts = list(next(iter(speed.values())))
    yield "How fast, in tokens a second on two CPU cores:\n"
    columns = (title for n in contexts for title in (f"prefill of {n} tokens", f"decoding after {n}"))
    rows = ((arm, *(f"{rate:,.0f}" for n in contexts for rate in at[n])) for arm, at in speed.items())
    yield from table(("", *columns), rows)


def _rate(interval: Sequence[float]) -> str:
    value, low, high = (100 * each for each in interval)
    return f"{value:.1f}% ({low:.1f} to {high:.1f})"


def _spread(interval: Sequence[float], digits: int) -> str:
    value, low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _values(interval: Any) -> Sequence[float]:
    """[value, low, high], from a list or from the fields of an Interval."""
    if isinstance(interval, Mapping):
        return [interval["value"], interval["low"], interval["high"]]
    values: Sequence[float] = interval
    return values
