"""An export as a data set of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError, first_line
from trim_lightning.runs.card import FIELDS

CARD, MESSAGE = "README.md", "Coreset selected by TRIM Lightning"


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a data set.

    Raises:
        UserError: saying why.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub={name}: {first_line(error)}; give USER/NAME") from None


def card_of(data_set: str) -> dict[str, Any]:
    """What the card of a data set on the Hub says of its licence; nothing if it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(data_set).card_data
    except Exception:  # without a network, without access, renamed: the card then says that it is not known
        return {}
    return {} if found is None else {name: found.get(name) for name in FIELDS}


def push(folder: Path, names: Sequence[str], name: str, public: bool) -> tuple[str, bool]:
    """Make the data set, private unless ``public``, and upload these files of a folder, and no others, as one commit.

    Returns:
        Its address, and whether it is private, as the Hub says: one that is there already stays what it was.

    Raises:
        UserError: if the Hub cannot be reached or refuses, or the data set is there and public though it must not be.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        made = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        private = bool(api.dataset_info(made.repo_id).private)
        if not public and not private:
            raise UserError(f"--push-to-hub={name}: is there already and public; name another, or say --public")
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=list(names),
            repo_type="dataset",
            commit_message=MESSAGE,
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--push-to-hub={name}: {reason(error)}; nothing was lost: {folder} holds what is to be pushed, and the "
            "same command tries again"
        ) from None
    return str(made), private


def reason(error: Exception) -> str:
    """Why the Hub took nothing, in the user's words."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        return "the Hub does not let you write there; set HF_TOKEN to a token that may, or log in with `hf auth login`"
    if status is None:
        return f"the Hub cannot be reached ({first_line(error)})"
    return f"the Hub refuses ({first_line(error)})"
