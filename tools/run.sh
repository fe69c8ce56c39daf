#!/bin/sh
# Sets up, builds and runs krait:  tools/run.sh "Once upon a time" [options of krait run]
#
# Builds the preset cuda-release where there are a CUDA toolkit and an NVIDIA driver, else
# cpu-release. What it does is said on stderr; stdout is the generated text alone.
set -eu
here=$(pwd)
cd "$(dirname "$0")/.."

say() { echo "run: $*" >&2; }

tools/setup.sh

. tools/find_cuda.sh
preset=cpu-release
options=-DKRAIT_TESTS=OFF
if [ $driver = yes ] && [ -n "$nvcc" ]; then
  preset=cuda-release
  options="$options -DKRAIT_CUDA_ARCHITECTURES=native"  # for the GPU in this machine alone
elif [ $driver = yes ]; then
  say "there is an NVIDIA driver but no CUDA toolkit of 12.8 or newer: building for the CPU"
  say "(tools/setup.sh --cuda gets a toolkit)"
fi

# A folder of its own, so that the tests' build of the same preset keeps its settings.
build=build/run-$preset
if [ ! -f $build/build.ninja ]; then
  say "configuring $preset in $build"
  # shellcheck disable=SC2086  # a list of words
  cmake --preset $preset -B $build $options >&2
fi
[ -x $build/krait ] || say "building (the first time takes a few minutes)"
log=$build/build.log
if ! cmake --build $build --target krait >$log 2>&1; then
  cat $log >&2
  say "the build failed"
  exit 1
fi

program=$(pwd)/$build/krait
cd "$here"
exec "$program" run "$@"
