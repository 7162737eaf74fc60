"""The golden transcripts: commands, and to the letter what they print, on which stream,
with which exit code.
"""

from __future__ import annotations

import pytest
from regenerate import TRANSCRIPTS, record


@pytest.mark.parametrize("path", sorted(TRANSCRIPTS.glob("*.txt")), ids=lambda path: path.stem)
def test_commands_say_what_the_transcript_says(path):
    assert record(path) == path.read_text(encoding="utf-8")
