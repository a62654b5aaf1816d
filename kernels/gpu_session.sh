#!/bin/sh
# Everything about the kernels that needs a CUDA device, in one go: first that they are right, then how fast they are.
#
#   sh kernels/gpu_session.sh FOLDER      (from anywhere in the checkout; PYTHON=... chooses the interpreter)
#
# Needs torch, triton, numpy, scipy, rich and pytest; timm and torchvision for the step profile; neither ray nor
# deepspeed. Peers that are installed are measured too (kernels/build_peers.sh builds them), and where ncu is
# installed, it says what the kernels wait for. The last lines of FOLDER/*-conclusions.txt say which goals hold, what to
# enter in kernels/deform_attn/tuning.py, and whether the windowed kernel stays.
set -eu
if [ $# -ne 1 ]; then
    echo "gpu_session.sh: got $# arguments: expected one, the folder for the results" >&2
    exit 2
fi
PYTHON=${PYTHON:-python}
case "$1" in
    /*) RESULTS=$1 ;;
    *) RESULTS=$(pwd)/$1 ;;
esac
cd "$(dirname "$0")/.."
CARD=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$CARD" ]; then
    echo "gpu_session.sh: torch sees no CUDA device here: run it where one is" >&2
    exit 2
fi
mkdir -p "$RESULTS"
NAME="$RESULTS/$CARD-$(date -u +%Y%m%d-%H%M)"
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' > "$NAME-versions.txt"

# Not through a pipe: a pipe ends as its last command does, and a failed test would go unnoticed.
if ! "$PYTHON" -m pytest -m gpu tests/kernels > "$NAME-tests.txt" 2>&1; then
    tail -n 60 "$NAME-tests.txt"
    echo "gpu_session.sh: the tests above failed; nothing was timed" >&2
    exit 1
fi
tail -n 3 "$NAME-tests.txt"

"$PYTHON" -m launch bench kernels --device cuda --turns 20 --out "$NAME-kernels.csv" > "$NAME-conclusions.txt"
cat "$NAME-conclusions.txt"

if command -v ncu > /dev/null; then
    # Some calls of every kernel at the layer of the goal; the times of a watched run mean nothing and are thrown away.
    ncu --kernel-name 'regex:deform_attn_.*_kernel' --launch-count 60 --section SpeedOfLight --section LaunchStats \
        --section Occupancy --section MemoryWorkloadAnalysis --section WarpStateStats --log-file "$NAME-ncu.txt" \
        "$PYTHON" -m launch bench kernels --device cuda --turns 1 --only 'encoder 800x1333, bf16, forward + backward' \
        --out "$NAME-watched.csv" > /dev/null || echo "gpu_session.sh: ncu failed; counters may need permission" >&2
    rm -f "$NAME-watched.csv"
else
    echo "no counters: ncu is not installed"
fi

if "$PYTHON" -c 'import timm' 2> /dev/null; then
    "$PYTHON" -m launch bench step --device cuda --size 800 --out "$NAME-step.csv"
else
    echo "no step profile: timm is not installed"
fi
