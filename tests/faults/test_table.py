"""Which test tries which fault. A fault without a test, or a test that is not there, is a failure."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

FAULTS: dict[str, tuple[str, ...]] = {
    "1 the process ends at any operation of a save": ("faults/test_crashes.py::test_a_process_that_ends_at_any_operation",
                                                      "faults/test_whole_runs.py::test_training_that_ends_at_any_operation"),
    "2 … of a prune": ("faults/test_crashes.py::test_a_process_that_ends_at_any_operation",
                     "test_retention_property.py"),
    "3 … of a recovery": ("faults/test_crashes.py::test_a_process_that_ends_while_another_recovers_from_its_end",),
    "4 … of a signed save, of making a key": ("faults/test_crashes.py::test_a_process_that_ends_at_any_operation", "test_signing.py"),
    "5 SIGKILL at random instants": ("faults/test_kills.py::test_training_that_is_killed_again_and_again_comes_to_the_same_hash",
                                     "faults/test_kills.py::test_saves_that_are_killed_lose_nothing_acknowledged",
                                     "faults/test_kills.py::test_prunes_that_are_killed_keep_what_must_stay",
                                     "test_kill.py::test_killed_at_random_instants"),
    "6 SIGTERM in the middle of a step": ("test_failures.py::test_sigterm_saves_and_exits_with_143",),
    "7 SIGINT twice in a save": ("test_checkpoint.py::test_a_second_interrupt_inside_a_save_leaves_the_old",
                                 "test_failures.py::test_a_second_signal_stops_at_once"),
    "8 a power cut, all legal states of the disk": ("faults/test_power_cuts.py::test_nothing_that_was_promised_is_lost_in_a_power_cut",
                                                    "faults/test_whole_runs.py::test_training_whose_power_is_cut"),
    "9 each sync taken out": ("faults/test_mutants.py::test_every_mutant_is_found",),
    "10 the pointer before the data": ("faults/test_mutants.py::test_every_mutant_is_found",),
    "11 EIO at any write": ("faults/test_errors.py::test_any_operation_fails",),
    "12 EIO at any fsync": ("faults/test_errors.py::test_any_operation_fails",
                            "faults/test_errors.py::test_a_failed_sync_is_not_tried_again_on_the_same_file"),
    "13 EIO at the fsync of a folder": ("faults/test_errors.py::test_any_operation_fails",),
    "14 EIO on reading": ("faults/test_surroundings.py::test_a_disk_that_cannot_read_a_checkpoint",
                          "test_durable.py::test_an_error_while_reading_is_a_corrupt_file"),
    "15 ENOSPC at any write": ("faults/test_errors.py::test_any_operation_fails",
                               "test_durable.py::test_a_full_disk_names_what_was_needed"),
    "16 a disk that is really full": ("faults/test_surroundings.py::test_a_run_on_a_disk_that_is_really_full",
                                      "test_durable.py::test_a_disk_that_is_really_full"),
    "17 short writes": ("faults/test_errors.py::test_short_writes_change_nothing",
                        "faults/test_surroundings.py::test_a_limit_on_the_size_of_files"),
    "18 EDQUOT": ("faults/test_errors.py::test_any_operation_fails",),
    "19 EMFILE": ("faults/test_surroundings.py::test_no_descriptors_left", "faults/test_errors.py::test_any_operation_fails"),
    "20 a folder that is read-only": ("faults/test_surroundings.py::test_a_folder_that_is_read_only",),
    "21 EXDEV at a rename": ("faults/test_errors.py::test_any_operation_fails",),
    "22 EBUSY, ESTALE at a rename": ("faults/test_errors.py::test_a_rename_that_is_refused_for_a_moment",),
    "23 EINTR": ("faults/test_surroundings.py::test_signals_that_interrupt_every_call", "faults/test_errors.py::test_any_operation_fails",
                 "test_durable.py::test_signals_during_a_write_are_not_seen"),
    "24 MemoryError at any place": ("faults/test_errors.py::test_memory_runs_out_at_any_operation",
                                    "faults/test_surroundings.py::test_any_allocation_of_python_fails"),
    "25 RLIMIT_AS in a save": ("faults/test_surroundings.py::test_no_memory_left_while_saving",),
    "26 a bit flipped in the tensors": ("faults/test_damage.py::test_a_checkpoint_with_any_bit_flipped_is_never_used",
                                        "faults/test_damage.py::test_a_trained_checkpoint_with_any_byte_spoilt_is_never_used"),
    "27 … in latest.json": ("faults/test_damage.py::test_a_damaged_pointer_costs_no_checkpoint",),
    "28 … in metadata and configuration": ("faults/test_damage.py::test_damaged_metadata_bring_back_no_other_state",
                                           "faults/test_damage.py::test_a_resumed_run_comes_to_the_same_hash_over_any_damage",
                                           "faults/test_damage.py::test_a_damaged_tokenizer_is_not_trained_on"),
    "29 … in a signature": ("test_signing.py::test_every_flipped_byte_is_found",),
    "30 each file cut at every length": ("faults/test_damage.py::test_a_checkpoint_of_any_other_length_is_never_used",
                                         "faults/test_damage.py::test_a_resumed_run_comes_to_the_same_hash_over_any_damage"),
    "31 a file of zeros": ("faults/test_damage.py::test_a_checkpoint_of_any_other_length_is_never_used",),
    "32 files of another epoch": ("faults/test_damage.py::test_files_of_another_checkpoint_are_not_taken_for_its_own",),
    "33 latest.json missing": ("test_failures.py::test_broken_pointers_cost_a_warning",),
    "34 latest.json names what is not there": ("test_checkpoint.py::test_strict_tells_the_next_good_one_and_how_to_take_it",
                                               "test_failures.py::test_a_bad_checkpoint_sends_the_run_to_the_one_before"),
    "35 every epoch is broken": ("test_failures.py::test_nothing_verifies",),
    "36 leftovers of a dead process": ("faults/test_surroundings.py::test_a_dead_run_leaves_its_lock_its_temporaries_and_half_a_prune",
                                       "test_durable.py::test_sweep_takes_leftovers_of_the_dead_and_nothing_else"),
    "37 two runs in one folder": ("faults/test_surroundings.py::test_two_runs_that_begin_at_once",
                                  "test_failures.py::test_two_runs_in_one_folder"),
    "38 the lock of a dead process": ("test_durable.py::test_a_second_process_is_refused_and_told_whom_by",
                                      "test_durable.py::test_children_of_a_killed_holder_do_not_keep_its_lock"),
    "39 a prune under a reader's eyes": ("faults/test_surroundings.py::test_twenty_readers_during_prunes_and_saves",),
    "40 a folder that cannot be deleted": ("test_failures.py::test_retention_that_cannot_delete_warns_and_tries_again",
                                           "faults/test_errors.py::test_any_operation_fails"),
    "41 a link in the place of a checkpoint": ("test_checkpoint.py::test_a_linked_checkpoint_is_neither_followed_nor_deleted",),
    "42 a clock that jumps back": ("faults/test_surroundings.py::test_a_clock_that_jumps_back",),
    "43 epoch 9999 to 10000": ("faults/test_surroundings.py::test_epochs_from_9998_to_10001",),
    "44 a loss that is not finite": ("test_failures.py::test_a_loss_that_is_not_finite_stops_the_run",),
    "45 a loader worker that is killed": ("test_failures.py::test_a_loader_worker_that_is_killed",),
    "46 the last line of the metrics torn": ("faults/test_damage.py::test_metrics_that_are_torn_anywhere_lose_the_last_line_only",),
    "47 the disk full under the metrics": ("faults/test_whole_runs.py::test_training_in_which_any_operation_fails",
                                           "test_failures.py::test_metrics_that_cannot_be_written_do_not_stop_a_run"),
    "48 the process ends while a file of metrics is cut": ("faults/test_crashes.py::test_a_process_that_ends_at_any_operation",
                                                           "test_rotation.py::test_crashed_at_every_operation"),
    "49 a resume at every step": ("test_exactness.py::test_stop_and_resume",),
    "50 crashes in a row": ("test_exactness.py::test_second_and_third_resume",
                            "faults/test_whole_runs.py::test_training_that_ends_at_any_operation"),
}


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def missing(faults: dict[str, tuple[str, ...]]) -> list[str]:
    wrong = [fault for fault, tests in faults.items() if not tests]
    for test in {t for tests in faults.values() for t in tests}:
        file, _, name = test.partition("::")
        path = TESTS / file
        if not path.is_file() or (name and name not in functions(path)):
            wrong.append(test)
    return sorted(wrong)


def test_every_fault_has_a_test() -> None:
    assert [int(fault.partition(" ")[0]) for fault in FAULTS] == list(range(1, 51))
    assert missing(FAULTS) == []


def test_a_fault_without_a_test_is_seen() -> None:
    assert missing({"1 x": ()}) == ["1 x"]
    assert missing({"1 x": ("faults/test_table.py::test_nothing",)}) and missing({"1 x": ("faults/test_nothing.py",)})
