"""What a hub says of a repository: its files, their sizes and hashes, where they are, and who may have them.

huggingface_hub and modelscope-hub ask. A token goes to its own hub's host and to no other, unless the person
says so: HF_ENDPOINT may name anybody.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.hubs.hashes import HASH
from dsv2cli.hubs.reference import SOURCES, Reference, nearest
from dsv2cli.outside import one_line

SETTINGS = ("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json")
WANTED = ("*.safetensors", "*.safetensors.index.json", *SETTINGS, "chat_template*")
MODEL = ("model*.safetensors",)
HOMES = {"hf": ("huggingface.co",), "ms": ("modelscope.cn", "www.modelscope.cn", "modelscope.ai")}
LARGEST = 2**50  # bytes of a file
SAFE = re.compile(r"[A-Za-z0-9_][\w.+-]*")  # a file's name, and no path
TRIES, LONGEST_WAIT = 5, 300.0  # of a question; seconds that a server may ask to wait
ON = ("1", "true", "yes", "on")
AGAIN_LATER = (408, 429, 500, 502, 503, 504)
SLOW = 20.0  # seconds an answer to a question may take

T = TypeVar("T")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. The hash is SHA-256, or git's SHA-1 where the hub has no other."""

    name: str
    size: int
    hash: str
    url: str


@dataclass(frozen=True)
class Listing:
    """A repository at one revision."""

    reference: Reference
    revision: str  # a commit, or with ModelScope what was asked for
    files: tuple[RemoteFile, ...]
    headers: dict[str, str]  # for the hub's own host alone
    endpoint: str = ""
    wanted: tuple[str, ...] = ()  # which of its files, by patterns
    withheld: bool = False  # whether there is a token that this host was not sent

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).netloc

    def of(self, files: Iterable[RemoteFile]) -> Listing:
        """The same with these files alone."""
        return replace(self, files=tuple(files))


def list_files(
    reference: Reference, wanted: tuple[str, ...], tell: Tell, send_token: bool = False
) -> Listing:
    """The files of a repository whose names fit `wanted`. Raises Dsv2Error."""
    ask = {"": from_hugging_face, "hf": from_hugging_face, "ms": from_modelscope}.get(reference.source)
    if ask is None:
        raise UsageError(f"{reference} can not be downloaded", fix=f"ollama pull {reference.name}")
    listing = ask(reference, tell, send_token)
    files = [checked(file, listing.endpoint) for file in listing.files if fits(file.name, wanted)]
    if any(fits(file.name, MODEL) for file in files):  # what is beside it is another form of the same
        files = [file for file in files if fits(file.name, MODEL) or not fits(file.name, ("*.safetensors",))]
    if len({file.name for file in files}) != len(files):
        raise Dsv2Error(f"{listing.host} lists a file of {reference} twice", fix="another --source")
    if wanted == WANTED and not any(file.name.endswith(".safetensors") for file in files):
        files = []
    if not files:
        ggufs = [file.name for file in listing.files if file.name.endswith(".gguf")]
        fix = f"--gguf, with a part of a name such as {ggufs[0]}" if ggufs else "another repository"
        names = ", ".join(sorted(str(file.name) for file in listing.files)[:5]) or "nothing"
        patterns = " or ".join(wanted[:1])
        raise Dsv2Error(f"{reference} has no {patterns}", why=f"it holds {names}", fix=fix)
    return replace(listing, files=tuple(files), wanted=wanted)


def checked(file: RemoteFile, endpoint: str) -> RemoteFile:
    """A file as a hub lists it. Raises Dsv2Error for a size or a hash that is none."""
    if type(file.size) is int and 0 <= file.size < LARGEST and isinstance(file.hash, str):
        known = replace(file, hash=file.hash.lower())
        if HASH.fullmatch(known.hash):
            return known
    host = urlsplit(endpoint).netloc
    raise Dsv2Error(f"{host} lists {file.name} without a proper size and hash", fix="another --source")


def fits(name: object, wanted: tuple[str, ...]) -> bool:
    """Whether a file is one that is asked for, and is called so that it may lie in a folder."""
    return (
        isinstance(name, str)
        and bool(SAFE.fullmatch(name))
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    )


