"""Text to token ids and back, the chat template, and the checkpoint's sampling defaults.

tokenizer.json is read with the `tokenizers` library itself: transformers 5's LlamaTokenizerFast, which the
released tokenizer_config.json names, drops spaces, and AutoTokenizer ignores add_bos_token. BOS is our own
rule: exactly once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from dsv2cli.errors import Dsv2Error

Message = dict[str, str]


class Tokenizer:
    """The checkpoint's tokenizer with its BOS rule and chat template.

    Raises Dsv2Error where a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        """Raises Dsv2Error for a missing or damaged tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise Dsv2Error(
                f"{folder} holds no tokenizer",
                why="tokenizer.json is missing",
                fix="copy it from the original repository, or give token ids: "
                'dsv2 complete --prompt-ids "1,2,3"',
            )
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise Dsv2Error(f"{path} cannot be read", why=str(error), fix="download the file again") from None
        self.settings = read_json(folder / "tokenizer_config.json")
        self.chat_template = self.find_template(folder)

    def find_template(self, folder: Path) -> str | None:
        """chat_template.jinja where transformers 5 saved one, else the entry of tokenizer_config.json."""
        file = folder / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
        template = self.settings.get("chat_template")
        if isinstance(template, list):  # several named ones
            named = {
                entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)
            }
            template = named.get("default")
        return template if isinstance(template, str) else None

    def special(self, name: str) -> str:
        """The text of a special token such as `bos_token`, or an empty string."""
        token = self.settings.get(name)
        return str(token.get("content", "") if isinstance(token, dict) else token or "")

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids; BOS comes first exactly once if `add_bos` and the checkpoint wants it."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=False).ids
        bos = self.fast.token_to_id(self.special("bos_token"))
        if add_bos and bos is not None and self.settings.get("add_bos_token", True) and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self.fast.decode(ids, skip_special_tokens=True))

    def encode_chat(self, messages: list[Message], prefix: str = "") -> list[int]:
        """The whole conversation through the chat template, ending where the assistant's answer begins, or
        after its `prefix`.

        The template writes BOS itself. Raises Dsv2Error when the checkpoint has no template or it rejects the
        messages.
        """
        if self.chat_template is None:
            raise Dsv2Error(
                "This checkpoint has no chat template",
                why="it is a base model, which continues text",
                fix="dsv2 complete, or a -Chat checkpoint",
            )
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                [messages],
                chat_template=self.chat_template,
                add_generation_prompt=True,
                bos_token=self.special("bos_token"),
                eos_token=self.special("eos_token"),
            )
        except TemplateError as error:
            raise Dsv2Error("The chat template rejected this conversation", why=str(error)) from None
        return self.encode(rendered[0] + prefix)


class IncrementalDecoder:
    """Token ids in, finished characters out: a character split over tokens is held until it is whole.

    All pieces and `finish` together are what decoding all ids at once gives.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.held: list[int] = []  # ids that have given nothing yet

    def add(self, token_id: int) -> str:
        """The text that this token makes whole."""
        piece: str | None = self.stream.step(self.tokenizer.fast, token_id)
        self.held = [*self.held, token_id] if piece is None else []
        return piece or ""

    def finish(self) -> str:
        """What was held back, when no more tokens come: for half a character, marks that say so."""
        return self.tokenizer.decode(self.held)


def read_json(path: Path) -> dict[str, Any]:
    """An optional settings file: {} when it is not there. Raises Dsv2Error when it is there and broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Dsv2Error(f"{path} cannot be read", why=str(error), fix="download the file again") from None
    if not isinstance(content, dict):
        raise Dsv2Error(
            f"{path} cannot be read", why="it holds no JSON object", fix="download the file again"
        )
    return content
