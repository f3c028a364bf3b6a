"""The first contact of processes: all come, or every one gets the reason in one line."""

import contextlib
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest

from nonlocal_jax import training
from nonlocal_jax.training import DistributedError, rendezvous


@pytest.fixture
def address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return f"127.0.0.1:{port}"


def start(address, arguments, timeout=60.0):
    """Starts a thread for each (processes, process_id); returns them and what they will raise."""
    raised = [None] * len(arguments)

    def meet(number, processes, process_id):
        try:
            rendezvous.meet(address, processes, process_id, timeout)
        except DistributedError as error:
            raised[number] = str(error)

    threads = [
        threading.Thread(target=meet, args=(number, *argument))
        for number, argument in enumerate(arguments)
    ]
    for thread in threads:
        thread.start()
    return threads, raised


def meet_all(address, arguments, timeout=60.0):
    threads, raised = start(address, arguments, timeout)
    for thread in threads:
        thread.join()
    return raised


def connect(address, content):
    """Connects as another program would; retries until process 0 listens."""
    host, port = address.split(":")
    while True:
        try:
            connection = socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            connection.sendall(content)
            return connection


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_all_come_and_the_port_is_free_again(processes, address):
    arguments = [(processes, i) for i in reversed(range(processes))]
    for _ in range(2):
        assert meet_all(address, arguments) == [None] * processes


@pytest.mark.parametrize(("own", "other"), [(2, 3), (3, 2), (7, 2)])
def test_different_numbers_of_processes(own, other, address):
    first, second = meet_all(address, [(own, 0), (other, 1)])
    assert first == second
    assert f"process 0 was started with {own}, process 1 with {other}." in first


def test_the_same_index_twice(address):
    raised = meet_all(address, [(3, 0), (3, 1), (3, 1)])
    assert len(set(raised)) == 1
    assert "two were started as process 1." in raised[0]


def test_a_process_that_never_comes(address):
    raised = meet_all(address, [(4, 0), (4, 2)], timeout=1.0)
    assert raised[0] == raised[1]
    message = f"all 4 processes must connect to {address} before the deadline, 1 s; missing: "
    assert raised[0].startswith(f"{message}process 1, 3. ")


def test_process_0_that_never_comes(address):
    (raised,) = meet_all(address, [(2, 1)], timeout=0.5)
    assert f"process 0 must answer at {address} before the deadline, 0.5 s; got: " in raised
    assert "refused" in raised


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_port_in_use(host, address):
    port = int(address.split(":")[1])
    with socket.create_server((host, port)):
        (raised,) = meet_all(address, [(2, 0)])
    assert f"process 0 must be able to listen at port {port} of this machine" in raised
    assert "got: Address already in use. Stop the program that uses the port" in raised


@pytest.mark.parametrize("content", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\n", b"[" * 5000])
def test_other_programs_are_ignored(content, address):
    threads, raised = start(address, [(2, 0)])
    with connect(address, content):
        assert meet_all(address, [(2, 1)]) == [None]
    threads[0].join()
    assert raised == [None]


@pytest.mark.parametrize("delay", [None, 0.1], ids=["silent", "slow"])
def test_other_programs_that_never_finish_a_line(delay, address):
    """They neither keep process 0 from the others nor use up its time."""
    threads, raised = start(address, [(2, 0)])
    strangers = [connect(address, b"{") for _ in range(3)]
    stop = threading.Event()

    def send_slowly():
        while not stop.wait(delay):
            for stranger in strangers:
                with contextlib.suppress(OSError):
                    stranger.send(b" ")

    if delay is not None:
        sender = threading.Thread(target=send_slowly)
        sender.start()
    assert meet_all(address, [(2, 1)]) == [None]
    threads[0].join()
    assert raised == [None]
    stop.set()
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("index", [-1, 0, True, 1.0, "1"])
def test_an_index_that_is_none(index, address):
    threads, raised = start(address, [(2, 0)], timeout=1.0)
    hello = json.dumps({"process": index, "processes": 2}).encode() + b"\n"
    with connect(address, hello):
        threads[0].join()
    assert "missing: process 1" in raised[0]


def test_an_index_that_is_too_large(address):
    threads, raised = start(address, [(2, 0)])
    with connect(address, json.dumps({"process": 9, "processes": 2}).encode() + b"\n"):
        threads[0].join()
    assert "must be below 2; one was started as 9" in raised[0]


def test_an_answer_of_another_program(address):
    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))) as server:

        def answer():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        (raised,) = meet_all(address, [(2, 1)], timeout=0.15)
        thread.join()
    assert "got: what answers there is not process 0. Start process 0 there" in raised


