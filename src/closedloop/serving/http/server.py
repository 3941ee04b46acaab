"""uvicorn, which runs the loop and the end of a server, on `Connection`, which bounds what clients may hold."""

from __future__ import annotations

import socket

import uvicorn

from closedloop.errors import ServiceUnavailable
from closedloop.serving.http.asgi import Asgi
from closedloop.serving.http.connection import Connection, raise_descriptor_limit

ACCEPTED_AT_ONCE = 16
GRACEFUL_SECONDS = 10  # for open requests, when the server is told to end


def bind(host: str, port: int, setting: str) -> socket.socket:
    """Take an address; connections are refused until `run` listens, and nothing that is done to the socket blocks.

    Parameters
    ----------
    setting
        Where ``port`` comes from, for the message.

    Raises
    ------
    ServiceUnavailable
        If the address cannot be taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.setblocking(False)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        variable = "CLOSEDLOOP_" + setting.upper().replace(".", "__")
        raise ServiceUnavailable(
            f"{setting} {port}: {host} port {port} cannot be listened on ({reason}); "
            f"end the program that has it, or choose another by {variable}"
        ) from error
    return listener


def adopt(descriptor: int) -> socket.socket:
    """The socket that `bind` made in another process, by its inherited descriptor.

    Python takes it to be blocking, and its `dup` would make it so for every process that has it, at a worker's start:
    another one would then wait in `accept` for the next client, and answer none of those that it has.
    """
    listener = socket.socket(fileno=descriptor)
    listener.setblocking(False)
    return listener


def run(application: Asgi, listener: socket.socket, *, lifespan: bool = True) -> None:
    """Answer with an ASGI application until SIGTERM or SIGINT; called in another thread than the main one, for ever."""
    Connection.connections_max = raise_descriptor_limit()
    config = uvicorn.Config(
        application,
        loop="uvloop",
        http=Connection,  # type: ignore[arg-type]  # it makes one for each connection and calls `shutdown`
        ws="none",
        lifespan="on" if lifespan else "off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
        backlog=1024,
    )
    # uvloop accepts one connection of each socket in a turn of the loop: half requests must not fill the queue faster
    uvicorn.Server(config).run(sockets=[listener, *(listener.dup() for _ in range(ACCEPTED_AT_ONCE - 1))])
