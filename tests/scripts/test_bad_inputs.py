"""Tables of bad input, each with a word (flag, file or array) that the one-line error message must name.

Invalid flags end with status 2, unusable files with status 1. Nothing is written or changed.
"""

import io
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import FILE, FLAG, RunsCode, refuse, spoilt
from support import ROOT, TRAIN, call, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint
from src.coresets import find_method
from src.coresets.inputs import make_groups
from src.datasets import load_dataset, lookup, parse_subset
from src.devices import ComputeConfig
from src.errors import UserError
from src.metrics import SCORES, Proxy, get_score
from src.metrics.average import AverageConfig
from src.metrics.dynamics import Windows
from src.metrics.proxy import published_files
from src.metrics.samis import SamisConfig
from src.models import ModelConfig, build_model
from src.training import TrainingConfig

N = 60
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))

# ------------------------------------------------------------------------------------------------------------- flags

# Flags by script, the last of which is wrong; in a pair, the second item is the word that must be named instead.
BAD_FLAGS = {
    "train_full.py": [
        *("--dataset=nope", "--dataset=zip:a", "--dataset=npz:", "--model=nope", "--optimizer=nope"),
        *("--lr_sched=nope", "--precision=fp8", "--device=tpu", "--device=99", "--device=-1"),
        *("--epochs=0", "--epochs=1.5", "--batch_size=0", "--resume=yes"),
        *(f"--learning_rate{value}" for value in ("=0", "=nan", "=inf", "=fast", "")),
        *("--lr_min=-1", "--weight_decay=nan", "--seed=-1", "--seed=4294967296"),
        ("--lr_sched=cosine --lr_min=0.9", "must be between"),
        *("--optimizer=sam --rho=0", "--optimizer=iblr --delta=inf", "--optimizer=iblr --hess_init=0"),
        *(f"--subset={value}" for value in ("0", "-3", "121", "2.5", "")),
        *(f"--save_epochs={value}" for value in ("0", "sometimes", "", "1,9")),
        *("--image_size=0", "--channels=2", "--cutout_holes=-1", "--cutout_holes=1 --cutout_length=0"),
        *("--pretrained", "--distributed_training", "--nonsense", "extra"),
        *(("--epoch=3", "--epochs"), ("--data_aug", "--data_augmentation"), ("--batchsize=3", "--batch_size")),
        ("--pivot=3", "unknown; see"),  # a dead flag of the paper's scripts is not suggested
        ("--optimizer=iblr --delta=1 --weight_decay=0.1", "--delta 1: .*weight decay"),
        ("--model=inception --image_size=2", "image_size"),
        *("--model=mobile_small --batch_size=119", "--coreset_func=split", "--coreset_func=craig"),
        ("--dataset=digits --cutout_holes=1", "--cutout_holes: .*cifar10, .* and your own data"),
        *("--dataset=digits --image_size=32", "--dataset=digits --channels=3"),
        # flags that do nothing in their combination
        *("--rho=0.05", "--rho 0.1", "--adaptive", "--no-adaptive", "--optimizer=sam --hess_init=0.1", "--delta=1"),
        *("--lr_sched=const --lr_min=0", "--cutout_length=16", "--cutout_holes=0 --cutout_length=16", "--sync_bn"),
    ],
    "train_split.py": [
        *(f"--samis_validation_split_index={value}" for value in ("0", "11", "x", "-1", "1.5", "1,2", "")),
        *("--rho=0.05", "--coreset_func=full"),
    ],
    "train_prune.py": [
        *("", "--coreset_func=nope", "--coreset_func=random --selection=a.npz"),
        *(f"--coreset_func=random --coreset_fraction={value}" for value in ("0", "-0.1", "1.01", "nan")),
        *("--coreset_func=random --shots=0", "--coreset_func=random --shots=41"),
        ("--coreset_func=random --shots=2 --per_class=0", "--shots"),
        *(f"--coreset_func=random --shots=2 {flag}" for flag in ("--coreset_fraction=0.5", "--shots_up_to=2")),
        ("--coreset_func=random --per_class=no --coreset_fraction=0.001", "none of 120"),
        *("--coreset_func=random --per_class=maybe", "--coreset_func=random --epochs=3"),
        *("--coreset_func=tdds --coreset_pretrain_epochs=1", "--coreset_func=dual --coreset_pretrain_epochs=1"),
        *("--coreset_func=infobatch_dynamic --shots=2", "--coreset_func=infobatch_dynamic --shots_up_to=2"),
        *("--coreset_func=ccs --ccs_cutoff=1", "--coreset_func=dual --dual_c=0"),
        *("--coreset_func=grand --coreset_networks=0", "--coreset_func=infobatch_dynamic --optimizer=iblr"),
        # flags that do nothing in their combination
        *(f"--selection=a.npz {flag}" for flag in ("--coreset_fraction=0.1", "--shots=1", "--shots_up_to=2")),
        *(f"--selection=a.npz {flag}" for flag in ("--coreset_mode=large", "--per_class=1", "--scores_folder=.")),
        *(f"--selection=a.npz --{flag}=1" for flag in ("coreset_pretrain_epochs", "glister_eta", "coreset_networks")),
        *(f"--coreset_func=craig {flag}" for flag in ("--glister_eta=0.1", "--ccs_bins 50", "--no-dual_beta")),
        *("--coreset_func=craig --scores_folder=.", "--coreset_func=craig --rho=0.05"),
        *("--coreset_func=dual --no-dual_beta --dual_c=4", "--coreset_func=craig --selection_memory=0"),
        *(f"--coreset_func=craig --selection_subsample={value}" for value in ("0", "0.6", "never")),
        "--coreset_func=herding --selection_subsample=exact",
    ],
    "select_coreset.py": [
        ("--coreset_func=infobatch_dynamic", "train_prune.py"),
        *("--coreset_func=random --selection_memory=9", "--coreset_func=random --cutout_length=4"),
    ],
    "compare_pruning.py": ["--funcs craig ccs --fractions=0.5 --glister_eta=0.1"],
    "compute_sam_sgd.py": [
        *("--protocol=x", "--lr_sched=nope", "--epochs=0", "--scores_folder=/none", "--scores_folder=foo=/"),
    ],
    "average_scores.py": [
        *(("", "--seeds"), "--seeds", "--seeds=x", "--seeds 1 1", "--seeds=1 --modes=nope"),
        *("--seeds=1 --optimizer=nope", "--seeds=1 --window=10", "--seeds=1 --el2n_epochs 1 5"),
        *("--seeds=1 --exp=x --lr_sched=const", "--seeds=1 --modes samis_loss --optimizer=sgd"),
    ],
    "fetch_scores.py": [
        *(("--dataset=nope", "svhn"), ("--dataset=digits", "svhn")),
        *("--dataset=cifar10 --modes=mpe", "--base_url=nope"),
    ],
    "register_score.py": [
        *(("x.npy --mode=x", "--high"), ("x.npy --mode=csl --high=typical", "--mode")),
        *("x.npy --high=typical --mode=my-score", "x.npy --mode=x --high=typical --cost=-1"),
    ],
    "plot_proxies.py": [
        *("--modes=nope", "--plot=x", "--scores_folder=foo=/", "--reference_modes mem"),
    ],
    "plot_images.py": [
        *("--n=0", "--n=51", "--modes=mem --scores_folder=mem=/none"),
    ],
    "plot_hessian.py": ["--files x.pkl --epochs=3"],
    "compute_ntk.py": ["--projection_seed=0"],
    "compute_hessian_eigen.py": [
        *("--power_iterations=5", "--eigen_mode=power_iter --max_steps=9", "--trace_probes=0 --trace_tolerance=0.1"),
        *("--exp=x --lr_sched=const", "--checkpoint=x.pt --seed=1", "--eigen_split=test --subset=5"),
        "--scores_folder=.",
    ],
    "examples/1_loo_iterations.py": [
        *("--hess_init=0.1", "--optimizer=iblr --optim_var --var_version=kfac"),
        "--optimizer=adam --optim_var --laplace_backend=fast",
    ],
}  # fmt: skip
REQUIRED = {
    "average_scores.py": "--seeds=1",
    "register_score.py": "x.npy --mode=x --high=typical",
    "train_prune.py": "--coreset_func=random",
    "select_coreset.py": "--coreset_func=random",
    "compare_pruning.py": "--funcs=random --fractions=0.5",
}


