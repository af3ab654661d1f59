"""A chat template as a FastChat conversation, with which FastChat's API server renders prompts for our models.

FastChat's API server fetches a conversation from the worker and renders it by itself. With its separator style
NO_COLON_TWO the rule is: system_template.format(system_message), then for message i: roles[i % 2] + text +
(sep, sep2)[i % 2], then the role of the assistant. The values are derived by rendering the chat template with marker
words as messages and splitting the result at them.

The rule cannot express two cases, which `restore` corrects in the rendered prompt: a template that renders nothing for
a missing system message (the rule renders an empty one), and one that renders the beginning of the last answer
differently from that of earlier answers (llama-2 has a space only before the latter).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from fastserve.errors import InvalidRequestError
from fastserve.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

NO_COLON_TWO = 5
_SYSTEM, _USER, _ANSWER, _USER_2, _ANSWER_2 = "zqsystemqz", "zquserqz", "zqanswerqz", "zqsecondqz", "zqreplyqz"
_MARKERS = re.compile("|".join((_SYSTEM, _USER, _ANSWER, _USER_2, _ANSWER_2)))


@dataclass(frozen=True)
class Conversation:
    name: str
    before_system: str = ""
    after_system: str = ""
    no_system: str = ""
    """Text before the first message if there is no system message."""
    default_system: str | None = None
    """The template's default system message, if it renders one for `no_system`."""
    roles: tuple[str, str] = ("", "")
    sep: str = ""
    sep2: str = ""
    before_answer: str = ""
    """Text between the user's last message and the answer to be generated."""
    stop_token_ids: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The conversation in FastChat's JSON format."""
        escaped = [part.replace("{", "{{").replace("}", "}}") for part in (self.before_system, self.after_system)]
        return {
            "name": self.name,
            "system_template": "{system_message}".join(escaped),
            "system_message": self.default_system or "",
            "system_message_vision": "",
            "roles": list(self.roles),
            "messages": [],
            "offset": 0,
            "sep_style": NO_COLON_TWO,
            "sep": self.sep,
            "sep2": self.sep2,
            "stop_str": None,
            "stop_token_ids": list(self.stop_token_ids),
            "max_image_size_mb": None,
        }

    def restore(self, prompt: str) -> str:
        """Correct a prompt rendered by FastChat's rule to what the chat template renders."""
        empty_system = self.before_system + self.after_system
        if empty_system and self.default_system is None and prompt.startswith(empty_system + self.roles[0]):
            prompt = self.no_system + prompt[len(empty_system) :]
        written = self.sep + self.roles[1]
        if written != self.before_answer and prompt.endswith(written):
            prompt = prompt[: len(prompt) - len(written)] + self.before_answer
        return prompt


def derive_conversation(name: str, template: ChatTemplate | None, stop_token_ids: tuple[int, ...]) -> Conversation:
    """Derive the conversation of a template; without a template, messages are separated by newlines.

    If the template does not follow FastChat's rule, the result is an approximation, and a warning is logged.
    """
    if template is None:
        return Conversation(name, sep="\n", sep2="\n", before_answer="\n", stop_token_ids=stop_token_ids)
    try:
        return _probe(name, template, stop_token_ids)
    except InvalidRequestError as error:
        logger.warning("the chat template cannot be expressed for FastChat's API server: %s", error.message)
        return Conversation(name, sep="\n", sep2="\n", before_answer="\n", stop_token_ids=stop_token_ids)


def _probe(name: str, template: ChatTemplate, stop_token_ids: tuple[int, ...]) -> Conversation:
    chat = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _USER_2},
    ]
    no_system, gap, gap2, before_answer = _pieces(template, chat, [_USER, _ANSWER, _USER_2])
    before_system, after_system = _system(template, chat, no_system)
    # Any split of a gap into separator and role gives the same prompt; this one gives readable roles.
    shared = _common_prefix([gap, gap2])
    role = gap[len(shared) :]
    user_role = _common_suffix([gap2[len(shared) :], no_system, after_system])
    _check_long_chat(template, chat, gap, gap2)
    after_system, no_system = after_system.removesuffix(user_role), no_system.removesuffix(user_role)
    return Conversation(
        name=name,
        before_system=before_system,
        after_system=after_system,
        no_system=no_system,
        default_system=_middle(no_system, before_system, after_system),
        roles=(user_role, role),
        sep=gap.removesuffix(role),
        sep2=gap2.removesuffix(user_role),
        before_answer=before_answer,
        stop_token_ids=stop_token_ids,
    )


def _pieces(template: ChatTemplate, messages: list[dict[str, Any]], markers: list[str]) -> list[str]:
    """Texts around the markers. Raises InvalidRequestError unless each marker appears once, in this order."""
    text = template.render(messages)
    if _MARKERS.findall(text) != markers:
        raise InvalidRequestError("it does not write each message once, in order")
    return _MARKERS.split(text)


def _system(template: ChatTemplate, chat: list[dict[str, Any]], no_system: str) -> tuple[str, str]:
    """Text before and after the system message."""
    try:
        before, after, *_ = _pieces(
            template, [{"role": "system", "content": _SYSTEM}, *chat], [_SYSTEM, _USER, _ANSWER, _USER_2]
        )
    except InvalidRequestError as error:
        logger.warning(
            "the chat template takes no system message; FastChat's API server will put it before the first one (%s)",
            error.message,
        )
        return no_system, "\n\n"
    return before, after


def _check_long_chat(template: ChatTemplate, chat: list[dict[str, Any]], gap: str, gap2: str) -> None:
    longer = [*chat, {"role": "assistant", "content": _ANSWER_2}, {"role": "user", "content": _USER}]
    markers = [_USER, _ANSWER, _USER_2, _ANSWER_2, _USER]
    try:
        regular = _pieces(template, longer, markers)[1:5] == [gap, gap2, gap, gap2]
    except InvalidRequestError:
        regular = False
    if not regular:
        logger.warning(
            "the chat template renders later messages differently; prompts of FastChat's API server are approximations"
        )


def _common_prefix(texts: list[str]) -> str:
    shortest = min(texts, key=len)
    for at, char in enumerate(shortest):
        if any(text[at] != char for text in texts):
            return shortest[:at]
    return shortest


def _common_suffix(texts: list[str]) -> str:
    return _common_prefix([text[::-1] for text in texts])[::-1]


def _middle(text: str, before: str, after: str) -> str | None:
    """`text` without the prefix `before` and the suffix `after`; None if it has not both and more."""
    fits = len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if fits else None
