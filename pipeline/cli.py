"""The command line: `axbatch validate|plan|run|status|verify|retry|report|submit JOB.yaml`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from pipeline import __version__
from pipeline.errors import EXIT_INTERRUPTED, AxbatchError, Interrupted
from pipeline.signals import catch_signals

# Everything heavy is imported by the command that needs it: --help must answer at once.
if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config import JobConfig
    from pipeline.plan import Plan
    from pipeline.retry import Retry
    from pipeline.task import Task

EPILOG = """exit codes:
  0    done, within `limits`
  1    stopped by a fault (storage, cluster, engine); the same command goes on. Of verify: the
       output is not what it should be
  2    the job file or the arguments are wrong
  3    too many rows not ok
  4    refused: changed identity or input, or the same job is active
  130  interrupted; the same command goes on"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are shown without a traceback unless -v."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        catch_signals()
        console, errors = _console(sys.stdout), _console(sys.stderr)
        code: int = options.command(options, console)
        return code
    except AxbatchError as error:
        if options.verbose:
            traceback.print_exception(error, file=errors.file)
        errors.print(f"axbatch: {error}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except Exception as error:
        # A bug, not a user's mistake: the traceback is what a report of it needs.
        traceback.print_exception(error, file=errors.file)
        errors.print("axbatch: internal error, please report it with the lines above")
        return 1
    except Interrupted:
        again = shlex.join(["axbatch", *arguments])
        text = f"axbatch: interrupted; what is committed stays. Go on with: {again}"
        errors.print(text, markup=False, highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED


def _validate(options: argparse.Namespace, console: Console) -> int:
    from pipeline.counting import check_accounting
    from pipeline.lanes import check_lanes

    job, task = _load(options)
    plan = _plan(job, task)
    check_lanes(job.model)
    check_accounting(job.accounting)
    rows, files = plan.rows, len(plan.shards)
    valid = f"{options.job}: valid; {rows:,} rows in {files:,} file(s)"

    def show() -> None:
        console.print(valid, markup=False, highlight=False, soft_wrap=True)

    _answer(options, console, {"valid": True, "rows": rows, "files": files}, show)
    return 0


def _plan_command(options: argparse.Namespace, console: Console) -> int:
    from pipeline.forecast.advice import advise
    from pipeline.forecast.estimate import estimate_job
    from pipeline.report.tables import show_plan
    from pipeline.storage import Folder

    job, task = _load(options)
    plan = _plan(job, task)
    estimate = estimate_job(job, task, plan, Folder(job.output.path))
    advice = advise(job, estimate)
    data = {**plan.to_json(), "estimate": {**estimate.to_json(), "advice": advice}}
    _answer(options, console, data, lambda: show_plan(plan, estimate, advice, console))
    return 0


def _run(options: argparse.Namespace, console: Console, retry: Retry | None = None) -> int:
    from pipeline.report.tables import show_examples, show_summary
    from pipeline.run import run_job
    from pipeline.storage import Folder

    job, task = _load(options)
    summary = run_job(job, _console(sys.stderr) if options.json else console, retry)

    def show() -> None:
        show_summary(summary, console)
        if options.show:
            output = Folder(job.output.path)
            show_examples(output, _plan(job, task), task.columns, job.output.column, console)

    _answer(options, console, summary.to_json(), show)
    return summary.exit_code


def _retry(options: argparse.Namespace, console: Console) -> int:
    from pipeline.retry import Retry

    status = options.status or (None if options.reason else "failed")
    return _run(options, console, Retry(status, options.reason))


def _status(options: argparse.Namespace, console: Console) -> int:
    from pipeline.report.tables import show_status
    from pipeline.status import read_status
    from pipeline.storage import Folder

    job, task = _load(options)
    status = read_status(_plan(job, task), Folder(job.output.path))
    _answer(options, console, status.to_json(), lambda: show_status(status, console))
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    from pipeline.report.reporter import REPORT, write_report
    from pipeline.storage import Folder

    job, task = _load(options)
    output = Folder(job.output.path)
    report = write_report(job, task, _identity(job, task), output)

    def show() -> None:
        for form in ("html", "json"):
            console.print(f"{output.url}/{REPORT}.{form}", soft_wrap=True, highlight=False)

    _answer(options, console, report, show)
    return 0


def _verify(options: argparse.Namespace, console: Console) -> int:
    from pipeline.storage import Folder
    from pipeline.verify import verify_output

    job, task = _load(options)
    plan = _plan(job, task)
    output, has_texts = Folder(job.output.path), job.accounting.rows
    counts = verify_output(plan, output, job.output.column, has_texts)

    def show() -> None:
        split = ", ".join(f"{n:,} {status}" for status, n in counts.to_json()["statuses"].items())
        console.print(
            f"verified: {counts.rows:,} rows in {len(plan.shards):,} file(s) = {split}; "
            "order, input columns, identity and checksums are right",
            soft_wrap=True,
        )

    _answer(options, console, counts.to_json(), show)
    return 0


def _submit(options: argparse.Namespace, console: Console) -> int:
    from pipeline.submit import submit_job

    job, _ = _load(options)
    submitted = submit_job(job, options.address)
    _answer(
        options,
        console,
        submitted.to_json(),
        lambda: console.print(
            f"submitted {submitted.id}\n  follow it: {submitted.follow}", soft_wrap=True
        ),
    )
    return 0


def _load(options: argparse.Namespace) -> tuple[JobConfig, Task]:
    from jobs import load_task
    from pipeline.job_file import load_job

    job = load_job(Path(options.job), options.set)
    return job, load_task(job, options.job)


def _plan(job: JobConfig, task: Task) -> Plan:
    from pipeline.plan import make_plan

    return make_plan(job, task, _identity(job, task))


def _identity(job: JobConfig, task: Task) -> str:
    """Raises RefusedError if the output is another job's."""
    from pipeline.identity import identity_fields, identity_hash
    from pipeline.run import check_identity
    from pipeline.storage import Folder

    fields = identity_fields(job, task.identity())
    check_identity(Folder(job.output.path), fields)
    return identity_hash(fields)


def _answer(
    options: argparse.Namespace, console: Console, data: Any, show: Callable[[], None]
) -> None:
    if options.json:
        text = json.dumps(data, ensure_ascii=False, indent=2)
        if console.is_terminal:
            console.print_json(text)
        else:  # of many files, colours would take minutes
            console.out(text, highlight=False)
    else:
        show()


def _console(stream: TextIO) -> Console:
    """Writes to what `stream` is now: a run points stdout and stderr at its log later."""
    from rich.console import Console

    return Console(file=os.fdopen(os.dup(stream.fileno()), "w"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="axbatch",
        description="Run a chat model over a Parquet dataset: one YAML job file, one command.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"axbatch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("job", metavar="JOB.yaml", help="the job file")
        sub.add_argument("--set", action="append", default=[], metavar="a.b=c",
                         help="override a key of the job file (the value is YAML)")  # fmt: skip
        sub.add_argument("--json", action="store_true", help="print JSON, for programs")
        sub.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")
        sub.set_defaults(command=command)
        return sub

    add("validate", _validate, "check the job file, the input's columns and the model's folder")
    add("plan", _plan_command, "show what a run would do and take, from footers and a sample")
    run = add("run", _run, "run the job; resumes by itself")
    add("status", _status, "show how far the job is, from storage alone")
    add("report", _report, "write the report of tokens, money and time anew, and say where it is")
    add("verify", _verify, "prove that every input row came out once, in order, unchanged")
    retry = add("retry", _retry, "do rows that are not ok again, and publish their files anew")
    retry.add_argument(
        "--status", choices=["failed", "rejected"], help="default: failed, unless --reason is given"
    )
    retry.add_argument("--reason", metavar="CODE", help="only rows of this reason, see status")
    for command in (run, retry):
        command.add_argument("--show", action="store_true", help="show five rows at the end")
    submit = add("submit", _submit, "submit the job to a running Ray cluster")
    submit.add_argument(
        "--address",
        metavar="URL",
        help="http://HOST:8265; default: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS",
    )
    return parser


def command() -> NoReturn:
    """The process `axbatch`. It ends at once: in the interpreter's own end, threads of Ray and
    Arrow that still run may crash, and the exit code would be a segmentation fault's."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
