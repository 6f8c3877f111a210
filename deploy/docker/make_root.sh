#!/bin/sh
# Collects the files that programs need to run, and nothing else, into a folder that is a root of
# its own: the programs, their shared libraries with licences, and a handful of files in /etc.
#
# usage: make_root.sh ROOT [LIBRARY.so.N]... PROGRAM...   (on the Debian release that the programs
# were built on). A LIBRARY is of no package of Debian's, or is opened by name at run time.
set -eu

root="$1"
shift

libraries="$root/usr/lib/$(uname -m)-linux-gnu"
mkdir -p "$root/usr/bin" "$root/usr/lib64" "$libraries" "$root/etc/ssl/certs" \
  "$root/usr/lib/ssl" "$root/proc" "$root/sys" "$root/dev" "$root/tmp" "$root/models"
chmod 1777 "$root/tmp"
ln -sfn usr/bin "$root/bin"
ln -sfn usr/lib "$root/lib"
ln -sfn usr/lib64 "$root/lib64"

# Under the names that the loader looks for, in the folders where it looks.
copy_library() {
  case "$1" in "$root"/*) return 0 ;; esac
  folder="$(realpath "$(dirname "$1")")"
  mkdir -p "$root$folder"
  cp -L "$1" "$root$folder/$(basename "$1")"
  package="$(dpkg -S "$(realpath "$1")" "$1" 2>/dev/null | head -n1 | cut -d: -f1)"
  [ -n "$package" ] || return 0
  mkdir -p "$root/usr/share/doc/$package"
  cp -L "/usr/share/doc/$package/copyright" "$root/usr/share/doc/$package/"
}

for file in "$@"; do
  case "$file" in
    *.so.*) cp -L "$file" "$libraries/" ;;
    *) cp "$file" "$root/usr/bin/" ;;
  esac
done
for file in "$@"; do
  needed="$(LD_LIBRARY_PATH="$libraries" ldd "$file")"
  if echo "$needed" | grep 'not found' >&2; then
    echo "make_root.sh: $file misses libraries; see runtime-packages.txt" >&2
    exit 1
  fi
  echo "$needed" | grep -o '/[^ ]*' | sort -u | while read -r library; do
    copy_library "$library"
  done
done

# What names look up: the user that everything runs as, where host names come from, and whom
# `nibble fetch` trusts.
echo 'nibble:x:65532:65532:nibble:/:/usr/sbin/nologin' >"$root/etc/passwd"
echo 'nibble:x:65532:' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
ln -sfn /etc/ssl/certs/ca-certificates.crt "$root/usr/lib/ssl/cert.pem"
cp -L /etc/debian_version "$root/etc/"
