#!/bin/bash
# probe.sh: does this host's KVM boot our guest kernel? Exit 0 for yes, 1 for no, and the reason on stdout either way.
# It finds out by trying: a /dev/kvm that opens may still be one that runs no stock kernel. The answer is kept for as long
# as this host is up and kernel and VMM are the same files.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${MICROVM_CACHE:-$HOME/.cache/microvm}/testbed
vmm=$top/bin/microvm-vmm kernel=$top/bin/vmlinux
limit=20

for f in "$vmm" "$kernel"; do
	[ -f "$f" ] || { echo "cannot try this host's KVM: no ${f#"$top"/} yet"; exit 1; }
done
# A test of the device itself: its permissions say nothing to root, and opening may fail in a container.
if ! (exec 3<>/dev/kvm) 2>/dev/null; then echo "this host has no usable /dev/kvm"; exit 1; fi

key=$(cat /proc/sys/kernel/random/boot_id "$vmm" "$kernel" | sha256sum | cut -c1-16)
kept=$cache/probe-$key
if [ ! -f "$kept" ]; then
	mkdir -p "$cache"
	log=$(mktemp "$cache/probe.XXXXXX")
	trap 'rm -f "$log"' EXIT
	# Without a root device a kernel that works ends in this panic, after it has brought up everything of its own.
	timeout --kill-after=2 "$limit" "$vmm" --kernel "$kernel" --memory 128 --cpus 1 --cmdline "console=hvc0 panic=-1" \
		</dev/null >"$log" 2>&1 && rc=0 || rc=$?
	if grep -q 'VFS: Unable to mount root fs' "$log"; then
		answer="yes this host's KVM boots the guest kernel"
	else
		answer="no this host's KVM does not boot the guest kernel within $limit s (microvm-vmm: exit code $rc, last line: $(tail -n 1 "$log" | tr -cd '[:print:]' | cut -c1-120))"
	fi
	echo "$answer" >"$log.answer"
	mv "$log.answer" "$kept"
	find "$cache" -maxdepth 1 -name 'probe-*' ! -path "$kept" -mtime +7 -delete
fi
read -r answer reason <"$kept"
echo "$reason"
[ "$answer" = yes ]
