# SPDX-License-Identifier: Apache-2.0
"""StepLayout: which tokens are scored, where, and every message of the validation.

Mutations of sspo_ext/layout.py, each caught by the test named (on a copy of the package):
  predict the label at its own position         test_golden
  rows not shifted                              test_golden
  score a sequence's first token                test_first_token_of_a_sequence_has_no_row
  packed: position counted over the whole pack  test_first_token_of_a_sequence_has_no_row
  count tokens of weight 0                      test_scores_what_the_oracle_scores
  score ignored labels                          test_scores_what_the_oracle_scores
  steps numbered per sequence, not per batch    test_golden
  forget empty steps at the end (minlength)     test_scores_what_the_oracle_scores
  let steps go back                             test_from_step_ids_messages
  no check of negative labels                   test_from_step_ids_messages
  no check against vocab_size                   test_from_step_ids_messages
  no crossing check                             test_from_offsets_messages
  overlapping spans allowed                     test_from_offsets_messages
  empty step owned by the earlier sequence      test_packed_equals_padded
  max_label of scored tokens only               test_an_unscored_label_is_checked_too
  check_vocab off by one                        test_check_logits_messages
  to() moves host fields too                    test_to_moves_every_tensor_and_only_those
  copy contiguous logits                        test_check_logits_copies_only_what_it_must
"""
# ruff: noqa: E501 (tables of calls and their messages)

import pickle

import pytest
import torch
from helpers.batch import oracle_steps, pack, random_batch

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps

LABELS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
IDS = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 1]])


def fields_of(layout):
    names = ("rows", "labels", "step_offsets", "step_of_row", "step_sequence", "row_of")
    return {n: getattr(layout, n).tolist() for n in names} | {
        "weights": None if layout.weights is None else layout.weights.tolist()
    }


def test_golden():
    # sequence 0: tokens 1, 2 are step 0, token 3 is step 1; each is predicted one position to the left
    layout = StepLayout.from_step_ids(LABELS, IDS)
    assert fields_of(layout) == {
        "rows": [0, 1, 2, 4, 5, 6],
        "labels": [6, 7, 8, 2, 3, 4],
        "step_offsets": [0, 2, 3, 4, 6],
        "step_of_row": [0, 0, 1, 2, 3, 3],
        "step_sequence": [0, 0, 1, 1],
        "row_of": [0, 1, 2, -1, 3, 4, 5, -1],
        "weights": None,
    }
    assert (layout.num_rows, layout.num_steps, layout.num_sequences, layout.shape) == (6, 4, 2, (2, 4))
    assert layout.counts.tolist() == [2, 1, 1, 2]
    assert [getattr(layout, n).dtype for n in ("rows", "labels", "step_offsets", "row_of")] == [
        torch.int64, torch.int64, torch.int32, torch.int32,
    ]  # fmt: skip
    assert "rows=6" in repr(layout) and "steps=4" in repr(layout) and "packed" not in repr(layout)


def test_first_token_of_a_sequence_has_no_row():
    layout = StepLayout.from_step_ids(LABELS, torch.zeros(2, 4, dtype=torch.long))
    assert layout.rows.tolist() == [0, 1, 2, 4, 5, 6]
    assert layout.labels.tolist() == [6, 7, 8, 2, 3, 4]
    packed = StepLayout.from_offsets(LABELS.reshape(-1), torch.tensor([0, 4, 8]), torch.tensor([0, 4, 8]))
    assert packed.labels.tolist() == [6, 7, 8, 2, 3, 4]


def test_a_sequence_of_one_token_has_no_row_and_leaks_none():
    # modelscope/ms-swift#9904: single-token sequences in a pack
    labels = torch.tensor([1, 2, 3, 4])
    layout = StepLayout.from_offsets(labels, torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, 4]))
    assert (layout.rows.tolist(), layout.labels.tolist()) == ([2], [4])
    assert layout.counts.tolist() == [0, 0, 1] and layout.step_sequence.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_what_the_oracle_scores(seed, weighted):
    batch = random_batch(seed, weighted=weighted, dtype=torch.float64)
    if weighted:
        batch.token_weights = batch.token_weights.double()  # kept in float64
    sums, counts, tokens = oracle_steps(batch)
    out = step_logps(batch.logits, batch.layout, backend="reference")
    assert out.counts.tolist() == counts
    torch.testing.assert_close(out.tokens, tokens, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.sums, sums, rtol=1e-13, atol=1e-13)
    assert any(c == 0 for c in counts) or seed != 0, "the batches are meant to have empty steps"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighted", [False, True])
def test_packed_equals_padded(seed, weighted):
    batch = random_batch(seed, weighted=weighted)
    logits, packed, labels, cu = pack(batch)
    padded = batch.layout
    for name in ("labels", "step_offsets", "step_of_row", "step_sequence", "weights"):
        a, b = getattr(padded, name), getattr(packed, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    # the same rows: the logits they select are the same
    T = batch.labels.shape[1]
    assert torch.equal(batch.logits.reshape(-1, batch.logits.shape[-1])[padded.rows], logits[packed.rows])
    starts = cu[packed.step_sequence.long()[packed.step_of_row]]
    assert torch.equal(packed.rows - starts, padded.rows % T)
    assert "packed" in repr(packed) and packed.shape == (1, len(labels))


def test_packed_rows_never_cross_a_boundary():
    for seed in range(10):
        _, packed, labels, cu = pack(random_batch(seed))
        sequence = torch.bucketize(torch.arange(len(labels)), cu[1:], right=True)
        assert torch.equal(sequence[packed.rows], sequence[packed.rows + 1])
        assert torch.equal(packed.labels, labels[packed.rows + 1])
        assert torch.equal(sequence[packed.rows], packed.step_sequence.long()[packed.step_of_row])


def test_row_of_is_the_inverse_of_rows():
    layout = random_batch(3, weighted=True).layout
    assert torch.equal(layout.row_of[layout.rows].long(), torch.arange(layout.num_rows))
    assert int((layout.row_of >= 0).sum()) == layout.num_rows


def test_masked_span_inside_a_step_leaves_it_one_step():
    # a tool's output at positions 2 and 3, once marked by the labels and once by the step ids
    labels = torch.tensor([[9, 1, -100, -100, 2, 3]])
    by_label = StepLayout.from_step_ids(labels, torch.tensor([[-1, 0, 0, 0, 0, 1]]))
    by_id = StepLayout.from_step_ids(torch.tensor([[9, 1, 4, 4, 2, 3]]), torch.tensor([[-1, 0, -1, -1, 0, 1]]))
    for layout in (by_label, by_id):
        assert layout.rows.tolist() == [0, 3, 4]
        assert layout.step_offsets.tolist() == [0, 2, 3]


def test_empty_steps():
    # id 1 is left out, id 2 is all unscored, id 3 has only zero weights
    labels = torch.tensor([[9, 1, 2, -100, -100, 4, 5]])
    ids = torch.tensor([[-1, 0, 0, 2, 2, 3, 4]])
    weights = torch.tensor([[1.0, 1, 1, 1, 1, 0, 2]])
    layout = StepLayout.from_step_ids(labels, ids, token_weights=weights)
    assert layout.counts.tolist() == [2, 0, 0, 0, 1]
    assert layout.step_offsets.tolist() == [0, 2, 2, 2, 2, 3]
    packed = StepLayout.from_offsets(labels[0, :5], torch.tensor([0, 5]), torch.tensor([0, 3, 3, 5]))
    assert packed.counts.tolist() == [2, 0, 0]


def test_zero_token_weights_are_compacted_away():
    weights = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0.5, -1]])
    layout = StepLayout.from_step_ids(LABELS, IDS, token_weights=weights)
    assert layout.rows.tolist() == [1, 5, 6]
    assert layout.weights.tolist() == [2, 0.5, -1]
    assert layout.row_of.tolist() == [-1, 0, -1, -1, -1, 1, 2, -1]
    assert layout.counts.tolist() == [1, 0, 0, 2]


