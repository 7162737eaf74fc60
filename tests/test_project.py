"""The project itself: floors, start-up, lint, types, completions, and a README that tells the truth."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_dsv2

from dsv2cli.cli.app import completion_script

# A file imports only from files named before it.
ORDER = """
errors memory places device
kernels.quantized kernels.native kernels.linear kernels.attention kernels.experts
model.config model.size model.rope model.cache model.transformer model.fused
checkpoint.hub checkpoint.tokenizer checkpoint.weights checkpoint.quantize
engine.sampling engine.grammar engine.generate engine.batch engine.session engine.store engine.benchmark engine.needle
demo.words demo.stories demo.intents demo.chats demo.corpus demo.train demo.evaluate
cli.ui cli.options cli.config cli.flow cli.asking cli.batch cli.complete cli.commands cli.prompt cli.chat cli.bench cli.niah cli.info cli.doctor cli.quantize cli.manual cli.app __main__
""".split()
FILES = {
    ".".join(path.relative_to(ROOT / "dsv2cli").with_suffix("").parts): path
    for path in (ROOT / "dsv2cli").rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsv2cli"):
            module = (node.module or "").removeprefix("dsv2cli").removeprefix(".")
            for alias in node.names:
                longer = f"{module}.{alias.name}".removeprefix(".")
                yield longer if longer in FILES else module


def test_every_file_has_its_place():
    assert set(ORDER) == set(FILES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_point_down(name):
    for imported in imports(FILES[name]):
        assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_packages_are_one_docstring_and_re_export_nothing():
    for path in (ROOT / "dsv2cli").rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), path


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['dsv2', '--help']\nfrom dsv2cli.cli.app import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'prompt_toolkit'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout


def test_version():
    assert run_dsv2("--version").stdout.startswith("dsv2 0.")


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("shell", "file"), [("bash", "dsv2.bash"), ("zsh", "_dsv2"), ("fish", "dsv2.fish"), ("powershell", "dsv2.ps1")])
def test_completions_are_current(shell, file):
    assert (ROOT / "completions" / file).read_text() == completion_script(shell)


def test_completion_offers_commands_and_options():
    asked = {"_DSV2_COMPLETE": "complete_bash", "COMP_WORDS": "dsv2 co", "COMP_CWORD": "1"}
    assert run_dsv2(**asked).stdout.split() == ["complete", "config", "completion"]
    asked |= {"COMP_WORDS": "dsv2 complete --temp", "COMP_CWORD": "2"}
    assert "--temperature" in run_dsv2(**asked).stdout.split()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_test_command_is_what_ci_runs():
    (command,) = [block.strip() for block in blocks("sh") if "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text()


def examples():
    """Every console example: the command after `$ `, and what follows up to the next one."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


@pytest.mark.parametrize(("command", "output"), list(examples()), ids=lambda text: text[:40])
def test_the_readmes_examples_do_what_it_says(command, output):
    """Commands are run as they stand; where the README shows text it must be the text, `...` standing for any."""
    line = command.replace("dsv2 ", f"{shlex.quote(sys.executable)} -m dsv2cli ")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    pattern = ".*".join(re.escape(part) for part in output.strip().split("..."))
    assert re.fullmatch(pattern, done.stdout.strip(), re.DOTALL), done.stdout
