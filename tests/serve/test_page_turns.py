"""The page's conversation: what is asked, what is kept in the browser and what is shown of it."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from sat_lora.errors import DataError
from sat_lora.serve.page_turns import KEPT_DRAWINGS, PageTurn, PageTurns, Reply, digest_of, drawing_of, request_of
from sat_lora.serve.questions import MOST_MESSAGES, RequestError, read_question


def png(size=(40, 20), color="white") -> str:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def turns(count: int) -> list[PageTurn]:
    return [PageTurn(f"q{n}", [Reply("base", f"b{n}"), Reply("mine", f"m{n}")]) for n in range(count)]


def test_a_request_has_the_picture_first_and_the_turns_of_who_is_asked():
    request = request_of(turns(2), "and?", "mine", png(), 0.5)
    question = read_question(request, speakers=["mine", "base"], keeps_history=True)
    assert question.turns == (("q0", "m0"), ("q1", "m1")) and question.query == "and?"
    assert question.image == base64.b64decode(png().partition(",")[2])
    assert (question.speaker, question.sampling.temperature, question.streams) == ("mine", 0.5, False)
    other = request_of(turns(1), "and?", "other", "", 0)
    assert read_question(other, speakers=["other"], keeps_history=True).turns == (("q0", "b0"),)


def test_the_oldest_turns_are_left_out_where_they_are_too_many():
    request = request_of(turns(500), "and?", "mine", png(), 0)
    question = read_question(request, speakers=["mine"], keeps_history=True)
    assert len(request["messages"]) < MOST_MESSAGES and question.turns[-1] == ("q499", "m499") and question.image


def test_what_the_browser_keeps_comes_back():
    conversation = PageTurns(digest_of(png()), turns(2))
    conversation.turns[0].replies[0] = Reply("base", "b", "data:image/jpeg;base64,AA==")
    kept = json.loads(json.dumps(conversation.as_value()))
    assert PageTurns.read(kept) == conversation
    assert PageTurns.read(None) == PageTurns.read({}) == PageTurns.read("") == PageTurns()


def test_turns_that_failed_and_pictures_of_long_ago_are_not_kept():
    conversation = PageTurns("", turns(KEPT_DRAWINGS + 2))
    for turn in conversation.turns:
        turn.replies[0] = Reply("base", "b", "data:image/jpeg;base64,AA==")
    conversation.turns[-1].error = "no"
    kept = PageTurns.read(conversation.as_value())
    drawn = [bool(turn.replies[0].drawing) for turn in kept.turns]
    assert drawn == [False] + [True] * KEPT_DRAWINGS


@pytest.mark.parametrize(
    "value",
    [3, "x", [], [1], {"turns": []}, {"picture": "", "turns": 3}, {"picture": 3, "turns": []},
     {"picture": "", "turns": [["q"]]}, {"picture": "", "turns": [["q", []]]},
     {"picture": "", "turns": [["q", [["a"]]]]},
     {"picture": "", "turns": [[3, [["a", "b", ""]]]]}, {"picture": "", "turns": [["q", [["a", None, ""]]]]},
     {"picture": "", "turns": [["q", [["a", "b", "", "d"]]]]}, {"picture": "", "turns": {"a": "b"}}],
)  # fmt: skip
def test_what_is_no_conversation(value):
    if value == []:
        assert PageTurns.read(value) == PageTurns()
        return
    with pytest.raises(RequestError, match="the conversation is none of this page"):
        PageTurns.read(value)


BAD = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "${alert(1)}", "`x`", "{{constructor}}",
       "![x](http://evil.example/y.png)", "' onclick='x", "</p></div>"]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_every_text_is_shown_as_text(text):
    """Tags and attributes are those of the page, whatever is said and by whomever."""
    page = PageTurns("", [PageTurn(text, [Reply(text, text, text)], text)]).as_html()
    plain = PageTurns("", [PageTurn("x", [Reply("x", "x", "x")], "x")]).as_html()
    assert re.findall(r"<[^>]*?[\s>]", page) == re.findall(r"<[^>]*?[\s>]", plain)
    assert re.sub(r"\s\w[\w-]*=\"[^\"]*\"", "", page).count("<") == plain.count("<")


def test_boxes_are_drawn_on_a_picture_of_moderate_size():
    drawing = drawing_of(png((2000, 1000)), "a dog [[100,100,500,800]]", 10**7)
    image = Image.open(io.BytesIO(base64.b64decode(drawing.partition(",")[2])))
    assert drawing.startswith("data:image/jpeg;base64,") and image.size == (768, 384)
    red, green, blue = image.getpixel((round(0.1 * 768) + 1, 200))
    assert red > 180 and green < 120 and blue < 150 and min(image.getpixel((20, 20))) > 240


def test_no_boxes_or_no_picture_is_no_drawing():
    assert drawing_of(png(), "no boxes", 10**6) == drawing_of("", "[[1,2,3,4]]", 10**6) == ""
    with pytest.raises(DataError, match="the image: cannot be read as an image: 40 x 20 pixels are more"):
        drawing_of(png(), "[[1,2,3,4]]", 500)
