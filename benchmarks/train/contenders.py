"""Who takes part: a name, what the table calls it, the driver and its options."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Contender:
    """``options`` go to the driver; an engine's name is that of the environment it needs."""

    name: str
    title: str
    engine: str  # "torch", "deepspeed" or "tierflow"
    driver: str
    options: dict[str, str] = field(default_factory=dict)


def _pair(param: str, optimizer: str) -> dict[str, str]:
    return {"param": param, "optimizer": optimizer}


_DEEPSPEED, _TIERFLOW = ("deepspeed", "with_deepspeed"), ("tierflow", "with_tierflow")
_MADE_UNDER_INIT = _pair("nvme", "nvme") | {"model": "zero.Init"}

CONTENDERS = (
    Contender("torch", "plain torch, fused AdamW", "torch", "plain_torch"),
    Contender("deepspeed-resident", "DeepSpeed ZeRO-3, no offload", *_DEEPSPEED, _pair("none", "none")),
    Contender("deepspeed-cpu", "DeepSpeed ZeRO-3, optimizer on CPU", *_DEEPSPEED, _pair("none", "cpu")),
    Contender("deepspeed-nvme", "DeepSpeed ZeRO-3, optimizer on NVMe", *_DEEPSPEED, _pair("none", "nvme")),
    Contender("deepspeed-all-nvme", "DeepSpeed ZeRO-3, everything on NVMe", *_DEEPSPEED, _pair("nvme", "nvme")),
    Contender("deepspeed-all-nvme-init", "... and the model made under zero.Init", *_DEEPSPEED, _MADE_UNDER_INIT),
    Contender("tierflow-resident", "tierflow, everything on the device", *_TIERFLOW, _pair("none", "none")),
    Contender("tierflow-cpu", "tierflow, optimizer on CPU", *_TIERFLOW, _pair("none", "cpu")),
    Contender("tierflow-nvme", "tierflow, optimizer on NVMe", *_TIERFLOW, _pair("none", "nvme")),
    Contender("tierflow-all-nvme", "tierflow, everything on NVMe", *_TIERFLOW, _pair("nvme", "nvme")),
    Contender("tierflow-gradients-nvme", "... and gradients too", *_TIERFLOW, _pair("nvme", "nvme") | {"gradients": "nvme"}),
)
#: The two ways to hide an update where clipping is set and never bites: not part of the comparison.
_NEVER_CLIPS = {"clip": "1e9"}
SCHEDULES = tuple(
    Contender(f"{update}-{name}", f"{update}, {title}", *_TIERFLOW, _pair(*tiers) | _NEVER_CLIPS | {"update": update})
    for name, title, tiers in (("nvme", "optimizer on NVMe", ("none", "nvme")), ("all-nvme", "everything on NVMe", ("nvme", "nvme")))
    for update in ("immediate", "deferred", "speculative")
)


def choose(names: list[str]) -> list[Contender]:
    """The contenders named, or of an engine named, in the order above. Raises ValueError for a name unknown."""
    every = CONTENDERS + SCHEDULES
    known = {c.name for c in every} | {c.engine for c in every}
    for name in names:
        if name not in known:
            raise ValueError(f"no contender is called {name!r}: choose among {', '.join(sorted(known))}")
    return [c for c in every if c.name in names or (c in CONTENDERS and c.engine in names)]
