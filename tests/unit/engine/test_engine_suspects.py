from __future__ import annotations

from phalanx.engine.suspects import FAILURES_TO_BLAME, FAILURES_TO_ISOLATE, Suspects


def failed(suspects: Suspects, reach: dict[int, int], *, times: int = 1) -> dict[int, str]:
    guilty: dict[int, str] = {}
    for _ in range(times):
        assert not guilty
        guilty = suspects.failed(reach, "rank 1 died")
    return guilty


def test_one_failure_isolates_nobody() -> None:
    suspects = Suspects()
    assert failed(suspects, {0: 4, 1: 4}, times=FAILURES_TO_ISOLATE - 1) == {}
    assert suspects.alone is None
    assert len(suspects) == 2


def test_the_last_to_arrive_is_isolated_first() -> None:
    suspects = Suspects()
    failed(suspects, {0: 4, 2: 9, 1: 4}, times=FAILURES_TO_ISOLATE)
    assert suspects.alone == 2
    suspects.committed({2: 9})
    assert suspects.alone == 1
    suspects.ended([1])
    assert suspects.alone == 0
    suspects.committed({0: 4})
    assert suspects.alone is None
    assert not suspects


def test_who_gets_less_far_than_the_failed_step_is_suspected_still() -> None:
    suspects = Suspects()
    failed(suspects, {0: 9}, times=FAILURES_TO_ISOLATE - 1)
    failed(suspects, {0: 4})  # a shorter chunk of the same prompt
    suspects.committed({0: 8})
    assert suspects.alone == 0
    suspects.committed({0: 9})
    assert suspects.alone is None


def test_who_fails_with_others_and_then_alone_is_to_blame() -> None:
    suspects = Suspects()
    assert failed(suspects, {0: 4, 1: 4}, times=FAILURES_TO_ISOLATE) == {}
    assert failed(suspects, {1: 4}, times=FAILURES_TO_BLAME - FAILURES_TO_ISOLATE - 1) == {}
    assert failed(suspects, {1: 4}) == {
        1: "the engine has failed 4 times in a row in steps with this request, 2 times with no other; "
        "the last time: rank 1 died"
    }
    assert not suspects, "the others were only with it"


def test_a_lone_request_has_as_many_attempts() -> None:
    suspects = Suspects()
    assert failed(suspects, {5: 1}, times=FAILURES_TO_BLAME - 1) == {}
    assert list(failed(suspects, {5: 1})) == [5]


def test_nobody_is_blamed_for_failures_in_company_however_many() -> None:
    suspects = Suspects()
    assert failed(suspects, {0: 4, 1: 4}, times=10) == {}
    assert suspects.alone == 1


def test_failures_count_only_in_a_row() -> None:
    suspects = Suspects()
    for num_tokens in range(1, 20):
        assert failed(suspects, {0: num_tokens}, times=FAILURES_TO_BLAME - 1) == {}
        suspects.committed({0: num_tokens})


def test_a_failure_without_a_step_under_way_is_nobodys() -> None:
    suspects = Suspects()
    assert failed(suspects, {}, times=10) == {}
    assert not suspects
