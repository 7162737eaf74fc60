"""Damaged files, lines and settings by the thousand: refused with a sentence, or answered as if whole."""
