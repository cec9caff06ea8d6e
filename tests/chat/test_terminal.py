"""What is typed does what it says, and what a model says is shown and not obeyed."""

import io
import shlex
import sys
from types import SimpleNamespace

import pytest

from sat_lora.chat import Chat
from sat_lora.chat.terminal import Conversation, converse, dropped_image, typed_lines, typed_path
from sat_lora.cogvlm import load_cogvlm

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def loaded_chat(base, adapters):
    return Chat(load_cogvlm(base), adapters=adapters, version="chat", max_new_tokens=8)


@pytest.fixture
def chat(loaded_chat):
    loaded_chat.reset()
    loaded_chat.use("mine")
    return loaded_chat


def said(chat: Chat, *lines: str) -> list[str]:
    """What the conversation writes after its greeting of two lines."""
    out = io.StringIO()
    converse(Conversation(chat, out), lines)
    return out.getvalue().splitlines()[2:]


def test_answers_stand_in_the_order_of_the_questions(chat, picture):
    answers = said(chat, str(picture), "12", "34", "", "/reset", "12")
    assert answers[0] == f"about {picture}" and answers[3] == "forgotten, the picture stays"
    assert answers[1] == answers[4] and len(answers) == 5
    assert [turn.query for turn in chat.turns] == ["12"]


def test_commands(chat, tmp_path):
    file = tmp_path / "conversation.json"
    lines = said(chat, "/adapter other", "/adapter", "/base", "/set max_new_tokens 3", "/set seed=4", f"/save {file}")
    assert lines == [
        "other answers (there are also: base, mine)",
        "other answers (there are also: base, mine)",
        "base answers (there are also: mine, other)",
        "max_new_tokens 3",
        "seed 4",
        f"0 turns in {file}",
    ]
    assert said(chat, "/quit", "12") == [] and said(chat, "/exit", "12") == [] and not chat.turns
    assert [line.partition(":")[0] for line in said(chat, "/compare 12")] == ["base", "mine", "other"]
    chat.sampling, chat.max_new_tokens = Chat.__init__.__kwdefaults__["sampling"], 8


@pytest.mark.parametrize(
    "line, message",
    [
        ("/imge x", "there is no command /imge; did you mean /image?"),
        ("/", "there is no command /; /help lists them"),
        ("/image", "/image: which? give a file"),
        ("/image nowhere.png", "nowhere.png: cannot be read as an image"),
        ("/adapter nobody", "there is no adapter 'nobody'"),
        ("/set heat 3", "/set: got 'heat', wanted one of temperature"),
        ("/set temperature hot", "/set temperature: got 'hot', wanted a number"),
        ("/set seed 99999999999999999999999", "seed: wanted a whole number of 64 bits"),
        ("/set top_p 0.5", "top_p and top_k: temperature 0 draws nothing"),
        ("/set max_new_tokens 0", "/set max_new_tokens: got 0, wanted at least 1"),
        ("/save", "/save: give a file"),
        ("/save /", "/save: / exists; give a new file"),
        ("/save /proc/none/x", "/save: /proc/none/x"),
        ("/compare", "/compare: give a question"),
        ("x" * 5000, "the question takes"),
    ],
)
def test_a_mistake_is_said_and_ends_nothing(chat, line, message):
    wrong, answer = said(chat, line, "12")
    assert wrong.startswith(f"error: {message}") and answer


def test_what_a_model_says_is_shown_and_not_obeyed(chat, monkeypatch):
    pieces = ["red \x1b[31m", "bell \x07\r", "two\nlines"]
    monkeypatch.setattr(Chat, "stream", lambda self, query: (piece for piece in pieces))
    assert said(chat, "12") == ["red \\x1b[31mbell \\x07\\rtwo", "lines"]


def test_ctrl_c_stops_the_answer_alone(chat, monkeypatch):
    def interrupted(self, query):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "stream", interrupted)
    assert said(chat, "12", "/base") == ["half", "stopped", "base answers (there are also: mine, other)"]
    with pytest.raises(KeyboardInterrupt):
        converse(Conversation(chat, io.StringIO(), is_alone=False), ["12"])


