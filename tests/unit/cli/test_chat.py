"""The terminal chat: with a terminal (a pseudo one), and with text piped in."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from freehold.cli.chat import Piece, _Answer

COMMAND = [sys.executable, "-m", "freehold.cli.main", "chat"]


class Terminal:
    """A process on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "", "COLUMNS": "200"}
            del environment["NO_COLOR"]
            os.execve(sys.executable, [*COMMAND, *arguments], environment)
        self.text = ""
        self.status: int | None = None

    def read_until(self, pattern: str, seconds: float = 30.0) -> str:
        """What comes up to a match, which is taken out of `text`."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.text)) is None:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} within {seconds} s in {self.text!r}"
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # how Linux says that the other side has closed
                data = b""
            assert data, f"ended without {pattern!r}: {self.text!r}"
            self.text += data.decode("utf-8", errors="replace")
        before, self.text = self.text[: match.end()], self.text[match.end() :]
        return before

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def exit_code(self) -> int:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
                return os.waitstatus_to_exitcode(status)
            if select.select([self._fd], [], [], 0.05)[0]:
                try:
                    os.read(self._fd, 65536)
                except OSError:
                    time.sleep(0.02)
        raise AssertionError("it does not end")

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal("--sim")
    yield opened
    opened.close()


def test_a_conversation_on_a_terminal(terminal: Terminal) -> None:
    terminal.read_until(r"Ctrl-D leaves\.")
    terminal.read_until("> ")
    terminal.send("[[sim slow seconds=0.01]] Hello\n")
    shown = terminal.read_until(r"tokens/s[^\n]*\n")
    assert "\x1b[2mT" in shown.replace("\x1b[2mh", "\x1b[2mT")  # thinking is dim
    assert "You said: Hello" in shown
    assert re.search(r"\d+ tokens \(\d+ thinking\) · [\d.,]+ tokens/s · first after \d+\.\d\d s · prompt \d+", shown)
    terminal.read_until("> ")
    terminal.send("/effort off\n")
    terminal.read_until("effort: off")
    terminal.read_until("> ")
    terminal.send("Again\n")
    shown = terminal.read_until(r"first after[^\n]*\n")  # so quick an answer has no rate
    assert "thinking" not in shown
    assert "You said: Again" in shown
    terminal.read_until("> ")
    terminal.send("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(terminal: Terminal) -> None:
    terminal.read_until("> ")
    terminal.send("[[sim slow seconds=0.02]] [[sim words=4000]]\n")
    terminal.read_until("T")
    time.sleep(0.3)
    terminal.send("\x03")
    terminal.read_until(r"\(stopped\)")
    terminal.read_until("> ")
    terminal.send("\x03")
    terminal.read_until(r"\(Ctrl-D leaves\)")
    terminal.send("Still there?\n")
    terminal.read_until(r"You said: Still there\?")
    terminal.read_until("> ")
    terminal.send("/quit\n")
    assert terminal.exit_code() == 0


def test_an_error_is_one_line_and_the_chat_goes_on(terminal: Terminal) -> None:
    terminal.read_until("> ")
    terminal.send("[[sim error after=4]]\n")
    terminal.read_until("error: simulated failure")
    terminal.read_until("> ")
    terminal.send("/effort enormous\n")
    terminal.read_until("> ")
    terminal.send("x\n")
    assert "Traceback" not in terminal.read_until("error: [^\n]*enormous")
    terminal.read_until("> ")
    terminal.send("/effort\nx\n")
    terminal.read_until("You said: x")


def piped(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)


def test_piped_text_is_a_conversation() -> None:
    result = piped("Hello [red]:smile:\n\n/system Be brief.\nBye\n", "--sim", "--effort", "off")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "You said: Hello [red]:smile:",
        "a new conversation, with that system message",
        "You said: Bye",
    ]


def test_piped_errors_end_it_with_their_exit_code() -> None:
    result = piped("[[sim error]]\nnever asked\n", "--sim")
    assert result.returncode == 7
    assert result.stderr.startswith("error: simulated failure")
    assert "never asked" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sim"),
        (["x", "--sim"], "--sim"),
        (["x", "--model", "m"], "--model is for a URL"),
        (["http://127.0.0.1:9"], "cannot reach"),
        (["/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_opened_is_one_line(arguments: list[str], message: str) -> None:
    result = piped("", *arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    result = piped("a\x1b[31mred\x07\x9b\n", "--sim", "--effort", "off")
    assert "\x1b" not in result.stdout
    assert "a␛[31mred␇\ufffd" in result.stdout


def test_the_summary_leaves_out_what_is_not_known() -> None:
    written: list[tuple[str, bool]] = []
    answer = _Answer(lambda text, dim: written.append((text, dim)), started=10.0)
    assert answer.summary() == ""
    answer.add(Piece(reasoning="hm"))
    answer.add(Piece(content="yes"))
    assert written == [("hm", True), ("\n\n", False), ("yes", False)]
    answer.first, answer.last = 10.5, 12.5
    answer.add(
        Piece(usage={"completion_tokens": 21, "prompt_tokens": 1000, "cached_tokens": 900}, finish_reason="length")
    )
    assert answer.summary() == (
        "21 tokens · 10.0 tokens/s · first after 0.50 s · prompt 1,000 (900 cached) · cut off at the token limit"
    )


def test_input_in_another_encoding_is_said_to_be() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*COMMAND, "--sim"], input=b"caf\xe9\n", capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert b"the input is not all utf-8 text: byte 0xe9" in done.stderr
