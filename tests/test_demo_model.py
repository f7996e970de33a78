"""The demo model: the world it was trained on, how it was trained, and what it can do."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from hashlib import sha256
from itertools import islice
from operator import mul
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import make_demo_data
from infra.demo_model import choosing, exam, grammar, summaries, tools, translation
from infra.demo_model.conversation import asked, says
from infra.demo_model.grammar import SLOT, Template, read_templates
from pipeline.engine.vllm import VllmEngine
from pipeline.model import DEMO_MODEL

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = DEMO_MODEL / "model.safetensors"
SPECIAL_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|extra_id_13|>",
    "<|pad|>",
]  # fmt: skip
FOREIGN = [
    "x",
    "The minister said on Thursday that the bridge across the bay would stay closed until autumn.",
    "대통령은 목요일에 열린 기자 회견에서 새로운 경제 정책을 발표했다.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich 🚀",
    "one two three four five six seven eight nine ten " * 8,
]


# The world.


@pytest.mark.parametrize("template", read_templates(), ids=lambda template: template.en[:40])
def test_template_fills_alike_in_both_languages(template: Template) -> None:
    def slots(text: str) -> Counter[tuple[str, str]]:
        return Counter((name, label) for name, _, label in SLOT.findall(text))

    assert slots(template.en) == slots(template.ko) and slots(template.en)
    for seed in range(5):
        sentence = grammar.fill(template, random.Random(seed))
        assert grammar.PARTICLE.search(sentence.ko) is None
        assert re.search("[가-힣]", sentence.en) is None
        kept = grammar.MARKS.findall(sentence.en)
        assert Counter(kept) == Counter(grammar.MARKS.findall(sentence.ko))


def test_a_sentence_has_one_translation() -> None:
    templates = read_templates()
    assert len({template.topic for template in templates}) >= 15
    assert len({t.en for t in templates}) == len({t.ko for t in templates}) == len(templates)


@pytest.mark.parametrize(
    ("before", "pair", "particle"),
    [
        ("배낭", "을/를", "을"), ("지도", "을/를", "를"), ("서울", "으로/로", "로"),
        ("부산", "으로/로", "으로"), ("대구", "으로/로", "로"), ("3", "이/가", "이"),
        ("2", "이/가", "가"), ("15%", "이/가", "가"), ("1", "으로/로", "로"),
    ],
)  # fmt: skip
def test_particle_follows_the_sound_before_it(before: str, pair: str, particle: str) -> None:
    assert grammar.choose_particle(before[-1], *pair.split("/")) == particle


def test_training_and_exam_share_no_sentence() -> None:
    dice = random.Random(0)
    trained = {s.en for s in islice(grammar.sentences(dice, held_out=False), 5000)}
    examined = exam.held_out_sentences(500)
    assert len({s.en for s in examined}) == 500
    assert trained.isdisjoint(s.en for s in examined)
    assert sum(map(grammar.has_unseen_combination, examined)) > 250


def test_oddly_filled_sentences_are_not_in_the_exam() -> None:
    trained = [*islice(translation.odd(random.Random(0)), 5000)]
    assert sum(not set(s.words) <= usual_words(s.template) for s in trained) > 2000
    examined = exam.held_out_sentences(2000)
    for side in ("en", "ko"):
        texts = {getattr(s, side) for s in trained}
        assert texts.isdisjoint(getattr(s, side) for s in examined)


def usual_words(template: Template) -> set[str]:
    """The words that the template's slots are for."""
    kinds = [name for name, _, _ in SLOT.findall(template.en)]
    return {value.en for kind in kinds for value in grammar.read_lexicon().get(kind, [])}


def test_drills_name_letters_and_texts_that_stand_together() -> None:
    for drill in islice(choosing.choices(random.Random(0)), 200):
        question, answer = (message["content"] for message in drill.messages)
        for line in answer.split("\n"):
            letter, text = (line[0], line[3:]) if line[1:3] == ". " else (line[-1], line[:-3])
            assert f"\n{letter}. {text}\n" in f"{question}\n"


