"""The page's conversation: requests are made of it, and it is shown as HTML.

The browser keeps it and sends it with every question, so that the server holds nothing of whoever has gone.
"""

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sat_lora.cogvlm.inputs.boxes import boxes_in, draw_boxes
from sat_lora.cogvlm.inputs.pictures import read_picture
from sat_lora.serve.questions import MOST_MESSAGES, RequestError

DRAWN_SIDE = 768  # pixels of a picture with boxes on it
KEPT_DRAWINGS = 4  # turns whose pictures with boxes stay


@dataclass(frozen=True)
class Reply:
    """What one of them said. drawing: the picture with its boxes as a data URL; "" where it has none."""

    speaker: str
    text: str
    drawing: str = ""


@dataclass
class PageTurn:
    """A question and its replies, side by side. error: what kept the rest of them from coming."""

    question: str
    replies: list[Reply] = field(default_factory=list)
    error: str = ""


@dataclass
class PageTurns:
    """The turns about one picture. picture: a digest of it; "" where there is none."""

    picture: str = ""
    turns: list[PageTurn] = field(default_factory=list)

    @classmethod
    def read(cls, value: object) -> "PageTurns":
        """Return what `as_value` gave. Raises RequestError where the value is something else."""
        try:
            return cls._read(value)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise RequestError("the conversation is none of this page; load the page again") from error

    @classmethod
    def _read(cls, value: Any) -> "PageTurns":
        if not value:
            return cls()
        turns = []
        for question, replies in value["turns"]:
            turns.append(PageTurn(question, [Reply(*reply) for reply in replies]))
        texts = [value["picture"], *(turn.question for turn in turns)]
        texts += [text for turn in turns for reply in turn.replies for text in vars(reply).values()]
        if not all(isinstance(text, str) for text in texts) or not all(turn.replies for turn in turns):
            raise ValueError
        return cls(value["picture"], turns)

    def as_value(self) -> dict[str, Any]:
        """Return the turns as JSON has them, those that failed left out."""
        whole = [turn for turn in self.turns if not turn.error and turn.replies]
        return {
            "picture": self.picture,
            "turns": [
                (
                    turn.question,
                    [
                        (reply.speaker, reply.text, reply.drawing if number < KEPT_DRAWINGS else "")
                        for reply in turn.replies
                    ],
                )
                for number, turn in zip(reversed(range(len(whole))), whole)
            ],
        }

    def as_html(self) -> str:
        """Return the turns as HTML, in which every text is text."""
        return '<div class="conversation">' + "".join(map(_turn_html, self.turns)) + "</div>"


def digest_of(picture: str) -> str:
    """Return by what a picture's data URL is known again; "" for none."""
    return hashlib.sha256(picture.encode()).hexdigest() if picture else ""


def request_of(
    turns: Sequence[PageTurn], question: str, speaker: str, picture: str, temperature: float
) -> dict[str, Any]:
    """Return the request of OpenAI's chat completions that asks one of them: picture first, then turns, the oldest left
    out where they are too many, and the question. picture: a data URL, or "".
    """
    messages: list[dict[str, Any]] = []
    for turn in turns[-(MOST_MESSAGES // 2 - 1) :]:
        said = {reply.speaker: reply.text for reply in reversed(turn.replies)}
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": said.get(speaker, turn.replies[0].text)})
    messages.append({"role": "user", "content": question})
    if picture:
        parts = [{"type": "image_url", "image_url": {"url": picture}}]
        messages[0]["content"] = [*parts, {"type": "text", "text": messages[0]["content"]}]
    return {"model": speaker, "messages": messages, "temperature": temperature}


def drawing_of(picture: str, text: str, max_pixels: int) -> str:
    """Return a picture with the boxes of a text on it as a data URL; "" where there are none, or no picture.

    Raises DataError for a picture that cannot be read.
    """
    if not picture or not boxes_in(text):
        return ""
    content = base64.b64decode(picture.partition(",")[2])
    image = read_picture(content, max_pixels=max_pixels, name="the image")
    image.thumbnail((DRAWN_SIDE, DRAWN_SIDE))
    out = io.BytesIO()
    draw_boxes(image, text).save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _turn_html(turn: PageTurn) -> str:
    replies = "".join(map(_reply_html, turn.replies))
    error = f'<p class="error" role="alert">{html.escape(turn.error)}</p>' if turn.error else ""
    question = f'<p class="question">{html.escape(turn.question)}</p>'
    return f'<section class="turn">{question}<div class="replies">{replies}</div>{error}</section>'


def _reply_html(reply: Reply) -> str:
    drawing = f'<img alt="boxes of the answer" src="{html.escape(reply.drawing)}">' if reply.drawing else ""
    name = html.escape(reply.speaker)
    return f'<div class="reply"><b>{name}</b><p data-speaker="{name}">{html.escape(reply.text)}</p>{drawing}</div>'
