# Sourced by the other scripts: sets `nvcc` to the CUDA compiler CMake will use, or to nothing, and
# `driver` to yes where an NVIDIA driver answers.
nvcc=
for candidate in "${CUDACXX:-}" build/cuda-toolkit/bin/nvcc "$(command -v nvcc || true)" \
  "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "${CUDA_PATH:+$CUDA_PATH/bin/nvcc}" /usr/local/cuda/bin/nvcc; do
  [ -n "$candidate" ] && [ -x "$candidate" ] || continue
  version=$("$candidate" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
  major=${version% *}
  minor=${version#* }
  # krait's kernels need 12.8.
  if [ "${major:-0}" -gt 12 ] || { [ "${major:-0}" -eq 12 ] && [ "${minor:-0}" -ge 8 ]; }; then
    nvcc=$candidate
    break
  fi
done
driver=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  driver=yes
fi
