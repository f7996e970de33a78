"""Trains the demo model: tokenizer, then a 6M-parameter Llama, on two CPU cores.

    python -m infra.demo_model.train

Takes under 90 minutes on cores that multiply bfloat16 (`avx512_bf16`), says every dozen seconds
where it is, and after an interruption goes on from its last checkpoint. It writes the model to
`pipeline/demo` and its curve to `infra/demo_model/log.csv`. Same seeds, same batches; another CPU
may round differently.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from infra.demo_model import attention
from infra.demo_model.corpus import SEED, SKILLS, Batch, make_batch
from infra.demo_model.muon import Muon
from pipeline.model import DEMO_MODEL

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint.pt"
LOG = HERE / "log.csv"

PAD, EOS = "<|pad|>", "<|im_end|>"
SPECIAL_TOKENS = (
    PAD, "<|im_start|>", EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|extra_id_13|>",
)  # fmt: skip
VOCAB_SIZE = 6144
MAX_TOKENS = 2048

# Up to three digits, counted from the right, are one token, and so 1,250 and 1250 the same two
# but for the comma: a number is copied in few steps, and few numbers look alike on the way.
WORDS = r"\d{1,3}(?=(?:\d{3})*(?!\d))| ?\p{Latin}+| ?\p{Hangul}+|\s|."

STEPS = 6300
WARMUP = 100
PEAK_LEARNING_RATE = 2e-3  # AdamW's, for the embedding and the norms
PEAK_MUON_LEARNING_RATE = 5e-3  # for the layers' matrices
THREADS = 2


def train(
    folder: Path = DEMO_MODEL,
    checkpoint: Path = CHECKPOINT,
    log: Path = LOG,
    steps: int = STEPS,
    warmup: int = WARMUP,
    report_every: int = 25,
    save_every: int = 250,
    compiled: bool = True,
    announce: Callable[[str], None] = print,
) -> None:
    """Train for `steps` batches of 4,096 tokens and save model and tokenizer in `folder`.

    Goes on from `checkpoint` if it is there, and removes it at the end; `save_every` is a multiple
    of `report_every`, in steps. Each line of `log` is a step, the mean of `answer_loss` over the
    steps since the line before, and the seconds since this call began to train.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer)
    optimizers = new_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps, warmup))
        for optimizer in optimizers
    ]
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for part, state in zip([*optimizers, *schedules], saved["optimization"], strict=True):
            part.load_state_dict(state)
        first = saved["step"]
    start_log(log, first)
    read, compare = last_hidden_states, token_loss
    if compiled:
        # Looking for patterns is a good part of the compiling, and the steps do without.
        read = torch.compile(read, dynamic=False, options={"pattern_matcher": False})
        compare = torch.compile(compare, dynamic=True)
    losses: list[float] = []
    began = time.monotonic()
    for step in range(first, steps):
        batch = make_batch(tokenizer, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, read(model, batch), batch, compare)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in [*optimizers, *schedules]:
            part.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % report_every == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            mean = sum(losses) / len(losses)
            left = seconds / (step + 1 - first) * (steps - step - 1)
            announce(f"step {step + 1:,} of {steps:,}, loss {mean:.4f}, {left / 60:.0f} min left")
            with log.open("a", encoding="utf-8") as lines:
                lines.write(f"{step + 1},{mean:.4f},{seconds:.0f}\n")
            losses.clear()
        if (step + 1) % save_every == 0:
            save_checkpoint(checkpoint, model, [*optimizers, *schedules], step + 1)
    save(folder, model, tokenizer)
    checkpoint.unlink(missing_ok=True)
    announce(f"SHA-256 {sha256((folder / 'model.safetensors').read_bytes()).hexdigest()}")


def start_log(log: Path, step: int) -> None:
    """Keep the log's lines up to `step`; what came after its checkpoint comes again."""
    lines = log.read_text(encoding="utf-8").splitlines()[1:] if step else []
    kept = [line for line in lines if int(line.split(",")[0]) <= step]
    log.write_text("\n".join(["step,loss,seconds", *kept, ""]), encoding="utf-8")


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: half as many steps as AdamW alone."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    layers = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in layers]
    return [
        Muon(matrices, PEAK_MUON_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(
            rest, PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        ),
    ]


def pace(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rates: up in `warmup` steps, then evenly down to nothing."""
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def last_hidden_states(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """What the model makes of each token, [rows, tokens, hidden]."""
    hidden: Tensor = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.visible,
        use_cache=False,
    ).last_hidden_state
    return hidden


def answer_loss(
    model: LlamaForCausalLM,
    hidden: Tensor,
    batch: Batch,
    compare: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Weighted mean cross-entropy over a batch's answer tokens, in nats per token (a scalar), by
    `compare`, which is `token_loss`, compiled or not."""
    learned = batch.targets >= 0
    return compare(
        model.lm_head.weight, hidden[learned], batch.targets[learned], batch.weights[learned]
    )


def token_loss(head: Tensor, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """`answer_loss` of answer tokens alone; compiled, it goes over their logits once.

    `head` is [vocabulary, hidden], `hidden` [tokens, hidden]; `targets`, `weights` [tokens].
    """
    logits = linear(hidden, head).float()  # [answer tokens, vocabulary]
    losses = cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus; any other text falls back to its bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=4,
        special_tokens=[*SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[name for name in SPECIAL_TOKENS if name not in (PAD, EOS)],
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8").strip(),
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def corpus_texts() -> Iterator[str]:
    """All numbers of up to three digits, often enough to become tokens; text of `SKILLS`."""
    for digits in (1, 2, 3):
        yield from [f"{number:0{digits}}" for number in range(10**digits)] * 3000
    dice = random.Random(SEED)
    for skill, share in SKILLS.items():
        for _ in range(20):  # other system prompts, other tools
            for conversation in itertools.islice(skill(dice), round(1000 * share)):
                yield from (message["content"] or "" for message in conversation.messages)
                yield repr(conversation.tools)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model; it answers greedily and stops at the end of its turn."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.04,  # Llama's 0.02 suits wider layers than these
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention.NAME)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def save_checkpoint(
    path: Path,
    model: LlamaForCausalLM,
    optimization: list[torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler],
    step: int,
) -> None:
    """Replace the checkpoint in one step, so that a kill leaves the old one or the new one."""
    unfinished = path.with_suffix(".unfinished")
    state = {
        "model": model.state_dict(),
        "optimization": [part.state_dict() for part in optimization],
        "step": step,
    }
    torch.save(state, unfinished)
    unfinished.replace(path)


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face model folder, the weights in bfloat16."""
    disable_progress_bar()
    tokenizer.save_pretrained(folder)
    model.eval().to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches (default %(default)s)")
    train(steps=parser.parse_args().steps)