def flag_rows():
    """Script, flags, and the word that must be named (by default, the last flag)."""
    for script, rows in BAD_FLAGS.items():
        for row in rows:
            flags, word = row if isinstance(row, tuple) else (row, None)
            yield script, flags, word or next((f for f in flags.split()[::-1] if f[:2] == "--"), flags).split("=")[0]
    for script in SCRIPTS:
        yield script, f"{REQUIRED.get(script, '')} --datas=digits", "--dataset"
        if script != "fetch_scores.py":  # which takes only a name
            yield script, f"{REQUIRED.get(script, '')} --dataset=nope", "--dataset"
            yield script, f"{REQUIRED.get(script, '')} --dataset=digits --image_size=5", "--image_size"


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz")


def training(data, base, model="mlp"):
    """Flags of a quick run on own data; if a flag is repeated, the last value is used."""
    return (f"--dataset={data}", f"--model={model}", "--epochs=1", "--batch_size=16", *folders(base, *TRAIN))


def pruning(data, base):
    return (f"--dataset={data}", "--model=small_mlp", "--coreset_epochs=1", *folders(base, *TRAIN))


@pytest.mark.parametrize(("script", "flags", "word"), list(flag_rows()))
def test_flags(blobs, tmp_path, monkeypatch, script, flags, word):
    data, place = f"npz:{blobs}", f"--metrics_folder={tmp_path}"
    usual = {
        "train_full.py": training(data, tmp_path),
        "train_split.py": training(data, tmp_path),
        "train_prune.py": pruning(data, tmp_path),
        "select_coreset.py": (f"--dataset={data}", *folders(tmp_path, *TRAIN)),
        "compute_sam_sgd.py": (f"--dataset={data}", place),
        "average_scores.py": (f"--dataset={data}", place),
        "fetch_scores.py": (f"--folder={tmp_path}",),
        "register_score.py": (f"--dataset={data}", place),
        "plot_proxies.py": (f"--dataset={data}", place, "--modes=samis_loss"),
        "plot_images.py": (f"--dataset={data}", place, "--modes=samis_loss"),
    }
    monkeypatch.chdir(tmp_path)
    refuse(script, *usual.get(script, ()), *flags.split(), status=FLAG, says=word)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock")]


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: get_score("x"), "mode"),
        (lambda: Proxy("x"), "mode"),
        (lambda: Proxy("mem", "a/b"), "dataset"),
        (lambda: published_files("digits"), "dataset"),
        (lambda: lookup("x"), "dataset"),
        (lambda: load_dataset("x", "."), "dataset"),
        (lambda: load_dataset("digits", ".", channels=3), "channels"),
        (lambda: load_dataset("digits", ".", image_size=5), "image_size"),
        (lambda: lookup("svhn").training_augmentation(True, cutout_holes=1), "cutout_holes"),
        (lambda: parse_subset("7", 6, np.arange(6) % 2), "subset"),
        (lambda: build_model("x", 2, 1, 8, 0), "model"),
        (lambda: build_model("inception", 2, 1, 2, 0), "model"),
        (lambda: build_model("lenet", 2, 1, 32, 0, True), "pretrained"),
        (lambda: TrainingConfig(optimizer="x"), "optimizer"),
        (lambda: TrainingConfig(learning_rate=0.1, lr_min=0.2), "lr_min"),
        (lambda: find_method("x"), "method"),
        (lambda: make_groups(np.arange(6) % 2, 2, fraction=2.0), "fraction"),
        (lambda: make_groups(np.arange(6) % 2, 2, shots=9), "shots"),
        (lambda: ComputeConfig(device="tpu"), "device"),
        (lambda: ModelConfig(model="x"), "model"),
        (lambda: SamisConfig("mlp", protocol="x"), "protocol"),
        (lambda: AverageConfig("mlp", modes=("csl", "x")), "modes"),
        (lambda: AverageConfig("mlp", seeds=(1, -1)), "seeds"),
        (lambda: Windows(window=1), "window"),
        (lambda: Windows(el2n_epochs=(0, 5)), "el2n_epochs"),
    ],
)
def test_the_library_names_arguments_not_flags(call, argument):
    with pytest.raises(UserError, match=f"^{argument}") as caught:
        call()
    assert "--" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- data

