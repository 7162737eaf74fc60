"""`dsv2 models`: what can be run here, or what a server serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui


@dataclass(frozen=True)
class Where:
    """Where to look."""

    heading = opt.TO_RUN

    api: opt.ApiOption = None


@dataclass(frozen=True)
class Output:
    """How they are shown."""

    heading = opt.OUTPUT

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


@opt.unfolded
def models(where: Where, output: Output) -> None:
    """List the models that are here, or with --api those of a server."""
    listed = here() if where.api is None else there(where.api)
    if output.json:
        ui.write_json({"models": listed})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "context", "GB", "where"):
        table.add_column(column, justify="right" if column in ("context", "GB") else "left", no_wrap=True)
    for model in listed:
        context = "" if model["context"] is None else f"{model['context']:,}"
        size = "" if model["bytes"] is None else f"{model['bytes'] / 1e9:.2f}"
        table.add_row(*map(ui.harmless, (model["name"], context, size, model["where"])))
    ui.stdout().print(table)


def here() -> list[dict[str, Any]]:
    """The model in the package, and repositories of this family in the cache of Hugging Face."""
    from dsv2cli.checkpoint.hub import EMBEDDED, downloaded
    from dsv2cli.errors import Dsv2Error
    from dsv2cli.model.config import DeepseekV2Config

    out = []
    for name, folder in [("", EMBEDDED), *downloaded()]:
        try:
            context: int | None = DeepseekV2Config.load(folder / "config.json").max_position_embeddings
        except Dsv2Error:
            context = None
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.exists())
        out.append(
            {
                "name": name or "(in the package: no --model)",
                "context": context,
                "bytes": size,
                "where": str(folder),
            }
        )
    return out


def there(api: str) -> list[dict[str, Any]]:
    """What a server lists. Raises Dsv2Error."""
    from dsv2cli.cli import far
    from dsv2cli.remote.server import context_of

    server = far.connect(api, None)
    return [
        {"name": each["id"], "context": context_of(each), "bytes": None, "where": server.address.url}
        for each in server.models()
    ]
