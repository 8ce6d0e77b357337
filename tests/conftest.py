"""Fixtures that several test modules share: tiny models on disk and in memory, token files, stores."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if "PYTEST_XDIST_WORKER" in os.environ:
    # one of several at once: one thread each, in the processes that the tests start as well
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:  # the process that shares the tests out among others needs no torch
    from transformers import PreTrainedModel

    from trim_lightning.models.source import ModelSource
    from trim_lightning.store import Store
    from trim_lightning.tokens.tokenized import TokenizedRecords

# the first call into torch or a tokenizer is slow, and says nothing about the property
hypothesis.settings.register_profile("trim", deadline=None)
hypothesis.settings.load_profile("trim")

Tokens = Sequence[tuple[Iterable[int], Iterable[int]]]  # token ids and roles of each record


def pytest_collection_finish() -> None:
    """Before the first test."""
    import torch

    torch.set_num_threads(1)  # tiny tensors gain nothing from threads, and lose much on a busy machine
    # what is imported by now stays: the garbage collector need not look through it again and again
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def compositions() -> Iterator[pytest.MonkeyPatch]:
    """Hydra composes each choice of options once."""
    from compositions import remember_compositions

    with pytest.MonkeyPatch.context() as patch:
        remember_compositions(patch)
        yield patch


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage store for all runs of the session, so that shared stages are computed once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty stage store."""
    from trim_lightning.store import Store

    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny model; each architecture is built once."""
    from tiny_models import build_tiny_model

    root, folders = tmp_path_factory.mktemp("models"), {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = build_tiny_model(architecture, root / architecture, seed=3)
        return folders[architecture]

    return folder


@pytest.fixture(scope="session")
def tiny_source(tiny_folder: Callable[[str], Path], store_dir: Path) -> Callable[[str], ModelSource]:
    """Gives a tiny model as the product finds it."""
    from trim_lightning.models.source import find_model
    from trim_lightning.settings.schema import ModelSettings
    from trim_lightning.store import Store

    return lambda architecture: find_model(ModelSettings(path=str(tiny_folder(architecture))), Store(store_dir))


@pytest.fixture
def tiny_model(tiny_source: Callable[[str], ModelSource]) -> Callable[[str], PreTrainedModel]:
    """Loads a tiny model as the product does, in float32; every call gives a fresh one."""
    import torch

    from trim_lightning.models.load import load_model

    return lambda architecture: load_model(tiny_source(architecture), torch.float32)


@pytest.fixture(scope="session")
def pool_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of 40 records with the hard cases of `write_records` among them."""
    from tiny_models import write_records

    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    write_records(path, 40, seed=1)
    return path


@pytest.fixture(scope="session")
def target_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four target examples in two subtasks."""
    from tiny_models import write_records

    path = tmp_path_factory.mktemp("targets") / "targets.jsonl"
    write_records(path, 4, seed=2, edge_cases=False, groups=("first", "second"), response_words=(2, 40))
    return path


@pytest.fixture
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tokens], TokenizedRecords]:
    """Writes token ids and roles as the tokenise stage does and opens them."""
    from trim_lightning.tokens.tokenized import TokenizedRecords

    def write(records: Tokens) -> TokenizedRecords:
        directory = tmp_path_factory.mktemp("tokens")
        pairs = [(np.array(list(ids), np.int32), np.array(list(roles), np.uint8)) for ids, roles in records]
        np.concatenate([[], *(ids for ids, _ in pairs)]).astype(np.int32).tofile(directory / "token_ids.int32")
        np.concatenate([[], *(roles for _, roles in pairs)]).astype(np.uint8).tofile(directory / "roles.uint8")
        offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)], dtype=np.int64)
        offsets.tofile(directory / "offsets.int64")
        (directory / "summary.json").write_text(json.dumps({"truncated": 0, "unrendered": 0, "problems": []}))
        return TokenizedRecords(directory)

    return write
