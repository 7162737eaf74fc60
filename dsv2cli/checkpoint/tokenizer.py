"""Text to token ids and back, and conversations to ids by the checkpoint's chat template.

tokenizer.json is read with the `tokenizers` library itself: transformers 5's LlamaTokenizerFast, which the
released tokenizer_config.json names, drops spaces, and AutoTokenizer ignores add_bos_token. BOS is our own
rule: exactly once.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dsv2cli.checkpoint.template import find_template, render
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import AGAIN, is_text, read_bytes, read_json, reason

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before it is imported: templates run in forks

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

ONE_AT_A_TIME = threading.RLock()  # of the threads that turn stderr aside
Message = dict[str, str]
T = TypeVar("T")

SECONDS = 10.0  # that the library may take for a text, and one more for each million characters
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # in no text, by the Unicode standard
MARK = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
# What a tokenizer that keeps text as it is gives back: blanks, letters that have other forms, controls.
PROBE = "  Hello, World!\r\n\t a\u0300 e\u0301 \ufb01 \uff11 \u0130 \u4f60 \U0001f642 123\u200b\x01  end \n "


def letters_of_bytes() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes (GPT-2's bytes_to_unicode)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = letters_of_bytes()


class Tokenizer:
    """The checkpoint's tokenizer with its BOS rule and chat template.

    Raises Dsv2Error where a file is missing.
    """

    def __init__(self, folder: Path, context: int | None = None) -> None:
        """`context` is the most tokens that the model holds. Raises Dsv2Error for a tokenizer.json that is
        missing, damaged, or changes the text.
        """
        self.folder, self.path, self.context = folder, folder / "tokenizer.json", context
        if not os.path.lexists(self.path):
            raise Dsv2Error(
                f"{folder} holds no tokenizer",
                why="tokenizer.json is missing",
                fix="copy it from the original repository, or give token ids: "
                'dsv2 complete --prompt-ids "1,2,3"',
            )
        try:
            data = read_bytes(self.path)
        except OSError as error:
            raise Dsv2Error(f"{self.path} cannot be read", why=reason(error), fix=AGAIN) from None
        self.fast: FastTokenizer = self.guarded(lambda: FastTokenizer.from_buffer(data), len(data))
        self.settings = read_json(folder / "tokenizer_config.json", dict)
        self.chat_template = find_template(folder, self.settings)
        self.keep_text_whole()
        self.adds_bos = self.settings.get("add_bos_token", True)
        if not isinstance(self.adds_bos, bool):
            what = f"{folder / 'tokenizer_config.json'}: add_bos_token = {self.adds_bos!r} makes no sense"
            raise Dsv2Error(what, why="it must be true or false", fix=AGAIN)
        self.bos, self.eos = self.special("bos_token"), self.special("eos_token")
        if self.adds_bos and not self.bos:
            why = "neither tokenizer_config.json, special_tokens_map.json nor config.json names one"
            raise Dsv2Error(f"{folder} has no token that begins a text", why=why, fix=AGAIN)
        self.bos_id = self.fast.token_to_id(self.bos)

    def keep_text_whole(self) -> None:
        """Switch off what cuts, pads or drops at random. Raises Dsv2Error for what changes text otherwise."""
        self.fast.no_truncation()
        self.fast.no_padding()
        if getattr(self.fast.model, "dropout", None) is not None:
            self.fast.model.dropout = None
        added = self.fast.get_added_tokens_decoder().values()
        for token in added:
            if token.lstrip or token.rstrip or token.single_word:
                why = f"its token {token.content!r} takes what stands around it"
                raise Dsv2Error(f"{self.path} changes the text", why=why, fix=AGAIN)
        marks = [token.content for token in added if token.special or MARK.fullmatch(token.content)]
        longest_first = sorted((mark for mark in marks if len(mark) > 1), key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        vocabulary = self.fast.get_vocab()
        ids = set(vocabulary.values())
        if len(ids) != len(vocabulary):
            raise Dsv2Error(f"{self.path} gives one id to two tokens", fix=AGAIN)
        self.largest_id = max(ids)
        self.by_bytes = "ByteLevel" in repr(self.fast.decoder)  # whether a letter of a token is a byte
        self.longest = max(map(len, vocabulary))  # bytes of a token: a letter there is one
        for text in (PROBE, PROBE.strip()):
            if (again := self.decode(self.ids_of(text))) != text:
                why = f"{text!r} comes back as {again!r}"
                raise Dsv2Error(f"{self.path} changes the text", why=why, fix=AGAIN)

    def special(self, name: str) -> str:
        """The text of a special token such as `bos_token`, from the first file that names one of the
        vocabulary, or an empty string.
        """

        def files() -> Iterator[Any]:
            yield self.settings.get(name)
            yield read_json(self.folder / "special_tokens_map.json", dict).get(name)
            number = read_json(self.folder / "config.json", dict).get(f"{name}_id")
            yield self.fast.id_to_token(number) if type(number) is int and 0 <= number < 2**32 else None

        for token in files():
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text and is_text(text) and self.fast.token_to_id(text) is not None:
                return text
        return ""

    def guarded(self, work: Callable[[], T], size: int | None) -> T:
        """What the library gives for `size` characters, or where None says that it can not take long. Raises
        Dsv2Error where it fails, panics or goes on and on: within a thread, since it can not be stopped.
        """
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:  # a panic of the library is no Exception
                failed.append(error)

        seconds = SECONDS + (size or 0) / 1e6
        with without_panics():
            if size is None:
                run()
            else:
                thread = threading.Thread(target=run, daemon=True)
                thread.start()
                thread.join(seconds)
        if done:
            return done[0]
        if failed and isinstance(failed[0], KeyboardInterrupt | SystemExit):
            raise failed[0]
        why = reason(failed[0]) if failed else f"it takes longer than {seconds:.0f} seconds for this text"
        raise Dsv2Error(f"{self.path} cannot be used", why=why, fix=AGAIN if failed else "another text")

    def ids_of(self, text: str) -> list[int]:
        """Token ids of a text as it stands, in which special tokens are those. Raises UsageError for half
        characters, Dsv2Error.
        """
        if not is_text(text):
            raise UsageError(
                "The text holds half a character", why="it is a lone surrogate, which no text has"
            )
        # A batch of one: the library then lets other threads run.
        ids: list[int] = self.guarded(
            lambda: self.fast.encode_batch([text], add_special_tokens=False)[0].ids, len(text)
        )
        return ids

    def refuse_too_long(self, *texts: str) -> None:
        """Raises UsageError for texts that can not fit into the context even in the longest tokens there are:
        they are not looked at for minutes first.
        """
        length = sum(map(len, texts))
        if self.context is not None and length > self.longest * self.context:
            why = f"the context of {self.context:,} tokens holds less, whatever it says"
            raise UsageError(f"The text has {length:,} characters", why=why, fix="a shorter text")

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids; BOS comes first exactly once if `add_bos` and the checkpoint wants it. Special tokens
        that the text spells are those.
        """
        return self.begun(self.ids_of(text)) if add_bos else self.ids_of(text)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids without BOS of text that is nothing but text, whatever it spells."""
        return self.ids_of_shielded(*self.shielded([text]))

    def begun(self, ids: list[int]) -> list[int]:
        """With BOS before them, where the checkpoint wants it and it is not there."""
        if not self.adds_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def shielded(self, texts: list[str]) -> tuple[str, ...]:
        """A noncharacter that is in none of the texts, and the texts with it in every special token that they
        spell, which thereby is none.

        Raises UsageError for texts that leave no such character.
        """
        free = (each for each in NONCHARACTERS if not any(each in text for text in texts))
        if (break_ := next(free, None)) is None:
            raise UsageError("The text holds every noncharacter there is", why="one is needed to mark places")
        out = []
        for text in texts:
            while (broken := self.marks.sub(lambda match: match[0][0] + break_ + match[0][1:], text)) != text:
                text = broken
            out.append(text)
        return break_, *out

    def ids_of_shielded(self, break_: str, text: str) -> list[int]:
        """Token ids of what lies between the breaks."""
        return [token_id for part in text.split(break_) if part for token_id in self.ids_of(part)]

    def decode(self, ids: list[int]) -> str:
        return str(self.guarded(lambda: self.fast.decode(ids, skip_special_tokens=True), None))

    def is_special(self, token_id: int) -> bool:
        """Whether a token is none of the text's, such as BOS."""
        added = self.fast.get_added_tokens_decoder().get(token_id)
        return added is not None and bool(added.special)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        piece = self.fast.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self.fast.get_added_tokens_decoder() or not self.by_bytes:
            return piece.encode()
        return bytes(BYTES[letter] for letter in piece)

    def encode_chat(self, messages: list[Message], prefix: str = "") -> list[int]:
        """The whole conversation through the chat template, ending where the assistant's answer begins, or
        after its `prefix`.

        The template writes special tokens, BOS too; what a message spells stays text. Raises Dsv2Error when
        the checkpoint has no template, or it rejects the messages or leaves out the last.
        """
        if self.chat_template is None:
            raise Dsv2Error(
                "This checkpoint has no chat template",
                why="it is a base model, which continues text",
                fix="dsv2 complete, or a -Chat checkpoint",
            )
        break_, start, *texts = self.shielded([prefix, *(message["content"] for message in messages)])
        safe = [message | {"content": text} for message, text in zip(messages, texts, strict=True)]
        rendered = render(self.chat_template, safe, self.bos, self.eos)
        if texts and texts[-1].strip() not in rendered:
            raise Dsv2Error("The chat template leaves out the last message", fix=AGAIN)
        if start:  # after one blank, as an answer begins, and without the blank that its next word brings
            between = "" if start[0].isspace() or rendered[-1:].isspace() else " "
            rendered += between + start.removesuffix(" ")
        return self.begun(self.ids_of_shielded(break_, rendered))


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


@contextmanager
def without_panics() -> Iterator[None]:
    """Where the library panics it writes that to stderr by itself; meanwhile that leads nowhere.

    What this program has to say there has a descriptor of its own.
    """
    with ONE_AT_A_TIME:
        try:
            kept = os.dup(2)
        except OSError:  # there is no stderr
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
