PRESET ?= tiny
SET ?=
RUN ?=
# the quick look runs two notebooks beside each other; where speed is measured in earnest, one at a time
AT_ONCE ?= $(if $(filter tiny,$(PRESET)),2,1)
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: env run test test-all lab report publish at-size
.DELETE_ON_ERROR:

env: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

run: env
	$(BIN)/python -m gqalib run --preset $(PRESET) --at-once $(AT_ONCE) $(foreach pair,$(SET),--set $(pair))

report: env
	$(BIN)/python -m gqalib report $(if $(RUN),--run-dir "$(RUN)",--preset $(PRESET))

publish: env
	$(BIN)/python -m gqalib publish --preset $(PRESET)

at-size: env
	$(BIN)/python -m gqalib at-size --out data/results/llama3-8b-shape

# rented GPU boxes log in as root, which Jupyter refuses unless told; it listens on this machine only
lab: env
	$(BIN)/jupyter lab --ip 127.0.0.1 --allow-root --notebook-dir .

# nbval executes the committed notebooks at the scale of a preset of its own, in a run folder of its own
test: env
	$(UNIT) -m "not slow"
	$(ALL_PAGES)

# the same with what is slow and rarely needed
test-all: env
	$(UNIT)
	$(ALL_PAGES)

# two processes of one thread are faster than one of two; in their own order, files of few long tests do not end it
UNIT := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:nbval --numprocesses 2 --dist loadfile --no-loadscope-reorder tests

define ALL_PAGES
	rm -rf runs/nbval
	$(MAKE) --jobs 2 pages-first pages-second
	$(MAKE) --jobs 2 pages-third pages-fourth
endef

.PHONY: pages-first pages-second pages-third pages-fourth
pages-first: PAGES = notebooks/0[1-8]_*.ipynb
pages-second: PAGES = notebooks/09_*.ipynb notebooks/1[0-2]_*.ipynb notebooks/solutions/*.ipynb  # read no record of the first
pages-third: PAGES = notebooks/1[4-9]_*.ipynb  # these two read both, and 15 reads 14
pages-fourth: PAGES = notebooks/13_*.ipynb
pages-first pages-second pages-third pages-fourth:
	OMP_NUM_THREADS=1 GQALIB_PRESET=smoke GQALIB_RUNS=$(CURDIR)/runs/nbval \
	  TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1 \
	  $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=1200 -p no:randomly $(PAGES)
