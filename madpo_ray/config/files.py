"""A config from a YAML file and `--set` overrides; errors name the key and the fix."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from madpo_ray.atomic import write_text
from madpo_ray.config.base import Section
from madpo_ray.config.paths import with_absolute_paths
from madpo_ray.config.root import Config
from madpo_ray.errors import UserError, did_you_mean

# PyYAML's constructors let errors of Python through, such as that of an integer of 5,000 digits.
YAML_ERRORS = (
    yaml.YAMLError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)

AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `section.key=value` overrides. Its paths are absolute.

    Raises:
        UserError: the file is missing or not a YAML mapping, a key is unknown (the closest one is
            named) or appears twice, or a value is out of bounds.
    """
    try:
        raw = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    except YAML_ERRORS as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"config file {path} must hold sections, like `model:` and `data:`")

    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The checked config of nested mappings. Raises UserError as `load_config` does."""
    return with_absolute_paths(_validated(Config, raw))


def with_changes(section: AnySection, name: str, changes: Mapping[str, Any]) -> AnySection:
    """A section with some keys replaced, checked like any other. `name` is for error messages.

    Raises:
        UserError: a key is unknown or a value is out of bounds.
    """
    return _validated(type(section), {**section.model_dump(), **changes}, name)


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as a file that `--config` accepts, completely or not at all."""
    write_text(path, dump_config(config))


def dump_config(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, and no key twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key is not a name")
            key = key_node.value if key_node.tag == MERGE else self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in first_line:
                raise yaml.YAMLError(
                    f"key {key!r} appears twice, in lines {first_line[key]} and {line}: keep one"
                )
            first_line[key] = line
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Keys that `<<` merges in may be overridden by the mapping's own: not a key twice."""
        own = [pair for pair in node.value if pair[0].tag != MERGE]
        super().flatten_mapping(node)
        num_merged = len(node.value) - len(own)
        merged = {key.value: (key, value) for key, value in node.value[:num_merged]}
        for key, _ in own:
            merged.pop(key.value, None)
        node.value = [*merged.values(), *own]


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a text."""


# PyYAML's are YAML 1.1's: 1e-5 is a text, 1:30 is 90, 010 is 8, on is true, 2026-01-01 is a date.
_SCALARS = {
    "null": (r"null|Null|NULL|~|", "nN~"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": ("<<", "<"),
}


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _use_scalars_of_yaml_1_2() -> None:
    for kind in (_Loader, _Dumper):
        kind.yaml_implicit_resolvers = {}
        for name, (pattern, first) in _SCALARS.items():
            resolver = re.compile(rf"^(?:{pattern})$")
            kind.add_implicit_resolver(f"tag:yaml.org,2002:{name}", resolver, [*first, ""])
    _Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


_use_scalars_of_yaml_1_2()


def read_yaml(text: str) -> Any:
    """What YAML 1.2 makes of a text."""
    return yaml.load(text, Loader=_Loader)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2:
        raise UserError(f"--set {override}: write it as section.key=value")

    target = raw
    for part in parts[:-1]:
        section = target.get(part)
        if not isinstance(section, dict | None):
            raise UserError(f"--set {override}: {part} is not a section")
        # A copy: with an alias another section would change, too.
        target[part] = dict(section or {})
        target = target[part]
    try:
        read = read_yaml(value)
    except YAML_ERRORS as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}") from None
    # A comment or an anchor is lost in a plain text.
    if isinstance(read, str) and read != value.strip() and value.strip()[:1] not in ("'", '"'):
        raise UserError(f"--set {override}: YAML reads {read!r}; put the value into quotes")
    target[parts[-1]] = read


def _validated(
    section: type[AnySection], raw: Mapping[str, Any], name: str | None = None
) -> AnySection:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        prefix = (name,) if name else ()
        raise UserError("\n".join(_explain(item, prefix) for item in error.errors())) from None


def _explain(error: Any, prefix: tuple[str, ...]) -> str:
    location = (*prefix, *error["loc"])
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest_key(location)}"
    if error["type"] == "missing":
        return f"{key} is required"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict) else f" (given: {error['input']!r})"
    return f"{key}: {message}{given}" if error["loc"] else message


def _suggest_key(location: Sequence[str | int]) -> str:
    """Where the key belongs, or what it may have been."""
    *section, key = location
    own_keys = _keys_at(section)
    is_misspelt = bool(difflib.get_close_matches(str(key), own_keys, n=1, cutoff=0.7))
    others = [f"{name}.{key}" for name in Config.model_fields if key in _keys_at([name])]
    if others and section and not is_misspelt:
        return f"; did you mean {' or '.join(others)}?"
    return did_you_mean(str(key), own_keys)


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The keys of the section at a location."""
    section: Any = Config
    for part in location:
        field = section.model_fields.get(part)
        if field is not None:
            section = _section_of(field.annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    """The section in `Section`, `Section | None` or `dict[str, Section] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    candidates = get_args(annotation)
    if get_origin(annotation) is dict:
        candidates = candidates[1:]
    found = (_section_of(candidate) for candidate in candidates)
    return next((section for section in found if section is not None), None)