def test_paths_as_they_are_typed_pasted_and_dragged(picture, tmp_path, monkeypatch):
    odd = tmp_path / "it's 50% [1] ümlaut.jpg"
    odd.write_bytes(picture.read_bytes())
    escaped = "".join(f"\\{c}" if not c.isalnum() and c not in "/._-%" else c for c in str(odd))
    for text in (
        str(odd),
        shlex.quote(str(odd)),
        f'"{odd}"',
        escaped,
        odd.as_uri(),
        f"'{odd.as_uri().replace(chr(39), '%27')}'",
    ):
        assert typed_path(text) == odd and dropped_image(text) == odd, text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed_path("~/x.png") == tmp_path / "x.png"
    for text in (
        "what is cat.png?",
        "cat.png",
        "it's",
        "/image",
        "~nobody/x.png",
        "\0.png",
        "x" * 5000 + ".png",
        str(tmp_path),
    ):
        assert dropped_image(text) is None


class Terminal(io.StringIO):
    """Input or output that says that it is a terminal."""

    def isatty(self):
        return True


CTRL_D = "\x04"


@pytest.fixture
def keys(monkeypatch):
    """A function that types keys into prompt_toolkit, for a terminal that shows nothing."""
    application = pytest.importorskip("prompt_toolkit.application", reason="pip install 'sat_lora[chat]'")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe, application.create_app_session(input=pipe, output=DummyOutput()):

        def typed(text: str) -> None:
            monkeypatch.setattr(sys, "stdin", Terminal())  # not before the test, of which pytest captures the output
            monkeypatch.setattr(sys, "stdout", Terminal())
            pipe.send_text(text)

        yield typed


@pytest.fixture
def sessions(monkeypatch):
    """The sessions of prompt_toolkit that are made, with what they asked as `asked`."""
    toolkit = pytest.importorskip("prompt_toolkit", reason="pip install 'sat_lora[chat]'")
    made = []

    class Session(toolkit.PromptSession):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.asked = []
            made.append(self)

        def prompt(self, message):
            self.asked.append(message)
            return super().prompt(message)

    monkeypatch.setattr(toolkit, "PromptSession", Session)
    return made


def test_lines_are_typed_with_history_and_completion_of_commands(keys, sessions):
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    keys("what is tha\x7fis?\r" + "/base\r" + "gr\u00f6\u00dfe \u6587\r" + "\r" + CTRL_D)
    lines = [*typed_lines(SimpleNamespace(speaker="mine"))]
    assert lines == ["what is this?", "/base", "gr\u00f6\u00dfe \u6587", ""]
    (session,) = sessions
    assert session.history.get_strings() == lines[:3]
    for begun, expected in (("/comp", ["/compare"]), ("/re", ["/reset"]), ("what", []), ("a /comp", [])):
        completions = session.completer.get_completions(Document(begun), CompleteEvent(completion_requested=True))
        assert [completion.text for completion in completions] == expected


def test_what_is_typed_is_a_conversation(chat, keys, sessions):
    """Who answers stands before the next line, and /quit ends it before what is typed after it."""
    keys("/base\r12\r/quit\r34\r" + CTRL_D)
    out = io.StringIO()
    converse(Conversation(chat, out), typed_lines(chat))
    assert sessions[0].asked == ["mine> ", "base> ", "base> "]
    assert [(turn.query, turn.speaker) for turn in chat.turns] == [("12", "base")] and "base answers" in out.getvalue()


def test_ctrl_c_at_the_prompt_is_for_whoever_started_it(keys):
    keys("half\x03")
    with pytest.raises(KeyboardInterrupt):
        next(typed_lines(SimpleNamespace(speaker="mine")))


def test_without_prompt_toolkit_lines_are_read_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys, "stdin", Terminal("12\n/quit\n"))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert [*typed_lines(SimpleNamespace(speaker="mi\x1bne"))] == ["12", "/quit"]
    assert sys.stdout.getvalue() == "mi\\x1bne> " * 3 + "\n"


def test_lines_of_a_file_come_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("12\n34"))
    assert [*typed_lines(SimpleNamespace(speaker="mine"))] == ["12\n", "34"]
