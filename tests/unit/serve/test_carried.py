"""Text in opaque fields: what goes in comes out, and nothing else does."""

from __future__ import annotations

import pytest

from freehold.errors import InvalidRequest
from freehold.serve.carried import PREFIX, pack, unpack


@pytest.mark.parametrize("opaque", [PREFIX, PREFIX + "!!!!", PREFIX + "AAAA", pack("some text")[:-5]])
def test_altered_opaque_text_is_refused(opaque: str) -> None:
    with pytest.raises(InvalidRequest, match="altered") as caught:
        unpack(opaque, param="p")
    assert caught.value.param == "p"


def test_opaque_text_of_others_is_not_read() -> None:
    assert unpack("EqQBCgIYAhIM", param="p") is None


@pytest.mark.parametrize("text", ["", "a", "思考 " * 5000, "\ud83d\ude00 \u0000"])
def test_what_is_packed_is_unpacked(text: str) -> None:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    assert unpack(pack(text), param="p") == text
    assert pack(text).isascii()


def test_a_bomb_in_opaque_text_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="altered"):
        unpack(pack("a" * (17 * 2**20)), param="p")
