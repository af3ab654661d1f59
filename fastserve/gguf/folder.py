"""Makes a model folder from a GGUF file: config.json, tokenizer and chat templates in Hugging Face's layout.

So all code that reads model folders also reads GGUF files. The weights stay in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from fastserve.gguf.configuration import make_config, make_generation_config
from fastserve.gguf.file import Gguf, part_files, read_gguf
from fastserve.gguf.tokenizer import chat_templates, make_tokenizer, make_tokenizer_config
from fastserve.gguf.tokens import read_vocabulary

_NAME = re.compile(r"[\w-]{1,64}")


def model_folder(path: Path, cache: Path) -> Path:
    """The model folder of the GGUF file (or part) `path`, created below `cache` if needed. Removes the folder of an
    earlier file with the same path.

    Raises StartupError when the file cannot be served, and OSError when nothing can be written to `cache`.
    """
    parts = [part.resolve() for part in part_files(path)]
    place = hashlib.sha256(str(parts[0]).encode()).hexdigest()[:16]
    folder = cache / f"{place}-{_identity(parts)}"
    if (folder / "config.json").is_file():
        return folder
    scratch = Path(tempfile.mkdtemp(prefix=f"{place}.", dir=cache))
    try:
        _write(read_gguf(path), scratch)
        try:
            scratch.rename(folder)
        except OSError:
            # Another worker has created it in the meantime.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for other in cache.glob(f"{place}-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _identity(parts: list[Path]) -> str:
    """A key that changes with the files and with the code of this package."""
    digest = hashlib.sha256()
    for part in parts:
        found = part.stat()
        digest.update(f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}\n".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _write(file: Gguf, folder: Path) -> None:
    vocabulary = read_vocabulary(file)
    config = make_config(file, vocabulary)
    templates = chat_templates(file)
    make_tokenizer(file, vocabulary).save(str(folder / "tokenizer.json"), pretty=False)
    for name, value in (
        ("tokenizer_config.json", make_tokenizer_config(file, vocabulary)),
        ("generation_config.json", make_generation_config(file, vocabulary)),
        ("config.json", config),
    ):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
    if "default" in templates:
        (folder / "chat_template.jinja").write_text(templates.pop("default"), encoding="utf-8")
    if templates:
        more = folder / "additional_chat_templates"
        more.mkdir()
        for name, source in templates.items():
            # The name comes from the file and must not be a path.
            if _NAME.fullmatch(name):
                (more / f"{name}.jinja").write_text(source, encoding="utf-8")
