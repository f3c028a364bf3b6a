"""Many hosts: one process on each, all running the same program."""

import jax
import numpy as np
from jax.experimental import multihost_utils

MESSAGE = 1024  # bytes of a message that one process sends to all


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 120,
) -> None:
    """Join the other processes, before anything else is done with JAX.

    On TPU pods, under SLURM and under Open MPI's mpirun nothing need be said; elsewhere all three arguments.

    Args:
        coordinator: host:port of process 0, which every process can reach.
        processes: how many there are.
        process_id: which one this is, from 0.
        timeout: seconds to wait for the others, now, and later before one that gives no sign of life counts as dead, and
            the rest ends.

    Raises:
        ValueError: some of the three arguments, but not all.
        RuntimeError: the others did not come in time. JAX may instead end the process, with the same reason in its log.
    """
    given = [argument is not None for argument in (coordinator, processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            "coordinator, processes and process_id must be given together, or none of them where the cluster tells; got "
            f"{coordinator!r}, {processes}, {process_id}."
        )
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
    )


def tell_all(message: str | None) -> str | None:
    """What process 0 says, on every process."""
    if jax.process_count() == 1:
        return message
    sent = np.zeros(MESSAGE, np.uint8)
    encoded = (message or "").encode()[:MESSAGE]
    sent[: len(encoded)] = list(encoded)
    received = (
        bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent)))
        .rstrip(b"\0")
        .decode(errors="ignore")
    )
    return received or None
