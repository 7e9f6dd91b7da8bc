"""`headrace chat`: the conversation and its commands, reading, a model in the process, a server, Ctrl-C, a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from headrace.cli import main
from headrace.cli.answering import LocalModel, Server, TooLong
from headrace.cli.chatting import Chat
from headrace.cli.conversation import Conversation, Entry, Message, Reply, Turn, obey, read_entry
from headrace.core import HeadraceError, InputError, SamplingParams

PROGRAM = [sys.executable, "-m", "headrace", "chat"]


def talk_of(*pairs: tuple[str, str], system: str = "") -> Conversation:
    return Conversation(system, turns=[Turn(*pair) for pair in pairs])


def type_lines(*lines: str) -> Callable[[bool], str]:
    """What `read_entry` reads from, as if these lines were typed and then the input ended."""
    waiting = list(lines)

    def read_line(first: bool) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read_line


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        (["Hello there "], Entry("Hello there", False)),
        (["one\\", "two\\", "three", "four"], Entry("one\ntwo\nthree", False)),
        (["one\\"], Entry("one", False)),
        (['"""', "  /a", "", "b\\", '"""', "next"], Entry("  /a\n\nb\\", False)),
        (['"""', "unfinished"], Entry("unfinished", False)),
        (["/help"], Entry("/help", True)),
        (["/system be\\", "brief"], Entry("/system be\nbrief", True)),
        (["//etc is a folder"], Entry("/etc is a folder", False)),
        ([""], Entry("", False)),
    ],
)
def test_entries(lines: list[str], entry: Entry) -> None:
    assert read_entry(type_lines(*lines)) == entry


def test_input_ends() -> None:
    with pytest.raises(EOFError):
        read_entry(type_lines())


def test_messages_are_in_order() -> None:
    talk = talk_of(("a", "b"), ("c", "d"), system="Be brief.")
    talk.turns.append(Turn("e"))
    said = [(each.role, each.content) for each in talk.messages()]
    assert said == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ]


def test_oldest_turns_are_left_out_until_the_open_one_is_alone() -> None:
    talk = talk_of(*((str(index), "x") for index in range(9)), system="s")
    talk.turns.append(Turn("open"))
    sizes = []
    while dropped := talk.forget():
        sizes.append(dropped)
    assert sum(sizes) == 9 and sizes[0] == 2
    assert [each.content for each in talk.messages()] == ["s", "open"]
    assert len(talk.messages(everything=True)) == 20


def test_undo_and_retry_go_back() -> None:
    talk = talk_of(("a", "b"), ("c", "d"))
    assert obey(talk, "/undo").text == "the last turn is taken back; 1 turn left"
    talk.params = SamplingParams(temperature=0.5)
    assert obey(talk, "/retry") == Reply(again=Turn("a", "b"))
    assert talk.turns == []
    for command in ("/undo", "/retry"):
        with pytest.raises(InputError, match="the conversation is empty"):
            obey(talk, command)


def test_going_back_behind_what_is_left_out_sends_the_turn_before() -> None:
    talk = talk_of(("a", "b"), ("c", "d"), ("e", "f"))
    talk.first = 2
    obey(talk, "/undo")
    assert [each.content for each in talk.messages()] == ["c", "d"]
    obey(talk, "/undo")
    obey(talk, "/undo")
    assert (talk.turns, talk.first, talk.messages()) == ([], 0, [])


def test_system_prompt_and_clear() -> None:
    talk = talk_of(("a", "b"))
    obey(talk, "/system Be brief.")
    obey(talk, "/clear")
    assert talk.messages() == [Message("system", "Be brief.")]
    obey(talk, "/system")
    assert talk.messages() == []


