"""The first contact between the processes of a run, before JAX connects them.

JAX ends a process by a signal or with a C++ stack if the port of the coordinator is in use or a
process never comes, and does not notice that the processes were started with different numbers of
processes. So process 0 first listens at the port itself. Every other process sends its index and
the number of processes, and process 0 answers when all have come, or when something is wrong.

Process 0 listens at the coordinator's address only, as far as it is known which one that is.
"""

import contextlib
import errno
import ipaddress
import json
import os
import socket
import time
from typing import Any

CONNECT_SECONDS = 5.0
HELLO_SECONDS = 1.0  # for the first line of a connection: port scanners send none
ANSWER_SECONDS = 10.0  # added to the timeout: process 0 may have started later
RETRY_SECONDS = 0.2
LONGEST_LINE = 2000  # bytes
SHOWN_PROCESSES = 10
BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's, for a coordinator behind another address
# Errors of an address that this machine does not have: none, no such family, no scope.
NOT_LOCAL = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)


class DistributedError(RuntimeError):
    """The processes of a run cannot be connected; the message says why."""


def meet(coordinator: str, processes: int, process_id: int, timeout: float) -> str | None:
    """Waits until all processes have come. The port is free afterwards.

    Process 0 listens at JAX_COORDINATOR_BIND_ADDRESS if that is set, and otherwise at the address
    of the coordinator. It listens at all addresses if this machine does not have that one, or if
    its name resolves to a loopback address, such as 127.0.1.1 on Debian, where no other machine can
    reach it.

    Args:
        coordinator: Address host:port of process 0.
        processes: Number of processes.
        process_id: Index of this process, from 0.
        timeout: Seconds to wait.

    Returns:
        Address host:port at which process 0 listened, and JAX should; None in other processes.

    Raises:
        ValueError: If the address is not host:port, or the index is not below the number.
        DistributedError: If the port is in use, a process does not come in time, or processes were
            started with different numbers or the same index.
    """
    host, port = _split(coordinator)
    if not 0 <= process_id < processes:
        raise ValueError(
            f"process_id must be from 0 to processes - 1, which is {processes - 1}; "
            f"got {process_id}."
        )
    if process_id:
        _join(host, port, processes, process_id, timeout)
        return None
    bind_address = os.environ.get(BIND_VARIABLE)
    try:
        if bind_address:
            server = _listen_at(*_split(bind_address, BIND_VARIABLE))
        else:
            server = _listen(host, port)
    except OSError as error:
        place = f"{bind_address}, which is {BIND_VARIABLE}" if bind_address else f"port {port}"
        is_of_name = isinstance(error, socket.gaierror)
        reason = error.strerror if is_of_name else os.strerror(error.errno or 0)
        raise DistributedError(
            f"process 0 must be able to listen at {place} of this machine, for coordinator "
            f"{coordinator}; got: {reason}. Stop the program that uses the "
            "port, or choose another port for all processes."
        ) from error
    own_host, own_port = server.getsockname()[:2]
    with server:
        _gather(server, coordinator, processes, timeout)
    return f"[{own_host}]:{own_port}" if ":" in own_host else f"{own_host}:{own_port}"


def _split(address: str, name: str = "coordinator") -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not (port.isdecimal() and port.isascii()) or not 0 < int(port) < 65536:
        raise ValueError(f"{name} must be host:port, such as 10.0.0.1:1234; got {address!r}.")
    return host.strip("[]"), int(port)


def _listen(host: str, port: int) -> socket.socket:
    """Listens at the address of a host, or at all addresses if this machine cannot tell which."""
    try:
        server = _listen_at(host, port)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno in NOT_LOCAL:
            return _listen_everywhere(port)
        raise
    own_address = ipaddress.ip_address(server.getsockname()[0].partition("%")[0])
    if own_address.is_loopback and host != "localhost" and not _is_address(host):
        server.close()
        return _listen_everywhere(port)
    return server


