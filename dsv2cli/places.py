"""Where this program keeps what belongs to a person. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def data_folder() -> Path:
    return platformdirs.user_data_path("dsv2", appauthor=False)


def sessions() -> Path:
    """Saved conversations."""
    return data_folder() / "sessions"


def session_names() -> list[str]:
    """Saved conversations, the latest first."""
    files = [(file.stat().st_mtime_ns, file.stem) for file in sessions().glob("*.json")]
    return [name for _, name in sorted(files, reverse=True)]


def compiled_kernels() -> Path:
    return Path(platformdirs.user_cache_dir("dsv2")) / "kernels"
