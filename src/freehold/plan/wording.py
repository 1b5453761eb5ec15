"""Numbers as the planner's reports write them: bytes, dollars, tokens, seconds, each with its interval and basis."""

from __future__ import annotations

from freehold.plan.types import Basis, Figure, Speed

BASIS_MARKS: dict[Basis, str] = {"exact": "", "measured": "m", "interpolated": "i", "roofline": "r"}
"""What follows a figure in tables: nothing if it is counted."""
BASIS_KEY = "m measured, i interpolated or assumed, r roofline with calibrated efficiencies; unmarked is counted"


def gb(nbytes: float) -> str:
    """Bytes in decimal gigabytes."""
    return f"{nbytes / 1e9:,.1f} GB"


def dollars(value: float) -> str:
    """US dollars, to the precision that a reader can use."""
    if value >= 1e6:
        return f"${value / 1e6:,.2f}M"
    if value >= 1000:
        return f"${value:,.0f}"
    return f"${value:,.2f}" if value >= 0.1 else f"${value:.4f}"


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{value:,.1f} s" if value >= 10 else f"{value:,.2f} s" if value >= 1 else f"{value * 1000:,.1f} ms"


def count(value: float) -> str:
    """A large number in words: 1.2 million, 3.4 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:,.3g} {word}"
    return f"{value:,.0f}"


def basis(figure: Figure) -> str:
    """The mark of a figure's basis."""
    return BASIS_MARKS[figure.basis]


def span(figure: Figure, show: object, scale: float = 1.0) -> str:
    """`value (low to high)` as `show` writes it, or the value alone if it is exact."""
    assert callable(show)
    value = show(figure.value * scale)
    if figure.low == figure.high:
        return str(value)
    return f"{value} ({show(figure.low * scale)} to {show(figure.high * scale)})"


def per_user(speed: Speed) -> float:
    """Tokens a second that one caller sees after the first."""
    return 1 / speed.tpot.p50.value if speed.tpot.p50.value > 0 else 0.0
