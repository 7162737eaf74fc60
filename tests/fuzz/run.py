"""The drivers by name, and running many cases of one."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from tests.fuzz.case import FAULTS, GOOD, Driver, Verdict, run_case
from tests.fuzz.checkpoint import CheckpointDriver
from tests.fuzz.foreign import ForeignDriver
from tests.fuzz.lines import LinesDriver
from tests.fuzz.session import JournalDriver, SessionDriver
from tests.fuzz.settings import SettingsDriver

DRIVERS: dict[str, Callable[[Path], Driver]] = {
    "checkpoint": CheckpointDriver,
    "foreign": ForeignDriver,
    "session": SessionDriver,
    "journal": JournalDriver,
    "lines": LinesDriver,
    "config": SettingsDriver,
}
CLUSTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def fuzz(name: str, seeds: Iterable[int], work: Path, keep: Path | None = None) -> list[Verdict]:
    """The cases of these seeds; everything is imported and loaded once, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    home = keep or work / "cases"
    home.mkdir(parents=True, exist_ok=True)
    try:
        with environment(work):
            driver = DRIVERS[name](work)
            gc.collect()
            gc.freeze()  # the children share what they do not change
            return [run_case(driver, seed, home, keep is not None) for seed in seeds]
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


@contextmanager
def environment(work: Path) -> Iterator[None]:
    """No settings of a person or a cluster, no network, and nothing kept outside of `work`."""
    own = {"DSV2_CONFIG": os.devnull, "XDG_DATA_HOME": str(work / "data"), "HF_HUB_OFFLINE": "1"}
    with mock.patch.dict(os.environ, own):
        for variable in list(os.environ):
            if variable in CLUSTER or (variable.startswith("DSV2_") and variable != "DSV2_CONFIG"):
                del os.environ[variable]
        yield


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """Drivers by outcomes."""
    outcomes = (*GOOD, *FAULTS)
    rows = [f"{'':12}" + "".join(f"{outcome:>10}" for outcome in outcomes)]
    for name, each in verdicts.items():
        counts = [sum(verdict.outcome == outcome for verdict in each) for outcome in outcomes]
        rows.append(f"{name:12}" + "".join(f"{count:10}" for count in counts))
    return "\n".join(rows)
