from __future__ import annotations

from phalanx.engine.suspects import FAILURES_TO_BLAME, FAILURES_TO_ISOLATE, STEPS_WITHOUT, Suspects


def failed(
    suspects: Suspects, reach: dict[int, int], *, times: int = 1, is_from_outside: bool = False
) -> dict[int, str]:
    guilty: dict[int, str] = {}
    for _ in range(times):
        assert not guilty
        guilty = suspects.failed(reach, "rank 1 died", is_from_outside=is_from_outside)
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


def killed(suspects: Suspects, reach: dict[int, int], *, times: int = 1) -> dict[int, str]:
    """From outside, as far as anybody can tell."""
    return failed(suspects, reach, times=times, is_from_outside=True)


def test_kills_from_outside_convict_nobody_who_is_the_only_one() -> None:
    suspects = Suspects()
    assert killed(suspects, {0: 4}, times=20) == {}
    suspects.committed({0: 4})
    assert not suspects and suspects.aside is None


def test_who_is_killed_alone_waits_while_others_run() -> None:
    suspects = Suspects()
    assert killed(suspects, {0: 4, 1: 4}, times=FAILURES_TO_ISOLATE) == {}
    assert suspects.alone == 1 and suspects.aside is None
    assert killed(suspects, {1: 4}, times=FAILURES_TO_BLAME - FAILURES_TO_ISOLATE) == {}
    assert suspects.aside == 1 and suspects.alone == 0, "which is tried, and goes on"
    for num_tokens in range(4, 4 + STEPS_WITHOUT - 1):
        suspects.committed({0: num_tokens})
    assert suspects.aside == 1 and suspects.alone is None
    suspects.committed({0: 4 + STEPS_WITHOUT})
    assert suspects.aside is None and suspects.alone == 1, "is tried once more"
    assert list(killed(suspects, {1: 4})) == [1]


def test_who_was_put_aside_and_then_gets_further_is_cleared() -> None:
    suspects = Suspects()
    killed(suspects, {1: 4}, times=FAILURES_TO_BLAME)
    for num_tokens in range(STEPS_WITHOUT):
        suspects.committed({0: num_tokens})
    suspects.committed({1: 4})
    assert not suspects and suspects.alone is None


def test_kills_that_come_without_it_as_well_clear_who_was_put_aside() -> None:
    suspects = Suspects()
    killed(suspects, {1: 4}, times=FAILURES_TO_BLAME)
    assert suspects.aside == 1
    assert killed(suspects, {0: 4}) == {}
    assert suspects.aside is None and suspects.alone is None and len(suspects) == 1


def test_failures_of_its_own_need_no_trial_of_others() -> None:
    suspects = Suspects()
    killed(suspects, {1: 4}, times=2)
    assert failed(suspects, {1: 4}, times=FAILURES_TO_BLAME - 1) == {}
    assert list(failed(suspects, {1: 4})) == [1]
