"""TRL's side of a comparison: trains the same LoRA with SFTTrainer whenever a line on standard input asks for it.

Runs under a Python that has TRL and needs nothing of this project; ``against_trl.py`` starts it with a job file. Each
line names a variant; the answer is one line of JSON. Tokens and labels are given, so templates play no part.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="disabled")


def train(job: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """One training from a fresh adapter; what is timed is `train` alone, as data and model are ready before."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings, on_gpu = job["settings"], bool(job["on_gpu"])
    batch, parts = settings["batch_size"], variant.get("parts", 1)
    arguments = SFTConfig(
        output_dir=str(Path(job["work"]) / "trl"), num_train_epochs=settings["epochs"], use_cpu=not on_gpu,
        per_device_train_batch_size=batch // parts, gradient_accumulation_steps=parts,
        learning_rate=settings["learning_rate"], lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup_steps"], weight_decay=settings["weight_decay"],
        max_grad_norm=settings["gradient_clip"], gradient_checkpointing=settings["gradient_checkpointing"],
        bf16=job["bfloat16"] and variant.get("autocast", True), max_length=job["longest"],
        packing=variant.get("packing", False), train_sampling_strategy=variant.get("sampling", "random"),
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, seed=0,
        model_init_kwargs={"dtype": "bfloat16" if job["bfloat16"] else "float32", "attn_implementation": "sdpa"},
    )  # fmt: skip
    lora = LoraConfig(
        r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], lora_dropout=settings["lora_dropout"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=job["model"], args=arguments, train_dataset=Dataset.from_list(job["records"]), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )  # fmt: skip
    fed = sum(map(len, trainer.train_dataset["input_ids"])) * settings["epochs"]
    labels = sum(label != -100 for line in trainer.train_dataset["labels"] for label in line[1:])
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started, processor = time.perf_counter(), time.process_time()
    trainer.train()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    result = {
        "seconds": seconds,
        "processor_seconds": processor,
        "tokens": fed,
        "labels": labels,
        "steps": trainer.state.global_step,
        "loss": losses[-1],
    }
    del trainer
    gc.collect()
    torch.cuda.empty_cache()  # the other side trains next; without a GPU this does nothing
    return {**result, "peak_mib": peak}


def main(path: str) -> None:
    """Answer until standard input ends; what TRL prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    job = json.loads(Path(path).read_text())
    import torch
    import trl

    torch.set_num_threads(job["threads"])
    answers.write(json.dumps({"trl": trl.__version__, "torch": torch.__version__}) + "\n")
    for line in sys.stdin:
        try:
            answer = train(job, job["variants"][line.strip()])
        except Exception as error:  # of one variant; the others may go on
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            gc.collect()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
