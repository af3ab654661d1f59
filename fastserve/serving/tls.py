"""TLS contexts for listening sockets and for connections to other services of the cluster."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from fastserve.config import ServerConfig
from fastserve.errors import StartupError


@dataclass(frozen=True)
class _File:
    source: str
    """The flag or environment variable that names the file."""
    path: str


def server_ssl_context(config: ServerConfig, environ: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """Context for serving; None without TLS. Raises StartupError if a file is missing, unreadable or does not match."""
    files = _certificate_files(config, environ)
    if files is None:
        if config.tls_client_cert_required:
            raise StartupError("--tls-client-cert-required needs --tls-cert and --tls-key: without TLS there are none.")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificate(context, *files)
    if config.tls_ca is not None:
        _load_authorities(context, config.tls_ca)
        context.verify_mode = ssl.CERT_REQUIRED if config.requires_client_cert else ssl.CERT_OPTIONAL
    elif config.tls_client_cert_required:
        raise StartupError("--tls-client-cert-required needs --tls-ca: the authorities to verify certificates with.")
    return context


def client_ssl_context(config: ServerConfig, environ: Mapping[str, str] = os.environ) -> ssl.SSLContext:
    """Context for `https` connections to other services of the cluster. Raises StartupError.

    They are verified with --tls-ca, else with the system's authorities; this service's own certificate is the client
    certificate.
    """
    context = ssl.create_default_context()
    if config.tls_ca is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load_authorities(context, config.tls_ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    files = _certificate_files(config, environ)
    if files is not None:
        _load_certificate(context, *files)
    return context


def check_tls(config: ServerConfig) -> None:
    """Raises StartupError for wrong TLS settings, before anything slow starts."""
    server_ssl_context(config)
    client_ssl_context(config)


def serves_tls(config: ServerConfig) -> bool:
    return config.ssl or config.tls_cert is not None


def certificate_paths(config: ServerConfig, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Paths of the service's certificate and its key; None without TLS. Raises StartupError."""
    files = _certificate_files(config, environ)
    return None if files is None else (files[0].path, files[1].path)


def _certificate_files(config: ServerConfig, environ: Mapping[str, str]) -> tuple[_File, _File] | None:
    """The service's certificate and its key; None without TLS."""
    if config.tls_cert is not None and config.tls_key is not None:
        return _File("--tls-cert", config.tls_cert), _File("--tls-key", config.tls_key)
    if config.tls_cert is not None or config.tls_key is not None:
        missing = "--tls-key" if config.tls_key is None else "--tls-cert"
        raise StartupError(f"{missing} is missing: TLS needs --tls-cert and --tls-key together.")
    if not config.ssl:
        return None
    for name in ("SSL_CERTFILE", "SSL_KEYFILE"):
        if not environ.get(name):
            raise StartupError(f"--ssl needs the environment variable {name} (SSL_KEYFILE, SSL_CERTFILE).")
    return _File("SSL_CERTFILE", environ["SSL_CERTFILE"]), _File("SSL_KEYFILE", environ["SSL_KEYFILE"])


def _load_certificate(context: ssl.SSLContext, certificate: _File, key: _File) -> None:
    _check_readable(certificate)
    _check_readable(key)
    # An empty passphrase keeps OpenSSL from prompting for one on the terminal.
    try:
        context.load_cert_chain(certificate.path, key.path, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"the key in {key.path} ({key.source}) is not that of the certificate in {certificate.path}"
        elif _has_certificate(certificate):
            problem = f"{key.source} {key.path} holds no private key in PEM format without a passphrase"
        else:
            problem = f"{certificate.source} {certificate.path} holds no certificate in PEM format"
        raise StartupError(f"TLS cannot be served: {problem}.") from error


def _has_certificate(certificate: _File) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate.path)
    except ssl.SSLError:
        return False
    return True


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    _check_readable(_File("--tls-ca", path))
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartupError(f"--tls-ca {path} holds no certificate in PEM format.") from error


def _check_readable(file: _File) -> None:
    try:
        with open(file.path, "rb"):
            pass
    except OSError as error:
        raise StartupError(f"{file.source} {file.path} cannot be read: {error.strerror}.") from error
