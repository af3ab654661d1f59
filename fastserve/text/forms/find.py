"""The list of forms, and which one a model's chat template teaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastserve.text.forms.deepseek import DeepseekV3, DeepseekV31, DeepseekV32
from fastserve.text.forms.form import Form
from fastserve.text.forms.gemma import FunctionGemma, Gemma4
from fastserve.text.forms.glm4 import Glm4
from fastserve.text.forms.granite import Granite
from fastserve.text.forms.harmony import Harmony, HarmonyParser
from fastserve.text.forms.hermes import Hermes
from fastserve.text.forms.kimi_k2 import KimiK2
from fastserve.text.forms.llama3_json import Llama3Json
from fastserve.text.forms.mistral import Mistral, MistralV11
from fastserve.text.forms.parser import AnswerParser, ParserOptions
from fastserve.text.forms.phi4 import Phi4
from fastserve.text.forms.pythonic import Llama4Pythonic, Pythonic
from fastserve.text.forms.qwen3_coder import Qwen3Coder

FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        # In the order in which templates are searched: a form before those whose marks it has as well.
        *(Harmony(), Qwen3Coder(), Glm4(), KimiK2(), DeepseekV32(), DeepseekV3(), DeepseekV31(), MistralV11()),
        *(Mistral(), FunctionGemma(), Gemma4(), Phi4(), Hermes(), Granite(), Pythonic(), Llama4Pythonic()),
        *(Llama3Json(),),
    )
}
"""By the values of --tool-call-parser."""


def find_form(template: str) -> Form | None:
    """The form whose marks are in a chat template; None if it has those of none."""
    for form in FORMS.values():
        if any(all(text in template for text in group) for group in form.found_by):
            return form
    return None


def make_parser(options: ParserOptions, make_id: Callable[[int], str]) -> AnswerParser:
    return (HarmonyParser if isinstance(options.form, Harmony) else AnswerParser)(options, make_id)