def test_settings_change() -> None:
    talk = Conversation()
    assert obey(talk, "/set temperature 0.7").text == "temperature 0.7, top_p 1, max_tokens 256"
    obey(talk, "/set max_tokens 9")
    assert (talk.params.temperature, talk.params.max_tokens) == (0.7, 9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature warm", "temperature must be a number, got 'warm'"),
        ("/set temperature -1", "temperature must be a number from 0 to 100, got -1.0"),
        ("/set max_tokens 1.5", "max_tokens must be a whole number, got '1.5'"),
        ("/set top_k 3", "there is no setting 'top_k'; there are temperature, top_p, max_tokens"),
        ("/set temperature", "/set needs a name and a value"),
        ("/unod", r"there is no command /unod; did you mean /undo\?"),
        ("/zzz", "there is no command /zzz; /help lists the commands"),
        ("/save", "/save needs a file"),
        ("/load none.json", "none.json cannot be read: No such file"),
        ("/save none/talk.json", "none/talk.json cannot be written: No such file"),
    ],
)
def test_wrong_commands_change_nothing(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    talk = talk_of(("a", "b"))
    with pytest.raises(InputError, match=message):
        obey(talk, line)
    assert talk == talk_of(("a", "b"))


def test_help_names_every_command_and_quit_leaves() -> None:
    text = obey(Conversation(), "/help").text
    assert re.findall(r"^/(\w+)", text, re.MULTILINE) == [
        "system",
        "save",
        "load",
        "clear",
        "retry",
        "undo",
        "set",
        "help",
        "quit",
    ]
    assert obey(Conversation(), "/quit").leave


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    talk = talk_of(('a\n"b"', "ä"), ("c", ""), system="s")
    talk.params = SamplingParams(temperature=0.5, max_tokens=7)
    talk.first = 1
    path = tmp_path / "with space.json"
    obey(talk, f"/save {path}")
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "s"}
    other = talk_of(("x", "y"))
    assert obey(other, f"/load {path}").text == f"2 turns loaded from {path}"
    assert (other.system, other.turns, other.first) == (talk.system, talk.turns, 0)
    assert other.params == talk.params


def test_markdown_is_for_reading(tmp_path: Path) -> None:
    obey(talk_of(("Why?", "Because."), system="s"), f"/save {tmp_path}/talk.md")
    text = (tmp_path / "talk.md").read_text()
    assert text == "# Conversation\n\n## System\n\ns\n\n## You\n\nWhy?\n\n## Model\n\nBecause.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a conversation that /save has written"),
        ('{"messages": [{"role": "user", "content": 1}]}', "Expected `str`, got `int`"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must follow each other"),
        ('{"messages": [], "settings": {"temperature": -1}}', "temperature must be"),
        ('{"messages": [], "settings": {"max_tokens": 1.5}}', "max_tokens must be a whole number, got 1.5"),
        ('{"messages": [], "settings": {"seed": 1}}', "there is no setting 'seed'"),
    ],
)
def test_files_that_are_no_conversation_change_nothing(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(text)
    talk = talk_of(("a", "b"))
    with pytest.raises(InputError, match=re.escape(message)):
        obey(talk, f"/load {tmp_path}/talk.json")
    assert talk == talk_of(("a", "b"))


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LocalModel]:
    model = LocalModel(str(tiny_model))
    yield model
    model.close()


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


