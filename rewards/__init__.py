"""Rewards: functions from a problem and the text of the assistant's turn to a :class:`rolltune.types.Score`.

To add one, write one function in a file of this folder and one node in a config. The function, in
``rewards/brevity.py``::

    from rolltune.types import Problem, Score

    def brevity_reward(problem: Problem, text: str, *, max_words: int = 100) -> Score:
        return Score(total=1.0 if len(text.split()) <= max_words else 0.0)

The node, under a name of your choice that becomes the name of its curve::

    rewards:
      answer: {_component_: rolltune.rewards.answer.answer_reward, weight: 1.0}
      brevity: {_component_: rolltune.rewards.brevity.brevity_reward, max_words: 80, weight: 0.2}

What a reward can rely on, and what is asked of it:

- ``text`` is the whole turn, a prefilled ``<think>`` included.
- Keyword-only arguments are its options and come from the config. One named ``completion`` is not an option: the
  reward is handed the :class:`rolltune.types.Completion`, for its token count or its finish reason.
- ``text`` was written by a model that is paid for finding holes: no ``eval``, and time linear in its length.
- A total of None means unscored; it is never the same as 0. An exception is a bug and ends the run.
- ``weight: 0`` logs a reward without training on it.
"""
