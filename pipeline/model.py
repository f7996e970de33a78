"""Where a model's files are, checked before an engine is started on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.model import DEMO, ModelConfig
from pipeline.errors import ModelError

DEMO_MODEL = Path(__file__).parent.absolute() / "demo"
"""The embedded model; infra/demo_model made it."""

SCALED_IN_POSITIONS = ("default", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "llama3", "su")
"""Kinds of RoPE whose `max_position_embeddings` are what they come to, scaling included."""

WHAT_A_MODEL_IS = "Give a folder with config.json, tokenizer and safetensors, a hub id, or `demo`."


def resolve_model(model: ModelConfig) -> ModelConfig:
    """The model with `demo` and local folders as absolute paths.

    Raises:
        ModelError: the folder or the hub id does not hold a model, or is wrong for its options.
    """
    if model.backend != "vllm":
        return model
    if model.id == DEMO:
        return model.model_copy(update={"id": str(DEMO_MODEL)})
    folder = Path(model.id).expanduser()
    if folder.is_dir() or model.id.startswith(("/", ".", "~")):
        if not folder.is_dir():
            raise ModelError(f"model.id: {model.id}: no such folder", "Check the path.")
        _check_config(folder / "config.json", model)
        return model.model_copy(update={"id": str(folder.absolute())})
    _check_config(_hub_config(model), model)
    return model


def _hub_config(model: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry

    try:
        return Path(hf_hub_download(model.id, "config.json", revision=model.revision))
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            reason = f"the hub answers: {' '.join(str(error).split())[:160]}"
        else:
            reason = "it is not in the local cache and the hub cannot be reached"
        raise ModelError(
            f"model.id: `{model.id}` is no local folder, and {reason}",
            "Mend the id or revision, set HF_TOKEN for a gated model, or give a local folder.",
        ) from None
    except HFValidationError:
        raise ModelError(
            f"model.id: `{model.id}` is neither a local folder nor a hub id (owner/name)"
        ) from None


def read_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model of vLLM. Raises ModelError, as `resolve_model` does."""
    folder = Path(resolve_model(model).id)
    return _read_config(folder / "config.json" if folder.is_dir() else _hub_config(model))


def context_in(config: Mapping[str, Any]) -> int | None:
    """Tokens of a model's context where the job file says nothing of it, as vLLM 0.32 takes them
    from a config.json (vllm/config/model.py); None if that does not say."""
    own = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "longrope":
        own = config.get("original_max_position_embeddings", own)
    elif isinstance(own, int) and kind not in SCALED_IN_POSITIONS:
        own = int(own * (rope.get("factor") or 1))
    return own if isinstance(own, int) else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.id: {path.parent} holds no config.json",
            WHAT_A_MODEL_IS,
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model.id: {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"model.id: {path} is not a model's configuration", WHAT_A_MODEL_IS)
    return config


def _check_config(path: Path, model: ModelConfig) -> None:
    heads = _read_config(path).get("num_attention_heads")
    tensor = int(model.engine.get("tensor_parallel_size", 1))
    if isinstance(heads, int) and heads % tensor:
        raise ModelError(
            f"model.engine.tensor_parallel_size: {heads} attention heads do not divide by {tensor}",
            "Use a power of two, the smallest whose KV cache fits.",
        )
