"""Data sets: where the questions and their gold answers come from.

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

What there is: ``gsm8k.gsm8k`` (from the Hub or a local copy), ``gsm_symbolic.gsm_symbolic`` (generated, needs no
network), ``reasoning_gym.reasoning_gym_task`` (any task of that library with a one-word answer), ``sums.sums``
(short additions and subtractions for a first run), ``countdown.countdown`` (drawn), ``countdown.countdown_rows``
(from the Hub or a file), ``traces.traces`` (what ``write_traces`` wrote, for SFT) and ``jsonl.jsonl`` (a file of your
own). With rubrics: ``rubrics.rubric_jsonl`` (your own, or what ``write_rubrics`` wrote), ``rubrics.rar`` (from the Hub
or a file) and ``rubrics.rubric_tasks`` (embedded, for a first run).

To add one, often ``jsonl.jsonl`` with a file is enough. Otherwise write one file here with one function:

1. Its arguments are keyword-only and typed, with defaults where there is a sensible one.
2. It makes one :class:`rolltune.types.Problem` a row: an ``id`` that is unique and does not change when a slice is
   taken, the ``messages`` with the question alone (system prompts, few-shot turns and templates are the config's),
   the gold ``answer`` in canonical form, and a worked ``solution`` if there is one.
3. A bad row or option raises ``ValueError`` that names the file and line, or the option, and what would be right.
4. It returns ``Dataset(problems)``. The order of training is not its business: ``dataset.ProblemStream`` shuffles.

Train and held-out questions must differ. Take them from different splits, or as two slices (``start``, ``count``)
of one list; ``dataset.overlap`` tells which questions stand in both.
"""
