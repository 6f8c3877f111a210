#!/bin/sh
# tools/bundle.sh BUILD_FOLDER FOLDER
# Puts the programs of a CUDA build into one folder with every shared library that they need, under
# lib, so that they run on another machine with glibc 2.36 or newer and an NVIDIA driver. NCCL,
# which several GPUs need, is opened by name: programs find it through LD_LIBRARY_PATH.
set -eu
if [ $# -ne 2 ]; then
  echo "usage: tools/bundle.sh BUILD_FOLDER FOLDER" >&2
  exit 2
fi
build=$1
out=$2
rm -rf "$out"
mkdir -p "$out/lib"
for program in nibble nibble-worker nibble-gateway; do
  cp "$build/bin/$program" "$out/"
  strip "$out/$program"
done
left_behind='/(libc|libm|libpthread|libdl|librt|libresolv|libutil|libcuda)\.so'
for program in nibble nibble-worker nibble-gateway; do
  ldd "$build/bin/$program"
done | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u | grep -vE "$left_behind" |
  while read -r library; do
    cp -L "$library" "$out/lib/"
  done
strip --strip-unneeded "$out"/lib/*.so*
du -sh "$out" | awk '{print "bundle: " $2 ", " $1}'
