"""The project itself: floors, start-up, lint, types, completions, and a README that tells the truth."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
from conftest import ROOT
from regenerate import COMPLETIONS
from running import run_dsv2, run_process

from dsv2cli.cli.app import COMMANDS, app
from dsv2cli.cli.completion import completion_script

# A file imports only from files named before it.
ORDER = """
errors outside formats memory disk places device team
kernels.build kernels.quantized kernels.native kernels.linear kernels.latents kernels.attention
kernels.experts
kernels.triton.linear kernels.triton.attention kernels.triton.experts
model.config model.share model.size model.predicted model.rope model.pool model.step model.layers
model.transformer
hubs.hashes hubs.gguf hubs.gguf_held hubs.gguf_settings hubs.reference hubs.shelf hubs.find
hubs.remote hubs.download hubs.pull hubs.removal
checkpoint.template checkpoint.tokenizer checkpoint.found
checkpoint.safetensors checkpoint.formats.coded checkpoint.formats.convert checkpoint.formats.parts
checkpoint.formats.awq checkpoint.formats.gptq checkpoint.formats.fp8 checkpoint.formats.compressed
checkpoint.formats.mlx checkpoint.formats.gguf checkpoint.formats.read
checkpoint.blueprint checkpoint.names checkpoint.load checkpoint.pack
checkpoint.streamed checkpoint.verify checkpoint.placement
run.wish run.plan run.numa run.launch run.machine run.runner run.page_store run.cpu run.gpu run.leader
run.open run.worker
engine.grammar engine.fill engine.request engine.sampling engine.text engine.pages engine.scheduler
engine.session engine.store engine.latents engine.journal engine.benchmark engine.peer engine.traffic
engine.needle engine.likelihood engine.lm_eval
evaluation.answers evaluation.sandbox evaluation.statistics evaluation.data evaluation.question
evaluation.tasks.parts evaluation.tasks.subjects evaluation.tasks.mmlu evaluation.tasks.cmmlu
evaluation.tasks.ceval evaluation.tasks.arc evaluation.tasks.hellaswag evaluation.tasks.gsm8k
evaluation.tasks.math evaluation.tasks.bbh evaluation.tasks.humaneval evaluation.tasks.mbpp
evaluation.tasks.perplexity evaluation.tasks.listed
evaluation.published evaluation.record evaluation.run evaluation.summary evaluation.verdict evaluation.chart
remote.calls remote.server remote.traffic
serve.desk serve.door serve.fields serve.tools serve.openai serve.anthropic serve.responses
serve.metrics serve.app
cli.ui cli.values cli.config cli.options cli.offer cli.flow cli.attach cli.talk cli.asking cli.far
cli.here cli.lines cli.complete cli.commands cli.typewriter cli.prompt cli.chat cli.sessions
cli.figures cli.traffic cli.against cli.bench cli.pull cli.models cli.serve cli.niah cli.scores cli.eval
cli.info cli.doctor cli.quantize cli.completion cli.fields cli.manual cli.app __main__
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


LIGHT = """
import sys
sys.argv = ["dsv2", *sys.argv[1:]]
from dsv2cli.cli.app import main
code = 0
try: main()
except SystemExit as error: code = error.code
heavy = {"torch", "transformers", "accelerate", "numpy", "prompt_toolkit"} & set(sys.modules)
print(f"code {code}", *heavy)
"""


@pytest.mark.parametrize(
    ("words", "shown", "code"),
    [
        (("--help",), "complete", 0),
        (("complete", "--dry-run", "--regex", "a+", "Hello"), "runs on: cpu", 0),
        (("complete", "--temperature", "-1", "Hello"), "", 2),
        (("complete", "--regex", "(", "Hello"), "", 2),
        (("complete", "--api", "127.0.0.1:9", "Hello"), "", 1),
        (("complete", "--model", "./nowhere", "Hello"), "", 2),
        (("complete", "--prompt-ids", "999999999"), "", 2),
    ],
    ids=str,
)
def test_what_needs_no_model_does_not_import_torch(words, shown, code):
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == f"code {code}", done.stdout + done.stderr
    assert shown in done.stdout and "Traceback" not in done.stderr


