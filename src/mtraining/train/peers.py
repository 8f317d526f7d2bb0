"""Whether the process of another rank is gone, told by its machine's kernel and not guessed from its silence.

A process that is stopped, swapped out, compiling or waiting for a disk says nothing either, so silence proves nothing.
Two things do. On the same machine, the process table: a process is known by its number and the time it started. On any
machine, a connection: the kernel breaks it when the process ends, and then refuses to open it again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 3.0
RETRY_SECONDS = 30.0  # between attempts to reach a machine that does not answer
_TOKEN_BYTES = 16
_EXITING = 0x4  # PF_EXITING in the flags of /proc/PID/stat
_KILL_PENDING = 1 << 8  # SIGKILL, number 9, in the masks of /proc/PID/status


@dataclass(frozen=True)
class OsProcess:
    """A process of this machine. The start time tells it from a later process with the same number.

    start: clock ticks between the machine's start and the process's; 0 where the system has no /proc.
    """

    pid: int
    start: int

    @classmethod
    def here(cls) -> OsProcess:
        """This process."""
        try:
            return cls(os.getpid(), int(_stat(os.getpid())[19]))
        except OSError:
            return cls(os.getpid(), 0)

    def gone(self) -> bool:
        """True when it has ended, or has been killed and cannot act on it yet (it waits for a disk)."""
        try:
            if self.start == 0:
                os.kill(self.pid, 0)
                return False
            fields = _stat(self.pid)
            status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:  # not ours to see
            return False
        if fields[0] in "ZX" or int(fields[19]) != self.start or int(fields[6]) & _EXITING:
            return True
        masks = [line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
        return any(int(mask, 16) & _KILL_PENDING for mask in masks)


def children(parent: int) -> list[OsProcess]:
    """The processes that `parent` started and that have not been waited for, ended ones included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = _stat(int(folder.name))
            if int(fields[1]) == parent:
                found.append(OsProcess(int(folder.name), int(fields[19])))
    return sorted(found, key=lambda process: process.start)


def started_at(pid: int) -> float:
    """When a process of this machine started, in seconds of `time.time`; now, where the system has no /proc."""
    try:
        ticks = int(_stat(pid)[19])
    except OSError:
        return time.time()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - max(0.0, age)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on; the second may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def this_machine() -> str:
    """Equal for two processes if and only if they see the same process table."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True)
class Identity:
    """What a rank publishes of itself. `port` is 0 when the rank has no listening socket."""

    machine: str
    process: OsProcess
    address: str = ""
    port: int = 0
    token: str = ""


class Door:
    """The listening socket of a rank, to which other ranks hold connections. It closes when the process ends.

    Each visitor is sent a token, so that no other program that happens to listen on the port is taken for the rank.
    """

    def __init__(self) -> None:
        self._visitors: list[socket.socket] = []
        self._closed = threading.Event()
        self.identity = Identity(this_machine(), OsProcess.here())
        self._socket: socket.socket | None = None
        try:
            self._socket = _listen()
        except (KeyError, OSError):
            return
        token = secrets.token_hex(_TOKEN_BYTES)
        address, port = self._socket.getsockname()[:2]
        self.identity = Identity(this_machine(), OsProcess.here(), address, port, token)
        welcome = threading.Thread(
            target=self._welcome, args=(self._socket, token.encode()), name="door", daemon=True
        )
        welcome.start()

    def _welcome(self, listener: socket.socket, token: bytes) -> None:
        while not self._closed.is_set():
            try:
                visitor, _ = listener.accept()
                self._visitors.append(visitor)  # kept open
                visitor.sendall(token)
            except OSError:  # out of file handles, a visitor that left at once, or `close`
                self._closed.wait(1.0)

    def close(self) -> None:
        """Give the sockets back, at the end of a run that its process outlives."""
        self._closed.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in `accept`
            self._socket.close()
        for visitor in self._visitors:
            visitor.close()


def _listen() -> socket.socket:
    """A socket on the address by which this machine reaches the launcher's store; KeyError without a launcher."""
    store = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with socket.create_connection(store, CONNECT_SECONDS) as route:
        family, address = route.family, route.getsockname()[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen()
    return listener


class Line:
    """A connection to the `Door` of another rank, to be polled by one thread."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._socket: socket.socket | None = None
        self._heard = b""
        self._known = False  # the rank itself has answered once
        self._next = 0.0
        self.problem: str | None = None  # why there is no connection

    def gone(self) -> bool:
        """True when the connection broke and the rank's machine refuses a new one. May wait for `CONNECT_SECONDS`."""
        if self._identity.port == 0:
            self.problem = "it has no address of its own"
            return False
        if self._socket is not None:
            if not self._broken(self._socket):
                return False
        elif time.monotonic() < self._next:
            return False
        return self._connect()

    def _broken(self, connection: socket.socket) -> bool:
        try:
            data = connection.recv(64)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self._heard += data
            self._known = self._known or self._heard == self._identity.token.encode()
            return False
        connection.close()
        self._socket = None
        return True

    def _connect(self) -> bool:
        self._heard, self._next = b"", time.monotonic() + RETRY_SECONDS
        try:
            place = self._identity.address, self._identity.port
            self._socket = socket.create_connection(place, CONNECT_SECONDS)
        except ConnectionRefusedError as error:
            self.problem = str(error)
            return self._known
        except OSError as error:  # the machine is gone, or the network: silence decides
            self.problem = str(error)
            return False
        self.problem = None
        self._socket.setblocking(False)
        # Firewalls forget connections over which nothing travels.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        return False

    def close(self) -> None:
        """Give the connection back."""
        if self._socket is not None:
            self._socket.close()


def refused(host: str, port: int) -> bool:
    """True when the machine answers and nobody listens there any more."""
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
