"""Decide where virtual tokens go and what else must grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, fx

from fxcompress.errors import PassError, SelectorError, UsageError, VerifyError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.pipeline._close import did_you_mean
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.adapters import find_adapters
from passes._freezing import freezing
from passes._paths import free_path
from passes.distill._prompt.insert import insert
from passes.distill._prompt.positions import longest
from passes.distill.prompt import Extended, PromptDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.ir.signature import TensorInput
    from fxcompress.pipeline.context import Context
    from passes.distill.prompt import PromptOptions

__all__ = ["decide"]

# What inputs of these names hold at the virtual tokens; None: positions.
_USUAL: Final[dict[str, int | None]] = {
    "attention_mask": 1,
    "padding_mask": 1,
    "mask": 1,
    "token_type_ids": 0,
    "segment_ids": 0,
    "position_ids": None,
    "positions": None,
    "labels": -100,
}
_NO_TOKENS: Final = ("token_type_ids", "segment_ids", "position_ids", "positions")
_PASSING: Final = frozenset({"to", "contiguous", "view", "reshape", "clone", "identity"})


def decide(program: Program, options: PromptOptions, context: Context) -> PromptDecision:
    """Return the decision of `distill.prompt`."""
    embedding, ids = _embedding(program, options)
    spec = program.signature.input(str(ids.target))
    size = _sequence(program, spec)
    names = node_ids(program)
    adapter = {a.layer: a for a in find_adapters(program).values()}.get(str(embedding.target))
    result = embedding if adapter is None else adapter.calls[0][1]
    readers = [n for n in _embeddings(program) if _source(n) is ids]
    if len({names[n] for n in readers if adapter is None or n is embedding}) > 1:
        which = ", ".join(names[n] for n in readers)
        raise UsageError(
            f"the ids {ids.target} are embedded more than once",
            reason=f"by {which}; it is not clear before which of them the prompt goes",
        )
    table = _table(program, embedding)
    inputs = _inputs(program, spec, size, _filler(program, ids, embedding), options)
    others = {
        node: int(_table(program, node).shape[0])
        for node in _embeddings(program)
        if node is not embedding and node not in readers
    }
    decision = PromptDecision(
        tokens=options.tokens,
        path=free_path("prompt", {*program.state(), *dict(program.module.named_modules())}),
        embedded=names[result],
        readers=tuple(names[n] for n in readers),
        ids=spec.name,
        size=size,
        maximum=longest(program, size, others, inputs, options.tokens),
        inputs=inputs,
        keep=options.keep,
        arrays={"prompt": _first(table, options, context.seed)},
    )
    added = options.tokens * int(table.shape[1])
    made = freezing(program, options.train, added, tuple(f"{a}." for a in find_adapters(program)))
    decision = decision.model_copy(update=made)
    _try(program, decision)
    return decision


def _try(program: Program, decision: PromptDecision) -> None:
    """Rewrite once, to say why it cannot be done before anything is done.

    Raises:
        UsageError: Sizes do not fit: something in the model has the length without the prompt.
    """
    rewriter = GraphRewriter(program)
    try:
        insert(rewriter, decision)
        rewriter.finish()
    except (PassError, VerifyError) as error:
        raise UsageError(
            "the positions of the model cannot be extended",
            reason=str(error).splitlines()[0],
            hint="a part of the model is made for the length without the prompt",
        ) from error


# -- the embedding ---------------------------------------------------------------------------------


def _embeddings(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes if op_name(node) == "embedding"]


def _source(node: fx.Node) -> fx.Node | None:
    """Return the input that an embedding's ids are, through casts and views; None if computed."""
    found = bind(node).get("input")
    while isinstance(found, fx.Node) and found.op != "placeholder":
        if op_name(found) not in _PASSING:
            return None
        found = found.all_input_nodes[0]
    return found if isinstance(found, fx.Node) else None


def _embedding(program: Program, options: PromptOptions) -> tuple[fx.Node, fx.Node]:
    """Return the node that embeds the tokens, and the input that holds their ids.

    Raises:
        SelectorError: There is none, or it is not clear which.
    """
    names = node_ids(program)
    own = tuple(f"{path}." for path in find_adapters(program))
    found = {
        names[node]: (node, source)
        for node in _embeddings(program)
        if (source := _source(node)) is not None and not names[node].startswith(own)
    }
    if options.embedding is not None:
        if options.embedding not in found:
            raise SelectorError(
                f"there is no embedding `{options.embedding}` of an input",
                hint=did_you_mean(options.embedding, found, kind="there are"),
            )
        return found[options.embedding]
    tokens = {name: pair for name, pair in found.items() if str(pair[1].target) not in _NO_TOKENS}
    if not tokens:
        raise SelectorError(
            "the model has no embedding of token ids, before which a prompt could go",
            reason=f"no input is embedded; the inputs are "
            f"{', '.join(tensor.name for tensor in program.signature.inputs)}",
        )
    if len(tokens) > 1:
        raise SelectorError(
            f"{len(tokens)} embeddings take ids from an input",
            reason=", ".join(f"{name} takes {pair[1].target}" for name, pair in tokens.items()),
            hint="say which with `embedding`",
        )
    return next(iter(tokens.values()))


