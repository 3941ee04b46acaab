"""Which connection makes room for another where there are as many as there may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from closedloop.serving.http.connection import Connection


class Order:
    """Which connection of a server makes room for another: of those that got no good answer yet, the oldest.

    Of the others it is the one whose last good answer is longest ago, and only where the first are a quarter or fewer.
    So connections that ask for nothing cannot take the place of those that do, however many and quick they are.
    """

    def __init__(self) -> None:
        self._strangers: dict[Connection, None] = {}
        self._trusted: dict[Connection, None] = {}

    def add(self, connection: Connection) -> None:
        """A new one."""
        self._strangers[connection] = None

    def trust(self, connection: Connection) -> None:
        """It has got a good answer."""
        self.remove(connection)
        self._trusted[connection] = None

    def remove(self, connection: Connection) -> None:
        """It has ended."""
        self._strangers.pop(connection, None)
        self._trusted.pop(connection, None)

    def find_next(self, connections_max: int) -> Connection:
        """The one that makes room."""
        few_strangers = len(self._strangers) <= connections_max // 4
        return next(iter(self._trusted if self._trusted and few_strangers else self._strangers))
