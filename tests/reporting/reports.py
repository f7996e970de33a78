"""Made-up reports: of a job that is done, one that runs, one with too much in it, a hostile one."""

import copy
import math
import random
from typing import Any

HOSTILE = (
    "</title><script>alert(1)</script><img src=http://x.example/a onerror='x'>\"&\x00\x1b\ud800"
)


def interval(low: float, mid: float, high: float) -> dict[str, float]:
    return {"low": low, "mid": mid, "high": high}


def used(requests: int = 0, into: int = 0, cached: int = 0, out: int = 0) -> dict[str, int]:
    return {
        "requests": requests,
        "prompt_tokens": into,
        "cached_tokens": cached,
        "completion_tokens": out,
    }


def run_timeline(
    replicas: int = 8, bins: int = 240, bin_s: int = 10, killed: bool = True, until: float = 1.0
) -> dict[str, Any]:
    """Replicas of slightly different speed; with `killed` the third dies at 40% and one in its
    place starts a little later. Nothing is done after the share `until` of the bins."""
    made = random.Random(1)
    spans = [(0.01 + 0.004 * (number % 8), 1.0) for number in range(replicas)]
    marks = []
    if killed:
        spans[2] = (spans[2][0], 0.4)
        spans.append((0.47, 1.0))
        marks = [
            {"at_s": 0.4 * bins * bin_s, "what": "engine gone", "replica": "node-2:4013"},
            {"at_s": 0.41 * bins * bin_s, "what": "2 units tried again", "replica": None},
            {"at_s": 0.47 * bins * bin_s, "what": "replica started", "replica": "node-8:4073"},
        ]
    drawn = []
    for number, (begin, end) in enumerate(spans):
        is_up = [begin * bins <= at < min(end, until) * bins for at in range(bins)]
        speed = made.uniform(3.5, 4.5) * bin_s
        rows = [max(0, round(made.gauss(speed, speed / 8))) if up else 0 for up in is_up]
        drawn.append({
            "name": f"node-{number}:{4001 + 6 * number + 3 * number // 4 * 2}",
            "from_s": begin * bins * bin_s,
            "to_s": min(end, until) * bins * bin_s,
            "rows": rows,
            "prompt": [300 * each + made.randrange(200) if each else 0 for each in rows],
            "completion": [110 * each + made.randrange(90) if each else 0 for each in rows],
            "busy": [
                (0.35 if made.random() < 0.03 else made.uniform(0.9, 1.0)) if up else None
                for up in is_up
            ],
        })  # fmt: skip
    for mark in marks:
        number = {"node-2:4013": 2, "node-8:4073": 8}.get(str(mark["replica"]))
        if number is not None and number < len(drawn):
            mark["replica"] = drawn[number]["name"]
    return {"bin_s": bin_s, "replicas": drawn, "marks": marks}


def run_of(timeline: dict[str, Any], **changes: Any) -> dict[str, Any]:
    rows = sum(sum(replica["rows"]) for replica in timeline["replicas"])
    bins = max((len(replica["rows"]) for replica in timeline["replicas"]), default=0)
    run = {
        "run": "20261125T180000Z-ab12cd",
        "state": "done",
        "started": "2026-11-25T18:00:00+00:00",
        "wall_s": bins * timeline["bin_s"],
        "rows": rows,
        "exit_code": 0,
        "timeline": timeline,
    }
    return run | changes


def lengths(middle: float, spread: float) -> list[dict[str, int]]:
    """Rows by quarter-octave buckets, as of a log-normal distribution."""
    buckets = []
    for bucket in range(48):
        first, after = (math.ceil(2 ** (edge / 4)) for edge in (bucket, bucket + 1))
        rows = round(1e5 * math.exp(-(((bucket / 4 - math.log2(middle)) / spread) ** 2)))
        if rows and after > first:
            buckets.append({"from": first, "to": after - 1, "rows": rows})
    return buckets


