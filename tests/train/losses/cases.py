"""One case per loss and form: what it reads, and which of its dims are tokens."""

from dataclasses import dataclass, replace

import torch

from fxcompress.train.losses import Outcome
from tests.train.losses.outcomes import normal


@dataclass(frozen=True)
class Case:
    """A loss on a model's tensor and a teacher's.

    `ours` and `theirs` are the shapes of one sample. `kind`: labels, numbers, tokens, segments (of
    targets), logits or taps. `tokens`: the dims, batch counted, that padding makes longer. `zero`:
    whether the loss of equal tensors is 0. `chances`: whether the last dim holds probabilities.
    """

    options: dict
    ours: tuple
    kind: str
    theirs: tuple = ()
    tokens: tuple = ()
    zero: bool = False
    chances: bool = False

    @property
    def name(self):
        return "-".join(str(value) for value in self.options.values())

    @property
    def equal(self):
        """The same loss where both sides have one shape."""
        return replace(self, theirs=self.ours)

    def tensors(self, seed, samples):
        found = (
            normal(seed, samples, *self.ours),
            normal(seed + 1, samples, *(self.theirs or self.ours)),
        )
        return tuple(x.softmax(-1) for x in found) if self.chances else found

    def labels(self, seed, samples):
        """Targets that fit; None for what reads the teacher alone."""
        draw = torch.Generator().manual_seed(seed)
        if self.kind == "numbers":
            return normal(seed + 2, samples, *self.ours)
        if self.kind == "labels":
            return torch.randint(0, self.ours[-1], (samples,), generator=draw)
        if self.kind in ("tokens", "segments"):
            return torch.randint(0, self.ours[-1], (samples, self.ours[0]), generator=draw)
        return None

    def outcome(self, ours, theirs, labels=None, mask=None):
        batch = {} if mask is None else {"attention_mask": mask}
        batch["x"] = ours
        target = labels
        if self.kind == "segments":
            places = torch.arange(labels.shape[1])
            target = {"labels": labels, "segments": (1 + places % 2).expand_as(labels)}
        if self.kind == "taps":
            side = (ours, theirs)
            ours, theirs = ({"a": x, "b": 1 + x / 2} if self.options["use"] == "fsp" else {"a": x}
                            for x in side)  # fmt: skip
            return Outcome(None, None, batch, target, ours, theirs, ours)
        return Outcome(ours, theirs, batch, target)


def soft(use, **options):
    return [
        Case({"use": use, **options}, (7,), "logits", zero=True),
        Case({"use": use, **options, "shift": True}, (5, 7), "logits", tokens=(1,), zero=True),
    ]


HIDDEN, MAPS = (5, 4), (3, 4, 4)

# Losses on taps that have no counterpart in a teacher: they have tests of their own.
ALONE = frozenset({"exits", "load_balance", "router_z", "routing"})

CASES = [
    Case({"use": "hard_labels", "smoothing": 0.1}, (7,), "labels"),
    Case({"use": "next_token"}, (5, 7), "tokens", tokens=(1,)),
    Case({"use": "sequence_level"}, (5, 7), "tokens", tokens=(1,)),
    Case({"use": "sequence_level", "mean": "sequences"}, (5, 7), "tokens", tokens=(1,)),
    Case({"use": "step_by_step", "alpha": 0.3}, (5, 7), "segments", tokens=(1,)),
    *soft("soft_labels"),
    Case({"use": "soft_labels", "top_k": 3}, (7,), "logits"),
    *soft("reverse_kl", temperature=2.0),
    *soft("jensen_shannon", beta=0.3),
    *soft("ctkd"),
    *soft("dist"),
    Case({"use": "ranking", "margin": 0.0}, (7,), "logits", zero=True),
    Case({"use": "ranking", "form": "listwise"}, (7,), "logits"),
    Case({"use": "mse"}, (3,), "numbers"),
    Case({"use": "mse", "against": "teacher"}, (3,), "logits", zero=True),
    Case({"use": "features"}, HIDDEN, "taps", tokens=(1,), zero=True),
    Case({"use": "features", "distance": "cosine"}, HIDDEN, "taps", tokens=(1,), zero=True),
    Case({"use": "features", "distance": "smooth_l1"}, MAPS, "taps", zero=True),
    Case({"use": "features", "distance": "cosine", "taps": ["a"]}, (2, 5, 3), "taps", tokens=(2,),
         zero=True),
    Case({"use": "features", "normalize": True}, (4,), "taps", zero=True),
    Case({"use": "attention_transfer"}, MAPS, "taps", (5, 4, 4), zero=True),
    Case({"use": "attention_transfer", "form": "code"}, HIDDEN, "taps", (5, 6), (1,), zero=True),
    Case({"use": "attention_transfer", "power": 3.0}, HIDDEN, "taps", (5, 6), (1,), zero=True),
    Case({"use": "attention_kl"}, (2, 5, 5), "taps", (2, 5, 5), (2, 3), zero=True, chances=True),
    Case({"use": "attention_kl", "heads": "mean"}, (2, 5, 5), "taps", (3, 5, 5), (2, 3), zero=True,
         chances=True),
    Case({"use": "minilm", "heads": 2}, HIDDEN, "taps", (5, 6), (1,), zero=True),
    Case({"use": "minilm"}, (2, 5, 3), "taps", (2, 5, 4), (2,), zero=True),
    Case({"use": "fsp"}, MAPS, "taps", zero=True),
    Case({"use": "fsp", "taps": ["a", "b"]}, HIDDEN, "taps", tokens=(1,), zero=True),
    Case({"use": "rkd"}, MAPS, "taps", (9,), zero=True),
    Case({"use": "rkd", "angle": 0.0}, HIDDEN, "taps", (5, 6), (1,), zero=True),
    Case({"use": "rkd", "taps": ["a"]}, (2, 5, 3), "taps", (3, 5, 4), (2,), zero=True),
    Case({"use": "similarity_preserving"}, HIDDEN, "taps", (5, 6), (1,), zero=True),
    Case({"use": "cka"}, HIDDEN, "taps", (5, 6), (1,), zero=True),
    Case({"use": "crd", "dim": 5}, HIDDEN, "taps", (5, 6), (1,)),
]  # fmt: skip
