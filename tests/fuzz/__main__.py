"""`python -m tests.fuzz --n 1000 --seed 0`: cases by their seeds, and a table of what became of them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from tests.fuzz.case import FAULTS, Verdict
from tests.fuzz.run import DRIVERS, fuzz, table


def main() -> int:
    """Exit code 1 where there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="cases of each driver")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; those after it count up")
    parser.add_argument("--driver", choices=sorted(DRIVERS), action="append", help="default: all")
    parser.add_argument("--case", type=int, metavar="SEED", help="only the case of this seed")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the folders of cases with a fault here"
    )
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.n) if given.case is None else [given.case]
    verdicts: dict[str, list[Verdict]] = {}
    for name in given.driver or DRIVERS:
        with tempfile.TemporaryDirectory(prefix="dsv2-fuzz-", ignore_cleanup_errors=True) as folder:
            began = time.perf_counter()
            verdicts[name] = fuzz(name, seeds, Path(folder), given.keep)
            took = (time.perf_counter() - began) / len(seeds)
            middle = median(verdict.seconds for verdict in verdicts[name])
        print(
            f"{name}: {len(seeds)} cases, {took * 1000:.0f} ms each, in the middle {middle * 1000:.0f} ms",
            file=sys.stderr,
            flush=True,
        )
        if given.case is not None:
            print(f"{name} {given.case}: {verdicts[name][0]}")
    print(table(verdicts))
    for name, each in verdicts.items():
        show_faults(name, each)
    return int(any(verdict.outcome in FAULTS for each in verdicts.values() for verdict in each))


def show_faults(name: str, verdicts: list[Verdict]) -> None:
    """Faults of one driver, those with the same last line together, the most frequent first."""
    groups = defaultdict(list)
    for verdict in verdicts:
        if verdict.outcome in FAULTS:
            groups[verdict.outcome, re.sub(r"\d+", "N", verdict.line)].append(verdict)
    for (outcome, _), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"\n{name}, {outcome}, {len(group)} times: {group[0].line}")
        for verdict in group:
            print(f"  --case {verdict.seed}: {verdict.mutation}")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
