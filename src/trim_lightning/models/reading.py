"""How a model's attention is read for saliency: found out once, when it is loaded, by a look at a few tokens."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trim_lightning.errors import UserError
from trim_lightning.models.attention import (
    NAME,
    OWN,
    NotPlainError,
    SaliencyRecorder,
    own_function,
    recording,
    refusal,
    watching,
)
from trim_lightning.models.loss import base_of, last_hidden_states
from trim_lightning.trim.saliency import weight_statistics

READING = "trim_reading"  # attribute of a loaded model
HOOK, WEIGHTS, NONE = "hook", "weights", "none"
PIECES = 80  # tokens that a class which attends within pieces of a sequence cuts
OTHER_THINGS = "weights of other things than its tokens"
SAME = 1e-3  # share of the largest number by which two ways of computing one attention may differ in float32
# kinds of layers as configs name them, and modules, that have softmax attention, and those of them that have none
SOFTMAX, OTHER = (
    re.compile(r"attn|attention|hybrid", re.I),
    re.compile(r"linear|mamba|conv|recurrent|delta|lightning", re.I),
)


@dataclass(frozen=True)
class Reading:
    """How a model's attention is read.

    Attributes:
        way: ``hook``: by a registered attention function (see `trim_lightning.models.attention`). ``weights``: the
            model gives its weights out, one target at a time. ``none``: not at all.
        layers: The layers that have softmax attention, from 0; all others are recurrent, or none at all.
        total: Number of layers.
        why: Why it is read in no way; empty otherwise.
    """

    way: str
    layers: tuple[int, ...]
    total: int
    why: str = ""

    def last(self, number: int) -> tuple[int, ...]:
        """The last layers that have softmax attention: as many as asked for, or all."""
        return self.layers[max(0, len(self.layers) - number) :]

    @property
    def facts(self) -> dict[str, Any]:
        """For a stage, unless all layers are read: ``softmax`` with the ``layers``, ``of`` how many, and ``why``."""
        if self.layers == tuple(range(self.total)):
            return {}
        return {"softmax": {"layers": list(self.layers), "of": self.total, "why": self.why}}


def reading_of(model: PreTrainedModel) -> Reading:
    """How this model's attention is read; of a model that could not be looked at, every layer by the hook."""
    found: Reading | None = getattr(model, READING, None)
    if found is None:
        total = number_of_layers(model)
        return Reading(HOOK, tuple(range(total)), total)
    return found


def number_of_layers(model: PreTrainedModel) -> int:
    """Layers of the text model."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


class Look:
    """A watcher that notes which layers send their attention through a hook, and whether SDPA computes the same."""

    def __init__(self) -> None:
        self.reports: Counter[int | None] = Counter()
        self.refusal: NotPlainError | None = None

    def plain(self, module: nn.Module, query: Tensor, key: Tensor, factor: float, mask: Tensor | None) -> None:
        """Let a recorder say what it does not support."""
        self._try(
            module, lambda recorder: recorder.plain(module, query, key, factor, mask), query.shape[0], query.shape[2]
        )

    def own(self, module: nn.Module, weights: Callable[[], Tensor], mask: Tensor | None) -> None:
        """Let a recorder say what it does not support."""
        attention = weights()
        batch, seq = attention.shape[0], attention.shape[2]
        self._try(module, lambda recorder: recorder.own(module, lambda: attention, mask), batch, seq)

    def compare(self, module: nn.Module, ours: Callable[[], Tensor], own: Callable[[], Tensor]) -> None:
        """Find out whether SDPA leaves something out.

        Raises:
            NotPlainError: if it does.
        """
        if own_function(module) is None:
            return
        try:
            one, other = ours(), own()
        except NotPlainError:
            raise
        except Exception:  # a function that wants something else: then there is nothing to compare with
            return
        if not bool(((one - other).abs().max() <= SAME * other.abs().max()) | ~torch.isfinite(other).all()):
            raise NotPlainError("model.path: attention that SDPA does not compute")

    def _try(self, module: nn.Module, report: Callable[[SaliencyRecorder], None], batch: int, seq: int) -> None:
        recorder = SaliencyRecorder(torch.full((batch,), seq), 0)
        try:
            report(recorder)
        except NotPlainError as error:
            self.refusal = self.refusal or error
        self.reports[getattr(module, "layer_idx", None)] += 1


def look(model: PreTrainedModel, run: Callable[[], Any]) -> Any:
    """Find out how a model's attention is read, note it, and return what ``run``, a forward pass over tokens, gives.

    A model whose attention SDPA does not compute as the model itself would is changed to its own eager attention.

    Raises:
        UserError: what ``run`` raises beside `NotPlainError`.
    """
    if asks_for_names(model):
        unhook(model)
    seen = Look()
    try:
        with watching(seen):
            result = run()
    except NotPlainError as error:
        seen.refusal, result = error, None
    if seen.refusal is not None and model.config._attn_implementation == NAME:
        seen, given = Look(), result
        with implementation(model, OWN) as kept, watching(seen):
            result = run()
            kept.append(given is None or seen.refusal is None)  # what is read from its own attention is computed by it
    if not seen.reports:
        unhook(model)
    setattr(model, READING, judge(model, seen))
    return result


def unhook(model: PreTrainedModel) -> None:
    """Let a model's attention go by its own name again."""
    native = {NAME: "sdpa", OWN: "eager"}.get(model.config._attn_implementation)
    if native is not None:
        model.set_attn_implementation(native)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config._attn_implementation = native  # of classes that have no way to change it


