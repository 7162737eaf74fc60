"""Who may come in."""

from __future__ import annotations

from dataclasses import dataclass

LOCAL = ("localhost", "127.0.0.1", "::1")  # what this machine calls itself


@dataclass(frozen=True)
class Door:
    """Who may come in. Without a key, only this machine's own programs, and no web page from elsewhere."""

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOCAL  # names by which the server may be called, or nothing where any may
    origins: tuple[str, ...] = ()  # of web pages elsewhere that may use it
    most_bytes: int = 32 * 2**20  # of a body
