"""dsv2 models: what lies where, whether it is whole, and what is deleted and what is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import DATA
from hubs import (
    COMMIT,
    NAME,
    SHORT,
    Hub,
    begin,
    gguf,
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
from huggingface_hub import constants, scan_cache_dir
from running import run_dsv2

from dsv2cli.hubs import shelf
from dsv2cli.hubs.find import find_model
from dsv2cli.hubs.reference import Reference

OTHER = "b" * 40


def ollama(home, name, tag, data):
    store = home / "ollama"
    digest = hashlib.sha256(data).hexdigest()
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    (store / "blobs" / f"sha256-{digest}").write_bytes(data)
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}]
    manifest.write_text(json.dumps({"layers": layers}))
    return store / "blobs" / f"sha256-{digest}"


def listed():
    return {each["name"]: each for each in json.loads(run_dsv2("models", "--json").stdout)["models"]}


def test_everything_of_this_family_is_listed_wherever_it_lies(hub, home, repository):
    blob = ollama(home, "deepseek-coder-v2", "16b", gguf("deepseek2"))
    ollama(home, "llama3", "8b", gguf("llama"))
    pulled()
    pulled("--source", "ms")
    pulled("--quantize", "int4")
    old = home / "ms" / "hub" / "deepseek-ai" / "DeepSeek-V2___5"
    shutil.copytree(DATA / "golden" / "v2", old)
    other = home / "hub" / "models--x--llama" / "snapshots" / "1"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "llama"}')
    found = listed()
    assert set(found) == {
        "(in the package: no --model)",
        NAME,
        f"ms:{NAME}",
        f"{NAME}:int4",
        "ms:deepseek-ai/DeepSeek-V2.5",
        "ollama:deepseek-coder-v2:16b",
    }
    assert found["ollama:deepseek-coder-v2:16b"]["where"] == str(blob)
    assert found[NAME]["bytes"] == sum((repository / name).stat().st_size for name in wanted(repository))
    assert found[f"{NAME}:int4"]["format"] == "int4" and found[NAME]["context"] == 163840
    assert found[NAME]["used"].startswith(time.strftime("%Y"))
    for name in set(found) - {"(in the package: no --model)"}:
        assert run_dsv2("models", "path", name).stdout == found[name]["where"] + "\n"
        assert json.loads(run_dsv2("models", "path", name, "--json").stdout) == found[name]


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "index", "config"])
@pytest.mark.parametrize("source", ["hf", "ms"])
def test_verify_finds_what_is_wrong_without_a_network(hub, home, damage, source):
    name = f"{source}:{SHORT}"
    folder = Path(pulled("--source", source).stdout.strip())
    done = run_dsv2("models", "verify", name)
    assert done.returncode == 0 and "headers: " in done.stdout and "unknown" not in done.stdout, done.stdout
    assert run_dsv2("models", "verify", name, "--online").returncode == 0
    asked = len(hub.asked)
    file = folder / {"index": "model.safetensors.index.json", "config": "config.json"}.get(damage, shard(3))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.resolve().write_bytes(data[:-7] if damage == "cut" else data)
    done = run_dsv2("models", "verify", name, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1 and not told["ok"] and len(hub.asked) == asked
    assert file.name in {each["file"] for each in told["files"] if each["state"] == "bad"}
    done = run_dsv2("models", "verify", name)
    assert done.returncode == 1 and "fix:" in done.stderr and file.name in done.stderr + done.stdout


def test_verify_looks_at_folders_packed_copies_and_ollamas_files(hub, home):
    assert run_dsv2("models", "verify", str(DATA / "golden" / "dense_only")).stdout.count("unknown") > 0
    pulled("--quantize", "int4")
    assert run_dsv2("models", "verify", f"{SHORT}:int4").returncode == 0
    assert "no hub" in run_dsv2("models", "verify", f"{SHORT}:int4", "--online").stderr
    blob = ollama(home, "deepseek-coder-v2", "16b", gguf("deepseek2"))
    assert run_dsv2("models", "verify", "ollama:deepseek-coder-v2:16b").returncode == 0
    blob.write_bytes(blob.read_bytes() + b"x")
    assert run_dsv2("models", "verify", "ollama:deepseek-coder-v2:16b").returncode == 1


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_what_verify_finds_can_be_fetched_again(hub, home, repository, source):
    folder = Path(pulled("--source", source).stdout.strip())
    file = (folder / shard(2)).resolve()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    told = run_dsv2("models", "verify", f"{source}:{SHORT}").stderr
    assert f"dsv2 pull {source}:{NAME} --check" in told
    asked = len(hub.bodies())
    pulled("--check", name=f"{source}:{NAME}")
    fetched = {path.rpartition("/")[2].rpartition("=")[2] for path, _ in hub.bodies()[asked:]}
    assert shard(2) in fetched and shard(1) not in fetched and same(folder, repository)
    assert run_dsv2("models", "verify", f"{source}:{SHORT}").returncode == 0


def test_a_file_that_nobody_lists_is_missed_online(hub, home):
    folder = Path(pulled().stdout.strip())
    (folder / "generation_config.json").unlink()
    shutil.rmtree(root(home) / ".dsv2")
    assert run_dsv2("models", "verify", SHORT).returncode == 0
    done = run_dsv2("models", "verify", SHORT, "--online")
    assert done.returncode == 1 and "generation_config.json: the hub has it" in done.stdout


def test_what_the_hub_has_changed_meanwhile_is_seen_online(hub, home, repository, tmp_path):
    pulled("--source", "ms")
    changed = tmp_path / "changed"
    shutil.copytree(repository, changed)
    (changed / "generation_config.json").write_text("{}")
    hub.folder = changed
    done = run_dsv2("models", "verify", f"ms:{SHORT}", "--online")
    assert done.returncode == 1 and "generation_config.json: its hash is" in done.stdout
    pulled("--source", "ms")
    assert run_dsv2("models", "verify", f"ms:{SHORT}", "--online").returncode == 0


def test_a_revision_is_removed_with_its_own_blobs_only(hub, home, repository, tmp_path):
    pulled()
    changed = tmp_path / "changed"
    shutil.copytree(repository, changed)
    (changed / "generation_config.json").write_text("{}")
    hub.folder, hub.commit = changed, OTHER
    pulled()
    assert find_model(SHORT).name == OTHER
    old = f"{NAME}@{COMMIT[:12]}"
    assert old in listed()
    done = run_dsv2("models", "rm", old, "--yes", "--json")
    assert json.loads(done.stdout)["bytes"] == (repository / "generation_config.json").stat().st_size
    assert not snapshot(home).exists() and run_dsv2("models", "verify", SHORT).returncode == 0
    assert not scan_cache_dir(home / "hub").warnings
    assert run_dsv2("models", "rm", SHORT, "--yes").returncode == 0
    assert not root(home).exists() and NAME not in listed()


def test_what_a_link_leads_to_elsewhere_is_not_deleted(hub, home, tmp_path):
    pulled()
    hub.commit = OTHER
    pulled()
    mine = tmp_path / "mine.safetensors"
    mine.write_text("mine")
    (snapshot(home) / "extra.safetensors").symlink_to(mine)
    assert run_dsv2("models", "rm", f"{NAME}@{COMMIT[:12]}", "--yes").returncode == 0
    assert mine.read_text() == "mine" and run_dsv2("models", "verify", SHORT).returncode == 0


def test_the_beginning_of_another_revision_hides_nothing_and_stays(hub, home, start):
    pulled()
    hub.commit = OTHER
    (root(home) / ".dsv2" / OTHER).mkdir()
    (root(home) / ".dsv2" / OTHER / f"{shard(1)}.part").write_bytes(b"x" * 1000)
    assert run_dsv2("models", "path", NAME).stdout.strip() == str(snapshot(home))
    assert run_dsv2("models", "rm", NAME, "--yes").returncode == 0
    assert (root(home) / ".dsv2" / OTHER / f"{shard(1)}.part").exists() and not snapshot(home).exists()
    process = started(hub, home, start, least=20_000)
    assert "is being fetched" in run_dsv2("models", "rm", f"{NAME}@{OTHER[:12]}", "--yes").stderr
    process.kill()
    process.wait()
    assert run_dsv2("models", "rm", f"{NAME}@{OTHER[:12]}", "--yes").returncode == 0


def test_of_several_gguf_files_one_is_removed(home, tmp_path, monkeypatch):
    with Hub(two_ggufs(tmp_path / "gguf")) as hub:
        name_hub(monkeypatch, hub.url)
        pulled("--gguf", "Q")
    assert {f"{NAME}/x-Q4_K_M.gguf", f"{NAME}/x-Q8_0.gguf"} < set(listed())
    assert run_dsv2("models", "verify", f"{NAME}/x-Q8_0.gguf").returncode == 0
    assert run_dsv2("models", "rm", f"{NAME}/x-Q8_0.gguf", "--yes").returncode == 0
    assert f"{NAME}/x-Q4_K_M.gguf" in listed() and f"{NAME}/x-Q8_0.gguf" not in listed()
    assert len(list(root(home).glob("blobs/*"))) == 2  # the other, and the config


def test_gguf_files_and_weights_beside_one_another_are_removed_apart(home, tmp_path, monkeypatch):
    folder = tmp_path / "both"
    in_shards(folder, 2)
    (folder / "x-Q8_0.gguf").write_bytes(gguf("deepseek2"))
    for source in ("hf", "ms"):
        with Hub(folder) as hub:
            name_hub(monkeypatch, hub.url)
            monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
            pulled("--source", source)
            pulled("--source", source, "--gguf", "Q8")
            name = NAME if source == "hf" else f"ms:{NAME}"
            assert run_dsv2("models", "rm", f"{name}/x-Q8_0.gguf", "--yes").returncode == 0
            assert run_dsv2("models", "verify", f"{source}:{SHORT}").returncode == 0
            assert f"{name}/x-Q8_0.gguf" not in listed()
            pulled("--source", source, "--gguf", "Q8")
        assert run_dsv2("models", "rm", name, "--yes").returncode == 0
        assert f"{name}/x-Q8_0.gguf" in listed() and name not in listed()
        assert run_dsv2("models", "verify", f"{name}/x-Q8_0.gguf").returncode == 0
        assert (
            "can not be run" in run_dsv2("complete", "-m", f"{source}:{SHORT}", "x").stderr
        )  # a header alone


def test_what_ollama_and_the_hubs_have_as_gguf_runs_by_its_name(home, tmp_path, monkeypatch):
    def ids(name):
        done = run_dsv2("complete", "-m", name, "--prompt-ids", "5,6", "-n", "4", "--ignore-eos", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["prompt_ids"]

    file = DATA / "gguf" / "lite-Q4_0.gguf"
    blob = ollama(home, "deepseek-coder-v2", "16b", file.read_bytes())
    manifests = home / "ollama" / "manifests"
    others = manifests / "hf.co" / "somebody" / "Lite-GGUF" / "Q4_0"
    others.parent.mkdir(parents=True)
    shutil.copyfile(manifests / "registry.ollama.ai" / "library" / "deepseek-coder-v2" / "16b", others)
    assert {"ollama:deepseek-coder-v2:16b", "ollama:hf.co/somebody/Lite-GGUF:Q4_0"} < set(listed())
    names = ["deepseek-coder-v2:16b", "deepseek-coder-v2", "hf.co/somebody/Lite-GGUF:Q4_0"]
    for name in [f"ollama:{name}" for name in names] + [str(blob)]:
        assert ids(name) == [5, 6]
    assert listed()[f"ollama:{names[0]}"]["context"] == 163840
    done = run_dsv2("complete", "-m", "ollama:deepseek-coder-v2:7b", "x")
    assert done.returncode == 2 and "ollama pull deepseek-coder-v2:7b" in done.stderr
    ollama(home, "deepseek-coder-v2", "lite", file.read_bytes())
    done = run_dsv2("complete", "-m", "ollama:deepseek-coder-v2", "x")
    assert done.returncode == 2 and "fix: ollama:deepseek-coder-v2:16b or ollama:" in done.stderr
    manifest = manifests / "registry.ollama.ai" / "library" / "deepseek-coder-v2" / "lite"
    layers = json.loads(manifest.read_text())["layers"]
    adapter = {"mediaType": "application/vnd.ollama.image.adapter", "digest": "sha256:0"}
    manifest.write_text(json.dumps({"layers": [*layers, adapter]}))
    assert "an adapter" in run_dsv2("complete", "-m", "ollama:deepseek-coder-v2:lite", "x").stderr
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        shutil.copyfile(file, folder / name)
    with Hub(folder) as hub:
        name_hub(monkeypatch, hub.url)
        pulled("--gguf", "Q")
    assert ids(f"{NAME}/a-Q4_0.gguf") == ids(f"hf:{SHORT}/a-Q8_0.gguf") == [5, 6]
    done = run_dsv2("complete", "-m", NAME, "x")
    assert done.returncode == 2 and "2 GGUF files" in done.stderr and f"{NAME}/a-Q8_0.gguf" in done.stderr
    done = run_dsv2("complete", "-m", f"{NAME}/a-Q2_K.gguf", "x")
    assert done.returncode == 2 and "--gguf a-Q2_K.gguf" in done.stderr


def test_a_gguf_in_parts_is_one_model(home, tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in (1, 2, 3):
        data = gguf("deepseek2") if number == 1 else b"GGUF" + bytes(40)
        (folder / f"x-Q8_0-{number:05d}-of-00003.gguf").write_bytes(data)
    with Hub(folder) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        pulled("--source", "ms", "--gguf", "Q8")
    (name,) = set(listed()) - {"(in the package: no --model)"}
    assert listed()[name]["bytes"] == len(gguf("deepseek2")) + 88 and "ms:" in name
    assert run_dsv2("models", "rm", name, "--yes").returncode == 0
    assert not list((home / "ms").rglob("*.gguf"))


def test_only_what_was_meant_is_removed(hub, home):
    pulled("--source", "ms", "--revision", "v1")
    for name in (f"hf:{NAME}", f"ms:{NAME}@v", f"ms:{NAME}@v1.0", f"{NAME}@{COMMIT[:7]}"):
        done = run_dsv2("models", "rm", name, "--yes")
        assert done.returncode == 2 and "is not on this machine" in done.stderr, name
        assert f"ms:{NAME}@v1" in listed()
    for commit in ("a" * 40, "b" * 40):
        (root(home) / ".dsv2" / commit).mkdir(parents=True)
    assert "is not one model" in run_dsv2("models", "rm", f"hf:{NAME}", "--yes").stderr
    assert run_dsv2("models", "rm", f"{NAME}@aaaaaaa", "--yes").returncode == 0
    assert not (root(home) / ".dsv2" / ("a" * 40)).exists()


def test_a_cache_that_can_not_be_is_no_traceback(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/" + "x" * 5000)
    monkeypatch.setenv("MODELSCOPE_CACHE", "~nobodyatall/x")
    assert run_dsv2("models").returncode == 0


def test_deleting_that_was_killed_is_ended_by_the_next_look(hub, home):
    pulled("--quantize", "int4")
    left = home / "data" / "dsv2" / "models" / ".x.unfinished"
    left.mkdir()
    (left / "part").write_bytes(b"x" * 1000)
    assert len(listed()) == 2 and not left.exists()


def test_removing_asks_and_touches_nothing_of_others(hub, home, person):
    pulled("--quantize", "int4")
    name = f"{SHORT}:int4"
    assert "--yes" in run_dsv2("models", "rm", name).stderr and find_model(name)
    nora = person("models", "rm", name)
    nora.wait(r"5\d\d\.?\d* kB\? \[y/N\]")
    nora.type("\r")
    nora.end(1)
    assert find_model(name)
    nora = person("models", "rm", name)
    nora.wait("Delete")
    nora.type("y\r")
    nora.end(0)
    assert list((home / "data" / "dsv2" / "models").iterdir()) == []
    ollama(home, "deepseek-coder-v2", "16b", gguf("deepseek2"))
    assert "ollama rm" in run_dsv2("models", "rm", "ollama:deepseek-coder-v2:16b", "--yes").stderr
    folder = home / "own"
    shutil.copytree(DATA / "golden" / "v2", folder)
    assert "rm -r" in run_dsv2("models", "rm", str(folder), "--yes").stderr and folder.is_dir()
    assert "is not on this machine" in run_dsv2("models", "rm", "v2", "--yes").stderr


def test_a_beginning_is_counted_and_can_be_removed(hub, home, start):
    begin(hub, home, start, least=100_000)
    found = listed()[f"{NAME}@{COMMIT[:12]}"]
    assert found["bytes"] >= 100_000 and "interrupted" in found["lacks"]
    assert "interrupted" in run_dsv2("models", "path", NAME).stderr
    assert "dsv2 pull" in run_dsv2("complete", "-m", SHORT, "x").stderr
    assert run_dsv2("models", "rm", NAME, "--yes").returncode == 0
    assert f"{NAME}@{COMMIT[:12]}" not in listed() and not list(root(home).rglob("*.part"))


def test_pages_of_prompts_have_a_place_that_is_counted_and_cleaned(home):
    long = "word " * 200
    done = run_dsv2("complete", "--cache-store", "auto", "-n", "1", long)
    assert done.returncode == 0, done.stderr
    pages = listed()["pages"]
    assert pages["bytes"] > 1000 and pages["where"] == str(home / "cache" / "dsv2" / "pages")
    assert run_dsv2("models", "rm", "pages", "--yes").returncode == 0 and "pages" not in listed()


def test_odd_things_in_the_caches_harm_nobody(hub, home):
    pulled()
    before = set(listed())
    odd = home / "hub" / "models--odd--one" / "snapshots"
    odd.mkdir(parents=True)
    (odd / "loop").symlink_to(odd / "loop")
    (odd / "file").write_text("x")
    (odd / "1").mkdir()
    (odd / "1" / "config.json").write_text("[" * 1000)
    (odd / "2").mkdir()
    (odd / "2" / "config.json").symlink_to("nowhere")
    (odd / "2" / "x.gguf").write_bytes(b"GGUF\xff")
    os.mkfifo(odd / "2" / "y.gguf")
    os.mkfifo(odd / "2" / "model.safetensors")
    (home / "hub" / "models--odd--two").write_text("a file")
    (home / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "m").mkdir(parents=True)
    (home / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "m" / "t").write_text('{"layers": 5}')
    (home / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "m" / "u").write_text(
        '{"layers": []}'
    )
    long = odd / "3"
    shutil.copytree(DATA / "golden" / "v2", long)
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (long / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(listed()) - {"odd/one@3"} == before and shelf.find_copy(Reference(NAME))


def test_wrong_words_to_models_are_refused(home):
    for words in (
        ("list", "x"),
        ("verify",),
        ("path", "x y"),
        ("rm", "a/b", "--online"),
        ("burn", "x"),
        ("verify", "x", "--api", "http://127.0.0.1:9"),
    ):
        assert run_dsv2("models", *words).returncode == 2
    assert run_dsv2("pull", "no such name").returncode == 2
    assert run_dsv2("pull", "ollama:a:b").returncode == 2
