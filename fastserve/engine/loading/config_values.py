"""Checks the values of config.json before a model is made of them.

A field that is broken (a size of 2**40, a NaN, a list in place of a number) is refused by name. Otherwise the model's
code would allocate what it says, or fail somewhere with a message about something else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from fastserve.errors import StartupError
from fastserve.observability.text import printable

MAX_SIZE = 1 << 24
"""Largest whole number of a field: more than any size, vocabulary or context length of a model."""
_SIZES = ("_size", "_dim", "_heads", "_experts", "_embd", "_head", "_inner", "_positions", "_embeddings")
"""Ends of the names of sizes, which are not negative; with -1 some fields say that there is nothing. Other whole
numbers may be negative, such as those of layers counted from the end."""
_MAX_NUMBER = 1e18
_UNBOUNDED = ("token_id", "token_ids", "token_index", "max_length", "seed")
"""Ends of the names of whole numbers that may be of any size."""
_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config")
"""Fields of composites that hold the configuration of the language model."""


def require_sound_values(stated: Mapping[str, Any], model_dir: str) -> None:
    """Raises StartupError that names the first field with a value that no model has. Fields that the model's
    configuration class does not know have no effect, and may have any value."""
    for name, value, rule in _broken(stated, None):
        raise StartupError(
            f"The configuration in {model_dir} cannot be loaded: {described(name, value)} in its config.json, and must "
            f"be {rule}. Correct it, or download config.json again."
        )


def described(name: str, value: Any) -> str:
    """A field and its value, shortened."""
    return f"{printable(name)} is {printable(json.dumps(value))}"


def largest_size(stated: Mapping[str, Any]) -> str | None:
    """The name of the field with the largest whole number, to which a lack of memory is probably due."""
    sizes = {
        name: value for name, value in stated.items() if _is_whole(value) and not name.endswith((*_UNBOUNDED, "theta"))
    }
    return max(sizes, key=lambda name: sizes[name], default=None)


def _broken(stated: Mapping[str, Any], known: set[str] | None) -> Iterator[tuple[str, Any, str]]:
    kind = stated.get("model_type")
    if kind is not None and not isinstance(kind, str):
        yield "model_type", kind, "a text"
        return
    known = _known_fields(kind) if known is None else known
    for name, value in stated.items():
        if isinstance(value, Mapping):
            if name.startswith("rope"):
                yield from _broken_rope(name, value)
            elif name.endswith(_LANGUAGE_MODELS):
                yield from _broken(value, None)
        elif name in ("dtype", "torch_dtype"):
            if value is not None and not isinstance(value, str):
                yield name, value, "a text or null"
        elif name in known and (rule := _rule_of(name, value)) is not None:
            yield name, value, rule


def _broken_rope(name: str, rope: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """`rope`: the parameters of all layers, or those of each type of layer."""
    for part, value in rope.items():
        where = f"{name}.{part}"
        if part in ("rope_type", "type"):
            if value is not None and not isinstance(value, str):
                yield where, value, "a text"
        elif part == "rope_theta" and isinstance(value, bool | str | list | Mapping):
            yield where, value, "a number"
        elif isinstance(value, Mapping):
            yield from _broken_rope(where, value)
        elif part.endswith("_attention") and value is not None:
            yield where, value, "an object with the parameters of these layers"
        elif (rule := _rule_of(part, value)) is not None:
            yield where, value, rule


def _known_fields(model_type: str | None) -> set[str]:
    """Fields of the configuration class of transformers; none for a model with code of its own."""
    if model_type not in CONFIG_MAPPING:
        return set()
    cls = CONFIG_MAPPING[model_type]
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {field.name for field in fields} | set(cls.attribute_map)


def _rule_of(name: str, value: Any) -> str | None:
    """The rule that a value breaks, in words."""
    if isinstance(value, float) and not abs(value) <= _MAX_NUMBER:
        return f"a number up to {_MAX_NUMBER:g}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if name.endswith(("theta", "base_freq")):
        return None if 1 <= value <= _MAX_NUMBER else f"a number from 1 to {_MAX_NUMBER:g}"
    if name.endswith(("eps", "epsilon")):
        return None if 0 <= value <= 1 else "a number from 0 to 1"
    smallest = -1 if name.endswith(_SIZES) else -MAX_SIZE
    if _is_whole(value) and not name.endswith(_UNBOUNDED) and not smallest <= value <= MAX_SIZE:
        return f"a whole number up to {MAX_SIZE}"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
