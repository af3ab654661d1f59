from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from fastserve.text.detokenizer import PieceTable, WindowDetokenizer, rule_of_decoder
from fastserve.text.fast_tokenizer import FastTokenizer
from fastserve.text.tokenizer_file import read_tokenizer_file
from tests.text import tiny_tokenizers as tiny

BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": tiny.byte_level,
    "metaspace": tiny.metaspace,
    "sentencepiece": tiny.sentencepiece,
}


@functools.cache
def loaded(name: str) -> FastTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        BUILDERS[name]().save(f"{folder}/tokenizer.json")
        return read_tokenizer_file(Path(folder))


def pieces(tokenizer: FastTokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    out, at = [], 0
    for cut in cuts:
        out.append(detokenizer.push(ids[at : at + cut]))
        at += cut
    out.append(detokenizer.push(ids[at:]))
    out.append(detokenizer.finish())
    return out


cuts_of = st.lists(st.integers(0, 4), max_size=40)


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_of_random_ids_join_to_the_full_text(name: str, data: st.DataObject) -> None:
    tokenizer = loaded(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=60))
    assert "".join(pieces(tokenizer, ids, data.draw(cuts_of))) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_sentencepiece_without_broken_bytes(data: st.DataObject) -> None:
    """Random ids, with byte tokens only in whole characters (invalid bytes differ, see the module)."""
    tokenizer = loaded("sentencepiece")
    plain = [i for i in range(tokenizer.vocab_size) if not 5 <= i < 261]
    character = st.characters(codec="utf-8").map(lambda char: [5 + byte for byte in char.encode()])
    chunks = data.draw(st.lists(st.one_of(character, st.sampled_from(plain).map(lambda i: [i])), max_size=40))
    ids = [token_id for chunk in chunks for token_id in chunk]
    assert "".join(pieces(tokenizer, ids, data.draw(cuts_of))) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), cuts=cuts_of)
def test_text_survives_the_round_trip(name: str, text: str, cuts: list[int]) -> None:
    tokenizer = loaded(name)
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids)
    if name == "byte_level" and not any(special in text for special in tiny.SPECIAL):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_no_piece_ends_inside_a_character(name: str) -> None:
    tokenizer = loaded(name)
    ids = tokenizer.encode("x 😀 世界 🦊", add_special_tokens=False)
    out = pieces(tokenizer, ids, [1] * len(ids))
    assert "".join(out) == "x 😀 世界 🦊"
    assert not any("\ufffd" in piece for piece in out)
    cut = pieces(tokenizer, ids[:-1], [1] * len(ids))
    assert cut[-1] == "\ufffd", "an unfinished character shows at the end only"


def test_special_tokens_are_left_out_and_spaces_kept() -> None:
    tokenizer = loaded("sentencepiece")
    ids = tokenizer.encode("the quick the", add_special_tokens=True)
    assert tokenizer.bos_text == "<s>"
    assert ids[0] == 1
    out = pieces(tokenizer, [*ids, 2], [1] * len(ids))
    assert "".join(out) == "the quick the"
    assert tokenizer.token_bytes(1) == b"<s>"
    assert tokenizer.token_bytes(ids[1]) == b" the"


def test_other_decoders_use_a_window(tmp_path: Path) -> None:
    tiny.word_piece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer_file(tmp_path)
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog", add_special_tokens=False)
    for cuts in ([1] * len(ids), [3, 1, 7], []):
        assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids)
    assert tokenizer.token_bytes(ids[0]) == tokenizer.decode([ids[0]]).encode()


def test_a_window_holds_back_incomplete_characters() -> None:
    tokenizer = loaded("byte_level")
    ids = tokenizer.encode("a 😀 b 🦊", add_special_tokens=False)
    detokenizer = WindowDetokenizer(tokenizer.decode, frozenset())
    out = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.finish()]
    assert "".join(out) == "a 😀 b 🦊"
    assert not any("\ufffd" in piece for piece in out)


@pytest.mark.parametrize(
    ("decoder", "known"),
    [
        (decoders.ByteLevel(), True),
        (decoders.Sequence([decoders.ByteLevel()]), True),
        (decoders.Metaspace(prepend_scheme="never"), True),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), True),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), False),
        (decoders.CTC(), False),
    ],
)
def test_known_decoders(decoder: decoders.Decoder, known: bool) -> None:
    assert (rule_of_decoder(json.loads(decoder.__getstate__())) is not None) == known
    assert rule_of_decoder(None) is None


def test_the_work_is_in_proportion_to_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded("byte_level")
    ids = tokenizer.encode("the quick brown fox " * 200, add_special_tokens=False)
    num_looked_up, num_decoded = 0, 0
    look_up = PieceTable.inner

    def counting(table: PieceTable, token_id: int) -> bytes | None:
        nonlocal num_looked_up
        num_looked_up += 1
        return look_up(table, token_id)

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return tokenizer.decode(token_ids)

    monkeypatch.setattr(PieceTable, "inner", counting)
    for detokenizer in (tokenizer.detokenizer(), WindowDetokenizer(decode, frozenset())):
        assert "".join(detokenizer.push([token_id]) for token_id in ids) == tokenizer.decode(ids)
    assert num_looked_up <= len(ids)
    assert num_decoded <= 20 * len(ids)