def asks_for_names(model: PreTrainedModel) -> bool:
    """True if a class does something else for an attention that is not called ``sdpa``, as sparse attention does.

    It would leave out its choice of tokens under the name of a hook, so that it runs under its own.
    """
    for kind in {type(module) for module in model.modules() if "Attention" in type(module).__name__}:
        try:
            text = inspect.getsource(kind)
        except (OSError, TypeError):
            continue
        if re.search(r"""_attn_implementation\s*(==|!=|in|not in)\s*[(\[{]?[^)\n]{0,40}["']sdpa["']""", text):
            return True
    return False


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[list[bool]]:
    """Change a model's attention; it is changed back unless True is put into the list."""
    before, keep = model.config._attn_implementation, list[bool]()
    if before != name:
        model.set_attn_implementation(name)
    yield keep
    if before != name and not any(keep):
        model.set_attn_implementation(before)


def judge(model: PreTrainedModel, seen: Look) -> Reading:
    """The reading of a model whose forward pass was watched."""
    total = number_of_layers(model)
    reported = sorted(layer for layer in seen.reports if layer is not None)
    twice = [layer for layer in reported if seen.reports[layer] > 1]
    unseen = [layer for layer in range(total) if layer not in seen.reports and has_softmax(model, layer)]
    if reported and not twice and not unseen and seen.refusal is None:
        return Reading(HOOK, tuple(reported), total)
    with implementation(model, OWN if seen.reports else model.config._attn_implementation) as kept:
        given = given_layers(model, total)
        kept.append(bool(given))
        if given:
            check_longer(model)
    if given:
        return Reading(WEIGHTS, given, total)
    if seen.refusal is not None:
        why = str(seen.refusal).removeprefix("model.path: the model uses ").partition(", which")[0]
    elif twice:
        why = "more than one attention in a layer"
    elif unseen:
        why = "an attention of its own that cannot be read from outside"
    else:
        why = "no softmax attention"
    return Reading(NONE, (), total, f"{type(model).__name__} has {why}")


