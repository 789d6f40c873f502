"""Every check fails when its fault is planted, by name, and none of the others is blamed for it."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from rolltune.batch import TokenSequence, TrainGroup
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.model.logprobs import selected_logprobs
from rolltune.model.policy import build_policy
from rolltune.prompts import completion_ids
from rolltune.rewards.answer import answer_reward
from rolltune.run import selftest
from rolltune.run.selftest import SelfTestError, full_marks, run_selftest, run_sft_selftest
from rolltune.samplers.native import NativeSampler
from rolltune.types import Group, Problem, Prompt, SampleRequest, SamplingParams, Score

TEMPERATURE = 0.7
FORMAT = "<think>{solution}</think>\n<answer>{answer}</answer>"
RATIO = "sampler and trainer give the same log-probs (ratio 1)"
PACKED = "packed sequences give the model's own log-probs"
TOKENS = "all completion tokens are trained, prompt tokens are not"
EOS = "EOS is trained"
TEXT = "trained tokens decode to the text of the response"
GOLD = "reward `answer` gives the gold answer full marks"
REFERENCE = "KL to the reference is 0 at the start"


@pytest.fixture(scope="module")
def policy(tiny_llama):
    return build_policy(
        ModelConfig(path=str(tiny_llama)), None, device=torch.device("cpu"), seed=0, with_reference=True
    )


@pytest.fixture(scope="module")
def group(policy, tokenizer) -> Group:
    """Three completions that the model ended itself and one that was cut."""
    prompt = Prompt(
        token_ids=tuple(tokenizer("<|user|>What is 2 + 2?<|end|><|assistant|><think>")["input_ids"]), prefill="<think>"
    )
    sampler = NativeSampler(policy.model, tokenizer)
    params = SamplingParams(temperature=TEMPERATURE, max_new_tokens=40)
    (written,) = sampler.generate([SampleRequest(prompt=prompt, seeds=tuple(range(200)))], params)
    ended = [c for c in written if c.finish_reason == "stop" and len(c.token_ids) > 2]
    cut = next(c for c in written if c.finish_reason == "length")
    assert len(ended) >= 3
    completions = (*ended[:2], cut, ended[2])
    return Group(
        problem=Problem(id="p0", messages=(), answer="4", solution="2 + 2 = 4."),
        prompt=prompt,
        completions=completions,
        scores=(Score(total=0.0),) * 4,
    )


def run(policy, *groups, tokenizer, **changes):
    options = {
        "tokenizer": tokenizer,
        "rewards": {"answer": answer_reward},
        "answer_format": FORMAT,
        "temperature": TEMPERATURE,
        "dtype": "float32",
        "sampler_dtype": None,
        "with_reference": True,
        "starts_as_reference": True,
    }
    return run_selftest(policy, groups, **(options | changes))


def failed(checks) -> set[str]:
    return {check.name for check in checks if not check.passed}


def with_completions(group, change) -> Group:
    return dataclasses.replace(group, completions=tuple(map(change, group.completions)))


def change_row(monkeypatch, change) -> None:
    """A batch module that packs wrongly."""
    right = selftest.pack

    def pack(*args, **kwargs):
        return [change(row) for row in right(*args, **kwargs)]

    monkeypatch.setattr(selftest, "pack", pack)


def test_all_is_well(policy, group, tokenizer):
    checks = run(policy, group, tokenizer=tokenizer)
    assert [check.name for check in checks] == [RATIO, PACKED, TOKENS, EOS, TEXT, GOLD, REFERENCE]
    assert failed(checks) == set()
    details = {check.name: check.detail for check in checks}
    assert details[TOKENS].startswith("110 of 110 completion tokens are trained; 24 prompt tokens of 1 prompts")
    assert "of 3 completions that ended is the one that ended them ('<|end|>')" in details[EOS]
    assert details[TEXT] == "4 of 4 completions"
    assert details[GOLD] == "1 on all 1 gold responses"


def test_a_trainer_that_forgets_the_temperature(policy, group, tokenizer, monkeypatch):
    monkeypatch.setattr(
        "rolltune.model.forward.selected_logprobs",
        lambda h, w, t, temperature, *_, **__: selected_logprobs(h, w, t, 1.0),
    )
    assert failed(run(policy, group, tokenizer=tokenizer)) == {RATIO, PACKED}


def test_a_trainer_that_forgets_what_top_p_left_out(policy, group, tokenizer, monkeypatch):
    params = SamplingParams(temperature=TEMPERATURE, top_p=0.9, max_new_tokens=40)
    request = SampleRequest(prompt=group.prompt, seeds=(0, 1, 2, 3))
    (written,) = NativeSampler(policy.model, tokenizer).generate([request], params)
    truncated = dataclasses.replace(group, completions=written)
    assert failed(run(policy, truncated, tokenizer=tokenizer)) == set()
    monkeypatch.setattr("rolltune.model.forward.selected_logprobs", lambda *inputs, **_: selected_logprobs(*inputs[:4]))
    assert failed(run(policy, truncated, tokenizer=tokenizer)) == {RATIO, PACKED}


def test_a_sampler_that_forgets_the_temperature_or_has_old_weights(policy, group, tokenizer):
    stale = with_completions(
        group, lambda c: dataclasses.replace(c, logprobs=tuple(1.1 * logprob for logprob in c.logprobs))
    )
    assert failed(run(policy, stale, tokenizer=tokenizer)) == {RATIO}


def test_one_wrong_token_is_enough(policy, group, tokenizer):
    """A mean over many tokens would hide it, so the largest difference counts too."""
    first, *rest = group.completions
    wrong = dataclasses.replace(first, logprobs=(first.logprobs[0] - 1.1, *first.logprobs[1:]))
    checks = run(policy, dataclasses.replace(group, completions=(wrong, *rest)), tokenizer=tokenizer, dtype="bfloat16")
    assert failed(checks) == {RATIO}
    assert "max 1.1e+00 (at most 1)" in checks[0].detail
    assert float(checks[0].detail.split("mean ")[2].split()[0]) < 0.05


def test_log_probs_that_are_not_numbers(policy, group, tokenizer):
    nan = with_completions(group, lambda c: dataclasses.replace(c, logprobs=(float("nan"),) * len(c.logprobs)))
    assert failed(run(policy, nan, tokenizer=tokenizer)) == {RATIO}


def test_half_precision_is_given_room_for_its_rounding_and_no_more(policy, group, tokenizer):
    def off_by(gap):
        return with_completions(
            group, lambda c: dataclasses.replace(c, logprobs=tuple(logprob + gap for logprob in c.logprobs))
        )

    assert failed(run(policy, off_by(0.04), tokenizer=tokenizer)) == {RATIO}
    assert failed(run(policy, off_by(0.07), tokenizer=tokenizer, dtype="bfloat16")) == set()
    assert failed(run(policy, off_by(0.09), tokenizer=tokenizer, dtype="bfloat16")) == {RATIO}
    assert failed(run(policy, off_by(0.019), tokenizer=tokenizer, dtype="float16")) == set()
    assert failed(run(policy, off_by(0.021), tokenizer=tokenizer, dtype="float16")) == {RATIO}


@pytest.mark.parametrize(
    ("dtype", "sampler_dtype", "room"),
    [
        ("float32", "bfloat16", 0.08),
        ("float32", "float16", 0.02),
        ("bfloat16", "float32", 0.08),
        ("float16", "bfloat16", 0.08),
        ("float32", None, 1e-4),
        ("float32", "a word of its own", 1e-4),
    ],
)
def test_a_sampler_in_another_precision_is_held_to_the_coarser(policy, group, tokenizer, dtype, sampler_dtype, room):
    def off_by(gap):
        return with_completions(
            group, lambda c: dataclasses.replace(c, logprobs=tuple(logprob + gap for logprob in c.logprobs))
        )

    options = {"tokenizer": tokenizer, "dtype": dtype, "sampler_dtype": sampler_dtype}
    assert failed(run(policy, off_by(0.9 * room), **options)) == set()
    assert failed(run(policy, off_by(1.1 * room), **options)) == {RATIO}


def test_the_packed_rows_of_a_coarsely_sampled_policy_are_held_to_its_own(policy, group, tokenizer, monkeypatch):
    def blurred(*inputs, **options):
        logprobs, entropy = selected_logprobs(*inputs, **options)
        return logprobs + 0.01, entropy

    monkeypatch.setattr("rolltune.model.forward.selected_logprobs", blurred)
    assert failed(run(policy, group, tokenizer=tokenizer, sampler_dtype="bfloat16")) == {PACKED}


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_packed_rows_of_half_precision_weights_are_compared_in_float32(tiny_llama, group, tokenizer, monkeypatch, lora):
    config = ModelConfig(path=str(tiny_llama), dtype="bfloat16")
    half = build_policy(config, lora, device=torch.device("cpu"), seed=0, with_reference=True)
    before = [parameter.clone() for parameter in half.model.parameters()]
    assert PACKED not in failed(run(half, group, tokenizer=tokenizer, dtype="bfloat16"))
    after = list(half.model.parameters())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def blurred(*inputs, **options):
        logprobs, entropy = selected_logprobs(*inputs, **options)
        return logprobs + 0.01, entropy

    monkeypatch.setattr("rolltune.model.forward.selected_logprobs", blurred)
    assert PACKED in failed(run(half, group, tokenizer=tokenizer, dtype="bfloat16"))


def test_eos_dropped_where_completions_become_training_sequences(policy, group, tokenizer, monkeypatch):
    right = selftest.train_group

    def without_eos(group, advantages):
        trained = right(group, advantages)
        cut = [dataclasses.replace(s, token_ids=s.token_ids[:-1], logprobs=s.logprobs[:-1]) for s in trained.sequences]
        return dataclasses.replace(trained, sequences=tuple(cut))

    monkeypatch.setattr(selftest, "train_group", without_eos)
    # The completion that was cut loses a letter of its text; the others lose what no text shows.
    assert failed(run(policy, group, tokenizer=tokenizer)) == {TOKENS, EOS, TEXT}


def test_eos_masked_with_the_padding(policy, group, tokenizer, monkeypatch):
    end = tokenizer.eos_token_id

    def mask(row):
        keep = row.target_ids != end
        names = ("predictor_index", "target_ids", "target_sequence_index", "advantages", "sampler_logprobs")
        return dataclasses.replace(row, **{name: getattr(row, name)[keep] for name in names})

    change_row(monkeypatch, mask)
    assert failed(run(policy, group, tokenizer=tokenizer)) == {TOKENS, EOS, PACKED}
    ended = dataclasses.replace(group, completions=group.completions[:2])
    checks = run(policy, ended, tokenizer=tokenizer)
    assert failed(checks) == {TOKENS, EOS, PACKED}
    first = len(ended.completions[0].token_ids)
    assert f"{first - 1} trained tokens in a completion of {first}" in [check.detail for check in checks]
    # Nothing is left of a completion that is EOS alone.
    nothing = dataclasses.replace(group.completions[0], token_ids=(end,), logprobs=(-1.0,), text="<think>")
    with_nothing = dataclasses.replace(group, completions=(*group.completions, nothing))
    assert failed(run(policy, with_nothing, tokenizer=tokenizer)) == {TOKENS, EOS, PACKED}


def test_a_prompt_token_is_trained(policy, group, tokenizer, monkeypatch):
    def add(row):
        last = len(group.prompt.token_ids) - 1
        logprob = torch.full((1,), -1.0)
        return dataclasses.replace(
            row,
            predictor_index=torch.cat([torch.tensor([last - 1]), row.predictor_index]),
            target_ids=torch.cat([row.input_ids[last : last + 1], row.target_ids]),
            target_sequence_index=torch.cat([torch.tensor([0]), row.target_sequence_index]),
            advantages=torch.cat([torch.ones(1), row.advantages]),
            sampler_logprobs=torch.cat([logprob, row.sampler_logprobs]),
        )

    change_row(monkeypatch, add)
    assert TOKENS in failed(run(policy, group, tokenizer=tokenizer))


def test_targets_one_place_off(policy, group, tokenizer, monkeypatch):
    """Each token predicted by the hidden state of itself: the classic shift."""

    def shift(row):
        return dataclasses.replace(row, predictor_index=(row.predictor_index + 1).clamp(max=len(row.input_ids) - 1))

    change_row(monkeypatch, shift)
    assert {RATIO, PACKED} <= failed(run(policy, group, tokenizer=tokenizer))


def test_completions_that_see_each_other(policy, group, tokenizer, monkeypatch):
    change_row(monkeypatch, lambda row: dataclasses.replace(row, sequence_index=row.sequence_index.clamp(max=0)))
    assert failed(run(policy, group, tokenizer=tokenizer)) >= {RATIO, PACKED}


def test_positions_that_go_on_behind_a_sibling(policy, group, tokenizer, monkeypatch):
    change_row(monkeypatch, lambda row: dataclasses.replace(row, position_ids=torch.arange(len(row.input_ids))))
    assert failed(run(policy, group, tokenizer=tokenizer)) == {RATIO, PACKED}


@pytest.mark.parametrize(
    "change",
    [lambda text: text.removeprefix("<think>"), lambda text: "<think>" + text, lambda text: text[:-1]],
    ids=["no prefill", "prefill twice", "cut"],
)
def test_text_that_is_not_that_of_the_ids(policy, group, tokenizer, change):
    rewritten = with_completions(group, lambda c: dataclasses.replace(c, text=change(c.text)))
    checks = run(policy, rewritten, tokenizer=tokenizer)
    assert failed(checks) == {TEXT} and "0 of 4 completions" in [check.detail for check in checks]


def test_gold_answer_that_the_reward_does_not_take(policy, group, tokenizer):
    checks = run(policy, group, tokenizer=tokenizer, answer_format="{solution} So it is {answer}.")
    assert failed(checks) == {GOLD}
    (gold,) = [check for check in checks if check.name == GOLD]
    assert gold.detail.startswith("0.0 instead of 1 on 1 of 1 gold responses, first p0")


def test_gold_is_asked_of_every_problem(policy, group, tokenizer):
    def first_only(problem, text):
        return Score(total=float(problem.id == "p0"))

    other = dataclasses.replace(group, problem=Problem(id="p1", messages=(), answer="5"))
    checks = run(policy, group, other, tokenizer=tokenizer, rewards={"answer": first_only})
    assert failed(checks) == {GOLD}
    (gold,) = [check for check in checks if check.name == GOLD]
    assert "on 1 of 2 gold responses, first p1" in gold.detail


def test_full_marks_are_what_the_reward_says(policy, group, tokenizer):
    from functools import partial

    def penalty(problem, text, *, weight=1.0):
        return Score(total=-weight if "2 + 2" in text else 0.0)

    def unscored(problem, text):
        return Score(total=None)

    penalty.full_marks = 0.0
    assert full_marks(penalty) == full_marks(partial(penalty, weight=2.0)) == 0.0
    assert full_marks(unscored) == 1.0
    name = "reward `p` gives the gold answer full marks"
    checks = run(policy, group, tokenizer=tokenizer, rewards={"p": partial(penalty, weight=2.0)})
    assert failed(checks) == {name} and "-2.0 instead of 0 " in next(c.detail for c in checks if c.name == name)
    assert failed(run(policy, group, tokenizer=tokenizer, rewards={"p": penalty}, answer_format="{answer}")) == set()
    assert failed(run(policy, group, tokenizer=tokenizer, rewards={"p": unscored})) == {name}
    penalty.full_marks = None
    checks = run(policy, group, tokenizer=tokenizer, rewards={"p": penalty})
    assert name not in {check.name for check in checks} and failed(checks) == set()


def test_a_reference_that_is_not_the_start(policy, group, tokenizer):
    weight = policy._reference.model.norm.weight
    with torch.no_grad():
        weight.mul_(1.02)
    try:
        checks = run(policy, group, tokenizer=tokenizer)
        assert failed(checks) == {REFERENCE}
        later = run(policy, group, tokenizer=tokenizer, starts_as_reference=False)
        assert failed(later) == set() and later[-1].name == "KL to the reference is finite"
        with torch.no_grad():
            weight.mul_(float("nan"))
        assert failed(run(policy, group, tokenizer=tokenizer, starts_as_reference=False)) == {
            "KL to the reference is finite"
        }
        without = run(policy, group, tokenizer=tokenizer, with_reference=False)
        assert failed(without) == set() and not any("reference" in check.name for check in without)
    finally:
        with torch.no_grad():
            weight.copy_(policy.model.model.norm.weight)


def test_of_two_groups_the_shortest_end_the_longest_and_the_last_are_looked_at(policy, group, tokenizer, monkeypatch):
    """A fault at the end of a microbatch, or of long completions only, must not hide behind a short first group."""
    cut = group.completions[2]
    two = dataclasses.replace(
        cut,
        token_ids=cut.token_ids[:2],
        logprobs=cut.logprobs[:2],
        text="<think>" + tokenizer.decode(cut.token_ids[:2]),
    )
    never_ended = dataclasses.replace(group, completions=(two,), scores=group.scores[:1])
    ended = dataclasses.replace(group, completions=group.completions[:1], scores=group.scores[:1])
    packed = []
    right = selftest.pack
    monkeypatch.setattr(selftest, "pack", lambda groups, **options: packed.append(groups) or right(groups, **options))
    assert failed(run(policy, never_ended, group, ended, tokenizer=tokenizer)) == set()
    first, second = packed.pop()
    assert [s.token_ids for s in first.sequences] == [ended.completions[0].token_ids]
    lengths = {c.token_ids: len(c.token_ids) for c in group.completions}
    shortest_end = min((c.token_ids for c in group.completions if c is not cut), key=lengths.__getitem__)
    assert {s.token_ids for s in second.sequences} == {shortest_end, cut.token_ids, group.completions[3].token_ids}
    (end,) = [c for c in run(policy, never_ended, tokenizer=tokenizer) if c.name == EOS]
    assert end.passed and end.detail.startswith("not checked: no completion")


@pytest.mark.parametrize("place", [0, -1], ids=["the first", "the last"])
def test_a_fault_of_one_completion_is_found(policy, group, tokenizer, monkeypatch, place):
    """The last completion of the second group: its tokens see one that they must not see."""
    other = dataclasses.replace(group, completions=group.completions[1:], scores=group.scores[1:])
    numbers = []

    def change(row):
        sequence = [0, row.num_sequences - 1][place]
        numbers.append(sequence)
        wrong = torch.where(row.sequence_index == sequence, row.position_ids + 3, row.position_ids)
        return dataclasses.replace(row, position_ids=wrong)

    change_row(monkeypatch, change)
    assert failed(run(policy, group, other, tokenizer=tokenizer)) == {RATIO, PACKED}
    assert numbers[0] >= 3 if place else numbers[0] == 0


def test_dropout_that_is_asked_for_is_off_in_old_policy_and_sampler(tiny_llama, tokenizer):
    lora = LoRAConfig(rank=4, dropout=0.5)
    policy = build_policy(
        ModelConfig(path=str(tiny_llama)), lora, device=torch.device("cpu"), seed=0, with_reference=True
    )
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # 0 at the start: an adapter that does nothing has nothing to drop
                parameter.normal_(std=0.1)
    prompt = Prompt(token_ids=(2, 58, 75, 3))
    request = SampleRequest(prompt=prompt, seeds=(1, 2))
    (written,) = NativeSampler(policy.model, tokenizer).generate(
        [request], SamplingParams(temperature=TEMPERATURE, max_new_tokens=8)
    )
    problem = Problem(id="p0", messages=(), answer="4")
    group = Group(problem=problem, prompt=prompt, completions=written, scores=(Score(total=0.0),) * 2)
    checks = run(policy, group, tokenizer=tokenizer)
    assert failed(checks) == {REFERENCE}  # it has been trained, in a way


def test_leaves_no_gradients(policy, group, tokenizer):
    run(policy, group, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="p0: has no gold answer"):
        run(policy, dataclasses.replace(group, problem=Problem(id="p0", messages=())), tokenizer=tokenizer)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Two written responses, with EOS."""
    texts = ["<think>four</think>", "<think>2 + 2 is 4, I am sure</think>\n<answer>4</answer>"]
    prompt = Prompt(
        token_ids=tuple(tokenizer("<|user|>2 + 2?<|end|><|assistant|><think>")["input_ids"]), prefill="<think>"
    )
    return [
        TrainGroup(prompt=prompt, sequences=(TokenSequence(token_ids=completion_ids(text, prompt, tokenizer)),))
        for text in texts
    ], texts


