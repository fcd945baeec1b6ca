"""Runs the study: which notebooks, in which order, over which splits and seeds.

    python run.py study      execute what is not done yet, print the tables, write the report
    python run.py status     what is done, what is stale, what is missing
    python run.py doctor     whether all that a run needs is there
    python run.py report     write the report again
    python run.py stage      make stages without their notebooks
    python run.py submit     predict the challenge's unlabelled products
    python run.py publish    copy the default run's notebooks and figures into the repository

Each notebook runs in a kernel process of its own, through papermill. What a notebook computes is kept as stages
(see helpers.py, section 3), so a study that was stopped goes on where it was. With `--workers N` or `--on ray`,
stages that do not depend on each other are made side by side first, and the notebooks find them done.
"""
from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated

import jinja2
import nbformat
import pandas as pd
import papermill
import psutil
import rich.box
import torch
import typer
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

import costs
import doctor
import helpers as h

NOTEBOOKS = ["01_data_exploration", "02_text_preprocessing", "03_finetune_camembert", "04_finetune_flaubert",
             "05_finetune_seresnext", "06_regional_features", "07_hierarchical_fusion", "08_result_tables"]
LAST_OF_SPLIT = "07_hierarchical_fusion"  # what follows compares the splits, so it runs after all of them
DEFAULTS = {"PROFILE": "sample", "SPLIT": "90-10", "SEED": 0, "SETTINGS": {}}  # of every notebook

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__,
                  rich_markup_mode=None)
console = Console()
if not console.is_terminal:
    console.width = 150  # a log has no width of its own
problems = Console(stderr=True)


