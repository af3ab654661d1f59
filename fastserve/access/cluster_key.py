"""The cluster key: the secret that controller, workers and API servers of one cluster share.

It comes from FASTSERVE_CLUSTER_KEY or from a file, never from a command line, which every user of a machine can read.
Services on loopback need no key from the user: the first one creates a key in a file that only this user can read, and
the others read it there.

Several keys can be valid at once, so that a key can be rotated while the cluster serves: the first is sent, all are
accepted. Keys may have owners, who cannot take over each other's model names and workers.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastserve.access.bearer import digest, find_key
from fastserve.access.hosts import is_loopback
from fastserve.access.key_files import read_lines
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

ENV_CLUSTER_KEY = "FASTSERVE_CLUSTER_KEY"
DEFAULT_OWNER = "default"
"""Owner of keys without an owner name."""
MIN_KEY_CHARS = 20
MIN_DISTINCT_CHARS = 8
MAX_KEY_CHARS = 512
MAKE_KEY_COMMAND = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
_MAX_USER_FILE_BYTES = 4096
_WRITE_DEADLINE_S = 2.0
"""Seconds that another process may take between creating the user's key file and finishing it."""


@dataclass(frozen=True)
class ClusterKeys:
    """The keys of a service. Their text is left out of the repr."""

    current: str = field(repr=False)
    """The key that this service sends."""
    accepted: tuple[tuple[bytes, str], ...] = field(repr=False)
    """Digest and owner of each valid key."""

    def owner_of(self, token: bytes) -> str | None:
        """Owner of the key that equals `token`, or None if no key does. Takes the same time for every token."""
        return find_key(token, self.accepted)

    def authorization(self) -> dict[str, str]:
        """The header for requests to other services of the cluster."""
        return {"Authorization": f"Bearer {self.current}"}


def load_cluster_keys(
    environ: Mapping[str, str], *, key_file: str | None, insecure: bool, hosts: Sequence[str]
) -> ClusterKeys | None:
    """The keys from `key_file`, else from the environment, else, if all `hosts` are loopback, the user's own.

    `hosts`: the hosts that the service listens on and calls. Returns None with `insecure`. Raises StartupError.
    """
    if insecure:
        if not all(map(is_loopback, hosts)):
            logger.warning("--insecure: whoever reaches this service can use and change the cluster.")
        return None
    if key_file is not None:
        return read_key_file(key_file)
    given = environ.get(ENV_CLUSTER_KEY, "")
    if given.strip():
        return make_keys(given.split(","), ENV_CLUSTER_KEY)
    for host in hosts:
        if not is_loopback(host):
            raise StartupError(
                f"{host or 'every address'} is not only this machine: services that reach beyond it need a cluster "
                f"key, the same for all. Make one with `{MAKE_KEY_COMMAND}` and give it to each service in a file "
                f"(--cluster-key-file FILE) or as {ENV_CLUSTER_KEY}; or use --insecure to accept everybody."
            )
    return find_or_make(environ)


def read_key_file(path: str) -> ClusterKeys:
    """Read the keys of a file. Raises StartupError if it cannot be read or holds no valid key."""
    return make_keys(read_lines(path, "--cluster-key-file"), f"--cluster-key-file {path}")


def make_keys(entries: Sequence[str], source: str) -> ClusterKeys:
    """Keys from entries `KEY` or `OWNER KEY`; the first is the one to send. `source` names their origin in errors.

    Raises StartupError, without repeating any part of a key.
    """
    keys: dict[str, str] = {}
    for number, entry in enumerate((entry.strip() for entry in entries if entry.strip()), start=1):
        owner, _, key = entry.rpartition(" ")
        owner, key = owner.strip() or DEFAULT_OWNER, key.strip()
        problem = _weakness(key)
        if problem:
            raise StartupError(f"{source}: key {number} {problem}. Make one with `{MAKE_KEY_COMMAND}`.")
        if len(owner.split()) != 1 or len(owner) > 64 or not owner.isprintable():
            raise StartupError(f"{source}: key {number} must stand alone or after its owner's name, as in OWNER KEY.")
        if keys.setdefault(key, owner) != owner:
            raise StartupError(f"{source}: key {number} belongs to two owners, {keys[key]} and {owner}.")
    if not keys:
        raise StartupError(f"{source} holds no key. Make one with `{MAKE_KEY_COMMAND}`.")
    return ClusterKeys(next(iter(keys)), tuple((digest(key.encode()), owner) for key, owner in keys.items()))


