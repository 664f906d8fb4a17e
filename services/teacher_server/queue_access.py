"""The queue as an operator reaches it: URL, the password of the URL's user, and whether the way there is private."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from opd.credentials import Credentials
from opd.errors import ConfigError
from opd.queue.connection import QueueConnection
from opd.settings import read_secret


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueAccess:
    """What is said on the command line. Example: `QueueAccess(redis_url="rediss://admin@redis.internal:6379/0")`.

    The password is that of `OPD_REDIS_PASSWORD` or its file, unless the URL has one; TLS files stand in the URL.
    """

    redis_url: str | None = None
    """Unset takes OPD_REDIS_URL or its file."""
    trust_network: bool = False
    """The way to Redis is private: the password may travel without TLS."""

    def connect(self, patience_s: float = 5.0) -> QueueConnection:
        """Not opened yet; ConfigError without a URL, and where the password would travel in clear text."""
        url = self.redis_url or read_secret("OPD_REDIS_URL")
        if url is None:
            raise ConfigError(
                "redis_url: is not given; write redis://host:6379/0 as --redis-url or redis_url=, or set OPD_REDIS_URL"
            )
        credentials = Credentials(token=read_secret("OPD_REDIS_PASSWORD"), trust_network=self.trust_network)
        return QueueConnection(url, patience_s=patience_s, credentials=credentials)

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[QueueConnection]:
        """A checked connection for one command."""
        connection = self.connect()
        try:
            await connection.open()
            yield connection
        finally:
            await connection.close()
