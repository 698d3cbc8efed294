#!/usr/bin/env python3
r"""Draw the spectral densities of several trained networks' Hessians, and tabulate how flat their minima are.

Reads the spectra that compute_hessian_eigen.py wrote under --hessian_folder, or --files. Seeds of one optimiser (and
one part of the examples) are averaged. Writes, as PNG and PDF, {plots_folder}/hessian/{dataset}/{name}, and the table
(means and standard deviations over seeds) beside it as csv and md.

  python plot_hessian.py --dataset=digits --model=lenet --optimizers sgd sam --epochs=20
  python plot_hessian.py --dataset=cifar10 --model=resnet18 --optimizers sgd --epochs=160 --seeds 1 2 3 \
      --high_low_specs all mem:low:0.3 mem:high:0.3
"""

from argparse import Namespace
from pathlib import Path

from src.artifacts import save_figure, spectrum_figure_stem, write_text
from src.curvature.hessian_groups import (
    Measured,
    Query,
    SpectrumGroup,
    csv_table,
    find_group,
    markdown_table,
    warn_of_differences,
)
from src.curvature.hessian_plots import spectrum_figure
from src.datasets import load_dataset
from src.errors import FlagError
from src.optimizers import OPTIMIZERS, SCHEDULES
from src.scripting import Parser, run_script, start_logging
from src.settings import SEED, add_data_flags, add_folder_flags, add_model_choice, file_name, number
from src.settings.geometry import add_drawn_flags


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_data_flags(parser, subset=False)
    group = add_model_choice(parser)
    add = group.add_argument
    add("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=["sgd", "sam"], help="optimisers of the runs")
    add("--lr_sched", choices=tuple(SCHEDULES), help="schedule of the runs (default: the only one there is)")
    add("--seeds", type=SEED, nargs="+", help="seeds to average (default: all there are)")
    add("--epochs", type=number(int, 1), help="epoch of the checkpoints (default: the only one there is)")
    add_drawn_flags(parser)
    group = parser.add_argument_group("figure")
    group.add_argument(
        "--files", type=Path, nargs="+", metavar="FILE", help="draw these spectra, one by one (default: by the flags)"
    )
    group.add_argument("--labels", nargs="+", metavar="TEXT", help="what the figure calls them (default: their runs)")
    group.add_argument(
        "--name", type=file_name, help="name of figure and table (default: model, part and epoch, or spectra)"
    )
    add_folder_flags(parser, "datasets", "hessian", "plots")
    return parser.parse_args()


def main() -> None:
    """Parse, read, draw, tabulate."""
    args = parse()
    start_logging(quiet=True)
    if args.labels is not None and len(args.labels) != (wanted := len(args.files or ())):
        raise FlagError(f"--labels: {len(args.labels)} for {wanted} --files; give one for each")
    dataset, groups = given(args) if args.files else found(args)
    warn_of_differences(groups)
    settings = groups[0].spectra[0].record.get("settings", {})
    epoch = settings.get("epoch", args.epochs)
    usual = "spectra" if args.files else f"{args.model}_{args.eigen_split}_epoch_{epoch}_{mode_of(args)}"
    stem = spectrum_figure_stem(args.plots_folder, dataset, args.name or usual)
    matrix = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}[settings.get("operator", "hessian")]
    part = {"train": "training", "test": "test"}[settings.get("eigen_split", args.eigen_split)]
    where = "" if args.files else f"{args.model}, {dataset}, epoch {epoch}: "
    figure = spectrum_figure(groups, f"{where}{matrix} of the {part} loss")
    table = markdown_table(groups)
    print(table)
    for path in (
        *save_figure(figure, stem),
        write_text(stem.with_name(f"{stem.name}.csv"), csv_table(groups)),
        write_text(stem.with_name(f"{stem.name}.md"), table),
    ):
        print(path)


def given(args: Namespace) -> tuple[str, list[SpectrumGroup]]:
    """The spectra of ``--files``, each on its own."""
    spectra = [Measured.read(path) for path in args.files]
    labels = args.labels or [" ".join(path.parts[-4:-1]) if len(path.parts) > 3 else path.stem for path in args.files]
    names = {spectrum.record.get("settings", {}).get("dataset", "unknown") for spectrum in spectra}
    dataset = names.pop() if len(names) == 1 else "several"
    return dataset, [SpectrumGroup(label, [spectrum]) for label, spectrum in zip(labels, spectra, strict=True)]


def found(args: Namespace) -> tuple[str, list[SpectrumGroup]]:
    """The spectra of the flags, one group per optimiser and part of the examples."""
    name = args.dataset
    if ":" in name:  # own data are named by their content
        parts = load_dataset(name, args.datasets_folder, image_size=args.image_size, channels=args.channels)
        name = parts[0].entry.name
    what = (name, args.model, args.eigen_split, mode_of(args))
    query = Query(args.hessian_folder, *what, args.seeds, args.epochs, args.lr_sched)
    specs = list(dict.fromkeys(map(str, args.high_low_specs)))
    groups = []
    for optimizer in dict.fromkeys(args.optimizers):
        for spec in specs:
            label = optimizer.upper() if specs == ["all"] else f"{optimizer.upper()}, {spec}"
            groups.append(find_group(query, optimizer, spec, label))
    return name, groups


def mode_of(args: Namespace) -> str:
    """The mode in the spectra's names."""
    return args.eigen_mode if args.operator == "hessian" else f"{args.eigen_mode}_{args.operator}"


if __name__ == "__main__":
    run_script(main)
