"""Ray: start it here or connect to it, see whether the replicas fit, and stream units through."""

from __future__ import annotations

import gc
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.config.running import ReplicaRange
from pipeline.engine.cores import usable_cores
from pipeline.errors import ClusterError, ModelError
from pipeline.lanes import Lane
from pipeline.plan import Plan
from pipeline.ray_settings import cluster_address
from pipeline.receipt import decode_receipt
from pipeline.records import Receipt
from pipeline.shards import UNIT_BYTES
from pipeline.signals import catch_signals
from pipeline.source import UnitSource
from pipeline.worker import Resources, Worker, WorkerSpec

# Read tasks and publishing beside the engines; engines reserve all the cores that they compute on.
PLUMBING_CPUS = 1
READER_CPUS = 0
"""None are reserved: when a machine dies, what it had read is read again, and where all that live
are full of replicas, nothing could be."""
CONNECT_TIMEOUT_S = 10
LOOK_S = 2
"""Between two looks at a cluster that is to grow."""
START_A_CLUSTER = (
    "Start a cluster with `ray start --head`, or unset `cluster.address` and RAY_ADDRESS."
)
MIN_READERS, MAX_READERS = 2, 16
"""As many as replicas, within these: one gives some 50,000 short rows/s from a disk, and while the
engines start, each more takes a core from them."""
ROWS_AHEAD, UNITS_AHEAD = 11, 2
"""Rows that a worker holds for each that its engine computes at once, a little more than are begun
(see schedule), and units beyond that: one is being read, one committed."""
MAX_UNITS_IN_FLIGHT = 256
READ_AHEAD, LEAST_READ_AHEAD = 4, 256 << 20
"""Bytes of units that are read and wait, for each that the workers hold, and at least. Unless it
has a limit, Ray Data reads until a share of all machines' memory is full: much of a job's input,
and small units are held by the driver."""
FULL_POOL = 0.99
NO_PROGRESS_TIMEOUT_S = 24 * 3600
"""Ray Data's own 30 minutes would end a job whose units are slow or whose engine is large."""


@contextmanager
def ray_cluster(job: JobConfig) -> Iterator[None]:
    """Connect to `cluster.address` or RAY_ADDRESS, else start Ray on this machine; on leaving,
    disconnect or stop it. Raises ClusterError if there is no cluster at the address."""
    address = cluster_address(job)
    if address:
        _check_reachable(address)
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=_local_cpus(job) + PLUMBING_CPUS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises it as it is when its own processes die or stay away
        raise ClusterError(
            f"Ray at {address or 'this machine'}: {' '.join(str(error).split())[:200]}",
            START_A_CLUSTER if address else "Run the same command again.",
        ) from error
    catch_signals()  # ray.init put its own handler of SIGTERM in place of ours
    try:
        yield
    finally:
        # Should the garbage collector, which may run in any thread, find one of Ray's references
        # while Ray goes down, Ray ends this process without a word.
        gc.collect()
        gc.disable()
        try:
            ray.shutdown()
        finally:
            gc.enable()


