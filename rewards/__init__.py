"""Rewards: functions from a problem and the text of a response to a :class:`rolltune.types.Score`.

To add a reward, write one function in a file of this folder and one node in a config. The function, in
``rewards/brevity.py``::

    from rolltune.types import Problem, Score

    def brevity_reward(problem: Problem, text: str, *, max_words: int = 100) -> Score:
        return Score(total=1.0 if len(text.split()) <= max_words else 0.0)

The node, under a name of your choice, which also names its curve::

    rewards:
      answer: {_component_: rolltune.rewards.answer.answer_reward, weight: 1.0}
      brevity: {_component_: rolltune.rewards.brevity.brevity_reward, max_words: 80, weight: 0.2}

Rules for a reward:

- ``text`` is the whole response, including a prefilled ``<think>``.
- Keyword-only arguments are its options and come from the config. An argument named ``completion`` is not an option:
  the recipe passes the :class:`rolltune.types.Completion`, for its token count or finish reason.
- The model that writes ``text`` is rewarded for finding holes in the reward: never ``eval`` it, and take time linear in
  its length.
- A total of None means unscored, which is not 0. An exception is a bug and ends the run.
- ``weight: 0`` logs a reward without training on it.
"""
