"""Defaults from a file, the environment and the command line, in that order."""

from __future__ import annotations

import json

import pytest
from running import run_dsv2


@pytest.fixture
def config(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    monkeypatch.setenv("DSV2_CONFIG", str(path))
    return path


def generated(*arguments, **environment):
    done = run_dsv2("complete", "Once", "--json", "--ignore-eos", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(config):
    config.write_text("[complete]\nmax-new-tokens = 3\nseed = 5\n")
    assert (len(generated()["token_ids"]), generated()["seed"]) == (3, 5)
    assert len(generated(DSV2_COMPLETE_MAX_NEW_TOKENS="4")["token_ids"]) == 4
    assert len(generated("-n", "2", DSV2_COMPLETE_MAX_NEW_TOKENS="4")["token_ids"]) == 2


def test_a_preset_comes_before_the_files_other_tables_and_after_the_command_line(config):
    config.write_text(
        "[chat]\nmax_new_tokens = 2\n"
        '[presets.long]\nmax-new-tokens = 9\ntemperature = 0\nsystem = "Be brief."\n'
    )
    ask = {"stdin": json.dumps([{"role": "user", "content": "Tell me a story."}])}

    def tokens(*arguments):
        return json.loads(run_dsv2("chat", "--json", *arguments, **ask).stdout)["usage"]["generated_tokens"]

    assert (tokens(), tokens("--preset", "long"), tokens("--preset", "long", "-n", "4")) == (2, 9, 4)


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("[chat", ["chat"], "can not be read"),
        ("[chatt]", ["chat"], "[chatt] is unknown"),
        ("x = 1", ["chat"], "[x] is unknown"),
        ("[chat]\ntemprature = 1", ["chat"], "did you mean temperature?"),
        ("[chat]\nseed = 'x'", ["chat"], "seed"),
        ("", ["chat", "--preset", "x"], "There is no preset 'x'"),
        ("[presets.x]\nfoo = 1", ["chat", "--preset", "x"], "no option 'foo'"),
        ("[presets]\nx = 1", ["chat", "--preset", "x"], "There is no preset 'x'"),
    ],
)
def test_what_makes_no_sense_is_said(config, content, arguments, words):
    config.write_text(content)
    done = run_dsv2(*arguments, stdin="Hello")
    assert (
        done.returncode == 2 and done.stdout == "" and words in done.stderr and "Traceback" not in done.stderr
    )


def test_config_shows_the_file_or_an_example_that_is_good(config):
    shown = run_dsv2("config").stdout
    assert "does not exist yet" in shown
    config.write_text(shown)
    assert run_dsv2("config").stdout == f"# {config}\n{shown}"
    assert run_dsv2("chat", "--preset", "reader", stdin="Hello").returncode == 0


def test_help_is_not_cluttered_with_variables():
    assert "DSV2_" not in run_dsv2("chat", "--help").stdout
