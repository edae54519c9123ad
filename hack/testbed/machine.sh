#!/bin/bash
# machine.sh MACHINE DIR OUT MEM CPUS LIMIT BESIDE: one outer machine, as pid 1 of the namespaces hack/testbed/run made for it.
# When this script ends, the kernel ends everything it started.
set -euo pipefail
machine=$1 dir=$2 out=$3 mem=$4 cpus=$5 limit=$6 beside=$7

# What the machine sees as its root: this host's file systems, bound read-only, so that nothing in there can change the
# host. Pseudo file systems are left out: the machine has its own.
view=$dir/view
mkdir "$view"
mount --make-rprivate /
mount -t tmpfs tmpfs /run # virtiofsd leaves pid files there
bind_ro() { mount --bind "$1" "$view$1" && mount -o remount,bind,ro "$view$1"; }
bind_ro /
while read -r _ _ _ _ target _; do
	target=$(printf '%b' "$target")
	case $target in
	/|/proc|/proc/*|/sys|/sys/*|/dev|/dev/*|/run|/run/*|"$dir"/*) ;;
	*) bind_ro "$target" || echo "not visible in the machine: $target" ;;
	esac
done </proc/self/mountinfo >"$dir/binds.log" 2>&1

# cache=always: the host's files are taken not to change during a run, which is what makes starting big binaries bearable.
# --out is a second share, with the cache kept honest because both sides look at it.
share() {
	/usr/lib/qemu/virtiofsd --socket-path="$dir/$1.sock" -o "source=$2,cache=$3,sandbox=chroot,log_level=warn" \
		--rlimit-nofile=0 >"$dir/virtiofsd-$1.log" 2>&1 &
}
share root "$view" always
devices=()
device() { devices+=(-chardev "socket,id=fs-$1,path=$dir/$1.sock" -device "vhost-user-fs-pci,chardev=fs-$1,tag=$1,queue-size=1024"); }
device root
if [ -n "$out" ]; then
	share out "$out" auto
	device out
fi
for s in root ${out:+out}; do
	for _ in $(seq 100); do [ -S "$dir/$s.sock" ] && break; sleep 0.05; done
	[ -S "$dir/$s.sock" ] || { echo "virtiofsd for $s did not come up"; exit 1; }
done

# A program beside the machine has its output in the machine's log, and a link to it that leads nowhere else.
if [ -n "$beside" ]; then
	ip link set lo up
	ip tuntap add dev bed0 mode tap
	ip link set bed0 up
	devices+=(-netdev "tap,id=net,ifname=bed0,script=no,downscript=no" -device "virtio-net-pci,netdev=net")
	"$beside" &
fi

# -la57: five levels of page tables cost time in an emulator and nobody here needs them.
# tsc=reliable: under TCG every virtual CPU's TSC is the host's, and the alternative is an HPET whose reads leave the emulator.
# tsc_early_khz: see tsckhz.
# isolcpus=0, and one processor more for that: the first one runs no task, and so no guest. QEMU takes IGNNE# back from the first
# processor whenever any of them loads an x87 state (cpu_clear_ignne in target/i386, called by fxrstor and xrstor), by an
# unsynchronized read, change and write of a word that also has the global interrupt flag and other state of SVM: what VMRUN or
# #VMEXIT change on the first processor at that moment is lost. A guest is reset then, or the machine panics or hangs.
# no_timer_check: on a busy host the timer check of early boot may see no tick in time.
# file chardevs with append=on because QEMU would otherwise truncate on open; the pipes' readers wait in hack/testbed/run.
# Half a minute more than the limit that job.sh keeps: boot, and time to say what hung. A machine that does not even come to
# its limit has frozen: where its processors are goes into monitor.log.
mkfifo "$dir/monitor.in" "$dir/monitor.out"
cat "$dir/monitor.out" >"$dir/monitor.log" &
(
	sleep $((limit + 25))
	printf '%s\n' 'info cpus' 'info registers -a' 'info pic' >"$dir/monitor.in"
) &
timeout --signal=KILL $((limit + 30)) "$machine/qemu/run" \
	-M q35,usb=off,sata=off,smbus=off,vmport=off,memory-backend=ram -accel tcg,thread=multi -cpu max,-la57 \
	-smp $((cpus + 1)) -m "$mem" -object "memory-backend-memfd,id=ram,size=${mem}M,share=on" \
	-nodefaults -no-user-config -display none -no-reboot -monitor pipe:"$dir/monitor" \
	-kernel "$machine/kernel" -initrd "$machine/initramfs" \
	-append "console=ttyS0 quiet panic=-1 tsc=reliable tsc_early_khz=$("$machine/tsckhz") no_timer_check isolcpus=0 mitigations=off testbed.dir=$dir testbed.out=$out testbed.machine=$machine testbed.limit=$limit" \
	-chardev "file,id=console,path=$dir/console.log,append=on" -serial chardev:console \
	-device virtio-serial-pci -object rng-random,filename=/dev/urandom,id=rng -device virtio-rng-pci,rng=rng \
	-chardev "file,id=stdout,path=$dir/stdout,append=on" -device virtserialport,chardev=stdout,name=stdout \
	-chardev "file,id=stderr,path=$dir/stderr,append=on" -device virtserialport,chardev=stderr,name=stderr \
	-chardev "file,id=result,path=$dir/result,append=on" -device virtserialport,chardev=result,name=result \
	"${devices[@]}"
