"""The demo model's exam, on what training never showed it, through the product's own engine.

    python -m infra.demo_model.exam

prints what share of each kind of question it gets right. The translations go through
`axbatch run`, the rest through the vLLM engine with chat bodies.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from sacrebleu import corpus_chrf

from infra.demo_model import choosing, extraction, questions, summaries, tools
from infra.demo_model.conversation import Message, says
from infra.demo_model.grammar import MARKS, Sentence, has_unseen_combination, sentences
from infra.demo_model.translation import Direction, joined, system_prompt
from pipeline.config.model import ModelConfig
from pipeline.engine.vllm import VllmEngine
from pipeline.model import DEMO_MODEL
from pipeline.records import Completion

SEED = 2026  # training has another

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64}
TOOL_OPTIONS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}

NUMBERS = re.compile(r"\d+")

Chat = Callable[[dict[str, Any]], Awaitable[Completion]]


class Score(NamedTuple):
    """How many of how many were right."""

    what: str
    right: int
    of: int

    @property
    def share(self) -> float:
        return self.right / self.of


class TranslationScores(NamedTuple):
    """Exact matches, texts that kept all marks, chrF (0 to 100)."""

    exact: Score
    kept: Score
    chrf: float


def held_out_sentences(count: int) -> list[Sentence]:
    """Different sentences, none of which was in training."""
    found: dict[str, Sentence] = {}
    for sentence in sentences(random.Random(SEED), held_out=True):
        found.setdefault(sentence.en, sentence)
        if len(found) == count:
            break
    return [*found.values()]


def translate(chosen: Sequence[Sentence], direction: Direction) -> list[str]:
    """The model's translations, by `axbatch run`; of a row that is not ok, an empty text."""
    source, target = direction.split("-")
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({source: [getattr(sentence, source) for sentence in chosen]})
        pq.write_table(table, f"{folder}/exam.parquet")
        job = {
            "name": "exam",
            "task": {"kind": "translate", "text": source, "source": source, "target": target},
            "input": {"path": f"{folder}/exam.parquet"},
            "output": {"path": f"{folder}/out", "column": "answer"},
            "model": {"id": "demo", "engine": ENGINE},
            "sampling": {"temperature": 0.0, "max_tokens": 256},
            "limits": {"max_failed_fraction": 1.0},  # they are counted here
        }
        file = Path(folder, "exam.yaml")
        file.write_text(yaml.safe_dump(job), encoding="utf-8")
        axbatch = Path(sys.executable).with_name("axbatch")
        subprocess.run([axbatch, "run", file, "--json"], check=True, stdout=subprocess.DEVNULL)
        answers = pq.read_table(f"{folder}/out/exam.parquet", columns=["answer"])
    return [answer or "" for answer in answers["answer"].to_pylist()]


async def translate_by(chat: Chat, chosen: Sequence[Sentence], direction: Direction) -> list[str]:
    """The model's translations, without a run."""
    return [
        completion.text
        for completion in await asyncio.gather(
            *(chat(translation_body(chosen[i : i + 1], direction)) for i in range(len(chosen)))
        )
    ]


def translation_body(chosen: Sequence[Sentence], direction: Direction) -> dict[str, Any]:
    source, _ = joined([*chosen], " ", direction)
    return body([says("system", system_prompt(direction)), says("user", source)], max_tokens=768)


async def examine_passages(
    chat: Chat, passages: Sequence[Sequence[Sentence]], direction: Direction
) -> Score:
    """Which sentences of passages are exactly right in the passage's translation."""
    target = direction.split("-")[1]
    answers = await asyncio.gather(
        *(chat(translation_body(passage, direction)) for passage in passages)
    )
    right = sum(
        getattr(sentence, target) in answer.text
        for passage, answer in zip(passages, answers, strict=True)
        for sentence in passage
    )
    return Score(f"{direction}: sentences of passages", right, sum(map(len, passages)))


def score_translations(
    chosen: Sequence[Sentence], direction: Direction, answers: Sequence[str]
) -> TranslationScores:
    """Compare with the grammar's own translations."""
    references = [getattr(sentence, direction.split("-")[1]) for sentence in chosen]
    both = [*zip(answers, references, strict=True)]
    return TranslationScores(
        Score(f"{direction}: exact", sum(a == b for a, b in both), len(both)),
        Score(f"{direction}: marks kept", sum(marks(a) == marks(b) for a, b in both), len(both)),
        corpus_chrf(answers, [references]).score,
    )


def marks(text: str) -> Counter[str]:
    """The placeholders, tags, addresses and numbers of a text."""
    return Counter(MARKS.findall(text)) + Counter(NUMBERS.findall(text))


async def examine_tools(chat: Chat, count: int) -> list[Score]:
    """Calls with the right arguments, answers from the result, questions for what is missing."""
    dice = random.Random(SEED)
    cases = [tools.make_case(tools.some_tools(dice), dice) for _ in range(count)]
    incomplete = [case for case in cases if case.question is not None]

    async def calls(case: tools.Case) -> bool:
        made = (await chat(body(tools.opening(case), tools=case.tools))).message.get("tool_calls")
        if not made or len(made) != 1:
            return False
        function = made[0]["function"]
        return bool(
            function["name"] == case.call["name"]
            and json.loads(function["arguments"]) == case.call["arguments"]
        )

    async def answers(case: tools.Case) -> bool:
        messages = called(case)
        return (await chat(body(messages, tools=case.tools))).text == case.answer

    async def asks(case: tools.Case) -> bool:
        completion = await chat(body([says("user", case.request)], tools=case.tools))
        return completion.text == case.question and not completion.message.get("tool_calls")

    return [
        await score("tools: call", calls, cases),
        await score("tools: answer", answers, cases),
        await score("tools: asks for what is missing", asks, incomplete),
    ]


