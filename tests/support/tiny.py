"""Small models and loops for the tests."""

from __future__ import annotations

import torch
from torch import nn

#: Where models compute: with ``--emulated-cuda``, and where there is a GPU, on that.
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
#: Where gradients wait, unless a test says; by itself the least host memory would be that of gradients on NVMe.
GRADIENTS = "host"
PLACEMENTS = {
    "device": ("none", "none"),
    "host": ("none", "cpu"),
    "nvme": ("none", "nvme"),
    "param_host": ("cpu", "cpu"),
    "param_host_states_nvme": ("cpu", "nvme"),
    "everything": ("nvme", "nvme"),
}


def llama(layers: int = 3, hidden: int = 64, vocab: int = 160, tied: bool = True, dtype=torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    if DEVICE.type != "cpu":  # whose other kernels for attention would give other bits than the processor's
        model.set_attn_implementation("eager")
    return model


def config(placement: str, path, clip: float = 0.0, accumulation: int = 1, **tierflow) -> dict:
    param, optim = PLACEMENTS[placement]
    block = {"device_memory": "64MB", "host_memory": "64MB", "nvme_capacity": "256MB", "gradients": GRADIENTS} | tierflow
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "gradient_clipping": clip,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": param, "nvme_path": str(path)},
            "offload_optimizer": {"device": optim, "nvme_path": str(path)},
        },
        "tierflow": block,
    }


def batches(count: int, accumulation: int = 1, vocab: int = 160, length: int = 12, batch: int = 2):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield [torch.randint(0, vocab, (batch, length), generator=generator) for _ in range(accumulation)]


def train(model, optimizer, steps: int, accumulation: int = 1, vocab: int = 160):
    """Losses and gradient norms of a plain loop."""
    losses, norms = [], []
    for step in batches(steps, accumulation, vocab):
        for ids in step:
            loss = model(input_ids=ids, labels=ids).loss / accumulation
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        norms.append(getattr(optimizer, "last_grad_norm", None))
        optimizer.zero_grad()
    return losses, norms


def weights(model) -> dict[str, torch.Tensor]:
    """Copies of all parameters, offloaded or not."""
    import tierflow

    if getattr(model, "_tierflow_engine", None) is None:
        return {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}
    out = {}
    for name, p in model.named_parameters():
        with tierflow.gathered([p]):
            out[name] = p.detach().to("cpu", copy=True)
    return out


def tight(
    model: nn.Module, placement: str = "everything", slack: float = 1.0, accumulation: int = 1, direct: bool = True,
    top: dict | None = None, **block,
) -> dict:  # fmt: skip
    """Caps so low that hardly a unit more than the running module's fits: nothing can be cached for long.

    Nothing that the placement has on NVMe lives in HOST for good under them, and on DEVICE nothing where all weights do.
    ``top``: other blocks of the config.
    """
    from tierflow.config import load_config
    from tierflow.offloading import make_run

    trained = {id(p) for p in model.parameters() if p.requires_grad}

    def plan(caps: dict) -> object:
        wanted = load_config(config(placement, "/", 0.0, accumulation, **(block | caps)) | (top or {}))
        owned = block.get("update") == "speculative"
        return make_run(model, wanted, DEVICE, trained, None, owned, direct)

    (units, _, _), caps = least(plan)
    if PLACEMENTS[placement][0] != "none":
        caps["device_memory"] += int(slack * max(u.chunk.nbytes for u in units))
    least_host = caps["host_memory"]
    for part in (1.0, 0.5, 0.25, 0.0):
        caps["host_memory"] = least_host + int(part * slack * 4 * 4096 * 12)
        if not _moved_up(plan(caps)):
            break
    return {name: str(n) for name, n in caps.items()}


def _moved_up(run) -> bool:
    """Whether anything lives in HOST that the placement has on NVMe."""
    from tierflow.swap import Tier

    units, made, _ = run
    kinds = [(u, kind) for u in units for kind in u.chunks]
    return any(made.homes.bytes_in(u, k, Tier.HOST) and made.placement.home(k) is Tier.NVME for u, k in kinds)


def least(offer, **caps):
    """(what ``offer(caps)`` gives under the least caps that fit, those caps)."""
    from tierflow.scheduler.placement import DoesNotFit

    caps = {"device_memory": 4096, "host_memory": 4096} | caps
    for _ in range(8):  # how units are cut depends on the caps
        try:
            return offer(caps), caps
        except DoesNotFit as error:
            caps |= {f"{tier.value}_memory": need for tier, need in error.needed.items()}
    raise AssertionError(caps)


def _loop(model: nn.Module, optimizer, steps, after) -> list[float]:
    losses = []
    for loss_of in steps:
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        after()
    return losses


def reference(model: nn.Module, steps, lr: float = 1e-2, weight_decay: float = 0.1):
    """Losses and weights of plain torch with the CPU kernels' own optimizer: no movement at all."""
    optimizer = plain_adamw(model, lr=lr, weight_decay=weight_decay)
    return _loop(model, optimizer, steps, lambda: None), weights(model)


def plain_adamw(model: nn.Module, lr: float = 1e-2, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """Takes the model to where models compute; there the kernels step copies on the host."""
    from tierflow.cpu_adam import CPUAdamW

    trained = [p for p in model.to(DEVICE).parameters() if p.requires_grad]
    if DEVICE.type == "cpu":
        return CPUAdamW(trained, lr=lr, weight_decay=weight_decay)
    copies = [torch.nn.Parameter(p.detach().cpu()) for p in trained]

    class Copied(CPUAdamW):
        def step(self, closure=None):
            for p, copy in zip(trained, copies, strict=True):
                copy.grad = None if p.grad is None else p.grad.cpu()
            super().step(closure)
            with torch.no_grad():
                for p, copy in zip(trained, copies, strict=True):
                    p.copy_(copy)

        def zero_grad(self, set_to_none: bool = True) -> None:
            for p in trained:
                p.grad = None

    return Copied(copies, lr=lr, weight_decay=weight_decay)


def offloaded(model: nn.Module, steps, path, placement: str = "everything", seed: int | None = 1, **options):
    """The same loop under tierflow with tight caps, slots at random and freed memory poisoned."""
    import random

    import tierflow
    from tierflow.swap import DebugMemory

    debug = None if seed is None else DebugMemory(random.Random(seed), through_host=bool(seed % 2))
    caps = tight(model, placement, direct=debug is None or not debug.through_host) | options
    _, optimizer = tierflow.offload(model, config(placement, path, **caps), debug_memory=debug)
    try:
        losses = _loop(model, optimizer, steps, optimizer.engine.manager.ledger.check)
        moved = optimizer.engine.manager.traffic
        return losses, weights(model), moved
    finally:
        optimizer.close()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights agree in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
