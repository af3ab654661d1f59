"""Addresses of workers: their form, and the networks that they may lie in.

Whoever registers a worker makes the controller and the API servers call its address, so an address is a scheme, a host
and a port and nothing else, and it lies in a network that the operator allows.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from fastserve.errors import InvalidRequestError, PermissionDeniedError, StartupError
from fastserve.observability.text import printable

MAX_ADDRESS_CHARS = 300
LOCAL_NETWORKS = "local"
ANY_NETWORK = "any"

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_FORM = re.compile(r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>\d{1,5}))?/?", re.ASCII)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_SHOWN_CHARS = 80


@dataclass(frozen=True)
class WorkerAddress:
    scheme: str
    host: str
    """An IP address or a name, in lower case and without brackets."""
    port: int

    def __str__(self) -> str:
        """The one form in which the address is known everywhere."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        is_default = self.port == _DEFAULT_PORTS[self.scheme]
        return f"{self.scheme}://{host}" + ("" if is_default else f":{self.port}")


def parse_worker_address(text: str, param: str = "worker_name") -> WorkerAddress:
    """Raises InvalidRequestError that names `param` for anything but http or https, a host and a port."""
    # Not only ASCII could become ASCII by `lower`: the Kelvin sign becomes a k.
    match = _FORM.fullmatch(text.lower()) if len(text) <= MAX_ADDRESS_CHARS and text.isascii() else None
    host = None if match is None else _plain_host(match["host"])
    if match is None or host is None:
        raise _invalid(text, param)
    port = int(match["port"] or _DEFAULT_PORTS[match["scheme"]])
    if not 0 < port < 65536:
        raise _invalid(text, param)
    return WorkerAddress(match["scheme"], host, port)


def is_worker_address(text: str) -> bool:
    """Whether `text` has the form of a worker's address."""
    try:
        parse_worker_address(text)
    except InvalidRequestError:
        return False
    return True


def check_service_address(text: str, flag: str) -> None:
    """Raises StartupError, which names `flag`, unless `text` is http or https, a host, and perhaps port and path."""
    try:
        parts = urlsplit(text)
        is_valid = parts.scheme in _DEFAULT_PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number or too large, or a bracket is missing
        is_valid = False
    if not is_valid:
        raise StartupError(
            f"{flag} {printable(text, _MAX_SHOWN_CHARS)} is no address of a service: write it like http://HOST:PORT."
        )


def _plain_host(text: str) -> str | None:
    if text.startswith("["):
        try:
            return _unmapped(ipaddress.IPv6Address(text.strip("[]"))).compressed
        except ValueError:
            return None
    text = text.removesuffix(".")
    labels = text.split(".")
    if re.fullmatch(r"\d+|0x[0-9a-f]*", labels[-1]):
        # Old forms such as 127.1 or 0x7f000001 would be read in one way here and in another by the system.
        try:
            return ipaddress.IPv4Address(text).compressed
        except ValueError:
            return None
    return text if len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) else None


def _invalid(text: str, param: str) -> InvalidRequestError:
    shown = ascii(text[:_MAX_SHOWN_CHARS]) + ("..." if len(text) > _MAX_SHOWN_CHARS else "")
    return InvalidRequestError(
        f"Invalid value for '{param}': {shown}. The address of a worker is http:// or https://, a host and a port, "
        "such as http://10.0.0.5:21002, without path, user name or query.",
        param=param,
    )


@dataclass(frozen=True)
class AllowedNetworks:
    """Where workers may be. `is_local` adds loopback and the subnets of this machine's network interfaces."""

    networks: tuple[IpNetwork, ...] = ()
    is_local: bool = True
    is_any: bool = False

    def check(self, address: str, resolved: Sequence[str]) -> None:
        """Raises PermissionDeniedError when the host of `address` resolves to any IP address outside. Reads the
        machine's network interfaces, which takes about 0.1 ms.
        """
        if self.is_any:
            return
        allowed = [*self.networks, *(own_networks() if self.is_local else ())]
        for text in resolved:
            ip = _unmapped(ipaddress.ip_address(text.partition("%")[0]))
            if not any(ip.version == network.version and ip in network for network in allowed):
                raise PermissionDeniedError(
                    f"{address} lies outside of the networks that workers may be in ({ip}). Start the controller with "
                    "--allowed-worker-networks, such as local,10.0.0.0/8, to allow more.",
                    param="worker_name",
                    code="network_not_allowed",
                )


def parse_networks(entries: Iterable[str]) -> AllowedNetworks:
    """Reads `local`, `any` and networks such as 10.0.0.0/8. Raises StartupError."""
    networks: list[IpNetwork] = []
    words = set()
    for entry in entries:
        if entry in (LOCAL_NETWORKS, ANY_NETWORK):
            words.add(entry)
            continue
        try:
            networks.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            raise StartupError(
                f"--allowed-worker-networks: {entry[:_MAX_SHOWN_CHARS]!a} is none of {LOCAL_NETWORKS}, "
                f"{ANY_NETWORK} and a network such as 10.0.0.0/8."
            ) from None
    return AllowedNetworks(tuple(networks), LOCAL_NETWORKS in words, ANY_NETWORK in words)


def own_networks() -> list[IpNetwork]:
    """Loopback, and the subnets of this machine's network interfaces. Link-local subnets are left out: cloud providers
    serve credentials there.
    """
    networks: list[IpNetwork] = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
    for rows in psutil.net_if_addrs().values():
        for row in rows:
            if row.family not in (socket.AF_INET, socket.AF_INET6) or not row.netmask:
                continue
            try:
                interface = ipaddress.ip_interface(f"{row.address.partition('%')[0]}/{_prefix(row.netmask)}")
            except ValueError:
                continue  # an interface whose address is not one yet
            if not interface.ip.is_link_local and interface.network.prefixlen:
                networks.append(interface.network)
    return networks


def _prefix(netmask: str) -> int:
    return int(ipaddress.ip_address(netmask.partition("/")[0])).bit_count()


def _unmapped(ip: IpAddress) -> IpAddress:
    """An IPv4 address written as an IPv6 one leads to the same machine."""
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip
