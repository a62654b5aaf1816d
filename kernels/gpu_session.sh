#!/bin/sh
# Everything about the kernels that needs a CUDA device, in one go: first that they are right, then how fast they are.
#
#   sh kernels/gpu_session.sh FOLDER      (from the root of the checkout; PYTHON=... chooses the interpreter)
#
# Needs torch, triton, numpy, scipy, rich and pytest; timm and torchvision for the step profile; neither ray nor
# deepspeed. Peers that are installed are measured too: MultiScaleDeformableAttention, DCNv4, msda-triton.
set -eu
if [ $# -ne 1 ]; then
    echo "gpu_session.sh: got $# arguments: expected one, the folder for the results" >&2
    exit 2
fi
PYTHON=${PYTHON:-python}
cd "$(dirname "$0")/.."
CARD=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$CARD" ]; then
    echo "gpu_session.sh: torch sees no CUDA device here: run it where one is" >&2
    exit 2
fi
NAME="$1/$CARD-$(date -u +%Y%m%d-%H%M)"
mkdir -p "$1"
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' | tee "$NAME-versions.txt"
"$PYTHON" -m pytest -m gpu tests/kernels 2>&1 | tee "$NAME-tests.txt"
grep -q ' passed' "$NAME-tests.txt" && ! grep -q ' failed\| error' "$NAME-tests.txt"
"$PYTHON" -m launch bench kernels --device cuda --turns 20 --out "$NAME-kernels.csv"
if "$PYTHON" -c 'import timm' 2>/dev/null; then
    "$PYTHON" -m launch bench step --device cuda --size 800 --out "$NAME-step.csv"
else
    echo "no step profile: timm is not installed"
fi