def test_a_process_that_is_started_again(address):
    threads, raised = start(address, [(3, 0)])
    hello = json.dumps({"process": 1, "processes": 3}).encode() + b"\n"
    connect(address, hello).close()
    assert meet_all(address, [(3, 1), (3, 2)]) == [None, None]
    threads[0].join()
    assert raised == [None]


@pytest.mark.parametrize(
    "coordinator", ["localhost", ":1234", "localhost:", "a:b", "a:0", "a:70000"]
)
def test_an_address_that_is_none(coordinator):
    with pytest.raises(ValueError, match=r"coordinator must be host:port, such as 10.0.0.1:1234"):
        training.initialize(coordinator, 2, 0)


@pytest.mark.parametrize(("processes", "process_id"), [(2, 2), (2, -1), (1, 1), (0, 0)])
def test_an_index_that_is_not_below_the_number(processes, process_id):
    with pytest.raises(ValueError, match=rf"process_id must be from 0 to .*; got {process_id}"):
        training.initialize("localhost:1234", processes, process_id)


class TestWhereProcess0Listens:
    """JAX gets the address, too."""

    @pytest.fixture
    def initialize(self, monkeypatch):
        """Initialises one process of one; returns what JAX gets in place of opening the port."""

        def call(coordinator, bind_address=None, hosts=None):
            calls = []
            with monkeypatch.context() as patch:
                patch.setattr(jax.distributed, "initialize", lambda *a, **b: calls.append((a, b)))
                if bind_address is not None:
                    patch.setenv("JAX_COORDINATOR_BIND_ADDRESS", bind_address)
                if hosts is not None:
                    original = socket.getaddrinfo
                    resolve = lambda host, *a, **b: original(hosts[host], *a, **b)  # noqa: E731
                    patch.setattr(socket, "getaddrinfo", resolve)
                training.initialize(coordinator, np.int64(1), np.int32(0))
            ((arguments, options),) = calls
            assert arguments == (coordinator, 1, 0)
            assert [type(number) for number in arguments[1:]] == [int, int]
            return options["coordinator_bind_address"]

        return call

    @pytest.fixture
    def port(self, address):
        return int(address.split(":")[1])

    @pytest.fixture
    def everywhere(self, port):
        host = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
        return f"{host}:{port}"

    def test_at_the_address_of_the_coordinator(self, initialize, port):
        """The port may be in use at other addresses of this machine."""
        with socket.create_server(("127.0.0.2", port)):
            assert initialize(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
        assert initialize(f"127.0.0.2:{port}") == f"127.0.0.2:{port}"

    def test_localhost(self, initialize, port):
        assert initialize(f"localhost:{port}") in (f"127.0.0.1:{port}", f"[::1]:{port}")

    def test_everywhere_if_this_machine_does_not_have_the_address(
        self, initialize, port, everywhere
    ):
        assert initialize(f"192.0.2.1:{port}") == everywhere  # an address for documentation
        assert initialize(f"[2001:db8::1]:{port}") == everywhere

    @pytest.mark.parametrize("own", ["127.0.1.1", "192.0.2.1", "no such host"])
    def test_everywhere_if_a_name_does_not_tell(self, own, initialize, port, everywhere):
        assert initialize(f"node0:{port}", hosts={"node0": own}) == everywhere

    def test_at_the_address_of_the_variable(self, initialize, port, everywhere):
        with socket.create_server(("127.0.0.2", port)):
            bound = initialize(f"node0:{port + 1}", bind_address=f"127.0.0.1:{port}")
            assert bound == f"127.0.0.1:{port}"
        if socket.has_dualstack_ipv6():
            assert initialize("node0:1", bind_address=f"[::]:{port}") == everywhere
        assert initialize("node0:1", bind_address=f"0.0.0.0:{port}") == f"0.0.0.0:{port}"

    def test_a_variable_that_is_no_address_of_this_machine(self, initialize, port):
        message = rf"listen at 192.0.2.1:{port}, which is JAX_COORDINATOR_BIND_ADDRESS.*; got: "
        with pytest.raises(DistributedError, match=message + "Cannot assign requested address"):
            initialize("node0:1", bind_address=f"192.0.2.1:{port}")
        with pytest.raises(ValueError, match=r"JAX_COORDINATOR_BIND_ADDRESS must be host:port"):
            initialize("node0:1", bind_address="192.0.2.1")


def test_a_timeout_of_nothing():
    with pytest.raises(ValueError, match="timeout must be at least 1; got 0"):
        training.initialize("localhost:1234", 2, 0, timeout=0)