CLASSES = np.arange(30) % 3
PIXELS = np.zeros((30, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"y_train": np.array(list("abc") * 10)}, "y_train"),
        ({"y_train": -CLASSES}, "-2"),
        ({"y_train": CLASSES / 2}, "y_train"),
        ({"y_train": CLASSES * 2, "y_test": np.zeros(7, int)}, "class 1"),
        ({"y_train": CLASSES * 10**12, "y_test": np.zeros(7, int)}, "class 1"),
        ({"y_train": CLASSES * 0, "y_test": np.zeros(7, int)}, "two classes"),
        ({"y_train": CLASSES[:-1]}, "y_train"),
        ({"y_test": np.full(7, 5)}, "y_test"),
        ({"x_train": PIXELS / 255}, "x_train"),
        ({"x_train": PIXELS[..., 0, 0]}, "x_train"),
        ({"x_train": np.zeros((30, 8, 8, 4), np.uint8)}, "x_train"),
        ({"x_train": np.zeros((30, 8, 9, 1), np.uint8)}, "x_train"),
        ({"x_train": PIXELS[:0], "y_train": CLASSES[:0]}, "x_train"),
        ({"x_test": PIXELS[:0], "y_test": CLASSES[:0]}, "x_test"),
        ({"y_train": np.array([{}] * 30, dtype=object)}, "y_train"),
    ],
)
def test_arrays(tmp_path, arrays, word):
    path = write_blobs(tmp_path / "mine.npz", n=30, **arrays)
    refuse("train_full.py", *training(f"npz:{path}", tmp_path), status=FILE, says=("mine.npz", word), keep=tmp_path)


def test_files_that_are_no_npz(tmp_path):
    path = write_blobs(tmp_path / "mine.npz", n=30)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[2000] ^= 255
    np.save(tmp_path / "single.npy", PIXELS)
    for bad in (b"", b"hello", content[:3000], bytes(flipped), (tmp_path / "single.npy").read_bytes(), None):
        with spoilt(path, bad):
            line = refuse("train_full.py", *training(f"npz:{path}", tmp_path), status=FILE, says="mine.npz",
                          keep=tmp_path)  # fmt: skip
            assert "allow_pickle=`" not in line, "no advice to load it all the same"
    refuse("train_full.py", *training(f"npz:{tmp_path}", tmp_path), status=FILE, says="is a folder")
    for script, flags in (("train_split.py", ()), ("compute_sam_sgd.py", ()), ("average_scores.py", ("--seeds=1",)),
                          ("plot_images.py", ()), ("plot_proxies.py", ())):  # fmt: skip
        refuse(script, f"--dataset=npz:{tmp_path / 'none.npz'}", *flags, status=FILE, says="none.npz")


@pytest.fixture
def photos(tmp_path):
    """Two classes of gray 8x8 images."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                save(folder / f"{number}.png", rng.integers(0, 255, (8, 8)))
    return tmp_path / "photos"


def save(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def half_an_image(path):
    path.write_bytes(path.with_name("0.png").read_bytes()[:60])


def deep_image(path):
    Image.fromarray(np.zeros((8, 8), np.int32)).save(path, "TIFF")


@pytest.mark.parametrize(
    ("name", "spoil", "word"),
    [
        ("train/eel", lambda path: path.mkdir(), "train/eel"),  # a class without images
        ("test/eel", lambda path: shutil.copytree(path.with_name("dog"), path), "test/eel"),  # no training images
        ("train/cat", shutil.rmtree, "two classes"),
        ("test/dog/x.png", lambda path: save(path, np.zeros((9, 9))), "image_size"),
        ("train/dog/x.png", lambda path: path.write_bytes(b"junk"), "x.png"),
        ("train/dog/x.png", half_an_image, "x.png"),
        ("train/dog/x", lambda path: path.mkdir(), "dog/x"),
        ("train/dog/x.png", deep_image, "x.png"),
        ("train", shutil.rmtree, "train"),
        ("", shutil.rmtree, "photos"),
    ],
)
def test_folders_of_images(photos, tmp_path, name, spoil, word):
    spoil(photos / name)
    refuse("train_full.py", *training(f"folder:{photos}", tmp_path), status=FILE, says=word, keep=tmp_path)


def test_all_bad_images_of_a_folder_are_named(photos, tmp_path):
    (photos / "train" / "dog" / "x.png").write_bytes(b"junk")
    save(photos / "test" / "dog" / "y.png", np.zeros((9, 9)))
    refuse("train_full.py", *training(f"folder:{photos}", tmp_path), status=FILE, says=("x.png", "y.png"))


def test_sizes_that_an_argument_mends(tmp_path):
    images = np.zeros((2, 8, 6), np.uint8)
    np.savez(tmp_path / "oblong.npz", x_train=images, y_train=[0, 1], x_test=images, y_test=[0, 1])
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "oblong" / part / name).mkdir(parents=True)
            save(tmp_path / "oblong" / part / name / "0.png", images[0])
    for dataset in (f"folder:{tmp_path / 'oblong'}", f"npz:{tmp_path / 'oblong.npz'}"):
        with pytest.raises(UserError, match=r" --image_size$"):
            load_dataset(dataset, ".")
        refuse("train_full.py", *training(dataset, tmp_path), status=FILE, says="--image_size$")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "some.txt"),
        (b"1\ntwo\n3", "two"),
        (b"1\n-3", "-3"),
        (b"1.5", "1.5"),
        (b"9" * 30, "9999"),
        (b"\xff\xfe\x00", "some.txt"),
        (b"5\n7\n5", "5"),
        (b"3\n30", "30"),
        (None, "some.txt"),
    ],
)
def test_subset_files(tmp_path, content, word):
    data = write_blobs(tmp_path / "mine.npz", n=30)
    if content is not None:
        (tmp_path / "some.txt").write_bytes(content)
    flags = (*training(f"npz:{data}", tmp_path), f"--subset={tmp_path / 'some.txt'}")
    refuse("train_full.py", *flags, status=FILE, says=("some.txt", word), keep=tmp_path)


def test_catalogue_files_that_are_not_theirs(tmp_path):
    (tmp_path / "datasets").mkdir()
    for changes in ({"size": 8}, {"size": 32, "classes": 12}):
        write_blobs(tmp_path / "datasets" / "cifar10.npz", n=36, channels=3, **changes)
        refuse("train_full.py", *training("cifar10", tmp_path), status=FILE, says="cifar10.npz", keep=tmp_path)
    refuse("train_full.py", *training("imagenet", tmp_path), status=FILE, says="datasets/imagenet")


def test_split_files_that_are_damaged(tmp_path):
    flags = training(f"npz:{write_blobs(tmp_path / 'mine.npz', n=N)}", tmp_path, "small_mlp")
    succeed("train_split.py", *flags)
    folder = next((tmp_path / "datasets").glob("splits/*/seed_1"))
    contents = ("", "garbage\n", "1\n2\n", "999\n", (folder / "val_6.txt").read_text())
    for number, content in enumerate(contents, 1):
        with spoilt(folder / f"val_{number}.txt", content.encode()):
            refuse("train_split.py", *flags, "--overwrite", status=FILE, says=f"delete {folder}", keep=tmp_path)


def test_splits_of_too_few_examples(tmp_path):
    flags = training(f"npz:{write_blobs(tmp_path / 'few.npz', n=12)}", tmp_path)
    for index in (1, 10):  # without a validation example, and without a training example
        index = f"--samis_validation_split_index={index}"
        refuse("train_split.py", *flags, index, status=FLAG, says=index.replace("=", " "))


# ------------------------------------------------------------------------------------- models to score


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--epochs=9", "epoch 9"),
        ("--seed=5", "--seed=5"),
        ("--protocol=split", "train_split.py"),
        ("--lr_sched=step", "sgd_sched_step"),
        ("--model=lenet", "standard_lenet_over"),
        ("--subset=5 --overwrite", "--subset"),
        ("--precision=fp64", "--overwrite"),  # other settings
    ],
)
def test_networks_that_are_missing_or_others(world, flags, word):
    refuse("compute_sam_sgd.py", *world.compute(*flags.split()), status=FILE, says=word, keep=world.base)


def test_networks_of_other_data(world, tmp_path):
    for changes, word in (
        ({"classes": 4}, "num_classes"),
        ({"size": 10}, "image_size"),
        ({"y_train": np.roll(np.arange(N) % 3, 1)}, "label_hash"),
    ):
        data = write_blobs(tmp_path / "other.npz", n=N, **changes)
        name = load_dataset(f"npz:{data}", tmp_path)[0].entry.name
        for optimizer in ("sgd", "sam"):
            run = world.run(optimizer)
            shutil.copytree(world.base / "models" / run, tmp_path / "models" / run.replace(world.name, name))
        refuse("compute_sam_sgd.py", f"--dataset=npz:{data}", "--model=small_mlp", "--epochs=3",
               *folders(tmp_path, "datasets", "models", "metrics"), status=FILE, says=("epoch_3.pt", word),
               keep=tmp_path)  # fmt: skip


def test_damaged_networks(world, tmp_path):
    intact, content = read_checkpoint(world.checkpoint), world.checkpoint.read_bytes()
    weights, proof = intact["model_state"], tmp_path / "proof"

    def packed(**changes):
        file = io.BytesIO()
        torch.save({**intact, **changes}, file)
        return file.getvalue()

    file = io.BytesIO()
    torch.save(weights, file)  # a checkpoint of something else
    for bad in (
        *(content[:2000], b"", b"junk", file.getvalue(), packed(extra=RunsCode(proof))),
        *(packed(model="nope"), packed(settings=5), packed(num_classes=7), packed(normalisation={})),
        *(packed(normalisation={"mean": mean, "std": [0.5]}) for mean in ([0.5, 0.5], ["x"], [float("nan")], 1)),
        *(packed(normalisation={"mean": [0.5], "std": std}) for std in ([0.0], [None], [], torch.ones(1))),
        *(
            packed(model_state={name: value.to(kind) for name, value in weights.items()})
            for kind in (torch.int64, torch.complex64, torch.bool)
        ),
        packed(model_state={**weights, "head.bias": 3}),
        packed(model_state={name: value * float("nan") for name, value in weights.items()}),
    ):
        with spoilt(world.checkpoint, bad):
            refuse("compute_sam_sgd.py", *world.compute("--overwrite"), status=FILE, says="epoch_3.pt",
                   keep=world.base)  # fmt: skip
    assert not proof.exists()


# -------------------------------------------------------------------------------------------- scores of the seeds


@pytest.mark.parametrize(
    ("flags", "status", "word"),
    [
        ("--seeds 1 3", FILE, "--seed 3"),
        ("--seeds 1 3 --optimizer=sgd", FILE, "seed_3/dynamics.npz"),
        ("--exp=nope", FILE, "nope"),
        ("--modes forg", FLAG, "--optimizer and --lr_sched"),  # two runs match
    ],
)
def test_seeds_and_runs_that_are_missing(world, flags, status, word):
    refuse("average_scores.py", *world.average(*flags.split()), status=status, says=word, keep=world.base)


def with_arrays(path, **changes):
    """The bytes of an npz file with some arrays replaced; None removes an array."""
    with np.load(path) as old:
        arrays = {**dict(old), **changes}
    file = io.BytesIO()
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
    return file.getvalue()


SEED_FILES = [
    *({"epoch": 1}, {"epoch": np.array("x")}, {"seed": np.array([1, 2])}, {"protocol": "split"}),
    *({"label_hash": "0" * 16}, {"label_hash": np.array(5)}),
    *({"settings": value} for value in ('{"lr_sched": "step"}', "{broken", np.array(["a", "b"]), np.zeros(3))),
    *({"arr_0": value} for value in (np.zeros(5), np.full(N, np.nan), np.array(["a"] * N))),
    *({"indices": value} for value in (np.array([N]), np.arange(4)[None], np.array(0))),
    {"loss_sam": None},
]
DYNAMICS = [{"loss": None}, {"loss": np.zeros((2, 5), np.float32)}, {"labels": np.zeros(5, int)}, {"settings": "[1]"}]


def test_seeds_that_are_damaged_or_do_not_belong_together(world):
    for path, changes, flag in (
        *((world.seed_file, changes, "--overwrite") for changes in SEED_FILES),
        *((world.dynamics, changes, "--optimizer=sgd") for changes in DYNAMICS),
    ):
        with spoilt(path, with_arrays(path, **changes)):
            refuse("average_scores.py", *world.average(flag), status=FILE, says=path.name, keep=world.base)


def test_damaged_scores_of_a_run(world, tmp_path):
    path, proof = world.dynamics.with_name("hessian_flat_train.pkl"), tmp_path / "proof"
    record = path.with_name("end_of_training.json")  # missing in files of older versions
    contents = (
        RunsCode(proof),
        [1, 2],
        *(dict.fromkeys(range(n), v) for n, v in ((N, "a"), (N + 5, 1.0), (N, np.nan))),
    )
    for bad in (b"junk", path.read_bytes()[:200], None, *map(pickle.dumps, contents)):
        with spoilt(record, None), spoilt(path, bad):
            refuse("average_scores.py", *world.average("--optimizer=sgd", "--modes", "flat"), status=FILE,
                   says=path.name, keep=world.base)  # fmt: skip
    assert not proof.exists()


# ------------------------------------------------------------------------------------------------------ score files

GOOD = {index: index / N for index in range(N)}


@pytest.mark.parametrize("script", ["plot_proxies.py", "plot_images.py"])
def test_score_files(world, tmp_path, script):
    proof = tmp_path / "proof"
    contents = (
        *(dict.fromkeys(range(50), 0.5), dict.fromkeys(range(70), 0.5), {**GOOD, 3: float("nan")}, {**GOOD, 3: "x"}),
        *({"a": 1.0}, {index: score for index, score in GOOD.items() if index != 7}, [1, 2], RunsCode(proof)),
    )
    record = world.scores.with_suffix(".json")
    for content in contents:
        with spoilt(world.scores, pickle.dumps(content)), spoilt(record, None):
            refuse(script, *world.plot(tmp_path), status=FILE, says=world.scores.name, keep=world.base)
    for content in (b"{broken", b"[]", b'{"total": "x"}', b'{"label_hash": "0"}'):
        with spoilt(record, content):
            refuse(script, *world.plot(tmp_path), status=FILE, says=world.scores.stem)
    assert not list(tmp_path.iterdir()), "nothing was drawn, and no code ran"
    flags = (
        ("--reference=/none", f"--reference={tmp_path}") if "proxies" in script else ("--subset=0", "--classes=nope")
    )
    for flag in flags:
        refuse(script, *world.plot(tmp_path, flag), status=FLAG, says=flag.split("=")[0], keep=world.base)
    (tmp_path / "taken").write_text("")
    refuse(script, *world.plot(tmp_path / "taken"), status=FILE, says="taken")


@pytest.mark.parametrize("script", ["plot_proxies.py", "plot_images.py", "train_prune.py"])
def test_scores_that_nobody_made(world, tmp_path, script):
    flags = (world.dataset, f"--metrics_folder={tmp_path / 'metrics'}")
    for mode, word in (("samis_loss", "compute_sam_sgd.py"), ("forg", "--measure_proxies"), ("mem", "mem"),
                       ("mpe", "examples")):  # fmt: skip
        func = {"samis_loss": "sam-sgd-loss"}.get(mode, mode)
        chosen = (
            (f"--coreset_func=min_{func}", "--model=small_mlp") if script == "train_prune.py" else ("--modes", mode)
        )
        if (script, mode) != ("train_prune.py", "mpe"):
            refuse(script, *flags, *chosen, status=FILE, says=word, keep=tmp_path)
    if script == "plot_proxies.py":
        refuse(script, *flags, status=FILE, says="average_scores.py")
    assert not list(tmp_path.rglob("*.pt"))


def test_memorization_scores(world, tmp_path):
    labels, values = np.arange(N) % 3, np.arange(N) / N
    path = SCORES["mem"].published_path(tmp_path / "scores", world.name)
    path.parent.mkdir(parents=True)
    scores = f"--scores_folder={tmp_path / 'scores'}"
    compute = ("compute_sam_sgd.py", *world.compute("--overwrite", scores))
    np.savez(path, tr_mem=values, tr_labels=labels)
    assert "and memori" in succeed(*compute).out
    for arrays in ({"tr_mem": np.zeros(3)}, {"other": values}, {"tr_mem": np.full(N, np.nan)}):
        np.savez(path, **arrays)
        refuse(*compute, status=FILE, says=path.name, keep=world.base)
    np.savez(path, tr_mem=values, tr_labels=labels[::-1])
    for script, *flags in (compute, *((script, world.dataset, "--modes", "mem", f"--plots_folder={tmp_path}", scores)
                                      for script in ("plot_images.py", "plot_proxies.py"))):  # fmt: skip
        refuse(script, *flags, status=FILE, says=("infl_matrix", "labels"), keep=world.base)
    path.unlink()
    refuse(*compute, status=FILE, says="memorization", keep=world.base)


FOLDERS_OF = {
    "plot_images.py": ("plots",),
    "plot_proxies.py": ("plots",),
    "train_prune.py": ("models", "log", "resume_ckpts"),
    "select_coreset.py": ("models", "log", "resume_ckpts"),
    "compare_pruning.py": ("models", "log", "resume_ckpts", "plots"),
    "compute_ntk.py": ("models", "ntk"),
    "compute_hessian_eigen.py": ("models", "hessian"),
}
READING_SCORES = [
    ("plot_images.py", "--modes samis_loss"),
    ("plot_proxies.py", "--modes samis_loss"),
    ("plot_proxies.py", ""),
    ("train_prune.py", "--model=small_mlp --coreset_func=min_sam-sgd-loss"),
    ("select_coreset.py", "--model=small_mlp --coreset_func=min_sam-sgd-loss"),
    ("compare_pruning.py", "--model=small_mlp --funcs min_sam-sgd-loss --fractions 0.5"),
    ("compute_ntk.py", "--model=small_mlp --ntk_chosen_metric=samis_loss --seeds 1"),
    ("compute_hessian_eigen.py", "--model=small_mlp --high_low_spec=samis_loss:low:0.3 --epochs=1"),
]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A model trained on digits."""
    base = tmp_path_factory.mktemp("digits")
    succeed("train_full.py", "--dataset=digits", "--model=small_mlp", "--epochs=2", "--lr_sched=const",
            "--batch_size=512", *folders(base, *TRAIN))  # fmt: skip
    return base / "models"