# --- the plan -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """One notebook of one run."""
    notebook: str
    run: h.Run
    settings: dict

    @property
    def source(self) -> Path:
        return h.ROOT / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def output(self) -> Path:
        return self.run.folder / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def manifest(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def parameters(self) -> dict:
        """What papermill injects: the parameters that differ from the notebooks' own defaults."""
        given = {"PROFILE": self.run.profile.name, "SPLIT": self.run.split, "SEED": self.run.seed,
                 "SETTINGS": self.settings}
        return {name: value for name, value in given.items() if value != DEFAULTS[name]}

    @property
    def earlier(self) -> list[Step]:
        """The steps whose stages this one may read: those before it, in all splits once the splits are compared."""
        before = NOTEBOOKS[:NOTEBOOKS.index(self.notebook)]
        splits = h.SPLITS if LAST_OF_SPLIT in before else [self.run.split]
        runs = [h.Run(self.run.profile, split, self.run.seed) for split in splits]
        return [Step(name, run, self.settings) for run in runs for name in before
                if run == self.run or NOTEBOOKS.index(name) <= NOTEBOOKS.index(LAST_OF_SPLIT)]

    def __str__(self) -> str:
        return f"{self.notebook}  {self.run.split}  seed {self.run.seed}"


def make_plan(profile: str, splits: list[str], seeds: list[int], settings: dict) -> list[Step]:
    """All steps in order: the notebooks of each split and seed, then those that compare the splits."""
    runs = [h.open_run(profile, split, seed, settings) for seed in seeds for split in splits]
    cut = NOTEBOOKS.index(LAST_OF_SPLIT) + 1
    return [Step(name, run, settings) for names in (NOTEBOOKS[:cut], NOTEBOOKS[cut:]) for run in runs for name in names]


@functools.cache
def catalogue_hash(run: h.Run) -> str:
    """The hash of the run's catalogue, which does not change while a command runs."""
    return h.catalogue_hash(h.catalogue_folder(run))


def step_key(step: Step) -> str:
    """Hash of all that an executed notebook depends on: code, parameters, catalogue, and what earlier ones made."""
    cells = [cell.source for cell in nbformat.read(step.source, as_version=4).cells]
    made = [(h.read_json(other.manifest) or {}).get("stages") for other in step.earlier]
    return h.hash_json([cells, h.hash_file(h.ROOT / "helpers.py"), step.parameters,
                        catalogue_hash(step.run), made])


def state(step: Step) -> str:
    """"done", "stale" (made from something else, or its stages are gone) or "missing"."""
    done = h.read_json(step.manifest)
    if done is None or not step.output.exists():
        return "missing"
    kept = all((h.read_json(h.runs_folder() / name / "manifest.json") or {}).get("key") == key
               for name, key in done["stages"].items())
    return "done" if kept and done["key"] == step_key(step) else "stale"


# --- running one notebook -----------------------------------------------------------------------------
class StepFailed(Exception):
    """A notebook that ended with an error; the text says where."""


def execute(step: Step, label: str) -> dict:
    """Run the notebook; {seconds, peak_memory_gb, stages: {folder below runs: key}}. StepFailed names the cell."""
    step.output.parent.mkdir(parents=True, exist_ok=True)
    step.manifest.unlink(missing_ok=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            papermill.execute_notebook(step.source, step.output, step.parameters, cwd=step.source.parent,
                                       progress_bar=False, extra_arguments=["--IPKernelApp.log_level=40"])
        except BaseException as error:  # handed to the main thread
            failures.append(error)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["STUDY_EVENTS"] = str(Path(folder) / "events")  # the kernel inherits it
        start, thread = time.perf_counter(), threading.Thread(target=work, daemon=True)
        thread.start()
        events, peak = follow(thread, Path(folder) / "events", label)
    if failures:
        raise StepFailed(describe_failure(step, failures[0]))
    return {"seconds": round(time.perf_counter() - start, 1), "peak_memory_gb": round(peak / 1e9, 2),
            "stages": {event["stage"]: event["key"] for event in events if "stage" in event}}


def follow(thread: threading.Thread, path: Path, label: str) -> tuple[list[dict], int]:
    """Show progress until the thread ends; returns the notebook's events and the peak memory of its processes (bytes).

    A terminal gets one line that moves, a log a line every 15 seconds.
    """
    path.touch()
    events, peak, last, alive = [], 0, time.monotonic(), True
    with path.open(encoding="utf-8") as file, console.status(label) as status:
        while alive:
            thread.join(0.5)
            alive = thread.is_alive()  # asked before the file is read, so that nothing is missed
            events += map(json.loads, file)  # what has been added since the last look
            peak = max(peak, memory_of_children())
            if not events or "text" not in events[-1]:
                continue
            text = events[-1]["text"]
            status.update(f"{label}  {text}")
            if not console.is_terminal and time.monotonic() - last > 15:
                last = time.monotonic()
                console.print(f"        {text}", highlight=False)
    return events, peak


def memory_of_children() -> int:
    """Resident memory of all processes below this one, in bytes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def describe_failure(step: Step, error: BaseException) -> str:
    """Which notebook, which cell, what it says, and where the executed notebook is."""
    if isinstance(error, PapermillExecutionError):
        where, what = f" in cell [{error.exec_count}]", f"{error.ename}: {error.evalue}"
    else:
        where, what = "", f"{type(error).__name__}: {error}"
    return f"{step} failed{where}\n  {what}\n  executed notebook: {step.output}"


# --- stages side by side ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One stage of one run, made by a process of its own: `run.py stage <name>`."""
    run: h.Run
    name: str

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), "stage", self.name, *self.run.options,
                "--set", "processes=1"]

    def __str__(self) -> str:
        return f"{self.name}  {self.run.split}  seed {self.run.seed}"


def make_stage(run: h.Run, name: str) -> None:
    """Make one stage, whatever its kind, unless it is there."""
    makers = {"splits": h.split_stage, "text": h.text_stage, "baselines": h.baseline_stage,
              "seresnext": h.image_encoder_stage}
    if name in makers:
        makers[name](run)
    elif name.startswith("fusion-"):
        h.fusion_stage(run, h.named_variant(name.removeprefix("fusion-")))
    elif name in ("image_regions", "image_whole"):
        h.image_features_stage(run, name)
    else:
        h.text_encoder_stage(run, *name.rsplit("_", 1))


