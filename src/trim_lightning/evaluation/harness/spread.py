"""lm-eval's requests as passes of the engine: each process answers some of them with a model of its own.

lm-eval itself runs in every process of a launcher, over the same prompts in the same order, or in the one that starts
the others; only what it asks of the model is divided. Batches are those that it makes of the same requests by itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from trim_lightning.engine.batches import Shard
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.modules import ForwardPass, in_step
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.engine.shards import TableShards, ragged, shard_path, write_shard
from trim_lightning.evaluation.harness.tasks import _quiet
from trim_lightning.models.load import ModelRecipe
from trim_lightning.tokens.tokenized import TokenSequence

OPTIONS, ANSWERS = "lm-eval options", "lm-eval answers"  # names on the bar
Wrap = Callable[[PreTrainedModel], HFLM]


@dataclass
class Crew:
    """What answers requests.

    Attributes:
        recipe: How each process loads the model.
        wrap: Gives lm-eval's model of a loaded one; can be pickled.
        directory: Where the passes' files go; what an earlier attempt left there is kept.
        resources: What they run on.
        heard: lm-eval's warnings in any process.
        passes: How many there were.
    """

    recipe: ModelRecipe
    wrap: Wrap
    directory: Path
    resources: Resources
    heard: set[str] = field(default_factory=set)
    passes: int = 0

    def answer(self, title: str, requests: Sequence[Any], tokens: Sequence[Sequence[int]], plan: list[Shard]) -> Any:
        """What the model says to each request; ``tokens`` are what it reads of each."""
        folder = self.directory / f"{self.passes}"
        self.passes += 1
        folder.mkdir(parents=True, exist_ok=True)
        records = {
            place: TokenSequence(np.array(own, dtype=np.int32), np.zeros(len(own), dtype=np.uint8))
            for place, own in enumerate(tokens)
        }
        form = RequestShards(folder)
        run_sharded_pass(
            RequestPass(self.recipe, title, list(requests), self.wrap), records, plan, form, folder,
            resources=self.resources, title=title, unit="requests",
        )  # fmt: skip
        found = dict(form.read(plan))
        self.heard.update(message for _, messages in found.values() for message in messages)
        return [found[place][0] for place in range(len(requests))]


class SpreadHarness(HFLM):
    """lm-eval's model whose requests a crew answers.

    Args:
        frame: The model without weights.
        batch: Requests in one forward pass.
        crew: What answers.
        options: Of `HFLM`.
    """

    def __init__(self, frame: PreTrainedModel, batch: int, crew: Crew, **options: Any) -> None:
        super().__init__(pretrained=frame, batch_size=2**31, **options)  # windows of a text come all at once
        self.together, self.crew = batch, crew

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        tokens = [[*context, *continuation] for _, context, continuation in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, own in enumerate(tokens):  # one forward pass serves those that differ in the last token alone
            groups.setdefault(tuple(own[:-1]), []).append(place)
        longest = [max(members, key=lambda place: len(requests[place][2])) for members in groups.values()]
        order = sorted(longest, key=lambda place: (-len(tokens[place]), tuple(tokens[place])))
        plan = self._plan(order, tokens, lambda place: groups[tuple(tokens[place][:-1])])
        return [(value, greedy) for value, greedy in self.crew.answer(OPTIONS, requests, tokens, plan)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts; see `HFLM`."""
        given = [request.args for request in requests]
        tokens = [self.tok_encode(context) for context, _ in given]
        groups: dict[str, list[int]] = {}
        for place, (_, options) in enumerate(given):
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(place)
        plan: list[Shard] = []
        for members in groups.values():
            order = sorted(members, key=lambda place: (-len(tokens[place]), given[place][0]))
            plan += self._plan(order, tokens, lambda place: [place], len(plan))
        answers: list[str] = self.crew.answer(ANSWERS, given, tokens, plan)
        return answers

    def _plan(
        self, order: list[int], tokens: Sequence[Sequence[int]], members: Callable[[int], list[int]], first: int = 0
    ) -> list[Shard]:
        """A shard for each batch: one call of the model in lm-eval's hands."""
        chunks = [order[start : start + self.together] for start in range(0, len(order), self.together)]
        plan = []
        for place, chunk in enumerate(chunks, start=first):
            rows = tuple(row for lead in chunk for row in members(lead))
            plan.append(Shard(place, (rows,), sum(len(tokens[row]) for row in rows)))
        return plan


class RequestPass(ForwardPass):
    """Lets lm-eval's own code answer a batch of requests; gives each answer with the warnings that were heard."""

    def __init__(self, recipe: ModelRecipe, title: str, requests: Sequence[Any], wrap: Wrap) -> None:
        super().__init__(recipe)
        self.title, self.requests, self.wrap = title, requests, wrap
        self._harness: HFLM | None = None

    def on_predict_start(self) -> None:
        """Put the model, which is on its device by now, into lm-eval's hands."""
        model: Any = self.model
        if in_step(self.trainer.strategy):
            model.tie_weights = lambda *_, **__: None  # the LM head is whole, the embeddings are divided
            model.generate = functools.partial(model.generate, synced_gpus=True)
        with _quiet():
            self._harness = self.wrap(self.model)

    def on_batch(self, batch: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
        assert self._harness is not None
        requests = [self.requests[row] for row in batch["rows"].tolist()]
        with _quiet() as heard:
            answers: Iterable[Any]
            if self.title == OPTIONS:
                answers = self._harness._loglikelihood_tokens(requests, disable_tqdm=True)
            else:
                wanted: Any = [SimpleNamespace(args=request) for request in requests]
                answers = self._harness.generate_until(wanted, disable_tqdm=True)
        return [(answer, sorted(set(heard))) for answer in answers]


class RequestShards(TableShards):
    """The answers to a shard's requests as one Parquet file: a line a request, its answer as JSON in UTF-8."""

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        rows = torch.cat([rows for rows, _ in parts]).cpu().numpy()
        texts = [np.frombuffer(json.dumps(line).encode(), dtype=np.uint8) for _, lines in parts for line in lines]
        columns = {"row": rows, "answer": ragged(np.concatenate(texts), np.array([len(text) for text in texts]))}
        write_shard(pa.table(columns), self.directory, index)

    def read(self, plan: Sequence[Shard]) -> Iterable[tuple[int, Any]]:
        """Each request's place and answer."""
        for shard in plan:
            table = pq.read_table(shard_path(self.directory, shard.index))
            for row, answer in zip(table["row"].to_pylist(), table["answer"].to_pylist(), strict=True):
                yield row, json.loads(bytes(answer))
