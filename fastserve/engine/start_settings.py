"""The settings with which a worker starts a process of an engine.

They are the process's standard input: a file without a name, which is there for that process alone and is read again
when the process replaces itself. An argument of a command line has room for 128 KiB on Linux, and the paths of
thousands of adapters need more.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import IO, Any, TypeVar

import msgspec

from fastserve.errors import StartupError

SettingsT = TypeVar("SettingsT")


def settings_file(settings: Any) -> IO[bytes]:
    """A file to start a process with; close it then. Raises StartupError when there is no room for it."""
    content = msgspec.json.encode(settings)
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        try:
            file.write(content)
            file.flush()
            file.seek(0)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise StartupError(
            f"The settings of the engine ({len(content)} bytes) cannot be written to a temporary file: {error}. Make "
            "room there, or set TMPDIR to another folder."
        ) from error
    return file


def read_settings(kind: type[SettingsT]) -> SettingsT:
    """The settings of this process."""
    os.lseek(sys.stdin.fileno(), 0, os.SEEK_SET)
    return msgspec.json.decode(sys.stdin.buffer.read(), type=kind)
