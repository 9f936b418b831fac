"""Chat templates as models on the hub have them, in our own words, and their special tokens."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_SENTENCE = {"bos_token": "<s>", "eos_token": "</s>"}

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHATML_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are an assistant named Some.<|im_end|>\n{% endif %}"
    + _CHATML
)
_CHATML_TOOLS = (
    "{% set own = messages[0]['role'] == 'system' %}<|im_start|>system\n"
    "{{ messages[0]['content'] if own else 'You are helpful.' }}"
    "{% if tools %}\n\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>\nAnswer with "
    '<tool_call>{"name": <name>, "arguments": <object>}</tool_call>{% endif %}<|im_end|>\n'
    "{% for m in messages %}{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n"
    "</tool_response><|im_end|>\n{% elif not (loop.first and own) %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set s = '' %}{% set turns = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>"
    "{% for m in turns %}<|start_header_id|>{{ 'ipython' if m['role'] == 'tool' else m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
_INST_TOOLS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{% if tools and loop.last %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] + eos_token }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
_INST_SYSTEM_MARK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}[/SYSTEM_PROMPT]"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
_INST_SYS = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set s = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ (s if loop.first else '') + m['content'] }} [/INST]{% else %} {{ m['content'] }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_TURNS_FOLDED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set s = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ (s if loop.first else '') + m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}"
    "{% set s = 'A talk of a user with a polite assistant.' %}{% set turns = messages %}{% endif %}{{ bos_token + s }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}{% else %}"
    "{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
_FULLWIDTH = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
    "<｜User｜>{{ m['content'] }}{% else %}<｜Assistant｜>{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
_ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
    "### Instruction:\n{{ m['content'] }}{% else %}### Response:\n{{ m['content'] }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)

FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    "chatml": (_CHATML, _SENTENCE),
    "chatml, a system prompt of its own": (
        _CHATML_DEFAULT,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "chatml, tools": (_CHATML_TOOLS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llama 3": (_LLAMA_3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "inst": (_INST, _SENTENCE),
    "inst, tools": (_INST_TOOLS, _SENTENCE),
    "inst, a mark of system prompts": (_INST_SYSTEM_MARK, _SENTENCE),
    "inst, a system prompt in the turn": (_INST_SYS, _SENTENCE),
    "gemma": (_TURNS, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "gemma, a system prompt in the turn": (_TURNS_FOLDED, {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "phi": (_PHI, {"bos_token": "<s>", "eos_token": "<|endoftext|>"}),
    "zephyr": (_ZEPHYR, _SENTENCE),
    "vicuna": (_VICUNA, _SENTENCE),
    "full-width marks": (_FULLWIDTH, {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}),
    "alpaca": (_ALPACA, _SENTENCE),
}
"""Templates and special tokens by name."""
FOLDED = "gemma, a system prompt in the turn"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says {it}.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def rendered(name: str, *messages: dict[str, Any], prompts: bool = True, **more: Any) -> str:
    """Return a conversation in one of `FORMATS`."""
    template, special = FORMATS[name]
    options = {**special, **more, "add_generation_prompt": prompts}
    return render_jinja_template([list(messages)], chat_template=template, **options)[0][0]
