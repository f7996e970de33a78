"""Trains the demo model: a byte-level tokenizer and a 4M-parameter Llama on `pairs.tsv`.

The model learns the 300 sentence pairs by heart, in both directions. It also sees muddled inputs,
so that it ends its answer by itself on texts it never saw; it does not learn to translate.
Importing this module loads torch; `pipeline.demo.model` does so only when it has to build.
"""

import random
import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import exp, log
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

PAIRS_FILE = Path(__file__).with_name("pairs.tsv")

PAD, EOS = "<|pad|>", "<|im_end|>"
SPECIAL_TOKENS = (
    PAD,
    "<|im_start|>",
    EOS,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|extra_id_13|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|><|{{ message.role }}|>{{ message.content }}<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|><|assistant|>{%- endif -%}"
)

# As the product's translate task writes it: the model only knows this system prompt.
SYSTEM_PROMPT = (
    "You are an expert who translates the user's {source} sentences into {target}. "
    "Answer with the translation only."
)

VOCAB_SIZE = 4096
MAX_TOKENS = 2048
THREADS = 2
SEED = 13

EPOCHS = 15
MUDDLED = 14  # per epoch and direction, next to the 300 pairs
ROW_TOKENS = 256  # a batch is one row, closed once it is longer than this
PEAK_LEARNING_RATE = 2e-3
INITIAL_STD = 0.05  # Llama's 0.02 suits wider layers than these

# What muddled inputs have strange words of.
ALPHABETS = (
    string.ascii_lowercase,
    string.ascii_letters + string.punctuation,
    string.digits + ".,:%$",
    "".join(map(chr, range(0xAC00, 0xD7A4))),  # the Hangul syllables
    "".join(map(chr, range(0xA1, 0x3000))),
)


class Pair(NamedTuple):
    """One line of `pairs.tsv`."""

    topic: str
    en: str
    ko: str


class Direction(NamedTuple):
    """All sentences of one translation direction: `source[i]` means `target[i]`."""

    system: str
    source: list[str]
    target: list[str]


class Example(NamedTuple):
    """A conversation after its system prompt; the last `answer` token ids are to be learned."""

    ids: list[int]
    answer: int


class Batch(NamedTuple):
    """Several conversations in one row."""

    ids: Tensor  # [tokens]
    positions: Tensor  # [tokens], each token's place in its conversation
    owners: Tensor  # [tokens], the number of its conversation, 0 for the common beginning
    learned: Tensor  # [answer tokens], the places of the tokens to be learned


def read_pairs() -> list[Pair]:
    """Read the sentence pairs, in file order."""
    lines = PAIRS_FILE.read_text(encoding="utf-8").splitlines()
    return [Pair(*line.split("\t")) for line in lines[1:]]


def train_demo_model(directory: Path) -> None:
    """Train tokenizer and model and save both in `directory`, as a Hugging Face model folder."""
    english, korean = [pair.en for pair in read_pairs()], [pair.ko for pair in read_pairs()]
    directions = [
        Direction(SYSTEM_PROMPT.format(source="English", target="Korean"), english, korean),
        Direction(SYSTEM_PROMPT.format(source="Korean", target="English"), korean, english),
    ]
    tokenizer = train_tokenizer(directions)
    with reproducible_torch():
        model = train_model(tokenizer, directions)
    disable_progress_bar()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


