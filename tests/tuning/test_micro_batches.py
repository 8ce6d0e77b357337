"""What is learned and in which order: labels, steps, micro-batches, and a loader that knows its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tiny_models import CHATML, END, build_tiny_tokenizer
from trim_lightning.engine.labels import collate, labels_of
from trim_lightning.models.loss import IGNORED
from trim_lightning.records.record import Turn
from trim_lightning.tokens.rendering import ChatRenderer, Encoded
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence
from trim_lightning.tuning.micro_batches import StepLoader, deal, plan_micro_batches, steps_of

Records = Sequence[tuple[list[int], list[int]]]


class Rows:
    """Token sequences in memory, with the parts of `TokenizedRecords` that a plan needs."""

    def __init__(self, records: Records) -> None:
        self._records = [TokenSequence(np.array(ids, np.int32), np.array(roles, np.uint8)) for ids, roles in records]
        self.lengths = np.array([len(ids) for ids, _ in records], dtype=np.int64)

    def __getitem__(self, row: int) -> TokenSequence:
        return self._records[row]


# ----------------------------------------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer(chat_template=CHATML)


def encode(tokenizer: PreTrainedTokenizerFast, *turns: tuple[str, str], max_length: int = 999) -> TokenSequence:
    renderer = ChatRenderer(tokenizer)
    (encoded,) = renderer.encode([[Turn(role, text) for role, text in turns]], max_length)  # type: ignore[arg-type]
    assert isinstance(encoded, Encoded)
    return TokenSequence(encoded.token_ids, encoded.roles)


def learned(tokenizer: PreTrainedTokenizerFast, sequence: TokenSequence, **options: bool) -> str:
    labels = labels_of(sequence, **options)
    assert labels.shape == sequence.token_ids.shape
    kept = labels != IGNORED
    assert labels[kept].tolist() == sequence.token_ids[kept].tolist()
    return str(tokenizer.decode(labels[kept]))


def test_labels_are_the_response_and_the_end_of_its_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    sequence = encode(tokenizer, ("user", "How many eggs?"), ("assistant", "seven eggs"))
    assert learned(tokenizer, sequence) == f"seven eggs{END}"
    assert learned(tokenizer, sequence, with_end=False) == "seven eggs"


def test_every_response_of_a_conversation_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    assert learned(tokenizer, encode(tokenizer, *turns)) == f"two{END}four{END}"


def test_a_cut_response_has_no_end_and_an_empty_one_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(tokenizer, ("user", "one"), ("assistant", "bake until golden brown"))
    start = int((whole.roles == 2).argmax())
    cut = encode(tokenizer, ("user", "one"), ("assistant", "bake until golden brown"), max_length=start + 2)
    assert learned(tokenizer, cut) == tokenizer.decode(whole.token_ids[start : start + 2])
    assert learned(tokenizer, encode(tokenizer, ("user", "one"), ("assistant", ""))) == ""
    assert learned(tokenizer, encode(tokenizer, ("user", "one"))) == ""


# ------------------------------------------------------------------------------------------------ plans

roles = st.lists(st.integers(0, 2), max_size=12)
pools = st.lists(roles.map(lambda part: (list(range(3, 3 + len(part))), part)), min_size=1, max_size=14)


@given(
    records=pools,
    batch_size=st.integers(1, 6),
    epochs=st.integers(1, 3),
    budget=st.integers(1, 60),
    seed=st.integers(0, 99),
    grouped=st.booleans(),
)
def test_a_plan_keeps_its_promises(
    records: Records, batch_size: int, epochs: int, budget: int, seed: int, grouped: bool
) -> None:
    pool: Any = Rows(records)
    keys: dict[str, Any] = {"batch_size": batch_size, "epochs": epochs, "tokens_per_micro_batch": budget, "seed": seed}
    rows = list(range(0, len(records), 2)) or [0]
    plan = plan_micro_batches(pool, rows, **keys, length_grouped=grouped)
    assert plan == plan_micro_batches(pool, rows, **keys, length_grouped=grouped)
    # a label at the first token has nothing before it to be predicted from
    trained = {row: int((labels_of(pool[row])[1:] != IGNORED).sum()) for row in rows}
    usable = [row for row in rows if trained[row]]
    per_epoch = -(-len(usable) // batch_size)
    steps: list[list[int]] = [[]]
    for micro in plan:
        longest = [int(pool.lengths[row]) for row in micro.rows]
        assert longest == sorted(longest, reverse=True)
        assert len(micro.rows) == 1 or len(micro.rows) * longest[0] <= budget
        steps[-1] += micro.rows
        if micro.closes_step:
            assert micro.step_labels == sum(trained[row] for row in steps[-1])
            assert micro.closes_epoch == (len(steps) % per_epoch == 0)
            steps.append([])
    assert steps.pop() == []
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for step in own for row in step) == usable, "every usable record once an epoch"
        assert sorted(len(step) for step in own)[1:] == [batch_size] * (per_epoch - 1)


def test_epochs_and_seeds_differ_in_order() -> None:
    pool: Any = Rows([([4, 5, 6], [1, 2, 2])] * 30)

    def order(seed: int) -> list[tuple[int, ...]]:
        plan = plan_micro_batches(pool, range(30), batch_size=1, epochs=2, tokens_per_micro_batch=9, seed=seed)
        return [micro.rows for micro in plan]

    assert order(0) != order(1)
    assert order(0)[:30] != order(0)[30:]


def test_grouping_by_length_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 200, 400)
    pool: Any = Rows([(list(range(length)), [2] * length) for length in lengths])

    def padded(grouped: bool) -> int:
        plan = plan_micro_batches(
            pool, range(400), batch_size=8, epochs=1, tokens_per_micro_batch=4000, seed=0, length_grouped=grouped
        )
        return sum(len(micro.rows) * int(pool.lengths[micro.rows[0]]) for micro in plan)

    assert padded(True) < 0.7 * padded(False)
    assert padded(True) < 1.05 * lengths.sum()


# ----------------------------------------------------------------------------------------------- loader


def test_collate_pads_ids_and_ignores_padding() -> None:
    pool: Any = Rows([([4, 5, 6, 7], [1, 2, 2, 0]), ([8, 9], [0, 2])])
    input_ids, labels = collate(pool, [0, 1], pad_token_id=1)
    assert input_ids.tolist() == [[4, 5, 6, 7], [8, 9, 1, 1]]
    assert labels.tolist() == [[IGNORED, 5, 6, 7], [IGNORED, 9, IGNORED, IGNORED]]


def flat(steps: Sequence[dict[str, Any]]) -> list[Any]:
    return [[micro["input_ids"].tolist() for micro in step["micro_batches"]] for step in steps]


def test_a_loader_goes_on_from_any_place(tokenized: Callable[..., TokenizedRecords]) -> None:
    pool = tokenized([([4, 5, 6], [1, 2, 0]), ([7, 8], [2, 2]), ([9, 10, 11, 12], [0, 1, 2, 0])])
    plan = plan_micro_batches(pool, range(3), batch_size=2, epochs=3, tokens_per_micro_batch=5, seed=0)
    whole = list(StepLoader(pool, plan))
    assert len(whole) == len(StepLoader(pool, plan)) == sum(micro.closes_step for micro in plan)
    assert sum(len(step["micro_batches"]) for step in whole) == len(plan)
    assert sum(step["tokens"] for step in whole) == 3 * 9
    for place in range(len(whole) + 1):
        loader = StepLoader(pool, plan)
        iterator = iter(loader)
        for _ in range(place):
            next(iterator)
        state = loader.state_dict()
        for rank, processes in ((0, 1), (0, 2), (1, 2)):  # with any number of processes
            resumed = StepLoader(pool, plan, rank, processes)
            resumed.load_state_dict(state)
            rest = list(resumed)
            assert len(rest) == len(whole) - place
            assert processes > 1 or flat(rest) == flat(whole[place:])
            assert len(list(resumed)) == len(whole), "a loader that has ended starts anew"


# ------------------------------------------------------------------------------------ several processes


@given(sizes=st.lists(st.integers(1, 3000), max_size=30), processes=st.integers(1, 9))
def test_every_micro_batch_is_dealt_to_one_process(sizes: list[int], processes: int) -> None:
    parts = deal(sizes, processes)
    assert len(parts) == processes
    assert sorted(place for part in parts for place in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(sizes[place] for place in part) for part in parts]
    if sizes:
        assert max(loads) <= sum(sizes) / processes + max(sizes), "balanced by tokens"
    assert len(sizes) < processes or all(parts), "nobody idles who need not"


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_a_step_and_know_the_same_of_it(
    processes: int, tokenized: Callable[..., TokenizedRecords]
) -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 30)
    pool = tokenized([(range(length), [2] * length) for length in lengths])
    plan = plan_micro_batches(pool, range(30), batch_size=7, epochs=2, tokens_per_micro_batch=60, seed=0)
    shares = [list(StepLoader(pool, plan, rank, processes, even=True)) for rank in range(processes)]
    for places, *steps in zip(steps_of(plan), *shares, strict=True):
        real = [micro for step in steps for micro in step["micro_batches"] if micro["tokens"]]
        assert sorted(micro["place"] for micro in real) == list(places)
        (tokens,) = {step["tokens"] for step in steps}
        assert tokens == sum(micro["tokens"] for micro in real)
        assert len({(step["step_labels"], step["closes_epoch"]) for step in steps}) == 1
        assert len({len(step["micro_batches"]) for step in steps}) == 1, "equally many calls of the model"
        idle = [micro for step in steps for micro in step["micro_batches"] if not micro["tokens"]]
        assert all((micro["labels"] == IGNORED).all() and micro["input_ids"].numel() == 1 for micro in idle)
