#!/bin/bash
# build.sh: make the outer machine (kernel, initramfs, modules) in the cache unless it is there, and print its directory.
# The kernel is Debian's own 6.1 cloud kernel: it has kvm_amd, vhost and virtiofs, and stock kernels are what we must run on.
set -euo pipefail
# shellcheck source=../tools/lib.sh
. "$(dirname "$0")/../tools/lib.sh"
here=$REPO/hack/testbed
cache=$MICROVM_CACHE/testbed

# Debian 12's qemu-system-common brings the virtiofsd that machine.sh starts.
packages qemu-system-common busybox-static kmod cpio zstd util-linux iproute2 debian-archive-keyring >&2

key=$(cat "$here"/{build.sh,init,job.sh} "$here"/tsckhz/* | sha256sum | cut -c1-16)
dir=$cache/machine-$key
if [ -f "$dir/kernel" ]; then echo "$dir"; exit 0; fi
lock "$cache/lock"
if [ -f "$dir/kernel" ]; then echo "$dir"; exit 0; fi
say "building the outer machine in $dir"
scratch

# The newest 6.1 cloud kernel apt knows of.
newest() { apt-cache pkgnames linux-image-6.1.0- | grep -E '^linux-image-6\.1\.0-[0-9]+-cloud-amd64$' | sort -V | tail -n 1; }
package=$(newest) || package=
[ -n "$package" ] || { apt_update >&2; package=$(newest); } || die "apt knows no linux-image-6.1.0-*-cloud-amd64"
pkg=$SCRATCH/pkg
download_deb "$package" "$pkg"
version=$(ls "$pkg/lib/modules")
depmod -b "$pkg" "$version"

# The initramfs has what it takes to reach the root share and what every run needs; other modules load from the tree later.
root=$SCRATCH/root
mkdir -p "$root"/{bin,proc,sys,dev,host,upper,new,modules}
cp "$(command -v busybox)" "$root/bin/busybox"
for a in $("$root/bin/busybox" --list); do [ -e "$root/bin/$a" ] || ln -s busybox "$root/bin/$a"; done
cp "$here/init" "$here/job.sh" "$root/"
chmod 755 "$root/init"
modprobe -d "$pkg" -S "$version" --show-depends -a virtio_pci virtiofs overlay virtio_console virtio-rng kvm-amd loop tun |
	awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$SCRATCH/modules"
while read -r m; do
	cp "$m" "$root/modules/"
	basename "$m" >>"$root/modules/order"
done <"$SCRATCH/modules"

# QEMU of trixie-backports with the libraries it needs, unpacked where nothing else sees them. Debian 12's own, 7.2, emulates SVM
# with holes (it does not intercept XSETBV); under it, and more rarely under 10.0, guests were reset and the machine froze.
qemu=$SCRATCH/qemu
mkdir -p "$qemu" "$SCRATCH"/apt/{lists,archives}/partial
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
} >&2

# QEMU delivers an interrupt that VMRUN injects at once, but leaves it in cs->exception_index too (helper_vmrun in
# target/i386/tcg/system/svm_helper.c): if the emulation stops before the next exception, because another thread wants something, the
# interrupt is delivered a second time, wherever the guest is. Before its swapgs that is a triple fault, elsewhere it may wait for
# its timer for ever. With the machine stopped and continued by QEMU's monitor 20 times a second 7 of 19 guests did not get through
# their start, and without the instruction none of 31. It is movl %esi,-0x3db0(%rbx), found by the two before it
# (movzbl %r12b,%esi; movl %r13d,0x3480(%rbx), which is env->error_code), and becomes a nopw.
patched=$(perl -0777 -pi -e '$n += s/\x41\x0f\xb6\xf4\x44\x89\xab\x80\x34\0\0\K\x89\xb3\x50\xc2\xff\xff/\x66\x0f\x1f\x44\0\0/g; END { print STDERR $n + 0 }' \
	"$qemu/usr/bin/qemu-system-x86_64" 2>&1)
[ "$patched" = 1 ] || say "this is another QEMU than the one that is mended here ($patched places): some guests may be reset, or hang"
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
