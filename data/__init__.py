"""Data sets: the questions of a run and their gold answers.

A data set is a function that returns a :class:`rolltune.data.dataset.Dataset`. A config names the function by its
dotted path, and the keys beside it are its keyword arguments::

    data:
      train:
        _component_: rolltune.data.gsm8k.gsm8k
        split: train
      heldout:
        _component_: rolltune.data.gsm8k.gsm8k
        split: test
        count: 200

Data sets with gold answers:

- ``gsm8k.gsm8k``: from the Hub or a local copy.
- ``gsm_symbolic.gsm_symbolic``: generated, needs no network.
- ``reasoning_gym.reasoning_gym_task``: generated, any task of that library with a one-word answer.
- ``countdown.countdown``: generated.
- ``countdown.countdown_records``: Countdown from the Hub or a file.
- ``sums.sums``: generated short additions and subtractions for a first run.
- ``jsonl.jsonl``: your own file.
- ``traces.traces``: the output of ``write_traces``, for SFT.

Data sets with rubrics:

- ``rubrics.rubric_jsonl``: your own file, or the output of ``write_rubrics``.
- ``rubrics.rar``: Rubrics as Rewards, from the Hub or a file.
- ``rubrics.rubric_tasks``: 60 packaged tasks for a first run.

For most new data, a file for ``jsonl.jsonl`` is enough. Otherwise add a file here with one function:

1. Its arguments are keyword-only and typed, with defaults where a sensible default exists.
2. It makes one :class:`rolltune.types.Problem` per record: an ``id`` that is unique and does not depend on the slice,
   ``messages`` with only the question (the config adds system prompts, few-shot examples and templates), the gold
   ``answer`` in canonical form, and a worked ``solution`` if the data has one.
3. A bad record or option raises ``ValueError``. The message names the file and line, or the option, and says what is
   accepted.
4. It returns ``Dataset(problems)``. It does not shuffle: ``dataset.ProblemStream`` does.

Train and held-out questions must differ. Take them from different splits, or as two slices (``start``, ``count``) of
one list. ``dataset.overlap`` lists the questions that are in both.
"""
