"""Chat templates as five families of models have them, with what the assistant writes marked for transformers."""

from __future__ import annotations

import re

CHATML = """\
{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' }}\
{% if turn.role == 'assistant' %}{% generation %}{{ turn.content + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ turn.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA_3 = """\
{{ bos_token }}{% for turn in messages %}{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' }}\
{% if turn.role == 'assistant' %}{% generation %}{{ turn.content | trim + '<|eot_id|>' }}{% endgeneration %}\
{% else %}{{ turn.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """\
{{ bos_token }}{% for turn in messages %}\
{% if turn.role == 'user' %}{{ '[INST] ' + turn.content + ' [/INST]' }}\
{% elif turn.role == 'assistant' %}{% generation %}{{ turn.content + eos_token }}{% endgeneration %}\
{% else %}{{ raise_exception('only user and assistant speak here') }}{% endif %}{% endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}\
{% for turn in messages %}{% if turn.role == 'assistant' %}{{ '<start_of_turn>model\n' }}\
{% generation %}{{ turn.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}\
{% else %}{{ '<start_of_turn>' + turn.role + '\n' + turn.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

ZEPHYR = """\
{% for turn in messages %}{{ '<|' + turn.role + '|>\n' }}\
{% if turn.role == 'assistant' %}{% generation %}{{ turn.content + eos_token }}{% endgeneration %}\
{% else %}{{ turn.content + eos_token }}{% endif %}{{ '\n' }}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""

MARKED = {
    "chatml": (CHATML, ("<s>", "<|im_start|>", "<|im_end|>")),
    "llama-3": (LLAMA_3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": (MISTRAL, ("<s>", "</s>")),
    "gemma": (GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")),
    "zephyr": (ZEPHYR, ("<s>", "</s>")),
}
"""Each with the special tokens of its family, the one that ends a text last."""


def unmarked(template: str) -> str:
    """The template as its models carry it: with nothing that says what the assistant wrote."""
    return re.sub(r"\{% (end)?generation %\}", "", template)


QWEN_TOOLS = """\
{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}\
{% endif %}{{ '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}\
{{ '\n</tools><|im_end|>\n' }}{% elif messages[0].role == 'system' %}\
{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}\
{% for turn in messages %}{% if turn.role == 'user' %}{{ '<|im_start|>user\n' + turn.content + '<|im_end|>\n' }}\
{% elif turn.role == 'assistant' and not turn.tool_calls %}{{ '<|im_start|>assistant\n' }}\
{% generation %}{{ turn.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% elif turn.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}\
{% if turn.content %}{{ turn.content + '\n' }}{% endif %}{% for call in turn.tool_calls %}\
{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}\
{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% elif turn.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + turn.content }}\
{{ '\n</tool_response><|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA_3_TOOLS = """\
{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n' }}\
{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}\
{% for turn in messages %}{% if turn.role == 'assistant' and 'tool_calls' in turn %}\
{% if turn.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}\
{% set call = turn.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\
{% generation %}{{ '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}\
{% endgeneration %}{% elif turn.role == 'tool' %}\
{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (turn.content | tojson) + '<|eot_id|>' }}\
{% else %}{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' }}{% if turn.role == 'assistant' %}\
{% generation %}{{ turn.content | trim + '<|eot_id|>' }}{% endgeneration %}\
{% else %}{{ turn.content | trim + '<|eot_id|>' }}{% endif %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL_TOOLS = """\
{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}\
{% for turn in messages %}{% if turn.role == 'user' %}{{ '[INST] ' + turn.content + '[/INST]' }}\
{% elif turn.tool_calls is defined and turn.tool_calls is not none %}{% generation %}{{ '[TOOL_CALLS] [' }}\
{% for call in turn.tool_calls %}{{ call.function | tojson }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}\
{{ ']' + eos_token }}{% endgeneration %}{% elif turn.role == 'assistant' %}\
{% generation %}{{ turn.content + eos_token }}{% endgeneration %}\
{% elif turn.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + (turn.content | tojson) + '}[/TOOL_RESULTS]' }}\
{% endif %}{% endfor %}"""

CALLING = {
    "qwen": (QWEN_TOOLS, ("<s>", "<|im_start|>", "<|im_end|>")),
    "llama-3": (LLAMA_3_TOOLS, MARKED["llama-3"][1]),
    "mistral": (MISTRAL_TOOLS, ("<s>", "</s>")),
}
"""Families whose templates write calls of tools."""