def test_with_row_weights():
    layout = StepLayout.from_step_ids(LABELS, IDS)
    weighted = layout.with_row_weights(torch.arange(1.0, 7.0))
    assert weighted.weights.tolist() == [1, 2, 3, 4, 5, 6] and layout.weights is None
    by_token = layout.with_row_weights(torch.arange(8.0).reshape(2, 4))
    assert by_token.weights.tolist() == [1, 2, 3, 5, 6, 7]
    with pytest.raises(ValueError, match=r"token_weights: expected shape \(6,\)"):
        layout.with_row_weights(torch.ones(5))
    with pytest.raises(ValueError, match=r"token_weights: expected shape \(2, 4\)"):
        layout.with_row_weights(torch.ones(2, 3))
    for bad in (0.0, float("nan"), float("inf")):  # a zero would still be counted: it belongs to the construction
        with pytest.raises(ValueError, match="token_weights: expected finite weights other than 0"):
            layout.with_row_weights(torch.tensor([1.0, 1, bad, 1, 1, 1]))
    with pytest.raises(TypeError, match="token_weights: expected a tensor of float32"):
        layout.with_row_weights(torch.ones(6, dtype=torch.long))


def test_integer_dtypes_and_other_ignore_index():
    want = fields_of(StepLayout.from_step_ids(LABELS, IDS))
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        ids = IDS if dtype == torch.uint8 else IDS.to(dtype)
        assert fields_of(StepLayout.from_step_ids(LABELS.to(dtype), ids)) == want
    layout = StepLayout.from_step_ids(torch.tensor([[1, 0, 2]]), torch.zeros(1, 3, dtype=torch.long), ignore_index=0)
    assert layout.labels.tolist() == [2]


@pytest.mark.parametrize(
    "layout",
    [
        StepLayout.from_step_ids(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long)),
        StepLayout.from_step_ids(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)),
        StepLayout.from_step_ids(LABELS, torch.full((2, 4), -1)),
        StepLayout.from_step_ids(torch.full((2, 4), -100), torch.full((2, 4), -1)),
        StepLayout.from_offsets(torch.zeros(0, dtype=torch.long), torch.tensor([0]), torch.tensor([0])),
        StepLayout.from_offsets(torch.arange(4), torch.tensor([0, 4]), torch.zeros(0, 2, dtype=torch.long)),
    ],
    ids=["no sequences", "no positions", "no step", "no label", "empty pack", "pack without steps"],
)
def test_nothing_to_score(layout):
    assert layout.num_rows == 0 and layout.num_steps == 0
    assert layout.step_offsets.tolist() == [0]
    assert (layout.row_of == -1).all() and len(layout.row_of) == layout.shape[0] * layout.shape[1]


def test_to_moves_every_tensor_and_only_those():
    layout = random_batch(1, weighted=True).layout
    moved = layout.to("meta")
    tensors = {n for n, v in vars(layout).items() if isinstance(v, torch.Tensor) and not n.startswith("host_")}
    assert {"rows", "labels", "weights", "step_offsets", "row_of"} <= tensors
    assert all(getattr(moved, n).device.type == "meta" for n in tensors)
    assert moved.device.type == "meta" and layout.device.type == "cpu"
    assert torch.equal(moved.host_step_offsets, layout.host_step_offsets)
    assert fields_of(layout.to("cpu")) == fields_of(layout)


def test_pickles():  # DataLoader workers send layouts to the main process
    layout = random_batch(1, weighted=True).layout
    assert fields_of(pickle.loads(pickle.dumps(layout))) == fields_of(layout)


# ---- messages: each names the argument, what was expected, what came, and where


def raises(error, match):
    return pytest.raises(error, match=match)


