"""Which groups a step trains on: the same for every number of processes and every order."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_world import on_ranks

from rolltune.data.dataset import Dataset, ProblemStream
from rolltune.distributed import World
from rolltune.errors import SyncError
from rolltune.rollout import check_versions, collect, has_signal, is_trainable, sample_groups
from rolltune.types import Completion, Group, Problem, Prompt, SamplingParams, Score

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
PARAMS = SamplingParams(max_new_tokens=4)


def make_group(name: str, totals: list[float | None]) -> Group:
    return Group(
        problem=Problem(id=name, messages=()),
        prompt=Prompt(token_ids=(1,)),
        completions=tuple(
            Completion(token_ids=(i,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text=str(i))
            for i in range(len(totals))
        ),
        scores=tuple(Score(total=total) for total in totals),
    )


# --- versions ---------------------------------------------------------------------------------------------------------


def test_completions_of_other_weights_are_refused_on_all_ranks():
    completions = make_group("a", [0.0, 1.0, 2.0]).completions

    def check(world: World, versions: tuple[int, ...]) -> str | None:
        mine = versions if world.rank == 1 else (4, 4, 4)
        written = [replace(c, policy_version=v) for c, v in zip(completions, mine, strict=True)]
        try:
            check_versions(written, 4, world)
        except SyncError as error:
            return str(error)

    assert on_ranks(2, lambda world: check(world, (4, 4, 4))) == [None, None]
    said = (
        "3 completions were not written by the policy's weights, which are of version 4: 2 by version -1, 1 by "
        "version 3 (-1: of another run, or of several versions)"
    )
    assert on_ranks(2, lambda world: check(world, (-1, 3, -1))) == [said] * 2


# --- sample_groups ----------------------------------------------------------------------------------------------------


class EchoSampler:
    """Writes its seed and the prompt, so that a completion shows what it was made of."""

    def __init__(self):
        self.calls = []

    def sync(self, version):
        self.version = version

    def generate(self, requests, params, *, on_progress=None, on_completion=None):
        self.calls.append((requests, params))
        if on_progress:
            on_progress(1, 1)
        written = [
            tuple(
                Completion(
                    token_ids=request.prompt.token_ids,
                    logprobs=(0.0,),
                    finish_reason="stop",
                    policy_version=0,
                    text=str(seed),
                )
                for seed in request.seeds
            )
            for request in requests
        ]
        for i in reversed(range(len(written))):  # they end in any order
            for j, completion in enumerate(written[i]):
                assert on_completion is not None
                on_completion(i, j, completion)
        return written


def problems(*names: str) -> list[Problem]:
    return [Problem(id=name, messages=(), answer=name) for name in names]


def sample(names, *, group_size=3, seed=(0, 1), score=lambda problem, completion: Score(total=0.0), **options):
    return sample_groups(
        problems(*names),
        render=lambda problem: Prompt(token_ids=(len(problem.id),), prefill=problem.id),
        sampler=options.pop("sampler", EchoSampler()),
        begin_score=lambda problem, completion: lambda: score(problem, completion),
        params=options.pop("params", PARAMS),
        group_size=group_size,
        seed=seed,
        **options,
    )


def texts(groups) -> dict[str, list[str]]:
    return {group.problem.id: [c.text for c in group.completions] for group in groups}


def test_a_completion_depends_on_seed_problem_and_number_alone():
    together = texts(sample(["a", "b", "c"]))
    assert list(together) == ["a", "b", "c"]
    assert texts(sample(["c"])) | texts(sample(["b", "a"])) == together
    more = texts(sample(["b"], group_size=5))["b"]
    assert more[:3] == together["b"]
    everything = [text for group in together.values() for text in group]
    assert len(set(everything)) == 9
    for other in ((0, 2), (1, 1)):  # the next step, another run
        assert not set(everything) & {t for group in texts(sample(["a", "b", "c"], seed=other)).values() for t in group}


def test_all_are_begun_before_any_is_waited_for():
    order = []

    def begin(problem, completion):
        order.append(("begin", problem.id))
        return lambda: order.append(("finish", problem.id)) or Score(total=1.0)

    sample_groups(
        problems("a", "b"),
        render=lambda problem: Prompt(token_ids=(1,)),
        sampler=EchoSampler(),
        begin_score=begin,
        params=PARAMS,
        group_size=2,
        seed=(0,),
    )
    assert order == [("begin", "b")] * 2 + [("begin", "a")] * 2 + [("finish", "a")] * 2 + [("finish", "b")] * 2


def test_prompts_are_rendered_once_and_scores_stay_with_their_completions():
    sampler, seen = EchoSampler(), []

    def score(problem, completion):
        seen.append((problem.id, completion.text))
        return Score(total=float(completion.text[-1]), parts={problem.id: 1.0})

    progress = []
    groups = sample(["a", "bb"], sampler=sampler, score=score, on_progress=lambda *done: progress.append(done))
    ((requests, params),) = sampler.calls
    assert [(r.prompt.token_ids, r.prompt.prefill) for r in requests] == [((1,), "a"), ((2,), "bb")]
    assert params is PARAMS and progress == [(1, 1)]
    assert seen == [(g.problem.id, c.text) for g in groups for c in g.completions]
    for group, request in zip(groups, requests, strict=True):
        assert group.prompt is request.prompt
        assert [s.total for s in group.scores] == [float(c.text[-1]) for c in group.completions]
        assert all(set(s.parts) == {group.problem.id} for s in group.scores)


class TruncatingSampler(EchoSampler):
    """Says what it drew from as ``support``, whatever that is."""

    def __init__(self, support):
        super().__init__()
        self.support = support

    def generate(self, requests, params, **options):
        written = super().generate(requests, params, **options)
        return [tuple(replace(c, support=self.support) for c in each) for each in written]


@pytest.mark.parametrize("support", [None, (), ((1, 2), (3,)), ((),)], ids=["none", "no token", "one more", "empty"])
def test_a_sampler_that_does_not_say_what_it_drew_from_is_refused(support):
    params = SamplingParams(max_new_tokens=4, top_p=0.9, top_k=7)
    message = "sampling.top_p: 0.9, sampling.top_k: 7: TruncatingSampler does not say what they left to draw from"
    with pytest.raises(ValueError, match=message):
        sample(["a", "b"], sampler=TruncatingSampler(support), params=params)


def test_supports_stay_with_their_completions():
    params = SamplingParams(max_new_tokens=4, top_k=7)
    groups = sample(["a", "b"], sampler=TruncatingSampler(((1, 2),)), params=params)
    assert [c.support for group in groups for c in group.completions] == [((1, 2),)] * 6
    assert len(sample(["a"], params=SamplingParams(max_new_tokens=4, temperature=0.0, top_k=7))) == 1, "greedy has none"


# --- what teaches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("totals", "signal", "trainable"), [
    ([0.0, 1.0], True, True),
    ([1.0, 1.0, 1.0], False, True),
    ([0.0, 0.0, 1e-9], True, True),
    ([1.0], False, False),
    ([], False, False),
    ([None, None], False, False),
    ([None, 1.0], False, False),  # an unscored one is not a 0
    ([None, 1.0, 1.0], False, True),
    ([0.0, None, 1.0], True, True),
])  # fmt: skip
def test_signal(totals, signal, trainable):
    group = make_group("p", totals)
    assert (has_signal(group), is_trainable(group)) == (signal, trainable)


def test_unscored_completions_leave_their_group():
    scored = make_group("p", [0.0, None, 1.0, None]).scored()
    assert [c.text for c in scored.completions] == ["0", "2"] and scored.rewards == [0.0, 1.0]


# --- collect ----------------------------------------------------------------------------------------------------------


def collect_on(size: int, has_variance, *, num_problems=12, data_position=0, **options):
    """Rollouts of all ranks; ``has_variance`` says it for each problem number."""
    dataset = Dataset(problems(*map(str, range(num_problems))))

    def on_rank(world):
        def sample(mine):
            return [make_group(p.id, [0.0, 1.0] if has_variance(int(p.id)) else [1.0, 1.0]) for p in mine]

        return collect(ProblemStream(dataset, seed=0), data_position, world, sample, **options)

    return on_ranks(size, on_rank)


def kept_names(rollouts) -> dict[int, str]:
    numbers = [number for rollout in rollouts for number in rollout.kept]
    assert len(numbers) == len(set(numbers))
    return {n: group.problem.id for rollout in rollouts for n, group in rollout.kept.items()}


def order(count, num_problems=12, data_position=0) -> list[str]:
    stream = ProblemStream(Dataset(problems(*map(str, range(num_problems)))), seed=0)
    return [problem.id for problem in stream.take(data_position, count)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_without_dynamic_sampling_every_group_is_kept_in_the_streams_order(size):
    rollouts = collect_on(size, lambda number: False, num_groups=8, data_position=3)
    assert kept_names(rollouts) == dict(enumerate(order(8, data_position=3)))
    assert [(r.num_kept, r.data_position, len(r.sampled)) for r in rollouts] == [(8, 11, 8 // size)] * size
    for rank, rollout in enumerate(rollouts):
        assert [g.problem.id for g in rollout.sampled] == order(8, data_position=3)[rank::size]
        assert list(rollout.kept.values()) == rollout.sampled


@settings(max_examples=25, deadline=None)
@given(
    flags=st.lists(st.booleans(), min_size=12, max_size=12),
    size=st.sampled_from([2, 3, 4]),
    num_groups=st.sampled_from([4, 6]),
    rounds=st.integers(0, 4),
    data_position=st.integers(0, 30),
)
def test_any_number_of_processes_keeps_the_same(flags, size, num_groups, rounds, data_position):
    options = {"num_groups": num_groups, "dynamic_rounds": rounds, "data_position": data_position}
    (alone,) = collect_on(1, flags.__getitem__, **options)
    rollouts = collect_on(size, flags.__getitem__, **options)
    assert kept_names(rollouts) == kept_names([alone])
    assert {(r.num_kept, r.data_position) for r in rollouts} == {(alone.num_kept, alone.data_position)}
    together = sorted(g.problem.id for r in rollouts for g in r.sampled)
    assert together == sorted(g.problem.id for g in alone.sampled)
    # What is kept is the first num_groups of all that were drawn and have variance.
    taken = order(alone.data_position - data_position, data_position=data_position)
    wanted = [name for name in taken if not rounds or flags[int(name)]][:num_groups]
    assert kept_names([alone]) == dict(enumerate(wanted)) and alone.num_kept == len(wanted)


def test_refills_until_there_are_enough():
    (rollout,) = collect_on(1, lambda number: number % 2 == 0, num_groups=4, dynamic_rounds=10)
    drawn = order(len(rollout.sampled))
    useful = [name for name in drawn if int(name) % 2 == 0]
    assert [g.problem.id for g in rollout.sampled] == drawn
    assert kept_names([rollout]) == dict(enumerate(useful[:4])) and rollout.num_kept == 4
    assert rollout.data_position == len(drawn)
    # The draw before the last was not enough: no round is spent for nothing.
    assert sum(int(name) % 2 == 0 for name in drawn[:-4]) < 4


def test_gives_up_after_the_last_round_with_what_there_is():
    (rollout,) = collect_on(1, lambda number: number == 5, num_groups=4, dynamic_rounds=2)
    assert rollout.data_position == len(rollout.sampled) == 8
    assert rollout.num_kept == len(rollout.kept) <= 1
    (nothing,) = collect_on(1, lambda number: False, num_groups=4, dynamic_rounds=3)
    assert (nothing.num_kept, nothing.kept, nothing.data_position) == (0, {}, 12)


def test_one_round_is_one_draw():
    (rollout,) = collect_on(1, lambda number: True, num_groups=4, dynamic_rounds=5)
    assert rollout.data_position == rollout.num_kept == 4


def test_the_cursor_goes_on_where_the_step_before_stopped():
    dataset = Dataset(problems(*map(str, range(5))))
    stream, seen, data_position = ProblemStream(dataset, seed=1), [], 0
    for _ in range(5):
        rollout = collect(
            stream, data_position, ALONE, lambda mine: [make_group(p.id, [0.0, 1.0]) for p in mine], num_groups=4
        )
        seen += [g.problem.id for g in rollout.sampled]
        data_position = rollout.data_position
    assert data_position == 20
    for epoch in range(4):  # each problem once an epoch, across the borders of steps
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == list("01234")
