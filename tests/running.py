"""Run the product inside the test process."""

from __future__ import annotations

from pathlib import Path

from composing import compose_select, compose_train
from trim_lightning.pipeline.select import Selection, select
from trim_lightning.pipeline.train import Training, train


def selection(*overrides: str, output_dir: Path, store_dir: Path) -> Selection:
    """Compose the overrides and run one selection."""
    paths = [f"paths.output_dir={output_dir}", f"paths.store_dir={store_dir}"]
    return select(compose_select([*overrides, *paths]))


def run_select(*overrides: str, output_dir: Path, store_dir: Path) -> Path:
    """Run one selection and return its output directory."""
    return selection(*overrides, output_dir=output_dir, store_dir=store_dir).directory


def run_train(*overrides: str, output_dir: Path, store_dir: Path) -> Training:
    """Compose the overrides and run one training."""
    paths = [f"paths.output_dir={output_dir}", f"paths.store_dir={store_dir}"]
    return train(compose_train([*overrides, *paths]))


def unwrapped(summary: str) -> str:
    """Closing tables in one line: where their lines break says nothing."""
    return " ".join(summary.split())
