"""The tests of streams on one machine, run on a cluster; without `--proof`, each with its first parameters only."""

from __future__ import annotations

import inspect

import pytest
from ray_tests import OnRay, load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

# Left out is what looks at something that a function has changed in its own process, or ends the job from inside of it
# by the job manager, which another process does not have.
MODULES = {
    "test_methods": {
        "test_a_function_is_opened_before_and_closed_after_its_records",
        "test_a_generator_function_is_a_source_that_ends_with_it",
        "test_records_are_never_changed",
    },
    "test_policies": {
        "test_a_record_is_tried_again_until_it_succeeds",
        "test_after_the_last_attempt_a_record_is_skipped_or_a_dead_letter",
        "test_the_attempts_of_each_record_are_counted_alone",
        "test_the_last_attempt_fails_the_job_with_their_number",
        "test_what_one_record_gave_arrives_before_another_one_fails_the_job",
    },
    "test_connected": set(),
    "test_keys": {"test_a_retried_record_of_reduce_keeps_its_key"},
    "test_loops": {"test_an_endless_loop_ends_by_stop"},
    "test_batches": {
        "test_a_cancel_drops_and_counts_what_waits",
        "test_a_batch_in_which_a_record_failed_is_tried_again_as_it_was",
        "test_a_record_that_fails_alone_fails_the_job_after_those_before_it",
        "test_all_that_came_before_a_record_that_fails_alone_arrives_also_at_the_end_of_the_stream",
        "test_a_record_waits_no_longer_than_it_may",
        "test_no_batch_is_larger_than_it_may_be",
        "test_what_came_before_a_batch_that_fails_has_arrived",
    },
    "test_async": {
        "test_a_cancel_ends_what_is_in_flight_before_the_function_is_closed",
        "test_a_failure_elsewhere_ends_what_is_in_flight",
        "test_a_failure_ends_what_is_in_flight_too",
        "test_a_result_goes_on_as_soon_as_it_is_there",
        "test_a_stop_that_takes_too_long_cancels_what_is_in_flight",
        "test_a_stop_waits_for_what_is_in_flight",
        "test_an_attempt_that_takes_too_long_fails",
        "test_as_many_coroutines_run_as_the_limit_allows",
        "test_coroutines_do_not_see_the_variables_of_other_records",
        "test_the_last_attempt_is_followed_by_the_policy",
    },
    "test_fused": set(),
}


@pytest.fixture(autouse=True)
def _address(ray_address: str) -> None:
    OnRay.address = ray_address


for _name, _left_out in MODULES.items():
    for _test, _function in vars(load("stream", _name)).items():
        if (
            _test.startswith("test_")
            and _test not in _left_out
            and "backend" in inspect.signature(_function).parameters
        ):
            globals()[f"{_test}_of_{_name}"] = _function
