"""Load exported coresets with the real loaders of other trainers; run by hand, each trainer in its own environment.

    python tests/export/check_trainers.py make DIR          # with this project's Python: a run and its exports
    python tests/export/check_trainers.py trl DIR           # with a Python that has TRL
    python tests/export/check_trainers.py llamafactory DIR  # with a Python that has LLaMA-Factory

No network and no GPU; the model is a tiny random one. Ends with 0 when every check held.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="disabled")
POOLS = ("plain", "chats", "late")  # prompts and responses; several turns and system texts; a late second turn


def make(directory: Path) -> None:
    """Select from three pools and export each coreset in every format, with the turns that must come out."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from running import run_select
    from tiny_models import build_tiny_model, write_records
    from trim_lightning.cli.export import export

    build_tiny_model("llama", directory / "model")
    pools = {"plain": write_records(directory / "plain.jsonl", 30, seed=4, edge_cases=False)}
    pools |= {"chats": chats(30, late=False), "late": chats(1400, late=True)}
    for name, pool in pools.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in pool), encoding="utf-8")
        run = run_select(
            "model=hf", f"model.path={directory / 'model'}", "pool=jsonl", f"pool.path={path}", "method=random",
            "selection.fraction=1.0", "logger=none", "trainer=cpu", "warmup=none",
            output_dir=directory / f"run_{name}", store_dir=directory / "store",
        )  # fmt: skip
        for layout in ("messages", "parquet", "alpaca"):
            export(run, layout, directory / name / layout)
            side = "scores.parquet" if layout == "parquet" else "scores.jsonl"
            expected = [turns_of(pool[row]) for row in rows_of(directory / name / layout / side)]
            (directory / name / layout / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    print(f"made {', '.join(pools)} in {directory} with trim-lightning {version('trim-lightning')}")


def rows_of(side: Path) -> list[int]:
    """Pool rows of the exported lines, from the side file."""
    if side.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows: list[int] = pq.read_table(side)["row"].to_pylist()
        return rows
    return [json.loads(line)["row"] for line in side.read_text().splitlines()]


def chats(number: int, *, late: bool) -> list[dict[str, Any]]:
    """Conversations; late: ones of 8,000 characters, of which only the last has a second exchange."""
    records = []
    for row in range(number):
        text = f"Question {row}: naïve 漢字, line\ntwo? " + ("word " * 1600 if late else "")
        turns = [("user", text), ("assistant", f"Answer {row}.")]
        if not late and row % 3 == 0:
            turns.insert(0, ("system", f"Be brief, {row}."))
        if (late and row == number - 1) or (not late and row % 2 == 0):
            turns += [("user", f"And {row} again?"), ("assistant", f"Still {row}.")]
        messages = [{"role": role, "content": content} for role, content in turns]
        records.append({"id": f"c{row}", "messages": messages})
    return records


def turns_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a pool record, written down without the product."""
    if "messages" in record:
        turns: list[dict[str, str]] = record["messages"]
        return turns
    return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]


def check_trl(directory: Path) -> None:
    """Load ``messages`` with datasets, and let TRL template, tokenise and train one step."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import apply_chat_template, is_conversational

    tokenizer = AutoTokenizer.from_pretrained(str(directory / "model"))
    for name in POOLS:
        for layout, reader, file in (
            ("messages", "json", "messages.jsonl"),
            ("parquet", "parquet", "messages.parquet"),
        ):
            folder = directory / name / layout
            cache = str(directory / "cache")
            data = load_dataset(reader, data_files=str(folder / file), split="train", cache_dir=cache)
            expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
            assert data["messages"][:] == expected, f"{name}/{layout}: other turns than the pool's"
            assert all(is_conversational(example) for example in data.select(range(5)))
            rendered = apply_chat_template(data[0], tokenizer)["text"]
            assert all(turn["content"] in rendered for turn in expected[0])
            data = data.select(range(min(len(data), 20)))
            settings = SFTConfig(
                output_dir=str(directory / "trl"), max_steps=1, per_device_train_batch_size=2, use_cpu=True,
                report_to=[], max_length=400, save_strategy="no", disable_tqdm=True, bf16=False,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=str(directory / "model"), args=settings, train_dataset=data, processing_class=tokenizer
            )
            for ids, turns in zip(trainer.train_dataset["input_ids"][:], expected, strict=False):
                text = tokenizer.decode(ids)
                assert len(ids) >= 400 or all(turn["content"] in text for turn in turns), f"{name}/{layout}: {text!r}"
            trainer.train()
            print(f"trl {name}/{layout}: {len(expected)} conversations loaded, one training step done")


def without_audio() -> None:
    """Let LLaMA-Factory start without torchaudio, which it imports for audio alone.

    The wheels of torchaudio and torchvision on PyPI fit a CUDA build of torch only; text needs neither.
    """
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
        print("torchaudio cannot be loaded beside this torch: going on without it")


def check_llamafactory(directory: Path) -> None:
    """Load ``alpaca`` through its ``dataset_info.json`` with LLaMA-Factory, and tokenise it."""
    without_audio()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    for name in POOLS:
        folder = directory / name / "alpaca"
        arguments = {
            "stage": "sft", "do_train": True, "model_name_or_path": str(directory / "model"), "template": "chatml",
            "dataset": "trim_coreset", "dataset_dir": str(folder), "finetuning_type": "lora", "cutoff_len": 4096,
            "output_dir": str(directory / "llamafactory"), "cache_dir": str(directory / "cache_llamafactory"),
            "report_to": "none", "overwrite_cache": True, "preprocessing_num_workers": None,
        }  # fmt: skip
        model_args, data_args, training_args, _, _ = get_train_args(arguments)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        (described,) = get_dataset_list(["trim_coreset"], str(folder))
        aligned = _load_single_dataset(described, model_args, data_args, training_args)
        found = [
            [*([{"role": "system", "content": row["_system"]}] if row["_system"] else []), *row["_prompt"],
             *row["_response"]]
            for row in aligned
        ]  # fmt: skip
        assert found == expected, f"{name}: other turns than the pool's"
        prepared = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
        assert len(prepared) == len(expected)
        for place in range(min(len(prepared), 30)):
            row, turns = prepared[place], expected[place]
            text = module["tokenizer"].decode(row["input_ids"])
            assert len(row["input_ids"]) >= 4096 or all(turn["content"] in text for turn in turns), text
            answers = module["tokenizer"].decode([label for label in row["labels"] if label >= 0])
            said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            assert len(row["input_ids"]) >= 4096 or all(answer in answers for answer in said), answers
        print(f"llamafactory {name}: {len(expected)} conversations loaded and tokenised")


def main() -> None:
    """Run one part and say with which versions."""
    part, directory = sys.argv[1], Path(sys.argv[2]).absolute()
    parts = {"make": make, "trl": check_trl, "llamafactory": check_llamafactory}
    parts[part](directory)
    if part != "make":
        names = (part, "torch", "transformers", "datasets")
        print("checked with", ", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
