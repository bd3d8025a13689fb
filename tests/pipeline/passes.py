"""Passes that do one thing each, well or badly, to test what runs them."""

import torch
from torch import nn

from fxcompress.errors import PassError
from fxcompress.pipeline import Decision, Options, Pass, Step


class Amount(Options):
    amount: float = 0.01
    split: str = "calibration"


class Names(Decision):
    names: tuple[str, ...] = ()
    peak: float = 0.0


class Identity(Pass[Amount, Names]):
    """Insert an identity after every ReLU: exact."""

    Options, Decision, preserves = Amount, Names, "exact"

    def decide(self, program, options, context):
        names = [n.target for n in program.graph.find_nodes(op="call_module")]
        return Names(names=tuple(n for n in names if n.startswith("relu")))

    def rewrite(self, rewriter, decision):
        for name in decision.names:
            node = rewriter.node(name)
            path = rewriter.fresh_path(f"{name}_same")
            rewriter.replace_uses(
                node, rewriter.call_module(path, nn.Identity(), (node,), after=node)
            )


class Noise(Pass[Amount, Names]):
    """Add seeded noise to the weights of conv1; the noise is the decision's array."""

    Options, Decision, preserves = Amount, Names, "approximate"
    target = "conv1.weight"

    def decide(self, program, options, context):
        noise = torch.randn(program.state()[self.target].shape) * options.amount
        return Names(names=(self.target,), arrays={"noise": noise})

    def rewrite(self, rewriter, decision):
        weight = rewriter.get_tensor(self.target)
        rewriter.set_tensor(self.target, weight + decision.arrays["noise"])


class HeadNoise(Noise):
    """The same on the head, so that another tensor changes."""

    target = "fc.weight"


class Calibrate(Pass[Amount, Names]):
    """Clip conv2's weights to the largest calibration input; pending without running."""

    Options, Decision, preserves = Amount, Names, "approximate"
    needs = frozenset({"calibration"})

    def decide(self, program, options, context):
        if context.planning:
            return Names(pending=("peak: known after calibration",))
        batches = context.samples(options.split, 6)
        return Names(peak=max(float(batch[0].abs().max()) for batch in batches))

    def rewrite(self, rewriter, decision):
        weight = rewriter.get_tensor("conv2.weight")
        rewriter.set_tensor("conv2.weight", weight * (1 + decision.peak))


class Train(Pass[Amount, Names]):
    """Change the values of the head only: trained."""

    Options, Decision, preserves = Amount, Names, "trained"

    def decide(self, program, options, context):
        return Names(names=("fc.bias",))

    def rewrite(self, rewriter, decision):
        rewriter.set_tensor("fc.bias", rewriter.get_tensor("fc.bias") + 1)


class TrainMore(Train):
    """Say `trained` and change the structure."""

    def rewrite(self, rewriter, decision):
        rewriter.set_module("fc", nn.Linear(8, 10, bias=False))


class LyingExact(Noise):
    """Say `exact` and change the numbers."""

    preserves = "exact"


class InPlace(Identity):
    """Write a tensor of the Program it was given."""

    def decide(self, program, options, context):
        with torch.no_grad():
            program.state()["conv2.weight"].mul_(1.5)
        return super().decide(program, options, context)


class NotANumber(Noise):
    """Put a NaN into the weights."""

    def decide(self, program, options, context):
        noise = torch.zeros(program.state()[self.target].shape)
        noise[0, 0, 0, 0] = float("nan")
        return Names(arrays={"noise": noise})


class Overflow(Pass[Amount, Names]):
    """Make an activation infinite with finite weights."""

    Options, Decision, preserves = Amount, Names, "approximate"

    def decide(self, program, options, context):
        return Names()

    def rewrite(self, rewriter, decision):
        rewriter.set_tensor("conv2.bias", torch.full((8,), 3e38))
        rewriter.set_tensor("fc.weight", torch.full((10, 8), 3e38))


class Nothing(Identity):
    """Decline everything."""

    def rewrite(self, rewriter, decision):
        rewriter.decline("conv1", "its output is too narrow")


class Crash(Identity):
    """Raise something that is no error for a person."""

    def rewrite(self, rewriter, decision):
        raise ZeroDivisionError("by accident")


class Broken(Identity):
    """Break its own promise."""

    def ensures(self, before, after, decision):
        raise PassError("the promise is broken", where="relu")


class WrongDecision(Identity):
    """Return something else than a decision of its own."""

    def decide(self, program, options, context):
        return Decision()


def step(pass_class, id_=None, where="", **options):
    name = pass_class.__name__.lower()
    return Step(id_ or name, f"test.{name}", pass_class(), pass_class.Options(**options), where)
