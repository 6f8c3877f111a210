#!/bin/sh
# Collects the files that programs need to run, and nothing else, into a folder that is a root of
# its own: the programs, their shared libraries with licences, and a handful of files in /etc.
#
# usage: make_root.sh ROOT PROGRAM...   (on the Debian release that the programs were built on)
set -eu

root="$1"
shift

mkdir -p "$root/usr/bin" "$root/usr/lib64" "$root/etc" \
  "$root/proc" "$root/sys" "$root/dev" "$root/tmp" "$root/models"
chmod 1777 "$root/tmp"
ln -sfn usr/bin "$root/bin"
ln -sfn usr/lib "$root/lib"
ln -sfn usr/lib64 "$root/lib64"

# Under the names that the loader looks for, in the folders where it looks.
copy_library() {
  folder="$(realpath "$(dirname "$1")")"
  mkdir -p "$root$folder"
  cp -L "$1" "$root$folder/$(basename "$1")"
  package="$(dpkg -S "$(realpath "$1")" "$1" 2>/dev/null | head -n1 | cut -d: -f1)"
  [ -n "$package" ] || return 0
  mkdir -p "$root/usr/share/doc/$package"
  cp -L "/usr/share/doc/$package/copyright" "$root/usr/share/doc/$package/"
}

for program in "$@"; do
  cp "$program" "$root/usr/bin/"
  if ldd "$program" | grep 'not found' >&2; then
    echo "make_root.sh: $program misses libraries; see runtime-packages.txt" >&2
    exit 1
  fi
  ldd "$program" | grep -o '/[^ ]*' | sort -u | while read -r library; do
    copy_library "$library"
  done
done

# What names look up: the user that everything runs as, and where host names come from.
echo 'nibble:x:65532:65532:nibble:/:/usr/sbin/nologin' >"$root/etc/passwd"
echo 'nibble:x:65532:' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