@pytest.mark.parametrize(("script", "flags"), READING_SCORES)
def test_shipped_scores_are_not_taken_for_those_of_a_given_folder(digits_run, tmp_path, script, flags):
    places = {name: tmp_path / name for name in FOLDERS_OF[script]}
    if script.startswith("compute_"):
        places["models"] = digits_run
    given = [f"--{name}_folder={place}" for name, place in places.items()]
    (tmp_path / "given").mkdir()
    for folder in ("--metrics_folder=", "--scores_folder=", "--scores_folder=samis_loss="):
        refuse(script, "--dataset=digits", *flags.split(), *given, f"{folder}{tmp_path / 'given'}", status=FILE,
               says=("samis_loss_digits", r"\(--scores_folder=\S*src/metrics\)"))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- selections


@pytest.mark.parametrize(
    "scores",
    [
        dict.fromkeys(range(50), 0.5),
        {index: float("nan") if index == 7 else 0.1 for index in range(120)},
        {index: float("inf") if index == 7 else 0.1 for index in range(120)},
        list(range(120)),
    ],
    ids=("too few", "nan", "inf", "a list"),
)
def test_scores_to_select_by(blobs, tmp_path, scores):
    path = SCORES["csl"].path(tmp_path / "metrics", load_dataset(f"npz:{blobs}", tmp_path)[0].entry.name)
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(scores))
    refuse(
        "train_prune.py", *pruning(f"npz:{blobs}", tmp_path), "--coreset_func=min_csl", status=FILE, says=path.name
    )


