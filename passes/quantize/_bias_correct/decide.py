"""The decision of `quantize.bias_correct`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes._layers.frontier import Frontier
from passes._layers.operands import canonical
from passes._layers.stream import stream
from passes.quantize._bias_correct.difference import Difference
from passes.quantize._bias_correct.targets import QUANTIZERS, Target, find_targets
from passes.quantize._masked import unmasked
from passes.quantize._scaling.moments import Moments
from passes.quantize.bias_correct import BiasCorrectDecision, Corrected

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize.bias_correct import BiasCorrectOptions

__all__ = ["decide", "without_quantizers"]

# A shift below this part of the output's deviation is rounding.
_NOTHING: Final = 1e-6
# A weight that differs by more than this part of its norm is another one, not a rounded one.
_ROUNDED: Final = 0.7


@torch.no_grad()
def decide(program: Program, options: BiasCorrectOptions, context: Context) -> BiasCorrectDecision:
    """Return the decision of `quantize.bias_correct`."""
    ids = node_ids(program)
    targets, declined = find_targets(program, options, ids)
    if not targets:
        left = [each for each in declined if each.reason != "it is not selected"]
        raise UsageError(
            "there is no quantised layer whose bias could be corrected",
            reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3])
            or "the model has no convolution and no linear layer",
            hint="run quantize.bias_correct after the pass that quantises",
        )
    entries = {each.id: each.entry for each in targets}
    if context.planning or any(value.is_meta for value in program.state().values()):
        when = f"known after calibration ({options.calibration} samples)"
        return BiasCorrectDecision(
            layers=tuple(Corrected(layer=each.id) for each in targets),
            shifted=tuple(entries.values()),
            declined=tuple(declined),
            pending=tuple(f"{each.bias}: shift {when}" for each in targets),
        )
    run = _Run(program, options, context, targets, declined)
    shifts = run.sequential() if options.sequential else run.apart()
    layers, shifted, arrays = [], [], {}
    for each in targets:
        if each.id not in shifts:
            continue
        found = shifts[each.id]
        layers.append(
            Corrected(
                layer=each.id,
                shift=float(found.value.abs().mean()),
                largest=float(found.value.abs().max()),
                limited=found.limited,
                partly=found.partly,
            )
        )
        shifted.append(entries[each.id])
        arrays[entries[each.id].key] = found.value.float()
    return BiasCorrectDecision(
        layers=tuple(layers), shifted=tuple(shifted), declined=tuple(declined), arrays=arrays
    )


def without_quantizers(program: Program) -> Program:
    """Return a copy whose quantizers are bypassed: the float model that they were put into."""
    rewriter = GraphRewriter(program)
    for node in list(rewriter.program.nodes):
        if op_name(node) in QUANTIZERS:
            rewriter.replace_uses(node, node.all_input_nodes[0])
            rewriter.remove(node)
    return rewriter.finish()


def _real(batch: Any) -> Tensor | None:
    """Return which places of a batch are no padding, `[batch, places]`, where it says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


@dataclass(frozen=True)
class Shift:
    """What a bias changes by, `[channels]`, channels at the limit, and if places are left out."""

    value: Tensor
    limited: int
    partly: bool = False


