"""Bare engine, vLLM's run_batch and axbatch's worker in turn on one engine.

In one process, on one event loop, with the prefix cache emptied before each. What Ray adds is not
in it; whole commands are compared in `contestants`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import worker
from pipeline.accounting import Usage
from pipeline.cluster import units_in_flight
from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.config.running import ReplicaRange
from pipeline.engine.vllm import VllmEngine
from pipeline.lanes import first_lane
from pipeline.lease import Watch
from pipeline.model import DEMO_MODEL
from pipeline.source import encode_unit, read_units
from pipeline.storage import Folder
from tests.bench.contestants import ENGINE
from tests.bench.workloads import Body, write
from tests.conftest import make_plan_of


class OneEngine:
    def __init__(self) -> None:
        self._engine = VllmEngine(ModelConfig(id=str(DEMO_MODEL), engine=ENGINE), cpus=2)

    async def bare(self, bodies: Sequence[Body]) -> float:
        """Seconds for all of them, asked at once as token ids; nothing is written."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm = self._engine._llm
        prompts = [self.token_ids(each) for each in bodies]
        await self._forget()

        async def ask(prompt: list[int], tokens: int) -> None:
            params = SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            given = {"prompt_token_ids": prompt}
            async for _ in llm.generate(given, params, uuid.uuid4().hex):
                pass

        began = time.monotonic()
        await asyncio.gather(
            *(ask(ids, each["max_tokens"]) for ids, each in zip(prompts, bodies, strict=True))
        )
        return time.monotonic() - began

    async def run_batch(self, bodies: Sequence[Body]) -> float:
        """Seconds of vLLM's own file runner, its reading and writing included."""
        from vllm.entrypoints.launchers import run_batch as module

        await self._engine._start_serving()
        await self._forget()
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), bodies)
            args = self._engine._args
            args.input_file, args.output_file = f"{name}/rows.jsonl", f"{name}/answers.jsonl"
            args.output_tmp_dir, args.served_model_name = None, ["bench"]
            # Its serving objects, which axbatch makes once, are made before.
            registry = await module.build_endpoint_registry(self._engine._llm, args)

            async def made(engine_client: Any, args: Any) -> Any:
                return registry

            make, module.build_endpoint_registry = module.build_endpoint_registry, made
            try:
                began = time.monotonic()
                await module.run_batch(self._engine._llm, args)
                seconds = time.monotonic() - began
            finally:
                module.build_endpoint_registry = make
            answers = Path(args.output_file).read_text(encoding="utf-8").splitlines()
            assert all(json.loads(line)["response"]["status_code"] == 200 for line in answers)
        return seconds

    async def axbatch(self, bodies: Sequence[Body]) -> tuple[float, Usage]:
        """Seconds of a worker, which gets units as Ray would hand them over and commits its parts;
        and what its engine has computed."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, bodies)
            job = JobConfig.model_validate({
                "name": "bench",
                "task": {"kind": "chat", "body": "body", "returns": "response"},
                "input": {"path": str(folder / "in")},
                "output": {"path": str(folder / "out"), "column": "answer"},
                "model": {"id": "demo", "engine": ENGINE},
            })  # fmt: skip
            plan = make_plan_of(job)
            output = Folder(job.output.path)
            log = folder / "log"
            log.touch()
            spec = worker.WorkerSpec(
                job, first_lane(job.model), plan.identity, uuid.uuid4().hex, log,
                worker.Resources(0, 2, ReplicaRange(min=1, max=1)), output,
                Watch(output, "bench"), is_retry=False,
            )  # fmt: skip
            ours = WorkerBeside(spec, self._engine)
            blocks = (
                encode_unit(unit, shard.shard.fingerprint, rows)
                for shard in plan.shards
                for unit, rows in read_units(
                    shard.shard.source, shard.shard.path, ["body"], shard.units()
                )
            )
            await self._forget()
            before = self._engine.meter.read().usage
            began = time.monotonic()

            async def hold() -> None:
                for block in blocks:
                    receipt = json.loads((await ours(block))["receipt"][0])
                    assert "error" not in receipt, receipt

            await asyncio.gather(
                *(hold() for _ in range(units_in_flight(job.model, plan, replicas=1)))
            )
            seconds = time.monotonic() - began
        after = self._engine.meter.read().usage
        return seconds, Usage(
            after.requests - before.requests,
            after.prompt_tokens - before.prompt_tokens,
            after.cached_tokens - before.cached_tokens,
            after.completion_tokens - before.completion_tokens,
        )

    async def _forget(self) -> None:
        assert await self._engine._llm.reset_prefix_cache(), "blocks are still in use"

    def token_ids(self, body: Body) -> list[int]:
        ids: list[int] = self._engine._llm.renderer.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=False
        )
        return ids

    def least_tokens(self, bodies: Sequence[Body]) -> int:
        """Tokens that must be computed by an engine that forgets nothing: each beginning of whole
        cache blocks once, what a prompt has behind these, and each answer; a request that comes
        twice, once."""
        block = ENGINE["block_size"]
        beginnings: set[tuple[int, ...]] = set()
        answers: dict[tuple[int, ...], int] = {}
        behind = 0
        for each in bodies:
            ids = tuple(self.token_ids(each))
            if ids in answers:
                continue
            answers[ids] = each["max_tokens"]
            shared = (len(ids) - 1) // block * block  # the last token is computed in any case
            beginnings.update(ids[:end] for end in range(block, shared + 1, block))
            behind += len(ids) - shared
        return block * len(beginnings) + behind + sum(answers.values())

    def close(self) -> None:
        self._engine.close()


class WorkerBeside(worker.Worker):
    """A worker whose engine is up already, in a process that is not its own."""

    def __init__(self, spec: worker.WorkerSpec, engine: Any) -> None:
        kept = worker.redirect_output, worker.guard_children, worker._start_engine
        worker.redirect_output = worker.guard_children = lambda _: None
        worker._start_engine = lambda _: engine
        try:
            super().__init__(spec)
        finally:
            worker.redirect_output, worker.guard_children, worker._start_engine = kept
