"""What the terminal shows at the end: tables of a plan, a status, a summary; example rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import yaml
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.accounting import Interval
from pipeline.conversations import without_nulls
from pipeline.errors import EXIT_TOO_MANY_NOT_OK
from pipeline.forecast.figures import Duration, Estimate, Room, TokenEstimate
from pipeline.lanes import LaneUse
from pipeline.parquet import open_parquet
from pipeline.plan import Plan
from pipeline.records import STATUSES, Counts
from pipeline.report.reporter import REPORT
from pipeline.run import Summary
from pipeline.status import Status
from pipeline.storage import Folder
from pipeline.wording import between, count, money, span
from pipeline.wording import estimate as about

EXAMPLES = 5
SHOWN = 600
"""Characters of one value, at most."""


def show_plan(plan: Plan, estimate: Estimate, advice: Sequence[str], console: Console) -> None:
    facts = plan.to_json()
    table = _facts_table("Plan")
    table.add_row("files", f"{facts['shards']:,}")
    table.add_row("rows", f"{facts['rows']:,}")
    table.add_row("size", f"{facts['bytes'] / 1e6:,.1f} MB")
    to_do, units = f"{plan.to_do_rows:,} rows", f"in {facts['units_pending']:,} units"
    if not plan.waiting_rows:
        to_do += f" {units}"
    elif plan.pending_rows:
        to_do += f", {plan.pending_rows:,} of them {units}"
    table.add_row("to do", to_do)
    _add_waiting(table, plan)
    table.add_row("published", f"{facts['shards_published']:,} of {facts['shards']:,} files")
    table.add_row("identity", facts["identity"])
    for label, text in estimate_lines(estimate):
        table.add_row(label, escape(text))
    console.print(table)
    for line in advice:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


OF_WHICH = {"to do": "", "waiting": "of the rows that wait", "all": "of all rows"}
"""What an estimate says of what it covers, where that is not what one would think."""


def estimate_lines(estimate: Estimate) -> Iterator[tuple[str, str]]:
    """Label and text of each figure; what is missing, and why, at the end."""
    if not estimate.rows:
        return
    of_which = OF_WHICH[estimate.covers]
    of_these = f", {of_which}" if of_which else ""
    yield "sample", f"{estimate.sampled:,} rows from {estimate.places:,} places {of_which}".strip()
    if estimate.tokens:
        yield from _token_lines(estimate.tokens)
    if estimate.room:
        yield "model fits", _fit_line(estimate.room)
    if estimate.duration:
        knows = estimate.tokens is not None and estimate.tokens.answers != "unknown"
        yield "time", f"{_time_line(estimate.duration, knows)}{of_these}"
    if estimate.cost and estimate.currency and estimate.basis:
        cost = _money_range(estimate.cost, estimate.currency)
        yield "cost", f"{cost} ({estimate.basis}){of_these}"
    for each in estimate.compared:
        text = f"{each.name}: {_money_range(each.cost, each.currency)}"
        if estimate.tokens and estimate.tokens.output_ratio != "measured":
            text += " (its answers' tokens taken to compare as its prompts' do)"
        yield "compared", text
    for line in estimate.missing:
        yield "not known", line


def _token_lines(tokens: TokenEstimate) -> Iterator[tuple[str, str]]:
    about = "" if tokens.is_exact else "about "
    ratio = f"; {tokens.ratios.input:.2f} baseline tokens for each" if tokens.ratios else ""
    yield "tokens in", f"{about}{between(tokens.prompt._asdict())} ({tokens.source}{ratio})"
    yield "tokens out", _completion_line(tokens)
    yield "lanes", ", ".join(f"{lane.lane.title} {lane.rows:,} rows" for lane in tokens.lanes)
    for status, label in (("rejected", "will be rejected"), ("failed", "will fail")):
        of_status = [
            f"{reason.partition(': ')[2]} about {rows:,}"
            for reason, rows in tokens.not_ok.items()
            if reason.startswith(status)
        ]
        if of_status:
            yield label, ", ".join(of_status)
    if tokens.cut:
        cut = ", ".join(f"{how} about {rows:,} rows" for how, rows in tokens.cut.items())
        yield "will be cut", f"{cut}, {count(tokens.requests.mid)} requests in all"


def _completion_line(tokens: TokenEstimate) -> str:
    low, _, high = tokens.completion
    match tokens.answers:
        case "measured":
            return f"{between(tokens.completion._asdict())} (as the rows done so far)"
        case "expected":
            ends = f"{about(low)} to {about(high)}"
            return f"{ends} (expected of this kind of task, not measured)"
        case "unknown":
            return f"unknown: at most {about(high)}, as `sampling.max_tokens` has it"


def _fit_line(room: Room) -> str:
    fit, gpus = room.fit, f"{room.fit.world} {room.gpu.name}"
    gpus += f" for lane {room.lane.title}" if room.lane.name == "yarn" else ""
    weights = f"weights {fit.weights / 1e9:,.1f} GB of {room.gpu.memory / 1e9:,.0f} on each"
    if not fit.fits:
        return f"no, not on {gpus}: {weights}"
    if not fit.starts:
        return (
            f"no: on {gpus} the KV cache holds {fit.kv_tokens:,} tokens, the context is "
            f"{fit.max_model_len:,} ({weights})"
        )
    held = fit.rows_held(room.tokens)
    return (
        f"yes, on {gpus}: KV cache of {fit.kv_tokens:,} tokens, {held:,} requests of "
        f"{room.tokens:,.0f} ({weights}; computed)"
    )


def _time_line(duration: Duration, knows_answers: bool) -> str:
    low, mid, high = map(span, duration.wall)
    replicas = f"{duration.replicas:,} replica(s)"
    if duration.source == "measured":
        return f"{mid} ({low} to {high}) on {replicas}, at the last run's rate"
    likely = f", likely about {mid}" if knows_answers else ""
    return (
        f"{low} to {high} on {replicas}{likely}, without the engines' starts "
        "(computed, not measured: from the limit of physics to what good engines reach)"
    )


def _money_range(cost: Interval, currency: str) -> str:
    low, high = money(cost.low, currency), money(cost.high, currency)
    return low if low == high else f"{low.removesuffix(f' {currency}')} to {high}"


def show_status(status: Status, console: Console) -> None:
    plan = status.plan
    table = _facts_table("Status")
    table.add_row("rows done", f"{plan.done_rows:,} of {plan.rows:,}")
    _add_waiting(table, plan)
    published = len(plan.shards) - len(plan.unpublished)
    table.add_row("files published", f"{published:,} of {len(plan.shards):,}")
    _add_counts(table, status.counts)
    for reason, rows in status.examples.items():
        where = ", ".join(f"{row.file} row {row.row:,}" for row in rows)
        table.add_row("", escape(f"{reason.partition(': ')[2]}: for instance {where}"))
    if status.last_run:
        table.add_row("last run", f"{status.last_run['run']}, {status.last_run['seconds']:.0f} s")
    console.print(table)


def show_summary(summary: Summary, console: Console) -> None:
    table = _facts_table("Done")
    table.add_row("rows", f"{summary.counts.rows:,}")
    _add_counts(table, summary.counts)
    if any(use.lane.name == "yarn" for use in summary.lanes):
        for use in summary.lanes:
            table.add_row(f"lane {use.lane.name}", _lane_use(use))
    rows, seconds = summary.run_counts.rows, summary.seconds
    if rows:
        speed = f"{rows / max(seconds, 1e-9):,.1f} ({rows:,} rows in {seconds:.1f} s"
        table.add_row("rows/s", f"{speed}, {summary.wall_seconds:.0f} s with starting)")
    else:
        table.add_row("this run", "nothing to do: all rows were done before, no engine started")
    table.add_row("output", escape(summary.output))
    if summary.exit_code == EXIT_TOO_MANY_NOT_OK:
        share = 100 * summary.counts.not_ok / summary.counts.rows
        limit = f"limits.max_failed_fraction is {100 * summary.max_failed_fraction:g}%"
        table.add_row("[red]over the limit[/]", f"{share:.1f}% of the rows are not ok; {limit}")
    if summary.log:
        table.add_row("report", escape(f"{summary.output}/{REPORT}.html"))
        table.add_row("log", escape(summary.log))
    console.print(table)


def show_examples(
    output: Folder, plan: Plan, columns: list[str], column: str, console: Console
) -> None:
    """The first rows of each file in turn, five in all: the task's columns and the result."""
    table = Table(show_lines=True, title_justify="left")
    for name in (*columns, column, "_status"):
        table.add_column(name, overflow="fold")
    published = [shard for shard in plan.shards if shard.published]
    per_shard = -(-EXAMPLES // max(1, len(published)))
    shown = 0
    for shard in published:
        if shown == EXAMPLES:
            break
        with output.open(shard.shard.name) as file:
            names = [*columns, column, "_status"]
            first: pa.RecordBatch | None = next(
                open_parquet(file).iter_batches(EXAMPLES, columns=names), None
            )
        if first is None:
            continue
        for row in range(min(per_shard, first.num_rows, EXAMPLES - shown)):
            table.add_row(*(escape(_shown(first[name][row])) for name in names))
            shown += 1
    console.print(table)


def _shown(scalar: pa.Scalar) -> str:
    """Structs and lists as YAML, without what is null in them; the rest as text."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        return "(not UTF-8)"
    except (ValueError, OverflowError):  # a date behind the year 9999
        return "(no value in Python)"
    if value is not None and pa.types.is_nested(scalar.type):
        plain = to_jsonable_python(without_nulls(value), bytes_mode="base64")
        text = yaml.safe_dump(plain, allow_unicode=True, sort_keys=False, width=10_000).rstrip()
    else:
        text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _lane_use(use: LaneUse) -> str:
    """What a lane did, and what its engine was."""
    lane, counts = use.lane, use.counts
    text = f"{counts.rows:,} rows"
    if counts.deferred:
        text += f", {counts.deferred:,} left to the next"
    if lane.name == "yarn":
        text += f"; context {lane.model.engine['max_model_len']:,} tokens, factor {lane.factor:g}"
    return text


def _add_waiting(table: Table, plan: Plan) -> None:
    if plan.waiting_rows:
        table.add_row("", f"{plan.waiting_rows:,} rows waiting for the YaRN engine")


def _add_counts(table: Table, counts: Counts) -> None:
    for status in STATUSES:
        reasons = ", ".join(
            f"{reason.partition(': ')[2]} {count:,}"
            for reason, count in sorted(counts.reasons.items())
            if reason.startswith(status)
        )
        table.add_row(
            status, f"{counts.statuses[status]:,}" + (f"  ({reasons})" if reasons else "")
        )
    usage = counts.usage
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    table.add_row("tokens in", f"{usage.prompt_tokens:,}{cached}")
    table.add_row("tokens out", f"{usage.completion_tokens:,}")


def _facts_table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table