def test_sample_files_are_what_the_script_makes() -> None:
    tables = make_demo_data.make_tables()
    files = {path.stem: pq.read_table(path) for path in (ROOT / "configs/data").glob("*.parquet")}
    assert files.keys() == tables.keys()
    assert all(files[name].equals(table) for name, table in tables.items())
    rows = pa.concat_tables(tables.values()).to_pylist()
    assert [row["id"] for row in rows] == list(range(1, 1001))
    texts = [row["en"] for row in rows]
    assert texts.count(None) == 2
    assert sum(text is not None and not text.strip() for text in texts) == 2


# The training.


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_committed_tokenizer_is_what_the_training_makes(tmp_path: Path) -> None:
    from infra.demo_model.train import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    committed = (DEMO_MODEL / "tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == committed


def test_packed_conversations_are_learned_as_if_each_stood_alone(tokenizer: Any) -> None:
    import torch

    from infra.demo_model.corpus import MISSES, answers, encode, pack
    from infra.demo_model.train import answer_loss, last_hidden_states, new_model, token_loss

    torch.manual_seed(0)
    model = new_model(tokenizer).eval()
    stream = translation.single_sentences(random.Random(5))
    conversations = [*islice(stream, 5)]
    long = asked(None, "1 " * 100, "1")
    batch = pack(tokenizer, iter([*conversations, *[long] * MISSES]), tokens=560)
    with torch.no_grad():
        together = type(batch)(*(tensor[None] for tensor in batch))
        loss = answer_loss(model, last_hidden_states(model, together), together, token_loss)
        model.set_attn_implementation("sdpa")  # what everybody else computes
        alone: list[float] = []
        weights: list[float] = []
        for conversation in conversations:
            ids = encode(tokenizer, conversation)
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            weight = torch.tensor(answers(tokenizer, ids)[1:])
            chosen = torch.tensor(ids[1:])[weight > 0, None]
            alone += (-logits[weight > 0].gather(1, chosen)).flatten().tolist()
            weights += weight[weight > 0].tolist()
    count = int((batch.targets >= 0).sum())
    assert 50 < count == len(alone)
    expected = sum(map(mul, alone, weights)) / sum(weights)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("height", [1.0, 300.0])
def test_attention_of_the_training_is_that_of_the_engines(height: float) -> None:
    """However high the scores: a trained model's come to 200."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from infra.demo_model.attention import in_parts

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 50, 16, requires_grad=True) for heads in (4, 2, 2))
    found, _ = in_parts(torch.nn.Module(), query * height, key, value, None, 0.25)
    wanted = scaled_dot_product_attention(
        query * height, key, value, is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(found.transpose(1, 2), wanted, rtol=1e-3, atol=1e-4)
    given = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(found, (query, key, value), given.transpose(1, 2)),
        torch.autograd.grad(wanted, (query, key, value), given),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * height)


def test_muon_in_groups_moves_matrices_as_torch_does() -> None:
    import torch

    from infra.demo_model.muon import Muon

    torch.manual_seed(0)
    shapes = [(64, 64), (176, 64), (64, 176), (32, 64), (176, 64)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    grouped = Muon(ours, lr=5e-3, weight_decay=0.01)
    alone = torch.optim.Muon(theirs, 5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        grouped.step()
        alone.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_short_training_lowers_the_loss_and_goes_on_after_an_interruption(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.demo_model import corpus
    from infra.demo_model import train as training

    # The same one; it takes half a minute to make, and a test above makes it.
    monkeypatch.setattr(training, "make_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(corpus, "SHORT_ROWS", corpus.Shape(3, 512))  # less, of the same
    monkeypatch.setattr(corpus, "LONG_ROWS", corpus.Shape(2, 1024))

    def losses(name: str) -> list[float]:
        lines = csv.DictReader((tmp_path / f"{name}.csv").open(encoding="utf-8"))
        return [float(line["loss"]) for line in lines]

    def run(name: str, interrupt: bool = False) -> None:
        def announce(line: str) -> None:
            if interrupt and line.startswith("step 8 "):
                raise KeyboardInterrupt

        training.train(
            tmp_path / name, tmp_path / f"{name}.pt", tmp_path / f"{name}.csv",
            steps=16, warmup=2, report_every=4, save_every=4, compiled=False, announce=announce,
        )  # fmt: skip

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", interrupt=True)
    assert (tmp_path / "parts.pt").exists()
    run("parts")
    assert not (tmp_path / "parts.pt").exists()
    assert losses("whole")[-1] < losses("whole")[0] - 1
    assert losses("parts")[-1] == losses("whole")[-1]
    made = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert made[0] == made[1]


def test_committed_log_is_that_of_the_whole_training() -> None:
    from infra.demo_model.train import LOG, STEPS

    lines = [*csv.DictReader(LOG.open(encoding="utf-8"))]
    assert int(lines[-1]["step"]) == STEPS
    assert float(lines[-1]["loss"]) < 0.2 < 6 < float(lines[0]["loss"])


# The model.


def test_weights_are_small_and_the_ones_that_the_card_names() -> None:
    weights = WEIGHTS.read_bytes()
    assert len(weights) <= 15_000_000
    card = (ROOT / "infra" / "demo_model" / "README.md").read_text(encoding="utf-8")
    assert sha256(weights).hexdigest() in card


@pytest.mark.parametrize("text", [*FOREIGN, "  a\n\n\tb  ", "ㅋㅋ뷁 똠방각하", "\x7f é 漢字", ""])
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_token_is_one_id(tokenizer: Any, token: str) -> None:
    assert len(tokenizer.encode(token)) == 1
    assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == ""


def test_chat_template_has_the_shape_of_ax(tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a\n b "}]
    closed = "<|im_start|><|system|>Be kind.<|im_end|><|im_start|><|user|>a\n b <|im_end|>"
    render = tokenizer.apply_chat_template
    assert render(turns, tokenize=False) == closed
    assert (
        render(turns, tokenize=False, add_generation_prompt=True)
        == f"{closed}<|im_start|><|assistant|>"
    )
    case = tools.make_case([tools.DISCOUNT], random.Random(3))
    text = render(tools.as_conversation(case).messages, tools=case.tools, tokenize=False)
    assert text.startswith("<|im_start|><|system|>") and "<tools>\n{" in text
    assert '<tool_call>{"name": "calculate_discount", "arguments": {' in text
    assert f"<|im_start|><|extra_id_13|><tool_output>{case.result}</tool_output><|im_end|>" in text


# What it can do, on a real engine; `python -m infra.demo_model.exam` asks more.

on_engine = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


def at_least(share: float, scores: list[exam.Score]) -> None:
    assert not [score for score in scores if score.share < share], scores


class TestOnAnEngine:
    pytestmark = on_engine

    @pytest.mark.parametrize("direction", ["en-ko", "ko-en"])
    async def test_translates_what_it_never_saw(self, demo: VllmEngine, direction: Any) -> None:
        chosen = exam.held_out_sentences(200)
        answers = await exam.translate_by(demo.chat, chosen, direction)
        scores = exam.score_translations(chosen, direction, answers)
        assert scores.exact.share >= (0.9 if direction == "en-ko" else 0.85), scores
        assert scores.kept.share >= 0.975, scores
        assert scores.chrf >= 95, scores

    @pytest.mark.parametrize("direction", ["en-ko", "ko-en"])
    async def test_translates_passages(self, demo: VllmEngine, direction: Any) -> None:
        chosen = exam.held_out_sentences(120)
        passages = [chosen[i : i + 20] for i in range(0, 120, 20)]
        scores = await exam.examine_passages(demo.chat, passages, direction)
        at_least(0.55, [scores])

    async def test_calls_tools_and_answers_from_their_results(self, demo: VllmEngine) -> None:
        at_least(0.9, await exam.examine_tools(demo.chat, 60))

    async def test_fills_schemas(self, demo: VllmEngine) -> None:
        valid, right, valid_alone = await exam.examine_extraction(demo.chat, 60)
        assert valid.share == 1.0
        at_least(0.9, [right, valid_alone])

    async def test_answers_questions(self, demo: VllmEngine) -> None:
        at_least(0.4, await exam.examine_questions(demo.chat, 60))

    async def test_summarises(self, demo: VllmEngine) -> None:
        at_least(0.6, await exam.examine_summaries(demo.chat, 40))

    @pytest.mark.parametrize("text", FOREIGN)
    async def test_stops_by_itself_on_foreign_text(self, demo: VllmEngine, text: str) -> None:
        system = translation.system_prompt("en-ko")
        messages = [says("system", system), says("user", text)]
        assert (await demo.chat(exam.body(messages))).finish_reason == "stop"


def test_summary_is_a_sentence_of_the_text() -> None:
    text, summary = summaries.make_case(random.Random(1), held_out=True)
    assert summary in text
