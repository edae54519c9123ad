#!/bin/bash
# probe.sh: does this host's KVM boot our guest kernel? Exit 0 for yes, 1 for no, and the reason on stdout either way.
# It finds out by trying: a /dev/kvm that opens may still be one that runs no stock kernel. The answer is kept for as long
# as this host is up and VMM, kernel and image are the same files.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${MICROVM_CACHE:-$HOME/.cache/microvm}/testbed
vmm=$top/bin/microvm-vmm kernel=$top/bin/vmlinux image=$top/bin/guest.erofs
limit=10

for f in "$vmm" "$kernel" "$image"; do
	[ -f "$f" ] || { echo "cannot try this host's KVM: there is no ${f#"$top"/}"; exit 1; }
done
# Opening tells what permission bits do not, to root or in a container.
if ! (exec 3<>/dev/kvm) 2>/dev/null; then echo "this host has no usable /dev/kvm"; exit 1; fi

key=$(cat /proc/sys/kernel/random/boot_id "${BASH_SOURCE[0]}" "$vmm" "$kernel" "$image" | sha256sum | cut -c1-16)
kept=$cache/probe-$key
if [ ! -f "$kept" ]; then
	mkdir -p "$cache"
	log=$(mktemp "$cache/probing.XXXXXX")
	trap 'rm -f "$log"' EXIT
	# With an init that does not exist, a kernel that works ends in this panic: all of its own is up then and the root
	# file system is mounted.
	timeout --kill-after=2 "$limit" "$vmm" run -kernel "$kernel" -image "$image" -memory 256 -append init=/probe \
		</dev/null >"$log" 2>&1 && rc=0 || rc=$?
	if grep -qa 'Requested init /probe failed' "$log"; then
		answer="yes this host's KVM boots the guest kernel"
	else
		last=$(tail -n 1 "$log" | tr -cd '[:print:]' | cut -c1-160)
		answer="no this host's KVM did not boot the guest kernel within $limit s (exit code $rc, last words: ${last:-none})"
	fi
	find "$cache" -maxdepth 1 -name 'probe-*' -mtime +7 -delete
	echo "$answer" >"$log"
	mv "$log" "$kept"
fi
read -r answer reason <"$kept"
echo "$reason"
[ "$answer" = yes ]
