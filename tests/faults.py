"""Plants faults in copies of the source, one by one, and sees the tests named for them fail.

    python -m tests.faults                  # all of them, some minutes
    python -m tests.faults --list
    python -m tests.faults no-clipping late-reservation
    python -m tests.faults --first          # one for each of the ten lines of docs/privacy.md

Each fault replaces one text of one file. A text that is not there exactly once is an error, so that
this list changes with the code. Each test must pass in a copy without a fault, and fail in the one
with it: a copy that pytest cannot collect, or a broken fixture, does not count.
Exit code: 0 where all were noticed, else 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfuse.kernels.compiling import compile_all

__all__ = ["FAULTS", "Fault", "missing", "plant", "unnoticed"]

ROOT = Path(__file__).parents[1]
PARTS = ("fedfuse", "tests", "server", "clients", "simulations", "docs", "pyproject.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What somebody could get wrong, where, and which tests notice."""

    line: int
    """Of the ten lines in docs/privacy.md."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Node ids; one that is parametrised is named without its parameters."""


PROMISE = "tests/federation/test_promise.py::"
NOISE = "tests/privacy/test_noise.py::"
AHEAD = "tests/privacy/test_noise_ahead.py::"
CLIPPING = "tests/privacy/test_clipping.py::"
AUXILIARY = "tests/privacy/test_auxiliary.py::"
COUPLED = "test_a_loss_over_the_batch_depends_on_others_and_is_refused_with_a_promise"
KERNELS = "tests/kernels/test_products.py::"
BOOK = "tests/privacy/test_bookkeeping.py::"
UNITS = "tests/privacy/test_units.py::"
NODE = "tests/federation/test_node.py::"
HOSTILE = "tests/federation/test_hostile.py::"
RELEASES = "tests/federation/test_releases.py::"
ACCOUNT = "tests/privacy/test_accounting.py::"
MASKING = "tests/federation/test_masking.py::"
MASKED_NODES = "tests/federation/test_masked_nodes.py::"
STACKED = "tests/test_stacked.py::"

