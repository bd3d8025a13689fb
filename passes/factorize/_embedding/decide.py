"""The decision of `factorize.embedding`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of
from fxcompress.rewrite.edits import Declined
from passes.factorize._embedding.tables import count_tokens, find_tables
from passes.factorize._embedding.tokenizer import needed_tokens, read_tokenizer
from passes.factorize.embedding import EmbeddingDecision, Table

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.factorize.embedding import EmbeddingOptions, Vocabulary

__all__ = ["decide"]

_ROUNDING: Final = 1e-12


def decide(program: Program, options: EmbeddingOptions, context: Context) -> EmbeddingDecision:
    """Return the decision of `factorize.embedding`."""
    if options.vocabulary is None:
        return _factorised(program, options, context)
    vocabulary = options.vocabulary
    tables, declined = find_tables(program, options, "_vocabulary", inputs=True)
    if not tables:
        raise UsageError(
            "no table is read with ids of an input",
            reason="; ".join(f"{each.node}: {each.reason}" for each in declined[:3]),
            hint="select another embedding, or take this pass out",
        )
    for table in tables:
        _check_ids(table, vocabulary)
    if context.planning:
        return _pending(tables, declined, options)
    document = None if vocabulary.tokenizer is None else read_tokenizer(vocabulary.tokenizer)
    if vocabulary.samples is None:
        batches = context.batches(vocabulary.split)
    else:
        batches = context.samples(vocabulary.split, vocabulary.samples)
    counts = count_tokens(program, tables, batches)
    found: list[Table] = []
    arrays: dict[str, Tensor] = {}
    for table in tables:
        always = {*vocabulary.keep, *_padding(program, table)}
        if vocabulary.unknown is not None:
            always.add(vocabulary.unknown)
        kept = _kept(counts[table.tensor], vocabulary, always)
        if document is not None:
            needed = needed_tokens(document, kept)
            kept = sorted({*kept, *(each for each in needed if each < table.rows)})
        if len(kept) >= table.rows - 1:
            reason = f"{len(kept):,} of its {table.rows:,} tokens occur: nothing is saved"
            declined = (*declined, *(Declined(node=node, reason=reason) for node in table.nodes))
            continue
        total = counts[table.tensor].total()
        covered = sum(counts[table.tensor][each] for each in kept) / max(total, 1)
        unknown = len(kept)
        if vocabulary.unknown is not None:
            unknown = kept.index(vocabulary.unknown)
        update = {"kept": len(kept), "unknown": unknown, "covered": covered}
        found.append(table.model_copy(update=update))
        arrays[f"{table.path}.kept"] = torch.tensor(kept)
    return EmbeddingDecision(
        fill=options.fill, tables=tuple(found), declined=declined, arrays=dict(arrays)
    )


def _check_ids(table: Table, vocabulary: Vocabulary) -> None:
    """Check that ids of the options are rows of a table.

    Raises:
        UsageError: One is not.
    """
    asked = [*vocabulary.keep, *([] if vocabulary.unknown is None else [vocabulary.unknown])]
    wrong = [each for each in asked if not 0 <= each < table.rows]
    if wrong:
        raise UsageError(
            f"token id {wrong[0]} is no row of {table.tensor}",
            reason=f"it has rows 0 to {table.rows - 1}",
            hint="name ids of the model's tokenizer, or select one table",
            where=table.tensor,
        )


def _padding(program: Program, table: Table) -> set[int]:
    """Return the padding ids of the embeddings of a table."""
    nodes = {name: node for node, name in node_ids(program).items()}
    found = set()
    for name in table.nodes:
        node = nodes[name]
        padding = (
            getattr(module_of(node), "padding_idx", None)
            if node.op == "call_module"
            else bind(node).get("padding_idx")
        )
        if isinstance(padding, int) and padding >= 0:
            found.add(padding)
    return found


def _kept(counts: Counter[int], vocabulary: Vocabulary, always: set[int]) -> list[int]:
    """Return the ids that stay, ascending."""
    frequent = [each for each, count in counts.items() if count >= vocabulary.least]
    frequent.sort(key=lambda each: (each not in always, -counts[each], each))
    missing = sorted(always - set(frequent))
    room = len(frequent)
    if vocabulary.size is not None:
        room = max(0, vocabulary.size - len(missing))
        room = max(room, sum(each in always for each in frequent))
    return sorted({*frequent[:room], *missing})


def _pending(
    tables: tuple[Table, ...], declined: tuple[Declined, ...], options: EmbeddingOptions
) -> EmbeddingDecision:
    pending = tuple(f"{table.tensor}: tokens known after they are counted" for table in tables)
    return EmbeddingDecision(fill=options.fill, tables=tables, declined=declined, pending=pending)


def _factorised(program: Program, options: EmbeddingOptions, context: Context) -> EmbeddingDecision:
    """Return ranks and factors."""
    tables, declined = find_tables(program, options, "_low", inputs=False)
    state = program.state()
    found: list[Table] = []
    arrays: dict[str, Tensor] = {}
    pending: list[str] = []
    for place, table in enumerate(tables):
        context.progress("decomposing tables", place + 1, len(tables))
        full = min(table.rows, table.width)
        if options.rank is not None and options.rank > full and len(tables) == 1:
            raise UsageError(
                f"rank {options.rank} of {table.tensor} is above its full rank {full}",
                reason=f"it has {table.rows} rows of {table.width}",
                hint=f"give at most {full}; up to {_break_even(table)} saves parameters",
                where=table.tensor,
            )
        value = state[table.tensor].detach()
        rank = options.rank
        if context.planning or value.is_meta:
            if rank is None:
                pending.append(f"{table.tensor}: rank known after decomposing the table")
                rank = max(1, _break_even(table))
            found, declined = _take(table, rank, found, declined)
            continue
        vectors, energies = _principal(table, value)
        if rank is None:
            assert options.energy is not None, "one of both is given"
            kept = energies.cumsum(0)
            wanted = min(options.energy, 1 - _ROUNDING) * kept[-1]
            rank = min(int((kept < wanted).sum()) + 1, full)
        before = len(found)
        found, declined = _take(table, rank, found, declined)
        if len(found) > before:
            part = float(energies[:rank].sum() / energies.sum().clamp_min(1e-300))
            found[-1] = found[-1].model_copy(update={"energy": part})
            basis = vectors[:, :rank]
            arrays[f"{table.path}.A.weight"] = (value.double().cpu() @ basis).to(value.dtype)
            arrays[f"{table.path}.B.weight"] = basis.to(value.dtype).contiguous()
    if tables and not found and options.rank is not None:
        raise UsageError(
            f"rank {options.rank} saves parameters in no table",
            reason="; ".join(f"{each.node}: {each.reason}" for each in declined[:3]),
            hint=f"give at most {max(_break_even(table) for table in tables)}",
        )
    return EmbeddingDecision(
        tables=tuple(found), declined=declined, arrays=dict(arrays), pending=tuple(pending)
    )


def _take(
    table: Table, rank: int, found: list[Table], declined: tuple[Declined, ...]
) -> tuple[list[Table], tuple[Declined, ...]]:
    """Add a table at a rank to those found, or decline it where nothing is saved."""
    if rank <= _break_even(table):
        return [*found, table.model_copy(update={"rank": rank})], declined
    reason = f"rank {rank} saves none of its {table.rows * table.width:,} weights"
    return found, (*declined, *(Declined(node=node, reason=reason) for node in table.nodes))


def _break_even(table: Table) -> int:
    """Return the largest rank that saves parameters; a tied output layer needs B twice."""
    parts = table.rows + table.width * (1 + bool(table.heads))
    return (table.rows * table.width - 1) // parts


@torch.no_grad()
def _principal(table: Table, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the right singular vectors `[width, width]` and their energies, largest first.

    Raises:
        NumericsError: The table holds a NaN or an infinity.
    """
    if not bool(value.isfinite().all()):
        raise NumericsError(
            f"a NaN or an infinity in {table.tensor}", hint="check the weights", where=table.tensor
        )
    rows = value.double().cpu()
    energies, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors.flip(1), energies.flip(0).clamp_min(0)
