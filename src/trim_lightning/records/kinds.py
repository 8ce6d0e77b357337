"""What kind a record is of, by the field that says so."""

from __future__ import annotations

KIND_FIELDS = ("family", "subtask", "category", "source", "task")  # what a record's kind is usually called
