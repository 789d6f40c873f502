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
from rolltune.rewards.combine import PendingScore, WeightedReward
from rolltune.rollout import check_versions, collect, has_signal, is_trainable, sample_groups, score_groups
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
    for said in on_ranks(2, lambda world: check(world, (-1, 3, -1))):
        assert (
            said is not None
            and said.startswith("3 completions")
            and "version 4: 2 by version -1, 1 by version 3" in said
        )


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


class Scorer:
    """A reward that sees the completion."""

    def __init__(self, score):
        self.score = score

    def __call__(self, problem, text, *, completion):
        return self.score(problem, completion)


def sample(names, *, group_size=3, seed=(0, 1), score=lambda problem, completion: Score(total=0.0), **options):
    reward = WeightedReward(rewards={"only": (Scorer(score), 1.0)})
    pending = sample_groups(
        problems(*names),
        render=lambda problem: Prompt(token_ids=(len(problem.id),), prefill=problem.id),
        sampler=options.pop("sampler", EchoSampler()),
        reward=reward,
        params=options.pop("params", PARAMS),
        group_size=group_size,
        seed=seed,
        **options,
    )
    return score_groups(pending, reward)


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

    class Reward(WeightedReward):
        def begin(self, problem, completion):
            order.append(("begin", problem.id))
            return PendingScore(problem=problem, completion=completion, judged={})

        def finish(self, pending):
            order.append(("finish", pending.problem.id))
            return Score(total=1.0)

    reward = Reward(rewards={"only": (lambda problem, text: Score(total=0.0), 1.0)})
    pending = sample_groups(
        problems("a", "b"),
        render=lambda problem: Prompt(token_ids=(1,)),
        sampler=EchoSampler(),
        reward=reward,
        params=PARAMS,
        group_size=2,
        seed=(0,),
    )
    score_groups(pending, reward)
    assert order == [("begin", "b")] * 2 + [("begin", "a")] * 2 + [("finish", "a")] * 2 + [("finish", "b")] * 2


def test_prompts_are_rendered_once_and_scores_stay_with_their_completions():
    sampler, seen = EchoSampler(), []

    def score(problem, completion):
        seen.append((problem.id, completion.text))
        return Score(total=float(completion.text[-1]), notes={problem.id: "seen"})

    progress = []
    groups = sample(["a", "bb"], sampler=sampler, score=score, on_progress=lambda *done: progress.append(done))
    ((requests, params),) = sampler.calls
    assert [(r.prompt.token_ids, r.prompt.prefill) for r in requests] == [((1,), "a"), ((2,), "bb")]
    assert params is PARAMS and progress == [(1, 1)]
    assert seen == [(g.problem.id, c.text) for g in groups for c in g.completions]
    for group, request in zip(groups, requests, strict=True):
        assert group.prompt is request.prompt
        assert [s.total for s in group.scores] == [float(c.text[-1]) for c in group.completions]
        assert all(set(s.notes) == {f"only/{group.problem.id}"} for s in group.scores)


class TruncatingSampler(EchoSampler):
    """Reports ``support`` for every completion, whatever that is."""

    def __init__(self, support):
        super().__init__()
        self.support = support

    def generate(self, requests, params, **options):
        written = super().generate(requests, params, **options)
        return [tuple(replace(c, support=self.support) for c in each) for each in written]


@pytest.mark.parametrize("support", [None, (), ((1, 2), (3,)), ((),)], ids=["none", "no token", "one more", "empty"])
def test_a_sampler_that_does_not_report_the_kept_tokens_is_refused(support):
    params = SamplingParams(max_new_tokens=4, top_p=0.9, top_k=7)
    with pytest.raises(ValueError, match="sampling.top_p: 0.9, sampling.top_k: 7: TruncatingSampler"):
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


def group_mean(rewards):
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


# --- collect ----------------------------------------------------------------------------------------------------------


def collect_on(size: int, has_variance, *, num_problems=12, data_position=0, **options):
    """Rollouts of all ranks; ``has_variance`` says it for each problem number."""
    dataset = Dataset(problems(*map(str, range(num_problems))))

    def on_rank(world):
        def sample(mine):
            return [make_group(p.id, [0.0, 1.0] if has_variance(int(p.id)) else [1.0, 1.0]) for p in mine]

        stream = ProblemStream(dataset, seed=0)
        return collect(stream, data_position, world, sample, advantage=group_mean, **options)

    return on_ranks(size, on_rank)


def kept_names(rollouts) -> dict[int, str]:
    kept = [(s.number, s.group.problem.id) for rollout in rollouts for s in rollout.groups if s.number is not None]
    assert len(kept) == len(dict(kept))
    return dict(kept)


def test_trained_groups_carry_the_advantages_of_their_scored_completions():
    totals = {"0": [0.0, None, 1.0], "1": [None, 1.0], "2": [1.0, 3.0], "3": [2.0, 2.0]}
    stream = ProblemStream(Dataset(problems(*totals)), seed=0)

    def sample(mine):
        return [make_group(p.id, totals[p.id]) for p in mine]

    def rollout(**options):
        return collect(stream, 0, ALONE, sample, advantage=group_mean, num_groups=4, **options)

    plain = {s.group.problem.id: s.advantages for s in rollout().groups}
    assert plain == {"0": (-0.5, 0.5), "1": None, "2": (-1.0, 1.0), "3": (0.0, 0.0)}
    minibatches = [rollout().minibatch(i, 2) for i in range(2)]
    trained = {group.problem.id: (group.rewards, advantages) for each in minibatches for group, advantages in each}
    assert trained == {"0": ([0.0, 1.0], (-0.5, 0.5)), "2": ([1.0, 3.0], (-1.0, 1.0)), "3": ([2.0, 2.0], (0.0, 0.0))}
    names = [[group.problem.id for group, _ in each] for each in minibatches]
    taken = [problem.id for problem in stream.take(0, 4)]
    assert names == [[name for name in half if name != "1"] for half in (taken[:2], taken[2:])]
    dynamic = rollout(dynamic_rounds=1)
    assert dynamic.num_kept == 2 and {g.problem.id for g, _ in dynamic.minibatch(0, 1)} == {"0", "2"}


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
        assert [s.number for s in rollout.groups] == list(range(rank, 8, size))


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
    assert rollout.num_kept == len(kept_names([rollout])) <= 1
    (nothing,) = collect_on(1, lambda number: False, num_groups=4, dynamic_rounds=3)
    assert (nothing.num_kept, kept_names([nothing]), nothing.data_position) == (0, {}, 12)
    assert all(sampled.advantages is None for sampled in nothing.groups) and nothing.minibatch(0, 1) == []


def test_one_round_is_one_draw():
    (rollout,) = collect_on(1, lambda number: True, num_groups=4, dynamic_rounds=5)
    assert rollout.data_position == rollout.num_kept == 4


def test_the_position_continues_where_the_step_before_stopped():
    dataset = Dataset(problems(*map(str, range(5))))
    stream, seen, data_position = ProblemStream(dataset, seed=1), [], 0
    for _ in range(5):
        rollout = collect(
            stream,
            data_position,
            ALONE,
            lambda mine: [make_group(p.id, [0.0, 1.0]) for p in mine],
            advantage=group_mean,
            num_groups=4,
        )
        seen += [g.problem.id for g in rollout.sampled]
        data_position = rollout.data_position
    assert data_position == 20
    for epoch in range(4):  # each problem once an epoch, across the borders of steps
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == list("01234")
