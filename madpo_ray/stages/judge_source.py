"""Classifiers and functions that give rewards to texts, as the config names them."""

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from madpo_ray.artifacts.hashes import hash_file
from madpo_ray.config import ForwardOptions, ModelConfig, kind_of
from madpo_ray.errors import UserError
from madpo_ray.models.source import check_model, fetch_model, model_inputs

if TYPE_CHECKING:
    from madpo_ray.data.messages import Content
    from madpo_ray.scoring.judges import TextScorer

# What imports torch is imported inside functions.


class JudgeSource(NamedTuple):
    """A judge of texts: a sequence classifier with one label, or a Python function."""

    name: str  # folder or hub name, or `module:function`
    revision: str  # of a classifier on the hub
    key: str  # of the config, for messages

    @property
    def is_function(self) -> bool:
        return kind_of(self.name) == "function"

    @property
    def _model(self) -> ModelConfig:
        return ModelConfig(model_name_or_path=self.name, model_revision=self.revision)

    def check(self) -> None:
        """Raises UserError if it is not there, or no classifier with one label. Reads no weights.

        A model on the hub is not looked up.
        """
        if self.is_function:
            from madpo_ray.scoring.judges import find_function

            find_function(self.name, self.key)
            return
        check_model(self._model, "SEQ_CLS", self.key)
        if Path(self.name).is_absolute():
            self._check_classifier(Path(self.name))

    def _check_classifier(self, folder: Path) -> None:
        from madpo_ray.models.checks import check_classifier

        check_classifier(folder, self._model, key=self.key)

    def check_reads(self, prompt: "Content") -> None:
        """Raises UserError if prompts are messages, and a classifier has no chat template.

        A model on the hub is fetched, and checked as `check` does with others.
        """
        if self.is_function:
            return
        folder = fetch_model(self._model, "SEQ_CLS", self.key)
        if folder != Path(self.name):
            self._check_classifier(folder)
        if isinstance(prompt, str):
            return
        from madpo_ray.models.loading import load_tokenizer

        if not load_tokenizer(folder, self._model).chat_template:
            raise UserError(
                f"{self.key}: the prompts are messages, and the tokenizer of {self.name} has no "
                "chat template: save the one that it was trained with there, as chat_template.jinja"
            )

    def settings(self) -> dict[str, Any]:
        """What decides its rewards, other than `content`: a classifier's name does not count."""
        return {"function": self.name} if self.is_function else {}

    def content(self) -> Any:
        """The hash of a classifier, or of the files of a function: the one that it is defined in,
        and the one that the config names.
        """
        if not self.is_function:
            return model_inputs(self._model, "SEQ_CLS", self.key).fingerprint
        from madpo_ray.scoring.judges import find_function

        function = find_function(self.name, self.key)
        named = sys.modules[self.name.partition(":")[0]]
        defined = inspect.getmodule(inspect.unwrap(function))
        files = {getattr(module, "__file__", None) for module in (named, defined)}
        hashes = sorted(hash_file(Path(file)) for file in files if file is not None)
        return hashes[0] if len(hashes) == 1 else hashes

    def scorer(self, forward: ForwardOptions) -> "TextScorer":
        """What gives the rewards."""
        from madpo_ray.scoring.judges import ClassifierReward, FunctionReward

        if self.is_function:
            return FunctionReward(self.name, key=self.key)
        folder = fetch_model(self._model, "SEQ_CLS", self.key)
        return ClassifierReward(folder, self._model, forward=forward, key=self.key)
