"""tokenizer.json and tokenizer_config.json of a GGUF file, from its metadata: the tokens of llama.cpp."""

from __future__ import annotations

import logging
import re
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastserve.errors import StartupError
from fastserve.gguf.file import Gguf
from fastserve.gguf.pre_tokenizers import PRE_TOKENIZERS
from fastserve.gguf.tokens import PREFIX, TokenType, Vocabulary

logger = logging.getLogger(__name__)

_SPACE = "\u2581"
"""A space in sentencepiece's vocabularies."""
_WHOLE = "tokenizer.huggingface.json"
_PHI3_NAME = re.compile(r"phi-?3", re.IGNORECASE)


def make_tokenizer(file: Gguf, vocabulary: Vocabulary) -> Tokenizer:
    """Raises StartupError when its kind is not served, or its parts do not fit together."""
    whole, make = file.metadata.get(_WHOLE), _KINDS.get(vocabulary.kind)
    try:
        if isinstance(whole, str):
            return Tokenizer.from_str(whole)
        if make is not None:
            return make(file, vocabulary)
    except StartupError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"{file.file}: its tokenizer does not fit together: {error}.") from error
    raise StartupError(
        f"{file.file}: its tokenizer is of the kind {vocabulary.kind[:80]!r}; {', '.join(_KINDS)} are served. Put "
        "config.json and the tokenizer of its model beside it."
    )


def make_tokenizer_config(file: Gguf, vocabulary: Vocabulary) -> dict[str, Any]:
    named = {
        "bos_token": vocabulary.text(vocabulary.bos_id),
        "eos_token": vocabulary.text(vocabulary.eos_id),
        "unk_token": vocabulary.text(vocabulary.unknown_id),
        "pad_token": vocabulary.text(vocabulary.pad_id),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "fastserve_complete_file": True,  # llama.cpp's tokens, not those of a class of transformers
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.scalar(f"{file.architecture}.context_length", int),
        **{key: text for key, text in named.items() if text is not None},
    }


def chat_templates(file: Gguf) -> dict[str, str]:
    """Chat templates by name; the main one is "default"."""
    prefix = "tokenizer.chat_template"
    found = {"default": file.scalar(prefix, str)}
    names = file.metadata.get("tokenizer.chat_templates", [])
    for name in names if isinstance(names, list) else []:
        found[str(name)] = file.scalar(f"{prefix}.{name}", str)
    return {name: source for name, source in found.items() if isinstance(source, str)}


def _byte_level(file: Gguf, vocabulary: Vocabulary) -> Tokenizer:
    name = file.scalar(f"{PREFIX}pre", str, "default")
    if f"{PREFIX}pre" not in file.metadata:
        logger.warning("%s does not name its pre-tokenizer: answers may suffer. A newer file has it.", file.file)
    pre_tokenizer = PRE_TOKENIZERS.get(name)
    if pre_tokenizer is None:
        raise StartupError(
            f"{file.file}: its pre-tokenizer {name[:80]!r} is not known here, and another one would make wrong tokens. "
            "Put config.json and the tokenizer of its model beside it."
        )
    merges = file.metadata.get(f"{PREFIX}merges")
    if not isinstance(merges, list):
        raise StartupError(f"{file.file} has no {PREFIX}merges, without which its tokens cannot be found.")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_ids(vocabulary),
            merges=[_pair(str(merge)) for merge in merges],
            ignore_merges=pre_tokenizer.whole_words,
        )
    )
    # ByteLevel comes last and splits nothing, so that the patterns see characters, not bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, file, vocabulary)
    _add_ends(tokenizer, file, vocabulary, bos=pre_tokenizer.adds_bos)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """The two parts of a merge. Spaces inside tokens are encoded, so the first space after the start separates."""
    index = merge.find(" ", 1)
    return merge[:index], merge[index + 1 :]


