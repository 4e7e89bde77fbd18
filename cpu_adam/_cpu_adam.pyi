F32: int
BF16: int
F16: int
MASTER_IS_PARAM: int
LOSSLESS: int
MASTER_BF16: int
MASTER_F16: int
MASTER_24: int
MOMENTS_F32: int
MOMENTS_BF16: int
MOMENTS_INT8: int
ADAM: int
LION: int
ADAGRAD: int
GROUP: int

def isas() -> list[str]: ...
def numa_nodes(folder: str) -> list[list[int]]: ...
def intake(
    n: int, dst: int, dst_dtype: int, src: int, src_dtype: int, accumulate: bool, isa: int, threads: int
) -> float: ...
def sum_squares(n: int, src: int, src_dtype: int, isa: int, threads: int) -> float: ...
def split(n: int, master: int, param: int, remainder: int, isa: int, threads: int) -> None: ...
def join(n: int, param: int, remainder: int, master: int, isa: int, threads: int) -> None: ...
def stream_pattern(n: int, arrays: list[tuple[int, int, bool]], isa: int, threads: int) -> None: ...

class Batch:
    def __init__(self, isa: int) -> None: ...
    def add(
        self,
        n: int,
        rule: int,
        master_layout: int,
        moments: int,
        param: int,
        master: int,
        exp_avg: int,
        exp_avg_sq: int,
        scale: int,
        grad: int,
        grad_dtype: int,
        constants: list[float],
        general: bool,
        unscale: float,
        clip: float,
        seed: int,
        step: int,
        group: int,
        count: int,
    ) -> None: ...
    def run(self, threads: int) -> None: ...
