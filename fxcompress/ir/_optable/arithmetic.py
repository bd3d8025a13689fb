"""Element-wise arithmetic, comparison and logic on tensors, sizes and numbers."""

# fmt: off

from typing import Any

from fxcompress.ir._optable.row import Op, row

_UNARY = (
    "abs acos acosh angle asin asinh atan atanh bitwise_not ceil conj_physical cos cosh deg2rad "
    "digamma erf erfc erfinv exp exp2 expm1 floor frac i0 isfinite isinf isnan isneginf isposinf "
    "lgamma log log10 log1p log2 logical_not neg positive rad2deg reciprocal rsqrt sgn "
    "sign signbit sin sinc sinh sqrt square tan trunc real imag"
)
_UNARY_EXTRA: dict[str, dict[str, Any]] = {
    "abs": {"alias": "torch.absolute", "methods": "absolute __abs__", "scalar": "abs"},
    "neg": {"alias": "torch.negative", "methods": "negative __neg__", "scalar": "neg"},
    "positive": {"methods": "__pos__", "scalar": "pos"},
    "bitwise_not": {"methods": "__invert__", "scalar": "invert"},
    "acos": {"alias": "torch.arccos", "methods": "arccos"},
    "asin": {"alias": "torch.arcsin", "methods": "arcsin"},
    "atan": {"alias": "torch.arctan", "methods": "arctan"},
    "acosh": {"alias": "torch.arccosh", "methods": "arccosh"},
    "asinh": {"alias": "torch.arcsinh", "methods": "arcsinh"},
    "atanh": {"alias": "torch.arctanh", "methods": "arctanh"},
    "trunc": {"alias": "torch.fix", "methods": "fix"},
    "erf": {"alias": "special.erf"},
    "expm1": {"alias": "special.expm1"},
}
_BINARY = (
    "atan2 bitwise_left_shift bitwise_right_shift copysign float_power fmax fmin fmod gcd "
    "heaviside hypot lcm ldexp logaddexp logaddexp2 logical_and logical_or logical_xor maximum "
    "minimum nextafter xlogy"
)


def _binary(name: str, dunder: str, *, attrs: str = "", alias: str = "", methods: str = "",
            scalar: str = "", commutes: bool = False) -> Op:
    reflected = f"__r{dunder}__"
    both = f"__{dunder}__ {reflected} {methods}" if commutes else f"__{dunder}__ {methods}"
    return row(name, "elementwise", f"input other | {attrs}", alias=alias, methods=both,
               swapped="" if commutes else reflected, scalar=scalar)


def _compare(name: str, word: str) -> Op:
    return row(name, "elementwise", "input other", alias=f"torch.{word}" if word else "",
               methods=f"__{name}__ {word}", scalar=name)


ROWS = (
    _binary("add", "add", attrs="alpha=1", scalar="add", commutes=True),
    _binary("sub", "sub", attrs="alpha=1", alias="torch.subtract", methods="subtract",
            scalar="sub"),
    _binary("mul", "mul", alias="torch.multiply", methods="multiply", scalar="mul",
            commutes=True),
    _binary("div", "truediv", attrs="rounding_mode=None",
            alias="torch.true_divide torch.divide", methods="true_divide divide __div__",
            scalar="truediv"),
    _binary("floor_divide", "floordiv", scalar="floordiv"),
    _binary("remainder", "mod", scalar="mod"),
    row("pow", "elementwise", "input exponent", methods="__pow__", swapped="__rpow__",
        scalar="pow"),
    row("rsub", "elementwise", "input other | alpha=1"),
    _binary("bitwise_and", "and", scalar="and_", commutes=True),
    _binary("bitwise_or", "or", scalar="or_", commutes=True),
    _binary("bitwise_xor", "xor", scalar="xor", commutes=True),
    _compare("eq", ""),
    _compare("ne", "not_equal"),
    _compare("lt", "less"),
    _compare("le", "less_equal"),
    _compare("gt", "greater"),
    _compare("ge", "greater_equal"),
    *(row(name, "elementwise", "input other") for name in _BINARY.split()),
    *(row(name, "elementwise", "input", **_UNARY_EXTRA.get(name, {})) for name in _UNARY.split()),
    row("round", "elementwise", "input | decimals=0"),
    row("logit", "elementwise", "input | eps=None"),
    row("clamp", "elementwise", "input | min=None max=None", alias="torch.clip",
        methods="clip"),
    row("clamp_min", "elementwise", "input min"),
    row("clamp_max", "elementwise", "input max"),
    row("addcmul", "elementwise", "input tensor1 tensor2 | value=1"),
    row("addcdiv", "elementwise", "input tensor1 tensor2 | value=1"),
    row("lerp", "elementwise", "input end weight"),
    row("where", "elementwise", "condition input=None other=None"),
    row("masked_fill", "elementwise", "input mask value"),
    row("nan_to_num", "elementwise", "input | nan=0.0 posinf=None neginf=None"),
    row("isclose", "elementwise", "input other | rtol=1e-05 atol=1e-08 equal_nan=False"),
    row("isin", "elementwise", "elements test_elements | assume_unique=False invert=False"),
    row("not", "elementwise", "input", fn="", scalar="not_"),
    row("truth", "elementwise", "input", fn="", scalar="truth"),
    row("sym_max", "elementwise", "a b", alias="torch.sym_max"),
    row("sym_min", "elementwise", "a b", alias="torch.sym_min"),
    row("sym_int", "elementwise", "a", alias="torch.sym_int"),
    row("sym_float", "elementwise", "a", alias="torch.sym_float"),
    row("sym_not", "elementwise", "a", alias="torch.sym_not"),
    row("sym_ite", "elementwise", "condition a b", alias="torch.sym_ite"),
)
