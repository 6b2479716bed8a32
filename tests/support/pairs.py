"""Preference pairs that a model can learn from, and the config of a tiny run over them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = [
    *("the", "a", "film", "actor", "scene", "plot", "is", "was"),
    *("good", "bad", "great", "dull", "fine", "poor", "warm", "cold", "bright", "flat"),
]

Edit = Callable[[dict[str, Any]], None]


def make_rows(count: int, seed: int = 0, *, conversational: bool = False) -> list[dict[str, Any]]:
    """Pairs whose chosen response is the one with the kinder words, four times out of five."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        kind = " ".join(rng.choices(["good", "great", "warm"], k=rng.randint(2, 6)))
        unkind = " ".join(rng.choices(["bad", "dull", "poor"], k=rng.randint(2, 6)))
        agrees = rng.random() < 0.8
        chosen, rejected = (kind, unkind) if agrees else (unkind, kind)
        prompt = f"say {number}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        row: dict[str, Any] = {
            "prompt": prompt,
            "chosen": " " + chosen,
            "rejected": " " + rejected,
        }
        if conversational:
            row = messages(**row)
        rows.append({**row, "chosen_score": float(agrees), "rejected_score": float(not agrees)})
    return rows


def messages(**texts: str) -> dict[str, Any]:
    """Each text as a list of one message."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in texts.items()}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON Lines; a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def tiny_run(model: Path, pairs: Path, storage: Path) -> dict[str, Any]:
    """A config, as nested dicts, whose stages take seconds."""
    training = {
        "learning_rate": 1e-2,
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
    }
    return {
        "model": {"model_name_or_path": str(model)},
        "data": {
            "files": [str(pairs)],
            "max_length": 64,
            "validation_fraction": 0.25,
            "test_fraction": 0.2,
            "keep_columns": ["chosen_score", "rejected_score"],
        },
        "run": {"name": "tiny", "storage_path": str(storage)},
        "cluster": {"num_workers": 2},
        "sft": {**training, "learning_rate": 1e-3, "max_steps": 2},
        "reward": {**training, "num_train_epochs": 3, "use_peft": True, "lora_r": 4},
        "train": {**training, "learning_rate": 1e-3, "max_steps": 5},
        "evaluate": {
            "num_samples": 4,
            "num_shown": 2,
            "max_new_tokens": 4,
            "temperatures": [1.0, 0.0],
            "judge": "support.judges:count_kind_words",
            "chosen_score_column": "chosen_score",
            "rejected_score_column": "rejected_score",
        },
    }
