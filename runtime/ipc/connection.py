"""The socket of one web process to the engine, and the thread that owns it.

Where a new engine follows one that ended, groups without a token yet are submitted to it again, in their order, unless a
`Front` has another engine for them; all others end. Knows ZeroMQ, the protocol, which thread reads which sequence, and when the engine is dead. Knows no HTTP, text or
torch, and starts no engine: whether one follows it is told.
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import zmq
import zmq.utils.monitor

from pagegraph.runtime.ipc.protocol import (
    MAX_FRAME_BYTES,
    Abort,
    Admitted,
    CacheChanged,
    EngineInfo,
    Failed,
    Hello,
    ListRecent,
    Quotas,
    Recent,
    SubmitGroup,
    Timeline,
    ToClient,
    TokenDelta,
    Tokens,
    WatchCache,
    decode_to_client,
    decode_to_engine,
    encode,
)
from pagegraph.runtime.ipc.routing import NOWHERE, Route

_log = logging.getLogger(__name__)
_RETRY_S = 0.1  # between tries to reach an engine that is not there
_RECONNECT_MS = 200  # ZeroMQ's own tries slow down to one each so many
# Engines that a group may be lost with before it is given up: one whose prompt ends every engine must not end them all.
_MOST_LOST = 1
_GIVEN_UP = "the engine ended twice while it had this request, which is not tried again: it may be what ends it"

Comeback = Callable[[], float | None]  # seconds until a new engine is expected; None: none follows


class EngineDead(Exception):
    """The engine went away, is silent, or said that it died. `retry_after_s` None: no other follows."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class RequestFailed(Exception):
    """One sequence cannot run: `index` in its group, HTTP `status`, a message for the user, the field at fault, of 429 and
    503 when to ask again, and what is left of the limits of the key."""

    def __init__(
        self,
        index: int,
        status: int,
        message: str,
        field: str = "",
        retry_after_s: float = 1.0,
        quotas: Quotas | None = None,
    ) -> None:
        super().__init__(message)
        self.quotas = quotas
        self.field = field
        self.index = index
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s

    def renamed(self, message: str, field: str) -> RequestFailed:
        """The same in other words."""
        return RequestFailed(self.index, self.status, message, field, self.retry_after_s, self.quotas)


Item = Admitted | TokenDelta | Failed | EngineDead
Inbox = queue.SimpleQueue[tuple[int, Item]]  # (index of the sequence in its group, what came for it)


@dataclass(slots=True, eq=False)
class OpenGroup:
    """A submitted group, and what a new engine would be sent. `num_open`: of its sequences, those that have not ended.

    `home` is the connection that has it now; `moving` is held where it is changed, and to tell that engine of aborts.
    """

    inbox: Inbox
    frame: bytes
    request_ids: list[str]
    route: Route
    home: Connection
    num_open: int
    admitted: bool = False
    begun: bool = False  # a token came
    sent: bool = False  # or would have been, had an engine been there
    lost: int = 0  # engines that ended while they had it
    full: set[int] = field(default_factory=set)  # numbers of engines whose queue had no room for it
    moving: threading.Lock = field(default_factory=threading.Lock)

    def abort(self, message: Abort) -> None:
        """Tell the engine that has it of a sequence that nobody reads any more; nothing more comes for it."""
        with self.moving:
            self.home.abort(message)


class Front(Protocol):
    """Who has several engines to choose from. Called in the connection's thread."""

    def learn(self, told: CacheChanged) -> None:
        """What this connection's engine tells of its prefix cache; `cleared` without more where it went away."""
        ...

    def move(self, group: OpenGroup, is_full: bool = False) -> bool:
        """Give a group of this connection to that of another engine, if there is one. is_full: this engine's queue is."""
        ...


