"""What is damaged ends in a sentence or in the right answer. Many more cases: `python -m tests.fuzz`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fuzz.case import FAULTS
from tests.fuzz.run import DRIVERS, fuzz, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cases are limited as Linux limits them")


CASES = {"checkpoint": 130, "foreign": 30, "session": 80, "journal": 80, "lines": 30, "config": 60}
FOUND = Path(__file__).parent / "fuzz" / "found.txt"  # a driver, a seed and what it was, a line


@pytest.mark.parametrize("name", DRIVERS)
def test_what_was_a_fault_once_is_none(name, tmp_path):
    lines = [line.split(maxsplit=2) for line in FOUND.read_text().splitlines() if not line.startswith("#")]
    seeds = [int(seed) for driver, seed, _ in lines if driver == name]
    assert seeds or name == "journal"
    refuse_faults(name, fuzz(name, seeds, tmp_path))


@pytest.mark.parametrize("name", DRIVERS)
def test_nothing_damaged_is_taken_for_whole(name, tmp_path):
    refuse_faults(name, fuzz(name, range(CASES[name]), tmp_path))


def refuse_faults(name, verdicts):
    faults = [verdict for verdict in verdicts if verdict.outcome in FAULTS]
    assert not faults, table({name: verdicts}) + "".join(f"\n{verdict}" for verdict in faults)
