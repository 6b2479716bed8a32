"""Whose samples are compared, and the columns that hold them."""

from pathlib import Path
from typing import NamedTuple

# The names of this run's policies in tables; those of other runs are the runs' names.
POLICY = "policy"
REFERENCE = "reference"


class PolicyFiles(NamedTuple):
    """Where a policy is."""

    folder: Path
    base: Path  # the model that it was trained on, if it is an adapter


class SampleSet(NamedTuple):
    """Samples of a policy at a temperature of decoding; 0 is greedy."""

    policy: str
    temperature: float

    @property
    def text(self) -> str:
        """Column of the decoded responses."""
        return f"{self.policy}@{self.temperature:g}"

    @property
    def ids(self) -> str:
        """Column of their token ids."""
        return f"{self.text}_ids"

    @property
    def reward(self) -> str:
        """Column of their rewards."""
        return f"{self.text}_reward"

    @property
    def kl(self) -> str:
        """Column of the divergence along them, in nats per response."""
        return f"{self.text}_kl"

    @property
    def logratio(self) -> str:
        """Column of their log-prob under the policy less that under the reference, in nats."""
        return f"{self.text}_logratio"
