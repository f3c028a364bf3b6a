"""Training on several hosts: one process on each, all running the same program."""

import operator
from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nonlocal_jax import checks
from nonlocal_jax.training.rendezvous import meet

Result = TypeVar("Result")

MESSAGE_BYTES = 1024  # a broadcast array needs one size on all processes


def initialize(
    coordinator: str | None = None,
    processes: SupportsIndex | None = None,
    process_id: SupportsIndex | None = None,
    *,
    timeout: int = 120,
) -> None:
    """Connects this process to the others. It must be called before any other use of JAX.

    On TPU pods, under SLURM and under Open MPI's mpirun no arguments are needed; elsewhere the
    first three are.

    Args:
        coordinator: Address host:port of process 0, which every process can reach. If process 0 is
            reached through another address than its own, JAX's environment variable
            JAX_COORDINATOR_BIND_ADDRESS says where it listens.
        processes: Number of processes.
        process_id: Index of this process, from 0.
        timeout: Seconds to wait for the others to connect. It is also the number of seconds without
            a heartbeat after which a process counts as dead and the others exit.

    Raises:
        ValueError: If only some of the three arguments are passed, or they are out of range.
        DistributedError: If the port of the coordinator is in use, a process does not come in time,
            or processes were started with different arguments. Where the cluster provides the
            arguments, JAX ends the process instead and logs the reason.
    """
    checks.at_least("timeout", timeout, 1)
    passed = [argument is not None for argument in (coordinator, processes, process_id)]
    if any(passed) and not all(passed):
        raise ValueError(
            "coordinator, processes and process_id must be passed together, or not at all if the "
            f"cluster provides them; got {coordinator!r}, {processes}, {process_id}."
        )
    # JAX and JSON take no integers of NumPy.
    count = None if processes is None else operator.index(processes)
    own_id = None if process_id is None else operator.index(process_id)
    bind_address: str | None = None
    if coordinator is not None and count is not None and own_id is not None:
        bind_address = meet(coordinator, count, own_id, float(timeout))
    jax.distributed.initialize(
        coordinator,
        count,
        own_id,
        coordinator_bind_address=bind_address,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
    )


def broadcast_message(message: str | None, source: int = 0) -> str | None:
    """Returns the message of one process on every process; None stays None."""
    if jax.process_count() == 1:
        return message
    buffer = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = (message or "").encode()[:MESSAGE_BYTES]
    buffer[: len(encoded)] = list(encoded)
    is_source = jax.process_index() == source
    received = bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer, is_source)))
    return received.rstrip(b"\0").decode(errors="ignore") or None


def on_every_process(read: Callable[[], Result], *error_types: type[Exception]) -> Result:
    """Calls a function that may fail on one process only, and then raises on all.

    Processes read different parts of a file. Those that can would wait for the others forever.

    Args:
        read: Function without arguments.
        *error_types: Errors that `read` raises, whose constructors take a message. If processes
            raise several of them, all raise the one that is listed last.
    """
    result: Any = None
    own_error: Exception | None = None
    try:
        result = read()
    except error_types as error:
        own_error = error
    if jax.process_count() > 1:
        own_kind = 0 if own_error is None else 1 + error_types.index(type(own_error))
        gathered = multihost_utils.process_allgather(np.array([own_kind]))
        kinds = np.asarray(gathered).ravel()
        if kinds.any():
            source = int(kinds.argmax())
            message = broadcast_message(str(own_error), source)
            if own_kind != kinds[source]:
                own_error = error_types[kinds[source] - 1](f"process {source}: {message}")
    if own_error is not None:
        raise own_error
    return result
