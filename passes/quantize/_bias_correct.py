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
from fxcompress.nn import FakeQuantize
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes._layers.frontier import Frontier
from passes._layers.operands import canonical
from passes._layers.stream import stream
from passes.quantize._masked import unmasked
from passes.quantize._rules import CONVOLUTIONS, LAYERS
from passes.quantize._scaling.entries import Shifted
from passes.quantize._scaling.layers import readers_of
from passes.quantize._scaling.moments import Moments
from passes.quantize.bias_correct import BiasCorrectDecision, Corrected

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize.bias_correct import BiasCorrectOptions

__all__ = ["decide", "without_quantizers"]

_QUANTIZERS: Final = frozenset({"fake_quant", "dynamic_quant", "float_quant"})
# As quantize.static: room for the sum of products in an int32 accumulator beside the bias.
_BIAS_LIMIT: Final = 2.0**30
# A shift below this part of the output's deviation is rounding.
_NOTHING: Final = 1e-6
# A weight that differs by more than this part of its norm is another one, not a rounded one.
_ROUNDED: Final = 0.7


@dataclass(frozen=True)
class _Target:
    """A quantised layer: its bias, and how large that may become.

    Attributes:
        node: The layer, in the quantised program.
        id: Its id.
        bias: Name of its bias.
        new: It has none yet.
        channels: How many outputs it has.
        dim: Dimension of activations with them, from the end.
        limit: The largest |bias|, `[channels]` or one for all; None where nothing limits it.
    """

    node: fx.Node
    id: str
    bias: str
    new: bool
    channels: int
    dim: int
    limit: Tensor | None


@torch.no_grad()
def decide(program: Program, options: BiasCorrectOptions, context: Context) -> BiasCorrectDecision:
    """Return the decision of `quantize.bias_correct`."""
    ids = node_ids(program)
    targets, declined = _targets(program, options, ids)
    if not targets:
        left = [each for each in declined if each.reason != "it is not selected"]
        raise UsageError(
            "there is no quantised layer whose bias could be corrected",
            reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3])
            or "the model has no convolution and no linear layer",
            hint="run quantize.bias_correct after the pass that quantises",
        )
    entries = {each.id: _shifted(each) for each in targets}
    if context.planning or any(value.is_meta for value in program.state().values()):
        when = f"known after calibration ({options.calibration} samples)"
        return BiasCorrectDecision(
            layers=tuple(Corrected(layer=each.id) for each in targets),
            shifted=tuple(entries.values()),
            declined=tuple(declined),
            pending=tuple(f"{each.bias}: shift {when}" for each in targets),
        )
    found = _Run(program, options, context, targets, declined)
    shifts = found.sequential() if options.sequential else found.apart()
    layers, shifted, arrays = [], [], {}
    for each in targets:
        if each.id not in shifts:
            continue
        shift, limited = shifts[each.id]
        layers.append(
            Corrected(
                layer=each.id,
                shift=float(shift.abs().mean()),
                largest=float(shift.abs().max()),
                limited=limited,
            )
        )
        shifted.append(entries[each.id])
        arrays[entries[each.id].key] = shift.float()
    return BiasCorrectDecision(
        layers=tuple(layers), shifted=tuple(shifted), declined=tuple(declined), arrays=arrays
    )


def without_quantizers(program: Program) -> Program:
    """Return a copy whose quantizers are bypassed: the float model that they were put into."""
    rewriter = GraphRewriter(program)
    for node in list(rewriter.program.nodes):
        if op_name(node) in _QUANTIZERS:
            rewriter.replace_uses(node, node.all_input_nodes[0])
            rewriter.remove(node)
    return rewriter.finish()


def _shifted(target: _Target) -> Shifted:
    return Shifted(tensor=target.bias, channels=target.channels, new=target.new)


def _targets(
    program: Program, options: BiasCorrectOptions, ids: Mapping[fx.Node, str]
) -> tuple[list[_Target], list[Declined]]:
    candidates = [node for node in program.nodes if op_name(node) in LAYERS]
    selected = set(Selector.of(options).select(program, candidates)) if candidates else set()
    readers = readers_of(program)
    targets, declined = [], []
    for node in candidates:
        reason = _obstacle(program, node, readers) if node in selected else "it is not selected"
        if reason is None:
            targets.append(_target(program, node, ids[node]))
        else:
            declined.append(Declined(node=ids[node], reason=reason))
    return targets, declined


def _obstacle(program: Program, node: fx.Node, readers: Mapping[str, list[fx.Node]]) -> str | None:
    weight = bind(node).get("weight")
    if not isinstance(weight, fx.Node) or op_name(weight) not in _QUANTIZERS:
        return "its weight is not quantised"
    if node.op != "call_module":
        return "it is a function call, whose bias is an operand"
    calls = list(node.graph.find_nodes(op="call_module", target=str(node.target)))
    if len(calls) > 1:
        return f"its module is called {len(calls)} times, with one bias"
    if getattr(module_of(node), "bias", None) is not None:
        bias = canonical(program, f"{node.target}.bias")
        if readers.get(bias) != [node]:
            return f"its bias {bias} is read elsewhere, too"
    return None