class _Run:
    def __init__(
        self,
        program: Program,
        options: BiasCorrectOptions,
        context: Context,
        targets: list[Target],
        declined: list[Declined],
    ) -> None:
        self.program, self.options, self.context = program, options, context
        self.targets, self.declined = targets, declined
        self.state = program.state()

    def sequential(self) -> dict[str, Shift]:
        """Return shifts by layer, each measured after those before it."""
        private = self.program.copy()
        mine = dict(zip(self.program.nodes, private.nodes, strict=True))
        reference = self._reference()
        theirs = {name: node for node, name in node_ids(reference).items()}
        batches = list(self._batches())
        real = [_real(batch) for batch in batches]
        there, here = Frontier(reference, batches), Frontier(private, batches)
        found: dict[str, Shift] = {}
        for done, target in enumerate(self._comparable(theirs), 1):
            self.context.progress("correcting biases", done, len(self.targets))
            there.run_to(theirs[target.id])
            here.run_to(mine[target.node])
            difference = Difference(target.id, target.dim)
            for index, mask in enumerate(real):
                difference.update(there.result(index), here.result(index), mask)
            shift, partly = difference.shift()
            if self._differs(target, shift, difference.wanted.deviation):
                (moved, cut), bias = self._within(target, shift)
                found[target.id] = Shift(moved, cut, partly)
                here.set_tensor(target.bias, bias)
        return found

    def apart(self) -> dict[str, Shift]:
        """Return shifts by layer, each by its own weight on the inputs that it has."""
        private = self.program.copy()
        mine = dict(zip(self.program.nodes, private.nodes, strict=True))
        by_node = {mine[target.node]: target for target in self.targets}
        state = self._reference().state() if self.options.reference == "original" else self.state
        moments = {
            target.id: [Moments(target.id, target.dim) for _ in range(2)] for target in self.targets
        }

        mask: Tensor | None = None

        def see(node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
            bound, layer = bind(node), module_of(node)
            weight = env[bound["weight"]]
            source = unmasked(bound["weight"].all_input_nodes[0])
            float_weight = state[canonical(self.program, str(source.target))]
            exact, rounded = moments[by_node[node].id]
            exact.update(layer(env[bound["input"]], float_weight), mask)
            rounded.update(layer(env[bound["input"]], weight), mask)

        for batch in self._batches():
            mask = _real(batch)
            stream(private, [batch], by_node, see)
        found = {}
        for target in self.targets:
            exact, rounded = moments[target.id]
            shift = exact.mean - rounded.mean
            if self._differs(target, shift, exact.deviation):
                (moved, cut), _ = self._within(target, shift)
                found[target.id] = Shift(moved, cut)
        return found

    def _batches(self) -> Iterable[Any]:
        return self.context.samples("calibration", self.options.calibration)

    def _reference(self) -> Program:
        if self.options.reference == "bypass":
            return without_quantizers(self.program)
        if self.context.original is None:
            raise UsageError(
                "there is no original to compare with",
                reason="`reference: original` means the model before the first pass",
                hint="run the pass in a pipeline, or set `reference: bypass`",
            )
        return self.context.original.copy()

    def _comparable(self, theirs: Mapping[str, fx.Node]) -> Iterator[Target]:
        """Yield the targets that the reference has too, with as many outputs."""
        last: fx.Node | None = None
        for target in self.targets:
            other = theirs.get(target.id)
            if other is None or (last is not None and other < last):
                self._decline(target, "the original has no such layer")
                continue
            if self.options.reference == "original" and not self._same(target):
                self._decline(target, "its weight or bias is another one in the original")
                continue
            last = other
            yield target

    def _same(self, target: Target) -> bool:
        """Whether the original's layer has this bias, and this weight before it was rounded."""
        assert self.context.original is not None, "it is the reference"
        theirs, path = self.context.original.state(), str(target.node.target)
        weights = [state.get(f"{path}.weight") for state in (theirs, self.state)]
        biases = [state.get(f"{path}.bias") for state in (theirs, self.state)]
        if any(each is None for each in weights) or (biases[0] is None) != (biases[1] is None):
            return False
        if biases[0] is not None and not torch.equal(biases[0], biases[1]):  # type: ignore[arg-type]
            return False
        before, now = (each.detach().float() for each in weights if each is not None)
        if before.shape != now.shape:
            return False
        return float((now - before).norm()) <= _ROUNDED * float(before.norm())

    def _differs(self, target: Target, shift: Tensor, deviation: Tensor) -> bool:
        spread = float(deviation.square().mean().sqrt())
        if float(shift.abs().max()) <= _NOTHING * max(spread, 1e-30):
            more = ""
            if self.options.reference == "bypass" and self._on_grid(target):
                more = ": its weight is what its integers stand for; set `reference: original`"
            self._decline(target, f"its mean is not shifted{more}")
            return False
        return True

    def _on_grid(self, target: Target) -> bool:
        quantizer = bind(target.node)["weight"]
        source = quantizer.all_input_nodes[0]
        if source.op != "get_attr":
            return False
        value = self.state[canonical(self.program, str(source.target))]
        return bool(torch.equal(module_of(quantizer)(value), value))

    def _within(self, target: Target, shift: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        """Return the shift within the limit, how many channels are cut, and the bias."""
        known = self.state.get(target.bias)
        start = torch.zeros(target.channels) if known is None else known.detach()
        wanted = start.double() + shift
        made = wanted
        if target.limit is not None:
            # What is beyond already, as other passes left it, may stay so.
            limit = torch.maximum(target.limit.expand_as(wanted), start.double().abs())
            made = wanted.clamp(-limit, limit)
        cut = int((made != wanted).sum())
        like = self.state[f"{target.node.target}.weight"] if known is None else start
        return (made - start.double(), cut), made.to(like.dtype)

    def _decline(self, target: Target, reason: str) -> None:
        self.declined.append(Declined(node=target.id, reason=reason))
