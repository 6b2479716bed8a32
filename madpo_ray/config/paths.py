"""Paths and URIs of a config: absolute, possible, and without credentials."""

import os
import re
from pathlib import Path

from madpo_ray.config.inputs import STORES, is_remote
from madpo_ray.config.reward import kind_of
from madpo_ray.config.root import Config
from madpo_ray.errors import UserError

# `owner/name`, perhaps with a revision, and not the name of a file.
_FILES = r"(?i:jsonl?|ndjson|csv|tsv|txt|parquet|arrow|feather|gz|zst|bz2|xz|zip|tar)"
HUB_NAME = re.compile(rf"[\w-][\w.-]*/(?!.*\.{_FILES}$)[\w.-]+(@[\w./-]+)?")


def with_absolute_paths(config: Config) -> Config:
    """Ray changes the working directory of its workers, so every path is made absolute once.

    Raises:
        UserError: a path or URI is not valid.
    """
    _check_name("model.model_name_or_path", config.model.model_name_or_path)
    storage_path = _absolute("run.storage_path", config.run.storage_path)
    files = tuple(map(_data_file, config.data.files))

    # A model's name may be a path or the name of a repository on the hub.
    model = config.model
    name = model.model_name_or_path
    if Path(name).exists() or _is_path(name):
        name = _absolute("model.model_name_or_path", name)
    source = _absolute_source("reward.source", config.reward.source)
    ensemble = tuple(_absolute_source("reward.ensemble", one) for one in config.reward.ensemble)
    template = model.chat_template_path
    if template is not None:
        template = _absolute("model.chat_template_path", template)

    # A judge's name, too.
    evaluate = config.evaluate
    judge = evaluate.judge
    if judge is not None:
        judge = _absolute_source("evaluate.judge", judge)
    runs = tuple(_absolute("evaluate.compare_with", folder) for folder in evaluate.compare_with)

    return config.model_copy(
        update={
            "model": model.model_copy(
                update={"model_name_or_path": name, "chat_template_path": template}
            ),
            "data": config.data.model_copy(update={"files": files}),
            "reward": config.reward.model_copy(update={"source": source, "ensemble": ensemble}),
            "run": config.run.model_copy(update={"storage_path": storage_path}),
            "evaluate": evaluate.model_copy(update={"judge": judge, "compare_with": runs}),
        }
    )


def _data_file(name: str) -> str:
    """A path, a URI, or a data set's name on the hub, of which there is no folder here."""
    if is_remote(name):
        return _checked_uri(name)
    if HUB_NAME.fullmatch(name) and not Path(name).parent.exists():
        return f"hf://datasets/{name}"
    return _absolute("data.files", name)


def _checked_uri(name: str) -> str:
    """A URI of a known store, without credentials: names are printed and recorded."""
    store, _, path = name.partition("://")
    if store not in STORES or (store == "hf" and not path.startswith("datasets/")):
        raise UserError(
            f"data.files: {name} is in a store that is not read: use s3://, gs:// or hf://datasets/"
        )
    server = path.partition("/")[0]
    if store == "gs":
        server = server.removeprefix("anonymous@")  # a public bucket
    if store != "hf" and re.search("[:@]", server):
        raise UserError(
            f"data.files: a {store}:// name holds credentials, and names are recorded: set them in "
            "the environment instead (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    return name


def _absolute_source(key: str, source: str) -> str:
    """A source of rewards; a classifier's name may be a path or the name of a repository."""
    if kind_of(source) == "classifier" and (Path(source).exists() or _is_path(source)):
        return _absolute(key, source)
    return source


def _absolute(key: str, path: str) -> str:
    """The absolute path, with `~` and environment variables expanded."""
    _check_name(key, path)
    expanded = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"{key}: {path}: environment variable {unset.group()} is not set")
    if expanded.startswith("~") or re.search(r"\$[({]", expanded):
        raise UserError(f"{key}: {path}: only ~, $NAME and ${{NAME}} are expanded")
    return os.path.abspath(expanded)


def _check_name(key: str, path: str) -> None:
    """Raises UserError if no file system allows the path."""
    if not path:
        raise UserError(f"{key}: the path is empty")
    if "://" in path:
        raise UserError(f"{key}: {path} is a URI; give a path on every node, or a hub name")
    try:
        parts = path.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        parts = [b"\0"]
    if any(len(part) > 255 or b"\0" in part for part in parts):
        raise UserError(f"{key}: {path[:60]!r} is not a possible path")


def _is_path(name: str) -> bool:
    if name.startswith((".", "/", "~", "$")) or name.endswith(".gguf"):
        return True
    return name.count("/") > 1
