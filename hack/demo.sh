#!/bin/bash
# Runs a container in a virtual machine, from nothing: builds what is missing, starts a private containerd where the guest
# kernel boots, and shows what `ctr run` does there. usage: hack/demo.sh
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
cd "$REPO"

IMAGE=docker.io/microvm/busybox:latest
NAMES=() SECONDS_OF=()

title() { printf '\n== %s\n' "$*"; }

# phase NAME COMMAND...: runs it and remembers how long it took.
phase() {
	local name=$1 from=$EPOCHREALTIME
	shift
	title "$name"
	"$@"
	NAMES+=("$name")
	SECONDS_OF+=("$(elapsed "$from")")
}
elapsed() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'; }

times() {
	local i
	for i in "${!NAMES[@]}"; do printf '  %8s s  %s\n' "${SECONDS_OF[i]}" "${NAMES[i]}"; done
}

# The part that runs where KVM can boot the guest kernel.
inside() {
	local state where host guest
	PATH=$REPO/bin:$MICROVM_CACHE/tools/bin:$PATH
	state=$(mktemp -d /var/tmp/demo.XXXXXX)
	# shellcheck disable=SC2064 # the folder is known now
	trap "hack/containerd.sh wipe $state" EXIT
	ctr() { command ctr -a "$state/containerd.sock" "$@" 2> >(grep -v 'DEPRECATION: The support for cgroup v1' >&2); }
	run() {
		local id=$1
		shift
		echo "\$ ctr run --rm --runtime io.containerd.microvm.v2 $IMAGE $id $*"
		ctr run --rm --runtime io.containerd.microvm.v2 "$IMAGE" "$id" "$@"
	}
	phase "start a private containerd" hack/containerd.sh start "$state"
	phase "import the busybox image" ctr images import "$MICROVM_CACHE/images/busybox.tar"
	phase "uname -a in a container" run demo1 uname -a
	phase "cat /proc/cpuinfo in a container" run demo2 cat /proc/cpuinfo
	host=$(uname -sr)
	guest=$(ctr run --rm --runtime io.containerd.microvm.v2 "$IMAGE" demo3 uname -sr)
	where="this host, on its own KVM"
	[ -z "${MICROVM_TESTBED:-}" ] || where="the test bed: a machine emulated by QEMU, with KVM in it (slow, but real)"
	title "Result"
	echo "The container's kernel:      $guest"
	echo "The kernel containerd is on: $host"
	echo "Where it ran:                $where"
	times
	[ "$guest" != "$host" ] || die "the container ran on the host's kernel"
}

if [ "${1:-}" = inside ]; then
	inside
	exit
fi

packages make
# With everything built these return at once; the kernel's and the tools' builds show their progress.
phase "build the programs" make --no-print-directory build
phase "build the guest kernel" make --no-print-directory kernel
phase "build the guest image" make --no-print-directory image
phase "build containerd and runc" make --no-print-directory tools
phase "make the busybox image" hack/images/build.sh busybox
phase "run (prepare the test bed if this host's KVM cannot boot the guest kernel)" \
	hack/testbed/run --timeout 900 -- hack/demo.sh inside
title "Time taken by each step"
times
