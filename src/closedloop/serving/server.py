"""The server that ``closedloop serve`` becomes: workers and agent.

The agent is a process of its own: started again when it dies, ended with the server.
"""

from __future__ import annotations

import contextlib
import logging.config
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec

from closedloop.serving.config import CONFIG_VARIABLE
from closedloop.serving.keeper import keep_agent
from closedloop.serving.logs import LOG_CONFIG


class ServerConfig(msgspec.Struct, frozen=True):
    """Addresses and limits of the HTTP server; the worker's values stand in the same file, and share the state folder.

    ``params`` is the ``params.yaml`` of the command, for its agent.
    """

    params: str
    state_dir: str
    host: str = "127.0.0.1"
    port: int = 3000
    workers: int = 1
    agent: bool = True


def serve(path: Path) -> None:
    """Serve what a config file says until told to stop: SIGTERM lets open requests finish.

    Raises
    ------
    ClosedloopError
        If a single worker cannot be put together: the spool cannot be made, a Bento's version file is broken.
    """
    import uvicorn

    from closedloop.serving.protocol import Connection
    from closedloop.serving.slots import take_up_waiting

    config = msgspec.json.decode(path.read_bytes(), type=ServerConfig)
    os.environ[CONFIG_VARIABLE] = str(path)
    logging.config.dictConfig(LOG_CONFIG)
    stopping = threading.Event()
    told = (stopping, config.params, Path(config.state_dir) / "spool", (config.host, config.port))
    keeper = threading.Thread(target=keep_agent, args=told, name="agent")
    # the server raises a signal again once it has shut down: this turns it into an exit that ends the agent too
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        if config.agent:
            take_up_waiting(Path(config.state_dir))
            keeper.start()
        uvicorn.run(
            "closedloop.serving.app:create_application",
            factory=True,
            host=config.host,
            port=config.port,
            workers=config.workers,
            loop="uvloop",
            http=Connection,
            ws="none",
            access_log=False,
            proxy_headers=False,
            log_config=LOG_CONFIG,
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=10,
            backlog=1024,
        )
    finally:
        stopping.set()
        if config.agent:
            with contextlib.suppress(RuntimeError):  # told to end before it was started: what lies there is drained
                keeper.start()
            keeper.join()