def script(name: str, texts: int, model: int, baseline: int, half: float) -> dict[str, Any]:
    saving = 1 - model / baseline
    return {
        "script": name, "texts": texts, "characters": 250 * texts,
        "share_of_letters": texts / 250, "model": model, "baseline": baseline,
        "saving": interval(saving - half, saving, saving + half),
    }  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    """Of a job that is done: a million rows on eight replicas, one of which was killed."""
    example = {
        "name": "news-en-ko", "kind": "translate", "state": "done",
        "made": "2026-11-25T18:45:00+00:00", "output": "s3://corpus/news-ko",
        "identity": "0f3a77c1d2", "version": "0.1.0",
        "rows": {
            "all": 1_000_000, "done": 1_000_000, "ok": 993_120,
            "rejected": 6_413, "failed": 467, "waiting": 0,
        },
        "reasons": [
            {
                "status": "rejected", "reason": "too_long", "rows": 6_001,
                "examples": [
                    {"file": "news-0001.parquet", "row": 1717},
                    {"file": "news-0007.parquet", "row": 4},
                ],
            },
            {
                "status": "rejected", "reason": "not_target_language", "rows": 412,
                "examples": [{"file": "news-0002.parquet", "row": 31}],
            },
            {
                "status": "failed", "reason": "engine_crash", "rows": 467,
                "examples": [{"file": "news-0003.parquet", "row": 20_480}],
            },
        ],
        "tokens": {
            "requests": 1_010_233, "prompt": 301_234_567, "cached": 121_000_000,
            "completion": 112_345_678, "reasoning": 0,
            "wasted": {
                "not_ok": used(10_233, 3_100_000, 1_000_000, 2_800_000),
                "cut": used(412, 130_000, 50_000, 421_000),
                "lost": used(1_240, 372_000, 150_000, 96_000),
            },
        },
        "lengths": {"prompt": lengths(260, 1.1), "completion": lengths(105, 1.4)},
        "baseline": "o200k_base",
        "texts": [
            {
                "column": "en", "role": "input", "texts": 1_000_000, "counted": 25_000,
                "characters": 812_345_678,
                "letters": {"hangul": 0.0, "latin": 0.8, "other": 0.2},
                "model": interval(180e6, 181_234_567, 182.5e6),
                "baseline": interval(176e6, 177_345_678, 178.6e6),
                "saving": interval(-0.029, -0.0219, -0.0148),
                "scripts": [script("latin", 248, 20_440, 20_000, 0.007)],
            },
            {
                "column": "ko", "role": "output", "texts": 993_120, "counted": 24_800,
                "characters": 402_345_678,
                "letters": {"hangul": 0.71, "latin": 0.04, "other": 0.25},
                "model": interval(108e6, 109_345_678, 110.7e6),
                "baseline": interval(164e6, 165_678_901, 167.4e6),
                "saving": interval(0.331, 0.34, 0.349),
                "scripts": [
                    script("hangul", 240, 19_800, 30_000, 0.009),
                    script("latin", 9, 1_020, 1_000, 0.06),
                    script("other", 1, 95, 100, 0.14),
                ],
            },
        ],
        "money": {
            "currency": "USD", "basis": "2.50 USD per GPU-hour", "cost": 31.0,
            "per_thousand_rows": 0.031, "per_million_characters": 0.0382, "cost_to_come": None,
            "compared": [
                {
                    "name": "GPT-4o batch", "date": "2025-07", "currency": "USD", "input": 1.25,
                    "output": 5.0, "cost": 92.4, "difference": 61.4, "share": 0.6645,
                },
                {
                    "name": "GPT-4o mini batch", "date": "2025-07", "currency": "USD",
                    "input": 0.075, "output": 0.3, "cost": 5.54, "difference": -25.46,
                    "share": -4.596,
                },
            ],
        },
        "time": {
            "runs": 2, "wall_s": 5_820, "computing_s": 5_580, "gpus": 8, "gpu_s": 44_640,
            "busy_share": 0.968, "rows_per_s": 179.2, "tokens_per_s": 74_117.0, "eta_s": None,
        },
        "plan": {
            "prompt": interval(295e6, 300e6, 305e6),
            "completion": interval(92e6, 101e6, 110e6),
            "rows": 1_000_000, "seconds": [4_500, 6_600], "cost": [26.0, 36.0],
        },
        "runs": [
            run_of(
                run_timeline(8, 60, killed=False), run="20261125T170000Z-77aa01",
                state="interrupted", exit_code=130, started="2026-11-25T17:00:00+00:00",
            ),
            run_of(run_timeline()),
        ],
        "environment": [
            ["axbatch", "0.1.0"], ["vllm", "0.32.0"], ["ray", "2.60.0"], ["Python", "3.11.9"],
            ["model", "skt/A.X-3.1 at 4f0c1e2"], ["GPU", "8 x NVIDIA H100 80GB HBM3"],
        ],
        "samples": [
            {
                "file": "news-0001.parquet", "row": 17, "status": "ok",
                "texts": [
                    ["en", "The ministry said on Tuesday that exports rose by 4.2 percent."],
                    ["ko", "산업부는 화요일 수출이 4.2% 증가했다고 밝혔다."],
                ],
            },
            {
                "file": "news-0001.parquet", "row": 1717, "status": "rejected",
                "texts": [["en", "(too long)"]],
            },
        ],
    }  # fmt: skip
    return copy.deepcopy(example) | changes


