import random
from dataclasses import replace

import pytest
import torch

from rolltune.batch import TrainGroup, TrainSequence, count_totals, pack, train_group, without_zero_advantages
from rolltune.model.checkpointing import recompute_activations
from rolltune.model.forward import packed_logprobs
from rolltune.model.load import load_model
from rolltune.model.packed_attention import packed_layout
from rolltune.types import Completion, Group, LossTotals, Problem, Prompt, Score


def sequence(ids, advantage=1.0):
    return TrainSequence(token_ids=tuple(ids), logprobs=tuple(-0.1 * i for i in ids), advantage=advantage)


def group(prompt, *sequences):
    return TrainGroup(prompt=Prompt(token_ids=tuple(prompt)), sequences=tuple(sequences))


def test_row_written_out_by_hand():
    """Prompt 10 11 12, completions 20 21 and 30: each completion's first token is predicted by the 12."""
    (row,) = pack([group([10, 11, 12], sequence([20, 21], 0.5), sequence([30], -0.5))], max_tokens=100)
    assert row.input_ids.tolist() == [10, 11, 12, 20]  # a completion's last token predicts nothing
    assert row.position_ids.tolist() == [0, 1, 2, 3]
    assert row.sequence_index.tolist() == [-1, -1, -1, 0]
    assert row.predictor_index.tolist() == [2, 3, 2]
    assert row.target_ids.tolist() == [20, 21, 30]
    assert row.target_sequence_index.tolist() == [0, 0, 1]
    assert row.advantages.tolist() == [0.5, 0.5, -0.5]
    assert row.sampler_logprobs.tolist() == pytest.approx([-2.0, -2.1, -3.0])
    assert row.num_sequences == 2


def test_rows_split_between_completions_and_repeat_the_prompt():
    rows = pack([group([1, 2], *(sequence([5, 6, 7]) for _ in range(3)))], max_tokens=6)
    assert [row.input_ids.tolist() for row in rows] == [[1, 2, 5, 6, 5, 6], [1, 2, 5, 6]]
    assert [row.num_sequences for row in rows] == [2, 1]
    assert rows[1].target_sequence_index.tolist() == [0, 0, 0]


def test_a_completion_longer_than_a_row_is_not_cut():
    rows = pack([group([1], sequence([2])), group([1], sequence(range(2, 50)))], max_tokens=10)
    assert [len(row.target_ids) for row in rows] == [1, 48]


def test_nothing_to_train_gives_no_rows():
    assert pack([], max_tokens=10) == []


def test_totals_and_zero_advantages():
    groups = [group([1], sequence([2, 3], 0.0), sequence([4], 1.0)), group([1], sequence([5], 0.0))]
    assert count_totals(groups) == LossTotals(tokens=4, sequences=3)
    kept = without_zero_advantages(groups)
    assert [[s.token_ids for s in g.sequences] for g in kept] == [[(4,)]]


def test_train_group_pairs_completions_with_advantages():
    completion = Completion(token_ids=(7, 0), logprobs=(-1.0, -2.0), finish_reason="stop", policy_version=0, text="7")
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},), answer="7")
    made = Group(problem=problem, prompt=Prompt(token_ids=(1,)), completions=(completion,), scores=(Score(total=1.0),))
    expected = TrainSequence(token_ids=(7, 0), logprobs=(-1.0, -2.0), advantage=0.25)
    assert train_group(made, [0.25]).sequences[0] == expected
    truncated = replace(made, completions=(replace(completion, support=((7, 8), (0,))),))
    assert train_group(truncated, [0.25]).sequences[0] == replace(expected, support=((7, 8), (0,)))
    with pytest.raises(ValueError, match="zip"):
        train_group(made, [0.25, 0.5])


def test_supports_written_out_by_hand():
    """In the order of the targets; a completion without one has the full vocabulary, which is no ids at all."""
    first = replace(sequence([20, 21], 0.0), support=((3, 20), (21,)))
    second = replace(sequence([30], 1.0), support=((0, 30, 70_000),))
    (row,) = pack([group([10, 11], first, sequence([5, 6]), second)], max_tokens=100)
    assert row.target_ids.tolist() == [20, 21, 5, 6, 30]
    assert row.support is not None
    assert row.support.token_ids.tolist() == [3, 20, 21, 0, 30, 70_000]
    assert row.support.offsets.tolist() == [0, 2, 3, 3, 3, 6]
    assert (row.support.token_ids.dtype, row.support.offsets.dtype) == (torch.int32, torch.int64)
    (kept,) = pack(without_zero_advantages([group([10, 11], first, second)]), max_tokens=100)
    assert kept.support is not None and kept.support.token_ids.tolist() == [0, 30, 70_000]
    apart = pack([group([10, 11], first, sequence([5, 6]))], max_tokens=1)
    assert [row.support is None for row in apart] == [False, True]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