@pytest.mark.parametrize(
    "arrays",
    [
        None,
        b"no archive",
        {"picks": [1]},
        *({"indices": value} for value in ([1, 2, 2], [1, 120], [-1, 5], [0.5], np.zeros((2, 2), int))),
        *({"indices": [1, 2], "weights": value} for value in ([1.0], [1.0, -1.0], [np.nan, 1.0], [0.0, 0.0])),
        {"indices": [1, 2], "label_hash": "0" * 16},
        {"indices": [1, 2], "settings": "{broken"},
    ],
    ids=str,
)
def test_selection_files(blobs, tmp_path, arrays):
    path = tmp_path / "chosen.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays:
        path.write_bytes(arrays)
    flags = (*pruning(f"npz:{blobs}", tmp_path), f"--selection={path}")
    refuse("train_prune.py", *flags, status=FILE, says="chosen.npz")


def test_a_selection_outside_the_subset(blobs, tmp_path):
    np.savez(tmp_path / "chosen.npz", indices=[1, 40])
    (tmp_path / "subset.txt").write_text("\n".join(map(str, range(30))))
    more = (f"--selection={tmp_path / 'chosen.npz'}", f"--subset={tmp_path / 'subset.txt'}")
    refuse("train_prune.py", *pruning(f"npz:{blobs}", tmp_path), *more, status=FILE, says="--subset")


