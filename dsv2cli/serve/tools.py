"""Functions that a model may ask to have called.

It is told of them in words, since no template of this family knows them, and held to their schemas, so that a
call is always whole and valid.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from dsv2cli.engine.grammar import WHITESPACE, closed
from dsv2cli.outside import parse_json
from dsv2cli.serve.fields import Fields, Refused, text_of

MOST = 128  # functions
BLANKS = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
WORDS = """You can have functions called. They are, each with its parameters as a JSON schema:
{functions}
To have one called, answer with nothing but {{"name": its name, "arguments": an object}}. \
Its result is then told to you. {when}"""
WHENS = {"auto": "Answer in words where no function helps.", "required": "Answer with such a call now."}


@dataclass
class Tools:
    """The functions of a request, and whether one must be called."""

    functions: list[dict[str, Any]] = field(default_factory=list)  # name, description, parameters
    choice: str = "none"  # none, auto, required; with one function left where that is to be called

    def __bool__(self) -> bool:
        return bool(self.functions) and self.choice != "none"

    @property
    def schema(self) -> dict[str, Any]:
        """What a call is. Raises Refused for definitions of one name that differ."""
        calls, known = [], dict[str, Any]()
        for each in self.functions:
            parameters = dict(each["parameters"])
            for key in ("$defs", "definitions"):
                defined = parameters.pop(key, {})
                if not isinstance(defined, dict):
                    raise Refused(f"tools has {key} that are no object", "tools")
                for name, value in defined.items():
                    if known.setdefault(key, {}).setdefault(name, value) != value:
                        raise Refused(f"tools define {name[:40]!r} in {key} in several ways", "tools")
            properties = {"name": {"const": each["name"]}, "arguments": parameters}
            call = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
            calls.append(call | {"additionalProperties": False})
        return {"anyOf": calls} | known

    @property
    def lark(self) -> str:
        """A grammar of answers: a call, or, where none is required, words that do not begin like one."""
        call = f"%json {closed(json.dumps(self.schema | BLANKS))}\n"
        if self.choice == "required":
            return f'start: " "? {call}'
        return f'start: words | call\nwords: /( ?[^{{ ](.|\\n)*)?/\ncall: " "? {call}'

    def told(self) -> str:
        """What the model is told of them."""
        listed = [json.dumps(each, ensure_ascii=False) for each in self.functions]
        return WORDS.format(functions="\n".join(listed), when=WHENS[self.choice])

    def may_call(self, text: str) -> bool:
        """Whether an answer that begins so may become a call: it is held back until it is whole."""
        begun = text.lstrip()
        return bool(self) and (not begun or begun[0] == "{")

    def call_in(self, text: str) -> tuple[str, str] | None:
        """The call that an answer is: a name, and arguments in JSON; None where it is none, or cut off."""
        if not self.may_call(text):
            return None
        try:
            call = parse_json(text)
            return call["name"], json.dumps(call["arguments"], ensure_ascii=False)
        except (ValueError, KeyError, TypeError):
            return None

    def introduced(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """A conversation in which the model is told of them first."""
        if not self:
            return messages
        before = ""
        if messages[0]["role"] == "system":
            before, messages = messages[0]["content"] + "\n\n", messages[1:]
        return [{"role": "system", "content": before + self.told()}, *messages]


def new_id() -> str:
    """Of a call."""
    return "call_" + secrets.token_hex(12)


def tools_of(fields: Fields) -> Tools:
    """The functions of a body of chat completions. Raises Refused."""
    functions = []
    for place, tool in enumerate(listed_tools(fields)):
        outer = Fields(tool)
        if outer.take("type", (str,), "function") != "function":
            raise Refused(f"tools[{place}] is no function", "tools")
        functions.append(function_of(place, outer.take("function", (dict,), {})))
        outer.done()
    choice = fields.take("tool_choice", (str, dict), "auto")
    fields.only("parallel_tool_calls", True, False)
    fields.only("functions", [])
    fields.only("function_call", "none", "auto")
    name = None
    if isinstance(choice, dict):
        inner = Fields(choice)
        inner.only("type", "function")
        wanted = Fields(inner.take("function", (dict,), {}))
        choice, name = "required", wanted.take("name", (str,), "")
        wanted.done()
        inner.done()
    return chosen(functions, choice, name)


def listed_tools(fields: Fields) -> list[Any]:
    """Raises Refused for too many."""
    listed: list[Any] = fields.take("tools", (list,), [])
    if len(listed) > MOST:
        raise Refused(f"tools are {len(listed)}, and {MOST} are the most", "tools")
    return listed


def chosen(functions: list[dict[str, Any]], choice: str, name: str | None) -> Tools:
    """Functions of which one may, or must, be called; of one `name` alone, where there is one. Raises
    Refused.
    """
    names = [each["name"] for each in functions]
    if len(set(names)) < len(names):
        raise Refused("tools has two of one name", "tools")
    if name is not None:
        if name not in names:
            raise Refused(f"tool_choice names {name[:64]!r}, which is none of the tools", "tool_choice")
        return Tools([each for each in functions if each["name"] == name], "required")
    if choice == "auto" and not functions:
        choice = "none"
    if choice not in ("none", "auto", "required") or (choice == "required" and not functions):
        raise Refused(f"tool_choice = {choice[:40]!r} can not be used", "tool_choice")
    return Tools(functions, choice)


def function_of(place: int, function: Any, parameters: str = "parameters") -> dict[str, Any]:
    """One function, whose schema stands in the field `parameters`. Raises Refused for what is none."""
    where, inner = f"tools[{place}]", Fields(function)
    name, about = inner.take("name", (str,), ""), inner.take("description", (str,), "")
    schema = inner.take(parameters, (dict,), {"type": "object", "properties": {}})
    inner.ignore("strict")
    inner.done()
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise Refused(
            f"{where} has the name {name[:64]!r}, not 1 to 64 letters, digits, _, - and dots", "tools"
        )
    return {"name": name, "description": about, "parameters": schema}


def in_words(messages: Any) -> Any:
    """Messages in which calls, and what came of them, are words of the assistant and of the user. Raises
    Refused for the result of no call.
    """
    if not isinstance(messages, list):
        return messages
    out, names = list[dict[str, Any]](), dict[str, str]()
    for message in messages:
        if not isinstance(message, dict):
            return messages
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and isinstance(calls, list) and calls:
            out.append({"role": "assistant", "content": calls_in_words(message, calls, names)})
        elif message.get("role") == "tool":
            name = names.get(str(message.get("tool_call_id")))
            if name is None:
                raise Refused("messages has the result of a call that nobody made", "messages")
            result = {
                "role": "user",
                "content": f"{name} gave: {text_of(message.get('content') or '', 'messages')}",
            }
            if out and out[-1].get("result"):
                out[-1]["content"] += "\n" + result["content"]
            else:
                out.append(result | {"result": True})
        else:
            out.append(message)
    return [{key: value for key, value in each.items() if key != "result"} for each in out]


def calls_in_words(message: dict[str, Any], calls: list[Any], names: dict[str, str]) -> str:
    """Calls as the model writes them; `names` learns what each was of. Raises Refused."""
    lines = [message["content"]] if isinstance(message.get("content"), str) and message["content"] else []
    for call in calls:
        try:
            function = call["function"]
            names[str(call["id"])] = name = str(function["name"])
            arguments = parse_json(function["arguments"])
        except (ValueError, KeyError, TypeError):
            raise Refused("messages has a tool call that is none", "messages") from None
        lines.append(json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False))
    return "\n".join(lines)
