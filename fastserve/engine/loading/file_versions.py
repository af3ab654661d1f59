"""Notices that a model's files are replaced while they are read: half of each version would be a third model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastserve.errors import StartupError

_READ = ("config.json", ".index.json", ".safetensors", ".bin", ".pt", ".gguf")
"""Ends of the names of files that are read."""
_Version = tuple[int, int, int, int] | None


class FileVersions:
    """The versions of all files from which a model is made."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """`paths`: files, and folders with files."""
        self._versions = {
            file: _version(file)
            for path in paths
            for file in (sorted(path.iterdir()) if path.is_dir() else [path])
            if file.name.endswith(_READ)
        }

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises StartupError at the end of the block, also in place of one from within, if a file was replaced,
        changed or removed since the versions were noted."""
        try:
            yield
        except StartupError as error:
            self._require_unchanged(error)
            raise
        self._require_unchanged(None)

    def _require_unchanged(self, cause: StartupError | None) -> None:
        for file, version in self._versions.items():
            if _version(file) != version:
                raise StartupError(
                    f"{file} was changed while the model was loaded, so its weights would be of two versions. Start "
                    "again when nothing writes to the folder."
                ) from cause


def _version(file: Path) -> _Version:
    """Device, inode, size and time of the last change; None if there is no such file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
