"""What a causal LM computes: last hidden states, and next-token losses with the LM head run on chosen tokens alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from trim_lightning.errors import UserError

IGNORED = -100  # torch's cross entropy leaves such labels out
HEAD_ALONE = "trim_head_alone"  # attribute of a loaded model, see `head_alone`
CHUNK = 1024  # predictions whose logits are held at once when no gradient is needed
WHOLE = 4096  # padded tokens that a model without a separate LM head gives logits of at once


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Last hidden states ``[batch, seq, hidden]`` after the final norm, for ``[batch, seq]`` ids.

    Runs the base model without the LM head. There is no attention mask: with causal attention and padding
    on the right a real token never sees padding, and SDPA can take its fastest path.

    Raises:
        UserError: if the architecture has no base model beneath its LM head.
    """
    states: Tensor | None = getattr(base_of(model)(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if states is None:
        raise UserError(
            f"model.path: {type(model).__name__} gives no last hidden state to compare; use another architecture"
        )
    return states.to(input_ids.device)  # accelerate leaves it on the last layer's device


def base_of(model: PreTrainedModel) -> Any:
    """The model beneath the LM head; some classes (Llama 4's text model) call themselves their own base."""
    base: Any = model.base_model
    return getattr(model, "model", base) if base is model else base


def head_alone(model: PreTrainedModel) -> bool:
    """True if the model's logits are its output embedding of its last hidden states and nothing else.

    `trim_lightning.models.check.check_model` finds that out when a model is loaded; of one that was not checked
    nothing is assumed.
    """
    return bool(getattr(model, HEAD_ALONE, False))


def hidden_width(model: PreTrainedModel) -> int:
    """Width of the last hidden states: what the LM head reads, for OPT may project to less than ``hidden_size``."""
    weight: Any = getattr(model.get_output_embeddings(), "weight", None)
    return int(model.config.get_text_config().hidden_size if weight is None else weight.shape[1])


def response_logits(model: PreTrainedModel, input_ids: Tensor, wanted: Tensor) -> Tensor:
    """Float32 logits ``[wanted, vocabulary]`` of the positions where ``wanted [batch, seq]`` is True.

    The LM head runs on those positions only, unless there is more to the model's logits, see `head_alone`.
    """
    if not head_alone(model):
        whole: Tensor = model(input_ids=input_ids, use_cache=False).logits
        return whole[wanted.to(whole.device)].float().to(input_ids.device)
    head: Any = model.get_output_embeddings()
    logits: Tensor = head(last_hidden_states(model, input_ids)[wanted])
    return logits.float()


def summed_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross entropy (nats) over the labelled tokens, with gradient.

    Args:
        model: A causal LM.
        input_ids: ``[batch, seq]``.
        labels: ``[batch, seq]``, `IGNORED` where a token is not to be predicted.
    """
    wanted, following = predictions(labels)
    return cross_entropy(response_logits(model, input_ids, wanted), following, reduction="sum")


def record_losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy (nats) of each record's labelled tokens, ``[batch]`` float64; no gradient.

    Logits are computed for a thousand predictions at a time.
    """
    wanted, following = predictions(labels)
    owner = wanted.nonzero()[:, 0]
    if not head_alone(model):
        parts = [cross_entropy(response_logits(model, input_ids, wanted), following, reduction="none")]
    else:
        head: Any = model.get_output_embeddings()
        states = last_hidden_states(model, input_ids)[wanted]
        parts = [
            cross_entropy(head(piece).float().to(answer.device), answer, reduction="none")
            for piece, answer in zip(states.split(CHUNK), following.split(CHUNK), strict=True)
        ]
    losses = torch.zeros(len(input_ids), dtype=torch.float64)
    return losses.index_add_(0, owner.cpu(), torch.cat(parts).double().cpu())


@torch.no_grad()
def token_probabilities(
    model: PreTrainedModel, input_ids: Tensor, states: Tensor, together: bool = False, wanted: Tensor | None = None
) -> Tensor:
    """Probability that the model gives to each token after those before it, ``[batch, seq]`` float32; no gradient.

    The LM head runs on a thousand states at a time; a model whose logits are more than that, see `head_alone`, runs
    once more, some records at a time.

    Args:
        model: A causal LM.
        input_ids: ``[batch, seq]``, padded on the right.
        states: ``[batch, seq, hidden]`` its last hidden states.
        together: Never run some records alone: processes that share the weights must call the model equally often.
        wanted: ``[batch, seq]`` bool, the tokens whose probability is wanted; all without.

    Returns:
        NaN for each record's first token, and for what is not wanted.
    """
    found = torch.full(input_ids.shape, float("nan"), device=input_ids.device)
    asked = torch.ones_like(input_ids[:, 1:], dtype=torch.bool) if wanted is None else wanted[:, 1:]
    chances = [
        logits.float().log_softmax(-1).gather(1, answers[:, None]).squeeze(1).exp().to(found.device)
        for _, logits, answers in next_tokens(model, input_ids, states, asked, together)
    ]
    if chances:
        found[:, 1:][asked] = torch.cat(chances)
    return found


def next_tokens(
    model: PreTrainedModel, input_ids: Tensor, states: Tensor, asked: Tensor, together: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield what predicts some tokens, a thousand of them at a time, in their order.

    Args:
        model: As in `token_probabilities`, likewise ``input_ids``, ``states`` and ``together``.
        asked: ``[batch, seq - 1]`` bool, the places whose next token is asked for.

    Yields:
        The ``[places, hidden]`` states there, ``[places, vocabulary]`` logits and the ``[places]`` ids of the
        tokens that follow, all on the device of the logits.
    """
    following, predicting = input_ids[:, 1:][asked], states[:, :-1][asked]
    logits: Iterable[Tensor]
    if head_alone(model):
        head: Any = model.get_output_embeddings()
        logits = (head(piece) for piece in predicting.split(CHUNK))
    else:
        rows = len(input_ids) if together else max(1, WHOLE // input_ids.shape[1])
        parts = zip(input_ids.split(rows), asked.split(rows), strict=True)
        logits = (whole_logits(model, ids, places) for ids, places in parts)
    start = 0
    for piece in (piece for part in logits for piece in part.split(CHUNK) if len(piece)):
        places = slice(start, start + len(piece))
        start += len(piece)
        yield predicting[places].to(piece.device), piece, following[places].to(piece.device)


def whole_logits(model: PreTrainedModel, input_ids: Tensor, asked: Tensor) -> Tensor:
    """``[asked, vocabulary]`` logits of the places whose next token is asked for, ``[batch, seq - 1]`` bool."""
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return logits[asked.to(logits.device)]


def predictions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[batch, seq]`` (bool) whose next token is labelled, and those labels, flat."""
    following = labels[:, 1:]
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = following != IGNORED
    return wanted, following[following != IGNORED]