def _weakness(key: str) -> str | None:
    if not key.isascii() or not key.isprintable() or "," in key:
        return "has characters other than printable ASCII without spaces and commas"
    if len(key) < MIN_KEY_CHARS:
        return f"is too easy to guess: {len(key)} characters, of at least {MIN_KEY_CHARS}"
    if len(key) > MAX_KEY_CHARS:
        return f"is longer than {MAX_KEY_CHARS} characters"
    if len(set(key)) < MIN_DISTINCT_CHARS:
        return f"is too easy to guess: it has fewer than {MIN_DISTINCT_CHARS} different characters"
    return None


# ---- the user's own key -----------------------------------------------------------------------------------------


def user_key_path(environ: Mapping[str, str]) -> Path:
    """Path of the user's own key: in XDG_CONFIG_HOME, else ~/.config, else, without a home, the temporary folder."""
    config = environ.get("XDG_CONFIG_HOME", "")
    if Path(config).is_absolute():
        return Path(config) / "fastserve" / "cluster.key"
    try:
        home = Path(environ.get("HOME") or Path.home())
    except RuntimeError:  # a user id without an entry in the system, as in containers
        return _temporary_path(environ)
    return home / ".config" / "fastserve" / "cluster.key"


def find_or_make(environ: Mapping[str, str]) -> ClusterKeys:
    """Read the user's own key, or create it if there is none; services that start concurrently get the same one.

    Without a writable home it is in a private temporary folder. Raises StartupError if other users could have read or
    written the file.
    """
    path = user_key_path(environ)
    try:
        keys = _find_or_make_at(path)
    except OSError as error:
        path = _temporary_path(environ)
        try:
            keys = _find_or_make_at(path)
        except OSError as second:
            raise StartupError(
                f"No cluster key can be kept: {user_key_path(environ)}: {error.strerror}; {path}: {second.strerror}. "
                f"Set {ENV_CLUSTER_KEY} to the output of `{MAKE_KEY_COMMAND}`."
            ) from second
    logger.info("The cluster key of this user lies in %s.", path)
    return keys


def _temporary_path(environ: Mapping[str, str]) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else environ.get("USERNAME", "user")
    return Path(environ.get("TMPDIR") or tempfile.gettempdir()) / f"fastserve-{user}" / "cluster.key"


def _find_or_make_at(path: Path) -> ClusterKeys:
    """Raises OSError if the file cannot be created, StartupError if it cannot be trusted."""
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _check_private(path.parent, path.parent.lstat(), is_folder=True)
        text = _read_private(path)
    except FileNotFoundError:
        _create(path)
        text = _read_private(path)
    return make_keys(text.splitlines(), str(path))


def _create(path: Path) -> None:
    """Create the file with a new key atomically, so that no reader sees a part of it; an existing file stays."""
    aside = path.with_name(f".cluster.key.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _no_follow(), 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path, follow_symlinks=False)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
                raise
            _create_without_links(path)
    finally:
        aside.unlink()


def _create_without_links(path: Path) -> None:
    """For file systems without hard links. Readers wait for the end of the line."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _no_follow(), 0o600)
    except FileExistsError:
        return
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")


def _read_private(path: Path) -> str:
    deadline = time.monotonic() + _WRITE_DEADLINE_S
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | _no_follow() | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise StartupError(f"{path} is a link: remove it, and a new key is made.") from error
            raise
        with open(descriptor, "rb") as file:
            _check_private(path, os.fstat(file.fileno()), is_folder=False)
            content = file.read(_MAX_USER_FILE_BYTES)
        if content.endswith(b"\n") or time.monotonic() > deadline:
            return content.decode("utf-8", "replace")
        time.sleep(0.02)


def _check_private(path: Path, found: os.stat_result, *, is_folder: bool) -> None:
    """Raises StartupError if another user owns the file or folder, or may read it."""
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(found.st_mode):
        raise StartupError(f"{path} is no {'folder' if is_folder else 'file'}: remove it, and a new one is made.")
    if os.name != "posix":
        return
    if found.st_uid != os.geteuid():
        raise StartupError(
            f"{path} belongs to another user (id {found.st_uid}), who could know the cluster key: remove it, or set "
            f"{ENV_CLUSTER_KEY} to the output of `{MAKE_KEY_COMMAND}`."
        )
    # Others may list the folder: they cannot read the file in it.
    open_bits = stat.S_IMODE(found.st_mode) & (0o022 if is_folder else 0o077)
    if open_bits:
        remedy = f"chmod 700 {path}" if is_folder else f"remove it and restart all services, or `chmod 600 {path}`"
        can = "write into" if is_folder else "read"
        mode = stat.S_IMODE(found.st_mode)
        raise StartupError(f"Other users can {can} {path} (mode {mode:04o}), where the cluster key lies: {remedy}.")


def _no_follow() -> int:
    return getattr(os, "O_NOFOLLOW", 0)
