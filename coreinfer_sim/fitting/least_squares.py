"""Closed-form compensation: what the dropped neurons gave, won back from the kept ones by least squares.

Pure functions on second moments of one layer. With f the features at the activation site and t the output that the MLP
should give, the kept neurons' output weights are moved by the ridge regression of what they leave open,

    Δ = (E[f_S f_Sᵀ] + λ·diag E[f_S f_Sᵀ])⁻¹ (E[f_S tᵀ] − E[f_S f_Sᵀ] W_Sᵀ),   all moments centred,

and the output bias takes the difference of the means. Neurons are ranked by what this regression cannot repair: the
optimal-brain-surgeon score ‖w_n‖² / [(E[f fᵀ])⁻¹]_nn (Hassibi and Stork, 1993).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from coreinfer_sim.base.errors import BuildError, ConfigError

RIDGE = 0.02
"""λ, relative to each feature's own variance, where neurons are ranked."""
RIDGES = (0.02, 0.06, 0.2, 0.6, 2.0, 6.0, 20.0)
"""λ that a fit may take: with few tokens a neuron the least one learns their noise."""
FEW_TEXTS_RIDGE = 2.0
"""For texts too few to choose it on, and where the choice begins."""


@dataclass(frozen=True)
class LayerCompensation:
    """What is added to the compact MLP of one layer; the change of the output weights is ``left @ right``."""

    bias: torch.Tensor
    """Added to the output bias, [d_model]."""
    left: torch.Tensor
    """Change of the output weights, [d_model, n_kept], or its first factor [d_model, rank]."""
    right: torch.Tensor | None = None
    """Second factor [rank, n_kept]; None at full rank."""
    bypass_in: torch.Tensor | None = None
    """What the bypass reads off the MLP's input, [bypass_rank, d_model]."""
    bypass_out: torch.Tensor | None = None
    """What it adds to the output, [d_model, bypass_rank]."""

    @property
    def delta(self) -> torch.Tensor:
        """The change of the kept neurons' output weights, float32 [d_model, n_kept]."""
        return self.delta_of(slice(None))

    def delta_of(self, rows: slice) -> torch.Tensor:
        """Return some rows of `delta`, so that not all of them need be in float32 at a time."""
        left = self.left[rows].float()
        return left if self.right is None else left @ self.right.float()

    def to(self, device: str | torch.device, copy: bool = False) -> LayerCompensation:
        """Return it on another device; with ``copy`` even if it is there: what comes from a file holds on to all of that."""
        moved = {name: value.to(device, copy=copy) for name, value in vars(self).items() if value is not None}
        return LayerCompensation(**moved)

    @property
    def bypass_rank(self) -> int:
        """Number of bypass neurons."""
        return 0 if self.bypass_in is None else len(self.bypass_in)


