"""From the name a user types to a folder with a checkpoint."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import path_of, read_json

EMBEDDED = Path(__file__).parents[1] / "demo" / "checkpoint"
WANTED_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
]
WANTED_FILES += ["special_tokens_map.json", "chat_template*"]


def find_model(name: str | None, wanted: list[str] = WANTED_FILES) -> Path:
    """A folder for `name`: the embedded model for None, a folder on disk, or a Hugging Face repository.

    Only safetensors, configs and tokenizer files are fetched. HF_HUB_OFFLINE and the other variables of
    huggingface_hub are honoured. Raises UsageError for a name that is neither, Dsv2Error when fetching fails.
    """
    if name is None:
        return EMBEDDED
    folder = path_of(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        fix = str(folder.parent) if folder.is_file() else "check the path"
        kind = "is a file" if folder.is_file() else "is no folder"
        raise UsageError(f"{name} {kind}", why="a model is a folder", fix=fix)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UsageError(
            f"There is no model at {name}",
            why="it is neither a folder here nor a Hugging Face repository name such as "
            "deepseek-ai/DeepSeek-V2-Lite",
            fix="check the path, or leave --model out to use the embedded model",
        )
    return fetch(name, wanted)


def find_config(name: str | None) -> Path:
    """As find_model, but `name` may be a config file, and of a repository only config.json is fetched."""
    if name is not None and (path := path_of(name)).is_file():
        return path
    return find_model(name, ["config.json"])


def fetch(repository: str, wanted: list[str]) -> Path:
    """Download what is missing of a repository, resuming what was begun; progress shows where stderr is a
    terminal.

    Raises Dsv2Error.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
    except KeyboardInterrupt:
        raise
    except (
        Exception
    ) as error:  # huggingface_hub and its http client raise many kinds; all mean the same to the user
        raise Dsv2Error(
            f"{repository} is not a folder here and could not be fetched from Hugging Face",
            why=(str(error).strip() or repr(error)).splitlines()[0],
            fix="check the name and the network; a private repository needs HF_TOKEN",
        ) from error
    if wanted == WANTED_FILES and not any(folder.glob("*.safetensors")):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise Dsv2Error(
            f"The weights of {repository} are not here",
            why=f"of it the cache holds {there}, and no safetensors",
            fix="run it again with the network, and without HF_HUB_OFFLINE",
        )
    return folder


def known_models(beginning: str) -> list[str]:
    """Names that begin so: folders here (with a slash where one leads on), and repositories of this family in
    the cache.
    """
    parent, _, start = beginning.rpartition("/")
    found = []
    with contextlib.suppress(OSError, UsageError):
        for entry in sorted(path_of(f"{parent}/" if parent or beginning.startswith("/") else ".").iterdir()):
            if entry.is_dir() and entry.name.startswith(start) and (start or not entry.name.startswith(".")):
                name = beginning[: len(beginning) - len(start)] + entry.name
                found.append(name if (entry / "config.json").exists() else name + "/")
    found += [name for name, _ in downloaded() if name.startswith(beginning)]
    return list(dict.fromkeys(found))


def downloaded() -> list[tuple[str, Path]]:
    """Repositories of this family in the cache, each with the folder of a snapshot of it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    out = []
    for config in sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")):
        name = config.parents[2].name.removeprefix("models--").replace("--", "/")
        with contextlib.suppress(Dsv2Error):
            if read_json(config).get("model_type") == "deepseek_v2":
                out.append((name, config.parent))
    return out
