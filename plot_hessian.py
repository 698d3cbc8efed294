#!/usr/bin/env python3
r"""Draw the spectral densities of several trained networks' Hessians, and tabulate how flat their minima are.

Reads the spectra that compute_hessian_eigen.py wrote under --hessian_folder, or --files. Seeds of one optimiser (and
one part of the examples) are averaged. Writes, as PNG and PDF, {plots_folder}/hessian/{dataset}/{name}, and beside it
the table (means and standard deviations over seeds) as csv and md, and the files that it is made of as json.

  python plot_hessian.py --dataset=digits --model=lenet --optimizers sgd sam --epochs=20
  python plot_hessian.py --dataset=cifar10 --model=resnet18 --optimizers sgd --epochs=160 --seeds 1 2 3 \
      --high_low_specs all mem:low:0.3 mem:high:0.3
"""

from argparse import Namespace
from pathlib import Path

from src.artifacts import (
    eigen_name,
    save_figure,
    spectrum_figure_name,
    spectrum_figure_stem,
    write_json,
    write_text,
)
from src.cli import Parser, restrict, run_script
from src.curvature.hessian_files import (
    Measured,
    Query,
    SpectrumGroup,
    csv_table,
    find_group,
    markdown_table,
    refuse_other_epochs,
    refuse_other_examples,
    sources,
    warn_of_differences,
)
from src.datasets import load_dataset
from src.errors import FlagError
from src.optimizers import OPTIMIZERS, SCHEDULES
from src.settings import SEED, add_data_flags, add_folder_flags, add_model_choice, file_name, number
from src.settings.geometry import add_drawn_flags

OF_RUNS = ("--model", "--optimizers", "--lr_sched", "--seeds", "--epochs", "--eigen_split", "--high_low_specs",
           "--operator", "--eigen_mode")  # fmt: skip
"""The flags that choose spectra, which --files does as well."""


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
        "--name", type=file_name, help="name of figure and table (default: what was chosen; spectra with --files)"
    )
    restrict(parser, {OF_RUNS: (lambda args: not args.files, "with --files")})
    add_folder_flags(parser, "datasets", "hessian", "plots")
    return parser.parse_args()


def main() -> None:
    """Parse, read, draw, tabulate."""
    args = parse()
    if args.labels is not None and len(args.labels) != (wanted := len(args.files or ())):
        raise FlagError(f"--labels: {len(args.labels)} for {wanted} --files; give one for each")
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
    for path in (
        *save_figure(figure, stem),
        write_text(stem.with_name(f"{stem.name}.csv"), csv_table(groups)),
        write_text(stem.with_name(f"{stem.name}.md"), table),
        write_json(stem.with_name(f"{stem.name}.json"), {"dataset": dataset, "runs": sources(groups)}),
    ):
        print(path)


def given(args: Namespace) -> tuple[str, list[SpectrumGroup], str, str]:
    """Of ``--files``: the data set, the spectra, each on its own, the figure's usual name, how its title begins."""
    spectra = [Measured.read(path) for path in args.files]
    labels = args.labels or [" ".join(path.parts[-4:-1]) if len(path.parts) > 3 else path.stem for path in args.files]
    names = {spectrum.settings.get("dataset", "unknown") for spectrum in spectra}
    dataset = names.pop() if len(names) == 1 else "several"
    groups = [SpectrumGroup(label, [spectrum]) for label, spectrum in zip(labels, spectra, strict=True)]
    return dataset, groups, "spectra", ""


def found(args: Namespace) -> tuple[str, list[SpectrumGroup], str, str]:
    """The same of the flags, with one group per optimiser and part of the examples."""
    name = args.dataset
    if ":" in name:  # own data are named by their content
        parts = load_dataset(name, args.datasets_folder, image_size=args.image_size, channels=args.channels)
        name = parts[0].entry.name
    data = {key: getattr(args, key) for key in ("dataset", "image_size", "channels")}
    what = (name, data, args.model, args.eigen_split, args.operator, args.eigen_mode)
    query = Query(args.hessian_folder, *what, args.seeds, args.epochs, args.lr_sched)
    specs = list(dict.fromkeys(map(str, args.high_low_specs)))
    optimizers = list(dict.fromkeys(args.optimizers))
    groups = []
    for optimizer in optimizers:
        for spec in specs:
            label = optimizer.upper() if specs == ["all"] else f"{optimizer.upper()}, {spec}"
            groups.append(find_group(query, optimizer, spec, label))
    epoch = refuse_other_epochs(groups)
    refuse_other_examples(groups)
    mode = eigen_name(args.eigen_mode, args.operator)
    usual = spectrum_figure_name(
        args.model, optimizers, args.eigen_split, epoch, mode, specs=specs, lr_sched=args.lr_sched, seeds=args.seeds
    )
    return name, groups, usual, f"{args.model}, {name}, epoch {epoch}: "


if __name__ == "__main__":
    run_script(main)
