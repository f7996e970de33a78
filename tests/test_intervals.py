"""The intervals of a plan: they hold the truth, and what is counted whole has none."""

import random
from collections.abc import Callable

import pytest

from jobs import load_task
from tests.conftest import PreparedJob
from tests.forecasts import estimate, words

Prepare = Callable[..., PreparedJob]


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
def test_intervals_hold_the_truth(prepared: Prepare, figure: str) -> None:
    held, widths = 0, []
    for seed in range(20):
        job, files = prepared(), corpus(seed)
        for number, file in enumerate(files):
            job.write(f"{number}.parquet", {"text": file})
        task = load_task(job.config)
        texts = [text for file in files for text in file]
        found = estimate(job)
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


def test_what_is_counted_whole_has_no_interval(prepared: Prepare) -> None:
    texts = words(random.Random(1), 300)
    found = estimate(prepared(texts))
    assert found.tokens and found.tokens.is_exact
    assert found.tokens.prompt.low == found.tokens.prompt.high
    low, mid, high = found.tokens.completion
    assert low < sum(len(text.split()) for text in texts) < high and low < mid < high
    assert found.tokens.answers == "expected"
