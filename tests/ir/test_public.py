import subprocess
import sys

import fxcompress.ir
import fxcompress.testing

PUBLIC = [
    "Dim", "Fingerprint", "GraphDiff", "ModuleConfig", "Note", "Op", "Parameter", "Program",
    "Signature", "TensorInput", "Text", "Verdict", "Violation", "attributes", "bind", "capture",
    "describe", "diff", "find_node", "fingerprint", "graph_to_json", "hash_tensor", "is_known",
    "is_scalar", "is_stock", "is_tap", "load", "module_of", "node_ids", "node_lines", "op_name",
    "op_of", "op_spec", "operands", "parse", "program_from_json", "propagate", "render_diff",
    "save", "scope_of", "to_text", "type_text", "verify", "violations",
]  # fmt: skip


def test_surface():
    assert fxcompress.ir.__all__ == PUBLIC
    assert all(callable(getattr(fxcompress.ir, name)) for name in PUBLIC)
    assert all(callable(getattr(fxcompress.testing, name)) for name in fxcompress.testing.__all__)


def test_importing_costs_no_torch():
    code = (
        "import sys, fxcompress.ir, fxcompress.testing, fxcompress.testing.plugin\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_function_wins_over_the_module_of_its_name():
    code = (
        "import fxcompress.ir.diff, fxcompress.ir.verify\n"
        "from fxcompress.ir import diff, verify, fingerprint\n"
        "import fxcompress.ir.fingerprint\n"
        "from fxcompress.ir import fingerprint as again\n"
        "assert all(map(callable, (diff, verify, fingerprint))) and again is fingerprint\n"
        "from fxcompress.ir.diff import GraphDiff"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
