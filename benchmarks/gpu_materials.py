"""What the parts of the GPU kit run on: random models built on the device, random tokens, and limits of memory."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from materials import ROOT, seconds
from trim_lightning.models.attention import register
from trim_lightning.models.check import check_model
from trim_lightning.tokens.spans import PROMPT, RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords

# LLaMA configs; 7b is LLaMA 2 7B's, 1b LLaMA 3.2 1B's
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "small": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 4},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
FIRST = 10  # tokens below have a meaning of their own


@dataclass(frozen=True)
class Place:
    """Where a part of the kit runs, and how large.

    Attributes:
        device: The GPU, or the CPU where there is none.
        tiny: Small shapes, to see that everything runs through.
        work: Folder for what a part leaves behind.
    """

    device: torch.device
    tiny: bool
    work: Path

    @property
    def on_gpu(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of the Lightning Trainer."""
        return {"accelerator": "gpu" if self.on_gpu else "cpu", "devices": 1}

    def pick(self, full: Any, tiny: Any) -> Any:
        """The first, in tiny mode the second."""
        return tiny if self.tiny else full


def config_of(shape: str, **more: Any) -> Any:
    """The LLaMA config of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**SHAPES[shape], "max_position_embeddings": 40_960, **more})


def random_model(shape: str, device: torch.device | str, dtype: torch.dtype, **more: Any) -> Any:
    """A model of a shape with the attention hook, drawn on the device with seed 0, ready for every pass."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(shape, **more), dtype=dtype, attn_implementation=register())
    model.eval().requires_grad_(False)
    check_model(model, shape)
    return model


def model_folder(place: Place, shape: str, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a random model with a tokenizer that uses a few of its tokens, saved once."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import build_tiny_tokenizer

    folder = place.work / f"model-{shape}"
    if not (folder / "config.json").exists():
        build_tiny_tokenizer().save_pretrained(folder)
        random_model(shape, place.device, dtype).save_pretrained(folder)
    return folder


def write_record_file(path: Path, number: int, seed: int) -> Path:
    """A JSONL file of generated records."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import write_records

    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, number, seed, edge_cases=False, prompt_words=(20, 80), response_words=(10, 100))
    return path


def lengths_like_instructions(number: int, longest: int = 1024, seed: int = 0) -> NDArray[np.int64]:
    """Lengths with the mean (about 150 tokens) and the long tail of instruction records."""
    drawn = np.random.default_rng(seed).lognormal(np.log(110), 0.8, number)
    return np.clip(drawn, 16, longest).astype(np.int64)


def random_tokens(directory: Path, lengths: Sequence[int] | NDArray[Any], vocabulary: int) -> TokenizedRecords:
    """Records of random tokens, small ids more often; the second half of each is its response."""
    directory.mkdir(parents=True, exist_ok=True)
    generator, sizes = np.random.default_rng(1), np.asarray(lengths, np.int64)
    ids = FIRST + (vocabulary - FIRST) * generator.random(int(sizes.sum())) ** 3
    roles = [np.repeat(np.array([PROMPT, RESPONSE], np.uint8), [size - size // 2, size // 2]) for size in sizes]
    ids.astype(np.int32).tofile(directory / "token_ids.int32")
    np.concatenate(roles).tofile(directory / "roles.uint8")
    np.cumsum([0, *sizes], dtype=np.int64).tofile(directory / "offsets.int64")
    (directory / "summary.json").write_text(json.dumps({"truncated": 0, "unrendered": 0, "problems": []}))
    return TokenizedRecords(directory)


def product_rate(place: Place, size: int = 8192) -> float:
    """Measured operations a second of large bfloat16 matrix products on random data, the best of five."""
    size = place.pick(size, 512)
    one, two = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ two
    times = [seconds(lambda: [one @ two for _ in range(10)]) for _ in range(5)]
    return 10 * 2 * size**3 / min(times)


def free() -> None:
    """Give back what the GPU's allocator keeps, so that the next measurement begins with nothing."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def limited(place: Place, limit: float, records: int) -> Iterator[None]:
    """Let this process have ``limit`` bytes of the GPU; the CPU, without such a limit, refuses more than ``records``.

    What is refused there is the forward pass of a LLaMA, with the error that the allocator would raise.
    """
    if place.on_gpu:
        free()
        whole = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / whole)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    from transformers import LlamaModel

    llama: Any = LlamaModel
    forward = llama.forward

    def guarded(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if len(keywords["input_ids"] if "input_ids" in keywords else arguments[0]) > records:
            raise torch.OutOfMemoryError("made up: the CPU has no limit")
        return forward(self, *arguments, **keywords)

    llama.forward = guarded
    try:
        yield
    finally:
        llama.forward = forward


class Warnings(logging.Handler):
    """Counts the warnings of a logger that hold a text."""

    def __init__(self, logger: str, text: str) -> None:
        super().__init__(logging.WARNING)
        self.logger, self.text, self.number = logging.getLogger(logger), text, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        self.number += self.text in record.getMessage()

    def __enter__(self) -> Warnings:
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)


def environment() -> dict[str, str]:
    """Variables under which a process of the kit finds the package: no network, no tracker."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "0",
    }
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def run_command(place: Place, words: Sequence[str], launcher: Sequence[str] = (sys.executable,)) -> str:
    """Run one of the project's commands in a process of its own; its output.

    Raises:
        RuntimeError: with the end of the output if it failed.
    """
    place.work.mkdir(parents=True, exist_ok=True)
    command = [*launcher, *words]
    done = subprocess.run(
        command, cwd=place.work, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def torchrun() -> list[str]:
    """The launcher for one process."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]


def quiet() -> None:
    """Leave out what libraries say about matters that the kit knows."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
