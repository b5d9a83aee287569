"""The sweeps: what `make test` leaves to `make sweep`, because another test or case has the behaviour already.

`make test` runs every behaviour once, in minutes, but for four whose entries say that nothing else has them. `make
sweep` runs it again: for more families, dtypes and settings, in processes of their own, on real weights, and for
longer. CI runs both. `conftest.py` gives what is named here the mark `sweep`; the mark `nightly`, for what takes many
minutes, stands beside the test.
"""

from fnmatch import fnmatchcase

SWEEPS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "test_attention.py": {
        "test_estimated_recall_is_exact_where_every_row_is_a_probe": "test_bench_recall.py, where most are",
        "test_every_kind_in_one_launch": "test_family.py::test_it_shares_a_launch_with_other_heads",
        "test_layers_by_scan_equal_layers_by_hand": "test_llama.py: layers of unequal patterns",
    },
    "test_backends.py": {
        "test_equals_the_oracle": (
            "*-odd-length*",
            "*-all-rows-padded",
            "*-lengths-on-tile-edges",
            "*-one-token",
        ),
        "test_lowers_for_cuda_without_a_gpu": "test_hopper.py, test_mma.py, of the same name",
        "test_each_part_alone": ("*-bands", "*-none"),
        "test_patterns_are_their_pictures": ("xla-vertical-slash*",),
        "test_dense_attention_of_a_kernel_lowers_for_cuda": ("mma",),
        "test_gradients_of_a_kernel_lower_for_cuda": ("mma",),
        "test_kernels_lower_under_vmap_scan_and_shard_map": "test_kernel_axes.py, under shard_map",
        "test_interpreted_kernel_equals_the_oracle_and_is_free_of_races": "test_equals_the_oracle, test_lowers_…",
        "test_dense_gradients_equal_those_of_the_oracle": "test_gradients.py, by finite differences",
        "test_gradients_equal_those_of_the_oracle": "test_gradients.py, by finite differences",
        "test_a_sequence_of_a_batch_equals_the_sequence_alone": "test_fuzz.py, whose batches have lengths",
        "test_parts_at_traced_offsets_equal_the_whole": "test_attention.py::test_chunks_with_traced_offset_…",
        "test_vmap_scan_and_shard_map_change_nothing": "test_spread.py, test_llama.py",
    },
    "test_batch.py": {
        "test_replies_are_those_of_single_prompts": ("True",),
    },
    "test_bench_recall.py": {
        "test_lines_reach_the_density_with_one_program": "test_threshold_reaches_the_density_with_one_program",
        "test_rows_are_those_of_each_layer": "test_threshold_reaches_the_density_with_one_program",
    },
    "test_cache.py": {
        "test_a_chunked_prefill_equals_one_shot": ("None",),
        "test_a_quantized_cache_rounds_rows_and_decodes_as_the_plain_one": ("int8*",),
        "test_a_part_reads_a_prefix_of_a_long_cache_and_finds_the_same": "test_prefill_in_parts_equals_one_shot",
    },
    "test_compare.py": {
        "test_a_checkpoint_that_lacks_tensors_is_an_error_not_random_tensors": "test_a_failing_child_…",
    },
    "test_decode_attention.py": {
        "test_both_implementations_read_any_cache": ("int8-*",),
    },
    "test_dual_chunk.py": {
        "test_it_is_the_softmax_over_the_table_of_distances": ("300",),
        "test_a_cache_parts_and_decoding_agree_with_one_call": "test_cache.py, without dual chunks",
        "test_up_to_the_trained_length_nothing_changes": "test_it_is_the_softmax_over_the_table_of_distances",
        "test_a_conversation_that_outgrows_its_cache_is_read_again": "test_generate.py, without dual chunks",
    },
    "test_eval_baselines.py": {
        "test_a_model_takes_a_plan_builder_in_the_patterns_place": "test_family.py::test_it_shares_a_launch_…",
        "test_the_oracle_holds_more_than_any_index_at_its_density": "test_methods_keep_to_the_density[oracle]",
        "test_static_indices_are_those_of_the_other_prompt": "test_eval_runner.py::test_methods_keep_to_the_density",
    },
    "test_eval_compare.py": {
        "test_a_task_scores_as_pytorch_does": "test_replies_are_scored_up_to_their_end, test_parity_variants.py",
    },
    "test_eval_runner.py": {
        "test_a_batch_of_unequal_prompts_gives_the_answers_of_single_runs": "test_batch.py, for replies and labels",
        "test_methods_keep_to_the_density": ("minference", "oracle"),
        "test_nothing_compiles_within_a_bucket": "test_generate.py::test_one_compile_per_bucket",
        "test_measured_budgets_keep_their_proportions_and_the_density": "test_search.py::test_patterns_are_scaled_…",
    },
    "test_every_family.py": {
        "test_a_search_can_read_its_layers": ("gpt_oss",),
    },
    "test_experts.py": {
        "test_blocks_give_what_experts_one_by_one_give": ("True-*",),
    },
    "test_fuzz.py": {
        "test_random_plans_equal_the_oracle": ("*-20",),
    },
    "test_gpus.py": {
        "test_prefill_holds_the_generations_kernel_and_no_attention_in_jnp": ("9.0",),
    },
    "test_gradients.py": {
        "test_broken_padding_reaches_no_gradient_of_valid_positions": ("AShape*",),
    },
    "test_hopper.py": {
        "test_lowers_for_cuda_without_a_gpu": ("every-part*",),
        "test_an_assembler_that_moves_no_registers_is_not_asked_to": ("ptxas",),
    },
    "test_hopper_tables.py": {
        "test_every_key_of_the_plan_is_visited_once": ("all-260*", "none-260*"),
        "test_lists_that_builders_made_are_taken_as_they_are": ("260*",),
    },
    "test_hosts.py": {
        "test_two_hosts_generate_what_one_device_does": "test_mesh.py",
        "test_a_process_that_dies_ends_the_others": "nothing: how JAX's own service behaves",
    },
    "test_index_builders.py": {
        "test_padded_batch_equals_each_sequence_alone_and_vmap": ("Antidiagonal",),
        "test_shard_map_over_heads": ("Antidiagonal",),
    },
    "test_index_long.py": {
        "test_planted_columns_and_slashes_are_found": "test_index_vertical_slash.py, of the same name, shorter",
    },
    "test_index_per_tile.py": {
        "test_beside_another_kind": "test_family.py::test_it_shares_a_launch_with_other_heads",
        "test_padded_batch_equals_each_sequence_alone_and_vmap": "test_no_head_keeps_less_…, on a padded batch",
        "test_shard_map_over_heads": "test_index_vertical_slash.py::test_shard_map_over_heads",
    },
    "test_index_query_aware.py": {
        "test_equals_the_rule": ("256",),
        "test_serves_attention": "test_index_antidiagonal.py::test_serves_attention",
    },
    "test_index_shared_density.py": {
        "test_heads_on_several_devices_share_one_density": "test_spread.py, of the same name",
        "test_padded_batch_equals_each_sequence_alone_and_vmap": "test_is_the_slow_rule, on a padded batch",
    },
    "test_index_vertical_slash.py": {
        "test_padded_batch_equals_each_sequence_alone_and_vmap": "test_whole_index_equals_…, on padded batches",
        "test_planted_columns_and_slashes_are_found": ("777-*",),
        "test_heads_and_sequences_can_be_taken_a_few_at_a_time": ("two heads",),
    },
    "test_kernel_axes.py": {
        "test_an_axis_of_the_mesh_is_no_axis_of_a_kernel": ("8.0-*",),
    },
    "test_mesh.py": {
        "test_what_lies_with_the_heads_on_two_devices": "nothing, for sinks; test_stream.py for all else",
        "test_a_long_prefill_sends_what_the_design_says": "nothing: how much is sent, of which the numbers say nothing",
        "test_four_and_eight_devices_do_what_one_does": "test_what_lies_with_the_heads_on_two_devices",
        "test_narrow_weights_and_cache_with_dealt_heads": "test_what_lies_with_the_heads_…, test_fp8.py",
    },
    "test_mma.py": {
        "test_lowers_for_cuda_in_both_forms": ("every-part-D256-*",),
    },
    "test_notebooks.py": {
        "test_a_fresh_run_says_the_same": "test_the_notebook_is_its_source_with_outputs, test_readme.py",
    },
    "test_parity_variants.py": {
        "test_logits_hidden_states_and_greedy_tokens_are_those_of_pytorch": (
            "gqa4",
            "gemma3",
            "gpt_oss",
            "glm4_moe",
        ),
        "test_a_prompt_in_parts_gives_the_same_continuation": ("gpt_oss",),
        "test_compare_tells_what_sparsity_costs": "test_differences_are_max_and_rms_over_valid_positions",
    },
    "test_pattern_io.py": {
        "test_model_takes_patterns_by_file_and_by_preset": ("llama-3.1-8b",),
    },
    "test_prefill.py": {
        "test_a_second_run_says_that_its_programs_come_from_the_cache": "test_rows_say_what_ran_…, but for the cache",
        "test_the_command_takes_pattern_files_prints_json_and_draws": "test_rows_before_…, test_rows_say_what_ran_…",
    },
    "test_readme.py": {
        "test_the_examples_of_a_page_do_what_it_says": (
            "choose-a-rule.md",
            "many-gpus.md",
            "save-and-restore.md",
            "write-an-index.md",
        ),
        "test_a_long_text_is_read_with_a_sparse_plan": "test_the_attention_alone_…, test_demo_model.py",
    },
    "test_search.py": {
        "test_search_meets_the_target_and_beats_every_uniform_candidate": "test_search_cli.py",
        "test_search_that_was_killed_goes_on": "test_damaged_state_is_one_clear_error_and_restart_forgets_it",
        "test_search_scales_the_threshold_of_a_probe_every_few_rows": "test_patterns_are_scaled_…, for other families",
        "test_verify_gives_no_candidate_less_than_the_searched": "test_search_cli.py::test_search_writes_patterns_…",
        "test_errors_are_those_of_the_real_attention": "test_measured_cost_searches_to_a_time",
        "test_interrupted_search_ends_with_the_same_file": "test_damaged_state_…; test_eval_cli.py goes on too",
        "test_worst_case_objective_scores_by_the_worst_sample": "test_a_short_sample_counts_as_much_as_a_long_one",
    },
    "test_settings.py": {
        "test_results_are_the_same_under_a_setting": "test_a_model_says_the_same_under_every_setting",
        "test_every_family_is_traced_under_every_setting": ("SharedDensity*",),
        "test_export_checkpoint_and_forward_mode": "nothing, for jax.checkpoint; …_shard_map_exported_… for export",
        "test_shard_map_with_checked_axes": ("SharedDensity*",),
        "test_models_and_tile_masses_are_traced_under_every_setting": "test_a_model_says_the_same_under_every_setting",
        "test_an_exported_program_gives_a_plan": "test_a_model_inside_shard_map_exported_and_refused_in_words",
    },
    "test_soak.py": {
        "test_soak": "test_one_compile_per_bucket, test_a_follow_up_turn_processes_only_what_is_new",
    },
    "test_spread.py": {
        "test_results_gradients_and_vmap_are_those_of_one_device": ("Auto-*",),
        "test_sparse_attention_gathers_nothing_and_leaves_its_output_where_q_is": ("Explicit-heads",),
    },
    "test_stream.py": {
        "test_a_prefill_in_pieces_is_that_of_one_device": ("heads",),
    },
    "test_terminal.py": {
        "test_sigterm_in_eval_says_what_is_kept_and_the_command_goes_on": "test_a_command_that_does_not_end_…",
    },
    "test_tile_masses.py": {
        "test_kernel_lowers_for_cuda_without_a_gpu": "test_kernel_axes.py, on a mesh; test_gpus.py, in a prefill",
        "test_interpreted_kernel_agrees_with_its_twin_and_is_free_of_races": "test_twin_is_the_definition",
    },
    "test_unspent.py": {
        "test_heads_of_other_families_neither_leave_nor_take": "test_what_a_layer_leaves_is_spent_by_later_layers_…",
        "test_each_sequence_has_its_own_remainder": "test_what_a_layer_leaves_is_spent_by_later_layers_and_no_more",
        "test_devices_that_share_the_heads_agree_on_it": "test_spread.py::test_heads_on_several_devices_…",
        "test_a_layer_of_few_such_heads_leaves_little_to_one_of_many": "test_what_a_layer_leaves_is_spent_by_later_…",
    },
}
"""Of each file its tests that are sweeps, in part or as a whole.

Patterns: the cases that stay in `make test`; all others are sweeps. A text: the whole test is a sweep, and that has its
behaviour in `make test`.
"""


def is_sweep(file: str, test: str, case: str) -> bool:
    """Whether `make sweep` runs a case of a test; `case` is what pytest writes in brackets."""
    entry = SWEEPS.get(file, {}).get(test, ("*",))
    return isinstance(entry, str) or not any(fnmatchcase(case, pattern) for pattern in entry)


def missing(items: list[tuple[str, str, str]]) -> list[str]:
    """Entries of the table that name no test, or of whose cases none stays, among all (file, test, case)."""
    files = {file for file, *_ in items}
    tests = {(file, test) for file, test, _ in items}
    stay = {(file, test) for file, test, case in items if not is_sweep(file, test, case)}
    return [
        f"{file}::{test}"
        for file, entries in SWEEPS.items()
        for test, entry in entries.items()
        if file in files and (file, test) not in (tests if isinstance(entry, str) else stay)
    ]
