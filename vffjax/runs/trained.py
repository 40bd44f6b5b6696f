"""A trained run as a value: what evaluation, prediction, early exit and export all work on."""

from typing import Any, NamedTuple

from vffjax.networks.groups import States
from vffjax.rules.streams import Task
from vffjax.training.plan import Plan


class Trained(NamedTuple):
    """A run as it was when one of its epochs was saved."""

    plan: Plan
    states: States
    task: Task
    run: dict[str, Any]  # the run's state after that epoch; see `runs.state`

    @property
    def groups(self) -> int:
        """How many groups have trained. Under the sequential schedule the later ones may not have been reached yet."""
        return int(self.run["trained_groups"])

    @property
    def scored_by(self) -> str:
        """How one pass through the groups scores classes: as the run is configured, or by the heads if it is configured for a sweep, which
        takes a pass for each class."""
        return "heads" if self.plan.config.inference == "sweep" else self.plan.config.inference

    @property
    def caution(self) -> str:
        """What to tell a user whose images are classified by `scored_by`, where that is not what the run is configured for; else empty."""
        if self.scored_by == self.plan.config.inference:
            return ""
        return (
            f"config.inference={self.plan.config.inference}: the run's errors come from a pass of its own for each label; "
            "here the heads of all trained groups classify, in one pass, so that errors differ (vffjax evaluate --inference heads)"
        )

    @property
    def voting(self) -> tuple[int, ...]:
        """The groups that form the ensemble of `scored_by`.

        They are those chosen on validation images. Those chosen for a sweep say nothing about the heads, so that all trained groups vote.
        """
        return tuple(self.run["voting"]) if self.plan.config.inference == self.scored_by else tuple(range(self.groups))

    @property
    def vote_weights(self) -> tuple[float, ...]:
        """The weights of `voting`, with config.votes=weighted; empty if all weigh the same."""
        return tuple(self.run.get("vote_weights", ())) if self.plan.config.inference == self.scored_by else ()

    @property
    def about(self) -> dict[str, Any]:
        """What an export says of the run, in JSON's types: its epoch and classes, how images are normalised, and how groups vote."""
        weights = self.vote_weights or (1 / len(self.voting),) * len(self.voting)
        return {
            **{key: self.run[key] for key in ("epoch", "class_names", "image_shape")},
            "pixel_mean": self.task.mean.tolist(),
            "pixel_std": self.task.std.tolist(),
            "trained_groups": self.groups,
            "scored_by": self.scored_by,
            "views": self.plan.config.views,
            "voting": list(self.voting),
            "vote_weights": list(weights),
        }
