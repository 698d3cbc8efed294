#!/usr/bin/env python3
r"""Plot the spectral densities of several trained models' Hessians, and tabulate how flat their minima are.

Reads the spectra that compute_hessian_eigen.py wrote under --hessian_folder, or --files. Averages the seeds of each
optimizer and subset of examples. Writes {plots_folder}/hessian/{dataset}/{name} as PNG and PDF, the table (means and
standard deviations over seeds) as csv and md, and the list of source files as json.

  python plot_hessian.py --dataset=digits --model=lenet --optimizers sgd sam --epochs=20
  python plot_hessian.py --dataset=cifar10 --model=resnet18 --optimizers sgd --epochs=160 --seeds 1 2 3 \
      --high_low_specs all mem:low:0.3 mem:high:0.3
"""

from argparse import Namespace
from pathlib import Path

from src.artifacts.io import save_figure, write_json, write_text
from src.artifacts.paths import Folders, eigen_name, spectrum_figure_name, spectrum_figure_stem
from src.cli import SUBSET_FLAGS, Parser, build, file_name, restrict, run_script
from src.curvature.config import SpectrumQuery
from src.curvature.results import (
    SpectrumGroup,
    StoredSpectrum,
    csv_table,
    find_spectra,
    markdown_table,
    warn_of_differences,
)
from src.datasets import DataConfig, dataset_name
from src.errors import ArgumentError
from src.models import ModelConfig

OF_RUNS = ("--model", "--optimizers", "--lr_sched", "--seeds", "--epochs", "--eigen_split", "--high_low_specs",
           "--operator", "--eigen_mode")  # fmt: skip
"""The flags that choose spectra; they do not combine with --files."""


def parse() -> Namespace:
    """Parse and check the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS)
    parser.add(ModelConfig, "model", only=("model",))
    parser.add(SpectrumQuery, "spectra")
    group = parser.add_argument_group("figure")
    group.add_argument(
        "--files", type=Path, nargs="+", metavar="FILE", help="plot these spectra, one panel each (default: by flags)"
    )
    group.add_argument("--labels", nargs="+", metavar="TEXT", help="names in the figure (default: the runs' names)")
    group.add_argument(
        "--name", type=file_name, help="name of figure and table (default: from the flags; with --files: spectra)"
    )
    parser.add(Folders, "folders", only=("datasets_folder", "hessian_folder", "plots_folder"))
    restrict(parser, {OF_RUNS: (lambda args: not args.files, "with --files")})
    return parser.parse_args()


def main() -> None:
    """Parse, read, plot, tabulate."""
    args = parse()
    build(DataConfig, args)  # checks the data flags
    if args.labels is not None and len(args.labels) != (wanted := len(args.files or ())):
        raise ArgumentError("labels", f": got {len(args.labels)} for {wanted} --files; give one per file")
    from src.curvature.plots import spectrum_figure

    dataset, groups, usual, where = given(args) if args.files else found(args)
    warn_of_differences(groups)
    stem = spectrum_figure_stem(args.plots_folder, dataset, args.name or usual)
    settings = groups[0].spectra[0].settings
    matrix = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}[settings.get("operator", "hessian")]
    part = {"train": "training", "test": "test"}[settings.get("eigen_split", args.eigen_split)]
    counts = sorted({spectrum.settings.get("examples", 0) for group in groups for spectrum in group.spectra})
    over = f" ({counts[0]:,} examples)" if len(counts) == 1 and counts[0] else ""
    figure = spectrum_figure(groups, f"{where}{matrix} of the {part} loss{over}")
    table = markdown_table(groups)
    print(table)
    sources = [
        {
            "run": group.label,
            "spectra": [{"file": str(one.path), "settings": one.settings or None} for one in group.spectra],
        }
        for group in groups
    ]
    for path in (
        *save_figure(figure, stem),
        write_text(stem.with_name(f"{stem.name}.csv"), csv_table(groups)),
        write_text(stem.with_name(f"{stem.name}.md"), table),
        write_json(stem.with_name(f"{stem.name}.json"), {"dataset": dataset, "runs": sources}),
    ):
        print(path)


def given(args: Namespace) -> tuple[str, list[SpectrumGroup], str, str]:
    """For ``--files``: the data set, one group per spectrum, the figure's default name, and its title's prefix."""
    spectra = [StoredSpectrum.read(path) for path in args.files]
    labels = args.labels or [" ".join(path.parts[-4:-1]) if len(path.parts) > 3 else path.stem for path in args.files]
    names = {spectrum.settings.get("dataset", "unknown") for spectrum in spectra}
    dataset = names.pop() if len(names) == 1 else "several"
    groups = [SpectrumGroup(label, [spectrum]) for label, spectrum in zip(labels, spectra, strict=True)]
    return dataset, groups, "spectra", ""


def found(args: Namespace) -> tuple[str, list[SpectrumGroup], str, str]:
    """The same for the flags, with one group per optimizer and subset of examples."""
    name = dataset_name(args.dataset)
    data = {key: getattr(args, key) for key in ("dataset", "image_size", "channels")}
    query = build(SpectrumQuery, args, folder=args.hessian_folder, dataset_name=name, data=data)
    groups, epoch = find_spectra(query)
    usual = spectrum_figure_name(
        args.model,
        list(dict.fromkeys(args.optimizers)),
        args.eigen_split,
        epoch,
        eigen_name(args.eigen_mode, args.operator),
        specs=list(dict.fromkeys(args.high_low_specs)),
        lr_sched=args.lr_sched,
        seeds=args.seeds,
    )
    return name, groups, usual, f"{args.model}, {name}, epoch {epoch}: "


if __name__ == "__main__":
    run_script(main)
