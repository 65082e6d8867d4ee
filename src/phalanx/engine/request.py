"""A request in the brain: an object all its life, and while it runs also a row in columns by slot.

Shape suffixes: P replicas, S all slots, R some slots, L tokens of the longest sequence, B blocks of the longest
sequence, O offsets in a block, E token ids that end a sequence.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.block_pool import Blocks
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import NewRequest

Slots = NDArray[np.intp]
Counts = NDArray[np.int64]

NO_END_TOKEN = -2
"""In `Running.end_token_ids_SE`: fills the rows of requests with fewer such ids than others have. No token is equal to
it, nor is the NO_TOKEN of a row that gives none."""
FREE = -1
"""In `Running.ticket_S`: nobody has the slot."""

SEED_BITS = 63


def new_seed() -> int:
    """For a request that leaves it open."""
    return secrets.randbits(SEED_BITS)


@dataclass(eq=False, slots=True)
class Request:
    """What does not change from step to step, and what outlives a preemption."""

    request_id: int
    arrival: int
    """Grows from request to request; the order in which they are served."""
    token_ids: NDArray[np.int32]
    """All tokens that are known: the prompt and, after a preemption, the output so far. Not kept up while it runs."""
    num_prompt: int
    max_len: int
    """Prompt and output never get longer than this."""
    sampling: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...]
    """The model's own and the request's: each ends the output."""
    digests: list[bytes] = field(default_factory=list)
    """Of the sequence's full blocks, as far as they were needed."""
    num_cached: int | None = None
    """Prompt tokens that came from the prefix cache; None until it has run."""
    replica: int = 0
    """Chosen when it is queued."""
    slot: int | None = None
    """None while it waits."""
    is_rehearsal: bool = False
    """Its tokens count as nobody's."""


