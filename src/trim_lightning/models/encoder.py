"""Models of sentence-transformers (an optional extra): found, loaded, encoding texts."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.models.source import is_local
from trim_lightning.store import Store
from trim_lightning.store.keys import digest_of

PARTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # the files of such a model


class Encoder:
    """A sentence-transformers model, a directory or a Hub id, loaded when first needed.

    Attributes:
        digest: sha256 over the contents of the model's files.

    Raises:
        UserError: if the library or the model is missing, or the model has no safetensors weights.
    """

    def __init__(self, path: str | None, batch_size: int, store: Store) -> None:
        if path is None:
            raise UserError("method.path: a value is needed; give a sentence-transformers model, method.path=...")
        self._where = f"method.path={path}"
        self._batch_size = batch_size
        if importlib.util.find_spec("sentence_transformers") is None:
            raise UserError(
                "method=embedding: the package sentence-transformers is not installed; "
                "pip install 'trim-lightning[embedding]'"
            )
        self._directory = find_encoder(path)
        files = sorted(file for part in PARTS for file in self._directory.rglob(part) if file.is_file())
        if not any(file.suffix == ".safetensors" for file in files):
            raise UserError(
                f"{self._where}: has no *.safetensors weights; save the model again with sentence-transformers"
            )
        names = [str(file.relative_to(self._directory)) for file in files]
        self.digest = digest_of([[name, store.file_digest(file)] for name, file in zip(names, files, strict=True)])
        self.load = cache(self._load)

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer

        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        try:
            return SentenceTransformer(
                str(self._directory), local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{self._where}: cannot be loaded as a sentence-transformers model ({lines[0]})") from None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings ``[texts, width]`` float32."""
        vectors = self.load().encode(
            list(texts), batch_size=self._batch_size, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors, dtype=np.float32)


def find_encoder(path: str) -> Path:
    """The directory of a sentence-transformers model, downloaded if it is a Hub id.

    Raises:
        UserError: if there is no such model.
    """
    where = f"method.path={path}"
    if is_local(path):
        directory = Path(path).expanduser()
        if not (directory / "modules.json").is_file():
            raise UserError(f"{where}: is no sentence-transformers model directory (it has no modules.json)")
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=list(PARTS)))
    except HFValidationError:
        raise UserError(f"{where}: neither a directory nor a Hub id (owner/name)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{where}: not on this disk, and the Hub does not give it ({type(error).__name__}); "
            "check the id, or give a directory"
        ) from None