class Moments:
    """Weighted sums of products of features [n_tokens, n_features] and targets [n_tokens, d_model]."""

    def __init__(self, n_features: int, d_model: int, device: torch.device | str = "cpu") -> None:
        """Begin with nothing."""
        self.n_tokens = 0.0
        """Sum w of the tokens' weights."""
        self.gram = torch.zeros(n_features, n_features, device=device)
        self.cross = torch.zeros(n_features, d_model, device=device)
        self.features = torch.zeros(n_features, device=device)
        self.targets = torch.zeros(d_model, device=device)
        """Σ w f fᵀ, Σ w f tᵀ, Σ w f and Σ w t."""

    def add(self, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens.

        Args:
            features: [n_tokens, n_features].
            targets: [n_tokens, d_model].
            weights: not negative, a few different ones, [n_tokens].
        """
        small = all(values.dtype is torch.bfloat16 for values in (features, targets))
        features, targets, weights = features.float(), targets.float(), weights.float()
        self.n_tokens += float(weights.sum())
        # A factor that carries its weight would be rounded, the other one not, and their product no covariance.
        for weight in weights.unique().tolist():
            part = weights == weight
            some = features[part]
            with _fast_products() if small else nullcontext():
                self.gram.addmm_(some.T, some, alpha=weight)
                self.cross.addmm_(some.T, targets[part], alpha=weight)
        self.features += weights @ features
        self.targets += weights @ targets

    def add_moments(self, other: Moments, n_tokens: float | None = None) -> None:
        """Add other moments; as if they had been taken over ``n_tokens``, that is shrinkage towards them."""
        share = 1.0 if n_tokens is None else n_tokens / other.n_tokens
        self.n_tokens += share * other.n_tokens
        for name in ("gram", "cross", "features", "targets"):
            getattr(self, name).add_(getattr(other, name).to(self.gram.device), alpha=share)

    def of(self, features: torch.Tensor) -> Moments:
        """Return the moments of some features [n] alone."""
        chosen = Moments(0, 0)
        chosen.n_tokens, chosen.targets = self.n_tokens, self.targets
        chosen.gram = self.gram[features][:, features]
        chosen.cross, chosen.features = self.cross[features], self.features[features]
        return chosen

    def centred(self) -> CentredMoments:
        """Return means and covariances.

        Raises:
            ConfigError: no tokens were added.
        """
        if self.n_tokens <= 0:
            raise ConfigError("there are no tokens to compensate with, expected some in every cluster.")
        n = self.n_tokens
        mean_features, mean_targets = self.features / n, self.targets / n
        gram = (self.gram / n).addr_(mean_features, mean_features, alpha=-1)
        cross = (self.cross / n).addr_(mean_features, mean_targets, alpha=-1)
        return CentredMoments(gram, cross, mean_features, mean_targets)


@dataclass(frozen=True)
class CentredMoments:
    """Covariances and means of features and targets."""

    gram: torch.Tensor
    """Cov(f, f), [n_features, n_features]."""
    cross: torch.Tensor
    """Cov(f, t), [n_features, d_model]."""
    mean_features: torch.Tensor
    mean_targets: torch.Tensor


def surgeon_score(gram: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """Return how much squared error remains if one neuron is dropped and the others make up for it, [d_ff].

    Args:
        gram: Cov(z, z), [d_ff, d_ff].
        output_weight: [d_model, d_ff].
    """
    inverse = torch.cholesky_inverse(_cholesky(gram, RIDGE))
    return output_weight.float().square().sum(0) / inverse.diagonal().clamp_min(torch.finfo(torch.float32).tiny)


def left_over(gram: torch.Tensor, output_weight: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Return the squared error that compensation leaves if the best 1, 2, … d_ff neurons stay, [d_ff].

    By one score the sets are nested, so one Cholesky factor L serves all of them: the first n rows of L⁻¹ Cov(z, t) hold
    what n neurons explain of the output t.

    Args:
        gram: Cov(z, z), [d_ff, d_ff].
        output_weight: [d_model, d_ff].
        score: the best have the highest, [d_ff].
    """
    weight = output_weight.float()
    order = score.argsort(descending=True)
    cross = gram[order] @ weight.T
    explained = torch.linalg.solve_triangular(_cholesky(gram[order][:, order], RIDGE), cross, upper=False)
    total = (weight.T * (gram @ weight.T)).sum()
    return (total - explained.square().sum(1).cumsum(0)).clamp_min(0)


def compensate(
    moments: CentredMoments,
    ids: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor | None,
    rank: int | None = None,
    bypass_rank: int = 0,
    *,
    ridge: float,
) -> LayerCompensation:
    """Fit one layer's compensation.

    Args:
        moments: of the features [z] or, for a bypass, [z ; x].
        ids: kept neurons, ascending, [n_kept].
        output_weight: dense, [d_model, d_ff].
        output_bias: dense, [d_model], or None.
        rank: of the change of the output weights; None: full.
        bypass_rank: directions of the MLP's input x that go straight to the output.
        ridge: λ, relative to each feature's own variance; see `best_ridge`.
    """
    d_ff = output_weight.shape[1]
    kept = output_weight.float()[:, ids]  # [d_model, n_kept]
    gram = moments.gram[ids][:, ids]
    open_cross = moments.cross[ids] - gram @ kept.T  # covariance of f_S with what the kept neurons leave open
    factor = _cholesky(gram, ridge)
    bypass_in = bypass_out = None
    mean_bypass = torch.zeros_like(moments.mean_targets)
    if bypass_rank:
        mixed = moments.gram[ids, d_ff:]  # Cov(z_S, x)
        solved = torch.cholesky_solve(mixed, factor)
        rest_gram = moments.gram[d_ff:, d_ff:] - mixed.T @ solved  # of x, with what z_S explains taken out
        rest_cross = moments.cross[d_ff:] - moments.gram[d_ff:, :][:, ids] @ kept.T - solved.T @ open_cross
        bypass_in, bypass_out = _reduced_rank(rest_gram, rest_cross, bypass_rank, ridge)
        open_cross = open_cross - mixed @ bypass_in.T @ bypass_out.T
        mean_bypass = bypass_out @ (bypass_in @ moments.mean_features[d_ff:])
    delta = torch.cholesky_solve(open_cross, factor).T  # [d_model, n_kept]
    right = None
    d_model, n_kept = delta.shape
    if rank is not None and size_of_change(n_kept, d_model, rank) < delta.numel():  # else factors would take more
        right, left = _cut(gram, delta.T, rank, ridge)
        delta = left @ right
    else:
        left = delta
    bias = moments.mean_targets - (kept + delta) @ moments.mean_features[ids] - mean_bypass
    if output_bias is not None:
        bias = bias - output_bias.float()
    return LayerCompensation(bias, left, right, bypass_in, bypass_out)


def best_ridge(fitted: CentredMoments, held: CentredMoments, kept: torch.Tensor) -> float:
    """Return the λ of RIDGES whose fit leaves the least squared error on other tokens, walking downhill from FEW_TEXTS_RIDGE.

    The error is taken to fall and rise once over λ, so that three or four of them need a fit.

    With W of the kept neurons, its change D and G, C of the held tokens, that is tr(D G Dᵀ) − 2 tr(D (C − G Wᵀ)), and the
    square of what the bias, which is fitted too, leaves of the mean.

    Args:
        fitted: of the tokens to fit on; the kept neurons are the first features.
        held: of the other tokens, likewise.
        kept: output weights of the kept neurons, [d_model, n_kept].
    """
    kept, n = kept.float(), kept.shape[1]
    gram, held_gram = fitted.gram[:n, :n], held.gram[:n, :n]
    open_cross, held_cross = fitted.cross[:n] - gram @ kept.T, held.cross[:n] - held_gram @ kept.T
    moved = held.mean_features[:n] - fitted.mean_features[:n]
    mean_off = held.mean_targets - fitted.mean_targets - kept @ moved

    @functools.cache
    def error(place: int) -> float:
        change = torch.cholesky_solve(open_cross, _cholesky(gram, RIDGES[place]))  # Dᵀ
        rest = ((held_gram @ change - 2 * held_cross) * change).sum()
        return float(rest + (mean_off - moved @ change).square().sum())

    place = RIDGES.index(FEW_TEXTS_RIDGE)
    for step in (1, -1):
        while 0 <= place + step < len(RIDGES) and error(place + step) < error(place):
            place += step
    return RIDGES[place]


def size_of_change(n_kept: int, d_model: int, rank: int | None) -> int:
    """Return how many numbers the change of a layer's output weights is stored as."""
    full = n_kept * d_model
    return full if rank is None else min(full, rank * (n_kept + d_model))


def _reduced_rank(
    gram: torch.Tensor, cross: torch.Tensor, rank: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best rank-``rank`` regression of targets on features as [rank, n_features] and [d_model, rank]."""
    return _cut(gram, torch.cholesky_solve(cross, _cholesky(gram, ridge)), rank, ridge)


def _cut(gram: torch.Tensor, regression: torch.Tensor, rank: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a regression [n_features, d_model] to the rank at which its predictions lose least.

    With gram = L Lᵀ these are R V Vᵀ, V the leading right singular vectors of Lᵀ R (reduced-rank regression).
    """
    predicted = _cholesky(gram, ridge).T @ regression
    directions = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -rank:]  # [d_model, rank]
    return (regression @ directions).T, directions


@contextmanager
def _fast_products() -> Iterator[None]:
    """Let matrix units round the factors of float32 products to bfloat16, or to tf32 on a GPU; sums stay in float32.

    Activations in bfloat16 lose nothing by it. On two cores with such units it took moments from 137 to 350 GFLOP a second.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cholesky(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Factor a covariance with the ridge on its diagonal; features that never vary get the mean's share."""
    variance = gram.diagonal()
    ridged = gram.clone()
    ridged.diagonal().add_(ridge * variance.clamp_min(0) + 1e-6 * variance.mean().clamp_min(1e-20))
    try:
        return torch.linalg.cholesky(ridged)
    except torch.linalg.LinAlgError as error:
        raise BuildError(
            f"the activations' covariance over {len(gram)} neurons cannot be factored ({error}), expected one of many tokens; "
            "raise --compensate-tokens or build with --dtype float32."
        ) from error
