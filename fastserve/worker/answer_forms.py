"""How a model's chats are parsed and constrained: its form of tool calls and the marks of its reasoning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastserve.engine.contract import ThinkingBudget
from fastserve.errors import UnsupportedParameterError
from fastserve.openai.chat import ChatRequest
from fastserve.openai.tools import ToolUse
from fastserve.text.forms.find import FORMS, find_form, make_parser
from fastserve.text.forms.form import Form, Function
from fastserve.text.forms.harmony import Harmony, final_message
from fastserve.text.forms.hermes import Hermes
from fastserve.text.forms.parser import AnswerParser, ParserOptions
from fastserve.text.grammar import (
    after_reasoning,
    header,
    json_value,
    literal,
    nested,
    single_token,
    text_without,
    unforced_if_long,
)
from fastserve.text.reasoning import NO_REASONING, REASONING, find_reasoning
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import OutputOptions

_ID_CHARS = 24
_FORCED: Form = Hermes()
"""Form of calls that must come, where the model's own cannot be described by a grammar."""
_GPT_OSS = "gpt_oss"
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_PLAIN_KEYWORDS = frozenset(
    {"$comment", "$defs", "$schema", "default", "definitions", "description", "examples", "properties", "required"}
    | {"title", "type"}
)
"""Keywords of an object's schema that ask for no property beside `properties`."""


@dataclass(frozen=True)
class AnswerForm:
    """How the answers of one request are written, parsed and constrained."""

    output: OutputOptions
    grammar: str
    thinking: ThinkingBudget | None
    counts_reasoning: bool


