"""The chat template in Python, piece by piece, so that training knows which tokens are the model's own.

It must write exactly what fastserve/demo/model/chat_template.jinja writes; tests/test_demo_model.py compares the two.
"""

import json

from demo_model.data import Message

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

Segment = tuple[str, bool]  # text, and whether the model learns to write it


def tools_text(tools: list[Message]) -> str:
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"# Tools\n\nYou may call these functions:\n<tools>\n{signatures}\n</tools>\n\n"
        "To call a function, answer with its name and arguments as a JSON object within <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def assistant_text(message: Message) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return "\n".join([message["content"]] * bool(message["content"]) + calls)


def segments(messages: list[Message], tools: list[Message]) -> list[Segment]:
    system = [m["content"] for m in messages if m["role"] == "system"]
    if tools:
        system.append(tools_text(tools))
    parts: list[Segment] = []
    if system:
        parts.append((f"{START}system\n" + "\n\n".join(system) + f"{END}\n", False))
    previous = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "user":
            parts.append((f"{START}user\n{message['content']}{END}\n", False))
        elif role == "tool":
            opening = "" if previous == "tool" else f"{START}user"
            follows = index + 1 < len(messages) and messages[index + 1]["role"] == "tool"
            closing = "" if follows else f"{END}\n"
            parts.append((f"{opening}\n<tool_response>\n{message['content']}\n</tool_response>{closing}", False))
        elif role == "assistant":
            parts += [(f"{START}assistant\n", False), (assistant_text(message) + END, True), ("\n", False)]
        previous = role
    return parts


CHAT_TEMPLATE = r"""
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content -%}{{- part.text if part.text is defined else part -}}{%- endfor -%}
    {%- elif content is not none and content is defined -%}
        {{- content | tojson -}}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system='', previous='') -%}
{%- for message in messages if message.role in ('system', 'developer') -%}
    {%- set ns.system = (ns.system ~ '\n\n' if ns.system else '') ~ text(message.content) -%}
{%- endfor -%}
{%- if tools -%}
    {%- set ns.system = (ns.system ~ '\n\n' if ns.system else '') 
        ~ '# Tools\n\nYou may call these functions:\n<tools>' -%}
    {%- for tool in tools -%}
        {%- set ns.system = ns.system ~ '\n' ~ (tool | tojson) -%}
    {%- endfor -%}
    {%- set ns.system = ns.system
        ~ '\n</tools>\n\nTo call a function, answer with its name and arguments as a JSON object '
        ~ 'within <tool_call></tool_call>:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        ~ '</tool_call>' -%}
{%- endif -%}
{%- if ns.system -%}
    {{- '<|im_start|>system\n' ~ ns.system ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages if message.role not in ('system', 'developer') -%}
    {%- if message.role == 'tool' -%}
        {{- ('' if ns.previous == 'tool' else '<|im_start|>user') ~ '\n<tool_response>\n' -}}
        {{- text(message.content) ~ '\n</tool_response>' -}}
        {{- '' if loop.nextitem is defined and loop.nextitem.role == 'tool' else '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set said = text(message.content) -%}
        {{- '<|im_start|>assistant\n' ~ said -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function if call.function is defined else call -%}
            {{- ('\n' if said or not loop.first else '') ~ '<tool_call>\n' -}}
            {{- '{"name": "' ~ function.name ~ '", "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ text(message.content) ~ '<|im_end|>\n' -}}
    {%- endif -%}
    {%- set ns.previous = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()
