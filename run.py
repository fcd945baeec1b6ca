"""Runs the study: which notebooks, in which order, over which splits and seeds.

    python run.py study      execute what is not done yet, print the tables, write the report
    python run.py status     what is done, what is stale, what is missing; --disk: what it takes
    python run.py settings   every setting with its default in each profile, unit and source
    python run.py doctor     whether all that a run needs is there
    python run.py rehearse   the heavy stages for a few steps: hours on this machine, measured
    python run.py report     write the report again
    python run.py stage      make stages without their notebooks
    python run.py import     a catalogue of one's own, from a table, for --set data=<folder>
    python run.py submit     predict the challenge's unlabelled products
    python run.py predict    predict the products of a CSV file
    python run.py export     write a trained classifier into a folder of its own
    python run.py clean      delete the stages that no run names any more
    python run.py publish    copy the default run's notebooks and figures into the repository
    python run.py slides     slides of the committed notebooks
    python run.py kit        pack what a class needs to begin with notebook 07

Each notebook runs in a kernel process of its own, through papermill. What a notebook computes is
kept as stages (engine/stages.py), so a study that was stopped goes on where it was. A command is
imported when it is called: help and refusals come at once.
"""
from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from rich.console import Console

from commands import options
from commands import plan as plans
from commands.options import make_plan
from engine.files import printable
from engine.settings import one_of

gc.disable()  # helpers.py, where the libraries are, begins to look for garbage
console = Console()
if not console.is_terminal:
    console.width = 150  # a log has no width of its own
problems = Console(stderr=True)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    grid = options.grid_options()
    top = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, parents=(grid,)):
        name = function.__name__.rstrip("_")
        words = commands.add_parser(name, parents=parents, help=function.__doc__,
                                    description=function.__doc__)
        words.set_defaults(function=function)
        return words.add_argument

    options.study_options(command(study))
    command(status)("--disk", action="store_true", help="what each stage takes")
    command(settings, ())
    add = command(doctor)
    add("--all-pictures", action="store_true", help="decode all, not 500")
    add("--encoders", action="store_true", help="encoders that fit the slots, each built and tried")
    command(rehearse)
    command(report)
    command(stage)("names", nargs="*", metavar="STAGE", help="none: all, in order")
    options.import_options(command(import_, ()))
    command(submit)("--variant", default="concat-add", help="fusion, such as average-average")
    options.predict_options(command(predict))
    options.export_options(command(export))
    command(clean, ())("--unused", action="store_true", required=True,
                       help="the stages that no run names")
    command(publish, ())
    command(slides, ())
    add = command(kit)
    add("--all", action="store_true", help="what notebooks from 07 on make, too")
    add("--to", type=Path, default=Path("build", "class-kit.zip"), metavar="FILE")
    return top


# --- commands -------------------------------------------------------------------------------------
def study(words: argparse.Namespace) -> None:
    """Execute what is not done yet, print the tables, write the report."""
    plan = make_plan(words)
    chosen = plans.choose_notebooks(words.first, words.only)
    one_of("place", words.on, ("here", "ray"))
    if words.on == "ray" and words.workers > 1:
        raise ValueError("--workers is for this machine; with --on ray, Ray decides how many "
                         "stages run at a time")
    from commands import costs, doctor, execute
    from commands.report import print_tables
    from commands.site import write_report

    for warning in doctor.refuse_fatal(*plans.runs_of(plan), needs_catalogue=not words.dry_run):
        console.print(printable(warning), highlight=False, markup=False, soft_wrap=True)
    if words.dry_run:
        return costs.print_costs(console, plans.runs_of(plan))
    with execute.at_work(plans.runs_of(plan)):
        carry_out(plan, chosen, words)
        print_tables(plan, console)
        console.print(f"Report: {write_report(plan)}", highlight=False, soft_wrap=True)
    return None


def carry_out(plan: list[plans.Step], chosen: list[str], words: argparse.Namespace) -> None:
    """Make the stages side by side where that is asked for, then execute the chosen notebooks."""
    from commands import execute
    from engine.progress import cores

    steps = [step for step in plan if step.notebook in chosen]
    if words.on == "ray" or words.workers > 1:
        from commands.workers import make_stages

        make_stages(plans.stage_graph(steps), words.workers, words.on, console)
    labels = {step: f"[{number:2}/{len(plan)}] {step}" for number, step in enumerate(plan, 1)}
    for step in [] if words.first or words.only else list(steps):
        if plans.state(step) == "done":
            console.print(f"{labels[step]}  already done", highlight=False)
            steps.remove(step)
    runs = len(plans.runs_of(plan))
    at_a_time = min(runs, cores()) if words.profile == "sample" else 1
    execute.execute(plans.step_graph(steps), labels, words.notebooks or at_a_time, console)


def status(words: argparse.Namespace) -> None:
    """Say what is done, stale, damaged or missing; with --disk what each stage takes."""
    plan = make_plan(words)
    from commands.store import print_disk, print_states

    if words.disk:
        return print_disk(console)
    return print_states(console, plan)


