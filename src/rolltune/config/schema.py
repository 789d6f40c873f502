"""The keys of each recipe's config, typed. Loading and checking them is :mod:`rolltune.config`.

A field of type ``Component`` is a node with a ``_component_``: the dotted path of a class or function, and its
arguments beside it. A new option belongs to the arguments of a component wherever it can; the keys
below are frozen by a test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omegaconf import MISSING

Component = dict[str, Any]

# What judges a turn where a config names nothing else.
_ANSWER = partial(dict, _component_="rolltune.rewards.answer.answer_reward")
_LENIENT = partial(dict, _component_="rolltune.rewards.answer.lenient_answer_reward")
_FORMAT = partial(dict, _component_="rolltune.rewards.format.format_reward")


@dataclass(kw_only=True)
class ModelConfig:
    """The policy's weights: where they come from, and the precision they are held in."""

    path: str = MISSING  # a Hub id, a local folder, or "smollm2-135m-instruct" (packaged, needs no network)
    dtype: str = "float32"  # float32, bfloat16 or float16: weights, products; log-softmax and losses are always fp32
    master_weights: bool = False  # the optimizer steps an fp32 copy, so that small updates stay; float16 needs it
    fp32_head: bool = False  # with bfloat16 or float16: fp32 logits, in the trainer and the sampler
    batch_invariant: bool = False  # grpo, float32 on a CPU: sampler and trainer agree to the last bit, at some speed
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 1/3 more time


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters (peft). Left out of a config, every weight is trained."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"  # or module names with commas between: "q_proj,v_proj"


@dataclass(kw_only=True)
class DataConfig:
    train: Component = MISSING  # called without further arguments; gives the problems to train on
    heldout: Component = MISSING  # never trained on; greedy accuracy on it picks the best checkpoint


@dataclass(kw_only=True)
class FewShotExample:
    """A few-shot example: one user turn and its answer."""

    user: str = MISSING
    assistant: str = MISSING


@dataclass(kw_only=True)
class PromptConfig:
    """What stands around a problem, all of it rendered by the model's own chat template."""

    system: str | None = None
    few_shot: list[FewShotExample] = field(
        default_factory=list
    )  # [{user: ..., assistant: ...}], in front of each problem
    prefill: str = ""  # start of the assistant's turn ("<think>"); rewards see it as written by the model
    chat_template: str | None = None  # a Jinja file, for base models that have no template of their own


@dataclass(kw_only=True)
class SamplingConfig:
    """The distribution that completions are sampled from; the trainer's log-probs are of the same one."""

    group_size: int = 8  # completions of each prompt
    temperature: float = 1.0
    # What these two keep is held for each token until it is trained on: a top_k bounds what a flat distribution takes.
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)  # strings that end a completion


@dataclass(kw_only=True)
class BatchConfig:
    """How the completions of a step become optimizer steps."""

    prompts_per_step: int = 8  # over all processes
    num_iterations: int = 1  # passes over the completions of one step
    minibatches: int = 1  # optimizer steps in each pass; whole groups, so it divides prompts_per_step
    microbatch_tokens: int = 4096  # tokens in one forward and backward pass: bounds activation memory
    dynamic_sampling_rounds: int = 0  # DAPO: redraw groups without variance, at most so many rounds; 0: keep them all
    max_unscored: float = 0.5  # share of a step's completions without a score, above which the run stops


@dataclass(kw_only=True)
class EvalConfig:
    """Greedy accuracy on held-out problems, independent of the training reward."""

    every_n_steps: int = 10  # also before the first step and after the last
    max_problems: int = 200
    max_new_tokens: int | None = None  # null: as in sampling
    correct: Component = field(default_factory=_ANSWER)  # a turn is right where it gives 1; or a judge's class
    lenient: Component | None = field(default_factory=_LENIENT)  # the same, whatever the form; null: not measured
    overoptimization: Component | None = (
        None  # grpo: a rolltune.rewards.checks.overoptimization.OveroptimizationCheck, the alarm for a hacked judge
    )


@dataclass(kw_only=True)
class CheckpointConfig:
    every_n_steps: int = 10
    keep_last: int = 2  # besides the best


