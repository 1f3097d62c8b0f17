"""The acceptance tests of jobs on one machine, run on a cluster."""

from __future__ import annotations

import pytest
from support.ray_tests import OnRay, load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

# Left out are tests whose functions change what belongs to the test, which they cannot reach from another process;
# what they show is shown in other files beside this one.
ON_RAY = {
    "test_end_of_stream": [
        "test_a_slow_parallel_instance_loses_nothing",
        "test_a_comap_of_uneven_inputs_ends_with_the_longer_one",
        "test_a_union_of_a_fast_and_a_slow_source_gives_all_of_both",
        "test_a_join_ends_whatever_its_sources_are_called",
        "test_none_and_falsy_records_are_records",
        "test_a_loop_whose_data_die_out_ends",
        "test_both_branches_of_a_stream_get_all_records_in_order",
        "test_each_key_lives_in_one_task",
        "test_records_of_one_key_keep_their_order_for_each_producer",
        "test_a_loop_that_never_dies_out_ends_by_stop",
        "test_a_sink_is_closed_after_the_last_record",
        "test_a_sink_is_closed_after_a_failure_of_its_own",
        "test_a_sink_is_closed_after_a_failure_elsewhere",
        "test_a_sink_is_closed_after_a_stop",
    ],
    "test_results_and_errors": [
        "test_what_came_before_the_failed_record_arrives",
        "test_a_skipped_record_is_counted_and_the_others_arrive",
        "test_a_dead_letter_carries_the_record_and_its_error",
        "test_run_raises_what_failed",
    ],
    "test_services_lifecycle": [
        "test_cleanup_is_over_when_submit_returns",
        "test_every_service_ends_once_in_reverse_order",
        "test_a_service_ends_before_what_it_requires",
        "test_submit_returns_after_a_slow_cleanup",
        "test_a_hook_that_raises_does_not_stop_the_others",
        "test_two_of_three_cleanups_raise",
        "test_the_job_and_a_cleanup_fail",
        "test_a_service_that_nobody_calls_is_cleaned",
        "test_a_service_of_any_form_works_and_is_closed",
    ],
    "test_services_at_run_time": [
        "test_a_service_that_calls_another_ends_before_it",
        "test_what_a_service_needs_outlives_it",
        "test_a_circle_that_is_only_seen_at_run_time_is_refused",
        "test_a_service_may_call_itself",
        "test_a_pipeline_answers_calls",
        "test_a_pipeline_answers_several_callers_at_once",
        "test_a_served_pipeline_is_itself_a_caller",
    ],
    "test_services_start": ["test_a_start_that_raises_is_unwound", "test_a_service_that_never_gets_ready"],
}


@pytest.fixture(autouse=True)
def _address(ray_address: str) -> None:
    OnRay.address = ray_address


for _name, _tests in ON_RAY.items():
    _module = load("acceptance", _name)
    globals().update({_test: getattr(_module, _test) for _test in _tests})
