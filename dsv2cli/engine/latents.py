"""The latent cache of a talk, beside its record: what makes resuming it cost no prefill."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv2cli.engine.session import Session
from dsv2cli.engine.store import replacing
from dsv2cli.errors import Dsv2Error
from dsv2cli.outside import reason, require_file
from dsv2cli.run.page_store import digest_of


def save_cache(path: Path, session: Session, model: str) -> None:
    """The latents of all cached tokens, so that resuming costs no prefill. Raises
    Dsv2Error as `save` does.
    """
    latents = session.latents()
    tensors = {f"layers.{i}": layer.cpu().contiguous() for i, layer in enumerate(latents)}
    tensors["token_ids"] = torch.tensor(session.cached_ids, dtype=torch.int64)
    with replacing(path) as new:
        try:
            save_file(tensors, new, metadata={"model": model, "sha256": digest_of(tensors)})
        except SafetensorError as error:
            raise Dsv2Error(f"{path} could not be written", why=str(error), fix="make room") from None


@torch.inference_mode()  # as the cache itself was made
def load_cache(path: Path, session: Session, model: str) -> str:
    """Put saved latents into the session's cache. Says in a few words why not, or nothing where it did."""
    if not path.exists():
        return "none was saved"
    config = session.runner.config
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("model") != model:
                return "it belongs to another model"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        return f"it is damaged: {reason(error)}"
    names = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    if about.get("sha256") != digest_of(tensors) or tensors.keys() != {"token_ids", *names}:
        return "it is damaged: it is not what was written"
    ids, layers = tensors["token_ids"].tolist(), [tensors[name] for name in names]
    shape = (len(ids), config.cached_dim)
    if any(layer.shape != shape or layer.dtype != session.runner.dtype for layer in layers):
        return "its shape is another"
    if not all(bool(layer.isfinite().all()) for layer in layers):
        return "it holds NaN or infinity"
    session.take_latents(ids, layers)
    return ""