FAULTS = (
    Fault(
        line=1,
        name="unit-not-stated",
        file="fedfuse/federation/summary.py",
        old='f"{mechanism.unit.change}, against {whom}.{beyond}"',
        new='f"the data, against {whom}.{beyond}"',
        tests=(
            f"{PROMISE}test_a_promise_names_its_unit_its_relation_its_delta_and_its_adversaries",
        ),
    ),
    Fault(
        line=1,
        name="server-not-stated",
        file="fedfuse/federation/summary.py",
        old="shared = server is None or server > most",
        new="shared = True",
        tests=(
            f"{PROMISE}test_a_promise_names_its_unit_its_relation_its_delta_and_its_adversaries",
        ),
    ),
    Fault(
        line=1,
        name="model-cheaper-than-updates",
        file="fedfuse/federation/summary.py",
        old='return most, most, "post-processing',
        new='return most, most / 2, "post-processing',
        tests=(f"{PROMISE}test_that_nodes_are_drawn_at_random_is_no_gain",),
    ),
    Fault(
        line=2,
        name="rate-from-the-data",
        file="fedfuse/privacy/sampling.py",
        old="yield np.flatnonzero(stream.uniform(records) < sample_rate)",
        new="yield np.flatnonzero(\n"
        "            stream.uniform(records) < round(records * sample_rate) / max(records, 1)\n"
        "        )",
        tests=(f"{NOISE}test_rate_is_the_declared_one_whatever_the_data_size",),
    ),
    Fault(
        line=2,
        name="empty-batches-skipped",
        file="fedfuse/privacy/sampling.py",
        old="yield np.flatnonzero(stream.uniform(records) < sample_rate)",
        new="rows = np.flatnonzero(stream.uniform(records) < sample_rate)\n"
        "        if len(rows):\n"
        "            yield rows",
        tests=(f"{NOISE}test_empty_batches_are_steps",),
    ),
    Fault(
        line=2,
        name="fixed-batch-size",
        file="fedfuse/privacy/sampling.py",
        old="yield np.flatnonzero(stream.uniform(records) < sample_rate)",
        new="yield np.argsort(stream.uniform(records))[: round(records * sample_rate)]",
        tests=(f"{NOISE}test_poisson_draws_each_record_on_its_own_at_the_declared_rate",),
    ),
    Fault(
        line=2,
        name="divisor-from-the-data",
        file="fedfuse/train.py",
        old="            expected_batch=job.expected_batch,",
        new="            expected_batch=max(1.0, len(records) * mechanism.sample_rate),",
        tests=(
            "tests/test_train.py::test_private_step_divides_by_the_public_size_whatever_is_drawn",
        ),
    ),
    Fault(
        line=3,
        name="absent-modality-not-masked",
        file="fedfuse/models/model.py",
        old="hide(norm(encoder(batch.inputs[name])), batch.present[name])",
        new="norm(encoder(batch.inputs[name]))",
        tests=(f"{CLIPPING}test_absent_modality_contributes_zero_gradient",),
    ),
    Fault(
        line=3,
        name="absent-modality-taught",
        file="fedfuse/models/auxiliary.py",
        old="total = total + config.unimodal * hide(alone, seen).sum(1)",
        new="total = total + config.unimodal * alone.sum(1)",
        tests=("tests/models/test_auxiliary.py::test_what_is_absent_teaches_no_head",),
    ),
    Fault(
        line=4,
        name="no-clipping",
        file="fedfuse/privacy/dpsgd.py",
        old="factors = (clip_norm * (1 - 1e-6) / norms.clamp(min=1e-30)).clamp(max=1.0)",
        new="factors = torch.ones_like(norms)",
        tests=(
            f"{CLIPPING}test_clipped_sum_equals_a_loop_over_records",
            f"{CLIPPING}test_no_contribution_exceeds_the_clip_norm",
        ),
    ),
    Fault(
        line=4,
        name="mean-loss",
        file="fedfuse/privacy/dpsgd.py",
        old="loss(model(part), part.target).sum().backward()",
        new="loss(model(part), part.target).mean().backward()",
        tests=(f"{CLIPPING}test_clipped_sum_equals_a_loop_over_records",),
    ),
    Fault(
        line=4,
        name="mean-loss-in-one-pass",
        file="fedfuse/privacy/clipping/bookkeeping.py",
        old="losses.sum().backward()",
        new="losses.mean().backward()",
        tests=(f"{CLIPPING}test_clipped_sum_equals_a_loop_over_records",),
    ),
    Fault(
        line=4,
        name="calls-of-a-layer-by-themselves",
        file="fedfuse/privacy/clipping/layer.py",
        old="if len(self.kept) == self.calls:",
        new="if True:",
        tests=(f"{BOOK}test_layer_called_several_times_counts_once",),
    ),
    Fault(
        line=4,
        name="equal-tokens-by-themselves",
        file="fedfuse/privacy/clipping/embedding.py",
        old="torch.cumsum(ordered[:, 1:] != ordered[:, :-1], 1, out=rank[:, 1:])",
        new="rank += torch.arange(ids.shape[1])",
        tests=(f"{BOOK}test_embedding_adds_up_equal_tokens",),
    ),
    Fault(
        line=4,
        name="kernel-equal-tokens-by-themselves",
        file="fedfuse/kernels/tokens.c",
        old="ids[seen[slot]] != ids[t]",
        new="seen[slot] != t",
        tests=(
            "tests/kernels/test_tokens.py::test_rows_of_equal_tokens_are_added_up_first",
            f"{BOOK}test_equal_tokens_of_long_texts_share_a_row",
        ),
    ),
    Fault(
        line=4,
        name="kernel-cancelling-records-left-out",
        file="fedfuse/kernels/norms.c",
        old="silent = g[k] == 0;",
        new="silent = g[k] == g[k];",
        tests=(
            "tests/kernels/test_norms.py::test_a_record_is_silent_where_all_its_numbers_are_zero",
            f"{BOOK}test_a_row_whose_gradients_cancel_is_not_left_out",
        ),
    ),
    Fault(
        line=4,
        name="kernel-norms-of-another-record",
        file="fedfuse/kernels/norms.c",
        old="by_weight[c] = product[c] * rstd[c / each];",
        new="by_weight[c] = product[c] * rstd[c / each - (i > start ? s->groups : 0)];",
        tests=("tests/kernels/test_norms.py::test_group_norm_is_that_of_autograd",),
    ),
    Fault(
        line=4,
        name="rounding-down",
        file="fedfuse/privacy/clipping/linear.py",
        old="total.add_(slack)",
        new="total",
        tests=(f"{BOOK}test_rounding_never_makes_a_norm_too_small",),
    ),
    Fault(
        line=4,
        name="kernel-rounding-down",
        file="fedfuse/kernels/products.c",
        old="square += reached * reached * (FLT_EPSILON / 2);",
        new="(void)reached;",
        tests=(f"{BOOK}test_rounding_never_makes_a_norm_too_small",),
    ),
    Fault(
        line=4,
        name="kernel-half-of-a-norm",
        file="fedfuse/kernels/products.c",
        old="both += (vec)((ints)both & above);",
        new="",
        tests=(f"{KERNELS}test_gram_squares_are_the_squares_of_what_outer_products_writes",),
    ),
    Fault(
        line=4,
        name="kernel-sum-without-clipping",
        file="fedfuse/kernels/products.c",
        old="ready(&w, pairs, i, held++, factors[i]);",
        new="ready(&w, pairs, i, held++, 1);",
        tests=(
            f"{KERNELS}test_a_record_with_factor_0_adds_nothing_whatever_its_numbers_are",
            f"{KERNELS}test_outer_products_are_those_of_autograd",
        ),
    ),
    Fault(
        line=4,
        name="kernel-noise-of-two-thirds",
        file="fedfuse/kernels/normals.c",
        old="doubles x = radius *",
        new="radius *= 2.0 / 3.0;\n    doubles x = radius *",
        tests=(f"{NOISE}test_noise_has_the_declared_sigma",),
    ),
    Fault(
        line=4,
        name="parameter-outside-its-layer",
        file="fedfuse/privacy/clipping/bookkeeping.py",
        old="            if p.grad is not None:",
        new="            if False:",
        tests=(f"{BOOK}test_parameter_used_outside_its_layer_is_refused",),
    ),
    Fault(
        line=4,
        name="positions-taken-for-records",
        file="fedfuse/privacy/clipping/bookkeeping.py",
        old="        if not self._probed:",
        new="        if False:",
        tests=(f"{BOOK}test_positions_for_rows_are_refused_also_where_the_sizes_agree",),
    ),
    Fault(
        line=4,
        name="broken-record-left-in-one-pass",
        file="fedfuse/privacy/clipping/book.py",
        old="any_broken = bool(broken.any())",
        new="any_broken = False",
        tests=(f"{CLIPPING}test_broken_record_counts_as_zero",),
    ),
    Fault(
        line=4,
        name="broken-record-left-in",
        file="fedfuse/privacy/dpsgd.py",
        old="                if not bool(finite.all()):",
        new="                if False:",
        tests=(f"{CLIPPING}test_broken_record_counts_as_zero",),
    ),
    Fault(
        line=4,
        name="long-gradients-too-short",
        file="fedfuse/privacy/lengths.py",
        old="_RUN = 1024",
        new="_RUN = 1 << 60",
        tests=(
            f"{CLIPPING}test_no_contribution_of_a_million_numbers_exceeds_the_clip_norm",
            f"{CLIPPING}test_lengths_are_right_however_many_numbers_there_are",
        ),
    ),
    Fault(
        line=4,
        name="noise-of-two-thirds",
        file="fedfuse/privacy/noise.py",
        old="scale = std / math.sqrt(8.0)",
        new="scale = std / math.sqrt(18.0)",
        tests=(f"{NOISE}test_noise_has_the_declared_sigma",),
    ),
    Fault(
        line=5,
        name="count-as-weight",
        file="fedfuse/federation/node.py",
        old="weight=float(len(dataset)) if counts and not promised else 1.0,",
        new="weight=float(len(dataset)),",
        tests=(f"{NODE}test_the_books_survive_the_rounds",),
    ),
    Fault(
        line=5,
        name="count-asked-for-and-given",
        file="fedfuse/federation/policy.py",
        old="if missing := needed - self.outputs:",
        new="if missing := set[str]():",
        tests=(f"{HOSTILE}test_a_count_leaves_only_where_the_operator_lets_it",),
    ),
    Fault(
        line=5,
        name="count-beside-the-sum-not-paid-for",
        file="fedfuse/privacy/spec.py",
        old="        if not self.count_noise:",
        new="        if True:",
        tests=(f"{UNITS}test_the_count_beside_the_sum_is_paid_for_by_more_noise_on_the_sum",),
    ),
    Fault(
        line=5,
        name="count-accepted-by-the-server",
        file="fedfuse/federation/wire.py",
        old="if not counts and weight != 1:",
        new="if False:",
        tests=(
            "tests/federation/test_wire.py::test_a_count_is_a_weight_only_where_nothing_is_promised",
        ),
    ),
    Fault(
        line=5,
        name="signal-to-noise-leaves",
        file="fedfuse/federation/node.py",
        old="            unclipped=ran.unclipped,\n",
        new="            unclipped=ran.unclipped,\n"
        "            problem=str(dict(ran.signal_to_noise)),\n",
        tests=(f"{RELEASES}test_all_bytes_but_the_charged_ones_are_the_same_whatever_the_records",),
    ),
    Fault(
        line=6,
        name="noise-from-torch",
        file="fedfuse/privacy/noise.py",
        old="self._stream.update_into(_ZEROS[: len(part)], part)",
        new="part[:] = torch.randint(256, (len(part),), dtype=torch.uint8).numpy().tobytes()",
        tests=(f"{NOISE}test_torch_seed_does_not_touch_noise",),
    ),
    Fault(
        line=6,
        name="threads-make-the-same-noise",
        file="fedfuse/privacy/noise.py",
        old="_Source(self._key, first + _bytes_of(start))",
        new="_Source(self._key, first)",
        tests=(f"{NOISE}test_several_threads_make_the_same_noise_and_go_on_after_it",),
    ),
    Fault(
        line=6,
        name="noise-made-ahead-used-twice",
        file="fedfuse/privacy/noise.py",
        old="            self._move(len(values))\n            ahead.pieces",
        new="            ahead.pieces",
        tests=(f"{AHEAD}test_noise_made_ahead_is_that_of_one_thread",),
    ),
    Fault(
        line=6,
        name="interrupted-noise-used-again",
        file="fedfuse/privacy/noise.py",
        old="            self._move(len(values))\n"
        "            ahead.pieces.finish(self._threads - 1)\n",
        new="            ahead.pieces.finish(self._threads - 1)\n"
        "            self._move(len(values))\n",
        tests=(
            f"{AHEAD}test_numbers_of_a_step_that_was_interrupted_while_they_were_added_are_gone",
        ),
    ),
    Fault(
        line=6,
        name="noise-made-ahead-of-another-sigma",
        file="fedfuse/privacy/noise.py",
        old="ahead is not None and ahead.place == place",
        new="ahead is not None and ahead.place.first == place.first",
        tests=(f"{AHEAD}test_a_deviation_that_changes_meanwhile_is_the_one_that_counts",),
    ),
    Fault(
        line=6,
        name="noise-repeats-each-round",
        file="fedfuse/privacy/noise.py",
        old="{len(node)}:{node}{round}",
        new="{len(node)}:{node}",
        tests=(f"{NOISE}test_streams_differ_between_rounds_nodes_and_purposes",),
    ),
    Fault(
        line=6,
        name="sampling-and-noise-share-a-stream",
        file="fedfuse/privacy/noise.py",
        old="purpose.encode(), key=secret",
        new='b"", key=secret',
        tests=(f"{NOISE}test_streams_differ_between_rounds_nodes_and_purposes",),
    ),
    Fault(
        line=4,
        name="discrete-noise-of-two-thirds",
        file="fedfuse/federation/masking/quantise.py",
        old="deviation(noise_multiplier * reach, noise_nodes)",
        new="deviation(noise_multiplier * reach * 2 / 3, noise_nodes)",
        tests=(f"{MASKING}test_the_sum_has_the_declared_noise_whoever_is_lost",),
    ),
    Fault(
        line=4,
        name="rounding-without-room",
        file="fedfuse/federation/masking/quantise.py",
        old="(self.reach - math.sqrt(self.length)) / self.clip_norm * (1 - 1e-9)",
        new="self.reach / self.clip_norm",
        tests=(f"{MASKING}test_no_rounded_update_is_longer_than_the_reach",),
    ),
    Fault(
        line=5,
        name="keys-of-masks-not-signed",
        file="fedfuse/federation/masking/messages.py",
        old="if not signing.verify(",
        new="if not told and not signing.verify(",
        tests=(
            f"{MASKING}test_keys_that_the_server_made_up_in_a_nodes_name_are_refused",
            f"{MASKING}test_an_announcement_of_another_run_is_refused",
        ),
    ),
    Fault(
        line=5,
        name="survivors-not-compared",
        file="fedfuse/federation/masking/member.py",
        old="            if not signed_set(",
        new="            if not signature and not signed_set(",
        tests=(
            f"{MASKING}test_a_server_that_tells_two_stories_of_who_is_left_gets_no_shares",
            f"{MASKING}test_a_signature_for_other_keys_opens_nothing",
        ),
    ),
    Fault(
        line=5,
        name="peers-with-one-key",
        file="fedfuse/federation/masking/peers.py",
        old="        if key in names:\n",
        new="        if not key:\n",
        tests=(f"{MASKED_NODES}test_a_file_of_peers_is_read_strictly",),
    ),
    Fault(
        line=5,
        name="masks-for-whoever-asks",
        file="fedfuse/federation/masking/seat.py",
        old="if self.servers is not None and server not in self.servers:",
        new="if False:",
        tests=(f"{MASKED_NODES}test_terms_of_a_server_that_the_node_does_not_answer_are_refused",),
    ),
    Fault(
        line=5,
        name="masks-begun-twice",
        file="fedfuse/federation/masking/unfinished.py",
        old="        if request in self._begun:\n",
        new="        if not request:\n",
        tests=(
            f"{MASKED_NODES}"
            "test_a_second_announcement_for_a_request_is_refused_and_the_first_stands",
        ),
    ),
    Fault(
        line=5,
        name="unfinished-masks-without-bound",
        file="fedfuse/federation/masking/unfinished.py",
        old="while len(self._members) > self._most:",
        new="while len(self._members) > 2**self._most:",
        tests=(f"{MASKED_NODES}test_a_server_that_begins_many_rounds_fills_no_memory",),
    ),
    Fault(
        line=5,
        name="count-beside-a-masked-update",
        file="fedfuse/federation/masking/seat.py",
        old="(mechanism.unit is not Unit.NODE or mechanism.count_noise)",
        new="mechanism.unit is not Unit.NODE",
        tests=(f"{MASKED_NODES}test_under_masks_no_count_leaves_and_no_other_unit",),
    ),
    Fault(
        line=5,
        name="liars-among-the-nodes-forgotten",
        file="fedfuse/federation/masking/seat.py",
        old="        if bad < self.colluders:\n",
        new="        if bad < 0:\n",
        tests=(f"{MASKED_NODES}test_rounds_that_too_many_liars_could_undo_are_refused",),
    ),
    Fault(
        line=5,
        name="masks-required-but-not-asked-for",
        file="fedfuse/federation/policy.py",
        old="== (REFUSED if masked else REQUIRED):",
        new="== (REFUSED if masked else REFUSED + REQUIRED):",
        tests=(f"{MASKED_NODES}test_a_node_that_requires_masks_gives_nothing_without_them",),
    ),
    Fault(
        line=5,
        name="share-of-noise-without-masks",
        file="fedfuse/federation/policy.py",
        old="(request.job.noise_nodes > 1 and not masked)",
        new="(request.job.noise_nodes > 1 and masked)",
        tests=(f"{MASKED_NODES}test_a_share_of_noise_alone_leaves_only_under_masks",),
    ),
    Fault(
        line=7,
        name="spent-before-masks-are-there",
        file="fedfuse/federation/node.py",
        old="            seat.check(request)\n",
        new="            pass\n",
        tests=(
            f"{MASKED_NODES}test_training_before_its_masks_are_there_is_refused_and_costs_nothing",
        ),
    ),
    Fault(
        line=5,
        name="own-mask-left-out",
        file="fedfuse/federation/masking/member.py",
        old="        add_mask(masked, self._seed, +1)\n",
        new="",
        tests=(f"{MASKING}test_the_sum_is_exact_whoever_is_lost_and_when",),
    ),
    Fault(
        line=6,
        name="noise-from-the-model-seed",
        file="fedfuse/federation/node.py",
        old="return round_secret(site.policy.noise_seed, name, request.round)",
        new="return round_secret(site.policy.noise_seed or str(site.config.seed), name, "
        "request.round)",
        tests=(f"{NODE}test_an_update_without_noise_seed_differs_each_time",),
    ),
    Fault(
        line=6,
        name="noise-from-what-the-server-configures",
        file="fedfuse/federation/vault.py",
        old='if self.settings.policy.seeded_noise else ""',
        new="",
        tests=(f"{HOSTILE}test_noise_does_not_follow_from_what_the_server_configures",),
    ),
    Fault(
        line=6,
        name="known-noise-entered-as-a-promise",
        file="fedfuse/federation/vault.py",
        old="books = SeededBooks(self._books) if site.policy.noise_seed else self._books",
        new="books = self._books",
        tests=(f"{HOSTILE}test_a_trial_with_noise_from_a_seed_is_entered_as_no_promise",),
    ),
    Fault(
        line=6,
        name="known-noise-reported-as-a-promise",
        file="fedfuse/runfolder.py",
        old="return config.private and (simulated or not config.privacy.noise_seed)",
        new="return config.private",
        tests=(
            "tests/reports/test_budget.py::"
            "test_real_nodes_whose_noise_the_server_knows_are_not_private",
        ),
    ),
    Fault(
        line=7,
        name="last-round-only",
        file="fedfuse/privacy/composition.py",
        old="total[key] = total.get(key, 0) + mechanism.steps",
        new="total[key] = mechanism.steps",
        tests=(f"{ACCOUNT}test_composition_over_rounds_is_not_the_last_round",),
    ),
    Fault(
        line=7,
        name="last-entry-only",
        file="fedfuse/privacy/tally.py",
        old="steps[same] = steps.get(same, 0) + mechanism.steps",
        new="steps[same] = mechanism.steps",
        tests=(
            "tests/privacy/test_ledger.py::"
            "test_runs_servers_and_settings_compose_to_what_dp_accounting_says",
        ),
    ),
    Fault(
        line=7,
        name="last-round-stated",
        file="fedfuse/federation/spending.py",
        old="replace(one, steps=one.steps + mechanism.steps), True",
        new="replace(one, steps=mechanism.steps), True",
        tests=(f"{PROMISE}test_that_nodes_are_drawn_at_random_is_no_gain",),
    ),
    Fault(
        line=7,
        name="past-forgotten",
        file="fedfuse/federation/policy.py",
        old="if not accounting.within([*past, rest], self.epsilon, self.delta):",
        new="if not accounting.within([rest], self.epsilon, self.delta):",
        tests=(f"{NODE}test_what_was_spent_before_counts",),
    ),
    Fault(
        line=7,
        name="one-node-under-two-names",
        file="fedfuse/federation/session.py",
        old="        if found:\n            self.folder.rename(found)",
        new="        if False:\n            self.folder.rename(found)",
        tests=(
            "tests/federation/test_simulate.py::"
            "test_what_is_broken_off_before_a_node_told_its_name_counts_as_that_nodes",
        ),
    ),
    Fault(
        line=7,
        name="crash-not-spent",
        file="fedfuse/privacy/tally.py",
        old="            self._spend(entry, entry.mechanism)",
        new="            if entry.kind is not Kind.RESERVED:\n"
        "                self._spend(entry, entry.mechanism)",
        tests=(
            "tests/privacy/test_ledger.py::"
            "test_a_reservation_without_a_commit_is_spent_all_the_same",
            f"{HOSTILE}test_servers_and_runs_spend_from_one_budget",
        ),
    ),
    Fault(
        line=7,
        name="late-reservation",
        file="fedfuse/federation/node.py",
        old="commit = books.reserve(reserved, request, site.policy.afford(request, mechanism))",
        new="commit = lambda: books.reserve(  # noqa: E731\n"
        "                reserved, request, site.policy.afford(request, mechanism)\n"
        "            )()",
        tests=(f"{NODE}test_a_round_is_reserved_before_a_record_is_read",),
    ),
    Fault(
        line=7,
        name="one-direction-only",
        file="fedfuse/privacy/second.py",
        old="return (1,) if all(q == 1 for q, _, _ in counts) else (1, -1)",
        new="return (1,)",
        tests=(
            "tests/privacy/test_second.py::test_both_directions_are_asked_and_the_larger_counts",
        ),
    ),
    Fault(
        line=7,
        name="sigma-too-small",
        file="fedfuse/privacy/accounting.py",
        old="return max(farthest(near, lambda sigma: fine(sigma) <= epsilon, way=-1), LEAST_SIGMA)",
        new="return 0.98 * farthest(near, lambda sigma: fine(sigma) <= epsilon, way=-1)",
        tests=(
            f"{ACCOUNT}test_calibrated_sigma_keeps_the_promise_and_no_more",
            "tests/privacy/test_planner.py::"
            "test_solved_sigma_is_the_smallest_of_four_digits_that_keeps_epsilon",
        ),
    ),
    Fault(
        line=7,
        name="signature-not-checked",
        file="fedfuse/federation/policy.py",
        old="        request.check_signature()\n",
        new="",
        tests=(
            f"{HOSTILE}test_a_hostile_request_is_refused_before_a_record_is_read_and_costs_nothing",
        ),
    ),
    Fault(
        line=7,
        name="weights-not-signed",
        file="fedfuse/federation/wire.py",
        old="            weights.update(array.data)\n",
        new="",
        tests=(
            f"{HOSTILE}test_a_hostile_request_is_refused_before_a_record_is_read_and_costs_nothing",
        ),
    ),
    Fault(
        line=7,
        name="answered-twice",
        file="fedfuse/privacy/ledger.py",
        old="        if request in self._tally.requests:\n            raise",
        new="        if False:\n            raise",
        tests=(f"{HOSTILE}test_a_message_that_comes_twice_is_charged_once",),
    ),
    Fault(
        line=7,
        name="stale-round-charged",
        file="fedfuse/federation/books.py",
        old="        if request.round < last:",
        new="        if False:",
        tests=(f"{HOSTILE}test_a_round_that_is_over_is_refused_and_costs_nothing",),
    ),
    Fault(
        line=7,
        name="late-round-charged",
        file="fedfuse/federation/policy.py",
        old="            request.check_time()\n",
        new="",
        tests=(f"{HOSTILE}test_a_round_that_ends_while_its_cost_is_weighed_is_not_charged",),
    ),
    Fault(
        line=7,
        name="run-of-another-server",
        file="fedfuse/privacy/ledger.py",
        old="        if owner != server:",
        new="        if False:",
        tests=(f"{HOSTILE}test_a_run_of_another_server_cannot_be_gone_on_with",),
    ),
    Fault(
        line=7,
        name="changed-records-are-a-new-budget",
        file="fedfuse/federation/books.py",
        old="if self._alone and others:",
        new="if False:",
        tests=(f"{HOSTILE}test_changed_records_do_not_bring_a_new_budget",),
    ),
    Fault(
        line=7,
        name="exposed-data-promised-again",
        file="fedfuse/privacy/ledger.py",
        old="            if dataset in self._tally.exposed:",
        new="            if False:",
        tests=(
            f"{HOSTILE}test_data_that_a_run_without_a_promise_has_read_cannot_be_promised_anything_later",
        ),
    ),
    Fault(
        line=7,
        name="steps-without-limit",
        file="fedfuse/federation/policy.py",
        old='            ("steps in all rounds", steps, self.max_steps),\n',
        new="",
        tests=(f"{HOSTILE}test_each_limit_of_the_policy_is_kept",),
    ),
    Fault(
        line=7,
        name="noise-without-limit",
        file="fedfuse/federation/policy.py",
        old='mechanism.noise_multiplier, self.min_noise_multiplier, float("inf")',
        new='mechanism.noise_multiplier, 0.0, float("inf")',
        tests=(f"{HOSTILE}test_each_limit_of_the_policy_is_kept",),
    ),
    Fault(
        line=8,
        name="drawing-nodes-is-a-gain",
        file="fedfuse/federation/settle.py",
        old="whole = plan(privacy, steps=train.rounds * a_round)",
        new="drawn = privacy.sample_rate * config.federation.fraction\n"
        "    whole = plan(\n"
        "        dataclasses.replace(privacy, sample_rate=drawn), steps=train.rounds * a_round\n"
        "    )",
        tests=(f"{PROMISE}test_that_nodes_are_drawn_at_random_is_no_gain",),
    ),
    Fault(
        line=8,
        name="only-expected-rounds-count",
        file="fedfuse/federation/settle.py",
        old="whole = plan(privacy, steps=train.rounds * a_round)",
        new="expected = max(1, round(train.rounds * config.federation.fraction))\n"
        "    whole = plan(privacy, steps=expected * a_round)",
        tests=(f"{PROMISE}test_that_nodes_are_drawn_at_random_is_no_gain",),
    ),
    Fault(
        line=8,
        name="rounds-of-unit-node-as-if-sampled",
        file="fedfuse/privacy/plan.py",
        old="rate = 1.0 if unit is Unit.NODE else privacy.sample_rate",
        new="rate = privacy.sample_rate",
        tests=(f"{UNITS}test_unit_node_is_a_gaussian_in_full_each_round",),
    ),
    Fault(
        line=9,
        name="repeated-subjects-let-through",
        file="fedfuse/federation/store.py",
        old="prepared.repeated_subjects and not privacy.records_are_units:",
        new="False:",
        tests=(
            "tests/federation/test_simulate.py::"
            "test_repeated_subjects_are_refused_unless_records_are_units",
        ),
    ),
    Fault(
        line=9,
        name="person-taken-for-a-record",
        file="fedfuse/federation/node.py",
        old="if not site.policy.records_are_units and mechanism and mechanism.unit is Unit.RECORD:",
        new="if False:",
        tests=(f"{HOSTILE}test_a_person_with_several_records_is_not_taken_for_a_record",),
    ),
    Fault(
        line=9,
        name="subjects-clipped-by-record",
        file="fedfuse/privacy/dpsgd.py",
        old="        if owners is not None:\n            units",
        new="        if False:\n            units",
        tests=(
            f"{UNITS}test_subjects_are_clipped_as_wholes_however_the_step_is_cut",
            f"{UNITS}test_a_subject_of_many_records_moves_the_sum_by_no_more_than_the_clip_norm",
        ),
    ),
    Fault(
        line=9,
        name="subjects-clipped-by-record-in-one-pass",
        file="fedfuse/privacy/clipping/bookkeeping.py",
        old="None if owners is None else Owners.from_ids(owners)",
        new="None",
        tests=(
            f"{UNITS}test_subjects_are_clipped_as_wholes_however_the_step_is_cut",
            f"{UNITS}test_a_subject_of_many_records_moves_the_sum_by_no_more_than_the_clip_norm",
        ),
    ),
    Fault(
        line=9,
        name="subjects-drawn-by-record",
        file="fedfuse/privacy/sampling.py",
        old="order = order[drawn[subjects[order]]]",
        new="order = order[stream.uniform(len(order)) < sample_rate]",
        tests=(
            f"{UNITS}test_subjects_are_drawn_whole_at_the_declared_rate_and_give_no_more_than_allowed",
        ),
    ),
    Fault(
        line=10,
        name="batch-norm-accepted",
        file="fedfuse/privacy/safety.py",
        old="if isinstance(module, _CROSS_RECORD):",
        new="if False:",
        tests=(f"{CLIPPING}test_layer_that_mixes_records_is_refused",),
    ),
    Fault(
        line=10,
        name="rows-not-compared",
        file="fedfuse/privacy/safety.py",
        old="    if mixed is not None:",
        new="    if False:",
        tests=("tests/privacy/test_safety.py::test_operation_in_somebodys_forward_is_found",),
    ),
    Fault(
        line=10,
        name="model-not-checked",
        file="fedfuse/federation/checking.py",
        old="    refuse(found)\n",
        new="",
        tests=(
            "tests/federation/test_pretrained_runs.py"
            "::test_model_that_mixes_records_is_refused_before_anything_is_reserved",
        ),
    ),
    Fault(
        line=10,
        name="batch-mean-taken-off",
        file="fedfuse/models/model.py",
        old="        z = torch.stack(tokens, 1)\n",
        new="        z = torch.stack(tokens, 1) - torch.stack(tokens, 1).mean(0)\n",
        tests=("tests/models/test_model.py::test_a_row_does_not_depend_on_its_neighbours",),
    ),
    Fault(
        line=10,
        name="in-batch-loss-promised",
        file="fedfuse/config.py",
        old="    if config.private and model.auxiliary.couples:\n",
        new="    if False:\n",
        tests=(f"{AUXILIARY}{COUPLED}",),
    ),
    Fault(
        line=10,
        name="in-batch-loss-prepared",
        file="fedfuse/privacy/safety.py",
        old='if getattr(module, "mixes_records", False):',
        new="if False:",
        tests=(f"{AUXILIARY}{COUPLED}",),
    ),
    Fault(
        line=4,
        name="stacked-rows-not-masked",
        file="fedfuse/stacked.py",
        old="sound = factors.gt(0).all(0) & (mask > 0)",
        new="sound = factors.gt(0).all(0)",
        tests=(f"{STACKED}test_a_node_ends_as_it_would_alone",),
    ),
    Fault(
        line=4,
        name="stacked-without-clipping",
        file="fedfuse/stacked.py",
        old="factors = clip_factors(by_part, bounds[:, None, None])",
        new="factors = clip_factors(by_part, 1e6 * bounds[:, None, None])",
        tests=(f"{STACKED}test_no_contribution_exceeds_the_bound",),
    ),
    Fault(
        line=4,
        name="stacked-broken-record-left-in",
        file="fedfuse/stacked.py",
        old="            x[~sound] = 0\n",
        new="            pass\n",
        tests=(f"{STACKED}test_a_broken_record_counts_as_zero_and_breaks_no_other_node",),
    ),
    Fault(
        line=6,
        name="stacked-nodes-share-noise",
        file="fedfuse/stacked.py",
        old='noise = [NoiseStream(member.secret, "noise") for member in members]',
        new='noise = [NoiseStream(members[0].secret, "noise") for _ in members]',
        tests=(f"{STACKED}test_a_node_ends_as_it_would_alone",),
    ),
)


