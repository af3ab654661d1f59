"""The tokenizer of a model folder, through the `tokenizers` library (tokenizer.json).

transformers' AutoTokenizer would import torch: more than a second and 200 MB in a process that needs neither. A
folder without tokenizer.json is read by `slow_tokenizer`, the one place that does import it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from fastserve.errors import StartupError
from fastserve.text.detokenizer import Detokenizer, PieceDetokenizer, PieceTable, WindowDetokenizer, rule_of_decoder
from fastserve.text.prompt_length import max_token_chars


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_text(self) -> str | None:
        """The text of the token that encoding with special tokens puts first; None when it puts none."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that steer the model and write nothing into an answer."""
        ...

    @property
    def max_token_chars(self) -> int | None:
        """No token stands for more characters of a text than this; None when nothing is known of it."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token writes inside a text; a special token's are its name."""
        ...

    def detokenizer(self) -> Detokenizer: ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; {} when the file is missing. Raises StartupError when it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} is not a JSON object.")
    return value


def token_text(value: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def configured_eos_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens of generation_config.json, or of config.json where that names none."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(item for item in value if isinstance(item, int))
    return ()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Raises StartupError when the folder has no tokenizer that can be read."""
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder)
    from fastserve.text.slow_tokenizer import SlowTokenizer

    return SlowTokenizer(folder, trust_remote_code=trust_remote_code)


class FastTokenizer:
    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{folder / 'tokenizer.json'} cannot be read: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = read_json(folder / "tokenizer_config.json")
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._missing_bos = self._bos_to_add(config)
        self._vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        own_eos = self._id_of(token_text(config.get("eos_token")))
        eos = configured_eos_ids(folder) + (() if own_eos is None else (own_eos,))
        self._eos_token_ids = tuple(dict.fromkeys(eos))
        first = self.encode("", add_special_tokens=True)
        self._bos_text: str | None = self._tokenizer.id_to_token(first[0]) if first else None
        decoder = self._tokenizer.decoder
        rule = None if decoder is None else rule_of_decoder(json.loads(decoder.__getstate__()))
        self._table = None if rule is None else PieceTable(rule, self._tokenizer.id_to_token, self._special_ids)
        self._max_token_chars = max_token_chars(self._tokenizer)

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self._tokenizer.token_to_id(text)

    def _bos_to_add(self, config: dict[str, Any]) -> int | None:
        """tokenizer_config.json may ask for a BOS that tokenizer.json's post-processor does not put."""
        bos = self._id_of(token_text(config.get("bos_token"))) if config.get("add_bos_token") is True else None
        return None if bos is None or bos in self._tokenizer.encode("").ids else bos

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def bos_text(self) -> str | None:
        return self._bos_text

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    @property
    def max_token_chars(self) -> int | None:
        return self._max_token_chars

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Not `encode`: that one holds the interpreter's lock, so that a thread would be no help, and it is slower.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return [self._missing_bos, *ids] if add_special_tokens and self._missing_bos is not None else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return str(self._tokenizer.id_to_token(token_id)).encode()
        if self._table is not None:
            return self._table.inner(token_id) or b""
        return self.decode([token_id]).encode()

    def detokenizer(self) -> Detokenizer:
        if self._table is not None:
            return PieceDetokenizer(self._table)
        return WindowDetokenizer(self.decode, self._special_ids)
