"""The strict, frozen base that every key of a recipe lives in.

A part's annotations are its schema: validation, JSON Schema, the generated docs and "did you mean" all come from them.
A part knows no model and no data, and nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Part(BaseModel):
    """A mapping of a recipe: unknown keys are refused, types are strict, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    shorthand: ClassVar[str | None] = None
    """The key that a plain scalar stands for: `model: a/b` is short for `model: {path: a/b}`."""

    @model_validator(mode="before")
    @classmethod
    def _long_form(cls, value: Any) -> Any:
        return {cls.shorthand: value} if cls.shorthand and not isinstance(value, (dict, list, tuple, Part)) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        if cls.shorthand is None:
            return schema
        short = dict(schema["properties"][cls.shorthand])
        return {"title": schema.pop("title"), "description": schema.pop("description", ""), "anyOf": [short, schema]}


def one_or_many(value: Any) -> Any:
    """`a` for `[a]`: a scalar stands for the list that holds it alone."""
    return value if isinstance(value, (list, tuple)) or value is None else (value,)


Patterns = Annotated[tuple[str, ...], BeforeValidator(one_or_many, json_schema_input_type=str | list[str])]
"""One pattern or a list of them: regular expressions over whole module names, or selectors such as `@blocks[-4:]`."""