def _table(program: Program, embedding: fx.Node) -> Tensor:
    if embedding.op == "call_module":
        return program.state()[f"{embedding.target}.weight"].detach()
    weight = bind(embedding)["weight"]
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    return program.state()[str(weight.target)].detach()


def _first(table: Tensor, options: PromptOptions, seed: int) -> Tensor:
    """Return the first values of the virtual tokens, `[tokens, features]`.

    Raises:
        UsageError: An id is not in the vocabulary.
    """
    rows = int(table.shape[0])
    if table.is_meta:
        return torch.zeros(options.tokens, int(table.shape[1]), dtype=table.dtype)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(options.init, tuple):
        if not options.init or min(options.init) < 0 or max(options.init) >= rows:
            raise UsageError(
                f"the ids {list(options.init)} are not all in the vocabulary",
                reason=f"the embedding has {rows} rows",
            )
        chosen = [options.init[i % len(options.init)] for i in range(options.tokens)]
        return table[chosen].clone()
    if options.init == "normal":
        drawn = torch.randn(options.tokens, int(table.shape[1]), generator=generator)
        return (drawn * float(table.float().std())).to(table.dtype)
    return table[torch.randint(0, rows, (options.tokens,), generator=generator)].clone()


# -- the inputs ------------------------------------------------------------------------------------


def _sequence(program: Program, spec: TensorInput) -> str:
    """Return the name of the sequence's size.

    Raises:
        UsageError: It is fixed, or the ids are no `[batch, sequence]`.
    """
    if len(spec.shape) != 2:
        raise UsageError(
            f"{spec.name} has {len(spec.shape)} dimensions, and a prompt goes before a sequence",
            reason="ids must be `[batch, sequence]`",
        )
    size = spec.shape[1]
    if not isinstance(size, str):
        raise UsageError(
            f"the positions of the model cannot be extended: {spec.name} has the fixed length "
            f"{size}",
            reason="views and masks were recorded for it",
            hint=f"let it vary: `inputs: [{{name: {spec.name}, shape: [batch, seq]}}]`",
        )
    return size


def _inputs(
    program: Program, ids: TensorInput, size: str, filler: int, options: PromptOptions
) -> tuple[Extended, ...]:
    """Return how each input grows that has the sequence's size.

    Raises:
        UsageError: It is not known of one, or a name of `fill` is no such input.
    """
    growing = [t for t in program.signature.inputs if size in t.shape]
    for name in options.fill:
        if name not in {t.name for t in growing} - {ids.name}:
            raise UsageError(
                f"`{name}` in `fill` is no input that grows",
                hint=did_you_mean(name, [t.name for t in growing], kind="there are"),
            )
    found = []
    for tensor in growing:
        if tensor.shape.count(size) > 1:
            raise UsageError(
                f"it is not known how {tensor.name} grows",
                reason=f"{size} is the size of {tensor.shape.count(size)} of its dimensions",
                hint="capture the model with a mask `[batch, sequence]`",
            )
        dim = tensor.shape.index(size)
        if tensor.name == ids.name:
            found.append(Extended(name=tensor.name, dim=dim, fill=filler))
        elif tensor.name in options.fill:
            found.append(Extended(name=tensor.name, dim=dim, fill=options.fill[tensor.name]))
        elif tensor.name in _USUAL:
            found.append(Extended(name=tensor.name, dim=dim, fill=_USUAL[tensor.name]))
        else:
            raise UsageError(
                f"it is not known what {tensor.name} holds at the virtual tokens",
                reason=f"known are {', '.join(_USUAL)}",
                hint=f"say it: `fill: {{{tensor.name}: 0}}`",
            )
    return tuple(found)


def _filler(program: Program, ids: fx.Node, embedding: fx.Node) -> int:
    """Return an id that the model does not compare with: no padding, no end of text."""
    special = {
        each
        for user in _through(ids)
        for each in (*user.args, *user.kwargs.values())
        if op_name(user) in ("eq", "ne") and isinstance(each, int)
    }
    padding = None
    if embedding.op == "call_module":
        padding = getattr(program.module.get_submodule(str(embedding.target)), "padding_idx", None)
    return next(value for value in range(len(special) + 2) if value not in {*special, padding})


def _through(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node, through casts and views."""
    found = []
    for user in node.users:
        found.append(user)
        if op_name(user) in _PASSING:
            found += _through(user)
    return found
