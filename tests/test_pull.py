"""dsv2 pull with the hubs' own clients, against hubs on loopback that fail in every way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import foreign
import pytest
from conftest import DATA
from hubs import (
    COMMIT,
    NAME,
    SHARDS,
    SHORT,
    Hub,
    begin,
    come,
    in_shards,
    name_hub,
    pulled,
    root,
    same,
    shard,
    snapshot,
    started,
    two_ggufs,
    wanted,
)
from huggingface_hub import close_session, constants, scan_cache_dir
from running import run_dsv2

from dsv2cli.checkpoint.pack import quantize_checkpoint
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.find import find_model
from dsv2cli.hubs.hashes import sha256
from dsv2cli.hubs.reference import ALIASES, Reference, nearest, parse

# Names.


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("v2-lite-chat", Reference(NAME)),
        ("V2.5", Reference("deepseek-ai/DeepSeek-V2.5")),
        ("coder-v2-lite", Reference("deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct")),
        ("ms:v2", Reference("deepseek-ai/DeepSeek-V2", "ms")),
        ("hf:a/b@refs/pr/1:int8", Reference("a/b", "hf", "refs/pr/1", "int8")),
        ("v2-lite:int4", Reference("deepseek-ai/DeepSeek-V2-Lite", format="int4")),
        ("ollama:deepseek-coder-v2:16b", Reference("deepseek-coder-v2:16b", "ollama")),
        ("ollama:deepseek-coder-v2", Reference("deepseek-coder-v2:latest", "ollama")),
        *(
            (text, None)
            for text in ("", "x", "a/b/c", "a/..", "../b", "a/b@../c", "v2:q4", "a--b/c", "a/b c")
        ),
        *((text, None) for text in ("ms:", "hf:x", "a/b\n", "ollama:", "http://a/b", "a/b@")),
    ],
)
def test_a_name_means_a_repository_a_copy_or_nothing(text, reference):
    assert parse(text) == reference


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("v2-lite-chatt", "v2-lite-chat"),
        ("v2lite", "v2-lite"),
        ("DeepSeek-V2-Lite", "v2-lite"),
        ("deepseek-ai/DeepSeek-Coder-V2-Lite-Instruc", "coder-v2-lite"),
        ("coderv2", "coder-v2"),
    ],
)
def test_what_was_perhaps_meant_is_suggested(typed, meant, home):
    assert meant in nearest(typed)
    assert meant in run_dsv2("info", f"{typed}!").stderr + run_dsv2("complete", "-m", typed, "x").stderr


def test_a_model_that_is_not_here_is_an_error_with_the_command_to_type(home):
    for command in (("complete", "x"), ("chat",), ("bench",), ("serve",), ("niah",), ("doctor",)):
        arguments = (command[0], "-m", SHORT) if command[0] != "doctor" else ("doctor", SHORT)
        done = run_dsv2(*arguments, *command[1:])
        assert done.returncode != 0 and f"dsv2 pull {SHORT}" in done.stderr + done.stdout
    assert "dsv2 pull ms:v2 --quantize int4" in run_dsv2("complete", "-m", "ms:v2:int4", "x").stderr
    assert "ollama pull a:b" in run_dsv2("complete", "-m", "ollama:a:b", "x").stderr


# The whole way.


def test_what_is_wanted_comes_and_other_programs_find_it(hub, home, repository):
    done = pulled("--json")
    told = json.loads(done.stdout)
    assert told["folder"] == str(snapshot(home)) and told["revision"] == COMMIT
    assert same(snapshot(home), repository)
    assert (root(home) / "refs" / "main").read_text() == COMMIT
    cache = scan_cache_dir(home / "hub")
    assert not cache.warnings and [repo.repo_id for repo in cache.repos] == [NAME]
    assert all("python" not in path and ".py" not in path and ".bin" not in path for path, _ in hub.bodies())
    before = len(hub.bodies())
    assert pulled().stdout == f"{snapshot(home)}\n" and len(hub.bodies()) == before
    done = run_dsv2("complete", "-m", SHORT, "--prompt-ids", "1,2", "-n", "2", "--json")
    assert len(json.loads(done.stdout)["token_ids"]) == 2, done.stderr
    assert not list(home.rglob("*.part"))


def test_modelscope_is_asked_in_its_own_protocol_and_has_its_own_cache(hub, home, repository):
    for arguments, name in ((("--source", "modelscope"), SHORT), ((), f"ms:{NAME}")):
        folder = Path(pulled(*arguments, name=name).stdout.strip())
        assert folder == home / "ms" / "models" / NAME.replace("/", "--") / "snapshots" / "master"
        assert same(folder, repository)
    assert len(hub.asked) == len(wanted(repository)) + 2  # the second time only the list
    assert find_model(f"ms:{SHORT}") == folder == find_model(SHORT)
    assert "is not on this machine" in run_dsv2("complete", "-m", f"hf:{SHORT}", "x").stderr


def test_a_folder_of_ones_own_is_made_and_never_written_over(hub, home, repository):
    folder = home / "to"
    folder.mkdir()
    pulled("--to", str(folder))
    assert same(folder, repository) and not (home / "hub").exists()
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: sha256(repository / name) for name in wanted(repository)}
    (folder / "config.json").write_text("{}")  # damaged: comes once more
    pulled("--to", str(folder))
    assert same(folder, repository)
    (home / "mine").mkdir()
    (home / "mine" / "letter").write_text("dear")
    assert "exists already" in pulled("--to", str(home / "mine"), code=2).stderr
    assert "exists already" in pulled("--to", str(home / "mine"), "--quantize", "int4", code=2).stderr
    assert (
        "exists already" in pulled("--to", str(home / "mine" / "letter"), "--quantize", "int4", code=2).stderr
    )
    pulled("--to", "/", code=2)
    here = home / "here"
    here.mkdir()
    done = run_dsv2("pull", SHORT, "--to", ".", cwd=here)
    assert done.returncode == 0 and done.stdout.strip() == str(here) and same(here, repository)
    assert [path.name for path in (home / "mine").iterdir()] == ["letter"]


def test_a_dry_run_says_what_would_come_and_fetches_nothing(hub, home, repository):
    told = json.loads(pulled("--dry-run", "--json").stdout)
    assert [file["name"] for file in told["files"]] == wanted(repository)
    assert told["bytes"] == sum((repository / name).stat().st_size for name in wanted(repository))
    packed = json.loads(pulled("--dry-run", "--quantize", "int4", "--json").stdout)
    assert packed["folder"] == str(home / "data" / "dsv2" / "models" / f"{NAME.replace('/', '--')}--int4")
    (home / "empty").mkdir()
    pulled("--dry-run", "--to", str(home / "empty"))
    assert (home / "empty").is_dir()
    assert "to come" in pulled("--dry-run").stdout and not hub.bodies() and not (home / "hub").exists()


def test_revisions_are_kept_apart_and_named(hub, home):
    pulled("--revision", "v1")
    assert (root(home) / "refs" / "v1").read_text() == COMMIT
    assert find_model(f"{SHORT}@v1") == find_model(f"{SHORT}@{COMMIT[:8]}") == find_model(SHORT)
    assert "has no revision v9" in pulled("--revision", "v9", code=1).stderr
    assert "is not on this machine" in run_dsv2("complete", "-m", f"{SHORT}@v9", "x").stderr
    pulled("--revision", "../x", code=2)


def test_gguf_files_are_chosen_by_a_part_of_their_name(home, tmp_path, monkeypatch):
    with Hub(two_ggufs(tmp_path / "gguf")) as hub:
        name_hub(monkeypatch, hub.url)
        pulled("--gguf", "Q4_K_M")
        assert sorted(path.name for path in snapshot(home).iterdir()) == ["config.json", "x-Q4_K_M.gguf"]
        assert "x-Q8_0.gguf" in pulled("--gguf", "Q5", code=2).stderr
        done = pulled(code=1)
        assert "has no *.safetensors" in done.stderr and "--gguf" in done.stderr
        pulled("--gguf", "Q4", "--quantize", "int4", code=2)
    assert "gguf Q4_K_M" in run_dsv2("models").stdout
    assert "can not be run" in run_dsv2("complete", "-m", SHORT, "x").stderr  # it is a header alone


# What goes wrong.


def test_a_connection_that_breaks_at_every_tenth_is_gone_on_with(hub, home, repository):
    hub.cuts = 36
    pulled()
    assert same(snapshot(home), repository)
    sent = sum(1 for _, part in hub.bodies() if part)
    assert sent >= 32 and hub.cuts == 0  # each of the broken ones was gone on with, or had nothing yet


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"no_ranges": True, "cuts": 2}, ""),
        ({"wrong": 2}, "is not what was published: fetching it once more"),
        ({"busy": 3, "retry_after": "1"}, "asks to wait 1 s"),
        ({"busy": 5, "retry_after": ""}, ""),
        ({"busy": 1, "retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, ""),
        ({"cuts": 3, "page_for_parts": 2}, ""),
        ({"cuts": 2, "refuses_parts": True}, ""),
    ],
)
@pytest.mark.parametrize("source", ["hf", "ms"])
def test_what_can_be_mended_is_mended(hub, home, repository, fault, told, source):
    for name, value in fault.items():
        setattr(hub, name, value)
    done = pulled("--source", source)
    assert told in done.stderr and same(Path(done.stdout.strip()), repository)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"wrong": 99}, "gives another model-0000"),
        ({"busy": 99, "retry_after": "100000"}, "asks to wait 100000 s"),
        ({"busy": 999, "retry_after": "0"}, "goes on where it stopped"),
        ({"extra": 5}, "more came than"),
        ({"busy": 99, "retry_after": "Fri, 31 Dec 2099 23:59:59 GMT"}, "asks to wait"),
        ({"cuts": 999, "refuses_parts": True}, "has no such part"),
        ({"cuts": 999, "no_ranges": True}, "the connection ended after"),
        ({"gated": True}, "accept its conditions"),
        ({"commit": 123}, "does not say which commit"),
        ({"status": 401, "error_code": "RepoNotFound"}, "needs HF_TOKEN"),
        ({"status": 403, "error_code": "GatedRepo"}, "accept its conditions"),
        ({"status": 404, "error_code": "RepoNotFound"}, "is not at 127.0.0.1"),
        ({"status": 418}, "it answered 418"),
        ({"name": "deepseek-ai/Other"}, "is not at 127.0.0.1"),
        ({"commit": "../../x"}, "does not say which commit"),
        ({"redirect": "file:///etc"}, "no https address"),
        ({"redirect": "http://127.0.0.1:9"}, "goes on where it stopped"),
    ],
)
def test_what_can_not_be_mended_is_a_sentence_and_shows_no_model(hub, home, fault, told):
    for name, value in fault.items():
        setattr(hub, name, value)
    done = pulled(code=1)
    assert told in done.stderr and "fix:" in done.stderr and done.stdout == ""
    assert not list(root(home).glob("snapshots/*/*")) and not list(root(home).glob("blobs/*"))
    with pytest.raises(Dsv2Error):
        find_model(SHORT)


@pytest.mark.parametrize(
    "change",
    [
        {"rfilename": "../../../evil.safetensors"},
        {"rfilename": "sub/config.json"},
        {"rfilename": "model-\x1b[31m.safetensors"},
        {"size": -5},
        {"size": "5"},
        {"rfilename": 5},
        {"lfs": {"sha256": 7, "size": 3, "pointerSize": 1}},
        {"size": 2**70},
        {"lfs": {"sha256": "../../x", "size": 3, "pointerSize": 1}},
        {"lfs": {"sha256": "A" * 64, "size": 3, "pointerSize": 1}},
        {"blobId": None, "lfs": None},
        {"rfilename": shard(2)},
    ],
)
def test_a_hub_that_lies_in_its_list_writes_nowhere_else(hub, home, change):
    hub.listing_changes[shard(1)] = change
    done = pulled(code=1)
    assert "fix:" in done.stderr and "\x1b" not in done.stderr
    assert not list(home.rglob("evil*")) and not list(root(home).glob("snapshots/*/config.json"))


def test_nobody_there_is_said_at_once(home, monkeypatch):
    name_hub(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    for source in ("hf", "ms"):
        assert "can not be reached" in pulled("--source", source, code=1).stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in pulled(code=1).stderr


def test_where_no_byte_comes_another_way_is_tried_and_said(hub, home, repository):
    hub.stalls = 3
    began = time.monotonic()
    done = run_dsv2("pull", SHORT, "--stall", "0.5")
    assert done.returncode == 0 and same(snapshot(home), repository) and time.monotonic() - began < 20
    assert "no byte of model-0000" in done.stderr and "with 2 at once" in done.stderr
    assert run_dsv2("pull", SHORT, "--stall", "0").returncode == 2


def test_a_trickle_is_a_stall(hub, home, repository):
    hub.trickles = 1
    done = run_dsv2("pull", SHORT, "--stall", "0.5")
    assert done.returncode == 0 and same(snapshot(home), repository) and "no byte of" in done.stderr


def test_a_proxy_leads_the_way(repository, home, monkeypatch):
    """It is asked for the list and for every file, and its own host for nothing."""
    with Hub(repository) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        name_hub(monkeypatch, "http://hub.example")
        close_session()  # the hub's client reads its environment when it is made
        pulled()
        assert same(snapshot(home), repository)
        assert {path.partition("/deepseek-ai")[0] for path, _ in proxy.bodies()} == {"http://hub.example"}
    close_session()


def test_who_knows_nobody_says_so_before_anything_comes(hub, home, monkeypatch):
    for variable, value, source in (
        ("ENDPOINT", "http://127.0.0.1:abc", "hf"),
        ("ENDPOINT", "http://[::1", "hf"),
        ("MODELSCOPE_ENDPOINT", "http://[::1", "ms"),
    ):
        with monkeypatch.context() as patch:
            if source == "hf":
                name_hub(patch, value)
            else:
                patch.setenv(variable, value)
            assert "fix:" in pulled("--source", source, code=1).stderr
    (home / "token").write_bytes(b"\xff\xfe")
    assert "token can not be used" in pulled(code=1).stderr


def test_another_family_is_refused_before_its_weights_come(home, tmp_path, monkeypatch):
    folder = tmp_path / "other"
    in_shards(folder, 2)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with Hub(folder) as hub:
        name_hub(monkeypatch, hub.url)
        for arguments in ((), ("--quantize", "int4")):
            assert "its config says llama" in pulled(*arguments, code=2).stderr
        assert not [path for path, _ in hub.bodies() if path.endswith(".safetensors")]
        assert not (home / "hub").exists() or not list((home / "hub").iterdir())
        (folder / "config.json").unlink()
        assert "has no config.json" in pulled(code=1).stderr
    with Hub(folder) as hub:
        name_hub(monkeypatch, hub.url)
        shutil.copy(DATA / "golden" / "v2" / "config.json", folder)
        (folder / shard(1, 2)).unlink()
        assert f"it lacks {shard(1, 2)}" in pulled(code=1).stderr
        assert not list(root(home).glob("snapshots/*"))


def test_a_token_is_seen_by_its_own_host_alone(hub, home, repository, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    for source in ("hf", "ms"):
        pulled("--source", source)
        assert "secret" not in str(hub.asked)  # the host that the environment names is not the hub
    hub.gated = True
    assert "--send-token" in pulled("--to", str(home / "a"), code=1).stderr
    hub.gated, hub.token = False, "hf_secret"
    assert "--send-token" in pulled("--to", str(home / "a"), code=1).stderr
    assert "secret" not in str(hub.asked)
    with Hub(repository) as elsewhere:
        hub.redirect = elsewhere.url
        pulled("--to", str(home / "b"), "--send-token")
        assert same(home / "b", repository) and "hf_secret" in str(hub.asked)
        assert elsewhere.asked and "secret" not in str(elsewhere.asked)
        hub.token = "ms-secret"
        pulled("--to", str(home / "c"), "--send-token", "--source", "ms")
        assert same(home / "c", repository) and "secret" not in str(elsewhere.asked)


def test_a_disk_without_room_is_seen_before_anything_is_fetched(hub, home, monkeypatch):
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    for arguments in ((), ("--quantize", "int4")):
        done = pulled(*arguments, code=1)
        assert (
            "no room" in done.stderr and "100 kB are free" in done.stderr and "MB are to come" in done.stderr
        )
    assert not [path for path, _ in hub.bodies() if ".safetensors" in path and "index" not in path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_is_said_and_what_came_is_kept(hub, home, repository, monkeypatch, number):
    write, left = os.write, [900_000]

    def little(file, data):
        left[0] -= len(data)
        if left[0] < 0 and len(data) > 1000:
            raise OSError(number, os.strerror(number))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", little)
        done = pulled(code=1)
    assert ("is full" in done.stderr or "could not be written" in done.stderr) and "fix:" in done.stderr
    assert not list(root(home).glob("snapshots/*/*"))
    asked = len(hub.bodies())
    pulled()
    again = hub.bodies()[asked:]
    assert same(snapshot(home), repository)
    assert len(again) < len(wanted(repository)) or any(part for _, part in again)


def test_a_place_that_can_not_be_written_is_said(hub, home, monkeypatch):
    (home / "hub").write_text("a file")
    assert "could not be written" in pulled(code=1).stderr
    assert "could not be written" in pulled("--to", "/proc/nothing/here", code=1).stderr


def test_a_limit_on_the_size_of_files_is_said(hub, home, start):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        process = start("pull", SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "could not be written" in told and "Traceback" not in told


# Several, and killed ones.


def test_two_at_once_share_the_work(hub, home, repository, start):
    hub.bytes_per_second = 100_000
    both = [start("pull", SHORT) for _ in range(2)]
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert same(snapshot(home), repository) and len(hub.bodies()) == len(wanted(repository))
    assert sum("waiting for it" in err for _, err in told) == 1


def test_ctrl_c_ends_it_and_the_next_goes_on(hub, home, repository, start):
    process = started(hub, home, start)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert "interrupted" in json.loads(run_dsv2("models", "--json").stdout)["models"][1]["lacks"]
    hub.bytes_per_second = 0
    asked = len(hub.bodies())
    pulled()
    assert same(snapshot(home), repository) and any(part for _, part in hub.bodies()[asked:])


def test_what_else_is_fetched_meanwhile_leaves_a_beginning_alone(hub, home, repository, start):
    begin(hub, home, start)
    assert run_dsv2("info", SHORT).returncode == 0  # fetches the config of the same revision
    kept = come(root(home))
    assert kept >= 50_000
    begin(hub, home, start, "--to", str(home / "to"))
    begin(hub, home, start, "--to", str(home / "to"), "--quantize", "int4")
    other = home / "other"
    in_shards(other, 2)
    hub.folder = other
    pulled("--to", str(home / "to"))  # what became of the repository meanwhile
    assert same(home / "to", other)
    hub.folder = repository
    pulled()
    assert same(snapshot(home), repository)


def test_a_folder_of_another_repository_is_never_written_into(hub, home, repository):
    folder = home / "to"
    pulled("--to", str(folder))
    hub.name = "deepseek-ai/DeepSeek-V2-Chat"
    assert "exists already" in pulled("--to", str(folder), name="v2-chat", code=2).stderr
    assert same(folder, repository)
    assert run_dsv2("quantize", str(folder), str(home / "packed")).returncode == 0
    before = {path.name: path.stat().st_mtime_ns for path in (home / "packed").iterdir()}
    assert "exists already" in pulled("--to", str(home / "packed"), name="v2-chat", code=2).stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in (home / "packed").iterdir()}


@pytest.mark.parametrize("more", [(), ("--quantize", "int4")])
def test_an_empty_folder_that_is_there_stays_the_same_folder(hub, home, repository, more):
    folder = home / "disk"
    folder.mkdir()
    number = folder.stat().st_ino
    pulled("--to", str(folder), *more)
    assert folder.stat().st_ino == number and run_dsv2("models", "verify", str(folder)).returncode == 0
    assert not [path for path in folder.iterdir() if path.name.startswith(".dsv2-")]
    assert not list(home.glob(".disk*"))


def test_packed_files_that_were_killed_on_their_last_way_arrive(hub, home, monkeypatch):
    folder, rename = home / "disk", Path.rename
    folder.mkdir()

    def once(path, target):
        if Path(target).parent == folder and len(list(folder.glob("*.safetensors"))) == 3:
            raise OSError(errno.EIO, "as if it was killed")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", once)
        pulled("--quantize", "int4", "--to", str(folder), code=1)
    asked = len(hub.bodies())
    pulled("--quantize", "int4", "--to", str(folder))
    assert len(hub.bodies()) == asked and run_dsv2("models", "verify", str(folder)).returncode == 0


@pytest.mark.parametrize("arguments", [(), ("--source", "ms"), ("--to",)])
def test_what_a_check_found_wrong_is_not_right_when_the_network_fails(hub, home, repository, arguments):
    arguments += (str(home / "to"),) if arguments == ("--to",) else ()
    folder = Path(pulled(*arguments).stdout.strip())
    file = (folder / shard(2)).resolve()
    file.write_bytes(bytes(file.stat().st_size))
    hub.busy, hub.retry_after = 999, "0"
    pulled("--check", *arguments, code=1)
    hub.busy = 0
    pulled(*arguments)
    assert same(folder, repository)


def test_what_can_never_be_a_model_is_refused_and_leaves_nothing(home, tmp_path, monkeypatch):
    config = json.loads((DATA / "golden" / "v2" / "config.json").read_text())
    index, bomb = "model.safetensors.index.json", {"num_hidden_layers": 1024, "n_routed_experts": 16384}
    for number, (name, text, told) in enumerate(
        (
            (index, "{}", "names no files"),
            (index, '{"weight_map": {"a": 5}}', "names no files"),
            (index, None, "it lacks model.safetensors"),
            (index, "[" * 100, "names no files"),
            ("config.json", json.dumps(config | bomb), "hold"),
        )
    ):
        folder = tmp_path / str(number)
        in_shards(folder, 2)
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
        with Hub(folder) as hub:
            name_hub(monkeypatch, hub.url)
            began = time.monotonic()
            for arguments in ((), ("--quantize", "int4"))[number == 4 :]:
                assert told in pulled(*arguments, code=1).stderr
            assert not [path for path, _ in hub.bodies() if path.endswith(".safetensors")]
            assert time.monotonic() - began < 20
    left = [path for path in home.rglob("*.safetensors*") if tmp_path / "0" not in path.parents]
    assert not [path for path in left if "hub" in path.parts]


def test_of_shards_and_one_whole_file_the_shards_come(hub, home, repository, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(repository, both)
    (both / "model.safetensors").write_bytes(b"the same once more")
    hub.folder = both
    pulled("--quantize", "int4")
    pulled()
    assert same(snapshot(home), repository)
    assert not [path for path, _ in hub.bodies() if path.endswith("/model.safetensors")]
    assert run_dsv2("quantize", SHORT, str(home / "after")).returncode == 0
    ours = find_model(f"{SHORT}:int4")
    assert (ours / "config.json").read_bytes() == (home / "after" / "config.json").read_bytes()


def test_a_packed_copy_is_of_its_revision(hub, home):
    pulled("--quantize", "int4", "--revision", "v1")
    assert find_model(f"{SHORT}@v1:int4")
    with pytest.raises(Dsv2Error):
        find_model(f"{SHORT}:int4")
    assert "one of the two" in pulled("--source", "hf", name="ms:v2", code=2).stderr
    assert "one of the two" in pulled("--revision", "v1", name="v2@v2", code=2).stderr
    assert "is not int8" in pulled("--quantize", "int8", name=f"{SHORT}:int4", code=2).stderr
    assert "models verify" in pulled("--check", name=f"{SHORT}:int4", code=2).stderr
    told = json.loads(pulled("--quantize", "int4", "--revision", "v1", "--dry-run", "--json").stdout)
    assert told["bytes"] == 0 and all(file["here"] for file in told["files"])


def test_a_packed_folder_of_something_else_is_no_success(hub, home, tmp_path):
    pulled("--quantize", "int4")
    changed = tmp_path / "changed"
    in_shards(changed, 3)
    hub.folder, hub.commit = changed, "b" * 40
    assert "is not what" in pulled("--quantize", "int4", code=2).stderr
    folder = home / "empty"
    folder.mkdir()
    pulled("--quantize", "int4", "--to", str(folder))
    assert run_dsv2("models", "verify", str(folder)).returncode == 0


@pytest.mark.parametrize("arguments", [(), ("--source", "ms"), ("--to",)])
def test_kill_9_at_any_moment_loses_nothing_and_shows_nothing_half(hub, home, repository, start, arguments):
    """Fifty moments in all: nothing lies under a final name that is not what was published."""
    arguments += (str(home / "to"),) if arguments == ("--to",) else ()
    drawn = random.Random(str(arguments))
    hub.bytes_per_second = 400_000
    finals = {
        (): lambda: root(home).glob("blobs/*"),
        ("--source", "ms"): lambda: (home / "ms").glob("models/*/snapshots/*/*"),
    }.get(arguments, lambda: (home / "to").glob("*"))
    for _ in range(17):
        process = start("pull", SHORT, *arguments)
        time.sleep(drawn.uniform(0, 0.9))
        process.kill()
        process.wait()
        hashes = {hashlib.sha256((repository / name).read_bytes()).hexdigest() for name in wanted(repository)}
        for path in finals():
            ours = path.name in ("SHA256SUMS", ".dsv2") or (
                path.suffix == ".lock" and not path.stat().st_size
            )
            assert ours or path.is_dir() or sha256(path) in hashes
        for link in root(home).glob("snapshots/*/*"):
            assert sha256(link) == sha256(repository / link.name)
    hub.bytes_per_second = 0
    done = pulled(*arguments)
    assert same(Path(done.stdout.strip()), repository)
    assert not [path for path in home.rglob("*") if ".part" in path.name or "unfinished" in path.name]


# Packed while it comes.


def test_packing_while_it_comes_gives_what_packing_afterwards_gives(hub, home, repository, monkeypatch):
    most, shards = [0], set()
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            with contextlib.suppress(OSError):
                here = {
                    path.name.removesuffix(".part")
                    for path in (home / "data").rglob(f"model-*-of-{SHARDS:06d}*")
                }
                shards.update(here)
                most[0] = max(most[0], len(here))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    hub.bytes_per_second = 1e6
    try:
        folder = Path(pulled("--quantize", "int4").stdout.strip())
    finally:
        stop.set()
        thread.join()
    assert len(shards) == SHARDS and most[0] <= 3
    local = home / "local"
    shutil.copytree(repository, local, ignore=shutil.ignore_patterns("consolidated*", "*.py", "*.bin"))
    assert run_dsv2("quantize", str(local), str(home / "after")).returncode == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (home / "after").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (home / "after" / name).read_bytes(), name
    assert find_model(f"{SHORT}:int4") == folder and "only" in run_dsv2("complete", "-m", SHORT, "x").stderr
    done = run_dsv2("complete", "-m", f"{SHORT}:int4", "--prompt-ids", "1,2", "-n", "2", "--json")
    assert len(json.loads(done.stdout)["token_ids"]) == 2
    asked = len(hub.bodies())
    pulled(name=f"{SHORT}:int4")
    assert len(hub.bodies()) == asked


def test_a_layer_in_four_shards_is_packed_and_said(home, tmp_path, monkeypatch):
    folder = tmp_path / "seven"
    folder.mkdir()
    in_shards(folder, 7)
    with Hub(folder) as hub:
        name_hub(monkeypatch, hub.url)
        assert "lies in 4 shards at once" in pulled("--quantize", "int4").stderr
    assert run_dsv2("models", "verify", f"{SHORT}:int4").returncode == 0


def test_packing_that_was_killed_goes_on_behind_what_is_packed(hub, home, repository, start):
    hub.bytes_per_second = 300_000
    packed = home / "data" / "dsv2" / "models"
    for count in (1, 3):
        process = start("pull", SHORT, "--quantize", "int8")
        until = time.monotonic() + 60
        while len(list(packed.glob(".*/packed/*.safetensors"))) < count:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
    found = json.loads(run_dsv2("models", "--json").stdout)["models"]
    assert any("--quantize int8 goes on" in model["lacks"] for model in found)
    hub.bytes_per_second = 0
    asked = len(hub.bodies())
    folder = Path(pulled("--quantize", "int8").stdout.strip())
    fetched = {path.rpartition("/")[2] for path, _ in hub.bodies()[asked:]}
    assert shard(1) not in fetched
    local = home / "local"
    shutil.copytree(repository, local, ignore=shutil.ignore_patterns("consolidated*"))
    assert run_dsv2("quantize", str(local), str(home / "after"), "--to", "int8").returncode == 0
    for path in (home / "after").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in packed.iterdir()] == [folder.name]


@pytest.mark.parametrize(("kind", "shown"), [("dsv2", "int4"), ("awq", "awq"), ("mlx", "mlx")])
def test_what_is_packed_already_is_not_packed_again(home, tmp_path, monkeypatch, kind, shown):
    """It is fetched and run as it is, also where another program has packed it."""
    golden, packed = DATA / "golden" / "v2", tmp_path / "packed"
    if kind == "dsv2":
        quantize_checkpoint(golden, packed, "int4", 64)
    else:
        (foreign.write_awq if kind == "awq" else foreign.write_mlx)(golden, packed)
    with Hub(packed) as hub:
        name_hub(monkeypatch, hub.url)
        assert "is quantised already" in pulled("--quantize", "int4", code=2).stderr
        pulled()
    assert shown in run_dsv2("models").stdout
    assert run_dsv2("complete", "-m", SHORT, "--prompt-ids", "1,2", "-n", "2", "--ignore-eos").returncode == 0


def test_quantize_has_a_place_for_a_repositorys_copy(hub, home):
    pulled()
    assert run_dsv2("quantize", SHORT, "--to", "int8").returncode == 0
    assert find_model(f"{SHORT}:int8").parent == home / "data" / "dsv2" / "models"
    assert "OUT" in run_dsv2("quantize", str(DATA / "golden" / "v2")).stderr
    assert "dsv2 pull" in run_dsv2("quantize", "v2").stderr


# Offered.


def test_a_person_is_asked_and_a_script_says_yes(hub, home, repository, person):
    ids = ("--prompt-ids", "1,2", "-n", "2", "--json")
    nora = person("complete", "-m", SHORT, *ids)
    nora.wait(r"Fetch 1\.6\d+ MB from 127\.0\.0\.1:\d+\? \[y/N\]")
    nora.type("n\r")
    assert "dsv2 pull" in nora.end(2) and not hub.bodies()
    nora = person("complete", "-m", SHORT, *ids)
    nora.wait("Fetch")
    nora.type("y\r")
    assert "token_ids" in nora.end(0) and same(snapshot(home), repository)
    done = run_dsv2("complete", "-m", f"ms:{SHORT}:int8", "--yes", *ids)
    assert done.returncode == 0 and len(json.loads(done.stdout)["token_ids"]) == 2, done.stderr
    assert find_model(f"{SHORT}:int8")


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("bench", ("--prompt", "4", "--generate", "2", "-r", "1")),
        ("niah", ("--lengths", "64")),
        ("chat", ()),
        ("quantize", ()),
        ("serve", ()),
    ],
)
def test_every_command_that_runs_a_model_takes_yes(hub, home, command, rest):
    model = (SHORT,) if command == "quantize" else ("-m", SHORT)
    done = run_dsv2(command, *model, "--yes", *rest)
    assert snapshot(home).is_dir() and "is not on this machine" not in done.stderr


def test_of_a_config_no_more_comes_than_the_config(hub, home):
    assert json.loads(run_dsv2("info", SHORT, "--json").stdout)["model"] == SHORT
    assert [path.rpartition("/")[2] for path, _ in hub.bodies()] == ["config.json"]
    assert json.loads(run_dsv2("info", SHORT, "--json").stdout)["model"] == SHORT and len(hub.bodies()) == 1
    assert run_dsv2("info", f"{SHORT}@v9").returncode == 1  # of another revision this is no config
    done = run_dsv2("bench", "--random-weights", "v2-lite", "--prompt", "4", "--generate", "2", "-r", "1")
    assert "is not at" in done.stderr
    assert "of its weights there is nothing" not in run_dsv2("models").stdout


def test_short_names_are_repositories_of_deepseek():
    assert all(parse(name) == Reference(whole) for name, whole in ALIASES.items())
    assert all(whole.startswith("deepseek-ai/DeepSeek-") for whole in ALIASES.values())
