"""The embedded model: its checkpoint, its card and what it was trained on."""