class Connection:
    """One DEALER socket and the thread that owns it. Other threads only touch the queue and the maps."""

    def __init__(
        self,
        address: str,
        heartbeat_s: float,
        silence_s: float,
        comeback: Comeback,
        is_started: Callable[[], bool],
        on_timeline: Callable[[Timeline], None],
        front: Front | None,
    ) -> None:
        self._address = address
        self._front = front
        self._comeback = comeback
        self._is_started = is_started
        self._on_timeline = on_timeline
        self._heartbeat_s = heartbeat_s
        self._silence_s = silence_s
        self._name = uuid.uuid4().hex
        self._count = itertools.count()
        self._outbox: queue.SimpleQueue[OpenGroup | bytes] = queue.SimpleQueue()  # groups, and frames of aborts
        self._owed: list[bytes] = []  # aborts that no engine was there to take
        self._streams: dict[str, tuple[int, OpenGroup]] = {}  # in the order that they were submitted
        self._changed = threading.Condition()  # guards _streams, _info and _recent
        self._info: EngineInfo | None = None
        self._recent: dict[str, Recent] = {}  # what was told last, by asker
        self._started = self._heard = time.monotonic()
        self._lost = False  # the engine was there and went away
        self._connected = False  # ZeroMQ may still take frames for a connection that broke, and lose them
        self._closing = False
        self._wake_send, self._wake_receive = socket.socketpair()
        self._wake_send.setblocking(False)
        self._wake_receive.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="engine-client", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether its thread lives; one that has ended is replaced by a new connection."""
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """Seconds since the engine was heard last."""
        return time.monotonic() - self._heard

    @property
    def is_up(self) -> bool:
        """Whether the engine has answered, and has not gone away since."""
        return self._info is not None

    @property
    def is_waited_for(self) -> bool:
        """Whether the connection is new, and nobody has said yet that its engine ended or is being started."""
        waits = not (self.is_up or self._lost or self._is_started())
        return waits and self.running and time.monotonic() < self._started + self._silence_s

    def new_id(self) -> str:
        """A request id that no other connection gives."""
        return f"{self._name}-{next(self._count)}"

    def info(self, timeout: float | None) -> EngineInfo:
        """The engine's newest facts, waited for as `EngineClient.info` says. Raises EngineDead."""
        if is_first := timeout is None:
            timeout = self._started + self._silence_s - time.monotonic() if self.is_waited_for else 0.0
        with self._changed:
            self._changed.wait_for(
                lambda: self._info is not None or (is_first and self._lost) or not self.running, timeout
            )
            if self._info is None:
                raise EngineDead("the engine does not answer", self._comeback())
            return self._info

    def recent(self, asker: str, timeout: float) -> Recent:
        """What became of the last sequences of one asker. Raises EngineDead if that is not told in time."""
        with self._changed:
            self._recent.pop(asker, None)
            self._outbox.put(encode(ListRecent(asker)))
            self._wake()
            self._changed.wait_for(lambda: asker in self._recent or not self.running, timeout)
            if asker not in self._recent:
                raise EngineDead("the engine does not answer", self._comeback())
            return self._recent[asker]

    def open(self, group: SubmitGroup, inbox: Inbox, route: Route = NOWHERE) -> OpenGroup:
        """Submit a group; what comes for its sequences goes to `inbox`. Raises RequestFailed if it is too long."""
        frame = encode(group)
        if len(frame) > MAX_FRAME_BYTES:
            raise RequestFailed(
                0, 400, f"the prompts of one request take {len(frame)} bytes on their way to the engine, above "
                f"{MAX_FRAME_BYTES}; send fewer or shorter ones at a time",
            )  # fmt: skip
        ids = [member.request_id for member in group.members]
        opened = OpenGroup(inbox, frame, ids, route, self, len(ids))
        self.adopt(opened, dict(enumerate(ids)))
        return opened

    def adopt(self, opened: OpenGroup, left: dict[int, str]) -> None:
        """Submit a group whose sequences at these places have not ended."""
        if opened.admitted:
            opened.frame = _taken(opened.frame)
        opened.sent = False
        with self._changed:
            self._streams.update((request_id, (index, opened)) for index, request_id in left.items())
        self._outbox.put(opened)
        self._wake()

    def release(self, opened: OpenGroup) -> dict[int, str]:
        """Part with a group that has no token yet -> its sequences that have not ended, by place."""
        left = {}
        with self._changed:
            for index, request_id in enumerate(opened.request_ids):
                if self._streams.pop(request_id, None) is not None:
                    left[index] = request_id
        for request_id in left.values() if self._connected else ():  # an engine that is only silent has it still
            self._outbox.put(encode(Abort(request_id)))
        return left

    def abort(self, message: Abort) -> None:
        """Tell the engine of a sequence that nobody reads any more; nothing more comes for it."""
        if self._end(message.request_id) is not None:
            self._outbox.put(encode(message))
            self._wake()

    def close(self) -> None:
        """Send what waits, then end the thread; open sequences end with EngineDead."""
        self._closing = True
        self._wake()
        self._thread.join(timeout=5)

    def _wake(self) -> None:
        try:
            self._wake_send.send(b"\0")
        except BlockingIOError:
            pass  # the thread has wake-ups waiting already
        except OSError:
            self._fail_all("the connection to the engine is closed")

    def _run(self) -> None:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        try:
            self._serve(dealer)
        except Exception:
            _log.exception("the connection to the engine failed")
        finally:
            dealer.disable_monitor()
            context.destroy(linger=0)  # the monitor's socket too, which an exception's frames may hold
            self._wake_send.close()
            self._wake_receive.close()
            self._fail_all("the connection to the engine is closed")

    def _serve(self, dealer: zmq.Socket[bytes]) -> None:
        dealer.setsockopt(zmq.IDENTITY, self._name.encode())
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.RCVHWM, 0)
        # ZeroMQ keeps nothing for an engine that is not there: what a new engine gets of an old one's, `_resend` chooses.
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        dealer.connect(self._address)
        poller = zmq.Poller()
        for source in (dealer, monitor, self._wake_receive):
            poller.register(source, zmq.POLLIN)
        next_hello, is_new = 0.0, False
        while not self._closing:
            now = time.monotonic()
            if now >= next_hello:
                connected = self._send(dealer, encode(Hello()))
                if connected and is_new:
                    if self._front is not None:
                        self._send(dealer, encode(WatchCache()))
                    self._resend(dealer)  # before aborts, which may be of what is sent again
                    is_new = False
                while self._owed and self._send(dealer, self._owed[-1]):
                    self._owed.pop()
                self._receive(dealer)  # this thread may have been silent itself
                self._check_silence()
                next_hello = now + (self._heartbeat_s if connected else min(self._heartbeat_s, _RETRY_S))
            ready = dict(poller.poll(max(1, int(1000 * (next_hello - time.monotonic())))))
            if dealer in ready:
                self._receive(dealer)
            if monitor in ready:
                is_new = self._connection_changed(dealer, monitor)
                next_hello = 0.0 if is_new else next_hello
            if self._wake_receive.fileno() in ready:
                self._wake_receive.recv(4096)
            if not is_new:  # what is to be sent again comes first
                self._flush(dealer)
        self._flush(dealer)

    def _flush(self, dealer: zmq.Socket[bytes]) -> None:
        while True:
            try:
                item = self._outbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, bytes):
                if not self._send(dealer, item):
                    self._owed.append(item)
                continue
            if item.home is not self or item.sent:
                continue  # has been moved on, and back
            item.sent = True
            if self._send(dealer, item.frame) or self._move(item):
                continue
            if self._comeback() is None:
                self._part_with(lambda group, item=item: group is item, "the engine went away")

    def _resend(self, dealer: zmq.Socket[bytes]) -> None:
        """Submit to a new engine what an old one has not begun, in the order that it was submitted in."""
        groups = [group for group in self._groups() if group.sent and not group.begun]
        for group in groups:
            if group.admitted:
                group.frame = _taken(group.frame)
            self._send(dealer, group.frame)
        if groups:
            _log.warning("a new engine is there; requests submitted to it again: %d", len(groups))

    def _send(self, dealer: zmq.Socket[bytes], frame: bytes) -> bool:
        if not self._connected:
            return False
        try:
            dealer.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self, dealer: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                (frame,) = frames
                message = decode_to_client(frame)
            except (ValueError, msgspec.MsgspecError):
                _log.error("the engine sent a frame that is no message")
                continue
            self._heard = time.monotonic()
            self._take(message)

    def _take(self, message: ToClient) -> None:
        if isinstance(message, Tokens):
            for delta in message.each():
                self._deliver(delta.request_id, delta, final=bool(delta.finish_reason))
        elif isinstance(message, EngineInfo):
            with self._changed:
                self._info = message
                self._lost = False
                self._changed.notify_all()
        elif isinstance(message, Timeline):
            self._on_timeline(message)
        elif isinstance(message, Recent):
            with self._changed:
                self._recent[message.asker] = message
                self._changed.notify_all()
        elif isinstance(message, CacheChanged):
            if self._front is not None:
                self._front.learn(message)
        elif isinstance(message, Admitted):
            self._deliver(message.request_id, message, final=False)
        elif message.request_id:
            if message.status == 503 and self._is_taken_elsewhere(message.request_id):
                return
            self._deliver(message.request_id, message, final=True)
            for other in message.others:
                self._end(other)
        else:  # a failure of no request is the engine's own
            self._fail_all("the engine died")

    def _is_taken_elsewhere(self, request_id: str) -> bool:
        """Whether a group that this engine has no room for goes to another one."""
        with self._changed:
            _, group = self._streams.get(request_id, (0, None))
        return group is not None and not group.admitted and self._move(group, is_full=True)

    def _move(self, group: OpenGroup, is_full: bool = False) -> bool:
        """Whether another engine has the group now, which has no token yet."""
        return self._front is not None and group.lost <= _MOST_LOST and self._front.move(group, is_full)

    def _groups(self) -> list[OpenGroup]:
        """Those that have not ended, in the order that they were submitted in."""
        with self._changed:
            return list(dict.fromkeys(group for _, group in self._streams.values()))

    def _end(self, request_id: str) -> tuple[int, OpenGroup] | None:
        """Nothing more comes for a sequence -> its place and its group; None where it had ended."""
        with self._changed:
            known = self._streams.pop(request_id, None)
            if known is not None:
                known[1].num_open -= 1
        return known

    def _deliver(self, request_id: str, item: Item, *, final: bool) -> None:
        if final:
            known = self._end(request_id)
        else:
            with self._changed:
                known = self._streams.get(request_id)
        if known is not None:
            index, group = known
            if isinstance(item, TokenDelta) and not group.begun:
                group.begun, group.frame = True, b""
            group.admitted |= isinstance(item, Admitted)
            group.inbox.put((index, item))

    def _connection_changed(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> bool:
        """Read one event of the socket; True when a connection came up."""
        event = zmq.utils.monitor.recv_monitor_message(monitor)["event"]
        self._connected = event != zmq.EVENT_DISCONNECTED
        if not self._connected:
            self._receive(dealer)  # the engine's last tokens came before this event
            for group in self._groups():
                group.lost += group.sent
            self._lose("the engine went away")
            return False
        self._heard = time.monotonic()
        return True

    def _check_silence(self) -> None:
        if not self._connected:
            self._move_all()  # another engine may have come back first
            if self._streams and self._comeback() is None:
                self._lose("the engine went away")
        elif self.silent_s > self._silence_s and (self._info is not None or self._streams):
            self._lose(f"the engine has been silent for {self._silence_s:g} s")

    def _lose(self, reason: str) -> None:
        """The engine is not to be counted on: end all streams but those that another one may begin."""
        self._move_all()
        if self._comeback() is None:
            self._fail_all(reason)
            return
        self._part_with(lambda group: group.begun, reason)
        self._part_with(lambda group: group.lost > _MOST_LOST, reason, given_up=True)
        self._forget_engine()

    def _move_all(self) -> None:
        """Give what has no token yet to other engines, as far as there are any."""
        for group in self._groups() if self._front is not None else ():
            if not group.begun:
                self._move(group)

    def _fail_all(self, reason: str) -> None:
        """End all streams."""
        self._forget_engine()
        self._part_with(lambda _: True, reason)

    def _forget_engine(self) -> None:
        with self._changed:
            self._lost = True
            self._info = None
            self._changed.notify_all()
        if self._front is not None:
            self._front.learn(CacheChanged(cleared=True))

    def _part_with(self, which: Callable[[OpenGroup], bool], reason: str, given_up: bool = False) -> None:
        """End the streams of some groups; an engine that is still there, or comes back, is told to give them up.

        given_up: they may be what engines end by, and better do not come again.
        """
        with self._changed:
            ended = {id: place for id, place in self._streams.items() if which(place[1])}
            for request_id, (_, group) in ended.items():
                del self._streams[request_id]
                group.num_open -= 1
        dead = EngineDead(reason, self._comeback())
        for request_id, (index, group) in ended.items():
            self._outbox.put(encode(Abort(request_id)))
            group.inbox.put((index, Failed(request_id, 500, _GIVEN_UP) if given_up else dead))
        if ended:
            _log.error("%s; %d open streams end", reason, len(ended))


def _taken(frame: bytes) -> bytes:
    """The frame of a group that an engine had admitted, for the next one."""
    group = decode_to_engine(frame)
    assert isinstance(group, SubmitGroup)
    return encode(msgspec.structs.replace(group, taken=True))