@dataclass(kw_only=True)
class LoggingConfig:
    """Metrics always go to <output_dir>/metrics.jsonl."""

    wandb: bool = False  # offline where no WANDB_API_KEY is set
    wandb_project: str = "rolltune"
    tensorboard: bool = False
    samples_every_n_steps: int = 1  # sample tables in <output_dir>/samples/
    classifier: Component | None = None  # grpo: a rolltune.behaviours.BehaviourClassifier, asked beside the training
    classified_samples: int = 8  # completions of each step that it reads


@dataclass(kw_only=True)
class GRPOConfig:
    """recipes/grpo.py"""

    output_dir: str = MISSING
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    resume: bool = False  # go on from the last checkpoint in output_dir, if there is one
    dry_run: bool = False  # check everything, print config, tokens and memory, load no weights
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rewards: dict[str, Component] = field(default_factory=dict)  # name -> component and its `weight`
    answer_format: str = "<think>{solution}</think>\n<answer>{answer}</answer>"  # a right turn, for the self-test
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampler: Component = MISSING  # called with (model, tokenizer); a class or function of rolltune.samplers
    advantage: Component = MISSING  # called with the rewards of a group; gives one number a completion
    loss: Component = MISSING  # a class of rolltune.losses
    old_policy: str = "trainer"  # policy that the ratio is taken to: trainer, or sampler (verl's bypass mode)
    correction: Component | None = None  # a class of rolltune.corrections, for sampler/trainer mismatch; null: none
    mismatch: Component | None = None  # a rolltune.mismatch.MismatchLimit, which stops the run; null: measured alone
    optimizer: Component = MISSING  # called with the parameters
    lr_scheduler: Component | None = None  # called with (optimizer, num_training_steps=...); null: a constant rate
    num_steps: int = MISSING
    max_grad_norm: float = 1.0
    loss_scale: Component | None = None  # with float16: rolltune.loss_scale.LossScale; null: that, with its defaults
    batch: BatchConfig = field(default_factory=BatchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(kw_only=True)
class SFTBatchConfig:
    examples_per_step: int = 16  # over all processes
    microbatch_tokens: int = 4096


@dataclass(kw_only=True)
class SFTConfig:
    """recipes/sft.py"""

    output_dir: str = MISSING
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    dry_run: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    answer_format: str = "<think>{solution}</think>\n<answer>{answer}</answer>"  # the turn that is learnt
    optimizer: Component = MISSING  # called with the parameters
    lr_scheduler: Component | None = None  # called with (optimizer, num_training_steps=...); null: a constant rate
    num_steps: int = MISSING
    max_grad_norm: float = 1.0
    loss_scale: Component | None = None  # with float16: rolltune.loss_scale.LossScale; null: that, with its defaults
    batch: SFTBatchConfig = field(default_factory=SFTBatchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(kw_only=True)
class AuditRewardsConfig:
    """recipes/audit_rewards.py"""

    output_dir: str = MISSING
    seed: int = 0
    dry_run: bool = False
    data: Component = MISSING
    rewards: dict[str, Component] = field(default_factory=dict)
    answer_format: str = "<think>{solution}</think>\n<answer>{answer}</answer>"
    max_problems: int | None = None  # None: all of them


@dataclass(kw_only=True)
class LintRubricsConfig:
    """recipes/lint_rubrics.py"""

    output_dir: str = MISSING
    dry_run: bool = False
    data: Component = MISSING  # problems with rubrics, such as rolltune.data.rubrics.rubric_jsonl
    max_problems: int | None = None  # None: all of them
    fewest_criteria: int = 7  # a rubric with fewer or more is warned of
    most_criteria: int = 20


@dataclass(kw_only=True)
class AuditJudgeConfig:
    """recipes/audit_judge.py"""

    output_dir: str = MISSING
    seed: int = 0  # of the bootstrap
    dry_run: bool = False  # check everything, show one question, ask nothing
    data: Component = MISSING  # labelled verdicts: rolltune.data.judge_labelled.judge_labelled
    judge: Component = MISSING  # rolltune.rewards.judges.endpoint.EndpointJudge, or one of your own
    template: str | None = None  # a file in place of the packaged prompt, as the reward takes one
    one_call: bool = True  # all criteria of a response in one question; false: a question for each
    reversed: bool = False  # ask with the criteria in reversed order, too
    repeats: int = 1  # times that all is asked, each by a further seed of the judge, whose caps hold for each
    resamples: int = 2000  # of the bootstrap over responses
    min_accuracy: float | None = None  # below it the exit status is 1
    min_kappa: float | None = None  # the same


@dataclass(kw_only=True)
class WriteTracesConfig:
    """recipes/write_traces.py"""

    output_dir: str = MISSING  # traces.jsonl is written there; a run that was stopped goes on where it was
    seed: int = 0
    dry_run: bool = False  # check everything, show one prompt or trace, write nothing
    data: Component = MISSING  # the problems that traces are written for
    writer: Component = MISSING  # a class of rolltune.traces: worked out by a program, or asked of an endpoint
    correct: Component = field(default_factory=_ANSWER)  # its verdict is recorded with each trace
    traces_per_problem: int = 1
    max_concurrency: int = 16  # traces in the making at once


@dataclass(kw_only=True)
class WriteRubricsConfig:
    """recipes/write_rubrics.py"""

    output_dir: str = MISSING  # rubrics.jsonl is written there; a run that was stopped goes on where it was
    seed: int = 0
    dry_run: bool = False  # check everything, show one prompt, write nothing
    data: Component = MISSING  # the problems that rubrics are written for
    writer: Component = MISSING  # rolltune.writers.rubrics.EndpointRubricWriter, or one of your own
    max_concurrency: int = 16  # rubrics in the making at once


@dataclass(kw_only=True)
class ServeConfig:
    """recipes/serve.py"""

    output_dir: str = MISSING  # the server's log is written there
    dry_run: bool = False  # check everything, print the server's command line, start nothing
    model: str = MISSING  # a Hub id, a local folder with a full model, or "smollm2-135m-instruct"
    name: str = "judge"  # what clients call the model
    port: int = 8123  # on 127.0.0.1, for programs of this machine alone
    dtype: str = "bfloat16"  # float32, bfloat16 or float16
    max_model_len: int = 4096  # tokens of a prompt and its reply
    max_num_seqs: int = 32  # requests that are worked on at once; others wait
    kv_cache_gib: float = 1.0  # memory for the keys and values of all of them
    takes_weights: str | None = None  # files or nccl: how runs give it weights (rolltune.samplers.vllm.served)
    options: list[str] = field(default_factory=list)  # further ones of vLLM's server: ["--tensor-parallel-size", "4"]
    start_seconds: float = 900.0  # the longest that loading may take
    command: list[str] = field(default_factory=list)  # serve while this program runs; empty: until Ctrl-C


@dataclass(kw_only=True)
class EvaluatedModel:
    """One of the models that are compared."""

    name: str = MISSING  # in tables and plots
    path: str = MISSING  # a Hub id, a local folder (a checkpoint, a LoRA adapter), or "smollm2-135m-instruct"


@dataclass(kw_only=True)
class EvaluateSamplingConfig:
    """The samples behind pass@k and cons@k; greedy decoding is done besides."""

    samples: int = 16  # n completions of each problem; k can be n at most
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class EvaluateConfig:
    """recipes/evaluate.py"""

    output_dir: str = MISSING
    seed: int = 0
    device: str = "auto"
    dry_run: bool = False
    models: list[EvaluatedModel] = field(default_factory=list)  # [{name: ..., path: ...}]; the first is the baseline
    dtype: str = "float32"  # float32, bfloat16 or float16
    data: Component = MISSING
    max_problems: int | None = None  # null: all of them
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sampling: EvaluateSamplingConfig = field(default_factory=EvaluateSamplingConfig)
    sampler: Component = MISSING  # called with (model, tokenizer)
    correct: Component = field(default_factory=_ANSWER)  # a turn is right where it gives 1
    lenient: Component = field(default_factory=_LENIENT)
    format: Component = field(default_factory=_FORMAT)
    ks: list[int] = field(default_factory=list)  # of pass@k and cons@k; empty: 1, 2, 4 ... sampling.samples
    resamples: int = 10_000  # of the bootstrap over problems
    classifier: Component | None = None  # a rolltune.behaviours.BehaviourClassifier; null: the counter alone
    classified_samples: int = 50  # completions of each model that the classifier reads
