"""The tenants file while a replica runs: looked at every second, a broken one changes nothing.

Whoever needs to know (batcher, queue, metrics) subscribes and is told the whole table each time it changes. A replica
without a file has no registry: everybody is let in, which the settings allow on loopback only.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from prometheus_client import Gauge

from opd.errors import OpdError
from opd.paths import expand_user
from services.teacher_server.tenants import TenantTable, load_tenants

_log = logging.getLogger(__name__)
_Stamp = tuple[int, int, int]


class TenantRegistry:
    """Holds the valid table; raises ConfigError when the file is wrong at the start."""

    def __init__(self, path: Path, *, sound: Gauge) -> None:
        self._path = expand_user("tenants_file", path)
        self._sound = sound
        self._stamp = self._look()
        self._table = load_tenants(self._path)
        self._subscribers: list[Callable[[TenantTable], None]] = []
        sound.set(1)

    @property
    def table(self) -> TenantTable:
        """As the file last said in a form that could be read."""
        return self._table

    def subscribe(self, tell: Callable[[TenantTable], None]) -> None:
        """Tells the table at once and after every change."""
        self._subscribers.append(tell)
        tell(self._table)

    async def watch(self, every_s: float = 1.0) -> None:
        """Looks for a new file for ever."""
        while True:
            await asyncio.sleep(every_s)
            self.reload_if_changed()

    def reload_if_changed(self) -> bool:
        """True when a new table is in force; a file that cannot be read leaves the old one and is told in the log."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        try:
            table = load_tenants(self._path)
        except OpdError as error:
            self._stamp = stamp
            self._sound.set(0)
            _log.error("the tenants stay as they were: %s", error.message)
            return False
        self._stamp, self._table = stamp, table
        self._sound.set(1)
        for tell in self._subscribers:
            tell(table)
        _log.info("%d tenants from %s", len(table.tenants), self._path)
        return True

    def _look(self) -> _Stamp | None:
        """What changes when the file does, also behind a symbolic link."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
