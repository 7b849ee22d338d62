"""The base of all parameter models: what to compute, in a form that describes itself."""

from pydantic import BaseModel, ConfigDict


class Params(BaseModel):
    """Frozen, refuses unknown names, and takes each field's description from its docstring.

    Prefect's form and the command line are made from the same fields, in declared order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