def _listen_at(host: str, port: int) -> socket.socket:
    """Listens at the first address of a host that this machine has."""
    if host == "::":
        return _listen_everywhere(port)
    problem: OSError | None = None
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            return socket.create_server(address, family=family)
        except OSError as error:
            problem = error
            if error.errno not in NOT_LOCAL:
                break
    raise problem or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _listen_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port))


def _gather(server: socket.socket, coordinator: str, processes: int, timeout: float) -> None:
    """Waits for the other processes, and answers all of them."""
    deadline = time.monotonic() + timeout
    connections: dict[int, socket.socket] = {}
    peers: list[socket.socket] = []  # all that came, also those whose index another one has
    problem = ""
    with contextlib.ExitStack() as stack:
        while not problem and len(connections) < processes - 1:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                problem = _missing(connections, coordinator, processes, timeout)
                break
            server.settimeout(remaining)
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            stack.enter_context(connection)
            hello = _receive(connection, min(remaining, HELLO_SECONDS))
            process, own_count = hello.get("process"), hello.get("processes")
            if type(process) is not int or type(own_count) is not int or process < 1:
                connection.close()  # not one of ours, or slow: then it tries again
                continue
            problem = _conflict(process, own_count, processes, connections)
            connections[process] = connection
            peers.append(connection)
            # A process that ended meanwhile may have been started again.
            connections = {i: peer for i, peer in connections.items() if not _has_ended(peer)}
        for connection in peers:
            with contextlib.suppress(OSError):
                _send(connection, {"problem": problem})
    if problem:
        raise DistributedError(problem)


def _conflict(
    process: int, own_count: int, processes: int, connections: dict[int, socket.socket]
) -> str:
    """Returns what is wrong with a process that has come, if anything."""
    if own_count != processes:
        return (
            "all processes must be started with the same number of processes; process 0 was "
            f"started with {processes}, process {process} with {own_count}."
        )
    if process >= processes:
        return f"the index of a process must be below {processes}; one was started as {process}."
    if process in connections and not _has_ended(connections[process]):
        return f"each process must have its own index; two were started as process {process}."
    return ""


def _missing(
    connections: dict[int, socket.socket], coordinator: str, processes: int, timeout: float
) -> str:
    missing = [str(i) for i in range(1, processes) if i not in connections]
    names = ", ".join(missing[:SHOWN_PROCESSES]) + (", …" if missing[SHOWN_PROCESSES:] else "")
    return (
        f"all {processes} processes must connect to {coordinator} before the deadline, {timeout:g} "
        f"s; missing: process {names}. Start each process with the same coordinator and number of "
        "processes, or set a longer timeout."
    )


def _join(host: str, port: int, processes: int, process_id: int, timeout: float) -> None:
    """Tells process 0 that this one is there, and waits for the answer."""
    deadline = time.monotonic() + timeout
    reason = ""
    while (remaining := deadline - time.monotonic()) > 0:
        answer: dict[str, Any] = {}
        try:
            with socket.create_connection((host, port), min(remaining, CONNECT_SECONDS)) as peer:
                _send(peer, {"process": process_id, "processes": processes})
                answer = _receive(peer, timeout + ANSWER_SECONDS)
            reason = "what answers there is not process 0"
        except OSError as error:
            reason = error.strerror or str(error)
        problem = answer.get("problem")
        if problem:
            raise DistributedError(str(problem))
        if problem is not None:
            return
        time.sleep(RETRY_SECONDS)
    raise DistributedError(
        f"process 0 must answer at {host}:{port} before the deadline, {timeout:g} s; got: "
        f"{reason}. Start process 0 there, or set a longer timeout."
    )


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """Returns the message of a connection; an empty one if none comes in time."""
    deadline = time.monotonic() + seconds
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < LONGEST_LINE:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = connection.recv(LONGEST_LINE - len(line))
            if not part:
                break
            line += part
        message = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _has_ended(connection: socket.socket) -> bool:
    """Whether the process at the other end has closed the connection, or is dead."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
