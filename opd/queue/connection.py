"""One process's connection to Redis: checked when opened, patient when lost, its password never shown.

Every operation given to `call` must be safe to repeat; the scripts are. `epoch` rises whenever Redis was lost, which
is how the client knows that it must ask what became of its rollouts.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from opd.credentials import Credentials, read_pem
from opd.errors import (
    ConfigError,
    InternalError,
    OverCapacityError,
    PermissionDeniedError,
    QueueMisconfiguredError,
    QueueUnavailableError,
    UnauthenticatedError,
)
from opd.queue.scripts import run_script
from opd.retry import RetryRules, retry

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_SCHEMES = ("redis", "rediss", "unix")
_MIN_VERSION = (6, 2)
_ATTEMPT_TIMEOUT_S = 10.0


def hide_password(url: str) -> str:
    """The URL as it may stand in a message."""
    shown = re.sub(r"([?&]password=)[^&#]*", r"\1***", url)
    return re.sub(r"://([^:@]*):.*@", r"://\1:***@", shown)


def split_url(url: str) -> SplitResult:
    """The parts of a Redis URL; ConfigError, which does not show the password, where it has none."""
    try:
        parts = urlsplit(url)
        # Read, and only then judged.
        _ = parts.port
    except ValueError:
        # Not told in the words of the error, which quote what stands where the port should, or between brackets.
        raise ConfigError(
            f"redis_url={hide_password(url)}: cannot be read; write redis://user:password@host:port/0, and in a "
            "password a bracket as %5B or %5D, a slash as %2F"
        ) from None
    return parts


def without_identity(url: str) -> str:
    """The same place, without user and password; ConfigError as `split_url`."""
    parts = split_url(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name not in ("username", "password")]
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return f"{place}?{urlencode(kept)}" if kept else place


def info_field(info: Mapping[str, Any], name: str, label: str) -> str:
    """One field of the answer to INFO; QueueMisconfiguredError where it is not there."""
    if name not in info:
        raise QueueMisconfiguredError(
            f"redis {label}: its INFO has no {name}, so nobody can tell whether requests are safe there; "
            "have the service or proxy in front of it pass INFO on, or run Redis or Valkey yourself"
        )
    return str(info[name])


class QueueConnection:
    """A small pool of connections to the Redis at `url` (`redis://`, `rediss://` or `unix://`).

    `patience_s` is how long an operation goes on trying after Redis was lost. User and password in the URL win over
    those of `credentials`.
    """

    def __init__(
        self,
        url: str,
        *,
        patience_s: float = 300.0,
        max_connections: int = 8,
        credentials: Credentials | None = None,
    ) -> None:
        if split_url(url).scheme not in _SCHEMES:
            raise ConfigError(f"redis_url={hide_password(url)}: must start with redis://, rediss:// or unix://")
        self.label = hide_password(url)
        self.epoch = 0
        self._rules = RetryRules(total_s=patience_s, attempt_timeout_s=_ATTEMPT_TIMEOUT_S)
        options = _identity(url, credentials or Credentials())
        self._way_in = _way_in(url, options)
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                protocol=2,
                max_connections=max_connections,
                timeout=None,
                # Trying again is this class's business alone.
                retry=Retry(NoBackoff(), 0),
                # Attempts are bounded there as well. A socket time-out would send through asyncio.wait_for, which on
                # Python 3.11 swallows a cancellation that meets a finished write.
                socket_timeout=None,
                socket_connect_timeout=_ATTEMPT_TIMEOUT_S,
                **options,
            )
        except ValueError as error:
            raise ConfigError(f"redis_url={self.label}: {error}; write redis://host:port/0") from None
        self._redis: Any = Redis(connection_pool=pool)

    async def open(self, *, patience_s: float = 5.0) -> None:
        """Waits for Redis and checks that it may be trusted with requests.

        Raises QueueUnavailableError, UnauthenticatedError or QueueMisconfiguredError.
        """
        rules = RetryRules(total_s=patience_s, attempt_timeout_s=max(patience_s, 1.0))
        server = await self._run(lambda redis: redis.info("server"), rules)
        memory = await self._run(lambda redis: redis.info("memory"), rules)
        version = info_field(server, "redis_version", self.label)
        self._check(version, info_field(memory, "maxmemory_policy", self.label))
        self.epoch = 0

    def _check(self, version: str, policy: str) -> None:
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
        if numbers < _MIN_VERSION:
            raise QueueMisconfiguredError(f"redis {self.label}: version {version} is too old; run 6.2 or newer")
        if policy != "noeviction":
            raise QueueMisconfiguredError(
                f"redis {self.label}: maxmemory-policy={policy} could evict requests; "
                "run CONFIG SET maxmemory-policy noeviction"
            )

    async def call(self, operation: Callable[[Any], Awaitable[_T]]) -> _T:
        """Runs an operation on the client, again after a loss of Redis, for as long as the patience lasts."""
        return await self._run(operation, self._rules)

    async def script(self, name: str, key: str, *args: str | bytes | int | float) -> Any:
        """Runs one of the protocol's scripts; replies come as bytes, integers and lists."""
        return await self.call(lambda redis: run_script(redis, name, key, *args))

    async def read_bounded(self, keys: Sequence[str], max_bytes: int) -> list[bytes | int | None]:
        """The values of keys; None where there is none, and the size alone of a value above `max_bytes`."""
        sizes = await self.call(lambda redis: _pipelined(redis, "STRLEN", keys))
        wanted = [key for key, size in zip(keys, sizes, strict=True) if 0 < size <= max_bytes]
        values = dict(zip(wanted, await self.call(lambda redis: _pipelined(redis, "GET", wanted)), strict=True))
        return [size if size > max_bytes else values.get(key) for key, size in zip(keys, sizes, strict=True)]

    async def close(self) -> None:
        """Gives all sockets back."""
        await self._redis.aclose(close_connection_pool=True)
        await self._redis.connection_pool.disconnect()

    async def _run(self, operation: Callable[[Any], Awaitable[_T]], rules: RetryRules) -> _T:
        try:
            return await retry(
                lambda: operation(self._redis), rules=rules, is_retryable=_is_loss, on_failure=self._note_loss
            )
        except exceptions.NoPermissionError as error:
            raise PermissionDeniedError(f"redis {self.label}: {error}; render the user's rules again") from None
        except exceptions.OutOfMemoryError:
            raise OverCapacityError(f"redis {self.label}: out of memory; raise maxmemory or lower the caps") from None
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
            if _is_refusal(error):
                raise UnauthenticatedError(f"redis {self.label}: {_reason(error)}; {self._way_in}") from None
            raise QueueUnavailableError(
                f"redis {self.label}: not reachable for {rules.total_s:g} s ({_reason(error)}); "
                "start it or correct the URL"
            ) from None
        except exceptions.ResponseError as error:
            raise InternalError(f"redis {self.label}: {error}") from error

    def _note_loss(self, error: Exception) -> None:
        self.epoch += 1
        if self.epoch == 1:
            _log.warning("redis %s: %s", self.label, _reason(error))


