"""Spec files: YAML with positions, composition, checked models, and what they name."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.spec._steps import parse_options as parse_options
    from fxcompress.spec._steps import parse_steps as parse_steps
    from fxcompress.spec.constraints import ConstraintResult as ConstraintResult
    from fxcompress.spec.constraints import Constraints as Constraints
    from fxcompress.spec.constraints import Figures as Figures
    from fxcompress.spec.constraints import check_constraints as check_constraints
    from fxcompress.spec.load_data import load_data as load_data
    from fxcompress.spec.load_data import load_metric as load_metric
    from fxcompress.spec.load_inputs import ModelInputs as ModelInputs
    from fxcompress.spec.load_inputs import load_inputs as load_inputs
    from fxcompress.spec.load_model import LoadedModel as LoadedModel
    from fxcompress.spec.load_model import load_model as load_model
    from fxcompress.spec.load_program import load_program as load_program
    from fxcompress.spec.schema import json_schema as json_schema
    from fxcompress.spec.spec import Spec as Spec

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(
            ("ConstraintResult", "Constraints", "Figures", "check_constraints"), "constraints"
        ),
        **dict.fromkeys(("LoadedModel", "load_model"), "load_model"),
        **dict.fromkeys(("ModelInputs", "load_inputs"), "load_inputs"),
        **dict.fromkeys(("load_data", "load_metric"), "load_data"),
        "Spec": "spec",
        "json_schema": "schema",
        "load_program": "load_program",
        "parse_options": "_steps",
        "parse_steps": "_steps",
    },
)
