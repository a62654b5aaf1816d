#!/bin/sh
# Builds the other kernels for deformable attention that `bench kernels --device cuda` compares with, where there are a
# network, git, pip and the CUDA compiler of torch's version. Nothing of them is part of this project.
#
#   sh kernels/build_peers.sh FOLDER      (PYTHON=... chooses the interpreter, TORCH_CUDA_ARCH_LIST the targets)
set -eu
if [ $# -ne 1 ]; then
    echo "build_peers.sh: got $# arguments: expected one, the folder for the sources" >&2
    exit 2
fi
PYTHON=${PYTHON:-python}
if ! command -v nvcc > /dev/null; then
    echo "build_peers.sh: nvcc is not on the PATH: expected the CUDA toolkit that fits torch; add its bin folder" >&2
    exit 2
fi
mkdir -p "$1"
cd "$1"

install() {
    "$PYTHON" -m pip install --no-build-isolation --no-deps "$1"
}

# What torch dropped since these were written, and their wish to see a device while building: TORCH_CUDA_ARCH_LIST names
# the targets where there is none.
for_this_torch() {
    find "$1" \( -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' \) -exec \
        sed -i -e 's/\.type()\.is_cuda()/.is_cuda()/g' -e 's/\.type(), "/.scalar_type(), "/g' \
        -e 's/\.data</.data_ptr</g' -e 's|THC/THCAtomics.cuh|ATen/cuda/Atomic.cuh|' {} +
    sed -i -e 's/torch.cuda.is_available() and CUDA_HOME/CUDA_HOME/' "$1/setup.py"
}

[ -d Deformable-DETR ] || git clone --depth 1 https://github.com/fundamentalvision/Deformable-DETR
for_this_torch Deformable-DETR/models/ops
install ./Deformable-DETR/models/ops

[ -d DCNv4 ] || git clone --depth 1 https://github.com/OpenGVLab/DCNv4
for_this_torch DCNv4/DCNv4_op
install ./DCNv4/DCNv4_op

[ -d msda-triton ] || git clone --depth 1 https://github.com/rziga/msda-triton
install ./msda-triton

for MODULE in MultiScaleDeformableAttention DCNv4 msda_triton; do
    "$PYTHON" -c "import torch, $MODULE" && echo "$MODULE: built"
done
