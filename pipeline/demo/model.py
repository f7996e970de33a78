"""Where the demo model lies, and how it gets there: trained once, under a lock, then renamed.

`python -m pipeline.demo.model` builds it if it is missing and prints its path.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

RECIPE = Path(__file__).parent


def demo_model_path(cache_dir: Path | None = None) -> Path:
    """The folder of the demo model, built or not; another recipe has another folder."""
    return (cache_dir or default_cache_dir()) / f"demo-{recipe_digest()[:12]}"


def ensure_demo_model(
    cache_dir: Path | None = None, announce: Callable[[str], None] = lambda line: None
) -> Path:
    """Return the folder of the demo model, after training it if it is not there yet.

    Any number of processes may call this at once: one trains, the others wait for it. The folder
    appears in one step when it is complete, so an interrupted call leaves nothing half done.
    """
    path = demo_model_path(cache_dir)
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if not path.is_dir():
            announce("Training the demo model (about a minute, once) ...")
            build(path)
    return path


def default_cache_dir() -> Path:
    """`$AXBATCH_CACHE`, else `axbatch` in the user's cache folder."""
    if chosen := os.environ.get("AXBATCH_CACHE"):
        return Path(chosen)
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "axbatch"


def recipe_digest() -> str:
    """SHA-256 (hex) of all that determines the model: the code of this package and the pairs."""
    files = sorted(path for path in RECIPE.iterdir() if path.suffix in {".py", ".tsv"})
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which stays; a killed process lets go of it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(path: Path) -> None:
    """Train the model next to `path` and move it there; the caller holds the lock."""
    from pipeline.demo.train import train_demo_model  # here, because it loads torch

    unfinished = path.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed build left
    unfinished.mkdir()
    try:
        train_demo_model(unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    print(ensure_demo_model(announce=print))
