"""Gated MLPs of which each token reads some neurons: estimates, records, and what the loops make of both."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf_blocks import GGUF_KINDS, blocks_of
from rounding import rounded_inputs

from coreinfer_sim.engines.lean.by_token import outputs_by_token
from coreinfer_sim.engines.lean.formats import FORMATS, HIGH
from coreinfer_sim.engines.lean.intrinsics import RELU, SILU
from coreinfer_sim.engines.lean.matrix import Matrix
from coreinfer_sim.engines.lean.planes import of_stored, of_weights
from coreinfer_sim.engines.lean.record_part import RecordPart
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.gguf_codes import QuantisedTensor

KINDS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "Q8_0": (torch.float32, "Q8_0"),
    "Q4_1": (torch.bfloat16, "Q4_1"),
}
SHAPES = [(64, 96), (320, 48), (77, 53), (300, 40), (256, 277), (8, 5)]
"""d_model and n_ff: whole tiles and lines, and odd ones; more neurons than are estimated before any is read."""


def gated(kind="float32", d_model=64, n_ff=96, biased=False, seed=0):
    """Random weights and biases, and the MLP that is laid out of them."""
    dtype, rounded = KINDS[kind]
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    weights = draw(n_ff, d_model), draw(n_ff, d_model), draw(d_model, n_ff)
    biases = (draw(n_ff), draw(n_ff), draw(d_model)) if biased else (None, None, None)
    return weights, biases, of_weights(weights, biases, rounded)


def inputs(n_rows, d_model, seed=1):
    x = torch.randn(n_rows, d_model, generator=torch.Generator().manual_seed(seed))
    x[0, : min(40, d_model // 2)] = 0  # a block without a scale
    return x


def gates_and_ups(mlp, x, weights):
    """Products with gate and up [n_ff, d_model], float32 [2, n_rows, n_ff]."""
    biases = [0 if part.bias is None else part.bias[: mlp.n_ff] for part in (mlp.gate, mlp.up)]
    return torch.stack([x @ part.T + bias for part, bias in zip(weights, biases, strict=True)])


def activated(both, kind):
    return (F.silu(both[0]) if kind == SILU else F.relu(both[0])) * both[1]


def scores_of(mlp, x, kind):
    """Estimated contributions by hand."""
    both = gates_and_ups(mlp, rounded_inputs(x), [mlp.gate.widened().T, mlp.up.widened().T])
    return activated(both, kind).abs() * mlp.norms


def rows_of(mlp, part):
    return mlp.rows(part, 0, mlp.n_ff)


def expected_outputs(mlp, x, kind, reads):
    """What neurons add that a mask [n_rows, n_ff] names."""
    both = gates_and_ups(mlp, rounded_inputs(x) if mlp.packed else x, [rows_of(mlp, 0), rows_of(mlp, 1)])
    out = (activated(both, kind) * reads) @ rows_of(mlp, 2)
    return out if mlp.bias is None else out + mlp.bias[: mlp.d_model]


def near(mlp):
    """How near outputs are to `expected_outputs`: with codes, what four neurons give is rounded to 8 bits before it is added."""
    return 1e-2 if mlp.packed else 1e-5


def in_a_gap(scores, share):
    """A threshold that about a share of the scores reach, in the middle of the widest gap thereabouts."""
    ordered = scores.flatten().unique()
    place = int(len(ordered) * (1 - share))
    near = ordered[max(0, place - 8) : place + 9]
    widest = int((near[1:] / near[:-1].clamp_min(1e-9)).argmax())
    return float((near[widest] + near[widest + 1]) / 2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [SILU, RELU])
@pytest.mark.parametrize(("d_model", "n_ff"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_neurons_whose_estimate_reaches_the_threshold_are_read_and_no_others(kind, d_model, n_ff, activation, biased):
    _, _, mlp = gated(kind, d_model, n_ff, biased)
    for n_rows in (1, 3, 5, 33):  # one row and four at a time; more than go at once
        x = inputs(n_rows, d_model)
        scores = scores_of(mlp, x, activation)
        close = 2e-6 * scores.max()
        assert (mlp.contributions(x, activation) - scores).abs().max() <= 4 * close
        threshold = in_a_gap(scores, 0.3)
        reads = scores >= threshold
        assert 0 < reads.sum() < reads.numel()
        found, n_read = mlp.outputs(x, activation, threshold)
        expected = expected_outputs(mlp, x, activation, reads)
        assert n_read == reads.sum()
        assert (found - expected).abs().max() <= near(mlp) * expected.abs().max()
        alone, n_read = mlp.outputs(x[-1:], activation, threshold)
        assert n_read == reads[-1].sum()
        assert (alone[0] - found[-1]).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("activation", [SILU, RELU])
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_0_reads_all_and_infinity_none(kind, activation):
    weights, biases, mlp = gated(kind, 77, 53, biased=True)
    x = inputs(5, 77)
    found, n_read = mlp.outputs(x, activation)
    everything = torch.ones(5, 53, dtype=torch.bool)
    expected = expected_outputs(mlp, x, activation, everything)
    assert n_read == 5 * 53  # those too that ReLU has set to nothing
    assert (found - expected).abs().max() <= near(mlp) * expected.abs().max()
    if not mlp.packed:
        gate, up, down = ((w.float(), b.float()) for w, b in zip(weights, biases, strict=True))
        dense = F.linear(activated((F.linear(x, *gate), F.linear(x, *up)), activation), *down)
        assert (found - dense).abs().max() <= 1e-5 * dense.abs().max()
    found, n_read = mlp.outputs(x, activation, float("inf"))
    assert n_read == 0 and torch.equal(found, mlp.bias[:77].expand(5, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_ff", [5, 53, 600])
def test_threads_share_the_neurons(kind, n_ff):
    """Also more of them than there are tiles."""
    _, _, mlp = gated(kind, 77, n_ff, biased=True)
    x = inputs(5, 77)
    threshold = in_a_gap(scores_of(mlp, x, SILU), 0.4)
    expected, n_all = mlp.outputs(x, SILU, threshold)
    counts = set()
    for n_threads in (1, 2, 3, 7):
        out, n_read = torch.full_like(x, 7.0), np.array([100, 1000])  # counts are added to what is there
        outputs_by_token(x.numpy(), mlp.words, SILU, n_threads, np.float32(threshold), n_read, out.numpy())
        assert (out - expected).abs().max() <= (near(mlp) if mlp.packed else 1e-6) * expected.abs().max()
        assert n_read[1] - 1000 == n_all >= n_read[0] - 100
        counts.add(int(n_read[0]))
    assert len(counts) == 1
    reads = scores_of(mlp, x, SILU) >= threshold
    assert counts == {100 + int(reads.any(0).sum())}


@pytest.mark.parametrize(("d_model", "n_ff"), [*SHAPES, (32, 2100)])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_weights(kind, d_model, n_ff):
    """To the bit, or as codes of the type leave them; also of more neurons than are rounded at a time."""
    weights, _, mlp = gated(kind, d_model, n_ff)
    weights = [weights[0], weights[1], weights[2].T.contiguous()]
    for part, weight in enumerate(weights):
        rounded = KINDS[kind][1]
        expected = weight.float() if rounded is None else Matrix.of(weight, None, rounded).widened().T
        if rounded is None:
            assert torch.equal(rows_of(mlp, part), expected)
        assert torch.allclose(rows_of(mlp, part), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(mlp.rows(part, 0, 5), rows_of(mlp, part)[:5])
        if n_ff > 32:
            assert torch.equal(mlp.rows(part, 16, 33), rows_of(mlp, part)[16:33])
    assert torch.allclose(mlp.norms, weights[2].float().norm(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_near_and_no_bit_lies_twice(kind):
    weights, _, mlp = gated(kind, 512, 96)
    for matrix, weight in zip((mlp.gate, mlp.up), weights, strict=False):
        error = (matrix.widened().T - weight.float()).square().mean() / weight.float().square().mean()
        assert error <= {"Q8_0": 0.13, "Q4_1": 0.33}.get(kind, 0.09) ** 2
    assert mlp.record_bytes % 64 == 0
    whole = 3 * 96 * 512 * {"float32": 32, "Q8_0": 8.5, "Q4_1": 5}.get(kind, 16) / 8
    estimate = 0 if KINDS[kind][1] else 2 * 96 * 512 * 4.5 / 8
    assert whole + estimate <= mlp.n_bytes <= 1.03 * (whole + estimate) + 96 * 64
    assert mlp.estimate_bytes + 96 * mlp.record_bytes == mlp.n_bytes


def test_high_planes_are_named_by_their_types():
    for kind, (_, rounded) in KINDS.items():
        assert gated(kind)[2].kind == (kind if rounded is None else HIGH[rounded])


def of_file(kind, down_kind, d_model=512, n_ff=77, biases=(None, None, None)):
    """An MLP whose gate and up are codes of a file, these widened [n_ff, d_model], and the down projection."""
    n_out = {"up": n_ff, "gate": n_ff}
    raw = {name: blocks_of(kind, n, d_model, seed) for seed, (name, n) in enumerate(n_out.items())}
    codes = [QuantisedTensor(kind, n_ff, d_model, raw[name]) for name in ("gate", "up")]
    wide = [
        torch.from_numpy(gguf.quants.dequantize(raw[name], gguf.GGMLQuantizationType[kind])) for name in ("gate", "up")
    ]
    down = torch.randn(d_model, n_ff, generator=torch.Generator().manual_seed(3))
    of_down = None if down_kind is None else QuantisedTensor(down_kind, d_model, n_ff, np.zeros((0, 0), np.uint8))
    mlp = of_stored([*codes, of_down], lambda part, dtype: down if part == 2 else wide[part], biases)
    return mlp, wide, down


@pytest.mark.parametrize("n_rows", [1, 6])
@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_codes_of_a_file_are_kept_to_the_bit(kind, n_rows):
    """And divided: what is estimated by the upper bits is completed by the lower ones."""
    biases = tuple(torch.randn(n) / 8 for n in (77, 77, 512))
    mlp, wide, down = of_file(kind, "Q6_K", biases=biases)
    assert mlp.kind == HIGH[kind]
    for part in range(2):
        assert (rows_of(mlp, part) - wide[part]).abs().max() <= 1e-6 * wide[part].abs().max()
    expected = Matrix.of(down.T.contiguous(), None, "Q8_0").widened().T
    assert torch.allclose(rows_of(mlp, 2), expected, rtol=1e-5, atol=1e-6)
    x = inputs(n_rows, 512) / 16
    scores = scores_of(mlp, x, SILU)
    threshold = in_a_gap(scores, 0.4)
    reads = scores >= threshold
    found, n_read = mlp.outputs(x, SILU, threshold)
    made = expected_outputs(mlp, x, SILU, reads)
    assert n_read == reads.sum() and (found - made).abs().max() <= near(mlp) * made.abs().max()


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_each_bit_of_a_file_lies_in_one_plane(kind):
    """Scales of scales take whole bytes; output rows are rounded to 8 bits, or to 4 where the file has four."""
    for down_kind, bits in (("Q6_K", 8.5), ("Q4_K", 5), ("Q4_0", 5), (None, 8.5)):
        mlp, _, _ = of_file(kind, down_kind, n_ff=96)
        expected = 2 * blocks_of(kind, 96, 512).nbytes + 96 * 512 * bits / 8
        assert expected <= mlp.n_bytes <= 1.03 * expected + 96 * 64
        n_low = 2 * 96 * 512 * FORMATS[mlp.kind].low_bits / 8
        assert mlp.estimate_bytes <= 1.03 * 2 * blocks_of(kind, 96, 512).nbytes - n_low + 4 * 96


@pytest.mark.parametrize(("gate", "up"), [(None, "Q4_0"), ("Q4_0", "Q4_1"), (None, None)])
def test_a_file_of_several_types_is_read_as_floats(gate, up):
    weights = [torch.randn(77, 64), torch.randn(77, 64), torch.randn(64, 77)]
    codes = [
        None if kind is None else QuantisedTensor(kind, 77, 64, blocks_of(kind, 77, 64)) for kind in (gate, up, None)
    ]
    mlp = of_stored(codes, lambda part, dtype: weights[part], (None, None, None))
    assert mlp.kind == mlp.output_kind == "float32" and torch.equal(rows_of(mlp, 0), weights[0])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_held_neurons_are_those_that_were_cut_before(kind, biased):
    weights, biases, mlp = gated(kind, 77, 53, biased)
    ids = torch.randperm(53, generator=torch.Generator().manual_seed(2))[:21].sort().values
    held = mlp.held(ids)
    gate, up, down = weights
    of_gate, of_up, of_down = biases
    cut = of_weights(
        (gate[ids], up[ids], down[:, ids]),
        (of_gate[ids] if biased else None, of_up[ids] if biased else None, of_down),
        KINDS[kind][1],
    )
    for part in range(3):
        assert torch.equal(rows_of(held, part), rows_of(cut, part))
    assert torch.equal(held.records, cut.records) and torch.equal(held.norms, cut.norms)
    x = inputs(6, 77)
    assert torch.equal(held.contributions(x, SILU), cut.contributions(x, SILU))
    threshold = in_a_gap(scores_of(cut, x, SILU), 0.4)
    for one, other in zip(held.outputs(x, SILU, threshold), cut.outputs(x, SILU, threshold), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert held.n_bytes == cut.n_bytes and (held.n_ff, held.d_model) == (21, 77)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compensation_is_merged(kind, biased):
    _, _, mlp = gated(kind, 77, 53, biased)
    ids = torch.arange(0, 53, 3)
    repair = LayerCompensation(torch.randn(77), torch.randn(77, len(ids)) / 8)
    held, plain = mlp.held(ids, repair), mlp.held(ids)
    wanted = rows_of(plain, 2) + repair.delta.float().T
    dtype, rounded = KINDS[kind]
    expected = wanted.to(dtype).float() if rounded is None else Matrix.of(wanted, None, rounded).widened().T
    assert (rows_of(held, 2) - expected).abs().max() <= 0.01 * wanted.abs().max()
    if kind == "float32":
        assert torch.allclose(rows_of(held, 2), wanted, atol=1e-6)
    for part in range(2):
        assert torch.equal(rows_of(held, part), rows_of(plain, part))
    bias = repair.bias.float() if plain.bias is None else repair.bias + plain.bias[:77]
    assert torch.allclose(held.bias[:77], bias)
    assert torch.allclose(held.norms, wanted.norm(dim=1), rtol=0.02)
    x = inputs(4, 77)
    everything = torch.ones(4, len(ids), dtype=torch.bool)
    made = expected_outputs(held, x, SILU, everything)
    assert (held.outputs(x, SILU)[0] - made).abs().max() <= near(mlp) * made.abs().max()
    assert torch.equal(rows_of(mlp.held(ids), 2), rows_of(plain, 2))  # what is whole stays as it was


@pytest.mark.parametrize(("d_model", "n_ff"), [(77, 53), (32, 2100)])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_linear_maps(kind, d_model, n_ff):
    """As prefill reads them."""
    _, _, mlp = gated(kind, d_model, n_ff, biased=True)
    biases = mlp.gate.bias, mlp.up.bias, mlp.bias
    for number, part in enumerate(mlp.parts):
        assert isinstance(part, RecordPart)
        rows = rows_of(mlp, number)
        weight = rows.T if number == 2 else rows
        assert (part.n_out, part.n_in) == weight.shape and torch.equal(part.widened(), weight.T)
        x = inputs(9, part.n_in)
        rounded = mlp.packed and number < 2
        expected = (rounded_inputs(x) if rounded else x) @ weight.T + biases[number][: part.n_out]
        most = 1e-5 if rounded or "32" in kind else 1e-3 if kind == "float16" else 1e-2  # what torch multiplies in
        for found in (part.times(x), part.of_few(x.numpy())):
            assert (found - expected).abs().max() <= most * expected.abs().max()
        many = part.times(x.repeat(40, 1))  # more rows than a tile is put together for
        assert (many - found.repeat(40, 1)).abs().max() <= most * expected.abs().max()
        # where the processor multiplies matrices of bfloat16, in which sums are, too
        narrowed, exact = part.times_narrowed(x.repeat(15, 1)), x @ weight.T + biases[number][: part.n_out]
        assert (narrowed - exact.repeat(15, 1)).abs().max() <= 0.01 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_refitted_output_rows_are_read_in_place_of_the_records_own(kind):
    _, _, mlp = gated(kind, 77 if KINDS[kind][1] is None else 320, 277, biased=True)
    x, d_model = inputs(5, mlp.d_model), mlp.d_model
    change = LayerCompensation(torch.randn(d_model), torch.randn(d_model, 277) / 16)
    changed = mlp.refit(change)
    threshold = float(mlp.contributions(x, SILU).quantile(0.5))
    before, n_before = mlp.outputs(x, SILU, threshold)
    found, n_read = changed.outputs(x, SILU, threshold)
    # 1) what is chosen, and how many bytes that is, stays the same
    assert n_read == n_before and changed.bytes_read(n_read, 5, 0.5) == mlp.bytes_read(n_read, 5, 0.5)
    # 2) as if the rows were the MLP's own
    ids = torch.arange(277)
    expected, _ = replace(mlp.held(ids, change), norms=mlp.norms).outputs(x, SILU, threshold)
    assert torch.equal(found, expected) and not torch.equal(found, before)
    # 3) prefill and dense decode read the records' own, over the same memory
    assert torch.equal(changed.whole_outputs(x, SILU), mlp.whole_outputs(x, SILU))
    assert changed.records is mlp.records and changed.n_bytes < 0.6 * mlp.n_bytes
