"""Logits processors of vLLM: one counts requests; others, at the sight of a number in a prompt,
kill or hang their engine. `model.engine.logits_processors: [tests.faults.processors:Killer]`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

POISON = "907143685"
COUNTED = "TEST_COUNTED_REQUESTS"
"""Environment variable: the file that gets a byte for each request that an engine begins."""


class Observer(LogitsProcessor):
    """Changes nothing."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any) -> Any:
        return logits


class Counter(Observer):
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update and batch_update.added:
            with Path(os.environ[COUNTED]).open("ab") as file:
                file.write(b"." * len(batch_update.added))


class Poison(Observer):
    """Looks at the prompt of each request that joins the batch."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer)
        self._decode = tokenizer.decode

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            if POISON in self._decode(prompt or []):
                self.strike()

    def strike(self) -> None:
        raise NotImplementedError


class Killer(Poison):
    def strike(self) -> None:
        os._exit(1)


class Hanger(Poison):
    def strike(self) -> None:
        time.sleep(24 * 3600)  # the fault itself, which is to be noticed
