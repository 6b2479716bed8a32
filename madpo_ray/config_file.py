"""A config from a YAML file and `--set` overrides, with errors that name the key and the mend."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from madpo_ray.config import Config, UserError, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML would read 1e-5 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `section.key=value` overrides, its paths absolute.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown (the nearest is named), or a value is out
        of bounds.
    """
    try:
        raw = _read_yaml(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is no valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"config file {path} must hold sections with keys, like `model:` and `data:`")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The checked config of nested mappings. Raises UserError as `load_config` does."""
    try:
        return _with_absolute_paths(Config.model_validate(raw))
    except ValidationError as error:
        raise UserError("\n".join(_explain(item) for item in error.errors())) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2:
        raise UserError(f"--set {override}: write it as section.key=value")
    target = raw
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {override}: {part} is no section")
    try:
        target[parts[-1]] = _read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is no valid YAML: {error}") from None


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}{nearest(str(error['loc'][-1]), _keys_at(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{where} is required"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict) else f" (given: {error['input']!r})"
    return f"{where}: {message}{given}" if where else message


def _keys_at(location: Sequence[str | int]) -> list[str]:
    section: Any = Config
    for part in location:
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else section
        if get_origin(section) is dict:
            section = get_args(section)[1]
            break
    return list(section.model_fields)


def _with_absolute_paths(config: Config) -> Config:
    """Ray changes the working directory of its workers, so every path is made absolute once, here."""
    model = config.model
    updates: dict[str, Any] = {}
    if Path(model.model_name_or_path).exists() or _is_path(model.model_name_or_path):
        updates["model_name_or_path"] = _absolute(model.model_name_or_path)
    if model.chat_template_path is not None:
        updates["chat_template_path"] = _absolute(model.chat_template_path)
    files = tuple(_absolute(file) for file in config.data.files)
    if "://" in config.run.storage_path:
        raise UserError(f"run.storage_path: {config.run.storage_path} is a URI; name a folder that every node mounts")
    return config.model_copy(
        update={
            "model": model.model_copy(update=updates),
            "data": config.data.model_copy(update={"files": files}),
            "run": config.run.model_copy(update={"storage_path": _absolute(config.run.storage_path)}),
        }
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1
