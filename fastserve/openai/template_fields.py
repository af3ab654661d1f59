"""Fields of a chat request that say how its messages become a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fastserve.openai.body import Flag, at_most, invalid, join

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of chat templates that other fields set."""


class TemplateFields(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    add_generation_prompt: Flag | None = None
    """Whether the prompt ends with the beginning of the assistant's turn. Default: on, unless the final message is
    continued."""
    continue_final_message: Flag | None = None
    """Whether the answer continues the final message, which must be the assistant's, instead of following it."""
    echo: Flag | None = None
    """Whether the answer begins with the content of the final message, if that is the assistant's."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Jinja template in place of the model's. Refused unless the worker has --trust-request-chat-template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables for the chat template, such as `enable_thinking`."""
    documents: (
        Annotated[list[dict[str, Any]], Field(fail_fast=True), at_most("max_content_parts", "documents")] | None
    ) = None
    """Texts for retrieval-augmented generation, as the chat template reads them; most read `title` and `text`."""

    @field_validator("chat_template_kwargs", mode="after")
    @classmethod
    def _check_names(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in value or {}:
            if name in _OWN_VARIABLES:
                remedy = "The request sets this variable elsewhere: leave it out here, and use the field of that name."
                raise invalid(join("chat_template_kwargs", name), (value or {})[name], remedy)
        return value

    def check_template_fields(self, last_role: str) -> None:
        """Validate combinations of fields. `last_role`: role of the final message."""
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            raise invalid(
                "continue_final_message",
                True,
                "The prompt cannot also end with the beginning of a new turn: leave out add_generation_prompt.",
            )
        if last_role != "assistant":
            raise invalid(
                "continue_final_message",
                True,
                f"The final message is of the role {last_role}; end with an assistant's.",
            )

    def begins_new_turn(self) -> bool:
        """Whether the prompt ends with the beginning of the assistant's turn."""
        if self.continue_final_message:
            return False
        return self.add_generation_prompt is not False


def final_text(messages: Sequence[dict[str, Any]]) -> str:
    """Content of the final message, if it is the assistant's."""
    last = messages[-1]
    return (last.get("content") or "") if last["role"] == "assistant" else ""
