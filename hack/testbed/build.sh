#!/bin/bash
# build.sh: make the outer machine (kernel, initramfs, modules) in the cache unless it is there, and print its directory.
# The kernel is Debian's own 6.1 cloud kernel: it has kvm_amd, vhost and virtiofs, and stock kernels are what we must run on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${MICROVM_CACHE:-$HOME/.cache/microvm}/testbed
say() { echo "testbed: $*" >&2; }

need=()
while read -r program package; do
	command -v "$program" >/dev/null || need+=("$package")
done <<X
qemu-system-x86_64 qemu-system-x86
/usr/lib/qemu/virtiofsd qemu-system-common
busybox busybox-static
cpio cpio
modprobe kmod
depmod kmod
zstd zstd
setpriv util-linux
ip iproute2
X
apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root "$@" >&2; }
if [ ${#need[@]} -gt 0 ]; then
	say "installing ${need[*]}"
	apt update
	apt install -y --no-install-recommends "${need[@]}"
fi

key=$(cat "$here"/{build.sh,init,job.sh} | sha256sum | cut -c1-16)
dir=$cache/machine-$key
if [ -f "$dir/kernel" ]; then echo "$dir"; exit 0; fi
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ -f "$dir/kernel" ]; then echo "$dir"; exit 0; fi
say "building the outer machine in $dir"
tmp=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

# The newest 6.1 cloud kernel apt knows; a package list may be missing or too old to be downloaded from.
newest() { apt-cache pkgnames linux-image-6.1.0- | grep -E '^linux-image-6\.1\.0-[0-9]+-cloud-amd64$' | sort -V | tail -n 1; }
fetch() { local p; p=$(newest) && [ -n "$p" ] && (cd "$tmp" && apt download "$p"); }
fetch || { apt update; fetch; } || { say "apt has no linux-image-6.1.0-*-cloud-amd64"; exit 1; }
dpkg-deb -x "$tmp"/linux-image-*.deb "$tmp/pkg"
version=$(ls "$tmp/pkg/lib/modules")
depmod -b "$tmp/pkg" "$version"

# The initramfs has what it takes to reach the root share and what every run needs; other modules load from the tree later.
root=$tmp/root
mkdir -p "$root"/{bin,proc,sys,dev,host,upper,new,modules}
cp "$(command -v busybox)" "$root/bin/busybox"
for a in $("$root/bin/busybox" --list); do [ -e "$root/bin/$a" ] || ln -s busybox "$root/bin/$a"; done
cp "$here/init" "$here/job.sh" "$root/"
chmod 755 "$root/init"
modprobe -d "$tmp/pkg" -S "$version" --show-depends -a virtio_pci virtiofs overlay virtio_console virtio-rng kvm-amd loop tun |
	awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$tmp/modules"
while read -r m; do
	cp "$m" "$root/modules/"
	basename "$m" >>"$root/modules/order"
done <"$tmp/modules"
(cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc --quiet) | zstd -q -1 >"$tmp/initramfs"

mkdir "$tmp/machine" "$tmp/machine/lib"
mv "$tmp/pkg/lib/modules" "$tmp/machine/lib/"
mv "$tmp/initramfs" "$tmp/machine/"
mv "$tmp/pkg/boot/vmlinuz-$version" "$tmp/machine/kernel"
rm -rf "$dir"
mv "$tmp/machine" "$dir"
# Older machines: one that another run still uses was read-opened when it started; a day is longer than any run.
find "$cache" -mindepth 1 -maxdepth 1 -name 'machine-*' ! -path "$dir" -mmin +1440 -exec rm -rf {} +
echo "$dir"
