#!/bin/bash
# Runs the gpu cases of every test under compute-sanitizer:  tools/sanitize.sh BUILD [TOOL...]
#
# BUILD is a build folder of a cuda preset; TOOL any of memcheck, racecheck, synccheck (default: all).
# JOBS test programs run at once (default 4), each for at most LIMIT seconds (default 1800); the logs are
# BUILD/sanitize/TOOL.TEST.log. Cases that allocate more than there is are meant to fail: errors that
# the runtime returns to the caller are not counted. Slow cases are left out.
#
# racecheck takes only the lane that arrives at an mbarrier for ordered, not the warp that it arrives
# for after __syncwarp, and then reports reads that are over as hazards (mamba1_step_test,
# selective_scan_test). Give it a BUILD configured with -DKRAIT_RACECHECK=ON, where all lanes arrive.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
build=$1
shift
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck)
logs=$build/sanitize
mkdir -p "$logs"
export build logs LIMIT=${LIMIT:-1800}

check() {
  local tool=$1 test=$2 log=$logs/$1.$2.log
  timeout "$LIMIT" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
    "$build/tests/$test" '--gtest_filter=*Gpu*:*gpu*-*Slow*' --gtest_brief=1 >"$log" 2>&1
  local code=$?
  echo "$tool $test: exit $code, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1)"
  return $code
}
export -f check

for tool in "${tools[@]}"; do
  for program in "$build"/tests/*_test; do
    if "$program" --gtest_list_tests '--gtest_filter=*Gpu*:*gpu*-*Slow*' | grep '^  ' >/dev/null; then  # not -q: the program would die of SIGPIPE
      echo "$tool $(basename "$program")"
    fi
  done
done | xargs -P "${JOBS:-4}" -L 1 bash -c 'check "$0" "$1"'
