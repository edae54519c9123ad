#!/bin/bash
# Builds the guest image, bin/guest.erofs: bin/guest-agent as /sbin/init, mount points, and nothing else.
# usage: hack/image/build.sh [--verify]
#        hack/image/build.sh --init PROGRAM IMAGE
# --verify builds everything a second time, from an empty Go cache, and fails unless both are the same byte by byte.
# --init makes an image of another program instead, for a test.
#
# The image is mapped as virtio-pmem and mounted with DAX, so the guest runs the agent straight from the host's page
# cache. That needs whole, uncompressed 4 KiB blocks: EROFS does no DAX on a file whose tail is stored beside its inode.
set -euo pipefail
# shellcheck source=../tools/lib.sh
. "$(dirname "$0")/../tools/lib.sh"

MAX_SIZE=$((24 << 20))
# EROFS wants a UUID; it names this kind of image and says nothing about the build.
IMAGE_UUID=6d6d6963-726f-4000-8000-766d0000000a

# build_agent FILE: static, because the image has no libraries; libseccomp is why cgo is needed.
build_agent() {
	(
		cd "$REPO"
		CGO_ENABLED=1 go build -trimpath -buildvcs=false -tags "netgo osusergo seccomp" \
			-ldflags "-s -w -buildid= -linkmode external -extldflags -static" -o "$1" ./cmd/guest-agent
	)
}

# build_image AGENT FILE DIR: lays the root file system out in DIR and packs it.
build_image() {
	local root=$3
	mkdir -p "$root"/{dev,etc,mnt,proc,root,run,sbin,sys,tmp,var}
	install -m 755 "$1" "$root/sbin/init"
	echo 'root:x:0:0:root:/root:/sbin/init' >"$root/etc/passwd"
	echo 'root:x:0:' >"$root/etc/group"
	printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
	# No umask or timestamp of this machine may show.
	chmod -R u=rwX,go=rX "$root"
	chmod 700 "$root/root"
	chmod 1777 "$root/tmp"
	mkfs.erofs --quiet -T0 -U "$IMAGE_UUID" --all-root -x-1 -E noinline_data,force-inode-compact "$2" "$root" >&2
}

packages erofs-utils gcc libc6-dev libseccomp-dev pkg-config
lock "$MICROVM_CACHE/image.lock"
scratch
if [ "${1:-}" = --init ]; then
	build_image "$2" "$SCRATCH/image" "$SCRATCH/root"
	put "$SCRATCH/image" "$3"
	exit
fi
start=$SECONDS
say "building guest-agent"
build_agent "$SCRATCH/guest-agent"
build_image "$SCRATCH/guest-agent" "$SCRATCH/guest.erofs" "$SCRATCH/root"

if [ "${1:-}" = --verify ]; then
	say "building it again from an empty Go cache"
	GOCACHE=$SCRATCH/gocache build_agent "$SCRATCH/guest-agent.2"
	build_image "$SCRATCH/guest-agent.2" "$SCRATCH/guest.erofs.2" "$SCRATCH/root.2"
	cmp "$SCRATCH/guest-agent" "$SCRATCH/guest-agent.2" || die "guest-agent is not reproducible"
	cmp "$SCRATCH/guest.erofs" "$SCRATCH/guest.erofs.2" || die "guest.erofs is not reproducible"
	say "two builds are identical: sha256 $(sha256sum <"$SCRATCH/guest.erofs" | cut -d ' ' -f 1)"
fi

size=$(stat -c %s "$SCRATCH/guest.erofs")
[ "$size" -le $MAX_SIZE ] || die "guest.erofs has $size bytes, more than $MAX_SIZE"
[ $((size % 4096)) = 0 ] || die "guest.erofs has $size bytes, not whole 4 KiB blocks"
for file in guest-agent guest.erofs; do
	cmp -s "$SCRATCH/$file" "$REPO/bin/$file" || put "$SCRATCH/$file" "$REPO/bin/$file"
done
say "bin/guest.erofs: $size bytes, agent $(stat -c %s "$REPO/bin/guest-agent"), in $((SECONDS - start)) s"
