"""`system_fingerprint` of an answer: the identity of what computed it.

It is made of the model's files, their dtype and quantization, the version of the weights, and the adapter's name and
files. So it is the same on all workers with the same files, and changes with anything that changes the tokens. Of large
files only samples are read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from fastserve.config import WorkerConfig
from fastserve.engine.contract import EngineInfo

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
CONFIGURATIONS = ("config.json", "adapter_config.json")
NUM_SAMPLES = 32
SAMPLE_BYTES = 4096
"""Each weight matrix of a model that was trained further differs, so any sample of it does."""
_NUM_DIGITS = 16


def files_digest(paths: Iterable[Path]) -> str:
    """Digest of the configurations and weights in these folders, and of these files. Files that cannot be read count by
    their names.
    """
    digest = hashlib.sha256()
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(one for one in path.iterdir() if one.suffix in WEIGHTS or one.name in CONFIGURATIONS)
        for file in files:
            digest.update(file.name.encode(errors="surrogateescape") + b"\0")
            try:
                _add_samples(digest.update, file)
            except OSError as error:
                logger.warning("%s is not part of the system_fingerprint: %s", file, error)
    return digest.hexdigest()


def _add_samples(update: Callable[[bytes], object], file: Path) -> None:
    """The file's size, and its content if it is short, else samples from its beginning to its end."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        update(size.to_bytes(8, "little"))
        if size <= NUM_SAMPLES * SAMPLE_BYTES:
            update(opened.read(size))
            return
        for number in range(NUM_SAMPLES):
            opened.seek((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
            update(opened.read(SAMPLE_BYTES))


def model_digest(paths: Iterable[Path], config: WorkerConfig, info: EngineInfo) -> str:
    """Identity of the base model, with its dtype and quantization."""
    quantization = (
        *(config.load_8bit, config.load_4bit, config.dummy),
        *(config.gptq_wbits, config.gptq_groupsize, config.awq_wbits, config.awq_groupsize),
    )
    checkpoints = [Path(path) for path in (config.gptq_ckpt, config.awq_ckpt) if path is not None]
    return "\n".join((files_digest([*paths, *checkpoints]), info.architecture, info.dtype, repr(quantization)))


class Fingerprints:
    """For threads too."""

    def __init__(
        self, model_digest: str, weight_version: Callable[[], str], adapter_digest: Callable[[str], str]
    ) -> None:
        """`adapter_digest` gives the digest of an adapter's files by its name."""
        self._model_digest = model_digest
        self._weight_version = weight_version
        self._adapter_digest = adapter_digest

    def of(self, adapter: str) -> str:
        """The fingerprint of answers of an adapter, or with "" of the bare base model."""
        parts = [self._model_digest, self._weight_version()]
        if adapter:
            parts += [adapter, self._adapter_digest(adapter)]
        return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_NUM_DIGITS]