def token_for(source: str, endpoint: str, token: str | None, send_token: bool) -> str | None:
    """A saved token, where `endpoint` is its own hub or the person wants it to be sent."""
    parts = urlsplit(endpoint)
    home = parts.scheme == "https" and parts.hostname in HOMES[source] and parts.port in (None, 443)
    return token if home or send_token else None


def from_hugging_face(reference: Reference, tell: Tell, send_token: bool) -> Listing:
    """Raises Dsv2Error."""
    with understood("HF_ENDPOINT"):
        from huggingface_hub import HfApi, constants, get_token, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise offline(reference)
    endpoint = constants.ENDPOINT
    with understood(constants.HF_TOKEN_PATH):
        saved = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and not send_token else get_token()
    with understood("HF_ENDPOINT"):
        token = token_for("hf", endpoint, saved, send_token)
    withheld = bool(saved and not token)
    ours: dict[str, Any] = {"library_name": "dsv2", "library_version": version("dsv2cli")}
    api = HfApi(endpoint=endpoint, token=token or False, **ours)
    name, revision = reference.name, reference.revision or None

    def ask() -> Any:
        return api.model_info(name, revision=revision, files_metadata=True, timeout=SLOW)

    info = asked(ask, reference, endpoint, tell, withheld)
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{7,64}", info.sha):
        raise Dsv2Error(f"{endpoint} does not say which commit of {name} it has", fix="another HF_ENDPOINT")
    files = []
    for sibling in info.siblings or ():
        if fits(sibling.rfilename, ("*",)):
            hash = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
            url = hf_hub_url(name, sibling.rfilename, revision=info.sha, endpoint=endpoint)
            files.append(RemoteFile(sibling.rfilename, sibling.size, hash, url))  # type: ignore[arg-type]
    headers = build_hf_headers(token=token or False, **ours)
    return Listing(reference, info.sha, tuple(files), headers, endpoint, withheld=withheld)


