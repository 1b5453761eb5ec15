"""The effort table: what every value does on every profile, and that the documentation says the same."""

from __future__ import annotations

from typing import Any

import pytest

from freehold.errors import InvalidRequest, UnknownField
from freehold.model.chat.effort import EFFORTS, GLM_5, GLM_5_2, GLM_5_3, as_markdown, resolve

# effort -> (thinking, level, warned), written out so that a change of the table is a change here
EXPECTED: dict[str, dict[str | None, tuple[bool, str | None, bool]]] = {
    "glm-5.2": {
        None: (True, "max", False),
        "none": (False, None, False),
        "minimal": (True, "max", True),
        "low": (True, "max", True),
        "medium": (True, "max", True),
        "high": (True, "high", False),
        "xhigh": (True, "max", True),
        "max": (True, "max", False),
    },
    "glm-5.3": {
        None: (True, "max", False),
        "none": (True, "max", True),
        "minimal": (True, "max", True),
        "low": (True, "low", False),
        "medium": (True, "max", True),
        "high": (True, "high", False),
        "xhigh": (True, "max", True),
        "max": (True, "max", False),
    },
    "glm-5": {
        None: (True, None, False),
        "none": (False, None, False),
        **dict.fromkeys(EFFORTS[1:], (True, None, True)),
    },
}


@pytest.mark.parametrize("profile", [GLM_5_2, GLM_5_3, GLM_5], ids=lambda profile: profile.name)
@pytest.mark.parametrize("effort", [None, *EFFORTS])
def test_the_table(profile: Any, effort: str | None) -> None:
    thinking, level, warned = EXPECTED[profile.name][effort]
    for found in (resolve(profile, effort, {}), resolve(profile, None, {"reasoning_effort": effort})):
        assert (found.thinking, found.level, bool(found.warnings)) == (thinking, level, warned)
        assert all("\n" not in warning for warning in found.warnings)


def test_the_documentation_has_the_table() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in as_markdown().splitlines()]
    assert rows[0] == ["`reasoning_effort`", "glm-5.2", "glm-5.3", "glm-5"]
    assert rows[2] == ["*(unset)*", "thinks, Max", "thinks, Max", "thinks"]
    assert rows[3] == ["`none`", "no thinking", "thinks, Max, with a warning", "no thinking"]
    assert rows[5] == ["`low`", "thinks, Max, with a warning", "thinks, Low", "thinks, with a warning"]
    assert [row[0].strip("`") for row in rows[3:]] == list(EFFORTS)


def test_the_switch() -> None:
    assert not resolve(GLM_5_2, None, {"enable_thinking": False}).thinking
    assert resolve(GLM_5_2, None, {"enable_thinking": True}).thinking
    assert resolve(GLM_5_2, "none", {"enable_thinking": False}).warnings == ()
    (warning,) = resolve(GLM_5_2, "high", {"enable_thinking": False}).warnings
    assert warning == "reasoning_effort 'high' has no effect: thinking is off"


def test_thinking_that_cannot_be_turned_off() -> None:
    for effort, kwargs, cause in ((None, {"enable_thinking": False}, "enable_thinking false"), ("none", {}, "'none'")):
        found = resolve(GLM_5_3, effort, kwargs)
        assert found.thinking
        assert cause in found.warnings[0]
        assert "renders 'max'; 'low' is its lowest effort" in found.warnings[0]
    assert resolve(GLM_5_3, "low", {"enable_thinking": False}).level == "low"
    assert resolve(GLM_5_3, "low", {"enable_thinking": True}).warnings == ()


def test_the_wrong_switch_is_warned_about() -> None:
    found = resolve(GLM_5_2, None, {"thinking": False})
    assert found.thinking
    assert "the switch is enable_thinking" in found.warnings[0]
    assert resolve(GLM_5_2, None, {"thinking": False}, reads=("thinking",)).warnings == ()


def test_history_thinking() -> None:
    assert resolve(GLM_5_2, None, {}).clear_thinking is True
    assert resolve(GLM_5_3, None, {}).clear_thinking is False
    assert resolve(GLM_5_2, None, {"clear_thinking": False}).clear_thinking is False
    assert resolve(GLM_5_3, None, {"clear_thinking": True}).clear_thinking is True


@pytest.mark.parametrize(
    ("effort", "kwargs", "param"),
    [
        ("extreme", {}, "reasoning_effort"),
        (None, {"reasoning_effort": "Low"}, "chat_template_kwargs.reasoning_effort"),
        (None, {"reasoning_effort": 1}, "chat_template_kwargs.reasoning_effort"),
        ("low", {"reasoning_effort": "high"}, "chat_template_kwargs.reasoning_effort"),
        ("none", {"enable_thinking": True}, "reasoning_effort"),
        (None, {"enable_thinking": "false"}, "chat_template_kwargs.enable_thinking"),
        (None, {"clear_thinking": 0}, "chat_template_kwargs.clear_thinking"),
    ],
)
def test_what_is_refused(effort: str | None, kwargs: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(GLM_5_2, effort, kwargs)
    assert caught.value.param == param
    assert "\n" not in caught.value.message


def test_an_unknown_kwarg_is_named() -> None:
    with pytest.raises(UnknownField, match="clear_thinking, enable_thinking, reasoning_effort, not 'think'") as caught:
        resolve(GLM_5_2, None, {"think": True})
    assert caught.value.param == "chat_template_kwargs.think"
