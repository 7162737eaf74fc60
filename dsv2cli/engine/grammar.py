"""Answers held to a regular expression or a JSON schema: which tokens may come next.

By llguidance, an optional extra.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import AGAIN, one_line, parse_json

if TYPE_CHECKING:
    from torch import Tensor

# Between the parts of a JSON text: enough for any usual indentation, not enough for a model to lose itself in
# blanks.
WHITESPACE = r"\n? {0,8}"
# Words of schemas that put others together: what one of them leaves open, another may need.
COMBINING = (
    "allOf",
    "oneOf",
    "not",
    "if",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "propertyNames",
    "$dynamicRef",
)


class Grammar:
    """What an answer may be, ready for one tokenizer, as a regular expression, a JSON schema or, in the
    library's own language, `lark` says. `start` is what every answer begins with already.

    Raises UsageError for a grammar that can not be read or that `start` breaks, Dsv2Error where llguidance is
    missing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: frozenset[int],
        regex: str | None,
        schema: str | None,
        start: str = "",
        lark: str | None = None,
    ) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise Dsv2Error(
                "Held answers need llguidance", why="it is not installed", fix='pip install "llguidance>=1.7"'
            ) from None
        if not eos_ids:
            raise UsageError(
                "An answer that is held to a form needs an end",
                why="there is no end-of-text token",
                fix="leave --ignore-eos out",
            )
        self.ends = eos_ids
        self.option = "the grammar" if lark is not None else "--regex" if schema is None else "--json-schema"
        try:
            if lark is not None:
                self.text = LLMatcher.grammar_from_lark(lark)
            elif schema is not None:
                schema = "{}" if schema.strip() == "true" else schema  # the same, and the library takes it
                self.text = LLMatcher.grammar_from_json_schema(
                    closed(schema), defaults={"whitespace_pattern": WHITESPACE}
                )
            else:
                self.text = LLMatcher.grammar_from_regex(regex or "")
        except ValueError as error:
            raise self.senseless(str(error)) from None
        if tokenizer.largest_id >= vocab_size:
            why = f"it has the id {tokenizer.largest_id:,}, the model {vocab_size:,} ids"
            raise Dsv2Error(f"{tokenizer.path} belongs to another model", why=why, fix=AGAIN)
        self.tokenizer = prepared(tokenizer, vocab_size, tuple(sorted(eos_ids)))
        self.matcher = LLMatcher(self.tokenizer, self.text, log_level=0)
        if self.matcher.is_error():
            raise self.senseless(cause(self.matcher))
        if start and not self.matcher.consume_tokens(tokenizer.encode(start, add_bos=False)):
            raise UsageError(
                "The prefix breaks the form of the answer",
                why=f"nothing that begins with it matches {self.option}",
            )

    def senseless(self, why: str) -> UsageError:
        return UsageError(f"{self.option} can not be used", why=one_line(why))

    def begin(self) -> Constraint:
        return Constraint(self.matcher.deep_copy(), self.ends)


def closed(schema: str) -> str:
    """A schema whose objects have no members but those it names, where it does not speak of others.

    What fits into it fits into the schema as it was, and a model does not lose itself in members of its own
    making. One that puts schemas together is left as it is, and so is what can not be read.
    """
    if any(f'"{word}"' in schema for word in COMBINING):
        return schema
    try:
        return json.dumps(with_closed_objects(parse_json(schema)))
    except ValueError:
        return schema


def with_closed_objects(schema: Any) -> Any:
    """Raises ValueError for one that puts schemas together in other words."""
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    if any(key in out for key in ("anyOf", "$ref")) and any(key in out for key in ("properties", "required")):
        raise ValueError("it puts schemas together")
    for key in ("properties", "$defs", "definitions"):
        if isinstance(out.get(key), dict):
            out[key] = {name: with_closed_objects(each) for name, each in out[key].items()}
    for key in ("anyOf", "prefixItems"):
        if isinstance(out.get(key), list):
            out[key] = [with_closed_objects(each) for each in out[key]]
    for key in ("items", "additionalProperties"):
        out |= {key: with_closed_objects(out[key])} if key in out else {}
    named = out.get("properties")
    beside = ("additionalProperties", "patternProperties", "minProperties")
    if isinstance(named, dict) and not any(key in out for key in beside):
        required = out.get("required", [])
        if isinstance(required, list) and all(isinstance(n, str) and n in named for n in required):
            out["additionalProperties"] = False
    return out


@functools.lru_cache(maxsize=4)
def prepared(tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> Any:
    """A tokenizer as the library wants it, which takes a moment for a large one."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.fast.to_str(), n_vocab=vocab_size, eos_token=list(eos_ids))


def cause(matcher: Any) -> str:
    """What a matcher says went wrong, without the state that it writes around it."""
    said = str(matcher.get_error()).partition("<state>")[0].strip()
    return "" if said.isidentifier() else said  # one word is a name of the library's own


class Constraint:
    """One answer's way through its grammar."""

    def __init__(self, matcher: Any, ends: frozenset[int]) -> None:
        self.matcher, self.ends = matcher, ends

    def allow(self, logits: Tensor) -> Tensor:
        """Logits [vocab] with minus infinity for every token that may not come next.

        The end of text may where all is said.

        Raises Dsv2Error where no token may come next, or what is there does not lead to an end.
        """
        import torch  # here, so that a wrong --regex is told without it

        if self.matcher.is_error():
            raise self.dead_end()
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8)) & 1  # the lowest bit is the first token
        allowed = allowed.flatten()[: logits.numel()].bool()
        if not allowed.any():
            raise self.dead_end()
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def take(self, token_id: int) -> None:
        """Go on by a token that was allowed. Raises Dsv2Error where the form is broken then, or ends too
        soon.
        """
        unfinished = token_id in self.ends and not self.matcher.is_accepting()
        if unfinished or not self.matcher.consume_token(token_id):
            raise self.dead_end()

    def dead_end(self) -> Dsv2Error:
        return Dsv2Error(
            "No token of this model can go on in the form asked for",
            why=cause(self.matcher) or "the form leads nowhere, or the vocabulary lacks a character",
            fix="another --json-schema or --regex",
        )
