"""Tells a teacher that is away from one that is spoken to in the wrong way: with TLS where it has none, or without."""

import asyncio
import ssl

from opd.errors import ConfigError

_PROBE_S = 3.0
# What gRPC says of a connection that was never made, and BoringSSL of an answer that is not TLS.
_CUT_OFF = "Socket closed"
_NO_TLS = "WRONG_VERSION_NUMBER"


async def wrong_scheme(target: str, details: str, *, is_encrypted: bool) -> ConfigError | None:
    """What to write instead, judged by gRPC's details of a failed first call; None where the scheme is not at fault."""
    if is_encrypted:
        if _NO_TLS not in details:
            return None
        return ConfigError(f"url=grpcs://{target}: does not speak TLS; write grpc://{target}")
    if _CUT_OFF not in details or not await _speaks_tls(target):
        return None
    return ConfigError(f"url=grpc://{target}: speaks TLS; write grpcs://{target}")


async def _speaks_tls(target: str) -> bool:
    """Shakes hands and sends nothing; whose certificate it is does not matter here."""
    host, _, port = target.rpartition("/")[2].rpartition(":")
    if target.startswith("unix:") or not port.isdigit():
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True