@pytest.mark.parametrize(
    ("labels", "ids", "options", "error", "match"),
    [
        ([[1, 2]], torch.zeros(1, 2, dtype=torch.long), {}, TypeError, r"labels: expected a torch.Tensor, got \[\[1, 2\]\] \(list\)"),
        (LABELS.float(), IDS, {}, TypeError, "labels: expected an integer tensor, got torch.float32"),
        (LABELS[0], IDS[0], {}, ValueError, r"labels: expected 2 dimensions, got torch.int64 tensor of shape \(4,\)"),
        (LABELS, IDS.float(), {}, TypeError, "step_ids: expected an integer tensor"),
        (LABELS, IDS[:, :3], {}, ValueError, r"step_ids: expected shape \(2, 4\), got torch.int64 tensor of shape \(2, 3\)"),
        (LABELS, IDS - 1, {}, ValueError, r"step_ids: expected 0, 1, 2, ... or -1 \(not scored\), got -2 in sequence 0 at position 0"),
        (LABELS, torch.tensor([[0, 1, 1, 2], [1, 1, -1, 0]]), {}, ValueError, "step_ids: expected ids that never go back.*got 0 in sequence 1 at position 3"),
        (LABELS, torch.tensor([[0, 1, 1, 2], [0, 0, 1, 4]]), {}, ValueError, "step_ids: expected ids below the sequence length 4, got 4 in sequence 1 at position 3"),
        (LABELS.masked_fill(LABELS == 3, -7), IDS, {}, ValueError, r"labels: expected values in \[0, V\) or -100 \(ignore_index\), got -7 in sequence 1 at position 2"),
        (LABELS, IDS, {"vocab_size": 8}, ValueError, r"labels: expected values in \[0, 8\) or -100 .*got 8 in sequence 0 at position 3"),
        (LABELS, IDS, {"token_weights": torch.ones(2, 3)}, ValueError, r"token_weights: expected shape \(2, 4\)"),
        (LABELS, IDS, {"token_weights": torch.ones(2, 4).long()}, TypeError, "token_weights: expected a tensor of float32"),
        (LABELS, IDS, {"token_weights": torch.full((2, 4), float("nan"))}, ValueError, "token_weights: expected finite weights"),
        (LABELS, IDS, {"token_weights": torch.full((2, 4), float("inf"))}, ValueError, "token_weights: expected finite weights"),
    ],
)  # fmt: skip
def test_from_step_ids_messages(labels, ids, options, error, match):
    with raises(error, match):
        StepLayout.from_step_ids(labels, ids, **options)


FLAT, CU, OFFSETS = LABELS.reshape(-1), torch.tensor([0, 4, 8]), torch.tensor([0, 2, 4, 8])


