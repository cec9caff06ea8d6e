"""The page at /, made of Gradio's parts: a picture, a conversation, who answers, and base and adapter side by side.

No part of it takes files: the browser reads the picture, and it comes as text in the request that asks about it.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

from fastapi import FastAPI

from sat_lora.chat.session import BASE
from sat_lora.errors import ConfigError, SatLoraError
from sat_lora.serve.page_turns import PageTurn, PageTurns, Reply, digest_of, drawing_of, request_of
from sat_lora.serve.questions import RequestError

# Before Gradio is imported: it tells its makers of nothing, and asks nobody for its newest version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio
except ImportError as error:
    raise ConfigError(f"the page needs more packages ({error}): pip install 'sat_lora[page]'") from error

Ask = Callable[[dict[str, Any]], AsyncGenerator[str, None]]
"""Answers a request of chat completions piece by piece; raises RequestError."""

# Gradio fills a template in as text of a program. Nothing of a model or a user goes through one: `value` is a variable.
PICTURE = """
<label class="picture"><input type="file" accept="image/*" aria-label="picture">
${value ? '<img alt="the picture" src="' + value + '">' : '<span>Drop a picture here, or click to choose one</span>'}
</label><button type="button" class="without" ${value ? '' : 'hidden'}>Without a picture</button>
<p class="note" role="alert">${note}</p>
"""
PICTURE_SCRIPT = """
element.addEventListener('change', (event) => {
    const file = event.target.files && event.target.files[0];
    if (!file) return;
    if (file.size > props.most) {
        props.note = 'The picture is larger than ' + (props.most / 1048576).toFixed(1) + ' MiB.';
        return;
    }
    const reader = new FileReader();
    reader.onload = () => {
        props.note = '';
        props.value = reader.result.replace(/^data:[^,]*,/, 'data:image/png;base64,');
    };
    reader.readAsDataURL(file);
});
element.addEventListener('click', (event) => {
    if (event.target.classList.contains('without')) props.value = '';
});
"""
PICTURE_STYLE = """
.picture { display: block; position: relative; min-height: 12em; border: 1px dashed #888; text-align: center; }
.picture input { position: absolute; inset: 0; width: 100%; opacity: 0; cursor: pointer; }
.picture img { max-width: 100%; max-height: 24em; margin: auto; }
.picture span { display: block; padding: 5em 1em; }
.without { text-decoration: underline; }
.note { color: #b00020; }
"""
TURNS_STYLE = """
.question { font-weight: bold; white-space: pre-wrap; overflow-wrap: anywhere; }
.replies { display: flex; gap: 1em; }
.reply { flex: 1; min-width: 0; border-left: 3px solid #888; padding-left: 0.6em; }
.reply p { white-space: pre-wrap; overflow-wrap: anywhere; }
.reply img { max-width: 100%; }
.error { color: #b00020; white-space: pre-wrap; }
.turn { margin-bottom: 1.5em; }
"""


class Page:
    """Gradio's application, and who answers its questions."""

    def __init__(
        self,
        ask: Ask,
        *,
        speakers: Sequence[str],
        keeps_history: bool,
        most_bytes: int,
        most_waiting: int,
        max_pixels: int,
    ):
        """Lay the page out. speakers: who may answer, the first unless another is chosen. most_bytes: of a request."""
        self._ask = ask
        self._speakers = list(speakers)
        self._keeps_history = keeps_history
        self._max_pixels = max_pixels
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        blocks = self._blocks(most_bytes * 2 // 3)
        blocks.queue(max_size=most_waiting, default_concurrency_limit=most_waiting, api_open=False)
        gradio.mount_gradio_app(
            self.app,
            blocks,
            path="/",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            show_error=False,
            max_file_size=1,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )

    def running(self) -> AbstractAsyncContextManager:
        """Return a context inside which the page answers."""
        return self.app.router.lifespan_context(self.app)

    def _blocks(self, most_of_picture: int) -> Any:
        with gradio.Blocks(title="sat_lora", analytics_enabled=False, fill_width=True) as blocks:
            kept = gradio.HTML(value={}, html_template="<i></i>", js_on_load=None, visible="hidden")
            with gradio.Row():
                with gradio.Column(scale=1):
                    picture = gradio.HTML(
                        value="",
                        html_template=PICTURE,
                        css_template=PICTURE_STYLE,
                        js_on_load=PICTURE_SCRIPT,
                        elem_id="picture",
                        most=most_of_picture,
                        note="",
                    )
                    speaker = gradio.Dropdown(
                        self._speakers, value=self._speakers[0], label="Who answers", elem_id="speaker"
                    )
                    compares = gradio.Checkbox(
                        label="Base and adapter side by side",
                        interactive=len(self._speakers) > 1,
                        elem_id="compares",
                    )
                    temperature = gradio.Slider(0, 2, value=0, step=0.1, label="Temperature (0: the likeliest token)")
                with gradio.Column(scale=2):
                    shown = gradio.HTML(
                        value=PageTurns().as_html(), css_template=TURNS_STYLE, js_on_load=None, elem_id="conversation"
                    )
                    question = gradio.Textbox(label="Question", lines=2, submit_btn="Ask", elem_id="question")
                    forget = gradio.Button("Forget the conversation", elem_id="forget")
            question.submit(
                self.answer,
                [question, picture, speaker, compares, temperature, kept],
                [kept, shown, question],
                api_visibility="private",
                show_progress="hidden",
            )
            forget.click(self.forget, None, [kept, shown], api_visibility="private", show_progress="hidden")
        return blocks

    async def forget(self) -> tuple[dict, str]:
        """Return an empty conversation, kept and shown."""
        return {}, PageTurns().as_html()

    async def answer(
        self, question: Any, picture: Any, speaker: Any, compares: Any, temperature: Any, kept: Any
    ) -> AsyncGenerator[tuple[dict, str, str], None]:
        """Yield the conversation, kept and shown, as its last turn grows, and what stays of the question to be sent.

        What goes wrong is shown in the conversation, and the question stays.
        """
        turn = PageTurn(str(question or ""))
        conversation = PageTurns()
        try:
            if not turn.question.strip():
                raise RequestError("type a question")
            conversation = self._begun(kept, picture)
            earlier = [*conversation.turns] if self._keeps_history else []
            conversation.turns.append(turn)
            for name in self._who(speaker, compares):
                request = request_of(earlier, turn.question, name, picture or "", temperature)
                async with aclosing(self._reply(request, name, picture or "")) as replies:
                    async for reply in replies:
                        turn.replies = [other for other in turn.replies if other.speaker != name] + [reply]
                        yield conversation.as_value(), conversation.as_html(), ""
        except (RequestError, SatLoraError) as error:
            turn.error = str(error)
            conversation.turns = [other for other in conversation.turns if other is not turn] + [turn]
            yield conversation.as_value(), conversation.as_html(), turn.question

    def _begun(self, kept: Any, picture: Any) -> PageTurns:
        """Return the turns so far, none where they are about another picture."""
        if picture and not isinstance(picture, str):
            raise RequestError("the picture is none of this page; load the page again")
        conversation = PageTurns.read(kept)
        digest = digest_of(picture or "")
        return conversation if conversation.picture == digest else PageTurns(digest)

    def _who(self, speaker: Any, compares: Any) -> list[Any]:
        """Return who answers, from left to right."""
        if not compares:
            return [speaker]
        adapters = [name for name in self._speakers if name != BASE]
        return [BASE, *(adapters[:1] if speaker == BASE else [speaker])]

    async def _reply(self, request: dict[str, Any], name: str, picture: str) -> AsyncGenerator[Reply, None]:
        """Yield one reply as it grows, at last with its boxes drawn."""
        text = ""
        async with aclosing(self._ask(request)) as pieces:
            async for piece in pieces:
                text += piece
                yield Reply(name, text)
        text = text.strip()
        yield Reply(name, text, await asyncio.to_thread(drawing_of, picture, text, self._max_pixels))
