"""What `axbatch plan` says a job will take: a small sample, and intervals that hold the truth."""

import json
import math
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import load_task
from pipeline import storage
from pipeline.accounting import Usage
from pipeline.chunking import split
from pipeline.cli import main
from pipeline.config import JobConfig
from pipeline.errors import RowRejected
from pipeline.forecast.advice import advise
from pipeline.forecast.estimate import estimate_job
from pipeline.forecast.figures import Estimate
from pipeline.forecast.sampling import (
    DEPTH_BYTES,
    LEAST_PLACES,
    PLACES,
    ROWS_PER_PLACE,
    SAMPLE_BYTES,
    Span,
    all_spans,
    take_sample,
)
from pipeline.forecast.sketch import load_tokens
from pipeline.model import DEMO_MODEL
from pipeline.plan import Plan
from pipeline.records import Output
from pipeline.report.tables import estimate_lines
from pipeline.storage import Folder
from pipeline.task import ExpectedAnswer, Task

MakeJob = Callable[..., JobConfig]
MakePlan = Callable[[JobConfig], Plan]
Write = Callable[..., Path]

ALL = PLACES * ROWS_PER_PLACE
MB = 1 << 20


@pytest.fixture
def estimate(plan: MakePlan) -> Callable[[JobConfig], Estimate]:
    def of(job: JobConfig) -> Estimate:
        return estimate_job(job, load_task(job), plan(job), Folder(job.output.path))

    return of


Estimates = Callable[[JobConfig], Estimate]


def words(rng: random.Random, rows: int, mean: float = 3.0, spread: float = 0.8) -> list[str]:
    """Texts of log-normally many words."""
    return [" ".join(["word"] * max(1, int(rng.lognormvariate(mean, spread)))) for _ in range(rows)]


def spans_of(plan: Plan) -> list[Span]:
    return all_spans(plan)


