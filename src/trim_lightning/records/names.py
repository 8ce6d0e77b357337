"""The names that instruction data gives its fields."""

from __future__ import annotations

import re
from functools import lru_cache

PROMPTS = ("instruction", "prompt", "question", "query", "inputs", "input", "problem", "user", "human", "request")
RESPONSES = ("response", "completion", "output", "answer", "targets", "target", "solution", "assistant", "reply")
CHOSEN, REJECTED, PREFERRED = "chosen", "rejected", "preferred_output"
WORSE_WORDS = {REJECTED, "reject", "non", "dispreferred", "losing", "worse"}
CONVERSATIONS = ("conversations", "messages")
LISTS = ("conversation", "dialogue", "dialog", "chat", "turns", "data", "contents")  # need a list in them
TEXTS = ("text", "content")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
HISTORIES = ("history", "chat_history", "conversation_history")
CONTEXTS = ("context",)
TOOL_FIELDS = ("tools", "functions")
# in the order of preference; the first two are what chat templates know, too
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
THOUGHTS = (*THOUGHT_KEYS, "thoughts", "rationale", "cot", "complex_cot", "chain_of_thought")

# words in the name of a field that make its text look like a part of the conversation
THOUGHT_WORDS = {"reasoning", "rationale", "thinking", "thought", "thoughts", "cot", "explanation"}
ANSWER_WORDS = {*RESPONSES, "outputs", "responses", "answers", "completions", "solutions"}
SPOKEN = {
    *PROMPTS, *THOUGHT_WORDS, *ANSWER_WORDS, *CONVERSATIONS, *LISTS, *TEXTS, *TOOL_FIELDS, CHOSEN, "system", "context",
    "contexts", "history", "instructions", "passage", "passages", "document", "documents", "story", "stories",
    "article", "articles", "message", "questions", "choices", "options", "calls", "refusal",
}  # fmt: skip
UNSPOKEN = {
    *WORSE_WORDS, "original",
    "id", "ids", "source", "score", "scores", "rating", "type", "lang", "language", "len", "length", "num",
    "count", "name", "label", "category", "hash", "sha", "url", "model", "template", "tokens", "key", "index", "date",
    "time", "format", "license",
}  # fmt: skip
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def words_of(name: str) -> set[str]:
    """The words in the name of a field, in small letters."""
    return {word.lower() for word in _WORD.findall(name)}


def is_worse(name: str) -> bool:
    """True for the field of an answer that another one was preferred to."""
    return bool(words_of(name) & WORSE_WORDS)


@lru_cache(maxsize=4096)
def is_spoken(name: str) -> bool:
    """True for a field whose name sounds like a part of a conversation."""
    words = words_of(name)
    return bool(words & SPOKEN) and not words & UNSPOKEN
