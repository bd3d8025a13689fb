"""What a rewrite did, as typed, serialisable records."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AddNode",
    "AddTensor",
    "ChangeNode",
    "Declined",
    "Edit",
    "RemoveNode",
    "RemoveTensor",
    "SetModule",
    "SetTensor",
    "SetTrainable",
]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AddNode(_Record):
    """A node was added: its id, op, non-default attributes as text, and result type."""

    kind: Literal["add-node"] = "add-node"
    node: str
    op: str
    attributes: str = ""
    type: str = ""


class RemoveNode(_Record):
    """A node was removed."""

    kind: Literal["remove-node"] = "remove-node"
    node: str
    op: str
    type: str = ""


class ChangeNode(_Record):
    """A node's operands, attributes or result type changed."""

    kind: Literal["change-node"] = "change-node"
    node: str
    before: str
    after: str


class SetModule(_Record):
    """A leaf module was replaced under its name (`before`/`after`: op and attributes)."""

    kind: Literal["set-module"] = "set-module"
    path: str
    before: str
    after: str


class AddTensor(_Record):
    """A parameter or buffer was added (`type` like `f32[64,3,7,7]`)."""

    kind: Literal["add-tensor"] = "add-tensor"
    name: str
    type: str
    trainable: bool


class SetTensor(_Record):
    """A parameter or buffer got another value, and possibly another shape or dtype."""

    kind: Literal["set-tensor"] = "set-tensor"
    name: str
    before: str
    after: str


class SetTrainable(_Record):
    """A parameter with the same value was frozen, or thawed (`trainable`)."""

    kind: Literal["set-trainable"] = "set-trainable"
    name: str
    trainable: bool


class RemoveTensor(_Record):
    """A parameter or buffer was removed."""

    kind: Literal["remove-tensor"] = "remove-tensor"
    name: str
    type: str


Edit = Annotated[
    AddNode
    | RemoveNode
    | ChangeNode
    | SetModule
    | AddTensor
    | SetTensor
    | SetTrainable
    | RemoveTensor,
    Field(discriminator="kind"),
]


class Declined(_Record):
    """Something a pass left as it was: which node, why, and the nodes that explain it."""

    node: str
    reason: str
    because_of: tuple[str, ...] = ()
