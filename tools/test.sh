#!/bin/bash
# Sets up, builds and runs the tests:  tools/test.sh [--quick] [--gpu] [--tidy]
#
#   (nothing)   everything that needs no GPU: formatting; all quick tests under AddressSanitizer and
#               UBSan; verbs, golden models, commands and slow tests again in release; each fuzzer
#               for 20 seconds; the CUDA code compiled for one architecture where there is a toolkit
#   --quick     for the desk: the quick tests, debug build, nothing else
#   --gpu       and the tests labelled gpu (cuda-release; needs a toolkit and a device)
#   --tidy      and clang-tidy over src/ and kernels/cpu
#
# Every step runs even when one before it failed; the last lines say which did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

quick=no
gpu=no
tidy=no
for arg in "$@"; do
  case $arg in
    --quick) quick=yes ;;
    --gpu) gpu=yes ;;
    --tidy) tidy=yes ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "test: unknown argument $arg (see --help)" >&2; exit 2 ;;
  esac
done

jobs=$(nproc)
summary=
failed=0

# step NAME COMMAND...: runs the command, times it, and keeps ctest's closing lines for the end.
step() {
  local name=$1 start=$SECONDS log=build/logs/$1.log verdict=passed
  shift
  echo "== $name"
  mkdir -p build/logs
  if ! "$@" 2>&1 | tee "$log"; then
    verdict=FAILED
    failed=1
  fi
  summary+="$name: $verdict after $((SECONDS - start)) s"$'\n'
  summary+=$(grep -E '^[0-9]+% tests passed|^Total Test time|^[[:space:]]+[0-9]+ - .*\((Failed|Timeout|SEGFAULT|Subprocess aborted|Not Run|Child aborted|.*Exception.*)\)' "$log")
  [ "${summary: -1}" = $'\n' ] || summary+=$'\n'
}

# build PRESET [TARGET...]: configures and builds, quietly unless it fails.
build() {
  local preset=$1 targets=()
  shift
  [ $# -gt 0 ] && targets=(--target "$@")
  cmake --preset "$preset" ${options[@]+"${options[@]}"} >build/configure.log 2>&1 || { cat build/configure.log; return 1; }
  cmake --build --preset "$preset" -j "$jobs" "${targets[@]}" >build/build.log 2>&1 || { cat build/build.log; return 1; }
  echo "built $preset"
}

format() {
  git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
}

sources() { git ls-files 'src/*.cpp' 'kernels/cpu/*.cpp'; }
run_tidy() {
  # The clang build's commands: g++ has flags that clang does not know.
  cmake --preset cpu-fuzz >build/configure.log 2>&1 || { cat build/configure.log; return 1; }
  sources | xargs -P "$jobs" -n 1 clang-tidy -p build/cpu-fuzz --quiet
}

run_ctest() { ctest --preset "$1" -j "$jobs" --no-tests=error "${@:2}"; }
test_preset() { build "$1" && run_ctest "$1"; }
test_release() {
  build cpu-release krait tests-ops tests-golden tests-cli && run_ctest cpu-release -L 'ops|golden|cli'
}
fuzz() { build cpu-fuzz fuzzers && run_ctest cpu-fuzz; }
# The kernels, and a program that links them; the rest is what the other presets build.
compile_cuda() { options=(-DKRAIT_CUDA_ARCHITECTURES=90a-real -DKRAIT_TESTS=OFF); build cuda-debug bench_ops; }
test_gpu() { build cuda-release && jobs=1 run_ctest cuda-release -L gpu; }

options=()
mkdir -p build
if [ $quick = yes ]; then
  tools/setup.sh || exit 1
  step cpu-debug test_preset cpu-debug
else
  tools/setup.sh --dev || exit 1
  . tools/find_cuda.sh
  step format format
  step cpu-asan test_preset cpu-asan
  step cpu-release test_release
  step fuzz fuzz
  if [ $tidy = yes ]; then step tidy run_tidy; fi
  if [ -n "$nvcc" ] && [ $gpu = no ]; then step cuda-compile compile_cuda; fi
fi
if [ $gpu = yes ]; then step gpu test_gpu; fi

echo
echo "== summary"
printf '%s' "$summary"
exit $failed
