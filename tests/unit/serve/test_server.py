"""Before the first request: keys, the socket, and what may not be served."""

from __future__ import annotations

from pathlib import Path

import pytest

from freehold.errors import ConfigError, InvalidRequest
from freehold.serve.server import API_KEY_VARIABLE, base_url, open_socket, read_api_keys
from freehold.serve.state import SamplingDefaults


@pytest.fixture(autouse=True)
def no_key_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


def test_keys_come_from_the_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha  # ann\n\nbeta\nalpha\n")
    assert read_api_keys(file) == ("alpha", "beta")
    monkeypatch.setenv(API_KEY_VARIABLE, "gamma")
    assert read_api_keys(file) == ("gamma", "alpha", "beta")
    assert read_api_keys(None) == ("gamma",)


def test_no_key_is_no_keys() -> None:
    assert read_api_keys(None) == ()


@pytest.mark.parametrize("text", ["", "# nothing\n", "a b\n", "schlüssel\n"])
def test_a_key_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequest):
        read_api_keys(file)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        read_api_keys(tmp_path / "nowhere")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    sock, loopback = open_socket(host, 0, has_keys=False)
    with sock:
        assert loopback
        assert base_url(sock).startswith("http://")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_another_address_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(InvalidRequest, match=API_KEY_VARIABLE):
        open_socket(host, 0, has_keys=False)


def test_another_address_with_a_key_is_served() -> None:
    sock, loopback = open_socket("0.0.0.0", 0, has_keys=True)
    with sock:
        assert not loopback


def test_a_port_in_use_is_said_so() -> None:
    taken, _ = open_socket("127.0.0.1", 0, has_keys=False)
    with taken:
        taken.listen()
        with pytest.raises(InvalidRequest, match="--port"):
            open_socket("127.0.0.1", taken.getsockname()[1], has_keys=False)


def test_an_unknown_host_is_said_so() -> None:
    with pytest.raises(InvalidRequest, match="--host"):
        open_socket("no.such.host.invalid", 0, has_keys=True)


def test_sampling_defaults_are_the_checkpoints(tmp_path: Path) -> None:
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text('{"temperature": 1.0, "top_p": 0.95, "eos_token_id": [5]}')
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults(top_p=0.95)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "top_p": 0.9}')
    assert SamplingDefaults.from_dir(tmp_path).temperature == 0


@pytest.mark.parametrize("text", ['{"typical_p": 0.5}', '{"top_p": "x"}', "[]", "{", '{"top_p": 1, "num_beams": 4}'])
def test_a_generation_config_that_is_not_honoured_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="generation_config"):
        SamplingDefaults.from_dir(tmp_path)
