"""What is typed does what it says, and what a model says is shown and not obeyed."""

import io
import shlex

import pytest

from sat_lora.chat import Chat
from sat_lora.chat.terminal import Conversation, converse, dropped_image, typed_path
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
