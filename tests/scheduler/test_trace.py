"""The trace predicts; departures are noticed and the next step follows the new order."""

from __future__ import annotations

from tierflow.scheduler.trace import NEVER, Recorder, Trace


def test_next_use_wraps_around_and_unknown_units_never_come() -> None:
    trace = Trace([0, 1, 2, 2, 1, 0])
    assert [trace.next_use(u) for u in (0, 1, 2, 9)] == [1, 2, 3, NEVER]
    for unit in (0, 1, 2):
        assert trace.visit(unit)
    assert [trace.next_use(u) for u in (2, 1, 0)] == [1, 2, 3]
    assert list(trace.upcoming(4)) == [2, 1, 0, 0]
    assert not trace.visit(0)  # skips two uses
    assert [trace.next_use(u) for u in (0, 1, 2)] == [1, 2, 3]
    assert not trace.visit(9) and trace.cursor == 5


def test_recorder_learns_a_step_and_keeps_evaluation_out_of_it() -> None:
    recorder = Recorder([0, 1, 1, 0])
    for unit in (0, 1, 2):
        recorder.visit(unit, learning=True)
    recorder.forward_ended()
    recorder.visit(0, learning=False)
    for unit in (2, 1, 0):
        recorder.visit(unit, learning=True)
    assert recorder.step_ended() and recorder.departures == 0
    assert recorder.trace.order == [0, 1, 2, 1, 0]
    assert recorder.forward.order == [0, 1, 2]
    for unit in recorder.trace.order:
        recorder.visit(unit, learning=True)
    assert not recorder.step_ended() and recorder.departures == 0
    for unit in (2, 1, 0):
        recorder.visit(unit, learning=True)
    assert recorder.departures > 0 and recorder.step_ended()
    assert recorder.trace.order == [2, 1, 0]
