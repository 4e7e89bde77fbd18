"""The ledger against its own rules, written down a second time as a plain model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tierflow.swap import TRANSITIONS, Chunk, CopyState, Event, Kind, Ledger, LedgerError, Tier

A, F, V, S = CopyState.ABSENT, CopyState.FILLING, CopyState.VALID, CopyState.STALE


def chunk(i: int = 0, numel: int = 1024) -> Chunk:
    return Chunk(i, 0, Kind.PARAM, 4, numel)


def test_the_transition_table_whole() -> None:
    allowed = {
        (A, Event.CREATE, V), (A, Event.BEGIN_FILL, F), (S, Event.BEGIN_FILL, F), (F, Event.END_FILL, V),
        (F, Event.ABORT_FILL, S), (V, Event.INVALIDATE, S), (S, Event.INVALIDATE, S), (V, Event.EVICT, A),
        (S, Event.EVICT, A),
    }  # fmt: skip
    assert {(old, event, new) for (old, event), new in TRANSITIONS.items()} == allowed


@pytest.mark.parametrize(("state", "event"), list(itertools.product(CopyState, Event)))
def test_what_the_table_does_not_hold_is_refused(state: CopyState, event: Event) -> None:
    ledger, c = Ledger({t: 1 << 20 for t in Tier}), chunk()
    ledger.apply(c, Tier.NVME, Event.CREATE)  # so that no rule about the last valid copy interferes
    path = {A: [], F: [Event.BEGIN_FILL], V: [Event.CREATE], S: [Event.CREATE, Event.INVALIDATE]}[state]
    for step in path:
        ledger.apply(c, Tier.HOST, step)
    if (state, event) in TRANSITIONS:
        ledger.apply(c, Tier.HOST, event)
    else:
        with pytest.raises(LedgerError, match="not allowed"):
            ledger.apply(c, Tier.HOST, event)
        assert ledger.state(c, Tier.HOST) is state


def test_pins_budgets_and_the_last_valid_copy() -> None:
    ledger, c, other = Ledger({Tier.DEVICE: 4096, Tier.HOST: 8192, Tier.NVME: 0}), chunk(0), chunk(1)
    ledger.apply(c, Tier.HOST, Event.CREATE)
    with pytest.raises(LedgerError, match="last valid"):
        ledger.apply(c, Tier.HOST, Event.EVICT)
    with pytest.raises(LedgerError, match="budget"):
        ledger.apply(c, Tier.NVME, Event.BEGIN_FILL)
    ledger.apply(c, Tier.DEVICE, Event.BEGIN_FILL)
    with pytest.raises(LedgerError, match="not VALID"):
        ledger.pin(c, Tier.DEVICE)
    ledger.apply(c, Tier.DEVICE, Event.END_FILL)
    ledger.pin(c, Tier.DEVICE)
    with pytest.raises(LedgerError, match="pinned"):
        ledger.apply(c, Tier.DEVICE, Event.EVICT)
    with pytest.raises(LedgerError, match="budget"):
        ledger.apply(other, Tier.DEVICE, Event.CREATE)
    assert ledger.wrote(c, Tier.DEVICE) == [Tier.HOST] and ledger.state(c, Tier.HOST) is S
    ledger.unpin(c, Tier.DEVICE)
    with pytest.raises(LedgerError, match="more often"):
        ledger.unpin(c, Tier.DEVICE)
    with pytest.raises(LedgerError, match="exceed"):
        ledger.hold_scratch(Tier.HOST, 8192)
    ledger.check()


class Random(RuleBasedStateMachine):
    """Random events; whatever the ledger accepts must keep the invariants, computed here from scratch."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks = [chunk(i, 512 * (i + 1)) for i in range(4)]
        self.ledger = Ledger({Tier.DEVICE: 6000, Tier.HOST: 12000, Tier.NVME: 40000})
        self.states = {(c.id, t): A for c in self.chunks for t in Tier}
        self.pins = dict.fromkeys(self.states, 0)
        for c in self.chunks:
            self.ledger.apply(c, Tier.NVME, Event.CREATE)
            self.states[c.id, Tier.NVME] = V

    @rule(i=st.integers(0, 3), tier=st.sampled_from(Tier), event=st.sampled_from(Event))
    def event(self, i: int, tier: Tier, event: Event) -> None:
        try:
            self.states[i, tier] = self.ledger.apply(self.chunks[i], tier, event)
        except LedgerError:
            assert self.ledger.state(self.chunks[i], tier) is self.states[i, tier]
        else:
            assert not (event is Event.EVICT and self.pins[i, tier])

    @rule(i=st.integers(0, 3), tier=st.sampled_from(Tier), up=st.booleans())
    def pin(self, i: int, tier: Tier, up: bool) -> None:
        if up and self.states[i, tier] is V:
            self.pins[i, tier] = self.ledger.pin(self.chunks[i], tier)
        elif not up and self.pins[i, tier]:
            self.pins[i, tier] = self.ledger.unpin(self.chunks[i], tier)

    @rule(i=st.integers(0, 3), tier=st.sampled_from(Tier))
    def wrote(self, i: int, tier: Tier) -> None:
        if self.states[i, tier] is V and not any(self.pins[i, t] for t in Tier if t is not tier):
            for other in self.ledger.wrote(self.chunks[i], tier):
                self.states[i, other] = S

    @invariant()
    def holds(self) -> None:
        for c in self.chunks:
            assert V in [self.states[c.id, t] for t in Tier]
        for tier in Tier:
            held = sum(c.nbytes for c in self.chunks if self.states[c.id, tier] is not A)
            assert self.ledger.held(tier) == held <= self.ledger.budgets[tier]
        pinned_and_stale = [k for k, n in self.pins.items() if n and self.states[k] is not V]
        if not pinned_and_stale:
            self.ledger.check()


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
