"""`tinygpt serve`: a model over HTTP, as OpenAI's clients ask for texts."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

from tinygpt.checkpoints import hub
from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.commands.interrupts import asking, leave
from tinygpt.errors import InputError, reason, say, show
from tinygpt.writer import Writer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt serve`."""
    words = f"a folder, file, or name to fetch (default: {hub.DEFAULT}, which is built in)"
    parser.add_argument("model", nargs="?", metavar="MODEL", default=hub.DEFAULT, help=words)
    words = "where to listen; 0.0.0.0 lets other machines in (default: 127.0.0.1)"
    add_flag(parser, "--host", metavar="ADDRESS", default="127.0.0.1", help=words)
    words = "which port; 0 takes a free one (default: 8000)"
    add_flag(parser, "--port", kind=int, default=8000, low=0, below=2**16, help=words)
    words = "what clients must send as their key (default: TINYGPT_API_KEY, else nothing)"
    add_flag(parser, "--api-key", metavar="KEY", help=words)
    words = "how many texts are written side by side (default: 16)"
    add_flag(parser, "--slots", kind=int, default=16, low=1, below=1025, help=words)
    words = "how many more may wait (default: 64)"
    add_flag(parser, "--queue", kind=int, default=64, low=0, below=2**20, help=words)
    words = "how many seconds a request may take (default: 600)"
    add_flag(parser, "--timeout", kind=float, default=600.0, above=0, metavar="S", help=words)
    words = "how many tokens a text may have at most (default: as the window allows)"
    add_flag(parser, "--max-tokens", kind=int, low=1, help=words)
    words = "let the pages of this origin ask, as in https://example.com"
    add_flag(parser, "--cors", metavar="ORIGIN", help=words)
    words = "a Jinja file that makes one prompt of messages, for a model that was trained on such"
    add_flag(parser, "--chat-template", metavar="FILE", help=words)
    add_shared(parser, "--dtype")
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--plain")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal asks for an end; the exit status."""
    uvicorn = _uvicorn()
    from tinygpt.server.app import Server
    from tinygpt.server.chat import Template
    from tinygpt.server.completions import Limits
    from tinygpt.server.engine import Engine
    from tinygpt.server.guard import Access, hosts_of
    from tinygpt.server.run import serve

    template = Template(Path(args.chat_template)) if args.chat_template else None
    key = args.api_key or os.environ.get("TINYGPT_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("the API key has other than plain letters: no client could send it")
    if args.cors is not None and not re.fullmatch(r"https?://[^/\s*]+", args.cors):
        fact = f"--cors is {show(args.cors)}: it must be one origin"
        raise InputError(f"{fact}, as in https://example.com, without a path")
    listener = _listen(args.host, args.port)
    with listener:
        writer = Writer.open(args.model, args.dtype, args.tokenizer)
        engine = Engine(writer.model, args.slots, args.queue)
        config = writer.model.config
        where = writer.model.placement.describe()
        signals = asking()
        for number in signals:  # from here to the end of the process: nothing could be lost
            signal.signal(number, leave)
        name = name_of(args.model)
        say(f"{name}, {config.parameter_count:,} parameters on {where}: compiling")
        engine.start()
        engine.ready.wait()
        if engine.failed is not None:
            raise engine.failed
        name_in_hosts = args.host.encode("idna").decode()  # as browsers spell it
        access = Access(key, args.cors, hosts_of(listener.getsockname()[0], name_in_hosts))
        limits = Limits(args.max_tokens, args.timeout, args.slots + args.queue)
        server = Server(writer, engine, name, limits, access, template, _spelled(args.model))
        listener.listen(128)  # not before: until then nobody could be answered
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"listening on http://{shown}:{port}; Ctrl-C ends")
        serve(uvicorn, server, listener, signals, leave)
        engine.stop()
    return 0


def name_of(model: str) -> str:
    """What clients call a model: its name, or that of its folder or file."""
    found = Path(os.path.abspath(model)).name or model if os.path.exists(model) else model
    return _spelled(found)


def _spelled(name: str) -> str:
    """A name as answers can have it: bytes of a file's that are no UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _uvicorn() -> ModuleType:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(
            "serve needs starlette and uvicorn: pip install 'tinygpt[serve]'"
        ) from error
    return uvicorn


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: when the port is taken, or the address is none of this machine.
    """
    try:
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(found[0], socket.SOCK_STREAM)
    except UnicodeError as error:  # from IDNA, by which letters of all scripts become a name
        raise InputError(f"--host {show(host)}: no machine has such a name") from error
    except OSError as error:
        raise InputError(f"--host {host}: {reason(error)}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
    except OSError as error:
        listener.close()
        hint = "choose another --port, or 0 for any that is free"
        raise InputError(
            f"cannot listen on {host}, port {port}: {reason(error)}; {hint}"
        ) from error
    return listener
