"""Adapters: small trainable additions to frozen modules. PEFT makes them; a recipe says which kind and where."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from engine.part import Part, Patterns


class Adapter(Part):
    """One kind of adapter and the modules it goes to. Every further key is a field of that kind's PEFT config class."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """PEFT's name of the kind in lower case: `lora`, `ia3`, `vera`, ..."""
    target_modules: Patterns = ()
    """Patterns of the modules to adapt; only those that some stage unfreezes get one."""
    exclude_modules: Patterns = ()
    """Patterns of modules to leave out."""

    @property
    def fields(self) -> dict[str, Any]:
        """The keys that are PEFT's own."""
        return dict(self.__pydantic_extra__ or {})
