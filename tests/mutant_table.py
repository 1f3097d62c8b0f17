"""Mistakes that a maintainer could make, each with the test that notices it; `mutants.py` makes them.

The text of an edit holds no comment, as those are reworded more often than code.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One mistake.

    Attributes:
        name: what goes wrong.
        file: the file under `src/sage`.
        old: text that is in the file exactly once.
        new: what stands in its place.
        test: the id of the test that notices it.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


CHANNEL = "tests/runtime/test_channel.py::"
LIFECYCLE = "tests/runtime/test_lifecycle.py::"
GROWTH = "tests/runtime/test_lifecycle_growth.py::"
GATES = "tests/hosts/test_gates.py::"
ORPHANS = "tests/hosts/test_orphans.py::"
PROCESSES = "tests/hosts/test_process.py::"
JOURNAL = "tests/hosts/test_journal.py::"
LINKS = "tests/hosts/test_rpc.py::"
OWN_PROCESSES = "tests/hosts/test_child_process.py::"
GUARDIANS = "tests/hosts/test_guardian.py::"
POOLS = "tests/runtime/test_pool.py::"
ENDS = "tests/acceptance/test_end_of_stream.py::"

CHANNELS = (
    Mutant(
        "a channel takes in one element more than its bound",
        "_runtime/channel.py",
        "return fits and self._records < self._capacity_records",
        "return fits and self._records <= self._capacity_records",
        CHANNEL + "test_the_end_of_a_stream_waits_behind_its_records",
    ),
    Mutant(
        "a channel has no bound in bytes",
        "_runtime/channel.py",
        "return fits and self._records",
        "return self._records",
        CHANNEL + "test_takes_in_as_many_bytes_as_the_bound",
    ),
    Mutant(
        "a consumer is woken for the second element and not for the first",
        "_runtime/channel.py",
        "was_empty = not self._elements\n            self._elements.append((port, element, size))",
        "self._elements.append((port, element, size))\n            was_empty = not self._elements",
        CHANNEL + "test_the_consumer_is_woken_when_the_first_element_arrives",
    ),
    Mutant(
        "a producer that waits is not woken when an element is taken",
        "_runtime/channel.py",
        "self._bytes -= size\n            next_one = self._next_waiting()",
        "self._bytes -= size\n            next_one = None",
        CHANNEL + "test_a_producer_is_woken_once_there_is_room",
    ),
    Mutant(
        "a producer is woken while the channel is still full",
        "_runtime/channel.py",
        "if not self._waiting or not self._has_room(1):",
        "if not self._waiting:",
        CHANNEL + "test_a_producer_is_not_woken_while_the_channel_is_still_full",
    ),
    Mutant(
        "a producer that has put does not pass the wake-up on",
        "_runtime/channel.py",
        "self._bytes += size\n            next_one = self._next_waiting()",
        "self._bytes += size\n            next_one = None",
        CHANNEL + "test_the_one_that_has_put_wakes_the_next_while_there_is_room",
    ),
    Mutant(
        "a producer that gives up does not pass the wake-up on",
        "_runtime/channel.py",
        "self._waiting.pop(wake, None)\n            next_one = self._next_waiting()\n        if",
        "self._waiting.pop(wake, None)\n            next_one = None\n        if",
        CHANNEL + "test_a_producer_that_gives_up_lets_the_next_one_have_its_room",
    ),
    Mutant(
        "a queue loses the last record of each batch",
        "_runtime/channel.py",
        "self._elements.append((port, element, size))",
        "self._elements.append((port, element if len(element) < 2 else element.slice(0, len(element) - 1), size))",
        "tests/test_report.py::test_each_record_of_a_job_is_accounted_for",
    ),
    Mutant(
        "an operator takes dead letters as sent that failed the job",
        "_runtime/accounts.py",
        "source.failed - source.fatal",
        "source.failed + source.fatal",
        "tests/simulation/test_simulation.py::test_no_schedule_breaks_a_promise[0-99]",
    ),
    Mutant(
        "a closed channel forgets to wake the producers that wait",
        "_runtime/channel.py",
        "        for wake in waiting:\n            wake()\n        return sum(",
        "        return sum(",
        CHANNEL + "test_close_drops_counts_and_wakes",
    ),
    Mutant(
        "a closed channel does not count what comes after it",
        "_runtime/channel.py",
        "self.undelivered += len(element)\n                return True",
        "return True",
        CHANNEL + "test_a_closed_channel_takes_everything_in_and_counts_it_as_undelivered",
    ),
    Mutant(
        "a closed channel leaves what it drops on the count of its loop",
        "_runtime/channel.py",
        "counter.add(-len(dropped))",
        "counter.add(0)",
        CHANNEL + "test_close_takes_what_it_drops_off_the_count",
    ),
    Mutant(
        "what found no room is counted as on its way",
        "_runtime/channel.py",
        "            self._waiting.pop(wake, None)\n            for counter in self.counters:\n"
        "                counter.add(1)\n            was_empty",
        "            self._waiting.pop(wake, None)\n            for counter in self.counters:\n"
        "                counter.add(2)\n            was_empty",
        CHANNEL + "test_what_is_in_flight_is_counted_exactly",
    ),
    Mutant(
        "the end of a stream is not recognized",
        "_runtime/channel.py",
        "return isinstance(element, EndOfStream)",
        "return not len(element)",
        CHANNEL + "test_the_end_of_a_stream_waits_behind_its_records",
    ),
)

LIFECYCLES = (
    Mutant(
        "a service is started before those that it needs are ready",
        "_runtime/transitions.py",
        "is ServiceState.REGISTERED and t.tally.unmet[name] == 0:",
        "is ServiceState.REGISTERED:",
        LIFECYCLE + "test_services_start_before_tasks_in_order_of_dependency",
    ),
    Mutant(
        "tasks run before all of them are open",
        "_runtime/transitions.py",
        "if t.tally.tasks_unopened == 0:",
        "if t.tally.tasks_unopened <= 1:",
        LIFECYCLE + "test_services_start_before_tasks_in_order_of_dependency",
    ),
    Mutant(
        "a task is opened before the tasks behind it",
        "_runtime/transitions.py",
        "if t.tally.unopened[name] == 0 and t.tasks",
        "if t.tasks",
        LIFECYCLE + "test_services_start_before_tasks_in_order_of_dependency",
    ),
    Mutant(
        "a service is stopped while another still needs it",
        "_runtime/transition.py",
        "return self.tally.needed[name] == 0",
        "return self.tally.needed[name] <= 1",
        LIFECYCLE + "test_a_dependency_that_was_only_seen_counts_at_the_stop",
    ),
    Mutant(
        "services with no dependencies are stopped side by side",
        "_runtime/transitions.py",
        "            if not front:\n                break\n",
        "",
        LIFECYCLE + "test_the_end_of_the_sources_stops_services_in_strict_reverse",
    ),
    Mutant(
        "replicas are stopped one after the other",
        "_runtime/transitions.py",
        "            if not front:\n                break\n",
        "            break\n",
        LIFECYCLE + "test_replicas_stop_side_by_side_where_other_services_stop_one_after_the_other",
    ),
    Mutant(
        "a replica rests that cannot be done without",
        "_runtime/service_transitions.py",
        "return _replicas_left(t, front) > t.start.service_plans[front].options.replicas_min",
        "return True",
        LIFECYCLE + "test_a_replica_that_cannot_be_done_without_does_not_rest",
    ),
    Mutant(
        "a service that another one needs rests",
        "_runtime/service_transitions.py",
        "return not t.stopping and t.dependents_over(name)",
        "return not t.stopping",
        LIFECYCLE + "test_a_service_that_another_one_needs_does_not_rest",
    ),
    Mutant(
        "nobody starts a service that was called while it began to rest",
        "_runtime/service_transitions.py",
        "_change(t, event.service, wanted=True)",
        "pass",
        LIFECYCLE + "test_a_service_that_is_wanted_while_it_ends_is_started_as_soon_as_it_has_ended",
    ),
    Mutant(
        "a call waits for a service that rests after the job was cancelled",
        "_runtime/transition.py",
        "or (rests and not self.may_wake(name))",
        "",
        LIFECYCLE + "test_the_end_of_a_job_refuses_the_calls_that_wait_for_a_service_that_rests",
    ),
    Mutant(
        "a drain does not start a service that rests",
        "_runtime/transition.py",
        "return not self.stopping or (self.job is JobState.DRAINING and not self",
        "return not self.stopping or (self.job is JobState.NEW and not self",
        LIFECYCLE + "test_a_drain_starts_a_service_that_rests_for_the_calls_on_their_way",
    ),
    Mutant(
        "a start in a drain goes on after the drain",
        "_runtime/transition.py",
        "self.bring_forward(name, min(late, self.deadline))",
        "self.bring_forward(name, self.deadline)",
        LIFECYCLE + "test_a_start_in_a_drain_ends_with_the_drain",
    ),
    Mutant(
        "a health check that runs is forgotten when a service is to rest",
        "_runtime/service_transitions.py",
        "                if _idle(record):\n                    _rest_or_watch(t, event.service)\n",
        "                _rest_or_watch(t, event.service)\n",
        LIFECYCLE + "test_a_health_check_that_runs_is_waited_for_before_a_service_rests",
    ),
    Mutant(
        "a replica that waits for its restart counts as lost",
        "_runtime/service_transitions.py",
        "return record.again or record.state in (S.REGISTERED, S.STARTING, S.READY, S.BACKOFF)",
        "return record.state in (S.REGISTERED, S.READY)",
        LIFECYCLE + "test_a_job_fails_when_fewer_replicas_are_left_than_it_needs",
    ),
    Mutant(
        "a circle of services that was seen is waited for",
        "_runtime/service_transitions.py",
        "if not t.needs(event.requires, event.service):",
        "if True:",
        LIFECYCLE + "test_services_that_call_each_other_do_not_wait_for_each_other",
    ),
    Mutant(
        "a later stop lengthens the deadline",
        "_runtime/transition.py",
        "if self.deadline <= deadline:",
        "if self.deadline > deadline:",
        LIFECYCLE + "test_the_deadline_only_moves_forward",
    ),
    Mutant(
        "a weaker stop takes the place of a stronger one",
        "_runtime/transitions.py",
        "if way is not None and event.way <= way:",
        "if way is not None and event.way == way:",
        LIFECYCLE + "test_the_deadline_only_moves_forward",
    ),
    Mutant(
        "the services have no reserve of the budget",
        "_runtime/transition.py",
        "tasks_s = budget - reserve if self.services else budget",
        "tasks_s = budget",
        LIFECYCLE + "test_services_have_their_reserve_of_the_budget",
    ),
    Mutant(
        "a drain never becomes a cancel",
        "_runtime/transitions.py",
        "is JobState.DRAINING and until >= t.drain_due:",
        "is JobState.DRAINING and until > t.deadline:",
        LIFECYCLE + "test_a_drain_that_takes_too_long_becomes_a_cancel_and_then_gives_up",
    ),
    Mutant(
        "pipelines that answer requests end with the sources",
        "_runtime/transitions.py",
        "t.stop_sources(lambda plan: not plan.serving)",
        "t.stop_sources(lambda plan: True)",
        LIFECYCLE + "test_drain_lets_what_is_in_flight_arrive",
    ),
    Mutant(
        "the answer of an earlier incarnation counts",
        "_runtime/service_transitions.py",
        "if record.incarnation != event.incarnation or record.state in",
        "if record.state in",
        LIFECYCLE + "test_what_an_abandoned_hook_says_later_counts_for_nothing",
    ),
    Mutant(
        "the answer of an abandoned hook counts",
        "_runtime/service_transitions.py",
        "            if record.hook == event.hook:\n                _take_hook(t, event)",
        "            _take_hook(t, event)",
        LIFECYCLE + "test_what_an_abandoned_hook_says_later_counts_for_nothing",
    ),
    Mutant(
        "a service is restarted once more than the limit",
        "_runtime/service_transitions.py",
        "len(_recent_restarts(t, name)) < options.restarts_max",
        "len(_recent_restarts(t, name)) <= options.restarts_max",
        LIFECYCLE + "test_a_failing_start_is_tried_again_with_growing_pauses_up_to_the_limit",
    ),
    Mutant(
        "restarts outside the window still count",
        "_runtime/service_transitions.py",
        ".restarts if at > since)",
        ".restarts if at > 0)",
        LIFECYCLE + "test_restarts_outside_the_window_are_forgotten",
    ),
    Mutant(
        "the pause before a restart does not grow",
        "_runtime/service_transitions.py",
        "min(first * 2.0 ** min(len(recent), 64), longest)",
        "min(first, longest)",
        LIFECYCLE + "test_a_failing_start_is_tried_again_with_growing_pauses_up_to_the_limit",
    ),
    Mutant(
        "a restart begins after the stop began",
        "_runtime/service_transitions.py",
        "        if not t.stopping:\n            start_service(t, name)",
        "        start_service(t, name)",
        LIFECYCLE + "test_no_restart_begins_after_stopping_began",
    ),
    Mutant(
        "each hook of a start has the whole bound for itself",
        "_runtime/service_transitions.py",
        "_run_hook(t, name, hook, record.start_due)\n\n\ndef _next_try",
        "_run_hook(t, name, hook, t.now + t.start.service_plans[name].options.start_timeout_s)\n\n\ndef _next_try",
        LIFECYCLE + "test_a_start_hook_that_hangs_is_abandoned_and_the_service_cleaned",
    ),
    Mutant(
        "a start that failed looks like an orderly end",
        "_runtime/service_transitions.py",
        "_worsen(t, name, S.FAILED_START)",
        "_worsen(t, name, S.STOPPED)",
        LIFECYCLE + "test_a_failing_start_ends_the_job",
    ),
    Mutant(
        "a hook that raised keeps the next one from running",
        "_runtime/service_transitions.py",
        "            _worsen(t, name, S.CLEANUP_FAILED)\n        _next_stop_hook(t, name, event.hook)",
        "            _worsen(t, name, S.CLEANUP_FAILED)\n            return _end_service(t, name)\n"
        "        _next_stop_hook(t, name, event.hook)",
        LIFECYCLE + "test_a_hook_that_raises_keeps_nothing_else_from_being_cleaned",
    ),
    Mutant(
        "a better end takes the place of a worse one",
        "_runtime/service_transitions.py",
        "if WORSE.index(goal) > WORSE.index(t.services[name].goal):",
        "if goal is not t.services[name].goal:",
        LIFECYCLE + "test_a_death_during_the_start_is_a_failing_start",
    ),
    Mutant(
        "hooks run on a service whose process has died",
        "_runtime/service_transitions.py",
        'hook=None, due=None, hooks=record.hooks & {"exit"}, has_died=True)',
        "hook=None, due=None, has_died=True)",
        LIFECYCLE + "test_a_death_during_the_start_is_a_failing_start",
    ),
    Mutant(
        "a service that died is drained like one that lives",
        "_runtime/service_transitions.py",
        '    if t.services[name].has_died:\n        _next_stop_hook(t, name, "cleanup")\n        return\n',
        "",
        LIFECYCLE + "test_a_death_fails_the_job_and_no_hook_but_exit_runs",
    ),
    Mutant(
        "a death that is told twice counts twice",
        "_runtime/service_transitions.py",
        'if record.hook != "exit" and not record.has_died:',
        "if not record.has_died:",
        LIFECYCLE + "test_a_death_during_the_exit_is_the_exit",
    ),
    Mutant(
        "calls of a service that is restarted are refused",
        "_runtime/service_transitions.py",
        "t.do(ActionKind.HOLD_CALLS if again else ActionKind.REFUSE_CALLS, name)",
        "t.do(ActionKind.REFUSE_CALLS, name)",
        LIFECYCLE + "test_a_service_that_died_is_restarted_while_its_calls_wait",
    ),
    Mutant(
        "a hook may be extended without a limit",
        "_runtime/service_transitions.py",
        "more_s = min(seconds, EXTENSION_MAX_S - record.extended_s)",
        "more_s = seconds",
        LIFECYCLE + "test_a_hook_may_take_longer_if_it_asks_up_to_a_limit",
    ),
    Mutant(
        "the extension of one hook does not move the end of the start",
        "_runtime/service_transitions.py",
        "due=due, start_due=record.start_due + more_s,",
        "due=due, start_due=record.start_due,",
        LIFECYCLE + "test_a_hook_may_take_longer_if_it_asks_up_to_a_limit",
    ),
    Mutant(
        "late hooks leave nothing of the budget to the exit",
        "_runtime/service_transitions.py",
        "        after += 1\n    left",
        "        after += 0\n    left",
        LIFECYCLE + "test_the_last_service_leaves_its_own_exit_some_time",
    ),
    Mutant(
        "a service in a process is over before its process",
        "_runtime/service_transitions.py",
        'elif "exit" in record.hooks:\n        t.move_service',
        'elif "exit" in record.hooks and last == "":\n        t.move_service',
        LIFECYCLE + "test_the_process_ends_last",
    ),
    Mutant(
        "the third Ctrl-C leaves processes behind",
        "_runtime/service_transitions.py",
        'has_exit = "exit" in record.hooks\n',
        "has_exit = False\n",
        LIFECYCLE + "test_kill_ends_processes_at_once_and_waits_for_them",
    ),
    Mutant(
        "an exit that runs is not hurried",
        "_runtime/transition.py",
        '        if record.hook == "exit":\n            self.do(ActionKind.HURRY_EXIT',
        '        if record.hook == "stop":\n            self.do(ActionKind.HURRY_EXIT',
        LIFECYCLE + "test_an_exit_that_runs_is_hurried_by_a_kill_and_never_by_more_than_the_budget",
    ),
    Mutant(
        "a kept service that failed is handed on",
        "_runtime/service_transitions.py",
        "elif record.state is S.READY and _idle(record) and _may_stay(t, name):",
        "elif record.state in (S.READY, S.DEGRADED) and _idle(record) and t.start.service_plans[name].keep:",
        LIFECYCLE + "test_an_unhealthy_kept_service_is_cleaned_and_not_kept",
    ),
    Mutant(
        "a job is sealed while a service still ends",
        "_runtime/transitions.py",
        "if t.tally.services_left == 0:\n        t.move_job(JobState.SEALED)",
        "if t.tally.services_left <= 1:\n        t.move_job(JobState.SEALED)",
        LIFECYCLE + "test_the_end_of_the_sources_stops_services_in_strict_reverse",
    ),
    Mutant(
        "what ended in time is late because the supervisor is",
        "_runtime/transitions.py",
        "_expire(t, now if happened_at is None else min(happened_at, now))",
        "_expire(t, now)",
        GROWTH + "test_what_ended_in_time_is_not_late_because_the_supervisor_is",
    ),
    Mutant(
        "a deadline that was moved still counts",
        "_runtime/transition.py",
        "return (self.tasks[name] if is_task else self.services[name]).due == at",
        "return (self.tasks[name] if is_task else self.services[name]).due is not None",
        LIFECYCLE + "test_a_close_that_hangs_is_bounded_each",
    ),
)

HOSTS = (
    Mutant(
        "the drain of a serial gate does not wait",
        "_hosts/gate.py",
        "        if not self._lock.acquire(timeout=max(timeout_s, 0)):\n"
        "            return False\n"
        "        self._lock.release()\n"
        "        return True",
        "        return True",
        GATES + "test_a_drain_says_whether_a_call_still_runs",
    ),
    Mutant(
        "a coroutine that is cancelled does not pass its turn on",
        "_hosts/gate.py",
        "                    elif self._awaiting:\n                        self._wake_one()",
        "                    elif not self._awaiting:\n                        self._wake_one()",
        GATES + "test_one_that_is_cancelled_when_its_turn_has_come_passes_it_on",
    ),
    Mutant(
        "a coroutine that is cancelled stays in the queue",
        "_hosts/gate.py",
        "                        self._awaiting.remove(place)\n",
        "                        pass\n",
        GATES + "test_one_that_is_cancelled_while_it_waits_takes_no_turn_of_another",
    ),
    Mutant(
        "a gate that closes does not wake the threads that wait",
        "_hosts/gate.py",
        "            self.is_open = False\n            self._changed.notify_all()\n",
        "            self.is_open = False\n",
        GATES + "test_a_thread_that_waits_for_its_place_gets_it_or_hears_of_the_close",
    ),
    Mutant(
        "a gate that closes does not wake the coroutines that wait",
        "_hosts/gate.py",
        "            while self._awaiting:\n                self._wake_one()\n",
        "",
        GATES + "test_coroutines_that_wait_are_sent_away_when_the_gate_closes",
    ),
    Mutant(
        "a drain that waits does not hear of the last call",
        "_hosts/gate.py",
        "        if self._waiting:\n            self._changed.notify_all()",
        "        if self._waiting > 1:\n            self._changed.notify_all()",
        GATES + "test_a_drain_hears_of_the_end_of_the_last_call",
    ),
    Mutant(
        "a gate lets one coroutine more through than its limit",
        "_hosts/gate.py",
        "or len(self._running) < self._calls_max:",
        "or len(self._running) <= self._calls_max:",
        GATES + "test_coroutines_wait_for_their_place_in_order",
    ),
    Mutant(
        "a gate lets one thread more through than its limit",
        "_hosts/gate.py",
        "if len(self._running) < calls_max:",
        "if len(self._running) <= calls_max:",
        GATES + "test_a_thread_that_waits_for_its_place_gets_it_or_hears_of_the_close",
    ),
    Mutant(
        "a service that calls itself waits for its own place",
        "_hosts/gate.py",
        "if self._calls_max is None or me in self._running:",
        "if self._calls_max is None:",
        GATES + "test_a_service_that_calls_itself_gets_through_and_keeps_its_place",
    ),
    Mutant(
        "the return of an inner call frees the place of the outer one",
        "_hosts/gate.py",
        "self._running[me] = self._running.get(me, 0) + 1",
        "self._running[me] = 1",
        GATES + "test_a_service_that_calls_itself_gets_through_and_keeps_its_place",
    ),
    Mutant(
        "a call that raised keeps its place",
        "_hosts/gate.py",
        "            finally:\n                with self._lock:\n                    self._leave(me)\n",
        "            else:\n                with self._lock:\n                    self._leave(me)\n",
        GATES + "test_calls_and_errors_are_counted_and_free_their_place",
    ),
    Mutant(
        "an orphan does not wait for the calls that run",
        "_remote/process.py",
        "        if not self._wait_over(max(due - time.monotonic(), 0) / 2):\n"
        '            errors.append("a call or hook was still running")\n',
        "",
        ORPHANS + "test_an_orphan_waits_for_a_call_that_runs_before_its_stop",
    ),
    Mutant(
        "an orphan never hears that its last call has ended",
        "_remote/process.py",
        "self._running -= 1\n",
        "self._running -= 0\n",
        ORPHANS + "test_the_stop_of_an_orphan_follows_the_end_of_its_last_call",
    ),
    Mutant(
        "an orphan stops although it was never set up",
        "_remote/process.py",
        ' and (hook == "cleanup" or self._is_ready_to_stop()):',
        ":",
        ORPHANS + "test_an_orphan_that_was_not_set_up_is_cleaned_and_not_stopped",
    ),
    Mutant(
        "an orphan repeats a hook that has begun",
        "_remote/process.py",
        "if hook in hooks and hook not in self._begun and",
        "if hook in hooks and",
        ORPHANS + "test_an_orphan_repeats_no_hook_that_the_driver_has_begun",
    ),
    Mutant(
        "a site without a master stops a service that was never set up",
        "_ray/site.py",
        "            return False\n        return hook ==",
        "            pass\n        return hook ==",
        ORPHANS + "test_a_site_that_was_not_set_up_is_cleaned_and_not_stopped",
    ),
    Mutant(
        "a site without a master repeats a hook that has begun",
        "_ray/site.py",
        'return hook == "exit" or (*place, hook) not in self._once',
        "return True",
        ORPHANS + "test_a_site_repeats_no_hook_that_its_master_has_begun",
    ),
    Mutant(
        "an orphan ends without its stop",
        "_remote/process.py",
        "        if not self._is_told:\n            self._be_orphan()\n",
        "",
        ORPHANS + "test_an_orphan_stops_by_itself_when_the_guardian_is_gone_too",
    ),
    Mutant(
        "a hook begins that nobody waits for any more",
        "_remote/process.py",
        '        if time.monotonic() > due:\n            raise TimeoutError(f"{hook} could not begin in time")\n',
        "",
        ORPHANS + "test_no_hook_begins_that_nobody_waits_for_any_more",
    ),
    Mutant(
        "the link stays open when the process of a service ends",
        "_hosts/process.py",
        "            if self._link is not None:\n                self._link.shut()",
        "            if self._link is not None:\n                self._link._free()",
        PROCESSES + "test_a_required_service_whose_process_died_fails_the_job[fork]",
    ),
    Mutant(
        "calls of a service whose process died are refused at once",
        "_hosts/process.py",
        "            else:\n                self.hold()",
        "            else:\n                self.refuse()",
        PROCESSES + "test_a_service_whose_process_died_is_restarted[_exit]",
    ),
    Mutant(
        "a start that was given up gets its process",
        "_hosts/process.py",
        "if incarnation <= self._given_up:",
        "if incarnation < self._given_up:",
        PROCESSES + "test_a_start_that_is_given_up_before_it_has_a_process_gets_none",
    ),
    Mutant(
        "the wake-up descriptor of the program is not put back",
        "_runtime/interrupts.py",
        "            signal.set_wakeup_fd(self._wakeup_before)",
        "            pass",
        "tests/faults/test_interrupts.py::test_the_programs_own_wakeup_descriptor_hears_of_signals_and_is_put_back",
    ),
    Mutant(
        "the wake-up descriptor of the program hears of no signals",
        "_runtime/interrupts.py",
        "if self._wakeup_before != -1:",
        "if self._wakeup_before == -1:",
        "tests/faults/test_interrupts.py::test_the_programs_own_wakeup_descriptor_hears_of_signals_and_is_put_back",
    ),
    Mutant(
        "a reused pid is hit",
        "_processes.py",
        "    if is_alive(one):\n        return descriptor",
        "    if process(one.pid) is not None:\n        return descriptor",
        "tests/hosts/test_guardian.py::test_a_reused_pid_is_never_hit",
    ),
)

MORE_RULES = (
    Mutant(
        "a counter tells of anything but zero",
        "_runtime/channel.py",
        "is_zero = self._count == 0",
        "is_zero = self._count != 0",
        CHANNEL + "test_a_counter_tells_of_zero_and_of_nothing_else",
    ),
    Mutant(
        "a producer that has put by force still waits for room",
        "_runtime/channel.py",
        "            self._waiting.pop(wake, None)\n            for counter",
        "            for counter",
        CHANNEL + "test_one_that_waits_no_more_takes_no_wake_up_of_another",
    ),
    Mutant(
        "a producer that has given up still waits for room",
        "_runtime/channel.py",
        "        with self._lock:\n            self._waiting.pop(wake, None)\n            next_one",
        "        with self._lock:\n            next_one",
        CHANNEL + "test_one_that_waits_no_more_takes_no_wake_up_of_another",
    ),
    Mutant(
        "a channel that grows wakes nobody",
        "_runtime/channel.py",
        "            self.portion = _portion(records)\n            next_one = self._next_waiting()",
        "            self.portion = _portion(records)\n            next_one = None",
        CHANNEL + "test_a_channel_that_grows_wakes_the_first_that_waits",
    ),
    Mutant(
        "a batch that is cut loses a record",
        "_runtime/channel.py",
        "element.slice(0, fitting), element.slice(fitting)",
        "element.slice(0, fitting), element.slice(fitting + 1)",
        CHANNEL + "test_a_batch_is_cut_where_it_is_put_and_the_rest_comes_back",
    ),
    Mutant(
        "feedback is cut, and waits for itself",
        "_runtime/channel.py",
        "if isinstance(element, Batch) and not force:",
        "if isinstance(element, Batch):",
        CHANNEL + "test_a_batch_is_cut_where_it_is_put_and_the_rest_comes_back",
    ),
    Mutant(
        "a service that fails while it starts is not told of",
        "_runtime/service_transitions.py",
        "        _start_failed(t, name, FailureKind.FAILED, text=event.text)\n",
        '        _next_stop_hook(t, name, "stop")\n',
        LIFECYCLE + "test_a_service_that_fails_while_it_starts_fails_the_start",
    ),
    Mutant(
        "calls of a service that failed still go to it",
        "_runtime/service_transitions.py",
        "if trouble in (FailureKind.DIED, FailureKind.FAILED):",
        "if trouble is FailureKind.DIED:",
        LIFECYCLE + "test_calls_of_a_service_that_failed_are_refused_and_those_of_an_unhealthy_one_are_not",
    ),
    Mutant(
        "a failure of a service that ends counts",
        "_runtime/service_transitions.py",
        "    elif record.state is S.READY:\n        _service_failed(t, name, FailureKind.FAILED",
        "    else:\n        _service_failed(t, name, FailureKind.FAILED",
        LIFECYCLE + "test_a_failure_while_the_service_ends_changes_nothing",
    ),
    Mutant(
        "any failure of a service takes those of its callers along",
        "_runtime/transitions.py",
        "is_death = failure.trouble is FailureKind.DIED and failure.counts",
        "is_death = failure.counts",
        LIFECYCLE + "test_a_task_that_fails_because_of_an_unhealthy_service_is_a_second_failure",
    ),
    Mutant(
        "a second instance is built beside one that hangs",
        "_runtime/service_transitions.py",
        'again = "exit" in record.hooks and _may_restart(t, name)',
        "again = _may_restart(t, name)",
        LIFECYCLE + "test_a_start_that_hangs_on_a_thread_is_not_tried_again_and_fails_the_job_at_once",
    ),
    Mutant(
        "a late start fails the job only after its cleanup",
        "_runtime/service_transitions.py",
        "        _worsen(t, name, end)\n    if required and not again:\n        t.fail_job()\n",
        "        _worsen(t, name, end)\n",
        LIFECYCLE + "test_a_start_that_hangs_on_a_thread_is_not_tried_again_and_fails_the_job_at_once",
    ),
    Mutant(
        "the kill of a late start is told a second time",
        "_runtime/service_transitions.py",
        "if end is S.KILLED or not again:",
        "if not again:",
        LIFECYCLE + "test_a_process_that_was_ended_for_its_late_start_is_told_once",
    ),
    Mutant(
        "what a process left behind is not told",
        "_runtime/service_transitions.py",
        "if event.value.left or record.goal is not S.KILLED:",
        "if record.goal is not S.KILLED:",
        LIFECYCLE + "test_what_a_process_left_behind_is_told_beside_the_hook_that_was_late",
    ),
    Mutant(
        "an end that nobody could see counts as a good one",
        "_runtime/service_transitions.py",
        "event.value.unknown and not record.has_died:",
        "event.value.unknown and record.has_died:",
        LIFECYCLE + "test_an_end_that_nobody_could_see_is_a_failure_of_the_cleanup",
    ),
    Mutant(
        "a service is kept without those that it needs",
        "_runtime/service_transitions.py",
        "t.services[other].state is S.READY and t.stays[other] for other in live",
        "t.services[other].state is S.READY for other in live",
        LIFECYCLE + "test_a_service_is_kept_only_with_those_that_it_needs",
    ),
    Mutant(
        "a dependency that is seen late makes no room for the caller",
        "_runtime/transitions.py",
        " or t.seen is not t.start.seen",
        "",
        LIFECYCLE + "test_a_dependency_that_is_seen_while_a_probe_holds_up_the_stop_makes_room_for_the_caller",
    ),
    Mutant(
        "the group of a folder may read the journal",
        "_guardian/journal.py",
        "elif found.st_mode & 0o077:",
        "elif found.st_mode & 0o007:",
        JOURNAL + "test_a_folder_that_anybody_else_may_enter_is_refused",
    ),
    Mutant(
        "a line is glued to one that was torn",
        "_guardian/journal.py",
        'data = (b"\\n" if self._is_torn else b"") + line + b"\\n"',
        'data = line + b"\\n"',
        JOURNAL + "test_what_did_not_fit_is_a_line_of_its_own_and_what_follows_is_read",
    ),
    Mutant(
        "a line that was torn counts as written",
        "_guardian/journal.py",
        '        if written < len(data):\n            raise OSError(f"{written} of {len(data)} bytes were written")\n',
        "",
        JOURNAL + "test_what_did_not_fit_is_a_line_of_its_own_and_what_follows_is_read",
    ),
    Mutant(
        "a journal that was cut is in place",
        "_guardian/journal.py",
        " and found.st_size >= self._bytes_count",
        "",
        JOURNAL + "test_a_journal_that_was_cut_or_removed_is_not_in_place",
    ),
    Mutant(
        "claims are carried out in the order of their making",
        "_guardian/journal.py",
        "for claim in reversed(self.claims) if",
        "for claim in self.claims if",
        JOURNAL + "test_the_claims_of_a_service_are_due_in_reverse",
    ),
    Mutant(
        "the journal forgets a job that others share a service with",
        "_guardian/journal.py",
        "    over -= {owner for (job, _), owner in run.owners.items() if job not in over}\n",
        "",
        JOURNAL + "test_a_job_is_forgotten_when_it_is_sealed_and_keeps_nothing",
    ),
    Mutant(
        "the journal forgets a job whose service is kept",
        "_guardian/journal.py",
        'return self.is_sealed and all(service.state != "kept" for service in self.services.values())',
        "return self.is_sealed",
        JOURNAL + "test_a_job_is_forgotten_when_it_is_sealed_and_keeps_nothing",
    ),
    Mutant(
        "a late answer is taken for that of the next request",
        "_remote/rpc.py",
        "        except TimeoutError:\n            self._drop(connection)\n            raise\n",
        "        except TimeoutError:\n            self._keep(connection, None)\n            raise\n",
        LINKS + "test_a_late_answer_is_given_to_nobody",
    ),
    Mutant(
        "a link that is shut leaves its requests waiting",
        "_remote/rpc.py",
        "            self._closed = True\n"
        "            for connection in self._all:\n"
        "                connection.shut()\n",
        "            self._closed = True\n",
        LINKS + "test_a_request_that_waits_hears_that_the_link_was_shut",
    ),
    Mutant(
        "nobody hears that the other side of a link has gone",
        "_remote/rpc.py",
        "            self._socket.close()\n        self._on_closed()\n",
        "            self._socket.close()\n",
        LINKS + "test_a_request_that_waits_hears_that_the_link_was_shut",
    ),
    Mutant(
        "a request that has no answer is answered",
        "_remote/rpc.py",
        "        leave_if_forked()\n        if not is_asked:\n            return None\n",
        "",
        LINKS + "test_what_has_no_answer_takes_none_of_another",
    ),
    Mutant(
        "more connections are kept than the limit",
        "_remote/rpc.py",
        " and len(self._idle) < IDLE_MAX:",
        ":",
        LINKS + "test_no_more_connections_are_kept_than_the_limit",
    ),
)

TASKS = (
    Mutant(
        "a process has ended before its host was told",
        "_hosts/child_process.py",
        "        self._on_end()\n        self._ended.set()\n",
        "        self._ended.set()\n        self._on_end()\n",
        OWN_PROCESSES + "test_whoever_waits_for_the_end_goes_on_when_it_was_told",
    ),
    Mutant(
        "a process that has ended is asked to end",
        "_hosts/child_process.py",
        "        if not ended_before:\n            ask()",
        "        ask()\n        if not ended_before:",
        OWN_PROCESSES + "test_a_process_that_has_ended_is_not_asked",
    ),
    Mutant(
        "a process that ended by itself counts as killed",
        "_hosts/child_process.py",
        "was_killed=not by_itself,",
        "was_killed=by_itself,",
        OWN_PROCESSES + "test_a_process_that_ends_when_it_is_asked_is_not_killed",
    ),
    Mutant(
        "a later word delays an end that was hurried",
        "_hosts/child_process.py",
        "self._due = min(self._due, time.monotonic() + seconds)",
        "self._due = time.monotonic() + seconds",
        OWN_PROCESSES + "test_an_end_that_runs_can_be_hurried_and_not_delayed",
    ),
    Mutant(
        "an end that is hurried sleeps on",
        "_hosts/child_process.py",
        "                self._grace.shorten(self._due - seconds * KILL_SHARE)\n"
        "            self._hurried.notify_all()\n",
        "                self._grace.shorten(self._due - seconds * KILL_SHARE)\n",
        OWN_PROCESSES + "test_an_end_that_runs_can_be_hurried_and_not_delayed",
    ),
    Mutant(
        "a task ends with the first of its producers",
        "_runtime/input.py",
        "            if self.producers == 0:\n                self.has_ended = True",
        "            if self.producers >= 0:\n                self.has_ended = True",
        ENDS + "test_a_comap_of_uneven_inputs_ends_with_the_longer_one",
    ),
    Mutant(
        "the end of a stream is not counted",
        "_runtime/input.py",
        "            self.producers -= 1\n",
        "",
        ENDS + "test_a_comap_of_uneven_inputs_ends_with_the_longer_one",
    ),
    Mutant(
        "a loop is over before its records are",
        "_runtime/input.py",
        "        if self.inbox.counters:\n            self.unsettled += 1\n",
        "",
        "tests/stream/test_loops.py::test_a_loop_ends_when_its_data_die_out",
    ),
    Mutant(
        "a loop never hears that a record is done with",
        "_runtime/input.py",
        "                counter.add(-count)",
        "                counter.add(count)",
        "tests/stream/test_loops.py::test_a_loop_ends_when_its_data_die_out",
    ),
    Mutant(
        "the functions of a failed task are not closed",
        "_runtime/task.py",
        "            if self.phase is not Phase.CLOSING:\n"
        "                self._drop()\n"
        "                self.phase = Phase.CLOSING\n"
        "            return Step.PROGRESSED",
        "            if self.phase is not Phase.CLOSING:\n"
        "                self._drop()\n"
        "                self._closed = len(self.operators)\n"
        "                self.phase = Phase.CLOSING\n"
        "            return Step.PROGRESSED",
        ENDS + "test_a_sink_is_closed_after_a_failure_of_its_own",
    ),
    Mutant(
        "a parked thread is not woken",
        "_backends/pool.py",
        "            self._is_parked = False\n            self._doorbell.ring()\n            return 0",
        "            self._is_parked = False\n            return 0",
        POOLS + "test_a_branch_that_waits_keeps_no_other_branch_from_going_on",
    ),
    Mutant(
        "a guard ends with the first job that releases it",
        "_guardian/lease.py",
        "                cls._current._users_count += 1\n",
        "                pass\n",
        GUARDIANS + "test_a_guard_is_counted",
    ),
    Mutant(
        "what a service released is ended with it",
        "_guardian/job_journal.py",
        "return found - with_descendants(guard.released(), found)",
        "return found",
        GUARDIANS + "test_what_is_left_of_a_service_does_not_count_what_it_released",
    ),
)

ALIGNING = "tests/durable/test_aligning_channel.py::"
CHECKPOINTS = "tests/durable/test_checkpoints.py::"
FOLDER = "tests/durable/test_folder.py::"
KEYED = "tests/durable/test_keyed_state.py::"
STATE = "tests/durable/test_function_state.py::"
TTL = "tests/durable/test_ttl.py::"
LOOPS = "tests/durable/test_recovery.py::test_records_on_their_way_round_a_loop_are_in_the_checkpoint[0]"
RECOVERY = "tests/durable/test_recovery.py::test_recovered_equals_undisturbed[0]"

DURABLE: tuple[Mutant, ...] = (
    Mutant(
        "a durable channel lets records pass a barrier that others still wait for",
        "_runtime/aligning_channel.py",
        "            if wake in self._ahead and not self._closed:\n",
        "            if wake in self._ahead and self._closed:\n",
        ALIGNING + "test_records_behind_a_barrier_come_after_that_of_the_slowest",
    ),
    Mutant(
        "a producer that is ahead uses up the room of the others",
        "_runtime/aligning_channel.py",
        "self._held_records >= self._capacity_records",
        "self._records > 0",
        ALIGNING + "test_what_is_held_back_does_not_use_up_the_room_of_those_behind",
    ),
    Mutant(
        "a task closes before its last part is in a checkpoint",
        "_runtime/checkpoints.py",
        "covered=state.ended - state.given",
        "covered=state.ended",
        CHECKPOINTS + "test_a_task_that_ended_after_its_part_is_covered_by_the_next_checkpoint",
    ),
    Mutant(
        "a sink commits before the checkpoint is whole",
        "_operators/transactions.py",
        "            self._prepared[number] = token\n",
        "            self._prepared[number] = token\n            self._sink.commit(token)\n",
        FOLDER + "test_a_sink_commits_after_the_checkpoint_is_on_the_disk",
    ),
    Mutant(
        "a transaction is not committed again after a crash",
        "_operators/transactions.py",
        "() if recovery.is_settled else recovery.state or ()",
        "()",
        RECOVERY,
    ),
    Mutant(
        "a run that has ended is committed again by the next one",
        "_operators/transactions.py",
        "() if recovery.is_settled else recovery.state or ()",
        "recovery.state or ()",
        "tests/durable/test_http.py::test_a_run_that_has_ended_sends_nothing_again",
    ),
    Mutant(
        "a checkpoint lacks the records that coroutines hold",
        "_operators/asynchronous.py",
        "return (self._has_keys, held) if held else None, -waiting",
        "return None, -waiting",
        RECOVERY,
    ),
    Mutant(
        "a checkpoint lacks the records that wait for a batch",
        "_operators/batched.py",
        "return self._held() or None, -self.held",
        "return None, -self.held",
        "tests/durable/test_recovery.py::test_records_that_wait_for_a_batch_are_in_the_checkpoint",
    ),
    Mutant(
        "a checkpoint counts records that wait as taken",
        "_runtime/durable_task.py",
        "held = waiting + operator.held",
        "held = waiting",
        "tests/durable/test_accounts.py::test_records_that_wait_are_not_lost",
    ),
    Mutant(
        "a run counts anew what earlier ones have taken",
        "_runtime/durable_run.py",
        "one.plus(self.before.get(name, Counts()))",
        "one",
        RECOVERY,
    ),
    Mutant(
        "a task that is cancelled before it has recovered forgets what waits there",
        "_runtime/durable_task.py",
        "return never_taken_in + ",
        "return ",
        "tests/durable/test_accounts.py::test_a_run_that_is_cancelled_at_its_start_leaves_everything_to_the_next",
    ),
    Mutant(
        "a checkpoint that loses records does not say so",
        "_runtime/durable_run.py",
        "one._replace(lost=lost[name])",
        "one",
        "tests/durable/test_accounts.py::test_a_record_that_a_checkpoint_loses_is_missed_in_all_later_runs",
    ),
    Mutant(
        "a source forgets what earlier runs have read",
        "_operators/sources.py",
        "count = self._read_before + self.metrics.records_in",
        "count = self.metrics.records_in",
        RECOVERY,
    ),
    Mutant(
        "a task passes a barrier on in the middle of a batch",
        "_runtime/durable_task.py",
        "        if not self.chain.stash:\n",
        "        if True:\n",
        "tests/durable/test_recovery.py::test_results_that_cannot_be_read_again_are_waited_for[build_unpicklable]",
    ),
    Mutant(
        "a record whose call was held back is forgotten",
        "_operators/operator.py",
        "        if self.left is None:\n            self.given_back",
        "        if self.left != 0:\n            self.given_back",
        "tests/durable/test_held_back.py::test_after_a_budget_the_next_run_asks_for_the_rest[threads-by_map]",
    ),
    Mutant(
        "records on their way round a loop are not in the checkpoint",
        "_runtime/durable_task.py",
        "first = self._row(self.operators[0], part.number, before)",
        "first = self._row(self.operators[0], part.number)",
        LOOPS,
    ),
    Mutant(
        "records that a loop's channel holds back do not count as in flight",
        "_runtime/aligning_channel.py",
        "            counter.add(1)\n",
        "            counter.add(0)\n",
        LOOPS,
    ),
    Mutant(
        "a loop ends before it has taken in what the last run left in flight",
        "_runtime/durable_run.py",
        "                    counter.add(1)\n",
        "                    counter.add(task.input.unsettled - 1)\n                task.input.unsettled = 0\n",
        "tests/durable/test_recovery.py::test_a_loop_goes_on_after_its_source_has_ended",
    ),
    Mutant(
        "results of a record that was cut in the middle come again",
        "_operators/per_record.py",
        "result, self._given, None)",
        "result, 0, None)",
        "tests/durable/test_recovery.py::test_a_record_with_many_results_is_cut_in_the_middle[0]",
    ),
    Mutant(
        "a function with a state gives its results again",
        "_operators/per_record.py",
        "return is_long and not self.takes_part and not self._has_states",
        "return is_long",
        "tests/durable/test_recovery.py::test_results_that_cannot_be_read_again_are_waited_for[build_counting]",
    ),
    Mutant(
        "a record that cannot be pickled is not waited for",
        "_runtime/durable_task.py",
        " and self._can_be_pickled()",
        "",
        "tests/durable/test_recovery.py::test_results_that_cannot_be_read_again_are_waited_for[build_unpicklable]",
    ),
    Mutant(
        "records behind one that was cut in the middle are lost",
        "_runtime/durable_task.py",
        "left = (*stashed, *(operator.left or ()), *before)",
        "left = (*(operator.left or ()), *before)",
        "tests/durable/test_recovery.py::test_a_record_with_many_results_is_cut_in_the_middle[0]",
    ),
    Mutant(
        "a checkpoint lacks the keys that changed",
        "_operators/keyed_state.py",
        "        self._to_write += self.young\n",
        "",
        KEYED + "test_any_checkpoint_loads_as_it_was",
    ),
    Mutant(
        "a checkpoint that is still needed is deleted",
        "_runtime/checkpoint_store.py",
        "first = oldest if needed is None else min(needed, oldest)",
        "first = oldest",
        KEYED + "test_any_checkpoint_loads_as_it_was",
    ),
    Mutant(
        "totals that went on come again",
        "_operators/keyed.py",
        "            self.keyed.settle()\n",
        "            pass\n",
        STATE + "test_totals_go_on_and_only_those_that_changed_come_again[threads-1]",
    ),
    Mutant(
        "totals come although the job was stopped",
        "_runtime/durable_task.py",
        "self.chain.gives_last = not self._is_stopping()",
        "self.chain.gives_last = True",
        STATE + "test_after_a_stop_totals_wait_for_the_end_of_the_stream",
    ),
    Mutant(
        "a function does not get its state back",
        "_operators/operator.py",
        "        self._function.restore(self.recovery.function)\n",
        "",
        STATE + "test_a_function_with_snapshot_and_restore_goes_on[threads]",
    ),
    Mutant(
        "a record that waited comes back by another input",
        "_operators/operator.py",
        "            self.left.append((self.port, batch))\n",
        "            self.left.append((0, batch))\n",
        "tests/durable/test_held_back.py::test_after_a_budget_the_next_run_asks_for_the_rest[threads-by_comap]",
    ),
    Mutant(
        "rows of a damaged checkpoint stay",
        "connectors/files.py",
        "int(number) > checkpoint",
        "int(number) > checkpoint + 9",
        FOLDER + "test_a_damaged_checkpoint_falls_back_to_the_one_before",
    ),
    Mutant(
        "rows with the value of the last one are lost",
        "connectors/tables.py",
        '(">=", self._seen)',
        '(">", self._seen)',
        "tests/durable/test_sqlite.py::test_rows_with_the_value_of_the_last_one_are_not_lost[2]",
    ),
    Mutant(
        "a repeated commit inserts its rows again",
        "connectors/tables.py",
        "sage_commits.checkpoint < excluded.checkpoint",
        "sage_commits.checkpoint <= excluded.checkpoint",
        "tests/durable/test_sinks.py::test_records_appear_with_the_commit_and_once[SqliteSink]",
    ),
    Mutant(
        "a repeated commit writes its messages again",
        "connectors/kafka.py",
        "self._known is None or number > self._known:",
        "self._known is None or number >= self._known:",
        "tests/durable/test_sinks.py::test_records_appear_with_the_commit_and_once[KafkaSink]",
    ),
    Mutant(
        "a commit that the servers have forgotten is made again",
        "connectors/kafka.py",
        "        if self.durable and self._known is None:\n            text",
        "        if False:\n            text",
        "tests/durable/test_kafka.py::test_a_commit_that_the_servers_have_forgotten_is_refused",
    ),
    Mutant(
        "messages of aborted transactions are read",
        "connectors/kafka.py",
        'else self._lost,\n                    isolation_level="read_committed",',
        'else self._lost,\n                    isolation_level="read_uncommitted",',
        "tests/durable/test_kafka.py::test_what_a_killed_program_had_sent_is_not_read",
    ),
    Mutant(
        "a repeated commit adds its entries again",
        "connectors/redis_streams.py",
        ">= number then return 0 end",
        "> number then return 0 end",
        "tests/durable/test_sinks.py::test_records_appear_with_the_commit_and_once[RedisStreamSink]",
    ),
    Mutant(
        "entries that were dropped unread are passed over",
        "connectors/redis_streams.py",
        "dropped <= self._last.read:",
        "True:",
        "tests/durable/test_redis_streams.py::test_entries_that_were_dropped_unread_are_missed",
    ),
    Mutant(
        "the lines after an open quote are lost",
        "connectors/csv.py",
        "                lines.seek(start)\n",
        "",
        "tests/durable/test_files.py::test_bad_lines_are_skipped_and_counted[1-an open quote]",
    ),
    Mutant(
        "a program that was taken for dead writes a checkpoint",
        "_runtime/checkpoint_store.py",
        "if epoch != self._epoch:",
        "if epoch < self._epoch:",
        FOLDER + "test_a_program_that_was_taken_for_dead_cannot_write",
    ),
    Mutant(
        "a line goes into whatever file has the number by now",
        "_descriptors.py",
        "        if not self.is_open:\n            raise OSError(errno.EBADF, os.strerror(errno.EBADF))\n",
        "",
        "tests/runtime/test_descriptors.py::test_a_report_is_not_written_into_a_file_of_the_program",
    ),
    Mutant(
        "every thread of a service is woken at once",
        "_backends/threads.py",
        "if not self._is_idle:",
        "if True:",
        "tests/runtime/test_lifecycle_growth.py::test_threads_of_services_do_not_crowd_around_the_interpreter",
    ),
)

STATES = (
    Mutant(
        "keys share the state that they begin with",
        "_operators/keyed.py",
        "else deepcopy(self._initial)",
        "else self._initial",
        "tests/stream/test_stateful.py::test_a_state_that_is_changed_in_place_belongs_to_one_key[threads-20]",
    ),
    Mutant(
        "keys share the default of an attribute",
        "state.py",
        "else deepcopy(self._default)",
        "else self._default",
        "tests/stream/test_states.py::test_a_default_that_is_changed_in_place_belongs_to_one_key[threads]",
    ),
    Mutant(
        "a checkpoint does not know that a list was changed in place",
        "state.py",
        "        value = self._young[place] = self._old",
        "        if place in self._old:\n            return self._old[place]\n"
        "        value = self._young[place] = self._old",
        "tests/durable/test_stateful.py::test_a_state_survives_crashes[process]",
    ),
    Mutant(
        "a key that was removed stays in the checkpoints",
        "_operators/keyed_state.py",
        "if value is not Removed.REMOVED}",
        "if key}",
        KEYED + "test_any_checkpoint_loads_as_it_was",
    ),
    Mutant(
        "a value ends between two looks at it",
        "state.py",
        "found.written_at <= self._at - self._ttl_s",
        "found.written_at <= self._now() - self._ttl_s",
        TTL + "test_a_value_does_not_end_between_two_looks_at_it_in_one_call",
    ),
    Mutant(
        "a value that was written again is removed",
        "state.py",
        "if found.written_at <= ended_at:",
        "if True:",
        TTL + "test_a_value_that_is_only_read_ends_and_one_that_is_written_lasts",
    ),
    Mutant(
        "after a clock was set back, a value stays for years",
        "state.py",
        "written_at=min(dated.written_at, self._at)",
        "written_at=dated.written_at",
        TTL + "test_a_clock_that_was_set_back_between_two_runs_keeps_a_value_for_its_time_and_no_longer",
    ),
    Mutant(
        "values that have ended stay in memory",
        "_operators/operator.py",
        "self.remove_ended(ENDED_VALUES_FACTOR * total)",
        "self.remove_ended(0)",
        TTL + "test_the_memory_of_a_job_that_is_not_durable_is_freed",
    ),
    Mutant(
        "finish works with the state of the last record's key",
        "_operators/per_record.py",
        "            self.forget_key()\n",
        "",
        "tests/stream/test_states.py::test_a_state_without_a_record_in_hand_is_refused[threads-Late]",
    ),
)

SCALES = (
    Mutant(
        "a call that woke up late slows down those behind it",
        "_bucket.py",
        "due_s = now_s + max(left_s, -LATE_MAX_S) if turn.has_waited else now_s",
        "due_s = now_s",
        "tests/hosts/test_rate.py::test_calls_that_begin_late_do_not_slow_down_those_behind_them",
    ),
    Mutant(
        "an old answer gives back the calls that began since",
        "_bucket.py",
        "missing = max(missing, (self._full_at - now_s) / self.unit_s)",
        "pass",
        "tests/services/test_limits.py::test_what_is_left_begins_at_once_and_the_rest_as_it_comes_back",
    ),
    Mutant(
        "calls on their way when a limit becomes known are forgotten",
        "_bucket.py",
        "missing += uncounted",
        "pass",
        "tests/services/test_limits.py::test_calls_on_their_way_when_a_limit_becomes_known_are_counted",
    ),
    Mutant(
        "a web request is answered before its checkpoint",
        "connectors/webhook.py",
        "        if not self._is_patient:\n            for one in read",
        "        if True:\n            for one in read",
        "tests/durable/test_webhook.py::test_an_answer_waits_for_the_checkpoint",
    ),
    Mutant(
        "a repeated commit sends with other keys",
        "connectors/http.py",
        "self._send(str(number), bodies, 0)",
        "self._send(self._run, bodies, 0)",
        "tests/durable/test_http.py::test_a_commit_that_is_repeated_has_the_same_keys",
    ),
    Mutant(
        "a bucket that vanished is taken for a file that was taken on from there",
        "connectors/places.py",
        " and not NO_BUCKET.search(text)",
        "",
        "tests/durable/test_objects.py::test_a_bucket_that_vanishes_before_the_commit_is_told",
    ),
    Mutant(
        "a client does not look at the limits in answers",
        "services/models/endpoint.py",
        "            self._learn(answer)\n",
        "",
        "tests/services/test_limits.py::test_a_server_that_tells_its_limits_refuses_nothing",
    ),
    Mutant(
        "calls begin until twice the budget is used",
        "_runtime/budget.py",
        "        if used >= limit:",
        "        if used >= 2 * limit + 10:",
        "tests/runtime/test_budget.py::test_a_token_budget_is_overshot_by_the_calls_in_flight_at_most[inline]",
    ),
    Mutant(
        "an answer on a cassette keeps its secrets",
        "_cassette.py",
        'pickled = pickled.replace(secret.encode(), b"*" * len(secret.encode()))',
        "pass",
        "tests/acceptance/test_cassettes.py::test_no_secret_is_in_the_file",
    ),
    Mutant(
        "the busiest replica gets the next call",
        "_hosts/replicas.py",
        "chosen = min(candidates",
        "chosen = max(candidates",
        "tests/hosts/test_replicas.py::test_calls_one_after_the_other_go_round",
    ),
    Mutant(
        "a successor does not get the keys of the old process",
        "_hosts/recycling.py",
        "replica.place, self._old.place = self._old.place, None",
        "replica.place, self._old.place = id(replica), None",
        "tests/hosts/test_recycling.py::test_keys_keep_together_when_their_process_is_recycled",
    ),
)

REMOVED = "tests/durable/test_removed.py::"
RESTARTS = "tests/runtime/test_task_restarts.py::"
AGAIN = "tests/durable/test_restarts.py::"

AGAIN_AND_AGAIN: tuple[Mutant, ...] = (
    Mutant(
        "a key counts as removed although its record may have failed",
        "_operators/keyed.py",
        "sum(one.failed for one in self.before) if self._states.unseen else 0",
        "0",
        REMOVED + "test_nothing_is_gone_if_a_record_failed_before_it_was_seen",
    ),
    Mutant(
        "a source goes on at its position, so that all that it had given counts as removed",
        "_runtime/durable_run.py",
        "not in self._restored.rows or is_read_anew:",
        "not in self._restored.rows:",
        REMOVED + "test_a_source_with_a_position_is_read_from_its_beginning_too",
    ),
    Mutant(
        "records that waited before they were compared count as new ones, although they may be gone",
        "_runtime/durable_run.py",
        "if node.name in self._before_changed:",
        "if not node.name:",
        REMOVED + "test_records_that_waited_in_it_are_read_again_and_not_kept",
    ),
    Mutant(
        "a removed key stays in memory",
        "_operators/keyed_state.py",
        "for key in self._removed:",
        "for key in ():",
        KEYED + "test_a_removed_key_leaves_the_memory_once_a_checkpoint_has_it",
    ),
    Mutant(
        "restarts have no limit",
        "_runtime/task_restarts.py",
        "len(self._recent(now)) < self.policy.restarts_max",
        "True",
        RESTARTS + "test_the_third_failure_within_the_window_fails_the_job",
    ),
    Mutant(
        "the error of a task, and everything that the task had, is kept after a restart",
        "_runtime/task_restarts.py",
        "return replace(self, causes=())",
        "return self",
        AGAIN + "test_the_tasks_before_a_restart_are_let_go",
    ),
    Mutant(
        "a restart of the tasks cancels hooks of services and their own calls",
        "_runtime/coroutines.py",
        "kinds = {True} if only_of_tasks else {False, True}",
        "kinds = {False, True}",
        AGAIN + "test_calls_of_tasks_are_cancelled_and_hooks_of_services_are_not",
    ),
    Mutant(
        "a cancel between the start of a coroutine and the wait for it is missed",
        "_runtime/coroutines.py",
        "if cancels != self._cancel_count[is_of_task]:",
        "if cancels < 0:",
        "tests/hosts/test_coroutine_methods.py::"
        "test_a_cancel_before_the_caller_knows_that_its_coroutine_was_started_is_not_missed",
    ),
    Mutant(
        "a call that waits for its service is given up before the service is back",
        "_runtime/transitions.py",
        "if t.job is JobState.RESTARTING and state.tally.services_unready:",
        "if t.now < 0:",
        RESTARTS + "test_a_task_whose_call_waits_for_a_service_has_its_time_once_the_service_is_there",
    ),
    Mutant(
        "tasks are made again although an old one may still write",
        "_runtime/transitions.py",
        "if any(record.state is TaskState.ABANDONED for record in t.tasks.values()):",
        "if not t.tasks:",
        RESTARTS + "test_a_task_that_does_not_end_might_still_write",
    ),
    Mutant(
        "new tasks find the instance of the user as the old ones left it",
        "_runtime/deployment.py",
        "(durable is None or durable.restart is None)",
        "(durable is None or True)",
        AGAIN + "test_an_instance_of_yours_is_copied_for_each_start",
    ),
    Mutant(
        "new tasks begin with the first checkpoint of the run",
        "_runtime/durable_run.py",
        "        self._go_on_from(event.restored)\n",
        "",
        AGAIN + "test_calls_that_a_checkpoint_has_are_not_made_again",
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *CHANNELS,
    *LIFECYCLES,
    *HOSTS,
    *MORE_RULES,
    *TASKS,
    *DURABLE,
    *AGAIN_AND_AGAIN,
    *STATES,
    *SCALES,
)