@contextmanager
def reproducible_torch() -> Iterator[None]:
    """Fix torch's seed and thread count inside the block, and put both back afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train_tokenizer(directions: list[Direction]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on all texts; any other text falls back to its bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for system, source, _ in directions for text in [system, *source]]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[name for name in SPECIAL_TOKENS if name not in (PAD, EOS)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model; it answers greedily and stops at the end of its turn."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=INITIAL_STD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def train_model(
    tokenizer: PreTrainedTokenizerFast, directions: list[Direction]
) -> LlamaForCausalLM:
    """Train a new model for `EPOCHS` passes over the pairs, each with newly muddled inputs."""
    dice = random.Random(SEED)  # noqa: S311 (not for secrets)
    batches = [batch for _ in range(EPOCHS) for batch in make_epoch(tokenizer, directions, dice)]
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        PEAK_LEARNING_RATE,
        total_steps=len(batches),
        pct_start=0.15,
        cycle_momentum=False,
    )
    for batch in batches:
        answer_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in nats per token (a scalar)."""
    owner, other = batch.owners[:, None], batch.owners
    visible = ((other == owner) | (other == 0)).tril()  # [tokens, tokens]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bfloat16()):
        hidden = model.model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            attention_mask=visible[None, None],
        ).last_hidden_state[0]  # [tokens, hidden]
        logits = model.lm_head(hidden[batch.learned - 1])  # [answer tokens, vocabulary]
    return cross_entropy(logits.float(), batch.ids[batch.learned])


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 here: only where the CPU has instructions for it."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def make_epoch(
    tokenizer: PreTrainedTokenizerFast, directions: list[Direction], dice: random.Random
) -> list[Batch]:
    """All pairs and `MUDDLED` muddled ones in each direction, as rows in random order."""
    batches = []
    for direction in directions:
        texts = [*zip(direction.source, direction.target, strict=True)]
        texts += [muddle(direction, dice) for _ in range(MUDDLED)]
        dice.shuffle(texts)
        prefix = encode_prefix(tokenizer, direction.system)
        rows = fill_rows(encode(tokenizer, source, target) for source, target in texts)
        batches += [pack(prefix, row) for row in rows]
    dice.shuffle(batches)
    return batches


def fill_rows(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Group examples in order; each group but the last has more than `ROW_TOKENS` tokens."""
    row: list[Example] = []
    for example in examples:
        row.append(example)
        if sum(len(other.ids) for other in row) > ROW_TOKENS:
            yield row
            row = []
    if row:
        yield row


def pack(prefix: list[int], examples: list[Example]) -> Batch:
    """Lay conversations with the same beginning out in one row, that beginning only once.

    Each conversation sees the beginning and itself, and counts its positions on from there. The
    loss is that of one row for each conversation, for half the work and without padding.
    """
    ids, positions, owners = [*prefix], [*range(len(prefix))], [0] * len(prefix)
    learned: list[int] = []
    for owner, example in enumerate(examples, start=1):
        ids += example.ids
        positions += range(len(prefix), len(prefix) + len(example.ids))
        owners += [owner] * len(example.ids)
        learned += range(len(ids) - example.answer, len(ids))
    return Batch(*map(torch.tensor, (ids, positions, owners, learned)))


def muddle(direction: Direction, dice: random.Random) -> tuple[str, str]:
    """Make an input of 1 to about 90 words that means nothing, and its answer.

    It shuffles half the words of one to three known sentences, other known words and strange ones.
    The answer is the translations of those sentences: so the model learns to pick, whatever it is
    asked, something it knows by heart, which comes to an end.
    """
    length = round(exp(dice.uniform(log(2), log(80))))
    known = dice.choices(range(len(direction.source)), k=1 + min(2, length // 25))
    words = [word for i in known for word in direction.source[i].split() if dice.random() < 0.5]
    strangeness = dice.random()
    for _ in range(length):
        strange = dice.random() < strangeness
        words.append(strange_word(dice) if strange else known_word(direction, dice))
    dice.shuffle(words)
    return " ".join(words), " ".join(direction.target[i] for i in known)


def known_word(direction: Direction, dice: random.Random) -> str:
    """A random word of a random known sentence."""
    return dice.choice(dice.choice(direction.source).split())


def strange_word(dice: random.Random) -> str:
    """Up to 9 random characters of one alphabet."""
    alphabet = dice.choice(ALPHABETS)
    return "".join(dice.choices(alphabet, k=dice.randint(1, 9)))


def encode_prefix(tokenizer: PreTrainedTokenizerFast, system: str) -> list[int]:
    """Encode what all conversations with this system prompt begin with."""
    turns = [{"role": "system", "content": system}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False)
    ids: list[int] = tokenizer.encode(f"{prompt}<|im_start|><|user|>")
    return ids


def encode(tokenizer: PreTrainedTokenizerFast, source: str, target: str) -> Example:
    """Encode the rest of a conversation; learned are the target and the end of the turn."""
    question = tokenizer.encode(f"{source}{EOS}<|im_start|><|assistant|>")
    answer = tokenizer.encode(f"{target}{EOS}")
    return Example(question + answer, len(answer))
