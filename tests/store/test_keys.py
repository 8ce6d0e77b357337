"""Stage keys: what makes two keys equal and what tells them apart."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.store import StageKey
from trim_lightning.store.keys import canonical, digest_of
from trim_lightning.store.versions import key_versions

scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-5, 5, width=16) | st.text(max_size=3)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def key(**changes: Any) -> StageKey:
    return StageKey(**{"stage": "score", "version": 1, "settings": {"a": 1}, "inputs": {"pool": "ff"}} | changes)


def respelled(value: Any) -> Any:
    """An equal value in another spelling: floats for whole numbers, tuples, another order of keys."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return float(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return tuple(respelled(item) for item in value)
    return {name: respelled(value[name]) for name in reversed(value)}


@given(values)
def test_spelling_does_not_change_the_key(value: Any) -> None:
    assert key(settings={"x": value}).hex == key(settings={"x": respelled(value)}).hex
    assert canonical(canonical(value)) == canonical(value)


@given(values, values)
def test_different_values_give_different_keys(one: Any, two: Any) -> None:
    assert (digest_of(one) == digest_of(two)) == (repr(canonical(one)) == repr(canonical(two)))


@pytest.mark.parametrize(
    ("one", "two", "equal"),
    [
        (1, 1.0, True),
        (0.0, -0.0, True),
        (True, 1, False),
        (False, 0, False),
        (None, "null", False),
        (None, False, False),
        (1, "1", False),
        (0.1, 0.1 + 1e-18, True),
        (0.1, 0.1 + 1e-16, False),
        ([1, 2], (1, 2), True),
        ([1, 2], [2, 1], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": {"b": 1}}, {"a": {"b": True}}, False),
        ({1: "x"}, {"1": "x"}, True),
        ([], {}, False),
        ("é", "e\u0301", False),
        (10**20, 1e20, True),
        (np.float64(0.5), 0.5, True),
    ],
)
def test_what_is_equal(one: Any, two: Any, equal: bool) -> None:
    assert (key(settings={"x": one}).hex == key(settings={"x": two}).hex) is equal


def test_every_part_of_a_key_matters() -> None:
    keys = [
        key(),
        key(stage="scores"),
        key(version=2),
        key(settings={"a": 2}),
        key(settings={"b": 1}),
        key(settings={}),
        key(inputs={"pool": "fe"}),
        key(settings={"a": 1, "pool": "ff"}, inputs={}),
    ]
    assert len({one.hex for one in keys}) == len(keys)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", np.int64(1)])
def test_a_value_without_a_json_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be part of a stage key"):
        _ = key(settings={"x": [value]}).hex


def test_keys_are_the_same_in_every_process() -> None:
    script = "from trim_lightning.store import StageKey; print(StageKey('s', 1, {'b': 0.1, 'a': {'é': [1]}}, {}).hex)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == StageKey("s", 1, {"a": {"é": (1.0,)}, "b": 0.1}, {}).hex


def test_the_description_says_it_all() -> None:
    assert key(settings={"x": (1.0, None)}).description == {
        "stage": "score",
        "version": 1,
        "settings": {"x": [1, None]},
        "inputs": {"pool": "ff"},
        "versions": key_versions("score"),
    }
