#!/bin/sh
# Makes a relocatable package of a build: program, tests, models and every shared library but those
# of glibc and the NVIDIA driver. Called by  cmake --build BUILD --target package.
#
#   tools/package.sh BUILD NAME     writes BUILD/NAME.tar.xz from BUILD/NAME
#
# KRAIT_PACKAGE_CUBLAS=0 leaves cuBLASLt out, KRAIT_PACKAGE_DATA=0 the models and the test data (for a
# machine that has a checkout). The package runs on x86-64 Linux with a glibc no older than the one
# it was built with: bin/krait, and ./run-tests.sh [--gpu] for the tests.
set -eu
if [ $# != 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
build=$1
name=$2
stage=$build/$name

say() { echo "package: $*" >&2; }

rm -rf "$stage" "$stage.tar.xz"
cmake --install "$build" --prefix "$stage" --strip >/dev/null
cmake --install "$build" --prefix "$stage" --strip --component tests >/dev/null
mkdir -p "$stage/lib" "$stage/licenses"
case ${KRAIT_PACKAGE_DATA:-1} in 0 | OFF) rm -rf "$stage/share/krait/models" "$stage/tests/data" ;; esac

# What the programs load, and what those libraries load in turn: lines "name => path (address)". The
# programs of the build tree are asked, which find every library; the staged ones may not.
list=$build/package-libraries.txt
for program in "$build/krait" "$build/bench_ops" "$build"/tests/*_test; do
  ldd "$program"
done | sort -u >"$list"
if grep 'not found' "$list" >&2; then
  say "the libraries above were not found"
  exit 1
fi
sed -n 's/^\t\([^ ]*\) => \(\/[^ ]*\) .*/\1 \2/p' "$list" | sort -u | while read -r library path; do
  case $library in
    # glibc belongs to the system: it must fit the kernel and the other programs there.
    ld-linux* | libc.so.* | libm.so.* | libmvec.so.* | libdl.so.* | librt.so.* | libpthread.so.* | \
      libresolv.so.* | libutil.so.* | libanl.so.*) continue ;;
    libcuda.so.* | libnvidia-*) continue ;; # the driver's
    libcublas*)
      case ${KRAIT_PACKAGE_CUBLAS:-1} in 0 | OFF) continue ;; esac ;;
  esac
  [ -e "$stage/lib/$library" ] && continue
  cp -L "$path" "$stage/lib/$library"
  # The licence that came with it: Debian's packages, or the folder of NVIDIA's wheels.
  real=$(readlink -f "$path")
  owner=$(dpkg -S "$real" 2>/dev/null || dpkg -S "${real#/usr}" 2>/dev/null || true)
  owner=${owner%%:*}
  if [ -n "$owner" ] && [ -e "/usr/share/doc/$owner/copyright" ]; then
    cp "/usr/share/doc/$owner/copyright" "$stage/licenses/$owner.txt"
  fi
  case $library in
    libcublas*) cp "${path%/*}"/../licenses/nvidia_cublas* "$stage/licenses/" 2>/dev/null || true ;;
  esac
done

say "$(ls "$stage/tests/bin" | wc -l) test programs, $(ls "$stage/lib" | wc -l) shared libraries"
# The test programs share most of their code: a dictionary that spans them all stores it once (with
# CUDA 39 MB against gzip's 60). Preset 1 is 5% larger than preset 6 in a third of the time.
tar -C "$build" --owner=0 --group=0 --sort=name -cf - "$name" |
  xz --lzma2=preset=1,dict=128MiB >"$stage.tar.xz"
say "$stage.tar.xz: $(du -h "$stage.tar.xz" | cut -f1) ($(du -sh "$stage" | cut -f1) unpacked)"
