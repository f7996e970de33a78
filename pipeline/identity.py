"""A job's identity: all that decides its output, so that one output is never made by two jobs."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.config import JobConfig
from pipeline.config.model import DEMO

# Engine options that change speed or placement only. Every other option may change the output
# and is part of the job's identity.
EXECUTION_OPTIONS = frozenset({
    "tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs",
    "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager",
    "enable_prefix_caching", "enable_chunked_prefill", "distributed_executor_backend",
    "disable_log_stats", "scheduling_policy", "swap_space", "load_format", "download_dir",
    "compilation_config", "timeout", "max_retries",
    "seconds_per_request", "seconds_per_prompt_token", "seconds_per_completion_token",
})  # fmt: skip


def identity_fields(job: JobConfig, task: dict[str, Any]) -> dict[str, Any]:
    """All that decides the output, by dotted name; `task` is the task's own account of itself."""
    model = {
        "id": absolute_model_id(job.model.id),
        "revision": job.model.revision,
        "backend": job.model.backend,
        "engine": _deciding(job.model.engine),
    }
    if job.model.context != "native":
        yarn = job.model.yarn
        longer = {"factor": yarn.factor, "engine": _deciding(yarn.engine)}
        model |= {"context": job.model.context, "yarn": longer}
    fields = {
        "task": task,
        "output": {"column": job.output.column},
        "model": model,
        "sampling": job.sampling.body(),
    }
    if job.accounting.rows:  # else whose tokens are counted changes the report alone
        tokenizers = (job.accounting.tokenizer, job.accounting.baseline)
        tokenizer, baseline = (name and absolute_model_id(name) for name in tokenizers)
        fields["accounting"] = {"rows": True, "tokenizer": tokenizer, "baseline": baseline}
    return _flatten(fields)


def _deciding(engine: dict[str, Any]) -> dict[str, Any]:
    """What may change the output; of a template's file what it holds, as vLLM reads that."""
    deciding = {
        name: value
        for name, value in absolute_options(engine).items()
        if name not in EXECUTION_OPTIONS or (name, value) == ("load_format", "dummy")
    }
    template = deciding.get("chat_template")
    if is_template_file(template) and (file := Path(str(template))).is_file():
        deciding["chat_template"] = f"sha256:{sha256(file.read_bytes()).hexdigest()[:16]}"
    return deciding


def is_template_file(template: Any) -> bool:
    """Whether `model.engine.chat_template` names a file, and is no template, as vLLM tells it."""
    return template is not None and not any(mark in str(template) for mark in "{}\n")


def absolute_options(engine: dict[str, Any]) -> dict[str, Any]:
    """Engine options whose local paths mean the same from everywhere."""
    absolute = dict(engine)
    for name in ("tokenizer", "hf_config_path", "generation_config"):
        if isinstance(engine.get(name), str):
            absolute[name] = absolute_model_id(engine[name])
    template = engine.get("chat_template")
    if is_template_file(template) and Path(str(template)).is_file():
        absolute["chat_template"] = str(Path(str(template)).absolute())
    return absolute


def absolute_model_id(model_id: str) -> str:
    """A local folder as an absolute path, so that it means the same from everywhere; else as is."""
    folder = Path(model_id).expanduser()
    if model_id == DEMO:
        return model_id
    if model_id.startswith(("/", ".", "~")) or folder.is_dir():
        return str(folder.absolute())
    return model_id


def identity_hash(fields: dict[str, Any]) -> str:
    """16 hex digits of the SHA-256 over the canonical JSON of `fields`."""
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()[:16]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
