"""`sat-lora serve`: an OpenAI-compatible server of a base and its adapters."""

import argparse
import ipaddress
import os
import socket
from importlib.util import find_spec

from sat_lora.commands import chat
from sat_lora.commands.parts import examples
from sat_lora.terminal.option_types import number, positive, positive_int

KEY = "SAT_LORA_API_KEY"
port = number(int, "a port from 0 to 65535", lambda value: 0 <= value < 2**16)


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    command = commands.add_parser(
        "serve",
        help="serve a base and its adapters to OpenAI's clients",
        **examples(
            "sat-lora serve --run runs/mine",
            "sat-lora serve --base cogvlm-chat-v1.1 --adapter runs/a/adapter runs/b/adapter --port 8001",
            f"{KEY}=secret sat-lora serve --run runs/mine --host 0.0.0.0",
        ),
    )
    chat.add_model_options(command)
    option = command.add_argument
    option("--host", default="127.0.0.1", help="address to listen at; any but this machine's wants a key")
    option("--port", type=port, default=8000, metavar="N", help="port to listen at; 0: a free one (default: 8000)")
    option(
        "--api-key",
        metavar="TEXT",
        help=f"what requests have to bring; better in {KEY}, which no list of processes shows",
    )
    option("--max-waiting", type=positive_int, default=64, metavar="N", help="requests that may wait (default: 64)")
    batch = "requests for the same adapter that are answered together (default: 8)"
    option("--max-batch", type=positive_int, default=8, metavar="N", help=batch)
    option(
        "--max-seconds",
        type=positive,
        default=120.0,
        metavar="S",
        help="of a request, its wait included (default: 120)",
    )
    option(
        "--max-body",
        type=positive,
        default=20.0,
        metavar="MIB",
        help="of a request, its picture included (default: 20)",
    )
    option("--no-page", action="store_true", help="no page at / for browsers (with it: pip install 'sat_lora[page]')")
    command.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it. Raises a SatLoraError for a user's mistake."""
    from sat_lora.errors import ConfigError
    from sat_lora.parallel.launch import find_place

    api_key = options.api_key or os.environ.get(KEY) or None
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        # Not shown: it is a secret.
        raise ConfigError(
            f"the key of {KEY} or --api-key: give visible ASCII characters, as a header of HTTP takes them"
        )
    if not _is_loopback(options.host) and api_key is None:
        raise ConfigError(f"--host {options.host}: others may reach it; give a key in {KEY}, or with --api-key")
    if find_place().size > 1:
        raise ConfigError("sat-lora serve runs as one process; start it without a launcher")
    try:
        import uvicorn

        from sat_lora.serve.app import RequestLimits, build_app
    except ImportError as error:
        raise ConfigError(f"sat-lora serve needs more packages ({error}): pip install 'sat_lora[serve]'") from error
    with_page = not options.no_page and find_spec("gradio") is not None
    listener = _listen(options.host, options.port)
    try:
        session = chat.load_chat(options)
        limits = RequestLimits(
            seconds=options.max_seconds,
            body=int(options.max_body * 2**20),
            waiting=options.max_waiting,
            together=options.max_batch,
        )
        app = build_app(session, limits=limits, api_key=api_key, with_page=with_page)
        names = ", ".join(dict.fromkeys([session.speaker, "base", *session.adapters]))
        address, own_port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        page = f"http://{shown}:{own_port}/" if with_page else "none; pip install 'sat_lora[page]' for one"
        print(f"models: {names}")
        if not options.no_page:
            print(f"page: {page}")
        print(f"listening at http://{shown}:{own_port}/v1", flush=True)
        # Its own config of logging closes the handlers of all others, and absl's closes its stream with it.
        quiet = dict(log_config=None, log_level="warning", access_log=False)
        config = uvicorn.Config(app, timeout_graceful_shutdown=10, **quiet)
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()


def _is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, number_of_port: int) -> socket.socket:
    """Return a socket that listens, before the base is loaded. Raises ConfigError where it cannot."""
    from sat_lora.errors import ConfigError

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number_of_port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {number_of_port}: {error}; give an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--port {number_of_port}: {reason} at {host}; give another, or end who listens there"
        ) from error
    return listener