def _identity(url: str, credentials: Credentials) -> dict[str, Any]:
    """The client's options for user, password and certificates."""
    parts = split_url(url)
    options: dict[str, Any] = {}
    if credentials.token is not None and not parts.password and "password=" not in parts.query:
        if parts.scheme != "unix":
            credentials.check_way("redis_url", parts.hostname or "localhost", is_encrypted=parts.scheme == "rediss")
        options["password"] = credentials.token
        if credentials.user and not parts.username and "username=" not in parts.query:
            options["username"] = credentials.user
    if parts.scheme == "rediss":
        files = {
            "ca_file": ("ssl_ca_certs", credentials.ca_file),
            "cert_file": ("ssl_certfile", credentials.cert_file),
            "key_file": ("ssl_keyfile", credentials.key_file),
        }
        for name, (option, path) in files.items():
            if path is not None:
                read_pem(f"redis {name}", path)
                options[option] = str(path.expanduser())
    return options


def _way_in(url: str, options: dict[str, Any]) -> str:
    """What to do when Redis refuses who we say we are."""
    parts = split_url(url)
    if "password" in options:
        user = parts.username or options.get("username") or "the URL's user"
        return f"give the token or password of {user}, or let `opd tenants acl --apply` set the users anew"
    if parts.password or "password=" in parts.query:
        return "correct user and password in the URL"
    return "give a token, or user and password in the URL"


async def _pipelined(redis: Any, command: str, keys: Sequence[str]) -> list[Any]:
    if not keys:
        return []
    async with redis.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.execute_command(command, key)
        values: list[Any] = await pipe.execute()
        return values


def _is_loss(error: Exception) -> bool:
    """Redis was away, is still loading, or a fail-over is under way: the same operation may succeed later."""
    if _is_refusal(error):
        return False
    losses = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, OSError)
    return isinstance(error, losses)


def _is_refusal(error: BaseException) -> bool:
    """Redis wants another user or password; some of the client's ways to connect wrap that in a plain loss."""
    refusals = (exceptions.AuthenticationError, exceptions.AuthenticationWrongNumberOfArgsError)
    return isinstance(error, refusals) or isinstance(error.__cause__, refusals)


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