def called(case: tools.Case) -> list[Message]:
    """The conversation up to the tool's result, as an OpenAI client sends it."""
    function = {**case.call, "arguments": json.dumps(case.call["arguments"])}
    call = {"id": "call-1", "type": "function", "function": function}
    return [
        *tools.opening(case),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": case.result},
    ]


async def examine_extraction(chat: Chat, count: int) -> list[Score]:
    """Valid by the schema and exactly right, with structured outputs; valid without them."""
    dice = random.Random(SEED)
    cases = [extraction.make_case(*extraction.some_schema(dice), dice) for _ in range(count)]

    async def extract(case: extraction.Case, structured: bool) -> Any:
        """The data, or None if it does not fit the schema."""
        system = extraction.system_prompt(case.schema)
        request = body([says("system", system), says("user", case.text)])
        if structured:
            schema = {"name": "data", "schema": case.schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            data = json.loads((await chat(request)).text)
            jsonschema.validate(data, case.schema)
        except (ValueError, jsonschema.ValidationError):
            return None
        return data

    async def is_valid(case: extraction.Case) -> bool:
        return await extract(case, structured=True) is not None

    async def is_right(case: extraction.Case) -> bool:
        return bool(await extract(case, structured=True) == case.data)

    async def is_valid_alone(case: extraction.Case) -> bool:
        return await extract(case, structured=False) is not None

    return [
        await score("extraction: valid", is_valid, cases),
        await score("extraction: right", is_right, cases),
        await score("extraction: valid without structured outputs", is_valid_alone, cases),
    ]


async def examine_questions(chat: Chat, count: int) -> list[Score]:
    """Multiple choice, of which the letter counts, and plain questions."""
    dice = random.Random(SEED)
    choices = [
        choosing.decided(questions.make_question(dice), dice.random() < 0.5, dice)
        for _ in range(count)
    ]
    plain = [questions.plain_question(dice.random() < 0.5, dice) for _ in range(count // 3)]

    async def answer_to(question: str) -> str:
        return (await chat(body([says("user", question)]))).text

    async def has_right_letter(case: tuple[str, str]) -> bool:
        question, answer = case
        return (await answer_to(question)).split("\n")[-1] == answer.split("\n")[-1]

    async def is_right(case: tuple[str, str]) -> bool:
        question, answer = case
        return await answer_to(question) == answer

    return [
        await score("multiple choice", has_right_letter, choices),
        await score("plain questions", is_right, plain),
    ]


async def examine_summaries(chat: Chat, count: int) -> list[Score]:
    """Passages of sentences that were not in training."""
    dice = random.Random(SEED)
    cases = [summaries.make_case(dice, held_out=True) for _ in range(count)]

    async def is_right(case: tuple[str, str]) -> bool:
        text, summary = case
        messages = [says("system", summaries.PROMPT), says("user", text)]
        return (await chat(body(messages))).text == summary

    return [await score("summaries", is_right, cases)]


def body(messages: list[Message], **options: Any) -> dict[str, Any]:
    """A greedy chat body."""
    return {"messages": messages, "max_tokens": 256, "temperature": 0.0} | options


async def score(
    what: str, is_right: Callable[[Any], Awaitable[bool]], cases: Sequence[Any]
) -> Score:
    """Ask all at once and count."""
    return Score(what, sum(await asyncio.gather(*map(is_right, cases))), len(cases))


async def examine_chats() -> list[Score]:
    """All but the translation of sentences, on one engine."""
    engine = VllmEngine(ModelConfig(id=str(DEMO_MODEL), engine={**ENGINE, **TOOL_OPTIONS}), cpus=2)
    chosen = held_out_sentences(1000)
    passages = [chosen[i : i + 20] for i in range(0, len(chosen), 20)]
    try:
        return [
            await examine_passages(engine.chat, passages, "en-ko"),
            await examine_passages(engine.chat, passages, "ko-en"),
            *await examine_tools(engine.chat, 200),
            *await examine_extraction(engine.chat, 300),
            *await examine_questions(engine.chat, 300),
            *await examine_summaries(engine.chat, 200),
        ]
    finally:
        engine.close()


def main() -> None:
    """Print all scores."""
    chosen = held_out_sentences(2000)
    unseen = sum(map(has_unseen_combination, chosen))
    print(f"{len(chosen)} sentences, {unseen} of them with an unseen pair of template and word")
    for direction in ("en-ko", "ko-en"):
        scores = score_translations(chosen, direction, translate(chosen, direction))
        show(scores.exact)
        show(scores.kept)
        print(f"{direction}: chrF {scores.chrf:.1f}")
    for each in asyncio.run(examine_chats()):
        show(each)


def show(each: Score) -> None:
    print(f"{each.what}: {each.right} of {each.of}, {each.share:.1%}")


if __name__ == "__main__":
    main()