def missing(fault: Fault, root: Path = ROOT) -> str:
    """Why `fault` cannot be planted under `root`, or ""."""
    path = root / fault.file
    found = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
    if found != 1:
        return f"{fault.name}: its text is found {found} times in {fault.file}, and must be once"
    for test in fault.tests:
        file, _, name = test.partition("::")
        text = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
        if f"def {name}(" not in text:
            return f"{fault.name}: there is no test {test}"
    return ""


def plant(fault: Fault, root: Path) -> None:
    """Writes `fault` into the copy at `root`, where it can be, and compiles it where it is C."""
    path = root / fault.file
    path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), "utf-8")
    if path.suffix == ".c" and (why := compile_all(path.parent)):
        raise RuntimeError(f"{fault.name} can't be compiled: {why}")


def unnoticed(fault: Fault) -> tuple[str, ...]:
    """The tests that do not fail with `fault` planted: none of them is what there should be."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        root = copied(Path(folder))
        plant(fault, root)
        failed = run(root, fault.tests)
    return tuple(test for test in fault.tests if test not in failed)


def copied(folder: Path) -> Path:
    """A copy of what the tests need, in `folder`."""
    for part in PARTS:
        source, target = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy2(source, target)
    return folder


def run(root: Path, tests: Iterable[str]) -> set[str]:
    """Which of `tests` fail in the copy at `root`. Raises RuntimeError where they do not run."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "", "--tb=no", "-rf", "--maxfail=20"]
    words += ["-p", "no:cacheprovider", *tests]
    process = subprocess.run(
        words,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode not in (0, 1) or re.search(r"^ERROR ", process.stdout, re.MULTILINE):
        raise RuntimeError(
            f"the tests do not run:\n{process.stdout[-2000:]}{process.stderr[-2000:]}"
        )
    named = re.findall(r"^FAILED (\S+?)(?:\[.*)?(?: - .*)?$", process.stdout, re.MULTILINE)
    return set(named)


def first_of_each(faults: Sequence[Fault] = FAULTS) -> tuple[Fault, ...]:
    """One fault for each of the ten lines."""
    found = {fault.line: fault for fault in reversed(faults)}
    return tuple(found[line] for line in sorted(found))


def main() -> int:
    """Plants what is asked for, and says what was noticed."""
    parser = argparse.ArgumentParser(description="Plants faults and sees their tests fail.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; none: all of them")
    parser.add_argument("--first", action="store_true", help="one for each of the ten lines")
    parser.add_argument("--list", action="store_true", help="only list them")
    options = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    for name in options.names:
        if name not in known:
            parser.error(f"no fault is named {name!r}; see --list")
    chosen = [known[name] for name in options.names] or list(
        first_of_each() if options.first else FAULTS
    )
    if options.list:
        for fault in chosen:
            print(f"{fault.line:>2}  {fault.name:<42}{fault.file}")
        return 0
    wrong = [text for fault in chosen if (text := missing(fault))]
    if wrong:
        print("\n".join(f"error: {text}" for text in wrong))
        return 1
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        failing = run(copied(Path(folder)), sorted({t for fault in chosen for t in fault.tests}))
    if failing:
        print("error: these fail without any fault: " + ", ".join(sorted(failing)))
        return 1
    left = 0
    for fault in chosen:
        began = time.monotonic()
        survived = unnoticed(fault)
        left += bool(survived)
        verdict = f"NOT NOTICED by {', '.join(survived)}" if survived else "noticed"
        print(f"{fault.line:>2}  {fault.name:<42}{verdict}  {time.monotonic() - began:.0f} s")
        sys.stdout.flush()
    print(f"{len(chosen) - left} of {len(chosen)} faults were noticed by each of their tests")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
