"""What a request's body says, field by field: each is read or refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dsv2cli.engine.request import RULES, Request
from dsv2cli.engine.store import checked
from dsv2cli.errors import Dsv2Error

MOST_STOPS = 16
MOST_CHOICES = 128
MOST_LOGPROBS = 20


class Refused(Exception):
    """A request that can not be answered as it is."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "") -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@contextmanager
def refusing(param: str, before: str = "") -> Iterator[None]:
    """What is wrong in here is wrong with a field of the request. Raises Refused for a Dsv2Error."""
    try:
        yield
    except Dsv2Error as error:
        raise Refused(before + error.sentence, param) from None


class Fields:
    """The fields of a JSON object, of which each must be taken; null is as if it were not there."""

    def __init__(self, body: Any) -> None:
        """Raises Refused for anything but an object."""
        if not isinstance(body, dict):
            raise Refused("The body is not a JSON object")
        self.left = {key: value for key, value in body.items() if value is not None}

    def take(self, name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        """A field of one of these kinds. Raises Refused for another kind."""
        if name not in self.left:
            return default
        value = self.left.pop(name)
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not right:
            wanted = " or ".join(KINDS[kind] for kind in kinds)
            raise Refused(f"{name} is {KINDS.get(type(value), 'something else')}, not {wanted}", name)
        return value

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        """A whole number from `least` to `most`. Raises Refused."""
        value: int | None = self.take(name, (int,), default)
        if name and value is not None and not least <= value <= most:
            raise Refused(f"{name} = {value} is not from {least} to {most}", name)
        return value

    def ignore(self, *names: str) -> None:
        """Fields that say something to others, and change nothing here."""
        for name in names:
            self.left.pop(name, None)

    def only(self, name: str, *allowed: Any) -> None:
        """A field that may only say what is done anyway. Raises Refused."""
        value = self.left.pop(name, allowed[0])
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise Refused(f"{name} is not supported here: leave it out", name)

    def done(self) -> None:
        """Raises Refused for a field that nobody took."""
        for name in self.left:
            raise Refused(f"{name[:80]!r} is unknown here: leave it out", name[:80])


KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
NUMBER = (int, float)


def sampling_of(fields: Fields, request: Request) -> Request:
    """The request with what a body says of how to sample, and where to stop. Raises Refused."""
    sampling = request.sampling
    for name, rule in RULES.items():
        value = fields.take(name, NUMBER)
        if value is None:
            continue
        if value not in rule:
            raise Refused(f"{name} = {value} makes no sense: it must be {rule}", name)
        sampling = replace(sampling, **{name: value})
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    stop = fields.take("stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stop) or len(stop) > MOST_STOPS:
        raise Refused(f"stop is not a text or a list of up to {MOST_STOPS}, none of them empty", "stop")
    for name in ("frequency_penalty", "presence_penalty"):
        fields.only(name, 0, 0.0)
    fields.only("logit_bias", {})
    ends = frozenset[int]() if fields.take("ignore_eos", (bool,), False) else request.eos_ids
    return replace(
        request,
        sampling=sampling,
        stop=tuple(stop),
        seed=request.seed if seed is None else seed % 2**64,
        eos_ids=ends,
    )


def streaming_of(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether to tell the usage at its end. Raises Refused."""
    stream = bool(fields.take("stream", (bool,), False))
    options = Fields(fields.take("stream_options", (dict,), {}))
    usage = bool(options.take("include_usage", (bool,), False))
    options.only("include_obfuscation", False)
    options.done()
    return stream, usage and stream


def messages_of(fields: Fields) -> list[dict[str, str]]:
    """The conversation. Raises Refused for what is none."""
    messages = fields.take("messages", (list,))
    if not messages:
        raise Refused("messages is missing or empty", "messages")
    for place, message in enumerate(messages):
        if isinstance(message, dict):
            for name in message.keys() - {"role", "content", "name", "refusal", "tool_calls", "annotations"}:
                raise Refused(f"messages[{place}].{name[:40]} is unknown here", f"messages[{place}]")
            if message.get("tool_calls"):
                raise Refused(f"messages[{place}].tool_calls is not supported here", f"messages[{place}]")
    with refusing("messages"):
        return checked(messages, "messages")


def text_of(value: Any, name: str) -> str:
    """A text, or parts of one put together. Raises Refused."""
    if isinstance(value, str):
        return value
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(f"{name} has a part that is no text", name)
    return "".join(part["text"] for part in value)


def whole_numbers(value: list[Any]) -> bool:
    return all(type(each) is int for each in value)
