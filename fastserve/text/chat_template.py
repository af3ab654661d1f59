"""Renders messages to a prompt with the model's chat template.

Templates are Jinja programs that come with models, so they run in a sandbox. They are written for the environment of
transformers, which is reproduced here: trimmed blocks, loop controls, `raise_exception`, `strftime_now`, `tojson`
without escapes, the `generation` block, and the special tokens as variables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastserve.errors import FastserveError, InvalidRequestError, StartupError
from fastserve.observability.text import printable
from fastserve.text.model_files import read_json, token_text

Message = dict[str, Any]
MAX_RENDERED_CHARS = 2**26
"""Maximum length of a rendered prompt, unless the model's context sets a lower one."""


class RenderedTooLongError(InvalidRequestError):
    """The rendered prompt has more characters than the caller allows."""

    def __init__(self, num_chars: int) -> None:
        super().__init__(f"The rendered prompt has more than {num_chars} characters.", param="messages")
        self.num_chars = num_chars


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's tokens for training. It has no effect here: its body is rendered."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format_string: str) -> str:
    return datetime.now().strftime(format_string)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """Named templates: "default", and optionally "tool_use" for requests with tools."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, Any]) -> None:
        """Raises StartupError if a template cannot be compiled."""
        environment = _environment()
        self.source = sources.get("default", "")
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise StartupError(f"The chat template '{name}' is wrong in line {error.lineno}: {error}.") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        max_chars: int = MAX_RENDERED_CHARS,
        timeout_s: float = 10.0,
    ) -> str:
        """Render the prompt. `tools`: in OpenAI's format.

        Raises InvalidRequestError if the template refuses the messages or takes longer than `timeout_s`, and
        RenderedTooLongError if the prompt has more than `max_chars` characters.
        """
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        # Many templates fail on an explicit null and expect the key to be missing.
        without_nulls = [{key: value for key, value in message.items() if value is not None} for message in messages]
        pieces = template.generate(
            **self._special_tokens,
            messages=without_nulls,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
        try:
            return _join(pieces, max_chars, timeout_s)
        except FastserveError:
            raise
        # The template comes from the model and the messages from the client: they may raise anything together, and
        # none of it is an error of this process.
        except Exception as error:
            raise InvalidRequestError(
                "The model's chat template could not render these messages: "
                f"{printable(str(error) or type(error).__name__)}.",
                param="messages",
            ) from error


def _join(pieces: Iterable[str], max_chars: int, timeout_s: float) -> str:
    """Join the pieces that a template renders, with limits on their length and on the time."""
    deadline = time.monotonic() + timeout_s
    text, num_chars = [], 0
    for piece in pieces:
        text.append(piece)
        num_chars += len(piece)
        if num_chars > max_chars:
            raise RenderedTooLongError(num_chars)
        if time.monotonic() > deadline:
            raise InvalidRequestError(
                f"The model's chat template took longer than {timeout_s:g} s (--template-timeout-s) to render these "
                "messages. Send fewer or shorter ones.",
                param="messages",
            )
    return "".join(text)


def load_chat_template(folder: Path, override: Path | None = None) -> ChatTemplate | None:
    """The template in `override` (--chat-template), else the model's own, else None.

    Raises StartupError if a file cannot be read or compiled.
    """
    config = read_json(folder / "tokenizer_config.json")
    sources = _own_sources(folder, config) if override is None else {"default": _read_text(override)}
    return ChatTemplate(sources, _special_tokens(folder, config)) if "default" in sources else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StartupError(f"The chat template {path} cannot be read: {error}.") from error


def _own_sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    sources: dict[str, str] = {}
    match config.get("chat_template"):
        case str(source):
            sources["default"] = source
        case list(named):
            sources |= {item["name"]: item["template"] for item in named}
    # Separate files are the newer format and take precedence.
    if (folder / "chat_template.jinja").is_file():
        sources["default"] = _read_text(folder / "chat_template.jinja")
    more = folder / "additional_chat_templates"
    return sources | {path.stem: _read_text(path) for path in sorted(more.glob("*.jinja"))}


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template variables such as bos_token and eos_token."""
    found: dict[str, str] = {}
    for source in (read_json(folder / "special_tokens_map.json"), config):
        for name, value in source.items():
            text = token_text(value)
            if name.endswith("_token") and text is not None:
                found[name] = text
    return found
