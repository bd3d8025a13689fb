"""Programs: capture, canonical ops, types, invariants, text, diff, fingerprints and files."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.ir.capture import capture as capture
    from fxcompress.ir.diff import GraphDiff as GraphDiff
    from fxcompress.ir.diff import Verdict as Verdict
    from fxcompress.ir.diff import diff as diff
    from fxcompress.ir.diff import render_diff as render_diff
    from fxcompress.ir.fingerprint import Fingerprint as Fingerprint
    from fxcompress.ir.fingerprint import fingerprint as fingerprint
    from fxcompress.ir.fingerprint import hash_tensor as hash_tensor
    from fxcompress.ir.modules import ModuleConfig as ModuleConfig
    from fxcompress.ir.modules import describe as describe
    from fxcompress.ir.modules import is_stock as is_stock
    from fxcompress.ir.naming import find_node as find_node
    from fxcompress.ir.naming import node_ids as node_ids
    from fxcompress.ir.naming import scope_of as scope_of
    from fxcompress.ir.ops import Op as Op
    from fxcompress.ir.ops import attributes as attributes
    from fxcompress.ir.ops import bind as bind
    from fxcompress.ir.ops import is_known as is_known
    from fxcompress.ir.ops import is_scalar as is_scalar
    from fxcompress.ir.ops import is_tap as is_tap
    from fxcompress.ir.ops import module_of as module_of
    from fxcompress.ir.ops import op_name as op_name
    from fxcompress.ir.ops import op_of as op_of
    from fxcompress.ir.ops import op_spec as op_spec
    from fxcompress.ir.ops import operands as operands
    from fxcompress.ir.program import Note as Note
    from fxcompress.ir.program import Program as Program
    from fxcompress.ir.propagate import propagate as propagate
    from fxcompress.ir.signature import Dim as Dim
    from fxcompress.ir.signature import Parameter as Parameter
    from fxcompress.ir.signature import Signature as Signature
    from fxcompress.ir.signature import TensorInput as TensorInput
    from fxcompress.ir.storage import graph_to_json as graph_to_json
    from fxcompress.ir.storage import load as load
    from fxcompress.ir.storage import program_from_json as program_from_json
    from fxcompress.ir.storage import save as save
    from fxcompress.ir.text import Text as Text
    from fxcompress.ir.text import node_lines as node_lines
    from fxcompress.ir.text import parse as parse
    from fxcompress.ir.text import to_text as to_text
    from fxcompress.ir.text import type_text as type_text
    from fxcompress.ir.verify import Violation as Violation
    from fxcompress.ir.verify import verify as verify
    from fxcompress.ir.verify import violations as violations

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Dim": "signature",
        "Fingerprint": "fingerprint",
        "GraphDiff": "diff",
        "ModuleConfig": "modules",
        "Note": "program",
        "Op": "ops",
        "Parameter": "signature",
        "Program": "program",
        "Signature": "signature",
        "TensorInput": "signature",
        "Text": "text",
        "Verdict": "diff",
        "Violation": "verify",
        "attributes": "ops",
        "bind": "ops",
        "capture": "capture",
        "describe": "modules",
        "diff": "diff",
        "find_node": "naming",
        "fingerprint": "fingerprint",
        "graph_to_json": "storage",
        "hash_tensor": "fingerprint",
        "is_known": "ops",
        "is_scalar": "ops",
        "is_stock": "modules",
        "is_tap": "ops",
        "load": "storage",
        "module_of": "ops",
        "node_ids": "naming",
        "node_lines": "text",
        "op_name": "ops",
        "op_of": "ops",
        "op_spec": "ops",
        "operands": "ops",
        "parse": "text",
        "program_from_json": "storage",
        "propagate": "propagate",
        "render_diff": "diff",
        "save": "storage",
        "scope_of": "naming",
        "to_text": "text",
        "type_text": "text",
        "verify": "verify",
        "violations": "verify",
    },
)
