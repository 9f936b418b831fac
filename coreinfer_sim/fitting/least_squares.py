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
from coreinfer_sim.index.compensated import LayerCompensation

RIDGE = 0.02
"""λ, relative to each feature's own variance, where neurons are ranked."""
RIDGES = (0.02, 0.06, 0.2, 0.6, 2.0, 6.0, 20.0)
"""λ that a fit may take: with few tokens a neuron the least one learns their noise."""
FEW_TEXTS_RIDGE = 2.0
"""For texts too few to choose it on, and where the choice begins."""


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

    def about_zero(self) -> CentredMoments:
        """Return second moments about zero in place of covariances, for a regression without a bias."""
        n = self.n_tokens
        return CentredMoments(
            self.gram / n, self.cross / n, torch.zeros_like(self.features), torch.zeros_like(self.targets)
        )


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
    factor = _cholesky(gram[order][:, order], RIDGE)
    explained: torch.Tensor = torch.linalg.solve_triangular(factor, cross, upper=False)
    total = (weight.T * (gram @ weight.T)).sum()
    error: torch.Tensor = total - explained.square().sum(1).cumsum(0)
    return error.clamp_min(0)


def compensate(
    moments: CentredMoments,
    ids: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor | None,
    *,
    ridge: float,
    of_mean: bool = False,
) -> LayerCompensation:
    """Fit one layer's compensation.

    Args:
        moments: of the features z.
        ids: kept neurons, ascending, [n_kept].
        output_weight: dense, [d_model, d_ff].
        output_bias: dense, [d_model], or None.
        ridge: λ, relative to each feature's own variance; see `best_ridge`.
        of_mean: λ is relative to the mean of all variances instead.
    """
    kept = output_weight.float()[:, ids]  # [d_model, n_kept]
    gram = moments.gram[ids][:, ids]
    open_cross = moments.cross[ids] - gram @ kept.T  # covariance of f_S with what the kept neurons leave open
    delta = torch.cholesky_solve(open_cross, _cholesky(gram, ridge, of_mean)).T  # [d_model, n_kept]
    bias = moments.mean_targets - (kept + delta) @ moments.mean_features[ids]
    if output_bias is not None:
        bias = bias - output_bias.float()
    return LayerCompensation(bias, delta)


def best_ridge(fitted: CentredMoments, held: CentredMoments, kept: torch.Tensor) -> float:
    """Return the λ of RIDGES whose fit leaves the least squared error on other tokens, walking downhill from FEW_TEXTS_RIDGE.

    The error is taken to fall and rise once over λ, so that three or four of them need a fit.

    With W of the kept neurons, its change D and G, C of the held tokens, that is tr(D G Dᵀ) − 2 tr(D (C − G Wᵀ)), and the
    square of what the bias, which is fitted too, leaves of the mean.

    Args:
        fitted: of the tokens to fit on, of the kept neurons.
        held: of the other tokens, likewise.
        kept: output weights of the kept neurons, [d_model, n_kept].
    """
    kept, gram, held_gram = kept.float(), fitted.gram, held.gram
    open_cross, held_cross = fitted.cross - gram @ kept.T, held.cross - held_gram @ kept.T
    moved = held.mean_features - fitted.mean_features
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


def _cholesky(gram: torch.Tensor, ridge: float, of_mean: bool = False) -> torch.Tensor:
    """Factor a covariance with the ridge on its diagonal; features that never vary get the mean's share."""
    variance = gram.diagonal()
    ridged = gram.clone()
    own = variance.mean() if of_mean else variance.clamp_min(0)
    ridged.diagonal().add_(ridge * own + 1e-6 * variance.mean().clamp_min(1e-20))
    try:
        factor: torch.Tensor = torch.linalg.cholesky(ridged)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise BuildError(
            f"the activations' covariance over {len(gram)} neurons cannot be factored ({error}), expected one of many tokens; "
            "fit to more tokens, or load the model with the dtype float32."
        ) from error
    return factor
