"""A plain loop beside an offloaded one, equal at the start, for tests that compare them."""

from __future__ import annotations

import copy

import tiny
import torch
from torch import nn

import tierflow


def pair(tmp_path, model=None, placement="everything", **kw):
    """(plain model, its optimizer, offloaded model, its optimizer), equal at the start."""
    model = model if model is not None else tiny.llama(layers=2, hidden=32)
    plain = copy.deepcopy(model)
    other = tiny.plain_adamw(plain)
    caps = tiny.tight(model, placement)
    _, optimizer = tierflow.offload(model, tiny.config(placement, tmp_path, **(caps | kw)))
    return plain, other, model, optimizer


def ids(seed: int = 0, vocab: int = 160) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed: int = 0) -> torch.Tensor:
    return model(input_ids=ids(seed), labels=ids(seed)).loss


def check(plain, model) -> None:
    assert tiny.same(tiny.weights(plain), tiny.weights(model))


class Tower(nn.Module):
    """Blocks in a list, some called twice, in an order that can be changed; one never used."""

    def __init__(self, width: int = 32, depth: int = 5):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth))
        self.idle = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.full((width,), 0.1))
        self.order = list(range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.order:
            x = x + torch.tanh(self.blocks[i](x)) * self.scale + self.shift
        return x


def tower_step(model, order=None, seed: int = 0) -> torch.Tensor:
    if order is not None:
        model.order = order
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()