def kinds_of_layers(model: PreTrainedModel) -> list[str]:
    """What each layer is, as the config names it; empty if it says nothing."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return list(kinds) if isinstance(kinds, list | tuple) else []


def is_softmax(kind: str) -> bool:
    """True if a kind of layers, or a module, is softmax attention by what it is called."""
    return SOFTMAX.search(kind) is not None and OTHER.search(kind) is None


def has_softmax(model: PreTrainedModel, layer: int) -> bool:
    """True if a layer has softmax attention by what the config, or a module in it, is called.

    Attention on an image alone, as whole layers of Llama 3.2 Vision have it, is none on a text.
    """
    if layer in (getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None) or ()):
        return False
    kinds = kinds_of_layers(model)
    if len(kinds) > layer:
        return is_softmax(kinds[layer])
    inside = [
        f"{name} {type(module).__name__}"
        for name, module in base_of(model).named_modules()
        if f".{layer}." in f".{name}." and "norm" not in type(module).__name__.lower()
    ]
    return any(is_softmax(text.partition(f"{layer}.")[2]) for text in inside)


def given_layers(model: PreTrainedModel, total: int) -> tuple[int, ...]:
    """Layers whose weights the model gives out when it is asked for them; none if it computes something else then."""
    weight: Any = model.get_input_embeddings().weight
    ids = torch.arange(3, 12, device="cpu" if weight.device.type == "meta" else weight.device)[None] % len(weight)
    try:
        with torch.no_grad():
            plain = last_hidden_states(model, ids).float()
            hidden, weights = states_and_weights(model, ids)
            hidden = hidden.float()
    except (UserError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return ()
    seq = ids.shape[1]
    fits = [
        each.dim() == 4 and each.shape[2:] == (seq, seq) and not bool((each.triu(1) != 0).any()) for each in weights
    ]
    if not all(fits) or (hidden - plain).abs().max() > SAME * plain.abs().max():
        return ()
    named = tuple(layer for layer, kind in enumerate(kinds_of_layers(model)) if is_softmax(kind))
    return tuple(range(total)) if len(weights) == total else named if len(weights) == len(named) else ()


def check_longer(model: PreTrainedModel) -> None:
    """Refuse a class that attends within pieces of a longer sequence, as Reformer does: those are not its tokens.

    Raises:
        NotPlainError: if the weights of a longer sequence are not of tokens on tokens.
    """
    weight: Any = model.get_input_embeddings().weight
    places = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or PIECES
    device = "cpu" if weight.device.type == "meta" else weight.device
    ids = (3 + torch.arange(min(PIECES, int(places)), device=device))[None] % len(weight)
    with torch.no_grad():
        if any(each.shape[2:] != (ids.shape[1], ids.shape[1]) for each in states_and_weights(model, ids)[1]):
            raise refusal(OTHER_THINGS)


def refuse_divided(way: str, name: str) -> None:
    """Refuse to read weights that a class gives out of a model that is divided among processes.

    Raises:
        UserError: if that is the ``way`` in which its attention is read.
    """
    if way == WEIGHTS:
        raise UserError(
            f"trainer=fsdp: the attention of {name} is read one target at a time, which divided weights do not allow; "
            "use trainer=ddp, or one device"
        )


def states_and_weights(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """Last hidden states ``[1, seq, hidden]`` and the weights ``[1, heads, seq, seq]`` of all layers that give some."""
    config: Any = model.config.get_text_config(decoder=True)
    native = config._attn_implementation
    if native == "sdpa":  # of a class with an attention of its own, which has no weights to give then
        config._attn_implementation = "eager"
    try:
        output = base_of(model)(input_ids=input_ids, use_cache=False, output_attentions=True)
    finally:
        config._attn_implementation = native
    return output.last_hidden_state, tuple(each for each in output.attentions or () if each is not None)


def read(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass over targets with their attention.

    Args:
        model: The scorer.
        input_ids: ``[batch, seq]``, padded on the right.
        lengths: ``[batch]``.

    Returns:
        Last hidden states ``[batch, seq, hidden]``; row and column signal, each ``[layers, batch, seq]`` float32 of the
        layers that have softmax attention.

    Raises:
        UserError: if a layer reports otherwise than it did when the model was loaded.
    """
    reading = reading_of(model)
    if reading.way == HOOK:
        recorder = SaliencyRecorder(lengths, reading.layers)
        with recording(recorder):
            hidden = last_hidden_states(model, input_ids)
        return hidden, *recorder.signals()
    if reading.way == NONE:
        empty = torch.zeros(0, *input_ids.shape)
        return last_hidden_states(model, input_ids), empty, empty
    return read_weights(model, input_ids, lengths, len(reading.layers))


def read_weights(
    model: PreTrainedModel, input_ids: Tensor, lengths: Tensor, layers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`read` by the weights that the model gives out, one record at a time: they are ``layers x heads x seq x seq``."""
    rows, columns = (torch.zeros(layers, *input_ids.shape, device=lengths.device) for _ in range(2))
    states = []
    for line, length in enumerate(lengths.tolist()):
        hidden, weights = states_and_weights(model, input_ids[line : line + 1, :length])
        states.append(nn.functional.pad(hidden[0], (0, 0, 0, input_ids.shape[1] - length)).to(input_ids.device))
        for place, each in enumerate(weights):
            if each.shape[2:] != (length, length):
                raise refusal(OTHER_THINGS)
            each = each.float()
            whole = torch.tensor([length], device=each.device)
            row, column = weight_statistics(each, whole, each > 0)
            rows[place, line, :length], columns[place, line, :length] = row[0], column[0]
    return torch.stack(states), rows, columns
