"""GraphRewriter: the only thing that changes a Program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxcompress.ir.program import Program
from fxcompress.ir.walk import upstream
from fxcompress.rewrite._finish import finish, propagate_changes
from fxcompress.rewrite._modules import place
from fxcompress.rewrite._reader import Reader
from fxcompress.rewrite.edits import Declined, Edit

__all__ = ["GraphRewriter"]

Scope = tuple[tuple[str, str], ...]


class GraphRewriter(Reader):
    """Change a copy of a Program, and know exactly what was changed.

    The Program given is never written: modules are copied when they are first changed, tensors are
    replaced and never written in place. `finish` returns the new Program; `edits` is what then
    differs, derived by comparing the two, and a difference that no method here made is an error.

    Ids are those of `fxcompress.ir.node_ids`; a node keeps the id it had in the Program given for
    as long as the rewriter works, so that decisions can name nodes. What is added goes to the
    device of the Program.

    Args:
        program: What to start from.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.touched_nodes: set[fx.Node] = set()
        self.touched_modules: set[str] = set()
        self.touched_tensors: set[str] = set()
        self.untied: set[str] = set()
        self._declined: list[Declined] = []
        self._edits: tuple[Edit, ...] | None = None

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What was changed. Known after `finish`."""
        if self._edits is None:
            self._fail("the edits are known after finish()")
        return self._edits

    @property
    def declined(self) -> tuple[Declined, ...]:
        """What was left as it was, with reasons."""
        return tuple(self._declined)

    # -- nodes -------------------------------------------------------------------------------

    def call_module(
        self,
        path: str,
        module: nn.Module | None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        after: fx.Node | None = None,
        before: fx.Node | None = None,
        scope: Scope | None = None,
    ) -> fx.Node:
        """Add a call of a module; `module=None` calls the one that is there already.

        Raises:
            PassError: The path is taken, or with `module=None` there is none.
        """
        if module is None:
            self.get_module(path)
        elif self.tree.find(path) is not None or self.tree.tensor(path) is not None:
            self._fail(f"{path} is taken", hint=f"use rewriter.fresh_path({path!r})")
        else:
            self._put(path, module)
        return self._insert("call_module", path, args, kwargs, after, before, scope)

    def call_function(
        self,
        target: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        after: fx.Node | None = None,
        before: fx.Node | None = None,
        scope: Scope | None = None,
    ) -> fx.Node:
        """Add a call of a function, in its canonical spelling."""
        return self._insert("call_function", target, args, kwargs, after, before, scope)

    def call_method(
        self,
        target: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        after: fx.Node | None = None,
        before: fx.Node | None = None,
        scope: Scope | None = None,
    ) -> fx.Node:
        """Add a call of a tensor method; `args[0]` is the tensor."""
        return self._insert("call_method", target, args, kwargs, after, before, scope)

    def get_attr(
        self,
        name: str,
        *,
        after: fx.Node | None = None,
        before: fx.Node | None = None,
        scope: Scope | None = None,
    ) -> fx.Node:
        """Add a node that reads a parameter or buffer."""
        self.get_tensor(name)
        return self._insert("get_attr", name, (), None, after, before, scope)

    def replace_uses(
        self, old: fx.Node, new: fx.Node, *, only: Callable[[fx.Node], bool] | None = None
    ) -> tuple[fx.Node, ...]:
        """Let the users of `old` use `new`, and return them.

        What `new` itself is computed from keeps `old`, so a node inserted after another may take
        all its users.

        Raises:
            PassError: A user comes before `new` in the graph.
        """
        before = upstream(new)
        users = [
            user
            for user in old.users
            if user is not new and user not in before and (only is None or only(user))
        ]
        for user in users:
            if user < new:
                self._fail(
                    f"{self.id(user)} cannot use {self.id(new)}",
                    reason="it comes before it in the graph",
                    where=self.id(old),
                )
            user.replace_input_with(old, new)
        self.touched_nodes.update(users)
        return tuple(users)

    def set_args(
        self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Give a node other operands; `kwargs=None` keeps its keyword arguments."""
        self._open()
        node.args = tuple(args)
        if kwargs is not None:
            node.kwargs = dict(kwargs)
        self.touched_nodes.add(node)

    def remove(self, node: fx.Node) -> None:
        """Remove a node that nothing uses any more.

        Raises:
            PassError: It has users, or is an input or the output.
        """
        self._open()
        if node.op in ("placeholder", "output"):
            self._fail(f"{self.id(node)} is part of the signature and cannot be removed")
        if node.users:
            users = ", ".join(self.id(user) for user in node.users)
            self._fail(f"{self.id(node)} cannot be removed", reason=f"{users} use it")
        self.graph.erase_node(node)

    # -- modules and tensors -------------------------------------------------------------------

    def set_module(self, path: str, module: nn.Module) -> None:
        """Put another module under an existing name; every call of it is affected."""
        self._open()
        self.get_module(path)
        self._put(path, module)

    def set_tensor(self, name: str, tensor: torch.Tensor, *, tied: bool = False) -> None:
        """Give a parameter or buffer another value; shape and dtype may change.

        A parameter stays one and keeps `requires_grad` where its dtype allows.

        Args:
            name: The qualified name.
            tensor: The new value.
            tied: Give it to every name of a tied tensor. Without it, setting one of several tied
                names is an error at `finish`, unless all are set or `untie` was called.
        """
        self._open()
        current = self.tree.tensor(name)
        if current is None:
            self._fail(f"there is no parameter or buffer {name}", hint="use add_tensor")
        value = tensor.detach().to(current.device)
        if isinstance(current, nn.Parameter):
            value = _parameter(value, trainable=current.requires_grad)
        for each in self.tied(name) if tied else (name,):
            self.tree.set_tensor(each, value)
        # One module object may stand under several names.
        same = {each for each in self.tied(name) if self.tree.tensor(each) is value}
        self.touched_tensors.update({name, *same})

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Freeze or thaw a parameter, under all its names; its value stays the same memory.

        Raises:
            PassError: There is no parameter of that name, or it holds integers.
        """
        self._open()
        current = self.tree.tensor(name)
        if not isinstance(current, nn.Parameter):
            self._fail(f"there is no parameter {name}")
        if current.requires_grad == trainable:
            return
        value = _parameter(current.detach(), trainable=trainable)
        if value.requires_grad != trainable:
            self._fail(f"{name} cannot be trained", reason=f"it holds {current.dtype}")
        for each in self.tied(name):
            if self.tree.tensor(each) is current:
                self.tree.set_tensor(each, value)
                self.touched_tensors.add(each)

    def add_tensor(self, name: str, tensor: torch.Tensor, *, trainable: bool) -> None:
        """Add a parameter (`trainable`) or a persistent buffer.

        Raises:
            PassError: The name is taken.
        """
        self._open()
        if self.tree.tensor(name) is not None or self.tree.find(name) is not None:
            self._fail(f"{name} is taken", hint="use set_tensor")
        value = tensor.detach().to(self.device)
        self.tree.add_tensor(name, _parameter(value, trainable=True) if trainable else value)
        self.touched_tensors.add(name)

    def remove_tensor(self, name: str) -> None:
        """Remove a parameter or buffer; a leaf module's `bias` becomes None."""
        self._open()
        self.get_tensor(name)
        self.tree.delete_tensor(name)
        gone = {each for each in self.tied(name) if self.tree.tensor(each) is None}
        self.touched_tensors.update({name, *gone})

    def untie(self, name: str) -> None:
        """Declare that `name` no longer shares the tensor of its other names."""
        self._open()
        self.untied.add(name)

    def limit(self, dim: str, maximum: int) -> None:
        """Lower the largest value that a dynamic size of the inputs may have.

        Raises:
            PassError: There is no such size, or its example is larger.
        """
        self._open()
        known = self._program.dims.get(dim)
        if known is None or known.example > maximum:
            self._fail(f"the size {dim} cannot be limited to {maximum}")
        if known.maximum is None or known.maximum > maximum:
            dims = {**self._program.dims, dim: replace(known, maximum=maximum)}
            self._program = replace(self._program, dims=dims)

    # -- outcome -------------------------------------------------------------------------------

    def decline(
        self, node: fx.Node | str, reason: str, nodes: Iterable[fx.Node | str] = ()
    ) -> None:
        """Record that something was left as it was, why, and the nodes that explain it."""
        names = [each if isinstance(each, str) else self.id(each) for each in (node, *nodes)]
        self._declined.append(Declined(node=names[0], reason=reason, because_of=tuple(names[1:])))

    def propagate(self) -> None:
        """Compute the types of what was changed so far, for a rewrite that reads its own nodes."""
        propagate_changes(self)

    def finish(self) -> Program:
        """Clean up, recompute types, check, and return the new Program.

        Raises:
            PassError: Something changed that no method here changed, or a tie was broken.
            VerifyError: The types cannot be computed: operands do not fit.
        """
        self._open()
        self._program, self._edits = finish(self)
        return self._program

    def _insert(
        self,
        op: str,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        after: fx.Node | None,
        before: fx.Node | None,
        scope: Scope | None,
    ) -> fx.Node:
        self._open()
        anchor = after if after is not None else before
        if anchor is None or (after is not None and before is not None):
            self._fail(f"{target}: say either after= or before= which node it goes")
        if after is not None and after.op == "placeholder":
            # Every placeholder comes first in a graph.
            place = self.graph.inserting_before(_first_after_placeholders(self.graph))
        elif after is not None:
            place = self.graph.inserting_after(after)
        else:
            place = self.graph.inserting_before(anchor)
        with place:
            node = self.graph.create_node(op, target, tuple(args), dict(kwargs or {}))
        node.meta["scope"] = anchor.meta.get("scope", ()) if scope is None else scope
        node.meta["source"] = anchor.meta.get("source")
        self.touched_nodes.add(node)
        return node

    def _put(self, path: str, module: nn.Module) -> None:
        self.tree.set(path, place(module, self.device).train(self.module.training))
        self.touched_modules.add(path)

    def _open(self) -> None:
        if self._edits is not None:
            self._fail("this rewriter has finished", hint="start another GraphRewriter")


def _first_after_placeholders(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(node for node in graph.nodes if node.op != "placeholder")
    return first


def _parameter(value: torch.Tensor, *, trainable: bool) -> nn.Parameter:
    floating = value.is_floating_point() or value.is_complex()
    return nn.Parameter(value, requires_grad=trainable and floating)
