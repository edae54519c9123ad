#!/bin/bash
# build.sh: make the outer machine (kernel, initramfs, modules) in the cache unless it is there, and print its directory.
# The kernel is Debian's own cloud kernel: it has kvm_amd, vhost and virtiofs, and stock kernels are what we must run on.
set -euo pipefail
# shellcheck source=../tools/lib.sh
. "$(dirname "$0")/../tools/lib.sh"
here=$REPO/hack/testbed
cache=$MICROVM_CACHE/testbed

# Debian 12's qemu-system-common brings the virtiofsd that machine.sh starts.
packages qemu-system-common busybox-static kmod cpio zstd xz-utils util-linux iproute2 debian-archive-keyring >&2

key=$(cat "$here"/{build.sh,init,job.sh} "$here"/{tsckhz,idlevm}/* | sha256sum | cut -c1-16)
dir=$cache/machine-$key
if [ -f "$dir/kernel" ]; then echo "$dir"; exit 0; fi
lock "$cache/lock"
if [ -f "$dir/kernel" ]; then echo "$dir"; exit 0; fi
say "building the outer machine in $dir"
scratch

# QEMU of trixie-backports with the libraries it needs, unpacked where nothing else sees them, and the kernel of trixie. Debian 12's own
# QEMU, 7.2, emulates SVM with holes (it does not intercept XSETBV), and its kernel, 6.1, cannot map the ids of a tmpfs.
qemu=$SCRATCH/qemu pkg=$SCRATCH/pkg
mkdir -p "$qemu" "$pkg" "$SCRATCH"/apt/{lists,archives}/partial
site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' 'Component: main' | head -n 1)
for suite in trixie trixie-backports; do
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${site:-http://deb.debian.org/debian} $suite main"
done >"$SCRATCH/apt/sources.list"
: >"$SCRATCH/apt/status" # nothing is installed: apt names every library
apt=(-q -o Dir::Etc::sourcelist="$SCRATCH/apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$SCRATCH/apt/lists"
	-o Dir::State::status="$SCRATCH/apt/status" -o Dir::Cache="$SCRATCH/apt" -o APT::Sandbox::User=root)
{
	apt-get "${apt[@]}" update
	apt-get "${apt[@]}" install -y --no-install-recommends --download-only -t trixie-backports qemu-system-x86
	for deb in "$SCRATCH"/apt/archives/*.deb; do dpkg -x "$deb" "$qemu"; done
	kernel=$(apt-cache "${apt[@]}" pkgnames linux-image-6.12. | grep -E '^linux-image-6\.12\.[0-9]+\+deb13-cloud-amd64$' | sort -V | tail -n 1)
	[ -n "$kernel" ] || die "Debian 13 has no linux-image-6.12.*-cloud-amd64"
	(cd "$pkg" && apt-get "${apt[@]}" download "$kernel" && dpkg -x "$kernel"_*.deb . && rm "$kernel"_*.deb)
} >&2
mv "$pkg/usr/lib" "$pkg/lib"
version=$(ls "$pkg/lib/modules")
find "$pkg/lib/modules" -name '*.ko.xz' -exec unxz {} + # busybox loads them plain
depmod -b "$pkg" "$version"

# The initramfs has what it takes to reach the root share and what every run needs; other modules load from the tree later.
root=$SCRATCH/root
mkdir -p "$root"/{bin,proc,sys,dev,host,upper,new,modules}
cp "$(command -v busybox)" "$root/bin/busybox"
for a in $("$root/bin/busybox" --list); do [ -e "$root/bin/$a" ] || ln -s busybox "$root/bin/$a"; done
cp "$here/init" "$here/job.sh" "$root/"
(cd "$REPO" && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$root/" ./hack/testbed/idlevm)
chmod 755 "$root/init"
modprobe -d "$pkg" -S "$version" --show-depends -a virtio_pci virtiofs overlay virtio_console virtio-rng kvm-amd loop tun |
	awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$SCRATCH/modules"
while read -r m; do
	cp "$m" "$root/modules/"
	basename "$m" >>"$root/modules/order"
done <"$SCRATCH/modules"

cat >"$qemu/run" <<-'X'
	#!/bin/sh
	# QEMU with its own loader and libraries.
	root=$(dirname "$0")
	exec "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" \
		"$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
X
chmod 755 "$qemu/run"
"$qemu/run" --version >&2 || die "QEMU of trixie-backports does not start"

new=$(mktemp -d "$cache/new.XXXXXX")
(cd "$root" && find . | sort | cpio -o -H newc --quiet) | zstd -q -1 >"$new/initramfs"
mkdir "$new/lib"
cp -r "$pkg/lib/modules" "$new/lib/"
cp -a "$qemu" "$new/qemu"
(cd "$REPO" && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$new/tsckhz" ./hack/testbed/tsckhz)
cp "$pkg/boot/vmlinuz-$version" "$new/kernel"
chmod 755 "$new"
rm -rf "$dir"
mv "$new" "$dir"
# A run that still uses an older machine reads its modules; no run lasts longer than a day.
find "$cache" -mindepth 1 -maxdepth 1 \( -name 'machine-*' -o -name 'new.*' \) ! -path "$dir" -mmin +1440 -exec rm -rf {} +
echo "$dir"