class Counting:
    """A file that counts what is read of it."""

    def __init__(self, path: str, counts: list[int]) -> None:
        self._file, self._counts = open(path, "rb"), counts  # noqa: SIM115, PTH123

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._counts.append(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each read of a file of Folder.open."""
    counts: list[int] = []

    def open_counting(_: Any, path: str) -> pa.NativeFile:
        return pa.PythonFile(Counting(path, counts), mode="r")

    monkeypatch.setattr(storage, "open_input", open_counting)
    yield counts


# --- the sample ------------------------------------------------------------------------------


def test_a_small_job_is_sampled_whole(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    for name, rows in (("a", 300), ("b", 1), ("c", 211)):
        texts = [f"{name} {n}" for n in range(rows)]
        write_parquet(tmp_path / f"in/{name}.parquet", {"text": texts}, row_group_size=50)
    sample = take_sample(spans_of(plan(job(tmp_path))), ["text"])
    expected = [f"{name} {n}" for name, rows in (("a", 300), ("b", 1), ("c", 211))
                for n in range(rows)]  # fmt: skip
    assert [row["text"] for _, row in sample.rows if not isinstance(row, RowRejected)] == expected
    assert (sample.of, sample.share) == (512, 1.0)


@pytest.mark.parametrize("group", [40, 999, 100_000])
def test_places_are_spread_evenly_over_all_rows(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, group: int
) -> None:
    for part in range(4):
        numbers = range(part * 5_000, (part + 1) * 5_000)
        data = {"text": [str(n) for n in numbers]}
        write_parquet(tmp_path / f"in/{part}.parquet", data, row_group_size=group)
    sample = take_sample(spans_of(plan(job(tmp_path))), ["text"])
    found: dict[int, list[int]] = {}
    for place, row in sample.rows:
        assert not isinstance(row, RowRejected)
        found.setdefault(place, []).append(int(row["text"]))
    assert sorted(found) == list(range(PLACES))
    for place, rows in found.items():
        assert rows == list(range(rows[0], rows[0] + ROWS_PER_PLACE))
        assert place * 20_000 / PLACES <= rows[0] < (place + 1) * 20_000 / PLACES


def test_only_what_is_to_do_is_sampled_and_the_same_each_time(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Any,
    estimate: Estimates,
) -> None:  # fmt: skip
    texts = ["short"] * 1_000 + ["a text of five words"] * 1_000
    write_parquet(tmp_path / "in/a.parquet", {"text": texts})
    config = job(tmp_path, input={"rows_per_unit": 100})
    made = plan(config)
    for unit in list(made.shards[0].units())[:10]:
        commit(Folder(config.output.path), unit, made.identity, made.shards[0].shard.fingerprint)
    first = estimate(config)
    assert (first.rows, first.covers) == (1_000, "to do")
    assert first.characters.mid == 1_000 * len(texts[-1]) == first.characters.low
    assert estimate(config) == first


def test_of_a_finished_job_all_rows_are_estimated(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Any,
    estimate: Estimates,
) -> None:  # fmt: skip
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two"] * 30})
    config = job(tmp_path)
    made = plan(config)
    for unit in made.shards[0].units():
        commit(Folder(config.output.path), unit, made.identity, made.shards[0].shard.fingerprint)
    found = estimate(config)
    assert (found.rows, found.covers) == (30, "all")


def test_a_large_row_group_is_read_at_its_head_alone(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, reads: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.forecast.sampling.DEPTH_BYTES", 2 * MB)
    texts = [f"{n} " + os.urandom(256).hex() for n in range(100_000)]
    path = write_parquet(
        tmp_path / "in/a.parquet", {"text": texts}, row_group_size=10**6, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    assert path.stat().st_size > 48 * MB
    spans = spans_of(plan(job(tmp_path)))
    reads.clear()
    sample = take_sample(spans, ["text"])
    numbers = [int(row["text"].split()[0]) for _, row in sample.rows
               if not isinstance(row, RowRejected)]  # fmt: skip
    assert len(set(numbers)) == ALL and numbers == sorted(numbers)
    assert 3_000 < max(numbers) < 5_000  # the places are spread over what may be read
    assert sum(reads) < 5 * MB


def test_many_large_files_are_read_in_little_pieces(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, reads: list[int]
) -> None:
    """One real file under two hundred names: the plan can't tell."""
    texts = [os.urandom(1_000).hex() for _ in range(8_000)]
    base = write_parquet(
        tmp_path / "base.parquet", {"text": texts, "other": texts}, row_group_size=4_000,
        compression="none", use_dictionary=False,
    )  # fmt: skip
    (tmp_path / "in").mkdir()
    for number in range(200):
        os.link(base, tmp_path / f"in/{number:03}.parquet")
    made = plan(job(tmp_path))
    assert sum(shard.shard.bytes for shard in made.shards) > 6_000 * MB
    reads.clear()
    sample = take_sample(spans_of(made), ["text"])
    assert len(sample.rows) == ALL and len({row.place for row in sample.rows}) == PLACES
    assert sum(reads) < DEPTH_BYTES + PLACES * 3 * MB


@pytest.mark.s3
def test_objects_are_sampled_as_files_are(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, s3_url: str
) -> None:
    texts = [f"{n} " + "word " * (n % 50) for n in range(5_000)]
    path = write_parquet(tmp_path / "in/a.parquet", {"text": texts}, row_group_size=700)
    Folder(f"{s3_url}/sampled").replace("a.parquet", path.read_bytes())
    local, remote = (
        take_sample(spans_of(plan(job(tmp_path, input=given))), ["text"])
        for given in ({}, {"path": f"{s3_url}/sampled"})
    )
    assert remote == local and len(local.rows) == ALL


@pytest.mark.parametrize("dictionary", [False, True])
def test_few_long_rows_are_taken(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, dictionary: bool
) -> None:
    """Also where the footer says that they are short, as it counts a repeated text once."""
    text = "word " * 60_000
    texts = [text if dictionary else f"{n} {text}" for n in range(200)]
    write_parquet(tmp_path / "in/a.parquet", {"text": texts}, row_group_size=20,
                  use_dictionary=dictionary)  # fmt: skip
    sample = take_sample(spans_of(plan(job(tmp_path))), ["text"])
    assert LEAST_PLACES <= len(sample.rows) <= SAMPLE_BYTES / len(text) + 1
    assert len({row.place for row in sample.rows}) == len(sample.rows)


# --- intervals -------------------------------------------------------------------------------


def corpus(seed: int) -> list[list[str]]:
    """Texts of eight files, which differ from each other, and rows from their neighbours less."""
    rng = random.Random(seed)
    files = []
    for _ in range(8):
        mean, texts = rng.uniform(1.5, 4.0), list[str]()
        while len(texts) < 600:
            texts += words(rng, rng.randint(5, 30), mean + rng.gauss(0, 0.4), 0.7)
        files.append(texts)
    return files


@pytest.mark.parametrize("figure", ["prompt", "completion", "characters"])
def test_intervals_hold_the_truth(
    tmp_path_factory: pytest.TempPathFactory, job: MakeJob, write_parquet: Write,
    estimate: Estimates, figure: str,
) -> None:  # fmt: skip
    held, widths = 0, []
    for seed in range(20):
        folder, files = tmp_path_factory.mktemp("corpus"), corpus(seed)
        for number, file in enumerate(files):
            write_parquet(folder / f"in/{number}.parquet", {"text": file})
        config = job(folder)
        task = load_task(config)
        texts = [text for file in files for text in file]
        found = estimate(config)
        assert found.tokens
        if figure == "characters":
            interval, truth = found.characters, sum(map(len, texts))
        else:
            spoken = sum(len(text.split()) for text in texts)
            system = len(getattr(task, "system_prompt", "").split())
            truths = {"prompt": spoken + system * len(texts), "completion": spoken}
            interval, truth = getattr(found.tokens, figure), truths[figure]
        held += interval.low <= truth <= interval.high
        widths.append(interval.high / interval.low)
    assert held >= 18
    assert figure == "completion" or max(widths) < 1.6


def test_what_is_counted_whole_has_no_interval(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    texts = words(random.Random(1), 300)
    write_parquet(tmp_path / "in/a.parquet", {"text": texts})
    found = estimate(job(tmp_path))
    assert found.tokens and found.tokens.is_exact
    assert found.tokens.prompt.low == found.tokens.prompt.high
    low, mid, high = found.tokens.completion
    assert low < sum(len(text.split()) for text in texts) < high and low < mid < high
    assert found.tokens.answers == "expected"


# --- what becomes of rows --------------------------------------------------------------------


def test_rejected_rows_are_counted_by_reason(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    texts = [None, " ", "a text", "another"] * 1_000
    write_parquet(tmp_path / "in/a.parquet", {"text": texts})
    found = estimate(job(tmp_path))
    assert found.tokens
    assert found.tokens.not_ok == {"rejected: null": 1_000, "rejected: empty": 1_000}
    assert found.tokens.requests.mid == 2_000


def test_cut_rows_are_counted_with_their_requests(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    long = ". ".join(["a sentence of some words"] * 40)
    pieces = len(split(long, 50, lambda text: len(text.split())).chunks)
    write_parquet(tmp_path / "in/a.parquet", {"text": ["short text", long] * 100})
    found = estimate(job(tmp_path, task={"chunk_tokens": 50}))
    assert found.tokens and found.tokens.cut == {"chunk": 100}
    assert found.tokens.requests.mid == 100 + 100 * pieces
    cut = estimate(job(tmp_path, task={"chunk_tokens": 50, "overflow": "truncate_tail"}))
    assert cut.tokens and cut.tokens.cut == {"truncate_tail": 100}
    assert cut.tokens.requests.mid == 200
    refused = estimate(job(tmp_path, task={"chunk_tokens": 50, "overflow": "reject"}))
    assert refused.tokens and refused.tokens.not_ok == {"rejected: too_long": 100}


def test_deferred_rows_go_to_a_lane_of_their_own(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    long, longest = "word " * 900, "word " * 5_000
    write_parquet(tmp_path / "in/a.parquet", {"text": ["a b c"] * 90 + [long] * 9 + [longest]})
    model = {"context": "auto", "engine": {"max_model_len": 1_000}}
    config = job(tmp_path, model=model, task={"overflow": "reject"}, sampling={"max_tokens": 1_500})
    found = estimate(config)
    assert found.tokens and found.tokens.deferred == 9
    lanes = {lane.lane.name: lane for lane in found.tokens.lanes}
    assert {name: lane.rows for name, lane in lanes.items()} == {"native": 91, "yarn": 9}
    assert 1_000 < lanes["yarn"].lane.model.engine["max_model_len"] <= 4_000
    assert lanes["yarn"].prompt > 900 > lanes["native"].prompt
    assert found.tokens.not_ok == {"rejected: too_long": 1}
    assert found.tokens.fits_native == pytest.approx(0.91)


def test_waiting_rows_are_estimated_as_the_yarn_lane_will_see_them(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Any,
    estimate: Estimates,
) -> None:  # fmt: skip
    texts = (["a b c"] * 9 + ["word " * 900]) * 10
    write_parquet(tmp_path / "in/a.parquet", {"text": texts})
    model = {"context": "auto", "engine": {"max_model_len": 1_000}}
    config = job(tmp_path, model=model, sampling={"max_tokens": 1_500})
    made = plan(config)
    outputs = [
        Output(None, "deferred", "deferred: 1900 tokens", needs=1_900)
        if len(text) > 100
        else Output("-", usage=Usage(1, 9, 0, 3))
        for text in texts
    ]
    [unit] = made.shards[0].units()
    folder = Folder(config.output.path)
    commit(folder, unit, made.identity, made.shards[0].shard.fingerprint, outputs)
    found = estimate(config)
    assert (found.rows, found.covers) == (10, "waiting")
    assert found.tokens and [lane.lane.name for lane in found.tokens.lanes] == ["yarn"]
    assert found.tokens.requests.mid == 10


class Strange(Task):
    """Wants answers that nobody can make up."""

    kind: str = "strange"
    fails: str = ""

    @property
    def columns(self) -> list[str]:
        return ["text"]

    async def run(self, row: Any, generate: Any) -> Output:
        if self.fails == "before":
            raise KeyError("a bug")
        completion = await generate([{"role": "user", "content": row["text"]}])
        if self.fails == "reject":
            raise RowRejected("no_label")
        return Output(json.loads(completion.text)["answer"])


@pytest.mark.parametrize(
    ("fails", "not_ok"),
    [("", {}), ("reject", {}), ("before", {"failed: task_error": 20})],
)
def test_what_follows_from_a_made_up_answer_is_not_counted(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, fails: str,
    not_ok: dict[str, int],
) -> None:  # fmt: skip
    write_parquet(tmp_path / "in/a.parquet", {"text": ["a text"] * 20})
    config = job(tmp_path)
    found = estimate_job(config, Strange(fails=fails), plan(config), Folder(config.output.path))
    assert found.tokens and found.tokens.not_ok == not_ok


KINDS: list[dict[str, Any]] = [
    {"kind": "summarize", "text": "text"},
    {"kind": "ask", "text": "text", "question": "Who?"},
    {"kind": "classify", "text": "text", "labels": ["good", "bad"]},
    {"kind": "extract", "text": "text", "schema": {
        "type": "object", "properties": {"who": {"type": "string"}}}},
    {"kind": "prompt", "prompt": "Say it: {{ text }}"},
]  # fmt: skip


@pytest.mark.parametrize("task", KINDS, ids=lambda task: task["kind"])
def test_each_kind_asks_once_for_a_short_text(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, task: dict[str, Any]
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["a text", None] * 20})
    config = job(tmp_path).model_copy(update={"task": task})
    found = estimate_job(config, load_task(config), plan(config), Folder(config.output.path))
    assert found.tokens and found.tokens.requests == (20, 20, 20)
    assert found.tokens.not_ok == {"rejected: null": 20}
    low, _, high = found.tokens.completion
    if task["kind"] == "prompt":
        assert (found.tokens.answers, low, high) == ("unknown", 20, 20 * 1024)
    else:
        assert found.tokens.answers == "expected" and 20 <= low < high < 20 * 1024


def test_expected_answers_are_bounded() -> None:
    assert ExpectedAnswer().is_unknown and ExpectedAnswer().bounds(9) == (1, math.inf)
    assert ExpectedAnswer((0.5, 2.0), (1.0, 3.0)).bounds(10) == (6, 23)


def test_texts_not_nfc_and_repeated_rows_are_seen(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    texts = [unicodedata.normalize("NFD", "가나"), "같은 글", "같은 글", "글 4"]
    write_parquet(tmp_path / "in/a.parquet", {"text": texts})
    found = estimate(job(tmp_path))
    assert (found.decomposed, found.duplicates) == (0.25, 0.25)


def test_rows_without_a_text_are_not_repeated_ones(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": [None, None, None, "", "", "one"]})
    assert estimate(job(tmp_path)).duplicates == 0


# --- answers, time and money -----------------------------------------------------------------


def test_rows_that_are_done_say_how_long_answers_are(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Any,
    estimate: Estimates,
) -> None:  # fmt: skip
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two three"] * 1_000})
    config = job(tmp_path, input={"rows_per_unit": 50})
    made = plan(config)
    for number, unit in enumerate(list(made.shards[0].units())[:8]):
        outputs = [Output("-", usage=Usage(1, 20, 0, 30 + number)) for _ in range(unit.rows)]
        fingerprint = made.shards[0].shard.fingerprint
        commit(Folder(config.output.path), unit, made.identity, fingerprint, outputs)
        if number == 2:
            assert (tokens := estimate(config).tokens) and tokens.answers == "expected"
    found = estimate(config)
    assert found.tokens and found.tokens.answers == "measured"
    low, mid, high = found.tokens.completion
    assert mid == pytest.approx(found.tokens.prompt.mid * 33.5 / 20)
    assert 0.9 * mid < low < mid < high < 1.1 * mid


def test_rows_whose_answers_were_cut_say_it_and_unasked_ones_nothing(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Any,
    estimate: Estimates,
) -> None:  # fmt: skip
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two three"] * 1_000})
    config = job(tmp_path, input={"rows_per_unit": 250})
    made = plan(config)
    first, second, *_ = made.shards[0].units()
    folder, fingerprint = Folder(config.output.path), made.shards[0].shard.fingerprint
    nulls = [Output(None, "rejected", "null")] * first.rows
    commit(folder, first, made.identity, fingerprint, nulls)
    found = estimate(config)
    assert found.tokens and found.tokens.answers == "expected" and found.cut_answers is None
    used = Usage(1, 20, 0, 30)
    cut = [Output(None, "rejected", "truncated", usage=used, cut=used)] * second.rows
    commit(folder, second, made.identity, fingerprint, cut)
    found = estimate(config)
    assert found.tokens and found.tokens.answers == "measured" and found.cut_answers == 1


AX = {
    "architectures": ["LlamaForCausalLM"], "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 8192, "intermediate_size": 21824, "max_position_embeddings": 32768,
    "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 48,
    "num_key_value_heads": 8, "vocab_size": 102400,
}  # fmt: skip
"""The shape of A.X 3.1."""


@pytest.fixture
def large_model(tmp_path: Path) -> str:
    """A folder with the sizes of A.X 3.1 and the embedded model's tokenizer; no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(AX))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, folder)
    return str(folder)


def test_fit_time_and_cost_by_the_gpu_hour(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates, large_model: str
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["Some text in English."] * 400})
    model = {"id": large_model, "backend": "vllm", "engine": {"tensor_parallel_size": 2}}
    prices = {"prices": {"gpu_hour": 2.0}, "compare": [{"name": "x", "input": 1.0, "output": 2.0}]}
    config = job(tmp_path, model=model, accounting=prices,
                 cluster={"accelerator": "H100", "replicas": 4})  # fmt: skip
    found = estimate(config)
    assert not found.missing and found.room and found.duration and found.cost and found.tokens
    assert found.room.fit.starts and found.room.smallest_tensor_parallel == 2
    low, mid, high = found.duration.wall
    assert 0 < low < mid < high and found.duration.source == "computed"
    assert found.duration.gpu.mid == pytest.approx(mid * 8)
    assert found.cost.mid == pytest.approx(2.0 * mid * 8 / 3600)
    [compared], ratios = found.compared, found.tokens.ratios
    assert ratios and ratios.input > 0
    expected = (
        found.tokens.prompt.mid * ratios.input + 2 * found.tokens.completion.mid * ratios.output
    )
    assert compared.cost.mid == pytest.approx(expected / 1e6, rel=1e-3)
    assert found.tokens.lanes[0].cached % 16 == 0 < found.tokens.lanes[0].cached
    alone = estimate(job(tmp_path, model={**model, "engine": {}}, cluster={"accelerator": "H100"}))
    assert alone.room and not alone.room.fit.starts
    json.dumps(found.to_json(), allow_nan=False)


def test_a_later_lane_that_will_not_start_is_told_of(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates, large_model: str
) -> None:
    texts = ["Some text in English."] * 40 + ["word " * 24_000]
    write_parquet(tmp_path / "in/a.parquet", {"text": texts})
    model = {"id": large_model, "context": "auto", "engine": {"max_model_len": 8_000}}
    config = job(tmp_path, model={**model, "backend": "vllm"}, task={"overflow": "reject"},
                 cluster={"accelerator": "H100"})  # fmt: skip
    found = estimate(config)
    assert found.tokens and [lane.lane.name for lane in found.tokens.lanes] == ["native", "yarn"]
    assert found.room and found.room.lane.name == "yarn" and not found.room.fit.starts
    assert "no: on 1 H100 for lane yarn" in dict(estimate_lines(found))["model fits"]
    [line] = [line for line in advise(config, found) if "parallel" in line]
    assert line.startswith("`model.yarn.engine.tensor_parallel_size: 2`")


def test_cost_by_the_token(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two"] * 100})
    prices = {"prices": {"input": 10.0, "output": 40.0, "currency": "KRW"}}
    found = estimate(job(tmp_path, accounting=prices))
    assert found.tokens and found.cost and found.currency == "KRW"
    sums = [
        (10 * round(prompt) + 40 * round(completion)) / 1e6
        for prompt, completion in zip(found.tokens.prompt, found.tokens.completion, strict=True)
    ]
    assert found.cost == pytest.approx(sums)


def test_rate_of_the_last_long_run(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two"] * 100})
    folder = tmp_path / "out/_axbatch/runs"
    folder.mkdir(parents=True)
    usage = {"requests": 9, "prompt_tokens": 9_000, "cached_tokens": 0, "completion_tokens": 3_000}
    run = {"this_run": {"rows": 9, "usage": usage}, "workers": 1, "replicas": 1,
           "gpus_per_replica": 2}  # fmt: skip
    (folder / "1.json").write_text(json.dumps({**run, "seconds": 120.0}))
    (folder / "2.json").write_text(json.dumps({**run, "seconds": 5.0}))  # too short to say
    found = estimate(job(tmp_path, accounting={"prices": {"gpu_hour": 3.0}}))
    assert found.tokens and found.duration and found.cost
    assert found.duration.source == "measured"
    tokens = found.tokens.prompt.mid + found.tokens.completion.mid
    assert found.duration.wall.mid == pytest.approx(tokens / 100)
    assert found.cost.mid == pytest.approx(3.0 * 2 * found.duration.wall.mid / 3600)


@pytest.mark.parametrize(
    ("workers", "had", "now", "times", "replicas"),
    [
        (4, 4, 2, 2.0, 2),
        (2, 2, 8, 0.25, 8),
        (7, 4, 4, 1.0, 4),                              # three took others' places
        (3, 8, {"min": 1, "max": 8}, 1.0, 3),           # there was room for no more
    ],
)  # fmt: skip
def test_the_last_rate_is_that_of_its_replicas(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates,
    workers: int, had: int, now: Any, times: float, replicas: int,
) -> None:  # fmt: skip
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two"] * 100})
    folder = tmp_path / "out/_axbatch/runs"
    folder.mkdir(parents=True)
    usage = {"requests": 9, "prompt_tokens": 9_000, "cached_tokens": 0, "completion_tokens": 3_000}
    run = {"this_run": {"rows": 9, "usage": usage}, "workers": workers, "replicas": had,
           "gpus_per_replica": 2, "seconds": 120.0}  # fmt: skip
    (folder / "1.json").write_text(json.dumps(run))
    found = estimate(job(tmp_path, cluster={"replicas": now}))
    assert found.tokens and found.duration and found.duration.replicas == replicas
    tokens = found.tokens.prompt.mid + found.tokens.completion.mid
    assert found.duration.wall.mid == pytest.approx(times * tokens / 100)
    assert found.duration.gpu.mid == pytest.approx(found.duration.wall.mid * 2 * replicas)


def test_why_there_is_no_comparison_is_said(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two"] * 9})
    compare = [{"name": "x", "input": 1.0, "output": 2.0}]
    [line] = estimate(job(tmp_path, accounting={"baseline": None, "compare": compare})).missing
    assert "`accounting.baseline`" in line
    [line] = estimate(job(tmp_path, accounting={"baseline": "/none", "compare": compare})).missing
    assert line.startswith("the comparison: accounting.baseline: /none")
    nobody = str(tmp_path / "nobody")
    [line] = estimate(job(tmp_path, accounting={"tokenizer": nobody})).missing
    assert "accounting.tokenizer" in line and "model.id" not in line


# --- tokenizers ------------------------------------------------------------------------------


def test_prompts_are_counted_with_the_models_template(tmp_path: Path, job: MakeJob) -> None:
    from transformers import AutoTokenizer

    config = job(tmp_path, model={"id": "demo", "backend": "vllm"})
    tokens = load_tokens(config)
    assert tokens.is_exact and "<|im_end|>" in tokens.control_tokens
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    function = {"name": "f", "description": "A function.", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    plain = json.loads(json.dumps(messages))
    plain[1]["content"] = "Hello"
    plain[2]["tool_calls"][0]["function"]["arguments"] = {"a": 1}
    ids = tokenizer.apply_chat_template(
        plain, tools=[tool], add_generation_prompt=True, return_dict=False
    )
    assert tokens.of({"messages": messages, "tools": [tool]}) == len(ids)
    assert tokens.shared == len(ids)
    tokens.of({"messages": [{"role": "user", "content": "Other"}]})
    assert 0 < tokens.shared < 8


def test_a_server_without_a_tokenizer_has_a_stand_in(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["Some text in English."] * 40})
    model = {"id": "m", "backend": "http", "base_url": "http://localhost:9/v1"}
    compare = [{"name": "x", "input": 1.0, "output": 1.0}]
    found = estimate(job(tmp_path, model=model, accounting={"compare": compare}))
    assert found.tokens and not found.tokens.is_exact
    assert "o200k_base, in the place" in found.tokens.source
    assert found.tokens.ratios is None and not found.compared
    assert any("accounting.tokenizer" in line for line in found.missing)
    named = {"tokenizer": str(DEMO_MODEL), "compare": compare}
    known = estimate(job(tmp_path, model=model, accounting=named))
    assert known.tokens and known.tokens.ratios and known.compared
    assert known.tokens.prompt != found.tokens.prompt


def test_an_unreadable_model_leaves_what_rows_alone_say(
    tmp_path: Path, job: MakeJob, write_parquet: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one", "one", "three"]})
    config = job(tmp_path, model={"id": str(tmp_path / "nowhere"), "backend": "vllm"})
    file = tmp_path / "job.yaml"
    file.write_text(config.model_dump_json(exclude_none=True))
    assert main(["plan", "--json", str(file)]) == 0
    found = json.loads(capfd.readouterr().out)["estimate"]
    assert found["prompt"] is None and found["characters"]["mid"] == 11
    assert found["duplicates_at_least"] == pytest.approx(1 / 3)
    [line] = found["missing"]
    assert line.startswith("tokens, time and cost: ") and "no such folder" in line
    assert main(["plan", str(file)]) == 0
    assert "no such folder" in " ".join(capfd.readouterr().out.split())


def test_a_job_without_rows_is_planned(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert estimate(job(tmp_path)).to_json()["rows"] == 0


def test_plan_is_shown_with_what_it_takes(
    tmp_path: Path, job: MakeJob, write_parquet: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": [None, *words(random.Random(2), 999)]})
    prices = {"input": 1.0, "output": 4.0}
    accounting = {"prices": prices, "compare": [{"name": "Other", **prices}]}
    config = job(tmp_path, accounting=accounting, limits={"max_failed_fraction": 0.0})
    file = tmp_path / "job.yaml"
    file.write_text(config.model_dump_json(exclude_none=True))
    assert main(["plan", str(file)]) == 0
    out = capfd.readouterr().out
    for label in ("tokens in", "tokens out", "lanes", "cost", "compared", "Other"):
        assert label in out
    assert not (tmp_path / "out").exists()
