"""The parts of the answer checker (:mod:`rolltune.rewards.answer`), one step per module.

:mod:`~rolltune.rewards.answers.normalise` brings a text to one spelling, :mod:`~rolltune.rewards.answers.numbers` reads
a number, :mod:`~rolltune.rewards.answers.expression` parses everything else that is mathematics,
:mod:`~rolltune.rewards.answers.evaluate` computes values, :mod:`~rolltune.rewards.answers.compare` compares two parsed
texts, and :mod:`~rolltune.rewards.answers.kind` decides which of these a gold answer needs.
"""
