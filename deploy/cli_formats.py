"""`medusa export` and `medusa import`: heads to and from other systems. Parses and prints; medusa.formats does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()

To = Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder to write.")]


@commands.command("export")
def export(
    folder: To,
    format: Annotated[
        str,
        typer.Option(
            help="vllm, vllm-token-map, reference (the layout that fits), reference-pt, reference-safetensors, reference-full."
        ),
    ],
    backbone: Annotated[str, typer.Option(help="Built-in name, model folder or hub id.")] = "smollm2-135m",
    heads: Annotated[str, typer.Option(help="Checkpoint folder, or 'plain': the built-in backbone's.")] = "plain",
    dtype: Annotated[str, typer.Option(help="Type to write: auto (bfloat16), bfloat16, float16, float32.")] = "auto",
    tree: Annotated[int | None, typer.Option(help="Nodes of the tree. Default: the checkpoint's choice.")] = None,
    backbone_to: Annotated[
        Path | None, typer.Option(help="Also write the backbone there, adapters merged, as a transformers folder.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Leave out what the format cannot hold; use heads made for other weights.")
    ] = False,
) -> None:
    """Write heads in another system's format: vLLM's, or the reference implementation's."""
    from deploy.terminal import quiet

    quiet()
    import medusa
    from medusa.formats import check_request, export_heads, save_backbone

    check_request(format, *(place for place in (folder, backbone_to) if place is not None))
    model = medusa.load(backbone, heads=heads, dtype=dtype, device="cpu", force=force, fused=False)
    assert model.checkpoint is not None
    exported = export_heads(
        folder,
        model.checkpoint,
        model.backbone,
        format=format,
        num_nodes=tree,
        backbone_saved=backbone_to is not None,
        force=force,
    )
    if backbone_to is not None:
        save_backbone(backbone_to, model.backbone)
    _tell(exported.notes)
    print(f"{exported.folder}: {exported.format}")


@commands.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder or file of another system's heads.")],
    folder: To,
    backbone: Annotated[
        str | None,
        typer.Option(help="What the heads were trained on. Default: the source, where it is a whole model (MEDUSA-2)."),
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="JSON file of the tree's paths, the reference's medusa_choices.")
    ] = None,
) -> None:
    """Read heads of vLLM's or the reference implementation's layouts into a checkpoint."""
    from deploy.terminal import quiet

    quiet()
    from medusa.backbone import load_backbone
    from medusa.formats import holds_backbone, import_heads

    if folder.exists():
        raise ValueError(f"{folder} exists; give a new folder")
    if backbone is None and not holds_backbone(source):
        raise ValueError(f"{source} holds no backbone; say what its heads were trained on (--backbone)")
    loaded = load_backbone(backbone or source, dtype="float32", device="cpu", fused=False)
    imported = import_heads(source, folder, backbone=loaded, choices=choices)
    _tell(imported.notes)
    shape = imported.heads
    print(
        f"{imported.folder}: {shape.num_heads} heads of {shape.num_layers} layer(s), {shape.lm_heads} lm_head, "
        f"from {imported.format}"
    )


def _tell(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"medusa: note: {note}", file=sys.stderr)
