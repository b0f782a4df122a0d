"""Shares of the cases of tests, chosen by their names: the same in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest


def hashed(name: str) -> int:
    return int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest(), "big")


def chosen(items: list[pytest.Item], one_in: int, of_tables: int) -> Iterator[pytest.Item]:
    """Of the cases of every test those whose names hash to nought, and at least that of the lowest hash."""
    tests: dict[str, list[tuple[int, pytest.Item]]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append((hashed(item.nodeid), item))
    for cases in tests.values():
        share = one_in * (of_tables if cases[0][1].get_closest_marker("table") else 1)
        lowest = min(number for number, _ in cases)
        yield from (item for number, item in cases if number % share == 0 or number == lowest)
