"""Well-known chat formats twice: as Jinja templates, and as plain Python that says which text is whose.

The Python side is the tests' oracle. It never looks at the Jinja side: a style's `chunks` takes the
``(role, text)`` turns of a conversation that the template accepts and returns ``(owner, text)`` pieces, where
owner 0 is scaffolding, 1 prompt and 2 response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Turns = Sequence[tuple[str, str]]
Chunks = list[tuple[int, str]]


@dataclass(frozen=True)
class Style:
    """One chat format."""

    template: str
    chunks: Callable[[Turns], Chunks]
    has_system: bool


def owner(role: str) -> int:
    return 2 if role == "assistant" else 1


def stripped(chunks: Chunks) -> Chunks:
    """Strip the concatenation of chunks as `str.strip` would."""
    whole = "".join(text for _, text in chunks)
    low = len(whole) - len(whole.lstrip())
    high = max(low, len(whole.rstrip()))
    kept, start = [], 0
    for who, text in chunks:
        kept.append((who, text[max(0, low - start) : max(0, high - start)]))
        start += len(text)
    return kept


DEFAULT_SYSTEM = "You are a small and honest helper."

CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for turn in messages -%}"
    "{{ '<|im_start|>' + turn['role'] + '\n' + turn['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def chatml_chunks(turns: Turns) -> Chunks:
    chunks: Chunks = []
    if turns[0][0] != "system":
        chunks.append((0, f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"))
    for role, text in turns:
        chunks += [(0, f"<|im_start|>{role}\n"), (owner(role), text), (0, "<|im_end|>\n")]
    return chunks


LLAMA2 = """
{%- if messages[0].role == 'system' -%}
    {%- set rules = messages[0].content -%}
    {%- set talk = messages[1:] -%}
{%- else -%}
    {%- set talk = messages -%}
{%- endif -%}
{%- for turn in talk -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must go user, assistant, user, assistant, and so on') -}}
    {%- endif -%}
    {%- set said = turn.content -%}
    {%- if loop.first and rules is defined -%}
        {%- set said = '<<SYS>>\\n' + rules + '\\n<</SYS>>\\n\\n' + said -%}
    {%- endif -%}
    {%- if turn.role == 'user' -%}
        {{- bos_token + '[INST] ' + said.strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + said.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


def llama2_chunks(turns: Turns) -> Chunks:
    chunks: Chunks = []
    rules = turns[0][1] if turns[0][0] == "system" else None
    for index, (role, text) in enumerate(turns if rules is None else turns[1:]):
        said: Chunks = [(owner(role), text)]
        if index == 0 and rules is not None:
            said = [(0, "<<SYS>>\n"), (1, rules), (0, "\n<</SYS>>\n\n"), *said]
        opening, closing = ("<s>[INST] ", " [/INST]") if role == "user" else (" ", " </s>")
        chunks += [(0, opening), *stripped(said), (0, closing)]
    return chunks


LLAMA3 = """
{%- if date_string is not defined -%}
    {%- set date_string = strftime_now('%d %b %Y') -%}
{%- endif -%}
{%- set rules = '' -%}
{%- set talk = messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set rules = messages[0].content | trim -%}
    {%- set talk = messages[1:] -%}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + rules + '<|eot_id|>' -}}
{%- for turn in talk -%}
    {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' + turn.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
"""


def llama3_chunks(turns: Turns) -> Chunks:
    rules, talk = ("", turns) if turns[0][0] != "system" else (turns[0][1], turns[1:])
    facts = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    chunks: Chunks = [(0, "<s><|start_header_id|>system<|end_header_id|>\n\n" + facts), (1, rules.strip())]
    for role, text in talk:
        heading = f"<|eot_id|><|start_header_id|>{role}<|end_header_id|>\n\n"
        chunks += [(0, heading), (owner(role), text.strip())]
    return [*chunks, (0, "<|eot_id|>")]


MISTRAL = """
{%- if messages[0].role == 'system' -%}
    {%- set rules = messages[0].content -%}
    {%- set talk = messages[1:] -%}
{%- else -%}
    {%- set talk = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for turn in talk -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('after the optional system message, user and assistant must alternate') -}}
    {%- endif -%}
    {%- if turn.role == 'user' and loop.last and rules is defined -%}
        {{- '[INST] ' + rules + '\\n\\n' + turn.content + '[/INST]' -}}
    {%- elif turn.role == 'user' -%}
        {{- '[INST] ' + turn.content + '[/INST]' -}}
    {%- else -%}
        {{- ' ' + turn.content | trim + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


def mistral_chunks(turns: Turns) -> Chunks:
    chunks: Chunks = [(0, "<s>")]
    for role, text in turns:
        if role == "user":
            chunks += [(0, "[INST] "), (1, text), (0, "[/INST]")]
        else:
            chunks += [(0, " "), (2, text.strip()), (0, "</s>")]
    return chunks


GEMMA = """
{%- if messages[0].role == 'system' -%}
    {{- raise_exception('System role not supported') -}}
{%- endif -%}
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {%- set speaker = 'model' if turn.role == 'assistant' else turn.role -%}
    {{- '<start_of_turn>' + speaker + '\\n' + turn.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
"""


def gemma_chunks(turns: Turns) -> Chunks:
    chunks: Chunks = [(0, "<s>")]
    for role, text in turns:
        speaker = "model" if role == "assistant" else "user"
        chunks += [(0, f"<start_of_turn>{speaker}\n"), (owner(role), text.strip()), (0, "<end_of_turn>\n")]
    return chunks


QWEN3 = """
{%- set spot = namespace(question=0) -%}
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}{%- set spot.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for turn in messages -%}
    {%- set said = turn.content -%}
    {%- if turn.role == 'assistant' -%}
        {%- set thought = '' -%}
        {%- if '</think>' in said -%}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {%- if loop.index0 > spot.question and (loop.last or thought) -%}
            {%- set said = '<think>\\n' + thought + '\\n</think>\\n\\n' + said.lstrip('\\n') -%}
        {%- endif -%}
    {%- endif -%}
    {{- '<|im_start|>' + turn.role + '\\n' + said + '<|im_end|>\\n' -}}
{%- endfor -%}
"""


def qwen3_chunks(turns: Turns) -> Chunks:
    """Thoughts must be ``<think>\\nthought\\n</think>\\n\\nanswer``, or the template rewrites them."""
    question = max((index for index, (role, _) in enumerate(turns) if role == "user"), default=0)
    chunks: Chunks = []
    for index, (role, text) in enumerate(turns):
        chunks.append((0, f"<|im_start|>{role}\n"))
        shows_thought = index > question and index == len(turns) - 1
        if role == "assistant" and "</think>" in text:
            text = text if shows_thought else text.split("</think>")[-1].lstrip("\n")
        elif role == "assistant" and shows_thought:
            chunks.append((0, "<think>\n\n</think>\n\n"))
            text = text.lstrip("\n")
        chunks += [(owner(role), text), (0, "<|im_end|>\n")]
    return chunks


STYLES = {
    "chatml": Style(CHATML, chatml_chunks, has_system=True),
    "llama2": Style(LLAMA2, llama2_chunks, has_system=True),
    "llama3": Style(LLAMA3, llama3_chunks, has_system=True),
    "mistral": Style(MISTRAL, mistral_chunks, has_system=False),
    "gemma": Style(GEMMA, gemma_chunks, has_system=False),
    "qwen3": Style(QWEN3, qwen3_chunks, has_system=True),
}

CONTROL_TOKENS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
