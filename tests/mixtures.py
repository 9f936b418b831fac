"""Mixtures of experts that tests take: the types that people run most, and one whose experts are modules of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import tiny_mixtral, tiny_tokenizer
from torch import nn

TYPES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"]


class OwnExpert(nn.Module):
    """One expert of `OwnExperts`."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OwnExperts(nn.Module):
    """A layer's experts as earlier releases of transformers and many models' own code hold them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(*reversed(block.gate.weight.shape), bias=False)
        self.gate.weight = block.gate.weight
        self.experts = nn.ModuleList(map(OwnExpert, block.experts.gate_up_proj, block.experts.down_proj))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, chosen = F.softmax(self.gate(hidden), -1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            places, tokens = torch.where((chosen == number).T)  # not in the order of the tokens, and perhaps none
            out.index_add_(0, tokens, expert(hidden[tokens]) * weights[tokens, places, None])
        return out.view(hidden_states.shape)


def mixtral_of_own_experts() -> Any:
    """Return `tiny_mixtral` with each expert as a module of its own."""
    model = tiny_mixtral()
    for block in model.model.layers:
        block.mlp = OwnExperts(block.mlp)
    return model.eval()


def saved(folder: Any, model: Any) -> str:
    """Save a model with a tokenizer, all of whose words it knows."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