def _sentencepiece(file: Gguf, vocabulary: Vocabulary) -> Tokenizer:
    ids = _ids(vocabulary)
    has_bytes = TokenType.BYTE in vocabulary.types
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_by_score(vocabulary, ids),
            unk_token=vocabulary.text(vocabulary.unknown_id),
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    prefixed = file.scalar(f"{PREFIX}add_space_prefix", bool, True)
    to_pieces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    to_text: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        # At the start of the text, and after each special token.
        to_pieces.insert(0, normalizers.Prepend(_SPACE))
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(to_pieces)
    tokenizer.decoder = decoders.Sequence(to_text)
    _add_tokens(tokenizer, file, vocabulary)
    _add_ends(tokenizer, file, vocabulary, bos=True)
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Merges in the order of sentencepiece, which joins the pair that makes the piece of the highest score first."""
    if not vocabulary.scores:
        raise StartupError(f"The vocabulary has no {PREFIX}scores, without which its tokens cannot be found.")
    normal = {text for text, kind in zip(vocabulary.texts, vocabulary.types, strict=True) if kind == TokenType.NORMAL}
    found = []
    for token_id, text in enumerate(vocabulary.texts):
        if len(text) < 2 or text not in normal:
            continue
        score = vocabulary.scores[token_id]
        for index in range(1, len(text)):
            left, right = text[:index], text[index:]
            if left in normal and right in normal:
                found.append((-score, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _wordpiece(file: Gguf, vocabulary: Vocabulary) -> Tokenizer:
    """llama.cpp marks tokens that begin a word, Hugging Face those that continue one (##)."""
    ids = {}
    for token_id, text in enumerate(vocabulary.texts):
        if vocabulary.types[token_id] == TokenType.NORMAL:
            text = text.removeprefix(_SPACE) if text.startswith(_SPACE) else f"##{text}"
        ids[text] = token_id
    unknown = vocabulary.text(vocabulary.unknown_id)
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token=unknown or "[UNK]"))
    lowercase = file.scalar(f"{PREFIX}normalizer.lowercase", bool, True)
    accents = file.scalar(f"{PREFIX}normalizer.strip_accents", bool, lowercase)
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=bool(accents), lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    _add_tokens(tokenizer, file, vocabulary)
    _add_ends(tokenizer, file, vocabulary, bos=True, eos=True)
    return tokenizer


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece}


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {text: token_id for token_id, text in enumerate(vocabulary.texts)}


def _add_tokens(tokenizer: Tokenizer, file: Gguf, vocabulary: Vocabulary) -> None:
    """Add special and user-defined tokens, which are split off before pre-tokenization."""
    is_phi3 = _PHI3_NAME.search(file.scalar("general.name", str, "")) is not None
    found = []
    for token_id, kind in enumerate(vocabulary.types):
        special, text = vocabulary.is_special(token_id), vocabulary.texts[token_id]
        if special or kind == TokenType.USER_DEFINED:
            # No key states it, but Phi-3's special tokens include the spaces after them.
            takes_spaces = is_phi3 and special and text not in ("<unk>", "<s>", "<|endoftext|>")
            found.append(AddedToken(text, special=special, normalized=False, rstrip=takes_spaces))
    tokenizer.add_tokens(found)


def _add_ends(tokenizer: Tokenizer, file: Gguf, vocabulary: Vocabulary, *, bos: bool, eos: bool = False) -> None:
    """Set the tokens that encoding adds before and after a text. `bos`, `eos`: defaults for missing keys."""
    before = vocabulary.bos_id if file.scalar(f"{PREFIX}add_bos_token", bool, bos) else None
    last = vocabulary.separator_id if vocabulary.kind == "bert" else vocabulary.eos_id
    after = last if file.scalar(f"{PREFIX}add_eos_token", bool, eos) else None
    ends = {token_id: vocabulary.texts[token_id] for token_id in (before, after) if token_id is not None}
    if not ends:
        return
    start = [ends[before]] if before is not None else []
    end = [ends[after]] if after is not None else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, *start, "$B:1", *end],
        special_tokens=[(text, token_id) for token_id, text in ends.items()],
    )
