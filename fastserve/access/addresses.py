"""Addresses of workers: their syntax, and the networks that they may be in.

Whoever registers a worker makes the controller and the API servers call its address. So an address is only a scheme, a
host and a port, and must be in a network that the operator allows.
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
        """The canonical form, used as the worker's name in all services."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        is_default = self.port == _DEFAULT_PORTS[self.scheme]
        return f"{self.scheme}://{host}" + ("" if is_default else f":{self.port}")


def parse_worker_address(text: str, param: str = "worker_name") -> WorkerAddress:
    """Parse `http(s)://HOST:PORT`. Raises InvalidRequestError that names `param` for anything else."""
    # `lower` turns some other characters into ASCII: the Kelvin sign becomes a k.
    match = _FORM.fullmatch(text.lower()) if len(text) <= MAX_ADDRESS_CHARS and text.isascii() else None
    host = None if match is None else _plain_host(match["host"])
    if match is None or host is None:
        raise _invalid(text, param)
    port = int(match["port"] or _DEFAULT_PORTS[match["scheme"]])
    if not 0 < port < 65536:
        raise _invalid(text, param)
    return WorkerAddress(match["scheme"], host, port)


def is_worker_address(text: str) -> bool:
    """Whether `text` is a valid worker address."""
    try:
        parse_worker_address(text)
    except InvalidRequestError:
        return False
    return True


def check_service_address(text: str, flag: str) -> None:
    """Raises StartupError that names `flag` unless `text` is an http or https URL with a host and a valid port."""
    try:
        parts = urlsplit(text)
        is_valid = parts.scheme in _DEFAULT_PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:  # invalid port, or a missing bracket
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
        # Old notations such as 127.1 or 0x7f000001 would be parsed differently here and by the system.
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
    """Networks that workers may be in. `is_local` adds loopback and the subnets of this machine's interfaces."""

    networks: tuple[IpNetwork, ...] = ()
    is_local: bool = True
    is_any: bool = False

    def check(self, address: str, resolved: Sequence[str]) -> None:
        """Raises PermissionDeniedError if any of the IP addresses `resolved` from `address` is outside.

        Reads the machine's network interfaces, which takes about 0.1 ms.
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
    """Parse `local`, `any` and networks such as 10.0.0.0/8. Raises StartupError."""
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
    """Loopback, and the subnets of this machine's network interfaces, except link-local ones: cloud providers serve
    credentials there.
    """
    networks: list[IpNetwork] = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
    for rows in psutil.net_if_addrs().values():
        for row in rows:
            if row.family not in (socket.AF_INET, socket.AF_INET6) or not row.netmask:
                continue
            try:
                interface = ipaddress.ip_interface(f"{row.address.partition('%')[0]}/{_prefix(row.netmask)}")
            except ValueError:
                continue  # an interface without a valid address yet
            if not interface.ip.is_link_local and interface.network.prefixlen:
                networks.append(interface.network)
    return networks


def _prefix(netmask: str) -> int:
    return int(ipaddress.ip_address(netmask.partition("/")[0])).bit_count()


def _unmapped(ip: IpAddress) -> IpAddress:
    """The IPv4 address behind an IPv4-mapped IPv6 one; any other address unchanged."""
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip
