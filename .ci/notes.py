"""Write the notes of a release from CHANGELOG.md into build/notes.md: ``python .ci/notes.py v1.2.3``."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str, version: str, changes: str) -> str:
    """The changelog's section for a tag.

    Args:
        tag: ``v`` and a version.
        version: That of pyproject.toml.
        changes: The text of the changelog.

    Raises:
        ValueError: if the three do not fit together; the message says what to do.
    """
    if tag != f"v{version}":
        raise ValueError(f"the tag {tag} is not v{version}: set version in pyproject.toml, or tag v{version}")
    found = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |\Z)", changes, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise ValueError(f"CHANGELOG.md has no section [{version}]: rename Unreleased, with the date")
    return found[1].strip() + "\n"


def main(tag: str) -> None:
    """Read, write, or say what is wrong."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    try:
        text = notes(tag, version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"error: {error}")
    path = ROOT / "build" / "notes.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