def from_modelscope(reference: Reference, tell: Tell, send_token: bool) -> Listing:
    """Raises Dsv2Error."""
    if importlib.util.find_spec("modelscope_hub") is None:
        fix = 'pip install "modelscope-hub>=0.5", or --source hf'
        raise UsageError("ModelScope needs one more package", why="modelscope-hub is not installed", fix=fix)
    from modelscope_hub import HubApi, HubConfig

    if any(os.environ.get(name, "").lower() in ON for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        raise offline(reference)
    with understood("MODELSCOPE_ENDPOINT"):
        config = HubConfig()
        endpoint = config.endpoint or ""
        token = token_for("ms", endpoint, config.token, send_token)
    withheld = bool(config.token and not token)
    api = HubApi(HubConfig(endpoint=endpoint, token=token or ""))
    revision = reference.revision or "master"

    def ask() -> Any:
        return api.list_repo_files(reference.name, "model", revision=revision)

    files = []
    for each in asked(ask, reference, endpoint, tell, withheld):
        if each.type != "tree" and fits(each.path, ("*",)):
            url = api.legacy.get_download_url(reference.name, "model", each.path, revision)
            files.append(RemoteFile(each.path, each.size, each.sha256, url))
    headers = {"User-Agent": "dsv2"}
    if token:
        headers |= {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    return Listing(reference, revision, tuple(files), headers, endpoint, withheld=withheld)


def asked(ask: Callable[[], T], reference: Reference, endpoint: str, tell: Tell, withheld: bool) -> T:
    """What a hub answers, asked again where it asks for patience. Raises Dsv2Error."""
    with quiet_libraries():
        for number in range(TRIES):
            try:
                return ask()
            except Exception as error:  # the libraries raise many kinds
                status, headers = status_of(error)
                patient = reference.source == "ms"  # its library has tried already
                again = status in AGAIN_LATER or (status is None and is_network(error) and not patient)
                if not again or number == TRIES - 1:
                    raise explained(error, reference, endpoint, withheld) from None
                wait_for(endpoint, status, headers, number, tell)
    raise AssertionError


def wait_for(endpoint: str, status: int | None, headers: Any, number: int, tell: Tell) -> None:
    """Sleep as long as a server asks, or longer each time. Raises Dsv2Error where it asks for too long."""
    seconds = patience(headers, number)
    host = urlsplit(endpoint).netloc
    if seconds > LONGEST_WAIT:
        raise Dsv2Error(
            f"{host} wants no more questions for {seconds:.0f} s",
            why=f"it answered {status}",
            fix="try later",
        )
    if seconds >= 1:
        tell(
            f"{host} {f'answered {status}' if status else 'did not answer'}: asking again in {seconds:.0f} s"
        )
    time.sleep(seconds)


def patience(headers: Any, number: int) -> float:
    """Seconds to wait before the try after `number`: as Retry-After says, or twice as long each time."""
    said = retry_after(headers)
    return min(0.25 * 2**number, 8.0) if said is None else said


def retry_after(headers: Any) -> float | None:
    """Seconds that an answer asks to wait, which may say it as a number or a date; None where it does not."""
    said = str((headers or {}).get("Retry-After", "")).strip()
    if re.fullmatch(r"\d{1,12}(\.\d*)?", said):
        return float(said)
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return None


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Raises Dsv2Error where a variable or file of the hub's holds what its client chokes on."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise Dsv2Error(
            f"{what} can not be used", why=one_line(str(error)), fix="check it, or unset it"
        ) from None


def status_of(error: BaseException) -> tuple[int | None, Any]:
    """The status and headers of an answer that an error tells of."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status_code", None)
    headers = getattr(response, "headers", None) or getattr(error, "headers", None)
    if headers is None and (wait := getattr(error, "retry_after", None)) is not None:
        headers = {"Retry-After": str(wait)}
    return (status if isinstance(status, int) else None), headers


def is_network(error: BaseException) -> bool:
    """Whether no answer came."""
    import httpx2

    return isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Their remarks are said by this program, or not."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "modelscope_hub", "httpx2", "urllib3")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def explained(error: BaseException, reference: Reference, endpoint: str, withheld: bool) -> Dsv2Error:
    """A hub's refusal as a sentence that says what to type."""
    status, headers = status_of(error)
    code = str((headers or {}).get("X-Error-Code", ""))
    kind, host, name = type(error).__name__, urlsplit(endpoint).netloc or endpoint, reference.name
    why = one_line(getattr(error, "server_message", None) or str(error) or kind)[:200]
    hub = reference.source or "hf"
    key = "HF_TOKEN" if hub == "hf" else "MODELSCOPE_API_TOKEN"
    trust = f"--send-token, if you trust {host} with your {SOURCES[hub]} token"
    if kind == "GatedRepoError" or code == "GatedRepo" or status == 403:
        what = f"{host} gives {name} only to those it knows"
        page = f"accept its conditions at {endpoint}/{name}, then set {key}"
        return Dsv2Error(what, why=f"it answered {status}", fix=trust if withheld else page)
    if kind == "HFValidationError":
        return Dsv2Error(f"{name} can be no repository", why=why, fix="check how it is written")
    if kind == "RevisionNotFoundError":
        fix = f"dsv2 pull {name}, without a revision"
        return Dsv2Error(f"{name} has no revision {reference.revision} at {host}", fix=fix)
    if kind in ("RepositoryNotFoundError", "NotExistError") or status in (401, 404):
        near = " or ".join(nearest(name))
        fix = f"{f'did you mean {near}? ' if near and name not in near else ''}a private one needs {key}"
        what = f"{name} is not at {host}, or is private"
        return Dsv2Error(what, why=f"it answered {status or 404}", fix=trust if withheld else fix)
    if kind == "OfflineModeIsEnabled":
        return offline(reference)
    if status is not None:
        fix = "try later, or --source ms" if hub == "hf" else "try later, or --source hf"
        return Dsv2Error(f"{host} does not give {name}", why=f"it answered {status}", fix=fix)
    if is_network(error):
        fix = "check the network, HTTPS_PROXY and HF_ENDPOINT" if hub == "hf" else "check the network"
        return Dsv2Error(f"{host} can not be reached", why=why, fix=f"{fix}; then the same command goes on")
    return Dsv2Error(
        f"{host} gave no list of {name}", why=f"{kind}: {why}", fix="try later, or another --source"
    )


def offline(reference: Reference) -> Dsv2Error:
    """What to say where nobody may be asked."""
    fix = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE; dsv2 models says what is here"
    return Dsv2Error(f"Nobody may be asked for {reference}", why="HF_HUB_OFFLINE is set", fix=fix)
