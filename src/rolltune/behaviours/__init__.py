"""Count how often a chain of thought verifies, backtracks, sets subgoals and chains backward.

These are the four behaviours of Cognitive Behaviors (arXiv 2503.01307). :func:`count_behaviours` counts them by cue
words, at no cost; :class:`BehaviourClassifier` asks a model behind an endpoint, with one question per behaviour.
:func:`agreement` compares two counts, and :func:`labelled_traces` returns traces counted by hand to test either on.
"""

from rolltune.behaviours.agreement import Agreement, LabelledTrace, agreement, labelled_traces
from rolltune.behaviours.classifier import BehaviourClassifier
from rolltune.behaviours.counter import BEHAVIOURS, BehaviourCounts, count_behaviours, thinking

__all__ = [
    "BEHAVIOURS",
    "Agreement",
    "BehaviourClassifier",
    "BehaviourCounts",
    "LabelledTrace",
    "agreement",
    "count_behaviours",
    "labelled_traces",
    "thinking",
]
