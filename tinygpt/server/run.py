"""uvicorn around the application, and its end in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from tinygpt.errors import say
from tinygpt.server.app import Server
from tinygpt.server.protocol import Protocol

# A terminal that is closed tells its programs twice: the system does, and the shell.
_CLOSED = getattr(signal, "SIGHUP", None)
_LOOKS_S = 0.05  # how often it is seen whether all texts have ended


def prepare(uvicorn: ModuleType, server: Server) -> Any:
    """A `uvicorn.Server` for the application, which says nothing of its own."""
    most = _descriptors()
    Protocol.most_connections = max(8, min(1000, most - 64 if most > 128 else most // 2))
    config = uvicorn.Config(
        server.app(), http=Protocol, loop="asyncio", lifespan="off", ws="none", log_config=None,
        access_log=False, server_header=False, timeout_keep_alive=30, backlog=128,
        timeout_graceful_shutdown=int(server.limits.timeout_s) + 5,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    return uvicorn.Server(config)


def _descriptors() -> int:
    """How many files and sockets the system lets this process have."""
    try:
        import resource
    except ImportError:  # Windows
        return 1024
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if 0 < soft < 2**20 else 2**20


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell of what nobody else has caught, without whatever a request may have said."""
    if context["message"].startswith("socket.accept()"):
        return  # there are too many clients: asyncio says so some thousand times a second
    say(f"error: {context['message']}: {type(context.get('exception')).__name__}")


def serve(
    uvicorn: ModuleType,
    server: Server,
    listener: socket.socket,
    signals: Iterable[int],
    leave: Callable[[int], None],
) -> None:
    """Answer until one of some signals comes; then let what runs finish, and refuse all else.

    The signals stay handled behind it, since the process is about to end.

    Args:
        leave: what a second signal calls, which must not come back: amid a step or a compilation
            nothing else ends at once.
    """
    running, came = prepare(uvicorn, server), list[int]()

    async def finish() -> None:
        server.engine.drain()
        while server.busy:  # until then who asks is told why not
            await asyncio.sleep(_LOOKS_S)
        running.should_exit = True

    async def run() -> None:
        loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        loop.set_exception_handler(_tell)

        def end() -> None:
            tasks.append(loop.create_task(finish()))

        def signalled(number: int, _: object) -> None:
            if not came:
                came.append(number)
                loop.call_soon_threadsafe(end)
            elif number != _CLOSED:
                leave(number)

        for number in signals:
            signal.signal(number, signalled)
        # `serve` would take the signals for itself, and end by them once it is done.
        await running._serve([listener])

    asyncio.run(run())
