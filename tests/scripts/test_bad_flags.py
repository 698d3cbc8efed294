"""Flags that cannot be: one line that names the flag, exit status 2. And the help, which says what can be."""

import argparse
import re
import shlex

import pytest
from refusals import FLAG, refuse
from support import ROOT, TRAIN, call, folders, write_blobs

from src.cli import Parser

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
TRAINING = ("train_full.py", "train_split.py")


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz")


def trained(blobs, *flags):
    """Flags of a quick run; the last of a repeated flag counts."""
    return (f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=2", "--batch_size=32", *flags)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--dataset=nope", ("--dataset", "unknown data set 'nope'", "digits, .*npz:FILE")),
        ("--dataset=zip:a", ("--dataset", "choose from digits")),
        ("--dataset=npz:", ("--dataset npz:", "no path", "npz:FILE")),
        ("--model=nope", ("--model", "'nope'", "choose from .*resnet50")),
        ("--optimizer=nope", ("--optimizer", "'nope'", "choose from .*sam")),
        ("--lr_sched=nope", ("--lr_sched", "'nope'", "choose from .*cosine")),
        ("--precision=fp8", ("--precision", "'fp8'", "choose from .*bf16")),
        ("--device=tpu", ("--device", "give cpu, cuda, or the index")),
        ("--device=99", ("--device 99", "this machine has", "give cpu")),
        ("--device=-1", ("--device", "give cpu")),
        ("--epochs=0", ("--epochs", "0 is not an integer of at least 1")),
        ("--epochs=1.5", ("--epochs", "'1.5' is not an integer")),
        ("--batch_size=0", ("--batch_size", "at least 1")),
        ("--learning_rate=0", ("--learning_rate", "above 0")),
        ("--learning_rate=nan", ("--learning_rate", "nan is not a finite number above 0")),
        ("--learning_rate=inf", ("--learning_rate", "inf is not a finite number")),
        ("--learning_rate=fast", ("--learning_rate", "'fast' is not a finite number")),
        ("--learning_rate", ("--learning_rate", "expected one argument")),
        ("--resume=yes", ("--resume", "takes no value")),
        ("--lr_min=-1", ("--lr_min", "at least 0")),
        ("--lr_min=0.9", ("--lr_min", "0.9: must be between 0 and the learning rate 0.4")),
        ("--weight_decay=nan", ("--weight_decay", "at least 0")),
        ("--rho=0", ("--rho", "above 0")),
        ("--delta=inf", ("--delta", "finite number above 0")),
        ("--hess_init=0", ("--hess_init", "above 0")),
        ("--seed=-1", ("--seed", "at least 0")),
        ("--seed=4294967296", ("--seed", "at most 4294967295")),
        ("--subset=0", ("--subset 0", "from 1 to 120")),
        ("--subset=-3", ("--subset -3", "from 1 to 120")),
        ("--subset=121", ("--subset 121", "from 1 to 120")),
        ("--subset=2.5", ("--subset '2.5'", "whole number from 1 to 120, or a file")),
        ("--subset=", ("--subset", "whole number from 1 to 120, or a file")),
        ("--save_epochs=0", ("--save_epochs", "all, last, or epochs from 1")),
        ("--save_epochs=sometimes", ("--save_epochs", "'sometimes'", "10,11,40")),
        ("--save_epochs=", ("--save_epochs", "all, last")),
        ("--save_epochs=1,9", ("--save_epochs 9", "ends after epoch 2", "from 1 to 2")),
        ("--image_size=0", ("--image_size", "at least 1")),
        ("--channels=2", ("--channels", "choose from 1, 3")),
        ("--cutout_holes=-1", ("--cutout_holes", "at least 0")),
        ("--cutout_length=0", ("--cutout_length", "at least 1")),
        ("--pretrained", ("--pretrained", "no weights for mlp", "only for vit")),
        ("--distributed_training", ("--distributed_training", "torchrun --nproc_per_node=2")),
        ("--epoch=3", ("--epoch=3", "did you mean --epochs")),
        ("--data_aug", ("--data_aug", "did you mean --data_augmentation")),
        ("--batchsize=3", ("--batchsize=3", "did you mean --batch_size")),
        ("--nonsense", ("--nonsense: unknown", "--help")),
        ("extra", ("extra: unknown", "--help")),
    ],
)
def test_training_flags(blobs, tmp_path, flag, says):
    flags = trained(blobs, flag, *folders(tmp_path, *TRAIN))
    refuse("train_full.py", *flags, status=FLAG, says=says)
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("index", ["0", "11", "x", "-1", "1.5", "1,2", ""])
def test_split_indices(blobs, tmp_path, index):
    flags = trained(blobs, f"--samis_validation_split_index={index}", *folders(tmp_path, *TRAIN))
    refuse("train_split.py", *flags, status=FLAG, says=("--samis_validation_split_index", "give 1 to 10, or all"))
    assert not list(tmp_path.rglob("val_*.txt"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--optimizer=iblr", "--delta=1", "--weight_decay=0.1"), ("--delta and --weight_decay", "give one")),
        (
            ("--model=inception", "--image_size=2"),
            ("--model inception", "from 5x5 pixels on", "choose --image_size 5"),
        ),
        (("--model=mobile_small", "--batch_size=119"), ("--batch_size", "last batch of one", "give another size")),
    ],
)
def test_flags_that_do_not_go_together(blobs, tmp_path, flags, says):
    refuse("train_full.py", *trained(blobs, *flags, *folders(tmp_path, *TRAIN)), status=FLAG, says=says)


