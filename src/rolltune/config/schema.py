"""The typed keys of each recipe's config. :mod:`rolltune.config.load` loads and checks them.

A field of type ``Component`` is a mapping with ``_component_``, the dotted path of a class or function, and its
arguments beside it. Prefer a new argument of a component to a new key; a test freezes the list of keys.

``--help`` and the docs show the comment behind a field, or above it, as the description of its key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from omegaconf import MISSING

from rolltune.types import SamplingParams

Component = dict[str, Any]
FilePath = Annotated[str, "path"]  # a file or folder; ``~`` at its start is replaced by the home folder
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4"] | None

_ANSWER = partial(dict, _component_="rolltune.rewards.answer.answer_reward")
_LENIENT = partial(dict, _component_="rolltune.rewards.answer.lenient_answer_reward")
_FORMAT = partial(dict, _component_="rolltune.rewards.format.format_reward")
_ANSWER_FORMAT = "<think>{solution}</think>\n<answer>{answer}</answer>"


@dataclass(kw_only=True)
class ModelConfig:
    """The policy's weights and their precision."""

    path: FilePath = MISSING  # Hub id, local folder, or "smollm2-135m-instruct" (packaged, needs no network)
    dtype: Dtype = "float32"  # of weights and matrix products; log-softmax and losses are always float32
    # float32 copy of the weights for the optimizer, so that small updates are not rounded away; bfloat16 and float16
    # without lora require it
    master_weights: bool = False
    fp32_head: bool = False  # with bfloat16 or float16: float32 logits, in the trainer and in the sampler
    dropout: bool = False  # train with the dropout and router jitter of the model's own config (GPT-2, OPT)
    batch_invariant: bool = False  # grpo, float32 on a CPU: sampler and trainer agree bit for bit, but run slower
    # weight of the load-balancing loss of a mixture-of-experts model's routers, 0.001 for example; 0: none
    router_aux_loss: float = 0.0
    quantization: Quantization = None  # "nf4": frozen weights in 4 bits under lora (QLoRA); needs bitsandbytes
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 1/3 more time


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters (peft). null: train all weights."""

    rank: int = 16  # of the adapter matrices
    alpha: float = 32.0  # scale of the adapters; they are multiplied by alpha / rank
    dropout: float = 0.0  # dropout probability on the adapters' inputs, in [0, 1)
    target_modules: str = "all-linear"  # or module names separated by commas: "q_proj,v_proj"
    rslora: bool = False  # rsLoRA (arXiv 2312.03732): multiply by alpha / sqrt(rank), for large ranks
    dora: bool = False  # DoRA (arXiv 2402.09353): also train the norm of each output's weights; slower
    experts: bool = False  # also adapt the experts of a mixture-of-experts model, which are no linear layers; slower


@dataclass(kw_only=True)
class ParallelConfig:
    """How several processes hold the weights."""

    # replicated: each process holds all of them; fsdp: each holds a slice of weights, gradients, optimizer state
    weights: Literal["replicated", "fsdp"] = "replicated"
    # with fsdp: processes that share one copy of the weights, for example those of one host; null: all
    shard: int | None = None
    cpu_offload: bool = False  # with fsdp on CUDA: keep slices and optimizer state in host memory; saves memory, slower


@dataclass(kw_only=True)
class DataConfig:
    """The data sets of a training run."""

    train: Component = MISSING  # training problems; called with its own arguments only
    heldout: Component = MISSING  # problems that are never trained on; the eval on them picks the best checkpoint
    # problems whose prompt and response do not fit the model's context: refuse the config, or drop them
    too_long: Literal["refuse", "drop"] = "refuse"


@dataclass(kw_only=True)
class FewShotExample:
    """A user message and the assistant's response to it."""

    user: str = MISSING
    assistant: str = MISSING


@dataclass(kw_only=True)
class PromptConfig:
    """The text around a problem. The model's chat template renders it."""

    system: str | None = None  # system message; null: none
    few_shot: list[FewShotExample] = field(default_factory=list)  # [{user: ..., assistant: ...}] before each problem
    prefill: str = ""  # start of the response ("<think>"); rewards see it as if the model had written it
    chat_template: FilePath | None = None  # Jinja file, for base models without a template; null: the model's own
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # the template's own: {enable_thinking: false}