def test_selections_of_other_settings_are_not_overwritten(blobs, tmp_path):
    run = (*pruning(f"npz:{blobs}", tmp_path), "--coreset_func=random", "--coreset_fraction=0.5")
    select = [flag for flag in run if flag != "--coreset_epochs=1"]
    succeed("train_prune.py", *run)
    for script, *flags in (("train_prune.py", *run, "--per_class=0"), ("select_coreset.py", *select, "--per_class=0"),
                           ("train_prune.py", *run, "--learning_rate=0.1")):  # fmt: skip
        name = flags[-1].strip("-").split("=")[0]
        refuse(script, *flags, status=FILE, says=(name, "--overwrite"), keep=tmp_path)
    succeed("train_prune.py", *run, "--per_class=0", "--overwrite")
    select = [flag for flag in select if "random" not in flag] + [
        "--coreset_func=forget",
        "--coreset_pretrain_epochs=1",
    ]
    succeed("select_coreset.py", *select, "--coreset_pretrain_lr=0.05")
    other = ("select_coreset.py", *select, "--coreset_pretrain_lr=0.06")
    says = (r"pretraining learning_rate \(0\.05 vs. 0\.06\)", "--overwrite")
    refuse(*other, status=FILE, says=says, keep=tmp_path)
    succeed(*other, "--overwrite")


