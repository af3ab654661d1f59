"""The tokenizer: byte-level BPE, learnt from a sample of the data.

Copying decides how text is cut. Each digit is a token, so that a sum is worked out digit by digit. A small word carries
the space behind it and a capitalised word none, so that words have the same tokens wherever they are repeated: after
"Say: " and at the start of an answer, in a question and in a JSON string.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_model.chat import CHAT_TEMPLATE, END, PAD, START, TOOL_MARKS, segments
from demo_model.data import SEED, make_exchange, make_system, sample_tools
from demo_model.words import CITIES, NAMES, WORDS

VOCAB_SIZE = 2048
CONTEXT_LENGTH = 2048
PIECES = r"\d|[\p{Ll}\p{Lo}\p{M}]+ ?|\p{Lu}+[\p{Ll}\p{M}]*| ?[^\s\p{L}\p{M}\p{N}]+|\s|\p{N}|\p{L}"


def sample_texts(num_conversations: int = 20000) -> Iterator[str]:
    rng = Random(SEED)
    for word in WORDS * 20:
        yield f"{word} {word}"
    yield from (*NAMES, *CITIES) * 20
    for _ in range(num_conversations):
        tools = sample_tools(rng) if rng.random() < 0.2 else []
        messages = [make_system(rng)] if rng.random() < 0.3 else []
        messages += make_exchange(rng, tools)
        text = "".join(text for text, _ in segments(messages, tools))
        for mark in (START, END, *TOOL_MARKS):
            text = text.replace(mark, "\n")
        yield text


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TOOL_MARKS),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=5,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOOL_MARKS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
