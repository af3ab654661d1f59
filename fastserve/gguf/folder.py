"""A model folder made of a GGUF file: config.json, tokenizer and chat templates, as Hugging Face's models have them.

With it, everything that reads a model's folder reads a GGUF file. The weights stay in the file.
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
    """The folder of the GGUF file (or part) `path`, which is made below `cache` unless it is there already. One that
    was made of an earlier file at the same place is removed.

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
            # Another worker was faster, and has made the same.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for other in cache.glob(f"{place}-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _identity(parts: list[Path]) -> str:
    """Changes with the files, and with the code that reads them."""
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
            # The name comes from the file, and must not lead anywhere else.
            if _NAME.fullmatch(name):
                (more / f"{name}.jinja").write_text(source, encoding="utf-8")