@dataclass(kw_only=True)
class SamplingParamsConfig:
    """The keys of :class:`rolltune.types.SamplingParams`."""

    temperature: float = 1.0  # divisor of the logits
    top_p: float = 1.0  # probability mass to keep, in (0, 1]; 1: all
    top_k: int = 0  # number of tokens to keep; 0: all
    max_new_tokens: int = 256  # longest completion, in tokens
    stop: list[str] = field(default_factory=list)  # strings that end a completion

    def params(self) -> SamplingParams:
        """Build the sampler's parameters.

        Raises:
            ValueError: a value out of range; the message starts with the key.
        """
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            stop=tuple(self.stop),
        )


@dataclass(kw_only=True)
class SamplingConfig(SamplingParamsConfig):
    """Sampling of training completions. The trainer's log-probs are of the same distribution.

    With top-p or top-k, each token keeps its candidates until it is trained on; top-k bounds the memory for them.
    """

    group_size: int = 8  # completions per prompt, at least 2


@dataclass(kw_only=True)
class BatchConfig:
    """The optimizer steps that are taken on one step's completions."""

    prompts_per_step: int = 8  # over all processes
    num_iterations: int = 1  # passes over the completions of a step
    minibatches: int = 1  # optimizer steps per pass, each on whole groups; must divide prompts_per_step
    microbatch_tokens: int = 4096  # most tokens in one forward and backward pass; bounds activation memory
    # rounds of resampling that replace groups without reward variance, as in DAPO; 0: keep these groups
    dynamic_sampling_rounds: int = 0
    # leave completions that reach max_new_tokens out of the loss (DAPO's overlong filtering); they stay in the baseline
    mask_truncated: bool = False
    max_unscored: float = 0.5  # share of a step's completions that may lack a score; with more the run stops


@dataclass(kw_only=True)
class HeldoutConfig:
    """When to run the eval on held-out problems, and on how many."""

    every_n_steps: int = 10  # steps between evals; also before the first step and after the last
    max_problems: int = 200  # most held-out problems to use, the first ones