def test_another_pretraining_that_is_not_on_disk_is_named_by_its_hash(blobs, tmp_path):
    select = [flag for flag in pruning(f"npz:{blobs}", tmp_path) if flag != "--coreset_epochs=1"]
    select += ["--coreset_func=forget", "--coreset_pretrain_epochs=1", f"--out={tmp_path / 'chosen.npz'}"]
    succeed("select_coreset.py", *select)
    says = r"chosen\.npz: was made with different settings: pretraining \([0-9a-f]{16} vs. [0-9a-f]{16}\);"
    refuse("select_coreset.py", *select, "--model=large_mlp", status=FILE, says=says, keep=tmp_path)


def test_a_stored_selection_of_another_subset_has_one_advice(blobs, tmp_path):
    run = (*pruning(f"npz:{blobs}", tmp_path), "--coreset_func=random", "--coreset_fraction=0.5")
    succeed("train_prune.py", *run)
    says = (
        "which --subset or --exclude leaves out; give the flags of the file, or (give|use) --overwrite to replace it"
    )
    refuse("train_prune.py", *run, "--subset=30", status=FILE, says=says, keep=tmp_path)


def test_what_pretraining_refuses_names_its_own_flags_alone(blobs, tmp_path):
    run = (*pruning(f"npz:{blobs}", tmp_path), "--coreset_func=forget", "--coreset_fraction=0.5")
    refuse("train_prune.py", *run, "--model=inception", "--image_size=2", status=FLAG, says=": --model inception: ")
    refuse("train_prune.py", *run, "--model=mobile_small", "--coreset_pretrain_batch_size=119", status=FLAG,
           says="--coreset_pretrain_batch_size: 120 examples leave")  # fmt: skip


@pytest.mark.parametrize("seconds", ["long", np.zeros(3)])
def test_a_damaged_stored_selection_is_replaced_on_request(blobs, tmp_path, seconds):
    run = (*pruning(f"npz:{blobs}", tmp_path), "--coreset_func=random", "--coreset_fraction=0.5")
    succeed("train_prune.py", *run)
    (path,) = tmp_path.rglob("selection.npz")
    before = path.read_bytes()
    path.write_bytes(with_arrays(path, seconds=seconds))
    refuse("train_prune.py", *run, status=FILE, says=("seconds", "--overwrite"))
    succeed("train_prune.py", *run, "--overwrite")
    with np.load(path) as after, np.load(io.BytesIO(before)) as wanted:
        np.testing.assert_array_equal(after["indices"], wanted["indices"])


# ----------------------------------------------------------------------------------- files and folders to read


def test_the_file_that_is_read_is_named(tmp_path):
    flags = ("--dataset=digits", "--modes", "samis_loss", "--only_overview", "--n=1", f"--plots_folder={tmp_path}")
    shipped = ROOT / "src" / "metrics" / "sam_sgd" / "samis_loss_digits.pkl"
    given = tmp_path / "run=3"  # a folder, not the scores of a mode called "run"
    (given / "sam_sgd").mkdir(parents=True)
    own = given / "sam_sgd" / shipped.name
    own.write_bytes(shipped.read_bytes())
    own.with_suffix(".json").write_bytes(shipped.with_suffix(".json").read_bytes())
    for folder, path in ((given, own), (f"samis_loss={given}", own)):
        assert f"read from {path}" in succeed("plot_images.py", *flags, f"--scores_folder={folder}").err
    refuse("plot_images.py", *flags, "--scores_folder=run=3", status=FLAG, says="run=3")


def test_published_scores_that_cannot_be_had(tmp_path):
    flags = ("--dataset=cifar10", "--modes=forg", f"--folder={tmp_path}", "--base_url=http://127.0.0.1:9")
    refuse("fetch_scores.py", *flags, status=FILE, says=("forg_cifar10.pkl", "URL"), keep=tmp_path)
    path = SCORES["forg"].path(tmp_path, "cifar10")
    path.parent.mkdir(exist_ok=True)
    path.write_text("the user's own")
    refuse("fetch_scores.py", *flags, status=FILE, says=("forg_cifar10.pkl", "--overwrite"), keep=tmp_path)
    shown = " ".join(call("fetch_scores.py", "--help").out.split())
    assert "cifar10: eps, flat, etl, forg, samis_loss, samis_prob; cifar100: eps" in shown
