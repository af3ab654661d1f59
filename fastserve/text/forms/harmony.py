"""gpt-oss: messages on channels. `analysis` is reasoning, a recipient makes a call, all others are text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastserve.text.forms.calls import Calls, json_arguments
from fastserve.text.forms.form import CallGrammar, Form, Function, Mark, Value
from fastserve.text.forms.parser import AnswerParser
from fastserve.text.forms.scanner import NotACallError, Steps
from fastserve.text.grammar import header, nested

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_BODY_ENDS = (*_ENDS, _START, _CHANNEL)
_RECIPIENT = re.compile(r"to=(?:functions\.)?([A-Za-z0-9_.-]+)")
_THOUGHT = "THOUGHT: /(?s:.*)/"
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*([a-z]+)")


class Harmony(Form):
    name = "harmony"
    found_by = ((_CHANNEL, _MESSAGE),)
    openers = (_CHANNEL, _START)
    closers = _ENDS
    inner_marks = (_MESSAGE, _CONSTRAIN)

    def read(self, opener: str, calls: Calls) -> Steps[None]:
        yield from calls.scan.need()  # none: HarmonyParser reads the messages

    def grammar(self, functions: Sequence[Function], mark: Mark, value: Value) -> CallGrammar | None:
        return CallGrammar(
            [
                f'{mark(_CHANNEL)} "commentary to=functions.{function.name} " {mark(_CONSTRAIN)} "json" '
                f"{mark(_MESSAGE)} {value(function.parameters)}"
                for function in functions
            ],
            begin=_analysis(mark),
            rules=(_THOUGHT,),
            is_single=True,
        )


def final_message(grammar: str, mark: Mark) -> str:
    """The grammar of an answer whose final message, after the analysis, has a grammar."""
    final = f'{mark(_CHANNEL)} "final" {mark(_MESSAGE)} answer'
    return f"{header(grammar)}start: {_analysis(mark)} {final}\n{_THOUGHT}\nanswer: {nested(grammar)}\n"


def _analysis(mark: Mark) -> str:
    return f'({mark(_CHANNEL)} "analysis" {mark(_MESSAGE)} THOUGHT {mark("<|end|>")} {mark(_START)} "assistant")?'


class HarmonyParser(AnswerParser):
    """Reads message by message. The prompt ends within the header of the first one."""

    def _run(self) -> Steps[None]:
        scan = self._scan
        self._is_reasoning = self._drops_space = False
        while (yield from scan.peek()):
            scan.hold()
            try:
                is_message = yield from self._read_header()
            except NotACallError:
                is_message = False
            if not is_message:
                held = scan.at if scan.held_from is None else scan.held_from
                self._write(scan.text[held : scan.at])
                scan.release()
            yield from self._scan.take_until(_BODY_ENDS, self._write)
            end = yield from self._scan.take(*_ENDS)
            if not is_message:
                self._write(end)
            self._flush()
            self._is_reasoning = False

    def _read_header(self) -> Steps[bool]:
        """Read a header up to its body; return whether it is one. It begins a call, or says what the body is."""
        scan, calls = self._scan, self._calls
        pieces: list[str] = []
        if not (yield from scan.take(_START, _CHANNEL, " to=", "to=")):
            return False
        scan.at = 0 if scan.held_from is None else scan.held_from
        yield from scan.take(_START)
        while True:
            found = yield from scan.take_until((_MESSAGE, *_ENDS, _START, _CHANNEL), pieces.append)
            if found == _CHANNEL and _CHANNEL not in pieces:
                scan.at += len(found)
                pieces.append(found)
                continue
            break
        if found != _MESSAGE:
            return False
        scan.at += len(_MESSAGE)
        header = "".join(pieces)
        recipients, channel = _RECIPIENT.findall(header), _CHANNEL_NAME.search(header)
        if recipients:
            if not calls.has(recipients[-1]):
                return False
            calls.begin(recipients[-1])
            yield from json_arguments(calls, _BODY_ENDS)
            yield from scan.ends_within(*_ENDS)
            scan.release()
            return True
        scan.release()
        self._is_reasoning = channel is not None and channel[1] == "analysis"
        self._num_calls_before_reasoning = calls.num_begun
        return True

    def _flush(self) -> None:
        if self._space:
            self._put(self._space)
            self._space = ""
