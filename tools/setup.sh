#!/bin/sh
# Installs what krait is built with: Debian 12 packages, through apt-get (with sudo where not root).
#
#   tools/setup.sh          to build and test
#   tools/setup.sh --dev    and to check: clang-format, clang-tidy, clang with its fuzzing runtime
#   tools/setup.sh --cuda   and the CUDA compiler and libraries, into build/cuda-toolkit
#
# Asks dpkg first and touches nothing that is there, so the second run takes a moment.
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }

# One line for each kind; cmake/dependencies.cmake looks for what is named here.
packages="g++ cmake ninja-build ccache pkg-config git ca-certificates
  libcli11-dev libspdlog-dev libfmt-dev nlohmann-json3-dev
  libsentencepiece-dev libpcre2-dev libutf8proc-dev libhwy-dev libxxhash-dev
  libgtest-dev libgmock-dev librapidcheck-dev"
cuda=no
for arg in "$@"; do
  case $arg in
    --dev) packages="$packages clang clang-format clang-tidy clang-tools libclang-rt-14-dev" ;;
    --cuda) cuda=yes; packages="$packages python3-pip" ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) say "unknown argument $arg (see --help)"; exit 2 ;;
  esac
done

missing=
if command -v dpkg-query >/dev/null; then
  for p in $packages; do
    state=$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $p"
  done
else
  say "this is no Debian system; krait is built with (Debian's names): $(echo $packages)"
fi

if [ -n "$missing" ]; then
  say "installing$missing"
  as_root=
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { say "neither root nor sudo: install these packages first"; exit 1; }
    as_root=sudo
  fi
  export DEBIAN_FRONTEND=noninteractive
  $as_root apt-get update -q >&2
  # shellcheck disable=SC2086  # a list of words
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >&2
fi

if [ $cuda = yes ]; then
  tools/setup_cuda.sh
fi
