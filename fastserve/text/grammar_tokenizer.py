"""A tokenizer as llguidance needs it: the bytes of each token, and how a text is split."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLParserLimits, LLTokenizer

from fastserve.errors import UnsupportedCapabilityError
from fastserve.text.tokenizer import Tokenizer

MAX_STEP_ITEMS = 20_000
"""Items of the parser for one token: about a millisecond of one core."""
_STEP_FUEL = 100_000
"""Work on regular expressions for one token: about 7 ms of one core."""
_MAX_LEXER_STATES = 20_000
"""1 to 2 KB each."""
_MAX_GRAMMAR_SIZE = 100_000
_NUM_BYTES = 256


def parser_limits(fuel: int) -> LLParserLimits:
    """Bounds on what a grammar may cost. `fuel`: work on its regular expressions when it is compiled, about 3,000 for a
    millisecond."""
    return LLParserLimits(
        initial_lexer_fuel=fuel,
        step_lexer_fuel=_STEP_FUEL,
        step_max_items=MAX_STEP_ITEMS,
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=_MAX_GRAMMAR_SIZE,
        verbose_errors=False,
    )


def in_words(reason: str) -> str:
    """llguidance's reason for an error, without the name that it has for a dead end."""
    return reason.replace("NoExtensionBias", "no text matches it from there on")


def require_grammars(tokenizer: Tokenizer, end_token_ids: Sequence[int]) -> None:
    """Raises UnsupportedCapabilityError if answers of a model cannot have a grammar."""
    if not tokenizer.knows_token_bytes:
        raise UnsupportedCapabilityError(
            "Answers of this model cannot be given a schema, regular expression or grammar: its tokenizer does not say "
            "which bytes each token stands for. Leave the format of the answer out."
        )
    if not end_token_ids:
        raise UnsupportedCapabilityError(
            "Answers of this model cannot be given a schema, regular expression or grammar: it has no end token. Leave "
            "the format of the answer out."
        )


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> LLTokenizer:
    """The whole vocabulary, for masks of `vocab_size` tokens. `tokenizer` must know the bytes of its tokens, and there
    must be an end token."""
    known = range(min(vocab_size, tokenizer.vocab_size))
    tokens = [tokenizer.token_bytes(token_id) for token_id in known]
    return _build(_Vocabulary(tokens, tokenizer, end_token_ids), vocab_size, end_token_ids)


def small_grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> LLTokenizer:
    """Bytes and special tokens alone: enough to tell whether a grammar can be compiled, and much faster."""
    tokens = [b""] * min(vocab_size, tokenizer.vocab_size)
    free = (token_id for token_id in range(len(tokens)) if token_id not in tokenizer.special_ids)
    for byte, token_id in zip(range(_NUM_BYTES), free, strict=False):
        tokens[token_id] = bytes([byte])
    for token_id in tokenizer.special_ids:
        if token_id < len(tokens):
            tokens[token_id] = tokenizer.token_bytes(token_id)
    return _build(_Vocabulary(tokens, tokenizer, end_token_ids), vocab_size, end_token_ids)


class _Vocabulary:
    """The attributes that llguidance reads."""

    def __init__(self, tokens: list[bytes], tokenizer: Tokenizer, end_token_ids: Sequence[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = end_token_ids[0]
        self.bos_token_id = None
        # Its end tokens end an answer; a text never contains any.
        special = tokenizer.special_ids | set(end_token_ids)
        self.special_token_ids = sorted(token_id for token_id in special if token_id < len(tokens))
        self.is_tokenizer_wrapper = True
        self._tokenizer = tokenizer
        self._id_of_byte = {token: token_id for token_id, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a text, without a space that some tokenizers put before it."""
        if isinstance(text, bytes):
            text = text.decode()
        wanted = text.encode()
        for before in ("", "\n"):
            begin = len(self._encode(before)) if before else 0
            token_ids = self._encode(before + text)[begin:]
            if b"".join(self.tokens[token_id] for token_id in token_ids) == wanted:
                return token_ids
        return [self._id_of_byte[byte] for byte in map(_one_byte, wanted) if byte in self._id_of_byte]

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return [token_id for token_id in ids if token_id < len(self.tokens)]


def _one_byte(value: int) -> bytes:
    return bytes([value])


def _build(vocabulary: _Vocabulary, vocab_size: int, end_token_ids: Sequence[int]) -> LLTokenizer:
    # The class is the interface: what llguidance declares is a class around another tokenizer.
    return LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=list(end_token_ids))  # type: ignore[arg-type]
