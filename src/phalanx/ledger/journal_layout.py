"""Where everything is in a journal (journal.py). No torch here.

header     HEADER_BYTES: words, named below
texts      NUM_TEXTS entries of TEXT_BYTES: a digest, a length, what the digest stands for
records    NUM_RECORDS of RECORD_BYTES: record n is at n modulo NUM_RECORDS
"""

from __future__ import annotations

from phalanx.ledger.record import DONE_AT, ISSUED_AT, RECORD_BYTES

HEADER_BYTES = 1024
MAX_GROUPS = 32
"""Of one rank, and none."""

NUM_TEXTS = 512
TEXT_BYTES = 128
NUM_RECORDS = 1024
JOURNAL_BYTES = HEADER_BYTES + NUM_TEXTS * TEXT_BYTES + NUM_RECORDS * RECORD_BYTES

PHASES = (
    *("not begun", "starting", "joining", "loading", "sizing", "allocating", "idle", "stepping"),
    *("moving experts", "leaving", "compiling", "capturing", "rebuilding", "calling a method", "switching weights"),
    *("falling asleep", "asleep", "waking", "another phase"),
)
"""What a worker says that it does; the order is part of the layout."""


OUTSIDE = ("", "the store", "the others' joining")
"""What a rank may wait for that is no collective; the order is part of the layout."""

NUM_DECISIONS = 8
"""So many steps, at most, ranks are apart."""

TEXTS_AT = HEADER_BYTES
RECORDS_AT = HEADER_BYTES + NUM_TEXTS * TEXT_BYTES
WORD_BYTES = 8
MOST_TEXT_BYTES = TEXT_BYTES - WORD_BYTES - 1
DONE_WORD = DONE_AT // WORD_BYTES
ISSUED_WORD = ISSUED_AT // WORD_BYTES
RECORD_WORDS = RECORD_BYTES // WORD_BYTES

# Of the header: places in 64-bit words. Plain numbers: an enum's member takes as long to look up as a word to write.
LAST_WORD = 0  # the number of the newest record
PHASE_WORD = 1
PHASE_SINCE_WORD = 2
PID_WORD = 3
START_TIME_WORD = 4
NUM_TEXTS_WORD = 5
STEP_WORD = 6  # that the rank is in, or was in last
STACKS_WORD = 7  # the descriptor that the process's stacks are read from; 0 if there is none
HAS_DEVICE_WORD = 8  # 1 if the three below count
LAUNCHED_WORD = 9  # the newest collective that the device has been given
OUTSIDE_WORD = 10  # what is waited for that is no collective: an index into OUTSIDE, and the group from bit 8 on
OUTSIDE_SINCE_WORD = 11
JOINING_WORD = 12  # a bit for each group whose joining has begun
ASKED_WORD = 13  # four bytes of it: how often somebody has asked whether the interpreter runs (pulse.py)
ANSWERED_WORD = 14  # up to which of them it has answered
ANSWERER_WORD = 15  # the thread that answers, as the kernel numbers it; 0 if there is none
BEGUN_WORD = 16  # the newest collective that the device has come to: written by it, on a cache line of their own
FINISHED_WORD = 17  # the newest one that it is through with: likewise
OPEN_STEP_WORD = 24  # that what is issued now is of; 0 if it is of none
SEQUENCES_WORD = 32  # of each group's newest collective, which may be older than all records
DECISIONS_WORD = 64  # the newest steps, at step modulo NUM_DECISIONS: its number and its digest
OUTSIDE_GROUP_SHIFT = 8
ASKED_AT, ANSWERED_AT, ANSWERER_AT = ASKED_WORD * WORD_BYTES, ANSWERED_WORD * WORD_BYTES, ANSWERER_WORD * WORD_BYTES