def test_flags_that_do_not_go_with_the_data(tmp_path):
    for flags, says in (
        (("--cutout_holes=1",), ("--cutout_holes 1", "cifar10, .* not for digits")),
        (("--image_size=32",), ("--image_size 32", "own data", "digits has 8")),
        (("--channels=3",), ("--channels 3", "own data", "digits has 1")),
    ):
        refuse("train_full.py", "--dataset=digits", "--model=mlp", *flags, *folders(tmp_path, *TRAIN),
               status=FLAG, says=says)  # fmt: skip


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("compute_sam_sgd.py", ("--protocol=x",), ("--protocol", "auto.*split.*full")),
        ("compute_sam_sgd.py", ("--lr_sched=nope",), ("--lr_sched", "choose from .*step")),
        ("compute_sam_sgd.py", ("--epochs=0",), ("--epochs", "at least 1")),
        ("compute_sam_sgd.py", ("--scores_folder=/none",), ("--scores_folder /none", "no folder")),
        ("compute_sam_sgd.py", ("--scores_folder=foo=/",), ("--scores_folder foo=/", "choose from mem")),
        ("average_scores.py", (), ("--seeds",)),
        ("average_scores.py", ("--seeds",), ("--seeds", "at least one")),
        ("average_scores.py", ("--seeds=x",), ("--seeds", "'x' is not an integer")),
        ("average_scores.py", ("--seeds", "1", "1"), ("--seeds", "1 1 names a seed twice")),
        ("average_scores.py", ("--seeds=1", "--modes=nope"), ("--modes", "choose from 'samis_loss'")),
        ("average_scores.py", ("--seeds=1", "--optimizer=nope"), ("--optimizer", "choose from 'sgd'")),
        ("fetch_scores.py", ("--dataset=nope",), ("--dataset", "nope", "cifar10: eps.*; svhn: eps")),
        (
            "fetch_scores.py",
            ("--dataset=cifar10", "--modes=mpe"),
            ("--modes", "mpe: not published for cifar10; .*cifar10: eps"),
        ),
        ("fetch_scores.py", ("--base_url=nope",), ("--base_url nope", "https://")),
        ("plot_proxies.py", ("--modes=nope",), ("--modes", "choose from 'mem'")),
        ("plot_proxies.py", ("--plot=x",), ("--plot", "'scatter', 'line'")),
        ("plot_proxies.py", ("--scores_folder=foo=/",), ("--scores_folder foo=/", "nor a score 'foo'")),
        ("plot_images.py", ("--n=0",), ("--n", "at least 1 and at most 50")),
        ("plot_images.py", ("--n=51",), ("--n", "at least 1 and at most 50")),
        ("plot_images.py", ("--scores_folder=mem=/none", "--modes=mem"), ("--scores_folder mem=/none", "no folder")),
    ],
)
def test_flags_of_the_other_scripts(blobs, tmp_path, script, flags, says):
    data = () if any(flag.startswith("--dataset") for flag in flags) or script == "fetch_scores.py" else (
        f"--dataset=npz:{blobs}",
    )  # fmt: skip
    place = f"--{'folder' if script == 'fetch_scores.py' else 'metrics_folder'}={tmp_path}"
    refuse(script, *data, place, *flags, status=FLAG, says=says)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_abbreviations_are_refused_everywhere(script):
    required = {
        "average_scores.py": ("--seeds=1",),
        "train_prune.py": ("--coreset_func=random",),
        "select_coreset.py": ("--coreset_func=random",),
        "compare_pruning.py": ("--funcs=random", "--fractions=0.5"),
    }
    refuse(
        script,
        "--datas=digits",
        *required.get(script, ()),
        status=FLAG,
        says=("--datas=digits: unknown", "did you mean --dataset"),
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = call(script, "--help")
    assert (done.status, done.err) == (0, "")
    parser = parsers(script, monkeypatch)
    for action in parser._actions[1:]:  # the first is --help itself
        if action.help == argparse.SUPPRESS:  # flags of the paper's scripts that mean nothing here
            continue
        assert action.help, action.option_strings
        assert action.container.title not in ("options", "optional arguments"), f"{action.dest} is in no group"
        text = parser._get_formatter()._expand_help(action)
        assert action.required or "default" in text, f"{action.option_strings} does not say its default"
        assert all(flag in done.out for flag in action.option_strings)


def parsers(script, monkeypatch):
    """The parser of a script, caught when it is about to parse."""
    caught = []

    def catch(self, *_):
        caught.append(self)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", catch)
        call(script)
    return caught[0]


def commands():
    """Every command of the README and of the scripts' help texts: script and flags."""
    examples = [ROOT / "examples" / "README.md", *(ROOT / "examples").glob("*.py")]
    paths = (ROOT / "README.md", *(ROOT / name for name in SCRIPTS), *examples)
    texts = [path.read_text() for path in paths if path.exists()]
    text = re.sub(r"\\\n\s*", "", "\n".join(texts))
    text = text.replace("$optimizer", "sgd").replace("$seed", "1")  # the variables of loops
    for script, flags in re.findall(r"(?:python|torchrun\s[^\n`]*?) (\w+\.py) ([^\n`#|]*)", text):
        yield (
            script if (ROOT / script).exists() else f"examples/{script}",
            tuple(shlex.split(flags.replace("...", ""))),
        )


@pytest.mark.parametrize("command", sorted(set(commands())), ids=lambda command: " ".join((command[0], *command[1])))
def test_commands_of_readme_and_help_parse(command, monkeypatch):
    script, flags = command
    parsers(script, monkeypatch).parse_args(flags)