@pytest.mark.parametrize("max_tokens", [1000, 40, 20])
@pytest.mark.parametrize("seed", range(3))
def test_packed_logprobs_equal_a_forward_of_each_completion_alone(model, max_tokens, seed):
    """No attention to siblings, to other prompts or to padding; positions go on from the prompt."""
    rng = random.Random(seed)
    groups = [
        group(
            (rng.randrange(200) for _ in range(rng.randint(1, 9))),
            *(sequence([rng.randrange(200) for _ in range(n)]) for n in (1, rng.randint(1, 12), 5, 1)),
        )
        for _ in range(3)
    ]
    flat = [(g.prompt.token_ids, s.token_ids) for g in groups for s in g.sequences]
    seen = 0
    for row in pack(groups, max_tokens=max_tokens):
        logprobs, entropy = packed_logprobs(model, row, temperature=0.7)
        for i in range(row.num_sequences):
            prompt, completion = flat[seen]
            seen += 1
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
            alone = torch.log_softmax(logits, -1)
            expected = alone.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
            mine = row.target_sequence_index == i
            torch.testing.assert_close(logprobs[mine], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(entropy[mine], -(alone.exp() * alone).sum(-1), atol=1e-5, rtol=1e-5)
    assert seen == len(flat)


def test_packing_does_not_change_the_gradient(model):
    """One row, or a row a completion: the gradient of the sum of log-probs is the same."""
    rng = random.Random(7)
    groups = [group(range(1, 6), *(sequence([rng.randrange(200) for _ in range(n)]) for n in (3, 8, 1, 6)))]
    gradients = []
    for max_tokens in (1000, 1):
        model.zero_grad()
        for row in pack(groups, max_tokens=max_tokens):
            packed_logprobs(model, row, temperature=1.0)[0].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_recomputes_with_the_same_layout(tiny_llama, model):
    """The backward pass runs the layers again, long after the row's forward pass has returned."""
    checkpointed = load_model(str(tiny_llama), dtype="float32", device="cpu")
    recompute_activations(checkpointed)
    runs = []
    checkpointed.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    (row,) = pack([group(range(1, 6), sequence(range(8, 20)), sequence(range(30, 35)))], max_tokens=100)
    (other,) = pack([group(range(9, 12), sequence(range(40, 44)))], max_tokens=100)
    losses = [packed_logprobs(checkpointed, r, temperature=1.0)[0].sum() for r in (row, other)]
    assert len(runs) == 2
    for loss in losses:
        loss.backward()
    assert len(runs) == 4, "once more in each backward pass"
    model.zero_grad()
    for r in (row, other):
        packed_logprobs(model, r, temperature=1.0)[0].sum().backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_layout_written_out_by_hand():
    (row,) = pack([group([1, 2], sequence([3, 4, 5]), sequence([6, 7])), group([8], sequence([9, 10]))], max_tokens=100)
    layout = packed_layout(row)  # row: 1 2 | 3 4 | 6 || 8 | 9
    assert layout.prompts.tolist() == [[0, 1], [5, 0]]
    assert layout.completions.tolist() == [[2, 3], [4, 0], [6, 0]]
    assert layout.prompt_of.tolist() == [0, 0, 1]
    # Columns: two prompt slots, then two completion slots. The third completion's prompt has one token.
    assert layout.visible[2, 0].int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]
    assert layout.visible[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert layout.restore.tolist() == [0, 1, 4, 5, 6, 2, 8]


def test_truncated_completions_can_be_left_out():
    """Overlong filtering: they leave the loss and its denominators, and the others keep their advantages."""

    def completion(ids, reason):
        return Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason=reason, policy_version=0, text="")

    sampled = Group(
        problem=Problem(id="p", messages=()),
        prompt=Prompt(token_ids=(1, 2)),
        completions=(completion((3, 4), "stop"), completion((5, 6, 7), "length"), completion((8,), "stop")),
        scores=(Score(total=1.0), Score(total=0.0), Score(total=0.0)),
    )
    kept = train_group(sampled, [1.5, -0.5, -1.0], mask_truncated=True)
    assert [(s.token_ids, s.advantage) for s in kept.sequences] == [((3, 4), 1.5), ((8,), -1.0)]
    assert count_totals([kept]) == LossTotals(tokens=3, sequences=2)
    assert len(train_group(sampled, [1.5, -0.5, -1.0]).sequences) == 3
    all_cut = replace(sampled, completions=(sampled.completions[1],) * 3)
    assert pack([train_group(all_cut, [1.0, 0.0, -1.0], mask_truncated=True)], max_tokens=9) == []
