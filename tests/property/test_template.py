"""Random conversations: both renderers agree byte for byte, and no text of a user's becomes a control token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.model.chat.effort import EFFORTS
from freehold.model.chat.jinja_template import JinjaTemplate
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import GLM_SPECIAL_TOKENS, Tokenizer

TOY = Tokenizer.toy(512)
MANY = settings(max_examples=max(150, settings().max_examples))  # the nightly profile has more
GOLDEN = Path(__file__).parents[1] / "golden" / "templates"
PROFILES = {"glm-5.2": "glm_5_2.jinja", "glm-5.3": "glm_5_3.jinja"}


def _file(name: str) -> ChatTemplate:
    source = JinjaTemplate((GOLDEN / name).read_text(encoding="utf-8"))
    return ChatTemplate(source.effort_profile(), source)


RENDERERS = {profile: (ChatTemplate.builtin(profile), _file(name)) for profile, name in PROFILES.items()}

plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
pieces = st.sampled_from(
    [*GLM_SPECIAL_TOKENS, "<", "<|", "user|>", " ", "\n", "a", "京", "{{ x }}", "\U000f0000", "\U000f0003", "\\n", '"']
)
texts = st.one_of(plain, st.lists(pieces, max_size=6).map("".join))
values = st.recursive(
    texts | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
parts = st.builds(lambda text: {"type": "text", "text": text}, texts)
contents = st.one_of(texts, st.none(), st.lists(parts, max_size=3))
ids = st.sampled_from(["a", "b", "c", "", None])


def _call(id_: str | None, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def _tools(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{i}", **tool}} for i, tool in enumerate(functions)]


calls = st.lists(st.builds(_call, ids, texts.filter(bool), st.dictionaries(texts, values, max_size=3)), max_size=3)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user"]), "content": contents}),
        st.fixed_dictionaries(
            {
                "role": st.just("assistant"),
                "content": contents,
                "reasoning_content": st.none() | texts,
                "tool_calls": calls,
            }
        ),
        st.fixed_dictionaries({"role": st.just("tool"), "content": contents, "tool_call_id": ids}),
        st.just({"role": "tool", "content": [{"type": "tool_reference", "name": "f0"}], "tool_call_id": "a"}),
    ),
    min_size=1,
    max_size=7,
)
tools = st.lists(
    st.fixed_dictionaries(
        {"parameters": st.just({"type": "object"})},
        optional={"description": texts, "strict": st.booleans(), "defer_loading": st.booleans()},
    ),
    min_size=1,
    max_size=3,
).map(_tools)
kwargs: dict[str, st.SearchStrategy[Any]] = {"clear_thinking": st.booleans(), "enable_thinking": st.booleans()}


@MANY
@given(
    st.sampled_from(sorted(PROFILES)),
    messages,
    tools,
    st.sampled_from([None, *EFFORTS[1:]]),
    st.fixed_dictionaries({}, optional=kwargs),
    st.booleans(),
)
def test_both_renderers_agree(
    profile: str, conversation: list[Any], declared: list[Any], effort: str | None, given_kwargs: Any, generate: bool
) -> None:
    builtin, file = RENDERERS[profile]
    one, other = (
        template.render(
            conversation, declared, effort=effort, template_kwargs=given_kwargs, add_generation_prompt=generate
        )
        for template in (builtin, file)
    )
    assert one == other
    assert one.encode(TOY) == other.encode(TOY)


@MANY
@given(st.sampled_from(sorted(PROFILES)), st.sampled_from([0, 1]), messages, tools)
def test_control_tokens_are_the_templates(
    profile: str, which: int, conversation: list[Any], declared: list[Any]
) -> None:
    """The control tokens of a prompt are those of the same conversation with every text replaced by a letter."""
    template = RENDERERS[profile][which]
    rendered = template.render(conversation, declared)
    ids_ = rendered.encode(TOY)
    assert TOY.decode(ids_) == rendered.text
    controls = [TOY.decode([i]) for i in ids_ if TOY.is_special(i)]
    assert controls == [
        segment.text for segment in template.render(harmless(conversation), declared).segments if segment.control
    ]


def harmless(conversation: list[Any]) -> list[Any]:
    """The same conversation without any text that could be a control token, in the same structure."""

    def clean(text: str | None) -> str | None:
        return text and "x"

    found = []
    for message in conversation:
        message = dict(message)
        content = message["content"]
        if not isinstance(content, list):
            message["content"] = clean(content)
        elif not (content and content[0]["type"] == "tool_reference"):
            message["content"] = "x"
        if message["role"] == "assistant":
            text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
            # thinking may be written into the content, and is structure then
            message["reasoning_content"] = clean(message["reasoning_content"]) or ("x" if "</think>" in text else None)
            message["tool_calls"] = [
                {**call, "function": {"name": "x", "arguments": _renamed(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        found.append(message)
    return found


def _renamed(arguments: str) -> str:
    return json.dumps({f"k{i}": "x" for i in range(len(json.loads(arguments)))})
