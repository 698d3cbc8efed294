# make samis   set up .venv and run the main job on the embedded digits: train, score, average, draw, compare with memorization;
#              ends with the path of a page that shows it all
# make mpe     the same set-up, then leave-one-out estimates and sensitivities on the digits, with figures and a page
# make geometry  the same set-up, then Hessian spectra and tangent kernels of networks on the digits, with figures
# make workflow  the same set-up and Snakemake in .venv-workflow, then a small instance of every study of the papers
# make test    set up .venv with the packages for development as well, then run the tests
# make test-cluster  the workflow on a Slurm that it installs and starts on this machine (Debian, as root)
# make lint    ruff and mypy, as CI runs them
# make bench   speed and memory against the plain way, as ratios in one run

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/samis_digits
SEEDS := 1 2 3
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed_dev

EPOCHS := 20
DATA := --dataset=digits --model=resnet8
TRAINING := --data_augmentation --epochs=$(EPOCHS) --batch_size=128 --learning_rate=0.1 --lr_sched=const --measure_proxies --resume
READING := --datasets_folder=$(RUNS)/data --models_folder=$(RUNS)/ckpts --metrics_folder=$(RUNS)/metrics
FOLDERS := $(READING) --log_folder=$(RUNS)/logs --resume_ckpts_folder=$(RUNS)/resume_ckpts
MEMBERS := --model=small_mlp --members=500 --epochs=20 --batch_size=32 --learning_rate=0.1 --lr_sched=cosine
DRAWING := --datasets_folder=$(RUNS)/data --scores_folder=$(RUNS)/metrics --plots_folder=$(RUNS)/plots

MPE := runs/mpe_digits
MPE_DATA := --dataset=digits --model=small_mlp --bs=32 --delta=2 --lr=0.02 --lrmin=0.001 --name_exp=digits --resume
MPE_FOLDERS := --datasets_folder=$(MPE)/data --models_folder=$(MPE)/ckpts --log_folder=$(MPE)/logs --resume_ckpts_folder=$(MPE)/resume_ckpts
MPE_PLOTS := --name_exp=digits --pickles_folder=$(MPE)/pickles --plots_folder=$(MPE)/plots

GEO := runs/geometry_digits
GEO_DATA := --dataset=digits --model=lenet --datasets_folder=$(GEO)/data
GEO_TRAINING := --epochs=21 --batch_size=64 --learning_rate=0.05 --lr_sched=const --resume --save_epochs=1,2,5,6,10,11,20,21
GEO_RUN := --models_folder=$(GEO)/ckpts
GEO_FOLDERS := $(GEO_RUN) --log_folder=$(GEO)/logs --resume_ckpts_folder=$(GEO)/resume_ckpts --metrics_folder=$(GEO)/metrics
GEOMETRY := --hessian_folder=$(GEO)/hessian_eigenvalues --ntk_folder=$(GEO)/ntks

# What a step of a job prints, without its files and the next command: the job runs it, and ends with what to open.
SHELL := bash
BRIEF := sed -e '/^next: /d' -e '/^runs\//d'

SNAKEMAKE := .venv-workflow/bin/snakemake

.PHONY: samis mpe geometry workflow test test-cluster lint bench setup clean

setup: $(DEV)

$(STAMP): requirements.txt requirements-iblr.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-iblr.txt
	touch $@

