"""Marks around the reasoning of each family of models.

Whether an answer begins inside the reasoning follows from the rendered prompt, not from a setting: many templates open
it, and some close it at once where thinking is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningMarks:
    """Marks of one family."""

    begins: tuple[str, ...] = ()
    """Begin reasoning at the start of an answer and after a call."""
    ends: tuple[str, ...] = ()
    anywhere: tuple[str, ...] = ()
    """Begin reasoning anywhere. Only marks that no text has."""
    found_by: Sequence[Sequence[str]] = ()
    """Texts of a chat template by which the family is recognized: all of one group are in it."""

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.begins, *self.ends, *self.anywhere)

    def is_open_after(self, prompt: str, continued: str) -> bool:
        """Whether a rendered prompt ends with the beginning of reasoning, or inside that of the message that it
        continues.
        """
        begun = max((continued.rfind(mark) for mark in (*self.begins, *self.anywhere)), default=-1)
        if begun >= 0:
            return begun > max(continued.rfind(mark) for mark in self.ends)
        return (
            prompt.rstrip(" \t\r\n").endswith((*self.begins, *self.anywhere)) if self.begins or self.anywhere else False
        )


NO_REASONING = ReasoningMarks()
_THINK = ReasoningMarks(("<think>",), ("</think>",))
REASONING: Mapping[str, ReasoningMarks] = {
    "none": NO_REASONING,
    "gpt_oss": ReasoningMarks(found_by=(("<|channel|>", "<|message|>"),)),
    "gemma4": ReasoningMarks(
        ("<|channel>thought\n", "<|channel>thought"),
        ("<channel|>",),
        ("<|channel>thought\n",),
        found_by=(("<|channel>", "<channel|>"),),
    ),
    "mistral": ReasoningMarks(("[THINK]",), ("[/THINK]",), ("[THINK]",), found_by=(("[THINK]", "[/THINK]"),)),
    "granite": ReasoningMarks(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
        found_by=(("my thought process", "my response"),),
    ),
    "qwen3": ReasoningMarks(("<think>",), ("</think>",), found_by=(("<think>", "</think>"), ("</think>",))),
    "deepseek_r1": _THINK,
    "glm": _THINK,
    "kimi_k2": _THINK,
}
"""By the values of --reasoning-parser. gpt_oss: its channels are read by the parser of its form."""


def find_reasoning(template: str) -> str:
    """The name of the family whose marks are in a chat template; "none" without any."""
    for name, marks in REASONING.items():
        if any(all(text in template for text in group) for group in marks.found_by):
            return name
    return "none"
