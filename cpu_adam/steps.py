"""Steps over parts of the same arrays, as one native call: of small parameters the checks would cost more than the step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _cpu_adam
from .choice import isa_index, threads_for_step
from .formats import GROUP
from .operands import FLOATS, address, check_apart, operands
from .rules import Hyper, Rule

__all__ = ["Steps"]


class Steps:
    """A step of every part that is added. ``param``, ``moments``, ``master`` and ``scale`` hold all parts: 1-D, as
    `kernels.rule_step` takes them, and checked once.

    Raises ValueError or TypeError for what the kernels cannot take.
    """

    def __init__(
        self, rule: Rule, param: Tensor, moments: Mapping[str, Tensor], *, master: Tensor | None = None,
        scale: Tensor | None = None, isa: str | None = None,
    ):  # fmt: skip
        self._rule, self._found = rule, operands(rule, param, moments, master, scale)
        self._native = _cpu_adam.Batch(isa_index(isa))
        #: Bytes of an element of each, in the native call's order, and of a group's scales.
        self._sizes = (param.itemsize, master.itemsize if master is not None else 0, moments[rule.moments[0]].itemsize)
        self._scales = 4 * len(rule.moments) if scale is not None else 0
        self._grads: list[Tensor] = []  # alive until they are read
        self._elements = self._end = 0
        self._hyper: Hyper | None = None
        self._constants: tuple[list[float], bool] = ([], False)

    def add(
        self, begin: int, end: int, grad: Tensor, *, hyper: Hyper, maximize: bool = False, unscale: float = 1.0,
        clip: float = 1.0, seed: int = 0, index: int = 0,
    ) -> None:  # fmt: skip
        """Of elements [begin, end), whose gradient is ``grad``, 1-D; for the rest see `kernels.adam_step`.

        Parts come in order and share no element; each begins at a multiple of GROUP.
        """
        found = self._found
        if not self._end <= begin <= end <= found.n or begin % GROUP:
            raise ValueError(
                f"elements {begin} to {end}: a part lies between the last one's end, {self._end}, and {found.n}, and begins at "
                f"a multiple of {GROUP}"
            )
        pointer = address("grad", grad, end - begin, FLOATS)
        check_apart(pointer, grad.nbytes, found)
        if hyper.step < 1:
            raise ValueError(f"step counts from 1, got {hyper.step}")
        if index < 0 or index % GROUP:
            raise ValueError(f"index must be a multiple of {GROUP}, at which a group begins, got {index}")
        if hyper != self._hyper:
            self._hyper, self._constants = hyper, self._rule.constants(hyper)
        weight, master, moment = (begin * size for size in self._sizes)
        self._native.add(
            end - begin, found.rule, found.layout, found.moments, found.param + weight, found.master + master,
            _moved(found.exp_avg, moment), _moved(found.exp_avg_sq, moment), found.scale + begin // GROUP * self._scales,
            pointer, FLOATS[grad.dtype], *self._constants, unscale, -clip if maximize else clip,
            seed & 0xFFFFFFFFFFFFFFFF, hyper.step, index // GROUP, 0,
        )  # fmt: skip
        self._grads.append(grad)
        self._elements += end - begin
        self._end = end

    def run(self, threads: int | None = None) -> None:
        """Steps every part. To be called once."""
        self._native.run(threads_for_step(threads, self._elements))


def _moved(pointer: int, nbytes: int) -> int:
    return pointer + nbytes if pointer else 0  # a rule may have one moment alone
