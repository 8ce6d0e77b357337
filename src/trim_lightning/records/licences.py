"""Fields of a record that say under which licence it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trim_lightning.records.fields import clean_text

LICENCES = ("license", "licence", "licenses", "license_name", "license_link", "license_url")


def licences_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The fields of `LICENCES` that say something, as text."""
    found = {name: record.get(name) for name in LICENCES}
    return {
        name: clean_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in found.items()
        if value
    }