def run_sft(policy, examples, tokenizer):
    written, texts = examples
    return run_sft_selftest(policy, written, responses=texts, tokenizer=tokenizer)


def test_sft_has_a_self_test_too(policy, examples, tokenizer, monkeypatch):
    checks = run_sft(policy, examples, tokenizer)
    assert [check.name for check in checks] == [PACKED, TOKENS, EOS, TEXT] and failed(checks) == set()
    written, texts = examples
    assert failed(run_sft(policy, (written, [texts[0], texts[1] + "!"]), tokenizer)) == {TEXT}
    right = selftest.pack_examples

    def faulty(change):
        monkeypatch.setattr(
            selftest, "pack_examples", lambda *args, **kwargs: [change(row) for row in right(*args, **kwargs)]
        )

    faulty(lambda row: dataclasses.replace(row, position_ids=row.position_ids + 3 * (row.sequence_index >= 0)))
    assert {PACKED} == failed(run_sft(policy, examples, tokenizer))
    keep = ("predictor_index", "target_ids", "target_sequence_index")
    faulty(
        lambda row: dataclasses.replace(
            row, **{n: getattr(row, n)[row.target_ids != tokenizer.eos_token_id] for n in keep}
        )
    )
    assert failed(run_sft(policy, examples, tokenizer)) == {PACKED, TOKENS, EOS}


