"""`fxcompress init`: a first spec for a model."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from fxcompress.errors import UsageError

__all__ = ["command"]

IMAGE_KINDS = ("timm", "torchvision")


@click.command("init")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("spec.yaml"),
    show_default=True,
    help="The spec to write.",
)
def command(model: str, output: Path) -> int:
    """Write a first spec for MODEL: int8 after folding batch norms, checked before it is kept.

    MODEL is timm:NAME, torchvision:NAME, hf:FOLDER, file.py:function, package.module:callable,
    a .fxp program or a .pt2 archive. Paths are relative to the spec.
    """
    from fxcompress._files import write_text
    from fxcompress.spec import Spec
    from fxcompress.spec._yaml import parse_text

    if output.exists():
        raise UsageError(f"{output} is there already", hint="choose another file with -o")
    text = template(model)
    Spec.parse(parse_text(text, str(output)).plain(), folder=output.parent, name=str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    click.echo(f"wrote {output}; next: fxcompress check {output}")
    return 0


def template(model: str) -> str:
    """Return the text of a first spec."""
    from fxcompress.spec._emit_yaml import plain_text

    kind, colon, name = model.partition(":")
    suffix = Path(model).suffix
    if suffix in {".fxp", ".pt2"}:
        block = {".fxp": "program", ".pt2": "pt2"}[suffix]
        written = f"{{{block}: {plain_text(model)}}}"
    elif colon and kind in {*IMAGE_KINDS, "hf"}:
        written = f"{{{kind}: {plain_text(name)}}}"
    else:
        written = f"{{factory: {plain_text(model)}}}"
    return TEMPLATE.format(model=written, inputs=_inputs(kind))


def _inputs(kind: str) -> str:
    if kind == "hf":
        return '{name: input_ids, shape: [batch, seq], dtype: int64, values: "randint(0, 1000)"}'
    return "{name: x, shape: [batch, 3, 224, 224]}"


TEMPLATE = """\
# yaml-language-server: $schema=fxcompress.schema.json
# Every key: `fxcompress schema`. Every pass: `fxcompress passes`.
fxcompress: 1

model: {model}
# The tensors that `forward` takes; a name in `shape` is a size that may vary.
inputs: [{inputs}]

# Random data shows what would happen, not how good the result is. Put a factory in its place:
#   data: {{factory: "data.py:splits"}}, a function that returns splits by name.
data:
  calibration: {{random: 64, batch: 8}}

passes:
  - {{use: tidy.fold_batchnorm}}
  - {{use: quantize.static, calibration: 64}}

constraints: {{size: 30%}}
emit: [pt2]
"""
