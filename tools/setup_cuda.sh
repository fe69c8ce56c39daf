#!/bin/sh
# Puts a CUDA toolkit into build/cuda-toolkit: the compiler, the runtime, cuBLAS and CCCL, from
# NVIDIA's wheels on PyPI (about 0.5 GB to fetch, 1 GB unpacked, no root needed). CMake and the
# scripts here look there before they look for an installed toolkit. tools/setup.sh --cuda calls it.
#
# The packages are NVIDIA's, under NVIDIA's CUDA EULA; their licence texts come with them.
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }

# One release: compiler, front end (crt, nvvm), runtime and headers must be of the same 13.0.
packages="nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.1.0.3"

toolkit=build/cuda-toolkit
stamp=$toolkit/krait-packages.txt
if [ -f $stamp ] && [ "$(cat $stamp)" = "$packages" ]; then
  exit 0
fi
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  say "NVIDIA's wheels are fetched for x86-64 Linux only: install a CUDA toolkit of 12.8 or newer"
  exit 1
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
  say "python3 with pip is needed to fetch NVIDIA's wheels (Debian: python3-pip)"
  exit 1
fi

say "fetching the CUDA toolkit into $toolkit (about 0.5 GB)"
mkdir -p build
work=$(mktemp -d build/cuda-toolkit.XXXXXX)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
# --target: a folder of our own, so that no Python environment of the system is touched.
# shellcheck disable=SC2086  # a list of words
python3 -m pip install --quiet --no-deps --only-binary :all: --no-compile --disable-pip-version-check \
  --no-cache-dir --root-user-action=ignore --target "$work/wheels" $packages >&2

# The wheels share one tree, nvidia/cu13, which is a toolkit but for a few names.
mv "$work/wheels/nvidia/cu13" "$work/toolkit"
mkdir "$work/toolkit/licenses"
for info in "$work"/wheels/*.dist-info; do
  name=$(basename "$info" .dist-info)
  find "$info" -iname 'license*' -type f -exec cp {} "$work/toolkit/licenses/$name.txt" \;
done
(
  cd "$work/toolkit"
  chmod +x bin/* nvvm/bin/*
  # nvcc.profile and CMake say lib64, the wheels lib; linkers look for names without a version.
  [ -e lib64 ] || ln -s lib lib64
  mkdir -p targets/x86_64-linux
  ln -sfn ../../include targets/x86_64-linux/include
  ln -sfn ../../lib targets/x86_64-linux/lib
  cd lib
  for library in *.so.*; do
    [ -e "${library%%.so.*}.so" ] || ln -s "$library" "${library%%.so.*}.so"
  done
)
bad=$("$work/toolkit/bin/nvcc" --version >/dev/null 2>&1 || echo yes)
if [ -n "$bad" ]; then
  say "the compiler in the wheels does not run on this machine"
  exit 1
fi
printf '%s\n' "$packages" >"$work/toolkit/krait-packages.txt"
rm -rf $toolkit
mv "$work/toolkit" $toolkit
say "CUDA $($toolkit/bin/nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p') is in $toolkit"