def settings(words: argparse.Namespace) -> None:
    """Print every setting with its default in each profile, its unit and its source."""
    options.print_settings(console)


def doctor(words: argparse.Namespace) -> int:
    """Say whether all that a run needs is there: catalogue, pictures, machine, weights."""
    plan = make_plan(words)
    if words.encoders:
        from commands.encoders import print_encoders

        return int(not print_encoders(console))
    from commands.doctor import check_up, print_checks

    checks = check_up(plan[0].run, words.all_pictures)
    print_checks(console, checks)
    return int(any(check.state == "fatal" for check in checks))


def rehearse(words: argparse.Namespace) -> None:
    """Run the heavy stages for a few steps at their real size: hours on this very machine."""
    plan = make_plan(words)
    from commands.doctor import refuse_fatal
    from commands.hours import print_rehearsal

    runs = plans.runs_of(plan)
    refuse_fatal(*runs, needs_catalogue=False)
    print_rehearsal(console, runs)


def report(words: argparse.Namespace) -> None:
    """Write the report again, from what is done."""
    plan = make_plan(words)
    from commands.site import write_report

    console.print(f"Report: {write_report(plan)}", highlight=False, soft_wrap=True)


def stage(words: argparse.Namespace) -> None:
    """Make stages without their notebooks; under torchrun, in all of its processes together."""
    plan = make_plan(words)
    from torch.distributed.elastic.multiprocessing.errors import record

    import helpers as h
    from engine.processes import end_with_parent

    @record  # torchrun keeps the error of the process that failed first
    def make() -> None:
        end_with_parent()
        for run in plans.runs_of(plan):
            for name in words.names:
                one_of("stage", name, plans.stage_names(run))
            for name in words.names or plans.stage_names(run):
                h.stage(run, name)

    make()


def import_(words: argparse.Namespace) -> None:
    """Write a catalogue of one's own, from one table, in the layout that the study reads."""
    from commands.importing import Columns, import_catalogue, print_import

    columns = Columns(words.title, words.label, words.description, words.image)
    counts = import_catalogue(words.table, words.to, columns, words.images, words.encoding,
                              words.blank)
    print_import(console, words.to, counts)


def submit(words: argparse.Namespace) -> None:
    """Predict the challenge's unlabelled products with each run that has this fusion."""
    plan = make_plan(words)
    from commands.products import trained_runs
    from commands.submission import write_submission

    for run in trained_runs(plan, words.variant):
        with console.status(f"{run.name}: {words.variant} on the unlabelled products"):
            path = write_submission(run, words.variant)
        console.print(f"Submission: {path}", highlight=False, soft_wrap=True)


def predict(words: argparse.Namespace) -> None:
    """Predict the products of a CSV file with the first run that has this fusion, or a folder."""
    from commands.products import predict_file, trained_runs

    place = words.from_folder or trained_runs(make_plan(words), words.variant or "concat-add")[0]
    predict_file(words.file, place, words.variant, words.to, words.probabilities)


def export(words: argparse.Namespace) -> None:
    """Write the classifier of the first run that has this fusion into a folder of its own."""
    plan = make_plan(words)
    from commands.products import export_classifier

    run = export_classifier(words.folder, plan, words.variant)
    console.print(f"Classifier of {run.name}: {words.folder}", highlight=False, soft_wrap=True)


def clean(words: argparse.Namespace) -> None:
    """Delete the stages that no run names, after printing them."""
    from commands.store import clean_unused

    clean_unused(console)


def publish(words: argparse.Namespace) -> None:
    """Copy the default run's executed notebooks and figures into the repository."""
    from commands.report import publish

    publish()


def slides(words: argparse.Namespace) -> None:
    """Write slides of the committed notebooks, which need no network."""
    from commands.slides import write_slides

    console.print(f"Slides: {write_slides()}", highlight=False, soft_wrap=True)


def kit(words: argparse.Namespace) -> None:
    """Pack what a class needs to begin with notebook 07; of split 90-10 unless others are named."""
    words.split = words.split or [plans.DEFAULTS["SPLIT"]]
    plan = make_plan(words)
    from commands.kit import write_kit

    path = write_kit(plan, words.all, words.to)
    console.print(f"Class kit: {path}", highlight=False, soft_wrap=True)


def main(words: list[str] | None = None) -> int:
    """The command line; an error is one clear sentence and a non-zero exit."""
    chosen = parser().parse_args(words)
    try:
        return chosen.function(chosen) or 0
    except KeyboardInterrupt:
        problems.print("interrupted: what is whole is kept, and the same command goes on from it",
                       style="red", highlight=False, soft_wrap=True)
        return 130
    except Exception as error:
        if not _is_ours(error):
            raise
        problems.print(printable(f"error: {error}"), style="red", highlight=False, markup=False,
                       soft_wrap=True)
        return 1


def _is_ours(error: Exception) -> bool:
    """Whether an error says in one sentence what is wrong and what to do."""
    names = ("Changed", "CodeChanged", "DamagedStage", "StepFailed")
    return isinstance(error, ValueError | OSError) or type(error).__name__ in names


if __name__ == "__main__":
    sys.exit(main())
