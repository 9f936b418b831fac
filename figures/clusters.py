"""What a semantic cluster tells about the neurons that a token needs, beside the corpus, the prompt, and the tokens before."""

from __future__ import annotations

from collections import defaultdict

import click

from figures.record import at_least, record
from figures.table import REQUIRED, Given, figure
from figures.tools import sets_of

FILE = "figures-token.json"
_LATEST = 20  # tokens whose choice is a held set of its own
_RANDOM = "random-cluster"


@figure(
    FILE, "an index, DATA", "10 minutes for 135 million weights",
    model=REQUIRED, name=None, index=REQUIRED, data=REQUIRED, rows=2, max_tokens=256,
)  # fmt: skip
@click.option("--held", type=float, default=0.4, show_default=True, help="Share of the neurons that is held.")
def held(given: Given, held: float) -> None:
    """Share of a token's own top neurons that lie in a held set of the same size, on rows that nothing has seen.

    A neuron counts for a token by |z_n| · ‖w_out,n‖, and on a model with ReLU those count that are not zero. Prompts are read
    densely; completions are the tokens that decode would read.
    """
    import torch

    from coreinfer_sim import SemanticIndex, load_model
    from coreinfer_sim.choosing.index_sets import IndexSets
    from coreinfer_sim.evaluation.rows import joined, read_sets
    from coreinfer_sim.models.mlps import linear_parameters
    from coreinfer_sim.models.taps import recorded_activations

    # 1) sets, norms and rows
    index, lm = SemanticIndex.load(given.index), load_model(given.model, as_stored=True)
    sets = IndexSets(index, held, compensated=False)
    corpus, n_clusters = sets.of_corpus().ids, len(index.clusters)
    norms = {layer.number: linear_parameters(layer.output)[0].float().norm(dim=0) for layer in lm.layers}
    rows = read_sets(sets_of(given.data, seen_only=True), range(85, 100), given.rows)
    found: dict[str, list[float]] = defaultdict(list)
    zeros: list[float] = []
    for number, row in enumerate(rows):
        # 2) activations of one text
        prompt, completion = joined(row.prompt, row.completion)
        begin = lm.tokenizer(prompt, return_tensors="pt").input_ids[:, -given.max_tokens // 2 :]
        rest = lm.tokenizer(completion, add_special_tokens=False, return_tensors="pt").input_ids[
            :, : given.max_tokens // 2
        ]
        ids, n_prompt = torch.cat([begin, rest], 1), begin.shape[1]
        values: dict[int, torch.Tensor] = {}
        with (
            recorded_activations(lm.layers, values.__setitem__) as tap,
            torch.inference_mode(),
        ):
            tap.set_mask(torch.ones_like(ids))
            lm.model(ids)
        # 3) what each held set has of what the tokens of the completion need
        cluster = index.lookup(row.prompt)[0].cluster
        other = (cluster + 1 + number % max(1, n_clusters - 1)) % n_clusters
        for layer, z in values.items():
            counts = z.float().abs() * norms[layer]
            n_held = max(1, round(held * z.shape[1]))
            needed = torch.zeros_like(counts).scatter_(1, counts.topk(n_held, 1).indices, 1.0) * (counts > 0)
            zeros.append(float((z == 0).float().mean()))
            own = counts[:n_prompt].square().mean(0).topk(n_held).indices
            fixed = {
                "cluster": sets.of_cluster(cluster).ids[layer], "corpus": corpus[layer],
                _RANDOM: sets.of_cluster(other).ids[layer], "prompt": own,
            }  # fmt: skip
            decoded = needed[n_prompt:]
            n_needed = decoded.sum(1).clamp_min(1)
            for name, ids_held in fixed.items():
                found[name].append(float((decoded[:, ids_held].sum(1) / n_needed).mean()))
            found["latest"].append(_of_latest(needed, n_prompt, n_held))
    # 4) figures
    facts = {"rows_per_set": given.rows, "n_rows": len(rows), "n_clusters": n_clusters, "held": held}
    means = {name: sum(each) / len(each) for name, each in found.items()}
    titles = {
        "cluster": "its cluster's", "corpus": "the corpus's", _RANDOM: "another cluster's", "prompt": "its prompt's",
        "latest": f"that of the {_LATEST} tokens before",
    }  # fmt: skip
    for name, title in titles.items():
        record(
            f"{given.name}: share of a token's top {held:g} that lies in {title} held {held:g}", round(means[name], 4), "of them",
            at_least(round(1.05 * means["corpus"], 4)) if name == "cluster" else None, **facts,
        )  # fmt: skip
    record(f"{given.name}: activations that are exactly zero", round(sum(zeros) / len(zeros), 4), "of all", **facts)


def _of_latest(needed: object, n_prompt: int, n_held: int) -> float:
    """Return the share of each decoded token's needs that the tokens before it chose most often, mean over tokens.

    Args:
        needed: 1 where a token needs a neuron, float [n_tokens, d_ff].
        n_prompt: tokens that are not decoded.
        n_held: neurons that are held.
    """
    import torch

    assert isinstance(needed, torch.Tensor)
    shares = []
    for position in range(n_prompt, len(needed)):
        before = needed[max(0, position - _LATEST) : position].sum(0).topk(n_held).indices
        shares.append(float(needed[position, before].sum() / needed[position].sum().clamp_min(1)))
    return sum(shares) / max(1, len(shares))
