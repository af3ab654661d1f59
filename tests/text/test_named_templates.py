"""Chat templates by FastChat's names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.demo import demo_model_path
from fastserve.errors import StartupError
from fastserve.text.chat_template import ChatTemplate, load_chat_template
from fastserve.text.named_templates import NAMED_TEMPLATES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]
RENDERED = {
    "vicuna_v1.1": "Be brief. USER: Hi ASSISTANT: Hello</s>USER: Why? ASSISTANT:",
    "zero_shot": "Be brief.\n### Human: Hi\n### Assistant: Hello\n### Human: Why?\n### Assistant:",
    "one_shot": "Be brief.\n### Human: Hi\n### Assistant: Hello\n### Human: Why?\n### Assistant:",
    "raw": "Be brief.HiHelloWhy?",
    "llama-2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Why? [/INST]",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\nHi [/INST] Hello</s>[INST] Why? [/INST]",
    "alpaca": "Be brief.\n\n### Instruction: Hi\n\n### Response: Hello</s>### Instruction: Why?\n\n### Response:",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "chatglm": "Be brief.\n[Round 0]\n\u95ee\uff1aHi\n\u7b54\uff1aHello\n[Round 1]\n\u95ee\uff1aWhy?\n\u7b54\uff1a",
    "chatglm2": "Be brief.\n\n"
    "[Round 1]\n\n\u95ee\uff1aHi\n\n\u7b54\uff1aHello\n\n[Round 2]\n\n\u95ee\uff1aWhy?\n\n\u7b54\uff1a",
    "chatglm3": "<|system|>\n Be brief.<|user|>\n Hi<|assistant|>\n Hello<|user|>\n Why?<|assistant|>\n ",
    "baichuan2-chat": "Be brief.<reserved_106>Hi<reserved_107>Hello<reserved_106>Why?<reserved_107>",
    "internlm-chat": "Be brief.\n<|User|>:Hi<eoh>\n<|Bot|>:Hello<eoa>\n<|User|>:Why?<eoh>\n<|Bot|>:",
    "zephyr": "<|system|>\nBe brief.</s>\n"
    "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "deepseek-chat": "Be brief.\n\nUser: Hi\n\nAssistant: Hello<\uff5cend\u2581of\u2581sentence\uff5c>"
    "User: Why?\n\nAssistant:",
}
RENDERED |= dict.fromkeys(("qwen-7b-chat", "Yi-34b-chat", "mpt-7b-chat"), RENDERED["chatml"])


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_a_named_template_writes_its_format(name: str) -> None:
    template = ChatTemplate({"default": NAMED_TEMPLATES[name].source}, SPECIAL)
    assert template.render(CHAT) == RENDERED[name]
    without_system = template.render(CHAT[1:])
    assert "Be brief." not in without_system
    assert without_system.endswith(RENDERED[name][-len("Why?") :] if name == "raw" else RENDERED[name][-3:])


def test_it_is_chosen_by_name_and_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(demo_model_path())
    monkeypatch.chdir(tmp_path)
    for template in (
        load_chat_template(model, conversation="vicuna_v1.1"),
        load_chat_template(model, Path("vicuna_v1.1")),
    ):
        assert template is not None
        assert template.render(CHAT) == RENDERED["vicuna_v1.1"]
        assert template.stops == ("</s>",)
    (tmp_path / "vicuna_v1.1").write_text("mine")
    own = load_chat_template(model, Path("vicuna_v1.1"))
    assert own is not None
    assert own.render(CHAT) == "mine"
    with pytest.raises(StartupError, match=r"--conv-template nobody.*chatml"):
        load_chat_template(model, conversation="nobody")
    with pytest.raises(StartupError, match="cannot be read"):
        load_chat_template(model, Path("nobody"))
