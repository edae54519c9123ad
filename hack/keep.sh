#!/bin/bash
# Runs a daemon, and starts it again whenever a signal has ended it, as systemd does with Restart=on-abnormal. One that ends by
# itself has its reason, and then this ends too. SIGTERM ends both.
# usage: hack/keep.sh COMMAND [ARGUMENT...]
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

end=
trap 'end=1; jobs -p | xargs -r kill 2>/dev/null' TERM
while [ -z "$end" ]; do
	"$@" &
	daemon=$!
	rc=0
	wait "$daemon" || rc=$?
	# A signal of our own ends a wait at once.
	if [ -n "$end" ]; then
		wait
		exit 0
	fi
	[ $rc -gt 128 ] || exit $rc
	echo "hack/keep.sh: signal $((rc - 128)) has ended $1, which is started again"
	sleep 1
done
