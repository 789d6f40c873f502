"""How often a chain of thought verifies, backtracks, sets subgoals and chains backward.

The four behaviours of Cognitive Behaviors (arXiv 2503.01307), counted in two ways: by cue words, at no cost
(:func:`count_behaviours`), and by a model behind an endpoint, one question a behaviour (:class:`BehaviourClassifier`).
:func:`agreement` compares two counts, and :func:`labelled_traces` has traces counted by hand to try either on.
"""

from rolltune.behaviours.agreement import Agreement, LabelledTrace, agreement, labelled_traces
from rolltune.behaviours.classifier import BackgroundClassifier, BehaviourClassifier
from rolltune.behaviours.counter import BEHAVIOURS, BehaviourCounts, count_behaviours, thinking

__all__ = [
    "BEHAVIOURS",
    "Agreement",
    "BackgroundClassifier",
    "BehaviourClassifier",
    "BehaviourCounts",
    "LabelledTrace",
    "agreement",
    "count_behaviours",
    "labelled_traces",
    "thinking",
]
