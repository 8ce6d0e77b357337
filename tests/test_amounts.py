from __future__ import annotations

from trim_lightning.console.amounts import size_text, time_text


def test_times_in_the_units_that_people_use() -> None:
    assert [time_text(value) for value in (0.04, 59.9, 61, 3720)] == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 2 min"]


def test_sizes_in_the_units_that_people_use() -> None:
    sizes = (716, 5_900, 466_063, 8_000_000, 3e15)
    assert [size_text(value) for value in sizes] == ["716 B", "5.9 kB", "466 kB", "8.0 MB", "3000 TB"]
