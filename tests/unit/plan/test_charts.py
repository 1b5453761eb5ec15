"""Charts: well-formed, readable without sight, scaled right, and safe with any name."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.plan.charts import Axis, Bar, Mark, Part, Series, compact, lines, stacks


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def test_a_line_chart_has_its_parts() -> None:
    series = [
        Series("ours <b>", [(1, 10), (10, 5), (100, 2)], band=[(1, 8, 12), (100, 1, 3)], labels=["a", "b & c", "d"]),
        Series("theirs", [(1, 4), (100, 4)], dashed=True, marks=False),
    ]
    figure = parsed(lines("Cost", series, x="volume", y="dollars", log_x=True, marks=[Mark("here", x=20)]))
    svg = figure.find("svg")
    assert svg is not None
    assert svg.get("role") == "img"
    assert svg.findtext("title") == "Cost"
    assert "ours <b> from 10 at 1 to 2 at 100" in (svg.findtext("desc") or "")
    assert len(svg.findall("polyline")) == 2
    assert [circle.findtext("title") for circle in svg.findall("circle")] == ["a", "b & c", "d"]
    assert len(svg.findall("polygon")) == 1
    assert [span.text or (span[0].tail or "") for span in figure.iter("span")] == ["ours <b>", "theirs"]


def test_points_lie_where_the_axes_say() -> None:
    figure = parsed(lines("", [Series("", [(0, 0), (50, 5), (100, 10)])], x="", y=""))
    circles = list(figure.iter("circle"))
    across = [float(circle.get("cx", "")) for circle in circles]
    up = [float(circle.get("cy", "")) for circle in circles]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert up[0] > up[1] > up[2]


@given(low=st.floats(1e-6, 1e6), factor=st.floats(1.01, 1e9), log=st.booleans())
def test_axes_are_monotone_and_have_ticks_within(low: float, factor: float, log: bool) -> None:
    axis = Axis(low, low * factor, 0, 100, log=log)
    assert axis.at(low) == pytest.approx(0)
    assert axis.at(low * factor) == pytest.approx(100)
    assert 0 <= axis.at(low * factor**0.5) <= 100
    ticks = axis.ticks()
    assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in ticks)
    assert ticks == sorted(ticks)
    assert len(ticks) <= 20


def test_a_flat_or_empty_chart_is_drawn() -> None:
    assert "Nothing to draw" in lines("Empty", [], x="", y="")
    assert "Nothing to draw" in stacks("Empty", [], unit="GB")
    parsed(lines("Flat", [Series("", [(1, 3)])], x="", y="", log_x=True, log_y=True))


def test_a_logarithmic_axis_refuses_zero() -> None:
    with pytest.raises(ValueError, match="cannot start at 0"):
        Axis(0, 1, 0, 1, log=True)


def test_stacks_are_as_long_as_their_parts() -> None:
    bars = [
        Bar("H200 & co", [Part("weights", 90), Part("cache", 30)], limit=140),
        Bar("B200", [Part("cache", 60)], 180),
    ]
    figure = parsed(stacks("Memory", bars, unit="GB"))
    boxes = list(figure.iter("rect"))
    widths = [float(box.get("width", "")) for box in boxes]
    assert widths[0] / widths[1] == pytest.approx(3, rel=0.01)
    assert widths[2] / widths[1] == pytest.approx(2, rel=0.01)
    assert boxes[1].get("class") == boxes[2].get("class"), "one colour for one name"
    assert boxes[0].findtext("title") == "weights: 90 GB"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.05, "0.05"), (999.6, "1k"), (12_345, "12.3k"), (3.4e9, "3.4G")]
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text
