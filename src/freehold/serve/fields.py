"""The one table of API fields that are known but not acted on.

Every field that a published API (OpenAI, Anthropic) or a common extension (vLLM, SGLang) defines is either in
the request schema of its endpoint, and honoured, or here. A field in neither is a 400 that names it.

A rule says what happens to a field that was sent:

* null, or one of the rule's `harmless` values: dropped in silence (that is what the server does anyway);
* `IGNORE`: accepted and dropped, and named in the `x-freehold-warning` response header;
* `REFUSE`: a 400 that names it, because ignoring it would change the result.

Keys are paths: `stream_options.include_obfuscation`, `messages[].name`. `[]` stands for every item of an array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Action(StrEnum):
    """What happens to a field that asks for something the server does not do."""

    IGNORE = "ignored with a warning"
    REFUSE = "refused"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table. `why` completes the sentence "FIELD is ignored/refused: …"."""

    action: Action
    why: str
    harmless: tuple[Any, ...] = ()

    def allows(self, value: object) -> bool:
        """Whether the value asks for nothing: null, or what the server does anyway."""
        # `is` on types keeps 1 and True apart, which == does not.
        return value is None or any(value == h and type(value) is type(h) for h in self.harmless)


def ignore(why: str, *harmless: Any) -> Rule:
    return Rule(Action.IGNORE, why, harmless)


def refuse(why: str, *harmless: Any) -> Rule:
    return Rule(Action.REFUSE, why, harmless)


NOT_STORED = ignore("nothing is stored here", False)
NOT_STORED_METADATA = ignore("nothing is stored here", {})
IDENTIFIER = ignore("end users are not told apart here")
TIER = ignore("there is one service tier", "auto", "default", "standard", "standard_only")
CACHE_HINT = ignore("the prefix cache is automatic; use `cache_salt` to keep callers apart", {})
BREAKPOINT = ignore("the prefix cache is automatic and needs no breakpoints", {})
MODERATION = refuse("there is no moderation model here")
PRIORITY = ignore("requests are served in order of arrival", 0)
OBFUSCATION = ignore("stream chunks are not padded", False)
NO_VERBOSITY = ignore("the model has no verbosity control; ask for it in a message", "medium")
NO_SUMMARY = ignore("reasoning is returned in full, not summarised")
CALLED_BY_MODEL = refuse("only the model itself calls tools", ["direct"])
CALLER = ignore("only the model itself calls tools", {"type": "direct"})
NO_CITATIONS = ignore("the model does not see citations", [])
NO_SUFFIX = refuse("fill-in-the-middle is not supported; put the suffix into the prompt", "")
ONE_TIER_SPEED = ignore("there is one speed", "standard")

# vLLM and SGLang extensions that are the same on every generating endpoint. At their defaults they ask for nothing.
ENGINE_EXTENSIONS: Mapping[str, Rule] = {
    "allowed_token_ids": refuse("use `logit_bias` or `response_format`", []),
    "bad_words": refuse("use `logit_bias`", []),
    "beam_width": refuse("beam search is not supported"),
    "detokenize": refuse("text is always returned", True),
    "early_stopping": refuse("beam search is not supported", False),
    "guided_choice": refuse("use `response_format` with an enum", []),
    "guided_decoding_backend": ignore("there is one grammar engine"),
    "guided_grammar": refuse("use `response_format`"),
    "guided_json": refuse("use `response_format`"),
    "guided_regex": refuse("use `response_format` with a pattern"),
    "kv_transfer_params": refuse("prefill and decode run in one place here", {}),
    "length_penalty": refuse("beam search is not supported", 1.0, 1),
    "logits_processors": refuse("code is not accepted in requests", []),
    "priority": PRIORITY,
    "request_id": ignore("the server makes its own ids; see the `x-request-id` response header"),
    "return_token_ids": refuse("use /tokenize for the prompt, and logprobs for the answer", False),
    "return_tokens_as_token_ids": refuse("tokens are returned as text and bytes", False),
    "skip_special_tokens": refuse("special tokens are always left out of the text", True),
    "spaces_between_special_tokens": ignore("special tokens are left out of the text", True, False),
    "structured_outputs": refuse("use `response_format`", {}),
    "truncate_prompt_tokens": refuse("prompts are never shortened"),
    "use_beam_search": refuse("beam search is not supported", False),
    "vllm_xargs": refuse("engine arguments are not accepted in requests", {}),
}

_CHAT_MESSAGES: Mapping[str, Rule] = {
    "messages[].annotations": ignore("the model does not see annotations", []),
    "messages[].audio": refuse("the model is text only"),
    "messages[].cache_control": BREAKPOINT,
    "messages[].function_call": refuse("use `tool_calls`"),
    "messages[].name": ignore("the model's chat format has no participant names"),
    "messages[].prompt_cache_breakpoint": BREAKPOINT,
    "messages[].reasoning_details": ignore("use `reasoning_content`", []),
    "messages[].refusal": refuse("put the text into `content`", ""),
    "messages[].content[].annotations": ignore("the model does not see annotations", []),
    "messages[].content[].cache_control": BREAKPOINT,
    "messages[].content[].prompt_cache_breakpoint": BREAKPOINT,
    "messages[].tool_calls[].index": ignore("calls are taken in the order of the list"),
    "tools[].cache_control": BREAKPOINT,
    "tools[].function.cache_control": BREAKPOINT,
}

CHAT: Mapping[str, Rule] = {
    **ENGINE_EXTENSIONS,
    **_CHAT_MESSAGES,
    "add_generation_prompt": refuse("the answer always begins a new assistant message", True),
    "add_special_tokens": refuse("the chat template writes the special tokens", False),
    "audio": refuse("the model is text only"),
    "chat_template": refuse("templates are not accepted in requests; the checkpoint's is used"),
    "continue_final_message": refuse("the answer always begins a new assistant message", False),
    "do_sample": refuse("use `temperature` 0 for greedy decoding", True),
    "documents": refuse("put documents into a message", []),
    "echo": refuse("use /v1/completions to echo the prompt", False),
    "function_call": refuse("deprecated by OpenAI; use `tool_choice`"),
    "functions": refuse("deprecated by OpenAI; use `tools`", []),
    "include_reasoning": refuse("reasoning is always returned, apart from the answer", True),
    "media_io_kwargs": refuse("the model is text only", {}),
    "metadata": NOT_STORED_METADATA,
    "mm_processor_kwargs": refuse("the model is text only", {}),
    "modalities": refuse("the model is text only", ["text"]),
    "moderation": MODERATION,
    "prediction": ignore("predicted outputs only change speed, and are not used here"),
    "prompt_cache_key": CACHE_HINT,
    "prompt_cache_options": CACHE_HINT,
    "prompt_cache_retention": CACHE_HINT,
    "safety_identifier": IDENTIFIER,
    "separate_reasoning": refuse("reasoning is always returned apart from the answer", True),
    "service_tier": TIER,
    "store": NOT_STORED,
    "stream_options.include_obfuscation": OBFUSCATION,
    "stream_reasoning": refuse("reasoning is always streamed", True),
    "tool_stream": ignore("tool calls are always streamed as they are written", True, False),
    "user": IDENTIFIER,
    "user_id": IDENTIFIER,
    "verbosity": NO_VERBOSITY,
    "web_search_options": refuse("there is no web search here"),
}

COMPLETIONS: Mapping[str, Rule] = {
    **ENGINE_EXTENSIONS,
    "add_special_tokens": refuse("prompts are taken as they are", False),
    "best_of": refuse("use `n` and choose by logprobs", 1),
    "prompt_embeds": refuse("prompts are text or token ids"),
    "stream_options.include_obfuscation": OBFUSCATION,
    "suffix": NO_SUFFIX,
    "user": IDENTIFIER,
}

TOKENIZE: Mapping[str, Rule] = {
    **_CHAT_MESSAGES,
    "add_special_tokens": refuse("the tokenizer adds none; the chat template writes them", False, True),
    "chat_template": refuse("templates are not accepted in requests; the checkpoint's is used"),
    "continue_final_message": refuse("the answer always begins a new assistant message", False),
    "media_io_kwargs": refuse("the model is text only", {}),
    "mm_processor_kwargs": refuse("the model is text only", {}),
}

DETOKENIZE: Mapping[str, Rule] = {}

RESPONSES: Mapping[str, Rule] = {
    "access_programs": ignore("there are no access programs here", {}),
    "background": refuse("answers are not stored, so there is nothing to come back for", False),
    "background_options": ignore("requests are never run in the background", {}),
    "context_management": refuse("conversations are never shortened", []),
    "conversation": refuse("nothing is stored here; send the whole conversation in `input`"),
    "image": ignore("the model is text only", {}),
    "input[].async": ignore("every call waits for its output", False),
    "input[].caller": CALLER,
    "input[].namespace": ignore("functions have no namespaces here"),
    "input[].content[].prompt_cache_breakpoint": BREAKPOINT,
    "input[].output[].prompt_cache_breakpoint": BREAKPOINT,
    "max_tool_calls": ignore("there are no built-in tools to count"),
    "moderation": MODERATION,
    "previous_response_id": refuse("nothing is stored here; send the whole conversation in `input`"),
    "prompt": refuse("there are no stored prompts here; send `input`"),
    "prompt_cache_key": CACHE_HINT,
    "prompt_cache_options": CACHE_HINT,
    "prompt_cache_retention": CACHE_HINT,
    "reasoning.generate_summary": NO_SUMMARY,
    "reasoning.mode": refuse("there is one mode", "standard"),
    "reasoning.summary": NO_SUMMARY,
    "safety_identifier": IDENTIFIER,
    "service_tier": TIER,
    "store": NOT_STORED,
    "stream_options.include_obfuscation": OBFUSCATION,
    "text.verbosity": NO_VERBOSITY,
    "tools[].allowed_callers": CALLED_BY_MODEL,
    "tools[].async": ignore("every call waits for its output", False),
    "tools[].defer_loading": refuse("there is no tool search here", False),
    "tools[].output_schema": ignore("the chat format has no place for what a tool returns"),
    "truncation": refuse("prompts are never shortened", "disabled"),
    "user": IDENTIFIER,
}

MESSAGES: Mapping[str, Rule] = {
    "betas": ignore("there are no beta features here", []),
    "billing_policy": ignore("nothing is billed here"),
    "cache_control": BREAKPOINT,
    "compaction": refuse("conversations are never shortened"),
    "container": refuse("there are no containers here"),
    "diagnostics": ignore("there are no request diagnostics here", {}),
    "fallback_credit_token": ignore("nothing is billed here"),
    "fallbacks": ignore("there is one model", []),
    "inference_geo": ignore("requests are answered on this machine"),
    "mcp_servers": refuse("there are no server-side tools here", []),
    "messages[].content[].cache_control": BREAKPOINT,
    "messages[].content[].caller": CALLER,
    "messages[].content[].citations": NO_CITATIONS,
    "messages[].content[].content[].cache_control": BREAKPOINT,
    "messages[].content[].content[].citations": NO_CITATIONS,
    "messages[].content[].toolset_name": ignore("there are no toolsets here"),
    "metadata": IDENTIFIER,
    "output_config.task_budget": ignore("the model cannot be held to a budget; use max_tokens"),
    "service_tier": TIER,
    "speed": ONE_TIER_SPEED,
    "system[].cache_control": BREAKPOINT,
    "system[].citations": NO_CITATIONS,
    "thread": refuse("nothing is stored here; send the whole conversation in `messages`"),
    "thinking.block_binding": ignore("thinking blocks are not checked here", {}),
    "tools[].allowed_callers": CALLED_BY_MODEL,
    "tools[].cache_control": BREAKPOINT,
    "tools[].eager_input_streaming": ignore("arguments are always streamed as they are written", True, False),
    "tools[].input_examples": ignore("the chat format has no place for examples; describe them", []),
    "user_profile_id": IDENTIFIER,
    "workspace_id": ignore("there is one workspace"),
}

# endpoint → field path → rule. The names are those that `wire.decode` takes.
FIELDS: Mapping[str, Mapping[str, Rule]] = {
    "chat": CHAT,
    "completions": COMPLETIONS,
    "tokenize": TOKENIZE,
    "detokenize": DETOKENIZE,
    "responses": RESPONSES,
    "messages": MESSAGES,
}

# Values of `type` and `role` that an API defines and this server refuses, with what to tell the caller.
_TEXT_ONLY = "the model is text only"
_NO_SERVER_TOOLS = "only function tools are supported; nothing runs on the server"
REFUSED_VALUES: Mapping[str, str] = {
    f"'{value}'": why
    for why, values in {
        _TEXT_ONLY: "image image_url input_audio input_image input_file document file audio video_url",
        _NO_SERVER_TOOLS: "custom web_search web_search_preview file_search code_interpreter computer_use_preview "
        "mcp image_generation local_shell shell apply_patch",
        "use role tool and `tool_call_id`": "function",
        "put the text into a text part": "refusal",
    }.items()
    for value in values.split()
}
