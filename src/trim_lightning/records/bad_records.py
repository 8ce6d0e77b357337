"""Records that cannot be read: one error for all of them, or left out, counted and listed."""

from __future__ import annotations

from collections import Counter

from trim_lightning.errors import UserError
from trim_lightning.records.layouts import has_keys
from trim_lightning.records.record_file import LineSource

SHOWN = 5


class BadRecords:
    """Collects the records of an input that cannot be read.

    Args:
        source: The input.
        skipped: Leave them out; else `check` refuses the input.
    """

    def __init__(self, source: LineSource, *, skipped: bool) -> None:
        self._source, self._skipped = source, skipped
        self._found: list[tuple[int, str]] = []
        self._kinds: Counter[str] = Counter()
        self._first = ""

    def __len__(self) -> int:
        return len(self._found)

    def add(self, number: int, told: str, kind: str) -> None:
        """Note the record in a 0-based line: what is to be said after its place, and the kind of its fault."""
        self._kinds[kind] += 1
        if not self._found:
            self._first = self._source.place(number) + told
        self._found.append((number, kind if len(self._found) >= SHOWN else told.removeprefix(":").strip()))

    def check(self, good: int) -> None:
        """Refuse the input if there are any and they are not left out.

        Raises:
            UserError: with how many there are, the first five, and all kinds.
        """
        if not self._found or self._skipped:
            return
        if len(self._found) == 1:
            raise UserError(self._first)
        what, unit = self._source.what, self._source.unit
        first = "; ".join(f"{self._short(number)}: {_fault(told)}" for number, told in self._found[:SHOWN])
        more = f"; and {len(self._found) - SHOWN:,} more" if len(self._found) > SHOWN else ""
        kinds = ", ".join(f"{kind} ({number:,})" for kind, number in self._kinds.most_common())
        skip = f", or leave them out with {what}.bad_records=skip" if has_keys(what) else ""
        raise UserError(
            f"{self._source.label}: {len(self._found):,} {unit}s cannot be read: {first}{more}; of these "
            f"kinds: {kinds}; mend or delete them{skip}"
        )

    def remarks(self) -> list[str]:
        """One line that counts them; none if there are none."""
        if not self._found:
            return []
        kinds = ", ".join(f"{kind} ({number:,})" for kind, number in self._kinds.most_common())
        return [f"{len(self._found):,} {self._source.unit}s cannot be read and are left out: {kinds}"]

    def listed(self) -> list[tuple[str, str]]:
        """Each of them: its place, and why."""
        return [(self._short(number), _fault(told)) for number, told in self._found]

    def _short(self, number: int) -> str:
        return self._source.place(number).removeprefix(self._source.label).strip()


def _fault(told: str) -> str:
    """What is wrong, without the advice that follows it."""
    return told.rpartition(": mend or delete")[0] or told
