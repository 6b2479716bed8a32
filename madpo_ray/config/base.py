"""A section of the config: strict, frozen, and able to say which of its keys decide results."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def operational(default: Any, **constraints: Any) -> Any:
    """A pydantic Field for a key that affects neither weights nor results.

    Changing such a key does not trigger a rerun.
    """
    return Field(default, json_schema_extra={"operational": True}, **constraints)


class Section(BaseModel):
    """A part of the config. Unknown keys, infinities and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def operational_keys(self) -> set[str]:
        """Keys that affect neither weights nor results."""
        return {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict)
            and field.json_schema_extra.get("operational")
        }

    def fingerprinted(self) -> dict[str, Any]:
        """The settings that decide results, for fingerprints."""
        return self.model_dump(mode="json", exclude=self.operational_keys())


def _as_sequence(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# A list of strings; a single string is read as a list of one.
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_sequence), Field(strict=False)]
