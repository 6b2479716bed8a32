"""All keys of a config with their defaults and what they mean, in the form of a config."""

import math
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from madpo_ray.config.base import Section
from madpo_ray.config.root import Config
from madpo_ray.errors import UserError, did_you_mean

WIDTH = 100
INDENT = "  "


def describe_options(name: str | None = None) -> str:
    """YAML of all sections, or of one: each key with its default, below a comment about it.

    Raises:
        UserError: there is no such section.
    """
    sections = {key: _section_of(field) for key, field in Config.model_fields.items()}
    if name is not None and name not in sections:
        raise UserError(f"there is no section {name!r}{did_you_mean(name, sections)}")
    wanted = sections if name is None else {name: sections[name]}
    lines: list[str] = []
    for key, section in wanted.items():
        field = Config.model_fields[key]
        if field.default is None:
            lines.append(f"# Without this section, as by default, {field.description}")
        lines += _lines(key, section)
    return "\n".join(lines)


def _section_of(field: FieldInfo) -> type[Section]:
    """The class of a section, which may be left out of a config."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next(one for one in kinds if isinstance(one, type) and issubclass(one, Section))


def _lines(name: str, section: type[Section]) -> Iterator[str]:
    yield f"{name}:"
    for key, field in section.model_fields.items():
        comment = f"{field.description}{_choices(field.annotation)}"
        for line in textwrap.wrap(comment, WIDTH - len(INDENT) - 2):
            yield f"{INDENT}# {line}"
        if field.is_required():
            yield f"{INDENT}{key}:  # required"
        else:
            default = to_jsonable_python(field.get_default(call_default_factory=True))
            listed = yaml.safe_dump([default], default_flow_style=True, width=math.inf)
            yield f"{INDENT}{key}: {listed.strip()[1:-1]}"


def _choices(annotation: Any) -> str:
    """What a key may be, if that is a list of names."""
    for one in (annotation, *get_args(annotation)):
        if get_origin(one) is Literal:
            return f" (one of {', '.join(map(str, get_args(one)))})"
    return ""
