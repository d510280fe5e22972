# SPDX-License-Identifier: BSD-3-Clause
"""Who has not come to a rendezvous yet. Real processes meet in test/run/test_joining.py."""

from __future__ import annotations

from engine.errors import RendezvousError
from engine.parallel import Ranks, rendezvous

import pytest


class Store:
    """The ranks 0, 4 and 5 have beaten."""

    def add(self, key: str, value: int) -> int:
        return 3 if key in ("beat/0", "beat/4", "beat/5") else 0


def test_a_missing_process_of_a_node_that_is_there_is_named():
    meeting = rendezvous._Meeting("tcp://[::1]:5000/", Ranks(0, 6, 0, 2), timeout=1)
    assert meeting.master == ("::1", 5000)
    assert meeting.missing() == ["node 0 (ranks 0 to 1)"]  # rank 0's store is not reached yet
    meeting.store = Store()
    assert meeting.missing() == ["rank 1 of node 0", "node 1 (ranks 2 to 3)"]


def test_the_end_of_the_time_is_an_error_that_names_who_is_missing():
    meeting = rendezvous._Meeting("tcp://10.0.0.1:5000", Ranks(1, 2, 0, 1), timeout=9)
    meeting.check_time()
    meeting.end -= 10
    with pytest.raises(RendezvousError, match=r"node 0 \(rank 0\) did not join within 9 s"):
        meeting.check_time()
