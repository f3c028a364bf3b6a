"""Training on several hosts: one process on each, all running the same program."""

import jax
import numpy as np
from jax.experimental import multihost_utils

MESSAGE_BYTES = 1024  # a broadcast array needs one size on all processes


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 120,
) -> None:
    """Connects this process to the others. It must be called before any other use of JAX.

    On TPU pods, under SLURM and under Open MPI's mpirun no arguments are needed; elsewhere the
    first three are.

    Args:
        coordinator: Address host:port of process 0, which every process can reach.
        processes: Number of processes.
        process_id: Index of this process, from 0.
        timeout: Seconds to wait for the others to connect. It is also the number of seconds without
            a heartbeat after which a process counts as dead and the others exit.

    Raises:
        ValueError: If only some of the three arguments are passed.
        RuntimeError: If the others do not connect in time. JAX may instead end the process and log
            the same reason.
    """
    passed = [argument is not None for argument in (coordinator, processes, process_id)]
    if any(passed) and not all(passed):
        raise ValueError(
            "coordinator, processes and process_id must be passed together, or not at all if the "
            f"cluster provides them; got {coordinator!r}, {processes}, {process_id}."
        )
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
    )


def broadcast_message(message: str | None) -> str | None:
    """Returns the message of process 0 on every process; None stays None."""
    if jax.process_count() == 1:
        return message
    buffer = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = (message or "").encode()[:MESSAGE_BYTES]
    buffer[: len(encoded)] = list(encoded)
    received = bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer)))
    return received.rstrip(b"\0").decode(errors="ignore") or None