def test_version():
    assert run_dsv2("--version").stdout.startswith("dsv2 0.")


@pytest.mark.parametrize("words", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(words):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("shell", "file"), COMPLETIONS.items())
def test_completions_are_current(shell, file):
    assert (ROOT / "completions" / file).read_text() == completion_script(shell)


def test_the_manual_page_is_current_and_well_formed():
    page = (ROOT / "completions" / "dsv2.1").read_text()
    assert page == run_dsv2("manual").stdout
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help.startswith(COMMANDS[name])
        for parameter in command.params:
            assert parameter.name == "help" or parameter.opts[0].replace("-", "\\-") in page
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z"], input=page, capture_output=True, text=True
        )
        assert done.stderr == ""


def complete(words, **environment):
    asked = {
        "_DSV2_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    run = run_process if environment else run_dsv2  # libraries read some variables when they are imported
    return run(**asked, **environment).stdout.strip().split("\n")


def test_completion_offers_commands_and_options():
    assert complete("dsv2 co") == ["complete", "config", "completion"]
    assert "--temperature" in complete("dsv2 complete --temp")


def test_completion_knows_local_models(tmp_path):
    cache = tmp_path / "models--deepseek-ai--DeepSeek-V2-Lite" / "snapshots" / "1"
    other = tmp_path / "models--deep--other" / "snapshots" / "1"
    for folder, kind in ((cache, "deepseek_v2"), (other, "llama")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        (folder / "model.safetensors").touch()
    (cache.parents[1] / "refs").mkdir()
    (cache.parents[1] / "refs" / "main").write_text("1")
    golden = ROOT / "tests" / "data" / "golden"
    assert complete(f"dsv2 chat --model {golden}/v", HF_HUB_CACHE=str(tmp_path)) == [f"{golden}/v2"]
    assert complete(f"dsv2 info {golden.parent}/go") == [f"{golden}/"]
    lite = ROOT / "tests" / "data" / "gguf" / "lite-Q4_0.gguf"
    assert complete(f"dsv2 chat --model {lite.parent}/li") == [str(lite)]
    assert complete("dsv2 bench -m deep", HF_HUB_CACHE=str(tmp_path)) == ["deepseek-ai/DeepSeek-V2-Lite"]


def test_completion_knows_saved_sessions_and_needs_no_torch(tmp_path):
    (tmp_path / "dsv2" / "sessions").mkdir(parents=True)
    for name in ("tea", "trains"):
        (tmp_path / "dsv2" / "sessions" / f"{name}.json").write_text("[]")
    assert sorted(complete("dsv2 chat --resume t", XDG_DATA_HOME=str(tmp_path))) == ["tea", "trains"]
    code = """
import sys
from dsv2cli.cli.options import models, sessions
models("x"), sessions("x")
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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
    """Commands are run as they stand; where the README shows text it must be the text, `...` standing for
    any.
    """
    line = command.replace("dsv2 ", f"{shlex.quote(sys.executable)} -m dsv2cli ")
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    pattern = ".*".join(re.escape(part) for part in output.strip().split("..."))
    assert re.fullmatch(pattern, done.stdout.strip(), re.DOTALL), done.stdout


def test_every_option_is_tried_by_a_test():
    """Each appears, by its own name, in an argument list or a transcript somewhere."""
    tests = "".join(
        path.read_text()
        for path in [
            *(ROOT / "tests").glob("test_*.py"),
            *(ROOT / "tests" / "data" / "transcripts").glob("*.txt"),
        ]
    )
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            options = [option for option in parameter.opts if option.startswith("-") and option != "--help"]
            tried = [option for option in options if re.search(rf"[\"' =]{option}[\"' =]", tests)]
            assert tried or not options, f"dsv2 {name} {options}"
