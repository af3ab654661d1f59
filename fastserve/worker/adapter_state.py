"""Adapters that administrators' calls loaded and unloaded, in a file, so that they outlive a restart of the worker."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from fastserve.errors import StartupError
from fastserve.observability.private_files import reason, replace_file
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 2**26


class CalledAdapters(msgspec.Struct, frozen=True):
    """The outcome of all calls, beside the adapters of flags and of `--lora-root`."""

    loaded: dict[str, str] = {}
    """Path or repository id as given, by name."""
    unloaded: list[str] = []
    """Names that flags or `--lora-root` would serve."""


class AdapterState:
    """Blocks; its methods are for threads, one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError if there is no folder for the file."""
        if not path.parent.is_dir():
            raise StartupError(f"--lora-state-file {printable(str(path))}: there is no folder {path.parent}.")
        self._path = path

    def read(self) -> CalledAdapters:
        """Empty if there is no file. One that cannot be read is logged, and no reason not to start."""
        try:
            with self._path.open("rb") as file:
                return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=CalledAdapters)
        except FileNotFoundError:
            return CalledAdapters()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            logger.warning(
                "%s cannot be read (%s): adapters that were loaded by call are not served again.", self._path, why
            )
            return CalledAdapters()

    def write(self, adapters: CalledAdapters) -> None:
        """A file that cannot be written is logged."""
        try:
            replace_file(self._path, msgspec.json.encode(adapters).decode() + "\n")
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): adapters that were loaded by call will not outlive a restart of this "
                "worker.",
                self._path,
                reason(error),
            )
