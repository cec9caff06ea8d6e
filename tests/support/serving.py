"""A conversation to serve, and a server of it on a socket of this process."""

import contextlib
import socket
import threading
import time

import uvicorn

from sat_lora.chat import Chat
from sat_lora.cogvlm import load_cogvlm
from sat_lora.serve.app import build_app

LENGTH = 12


def chat_of(base, adapters, **settings) -> Chat:
    return Chat(load_cogvlm(base), adapters=adapters, version="chat", max_new_tokens=LENGTH, **settings)


@contextlib.contextmanager
def served(chat, **settings):
    """The address of a server that answers inside."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            build_app(chat, **settings), log_config=None, log_level="warning", timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
