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
