"""What the two ends of a link between nodes say to each other, besides the frames that they carry: typed, no pickle.

    node → brain    Hello, then Passed, Died, Failed
    brain → node    Welcome or Refused, then Alive, Forget, Goodbye

The first message of either is the payload of its half of the handshake.
"""

from __future__ import annotations

import msgspec

BEATS_PER_TIMEOUT = 10
"""Signs of life, either way, within the time after which silence ends a link."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Field order is the wire format."""


class Hello(_Message, frozen=True):
    """Payload of the handshake's first message: who dials in. `num_slots` of its node-local ring."""

    version: str
    node: str
    ranks: tuple[int, ...]
    pid: int
    num_slots: int


class Welcome(_Message, frozen=True):
    """Payload of its second message. `pid` of the brain; longer silence than `node_timeout_s` ends the link."""

    brain: str
    pid: int
    node_timeout_s: float


class Refused(_Message, frozen=True):
    """The other payload of its second message: the key is right, but this node is not awaited."""

    reason: str


Answer = Welcome | Refused


class Passed(_Message, frozen=True):
    """All ranks of the node are done with `num_frames` commands; `slowest` is the rank that is furthest behind.

    Also the sign of life, and in the handshake the node's proof that it is there now.
    """

    num_frames: int
    slowest: int


class Died(_Message, frozen=True):
    """A rank died or closed its end. All that it had sent went before."""

    rank: int
    pid: int
    detail: str


class Failed(_Message, frozen=True):
    """The node's end cannot go on, and says why."""

    reason: str


class Alive(_Message, frozen=True):
    """A sign of life."""


class Forget(_Message, frozen=True):
    """Go on without this rank."""

    rank: int


class Goodbye(_Message, frozen=True):
    """The brain closed the queue; nothing follows."""


Note = Passed | Died | Failed | Alive | Forget | Goodbye
