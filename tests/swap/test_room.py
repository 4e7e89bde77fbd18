"""Which copies give way, against a search over every run of neighbours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tierflow.swap.room import Place, cheapest
from tierflow.swap.types import Chunk, Kind


def layout(parts: list[tuple[int, str]], ranks: list[int]) -> list[Place]:
    """Places side by side; what stays leaves a gap."""
    found, at = [], 0
    for i, (size, what) in enumerate(parts):
        if what != "stays":
            chunk = Chunk(i, i, Kind.PARAM, 1, size, 0, 1) if what == "copy" else None
            found.append(Place(at, size, ranks[i] if chunk else -1, chunk))
        at += size
    return found


PARTS = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["free", "copy", "copy", "stays"])), min_size=1, max_size=9)


@given(PARTS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_no_other_run_costs_less(parts: list[tuple[int, str]], nbytes: int, random: object) -> None:
    ranks = list(range(len(parts)))
    random.shuffle(ranks)  # type: ignore[attr-defined]
    places = layout(parts, ranks)
    runs = []
    for i in range(len(parts)):
        for j in range(i + 1, len(parts) + 1):
            if any(what == "stays" for _, what in parts[i:j]) or sum(size for size, _ in parts[i:j]) < nbytes:
                continue
            going = [k for k in range(i, j) if parts[k][1] == "copy"]
            runs.append((max([ranks[k] for k in going], default=-1), sum(parts[k][0] for k in going)))
    found = cheapest(random.sample(places, len(places)), nbytes)  # type: ignore[attr-defined]
    if not runs:
        assert found is None
        return
    assert found is not None
    ids = [chunk.id for chunk in found]
    assert (max([ranks[k] for k in ids], default=-1), sum(parts[k][0] for k in ids)) == min(runs)
    if ids:  # together with what is free between them they are one run
        low, high = min(ids), max(ids)
        assert all(parts[k][1] != "stays" for k in range(low, high + 1))