def ask_plainly(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_model_here_answers_as_llm_does(local: LocalModel) -> None:
    params = SamplingParams(max_tokens=20)
    pieces = list(local.stream(ask("What turns?"), params))
    (whole,) = local.llm.chat([{"role": "user", "content": "What turns?"}], params, progress=False)
    assert "".join(pieces) == whole.outputs[0].text
    assert len(pieces) > 1
    assert (local.tokens, local.cut) == (20, True)


def test_interrupt_stops_an_answer_and_the_next_one_is_whole(local: LocalModel) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    whole = "".join(local.stream(ask("What turns?"), params))
    pieces: list[str] = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for piece in local.stream(ask("What turns?"), params):
            pieces.append(piece)
            signal.raise_signal(signal.SIGINT)
    assert (local.tokens, local.cut) == (1, False)
    assert len(pieces) == 1 and whole.startswith(pieces[0])
    assert signal.getsignal(signal.SIGINT) is handler
    assert "".join(local.stream(ask("What turns?"), params)) == whole


class Interrupter:
    """Presses Ctrl-C once a step has ended."""

    def hear(self, name: str, start: float, end: float) -> None:
        if name == "sampling":
            signal.raise_signal(signal.SIGINT)


def test_interrupt_in_a_step_that_adds_no_text_is_heard(local: LocalModel) -> None:
    (whole,) = local.llm.chat([*ask_plainly("What turns?")], SamplingParams(max_tokens=1), progress=False)
    params = SamplingParams(max_tokens=9, stop_token_ids=tuple(whole.outputs[0].token_ids))
    assert list(local.stream(ask("What turns?"), params)) == []
    watch = local.llm.engine.meter.watch
    watch.listener = Interrupter()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(local.stream(ask("What turns?"), params))
    finally:
        watch.listener = None
    assert (local.tokens, local.cut) == (1, False)


def test_an_answer_that_ends_with_its_last_token_is_not_cut(local: LocalModel) -> None:
    (whole,) = local.llm.chat([*ask_plainly("What turns?")], SamplingParams(max_tokens=5), progress=False)
    last = whole.outputs[0].token_ids[-1]
    length = whole.outputs[0].token_ids.index(last) + 1
    list(local.stream(ask("What turns?"), SamplingParams(max_tokens=length)))
    assert (local.tokens, local.cut) == (length, True)
    list(local.stream(ask("What turns?"), SamplingParams(max_tokens=length, stop_token_ids=(last,))))
    assert (local.tokens, local.cut) == (length, False)


def test_history_leaves_room_for_an_answer(local: LocalModel) -> None:
    params = SamplingParams(max_tokens=600)
    long = "\u00e9" * 400
    assert len(list(local.stream(ask(long), SamplingParams(max_tokens=2)))) > 0
    with pytest.raises(TooLong, match="the context holds 1024"):
        list(local.stream([*ask("a"), Message("assistant", "b"), *ask(long)], params))


# What the server says to each of its possible questions: status, and lines of the body.
ANSWER = [
    'data: {"choices": [{"delta": {"role": "assistant"}}]}',
    "",
    ": a comment",
    'data: {"choices": [{"delta": {"content": "Hé"}}]}',
    'data: {"choices": [{"delta": {"content": "llo"}, "finish_reason": "stop"}]}',
    'data: {"choices": [], "usage": {"completion_tokens": 5}}',
    "data: [DONE]",
]


class Script(ThreadingHTTPServer):
    """A server that answers chats by fixed lines, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.lines: Sequence[str] = ANSWER
        self.longest = 99
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Script

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self.send(200 if self.path == "/v1/models" else 404, ['{"data": [{"id": "first"}, {"id": "second"}]}'])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        if len(body["messages"]) > self.server.longest:
            self.send(400, ['{"error": {"message": "too long by far", "code": "context_length_exceeded"}}'])
        else:
            self.send(self.server.status, self.server.lines)

    def send(self, status: int, lines: Sequence[str]) -> None:
        self.send_response(status)
        self.end_headers()
        for line in lines:
            if line == "wait":
                time.sleep(60)
            self.wfile.write(f"{line}\n".encode())
            self.wfile.flush()


@pytest.fixture
def script() -> Iterator[Script]:
    server = Script()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_server_streams(script: Script) -> None:
    server = Server(script.url + "/", None, "sesame")
    params = SamplingParams(temperature=0.5, max_tokens=9, seed=3)
    assert list(server.stream(ask("Hi"), params)) == ["Hé", "llo"]
    assert (server.name, server.tokens) == ("first", 5)
    assert script.asked == [
        {
            "model": "first",
            "messages": [{"role": "user", "content": "Hi"}],
            "temperature": 0.5,
            "top_p": 1.0,
            "max_tokens": 9,
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": 3,
        }
    ]
    assert script.keys == ["Bearer sesame"] * 2


@pytest.mark.parametrize(
    ("status", "lines", "message"),
    [
        (401, ['{"error": {"message": "no key"}}'], "refused: no key; give its key in a file with --key-file"),
        (503, ["busy"], "refused: HTTP 503 Service Unavailable"),
        (404, ["{}"], "refused: HTTP 404 Not Found; is the URL right?"),
        (200, ANSWER[:4], "broke off the answer"),
        (200, ["data: {"], "broke off the answer: "),
        (200, ['data: {"error": {"message": "out of memory"}}'], "ended the answer: out of memory"),
    ],
)
def test_server_fails_in_words(script: Script, status: int, lines: list[str], message: str) -> None:
    script.status, script.lines = status, lines
    with pytest.raises(HeadraceError, match=re.escape(message)) as caught:
        list(Server(script.url, "second", None).stream(ask("Hi"), SamplingParams()))
    assert script.url in str(caught.value)


def test_server_that_is_not_there() -> None:
    with pytest.raises(HeadraceError, match=r"cannot be reached: .*refused; is the server running"):
        Server("http://127.0.0.1:9/v1", None, None)
    with pytest.raises(InputError, match="--url must begin with http"):
        Server("file:///etc/passwd", None, None)


def run(*arguments: str, typed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], input=typed, capture_output=True, text=True, timeout=120)


def test_pipe_prints_answers_only(script: Script) -> None:
    result = run("--url", script.url, "--system", "Be brief.", typed="Hi\n/set temperature 0.5\nAnd\\\nnow?\n")
    assert (result.returncode, result.stdout) == (0, "Héllo\nHéllo\n")
    assert re.findall(r"^5 tokens, .* a second", result.stderr, re.MULTILINE)
    assert [each["content"] for each in script.asked[1]["messages"]] == ["Be brief.", "Hi", "Héllo", "And\nnow?"]
    assert script.asked[1]["temperature"] == 0.5


def test_pipe_with_a_model_here(tiny_model: Path) -> None:
    result = run("--model", str(tiny_model), "--max-tokens", "5", "--quiet", typed="What turns?\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


@pytest.mark.parametrize("language", ["C.UTF-8", "C"])
def test_pipe_of_bytes_that_are_no_text_is_refused(script: Script, language: str) -> None:
    # Under the second locale Python lets such bytes through, as surrogates.
    wrong = subprocess.run(
        [*PROGRAM, "--url", script.url],
        input=b"caf\xe9\n",
        capture_output=True,
        env=os.environ | {"LC_ALL": language, "PYTHONUTF8": ""},
        timeout=120,
    )
    assert (wrong.returncode, wrong.stdout, script.asked) == (2, b"", [])
    assert wrong.stderr == b"headrace: error: the input must be text in utf-8: it holds other bytes\n"


@pytest.mark.parametrize("left_out", [0, 1])
def test_retry_that_fails_leaves_the_turn_as_it_was(script: Script, left_out: int) -> None:
    talk = talk_of(("a", "b"), ("c", "d"), ("e", "f"))
    talk.first = left_out
    chat = Chat(talk, Server(script.url, None, None), plain=True, quiet=True)
    script.status, script.lines = 500, ['{"error": {"message": "it broke"}}']
    with pytest.raises(HeadraceError, match="it broke"):
        chat.follow(Entry("/retry", True))
    assert talk == Conversation(turns=[Turn("a", "b"), Turn("c", "d"), Turn("e", "f")], first=left_out)
    script.status, script.lines = 200, ANSWER
    chat.follow(Entry("/retry", True))
    assert talk.turns == [Turn("a", "b"), Turn("c", "d"), Turn("e", "Héllo")]


def test_pipe_ends_at_the_first_error(script: Script) -> None:
    script.status, script.lines = 500, ['{"error": {"message": "it broke"}}']
    result = run("--url", script.url, typed="Hi\nHi\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"headrace: error: {script.url} refused: it broke\n"


def test_oldest_turns_are_dropped_and_it_is_said_once(script: Script) -> None:
    script.longest = 5
    result = run("--url", script.url, "--quiet", typed="1\n2\n3\n4\n5\n")
    assert result.stdout == "Héllo\n" * 5
    assert result.stderr.count("no longer fits") == 1
    assert [each["content"] for each in script.asked[-1]["messages"]] == ["3", "Héllo", "4", "Héllo", "5"]


def test_answer_that_the_context_cuts_off_makes_room_for_the_next(script: Script) -> None:
    script.lines = [ANSWER[3], 'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}', "data: [DONE]"]
    result = run("--url", script.url, typed="1\n2\n3\n")
    assert result.stderr.count("cut off: the context is full") == 3
    assert [len(each["messages"]) for each in script.asked] == [1, 3, 3]


def test_question_that_never_fits_is_an_error(script: Script) -> None:
    script.longest = 0
    result = run("--url", script.url, typed="1\n")
    assert (result.returncode, result.stderr) == (1, "headrace: error: too long by far\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key-file", "key.txt"], "--key-file is for a server: name it with --url"),
        (["--url", "http://127.0.0.1:9/v1", "--key-file", "none.txt"], "none.txt: cannot read the key: No such file"),
        (["--temperature", "-1"], "temperature must be a number from 0 to 100"),
        (["--model", "./no-such-model"], "./no-such-model"),
    ],
)
def test_wrong_flags_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert message in printed.err


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process, self.end = pty.fork()
        if self.process == 0:
            # A test run in the background may have been told to ignore Ctrl-C, and its children would be.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(PROGRAM[0], [*PROGRAM, *arguments])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read on to the end of a text. Raises TimeoutError if for so long nothing more is printed."""
        while text not in self.seen:
            if not select.select([self.end], [], [], seconds)[0]:
                raise TimeoutError(f"{text!r} was not printed, but {self.seen!r}")
            self.seen += os.read(self.end, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def interrupt_until(self, text: str) -> None:
        """Press Ctrl-C until a text is printed: Python overlooks one between readline's prompt and its waiting."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(TimeoutError):
                return self.wait_for(text, 2)
        raise TimeoutError(f"{text!r} was not printed, but {self.seen!r}")

    def leave(self) -> int:
        """The exit code, once the command has ended by itself."""
        with contextlib.suppress(OSError):
            while os.read(self.end, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def terminal(script: Script) -> Iterator[Terminal]:
    """The command asking the script, on a terminal that hangs up in the end."""
    opened = Terminal("--url", script.url, "--plain")
    yield opened
    os.close(opened.end)


def test_terminal_stops_an_answer_by_control_c_and_goes_on(script: Script, terminal: Terminal) -> None:
    script.lines = [ANSWER[3], "wait"]
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.interrupt_until("> ")
    terminal.type("Hi\n")
    terminal.wait_for("Hé")
    terminal.interrupt_until("1 token, stopped")
    script.lines = ANSWER
    terminal.wait_for("> ")
    terminal.type("Again\n")
    terminal.wait_for("5 tokens")
    assert [each["content"] for each in script.asked[-1]["messages"]] == ["Hi", "Hé", "Again"]
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_terminal_goes_on_after_an_error_and_prints_no_escape_codes(script: Script, terminal: Terminal) -> None:
    script.lines = ['data: {"choices": [{"delta": {"content": "a\\u001b[31mb\\u009bc"}}]}', "data: [DONE]"]
    terminal.wait_for("> ")
    terminal.type("/nonsense\n")
    terminal.wait_for("headrace: error: there is no command /nonsense")
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for("a[31mbc")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.leave() == 0