def _target(program: Program, node: fx.Node, name: str) -> _Target:
    module: Any = module_of(node)
    own = f"{node.target}.bias"
    op = op_name(node)
    channels = module.out_channels if op in CONVOLUTIONS else module.out_features
    return _Target(
        node=node,
        id=name,
        bias=own if module.bias is None else canonical(program, own),
        new=module.bias is None,
        channels=int(channels),
        dim=-1 - int(op[-2]) if op in CONVOLUTIONS else -1,
        limit=_limit(node),
    )


def _limit(node: fx.Node) -> Tensor | None:
    """Return s_x·s_w·2^30, where the layer reads an activation with a fixed scale."""
    bound = bind(node)
    read, weight = bound["input"], bound["weight"]
    fakes = [module_of(each) for each in (read, weight) if op_name(each) == "fake_quant"]
    if len(fakes) != 2:
        return None
    x, w = fakes
    if not (isinstance(x, FakeQuantize) and isinstance(w, FakeQuantize)) or w.scale.dim() > 1:
        return None
    return x.scale.detach().double() * w.scale.detach().double() * _BIAS_LIMIT


class _Run:
    def __init__(
        self,
        program: Program,
        options: BiasCorrectOptions,
        context: Context,
        targets: list[_Target],
        declined: list[Declined],
    ) -> None:
        self.program, self.options, self.context = program, options, context
        self.targets, self.declined = targets, declined
        self.state = program.state()

    def sequential(self) -> dict[str, tuple[Tensor, int]]:
        """Return shifts by layer, each measured after those before it."""
        private = self.program.copy()
        mine = dict(zip(self.program.nodes, private.nodes, strict=True))
        reference = self._reference()
        theirs = {name: node for node, name in node_ids(reference).items()}
        there = Frontier(reference, self._batches())
        here = Frontier(private, self._batches())
        found: dict[str, tuple[Tensor, int]] = {}
        for done, target in enumerate(self._comparable(theirs), 1):
            self.context.progress("correcting biases", done, len(self.targets))
            there.run_to(theirs[target.id])
            here.run_to(mine[target.node])
            wanted, got = Moments(target.id, target.dim), Moments(target.id, target.dim)
            for index in range(len(here.values)):
                wanted.update(there.result(index))
                got.update(here.result(index))
            shift = wanted.mean - got.mean
            if self._differs(target, shift, wanted.deviation):
                found[target.id], bias = self._within(target, shift)
                here.set_tensor(target.bias, bias)
        return found

    def apart(self) -> dict[str, tuple[Tensor, int]]:
        """Return shifts by layer, each by its own weight on the inputs that it has."""
        private = self.program.copy()
        mine = dict(zip(self.program.nodes, private.nodes, strict=True))
        by_node = {mine[target.node]: target for target in self.targets}
        state = self._reference().state() if self.options.reference == "original" else self.state
        moments = {
            target.id: [Moments(target.id, target.dim) for _ in range(2)] for target in self.targets
        }

        def see(node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
            bound, layer = bind(node), module_of(node)
            weight = env[bound["weight"]]
            source = unmasked(bound["weight"].all_input_nodes[0])
            real = state[canonical(self.program, str(source.target))]
            exact, rounded = moments[by_node[node].id]
            exact.update(layer(env[bound["input"]], real))
            rounded.update(layer(env[bound["input"]], weight))

        stream(private, self._batches(), by_node, see)
        found = {}
        for target in self.targets:
            exact, rounded = moments[target.id]
            shift = exact.mean - rounded.mean
            if self._differs(target, shift, exact.deviation):
                found[target.id], _ = self._within(target, shift)
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

    def _comparable(self, theirs: Mapping[str, fx.Node]) -> Iterator[_Target]:
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

    def _same(self, target: _Target) -> bool:
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

    def _differs(self, target: _Target, shift: Tensor, deviation: Tensor) -> bool:
        spread = float(deviation.square().mean().sqrt())
        if float(shift.abs().max()) <= _NOTHING * max(spread, 1e-30):
            more = ""
            if self.options.reference == "bypass" and self._on_grid(target):
                more = ": its weight is what its integers stand for; set `reference: original`"
            self._decline(target, f"its mean is not shifted{more}")
            return False
        return True

    def _on_grid(self, target: _Target) -> bool:
        quantizer = bind(target.node)["weight"]
        source = quantizer.all_input_nodes[0]
        if source.op != "get_attr":
            return False
        value = self.state[canonical(self.program, str(source.target))]
        return bool(torch.equal(module_of(quantizer)(value), value))

    def _within(self, target: _Target, shift: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        """Return the shift that keeps the bias in its limit with how many are cut, and the bias."""
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

    def _decline(self, target: _Target, reason: str) -> None:
        self.declined.append(Declined(node=target.id, reason=reason))