def stage_names() -> list[str]:
    """All stages up to the fusion variants, each after those it reads."""
    fusion = [f"fusion-{variant.name}" for variant in h.TRAINED_VARIANTS]
    return [*(name for name in h.READS if name != "fusion"), *fusion]


def stage_graph(plan: list[Step]) -> dict[Job, list[Job]]:
    """Each stage that the plan's notebooks make, and the stages it has to wait for."""
    jobs = {(step.run, name): Job(step.run, name) for step in plan for name in stage_names()
            if h.notebook_of(name) == step.notebook}
    return {job: [jobs[run, other] for other in h.READS[name.split("-")[0]] if (run, other) in jobs]
            for (run, name), job in jobs.items()}


def side_by_side(graph: dict[Job, list[Job]], workers: int) -> None:
    """Make the stages on this machine, `workers` at a time, one GPU each. StepFailed says what went wrong."""
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] \
        or [str(i) for i in range(torch.cuda.device_count())]
    free = queue.SimpleQueue()
    for worker in range(workers):
        free.put(worker)
    share = str(max(1, h.cores() // workers))

    def make(job: Job) -> None:
        worker = free.get()
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}
        try:
            tell(job, *run_job(job, {"OMP_NUM_THREADS": share, **os.environ, "STUDY_CORES": share, **gpu}))
        finally:
            free.put(worker)

    order, running = TopologicalSorter(graph), {}
    order.prepare()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            while order.is_active():
                running |= {pool.submit(make, job): job for job in order.get_ready()}
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    future.result()
                    order.done(running.pop(future))
        except BaseException as error:
            problems.print(f"{str(error) or 'stopped'}\nno other stage is started; those that run go on to their end",
                           style="red", highlight=False, markup=False)
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_job(job: Job, environment: dict[str, str]) -> tuple[float, str]:
    """Run the job's command to its end: its seconds, and what went wrong, "" if nothing did."""
    start = time.perf_counter()
    ended = subprocess.run(job.command, env={**environment, "STUDY_PARENT": str(os.getpid())}, text=True,
                           capture_output=True)
    said = "\n  ".join([f"{job} failed, exit code {ended.returncode}", *ended.stderr.splitlines()[-20:]])
    return time.perf_counter() - start, said * bool(ended.returncode)


def tell(job: Job, seconds: float, failure: str) -> None:
    """Say that a job is done; StepFailed if it is not."""
    if failure:
        raise StepFailed(failure)
    console.print(f"        {job}  {seconds:.0f} s", highlight=False)


def on_ray(graph: dict[Job, list[Job]]) -> None:
    """Make the stages on the Ray cluster that RAY_ADDRESS names, or on one that Ray starts here.

    Its machines share this project's folder and the runs folder. Ray decides what runs where.
    """
    try:
        import ray  # an extra: requirements-ray.txt
    except ImportError as error:
        raise ValueError("--on ray needs Ray: `make ray` installs it") from error
    ray.init(log_to_driver=False, configure_logging=False)
    ours = {name: value for name, value in os.environ.items()
            if name.startswith(("STUDY_", "RAKUTEN_", "HF_")) or name in ("TORCH_HOME", "XDG_CACHE_HOME")}
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    share = max(1, cpus // gpus) if gpus else 1  # cores beside each GPU

    @ray.remote(max_retries=0, num_cpus=share)
    def make(job: Job, *earlier: tuple[float, str]) -> tuple[float, str]:
        if any(failure for _, failure in earlier):
            return 0.0, f"{job} not started, because a stage that it reads failed"
        return run_job(job, {**os.environ, **ours, "STUDY_CORES": str(share)})

    results, jobs = {}, {}
    for job in TopologicalSorter(graph).static_order():
        needs = {"num_gpus": 1} if gpus and job.name not in ("splits", "text", "baselines") else {}
        results[job] = make.options(**needs).remote(job, *(results[other] for other in graph[job]))
        jobs[results[job]] = job
    waiting = list(jobs)
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        tell(jobs[done], *ray.get(done))
    ray.shutdown()


def end_with_parent() -> None:
    """End this process when the one that started it (STUDY_PARENT) is gone."""
    def watch(parent: int) -> None:
        while psutil.pid_exists(parent):
            time.sleep(1)
        os._exit(1)

    if "STUDY_PARENT" in os.environ:
        threading.Thread(target=watch, args=[int(os.environ["STUDY_PARENT"])], daemon=True).start()


# --- commands -----------------------------------------------------------------------------------------
def parse_settings(pairs: list[str]) -> dict:
    """{name: value} of `name=value` texts; values in Python's or JSON's notation, anything else is a string."""
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set wants name=value, got {pair!r}")
        try:
            settings[name] = json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def choose_notebooks(first: str | None, only: list[str]) -> list[str]:
    """The notebooks that --from NN or --only NN name; ValueError for a number that is none."""
    numbers = [name[:2] for name in NOTEBOOKS]
    for number in [first or numbers[0], *only]:
        h.one_of("notebook number", number, numbers)
    return [name for name in NOTEBOOKS if name[:2] >= (first or "00") and (not only or name[:2] in only)]


def grid(profile: Annotated[str, typer.Option(help="sample | paper")] = "sample",
         split: Annotated[list[str], typer.Option(help="90-10 | 80-20; may be repeated")] = list(h.SPLITS),
         seed: Annotated[list[int], typer.Option(help="may be repeated")] = [0],
         rows: Annotated[str, typer.Option(help="described | all")] = None,
         grouped: Annotated[bool, typer.Option("--grouped", help="duplicates stay on one side of a split")] = None,
         limit: Annotated[int, typer.Option(help="a stratified choice of this many rows")] = None,
         set_: Annotated[list[str], typer.Option("--set", help="name=value: override a setting of the profile")] = [],
         ) -> list[Step]:
    """The plan that the options common to most commands ask for."""
    protocol = {"rows": rows, "grouped": grouped, "limit": limit}
    chosen = {name: value for name, value in protocol.items() if value is not None}
    return make_plan(profile, split, seed, parse_settings(set_) | chosen)


def over_the_grid(name: str | None = None):
    """Register a command whose first argument is the plan; it gets the options of `grid` in its place."""
    def register(command):
        common, own = (inspect.signature(function, eval_str=True).parameters for function in (grid, command))
        options = [*common.values(), *list(own.values())[1:]]

        @functools.wraps(command)
        def wrapper(**given):
            plan = grid(**{name: given.pop(name) for name in common})
            command(plan, **given)

        wrapper.__signature__ = inspect.Signature(options)
        wrapper.__annotations__ = {option.name: option.annotation for option in options}
        return app.command(name)(wrapper)
    return register


@over_the_grid()
def study(plan,
          from_: Annotated[str, typer.Option("--from", help="NN: execute this notebook and all after it again")] = None,
          only: Annotated[list[str], typer.Option(help="NN: execute only this notebook; may be repeated")] = [],
          workers: Annotated[int, typer.Option(min=1, help="stages made side by side, one GPU each")] = 1,
          on: Annotated[str, typer.Option(help="here | ray: where stages are made side by side")] = "here",
          dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what the study would cost")] = False):
    """Execute what is not done yet, print the tables, write the report."""
    chosen = choose_notebooks(from_, only)
    h.one_of("place", on, ("here", "ray"))
    h.check_image_encoder(plan[0].run.profile)
    if dry_run:
        return costs.print_costs(console, list(dict.fromkeys(step.run for step in plan)))
    h.check_inputs(plan[0].run)  # makes the sample
    graph = stage_graph([step for step in plan if step.notebook in chosen])
    if on == "ray":
        if workers > 1:
            raise ValueError("--workers is for this machine; with --on ray, Ray decides how many stages run at a time")
        on_ray(graph)
    elif workers > 1:
        side_by_side(graph, workers)
    for number, step in enumerate(plan, 1):
        if step.notebook not in chosen:
            continue
        label = f"[{number:2}/{len(plan)}] {step}"
        if state(step) == "done" and not (from_ or only):
            console.print(f"{label}  already done", highlight=False)
            continue
        found = execute(step, label)
        key = step_key(step)
        h.write_json(step.manifest, {"key": key, **found})
        console.print(f"{label}  {found['seconds']:.0f} s, peak {found['peak_memory_gb']:.1f} GB", highlight=False)
    print_tables(plan)
    console.print(f"Report: {write_report(plan)}", highlight=False, soft_wrap=True)


@over_the_grid()
def status(plan):
    """Say what is done, what is stale, what is missing."""
    table = Table("notebook", "split", "seed", "state", "seconds", "peak memory (GB)")
    for step in plan:
        done = h.read_json(step.manifest) or {}
        table.add_row(step.notebook, step.run.split, str(step.run.seed), state(step),
                      *(str(done.get(name, "")) for name in ("seconds", "peak_memory_gb")))
    console.print(table)


@over_the_grid("doctor")
def check(plan, all_pictures: Annotated[bool, typer.Option("--all-pictures", help="decode all, not 500")] = False):
    """Say whether all that a run needs is there: catalogue, pictures, machine, libraries, weights."""
    checks = doctor.check_up(plan[0].run, all_pictures)
    doctor.print_checks(console, checks)
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(1)


@over_the_grid()
def report(plan):
    """Write the report again, from what is done."""
    console.print(f"Report: {write_report(plan)}", highlight=False, soft_wrap=True)


@over_the_grid()
def stage(plan, names: Annotated[list[str], typer.Argument(help="none: all, in order", metavar="STAGE...")] = None):
    """Make stages without their notebooks: in this process, or, under torchrun, in all of its processes together."""
    end_with_parent()
    for name in names or []:
        h.one_of("stage", name, stage_names())
    for run in dict.fromkeys(step.run for step in plan):
        for name in names or stage_names():
            make_stage(run, name)


@over_the_grid()
def submit(plan,
           variant: Annotated[str, typer.Option(help="fusion, such as concat-add or average-average")] = "concat-add"):
    """Predict the challenge's unlabelled products with each run that has this fusion; print the files' paths."""
    fusion, runs = h.named_variant(variant), list(dict.fromkeys(step.run for step in plan))
    trained = [run for run in runs if (run.folder / f"fusion-{variant}").exists()]
    for run in trained or runs[:1]:  # without a trained one the error names what is missing
        with console.status(f"{run.name}: {variant} on the unlabelled products"):
            path = h.write_submission(run, fusion)
        console.print(f"Submission: {path}", highlight=False, soft_wrap=True)


@app.command()
def publish():
    """Copy the default run's executed notebooks and figures into the repository."""
    plan = make_plan("sample", ["90-10"], [0], {})
    for step in plan:
        if state(step) != "done":
            raise ValueError(f"{step} is {state(step)}; run `python run.py study` first")
    for step in plan:
        book = nbformat.read(step.output, as_version=4)
        book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}}
        for cell in book.cells:
            cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
            if cell.cell_type == "code":  # a finished progress line is an empty output
                cell.outputs = [output for output in cell.outputs if output.get("data", {}).get("text/markdown") != ""]
        nbformat.write(book, step.source)
    for old in (h.ROOT / "figures").glob("[0-9][0-9]_*"):  # not the benchmark's
        old.unlink()
    shutil.copytree(plan[0].run.folder / "figures", h.ROOT / "figures", dirs_exist_ok=True)


# --- tables and report --------------------------------------------------------------------------------
def read_tables(plan: list[Step]) -> list[tuple[str, pd.DataFrame | None]]:
    """(title, table) of Tables I to V for each seed; None where its split has not been scored."""
    found = []
    for seed in sorted({step.run.seed for step in plan}):
        for number, split in h.TABLES.items():
            run = h.Run(plan[0].run.profile, split, seed)
            path = run.folder / "scores" / f"table_{number}.csv"
            title = f"Table {number}, split {split}, seed {seed}"
            found.append((title, pd.read_csv(path)) if path.exists()
                         else (f"{title}: not scored yet; run `{run.command}`", None))
    return found


def print_tables(plan: list[Step]) -> None:
    """The result tables on the console."""
    note = h.data_note(plan[0].run)
    for title, table in read_tables(plan):
        if table is None:
            console.print(title, highlight=False, soft_wrap=True)
            continue
        shown = Table(title=f"{title}. {note}", title_justify="left", box=rich.box.SIMPLE)
        for column in (readable := h.readable_table(table)):
            shown.add_column(column, justify="left" if column == "model" else "right")
        for row in readable.itertuples(index=False):
            shown.add_row(*map(str, row))
        console.print(shown)


REPORT = jinja2.Template("""<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 2rem }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead { border-bottom: 2px solid #222 }
tbody tr { border-bottom: 1px solid #ddd } img { max-width: 100% } figure { margin: 2rem 0 } figcaption { color: #666 }
</style><h1>{{ title }}</h1><p>{{ note }}</p>
{% for heading, table in tables %}<h2>{{ heading }}</h2>{{ table }}{% endfor %}
<h2>Notebooks</h2>{{ steps }}
<h2>Figures</h2>{% for name, path in figures %}<figure><img src="{{ path }}" alt="{{ name }}">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}</html>
""")


def write_report(plan: list[Step]) -> Path:
    """Tables, notebooks with minutes and memory, figures; returns `runs/<profile>/<protocol>/report/index.html`."""
    profile, protocol = plan[0].run.profile.name, plan[0].run.protocol
    folder = h.runs_folder() / profile / protocol / "report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, exporter = [], HTMLExporter()
    for step in plan:
        done, link = h.read_json(step.manifest) or {}, step.notebook
        if step.output.exists():
            page = folder / f"{step.notebook}-{step.run.split}-seed{step.run.seed}.html"
            page.write_text(exporter.from_filename(str(step.output))[0], encoding="utf-8")
            link = f'<a href="{page.name}">{step.notebook}</a>'
        rows.append({"notebook": link, "split": step.run.split, "seed": step.run.seed, "state": state(step),
                     "minutes": round(done["seconds"] / 60, 1) if done else "",
                     "peak memory (GB)": done.get("peak_memory_gb", "")})
    runs = dict.fromkeys(step.run for step in plan)
    pictures = [(f"{path.stem}, split {run.split}, seed {run.seed}", os.path.relpath(path, folder))
                for run in runs for path in sorted(run.folder.glob("figures/*.png"))]
    tables = [(title, "" if table is None
               else h.readable_table(table).to_html(index=False, border=0)) for title, table in read_tables(plan)]
    (folder / "index.html").write_text(REPORT.render(
        title=f"Hierarchical fusion, profile {profile}, {protocol} rows", note=h.data_note(plan[0].run), tables=tables,
        steps=pd.DataFrame(rows).to_html(index=False, border=0, escape=False), figures=pictures), encoding="utf-8")
    return folder / "index.html"


def main() -> None:
    """The command line; an error is one clear sentence and a non-zero exit."""
    try:
        app()
    except (ValueError, OSError, h.DamagedStage, StepFailed) as error:
        problems.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