class AnswerForms:
    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        """`template`: source of the chat template, by whose marks the forms are found where no parser is given."""
        self._tokenizer = tokenizer
        self.form = find_form(template) if tool_call_parser is None else FORMS[tool_call_parser]
        name = find_reasoning(template) if reasoning_parser is None else reasoning_parser
        self._reads_channels = name == _GPT_OSS
        self._reasoning = REASONING[name]

    def of(
        self,
        request: ChatRequest,
        use: ToolUse | None,
        prompt: str,
        continued: str,
        request_id: str,
        output: OutputOptions,
        grammar: str,
    ) -> AnswerForm:
        """The form of a request's answers. `prompt`: as rendered; `continued`: the message that the answer continues;
        `output` and `grammar`: without tools and reasoning. Raises UnsupportedParameterError.
        """
        thinking = None
        reasoning = NO_REASONING if request.separate_reasoning is False else self._reasoning
        is_open = reasoning.is_open_after(prompt, continued)
        form = None if use is None else self._form_of(use)
        if grammar and self._reads_channels:
            grammar = final_message(grammar, self._mark)
        if use is not None and form is not None:
            grammar = self._call_grammar(use, form, grammar)
        if grammar or request.thinking_token_budget is not None:
            starts_open = self._reasoning.is_open_after(prompt, continued)
            grammar = self._with_reasoning(request.thinking_token_budget, grammar, form, starts_open)
            thinking = self._thinking(request.thinking_token_budget, starts_open)
        if form is None and self._reads_channels and request.separate_reasoning is not False:
            form = FORMS[Harmony.name]
        if form is None and reasoning is NO_REASONING:
            return AnswerForm(output, grammar, thinking, counts_reasoning=False)
        options = ParserOptions(
            form,
            {} if use is None else {function.name: function.parameters for function in use.functions},
            reasoning,
            starts_in_reasoning=is_open,
            max_calls=None if use is None or use.is_parallel else 1,
            includes_reasoning=request.include_reasoning is not False,
        )
        marks = (*reasoning.all, *(() if form is None else form.marks))
        return AnswerForm(
            replace(
                output,
                parser=_factory(options, request_id, 0 if form is None else form.id_length),
                mark_ids=self._mark_ids(marks) if output.skip_special_tokens else frozenset(),
                calls_finish_reason=_calls_finish_reason(use),
            ),
            grammar,
            thinking,
            counts_reasoning=reasoning is not NO_REASONING or isinstance(form, Harmony),
        )

    def _form_of(self, use: ToolUse) -> Form:
        form = self.form
        if form is None:
            if not use.is_required:
                raise UnsupportedParameterError(
                    "'tools' is not supported by this model: its chat template has no known form of calls. Leave it "
                    "out, or ask whoever runs this server to start the worker with --tool-call-parser.",
                    param="tools",
                )
            return _FORCED
        return _FORCED if use.is_required and self._rules(use, form) is None else form

    def _rules(self, use: ToolUse, form: Form) -> str | None:
        enforced = {one.name for one in use.enforced}
        functions = [
            Function(one.name, {**_ANY_OBJECT, **(_closed(one.parameters) if one.name in enforced else {})})
            for one in use.functions
        ]
        rules = form.grammar(functions, self._mark, json_value)
        return None if rules is None else unforced_if_long(rules.lark(is_parallel=use.is_parallel))

    def _call_grammar(self, use: ToolUse, form: Form, text: str = "") -> str:
        """The grammar of an answer with calls, or of `text` (empty: any) where none must come; empty: any answer."""
        rules = self._rules(use, form)
        if use.is_required:
            return rules or ""
        if text:
            calls = self._any_call(form) if rules is None else rules
            start = f"{header(calls, text)}start: calls | answer\n"
            return f"{start}calls: {nested(calls)}\nanswer: {nested(text)}\n"
        if rules is None or form.start_openers or not use.enforced:
            return ""
        start = f"{header(rules)}start: TEXT (calls TEXT)?\n"
        return f"{start}calls: {nested(rules)}\nTEXT: {text_without(form.openers)}\n"

    def _any_call(self, form: Form) -> str:
        """The grammar of what begins like a call, for forms without a grammar."""
        openers = " | ".join(map(self._mark, form.openers))
        return f"start: ({openers}) any\nany: {nested(self._any_text())}\n"

    def _mark(self, text: str) -> str:
        """Lark expression for a mark: its token, also one that is not special, or else its text."""
        token_id = single_token(text, self._tokenizer)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def _with_reasoning(self, budget: int | None, grammar: str, form: Form | None, is_open: bool) -> str:
        """The grammar of answers that may begin with reasoning. `grammar`: of what follows; empty: any text."""
        reasoning = self._reasoning
        form = self.form if form is None and budget is not None else form
        if budget is not None and self._reads_channels:
            raise UnsupportedParameterError(
                "'thinking_token_budget' is not supported by this model, whose channels have no end to force. Give "
                "reasoning_effort in its place.",
                param="thinking_token_budget",
            )
        if not reasoning.begins:
            return grammar
        return after_reasoning(
            grammar or self._any_text(),
            self._tokenizer,
            begin=reasoning.begins[0],
            end=reasoning.ends[0],
            is_open=is_open,
            max_tokens=budget,
            # A call ends the reasoning, and would escape the grammar.
            excluded=form.openers if form is not None and form.ends_reasoning else (),
        )

    def _thinking(self, budget: int | None, is_open: bool) -> ThinkingBudget | None:
        """The budget of reasoning, where its end is several tokens, which the grammar cannot force."""
        marks = self._reasoning
        if budget is None or not marks.begins or single_token(marks.ends[0], self._tokenizer) is not None:
            return None
        return ThinkingBudget(budget, () if is_open else marks.begins, marks.ends)

    def _any_text(self) -> str:
        """The grammar of any text, with the marks of calls."""
        ids = sorted(self._mark_ids(() if self.form is None else self.form.marks))
        marks = "".join(f" | <[{token_id}]>" for token_id in ids)
        return f"start: (TEXT{marks})*\nTEXT: /(?s:.+)/\n"

    def _mark_ids(self, marks: Sequence[str]) -> frozenset[int]:
        """Special tokens that are marks, or that begin or end one."""
        names = ((token_id, self._tokenizer.token_bytes(token_id)) for token_id in self._tokenizer.special_ids)
        encoded = [text.encode() for text in marks]
        return frozenset(token_id for token_id, name in names if any(name in text for text in encoded))


def _closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema without properties that it does not name: small models invent one after the other and never end.

    Only where no other keyword can ask for such a property; what the schema says of it stays.
    """
    named = parameters.get("properties")
    required = parameters.get("required", ())
    if not (parameters.keys() <= _PLAIN_KEYWORDS and isinstance(named, Mapping) and isinstance(required, list | tuple)):
        return parameters
    names = list(named)
    return {**parameters, "additionalProperties": False} if all(name in names for name in required) else parameters


def _factory(options: ParserOptions, request_id: str, id_length: int) -> Callable[[int], AnswerParser]:
    def make(choice: int) -> AnswerParser:
        return make_parser(options, lambda number: _call_id(f"{request_id}/{choice}/{number}", id_length))

    return make


def _call_id(seed: str, length: int) -> str:
    """The same for the same request, choice and number of the call, so that a repeated answer is the same."""
    digest = hashlib.sha256(seed.encode()).hexdigest()
    return digest[:length] if length else f"call_{digest[:_ID_CHARS]}"


def _calls_finish_reason(use: ToolUse | None) -> str:
    if use is None:
        return "stop"
    if use.is_old:
        return "function_call"
    return "stop" if use.is_named else "tool_calls"
