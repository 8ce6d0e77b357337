"""Load tokenizer and causal LM with the attention hook in place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from trim_lightning.errors import UserError, first_line
from trim_lightning.models.attention import NAME, OWN, is_refused, register
from trim_lightning.models.check import check_model
from trim_lightning.models.parts import drop_towers, runs_on_text, towers, without_towers
from trim_lightning.models.precision import is_quantized
from trim_lightning.models.source import ModelSource

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)
_KEPT: list[tuple[ModelSource, torch.dtype, bool, PreTrainedModel]] = []  # one at most


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' weight bars: ours are the only progress bars a run shows."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: if the folder has none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(
            str(source.tokenizer_directory), trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise UserError(f"model.path={source.name}: its tokenizer cannot be loaded ({first_line(error)})") from None


def from_files(source: ModelSource, dtype: torch.dtype, *, whole: bool) -> Any:
    """Model and loading report; towers for images and sounds are not read unless the ``whole`` model is asked for.

    A model that cannot run on a text without them is read whole.
    """
    lean = None if whole else lean_class(source)
    if lean is not None:
        try:
            model, report = read_files(source, dtype, lean)
            model.__class__ = lean.__base__
            if runs_on_text(model):
                return model, report
        except Exception as error:  # if the model itself is damaged, the whole of it is too
            log.debug("%s is read whole (%s)", source.name, first_line(error))
    return read_files(source, dtype, AutoModelForCausalLM)


def lean_class(source: ModelSource) -> type[PreTrainedModel] | None:
    """The model's class without its towers; None if it has none, or is not transformers' own."""
    try:
        config = AutoConfig.from_pretrained(
            str(source.directory), trust_remote_code=source.trust_remote_code, local_files_only=True
        )
        if config.get_text_config(decoder=True) is config:
            return None
        skeleton = empty_model(source)
    except Exception:  # reading it will say what is wrong
        return None
    kind, names = type(skeleton), list(towers(skeleton))
    return without_towers(kind, names) if names and kind.__module__.startswith("transformers.") else None


def read_files(source: ModelSource, dtype: torch.dtype, kind: Any) -> Any:
    """Model and loading report, with the first attention that its class supports: our hooks, else its native one.

    A model for images and texts that is no causal LM by itself (Mistral 3, Qwen3-VL) is loaded as what it is.
    """
    more: dict[str, Any] = {}
    if source.quantize is not None:
        from trim_lightning.models.quantized import quantization

        more["quantization_config"] = quantization(source.quantize, dtype)
    ways = [NAME, OWN, None]
    while True:
        try:
            return kind.from_pretrained(
                str(source.directory),
                dtype=dtype,
                attn_implementation=ways[0],
                use_safetensors=True,
                trust_remote_code=source.trust_remote_code,
                device_map=source.device_map,
                local_files_only=True,
                output_loading_info=True,
                **more,
            )
        except Exception as error:
            if "Unrecognized configuration class" in str(error) and kind is AutoModelForCausalLM:
                kind = AutoModelForImageTextToText
            elif len(ways) > 1 and is_refused(error):
                ways.pop(0)
            else:
                raise


def load_model(source: ModelSource, dtype: torch.dtype, *, whole: bool = False) -> PreTrainedModel:
    """The causal LM in evaluation mode, with attention going through the hook.

    Towers for images and sounds are left out unless the ``whole`` model is asked for. What `keep_for_next` has kept is
    given to the next call, if it is the same model, and forgotten if it is another.

    Raises:
        UserError: if the weights or an adapter are damaged, incomplete, or of an architecture without the hook, or if
            the model is not causal as it is loaded.
    """
    register()
    kept = [model for *which, model in _KEPT if which == [source, dtype, whole]]
    _KEPT.clear()
    if kept:
        return kept[0]
    with quiet_loading():
        try:
            loaded = from_files(source, dtype, whole=whole)
        except Exception as error:
            why = first_line(error)
            if "ignore_mismatched_sizes" in why:  # transformers tells the shapes in a report of its own
                why = "its weights have not the shapes that its config.json says: look at vocab_size first"
            raise UserError(f"model.path={source.name}: cannot be loaded ({why})") from None
    model, report = loaded
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"model.path={source.name}: weights are missing from its safetensors files ({names}, ...)")
    if is_quantized(model):
        from trim_lightning.models.quantized import as_kept

        as_kept(model)
    model = ready(model, source, whole=whole)
    for adapter in source.adapters:
        from trim_lightning.models.adapter import build_upon

        model = build_upon(model, adapter)
    if source.tokenizer_directory != source.directory:
        embeddings: Any = model.get_input_embeddings()
        tokens, rows = len(load_tokenizer(source)), len(embeddings.weight)
        if tokens > rows:
            raise UserError(
                f"model.path={source.name}: the adapter's tokenizer has {tokens} tokens, its base model only {rows}; "
                "merge it into the resized model with PEFT and give that"
            )
    return model


def keep_for_next(model: PreTrainedModel, source: ModelSource, dtype: torch.dtype) -> None:
    """Keep a model that was only looked at for the next `load_model`, so that it is not read twice."""
    _KEPT[:] = [(source, dtype, False, model)]


def empty_model(source: ModelSource) -> PreTrainedModel:
    """The architecture without weights or memory for them, on the device ``meta``."""
    config = AutoConfig.from_pretrained(
        str(source.directory), trust_remote_code=source.trust_remote_code, local_files_only=True
    )
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
        except ValueError:  # no causal class, but one for images and texts
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=source.trust_remote_code)
    assert isinstance(model, PreTrainedModel)
    return model


def ready(model: Any, source: ModelSource, *, whole: bool) -> PreTrainedModel:
    """The model as it was read, checked and frozen; without towers unless the ``whole`` is wanted.

    Raises:
        UserError: if it is not causal.
    """
    # peft still asks for an attribute by its old name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    model.name_or_path = source.name  # what adapters note as their base: a name, never a local path
    model.eval()
    model.requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    if not whole and source.device_map is None:
        drop_towers(model)
    check_model(model, source.name)
    return model


@dataclass(frozen=True)
class ModelRecipe:
    """How another process loads the same model; it can be pickled.

    Attributes:
        source: The model's files.
        dtype: Its number format.
        adapter: Folder of an adapter.
        gradients: Whether gradients are taken; see `trim_lightning.models.adapter.apply_adapter`.
        whole: Keep towers for images and sounds.
        layers: Only so many of its first layers; None keeps all.
    """

    source: ModelSource
    dtype: torch.dtype
    adapter: Path | None = None
    gradients: bool = False
    whole: bool = False
    layers: int | None = None

    def load(self, mesh: DeviceMesh | None = None) -> PreTrainedModel:
        """Load it.

        Args:
            mesh: The processes among which the weights are to be divided (FSDP2); None loads all of them here.

        Raises:
            UserError: as `load_model` does, or if the adapter does not fit.
        """
        from trim_lightning.models.divided import load_divided, own_device, shard_weights

        divided = None if mesh is None else load_divided(self.source, self.dtype, mesh)
        if divided is not None:
            model = ready(divided, self.source, whole=self.whole)
        else:
            model = load_model(self.source, self.dtype, whole=self.whole)
            if mesh is not None:
                log.warning(
                    "model.path=%s: its weights are made of others in its files, so that each process loads all of "
                    "them before they are divided",
                    self.source.name,
                )
        if self.adapter is not None:
            from trim_lightning.models.adapter import apply_adapter

            model = apply_adapter(model, self.adapter, gradients=self.gradients)
        if self.layers is not None:
            from trim_lightning.models.depth import cut_layers

            cut_layers(model, self.layers)
        if mesh is not None and divided is None:
            shard_weights(model, mesh)
            model.to(own_device(mesh))  # type: ignore[arg-type]
        return model