class Running:
    """The running requests of all replicas as columns by slot, so that a step over all is a few array operations.

    Slots count through: those of a replica come after those of the replica before it. Wherever several are given, those
    of one replica stand together, in the order of the replicas. Workers know of their own replica's slots alone, and
    count them from 0.

    Of a sequence's tokens, `num_committed_S` are known here, and `num_known_S` to the workers once they have done what
    was planned: it is ahead by the samples under way. The first `num_computed_S` are then in the KV cache.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int, num_replicas: int = 1) -> None:
        """`max_num_seqs` are the slots of each replica."""
        self.block_size = block_size
        self._num_replicas = num_replicas
        num_slots = num_replicas * max_num_seqs
        self._slots_P = [slice(first, first + max_num_seqs) for first in range(0, num_slots, max_num_seqs)]
        self._free_slots_P = [list(range(slots.start, slots.stop))[::-1] for slots in self._slots_P]
        self._slot_edges = np.arange(num_replicas + 1) * max_num_seqs
        self.replica_S = np.repeat(np.arange(num_replicas), max_num_seqs)
        self.worker_slot_S = np.tile(np.arange(max_num_seqs, dtype=np.int32), num_replicas)
        """The number that the workers know the slot by."""
        self.requests: list[Request | None] = [None] * num_slots
        self.ticket_S = np.full(num_slots, FREE, dtype=np.int64)
        """A number for each stay in a slot: tells whether a row is still the one that a step was planned for."""
        self.request_id_S = np.zeros(num_slots, dtype=np.int64)
        self.arrival_S = np.full(num_slots, FREE, dtype=np.int64)
        self.num_prompt_S = np.zeros(num_slots, dtype=np.int64)
        self.num_given_S = np.zeros(num_slots, dtype=np.int64)
        """Tokens that the workers were given when the request got its slot; they sampled the others."""
        self.min_len_S = np.zeros(num_slots, dtype=np.int64)
        self.max_len_S = np.zeros(num_slots, dtype=np.int64)
        self.num_computed_S = np.zeros(num_slots, dtype=np.int64)
        self.num_known_S = np.zeros(num_slots, dtype=np.int64)
        self.num_committed_S = np.zeros(num_slots, dtype=np.int64)
        self.num_blocks_S = np.zeros(num_slots, dtype=np.int64)
        self.planned_at_S = np.zeros(num_slots, dtype=np.int64)
        """The last step that the slot was in."""
        self.end_token_ids_SE = np.full((num_slots, 1), NO_END_TOKEN, dtype=np.int32)
        # Zeros are mapped, not written: memory is taken as sequences grow into it.
        max_blocks = -(-max_model_len // block_size)
        self.block_ids_SB = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self.token_ids_SL = np.zeros((num_slots, max_blocks * block_size), dtype=np.int32)
        self.token_ids_SBO = self.token_ids_SL.reshape(num_slots, max_blocks, block_size)
        """The same tokens, by block."""
        self.next_ticket = 0
        """The ticket of who comes in next; those of all who are here are lower."""

    def num_in(self, replica: int) -> int:
        """Requests that run there."""
        return len(self.requests) // self._num_replicas - len(self._free_slots_P[replica])

    def has_free_slot(self, replica: int) -> bool:
        return bool(self._free_slots_P[replica])

    def add(self, request: Request, blocks: Blocks, num_computed: int) -> int:
        """Give the request a slot of its replica. `blocks` has room for all its tokens and holds `num_computed`."""
        slot = self._free_slots_P[request.replica].pop()
        num_tokens = len(request.token_ids)
        assert num_computed < num_tokens <= len(blocks) * self.block_size
        assert num_tokens < request.max_len
        self.requests[slot], request.slot = request, slot
        self.ticket_S[slot] = self.next_ticket
        self.request_id_S[slot] = request.request_id
        self.arrival_S[slot] = request.arrival
        self.num_prompt_S[slot] = request.num_prompt
        self.min_len_S[slot] = request.num_prompt + request.sampling.min_tokens
        self.max_len_S[slot] = request.max_len
        self.num_computed_S[slot] = num_computed
        self.num_known_S[slot] = self.num_committed_S[slot] = self.num_given_S[slot] = num_tokens
        self.num_blocks_S[slot] = len(blocks)
        self.token_ids_SL[slot, :num_tokens] = request.token_ids
        self.block_ids_SB[slot, : len(blocks)] = blocks
        self._set_end_token_ids(slot, request.end_token_ids)
        self.next_ticket += 1
        return slot

    def remove(self, slot: int) -> tuple[Request, Blocks]:
        """Free the slot; gives the request, with all its committed tokens, and its blocks."""
        request = self.request(slot)
        request.slot = None
        request.token_ids = self.token_ids_SL[slot, : self.num_committed_S[slot]].copy()
        self.requests[slot] = None
        self.ticket_S[slot] = self.arrival_S[slot] = FREE
        self.num_known_S[slot] = self.num_computed_S[slot] = self.max_len_S[slot] = 0
        self._free_slots_P[request.replica].append(slot)
        return request, self.block_ids_SB[slot, : self.num_blocks_S[slot]].copy()

    def request(self, slot: int) -> Request:
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is free"
        return request

    def describe(self, slot: int, eos_token_ids: tuple[int, ...]) -> NewRequest:
        """What workers must know of a request that they do not know, and of which nothing is under way."""
        request = self.request(slot)
        return NewRequest(
            slot=int(self.worker_slot_S[slot]),
            token_ids=self.token_ids_SL[slot, : self.num_given_S[slot]].tobytes(),
            num_prompt=request.num_prompt,
            num_computed=int(self.num_computed_S[slot]),
            blocks=ints(self.block_ids_SB[slot, : self.num_blocks_S[slot]]),
            sampling=request.sampling,
            seed=request.seed,
            eos_token_ids=eos_token_ids,
        )

    def segments(self, slots_R: Slots) -> list[slice]:
        """Where those of each replica stand among these slots."""
        if self._num_replicas == 1:
            return [slice(0, len(slots_R))]
        # They are not in order, but no replica's is below one of the replica before it.
        edges: list[int] = slots_R.searchsorted(self._slot_edges).tolist()
        return list(map(slice, edges, edges[1:]))

    def sums(self, slots_R: Slots, values_R: Counts) -> list[int]:
        """The sum of the values of each replica's slots."""
        if self._num_replicas == 1:
            return [int(values_R.sum())]
        sums_P = np.bincount(self.replica_S[slots_R], values_R, self._num_replicas)
        sums: list[int] = sums_P.astype(np.int64).tolist()
        return sums

    def counts(self, slots_R: Slots) -> Counts:
        """How many of these slots each replica has."""
        return np.bincount(self.replica_S[slots_R], minlength=self._num_replicas)

    def decoding(self) -> Slots:
        """Those that have one token to compute, and may sample one more after it."""
        is_decoding_S = (self.num_known_S - self.num_computed_S == 1) & (self.num_known_S < self.max_len_S)
        slots_R: Slots = is_decoding_S.nonzero()[0]
        return slots_R

    def longest_idle(self, slots_R: Slots, num_shares: int) -> Slots:
        """Of the slots without a token under way those that were planned the longest ago.

        Of each replica no more than a share of its slots, if they are shared out evenly.
        """
        idle_R: Slots = slots_R[self.num_known_S[slots_R] == self.num_committed_S[slots_R]]
        limits_P, num_idle_P = -(-self.counts(slots_R) // num_shares), self.counts(idle_R)
        if (num_idle_P <= limits_P).all():
            return idle_R
        replica_R = self.replica_S[idle_R]
        longest_first = np.lexsort((self.planned_at_S[idle_R], replica_R))
        places_R = np.arange(len(idle_R)) - (num_idle_P.cumsum() - num_idle_P)[replica_R]
        return np.sort(idle_R[longest_first[places_R < limits_P[replica_R]]])

    def prefilling(self) -> Slots:
        """Those that have several tokens to compute, each replica's in order of arrival."""
        slots_R: Slots = (self.num_known_S - self.num_computed_S > 1).nonzero()[0]
        if not len(slots_R):
            return slots_R
        return slots_R[np.lexsort((self.arrival_S[slots_R], self.replica_S[slots_R]))]

    def num_missing(self, slot: int) -> int:
        """Known tokens that are still to be computed."""
        return int(self.num_known_S[slot] - self.num_computed_S[slot])

    def occupied(self) -> list[int]:
        """The slots of all that run."""
        slots: list[int] = (self.ticket_S != FREE).nonzero()[0].tolist()
        return slots

    def any_ending(self, replica: int) -> bool:
        """Whether the last token of a request is under way."""
        own = self._slots_P[replica]
        return bool(((self.num_known_S[own] == self.max_len_S[own]) & (self.ticket_S[own] != FREE)).any())

    def last_arrived(self, replica: int) -> int:
        own = self._slots_P[replica]
        return int(own.start + self.arrival_S[own].argmax())

    def without_room(self, slots_R: Slots) -> Slots:
        """Those whose next token needs another block."""
        is_full_R = self.num_computed_S[slots_R] == self.num_blocks_S[slots_R] * self.block_size
        growing_R: Slots = slots_R[is_full_R]
        return growing_R

    def append_blocks(self, slots_R: Slots, blocks_R: Blocks) -> None:
        """One more block for each."""
        self.block_ids_SB[slots_R, self.num_blocks_S[slots_R]] = blocks_R
        self.num_blocks_S[slots_R] += 1

    def replace_blocks(self, slots_N: Slots, places_N: Counts, blocks_N: Blocks) -> None:
        """Have other blocks take the places of these."""
        self.block_ids_SB[slots_N, places_N] = blocks_N

    def find_blocks(self, replica: int, blocks: Blocks) -> tuple[Slots, Counts]:
        """Who of those that run in the replica has one of these blocks, and at which place: slots and places."""
        own = self._slots_P[replica]
        num_blocks_S = np.where(self.ticket_S[own] == FREE, 0, self.num_blocks_S[own])
        is_there_SB = np.arange(self.block_ids_SB.shape[1]) < num_blocks_S[:, None]
        slots_N, places_N = (is_there_SB & np.isin(self.block_ids_SB[own], blocks)).nonzero()
        return slots_N + own.start, places_N

    def next_sampled(self, slots_R: Slots) -> tuple[Slots, NDArray[np.int32]]:
        """Those whose next token was sampled by an earlier step, which is committed, and these tokens."""
        sampled_R: Slots = slots_R[self.num_computed_S[slots_R] >= self.num_given_S[slots_R]]
        positions_R = self.num_computed_S[sampled_R]
        assert (positions_R < self.num_committed_S[sampled_R]).all(), "a token is needed that is still under way"
        return sampled_R, self.token_ids_SL[sampled_R, positions_R]

    def advance(self, slots_R: Slots, num_tokens_R: Counts, step: int) -> tuple[Counts, NDArray[np.bool_]]:
        """Plan the next tokens of each; gives how many are then computed, and who then samples one more."""
        self.planned_at_S[slots_R] = step
        ends_R = self.num_computed_S[slots_R] + num_tokens_R
        samples_R: NDArray[np.bool_] = ends_R == self.num_known_S[slots_R]
        self.num_computed_S[slots_R] = ends_R
        self.num_known_S[slots_R] += samples_R
        return ends_R, samples_R

    def take_back(self, slots_R: Slots, num_tokens_R: Counts) -> None:
        """These tokens are not computed after all, and no sample is under way any more."""
        self.num_computed_S[slots_R] -= num_tokens_R
        self.num_known_S[slots_R] = self.num_committed_S[slots_R]

    def begin_with_committed(self) -> None:
        """There are new workers, which are given all tokens that are known."""
        self.num_given_S[:] = self.num_committed_S

    def append_tokens(self, slots_R: Slots, tokens_R: NDArray[np.int32]) -> Counts:
        """Commit one sampled token for each; gives the lengths."""
        lengths_R = self.num_committed_S[slots_R] + 1
        self.token_ids_SL[slots_R, lengths_R - 1] = tokens_R
        self.num_committed_S[slots_R] = lengths_R
        return lengths_R

    def _set_end_token_ids(self, slot: int, token_ids: tuple[int, ...]) -> None:
        missing = len(token_ids) - self.end_token_ids_SE.shape[1]
        if missing > 0:
            self.end_token_ids_SE = np.pad(self.end_token_ids_SE, ((0, 0), (0, missing)), constant_values=NO_END_TOKEN)
        self.end_token_ids_SE[slot] = NO_END_TOKEN
        self.end_token_ids_SE[slot, : len(token_ids)] = token_ids
