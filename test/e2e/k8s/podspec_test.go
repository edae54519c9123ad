//go:build e2e

package k8s

import (
	"fmt"
	"strings"
	"testing"
)

// What a line or two of a pod's specification have a container see.
func TestPodSpecs(t *testing.T) {
	s := newSpace(t)
	for _, c := range []struct {
		name, container, pod string
		script, want         string
	}{
		{name: "shared-memory", script: "df -k /dev/shm | awk 'END { print $2 }'", want: "65536"},
		{
			name: "dns-config",
			pod: "dnsPolicy: None\n" +
				`dnsConfig: {nameservers: [10.9.9.9], searches: [a.example, b.example], options: [{name: ndots, value: "3"}]}`,
			script: "sort /etc/resolv.conf", want: "nameserver 10.9.9.9\noptions ndots:3\nsearch a.example b.example",
		},
		{
			name: "host-port",
			container: "ports: [{containerPort: 80, hostPort: 28080}]\n" +
				"env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}]",
			script: "httpd -p 80 -h /etc; wget -qO- -T 60 http://$NODE:28080/hostname", want: "host-port",
		},
		{
			// The kubelet of the node has the profiles of the directory seccomp.
			name:      "seccomp-localhost",
			container: "securityContext: {seccompProfile: {type: Localhost, localhostProfile: no-mkdir.json}}",
			script:    "sed -n 's/^Seccomp:\\t//p' /proc/self/status; mkdir /d 2>/dev/null || echo refused; touch /f && echo file", want: "2\nrefused\nfile",
		},
		{name: "proc-mount-default", pod: "hostUsers: false", script: procMount, want: "masked\nread-only"},
		{
			name: "proc-mount-unmasked", container: "securityContext: {procMount: Unmasked}", pod: "hostUsers: false",
			script: procMount, want: "unmasked\nwritable",
		},
		{
			name:      "image-volume",
			container: "volumeMounts: [{name: v, mountPath: /v}, {name: v, mountPath: /part, subPath: usr/sbin}]",
			pod:       "volumes: [{name: v, image: {reference: '" + web + "', pullPolicy: IfNotPresent}}]",
			script:    "[ -x /v/usr/sbin/nginx ] && cmp /v/usr/sbin/nginx /part/nginx && echo same; touch /v/f 2>&1 | grep -o 'Read-only file system'",
			want:      "same\nRead-only file system",
		},
		{
			name:      "character-device",
			container: "volumeMounts: [{name: v, mountPath: /v}]",
			pod:       "volumes: [{name: v, hostPath: {path: /dev/null, type: CharDevice}}]",
			script:    "stat -c '%F %t %T' /v; echo x >/v; wc -c </v", want: "character special file 1 3\n0",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.apply(t, sleeper(c.name, c.container, c.pod))
			s.ready(t, c.name)
			s.want(t, c.name, c.script, c.want)
			s.kubectl(t, "delete", "pod", c.name, "--timeout", patience().String())
		})
	}
}

// procMount says whether any of the files that are masked by default is, by /dev/null, and whether /proc/sys is read-only.
const procMount = `for f in kcore keys timer_list; do [ ! -c /proc/$f ] || echo masked; done | sort -u | grep . || echo unmasked
grep -q ' /proc/sys .* ro,' /proc/mounts && echo read-only || echo writable`

// A socket is there for pods to which it is given, and of those in one pod one reaches another by it.
func TestHostPathSocket(t *testing.T) {
	s := newSpace(t)
	dir := s.hostDir(t)
	const logs = "ln -s /v/socket /dev/log"
	s.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: server}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, hostPath: {path: %[2]s, type: DirectoryOrCreate}}]
  containers:
  - {name: server, image: %[1]s, command: [sh, -c, '%[3]s; exec syslogd -n -O /log'], volumeMounts: [{name: v, mountPath: /v}]}
  - {name: client, image: %[1]s, command: [sh, -c, '%[3]s; exec sleep infinity'], volumeMounts: [{name: v, mountPath: /v}]}
`, box, dir, logs))
	s.ready(t, "server")
	s.until(t, "the server has made its socket", func() bool { return s.sh(t, "server -c client", "[ ! -S /v/socket ] || echo there") == "there" })
	s.sh(t, "server -c client", "logger hello")
	s.until(t, "what the client said has arrived", func() bool {
		return strings.HasSuffix(s.sh(t, "server -c server", "cat /log || :"), "hello")
	})
	s.apply(t, sleeper("other", "volumeMounts: [{name: v, mountPath: /socket}]",
		fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s/socket, type: Socket}}]", dir)))
	s.ready(t, "other")
	s.want(t, "other", "stat -c %F /socket", "socket")
}

// What the node mounts below a volume: recursiveReadOnly makes it read-only too, and with mountPropagation HostToContainer it comes
// and goes while the pod runs. A pod of the cluster's default runtime mounts it.
func TestMountsBelowVolume(t *testing.T) {
	s := newSpace(t)
	dir := s.hostDir(t)
	s.applyDefault(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: mounter}
spec:
  terminationGracePeriodSeconds: 60
  volumes: [{name: v, hostPath: {path: %[2]s, type: DirectoryOrCreate}}]
  containers:
  - name: main
    image: %[1]s
    imagePullPolicy: IfNotPresent
    securityContext: {privileged: true}
    command:
    - sh
    - -c
    - |
      trap 'umount -l /v/there /v/late; exit 0' TERM
      mkdir -p /v/there /v/late && mount -t tmpfs none /v/there && echo there >/v/there/f && touch /up
      while :; do sleep 0.2; done
    readinessProbe: {exec: {command: [test, -e, /up]}, periodSeconds: 1, timeoutSeconds: 60}
    volumeMounts: [{name: v, mountPath: /v, mountPropagation: Bidirectional}]
`, box, dir))
	s.ready(t, "mounter")
	s.apply(t, sleeper("p", `
volumeMounts:
- {name: v, mountPath: /rro, readOnly: true, recursiveReadOnly: Enabled}
- {name: v, mountPath: /ro, readOnly: true}
- {name: v, mountPath: /slave, mountPropagation: HostToContainer}
`, fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s, type: Directory}}]", dir)))
	s.ready(t, "p")
	s.want(t, "p", "cat /rro/there/f; touch /rro/there/g 2>&1 | grep -o 'Read-only file system'; touch /ro/there/g && cat /slave/there/f",
		"there\nRead-only file system\nthere")
	s.sh(t, "mounter", "mount -t tmpfs none /v/late && echo late >/v/late/f")
	s.until(t, "what is mounted later is there", func() bool { return s.sh(t, "p", "cat /slave/late/f 2>/dev/null || :") == "late" })
	s.want(t, "p", "[ -e /ro/late/f ] || echo private", "private")
	// A virtual machine tells after the fact that a file is closed.
	s.until(t, "it can be unmounted", func() bool { return s.try("exec", "mounter", "--", "umount", "/v/late").code == 0 })
	s.until(t, "and is gone", func() bool { return s.sh(t, "p", "ls -A /slave/late; echo; echo empty") == "\nempty" })
}