def test_report_names_all_that_failed_and_raises(policy, group, tokenizer, monkeypatch):
    def show(checks):
        console = Console(file=io.StringIO(), width=200)
        try:
            selftest.print_selftest(checks, group.prompt, group.completions[0].token_ids, tokenizer, console)
        finally:
            shown.append(console.file.getvalue())

    shown: list[str] = []
    show(run(policy, group, tokenizer=tokenizer))
    assert "FAILED" not in shown[0] and shown[0].count("ok ") == 7
    assert "<|user|>What is 2 + 2?<|end|><|assistant|><think>" in shown[0]
    monkeypatch.setattr(selftest, "TOLERANCE", {"float32": (0.0, 0.0)})
    with pytest.raises(SelfTestError) as error:
        show(run(policy, group, tokenizer=tokenizer, answer_format="{answer}"))
    lines = str(error.value).splitlines()
    assert lines[0] == "the self-test before the first step failed, nothing was trained:"
    assert any(line.startswith(f"  {RATIO}: mean ratio") for line in lines)
    assert any(line.startswith(f"  {GOLD}: 0.0 instead of 1") for line in lines)
    assert not any(TEXT in line for line in lines)
    assert shown[1].count("FAILED") == len(lines) - 1
    assert isinstance(error.value, ValueError)
