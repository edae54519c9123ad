#!/bin/bash
# Runs the agent's tests which need the guest kernel: pkg/agent with the build tag agentkernel. The test binary is the first
# process of a QEMU machine under software emulation, which boots bin/vmlinux from a disk made here. No KVM is needed.
# usage: hack/agent-test.sh [-test.flag...]
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"

# All tests take two or three minutes on an idle machine; one that hangs is ended by this.
LIMIT=1800

packages busybox-static e2fsprogs erofs-utils gcc libc6-dev libseccomp-dev pkg-config qemu-system-x86
[ -f "$REPO/bin/vmlinux" ] || die "bin/vmlinux is missing: run hack/kernel/build.sh first"
scratch

root=$SCRATCH/root
mkdir -p "$root"/{dev,etc,mnt,proc,root,run,sbin,sys,tmp,var} "$root"/rootfs/{bin,dev,etc,proc,sys,tmp}
(
	cd "$REPO"
	CGO_ENABLED=1 go test -c -tags "netgo osusergo seccomp agentkernel" \
		-ldflags "-s -w -linkmode external -extldflags -static" -o "$root/sbin/init" ./pkg/agent
)
cp "$(command -v busybox)" "$root/rootfs/bin/busybox"
for applet in $("$root/rootfs/bin/busybox" --list); do
	[ "$applet" = busybox ] || ln -s busybox "$root/rootfs/bin/$applet"
done
echo 'root:x:0:0:root:/:/bin/sh' >"$root/rootfs/etc/passwd"
mkfs.erofs --quiet --all-root "$SCRATCH/root.erofs" "$root" >&2

mkdir "$SCRATCH/disk"
echo 'hello from the disk' >"$SCRATCH/disk/hello"
truncate -s 16M "$SCRATCH/disk.ext4"
mkfs.ext4 -q -F -d "$SCRATCH/disk" "$SCRATCH/disk.ext4" >&2

: >"$SCRATCH/console" # tail may be there first
# A panic resets the machine, which -no-reboot ends. A machine that powers off has stayed once in a while: it is ended when
# it has told its result. Both processors are emulated in one thread: with one each, now and then one executes the breakpoint of a
# place in the kernel that the other has just patched ("Oops: int3").
timeout --kill-after=10 $LIMIT qemu-system-x86_64 -M q35 -accel tcg,thread=single -cpu max -smp 2 -m 1024 \
	-nodefaults -no-user-config -nographic -no-reboot -serial stdio \
	-drive if=none,id=root,format=raw,readonly=on,file="$SCRATCH/root.erofs" -device virtio-blk-pci,drive=root,disable-legacy=on \
	-drive if=none,id=disk,format=raw,file="$SCRATCH/disk.ext4" -device virtio-blk-pci,drive=disk,disable-legacy=on \
	-device virtio-rng-pci,disable-legacy=on \
	-kernel "$REPO/bin/vmlinux" \
	-append "console=ttyS0 quiet root=/dev/vda rootfstype=erofs ro init=/sbin/init panic=-1 -- -test.v $*" </dev/null >>"$SCRATCH/console" &
qemu=$!
tail --pid=$qemu -f -n +1 "$SCRATCH/console" | sed -u '/^agent-test: exit /q' || true # tail has nobody to write to then
kill $qemu 2>/dev/null || true
wait $qemu || true

code=$(tr -d '\r' <"$SCRATCH/console" | sed -n 's/^agent-test: exit //p' | tail -n 1)
[ -n "$code" ] || die "the machine ended without a result"
exit "$code"
