"""The one table of what a reasoning effort does, on each chat template.

A GLM template knows few levels and silently renders every other value as its strongest one. Freehold does what the
template does, and says so in a warning. `PROFILES` is the data; `resolve` applies it to a request; `as_markdown`
writes it for the documentation.

Sources: GLM-5.2 renders "High" for `high` and "Max" for anything else, and closes the thinking block at once when
`enable_thinking` is false; GLM-5.3 renders "Low", "High", else "Max", has no `enable_thinking` and always thinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from freehold.errors import InvalidRequest, UnknownField

# Every value a request may give (OpenAI's, and `max`, which is GLM's and Anthropic's), the weakest first.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
LEVELS = EFFORTS[1:]  # the values a template can have a level for; `none` is the switch, not a level

# What `chat_template_kwargs` may always name. Any other name must be one that the template really reads.
KNOWN_KWARGS = ("enable_thinking", "clear_thinking", "reasoning_effort", "thinking")


@dataclass(frozen=True, slots=True)
class EffortProfile:
    """What one chat template does with an effort.

    levels: effort value -> the value whose level the template renders for it; empty if it has no levels at all.
    default: the level without any effort. can_disable: thinking can be turned off.
    clear_thinking: whether the thinking of earlier turns is left out by default; None if the template decides.
    """

    name: str
    levels: Mapping[str, str]
    default: str | None
    can_disable: bool
    clear_thinking: bool | None = None

    def level_of(self, effort: str | None) -> str | None:
        """The level rendered for an effort (`none` included, for templates that always think), or for none given."""
        if effort is None or not self.levels:
            return self.default
        return self.levels.get(effort, self.default)


def _levels(*own: str) -> dict[str, str]:
    return {value: value if value in own else "max" for value in LEVELS}


GLM_5_2 = EffortProfile("glm-5.2", _levels("high"), default="max", can_disable=True, clear_thinking=True)
GLM_5_3 = EffortProfile("glm-5.3", _levels("low", "high"), default="max", can_disable=False, clear_thinking=False)
# GLM-5 and GLM-5.1 have a switch and no levels; no built-in renderer, but their own template files look like this.
GLM_5 = EffortProfile("glm-5", {}, default=None, can_disable=True, clear_thinking=True)

PROFILES: Mapping[str, EffortProfile] = {profile.name: profile for profile in (GLM_5_2, GLM_5_3, GLM_5)}


@dataclass(frozen=True, slots=True)
class Effort:
    """An effort as it will be rendered.

    thinking: generation starts inside `<think>`. level: the level to render; None without one.
    asked: the effort the request named, if any. clear_thinking: as asked, else the profile's default.
    """

    thinking: bool
    level: str | None
    asked: str | None = None
    clear_thinking: bool | None = None
    warnings: tuple[str, ...] = ()


def resolve(
    profile: EffortProfile,
    effort: str | None,
    kwargs: Mapping[str, Any],
    *,
    reads: Iterable[str] = KNOWN_KWARGS[:3],
) -> Effort:
    """Apply a request's `reasoning_effort` and `chat_template_kwargs` to a profile.

    reads: the variables that the template reads, which are the kwargs it is useful to send.
    Raises UnknownField for a kwarg that the template does not read, InvalidRequest for a value that is not an effort
    or for two settings that contradict each other.
    """
    _check_names(kwargs, set(reads))
    warnings: list[str] = []
    if "thinking" in kwargs and "thinking" not in reads:
        warnings.append("chat_template_kwargs.thinking is ignored by the chat template; the switch is enable_thinking")
    asked = _asked(effort, kwargs)
    switch = _boolean(kwargs, "enable_thinking")
    if asked == "none" and switch is True:
        raise InvalidRequest(
            "reasoning_effort 'none' and chat_template_kwargs.enable_thinking true contradict each other; send one",
            param="reasoning_effort",
        )
    off = asked == "none" or switch is False
    thinking = not (off and profile.can_disable)
    if off and thinking:
        cause = "reasoning_effort 'none'" if asked == "none" else "chat_template_kwargs.enable_thinking false"
        warnings.append(
            f"{cause} is not honoured: this model's thinking cannot be turned off"
            + (f", and its template renders {profile.level_of(asked)!r}" if profile.levels else "")
            + ("; 'low' is its lowest effort" if profile.level_of("low") == "low" else "")
        )
    elif not thinking and asked not in (None, "none"):
        warnings.append(f"reasoning_effort {asked!r} has no effect: thinking is off")
    elif thinking and asked is not None:
        warnings += _mapping_warning(profile, asked)
    clear = _boolean(kwargs, "clear_thinking")
    return Effort(
        thinking=thinking,
        level=profile.level_of(asked) if thinking else None,
        asked=asked,
        clear_thinking=profile.clear_thinking if clear is None else clear,
        warnings=tuple(warnings),
    )


def _mapping_warning(profile: EffortProfile, asked: str) -> list[str]:
    if not profile.levels:
        return [f"reasoning_effort {asked!r} is ignored: the chat template has no effort levels"]
    level = profile.level_of(asked)
    if level == asked:
        return []
    own = ", ".join(dict.fromkeys(profile.levels[value] for value in LEVELS))
    return [f"reasoning_effort {asked!r} is rendered as {level!r} by the chat template, whose levels are {own}"]


def _asked(effort: str | None, kwargs: Mapping[str, Any]) -> str | None:
    inner = kwargs.get("reasoning_effort")
    for param, value in (("reasoning_effort", effort), ("chat_template_kwargs.reasoning_effort", inner)):
        if value is not None and value not in EFFORTS:
            raise InvalidRequest(f"{param}: {value!r} is not one of {', '.join(EFFORTS)}", param=param)
    if effort is not None and inner is not None and effort != inner:
        raise InvalidRequest(
            f"reasoning_effort {effort!r} and chat_template_kwargs.reasoning_effort {inner!r} differ; send one",
            param="chat_template_kwargs.reasoning_effort",
        )
    return effort if effort is not None else inner


def _boolean(kwargs: Mapping[str, Any], name: str) -> bool | None:
    value = kwargs.get(name)
    if value is not None and not isinstance(value, bool):
        param = f"chat_template_kwargs.{name}"
        raise InvalidRequest(f"{param} must be true or false, found {value!r}", param=param)
    return value


def _check_names(kwargs: Mapping[str, Any], reads: set[str]) -> None:
    # enable_thinking is known even to templates without it: those always think, which `resolve` answers with a warning.
    allowed = reads | {"enable_thinking", "reasoning_effort", "thinking"}
    for name in kwargs:
        if name not in allowed:
            param = f"chat_template_kwargs.{name}"
            raise UnknownField(
                f"{param}: the chat template reads {', '.join(sorted(reads))}, not {name!r}", param=param
            )


def as_markdown() -> str:
    """The table for the documentation: a row per effort, a column per profile."""
    profiles = tuple(PROFILES.values())
    lines = ["| `reasoning_effort` | " + " | ".join(profile.name for profile in profiles) + " |"]
    lines.append("|---" * (len(profiles) + 1) + "|")
    for asked in (None, *EFFORTS):
        label = "*(unset)*" if asked is None else f"`{asked}`"
        lines.append(f"| {label} | " + " | ".join(_cell(profile, asked) for profile in profiles) + " |")
    return "\n".join(lines) + "\n"


def _cell(profile: EffortProfile, asked: str | None) -> str:
    found = resolve(profile, asked, {})
    text = "thinks" if found.thinking else "no thinking"
    if found.level is not None:
        text += f", {found.level.capitalize()}"
    return text + (", with a warning" if found.warnings else "")
