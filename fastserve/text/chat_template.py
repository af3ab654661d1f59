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
from fastserve.text.named_templates import NAMED_TEMPLATES

Message = dict[str, Any]
NO_VARIABLES: Mapping[str, Any] = {}
_END_OF_CONTENT = "\u2402end of the final message\u2403"
"""Stands at the end of a message's content to find it in the rendered prompt."""
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

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, Any], stops: tuple[str, ...] = ()
    ) -> None:
        """`stops`: texts that end answers besides the model's end tokens. Raises StartupError if a template cannot be
        compiled."""
        self.stops = stops
        environment = _environment()
        self.source = sources.get("default", "")
        self._special_tokens = dict(special_tokens)
        self.source = "\n".join(sources.values())
        """Text of all templates."""
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise StartupError(f"The chat template '{name}' is wrong in line {error.lineno}: {error}.") from error

    def with_source(self, source: str) -> ChatTemplate:
        """Another template with the same special tokens. Raises StartupError if it cannot be compiled."""
        return ChatTemplate({"default": source}, self._special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
        max_chars: int = MAX_RENDERED_CHARS,
        timeout_s: float = 10.0,
    ) -> str:
        """Render the prompt. `tools`: in OpenAI's format. `continue_final_message`: end it after the content of the
        final message. `variables`: further ones for the template.

        Raises InvalidRequestError if the template refuses the messages or takes longer than `timeout_s`, and
        RenderedTooLongError if the prompt has more than `max_chars` characters.
        """
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        # Many templates fail on an explicit null and expect the key to be missing.
        without_nulls = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            last = without_nulls[-1]
            without_nulls[-1] = last | {"content": (last.get("content") or "") + _END_OF_CONTENT}
        own = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        others = {**self._special_tokens, **variables, **own}
        try:
            try:
                text = _join(template.generate(others, messages=without_nulls), max_chars, timeout_s)
            except jinja2.UndefinedError:
                # Templates that know no tools take it for granted that each message has content.
                with_content = [{"content": "", **message} for message in without_nulls]
                if with_content == without_nulls:
                    raise
                text = _join(template.generate(others, messages=with_content), max_chars, timeout_s)
            return _up_to_mark(text) if continue_final_message else text
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


def _up_to_mark(text: str) -> str:
    """The text before the last mark that ends the final message."""
    before, mark, _ = text.rpartition(_END_OF_CONTENT)
    if not mark:
        raise InvalidRequestError(
            "Invalid value for 'continue_final_message': true. The model's chat template does not write the content of "
            "the final message. Leave it out.",
            param="continue_final_message",
        )
    return before


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


def load_chat_template(
    folder: Path, override: Path | None = None, conversation: str | None = None
) -> ChatTemplate | None:
    """The template named `conversation` (--conv-template), else the one in `override` (--chat-template: a file, or
    else such a name), else the model's own, else None.

    Raises StartupError if a file cannot be read or compiled, or there is no template of that name.
    """
    config = read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(folder, config)
    if conversation is None and override is not None and str(override) in NAMED_TEMPLATES and not override.exists():
        conversation = str(override)
    if conversation is not None:
        named = NAMED_TEMPLATES.get(conversation)
        if named is None:
            raise StartupError(
                f"--conv-template {printable(conversation, 80)}: there is no template of that name. Give one of "
                f"{', '.join(sorted(NAMED_TEMPLATES))}, or a file as --chat-template."
            )
        return ChatTemplate({"default": named.source}, special_tokens, named.stops)
    sources = _own_sources(folder, config) if override is None else {"default": _read_text(override)}
    return ChatTemplate(sources, special_tokens) if "default" in sources else None


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
