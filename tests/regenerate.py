"""Write anew what follows from the program itself: completions, the manual page and the golden transcripts.

A transcript is a file of commands after `$ `, each followed by what it prints on stdout, `! ` before what it prints on
stderr, and its exit code where that is not 0. Numbers that a clock gives stand as `~`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRANSCRIPTS = ROOT / "tests" / "data" / "transcripts"
COMPLETIONS = {"bash": "dsv2.bash", "zsh": "_dsv2", "fish": "dsv2.fish", "powershell": "dsv2.ps1"}
CLOCK = re.compile(r'("\w*(?:seconds|per_second)": )[-0-9.e]+')


def commands(path: Path) -> list[str]:
    return [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("$ ")]


def record(path: Path) -> str:
    """Run a transcript's commands, one after the other in an empty folder, and write down what happens."""
    program = f"{shlex.quote(sys.executable)} -m dsv2cli"
    out = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "golden").symlink_to(ROOT / "tests" / "data" / "golden")
        for command in commands(path):
            line = f'dsv2() {{ {program} "$@"; }}; {command}'
            environment = os.environ | {"DSV2_CONFIG": os.devnull, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=folder,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
            text = CLOCK.sub(r"\1~", done.stdout)
            out.append(f"$ {command}\n{text}" + ("" if text.endswith("\n") or not text else "\n"))
            out += [f"! {error}\n" for error in done.stderr.splitlines()]
            out += [f"exit code {done.returncode}\n"] if done.returncode else []
    return "".join(out)


def main() -> None:
    from dsv2cli.cli.app import completion_script, manual_page

    for shell, file in COMPLETIONS.items():
        (ROOT / "completions" / file).write_text(completion_script(shell), encoding="utf-8")
    (ROOT / "completions" / "dsv2.1").write_text(manual_page(), encoding="utf-8")
    for path in sorted(TRANSCRIPTS.glob("*.txt")):
        path.write_text(record(path), encoding="utf-8")


if __name__ == "__main__":
    main()
