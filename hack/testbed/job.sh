#!/run/testbed/busybox sh
# shellcheck shell=dash
# Pid 1 of the outer machine on its final root: runs the job, reports how it ended, powers off.
# Pid 1 must not end and must reap orphans: the shell does both while it waits for the job.
cd /run/testbed || exit
bb=/run/testbed/busybox
port() { # the device of a named virtio-serial port
	for f in /sys/class/virtio-ports/*/name; do
		read -r name <"$f"
		if [ "$name" = "$1" ]; then f=${f%/name}; echo "/dev/${f##*/}"; fi
	done
}
result=$(port result)
./idlevm 2>/dev/console &

# A port's device opens once only, and programs reopen /dev/stderr: so the job writes into pipes and cat feeds the ports.
$bb mkfifo stdout stderr
$bb cat stdout >"$(port stdout)" & out=$!
$bb cat stderr >"$(port stderr)" & err=$!
$bb setsid /bin/bash job </dev/null >stdout 2>stderr & job=$!

# The time limit is kept in here, where what hangs can be seen; hack/testbed/run has a later one for a machine that froze.
(
	$bb sleep "$($bb sed -n 's/.*testbed\.limit=\([^ ]*\).*/\1/p' /proc/cmdline)"
	{ echo "testbed: no exit code within the limit; processes:"; $bb ps -o pid,ppid,stat,args | $bb grep -v " \[.*\]$"; } >/dev/console
	echo w >/proc/sysrq-trigger
	echo timeout >"$result"
	$bb poweroff -f
) &
wait $job
rc=$?

# A daemon the job leaves behind keeps the pipes open: after the job's end they get two seconds to run dry.
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
	kill -0 $out 2>/dev/null || kill -0 $err 2>/dev/null || break
	$bb sleep 0.1
done
$bb sync
echo "rc=$rc" >"$result"
$bb poweroff -f
