"""A flag that would do nothing in this combination is refused when given, whatever its value."""

import pytest
from refusals import FLAG, refuse
from test_bad_flags import parsers

TRAIN, PRUNE = ("train_full.py",), ("train_prune.py", "--coreset_func=craig")
COMPARE = ("compare_pruning.py", "--funcs", "craig", "ccs", "--fractions=0.5")
FILE = ("train_prune.py", "--selection=chosen.npz")
HESSIAN, AVERAGE = ("compute_hessian_eigen.py",), ("average_scores.py", "--seeds=1")
LOO = ("examples/1_loo_iterations.py",)

# a command, the flag that does nothing in it, and what would make the flag act
IDLE = [
    (TRAIN, ("--rho=0.05",), "--optimizer=sam"),
    (TRAIN, ("--rho", "0.1"), "--optimizer=sam"),
    (TRAIN, ("--adaptive",), "--optimizer=sam"),
    (TRAIN, ("--no-adaptive",), "--optimizer=sam"),
    ((*TRAIN, "--optimizer=sam"), ("--hess_init=0.1",), "--optimizer=iblr"),
    (TRAIN, ("--delta=1",), "--optimizer=iblr"),
    ((*TRAIN, "--lr_sched=const"), ("--lr_min=0",), "--lr_sched=const"),
    (TRAIN, ("--cutout_length=16",), "--cutout_holes"),
    ((*TRAIN, "--cutout_holes=0"), ("--cutout_length=16",), "--cutout_holes"),
    (TRAIN, ("--sync_bn",), "--distributed_training"),
    (("train_split.py",), ("--rho=0.05",), "--optimizer=sam"),
    (FILE, ("--coreset_fraction=0.1",), "--selection"),
    (FILE, ("--shots=1",), "--selection"),
    (FILE, ("--coreset_mode=large",), "--selection"),
    (FILE, ("--per_class=1",), "--selection"),
    (FILE, ("--coreset_pretrain_epochs=160",), "--selection"),
    (FILE, ("--glister_eta=0.1",), "--selection"),
    (FILE, ("--coreset_networks=5",), "--selection"),
    (FILE, ("--scores_folder=.",), "min_"),
    (PRUNE, ("--glister_eta=0.1",), "glister"),
    (PRUNE, ("--ccs_bins", "50"), "ccs"),
    (PRUNE, ("--no-dual_beta",), "dual"),
    (PRUNE, ("--scores_folder=.",), "min_"),
    (PRUNE, ("--rho=0.05",), "--optimizer=sam"),
    (("train_prune.py", "--coreset_func=dual", "--no-dual_beta"), ("--dual_c=4",), "--no-dual_beta"),
    (("select_coreset.py", "--coreset_func=random"), ("--selection_memory=9",), "craig"),
    (("select_coreset.py", "--coreset_func=random"), ("--cutout_length=4",), "--cutout_holes"),
    (COMPARE, ("--glister_eta=0.1",), "glister"),
    (HESSIAN, ("--power_iterations=5",), "--eigen_mode=power_iter"),
    ((*HESSIAN, "--eigen_mode=power_iter"), ("--max_steps=9",), "--power_iterations"),
    ((*HESSIAN, "--trace_probes=0"), ("--trace_tolerance=0.1",), "--trace_probes=0"),
    ((*HESSIAN, "--exp=x"), ("--lr_sched=const",), "--exp"),
    ((*HESSIAN, "--checkpoint=x.pt"), ("--seed=1",), "--checkpoint"),
    ((*HESSIAN, "--eigen_split=test"), ("--subset=5",), "--eigen_split=test"),
    (HESSIAN, ("--scores_folder=.",), "--high_low_spec"),
    (("compute_ntk.py",), ("--projection_seed=0",), "--projection_dim"),
    (AVERAGE, ("--window=10",), "dual"),
    (AVERAGE, ("--el2n_epochs", "1", "5"), "el2n"),
    ((*AVERAGE, "--modes", "samis_loss"), ("--optimizer=sgd",), "training run"),
    ((*AVERAGE, "--exp=x"), ("--lr_sched=const",), "--exp"),
    (("plot_proxies.py",), ("--reference_modes", "mem"), "--reference"),
    (("plot_hessian.py", "--files", "x.pkl"), ("--epochs=3",), "--files"),
    (LOO, ("--hess_init=0.1",), "--optimizer=iblr"),
    ((*LOO, "--optimizer=iblr", "--optim_var"), ("--var_version=kfac",), "--optim_var"),
    ((*LOO, "--optimizer=adam", "--optim_var"), ("--laplace_backend=fast",), "--optim_var"),
]


@pytest.mark.parametrize(("command", "given", "says"), IDLE, ids=lambda value: " ".join(value))
def test_an_idle_flag_is_refused(command, given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, *flags = command
    name = script.split("/")[-1]
    flag = given[0].split("=")[0]
    refuse(script, *flags, *given, status=FLAG, says=(f"^{name}: {flag}: has no effect .*{says}.*; leave it out",))


@pytest.mark.parametrize(
    "command",
    [
        (
            *TRAIN,
            "--optimizer=sam",
            "--rho=0.1",
            "--adaptive",
            "--lr_min=0.01",
            "--cutout_holes=1",
            "--cutout_length=4",
        ),
        (*TRAIN, "--optimizer=iblr", "--delta=1", "--hess_init=0.1"),
        (*TRAIN, "--sync_bn", "--distributed_training"),
        (
            "train_prune.py",
            "--coreset_func=min_mem",
            "--coreset_pretrain_epochs=40",
            "--coreset_mode=large",
            "--per_class=1",
        ),
        (
            "compare_pruning.py",
            "--funcs",
            "random",
            "glister",
            "el2n",
            "min_mem",
            "--fractions=0.5",
            "--glister_eta=0.2",
            "--coreset_networks=2",
            "--selection_memory=9",
            "--scores_folder=.",
        ),
        (*AVERAGE, "--modes", "dyn_unc", "el2n", "--window=5", "--el2n_epochs", "1", "2", "--optimizer=sgd"),
        (*HESSIAN, "--eigen_mode=power_iter", "--power_iterations=5", "--trace_tolerance=0.1"),
        (*LOO, "--optimizer=iblr", "--hess_init=0.2", "--var_version=diag"),
    ],
    ids=" ".join,
)
def test_flags_that_act_are_accepted(command, monkeypatch):
    script, *flags = command
    parsers(script, monkeypatch).parse_args(flags)
