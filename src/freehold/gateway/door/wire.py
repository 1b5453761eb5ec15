"""How a request of one API is put to an upstream: as it is where the upstream speaks that API, else translated.

A `Wire` is one way to do so; `wire_for` chooses. Chat and Messages translate into each other; nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from freehold.errors import FreeholdError, InvalidRequest, UpstreamFailed
from freehold.gateway.call import Endpoint, Request, Target
from freehold.gateway.door.outgoing import CONTINUOUS, PATHS, body_for
from freehold.gateway.door.reply import error_body
from freehold.gateway.door.translate.as_chat import AsChatStream, whole_as_chat
from freehold.gateway.door.translate.as_message import AsMessageStream, whole_as_message
from freehold.gateway.door.translate.to_chat import request_to_chat
from freehold.gateway.door.translate.to_messages import request_to_messages
from freehold.gateway.door.translate.words import decode, encode, message_of_error

DEFAULT_LIMIT: Final = 8192  # output tokens of a chat whose client names no limit: Messages wants one


class StreamTranslator(Protocol):
    def feed(self, events: bytes) -> bytes:
        """Whole events of the upstream's API to whole events of the client's; b"" if there is nothing to say yet."""

    def end(self) -> bytes:
        """What is still to be said when the upstream's stream has ended."""


class Wire(Protocol):
    @property
    def endpoint(self) -> Endpoint:
        """Of the upstream."""

    @property
    def path(self) -> str: ...

    @property
    def default_limit(self) -> int | None:
        """Output tokens of a request for which nobody names a limit, where the upstream's API wants one."""

    def body(
        self, request: Request, target: Target, limit: int | None, engine: str, *, continuous: bool = False
    ) -> bytes:
        """continuous: whether every chunk shall have the usage so far. Raises InvalidRequest: it cannot be said in the
        upstream's API."""

    def whole(self, body: bytes) -> bytes:
        """An answer in the client's API. Raises ValueError."""

    def error(self, body: bytes, status: int) -> bytes:
        """An error in the client's API."""

    def stream(self, request: Request) -> StreamTranslator | None:
        """None: as it comes."""


class Same:
    """The upstream speaks the client's API: bytes go through."""

    default_limit: int | None = None

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.path = PATHS[endpoint]

    def body(
        self, request: Request, target: Target, limit: int | None, engine: str, *, continuous: bool = False
    ) -> bytes:
        return body_for(request, target.model_id, target.effort, limit, engine, continuous=continuous)

    def whole(self, body: bytes) -> bytes:
        return body

    def error(self, body: bytes, status: int) -> bytes:
        return body

    def stream(self, request: Request) -> StreamTranslator | None:
        return None


class ChatOverMessages:
    """The client speaks chat completions, the upstream Messages."""

    endpoint: Endpoint = "messages"
    path = PATHS["messages"]
    default_limit: int | None = DEFAULT_LIMIT

    def body(
        self, request: Request, target: Target, limit: int | None, engine: str, *, continuous: bool = False
    ) -> bytes:
        effort = target.effort
        return encode(request_to_messages(decode(request.body), target.model_id, limit or DEFAULT_LIMIT, effort))

    def whole(self, body: bytes) -> bytes:
        return _as_value_error(whole_as_chat, body)

    def error(self, body: bytes, status: int) -> bytes:
        return error_body(_told(body, status), "chat")

    def stream(self, request: Request) -> StreamTranslator | None:
        return _Strict(AsChatStream(include_usage=request.include_usage))


class MessagesOverChat:
    """The client speaks Messages, the upstream chat completions."""

    endpoint: Endpoint = "chat"
    path = PATHS["chat"]
    default_limit: int | None = None

    def body(
        self, request: Request, target: Target, limit: int | None, engine: str, *, continuous: bool = False
    ) -> bytes:
        said = request_to_chat(decode(request.body), target.model_id, limit, target.effort, engine)
        if continuous and request.stream:
            said["stream_options"] = {**said.get("stream_options", {}), "include_usage": True, CONTINUOUS: True}
        return encode(said)

    def whole(self, body: bytes) -> bytes:
        return _as_value_error(whole_as_message, body)

    def error(self, body: bytes, status: int) -> bytes:
        return error_body(_told(body, status), "messages")

    def stream(self, request: Request) -> StreamTranslator | None:
        return _Strict(AsMessageStream())


class _Strict:
    """A translator that says ValueError of whatever it cannot make sense of."""

    def __init__(self, translator: StreamTranslator) -> None:
        self._translator = translator

    def feed(self, events: bytes) -> bytes:
        return _as_value_error(self._translator.feed, events)

    def end(self) -> bytes:
        return self._translator.end()


def _as_value_error(tell: Callable[[bytes], bytes], data: bytes) -> bytes:
    """JSON of another shape than the API's comes up as one of these, deep in the translation."""
    try:
        return tell(data)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not an answer of this API: {type(error).__name__} {error}") from None


def _told(body: bytes, status: int) -> FreeholdError:
    words = message_of_error(body, status)
    return InvalidRequest(words) if status < 500 else UpstreamFailed(words)


_SAME: dict[Endpoint, Wire] = {endpoint: Same(endpoint) for endpoint in PATHS}
_CHAT_OVER_MESSAGES: Wire = ChatOverMessages()
_MESSAGES_OVER_CHAT: Wire = MessagesOverChat()


def wire_for(endpoint: Endpoint, speaks: Sequence[Endpoint]) -> Wire | None:
    """None: there is no way to put it."""
    if endpoint in speaks:
        return _SAME[endpoint]
    if endpoint == "chat" and "messages" in speaks:
        return _CHAT_OVER_MESSAGES
    if endpoint == "messages" and "chat" in speaks:
        return _MESSAGES_OVER_CHAT
    return None
