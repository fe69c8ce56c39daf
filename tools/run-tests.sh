#!/bin/sh
# Runs the tests of a package of krait, which lie beside this script.
#
#   ./run-tests.sh               all quick tests that need no GPU
#   ./run-tests.sh --gpu         and those that need one
#   ./run-tests.sh --only-gpu    those alone
#   ./run-tests.sh --slow        and those that take more than a few seconds
#   ./run-tests.sh ... NAME...   only the programs tests/bin/NAME
#
# One line for each program, then what failed. Exit code 0: all passed, and at least one ran.
set -u
cd "$(dirname "$0")" || exit 1

want="*"
leave=
gpu=no
slow=no
programs=
for arg in "$@"; do
  case $arg in
    --gpu) gpu=yes ;;
    --only-gpu) gpu=yes want="*Gpu*" ;;
    --slow) slow=yes ;;
    -*) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) programs="$programs tests/bin/$arg" ;;
  esac
done
[ $gpu = yes ] || leave="*Gpu*"
[ $slow = yes ] || leave="$leave${leave:+:}*Slow*"
[ -n "$programs" ] || programs=$(ls tests/bin/*_test)

# A package without data is told where they are.
export KRAIT_TEST_DATA="${KRAIT_TEST_DATA:-$PWD/tests/data}"
export KRAIT_TEST_MODELS="${KRAIT_TEST_MODELS:-$PWD/share/krait/models}"
export KRAIT_TEST_PROGRAM="$PWD/bin/krait"
for folder in "$KRAIT_TEST_DATA" "$KRAIT_TEST_MODELS"; do
  [ -d "$folder" ] && continue
  echo "run-tests: no folder $folder: set KRAIT_TEST_DATA to tests/data and KRAIT_TEST_MODELS to models/ of a checkout" >&2
  exit 1
done

log=$(mktemp) || exit 1
failures=$(mktemp) || exit 1
trap 'rm -f "$log" "$failures"' EXIT
total=0
for program in $programs; do
  start=$(date +%s)
  "$program" --gtest_filter="$want${leave:+-$leave}" --gtest_brief=1 >"$log" 2>&1
  code=$?
  ran=$(sed -n 's/^\[==========\] \([0-9]*\) tests\{0,1\} from .* ran.*/\1/p' "$log" | tail -n 1)
  passed=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) tests\{0,1\}.*/\1/p' "$log" | tail -n 1)
  skipped=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) tests\{0,1\}.*/\1/p' "$log" | tail -n 1)
  total=$((total + ${passed:-0}))
  [ "${ran:-x}" = 0 ] && [ $code = 0 ] && continue
  printf '%-28s %4s passed%s in %s s\n' "${program##*/}" "${passed:-0}" "${skipped:+, $skipped skipped}" \
    "$(($(date +%s) - start))"
  if [ $code != 0 ]; then
    cat "$log"
    echo "${program##*/} (exit code $code)" >>"$failures"
  fi
done

echo "$total tests passed"
if [ -s "$failures" ]; then
  echo "FAILED:"
  cat "$failures"
  exit 1
fi
[ $total -gt 0 ]
