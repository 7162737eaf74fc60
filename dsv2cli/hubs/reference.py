"""The names of models that are no paths: repositories, short names of this family, and packed copies.

v2-lite-chat                          a short name
deepseek-ai/DeepSeek-V2-Lite-Chat     a repository, of whichever hub has it
hf:OWNER/NAME@REVISION                of Hugging Face, at a branch, tag or commit
ms:v2-lite-chat                       of ModelScope
v2-lite-chat:int4                     a packed copy that `dsv2 pull` or `dsv2 quantize` made
ollama:deepseek-coder-v2:16b          of Ollama's own store
hf:OWNER/NAME/FILE.gguf               one GGUF file of a repository
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dsv2cli.formats import PACKED_BITS

OWNER = "deepseek-ai/"
ALIASES = {
    "v2": "DeepSeek-V2",
    "v2-chat": "DeepSeek-V2-Chat",
    "v2-chat-0628": "DeepSeek-V2-Chat-0628",
    "v2-lite": "DeepSeek-V2-Lite",
    "v2-lite-chat": "DeepSeek-V2-Lite-Chat",
    "v2.5": "DeepSeek-V2.5",
    "v2.5-1210": "DeepSeek-V2.5-1210",
    "coder-v2": "DeepSeek-Coder-V2-Instruct",
    "coder-v2-0724": "DeepSeek-Coder-V2-Instruct-0724",
    "coder-v2-base": "DeepSeek-Coder-V2-Base",
    "coder-v2-lite": "DeepSeek-Coder-V2-Lite-Instruct",
    "coder-v2-lite-base": "DeepSeek-Coder-V2-Lite-Base",
}
ALIASES = {short: OWNER + name for short, name in ALIASES.items()}
SOURCES = {"hf": "Hugging Face", "ms": "ModelScope", "ollama": "Ollama"}
REPOSITORY = re.compile(
    r"(?:(?P<source>hf|ms):)?(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?(?::(?P<format>[\w-]+))?"
)
OLLAMA = re.compile(r"ollama:(?P<name>[A-Za-z0-9][\w./-]*)(?P<tag>:[\w.-]+)?")
LATEST = ":latest"  # the tag that Ollama means where none is named


@dataclass(frozen=True)
class Reference:
    """A model by its name."""

    name: str  # OWNER/NAME, or MODEL:TAG of Ollama
    source: str = ""  # one of SOURCES; empty: wherever it is
    revision: str = ""  # empty: the hub's own choice
    format: str = ""  # one of PACKED_BITS: a copy that is packed so

    def __str__(self) -> str:
        """As a person may type it."""
        revision = self.revision and f"@{self.revision}"
        return f"{self.source and self.source + ':'}{self.name}{revision}{self.format and ':' + self.format}"


def parse(text: str) -> Reference | None:
    """What a text names, short names written out; None where it has not the form of a name."""
    if match := OLLAMA.fullmatch(text):
        return Reference(match["name"] + (match["tag"] or LATEST), "ollama")
    match = REPOSITORY.fullmatch(text)
    if match is None or (match["format"] or "int4") not in PACKED_BITS:
        return None
    name = ALIASES.get(match["name"].lower(), match["name"])
    if "/" not in name or ".." in text or "--" in name:
        return None
    return Reference(name, match["source"] or "", match["revision"] or "", match["format"] or "")


def short(name: str) -> str:
    """The short name of a repository, where it has one."""
    return next((alias for alias, whole in ALIASES.items() if whole == name), name)


def nearest(text: str, known: Iterable[str] = ()) -> list[str]:
    """Up to three names that look like what was typed: short names, and those that are `known`."""
    bare = text.lower().rpartition("/")[2].removeprefix("hf:").removeprefix("ms:").removeprefix("deepseek-")
    forms = {name.lower(): name for name in known} | {alias: alias for alias in ALIASES}
    forms |= {name.lower().removeprefix(OWNER + "deepseek-"): alias for alias, name in ALIASES.items()}
    found = difflib.get_close_matches(bare, forms, n=6) + difflib.get_close_matches(text.lower(), forms, n=3)
    return list(dict.fromkeys(forms[form] for form in found))[:3]
