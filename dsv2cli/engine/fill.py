"""Filling in the middle, by the tokens that the DeepSeek-Coder family has for it."""

from __future__ import annotations

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.errors import UsageError

# With full-width bars; their order is prefix, suffix, middle.
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


def fill_in(prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the middle follows. Raises UsageError where the checkpoint has no such tokens, or a
    text is too long.
    """
    tokenizer.refuse_too_long(prefix, suffix)
    begin, hole, end = (tokenizer.fast.token_to_id(token) for token in FIM_TOKENS)
    if begin is None or hole is None or end is None:
        why, fix = f"its tokenizer has no {FIM_TOKENS[0]}", "a Coder-V2 base checkpoint"
        raise UsageError("This checkpoint can not fill in the middle", why=why, fix=fix)
    before, after = tokenizer.encode_plain(prefix), tokenizer.encode_plain(suffix)
    return [*tokenizer.encode(""), begin, *before, hole, *after, end]
