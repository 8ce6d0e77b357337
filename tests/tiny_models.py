"""Tiny random language models of real transformers classes, a tokenizer for them, and small JSONL pools.

Everything is made from code and a seed in well under a second: no test needs a network or a model file.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ARCHITECTURES = ("llama", "mistral", "qwen2", "opt", "opt_projected", "gemma3")
HIDDEN = 32
WINDOW = 12
START, END, PAD = "<|im_start|>", "<|im_end|>", "<pad>"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "Be brief."
CHATML_WITH_SYSTEM = (
    f"{{% if messages[0]['role'] != 'system' %}}{START}system\n{DEFAULT_SYSTEM}{END}\n{{% endif %}}" + CHATML
)

_SENTENCES = {
    "arithmetic": (
        "add the numbers three and four then divide by two what is total sum of apples each box holds 12 "
        "eggs so 7 plus 5 equals 12. how many coins remain? subtract 9 from 30, answer: 21"
    ),
    "travel": (
        "train leaves Vienna before sunrise; passengers buy tickets near harbour while quiet ferries cross "
        "foggy bays! maps show every village, bridge & mountain road (north-west) until journey's end."
    ),
    "cooking": (
        "whisk butter with sugar, fold flour gently, bake until golden brown; serve warm alongside vanilla "
        "yoghurt / crème fraîche. keep knives sharp? always! jalapeño soup simmers quickly over flame"
    ),
}
# Runs of newlines and blanks are merged into tokens, so that one token can straddle template and content.
_BLANKS = "user\n   one\n\n\ntwo\n  three\n\n\nfour"


def build_tiny_tokenizer(*, chat_template: str | None = CHATML, vocab_size: int = 360) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences; it can tokenise any text.

    Args:
        chat_template: The Jinja chat template, or None for a tokenizer without one.
        vocab_size: Number of token classes; 256 bytes and 3 special tokens are always among them.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*_SENTENCES.values()] * 3 + [_BLANKS] * 12, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(architecture: str, tokenizer: PreTrainedTokenizerFast, layers: int = 4) -> PreTrainedConfig:
    """The config of a tiny model: 4 layers unless said otherwise (gemma3: 6), 4 heads, hidden 32, 512 positions.

    ``opt_projected`` has embeddings of width 16, which OPT projects to and from the hidden width.

    Raises:
        ValueError: for an architecture that is not in ``ARCHITECTURES``.
    """
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    grouped: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 48}
    if architecture == "llama":
        return LlamaConfig(**shared, **grouped)
    if architecture == "mistral":
        return MistralConfig(**shared, **grouped, sliding_window=WINDOW)
    if architecture == "qwen2":
        return Qwen2Config(**shared, **grouped)
    if architecture == "opt":
        return OPTConfig(**shared, ffn_dim=48)
    if architecture == "opt_projected":
        return OPTConfig(**shared, ffn_dim=48, word_embed_proj_dim=HIDDEN // 2)
    if architecture == "gemma3":
        pattern = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        special = {"num_hidden_layers": 6, "head_dim": 8, "query_pre_attn_scalar": 8}
        return Gemma3TextConfig(**shared | grouped | special, sliding_window=WINDOW, layer_types=pattern)
    raise ValueError(f"no tiny model of architecture {architecture!r}: use one of {', '.join(ARCHITECTURES)}")


def build_tiny_model(
    architecture: str,
    directory: str | Path,
    *,
    seed: int = 0,
    chat_template: str | None = CHATML,
    layers: int = 4,
) -> Path:
    """Save a random model and its tokenizer where ``from_pretrained`` finds them.

    Matrices are drawn with standard deviation 0.2, so attention is far from uniform; biases and the scales of
    norms are moved off their neutral values, so that a forgotten norm or bias shows.

    Args:
        architecture: One of ``ARCHITECTURES``.
        directory: Made if it is missing; files there are overwritten.
        seed: Seed of the weights. The global random state is left as it was.
        chat_template: As in `build_tiny_tokenizer`.
        layers: Number of layers; gemma3 has 6 whatever this says.

    Returns:
        ``directory``.

    Raises:
        ValueError: for an unknown architecture.
    """
    directory = Path(directory)
    tokenizer = build_tiny_tokenizer(chat_template=chat_template)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, tokenizer, layers), dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=draw)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_records(
    path: str | Path,
    n: int,
    seed: int,
    *,
    topics: tuple[str, ...] = ("arithmetic", "travel", "cooking"),
    prompt_words: tuple[int, int] = (2, 14),
    response_words: tuple[int, int] = (1, 30),
    edge_cases: bool = True,
    groups: tuple[str, ...] = (),
) -> list[dict[str, str]]:
    """Write a JSONL file of ``id``, ``prompt``, ``response`` records of varied lengths.

    Args:
        path: File to write.
        n: Number of records, at least 10 with edge cases.
        seed: Seed of the draws; the same arguments give the same bytes.
        topics: Word lists to draw from: arithmetic, travel, cooking. A record has one topic.
        prompt_words: Least and most words of a prompt.
        response_words: Least and most words of a response.
        edge_cases: Put hard records at rows 1 to 9: an empty response, nothing at all, single letters, a long
            response, a prompt so long that a cut never reaches the response (about 300 tokens each), blanks
            and newlines at the edges, characters of several bytes, a copy of row 0, an empty prompt.
        groups: Values of a ``subtask`` field, given to the records in turn; none leaves the field out.

    Returns:
        The records, in file order.

    Raises:
        ValueError: if there is no room for the edge cases.
    """
    if edge_cases and n < 10:
        raise ValueError(f"n={n}: edge cases need at least 10 records")
    draw = random.Random(seed)
    pairs = []
    for _ in range(n):
        words = _SENTENCES[draw.choice(topics)].split()
        prompt = " ".join(draw.choices(words, k=draw.randint(*prompt_words)))
        pairs.append((prompt, " ".join(draw.choices(words, k=draw.randint(*response_words)))))
    if edge_cases:
        long = " ".join(draw.choices(_SENTENCES["travel"].split(), k=130))
        pairs[1:10] = [
            (pairs[1][0], ""),
            ("", ""),
            ("a", "B"),
            (pairs[4][0], long),
            (long, "short answer"),
            ("  indented\n\ntext  ", "\n\n\nthree newlines first\n"),
            ("naïve 漢字 🙂🙂?", "Ω ≈ 0.5 – “yes”"),
            pairs[0],
            ("", pairs[9][1]),
        ]
    records = [
        {"id": f"r{row}", "prompt": prompt, "response": response}
        | ({"subtask": groups[row % len(groups)]} if groups else {})
        for row, (prompt, response) in enumerate(pairs)
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return records
