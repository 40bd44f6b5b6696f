"""A trained run as a value: what evaluation, prediction, early exit and export all work on."""

from typing import Any, NamedTuple

from vffjax.networks.groups import GroupState
from vffjax.rules.streams import Task
from vffjax.training.plan import Plan


class Trained(NamedTuple):
    """A run as it was when one of its epochs was saved."""

    plan: Plan
    states: tuple[GroupState, ...]
    task: Task
    run: dict[str, Any]  # the run's state after that epoch; see `runs.state`

    @property
    def groups(self) -> int:
        """How many groups have trained. Under the sequential schedule the later ones may not have been reached yet."""
        return int(self.run["trained_groups"])

    @property
    def voting_heads(self) -> tuple[int, ...]:
        """The groups whose heads form the ensemble.

        They are those chosen on validation images if the run is configured to classify by its heads. If it is configured for another kind
        of inference, that choice says nothing about the heads, so that all trained groups vote.
        """
        return tuple(self.run["voting"]) if self.plan.config.inference == "heads" else tuple(range(self.groups))
