"""Chat templates that put the same texts around messages as those of well-known models, and a tokenizer for them.

What the model writes stands between `{% generation %}` and `{% endgeneration %}`, for transformers to mark it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

_CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# A system message of its own where the data has none.
_SMOLLM2 = (
    """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM.<|im_end|>\\n' }}
{%- endif %}"""
    + _CHATML
)

# Contents lose their blanks; a system message is there in any case.
_LLAMA3 = """
{{- bos_token }}
{%- set given = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + given + '<|eot_id|>' }}
{%- for message in messages if message.role != 'system' %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# The system message stands in the first user's.
_GEMMA = """
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in messages if message.role != 'system' %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
    {{- system if loop.first else '' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<end_of_turn>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim + '<end_of_turn>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# The last answer has a thought, an empty one if need be; answers before it lose theirs.
_QWEN3 = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role != 'assistant' %}
        {{- message.content + '<|im_end|>' }}
    {%- else %}
        {%- set content, thought = message.content, '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}
            {%- if loop.last %}
                {{- '<think>\\n' + thought + '\\n</think>\\n\\n' + content.lstrip('\\n') + '<|im_end|>' }}
            {%- else %}
                {{- content + '<|im_end|>' }}
            {%- endif %}
        {%- endgeneration %}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"chatml": _CHATML, "smollm2": _SMOLLM2, "llama3": _LLAMA3, "gemma": _GEMMA, "qwen3": _QWEN3}


@cache
def _byte_level() -> str:
    """A tokenizer of bytes and some merges, as those models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        [" the answer is what the user asked for, and the question that was asked"] * 4, trainer
    )
    return tokenizer.to_str()


def chat_tokenizer(template: str | None) -> Any:
    """A tokenizer of transformers with one of `TEMPLATES`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level()), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = None if template is None else TEMPLATES[template]
    return tokenizer
