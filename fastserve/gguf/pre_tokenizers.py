"""How byte-level tokenizers split a text before BPE, by the name in `tokenizer.ggml.pre`.

The patterns are those that the models were trained with. Several patterns are applied in order, each to the pieces that
the one before it has left.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
"""A word may begin with one character that is neither a letter nor a digit."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"\p{L}") -> str:
    """Llama 3's pattern and its variants."""
    inside = letters if letters == r"\p{L}" else rf"[{letters}]"
    return rf"{_CONTRACTIONS}|{_BEFORE}{inside}+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(digits: str, suffix: str = "") -> str:
    """The pattern that also splits words where an upper-case letter follows a lower-case one."""
    return (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{suffix}|{_BEFORE}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    patterns: tuple[str, ...]
    whole_words: bool = False
    """A piece that is in the vocabulary becomes that token, without merges."""
    adds_bos: bool = False
    """Whether BOS is added when the metadata does not say so."""


_ONE_DIGIT, _THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
_IN_THREES = r"[0-9][0-9][0-9]"
_CJK = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

_KINDS: dict[PreTokenizer, str] = {
    PreTokenizer((_words(_THREE_DIGITS),), whole_words=True, adds_bos=True): (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0"
    ),
    PreTokenizer((_words(_THREE_DIGITS),)): "dbrx smaug-bpe",
    PreTokenizer((_words(_THREE_DIGITS),), whole_words=True): "glm4 chatglm-bpe glm5",
    PreTokenizer((_words(_ONE_DIGIT),)): "qwen2 deepseek-r1-qwen hunyuan megrez stablelm2 solar-open grok-2",
    PreTokenizer((_words(_ONE_DIGIT, r"\p{L}\p{M}"),)): "qwen35",
    PreTokenizer((_cased(_ONE_DIGIT),), whole_words=True, adds_bos=True): "tekken",
    PreTokenizer((_cased(_THREE_DIGITS, rf"{_CONTRACTIONS}?"),)): "gpt-4o llama4 minimax-m2 kanana2",
    PreTokenizer((_GPT2,)): (
        "gpt-2 phi-2 mpt olmo jais exaone4 gigachat modern-bert trillion granite-docling jina-es jina-de jina-v2-es "
        "jina-v2-de jina-v2-code roberta-bpe"
    ),
    PreTokenizer((_ONE_DIGIT, _GPT2)): "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _IN_THREES)): "falcon",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _IN_THREES)): "default",
    PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", _ONE_DIGIT)
    ): "deepseek-coder",
    PreTokenizer((_THREE_DIGITS, _CJK, _DEEPSEEK_V3)): "deepseek-v3 hunyuan-dense joyai-llm",
}  # fmt: skip

PRE_TOKENIZERS = {name: kind for kind, names in _KINDS.items() for name in names.split()}
