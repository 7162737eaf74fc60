"""Hubs on loopback: Hugging Face's and ModelScope's protocols over stored files, with faults as told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from running import run_dsv2
from safetensors.torch import load_file, save_file

os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")  # nobody waits for a hub on loopback
COMMIT = "5c1e9ab4" * 5
NAME = "deepseek-ai/DeepSeek-V2-Lite-Chat"
SHORT = "v2-lite-chat"
SHARDS = 4
GOLDEN = Path(__file__).parent / "data" / "golden"


@dataclass
class Hub:
    """What it serves and how it fails; `asked` is what came in."""

    folder: Path
    name: str = NAME
    commit: str = COMMIT
    cuts: int = 0  # so many answers end after a tenth of the file more than what was asked to be left out
    stalls: int = 0  # so many answers stop in the middle, and stay open
    wrong: int = 0  # so many answers have a byte changed
    busy: int = 0  # so many requests for files are answered 429
    retry_after: str = "1"
    status: int = 0  # what a question is answered with, if not well
    error_code: str = ""
    redirect: str = ""  # the address of another hub that has the files
    no_ranges: bool = False
    bytes_per_second: float = 0
    extra: int = 0  # bytes too many
    token: str = ""  # that must come along
    gated: bool = False  # the list is given, and no file
    refuses_parts: bool = False
    page_for_parts: int = 0  # so many requests for a part get a page of HTML
    trickles: int = 0  # so many answers come by a few bytes
    listing_changes: dict = field(default_factory=dict)
    asked: list[tuple[str, str, dict]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def takes(self, name: str) -> bool:
        """Whether a fault is still to happen, which has happened then."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
        return left > 0

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def bodies(self) -> list[tuple[str, str]]:
        """The files that were asked for, and the part."""
        got = [(path, headers) for verb, path, headers in self.asked if verb == "GET"]
        files = [each for each in got if "/resolve/" in each[0] or "FilePath=" in each[0]]
        return [(path, headers.get("range", "")) for path, headers in files]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.hub
        headers = {key.lower(): value for key, value in self.headers.items()}
        with hub.lock:
            hub.asked.append((self.command, self.path, headers))
        try:
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            if hub.token and headers.get("authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "RepoNotFound")
            if path.startswith((f"/api/models/{hub.name}", f"/api/v1/models/{hub.name}/repo/files")):
                if hub.status:
                    return self.refuse(hub.status, hub.error_code)
                return self.list_it(path, parse_qs(parts.query))
            if path.startswith("/api/models/"):
                return self.refuse(404, "RepoNotFound")
            query = parse_qs(parts.query)
            match = re.fullmatch(rf"/{re.escape(hub.name)}/resolve/[^/]+/(.+)", path)
            wanted = match[1] if match else query.get("FilePath", [""])[0]
            wanted = wanted or (path.removeprefix("/cdn/") if path.startswith("/cdn/") else "")
            if not wanted or not (hub.folder / wanted).is_file():
                return self.refuse(404, "EntryNotFound")
            if hub.redirect:
                return self.send(302, {"Location": f"{hub.redirect}/cdn/{wanted}", "Content-Length": "0"})
            if hub.gated:
                return self.refuse(401, "GatedRepo")
            if hub.takes("busy"):
                return self.refuse(429, "", {"Retry-After": hub.retry_after})
            self.give(hub.folder / wanted)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": f"no: {code}", "Code": status, "Message": "no"}).encode()
        more = {"X-Error-Code": code, "Content-Length": str(len(body)), "Content-Type": "application/json"}
        self.send(status, more | (headers or {}), body)

    def list_it(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.hub
        if "/revision/" in path and path.rpartition("/revision/")[2] not in ("main", "v1", hub.commit):
            return self.refuse(404, "RevisionNotFound")
        siblings, entries = [], []
        for file in hub.files():
            data = file.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            sibling = {"rfilename": file.name, "size": len(data), "blobId": git_hash(data)}
            if file.suffix in (".safetensors", ".gguf"):
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            sibling |= hub.listing_changes.get(file.name, {})
            siblings.append(sibling)
            entries.append(
                {
                    "Path": sibling["rfilename"],
                    "Size": len(data),
                    "Sha256": sha256,
                    "Type": "blob",
                    "Name": file.name,
                }
            )
        if "/api/v1/" in path:
            body = {"Code": 200, "Success": True, "Data": {"Files": entries}}
        else:
            body = {"id": hub.name, "modelId": hub.name, "sha": hub.commit, "siblings": siblings, "tags": []}
        text = json.dumps(body).encode()
        self.send(200, {"Content-Length": str(len(text)), "Content-Type": "application/json"}, text)

    def give(self, path: Path) -> None:
        hub, data = self.hub, path.read_bytes()
        begin, status, more = 0, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and hub.takes("page_for_parts"):
            return self.send(200, {"Content-Length": "12"}, b"<html></html>"[:12])
        if asked and hub.refuses_parts:
            return self.refuse(416, "")
        if asked and not hub.no_ranges:
            begin = int(asked[1])
            if begin >= len(data):
                return self.refuse(416, "", {"Content-Range": f"bytes */{len(data)}"})
            status, more = 206, {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        body = bytearray(data[begin:])
        if body and path.suffix == ".safetensors" and hub.takes("wrong"):
            body[-1] ^= 1
        body += bytes(hub.extra)
        large = path.suffix == ".safetensors"
        cut, stall = large and hub.takes("cuts"), large and hub.takes("stalls")
        if hub.extra:
            self.close_connection = True
        else:
            more["Content-Length"] = str(len(body))
        self.send_response(status)
        for name, value in {**more, "ETag": f'"{path.name}"'}.items():
            self.send_header(name, value)
        if hub.extra:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(body)
        if cut or stall:
            end = min(end, max(1, len(data) // 10))
        step = max(1, int(hub.bytes_per_second / 50)) if hub.bytes_per_second else end or 1
        trickles = large and hub.takes("trickles")
        if trickles:
            step, end = 1, min(end, 1000)
        for start in range(0, end, step):
            self.wfile.write(body[start : min(end, start + step)])
            self.wfile.flush()
            if hub.bytes_per_second or trickles:
                time.sleep(0.02)
        if stall:
            time.sleep(30)
        if cut or stall:
            self.close_connection = True


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What a hub serves: a checkpoint in shards, and what nobody wants."""
    folder = tmp_path_factory.mktemp("repository")
    in_shards(folder, SHARDS)
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('code was run')")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same once more")
    return folder


def in_shards(folder, count):
    """A golden checkpoint in so many files, in the order of its layers."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for file in (GOLDEN / "v2").glob("model-*.safetensors"):
        tensors |= load_file(file)
    weight_map, names = {}, list(tensors)
    names.sort(key=lambda name: (name == "lm_head.weight", "layers" in name, name))
    for number in range(count):
        file = shard(number + 1, count)
        part = names[len(names) * number // count : len(names) * (number + 1) // count]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "generation_config.json"):
        shutil.copy(GOLDEN / "v2" / name, folder)


def shard(number, count=0):
    return f"model-{number:05d}-of-{count or SHARDS:06d}.safetensors"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A person's empty caches."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "mshome"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def name_hub(monkeypatch, url):
    """Let HF_ENDPOINT name it, which the library reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(repository, home, monkeypatch):
    """The hub that a person's settings name."""
    with Hub(repository) as hub:
        name_hub(monkeypatch, hub.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


def root(home):
    return home / "hub" / f"models--{NAME.replace('/', '--')}"


def snapshot(home):
    return root(home) / "snapshots" / COMMIT


def wanted(repository):
    return sorted(
        path.name
        for path in repository.iterdir()
        if path.suffix == ".json" or (path.suffix == ".safetensors" and path.name.startswith("model"))
    )


def same(folder, repository):
    """Whether a folder has all files of the repository that are wanted, to the bit, and none else."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in ("SHA256SUMS", ".dsv2"))
    return names == wanted(repository) and all(
        (folder / name).read_bytes() == (repository / name).read_bytes() for name in names
    )


def come(folder):
    """Bytes of what is not whole yet; a file may get its name meanwhile."""
    total = 0
    for path in folder.rglob("*.part"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def started(hub, home, start, *arguments, least=50_000):
    """A download that is under way: so much has come."""
    hub.bytes_per_second = 100_000
    process = start("pull", SHORT, *arguments)
    until = time.monotonic() + 30
    while come(home) < least:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    return process


def begin(hub, home, start, *arguments, least=50_000):
    """The beginning of one that was killed."""
    process = started(hub, home, start, *arguments, least=least)
    process.kill()
    process.wait()
    hub.bytes_per_second = 0


def two_ggufs(folder):
    """A repository of two files of one model."""
    folder.mkdir()
    for name in ("x-Q4_K_M.gguf", "x-Q8_0.gguf"):
        (folder / name).write_bytes(gguf("deepseek2") + name.encode())
    shutil.copy(GOLDEN / "v2" / "config.json", folder)
    return folder


def pulled(*arguments, code=0, name=SHORT):
    done = run_dsv2("pull", name, "--stall", "5", *arguments)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def gguf(architecture):
    """The first bytes of a GGUF file."""
    key, value = b"general.architecture", architecture.encode()
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    texts = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little")
    return head + texts + len(value).to_bytes(8, "little") + value
