"""Write anew what follows from the program itself: completions, the manual page, the golden transcripts, and
the hashes of the scripts in the server's page.

A transcript is a file of commands after `$ `, each followed by what it prints on stdout, `! ` before what it
prints on stderr, and its exit code where that is not 0. Numbers that a clock gives stand as `~`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from running import run_dsv2

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "dsv2cli" / "serve" / "page.html"
TRANSCRIPTS = ROOT / "tests" / "data" / "transcripts"
COMPLETIONS = {"bash": "dsv2.bash", "zsh": "_dsv2", "fish": "dsv2.fish", "powershell": "dsv2.ps1"}
CLOCK = re.compile(r'("\w*(?:seconds|per_second)": )[-0-9.e]+')


def commands(path: Path) -> list[str]:
    return [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("$ ")]


# A function of the shell that leaves what it is asked in files, says so, and waits for the exit code.
DSV2 = """
dsv2() {
    cat > "$BOX/stdin"; printf '%s\\0' "$@" > "$BOX/arguments"
    echo >&"$ASKS"; read -r code <&"$CODES"
    cat "$BOX/stdout"; cat "$BOX/stderr" >&2; return "$code"
}
"""


def shell(line: str, folder: Path, box: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as bash understands it, and every dsv2 in it within this process."""
    (asks, ask), (code, codes) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", DSV2 + line],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(ask, code),
        env=os.environ | {"BOX": str(box), "ASKS": str(ask), "CODES": str(code)},
    )
    os.close(ask)
    try:
        while os.read(asks, 1):  # nothing, once all that could ask has ended
            arguments = (box / "arguments").read_text(encoding="utf-8").split("\0")[:-1]
            stdin = (box / "stdin").read_bytes()
            done = run_dsv2(*arguments, stdin=stdin, cwd=folder, DSV2_CONFIG=os.devnull)
            (box / "stdout").write_text(done.stdout, encoding="utf-8")
            (box / "stderr").write_text(done.stderr, encoding="utf-8")
            os.write(codes, f"{done.returncode}\n".encode())
        output = process.communicate()
    finally:
        process.kill()
        for end in (asks, code, codes):
            os.close(end)
    return subprocess.CompletedProcess(line, process.returncode, *output)


def record(path: Path) -> str:
    """Run a transcript's commands, one after the other in an empty folder, and write down what happens."""
    out = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as box:
        (Path(folder) / "golden").symlink_to(ROOT / "tests" / "data" / "golden")
        for command in commands(path):
            done = shell(command, Path(folder), Path(box))
            text = CLOCK.sub(r"\1~", done.stdout)
            out.append(f"$ {command}\n{text}" + ("" if text.endswith("\n") or not text else "\n"))
            out += [f"! {error}\n" for error in done.stderr.splitlines()]
            out += [f"exit code {done.returncode}\n"] if done.returncode else []
    return "".join(out)


def with_hashes(page: str) -> str:
    """The server's page with the hashes of its scripts in its Content-Security-Policy: no other one runs."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return re.sub(r"script-src [^;]*;", f"script-src {allowed};", page, count=1)


def main() -> None:
    from dsv2cli.cli.completion import completion_script

    PAGE.write_text(with_hashes(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for shell, file in COMPLETIONS.items():
        (ROOT / "completions" / file).write_text(completion_script(shell), encoding="utf-8")
    (ROOT / "completions" / "dsv2.1").write_text(run_dsv2("manual").stdout, encoding="utf-8")
    for path in sorted(TRANSCRIPTS.glob("*.txt")):
        path.write_text(record(path), encoding="utf-8")


if __name__ == "__main__":
    main()