@pytest.mark.parametrize(
    ("labels", "cu", "offsets", "options", "error", "match"),
    [
        (LABELS, CU, OFFSETS, {}, ValueError, "labels: expected 1 dimensions"),
        (FLAT, [0, 8], OFFSETS, {}, TypeError, "cu_seqlens: expected a torch.Tensor"),
        (FLAT, CU.float(), OFFSETS, {}, TypeError, "cu_seqlens: expected an integer tensor"),
        (FLAT, torch.tensor([0, 4]), OFFSETS, {}, ValueError, r"cu_seqlens: expected 0 <= ... <= 8 .*got \[0, 4\]"),
        (FLAT, torch.tensor([1, 8]), OFFSETS, {}, ValueError, "cu_seqlens: expected 0 <="),
        (FLAT, torch.tensor([0, 5, 3, 8]), OFFSETS, {}, ValueError, "cu_seqlens: expected .* never falling"),
        (FLAT, torch.zeros(0, dtype=torch.long), OFFSETS, {}, ValueError, "cu_seqlens: expected"),
        (FLAT, CU, torch.zeros(0, dtype=torch.long), {}, ValueError, "step_offsets: expected S . 1 offsets"),
        (FLAT, CU, torch.zeros(1, 3, dtype=torch.long), {}, ValueError, r"step_offsets: expected shape \(S . 1,\) or \(S, 2\), got \(1, 3\)"),
        (FLAT, CU, torch.tensor([2, 4, 8]), {}, ValueError, r"step_offsets: expected S . 1 offsets from 0 to 8 .*got 2 to 8"),
        (FLAT, CU, torch.tensor([0, 4]), {}, ValueError, r"step_offsets: expected S . 1 offsets from 0 to 8 .*got 0 to 4"),
        (FLAT, CU, torch.tensor([0, 4, 2, 8]), {}, ValueError, r"step_offsets: expected ascending spans within \[0, 8\], got \[4, 2\] for step 1"),
        (FLAT, CU, torch.tensor([[0, 3], [2, 4]]), {}, ValueError, r"expected ascending spans.*got \[2, 4\] for step 1"),
        (FLAT, CU, torch.tensor([[0, 3], [4, 9]]), {}, ValueError, r"expected ascending spans.*got \[4, 9\] for step 1"),
        (FLAT, CU, torch.tensor([[-1, 3]]), {}, ValueError, r"expected ascending spans.*got \[-1, 3\] for step 0"),
        (FLAT, CU, torch.tensor([[0, 2], [2, 6]]), {}, ValueError, r"expected every step inside one sequence, got step 1 = \[2, 6\], which crosses the boundary at 4"),
        (FLAT, CU, torch.tensor([[0, 8]]), {}, ValueError, "crosses the boundary at 4"),
        (FLAT[:0], torch.tensor([0]), torch.tensor([[0, 0]]), {}, ValueError, "step_offsets: expected no steps"),
        (FLAT, CU, torch.tensor([0, 4, 8]), {"token_weights": torch.ones(2, 4)}, ValueError, r"token_weights: expected shape \(8,\)"),
        (FLAT, CU, torch.tensor([0, 4, 8]), {"vocab_size": 4}, ValueError, r"labels: expected values in \[0, 4\).*got 5 in sequence 0 at position 0"),
        (FLAT.masked_fill(FLAT == 3, -1), CU, torch.tensor([0, 4, 8]), {}, ValueError, "got -1 in sequence 1 at position 2"),
    ],
)  # fmt: skip
def test_from_offsets_messages(labels, cu, offsets, options, error, match):
    with raises(error, match):
        StepLayout.from_offsets(labels, cu, offsets, **options)


def test_check_logits_messages():
    layout = StepLayout.from_step_ids(LABELS, IDS)
    with raises(
        ValueError, r"logits: expected shape \(2, 4, 9\).*unshifted.*, got torch.float32 tensor of shape \(2, 3, 9\)"
    ):
        layout.check_logits(torch.zeros(2, 3, 9))
    with raises(ValueError, r"logits: expected shape \(2, 4, 9\)"):
        layout.check_logits(torch.zeros(8, 9))  # flattened: only a packed batch is flat
    with raises(ValueError, "logits: expected 2 or 3 dimensions"):
        layout.check_logits(torch.zeros(4))
    with raises(ValueError, r"labels: expected values in \[0, 8\), got 8 in sequence 0 at position 3"):
        layout.check_logits(torch.zeros(2, 4, 8))
    packed = StepLayout.from_offsets(FLAT, CU, OFFSETS)
    assert packed.check_logits(torch.zeros(8, 9)).shape == packed.check_logits(torch.zeros(1, 8, 9)).shape == (1, 8, 9)


def test_an_unscored_label_is_checked_too():
    """With and without vocab_size: the same rule."""
    labels = torch.tensor([[50, 6, 7, 8]])
    ids = torch.tensor([[-1, 0, 0, 1]])
    for build in (
        lambda: StepLayout.from_step_ids(labels, ids, vocab_size=9),
        lambda: StepLayout.from_step_ids(labels, ids).check_vocab(9),
    ):
        with raises(ValueError, "got 50 in sequence 0 at position 0"):
            build()


def test_check_logits_copies_only_what_it_must():
    layout = StepLayout.from_step_ids(LABELS, IDS)
    logits = torch.randn(4, 2, 9).transpose(0, 1)
    assert layout.check_logits(logits).data_ptr() == logits.data_ptr()
    assert layout.check_logits(torch.randn(2, 9, 4).transpose(1, 2)).is_contiguous()
