#!/bin/sh
# check_symbols.sh NM ARCHIVE: objects built for an instruction set may define no weak symbol.
# The linker keeps one of several weak definitions of an inline function, perhaps the one that
# uses instructions which the machine lacks.
set -eu
nm=$1
archive=$2
found=$("$nm" -C -A --defined-only "$archive" |
  grep -E '(avx2|avx512|amx)[^:]*:[^:]*[0-9a-f]* [WVuw] ' |
  grep -v 'DW.ref.__gxx_personality' || true)
count=$("$nm" -A "$archive" 2>/dev/null | grep -c 'avx512' || true)
if [ "$count" -eq 0 ]; then
  echo "no object of an instruction set in $archive: the check sees nothing" >&2
  exit 1
fi
if [ -n "$found" ]; then
  echo "weak symbols in objects of one instruction set:" >&2
  echo "$found" >&2
  exit 1
fi
