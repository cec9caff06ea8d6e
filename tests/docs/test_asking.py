"""The Python of docs/chat.md and docs/serving.md is run, and says what the model says."""

import re
import shutil

import pytest

from sat_lora.chat import Chat
from sat_lora.cogvlm import load_cogvlm
from tests.support.paths import ROOT, TINY_BASE
from tests.support.serving import chat_of, served
from tests.support.talking import adapters, base, picture  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("single_process_group")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: str) -> list[str]:
    return PYTHON.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["chat.md", "serving.md"])
def test_the_chinese_page_has_the_same_python_or_none(page):
    english, chinese = (
        [re.sub(r" *#.*", "", code) for code in blocks_of(f"docs/{name}{page}")] for name in ("", "zh/")
    )
    assert chinese in ([], english)


def test_the_client_of_the_page_on_serving(base, adapters, picture, tmp_path, monkeypatch, capsys):  # noqa: F811
    (code,) = blocks_of("docs/serving.md")
    shutil.copy(picture, tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    chat = chat_of(base, adapters)
    expected = chat.ask("What is this?", picture).strip()
    with served(chat_of(base, adapters)) as address:
        exec(code.replace("http://127.0.0.1:8000", address), {})
    assert capsys.readouterr().out.strip() == expected


def test_the_session_of_the_page_on_asking(picture, tmp_path, monkeypatch, capsys):  # noqa: F811
    (code,) = blocks_of("docs/chat.md")
    shutil.copy(picture, tmp_path / "cat.png")
    (tmp_path / "finetune_demo").symlink_to(ROOT / "finetune_demo")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    expected = Chat(load_cogvlm(TINY_BASE), version="base").ask("CAPTCHA:", picture)
    assert capsys.readouterr().out == f"{expected}\n{expected}"