$(DEV): $(STAMP) requirements-audit.txt requirements-hf.txt requirements-timm.txt requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# One thread: on images of 8x8 pixels a second one costs more than it brings.
samis: export OMP_NUM_THREADS = 1
samis: $(STAMP)
	@set -e -o pipefail; \
	for seed in $(SEEDS); do \
	  for optimizer in sgd sam; do \
	    $(BIN)/python train_full.py $(DATA) --optimizer=$$optimizer --seed=$$seed $(TRAINING) $(FOLDERS) --save_epochs=last | $(BRIEF); \
	  done; \
	  $(BIN)/python compute_sam_sgd.py $(DATA) --seed=$$seed --epochs=$(EPOCHS) --protocol=full $(READING) | $(BRIEF); \
	done; \
	$(BIN)/python average_scores.py $(DATA) --seeds $(SEEDS) --metrics_folder=$(RUNS)/metrics > $(RUNS)/logs/average_scores.txt; \
	$(BIN)/python average_scores.py $(DATA) --seeds $(SEEDS) --metrics_folder=$(RUNS)/metrics --optimizer=sgd >> $(RUNS)/logs/average_scores.txt; \
	$(BIN)/python plot_images.py --dataset=digits --modes samis_loss samis_prob csl $(DRAWING) | $(BRIEF); \
	$(BIN)/python plot_proxies.py --dataset=digits --modes samis_loss samis_prob mean_loss csl forg $(DRAWING) | $(BRIEF); \
	$(BIN)/python compute_memorization.py --dataset=digits $(MEMBERS) --datasets_folder=$(RUNS)/data --metrics_folder=$(RUNS)/metrics | $(BRIEF); \
	printf '\nHow well do the scores of resnet8 agree with memorization, measured with small_mlp models trained on random subsets?\n'; \
	$(BIN)/python evaluate_scores.py --dataset=digits --modes samis_loss samis_prob mean_loss csl aum $(DRAWING) | $(BRIEF); \
	printf '\nFigures to open (all are in %s):\n' $(RUNS)/plots; \
	ls $(RUNS)/plots/images/digits/overview_samis_loss_5.png $(RUNS)/plots/proxies/digits/comparison.png $(RUNS)/plots/scores/digits/against_mem.png; \
	printf 'Scores to use (all are listed in %s):\n' $(RUNS)/logs/average_scores.txt; ls $(RUNS)/metrics/sam_sgd/*.pkl; \
	printf 'Next: make mpe, make geometry, or prune the training set by a score (docs/pruning.md)\n'; \
	$(BIN)/python make_report.py --dataset=digits $(READING) $(GEOMETRY) --out=$(RUNS)/digits.html > $(RUNS)/logs/make_report.txt; \
	printf '\nEverything on one page, to open in a browser:\n'; ls $(RUNS)/digits.html

mpe: export OMP_NUM_THREADS = 1
mpe: $(STAMP)
	@set -e -o pipefail; \
	$(BIN)/python examples/1_loo_iterations.py $(MPE_DATA) --epochs=50 $(MPE_FOLDERS) --pickles_folder=$(MPE)/pickles | $(BRIEF); \
	$(BIN)/python examples/3_validation_sensitivities.py $(MPE_DATA) --epochs=100 --class_cov=full --n_retrain=20 --n_spread=20 \
	  --epochs_retrain=100 --lr_retrain=0.01 --lrmin_retrain=0.001 $(MPE_FOLDERS) --pickles_folder=$(MPE)/pickles | $(BRIEF); \
	$(BIN)/python examples/plot_loo_iterations.py $(MPE_PLOTS) | $(BRIEF); \
	$(BIN)/python examples/plot_validation_sensitivities.py $(MPE_PLOTS) --corrected | $(BRIEF); \
	printf '\nFigures to open:\n'; ls $(MPE)/plots/*.png; \
	printf 'Results (estimates, sensitivities, retrained models):\n'; ls $(MPE)/pickles/*.pkl; \
	printf 'Next: docs/mpe.md explains the figures and the flags\n'; \
	$(BIN)/python make_report.py --dataset=digits --name_exp=digits --pickles_folder=$(MPE)/pickles --datasets_folder=$(MPE)/data \
	  --models_folder=$(MPE)/ckpts --metrics_folder=$(MPE)/metrics $(GEOMETRY) --out=$(MPE)/digits.html > $(MPE)/logs/make_report.txt; \
	printf '\nEverything on one page, to open in a browser:\n'; ls $(MPE)/digits.html

geometry: export OMP_NUM_THREADS = 1
geometry: $(STAMP)
	@set -e -o pipefail; \
	for seed in $(SEEDS); do \
	  for optimizer in sgd sam; do \
	    $(BIN)/python train_full.py $(GEO_DATA) --optimizer=$$optimizer --seed=$$seed $(GEO_TRAINING) $(GEO_FOLDERS) | $(BRIEF); \
	    $(BIN)/python compute_hessian_eigen.py $(GEO_DATA) --optimizer=$$optimizer --seed=$$seed --epochs=21 --subset=500 $(GEO_RUN) --hessian_folder=$(GEO)/hessian_eigenvalues --resume | $(BRIEF); \
	  done; \
	done; \
	$(BIN)/python plot_hessian.py $(GEO_DATA) --optimizers sgd sam --seeds $(SEEDS) --epochs=21 --hessian_folder=$(GEO)/hessian_eigenvalues --plots_folder=$(GEO)/plots | $(BRIEF); \
	$(BIN)/python compute_ntk.py $(GEO_DATA) --ntk_chosen_metric=samis_loss --m_samples=50 --ntk_velocity_epoch 1 5 10 20 --seeds $(SEEDS) $(GEO_RUN) --ntk_folder=$(GEO)/ntks --no-keep_kernels | $(BRIEF); \
	$(BIN)/python plot_ntk.py $(GEO_DATA) --metrics samis_loss --log --ntk_folder=$(GEO)/ntks --plots_folder=$(GEO)/plots | $(BRIEF); \
	printf '\nFigures to open:\n'; ls $(GEO)/plots/hessian/*/*.png $(GEO)/plots/ntk/*/*.png; \
	printf 'Table of the spectra:\n'; ls $(GEO)/plots/hessian/*/*.md; \
	printf 'Next: docs/geometry.md explains the figures and the flags\n'

workflow: $(STAMP) $(SNAKEMAKE)
	$(SNAKEMAKE) --profile workflow/profiles/local --config python=$(abspath $(BIN))/python -- digits_all

$(SNAKEMAKE): workflow/requirements.txt
	$(PYTHON) -m venv .venv-workflow
	.venv-workflow/bin/python -m pip install --quiet --disable-pip-version-check -r workflow/requirements.txt
	touch $@

test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# A Slurm on this machine, for the tests of the workflow on a cluster: needs root and Debian's packages.
test-cluster: $(DEV) $(SNAKEMAKE)
	tests/workflow/local-slurm install
	tests/workflow/local-slurm start
	$(BIN)/python -m pytest -m slow tests/workflow; status=$$?; tests/workflow/local-slurm stop; exit $$status

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python -m benchmarks.run_all

clean:
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache
