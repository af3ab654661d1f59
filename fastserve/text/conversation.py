"""A chat template told in FastChat's terms, so that FastChat's own API server can write our prompts.

FastChat's API server fetches a conversation from the worker and renders it by itself. With its separator style
NO_COLON_TWO the rule is: system_template.format(system_message), then for message i: roles[i % 2] + text +
(sep, sep2)[i % 2]; last, the role of the assistant. What to fill in is found by rendering the chat template with
marker words for the texts and reading what stands between them.

Two things the rule cannot say, so `restore` mends them in the finished prompt: a template that writes no system part
when there is no system message (the rule always writes one, empty), and one whose text before the answer differs from
the text before an earlier answer (llama-2 puts a space there).
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
    """What stands before the first message when there is no system message."""
    default_system: str | None = None
    """The system message that the template brings itself, where that is how it writes `no_system`."""
    roles: tuple[str, str] = ("", "")
    sep: str = ""
    sep2: str = ""
    before_answer: str = ""
    """What stands between the last message of the user and the answer to be generated."""
    stop_token_ids: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """FastChat's record."""
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
        """A prompt written by FastChat's rule, as the chat template would have written it."""
        empty_system = self.before_system + self.after_system
        if empty_system and self.default_system is None and prompt.startswith(empty_system + self.roles[0]):
            prompt = self.no_system + prompt[len(empty_system) :]
        written = self.sep + self.roles[1]
        if written != self.before_answer and prompt.endswith(written):
            prompt = prompt[: len(prompt) - len(written)] + self.before_answer
        return prompt


def derive_conversation(name: str, template: ChatTemplate | None, stop_token_ids: tuple[int, ...]) -> Conversation:
    """The conversation of a template; of no template, the plain texts one after the other.

    Where the template does not follow FastChat's rule, the result is the nearest form, and a warning is logged.
    """
    if template is None:
        return Conversation(name, sep="\n", sep2="\n", before_answer="\n", stop_token_ids=stop_token_ids)
    try:
        return _probe(name, template, stop_token_ids)
    except InvalidRequestError as error:
        logger.warning("the chat template has no form for FastChat's API server: %s", error.message)
        return Conversation(name, sep="\n", sep2="\n", before_answer="\n", stop_token_ids=stop_token_ids)


def _probe(name: str, template: ChatTemplate, stop_token_ids: tuple[int, ...]) -> Conversation:
    chat = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _USER_2},
    ]
    no_system, gap, gap2, before_answer = _pieces(template, chat, [_USER, _ANSWER, _USER_2])
    before_system, after_system = _system(template, chat, no_system)
    # Any split of a gap into separator and role is right; this one leaves readable roles.
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
    """The texts around the markers. Raises InvalidRequestError when they do not come once each, in this order."""
    text = template.render(messages)
    if _MARKERS.findall(text) != markers:
        raise InvalidRequestError("it does not write each message once, in order")
    return _MARKERS.split(text)


def _system(template: ChatTemplate, chat: list[dict[str, Any]], no_system: str) -> tuple[str, str]:
    """What stands before and after the system message."""
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
        logger.warning("the chat template's turns differ; prompts of FastChat's API server will be close, not equal")


def _common_prefix(texts: list[str]) -> str:
    shortest = min(texts, key=len)
    for at, char in enumerate(shortest):
        if any(text[at] != char for text in texts):
            return shortest[:at]
    return shortest


def _common_suffix(texts: list[str]) -> str:
    return _common_prefix([text[::-1] for text in texts])[::-1]


def _middle(text: str, before: str, after: str) -> str | None:
    """`text` without its two ends, or None when these are not its ends."""
    fits = len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if fits else None