@dataclass(kw_only=True)
class EvalConfig(HeldoutConfig):
    """Greedy accuracy on held-out problems, independent of the training reward."""

    max_new_tokens: int | None = None  # longest completion, in tokens; null: sampling.max_new_tokens
    correct: Component = field(default_factory=_ANSWER)  # reward that scores 1 for a right response
    # the same, but for a right answer in any format; null: not measured
    lenient: Component | None = field(default_factory=_LENIENT)
    # rolltune.rewards.checks.overoptimization.OveroptimizationCheck: an alarm for a policy that exploits its judge;
    # null: off
    overoptimization: Component | None = None


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save checkpoints, and how many to keep."""

    every_n_steps: int = 10  # steps between checkpoints
    keep_last: int = 2  # checkpoints kept besides the best one


@dataclass(kw_only=True)
class LoggingConfig:
    """Logs besides <output_dir>/metrics.jsonl, which is always written."""

    wandb: bool = False  # log to Weights & Biases, offline if WANDB_API_KEY is not set
    wandb_project: str = "rolltune"  # project name in Weights & Biases
    tensorboard: bool = False  # write TensorBoard files to output_dir
    samples_every_n_steps: int = 1  # steps between tables of samples in <output_dir>/samples/


@dataclass(kw_only=True)
class GRPOConfig:
    """recipes/grpo.py"""

    output_dir: FilePath = MISSING  # folder for checkpoints, metrics and samples
    seed: int = 0  # of data order, sampling and dropout
    device: Device = "auto"  # auto: CUDA if torch finds it, else the CPU
    resume: bool = False  # continue from the last checkpoint in output_dir, if there is one
    dry_run: bool = False  # check everything and print config, tokens and memory, without loading weights
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rewards: dict[str, Component] = field(default_factory=dict)  # name: component with its `weight` (default 1)
    answer_format: str = _ANSWER_FORMAT  # layout of a right response, for the self-test
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampler: Component = MISSING  # class or function of rolltune.samplers, called with (model, tokenizer)
    advantage: Component = MISSING  # function of rolltune.advantages, called with the rewards of a group
    loss: Component = MISSING  # class of rolltune.losses
    old_policy: str = "trainer"  # policy that the ratio is taken to: trainer, or sampler (verl's bypass mode)
    correction: Component | None = None  # class of rolltune.corrections for sampler/trainer mismatch; null: none
    # rolltune.mismatch.MismatchLimit: stop when sampler and trainer differ more than this; null: report the mismatch
    # but never stop
    mismatch: Component | None = None
    optimizer: Component = MISSING  # class of torch.optim, called with the trainable parameters
    lr_scheduler: Component | None = None  # called with (optimizer=..., num_training_steps=...); null: constant rate
    num_steps: int = MISSING  # steps of the run, each of sampling and training
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it
    loss_scale: Component | None = None  # with float16: rolltune.loss_scale.LossScale; null: its defaults
    batch: BatchConfig = field(default_factory=BatchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stall_seconds: float = 1800.0  # end the run if nothing moves on any process for this long; 0: never
    grace_seconds: float = 20.0  # end the run this long after SIGTERM or Ctrl-C, whatever it does
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(kw_only=True)
class SFTBatchConfig:
    """The size of an optimizer step."""

    examples_per_step: int = 16  # over all processes
    microbatch_tokens: int = 4096  # most tokens in one forward and backward pass; bounds activation memory


@dataclass(kw_only=True)
class SFTConfig:
    """recipes/sft.py"""

    output_dir: FilePath = MISSING  # folder for checkpoints and metrics
    seed: int = 0  # of data order and dropout
    device: Device = "auto"  # auto: CUDA if torch finds it, else the CPU
    resume: bool = False  # continue from the last checkpoint in output_dir, if there is one
    dry_run: bool = False  # check everything and print config, tokens and memory, without loading weights
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    answer_format: str = _ANSWER_FORMAT  # layout of the response that is trained on
    optimizer: Component = MISSING  # class of torch.optim, called with the trainable parameters
    lr_scheduler: Component | None = None  # called with (optimizer=..., num_training_steps=...); null: constant rate
    num_steps: int = MISSING  # optimizer steps of the run
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it
    loss_scale: Component | None = None  # with float16: rolltune.loss_scale.LossScale; null: its defaults
    batch: SFTBatchConfig = field(default_factory=SFTBatchConfig)
    eval: HeldoutConfig = field(default_factory=HeldoutConfig)
    stall_seconds: float = 1800.0  # end the run if nothing moves on any process for this long; 0: never
    grace_seconds: float = 20.0  # end the run this long after SIGTERM or Ctrl-C, whatever it does
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(kw_only=True)
class AuditRewardsConfig:
    """recipes/audit_rewards.py"""

    output_dir: FilePath = MISSING  # folder for the report
    seed: int = 0  # of the generated wrong answers
    dry_run: bool = False  # check everything, score nothing
    data: Component = MISSING  # problems with gold answers, or labelled answers (rolltune.data.answers_labelled)
    rewards: dict[str, Component] = field(default_factory=dict)  # name: component, as in grpo
    answer_format: str = _ANSWER_FORMAT  # layout of a right response
    max_problems: int | None = None  # most problems to use; null: all


@dataclass(kw_only=True)
class LintRubricsConfig:
    """recipes/lint_rubrics.py"""

    output_dir: FilePath = MISSING  # folder for the report
    dry_run: bool = False  # check everything, lint nothing
    data: Component = MISSING  # problems with rubrics, such as rolltune.data.rubrics.rubric_jsonl
    max_problems: int | None = None  # most problems to use; null: all
    fewest_criteria: int = 7  # a rubric with fewer criteria gets a warning
    most_criteria: int = 20  # a rubric with more criteria gets a warning


@dataclass(kw_only=True)
class AuditJudgeConfig:
    """recipes/audit_judge.py"""

    output_dir: FilePath = MISSING  # folder for the report
    seed: int = 0  # of the bootstrap
    dry_run: bool = False  # check everything and show one question, without asking the judge
    data: Component = MISSING  # labelled verdicts, such as rolltune.data.judge_labelled.judge_labelled
    judge: Component = MISSING  # rolltune.rewards.judges.endpoint.EndpointJudge, or a Judge of your own
    template: FilePath | None = None  # prompt file, as in the reward; null: the packaged one
    one_call: bool = True  # ask about all criteria of a response in one question; false: one question per criterion
    reversed: bool = False  # also ask with the criteria in reversed order
    repeats: int = 1  # rounds of questions, each with another seed of the judge; the judge's caps apply per round
    resamples: int = 2000  # bootstrap resamples over responses
    min_accuracy: float | None = None  # below this accuracy the exit status is 1; null: no limit
    min_kappa: float | None = None  # below this Cohen's kappa the exit status is 1; null: no limit


@dataclass(kw_only=True)
class WriteTracesConfig:
    """recipes/write_traces.py"""

    output_dir: FilePath = MISSING  # folder for traces.jsonl; a run that was stopped continues there
    seed: int = 0  # of the writer
    dry_run: bool = False  # check everything and show one prompt or trace, without writing
    data: Component = MISSING  # problems to write traces for
    writer: Component = MISSING  # class of rolltune.traces: a program that works the trace out, or an endpoint
    correct: Component = field(default_factory=_ANSWER)  # reward whose verdict is recorded with each trace
    traces_per_problem: int = 1  # traces to write for each problem
    max_concurrency: int = 16  # traces written at the same time


@dataclass(kw_only=True)
class WriteRubricsConfig:
    """recipes/write_rubrics.py"""

    output_dir: FilePath = MISSING  # folder for rubrics.jsonl; a run that was stopped continues there
    seed: int = 0  # of the writer
    dry_run: bool = False  # check everything and show one prompt, without writing
    data: Component = MISSING  # problems to write rubrics for
    writer: Component = MISSING  # rolltune.writers.rubrics.EndpointRubricWriter, or a RubricWriter of your own
    max_concurrency: int = 16  # rubrics written at the same time


@dataclass(kw_only=True)
class ServeConfig:
    """recipes/serve.py"""

    output_dir: FilePath = MISSING  # folder for the server's log
    dry_run: bool = False  # check everything and print the server's command line, without starting it
    model: FilePath = MISSING  # Hub id, local folder of a full model, or "smollm2-135m-instruct"
    name: str = "judge"  # model name that clients use
    port: int = 8123  # on 127.0.0.1, for programs on this machine only
    dtype: Dtype = "bfloat16"  # of the server's weights
    max_model_len: int = 4096  # most tokens in a prompt and its reply together
    max_num_seqs: int = 32  # requests served at the same time; others wait
    kv_cache_gib: float = 1.0  # memory for the keys and values of all requests, in GiB
    # how training runs send weights to the server (see rolltune.samplers.vllm.served); null: it takes none
    takes_weights: Literal["files", "nccl"] | None = None
    # largest rank of the LoRA adapters that runs send with `sampler.lora: adapter`; null: it takes none
    lora_rank: int | None = None
    options: list[str] = field(default_factory=list)  # more options of vLLM's server: ["--tensor-parallel-size", "4"]
    start_seconds: float = 900.0  # longest time that loading may take
    # program to serve for, until it ends, with the server's key in its VLLM_API_KEY; empty: until Ctrl-C
    command: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class EvaluatedModel:
    """One of the models that an evaluation compares."""

    name: str = MISSING  # in tables, plots and file names
    path: FilePath = MISSING  # Hub id, local folder (a checkpoint, a LoRA adapter), or "smollm2-135m-instruct"
    quantization: Quantization = None  # as in training; an adapter that was trained on 4 bits fits no other weights


@dataclass(kw_only=True)
class EvaluateSamplingConfig(SamplingParamsConfig):
    """Samples for pass@k and cons@k. The evaluation also decodes each problem once greedily."""

    samples: int = 16  # completions per problem; the largest possible k


@dataclass(kw_only=True)
class EvaluateConfig:
    """recipes/evaluate.py"""

    output_dir: FilePath = MISSING  # folder for samples, tables and plots
    seed: int = 0  # of sampling and bootstrap
    device: Device = "auto"  # auto: CUDA if torch finds it, else the CPU
    dry_run: bool = False  # check everything and print the number of samples, without loading weights
    models: list[EvaluatedModel] = field(default_factory=list)  # [{name: ..., path: ...}]; the first is the baseline
    dtype: Dtype = "float32"  # of the models' weights
    data: Component = MISSING  # problems to evaluate on
    max_problems: int | None = None  # most problems to use; null: all
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sampling: EvaluateSamplingConfig = field(default_factory=EvaluateSamplingConfig)
    sampler: Component = MISSING  # class or function of rolltune.samplers, called with (model, tokenizer)
    correct: Component = field(default_factory=_ANSWER)  # reward that scores 1 for a right response
    lenient: Component = field(default_factory=_LENIENT)  # the same, but for a right answer in any format
    format: Component = field(default_factory=_FORMAT)  # reward that scores 1 for a response in the right format
    ks: list[int] = field(default_factory=list)  # k of pass@k and cons@k; empty: 1, 2, 4, ... sampling.samples
    resamples: int = 10_000  # bootstrap resamples over problems
    classifier: Component | None = None  # rolltune.behaviours.BehaviourClassifier; null: count behaviours by cue words
    classified_samples: int = 50  # completions per model that the classifier reads
