"""Bergson's facts as pool and targets, and a small LLaMA that knows the form of such questions, but no answer."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PEOPLE, ASKED = 16, 64
OTHERS = range(1_000, 2_200)  # people of the same generator, whom the model is trained on beforehand
SECONDS = 150.0  # of that training, of one core
BATCH = 64
POOL, TARGETS, BASE = "pool.jsonl", "targets.jsonl", "base"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


def prepare(work: Path, checkout: Path | None) -> None:
    """Write facts, questions and the model.

    Raises:
        SystemExit: without Bergson's names.
    """
    if (work / BASE / "model.safetensors").exists():
        return
    data = work / "data"
    if not (data / "names").exists():
        if checkout is None:
            raise SystemExit("error: --checkout: give a checkout of github.com/EleutherAI/bergson, for its data/names")
        for name in ("names", "templates"):
            shutil.copytree(checkout / "data" / name, data / name)
    from bergson.config.config import RecallDataConfig
    from bergson.recall.generate import ensure_recall_datasets
    from datasets import load_from_disk

    paths = ensure_recall_datasets(RecallDataConfig(num_people=PEOPLE, data_dir=str(data)))
    statements, questions = (load_from_disk(str(path)) for path in paths)
    write_lines(work / POOL, [
        {"text": row["fact"], "identifier": row["identifier"], "field": row["field"]} for row in statements
    ])  # fmt: skip
    write_lines(work / TARGETS, [
        {"question": row["question"], "answer": row["answer"], "person": row["identifier"], "field": row["field"]}
        for row in questions
    ])  # fmt: skip
    train_base(other_texts(data), work / BASE)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def other_texts(data: Path) -> list[str]:
    """Statements and answered questions about other people, in a drawn order."""
    from bergson.recall.facts import fact_generator

    texts, seen = [], set()
    for row in fact_generator(4 * OTHERS.stop, str(data), 0):
        if row["identifier"] in OTHERS:
            texts.append(row["fact"])
            if (row["identifier"], row["field"]) not in seen:
                seen.add((row["identifier"], row["field"]))
                texts += [f"{row['question']} {row['answer']}"] * 4
    random.Random(0).shuffle(texts)
    return texts


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A byte-level tokenizer of 2,048 classes, whose chat template is the turns with a blank between."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core: Any = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2_048, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", model_max_length=2_048, chat_template=TEMPLATE
    )


def train_base(texts: Sequence[str], folder: Path) -> None:
    """Train a LLaMA of 0.9 million parameters from scratch on other people's facts, for a time of the processor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of(texts)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2_048, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    rows = [torch.tensor(ids) for ids in tokenizer(list(texts))["input_ids"]]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    started, step = time.process_time(), 0
    while (part := (time.process_time() - started) / SECONDS) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - part)
        place = step * BATCH % (len(rows) - BATCH)
        ids: Tensor = torch.nn.utils.rnn.pad_sequence(rows[place : place + BATCH], batch_first=True)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
    print(f"base model: {step} steps, loss {loss.item():.3f}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
