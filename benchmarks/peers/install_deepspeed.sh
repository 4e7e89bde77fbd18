#!/bin/sh
# usage: install_deepspeed.sh DIR    makes an environment in DIR with DeepSpeed for its CPU accelerator
#
# For bench_train.py --deepspeed-python DIR/bin/python. Torch and transformers are the versions that the environment of
# PYTHON (default: .venv/bin/python, what ./run makes) has, so that both train the same model; torch is a CPU build.
# DeepSpeed's operators are compiled here, into DIR/operators, rather than in the first measured run: that takes some ten
# minutes.
# Needs a C++ compiler, Python's headers, and libaio's (Debian: libaio-dev), which are installed as root if missing.
set -eu
DIR=${1:?usage: install_deepspeed.sh DIR}
HERE=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-$HERE/.venv/bin/python}
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

version() { "$PYTHON" -c "import importlib.metadata as m; print(m.version('$1').split('+')[0])"; }
torch=$(version torch) transformers=$(version transformers)

if [ ! -e /usr/include/libaio.h ]; then
    apt-get install -y -qq --no-install-recommends libaio-dev || {
        echo "install_deepspeed: libaio's headers are missing: install libaio-dev and run this again" >&2
        exit 1
    }
fi

"$PYTHON" -m venv "$DIR"
pip="$DIR/bin/python -m pip install -q"
$pip setuptools wheel ninja packaging numpy psutil py-cpuinfo
# Only CPU builds carry this local version: where none can be had this fails instead of fetching one for CUDA.
$pip "torch==$torch+cpu" || $pip --index-url "$TORCH_CPU_INDEX" "torch==$torch+cpu"
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $pip --no-build-isolation deepspeed==0.19.8
$pip "transformers==$transformers"

DIR=$(cd "$DIR" && pwd)
# DeepSpeed finds ninja through PATH.
PATH="$DIR/bin:$PATH" TORCH_EXTENSIONS_DIR="$DIR/operators" DS_ACCELERATOR=cpu "$DIR/bin/python" - <<'END'
from deepspeed.accelerator import get_accelerator

for name in ("CPUAdamBuilder", "FusedAdamBuilder", "AsyncIOBuilder", "ShareMemCommBuilder", "PinMemoryBuilder"):
    print("building", name, flush=True)
    get_accelerator().create_op_builder(name).load()
END
echo "done: bench_train.py --deepspeed-python $DIR/bin/python"
