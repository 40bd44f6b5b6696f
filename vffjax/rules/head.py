"""The head's loss alone: each group learns by the cross-entropy of its own linear head. With one group this is back-propagation (BP)."""

from vffjax.rules.local import Rule

RULE = Rule(head_share=lambda config, hyper: 1)