def bare_report() -> dict[str, Any]:
    """Nothing is known yet."""
    return report(
        state="running",
        rows={"all": 0, "done": 0, "ok": 0, "rejected": 0, "failed": 0, "waiting": 0},
        reasons=[],
        tokens={
            "requests": 0, "prompt": 0, "cached": 0, "completion": 0, "reasoning": 0,
            "wasted": {"not_ok": used(), "cut": used(), "lost": None},
        },
        lengths={"prompt": [], "completion": []},
        baseline=None, texts=[], money=None, plan=None, runs=[], environment=[], samples=[],
        time={
            "runs": 1, "wall_s": 0, "computing_s": 0, "gpus": 0, "gpu_s": None,
            "busy_share": None, "rows_per_s": 0, "tokens_per_s": 0, "eta_s": None,
        },
    )  # fmt: skip


def running_report() -> dict[str, Any]:
    """Half way, on one replica, without prices or a baseline."""
    example = report(
        state="running",
        rows={"all": 40_000, "done": 17_212, "ok": 17_200, "rejected": 12, "failed": 0,
              "waiting": 96},
        baseline=None, money=None,
        runs=[run_of(run_timeline(1, 90, killed=False), state="running", exit_code=None)],
    )  # fmt: skip
    example["time"] |= {"gpu_s": None, "busy_share": None, "eta_s": 1_310, "runs": 1}
    example["reasons"] = example["reasons"][:1]
    example["plan"] |= {"rows": 40_000, "cost": None, "seconds": None}
    example["tokens"]["prompt"], example["tokens"]["completion"] = 130_000_000, 40_000_000
    example["tokens"]["cached"] = 0
    for text in example["texts"]:
        text |= {"baseline": None, "saving": None, "scripts": []}
    return example


def crowded_report() -> dict[str, Any]:
    """More replicas than can be drawn one by one."""
    return report(runs=[run_of(run_timeline(64, 240))])


def hostile_report() -> dict[str, Any]:
    """Every string that comes from outside says something else."""

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: spoil(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [spoil(each, key) for each in value]
        return HOSTILE if isinstance(value, str) and key != "role" else value

    spoilt = spoil(report())
    assert isinstance(spoilt, dict)
    return spoilt


REPORTS = {
    "done": report,
    "running": running_report,
    "bare": bare_report,
    "crowded": crowded_report,
    "hostile": hostile_report,
}
