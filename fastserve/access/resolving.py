"""Resolves workers' host names, in bounded time and only to addresses in the allowed networks."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult

from fastserve.access.addresses import AllowedNetworks, WorkerAddress
from fastserve.errors import InvalidRequestError, PermissionDeniedError

RESOLVE_TIMEOUT_S = 2.0
MAX_LOOKUPS = 4
"""Concurrent lookups. They have their own threads, so a name server that does not answer blocks nothing else."""


class NetworkResolver(AbstractResolver):
    """A resolver for aiohttp's connector that raises for addresses outside `networks`.

    aiohttp calls it for each new connection, so a name cannot first resolve to an allowed address and then to another.
    """

    def __init__(self, networks: AllowedNetworks) -> None:
        self._networks = networks
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises OSError, as aiohttp expects."""
        loop = asyncio.get_running_loop()
        lookup = loop.run_in_executor(self._threads, lambda: socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                found = await lookup
        except TimeoutError:
            raise OSError(None, f"{host} was not resolved within {RESOLVE_TIMEOUT_S:g} s") from None
        addresses = [str(row[4][0]) for row in found]
        try:
            self._networks.check(host, addresses)
        except PermissionDeniedError as error:
            raise OSError(None, error.message) from error
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=row[0], proto=row[2], flags=socket.AI_NUMERICHOST
            )
            for address, row in zip(addresses, found, strict=True)
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def check(self, address: WorkerAddress) -> None:
        """Raises InvalidRequestError if the host cannot be resolved, PermissionDeniedError if it is not allowed."""
        try:
            ipaddress.ip_address(address.host)
        except ValueError:
            pass
        else:
            self._networks.check(str(address), [address.host])
            return
        if self._networks.is_any:
            return
        try:
            await self.resolve(address.host, address.port)
        except OSError as error:
            if isinstance(error.__cause__, PermissionDeniedError):
                raise error.__cause__ from None
            raise InvalidRequestError(
                f"{address} cannot be resolved: {error.strerror or error}.", param="worker_name"
            ) from error