def _check_reachable(address: str) -> None:
    """Ray itself tries for many minutes to reach a head that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", "local"
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"Ray at {address}: {error.strerror or error}", START_A_CLUSTER
        ) from error


def _local_cpus(job: JobConfig) -> int:
    cores = len(usable_cores())
    return max(cores, (job.cluster.cpus_per_replica or 1) * job.cluster.range.max)


def replica_resources(job: JobConfig, lane: Lane, units: int) -> Resources:
    """What the lane's replicas reserve on the cluster that we are connected to. No more of them
    are started than there are units, and of a second lane no more than there is room for.

    Raises:
        ClusterError: there is too little room for the replicas.
        ModelError: one replica needs more than the largest machine has.
    """
    model, wanted = lane.model, job.cluster.range
    most = max(1, min(wanted.max, units))
    replicas = ReplicaRange(min=min(wanted.min, most), max=most)
    world = model.world_size
    if job.cluster.wait_s and model.backend == "vllm" and cluster_address(job):
        await_gpus(world, 1 if lane.is_second else replicas.min, job.cluster.wait_s)
    nodes = _resources_of_nodes()
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if model.backend == "vllm" and any(gpus):
        if world > max(gpus):
            raise _too_large(world, f"the largest machine has {max(gpus)} GPUs")
        room = sum(count // world for count in gpus)
        if lane.is_second:
            replicas = ReplicaRange(min=min(replicas.min, room), max=replicas.max)
        if replicas.min > room:
            raise ClusterError(
                f"cluster.replicas: {replicas.min} replicas of {world} GPUs do not fit; "
                f"there is room for {room}",
                "Lower `cluster.replicas`; or, where the cluster grows by itself, let it have the "
                "time with `cluster.wait_s`.",
            )
        return Resources(world, 1, replicas, max(replicas.min, min(replicas.max, room)))
    cores = max((math.floor(node.get("CPU", 0)) for node in nodes), default=0)
    cpus = job.cluster.cpus_per_replica
    if cpus and cpus > cores:
        raise ClusterError(
            f"cluster.cpus_per_replica: is {cpus}, but the largest machine has {cores} CPUs",
            "Lower it.",
        )
    if model.backend != "vllm":
        return Resources(0, cpus or 1, replicas, replicas.min)
    largest = min(cores, len(usable_cores())) if len(nodes) == 1 else cores
    if world > largest:
        raise _too_large(world, f"this machine has no GPU and {largest} cores")
    share = largest // math.ceil(replicas.max / max(1, len(nodes)))
    return Resources(0, cpus or max(world, share), replicas, replicas.min)


def await_gpus(world: int, replicas: int, wait_s: float) -> None:
    """Have the cluster grow until so many replicas of `world` GPUs fit, each on one machine; wait
    for that, `wait_s` at most."""
    from ray.autoscaler.sdk import request_resources

    def room() -> int:
        return sum(int(node.get("GPU", 0)) // world for node in _resources_of_nodes())

    deadline, waiting = time.monotonic() + wait_s, threading.Event()
    try:
        while room() < replicas and time.monotonic() < deadline:
            # Again and again: there is one wish for the whole cluster, and once Ray Data has run
            # on it, a coordinator of its own forgets ours every 20 s.
            request_resources(bundles=[{"GPU": world}] * replicas)
            waiting.wait(LOOK_S)
    finally:
        request_resources(bundles=[])  # a standing wish would keep machines that are idle


def machines() -> set[str]:
    """The names of those that are in the cluster now. Raises ClusterError."""
    try:
        return {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"Ray gave up: {type(error).__name__}: {_last_line(error)}",
            "The same command goes on where this run stopped.",
        ) from error


def _resources_of_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _too_large(world: int, limit: str) -> ModelError:
    return ModelError(
        f"model.engine: tensor_parallel_size x pipeline_parallel_size is {world}, but {limit}",
        "Lower tensor_parallel_size, or run on a machine with more.",
    )


class ForgetBlocks(ExecutionCallback):  # type: ignore[misc]  # ray is untyped here
    """Ray Data keeps figures of every block until a job ends, 2 KB for each unit: a gigabyte for
    a hundred million rows. Nothing of ours reads them."""

    def on_execution_step(self, executor: Any) -> None:
        for operator in executor._topology:
            getattr(operator, "_output_blocks_stats", []).clear()


def receipts(plan: Plan, columns: list[str], spec: WorkerSpec) -> Iterator[Receipt]:
    """Run the plan's pending units through worker actors; yield a receipt per committed unit. Ends
    early once the workers have been told to begin no more.

    Raises:
        AxbatchError: what a worker or a reader raised; a ClusterError if Ray itself gave up.
    """
    share = spec.share
    replicas = share.replicas
    in_flight = units_in_flight(spec.lane.model, plan, replicas.max)
    context = DataContext.get_current()
    # A block is cut as soon as it exceeds this: every unit is its own block, and so its own task.
    context.target_max_block_size = 1
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # else each unit in flight has a thread for that
    context.custom_execution_callback_classes = [ForgetBlocks]
    held = READ_AHEAD * replicas.max * in_flight * UNIT_BYTES
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=max(LEAST_READ_AHEAD, held)
    )
    # Ray grows a pool when more tasks wait than it holds; ours are never queued beyond what a
    # worker does at once, so a full pool is what calls for another replica.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = FULL_POOL
    # And one that waits for readers is not to be sent home: the next would load the model again.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.0
    source = UnitSource(plan, columns, spec.watch)
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=source.task_count,
        num_cpus=READER_CPUS,
        concurrency=min(MAX_READERS, max(MIN_READERS, replicas.max)),
    ).map_batches(
        Worker,
        fn_constructor_args=[spec],
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=share.cpus,
        num_gpus=share.gpus or None,
        compute=ActorPoolStrategy(
            min_size=replicas.min,
            max_size=replicas.max,
            initial_size=share.at_first,
            max_tasks_in_flight_per_actor=in_flight,
        ),
        max_concurrency=in_flight,
    )
    try:
        # Else Ray Data holds each receipt back until it has the next.
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for batch in batches:
            for text in batch["receipt"].to_pylist():
                if receipt := decode_receipt(text):
                    yield receipt
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise ClusterError(
            f"Ray gave up: {type(error).__name__}: {_last_line(error)}",
            f"The log says more: {spec.log}. The same command goes on where this run stopped.",
        ) from error


def units_in_flight(model: ModelConfig, plan: Plan, replicas: int) -> int:
    """Units of the plan that a worker holds at once."""
    units = plan.pending_units
    rows_per_unit = plan.pending_rows / max(1, units)
    return units_to_hold(units, rows_per_unit, model.max_num_seqs, replicas)


def units_to_hold(units: int, rows_per_unit: float, max_num_seqs: int, replicas: int) -> int:
    """So many that enough can be begun. No more than a replica's share, else the first one that is
    up would take all of a small job."""
    wanted = math.ceil(ROWS_AHEAD * max_num_seqs / max(1.0, rows_per_unit)) + UNITS_AHEAD
    return max(1, min(MAX_UNITS_IN_FLIGHT, wanted, math.ceil(units / replicas)))


def _last_line(error: BaseException) -> str:
    """Ray's messages carry a remote traceback; its last line is the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
